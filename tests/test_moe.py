"""moe.py: the model against NumPy loops, routing as a value, experts, head, upcycling, checkpoints, GPT-2's weights."""

import copy
import gc
import http.server
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.autograd import gradcheck
from torch.func import functional_call

import moe
from moe import (
    GPT,
    MoE,
    MoEConfig,
    Routes,
    choose_experts,
    lm_loss,
    load_gpt2,
    load_model,
    pick_device,
    router_losses,
    save_model,
    token_log_probs,
    upcycle,
    within_capacity,
)

ROOT = Path(__file__).parent.parent
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


def words(model, B=3, T=9, seed=0):
    return torch.randint(0, model.config.vocab_size, (B, T), generator=rng(seed))


def random_routes(model, B, T, seed=0, alpha=0.5, uniform=True) -> Routes:
    c, g = model.config, rng(seed)
    L = len(c.moe_blocks)
    experts = torch.rand(B, T, L, c.n_expert, generator=g).topk(c.top_k).indices
    return Routes(experts, torch.rand(B, T, L, generator=g) < alpha, uniform)


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


# ---------------------------------------------------------------------------------------------- the forward by the book


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

    B, T = tokens.shape
    L = len(c.moe_blocks)
    logits = np.zeros((B, T, c.vocab_size))
    router, used = np.zeros((B, T, L, c.n_expert)), np.zeros((B, T, L, c.top_k), int)
    for b in range(B):
        x = np.stack([p["wte.weight"][tokens[b, t]] + p["wpe.weight"][t] for t in range(T)])
        layer = 0
        for i in range(c.n_layer):
            name = f"blocks.{i}"
            x = x + attend(np.stack([norm(row, name + ".ln_1") for row in x]), name + ".attn")
            is_moe = c.n_expert > 1 and (i + 1) % c.moe_every == 0
            places = [0] * c.n_expert  # tokens that came to each expert
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
                    places[e] += 1
                    if c.expert_capacity and places[e] > c.expert_capacity:
                        continue
                    gate = 1 / c.top_k if forced and routes.uniform else P[e] / total  # eq. 9
                    x[t] = x[t] + gate * feed_forward(h, name + ".mlp.experts", e)  # eq. 1
                for s in range(c.n_shared_expert):
                    x[t] = x[t] + feed_forward(h, f"{name}.mlp.shared.{s}", 0)
            layer += is_moe
        for t in range(T):
            logits[b, t] = p["wte.weight"] @ norm(x[t], "ln_f")
    return logits, router, used


VARIANTS = [
    dict(n_expert=1, top_k=1),
    dict(top_k=1),
    dict(top_k=1, gate="prob", n_shared_expert=1),
    dict(top_k=2),
    dict(top_k=2, gate="prob", expert_capacity=2),
    dict(top_k=1, expert_capacity=2, moe_every=1),
    dict(top_k=4, n_shared_expert=2, moe_every=3),
]
name_of = lambda v: " ".join(f"{k}={x}" for k, x in v.items())  # noqa: E731


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_forward_by_the_book(variant):
    model = make(1, torch.float64, **variant)
    tokens = words(model, 2)
    out = model(tokens)
    logits, router, used = book_forward(model, tokens)
    np.testing.assert_allclose(out.logits.detach(), logits, atol=1e-10)
    if variant.get("n_expert") != 1:
        np.testing.assert_allclose(out.routing.logits.detach(), router, atol=1e-10)
        assert (out.routing.experts.numpy() == used).all()
        assert not out.routing.forced.any()


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("variant", VARIANTS[1:], ids=name_of)
def test_forced_routes_by_the_book(variant, uniform):
    model = make(2, torch.float64, **variant)
    tokens = words(model, 2)
    routes = random_routes(model, 2, 9, uniform=uniform)
    out = model(tokens, routes=routes)
    logits, router, used = book_forward(model, tokens, routes)
    np.testing.assert_allclose(out.logits.detach(), logits, atol=1e-10)
    np.testing.assert_allclose(out.routing.logits.detach(), router, atol=1e-10)
    assert (out.routing.experts.numpy() == used).all()
    assert torch.equal(out.routing.forced, routes.forced)
    log_probs = out.routing.expert_log_probs()
    for *index, k in np.ndindex(*used.shape):
        index = tuple(index)
        assert abs(log_probs[index][k].item() - math.log(softmax(router[index])[used[index][k]])) < 1e-9


# ------------------------------------------------------------------------------------------------- experts and dispatch


