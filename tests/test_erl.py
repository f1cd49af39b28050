"""erl.py: eq. 6-14 and 18 of the ERL paper."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from erl import erl_advantage, erl_loss, erl_objective, explore, random_routes, rounding

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
seeds = st.integers(0, 10_000)


def make(seed, B=2, T=4, L=2, K=2, share=0.6, spread=0.4, dtype=torch.float64):
    """new, old [B,T,L,K], advantages [B,T], perturbed [B,T,L]; ratios on both sides of the clip range."""
    g = torch.Generator().manual_seed(seed)
    old = torch.log_softmax(torch.randn(B, T, L, 8, generator=g, dtype=torch.float64), -1)[..., :K]
    new = old + spread * torch.randn(B, T, L, K, generator=g, dtype=torch.float64)
    advantages = torch.randint(-1, 2, (B, T), generator=g).double()
    perturbed = torch.rand(B, T, L, generator=g) < share
    return new.to(dtype), old.to(dtype), advantages.to(dtype), perturbed


# ------------------------------------------------------------------------------------------------------ random_routes


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(3, 9), st.floats(0, 1), seeds)
def test_random_routes_are_distinct_experts_in_range(shape, num_experts, alpha, seed):
    B, T, L, K = shape
    g = torch.Generator().manual_seed(seed)
    experts, perturbed = random_routes(B, T, L, num_experts, K, alpha, generator=g)
    assert experts.shape == (B, T, L, K) and experts.dtype == torch.int64
    assert perturbed.shape == (B, T, L) and perturbed.dtype == torch.bool
    assert experts.min() >= 0 and experts.max() < num_experts
    assert all(len(set(row)) == K for row in experts.reshape(-1, K).tolist())


def test_alpha_zero_perturbs_nothing_and_one_everything(monkeypatch):
    assert not random_routes(4, 50, 3, 8, 1, 0.0)[1].any()
    assert random_routes(4, 50, 3, 8, 1, 1.0)[1].all()
    # nor where the generator happens to draw exactly 0, its smallest number
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))
    assert not random_routes(1, 2, 3, 8, 1, 0.0)[1].any()


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.6, 0.9])
def test_perturbed_share_is_near_alpha(alpha):
    g = torch.Generator().manual_seed(1)
    n = 8 * 200 * 6
    share = random_routes(8, 200, 6, 8, 1, alpha, generator=g)[1].double().mean().item()
    assert abs(share - alpha) < 5 * (alpha * (1 - alpha) / n) ** 0.5  # five standard deviations


def test_decisions_are_drawn_one_by_one():
    """Not whole tokens or whole layers: within a token the layers agree as often as independent draws do."""
    g = torch.Generator().manual_seed(2)
    perturbed = random_routes(8, 400, 2, 8, 1, 0.5, generator=g)[1]
    agree = (perturbed[..., 0] == perturbed[..., 1]).double().mean().item()
    assert abs(agree - 0.5) < 0.05


def test_every_expert_is_equally_likely():
    g = torch.Generator().manual_seed(3)
    experts = random_routes(4, 1000, 2, 8, 2, 0.5, generator=g)[0]
    share = experts.flatten().bincount(minlength=8) / experts.numel()
    assert (share - 1 / 8).abs().max() < 0.01


def test_alpha_per_row_and_the_same_experts_whatever_alpha():
    alpha = torch.tensor([0.0, 1.0, 0.5])
    experts, perturbed = random_routes(3, 400, 2, 8, 2, alpha, generator=torch.Generator().manual_seed(4))
    assert not perturbed[0].any() and perturbed[1].all()
    assert 0.4 < perturbed[2].float().mean() < 0.6
    again, fewer = random_routes(3, 400, 2, 8, 2, 0.1, generator=torch.Generator().manual_seed(4))
    assert torch.equal(experts, again) and not fewer.all()
    same = random_routes(3, 400, 2, 8, 2, alpha, generator=torch.Generator().manual_seed(4))
    assert torch.equal(same[0], experts) and torch.equal(same[1], perturbed)


def test_routes_are_drawn_on_the_device_asked_for():
    for alpha in (0.5, torch.tensor([0.1, 0.9])):
        experts, perturbed = random_routes(2, 3, 1, 4, 2, alpha, device="meta")
        assert experts.device.type == perturbed.device.type == "meta"


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), torch.tensor([0.5, 2.0]), torch.tensor([0.5] * 3)])
def test_random_routes_refuses_a_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        random_routes(2, 3, 1, 4, 1, alpha)


@pytest.mark.parametrize("top_k", [0, 5])
def test_random_routes_refuses_a_bad_top_k(top_k):
    with pytest.raises(ValueError, match="top_k .*4"):
        random_routes(2, 3, 1, 4, top_k, 0.5)


# ------------------------------------------------------------------------------------------------------ erl_advantage


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from(["static", "log"]))
def test_advantage_equals_the_reference(seed, kind):
    g = torch.Generator().manual_seed(seed)
    p, o = -torch.rand(2, 3, 5, generator=g).double() * 9
    p[0, 0] = o[0, 0]  # a tie
    A = erl_advantage(p, o, kind)
    np.testing.assert_allclose(A.numpy(), reference.erl_advantage(p.numpy(), o.numpy(), kind), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_advantage_signs(seed, dtype):
    """The sign is that of the difference of probabilities; equal log-probabilities give exactly 0."""
    g = torch.Generator().manual_seed(seed)
    p, o = (-torch.rand(2, 40, generator=g) * 3).to(dtype)
    A = erl_advantage(p, o)
    assert A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(A, torch.sign(p.double().exp() - o.double().exp()).to(A.dtype))
    assert (erl_advantage(p, p) == 0).all() and (erl_advantage(p, p, "log") == 0).all()
    assert torch.equal(erl_advantage(o, p), -A)


def test_advantage_does_not_underflow():
    """exp(-200) and exp(-210) are both 0 in float32; the better one still gets its +1."""
    p, o = torch.tensor([-200.0]), torch.tensor([-210.0])
    assert torch.equal(p.exp(), o.exp())
    assert erl_advantage(p, o).item() == 1


def test_advantage_carries_no_gradient():
    p = torch.zeros(2, 3, requires_grad=True)
    for kind in ("static", "log"):
        assert not erl_advantage(p, p, kind).requires_grad


def test_advantage_refuses_bad_arguments():
    with pytest.raises(ValueError, match="kind.*'relative'"):
        erl_advantage(torch.zeros(2), torch.zeros(2), "relative")
    with pytest.raises(ValueError, match=r"^original_log_probs .*\[2, 3\].*\[2, 4\]"):
        erl_advantage(torch.zeros(2, 3), torch.zeros(2, 4))


# ----------------------------------------------------------------------------------------------------------- erl_loss


@settings(deadline=None, max_examples=50)
@given(shapes, seeds, st.floats(0, 1), st.floats(0.01, 0.9))
def test_loss_equals_the_reference(shape, seed, share, clip_eps):
    inputs = make(seed, *shape, share=share)
    loss, _ = erl_loss(*inputs, clip_eps=clip_eps)
    expected = reference.erl_loss(*(x.numpy() for x in inputs), clip_eps)
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-12)


def test_loss_of_one_decision_by_hand():
    """P moves from 0.1 to 0.15, ratio 1.5, clip at 1.2: gained with A = +1, paid in full with A = -1."""
    new, old = torch.full((1, 1, 1, 1), 0.15).log(), torch.full((1, 1, 1, 1), 0.1).log()
    perturbed = torch.ones(1, 1, 1, dtype=torch.bool)
    for A, expected, clip_share in ((1.0, -1.2, 1.0), (-1.0, 1.5, 0.0), (0.0, 0.0, 0.0)):
        loss, metrics = erl_loss(new, old, torch.full((1, 1), A), perturbed, clip_eps=0.2)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert metrics["clip_share"].item() == clip_share
        assert metrics["ratio_mean"].item() == pytest.approx(1.5, rel=1e-6)


def test_gradient_by_hand_and_by_finite_differences():
    new, old, advantages, perturbed = make(5)
    new.requires_grad_()
    loss, _ = erl_loss(new, old, advantages, perturbed)
    loss.backward()
    ratio, A = (new - old).exp().detach(), advantages[:, :, None, None]
    cut = ((A > 0) & (ratio > 1.2)) | ((A < 0) & (ratio < 0.8)) | ~perturbed[..., None]
    expected = torch.where(cut, 0.0, -ratio * A) / (perturbed.sum() * 2)
    torch.testing.assert_close(new.grad, expected)
    assert cut.any() and (expected != 0).any()
    base, step = new.detach(), 1e-6
    for index in [(0, 0, 0, 0), (1, 2, 1, 1), (0, 3, 1, 0)]:
        up, down = base.clone(), base.clone()
        up[index] += step
        down[index] -= step
        slope = (erl_loss(up, old, advantages, perturbed)[0] - erl_loss(down, old, advantages, perturbed)[0]) / 2 / step
        assert slope.item() == pytest.approx(new.grad[index].item(), abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(seed):
    new, old, advantages, perturbed = make(seed)
    assert gradcheck(lambda x: erl_loss(x, old, advantages, perturbed)[0], new.requires_grad_())


def test_better_routes_become_more_probable():
    """A gradient step on router logits raises P of the random expert where A = +1 and lowers it where A = -1."""
    logits = torch.zeros(1, 2, 1, 4, requires_grad=True)
    chosen = torch.tensor([1, 3]).view(1, 2, 1, 1)
    log_probs = torch.log_softmax(logits, -1).gather(-1, chosen)
    perturbed = torch.ones(1, 2, 1, dtype=torch.bool)
    loss, metrics = erl_loss(log_probs, log_probs.detach(), torch.tensor([[1.0, -1.0]]), perturbed)
    loss.backward()
    moved = torch.softmax(logits.detach() - logits.grad, -1).gather(-1, chosen).flatten()
    assert moved[0] > 0.25 > moved[1]
    assert metrics["advantage_positive"].item() == metrics["advantage_negative"].item() == 0.5


def test_first_ratio_is_exactly_one():
    new, _, advantages, perturbed = make(6, dtype=torch.float32)
    loss, metrics = erl_loss(new, new, advantages, perturbed)
    assert metrics["ratio_mean"].item() == 1 and metrics["clip_share"].item() == 0
    expected = -(advantages[..., None] * perturbed).sum() / perturbed.sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-7)


def test_clip_share_shows_when_the_clip_acts():
    new, old, _, perturbed = make(7, spread=0.0)
    ones = torch.ones(2, 4, dtype=torch.float64)
    assert erl_loss(new + 1, old, ones, perturbed)[1]["clip_share"] == 1
    assert erl_loss(new - 1, old, ones, perturbed)[1]["clip_share"] == 0  # min() leaves the way back open
    assert erl_loss(new - 1, old, -ones, perturbed)[1]["clip_share"] == 1


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0, 0.9))
def test_clipping_bounds(seed, eps):
    """With A = +1 a decision never earns more than 1 + eps, with A = -1 it never costs less than 1 - eps."""
    new, old, _, perturbed = make(seed, 1, 1, 1, 1, share=1.1, spread=3)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert -erl_loss(new, old, one, perturbed, clip_eps=eps)[0] <= 1 + eps + 1e-12
    assert erl_loss(new, old, -one, perturbed, clip_eps=eps)[0] >= 1 - eps - 1e-12


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_entries_outside_the_set_change_nothing(junk):
    new, old, advantages, perturbed = make(8)
    perturbed[0, 1] = False  # a position with no perturbed decision at all, such as padding
    clean = new.clone().requires_grad_()
    expected, expected_metrics = erl_loss(clean, old, advantages, perturbed)
    expected.backward()

    outside = ~perturbed[..., None].expand_as(new)
    dirty = new.masked_fill(outside, junk).requires_grad_()
    dirty_advantages = advantages.clone()
    dirty_advantages[0, 1] = junk
    loss, metrics = erl_loss(dirty, old.masked_fill(outside, -junk), dirty_advantages, perturbed)
    loss.backward()
    assert loss.item() == expected.item() and torch.equal(dirty.grad, clean.grad)
    assert (dirty.grad[outside] == 0).all()
    assert {k: v.item() for k, v in metrics.items()} == {k: v.item() for k, v in expected_metrics.items()}


def test_extra_padding_changes_nothing():
    """Numerator and denominator run over the same set: three more columns of padding leave loss and gradient."""
    new, old, advantages, perturbed = make(9)
    wide = [
        torch.cat([x, torch.full_like(x[:, :1], float("nan")).expand(-1, 3, *x.shape[2:])], 1)
        for x in (new, old, advantages)
    ]
    wide_mask = torch.cat([perturbed, torch.zeros(2, 3, 2, dtype=torch.bool)], 1)
    a, b = new.clone().requires_grad_(), wide[0].clone().requires_grad_()
    narrow, wider = erl_loss(a, old, advantages, perturbed)[0], erl_loss(b, *wide[1:], wide_mask)[0]
    (narrow + wider).backward()
    assert wider.item() == pytest.approx(narrow.item(), rel=1e-12)
    torch.testing.assert_close(b.grad[:, :4], a.grad)


def test_the_mean_runs_over_decisions_not_rows():
    """eq. 14: one set S. A row with 3 decisions weighs three times a row with 1."""
    new, old, _, _ = make(10, 2, 4, 1, 1, spread=0.0)
    advantages = torch.tensor([[1.0] * 4, [-1.0] * 4], dtype=torch.float64)
    perturbed = torch.zeros(2, 4, 1, dtype=torch.bool)
    perturbed[0, :3] = perturbed[1, 0] = True
    assert erl_loss(new, old, advantages, perturbed)[0].item() == pytest.approx(-0.5)


def test_credit_goes_to_the_position_that_predicts():
    """Off by one: only position 1 has an advantage, so only the routing of position 1 gets a gradient."""
    new, old, _, _ = make(11, 1, 4, 2, 1, spread=0.0)
    advantages = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    new.requires_grad_()
    erl_loss(new, old, advantages, torch.ones(1, 4, 2, dtype=torch.bool))[0].backward()
    assert (new.grad[0, 1] < 0).all() and (new.grad[0, [0, 2, 3]] == 0).all()


def test_gradient_reaches_the_new_probabilities_alone():
    inputs = [x.requires_grad_() for x in make(12)[:3]]
    erl_loss(*inputs, make(12)[3])[0].backward()
    assert inputs[0].grad is not None and inputs[1].grad is None and inputs[2].grad is None


@pytest.mark.parametrize("shape", [(2, 4, 2, 2), (0, 4, 2, 2), (2, 0, 2, 2)])
def test_no_perturbed_decision_gives_a_zero_that_can_be_differentiated(shape):
    new, old, advantages, perturbed = make(13, *shape)
    new = torch.full_like(new, float("nan")).requires_grad_()
    loss, metrics = erl_loss(new, old, advantages, torch.zeros_like(perturbed))
    loss.backward()
    assert loss.item() == 0 and (new.grad == 0).all()
    assert all(torch.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    """Low precision is computed in float32: the loss is that of the rounded inputs, not of rounded steps."""
    new, old, advantages, perturbed = make(14, dtype=dtype)
    new.requires_grad_()
    loss, metrics = erl_loss(new, old, advantages, perturbed)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert new.grad.dtype == dtype and new.grad.abs().sum() > 0
    expected = reference.erl_loss(*(x.detach().double().numpy() for x in (new, old, advantages)), perturbed.numpy())
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())


def test_loss_refuses_bad_arguments():
    new, old, advantages, perturbed = make(15)
    with pytest.raises(ValueError, match=r"^router_log_probs .*\[B, T, L, K\].*\[2, 4, 2\]"):
        erl_loss(new[..., 0], old, advantages, perturbed)
    with pytest.raises(ValueError, match=r"^router_log_probs .*K > 0.*\[2, 4, 2, 0\]"):
        erl_loss(new[..., :0], old[..., :0], advantages, perturbed)
    with pytest.raises(ValueError, match=r"^old_router_log_probs .*\[2, 4, 2, 2\].*\[2, 4, 2, 1\]"):
        erl_loss(new, old[..., :1], advantages, perturbed)
    with pytest.raises(ValueError, match=r"^advantages .*\[2, 4\].*\[2, 3\]"):
        erl_loss(new, old, advantages[:, 1:], perturbed)
    with pytest.raises(ValueError, match=r"^perturbed .*\[2, 4, 2\].*\[2, 4\]"):
        erl_loss(new, old, advantages, perturbed[..., 0])
    with pytest.raises(ValueError, match="^perturbed .*bool.*float32"):
        erl_loss(new, old, advantages, perturbed.float())
    for eps in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="clip_eps"):
            erl_loss(new, old, advantages, perturbed, clip_eps=eps)


# ------------------------------------------------------------------------------------------ explore and erl_objective


class Toy:
    """A model whose router and words are small tables: every number of a pass can be computed by hand.

    log p of the token at t falls by `harm[e]` for each expert e that a layer uses there with weight 1 / K.
    """

    def __init__(self, B=2, T=5, L=2, E=4, K=2, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.shape = B, T, L, E, K
        self.router = torch.randn(B, T, L, E, generator=g, dtype=torch.float64, requires_grad=True)
        self.words = torch.randn(B, T, generator=g, dtype=torch.float64, requires_grad=True)
        self.harm = torch.randn(E, generator=g, dtype=torch.float64)
        self.asked = []

    def __call__(self, routes):
        B, T, L, E, K = self.shape
        self.asked.append(routes)
        log_probs, router = self.words - 3, self.router.log_softmax(-1)
        if routes is None:
            return log_probs, router, (self.words**2).mean()
        experts, S = routes
        m = len(experts) // B
        cost = (self.harm[experts].mean(-1) * S).sum(-1)  # [m * B, T]
        log_probs = log_probs.repeat(m, 1) - cost
        return log_probs, router.repeat(m, 1, 1, 1), (log_probs**2).mean()


def explored(toy, mask=None, **options):
    B, T, L, E, K = toy.shape
    mask = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    return explore(toy, mask, K, generator=torch.Generator().manual_seed(7), dtype=torch.float64, **options)


@pytest.mark.parametrize("advantage", ["static", "log"])
def test_explore_by_hand(advantage):
    """Rows j * B + b are perturbed pass j of row b; a token's advantage is minus what its random experts cost."""
    toy = Toy()
    B, T, L, E, K = toy.shape
    paths = explored(toy, advantage=advantage)
    assert paths.experts.shape == (3 * B, T, L, K) and paths.S.shape == (3 * B, T, L)
    for row in range(3 * B):
        for t in range(T):
            cost = sum(
                sum(toy.harm[e].item() / K for e in paths.experts[row, t, layer].tolist())
                for layer in range(L)
                if paths.S[row, t, layer]
            )
            want = -cost if advantage == "log" else float(np.sign(-cost))
            assert paths.advantages[row, t].item() == pytest.approx(want, abs=1e-12)
            for layer in range(L):
                row_probs = toy.router[row % B, t, layer].detach().softmax(-1)
                old = paths.old_router_log_probs[row, t, layer].exp()
                assert torch.allclose(old, row_probs[paths.experts[row, t, layer]])


