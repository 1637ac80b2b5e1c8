"""Private names and behaviour of other libraries that raydiv depends on: one function each, with its reason.

Each names the version it was checked with (cluster/constraints.txt); tests/unit/test_compat.py fails where one has
changed.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def hide_module(library: str) -> Iterator[None]:
    """Make ``import library`` fail while the block runs, unless this process has imported it already.

    For optional imports of other libraries, such as mlflow and bitsandbytes, which take seconds and are of no use here.
    """
    hidden = library not in sys.modules
    if hidden:
        sys.modules[library] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[library]


@contextmanager
def peft_without_quantizer() -> Iterator[None]:
    """Let peft wrap unquantized weights without bitsandbytes, whose import loads torch's compiler.

    Checked with peft 0.21: ``peft.import_utils`` caches whether bitsandbytes is installed. Clears the caches on both
    sides.
    """
    with hide_module("bitsandbytes"):
        from peft import import_utils

        checks: Any = (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available)
        for check in checks:
            check.cache_clear()
        try:
            yield
        finally:
            for check in checks:
                check.cache_clear()


def keep_4bit_layout(model: Any) -> None:
    """Keep the 4-bit weights of a model in the layout in which they were read.

    On CPUs with AVX512-BF16 bitsandbytes repacks a layer's weights at its first evaluation, for a kernel that rounds to
    bf16 and has no backward: training after an evaluation would have other values, and no gradient through the layer.
    Checked with bitsandbytes 0.50: ``Linear4bit.support_avx512bf16_for_cpu`` asks for it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def complete_chunked_attention(model: Any) -> None:
    """Give layers of chunked attention a chunk of the whole context where the config names none.

    Older versions of transformers took that for full attention (Llama Guard 4 was saved so); transformers 5.23 fails.
    """
    config = model.config.get_text_config()
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) and config.attention_chunk_size is None:
        config.attention_chunk_size = config.max_position_embeddings


def server_ray_version(client: Any) -> str:
    """Ray's version on the cluster of a ``JobSubmissionClient``, whose ``get_version`` is that of the job API.

    Checked with Ray 2.60: ``SubmissionClient._server_ray_version``, set when the client connects.
    """
    return str(client._server_ray_version)


def require_cluster(address: str, seconds: float) -> None:
    """Raise AuthenticationError without a token that the settings require, and ConnectionError where the Ray cluster at
    HOST:PORT refuses this client or does not answer for ``seconds``.

    Checked with Ray 2.60: ray.init repeats a refused connection for 20 s, and waits for its first reply without a limit
    (seen once, with a wrong token: it never returned).
    """
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled

    client: Any = importlib.import_module("ray._raylet").GcsClient
    ensure_token_if_auth_enabled(None, create_token_if_missing=False)
    problems: list[str] = [f"no answer within {seconds:.0f} s"]

    def connect() -> None:
        try:
            client(address=address)
            problems.clear()
        except Exception as error:  # of several types
            problems[:] = [str(error)]

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    if problems:
        raise ConnectionError(problems[0])


def write_ray_address(folder: Path) -> None:
    """Let jobs of the local session in ``folder`` find it, as `ray start` does.

    Checked with Ray 2.60: ``ray.init`` does not, and a job then joins any Ray of this machine.
    """
    import ray
    from ray._private.utils import write_ray_address as write

    write(ray.get_runtime_context().gcs_address, str(folder))


def is_missing_job_agent(error: RuntimeError) -> bool:
    """Whether Ray refused a job because no agent has started yet: it raises a bare RuntimeError with this text.

    Checked with Ray 2.60: ``ray.dashboard.modules.job.job_head``.
    """
    return "No available agent" in str(error)


def is_version_mismatch(error: RuntimeError) -> bool:
    """Whether ``ray.init`` refused a cluster of another Python or Ray: it raises a bare RuntimeError with this text.

    Checked with Ray 2.60: ``ray._private.utils.check_version_info``.
    """
    return str(error).lstrip().startswith("Version mismatch")


@contextmanager
def ray_on_loopback() -> Iterator[None]:
    """A local Ray that starts while the block runs listens on 127.0.0.1 alone, its workers and agents included.

    Otherwise all its servers listen on every interface. Checked with Ray 2.60:
    ``ray._private.ray_constants.ENABLE_RAY_CLUSTER``, which Ray unsets on macOS and Windows, and the variable that the
    processes of the session read it from.
    """
    from unittest.mock import patch

    from ray._private import ray_constants

    variable = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    with patch.dict("os.environ", variable), patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextmanager
