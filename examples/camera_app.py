"""The smallest camera app: say who comes and goes.

python examples/camera_app.py BUNDLE SOURCE
"""

import sys
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
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
