"""raydiv submit: what is uploaded and what never is, and whole jobs on a Ray of this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import requests
import yaml
from ray.job_submission import JobStatus as RayJobStatus

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
    """A folder with a recipe that extends another, its data, and files that must not be uploaded."""
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
    with make_bundle(["train", recipe, *overrides, *words], recipe, overrides, leaves_a_run=True) as bundle:
        return bundle.files


@pytest.mark.usefixtures("project")
def test_the_model_of_rewards_is_uploaded() -> None:
    assert "saved/part.arrow" in files_of("loss.position={kind: rewarded, model: saved, temperature: 1}")


@pytest.mark.usefixtures("project")
def test_a_recipe_is_uploaded_with_what_it_extends_and_the_files_that_it_names() -> None:
    recipe, overrides = "recipes/mine.yaml", ["optim.lr=0.5", "data.eval=/shared/eval.jsonl"]
    overrides.append("loss.position={kind: rewarded, model: /shared/dpo, temperature: 1}")
    words = ["train", recipe, *overrides, "--resume"]
    with make_bundle(words, recipe, overrides, leaves_a_run=True) as bundle:
        assert bundle.files.keys() == {"recipe.yaml", "data/train.jsonl"}
        assert bundle.command == ["train", "recipe.yaml", "--resume"]
        assert bundle.remote_paths == ["/shared/dpo", "/shared/eval.jsonl"]
        assert load_recipe(bundle.folder / "recipe.yaml") == load_recipe(recipe, overrides)
        # as written: a default must not be fixed where a sweep changes the key
        assert "beta" not in yaml.safe_load((bundle.folder / "recipe.yaml").read_text())["loss"]
        folder = bundle.folder
    assert not folder.exists()


@pytest.mark.usefixtures("project")
def test_a_folder_is_uploaded_without_secrets_caches_runs_and_links_that_lead_out() -> None:
    assert files_of("data.eval=saved").keys() == {"recipe.yaml", "data/train.jsonl", "saved/part.arrow"}


@pytest.mark.usefixtures("project")
def test_files_that_an_argument_names_are_uploaded() -> None:
    with make_bundle(["evaluate", "org/name", "--prompts", "data/train.jsonl"], None, [], leaves_a_run=False) as bundle:
        assert bundle.files.keys() == {"data/train.jsonl"}
        assert bundle.command == ["evaluate", "org/name", "--prompts", "data/train.jsonl"]


def bundle_of(*words: str, recipe: str | None = None, overrides: tuple[str, ...] = ()) -> bundles.JobBundle:
    """The bundle of a command that leaves no run; its folder is deleted."""
    with make_bundle(words, recipe, overrides, leaves_a_run=False) as bundle:
        return bundle


@pytest.mark.usefixtures("project")
def test_a_recipe_that_extends_a_bundled_one_is_uploaded_merged() -> None:
    Path("small.yaml").write_text("extends: bundled:quickstart\nname: small\noutput_dir: /shared/runs\n")
    with make_bundle(["train", "small.yaml"], "small.yaml", [], leaves_a_run=True) as bundle:
        assert bundle.files.keys() == {"recipe.yaml"}
        uploaded = yaml.safe_load((bundle.folder / "recipe.yaml").read_text())
        assert "extends" not in uploaded
        assert load_recipe(bundle.folder / "recipe.yaml") == load_recipe("small.yaml") == bundle.recipe


@pytest.mark.usefixtures("project")
def test_overrides_stay_in_a_command_that_has_no_recipe() -> None:
    Path("ask.jinja").write_text("{{ messages }}")
    words = ("data", "check", "data/train.jsonl", "data.columns.prompt=q", "data.template=ask.jinja")
    bundle = bundle_of(*words, overrides=words[3:])
    assert bundle.command == list(words)
    assert bundle.files.keys() == {"data/train.jsonl", "ask.jinja"}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("words", "uploaded"),
    [
        (["--recipe", "recipes/mine.yaml"], ["--recipe", "recipe.yaml"]),
        (["--recipe=recipes/mine.yaml"], ["--recipe=recipe.yaml"]),
    ],
)
def test_a_recipe_is_renamed_in_both_forms_of_the_option(words: list[str], uploaded: list[str]) -> None:
    Path("recipe.yaml").write_text("another: recipe")
    command = ("data", "check", "data/train.jsonl", *words, "optim.lr=1")
    bundle = bundle_of(*command, recipe="recipes/mine.yaml", overrides=command[-1:])
    assert bundle.command == ["data", "check", "data/train.jsonl", *uploaded]
    assert bundle.files.keys() == {"data/train.jsonl", "recipe.yaml"}


@pytest.mark.usefixtures("project")
def test_the_files_that_a_pattern_matches_are_uploaded() -> None:
    for name in ("data/more.jsonl", "data/notes.md", "data/deep/most.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}\n")
    both = {"data/train.jsonl", "data/more.jsonl"}
    assert files_of("data.eval=data/*.jsonl").keys() == both | {"recipe.yaml"}
    assert bundle_of("data", "check", "data/*").files.keys() == both
    assert bundle_of("data", "check", "data/**").files.keys() == both | {"data/deep/most.jsonl"}
    assert not bundle_of("evaluate", "org/name", "--template", "{{ messages[0] }} *?").files
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
def test_files_inside_a_word_are_uploaded(words: tuple[str, ...]) -> None:
    assert bundle_of(*words).files.keys() == {"data/train.jsonl"}


@pytest.mark.usefixtures("project")
def test_a_models_directory_is_found_behind_its_prefix() -> None:
    assert bundle_of("data", "build", "--worse", "model:saved").files.keys() == {"saved/part.arrow"}
    assert "saved/part.arrow" in files_of("evaluate.judge=harmbench:saved")
    assert bundle_of("data", "build", "--worse", "model:/shared/model").remote_paths == ["/shared/model"]


@pytest.mark.usefixtures("project")
def test_choices_of_options_are_not_paths() -> None:
    for folder in ("check", "trl"):
        shutil.copytree("data", folder)
    recipe, words = "recipes/mine.yaml", ("--part", "data", "--against=trl")
    assert bundle_of("data", "check", "org/name").files == {}
    bundle = bundle_of("bench", recipe, *words, recipe=recipe, overrides=())
    assert bundle.files.keys() == {"recipe.yaml", "data/train.jsonl"}
    Path("data/more.jsonl").touch()
    assert "data/more.jsonl" not in bundle_of("bench", recipe, *words, recipe=recipe).files


def test_choice_options_are_those_of_the_parser() -> None:
    def with_choices(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from with_choices(inner)
            elif action.choices is not None:
                yield from action.option_strings

    assert set(with_choices(make_parser())) == set(bundles.CHOICE_OPTIONS)


SECRET_NAMES = [
    *(".env", ".env.local", ".envrc", ".netrc", ".npmrc", ".pypirc", "id_rsa", "id_ecdsa.old", "id_ed25519"),
    *("server.PEM", "my.key", "store.p12", "store.pfx", "aws-Credentials", "secrets.yaml", "my_secret.txt"),
    *("OpenAI_API_KEY.txt", "auth_token", "token", "hf.token", "HF_TOKEN"),
]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("name", SECRET_NAMES)
def test_files_with_names_of_secrets_are_not_uploaded(name: str) -> None:
    Path("saved", name).write_text("planted")
    bundle = bundle_of("data", "check", "saved")
    assert bundle.files.keys() == {"saved/part.arrow"}
    assert set(bundle.secrets) == {"saved/.env", f"saved/{name}"}
    with pytest.raises(UserError, match="looks like a secret"):
        bundle_of("data", "check", f"saved/{name}")


@pytest.mark.usefixtures("project")
def test_a_link_to_a_secret_is_not_uploaded() -> None:
    Path("saved/plain.jsonl").symlink_to(Path("deploy.pem").absolute())
    assert "saved/plain.jsonl" in bundle_of("data", "check", "saved").secrets
    with pytest.raises(UserError, match="looks like a secret"):
        bundle_of("data", "check", "saved/plain.jsonl")


@pytest.mark.usefixtures("project")
def test_names_that_only_resemble_secrets_are_uploaded() -> None:
    for name in ("tokens.jsonl", "tokenizer.json", "keys.csv", "environment.json"):
        Path("saved", name).write_text("{}")
    bundle = bundle_of("data", "check", "saved")
    assert len(bundle.files) == 5
    assert bundle.secrets == ["saved/.env"]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("beside", ["", "runs/mlflow.db"])
def test_finished_runs_are_not_uploaded(beside: str) -> None:
    shutil.copytree("saved/old-run", "runs/old-run")
    if beside:
        Path(beside).touch()
    with pytest.raises(UserError, match=r"study\.include\.0: .* runs .*finished runs.*absolute path"):
        files_of("study={include: [runs]}")


@pytest.mark.usefixtures("project")
def test_a_folder_without_a_file_to_upload_is_refused() -> None:
    Path("empty/__pycache__").mkdir(parents=True)
    Path("empty/__pycache__/x.pyc").touch()
    with pytest.raises(UserError, match=r"data\.eval: .* empty .*finished runs"):
        files_of("data.eval=empty")


@pytest.mark.usefixtures("project")
def test_the_name_of_a_loss_is_not_a_path() -> None:
    shutil.copytree("saved/old-run", "kldo/old-run")
    assert files_of("loss.type=kldo").keys() == {"recipe.yaml", "data/train.jsonl"}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=runs", "output_dir: runs is relative"),
        ("checkpoint.storage=kept", r"checkpoint\.storage: kept is relative"),
        ("data.eval=../outside.jsonl", r"data\.eval: \.\./outside\.jsonl is not in this folder"),
        ("data.eval=saved/link/outside.jsonl", "is not in this folder"),
        ("data.eval=deploy.pem", "looks like a secret"),
        ("optim.stepz=1", r"optim\.stepz: unknown key"),
        ("track.uri=http://me:word@host", "has a password"),
    ],
)
def test_what_cannot_be_uploaded_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        files_of(override)


@pytest.mark.usefixtures("project")
def test_files_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_BUNDLE_BYTES", 2**20)
    Path("large.jsonl").write_bytes(bytes(3 * 2**20))
    with pytest.raises(UserError, match=r"3 MiB \(large\.jsonl: 3\).* 1 .*s3://"):
        files_of("data.eval=large.jsonl")


def test_variables_are_those_of_the_options_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert job_variables(["NCCL_DEBUG", "RAYDIV_CACHE=s3://b/c", "X=a=b"]) == {
        "NCCL_DEBUG": "INFO",
        "RAYDIV_CACHE": "s3://b/c",
        "X": "a=b",
    }
    for option, message in {
        "HF_TOKEN=hf_planted": "--env HF_TOKEN: .*secret",
        "aws_secret_access_key=planted": "--env aws_secret_access_key: .*looks like a secret",
        "MLFLOW_TRACKING_URI=http://me:planted@host": "--env MLFLOW_TRACKING_URI: .*secret",
        "LOGIN=hf_plantedplantedplanted": "--env LOGIN: .*secret",
        "NOT_SET_ANYWHERE": "--env NOT_SET_ANYWHERE=VALUE",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            job_variables([option])
        assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "mapping"),
        ("working_dir: .", "working_dir: not supported"),
        ("env_vars: {WANDB_API_KEY: planted}", r"env_vars\.WANDB_API_KEY: .*looks like a secret"),
        ("env_vars: {LOGIN: ghp_plantedplantedplanted}", r"env_vars\.LOGIN: .*looks like a secret"),
        ("a: {", "cannot be read"),
    ],
)
def test_the_users_runtime_environment_is_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "env.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_runtime_environment(path)
    assert "planted" not in str(caught.value)


@pytest.mark.usefixtures("project")
def test_this_raydiv_is_uploaded(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("pip: [einops]\nenv_vars: {A: 1, B: 2}\npy_modules: [s3://b/m.zip]")
    with make_bundle(["losses"], None, [], leaves_a_run=False) as bundle:
        environment = runtime_environment(bundle, {"B": "3"}, read_runtime_environment(path))
    raydiv, other = environment.pop("py_modules")
    assert (Path(raydiv) / "cli" / "submit.py").is_file()
    assert other == "s3://b/m.zip"
    assert environment == {
        "pip": ["einops"],
        "working_dir": str(bundle.folder),
        "env_vars": {"PYTHONUNBUFFERED": "1", "A": "1", "B": "3"},
    }


def test_the_option_overrides_the_environment_and_that_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://env")
    assert address_of("http://flag", "http://recipe") == "http://flag"
    assert address_of(None, "http://recipe") == "http://env"
    monkeypatch.delenv("RAY_ADDRESS")
    assert address_of(None, "http://recipe") == "http://recipe"
    with pytest.raises(UserError, match=r"--address .*RAY_ADDRESS.*cluster\.address"):
        address_of(None, None)


# ---- the log


class FakeClient:
    """Sends a log piece by piece. Each connection is lost after the next number of ``lost_after``; the job then ends.

    ``errors`` are raised one after another by ``list_jobs``.
    """

    def __init__(self, pieces: list[str], lost_after: list[int], errors: Sequence[Exception] = ()) -> None:
        self.pieces, self.lost_after, self.errors = pieces, lost_after, list(errors)
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
        if self.errors:
            raise self.errors.pop(0)
        ended = not self.lost_after
        return [
            SimpleNamespace(
                submission_id="id",
                metadata={"raydiv.name": "n"},
                status=RayJobStatus.FAILED if ended else RayJobStatus.RUNNING,
                driver_exit_code=2 if ended else None,
                message=None,
                entrypoint="e",
                start_time=1000,
                end_time=None,
            )
        ]


@pytest.mark.parametrize("lost_after", [[], [2], [0, 1, 3]])
def test_a_log_is_written_once_whatever_the_connection_does(
    lost_after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_api, "RETRY_S", 0)
    written: list[str] = []
    ended = jobs_of(FakeClient(PIECES, lost_after)).follow("id", written.append)
    assert "".join(written) == "one\ntwo\nthree\nfour"
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
def test_a_dashboard_may_be_out_for_a_while(
    lost: Exception, lost_after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_api, "RETRY_S", 0)
    client = FakeClient(PIECES, lost_after, [REFUSED, RuntimeError("status code 503"), ConnectionResetError()])
    client.lost = lost
    written: list[str] = []
    assert jobs_of(client).follow("id", written.append).exit_code == 2
    assert "".join(written) == "".join(PIECES)
    assert not client.errors


def test_the_end_of_a_log_is_fetched_after_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [REFUSED, REFUSED]

    class Ended(FakeClient):
        """The job has ended, and each connection to its log is lost."""

        async def tail_job_logs(self, job: str) -> Any:
            yield self.pieces[0]
            raise self.lost

        def get_job_logs(self, job: str) -> str:
            if errors:
                raise errors.pop()
            return super().get_job_logs(job)

    monkeypatch.setattr(job_api, "RETRY_S", 0)
    written: list[str] = []
    jobs_of(Ended(PIECES, [])).follow("id", written.append)
    assert "".join(written) == "".join(PIECES)


def test_a_long_outage_ends_the_following_and_says_how_to_resume_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_api, "RETRY_S", 0.01)
    monkeypatch.setattr(job_api, "MAX_OUTAGE_S", 0.1)
    client = FakeClient(PIECES, [0] * 1000, [REFUSED] * 1000)
    with pytest.raises(UserError, match=r"http://here: .* for 0 s: .*raydiv submit logs id"):
        jobs_of(client).follow("id", print)
    assert 1 < 1000 - len(client.errors) < 20


def test_a_cluster_with_an_old_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SimpleNamespace(_server_ray_version="2.40.0")
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: client)
    with pytest.raises(UserError, match=rf"http://here: .*2\.40\.0.*{job_api.MIN_RAY_VERSION}"):
        Jobs("http://here")
    client._server_ray_version = job_api.MIN_RAY_VERSION
    assert Jobs("http://here").address == "http://here"


def test_a_refused_token_ends_the_following_at_once() -> None:
    from ray.exceptions import AuthenticationError

    with pytest.raises(UserError, match=r"http://here: .*RAY_AUTH_TOKEN_PATH"):
        jobs_of(FakeClient(PIECES, [1], [AuthenticationError("no")])).follow("id", print)


def test_a_connection_without_messages_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FakeClient):
        async def tail_job_logs(self, job: str) -> Any:
            silent = bool(self.lost_after)
            for piece in self.pieces[: self.lost_after.pop(0) if silent else None]:
                yield piece
            await asyncio.sleep(60 if silent else 0)

    monkeypatch.setattr(job_api, "RETRY_S", 0)
    monkeypatch.setattr(job_api, "IDLE_TIMEOUT_S", 0.05)
    written: list[str] = []
    jobs_of(Silent(PIECES, [2, 3])).follow("id", written.append)
    assert "".join(written) == "".join(PIECES)


def test_an_error_of_write_is_not_taken_for_a_lost_connection() -> None:
    def write(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        jobs_of(FakeClient(PIECES, [])).follow("id", write)


@pytest.mark.parametrize("error", [REFUSED, ConnectionResetError(), aiohttp.ClientConnectionError()])
def test_an_unreachable_cluster_is_a_user_error(error: Exception) -> None:
    with pytest.raises(UserError, match="http://here: no Ray dashboard"):
        jobs_of(FakeClient(PIECES, [], [error])).all()


class Agentless:
    """A cluster that refuses the first ``tries`` submissions."""

    def __init__(self, tries: int, message: str) -> None:
        self.tries, self.message = tries, message

    def submit_job(self, **job: Any) -> str:
        self.tries -= 1
        if self.tries >= 0:
            raise RuntimeError(self.message)
        self.variables = job["runtime_env"]["env_vars"]
        return str(job["entrypoint"])


def test_a_stopped_job_has_time_for_a_checkpoint() -> None:
    client = Agentless(0, "")
    jobs_of(client).submit("e", {"env_vars": {"A": "1"}}, {})
    assert client.variables == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "A": "1"}


NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later.."


def test_submit_waits_for_the_agent_until_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
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
    ("words", "message"),
    [
        (["submit"], "-- and a command"),
        (["submit", "logs"], "-- and a command"),
        (["submit", "status", "a", "b"], "-- and a command"),
        (["submit", "--detach", "status", "a"], "--detach: does not apply to submit status"),
        (["submit", "--token-path", "/nowhere", "status"], "no such file"),
        (["submit", "--", "submit", "status"], "cannot be submit itself"),
        (["submit", "status", "--", "losses"], "status: only options"),
        (["submit", "status"], "cluster.address"),
        (["submit", "--address", "http://127.0.0.1:9", "status"], "http://127.0.0.1:9: no Ray dashboard"),
        (["submit", "--", "quickstart"], "output_dir: runs is relative"),
        (["submit", "--", "export", "/shared/runs/mine", "out"], "DEST: out is relative"),
        (["submit", "--", "export", "runs/mine", "/shared/out"], "RUN: runs/mine is relative: finished runs"),
        (["submit", "--", "evaluate", "org/name", "--output", "out"], "--output: out is relative"),
        (["submit", "--", "separation", "org/name", "--embeddings=out"], "--embeddings: out is relative"),
        (
            ["submit", "--", "data", "build", *BUILT, "--output", "out"],
            "--output: out is relative",
        ),
    ],
)
def test_user_errors_of_the_command(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(words) == 2
    assert message in capsys.readouterr().err


class Cluster:
    """Jobs with one that runs."""

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
    """The options that submit a command to it."""
    monkeypatch.setattr("raydiv.commands.submit.Jobs", Cluster)
    return ["submit", "--address", "http://here", "--detach"]


def test_a_job_is_followed_only_where_its_command_is_the_same(
    cluster_with_a_job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*cluster_with_a_job, "--", "train", "recipes/mine.yaml"]) == 0
    assert "job running has this name and runs already" in capsys.readouterr().err
    assert main([*cluster_with_a_job, "--", "plan", "recipes/mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert "another command (train recipe.yaml --resume)" in error
    assert "raydiv submit stop running" in error
    assert "--name" in error
    assert main([*cluster_with_a_job, "--name", "other", "--", "plan", "recipes/mine.yaml"]) == 0
    assert "job new (other) was submitted" in capsys.readouterr().err


def test_secrets_that_are_not_uploaded_are_listed(
    cluster_with_a_job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*cluster_with_a_job, "--", "data", "check", "saved"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum("look like secrets" in line and line.endswith(": saved/.env") for line in lines) == 1


def test_output_options_are_those_of_the_parser() -> None:
    def path_options(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    yield from path_options(inner) if name != "submit" else ()
            elif action.type is Path:
                yield action.dest

    inputs = {"run", "baseline", "folder", "reuse", "read"}
    assert set(path_options(make_parser())) == inputs | submit_cli.OUTPUT_OPTIONS.keys()


def test_an_unknown_command_is_not_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["submit", "--", "tran", "recipe.yaml"])
    assert "invalid choice: 'tran'" in capsys.readouterr().err


# ---- whole jobs


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a local Ray that runs jobs, and finds this Python first.

    The port of Ray's job agents belongs to another program.
    """
    import ray
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    from raydiv.config.cluster import ClusterConfig
    from raydiv.runtime.session import ray_session

    with pytest.MonkeyPatch.context() as patch, closing(socket.socket()) as other:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with suppress(OSError):  # it is another Ray's
            other.bind(("127.0.0.1", DEFAULT_DASHBOARD_AGENT_LISTEN_PORT))
            other.listen()
        with ray_session(ClusterConfig(), dashboard=True):
            yield ray.get_runtime_context().gcs_address


