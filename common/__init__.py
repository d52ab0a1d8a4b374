"""What all three wings stand on, and which imports none of them: errors for users, files."""
