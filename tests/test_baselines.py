"""baselines.py: group advantages, GRPO, GSPO, GMPO and CISPO."""

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from baselines import cispo_loss, gmpo_loss, group_advantages, grpo_loss, gspo_loss
from erpo import erpo_loss
from rais import rais_loss

LOSSES = {
    "grpo": (grpo_loss, 0.2, 0.28),
    "gspo": (gspo_loss, 3e-4, 4e-4),
    "gmpo": (gmpo_loss, 0.4, 0.4),
    "cispo": (cispo_loss, 1.0, 4.0),
}
bases = pytest.mark.parametrize("base", LOSSES)
surrogates = pytest.mark.parametrize("base", ["grpo", "gspo", "gmpo"])  # the value is a ratio times A
seeds = st.integers(0, 10_000)


def make(seed, B=4, T=6, spread=0.5, dtype=torch.float64):
    """new, old [B,T], advantages [B], mask [B,T] with rows of different lengths."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    new = old + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B, 1), generator=g)
    return new.to(dtype), old.to(dtype), advantages.to(dtype), torch.arange(T) < lengths


# --------------------------------------------------------------------------------------------------- group_advantages


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(2, 6), st.data())
def test_advantages_equal_the_reference(groups, group_size, data):
    values = st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.5])
    rewards = data.draw(st.lists(values, min_size=groups * group_size, max_size=groups * group_size))
    A = group_advantages(torch.tensor(rewards, dtype=torch.float64), group_size)
    np.testing.assert_allclose(A.numpy(), reference.group_advantages(rewards, group_size), atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_advantages_are_centred_scaled_and_ordered(seed):
    R = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A = group_advantages(R, 4).view(3, 4)
    torch.testing.assert_close(A.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(A.std(1), torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
    assert torch.equal(A.argsort(1), R.view(3, 4).argsort(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.7, 1e-8, 123456.7])
@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(value, group_size, dtype):
    """The mean of three 0.1 is not exactly 0.1: its residue must not come out as an advantage.

    Without the guard it does: 0.007 for seven float32 rewards of 0.1, 0.8 for three of 123456.7.
    """
    R = torch.full((2 * group_size,), min(value, 6e4)).to(dtype)
    assert (group_advantages(R, group_size) == 0).all()


def test_rewards_equal_within_rounding_give_exactly_zero():
    """The same parts summed in other orders; a difference that somebody meant stays."""
    a, b, c = (torch.tensor(x) for x in (50.1, 30.2, 20.3))
    R = torch.stack([a + b + c, c + b + a, a + c + b, b + c + a])
    assert R.unique().numel() > 1 and (group_advantages(R, 4) == 0).all() and (group_advantages(-R, 4) == 0).all()
    assert (group_advantages(torch.tensor([100.0, 100.001, 1.0, 1.00001]), 2) != 0).all()


def test_groups_do_not_mix():
    """Rows of a group are next to each other; a constant added to one group changes nothing."""
    R = torch.tensor([0.0, 1.0, 0.0, 1.0])
    A = group_advantages(R, 2)
    torch.testing.assert_close(A, torch.tensor([-1.0, 1.0, -1.0, 1.0]) * 0.5**0.5, atol=1e-5, rtol=0)
    torch.testing.assert_close(group_advantages(R + torch.tensor([0.0, 0.0, 10.0, 10.0]), 2), A, atol=1e-5, rtol=0)


@pytest.mark.parametrize("others", [[5.0, 6.0, 7.0], [2e5, 3e5, 4e5]])
def test_equal_rewards_are_equal_whatever_another_group_has(others):
    assert (group_advantages(torch.tensor([123456.7] * 3 + others), 3)[:3] == 0).all()


def test_rewards_may_be_whole_numbers_or_bools_and_carry_no_gradient():
    expected = group_advantages(torch.tensor([0.0, 1.0]), 2)
    assert torch.equal(group_advantages(torch.tensor([0, 1]), 2), expected)
    assert torch.equal(group_advantages(torch.tensor([False, True]), 2), expected)
    assert not group_advantages(torch.tensor([0.0, 1.0], requires_grad=True), 2).requires_grad


def test_group_advantages_refuses_bad_arguments():
    with pytest.raises(ValueError, match="group_size.*at least 2.*got 1"):
        group_advantages(torch.ones(4), 1)
    with pytest.raises(ValueError, match="group_size.*4 rows.*groups of 3"):
        group_advantages(torch.ones(4), 3)
    with pytest.raises(ValueError, match=r"rewards.*\[B\].*\[2, 2\]"):
        group_advantages(torch.ones(2, 2), 2)
    for bad in (float("nan"), float("inf"), -float("inf"), 1e15, -1e15):
        with pytest.raises(ValueError, match="rewards must be finite and below 1e15"):
            group_advantages(torch.tensor([0.0, bad], dtype=torch.float64), 2)
    assert group_advantages(torch.tensor([0.0, 9.9e14]), 2).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


# ------------------------------------------------------------------------------------------------------------- losses


@bases
@settings(deadline=None, max_examples=40)
@given(seed=seeds, B=st.integers(1, 4), T=st.integers(1, 6), spread=st.sampled_from([1e-4, 0.3, 1.0]))
def test_losses_equal_the_reference(base, seed, B, T, spread):
    loss, low, high = LOSSES[base]
    inputs = make(seed, B, T, spread)
    expected = reference.policy_loss(base, *(x.numpy() for x in inputs), low, high)
    assert loss(*inputs)[0].item() == pytest.approx(expected, abs=1e-12)
    wider = reference.policy_loss(base, *(x.numpy() for x in inputs), 0.7, 0.5)
    assert loss(*inputs, clip_low=0.7, clip_high=0.5)[0].item() == pytest.approx(wider, abs=1e-12)


@surrogates
def test_gradcheck_and_no_gradient_elsewhere(base):
    loss, *_ = LOSSES[base]
    new, old, advantages, mask = make(1, spread=0.3)
    wide = dict(clip_low=0.25, clip_high=0.25)
    assert gradcheck(lambda x: loss(x, old, advantages, mask, **wide)[0], new.clone().requires_grad_())
    inputs = [x.clone().requires_grad_() for x in (new, old, advantages)]
    loss(*inputs, mask, **wide)[0].backward()
    assert inputs[0].grad.abs().sum() > 0 and inputs[1].grad is None and inputs[2].grad is None


@surrogates
def test_first_ratio_is_exactly_one(base):
    """On-policy the ratio is 1 to the bit, nothing is clipped, and the gradient is that of REINFORCE."""
    loss, *_ = LOSSES[base]
    new, _, A, mask = make(2, dtype=torch.float32)
    new.requires_grad_()
    value, metrics = loss(new, new.detach(), A, mask)
    value.backward()
    assert metrics["ratio_mean"] == 1 and metrics["ratio_std"] == 0 and metrics["clip_share"] == 0
    assert metrics["ratio_neg_log"] == 0
    assert value.item() == pytest.approx(-A.mean().item(), abs=1e-6)
    torch.testing.assert_close(new.grad, -(A[:, None] * mask / mask.sum(1, keepdim=True)) / 4)


@bases
def test_every_row_weighs_the_same_however_long(base):
    """Two rows of opposite advantage and lengths 1 and 6 cancel. A sum over tokens would let the long row win."""
    loss, *_ = LOSSES[base]
    new = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[1], [6]])
    value, _ = loss(new, torch.zeros(2, 6, dtype=torch.float64), torch.tensor([1.0, -1.0]).double(), mask)
    value.backward()
    assert value.item() == 0
    torch.testing.assert_close(new.grad.sum(1), torch.tensor([-0.5, 0.5], dtype=torch.float64))


def test_grpo_clips_tokens_and_gspo_rows():
    """One token of ratio 1.5, one of 1/1.5: GRPO clips the first alone, GSPO sees a row of ratio 1."""
    new = torch.tensor([[1.5, 1 / 1.5]], dtype=torch.float64).log()
    args = new, torch.zeros(1, 2).double(), torch.ones(1).double(), torch.ones(1, 2, dtype=torch.bool)
    value, metrics = grpo_loss(*args)
    assert value.item() == pytest.approx(-(1.28 + 1 / 1.5) / 2) and metrics["clip_share"] == 0.5
    value, metrics = gspo_loss(*args)
    assert value.item() == pytest.approx(-1) and metrics["clip_share"] == 0
    value, metrics = gmpo_loss(*args)  # log 1.5 = 0.405 is cut to 0.4; the other token's side is open
    assert value.item() == pytest.approx(-np.exp((0.4 - np.log(1.5)) / 2)) and metrics["clip_share"] == 0.5


def test_gmpo_clips_the_side_that_the_advantage_opens():
    mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1).double()
    old = torch.zeros(1, 1).double()
    for log_ratio, A, expected in ((1.0, 1, 0.4), (-1.0, 1, -1.0), (1.0, -1, 1.0), (-1.0, -1, -0.4)):
        value, metrics = gmpo_loss(old + log_ratio, old, one * A, mask)
        assert value.item() == pytest.approx(-A * np.exp(expected))
        assert metrics["clip_share"].item() == (expected != log_ratio)
    assert gmpo_loss(old - 1, old, one * 0, mask)[1]["clip_share"] == 1  # A = 0 belongs to the lower side


@surrogates
@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_clipping_bounds(base, seed):
    """With A = +1 no row earns more than the upper bound, with A = -1 none costs less than the lower."""
    loss, *_ = LOSSES[base]
    new, old, A, mask = make(seed, 1, 5, spread=2.0)
    upper, lower = (np.exp(0.5), np.exp(-0.3)) if base == "gmpo" else (1.5, 0.7)
    wide = dict(clip_low=0.3, clip_high=0.5)
    assert -loss(new, old, torch.ones_like(A), mask, **wide)[0] <= upper + 1e-12
    assert loss(new, old, -torch.ones_like(A), mask, **wide)[0] >= lower - 1e-12


@surrogates
def test_clip_share_tells_that_the_clip_acts(base):
    """A ratio that is always 1 hides a dead clip; here all of it acts, or none."""
    loss, *_ = LOSSES[base]
    _, old, _, mask = make(3)
    up = torch.ones(4).double()
    assert loss(old + 1, old, up, mask)[1]["clip_share"] == 1
    assert loss(old - 1, old, up, mask)[1]["clip_share"] == 0
    assert loss(old - 1, old, -up, mask)[1]["clip_share"] == 1


@settings(deadline=None, max_examples=40)
@given(seed=seeds, low=st.sampled_from([0.0, 0.3, 1.0]), high=st.sampled_from([0.0, 0.5, 4.0]))
def test_cispo_weighs_every_tokens_gradient(seed, low, high):
    """The gradient of a token is its clipped ratio times A, never 0 for being outside the range; no other gradient."""
    new, old, A, mask = make(seed, spread=2.0)
    inputs = [x.requires_grad_() for x in (new, old, A)]
    loss, metrics = cispo_loss(*inputs, mask, clip_low=low, clip_high=high)
    loss.backward()
    ratio = (new - old).exp().detach()
    weight = ratio.clamp(1 - low, 1 + high)
    torch.testing.assert_close(new.grad, -weight * A.detach()[:, None] * mask / mask.sum(1, keepdim=True) / 4)
    assert metrics["clip_share"].item() == pytest.approx((weight != ratio)[mask].double().mean().item())
    assert old.grad is None and A.grad is None


def test_cispo_gradcheck_where_the_weight_is_constant():
    """With a range of 0 the weight is 1, and the value's derivative is the gradient; so it is at the upper bound."""
    new, old, A, mask = make(1)
    for x, options in ((new, dict(clip_low=0.0, clip_high=0.0)), (old + 2, {})):
        assert gradcheck(lambda x, o=options: cispo_loss(x, old, A, mask, **o)[0], x.requires_grad_())


