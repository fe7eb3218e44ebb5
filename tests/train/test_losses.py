import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dpal_edge.train.losses import (
    ShapeMask,
    attention_logits,
    attention_losses,
    global_loss,
    local_loss,
    relation_loss,
    relations,
)

GRID = (8, 4)


def test_global_loss_by_hand():
    teacher = torch.tensor([[[1.0, 2.0]]])
    views = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[5.0, 2.0]]])]
    assert global_loss(views, teacher).item() == pytest.approx((0 + 4 / 2 + 16 / 2) / 3)


def test_global_loss_knows_no_order_of_views_or_images():
    views, teacher, order = [torch.randn(4, 1, 5) for _ in range(3)], torch.randn(4, 1, 5), torch.randperm(4)
    expected = global_loss(views, teacher)
    torch.testing.assert_close(global_loss(views[::-1], teacher), expected)
    torch.testing.assert_close(global_loss([view[order] for view in views], teacher[order]), expected)


def test_local_loss_by_hand():
    student, teacher = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [6.0]]])
    assert local_loss(student, teacher, None).item() == pytest.approx((1 + 16) / 2)
    mask = torch.tensor([[[1.0], [0.5]]])
    assert local_loss(student, teacher, mask).item() == pytest.approx((1 + 0.25 * 16) / 2)


def test_local_loss_ignores_masked_patches():
    student, teacher = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    mask = torch.tensor([1.0, 1, 0, 0, 1, 0]).view(1, 6, 1).expand(2, -1, -1)
    other = torch.where(mask > 0, student, 100.0)
    torch.testing.assert_close(local_loss(other, teacher, mask), local_loss(student, teacher, mask))


def test_relation_loss_by_hand():
    teacher = torch.zeros(1, 2, 4)  # attends evenly
    student = torch.zeros(1, 2, 4)
    student[0, 0, 0] = 2.0  # logits of the first query: 4 / sqrt(4) = 2 to itself, 0 to the other
    p = 1 / (1 + math.exp(-2))
    first = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert relation_loss(student, teacher).item() == pytest.approx(first / 2, rel=1e-5)  # the second query agrees
    q = 1 / (1 + math.exp(-1))
    tempered = 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))
    assert relation_loss(student, teacher, temperature=2.0).item() == pytest.approx(tempered / 2, rel=1e-5)


@pytest.mark.parametrize("stable", [True, False])
def test_relation_loss_is_zero_where_relations_agree(stable):
    tokens = torch.randn(2, 5, 8)
    assert abs(relation_loss(tokens, tokens, stable=stable).item()) < 1e-6
    assert relation_loss(torch.randn(2, 5, 8), tokens, stable=stable) > 0.01
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q  # relations are inner products, which rotations keep
    assert abs(relation_loss(tokens @ rotation, tokens, stable=stable).item()) < 1e-5


def test_stable_relation_loss_is_finite_where_the_published_one_is_not():
    student, teacher = 40 * torch.eye(3)[None], torch.ones(1, 3, 3)
    assert relation_loss(student, teacher, stable=False).isinf()
    assert relation_loss(student, teacher).isfinite()


def test_relations_are_a_distribution_even_in_half_precision():
    tokens = 6 * torch.randn(2, 7, 8)
    expected = relations(tokens)
    torch.testing.assert_close(expected.sum(-1), torch.ones(2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relations(tokens), expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda student, teacher: global_loss([student[:, :1], student[:, 1:2]], teacher[:, :1]),
        lambda student, teacher: local_loss(student, teacher, torch.linspace(0.1, 1, 3).double().view(1, 3, 1)),
        relation_loss,
    ],
    ids=["global", "local", "relation"],
)
def test_gradients(loss):
    student = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(2, 3, 4, dtype=torch.double)
    if loss(student, teacher).dtype == torch.double:
        assert torch.autograd.gradcheck(lambda value: loss(value, teacher), (student,))
        return
    # The relation computes in float32: compare with a central difference along one direction.
    direction = torch.randn_like(student)
    [gradient] = torch.autograd.grad(loss(student, teacher), student)
    with torch.no_grad():
        step = 1e-2 * direction
        difference = (loss(student + step, teacher) - loss(student - step, teacher)) / 2e-2
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-2)


