"""A study's grid, its cells from runs and from MLflow, and its jobs; the last test runs a small study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
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
from raydiv.experiments.study.collect import cell_of, included_cells, require_same_recipe
from raydiv.experiments.study.grid import PlannedCell, StudyGrid
from raydiv.experiments.study.jobs import CellJob, run_jobs
from raydiv.experiments.study.study import StudyDirectory, study
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError


def recipe_with(study: dict[str, Any], **sections: Any) -> Recipe:
    tree = {"model": {"id": "org/Base-1B"}, "loss": {"type": "kldo", "skew": 0.5}, "optim": {"steps": 10}}
    return load_recipe(tree | sections | {"study": study})


def cells_of(study: dict[str, Any], **sections: Any) -> list[PlannedCell]:
    return StudyGrid.of(recipe_with(study, **sections)).cells


def test_grid_has_a_recipe_for_every_combination() -> None:
    cells = cells_of(
        {
            "models": {"small": "org/small", "tuned": {"id": "org/big", "lora.r": 4, "optim.lr": 0.01}},
            "data": ["bundled:compliance-refusal", "bundled:preference"],
            "losses": {"KLDO": {"type": "kldo", "skew": 0.25}, "DPO": "dpo"},
            "seeds": [1, 2],
        },
    )
    assert len({cell.name for cell in cells}) == len(cells) == 16
    assert [cell.name for cell in cells[:3]] == [
        "small-compliance-refusal-KLDO-1",
        "small-compliance-refusal-KLDO-2",
        "small-compliance-refusal-DPO-1",
    ]
    last = cells[-1]
    assert (last.model, last.data, last.loss, last.seed) == ("tuned", "preference", "DPO", 2)
    recipe = last.recipe
    assert (recipe.model.id, recipe.optim.lr, recipe.loss.type, recipe.seed) == ("org/big", 0.01, "dpo", 2)
    assert [source.path for source in recipe.data.train] == ["bundled:preference"]
    assert recipe.study is None
    assert cells[0].recipe.loss.options["skew"] == 0.25


def test_an_override_adds_or_removes_an_entry_and_a_list_replaces_all() -> None:
    tree = recipe_with({"losses": {"KLDO": {"type": "kldo", "skew": 0.25}, "DPO": "dpo"}}).model_dump(by_alias=True)

    def losses(*overrides: str) -> list[str]:
        return [cell.loss for cell in StudyGrid.of(load_recipe(tree, overrides)).cells]

    assert losses("study.losses={KTO: kto, DPO: null}") == ["KLDO", "KTO"]
    assert losses("study.losses=[kto]") == ["kto"]


def test_an_axis_that_is_not_set_has_the_value_of_the_recipe() -> None:
    kldo, dpo = cells_of({"losses": ["kldo", "dpo"]})
    assert (kldo.name, dpo.name) == ("Base-1B-compliance-refusal-kldo-0", "Base-1B-compliance-refusal-dpo-0")
    assert kldo.recipe.loss.options["skew"] == 0.5, "the entry kldo keeps the recipe's options"


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({}, r"study: no cells"),
        ({"losses": [{"type": "dpo"}]}, r"study\.losses: {'type': 'dpo'}"),
        ({"models": ["a/x", "b/x"]}, r"study\.models: a/x, b/x: duplicate"),
        ({"losses": {"my loss": "dpo"}}, r"study\.losses: 'my loss': invalid name"),
        ({"losses": {"dpo": 3}}, r"study\.losses: 'dpo': .*found 3"),
        ({"seeds": [1, 1]}, r"study\.seeds: duplicate"),
        ({"loses": ["dpo"]}, r"study\.loses: .*losses"),
    ],
)
def test_invalid_studies_are_rejected(study: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_with(study)


def test_an_invalid_cell_is_rejected_by_name() -> None:
    with pytest.raises(UserError, match=r"study: cell Base-1B, compliance-refusal, bad: loss\.skw"):
        cells_of({"losses": {"bad": {"type": "kldo", "skw": 1}}})
    with pytest.raises(UserError, match=r"cell x, .*: cluster\.num_workers: not supported"):
        cells_of({"models": {"x": {"id": "y", "cluster.num_workers": 2}}})
    with pytest.raises(UserError, match=r"cell .*, x: seed: .*study\.seeds"):
        cells_of({"losses": {"x": {"type": "dpo", "seed": 2}}})
    with pytest.raises(UserError, match=r"2 cells have the name a-b-c-kldo-0"):
        cells_of({"models": {"a": "m", "a-b": "n"}, "data": {"b-c": "x.jsonl", "c": "y.jsonl"}})
    with pytest.raises(UserError, match=r"study\.baselines\.x: model\.idd"):
        cells_of({"baselines": {"x": {"idd": "y"}}})


@pytest.mark.parametrize(
    ("name", "cells", "baselines"),
    [
        ("papers/kldo-study.yaml", 40, 0),
        ("papers/safe-falcon-study.yaml", 10, 8),
        ("study-small.yaml", 8, 0),
        ("depth-small.yaml", 10, 0),
    ],
)
def test_shipped_studies_have_this_many_cells(name: str, cells: int, baselines: int) -> None:
    grid = StudyGrid.of(load_recipe(ROOT / "configs" / name))
    assert len(grid.cells) == len({cell.name for cell in grid.cells}) == cells
    assert len(grid.baselines) == baselines


def finished_run(path: Path, recipe: Recipe, **metrics: float) -> RunDirectory:
    run = RunDirectory(path)
    path.mkdir(parents=True)
    save_recipe(recipe, run.recipe)
    run.metrics.append({"step": 0, "evaluate/asr": 0.9})
    run.metrics.append({"step": 3, "divergence/name": "KL", **metrics})
    run.result.write_text("{}")
    return run


def test_a_cell_has_the_metrics_of_its_run_after_and_before_training(tmp_path: Path) -> None:
    (planned,) = cells_of({"seeds": [4]})
    cell = cell_of(finished_run(tmp_path / "run", planned.recipe, **{"evaluate/asr": 0.2}), planned)
    assert (cell.key, cell.seed) == (("Base-1B", "compliance-refusal", "kldo"), 4)
    assert (cell.metrics, cell.before) == ({"evaluate/asr": 0.2}, {"evaluate/asr": 0.9})


def test_included_runs_have_the_names_of_equal_entries(tmp_path: Path) -> None:
    losses = {"OURS": {"type": "kldo", "skew": 0.5}, "DPO": "dpo"}
    recipe = recipe_with({"losses": losses, "data": {"CR": "bundled:compliance-refusal"}})
    ours, dpo = (cell.recipe for cell in StudyGrid.of(recipe).cells)
    finished_run(tmp_path / "runs" / "a", ours, x=1.0)
    finished_run(
        tmp_path / "runs" / "b", load_recipe(dpo.model_dump(by_alias=True), ["seed=7", "loss.beta=0.5"]), x=2.0
    )
    (tmp_path / "runs" / "unfinished").mkdir()
    save_recipe(ours, tmp_path / "runs" / "unfinished" / "recipe.yaml")
    wider = recipe_with({**(recipe.study.model_dump() if recipe.study else {}), "include": [str(tmp_path / "runs")]})
    cells = list(included_cells(wider).values())
    assert [(cell.model, cell.data, cell.loss, cell.seed) for cell in cells] == [
        ("Base-1B", "CR", "OURS", 0),
        ("Base-1B", "CR", "dpo", 7),
    ]
    assert cells[1].where == str(tmp_path / "runs" / "b")
    with pytest.raises(UserError, match=r"study\.include: .*nothing: no finished run"):
        included_cells(recipe_with({"include": [str(tmp_path / "nothing")]}))


def test_a_finished_cell_must_have_its_current_recipe(tmp_path: Path) -> None:
    (cell,) = cells_of({"losses": ["kldo"]})
    moved = cell.recipe.model_copy(update={"cluster": ClusterConfig(num_workers=4), "output_dir": "elsewhere"})
    run = finished_run(tmp_path / "run", moved)
    require_same_recipe(cell.recipe, run)
    with pytest.raises(UserError, match=r"loss\.beta, optim\.lr;"):
        require_same_recipe(load_recipe(cell.recipe.model_dump(by_alias=True), ["loss.beta=9", "optim.lr=1"]), run)


def test_a_finished_cell_may_change_its_checkpoints(tmp_path: Path) -> None:
    (cell,) = cells_of({"losses": ["kldo"]}, checkpoint={"storage": str(tmp_path / "store")})
    group = RunGroup(tmp_path / "study" / "cells", ClusterConfig(), None, None)
    run = finished_run(tmp_path / "study" / "cells" / cell.name, group.member_recipe(cell.recipe, cell.name, {}))
    require_same_recipe(load_recipe(cell.recipe.model_dump(by_alias=True), ["checkpoint.every=7"]), run)


def test_an_included_run_with_another_rate_is_no_seed_of_the_studys_cell(tmp_path: Path) -> None:
    losses = {"SLOW": {"type": "dpo", "optim.lr": 1e-6}, "FAST": {"type": "dpo", "optim.lr": 1e-4}}
    recipe = recipe_with({"losses": losses})
    slow, fast = (cell.recipe for cell in StudyGrid.of(recipe).cells)
    others = {
        "rate": (fast, "optim.lr=1e-5"),
        "clip": (fast, "optim.clip=7"),
        "seed": (slow, "seed=3"),
        "fast": (fast,),
    }
    for name, (entry, *change) in others.items():
        finished_run(tmp_path / "runs" / name, load_recipe(entry.model_dump(by_alias=True), change))
    study = recipe_with({"losses": losses, "include": [str(tmp_path / "runs")]})
    losses_by_run = {Path(cell.where).name: cell.loss for cell in included_cells(study).values()}
    assert losses_by_run == {"rate": "dpo", "clip": "FAST (other optim.clip)", "seed": "SLOW", "fast": "FAST"}


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
    """Ray's job client. A job ends after as many requests as its name begins with.

    A job with x in its name fails, and one with u succeeds without a result.
    """

    def __init__(self) -> None:
        self.other_jobs: list[Any] = []
        self.requests: dict[str, int] = {}
        """Requests for the status of each running job."""
        self.submitted: list[str] = []
        self.stopped: list[str] = []
        self.most_at_once = self.failed_requests = 0
        self.runs: dict[str, Path] = {}
        self._server_ray_version = "2.60.0"

    def list_jobs(self) -> list[Any]:
        if self.failed_requests and self.requests:
            self.failed_requests -= 1
            raise RuntimeError("Request failed with status code 500")
        return self.other_jobs + [job_details(name, self._status(name), self.runs[name]) for name in self.runs]

    def _status(self, name: str) -> JobStatus:
        if name in self.requests:
            self.requests[name] += 1
            if self.requests[name] < int(name[0]):
                return JobStatus.RUNNING
            del self.requests[name]
            if "u" not in name:
                self.runs[name].mkdir(parents=True, exist_ok=True)
                (self.runs[name] / "result.json").write_text("{}")
        return JobStatus.FAILED if "x" in name else JobStatus.SUCCEEDED

    def submit_job(self, *, entrypoint: str, metadata: dict[str, str], runtime_env: dict[str, Any]) -> str:
        assert entrypoint.startswith(f"cd {Path.cwd()} && ")
        assert runtime_env["env_vars"].keys() == {"RAYDIV_CACHE", "RAY_JOB_STOP_WAIT_TIME_S"}, (
            "no variable is set twice"
        )
        assert (runtime_env["working_dir"], runtime_env["py_modules"]) == ("gcs://w.zip", ["gcs://m.zip"])
        self.runs[metadata["name"]] = Path(metadata["raydiv.run"])
        self.submitted.append(metadata["name"])
        self.requests[metadata["name"]] = 0
        self.most_at_once = max(self.most_at_once, len(self.requests))
        return metadata["name"]

    def get_job_logs(self, name: str) -> str:
        return "noise\nraydiv: the run failed: out of memory\nnoise\n" if "x" in name else "{}"

    def stop_job(self, name: str) -> None:
        self.stopped.append(name)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClient]:
    fake = FakeClient()
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: fake)
    environment = {"working_dir": "gcs://w.zip", "py_modules": ["gcs://m.zip"], "env_vars": {"MINE": "1"}}
    context = SimpleNamespace(gcs_address="here", runtime_env=environment)
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
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


def test_jobs_run_at_once_up_to_the_limit_and_a_failed_one_stops_no_other(client: FakeClient, tmp_path: Path) -> None:
    ended: dict[str, str | None] = {}
    names = ["3a", "1b", "2x", "1c", "2d", "1u"]
    run_jobs(jobs_of(tmp_path, *names), 2, lambda job, error: ended.__setitem__(job.name, error), print)
    assert client.submitted == names
    assert client.most_at_once == 2
    assert "output_dir" in (ended.pop("1u") or "")
    assert ended == {"1b": None, "2x": "out of memory", "3a": None, "1c": None, "2d": None}
    assert "out of memory" in (tmp_path / "2x.log").read_text()
    assert client.stopped == []


def test_a_running_job_is_followed_and_its_files_are_kept(client: FakeClient, tmp_path: Path) -> None:
    for name in ("1a", "1b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("")
    (tmp_path / "1b" / "result.json").write_text("{}")
    client.runs["1b"], client.requests["1b"] = tmp_path / "1b", -1  # running when the study starts
    client.other_jobs = [SimpleNamespace(status=JobStatus.FAILED, metadata=None, submission_id="0")]
    ended: list[str] = []
    run_jobs(jobs_of(tmp_path, "1a", "1b"), 1, lambda job, error: ended.append(job.name), print)
    assert client.submitted == ["1a"]
    assert ended == ["1b", "1a"]
    assert (tmp_path / "1b").is_dir()
    assert [path.name for path in (tmp_path / "1a").iterdir()] == ["result.json"], "an unfinished attempt is removed"


def test_an_interrupt_stops_the_running_jobs(client: FakeClient, tmp_path: Path) -> None:
    def interrupt(job: CellJob, error: str | None) -> None:
        raise KeyboardInterrupt

    messages: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs_of(tmp_path, "1a", "9b"), 2, interrupt, messages.append)
    assert client.stopped == ["9b"]
    assert client.requests == {}, "the interrupt waits for the end of the job"
    (message,) = messages
    assert message.startswith("stopping 1 cells")


def test_a_short_outage_of_the_dashboard_ends_no_job(client: FakeClient, tmp_path: Path) -> None:
    client.failed_requests = 3
    ended: list[str] = []
    run_jobs(jobs_of(tmp_path, "1a", "2b"), 2, lambda job, error: ended.append(job.name), print)
    assert ended == ["1a", "2b"]
    assert client.stopped == []


def test_a_long_outage_of_the_dashboard_fails_and_stops_all_jobs(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydiv.runtime.submit.jobs.MAX_OUTAGE_S", 0.0)
    client.failed_requests = 10**9
    stop_requests: list[str] = []

    def stop(name: str) -> None:
        stop_requests.append(name)
        raise RuntimeError("no connection")

    monkeypatch.setattr(client, "stop_job", stop)
    with pytest.raises(RuntimeError, match="status code 500"):
        run_jobs(jobs_of(tmp_path, "9a", "9b"), 2, lambda job, error: None, print)
    assert stop_requests == ["9a", "9b"]


def test_a_job_that_the_cluster_no_longer_lists_ends_the_study(client: FakeClient, tmp_path: Path) -> None:
    def lose(name: str) -> str:
        del client.runs[name]
        return "{}"

    client.get_job_logs = lose  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="job 9b of 9b is missing"):
        run_jobs(jobs_of(tmp_path, "1a", "9b"), 2, lambda job, error: client.runs.clear(), print)
    assert client.stopped == ["9b"]


def test_a_recipe_without_a_study_is_rejected() -> None:
    recipe = load_recipe({"model": {"id": "x"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}})
    with pytest.raises(UserError, match="study: missing section"):
        study(recipe)


def test_a_study_killed_at_its_start_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raydiv.experiments.study.study.MlflowTracker", killed)
    recipe = recipe_with({"losses": ["dpo"]}, output_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        study(recipe, resume=True)  # without an earlier study, resume starts one
    with pytest.raises(UserError, match=r"holds a study already.*--resume"):
        study(recipe)
    started = StudyDirectory.of(recipe).read_recipe()
    assert started.data.template_date == date.today()
    # all cells have the date of its start, also those that a later day starts
    monkeypatch.setattr("raydiv.runs.resume.date", SimpleNamespace(today=lambda: date(2126, 1, 31)))
    with pytest.raises(KeyboardInterrupt):
        study(recipe, resume=True)
    assert StudyDirectory.of(recipe).read_recipe() == started
    (cell,) = StudyGrid.of(started).cells
    assert cell.recipe.data.template_date == started.data.template_date


def test_a_finished_cell_has_the_date_that_its_recipe_leaves_open(tmp_path: Path) -> None:
    (cell,) = cells_of({"losses": ["kldo"]})
    dated = load_recipe(cell.recipe.model_dump(by_alias=True), ["data.template_date=2026-01-31"])
    run = finished_run(tmp_path / "runs" / "dated", dated)
    require_same_recipe(cell.recipe, run)
    recipe = recipe_with({"losses": ["kldo"], "include": [str(tmp_path / "runs")]})
    (included,) = included_cells(recipe).values()
    assert (included.data, included.loss) == (cell.data, cell.loss)
    other = load_recipe(cell.recipe.model_dump(by_alias=True), ["data.template_date=2026-02-01"])
    with pytest.raises(UserError, match=r"data\.template_date"):
        require_same_recipe(other, run)


@pytest.mark.slow
@pytest.mark.long
def test_a_small_study_is_run_extended_and_read_from_mlflow(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    overrides = [
        f"separation.prompts={files['prompts']}",
        "optim.steps=2",
        "cluster.num_workers=1",
        "batch.tokens_per_microbatch=auto",
        "data.train=train.jsonl",
    ]
    losses = "study.losses={KLDO: {type: kldo, skew: 0.5}, FATAL: {type: dpo, optim.lr: 1.0e+20}}"
    recipe = recipe_of(tiny_model, files, tmp_path / "out", "grid", *overrides, losses)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    command = ["study", str(tmp_path / "recipe.yaml"), "--json"]
    with ray_session(ClusterConfig(), dashboard=True):
        assert main(command) == 0
        record = json.loads(capsys.readouterr().out)
        assert [cell["loss"] for cell in record["cells"]] == ["none", "KLDO"]
        ((name, error),) = record["failures"].items()
        assert "FATAL" in name
        assert "not finite" in error
        directory = StudyDirectory.of(recipe)
        (result,) = directory.cells.glob("*KLDO-0/result.json")
        modified = result.stat().st_mtime_ns
        assert main(command) == 2
        assert "--resume" in capsys.readouterr().err
        (directory.tables / "a-against-b.csv").write_text("of an earlier grid")
        wider = "study.losses={FATAL: null, DPO: dpo}"
        assert main([*command, "--resume", wider]) == 0
        record = json.loads(capsys.readouterr().out)
    assert [cell["loss"] for cell in record["cells"]] == ["none", "KLDO", "DPO"]
    assert record["failures"] == {}
    assert result.stat().st_mtime_ns == modified
    written = {path.name for path in directory.tables.iterdir()}
    assert {"cells.md", "cells.csv"} <= written
    assert "a-against-b.csv" not in written
    assert "src=" not in directory.report.read_text()
    by_mlflow = recipe_of(
        tiny_model, files, tmp_path / "other", "more", *overrides, "study.include=['mlflow:raydiv']",
        f"track.uri=sqlite:///{tmp_path / 'out' / 'mlflow.db'}",
    )  # fmt: skip
    cells = {cell.loss: cell for cell in study(by_mlflow).cells}
    original = {cell["loss"]: cell for cell in record["cells"]}
    assert cells["dpo_sft"].metrics == original["DPO"]["metrics"]
    assert cells["kldo_sft"].before == original["KLDO"]["before"]
