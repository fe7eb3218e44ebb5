"""Make pedestrians for an embedding to learn from: people cut out by their masks, recoloured, before other backgrounds.

    python scripts/default_models/pedestrians.py --people LIP_FOLDER --backgrounds DIR --out DIR [--count 8000]

Each garment of a person gets a hue and a brightness of its own, or the dark and muted colours that streets are full
of, so few hundred people become thousands of outfits. The crops are as detectors cut them from street cameras: upright,
more or less tight, of low resolution, compressed. Who lies, bends or stands on the hands is left out.
"""

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dpal_edge.files import find_images
from dpal_edge.finetune.augment import turn_about_grey
from dpal_edge.finetune.frames import covering_view
from dpal_edge.tasks.image import open_image, read_ids
from dpal_edge.tasks.parsing import read_lip

_SIZE = (256, 128)  # height, width in pixels of a crop
_NATURAL = ("background", "hair", "skin", "face")  # classes that keep their colours
_HEAD = ("hair", "face")
_TALL, _HEAD_ABOVE = 1.6, 0.35  # least height in widths of a person, and the share of it that the head lies within
_RECOLOURED, _MUTED = 0.8, 0.6  # share of garments that change, and of them that become dark and muted
_HEIGHTS = (60, 256)  # of the crop, before it is enlarged again


def is_upright(mask: NDArray[np.uint8], labels: tuple[str, ...]) -> bool:
    """Return whether the person of a mask (H, W) of classes stands or walks: slender, with the head above."""
    rows, columns = np.nonzero((mask != 0) & (mask < len(labels)))
    head = np.nonzero(np.isin(mask, [i for i, label in enumerate(labels) if label in _HEAD]))[0]
    if not len(rows) or not len(head):
        return False
    tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    return bool(tall >= _TALL * wide and head.mean() - rows.min() <= _HEAD_ABOVE * tall)


def desaturation(saturation: float) -> NDArray[np.float64]:
    """Return the matrix that keeps so much of the saturation of RGB rows."""
    return saturation * np.eye(3) + (1 - saturation) * np.full((3, 3), 1 / 3)


def recolour(
    pixels: NDArray[np.uint8], mask: NDArray[np.uint8], labels: tuple[str, ...], rng: np.random.Generator
) -> Image.Image:
    """Return the person (H, W, RGBA) in garments of other colours."""
    coloured = pixels.astype(np.float32)
    for label in np.unique(mask):
        if label < len(labels) and labels[label] not in _NATURAL and rng.random() < _RECOLOURED:
            part = mask == label
            turn = turn_about_grey(rng.uniform(-np.pi, np.pi)) * np.exp(rng.normal(0, 0.35))
            if rng.random() < _MUTED:
                turn = desaturation(rng.uniform(0, 0.5)) @ turn * rng.uniform(0.2, 0.9)
            coloured[part] = coloured[part] @ turn.astype(np.float32) + rng.normal(0, 10)
    person = Image.fromarray(np.clip(coloured, 0, 255).astype(np.uint8))
    opaque = Image.fromarray(((mask != 0) & (mask < len(labels))).astype(np.uint8) * 255)
    person.putalpha(opaque.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.GaussianBlur(0.7)))
    return person.crop(opaque.getbbox())


def compose(person: Image.Image, background: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Put a person before a background, as a detector would crop them."""
    height, width = _SIZE
    crop = Image.fromarray(covering_view((background.height, background.width), _SIZE, rng).image(background))
    tall = height * rng.uniform(0.85, 1.08)
    wide = min(person.width * tall / person.height, 1.3 * width) * rng.uniform(0.9, 1.1)
    scaled = person.resize((max(round(wide), 2), round(tall)), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = (width - wide) / 2 + rng.normal(0, 0.05) * width
    top = (height - tall) * rng.uniform(0.2, 0.8)
    crop.paste(scaled, (round(left), round(top)), scaled)
    light = np.asarray(crop, np.float32) @ desaturation(rng.uniform(0.2, 1)).astype(np.float32)
    light = light * rng.uniform(0.6, 1.25) * rng.uniform(0.9, 1.1, 3)
    seen = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
    rows = round(np.exp(rng.uniform(*np.log(_HEIGHTS))))
    return seen.resize((round(rows / 2), rows), Image.Resampling.BILINEAR, reducing_gap=2.0)


@click.command()
@click.option("--people", required=True, type=click.Path(exists=True, path_type=Path), help="In the layout of LIP.")
@click.option("--backgrounds", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--count", default=8000, show_default=True)
def main(people: Path, backgrounds: Path, out: Path, count: int) -> None:
    """Write COUNT crops."""
    split, places = read_lip(people, "train"), find_images((str(backgrounds),)).paths
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    upright = [sample for sample in split.samples if is_upright(read_ids(sample.target), split.labels)]
    if not upright:
        raise click.ClickException(
            f"{people}: nobody stands with {' or '.join(_HEAD)} above (its classes: {', '.join(split.labels)}); give "
            f"masks of people who do"
        )
    for i in range(count):
        sample = upright[i % len(upright)]
        pixels = np.asarray(open_image(sample.image, "RGB"))
        person = recolour(pixels, read_ids(sample.target), split.labels, rng)
        background = open_image(places[rng.integers(len(places))], "RGB")
        crop = compose(person, background, rng)
        crop.save(out / f"{i:05d}.jpg", quality=int(rng.integers(60, 96)))
    click.echo(f"{count} crops of {len(upright)} people in {out}")


if __name__ == "__main__":
    main()
