import math

import pytest
import torch
import torch.nn.functional as F

from dpal_edge.models.decoder import EXPERTS, GLOBAL, LOCAL, RELATION, DynamicPatternDecoder, init_decoder

WIDTH, OUT = 48, 20


def build(*, query_init="normal", **options):
    decoder = DynamicPatternDecoder(WIDTH, OUT, **options)
    init_decoder(decoder, torch.Generator().manual_seed(0), query_init)
    return decoder


@torch.no_grad()
def experts_of(decoder, tokens):
    return decoder._generate(decoder._queries(tokens))


@torch.no_grad()
@pytest.mark.parametrize("router", ["soft", "oracle"])
@pytest.mark.parametrize(("tokens", "expert"), [(1, GLOBAL), (8, LOCAL), (25, RELATION)])
def test_calls(router, tokens, expert):
    decoded = build(router=router)(torch.randn(2, tokens, WIDTH), expert)
    assert decoded.tokens.shape == (2, tokens, OUT)
    assert decoded.router_loss.shape == decoded.penalty.shape == ()
    assert decoded.penalty > 0
    assert decoded.usage.shape == (EXPERTS,)
    assert decoded.usage.sum().item() == pytest.approx(1)
    assert decoded.tokens.mean(-1).abs().max() < 1e-5  # the output norm comes last


@torch.no_grad()
def test_experts_are_identical_with_zero_queries_and_differ_with_normal_ones():
    tokens = torch.randn(2, 5, WIDTH)
    same = experts_of(build(query_init="zeros"), tokens)
    assert same.shape == (2, EXPERTS, WIDTH, OUT)
    for k in (1, 2):
        torch.testing.assert_close(same[:, k], same[:, 0], rtol=0, atol=1e-6)
    different = experts_of(build(query_init="normal"), tokens)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (different[:, a] - different[:, b]).abs().mean() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("expert", [GLOBAL, LOCAL, RELATION])
def test_oracle_equals_soft_router_with_one_hot_scores(expert):
    soft, oracle = build(), build(router="oracle")
    oracle.load_state_dict(soft.state_dict(), strict=False)

    class Certain(torch.nn.Module):
        def forward(self, tokens):
            return 1e4 * F.one_hot(torch.tensor(expert), EXPERTS).float().expand(len(tokens), -1)

    soft.router = Certain()
    tokens = torch.randn(2, 5, WIDTH)
    expected, found = soft(tokens, expert), oracle(tokens, expert)
    torch.testing.assert_close(found.tokens, expected.tokens)
    torch.testing.assert_close(found.penalty, expected.penalty)
    assert found.usage.tolist() == expected.usage.tolist() == [float(k == expert) for k in range(EXPERTS)]
    assert found.router_loss == 0
    assert expected.router_loss == 0


@torch.no_grad()
def test_penalty_and_router_loss_by_hand():
    decoder, tokens = build(), torch.randn(2, 5, WIDTH)
    scores = decoder.router(decoder.attn_norm(tokens + decoder.attn(tokens))).softmax(-1)
    experts = experts_of(decoder, tokens)
    mixed = sum(scores[:, k, None, None] * experts[:, k] for k in range(EXPERTS)) / 256
    decoded = decoder(tokens, LOCAL)
    norms = [(image**2).sum().item() for image in mixed]
    assert decoded.penalty.item() == pytest.approx(0.05 / 2 * sum(norms) / 2, rel=1e-4)
    assert decoded.router_loss.item() == pytest.approx(-scores[:, LOCAL].log().mean().item(), rel=1e-5)
    torch.testing.assert_close(decoded.usage, scores.mean(0))


@torch.no_grad()
def test_images_of_a_batch_do_not_mix():
    decoder, tokens = build(), torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(
        decoder(tokens, LOCAL).tokens[1:2], decoder(tokens[1:2], LOCAL).tokens, rtol=1e-4, atol=1e-5
    )


def test_inner_width_narrows_first():
    decoder = build(inner_width=96)
    decoded = decoder(torch.randn(2, 5, WIDTH), RELATION)
    assert decoded.tokens.shape == (2, 5, OUT)
    assert decoder.expert.weight.shape == (96 * OUT, 96)
    decoded.tokens.square().sum().backward()
    assert decoder.narrow.weight.grad.abs().sum() > 0


def test_parameters_are_those_of_the_paper():
    with torch.device("meta"):
        decoder = DynamicPatternDecoder(192, 768)
    assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(29.35, abs=0.01)


@pytest.mark.parametrize("router", ["soft", "oracle"])
def test_gradient_reaches_every_parameter(router):
    decoder = build(router=router)
    decoded = decoder(torch.randn(2, 5, WIDTH), GLOBAL)
    (decoded.tokens.pow(3).sum() + decoded.router_loss + decoded.penalty).backward()
    assert not [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]


def test_router_token_and_weight_at_init():
    router = DynamicPatternDecoder(192, 4).router
    decoder = DynamicPatternDecoder(192, 4)
    init_decoder(decoder, torch.Generator().manual_seed(0))
    assert not router.token.any()  # nothing random without a generator
    assert decoder.router.token.std().item() == pytest.approx(1, abs=0.15)
    assert decoder.router.weight.abs().max().item() <= 1 / math.sqrt(192)
    assert decoder.queries.std().item() == pytest.approx(0.02, rel=0.1)
