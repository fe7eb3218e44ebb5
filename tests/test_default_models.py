"""The models that come with the package, and the scripts that make them."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dpal_edge.files import sha256_of
from dpal_edge.finetune.augment import change_colours, draw_warp
from dpal_edge.models.checkpoint import read_checkpoint, write_checkpoint
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.teacher import load_teacher
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, ViTConfig, normalize
from dpal_edge.tasks.parsing import read_lip
from dpal_edge.tasks.sample import Sample

SCRIPTS = Path(__file__).parents[1] / "scripts" / "default_models"
ASSETS = Path(__file__).parents[1] / "dpal_edge" / "assets"
MODELS = {
    "human_teacher_vit_small": {"pose", "parsing", "attributes", "reid"},
    "dpal_vit_tiny": {"pose", "parsing", "attributes", "reid"},
    "person_detector": {"detection"},
}


def test_the_base_of_the_teacher_fits_timm_key_for_key(tmp_path):
    write_teacher = runpy.run_path(str(SCRIPTS / "base_teacher.py"))["write_teacher"]
    count = write_teacher(tmp_path / "teacher.safetensors")
    state = {name: value.float() for name, value in load_file(tmp_path / "teacher.safetensors").items()}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    model.load_state_dict(state, strict=True)
    assert count == sum(value.numel() for value in state.values()) == 22_056_192


@pytest.mark.parametrize("name", MODELS)
def test_models_open_with_their_heads(name):
    model, metadata = load_human(ASSETS / f"{name}.safetensors")
    assert set(model.configs) == MODELS[name]
    assert metadata["limits"]
    dtypes = {str(value.dtype) for value in read_checkpoint(ASSETS / f"{name}.safetensors").tensors.values()}
    assert dtypes <= {"torch.float16", "torch.int64"}  # the latter: how many batches a batch norm has seen
    assert (ASSETS / f"{name}.md").read_text().startswith(f"# {name}")


def test_what_limits_the_teacher_that_ships_limits_what_it_teaches():
    passport = load_teacher(str(ASSETS / "human_teacher_vit_small.safetensors"), size=(256, 128)).passport
    assert passport.licence.startswith("Apache-2.0")
    assert "for research and evaluation" in passport.limits


def test_others_in_a_photograph_are_neither_the_person_nor_a_part_of_one(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    others = runpy.run_path(str(SCRIPTS / "photographs.py"))["others"]
    person = np.array([40.0, 10, 80, 110])
    found = np.array(
        [[42, 8, 79, 112], [45, 12, 70, 40], [30, 0, 95, 120], [0, 20, 30, 90], [60, 50, 130, 110], [5, 5, 5, 9]]
    )
    assert others(found.astype(float), person).tolist() == [[0, 20, 30, 90], [60, 50, 130, 110]]
    assert others(np.zeros((0, 4)), person).shape == (0, 4)


def test_boxes_of_photographs_are_those_of_the_masks(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    write_masked(tmp_path, "c")
    boxes_of_masks = runpy.run_path(str(SCRIPTS / "photographs.py"))["boxes_of_masks"]
    [(path, box)] = boxes_of_masks(tmp_path).items()
    assert path.name == "c.jpg"
    assert box.tolist() == [12, 5, 30, 50]


def test_people_of_several_sets_are_joined_some_more_often(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    for folder in ("fashion", "sports"):
        write_masked(tmp_path / folder, "a")
    join_masks = runpy.run_path(str(SCRIPTS / "make.py"))["join_masks"]
    split = read_lip(join_masks({tmp_path / "fashion": 2, tmp_path / "sports": 1}, tmp_path / "all"), "train")
    assert [sample.image.stem for sample in split.samples] == ["fashion_0_a", "fashion_1_a", "sports_0_a"]
    assert all(np.asarray(Image.open(sample.target)).sum() == 4 * 45 * 18 for sample in split.samples)


def test_an_athlete_is_what_covers_the_joints_and_reaches_no_farther_than_a_body():
    confirm = runpy.run_path(str(SCRIPTS / "athletes.py"))["confirm"]
    joints = np.stack([np.full(14, 50.0), np.linspace(20, 140, 14)], axis=1)
    mask = np.zeros((160, 120), np.uint8)
    mask[10:150, 40:62] = 3
    mask[60:100, 90:110] = 5  # somebody else
    kept = confirm(mask, joints)
    assert kept[10:150, 40:62].min() == 3
    assert not kept[:, 80:].any()

    half = mask.copy()
    half[80:] = 0
    assert confirm(half, joints) is None  # half of the joints lie outside
    wide = mask.copy()
    wide[100:120] = 3
    assert confirm(wide, joints) is None  # the ground belongs to nobody
    assert confirm(np.zeros_like(mask), joints) is None


def test_of_a_crop_the_largest_part_is_the_person():
    largest = runpy.run_path(str(SCRIPTS / "athletes.py"))["largest"]
    mask = np.zeros((80, 40), np.uint8)
    mask[5:40, 10:25], mask[40:75, 10:25] = 3, 4  # one person in two garments
    mask[30:50, 32:40] = 5  # somebody else
    kept = largest(mask)
    assert (kept[:, :30] == mask[:, :30]).all()
    assert not kept[:, 30:].any()
    scrap = np.zeros_like(mask)
    scrap[:10, :10] = 3
    assert largest(scrap) is None
    assert largest(np.zeros_like(mask)) is None


def write_masked(folder, name):
    """Write a training image with a person of 45 by 18 pixels and its mask in the layout of LIP."""
    for part in ("train_images", "train_segmentations"):
        (folder / part).mkdir(parents=True)
    mask = np.zeros((60, 40), np.uint8)
    mask[5:50, 12:30] = 4
    Image.fromarray(mask).save(folder / "train_segmentations" / f"{name}.png")
    Image.new("RGB", (40, 60)).save(folder / "train_images" / f"{name}.jpg")
    (folder / "train_id.txt").write_text(f"{name}\n")


def test_joints_move_to_where_two_others_agree_and_halfway_to_who_confirms_them():
    correct = runpy.run_path(str(SCRIPTS / "joints.py"))["correct"]
    labels = np.tile([100.0, 100.0], (5, 1))
    judged = np.array([[100, 200], [200, 100], [104, 100], [200, 200], [100, 200]], float)
    peer = np.array([[100, 110], [204, 100], [200, 100], [300, 300], [np.nan, np.nan]], float)
    places, done = correct(labels, judged, peer, torso=50)
    assert done.tolist() == ["averaged", "replaced", "kept", "kept", "kept"]
    assert places.tolist() == [[100, 105], [202, 100], [100, 100], [100, 100], [100, 100]]
    assert labels.tolist() == [[100, 100]] * 5


def test_recoloured_people_keep_their_skin_and_are_cut_out_of_their_background():
    recolour = runpy.run_path(str(SCRIPTS / "pedestrians.py"))["recolour"]
    labels = ("background", "hair", "skin", "upper", "pants")
    mask = np.repeat(np.arange(5, dtype=np.uint8), 40)[:, None].repeat(60, axis=1)
    pixels = np.full((200, 60, 3), (200, 90, 30), np.uint8)
    seen = [np.asarray(recolour(pixels, mask, labels, np.random.default_rng(i))) for i in range(12)]
    assert all(image.shape == (160, 60, 4) for image in seen)
    middles = np.stack([[image[row, 30] for row in (20, 60, 100, 140)] for image in seen])  # hair, skin, upper, pants
    assert (middles[:, :2, :3] == (200, 90, 30)).all()
    assert (middles[..., 3] == 255).all()
    for garment in (2, 3):
        assert len(np.unique(middles[:, garment, :3], axis=0)) > 6


def test_pedestrians_are_slender_with_the_head_above():
    is_upright = runpy.run_path(str(SCRIPTS / "pedestrians.py"))["is_upright"]
    labels = ("background", "hair", "face", "upper")
    standing = np.zeros((100, 60), np.uint8)
    standing[10:90, 20:40] = 3
    standing[10:25, 20:40] = 1
    assert is_upright(standing, labels)
    assert not is_upright(standing[::-1], labels)  # on the hands
    assert not is_upright(standing.T, labels)  # lying
    assert not is_upright(np.where(standing == 1, 3, standing).astype(np.uint8), labels)  # who knows
    assert not is_upright(np.zeros_like(standing), labels)


def test_the_models_fit_into_the_package():
    assert sum(file.stat().st_size for file in ASSETS.glob("*.safetensors")) < 80e6


def test_what_cameras_change_counts_less_in_a_whitened_embedding(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    torch.manual_seed(0)
    backbone = VisionTransformer(ViTConfig(size=(64, 32), depth=1, width=32, heads=2, last_heads=2))
    model = HumanModel(backbone, {"reid": HeadConfig(task="reid", kind="strips", channels=8)}).eval()
    crops = [tmp_path / f"{i}.png" for i in range(40)]
    rng = np.random.default_rng(0)
    for crop in crops:
        Image.fromarray(rng.integers(0, 256, (64, 32, 3), np.uint8)).save(crop)
    make = runpy.run_path(str(SCRIPTS / "make.py"))

    def embeddings():
        draw, found = np.random.default_rng(0), []
        for crop in crops:
            for _ in range(2):
                warp = draw_warp((0, 0, 32, 64), (64, 32), make["CAMERAS"], draw)
                found.append(change_colours(warp.image(Image.open(crop)), make["CAMERAS"], draw))
        pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)
        with torch.no_grad():
            seen = model.heads["reid"](backbone(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))).double()
        return seen, torch.linalg.eigvalsh((seen[::2] - seen[1::2]).T @ (seen[::2] - seen[1::2]) / 80)

    _, before = embeddings()
    make["whiten"](model, crops, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    seen, after = embeddings()
    torch.testing.assert_close(after, before.mean() * before / (before + before.mean()), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(seen.mean(0), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_packed_mean_has_its_own_statistics(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    pack = runpy.run_path(str(SCRIPTS / "make.py"))["pack"]
    ships = read_checkpoint(ASSETS / "person_detector.safetensors")
    run, other, packed = (tmp_path / f"{name}.safetensors" for name in ("run", "other", "packed"))
    for path, factor in ((run, 0.5), (other, 1.0)):
        tensors = {n: factor * value if value.is_floating_point() else value for n, value in ships.tensors.items()}
        write_checkpoint(path, tensors, ships.metadata)
    rng = np.random.default_rng(0)
    images = [tmp_path / f"{i}.png" for i in range(2)]
    for image in images:
        Image.fromarray(rng.integers(0, 256, (320, 416, 3), np.uint8)).save(image)

    pack(run, packed, soup=[other], frames=[Sample(image, None) for image in images])
    found = read_checkpoint(packed)
    assert found.metadata["soup"] == [sha256_of(other)]
    weights = "backbone.blocks.0.mlp.fc1.weight"
    mean = 0.75 * ships.tensors[weights].float()
    torch.testing.assert_close(found.tensors[weights].float(), mean, rtol=1e-3, atol=1e-6)
    model, metadata = load_human(packed)
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(image)) for image in images])).permute(0, 3, 1, 2)
    level = model.heads["detection"].levels[1]
    level[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        model(normalize(pixels, metadata["mean"], metadata["std"]))
    for statistic, value in (("running_mean", seen[0].mean((0, 2, 3))), ("running_var", seen[0].var((0, 2, 3)))):
        torch.testing.assert_close(getattr(level[1], statistic), value, rtol=0.01, atol=0.01)
