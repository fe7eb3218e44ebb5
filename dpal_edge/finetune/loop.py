"""The update of fine-tuning: one pass of the backbone for all tasks, and nothing about files."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpal_edge.errors import ConfigError
from dpal_edge.finetune.config import FinetuneConfig
from dpal_edge.finetune.data import Batch, TaskBatch
from dpal_edge.finetune.objective import Objective, Values
from dpal_edge.models.human import HumanModel
from dpal_edge.models.vit import normalize
from dpal_edge.train.loop import DTYPES, autocast, ema_decay, is_out_of_memory
from dpal_edge.train.optimizer import build_optimizer

_UNDECAYED = ("pos_embed", "cls_token", "queries", "table")  # beside tensors of one axis


@dataclass
class State:
    """All that an update changes: saved whole, restored whole."""

    model: HumanModel
    objectives: nn.ModuleDict  # with weights that only training needs, such as identity classifiers
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: HumanModel  # running mean of the model
    device: torch.device
    precision: str  # float32, bf16 or fp16
    mean: tuple[float, ...]  # of the images, RGB in 0..1
    std: tuple[float, ...]
    step: int = 0  # updates done


def build_state(
    model: HumanModel,
    objectives: Mapping[str, Objective],
    config: FinetuneConfig,
    device: torch.device,
    precision: str,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> State:
    """Build optimizer and running mean at update 0."""
    model = model.to(device)
    modules = nn.ModuleDict(
        {task: objective for task, objective in objectives.items() if isinstance(objective, nn.Module)}
    )
    modules = modules.to(device)
    optimizer = build_optimizer(config.optimizer, parameter_groups(model, modules, config), model, (0.9, 0.999))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ema = copy.deepcopy(model).requires_grad_(False)
    return State(model, modules, optimizer, scaler, ema, device, precision, mean, std)


def parameter_groups(model: HumanModel, objectives: nn.Module, config: FinetuneConfig) -> list[dict[str, object]]:
    """Group what trains by learning-rate factor and weight decay.

    The factor is 1 for heads and ``layer_decay`` to the power of the blocks above for the backbone, the embedding
    counting as one more block; what merges the patches of a stage of a Swin counts to its last block. Tensors of one
    axis, tokens and positions are not decayed.

    Source: BEiT (Bao et al., 2022).
    """
    depth = model.backbone.config.depth
    blocks = [name for name, module in model.backbone.named_modules() if name.rpartition(".")[0].endswith("blocks")]
    last = {block.rpartition(".blocks.")[0]: i for i, block in enumerate(blocks)}  # of each stage
    groups: dict[tuple[float, float], list[Tensor]] = {}
    named = [*model.named_parameters(), *objectives.named_parameters()]
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        above = 0
        if name.startswith("backbone."):
            inside = name.removeprefix("backbone.")
            place = next((i for i, block in enumerate(blocks) if inside.startswith(f"{block}.")), None)
            place = last.get(inside.partition(".downsample.")[0]) if place is None else place
            above = 0 if inside.startswith("norm.") else depth - (-1 if place is None else place)
        spared = parameter.ndim == 1 or name.rpartition(".")[2] in _UNDECAYED
        key = (config.layer_decay**above, 0.0 if spared else config.weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (factor, decay), parameters in groups.items()
    ]


def train(state: State, batches: Iterable[Batch], config: FinetuneConfig) -> Iterator[tuple[Batch, Values]]:
    """Update once per batch; yield it with detached values, still on the device, so that no sync happens here.

    Raises:
        ConfigError: the device's memory is too small.
    """
    state.model.train()
    if config.freeze_backbone:
        state.model.backbone.eval()
    for batch in batches:
        torch.manual_seed(hash((config.seed, state.step)))  # stochastic depth, the same in a resumed run
        rate = learning_rate(state.step, config)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        try:
            values = train_step(state, batch, config)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"{state.device} has too little memory for {config.batch} images at a time; go on with --resume "
                f"--set batch={max(config.batch // 2, 1)}"
            ) from error
        state.step += 1
        update_ema(state.ema, state.model, ema_decay(state.step, config.ema_decay))
        yield batch, values


def train_step(state: State, batch: Batch, config: FinetuneConfig) -> Values:
    """Update once; return the loss, its terms by task, and the gradient's norm before clipping."""
    values = losses(state, state.model, batch.tasks, config)
    torch.autograd.backward(state.scaler.scale(values["loss"]))
    state.scaler.unscale_(state.optimizer)
    trainable = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trainable, config.clip or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return {**{name: value.detach() for name, value in values.items()}, "grad_norm": norm}


def losses(state: State, model: HumanModel, tasks: Mapping[str, TaskBatch], config: FinetuneConfig) -> Values:
    """Run the backbone once on the images of all tasks; return "loss", the weighted sum, and each task's by name."""
    moved = {task: {name: value.to(state.device, non_blocking=True) for name, value in batch.items()}
             for task, batch in tasks.items()}  # fmt: skip
    pixels = torch.cat([batch["image"] for batch in moved.values()]).permute(0, 3, 1, 2)
    values: Values = {}
    with autocast(state.device, state.precision):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not config.freeze_backbone):
            # Heads enlarge their maps outside of what autocast knows, and half the bytes are half the time.
            tokens = model.backbone(normalize(pixels, state.mean, state.std)).to(DTYPES[state.precision])
        parts = tokens.split([len(batch["image"]) for batch in moved.values()])
        for (task, batch), own in zip(moved.items(), parts, strict=True):
            found = state.objectives[task](model.heads[task], own, batch)
            values[task] = found["loss"]
            values |= {f"{task}/{name}": value for name, value in found.items() if name != "loss"}
    values["loss"] = torch.stack([config.loss_weight(task) * values[task] for task in moved]).sum()
    return values


@torch.no_grad()
def validate(state: State, tasks: list[Mapping[str, TaskBatch]], config: FinetuneConfig) -> dict[str, float]:
    """Return the mean weighted loss of ``backbone`` (the weights as they are) and ``ema`` over held-out batches."""
    found = {}
    for name, model in (("backbone", state.model), ("ema", state.ema)):
        model.eval()
        total = torch.stack([losses(state, model, batch, config)["loss"] for batch in tasks]).mean()
        found[name] = float(total)
    state.model.train()
    if config.freeze_backbone:
        state.model.backbone.eval()
    return found


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """Rise linearly over the warm-up, then fall along a half cosine to 0."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.lr * (step + 1) / (math.ceil(warmup) + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(config.steps - warmup, 1)))


@torch.no_grad()
def update_ema(ema: nn.Module, source: nn.Module, decay: float) -> None:
    """Move ``ema`` towards ``source`` by 1 - ``decay``; statistics of batch norms are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(source.parameters()), 1 - decay)
    for kept, current in zip(ema.buffers(), source.buffers(), strict=True):
        kept.copy_(current)
