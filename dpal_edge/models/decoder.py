"""D-PaDe, the dynamic pattern decoder of DPAL: a train-only mixture of three experts generated from the tokens.

Source: DPAL (arXiv 2508.07144), official code; docs/method.md 4. It lifts student tokens to the teacher's width so that
three patterns can be aligned: global (expert 0), local (1) and relation (2). Nothing of it is ever exported.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.models.vit import Attention

EXPERTS = 3
GLOBAL, LOCAL, RELATION = range(EXPERTS)
PENALTY = 0.05 / 2  # factor of the squared Frobenius norm of the mixed expert
_MIX_DIVISOR = 256  # constant of the published code; the output norm removes most of its effect
_EPS = 1e-6  # of every norm; 1e-5 already moves the output by 3 %

Router = Literal["soft", "oracle"]
QueryInit = Literal["normal", "zeros"]


@dataclass(frozen=True)
class Decoded:
    """What the decoder makes of one set of tokens."""

    tokens: Tensor  # (B, N, out_width)
    router_loss: Tensor  # scalar: cross-entropy of the router against the wanted expert; 0 with the oracle
    penalty: Tensor  # scalar >= 0: size of the mixed expert matrices
    usage: Tensor  # (3,): mean router probability of each expert, detached


class DynamicPatternDecoder(nn.Module):
    """Generate three expert matrices from the tokens, mix them by a router, and apply the mixture to the tokens.

    Args:
        width: channels of the student's tokens.
        out_width: channels of the teacher's tokens.
        inner_width: narrow the tokens to this many channels first, for wide students; None leaves them.
        heads: of the self- and cross-attentions; the router has 12.
        router: ``soft`` mixes by the router's softmax (published); ``oracle`` takes the wanted expert alone, without a
            router loss, and generates one matrix in place of three.
    """

    def __init__(
        self, width: int, out_width: int, *, inner_width: int | None = None, heads: int = 16, router: Router = "soft"
    ) -> None:
        super().__init__()
        inner = inner_width or width
        self.out_width = out_width
        self.narrow = nn.Linear(width, inner) if inner_width else None
        self.narrow_norm = nn.LayerNorm(inner, eps=_EPS) if inner_width else None
        self.attn = Attention(inner, heads)
        self.attn_norm = nn.LayerNorm(inner, eps=_EPS)
        self.router = _Router(inner) if router == "soft" else None
        self.queries = nn.Parameter(torch.zeros(1, EXPERTS, inner))
        self.query_attn = Attention(inner, heads)
        self.cross_norm = nn.LayerNorm(inner, eps=_EPS)
        self.cross_attn = nn.MultiheadAttention(inner, heads, batch_first=True)
        self.expert_in_norm = nn.LayerNorm(inner, eps=_EPS)
        self.expert = nn.Linear(inner, inner * out_width)
        self.expert_norm = nn.LayerNorm(inner * out_width, eps=_EPS)
        self.out_norm = nn.LayerNorm(out_width, eps=_EPS)

    def forward(self, tokens: Tensor, expert: int) -> Decoded:
        """Decode tokens (B, N, width), wanted from ``expert`` (GLOBAL, LOCAL or RELATION)."""
        x = tokens
        if self.narrow is not None and self.narrow_norm is not None:
            x = self.narrow_norm(F.gelu(self.narrow(x)))
        attended = self.attn_norm(x + self.attn(x))
        queries = self._queries(x)
        if self.router is None:
            mixed = self._generate(queries[:, expert : expert + 1])[:, 0] / _MIX_DIVISOR
            router_loss = mixed.new_zeros(())
            usage = F.one_hot(torch.tensor(expert, device=x.device), EXPERTS).float()
        else:
            logits = self.router(attended).float()
            scores = logits.softmax(dim=-1)
            router_loss = F.cross_entropy(logits, torch.full((len(x),), expert, device=x.device))
            experts = self._generate(queries)  # (B, 3, D, O)
            mixed = torch.einsum("bk,bkdo->bdo", scores.to(experts.dtype), experts) / _MIX_DIVISOR
            usage = scores.detach().mean(0)
        penalty = PENALTY * mixed.float().square().sum(dim=(1, 2)).mean()
        return Decoded(self.out_norm(F.gelu(attended @ mixed)), router_loss, penalty, usage)

    def _queries(self, x: Tensor) -> Tensor:
        """Condition the three expert queries on the tokens (before attention, as published): (B, 3, D)."""
        queries = self.queries.expand(len(x), -1, -1)
        queries = queries + self.query_attn(queries)
        conditioned: Tensor = queries + self.cross_attn(self.cross_norm(queries), x, x, need_weights=False)[0]
        return conditioned

    def _generate(self, queries: Tensor) -> Tensor:
        """Turn queries (B, K, D) into expert matrices (B, K, D, O); one norm spans all D * O entries."""
        flat: Tensor = self.expert_norm(F.gelu(self.expert(self.expert_in_norm(queries))))
        return flat.view(*queries.shape, self.out_width)


class _Router(nn.Module):
    """One learned token that reads all tokens and scores the three experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.attn = nn.MultiheadAttention(width, 12, batch_first=True)
        self.weight = nn.Parameter(torch.zeros(EXPERTS, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, 3) for tokens (B, N, width)."""
        token = self.norm(self.token.expand(len(tokens), -1, -1))
        read = self.attn(token, tokens, tokens, need_weights=False)[0]
        return F.linear(read[:, 0], self.weight)


def init_decoder(decoder: DynamicPatternDecoder, generator: torch.Generator, query_init: QueryInit = "normal") -> None:
    """Initialise as DPAL does (docs/method.md 4), but for the queries.

    ``zeros`` is published; the three experts are then identical until the router tells them apart. ``normal`` (std
    0.02) breaks the symmetry from the start.
    """
    for module in decoder.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    if decoder.router is not None:
        nn.init.normal_(decoder.router.token, generator=generator)
        nn.init.kaiming_uniform_(decoder.router.weight, a=math.sqrt(5), generator=generator)
    if query_init == "normal":
        nn.init.normal_(decoder.queries, std=0.02, generator=generator)
