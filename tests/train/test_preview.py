import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dpal_edge.cli import main
from dpal_edge.errors import ConfigError
from dpal_edge.models.checkpoint import list_checkpoints
from dpal_edge.train import preview
from dpal_edge.train.cache import bytes_needed
from dpal_edge.train.config import build_config
from dpal_edge.train.data import PersonBatches
from dpal_edge.train.distributed import World
from dpal_edge.train.preview import Estimate, advise, describe, dry_run, measure, write_sheet
from dpal_edge.train.saver import state_tensors
from dpal_edge.train.setup import prepare

ESTIMATE = {
    "updates": 1000, "images": 5000, "batch": 50, "processes": 1, "workers": 4, "update_s": 0.5, "batch_s": 1.0,
    "device": "cuda:0", "memory": 20 * 10**9, "memory_there": 80 * 10**9, "kept": {"backbone": 3 * 10**9},
    "disk": 5 * 10**8, "cache": 0, "disk_there": 10**12,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_update_is_enough(monkeypatch):
    monkeypatch.setattr(preview, "_MEASURED", 1)


def test_wait_and_pace_by_hand():
    def waits(**fields):
        estimate = Estimate(**{**ESTIMATE, **fields})
        return estimate.wait, estimate.pace_s

    assert waits() == (0.0, 0.5)  # 4 workers make 4 batches a second, 2 are used
    assert waits(workers=1) == (0.5, 1.0)  # one makes one a second
    assert waits(workers=0) == pytest.approx((2 / 3, 1.5))  # one after the other


def test_lines_by_hand(config):
    time, data, memory, disk = describe(Estimate(**ESTIMATE))
    assert time == (
        "time      0.5 s to compute an update; 100.0 images/s; 1000 updates take 0:08:20, an epoch of 5000 images "
        "0:00:50"
    )
    assert data == (
        "data      1 s for one worker to make what a process needs for an update; with 4 workers 0 % of the time is "
        "spent waiting for it"
    )
    assert memory == "memory    20.0 GB of 80.0 GB on cuda:0; of it a pass keeps for its way back: backbone 3.0 GB"
    assert disk == "disk      500.0 MB for checkpoints, of 1000.0 GB that are free"
    assert advise(Estimate(**ESTIMATE), config) == ["fits      nothing needs to change"]
    several = describe(Estimate(**{**ESTIMATE, "processes": 5, "cache": 10**12}))
    assert "update, 10 of its 50 images by each of 5 processes;" in several[0]
    assert several[-1] == "cache     1000.0 GB for all that the teachers say"


def test_what_to_change(config):
    tight = {**ESTIMATE, "memory": 75 * 10**9, "batch_s": 4.0, "cache": 10**12}
    memory, data, disk = advise(Estimate(**tight), config)
    assert memory == "change    memory is tight: --set accumulate=2 halves what a pass takes at the same batch"
    assert data.startswith("change    data are too slow: --set workers=8 ")
    assert disk.startswith("change    the disk is too small: lower view_variants or leave teacher_cache out, ")


def test_dry_run_leaves_a_sheet_and_nothing_else(settings, tmp_path):
    run = tmp_path / "run"
    said = []
    text = dry_run(build_config(settings), run, resume=False, processes=1, say=said.append)
    assert [path.name for path in run.iterdir()] == ["views.png"]
    assert any(line.startswith("teacher   ") and "100 % of keys matched" in line for line in said)
    *lines, verdict = text.splitlines()
    assert [line.split()[0] for line in lines] == ["time", "data", "memory", "disk", "views"]
    assert verdict.split()[0] in ("fits", "change")
    assert "4 updates take" in text
    assert str(run / "views.png") in text


def test_estimate_of_a_run(settings, tmp_path):
    fields = {"view_variants": 3, "teacher_cache": str(tmp_path / "cache"), "keep": 4}
    setup = prepare(build_config({**settings, **fields}), tmp_path / "run", World())
    assert setup.state.cache is not None
    estimate = measure(setup, tmp_path / "run")
    values = sum(value.numel() for value in state_tensors(setup.state).values())
    assert estimate.disk == 5 * 4 * values  # all are float32 but the counts of updates, of 4 bytes as well
    # per image 1 class token, 8 patches, 1 + 12 tokens of the crowd, of 16 channels of 4 bytes, and 3 checksums
    assert estimate.cache == 3 * 24 * (16 * 4 * (1 + 8 + 13) + 3 * 4)
    assert estimate.cache == bytes_needed(72, {"g": (1, 16), "l": (8, 16), "r": (13, 16)}, torch.float32)
    assert not list((tmp_path / "cache").rglob("*.rows"))
    assert (estimate.updates, estimate.images, estimate.processes, estimate.workers) == (4, 24, 1, 0)
    assert estimate.update_s > 0
    assert 0 < estimate.memory < estimate.memory_there


def test_kept_memory_is_counted_by_part_and_grows_with_the_batch(settings, tmp_path):
    def kept(**fields):
        config = build_config({**settings, **fields})
        return measure(prepare(config, tmp_path / "run", World()), tmp_path).kept

    two, four = kept(batch=2), kept(batch=4)
    assert two.keys() == {"backbone", "decoder", "losses"}
    assert four["backbone"] == pytest.approx(2 * two["backbone"], rel=0.02)
    # Each of 5 decoder calls keeps 10 matrices of 192 x 16 values per image (models/decoder.py), and smaller things.
    assert 1 < two["decoder"] / (5 * 10 * 192 * 16 * 4 * 2) < 2.5
    assert kept(batch=4, accumulate=2) == two
    assert kept(batch=4, decoder_chunk=1)["decoder"] < 0.6 * four["decoder"]


def test_part_of_one_of_several_processes_is_measured(settings, tmp_path):
    setup = prepare(build_config({**settings, "batch": 8}), tmp_path, World())
    whole, part = measure(setup, tmp_path), measure(setup, tmp_path, processes=4)
    assert part.kept["backbone"] == pytest.approx(whole.kept["backbone"] / 4, rel=0.05)
    assert (part.batch, part.processes) == (8, 4)


@pytest.mark.parametrize(
    ("fields", "widths"),
    [
        # base and mask 64 x 32, two crops of 32 x 16, a crowd of 64 x 48, all 160 high
        ({"method": "dpal"}, [80, 80, 80, 80, 120]),
        ({"method": "dpal", "mask": "none"}, [80, 80, 80, 120]),
        ({"method": "proteus"}, [80, 80]),
    ],
)
def test_sheet_has_a_column_for_each_view_and_a_row_for_each_person(settings, tmp_path, fields, widths):
    setup = prepare(build_config({**settings, **fields}), tmp_path / "run", World())
    path = tmp_path / "views.png"
    write_sheet(path, setup)
    with Image.open(path) as sheet:
        assert sheet.size == (sum(widths) + 6 * (len(widths) + 1), 20 + 8 * 180)
        base = np.asarray(sheet)[34 : 34 + 160, 6:86].astype(float)
    first = PersonBatches(setup.data.train, setup.config, ("base",), batch=8)[0].base[0]
    expected = np.asarray(Image.fromarray(first.permute(1, 2, 0).numpy()).resize((80, 160), Image.Resampling.BICUBIC))
    assert abs(base - expected).max() <= 1


def test_hidden_patches_are_veiled():
    image = np.full((32, 16, 3), 100, np.uint8)
    veiled = preview._veiled(image, np.array([[1.0], [0.0]], np.float32))
    assert (veiled[:16] == 100).all()
    # 0.2 of 100 and 0.8 of the veil
    assert veiled[16:].reshape(-1, 3).min(0).tolist() == [52, 76, 172]


def test_command(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = ["train", "--teacher", settings["teacher"], "--data", settings["data"][0], "--out", str(run)]
    rest = settings.keys() - {"teacher", "data"}
    arguments += [text for key in rest for text in ("--set", f"{key}={json.dumps(settings[key])}")]
    result = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert f"\nviews     8 people, as training sees them: {run / 'views.png'}\n" in result.stderr
    assert list_checkpoints(run) == []
    assert CliRunner().invoke(main, [*arguments, "--steps", "1"]).exit_code == 0  # the folder is still free
    again = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert (again.exit_code, "already holds a run" in again.stderr) == (1, True)

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dpal_edge.train.loop.train_step", full)
    with pytest.raises(ConfigError, match="too little memory for 2 images at a time"):
        dry_run(build_config(settings), tmp_path / "other", resume=False, processes=1, say=len)
