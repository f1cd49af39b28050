"""rais.py: the router-shift ratio, and base losses on ratios rescaled by it."""

import inspect
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from rais import BASES, rais_loss, router_shift

RANGES = {"gmpo": (0.4, 0.4), "gspo": (3e-4, 4e-4), "grpo": (0.2, 0.28)}
bases = pytest.mark.parametrize("base", RANGES)
seeds = st.integers(0, 10_000)


def make(seed, B=3, T=5, L=2, K=2, spread=0.3, drift=0.15, dtype=torch.float64):
    """log_probs, old [B, T], advantages [B], mask [B, T], router log-probs, old [B, T, L, K]."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    new = old + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=g)
    old_router = torch.log_softmax(torch.randn(B, T, L, 6, generator=g, dtype=torch.float64), -1)[..., :K]
    router = old_router + drift * torch.randn(B, T, L, K, generator=g, dtype=torch.float64)
    return new.to(dtype), old.to(dtype), advantages.to(dtype), mask, router.to(dtype), old_router.to(dtype)


# ------------------------------------------------------------------------------------------------------- router_shift


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    seeds,
    st.floats(0, 1),
    st.sampled_from(["mean", "sum"]),
)
def test_router_shift_equals_the_reference(shape, seed, floor, layers):
    *_, new, old = make(seed, *shape)
    gamma = router_shift(new, old, floor=floor, layers=layers)
    assert gamma.shape == shape[:2] and gamma.dtype == torch.float64
    np.testing.assert_allclose(gamma, reference.router_shift(new.numpy(), old.numpy(), floor, layers), atol=1e-12)


def test_small_cases():
    """Twelve layers that drift by 0.05 each: exp(-0.05) and exp(-0.6). A shift of either sign counts by its size."""
    old = torch.full((1, 1, 12, 2), -1.0, dtype=torch.float64)
    moved = (old + torch.tensor([0.05, -0.05]).double()).requires_grad_()
    assert router_shift(moved, old, floor=0).item() == pytest.approx(math.exp(-0.05))
    assert router_shift(moved, old, floor=0, layers="sum").item() == pytest.approx(math.exp(-0.6))
    assert router_shift(moved, old, layers="sum") == 0.8 and not router_shift(moved, old).requires_grad
    assert router_shift(old, old) == 1 and router_shift(old[:, :, :0], old[:, :, :0]) == 1  # without a layer
    assert router_shift(old - 99, old, floor=0) < 1e-30 and router_shift(old - 99, old, floor=1) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_router_shift_dtypes(dtype):
    """Float32 at least, and float64 where one of the two is."""
    *_, new, old = make(3, dtype=dtype)
    gamma = router_shift(new, old)
    assert gamma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(gamma, reference.router_shift(new.double().numpy(), old.double().numpy()), atol=1e-6)
    for pair in ((new.double(), old), (new, old.double())):
        assert router_shift(*pair).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------- rais_loss


@bases
@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    spread=st.sampled_from([1e-4, 0.3, 1.0]),
    layers=st.sampled_from(["mean", "sum"]),
)
def test_loss_equals_the_reference(base, seed, B, T, spread, layers):
    """Rows without a response count in the mean over rows; weights act as in the base."""
    new, old, A, mask, router, old_router = inputs = make(seed, B, T, spread=spread)
    log_gamma = np.log(reference.router_shift(router.numpy(), old_router.numpy(), 0.8, layers))
    weights = 0.2 + new.exp()
    for w in (None, weights):
        loss, _ = rais_loss(*inputs, base=base, layers=layers, weights=w)
        arrays = [x.numpy() for x in (new, old, A, mask)]
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


def one_token(log_gamma, A, log_w=0.0, **options):
    """A row of one token whose router has moved by log_gamma; -> (loss, gradient, metrics)."""
    new = torch.full((1, 1), log_w, dtype=torch.float64, requires_grad=True)
    old_router = torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    old, A, yes = torch.zeros(1, 1).double(), torch.tensor([A]).double(), torch.ones(1, 1, dtype=torch.bool)
    loss, metrics = rais_loss(new, old, A, yes, old_router + log_gamma, old_router, **options)
    loss.backward()
    return loss.item(), new.grad.item(), metrics


def test_gamma_comes_before_the_clip():
    """A gamma of 0.95 alone is outside GSPO's 3e-4; at GMPO's 0.4 in log space even the floor of 0.8 is inside."""
    drift = -math.log(0.95)
    value, gradient, metrics = one_token(drift, -1.0, base="gspo")
    assert value == pytest.approx(1 - 3e-4) and gradient == 0 and metrics["clip_share"] == 1
    value, gradient, metrics = one_token(drift, 1.0, base="gspo")
    assert value == pytest.approx(-0.95) and gradient == pytest.approx(-0.95) and metrics["clip_share"] == 0
    for A in (1.0, -1.0):
        value, gradient, metrics = one_token(5.0, A, base="gmpo")
        assert value == pytest.approx(-0.8 * A) and gradient == pytest.approx(-0.8 * A)
        assert metrics["clip_share"] == 0 and metrics["floor_share"] == 1
    # Multiplied after the clip (v1), min(2, 1.28) * 0.95 = 1.216; before it, min(1.9, 1.28) = 1.28.
    assert one_token(drift, 1.0, math.log(2), base="grpo")[0] == pytest.approx(-1.28)


@pytest.mark.parametrize("A, w, clipped", [(1, 1.59, 0), (1, 1.61, 1), (-1, 1.01, 0), (-1, 0.99, 1)])
def test_gamma_moves_both_ends_of_the_range(A, w, clipped):
    """At gamma 0.8 GRPO's range on w, 0.8 to 1.28, is 1.0 to 1.6: wider for A > 0, narrower for A < 0."""
    _, gradient, metrics = one_token(math.log(0.8), A, math.log(w), base="grpo")
    assert metrics["clip_share"] == clipped and (gradient == 0) == bool(clipped)


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
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())
    unmoved = rais_loss(new, old, A, mask, old_router, old_router, floor=1)[1]
    assert unmoved["floor_share"] == 0  # at the floor is not below it


