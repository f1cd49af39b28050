"""Every public function of the loss files on values from 1e-30 to 1e30, either sign, in four types and odd shapes.

What is held: a result is finite, in value, gradient and metrics, or the call is a ValueError; padding (NaN,
infinities, 1e30, ids of -1 or 10^6) changes nothing, to the bit; and float16, bfloat16 and float32 inputs give what
the same numbers give as float64, within 2e-5 of the largest term that enters (all arithmetic is in float32), as long
as no log ratio is above 10 and no gamma below 1e-30. Advantages go up to 1e4: they are standardised over a group, or
differences of log-probabilities, and e^40 of them has to fit into float32. ERPO with entropy rewards is held to 0.2
of that term: where they differ by 1e-7, float32's rounding of them is a tenth of the 1e-6 that the standard deviation
stands on.

    python -m pytest tests/test_fuzz_losses.py                      60 cases a function
    FUZZ_CASES=10000 python -m pytest tests/test_fuzz_losses.py     the long way, about half an hour of a core
"""

import inspect
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from baselines import cispo_loss, gmpo_loss, group_advantages, grpo_loss, gspo_loss
from erl import Pass, erl_advantage, erl_loss, erl_objective, explore, random_routes, rounding
from erpo import erpo_loss
from rais import rais_loss, router_shift

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", 60)), deadline=None, suppress_health_check=list(HealthCheck)
)
LOW = [torch.bfloat16, torch.float16, torch.float32]
JUNK = [float("nan"), float("inf"), -float("inf"), 1e30]


