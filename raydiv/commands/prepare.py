"""Prepare: model files, data and reference log-probs, ready to train on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.commands.preflight import CACHE, require_nodes
from raydiv.config import Recipe
from raydiv.data.index import OpenSource
from raydiv.data.prompt_sets import PromptSets
from raydiv.data.reference_scorer import reference_logps
from raydiv.data.splits import Splits, make_splits
from raydiv.data.tokenize import tokenize
from raydiv.data.tokens import KEY, StoredExamples, content_key, mismatched
from raydiv.model.chat import Chat
from raydiv.model.load import ModelSource, require_quantizer
from raydiv.model.resolve import fingerprint, model_directory, require_base
from raydiv.runs.events import ExamplePlace
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.training.dataloader import ExampleSet
from raydiv.training.metric_names import require_measured
from raydiv.training.schedule import epoch_plan, total_steps
from raydiv.utils.cache import shared_dir
from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class LoadedInputs:
    """What a recipe names, found and opened: its model's directory and tokenizer, its sources, and its prompt sets."""

    directory: Path
    chat: Chat
    train: list[OpenSource]
    eval: list[OpenSource]
    prompts: PromptSets

    def locate(self, place: ExamplePlace) -> str:
        """File and line of a training example."""
        source, file, position = place
        return self.train[source].where(file, position)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A recipe's data, ready to train on, and what preparing it cost."""

    directory: Path
    data: Splits
    train: ExampleSet
    eval: ExampleSet | None
    reference_hits: int
    reference_misses: int
    trained_on: dict[str, int]
    """Prompts of each evaluation and separation set that are trained on, token for token."""

    def steps(self, recipe: Recipe) -> int:
        """Optimizer updates of the run."""
        return total_steps(recipe, epoch_plan(recipe, self.train.examples).steps_per_epoch)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the training ``data`` and of the ``model`` as it comes."""
        return {"data": self.train.examples.fingerprint, "model": fingerprint(self.directory)}

    def summary(self) -> dict[str, Any]:
        """For ``raydiv prepare`` and result.json."""
        held_out, of = self.data.eval, self.fingerprints
        return {
            "train": asdict(self.data.train.counts),
            "eval": asdict(held_out.counts) if held_out else None,
            "bad_rows": len(self.data.bad),
            "prompts_in_train_and_eval": self.data.shared_prompts,
            "evaluation_prompts_trained_on": self.trained_on,
            "fingerprint": of["data"],
            "model_fingerprint": of["model"],
            "reference": {"hits": self.reference_hits, "misses": self.reference_misses},
        }


def prepare(recipe: Recipe, display: ProgressDisplay | None = None) -> PreparedData:
    """Data -> tokens -> reference log-probs, through caches; safe to repeat."""
    display = display or ProgressDisplay()
    opened = load_inputs(recipe, display)
    with ray_session(recipe.cluster):
        require_nodes({CACHE: shared_dir()}, local_files(opened))
        return prepare_data(recipe, opened, display)


def load_inputs(recipe: Recipe, display: ProgressDisplay) -> LoadedInputs:
    """Model files, sources and prompts, checked before anything is started. Raises UserError for any of them."""
    if recipe.model.quantization is not None:
        require_quantizer()
    require_measured(recipe)
    with display.phase("model and data"):
        directory = model_directory(recipe.model.id, recipe.model.revision)
        require_base(recipe.model.id, directory)
        ModelSource.of(recipe, directory).config()  # or workers find out that it cannot be read
        prompts = PromptSets.of(recipe)
        chat = Chat(directory, recipe.data.template, recipe.model.trust_remote_code)
        train, held_out = (
            [OpenSource(source, recipe.data, recipe.batch, chat) for source in sources]
            for sources in (recipe.data.train, recipe.data.eval_sources)
        )
        for opened in (*train, *held_out):
            opened.require_example(quarantine=recipe.data.on_bad_row == "quarantine")
        return LoadedInputs(directory, chat, train, held_out, prompts)


def local_files(opened: LoadedInputs) -> dict[str, int]:
    """Bytes of the data's files that lie on a disk, by their paths: every node that reads data reads them."""
    files = [file for source in (*opened.train, *opened.eval) for file in source.files if "://" not in file.uri]
    return {file.uri: Path(file.uri).stat().st_size for file in files}


