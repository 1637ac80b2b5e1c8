"""Searchers, record and scheduler of a sweep, and how concurrent runs share a cluster; without Ray workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray.tune.search import Searcher

from helpers.made_sweep import at_least, at_most, maximize, minimize, parameters_of
from raydiv.config import Recipe, load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.config.sweep import SweepConstraint, SweepObjective
from raydiv.experiments.shared import RunGroup, distinct_preparations
from raydiv.experiments.sweep.asha import TRAINED, TrialASHA
from raydiv.experiments.sweep.record import (
    FAILED,
    FINISHED,
    STOPPED,
    WAITING,
    SweepDirectory,
    SweepRecord,
    TrialRecord,
    undominated,
)
from raydiv.experiments.sweep.searchers import ListSearcher, OptunaSearcher
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.resources import HOST_MEMORY_FRACTION, concurrent_runs
from raydiv.utils.errors import UserError

SPACE = {
    "x": "uniform(0, 1)",
    "kind": ["near", "far"],
    "shift": {"in": "uniform(0, 1)", "when": {"kind": "far"}},
}


def optuna_searcher(
    objectives: list[SweepObjective],
    constraints: list[SweepConstraint] | None = None,
    earlier: dict[int, dict[str, Any]] | None = None,
) -> OptunaSearcher:
    return OptunaSearcher(parameters_of(SPACE), objectives, constraints or [], 0, earlier or {})


def search(
    searcher: OptunaSearcher, outcome: Callable[[dict[str, Any]], dict[str, float]], count: int
) -> list[dict[str, Any]]:
    for number in range(count):
        trial = searcher.suggest(f"t{number}")
        assert isinstance(trial, dict)
        assert trial["number"] == number + 1
        searcher.on_trial_complete(f"t{number}", outcome(trial["values"]))
    return searcher.suggested


def quality(values: dict[str, Any]) -> float:
    """Highest at x = 0.3 with kind near; far is lower by its shift."""
    return -((values["x"] - 0.3) ** 2) - (values.get("shift", 0.0) + 0.1 if values["kind"] == "far" else 0.0)


UP = [maximize("y")]


def test_optuna_improves_and_repeats_nothing() -> None:
    tried = search(optuna_searcher(UP), lambda values: {"y": quality(values)}, 60)
    assert len({json.dumps(values) for values in tried}) == 60
    assert all(("shift" in values) == (values["kind"] == "far") for values in tried)
    qualities = [quality(values) for values in tried]
    assert sum(qualities[-20:]) / 20 > sum(qualities[:20]) / 20 + 0.1
    assert max(qualities) > -0.001


def test_optuna_minimizes() -> None:
    tried = search(optuna_searcher([minimize("y")]), lambda values: {"y": values["x"]}, 40)
    assert sum(values["x"] for values in tried[-15:]) / 15 < 0.3


def test_optuna_learns_constraints() -> None:
    def within(constraints: list[SweepConstraint]) -> list[float]:
        tried = search(optuna_searcher(UP, constraints), lambda values: {"y": values["x"], "z": values["x"]}, 60)
        return [values["x"] for values in tried[-20:] if values["x"] <= 0.5]

    bounded = within([at_most("z", 0.5)])
    assert len(bounded) >= 2 * len(within([]))
    assert max(bounded) > 0.45


def test_several_objectives_and_trials_without_them() -> None:
    both = optuna_searcher([*UP, minimize("z")], [at_least("w", 0.0)])
    search(both, lambda values: {"y": values["x"], "z": values["x"] ** 2} if values["x"] < 0.9 else {}, 15)
    trial = both.suggest("failing")
    assert isinstance(trial, dict)
    both.on_trial_complete("failing", None, error=True)
    assert isinstance(both.suggest("next"), dict)


def test_trials_of_an_earlier_attempt_come_first_and_inform_the_search() -> None:
    before = search(optuna_searcher(UP), lambda values: {"y": quality(values)}, 20)
    again = optuna_searcher(UP, earlier=dict(enumerate(before, 1)))
    tried = search(again, lambda values: {"y": quality(values)}, 40)
    assert tried[:20] == before
    qualities = [quality(values) for values in tried]
    assert sum(qualities[20:]) / 20 > sum(qualities[:20]) / 20
    assert len({json.dumps(values) for values in tried}) == 40


def test_small_space_ends_the_search() -> None:
    space = parameters_of({"x": [1, 2], "y": [[0.9, 0.95], None]})
    searcher = OptunaSearcher(space, UP, [], 0, {})
    values = []
    while isinstance(trial := searcher.suggest(f"t{len(values)}"), dict):
        values.append(trial["values"])
    assert trial == Searcher.FINISHED
    assert sorted(map(json.dumps, values)) == sorted(
        json.dumps({"x": x, "y": y}) for x in (1, 2) for y in ([0.9, 0.95], None)
    )


def test_list_is_suggested_once() -> None:
    searcher = ListSearcher({1: {"x": 1}, 2: {"x": 2}})
    assert searcher.suggest("a") == {"number": 1, "values": {"x": 1}}
    assert searcher.suggest("b") == {"number": 2, "values": {"x": 2}}
    assert searcher.suggest("c") == Searcher.FINISHED


MAXIMIZE_D = {"metric": "d", "direction": "maximize"}
AT_MOST_R = {"metric": "r", "max": 0.1}


def recipe_in(folder: Path, **changes: Any) -> Recipe:
    sweep = {
        "space": {"loss.beta": [0.1, 0.2]},
        "objectives": [MAXIMIZE_D],
        "constraints": [AT_MOST_R],
        "search": "grid",
    }
    return load_recipe(
        {
            "name": "s",
            "output_dir": str(folder),
            "model": {"id": "nowhere"},
            "loss": {"type": "kldo"},
            "optim": {"steps": 2},
            "sweep": sweep | changes.pop("sweep", {}),
            **changes,
        }
    )


def finish(directory: SweepDirectory, trial: TrialRecord, **metrics: float) -> None:
    """Write the files of a finished run."""
    run = directory.run(trial)
    run.model.mkdir(parents=True)
    (run.model / "weights").write_text("w")
    run.metrics.append({"step": 0, "d": 99.0, "r": 0.0, "before/alone": 1.0})
    run.metrics.append({"step": 2, "divergence/name": "KL", **metrics})
    run.result.write_text("{}")


def record_of(folder: Path, outcomes: list[tuple[float, float]], **changes: Any) -> SweepRecord:
    recipe = recipe_in(folder, **changes)
    directory = SweepDirectory.of(recipe)
    record = SweepRecord.of(directory, recipe)
    for number, (d, r) in enumerate(outcomes, 1):
        trial = record.trials[number] = TrialRecord(number, {"loss.beta": number / 10})
        finish(directory, trial, d=d, r=r)
        record.end_trial(trial, FINISHED)
    return record


def test_best_trial_satisfies_the_constraints(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(1.0, 0.05), (3.0, 0.5), (2.0, 0.1), (2.0, 0.0)])
    assert [trial.number for trial in record.best] == [3]
    assert [trial.number for trial in record.ranked()] == [3, 4, 1, 2]
    assert record.trials[1].metrics == {"step": 2, "d": 1.0, "r": 0.05}, "metrics of the base model are not the trial's"


def test_no_best_trial_without_a_feasible_one(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(1.0, 0.5), (3.0, 0.4)])
    assert record.best == []
    assert [trial.number for trial in record.ranked()] == [2, 1]


def test_best_trials_of_several_objectives_are_the_front(tmp_path: Path) -> None:
    several = {"objectives": [MAXIMIZE_D, {"metric": "r", "direction": "minimize"}], "constraints": []}
    record = record_of(tmp_path, [(1.0, 0.1), (2.0, 0.3), (1.0, 0.2), (2.0, 0.3), (3.0, 0.9)], sweep=several)
    assert sorted(trial.number for trial in record.best) == [1, 2, 4, 5]
    assert undominated([], record.objectives) == []


def test_only_the_best_trials_keep_their_weights(tmp_path: Path) -> None:
    """The disk space of a sweep does not grow with its trials."""
    record = record_of(tmp_path, [])
    for number in range(1, 9):
        trial = record.trials[number] = TrialRecord(number, {"loss.beta": number})
        finish(record.directory, trial, d=float(number % 5), r=0.0)
        record.end_trial(trial, FINISHED)
        record.remove_weights(2)
        weights = sorted(path.parent.parent.name for path in record.directory.trials.glob("*/model/weights"))
        assert len(weights) <= 2
    assert weights == ["003", "004"] == [trial.name for trial in record.trials.values() if trial.kept]
    assert all(record.directory.run(trial).metrics.path.is_file() for trial in record.trials.values())
    stopped = record.trials[9] = TrialRecord(9, {"loss.beta": 9})
    finish(record.directory, stopped, d=100.0, r=0.0)
    record.end_trial(stopped, STOPPED)
    record.remove_weights(2)
    assert not record.directory.run(stopped).model.exists()


def test_record_is_read_and_unfinished_trials_wait(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(1.0, 0.0), (2.0, 0.0)])
    recipe = recipe_in(tmp_path)
    record.trials[3] = TrialRecord(3, {"loss.beta": 0.3}, status=FAILED, error="no memory")
    record.trials[4] = TrialRecord(4, {"loss.beta": 0.4}, status="running")
    record.trials[2].status = "running"  # finished just before its sweep was killed
    record.mlflow = {"run_id": "abc"}
    record.write()
    again = SweepRecord.read(record.directory, recipe)
    assert {number: trial.status for number, trial in again.trials.items()} == {
        1: FINISHED,
        2: FINISHED,
        3: FAILED,
        4: WAITING,
    }
    assert again.trials[3].error == "no memory"
    assert [trial.number for trial in again.best] == [2]
    assert again.mlflow == {"run_id": "abc"}


def test_sweep_resumes_only_with_the_same_recipe(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    directory = SweepDirectory.of(recipe)
    # without a sweep it is a start, so that a job can always have --resume
    assert not directory.can_resume(recipe, resume=True)
    assert not directory.can_resume(recipe, resume=False)
    directory.create(recipe)
    with pytest.raises(UserError, match="a run already"):
        directory.can_resume(recipe, resume=False)
    SweepRecord.of(directory, recipe).write()
    with pytest.raises(UserError, match=r"sweep already.*--resume"):
        directory.can_resume(recipe, resume=False)
    assert directory.can_resume(recipe_in(tmp_path, sweep={"keep": 3, "max_concurrent": 2}), resume=True)
    with pytest.raises(UserError, match="another optim;"):
        directory.can_resume(recipe_in(tmp_path, optim={"steps": 3}), resume=True)
    with pytest.raises(UserError, match="another sweep;"):
        directory.can_resume(recipe_in(tmp_path, sweep={"space": {"loss.beta": [0.1]}}), resume=True)


def test_content_of_sweep_json(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(1.0, 0.0), (2.0, 0.5)])
    record.mlflow, record.versions, record.seconds = {"uri": "u", "run_id": "abc"}, {"ray": "2.60"}, 3.5
    record.write()
    content = json.loads(record.directory.record.read_text())
    recipe = content.pop("recipe")
    assert load_recipe(yaml.safe_load(recipe)).model_dump() == recipe_in(tmp_path).model_dump()
    assert content.pop("trials")[1] == {
        "number": 2,
        "values": {"loss.beta": 0.2},
        "status": "finished",
        "metrics": {"step": 2, "d": 2.0, "r": 0.5},
        "feasible": False,
        "error": None,
        "seconds": None,
        "steps": 2,
        "kept": True,
        "run": "trials/002",
    }
    assert content == {
        "name": "s",
        "goal": "maximize d subject to r <= 0.1",
        "objectives": [{"metric": "d", "direction": "maximize"}],
        "constraints": [{"metric": "r", "relation": "<=", "bound": 0.1}],
        "space": {"loss.beta": [0.1, 0.2]},
        "search": "grid",
        "scheduler": "none",
        "best": [1],
        "mlflow": {"uri": "u", "run_id": "abc"},
        "versions": {"ray": "2.60"},
        "seconds": 3.5,
    }


def test_sweep_of_an_older_recipe_resumes(tmp_path: Path) -> None:
    """Its recipe.yaml has the key ``goal``, and its sweep.json fields that are not read."""
    record = record_of(tmp_path, [(1.0, 0.0), (2.0, 0.0)])
    record.directory.create(recipe_in(tmp_path))
    record.write()
    tree = yaml.safe_load(record.directory.recipe.read_text())
    del tree["sweep"]["objectives"], tree["sweep"]["constraints"]
    tree["sweep"]["goal"] = "maximize d subject to r <= 0.1"
    record.directory.recipe.write_text(yaml.safe_dump(tree))
    content = json.loads(record.directory.record.read_text())
    content["trials"][0]["added_later"] = 1
    record.directory.record.write_text(json.dumps(content))
    for recipe in (recipe_in(tmp_path), load_recipe(tree)):
        assert record.directory.can_resume(recipe, resume=True)
        assert [trial.number for trial in SweepRecord.read(record.directory, recipe).best] == [2]


def test_best_trial_keeps_its_weights_after_resuming_with_short_names(tmp_path: Path) -> None:
    """Feasibility is computed again once the metrics of constraints have their full names."""
    record = record_of(tmp_path, [])
    for number, (d, r) in enumerate([(1.0, 0.0), (3.0, 0.0), (9.0, 0.5)], 1):
        trial = record.trials[number] = TrialRecord(number, {"loss.beta": number})
        finish(record.directory, trial, **{"a/d": d, "b/r": r})
        record.end_trial(trial, FINISHED)
    record.write()
    again = SweepRecord.read(record.directory, recipe_in(tmp_path))
    again.use_full_names({"d": "a/d", "r": "b/r"})
    for trial in again.trials.values():
        again.end_trial(trial, FINISHED)
        again.remove_weights(1)
    assert [trial.number for trial in again.best] == [2]
    assert [path.parent.name for path in again.directory.trials.glob("*/model")] == ["002"]


def test_value_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(float("nan"), 0.0), (float("inf"), 0.0), (1.0, 0.0)])
    assert [trial.number for trial in record.finished("d")] == [3]
    assert [trial.number for trial in record.best] == [3]


def test_front_has_feasible_trials_only(tmp_path: Path) -> None:
    several = {"objectives": [MAXIMIZE_D, {"metric": "e", "direction": "minimize"}]}
    record = record_of(tmp_path, [], sweep=several)
    for number, (d, e, r) in enumerate([(1.0, 5.0, 0.0), (3.0, 4.0, 0.0), (2.0, 1.0, 0.0), (9.0, 0.5, 0.9)], 1):
        trial = record.trials[number] = TrialRecord(number, {"loss.beta": number})
        finish(record.directory, trial, d=d, e=e, r=r)
        record.end_trial(trial, FINISHED)
    assert [trial.number for trial in record.best] == [2, 3]
    assert [trial.number for trial in record.ranked()] == [2, 3, 1, 4]


def test_space_of_lists_is_searched_completely() -> None:
    """Optuna soon repeats its favourite; then an untried combination is drawn."""
    space = parameters_of({"x": [1, 2, 3, 4], "y": [1, 2, 3, 4]})
    searcher = OptunaSearcher(space, UP, [], 0, {})
    tried = search(searcher, lambda values: {"y": float(values["x"] * values["y"])}, 16)
    assert len({json.dumps(values) for values in tried}) == 16
    assert searcher.suggest("more") == Searcher.FINISHED


def test_earlier_trials_keep_their_numbers() -> None:
    earlier = {1: {"x": 0.1, "kind": "near"}, 3: {"x": 0.3, "kind": "near"}}
    searcher = optuna_searcher(UP, earlier=earlier)
    tried = search(searcher, lambda values: {"y": quality(values)}, 4)
    assert (tried[0], tried[2]) == (earlier[1], earlier[3])
    assert tried[1] not in earlier.values()


class TuneTrial:
    """A trial of Ray Tune, with what its schedulers read."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.status = str(number), "RUNNING"