class Case(NamedTuple):
    """Sizes, how large the numbers are (powers of ten), the type, what padding holds, and the seed of the rest."""

    B: int
    G: int
    T: int
    L: int
    K: int
    E: int
    smallest: int
    largest: int
    dtype: torch.dtype
    junk: float
    seed: int

    def generator(self, stream):
        return torch.Generator().manual_seed(17 * self.seed + stream)

    def numbers(self, stream, *shape, largest=None):
        """Of either sign, sizes from 10^smallest to 10^largest: float64, exact in the case's type."""
        g = self.generator(stream)
        top = max(self.smallest, min(self.largest, 30 if largest is None else largest))
        if self.dtype == torch.float16:
            top = min(top, 4)
        power = self.smallest + (top - self.smallest) * torch.rand(shape, generator=g, dtype=torch.float64)
        sign = torch.randint(2, shape, generator=g) * 2 - 1
        return (sign * 10**power).to(self.dtype).double()

    def near(self, stream, x):
        """x moved by about a thousandth to a hundred: where ratios are not all 0 or e^40."""
        g = self.generator(stream)
        step = torch.randn(x.shape, generator=g, dtype=torch.float64)
        step = step * 10 ** (self.seed // 2 % 3 - 3 * torch.rand(x.shape, generator=g, dtype=torch.float64))
        return (x + step).clamp(-6e4 if self.dtype == torch.float16 else -1e38, 6e4).to(self.dtype).double()

    def mask(self):
        return torch.rand(self.B, self.T, generator=self.generator(1)) < (0.0, 0.5, 0.9, 2.0)[self.seed % 4]


@st.composite
def cases(draw):
    G, E = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    smallest = draw(st.integers(-30, 1))
    return Case(
        B=G * draw(st.integers(1, 2)),
        G=G,
        T=draw(st.integers(1, 7)),
        L=draw(st.integers(1, 3)),
        K=draw(st.integers(1, E)),
        E=E,
        smallest=smallest,
        largest=draw(st.integers(smallest, 30)),
        dtype=draw(st.sampled_from([*LOW, torch.float64])),
        junk=draw(st.sampled_from(JUNK)),
        seed=draw(st.integers(0, 10**6)),
    )


def policy(c):
    """log_probs, old_log_probs [B, T]: half of the cases far apart, half closer."""
    old = c.numbers(2, c.B, c.T)
    return (c.near(3, old) if c.seed % 2 else c.numbers(3, c.B, c.T)), old


def routers(c):
    """Two log-softmaxes [B, T, L, K] at K distinct experts, and these [B, T, L, K]."""
    logits = c.numbers(4, c.B, c.T, c.L, c.E)
    experts = torch.rand(logits.shape, generator=c.generator(5)).topk(c.K).indices
    pair = (x.log_softmax(-1).gather(-1, experts) for x in (c.near(6, logits), logits))
    limit = -6e4 if c.dtype == torch.float16 else -1e38
    return *(x.clamp(min=limit).to(c.dtype).double() for x in pair), experts


def baseline(loss):
    def arguments(c):
        new, old = policy(c)
        return [new, old, c.numbers(7, c.B, largest=4), c.mask()], {}

    return loss, arguments


def rais(base):
    def arguments(c):
        inputs, _ = baseline(None)[1](c)
        router, old_router, _ = routers(c)
        floor, layers = (0.8, 0.0, 1.0)[c.seed % 3], ("mean", "sum")[c.seed % 2]
        return [*inputs, router, old_router], dict(base=base, floor=floor, layers=layers)

    return rais_loss, arguments


def erpo(rewards):
    def arguments(c):
        new, old = policy(c)
        router, old_router, experts = routers(c)
        stays = torch.rand(c.B, c.T, c.L, 1, generator=c.generator(8)) < 0.7
        other = torch.rand(c.B, c.T, c.L, c.E, generator=c.generator(9)).topk(c.K).indices
        options = dict(num_experts=c.E, group_size=c.G, alpha=(0.2, 0.0, 1.0)[c.seed % 3])
        options["entropy_reward"] = ("relative", "absolute", "none")[c.seed // 3 % 3]
        probs, old_probs = (x.exp().to(c.dtype).double() for x in (router, old_router))
        return [new, old, rewards(c), c.mask(), torch.where(stays, experts, other), experts, probs, old_probs], options

    return erpo_loss, arguments


def erl(c):
    router, old_router, _ = routers(c)
    S = c.mask()[:, :, None] & (torch.rand(c.B, c.T, c.L, generator=c.generator(8)) < 0.6)
    return [router, old_router, c.numbers(7, c.B, c.T, largest=4), S], dict(clip_eps=(0.2, 0.0)[c.seed % 2])


LOSSES = {
    "grpo": baseline(grpo_loss),
    "gspo": baseline(gspo_loss),
    "gmpo": baseline(gmpo_loss),
    "cispo": baseline(cispo_loss),
    "rais gmpo": rais("gmpo"),
    "rais gspo": rais("gspo"),
    "rais grpo": rais("grpo"),
    "erpo": erpo(lambda c: torch.randint(3, (c.B,), generator=c.generator(7)).double() / 2),
    "erpo, any rewards": erpo(lambda c: c.numbers(7, c.B)),
    "erl": (erl_loss, erl),
}


def padded(c, arguments):
    """The same arguments with junk wherever the mask (or, in ERL, S) is false."""
    mask = next(x for x in arguments if x.dtype == torch.bool)
    out = []
    for x in arguments:
        if x.dim() >= mask.dim() and x is not mask:
            junk = c.junk if x.is_floating_point() else (-1, 10**6)[c.seed % 2]
            x = torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), x, junk)
        elif x.dim() == 2 and mask.dim() == 3:  # ERL's advantages: a token's, none of whose decisions is in S
            x = torch.where(mask.any(-1), x, c.junk)
        out.append(x)
    return out


def evaluate(loss, arguments, options, dtype):
    """-> loss, gradient, metrics, all float64; None if the arguments are refused."""
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
    new = inputs[0].requires_grad_()
    try:
        value, metrics = loss(*inputs, **options)
    except ValueError:
        return None
    (gradient,) = torch.autograd.grad(value, new)
    assert value.shape == () and gradient.dtype == dtype and not any(m.requires_grad for m in metrics.values())
    return value.detach().double(), gradient.double(), metrics


