"""``raydiv plan``: what a recipe would do, checked and predicted; starts nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from raydiv.commands.plan.amounts import Amounts, amounts_of
from raydiv.commands.plan.architecture import Architecture, architecture_of, at_hand
from raydiv.commands.plan.layout import GIB, MARGIN, Fit, layouts, taken_of, what_fits, with_layout
from raydiv.commands.plan.memory import sizes_on_disk
from raydiv.commands.plan.tested import untested
from raydiv.commands.plan.traffic import Traffic, traffic_of
from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.losses import widest_scope
from raydiv.model.chat import Chat
from raydiv.model.silence import silence_libraries
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.resources import HOST_SHARE
from raydiv.utils.errors import UserError

ROWS = ("weights", "gradients", "optimizer", "activations", "head", "buffers", "runtime")
"""Parts of a worker's memory, in the order in which they are shown."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

RECORDS_OF_A_SPEED = 20
"""Last steps of a run whose median speed is taken."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What was found. ``facts`` is what ``--json`` prints; sizes in it are bytes."""

    facts: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether a worker's memory holds the layout that is taken."""
        fits: bool = self.facts["layout"]["fits"]
        return fits

    def table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Header and rows of a worker's memory, in GiB: a column for each ZeRO stage that the recipe allows."""
        stages: list[dict[str, Any]] = self.facts["stages"]
        taken = self.facts["layout"]["zero_stage"]
        header = ["GiB a worker", *(f"ZeRO {one['stage']}{' *' if one['stage'] == taken else ''}" for one in stages)]
        rows = [(name, *(_gib(one["memory"][name]) for one in stages)) for name in ROWS]
        rows.append(("together", *(_gib(one["total"]) for one in stages)))
        rows.append(("host memory (offload, checkpoints)", *(_gib(one["memory"]["host"]) for one in stages)))
        rows.append(("peak in the", *(one["moment"] for one in stages)))
        rows.append(("tokens a micro-batch", *(f"{one['tokens_per_microbatch']:,}" for one in stages)))
        rows.append(("fits", *("yes" if one["fits"] else "no" for one in stages)))
        return header, [row for row in rows if any(cell not in ("0.00", row[0]) for cell in row[1:])]

    def notes(self) -> Iterator[str]:
        """The rest, a line each."""
        facts = self.facts
        model, data, workers = facts["model"], facts["data"], facts["workers"]
        yield (
            f"model: {model['id']} ({model['kind']}), {_count(model['parameters'])} parameters, of which "
            f"{_count(model['trainable'])} are trained; micro-batches are {model['packing']}"
        )
        yield (
            f"workers: {workers['number']} x {workers['memory'] / GIB:.1f} GiB ({workers['memory_from']}), of which "
            f"{1 - MARGIN:.0%} may be used"
        )
        yield f"data: {_amount(data['examples'], 'examples')}, {_amount(data['tokens'], 'tokens')} an epoch ({data['how']})"
        yield f"run: {_amount(facts['steps'], 'updates')}, {_amount(facts['tokens'], 'tokens')}, {self._duration()}"
        yield f"on disk: a checkpoint {_gib(facts['sizes']['checkpoint'])} GiB, the model {_gib(facts['sizes']['model'])} GiB"
        sent = facts["traffic"]
        yield (
            f"network: each worker sends {_gib(sent['total'])} GiB a step (gradients {_gib(sent['gradients'])}, weights "
            f"{_gib(sent['weights'])}; {sent['micro_batches']} micro-batches)"
        )
        yield from (f"not checked, since not on this machine: {name}" for name in facts["unchecked"])
        yield from (f"never run by the tests: {words}" for words in facts["untested"])
        if self.fits:
            yield f"fits: {', '.join(facts['layout']['settles'])}"
        else:
            would = ", or ".join(facts["changes"])
            yield f"does not fit; {f'these would: {would}' if would else 'no change that raydiv knows would'}"

    def _duration(self) -> str:
        seconds, speed = self.facts["seconds"], self.facts["speed"]
        if speed is None:
            return "time unknown (--tokens-per-second, or a run of this model in output_dir)"
        if seconds is None:
            return "time unknown"
        return f"{seconds / 3600:.1f} hours at {speed['tokens_per_second']:,.0f} tokens/s ({speed['from']})"


