"""erpo.py: eq. 6-12 of the ERPO paper."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import erpo
from baselines import group_advantages, gspo_loss
from erpo import erpo_loss

seeds = st.integers(0, 10_000)
kinds = st.sampled_from(["relative", "absolute", "none"])


def make(seed, P=2, G=2, T=6, L=2, K=2, E=4, spread=0.5, changed=0.4, dtype=torch.float64):
    """Arguments of erpo_loss by name: P groups of G rows of different lengths, a share of whose routes has changed."""
    g = torch.Generator().manual_seed(seed)
    B = P * G

    def route():
        probs = torch.softmax(torch.randn(B, T, L, E, generator=g, dtype=torch.float64), -1)
        return probs.topk(K)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    old_log_probs = -3 * rand(B, T)
    old_probs, old_experts = route()
    probs, experts = route()
    stays = (rand(B, T, L, 1) > changed).expand(B, T, L, K)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
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


def by_the_book(inputs, **options):
    names = (
        "log_probs",
        "old_log_probs",
        "rewards",
        "response_mask",
        "experts",
        "old_experts",
        "expert_probs",
        "old_expert_probs",
    )
    tensors = (inputs[name].detach() for name in names)
    arrays = (x.double().numpy() if x.is_floating_point() else x.numpy() for x in tensors)
    return reference.erpo(*arrays, inputs["num_experts"], inputs["group_size"], **options)


def with_gradient(inputs, **options):
    """-> loss (a number), gradient at log_probs, metrics"""
    log_probs = inputs["log_probs"].detach().clone().requires_grad_()
    loss, metrics = erpo_loss(**{**inputs, "log_probs": log_probs}, **options)
    loss.backward()
    return loss.item(), log_probs.grad, metrics


# ------------------------------------------------------------------------------------------------- against the paper


@settings(deadline=None, max_examples=50)
@given(
    seed=seeds,
    P=st.integers(1, 2),
    G=st.integers(2, 4),
    T=st.integers(1, 6),
    L=st.integers(1, 2),
    K=st.integers(1, 2),
    E=st.integers(2, 5),
    alpha=st.sampled_from([0.0, 0.2, 1.0]),
    kind=kinds,
)
def test_value_and_gradient_equal_the_reference(seed, P, G, T, L, K, E, alpha, kind):
    """The value is eq. 11's, the gradient eq. 12's: e A / |X| for each cluster a token is in, over B |E^i|."""
    inputs = make(seed, P, G, T, L, K, E)
    expected, expected_gradient, counts = by_the_book(inputs, alpha=alpha, entropy_reward=kind)
    loss, gradient, metrics = with_gradient(inputs, alpha=alpha, entropy_reward=kind)
    assert loss == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-9)
    assert metrics["clusters"] == counts["clusters"] and metrics["dropped_clusters"] == counts["dropped_clusters"]
    if kind != "none" and counts["R_ent"]:
        mean = sum(counts["R_ent"].values()) / len(counts["R_ent"])
        assert metrics["entropy_reward"].item() == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_by_hand(seed):
    """Over the pairs that have a ratio, and no others."""
    inputs = make(seed, T=4, E=6, changed=0.7)
    _, _, seen = by_the_book(inputs)
    metrics = with_gradient(inputs)[2]
    e, H = (np.array(list(seen[name].values())) for name in ("e", "H"))
    assert metrics["dropped_clusters"] == seen["dropped_clusters"] > 0
    for name, expected in (
        ("ratio_mean", e.mean()),
        ("ratio_std", e.std()),
        ("ratio_neg_log", -np.log(e).mean()),
        ("expert_entropy", H.mean()),
    ):
        assert metrics[name].item() == pytest.approx(expected, abs=1e-12), name


def test_the_references_see_something():
    """The inputs above do clip, drop clusters and have gradients: the comparison is not one of zeros."""
    metrics = [with_gradient(make(seed))[2] for seed in range(20)]
    assert any(m["clip_share"] > 0 for m in metrics) and any(m["dropped_clusters"] > 0 for m in metrics)
    assert all(with_gradient(make(seed, P=4))[1].abs().sum() > 0 for seed in range(5))


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


def test_a_case_by_hand():
    """Two rows, two tokens, one layer, two experts. Row 0 keeps its routes, row 1 moves a token to expert 1.

    Expert 0: a ratio in both rows, A = +-1/sqrt(2). Expert 1: row 0 never uses it, row 1 only under the new policy:
    dropped. So |E^i| = 1 in both rows, and row 1's second token gets no gradient.
    """
    new = torch.tensor([[-1.0, -1.0], [-1.0, -3.0]]).double()
    old = torch.tensor([[-1.1, -1.1], [-1.0, -1.2]]).double()
    experts = torch.tensor([[0, 0], [0, 1]]).view(2, 2, 1, 1)
    inputs = dict(
        log_probs=new,
        old_log_probs=old,
        rewards=torch.tensor([1.0, 0.0]).double(),
        response_mask=torch.ones(2, 2, dtype=torch.bool),
        experts=experts,
        old_experts=torch.zeros_like(experts),
        expert_probs=torch.full((2, 2, 1, 1), 0.6).double(),
        old_expert_probs=torch.full((2, 2, 1, 1), 0.6).double(),
        num_experts=2,
        group_size=2,
    )
    loss, gradient, metrics = with_gradient(inputs)
    e, A = np.exp([0.1, 0.1]), np.array([1, -1]) * 0.5**0.5  # row 1: -1 by the new cluster, -1.1 by the old
    assert loss == pytest.approx(-(e * A).mean(), abs=1e-5)
    np.testing.assert_allclose(gradient, -np.array([[e[0] * A[0] / 2] * 2, [e[1] * A[1], 0]]) / 2, atol=1e-5)
    assert metrics["clusters"] == 2 and metrics["dropped_clusters"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(seed):
    inputs = make(seed, 1, 3, 4)
    log_probs = inputs.pop("log_probs").requires_grad_()
    assert gradcheck(lambda x: erpo_loss(x, **inputs)[0], log_probs)


def test_only_the_ratio_carries_gradient():
    inputs = make(1)
    for name in ("log_probs", "old_log_probs", "rewards", "expert_probs", "old_expert_probs"):
        inputs[name].requires_grad_()
    erpo_loss(**inputs)[0].backward()
    assert inputs.pop("log_probs").grad is not None
    assert all(x.grad is None for x in inputs.values() if isinstance(x, torch.Tensor))


# --------------------------------------------------------------------------------------------------------- invariances


@settings(deadline=None, max_examples=30)
@given(seed=seeds, kind=kinds)
def test_relabelling_experts_changes_nothing(seed, kind):
    """A permutation of the ids of each layer, its own for each, the same for both policies."""
    inputs = make(seed)
    g = torch.Generator().manual_seed(seed)
    loss, gradient, _ = with_gradient(inputs, entropy_reward=kind)
    for layer in range(2):
        names = torch.randperm(4, generator=g)
        for key in ("experts", "old_experts"):
            inputs[key] = inputs[key].clone()
            inputs[key][:, :, layer] = names[inputs[key][:, :, layer]]
    other, other_gradient, _ = with_gradient(inputs, entropy_reward=kind)
    assert other == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(other_gradient, gradient)


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_shuffling_tokens_with_their_routing_changes_nothing(seed):
    inputs = make(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    shuffled = {k: x[:, order] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for k, x in inputs.items()}
    loss, gradient, _ = with_gradient(inputs)
    other, other_gradient, _ = with_gradient(shuffled)
    assert other == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(other_gradient, gradient[:, order])


def test_shuffling_tokens_without_their_routing_changes_something():
    """The other side of the test above: clusters are what counts."""
    inputs = make(2)
    inputs["response_mask"][:] = True
    loss = with_gradient(inputs)[0]
    flipped = {**inputs, **{k: inputs[k].flip(1) for k in ("log_probs", "old_log_probs")}}
    assert abs(with_gradient(flipped)[0] - loss) > 1e-4


def test_the_order_of_a_tokens_k_experts_changes_nothing():
    inputs = make(3)
    loss, gradient, _ = with_gradient(inputs)
    flipped = {**inputs, **{k: inputs[k].flip(3) for k in ("experts", "expert_probs")}}
    assert with_gradient(flipped)[0] == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(with_gradient(flipped)[1], gradient)


def test_groups_do_not_mix():
    """A second group's rewards leave the first group's gradient."""
    inputs = make(4, 2, 3)
    inputs["rewards"] = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.5], dtype=torch.float64)
    gradient = with_gradient(inputs)[1]
    inputs["rewards"] = torch.tensor([0.0, 1.0, 0.5, 7.0, -7.0, 2.0], dtype=torch.float64)
    other = with_gradient(inputs)[1]
    torch.testing.assert_close(other[:3], gradient[:3])
    assert not torch.allclose(other[3:], gradient[3:])


# -------------------------------------------------------------------------------------- rewards, entropies, the ratio


def test_first_ratio_is_exactly_one():
    """Same policy, same routes: every ratio 1 to the bit, no entropy reward, the reward alone decides."""
    inputs = make(5, dtype=torch.float32)
    for name in ("log_probs", "experts", "expert_probs"):
        inputs["old_" + name] = inputs[name]
    _, gradient, metrics = with_gradient(inputs)
    assert metrics["ratio_mean"] == 1 and metrics["ratio_std"] == 0 and metrics["ratio_neg_log"] == 0
    assert metrics["clip_share"] == 0 and metrics["dropped_clusters"] == 0 and metrics["entropy_reward"] == 0
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", ["relative", "absolute", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value, group_size", [(0.1, 3), (0.1, 7), (123456.7, 3), (0.0, 4)])
def test_equal_rewards_give_no_signal(value, group_size, dtype, kind):
    """0.1 three times has a mean that is not exactly 0.1: neither sigma nor A may come of the residue."""
    inputs = make(6, 2, group_size, dtype=dtype)
    inputs["rewards"] = torch.full((2 * group_size,), value, dtype=dtype)
    loss, gradient, metrics = with_gradient(inputs, entropy_reward=kind)
    assert loss == 0 and (gradient == 0).all()
    assert metrics["entropy_reward"] == 0 and metrics["clusters"] > 0


def test_sigma_by_hand():
    """Better than the group: -1, worse: +1, at its mean: 0, though (0.1 + 0.2 + 0.3) / 3 is not exactly 0.2."""
    for dtype in (torch.float32, torch.float64):
        R = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0, 1.0], dtype=dtype)
        assert erpo._sigma(R, 3).tolist() == [1, 0, -1, 1, 1, -1]


def test_sigma_counts_as_equal_what_rounding_makes_unequal_and_no_more():
    for dtype in (torch.float32, torch.float64):
        near_zero = torch.tensor(
            [0.3, -0.1, -0.2, 0.0], dtype=dtype
        )  # the mean is 0 but for rounding, and so is a reward
        assert erpo._sigma(near_zero, 4).tolist() == [-1, 1, 1, 0]
        assert erpo._sigma(-torch.tensor([0.1, 0.2, 0.3], dtype=dtype), 3).tolist() == [-1, 0, 1]
        close = torch.tensor([1.0, 1.00001, 1e6, 1e6 + 2], dtype=dtype)  # one group's size is not the other's
        assert erpo._sigma(close, 2).tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_are_those_of_the_rows_that_use_the_pair(dtype, sign):
    """Neither another group's rewards nor those of a row without the pair make three rewards of 0.1 unequal."""
    R = sign * torch.tensor([0.1, 0.1, 0.1, 5.0, 5.0, 6.0, 7.0, -9.0], dtype=dtype).view(8, 1, 1)
    valid = torch.tensor([True, True, True, False] * 2).view(8, 1, 1)
    A = erpo._advantages(R, valid, 4).flatten()
    assert (A[:4] == 0).all() and A[7] == 0
    torch.testing.assert_close(A[4:7], sign * torch.tensor([-1.0, 0.0, 1.0], dtype=dtype), atol=1e-5, rtol=0)
    R[3] *= -1
    assert (erpo._advantages(R, valid, 4).flatten()[:4] == 0).all()


