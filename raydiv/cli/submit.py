"""``raydiv submit``: any command as a Ray job, and what has become of those that were sent."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from raydiv.cli.output import add_command, add_reports, print_report, print_table, write_result
from raydiv.utils.errors import UserError

if TYPE_CHECKING:
    from raydiv.runtime.submit.bundle import Bundle
    from raydiv.runtime.submit.jobs import Jobs, Standing

RESUMED = ("train", "sweep", "study")
"""Commands that go on where they were: sent again, a job does so."""

LEAVE_A_RUN = (*RESUMED, "bench")
"""Commands that write into the recipe's output_dir."""

WRITES = {"output": "--output", "embeddings": "--embeddings", "destination": "DEST"}
"""Where commands write what they find, by the names of their options."""


def add_submitting_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = add_command(
        commands, "submit", _submit, "submit -- COMMAND ...: the command as a Ray job on a cluster; follows its log"
    )
    submit.add_argument("about", nargs="*", metavar="status|logs|stop ID", help="of a job, by its id or name")
    submit.add_argument(
        "--address", metavar="URL", help="http://HEAD:8265 (default: RAY_ADDRESS, then cluster.address)"
    )
    submit.add_argument(
        "--token-path", metavar="FILE", type=Path, help="the cluster's token (default: as Ray finds it)"
    )
    submit.add_argument(
        "--name", help="of the job; one of the same name goes on where that was (default: the recipe's)"
    )
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable of the job, no secret; may be repeated",
    )
    submit.add_argument("--runtime-env", type=Path, metavar="FILE", help="more of Ray's runtime environment (YAML)")
    submit.add_argument("--detach", action="store_true", help="do not follow the job")
    add_reports(submit)


def _submit(options: argparse.Namespace) -> int:
    if options.token_path is not None:
        if not options.token_path.is_file():
            raise UserError(f"--token-path {options.token_path}: no such file")
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(options.token_path)}
    if options.sent is None:
        return _tell(options)
    if options.about:
        raise UserError(f"submit: {' '.join(options.about)} stands before --, where only options are meant")
    return _send(options)


def _send(options: argparse.Namespace) -> int:
    from raydiv.data.bundled import QUICKSTART
    from raydiv.runtime.submit.bundle import bundled
    from raydiv.runtime.submit.environment import environment, read_runtime_environment, runtime_environment
    from raydiv.runtime.submit.jobs import Jobs, address_of, command_of

    command, *rest = options.words
    if command == "submit":
        raise UserError("submit: sends a command, and no other submit")
    _require_there(options.sent)
    path, overrides = getattr(options.sent, "recipe", None), getattr(options.sent, "overrides", [])
    if command == "quickstart":  # is a run of a recipe that is here
        command, path, rest = "train", str(QUICKSTART), [str(QUICKSTART), *rest]
    variables, more = environment(options.env), read_runtime_environment(options.runtime_env)
    words = [command, *rest, *(["--resume"] if command in RESUMED and "--resume" not in rest else [])]
    with bundled(words, path, overrides, leaves_a_run=command in LEAVE_A_RUN) as bundle:
        recipe = bundle.recipe
        name = options.name or (recipe.name if recipe is not None else command)
        jobs = Jobs(address_of(options.address, recipe.cluster.address if recipe is not None else None))
        running = jobs.running(name)
        if running is None:
            _say_bundle(bundle)
            job = jobs.send(name, bundle.words, runtime_environment(bundle, variables, more))
            _say(f"job {job} ({name}) is sent to {jobs.address}")
        elif running.command != command_of(bundle.words):
            raise UserError(
                f"job {running.id} ({name}) has this name and runs another command ({running.command}): wait for it, end it "
                f"(raydiv submit stop {running.id}), or give this one a name of its own (--name)"
            )
        else:
            job = running.id
            _say(f"job {job} has this name and runs already: it is followed, and nothing is sent")
    if options.detach:
        _say(_how_on(job))
        print_report(options, asdict(jobs.find(job)), lambda: print(job))
        return 0
    return _follow(options, jobs, job)


