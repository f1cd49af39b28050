"""baselines.py: group advantages, six losses, and the weights for what another engine sampled."""

import inspect
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from baselines import (
    cispo_loss,
    dppo_loss,
    gmpo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    mismatch_weights,
    sapo_loss,
)
from erl import erl_objective, explore
from erpo import erpo_loss
from rais import rais_loss

ROOT = Path(__file__).parents[1]
LOSSES = {  # with the defaults that the papers or frameworks give, and a second setting
    "grpo": (grpo_loss, {"clip_low": 0.2, "clip_high": 0.28}, {"clip_low": 0.7, "clip_high": 0.5}),
    "gspo": (gspo_loss, {"clip_low": 3e-4, "clip_high": 4e-4}, {"clip_low": 0.1, "clip_high": 0.3}),
    "gmpo": (gmpo_loss, {"clip_low": 0.4, "clip_high": 0.4}, {"clip_low": 0.7, "clip_high": 0.1}),
    "cispo": (cispo_loss, {"clip_low": 1.0, "clip_high": 4.0}, {"clip_low": 0.2, "clip_high": 0.5}),
    "sapo": (sapo_loss, {"tau_negative": 1.05, "tau_positive": 1.0}, {"tau_negative": 3.0, "tau_positive": 0.5}),
    "dppo": (dppo_loss, {"clip_low": 0.2, "clip_high": 0.2}, {"clip_low": 0.02, "clip_high": 0.1}),
}
bases = pytest.mark.parametrize("base", LOSSES)
seeds = st.integers(0, 10_000)
KINDS = {"tis": (0.0, 2.0), "icepop": (0.5, 5.0), "sequence-mask": (0.0, 3.0)}


