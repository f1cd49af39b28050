"""recipes/check_inputs.py: what is right passes, and each usual mistake is seen."""

import pytest
import torch

from baselines import group_advantages
from recipes.check_inputs import check_inputs

B, T, L, K, E, G = 8, 5, 2, 2, 4, 4
REWARDS = torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1])


def right(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    router = torch.randn(2, B, T, L, E, generator=g).log_softmax(-1)
    experts = router.topk(K).indices
    chosen = router.gather(-1, experts).to(dtype)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    log_probs = torch.randn(2, B, T, 50, generator=g).log_softmax(-1)[..., 0].masked_fill(~mask, float("nan")).to(dtype)
    inputs = dict(response_mask=mask, num_experts=E, group_size=G, rewards=REWARDS)
    inputs |= dict(advantages=group_advantages(REWARDS, G), prompts=torch.arange(2).repeat_interleave(G))
    for i, old in enumerate(("", "old_")):
        inputs[old + "experts"] = experts[i].masked_fill(~mask[:, :, None, None], -1)
        inputs[old + "log_probs"], inputs[old + "router_log_probs"] = log_probs[i], chosen[i]
        inputs[old + "expert_probs"] = chosen[i].exp()
    return inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_right_passes(dtype):
    """All at once; K = E, where probabilities do sum to 1; rewards of +1 and -1; ERL's mask of decisions."""
    inputs = right(dtype)
    check_inputs(**inputs)
    everyone = torch.full((B, T, L, E), 1 / E)
    check_inputs(expert_probs=everyone, router_log_probs=everyone.log(), num_experts=E)
    check_inputs(expert_probs=everyone)
    check_inputs(rewards=torch.tensor([1.0, -1] * 32), group_size=64)
    check_inputs(advantages=torch.zeros(B), rewards=torch.ones(B), group_size=G)
    perturbed = inputs["response_mask"][..., None].expand(B, T, L)
    check_inputs(response_mask=perturbed, router_log_probs=inputs["router_log_probs"])
    check_inputs(experts=torch.tensor([[[[255, 3]]]], dtype=torch.uint8), num_experts=256)


MISTAKES = [
    ("log_probs", lambda x: x.exp(), "probabilities"),
    ("old_log_probs", lambda x: -x, "negative log-likelihood"),
    ("log_probs", lambda x: x * float("nan"), "NaN"),
    ("router_log_probs", lambda x: x - x.mean(), "logits"),
    ("old_router_log_probs", lambda x: x.log_softmax(-1), "sums to 1.*full softmax"),
    ("expert_probs", lambda x: x.log(), "log-probabilities"),
    ("old_expert_probs", lambda x: x / x.sum(-1, keepdim=True), "sums to 1.*full softmax"),
    ("experts", lambda x: x.double(), "expert ids.*float64"),
    ("experts", lambda x: x + E * torch.arange(L)[:, None], r"0\.\.3.*all layers"),
    ("old_experts", lambda x: x * 0, "twice"),
    ("rewards", lambda x: group_advantages(torch.arange(8.0), G), "looks like advantages"),
    ("advantages", lambda x: REWARDS, "looks like rewards"),
    ("advantages", lambda x: x.roll(1), "mean 0 over groups of 4"),
    ("prompts", lambda x: x.view(2, G).T.flatten(), "rows 0 to 3 are not answers to one prompt"),
    ("group_size", lambda x: 3, "divide the 8 rows"),
    ("response_mask", lambda x: x & False, "false everywhere"),
]


@pytest.mark.parametrize("name, spoil, words", MISTAKES)
def test_each_mistake_is_named(name, spoil, words):
    inputs = right()
    with pytest.raises(ValueError, match=f"^{name}.*{words}|^{words}"):
        check_inputs(**{**inputs, name: spoil(inputs[name])})
