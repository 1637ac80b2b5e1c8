"""A command as a Ray job: what goes with it and what never does, and whole jobs on a Ray of this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import requests
import yaml

from helpers.runs import wait_for_step
from helpers.small_run import recipe_of, write_files
from raydiv.cli import main
from raydiv.cli import submit as submit_cli
from raydiv.cli.main import make_parser
from raydiv.config import load_recipe, save_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.submit import bundle as bundles
from raydiv.runtime.submit import jobs as job_api
from raydiv.runtime.submit.bundle import make_bundle
from raydiv.runtime.submit.environment import job_variables, read_runtime_environment, runtime_environment
from raydiv.runtime.submit.jobs import Jobs, JobStatus, address_of
from raydiv.utils.errors import UserError


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
        "saved/.gitignore": "*",
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
    with make_bundle(["train", recipe, *overrides, *words], recipe, overrides, leaves_a_run=True) as found:
        return found.files


@pytest.mark.usefixtures("project")
def test_a_recipe_goes_with_what_it_extends_and_the_files_that_it_names() -> None:
    recipe, overrides = "recipes/mine.yaml", ["optim.lr=0.5", "data.eval=/shared/eval.jsonl"]
    words = ["train", recipe, *overrides, "--resume"]
    with make_bundle(words, recipe, overrides, leaves_a_run=True) as found:
        assert found.files.keys() == {"recipe.yaml", "data/train.jsonl"}
        assert found.command == ["train", "recipe.yaml", "--resume"]
        assert found.remote_paths == ["/shared/eval.jsonl"]
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
    with make_bundle(["evaluate", "org/name", "--prompts", "data/train.jsonl"], None, [], leaves_a_run=False) as found:
        assert found.files.keys() == {"data/train.jsonl"}
        assert found.command == ["evaluate", "org/name", "--prompts", "data/train.jsonl"]


def sent_of(*words: str, recipe: str | None = None, overrides: tuple[str, ...] = ()) -> bundles.JobBundle:
    """The bundle of a command that leaves no run; its folder is gone."""
    with make_bundle(words, recipe, overrides, leaves_a_run=False) as found:
        return found


@pytest.mark.usefixtures("project")
def test_a_recipe_that_extends_a_bundled_one_goes_whole() -> None:
    Path("small.yaml").write_text("extends: bundled:quickstart\nname: small\noutput_dir: /shared/runs\n")
    with make_bundle(["train", "small.yaml"], "small.yaml", [], leaves_a_run=True) as found:
        assert found.files.keys() == {"recipe.yaml"}
        sent = yaml.safe_load((found.folder / "recipe.yaml").read_text())
        assert "extends" not in sent
        assert load_recipe(found.folder / "recipe.yaml") == load_recipe("small.yaml") == found.recipe


@pytest.mark.usefixtures("project")
def test_overrides_stay_in_a_command_that_has_no_recipe() -> None:
    Path("ask.jinja").write_text("{{ messages }}")
    words = ("data", "check", "data/train.jsonl", "data.columns.prompt=q", "data.template=ask.jinja")
    found = sent_of(*words, overrides=words[3:])
    assert found.command == list(words)
    assert found.files.keys() == {"data/train.jsonl", "ask.jinja"}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("said", "there"),
    [
        (["--recipe", "recipes/mine.yaml"], ["--recipe", "recipe.yaml"]),
        (["--recipe=recipes/mine.yaml"], ["--recipe=recipe.yaml"]),
    ],
)
def test_a_recipe_is_renamed_however_it_is_said(said: list[str], there: list[str]) -> None:
    Path("recipe.yaml").write_text("another: recipe")
    words = ("data", "check", "data/train.jsonl", *said, "optim.lr=1")
    found = sent_of(*words, recipe="recipes/mine.yaml", overrides=words[-1:])
    assert found.command == ["data", "check", "data/train.jsonl", *there]
    assert found.files.keys() == {"data/train.jsonl", "recipe.yaml"}


@pytest.mark.usefixtures("project")
def test_what_a_pattern_matches_goes() -> None:
    for name in ("data/more.jsonl", "data/notes.md", "data/deep/most.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}\n")
    both = {"data/train.jsonl", "data/more.jsonl"}
    assert files_of("data.eval=data/*.jsonl").keys() == both | {"recipe.yaml"}
    assert sent_of("data", "check", "data/*").files.keys() == both
    assert sent_of("data", "check", "data/**").files.keys() == both | {"data/deep/most.jsonl"}
    assert not sent_of("evaluate", "org/name", "--template", "{{ messages[0] }} *?").files
    with pytest.raises(UserError, match="is not in this folder"):
        files_of("data.eval=../*.jsonl")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "words",
    [
        ("data", "check", "{path: data/train.jsonl, split: x}"),
        ("evaluate", "org/name", "--prompts={path: data/train.jsonl, columns: {prompt: q}}"),
        ("evaluate", "org/name", "--attack=templates=data/train.jsonl"),
    ],
)
def test_files_go_that_a_word_names_further_in(words: tuple[str, ...]) -> None:
    assert sent_of(*words).files.keys() == {"data/train.jsonl"}


@pytest.mark.usefixtures("project")
def test_the_directory_of_a_model_goes_behind_what_it_is_for() -> None:
    assert sent_of("data", "build", "--worse", "model:saved").files.keys() == {"saved/part.arrow"}
    assert "saved/part.arrow" in files_of("evaluate.judge=harmbench:saved")
    assert sent_of("data", "build", "--worse", "model:/shared/model").remote_paths == ["/shared/model"]


@pytest.mark.usefixtures("project")
def test_a_commands_own_words_are_no_names_of_files() -> None:
    for folder in ("check", "trl"):
        shutil.copytree("data", folder)
    recipe, words = "recipes/mine.yaml", ("--part", "data", "--against=trl")
    assert sent_of("data", "check", "org/name").files == {}
    found = sent_of("bench", recipe, *words, recipe=recipe, overrides=())
    assert found.files.keys() == {"recipe.yaml", "data/train.jsonl"}
    Path("data/more.jsonl").touch()
    assert "data/more.jsonl" not in sent_of("bench", recipe, *words, recipe=recipe).files


def test_the_options_with_words_of_their_own_are_the_parsers() -> None:
    def chosen(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from chosen(inner)
            elif action.choices is not None:
                yield from action.option_strings

    assert set(chosen(make_parser())) == set(bundles.CHOICE_OPTIONS)


SECRET_NAMES = [
    *(".env", ".env.local", ".envrc", ".netrc", ".npmrc", ".pypirc", "id_rsa", "id_ecdsa.old", "id_ed25519"),
    *("server.PEM", "my.key", "store.p12", "store.pfx", "aws-Credentials", "secrets.yaml", "my_secret.txt"),
    *("OpenAI_API_KEY.txt", "auth_token", "token", "hf.token", "HF_TOKEN"),
]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("name", SECRET_NAMES)
def test_files_with_names_of_secrets_go_nowhere(name: str) -> None:
    Path("saved", name).write_text("planted")
    found = sent_of("data", "check", "saved")
    assert found.files.keys() == {"saved/part.arrow"}
    assert set(found.secrets) == {"saved/.env", f"saved/{name}"}
    with pytest.raises(UserError, match="has the name of a secret"):
        sent_of("data", "check", f"saved/{name}")


@pytest.mark.usefixtures("project")
def test_a_link_to_a_secret_goes_nowhere() -> None:
    Path("saved/plain.jsonl").symlink_to(Path("deploy.pem").absolute())
    assert "saved/plain.jsonl" in sent_of("data", "check", "saved").secrets
    with pytest.raises(UserError, match="has the name of a secret"):
        sent_of("data", "check", "saved/plain.jsonl")


@pytest.mark.usefixtures("project")
def test_what_only_sounds_like_a_secret_goes() -> None:
    for name in ("tokens.jsonl", "tokenizer.json", "keys.csv", "environment.json"):
        Path("saved", name).write_text("{}")
    found = sent_of("data", "check", "saved")
    assert len(found.files) == 5
    assert found.secrets == ["saved/.env"]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("beside", ["", "runs/mlflow.db"])
def test_finished_runs_are_to_be_there_already(beside: str) -> None:
    shutil.copytree("saved/old-run", "runs/old-run")
    if beside:
        Path(beside).touch()
    with pytest.raises(UserError, match=r"study\.include\.0: .* runs .*finished runs do not go along.*absolute path"):
        files_of("study={include: [runs]}")


@pytest.mark.usefixtures("project")
def test_a_folder_of_which_nothing_is_left_is_refused() -> None:
    Path("empty/__pycache__").mkdir(parents=True)
    Path("empty/__pycache__/x.pyc").touch()
    with pytest.raises(UserError, match=r"data\.eval: nothing .* of empty would be there"):
        files_of("data.eval=empty")


@pytest.mark.usefixtures("project")
def test_the_name_of_a_loss_is_none_of_a_folder() -> None:
    shutil.copytree("saved/old-run", "kldo/old-run")
    assert files_of("loss.type=kldo").keys() == {"recipe.yaml", "data/train.jsonl"}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output_dir=runs", "output_dir: runs is relative"),
        ("checkpoint.storage=kept", r"checkpoint\.storage: kept is relative"),
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
    assert job_variables(["NCCL_DEBUG", "RAYDIV_CACHE=s3://b/c", "X=a=b"]) == {
        "NCCL_DEBUG": "INFO",
        "RAYDIV_CACHE": "s3://b/c",
        "X": "a=b",
    }
    for named, said in {
        "HF_TOKEN=hf_planted": "is a secret",
        "aws_secret_access_key=planted": "is a secret",
        "MLFLOW_TRACKING_URI=http://me:planted@host": "is a secret",
        "LOGIN=hf_plantedplantedplanted": "is a secret",
        "NOT_SET_ANYWHERE": "is not set here",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            job_variables([named])
        assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]", "is no mapping"),
        ("working_dir: .", "working_dir: the job's folder is made by raydiv"),
        ("env_vars: {WANDB_API_KEY: planted}", r"env_vars\.WANDB_API_KEY: is a secret"),
        ("env_vars: {LOGIN: ghp_plantedplantedplanted}", r"env_vars\.LOGIN: is a secret"),
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
def test_this_raydiv_goes_along(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("pip: [einops]\nenv_vars: {A: 1, B: 2}\npy_modules: [s3://b/m.zip]")
    with make_bundle(["losses"], None, [], leaves_a_run=False) as found:
        made = runtime_environment(found, {"B": "3"}, read_runtime_environment(path))
    own, other = made.pop("py_modules")
    assert (Path(own) / "cli" / "submit.py").is_file()
    assert other == "s3://b/m.zip"
    assert made == {
        "pip": ["einops"],
        "working_dir": str(found.folder),
        "env_vars": {"PYTHONUNBUFFERED": "1", "A": "1", "B": "3"},
    }


def test_the_flag_goes_before_the_environment_and_that_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://env")
    assert address_of("http://flag", "http://recipe") == "http://flag"
    assert address_of(None, "http://recipe") == "http://env"
    monkeypatch.delenv("RAY_ADDRESS")
    assert address_of(None, "http://recipe") == "http://recipe"
    with pytest.raises(UserError, match=r"--address .*RAY_ADDRESS.*cluster\.address"):
        address_of(None, None)


# ---- the log


class Client:
    """Gives a log piece by piece, and loses the connection on the way as often as it is told.

    ``away``: what is raised, one after another, where it is asked for the jobs.
    """

    def __init__(self, pieces: list[str], lost_after: list[int], away: Sequence[Exception] = ()) -> None:
        self.pieces, self.lost_after, self.away = pieces, lost_after, list(away)
        self.lost: Exception = RuntimeError("WebSocket connection closed unexpectedly")

    async def tail_job_logs(self, job: str) -> Any:
        stop = self.lost_after.pop(0) if self.lost_after else len(self.pieces)
        for piece in self.pieces[:stop]:
            yield piece
        if stop < len(self.pieces):
            raise self.lost

    def get_job_logs(self, job: str) -> str:
        return "".join(self.pieces)

    def list_jobs(self) -> list[Any]:
        if self.away:
            raise self.away.pop(0)
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
    monkeypatch.setattr(job_api, "RETRY_S", 0)
    said: list[str] = []
    ended = jobs_of(Client(PIECES, lost_after)).follow("id", said.append)
    assert "".join(said) == "one\ntwo\nthree\nfour"
    assert ended.exit_code == 2


PIECES = ["one\n", "two", "\nthree\n", "four"]


def jobs_of(client: Any) -> Jobs:
    jobs = Jobs.__new__(Jobs)
    jobs.address, jobs._client = "http://here", client
    return jobs


REFUSED = requests.exceptions.ConnectionError("Connection refused")


@pytest.mark.parametrize(
    "lost", [RuntimeError("closed"), aiohttp.ClientPayloadError(), aiohttp.ClientConnectionError()]
)
@pytest.mark.parametrize("lost_after", [[1], [1, 0, 3], [0, 0, 0]])
def test_a_cluster_may_be_away_for_a_while(
    lost: Exception, lost_after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_api, "RETRY_S", 0)
    client = Client(PIECES, lost_after, [REFUSED, RuntimeError("status code 503"), ConnectionResetError()])
    client.lost = lost
    said: list[str] = []
    assert jobs_of(client).follow("id", said.append).exit_code == 2
    assert "".join(said) == "".join(PIECES)
    assert not client.away


def test_the_end_of_a_log_may_be_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Exception] = [REFUSED, REFUSED]

    class Ended(Client):
        """Ended, and no connection to its log holds."""

        async def tail_job_logs(self, job: str) -> Any:
            yield self.pieces[0]
            raise self.lost

        def get_job_logs(self, job: str) -> str:
            if late:
                raise late.pop()
            return super().get_job_logs(job)

    monkeypatch.setattr(job_api, "RETRY_S", 0)
    said: list[str] = []
    jobs_of(Ended(PIECES, [])).follow("id", said.append)
    assert "".join(said) == "".join(PIECES)


def test_a_cluster_that_stays_away_is_given_up_with_how_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_api, "RETRY_S", 0.01)
    monkeypatch.setattr(job_api, "MAX_OUTAGE_S", 0.1)
    client = Client(PIECES, [0] * 1000, [REFUSED] * 1000)
    with pytest.raises(UserError, match=r"http://here: .* for 0 s: .*raydiv submit logs id"):
        jobs_of(client).follow("id", print)
    assert 1 < 1000 - len(client.away) < 20


def test_a_cluster_that_lets_nobody_in_is_left_at_once() -> None:
    from ray.exceptions import AuthenticationError

    with pytest.raises(UserError, match=r"http://here: .*RAY_AUTH_TOKEN_PATH"):
        jobs_of(Client(PIECES, [1], [AuthenticationError("no")])).follow("id", print)


def test_of_a_connection_that_died_in_its_sleep_nothing_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asleep(Client):
        async def tail_job_logs(self, job: str) -> Any:
            asleep = bool(self.lost_after)
            async for piece in _whole(self.pieces[: self.lost_after.pop(0) if asleep else None]):
                yield piece
            await asyncio.sleep(60 if asleep else 0)

    monkeypatch.setattr(job_api, "RETRY_S", 0)
    monkeypatch.setattr(job_api, "IDLE_TIMEOUT_S", 0.05)
    said: list[str] = []
    jobs_of(Asleep(PIECES, [2, 3])).follow("id", said.append)
    assert "".join(said) == "".join(PIECES)


async def _whole(pieces: list[str]) -> Any:
    for piece in pieces:
        yield piece


def test_where_nobody_reads_on_no_connection_is_blamed() -> None:
    def write(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        jobs_of(Client(PIECES, [])).follow("id", write)


@pytest.mark.parametrize("error", [REFUSED, ConnectionResetError(), aiohttp.ClientConnectionError()])
def test_a_cluster_that_is_away_is_said_in_one_line(error: Exception) -> None:
    with pytest.raises(UserError, match="http://here: no Ray dashboard"):
        jobs_of(Client(PIECES, [], [error])).all()


class Agentless:
    """A cluster whose agent is not there yet, or never will be."""

    def __init__(self, tries: int, said: str) -> None:
        self.tries, self.said = tries, said

    def submit_job(self, **job: Any) -> str:
        self.tries -= 1
        if self.tries >= 0:
            raise RuntimeError(self.said)
        self.variables = job["runtime_env"]["env_vars"]
        return str(job["entrypoint"])


def test_a_job_that_is_told_to_stop_has_time_for_a_checkpoint() -> None:
    client = Agentless(0, "")
    jobs_of(client).submit("e", {"env_vars": {"A": "1"}}, {})
    assert client.variables == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "A": "1"}


NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later.."


def test_a_job_waits_for_the_agent_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_api, "RETRY_S", 0)
    assert jobs_of(Agentless(3, NO_AGENT)).submit("e", {}, {}) == "e"
    with pytest.raises(RuntimeError, match="something else"):
        jobs_of(Agentless(3, "something else")).submit("e", {}, {})
    monkeypatch.setattr(job_api, "AGENT_TIMEOUT_S", -1)
    with pytest.raises(UserError, match="--dashboard-agent-listen-port"):
        jobs_of(Agentless(3, NO_AGENT)).submit("e", {}, {})


# ---- the command


BUILT = ("--harmful", "a", "--harmless", "b", "--kind", "preference")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit"], "-- and a command"),
        (["submit", "logs"], "-- and a command"),
        (["submit", "status", "a", "b"], "-- and a command"),
        (["submit", "--detach", "status", "a"], "--detach: does not apply to submit status"),
        (["submit", "--token-path", "/nowhere", "status"], "no such file"),
        (["submit", "--", "submit", "status"], "cannot be submit itself"),
        (["submit", "status", "--", "losses"], "stands before --"),
        (["submit", "status"], "cluster.address"),
        (["submit", "--address", "http://127.0.0.1:9", "status"], "http://127.0.0.1:9: no Ray dashboard"),
        (["submit", "--", "quickstart"], "output_dir: runs is relative"),
        (["submit", "--", "export", "/shared/runs/mine", "out"], "DEST: out is relative"),
        (["submit", "--", "export", "runs/mine", "/shared/out"], "RUN: runs/mine is relative: finished runs do not go"),
        (["submit", "--", "evaluate", "org/name", "--output", "out"], "--output: out is relative"),
        (["submit", "--", "separation", "org/name", "--embeddings=out"], "--embeddings: out is relative"),
        (
            ["submit", "--", "data", "build", *BUILT, "--output", "out"],
            "--output: out is relative",
        ),
    ],
)
def test_what_the_user_must_change(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(words) == 2
    assert said in capsys.readouterr().err


class Cluster:
    """Has one job that runs, and takes others."""

    def __init__(self, address: str) -> None:
        self.address = address

    def running(self, name: str) -> JobStatus | None:
        command = "train recipe.yaml --resume"
        return JobStatus("running", name, command, "RUNNING", "", None, 1.0, None) if name == "mine" else None

    def submit_command(self, name: str, words: list[str], environment: Any) -> str:
        return "new"

    def find(self, job: str) -> JobStatus:
        return JobStatus(job, "mine", "", "RUNNING", "", None, 1.0, None)


@pytest.fixture
def cluster_with_a_job(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that send a command to it."""
    monkeypatch.setattr("raydiv.commands.submit.Jobs", Cluster)
    return ["submit", "--address", "http://here", "--detach"]


