"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake in a config, a file or an input: launchers print its one paragraph and exit with 1.

    The message names the value, what was expected, and the fix.
    """


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for one line of a log."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
