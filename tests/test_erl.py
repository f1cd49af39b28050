"""erl.py and support/controls.py: eq. 6-18 of the ERL paper, by the book and by hand."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from erl import Pass, Paths, erl_advantage, erl_loss, erl_objective, explore, random_routes
from support import controls

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
seeds, dtypes = st.integers(0, 10_000), st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
moderate = settings(deadline=None, max_examples=50)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make(seed, B=2, T=4, L=2, K=2, share=0.6):
    """new, old [B,T,L,K], advantages [B,T], perturbed [B,T,L]; ratios on both sides of the clip range."""
    g = seeded(seed)
    old = torch.log_softmax(torch.randn(B, T, L, 8, generator=g, dtype=torch.float64), -1)[..., :K]
    new = old + 0.4 * torch.randn(B, T, L, K, generator=g, dtype=torch.float64)
    advantages = torch.randint(-1, 2, (B, T), generator=g).double()
    return new, old, advantages, torch.rand(B, T, L, generator=g) < share


@moderate
@given(shapes, st.integers(3, 9), st.floats(0, 1), seeds)
def test_random_routes_are_distinct_experts_and_the_same_whatever_alpha(shape, num_experts, alpha, seed):
    B, T, L, K = shape
    experts, perturbed = random_routes(B, T, L, num_experts, K, alpha, generator=seeded(seed))
    assert (experts.shape, experts.dtype) == ((B, T, L, K), torch.int64) and experts.min() >= 0
    assert (perturbed.shape, perturbed.dtype) == ((B, T, L), torch.bool) and experts.max() < num_experts
    assert all(len(set(row)) == K for row in experts.reshape(-1, K).tolist())
    again, more = random_routes(B, T, L, num_experts, K, min(1.0, alpha + 0.2), generator=seeded(seed))
    assert torch.equal(again, experts) and (more | ~perturbed).all()


def test_decisions_are_drawn_one_by_one_with_probability_alpha_and_experts_uniformly(monkeypatch):
    alpha = torch.tensor([0.0, 1.0, 0.1, 0.6])  # one a row
    experts, perturbed = random_routes(4, 4000, 2, 8, 2, alpha, generator=seeded(1))
    assert not perturbed[0].any() and perturbed[1].all()
    for row, a in ((2, 0.1), (3, 0.6)):  # five standard deviations
        assert abs(perturbed[row].double().mean() - a) < 5 * (a * (1 - a) / 8000) ** 0.5
        both = perturbed[row].all(-1).double().mean()  # not whole tokens: layers agree as independent draws do
        assert abs(both - a * a) < 5 * (a * a * (1 - a * a) / 4000) ** 0.5
    assert (experts.flatten().bincount(minlength=8) / experts.numel() - 1 / 8).abs().max() < 0.01
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))  # its smallest number
    assert not random_routes(1, 2, 3, 8, 1, 0.0)[1].any()


@moderate
@given(seeds, st.sampled_from(["static", "log"]), dtypes)
def test_advantage_equals_the_reference(seed, kind, dtype):
    p, o = (-torch.rand(2, 3, 5, generator=seeded(seed)) * 9).to(dtype)
    p[0], p[1, 0], o[1, 0] = o[0], -200, -210  # ties; probabilities that are 0 in float32
    expected = reference.erl_advantage(p.double().numpy(), o.double().numpy(), kind)
    A = erl_advantage(p.requires_grad_(), o, kind)
    np.testing.assert_allclose(A, expected, rtol=1e-6)  # exactly 0 at the ties
    assert A.dtype == torch.promote_types(dtype, torch.float32) and not A.requires_grad


@moderate
@given(shapes, seeds, st.floats(0, 1), st.floats(0.01, 0.9), dtypes)
def test_loss_equals_the_reference(shape, seed, share, clip_eps, dtype):
    """Low precision is computed in float32: the loss is that of the rounded inputs, not of rounded steps."""
    *inputs, perturbed = make(seed, *shape, share=share)
    new, old, advantages = (x.to(dtype).requires_grad_() for x in inputs)
    loss, metrics = erl_loss(new, old, advantages, perturbed, clip_eps=clip_eps)
    expected = reference.erl_loss(*(x.detach().double().numpy() for x in (new, old, advantages)), perturbed, clip_eps)
    assert loss.item() == pytest.approx(expected, abs=1e-12 if dtype == torch.float64 else 1e-6)
    loss.backward()
    assert old.grad is None and advantages.grad is None
    A = advantages.detach()[..., None].expand(perturbed.shape)[perturbed]  # of each decision in S
    stopped = (new.grad[perturbed] == 0) & (A != 0)[:, None]
    expected = {"perturbed_share": perturbed, "advantage_positive": A > 0, "advantage_negative": A < 0}
    expected |= {"clip_share": stopped, "ratio_mean": (new.detach().double() - old.detach().double()).exp()[perturbed]}
    for name, x in expected.items():
        assert metrics.pop(name).item() == pytest.approx(x.double().mean().item() if x.numel() else 0, rel=1e-5), name
    assert metrics == {"rl_loss": loss}


def test_gradient_by_finite_differences():
    new, *rest = make(0)
    assert gradcheck(lambda x: erl_loss(x, *rest)[0], new.requires_grad_())


class Toy:
    """A model of small tables: log p of the token at t falls by harm[e] / K for each random expert e used there."""

    def __init__(self, B=2, T=5, L=2, E=4, K=2):
        self.shape, self.asked, g = (B, T, L, E, K), [], seeded(0)
        self.router = torch.randn(B, T, L, E, generator=g, dtype=torch.float64, requires_grad=True)
        self.words = torch.randn(B, T, generator=g, dtype=torch.float64, requires_grad=True)
        self.harm = torch.randn(E, generator=g, dtype=torch.float64)

    def __call__(self, routes):
        self.asked.append(routes)
        experts, S = routes or (torch.zeros(self.shape[0], 1, 1, 1).long(), torch.zeros(1))
        m = len(experts) // self.shape[0]
        log_probs = (self.words - 3).repeat(m, 1) - (self.harm[experts].mean(-1) * S).sum(-1)  # [m * B, T]
        return log_probs, self.router.log_softmax(-1).repeat(m, 1, 1, 1), (log_probs**2).mean()

    def explore(self, seed=7, **options):
        options = {"mask": torch.ones(self.shape[:2]).bool(), "dtype": torch.float64} | options
        return explore(self, options.pop("mask"), self.shape[-1], generator=seeded(seed), **options)

    def log_P(self, experts):
        """Of the experts of m passes, with gradient: [m * B, T, L, K]"""
        return self.router.log_softmax(-1).repeat(len(experts) // self.shape[0], 1, 1, 1).gather(-1, experts)


@pytest.mark.parametrize("advantage", ["static", "log"])
def test_explore_by_hand(advantage):
    """Rows j * B + b are pass j of row b. A token's advantage is minus what its random experts cost."""
    toy, mask = Toy(), torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    paths = toy.explore(mask=mask, advantage=advantage)
    experts, replaced = random_routes(6, 5, 2, 4, 2, 0.6, generator=seeded(7))
    S = replaced & mask.repeat(3, 1)[..., None]  # a prompt is never perturbed
    assert paths.draw == "uniform" and torch.equal(paths.experts, experts) and torch.equal(paths.S, S)
    assert toy.asked[0] is None and len(toy.asked) == 2 and all(map(torch.equal, toy.asked[1], (experts, S)))
    for row, t in np.ndindex(6, 5):
        used = [e for layer in range(2) if S[row, t, layer] for e in experts[row, t, layer].tolist()]
        gain = -sum(toy.harm[e].item() / 2 for e in used)
        want = gain if advantage == "log" else float(np.sign(gain))
        assert paths.advantages[row, t].item() == pytest.approx(want, abs=1e-12)
    assert torch.allclose(paths.old_router_log_probs, toy.log_P(experts))
    assert not paths.advantages.requires_grad and not paths.old_router_log_probs.requires_grad


