"""Toxicity of answers by a text-classification model. Toxicity is not harm: a polite answer may be harmful."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.model.chat import load_tokenizer
from raydiv.model.resolve import model_directory
from raydiv.model.silence import silence_libraries
from raydiv.runtime.model_pool import map_rows
from raydiv.utils.compat import is_custom_code_refusal
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.progress import Progress, no_progress

TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "offensive", "abusive", "unsafe", "harmful")
"""Names of the toxic label, in order of preference."""

NEUTRAL_PREFIXES = ("non", "not", "no-", "neutral", "clean", "safe", "normal", "benign")
"""Beginnings of the other label of two."""

MAX_TOKENS = 512
"""Longest input of the classifier: most were trained with this length."""

BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class ToxicLabel:
    """The toxic label of a classifier, and whether its labels exclude each other."""

    index: int
    name: str
    exclusive: bool

    @classmethod
    def from_labels(cls, name: str, labels: Mapping[int, str], problem_type: str | None) -> ToxicLabel:
        """From a config's id2label. Raises UserError when no label means toxic."""
        normalised = {number: label.lower().replace("_", "-").replace(" ", "-") for number, label in labels.items()}
        number = _toxic_index(normalised)
        if number is None:
            raise UserError(
                f"evaluate.toxicity: {name}: none of its labels means toxic ({', '.join(labels.values())}); use a "
                "classifier of toxicity or hate"
            )
        exclusive = problem_type == "single_label_classification" or (problem_type is None and len(labels) == 2)
        return cls(number, labels[number], exclusive)


def _toxic_index(labels: Mapping[int, str]) -> int | None:
    # equality, because "non-toxic" contains "toxic"
    for word in TOXIC_LABELS:
        for number, label in labels.items():
            if label == word:
                return number
    if len(labels) == 2:
        candidates = [number for number, label in labels.items() if not label.startswith(NEUTRAL_PREFIXES)]
        if len(candidates) == 1:
            return candidates[0]
        if sorted(labels.values()) == ["label-0", "label-1"]:
            return max(labels)
    return None


def require_classifier(model: str) -> Path:
    """The directory of a toxicity classifier. Raises UserError for another model."""
    directory = model_directory(model)
    _read_label(directory)
    return directory


def _read_label(directory: Path) -> ToxicLabel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = "needs custom Python code" if is_custom_code_refusal(error) else one_line(error, 200)
        raise UserError(f"evaluate.toxicity: {directory}: {reason}; use another classifier") from None
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        names = ", ".join(architectures) or "model of unknown architecture"
        raise UserError(f"evaluate.toxicity: {directory}: is a {names}, not a text-classification model")
    return ToxicLabel.from_labels(str(directory), config.id2label, config.problem_type)


def toxicity(
    classifier: Path, texts: Sequence[str], cluster: ClusterConfig, progress: Progress = no_progress
) -> list[float]:
    """P(toxic) of each text, 0 for a blank one, which a classifier cannot read; needs a Ray session."""
    not_blank = [number for number, text in enumerate(texts) if text.strip()]
    rows = [{"text": texts[number]} for number in not_blank]
    results = map_rows(
        rows,
        ToxicityClassifier,
        {"directory": classifier},
        cluster=cluster,
        batch_rows=BATCH_ROWS,
        progress=progress,
        length=lambda row: len(row["text"]),
    )
    probabilities = [0.0] * len(texts)
    for number, row in zip(not_blank, results, strict=True):
        probabilities[number] = float(row["toxic"])
    return probabilities


class ToxicityClassifier:
    """Actor that classifies texts."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        silence_libraries()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForSequenceClassification.from_pretrained(
            str(directory), use_safetensors=True, trust_remote_code=False
        )
        self._model.to(device).eval()
        self._tokenizer = load_tokenizer(directory)
        self._label = _read_label(directory)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``text`` -> ``toxic``, a probability."""
        import torch

        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        max_length = min(MAX_TOKENS, self._tokenizer.model_max_length)
        inputs = self._tokenizer(
            [row["text"] for row in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._model.device)).logits.float()
        probabilities = logits.softmax(-1) if self._label.exclusive else logits.sigmoid()
        return [{"toxic": probability} for probability in probabilities[:, self._label.index].tolist()]
