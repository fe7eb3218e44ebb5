"""Maps on patches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpal_edge.probe.grid import interpolation, resize_map


def test_a_row_by_hand():
    np.testing.assert_allclose(interpolation(2, 4) @ [0, 1], [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(interpolation(1, 3) @ [5], [5, 5, 5])
    np.testing.assert_allclose(interpolation(3, 3), np.eye(3))


@pytest.mark.parametrize("size", [(11, 5), (4, 3), (2, 7), (1, 1)])
def test_agrees_with_torch(size):
    maps = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(maps).permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)
    np.testing.assert_allclose(resize_map(maps, size), expected.numpy(), atol=1e-6)
