"""Log-probs from hidden states: the same numbers and gradients as a log-softmax over the model's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.ranks import run_on_ranks
from raydiv.model import head as head_module
from raydiv.model import packing as packing_module
from raydiv.model.collate import ModelInputs, collate
from raydiv.model.compatibility import CompatibilityCheck
from raydiv.model.head import LogProbHead
from raydiv.utils.errors import UserError

torch.set_num_threads(1)

SIZES = {"vocab_size": 307, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {
    **SIZES,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", LLAMA),
    # a cap near the logits' size, so that it bends them
    "gemma2": ("Gemma2Config", {**LLAMA, "head_dim": 8, "final_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3TextConfig", {**LLAMA, "head_dim": 8}),
    "phi3": ("Phi3Config", LLAMA),
    "cohere2": ("Cohere2Config", {**LLAMA, "logit_scale": 0.25}),
    "olmo3": ("Olmo3Config", LLAMA),
    "granite": ("GraniteConfig", {**LLAMA, "logits_scaling": 3.0}),
    "cohere": ("CohereConfig", {**LLAMA, "logit_scale": 0.25}),
    "gpt-neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 64}),
    "falcon": ("FalconConfig", {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}),
    # its head has a bias
    "phi": ("PhiConfig", {**SIZES, "intermediate_size": 64}),
}
EXAMPLES: list[tuple[Sequence[int], Sequence[int]]] = [
    ([1, 5, 9], [200, 17, 2]),
    ([1], [306, 2]),
    ([1, 7, 8, 9, 10, 11], [3]),
    (np.array([4, 4]), np.array([30, 31, 32, 33, 2])),  # type: ignore[list-item]
]

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """11 scored positions make chunks of 4, 4 and 3, or 8 that may be kept for a backward and 3 before them."""
    monkeypatch.setattr(head_module, "chunk_tokens", lambda vocabulary, device: 4)
    monkeypatch.setattr(head_module, "KEPT_CHUNKS", {"cpu": 2})


def build(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model in which no parameter, bias and norm included, is at its neutral value."""
    import transformers

    name, options = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def forward(model: Any, inputs: ModelInputs) -> Tensor:
    """The model's logits, or what the head puts in their place."""
    return model(**inputs.forward_kwargs()).logits  # type: ignore[no-any-return]


def expected_logps(model: Any, inputs: ModelInputs) -> Tensor:
    return torch.log_softmax(forward(model, inputs).float(), -1)[inputs.rows, inputs.columns, inputs.targets]


def gradients(model: Any) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert [name for name, grad in found.items() if grad is None] == [
        name for name, grad in expected.items() if grad is None
    ]
    for name, grad in expected.items():
        other = found[name]
        if grad is not None and other is not None:
            np.testing.assert_allclose(other.numpy(), grad.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def coefficients(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3))


def run_head(model: Any, inputs: ModelInputs, weights: Tensor, push: bool, runs: Sequence[int] = ()) -> Tensor:
    """Backward of sum_t weights_t * logp_t in either mode; returns what the forward gave."""
    head = LogProbHead(model)
    weigh = (lambda part, _: weights[part]) if push else None
    head.set_targets(inputs.rows, inputs.columns, inputs.targets, weigh, runs)
    out = forward(model, inputs)
    (out if push else (weights * out).sum()).backward()  # type: ignore[no-untyped-call]
    head.remove()
    return out.detach()


@pytest.mark.parametrize("push", [False, True], ids=["score", "push"])
@every_architecture
def test_values_and_gradients(architecture: str, push: bool) -> None:
    model, inputs = build(architecture), collate(EXAMPLES)
    weights = coefficients(len(inputs.targets))
    expected = expected_logps(model, inputs)
    (weights * expected).sum().backward()  # type: ignore[no-untyped-call]
    wanted = gradients(model)
    assert sum(float(grad.abs().sum()) for grad in wanted.values() if grad is not None) > 1

    out = run_head(model, inputs, weights, push)
    torch.testing.assert_close(out, (weights * expected).sum() if push else expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model), wanted)


