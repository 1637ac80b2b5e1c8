"""MLflow: a follower of the run directory. A server that is away costs a warning, never the run."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.runs.metrics_log import Metrics, numbers
from raydiv.utils.dotted import flatten
from raydiv.utils.errors import UserError
from raydiv.utils.secrets import has_password, mask_password
from raydiv.utils.signals import Terminated
from raydiv.utils.storage import atomic, require_inside

SENT = {"recipe.yaml", "metrics.jsonl", "result.json"}
"""The files of a finished run that say all of it in numbers, as MLflow has them."""

Warn = Callable[[str], None]


def tracking_uri(recipe: Recipe) -> str:
    """``track.uri``, else MLFLOW_TRACKING_URI, else a SQLite file in ``output_dir``."""
    configured = recipe.track.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return configured or f"sqlite:///{recipe.output_path / 'mlflow.db'}"


def forwarded_uri(recipe: Recipe) -> str | None:
    """``tracking_uri`` for the recipes of a sweep's or a study's runs; None for one with a password: no recipe holds it, and
    they find it where this process does, in the environment.
    """
    uri = tracking_uri(recipe)
    return None if has_password(uri) else uri


class MlflowTracker:
    """One MLflow run, a new one unless it goes on with an ``earlier`` one (``uri`` and ``run_id``) of the same server.

    What could not be sent is kept in order and tried again with the next call, and at the end. A thread of its own does the
    sending: nothing waits for a server, nor for MLflow to be loaded. ``note``: a file that says how far it came, by which a
    later process goes on.
    """

    def __init__(
        self,
        recipe: Recipe,
        tags: Mapping[str, str],
        warn: Warn,
        earlier: Mapping[str, Any] | None = None,
        note: Path | None = None,
    ) -> None:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._address = tracking_uri(recipe)
        self.uri = mask_password(self._address)
        """As it is shown and written down."""
        self._warn = warn
        self._warned = False
        self._waiting: list[Callable[[], object]] = []
        self._run_id: str | None = None
        self._system: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._note = note
        if note is not None and note.exists():
            earlier = json.loads(note.read_text())
        same = earlier if earlier is not None and earlier.get("uri") == self.uri else {}
        run_id = same.get("run_id")
        self.sent = int(same.get("lines", 0))
        """Lines of metrics.jsonl that the server has."""
        self._sure = run_id is None
        self._submit(lambda: self._start(recipe, tags) if run_id is None else self._resume(run_id))

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run; None while the server is away. Waits until all that was logged has been tried."""
        return self._thread.submit(lambda: self._run_id).result()

    def metrics(self, record: Metrics) -> None:
        """Log one line of metrics.jsonl."""
        step = int(record["step"])
        values = {_allowed(name): float(value) for name, value in numbers(record).items() if name != "step"}
        self._submit(lambda: self._log_line(values, step))

    def artifact(self, path: Path) -> None:
        self._submit(lambda: self._client.log_artifact(self._run(), str(path)))

    def tag_children(self, tag: str, tags: Mapping[str, Mapping[str, str]]) -> None:
        """Give each run that is nested in this one the ``tags`` of the value that its own ``tag`` has.

        Those that still seem to run are ended as killed: their processes could not say so.
        """
        self._submit(lambda: self._tag_children(tag, tags))

    def finish(self, status: str = "FINISHED") -> bool:
        """End the run; returns whether everything was sent."""
        self._submit(lambda: self._end(status))
        return self._thread.submit(lambda: not self._waiting).result()

    @contextmanager
    def end_on_error(self) -> Iterator[None]:
        """What ends the block before its time ends the run: as killed when it was somebody's wish, as failed otherwise."""
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
        if self._run_id is None:  # else it was begun before the server went away
            self._run_id = self._client.create_run(
                experiment_id, run_name=recipe.name, tags={**tags, **recipe.track.tags}
            ).info.run_id
        from mlflow.entities import Param

        parameters = [
            Param(key, str(value)[:6000])
            for key, value in flatten(recipe.model_dump(mode="json", by_alias=True)).items()
        ]
        self._client.log_batch(self._run(), params=parameters)
        self._write_note()
        self._watch_system()

    def _resume(self, run_id: str) -> None:
        """With a run that an earlier attempt began."""
        self._client.update_run(run_id, "RUNNING")
        self._run_id = run_id
        self._watch_system()

    def _watch_system(self) -> None:
        """CPU, memory, disk, network and GPUs of this node, where MLflow's own variable asks for them."""
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get() and self._system is None:
            self._system = SystemMetricsMonitor(self._run(), resume_logging=True, tracking_uri=self._address)
            self._system.start()

    def _end(self, status: str) -> None:
        if self._system is not None:
            self._system.finish()
        self._client.set_terminated(self._run(), status)

    def _tag_children(self, tag: str, tags: Mapping[str, Mapping[str, str]]) -> None:
        experiment = self._client.get_run(self._run()).info.experiment_id
        left = dict(tags)
        # newest first: an earlier attempt's is another run under the same tag
        for child in _all_runs(self._client, experiment, f"tags.`mlflow.parentRunId` = '{self._run()}'"):
            for name, value in left.pop(child.data.tags.get(tag, ""), {}).items():
                self._client.set_tag(child.info.run_id, name, value)
            if child.info.status == "RUNNING":
                self._client.set_terminated(child.info.run_id, "KILLED")

    def _artifacts(self, recipe: Recipe) -> str | None:
        """Beside a SQLite store, artifacts go into its folder and not into the working directory."""
        return (recipe.output_path / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None

    def _log_line(self, values: Mapping[str, float], step: int) -> None:
        # the process before this one may have been killed between the sending of a line and the noting of it
        if self._sure or not self._has(next(iter(values)), step):
            self._log_metrics(values, step)
        self._sure = True
        self.sent += 1
        self._write_note()

    def _has(self, metric: str, step: int) -> bool:
        return any(found.step == step for found in self._client.get_metric_history(self._run(), metric))

    def _write_note(self) -> None:
        if self._note is not None:
            with atomic(self._note) as temporary:
                temporary.write_text(json.dumps({"uri": self.uri, "run_id": self._run_id, "lines": self.sent}) + "\n")

    def _log_metrics(self, values: Mapping[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run(), metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def _run(self) -> str:
        assert self._run_id is not None
        return self._run_id

    def _submit(self, call: Callable[[], object]) -> None:
        self._thread.submit(self._try, call)

    def _try(self, call: Callable[[], object]) -> None:
        self._waiting.append(call)
        while self._waiting:
            try:
                self._waiting[0]()
            except Exception as error:  # whatever the store raises, training goes on
                if not self._warned:
                    self._warned = True
                    self._warn(
                        f"MLflow at {self.uri} is away ({type(error).__name__}); metrics wait and are sent later"
                    )
                return
            self._waiting.pop(0)


def _all_runs(client: Any, experiment_id: str, wanted: str) -> Iterator[Any]:
    """The runs of an experiment, page by page, the newest first."""
    token: str | None = ""
    while token is not None:
        page = client.search_runs(
            [experiment_id], wanted, order_by=["attributes.start_time DESC"], page_token=token or None
        )
        yield from page
        token = page.token or None


def download_runs(uri: str, experiment: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """Finished runs of an experiment, each as a directory with what it sent, and its id.

    Raises UserError where there is no such experiment, or no server.
    """
    import mlflow
    from mlflow import MlflowClient

    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise UserError(f"MLflow at {mask_password(uri)}: has no experiment {experiment}")
        for run in _all_runs(client, found.experiment_id, "attributes.status = 'FINISHED'"):
            names = {file.path for file in client.list_artifacts(run.info.run_id)}
            if names >= SENT:
                for name in sorted(SENT):
                    mlflow.artifacts.download_artifacts(
                        run_id=run.info.run_id,
                        artifact_path=name,
                        dst_path=str(folder / require_inside(run.info.run_id)),
                        tracking_uri=uri,
                    )
                yield folder / run.info.run_id, run.info.run_id
    except mlflow.exceptions.MlflowException as error:
        reason = mask_password(" ".join(str(error).split()))[:200]
        raise UserError(f"MLflow at {mask_password(uri)}: {reason}") from None


def _allowed(name: str) -> str:
    """A metric's name in characters that MLflow takes; those of categories and of sets are the user's."""
    return re.sub(r"[^\w\-. :/]", "_", name)
