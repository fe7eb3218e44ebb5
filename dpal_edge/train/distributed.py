"""Several training processes: started here or by torchrun, one for each GPU, on any number of machines.

Gradients travel by NCCL between GPUs and by gloo between CPUs. What the loop must agree on beside them (a stop signal,
the metrics of an interval) travels as host data on a second group, so the device never waits for it.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dpal_edge.errors import ConfigError, DataError

_PATIENCE = timedelta(minutes=30)  # a peer may validate, probe or save for a while
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


@dataclass(frozen=True)
class World:
    """The training processes of a run and the place of this one among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine; the index of its GPU
    control: Any = field(default=None, repr=False)  # group for host data; None with one process

    @property
    def main(self) -> bool:
        """Whether this process writes the run folder and talks to the user."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, by rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            dist.barrier(group=self.control)


class Vote:
    """Whether any process wants to stop, agreed on while the next update runs: each call returns the last call's vote.

    With one process the vote is known at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __call__(self, stop: bool) -> bool:
        """Cast this update's vote and return the outcome of the one before."""
        if self._world.size == 1:
            return stop
        outcome = False
        if self._pending is not None:
            work, ballot = self._pending
            work.wait()
            outcome = bool(ballot.item())
        ballot = torch.tensor(int(stop))
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        self._pending = (work, ballot)
        return outcome


def in_worker() -> bool:
    """Say whether this process was started as one of several."""
    return all(name in os.environ for name in _LAUNCHED)


def join_world(device: str) -> World:
    """Join the other processes if there are any; ``device`` is ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: more processes than GPUs on this machine.
    """
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        return World(rank, size, int(os.environ["LOCAL_RANK"]), dist.new_group(backend="gloo", timeout=_PATIENCE))
    if not in_worker() or os.environ["WORLD_SIZE"] == "1":
        return World()
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            f"start as many processes as GPUs, or give --set device=cpu"
        )
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, control)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Be one of the training processes for a while.

    Raises:
        ConfigError: as join_world.
        DataError: another process has ended before its time.
    """
    if in_worker():
        _end_with_parent()
    world = join_world(device)
    try:
        yield world
    except RuntimeError as error:
        if world.size == 1 or not any(text in str(error) for text in _GONE):
            raise
        raise DataError(
            f"training process {world.rank} of {world.size} lost another one ({str(error).splitlines()[0]}); what "
            f"ended it says so itself"
        ) from error
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def _end_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies, so that none trains on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def launch(processes: int, arguments: list[str]) -> int:
    """Run ``dpal-edge ARGUMENTS`` in ``processes`` processes on this machine; return the exit status.

    If one fails, the others are ended; it has then said why on standard error, and one line says what to do.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1800")  # seconds to validate and save after a signal
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"dpal-edge-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "dpal_edge", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (2, 130):  # a wrong option, or a stop that was asked for: already explained
            return int(failure.exitcode)
        ended = f"by signal {-failure.exitcode}" if failure.exitcode < 0 else f"with exit status {failure.exitcode}"
        sys.stderr.write(
            f"Error: training process {rank} of {processes} ended {ended}, so the others were ended too; its message, "
            f"if it had time for one, is above; the same command with --resume goes on from the last checkpoint\n"
        )
        return 1
    except SignalException:
        return 130
    return 0
