"""``raydiv plan``: checks a recipe and forecasts its memory, steps, tokens, time and sizes. Starts nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from raydiv.commands.plan.amounts import DataAmounts, measure_data
from raydiv.commands.plan.architecture import Architecture, architecture_of, config_of, local_model_directory
from raydiv.commands.plan.layout import (
    MARGIN,
    LayoutFit,
    fitting_changes,
    lowest_fitting,
    stage_layouts,
    with_layout,
)
from raydiv.commands.plan.memory import sizes_on_disk
from raydiv.commands.plan.power import EvaluationSize
from raydiv.commands.plan.tested import untested_combinations
from raydiv.commands.plan.traffic import Traffic, step_traffic
from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.data.prompt_sets import PromptSets
from raydiv.losses import widest_scope
from raydiv.model.chat import Chat, chat_table
from raydiv.model.limits import limit_notes, require_limits
from raydiv.model.reward import reward_directory
from raydiv.model.silence import silence_libraries
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.resources import HOST_MEMORY_FRACTION, free_gpu_memory
from raydiv.utils.errors import UserError
from raydiv.utils.units import GIB

MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "head", "buffers", "runtime")
"""Parts of a worker's memory, in the order of the table."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

SPEED_RECORDS = 20
"""Number of last steps of a run whose median speed is used."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of a recipe. ``facts`` is what ``--json`` prints; its sizes are bytes."""

    facts: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether the chosen layout fits into a worker's memory."""
        fits: bool = self.facts["layout"]["fits"]
        return fits

    def table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Header and rows of a worker's memory in GiB, with a column for each ZeRO stage that the recipe allows."""
        stages: list[dict[str, Any]] = self.facts["stages"]
        chosen = self.facts["layout"]["zero_stage"]
        header = [
            "GiB a worker",
            *(f"ZeRO {stage['stage']}{' *' if stage['stage'] == chosen else ''}" for stage in stages),
        ]
        rows = [(name, *(_gib(stage["memory"][name]) for stage in stages)) for name in MEMORY_PARTS]
        rows.append(("together", *(_gib(stage["total"]) for stage in stages)))
        rows.append(("host memory (offload, checkpoints)", *(_gib(stage["memory"]["host"]) for stage in stages)))
        rows.append(("peak in the", *(stage["moment"] for stage in stages)))
        rows.append(("tokens a micro-batch", *(f"{stage['tokens_per_microbatch']:,}" for stage in stages)))
        rows.append(("fits", *("yes" if stage["fits"] else "no" for stage in stages)))
        return header, [row for row in rows if any(cell not in ("0.00", row[0]) for cell in row[1:])]

    def notes(self) -> Iterator[str]:
        """The rest of the forecast, a line per fact."""
        facts = self.facts
        model, data, workers = facts["model"], facts["data"], facts["workers"]
        yield (
            f"model: {model['id']} ({model['kind']}), {_count(model['parameters'])} parameters, "
            f"{_count(model['trainable'])} trainable; micro-batches are {model['packing']}"
        )
        yield (
            f"workers: {workers['number']} x {workers['memory'] / GIB:.1f} GiB ({workers['memory_from']}), "
            f"{1 - MARGIN:.0%} of it usable"
        )
        examples, tokens = _amount(data["examples"], "examples"), _amount(data["tokens"], "tokens")
        yield f"data: {examples}, {tokens} per epoch ({data['how']})"
        yield f"run: {_amount(facts['steps'], 'updates')}, {_amount(facts['tokens'], 'tokens')}, {self._duration()}"
        sizes = facts["sizes"]
        yield f"on disk: checkpoint {_gib(sizes['checkpoint'])} GiB, model {_gib(sizes['model'])} GiB"
        sent = facts["traffic"]
        yield (
            f"network: each worker sends {_gib(sent['total'])} GiB per step (gradients {_gib(sent['gradients'])}, "
            f"weights {_gib(sent['weights'])}; {sent['micro_batches']} micro-batches)"
        )
        if facts["network"] is not None:
            yield f"note: {facts['network']}"
        if facts["chat"] is not None:
            yield from (f"{name}: {fact}" for name, fact in chat_table(facts["chat"]).items())
        yield from facts["evaluation"]
        yield from (f"note: {note}" for note in facts["limits"])
        yield from (f"not checked, not on this machine: {name}" for name in facts["unchecked"])
        yield from (f"not covered by the tests: {words}" for words in facts["untested"])
        if self.fits:
            yield f"fits: {', '.join(facts['layout']['settles'])}"
        else:
            would = ", or ".join(facts["changes"])
            yield f"does not fit; {f'changes that fit: {would}' if would else 'no change that raydiv tries would fit'}"

    def _duration(self) -> str:
        seconds, speed = self.facts["seconds"], self.facts["speed"]
        if speed is None:
            return "time unknown (--tokens-per-second, or a run of this model in output_dir)"
        if seconds is None:
            return "time unknown"
        return f"{seconds / 3600:.1f} hours at {speed['tokens_per_second']:,.0f} tokens/s ({speed['from']})"