def plain_moe(layer, x):
    """The layer with a mask and a loop over the experts, every token through all of them. x [B, T, D]."""
    c, e = layer.config, layer.experts
    probs = layer.router(x).softmax(-1)
    top, chosen = probs.topk(c.top_k)
    if c.gate == "renorm":
        top = top / top.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for i in range(c.n_expert):
        y = F.gelu(x @ e.w_in[i] + e.b_in[i], approximate="tanh") @ e.w_out[i] + e.b_out[i]
        goes = chosen == i  # [B, T, K]
        if c.expert_capacity:
            goes = goes & (goes.any(-1).cumsum(1) <= c.expert_capacity)[..., None]
        out = out + (top * goes).sum(-1, keepdim=True) * y
    for s in layer.shared:
        out = out + F.gelu(x @ s.w_in[0] + s.b_in[0], approximate="tanh") @ s.w_out[0] + s.b_out[0]
    return out


def make_layer(seed, dtype=torch.float32, **changes):
    g = rng(seed)
    layer = MoE(MoEConfig(**SMALL | changes)).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return layer


@pytest.mark.parametrize("path", ["grouped", "turns"])
@moderate
@given(
    st.integers(2, 9),
    st.integers(1, 3),
    st.sampled_from(["renorm", "prob"]),
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(1, 2),
    st.integers(1, 12),
    seeds,
)
def test_dispatch_equals_a_loop_over_experts(path, n_expert, top_k, gate, n_shared, capacity, B, T, seed):
    """Value and all gradients, by the grouped product and without it; experts without a token included."""
    top_k = min(top_k, n_expert)
    sizes = dict(n_expert=n_expert, top_k=top_k, n_shared_expert=n_shared, expert_capacity=capacity)
    layer = make_layer(seed, gate=gate, **sizes)
    x = torch.randn(B, T, 16, generator=rng(seed)).requires_grad_()
    parameters = [x, *layer.parameters()]
    to = torch.randn(B, T, 16, generator=rng(seed + 1))
    with pytest.MonkeyPatch.context() as patch:
        if path == "turns":
            patch.setattr(moe, "has_grouped_mm", lambda *_: False)
        else:
            assert moe.has_grouped_mm(x, layer.experts.w_in)
        out = layer(x)[0]
        ours = gradients((out * to).sum(), parameters)
    plain = plain_moe(layer, x)
    torch.testing.assert_close(out, plain, atol=2e-5, rtol=1e-4)
    for a, b in zip(ours, gradients((plain * to).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("top_k, gate, capacity", [(1, "prob", 0), (2, "renorm", 0), (2, "prob", 2)])
def test_gradcheck_of_the_layer(top_k, gate, capacity):
    layer = make_layer(3, torch.float64, n_expert=3, top_k=top_k, gate=gate, expert_capacity=capacity, n_embd=4)
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(1, 5, 4, generator=rng(4), dtype=torch.float64).requires_grad_()

    def f(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[:2]

    assert gradcheck(f, (x, *layer.parameters()), fast_mode=True)


def test_bfloat16_dispatch_is_as_exact_as_bfloat16():
    """Biases too: their gradient sums thousands of numbers, which bfloat16 additions would lose."""
    layer = make_layer(5, n_expert=2, top_k=1)
    x = torch.randn(2, 1500, 16, generator=rng(6))
    to = torch.rand(2, 1500, 16, generator=rng(7))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)[0]
    assert out.dtype == torch.bfloat16
    ours = gradients((out.float() * to).sum(), list(layer.experts.parameters()))
    plain = gradients((plain_moe(layer, x) * to).sum(), list(layer.experts.parameters()))
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_top1_renorm_sends_the_router_no_gradient_and_prob_does():
    for gate, expected in (("renorm", False), ("prob", True)):
        model = make(top_k=1, gate=gate)
        tokens = words(model)
        model(tokens, tokens).lm_loss.backward()
        for i in model.config.moe_blocks:
            assert bool(model.blocks[i].mlp.router.weight.grad.abs().max() > 0) is expected


@moderate
@given(st.integers(1, 4), st.sampled_from(["renorm", "prob"]), seeds)
def test_choose_experts_applies_the_softmax_once(top_k, gate, seed):
    logits = 3 * torch.randn(2, 5, 4, generator=rng(seed), dtype=torch.float64)
    experts, weights = choose_experts(logits, MoEConfig(**SMALL | dict(top_k=top_k, gate=gate)))
    rows = zip(logits.view(-1, 4).numpy(), experts.view(-1, top_k), weights.view(-1, top_k), strict=True)
    for row, chosen, w in rows:
        P = softmax(row)
        assert chosen.tolist() == np.argsort(-P)[:top_k].tolist()
        expected = P[chosen] / P[chosen].sum() if gate == "renorm" else P[chosen]
        np.testing.assert_allclose(w, expected, rtol=1e-12)


def test_renorm_gate_survives_experts_of_probability_zero():
    logits = torch.tensor([[[0.0, -200.0, -201.0, -300.0]]])
    experts, forced = torch.tensor([[[1, 2]]]), torch.tensor([[True]])
    weights = choose_experts(logits, MoEConfig(**SMALL), (experts, forced, False))[1]
    torch.testing.assert_close(weights[0, 0], torch.tensor([0.0, -1.0]).softmax(-1))


@moderate
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 9), seeds)
def test_capacity_takes_the_first_tokens(top_k, capacity, T, seed):
    """Also in two halves, the second one continuing from the places that the first one took (generation)."""
    experts = torch.rand(2, T, 4, generator=rng(seed)).topk(top_k).indices
    keep, used = within_capacity(experts, 4, capacity)
    for b in range(2):
        places = [0] * 4
        for t in range(T):
            for k in range(top_k):
                e = experts[b, t, k]
                assert keep[b, t, k] == (places[e] < capacity)
                places[e] += 1
        assert used[b].tolist() == places
    half = T // 2
    first, places = within_capacity(experts[:, :half], 4, capacity)
    second, places = within_capacity(experts[:, half:], 4, capacity, places)
    assert torch.equal(torch.cat([first, second], 1), keep) and torch.equal(places, used)


