"""Cache of the evaluation before training, shared by all runs, trials and study cells that start from one model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.data.prompt_sets import Prompt, PromptSets
from raydiv.evaluation.answers import EvaluationJudges
from raydiv.evaluation.attacks import attack_texts
from raydiv.evaluation.depth import HeldOutDepth
from raydiv.evaluation.judges.harm_judge import JudgeModel
from raydiv.evaluation.vllm_engine import vllm_version
from raydiv.model.load import ModelSource
from raydiv.model.resolve import fingerprint
from raydiv.runs.directory import EVALUATION
from raydiv.utils.cache import code_digest, digest, file_digest, shared_dir
from raydiv.utils.storage import open_input, require_inside

VERSION = 1
"""Version of the entries and of their keys."""

CODE_PACKAGES = ("evaluation", "evaluation/judges", "evaluation/labels", "evaluation/separation", "model", "data")
"""Packages whose code a measurement depends on."""

DATA_FILES = ("data/bundled/helpful.jsonl", "evaluation/labels/quickstart.jsonl")
"""Files of raydiv that a measurement depends on, besides code."""

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Metrics of one evaluation, its files by path in the run's directory, and the answers to harmless prompts."""

    metrics: dict[str, float]
    files: dict[str, str]
    harmless: list[str]

    def with_depth(self, depth: HeldOutDepth | None) -> Measurement:
        """With the curves of held-out examples in evaluation/depth.json."""
        if depth is None:
            return self
        half = {} if depth.margin.half is None else {"eval/depth/half": float(depth.margin.half)}
        content = json.dumps(asdict(depth)) + "\n"
        return replace(self, metrics=self.metrics | half, files=self.files | {f"{EVALUATION}/depth.json": content})

    def write_into(self, run: Path) -> None:
        """Write the files into a run's directory."""
        for name, content in self.files.items():
            path = run / require_inside(name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)


class BaselineCache:
    """The cached measurement of one base model by one recipe's prompts, attacks and judges.

    The key is a digest of weights, template, precision, prompts, attack texts, judges' weights and the evaluation's
    code.
    """

    def __init__(
        self, recipe: Recipe, base: ModelSource, prompts: PromptSets, judges: EvaluationJudges | None, show_text: bool
    ) -> None:
        self._folder = shared_dir("measured")
        key = digest(
            VERSION,
            *code_digest(*CODE_PACKAGES),
            [file_digest(PACKAGE / name) for name in DATA_FILES],
            _model_key(base),
            _separation_key(recipe, prompts.separation),
            None if judges is None else _answers_key(recipe, prompts.evaluate, judges),
            show_text,
        )
        self._name = f"{key}.json"

    def get(self) -> Measurement | None:
        if not self._folder.has(self._name):
            return None
        with open_input(self._folder.uri_of(self._name)) as file:
            return Measurement(**json.loads(file.read()))

    def put(self, measurement: Measurement) -> None:
        content = {"metrics": measurement.metrics, "files": measurement.files, "harmless": measurement.harmless}
        self._folder.write(self._name, json.dumps(content).encode())


def _model_key(source: ModelSource) -> list[Any]:
    settings = (source.precision, source.quantization, source.attention)
    return [source.fingerprint(), source.chat().fingerprint, *settings]


def _prompt_keys(prompts: Sequence[Prompt]) -> list[Any]:
    return [astuple(prompt) for prompt in prompts]


def _separation_key(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Any]:
    return [recipe.separation.model_dump(mode="json", exclude={"every"}), _prompt_keys(prompts)]


def _answers_key(recipe: Recipe, prompts: Sequence[Prompt], judges: EvaluationJudges) -> list[Any]:
    config = recipe.evaluate
    tasks = sorted(Path(config.task_folder).rglob("*")) if config.task_folder else []
    judge_models = [judge.model.source.directory for judge in judges.harm if isinstance(judge.model, JudgeModel)]
    return [
        config.model_dump(mode="json", exclude={"every", "depth_every"}),
        _prompt_keys(prompts),
        attack_texts(config.attacks),
        [None if directory is None else fingerprint(directory) for directory in (*judge_models, judges.toxicity)],
        {str(path): file_digest(path) for path in tasks if path.is_file()},
        metadata.version("lm_eval") if config.tasks else None,
        vllm_version() if config.engine == "vllm" else None,
        metadata.version("nanogcg") if any(attack.kind == "gcg" for attack in config.attacks) else None,
    ]