def test_a_small_probability_keeps_its_entropy():
    """-P log P of eq. 8 at P = 1e-4 and 1e-9: no probability is lifted."""
    for P in (1e-4, 1e-9):
        inputs = make(8)
        inputs["expert_probs"] = torch.full_like(inputs["expert_probs"], P)
        assert with_gradient(inputs)[2]["expert_entropy"].item() == pytest.approx(-P * np.log(P), rel=1e-9)


def test_a_range_of_zero():
    """Every ratio outside 1 is cut off on the side that its advantage opens."""
    inputs = make(9, P=4)
    loss, _, metrics = with_gradient(inputs, clip_low=0.0, clip_high=0.0)
    expected, _, _ = by_the_book(inputs, low=0.0, high=0.0)
    assert loss == pytest.approx(expected, abs=1e-9) and 0.1 < metrics["clip_share"] < 1


def test_off_the_cpu_nothing_is_read_and_sums_need_no_atomics(monkeypatch):
    """Run on "meta", the device that holds no data: reading a value there is an error. Rewards stay on the CPU."""
    monkeypatch.setattr(erpo, "_bucket_sums", None)
    inputs = make(10)
    on_meta = {k: x.to("meta") if isinstance(x, torch.Tensor) and k != "rewards" else x for k, x in inputs.items()}
    on_meta["log_probs"].requires_grad_()
    loss, metrics = erpo_loss(**on_meta)
    loss.backward()
    assert loss.device.type == "meta" and on_meta["log_probs"].grad.shape == (4, 6)
    assert all(x.device.type == "meta" and x.shape == () for x in metrics.values())


