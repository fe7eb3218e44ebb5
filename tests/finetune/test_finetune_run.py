"""Whole runs on tiny data: several tasks at once, stops and resumes, bad data, and what can be done with the result."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dpal_edge.errors import ConfigError, DataError, ModelFileError
from dpal_edge.files import read_lines
from dpal_edge.finetune.config import build_config
from dpal_edge.finetune.loop import learning_rate, parameter_groups
from dpal_edge.finetune.run import run_finetuning
from dpal_edge.finetune.setup import build_model, crop_size, open_init, open_objectives
from dpal_edge.finetune.watcher import Watcher
from dpal_edge.models.checkpoint import list_checkpoints, load_backbone, read_checkpoint, read_newest, write_checkpoint
from dpal_edge.models.human import load_human
from tests.tasks import layouts


class Recorder(Watcher):
    """Keeps what it is told, and sends itself a signal when asked."""

    def __init__(self, at=None, number=signal.SIGTERM):
        self.losses, self._at, self._number = {}, at, number

    def recorded(self, step, numbers):
        self.losses[step] = numbers["loss"]
        if step == self._at:
            os.kill(os.getpid(), self._number)


def last_tensors(run: Path):
    return load_file(read_newest(run)[0])


def test_all_tasks_on_one_backbone(settings, tmp_path):
    summary = run_finetuning(build_config(settings), tmp_path / "run")
    assert (summary.step, summary.interrupted) == (4, False)
    assert {"pose", "parsing/lovasz", "attributes", "reid/triplet", "loss"} <= summary.values.keys()
    model, metadata = load_human(tmp_path / "run")
    assert {task: head.kind for task, head in model.configs.items()} == {
        "pose": "simcc", "parsing": "upsample", "attributes": "query", "reid": "bnneck",
    }  # fmt: skip
    assert (model.configs["pose"].labels, model.configs["pose"].channels) == (layouts.JOINTS, 128)
    with torch.no_grad():
        outputs = model(torch.zeros(2, 3, 32, 16))
    assert {task: tuple(value.shape) for task, value in outputs.items()} == {
        "pose": (2, 5, 96), "parsing": (2, 3, 8, 4), "attributes": (2, 3), "reid": (2, 256),
    }  # fmt: skip
    assert metadata["best"] in ("backbone", "ema")
    assert not any("classify" in name for name in model.heads["reid"].state_dict())  # identities stay in training


def test_losses_fall_on_data_that_pixels_alone_solve(settings, tmp_path):
    watcher = Recorder()
    plain = {"flip": 0.0, "scale": 0.0, "rotate": 0.0, "shift": 0.0, "colour": 0.0, "grey": 0.0, "low_resolution": 0.0}
    config = build_config({**settings, **plain, "steps": 40, "drop_path": 0.0, "save_every": 100})
    run_finetuning(config, tmp_path / "run", watcher=watcher)
    assert np.mean([watcher.losses[s] for s in range(36, 41)]) < 0.6 * watcher.losses[1]


@pytest.mark.parametrize(("workers", "optimizer"), [(0, "adamw"), (1, "muon")])
def test_a_resumed_run_ends_with_the_same_weights(settings, tmp_path, workers, optimizer):
    config = build_config({**settings, "workers": workers, "optimizer": optimizer})
    run_finetuning(config, tmp_path / "whole")
    stopped = run_finetuning(config, tmp_path / "parts", watcher=Recorder(at=1))
    assert (stopped.interrupted, stopped.step) == (True, 1)
    run_finetuning(config, tmp_path / "parts", resume=True)
    one, two = last_tensors(tmp_path / "whole"), last_tensors(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_what_a_worker_cannot_read_is_one_line(settings, tmp_path):
    folder = layouts.write_attributes(tmp_path / "attributes", images=40)
    for image in (folder / "images").iterdir():
        image.write_bytes(b"no image")
    changes = {"task": [f"attributes={folder}"], "share": [], "workers": 1, "validation_images": 0}
    with pytest.raises(DataError) as caught:
        run_finetuning(build_config({**settings, **changes}), tmp_path / "run")
    assert str(caught.value).startswith("attributes: 20 examples in a row cannot be used; the last: ")
    assert "\n" not in str(caught.value)


def test_scores_on_the_evaluation_parts(settings, tmp_path):
    summary = run_finetuning(build_config({**settings, "evaluate_every": 2, "evaluate_images": 8}), tmp_path / "run")
    assert {"pose", "parsing", "attributes", "reid"} == summary.scores.keys()
    assert 0 <= summary.scores["parsing"]["mIoU"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["pose"] == summary.scores["pose"]
    config = build_config({**settings, "evaluate_every": 2, "evaluate_images": 8})
    run_finetuning(config, tmp_path / "run", resume=True)  # nothing is left to do
    assert len((tmp_path / "run" / "scores.jsonl").read_text().splitlines()) == 2
    (tmp_path / "run" / "scores.jsonl").write_text(json.dumps(lines[0]) + "\n")  # as if stopped while it was scored
    run_finetuning(config, tmp_path / "run", resume=True)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "scores.jsonl")] == [2, 4]


def test_a_frozen_backbone_stays_as_it_is(settings, tmp_path):
    config = build_config({**settings, "freeze_backbone": True})
    run_finetuning(config, tmp_path / "run")
    before = open_init(config).backbone.state_dict()
    after = load_backbone(tmp_path / "run" / "checkpoints" / "step-00000004.safetensors", weights="backbone")[0]
    changed = [name for name, value in after.state_dict().items() if not torch.equal(value, before.get(name, value))]
    assert changed == ["pos_embed"]  # resized to the crops' grid


def test_frozen_blocks_stay_as_they_are(settings, tmp_path):
    config = build_config({**settings, "freeze_blocks": 11})
    run_finetuning(config, tmp_path / "run")
    before = open_init(config).backbone.state_dict()
    after = load_backbone(tmp_path / "run" / "checkpoints" / "step-00000004.safetensors", weights="backbone")[0]
    moved = {name.split(".")[1] for name, value in after.state_dict().items()
             if name.startswith("blocks.") and not torch.equal(value, before[name])}  # fmt: skip
    assert moved == {"11"}


def test_learning_rates_decay_from_block_to_block(settings):
    config = build_config({**settings, "layer_decay": 0.5})
    start = open_init(config)
    size = crop_size(config, start)
    train, _ = open_objectives(config, size, start.backbone.config)
    model = build_model(start, train, config)
    groups = parameter_groups(model, torch.nn.ModuleDict(), config)
    factors = {id(p): (group["factor"], group["weight_decay"]) for group in groups for p in group["params"]}

    def of(name):
        return factors[id(model.get_parameter(name))]

    assert of("heads.pose.maps.weight") == (1.0, 0.05)
    assert of("backbone.norm.weight") == (1.0, 0.0)
    assert of("backbone.blocks.11.mlp.fc1.weight") == (0.5, 0.05)
    assert of("backbone.blocks.0.mlp.fc1.weight") == (0.5**12, 0.05)
    assert of("backbone.patch_embed.proj.weight") == (0.5**13, 0.05)
    assert of("backbone.pos_embed") == (0.5**13, 0.0)
    assert of("heads.attributes.queries")[1] == 0.0


def test_what_merges_patches_learns_as_the_last_block_of_its_stage(settings):
    config = build_config({**settings, "init": "random:swin_tiny", "size": [64, 32], "layer_decay": 0.5})
    start = open_init(config)
    train, _ = open_objectives(config, (64, 32), start.backbone.config)
    model = build_model(start, train, config)
    groups = parameter_groups(model, torch.nn.ModuleDict(), config)
    factors = {id(p): group["factor"] for group in groups for p in group["params"]}
    names = dict(model.backbone.named_parameters())
    merging = [name for name in names if name.startswith("stages.1.downsample.")]
    assert merging
    assert {factors[id(names[name])] for name in merging} == {factors[id(names["stages.1.blocks.1.mlp.fc1.weight"])]}


def test_people_of_one_image_are_held_out_together(settings, tmp_path):
    folder = layouts.write_coco(tmp_path / "coco", people=44)
    config = build_config({**settings, "task": [f"pose={folder}"], "share": [], "validation_images": 64})
    learned, held = (parts["pose"] for parts in open_objectives(config, (32, 16), open_init(config).backbone.config))
    images = [{part.file(i) for i in range(len(part))} for part in (learned, held)]
    assert (len(learned), len(held)) == (40, 4)  # a tenth, of two people each
    assert [len(names) for names in images] == [20, 2]
    assert not images[0] & images[1]


def test_crops_stay_as_large_as_the_init_had_them(settings, tmp_path):
    run_finetuning(build_config({**settings, "size": [48, 32]}), tmp_path / "first")
    config = build_config({**settings, "init": str(tmp_path / "first"), "size": None})
    assert crop_size(config, open_init(config)) == (48, 32)


def test_a_head_that_normalises_over_people_needs_two(settings, tmp_path):
    config = build_config({**settings, "attribute_head": "linear", "batch": 11, "share": []})
    with pytest.raises(ConfigError, match="attributes gets 1 image of each update, and its linear head normalises"):
        run_finetuning(config, tmp_path / "run")


def test_an_evaluation_that_is_not_possible_does_not_end_the_run(settings, tmp_path):
    class Told(Watcher):
        reasons: ClassVar[list[str]] = []

        def unevaluated(self, step, reason):
            self.reasons.append((step, reason))

    changes = {"task": settings["task"][2:3], "share": [], "evaluate_every": 2, "evaluate_images": 1}
    summary = run_finetuning(build_config({**settings, **changes}), tmp_path / "run", watcher=Told())
    assert (summary.step, summary.scores) == (4, {})
    assert [step for step, _ in Told.reasons] == [2, 4]
    assert "of 1 people" in Told.reasons[0][1]


def test_another_teacher_is_noticed(settings, folders, tmp_path):
    labelled = {"task": [f"attributes={folders['attributes']}"], "share": []}
    run_finetuning(build_config({**settings, **labelled}), tmp_path / "teacher")
    images = str(folders["reid"] / "bounding_box_train")
    taught = {"task": [f"attributes={images}"], "share": [], "attribute_teacher": str(tmp_path / "teacher")}
    config = build_config({**settings, **taught})
    run_finetuning(config, tmp_path / "run", watcher=Recorder(at=1))
    told = read_newest(tmp_path / "run")[1].metadata["taught_by"]
    assert list(told["attributes"]) == ["step-00000004.safetensors"]
    run_finetuning(build_config({**settings, **labelled, "steps": 6}), tmp_path / "teacher", resume=True)
    with pytest.raises(
        ModelFileError,
        match=r"the teacher of attributes was step-00000004\.safetensors when the run began, and is another",
    ):
        run_finetuning(config, tmp_path / "run", resume=True)


def test_the_learning_rate_rises_and_falls(settings):
    config = build_config({**settings, "steps": 100, "warmup": 0.1, "lr": 1.0})
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 10
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001


def test_heads_of_the_init_go_on_where_they_were(settings, tmp_path):
    run_finetuning(build_config(settings), tmp_path / "first")
    config = build_config({**settings, "init": str(tmp_path / "first"), "task": settings["task"][:2], "share": []})
    start = open_init(config)
    train, _ = open_objectives(config, crop_size(config, start), start.backbone.config)
    model = build_model(start, train, config)
    first, _ = load_human(tmp_path / "first")
    assert torch.equal(model.heads["pose"].maps.weight, first.heads["pose"].maps.weight)
    assert list(model.heads) == ["pose", "parsing"]


def test_limits_of_the_init_stay_with_what_comes_of_it(settings, tmp_path):
    first = tmp_path / "first"
    changes = {"task": settings["task"][:1], "share": [], "steps": 1}
    run_finetuning(build_config({**settings, **changes}), first)
    saved = read_newest(first)[1]
    write_checkpoint(tmp_path / "a.safetensors", saved.tensors, {**saved.metadata, "limits": "indoors only"})
    run_finetuning(build_config({**settings, **changes, "init": str(tmp_path / "a.safetensors")}), tmp_path / "second")
    assert read_newest(tmp_path / "second")[1].metadata["limits"] == "indoors only"
    assert "limits" not in saved.metadata


def test_a_fine_tuned_model_can_teach(settings, tmp_path):
    from dpal_edge.models.teacher import load_teachers

    run_finetuning(build_config(settings), tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints").iterdir())
    [teacher] = load_teachers((str(file),), size=(32, 16)).each()
    assert teacher.passport.keys_matched == 1.0


def test_a_bad_annotation_is_left_out_and_counted(settings, tmp_path):
    folder = layouts.write_coco(tmp_path / "coco", people=60)
    path = folder / "annotations" / "person_keypoints_train.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["keypoints"][0] = math.nan
    path.write_text(json.dumps(document))
    config = build_config({**settings, "task": [f"pose={folder}"], "share": []})
    summary = run_finetuning(config, tmp_path / "run")
    assert summary.problems == {"pose": 1}
    [line] = (tmp_path / "run" / "problems.jsonl").read_text().splitlines()
    assert "annotation 0" in json.loads(line)["problem"]


def test_an_unreadable_image_is_replaced_and_named(settings, tmp_path):
    folder = layouts.write_attributes(tmp_path / "attributes", images=40)
    (folder / "images" / "003.png").write_bytes(b"no image")
    config = build_config({**settings, "task": [f"attributes={folder}"], "share": [], "steps": 5})
    summary = run_finetuning(config, tmp_path / "run")
    assert [Path(file).name for file in summary.skipped] == ["003.png"]
    assert "cannot be read as an image" in (tmp_path / "run" / "skipped.jsonl").read_text()
    (folder / "images" / "003.png").write_bytes((folder / "images" / "004.png").read_bytes())
    resumed = run_finetuning(replace(config, steps=6), tmp_path / "run", resume=True)
    assert resumed.skipped == {}  # it was mended
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


def test_too_many_unreadable_images_end_the_run(settings, tmp_path):
    folder = layouts.write_attributes(tmp_path / "attributes", images=40)
    for i in range(0, 40, 4):
        (folder / "images" / f"{i:03d}.png").write_bytes(b"no image")
    config = build_config({**settings, "task": [f"attributes={folder}"], "share": [], "steps": 50})
    with pytest.raises(
        DataError, match=r"of \d+ images cannot be used \(more than 5 %\), for example .*is saved, --resum"
    ):
        run_finetuning(config, tmp_path / "run")
    begun = read_newest(tmp_path / "run")[1].metadata["step"]
    assert begun > 0
    for i in range(0, 40, 4):
        (folder / "images" / f"{i:03d}.png").write_bytes((folder / "images" / "001.png").read_bytes())
    summary = run_finetuning(replace(config, steps=begun + 1), tmp_path / "run", resume=True)
    assert (summary.step, summary.skipped) == (begun + 1, {})


def test_a_mask_with_an_unknown_class_is_named(settings, tmp_path):
    folder = layouts.write_lip(tmp_path / "lip", images=40)
    path = folder / "train_segmentations" / "train_3.png"
    mask = np.array(Image.open(path))
    mask[5, 5] = 9
    Image.fromarray(mask).save(path)
    config = build_config({**settings, "task": [f"parsing={folder}"], "share": [], "steps": 5})
    summary = run_finetuning(config, tmp_path / "run")
    [reason] = summary.skipped.values()
    assert "class 9 in it, expected 0 to 2" in reason


def test_a_loss_that_is_not_finite_ends_the_run(settings, tmp_path):
    config = build_config({**settings, "lr": 1e30, "clip": 0.0, "warmup": 0.0, "steps": 10})
    with pytest.raises(DataError, match=r"is not finite .*with a smaller --set lr"):
        run_finetuning(config, tmp_path / "run")


@pytest.mark.parametrize("order", ["bright,red,never", "red,bright,never,new"])
def test_other_labels_than_at_the_start_are_refused(settings, tmp_path, order):
    folder = layouts.write_attributes(tmp_path / "attributes", images=40)
    config = build_config({**settings, "task": [f"attributes={folder}"], "share": []})
    run_finetuning(config, tmp_path / "run")
    [path] = folder.glob("*.csv")
    rows = path.read_text().splitlines()[1:]
    more = ",1" * (order.count(",") - 2)
    path.write_text("\n".join([f"image,split,{order}", *(row + more for row in rows)]))
    with pytest.raises(
        ModelFileError, match=r"the head for attributes has changed since the run began: labels were .*'re"
    ):
        run_finetuning(replace(config, steps=6), tmp_path / "run", resume=True)


def test_a_signal_during_the_last_save_does_not_lose_it(settings, tmp_path):
    class Late(Watcher):
        def saved(self, path, validation):
            os.kill(os.getpid(), signal.SIGTERM)

    summary = run_finetuning(build_config({**settings, "save_every": 9}), tmp_path / "run", watcher=Late())
    assert summary.checkpoint.exists()
    assert not summary.interrupted


def test_data_that_cannot_be_evaluated_are_refused_at_the_start(settings, folders, tmp_path):
    folder = layouts.write_coco(tmp_path / "coco")
    path = folder / "annotations" / "person_keypoints_val.json"
    path.write_text(path.read_text().replace('"left_hip"', '"nose"'))
    config = build_config({**settings, "task": [f"pose={folder}"], "share": [], "evaluate_every": 2})
    with pytest.raises(ConfigError, match="has nose, which the model's pose head does not know"):
        run_finetuning(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_heads_without_a_task_are_named_and_a_window_is_kept(settings, folders, tmp_path):
    begun = {
        **settings,
        "window": [2, 2],
        "task": [f"{t}={folders[t]}" for t in ("parsing", "attributes")],
        "share": [],
    }
    run_finetuning(build_config({**begun, "size": [64, 64]}), tmp_path / "first")
    told = {}

    class Told(Watcher):
        def started(self, facts):
            told.update(facts)

    going = {**settings, "init": str(tmp_path / "first"), "task": [f"parsing={folders['parsing']}"], "share": []}
    run_finetuning(build_config({**going, "size": [64, 32]}), tmp_path / "second", watcher=Told())
    assert told["dropped"] == ["attributes"]
    assert load_human(tmp_path / "second")[0].backbone.config.window == (2, 2)
    # A run that goes on attends as it did, whatever its init's window is: earlier versions took none from it.
    [path] = list_checkpoints(tmp_path / "second")[-1:]
    saved = read_checkpoint(path)
    saved.metadata["architecture"]["window"] = None
    write_checkpoint(path, saved.tensors, saved.metadata)
    run_finetuning(build_config({**going, "size": [64, 32], "steps": 5}), tmp_path / "second", resume=True)
    assert load_human(tmp_path / "second")[0].backbone.config.window is None
    run_finetuning(build_config({**going, "size": [48, 32]}), tmp_path / "third")  # 3 rows of patches
    assert load_human(tmp_path / "third")[0].backbone.config.window is None


def test_a_used_folder_is_refused(settings, tmp_path):
    run_finetuning(build_config(settings), tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run; go on with it by --resume"):
        run_finetuning(build_config(settings), tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot resume with other settings; the run has seed=0"):
        run_finetuning(build_config({**settings, "seed": 1}), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="steps is 2, but 4 updates are done already"):
        run_finetuning(build_config({**settings, "steps": 2}), tmp_path / "run", resume=True)


def test_a_smaller_batch_goes_on_where_memory_ran_out(settings, tmp_path):
    run_finetuning(build_config(settings), tmp_path / "run", watcher=Recorder(at=1))
    summary = run_finetuning(build_config({**settings, "batch": 11}), tmp_path / "run", resume=True)
    assert summary.step == settings["steps"]


def test_a_setting_that_the_run_s_version_did_not_know_counts_as_its_default(settings, tmp_path):
    run_finetuning(build_config(settings), tmp_path / "run", watcher=Recorder(at=1))
    [path] = list_checkpoints(tmp_path / "run")
    saved = read_checkpoint(path)
    del saved.metadata["config"]["mosaic"]
    write_checkpoint(path, saved.tensors, saved.metadata)
    with pytest.raises(ConfigError, match=r"cannot resume with other settings; the run has mosaic=0\.0"):
        run_finetuning(build_config({**settings, "mosaic": 0.5}), tmp_path / "run", resume=True)
    assert run_finetuning(build_config(settings), tmp_path / "run", resume=True).step == settings["steps"]


def test_changed_images_are_noticed(settings, folders, tmp_path):
    folder = layouts.write_attributes(tmp_path / "attributes")
    config = build_config({**settings, "task": [f"attributes={folder}"], "share": []})
    run_finetuning(config, tmp_path / "run", watcher=Recorder(at=1))
    table = folder / "attributes.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    with pytest.raises(ModelFileError, match="the images have changed since the run began"):
        run_finetuning(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "random:vit_huge"}, "no student 'vit_huge', expected one of: vit_tiny"),
        ({"init": "missing.pth"}, "missing.pth: no such file"),
        ({"size": [30, 16]}, r"size is \(30, 16\), expected positive multiples of the patch size 16"),
        ({"freeze_blocks": 13}, "freeze_blocks is 13, expected blocks of a ViT, at most its depth"),
    ],
)
def test_wrong_starts(settings, tmp_path, changes, message):
    with pytest.raises((ConfigError, ModelFileError), match=message):
        run_finetuning(build_config({**settings, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
