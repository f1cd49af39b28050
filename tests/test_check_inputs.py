"""support/check_inputs.py: what is right passes, and each usual mistake gets its own sentence."""

import pytest
import torch

from baselines import group_advantages
from erpo import erpo_loss
from support.check_inputs import check_inputs

B, T, L, K, E, G = 8, 5, 2, 2, 4, 4


def right(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, B, T, 50, generator=g)
    router = torch.randn(2, B, T, L, E, generator=g).log_softmax(-1)
    experts = router.topk(K).indices
    chosen = router.gather(-1, experts)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    new, old = (x.log_softmax(-1)[..., 0].masked_fill(~mask, float("nan")) for x in logits)
    rewards = torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1])
    return dict(
        response_mask=mask,
        log_probs=new.to(dtype),
        old_log_probs=old.to(dtype),
        router_log_probs=chosen[0].to(dtype),
        old_router_log_probs=chosen[1].to(dtype),
        expert_probs=chosen[0].exp().to(dtype),
        old_expert_probs=chosen[1].exp().to(dtype),
        experts=experts[0],
        old_experts=experts[1].masked_fill(~mask[:, :, None, None], -1),
        num_experts=E,
        rewards=rewards,
        advantages=group_advantages(rewards, G),
        group_size=G,
        prompts=torch.arange(2).repeat_interleave(G),
        alpha=0.2,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_right_passes(dtype):
    """All at once, each alone, and with K = E, where probabilities do sum to 1."""
    inputs = right(dtype)
    check_inputs(**inputs)
    for name in inputs:
        if "log_probs" not in name or "router" in name:  # the others hold NaN at padding
            few = {k: inputs[k] for k in (name, "response_mask")} if name not in ("group_size", "num_experts") else {}
            check_inputs(**few)
    everyone = torch.full((B, T, L, E), 1 / E)
    check_inputs(expert_probs=everyone, router_log_probs=everyone.log(), num_experts=E)
    check_inputs(advantages=torch.zeros(B), rewards=torch.ones(B), group_size=G)


def test_what_passes_is_what_the_loss_takes():
    inputs = right()
    names = ("log_probs", "old_log_probs", "rewards", "response_mask", "experts", "old_experts")
    names += ("expert_probs", "old_expert_probs")
    options = {k: inputs[k] for k in ("num_experts", "group_size", "alpha")}
    assert erpo_loss(*(inputs[k] for k in names), **options)[0].isfinite()


def logits():
    return 3 * torch.randn(B, T, L, K, generator=torch.Generator().manual_seed(1))


MISTAKES = [
    ("log_probs", lambda x: x.exp(), "log_probs looks like probabilities"),
    ("old_log_probs", lambda x: -x, "old_log_probs is positive throughout.*negative log-likelihood"),
    ("old_log_probs", lambda x: x + 4, "old_log_probs looks like logits"),
    ("log_probs", lambda x: x * float("nan"), "log_probs holds NaN"),
    ("router_log_probs", lambda x: x.exp(), "router_log_probs looks like probabilities"),
    ("router_log_probs", lambda x: logits(), "router_log_probs looks like logits"),
    ("old_router_log_probs", lambda x: x.log_softmax(-1), "old_router_log_probs sums to 1.*full softmax"),
    ("expert_probs", lambda x: x.log(), "expert_probs looks like log-probabilities"),
    ("expert_probs", lambda x: logits(), "expert_probs looks like logits"),
    ("old_expert_probs", lambda x: x / x.sum(-1, keepdim=True), "old_expert_probs sums to 1.*full softmax"),
    ("old_expert_probs", lambda x: x / 0, "old_expert_probs holds NaN or infinity"),
    ("experts", lambda x: x.double(), "experts must hold expert ids.*float64"),
    ("experts", lambda x: x + E * torch.arange(L)[:, None], r"experts must lie in 0\.\.3.*all layers"),
    ("old_experts", lambda x: x * 0, "old_experts names an expert twice"),
    ("rewards", lambda x: group_advantages(torch.arange(8.0), G), "rewards looks like advantages"),
    ("advantages", lambda x: torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1]), "advantages looks like rewards, all 0 or 1"),
    ("advantages", lambda x: torch.arange(8.0), "advantages does not have mean 0 over groups of 4"),
    ("advantages", lambda x: x.roll(1), "advantages does not have mean 0"),
    ("prompts", lambda x: x.view(2, G).T.flatten(), "rows 0 to 3 are not answers to one prompt.*repeat_interleave"),
    ("prompts", lambda x: list("aaaabbba"), "rows 4 to 7 are not answers"),
    ("group_size", lambda x: 3, "group_size must be at least 2 and divide the 8 rows, got 3"),
    ("group_size", lambda x: 1, "group_size must be at least 2"),
    ("alpha", lambda x: 20, r"alpha must lie within \[0, 1\], a share: 0.2 instead of 20"),
    ("alpha", lambda x: -0.1, r"alpha must lie within \[0, 1\], got -0.1"),
    ("alpha", lambda x: float("nan"), "alpha must lie within.*nan"),
    ("response_mask", lambda x: x & False, "response_mask is false everywhere"),
]


@pytest.mark.parametrize("name, spoil, sentence", MISTAKES)
def test_each_mistake_is_named(name, spoil, sentence):
    inputs = right()
    with pytest.raises(ValueError, match=f"^{sentence}"):
        check_inputs(**{**inputs, name: spoil(inputs[name])})


def test_small_types_hold_ids_of_many_experts():
    check_inputs(experts=torch.tensor([[[[255, 3]]]], dtype=torch.uint8), num_experts=256)
    with pytest.raises(ValueError, match=r"experts must lie in 0\.\.127, got 3\.\.255"):
        check_inputs(experts=torch.tensor([[[[255, 3]]]], dtype=torch.uint8), num_experts=128)


def test_all_experts_may_be_used_where_their_number_is_not_said():
    """K = E: probabilities sum to 1, and without num_experts nobody knows that K is not E."""
    whole = logits().softmax(-1)
    check_inputs(expert_probs=whole)
    check_inputs(expert_probs=whole, num_experts=K)
    with pytest.raises(ValueError, match="sums to 1"):
        check_inputs(expert_probs=whole, num_experts=K + 1)
    with pytest.raises(ValueError, match="the router has collapsed"):
        check_inputs(expert_probs=whole[..., :1] * 0 + 1, num_experts=8)


def test_rewards_of_plus_and_minus_one_are_rewards():
    """Their mean may be 0 too; their deviation is not 1."""
    check_inputs(rewards=torch.tensor([1.0, -1, 1, -1, 1, 1, -1, 1]), group_size=4)
    check_inputs(rewards=torch.tensor([1.0, -1] * 32), group_size=64)


def test_a_mask_of_decisions_does_for_erl():
    inputs = right()
    perturbed = inputs["response_mask"][..., None].expand(B, T, L)
    check_inputs(response_mask=perturbed, router_log_probs=inputs["router_log_probs"])
    with pytest.raises(ValueError, match="looks like probabilities"):
        check_inputs(response_mask=perturbed, router_log_probs=inputs["router_log_probs"].exp())