def test_asha_stops_trials_that_fall_behind_while_they_train() -> None:
    asha = TrialASHA("y", "maximize", steps=8, grace=2, reduction=2)
    *trials, short, behind = [TuneTrial(number) for number in range(6)]
    for trial in (*trials, short, behind):
        asha.on_trial_add(None, trial)
    early = [asha.on_trial_result(None, trial, {"step": 2, "y": 3.0 - n}) for n, trial in enumerate(trials)]
    assert early[0] == "CONTINUE"
    assert early[-1] == "STOP"
    assert asha.on_trial_result(None, trials[0], {"step": 4, "loss": 1.0}) == "CONTINUE", "a line without the metric"
    ends = [asha.on_trial_result(None, trial, {"step": 8, "y": -float(n)}) for n, trial in enumerate(trials)]
    assert ends == ["CONTINUE"] * 4
    # a trial that stopped early reports its last metrics with fewer updates
    assert asha.on_trial_result(None, short, {"step": 3, "y": -9.0, TRAINED: True}) == "CONTINUE"
    assert asha.on_trial_result(None, behind, {"step": 3, "y": -9.0, TRAINED: False}) == "STOP"


@pytest.mark.parametrize(
    ("have", "cluster", "at_most", "runs", "part"),
    [
        ({"CPU": 2}, {}, None, 2, {"cpus": 1.0, "worker_memory_gb": 5.0}),
        ({"CPU": 2}, {"num_workers": 2}, None, 1, {"cpus": 2.0, "worker_memory_gb": 5.0}),
        ({"CPU": 2}, {"num_workers": 3}, 8, 1, {"cpus": 2.0}),
        ({"CPU": 16}, {"num_workers": 2, "cpus_per_worker": 3}, None, 2, {"cpus": 8.0, "cpus_per_worker": 3.0}),
        ({"CPU": 16}, {"cpus": 4}, None, 4, {"cpus": 1.0}),
        ({"CPU": 16}, {}, 3, 3, {"cpus": 5.333}),
        ({"CPU": 64, "GPU": 8}, {"use_gpu": True, "num_workers": 2}, None, 4, {"cpus": 16.0, "pool_actors": 2}),
        (
            {"CPU": 64, "GPU": 8},
            {"use_gpu": True, "num_workers": 8},
            4,
            1,
            {"pool_actors": 8, "worker_memory_gb": 80.0},
        ),
    ],
)
def test_concurrent_runs_fit_the_cluster(
    have: dict[str, float],
    cluster: dict[str, Any],
    at_most: int | None,
    runs: int,
    part: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    nodes = [{"Alive": True, "Resources": {"CPU": have["CPU"], "memory": 2**30 * 10 / HOST_MEMORY_FRACTION}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: SimpleNamespace(remote=lambda: 80 * 2**30))
    monkeypatch.setattr(ray, "get", lambda value: value)
    count, share = concurrent_runs(ClusterConfig(**cluster), at_most)
    assert count == runs
    assert {name: getattr(share, name) for name in part} == part
    assert count * (share.cpus or 0) <= have["CPU"]


def test_distinct_preparations(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    same = [
        recipe.model_copy(update={"seed": 5}),
        load_recipe(recipe.model_dump(by_alias=True), ["loss.beta=0.7", "optim.lr=1"]),
    ]
    kto = load_recipe(recipe.model_dump(by_alias=True), ["loss.type=kto"])
    longer = load_recipe(recipe.model_dump(by_alias=True), ["optim.steps=5"])
    data = load_recipe(recipe.model_dump(by_alias=True), ["data.train=other.jsonl"])
    first = ["loss.position={kind: first, tokens: 2, weight: 0.5}"]
    weighted = load_recipe(recipe.model_dump(by_alias=True), first)
    rewarded, hotter, other = (
        load_recipe(recipe.model_dump(by_alias=True), [f"loss.position={{kind: rewarded, {rest}}}"])
        for rest in ("model: a, temperature: 1", "model: a, temperature: 2", "model: b, temperature: 1")
    )
    recipes = [recipe, *same, kto, longer, data, kto, weighted, weighted, rewarded, rewarded, hotter, other]
    assert distinct_preparations(recipes) == [recipe, kto, longer, data, weighted, rewarded, hotter, other]
    drawn = load_recipe(recipe.model_dump(by_alias=True), ["data.eval=0.1"])
    others = [drawn.model_copy(update={"seed": seed}) for seed in (1, 2)]
    assert distinct_preparations([drawn, *others]) == [drawn, *others], "the seed draws the held-out examples"


def test_member_of_a_group_is_nested_in_the_run_of_the_group(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, track={"tags": {"team": "red"}})
    group = RunGroup(tmp_path / "trials", ClusterConfig(cpus=1), "sqlite:///x.db", "parent")
    member = group.member_recipe(recipe, "007", {"raydiv.trial": "7"})
    assert RunDirectory.of(member).path == tmp_path / "trials" / "007"
    assert member.track.tags == {"team": "red", "mlflow.parentRunId": "parent", "raydiv.trial": "7"}
    assert (member.track.uri, member.cluster.cpus) == ("sqlite:///x.db", 1)