def plan(recipe: Recipe, *, tokens_per_second: float | None = None, memory_gb: float | None = None) -> Forecast:
    """Check a recipe, its model's config and its data, and predict memory, steps, tokens, time and sizes.

    ``memory_gb``: GiB of a worker's GPU or its share of a node, in place of what is here. Starts nothing, and asks a hub only
    for the config of a model that is neither here nor shipped. Raises UserError for what training would refuse.
    """
    if memory_gb is not None:
        recipe = recipe.model_copy(
            update={"cluster": recipe.cluster.model_copy(update={"worker_memory_gb": memory_gb})}
        )
    silence_libraries()
    architecture, chat = architecture_of(recipe), _chat(recipe)
    amounts = amounts_of(recipe, chat)
    memory, memory_from = _memory(recipe.cluster)
    found = list(layouts(architecture, recipe, amounts.share, memory))
    taken = taken_of(found)
    speed = _speed(recipe, tokens_per_second)
    tokens = amounts.tokens_of_run(recipe)
    settled = with_layout(recipe, taken)
    return Forecast(
        {
            "model": _model(recipe, architecture),
            "workers": {"number": recipe.cluster.num_workers, "memory": memory, "memory_from": memory_from},
            "layout": {
                "zero_stage": taken.stage,
                "tokens_per_microbatch": taken.tokens,
                "fits": taken.fits,
                "settles": [
                    f"engine.zero_stage {taken.stage}",
                    f"micro-batches of up to {taken.tokens:,} tokens"
                    + (", a worker's whole share" if _whole(taken, amounts, architecture) else ""),
                ],
            },
            "stages": [_stage(one) for one in found],
            "data": {
                "examples": amounts.examples,
                "tokens": amounts.tokens,
                "how": amounts.how,
                **asdict(amounts.share),
            },
            "steps": amounts.steps,
            "tokens": tokens,
            "speed": speed,
            "seconds": tokens / speed["tokens_per_second"] if tokens is not None and speed is not None else None,
            "sizes": sizes_on_disk(architecture, recipe),
            "traffic": _traffic(architecture, recipe, taken, amounts).rows(),
            "unchecked": [*([] if chat else [f"the tokenizer of {recipe.model.id}"]), *amounts.unread],
            "untested": list(untested(settled)),
            "changes": [] if taken.fits else what_fits(recipe, amounts.share, memory),
        }
    )


def _chat(recipe: Recipe) -> Chat | None:
    """The tokenizer, where the model's directory has one."""
    directory = at_hand(recipe.model)
    if directory is None or not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    return Chat(directory, recipe.data.template, recipe.model.trust_remote_code)


def _memory(cluster: ClusterConfig) -> tuple[int, str]:
    """Bytes of a worker, and where that is from."""
    if cluster.worker_memory_gb is not None:
        return round(cluster.worker_memory_gb * GIB), "as given"
    if not cluster.use_gpu:
        return round(HOST_SHARE * _machine_memory() / cluster.num_workers), "its share of this machine"
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "cluster.worker_memory_gb: missing, and this machine has no GPU to ask; say what a worker's has, in GiB"
        )
    return int(torch.cuda.get_device_properties(0).total_memory), "this machine's GPU"


def _machine_memory() -> int:
    """Bytes of this machine, or of the container that this is in."""
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    said = [path.read_text().strip() for path in limits if path.is_file()]
    return min([int(psutil.virtual_memory().total), *(int(number) for number in said if number.isdigit())])


def _speed(recipe: Recipe, given: float | None) -> dict[str, Any] | None:
    """Tokens a second, and where that is from: as given, or of the newest run of such a model on as many workers."""
    if given is not None:
        return {"tokens_per_second": given, "from": "as given"}
    runs = sorted(recipe.output_path.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run in (RunDirectory(path.parent) for path in runs):
        if run.holds_a_run and _alike(run, recipe):
            speeds = [line["tokens_per_second"] for line in run.read_metrics() if "tokens_per_second" in line]
            if speeds:
                return {
                    "tokens_per_second": statistics.median(speeds[-RECORDS_OF_A_SPEED:]),
                    "from": f"measured in {run.path}",
                }
    return None


def _alike(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether a run's speed says something of the recipe's."""
    try:
        other = run.read_recipe()
    except UserError:  # of another version
        return False
    return _speed_goes_by(other) == _speed_goes_by(recipe)


def _speed_goes_by(recipe: Recipe) -> Sequence[Any]:
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


def _model(recipe: Recipe, architecture: Architecture) -> dict[str, Any]:
    sizes = {
        name: number
        for name, number in asdict(architecture).items()
        if name not in ("tensors", "activations", "beside")
    }
    return {"id": recipe.model.id, **sizes, "packing": "padded" if architecture.packing == "none" else "packed"}


def _stage(one: Fit) -> dict[str, Any]:
    return {
        "stage": one.stage,
        "tokens_per_microbatch": one.tokens,
        "fits": one.fits,
        "moment": one.memory.moment,
        "memory": one.memory.rows(),
        "total": one.memory.total,
    }


def _traffic(architecture: Architecture, recipe: Recipe, taken: Fit, amounts: Amounts) -> Traffic:
    """Of all workers, in the layout that is taken."""
    count = max(1, -(-amounts.share.tokens(architecture) // taken.tokens))
    two_passes = count > 1 and widest_scope(recipe.loss.terms) == "batch"
    return traffic_of(architecture, recipe, taken.stage, recipe.cluster.num_workers, count, two_passes=two_passes)


def _whole(taken: Fit, amounts: Amounts, architecture: Architecture) -> bool:
    return taken.tokens >= amounts.share.tokens(architecture)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _amount(number: int | None, unit: str) -> str:
    return f"{unit} unknown" if number is None else f"{number:,} {unit}"