def test_entropy_reward_favours_certainty_in_good_answers():
    """Three equal good rows and a bad one: among the good, the row whose routing became more certain gains most."""
    P = torch.tensor([0.95, 0.9, 0.85, 0.9]).double().view(4, 1, 1, 1)  # -P log P falls as P rises from 0.85 up
    A = []
    for kind in ("relative", "none"):
        inputs = dict(
            log_probs=torch.zeros(4, 1).double(),
            old_log_probs=torch.zeros(4, 1).double(),
            rewards=torch.tensor([1.0, 1.0, 1.0, 0.0]).double(),
            response_mask=torch.ones(4, 1, dtype=torch.bool),
            experts=torch.zeros(4, 1, 1, 1, dtype=torch.long),
            old_experts=torch.zeros(4, 1, 1, 1, dtype=torch.long),
            expert_probs=P,
            old_expert_probs=torch.full_like(P, 0.9),
            num_experts=2,
            group_size=4,
        )
        _, gradient, metrics = with_gradient(inputs, entropy_reward=kind)
        A.append((-gradient * 4).flatten())
    relative, none = A
    assert relative[0] > relative[1] > relative[2] > 0 > relative[3]
    torch.testing.assert_close(none[:3], none[0].expand(3))
    assert metrics["entropy_reward"] == 0


