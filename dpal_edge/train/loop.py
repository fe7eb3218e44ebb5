"""The training loop: what an update is, and nothing about files."""

import copy
import gc
import math
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.models.students import Student
from dpal_edge.models.teacher import Teachers
from dpal_edge.runtime.device import cpu_features
from dpal_edge.train.augment import to_views
from dpal_edge.train.cache import TargetCache
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.data import Batch, PersonBatches
from dpal_edge.train.distributed import World
from dpal_edge.train.memory import give_back_freed_memory
from dpal_edge.train.method import Method, Values, Views
from dpal_edge.train.methods import find_method
from dpal_edge.train.optimizer import build_optimizer

_NO_MEMORY = (
    "can't allocate memory",
    "could not create a primitive",
    "could not create a memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
Item = TypeVar("Item")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Machine(Protocol):
    """Settings that say where to compute, and how precisely."""

    @property
    def device(self) -> str:
        """``auto`` or what torch calls a device."""
        ...

    @property
    def precision(self) -> str:
        """``auto``, float32, bf16 or fp16."""
        ...


@dataclass
class State:
    """All that an update changes: saved whole, restored whole."""

    method: Method
    model: nn.Module  # the method, or what averages its gradients over processes
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: Student  # running mean of the backbone
    device: torch.device
    precision: str  # float32, bf16 or fp16
    world: World
    cache: TargetCache | None = None
    step: int = 0  # updates done


class TimedLoader:
    """Iterate the passes of each update once, and add up the seconds that the loop waited for them.

    An item is the list of one update's batches, of which there are ``accumulate``. Closing it ends the workers.
    """

    def __init__(
        self, batches: PersonBatches, steps: range, *, workers: int, device: torch.device, accumulate: int = 1
    ) -> None:
        self.batches = batches
        self.waited_s = 0.0
        self._accumulate = accumulate
        self._loader: DataLoader[Batch] = DataLoader(
            batches,
            sampler=range(steps.start * accumulate, steps.stop * accumulate),
            batch_size=None,  # an item is a whole batch
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=prepare_worker,
        )
        self._iterator: Iterator[Batch] | None = None

    def __enter__(self) -> "TimedLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[list[Batch]]:
        self._iterator = iter(self._loader)
        try:
            while True:
                start = time.perf_counter()
                batches = [batch for batch in (next_batch(self._iterator) for _ in range(self._accumulate)) if batch]
                self.waited_s += time.perf_counter() - start
                if not batches:
                    return
                yield batches
        finally:
            self.close()

    def close(self) -> None:
        """End the workers."""
        end_workers(self._iterator)


def choose_device(config: Machine, world: World, *, earlier: str | None = None) -> tuple[torch.device, str]:
    """Resolve ``auto``: CUDA if there is one; bf16 where the device multiplies it faster than float32.

    A run that goes on keeps its ``earlier`` precision, so that it does not change half-way on another machine.

    Raises:
        ConfigError: a device that torch does not see, or fp16 without CUDA.
    """
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try --set device=cpu"
        ) from error
    precision: str = earlier if earlier and config.precision == "auto" else config.precision
    if precision == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else cpu_features().fast_bf16
        )
        precision = "bf16" if fast else "float32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs a CUDA device; on a CPU take --set precision=bf16 or float32")
    return device, precision


def build_state(
    config: TrainConfig,
    teachers: Teachers,
    device: torch.device,
    precision: str,
    world: World | None = None,
    first: Student | None = None,
) -> State:
    """Build method, optimizer and running mean at update 0; teachers change to ``precision``.

    The student begins with the weights of ``first`` instead of those of the seed, where there is one.
    """
    world = world or World()
    method = find_method(config.method).build(config, teachers).to(device)
    if first is not None:
        method.backbone.load_state_dict(first.state_dict())
    teachers.cast(DTYPES[precision])
    optimizer = build_optimizer(config.optimizer, _parameter_groups(method, config), method, (0.9, 0.95))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ema = copy.deepcopy(method.backbone).requires_grad_(False)
    if config.compile:
        method.compile()
    model = DistributedDataParallel(method) if world.size > 1 else method
    return State(method, model, optimizer, scaler, ema, device, precision, world)


