"""A command as a Ray job: what goes with it and what never does, and whole jobs on a Ray of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from small_run import recipe_of, write_files
from test_kill import wait_for_step

from raydiv import session
from raydiv.cli import main
from raydiv.config import load_recipe, save_recipe
from raydiv.errors import UserError
from raydiv.run import RunDirectory
from raydiv.session import submitted
from raydiv.submission import bundle as bundles
from raydiv.submission.bundle import bundled
from raydiv.submission.environment import environment, read_runtime_environment, runtime_environment
from raydiv.submission.jobs import Jobs, address_of


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe that extends another, its data, and much that is nobody's business."""
    home = tmp_path / "project"
    for name, text in {
        "base.yaml": "model: {id: org/name}\noptim: {steps: 3}\noutput_dir: /shared/runs\n",
        "recipes/mine.yaml": "extends: ../base.yaml\nname: mine\nloss: {type: kldo}\ndata: {train: data/train.jsonl}\n",
        "data/train.jsonl": "{}\n",
        "saved/part.arrow": "rows",
        "saved/.env": "HF_TOKEN=planted",
        "saved/__pycache__/x.pyc": "x",
        "saved/old-run/recipe.yaml": "x",
        "saved/old-run/metrics.jsonl": "x",
        ".git/config": "x",
        "deploy.pem": "planted",
        "mine/readme": "a folder of the run's name",
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (tmp_path / "outside.jsonl").write_text("{}\n")
    (home / "saved" / "link").symlink_to(tmp_path)
    monkeypatch.chdir(home)
    return home


def files_of(*overrides: str, words: tuple[str, ...] = ()) -> dict[str, int]:
    recipe = "recipes/mine.yaml"
    with bundled(["train", recipe, *overrides, *words], recipe, overrides, leaves_a_run=True) as found:
        return found.files


@pytest.mark.usefixtures("project")
def test_a_recipe_goes_with_what_it_extends_and_the_files_that_it_names() -> None:
    recipe, overrides = "recipes/mine.yaml", ["optim.lr=0.5", "data.eval=/shared/eval.jsonl"]
    words = ["train", recipe, *overrides, "--resume"]
    with bundled(words, recipe, overrides, leaves_a_run=True) as found:
        assert found.files.keys() == {"recipe.yaml", "data/train.jsonl"}
        assert found.words == ["train", "recipe.yaml", "--resume"]
        assert found.there == ["/shared/eval.jsonl"]
        assert load_recipe(found.folder / "recipe.yaml") == load_recipe(recipe, overrides)
        # as it was written: what a sweep changes is not held to defaults that nobody said
        assert "beta" not in yaml.safe_load((found.folder / "recipe.yaml").read_text())["loss"]
        folder = found.folder
    assert not folder.exists()


@pytest.mark.usefixtures("project")
def test_a_folder_goes_without_secrets_caches_runs_and_links_that_lead_out() -> None:
    assert files_of("data.eval=saved").keys() == {"recipe.yaml", "data/train.jsonl", "saved/part.arrow"}


@pytest.mark.usefixtures("project")
def test_files_that_an_argument_names_go_too() -> None:
    with bundled(["evaluate", "org/name", "--prompts", "data/train.jsonl"], None, [], leaves_a_run=False) as found:
        assert found.files.keys() == {"data/train.jsonl"}
        assert found.words == ["evaluate", "org/name", "--prompts", "data/train.jsonl"]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output_dir=runs", "output_dir: runs is relative"),
        ("data.eval=../outside.jsonl", r"data\.eval: \.\./outside\.jsonl is not in this folder"),
        ("data.eval=saved/link/outside.jsonl", "is not in this folder"),
        ("data.eval=deploy.pem", "has the name of a secret"),
        ("optim.stepz=1", r"optim\.stepz: unknown key"),
        ("track.uri=http://me:word@host", "has a password"),
    ],
)
def test_what_does_not_go(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        files_of(override)


@pytest.mark.usefixtures("project")
def test_too_much_is_refused_with_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MOST_BYTES", 2**20)
    Path("large.jsonl").write_bytes(bytes(3 * 2**20))
    with pytest.raises(UserError, match=r"3 MiB of files .*\(large\.jsonl: 3\).*s3://"):
        files_of("data.eval=large.jsonl")


def test_variables_are_those_that_are_named_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert environment(["NCCL_DEBUG", "RAYDIV_CACHE=s3://b/c", "X=a=b"]) == {
        "NCCL_DEBUG": "INFO",
        "RAYDIV_CACHE": "s3://b/c",
        "X": "a=b",
    }
    for named, said in {
        "HF_TOKEN=hf_planted": "is a secret",
        "aws_secret_access_key=planted": "is a secret",
        "MLFLOW_TRACKING_URI=http://me:planted@host": "is a secret",
        "NOT_SET_ANYWHERE": "is not set here",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            environment([named])
        assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]", "is no mapping"),
        ("working_dir: .", "working_dir: the job's folder is made by raydiv"),
        ("env_vars: {WANDB_API_KEY: planted}", r"env_vars\.WANDB_API_KEY: is a secret"),
        ("a: {", "cannot be read"),
    ],
)
def test_a_runtime_environment_of_ones_own_is_checked(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "env.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_runtime_environment(path)
    assert "planted" not in str(caught.value)


@pytest.mark.usefixtures("project")
def test_this_raydiv_goes_along_and_a_job_has_time_for_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("pip: [einops]\nenv_vars: {A: 1, B: 2}\npy_modules: [s3://b/m.zip]")
    with bundled(["losses"], None, [], leaves_a_run=False) as found:
        made = runtime_environment(found, {"B": "3"}, read_runtime_environment(path))
    own, other = made.pop("py_modules")
    assert (Path(own) / "cli" / "submitting.py").is_file()
    assert other == "s3://b/m.zip"
    assert made == {
        "pip": ["einops"],
        "working_dir": str(found.folder),
        "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": "600", "A": "1", "B": "3"},
    }


