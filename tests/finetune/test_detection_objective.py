import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.finetune.crowds import lay, read_cutout
from dpal_edge.finetune.data import stack
from dpal_edge.finetune.frames import Frame
from dpal_edge.finetune.objectives.detection import DetectionObjective, assign, pairwise_iou
from dpal_edge.models.detection import locations
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.human import HumanModel
from dpal_edge.models.students import build_student
from dpal_edge.models.vit import ViTConfig, init_student, normalize
from dpal_edge.tasks.detection import People
from dpal_edge.tasks.detection_decoding import decode_people
from dpal_edge.tasks.letterbox import letterbox
from dpal_edge.tasks.sample import Sample, Split

SIZE = (64, 96)
CONFIG = ViTConfig(size=SIZE, width=48, depth=2, heads=4, last_heads=4)


def sample(path, boxes, ignore=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(path, People(boxes, np.array(ignore or [False] * len(boxes), bool), boxes))


def detector():
    torch.manual_seed(0)
    backbone = build_student(CONFIG)
    init_student(backbone, torch.Generator().manual_seed(0))
    head = HeadConfig(task="detection", kind="pyramid", labels=("person",), channels=32)
    return HumanModel(backbone, {"detection": head})


@pytest.fixture
def cutouts(tmp_path):
    """Six figures on transparent ground: a round head on a coloured body."""
    folder = tmp_path / "people"
    folder.mkdir()
    rng = np.random.default_rng(0)
    y, x = np.ogrid[:80, :32]
    for i in range(6):
        head = (x - 16) ** 2 + (y - 12) ** 2 < 100
        body = (abs(x - 16) < 12) & (y >= 22) & (y < 78)
        pixels = np.zeros((80, 32, 4), np.uint8)
        pixels[head] = (*rng.integers(150, 256, 3), 255)
        pixels[body] = (*rng.integers(80, 256, 3), 255)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def objective(tmp_path, cutouts):
    """Three frames of one person, and crowds in half of the examples."""
    samples = []
    for i in range(3):
        person = np.asarray(read_cutout(cutouts / f"{i}.png", None).resize((30, 75)))
        empty = Frame(np.full((120, 180, 3), 60, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int8))
        frame = lay(empty, [(person, 20 + 40 * i, 20)])
        Image.fromarray(frame.pixels).save(tmp_path / f"{i}.png")
        samples.append(sample(tmp_path / f"{i}.png", frame.boxes))
    return DetectionObjective(Split(tuple(samples)), SIZE, paste=cutouts, backgrounds=None)


class Raw(nn.Module):
    """A head whose output is its weight: 4 locations of stride 8, each with a box of 8 x 8 pixels around it."""

    def __init__(self, logits):
        super().__init__()
        centres = torch.tensor([[4.0, 4], [12, 4], [20, 4], [28, 4]])
        self.register_buffer("centres", centres)
        self.register_buffer("strides", torch.full((4, 1), 8.0))
        self.raw = nn.Parameter(torch.cat([centres - 4, centres + 4, torch.tensor(logits)[:, None]], dim=1)[None])

    def forward(self, tokens):
        return self.raw


def batch(*rows):
    return {"boxes": torch.tensor([[row[:4] for row in rows]], dtype=torch.float32),
            "kind": torch.tensor([[row[4] for row in rows]], dtype=torch.int8)}  # fmt: skip


def loss_of(objective, head, *rows):
    return objective(head, torch.zeros(1), batch(*rows))


def test_loss_by_hand(objective):
    head = Raw([0.0, 0.0, 0.0, 0.0])
    found = loss_of(objective, head, [0, 0, 8, 8, 1])
    # The first location fits: quality 1, cross-entropy log 2; three empty ones weigh 0.75 * 0.5^2 each.
    assert found["quality"].item() == pytest.approx(np.log(2) * (1 + 3 * 0.1875))
    assert found["box"].item() == pytest.approx(0, abs=1e-6)
    shifted = loss_of(objective, head, [0, 0, 8, 16, 1])  # IoU 0.5, which is also the score to reach; GIoU 0.5
    assert shifted["quality"].item() == pytest.approx(np.log(2) * (0.5 + 3.5 * 0.1875))  # divided by at least 1
    assert shifted["box"].item() == pytest.approx(0.5 * 0.5)
    assert shifted["loss"].item() == pytest.approx(shifted["quality"].item() + 2 * 0.25)


def test_ignored_regions_give_no_gradient(objective):
    head = Raw([1.0, 0.0, 2.0, 0.0])
    loss_of(objective, head, [0, 0, 8, 8, 1], [16, 0, 32, 8, 2])["loss"].backward()
    gradient = head.raw.grad[0].abs().sum(1)
    assert (gradient > 0).tolist() == [True, True, False, False]


def test_locations_that_hardly_fit_are_background(objective):
    """In the person, but with a box that shares a 128th with it: a high score must not be free."""
    head = Raw([0.0, 3.0, 0.0, 0.0])
    head.raw.data[0, 1, :4] = torch.tensor([8.0, 0, 9, 1])
    loss_of(objective, head, [0, 0, 16, 8, 1])["loss"].backward()
    assert head.raw.grad[0, 1, 4] > 0.1


def test_a_person_in_an_ignored_region_is_still_learned(objective):
    head = Raw([0.0] * 4)
    loss_of(objective, head, [16, 0, 24, 8, 1], [0, 0, 32, 8, 2])["loss"].backward()
    assert (head.raw.grad[0, :, 4] != 0).tolist() == [False, False, True, False]


def test_rows_that_fill_up_change_nothing(objective):
    head = Raw([0.5, 0.0, 0.0, -1.0])
    one = loss_of(objective, head, [0, 0, 9, 8, 1])
    two = loss_of(objective, head, [0, 0, 9, 8, 1], [0, 0, 0, 0, 0], [16, 0, 24, 8, 0])
    assert one["loss"].item() == two["loss"].item()


def test_nobody_is_background_alone(objective):
    found = loss_of(objective, Raw([0.0] * 4), [0, 0, 0, 0, 0])
    assert found["quality"].item() == pytest.approx(np.log(2) * 4 * 0.1875)
    assert found["box"].item() == 0


def test_assignment_by_hand():
    head = Raw([0.0] * 4)
    people = torch.tensor([[[0.0, 0, 16, 8], [18, 3, 22, 5]]])  # two cells wide; smaller than a cell
    person, quality = assign(head.raw[..., :4], head.centres, head.strides, people, torch.ones(1, 2, dtype=torch.bool))
    assert person[0, :3].tolist() == [0, 0, 1]
    torch.testing.assert_close(quality[0], torch.tensor([0.5, 0.5, 0.125, 0.0]))  # IoU of each; nobody in the last


def test_assignment_equals_another_implementation():
    """On three levels, with people of all sizes who stand in each other's way, and rows that are no people."""
    sizes, strides = ((8, 12), (4, 6), (2, 3)), (8.0, 16.0, 32.0)
    centres, widths = locations(sizes, strides)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corner = torch.rand(1, 6, 2, generator=generator) * torch.tensor([80.0, 50.0])
        extent = 3 + torch.rand(1, 6, 2, generator=generator) ** 2 * torch.tensor([40.0, 60.0])
        people = torch.cat([corner, corner + extent], 2)
        real = torch.tensor([[True] * 5 + [False]])
        boxes = torch.cat([centres - widths, centres + 2 * widths], 1)[None]
        person, quality = assign(boxes, centres, widths, people, real)
        expected = assign_slowly(centres.numpy(), widths[:, 0].numpy(), people[0, :5].numpy())
        answered = quality[0] > 0
        assert {i: int(person[0, i]) for i in answered.nonzero()[:, 0].tolist()} == {
            i: one for i, one in expected.items() if pairwise_iou(people, boxes)[0, one, i] > 0
        }
        for i, one in expected.items():
            assert quality[0, i] == pytest.approx(float(pairwise_iou(people, boxes)[0, one, i]))


def assign_slowly(centres, strides, people):
    """Return by location the person it answers for."""
    best = {}
    for number, box in enumerate(people):
        middle, candidates = (box[:2] + box[2:]) / 2, []
        for stride in sorted(set(strides.tolist())):
            level = [i for i in range(len(strides)) if strides[i] == stride]
            candidates += sorted(level, key=lambda i: np.linalg.norm(centres[i] - middle))[:9]
        overlaps = {}
        for i in candidates:
            reach = strides[i] * np.array([1.5, 3.0])
            first = np.concatenate([centres[i] - reach, centres[i] + reach])
            sides = np.minimum(first[2:], box[2:]) - np.maximum(first[:2], box[:2])
            shared = np.prod(np.maximum(sides, 0))
            overlaps[i] = shared / (np.prod(2 * reach) + np.prod(box[2:] - box[:2]) - shared)
        values = np.array(list(overlaps.values()))
        enough = min(values.mean() + values.std(), values.max())
        for i, overlap in overlaps.items():
            inside = np.all(np.abs(centres[i] - middle) <= np.maximum((box[2:] - box[:2]) / 2, strides[i] / 2))
            if inside and overlap >= enough - 1e-7 and overlap > best.get(i, (0, 0))[0]:
                best[i] = (overlap, number)
    return {i: number for i, (_, number) in best.items()}


def test_a_shared_location_goes_to_whom_it_overlaps_most():
    head = Raw([0.0] * 4)
    people = torch.tensor([[[0.0, 0, 8, 8], [0.0, 0, 8, 9]]])
    person, quality = assign(head.raw[..., :4], head.centres, head.strides, people, torch.ones(1, 2, dtype=torch.bool))
    assert person[0, 0] == 1
    assert (quality[0] > 0).tolist() == [True, False, False, False]


def test_pairwise_iou_by_hand():
    a, b = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[[5.0, 0, 15, 10], [20, 0, 30, 10], [0, 0, 10, 10]]])
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor([[[1 / 3, 0, 1]]]))