def make(seed, B=4, T=6, spread=0.5, dtype=torch.float64):
    """new, old [B, T], advantages [B], a mask with rows of different lengths, now and then of none."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    new = old + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    lengths = torch.randint(0, T + 1, (B, 1), generator=g)
    return new.to(dtype), old.to(dtype), advantages.to(dtype), torch.arange(T) < lengths


def full(seed, **sizes):
    """The same without a row that has no response."""
    new, old, A, mask = make(seed, **sizes)
    mask[:, 0] = True
    return new, old, A, mask


def weights_for(new, seed):
    return 0.2 + 2 * torch.rand(new.shape, generator=torch.Generator().manual_seed(seed), dtype=new.dtype)


def gradient(loss, new, *rest, **options):
    new = new.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(new, *rest, **options)[0], new)[0]


# --------------------------------------------------------------------------------------------------- group_advantages


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(2, 6), st.data())
def test_advantages_equal_the_reference(groups, group_size, data):
    values = st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.5])
    rewards = data.draw(st.lists(values, min_size=groups * group_size, max_size=groups * group_size))
    A = group_advantages(torch.tensor(rewards, dtype=torch.float64), group_size)
    np.testing.assert_allclose(A.numpy(), reference.group_advantages(rewards, group_size), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.7, 1e-8, 123456.7])
@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(value, group_size, dtype):
    """The mean of three 0.1 is not exactly 0.1. Without the guard the residue would come out as 0.007 or 0.8."""
    R = torch.full((2 * group_size,), value).to(dtype)
    R[group_size:] *= torch.arange(1, group_size + 1)  # the other group's rewards differ, and are larger
    A = group_advantages(R, group_size)
    assert (A[:group_size] == 0).all() and (value == 1e-8 or (A[group_size:] != 0).any())


def test_rewards_equal_within_rounding_give_exactly_zero():
    """The same parts summed in other orders; a difference that somebody meant stays."""
    a, b, c = (torch.tensor(x) for x in (50.1, 30.2, 20.3))
    R = torch.stack([a + b + c, c + b + a, a + c + b, b + c + a])
    assert R.unique().numel() > 1 and (group_advantages(R, 4) == 0).all() and (group_advantages(-R, 4) == 0).all()
    assert (group_advantages(torch.tensor([100.0, 100.001, 1.0, 1.00001]), 2) != 0).all()


def test_group_advantages_refuses_what_has_no_group():
    for rewards, G in (
        (torch.ones(4), 1),
        (torch.ones(4), 3),
        (torch.ones(2, 2), 2),
        (torch.tensor([0, torch.nan]), 2),
    ):
        with pytest.raises(ValueError, match="group_size|rewards"):
            group_advantages(rewards, G)


# ------------------------------------------------------------------------------------------------------------- losses


@bases
@settings(deadline=None, max_examples=50)
@given(seed=seeds, B=st.integers(1, 4), T=st.integers(1, 6), spread=st.sampled_from([1e-4, 0.3, 1.0, 3.0]))
def test_losses_equal_the_reference(base, seed, B, T, spread):
    """With the defaults and with other options, plain and weighted, in rows with and without a response."""
    loss, defaults, others = LOSSES[base]
    inputs = make(seed, B, T, spread)
    weights = weights_for(inputs[0], seed)
    arrays = [x.numpy() for x in inputs]
    for options, given_ in ((defaults, {}), (others, others)):
        for w in (None, weights):
            book = reference.policy_loss(base, *arrays, *options.values(), weights=None if w is None else w.numpy())
            assert loss(*inputs, **given_, weights=w)[0].item() == pytest.approx(book, abs=1e-12)


@bases
def test_gradients(base):
    """In float64 by differences; CISPO's and DPPO's, whose value is not their objective, token by token."""
    loss, _, options = LOSSES[base]
    new, old, A, mask = make(1)
    weights = weights_for(new, 1)
    if base not in ("cispo", "dppo"):
        f = lambda x: loss(x, old, A, mask, **options, weights=weights)[0]  # noqa: E731
        assert gradcheck(f, new.clone().requires_grad_())
    else:
        ratio, moved = (new - old).exp(), new.exp() - old.exp()
        low, high = options.values()
        factor = ratio.clamp(1 - low, 1 + high)
        if base == "dppo":
            factor = ratio.clamp(max=20) * torch.where(A[:, None] > 0, moved <= high, moved >= -low)
            assert 0 < (factor[mask] == 0).sum() < mask.sum()
        expected = -factor * A[:, None] * weights * mask / mask.sum(1, keepdim=True).clamp(min=1) / 4
        torch.testing.assert_close(gradient(loss, new, old, A, mask, **options, weights=weights), expected)
    inputs = [x.clone().requires_grad_() for x in (new, old, A, weights)]
    loss(*inputs[:3], mask, **options, weights=inputs[3])[0].backward()
    assert inputs[0].grad.abs().sum() > 0 and all(x.grad is None for x in inputs[1:])


@bases
def test_on_policy_it_is_reinforce(base):
    """The ratio is 1 to the bit, nothing is clipped, and every row weighs the same however long it is."""
    loss, *_ = LOSSES[base]
    new, _, A, mask = make(2, B=6, dtype=torch.float32)
    mask[0], mask[1] = True, False
    metrics = loss(new, new, A, mask)[1]
    assert metrics["ratio_mean"] == 1 and metrics["ratio_std"] == 0 and metrics["ratio_neg_log"] == 0
    assert metrics.get("clip_share", 0) == 0 and metrics.get("gate_mean", 1) == 1
    expected = -A[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1) / 6
    torch.testing.assert_close(gradient(loss, new, new, A, mask), expected)


@bases
def test_a_row_without_a_response_counts_in_the_mean(base):
    """It adds 0, and the others keep a weight of 1 / B; so a mask of nothing gives 0, with a gradient of 0."""
    loss, *_ = LOSSES[base]
    new, old, A, mask = full(3)
    alone, alone_metrics = loss(new[:3], old[:3], A[:3], mask[:3])
    mask[3] = False
    value, metrics = loss(new, old, A, mask)
    assert value.item() == pytest.approx(alone.item() * 3 / 4) and alone != 0
    torch.testing.assert_close(
        gradient(loss, new, old, A, mask)[:3], gradient(loss, new[:3], old[:3], A[:3], mask[:3]) * 0.75
    )
    assert all(metrics[k].item() == pytest.approx(x.item()) for k, x in alone_metrics.items() if k != "loss")
    mask[:] = False
    value, metrics = loss(new * float("nan"), old, A, mask)
    assert value == 0 and not gradient(loss, new * float("nan"), old, A, mask).any()
    assert all(x.isfinite() for x in metrics.values())


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


@pytest.mark.parametrize("log_ratio, A, expected", [(1.0, 1, 0.4), (-1.0, 1, -1.0), (1.0, -1, 1.0), (-1.0, -1, -0.4)])
def test_gmpo_clips_the_side_that_the_advantage_opens(log_ratio, A, expected):
    old, mask = torch.zeros(1, 1).double(), torch.ones(1, 1, dtype=torch.bool)
    value, metrics = gmpo_loss(old + log_ratio, old, torch.tensor([A]).double(), mask)
    assert value.item() == pytest.approx(-A * np.exp(expected)) and metrics["clip_share"] == (expected != log_ratio)
    assert gmpo_loss(old - 1, old, torch.zeros(1), mask)[1]["clip_share"] == 1  # A = 0 belongs to the lower side


def test_dppo_looks_at_probabilities_and_sapo_at_neither_bound():
    """0.5 -> 0.71 is stopped at a ratio of 1.4; 0.001 -> 0.03 is not, its factor ends at 20. SAPO has no bound."""
    old, new = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.001, 0.71], [0.71, 0.03, 0.5]))
    mask, up = torch.ones(1, 3, dtype=torch.bool), torch.ones(1).double()
    torch.testing.assert_close(
        gradient(dppo_loss, new, old, up, mask), -torch.tensor([[0, 20, 0.5 / 0.71]]).double() / 3
    )
    torch.testing.assert_close(gradient(dppo_loss, new, old, -up, mask), torch.tensor([[1.42, 20, 0]]).double() / 3)
    assert dppo_loss(new, old, up, mask)[1]["clip_share"] == pytest.approx(1 / 3)
    assert gradient(dppo_loss, new, old, up, mask, max_ratio=2.0)[0, 1].item() == pytest.approx(-2 / 3)
    for A, tau in ((up, 1.0), (-up, 1.05)):
        p = torch.sigmoid(tau * ((new - old).exp() - 1))
        slope = 4 * p * (1 - p)  # of f, times w: below 1 on both sides, never 0
        torch.testing.assert_close(
            gradient(sapo_loss, new, old, A, mask), -A[:, None] * slope * (new - old).exp() / 3, atol=1e-12, rtol=1e-9
        )
        assert sapo_loss(new, old, A, mask)[1]["gate_mean"].item() == pytest.approx(slope.mean().item())


@bases
def test_metrics_by_hand(base):
    """Each over response tokens (rows in GSPO) and nothing else; a clip counts where the gradient is cut."""
    loss, _, options = LOSSES[base]
    new, old, A, mask = make(4, B=12)
    mask[0] = False
    _, metrics = loss(new, old, A, mask, **options)
    log_ratio = (new - old)[mask]
    if base == "gspo":
        log_ratio = torch.stack([(new - old)[b][mask[b]].mean() for b in range(12) if mask[b].any()])
    ratio = log_ratio.exp()
    expected = {"ratio_mean": ratio.mean(), "ratio_std": ratio.std(correction=0), "ratio_neg_log": -log_ratio.mean()}
    if base == "cispo":
        low, high = options.values()
        expected["clip_share"] = ((ratio < 1 - low) | (ratio > 1 + high)).double().mean()
    elif base != "sapo":
        stopped = gradient(loss, new, old, A, mask, **options) == 0
        stopped = stopped.all(1)[mask.any(1)] if base == "gspo" else stopped[mask]
        expected["clip_share"] = stopped.double().mean()
        assert 0 < expected["clip_share"] < 1
    assert metrics.keys() == {"loss", *expected, *(["gate_mean"] if base == "sapo" else [])}
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item()), name
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())


@bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(base, dtype):
    """Low precision is computed in float32: the loss is that of the rounded inputs, not of rounded steps."""
    loss, _, options = LOSSES[base]
    new, old, A, mask = full(7, dtype=dtype)
    weights = weights_for(new.float(), 7).to(dtype)
    value, _ = loss(new, old, A, mask, **options, weights=weights)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    slope = gradient(loss, new, old, A, mask, **options, weights=weights)
    assert slope.dtype == dtype and slope.abs().sum() > 0
    arrays = [x.double().numpy() for x in (new, old, A)]
    book = reference.policy_loss(base, *arrays, mask.numpy(), *options.values(), weights=weights.double().numpy())
    assert value.item() == pytest.approx(book, abs=1e-6)


@bases
def test_losses_refuse_bad_arguments(base):
    loss, options, _ = LOSSES[base]
    new, old, A, mask = make(8)
    names = "log_probs", "old_log_probs", "advantages", "response_mask"
    for name, bad in zip((*names, names[3]), (new[:, 0], old[:, 1:], new, mask[:, 1:], mask.long()), strict=True):
        with pytest.raises(ValueError, match=f"^{name}"):
            loss(**dict(zip(names, (new, old, A, mask), strict=True)) | {name: bad})
    with pytest.raises(ValueError, match="^weights"):
        loss(new, old, A, mask, weights=new[:, :1])
    for name in [*options] + ["max_ratio"] * (base == "dppo"):
        with pytest.raises(ValueError, match=name):
            loss(new, old, A, mask, **{name: -0.1})


# ------------------------------------------------------------------------------------------------------------ weights


@settings(deadline=None, max_examples=50)
@given(seed=seeds, kind=st.sampled_from([*KINDS]), spread=st.sampled_from([0.1, 1.0]), own=st.booleans())
def test_mismatch_weights_equal_the_reference(seed, kind, spread, own):
    """By the frameworks' defaults and by other bounds; junk at padding; no gradient."""
    mu, old, _, mask = make(seed, spread=spread)
    low, high = (0.0 if kind == "tis" else 0.9, 1.2) if own else KINDS[kind]
    names = {"sequence-mask": {"clip_min": low, "clip_max": high}, "tis": {"threshold": high}}
    options = names.get(kind, {"threshold_lower": low, "threshold": high}) if own else {}
    dirty = old.masked_fill(~mask, float("nan")).requires_grad_()
    weights = mismatch_weights(dirty, mu.masked_fill(~mask, float("inf")), mask, kind=kind, **options)
    book = reference.mismatch_weights(old.numpy(), mu.numpy(), mask.numpy(), kind, low, high)
    np.testing.assert_allclose(weights.numpy(), book, rtol=1e-12)
    assert not weights.requires_grad and mismatch_weights(old.bfloat16(), mu, mask, kind=kind).dtype == torch.float64