@pytest.mark.parametrize("name", LOSSES)
@fuzz
@given(c=cases())
def test_finite_or_refused_and_padding_is_nothing(name, c):
    loss, make = LOSSES[name]
    arguments, options = make(c)
    if name == "erpo, any rewards" and (arguments[2].abs() >= 1e15).any():
        assert evaluate(loss, padded(c, arguments), options, c.dtype) is None
        return
    value, gradient, metrics = evaluate(loss, padded(c, arguments), options, c.dtype)
    assert value.isfinite() and not gradient.isnan().any(), (value, gradient)
    assert gradient.isfinite().all() or c.dtype == torch.float16, gradient  # which ends at 65504
    if metrics.get("gamma_min") != 0:  # without a floor gamma may be 0, and -log of it infinite
        assert all(m.isfinite() for m in metrics.values()), metrics
    clean_value, clean_gradient, clean_metrics = evaluate(loss, arguments, options, c.dtype)
    assert torch.equal(value, clean_value) and torch.equal(gradient, clean_gradient)
    assert all(torch.equal(m, clean_metrics[k]) for k, m in metrics.items())


WIDE = {"clip_low": 1e5, "clip_high": 1e5}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "erpo, any rewards"])
@fuzz
@given(c=cases())
def test_low_precision_gives_what_float64_gives(name, c):
    """The value with the options as they are; the gradient with a range so wide that no ratio lies at its end."""
    assume(c.dtype in LOW)
    loss, make = LOSSES[name]
    arguments, options = make(c)
    mask = next(x for x in arguments if x.dtype == torch.bool)
    assume(mask.any())
    new, old = arguments[0][mask], arguments[1][mask]
    log_ratio = (new.max() - old.min() if name == "erpo" else (new - old).abs().max()).item()
    assume(log_ratio < 10)
    if options.get("floor") == 0:
        assume(router_shift(*arguments[4:], floor=0, layers=options["layers"])[mask].min() > 1e-30)
    term, tolerance = math.exp(max(log_ratio, 0)), 2e-5  # where it is below 1, the lower bound may stand in for it
    if name != "erpo":
        term *= arguments[2].abs().max().item()
    elif options["entropy_reward"] != "none" and options["alpha"] > 0:
        tolerance = 0.2
    else:  # means over two clusters are taken before their difference
        tolerance += 1e-6 * old.abs().max().item()
    if "base" in options:  # log gamma is added to log pi_old, and rounded with it, before the difference is taken
        tolerance += 1e-6 * old.abs().max().item()
    if name == "cispo":
        term *= max(1, new.abs().max().item())
    tolerance *= max(term, 1e-30)
    low, high = (evaluate(loss, arguments, options, dtype) for dtype in (c.dtype, torch.float64))
    assert abs(low[0] - high[0]) <= tolerance, (low[0], high[0])
    options |= {"clip_eps": 1e5} if name == "erl" else WIDE
    low, high = (evaluate(loss, arguments, options, dtype) for dtype in (c.dtype, torch.float64))
    assert abs(low[0] - high[0]) <= tolerance
    type_ = torch.finfo(c.dtype)  # in which the gradient is handed over
    close = (low[1] - high[1]).abs() <= tolerance + type_.eps * high[1].abs().clamp(min=type_.tiny)
    assert (close | (high[1].abs() > type_.max / 2)).all(), (low[1], high[1])


@fuzz
@given(c=cases())
def test_group_advantages(c):
    """Finite, bounded by sqrt(G), or refused; rewards closer than their own rounding are as good as equal."""
    rewards = c.numbers(7, c.B)
    if (rewards.abs() >= 1e15).any():
        with pytest.raises(ValueError, match="below 1e15"):
            group_advantages(rewards.to(c.dtype), c.G)
        return
    A, exact = group_advantages(rewards.to(c.dtype), c.G), group_advantages(rewards, c.G)
    assert A.isfinite().all() and A.abs().max() <= c.G**0.5
    R = rewards.view(-1, c.G)
    eps = torch.finfo(A.dtype).eps
    rounding_of_mean = 4 * c.G * eps * R.abs().amax(1, keepdim=True) / (R.std(1, keepdim=True) + 1e-6)
    assert ((A - exact).abs() <= (1e-5 + rounding_of_mean).expand_as(R).flatten()).all()