def test_cispo_on_policy_is_reinforce():
    new, _, A, mask = make(2, dtype=torch.float32)
    new.requires_grad_()
    loss, metrics = cispo_loss(new, new.detach(), A, mask)
    loss.backward()
    assert metrics["ratio_mean"] == 1 and metrics["ratio_std"] == 0 and metrics["clip_share"] == 0
    torch.testing.assert_close(new.grad, -(A[:, None] * mask / mask.sum(1, keepdim=True)) / 4)


@bases
def test_metrics_by_hand(base):
    loss, *_ = LOSSES[base]
    new, old, A, mask = make(4)
    _, metrics = loss(new, old, A, mask)
    log_ratio = (new - old)[mask]
    if base == "gspo":
        log_ratio = torch.stack([(new - old)[b][mask[b]].mean() for b in range(4)])
    ratio = log_ratio.exp()
    assert metrics["ratio_mean"].item() == pytest.approx(ratio.mean().item())
    assert metrics["ratio_std"].item() == pytest.approx(ratio.std(correction=0).item())
    assert metrics["ratio_neg_log"].item() == pytest.approx(-log_ratio.mean().item())
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())


@bases
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_padding_changes_nothing(base, junk):
    """Neither what stands in padding nor how much of it there is: value, gradient and metrics stay."""
    loss, *_ = LOSSES[base]
    new, old, A, mask = make(5)
    mask[3] = False  # a row without any response token; its advantage is padding too
    clean = new.clone().requires_grad_()
    expected, expected_metrics = loss(clean, old, A, mask)
    expected.backward()

    def pad(x):
        return torch.cat([x.masked_fill(~mask, junk), torch.full((4, 3), junk, dtype=x.dtype)], 1)

    dirty, dirty_A = pad(new).requires_grad_(), A.clone()
    dirty_A[3] = junk
    value, metrics = loss(dirty, pad(old), dirty_A, torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1))
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(dirty.grad[:, :6], clean.grad)
    assert (dirty.grad[:, :6][~mask] == 0).all() and (dirty.grad[:, 6:] == 0).all()
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(expected_metrics[name].item(), rel=1e-9, abs=1e-12), name