def on_ranks(models: Path, stage: int, push: bool) -> dict[str, dict[str, np.ndarray]]:
    """Each architecture's log-probs of this rank's half of the examples, and gradients summed over ranks; runs on a
    rank.
    """
    from deepspeed.utils import safe_get_full_grad

    import raydiv.training.engine as engine_module
    from raydiv.config import load_recipe
    from raydiv.model.load import build_policy
    from raydiv.utils import distributed as dist

    head_module.chunk_tokens = lambda vocabulary, device: 4
    engine_module.PERSISTENT_ELEMENTS = 0  # everything is partitioned, however small
    recipe = load_recipe(
        {
            "model": {"id": "none"},
            "loss": {"type": "dpo"},
            "optim": {"steps": 1, "lr": 0.1},
            "engine": {"zero_stage": stage},
        }
    )
    inputs = collate(EXAMPLES[dist.rank() :: 2])
    weights = coefficients(len(inputs.targets))
    found = {}
    for architecture in ARCHITECTURES:
        built = partial(build_policy, models / architecture, recipe.model, torch.float32)
        engine = engine_module.DeepSpeedEngine(recipe, built)
        head = LogProbHead(engine.model)
        head.set_targets(inputs.rows, inputs.columns, inputs.targets)
        with torch.no_grad():
            logps = engine(**inputs.forward_kwargs()).logits
        head.set_targets(inputs.rows, inputs.columns, inputs.targets, (lambda part, _: weights[part]) if push else None)
        out = engine(**inputs.forward_kwargs()).logits
        engine.backward(out if push else (weights * out).sum(), last=True)
        grads = {name: safe_get_full_grad(parameter) for name, parameter in engine.model.named_parameters()}
        found[architecture] = {"logps": logps.numpy(), **{name: grad.numpy() for name, grad in grads.items()}}
        engine.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "push"), [(0, True), (3, False), (3, True)])
def test_values_and_gradients_under_zero(stage: int, push: bool, tmp_path: Path) -> None:
    for architecture in ARCHITECTURES:
        build(architecture).save_pretrained(tmp_path / architecture)
    found = run_on_ranks(on_ranks, 2, tmp_path, tmp_path, stage, push)
    for architecture in ARCHITECTURES:
        model = build(architecture)
        for rank, of_rank in enumerate(found):
            inputs = collate(EXAMPLES[rank::2])
            expected = expected_logps(model, inputs)
            (coefficients(len(inputs.targets)) * expected).sum().backward()  # type: ignore[no-untyped-call]
            logps = of_rank[architecture]["logps"]
            np.testing.assert_allclose(logps, expected.detach().numpy(), rtol=0, atol=1e-5, err_msg=architecture)
        wanted = gradients(model)
        for of_rank in found:
            grads = {name: torch.from_numpy(of_rank[architecture][name]) for name in wanted}
            assert_same_gradients(grads, wanted)


@every_architecture
def test_remove_restores_the_model(architecture: str) -> None:
    model, inputs = build(architecture), collate(EXAMPLES)
    config = model.config.to_dict()
    with torch.no_grad():
        logits = forward(model, inputs)
        head = LogProbHead(model)
        head.set_targets(inputs.rows, inputs.columns, inputs.targets)
        assert forward(model, inputs).shape == inputs.targets.shape
        head.remove()
        assert torch.equal(forward(model, inputs), logits)
    assert model.config.to_dict() == config
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_scores_are_the_same_without_graph(architecture: str) -> None:
    model, inputs = build(architecture), collate(EXAMPLES)
    head = LogProbHead(model)
    head.set_targets(inputs.rows, inputs.columns, inputs.targets)
    scored = forward(model, inputs)
    assert scored.requires_grad
    head.set_targets(inputs.rows, inputs.columns, inputs.targets)
    with torch.no_grad():
        assert torch.equal(forward(model, inputs), scored)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_chunks_change_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(architecture), collate(EXAMPLES)
    weights = coefficients(len(inputs.targets))
    total = run_head(model, inputs, weights, push=True)
    in_chunks = gradients(model)
    monkeypatch.setattr(head_module, "chunk_tokens", lambda vocabulary, device: 256)
    torch.testing.assert_close(run_head(model, inputs, weights, push=True), total, rtol=0, atol=1e-5)
    assert_same_gradients(in_chunks, gradients(model))