def ray_agent_on_free_port() -> Iterator[None]:
    """A local Ray that starts while the block runs gives its job agent a free port.

    ``ray.init`` has no option for it, and every Ray of a machine would take port 52365: the jobs of the second one
    would never start. Checked with Ray 2.60: ``ray._private.parameter.RayParams``, which ``ray.init`` fills.
    """
    from functools import partial
    from unittest.mock import patch

    from ray._private import parameter

    with patch.object(parameter, "RayParams", partial(parameter.RayParams, dashboard_agent_listen_port=0)):
        yield


def is_slow_start(error: Exception) -> bool:
    """Whether a local Ray did not start in time, as on a busy machine: it raises a bare Exception with this text.

    Checked with Ray 2.60: ``ray._private.node.Node``, which waits 30 s.
    """
    return "timed out during startup" in str(error)


def ignore_sigint_of_trainer(trainer: Any) -> None:
    """Keep Ray Train from handling Ctrl-C: its handler exits with status 0, and stays registered after training.

    Checked with Ray 2.60: ``DataParallelTrainer._register_sigint_handler``, which ``fit`` calls with the controller.
    """
    trainer._register_sigint_handler = lambda controller: None


def propagate_to_train_controllers(variable: str) -> None:
    """Let Ray Train pass an environment variable of this process to its controllers and workers; the list is not
    public.

    Checked with Ray 2.60: ``ray.train.v2._internal.constants.ENV_VARS_TO_PROPAGATE``.
    """
    from ray.train.v2._internal import constants

    constants.ENV_VARS_TO_PROPAGATE = {*constants.ENV_VARS_TO_PROPAGATE, variable}


def dataset_fingerprint(data: Any) -> str:
    """The fingerprint of a Hugging Face ``Dataset``: builder, configuration, revision, transforms. It has no public
    name.

    Checked with datasets 5.2.0: ``Dataset._fingerprint``.
    """
    return str(data._fingerprint)


def saved_data_files(state: Any) -> list[str]:
    """The Arrow files of a data set that ``save_to_disk`` wrote, in order, from the content of its ``state.json``.

    They are read without loading the data set, which may be remote. Raises ValueError for another layout. Checked with
    datasets 5.2.0: the key ``_data_files`` that ``Dataset.save_to_disk`` writes.
    """
    try:
        return [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise ValueError("lists no data files (_data_files) as datasets' save_to_disk writes them") from None


# DeepSpeed

DEEPSPEED_CHECKED = "0.19.8"
"""The version that the functions below were checked with; pyproject.toml bounds it."""

GRADIENT_NORM = {1: "scaled_global_norm", 2: "scaled_global_norm", 3: "_get_norm_groups"}
"""By ZeRO stage, the method by which the optimizer's ``step`` computes the norm of the gradients."""

RELEASE_LOOK_AHEAD = "_PartitionedParameterCoordinator__params_to_release"

_FRAGMENTS = (("_lazy_init_hp_params_optimizer_state", "update_lp_params"), ("_hp_mapping",))

ZERO_STATE: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    0: ((), ()),
    1: _FRAGMENTS,
    2: _FRAGMENTS,
    3: (
        (
            "fp32_partitioned_groups_flat",
            "_reassign_or_swap_out_partitioned_parameters",
            "persistent_parameters",
            "parameter_offload",
        ),
        ("ds_tensor", "ds_numel", "ds_persist"),
    ),
}
"""By ZeRO stage, the attributes of the optimizer and of its parameters that raydiv.training.zero_state uses."""


def require_zero_state(engine: Any, parameters: Iterable[Any], stage: int) -> None:
    """Raise RuntimeError where a DeepSpeed engine lacks a name that raydiv.training.zero_state or ``engine`` uses.

    DeepSpeed has no public way to read and write a rank's part of the optimizer state under another layout.
    """
    of_optimizer, of_parameters = ZERO_STATE[stage]
    norm = [GRADIENT_NORM[stage]] if stage and not hasattr(engine.optimizer, "clear_hp_grads") else []
    missing = [f"engine.{name}" for name in ("basic_optimizer", "global_rank") if not hasattr(engine, name)]
    missing += [f"optimizer.{name}" for name in (*of_optimizer, *norm) if not hasattr(engine.optimizer, name)]
    for parameter in parameters:
        missing += [f"parameter.{name}" for name in of_parameters if not hasattr(parameter, name)]
    if missing:
        raise _unsupported_deepspeed(f"{missing[0]} is missing")


