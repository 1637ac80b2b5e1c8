"""The one exception that means: the user must change something."""


class UserError(ValueError):
    """A recipe, data or argument error.

    The message names the key, file, line or row, says what was found and what would do. The command line prints it
    without a traceback and exits with status 2.
    """
