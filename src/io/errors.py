"""Errors that a user can act on. Every package may import this module."""


class UserError(ValueError):
    """A mistake of the user, or a state of files or machine that only the user can mend.

    The message holds the offending value and what to do. Verbs print it as one line with exit code 2; every other
    exception keeps its traceback (`src.cli.entrypoint`).
    """
