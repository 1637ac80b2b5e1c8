"""Who says what is tried next, what is kept of it, and how the cluster is shared; without Ray's workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.tune.search import Searcher

from raydiv.config import Recipe, load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.config.sweep import SweepConfig, SweepConstraint, SweepObjective
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


def asked(
    objectives: list[SweepObjective],
    constraints: list[SweepConstraint] | None = None,
    given: dict[int, dict[str, Any]] | None = None,
) -> OptunaSearcher:
    space = SweepConfig(space=SPACE, goal="maximize y", trials=1).parameters
    return OptunaSearcher(space, objectives, constraints or [], 0, given or {})


def searched(
    searcher: OptunaSearcher, worth: Callable[[dict[str, Any]], dict[str, float]], count: int
) -> list[dict[str, Any]]:
    for number in range(count):
        trial = searcher.suggest(f"t{number}")
        assert isinstance(trial, dict)
        assert trial["number"] == number + 1
        searcher.on_trial_complete(f"t{number}", worth(trial["values"]))
    return searcher.tried


def far_off(values: dict[str, Any]) -> float:
    """Best at x = 0.3 with kind near; far is worse by its shift."""
    return -((values["x"] - 0.3) ** 2) - (values.get("shift", 0.0) + 0.1 if values["kind"] == "far" else 0.0)


UP = [SweepObjective("y", "maximize")]


def test_optuna_learns_what_is_better_and_tries_nothing_twice() -> None:
    tried = searched(asked(UP), lambda values: {"y": far_off(values)}, 60)
    assert len({json.dumps(values) for values in tried}) == 60
    assert all(("shift" in values) == (values["kind"] == "far") for values in tried)
    worths = [far_off(values) for values in tried]
    assert sum(worths[-20:]) / 20 > sum(worths[:20]) / 20 + 0.1
    assert max(worths) > -0.001


def test_minimising_looks_at_the_other_end() -> None:
    tried = searched(asked([SweepObjective("y", "minimize")]), lambda values: {"y": values["x"]}, 40)
    assert sum(values["x"] for values in tried[-15:]) / 15 < 0.3


def test_constraints_keep_optuna_away_from_what_breaks_them() -> None:
    def within(constraints: list[SweepConstraint]) -> list[float]:
        tried = searched(asked(UP, constraints), lambda values: {"y": values["x"], "z": values["x"]}, 60)
        return [values["x"] for values in tried[-20:] if values["x"] <= 0.5]

    bounded = within([SweepConstraint("z", "<=", 0.5)])
    assert len(bounded) >= 2 * len(within([]))
    assert max(bounded) > 0.45


def test_several_objectives_and_trials_that_come_to_none() -> None:
    both = asked([*UP, SweepObjective("z", "minimize")], [SweepConstraint("w", ">=", 0.0)])
    searched(both, lambda values: {"y": values["x"], "z": values["x"] ** 2} if values["x"] < 0.9 else {}, 15)
    trial = both.suggest("failing")
    assert isinstance(trial, dict)
    both.on_trial_complete("failing", None, error=True)
    assert isinstance(both.suggest("next"), dict)


def test_what_was_tried_before_comes_first_and_is_learnt_from() -> None:
    before = searched(asked(UP), lambda values: {"y": far_off(values)}, 20)
    again = asked(UP, given=dict(enumerate(before, 1)))
    tried = searched(again, lambda values: {"y": far_off(values)}, 40)
    assert tried[:20] == before
    worths = [far_off(values) for values in tried]
    assert sum(worths[20:]) / 20 > sum(worths[:20]) / 20
    assert len({json.dumps(values) for values in tried}) == 40


def test_a_small_space_ends_the_search() -> None:
    space = SweepConfig(space={"x": [1, 2], "y": [[0.9, 0.95], None]}, goal="maximize y", trials=9).parameters
    searcher = OptunaSearcher(space, UP, [], 0, {})
    found = []
    while isinstance(trial := searcher.suggest(f"t{len(found)}"), dict):
        found.append(trial["values"])
    assert trial == Searcher.FINISHED
    assert sorted(map(json.dumps, found)) == sorted(
        json.dumps({"x": x, "y": y}) for x in (1, 2) for y in ([0.9, 0.95], None)
    )


def test_a_list_is_gone_through_once() -> None:
    searcher = ListSearcher({1: {"x": 1}, 2: {"x": 2}})
    assert searcher.suggest("a") == {"number": 1, "values": {"x": 1}}
    assert searcher.suggest("b") == {"number": 2, "values": {"x": 2}}
    assert searcher.suggest("c") == Searcher.FINISHED


def recipe_in(folder: Path, **changes: Any) -> Recipe:
    sweep = {"space": {"loss.beta": [0.1, 0.2]}, "goal": "maximize d subject to r <= 0.1", "search": "grid"}
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
    """What a finished run leaves of it."""
    run = directory.run(trial)
    run.model.mkdir(parents=True)
    (run.model / "weights").write_text("w")
    run.metrics.append({"step": 0, "d": 99.0, "r": 0.0, "before/alone": 1.0})
    run.metrics.append({"step": 2, "divergence/name": "KL", **metrics})
    run.result.write_text("{}")


def record_of(folder: Path, outcomes: list[tuple[float, float]], **changes: Any) -> SweepRecord:
    recipe = recipe_in(folder, **changes)
    directory = SweepDirectory.of(recipe)
    record = SweepRecord(directory, recipe)
    for number, (d, r) in enumerate(outcomes, 1):
        trial = record.trials[number] = TrialRecord(number, {"loss.beta": number / 10})
        finish(directory, trial, d=d, r=r)
        record.settle(trial, FINISHED)
    return record


def test_the_best_trial_is_the_best_within_the_constraints(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(1.0, 0.05), (3.0, 0.5), (2.0, 0.1), (2.0, 0.0)])
    assert [trial.number for trial in record.best] == [3]
    assert [trial.number for trial in record.finished] == [3, 4, 1, 2]
    assert record.trials[1].metrics == {"step": 2, "d": 1.0, "r": 0.05}, "what the base had is no trial's"


def test_none_is_best_where_all_break_the_constraints(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(1.0, 0.5), (3.0, 0.4)])
    assert record.best == []
    assert [trial.number for trial in record.finished] == [2, 1]


def test_with_several_objectives_the_best_are_those_that_none_beats(tmp_path: Path) -> None:
    goal = {"goal": "maximize d, minimize r"}
    record = record_of(tmp_path, [(1.0, 0.1), (2.0, 0.3), (1.0, 0.2), (2.0, 0.3), (3.0, 0.9)], sweep=goal)
    assert sorted(trial.number for trial in record.best) == [1, 2, 4, 5]
    assert undominated([], record.objectives) == []


def test_only_the_best_keep_their_weights_whatever_their_number(tmp_path: Path) -> None:
    """The disk that a sweep takes does not grow with its trials."""
    record = record_of(tmp_path, [])
    for number in range(1, 9):
        trial = record.trials[number] = TrialRecord(number, {"loss.beta": number})
        finish(record.directory, trial, d=float(number % 5), r=0.0)
        record.settle(trial, FINISHED)
        record.forget_weights(2)
        weights = sorted(path.parent.parent.name for path in record.directory.trials.glob("*/model/weights"))
        assert len(weights) <= 2
    assert weights == ["003", "004"] == [trial.name for trial in record.trials.values() if trial.kept]
    assert all(record.directory.run(trial).metrics.path.is_file() for trial in record.trials.values())
    stopped = record.trials[9] = TrialRecord(9, {"loss.beta": 9})
    finish(record.directory, stopped, d=100.0, r=0.0)
    record.settle(stopped, STOPPED)
    record.forget_weights(2)
    assert not record.directory.run(stopped).model.exists()


def test_a_record_is_read_back_and_what_was_not_over_waits(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(1.0, 0.0), (2.0, 0.0)])
    recipe = recipe_in(tmp_path)
    record.trials[3] = TrialRecord(3, {"loss.beta": 0.3}, status=FAILED, error="no memory")
    record.trials[4] = TrialRecord(4, {"loss.beta": 0.4}, status="running")
    record.trials[2].status = "running"  # finished, and its sweep was killed before it noted so
    record.facts = {"mlflow": {"run_id": "abc"}}
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
    assert again.facts["mlflow"]["run_id"] == "abc"


def test_a_sweep_is_resumed_as_it_was(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    directory = SweepDirectory.of(recipe)
    # of one that is not there it is a start, so that a job may always be given it
    assert not directory.can_resume(recipe, resume=True)
    assert not directory.can_resume(recipe, resume=False)
    directory.create(recipe)
    with pytest.raises(UserError, match="a run already"):
        directory.can_resume(recipe, resume=False)
    SweepRecord(directory, recipe).write()
    with pytest.raises(UserError, match=r"sweep already.*--resume"):
        directory.can_resume(recipe, resume=False)
    assert directory.can_resume(recipe_in(tmp_path, sweep={"keep": 3, "max_concurrent": 2}), resume=True)
    with pytest.raises(UserError, match="was begun with another optim;"):
        directory.can_resume(recipe_in(tmp_path, optim={"steps": 3}), resume=True)
    with pytest.raises(UserError, match="was begun with another sweep;"):
        directory.can_resume(recipe_in(tmp_path, sweep={"space": {"loss.beta": [0.1]}}), resume=True)


def test_resumed_with_short_names_the_best_keeps_its_weights(tmp_path: Path) -> None:
    """What is feasible is known again once the goal's metrics have their whole names."""
    goal = {"goal": "maximize d subject to r <= 0.1", "keep": 1}
    record = record_of(tmp_path, [], sweep=goal)
    for number, (d, r) in enumerate([(1.0, 0.0), (3.0, 0.0), (9.0, 0.5)], 1):
        trial = record.trials[number] = TrialRecord(number, {"loss.beta": number})
        finish(record.directory, trial, **{"a/d": d, "b/r": r})
        record.settle(trial, FINISHED)
    record.write()
    again = SweepRecord.read(record.directory, recipe_in(tmp_path, sweep=goal))
    again.named({"d": "a/d", "r": "b/r"})
    for trial in again.trials.values():
        again.settle(trial, FINISHED)
        again.forget_weights(1)
    assert [trial.number for trial in again.best] == [2]
    assert [path.parent.name for path in again.directory.trials.glob("*/model")] == ["002"]