@fuzz
@given(c=cases(), floor=st.floats(0, 1), layers=st.sampled_from(["mean", "sum"]))
def test_router_shift(c, floor, layers):
    new, old, _ = routers(c)
    gamma = router_shift(new.to(c.dtype), old.to(c.dtype), floor=floor, layers=layers)
    assert gamma.isfinite().all() and (gamma >= torch.tensor(floor, dtype=gamma.dtype)).all() and (gamma <= 1).all()
    torch.testing.assert_close(gamma.double(), router_shift(new, old, floor=floor, layers=layers), atol=1e-5, rtol=0)


@fuzz
@given(c=cases())
def test_erl_advantage_and_rounding(c):
    """The sign is that of the exact difference; what is within the rounding of its type is a share of its size."""
    new, old = policy(c)
    exact = erl_advantage(new, old, "log")
    assert torch.equal(erl_advantage(new.to(c.dtype), old.to(c.dtype)).double(), exact.sign())
    torch.testing.assert_close(
        erl_advantage(new.to(c.dtype), old.to(c.dtype), "log").double(), exact, rtol=1e-6, atol=0
    )
    bound = rounding(old, c.dtype)
    assert bound.isfinite().all() and (bound > 0).all() and (bound <= 0.07 * old.abs().clamp(min=4)).all()


@fuzz
@given(c=cases(), alpha=st.floats(0, 1))
def test_random_routes(c, alpha):
    experts, perturbed = random_routes(c.B, c.T, c.L, c.E, c.K, alpha, generator=c.generator(1))
    assert experts.shape == (c.B, c.T, c.L, c.K) and perturbed.shape == (c.B, c.T, c.L)
    assert (0 <= experts).all() and (experts < c.E).all()
    assert all(len(set(x)) == c.K for x in experts.flatten(0, 2).tolist())
    assert perturbed.any() <= (alpha > 0) and perturbed.all() >= (alpha == 1)