@surrogates
@pytest.mark.parametrize("low, high", [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0)])
def test_a_range_of_zero(base, low, high):
    """Every ratio on its side of 1 is clipped, at padding none counts."""
    loss, *_ = LOSSES[base]
    new, old, A, mask = make(9, B=8, T=12, spread=0.2)
    value, metrics = loss(new, old, A, mask, clip_low=low, clip_high=high)
    expected = reference.policy_loss(base, *(x.numpy() for x in (new, old, A, mask)), low, high)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    log_ratio = (new - old) * mask
    A = A[:, None].expand_as(new)
    if base == "gspo":
        log_ratio, A, mask = log_ratio.sum(1) / mask.sum(1), A[:, 0], mask.any(1)
    upper, lower = (high, -low) if base == "gmpo" else (np.log1p(high), np.log1p(-low))
    acts = torch.where(A > 0, log_ratio > upper, log_ratio < lower) & mask
    assert acts.any() and metrics["clip_share"].item() == pytest.approx((acts.sum() / mask.sum()).item())


@bases
def test_the_end_token_counts(base):
    """The mask alone decides: the last response token, end token or not, moves the loss."""
    loss, *_ = LOSSES[base]
    new, old, A, mask = make(6, 1, 4, spread=0.0)
    new[0, mask[0].sum() - 1] += 1e-4
    assert loss(new, old, A, mask)[0].item() != loss(old, old, A, mask)[0].item()


