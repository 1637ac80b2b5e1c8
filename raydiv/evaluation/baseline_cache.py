"""What a run measures of the model that it begins from, kept: every run, trial and study cell on that model shares it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.data.prompt_sets import Prompt, PromptSets
from raydiv.evaluation.answers import EvaluationJudges
from raydiv.evaluation.attacks import attack_texts
from raydiv.model.load import ModelSource
from raydiv.model.resolve import fingerprint
from raydiv.utils.cache import code_digest, digest, file_digest, shared_dir
from raydiv.utils.storage import open_input, require_inside

VERSION = 1
"""Of what is kept, and of what its key is made of."""

ROOMS = ("evaluation", "evaluation/separation", "model", "data")
"""Whose code a measurement depends on."""

FILES = ("data/bundled/helpful.jsonl",)
"""Of raydiv, what it depends on beside rooms."""

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measurement: its metrics, the files that it leaves in a run (by path in it), and the answers to harmless prompts."""

    metrics: dict[str, float]
    files: dict[str, str]
    harmless: list[str]

    def write_into(self, run: Path) -> None:
        """Write the files into a run's directory."""
        for name, content in self.files.items():
            path = run / require_inside(name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)


class BaselineCache:
    """The measurement of one base model by one recipe's prompts, attacks and judges.

    Its key is made of content: weights, template, precision, prompts, attack texts, judges' weights and the code that measures.
    """

    def __init__(
        self, recipe: Recipe, base: ModelSource, prompts: PromptSets, judges: EvaluationJudges | None, show_text: bool
    ) -> None:
        self._folder = shared_dir("measured")
        key = digest(
            VERSION,
            *code_digest(*ROOMS),
            [file_digest(PACKAGE / name) for name in FILES],
            _model(base),
            _apart(recipe, prompts.separation),
            None if judges is None else _asked(recipe, prompts.evaluate, judges),
            show_text,
        )
        self._name = f"{key}.json"

    def get(self) -> Measurement | None:
        if not self._folder.has(self._name):
            return None
        with open_input(self._folder.uri_of(self._name)) as file:
            return Measurement(**json.loads(file.read()))

    def put(self, taken: Measurement) -> None:
        content = {"metrics": taken.metrics, "files": taken.files, "harmless": taken.harmless}
        self._folder.write(self._name, json.dumps(content).encode())


def _model(source: ModelSource) -> list[Any]:
    how = (source.precision, source.quantization, source.attention)
    return [fingerprint(source.directory), source.chat().fingerprint, *how]


def _prompts(prompts: Sequence[Prompt]) -> list[Any]:
    return [(one.text, one.harmful, one.kind, one.id, one.category, one.set) for one in prompts]


def _apart(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Any]:
    return [recipe.separation.model_dump(mode="json", exclude={"every"}), _prompts(prompts)]


def _asked(recipe: Recipe, prompts: Sequence[Prompt], judges: EvaluationJudges) -> list[Any]:
    how = recipe.evaluate
    tasks = sorted(Path(how.task_folder).rglob("*")) if how.task_folder else []
    models = [None if judges.harm.source is None else judges.harm.source.directory, judges.toxicity]
    return [
        how.model_dump(mode="json", exclude={"every"}),
        _prompts(prompts),
        attack_texts(how.attacks),
        [None if directory is None else fingerprint(directory) for directory in models],
        {str(path): file_digest(path) for path in tasks if path.is_file()},
        metadata.version("lm_eval") if how.tasks else None,
        metadata.version("nanogcg") if any(attack.kind == "gcg" for attack in how.attacks) else None,
    ]
