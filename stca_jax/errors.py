"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake in a config, a file or an input: launchers print its one paragraph and exit with 1.

    The message names the value, what was expected, and the fix.
    """
