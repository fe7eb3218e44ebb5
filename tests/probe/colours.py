"""Models whose features are known."""

import numpy as np

from dpal_edge.probe.features import Features


class Colours:
    """The mean colour under each patch of ``grid`` (rows, columns), mixed linearly by ``matrix`` (3, D)."""

    has_patches = True

    def __init__(self, grid, matrix, size=(32, 16)):
        self.size, self.grid, self.matrix = size, grid, np.asarray(matrix)
        self.description = {"model": "colours", "kind": "colours", "size": list(size), "layer": 1}

    def __call__(self, crops):
        patches = self.mix(self.cut(crops)).astype(np.float32)
        return Features(patches.mean((1, 2)), patches)

    def cut(self, crops):
        """Cut crops (B, H, W, 3) into (B, rows, columns, pixels, 3)."""
        (rows, columns), (height, width) = self.grid, self.size
        tall, wide = height // rows, width // columns
        cells = crops.reshape(-1, rows, tall, columns, wide, 3).swapaxes(2, 3)
        return cells.reshape(*cells.shape[:3], tall * wide, 3)

    def mix(self, cells):
        return cells.mean(-2) @ self.matrix


class Corners(Colours):
    """A random layer over all pixels of each patch: enough to tell any pattern by a linear map."""

    def __init__(self, grid, width=96, size=(32, 16)):
        pixels = size[0] // grid[0] * (size[1] // grid[1])
        super().__init__(grid, np.random.default_rng(0).normal(size=(pixels * 3 + 1, width)), size)

    def mix(self, cells):
        pixels = cells.reshape(*cells.shape[:3], -1) / 127.5 - 1
        return np.maximum(np.insert(pixels, 0, 1, axis=-1) @ self.matrix, 0)
