"""moe.py alone: the model against NumPy loops, routing as a value, experts, head, upcycling."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import moe
from moe import GPT, MoE, MoEConfig, Routes, choose_experts, lm_loss, router_losses, token_log_probs, upcycle

SMALL = dict(vocab_size=23, context=12, n_layer=3, n_head=2, n_embd=16, n_expert=4, top_k=2, moe_every=2)
seeds = st.integers(0, 10_000)
moderate = settings(deadline=None, max_examples=25)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def make(seed=0, dtype=torch.float32, **changes) -> GPT:
    """A model in which every parameter counts: biases and norms are not at their 0 and 1, logits not all alike."""
    g = rng(seed)
    model = GPT(MoEConfig(**SMALL | changes), g)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1.0 if "router" in name else 0.2) * torch.randn(p.shape, generator=g))
            p.add_(1 if "ln_" in name and name.endswith("weight") else 0)
    return model.to(dtype)


def run(model, tokens, **routes_and_noise):
    features, routing = model(tokens, **routes_and_noise)
    return SimpleNamespace(features=features, logits=model.head(features), routing=routing)


def words(model, B=3, T=9, seed=0):
    return torch.randint(0, model.config.vocab_size, (B, T), generator=rng(seed))


def random_routes(model, B, T, seed=0, alpha=0.5, uniform=True) -> Routes:
    c, g = model.config, rng(seed)
    L = len(c.moe_blocks)
    experts = torch.rand(B, T, L, c.n_expert, generator=g).topk(c.top_k).indices
    return Routes(experts, torch.rand(B, T, L, generator=g) < alpha, uniform)


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def book_forward(model, tokens, routes=None):
    """NumPy, float64, a loop over sequences, positions, heads and experts -> logits, router logits, experts used."""
    c = model.config
    p = {k: v.double().numpy() for k, v in model.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
        return x * p[name + ".weight"] + p[name + ".bias"]

    def feed_forward(x, name, e):
        h = x @ p[name + ".w_in"][e] + p[name + ".b_in"][e]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # GPT-2's gelu
        return h @ p[name + ".w_out"][e] + p[name + ".b_out"][e]

    def attend(x, name):  # x [T, D]
        T, d = len(x), c.n_embd // c.n_head
        q, k, v = np.split(x @ p[name + ".qkv.weight"].T + p[name + ".qkv.bias"], 3, axis=1)
        out = np.zeros_like(x)
        for head in range(c.n_head):
            s = slice(head * d, (head + 1) * d)
            for t in range(T):
                weights = softmax(k[: t + 1, s] @ q[t, s] / math.sqrt(d))
                out[t, s] = weights @ v[: t + 1, s]
        return out @ p[name + ".proj.weight"].T + p[name + ".proj.bias"]

    (B, T), L = tokens.shape, len(c.moe_blocks)
    logits = np.zeros((B, T, c.vocab_size))
    router, used = np.zeros((B, T, L, c.n_expert)), np.zeros((B, T, L, c.top_k), int)
    for b in range(B):
        x = np.stack([p["wte.weight"][tokens[b, t]] + p["wpe.weight"][t] for t in range(T)])
        layer = 0
        for i in range(c.n_layer):
            name = f"blocks.{i}"
            x = x + attend(np.stack([norm(row, name + ".ln_1") for row in x]), name + ".attn")
            is_moe = c.n_expert > 1 and (i + 1) % c.moe_every == 0
            for t in range(T):
                h = norm(x[t], name + ".ln_2")
                if not is_moe:
                    x[t] = x[t] + feed_forward(h, name + ".mlp", 0)
                    continue
                router[b, t, layer] = p[name + ".mlp.router.weight"] @ h
                P = softmax(router[b, t, layer])  # eq. 2
                chosen = sorted(range(c.n_expert), key=lambda e: -P[e])[: c.top_k]
                forced = routes is not None and routes.forced[b, t, layer]
                if forced:
                    chosen = routes.experts[b, t, layer].tolist()
                total = sum(P[e] for e in chosen) if c.gate == "renorm" else 1.0  # eq. 3
                for k, e in enumerate(chosen):
                    used[b, t, layer, k] = e
                    explored = forced and routes.uniform and c.gate != "prob"
                    gate = 1 / c.top_k if explored else P[e] / total  # eq. 9
                    x[t] = x[t] + gate * feed_forward(h, name + ".mlp.experts", e)  # eq. 1
                for s in range(c.n_shared_expert):
                    x[t] = x[t] + feed_forward(h, f"{name}.mlp.shared.{s}", 0)
            layer += is_moe
        for t in range(T):
            logits[b, t] = p["wte.weight"] @ norm(x[t], "ln_f")
    return logits, router, used


VARIANTS = [dict(n_expert=1, top_k=1), dict(top_k=1, gate="prob", n_shared_expert=1), dict(top_k=2)]
VARIANTS += [dict(top_k=2, gate="prob"), dict(top_k=1, moe_every=1), dict(top_k=4, n_shared_expert=2, moe_every=3)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_forward_by_the_book(variant):
    """Along its own routes, along explored ones and along replayed ones."""
    model = make(1, torch.float64, **variant)
    tokens = words(model, 2)
    drawn = [random_routes(model, 2, 9, uniform=uniform) for uniform in (True, False)]
    for routes in (None, *drawn) if model.config.moe_blocks else (None,):
        out = run(model, tokens, routes=routes)
        logits, router, used = book_forward(model, tokens, routes)
        np.testing.assert_allclose(out.logits.detach(), logits, atol=1e-10)
        if model.config.moe_blocks:
            np.testing.assert_allclose(out.routing.logits.detach(), router, atol=1e-10)
            assert (out.routing.experts.numpy() == used).all()
            assert torch.equal(out.routing.forced, torch.zeros(used.shape[:3]) > 0 if routes is None else routes.forced)
            P = np.take_along_axis(np.exp(router) / np.exp(router).sum(-1, keepdims=True), used, -1)
            np.testing.assert_allclose(out.routing.expert_log_probs().detach(), np.log(P), atol=1e-9)


def plain_moe(layer, x):
    """The layer with a mask and a loop over the experts, every token through all of them. x [B, T, D]."""
    top, chosen = layer.router(x).softmax(-1).topk(layer.config.top_k)
    if layer.config.gate != "prob":
        total = top.sum(-1, keepdim=True)
        top = top / (total if layer.config.gate == "renorm" else total.detach())
    out = torch.zeros_like(x)
    for networks in (layer.experts, *layer.shared):
        for i, (w_in, b_in, w_out, b_out) in enumerate(zip(*networks.parameters(), strict=True)):
            y = F.gelu(x @ w_in + b_in, approximate="tanh") @ w_out + b_out
            out = out + (y * (top * (chosen == i)).sum(-1, keepdim=True) if networks is layer.experts else y)
    return out


def make_layer(seed, dtype=torch.float32, **changes):
    g = rng(seed)
    layer = MoE(MoEConfig(**SMALL | changes)).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return layer


@moderate
@given(
    *(st.integers(2, 9), st.integers(1, 3), st.sampled_from(moe.GATES), st.integers(0, 2)),
    st.sampled_from([1, 3, 12, 700]),  # many slots in float32 go through the loop too
    st.sampled_from([torch.float32, torch.float64]),  # one grouped product, and a loop over experts
    seeds,
)
def test_dispatch_equals_a_loop_over_experts(n_expert, top_k, gate, n_shared, T, dtype, seed):
    """Value and all gradients; experts without a token included."""
    top_k = min(top_k, n_expert)
    layer = make_layer(seed, dtype, gate=gate, n_expert=n_expert, top_k=top_k, n_shared_expert=n_shared)
    x = torch.randn(2, T, 16, generator=rng(seed), dtype=dtype).requires_grad_()
    parameters = [x, *layer.parameters()]
    to = torch.randn(2, T, 16, generator=rng(seed + 1), dtype=dtype)
    out, plain = layer(x)[0], plain_moe(layer, x)
    torch.testing.assert_close(out, plain, atol=5e-5, rtol=1e-3)
    for a, b in zip(*(gradients((y * to).sum(), parameters) for y in (out, plain)), strict=True):
        assert (a - b).norm() <= 1e-4 * (1 + b.norm())


def test_bfloat16_dispatch_is_as_exact_as_bfloat16():
    """Biases too: their gradient sums thousands of numbers, which bfloat16 additions would lose."""
    layer = make_layer(5, n_expert=2, top_k=1)
    x, to = torch.randn(2, 1500, 16, generator=rng(6)), torch.rand(2, 1500, 16, generator=rng(7))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)[0]
    assert out.dtype == torch.bfloat16
    parameters = list(layer.experts.parameters())
    for a, b in zip(*(gradients((y * to).sum(), parameters) for y in (out, plain_moe(layer, x))), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_renormalised_gates():
    """They survive experts of probability zero; `straight` has the value of `renorm` to the bit."""
    logits = torch.tensor([[[0.0, -200.0, -201.0, -300.0]]])
    routes = Routes(torch.tensor([[[1, 2]]]), torch.ones(1, 1) > 0)
    renorm, straight = (MoEConfig(**SMALL, gate=gate) for gate in ("renorm", "straight"))
    weights = choose_experts(logits, renorm, routes._replace(uniform=False))[1]
    torch.testing.assert_close(weights[0, 0], torch.tensor([0.0, -1.0]).softmax(-1))
    logits = 3 * torch.randn(2, 50, 4, generator=rng())
    assert torch.equal(choose_experts(logits, straight)[1], choose_experts(logits, renorm)[1])


@moderate
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), seeds)
def test_router_losses_by_the_book(B, L, top_k, seed):
    """Layer by layer, without the padding; what stands in the padding does not matter."""
    g, T, E = rng(seed), 5, 4
    logits = 2 * torch.randn(B, T, L, E, generator=g, dtype=torch.float64)
    experts = torch.rand(B, T, L, E, generator=g).topk(top_k).indices
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[0, 0] = True
    got = router_losses(logits, experts, mask)
    for layer in range(L):
        rows, used = logits[:, :, layer][mask].numpy(), experts[:, :, layer][mask].flatten().tolist()
        load = np.array([used.count(e) / len(used) for e in range(E)])
        np.testing.assert_allclose(got[0][layer], E * sum(load * np.mean([softmax(row) for row in rows], 0)))
        np.testing.assert_allclose(got[1][layer], np.mean([math.log(np.exp(row).sum()) ** 2 for row in rows]))
        np.testing.assert_allclose(got[2][layer], load)
    other = logits.masked_fill(~mask[..., None, None], math.nan).requires_grad_()
    again, nothing = (router_losses(other, experts, m) for m in (mask, mask & False))
    assert all(map(torch.equal, got, again)) and not any(x.any() for x in nothing)
    slope, flat = (gradients(balance.sum() + z.sum(), [other])[0] for balance, z, _ in (again, nothing))
    assert slope.isfinite().all() and not flat.any()


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_replaying_its_own_routes_changes_no_bit(variant):
    model = make(3, **variant)
    tokens = words(model)
    first = run(model, tokens)
    forced = first.routing.forced | True
    again = run(model, tokens, routes=Routes(first.routing.experts, forced, uniform=False))
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(first.routing.logits, again.routing.logits)
    nothing_forced = run(model, tokens, routes=Routes(first.routing.experts.flip(-1), ~forced))
    assert torch.equal(first.logits, nothing_forced.logits)
    other = run(model, tokens, routes=random_routes(model, *tokens.shape), noise=noise_for(model, tokens))
    assert not torch.equal(first.logits, other.logits)
    assert torch.equal(first.logits, run(model, tokens).logits)  # no forward leaves anything behind


def noise_for(model, tokens):
    shape = (len(model.config.moe_blocks), *tokens.shape, model.config.n_embd)
    return list(0.99 + 0.02 * torch.rand(shape, generator=rng(7)))


def test_router_is_float32_under_bfloat16_autocast():
    """Its logits and losses are computed in float32, not bfloat16 numbers in a float32 tensor."""
    model, tokens = make(), words(make())
    with torch.autocast("cpu", torch.bfloat16):
        routing = model(tokens)[1]
        again = model.route_again(routing.inputs)
        losses = router_losses(routing.logits, routing.experts)
    torch.testing.assert_close(losses, router_losses(routing.logits, routing.experts), rtol=0, atol=0)
    assert routing.logits.dtype == torch.float32
    expected = routing.inputs[0].float() @ model.blocks[model.config.moe_blocks[0]].mlp.router.weight.T
    torch.testing.assert_close(routing.logits[:, :, 0], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(again, routing.logits)
    features, routing = make().bfloat16()(tokens)
    assert features.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32


def test_noise_touches_the_router_alone_and_each_layer_has_its_own():
    """Along forced routes the rest computes the same. What a router sees is recorded, noise and all."""
    model = make(moe_every=1)
    tokens = words(model)
    noise, routes = noise_for(model, tokens), random_routes(model, *tokens.shape, alpha=1.0)
    plain, noisy = (run(model, tokens, routes=routes, noise=n) for n in (None, noise))
    assert torch.equal(plain.logits, noisy.logits)
    for layer, (before, after) in enumerate(zip(plain.routing.inputs, noisy.routing.inputs, strict=True)):
        assert torch.equal(after, before * noise[layer])
        router = model.blocks[layer].mlp.router.weight
        torch.testing.assert_close(noisy.routing.logits[:, :, layer], after @ router.T)


def plain_log_probs(features, weight, targets, temperature=1.0):
    return (features @ weight.T / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


@pytest.mark.parametrize("masked", ["all", "some", "none"])
def test_the_head_equals_log_softmax(masked):
    g = rng()
    features, weight = (torch.randn(*shape, 8, generator=g).requires_grad_() for shape in ((3, 13), (50,)))
    targets, mask = torch.randint(50, (3, 13), generator=g), torch.rand(3, 13, generator=g) < 0.7
    keep = {"all": mask | True, "some": mask, "none": mask & False}[masked]
    loss, log_probs = lm_loss(features, weight, targets, None if masked == "all" else keep)
    book = plain_log_probs(features, weight, targets)
    torch.testing.assert_close(log_probs, book.detach())
    ours, warm = (f(features, weight, targets, 0.6) for f in (token_log_probs, plain_log_probs))
    torch.testing.assert_close(ours, warm)
    for a, b in ((loss, -book[keep].sum() / max(int(keep.sum()), 1)), ((ours * keep).sum(), (warm * keep).sum())):
        torch.testing.assert_close(a, b)
        slopes = (gradients(3 * x, (features, weight)) for x in (a, b))
        torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "variant, total, active",
    [
        (dict(n_expert=1), 124_439_808, 124_439_808),
        (dict(), 322_818_816, 124_476_672),
        (dict(n_shared_expert=1), 351_153_408, 152_811_264),
        (dict(top_k=2), 322_818_816, 152_811_264),  # a second routed expert is as large as a shared one
    ],
)
def test_parameter_counts_of_gpt2(variant, total, active):
    """ERL table 10; the paper's MoE rows count 36,864 router weights more, twice what six routers of 768 x 8 hold."""
    with torch.device("meta"):
        model = GPT(MoEConfig(vocab_size=50257, **moe.SIZES["gpt2"], **variant))
    assert model.count_parameters() == (total, active)