@pytest.mark.parametrize("push", [False, True], ids=["score", "push"])
def test_dummy_takes_part_and_moves_nothing(push: bool) -> None:
    model, inputs = build("llama-tied"), collate([])
    out = run_head(model, inputs, torch.zeros(1), push, runs=[1])
    assert out.isfinite().all()
    if push:
        assert out == 0
    else:
        torch.testing.assert_close(inputs.sum_per_example(out, 1), expected_logps(model, inputs).detach())
    found = gradients(model)
    assert all(grad is not None and not grad.any() for grad in found.values())


@pytest.mark.parametrize("push", [False, True], ids=["score", "push"])
@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_gradient_passes_through_a_frozen_head(architecture: str, push: bool) -> None:
    model, inputs = build(architecture), collate(EXAMPLES)
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    weights = coefficients(len(inputs.targets))
    (weights * expected_logps(model, inputs)).sum().backward()  # type: ignore[no-untyped-call]
    wanted = gradients(model)
    run_head(model, inputs, weights, push)
    found = gradients(model)
    assert found["lm_head.weight"] is None
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("push", [False, True], ids=["score", "push"])
def test_adapters_are_part_of_the_model(push: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model, inputs = get_peft_model(build("llama"), config).eval(), collate(EXAMPLES)
    weights = coefficients(len(inputs.targets))
    expected = expected_logps(model, inputs)
    (weights * expected).sum().backward()  # type: ignore[no-untyped-call]
    wanted = gradients(model)
    out = run_head(model, inputs, weights, push)
    torch.testing.assert_close(out, (weights * expected).sum() if push else expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model), wanted)


def test_an_adapter_on_the_head_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="target_modules"):
        LogProbHead(get_peft_model(build("llama"), config))


RUNS = [[3, 2, 1, 5], [5, 6], [11], [1] * 11, [4, 7]]
"""Lengths of runs of the 11 positions: within the buffer of 4, beyond it, and at its edge."""


@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "phi"])
def test_coefficients_may_be_asked_for_run_by_run(architecture: str, runs: list[int]) -> None:
    """What is answered may depend on the log-probs of the run, all of which must be there."""
    model, inputs = build(architecture), collate(EXAMPLES)
    expected = expected_logps(model, inputs)
    ends = np.cumsum(runs)
    slices = [slice(end - run, end) for end, run in zip(ends.tolist(), runs, strict=True)]
    wanted = torch.cat([expected.detach()[part].sum().expand(part.stop - part.start) for part in slices])
    (wanted * expected).sum().backward()  # type: ignore[no-untyped-call]
    grads = gradients(model)
    asked: list[slice] = []

    def weigh(part: slice, logps: Tensor) -> Tensor:
        asked.append(part)
        whole = [own for own in slices if part.start <= own.start and own.stop <= part.stop]
        assert sum(own.stop - own.start for own in whole) == len(logps) == part.stop - part.start
        return torch.cat(
            [
                logps[own.start - part.start :][: own.stop - own.start].sum().expand(own.stop - own.start)
                for own in whole
            ]
        )

    head = LogProbHead(model)
    head.set_targets(inputs.rows, inputs.columns, inputs.targets, weigh, runs)
    total = forward(model, inputs)
    total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(total, (wanted * expected).sum(), rtol=1e-5, atol=1e-4)
    found = {name: None if grad is None else grad / 50 for name, grad in gradients(model).items()}
    assert_same_gradients(found, {name: None if grad is None else grad / 50 for name, grad in grads.items()})
    assert [part.start for part in asked][1:] == [part.stop for part in asked][:-1]