def test_what_is_far_from_the_sampler():
    """Ratios of 4, 1, 1/4, 1 and, in a row of its own, 1.5, 1.5: TIS cuts, IcePop drops, the mask drops rows."""
    old = torch.tensor([[4.0, 1.0, 0.25, 1.0], [1.5, 1.5, 9.0, 9.0], [2.0, 2.0, 1.0, 1.0]]).double().log()
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    tis, icepop, rows = (mismatch_weights(old, torch.zeros_like(old), mask, kind=kind) for kind in KINDS)
    torch.testing.assert_close(tis[0], torch.tensor([2, 1, 0.25, 1]).double())
    torch.testing.assert_close(icepop[0], torch.tensor([4, 1, 0, 1]).double())
    torch.testing.assert_close(rows, mask * torch.tensor([[1], [2.25], [0]]).double())
    unbounded = mismatch_weights(old, torch.zeros_like(old), mask, kind="sequence-mask", clip_max=None)
    assert unbounded[2].tolist() == pytest.approx([4] * 4)


def test_where_a_weight_of_zero_stands():
    """The denominator stays: a token of weight 0 leaves half of a row of two. GMPO's row would be gone: refused."""
    new, old = torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    A, mask, half = torch.ones(1).double(), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.0, 1.0]]).double()
    for loss in (grpo_loss, cispo_loss, sapo_loss, dppo_loss):
        torch.testing.assert_close(gradient(loss, new, old, A, mask, weights=half), torch.tensor([[0, -0.5]]).double())
    torch.testing.assert_close(gradient(gspo_loss, new, old, A, mask, weights=half), torch.full((1, 2), -0.25).double())
    with pytest.raises(ValueError, match="^weights must be above 0"):
        gmpo_loss(new, old, A, mask, weights=half)
    assert gmpo_loss(new, old, A, mask, weights=0 * half)[0] == 0  # a sequence mask
    only = torch.tensor([[False, True]])
    assert gmpo_loss(new, old, A, only, weights=half)[0] == -1  # the zero is at padding
    quarter = torch.tensor([[0.25, 1.0]]).double()
    assert gmpo_loss(new, old, A, mask, weights=quarter)[0].item() == pytest.approx(-0.5)


