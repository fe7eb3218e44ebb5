"""Count who crosses a line, in each direction.

    python examples/line_counter.py BUNDLE SOURCE --line 384,0,384,432

The line goes from one point to another, in pixels; a person stands where the middle of their box's lower edge is. Left
and right are as seen by somebody who walks along the line.
"""

import argparse
from collections import Counter
from itertools import islice

from dpal_edge.runtime import Person, Pipeline, gather, open_sources

_REMEMBERED = 1000  # tracks, so that weeks of people take no more memory than an hour of them


class LineCounter:
    """Counts the tracks that change sides of a line, between its two ends."""

    def __init__(self, line: tuple[float, float, float, float]) -> None:
        self.line = line
        self.crossed: Counter[str] = Counter()
        self._places: dict[int | None, tuple[float, float]] = {}  # by track, who was seen last at the end

    def add(self, people: list[Person]) -> None:
        """Take the people of the next frame."""
        for person in people:
            left, _, right, bottom = person.box
            place = (left + right) / 2, bottom
            before = self._places.pop(person.track_id, None)
            self._places[person.track_id] = place
            if before is not None and self._crosses(before, place):
                self.crossed["to the right" if _side(self.line, place) > 0 else "to the left"] += 1

        while len(self._places) > _REMEMBERED:
            del self._places[next(iter(self._places))]

    def _crosses(self, before: tuple[float, float], after: tuple[float, float]) -> bool:
        path, line = (*before, *after), self.line
        changes_sides = (_side(line, before) > 0) != (_side(line, after) > 0)
        within = (_side(path, line[:2]) > 0) != (_side(path, line[2:]) > 0)
        return changes_sides and within


def _side(line, place) -> float:
    """Return a number that is above 0 on the right of a line, y pointing down."""
    x1, y1, x2, y2 = line
    return (x2 - x1) * (place[1] - y1) - (y2 - y1) * (place[0] - x1)


def main() -> None:
    """Count until the source ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("source")
    parser.add_argument("--line", default="384,0,384,432", help="x1,y1,x2,y2")
    parser.add_argument("--frames", type=int, help="stop after so many")
    options = parser.parse_args()
    counter = LineCounter(tuple(float(number) for number in options.line.split(",")))
    with Pipeline.open(options.bundle) as pipeline, open_sources([options.source]) as sources:
        for found in islice(gather(sources), options.frames):
            for frame in found.values():
                # Tracks need the embedding; joints, parts and attributes are not asked for.
                counter.add(pipeline.look({"": frame}, tasks=("embedding",))[""])
    print(f"{counter.crossed['to the left']} to the left, {counter.crossed['to the right']} to the right")


if __name__ == "__main__":
    main()
