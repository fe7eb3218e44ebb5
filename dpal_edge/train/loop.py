"""The training loop: what an update is, and nothing about files."""

import copy
import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.models.teacher import Teacher
from dpal_edge.models.vit import VisionTransformer, normalize
from dpal_edge.runtime.device import cpu_features
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.data import Batch, PersonBatches
from dpal_edge.train.dpal import Dpal, Images

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class State:
    """All that an update changes: saved whole, restored whole."""

    method: Dpal
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: VisionTransformer  # running mean of the backbone
    device: torch.device
    precision: str  # float32, bf16 or fp16
    step: int = 0  # updates done


class TimedLoader:
    """Iterate batches once and add up the seconds that the loop waited for them; closing it ends its workers."""

    def __init__(self, batches: PersonBatches, steps: range, *, workers: int, device: torch.device) -> None:
        self.waited_s = 0.0
        self._loader: DataLoader[Batch] = DataLoader(
            batches,
            sampler=steps,
            batch_size=None,  # an item is a whole batch
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_signals,
        )

        self._iterator: Iterator[Batch] | None = None

    def __enter__(self) -> "TimedLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = iter(self._loader)
        try:
            while True:
                start = time.perf_counter()
                batch = _next(self._iterator)
                self.waited_s += time.perf_counter() - start
                if batch is None:
                    return
                yield batch
        finally:
            self.close()

    def close(self) -> None:
        """End the workers: they ignore signals, so nothing else would before the interpreter waits for them."""
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            self._iterator._shutdown_workers()


def choose_device(config: TrainConfig, *, earlier: str | None = None) -> tuple[torch.device, str]:
    """Resolve ``auto``: CUDA if there is one; bf16 where the device multiplies it faster than float32.

    A run that goes on keeps its ``earlier`` precision, so that it does not change half-way on another machine.

    Raises:
        ConfigError: a device that torch does not see, or fp16 without CUDA.
    """
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try --set device=cpu"
        ) from error
    precision: str = earlier if earlier and config.precision == "auto" else config.precision
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_features().fast_bf16
        precision = "bf16" if fast else "float32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs a CUDA device; on a CPU take --set precision=bf16 or float32")
    return device, precision


def build_state(config: TrainConfig, teacher: Teacher, device: torch.device, precision: str) -> State:
    """Build method, optimizer and running mean at update 0."""
    method = Dpal.build(config, teacher).to(device)
    groups = _parameter_groups(method, config)
    optimizer = AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ema = copy.deepcopy(method.backbone).requires_grad_(False)
    return State(method, optimizer, scaler, ema, device, precision)


def train(state: State, loader: TimedLoader, config: TrainConfig) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Update once per batch; yield the batch and detached values still on the device, so that no sync happens here."""
    state.method.train()
    for batch in loader:
        images = to_images(batch, state.device)
        rate = learning_rate(state.step, config)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        try:
            values = train_step(state, images, progress=state.step / config.steps, max_norm=config.clip)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{state.device} has too little memory for batch={config.batch}; "
                f"start a new run with --set batch={max(config.batch // 2, 1)}"
            ) from error
        state.step += 1
        update_ema(state.ema, state.method.backbone, ema_decay(state.step, config))
        yield batch, values


def train_step(state: State, images: Images, *, progress: float, max_norm: float) -> dict[str, Tensor]:
    """Update the student once and return loss terms and gradient norm, detached, on the device."""
    with autocast(state.device, state.precision):
        losses = state.method(images, progress)
    state.scaler.scale(losses["loss"]).backward()
    state.scaler.unscale_(state.optimizer)
    trainable = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trainable, max_norm or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return {**{name: value.detach() for name, value in losses.items()}, "grad_norm": norm}


@torch.no_grad()
def validate(state: State, batches: PersonBatches, count: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return the mean loss of ``backbone`` and ``ema`` over the first ``count`` batches, and what could not be read."""
    method, trained = state.method.eval(), state.method.backbone
    totals = {name: torch.zeros((), device=state.device) for name in ("backbone", "ema")}
    skipped: dict[str, str] = {}
    for i in range(count):
        batch = batches[i]
        skipped.update(batch.skipped)
        images = to_images(batch, state.device)
        for name, backbone in (("backbone", trained), ("ema", state.ema)):
            method.backbone = backbone
            with autocast(state.device, state.precision):
                totals[name] += method(images, 1.0)["loss"].float()
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


def ema_decay(step: int, config: TrainConfig) -> float:
    """Grow towards ``config.ema_decay``, so that the mean forgets its random start within a short run."""
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, source: nn.Module, decay: float) -> None:
    """Move ``ema`` towards ``source`` by 1 - ``decay``."""
    torch._foreach_lerp_(list(ema.parameters()), list(source.parameters()), 1 - decay)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute in ``precision``; float32 turns autocast off."""
    return torch.autocast(device.type, _AUTOCAST.get(precision, torch.bfloat16), enabled=precision in _AUTOCAST)


def to_images(batch: Batch, device: torch.device) -> Images:
    """Move a batch to ``device`` and normalise it there with the ImageNet mean and std."""
    views = (batch.base, batch.local, batch.crowd)
    base, local, crowd = (normalize(view.to(device, non_blocking=True)) for view in views)
    return Images(base, local, crowd)


def _parameter_groups(method: Dpal, config: TrainConfig) -> list[dict[str, object]]:
    """Split what trains into decayed and not decayed parameters."""
    spared = method.spared_from_decay() if config.no_decay == "embeddings" else set()
    groups: dict[float, list[Tensor]] = {config.weight_decay: [], 0.0: []}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            groups[0.0 if parameter.ndim == 1 or name in spared else config.weight_decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def _next(iterator: Iterator[Batch]) -> Batch | None:
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


def _ignore_signals(worker: int) -> None:
    """Let Ctrl-C and SIGTERM reach the loop alone: it finishes the update in hand with batches that must still come."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
