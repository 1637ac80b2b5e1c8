"""The one exception that means: the user must change something; and what helps to raise and find it."""


class UserError(ValueError):
    """An error in a recipe, in data or in arguments.

    The message names the key, file, line or row, what was found, and what to do. The command line prints it without a
    traceback and exits with status 2.
    """


def find_user_error(error: BaseException | None) -> UserError | None:
    """The UserError that a worker raised, unwrapped from Ray's exceptions; None where it raised something else."""
    while error is not None:
        # the error of a Ray task is itself a UserError, with a traceback as its message, so its cause comes first
        for candidate in (getattr(error, "cause", None), error):
            if isinstance(candidate, UserError):
                return candidate
        error = error.__cause__
    return None


def one_line(message: object, length: int | None = None) -> str:
    """The text of an error on one line, for use in another message; its first ``length`` characters."""
    return " ".join(str(message).split())[:length]
