"""Each private name of a library that raydiv/utils/compat.py uses still exists and behaves as before."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

from raydiv.utils import compat


def test_server_ray_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.dashboard.modules.dashboard_sdk import SubmissionClient

    answer = SimpleNamespace(status_code=200, json=lambda: {"ray_version": "9.9"}, raise_for_status=lambda: None)
    monkeypatch.setattr(SubmissionClient, "_do_request", lambda *_: answer)
    client = SubmissionClient("http://127.0.0.1:9")
    client._check_connection_and_version()
    assert compat.server_ray_version(client) == "9.9"


def test_is_missing_job_agent() -> None:
    from ray.dashboard.modules.job import job_head

    assert compat.is_missing_job_agent(RuntimeError(inspect.getsource(job_head)))
    assert not compat.is_missing_job_agent(RuntimeError("status code 500"))


def test_is_version_mismatch() -> None:
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "1.0", "python_version": "3.0.0"}, "here")
    assert compat.is_version_mismatch(caught.value)
    assert not compat.is_version_mismatch(RuntimeError("another reason"))
