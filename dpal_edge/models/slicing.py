"""A small ViT cut out of a large one: what a student can begin with instead of noise.

The tokens of a large ViT vary mostly in a part of their channels. The student gets that part as its own tokens; its
matrices are then fitted, one after the other from the first to the last, by least squares on real images, so that each
makes good what those before it lost. No gradient is needed.

Source: SliceGPT (Ashkboos et al., 2024) for the principal part of the residual stream; the weights of a larger model as
a start are the idea of weight selection (Xu et al., 2024). Differs: one basis for all blocks, which a LayerNorm can
keep; heads become narrower by low rank rather than fewer; each matrix is fitted to the student's own inputs.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.errors import ConfigError
from dpal_edge.models.vit import Attention, Block, VisionTransformer, mix_values, resize_positions

_RIDGE = 1e-3  # of the inputs' mean square: what a fit gives up for small weights
_LEAST = 1e-9  # of the largest eigenvalue: below it a direction holds nothing


@torch.no_grad()
def slice_vit(
    student: VisionTransformer, large: VisionTransformer, images: Tensor, seen: Tensor, *, layer: int | None = None
) -> Tensor:
    """Replace the weights of ``student`` by those that bring its tokens closest to the ones of ``large``.

    Where ``large`` is deeper, each block of the student stands for a group of its blocks.

    Args:
        student: a ViT with a class token and without layer scale, no wider and no deeper than ``large``.
        large: a ViT with a class token, on the same grid of patches.
        images: (B, 3, H, W), normalised, of the student's size; 500 people at 256x128, more if they are smaller.
        seen: (B, 3, H', W'), the same images as ``large`` takes them.
        layer: block of ``large``, 1 to its depth, that the student's last one is to be; None is the last.

    Returns:
        The basis (D, d): tokens of ``large`` times it are what the student's tokens are to be, before the final norm.

    Raises:
        ConfigError: the two do not fit each other as said.
    """
    taught = large.blocks[:layer]
    _check(student, large, len(taught))
    _check_grids(student, large, images, seen)
    basis = principal_basis(large, seen, student.config.width, len(taught))
    _fit_embedding(student, large, images, seen, basis)
    tokens, truth, count = student.embed(images), large.embed(seen), len(student.blocks)
    for i, block in enumerate(student.blocks):
        first, last = i * len(taught) // count, (i + 1) * len(taught) // count - 1
        for passed in taught[first:last]:
            truth = passed(truth)
        tokens, truth = _fit_block(cast(Block, block), cast(Block, taught[last]), tokens, truth, basis)
    _reset_norm(student.norm)
    return basis


@torch.no_grad()
def explained(
    student: VisionTransformer,
    large: VisionTransformer,
    images: Tensor,
    seen: Tensor,
    basis: Tensor,
    *,
    layer: int | None = None,
) -> float:
    """Return the share, 1 at most, of the variance of the large model's tokens that the student's tokens explain.

    Args:
        student: as ``slice_vit`` left it.
        large: what it was sliced from.
        images: others than it was fitted to.
        seen: the same images as ``large`` takes them.
        basis: what ``slice_vit`` gave; the channels that it does not keep do not count.
        layer: as for ``slice_vit``.
    """
    found = student.run_blocks(student.embed(images))
    wanted = large.run_blocks(large.embed(seen), layer) @ basis
    return float(1 - (found - wanted).square().sum() / (wanted - wanted.mean((0, 1))).square().sum())


@torch.no_grad()
def principal_basis(large: VisionTransformer, seen: Tensor, width: int, layer: int | None = None) -> Tensor:
    """Return the matrix (D, width) that takes tokens of ``large`` to their principal part.

    It looks at the tokens as the norms leave them, those of all blocks up to ``layer`` alike. Each of its rows adds
    up to nothing, so the part that it keeps has zero mean, and a LayerNorm of ``width`` scales it as one of D would,
    but for what was lost.

    Args:
        large: a ViT of D channels.
        seen: (B, 3, H, W), normalised as it wants them.
        width: channels to keep, the mean's among them.
        layer: its last block that counts, from 1; None is the last there is.
    """
    moment = torch.zeros(large.config.width, large.config.width, dtype=torch.float64, device=seen.device)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = F.layer_norm(inputs[0], inputs[0].shape[-1:]).flatten(0, -2)
        moment.add_((flat.mT @ flat).double() / len(flat))

    blocks = cast(list[Block], list(large.blocks[:layer]))
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)] + [large.norm]
    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        large(seen, layer)
    finally:
        for handle in handles:
            handle.remove()
    principal = torch.linalg.eigh(moment).eigenvectors[:, -(width - 1) :]
    centred = torch.linalg.qr(
        torch.cat([torch.ones(width, 1), torch.eye(width, width - 1)], dim=1).double().to(seen.device)
    ).Q[:, 1:]
    basis: Tensor = (principal @ centred.mT).to(seen.dtype)
    return basis


def _fit_embedding(
    student: VisionTransformer, large: VisionTransformer, images: Tensor, seen: Tensor, basis: Tensor
) -> None:
    """Fit the patch kernel; take over the class token and the positions."""
    kernel, patch = cast(nn.Conv2d, student.patch_embed["proj"]), student.config.patch_size
    patches = F.unfold(images, patch, stride=patch).mT.flatten(0, 1)  # (B * N, 3 * patch * patch)
    wanted = large.patch_embed["proj"](seen).flatten(2).mT.flatten(0, 1) @ basis
    weight, bias = _least_squares(patches, wanted)
    kernel.weight.copy_(weight.view_as(kernel.weight))
    cast(Tensor, kernel.bias).copy_(bias)
    cast(Tensor, student.cls_token).copy_(cast(Tensor, large.cls_token) @ basis)
    config = large.config
    student.pos_embed.copy_(resize_positions(large.pos_embed, config.grid, student.config.grid, "2d") @ basis)


def _fit_block(block: Block, large: Block, tokens: Tensor, truth: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Fit one block to what ``large`` makes of ``truth`` (B, T, D); return the student's tokens and the truth after."""
    for norm in (block.norm1, block.norm2):
        _reset_norm(norm)
    inputs = block.norm1(tokens)
    _fit_attention(block.attn, large, inputs, large.attn.qkv(large.norm1(truth)), basis)
    truth = truth + large.ls1(large.attn(large.norm1(truth)))
    mixed = _mix(block.attn, inputs)
    _assign(block.attn.proj, *_least_squares(mixed, truth @ basis - tokens))
    tokens = tokens + block.attn.proj(mixed)

    inputs = block.norm2(tokens)
    small, wide = (cast(dict[str, nn.Linear], mlp) for mlp in (block.mlp, large.mlp))
    before = wide["fc1"](large.norm2(truth)).flatten(0, 1)
    hidden = F.gelu(before)
    out = large.ls2(wide["fc2"].weight.mT) @ basis  # (hidden, d): what each neuron adds to the part that is kept
    chosen = (hidden.std(0) * out.norm(dim=1)).topk(small["fc1"].out_features).indices
    truth = truth + large.ls2(wide["fc2"](hidden).view_as(truth))
    _assign(small["fc1"], *_least_squares(inputs, before[:, chosen]))
    hidden = F.gelu(small["fc1"](inputs))
    _assign(small["fc2"], *_least_squares(hidden, truth @ basis - tokens))
    return tokens + small["fc2"](hidden), truth


