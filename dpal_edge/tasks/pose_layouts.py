"""Body pose data in the layouts it is published in.

The joints of the published sets are named alike, so that one head's labels serve several: ``neck`` and ``head_top``
whatever a file calls them.
"""

from collections.abc import Sequence
from pathlib import Path

from dpal_edge.errors import DataError
from dpal_edge.tasks.aic import AIC_LAYOUT, AIC_MARKERS, read_aic
from dpal_edge.tasks.mpii import MPII_LAYOUT, read_mpii
from dpal_edge.tasks.pose import COCO_KEYPOINTS, Pose, read_coco_keypoints, read_people
from dpal_edge.tasks.sample import Layout, Split, read_layout, require

COCO_JOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
CROWDPOSE_JOINTS = (*COCO_JOINTS[5:], "head_top", "neck")
_CROWDPOSE = (
    "the CrowdPose layout: crowdpose_trainval.json to train and crowdpose_test.json to score (or crowdpose_train.json "
    "and crowdpose_val.json), also in annotations/ or json/ or as mmpose_crowdpose_*.json, and the images in images/"
)
_OCHUMAN = (
    "the OCHuman layout: ochuman_coco_format_test_range_0.00_1.00.json (or _val_), also in annotations/, and the "
    "images in images/"
)
_HUMANART = (
    "the Human-Art layout: annotations/training_humanart_coco.json (with COCO in a folder coco/ beside this one) or "
    "training_humanart.json to train, annotations/validation_humanart.json to score, and the images in images/"
)


def read_pose(folder: Path, split: str) -> Split[Pose]:
    """Read ``split`` (train or val) of COCO, MPII, AI Challenger, CrowdPose, OCHuman, Human-Art, or own data as COCO's.

    A sample is one person in its annotated box. Only what holds this split must be there. ``protocol`` says which
    layout it is: coco, mpii, aic, crowdpose, ochuman or humanart. The test parts of CrowdPose and OCHuman, which are
    what is published on, are their ``val``; CrowdPose then trains on trainval. OCHuman has no ``train``.

    Raises:
        DataError: no such layout, a part of it is missing, or too many annotations are bad.
    """
    return read_layout(folder, split, _LAYOUTS)


def _read_crowdpose(folder: Path, split: str) -> Split[Pose]:
    test = _find(folder, _crowdpose_files("test"))
    choices = ["trainval", "train"] if split == "train" else ["test", "val"]
    if split == "train" and test is None and _find(folder, _crowdpose_files("val")):
        choices = ["train"]  # what is trained on must not hold val, which is scored on
    names = [name for choice in choices for name in _crowdpose_files(choice)]
    path = _find(folder, names) or folder / names[0]
    images = require(folder / "images", _CROWDPOSE)
    return read_people(path, _CROWDPOSE, images.joinpath, names=CROWDPOSE_JOINTS, protocol="crowdpose", use_area=False)


def _crowdpose_files(part: str) -> list[str]:
    name = f"crowdpose_{part}.json"
    return [name, f"annotations/{name}", f"json/{name}", f"annotations/mmpose_{name}"]


def _read_ochuman(folder: Path, split: str) -> Split[Pose]:
    if split != "val":
        raise DataError(f"{folder}: OCHuman has no part to train on; train on COCO, and score on OCHuman's val")
    names = [f"ochuman_coco_format_{part}_range_0.00_1.00.json" for part in ("test", "val")]
    names = [f"{parent}{name}" for name in names for parent in ("", "annotations/")]
    path = _find(folder, names) or folder / names[0]
    images = require(folder / "images", _OCHUMAN)
    return read_people(path, _OCHUMAN, images.joinpath, names=COCO_JOINTS, protocol="ochuman")


def _read_humanart(folder: Path, split: str) -> Split[Pose]:
    names = ["training_humanart.json"] if split == "train" else ["validation_humanart.json"]
    if split == "train" and (folder.parent / "coco").is_dir():
        names.insert(0, "training_humanart_coco.json")
    path = _find(folder / "annotations", names) or folder / "annotations" / names[0]

    def locate(name: str) -> Path:  # names begin with the folder: HumanArt/images/..., or coco/train2017/...
        inside = name.removeprefix("HumanArt/")
        return folder / inside if inside.startswith("images/") else folder.parent / name

    return read_people(path, _HUMANART, locate, names=COCO_JOINTS, protocol="humanart")


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


_LAYOUTS = (
    Layout("Human-Art", ("annotations/*_humanart*.json",), _read_humanart, _HUMANART),
    Layout("AI Challenger", AIC_MARKERS, read_aic, AIC_LAYOUT),
    Layout(
        "CrowdPose",
        tuple(name.replace("{part}", "*") for name in _crowdpose_files("{part}")),
        _read_crowdpose,
        _CROWDPOSE,
    ),
    Layout(
        "OCHuman", ("ochuman_coco_format_*.json", "annotations/ochuman_coco_format_*.json"), _read_ochuman, _OCHUMAN
    ),
    Layout("MPII", ("annot/*.json", "annotations/mpii_*.json"), read_mpii, MPII_LAYOUT),
    Layout("COCO", ("annotations/person_keypoints_*.json",), read_coco_keypoints, COCO_KEYPOINTS),
)