def test_alpha_zero_is_no_entropy_reward():
    inputs = make(7)
    loss = with_gradient(inputs, alpha=0.0)[0]
    assert loss == with_gradient(inputs, alpha=0.0, entropy_reward="absolute")[0]
    assert loss == with_gradient(inputs, alpha=0.7, entropy_reward="none")[0]
    assert loss != with_gradient(inputs, alpha=0.7)[0]


def test_a_probability_of_zero_has_no_entropy():
    inputs = make(8)
    inputs["expert_probs"] = torch.zeros_like(inputs["expert_probs"])
    _, _, metrics = with_gradient(inputs)
    assert metrics["expert_entropy"] == 0 and all(torch.isfinite(v) for v in metrics.values())


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_clipping_bounds(seed):
    """A cluster with A > 0 earns at most (1 + high) A and stops moving its tokens beyond it; so with A < 0."""
    inputs = make(seed, 1, 2, 4, 1, 1, 1, spread=1.5)
    inputs["rewards"] = torch.tensor([1.0, 0.0]).double()
    loss, gradient, metrics = with_gradient(inputs, clip_low=0.2, clip_high=0.28, alpha=0.0)
    A = 0.5 / (0.5**0.5 + 1e-6)
    mask, log_ratio = inputs["response_mask"], inputs["log_probs"] - inputs["old_log_probs"]
    e = torch.stack([log_ratio[b][mask[b]].mean().exp() for b in range(2)])
    assert loss == pytest.approx(-(e[0].clamp(max=1.28) - e[1].clamp(min=0.8)).item() * A / 2, rel=1e-9, abs=1e-12)
    assert (gradient[0].abs().sum() == 0) == (e[0] > 1.28).item()
    assert (gradient[1].abs().sum() == 0) == (e[1] < 0.8).item()
    assert metrics["clip_share"].item() == ((e[0] > 1.28).double() + (e[1] < 0.8).double()).item() / 2