def test_attention_losses_by_hand():
    # Two tokens, one head of one channel: q, k, v of each.
    teacher = torch.zeros(1, 2, 3)  # attends evenly, in both maps
    student = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])  # q k^T = [[2, 0], [0, 0]], v v^T = [[0, 0], [0, 1]]

    def gap(logit):  # KL of an even row against one with logits (logit, 0)
        p = 1 / (1 + math.exp(-logit))
        return 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))

    queries_keys, values_values = attention_losses(student, teacher, heads=1)
    assert queries_keys.item() == pytest.approx(gap(2) / 2, rel=1e-5)  # the other query agrees
    assert values_values.item() == pytest.approx(gap(1) / 2, rel=1e-5)


def test_attention_logits_are_scaled_by_the_head_width():
    qkv = torch.randn(2, 5, 3 * 8)
    q, k, v = qkv[1].chunk(3, dim=-1)
    queries_keys, values_values = attention_logits(qkv, heads=2)
    assert queries_keys.shape == values_values.shape == (2, 2, 5, 5)
    torch.testing.assert_close(queries_keys[1, 1], q[:, 4:] @ k[:, 4:].T / 2)
    torch.testing.assert_close(values_values[1, 0], v[:, :4] @ v[:, :4].T / 2)


def test_attention_losses_are_zero_where_maps_agree():
    student, teacher = torch.randn(2, 5, 3 * 8), torch.randn(2, 5, 3 * 16)
    assert max(loss.abs().item() for loss in attention_losses(teacher, teacher, 4)) < 1e-6
    assert min(loss.item() for loss in attention_losses(student, teacher, 4)) > 0.01  # widths may differ
    swapped = teacher.view(2, 5, 3, 4, 4).flip(3).reshape(2, 5, -1)  # heads are paired in order
    assert min(loss.item() for loss in attention_losses(swapped, teacher, 4)) > 0.01
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q  # inner products within a head do not see it
    rotated = (teacher.view(2, 5, 3, 4, 4) @ rotation).reshape(2, 5, -1)
    assert max(loss.abs().item() for loss in attention_losses(rotated, teacher, 4)) < 1e-5


def test_attention_losses_pass_gradients_to_the_student_alone():
    student, teacher = (torch.randn(1, 3, 12, requires_grad=True) for _ in range(2))
    loss = sum(attention_losses(student, teacher, 2))
    loss.backward()
    assert teacher.grad is None
    direction = torch.randn_like(student)
    with torch.no_grad():
        ahead, behind = (sum(attention_losses(student + s * direction, teacher, 2)) for s in (1e-2, -1e-2))
    assert (student.grad * direction).sum().item() == pytest.approx((ahead - behind).item() / 2e-2, rel=1e-2)


