"""MLflow as a follower of the run directory. A server that cannot be reached costs a warning, never the run."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.runs.metrics_log import Metrics, numbers
from raydiv.utils.dotted import flatten
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.secrets import has_password, mask_password
from raydiv.utils.signals import Terminated
from raydiv.utils.storage import intact, read_json, require_inside, write_json

RUN_FILES = {"recipe.yaml", "metrics.jsonl", "result.json"}
"""The artifacts of a finished run from which a study reads its results."""

Warn = Callable[[str], None]

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0
"""Seconds after a failed request before the next one: the first time, and at most."""

END_SECONDS = 60.0
"""Seconds in which the end of a run sends what is left; the rest is sent by ``--resume``."""

BATCH_METRICS = 1000
"""Metrics that MLflow takes in one request."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of metrics.jsonl."""

    values: Mapping[str, float]
    step: int


def tracking_uri(recipe: Recipe) -> str:
    """``track.uri``, else MLFLOW_TRACKING_URI, else a SQLite file in ``output_dir``."""
    setting = recipe.track.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return setting or f"sqlite:///{recipe.output_path / 'mlflow.db'}"


def forwarded_uri(recipe: Recipe) -> str | None:
    """``tracking_uri`` for the recipes of the runs of a sweep or study.

    None where it has a password, which no recipe may hold; the runs then read it from the environment, as this process
    does.
    """
    uri = tracking_uri(recipe)
    return None if has_password(uri) else uri


class MlflowTracker:
    """One MLflow run: a new one, or an ``earlier`` one (``uri`` and ``run_id``) of the same server.

    A thread sends, so that nothing waits for the server or for the import of MLflow. What fails stays in a queue, in
    order, and is tried again after a pause that doubles each time, and once at the end: a server that accepts requests
    and never answers costs a bounded time. ``state_file`` notes what was sent, so that a later process continues there.
    """

    def __init__(
        self,
        recipe: Recipe,
        tags: Mapping[str, str],
        warn: Warn,
        earlier: Mapping[str, Any] | None = None,
        state_file: Path | None = None,
    ) -> None:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._address = tracking_uri(recipe)
        self.uri = mask_password(self._address)
        """The address without its password, for messages and files."""
        self._warn = warn
        self._warned = False
        self._queue: list[Callable[[], object] | _Line] = []
        self._pause, self._next_try = FIRST_PAUSE, 0.0
        self._run_id: str | None = None
        self._system_monitor: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._state_file = state_file
        if state_file is not None and state_file.exists():
            with intact(state_file):
                earlier = dict(read_json(state_file))
                earlier["lines"] = int(earlier.get("lines", 0))
        state = earlier if earlier is not None and earlier.get("uri") == self.uri else {}
        run_id = state.get("run_id")
        self.lines_sent = state.get("lines", 0)
        """Lines of metrics.jsonl that the server has."""
        self._lines_sent_is_exact = run_id is None
        self._submit(lambda: self._start(recipe, tags) if run_id is None else self._resume(run_id))

    @property
    def run_id(self) -> str | None:
        """MLflow's ID of the run; None while the server is away. Waits until every call so far was tried."""
        return self._thread.submit(lambda: self._run_id).result()

    def log_metrics(self, record: Metrics) -> None:
        """Log one line of metrics.jsonl."""
        step = int(record["step"])
        values = {_metric_name(name): float(value) for name, value in numbers(record).items() if name != "step"}
        self._submit(_Line(values, step))

    def log_artifact(self, path: Path) -> None:
        self._submit(lambda: self._client.log_artifact(self._run(), str(path)))

    def tag_children(self, tag: str, tags: Mapping[str, Mapping[str, str]]) -> None:
        """Give ``tags[value]`` to each run nested in this one whose ``tag`` has that value.

        Nested runs without an end are ended as killed, since their processes could not do so.
        """
        self._submit(lambda: self._tag_children(tag, tags))

    def finish(self, status: str = "FINISHED") -> bool:
        """End the run with ``status``; returns whether everything was sent, in at most END_SECONDS and one request."""
        self._submit(lambda: self._end(status))
        return self._thread.submit(self._send_last).result()

    @contextmanager
    def end_on_error(self) -> Iterator[None]:
        """End the run when the block raises: as killed after SIGTERM or Ctrl-C, as failed otherwise."""
        try:
            yield
        except (Terminated, KeyboardInterrupt):
            self.finish("KILLED")
            raise
        except BaseException:
            self.finish("FAILED")
            raise

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self._address)

    def _start(self, recipe: Recipe, tags: Mapping[str, str]) -> None:
        experiment = self._client.get_experiment_by_name(recipe.track.experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(recipe.track.experiment, artifact_location=self._artifacts(recipe))
        )
        if self._run_id is None:  # set where an earlier try created the run and failed after it
            self._run_id = self._client.create_run(
                experiment_id, run_name=recipe.name, tags={**tags, **recipe.track.tags}
            ).info.run_id
        from mlflow.entities import Param

        parameters = [
            Param(key, str(value)[:6000])
            for key, value in flatten(recipe.model_dump(mode="json", by_alias=True)).items()
        ]
        self._client.log_batch(self._run(), params=parameters)
        self._write_state()
        self._monitor_system()

    def _resume(self, run_id: str) -> None:
        """Continue the run of an earlier process."""
        self._client.update_run(run_id, "RUNNING")
        self._run_id = run_id
        self._monitor_system()

    def _monitor_system(self) -> None:
        """Log CPU, memory, disk, network and GPUs of this node, where MLflow's own variable enables it."""
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get() and self._system_monitor is None:
            self._system_monitor = SystemMetricsMonitor(self._run(), resume_logging=True, tracking_uri=self._address)
            self._system_monitor.start()

    def _end(self, status: str) -> None:
        if self._system_monitor is not None:
            self._system_monitor.finish()
        self._client.set_terminated(self._run(), status)

    def _tag_children(self, tag: str, tags: Mapping[str, Mapping[str, str]]) -> None:
        experiment = self._client.get_run(self._run()).info.experiment_id
        remaining = dict(tags)
        # newest first, since a run of an earlier attempt has the same tag
        for child in _search_runs(self._client, experiment, f"tags.`mlflow.parentRunId` = '{self._run()}'"):
            for name, value in remaining.pop(child.data.tags.get(tag, ""), {}).items():
                self._client.set_tag(child.info.run_id, name, value)
            if child.info.status == "RUNNING":
                self._client.set_terminated(child.info.run_id, "KILLED")

    def _artifacts(self, recipe: Recipe) -> str | None:
        """The folder for artifacts beside a SQLite store; MLflow's default is the working directory."""
        return (recipe.output_path / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None

    def _send_lines(self, lines: Sequence[_Line]) -> None:
        # an earlier process may have been killed after it sent some lines and before it noted that
        new = lines if self._lines_sent_is_exact else [line for line in lines if not self._is_logged(line)]
        if new:
            self._log_batch(new)
        self._lines_sent_is_exact = True
        self.lines_sent += len(lines)
        self._write_state()

    def _is_logged(self, line: _Line) -> bool:
        history = self._client.get_metric_history(self._run(), next(iter(line.values)))
        return any(entry.step == line.step for entry in history)

    def _write_state(self) -> None:
        if self._state_file is not None:
            write_json(self._state_file, {"uri": self.uri, "run_id": self._run_id, "lines": self.lines_sent})

    def _log_batch(self, lines: Sequence[_Line]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, line.step) for line in lines for name, value in line.values.items()]
        self._client.log_batch(self._run(), metrics=metrics)

    def _run(self) -> str:
        assert self._run_id is not None
        return self._run_id

    def _submit(self, entry: Callable[[], object] | _Line) -> None:
        # queued here, so that the lines that come while the thread waits for the server are sent together
        self._queue.append(entry)
        self._thread.submit(self._send, math.inf)

    def _send_last(self) -> bool:
        self._next_try = 0.0
        self._send(time.monotonic() + END_SECONDS)
        return not self._queue

    def _send(self, end: float) -> None:
        """Send the queue until ``end``, unless the last request failed a short while ago."""
        while self._queue and self._next_try <= time.monotonic() < end:
            lines = self._first_lines()
            try:
                if lines:
                    self._send_lines(lines)
                else:
                    self._queue[0]()  # type: ignore[operator]
            except Exception as error:  # no error of the store may stop training
                self._next_try, self._pause = time.monotonic() + self._pause, min(2 * self._pause, LONGEST_PAUSE)
                if not self._warned:
                    self._warned = True
                    self._warn(
                        f"MLflow at {self.uri} cannot be reached ({type(error).__name__}); metrics are sent later"
                    )
                return
            self._pause = FIRST_PAUSE
            del self._queue[: max(1, len(lines))]

    def _first_lines(self) -> list[_Line]:
        """The lines of metrics at the head of the queue, as many as one request may have."""
        lines: list[_Line] = []
        count = 0
        for entry in list(self._queue):
            if not isinstance(entry, _Line):
                break
            count += len(entry.values)
            if lines and count > BATCH_METRICS:
                break
            lines.append(entry)
        return lines