def test_logits_of_a_run_that_fits_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("llama"), collate(EXAMPLES)
    made: list[int] = []
    logits = head_module._Projection.logits

    def counted(self: Any, part: slice) -> Any:
        made.append(part.stop - part.start)
        return logits(self, part)

    monkeypatch.setattr(head_module._Projection, "logits", counted)
    run_head(model, inputs, coefficients(11), push=True, runs=[3, 1, 2, 5])
    assert made == [4, 2, 4, 1, 4, 1]  # 5 positions exceed the buffer, and are made twice
    made.clear()
    model.get_output_embeddings().requires_grad_(False)
    run_head(model, inputs, coefficients(11), push=False)
    assert sum(made) == 11  # with the graph kept, too, where the head is frozen


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_forward_between_score_and_backward_changes_nothing(architecture: str) -> None:
    model, inputs = build(architecture), collate(EXAMPLES)
    weights = coefficients(len(inputs.targets))
    run_head(model, inputs, weights, push=False)
    wanted = gradients(model)
    head = LogProbHead(model)
    head.set_targets(inputs.rows, inputs.columns, inputs.targets)
    out = forward(model, inputs)
    head.set_targets(inputs.rows, inputs.columns, inputs.targets.flip(0))
    with torch.no_grad():
        forward(model, inputs)
    (weights * out).sum().backward()  # type: ignore[no-untyped-call]
    assert_same_gradients(gradients(model), wanted)


@pytest.mark.usefixtures("own_cache")
def test_what_a_probe_found_is_kept_for_models_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = 0

    def counted(model: Any) -> Callable[..., Any]:
        def forward(**inputs: Any) -> Any:
            nonlocal forwards
            forwards += 1
            return model(**inputs)

        return forward

    for architecture, expected in (("llama", 2), ("llama", 2), ("qwen2", 2 + 2), ("llama-tied", 2 + 2 + 2)):
        model = build(architecture)
        assert probe(model, counted(model)).packing(4) == ("mask", "")
        assert forwards == expected, architecture
    model = build("llama")
    probe(model, counted(model)).packing(8)
    assert forwards == 8
    model.config.auto_map = {"AutoModelForCausalLM": "somebody--modeling.Llama"}
    probe(model, counted(model)).packing(8)
    assert forwards == 10


