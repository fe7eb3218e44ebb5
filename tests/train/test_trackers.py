import json
import math
import resource
import sys
import types
import warnings
from functools import partial

import pytest

from dpal_edge.errors import BackendUnavailable, ConfigError
from dpal_edge.train.trackers import open_trackers, require_trackers

# W&B and MLflow are not among the packages that tests need: fakes stand in for them, and only the calls are checked.
# The calls were tried on W&B 0.31 (offline; no login; no server) and on MLflow 3.17 (SQLite; no server).


FOUND = types.SimpleNamespace(origin="package/__init__.py")


def read_events(run):
    """Read what TensorBoard itself would show: tag -> [(step, value)]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_and_forgets_what_a_crash_undid(tmp_path):
    trackers = open_trackers(("tensorboard",), tmp_path, {}, after_step=0)
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1 / step, "usage/global/0": 0.5})
    trackers.close()  # writes nothing: after a SIGKILL the file is the same; the checkpoint is of update 2
    trackers = open_trackers(("tensorboard",), tmp_path, {}, after_step=2)
    trackers.log(3, {"loss": 9.0, "usage/global/0": math.nan})
    trackers.close()
    events = read_events(tmp_path)
    assert events["loss"] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert [step for step, _ in events["usage/global/0"]] == [1, 2, 3]
    assert not (tmp_path / "tracker.json").exists()


def test_tensorboard_on_a_full_disk_is_left_out_in_one_line(tmp_path, capsys):
    trackers = open_trackers(("tensorboard",), tmp_path, {}, after_step=0)
    trackers.log(1, {"loss": 1.0})
    [path] = (tmp_path / "tensorboard").iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))  # ends within the next event
    try:
        trackers.log(2, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    trackers.log(3, {"loss": 0.1})
    trackers.close()
    assert capsys.readouterr().err == (
        "tracker 'tensorboard' failed and is left out ([Errno 27] File too large); metrics.jsonl has all numbers\n"
    )
    assert read_events(tmp_path)["loss"] == [(1, 1.0)]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(ConfigError, match=r"tracker 'tensorboard' cannot be opened \(\[Errno 17\] File exists"):
        open_trackers(("tensorboard",), tmp_path, {}, after_step=0)


def test_package_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("dpal_edge.train.trackers.find_spec", lambda name: None if name == "wandb" else FOUND)
    message = "tracker 'wandb' is not installed: pip install wandb, or go on without it by --set trackers=tensorboard"
    with pytest.raises(BackendUnavailable, match=message):
        open_trackers(("tensorboard", "wandb"), tmp_path / "run", {}, after_step=0)
    assert not (tmp_path / "run").exists()
    require_trackers(("tensorboard", "mlflow"))


def test_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BackendUnavailable, match="tracker 'mlflow' is not installed"):
        require_trackers(("mlflow",))


class Lost(Exception):
    """What a server that is gone raises."""


class Session:
    """A W&B run."""

    def __init__(self, calls):
        self.calls = calls

    def define_metric(self, *names, **options):
        self.calls.append(("define_metric", names, options))

    def log(self, values):
        if values["update"] == 2:
            raise Lost("no route\nto host")
        self.calls.append(("log", values))

    def finish(self):
        self.calls.append(("finish",))


class Client:
    """An MLflow client."""

    def __init__(self, calls, uri):
        self.calls = calls
        calls.append(("uri", uri))

    def get_experiment_by_name(self, name):
        self.calls.append(("experiment", name))

    def create_experiment(self, name):
        return "7"

    def create_run(self, experiment, run_name):
        self.calls.append(("create_run", experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    def update_run(self, run_id, status):
        self.calls.append(("update_run", run_id, status))

    def log_batch(self, run_id, params=(), metrics=()):
        self.calls.append(("log_batch", run_id, list(params), [(m[0], m[1], m[3]) for m in metrics]))

    def set_terminated(self, run_id):
        self.calls.append(("set_terminated", run_id))


@pytest.fixture
def fakes(monkeypatch):
    """Modules of the shape of W&B's and MLflow's; returns the calls that they receive."""
    calls = []

    def init(**options):
        if options["config"].get("batch") == "no login":
            raise Lost("No API key configured.")
        calls.append(("init", options))
        return Session(calls)

    modules = {
        "wandb": {"Error": Lost, "init": init, "Settings": dict},
        "mlflow": {"MlflowException": Lost, "MlflowClient": partial(Client, calls)},
        "mlflow.entities": {"Metric": lambda *fields: fields, "Param": lambda *fields: fields},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("dpal_edge.train.trackers.find_spec", lambda name: FOUND)
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    return calls


def test_wandb_is_one_run_over_two_sessions(tmp_path, fakes):
    run = tmp_path / "first"
    run.mkdir()
    for after in (0, 4):
        trackers = open_trackers(("wandb",), run, {"batch": 4}, after_step=after)
        trackers.log(after + 1, {"loss": 0.5})
        trackers.close()
    first, second = (options for name, *[options] in (call for call in fakes if call[0] == "init"))
    assert first == second
    assert first["id"] == json.loads((run / "tracker.json").read_text())["wandb"]
    assert (first["resume"], first["name"], first["project"]) == ("allow", "first", "dpal-edge")
    assert ("define_metric", ("*",), {"step_metric": "update"}) in fakes
    assert [call[1] for call in fakes if call[0] == "log"] == [{"update": 1, "loss": 0.5}, {"update": 5, "loss": 0.5}]
    assert fakes[-1] == ("finish",)


def test_mlflow_is_one_run_over_two_sessions_and_bundles_requests(tmp_path, fakes, monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 11.0, *[20.0] * 9])
    monkeypatch.setattr("dpal_edge.train.trackers.time.monotonic", lambda: next(clock))
    trackers = open_trackers(("mlflow",), tmp_path, {"batch": 4, "data": ["a"]}, after_step=0)
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    assert fakes == [
        ("uri", f"sqlite:///{tmp_path}/mlflow.db"),
        ("experiment", "dpal-edge"),
        ("create_run", "7", tmp_path.name),
        ("log_batch", "abc", [("batch", "4"), ("data", '["a"]')], []),
        ("log_batch", "abc", [], [("loss", 1.0, 1), ("loss", 1.0, 2)]),
        ("log_batch", "abc", [], [("loss", 1.0, 3)]),
        ("set_terminated", "abc"),
    ]
    fakes.clear()
    open_trackers(("mlflow",), tmp_path, {"batch": 8}, after_step=3).close()
    assert fakes[1:] == [("update_run", "abc", "RUNNING"), ("set_terminated", "abc")]


def test_one_that_fails_during_training_is_left_out_and_the_others_go_on(tmp_path, fakes, capsys):
    trackers = open_trackers(("tensorboard", "wandb"), tmp_path, {}, after_step=0)
    trackers.log(1, {"loss": 1.0})
    trackers.log(2, {"loss": 0.5})
    trackers.log(3, {"loss": 0.2})
    trackers.close()
    assert capsys.readouterr().err.splitlines() == [
        "tracker 'wandb' failed and is left out (no route); metrics.jsonl has all numbers"
    ]
    assert [step for step, _ in read_events(tmp_path)["loss"]] == [1, 2, 3]
    assert [call[1] for call in fakes if call[0] == "log"] == [{"update": 1, "loss": 1.0}]


def test_one_that_does_not_let_us_in_is_refused_at_the_start(tmp_path, fakes):
    with pytest.raises(ConfigError, match=r"tracker 'wandb' cannot be opened \(No API key configured\.\); check its"):
        open_trackers(("wandb",), tmp_path, {"batch": "no login"}, after_step=0)