def _search_runs(client: Any, experiment_id: str, filter_string: str) -> Iterator[Any]:
    """The runs of an experiment that pass the filter, newest first, over all pages."""
    token: str | None = ""
    while token is not None:
        page = client.search_runs(
            [experiment_id], filter_string, order_by=["attributes.start_time DESC"], page_token=token or None
        )
        yield from page
        token = page.token or None


def download_runs(uri: str, experiment: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """Download the RUN_FILES of each finished run of an experiment; yields its directory in ``folder`` and its ID.

    Raises UserError for an unknown experiment and an unreachable server.
    """
    import mlflow
    from mlflow import MlflowClient

    try:
        client = MlflowClient(uri)
        entry = client.get_experiment_by_name(experiment)
        if entry is None:
            raise UserError(f"MLflow at {mask_password(uri)}: no experiment named {experiment}")
        for run in _search_runs(client, entry.experiment_id, "attributes.status = 'FINISHED'"):
            names = {file.path for file in client.list_artifacts(run.info.run_id)}
            if names >= RUN_FILES:
                for name in sorted(RUN_FILES):
                    mlflow.artifacts.download_artifacts(
                        run_id=run.info.run_id,
                        artifact_path=name,
                        dst_path=str(folder / require_inside(run.info.run_id)),
                        tracking_uri=uri,
                    )
                yield folder / run.info.run_id, run.info.run_id
    except mlflow.exceptions.MlflowException as error:
        reason = mask_password(one_line(error))[:200]
        raise UserError(f"MLflow at {mask_password(uri)}: {reason}") from None


def _metric_name(name: str) -> str:
    """``name`` in characters that MLflow allows; categories and prompt sets are named by the user."""
    return re.sub(r"[^\w\-. :/]", "_", name)