class Passes:
    """A model's passes without the model: `forward` as `explore` calls it; what padding says is junk, or not."""

    def __init__(self, c, m, largest, junk):
        self.c, self.m, self.largest, self.padding = c, m, largest, ~c.mask()
        self.junk, self.calls, self.routers = junk, 0, []

    def given(self, x):
        """In the case's type, with junk at padding."""
        padding = self.padding.repeat(len(x) // self.c.B, 1).view(*x.shape[:2], *[1] * (x.dim() - 2))
        return (x.masked_fill(padding, self.c.junk) if self.junk else x).to(self.c.dtype)

    def forward(self, routes):
        c, rows = self.c, self.c.B * (1 if routes is None else self.m)
        old = c.numbers(2, c.B, c.T, largest=self.largest).repeat(rows // c.B, 1)
        log_probs = c.near(3, old) if routes is not None else old
        logits = c.numbers(4, rows, c.T, c.L, c.E)
        if self.calls > 1:  # a later inner epoch: the router has moved
            logits = c.near(10 + self.calls, logits)
        self.calls += 1
        limit = -6e4 if c.dtype == torch.float16 else -1e38
        self.routers.append(self.given(logits.log_softmax(-1).clamp(min=limit)).requires_grad_())
        return Pass(self.given(log_probs), self.routers[-1], c.numbers(20, 1).to(c.dtype)[0])


BAD = {"alpha": [-0.1, 1.1, math.nan], "n_perturb": [0, -1], "rounding_units": [-1.0, math.nan], "top_k": [0, 6]}
BAD |= {"advantage": ["signs"], "delta": [-1.0, math.nan], "clip_eps": [-0.1, math.nan], "inner_epochs": [0, -3]}


@fuzz
@given(
    c=cases(),
    m=st.integers(1, 3),
    alpha=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    kind=st.sampled_from(["static", "log"]),
    units=st.sampled_from([0.0, 8.0, 1e3]),
    options=st.fixed_dictionaries(
        dict(
            delta=st.sampled_from([0.0, 1e-30, 0.5, 1e4]),
            clip_eps=st.sampled_from([0.0, 0.2, 1e5]),
            wpl=st.booleans(),
            inner_epochs=st.integers(1, 3),
        )
    ),
    wrong=st.sampled_from([None] * 60 + [(name, value) for name, bad in BAD.items() for value in bad]),
)
def test_explore_and_erl_objective(c, m, alpha, kind, units, options, wrong):
    """A whole step: finite, its gradient at the perturbed decisions alone, and the same whatever padding holds."""
    first = dict(top_k=c.K, alpha=alpha, n_perturb=m, advantage=kind, rounding_units=units)

    def step(junk):
        """-> paths, and of each inner epoch the loss, its gradient and its metrics"""
        model = Passes(c, m, largest=4 if kind == "log" else 30, junk=junk)
        paths = explore(model.forward, c.mask(), dtype=c.dtype, generator=c.generator(1), **first)
        found = []
        for loss, metrics in erl_objective(model.forward, paths, **options):
            found.append((loss.detach(), *torch.autograd.grad(loss, model.routers[-1]), metrics))
        return paths, found

    if wrong:
        name, value = wrong
        (first if name in first else options)[name] = value
        with pytest.raises(ValueError):
            step(False)
        return
    paths, found = step(True)
    assert not paths.S[~c.mask().repeat(m, 1)].any() and (0 <= paths.experts).all() and (paths.experts < c.E).all()
    read = paths.advantages[paths.S.any(-1)]
    old = c.numbers(2, c.B, c.T, largest=4 if kind == "log" else 30).repeat(m, 1)
    gain, bound = c.near(3, old) - old, units * torch.finfo(c.dtype).eps * old.abs().clamp(min=4)
    inside, outside = (gain.abs() < 0.9 * bound) | (gain == 0), gain.abs() > 1.1 * bound  # the type rounds the gain
    sign = paths.advantages.sign().double()
    for where, expected in ((inside, 0 * gain), (outside, gain.sign())):
        assert torch.equal(*(x[where & paths.S.any(-1)] for x in (sign, expected)))
    assert read.isfinite().all() and (kind == "log" or set(read.tolist()) <= {-1, 0, 1})
    chosen = torch.zeros_like(found[0][1]).scatter(-1, paths.experts, 1) * paths.S[..., None]
    for epoch, (loss, gradient, metrics) in enumerate(found):
        assert loss.isfinite() and all(x.isfinite() for x in metrics.values()), (loss, metrics)
        assert gradient.isfinite().all() or c.dtype == torch.float16 and not gradient.isnan().any(), gradient
        assert not gradient[chosen == 0].any()
        if epoch == 0:
            assert metrics["ratio_mean"] == paths.S.any() and metrics["clip_share"] == 0
        L_p = metrics["rl_loss"] + (paths.perturbed.loss if options["wpl"] and epoch == 0 else 0)
        L_o = paths.original.loss if epoch == 0 else 0
        torch.testing.assert_close(loss, (L_o + options["delta"] * L_p).to(loss.dtype))
    again, clean = step(False)
    assert torch.equal(paths.S, again.S) and torch.equal(read, again.advantages[again.S.any(-1)])
    for (loss, gradient, metrics), (clean_loss, clean_gradient, clean_metrics) in zip(found, clean, strict=True):
        assert torch.equal(loss, clean_loss) and torch.equal(gradient, clean_gradient)
        assert all(torch.equal(x, clean_metrics[k]) for k, x in metrics.items())


def test_every_public_function_of_the_losses_is_fuzzed():
    text = Path(__file__).read_text()
    for module in map(sys.modules.get, ("erl", "erpo", "rais", "baselines")):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == module.__name__ and name[0] != "_":
                assert text.count(name) > 1, name  # imported and used