# -------------------------------------------------------------------------------------------------------- router losses


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_is_1_at_perfect_balance_for_every_k(top_k):
    E, T = 6, 12
    experts = torch.stack([(torch.arange(T) + k) % E for k in range(top_k)], -1)[None, :, None]
    balance, _, load = router_losses(torch.zeros(1, T, 1, E), experts)
    torch.testing.assert_close(balance, torch.ones(1))
    torch.testing.assert_close(load, torch.full((1, E), 1 / E))


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
        counts, mean_probs, z, n = np.zeros(E), np.zeros(E), 0.0, 0
        for b, t in mask.nonzero().tolist():
            row = logits[b, t, layer].numpy()
            for k in range(top_k):
                counts[experts[b, t, layer, k]] += 1
            mean_probs += softmax(row)
            z += math.log(np.exp(row).sum()) ** 2
            n += 1
        load = counts / (n * top_k)
        np.testing.assert_allclose(got[0][layer], E * sum(load * mean_probs / n))
        np.testing.assert_allclose(got[1][layer], z / n)
        np.testing.assert_allclose(got[2][layer], load)
    torch.testing.assert_close(got[2].sum(-1), torch.ones(L), check_dtype=False)
    other = router_losses(torch.where(mask[..., None, None], logits, 7.0), experts, mask)
    assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True))


def test_router_losses_of_nothing_are_zero_and_differentiable():
    logits = torch.randn(2, 3, 2, 4, requires_grad=True)
    experts, mask = torch.zeros(2, 3, 2, 1, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    balance, z, load = router_losses(logits, experts, mask)
    (balance.sum() + z.sum()).backward()
    assert not balance.any() and not z.any() and not load.any() and not logits.grad.any()


def test_forward_returns_the_losses_of_its_own_routing():
    model = make()
    tokens = words(model)
    mask = torch.rand(tokens.shape, generator=rng(1)) < 0.6
    out = model(tokens, tokens, mask)
    expected = router_losses(out.routing.logits, out.routing.experts, mask)
    assert all(torch.equal(a, b) for a, b in zip((out.balance_loss, out.z_loss, out.load), expected, strict=True))
    assert out.logits is None and out.lm_loss.ndim == 0


# --------------------------------------------------------------------------------------------------- routing is a value


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=name_of)
def test_replaying_its_own_routes_changes_no_bit(variant):
    model = make(3, **variant)
    tokens = words(model)
    first = model(tokens)
    forced = torch.ones_like(first.routing.forced)
    again = model(tokens, routes=Routes(first.routing.experts, forced, uniform=False))
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(first.routing.logits, again.routing.logits)
    nothing_forced = model(tokens, routes=Routes(first.routing.experts.flip(-1), ~forced))
    assert torch.equal(first.logits, nothing_forced.logits)


@moderate
@given(st.sampled_from(VARIANTS[1:]), st.booleans(), seeds)
def test_same_routes_same_numbers(variant, uniform, seed):
    """Two forwards, train() and eval(): bit for bit. Other routes: other numbers."""
    model = make(seed, **variant)
    tokens = words(model, seed=seed)
    routes = random_routes(model, *tokens.shape, seed, uniform=uniform)
    first = model(tokens, routes=routes)
    second = model.eval()(tokens, routes=routes)
    model.train()
    assert torch.equal(first.logits, second.logits) and torch.equal(first.routing.logits, second.routing.logits)
    used = first.routing.experts
    assert torch.equal(used[routes.forced], routes.experts[routes.forced])
    if variant["top_k"] < 4:
        other = model(tokens, routes=random_routes(model, *tokens.shape, seed + 1, 1.0))
        assert not torch.equal(first.logits, other.logits)


