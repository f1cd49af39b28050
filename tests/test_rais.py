"""rais.py: the router-shift ratio and the losses rescaled by it."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from baselines import gmpo_loss, grpo_loss, gspo_loss
from rais import CLIP_RANGES, rais_loss, router_shift

BASES = {"gmpo": gmpo_loss, "gspo": gspo_loss, "grpo": grpo_loss}
bases = pytest.mark.parametrize("base", BASES)
seeds = st.integers(0, 10_000)


def make(seed, B=3, T=5, L=2, K=2, spread=0.3, drift=0.15, dtype=torch.float64):
    """log_probs, old [B,T], advantages [B], mask [B,T], router log-probs, old [B,T,L,K]."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    new = old + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
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


def test_mean_and_sum_over_twelve_layers():
    """Twelve layers that drift by 0.05 each: exp(-0.05) = 0.951 and exp(-0.6) = 0.549, below the floor."""
    old = torch.full((1, 1, 12, 2), -1.0, dtype=torch.float64)
    assert router_shift(old + 0.05, old, floor=0).item() == pytest.approx(0.951, abs=5e-4)
    assert router_shift(old + 0.05, old, floor=0, layers="sum").item() == pytest.approx(0.549, abs=5e-4)
    assert router_shift(old + 0.05, old, layers="sum").item() == 0.8


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(1.01, 3))
def test_gamma_falls_as_the_shift_grows(seed, factor):
    *_, new, old = make(seed)
    near, far = router_shift(new, old, floor=0), router_shift(old + factor * (new - old), old, floor=0)
    assert (far < near).all() and (near < 1).all()
    floored = router_shift(old + factor * (new - old), old, floor=0.9)
    assert (floored >= 0.9).all() and (floored <= 1).all()


def test_gamma_looks_at_the_size_of_a_shift_not_its_sign():
    """One expert up, the other down by as much: the mean of |.| is the shift, it does not cancel."""
    old = torch.full((1, 1, 1, 2), -1.0, dtype=torch.float64)
    gamma = router_shift(old + torch.tensor([0.1, -0.1]), old)
    assert gamma.item() == pytest.approx(math.exp(-0.1), rel=1e-6)


def test_gamma_is_one_where_the_router_stood_still():
    *_, old = make(1)
    assert (router_shift(old, old) == 1).all()


def test_gamma_carries_no_gradient():
    *_, new, old = make(2)
    assert not router_shift(new.requires_grad_(), old).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_router_shift_dtypes(dtype):
    *_, new, old = make(3, dtype=dtype)
    gamma = router_shift(new, old)
    assert gamma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference.router_shift(new.double().numpy(), old.double().numpy())
    np.testing.assert_allclose(gamma, expected, atol=1e-6)


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_float64_on_either_side_is_kept(types):
    *_, new, old = (x.to(t) for x, t in zip(make(3), [torch.float64] * 4 + list(types), strict=True))
    gamma = router_shift(new, old)
    assert gamma.dtype == torch.float64
    np.testing.assert_allclose(gamma, reference.router_shift(new.double().numpy(), old.double().numpy()), atol=1e-12)


def test_the_two_ends_of_the_floor():
    """0 lets gamma go to 0; 1 is no rescaling at all."""
    *_, new, old = make(3)
    assert (router_shift(new - 99, old, floor=0) < 1e-30).all() and (router_shift(new, old, floor=1) == 1).all()


def test_router_shift_refuses_bad_arguments():
    *_, new, old = make(4)
    with pytest.raises(ValueError, match=r"^router_log_probs .*\[B, T, L, K\].*\[3, 5, 2\]"):
        router_shift(new[..., 0], old)
    with pytest.raises(ValueError, match=r"^old_router_log_probs .*\[3, 5, 2, 2\].*\[3, 5, 1, 2\]"):
        router_shift(new, old[:, :, :1])
    for floor in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="floor"):
            router_shift(new, old, floor=floor)
    with pytest.raises(ValueError, match="layers.*'max'"):
        router_shift(new, old, layers="max")


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
    new, old, A, mask, router, old_router = make(seed, B, T, spread=spread)
    loss, _ = rais_loss(new, old, A, mask, router, old_router, base=base, layers=layers)
    log_gamma = np.log(reference.router_shift(router.numpy(), old_router.numpy(), 0.8, layers))
    inputs = (x.numpy() for x in (new, old, A, mask))
    expected = reference.policy_loss(base, *inputs, *CLIP_RANGES[base], log_gamma)
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-12)


@bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e-4, 0.5])
def test_unmoved_router_is_exactly_the_base_loss(base, dtype, spread):
    """To the bit: value, gradient, and the metrics that both have, each at its own default clip range."""
    new, old, A, mask, router, _ = make(5, spread=spread, dtype=dtype)
    A[0], new[0, 0] = 0, old[0, 0] - 1  # no advantage: the lower side, seen in the clip share
    ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    loss, metrics = rais_loss(ours, old, A, mask, router, router, base=base)
    expected, expected_metrics = BASES[base](theirs, old, A, mask)
    (loss + expected).backward()
    assert loss.item() == expected.item() and torch.equal(ours.grad, theirs.grad)
    assert metrics["gamma_mean"] == metrics["gamma_min"] == 1 and metrics["floor_share"] == 0
    for name, value in expected_metrics.items():
        assert metrics[name].item() == value.item(), name


@bases
@pytest.mark.parametrize("new_type", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("old_type", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layers, floor", [("mean", 0.8), ("sum", 0.5), ("sum", 0.0)])
def test_it_is_the_base_with_old_log_probs_less_log_gamma(base, new_type, old_type, layers, floor):
    """The one line at the top of the file, to the last digit: value, gradient and the metrics that both have."""
    new, old, A, mask, router, old_router = make(14, B=6, T=9)
    new, old = new.to(new_type), old.to(old_type)
    for router_type in (torch.float64, torch.float32):
        router, old_router = router.to(router_type), old_router.to(router_type)
        gamma = router_shift(router, old_router, layers=layers, floor=floor)
        assert (gamma[mask] < 1).all()
        ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
        loss, metrics = rais_loss(ours, old, A, mask, router, old_router, base=base, layers=layers, floor=floor)
        expected, expected_metrics = BASES[base](theirs, old - gamma.log(), A, mask)
        loss.backward(), expected.backward()
        assert torch.equal(loss, expected) and torch.equal(ours.grad, theirs.grad)
        for name, value in expected_metrics.items():
            assert torch.equal(metrics[name], value), name


@pytest.mark.parametrize("A, w, clipped", [(1, 1.59, 0), (1, 1.61, 1), (-1, 1.01, 0), (-1, 0.99, 1)])
def test_gamma_moves_both_ends_of_the_range(A, w, clipped):
    """At gamma 0.8 GRPO's range on w, 0.8 to 1.28, is 1.0 to 1.6: wider for A > 0, narrower for A < 0."""
    new = torch.full((1, 1), math.log(w), dtype=torch.float64, requires_grad=True)
    router = torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    inputs = torch.zeros(1, 1).double(), torch.tensor([A]).double(), torch.ones(1, 1, dtype=torch.bool)
    loss, metrics = rais_loss(new, *inputs, router + math.log(0.8), router, base="grpo")
    loss.backward()
    assert metrics["clip_share"] == clipped and (new.grad == 0).item() == bool(clipped)


@bases
def test_gmpo_is_the_default_and_clip_ranges_pass_through(base):
    inputs = make(6)
    if base == "gmpo":
        assert rais_loss(*inputs)[0].item() == rais_loss(*inputs, base="gmpo")[0].item()
    still = (*inputs[:5], inputs[4])
    for ranges in (dict(clip_low=0.05), dict(clip_high=0.05), dict(clip_low=0.01, clip_high=0.6)):
        assert rais_loss(*still, base=base, **ranges)[0].item() == BASES[base](*inputs[:4], **ranges)[0].item()


def one_token(log_gamma, A, **options):
    """A row of one token whose policy has not moved and whose router has; -> (loss, gradient, metrics)."""
    new = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
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
    new, zero = torch.full((1, 1), math.log(2.0)).double(), torch.zeros(1, 1).double()
    old_router = torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    yes, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1).double()
    assert rais_loss(new, zero, one, yes, old_router + drift, old_router, base="grpo")[0].item() == pytest.approx(-1.28)


@bases
def test_gamma_is_stop_gradient(base):
    """Nothing flows to the router, and the policy's gradient is that of gamma as a constant."""
    new, old, A, mask, router, old_router = make(7, spread=0.1, drift=0.05)
    wide = dict(base=base, clip_low=0.6, clip_high=0.6)
    new.requires_grad_(), router.requires_grad_()
    rais_loss(new, old, A, mask, router, old_router, **wide)[0].backward()
    assert router.grad is None
    constant = new.detach().clone().requires_grad_()
    shifted = old - router_shift(router, old_router).log()  # log pi - (log pi_old - log gamma)
    BASES[base](constant, shifted, A, mask, clip_low=0.6, clip_high=0.6)[0].backward()
    torch.testing.assert_close(new.grad, constant.grad)
    assert gradcheck(lambda x: rais_loss(x, old, A, mask, router, old_router, **wide)[0], new)


@bases
def test_nothing_but_log_probs_carries_gradient(base):
    inputs = make(7, spread=0.1, drift=0.05)
    for x in inputs[:3] + inputs[4:]:
        x.requires_grad_()
    rais_loss(*inputs, base=base, clip_low=0.5, clip_high=0.5)[0].backward()
    assert inputs[0].grad.abs().sum() > 0 and all(x.grad is None for x in inputs[1:])


@bases
def test_a_range_of_zero_is_a_range(base):
    """0 is not "not given": every ratio outside is clipped, on its side."""
    inputs = make(6, B=8, spread=1.0)
    still = (*inputs[:5], inputs[4])
    for ranges in (dict(clip_low=0), dict(clip_high=0), dict(clip_low=0, clip_high=0)):
        loss, metrics = rais_loss(*still, base=base, **ranges)
        expected, expected_metrics = BASES[base](*inputs[:4], **ranges)
        assert torch.equal(loss, expected) and torch.equal(metrics["clip_share"], expected_metrics["clip_share"])
        assert loss != BASES[base](*inputs[:4])[0]


def test_at_the_floor_is_not_below_it():
    """floor_share counts gammas that the floor has raised."""
    new, old, A, mask, router, old_router = make(9)
    for r, share in ((old_router, 0), (router, 1)):
        metrics = rais_loss(new, old, A, mask, r, old_router, floor=1)[1]
        assert metrics["floor_share"] == share and metrics["gamma_min"] == metrics["gamma_mean"] == 1


@bases
def test_a_moved_router_shrinks_the_update(base):
    new, old, A, mask, router, old_router = make(8, spread=0.0, drift=0.2)
    grads = []
    for r in (old_router, router):
        x = new.clone().requires_grad_()
        rais_loss(x, old, A.abs(), mask, r, old_router, base=base)[0].backward()
        grads.append(x.grad)
    assert (grads[1].abs()[mask] < grads[0].abs()[mask]).all()


def test_metrics_by_hand():
    new, old, A, mask, router, old_router = make(9, drift=0.25)
    _, metrics = rais_loss(new, old, A, mask, router, old_router, floor=0.8)
    unfloored = router_shift(router, old_router, floor=0)[mask]
    gamma = unfloored.clamp(min=0.8)
    log_w = (new - old)[mask] + gamma.log()
    assert 0 < (unfloored < 0.8).sum() < len(unfloored)
    for name, expected in (
        ("gamma_mean", gamma.mean()),
        ("gamma_min", gamma.min()),
        ("floor_share", (unfloored < 0.8).double().mean()),
        ("ratio_mean", log_w.exp().mean()),
        ("ratio_std", log_w.exp().std(correction=0)),
        ("ratio_neg_log", -log_w.mean()),
    ):
        assert metrics[name].item() == pytest.approx(expected.item()), name
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())


