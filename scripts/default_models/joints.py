"""Correct the joints of a data set by two second opinions: a model that has learned them, and MoveNet.

    python scripts/default_models/joints.py --judge FILE --peer MOVENET_TFLITE --joints COCO_FOLDER --out DIR

Crowd-sourced joints are often wrong: where two models that do not know each other find the same place, a fifth of those
of Leeds Sports Pose Extended lie elsewhere. A joint that MoveNet confirms moves halfway to where MoveNet has it; one
that only the judge confirms stays; one that neither confirms moves to between the two models where they agree, and
stays where they do not. What nobody labelled stays so, and joints that MoveNet does not know stay as they are. Needs
the package ai-edge-litert.

Source: the idea that annotations are noisy observations of the truth, Johnson and Everingham, 2011, of this very set.
Differs: other models instead of an estimate of how annotators err.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dpal_edge.files import write_text
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.vit import normalize
from dpal_edge.tasks.decoding import decode_joints, place_in_box
from dpal_edge.tasks.image import open_sample, read_crop
from dpal_edge.tasks.pose import HALF, read_coco_keypoints
from dpal_edge.tasks.pose_layouts import COCO_JOINTS

_FAR = 0.3  # of the torso, left shoulder to right hip: places farther apart are not the same
_BATCH = 32

Places = NDArray[np.float64]  # (K, 2), x and y in pixels of the image


def correct(labels: Places, judged: Places, peer: Places, torso: float) -> tuple[Places, NDArray[np.str_]]:
    """Return corrected places (K, 2) of the labelled ones, and what was done with each (K,).

    Args:
        labels: what is to be corrected.
        judged: the same joints as the judge finds them.
        peer: as the peer does; NaN is a joint that it does not know.
        torso: pixels.
    """

    def same(one: Places, other: Places) -> NDArray[np.bool_]:
        return np.linalg.norm(one - other, axis=1) < _FAR * torso

    confirmed, kept, moved = same(labels, peer), same(labels, judged), same(judged, peer)
    places, done = labels.copy(), np.full(len(labels), "kept", "<U8")
    places[confirmed], done[confirmed] = (labels + peer)[confirmed] / 2, "averaged"
    wrong = moved & ~confirmed & ~kept
    places[wrong], done[wrong] = (judged + peer)[wrong] / 2, "replaced"
    return places, done


class Peer:
    """MoveNet for one person; its 17 joints are COCO's."""

    def __init__(self, path: Path, joints: tuple[str, ...]) -> None:
        """Open the network; ``joints`` are the names that its findings are given for."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ModuleNotFoundError as error:
            raise click.ClickException("MoveNet needs LiteRT: pip install ai-edge-litert") from error
        self._network = Interpreter(model_path=str(path), num_threads=1)
        self._network.allocate_tensors()
        [self._in], [self._out] = self._network.get_input_details(), self._network.get_output_details()
        self._order = [COCO_JOINTS.index(name) if name in COCO_JOINTS else -1 for name in joints]

    def __call__(self, image: Image.Image) -> Places:
        """Return the joints of the person in an RGB image, which is seen in the middle of a black square."""
        width, height = image.size
        longer = max(width, height)
        corner = np.array([(longer - width) // 2, (longer - height) // 2])
        square = Image.new("RGB", (longer, longer))
        square.paste(image, tuple(corner))
        side = int(self._in["shape"][1])
        pixels = np.asarray(square.resize((side, side), Image.Resampling.BILINEAR))
        self._network.set_tensor(self._in["index"], pixels[None].astype(self._in["dtype"]))
        self._network.invoke()
        rows = self._network.get_tensor(self._out["index"]).reshape(-1, 3)[:, 1::-1]  # y, x, score in 0..1
        found = np.vstack([rows * longer - corner, [np.nan, np.nan]])
        return found[self._order]


@torch.no_grad()
def judge(model: HumanModel, metadata: dict[str, Any], crops: NDArray[np.uint8], boxes: Places) -> Places:
    """Return the joints (n, K, 2) that a model with a pose head finds in crops of boxes (n, 4), left, top, ..."""
    size, pixels = model.backbone.config.size, torch.from_numpy(crops).permute(0, 3, 1, 2)
    raw = model(normalize(pixels, metadata["mean"], metadata["std"]), ("pose",))["pose"].float().numpy()
    places, _ = decode_joints(raw, model.configs["pose"].kind, size)
    return np.asarray(place_in_box(places, size, boxes), float)


@click.command()
@click.option(
    "--judge", "judging", required=True, type=click.Path(exists=True, path_type=Path), help="Has a pose head."
)
@click.option(
    "--peer", required=True, type=click.Path(exists=True, path_type=Path), help="MoveNet single pose, tflite."
)
@click.option("--joints", required=True, type=click.Path(exists=True, path_type=Path), help="In COCO's layout.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(judging: Path, peer: Path, joints: Path, out: Path) -> None:
    """Write the training annotations, corrected, and link the images."""
    model, metadata = load_human(judging)
    document = json.loads((joints / "annotations" / "person_keypoints_train.json").read_text(encoding="utf-8"))
    names, split = model.configs["pose"].labels, read_coco_keypoints(joints, "train")
    if split.labels != names:
        raise click.ClickException(
            f"{joints} labels {', '.join(split.labels)}, the judge finds {', '.join(names)}; give a judge of these data"
        )
    movenet, shoulder, hip = Peer(peer, names), names.index("left_shoulder"), names.index("right_hip")
    people, done = {person["id"]: person for person in document["annotations"]}, list[str]()
    samples = split.samples
    for start in range(0, len(samples), _BATCH):
        part = samples[start : start + _BATCH]
        boxes = np.array([sample.box for sample in part])
        crops = np.stack([read_crop(sample, model.backbone.config.size) for sample in part])
        for sample, judged in zip(part, judge(model, metadata, crops, boxes), strict=True):
            found = movenet(open_sample(sample).crop(sample.box)) + np.array(sample.box)[:2]
            torso = np.mean([np.linalg.norm(seen[shoulder] - seen[hip]) for seen in (judged, found)])
            places, what = correct(sample.target.joints.astype(float), judged, found, float(torso))
            person = people[sample.target.id]
            rows = np.array(person["keypoints"], float).reshape(-1, 3)
            rows[sample.target.labelled, :2] = (places[sample.target.labelled] - HALF).round(2)
            person["keypoints"] = rows.ravel().tolist()
            done += what[sample.target.labelled].tolist()
    link = out / "train"
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to((joints / "train").resolve())
    write_text(out / "annotations" / "person_keypoints_train.json", json.dumps(document))
    told = ", ".join(f"{done.count(what)} {what}" for what in sorted(set(done)))
    click.echo(f"{len(done)} joints of {len(samples)} people in {out}: {told}")


if __name__ == "__main__":
    main()