def test_mismatch_weights_refuse_bad_arguments():
    mu, old, _, mask = make(9)
    for options in (dict(kind="tis", threshold=-1.0), dict(kind="icepop", threshold=0.4), dict(kind="mis")):
        with pytest.raises(ValueError, match="^the bounds|^kind"):
            mismatch_weights(old, mu, mask, **options)
    with pytest.raises(ValueError, match="^rollout_log_probs"):
        mismatch_weights(old, mu[:, 1:], mask, kind="tis")


# -------------------------------------------------------------------------------------------- signatures, docs, imports

POLICY = ["log_probs", "old_log_probs", "advantages", "response_mask"]
ROUTES = ["experts", "old_experts", "expert_probs", "old_expert_probs"]
CLIPS = ["clip_low", "clip_high"]
ARGUMENTS = {  # what a caller may rely on: train.py hands over what a loss names
    **{loss: (POLICY, CLIPS) for loss in (grpo_loss, gspo_loss, gmpo_loss, cispo_loss)},
    sapo_loss: (POLICY, ["tau_positive", "tau_negative"]),
    dppo_loss: (POLICY, [*CLIPS, "max_ratio"]),
    rais_loss: ([*POLICY, "router_log_probs", "old_router_log_probs"], ["base", *CLIPS, "floor", "layers"]),
    erpo_loss: (
        ["log_probs", "old_log_probs", "rewards", "response_mask", *ROUTES],
        ["num_experts", "group_size", "alpha", *CLIPS, "entropy_reward"],
    ),
}