def probe(model: Any, forward: Callable[..., Any] | None = None) -> CompatibilityCheck:
    return CompatibilityCheck(LogProbHead(model), model, forward or model, torch.device("cpu"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_probe_passes_the_architectures_that_it_serves(name: str) -> None:
    probe(build(name)).require_supported_logits()


@pytest.mark.usefixtures("own_cache")
def test_probe_refuses_logits_that_are_treated_in_an_unknown_way() -> None:
    model = build("llama")
    plain = model.forward

    def doubled(**inputs: Any) -> Any:
        output = plain(**inputs)
        output.logits = 2 * output.logits
        return output

    for ask in (probe(model, doubled).require_supported_logits, lambda: probe(model, doubled).packing(8)):
        with pytest.raises(UserError, match=r"model\.id: Llama"):
            ask()


PACKED = [name for name in ARCHITECTURES if name != "gemma2"]
"""Gemma 2 caps its attention scores, which no fused attention does."""


@pytest.mark.usefixtures("own_cache")
def test_windows_and_chunks_that_packing_does_not_see_are_padded() -> None:
    model = build("mistral", sliding_window=16)
    assert probe(model).packing(max_length=17) == ("mask", "")
    # of a model with attention code of its own
    model._supports_attention_backend = False
    assert packing_module.packing_of(model, 16) == ("mask", "")
    packing, why = packing_module.packing_of(model, 17)
    assert packing == "none"
    assert "window of 16 tokens" in why
    chunked = build("llama", attention_chunk_size=16)
    assert packing_module.packing_of(chunked, 16) == ("mask", "")
    packing, why = packing_module.packing_of(chunked, 17)
    assert packing == "none"
    assert "chunks of 16 tokens" in why


WINDOWED = {
    "mistral": {"sliding_window": 3},
    "qwen2": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 3},
    "cohere2": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("architecture", WINDOWED)
def test_windows_shorter_than_examples_are_kept_in_packed_rows(architecture: str) -> None:
    model = build(architecture, **WINDOWED[architecture])
    assert packing_module.packing_of(model, 100) == ("mask", "")
    whole = build(architecture, **WINDOWED[architecture] | {"sliding_window": 64})
    padded, packed = collate(EXAMPLES), collate(EXAMPLES, "mask")
    logps = expected_logps(model, padded)
    torch.testing.assert_close(expected_logps(model, packed), logps, rtol=0, atol=1e-4)
    assert not torch.allclose(expected_logps(whole, padded), logps, atol=1e-3), "the window matters here"


def varlen_by_definition(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn`` by its documentation; the kernel itself runs on CUDA alone."""
    assert cu_q is cu_k
    assert cu_q.dtype is torch.int32
    assert max_q == max_k == int(cu_q.diff().max())
    before, after = options["window_size"]
    assert after == 0
    assert options["enable_gqa"]
    rows = []
    for start, stop in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        q, k, v = (tensor[start:stop].transpose(0, 1).float() for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(len(q) // len(k), dim=0) for tensor in (k, v))
        position = torch.arange(stop - start)
        distance = position[:, None] - position
        seen = (distance >= 0) & ((distance <= before) | (before < 0))
        scale = options["scale"] if options["scale"] is not None else q.shape[-1] ** -0.5
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append((scores @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(rows)


@pytest.mark.parametrize("architecture", ["llama", "falcon", "granite", *WINDOWED])
def test_one_kernel_gives_what_the_loop_gives(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's arguments, by a stand-in for it: heads that are not repeated, scales, windows and boundaries."""
    model, packed = build(architecture, **WINDOWED.get(architecture, {})), collate(EXAMPLES, "mask")
    by_loop = expected_logps(model, packed)
    heads: list[tuple[int, int]] = []

    def kernel(query: Tensor, key: Tensor, *arguments: Any, enable_gqa: bool, **options: Any) -> Tensor:
        heads.append((query.shape[1], key.shape[1]))
        return varlen_by_definition(query, key, *arguments, enable_gqa=enable_gqa, **options)

    def one_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any, window: int | None = None, **options: Any) -> Tensor:
        return packing_module._one_kernel(q, k, v, mask, window, options.get("scale"))

    monkeypatch.setattr(packing_module, "variable_length_kernel", lambda: kernel)
    monkeypatch.setattr(packing_module, "packed_attention", one_kernel)
    torch.testing.assert_close(expected_logps(model, packed), by_loop, rtol=0, atol=1e-4)
    # Falcon repeats its heads itself
    assert set(heads) == ({(4, 4)} if architecture == "falcon" else {(4, 2)})

    def kernel_of_torch_2_11(query: Tensor, key: Tensor, *arguments: Any, **options: Any) -> Tensor:
        assert query.shape[1] == key.shape[1]
        return varlen_by_definition(query, key, *arguments, enable_gqa=True, **options)

    monkeypatch.setattr(packing_module, "variable_length_kernel", lambda: kernel_of_torch_2_11)
    torch.testing.assert_close(expected_logps(model, packed), by_loop, rtol=0, atol=1e-4)


def test_the_kernel_of_torch_has_the_arguments_that_are_used() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert packing_module.variable_length_kernel() is varlen_attn
    half = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16)
    assert packing_module._kernel_supports(half, half, {})
    assert not packing_module._kernel_supports(half, half, {"dropout_p": 0.1})
    assert not packing_module._kernel_supports(half.float(), half.float(), {})
    assert not packing_module._kernel_supports(half[..., :60], half[..., :60], {})


def test_flash_attention_gets_the_boundaries_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    model, packed, calls = build("llama"), collate(EXAMPLES, "boundaries"), []

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        boundaries, same, longest, as_long = (arguments[name] for name in names)
        assert boundaries is same
        assert longest == as_long == int(boundaries.diff().max())
        calls.append(boundaries.tolist())
        k, v = (tensor.repeat_interleave(2, dim=1)[0].transpose(0, 1) for tensor in (key, value))
        rows = varlen_by_definition(
            query[0].transpose(0, 1), k, v, boundaries, boundaries, longest, longest,
            window_size=(-1, 0), enable_gqa=True, scale=arguments.get("scaling"),
        )  # fmt: skip
        return rows[None], None

    expected = expected_logps(model, collate(EXAMPLES))
    AttentionInterface.register("stand-in/flash-attn2", flash)
    model.config._attn_implementation = "stand-in/flash-attn2"
    assert packing_module.packing_of(model, 100) == ("boundaries", "")
    torch.testing.assert_close(expected_logps(model, packed), expected, rtol=0, atol=1e-4)
    assert calls == [[0, 6, 9, 16, 23]] * 2


@pytest.mark.usefixtures("own_cache")
def test_models_that_cannot_be_packed_say_why() -> None:
    assert probe(build("gemma2")).packing(8) == ("none", "eager attention does not support packed examples")
    blind = build("llama")
    blind.forward = lambda input_ids, attention_mask: None
    assert packing_module.packing_of(blind, 8) == ("none", "its forward takes no position_ids")


@pytest.mark.usefixtures("own_cache")
def test_probe_unmasks_examples_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def over_the_whole_row(q: Tensor, k: Tensor, v: Tensor, mask: Any, window: Any = None, **options: Any) -> Tensor:
        return packing_module._sdpa(q, k, v, is_causal=True, enable_gqa=True, **options)

    monkeypatch.setattr(packing_module, "packed_attention", over_the_whole_row)
    packing, why = probe(build("llama")).packing(8)
    assert packing == "none"
    assert "packed log-probs differ" in why


@pytest.mark.parametrize("push", [False, True], ids=["score", "push"])
@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.usefixtures("own_cache")
def test_packed_examples_are_the_padded_ones(architecture: str, push: bool) -> None:
    model = build(architecture, **({"sliding_window": 16} if architecture == "mistral" else {}))
    assert probe(model).packing(16) == ("mask", "")
    padded, packed = collate(EXAMPLES), collate(EXAMPLES, "mask")
    assert packed.ids.shape == (1, sum(len(p) + len(r) for p, r in EXAMPLES))
    weights = coefficients(len(padded.targets))
    expected = run_head(model, padded, weights, push)
    wanted = gradients(model)
    torch.testing.assert_close(run_head(model, packed, weights, push), expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model), wanted)