def test_what_is_not_finite_is_no_best(tmp_path: Path) -> None:
    record = record_of(tmp_path, [(float("nan"), 0.0), (float("inf"), 0.0), (1.0, 0.0)])
    assert [trial.number for trial in record.finished] == [3]


def test_the_front_of_those_within_the_constraints_keeps_its_weights(tmp_path: Path) -> None:
    goal = {"goal": "maximize d, minimize e subject to r <= 0.1"}
    record = record_of(tmp_path, [], sweep=goal)
    for number, (d, e, r) in enumerate([(1.0, 5.0, 0.0), (3.0, 4.0, 0.0), (2.0, 1.0, 0.0), (9.0, 0.5, 0.9)], 1):
        trial = record.trials[number] = TrialRecord(number, {"loss.beta": number})
        finish(record.directory, trial, d=d, e=e, r=r)
        record.settle(trial, FINISHED)
    assert [trial.number for trial in record.best] == [2, 3]
    assert [trial.number for trial in record.finished] == [2, 3, 1, 4]


def test_a_space_of_lists_is_searched_to_its_end() -> None:
    """Optuna soon suggests its favourite again and again: then one that was not tried is drawn."""
    space = SweepConfig(space={"x": [1, 2, 3, 4], "y": [1, 2, 3, 4]}, goal="maximize y", trials=16).parameters
    searcher = OptunaSearcher(space, UP, [], 0, {})
    tried = searched(searcher, lambda values: {"y": float(values["x"] * values["y"])}, 16)
    assert len({json.dumps(values) for values in tried}) == 16
    assert searcher.suggest("more") == Searcher.FINISHED


