"""What the user must change is found inside the layers that Ray wraps it in."""

from __future__ import annotations

import pytest

from raydiv.utils.errors import UserError, find_user_error


class WrappedError(Exception):
    """Ray keeps what a task raised in ``cause``."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("task failed")
        self.cause = cause


def raised_from(cause: BaseException) -> Exception:
    error = RuntimeError("outer")
    error.__cause__ = cause
    return error


MINE = UserError("model.id: change it")


@pytest.mark.parametrize("error", [MINE, WrappedError(MINE), raised_from(MINE), raised_from(WrappedError(MINE))])
def test_the_users_part_is_found(error: Exception) -> None:
    assert find_user_error(error) is MINE


@pytest.mark.parametrize("error", [None, RuntimeError("x"), WrappedError(KeyError("x")), raised_from(ValueError("x"))])
def test_other_failures_are_not_the_users(error: Exception | None) -> None:
    assert find_user_error(error) is None
