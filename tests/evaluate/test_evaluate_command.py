"""``dpal-edge evaluate`` as a call: checkpoints and bundles alike, the latter without torch."""

import json
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from dpal_edge.errors import BackendUnavailable, ConfigError, DataError, ModelFileError
from dpal_edge.evaluate.command import evaluate
from dpal_edge.evaluate.validation import evaluate_model
from tests.evaluate.conftest import (
    CROPS,
    DETECTOR,
    FRAMES,
    HEADS,
    MEAN,
    PEOPLE,
    STD,
    export_run,
    save_run,
    tiny_model,
)
from tests.runtime.tiny_bundle import write_bundle
from tests.tasks import layouts

HEADLINES = {"reid": "mAP", "parsing": "mIoU", "pose": "PCK@0.2", "attributes": "mA"}

BLOCKED = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "timm", "torchvision", "safetensors"):
            raise ModuleNotFoundError(f"no {name} on devices", name=name)
sys.meta_path.insert(0, Block())
from dpal_edge.errors import BackendUnavailable
from dpal_edge.evaluate.command import evaluate
results = [evaluate(model, tasks=tasks).to_dict() for model, tasks in json.loads(sys.argv[1])]
assert not {"torch", "timm", "torchvision"} & set(sys.modules)
try:
    evaluate(sys.argv[2], tasks=json.loads(sys.argv[1])[0][1])
except BackendUnavailable as error:
    print(error, file=sys.stderr)
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def options(folders):
    return [f"{task}={folders[task]}" for task in PEOPLE]


@pytest.fixture(scope="session")
def result(run, options):
    return evaluate(str(run), tasks=options, device="cpu", batch=5)


def close(one, other):
    """Say that two sets of metrics agree but for a pixel or rank that hangs on the last bit."""
    assert list(one) == list(other)
    return all(value == pytest.approx(other[name], abs=2e-3, nan_ok=True) for name, value in one.items())


def test_what_a_result_tells(result, run, folders):
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    told = document["model"]
    file = run / "checkpoints" / "step-00000007.safetensors"
    assert (told["kind"], told["file"], told["weights"], told["step"]) == ("checkpoint", str(file), "backbone", 7)
    assert (told["architecture"], told["size"], told["device"], told["precision"]) == (
        "vit_tiny",
        [64, 32],
        "cpu",
        "float32",
    )
    assert told["engine"] == f"torch {torch.__version__}"
    assert len(told["sha256"]) == 64
    assert (document["flip"], document["limit"], document["seed"]) == (False, None, 0)
    assert document["dpal_edge"]
    assert list(document["tasks"]) == list(PEOPLE)
    counts = {task: found["images"] for task, found in document["tasks"].items()}
    assert counts == {
        "reid": {"query": 6, "gallery": 7},
        "parsing": {"val": 10},
        "pose": {"val": 12},
        "attributes": {"val": 16},
    }
    for task, found in document["tasks"].items():
        assert found["data"] == str(folders[task])
        assert found["problems"] == []
        assert 0 <= found["metrics"][HEADLINES[task]] <= 1
        assert found["standard_errors"][HEADLINES[task]] >= 0


def test_text(result):
    lines = result.as_text().splitlines()
    assert lines[0].endswith("(vit_tiny, checkpoint) at 64x32")
    assert lines[1] == f"run    torch {torch.__version__} on cpu in float32"
    assert f"parsing on 10 val images of {result.tasks['parsing'].data}" in lines
    found = result.tasks["parsing"]
    assert f"  mIoU            {found.metrics['mIoU']:.3f} ± {found.standard_errors['mIoU']:.3f}" in lines