def plan(
    recipe: Recipe,
    *,
    tokens_per_second: float | None = None,
    memory_gb: float | None = None,
    detect: float | None = None,
) -> Forecast:
    """Check a recipe, its model's config and its data, and forecast memory, steps, tokens, time and sizes.

    ``memory_gb`` is the memory of a worker's GPU, or a worker's share of a node, in GiB; by default it is this
    machine's. ``detect``: a difference in attack success whose evaluation is sized as well.

    Nothing is started. The hub is asked only for the config of a model that is neither local nor shipped. Raises
    UserError for whatever training would refuse.
    """
    if memory_gb is not None:
        recipe = recipe.model_copy(
            update={"cluster": recipe.cluster.model_copy(update={"worker_memory_gb": memory_gb})}
        )
    silence_libraries()
    architecture, chat = architecture_of(recipe), _chat(recipe)
    limits = [] if chat is None else _limits(recipe, chat)
    unchecked_rewards = _require_rewards(recipe, chat)
    amounts = measure_data(recipe, chat)
    memory, memory_from = _worker_memory(recipe.cluster)
    fits = list(stage_layouts(architecture, recipe, amounts.budget, memory))
    fit = lowest_fitting(recipe, fits)
    speed = _speed(recipe, tokens_per_second)
    tokens = amounts.tokens_of_run(recipe)
    resolved = with_layout(recipe, fit)
    traffic, two_passes = _traffic(architecture, recipe, fit, amounts)
    operations = (8 if two_passes else 6) * architecture.multiplied_parameters * amounts.budget.tokens(architecture)
    network = traffic.network_note(operations) if recipe.cluster.use_gpu else None
    return Forecast(
        {
            "model": _model_facts(recipe, architecture),
            "workers": {"number": recipe.cluster.num_workers, "memory": memory, "memory_from": memory_from},
            "layout": {
                "zero_stage": fit.stage,
                "tokens_per_microbatch": fit.tokens,
                "fits": fit.fits,
                "settles": [
                    f"engine.zero_stage {fit.stage}",
                    f"engine.precision {recipe.engine.precision}",
                    f"micro-batches of up to {fit.tokens:,} tokens"
                    + (", a worker's whole part of the step" if _is_whole_budget(fit, amounts, architecture) else ""),
                ],
            },
            "stages": [_stage_facts(each) for each in fits],
            "data": {
                "examples": amounts.examples,
                "tokens": amounts.tokens,
                "how": amounts.basis,
                **asdict(amounts.budget),
            },
            "steps": amounts.steps,
            "tokens": tokens,
            "speed": speed,
            "seconds": tokens / speed["tokens_per_second"] if tokens is not None and speed is not None else None,
            "sizes": sizes_on_disk(architecture, recipe),
            "traffic": traffic.rows(),
            "network": network,
            "chat": None if chat is None else chat.facts(),
            "evaluation": [] if detect is None else EvaluationSize.of(detect, PromptSets.of(recipe).evaluate).notes(),
            "limits": limits,
            "unchecked": [
                *([] if chat else [f"the tokenizer of {recipe.model.id}"]),
                *unchecked_rewards,
                *amounts.unavailable,
            ],
            "untested": list(untested_combinations(resolved)),
            "changes": [] if fit.fits else fitting_changes(recipe, amounts.budget, memory),
        }
    )


def _limits(recipe: Recipe, chat: Chat) -> list[str]:
    """Notes on the model's limits. Raises UserError where the recipe or the tokenizer exceeds them."""
    config, directory = config_of(recipe.model).get_text_config(), local_model_directory(recipe.model)
    require_limits(recipe, config, chat)
    return list(limit_notes(recipe, config, chat, directory)) if directory else []


