"""The smallest camera app: say who comes and goes.

python examples/camera_app.py BUNDLE SOURCE
"""

import argparse
from itertools import islice

from dpal_edge.runtime import Pipeline, gather, open_sources


def main(bundle: str, source: str, frames: int | None = None) -> None:
    """Print the tracks that are new and those that have gone."""
    there: set[int | None] = set()
    with Pipeline.open(bundle) as pipeline, open_sources([source]) as cameras:
        for found in islice(gather(cameras), frames):
            for frame in found.values():
                seen = {person.track_id for person in pipeline(frame)}
                for track in seen ^ there:
                    print(f"{frame.time_s:8.2f} s  #{track} {'comes' if track in seen else 'goes'}")
                there = seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("source")
    parser.add_argument("--frames", type=int, help="stop after so many")
    main(**vars(parser.parse_args()))