def test_a_prompt_is_never_perturbed():
    toy = Toy(B=3, T=6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    paths = explored(toy, mask, alpha=1.0)
    assert torch.equal(paths.S, mask.repeat(3, 1)[..., None].expand(9, 6, 2))
    assert all(torch.equal(routes[1], paths.S) for routes in toy.asked[1:])  # what the model was told is S, no more


def test_the_generator_alone_decides_the_routes():
    """One perturbed pass is enough; what explore keeps has no gradient of its own."""
    first, second = explored(Toy(), n_perturb=1), explored(Toy(), n_perturb=1)
    assert first.S.shape == (2, 5, 2) and torch.equal(first.S, second.S) and torch.equal(first.experts, second.experts)
    assert not first.advantages.requires_grad and not first.old_router_log_probs.requires_grad


def test_routes_go_to_the_models_device():
    """Drawn on the CPU, where the mask may lie too; the model here lives on "meta", which holds no data."""

    def forward(routes):
        assert routes is None or all(x.device.type == "meta" for x in routes)
        rows = 2 if routes is None else 6
        return torch.zeros(rows, 5, device="meta"), torch.zeros(rows, 5, 2, 4, device="meta"), None

    paths = explore(forward, torch.ones(2, 5, dtype=torch.bool), 2)
    assert all(x.device.type == "meta" for x in paths[2:-1])


@pytest.mark.parametrize(("options", "units"), [({}, 8), ({"rounding_units": 16.0}, 16), ({"rounding_units": 0.0}, 0)])
def test_a_gap_of_exactly_the_bound_is_rounding(options, units):
    for gap, A in ((units, 0), (units + 1, 1), (-units - 1, -1)):

        def forward(routes, gap=gap):
            new = torch.full((1 if routes is None else 3, 2), -4.0, dtype=torch.float64)
            unit = 4 * torch.finfo(torch.float64).eps  # in the last place of a log-probability of -4
            return new + gap * unit * (routes is not None), torch.zeros(*new.shape, 1, 4).double().log_softmax(-1), None

        paths = explore(forward, torch.ones(1, 2, dtype=torch.bool), 1, dtype=torch.float64, **options)
        assert (paths.advantages == A).all()


def test_defaults_of_the_objective():
    """The paper's for text: delta 0.5, a clip of 0.2, no wPL, one step; delta 0 is the LM loss alone."""
    toy = Toy()
    paths = explored(toy)
    moved = paths._replace(
        old_router_log_probs=paths.old_router_log_probs
        + 0.3 * torch.randn(6, 5, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    )
    ((loss, metrics),) = erl_objective(toy, moved)
    new = toy.router.log_softmax(-1).repeat(3, 1, 1, 1).gather(-1, paths.experts)
    rl, expected = erl_loss(new, moved.old_router_log_probs, paths.advantages, paths.S, clip_eps=0.2)
    assert loss.item() == pytest.approx((paths.original[2] + 0.5 * rl).item(), abs=1e-12)
    assert metrics.keys() == expected.keys() and metrics["clip_share"] == expected["clip_share"] > 0
    ((loss, _),) = erl_objective(toy, moved, delta=0)
    assert loss.item() == paths.original[2].item()


def test_later_epochs_are_delta_times_the_rl_loss():
    toy = Toy()
    paths = explored(toy)
    epochs = erl_objective(toy, paths, delta=0.7, inner_epochs=2)
    next(epochs)
    with torch.no_grad():
        toy.router += torch.randn(toy.router.shape, generator=torch.Generator().manual_seed(1))
    loss, metrics = next(epochs)
    assert loss.item() == pytest.approx(0.7 * metrics["rl_loss"].item(), abs=1e-12) and abs(loss.item()) > 1e-3


@pytest.mark.parametrize("wpl", [False, True])
def test_objective_by_hand(wpl):
    toy = Toy()
    paths = explored(toy)
    (loss, metrics), *more = erl_objective(toy, paths, delta=0.7, clip_eps=0.1, wpl=wpl)
    new = toy.router.log_softmax(-1).repeat(3, 1, 1, 1).gather(-1, paths.experts)
    rl, _ = erl_loss(new, paths.old_router_log_probs, paths.advantages, paths.S, clip_eps=0.1)
    extra = toy((paths.experts, paths.S))[2] if wpl else 0
    assert not more
    assert loss.item() == pytest.approx((paths.original[2] + 0.7 * (rl + extra)).item(), abs=1e-12)  # eq. 15-17
    assert metrics["ratio_mean"].item() == pytest.approx(1, abs=1e-12)
    assert ("perturbed_lm_loss" in metrics) == wpl and not any(x.requires_grad for x in metrics.values())
    assert metrics.get("perturbed_lm_loss", 0) == extra
    loss.backward()
    assert toy.router.grad.abs().sum() > 0 and toy.words.grad.abs().sum() > 0


def test_inner_epochs_use_the_same_routes_and_learn_the_text_once():
    toy = Toy()
    paths, words, norms, ratios = explored(toy), toy.words.detach().clone(), [], []
    for loss, metrics in erl_objective(toy, paths, delta=2.0, wpl=True, inner_epochs=3):
        toy.router.grad = toy.words.grad = None
        loss.backward()
        norms.append(0.0 if toy.words.grad is None else toy.words.grad.norm().item())
        ratios.append(metrics["ratio_mean"].item())
        with torch.no_grad():  # the caller's optimizer
            toy.router -= 5 * toy.router.grad
    assert norms[0] > 0 and norms[1:] == [0, 0]  # no LM loss after the first
    assert ratios[0] == pytest.approx(1, abs=1e-12) and abs(ratios[2] - 1) > 1e-3
    assert all(torch.equal(r[0], paths.experts) and torch.equal(r[1], paths.S) for r in toy.asked[1:])
    assert len(toy.asked) == 4 and torch.equal(toy.words, words)


def test_better_routes_become_more_probable_through_the_whole_method():
    toy = Toy(B=1, T=40, L=1, E=4, K=1)
    before = (toy.router.softmax(-1) * toy.harm).sum(-1).mean().item()
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        paths = explore(toy, torch.ones(1, 40, dtype=torch.bool), 1, generator=generator, dtype=torch.float64)
        for loss, _ in erl_objective(toy, paths, delta=1.0):
            toy.router.grad = None
            loss.backward()
            with torch.no_grad():
                toy.router -= 20 * toy.router.grad
    assert (toy.router.softmax(-1) * toy.harm).sum(-1).mean().item() < before - 0.2


def test_gains_within_rounding_are_none():
    toy = Toy()
    toy.harm = toy.harm * 1e-8
    assert not explore(toy, torch.ones(2, 5, dtype=torch.bool), 2).advantages.any()  # float32: 2e-6
    assert explored(toy, alpha=1.0).advantages.abs().min() == 1  # float64 sees them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_grows_with_the_log_probability(dtype):
    bound = rounding(torch.tensor([-100.0, -8.0, -4.0, -0.1, 0.0], dtype=torch.float64), dtype)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(bound, 8 * eps * torch.tensor([100, 8, 4, 4, 4], dtype=torch.float64))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"n_perturb": 0}, "n_perturb"),
        ({"rounding_units": -1.0}, "rounding_units"),
        ({"alpha": 1.5}, "alpha"),
        ({"advantage": "sign"}, "kind"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "^mask"),
        ({"mask": torch.ones(2, 5)}, "^mask"),
    ],
)
def test_explore_refuses_bad_arguments(options, word):
    with pytest.raises(ValueError, match=word):
        explored(Toy(), **options)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda passed, routes: (passed[0], passed[1].sum(-1), passed[2]), r"^forward must return .*\[B, T, L, E\]"),
        (lambda passed, routes: [x[:2] if x.dim() and routes else x for x in passed], r"^log_probs of .*\[6, 5\]"),
        (lambda passed, routes: (passed[0], passed[1][:2], passed[2]), r"^router_log_probs of forward\(routes\)"),
    ],
)
def test_explore_names_what_is_wrong_with_a_forward(spoil, sentence):
    toy = Toy()
    with pytest.raises(ValueError, match=sentence):
        explore(lambda routes: spoil(toy(routes), routes), torch.ones(2, 5, dtype=torch.bool), 2)


def test_wpl_needs_the_loss_of_the_perturbed_passes():
    toy = Toy()

    def forward(routes):
        return toy(routes) if routes is None else (*toy(routes)[:2], None)

    paths = explore(forward, torch.ones(2, 5, dtype=torch.bool), 2)
    assert len(list(erl_objective(forward, paths))) == 1
    with pytest.raises(ValueError, match="^wpl needs the LM loss"):
        list(erl_objective(forward, paths, wpl=True))


@pytest.mark.parametrize("options", [{"delta": -1.0}, {"inner_epochs": 0}, {"clip_eps": -0.1}, {"delta": float("nan")}])
def test_objective_refuses_bad_arguments(options):
    toy = Toy()
    with pytest.raises(ValueError, match=next(iter(options))):
        list(erl_objective(toy, explored(toy), **options))