def test_low_precision_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "KEPT_CHUNKS", {"cpu": 1})  # for the same sums
    model, inputs = build("llama", torch.bfloat16), collate(EXAMPLES)
    weights = coefficients(len(inputs.targets))
    with torch.no_grad():
        expected = expected_logps(model, inputs)
    out = run_head(model, inputs, weights, push=False)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    scored = gradients(model)
    run_head(model, inputs, weights, push=True)
    pushed = gradients(model)
    for name, grad in scored.items():
        assert grad is not None
        assert grad.dtype == torch.bfloat16
        assert torch.equal(grad, pushed[name])  # type: ignore[arg-type]


def test_padding_changes_nothing() -> None:
    model = build("llama")
    head = LogProbHead(model)

    def score(*examples: tuple[Sequence[int], Sequence[int]]) -> Tensor:
        inputs = collate(examples)
        head.set_targets(inputs.rows, inputs.columns, inputs.targets)
        return inputs.sum_per_example(forward(model, inputs), len(examples))

    with torch.no_grad():
        together = score(*EXAMPLES)
        torch.testing.assert_close(together, torch.cat([score(example) for example in EXAMPLES]), rtol=0, atol=1e-5)


def test_every_forward_needs_targets() -> None:
    model, inputs = build("llama"), collate(EXAMPLES)
    head = LogProbHead(model)
    head.set_targets(inputs.rows, inputs.columns, inputs.targets)
    with torch.no_grad():
        forward(model, inputs)
        with pytest.raises(AssertionError, match="set_targets"):
            forward(model, inputs)