def test_the_flag_goes_before_the_environment_and_that_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://env")
    assert address_of("http://flag", "http://recipe") == "http://flag"
    assert address_of(None, "http://recipe") == "http://env"
    monkeypatch.delenv("RAY_ADDRESS")
    assert address_of(None, "http://recipe") == "http://recipe"
    with pytest.raises(UserError, match="no cluster is named"):
        address_of(None, None)


# ---- the log


class Client:
    """Gives a log piece by piece, and loses the connection on the way as often as it is told."""

    def __init__(self, pieces: list[str], lost_after: list[int]) -> None:
        self.pieces, self.lost_after = pieces, lost_after

    async def tail_job_logs(self, job: str) -> Any:
        stop = self.lost_after.pop(0) if self.lost_after else len(self.pieces)
        for piece in self.pieces[:stop]:
            yield piece
        if stop < len(self.pieces):
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_logs(self, job: str) -> str:
        return "".join(self.pieces)

    def list_jobs(self) -> list[Any]:
        over = not self.lost_after
        status: Any = _Status("FAILED" if over else "RUNNING", over)
        return [
            SimpleNamespace(
                submission_id="id", metadata={"raydiv.name": "n"}, status=status, driver_exit_code=2 if over else None,
                message=None, entrypoint="e", start_time=1000, end_time=None,
            )
        ]  # fmt: skip


class _Status(str):
    __slots__ = ("_over",)

    def __new__(cls, text: str, over: bool) -> _Status:
        made = super().__new__(cls, text)
        made._over = over
        return made

    def is_terminal(self) -> bool:
        return self._over


@pytest.mark.parametrize("lost_after", [[], [2], [0, 1, 3]])
def test_a_log_is_handed_on_once_whatever_the_connection_does(
    lost_after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydiv.submission.jobs.AGAIN_S", 0)
    jobs = Jobs.__new__(Jobs)
    jobs.address, jobs._client = "http://here", Client(["one\n", "two", "\nthree\n", "four"], lost_after)
    said: list[str] = []
    ended = jobs.follow("id", said.append)
    assert "".join(said) == "one\ntwo\nthree\nfour"
    assert ended.exit_code == 2


class Agentless:
    """A cluster whose agent is not there yet, or never will be."""

    def __init__(self, tries: int, said: str) -> None:
        self.tries, self.said = tries, said

    def submit_job(self, **job: Any) -> str:
        self.tries -= 1
        if self.tries >= 0:
            raise RuntimeError(self.said)
        return str(job["entrypoint"])


NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later.."


def test_a_job_waits_for_the_agent_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "AGAIN_S", 0)
    assert submitted(Agentless(3, NO_AGENT), entrypoint="e") == "e"
    with pytest.raises(RuntimeError, match="something else"):
        submitted(Agentless(3, "something else"), entrypoint="e")
    monkeypatch.setattr(session, "YOUNG_S", -1)
    with pytest.raises(UserError, match="--dashboard-agent-listen-port"):
        submitted(Agentless(3, NO_AGENT), entrypoint="e")