def test_attention_losses_are_the_same_under_autocast():
    student, teacher = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    expected = attention_losses(student, teacher, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_losses(student, teacher, 2) == expected


def people_patches(batch=4, width=16, seed=0):
    """Patches with a blob in the middle columns; return them and the blob (N,)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = GRID
    blob = torch.zeros(GRID)
    blob[1:-1, 1:-1] = 1
    direction = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    noise = 0.1 * torch.randn(batch, rows * columns, width, generator=generator)
    return noise + 4 * blob.view(1, -1, 1) * direction, blob.flatten().bool()


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_one_on_the_person_whatever_the_sign(sign):
    patches, blob = people_patches()
    mask = ShapeMask(16, published=False)(sign * patches, GRID)
    assert mask.shape == (4, 32, 1)
    assert mask[:, blob].min() > 0.8
    assert mask[:, ~blob].max() < 0.2


def test_foreground_ignores_a_sign_flip_of_the_component():
    patches, _ = people_patches()
    torch.testing.assert_close(
        ShapeMask(16, published=False)(patches, GRID), ShapeMask(16, published=False)(-patches, GRID)
    )


def test_foreground_survives_outliers():
    patches, blob = people_patches()
    expected = ShapeMask(16, published=False)(patches, GRID)
    patches[0, 5] *= 5
    mask = ShapeMask(16, published=False)(patches, GRID)
    assert (mask - expected)[1:].abs().mean() < 0.1
    published = ShapeMask(16, published=True)(patches, GRID)[1:]
    assert max(published[:, blob].mean(), 1 - published[:, blob].mean()) < 0.9  # squeezed by the outlier, as published


def test_published_mask_equals_scikit_learn_up_to_sign():
    patches = torch.randn(3, 32, 16) * torch.linspace(1, 3, 16)
    points = patches.flatten(0, 1).numpy()
    scores = PCA(1).fit_transform(points)
    expected = (scores - scores.min()) / (scores.max() - scores.min())
    found = ShapeMask(16, published=True)(patches, GRID).flatten(0, 1).numpy()
    assert min(np.abs(found - e).max() for e in (expected, 1 - expected)) < 1e-4


def test_foreground_follows_the_first_component():
    patches, _ = people_patches()
    mask = ShapeMask(16, published=False)
    mask(patches, GRID)
    component = PCA(1).fit(patches.flatten(0, 1).numpy()).components_[0]
    assert abs(float(mask.direction.numpy() @ component)) > 0.999


def test_direction_changes_in_training_mode_only():
    patches, _ = people_patches()
    mask = ShapeMask(16, published=False).eval()
    mask(patches, GRID)
    assert not mask.direction.any()
    mask.train()(patches, GRID)
    after = mask.direction.clone()
    assert after.norm().item() == pytest.approx(1)
    mask.eval()(people_patches(seed=1)[0], GRID)
    assert torch.equal(mask.direction, after)
    mask.train()(people_patches(seed=1)[0], GRID)
    assert not torch.equal(mask.direction, after)


def test_published_mask_keeps_no_state():
    mask = ShapeMask(16, published=True)
    mask(people_patches()[0], GRID)
    assert not mask.direction.any()


@pytest.mark.parametrize("published", [True, False])
def test_mask_is_the_same_under_autocast_and_finite_on_constant_patches(published):
    patches, _ = people_patches()
    mask = ShapeMask(16, published=published).eval()
    expected = mask(patches, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mask(patches, GRID), expected)
    assert mask(torch.ones(2, 32, 16), GRID).isfinite().all()
    assert 0 <= expected.min() < expected.max() <= 1


_WORKER = """
import sys, numpy, torch
import torch.distributed as dist
from dpal_edge.train.losses import ShapeMask

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
batches = torch.from_numpy(numpy.load(f"{folder}/patches.npy"))
for published in (False, True):
    mask = ShapeMask(batches.shape[-1], published=published)
    found = [mask(patches.chunk(2)[rank], (8, 4)).numpy() for patches in batches]
    numpy.save(f"{folder}/{published}-{rank}.npy", numpy.stack(found))
alone = mask.eval()(batches[0].chunk(2)[0], (8, 4)) if rank == 0 else None  # waits for nobody
dist.destroy_process_group()
"""


def test_two_processes_have_the_masks_of_one(tmp_path):
    # Of all the batch, the second half is brighter and noisier: each half alone would be masked otherwise.
    batches = torch.stack([people_patches(seed=seed)[0] for seed in range(3)])
    batches[:, 2:] = 3 * batches[:, 2:] + 0.5 * torch.randn_like(batches[:, 2:])
    np.save(tmp_path / "patches.npy", batches.numpy())
    commands = [[sys.executable, "-c", _WORKER, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0]
    for published in (False, True):
        mask = ShapeMask(16, published=published)
        expected = np.stack([mask(patches, GRID).numpy() for patches in batches])
        found = np.concatenate([np.load(tmp_path / f"{published}-{rank}.npy") for rank in range(2)], axis=1)
        assert np.abs(found - expected).max() < 1e-5
        halves = [ShapeMask(16, published=published)(half, GRID).numpy() for half in batches[0].chunk(2)]
        assert np.abs(np.concatenate(halves) - expected[0]).max() > 0.01
