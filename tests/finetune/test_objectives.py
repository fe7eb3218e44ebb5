"""Losses of the tasks: numbers worked by hand, invariances, and second implementations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dpal_edge.errors import DataError
from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.objectives.attributes import AttributeObjective
from dpal_edge.finetune.objectives.crops import UnlabelledObjective
from dpal_edge.finetune.objectives.parsing import ParsingObjective, lovasz_softmax
from dpal_edge.finetune.objectives.pose import PoseObjective
from dpal_edge.finetune.objectives.reid import IdentityObjective, soft_triplet
from dpal_edge.tasks.table import TASKS

SIZE = (32, 16)
FLIPPED = Augmentation(flip=1, scale=0, rotate=0, shift=0, colour=0, grey=0, low_resolution=0)


class Says(nn.Module):
    """A head that says the same whatever it is given."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(torch.as_tensor(output))

    def forward(self, tokens):
        return self.output


def read(folders, task):
    return TASKS[task].read(folders[task], "train")


def gaussian_logits(joints, size):
    """Logits whose softmax is exactly the label."""
    parts = []
    for axis, side in ((0, size[1]), (1, size[0])):
        bins = torch.arange(2 * side) + 0.5
        parts.append(-((bins - 2 * joints[..., axis, None]) ** 2) / (2 * side / 8))
    return torch.cat(parts, -1)


def test_simcc_loss_is_zero_where_the_output_is_the_label(folders):
    objective = PoseObjective(read(folders, "pose"), SIZE, FLIPPED, "simcc")
    joints = torch.rand(2, 5, 2) * 10 + 3
    batch = {"joints": joints, "labelled": torch.ones(2, 5, dtype=torch.bool)}
    assert objective(Says(gaussian_logits(joints, SIZE)), torch.empty(2, 3, 8), batch)["loss"].item() == pytest.approx(
        0, abs=1e-6
    )


def test_simcc_loss_by_hand(folders):
    """Of an output that is flat, the loss is the log of the bins less the entropy of the label, mean of both axes."""
    objective = PoseObjective(read(folders, "pose"), SIZE, FLIPPED, "simcc")
    joints = torch.full((1, 5, 2), 8.0)
    label = [torch.softmax(p, -1) for p in gaussian_logits(joints, SIZE)[0, 0].split([32, 64])]
    expected = sum(math.log(len(p)) + (p * p.log().clamp(min=-1e9)).nansum().item() for p in label) / 2
    batch = {"joints": joints, "labelled": torch.ones(1, 5, dtype=torch.bool)}
    assert objective(Says(torch.zeros(1, 5, 96)), torch.empty(1, 3, 8), batch)["loss"].item() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize(("kind", "shape"), [("simcc", (1, 5, 96)), ("heatmap", (1, 5, 8, 4))])
def test_joints_without_a_label_give_no_gradient(folders, kind, shape):
    objective = PoseObjective(read(folders, "pose"), SIZE, FLIPPED, kind)
    head = Says(torch.randn(shape))
    labelled = torch.tensor([[True, False, True, False, False]])
    objective(head, torch.empty(1, 3, 8), {"joints": torch.rand(1, 5, 2) * 8, "labelled": labelled})["loss"].backward()
    reached = head.output.grad.flatten(2).abs().sum(-1) > 0
    assert torch.equal(reached, labelled)


def test_heatmap_loss_is_zero_on_the_gaussian_itself(folders):
    objective = PoseObjective(read(folders, "pose"), SIZE, FLIPPED, "heatmap")
    joints = torch.tensor([[[8.0, 16.0]] * 5])  # the middle of 16x32, so of a map of 4x8
    x, y = (torch.arange(n) + 0.5 - n / 2 for n in (4, 8))
    heat = (torch.exp(-(y**2) / 8)[:, None] * torch.exp(-(x**2) / 8)).expand(1, 5, 8, 4)
    batch = {"joints": joints, "labelled": torch.ones(1, 5, dtype=torch.bool)}
    assert objective(Says(heat), torch.empty(1, 3, 8), batch)["loss"].item() == pytest.approx(0, abs=1e-9)


def test_a_mirrored_person_has_left_and_right_exchanged(folders):
    split = read(folders, "pose")
    plain = PoseObjective(split, SIZE, FLIPPED, "simcc").example(0, None)
    mirrored = PoseObjective(split, SIZE, FLIPPED, "simcc").example(0, np.random.default_rng(0))
    order = [0, 2, 1, 4, 3]  # head_top, left_shoulder, right_shoulder, left_hip, right_hip
    np.testing.assert_allclose(mirrored["joints"][:, 0], 16 - plain["joints"][order, 0], atol=1e-4)
    for view, dots in ((plain, DOTS), (mirrored, DOTS[order])):  # a joint lies in the pixel that the set names
        colours = [view["image"][int(y), int(x)] for x, y in view["joints"][view["labelled"]]]
        np.testing.assert_array_equal(colours, dots[view["labelled"]])
    np.testing.assert_array_equal(mirrored["labelled"], plain["labelled"][order])


def test_a_mirrored_mask_has_left_and_right_exchanged(folders):
    objective = ParsingObjective(read(folders, "parsing"), SIZE, FLIPPED, "linear", 8)
    plain, mirrored = objective.example(0, None)["mask"], objective.example(0, np.random.default_rng(0))["mask"]
    other_side = np.arange(256)
    other_side[[1, 2]] = 2, 1
    np.testing.assert_array_equal(mirrored, other_side[plain[:, ::-1]])


