"""rais.py: the router-shift ratio, and base losses on ratios rescaled by it."""

import inspect
import math

import numpy as np
import pytest
import reference
import test_baselines
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from rais import BASES, rais_loss, router_shift

RANGES = {"gmpo": (0.4, 0.4), "gspo": (3e-4, 4e-4), "grpo": (0.2, 0.28)}
bases = pytest.mark.parametrize("base", RANGES)
seeds = st.integers(0, 10_000)


def make(seed, B=3, T=5, L=2, K=2, spread=0.3, drift=0.15):
    """log_probs, old [B, T], advantages [B], mask [B, T], router log-probs, old [B, T, L, K]."""
    g = torch.Generator().manual_seed(seed + 1)
    old_router = torch.log_softmax(torch.randn(B, T, L, 6, generator=g, dtype=torch.float64), -1)[..., :K]
    router = old_router + drift * torch.randn(B, T, L, K, generator=g, dtype=torch.float64)
    return *test_baselines.make(seed, B, T, spread), router, old_router


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3)),
    seeds,
    st.floats(0, 1),
    st.sampled_from(["mean", "sum"]),
    st.tuples(*[st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])] * 2),
)
def test_router_shift_equals_the_reference(shape, seed, floor, layers, dtypes):
    """In float32 at least, and in float64 where one of the two is; 1 without a layer."""
    new, old = (x.to(dtype).requires_grad_() for x, dtype in zip(make(seed, *shape)[4:], dtypes, strict=True))
    gamma = router_shift(new, old, floor=floor, layers=layers)
    assert gamma.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32) and not gamma.requires_grad
    book = reference.router_shift(*(x.detach().double().numpy() for x in (new, old)), floor, layers)
    np.testing.assert_allclose(gamma, book, atol=1e-12 if torch.float64 in dtypes else 1e-6)


@bases
@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 3), st.integers(1, 5), st.sampled_from([1e-4, 0.3, 1.0]), st.sampled_from(["mean", "sum"]))
def test_loss_equals_the_reference(base, seed, B, T, spread, layers):
    """Rows without a response count in the mean over rows; weights act as in the base."""
    inputs = make(seed, B, T, spread=spread)
    *arrays, router, old_router = (x.numpy() for x in inputs)
    log_gamma = np.log(reference.router_shift(router, old_router, 0.8, layers))
    for w in (None, 0.2 + inputs[0].exp()):
        loss, _ = rais_loss(*inputs, base=base, layers=layers, weights=w)
        book = reference.policy_loss(base, *arrays, *RANGES[base], log_gamma, None if w is None else w.numpy())
        assert loss.item() == pytest.approx(book, abs=1e-12)


@bases
@pytest.mark.parametrize("ranges", [{}, {"clip_low": 0}, {"clip_high": 0.01}, {"clip_low": 0.02, "clip_high": 0}])
def test_an_unmoved_router_gives_the_base_loss(base, ranges):
    """To the bit: value, gradient and metrics, at the base's own range, and where 0 is a range, not "not given"."""
    new, old, A, mask, _, router = make(5, B=8)
    results = []
    for loss, more in ((rais_loss, [router, router]), (BASES[base], [])):
        x = new.clone().requires_grad_()
        value, metrics = loss(x, old, A, mask, *more, **ranges, **({"base": base} if more else {}))
        results.append((value, torch.autograd.grad(value, x)[0], metrics))
    (ours, our_gradient, metrics), (theirs, their_gradient, base_metrics) = results
    assert torch.equal(ours, theirs) and torch.equal(our_gradient, their_gradient) and theirs != 0
    assert base != "gmpo" or torch.equal(ours, rais_loss(new, old, A, mask, router, router, **ranges)[0])  # the default
    assert metrics["gamma_mean"] == metrics["gamma_min"] == 1 and metrics["floor_share"] == 0
    assert all(torch.equal(metrics[name], x) for name, x in base_metrics.items())