def test_initial_weights_and_their_seed():
    a, b, c = (GPT(MoEConfig(n_embd=64), rng(s)) for s in (0, 0, 1))
    assert all(map(torch.equal, a.parameters(), b.parameters())) and not torch.equal(a.wte.weight, c.wte.weight)
    layer = a.blocks[1].mlp
    for p, std in ((layer.router.weight, 0.1), (layer.experts.w_in, 0.02), (layer.experts.w_out, 0.02 / math.sqrt(8))):
        assert abs(p.std() / std - 1) < 0.15
    assert not layer.experts.b_in.any() and not torch.equal(layer.experts.w_in[0], layer.experts.w_in[1])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("n_shared", [0, 1, 2])
def test_upcycled_model_equals_its_dense_parent(top_k, n_shared):
    dense = make(6, n_expert=1, top_k=1)
    config = MoEConfig(**SMALL | dict(top_k=top_k, n_shared_expert=n_shared, moe_every=1))
    model = upcycle(dense, config, rng())
    tokens = words(dense)
    expected = run(dense, tokens).logits
    for routes in (None, random_routes(model, *tokens.shape)):
        torch.testing.assert_close(run(model, tokens, routes=routes).logits, expected, atol=1e-6, rtol=1e-6)
    model.blocks[0].mlp.experts.w_in.data.add_(1)  # a copy, not a view of its parent
    assert dense.blocks[0].mlp.w_in.abs().max() < 2
    again = upcycle(dense.double(), config, rng())  # in its parent's type, with the routers of the same seed
    assert again.wte.weight.dtype == torch.float64
    assert torch.equal(again.blocks[0].mlp.router.weight, model.blocks[0].mlp.router.weight.double())


def test_what_is_refused():
    """Impossible sizes, a parent of other sizes or with experts, routes of other shapes, more tokens than positions."""
    for name, value in dict(top_k=5, n_head=3, gate="softmax", n_expert=0, n_embd=16.0, moe_every=4).items():
        with pytest.raises(ValueError, match=name):
            MoEConfig(**SMALL | {name: value})
    model, dense = make(), make(n_expert=1, top_k=1)
    changes = dict(n_layer=4), dict(vocab_size=24), dict(n_embd=32), dict(context=13), dict(n_head=4)
    for parent, change in ((model, {}), *((dense, change) for change in changes)):
        with pytest.raises(ValueError, match="only the experts may differ"):
            upcycle(parent, MoEConfig(**SMALL | change))
    tokens, (experts, forced, _) = words(model), random_routes(model, 3, 9)
    for bad in (Routes(experts[:, :-1], forced[:, :-1]), Routes(experts[..., :1], forced)):
        with pytest.raises(ValueError, match="routes"):
            model(tokens, routes=bad)
    with pytest.raises(ValueError, match="context of 12"):
        model(words(model, 1, 13))