def train(state: State, loader: TimedLoader, config: TrainConfig) -> Iterator[tuple[list[Batch], Values]]:
    """Update once per item; yield its batches and detached values still on the device, so that no sync happens here.

    Raises:
        ConfigError: the device's memory is too small; says what fits.
    """
    state.method.train()
    for batches in loader:
        rate = learning_rate(state.step, config)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        progress = state.step / config.steps
        passes = (_views(batch, state.device) for batch in batches)
        try:
            values = train_step(state, passes, count=len(batches), progress=progress, max_norm=config.clip)
        except RuntimeError as error:
            del passes
            traceback.clear_frames(error.__traceback__)  # they hold what the failed update had allocated
            if not is_out_of_memory(error):
                raise
            raise ConfigError(_what_fits(state, config, loader.batches)) from error
        state.step += 1
        update_ema(state.ema, state.method.backbone, ema_decay(state.step, config.ema_decay))
        yield batches, values


def train_step(state: State, passes: Iterable[Views], *, count: int = 1, progress: float, max_norm: float) -> Values:
    """Update the student once from ``count`` passes of equal size.

    Returns:
        Loss terms, averaged over passes, and the norm of the gradient before clipping; detached, on the device.
    """
    total: Values = {}
    for i, views in enumerate(passes):
        # Processes exchange gradients in the last pass alone.
        model = state.model
        with model.no_sync() if isinstance(model, DistributedDataParallel) and i < count - 1 else nullcontext():
            for name, value in compute(state, views, progress, share=1 / count).items():
                total[name] = total[name] + value / count if name in total else value / count
    state.scaler.unscale_(state.optimizer)
    trainable = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trainable, max_norm or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return {**total, "grad_norm": norm}


def compute(state: State, views: Views, progress: float, *, share: float = 1.0) -> Values:
    """Add the gradients of one pass, scaled by ``share``; return its detached values."""
    targets = targets_of(state, views)
    with autocast(state.device, state.precision):
        values: Values = state.model(views, targets, progress)
    torch.autograd.backward(state.scaler.scale(values["loss"] * share))
    return {name: value.detach() for name, value in values.items()}


@torch.no_grad()
def targets_of(state: State, views: Views) -> Values:
    """Return what the teachers say of the views, from the cache if it knows all of them."""
    if state.cache is None:
        return state.method.targets(views)
    found = state.cache.get(views.keys, state.device) if views.keys is not None else None
    if found is None:
        dtype = DTYPES[state.precision]
        # Rounded as the cache rounds, so that an update does not depend on whether it was the one to fill the cache.
        found = {name: value.to(dtype).float() for name, value in state.method.targets(views).items()}
        if views.keys is not None:
            state.cache.put(views.keys, found, dtype)
    return found