def test_a_forward_leaves_nothing_behind():
    model = make(expert_capacity=3)
    tokens = words(model)

    def state():
        """Everything that a module holds, by identity."""
        held = {}
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                parts = value.items() if isinstance(value, dict) else [("", value)]
                held |= {(name, key, k): id(v) for k, v in parts}
        return held

    before, weights = state(), copy.deepcopy(model.state_dict())
    names = {k: id(v) for k, v in vars(moe).items()}
    noise = model.jitter(tokens.shape, 0.01, rng())
    out = model(tokens, tokens, routes=random_routes(model, *tokens.shape), noise=noise)
    assert state() == before and {k: id(v) for k, v in vars(moe).items()} == names
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    held = [weakref.ref(t) for t in (out.lm_loss, out.balance_loss, out.routing.logits, out.routing.inputs[0])]
    assert all(ref() is not None for ref in held)
    del out
    gc.collect()
    assert all(ref() is None for ref in held)


@moderate
@given(st.sampled_from(VARIANTS), st.integers(1, 8), seeds)
def test_a_later_token_changes_nothing_earlier(variant, t, seed):
    """Routes bit for bit, with forced ones too, however small the capacity.

    The logits also, where the later tokens keep their experts. Where they do not, earlier tokens stand on other rows
    of an expert's matrix product, which the CPU may round otherwise: then to a rounding, and their gradient with
    respect to the later tokens is still exactly 0.
    """
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        model = make(seed, dtype, **variant)
        tokens = words(model, seed=seed)
        other = tokens.clone()
        other[:, t:] = (other[:, t:] + 1) % 23
        routes = random_routes(model, *tokens.shape, seed)
        a, b = model(tokens, routes=routes), model(other, routes=routes)
        torch.testing.assert_close(a.logits[:, :t], b.logits[:, :t], atol=atol, rtol=0)
        assert torch.equal(a.routing.experts[:, :t], b.routing.experts[:, :t])
        assert not torch.equal(a.logits[:, t:], b.logits[:, t:])
        held = Routes(a.routing.experts, torch.ones_like(a.routing.forced), uniform=False)
        a, b = model(tokens, routes=held), model(other, routes=held)
        assert torch.equal(a.logits[:, :t], b.logits[:, :t])
        assert torch.equal(a.routing.logits[:, :t], b.routing.logits[:, :t])
    hidden = model.stem(tokens).detach().requires_grad_()
    features, routing = model.branch(hidden, routes)
    (grad,) = gradients(features[:, :t].square().sum() + routing.logits[:, :t].square().sum(), [hidden])
    assert not grad[:, t:].any() and grad[:, :t].any()