@bases
def test_no_floor_and_a_router_that_left(base):
    """A probability that fell to 0: gamma is 0, the token has no weight, nothing is NaN."""
    new, old, A, mask, router, old_router = make(11)
    new.requires_grad_()
    loss, metrics = rais_loss(new, old, A.abs(), mask, router - math.inf, old_router, base=base, floor=0)
    assert metrics["gamma_mean"] == 0 and loss == 0 and not torch.autograd.grad(loss, new)[0].any()


def test_bad_arguments_are_refused():
    names = [*inspect.signature(rais_loss).parameters]
    good = dict(zip(names, make(13), strict=False))
    for name, bad, message in (
        ("log_probs", good["log_probs"][0], r"^log_probs .*\[B, T\].*\[5\]"),
        ("log_probs", torch.zeros(3, 4), r"^old_log_probs .*\[3, 4\].*\[3, 5\]"),
        ("old_log_probs", torch.zeros(3, 4), r"^old_log_probs and router_log_probs .*\[3, 4\].*\[3, 5, 2, 2\]"),
        ("router_log_probs", torch.zeros(3, 5, 2, 0), r"^router_log_probs .*K > 0.*\[3, 5, 2, 0\]"),
        ("old_router_log_probs", torch.zeros(3, 5, 2, 1), r"^old_router_log_probs .*\[3, 5, 2, 2\].*\[3, 5, 2, 1\]"),
        ("response_mask", torch.ones(3, 5), "^response_mask .*bool.*float32"),
        ("base", "ppo", "^base .*'ppo'"),
        ("clip_low", -0.1, "clip_low and clip_high.*-0.1"),
        ("floor", float("nan"), "^floor .*nan"),
        ("layers", "max", "^layers .*'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            rais_loss(**good | {name: bad})
    for floor in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="floor"):
            router_shift(good["router_log_probs"], good["old_router_log_probs"], floor=floor)
