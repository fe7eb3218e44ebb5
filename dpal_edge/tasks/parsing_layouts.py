"""Human parsing data in the layouts it is published in."""

from pathlib import Path

from dpal_edge.tasks.parsing import LIP_CLASSES, LIP_LAYOUT, pair_masks, read_lip
from dpal_edge.tasks.sample import Layout, Split, read_layout

CIHP_CLASSES = tuple("torso-skin" if name == "jumpsuits" else name for name in LIP_CLASSES)
ATR_CLASSES = (
    "background", "hat", "hair", "sunglasses", "upper-clothes", "skirt", "pants", "dress", "belt", "left-shoe",
    "right-shoe", "face", "left-leg", "right-leg", "left-arm", "right-arm", "bag", "scarf",
)  # fmt: skip

_CIHP_PARTS = {"train": "Training", "val": "Validation"}
_CIHP_LAYOUT = (
    "the CIHP layout: Training/ and Validation/, each with Images/ID.jpg, Category_ids/ID.png and train_id.txt or "
    "val_id.txt"
)
_ATR_LAYOUT = (
    "the ATR layout: JPEGImages/ID.jpg, SegmentationClassAug/ID.png, and beside them or in list/ train_id.txt and "
    "val_id.txt"
)


def read_parsing(folder: Path, split: str) -> Split[Path]:
    """Read ``split`` (train or val) of CIHP, ATR, LIP, or own data laid out as LIP; a target is the path of a mask.

    CIHP's images show several people; its masks are those of ``Category_ids``, which do not tell people apart. Only
    what holds this split must be there. Masks are not opened here: ``read_mask`` checks them.

    Raises:
        DataError: no such layout, a part of it is missing, or too many annotations are bad.
    """
    return read_layout(folder, split, _LAYOUTS)


def _read_cihp(folder: Path, split: str) -> Split[Path]:
    part = _inner(folder, "instance-level_human_parsing") / _CIHP_PARTS[split]
    samples, problems = pair_masks(part / f"{split}_id.txt", part / "Images", part / "Category_ids", _CIHP_LAYOUT)
    return Split(samples, CIHP_CLASSES, "cihp", problems)


def _read_atr(folder: Path, split: str) -> Split[Path]:
    root = _inner(folder, "humanparsing")
    listing = _inner(root, "list") / f"{split}_id.txt"
    images, masks = root / "JPEGImages", root / "SegmentationClassAug"
    samples, problems = pair_masks(listing, images, masks, _ATR_LAYOUT)
    return Split(samples, ATR_CLASSES, "atr", problems)


def _inner(folder: Path, name: str) -> Path:
    """Return the folder ``name`` in ``folder``, as archives and tools leave it, or ``folder`` itself."""
    return folder / name if (folder / name).is_dir() else folder


_LAYOUTS = (
    Layout("CIHP", ("Training", "Validation", "instance-level_human_parsing/*"), _read_cihp, _CIHP_LAYOUT),
    Layout("ATR", ("JPEGImages", "SegmentationClassAug", "humanparsing/JPEGImages"), _read_atr, _ATR_LAYOUT),
    Layout("LIP", ("*_id.txt", "*_images", "*_segmentations"), read_lip, LIP_LAYOUT),
)
