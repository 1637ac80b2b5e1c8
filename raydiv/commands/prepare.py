"""``raydiv prepare``: model files, tokens and reference log-probs, through caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.commands.preflight import CACHE, require_nodes
from raydiv.config import Recipe
from raydiv.config.recipe import ModelConfig, adapter_directory
from raydiv.data.index import OpenSource
from raydiv.data.prompt_sets import PromptSets
from raydiv.data.reference_scorer import Lookup, reference_logps
from raydiv.data.splits import Splits, make_splits
from raydiv.data.tokenize import tokenize
from raydiv.data.tokens import KEY, StoredExamples, TokenValues, content_key, mismatched
from raydiv.losses.position import RewardWeights
from raydiv.model.chat import Chat, chat_table
from raydiv.model.liger import require_liger
from raydiv.model.limits import limit_notes, require_limits, require_room_for_answers
from raydiv.model.load import ModelSource, require_quantizer
from raydiv.model.resolve import fingerprint, model_directory, require_base_model
from raydiv.model.reward import reward_directory
from raydiv.runs.events import ExamplePlace
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.training.dataloader import ExampleSet
from raydiv.training.metric_names import require_measured
from raydiv.training.schedule import epoch_plan, total_steps
from raydiv.utils.cache import shared_dir
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress


@dataclass(frozen=True, slots=True)
class LoadedInputs:
    """The inputs that a recipe names: model directory, tokenizer with template, sources and prompt sets."""

    model_directory: Path
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
    """A recipe's data with tokens and reference log-probs, and the hits and misses of the reference cache."""

    model_directory: Path
    data: Splits
    train: ExampleSet
    eval: ExampleSet | None
    reference_hits: int
    reference_misses: int
    trained_on: dict[str, int]
    """Number of prompts in each evaluation and separation set that are training prompts, token for token."""
    chat: dict[str, str]
    """What is to be known of the chat template (see chat_table)."""
    reward_directory: Path | None
    """The model or adapter of ``loss.position.model``."""

    def steps(self, recipe: Recipe) -> int:
        """Optimizer updates of the run."""
        return total_steps(recipe, epoch_plan(recipe, self.train.examples).steps_in)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the training ``data``, of the base ``model`` and, where there is one, of the model of
        ``rewards``.
        """
        models = {"model": self.model_directory, "rewards": self.reward_directory}
        of_models = {name: ModelSource(path).fingerprint() for name, path in models.items() if path is not None}
        return {"data": self.train.examples.fingerprint, **of_models}

    def summary(self) -> dict[str, Any]:
        """Counts and fingerprints, for ``raydiv prepare`` and result.json."""
        held_out, fingerprints = self.data.eval, self.fingerprints
        return {
            "train": asdict(self.data.train.counts),
            "eval": asdict(held_out.counts) if held_out else None,
            "bad_rows": len(self.data.bad),
            "prompts_in_train_and_eval": self.data.shared_prompts,
            "evaluation_prompts_trained_on": self.trained_on,
            "fingerprint": fingerprints["data"],
            "model_fingerprint": fingerprints["model"],
            "chat": self.chat,
            "reference": {"hits": self.reference_hits, "misses": self.reference_misses},
        }


def prepare(recipe: Recipe, display: ProgressDisplay | None = None) -> PreparedData:
    """Prepare a recipe's data: data -> tokens -> reference log-probs of all, through caches; safe to repeat.

    Raises UserError for a model, data or prompts that cannot be used.
    """
    display = display or ProgressDisplay()
    inputs = load_inputs(recipe, display)
    with ray_session(recipe.cluster):
        require_nodes({CACHE: shared_dir()}, local_files(inputs))
        return prepare_data(recipe, inputs, display, whole=True)


def load_inputs(recipe: Recipe, display: ProgressDisplay) -> LoadedInputs:
    """Load model files, sources and prompts before Ray starts. Raises UserError for those that cannot be used."""
    if recipe.model.quantization is not None:
        require_quantizer()
    require_measured(recipe)
    with display.phase("model and data"):
        directory = model_directory(recipe.model.id, recipe.model.revision)
        require_base_model(recipe.model.id, directory)
        start = directory if recipe.model.adapter is None else _adapter(recipe.model, directory)
        config = ModelSource.from_recipe(recipe, directory).config()  # fails here rather than in a worker
        if recipe.model.use_liger_kernel:
            require_liger(config.model_type)
        prompts = PromptSets.of(recipe)
        chat = Chat.from_recipe(recipe, directory)
        require_limits(recipe, config, chat)
        asked = [prompt.text for prompt in prompts.evaluate]
        require_room_for_answers(recipe.evaluate.max_new_tokens, config, chat, asked)
        for note in limit_notes(recipe, config, chat, directory):
            display.print(f"note: {note}")
        train, held_out = (
            [OpenSource(source, recipe.data, recipe.batch, chat) for source in sources]
            for sources in (recipe.data.train, recipe.data.eval_sources)
        )
        for source in (*train, *held_out):
            source.require_example(quarantine=recipe.data.on_bad_row == "quarantine")
        return LoadedInputs(start, chat, train, held_out, prompts)


def _adapter(model: ModelConfig, base: Path) -> Path:
    """The directory of the adapter that training starts from. Raises UserError where it is one of another base."""
    directory = model_directory(str(adapter_directory(str(model.adapter))), key="model.adapter")
    own = ModelSource(directory).base_directory()
    if own is None or fingerprint(own) != fingerprint(base):
        raise UserError(f"model.adapter: {model.adapter}: an adapter of {own}, which is not the model.id {model.id}")
    return directory


def local_files(inputs: LoadedInputs) -> dict[str, int]:
    """Sizes in bytes of the data files with a local path, which all nodes must see."""
    files = [file for source in (*inputs.train, *inputs.eval) for file in source.files if "://" not in file.uri]
    return {file.uri: Path(file.uri).stat().st_size for file in files}


def prepare_data(
    recipe: Recipe, inputs: LoadedInputs, display: ProgressDisplay, *, whole: bool = False
) -> PreparedData:
    """Tokens and reference log-probs of the loaded inputs. Needs a Ray session.

    Log-probs are those of the examples that the run trains on, and NaN of others, where its steps are less than an
    epoch; ``whole``: of all, for other runs on the same data.

    Raises UserError for data that the recipe cannot use, and for another vocabulary of ``loss.position.model``.
    """
    rows = ModelSource.from_recipe(recipe, inputs.model_directory).config().vocab_size
    rewards = reward_directory(recipe, rows, inputs.chat)
    with display.phase("tokens") as update:
        sources, quarantine = [*inputs.train, *inputs.eval], recipe.data.on_bad_row == "quarantine"
        indices = tokenize(sources, inputs.chat, recipe.cluster, quarantine=quarantine, progress=update)
    for index in indices:
        index.require_rows(rows)
    data = make_splits(recipe, indices[: len(inputs.train)], indices[len(inputs.train) :])
    if data.bad:
        display.print(f"invalid rows dropped: {len(data.bad)} (raydiv data check lists them)")
    if data.shared_prompts:
        display.print(
            f"prompts in both data.train and data.eval: {data.shared_prompts}; held-out metrics will be too good"
        )
    trained_on = _count_trained_on(recipe, inputs, data)
    for name, count in trained_on.items():
        if count:
            display.print(
                f"prompts of {name} in the training data: {count}; its metrics will be too good (raydiv data check "
                "lists them)"
            )
    plan = epoch_plan(recipe, data.train.examples)
    taken = plan.rows_until(total_steps(recipe, plan.steps_in))
    for number in sorted(set(range(len(inputs.train))) - set(data.train.examples.source[taken].tolist())):
        path = recipe.data.train[number].path
        display.print(f"{path}: the steps of the run take none of its examples; raise its weight or optim.steps")
    scored = np.arange(len(data.train.examples)) if whole else taken
    return _with_reference(recipe, inputs, data, trained_on, display, scored, rewards)


def _count_trained_on(recipe: Recipe, inputs: LoadedInputs, data: Splits) -> dict[str, int]:
    """The number of prompts in each evaluation and separation set that are training prompts, token for token."""
    counts = {}
    for name, prompts in inputs.prompts.by_name(recipe).items():
        texts, lengths = [prompt.text for prompt in prompts], (recipe.batch.max_prompt_length, recipe.batch.max_length)
        keys = [content_key(row.prompt) for row in inputs.chat.tokenize(texts, [""] * len(texts), *lengths)]
        counts[name] = int(np.isin(np.array(keys, KEY), data.train.examples.prompt_keys).sum())
    return counts


def _with_reference(
    recipe: Recipe,
    inputs: LoadedInputs,
    data: Splits,
    trained_on: dict[str, int],
    display: ProgressDisplay,
    scored: np.ndarray,
    rewards: Path | None,
) -> PreparedData:
    """The data with the reference log-probs that the loss needs, also of KTO's mismatched examples, of the training
    examples at ``scored``.
    """
    splits = [data.train.examples, *([data.eval.examples] if data.eval else [])]
    sets = [ExampleSet(examples, None, _derangement(recipe, examples)) for examples in splits]
    hits = misses = 0
    if not recipe.loss.needs_reference:
        # without a reference in the loss, logged rewards count from zero
        sets = [replace(one, reference_logps=np.zeros(len(one.examples), np.float32)) for one in sets]
    elif recipe.model.reference == "store":
        with display.phase("reference log-probs") as update:
            sets, lookup = _score_reference(recipe, inputs.model_directory, sets, scored, update, rewards)
        hits, misses = lookup.hits, lookup.misses
        _tell_weights(recipe, sets[0], display)
    held_out, facts = sets[1] if data.eval else None, chat_table(inputs.chat.facts())
    return PreparedData(inputs.model_directory, data, sets[0], held_out, hits, misses, trained_on, facts, rewards)


def _tell_weights(recipe: Recipe, train: ExampleSet, display: ProgressDisplay) -> None:
    """Print what the tokens of aligned training examples weigh by their rewards."""
    if isinstance(recipe.loss.position.rule, RewardWeights) and train.token_values is not None:
        weights = np.concatenate(train.token_values.at(np.flatnonzero(train.examples.aligned)))
        if not weights.size:  # the steps of the run take none of the aligned examples
            return
        low, median, high = np.quantile(weights, (0.05, 0.5, 0.95))
        display.print(f"weights of aligned tokens: {low:.2g} to {high:.2g} (5% to 95%), median {median:.2g}")


def _score_reference(
    recipe: Recipe,
    directory: Path,
    sets: Sequence[ExampleSet],
    of_first: np.ndarray,
    progress: Progress,
    rewards: Path | None,
) -> tuple[list[ExampleSet], Lookup]:
    """The sets with log-probs from the store, of the first one those at ``of_first`` alone."""
    rows = [of_first, *(np.arange(len(one.examples)) for one in sets[1:])]
    parts = [
        (part, of_set)
        for one, of_set in zip(sets, rows, strict=True)
        for part in (one.examples, one.mismatched)
        if part is not None
    ]
    lookup = reference_logps(recipe, directory, [part.select(of_set) for part, of_set in parts], progress, rewards)
    found = zip(lookup.logps, lookup.tokens or [None for _ in parts], parts, strict=True)
    results = iter([_spread(logps, tokens, of_set, len(part)) for logps, tokens, (part, of_set) in found])
    with_reference = []
    for one in sets:
        logps, tokens = next(results)
        others, other_tokens = (None, None) if one.mismatched is None else next(results)
        with_reference.append(ExampleSet(one.examples, logps, one.mismatched, others, tokens, other_tokens))
    return with_reference, lookup


def _spread(
    logps: np.ndarray, tokens: TokenValues | None, rows: np.ndarray, count: int
) -> tuple[np.ndarray, TokenValues | None]:
    """Log-probs of the examples at ``rows`` as those of all ``count``, NaN where there are none."""
    spread = np.full(count, np.nan, np.float32)
    spread[rows] = logps
    return spread, None if tokens is None else tokens.spread(rows, count)


def _derangement(recipe: Recipe, examples: StoredExamples) -> StoredExamples | None:
    """Examples whose prompts and responses are mismatched; None where the loss needs none."""
    if not recipe.loss.mismatched_terms:
        return None
    try:
        return mismatched(examples, recipe.batch.max_length)
    except ValueError as error:
        raise UserError(
            f"data: {error}; the loss {recipe.loss.mismatched_terms[0]} needs mismatched responses"
        ) from None
