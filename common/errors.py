"""Errors that a user can mend; any other exception is a fault of this project, with its traceback."""


class UserError(Exception):
    """What the user has to know and do; the command line prints the message and nothing else."""


class InvalidSetting(UserError, ValueError):
    """A setting, or a file that a setting names, can't be used; the message names both."""


class MissingFile(UserError, FileNotFoundError):
    """Nothing is found where a setting points to."""