@torch.no_grad()
def validate(state: State, batches: PersonBatches) -> tuple[dict[str, float], dict[str, str]]:
    """Return the mean loss of ``backbone`` and ``ema`` over held-out images, and what could not be read.

    Every process does the same, because a method may look at all processes' images at once.
    """
    method, trained = state.method.eval(), state.method.backbone
    count = -(-len(batches.source.names) // batches.batch)
    totals = {name: torch.zeros((), device=state.device) for name in ("backbone", "ema")}
    skipped: dict[str, str] = {}
    for i in range(count):
        batch = batches[i]
        skipped.update(batch.skipped)
        views = to_views(batch, state.device)
        targets = method.targets(views)
        for name, backbone in (("backbone", trained), ("ema", state.ema)):
            method.backbone = backbone
            with autocast(state.device, state.precision):
                totals[name] += method.forward(views, targets, 1.0)["loss"].float()  # never compiled
        method.backbone = trained
    method.train()
    return {name: total.item() / count for name, total in totals.items()}, skipped


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rise linearly over the warm-up, then fall along a half cosine to 0 (docs/method.md 7)."""
    peak = config.base_lr * config.batch / 256
    warmup = config.warmup * config.steps
    if step < warmup:
        return peak * (step + 1) / (math.ceil(warmup) + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(config.steps - warmup, 1)))


def ema_decay(step: int, most: float) -> float:
    """Grow towards ``most``, so that the mean forgets its random start within a short run."""
    return min(most, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, source: nn.Module, decay: float) -> None:
    """Move ``ema`` towards ``source`` by 1 - ``decay``."""
    torch._foreach_lerp_(list(ema.parameters()), list(source.parameters()), 1 - decay)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute in ``precision``; float32 turns autocast off."""
    low = precision != "float32"
    return torch.autocast(device.type, DTYPES[precision] if low else torch.bfloat16, enabled=low)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell a device, or a CPU, that has no memory left from any other failure.

    oneDNN does not say why it could not create something; lack of memory is the cause that goes away with less of it.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _views(batch: Batch, device: torch.device) -> Views:
    """Return the views of a batch; one with another image in an unreadable one's place must not be kept by its keys."""
    views = to_views(batch, device)
    return replace(views, keys=None) if batch.skipped else views


def _what_fits(state: State, config: TrainConfig, batches: PersonBatches) -> str:
    """Say how to go on after memory ran out: try ever smaller passes of the same update until one fits."""
    images = batches.batch
    factors = [n for n in range(2, images + 1) if config.batch % (config.accumulate * n * state.world.size) == 0]
    for factor in factors:
        # Where several processes exchange what they found, one that failed cannot try alone.
        if state.world.size > 1 or _fits(state, batches, images // factor):
            fits = "try" if state.world.size > 1 else "it is enough for"
            return (
                f"{state.device} has too little memory for {images} images at a time; {fits} {images // factor}: go on "
                f"with --resume --set accumulate={config.accumulate * factor}, which keeps the batch of {config.batch}"
            )
    return (
        f"{state.device} has too little memory for {images} images at a time, and for each equal part of them; take a "
        f"batch with more divisors, smaller views, or --set decoder_chunk=1"
    )


def _fits(state: State, batches: PersonBatches, images: int) -> bool:
    state.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back_freed_memory()
    smaller = PersonBatches(batches.source, batches.config, batches.views, batch=images)
    try:
        compute(state, to_views(smaller[0], state.device), 0.0)
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)
        if is_out_of_memory(error):
            return False
        raise
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    return True


def _parameter_groups(method: Method, config: TrainConfig) -> list[dict[str, object]]:
    """Split what trains into decayed and not decayed parameters."""
    spared = method.spared_from_decay() if config.no_decay == "embeddings" else set()
    groups: dict[float, list[Tensor]] = {config.weight_decay: [], 0.0: []}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            groups[0.0 if parameter.ndim == 1 or name in spared else config.weight_decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def next_batch(iterator: Iterator[Item]) -> Item | None:
    """Return the next batch, None at the end.

    Raises:
        DataError: what a worker raised, without its traceback in the text; or a worker died.
    """
    try:
        return next(iterator, None)
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].partition("DataError: ")[2] or str(error)) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a data worker died ({error}); give more shared memory (docker run --shm-size=8g), fewer workers "
            f"(--set workers=1), or none (--set workers=0)"
        ) from error


def end_workers(iterator: object) -> None:
    """End a loader's workers: they ignore signals, so nothing else would before the interpreter waits for them."""
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()


def prepare_worker(worker: int) -> None:
    """Let Ctrl-C and SIGTERM reach the loop alone: it finishes the update in hand with batches that must still come."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
