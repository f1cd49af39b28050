"""erpo.py: eq. 6-12 of the ERPO paper."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import erpo
from baselines import group_advantages, gspo_loss
from erpo import erpo_loss

seeds = st.integers(0, 10_000)
kinds = st.sampled_from(["relative", "absolute", "none"])


def make(seed, P=2, G=2, T=6, L=2, K=2, E=4, spread=0.5, changed=0.4, shortest=1, dtype=torch.float64):
    """Arguments of erpo_loss by name: P groups of G rows of different lengths, a share of whose routes has changed."""
    g = torch.Generator().manual_seed(seed)
    B = P * G

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    old_log_probs = -3 * rand(B, T)
    routers = torch.randn(2, B, T, L, E, generator=g, dtype=torch.float64).softmax(-1)
    (old_probs, probs), (old_experts, experts) = routers.topk(K)
    stays = (rand(B, T, L, 1) > changed).expand(B, T, L, K)
    mask = torch.arange(T) < torch.randint(shortest, T + 1, (B, 1), generator=g)
    return dict(
        log_probs=(old_log_probs + spread * torch.randn(B, T, generator=g, dtype=torch.float64)).to(dtype),
        old_log_probs=old_log_probs.to(dtype),
        rewards=torch.randint(0, 3, (B,), generator=g).to(dtype) / 2,
        response_mask=mask,
        experts=torch.where(stays, old_experts, experts),
        old_experts=old_experts,
        expert_probs=torch.where(stays, old_probs * (0.5 + 0.5 * rand(B, T, L, K)), probs).to(dtype),
        old_expert_probs=old_probs.to(dtype),
        num_experts=E,
        group_size=G,
    )


def by_the_book(inputs, weights=None, alpha=0.2, clips=(0.2, 0.28), kind="relative"):
    *tensors, E, G = inputs.values()
    arrays = (x.double().numpy() if x.is_floating_point() else x.numpy() for x in tensors)
    return reference.erpo(*arrays, E, G, alpha, *clips, kind, None if weights is None else weights.numpy())


def with_gradient(inputs, **options):
    """-> loss (a number), gradient at log_probs, metrics"""
    log_probs = inputs["log_probs"].detach().clone().requires_grad_()
    loss, metrics = erpo_loss(**{**inputs, "log_probs": log_probs}, **options)
    loss.backward()
    return loss.item(), log_probs.grad, metrics


@settings(deadline=None, max_examples=50)
@given(
    seeds,  # P prompts, G answers each, T positions, L layers, K of E experts
    st.tuples(*(st.integers(*ends) for ends in ((1, 2), (2, 4), (1, 6), (1, 2), (1, 2), (2, 5)))),
    st.sampled_from([0.0, 0.2, 1.0]),
    kinds,
)
def test_value_and_gradient_equal_the_reference(seed, shape, alpha, kind):
    """The value is eq. 11's, the gradient eq. 12's: e A / |X| for each cluster a token is in, over B |E^i|. A weighted
    cluster has the mean weight of its tokens in front."""
    inputs = make(seed, *shape, shortest=0)
    weights = 0.2 + inputs["old_log_probs"].exp()
    for w, clips in ((None, (0.2, 0.28)), (weights, (0.05, 0.4))):
        expected, expected_gradient, counts = by_the_book(inputs, w, alpha, clips, kind)
        options = dict(alpha=alpha, clip_low=clips[0], clip_high=clips[1], entropy_reward=kind)
        loss, gradient, metrics = with_gradient(inputs, weights=w, **options)
        assert loss == pytest.approx(expected, abs=1e-9)
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-9)
        e, H, R_ent = (np.array([*counts.pop(name).values()] or [0.0]) for name in ("e", "H", "R_ent"))
        counts |= {"expert_entropy": H.mean(), "entropy_reward": 0 if kind == "none" else R_ent.mean()}
        if counts["clusters"]:  # over the pairs that have a ratio, and no others
            counts |= {"ratio_mean": e.mean(), "ratio_std": e.std(), "ratio_neg_log": -np.log(e).mean()}
        for name, value in counts.items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-6, abs=1e-12), name


@settings(deadline=None, max_examples=30)
@given(seed=seeds, G=st.integers(2, 4), T=st.integers(1, 6), spread=st.sampled_from([1e-4, 0.3]))
def test_one_expert_and_one_layer_is_gspo(seed, G, T, spread):
    """E = K = L = 1, alpha = 0, one clip range: one cluster a row, all of its tokens. Value, gradient, metrics."""
    inputs = make(seed, 2, G, T, 1, 1, 1, spread=spread)
    loss, gradient, metrics = with_gradient(inputs, alpha=0.0, clip_low=3e-4, clip_high=4e-4)
    new = inputs["log_probs"].clone().requires_grad_()
    A = group_advantages(inputs["rewards"], G)
    expected, expected_metrics = gspo_loss(new, inputs["old_log_probs"], A, inputs["response_mask"])
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradient, new.grad)
    for name, value in expected_metrics.items():
        assert metrics[name].item() == pytest.approx(value.item(), abs=1e-12), name


@settings(deadline=None, max_examples=30)
@given(seed=seeds, kind=kinds)
def test_names_of_experts_and_the_order_of_tokens_change_nothing(seed, kind):
    """The ids of each layer are permuted, alike for both policies, and the tokens with all that is theirs."""
    inputs, g = make(seed), torch.Generator().manual_seed(seed)
    names, order = torch.rand(2, 4, generator=g).argsort(-1), torch.randperm(6, generator=g)
    other = {k: x[:, order] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for k, x in inputs.items()}
    for key in ("experts", "old_experts"):
        other[key] = torch.stack([names[layer][other[key][:, :, layer]] for layer in (0, 1)], 2)
    (loss, gradient, _), (moved, moved_gradient, _) = (with_gradient(x, entropy_reward=kind) for x in (inputs, other))
    assert moved == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(moved_gradient, gradient[:, order])


@pytest.mark.parametrize("kind", ["relative", "absolute", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [0.1] * 7, [-123456.7] * 3, [0.0] * 4, "sums"])
def test_equal_rewards_give_no_signal(rewards, dtype, kind):
    """0.1 three times has a mean that is not exactly 0.1: neither sigma nor A may come of a residue of rounding. Nor
    of the order in which the parts of a reward were added."""
    if rewards == "sums":
        a, b, c = (torch.tensor(x, dtype=dtype) for x in (50.1, 30.2, 20.3))
        rewards = [(a + b + c).item(), (c + b + a).item(), (a + c + b).item(), (b + c + a).item()]
        assert len({*rewards}) > 1
    inputs = make(6, 2, len(rewards), dtype=dtype) | {"rewards": torch.tensor(2 * rewards, dtype=dtype)}
    loss, gradient, metrics = with_gradient(inputs, entropy_reward=kind)
    assert loss == 0 and (gradient == 0).all() and metrics["entropy_reward"] == 0 and metrics["clusters"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigma_by_hand(dtype):
    """Better than the group -1, worse +1, at its mean 0, though (0.1 + 0.2 + 0.3) / 3 is not exactly 0.2; no more than
    rounding counts as equal, and one group's size is not the other's."""
    for R, G, expected in (
        ([0.1, 0.2, 0.3, 0.0, 0.0, 1.0], 3, [1, 0, -1, 1, 1, -1]),
        ([0.3, -0.1, -0.2, 0.0], 4, [-1, 1, 1, 0]),  # the mean is 0 but for rounding
        ([1.0, 1.00001, 1e6, 1e6 + 2], 2, [1, -1, 1, -1]),
    ):
        assert erpo._sigma(torch.tensor(R, dtype=dtype), G).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_are_those_of_the_rows_that_use_the_pair(dtype):
    """Neither another group's rewards nor those of a row without the pair make three rewards of 0.1 unequal."""
    valid = torch.tensor([True, True, True, False] * 2).view(8, 1)
    for sign, unused in ((1, 5.0), (1, -5.0), (-1, 5.0), (-1, -5.0)):
        R = sign * torch.tensor([0.1, 0.1, 0.1, unused, 5.0, 6.0, 7.0, -9.0], dtype=dtype).view(8, 1)
        A = erpo._advantages(R, valid, 4).flatten()
        assert (A[:4] == 0).all() and A[7] == 0
        torch.testing.assert_close(A[4:7], sign * torch.tensor([-1.0, 0.0, 1.0], dtype=dtype), atol=1e-5, rtol=0)