def test_routes_go_to_the_models_device():
    """Drawn on the CPU, where the mask may lie too; the model here lives on "meta", which holds no data."""

    def forward(routes):
        rows = 2 if routes is None else 6
        return torch.zeros(rows, 5, device="meta"), torch.zeros(rows, 5, 2, 4, device="meta"), None

    assert all(x.device.type == "meta" for x in explore(forward, torch.ones(2, 5).bool(), 2)[2:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gap_of_exactly_the_bound_is_rounding(dtype):
    before = torch.tensor([[-0.5, -4.0, -128.0]], dtype=torch.float64)
    unit = torch.tensor([4, 4, 128]) * torch.finfo(dtype).eps  # in the last place, of 4 nats where that is more
    for options, units in (({}, 8), ({"rounding_units": 16.0}, 16), ({"rounding_units": 0.0}, 0)):
        for gap, A in ((units, 0), (units + 1, 1), (-units - 1, -1)):

            def forward(routes, gap=gap):
                after = before if routes is None else (before + gap * unit).expand(3, 3)
                return after, torch.zeros(len(after), 3, 1, 4), None

            assert (explore(forward, torch.ones(1, 3).bool(), 1, dtype=dtype, **options).advantages == A).all()


@pytest.mark.parametrize("options", [{}, dict(wpl=True, delta=0.7, clip_eps=0.1), dict(ratio="uniform", delta=2.0)])
def test_objective_by_hand(options):
    """Defaults are the paper's for text: delta 0.5, a clip of 0.2, one step, without the passes' LM loss. The ratio to
    the uniform policy is P / (1 / E), whatever the router was, and it is never clipped."""
    toy, uniform = Toy(), "ratio" in options
    paths = toy.explore(advantage="log")
    old = paths.old_router_log_probs + 0.3 * torch.randn(6, 5, 2, 2, generator=seeded(2))  # so that the clip acts
    ((loss, metrics),) = erl_objective(toy, paths._replace(old_router_log_probs=old), **options)
    old, clip_eps = (torch.full_like(old, -np.log(4)), np.inf) if uniform else (old, options.get("clip_eps", 0.2))
    rl, expected = erl_loss(toy.log_P(paths.experts), old, paths.advantages, paths.S, clip_eps=clip_eps)
    more = paths.perturbed.loss if "wpl" in options else 0
    whole = paths.original.loss + options.get("delta", 0.5) * (rl + more)
    both = [(x, torch.autograd.grad(x, (toy.router, toy.words), retain_graph=True)) for x in (loss, whole)]
    torch.testing.assert_close(*both)
    assert (metrics["clip_share"] == 0) == uniform and not any(x.requires_grad for x in metrics.values())
    assert metrics == expected | ({"perturbed_lm_loss": more} if more else {})


def test_inner_epochs_use_the_same_routes_and_learn_the_text_once():
    toy = Toy()
    paths, ratios = toy.explore(), []
    for epoch, (loss, metrics) in enumerate(erl_objective(toy, paths, delta=2.0, wpl=True, inner_epochs=3)):
        router, words = torch.autograd.grad(loss, (toy.router, toy.words), allow_unused=True, materialize_grads=True)
        ratios.append(metrics["ratio_mean"].item())
        assert words.any() == (epoch == 0)  # no LM loss after the first
        assert epoch == 0 or loss.item() == pytest.approx(2 * metrics["rl_loss"].item()) != 0
        with torch.no_grad():  # the caller's optimizer
            toy.router -= 5 * router
    assert ratios[0] == pytest.approx(1, abs=1e-12) and abs(ratios[2] - 1) > 1e-3
    assert len(toy.asked) == 4 and all(r[0] is paths.experts and r[1] is paths.S for r in toy.asked[2:])


def test_experts_drawn_from_the_router_follow_its_probabilities_on_the_original_pass():
    P = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]])  # of the two rows

    def forward(routes):  # the perturbed passes have other probabilities: they are what the ratio starts from
        rows, router = (2, P) if routes is None else (4, torch.full((4, 4), 0.25))
        return torch.zeros(rows, 3000), router.log()[:, None, None].expand(rows, 3000, 2, 4), None

    how = dict(mask=torch.ones(2, 3000).bool(), top_k=1, n_perturb=2)
    paths, again, other = (explore(forward, draw="router", generator=seeded(s), **how) for s in (3, 3, 4))
    for row in range(4):  # pass j of row b is row j * 2 + b
        share = paths.experts[row].flatten().bincount(minlength=4) / 6000
        assert (share - P[row % 2]).abs().max() < 5 * (0.25 / 6000) ** 0.5 and (share[P[row % 2] == 0] == 0).all()
    assert paths.draw == "router" and torch.equal(paths.S, explore(forward, generator=seeded(3), **how).S)
    assert torch.equal(paths.experts, again.experts) and not torch.equal(paths.experts, other.experts)
    assert torch.allclose(paths.old_router_log_probs.exp(), torch.tensor(0.25))


