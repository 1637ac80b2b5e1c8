"""A study's grid, its cells out of runs and out of MLflow, and its jobs; the last test runs a small one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from helpers.small_run import recipe_of, write_files
from helpers.sources import ROOT
from raydiv.cli import main
from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.experiments.shared import RunGroup
from raydiv.experiments.study.collect import cell_of, included, require_same
from raydiv.experiments.study.grid import baselines, planned_cells
from raydiv.experiments.study.jobs import CellJob, run_jobs
from raydiv.experiments.study.study import StudyDirectory, study
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError


def recipe_with(study: dict[str, Any], **sections: Any) -> Recipe:
    tree = {"model": {"id": "org/Base-1B"}, "loss": {"type": "kldo", "skew": 0.5}, "optim": {"steps": 10}}
    return load_recipe(tree | sections | {"study": study})


def test_the_grid_is_every_combination_and_its_cells_are_recipes() -> None:
    found = planned_cells(
        recipe_with(
            {
                "models": {"small": "org/small", "tuned": {"id": "org/big", "lora.r": 4, "optim.lr": 0.01}},
                "data": ["bundled:compliance-refusal", "bundled:preference"],
                "losses": {"KLDO": {"type": "kldo", "skew": 0.25}, "DPO": "dpo"},
                "seeds": [1, 2],
            },
        )
    )
    assert len({one.name for one in found}) == len(found) == 16
    assert [one.name for one in found[:3]] == [
        "small-compliance-refusal-KLDO-1",
        "small-compliance-refusal-KLDO-2",
        "small-compliance-refusal-DPO-1",
    ]
    last = found[-1]
    assert (last.model, last.data, last.loss, last.seed) == ("tuned", "preference", "DPO", 2)
    own = last.recipe
    assert (own.model.id, own.optim.lr, own.loss.type, own.seed) == ("org/big", 0.01, "dpo", 2)
    assert [source.path for source in own.data.train] == ["bundled:preference"]
    assert own.study is None
    assert found[0].recipe.loss.options["skew"] == 0.25


def test_an_override_adds_an_entry_or_takes_it_away_and_a_list_replaces_all() -> None:
    tree = recipe_with({"losses": {"KLDO": {"type": "kldo", "skew": 0.25}, "DPO": "dpo"}}).model_dump(by_alias=True)

    def losses(*overrides: str) -> list[str]:
        return [plan.loss for plan in planned_cells(load_recipe(tree, overrides))]

    assert losses("study.losses={KTO: kto, DPO: null}") == ["KLDO", "KTO"]
    assert losses("study.losses=[kto]") == ["kto"]


def test_an_axis_that_is_not_named_has_the_recipes_own_entry() -> None:
    (one, other) = planned_cells(recipe_with({"losses": ["kldo", "dpo"]}))
    assert (one.name, other.name) == ("Base-1B-compliance-refusal-kldo-0", "Base-1B-compliance-refusal-dpo-0")
    assert one.recipe.loss.options["skew"] == 0.5, "kldo is the recipe's own"


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ({}, "no cells: name models, data, losses or seeds"),
        ({"losses": [{"type": "dpo"}]}, "a list holds words alone"),
        ({"models": ["a/x", "b/x"]}, "two of the list would be called the same"),
        ({"losses": {"my loss": "dpo"}}, "my loss: a name has letters"),
        ({"losses": {"dpo": 3}}, "dpo: must be a word or a mapping of keys, found 3"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"loses": ["dpo"]}, "study.loses: unknown key (did you mean losses?)"),
    ],
)
def test_bad_studies_are_refused(study: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_with(study)
    assert said in str(error.value)


def test_a_cell_that_no_run_could_be_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"study: the cell Base-1B, compliance-refusal, bad: loss.skw: unknown key"):
        planned_cells(recipe_with({"losses": {"bad": {"type": "kldo", "skw": 1}}}))
    with pytest.raises(UserError, match=r"cluster.num_workers: is the same for all cells of a study"):
        planned_cells(recipe_with({"models": {"x": {"id": "y", "cluster.num_workers": 2}}}))
    with pytest.raises(UserError, match=r"seed: is the same for all cells of a study but for seeds"):
        planned_cells(recipe_with({"losses": {"x": {"type": "dpo", "seed": 2}}}))
    with pytest.raises(UserError, match=r"two cells would be called a-b-c-kldo-0"):
        planned_cells(recipe_with({"models": {"a": "m", "a-b": "n"}, "data": {"b-c": "x.jsonl", "c": "y.jsonl"}}))
    with pytest.raises(UserError, match=r"study.baselines.x: model.idd: unknown key"):
        baselines(recipe_with({"baselines": {"x": {"idd": "y"}}}))


@pytest.mark.parametrize(
    ("name", "cells", "plain"),
    [("papers/kldo-study.yaml", 40, 0), ("papers/safe-falcon-study.yaml", 10, 8), ("study-small.yaml", 8, 0)],
)
def test_shipped_studies_have_the_cells_that_they_say(name: str, cells: int, plain: int) -> None:
    recipe = load_recipe(ROOT / "configs" / name)
    assert len(planned_cells(recipe)) == cells
    assert len(baselines(recipe)) == plain
    assert len({plan.name for plan in planned_cells(recipe)}) == cells


def finished_run(path: Path, recipe: Recipe, **metrics: float) -> RunDirectory:
    run = RunDirectory(path)
    path.mkdir(parents=True)
    save_recipe(recipe, run.recipe)
    run.metrics.append({"step": 0, "evaluate/asr": 0.9})
    run.metrics.append({"step": 3, "divergence/name": "KL", **metrics})
    run.result.write_text("{}")
    return run


def test_a_cell_is_what_its_run_measured_after_training_and_before(tmp_path: Path) -> None:
    (plan,) = planned_cells(recipe_with({"seeds": [4]}))
    cell = cell_of(finished_run(tmp_path / "run", plan.recipe, **{"evaluate/asr": 0.2}), plan)
    assert (cell.key, cell.seed) == (("Base-1B", "compliance-refusal", "kldo"), 4)
    assert (cell.metrics, cell.before) == ({"evaluate/asr": 0.2}, {"evaluate/asr": 0.9})


def test_included_runs_have_the_names_that_the_study_has_for_their_like(tmp_path: Path) -> None:
    losses = {"OURS": {"type": "kldo", "skew": 0.5}, "DPO": "dpo"}
    recipe = recipe_with({"losses": losses, "data": {"CR": "bundled:compliance-refusal"}})
    ours, dpo = (plan.recipe for plan in planned_cells(recipe))
    finished_run(tmp_path / "runs" / "a", ours, x=1.0)
    finished_run(
        tmp_path / "runs" / "b", load_recipe(dpo.model_dump(by_alias=True), ["seed=7", "loss.beta=0.5"]), x=2.0
    )
    (tmp_path / "runs" / "unfinished").mkdir()
    save_recipe(ours, tmp_path / "runs" / "unfinished" / "recipe.yaml")
    wider = recipe_with({**(recipe.study.model_dump() if recipe.study else {}), "include": [str(tmp_path / "runs")]})
    found = list(included(wider).values())
    assert [(cell.model, cell.data, cell.loss, cell.seed) for cell in found] == [
        ("Base-1B", "CR", "OURS", 0),
        ("Base-1B", "CR", "dpo", 7),
    ]
    assert found[1].where == str(tmp_path / "runs" / "b")
    with pytest.raises(UserError, match=r"study.include: .*nothing: holds no finished run"):
        included(recipe_with({"include": [str(tmp_path / "nothing")]}))


def test_a_finished_cell_must_be_of_the_recipe_that_it_has_now(tmp_path: Path) -> None:
    (plan,) = planned_cells(recipe_with({"losses": ["kldo"]}))
    moved = plan.recipe.model_copy(update={"cluster": ClusterConfig(num_workers=4), "output_dir": "elsewhere"})
    run = finished_run(tmp_path / "run", moved)
    require_same(plan.recipe, run)
    with pytest.raises(UserError, match=r"this cell was run with another loss\.beta, optim\.lr;"):
        require_same(load_recipe(plan.recipe.model_dump(by_alias=True), ["loss.beta=9", "optim.lr=1"]), run)


def test_a_finished_cell_is_one_whatever_its_checkpoints(tmp_path: Path) -> None:
    (plan,) = planned_cells(recipe_with({"losses": ["kldo"]}, checkpoint={"storage": str(tmp_path / "store")}))
    family = RunGroup(tmp_path / "study" / "cells", ClusterConfig(), None, None)
    run = finished_run(tmp_path / "study" / "cells" / plan.name, family.member_recipe(plan.recipe, plan.name, {}))
    require_same(load_recipe(plan.recipe.model_dump(by_alias=True), ["checkpoint.every=7"]), run)


def test_an_included_run_of_another_rate_is_no_seed_of_the_studys(tmp_path: Path) -> None:
    losses = {"SLOW": {"type": "dpo", "optim.lr": 1e-6}, "FAST": {"type": "dpo", "optim.lr": 1e-4}}
    recipe = recipe_with({"losses": losses})
    slow, fast = (plan.recipe for plan in planned_cells(recipe))
    others = {
        "rate": (fast, "optim.lr=1e-5"),
        "clip": (fast, "optim.clip=7"),
        "seed": (slow, "seed=3"),
        "fast": (fast,),
    }
    for name, (own, *change) in others.items():
        finished_run(tmp_path / "runs" / name, load_recipe(own.model_dump(by_alias=True), change))
    study = recipe_with({"losses": losses, "include": [str(tmp_path / "runs")]})
    named = {Path(cell.where).name: cell.loss for cell in included(study).values()}
    assert named == {"rate": "dpo", "clip": "FAST (other optim.clip)", "seed": "SLOW", "fast": "FAST"}


def job_details(name: str, status: JobStatus, run: Path) -> SimpleNamespace:
    return SimpleNamespace(
        submission_id=name,
        metadata={"raydiv.run": str(run)},
        status=status,
        driver_exit_code=None,
        message=None,
        entrypoint="",
        start_time=None,
        end_time=None,
    )


class FakeClient:
    """Jobs that end after as many looks as their name says; those with an x in it fail."""

    def __init__(self, there: list[Any]) -> None:
        self.there, self.looks, self.submitted, self.stopped = there, dict[str, int](), [], []
        self.most = self.away = 0
        self.runs: dict[str, Path] = {}
        self._server_ray_version = "2.60.0"

    def list_jobs(self) -> list[Any]:
        if self.away and self.looks:
            self.away -= 1
            raise RuntimeError("Request failed with status code 500")
        return self.there + [job_details(name, self._status(name), self.runs[name]) for name in self.runs]

    def _status(self, name: str) -> JobStatus:
        if name in self.looks:
            self.looks[name] += 1
            if self.looks[name] < int(name[0]):
                return JobStatus.RUNNING
            del self.looks[name]
            if "u" not in name:
                self.runs[name].mkdir(parents=True, exist_ok=True)
                (self.runs[name] / "result.json").write_text("{}")
        return JobStatus.FAILED if "x" in name else JobStatus.SUCCEEDED

    def submit_job(self, *, entrypoint: str, metadata: dict[str, str], runtime_env: dict[str, Any]) -> str:
        assert entrypoint.startswith(f"cd {Path.cwd()} && ")
        assert runtime_env["env_vars"].keys() == {"RAYDIV_CACHE", "RAY_JOB_STOP_WAIT_TIME_S"}, "nothing is set twice"
        assert (runtime_env["working_dir"], runtime_env["py_modules"]) == ("gcs://w.zip", ["gcs://m.zip"])
        self.runs[metadata["name"]] = Path(metadata["raydiv.run"])
        self.submitted.append(metadata["name"])
        self.looks[metadata["name"]] = 0
        self.most = max(self.most, len(self.looks))
        return metadata["name"]

    def get_job_logs(self, name: str) -> str:
        return "noise\nraydiv: the run failed: out of memory\nnoise\n" if "x" in name else "{}"

    def stop_job(self, name: str) -> None:
        self.stopped.append(name)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClient]:
    fake = FakeClient([])
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: fake)
    given = {"working_dir": "gcs://w.zip", "py_modules": ["gcs://m.zip"], "env_vars": {"MINE": "1"}}
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="here", runtime_env=given))
    monkeypatch.setattr("raydiv.experiments.study.jobs.POLL_S", 0.0)
    monkeypatch.setattr("raydiv.runtime.submit.jobs.RETRY_S", 0.0)
    monkeypatch.setenv("HF_HOME", "here")
    monkeypatch.setenv("HF_TOKEN", "secret")
    return fake


def jobs_of(folder: Path, *names: str) -> list[CellJob]:
    return [
        CellJob(name, folder / f"{name}.yaml", folder / name, folder / f"{name}.log", frozenset({"HF_HOME"}))
        for name in names
    ]


def test_so_many_jobs_run_at_once_and_one_that_fails_stops_no_other(client: FakeClient, tmp_path: Path) -> None:
    ended: dict[str, str | None] = {}
    names = ["3a", "1b", "2x", "1c", "2d", "1u"]
    run_jobs(jobs_of(tmp_path, *names), 2, lambda job, error: ended.__setitem__(job.name, error), print)
    assert client.submitted == names
    assert client.most == 2
    assert "output_dir must be on shared storage" in (ended.pop("1u") or "")
    assert ended == {"1b": None, "2x": "out of memory", "3a": None, "1c": None, "2d": None}
    assert "out of memory" in (tmp_path / "2x.log").read_text()
    assert client.stopped == []


def test_a_job_that_still_runs_is_followed_and_what_it_writes_is_left(client: FakeClient, tmp_path: Path) -> None:
    for name in ("1a", "1b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("")
    (tmp_path / "1b" / "result.json").write_text("{}")
    client.runs["1b"], client.looks["1b"] = tmp_path / "1b", -1  # running when the study starts
    client.there = [SimpleNamespace(status=JobStatus.FAILED, metadata=None, submission_id="0")]
    ended: list[str] = []
    run_jobs(jobs_of(tmp_path, "1a", "1b"), 1, lambda job, error: ended.append(job.name), print)
    assert client.submitted == ["1a"]
    assert ended == ["1b", "1a"]
    assert (tmp_path / "1b").is_dir()
    assert [path.name for path in (tmp_path / "1a").iterdir()] == ["result.json"], (
        "and nothing of an unfinished attempt"
    )


def test_interrupted_it_stops_the_jobs_that_it_started(client: FakeClient, tmp_path: Path) -> None:
    def interrupt(job: CellJob, error: str | None) -> None:
        raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs_of(tmp_path, "1a", "9b"), 2, interrupt, said.append)
    assert client.stopped == ["9b"]
    assert client.looks == {}, "and waits until it has ended"
    assert said == ["cells told to stop: 1; one that trains writes a checkpoint, and Ctrl-C again does not wait"]


def test_a_dashboard_that_is_away_for_a_moment_ends_no_job(client: FakeClient, tmp_path: Path) -> None:
    client.away = 3
    ended: list[str] = []
    run_jobs(jobs_of(tmp_path, "1a", "2b"), 2, lambda job, error: ended.append(job.name), print)
    assert ended == ["1a", "2b"]
    assert client.stopped == []


def test_one_that_stays_away_is_said_and_all_jobs_are_told_to_stop(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydiv.runtime.submit.jobs.MAX_OUTAGE_S", 0.0)
    client.away = 10**9
    asked: list[str] = []

    def stop(name: str) -> None:
        asked.append(name)
        raise RuntimeError("away too")

    monkeypatch.setattr(client, "stop_job", stop)
    with pytest.raises(RuntimeError, match="status code 500"):
        run_jobs(jobs_of(tmp_path, "9a", "9b"), 2, lambda job, error: None, print)
    assert asked == ["9a", "9b"]


def test_a_job_that_the_cluster_no_longer_lists_ends_the_study(client: FakeClient, tmp_path: Path) -> None:
    def lose(name: str) -> str:
        del client.runs[name]
        return "{}"

    client.get_job_logs = lose  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="job 9b of 9b is missing"):
        run_jobs(jobs_of(tmp_path, "1a", "9b"), 2, lambda job, error: client.runs.clear(), print)
    assert client.stopped == ["9b"]


def test_a_study_without_its_section_is_none() -> None:
    plain = load_recipe({"model": {"id": "x"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}})
    with pytest.raises(UserError, match="has no section study"):
        study(plain)


def test_killed_as_soon_as_it_has_begun_it_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raydiv.experiments.study.study.MlflowTracker", killed)
    recipe = recipe_with({"losses": ["dpo"]}, output_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        study(recipe, resume=True)  # of one that is not there it is a start
    with pytest.raises(UserError, match="holds a study already; go on with it"):
        study(recipe)
    with pytest.raises(KeyboardInterrupt):
        study(recipe, resume=True)


@pytest.mark.slow
@pytest.mark.long
def test_a_small_study_is_run_extended_and_read_from_mlflow(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    more = [f"separation.prompts={files['prompts']}", "optim.steps=2"]
    more += [
        "cluster.num_workers=1",
        "batch.tokens_per_microbatch=auto",
        "data.train=train.jsonl",
    ]
    more += ["study.losses={KLDO: {type: kldo, skew: 0.5}, FATAL: {type: dpo, optim.lr: 1.0e+20}}"]
    recipe = recipe_of(tiny_model, files, tmp_path / "out", "grid", *more)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    command = ["study", str(tmp_path / "recipe.yaml"), "--json"]
    with ray_session(ClusterConfig(), dashboard=True):
        assert main(command) == 0
        found = json.loads(capsys.readouterr().out)
        assert [cell["loss"] for cell in found["cells"]] == ["none", "KLDO"]
        ((name, error),) = found["failures"].items()
        assert "FATAL" in name
        assert "not finite" in error
        directory = StudyDirectory.of(recipe)
        (first,) = directory.cells.glob("*KLDO-0/result.json")
        trained = first.stat().st_mtime_ns
        assert main(command) == 2
        assert "holds a study already" in capsys.readouterr().err
        wider = "study.losses={FATAL: null, DPO: dpo}"
        assert main([*command, "--resume", wider]) == 0
        again = json.loads(capsys.readouterr().out)
    assert [cell["loss"] for cell in again["cells"]] == ["none", "KLDO", "DPO"]
    assert again["failures"] == {}
    assert first.stat().st_mtime_ns == trained
    assert {"cells.md", "cells.csv"} <= {path.name for path in directory.tables.iterdir()}
    assert "src=" not in directory.report.read_text()
    by_mlflow = recipe_of(
        tiny_model, files, tmp_path / "other", "more", *more[:-1], "study.include=['mlflow:raydiv']",
        f"track.uri=sqlite:///{tmp_path / 'out' / 'mlflow.db'}",
    )  # fmt: skip
    cells = {cell.loss: cell for cell in study(by_mlflow).cells}
    own = {cell["loss"]: cell for cell in again["cells"]}
    assert cells["dpo_sft"].metrics == own["DPO"]["metrics"]
    assert cells["kldo_sft"].before == own["KLDO"]["before"]
