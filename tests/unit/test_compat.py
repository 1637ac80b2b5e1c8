"""Each private name of a library that raydiv/utils/compat.py uses still exists and behaves as before."""

from __future__ import annotations

import importlib
import inspect
import json
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raydiv.model.load import ModelSource
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


def test_a_local_ray_asks_for_any_port_of_its_agent_in_the_block() -> None:
    from ray._private import parameter

    with compat.ray_agent_on_free_port():
        assert parameter.RayParams().dashboard_agent_listen_port == 0
    assert parameter.RayParams().dashboard_agent_listen_port > 0


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


def test_propagate_to_train_controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is the one that Ray Train reads when it starts a controller."""
    from ray.train.v2._internal import constants
    from ray.train.v2.api import data_parallel_trainer

    monkeypatch.setattr(constants, "ENV_VARS_TO_PROPAGATE", constants.ENV_VARS_TO_PROPAGATE)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_ADDRESS" not in data_parallel_trainer.get_env_vars_to_propagate()
    compat.propagate_to_train_controllers("RAY_ADDRESS")
    variables = data_parallel_trainer.get_env_vars_to_propagate()
    assert variables["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert "get_env_vars_to_propagate()" in inspect.getsource(data_parallel_trainer.DataParallelTrainer)


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


# DeepSpeed


def zero_optimizer(stage: int) -> type:
    """DeepSpeed's optimizer of a ZeRO stage."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return DeepSpeedZeroOptimizer_Stage3 if stage == 3 else DeepSpeedZeroOptimizer


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_state_names(stage: int) -> None:
    """The attributes that only an engine has are looked up in the sources."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import mixed_precision_linkage

    of_optimizer, of_parameters = compat.ZERO_STATE[stage]
    source = inspect.getsource(zero_optimizer(stage))
    assert all(name in source for name in of_optimizer)
    modules = (parameter_offload, partition_parameters) if stage == 3 else (mixed_precision_linkage,)
    assert all(any(name in inspect.getsource(module) for module in modules) for name in of_parameters)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_require_zero_state_names_what_is_missing(stage: int) -> None:
    of_optimizer, of_parameters = compat.ZERO_STATE[stage]
    norm = [compat.GRADIENT_NORM[stage]] if stage else []
    optimizer = dict.fromkeys([*of_optimizer, *norm])
    parameter = dict.fromkeys(of_parameters)

    def require(optimizer: dict[str, None], parameter: dict[str, None], **engine: int) -> None:
        parts = SimpleNamespace(optimizer=SimpleNamespace(**optimizer), **engine)
        compat.require_zero_state(parts, [SimpleNamespace(**parameter)], stage)

    require(optimizer, parameter, basic_optimizer=0, global_rank=0)
    with pytest.raises(RuntimeError, match=rf"deepspeed \d.*engine\.global_rank.*{compat.DEEPSPEED_CHECKED}"):
        require(optimizer, parameter, basic_optimizer=0)
    for name in optimizer:
        without = {key: value for key, value in optimizer.items() if key != name}
        with pytest.raises(RuntimeError, match=rf"optimizer\.{name} "):
            require(without, parameter, basic_optimizer=0, global_rank=0)
    for name in parameter:
        without = {key: value for key, value in parameter.items() if key != name}
        with pytest.raises(RuntimeError, match=rf"parameter\.{name} "):
            require(optimizer, without, basic_optimizer=0, global_rank=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_infinite_gradient_norm(stage: int) -> None:
    """``step`` calls the method that is replaced, and the replacement is gone after the block."""
    kind, name = zero_optimizer(stage), compat.GRADIENT_NORM[stage]
    assert callable(getattr(kind, name))
    assert f"self.{name}()" in inspect.getsource(kind)
    optimizer = object.__new__(kind)
    with compat.infinite_gradient_norm(optimizer, stage, "cpu"):
        norm = getattr(optimizer, name)()
        assert float(norm[0] if stage == 3 else norm) == -1
    assert getattr(optimizer, name).__func__ is getattr(kind, name)


def test_limit_release_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is left out for a module whose parameters all stay whole."""
    import torch
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    monkeypatch.setattr(PartitionedParameterCoordinator, compat.RELEASE_LOOK_AHEAD, lambda *_: {7})
    coordinator = object.__new__(PartitionedParameterCoordinator)
    compat.limit_release_look_ahead(SimpleNamespace(parameter_offload=SimpleNamespace(param_coordinator=coordinator)))
    module: Any = torch.nn.Linear(2, 2)
    module.ds_external_parameters = dict
    for persistent in (True, False):
        module.bias.ds_persist, module.weight.ds_persist = True, persistent
        released = getattr(coordinator, compat.RELEASE_LOOK_AHEAD)(module, 0)
        assert released == (set() if persistent else {7})