def test_a_job_is_followed_only_where_its_command_is_the_same(
    cluster_with_a_job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*cluster_with_a_job, "--", "train", "recipes/mine.yaml"]) == 0
    assert "job running has this name and runs already" in capsys.readouterr().err
    assert main([*cluster_with_a_job, "--", "plan", "recipes/mine.yaml"]) == 2
    told = capsys.readouterr().err
    assert "job running (mine) has this name and runs another command (train recipe.yaml --resume)" in told
    assert "raydiv submit stop running" in told
    assert "--name" in told
    assert main([*cluster_with_a_job, "--name", "other", "--", "plan", "recipes/mine.yaml"]) == 0
    assert "job new (other) was submitted" in capsys.readouterr().err


def test_secrets_that_are_left_out_are_said(cluster_with_a_job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*cluster_with_a_job, "--", "data", "check", "saved"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum("look like secrets" in line and line.endswith(": saved/.env") for line in lines) == 1


def test_everything_that_commands_write_is_known() -> None:
    def written(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    yield from written(inner) if name != "submit" else ()
            elif action.type is Path:
                yield action.dest

    read = {"run", "baseline"}
    assert set(written(make_parser())) == read | submit_cli.OUTPUT_OPTIONS.keys()


def test_a_command_that_is_none_is_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["submit", "--", "tran", "recipe.yaml"])
    assert "invalid choice: 'tran'" in capsys.readouterr().err


# ---- whole jobs


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a local Ray that takes jobs, whose processes find this Python first."""
    import ray

    from raydiv.config.cluster import ClusterConfig
    from raydiv.runtime.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with ray_session(ClusterConfig(), dashboard=True):
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
    assert "uploaded: 3 files" in told.err
    assert f"raydiv submit stop {job}" in told.err
    wait_for_step(run, 3)
    assert main([*send, "--detach", "--", "train", "mine.yaml"]) == 0
    assert f"job {job} has this name and runs already" in capsys.readouterr().err
    assert main(["submit", "--address", cluster, "stop", "sent"]) == 0
    capsys.readouterr()
    assert main(["submit", "--address", cluster, "logs", job]) == 143
    assert "SIGTERM: a checkpoint is written" in capsys.readouterr().out
    stopped = run.metrics.steps_taken()
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


@pytest.mark.long
def test_a_study_that_is_sent_gives_its_cells_what_came_along(
    cluster: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.job_submission import JobSubmissionClient

    files = {name: str(Path(path).relative_to(tmp_path)) for name, path in write_files(tmp_path).items()}
    alone = ("cluster.num_workers=1", "engine.zero_stage=0", "optim.steps=1", "study.losses=[dpo]")
    save_recipe(recipe_of(tiny_model, files, tmp_path / "runs", "many", *alone), tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--address", cluster, "--env", "RAYDIV_CACHE", "--", "study", "mine.yaml"]) == 0, (
        capsys.readouterr()
    )
    (cell,) = (tmp_path / "runs" / "many" / "cells").glob("*/result.json")
    jobs = JobSubmissionClient(cluster).list_jobs()
    (sent,) = [job for job in jobs if job.metadata and job.metadata.get("raydiv.name") == "many"]
    (own,) = [job for job in jobs if job.metadata and job.metadata.get("raydiv.run") == str(cell.parent)]
    for what in ("working_dir", "py_modules"):
        assert own.runtime_env[what] == sent.runtime_env[what]
