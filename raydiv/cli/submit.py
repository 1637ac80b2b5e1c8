"""``raydiv submit``: submit a command as a Ray job, and list, follow and stop submitted jobs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydiv.cli.output import add_command, add_reports, print_report, print_table, write_result
from raydiv.utils.errors import UserError

if TYPE_CHECKING:
    from raydiv.runtime.submit.bundle import JobBundle
    from raydiv.runtime.submit.jobs import Jobs, JobStatus

OUTPUT_OPTIONS = {
    "output": "--output",
    "embeddings": "--embeddings",
    "destination": "DEST",
    "html": "--html",
    "page": "--page",
}
"""Options with a path that a command writes to, by their attribute of the parsed options."""


def add_submit_command(commands: Any) -> None:
    submit = add_command(
        commands,
        "submit",
        _submit,
        "submit -- COMMAND ...: run a command as a Ray job on a cluster, and follow its log",
    )
    submit.usage = (
        "raydiv submit [options] -- COMMAND ...\n       raydiv submit [options] {status [ID] | logs ID | stop ID}"
    )
    submit.add_argument(
        "action", nargs="*", metavar="status|logs|stop ID", help="show, follow or stop a job, by its id or name"
    )
    submit.add_argument(
        "--address", metavar="URL", help="http://HEAD:8265 (default: RAY_ADDRESS, then cluster.address)"
    )
    submit.add_argument(
        "--token-path", metavar="FILE", type=Path, help="the cluster's token (default: where Ray looks for it)"
    )
    submit.add_argument(
        "--name", help="name of the job; a job of the same name resumes the run (default: the recipe's name)"
    )
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable of the job, not a secret; may be repeated",
    )
    submit.add_argument(
        "--runtime-env", type=Path, metavar="FILE", help="more of Ray's runtime environment (a YAML file)"
    )
    submit.add_argument("--detach", action="store_true", help="do not follow the job's log")
    add_reports(submit)


def _submit(options: argparse.Namespace) -> int:
    if options.command is None:
        return _manage(options)
    if options.action:
        raise UserError(f"submit: {' '.join(options.action)}: only options are allowed before --")
    return _submit_command(options)


def _submit_command(options: argparse.Namespace) -> int:
    from raydiv.commands.submit import submit

    command = options.command
    _require_absolute(command)
    submission = submit(
        options.words,
        getattr(command, "recipe", None),
        getattr(command, "overrides", []),
        name=options.name,
        address=options.address,
        env=options.env,
        runtime_env=options.runtime_env,
        token_path=options.token_path,
    )
    jobs, job = submission.jobs, submission.job
    if submission.bundle is None:
        _log(f"job {job} has this name and runs already: nothing was submitted")
    else:
        _log_bundle(submission.bundle)
        _log(f"job {job} ({submission.name}) was submitted to {jobs.address}")
    if not options.detach:
        return _follow(options, jobs, job)
    _log(_next_commands(job))
    print_report(options, asdict(jobs.find(job)), lambda: print(job))
    return 0


def _require_absolute(command: argparse.Namespace) -> None:
    """Raise UserError where a command would write into the job's working directory, or read a run of this machine."""
    from raydiv.runtime.submit.bundle import NOT_UPLOADED, relative_path_error

    for name, option in OUTPUT_OPTIONS.items():
        path = getattr(command, name, None)
        if path is not None and not path.is_absolute():
            raise UserError(relative_path_error(option, str(path)))
    run = getattr(command, "run", None)
    if run is not None and not run.is_absolute():
        raise UserError(f"RUN: {run} is relative: {NOT_UPLOADED}")


def _log_bundle(bundle: JobBundle) -> None:
    names = ", ".join(sorted(bundle.files)[:5]) + (" ..." if len(bundle.files) > 5 else "")
    _log(f"uploaded: {len(bundle.files)} files ({sum(bundle.files.values()) / 2**10:.0f} KiB): {names}")
    if bundle.secrets:
        _log(f"not uploaded, because their names look like secrets: {', '.join(bundle.secrets)}")
    if bundle.remote_paths:
        _log(f"expected on the cluster: {', '.join(bundle.remote_paths)}")
    if "RAYDIV_CACHE" in os.environ:
        _log("RAYDIV_CACHE is set here; the job has it only with --env RAYDIV_CACHE")


def _next_commands(job: str) -> str:
    return f"the job keeps running: raydiv submit logs {job} follows its log, raydiv submit stop {job} stops it"


def _follow(options: argparse.Namespace, jobs: Jobs, job: str) -> int:
    """Print the log as it grows; returns the job's exit code. Ctrl-C ends the following, not the job."""
    from raydiv.commands.submit import missing_module

    try:
        ended = jobs.follow(job, sys.stderr.write if options.json else write_result)
    except KeyboardInterrupt:
        _log(f"\ndetached from job {job}: {_next_commands(job)}")
        return 130
    missing = missing_module(ended)
    if missing is not None:
        _log(
            f"the cluster's Python has no {missing}: install the packages of cluster/Dockerfile there, or list it "
            "under pip: in a file for --runtime-env"
        )
    if options.json:
        print_report(options, asdict(ended), lambda: None)
    return int(ended.exit_code or 0)


def _manage(options: argparse.Namespace) -> int:
    """``status``, ``logs`` and ``stop`` of submitted jobs."""
    from raydiv.commands.submit import jobs_at

    action, *names = options.action or [""]
    if action not in ("status", "logs", "stop") or len(names) > 1 or (action != "status" and not names):
        raise UserError("submit: needs -- and a command to submit, or status [ID], logs ID, stop ID")
    unused = {
        "--name": options.name,
        "--env": options.env,
        "--runtime-env": options.runtime_env,
        "--detach": options.detach,
    }
    for option, value in unused.items():
        if value:
            raise UserError(f"{option}: does not apply to submit {action}")
    jobs = jobs_at(options.address, token_path=options.token_path)
    if not names:
        return _list(options, jobs)
    job = jobs.find(names[0])
    if action == "logs":
        return _follow(options, jobs, job.id)
    if action == "stop" and job.exit_code is None:
        jobs.stop(job.id)
        _log(f"job {job.id} was asked to stop: a training run writes a checkpoint after its current step")
        job = jobs.find(job.id)
    print_report(options, asdict(job), lambda: _show(job))
    return 0


def _list(options: argparse.Namespace, jobs: Jobs) -> int:
    statuses = jobs.all()

    def show() -> None:
        rows = [(job.id, job.name, job.status, _time(job.started), job.command) for job in statuses]
        print_table(["job", "name", "status", "since", "command"], rows)

    print_report(options, [asdict(job) for job in statuses], show)
    return 0


def _show(job: JobStatus) -> None:
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


def _log(text: str) -> None:
    print(text, file=sys.stderr)