def test_every_cluster_weighs_the_same_however_many_tokens():
    """1 / |X| (eq. 12): a cluster of five tokens and one of one have gradients of one sum."""
    inputs = make(9, 1, 2, 6, 1, 1, 2, spread=0.0)
    inputs["experts"] = inputs["old_experts"] = torch.tensor([0, 0, 0, 0, 0, 1]).view(1, 6, 1, 1).repeat(2, 1, 1, 1)
    inputs["response_mask"][:] = True
    inputs["rewards"] = torch.tensor([1.0, 0.0]).double()
    gradient = with_gradient(inputs, alpha=0.0)[1]
    torch.testing.assert_close(gradient[:, :5].sum(1), gradient[:, 5])


# ------------------------------------------------------------------------------------------------- padding and corners


@pytest.mark.parametrize("junk, junk_id", [(float("nan"), -1), (float("inf"), 10**6), (-float("inf"), 0), (1e30, 3)])
def test_padding_changes_nothing(junk, junk_id):
    """Neither what stands in padding nor how much of it there is: value, gradient and metrics stay."""
    inputs = make(10)
    mask = inputs["response_mask"]
    mask[3] = False
    loss, gradient, metrics = with_gradient(inputs)
    dirty = {}
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.dim() > 1:
            value = False if x.dtype == torch.bool else junk if x.is_floating_point() else junk_id
            x = torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, value)
            x = torch.cat([x, torch.full_like(x[:, :3], value)], 1)
        dirty[name] = x
    other, other_gradient, other_metrics = with_gradient(dirty)
    assert other == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(other_gradient[:, :6], gradient)
    assert (other_gradient[:, :6][~mask] == 0).all() and (other_gradient[:, 6:] == 0).all()
    for name, metric in other_metrics.items():
        assert metric.item() == pytest.approx(metrics[name].item(), rel=1e-9, abs=1e-12), name


def test_a_row_without_response_counts_in_the_mean_over_rows():
    """Decision of the specification: it adds 0, so the other rows keep their weight of 1 / B."""
    inputs = make(11, 1, 3)
    inputs["rewards"] = torch.tensor([1.0, 0.0, 5.0]).double()
    inputs["response_mask"][2] = False
    expected, gradient, _ = by_the_book(inputs)
    loss, ours, _ = with_gradient(inputs)
    assert loss == pytest.approx(expected, abs=1e-9) and (ours[2] == 0).all() and ours[:2].abs().sum() > 0


def test_all_false_mask():
    inputs = make(12)
    inputs["response_mask"][:] = False
    inputs["log_probs"][:] = float("nan")
    loss, gradient, metrics = with_gradient(inputs)
    assert loss == 0 and (gradient == 0).all()
    assert all(torch.isfinite(v) for v in metrics.values()) and metrics["clusters"] == 0


