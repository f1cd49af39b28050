"""baselines.py: group advantages, six losses, and the weights for what another engine sampled."""

import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import baselines
from baselines import dppo_loss, gmpo_loss, group_advantages, mismatch_weights, sapo_loss
from erl import erl_objective, explore
from erpo import erpo_loss
from rais import rais_loss
from support.arguments import options_of

ROOT = Path(__file__).parents[1]
OPTIONS = {  # the defaults that the papers or frameworks give, and a second setting
    "grpo": ({"clip_low": 0.2, "clip_high": 0.28}, {"clip_low": 0.7, "clip_high": 0.5}),
    "gspo": ({"clip_low": 3e-4, "clip_high": 4e-4}, {"clip_low": 0.1, "clip_high": 0.3}),
    "gmpo": ({"clip_low": 0.4, "clip_high": 0.4}, {"clip_low": 0.7, "clip_high": 0.1}),
    "cispo": ({"clip_low": 1.0, "clip_high": 4.0}, {"clip_low": 0.2, "clip_high": 0.5}),
    "sapo": ({"tau_negative": 1.05, "tau_positive": 1.0}, {"tau_negative": 3.0, "tau_positive": 0.5}),
    "dppo": ({"clip_low": 0.2, "clip_high": 0.2}, {"clip_low": 0.02, "clip_high": 0.1}),
}
LOSSES = {base: (getattr(baselines, f"{base}_loss"), *options) for base, options in OPTIONS.items()}
bases = pytest.mark.parametrize("base", LOSSES)
seeds = st.integers(0, 10_000)
KINDS = {  # the bounds without an option, other options, and the bounds that these give
    "tis": ((0.0, 2.0), {"threshold": 1.2}, (0.0, 1.2)),
    "icepop": ((0.5, 5.0), {"threshold_lower": 0.9, "threshold": 1.2}, (0.9, 1.2)),
    "sequence-mask": ((0.0, 3.0), {"clip_min": 0.9, "clip_max": None}, (0.9, float("inf"))),
}


def make(seed, B=4, T=6, spread=0.5):
    """new, old [B, T], advantages [B], a mask with rows of different lengths, now and then of none."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    new = old + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    return new, old, advantages, torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=g)


def gradient(loss, new, *rest, **options):
    new = new.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(new, *rest, **options)[0], new)[0]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(2, 6), st.data())
def test_advantages_equal_the_reference(groups, group_size, data):
    values = st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.5])
    rewards = data.draw(st.lists(values, min_size=groups * group_size, max_size=groups * group_size))
    A = group_advantages(torch.tensor(rewards, dtype=torch.float64), group_size)
    np.testing.assert_allclose(A.numpy(), reference.group_advantages(rewards, group_size), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rewards_equal_within_rounding_give_exactly_zero(dtype):
    """The mean of three 0.1 is not exactly 0.1. Without the guard the residue would come out as 0.007 or 0.8."""
    for value, G in itertools.product((0.1, 0.7, 123456.7), (2, 3, 7)):
        R = torch.full((2 * G,), value).to(dtype)
        R[G:] *= torch.arange(1, G + 1)  # the other group's rewards differ, and are larger
        A = group_advantages(R, G)
        assert (A[:G] == 0).all() and (A[G:] != 0).any() and A.dtype == torch.promote_types(dtype, torch.float32)
    a, b, c = torch.tensor([50.1, 30.2, 20.3])
    R = torch.stack([a + b + c, c + b + a, a + c + b, b + c + a])  # the same parts summed in other orders
    assert R.unique().numel() > 1 and (group_advantages(R, 4) == 0).all() and (group_advantages(-R, 4) == 0).all()
    assert (group_advantages(torch.tensor([100.0, 100.001, 1.0, 1.00001]), 2) != 0).all()  # somebody meant that


@bases
@settings(deadline=None, max_examples=50)
@given(seed=seeds, B=st.integers(1, 4), T=st.integers(1, 6), spread=st.sampled_from([1e-4, 0.3, 1.0, 3.0]))
def test_losses_equal_the_reference(base, seed, B, T, spread):
    """With the defaults and with other options, plain and weighted, in rows with and without a response."""
    loss, defaults, others = LOSSES[base]
    inputs = make(seed, B, T, spread)
    weights, arrays = 0.2 + inputs[0].exp(), [x.numpy() for x in inputs]
    for options, given_ in ((defaults, {}), (others, others)):
        for w in (None, weights):
            book = reference.policy_loss(base, *arrays, *options.values(), weights=None if w is None else w.numpy())
            assert loss(*inputs, **given_, weights=w)[0].item() == pytest.approx(book, abs=1e-12)


@bases
def test_gradients(base):
    """In float64 by differences; CISPO's and DPPO's, whose value is not their objective, token by token."""
    loss, _, options = LOSSES[base]
    new, old, A, mask = make(1)
    weights = 0.2 + old.exp()
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
    rises, falls = (gradient(dppo_loss, new, old, A, mask) for A in (up, -up))
    torch.testing.assert_close(rises, -torch.tensor([[0, 20, 0.5 / 0.71]]).double() / 3)
    torch.testing.assert_close(falls, torch.tensor([[1.42, 20, 0]]).double() / 3)
    assert gradient(dppo_loss, new, old, up, mask, max_ratio=2.0)[0, 1].item() == pytest.approx(-2 / 3)
    assert (gradient(sapo_loss, new, old, up, mask) < 0).all() and (gradient(sapo_loss, new, old, -up, mask) > 0).all()


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
        expected["clip_share"] = ((ratio < 0.8) | (ratio > 1.5)).double().mean()
    elif base == "sapo":
        gate = torch.sigmoid(torch.where(A > 0, 0.5, 3.0)[:, None] * ((new - old).exp() - 1))[mask]
        expected["gate_mean"] = (4 * gate * (1 - gate)).mean()
    else:
        stopped = gradient(loss, new, old, A, mask, **options) == 0
        stopped = stopped.all(1)[mask.any(1)] if base == "gspo" else stopped[mask]
        expected["clip_share"] = stopped.double().mean()
        assert 0 < expected["clip_share"] < 1
    assert metrics.pop("loss") and metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item()), name


def test_what_is_refused():
    new, old, A, mask = make(8)
    good = dict(log_probs=new, old_log_probs=old, advantages=A, response_mask=mask)
    bad = [("log_probs", new[:, 0]), ("old_log_probs", old[:, 1:]), ("advantages", new), ("weights", new[:, :1])]
    bad += [("response_mask", mask[:, 1:]), ("response_mask", mask.long())]
    for base, (loss, options, _) in LOSSES.items():
        ranges = [(name, -0.1) for name in [*options] + ["max_ratio"] * (base == "dppo")]
        for name, value in bad + ranges:
            with pytest.raises(ValueError, match=name):
                loss(**good | {name: value})
    for rewards, G in ([1.0] * 4, 1), ([1.0] * 4, 3), ([[1.0] * 2] * 2, 2), ([0, torch.nan], 2):
        with pytest.raises(ValueError, match="group_size|rewards"):
            group_advantages(torch.tensor(rewards), G)
    for options in (dict(kind="tis", threshold=-1.0), dict(kind="icepop", threshold=0.4), dict(kind="mis")):
        with pytest.raises(ValueError, match="^the bounds|^kind"):
            mismatch_weights(old, new, mask, **options)
    with pytest.raises(ValueError, match="^rollout_log_probs"):
        mismatch_weights(old, new[:, 1:], mask, kind="tis")


@settings(deadline=None, max_examples=50)
@given(seed=seeds, kind=st.sampled_from([*KINDS]), spread=st.sampled_from([0.1, 1.0]), own=st.booleans())
def test_mismatch_weights_equal_the_reference(seed, kind, spread, own):
    """By the frameworks' defaults and by other bounds, one of them none; junk at padding; no gradient."""
    mu, old, _, mask = make(seed, spread=spread)
    default, options, others = KINDS[kind]
    options, (low, high) = (options, others) if own else ({}, default)
    dirty = old.masked_fill(~mask, float("nan")).requires_grad_()
    weights = mismatch_weights(dirty, mu.masked_fill(~mask, float("inf")), mask, kind=kind, **options)
    book = reference.mismatch_weights(old.numpy(), mu.numpy(), mask.numpy(), kind, low, high)
    np.testing.assert_allclose(weights.numpy(), book, rtol=1e-12)
    assert not weights.requires_grad and mismatch_weights(old.bfloat16(), mu, mask, kind=kind).dtype == torch.float64


