"""Capability by lm-evaluation-harness: scores of local tasks against what is computed by hand, names, and what goes
wrong.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

from helpers.models import make_model
from raydiv.config.cluster import ClusterConfig
from raydiv.data.reference_scorer import LogProbScorer
from raydiv.evaluation import capability
from raydiv.evaluation.capability import PRESETS, CapabilityScore, TaskHarness, TaskScores, measure_capability
from raydiv.evaluation.generate import TextGenerator
from raydiv.model.load import ModelSource
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

CHOICES = ["that", "sorry", "help"]
QUESTIONS = [
    f"Question {number}: is it {word}"
    for number, word in enumerate(["so", "how", "no", "yes", "a", "not", "us", "we", "an", "at"])
]
LABELS = [number % 3 for number in range(10)]
NEW_TOKENS = 6

CHOOSING = """\
task: choosing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 2.5}
"""
WRITING = """\
task: writing
tag: of_mine
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["<never>"], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
SCORING = """\
task: scoring
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: question
doc_to_target: "{{choices[1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""
BOTH = """\
group: both
task: [choosing, writing]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


Ids = Callable[[str, str], tuple[list[int], list[int]]]
"""From a question and a choice to their tokens."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A random model with large weights: what it says depends on what it is asked."""
    from transformers import LlamaForCausalLM

    folder = make_model(tmp_path_factory.mktemp("outspoken"), tied=False, seed=1)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    return ModelSource(folder)


@pytest.fixture(scope="module")
def written(source: ModelSource) -> list[str]:
    """What the model writes after each question, by raydiv's own generator."""
    tokenizer = source.chat().tokenizer
    rows = [{"ids": tokenizer(question).input_ids} for question in QUESTIONS]
    answers = TextGenerator(source, NEW_TOKENS, [tokenizer.eos_token_id])(rows)
    return [tokenizer.decode(row["answer"], skip_special_tokens=True) for row in answers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, written: list[str]) -> Path:
    """Tasks of our own. The model is right in every fourth answer of ``writing``."""
    data = tmp_path_factory.mktemp("data") / "documents.jsonl"
    answers = [text if number % 4 == 0 else "something else" for number, text in enumerate(written)]
    columns = zip(QUESTIONS, LABELS, answers, strict=True)
    data.write_text(
        "".join(
            json.dumps({"question": question, "choices": CHOICES, "label": label, "answer": answer}) + "\n"
            for question, label, answer in columns
        )
    )
    tasks = tmp_path_factory.mktemp("tasks")
    for name, text in (("choosing", CHOOSING), ("writing", WRITING), ("scoring", SCORING), ("both", BOTH)):
        (tasks / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return tasks


@pytest.fixture(scope="module")
def everything(folder: Path) -> Any:
    """The index of all of the harness's tasks, which takes seconds to make."""
    return capability._task_manager(folder)


def own(folder: Path) -> Any:
    return TaskManager(include_path=str(folder), include_defaults=False)


def logps(source: ModelSource, ids: Ids) -> np.ndarray:
    """Log-probs [questions, choices] by raydiv's own scorer, of what ``ids`` makes of a question and a choice."""
    pairs = [ids(question, choice) for question in QUESTIONS for choice in CHOICES]
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    scored = LogProbScorer(source)(rows)
    return np.array([row["logp"] for row in scored]).reshape(len(QUESTIONS), len(CHOICES))


def ids_of(source: ModelSource, between: str = " ") -> Ids:
    """Without a template: the choice's tokens are what it adds to the question's."""
    tokenizer = source.chat().tokenizer

    def ids(question: str, choice: str) -> tuple[list[int], list[int]]:
        whole, start = tokenizer(f"{question}{between}{choice}").input_ids, len(tokenizer(question).input_ids)
        return whole[:start], whole[start:]

    return ids


def accuracy(values: np.ndarray) -> float:
    return float(np.mean(values.argmax(axis=1) == LABELS))


def perplexity(row: dict[str, Any]) -> float:
    (score,) = row["scores"][0].scores
    assert score.metric == "perplexity"
    assert score.stderr is not None
    return float(score.value)


def test_scores_are_what_the_models_own_log_probs_say(source: ModelSource, folder: Path) -> None:
    values = logps(source, ids_of(source))
    right, right_by_length = accuracy(values), accuracy(values / [len(choice) for choice in CHOICES])
    assert (right, right_by_length) == (0.6, 0.5)

    def stderr(share: float) -> float:
        return float(np.sqrt(share * (1 - share) / (len(QUESTIONS) - 1)))

    chosen, scored = TaskHarness(source, own(folder), None, False)([{"task": "choosing"}, {"task": "scoring"}])
    scores = [
        CapabilityScore("acc", "none", right, pytest.approx(stderr(right))),
        CapabilityScore("acc_norm", "none", right_by_length, pytest.approx(stderr(right_by_length))),
    ]
    assert chosen == {"scores": [TaskScores("choosing", scores, len(QUESTIONS), 0, "2.5")]}
    # a task that only scores puts nothing before its target
    targets = logps(source, ids_of(source, between=""))[:, 1]
    assert perplexity(scored) == pytest.approx(np.exp(-targets.mean()), rel=1e-4)


def test_template_makes_documents_a_users_turns(source: ModelSource, folder: Path) -> None:
    chat = source.chat()
    values = logps(source, lambda question, choice: (chat.prompt_ids(question), chat.tokenizer(choice).input_ids))
    assert accuracy(values) != accuracy(logps(source, ids_of(source)))
    chosen, scored = TaskHarness(source, own(folder), None, True)([{"task": "choosing"}, {"task": "scoring"}])
    assert chosen["scores"][0].scores[0].value == pytest.approx(accuracy(values))
    assert perplexity(scored) == pytest.approx(np.exp(-values[:, 1].mean()), rel=1e-4)


def test_what_is_written_counts_where_it_matches(source: ModelSource, folder: Path, written: list[str]) -> None:
    assert len(set(written)) > 1
    (found,) = TaskHarness(source, own(folder), None, False)([{"task": "writing"}])
    (scores,) = found["scores"]
    # 0, 4 and 8 of ten
    assert (scores.scores[0].name, scores.scores[0].value) == ("exact_match", pytest.approx(0.3))


def test_limit_takes_the_first_documents(source: ModelSource, folder: Path) -> None:
    (found,) = TaskHarness(source, own(folder), 4, False)([{"task": "writing"}])
    assert found["scores"][0].documents == 4
    assert found["scores"][0].scores[0].value == pytest.approx(0.25)


def test_group_has_its_own_figures_and_a_tag_those_of_its_tasks(source: ModelSource, folder: Path) -> None:
    group, tag, task = TaskHarness(source, own(folder), None, False)(
        [{"task": "both"}, {"task": "of_mine"}, {"task": "choosing"}]
    )
    assert [scores.task for scores in group["scores"]] == ["both"]
    assert group["scores"][0].scores[0].value == task["scores"][0].scores[0].value
    assert group["scores"][0].version == "1.0"
    assert [scores.task for scores in tag["scores"]] == ["writing"]


@pytest.mark.long
def test_through_a_pool_the_same(source: ModelSource, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int | None]] = []
    with ray_session(ClusterConfig()):
        found = measure_capability(
            source,
            ["choosing", "writing"],
            cluster=ClusterConfig(),
            include=folder,
            progress=lambda done, total: seen.append((done, total)),
        )
    here = TaskHarness(source, own(folder), None, False)([{"task": "choosing"}, {"task": "writing"}])
    assert found.tasks == [scores for row in here for scores in row["scores"]]
    written = json.loads(json.dumps(found.as_json()))["capability"]
    assert {name: score["value"] for name, score in written.items()} == {
        "capability/choosing/acc": found.tasks[0].scores[0].value,
        "capability/choosing/acc_norm": found.tasks[0].scores[1].value,
        "capability/writing/exact_match": pytest.approx(0.3),
    }
    score = written["capability/writing/exact_match"]
    assert score["documents"] == len(QUESTIONS)
    assert score["interval"] == pytest.approx([0.001, 0.599], abs=5e-4)
    assert seen == [(1, 2), (2, 2)]
    assert capfd.readouterr().out == ""