def test_loss_is_float32_under_autocast(objective):
    model, example = detector(), stack([objective.example(i, None) for i in range(2)])
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.backbone(normalize(example["image"].permute(0, 3, 1, 2)))
        found = objective(model.heads["detection"], tokens, example)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_plain_example_is_the_letterboxed_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    boxes = [[10, 10, 30, 50], [0, -20, 100, 130], [50, 50, 60, 60]]  # one goes on outside the frame
    people = sample(tmp_path / "a.png", boxes, [False, True, False])
    objective = DetectionObjective(Split((people,)), SIZE, paste=None, backgrounds=None)
    example = objective.example(0, None)
    assert np.array_equal(example["image"], letterbox(pixels, SIZE))
    assert example["kind"][:4].tolist() == [2, 1, 1, 0]  # the largest first
    assert example["boxes"][0].tolist() == [0, 0, 64, 64]
    np.testing.assert_allclose(example["boxes"][1], [6.4, 6.4, 19.2, 32], rtol=1e-5)
    assert example["boxes"].shape == (1024, 4)


def test_examples_are_functions_of_the_generator(objective):
    for index in range(3):
        one, same, other = (objective.example(index, np.random.default_rng(seed)) for seed in (index, index, 99))
        assert all(np.array_equal(one[name], same[name]) for name in one)
        assert not np.array_equal(one["image"], other["image"])
        assert one["image"].shape == (*SIZE, 3)
        assert one["image"].dtype == np.uint8