def test_parsing_loss_of_a_sure_and_right_head_is_zero(folders):
    objective = ParsingObjective(read(folders, "parsing"), SIZE, FLIPPED, "linear", 8)
    mask = torch.zeros(2, 32, 16, dtype=torch.uint8)
    mask[:, 16:] = 1
    logits = 60 * F.one_hot(mask[:, 2::4, 2::4].long(), 3).movedim(-1, 1).float()
    losses = objective(Says(logits), torch.empty(2, 3, 8), {"mask": mask})
    assert losses["lovasz"].item() == pytest.approx(0, abs=1e-6)
    assert losses["entropy"].item() < 0.3  # the border between the cells is interpolated


def test_ignored_pixels_give_no_gradient(folders):
    objective = ParsingObjective(read(folders, "parsing"), SIZE, FLIPPED, "linear", 8)
    head = Says(torch.randn(1, 3, 8, 4))
    mask = torch.full((1, 32, 16), 255, dtype=torch.uint8)
    mask[:, :4] = 1
    objective(head, torch.empty(1, 3, 8), {"mask": mask})["loss"].backward()
    assert (head.output.grad[:, :, :1] != 0).any()
    assert not head.output.grad[:, :, 2:].any()


def test_a_batch_without_a_labelled_pixel_has_no_loss(folders):
    objective = ParsingObjective(read(folders, "parsing"), SIZE, FLIPPED, "linear", 8)
    mask = torch.full((1, 32, 16), 255, dtype=torch.uint8)
    losses = objective(Says(torch.randn(1, 3, 8, 4)), torch.empty(1, 3, 8), {"mask": mask})
    assert {name: value.item() for name, value in losses.items()} == {"loss": 0, "entropy": 0, "lovasz": 0}


DOTS = np.random.default_rng(2).integers(0, 255, (5, 3))  # the colours that write_coco draws for joints
STILL = Augmentation(scale=0, rotate=0, shift=0, colour=0, grey=0, low_resolution=0)


def test_an_unreadable_partner_leaves_a_view_unjoined(tmp_path):
    for i in range(4):
        Image.new("RGB", (16, 32), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    paths[3].write_bytes(b"no image")
    objective = UnlabelledObjective(paths, SIZE, STILL, mix=1.0)
    joined = [len(np.unique(objective.example(0, np.random.default_rng(seed))["image"][..., 0])) for seed in range(40)]
    assert set(joined) == {1, 2}
    with pytest.raises(DataError, match=r"3\.png: cannot be read"):
        objective.example(3, np.random.default_rng(0))


def test_lovasz_of_hard_predictions_is_one_less_jaccard():
    """At the corners of the cube the extension is the set function itself."""
    truth = torch.tensor([[[0, 0, 1, 1, 1, 255]]])
    found = torch.tensor([[[0, 1, 1, 1, 0, 0]]])
    shares = F.one_hot(found, 2).movedim(-1, 1).float()
    jaccard = ((1 / 3) + (2 / 4)) / 2  # class 0: 1 of {0, 1, 4}; class 1: 2 of {1, 2, 3, 4}
    assert lovasz_softmax(shares, truth).item() == pytest.approx(1 - jaccard, rel=1e-6)


def test_attribute_loss_by_hand(folders):
    """Red and bright have ratio 1/2, so weight exp(1/2) either way; nobody has the last: exp(0) where it is absent."""
    objective = AttributeObjective(read(folders, "attributes"), SIZE, FLIPPED, "linear", "weighted")
    assert objective.ratio.tolist() == [0.5, 0.5, 0.0]
    flags = torch.tensor([[True, False, False]])
    loss = objective(Says(torch.zeros(1, 3)), torch.empty(1, 3, 8), {"flags": flags})["loss"]
    assert loss.item() == pytest.approx(math.log(2) * (2 * math.exp(0.5) + 1), rel=1e-6)


def test_adjusted_attribute_loss_is_least_where_a_score_says_nothing_of_rarity(folders):
    """Whoever sees nothing of the images does best to say 0, however rare an attribute is, so 0.5 balances recalls."""
    objective = AttributeObjective(read(folders, "attributes"), SIZE, FLIPPED, "linear", "adjusted")
    objective.ratio = torch.tensor([0.25, 0.75, 0.0])
    flags = torch.tensor([[True, True, False], [False, True, False], [False, True, False], [False, False, False]])
    head = Says(torch.zeros(4, 3))
    loss = objective(head, torch.empty(4, 3, 8), {"flags": flags})["loss"]
    loss.backward()
    assert head.output.grad.sum(0)[:2].abs().max() < 1e-6
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    nobody = 0.5 / len(objective)  # as if half a person had what nobody has
    assert loss.item() == pytest.approx(2 * entropy - math.log(1 - nobody), rel=1e-5)


def test_triplet_by_hand():
    features = torch.tensor([[0.0], [3.0], [4.0], [9.0]])
    person = torch.tensor([0, 0, 1, 1])
    # hardest positive less nearest negative: 3-4, 3-1, 5-1, 5-6
    expected = np.mean([math.log1p(math.exp(v)) for v in (-1, 2, 4, -1)])
    assert soft_triplet(features, person).item() == pytest.approx(expected, rel=1e-6)


def test_batches_hold_four_images_of_each_person(folders):
    objective = IdentityObjective(read(folders, "reid"), SIZE, FLIPPED, 8)
    people = [objective.split.samples[i].target.person for i in objective.indices(0, 8, seed=1)]
    assert [people.count(person) for person in dict.fromkeys(people)] == [4, 4]
    assert objective.indices(5, 8, seed=1) == objective.indices(5, 8, seed=1)


def test_one_person_teaches_no_identities(folders):
    split = read(folders, "reid")
    alone = type(split)(tuple(s for s in split.samples if s.target.person == 1))
    with pytest.raises(DataError, match="1 person to learn from, expected images of at least 2"):
        IdentityObjective(alone, SIZE, FLIPPED, 8)
