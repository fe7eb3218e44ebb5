"""Tiny attribute sets in the layouts of PA-100K, PETA and RAPv2, MATLAB files nested as theirs are."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from tests.tasks.layouts import paint, save_image

PA100K = (
    "Female", "AgeOver60", "Age18-60", "AgeLess18", "Front", "Side", "Back", "Hat", "Glasses", "HandBag", "ShoulderBag",
    "Backpack", "HoldObjectsInFront", "ShortSleeve", "LongSleeve", "UpperStride", "UpperLogo", "UpperPlaid",
    "UpperSplice", "LowerStripe", "LowerPattern", "LongCoat", "Trousers", "Shorts", "Skirt&Dress", "boots",
)  # fmt: skip
PETA = tuple(f"attribute{i}" for i in range(105))
RAP = tuple(f"attribute{i}" for i in range(152))
RAP_SELECTED = tuple(range(0, 108, 2))  # columns, 54 of 152


def cell(items: Any, *, row: bool = False) -> np.ndarray:
    """MATLAB's cell array (n, 1), or (1, n)."""
    array = np.empty(len(items), object)
    array[:] = list(items)
    return array[None] if row else array[:, None]


def _column(numbers: Any) -> np.ndarray:
    return np.array(numbers, np.uint16)[:, None]


def _partitions(parts: Any, names: Any, *, row: bool) -> np.ndarray:
    """Five structs of 1-based numbers of images: the given ones, and four with the parts in another order."""
    orders = [parts, *([parts[1], parts[2], parts[0]] for _ in range(4))]
    shape = (lambda numbers: _column(numbers).T) if row else _column
    structs = [dict(zip(names, map(shape, order), strict=True)) for order in orders]
    return cell(structs, row=row)


def flags(images: int, attributes: int) -> np.ndarray:
    """What is annotated, (images, attributes) of 0 and 1."""
    return np.random.default_rng(8).integers(0, 2, (images, attributes), dtype=np.uint8)


def _paint(path: Path) -> None:
    save_image(path, paint((60, 0, 0), np.random.default_rng(9)))


def write_pa100k(
    folder: Path, values: np.ndarray, sizes: tuple[int, int, int], *, images: str = "data", mat: str = "annotation.mat"
) -> Path:
    """``values`` of the images of training, validation and test, as many as ``sizes`` says, one after the other."""
    names = [f"{i + 1:06d}.jpg" for i in range(len(values))]
    variables: dict[str, Any] = {"attributes": cell(PA100K)}
    start = 0
    for part, size in zip(("train", "val", "test"), sizes, strict=True):
        variables[f"{part}_images_name"] = cell(names[start : start + size])
        variables[f"{part}_label"] = values[start : start + size]
        start += size
    for name in names:
        _paint(folder / images / name)
    (folder / mat).parent.mkdir(parents=True, exist_ok=True)
    savemat(folder / mat, variables, do_compression=True)
    return folder


def write_peta(folder: Path, values: np.ndarray, parts: Any) -> Path:
    """``values`` (n, 105), and the numbers of the images of training, validation and test, 1 the first."""
    images = len(values)
    ids = np.column_stack([np.arange(1, images + 1), np.arange(images) // 2, np.ones(images), np.arange(images)])
    peta = {
        "data": np.hstack([ids, values]).astype(np.float64),
        "attribute": cell(PETA),
        "selected_attribute": np.arange(1, 36)[None],
        "partition": _partitions(parts, ("train", "val", "test"), row=False),
    }
    for number in range(1, images + 1):
        _paint(folder / "images" / f"{number:05d}.png")
    savemat(folder / "PETA.mat", {"peta": peta})
    return folder


def write_rap(folder: Path, values: np.ndarray, parts: Any, *, mat: str = "RAP_annotation/RAP_annotation.mat") -> Path:
    """``values`` (n, 152) of 0, 1 and 2, and the numbers of the images of training, validation and test."""
    names = [
        f"CAM{i:02d}-2014-02-15-20140215161032-20140215162620-tarid0-frame218-line1.png" for i in range(len(values))
    ]
    rap = {
        "name": cell(names),
        "data": values,
        "attribute": cell(RAP),
        "selected_attribute": np.array(RAP_SELECTED, np.uint8)[None] + 1,
        "partition_attribute": _partitions(parts, ("train_index", "val_index", "test_index"), row=True),
        "person_identity": _column(range(len(values))),
    }
    for name in names:
        _paint(folder / "RAP_dataset" / name)
    (folder / mat).parent.mkdir(parents=True, exist_ok=True)
    savemat(folder / mat, {"RAP_annotation": rap}, do_compression=True)
    return folder
