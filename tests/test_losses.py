"""What holds of every loss, on values from 1e-30 to 1e30, either sign, in four types and odd shapes."""

import math
from collections import namedtuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import baselines
from baselines import group_advantages, mismatch_weights
from erl import Pass, erl_loss, erl_objective, explore
from erpo import erpo_loss
from rais import rais_loss, router_shift

many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LOW = [torch.bfloat16, torch.float16, torch.float32]


class Case(namedtuple("Case", "B G T L K E smallest largest dtype junk seed")):
    """Sizes, how large the numbers are (powers of ten), the type, what padding holds, and the seed of the rest."""

    def generator(self, stream):
        return torch.Generator().manual_seed(17 * self.seed + stream)

    def numbers(self, stream, *shape, largest=30):
        """Of either sign, sizes from 10^smallest to 10^largest: float64, exact in the case's type."""
        g = self.generator(stream)
        top = max(self.smallest, min(self.largest, largest, 4 if self.dtype == torch.float16 else 30))
        power = self.smallest + (top - self.smallest) * torch.rand(shape, generator=g, dtype=torch.float64)
        return ((torch.randint(2, shape, generator=g) * 2 - 1) * 10**power).to(self.dtype).double()

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
    G, E, smallest = draw(st.integers(2, 4)), draw(st.integers(1, 5)), draw(st.integers(-30, 1))
    B, K, largest = G * draw(st.integers(1, 2)), draw(st.integers(1, E)), draw(st.integers(smallest, 30))
    T, L, dtype = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.sampled_from([*LOW, torch.float64]))
    junk = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
    return Case(B, G, T, L, K, E, smallest, largest, dtype, junk, draw(st.integers(0, 10**6)))


def policy(c):
    """log_probs, old_log_probs [B, T]: half of the cases far apart, half closer. Log-probabilities are at most 0."""
    old = -c.numbers(2, c.B, c.T).abs()
    return (c.near(3, old) if c.seed % 2 else -c.numbers(3, c.B, c.T).abs()).clamp(max=0), old


def routers(c):
    """Two log-softmaxes [B, T, L, K] at K distinct experts, and these [B, T, L, K]."""
    logits = c.numbers(4, c.B, c.T, c.L, c.E)
    experts = torch.rand(logits.shape, generator=c.generator(5)).topk(c.K).indices
    pair = (x.log_softmax(-1).gather(-1, experts) for x in (c.near(6, logits), logits))
    limit = -6e4 if c.dtype == torch.float16 else -1e38
    return *(x.clamp(min=limit).to(c.dtype).double() for x in pair), experts