def _require_rewards(recipe: Recipe, chat: Chat | None) -> list[str]:
    """The model of ``loss.position.model`` where it cannot be checked here. Raises UserError as training does."""
    model = recipe.loss.position.model
    if model is None:
        return []
    if chat is None or not (model.startswith("bundled:") or Path(model).expanduser().exists()):
        return [model]
    reward_directory(recipe, config_of(recipe.model).get_text_config().vocab_size, chat)
    return []


def _chat(recipe: Recipe) -> Chat | None:
    """The tokenizer; None if the model's local directory has none."""
    directory = local_model_directory(recipe.model)
    if directory is None or not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    return Chat.from_recipe(recipe, directory)


def _worker_memory(cluster: ClusterConfig) -> tuple[int, str]:
    """Bytes of a worker's memory, and where the number comes from."""
    if cluster.worker_memory_gb is not None:
        return round(cluster.worker_memory_gb * GIB), "as given"
    if not cluster.use_gpu:
        return round(HOST_MEMORY_FRACTION * _machine_memory() / cluster.num_workers), "its share of this machine"
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "cluster.worker_memory_gb: missing, and this machine has no GPU; set it to the GiB of a worker's GPU"
        )
    return free_gpu_memory(), "free on this machine's GPU"


def _machine_memory() -> int:
    """Bytes of memory of this machine, or of the container if its limit is lower."""
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    limits_text = [path.read_text().strip() for path in limits if path.is_file()]
    return min([int(psutil.virtual_memory().total), *(int(number) for number in limits_text if number.isdigit())])


def _speed(recipe: Recipe, tokens_per_second: float | None) -> dict[str, Any] | None:
    """Tokens per second and their source: the argument, or the newest comparable run in ``output_dir``."""
    if tokens_per_second is not None:
        return {"tokens_per_second": tokens_per_second, "from": "as given"}
    runs = sorted(recipe.output_path.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run in (RunDirectory(path.parent) for path in runs):
        if run.holds_a_run and _same_speed(run, recipe):
            speeds = [line["tokens_per_second"] for line in run.metrics.read() if "tokens_per_second" in line]
            if speeds:
                return {
                    "tokens_per_second": statistics.median(speeds[-SPEED_RECORDS:]),
                    "from": f"measured in {run.path}",
                }
    return None


def _same_speed(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether a run's speed is a fair estimate of the recipe's."""
    try:
        other = run.read_recipe()
    except UserError:  # the run is of another version
        return False
    return _speed_key(other) == _speed_key(recipe)


def _speed_key(recipe: Recipe) -> Sequence[Any]:
    model, engine, cluster = recipe.model, recipe.engine, recipe.cluster
    return (
        model.id,
        model.lora is None,
        model.quantization,
        engine.precision,
        engine.activation_checkpointing,
        engine.offload_optimizer,
        cluster.num_workers,
        cluster.use_gpu,
    )


def _model_facts(recipe: Recipe, architecture: Architecture) -> dict[str, Any]:
    sizes = {
        name: number
        for name, number in asdict(architecture).items()
        if name not in ("tensors", "activations", "beside")
    }
    return {"id": recipe.model.id, **sizes, "packing": "padded" if architecture.packing == "none" else "packed"}


def _stage_facts(fit: LayoutFit) -> dict[str, Any]:
    return {
        "stage": fit.stage,
        "tokens_per_microbatch": fit.tokens,
        "fits": fit.fits,
        "moment": fit.memory.moment,
        "memory": fit.memory.rows(),
        "total": fit.memory.total,
    }


def _traffic(architecture: Architecture, recipe: Recipe, fit: LayoutFit, amounts: DataAmounts) -> tuple[Traffic, bool]:
    """Traffic of the chosen layout with all workers, and whether its steps need two passes."""
    count = max(1, -(-amounts.budget.tokens(architecture) // fit.tokens))
    two_passes = count > 1 and widest_scope(recipe.loss.terms) == "batch"
    traffic = step_traffic(architecture, recipe, fit.stage, recipe.cluster.num_workers, count, two_passes=two_passes)
    return traffic, two_passes


def _is_whole_budget(fit: LayoutFit, amounts: DataAmounts, architecture: Architecture) -> bool:
    return fit.tokens >= amounts.budget.tokens(architecture)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _amount(number: int | None, unit: str) -> str:
    return f"{unit} unknown" if number is None else f"{number:,} {unit}"
