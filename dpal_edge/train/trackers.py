"""Where the numbers of a run go besides its own files: TensorBoard, Weights & Biases, MLflow.

They are an extra: one that cannot be reached at the start is an error, one that fails later is left out with a line on
standard error, for ``metrics.jsonl`` has every number. ``tracker.json`` in the run folder keeps their ids, so that a
resumed run is the same run there. Updates that a crash undid are logged once more, under the same update.
"""

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpal_edge.errors import BackendUnavailable, ConfigError
from dpal_edge.files import write_text

_PROJECT = "dpal-edge"  # unless the tracker's own environment variable names another
_MLFLOW_EVERY_S = 10  # a request to a server takes a while, so MLflow's are bundled
_MLFLOW_LIMIT = 1000  # metrics in a request
_WITHOUT = "go on without it by --set trackers=tensorboard"


@dataclass(frozen=True)
class _Tracker:
    """One tracker that is open."""

    log: Callable[[int, Mapping[str, float]], object]
    close: Callable[[], object]
    failures: tuple[type[Exception], ...]  # what a lost connection or a full disk raises


class Trackers:
    """The trackers of a run as one."""

    def __init__(self, trackers: dict[str, _Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log ``values`` by name as those of update ``step``."""
        for name, tracker in list(self._trackers.items()):
            with self._forgiving(name):
                tracker.log(step, values)

    def close(self) -> None:
        """Hand over what is still on its way."""
        for name, tracker in list(self._trackers.items()):
            with self._forgiving(name):
                tracker.close()
        self._trackers = {}

    @contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        """Leave a tracker out from here on if it fails, and say so."""
        try:
            yield
        except self._trackers[name].failures as error:
            del self._trackers[name]
            sys.stderr.write(
                f"tracker {name!r} failed and is left out ({_first_line(error)}); metrics.jsonl has all numbers\n"
            )


def require_trackers(names: tuple[str, ...]) -> None:
    """Check that the packages of ``names`` are installed.

    Raises:
        BackendUnavailable: one is not; the message tells how to install it.
    """
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # the latter is a mere folder, such as the "wandb" of earlier runs
            raise BackendUnavailable(f"tracker {name!r} is not installed: pip install {name}, or {_WITHOUT}")


def open_trackers(names: tuple[str, ...], run: Path, config: dict[str, Any], *, after_step: int) -> Trackers:
    """Open the trackers ``names`` (tensorboard, wandb, mlflow) for the run folder ``run``.

    W&B and MLflow read their own environment variables, among them ``WANDB_MODE=offline``, ``WANDB_PROJECT``,
    ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``. Without the last two, MLflow writes to ``mlflow.db`` in the
    run folder, experiment ``dpal-edge``.

    Args:
        names: any of the three, in any order.
        run: the run folder; its name becomes the run's.
        config: settings to show beside the curves.
        after_step: updates done so far; 0 at the start.

    Raises:
        BackendUnavailable: a package is not installed.
        ConfigError: a tracker cannot be reached, or asks for a login.
    """
    require_trackers(names)
    path = run / "tracker.json"
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    trackers = Trackers({name: _OPEN[name](run, config, ids, after_step) for name in names})
    if ids:
        write_text(path, json.dumps(ids) + "\n")
    return trackers


def _open_tensorboard(run: Path, config: dict[str, Any], ids: dict[str, str], after_step: int) -> _Tracker:
    """Write event files in ``tensorboard``, here and now.

    TensorBoard's own writer leaves that to a thread, which answers a full disk with a traceback nobody can catch.
    """
    events = import_module("tensorboard.compat.proto.event_pb2")
    summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
    folder = run / "tensorboard"
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    with _opening("tensorboard", (OSError,)):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("ab", buffering=0)

    def put(data: bytes) -> None:
        try:
            while data:  # unbuffered, so that a full disk is met here and not once more when the file is closed
                data = data[file.write(data) :]
        except OSError:
            file.close()
            raise

    writer = import_module("tensorboard.summary.writer.record_writer").RecordWriter(SimpleNamespace(write=put))

    def write(**fields: Any) -> None:
        writer.write(events.Event(wall_time=time.time(), **fields).SerializeToString())

    def log(step: int, values: Mapping[str, float]) -> None:
        scalars = [summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        write(step=step, summary=summary(value=scalars))

    with _opening("tensorboard", (OSError,)):
        write(step=0, file_version="brain.Event:2")
        # What an earlier session logged from this update on is not shown.
        write(step=after_step + 1, session_log=events.SessionLog(status=events.SessionLog.START))
    return _Tracker(log, file.close, (OSError,))


def _open_wandb(run: Path, config: dict[str, Any], ids: dict[str, str], after_step: int) -> _Tracker:
    """Open or go on with a W&B run whose x axis is ``update``: W&B's own step can never go back."""
    wandb = import_module("wandb")
    failures = (wandb.Error, OSError)
    with _opening("wandb", failures):
        session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=ids.setdefault("wandb", secrets.token_hex(4)),
            resume="allow",
            dir=str(run),
            config=config,
            settings=wandb.Settings(console="off"),  # the terminal is the panel's
        )
        session.define_metric("update")
        session.define_metric("*", step_metric="update")
    return _Tracker(lambda step, values: session.log({"update": step, **values}), session.finish, failures)


def _open_mlflow(run: Path, config: dict[str, Any], ids: dict[str, str], after_step: int) -> _Tracker:
    """Open or go on with an MLflow run; requests are bundled, so that a slow server does not slow training."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # 14 s, where its own 7 take minutes
    mlflow, entities = import_module("mlflow"), import_module("mlflow.entities")
    failures = (mlflow.MlflowException, OSError)
    with _opening("mlflow", failures):
        client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve()}/mlflow.db")
        if "mlflow" in ids:
            client.update_run(ids["mlflow"], status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            experiment = client.get_experiment_by_name(name)
            folder = experiment.experiment_id if experiment else client.create_experiment(name)
            ids["mlflow"] = client.create_run(folder, run_name=run.name).info.run_id
            client.log_batch(ids["mlflow"], params=[entities.Param(k, json.dumps(v)) for k, v in config.items()])
    waiting: list[Any] = []
    sent = time.monotonic()

    def send() -> None:
        nonlocal sent
        while waiting:
            client.log_batch(ids["mlflow"], metrics=waiting[:_MLFLOW_LIMIT])
            del waiting[:_MLFLOW_LIMIT]
        sent = time.monotonic()

    def log(step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        waiting.extend(entities.Metric(name, value, now, step) for name, value in values.items())
        if time.monotonic() - sent > _MLFLOW_EVERY_S:
            send()

    def close() -> None:
        send()
        client.set_terminated(ids["mlflow"])

    return _Tracker(log, close, failures)


_OPEN: dict[str, Callable[[Path, dict[str, Any], dict[str, str], int], _Tracker]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
}


@contextmanager
def _opening(name: str, failures: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what a tracker raises at the start into one line."""
    try:
        yield
    except failures as error:
        raise ConfigError(
            f"tracker {name!r} cannot be opened ({_first_line(error)}); check its address and login, or {_WITHOUT}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
