"""What lifts student tokens to a teacher's width while training: D-PaDe of DPAL, or a static map. Never exported.

Source: DPAL (arXiv 2508.07144), official code; docs/method.md 4. Three patterns are aligned: global (expert 0), local
(1) and relation (2).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpal_edge.models.vit import Attention, mix_values

PATTERNS = ("global", "local", "relation")
EXPERTS = len(PATTERNS)
GLOBAL, LOCAL, RELATION = range(EXPERTS)
PENALTY = 0.05 / 2  # factor of the squared Frobenius norm of the mixed expert
MIX_DIVISOR = 256  # constant of the published code; the output norm removes most of its effect
_EPS = 1e-6  # of every norm; 1e-5 already moves the output by 3 %

Router = Literal["soft", "oracle"]
QueryInit = Literal["normal", "zeros"]


@dataclass(frozen=True)
class Decoded:
    """What a decoder makes of one set of tokens."""

    tokens: Tensor  # (B, N, out_width)
    terms: dict[str, Tensor] = field(default_factory=dict)  # scalars >= 0 to be added to the loss
    usage: Tensor | None = None  # (3,): mean router probability of each expert, detached; None without a router


class DynamicPatternDecoder(nn.Module):
    """D-PaDe: generate three expert matrices from the tokens, mix them by a router, apply the mixture to the tokens.

    Memory: for its backward pass a call keeps 10 matrices of D * O values per image, D channels in and O out: the three
    experts before and after GELU and after the norm, and their mixture; with the oracle 3, one expert before and after
    GELU, and the mixture. For D = 192, O = 768 in float32 that is 5.9 MB per image, 1.5 GB for a batch of 256. With
    ``chunk`` they are generated anew in the backward pass, and only those of ``chunk`` images exist at once; each chunk
    adds to the gradient of the same D * D * O weights, so small ones are slow.

    Args:
        width: channels of the student's tokens.
        out_width: channels of the teacher's tokens.
        inner_width: narrow the tokens to this many channels first, for wide students; None leaves them.
        heads: of the self- and cross-attentions; the router has 12.
        router: ``soft`` mixes by the router's softmax (published); ``oracle`` takes the wanted expert alone, without a
            router loss, and generates one matrix in place of three.
        mix_divisor: of the mixed matrix; 0 is the number of images in the batch, as in DPAL's earlier code.
        chunk: images whose matrices exist at a time; None is all. Results agree up to rounding.
    """

    def __init__(
        self,
        width: int,
        out_width: int,
        *,
        inner_width: int | None = None,
        heads: int = 16,
        router: Router = "soft",
        mix_divisor: int = MIX_DIVISOR,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        inner = inner_width or width
        self.out_width = out_width
        self.mix_divisor, self.chunk = mix_divisor, chunk
        self.narrow = nn.Linear(width, inner) if inner_width else None
        self.narrow_norm = nn.LayerNorm(inner, eps=_EPS) if inner_width else None
        self.attn = Attention(inner, heads)
        self.attn_norm = nn.LayerNorm(inner, eps=_EPS)
        self.router = _Router(inner) if router == "soft" else None
        self.queries = nn.Parameter(torch.zeros(1, EXPERTS, inner))
        self.query_attn = Attention(inner, heads)
        self.cross_norm = nn.LayerNorm(inner, eps=_EPS)
        self.cross_attn = CrossAttention(inner, heads)
        self.expert_in_norm = nn.LayerNorm(inner, eps=_EPS)
        self.expert = nn.Linear(inner, inner * out_width)
        self.expert_norm = nn.LayerNorm(inner * out_width, eps=_EPS)
        self.out_norm = nn.LayerNorm(out_width, eps=_EPS)

    def forward(self, tokens: Tensor, expert: int, views: int = 1) -> Decoded:
        """Decode tokens (B, N, width), wanted from ``expert``: GLOBAL, LOCAL or RELATION.

        Args:
            tokens: of B = ``views`` * images; every one has its own matrices.
            expert: what the router should choose.
            views: of each image; what depends on the batch counts images.

        Returns:
            The decoded tokens, the term ``penalty`` (size of the mixed matrices), and unless there is an oracle the
            term ``router`` (its cross-entropy) and the usage.
        """
        x = tokens
        if self.narrow is not None and self.narrow_norm is not None:
            x = self.narrow_norm(F.gelu(self.narrow(x)))
        attended = self.attn_norm(x + self.attn(x))
        queries = self._queries(x)
        terms, usage = {}, None
        if self.router is None:
            queries, scores = queries[:, expert : expert + 1], queries.new_ones(len(x), 1)
        else:
            logits = self.router(attended).float()
            scores = logits.softmax(dim=-1)
            terms["router"] = F.cross_entropy(logits, torch.full((len(x),), expert, device=x.device))
            usage = scores.detach().mean(0)
        divisor = self.mix_divisor or len(x) // views
        decoded, sizes = self._mix_all(attended, queries, scores / divisor)
        terms["penalty"] = PENALTY * sizes.mean()
        return Decoded(self.out_norm(decoded), terms, usage)

    def _mix_all(self, attended: Tensor, queries: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Run ``_mix`` on all images, or on ``chunk`` at a time without keeping what their backward passes need."""
        if self.chunk is None or self.chunk >= len(attended):
            return self._mix(attended, queries, scores)
        pieces = zip(*(torch.split(value, self.chunk) for value in (attended, queries, scores)), strict=True)
        mixed = [checkpoint(self._mix, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        decoded, sizes = zip(*mixed, strict=True)
        return torch.cat(decoded), torch.cat(sizes)

    def _mix(self, attended: Tensor, queries: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the experts of ``queries`` (B, K, D), mixed by ``scores`` (B, K), to ``attended`` (B, N, D).

        Returns:
            (B, N, O) before the output norm, and the squared Frobenius norms (B,) of the mixed matrices.
        """
        experts = self._generate(queries)  # (B, K, D, O)
        mixed = torch.einsum("bk,bkdo->bdo", scores.to(experts.dtype), experts)
        return F.gelu(attended @ mixed), mixed.float().square().sum(dim=(1, 2))

    def _queries(self, x: Tensor) -> Tensor:
        """Condition the three expert queries on the tokens (before attention, as published): (B, 3, D)."""
        queries = self.queries.expand(len(x), -1, -1)
        queries = queries + self.query_attn(queries)
        conditioned: Tensor = queries + self.cross_attn(self.cross_norm(queries), x)
        return conditioned

    def _generate(self, queries: Tensor) -> Tensor:
        """Turn queries (B, K, D) into expert matrices (B, K, D, O); one norm spans all D * O entries."""
        flat: Tensor = self.expert_norm(F.gelu(self.expert(self.expert_in_norm(queries))))
        return flat.view(*queries.shape, self.out_width)


class StaticDecoder(nn.Module):
    """The decoder's baseline: one fixed map for each pattern, the same for all images and tokens.

    Each map is LayerNorm, Linear (D to O), GELU, LayerNorm: 0.15 M parameters for D = 192, O = 768. ``shared`` has one
    map for all patterns. There is no router and nothing to penalise.

    Args:
        width: channels of the student's tokens.
        out_width: channels of the teacher's tokens.
        patterns: those that will be asked for, GLOBAL, LOCAL or RELATION; others get no map.
        shared: let all patterns use one map.
    """

    def __init__(
        self, width: int, out_width: int, patterns: Iterable[int] = range(EXPERTS), *, shared: bool = False
    ) -> None:
        super().__init__()
        self.shared = shared
        names = ["shared"] if shared else [PATTERNS[pattern] for pattern in patterns]
        self.maps = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(width, eps=_EPS),
                    nn.Linear(width, out_width),
                    nn.GELU(),
                    nn.LayerNorm(out_width, eps=_EPS),
                )
                for name in names
            }
        )

    def forward(self, tokens: Tensor, pattern: int, views: int = 1) -> Decoded:
        """Decode tokens (B, N, width) with the map of ``pattern``; of how many ``views`` they are changes nothing."""
        return Decoded(self.maps["shared" if self.shared else PATTERNS[pattern]](tokens))


Decoder = DynamicPatternDecoder | StaticDecoder


class CrossAttention(nn.Module):
    """Multi-head attention of some tokens over others, with the parameters of ``nn.MultiheadAttention``.

    That one is not used because it always takes torch's fused kernel, which ``mix_values`` avoids where it is slow.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Let queries (B, M, width) read the context (B, N, width): (B, M, width)."""
        width = queries.shape[-1]
        q = F.linear(queries, self.in_proj_weight[:width], self.in_proj_bias[:width])
        k, v = F.linear(context, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        q, k, v = (x.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for x in (q, k, v))
        mixed: Tensor = self.out_proj(mix_values(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class _Router(nn.Module):
    """One learned token that reads all tokens and scores the three experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.attn = CrossAttention(width, 12)
        self.weight = nn.Parameter(torch.zeros(EXPERTS, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, 3) for tokens (B, N, width)."""
        token = self.norm(self.token.expand(len(tokens), -1, -1))
        read = self.attn(token, tokens)
        return F.linear(read[:, 0], self.weight)


def init_decoder(decoder: Decoder, generator: torch.Generator, query_init: QueryInit = "normal") -> None:
    """Initialise as DPAL does (docs/method.md 4), but for the queries.

    ``zeros`` is published; the three experts are then identical until the router tells them apart. ``normal`` (std
    0.02) breaks the symmetry from the start.
    """
    for module in decoder.modules():
        if isinstance(module, CrossAttention):
            nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    if isinstance(decoder, StaticDecoder):
        return
    if decoder.router is not None:
        nn.init.normal_(decoder.router.token, generator=generator)
        nn.init.kaiming_uniform_(decoder.router.weight, a=math.sqrt(5), generator=generator)
    if query_init == "normal":
        nn.init.normal_(decoder.queries, std=0.02, generator=generator)
