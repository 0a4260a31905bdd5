"""The error that a user can mend."""

from __future__ import annotations


class WrongUse(ValueError):
    """What was asked for cannot be done; the message says, in one line, what came, what is wanted and what to do.

    The command line prints it without a traceback and exits with code 2. Every other exception is a bug.
    """