# ---- the command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit"], "-- and a command"),
        (["submit", "logs"], "-- and a command"),
        (["submit", "status", "a", "b"], "-- and a command"),
        (["submit", "--detach", "status", "a"], "--detach: means nothing"),
        (["submit", "--token-path", "/nowhere", "status"], "no such file"),
        (["submit", "--", "submit", "status"], "no other submit"),
        (["submit", "status", "--", "losses"], "stands before --"),
        (["submit", "status"], "no cluster is named"),
        (["submit", "--address", "http://127.0.0.1:9", "status"], "no Ray dashboard answers there"),
        (["submit", "--", "quickstart"], "output_dir: runs is relative"),
    ],
)
def test_what_the_user_must_change(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_command_that_is_none_is_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["submit", "--", "tran", "recipe.yaml"])
    assert "invalid choice: 'tran'" in capsys.readouterr().err


# ---- whole jobs


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a local Ray that takes jobs, whose processes find this Python first."""
    import ray

    from raydiv.config.cluster import Cluster
    from raydiv.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with ray_session(Cluster(), dashboard=True):
            yield ray.get_runtime_context().gcs_address


@pytest.mark.long
def test_a_command_is_a_job_that_is_followed_stopped_and_gone_on_with(
    cluster: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "project"
    home.mkdir()
    files = {name: str(Path(path).relative_to(home)) for name, path in write_files(home).items()}
    recipe = recipe_of(tiny_model, files, tmp_path / "runs", "sent", "optim.steps=100000", "checkpoint.every=null")
    save_recipe(recipe, home / "mine.yaml")
    monkeypatch.chdir(home)
    run = RunDirectory.of(recipe)
    send = ["submit", "--address", cluster, "--env", "RAYDIV_CACHE"]

    assert main([*send, "--detach", "--", "train", "mine.yaml"]) == 0
    told = capsys.readouterr()
    job = told.out.strip()
    assert "with it go 3 files" in told.err
    assert f"raydiv submit stop {job} ends it" in told.err
    wait_for_step(run, 3)
    assert main([*send, "--detach", "--", "train", "mine.yaml"]) == 0
    assert f"job {job} has this name and runs already" in capsys.readouterr().err
    assert main(["submit", "--address", cluster, "stop", "sent"]) == 0
    capsys.readouterr()
    assert main(["submit", "--address", cluster, "logs", job]) == 143
    assert "SIGTERM: a checkpoint is written" in capsys.readouterr().out
    stopped = run.steps_taken()
    assert run.checkpoints(recipe).folders() == [f"step-{stopped:08d}"]
    assert main(["submit", "--address", cluster, "status", "sent", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 143

    # the same name again goes on, and is refused with another recipe
    assert main([*send, "--", "train", "mine.yaml", "optim.lr=0.5"]) == 2
    assert "another recipe" in capsys.readouterr().out
    assert main([*send, "--detach", "--", "train", "mine.yaml"]) == 0
    wait_for_step(run, stopped + 1)
    capsys.readouterr()
    assert main(["submit", "--address", cluster, "stop", "sent"]) == 0
    assert main(["submit", "--address", cluster, "logs", "sent"]) == 143
    assert f"training goes on after step {stopped}" in capsys.readouterr().out
    assert main(["submit", "--address", cluster, "status"]) == 0
    assert capsys.readouterr().out.count("STOPPED") == 2


@pytest.mark.long
def test_a_job_that_dies_at_an_import_says_what_is_missing(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env.yaml").write_text("env_vars: {PYTHONPATH: shadow}")
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "pydantic.py").write_text("import nowhere_to_be_had")
    monkeypatch.chdir(tmp_path)
    words = [
        "submit",
        "--address",
        cluster,
        "--runtime-env",
        "env.yaml",
        "--name",
        "dies",
        "--",
        "separation",
        "shadow",
    ]
    assert main(words) == 1
    told = capsys.readouterr()
    assert "ModuleNotFoundError" in told.out
    assert "the cluster's Python has no nowhere_to_be_had" in told.err


@pytest.mark.long
def test_rays_own_command_sends_one_too(
    cluster: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: str(Path(path).relative_to(tmp_path)) for name, path in write_files(tmp_path).items()}
    recipe = recipe_of(tiny_model, files, tmp_path / "runs", "plain")
    save_recipe(recipe, tmp_path / "mine.yaml")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    ray = Path(sys.executable).parent / "ray"
    words = [
        ray,
        "job",
        "submit",
        "--address",
        cluster,
        "--working-dir",
        tmp_path,
        "--",
        "raydiv",
        "train",
        "mine.yaml",
    ]
    for _ in range(20):  # a cluster that has just begun takes no jobs yet
        sent = subprocess.run(words, capture_output=True, text=True, timeout=300)
        if "No available agent" not in sent.stderr:
            break
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert RunDirectory.of(recipe).result.is_file()
