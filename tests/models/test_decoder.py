import math

import pytest
import torch
import torch.nn.functional as F

from dpal_edge.models.decoder import (
    EXPERTS,
    GLOBAL,
    LOCAL,
    PATTERNS,
    RELATION,
    DynamicPatternDecoder,
    StaticDecoder,
    init_decoder,
)

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
    assert decoded.terms.keys() == ({"router", "penalty"} if router == "soft" else {"penalty"})
    assert all(term.shape == () and term > 0 for term in decoded.terms.values())
    if router == "soft":
        assert decoded.usage.shape == (EXPERTS,)
        assert decoded.usage.sum().item() == pytest.approx(1)
    else:
        assert decoded.usage is None
    assert decoded.tokens.mean(-1).abs().max() < 1e-5  # the output norm comes last


@torch.no_grad()
def test_experts_are_identical_with_zero_queries_and_differ_with_normal_ones():
    tokens = torch.randn(2, 5, WIDTH)
    same = experts_of(build(query_init="zeros"), tokens)
    assert same.shape == (2, EXPERTS, WIDTH, OUT)
    for k in (1, 2):
        torch.testing.assert_close(same[:, k], same[:, 0], rtol=2e-6, atol=1e-6)  # rounding
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
    torch.testing.assert_close(found.terms["penalty"], expected.terms["penalty"])
    assert expected.usage.tolist() == [float(k == expert) for k in range(EXPERTS)]
    assert expected.terms["router"] == 0


@torch.no_grad()
def test_penalty_and_router_loss_by_hand():
    decoder, tokens = build(), torch.randn(2, 5, WIDTH)
    scores = decoder.router(decoder.attn_norm(tokens + decoder.attn(tokens))).softmax(-1)
    experts = experts_of(decoder, tokens)
    mixed = sum(scores[:, k, None, None] * experts[:, k] for k in range(EXPERTS)) / 256
    decoded = decoder(tokens, LOCAL)
    norms = [(image**2).sum().item() for image in mixed]
    assert decoded.terms["penalty"].item() == pytest.approx(0.05 / 2 * sum(norms) / 2, rel=1e-4)
    assert decoded.terms["router"].item() == pytest.approx(-scores[:, LOCAL].log().mean().item(), rel=1e-5)
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
    (decoded.tokens.pow(3).sum() + sum(decoded.terms.values())).backward()
    assert not [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]


def test_router_token_and_weight_at_init():
    router = DynamicPatternDecoder(192, 4).router
    decoder = DynamicPatternDecoder(192, 4)
    init_decoder(decoder, torch.Generator().manual_seed(0))
    assert not router.token.any()  # nothing random without a generator
    assert decoder.router.token.std().item() == pytest.approx(1, abs=0.15)
    assert decoder.router.weight.abs().max().item() <= 1 / math.sqrt(192)
    assert decoder.queries.std().item() == pytest.approx(0.02, rel=0.1)


def saved_bytes(decoder, tokens):
    """Decode ``tokens``; return also the bytes that autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoded = decoder(tokens, LOCAL)
    return sum(size for address, size in storages.items() if address not in weights), decoded


def total(decoded):
    return decoded.tokens.pow(3).sum() + sum(decoded.terms.values())


@pytest.mark.parametrize("router", ["soft", "oracle"])
@pytest.mark.parametrize("mix_divisor", [256, 0])
@pytest.mark.parametrize("chunk", [1, 2, 7, 8])
def test_chunks_change_nothing(router, mix_divisor, chunk):
    tokens = torch.randn(7, 5, WIDTH)
    losses, gradients = [], []
    for size in (None, chunk):
        decoder = build(router=router, mix_divisor=mix_divisor, chunk=size)
        decoded = decoder(tokens, LOCAL)
        losses.append([decoded.tokens, *decoded.terms.values()])
        total(decoded).backward()
        gradients.append([p.grad for p in decoder.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("router", "count"), [("soft", 10), ("oracle", 3)])
def test_memory_is_that_of_the_docstring_and_falls_to_one_chunk(router, count):
    images, out = 8, 96  # wide enough for the matrices to outweigh the weights and tokens
    matrices = images * count * WIDTH * out * 4

    def build_wide(chunk):
        return DynamicPatternDecoder(WIDTH, out, router=router, chunk=chunk)

    tokens = torch.randn(images, 5, WIDTH)
    whole, chunked = build_wide(None), build_wide(2)
    seen = []
    chunked.expert.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    everything, _ = saved_bytes(whole, tokens)
    kept, decoded = saved_bytes(chunked, tokens)
    assert matrices <= everything <= 1.4 * matrices
    assert kept <= everything - matrices  # what has nothing to do with the matrices
    assert seen == [2] * 4  # images whose matrices were generated at a time
    total(decoded).backward()
    assert seen == [2] * 8  # and once more, for the backward pass


@torch.no_grad()
def test_divisor_of_the_batch_counts_images_not_views():
    decoder, tokens = build(mix_divisor=0), torch.randn(6, 1, WIDTH)
    together = decoder(tokens, GLOBAL, views=3)
    separate = [decoder(view, GLOBAL) for view in tokens.chunk(3)]
    torch.testing.assert_close(together.tokens, torch.cat([one.tokens for one in separate]))
    for name in ("router", "penalty"):
        torch.testing.assert_close(together.terms[name], sum(one.terms[name] for one in separate) / 3)
    fixed = build(mix_divisor=2)(tokens, GLOBAL)
    torch.testing.assert_close(fixed.tokens, together.tokens)
    assert build(mix_divisor=6)(tokens, GLOBAL).terms["penalty"] < together.terms["penalty"]


def static(**options):
    decoder = StaticDecoder(WIDTH, OUT, **options)
    init_decoder(decoder, torch.Generator().manual_seed(0))
    return decoder


@torch.no_grad()
def test_static_map_by_hand():
    decoder = StaticDecoder(2, 2)
    decoder.maps["local"][1].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    decoder.maps["local"][1].bias.zero_()
    found = decoder(torch.tensor([[[5.0, 1.0]]]), LOCAL).tokens  # norm: 1, -1; linear: 3, -1; GELU: 2.996, -0.159
    torch.testing.assert_close(found, torch.tensor([[[1.0, -1.0]]]))


@torch.no_grad()
def test_static_maps_are_one_for_each_pattern_or_one_for_all():
    tokens = torch.randn(2, 5, WIDTH)
    own, shared = static(), static(shared=True)
    first, *others = [own(tokens, pattern).tokens for pattern in range(EXPERTS)]
    assert first.shape == (2, 5, OUT)
    assert all((first - other).abs().mean() > 0.01 for other in others)
    first, *others = [shared(tokens, pattern).tokens for pattern in range(EXPERTS)]
    assert all(torch.equal(first, other) for other in others)
    assert not own(tokens, LOCAL).terms
    assert own(tokens, LOCAL).usage is None
    assert static(patterns=[LOCAL]).maps.keys() == {PATTERNS[LOCAL]}


def test_static_parameters_are_those_of_the_baseline():
    with torch.device("meta"):
        one, three = (sum(p.numel() for p in StaticDecoder(192, 768, shared=s).parameters()) for s in (True, False))
    assert one / 1e6 == pytest.approx(0.15, abs=0.005)
    assert three == 3 * one