def test_where_a_weight_of_zero_stands():
    """Beside other weights it would erase GMPO's row: refused. A row of zeros counts 0, a zero at padding nothing."""
    new, A, mask = torch.zeros(1, 2).double(), torch.ones(1).double(), torch.ones(1, 2, dtype=torch.bool)
    half = torch.tensor([[0.0, 1.0]]).double()
    with pytest.raises(ValueError, match="^weights must be above 0"):
        gmpo_loss(new, new, A, mask, weights=half)
    assert gmpo_loss(new, new, A, mask, weights=0 * half)[0] == 0  # a sequence mask
    assert gmpo_loss(new, new, A, torch.tensor([[False, True]]), weights=half)[0] == -1


def test_the_page_of_losses_has_the_defaults_of_the_code():
    """docs/losses.md names every option of a loss as `name=default` in its row, and nothing else in this form."""
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    losses = {base.upper(): loss for base, (loss, *_) in LOSSES.items()} | {"RAIS": rais_loss, "ERPO": erpo_loss}
    rows = {name: [loss] for name, loss in losses.items()} | {"ERL": [explore, erl_objective]}
    rows |= {f'"{kind}"': [mismatch_weights] for kind in KINDS}
    stands_for = {("ERL", "clip_eps"): 0.2, ('"tis"', "threshold"): 2.0, ('"icepop"', "threshold"): 5.0}  # for None
    told = {}
    for name, functions in rows.items():
        row = re.findall(rf"^\| {name} \|.*$", page, re.M)[0]
        parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
        known = {p.name: p.default for p in parameters}
        told[name] = dict(re.findall(r"`(\w+)=([^`]+)`", row))
        for option, value in told[name].items():
            assert value == str(stands_for.get((name, option), known[option])), (name, option)
        if name in losses:
            options = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
            assert told[name].keys() == options - {"num_experts", "group_size", "weights"}, name
            assert all(option.help for option in options_of(*functions).values()), name
    assert {"alpha", "delta", "n_perturb", "clip_eps"} <= told["ERL"].keys()
    assert {*told['"icepop"'], *told['"sequence-mask"']} == {"threshold", "threshold_lower", "clip_min", "clip_max"}
