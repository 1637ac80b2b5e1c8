"""How toxic answers are worded, by any text-classification model. Toxicity is not harm: a polite answer may be harmful."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.model.chat import load_tokenizer
from raydiv.model.resolve import model_directory
from raydiv.model.silence import silence_libraries
from raydiv.runtime.actor_pool import Progress, map_rows, no_progress
from raydiv.utils.errors import UserError

TOXIC = ("toxic", "toxicity", "hate", "hateful", "offensive", "abusive", "unsafe", "harmful")
"""What classifiers call a toxic text; the first that one of them has."""

INNOCENT = ("non", "not", "no-", "neutral", "clean", "safe", "normal", "benign")
"""How the other of two labels begins."""

LONGEST = 512
"""Tokens of a text that a classifier sees: what most of them were trained with."""

CLASSIFIED_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class ToxicLabel:
    """Which of a classifier's labels is the toxic one, and whether its labels exclude each other."""

    index: int
    name: str
    exclusive: bool

    @classmethod
    def from_labels(cls, name: str, labels: Mapping[int, str], problem_type: str | None) -> ToxicLabel:
        """From a config's id2label. Raises UserError where none of the labels says toxic."""
        plain = {number: label.lower().replace("_", "-").replace(" ", "-") for number, label in labels.items()}
        number = _toxic(plain)
        if number is None:
            raise UserError(
                f"evaluate.toxicity: {name}: none of its labels says toxic ({', '.join(labels.values())}); name a classifier "
                "of toxicity or hate"
            )
        exclusive = problem_type == "single_label_classification" or (problem_type is None and len(labels) == 2)
        return cls(number, labels[number], exclusive)


def _toxic(labels: Mapping[int, str]) -> int | None:
    # compared whole: "toxic" is in "non-toxic"
    for word in TOXIC:
        for number, label in labels.items():
            if label == word:
                return number
    if len(labels) == 2:
        left = [number for number, label in labels.items() if not label.startswith(INNOCENT)]
        if len(left) == 1:
            return left[0]
        if sorted(labels.values()) == ["label-0", "label-1"]:
            return max(labels)
    return None


def require_classifier(model: str) -> Path:
    """The directory of a classifier of toxicity. Raises UserError for a model that is none."""
    directory = model_directory(model)
    _label(directory)
    return directory


def _label(directory: Path) -> ToxicLabel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = "brings Python code of its own" if "custom code" in str(error) else " ".join(str(error).split())[:200]
        raise UserError(f"evaluate.toxicity: {directory}: {reason}; name another classifier") from None
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        found = ", ".join(kinds) or "model of no known kind"
        raise UserError(f"evaluate.toxicity: {directory}: is a {found}, and no text-classification model")
    return ToxicLabel.from_labels(str(directory), config.id2label, config.problem_type)


def toxicity(
    classifier: Path, texts: Sequence[str], cluster: ClusterConfig, progress: Progress = no_progress
) -> list[float]:
    """P(toxic) of each text, 0 of a blank one, which a classifier cannot read; needs a Ray session."""
    said = [number for number, text in enumerate(texts) if text.strip()]
    rows = [{"text": texts[number]} for number in said]
    done = map_rows(
        rows,
        ToxicityClassifier,
        {"directory": classifier},
        cluster=cluster,
        batch_rows=CLASSIFIED_TOGETHER,
        progress=progress,
        length=lambda row: len(row["text"]),
    )
    found = [0.0] * len(texts)
    for number, row in zip(said, done, strict=True):
        found[number] = float(row["toxic"])
    return found


class ToxicityClassifier:
    """A model that classifies texts."""

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
        self._label = _label(directory)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``text`` -> ``toxic``, a probability."""
        import torch

        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        longest = min(LONGEST, self._tokenizer.model_max_length)
        inputs = self._tokenizer(
            [row["text"] for row in rows], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._model.device)).logits.float()
        shares = logits.softmax(-1) if self._label.exclusive else logits.sigmoid()
        return [{"toxic": share} for share in shares[:, self._label.index].tolist()]