@pytest.mark.long
def test_a_job_is_submitted_followed_stopped_and_resumed(
    cluster: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "project"
    home.mkdir()
    files = {name: str(Path(path).relative_to(home)) for name, path in write_files(home).items()}
    recipe = recipe_of(tiny_model, files, tmp_path / "runs", "sent", "optim.steps=100000", "checkpoint.every=null")
    save_recipe(recipe, home / "mine.yaml")
    monkeypatch.chdir(home)
    run = RunDirectory.of(recipe)
    submit = ["submit", "--address", cluster, "--env", "RAYDIV_CACHE"]

    assert main([*submit, "--detach", "--", "train", "mine.yaml"]) == 0
    printed = capsys.readouterr()
    job = printed.out.strip()
    assert "uploaded: 3 files" in printed.err
    assert f"raydiv submit stop {job}" in printed.err
    wait_for_step(run, 3)
    assert main([*submit, "--detach", "--", "train", "mine.yaml"]) == 0
    assert f"job {job} has this name and runs already" in capsys.readouterr().err
    assert main(["submit", "--address", cluster, "stop", "sent"]) == 0
    capsys.readouterr()
    assert main(["submit", "--address", cluster, "logs", job]) == 143
    assert "--resume" in capsys.readouterr().out
    stopped = run.metrics.steps_taken()
    assert run.checkpoints(recipe).folder_names() == [f"step-{stopped:08d}"]
    assert main(["submit", "--address", cluster, "status", "sent", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 143

    # a job of the same name resumes the run; another recipe is refused
    assert main([*submit, "--", "train", "mine.yaml", "optim.lr=0.5"]) == 2
    assert "another recipe" in capsys.readouterr().out
    assert main([*submit, "--detach", "--", "train", "mine.yaml"]) == 0
    wait_for_step(run, stopped + 1)
    capsys.readouterr()
    assert main(["submit", "--address", cluster, "stop", "sent"]) == 0
    assert main(["submit", "--address", cluster, "logs", "sent"]) == 143
    assert f"training resumes after step {stopped}" in capsys.readouterr().out
    assert main(["submit", "--address", cluster, "status"]) == 0
    assert capsys.readouterr().out.count("STOPPED") == 2


@pytest.mark.long
def test_a_missing_module_on_the_cluster_is_named(
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
    printed = capsys.readouterr()
    assert "ModuleNotFoundError" in printed.out
    assert "the cluster's Python has no nowhere_to_be_had" in printed.err


@pytest.mark.long
def test_a_job_of_rays_own_command(
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
    for _ in range(20):  # a new cluster has no job agent yet
        ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
        if "No available agent" not in ended.stderr:
            break
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert RunDirectory.of(recipe).result.is_file()


@pytest.mark.long
def test_the_cells_of_a_submitted_study_have_its_uploaded_files(
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
    (study,) = [job for job in jobs if job.metadata and job.metadata.get("raydiv.name") == "many"]
    (cell_job,) = [job for job in jobs if job.metadata and job.metadata.get("raydiv.run") == str(cell.parent)]
    for key in ("working_dir", "py_modules"):
        assert cell_job.runtime_env[key] == study.runtime_env[key]
