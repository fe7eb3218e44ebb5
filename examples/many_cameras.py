"""Several cameras with one model: one pass for the people of all, a page to look at, and a line a second.

    python examples/many_cameras.py BUNDLE SOURCE SOURCE... [--serve 8080] [--as-camera]

A camera that fails is opened again by itself; the others go on.
"""

import argparse
import time
from contextlib import nullcontext, suppress
from itertools import islice

from dpal_edge.runtime import Pipeline, gather, open_sources
from dpal_edge.runtime.monitor import Monitor


def main() -> None:
    """Look at all cameras until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--serve", metavar="[HOST:]PORT")
    parser.add_argument("--as-camera", action="store_true", help="play files at their own speed")
    parser.add_argument("--passes", type=int, help="stop after so many")
    options = parser.parse_args()
    with (
        Pipeline.open(options.bundle) as pipeline,
        open_sources(options.sources, patient=True, as_camera=options.as_camera) as cameras,
    ):
        monitor = Monitor(cameras, pipeline.name)
        with serve(monitor, options.serve) as page, suppress(KeyboardInterrupt):
            if page:
                print(f"live on {page.url}")
            told = time.monotonic()
            for frames in islice(gather(cameras, wait_s=0.02), options.passes):
                people = pipeline.look(frames)
                monitor.add(frames, people, pipeline.timing_ms)
                if time.monotonic() - told >= 1:
                    told = time.monotonic()
                    tell(monitor)
        tell(monitor)


def serve(monitor, address):
    """Open the page if one is wanted."""
    if address is None:
        return nullcontext()
    from dpal_edge.runtime.serve import Server  # needs dpal-edge[serve]

    return Server(monitor, address)


def tell(monitor: Monitor) -> None:
    """Print one line about all cameras."""
    numbers = monitor.describe()["sources"]
    print(" | ".join(f"{name}: {told['people']} people, {told['fps']} frames/s" for name, told in numbers.items()))


if __name__ == "__main__":
    main()