def test_the_entropy_of_small_probabilities():
    """-P log P of eq. 8: no probability is lifted, and 0 has none."""
    inputs = make(8)
    for P in (1e-4, 1e-9, 0.0):
        _, metrics = erpo_loss(**inputs | {"expert_probs": torch.full_like(inputs["expert_probs"], P)})
        assert metrics["expert_entropy"].item() == pytest.approx(-P * np.log(P) if P else 0, rel=1e-9)


@pytest.mark.parametrize("probs", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("log_probs", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(probs, log_probs):
    """Low precision is computed in float32: the loss is that of the rounded inputs, not of rounded steps."""
    inputs = make(14)
    inputs |= {name: inputs[name].to(log_probs) for name in ("log_probs", "old_log_probs")}
    inputs |= {name: inputs[name].to(probs) for name in ("expert_probs", "old_expert_probs")}
    (expected, expected_gradient, _), (loss, gradient, _) = by_the_book(inputs), with_gradient(inputs)
    assert loss == pytest.approx(expected, abs=1e-9 if log_probs == torch.float64 else 3e-5)
    rtol = 1e-2 if log_probs == torch.bfloat16 else 0  # the gradient itself is handed over in that type
    np.testing.assert_allclose(gradient.double(), expected_gradient, atol=1e-4, rtol=rtol)


@pytest.mark.parametrize("E, highest", [(256, 255), (384, 200)])
def test_small_types_hold_ids_of_many_experts(E, highest):
    """E itself need not fit the type of the ids: 256 is 0 as uint8."""
    inputs = make(14) | {"num_experts": E}
    ids = {name: inputs[name].masked_fill(inputs[name] == 3, highest) for name in ("experts", "old_experts")}
    small = inputs | {name: x.to(torch.uint8) for name, x in ids.items()}
    assert with_gradient(small)[0] == with_gradient(inputs | ids)[0] != 0
    with pytest.raises(ValueError, match=rf"^experts must lie in 0\.\.{highest - 1}, got .*{highest}"):
        erpo_loss(**small | {"num_experts": highest})


def test_what_is_refused():
    good = make(17)
    for name, bad in (
        ("log_probs", torch.zeros(4, 5)),
        ("weights", torch.zeros(4, 1)),
        ("rewards", torch.tensor([0.0, 1.0, float("nan"), 0.0])),
        ("response_mask", torch.ones(4, 6)),
        ("experts", good["experts"][0]),
        ("experts", good["experts"] - 4),
        ("old_experts", good["old_experts"] + 4),
        *(("group_size", 3), ("alpha", float("nan")), ("clip_low", -0.2), ("entropy_reward", "full")),
    ):
        with pytest.raises(ValueError, match=name):
            erpo_loss(**good | {name: bad})
