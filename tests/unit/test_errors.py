"""A UserError is found inside the exceptions that Ray wraps it in."""

from __future__ import annotations

import pytest

from raydiv.utils.errors import UserError, find_user_error


class WrappedError(Exception):
    """As Ray's RayTaskError, which has the exception of a task in ``cause``."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("task failed")
        self.cause = cause


def raised_from(cause: BaseException) -> Exception:
    error = RuntimeError("outer")
    error.__cause__ = cause
    return error


USER_ERROR = UserError("model.id: change it")


@pytest.mark.parametrize(
    "error", [USER_ERROR, WrappedError(USER_ERROR), raised_from(USER_ERROR), raised_from(WrappedError(USER_ERROR))]
)
def test_a_wrapped_user_error_is_found(error: Exception) -> None:
    assert find_user_error(error) is USER_ERROR


@pytest.mark.parametrize("error", [None, RuntimeError("x"), WrappedError(KeyError("x")), raised_from(ValueError("x"))])
def test_other_errors_are_no_user_errors(error: Exception | None) -> None:
    assert find_user_error(error) is None