@pytest.mark.parametrize(
    "base, gamma, w, A, objective",
    [
        ("gspo", 0.95, 1, -1, None),  # outside 3e-4 already: 1 - 3e-4, without gradient
        ("gspo", 0.95, 1, 1, 0.95),
        ("gmpo", 0.1, 1, 1, 0.8),  # the floor of 0.8 is inside a range of 0.4 in log space
        ("gmpo", 0.1, 1, -1, -0.8),
        ("grpo", 0.95, 2, 1, None),  # min(1.9, 1.28); multiplied after the clip (v1) min(2, 1.28) * 0.95
        ("grpo", 0.8, 1.59, 1, 0.8 * 1.59),  # at gamma 0.8 the range on w, 0.8 to 1.28, is 1.0 to 1.6:
        ("grpo", 0.8, 1.61, 1, None),
        ("grpo", 0.8, 1.01, -1, -0.8 * 1.01),  # wider for A > 0, narrower for A < 0
        ("grpo", 0.8, 0.99, -1, None),
    ],
)
def test_gamma_comes_before_the_clip(base, gamma, w, A, objective):
    """One row of one token. None: cut off, at the end of the base's own range."""
    new = torch.full((1, 1), math.log(w), dtype=torch.float64, requires_grad=True)
    router, zero = torch.full((1, 1, 1, 1), math.log(gamma)).double(), torch.zeros(1, 1).double()
    given_ = new, zero, torch.tensor([A]).double(), zero == 0, router, torch.zeros_like(router)
    loss, metrics = rais_loss(*given_, base=base)
    loss.backward()
    end = 1 + RANGES[base][1] if A > 0 else RANGES[base][0] - 1
    assert loss.item() == pytest.approx(-(end if objective is None else objective))
    assert new.grad.item() == pytest.approx(-(objective or 0)) and metrics["clip_share"] == (objective is None)


@bases
def test_only_log_probs_carries_gradient(base):
    """The policy's gradient is that of gamma as a constant."""
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in make(7, spread=0.1, drift=0.05)]
    options = dict(base=base, clip_low=0.6, clip_high=0.6)
    rais_loss(*inputs, **options)[0].backward()
    assert inputs[0].grad.abs().sum() > 0 and all(x.grad is None for x in inputs[1:])
    assert gradcheck(lambda x: rais_loss(x, *(y.detach() for y in inputs[1:]), **options)[0], inputs[0])


def test_metrics_by_hand():
    """gamma as it enters the loss, over response tokens; the share below the floor from the unfloored one."""
    new, old, A, mask, router, old_router = make(9, B=6, drift=0.25)
    mask[0] = False
    _, metrics = rais_loss(new, old, A, mask, router, old_router)
    unfloored = router_shift(router, old_router, floor=0)[mask]
    gamma = unfloored.clamp(min=0.8)
    log_w = (new - old)[mask] + gamma.log()
    expected = {"gamma_mean": gamma.mean(), "gamma_min": gamma.min(), "floor_share": (unfloored < 0.8).double().mean()}
    expected |= {"ratio_mean": log_w.exp().mean(), "ratio_neg_log": -log_w.mean()}
    assert 0 < expected["floor_share"] < 1
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item()), name
    assert rais_loss(new, old, A, mask, old_router, old_router, floor=1)[1]["floor_share"] == 0  # at it is not below


def test_what_is_refused():
    good = dict(zip(inspect.signature(rais_loss).parameters, make(13), strict=False))
    for name, bad, says in (
        ("log_probs", torch.zeros(5), "^log_probs"),
        ("log_probs", torch.zeros(3, 4), "^old_log_probs"),
        ("old_log_probs", torch.zeros(3, 4), "^old_log_probs and router_log_probs"),
        ("router_log_probs", torch.zeros(3, 5, 2, 0), "^router_log_probs .*K > 0"),
        ("old_router_log_probs", torch.zeros(3, 5, 2, 1), "^old_router_log_probs"),
        ("response_mask", torch.ones(3, 5), "^response_mask .*bool"),
        *(("base", "ppo", "^base"), ("layers", "max", "^layers"), ("clip_low", -0.1, "^clip_low")),
        *(("floor", floor, "^floor") for floor in (-0.1, 1.1, float("nan"))),
    ):
        with pytest.raises(ValueError, match=says):
            rais_loss(**good | {name: bad})
    with pytest.raises(ValueError, match="^floor"):
        router_shift(good["router_log_probs"], good["old_router_log_probs"], floor=float("nan"))