def test_numbers_of_an_earlier_attempt_stay_whatever_is_missing_between_them() -> None:
    given = {1: {"x": 0.1, "kind": "near"}, 3: {"x": 0.3, "kind": "near"}}
    searcher = asked(UP, given=given)
    tried = searched(searcher, lambda values: {"y": far_off(values)}, 4)
    assert (tried[0], tried[2]) == (given[1], given[3])
    assert tried[1] not in given.values()


class Told:
    """A trial of Tune's, as its schedulers read it."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.status = str(number), "RUNNING"


def test_asha_stops_those_that_fall_behind_and_none_whose_training_is_over() -> None:
    halving = TrialASHA("y", "maximize", steps=8, grace=2, reduction=2)
    *trials, short, behind = [Told(number) for number in range(6)]
    for trial in (*trials, short, behind):
        halving.on_trial_add(None, trial)
    early = [halving.on_trial_result(None, trial, {"step": 2, "y": 3.0 - n}) for n, trial in enumerate(trials)]
    assert early[0] == "CONTINUE"
    assert early[-1] == "STOP"
    assert halving.on_trial_result(None, trials[0], {"step": 4, "loss": 1.0}) == "CONTINUE", "a line without the metric"
    ends = [halving.on_trial_result(None, trial, {"step": 8, "y": -float(n)}) for n, trial in enumerate(trials)]
    assert ends == ["CONTINUE"] * 4
    # of one that stopped early what is measured at the end comes with fewer updates
    assert halving.on_trial_result(None, short, {"step": 3, "y": -9.0, TRAINED: True}) == "CONTINUE"
    assert halving.on_trial_result(None, behind, {"step": 3, "y": -9.0, TRAINED: False}) == "STOP"


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
def test_runs_side_by_side_never_want_more_than_there_is(
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
    found, own = concurrent_runs(ClusterConfig(**cluster), at_most)
    assert found == runs
    assert {name: getattr(own, name) for name in part} == part
    assert found * (own.cpus or 0) <= have["CPU"]


def test_what_runs_share_is_prepared_once_for_each_way_in_which_they_differ(tmp_path: Path) -> None:
    one = recipe_in(tmp_path)
    same = [
        one.model_copy(update={"seed": 5}),
        load_recipe(one.model_dump(by_alias=True), ["loss.beta=0.7", "optim.lr=1"]),
    ]
    kto = load_recipe(one.model_dump(by_alias=True), ["loss.type=kto"])
    longer = load_recipe(one.model_dump(by_alias=True), ["optim.steps=5"])
    data = load_recipe(one.model_dump(by_alias=True), ["data.train=other.jsonl"])
    assert distinct_preparations([one, *same, kto, longer, data, kto]) == [one, kto, longer, data]
    drawn = load_recipe(one.model_dump(by_alias=True), ["data.eval=0.1"])
    others = [drawn.model_copy(update={"seed": seed}) for seed in (1, 2)]
    assert distinct_preparations([drawn, *others]) == [drawn, *others], "what is held out is drawn by the seed"


def test_a_member_of_a_family_is_nested_in_its_run(tmp_path: Path) -> None:
    one = recipe_in(tmp_path, track={"tags": {"team": "red"}})
    family = RunGroup(tmp_path / "trials", ClusterConfig(cpus=1), "sqlite:///x.db", "parent")
    own = family.member_recipe(one, "007", {"raydiv.trial": "7"})
    assert RunDirectory.of(own).path == tmp_path / "trials" / "007"
    assert own.track.tags == {"team": "red", "mlflow.parentRunId": "parent", "raydiv.trial": "7"}
    assert (own.track.uri, own.cluster.cpus) == ("sqlite:///x.db", 1)
