"""The one exception that means: the user must change something."""


class UserError(ValueError):
    """A recipe, data or argument error.

    The message names the key, file, line or row, says what was found and what would do. The command line prints it
    without a traceback and exits with status 2.
    """


def user_error_in(error: BaseException | None) -> UserError | None:
    """The UserError that a worker raised, out of the layers that Ray wraps it in; None when it raised something else."""
    while error is not None:
        # what Ray raises for a task is a UserError too, with a traceback for its message: its cause comes first
        for found in (getattr(error, "cause", None), error):
            if isinstance(found, UserError):
                return found
        error = error.__cause__
    return None