@moderate
@given(st.sampled_from(VARIANTS), seeds)
def test_companions_and_padding_change_nothing(variant, seed):
    model = make(seed, **variant)
    tokens = words(model, seed=seed)
    together = model(tokens)
    alone = model(tokens[1:2, :6])
    torch.testing.assert_close(together.logits[1:2, :6], alone.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(together.routing.experts[1:2, :6], alone.routing.experts)


@moderate
@given(st.sampled_from(VARIANTS[1:]), seeds)
def test_relabelled_experts_compute_the_same(variant, seed):
    model = make(seed, **variant)
    twin = copy.deepcopy(model)
    order = torch.randperm(4, generator=rng(seed))  # expert order[i] of the model is expert i of its twin
    with torch.no_grad():
        for i in model.config.moe_blocks:
            for name, p in model.blocks[i].mlp.named_parameters():
                if not name.startswith("shared"):
                    twin.blocks[i].mlp.get_parameter(name).copy_(p[order])
    tokens = words(model, seed=seed)
    ours, theirs = model(tokens), twin(tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(order[theirs.routing.experts], ours.routing.experts)
    torch.testing.assert_close(ours.load[:, order], theirs.load)
    torch.testing.assert_close(ours.balance_loss, theirs.balance_loss)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_copies_of_the_branch_equal_separate_forwards(variant):
    """The part before the first router once, then 1 + m routes: value and gradient."""
    model = make(4, **variant)
    tokens, m = words(model, 2), 3
    routes = [random_routes(model, 2, 9, s, alpha=s / 3) for s in range(1 + m)]
    if variant.get("n_expert") == 1:
        routes = [Routes(r.experts.new_zeros(2, 9, 0, 1), r.forced) for r in routes]
    parameters = list(model.parameters())
    together = Routes(torch.cat([r.experts for r in routes]), torch.cat([r.forced for r in routes]))
    features, routing = model.branch(model.stem(tokens).repeat(1 + m, 1, 1), together)
    to = torch.randn(features.shape, generator=rng())
    separate = [model.branch(model.stem(tokens), r) for r in routes]
    torch.testing.assert_close(features, torch.cat([f for f, _ in separate]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routing.logits, torch.cat([r.logits for _, r in separate]), atol=1e-5, rtol=1e-5)
    ours = gradients((features * to).sum(), parameters)
    plain = gradients((torch.cat([f for f, _ in separate]) * to).sum(), parameters)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_copies_with_nothing_forced_are_equal():
    """ERL takes the sign of a difference: with alpha = 0 there is none, but for the rounding of a matrix product."""
    model = make(5, context=64, n_expert=8, top_k=2)
    tokens = words(model, 3, 50)
    routes = random_routes(model, 12, 50, alpha=0.0)
    features, routing = model.branch(model.stem(tokens).repeat(4, 1, 1), routes)
    log_probs = token_log_probs(features, model.wte.weight, tokens.repeat(4, 1)).view(4, 3, 50)
    assert torch.equal(routing.experts, routing.experts[:3].repeat(4, 1, 1, 1))
    torch.testing.assert_close(log_probs, log_probs[:1].expand_as(log_probs), atol=2e-6, rtol=0)


def test_every_top1_route_of_a_fresh_upcycled_model_gives_the_same_log_probs():
    model = upcycle(make(n_expert=1, top_k=1, context=64), MoEConfig(**SMALL | dict(top_k=1, context=64)), rng())
    tokens = words(model, 3, 50)
    features, routing = model.branch(model.stem(tokens).repeat(4, 1, 1), random_routes(model, 12, 50, alpha=0.6))
    assert (routing.experts[:3] != routing.experts[3:6]).any()
    log_probs = token_log_probs(features, model.wte.weight, tokens.repeat(4, 1)).view(4, 3, 50)
    torch.testing.assert_close(log_probs, log_probs[:1].expand_as(log_probs), atol=2e-6, rtol=0)


def test_route_again_reaches_the_routers_alone():
    model = make()
    tokens = words(model)
    routing = model(tokens).routing
    logits = model.route_again(routing.inputs)
    assert torch.equal(logits, routing.logits)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == ("router" in name), name


def test_wrong_routes_are_refused():
    model = make()
    tokens = words(model)
    good = random_routes(model, *tokens.shape)
    for bad in (
        Routes(good.experts[:, :-1], good.forced[:, :-1]),  # a position short
        Routes(good.experts[..., :1], good.forced),  # K of another model
        Routes(good.experts, good.forced[..., None]),
    ):
        with pytest.raises(ValueError, match=r"routes .* \[3, 9, 1, 2\]"):
            model(tokens, routes=bad)
    with pytest.raises(ValueError, match="13 tokens .* context of 12"):
        model(words(model, 1, 13))


# ------------------------------------------------------------------------------------------------- precision and jitter


def test_router_is_float32_under_bfloat16_autocast():
    """Its logits are those that float32 computes from the same inputs, not bfloat16 numbers in a float32 tensor."""
    model = make()
    tokens = words(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, tokens)
        again = model.route_again(out.routing.inputs)
    assert out.routing.logits.dtype == torch.float32 and out.lm_loss.dtype == torch.float32
    block = model.config.moe_blocks[0]
    expected = out.routing.inputs[0].float() @ model.blocks[block].mlp.router.weight.T
    torch.testing.assert_close(out.routing.logits[:, :, 0], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(again, out.routing.logits)
    assert abs(out.lm_loss - model(tokens, tokens).lm_loss) < 0.05


def test_half_precision_model_keeps_a_float32_router():
    model = make().bfloat16()
    out = model(words(model))
    assert out.logits.dtype == torch.bfloat16 and out.routing.logits.dtype == torch.float32


def test_jitter_is_asked_for_and_touches_the_router_alone():
    model = make()
    tokens = words(model)
    assert model.jitter(tokens.shape, 0.0, rng()) is None
    noise = model.jitter(tokens.shape, 0.01, rng())
    assert len(noise) == len(model.config.moe_blocks) and noise[0].shape == (*tokens.shape, 16)
    low, high = noise[0].min(), noise[0].max()
    assert 0.99 <= low < 0.9905 and 1.0095 < high <= 1.01
    assert all(torch.equal(a, b) for a, b in zip(noise, model.jitter(tokens.shape, 0.01, rng()), strict=True))
    plain, jittered = model(tokens), model(tokens, noise=noise)
    assert not torch.equal(plain.routing.logits, jittered.routing.logits)
    router = model.blocks[1].mlp.router.weight  # of the only MoE block: it sees the same, and its router does not
    torch.testing.assert_close(jittered.routing.logits[:, :, 0], (plain.routing.inputs[0] * noise[0]) @ router.T)
    assert torch.equal(jittered.routing.inputs[0], plain.routing.inputs[0])
    routes = random_routes(model, *tokens.shape, alpha=1.0)
    assert torch.equal(model(tokens, routes=routes).logits, model(tokens, routes=routes, noise=noise).logits)
    dense = make(n_expert=1, top_k=1)
    assert dense.jitter(tokens.shape, 0.01, rng()) is None


# ------------------------------------------------------------------------------------------------------ the output head


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(moe, "CPU_TILE", (16, 1500))  # 16 tokens at a time, and a last tile of 500 words


def head_case(seed, dtype=torch.float32, V=5000, masked=0.7):
    g = rng(seed)
    features = torch.randn(3, 13, 8, generator=g, dtype=dtype).requires_grad_()  # 39 tokens: a last block of 7
    weight = torch.randn(V, 8, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (3, 13), generator=g)
    return features, weight, targets, torch.rand(3, 13, generator=g) < masked


@pytest.mark.parametrize("V", [50, 5000])
@pytest.mark.parametrize("masked", [None, 0.7, 0.0])
def test_lm_loss_equals_log_softmax(V, masked, small_blocks):
    for seed in range(3):
        features, weight, targets, mask = head_case(seed, V=V, masked=masked or 0.0)
        mask = None if masked is None else mask
        loss = lm_loss(features, weight, targets, mask)
        nll = -(features @ weight.T).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        keep = torch.ones_like(nll, dtype=torch.bool) if mask is None else mask
        plain = nll[keep].sum() / max(int(keep.sum()), 1)
        torch.testing.assert_close(loss, plain)
        for a, b in zip(gradients(3 * loss, (features, weight)), gradients(3 * plain, (features, weight)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            assert masked != 0.0 or not a.any()


@pytest.mark.parametrize("V", [50, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_log_probs_equal_log_softmax(V, temperature, small_blocks):
    for seed in range(3):
        features, weight, targets, _ = head_case(seed, V=V)
        ours = token_log_probs(features, weight, targets, temperature)
        plain = (features @ weight.T / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
        to = torch.randn(ours.shape, generator=rng(seed))
        expected = gradients((plain * to).sum(), (features, weight))
        for a, b in zip(gradients((ours * to).sum(), (features, weight)), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("f", [lm_loss, token_log_probs])
def test_gradcheck_of_the_blocked_head(f, small_blocks):
    features, weight, targets, _ = head_case(1, torch.float64, V=4100)
    assert f(features, weight, targets).dtype == torch.float64
    assert gradcheck(lambda x, w: f(x, w, targets), (features, weight), fast_mode=True)


def test_blocked_head_asks_only_for_the_gradients_needed(small_blocks, monkeypatch):
    for f in (lm_loss, token_log_probs):
        for needed in (0, 1):
            features, weight, targets, _ = head_case(2)
            whole = gradients(f(features, weight, targets).sum(), (features, weight))[needed]
            (weight if needed == 0 else features).requires_grad_(False)
            part = torch.autograd.grad(f(features, weight, targets).sum(), (features, weight)[needed])[0]
            assert torch.equal(whole, part)
        with torch.no_grad(), monkeypatch.context() as m:
            m.setattr(moe, "_softmax_less_target", None)  # an evaluation computes no gradient
            assert not f(features.requires_grad_(), weight.requires_grad_(), targets).requires_grad


@pytest.mark.parametrize("f", [lm_loss, token_log_probs])
def test_blocked_head_under_bfloat16_autocast(f, small_blocks):
    features, weight, targets, _ = head_case(3)
    with torch.autocast("cpu", torch.bfloat16):
        value = f(features, weight, targets)
    assert value.dtype == torch.float32
    ours = gradients(value.mean(), (features, weight))
    plain = f(features, weight, targets)
    assert (value - plain).abs().max() < 0.1 and not torch.equal(value, plain)
    for a, b in zip(ours, gradients(plain.mean(), (features, weight)), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_blocked_head_keeps_each_operands_dtype(small_blocks):
    """bfloat16 features and a float32 weight (autocast): the weight's gradient is not rounded to bfloat16."""
    features, weight, targets, _ = head_case(4)
    half = features.detach().bfloat16().requires_grad_()
    for f in (lm_loss, token_log_probs):
        with torch.autocast("cpu", torch.bfloat16):
            grad_x, grad_w = gradients(f(half, weight, targets).sum(), (half, weight))
        assert grad_x.dtype == torch.bfloat16 and grad_w.dtype == torch.float32
        assert not torch.equal(grad_w, grad_w.bfloat16().float())


def test_model_loss_is_the_mean_over_the_masked_tokens(small_blocks):
    for V in (23, 5000):
        model = make(vocab_size=V)
        tokens, targets = words(model), words(model, seed=1)
        mask = torch.rand(tokens.shape, generator=rng(2)) < 0.5
        log_probs = model(tokens).logits.log_softmax(-1)
        expected = -sum(log_probs[b, t, targets[b, t]] for b, t in mask.nonzero().tolist()) / mask.sum()
        torch.testing.assert_close(model(tokens, targets, mask).lm_loss, expected)


# -------------------------------------------------------------------------------------------------- sizes and upcycling


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
    routers = sum(p.numel() for n, p in model.named_parameters() if "router" in n)
    assert routers == (0 if variant == dict(n_expert=1) else 36_864)


def test_initial_weights_and_their_seed():
    a, b, c = (GPT(MoEConfig(n_embd=64), rng(s)) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, c.wte.weight)
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
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        model(tokens, routes=random_routes(model, *tokens.shape)).logits, dense(tokens).logits, atol=1e-6, rtol=1e-6
    )
    model.blocks[0].mlp.experts.w_in.data.add_(1)  # a copy, not a view of its parent
    assert dense.blocks[0].mlp.w_in.abs().max() < 2
    assert torch.equal(upcycle(dense, config, rng()).blocks[0].mlp.router.weight, model.blocks[0].mlp.router.weight)


def test_upcycling_keeps_the_dtype_and_reads_sizes_alone():
    """What a dense configuration says of experts (it has none) is no obstacle."""
    dense = make(n_expert=1, top_k=1, n_shared_expert=1, expert_capacity=3, moe_every=1, gate="prob").double()
    model = upcycle(dense, MoEConfig(**SMALL))
    assert model.wte.weight.dtype == torch.float64
    tokens = words(dense)
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits)


def test_upcycling_refuses_another_size_and_a_moe():
    dense = make(n_expert=1, top_k=1)
    for change in (dict(n_layer=4), dict(vocab_size=24), dict(n_embd=32), dict(context=13), dict(n_head=4)):
        with pytest.raises(ValueError, match="only the experts may differ"):
            upcycle(dense, MoEConfig(**SMALL | change))
    with pytest.raises(ValueError, match="only the experts may differ"):
        upcycle(make(), MoEConfig(**SMALL))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(top_k=5), "top_k 5 is above n_expert 4"),
        (dict(n_head=3), "not divisible"),
        (dict(gate="softmax"), "gate must be"),
        (dict(n_expert=0), "n_expert"),
        (dict(n_layer=0), "n_layer"),
        (dict(n_embd=16.0), "n_embd"),
        (dict(n_shared_expert=-1), "n_shared_expert"),
        (dict(expert_capacity=-1), "expert_capacity"),
        (dict(moe_every=4), "moe_every 4"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**SMALL | change)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_round_trip(tmp_path, dtype):
    model = make(7, dtype, n_shared_expert=1, gate="prob", expert_capacity=5)
    path = str(tmp_path / "model.safetensors")
    save_model(model, path, step=7, tokenizer="bytes", nested={"a": [1, 2.5, None]})
    before = torch.get_rng_state()
    loaded, metadata = load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == model.config
    assert metadata == {"step": 7, "tokenizer": "bytes", "nested": {"a": [1, 2.5, None]}}
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    assert all(p.requires_grad for p in loaded.parameters())
    tokens = words(model)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    os.remove(path)  # the loaded weights do not hang on the file
    loaded.wte.weight.data.add_(1)


def test_broken_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "good.safetensors"
    save_model(make(), str(path))
    whole = path.read_bytes()
    names = ("truncated", "empty", "garbage", "foreign", "other", "missing")
    bad = {name: tmp_path / f"{name}.safetensors" for name in names}
    bad["truncated"].write_bytes(whole[:-100])
    bad["empty"].write_bytes(b"")
    bad["garbage"].write_bytes(b"\x80" * 4000)
    save_file({"w": torch.zeros(3)}, bad["foreign"])
    weights = load_file(path)
    config = json.dumps(SMALL)
    save_file({k: v for k, v in weights.items() if "router" not in k}, bad["other"], metadata={"config": config})
    configs = {"unknown": SMALL | {"colour": 3}, "impossible": SMALL | {"top_k": 9}, "bigger": SMALL | {"n_embd": 32}}
    for name, config in (configs | {"list": [1]}).items():
        bad[name] = tmp_path / f"{name}.safetensors"
        save_file(weights, bad[name], metadata={"config": json.dumps(config)})
    bad["folder"] = tmp_path
    for file in bad.values():
        with pytest.raises(ValueError) as error:
            load_model(str(file))
        assert str(file) in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ GPT-2's weights


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 by transformers, in which every weight counts -> (model, folder)."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, n_positions=20, n_embd=32, n_layer=3, n_head=4)
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    g = rng(11)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder, safe_serialization=True)
    return model, folder


def test_gpt2_of_transformers_gives_the_same_logits(gpt2, tmp_path):
    theirs, folder = gpt2
    tokens = torch.randint(0, 61, (3, 20), generator=rng(12))
    expected = theirs(tokens).logits.detach()
    ours = load_gpt2(str(folder))
    torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-4, rtol=0)
    assert ours.count_parameters()[0] == theirs.num_parameters()
    # The hub's file has no "transformer." before the names, and the causal masks as buffers.
    weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    assert weights.keys() != load_file(folder / "model.safetensors").keys()
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20).tril() for i in range(3)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.testing.assert_close(load_gpt2(str(tmp_path))(tokens).logits, expected, atol=1e-4, rtol=0)
    moe_model = upcycle(ours, MoEConfig(**vars(ours.config) | dict(n_expert=4, top_k=2, n_shared_expert=1)), rng())
    torch.testing.assert_close(moe_model(tokens).logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(moe_model(tokens).logits, ours(tokens).logits, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="bert"), "bert"),
        (dict(activation_function="relu"), "relu"),
        (dict(n_embd=64), "only GPT-2"),
        (dict(n_layer=4), "lacks h.3"),
        (dict(n_layer=None), "n_layer"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn"),
    ],
)
def test_other_models_are_refused(gpt2, tmp_path, change, message):
    _, folder = gpt2
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        load_gpt2(str(tmp_path))


def test_a_folder_without_gpt2_is_refused(gpt2, tmp_path):
    _, folder = gpt2
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for content in (None, b"", b"nonsense"):
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_gpt2(str(tmp_path))


def load_through_hub(endpoint, cache):
    code = (
        "import torch, moe\n"
        "try: print(float(moe.load_gpt2('some/gpt2')(torch.arange(20)[None]).logits.double().sum()))\n"
        "except ValueError as error: print('ValueError:', error)"
    )
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    env |= dict(HF_ENDPOINT=endpoint, HF_HOME=str(cache), OMP_NUM_THREADS="1", NO_PROXY="*")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_gpt2_comes_from_the_hub(gpt2, tmp_path):
    """A hub on loopback, as far as one download needs it."""
    theirs, folder = gpt2
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.partition("/some/gpt2/resolve/main/")[2]
            body = (folder / name).read_bytes() if name in ("config.json", "model.safetensors") else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        got = load_through_hub(f"http://127.0.0.1:{server.server_port}", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert any(path.endswith("model.safetensors") for path in asked)
    assert abs(float(got) - theirs(torch.arange(20)[None]).logits.double().sum().item()) < 1e-2


def test_an_unreachable_hub_is_one_sentence(tmp_path):
    message = load_through_hub("http://127.0.0.1:9", tmp_path)
    assert message.startswith("ValueError: GPT-2's weights could not be had from 'some/gpt2'")
    assert "HF_ENDPOINT" in message


# -------------------------------------------------------------------------------------------------- compile and devices


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("V", [23, 5000])
def test_compiled_training_step_equals_the_eager_one(V, fresh_compiler):
    """Float32 on the CPU: the grouped product stays outside the graph. Loss and gradients."""
    model = make(8, vocab_size=V, n_shared_expert=1, n_layer=2)
    tokens = words(model)
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for f in (model, compiled):
        out = f(tokens, tokens, noise=model.jitter(tokens.shape, 0.01, rng()))
        loss = out.lm_loss + out.balance_loss.sum() + out.z_loss.sum()
        results.append((loss.detach(), *gradients(loss, list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("V", [23, 5000])
def test_bfloat16_step_compiles_without_a_graph_break(V, fresh_compiler):
    """No host read (`.tolist()`, `nonzero`) in the bfloat16 path, the one that a GPU takes: fullgraph would raise."""
    model = make(9, vocab_size=V, n_shared_expert=1, expert_capacity=4, n_layer=2)
    tokens = words(model)
    routes = random_routes(model, *tokens.shape)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for f in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            out = f(tokens, tokens, routes=routes)
        loss = out.lm_loss + out.balance_loss.sum() + out.z_loss.sum()
        results.append((loss.detach(), *gradients(loss, list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-4


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device() == torch.device(
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    with pytest.raises(ValueError, match="tpu"):
        pick_device("tpu")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(ValueError, match=name):
                pick_device(name)
