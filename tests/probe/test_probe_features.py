"""Whatever can be probed, behind one contract."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpal_edge.errors import BackendUnavailable, ConfigError, DataError, ModelFileError
from dpal_edge.models.vit import normalize
from dpal_edge.probe.features import Features, check_finite, open_extractor, read_batches
from dpal_edge.probe.network import choose_device, grid_of
from dpal_edge.tasks.sample import Sample
from tests.probe.conftest import tiny_student
from tests.runtime.tiny_bundle import SIZE, reference, write_bundle
from tests.tasks.layouts import save_image


@pytest.fixture
def crops():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 32, 3), dtype=np.uint8)


@pytest.fixture
def teacher_file(tmp_path):
    save_file(tiny_student(2).state_dict(), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def test_a_run_gives_its_newest_checkpoint(run, crops):
    images = normalize(torch.from_numpy(crops).permute(0, 3, 1, 2), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    tokens = tiny_student(0)(images).detach().numpy()
    file = run / "checkpoints" / "step-00000007.safetensors"
    for model in (run, file):
        extractor = open_extractor(str(model), device="cpu")
        whole, patches = extractor(crops)
        np.testing.assert_allclose(whole, tokens[:, 0], atol=1e-5)
        np.testing.assert_allclose(patches, tokens[:, 1:].reshape(3, 4, 2, -1), atol=1e-5)
        told = extractor.description
        assert (told["kind"], told["file"], told["step"], told["layer"]) == ("checkpoint", str(file), 7, 2)
        assert len(told["sha256"]) == 64
        assert told["size"] == [64, 32]


def test_a_layer_and_a_size_can_be_chosen(run, crops):
    first = open_extractor(str(run), layer=1, device="cpu")
    assert not np.allclose(first(crops).whole, open_extractor(str(run), device="cpu")(crops).whole)
    assert open_extractor(str(run), size=(96, 32), device="cpu")(crops.repeat(2, 1)[:, :96]).patches.shape[1:3] == (
        6,
        2,
    )
    with pytest.raises(ConfigError, match=r"layer 3: of .* the blocks 1 to 2 can be taken"):
        open_extractor(str(run), layer=3)
    with pytest.raises(ConfigError, match="size 60x32: expected height and width in multiples of 16"):
        open_extractor(str(run), size=(60, 32))


def test_published_weights_and_teachers(teacher_file, crops):
    student = open_extractor(str(teacher_file), size=(64, 32), device="cpu")
    assert student(crops).patches.shape == (3, 4, 2, 24)
    spec = f"{teacher_file}?heads=6+12&resize=1d"  # as DPAL published its students
    teacher = open_extractor(f"teacher:{spec}", size=(64, 32), device="cpu")
    np.testing.assert_allclose(teacher(crops).whole, student(crops).whole, atol=1e-5)  # as it is the same network
    assert (teacher.description["kind"], teacher.description["model"]) == ("teacher", spec)
    assert teacher.description["width"] == 24
    assert open_extractor(f"teacher:{spec}").size == (256, 128)


def test_random_students_depend_on_the_seed_alone(crops):
    tokens = [
        open_extractor("random:vit_tiny", size=(64, 32), seed=seed, device="cpu")(crops).whole for seed in (0, 0, 1)
    ]
    assert (tokens[0] == tokens[1]).all()
    assert not np.allclose(tokens[0], tokens[2])
    swin = open_extractor("random:swin_tiny", size=(64, 32), device="cpu")
    assert swin(crops).patches.shape[1:3] == (2, 1)
    with pytest.raises(ConfigError, match="random:resnet: no student 'resnet', expected one of: vit_tiny"):
        open_extractor("random:resnet")
    with pytest.raises(ConfigError, match=r"layer 2: of random:swin_tiny the blocks 11 to 12"):
        open_extractor("random:swin_tiny", layer=2)


def test_a_bundle_gives_embeddings(tmp_path):
    extractor = open_extractor(str(write_bundle(tmp_path / "bundle")))
    crops = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
    whole, patches = extractor(crops)
    np.testing.assert_allclose(whole, reference(crops), rtol=1e-5)
    assert patches is None
    assert not extractor.has_patches
    assert (extractor.description["kind"], extractor.description["architecture"]) == ("bundle", "tiny")
    with pytest.raises(ConfigError, match="one size, 16x8, and one layer"):
        open_extractor(str(tmp_path / "bundle"), layer=1)
    with pytest.raises(ConfigError, match="one size, 16x8, and one layer"):
        open_extractor(str(tmp_path / "bundle"), size=(32, 16))
    shutil.copyfile(__file__, tmp_path / "bundle" / "model.onnx")
    with pytest.raises(ModelFileError, match=r"model\.onnx: damaged or replaced"):
        open_extractor(str(tmp_path / "bundle"))


def test_a_bundle_without_an_embedding_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="has no embedding head, only pose"):
        open_extractor(str(write_bundle(tmp_path / "bundle", task="pose")))


def test_a_bundle_is_probed_without_torch(tmp_path, folders):
    bundle = write_bundle(tmp_path / "bundle")
    code = (
        "import sys; from dpal_edge.probe.command import probe; "
        f"result = probe({str(bundle)!r}, tasks=['reid={folders['reid']}']); "
        "assert result.tasks['reid'].metrics['mAP'] > 0.9, result; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_no_model(tmp_path):
    with pytest.raises(ModelFileError, match="neither a bundle nor a run folder; it holds no manifest"):
        open_extractor(str(tmp_path))
    with pytest.raises(ModelFileError, match=r"gone\.pth: no such file"):
        open_extractor(str(tmp_path / "gone.pth"))


def test_devices():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="device 'tpu': expected auto, cpu or cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(BackendUnavailable, match="device 'cuda': this torch sees no CUDA device"):
            choose_device("cuda")


def test_grids():
    assert grid_of(128, (256, 128)) == (16, 8)
    assert grid_of(6, (96, 64)) == (3, 2)
    with pytest.raises(ModelFileError, match="7 patch tokens of 64x32 pixels form no grid"):
        grid_of(7, (64, 32))


def test_broken_features_are_refused():
    broken = Features(np.array([[1.0, np.nan]], np.float32), None)
    with pytest.raises(ModelFileError, match="model X: gives features that are not finite"):
        check_finite(broken, "model X")


def test_an_unreadable_image_is_named(tmp_path):
    save_image(tmp_path / "a.png", np.zeros((4, 4, 3)))
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    samples = [Sample(tmp_path / name, None) for name in ("a.png", "b.png")]
    with pytest.raises(DataError, match=r"b\.png: cannot be read as an image"):
        list(read_batches(samples, (4, 4), 2))