@pytest.mark.parametrize(("ratio", "drift"), [("router", 1.0), ("uniform", 0.0)])
def test_what_an_advantage_that_says_nothing_of_the_expert_does(ratio, drift):
    """Each expert once, A = -1: eq. 12 moves the logits along A (1/E - P), the ratio to the uniform policy does not."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], requires_grad=True)
    router, experts = logits.log_softmax(-1).expand(4, 1, 1, 4), torch.arange(4).view(4, 1, 1, 1)
    passed, S = Pass(torch.zeros(4, 1), router, 0.0), torch.ones(4, 1, 1).bool()
    paths = Paths(passed, passed, experts, S, -torch.ones(4, 1), router.detach().gather(-1, experts), "uniform")
    ((loss, _),) = erl_objective(None, paths, delta=1.0, ratio=ratio)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, drift * (0.25 - logits.detach().softmax(-1)))


def test_what_is_refused():
    def refused(says, function, *arguments, **options):
        with pytest.raises(ValueError, match=says):
            list(function(*arguments, **options))  # erl_objective is an iterator

    nan, toy, mask = float("nan"), Toy(), torch.ones(2, 5).bool()
    for alpha in (-0.1, 1.1, nan, torch.tensor([0.5, 2.0]), torch.tensor([0.5] * 3)):
        refused("alpha", random_routes, 2, 3, 1, 4, 1, alpha)
    for top_k in (0, 5):
        refused("top_k .*4", random_routes, 2, 3, 1, 4, top_k, 0.5)
    new, old, A, S = make(15)
    refused("kind", erl_advantage, A, A, "relative")
    refused("^original_log_probs", erl_advantage, A, A[1:])
    names = "router_log_probs", "old_router_log_probs", "advantages", "perturbed"
    bad = (0, new[..., 0]), (0, new[..., :0]), (1, old[..., :1]), (2, A[:, 1:]), (3, S[..., 0]), (3, S.float())
    for place, wrong in bad:
        refused("^" + names[place], erl_loss, *(wrong if i == place else x for i, x in enumerate((new, old, A, S))))
    for clip_eps in (-0.1, nan):
        refused("clip_eps", erl_loss, new, old, A, S, clip_eps=clip_eps)
    for option, wrong in (("n_perturb", 0), ("rounding_units", -1.0), ("mask", mask[:, 1:]), ("mask", mask.float())):
        refused(option, toy.explore, **{option: wrong})
    for draw in ("gate", "router"):  # a draw from the router goes with K = 1, the toy has 2
        refused("draw", toy.explore, draw=draw)
    refused("^forward must return .*B, T, L, E", explore, lambda r: (toy(r)[0], toy(r)[1][0], None), mask, 2)
    refused(r"^log_probs of .*\[6, 5\]", explore, lambda r: (toy(r)[0][:2], toy(r)[1], None), mask, 2)
    refused("^router_log_probs of forward", explore, lambda r: (toy(r)[0], toy(r)[1][:2], None), mask, 2)
    paths = toy.explore()
    for option, wrong in (("delta", -1.0), ("delta", nan), ("inner_epochs", 0), ("clip_eps", -0.1), ("ratio", "E")):
        refused(option, erl_objective, toy, paths, **{option: wrong})
    for options in ({"clip_eps": 0.2}, {"inner_epochs": 2}):
        refused("no clip_eps and inner_epochs 1", erl_objective, toy, paths, ratio="uniform", **options)
    refused('draw "uniform"', erl_objective, toy, paths._replace(draw="router"), ratio="uniform")
    refused("^wpl needs", erl_objective, toy, paths._replace(perturbed=Pass(None, None, None)), wpl=True)


def test_random_expert_credits_other_experts_for_the_same_decisions():
    toy = Toy(B=4, T=200, E=8)
    paths = toy.explore()
    found = controls.random_expert(paths, seeded(1))
    assert found.S is paths.S and found.advantages is paths.advantages
    assert torch.equal(found.experts, controls.random_expert(paths, seeded(1)).experts)
    assert (found.experts[..., 0] != found.experts[..., 1]).all()
    assert (found.experts.flatten().bincount(minlength=8) / found.experts.numel() - 1 / 8).abs().max() < 0.02
    assert abs((found.experts == paths.experts).double().mean() - 1 / 8) < 0.02  # drawn anew, whatever was tried
    torch.testing.assert_close(found.old_router_log_probs, toy.log_P(found.experts).detach())
    assert not found.old_router_log_probs.requires_grad


def test_shuffled_moves_the_advantages_that_the_loss_reads_and_no_others():
    paths = Toy(B=4, T=50).explore(alpha=0.3)
    paths = paths._replace(advantages=torch.arange(600).view(12, 50))
    read, before, found = paths.S.any(-1), paths.advantages.clone(), controls.shuffled(paths, seeded(1)).advantages
    assert torch.equal(found[~read], before[~read]) and torch.equal(paths.advantages, before)
    assert torch.equal(found[read].sort().values, before[read]) and (found[read] != before[read]).double().mean() > 0.9
    assert torch.equal(found, controls.shuffled(paths, seeded(1)).advantages)


def test_level_and_constant_by_hand():
    """Two passes of one row, two positions, two layers: a position's mean counts each replaced decision once."""
    S, A = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [0, 0]]]).bool(), torch.tensor([[1.0, 4.0], [-1.0, 5.0]])
    paths = Toy(B=1, T=2).explore(n_perturb=2)._replace(S=S, advantages=A.clone())
    assert torch.allclose(controls.level(paths).advantages, torch.tensor([[2 / 3, 4.0], [-4 / 3, 5.0]]))
    assert torch.allclose(controls.constant(paths).advantages, torch.full((2, 2), 1 / 3))
    assert (controls.constant(paths, -0.5).advantages == -0.5).all() and torch.equal(paths.advantages, A)
    paths = Toy(B=2, T=4, L=3).explore(advantage="log")  # with rows: a row's mean is over its own three passes
    total = (controls.level(paths).advantages * paths.S.sum(-1)).view(3, 2, 4).sum(0)
    assert total.abs().max() < 1e-12