def test_a_bundle_gives_the_numbers_of_its_checkpoint_without_torch(
    result, bundle, detector_run, detector_bundle, options, folders
):
    frames = [f"detection={folders['detection']}"]
    jobs = json.dumps([[str(bundle), options], [str(detector_bundle), frames]])
    command = [sys.executable, "-c", BLOCKED, jobs, str(detector_run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{detector_run} needs torch: pip install 'dpal-edge[train]'\n"
    people, detector = json.loads(done.stdout)
    assert people["model"]["kind"] == "bundle"
    assert people["model"]["engine"].startswith("onnxruntime ")
    assert (people["model"]["target"], people["model"]["precision"], people["model"]["device"]) == (
        "onnx",
        "float32",
        "cpu",
    )
    for task, found in people["tasks"].items():
        assert close(found["metrics"], result.tasks[task].metrics), task
        assert found["images"] == result.tasks[task].images
    expected = evaluate(str(detector_run), tasks=frames, device="cpu").tasks["detection"]
    assert close(detector["tasks"]["detection"]["metrics"], expected.metrics)


def test_another_engine_gives_the_same(bundle, options, result):
    pytest.importorskip("openvino")
    found = evaluate(str(bundle), tasks=options, engine="openvino")
    assert found.model["engine"].startswith("openvino ")
    for task, scored in found.tasks.items():
        assert close(scored.metrics, result.tasks[task].metrics), task


def test_the_flip_test_is_the_same_from_a_bundle(run, bundle, options, result):
    expected = evaluate(str(run), tasks=options, device="cpu", flip=True)
    found = evaluate(str(bundle), tasks=options, flip=True)
    for task, scored in found.tasks.items():
        assert close(scored.metrics, expected.tasks[task].metrics), task
    assert found.tasks != result.tasks
    assert "flip test" in found.as_text()


def test_a_backbone_is_scored_by_its_global_token(tmp_path, folders, run, bundle):
    """Also one with heads, but none for re-identification; as the bundle's embedding."""
    heads = {"attributes": HEADS["attributes"]}
    model = tiny_model(CROPS, heads)
    plain = save_run(tmp_path / "run", model, {"attributes": folders["attributes"]})
    task = [f"reid={folders['reid']}"]
    from_run = evaluate(str(plain), tasks=task, device="cpu").tasks["reid"].metrics
    from_bundle = evaluate(str(export_run(plain, tmp_path / "bundle", folders["pose"] / "val")), tasks=task)
    assert close(from_bundle.tasks["reid"].metrics, from_run)


def test_weights_and_precision_of_a_checkpoint(run, options, result):
    ema = evaluate(str(run), tasks=options, device="cpu", weights="ema")
    assert ema.model["weights"] == "ema"
    assert ema.tasks != result.tasks
    low = evaluate(str(run), tasks=options, device="cpu", precision="bf16")
    assert low.model["precision"] == "bf16"
    with pytest.raises(ConfigError, match="precision 'int4': expected one of: float32, bf16, fp16"):
        evaluate(str(run), tasks=options, device="cpu", precision="int4")


def test_engine_and_target_of_a_bundle(bundle, folders, run):
    task = [f"attributes={folders['attributes']}"]
    found = evaluate(str(bundle), tasks=task, engine="onnxruntime", target="onnx")
    assert found.model["target"] == "onnx"
    with pytest.raises(BackendUnavailable, match="cannot run onnx-int8 with any engine here; it holds onnx, "):
        evaluate(str(bundle), tasks=task, target="onnx-int8")
    with pytest.raises(BackendUnavailable, match="cannot run any target with tensorrt"):
        evaluate(str(bundle), tasks=task, engine="tensorrt")
    for given in ({"weights": "ema"}, {"precision": "float32"}):
        with pytest.raises(ConfigError, match="the weights and the precision it was exported with; leave both out"):
            evaluate(str(bundle), tasks=task, **given)
    with pytest.raises(ConfigError, match="no bundle, so it has no engine and no target to choose"):
        evaluate(str(run), tasks=task, target="onnx")


def test_progress_and_limit(run, options):
    totals, done = [], []

    @contextmanager
    def progress(total):
        totals.append(total)
        yield done.append

    found = evaluate(str(run), tasks=options, device="cpu", limit=4, progress=progress)
    assert totals == [sum(done)]
    assert all(1 <= count <= 4 for task in found.tasks.values() for count in task.images.values())
    assert found.limit == 4
    assert found.as_text().splitlines()[1].endswith("in float32, at most 4 images of each split")


def test_only_the_evaluation_part_is_needed(run, folders, tmp_path, result):
    market = shutil.copytree(folders["reid"], tmp_path / "reid")
    shutil.rmtree(market / "bounding_box_train")
    lip = shutil.copytree(folders["parsing"], tmp_path / "parsing")
    for path in lip.glob("train_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    coco = shutil.copytree(folders["pose"], tmp_path / "pose")
    shutil.rmtree(coco / "train")
    (coco / "annotations" / "person_keypoints_train.json").unlink()
    found = evaluate(str(run), tasks=[f"reid={market}", f"parsing={lip}", f"pose={coco}"], device="cpu", batch=5)
    for task, scored in found.tasks.items():
        assert scored.metrics == result.tasks[task].metrics


def test_bad_images_are_told(run, tmp_path):
    folder = layouts.write_attributes(tmp_path / "attributes", images=40)
    (folder / "images" / "045.png").write_bytes(b"no image")
    found = evaluate(str(run), tasks=[f"attributes={folder}"], device="cpu")
    [problem] = found.tasks["attributes"].problems
    assert problem.startswith(f"{folder}: images/045.png: cannot be read as an image")
    assert found.tasks["attributes"].images == {"val": 39}
    assert "1 bad left out, first " in found.as_text()
    for number in range(50, 54):
        (folder / "images" / f"0{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"and 4 more of 40.*more than 5 % are bad"):
        evaluate(str(run), tasks=[f"attributes={folder}"], device="cpu")


def test_other_labels_are_refused_before_anything_is_computed(run, tmp_path, options):
    folder = layouts.write_attributes(tmp_path / "attributes")
    table = folder / "attributes.csv"
    table.write_text(table.read_text().replace("bright", "tall", 1))
    with pytest.raises(
        ConfigError, match=r"has tall, which the model's attributes head does not know \(it has besides"
    ):
        evaluate(str(run), tasks=[*options[:3], f"attributes={folder}"], device="cpu")


def test_a_model_without_the_head(detector_run, tmp_path, folders, options):
    with pytest.raises(ConfigError, match="has no head for reid and parsing, only for detection; leave out"):
        evaluate(str(detector_run), tasks=options[:2], device="cpu")
    tiny = write_bundle(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="has no head for pose, only for reid"):
        evaluate(str(tiny), tasks=[f"pose={folders['pose']}"])


def test_damaged_weights_are_told(tmp_path, folders):
    model = tiny_model(CROPS, HEADS)
    model.heads["attributes"].bias.data[0] = torch.nan
    run = save_run(tmp_path / "run", model, {})
    with pytest.raises(ModelFileError, match="its attributes head gives values that are not finite"):
        evaluate(str(run), tasks=[f"attributes={folders['attributes']}"], device="cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": []}, "nothing to evaluate: give --task NAME=DIR"),
        ({"tasks": ["reid=/nowhere"], "batch": 0}, "batch 0, limit None: expected 1 or more"),
        ({"tasks": ["reid=/nowhere"], "limit": 0}, "batch 32, limit 0: expected 1 or more"),
        ({"tasks": ["depth=/nowhere"]}, "no task 'depth'"),
        ({"tasks": ["reid=/nowhere"], "detected_boxes": True}, "give --task pose=DIR, and no --limit"),
        ({"tasks": ["pose=/nowhere"], "detected_boxes": True, "limit": 5}, "give --task pose=DIR, and no --limit"),
        ({"tasks": ["detection=/nowhere"], "flip": True}, "evaluate detection without it"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ConfigError, match=message):
        evaluate("model", **given)


def test_what_is_no_model(tmp_path, options):
    with pytest.raises(ModelFileError, match="neither a bundle nor a run folder"):
        evaluate(str(tmp_path), tasks=options[:1])
    with pytest.raises(ModelFileError, match=r"gone\.pth: no such file"):
        evaluate(str(tmp_path / "gone.pth"), tasks=options[:1])


@pytest.mark.parametrize("names", [PEOPLE, ("detection",)])
def test_a_model_in_training_is_scored_and_left_alone(names, run, detector_run, folders):
    model = tiny_model(FRAMES, DETECTOR) if "detection" in names else tiny_model(CROPS, HEADS)
    model.train()
    model.backbone.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    chosen = {name: folders[name] for name in names}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate_model(model, chosen, mean=MEAN, std=STD, device="cpu", limit=5, batch=4)
    assert model.training
    assert not model.backbone.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()

    folder = detector_run if "detection" in names else run
    expected = evaluate(str(folder), tasks=[f"{n}={f}" for n, f in chosen.items()], device="cpu", limit=5)
    for name, metrics in found.items():
        assert close(metrics, {k: v for k, v in expected.tasks[name].metrics.items() if v is not None})