def test_presets_are_the_harnesss_tasks_and_mix_with_names(everything: Any, folder: Path) -> None:
    assert not PRESETS.keys() & set(everything.all_tasks)
    assert {name for names in PRESETS.values() for name in names} <= set(everything.all_tasks)
    named = capability._task_names(["choosing", "math", "gsm8k", "choosing", "arc_easy"], everything, folder)
    assert named == ["choosing", *PRESETS["math"], "arc_easy"]


@pytest.mark.parametrize(("name", "near"), [("gsm8kk", "gsm8k"), ("maths", "math"), ("chosing", "choosing")])
def test_unknown_task_gets_its_neighbours(everything: Any, folder: Path, name: str, near: str) -> None:
    with pytest.raises(
        UserError, match=rf"task '{name}' \(did you mean .*\b{near}\b.*\?\); .* has both, choosing, scoring, writing"
    ):
        capability._task_names(["gsm8k", name], everything, folder)


def test_unreadable_task_of_ones_own_is_seen_to_be_missing(everything: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task '§§§' \(presets: quick, .*\); .* has no valid task"):
        capability._task_names(["§§§"], everything, tmp_path)


def test_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        capability._task_manager(tmp_path / "nowhere")


def test_without_the_harness_the_command_that_brings_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'raydiv\[capability\]'"):
        capability._task_manager(None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("DATA", "/nowhere.jsonl"), "cannot be loaded: .*nowhere.jsonl"),
        (("metadata: {version: 2.5}", "unsafe_code: true"), "runs code that the model writes"),
    ],
)
def test_task_that_cannot_run_is_refused_before_a_model_is_loaded(
    tmp_path: Path, folder: Path, change: tuple[str, str], reason: str
) -> None:
    text = CHOOSING.replace(*change).replace("DATA", str(tmp_path / "documents.jsonl"))
    (tmp_path / "documents.jsonl").write_text(json.dumps({"question": "q", "choices": CHOICES, "label": 0}) + "\n")
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"task choosing: .*{reason}"):
        TaskHarness(ModelSource(tmp_path / "no model"), own(tmp_path), None, False)([{"task": "choosing"}])


@pytest.mark.parametrize("template_writes_it", [True, False])
def test_a_chat_document_begins_with_one_bos(template_writes_it: bool, tmp_path: Path) -> None:
    """Where the tokenizer adds one, and the template writes one too."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = make_model(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if template_writes_it:
        template = folder / "chat_template.jinja"
        template.write_text("{{ bos_token }}" + template.read_text())
    model = TaskHarness(ModelSource(folder), None, None, True)._model
    text = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text.startswith("<s>") == template_writes_it
    expected = ModelSource(folder).chat().prompt_ids("hi")
    assert expected.count(1) == 1
    assert model.tok_encode(text) == expected
    assert model.tok_batch_encode([text])[0].tolist() == [expected]
