"""How frames are made as small as a detector wants them: the time, and how close to an exact average.

    python bench/resize.py --shared ../shared [--out bench/results/resize.json]

The runtime averages whole blocks of pixels first, then averages or interpolates what is left (``blocks``); OpenCV's
average over fractions of pixels (``area``) and plain interpolation (``linear``) are beside it, in turns. The gap is the
root mean square, in grey levels, to Pillow's antialiased bilinear, which training's frames are made with.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpal_edge.runtime.device import cpu_features
from dpal_edge.runtime.preprocess import _resize
from dpal_edge.runtime.video import Video

ROOT = Path(__file__).parents[1]
CLIPS = ("vtest.avi", "one-by-one-person-detection.mp4")
FRAMES, EVERY, CALLS = 6, 30, 40
CASES = {"768x432 to 336x189": ((432, 768), (189, 336)), "768x576 to 336x252": ((576, 768), (252, 336)),
         "1920x1080 to 336x189": ((1080, 1920), (189, 336)), "1280x720 to 336x189": ((720, 1280), (189, 336)),
         "430x250 to 256x128, a person": ((430, 250), (256, 128))}  # fmt: skip

Pixels = NDArray[np.uint8]
WAYS: dict[str, Callable[[Pixels, tuple[int, int]], Pixels]] = {
    "blocks": _resize,
    "area": lambda image, size: cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA),
    "linear": lambda image, size: cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR),
}


def main() -> None:
    """Measure, and file what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "resize.json")
    options = parser.parse_args()
    frames = []
    for clip in CLIPS:
        with Video(options.shared / "data" / "videos" / clip) as video:
            frames += list(islice(video, 0, FRAMES * EVERY, EVERY))
    results: dict[str, Any] = {"device": cpu_features().model, "opencv": cv2.__version__}
    for name, (given, wanted) in CASES.items():
        images = [cv2.resize(frame, given[::-1], interpolation=cv2.INTER_CUBIC) for frame in frames]
        exact = [np.asarray(Image.fromarray(i).resize(wanted[::-1], Image.Resampling.BILINEAR), float) for i in images]
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for i in range(CALLS):
            for way, resize in WAYS.items():
                start = time.perf_counter()
                resize(images[i % len(images)], wanted)
                times[way].append(1e3 * (time.perf_counter() - start))
        results[name] = {
            way: {
                "ms": round(statistics.median(times[way]), 3),
                "gap": round(float(np.mean([np.sqrt(((resize(i, wanted) - e) ** 2).mean()) for i, e in
                                            zip(images, exact, strict=True)])), 2),
            }
            for way, resize in WAYS.items()
        }  # fmt: skip
        print(name, results[name])
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