@bases
def test_all_false_mask(base):
    loss, *_ = LOSSES[base]
    new = torch.full((4, 6), float("nan"), requires_grad=True)
    value, metrics = loss(new, torch.zeros(4, 6), torch.ones(4), torch.zeros(4, 6, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and (new.grad == 0).all()
    assert all(torch.isfinite(v) for v in metrics.values())


@bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(base, dtype):
    """Low precision is computed in float32: the loss is that of the rounded inputs, not of rounded steps."""
    loss, low, high = LOSSES[base]
    new, old, A, mask = make(7, dtype=dtype)
    new.requires_grad_()
    value, _ = loss(new, old, A, mask, clip_low=0.5, clip_high=0.5)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert new.grad.dtype == dtype and new.grad.abs().sum() > 0
    inputs = (x.detach().double().numpy() for x in (new, old, A))
    assert value.item() == pytest.approx(reference.policy_loss(base, *inputs, mask.numpy(), 0.5, 0.5), abs=1e-6)


@bases
def test_losses_refuse_bad_arguments(base):
    loss, *_ = LOSSES[base]
    new, old, A, mask = make(8)
    with pytest.raises(ValueError, match=r"^log_probs .*\[B, T\].*\[4\]"):
        loss(new[:, 0], old, A, mask)
    with pytest.raises(ValueError, match=r"^log_probs .*\[4, 0\]"):
        loss(new[:, :0], old[:, :0], A, mask[:, :0])
    with pytest.raises(ValueError, match=r"^old_log_probs .*\[4, 6\].*\[4, 5\]"):
        loss(new, old[:, 1:], A, mask)
    with pytest.raises(ValueError, match=r"^advantages .*\[4\].*\[4, 6\]"):
        loss(new, old, new, mask)
    with pytest.raises(ValueError, match=r"^response_mask .*\[4, 6\].*\[4, 7\]"):
        loss(new, old, A, torch.ones(4, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="^response_mask .*bool.*int64"):
        loss(new, old, A, mask.long())
    with pytest.raises(ValueError, match="clip_low and clip_high.*-0.1"):
        loss(new, old, A, mask, clip_low=-0.1)
    with pytest.raises(ValueError, match="clip_low and clip_high.*nan"):
        loss(new, old, A, mask, clip_high=float("nan"))


POLICY = ["log_probs", "old_log_probs", "advantages", "response_mask"]
ROUTES = ["experts", "old_experts", "expert_probs", "old_expert_probs"]
ARGUMENTS = {  # what a caller may rely on: train.py hands over what a loss names
    grpo_loss: (POLICY, ["clip_low", "clip_high"]),
    gspo_loss: (POLICY, ["clip_low", "clip_high"]),
    gmpo_loss: (POLICY, ["clip_low", "clip_high"]),
    cispo_loss: (POLICY, ["clip_low", "clip_high"]),
    rais_loss: (
        [*POLICY, "router_log_probs", "old_router_log_probs"],
        ["base", "clip_low", "clip_high", "floor", "layers"],
    ),
    erpo_loss: (
        ["log_probs", "old_log_probs", "rewards", "response_mask", *ROUTES],
        ["num_experts", "group_size", "alpha", "clip_low", "clip_high", "entropy_reward"],
    ),
}


@pytest.mark.parametrize("loss", ARGUMENTS)
def test_signatures_name_their_options_and_docstrings_explain_them(loss):
    """Options are keyword-only and typed, each with a line `name   help` that names every value of a closed set."""
    parameters = inspect.signature(loss).parameters.values()
    positional, options = ARGUMENTS[loss]
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == positional
    assert [p.name for p in parameters if p.kind == p.KEYWORD_ONLY] == options
    for p in (p for p in parameters if p.kind == p.KEYWORD_ONLY):
        assert p.annotation is not p.empty and p.default is not p.empty or p.name in ("num_experts", "group_size")
        lines = re.findall(rf"^ *(?:\w+, )*{p.name}(?:, \w+)*  +(.+)$", loss.__doc__, re.M)
        assert lines, p.name
        if isinstance(p.default, str):
            assert p.default in get_args(p.annotation)
            assert all(f'"{value}"' in lines[0] for value in get_args(p.annotation)), p.name


@pytest.mark.parametrize("name", ["erl", "erpo", "rais", "baselines"])
def test_each_loss_file_imports_only_torch_and_the_standard_library(name):
    """So that each can be pasted alone into another project."""
    tree = ast.parse((Path(__file__).parents[1] / f"{name}.py").read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or "").split(".")[0])
    assert "torch" in modules and modules - {"torch"} <= sys.stdlib_module_names
