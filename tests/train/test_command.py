import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dpal_edge.cli import main
from dpal_edge.errors import BackendUnavailable, ConfigError
from dpal_edge.train import command
from dpal_edge.train.command import describe, resolve
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.run import Summary
from dpal_edge.train.watcher import Record

NEEDED = {"teacher": ("t.pth",), "data": ("crops",)}


def test_what_comes_later_wins(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"clip": 2.0, "batch": 12, "steps": 7, "student": "vit_small", "seed": 3}))
    config = resolve(
        tmp_path / "run",
        **NEEDED,
        preset="published",
        file=file,
        student="vit_tiny",
        steps=9,
        method=None,
        recipe="attn",
        teacher_layer=11,
        settings=("batch=16", "heads=3", "trackers=[]"),
    )
    assert (config.options.mask, config.crowd) == ("published", "self")  # of the preset
    assert (config.clip, config.seed) == (2.0, 3)  # of the file
    assert (config.student, config.steps, config.teacher_layer, config.options.recipe) == ("vit_tiny", 9, 11, "attn")
    assert (config.batch, config.heads, config.trackers) == (16, "3", ())


def test_settings_of_the_run_come_first_on_resume(tmp_path):
    first = resolve(tmp_path, **NEEDED, settings=("batch=8",), steps=5)
    (tmp_path / "config.json").write_text(json.dumps(first.to_dict()))
    assert resolve(tmp_path, resume=True) == first
    assert resolve(tmp_path, resume=True, steps=6).steps == 6
    assert resolve(tmp_path, resume=True, settings=("accumulate=2",)).batch == 8
    with pytest.raises(ConfigError, match="begun with method dpal, not proteus; start a new run for another"):
        resolve(tmp_path, resume=True, method="proteus")


def test_paths_are_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("crops")
    settings = (
        'backgrounds=["rooms"]',
        "probe=reid=market",
        "view_variants=4",
        "teacher_cache=cache",
        'crowd_data="s3://bucket/crowds"',
        "crowd_source=mixed",
    )
    config = resolve(
        Path("run"),
        teacher=("timm:vit_base@w.pth?for=local,relation", "reid.pth?for=global"),
        data=("link", "s3://bucket/{000..127}.tar", "shards/{0..3}.tar"),
        settings=settings,
    )
    assert config.data == (f"{tmp_path}/crops", "s3://bucket/{000..127}.tar", f"{tmp_path}/shards/{{0..3}}.tar")
    assert config.teacher == (f"timm:vit_base@{tmp_path}/w.pth?for=local,relation", f"{tmp_path}/reid.pth?for=global")
    assert config.backgrounds == (f"{tmp_path}/rooms",)
    assert config.crowd_data == ("s3://bucket/crowds",)
    assert config.probe == (f"reid={tmp_path}/market",)
    assert config.teacher_cache == f"{tmp_path}/cache"
    assert resolve(Path("run"), **NEEDED, settings=("probe=reid",)).probe == ("reid",)  # refused where it is read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no teacher: give --teacher SPEC"),
        ({"teacher": ("t.pth",)}, "no data: give --data DIR"),
        ({**NEEDED, "steps": 2, "epochs": 1.0}, "both --steps and --epochs are given; give one"),
        ({**NEEDED, "epochs": 0.0}, "--epochs is 0.0, expected more than 0"),
        ({**NEEDED, "epochs": float("nan")}, "--epochs is nan, expected more than 0"),
        (
            {**NEEDED, "method": "proteus", "preset": "published"},
            "preset published is DPAL's, and the method is proteus",
        ),
        ({**NEEDED, "method": "tinymim", "recipe": "attn"}, "unknown setting recipe"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        resolve(tmp_path / "run", **options)


def test_tracker_that_is_missing_is_met_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("dpal_edge.train.trackers.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="tracker 'wandb' is not installed: pip install wandb"):
        resolve(tmp_path, **NEEDED, settings=("trackers=wandb",))


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(3.0, 3, 22), (0.01, 4, 1), (1.0, 22, 1)])
def test_epochs_count_the_images_that_are_not_held_out(tmp_path, people, epochs, batch, steps):
    settings = (f"batch={batch}", "validation_images=2")
    config = resolve(tmp_path, teacher=("t.pth",), data=(str(people),), epochs=epochs, settings=settings)
    assert config.steps == steps  # of 22 images


def test_several_processes_run_the_command_once_more(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "launch", lambda *given: calls.append(given) or 7)
    arguments = ["train", "--teacher", "t.pth", "--data", "crops", "--out", str(tmp_path / "run"), "--processes", "4"]
    assert CliRunner().invoke(main, arguments).exit_code == 7
    assert calls == [(4, arguments)]
    assert not (tmp_path / "run").exists()
    # In one of those processes it trains: here it gets as far as the data.
    monkeypatch.setattr(command, "in_worker", lambda: True)
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, len(calls)) == (1, 1)
    assert "crops: does not exist" in result.stderr


def test_a_batch_that_processes_cannot_share_is_refused_before_they_start(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "launch", lambda *_: pytest.fail("started"))
    arguments = ["train", "--teacher", "t.pth", "--data", "crops", "--out", str(tmp_path / "run"), "--processes", "3"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "batch is 256, expected a multiple of 3 processes times accumulate=1; for example --set batch=255" in (
        result.stderr
    )


def test_one_process_for_each_gpu_that_the_settings_allow(monkeypatch):
    def count(gpus, device):
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        return command._one_per_gpu(TrainConfig(device=device))

    assert [count(0, "auto"), count(1, "auto"), count(8, "auto"), count(8, "cuda")] == [1, 1, 8, 8]
    assert [count(8, "cpu"), count(8, "cuda:3")] == [1, 1]


def summary(**fields):
    last = Record(9, 80.0, 0.01, 1e-4, {"loss": 1.25, "qk": 0.5, "usage/global/0": 0.9})
    known = {"checkpoint": Path("run/checkpoints/step-9"), "step": 9, "interrupted": False, "device": "cpu"}
    known |= {"precision": "bf16", "seconds": 60.0, "images_per_s": 81.26, "data_wait": 0.0123, "last": last}
    return Summary(**{**known, "validation": {}, "probes": {}, **fields})


def test_what_is_said_at_the_end():
    skipped = dict.fromkeys(("d", "c", "b", "a"), "why")
    said = describe(
        summary(validation={"backbone": 0.5, "ema": 0.25}, probes={"reid/mAP": 0.125}, skipped=skipped), Path("run")
    )
    assert said.splitlines() == [
        "81.3 images/s over 60 s, 1.2 % of it waiting for data; loss 1.25, qk 0.5",
        "loss on held-out images: backbone 0.5000, ema 0.2500",
        "probe: reid/mAP 0.125",
        "skipped 4 unreadable files: a, b, c and 1 more; all are in run/skipped.jsonl",
        "report: run/report.html",
        "done: run/checkpoints/step-9",
        "next: dpal-edge export run --target onnx --out BUNDLE",
    ]
    stopped = describe(summary(interrupted=True, last=None), Path("run"))
    assert stopped.endswith("stopped after update 9; go on with: dpal-edge train --out run --resume")


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_only_the_first_process_speaks_and_a_stop_is_130(tmp_path, monkeypatch, rank, speaks):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(command, "run_training", lambda *given, **options: summary(interrupted=True))
    said = []
    options = {"resume": False, "dry": False, "processes": 1, "arguments": [], "say": said.append}
    assert command.train(TrainConfig(), tmp_path, **options) == 130
    assert bool(said) is speaks