def test_collate_marks_what_is_scored() -> None:
    inputs = collate([([11, 12], [13, 14, 15]), ([21, 22, 23], [24])])
    assert inputs.ids.tolist() == [[11, 12, 13, 14, 15], [21, 22, 23, 24, 0]]
    assert inputs.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    # the last prompt token predicts the first of the response
    assert inputs.rows.tolist() == [0, 0, 0, 1]
    assert inputs.columns.tolist() == [1, 2, 3, 2]
    assert inputs.targets.tolist() == [13, 14, 15, 24]
    assert inputs.sum_per_example(torch.tensor([1.0, 2.0, 4.0, 8.0]), 2).tolist() == [7.0, 8.0]


def test_collate_packs_end_to_end() -> None:
    inputs = collate([([11, 12], [13, 14, 15]), ([21, 22, 23], [24])], "mask")
    assert inputs.ids.tolist() == [[11, 12, 13, 14, 15, 21, 22, 23, 24]]
    assert inputs.positions is not None
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert inputs.rows.tolist() == [0, 0, 0, 0]
    assert inputs.columns.tolist() == [1, 2, 3, 7]
    assert inputs.targets.tolist() == [13, 14, 15, 24]
    assert inputs.sum_per_example(torch.tensor([1.0, 2.0, 4.0, 8.0]), 2).tolist() == [7.0, 8.0]
    assert collate([([1], [2])], "positions").mask is None


def test_gpus_multiply_bf16_factors_into_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for products that CUDA alone has: logits are not rounded, nor are sums of the weight's gradient."""
    mm, addmm, wide = torch.mm, torch.addmm, []

    def wide_mm(a: Tensor, b: Tensor, *, out: Tensor, out_dtype: Any = None) -> Tensor:
        wide.append(out_dtype)
        return mm(a, b, out=out) if out_dtype is None else mm(a.float(), b.float(), out=out)

    def wide_addmm(added: Tensor, a: Tensor, b: Tensor, *, out: Tensor, out_dtype: Any) -> Tensor:
        wide.append(out_dtype)
        return addmm(added, a.float(), b.float(), out=out)

    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 16, dtype=torch.bfloat16), torch.randn(40, 16, dtype=torch.bfloat16)
    bias, targets = torch.randn(40, dtype=torch.bfloat16), torch.randint(40, (11,))
    exact = [tensor.float().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = torch.nn.functional.linear(*exact).log_softmax(-1)[torch.arange(11), targets]
    expected.sum().backward()

    def error() -> tuple[float, float]:
        given = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        logps = head_module._Score.apply(*given, targets, head_module.LogitRule(), torch.empty(4, 40))
        logps.sum().backward()
        of_gradient = (given[1].grad.float() - exact[1].grad).abs().max() / exact[1].grad.abs().max()
        return float((logps - expected).abs().max()), float(of_gradient)

    rounded = error()
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(head_module, "_multiplies_into_fp32", lambda factor: factor.dtype == torch.bfloat16)
    unrounded = error()
    assert torch.float32 in wide
    assert unrounded[0] < 1e-5 < 1e-3 < rounded[0]
    assert unrounded[1] <= rounded[1] < 0.02


@pytest.mark.parametrize("window", [None, 3])
def test_attention_in_bf16_has_the_gradient_of_fp32_on_a_cpu(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [5, 1, 17]
    inputs = [torch.randn(1, heads, sum(lengths), 8).bfloat16() for heads in (4, 2, 2)]
    direction, gradients = torch.randn(1, 4, sum(lengths), 8), []
    for dtype in (torch.float64, torch.bfloat16):
        given = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        output = packing_module.packed_attention(*given, packing_module.BlockDiagonalMask.of(lengths), window)
        output.backward(direction.bfloat16().to(dtype))
        gradients.append([tensor.grad for tensor in given])
    for exact, found in zip(*gradients, strict=True):
        assert found is not None
        assert float((found - exact).abs().max() / exact.abs().max()) < 2**-7, "one or two roundings"  # type: ignore[union-attr, operator]
