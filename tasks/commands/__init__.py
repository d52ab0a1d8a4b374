"""The subcommands of ``lightning``: one module each, with ``main(argv) -> exit code``."""
