import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from dpal_edge.cli import main
from dpal_edge.errors import ConfigError, DataError, ModelFileError
from dpal_edge.models.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from dpal_edge.models.teacher import load_teachers
from dpal_edge.train.config import build_config
from dpal_edge.train.data import PersonBatches
from dpal_edge.train.distributed import World
from dpal_edge.train.loop import (
    TimedLoader,
    build_state,
    choose_device,
    ema_decay,
    learning_rate,
    train,
    update_ema,
    validate,
)
from dpal_edge.train.run import run_training
from dpal_edge.train.saver import state_tensors
from dpal_edge.train.setup import read_run_config
from dpal_edge.train.sources import open_source
from dpal_edge.train.watcher import Watcher
from tests.train.conftest import SHORT_RUN, write_people, write_teacher

COMMAND = [sys.executable, "-c", "import torch; torch.set_num_threads(1); from dpal_edge.cli import main; main()"]


class Recorder(Watcher):
    """Keeps what it is told; sends ``stop`` to this process at update ``at``."""

    def __init__(self, at=None, stop=signal.SIGINT):
        self.at, self.stop = at, stop
        self.facts, self.steps, self.records = None, [], []

    def started(self, facts):
        self.facts = facts

    def updated(self, step):
        self.steps.append(step)
        if step == self.at:
            os.kill(os.getpid(), self.stop)

    def recorded(self, record):
        self.records.append(record)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal_tensors(one, other):
    one, other = read_checkpoint(one), read_checkpoint(other)
    assert one.tensors.keys() == other.tensors.keys()
    assert {key.partition(".")[0] for key in one.tensors} == {"backbone", "decoder", "ema", "mask", "optimizer"}
    for key, value in one.tensors.items():
        assert torch.equal(value, other.tensors[key]), key
    assert one.metadata["step"] == other.metadata["step"]


def files(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, people, teacher_file):
    """An uninterrupted run of four updates, with its settings; not to be changed by a test."""
    fields = {**SHORT_RUN, "teacher": str(teacher_file), "data": [str(people)]}
    run = tmp_path_factory.mktemp("runs") / "finished"
    watcher = Recorder()
    return run, fields, run_training(build_config(fields), run, watcher=watcher), watcher


@pytest.fixture
def interrupted(finished, tmp_path):
    """The same run, stopped by Ctrl-C after its third update."""
    run = tmp_path / "run"
    summary = run_training(build_config(finished[1]), run, watcher=Recorder(at=3))
    assert summary.interrupted
    assert summary.step == 3
    return run


def test_run_folder(finished):
    run, fields, summary, watcher = finished
    assert [path for path in files(run) if "tensorboard" not in path] == [
        "checkpoints/step-00000002.safetensors",
        "checkpoints/step-00000004.safetensors",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "teachers.json",
    ]
    assert any("events.out.tfevents" in path for path in files(run))
    assert build_config(read_run_config(run)) == build_config(fields)
    [passport] = json.loads((run / "teachers.json").read_text())
    assert passport["keys_matched"] == 1.0
    assert passport["feature_check"]["std"] > 0
    assert not summary.interrupted
    assert summary.step == 4
    assert summary.checkpoint == run / "checkpoints" / "step-00000004.safetensors"
    assert watcher.steps == [1, 2, 3, 4]
    assert watcher.facts["images"] == 24


def test_metrics(finished):
    run, fields, summary, watcher = finished
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, record in zip(lines, watcher.records, strict=True):
        assert {"loss", "global", "local", "relation", "router", "penalty", "grad_norm"} <= line.keys()
        assert line["loss"] == record.values["loss"]
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["lr"] == learning_rate(line["step"] - 1, build_config(fields))
        for call in ("global", "local", "relation"):
            assert sum(line[f"usage/{call}/{i}"] for i in range(3)) == pytest.approx(1, abs=1e-5)
        parts = line["global"] + line["local"] + line["relation"] + line["penalty"]
        weight = 0.1 if line["step"] == 1 else 0.01  # the router's, late after a tenth of the run
        assert line["loss"] == pytest.approx(parts + weight * line["router"], rel=1e-5)
    assert summary.last == watcher.records[-1]


