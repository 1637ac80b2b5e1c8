"""Each private name of a library that raydiv/utils/compat.py uses still exists and behaves as before."""

from __future__ import annotations

import importlib
import inspect
import json
import signal
import sys
from pathlib import Path
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


def test_hidden_module_cannot_be_imported_in_the_block() -> None:
    sys.modules.pop("this", None)
    with compat.hide_module("this"), pytest.raises(ImportError):
        importlib.import_module("this")
    assert "this" not in sys.modules
    with compat.hide_module("json"):
        importlib.import_module("json")


def test_peft_without_quantizer_clears_the_caches_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import import_utils

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    installed = import_utils.is_bnb_available()
    with compat.peft_without_quantizer():
        assert not import_utils.is_bnb_available()
        assert not import_utils.is_bnb_4bit_available()
    assert import_utils.is_bnb_available() == installed


def test_ignore_sigint_of_trainer() -> None:
    """``fit`` still registers its handler by the name that is replaced."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    name = "_register_sigint_handler"
    assert callable(getattr(DataParallelTrainer, name))
    assert f"self.{name}(controller)" in inspect.getsource(DataParallelTrainer)
    trainer = DataParallelTrainer.__new__(DataParallelTrainer)
    compat.ignore_sigint_of_trainer(trainer)
    before = signal.getsignal(signal.SIGINT)
    trainer._register_sigint_handler(None)
    assert signal.getsignal(signal.SIGINT) is before


def test_dataset_fingerprint_changes_with_the_content() -> None:
    import datasets

    data = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]})
    shorter = data.select([0, 1])
    assert compat.dataset_fingerprint(data) != compat.dataset_fingerprint(shorter)
    assert len(compat.dataset_fingerprint(data.with_format("arrow"))) >= 16


def test_saved_data_files(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]}).save_to_disk(str(tmp_path), num_shards=2)
    files = compat.saved_data_files(json.loads((tmp_path / "state.json").read_text()))
    assert files == sorted(path.name for path in tmp_path.glob("*.arrow"))
    assert len(files) == 2
    with pytest.raises(ValueError, match="_data_files"):
        compat.saved_data_files({"files": []})