def _require_there(sent: argparse.Namespace) -> None:
    """Raises UserError where a command would write into the job's own folder, or read a run that is here."""
    from raydiv.runtime.submit.bundle import STAYS, relative

    for name, option in WRITES.items():
        path = getattr(sent, name, None)
        if path is not None and not path.is_absolute():
            raise UserError(relative(option, str(path)))
    run = getattr(sent, "run", None)
    if run is not None and not run.is_absolute():
        raise UserError(f"RUN: {run} is relative: {STAYS}")


def _say_bundle(bundle: Bundle) -> None:
    names = ", ".join(sorted(bundle.files)[:5]) + (" ..." if len(bundle.files) > 5 else "")
    _say(f"with it go {len(bundle.files)} files ({sum(bundle.files.values()) / 2**10:.0f} KiB): {names}")
    if bundle.secrets:
        _say(f"left out, by their names secrets: {', '.join(bundle.secrets)}")
    if bundle.there:
        _say(f"the cluster is to have: {', '.join(bundle.there)}")
    if "RAYDIV_CACHE" in os.environ:
        _say("RAYDIV_CACHE is set here and the job does not have it unless --env names it")


def _how_on(job: str) -> str:
    return f"it goes on without us: raydiv submit logs {job} follows it, raydiv submit stop {job} ends it"


def _follow(options: argparse.Namespace, jobs: Jobs, job: str) -> int:
    """Its log as it comes, and its exit code. Ctrl-C leaves it alone."""
    try:
        found = jobs.follow(job, sys.stderr.write if options.json else write_result)
    except KeyboardInterrupt:
        _say(f"\ndetached from job {job}: {_how_on(job)}")
        return 130
    missing = re.search(r"No module named '([^']+)'", found.message) if found.exit_code else None
    if missing:
        _say(
            f"the cluster's Python has no {missing[1]}: install there what cluster/Dockerfile does, or name it under pip: in "
            "--runtime-env"
        )
    if options.json:
        print_report(options, asdict(found), lambda: None)
    return int(found.exit_code or 0)


def _tell(options: argparse.Namespace) -> int:
    """What has become of jobs."""
    from raydiv.runtime.submit.jobs import Jobs, address_of

    what, *wanted = options.about or [""]
    if what not in ("status", "logs", "stop") or len(wanted) > 1 or (what != "status" and not wanted):
        raise UserError("submit: -- and a command to send, or status [ID], logs ID, stop ID")
    given = {
        "--name": options.name,
        "--env": options.env,
        "--runtime-env": options.runtime_env,
        "--detach": options.detach,
    }
    for flag, value in given.items():
        if value:
            raise UserError(f"{flag}: means nothing with submit {what}")
    jobs = Jobs(address_of(options.address, None))
    if not wanted:
        return _all(options, jobs)
    found = jobs.find(wanted[0])
    if what == "logs":
        return _follow(options, jobs, found.id)
    if what == "stop" and found.exit_code is None:
        jobs.stop(found.id)
        _say(f"job {found.id} is told to stop: a run that trains writes a checkpoint after its step")
        found = jobs.find(found.id)
    print_report(options, asdict(found), lambda: _show(found))
    return 0


def _all(options: argparse.Namespace, jobs: Jobs) -> int:
    found = jobs.all()

    def show() -> None:
        rows = [(job.id, job.name, job.status, _time(job.started), job.command) for job in found]
        print_table(["job", "name", "status", "since", "command"], rows)

    print_report(options, [asdict(job) for job in found], show)
    return 0


def _show(job: Standing) -> None:
    lines = {
        "job": job.id,
        "name": job.name,
        "command": job.command,
        "status": job.status,
        "since": _time(job.started),
        "until": _time(job.ended),
        "exit code": "" if job.exit_code is None else str(job.exit_code),
        "message": job.message[-500:],
    }
    for name, text in lines.items():
        if text:
            print(f"{name:<10} {text}")


def _time(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr)
