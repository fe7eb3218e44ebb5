"""Person re-identification data in the layouts it is published in."""

import re
from pathlib import Path
from typing import NoReturn

from dpal_edge.errors import DataError
from dpal_edge.tasks.reid import MARKET_LAYOUT, Identity, read_market
from dpal_edge.tasks.sample import Layout, Problems, Sample, Split, read_layout, read_rows, require

_MSMT_LISTS = {
    "train": ("list_train.txt", "list_val.txt"),  # the published training part is both: 30,248 and 2,373 images
    "query": ("list_query.txt",),
    "gallery": ("list_gallery.txt",),
}
_MSMT_FOLDERS = {"train": ("train", "mask_train_v2"), "test": ("test", "mask_test_v2")}  # of V1, and of V2
_MSMT_ROW = re.compile(r"(?P<image>(?:\S*/)?\d+_\d+_(?P<camera>\d{1,18})_\S+)\s+(?P<person>\d{1,18})", re.ASCII)
_MSMT_LAYOUT = (
    "the MSMT17 layout: list_train.txt and list_val.txt of images in train/ (in V2 mask_train_v2/), list_query.txt and "
    "list_gallery.txt of images in test/ (mask_test_v2/), a row as 0000/0000_000_01_0303morning_0015_0.jpg 0"
)
_CUHK_KINDS = {"labeled": "boxes drawn by hand", "detected": "boxes of a detector"}


def read_reid(folder: Path, split: str) -> Split[Identity]:
    """Read ``split`` (train, query or gallery) of Market-1501, CUHK03-NP, MSMT17, or own data laid out as Market-1501.

    Only what holds this split must be there. Training takes what is published as the training part, in MSMT17 both
    lists of it. Junk is left out, distractors (person 0 of Market-1501) stay in the gallery.

    Raises:
        DataError: no such layout, a part of it is missing, or too many annotations are bad.
    """
    return read_layout(folder, split, _LAYOUTS)


def _read_msmt(folder: Path, split: str) -> Split[Identity]:
    choices = [folder / name for name in _MSMT_FOLDERS["train" if split == "train" else "test"]]
    images = require(next((path for path in choices if path.exists()), choices[0]), _MSMT_LAYOUT)
    problems, samples = Problems(folder), dict[Path, Sample[Identity]]()
    for listing in _MSMT_LISTS[split]:
        for number, row in read_rows(folder / listing, _MSMT_LAYOUT):
            where = f"{listing}, line {number}"
            parsed = _MSMT_ROW.fullmatch(row)
            if parsed is None:
                problems.add(where, f"{row!r} tells no image, camera and person; expected {_MSMT_LAYOUT}")
            elif (path := images / parsed["image"]) in samples:
                problems.add(where, f"{parsed['image']} is listed before; expected each image once")
            elif not path.is_file():
                problems.add(where, f"no image {path}")
            else:
                samples[path] = Sample(path, Identity(person=int(parsed["person"]), camera=int(parsed["camera"])))
    found = problems.finish(len(samples))
    return Split(tuple(samples.values()), protocol="msmt17", problems=found)


def _refuse_cuhk(folder: Path, split: str) -> NoReturn:
    kinds = " or ".join(f"{folder / kind} ({what})" for kind, what in _CUHK_KINDS.items() if (folder / kind).is_dir())
    raise DataError(f"{folder}: CUHK03-NP, whose boxes come in two kinds; give the folder of one of them: {kinds}")


_LAYOUTS = (
    Layout("Market-1501", ("bounding_box_*", "query"), read_market, MARKET_LAYOUT),
    Layout("MSMT17", ("list_*.txt",), _read_msmt, _MSMT_LAYOUT),
    Layout(
        "CUHK03-NP",
        tuple(f"{kind}/{part}" for kind in _CUHK_KINDS for part in ("bounding_box_*", "query")),
        _refuse_cuhk,
        "labeled/ or detected/, each in the Market-1501 layout; give one of the two",
    ),
)