def prepare_data(recipe: Recipe, opened: LoadedInputs, display: ProgressDisplay) -> PreparedData:
    """What ``read`` found, with tokens and reference log-probs; needs a Ray session."""
    with display.phase("tokens") as update:
        sources, quarantine = [*opened.train, *opened.eval], recipe.data.on_bad_row == "quarantine"
        indices = tokenize(sources, opened.chat, recipe.cluster, quarantine=quarantine, progress=update)
    data = make_splits(recipe, indices[: len(opened.train)], indices[len(opened.train) :])
    if data.bad:
        display.print(f"bad rows left out: {len(data.bad)} (raydiv data check lists them)")
    if data.shared_prompts:
        display.print(f"prompts in data.train and in data.eval: {data.shared_prompts}; held-out figures will flatter")
    shared = _trained_on(recipe, opened, data)
    for name, count in shared.items():
        if count:
            display.print(
                f"prompts of {name} that are trained on: {count}; its figures will flatter (raydiv data check lists them)"
            )
    return _with_reference(recipe, opened.directory, data, shared, display)


def _trained_on(recipe: Recipe, opened: LoadedInputs, data: Splits) -> dict[str, int]:
    """How many prompts of each evaluation and separation set are training prompts; those that are nearly so are not counted."""
    found = {}
    for name, prompts in opened.prompts.by_name(recipe).items():
        texts, lengths = [prompt.text for prompt in prompts], (recipe.batch.max_prompt_length, recipe.batch.max_length)
        keys = [content_key(one.prompt) for one in opened.chat.examples(texts, [""] * len(texts), *lengths)]
        found[name] = int(np.isin(np.array(keys, KEY), data.train.examples.prompt_keys).sum())
    return found


def _with_reference(
    recipe: Recipe, directory: Path, data: Splits, shared: dict[str, int], display: ProgressDisplay
) -> PreparedData:
    """The data with the reference log-probs that its loss asks for, KTO's mismatched examples included."""
    sets = [data.train.examples, *([data.eval.examples] if data.eval else [])]
    derangements = [_derangement(recipe, examples) for examples in sets]
    if not recipe.loss.needs_reference or recipe.model.reference == "adapter-off":
        # no reference in the loss: rewards then count from zero, and are logged as such
        zeros = None if recipe.loss.needs_reference else [np.zeros(len(examples), np.float32) for examples in sets]
        found = [ExampleSet(e, zeros[i] if zeros else None, derangements[i]) for i, e in enumerate(sets)]
        return PreparedData(directory, data, found[0], found[1] if data.eval else None, 0, 0, shared)
    everything = [*sets, *(derangement for derangement in derangements if derangement is not None)]
    with display.phase("reference log-probs") as update:
        lookup = reference_logps(recipe, directory, everything, update)
    logps = iter(lookup.logps)
    own = [next(logps) for _ in sets]
    found = [
        ExampleSet(examples, mine, derangement, None if derangement is None else next(logps))
        for examples, mine, derangement in zip(sets, own, derangements, strict=True)
    ]
    return PreparedData(directory, data, found[0], found[1] if data.eval else None, lookup.hits, lookup.misses, shared)


def _derangement(recipe: Recipe, examples: StoredExamples) -> StoredExamples | None:
    if not recipe.loss.mismatched_terms:
        return None
    try:
        return mismatched(examples, recipe.batch.max_length)
    except ValueError as error:
        raise UserError(f"data: {error}; the loss {recipe.loss.mismatched_terms[0]} needs them") from None