@bases
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_padding_changes_nothing(base, junk):
    """Neither what stands in padding nor how much of it there is: value, gradient and metrics stay."""
    new, old, A, mask, router, old_router = make(10)
    mask[2] = False  # a row without any response token; its advantage is padding too
    clean = new.clone().requires_grad_()
    expected, expected_metrics = rais_loss(clean, old, A, mask, router, old_router, base=base)
    expected.backward()

    def pad(x, value):
        filled = torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, value)
        return torch.cat([filled, torch.full_like(x[:, :2], value)], 1)

    dirty, dirty_A = pad(new, junk).requires_grad_(), A.clone()
    dirty_A[2] = junk
    loss, metrics = rais_loss(
        dirty,
        pad(old, -junk),
        dirty_A,
        torch.cat([mask, torch.zeros_like(mask[:, :2])], 1),
        pad(router, junk),
        pad(old_router, junk),
        base=base,
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(dirty.grad[:, :5], clean.grad)
    assert (dirty.grad[:, :5][~mask] == 0).all() and (dirty.grad[:, 5:] == 0).all()
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(expected_metrics[name].item(), rel=1e-9, abs=1e-12), name


@bases
def test_all_false_mask(base):
    nan = torch.full((3, 5, 2, 2), float("nan"))
    new = nan[..., 0, 0].clone().requires_grad_()
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    loss, metrics = rais_loss(new, nan[..., 0, 0], torch.ones(3), nothing, nan, nan, base=base)
    loss.backward()
    assert loss.item() == 0 and (new.grad == 0).all()
    assert all(torch.isfinite(v) for v in metrics.values()) and metrics["gamma_min"] == 1


@bases
def test_no_floor_and_a_router_that_left(base):
    """floor = 0 and a probability that fell to 0: gamma is 0, the token has no weight, nothing is NaN."""
    new, old, A, mask, router, old_router = make(11)
    new.requires_grad_()
    loss, metrics = rais_loss(new, old, A.abs(), mask, router - math.inf, old_router, base=base, floor=0)
    loss.backward()
    assert metrics["gamma_mean"] == 0 and loss.item() == 0 and (new.grad == 0).all()


@bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(base, dtype):
    new, old, A, mask, router, old_router = make(12, dtype=dtype)
    new.requires_grad_()
    loss, _ = rais_loss(new, old, A, mask, router, old_router, base=base, clip_low=0.5, clip_high=0.5)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert new.grad.dtype == dtype and new.grad.abs().sum() > 0
    n, o, a, r, q = (x.detach().double().numpy() for x in (new, old, A, router, old_router))
    expected = reference.policy_loss(base, n, o, a, mask.numpy(), 0.5, 0.5, np.log(reference.router_shift(r, q)))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_loss_refuses_bad_arguments():
    good = dict(
        zip(
            ("log_probs", "old_log_probs", "advantages", "response_mask", "router_log_probs", "old_router_log_probs"),
            make(13),
            strict=True,
        )
    )
    for name, bad, message in (
        ("log_probs", good["log_probs"][0], r"^log_probs .*\[B, T\].*\[5\]"),
        ("log_probs", torch.zeros(0, 5), r"^log_probs .*\[0, 5\]"),
        ("old_log_probs", torch.zeros(3, 4), r"^old_log_probs .*\[3, 5\].*\[3, 4\]"),
        ("advantages", torch.zeros(3, 5), r"^advantages .*\[3\].*\[3, 5\]"),
        ("response_mask", torch.ones(3, 4, dtype=torch.bool), r"^response_mask .*\[3, 5\].*\[3, 4\]"),
        ("response_mask", torch.ones(3, 5), "^response_mask .*bool.*float32"),
        ("router_log_probs", torch.zeros(3, 4, 2, 2), r"^router_log_probs .*\[3, 5, 2, 2\].*\[3, 4, 2, 2\]"),
        ("router_log_probs", torch.zeros(3, 5, 2), r"^router_log_probs .*\[B, T, L, K\].*\[3, 5, 2\]"),
        ("router_log_probs", torch.zeros(5), r"^router_log_probs .*\[B, T, L, K\].*\[5\]"),
        ("router_log_probs", torch.zeros(3, 5, 2, 0), r"^router_log_probs .*K > 0.*\[3, 5, 2, 0\]"),
        ("old_router_log_probs", torch.zeros(3, 5, 2, 1), r"^old_router_log_probs .*\[3, 5, 2, 2\].*\[3, 5, 2, 1\]"),
        ("base", "ppo", "^base .*'ppo'"),
        ("clip_low", -0.1, "clip_low and clip_high.*-0.1"),
        ("clip_high", float("nan"), "clip_low and clip_high.*nan"),
        ("floor", 1.5, "^floor .*1.5"),
        ("layers", "max", "^layers .*'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            rais_loss(**{**good, name: bad})