def _fit_attention(attention: Attention, large: Block, inputs: Tensor, qkv: Tensor, basis: Tensor) -> None:
    """Fit queries, keys and values to those of ``large``, each head by its best approximation of lower rank.

    Of queries and keys only their product counts, of values only what the projection makes of them. A head that stands
    for several of the student's gives all of them its looks, and each a part of its values.
    """
    width = inputs.shape[-1]
    count, heads = attention.heads, large.attn.heads
    side, wide = width // count, qkv.shape[-1] // 3 // heads  # channels of a head
    weight, bias = _least_squares(inputs, qkv)
    q, k, v = weight.double().view(3, heads, wide, width)
    offset = bias.double().view(3, heads, wide)[0]  # of the queries; that of keys and values changes nothing
    flat = inputs.flatten(0, 1).double()
    spread, narrow = _roots(torch.cov(flat.mT, correction=0))
    raised = torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1)
    query_spread, query_narrow = _roots(raised.mT @ raised / len(raised))
    out = (large.ls1(large.attn.proj.weight.mT) @ basis).double().view(heads, wide, width)
    effect = out.mT @ v @ spread  # (heads, d, d)
    chosen = effect.square().sum((1, 2)).topk(min(count, heads)).indices.sort().values.tolist()
    copies = count // len(chosen)
    queries, keys, values, offsets = [], [], [], []
    for head in chosen:
        looks = torch.cat([q[head], offset[head][:, None]], dim=1).mT @ k[head] * (side / wide) ** 0.5
        left, scale, right = torch.linalg.svd(query_spread @ looks @ spread)
        root = scale[:side].sqrt()
        query = (query_narrow @ left[:, :side] * root).mT  # (side, d + 1)
        queries += [query[:, :width]] * copies
        offsets += [query[:, width]] * copies
        keys += [root[:, None] * right[:side] @ narrow] * copies
        _, scale, right = torch.linalg.svd(effect[head])
        values.append(scale[: copies * side, None].sqrt() * right[: copies * side] @ narrow)
    _assign(
        attention.qkv,
        torch.cat([*queries, *keys, *values]).to(inputs.dtype),
        torch.cat([*offsets, torch.zeros(2 * width, dtype=torch.float64, device=inputs.device)]).to(inputs.dtype),
    )