@pytest.mark.parametrize("loss", ARGUMENTS)
def test_signatures_name_their_options_and_docstrings_explain_them(loss):
    """Options are keyword-only, each with a line `name   help` that names every value of a closed set."""
    parameters = inspect.signature(loss).parameters.values()
    positional, options = ARGUMENTS[loss]
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == positional
    assert [p.name for p in parameters if p.kind == p.KEYWORD_ONLY] == [*options, "weights"]
    for p in (p for p in parameters if p.name in options):
        lines = re.findall(rf"^ *(?:\w+, )*{p.name}(?:, \w+)*  +(.+)$", loss.__doc__, re.M)
        assert lines and (p.default is not p.empty or p.name in ("num_experts", "group_size")), p.name
        if isinstance(p.default, str):
            assert p.default in get_args(p.annotation)
            assert all(f'"{value}"' in lines[0] for value in get_args(p.annotation)), p.name


def test_the_page_of_losses_has_the_defaults_of_the_code():
    """docs/losses.md names every option of a loss as `name=default` in its row, and nothing else in this form."""
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = {loss.__name__.partition("_")[0].upper(): [loss] for loss in ARGUMENTS} | {"ERL": [explore, erl_objective]}
    rows |= {f'"{kind}"': [mismatch_weights] for kind in KINDS}
    stands_for = {("ERL", "clip_eps"): 0.2, ('"tis"', "threshold"): 2.0, ('"icepop"', "threshold"): 5.0}  # for None
    told = {}
    for name, functions in rows.items():
        row = re.findall(rf"^\| {name} \|.*$", page, re.M)[0]
        known = {p.name: p.default for f in functions for p in inspect.signature(f).parameters.values()}
        told[name] = dict(re.findall(r"`(\w+)=([^`]+)`", row))
        for option, value in told[name].items():
            assert value == str(stands_for.get((name, option), known[option])), (name, option)
        if functions[0] in ARGUMENTS:
            assert told[name].keys() == {*ARGUMENTS[functions[0]][1]} - {"num_experts", "group_size"}, name
    assert {"alpha", "delta", "n_perturb", "clip_eps"} <= told["ERL"].keys()
    assert {*told['"icepop"'], *told['"sequence-mask"']} == {"threshold", "threshold_lower", "clip_min", "clip_max"}