def test_release_look_ahead_is_what_deepspeed_calls() -> None:
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    assert callable(getattr(PartitionedParameterCoordinator, compat.RELEASE_LOOK_AHEAD))
    assert "self.__params_to_release(" in inspect.getsource(PartitionedParameterCoordinator)


def test_skip_shared_memory_op() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = True
    compat.skip_shared_memory_op()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_attention_implementation() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    for attention in ("eager", "sdpa"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation=attention)  # type: ignore[arg-type]
        assert compat.attention_implementation(model.config.get_text_config()) == attention


def test_is_custom_code_refusal() -> None:
    from transformers.dynamic_module_utils import resolve_trust_remote_code

    with pytest.raises(ValueError, match="custom code") as caught:
        resolve_trust_remote_code(False, "somebody/model", has_local_code=False, has_remote_code=True)
    assert compat.is_custom_code_refusal(caught.value)
    assert not compat.is_custom_code_refusal(OSError("no file config.json"))


def test_tensor_version_counts_changes_in_place() -> None:
    import torch

    tensor = torch.zeros(2)
    version = compat.tensor_version(tensor)
    assert compat.tensor_version(tensor[:1]) == version
    tensor[:1].add_(1)
    assert compat.tensor_version(tensor) > version


def test_patched_nanogcg() -> None:
    gcg = pytest.importorskip("nanogcg.gcg")
    source = inspect.getsource(gcg)
    assert "get_nonascii_toks(tokenizer" in source
    assert "in tqdm(" in source
    forbidden = SimpleNamespace()
    with compat.patched_nanogcg(forbidden):
        assert gcg.get_nonascii_toks is forbidden
        assert list(gcg.tqdm([1, 2], disable=True)) == [1, 2]
    assert gcg.get_nonascii_toks is not forbidden


def test_keep_4bit_layout() -> None:
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64)
    assert layer.support_avx512bf16_for_cpu in (False, True)
    layer.support_avx512bf16_for_cpu = True
    compat.keep_4bit_layout(layer)
    assert layer.support_avx512bf16_for_cpu is False


def test_complete_chunked_attention(tmp_path: Path) -> None:
    """A Llama Guard 4 as published: with a vision model, and layers of chunked attention without a chunk's size."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig

    text = Llama4TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_layers=[],
        max_position_embeddings=64,
        attention_chunk_size=None,
        no_rope_layers=[1, 0],
    )
    vision = Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=28,
        patch_size=14,
        vision_output_dim=32,
        projector_input_dim=32,
        projector_output_dim=32,
    )
    published = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).eval()
    published.save_pretrained(tmp_path)
    ids = torch.arange(6, 16)[None]
    with pytest.raises((TypeError, ValueError)):
        published(input_ids=ids)
    published.config.text_config.attention_chunk_size = 32
    with torch.no_grad():
        assert torch.equal(ModelSource(tmp_path).load()(ids).logits, published(input_ids=ids).logits)


def test_require_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._raylet
    from ray._private.authentication import authentication_token_setup

    checked: list[bool] = []

    def ensure(config: Any, create_token_if_missing: bool) -> None:
        checked.append(create_token_if_missing)

    parameters = inspect.signature(authentication_token_setup.ensure_token_if_auth_enabled).parameters
    assert list(parameters)[1] == "create_token_if_missing"
    monkeypatch.setattr(authentication_token_setup, "ensure_token_if_auth_enabled", ensure)
    released = threading.Event()
    clients = {"good:1": lambda: None, "refused:1": lambda: 1 / 0, "silent:1": lambda: released.wait(60)}
    monkeypatch.setattr(ray._raylet, "GcsClient", lambda address: clients[address]())
    compat.require_cluster("good:1", 60)
    with pytest.raises(ConnectionError, match="division by zero"):
        compat.require_cluster("refused:1", 60)
    with pytest.raises(ConnectionError, match="no answer within 0 s"):
        compat.require_cluster("silent:1", 0.05)
    released.set()
    assert checked == [False] * 3