def _mix(attention: Attention, inputs: Tensor) -> Tensor:
    """Return what attention gives its projection, (B, T, d)."""
    batch, tokens, width = inputs.shape
    q, k, v = attention.qkv(inputs).view(batch, tokens, 3, attention.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return mix_values(q, k, v).transpose(1, 2).reshape(batch, tokens, width)


def _least_squares(inputs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (b, a) and bias (b,) of the linear map that takes inputs (..., a) closest to wanted (..., b)."""
    x, y = inputs.flatten(0, -2), wanted.flatten(0, -2)
    middle, goal = x.mean(0), y.mean(0)
    x = x - middle
    gram = (x.mT @ x).double()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, (x.mT @ (y - goal)).double()).mT.to(x.dtype)
    return weight, goal - weight @ middle


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a symmetric positive matrix, and the pseudo-inverse of that root."""
    values, vectors = torch.linalg.eigh(moment)
    kept = values > _LEAST * values.max()
    root = values.clamp(min=0).sqrt()
    inverse = torch.where(kept, 1 / root.clamp(min=torch.finfo(root.dtype).tiny), 0)
    return vectors * root @ vectors.mT, vectors * inverse @ vectors.mT


def _assign(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def _reset_norm(norm: nn.LayerNorm) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def _check_grids(student: VisionTransformer, large: VisionTransformer, images: Tensor, seen: Tensor) -> None:
    views = ((student, images), (large, seen))
    own, its = ([side // vit.config.patch_size for side in pixels.shape[-2:]] for vit, pixels in views)
    if own != its:
        raise ConfigError(
            f"the student sees {own[0]}x{own[1]} patches, the ViT it is sliced from {its[0]}x{its[1]}; give a size "
            f"that makes them the same"
        )


def _check(student: VisionTransformer, large: VisionTransformer, depth: int) -> None:
    small, wide = student.config, large.config
    if not (small.class_token and wide.class_token) or small.layer_scale:
        raise ConfigError("a student is sliced from a ViT with a class token, and has one itself but no layer scale")
    if small.width > wide.width or small.depth > depth:
        raise ConfigError(
            f"a student of {small.depth} blocks of {small.width} channels cannot be sliced from {depth} blocks of "
            f"{wide.width}: it must not be larger"
        )
    last = wide.last_heads if depth == wide.depth else wide.heads
    for own, its in ((small.heads, wide.heads), (small.last_heads, last)):
        if own % min(own, its):
            raise ConfigError(
                f"a block of {own} heads cannot be sliced from one of {its}: it may have fewer, or a multiple; choose "
                f"others with heads"
            )
