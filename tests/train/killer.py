"""Train in forked processes that are killed, by a clock or inside a system call, until the run is done.

    python -m tests.train.killer RUN SETTINGS KILLS SEED   at random moments
    python -m tests.train.killer RUN SETTINGS CALL         at every occurrence of CALL (fsync, replace, unlink) in turn

A process that has imported everything and computed nothing forks each trainer, so a restart costs little. Prints a
JSON document: for each kill, the newest checkpoint then and whether a file was half-written.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from dpal_edge.models.checkpoint import list_checkpoints
from dpal_edge.train.config import build_config
from dpal_edge.train.run import run_training


def main() -> None:
    run, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    kills = (
        at_random(run, settings, *map(int, sys.argv[3:5]))
        if sys.argv[3].isdigit()
        else inside(run, settings, sys.argv[3])
    )
    json.dump(kills, sys.stdout)


def at_random(run: Path, settings: dict, wanted: int, seed: int) -> list[dict]:
    """Kill ``wanted`` trainers after random times, none later than its share of the updates; then let one finish."""
    rng = random.Random(seed)
    kills: list[dict] = []
    longest = 2.0
    while len(kills) < wanted:
        child = fork(run, settings)
        end, share = time.monotonic() + rng.uniform(0, longest), settings["steps"] * (len(kills) + 1) // (wanted + 1)
        while time.monotonic() < end and newest_step(run) < share:
            time.sleep(0.003)
        os.kill(child, signal.SIGKILL)
        if not died(child):
            return kills  # it was done before: too few kills for the test
        kills.append(describe(run))
        longest *= 0.8 if kills[-1]["step"] >= share else 1.25
    finish(run, settings)
    return kills


def inside(run: Path, settings: dict, call: str) -> list[dict]:
    """Kill a trainer in its first CALL, the next in its second, and so on until one gets through."""
    kills: list[dict] = []
    while True:
        child = fork(run, settings, call, len(kills) + 1)
        if died(child) != signal.SIGKILL:
            return kills
        kills.append(describe(run))


def fork(run: Path, settings: dict, call: str | None = None, at: int = 0) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        if call:
            owner = pathlib.Path if call in ("replace", "unlink") else os
            setattr(owner, call, killing(getattr(owner, call), at))
        run_training(build_config(settings), run, resume=True)
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)  # a fork must not run the exit handlers of its parent


def killing(function, at: int):
    calls = iter(range(1, 1 << 30))

    def wrapped(*arguments, **options):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return wrapped


def died(child: int) -> int:
    """Return the signal that ended a trainer, 0 if it was done; end here if it failed otherwise."""
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a trainer failed; its traceback is above")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def finish(run: Path, settings: dict) -> None:
    if died(fork(run, settings)):
        sys.exit("the last trainer was killed by somebody else")


def describe(run: Path) -> dict:
    return {"step": newest_step(run), "half_written": bool(list(run.glob("**/.*.partial*")))}


def newest_step(run: Path) -> int:
    checkpoints = list_checkpoints(run)
    return int(checkpoints[-1].stem.partition("-")[2]) if checkpoints else 0


if __name__ == "__main__":
    main()