def _unsupported_deepspeed(problem: str) -> RuntimeError:
    import deepspeed

    return RuntimeError(f"deepspeed {deepspeed.__version__}: {problem}; raydiv supports {DEEPSPEED_CHECKED}")


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling a shared-memory all-reduce, which takes a minute and is unused by ZeRO on gloo.

    Checked with DeepSpeed 0.19.8: ``deepspeed.ops.__compatible_ops__``.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def infinite_gradient_norm(optimizer: Any, stage: int, device: Any) -> Iterator[None]:
    """While the block runs, a ZeRO optimizer's ``step`` sees a norm that is not finite, and drops the gradients.

    DeepSpeed has no public way to discard a step. Checked with DeepSpeed 0.19.8: GRADIENT_NORM, where -1 stands for a
    norm that is not finite. The engine checks afterwards that no update was made.
    """
    import torch

    norm = torch.tensor(-1.0, device=device)
    setattr(optimizer, GRADIENT_NORM[stage], lambda: [norm] if stage == 3 else norm)
    try:
        yield
    finally:
        delattr(optimizer, GRADIENT_NORM[stage])


def limit_release_look_ahead(optimizer: Any) -> None:
    """Let ZeRO-3 search for the next use of a module's weights only where it could release them.

    DeepSpeed searches the rest of the step for each module, also for those whose weights stay whole, or that have none.
    A small model with adapters has thousands: its second step took a quarter of a minute longer.

    Checked with DeepSpeed 0.19.8: a private method of ``optimizer.parameter_offload.param_coordinator``.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
    from deepspeed.utils import z3_leaf_module

    coordinator = optimizer.parameter_offload.param_coordinator
    search = getattr(coordinator, RELEASE_LOOK_AHEAD, None)
    if search is None:  # in another version, where training is slower and not wrong
        return

    def params_to_release(module: Any, step_id: int) -> set[int]:
        if all(parameter.ds_persist for parameter in iter_params(module, recurse=z3_leaf_module(module))):
            return set()
        return search(module, step_id)  # type: ignore[no-any-return]

    setattr(coordinator, RELEASE_LOOK_AHEAD, params_to_release)


def attention_implementation(config: Any) -> str:
    """Attention that a loaded transformers model uses, such as ``sdpa``; no public name gives what ``auto`` became.

    Checked with transformers 5.23: ``PreTrainedConfig._attn_implementation``.
    """
    return str(config._attn_implementation)


def passes_windows_to_attention(model: Any) -> bool:
    """Whether a transformers model calls the registry of attention functions, with the window of each layer.

    Checked with transformers 5.23: ``PreTrainedModel._supports_attention_backend``.
    """
    return bool(getattr(model, "_supports_attention_backend", False))


def is_custom_code_refusal(error: Exception) -> bool:
    """Whether transformers refused a model because its code is not trusted: it raises a bare ValueError with this text.

    Checked with transformers 5.23: ``transformers.dynamic_module_utils.resolve_trust_remote_code``.
    """
    return "custom code" in str(error)


def tensor_version(tensor: Any) -> int:
    """Number of in-place changes of a tensor so far: tells whether its content is still what it was.

    Checked with torch 2.13: ``Tensor._version``, which autograd uses for the same check.
    """
    return int(tensor._version)


@contextmanager
def patched_nanogcg(forbidden_tokens: Any) -> Iterator[None]:
    """Let nanogcg exclude ``forbidden_tokens(tokenizer, device)`` from its suffixes, and draw no progress bar.

    It has no setting for either. Its public option excludes non-ASCII tokens alone, not special tokens.

    Checked with nanogcg 0.3.0: ``nanogcg.gcg.get_nonascii_toks`` and ``nanogcg.gcg.tqdm``, looked up at each call.
    """
    from unittest.mock import patch

    from nanogcg import gcg

    with patch.object(gcg, "get_nonascii_toks", forbidden_tokens), patch.object(gcg, "tqdm", lambda steps, **_: steps):
        yield


def make_readable_by_transformers_4(directory: Path) -> None:
    """Let transformers 4.57, and servers that use it, read a config and a tokenizer that transformers 5 wrote.

    Checked with transformers 5.23 and 4.57.6. The latter knows no class TokenizersBackend, refuses a list of
    ``extra_special_tokens``, and reads ``rope_theta`` alone: without it, it computes other logits, without a word.
    """
    for name, change in (("config.json", _add_rope_theta), ("tokenizer_config.json", _rename_tokenizer_class)):
        path = directory / name
        if path.is_file():
            content = json.loads(path.read_text())
            changed = change(content)
            if changed != content:
                path.write_text(json.dumps(changed, indent=2) + "\n")


def _add_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    config = {name: _add_rope_theta(value) if isinstance(value, dict) else value for name, value in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in config or "rotary_emb_base" in config:
        return config
    # Gemma 3 has one set for each kind of attention
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    if local is not None:
        config["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" not in rope:
        return config
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if config.get("model_type") == "gpt_neox":
        config |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    elif "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return config


def _rename_tokenizer_class(config: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