def test_metrics_are_means_over_the_interval(finished, tmp_path):
    run, fields, *_ = finished
    run_training(build_config({**fields, "log_every": 3, "save_every": 10}), tmp_path / "run")
    third, fourth = metrics(tmp_path / "run")
    single = metrics(run)
    assert (third["step"], fourth["step"]) == (3, 4)
    assert third["loss"] == pytest.approx(sum(line["loss"] for line in single[:3]) / 3, rel=1e-5)
    assert fourth["loss"] == pytest.approx(single[3]["loss"], rel=1e-5)


def test_checkpoint_says_what_it_is(finished):
    metadata = read_checkpoint(finished[2].checkpoint).metadata
    assert metadata["architecture"]["last_heads"] == 12
    assert metadata["teachers"][0]["sha256"]
    assert metadata["config"]["batch"] == 2
    assert metadata["best"] == "backbone"
    assert metadata["written"]["precision"] == "float32"


def test_loss_decreases(tmp_path, teacher_file, settings):
    crops = write_people(tmp_path / "crops", 64)
    fields = {"data": [str(crops)], "batch": 4, "steps": 32, "log_every": 8, "save_every": 99, "base_lr": 0.06}
    run_training(build_config({**settings, **fields}), tmp_path / "run")
    first, *_, last = metrics(tmp_path / "run")
    assert last["loss"] < 0.8 * first["loss"]
    assert last["global"] < first["global"]
    assert last["router"] < 0.8 * first["router"]  # the calls are told apart


def test_resume_is_bit_equal(finished, interrupted):
    run, fields, summary, _ = finished
    watcher = Recorder()
    resumed = run_training(build_config(fields), interrupted, resume=True, watcher=watcher)
    assert watcher.facts["from_step"] == 3
    assert watcher.steps == [4]
    assert_equal_tensors(resumed.checkpoint, summary.checkpoint)
    assert not resumed.interrupted
    for line, expected in zip(metrics(interrupted), metrics(run), strict=True):  # no step twice, none lost
        assert line["step"] == expected["step"]
        assert line["loss"] == expected["loss"]


def test_resume_is_bit_equal_with_muon(settings, tmp_path):
    config = build_config({**settings, "optimizer": "muon"})
    whole = run_training(config, tmp_path / "whole")
    run_training(config, tmp_path / "parts", watcher=Recorder(at=3))
    resumed = run_training(config, tmp_path / "parts", resume=True)
    assert_equal_tensors(resumed.checkpoint, whole.checkpoint)


def test_resume_drops_metrics_after_the_checkpoint_and_a_cut_line(finished, interrupted):
    lines = (interrupted / "metrics.jsonl").read_text()
    (interrupted / "metrics.jsonl").write_text(lines + json.dumps({"step": 4, "loss": 99}) + '\n{"step": 4, "lo')
    run_training(build_config(finished[1]), interrupted, resume=True)
    assert [line["step"] for line in metrics(interrupted)] == [1, 2, 3, 4]
    assert metrics(interrupted)[-1]["loss"] < 99