def test_share_of_crowds(cutouts, objective):
    """The frames show one person each, so more are a crowd."""
    crowded = [(objective.example(i % 3, np.random.default_rng(i))["kind"] != 0).sum() > 1 for i in range(80)]
    assert 0.25 < np.mean(crowded) < 0.6
    never = DetectionObjective(objective.split, SIZE, paste=cutouts, backgrounds=None, paste_share=0.0)
    assert all((never.example(i % 3, np.random.default_rng(i))["kind"] != 0).sum() <= 4 for i in range(30))


def test_mosaic_joins_frames_with_their_boxes(tmp_path):
    """Each frame is a square of its own colour, whose box is known: all boxes of the mosaic hold one colour alone."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    samples = []
    for i, colour in enumerate(colours):
        pixels = np.full((60, 60, 3), 128, np.uint8)
        pixels[10:50, 10:50] = colour
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        samples.append(sample(tmp_path / f"{i}.png", [10, 10, 50, 50]))
    objective = DetectionObjective(Split(tuple(samples)), (128, 160), paste=None, backgrounds=None, mosaic=1.0)
    counts = []
    for seed in range(20):
        example = objective.example(0, np.random.default_rng(seed))
        boxes = example["boxes"][example["kind"] == 1]
        counts.append(len(boxes))
        saturated = np.ptp(example["image"].astype(int), axis=2) > 80
        inside = np.zeros_like(saturated)
        for left, top, right, bottom in np.rint(boxes).astype(int):
            assert saturated[top + 1 : bottom - 1, left + 1 : right - 1].mean() > 0.95
            inside[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = True
        ignored = np.rint(example["boxes"][example["kind"] == 2]).astype(int)
        for left, top, right, bottom in ignored:
            inside[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = True
        assert (saturated & ~inside).mean() < 0.005  # nobody is without a box
    assert 9 < max(counts) <= 16
    assert 3 <= min(counts) <= 4


def test_unreadable_image(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    objective = DetectionObjective(Split((sample(tmp_path / "bad.jpg", []),)), SIZE, paste=None, backgrounds=None)
    for rng in (None, np.random.default_rng(0)):
        with pytest.raises(DataError, match=r"bad\.jpg: cannot be read as an image"):
            objective.example(0, rng)
    assert objective.file(0).name == "bad.jpg"


def test_an_unreadable_partner_is_no_fault_of_a_mosaic(tmp_path):
    for i in range(3):
        Image.new("RGB", (60, 60), (90 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    split = Split(tuple(sample(tmp_path / f"{i}.png", []) for i in range(3)))
    objective = DetectionObjective(split, (128, 160), paste=None, backgrounds=None, mosaic=1.0)
    for seed in range(5):  # of 4 frames and more, of which the chance that none is the bad one is small
        assert objective.example(0, np.random.default_rng(seed))["image"].shape == (128, 160, 3)
    with pytest.raises(DataError, match=r"2\.png: cannot be read as an image"):
        objective.example(2, np.random.default_rng(0))


def test_backgrounds_without_people(tmp_path):
    with pytest.raises(ConfigError, match="nobody to put there"):
        DetectionObjective(Split(()), SIZE, paste=None, backgrounds=tmp_path)


@pytest.fixture
def one_thread():
    """Operations this small gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_training_finds_everybody(objective):
    """A tiny ViT learns four crowds by heart: it finds everyone at IoU 0.5, and nobody else."""
    examples = [objective.example(i % 3, np.random.default_rng(i)) for i in range(60)]
    data = stack([e for e in examples if (e["kind"] == 1).any() and not (e["kind"] == 2).any()][:4])
    model = detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = normalize(data["image"].permute(0, 3, 1, 2))
    for _ in range(300):
        loss = objective(model.heads["detection"], model.backbone(images), data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        raw = model(images)["detection"].numpy()
    for found, boxes, kind in zip(raw, data["boxes"], data["kind"], strict=True):
        kept, _ = decode_people(found, threshold=0.3, iou=0.6)
        overlap = pairwise_iou(boxes[kind == 1][None], torch.from_numpy(kept)[None])[0]
        assert (overlap >= 0.5).any(1).all()
        assert (overlap >= 0.5).any(0).all()