def test_no_route_in_common():
    """Every pair is active under one policy only: nothing to compare, zero loss that can be differentiated."""
    inputs = make(13, K=1)
    inputs["experts"], inputs["old_experts"] = inputs["experts"] % 2, inputs["old_experts"] % 2 + 2
    loss, gradient, metrics = with_gradient(inputs)
    assert loss == 0 and (gradient == 0).all()
    assert metrics["clusters"] == 0 and metrics["dropped_clusters"] > 0


@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("probs", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("log_probs", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(ids, probs, log_probs):
    """Low precision is computed in float32: the loss is that of the rounded inputs, not of rounded steps."""
    inputs = make(14)
    for name in ("log_probs", "old_log_probs"):
        inputs[name] = inputs[name].to(log_probs)
    for name in ("experts", "old_experts"):
        inputs[name] = inputs[name].to(ids)
    for name in ("expert_probs", "old_expert_probs"):
        inputs[name] = inputs[name].to(probs)
    expected, expected_gradient, _ = by_the_book(inputs)
    new = inputs["log_probs"].requires_grad_()
    loss, metrics = erpo_loss(**inputs)
    loss.backward()
    double = log_probs == torch.float64
    assert loss.dtype == (torch.float64 if double else torch.float32)
    assert loss.item() == pytest.approx(expected, abs=1e-9 if double else 3e-5)
    assert new.grad.dtype == log_probs
    rtol = 1e-2 if log_probs == torch.bfloat16 else 0  # the gradient itself is handed over in that type
    np.testing.assert_allclose(new.grad.double(), expected_gradient, atol=1e-9 if double else 1e-4, rtol=rtol)
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())


@pytest.mark.parametrize(
    "dtype, E, highest",
    [("uint8", 256, 255), ("int8", 128, 127), ("int8", 256, 100), ("uint8", 512, 3), ("uint8", 384, 200)],
)
def test_small_types_hold_ids_of_many_experts(dtype, E, highest):
    """E itself need not fit the type of the ids: 256 is 0 as uint8."""
    inputs = make(14)
    for name in ("experts", "old_experts"):
        ids = inputs[name]
        inputs[name] = torch.where(ids == ids.max(), highest, ids)
    inputs["num_experts"] = E
    expected = with_gradient(inputs)[0]
    for name in ("experts", "old_experts"):
        inputs[name] = inputs[name].to(getattr(torch, dtype))
        assert inputs[name].max() == highest
    assert with_gradient(inputs)[0] == expected != 0
    with pytest.raises(ValueError, match=rf"^experts must lie in 0\.\.{highest - 1} .*{highest}"):
        erpo_loss(**inputs | {"num_experts": highest})


@pytest.mark.parametrize("sign", [1, -1])
def test_rewards_equal_within_rounding_are_equal(sign):
    """The same three parts summed in four orders: neither sigma nor A may come of the last digit."""
    inputs = make(15, G=4, dtype=torch.float32)
    a, b, c = (torch.tensor(x) for x in (50.1, 30.2, 20.3))
    R = torch.stack([a + b + c, c + b + a, a + c + b, b + c + a])
    assert R.unique().numel() > 1
    inputs["rewards"] = sign * R.repeat(2)
    loss, gradient, metrics = with_gradient(inputs, entropy_reward="none")
    assert loss == 0 and (gradient == 0).all() and metrics["clusters"] > 0


def test_the_rewards_may_be_whole_numbers():
    inputs = make(15)
    inputs["rewards"] = torch.tensor([0, 1, 1, 0])
    whole = with_gradient(inputs)[0]
    inputs["rewards"] = inputs["rewards"].double()
    assert whole == with_gradient(inputs)[0] != 0
    inputs["rewards"] = inputs["rewards"].bool()
    assert whole == with_gradient(inputs)[0]


@settings(deadline=None, max_examples=20)
@given(seed=seeds, E=st.integers(2, 6))
def test_the_sums_without_atomics_equal_the_others(seed, E):
    """What CUDA runs in place of scatter_add, run here; bucket E is the padding's and nobody reads it."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(2, 7, E, generator=g).topk(2).indices
    ids[1, 4:] = E
    values = torch.randn(2, 7, 2, generator=g, dtype=torch.float64)
    one = erpo._bucket_sums(values, ids, E + 1)
    two = erpo._bucket_sums_without_atomics(values, ids, E + 1)
    torch.testing.assert_close(one[:, :E], two[:, :E])


def test_nothing_of_the_size_of_all_routes_is_made(monkeypatch):
    """At the paper's scale a float copy of [B, T, L, K] is 176 MB: the largest tensor made has one layer of it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                storage = out.untyped_storage().data_ptr()
                if storage not in inputs_storage:
                    self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
            return out

    inputs = make(16, 1, 2, 64, 8, 4, 8)
    inputs_storage = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, torch.Tensor)}
    with Largest() as largest:
        with_gradient(inputs)
    assert 0 < largest.numel <= 2 * 64 * 4  # B * T * K