def test_stopping_by_sigterm_restores_the_handlers(finished, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = Recorder(at=1, stop=signal.SIGTERM)
    summary = run_training(build_config(finished[1]), tmp_path / "run", watcher=watcher)
    assert (summary.interrupted, summary.step) == (True, 1)
    assert {number: signal.getsignal(number) for number in before} == before


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_newest_checkpoint_offers_the_one_before(finished, interrupted):
    older, newest = list_checkpoints(interrupted)
    damage(newest)
    config = build_config(finished[1])
    with pytest.raises(ModelFileError, match=f"{newest.name}: damaged: .* {older.name}, is intact: remove") as caught:
        run_training(config, interrupted, resume=True)
    assert "\n" not in str(caught.value)
    newest.unlink()  # as the message says
    assert_equal_tensors(run_training(config, interrupted, resume=True).checkpoint, finished[2].checkpoint)


def test_all_checkpoints_damaged(finished, interrupted):
    for path in list_checkpoints(interrupted):
        damage(path)
    with pytest.raises(ModelFileError, match="no earlier checkpoint is intact: start a new run"):
        run_training(build_config(finished[1]), interrupted, resume=True)


def test_changed_teacher_is_refused(people, settings, tmp_path):
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    config = build_config({**settings, "teacher": str(teacher)})
    run_training(config, tmp_path / "run", watcher=Recorder(at=1))
    write_teacher(teacher, seed=1)
    before = files(tmp_path / "run")
    with pytest.raises(
        ModelFileError, match=r"the teacher .* has changed since the run began .* put the old file back"
    ):
        run_training(config, tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == before


def test_resume_refuses_other_settings_and_finished_runs(finished):
    run, fields, *_ = finished
    before = files(run)
    with pytest.raises(ConfigError, match=r"other settings; the run has batch=2, seed=0; start a new run"):
        run_training(build_config({**fields, "batch": 3, "seed": 5, "steps": 9}), run, resume=True)
    with pytest.raises(ConfigError, match="steps is 3, but 4 updates are done already"):
        run_training(build_config({**fields, "steps": 3}), run, resume=True)
    with pytest.raises(ConfigError, match="already holds a run; go on with it by --resume, or choose another --out"):
        run_training(build_config(fields), run)
    assert files(run) == before


def test_resume_of_a_finished_run_changes_nothing(finished):
    run, fields, summary, _ = finished
    before = summary.checkpoint.read_bytes()
    again = run_training(build_config(fields), run, resume=True)
    assert (again.step, again.interrupted, again.checkpoint) == (4, False, summary.checkpoint)
    assert summary.checkpoint.read_bytes() == before
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


def test_resume_without_a_checkpoint_begins(finished, tmp_path):
    """Whatever restarts a job may always say --resume, also for one that died before its first checkpoint."""
    assert read_run_config(tmp_path) == {}
    resumed = run_training(build_config(finished[1]), tmp_path, resume=True)
    assert_equal_tensors(resumed.checkpoint, finished[2].checkpoint)


def test_damaged_settings_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match=r"config\.json: cannot be read; give the run's settings again"):
        read_run_config(tmp_path)


def test_changes_on_resume_are_recorded_by_name(finished, interrupted):
    fields = {**finished[1], "clip": 1.5, "workers": 1}
    resumed = run_training(build_config(fields), interrupted, resume=True)
    expected = [
        {"step": 3, "name": "clip", "before": 3.0, "after": 1.5},
        {"step": 3, "name": "workers", "before": 0, "after": 1},
    ]
    assert [json.loads(line) for line in (interrupted / "changes.jsonl").read_text().splitlines()] == expected
    assert read_checkpoint(resumed.checkpoint).metadata["changes"] == expected


def test_checkpoint_that_lacks_a_tensor_is_refused(finished, interrupted):
    newest = list_checkpoints(interrupted)[-1]
    saved = read_checkpoint(newest)
    tensors = {key: value for key, value in saved.tensors.items() if not key.endswith(".queries")}
    write_checkpoint(newest, tensors, saved.metadata)
    with pytest.raises(ModelFileError, match=r"lacks decoder\..*queries"):
        run_training(build_config(finished[1]), interrupted, resume=True)


def test_teacher_with_other_keys_leaves_nothing_behind(settings, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(settings["teacher"])
    path = tmp_path / "teacher.safetensors"
    save_file({key.replace("norm1", "ln_1"): value for key, value in state.items()}, path)
    with pytest.raises(ModelFileError, match=r"a plain ViT has no blocks\.0\.ln_1"):
        run_training(build_config({**settings, "teacher": str(path)}), tmp_path / "run")
    save_file({key: value for key, value in state.items() if "norm1" not in key}, path)
    with pytest.raises(ModelFileError, match="expected at least 95 %"):
        run_training(build_config({**settings, "teacher": str(path)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keep_and_validation(settings, tmp_path):
    fields = {"steps": 4, "save_every": 1, "keep": 2, "validation_images": 2, "batch": 2}
    summary = run_training(build_config({**settings, **fields}), tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [
        f"step-{step:08d}.safetensors" for step in (3, 4)
    ]
    assert summary.validation.keys() == {"backbone", "ema"}
    metadata = read_checkpoint(summary.checkpoint).metadata
    assert metadata["validation"] == summary.validation
    assert metadata["best"] == min(summary.validation, key=summary.validation.get)


def test_unreadable_files_are_skipped_and_listed(settings, tmp_path):
    crops = write_people(tmp_path / "crops", 6)
    (crops / "broken.jpg").write_text("not an image")
    summary = run_training(build_config({**settings, "data": [str(crops)]}), tmp_path / "run")
    [line] = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == str(crops / "broken.jpg")
    assert "cannot identify image file" in json.loads(line)["reason"]
    assert summary.skipped.keys() == {str(crops / "broken.jpg")}


def test_no_tensor_of_the_teacher_is_saved_and_its_weights_stay(finished, teacher_file):
    before = teacher_file.read_bytes()
    assert not [key for key in read_checkpoint(finished[2].checkpoint).tensors if "teacher" in key]
    assert teacher_file.read_bytes() == before


def test_bf16_and_published_preset_run_on_a_cpu(settings, tmp_path):
    from dpal_edge.train.config import PUBLISHED

    fields = {**settings, **PUBLISHED, "steps": 2, "save_every": 9}
    summary = run_training(build_config({**fields, "precision": "bf16"}), tmp_path / "run")
    saved = read_checkpoint(summary.checkpoint)
    assert saved.metadata["written"]["precision"] == "bf16"
    assert {value.dtype for value in saved.tensors.values()} == {torch.float32}
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        run_training(build_config(fields), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_loss_that_is_not_finite_stops_the_run_with_a_checkpoint_intact(settings, tmp_path):
    fields = {**settings, "steps": 9, "save_every": 1, "clip": 0.0}
    run_training(build_config(fields), tmp_path / "run", watcher=Recorder(at=1))
    [path] = list_checkpoints(tmp_path / "run")
    saved = read_checkpoint(path)
    saved.tensors["decoder.16.out_norm.bias"][0] = float("nan")
    write_checkpoint(path, saved.tensors, saved.metadata)
    with pytest.raises(
        DataError,
        match=r"the loss term 'global' is not finite at update 2, on .*\.jpg, .*\.jpg .*not-finite\.json\); .* is "
        r"intact, --resume goes on .* --set base_lr",
    ) as caught:
        run_training(build_config(fields), tmp_path / "run", resume=True)
    bad = json.loads((tmp_path / "run" / "not-finite.json").read_text())
    assert (bad["step"], bad["term"], len(bad["files"])) == (2, "global", 2)
    assert all(file in str(caught.value) for file in bad["files"])
    assert list_checkpoints(tmp_path / "run") == [path]


def test_loss_that_is_not_finite_is_told_before_a_checkpoint_between_log_lines(settings, tmp_path):
    fields = {**settings, "steps": 9, "save_every": 3, "log_every": 100, "clip": 0.0, "base_lr": 1e30}
    with pytest.raises(
        DataError, match=r"the loss term '\w+' is not finite at update [23], on .*no earlier checkpoint"
    ):
        run_training(build_config(fields), tmp_path / "run")


def test_device_that_is_not_there(config):
    for device in ("cuda:77", "nonsense"):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used .* try --set device=cpu"):
            choose_device(replace(config, device=device), World())


def test_learning_rate_and_ema_by_hand(config):
    config = replace(config, steps=100, warmup=0.1, base_lr=0.5, batch=128)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.25 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == max(rates) == 0.25
    assert rates[55] == pytest.approx(0.125)
    assert rates[99] < 1e-3
    assert ema_decay(1, config.ema_decay) == 2 / 11
    assert ema_decay(10**9, config.ema_decay) == config.ema_decay
    ema, source = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.75 * ema.weight + 0.25 * source.weight
    update_ema(ema, source, 0.75)
    torch.testing.assert_close(ema.weight, expected)


def new_state(config):
    return build_state(config, load_teachers(config.teacher, size=config.size), *choose_device(config, World()))


def batches_of(state, config):
    return PersonBatches(open_source(config.data), config, state.method.views)


def test_what_decays(config):
    for spare, names in (
        ("embeddings", {"pos_embed", "cls_token", "queries", "token"}),
        ("1d", set()),
    ):
        state = new_state(replace(config, no_decay=spare))
        decayed, kept = state.optimizer.param_groups
        assert (decayed["weight_decay"], kept["weight_decay"]) == (config.weight_decay, 0.0)
        by_id = {id(p): name for name, p in state.method.named_parameters()}
        assert {by_id[id(p)].split(".")[-1] for p in kept["params"] if p.ndim > 1} == names
        trained = [p for p in state.method.parameters() if p.requires_grad]
        assert len(decayed["params"]) + len(kept["params"]) == len(trained)


def test_an_update_changes_student_and_ema_and_nothing_of_the_teacher(config):
    state = new_state(config)
    before = {key: value.clone() for key, value in state_tensors(state).items()}
    teacher = {key: value.clone() for key, value in state.method.teachers.state_dict().items()}
    loader = TimedLoader(batches_of(state, config), range(1), workers=0, device=state.device)
    [(_, values)] = train(state, loader, config)
    assert state.step == 1
    assert not any(value.requires_grad for value in values.values())
    after = state_tensors(state)
    unchanged = [key for key, value in before.items() if torch.equal(value, after[key])]
    assert not [key for key in unchanged if not key.endswith("bias")], unchanged
    for key, value in state.method.teachers.state_dict().items():
        assert torch.equal(value, teacher[key])


def test_validation_changes_nothing(config):
    state = new_state(config)
    before = {key: value.clone() for key, value in state_tensors(state).items()}
    backbone = state.method.backbone
    means, skipped = validate(state, batches_of(state, config))
    assert skipped == {}
    assert means["backbone"] == pytest.approx(means["ema"])  # equal at the start
    assert state.method.backbone is backbone
    assert state.method.training
    for key, value in state_tensors(state).items():
        assert torch.equal(value, before[key])


# The command, in a process of its own


def options(settings, run):
    keys = settings.keys() - {"teacher", "data", "steps"}
    return [
        *(
            "train",
            "--teacher",
            str(settings["teacher"]),
            "--data",
            settings["data"][0],
            "--steps",
            str(settings["steps"]),
        ),
        *("--out", str(run)),
        *(text for key in sorted(keys) for text in ("--set", f"{key}={json.dumps(settings[key])}")),
    ]


def wait_for(condition, process, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGTERM)])
def test_signal_to_the_command_saves_and_says_how_to_resume(finished, tmp_path, workers, number):
    _, fields, *_ = finished
    run = tmp_path / "run"
    long = {**fields, "steps": 1000, "save_every": 999, "workers": workers}
    process = subprocess.Popen(
        [*COMMAND, *options(long, run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = run / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, process)
    # As a terminal and schedulers do, signal the whole group, from a process that is not the parent.
    subprocess.run(["kill", f"-{int(number)}", "--", f"-{process.pid}"], check=True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    [path] = list_checkpoints(run)
    done = read_checkpoint(path).metadata["step"]
    assert f"stopped after update {done}; go on with: dpal-edge train --out {run} --resume" in err
    assert done >= 2

    resumed = CliRunner().invoke(main, ["train", "--out", str(run), "--resume", "--steps", str(done + 1)])
    assert resumed.exit_code == 0, resumed.output
    assert [line["step"] for line in metrics(run)] == list(range(1, done + 2))


def test_interrupted_long_run_is_bit_equal_when_resumed_by_the_command(finished, interrupted):
    result = CliRunner().invoke(main, ["train", "--out", str(interrupted), "--resume"])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert f"next: dpal-edge export {interrupted} --target onnx" in result.stderr
    assert_equal_tensors(list_checkpoints(interrupted)[-1], finished[2].checkpoint)


def test_full_disk_leaves_the_earlier_checkpoint(finished, interrupted):
    kept = list_checkpoints(interrupted)[-1].read_bytes()
    limit = len(kept) // 2  # the kernel refuses to write past it, part of the way through, as a full disk does
    done = subprocess.run(
        [*COMMAND, "train", "--out", str(interrupted), "--resume"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert re.search(r"step-00000004\.safetensors: cannot be written \(File too large\)", error)
    assert error.endswith("step-00000003.safetensors is intact, --resume goes on from there")
    assert "Traceback" not in done.stderr
    assert [path.name for path in (interrupted / "checkpoints").iterdir() if "partial" in path.name] == []
    assert list_checkpoints(interrupted)[-1].read_bytes() == kept


def test_full_disk_at_the_first_checkpoint(settings, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        result = CliRunner().invoke(main, options(settings, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    assert "step-00000002.safetensors: cannot be written (File too large)" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("; no earlier checkpoint exists")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_full_disk_for_the_metrics(settings, tmp_path):
    done = subprocess.run(
        [*COMMAND, *options({**settings, "steps": 20, "save_every": 99}, tmp_path / "run")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
    )
    assert done.returncode == 1
    # A thread of TensorBoard prints its own failure beside ours.
    assert "metrics.jsonl: cannot be written (File too large); free some space; no earlier checkpoint" in done.stderr


def test_command_describes_what_it_does(settings, tmp_path):
    result = CliRunner().invoke(main, options({**settings, "steps": 1}, tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "student   vit_tiny, 5.4" in result.stderr
    assert "100 % of keys matched, licence unknown" in result.stderr
    assert "updates   0 to 1 of 2 images" in result.stderr
    assert f"done: {tmp_path / 'run' / 'checkpoints' / 'step-00000001.safetensors'}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Error: no teacher: give --teacher SPEC\n"),
        (["--teacher", "t.pth"], "Error: no data: give --data DIR\n"),
        (["--resume"], "Error: no teacher: give --teacher SPEC"),
        (["--teacher", "t.pth", "--data", "nowhere", "--set", "batch"], "expected KEY=VALUE"),
        (["--teacher", "t.pth", "--data", "nowhere"], "nowhere: does not exist; expected a folder of images\n"),
        (["--teacher", "t.pth", "--data", "nowhere", "--steps", "1", "--epochs", "1"], "give one\n"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, arguments, message):
    result = CliRunner().invoke(main, ["train", "--out", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_epochs_config_file_and_preset(settings, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**settings, "clip": 2.0, "batch": 12}))
    arguments = ["train", "--out", str(tmp_path / "run"), "--config", str(file), "--preset", "published"]
    arguments += ["--epochs", "0.5", "--set", "precision=float32", "--set", "heads=3"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = read_run_config(tmp_path / "run")
    assert (found["steps"], found["clip"], found["mask"], found["heads"]) == (1, 2.0, "published", "3")


def test_memory_that_runs_out_says_what_fits(settings, tmp_path):
    """The kernel refuses more memory than the limit, as a machine without swap does; half of the pass is enough."""
    fields = {**settings, "batch": 512, "steps": 1, "mask": "none", "trackers": []}
    script = (
        "import resource, sys, torch; torch.set_num_threads(1);"
        "import dpal_edge.train.run, dpal_edge.train.loop as loop;"
        "from dpal_edge.cli import main;"
        "train = loop.train_step\n"
        "def limited(*arguments, **options):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))\n"
        "    return train(*arguments, **options)\n"
        "loop.train_step = limited\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *options(fields, tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back to the kernel at once
    )
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"^Error: cpu has too little memory for 512 images at a time; it is enough for \d+: go on with --resume "
        r"--set accumulate=\d+, which keeps the batch of 512$",
        done.stderr.splitlines()[-1],
    )
    assert "Traceback" not in done.stderr


def test_filling_the_cache_and_reading_it_give_the_same_updates(settings, tmp_path):
    fields = {**settings, "batch": 8, "steps": 6, "view_variants": 1, "save_every": 99}  # two rounds of 24 images
    run_training(build_config(fields), tmp_path / "teacher")
    cached = {**fields, "teacher_cache": str(tmp_path / "cache")}
    for name in ("filling", "reading"):
        run_training(build_config(cached), tmp_path / name)
        for line, expected in zip(metrics(tmp_path / name), metrics(tmp_path / "teacher"), strict=True):
            assert line["loss"] == expected["loss"]


def test_targets_of_a_substitute_are_not_kept(settings, tmp_path):
    """An image that is repaired later must not meet what the teacher said of the one in its place."""
    crops = write_people(tmp_path / "crops", 8)
    good = (crops / "003.jpg").read_bytes()
    fields = {**settings, "data": [str(crops)], "batch": 8, "steps": 1, "view_variants": 1, "save_every": 99}
    run_training(build_config(fields), tmp_path / "truth")
    fields |= {"teacher_cache": str(tmp_path / "cache")}
    (crops / "003.jpg").write_bytes(good[: len(good) // 8])
    run_training(build_config(fields), tmp_path / "broken")
    (crops / "003.jpg").write_bytes(good)
    run_training(build_config(fields), tmp_path / "repaired")
    assert metrics(tmp_path / "broken")[0]["loss"] != metrics(tmp_path / "truth")[0]["loss"]
    assert metrics(tmp_path / "repaired")[0]["loss"] == metrics(tmp_path / "truth")[0]["loss"]


def test_other_backgrounds_are_refused_on_resume(settings, tmp_path):
    rooms = write_people(tmp_path / "rooms", 3)
    config = build_config({**settings, "backgrounds": [str(rooms)]})
    run_training(config, tmp_path / "run", watcher=Recorder(at=1))
    write_people(rooms, 4)
    with pytest.raises(ModelFileError, match="or other backgrounds or crowds"):
        run_training(config, tmp_path / "run", resume=True)


def test_a_full_cache_needs_no_teacher(settings, tmp_path, monkeypatch):
    from dpal_edge.train.methods.dpal import Dpal

    fields = {**settings, "batch": 8, "steps": 3, "view_variants": 1, "teacher_cache": str(tmp_path / "cache")}
    run_training(build_config(fields), tmp_path / "filling")
    monkeypatch.setattr(Dpal, "targets", lambda *_: pytest.fail("the teacher was asked"))
    run_training(build_config({**fields, "seed": 3, "data_seed": 0}), tmp_path / "reading")


def test_compiled_updates_are_the_same(settings, tmp_path, monkeypatch):
    """With the compiler's front end: its code for this machine takes minutes to make; bench/train_step.py runs it."""
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiling(self, backend="eager"))
    run_training(build_config({**settings, "steps": 1}), tmp_path / "eager")
    run_training(build_config({**settings, "steps": 1, "compile": True}), tmp_path / "compiled")
    for line, expected in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_probes_during_training(settings, tmp_path):
    from tests.tasks.layouts import write_market

    tasks = write_market(tmp_path / "market")
    fields = {**settings, "probe": [f"reid={tasks}"], "probe_every": 2, "probe_images": 8}
    summary = run_training(build_config(fields), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "probes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert {name: value for name, value in lines[-1].items() if name != "step"} == summary.probes
    assert 0 <= summary.probes["reid/mAP"] <= 1
    alone = run_training(build_config(settings), tmp_path / "alone")
    assert_equal_tensors(summary.checkpoint, alone.checkpoint)


def test_a_probe_that_was_due_when_the_run_was_killed_is_made_up_for(settings, tmp_path):
    from tests.tasks.layouts import write_market

    run = tmp_path / "run"
    fields = {**settings, "probe": [f"reid={write_market(tmp_path / 'market')}"], "probe_every": 2, "probe_images": 8}
    run_training(build_config(fields), run, watcher=Recorder(at=2))
    expected = (run / "probes.jsonl").read_text() if (run / "probes.jsonl").exists() else ""
    assert expected == ""  # a stop signal leaves little time
    run_training(build_config(fields), run, resume=True)
    steps = [json.loads(line)["step"] for line in (run / "probes.jsonl").read_text().splitlines()]
    assert steps == [2, 4]


def test_a_probe_after_the_last_checkpoint_is_made_again(settings, tmp_path):
    from tests.tasks.layouts import write_market

    run = tmp_path / "run"
    tasks = {"probe": [f"reid={write_market(tmp_path / 'market')}"], "probe_every": 3, "probe_images": 8}
    run_training(build_config({**settings, **tasks}), run, watcher=Recorder(at=2))
    (run / "probes.jsonl").write_text('{"step": 3, "reid/mAP": 9.0}\n')  # of updates that a crash undid
    run_training(build_config({**settings, **tasks}), run, resume=True)
    lines = [json.loads(line) for line in (run / "probes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[0]["reid/mAP"] <= 1


def test_a_probe_that_fails_does_not_end_the_run(settings, tmp_path):
    from tests.tasks.layouts import write_market

    market = write_market(tmp_path / "market")
    fields = {**settings, "probe": [f"reid={market}"], "probe_every": 2, "probe_images": 8}

    class Spoiler(Recorder):
        warnings = ()

        def started(self, facts):
            for path in (market / "query").iterdir():
                path.write_bytes(b"no image")

        def warned(self, text):
            self.warnings += (text,)

    watcher = Spoiler()
    summary = run_training(build_config(fields), tmp_path / "run", watcher=watcher)
    assert summary.step == 4
    assert summary.probes == {}
    assert [re.match(r"no probe at update \d: .*query", text) is not None for text in watcher.warnings] == [True, True]