def arguments_of(c, name):
    """-> tensors by position, options, weights. The first two tensors are a policy's, now and before."""
    new, old = policy(c)
    router, old_router, experts = routers(c)
    weights = 3 * torch.rand(c.B, c.T, generator=c.generator(10)).double() if c.seed % 2 else None
    A = c.numbers(7, c.B, c.T, largest=4)
    if name == "erl":
        S = c.mask()[:, :, None] & (torch.rand(c.B, c.T, c.L, generator=c.generator(8)) < 0.6)
        return [router, old_router, A, S], {"clip_eps": (0.2, 0.0, math.inf)[c.seed % 3]}
    if name == "erpo":  # in half of the cases rewards of any size
        R = c.numbers(7, c.B) if c.seed % 4 < 2 else torch.randint(3, (c.B,), generator=c.generator(7)).double() / 2
        stays = torch.rand(c.B, c.T, c.L, 1, generator=c.generator(8)) < 0.7
        other = torch.rand(c.B, c.T, c.L, c.E, generator=c.generator(9)).topk(c.K).indices
        kind, alpha = ("relative", "absolute", "none")[c.seed // 3 % 3], (0.2, 0.0, 1.0)[c.seed % 3]
        options = dict(num_experts=c.E, group_size=c.G, alpha=alpha, entropy_reward=kind, weights=weights)
        probs = [x.exp().to(c.dtype).double() for x in (router, old_router)]
        return [new, old, R, c.mask(), torch.where(stays, experts, other), experts, *probs], options
    options = {"weights": weights}
    if name.startswith("rais"):
        options |= dict(base=name[5:], floor=(0.8, 0.0, 1.0)[c.seed % 3], layers=("mean", "sum")[c.seed % 2])
    return [new, old, A[:, 0], c.mask(), *([router, old_router] if name.startswith("rais") else [])], options


LOSSES = {name: getattr(baselines, f"{name}_loss") for name in ("grpo", "gspo", "gmpo", "cispo", "sapo", "dppo")}
LOSSES |= {f"rais {base}": rais_loss for base in ("gmpo", "gspo", "grpo")}
LOSSES |= {"erpo": erpo_loss, "erl": erl_loss}
losses = pytest.mark.parametrize("name", LOSSES)


def mask_of(tensors):
    """The mask of the response, in ERL S."""
    return next(x for x in tensors if x.dtype == torch.bool)


def padded(c, tensors, options):
    """The same arguments with junk wherever the mask is false."""
    mask = mask_of(tensors)

    def pad(x):
        if x.dim() == 2 and mask.dim() == 3:  # ERL's advantages: a token's, none of whose decisions is in S
            return torch.where(mask.any(-1), x, c.junk)
        junk = c.junk if x.is_floating_point() else (-1, 10**6)[c.seed % 2]
        return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), x, junk) if x.dim() > 1 else x

    tensors = [x if x is mask else pad(x) for x in tensors]
    return tensors, {k: pad(x) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


def evaluate(loss, tensors, options, dtype):
    """-> loss, gradient, metrics, all float64."""
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
    new = inputs[0].requires_grad_()
    value, metrics = loss(*inputs, **options)
    (gradient,) = torch.autograd.grad(value, new)
    assert value.shape == () and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype and all(m.shape == () and not m.requires_grad for m in metrics.values())
    return value.detach().double(), gradient.double(), metrics


@losses
@many
@given(c=cases())
def test_finite_or_refused_and_padding_is_nothing(name, c):
    """Padding (NaN, infinities, ids of -1 or 10^6) changes nothing, to the bit. No token goes against its advantage."""
    tensors, options = arguments_of(c, name)
    if name == "erpo" and (tensors[2].abs() >= 1e15).any():
        with pytest.raises(ValueError, match="rewards"):
            evaluate(erpo_loss, tensors, options, c.dtype)
        return
    value, gradient, metrics = evaluate(LOSSES[name], *padded(c, tensors, options), c.dtype)
    assert value.isfinite() and not gradient.isnan().any(), (value, gradient)
    assert gradient.isfinite().all() or c.dtype == torch.float16, gradient  # which ends at 65504
    if metrics.get("gamma_min") != 0:  # without a floor gamma may be 0, and -log of it infinite
        assert all(m.isfinite() for m in metrics.values()), metrics
    clean_value, clean_gradient, clean_metrics = evaluate(LOSSES[name], tensors, options, c.dtype)
    assert torch.equal(value, clean_value) and torch.equal(gradient, clean_gradient)
    assert all(torch.equal(m, clean_metrics[k]) for k, m in metrics.items())
    if name != "erpo":  # a token with A > 0 never becomes less likely, one with A < 0 never more
        A = tensors[2].view(*tensors[2].shape, *[1] * (gradient.dim() - tensors[2].dim()))
        assert (gradient * A <= 0).all()
    assert not gradient[~mask_of(tensors)].any()


@losses
@many
@given(c=cases())
def test_rows_of_their_own_weigh_the_same_however_many(name, c):
    """The batch twice has the loss and metrics of once, and half of the gradient in each copy, in any order."""
    tensors, options = arguments_of(c, name)
    assume((tensors[0] - tensors[1]).abs().max() < 30 and options.get("floor") != 0)
    assume(name != "erpo" or tensors[2].abs().max() <= 1)
    once, gradient, metrics = evaluate(LOSSES[name], tensors, options, torch.float64)
    groups = torch.randperm(2 * c.B // c.G, generator=c.generator(11)) % (c.B // c.G)  # each twice, in another order
    rows = (groups[:, None] * c.G + torch.arange(c.G)).flatten()
    options = {k: x[rows] if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    twice, halves, same = evaluate(LOSSES[name], [x[rows] for x in tensors], options, torch.float64)
    terms = (gradient.abs() * (1 + tensors[0].abs())).sum() + tensors[2].abs().max()  # what cancels in the sums
    assert (twice - once).abs() <= 1e-9 * terms
    torch.testing.assert_close(halves, gradient[rows] / 2, rtol=1e-9, atol=1e-300)
    for k in metrics.keys() - {"clusters", "dropped_clusters", "ratio_std"}:
        torch.testing.assert_close(same[k].double(), metrics[k].double(), rtol=1e-5, atol=1e-12)


@losses
@many
@given(c=cases())
def test_low_precision_gives_what_float64_gives(name, c):
    """The value, with a range so wide that no ratio lies at its end, and the gradient."""
    assume(c.dtype in LOW and (name != "erpo" or c.seed % 4 > 1))  # of ERPO's rewards the plain ones
    tensors, options = arguments_of(c, name)
    mask = mask_of(tensors)
    assume(mask.any() and options.get("floor") != 0)
    new, old = tensors[0][mask], tensors[1][mask]
    far = (new.max() - old.min() if name == "erpo" else (new - old).abs().max()).item()
    assume(far < 10)
    options |= {"clip_eps": 1e5} if name == "erl" else {} if name == "sapo" else {"clip_low": 1e5, "clip_high": 1e5}
    options |= {"entropy_reward": "none"} if name == "erpo" else {}
    tolerance = 2e-5 + (1e-6 * old.abs().max().item() if name[:4] in ("erpo", "rais") else 0)  # sums with log pi_old
    tolerance *= math.exp(max(far, 0)) * max(1, 0 if name == "erpo" else tensors[2].abs().max().item()) * 3
    tolerance *= max(1, new.abs().max().item()) if name in ("cispo", "dppo") else 1
    value, gradient, _ = evaluate(LOSSES[name], tensors, options, c.dtype)
    book, slope, _ = evaluate(LOSSES[name], tensors, options, torch.float64)
    assert abs(value - book) <= tolerance
    type_ = torch.finfo(c.dtype)  # in which the gradient is handed over
    close = (gradient - slope).abs() <= tolerance + type_.eps * slope.abs().clamp(min=type_.tiny)
    assert (close | (slope.abs() > type_.max / 2)).all(), (gradient, slope)


@losses
def test_log_ratios_beyond_the_range_of_exp(name):
    """No overflow: above 40 a log ratio counts as 40, in a row with A < 0, which no clip stops, to the digit."""
    rows, routes = torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, 2, 1, 1)
    more, options = ([routes] * 2, {"base": name[5:]}) if name.startswith("rais") else ([], {})
    if name == "erpo":  # the rewards of a group of four, centred already
        more, options = [routes.long()] * 2 + [routes + 0.5] * 2, {"num_experts": 1, "group_size": 4}

    def loss_at(log_ratio, A=(-1, 1, 1, -1), dtype=torch.float64):
        old, A = torch.full((4, 2), -1, dtype=dtype), torch.tensor(A, dtype=dtype)
        new, old[0] = old.clone(), -1 - log_ratio
        inputs = [new, old, A, rows, *more]
        if name == "erl":
            inputs = [new[..., None, None], old[..., None, None], A[:, None].expand(4, 2), rows[..., None]]
        loss, gradient, metrics = evaluate(LOSSES[name], inputs, options, dtype)
        assert all(x.isfinite().all() for x in (loss, gradient, *metrics.values())) and (A.any() or not gradient.any())
        return loss.item()

    for log_ratio in (1e3, 90, -90, -1e3):
        assert loss_at(log_ratio, A=(0, 0, 0, 0), dtype=torch.float32) == 0
        assert loss_at(log_ratio, dtype=torch.float32) != loss_at(log_ratio, A=(1, -1, 1, -1), dtype=torch.float32)
    growth = 1 if name in ("cispo", "sapo", "dppo") else math.exp(0.5)  # the three bound it
    assert loss_at(1e3) == pytest.approx(loss_at(41), rel=1e-12)
    assert loss_at(1e3) == pytest.approx(loss_at(39.5) * growth, rel=1e-9)


@many
@given(c=cases(), floor=st.floats(0, 1))
def test_what_the_losses_are_given(c, floor):
    """Advantages bounded by sqrt(G), gamma within its floor, weights within their bounds."""
    rewards = c.numbers(7, c.B, largest=14)
    A = group_advantages(rewards.to(c.dtype), c.G)
    assert A.isfinite().all() and A.abs().max() <= c.G**0.5 and A.view(-1, c.G).sum(1).abs().max() < 0.01
    new, old, _ = routers(c)
    gamma = router_shift(new.to(c.dtype), old.to(c.dtype), floor=floor, layers=("mean", "sum")[c.seed % 2])
    assert (gamma >= torch.tensor(floor, dtype=gamma.dtype)).all() and (gamma <= 1).all()
    (new, old), mask = policy(c), c.mask()
    tis, icepop, rows = (mismatch_weights(new, old, mask, kind=k) for k in ("tis", "icepop", "sequence-mask"))
    assert ((tis >= 0) & (tis <= 2)).all() and (((icepop >= 0.5) & (icepop <= 5)) | (icepop == 0)).all()
    assert (rows.amax(1) <= 3).all() and all(len({*row[m].tolist()}) <= 1 for row, m in zip(rows, mask, strict=True))


@many
@given(c=cases(), m=st.integers(1, 3), wpl=st.booleans(), epochs=st.integers(1, 3), uniform=st.booleans())
def test_explore_and_erl_objective(c, m, wpl, epochs, uniform):
    """A whole step: finite, its gradient at the perturbed decisions alone, and the same whatever padding holds."""
    epochs = 1 if uniform else epochs
    delta, alpha = (0.0, 0.5, 1e4)[c.seed % 3], (0.0, 0.3, 1.0)[c.seed // 3 % 3]

    def step(junk):
        """-> paths, and of each inner epoch the loss, its gradient and its metrics"""
        passes = []

        def forward(routes):
            B = c.B * (1 if routes is None else m)
            old = -c.numbers(2, c.B, c.T).abs().repeat(B // c.B, 1)
            logits = c.near(10 + len(passes), c.numbers(4, B, c.T, c.L, c.E))
            given = [old if routes is None else c.near(3, old), logits.log_softmax(-1).clamp(min=-6e4)]
            padding = ~c.mask().repeat(B // c.B, 1)
            given = [x.masked_fill(padding.view(*x.shape[:2], *[1] * (x.dim() - 2)), junk).to(c.dtype) for x in given]
            passes.append(given[1].requires_grad_())
            return Pass(*given, torch.tensor(1.5).to(c.dtype))

        paths = explore(forward, c.mask(), c.K, alpha=alpha, n_perturb=m, dtype=c.dtype, generator=c.generator(1))
        options = dict(delta=delta, wpl=wpl, inner_epochs=epochs, ratio="uniform" if uniform else "router")
        found = []
        for loss, metrics in erl_objective(forward, paths, **options):
            found.append((loss.detach().double(), *torch.autograd.grad(loss, passes[-1]), metrics))
        return paths, found

    (paths, found), (again, clean) = step(c.junk), step(0.0)
    inside = paths.S.any(-1)
    assert torch.equal(paths.S, again.S) and torch.equal(paths.advantages[inside], again.advantages[inside])
    chosen = torch.zeros_like(found[0][1]).scatter(-1, paths.experts, 1) * paths.S[..., None]
    for epoch, ((loss, gradient, metrics), other) in enumerate(zip(found, clean, strict=True)):
        assert loss.isfinite() and all(x.isfinite() for x in metrics.values()) and not gradient.isnan().any()
        assert not gradient[chosen == 0].any() and torch.equal(loss, other[0]) and torch.equal(gradient, other[1])
        L_p = metrics["rl_loss"].double() + 1.5 * (wpl and epoch == 0)
        torch.testing.assert_close(loss, 1.5 * (epoch == 0) + delta * L_p, rtol=1e-5, atol=1e-9)