def test_loss_refuses_bad_arguments():
    good = make(17)
    for name, bad, message in (
        ("log_probs", torch.zeros(4, 5), r"^log_probs .*\[4, 6\].*\[4, 5\]"),
        ("old_log_probs", torch.zeros(3, 6), r"^old_log_probs .*\[4, 6\].*\[3, 6\]"),
        ("rewards", torch.zeros(4, 6), r"^rewards .*\[4\].*\[4, 6\]"),
        ("rewards", torch.tensor([0.0, 1.0, -1e15, 0.0], dtype=torch.float64), "rewards must be finite and below 1e15"),
        ("rewards", torch.tensor([0.0, 1.0, float("nan"), 0.0]), "rewards must be finite"),
        ("rewards", torch.tensor([0.0, 1.0, float("inf"), 0.0]), "rewards must be finite"),
        ("response_mask", torch.ones(4, 7, dtype=torch.bool), r"^response_mask .*\[4, 6\].*\[4, 7\]"),
        ("response_mask", torch.ones(4, 6), "^response_mask .*bool.*float32"),
        ("experts", good["experts"][0], r"^experts .*\[B, T, L, K\].*\[6, 2, 2\]"),
        ("experts", good["experts"][:, :, :0], r"^experts .*\[4, 6, 0, 2\]"),
        ("experts", good["experts"].double(), "^experts .*integer.*float64"),
        ("old_experts", good["old_experts"].to(torch.uint16), "^old_experts .*integer.*uint16"),
        ("experts", good["experts"] + 4, r"^experts .*0\.\.3.*layer 0"),
        ("experts", good["experts"] - 4, r"^experts .*0\.\.3.*layer 0"),
        ("old_experts", good["old_experts"].clamp(min=2) + 1, r"^old_experts .*0\.\.3.*got 3\.\.4 in layer 0"),
        ("old_experts", good["old_experts"] + 4, r"^old_experts .*0\.\.3"),
        ("old_experts", good["old_experts"][..., :1], r"^old_experts .*\[4, 6, 2, 2\].*\[4, 6, 2, 1\]"),
        ("expert_probs", torch.ones(4, 6, 2, 1), r"^expert_probs .*\[4, 6, 2, 2\].*\[4, 6, 2, 1\]"),
        ("old_expert_probs", torch.ones(4, 6, 1, 2), r"^old_expert_probs .*\[4, 6, 2, 2\].*\[4, 6, 1, 2\]"),
        ("num_experts", 2, r"^experts .*0\.\.1"),
        ("group_size", 1, "group_size.*at least 2.*got 1"),
        ("group_size", 3, "group_size.*4 rows.*groups of 3"),
        ("alpha", 1.2, "^alpha .*1.2"),
        ("alpha", float("nan"), "^alpha .*nan"),
        ("clip_low", -0.2, "clip_low and clip_high.*-0.2"),
        ("clip_high", float("nan"), "clip_low and clip_high.*nan"),
        ("entropy_reward", "full", "^entropy_reward .*'full'"),
    ):
        with pytest.raises(ValueError, match=message):
            erpo_loss(**{**good, name: bad})
