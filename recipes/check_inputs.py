"""check_inputs: does what is handed to a loss look like what the loss takes? One function, made to be pasted.

A loss checks shapes and types, and cannot know that log-probabilities are probabilities or that the rows of a group do
not stand together: it would train, on nonsense. Call this before it in the first steps; it reads the tensors on the
host, which a device has to be waited for.

    check_inputs(log_probs=new, old_log_probs=old, rewards=R, response_mask=mask, group_size=8, prompts=prompt_ids)
    loss, metrics = erpo_loss(new, old, R, mask, ...)

Needs torch alone. B rows, T positions, L MoE layers, K active experts a token, E experts a layer.
"""

import torch


def check_inputs(*, response_mask=None, num_experts=None, group_size=None, prompts=None, **tensors):
    """ValueError: one sentence about the first argument that looks like something else. Every one may be left out.

    tensors  by the losses' names: log_probs, old_log_probs, router_log_probs, old_router_log_probs, expert_probs,
             old_expert_probs, experts, old_experts, rewards, advantages
    response_mask  bool [B, T], or ERL's `perturbed` [B, T, L]; what it leaves out is not looked at
    prompts  one number or text a row, equal where the prompt is
    """
    if response_mask is not None and not response_mask.any():
        raise ValueError("response_mask is false everywhere: there is no token to learn from")
    rewards, advantages = tensors.pop("rewards", None), tensors.pop("advantages", None)
    for name, x in tensors.items():
        kind = name.removeprefix("old_")
        if kind not in ("log_probs", "router_log_probs", "expert_probs", "experts"):
            raise ValueError(f"check_inputs knows no {name}")
        if x is None:
            continue
        x = x if response_mask is None else x[response_mask]
        if kind == "experts":
            _check_experts(name, x, num_experts)
            continue
        x, log = x.double(), kind != "expert_probs"
        _check_range(name, x, log)
        if kind != "log_probs":
            _check_whole(name, x.exp() if log else x, num_experts)
    _check_groups(rewards, advantages, group_size, prompts)


def _check_range(name, x, log):
    if not x.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity where it counts: a mask or a division by 0 before it?")
    low, high = x.min().item(), x.max().item()
    if (log and high <= 1e-3) or (not log and low >= 0 and high <= 1.001):  # bfloat16 may end a little above 0
        return
    looks = f"logits, from {low:.3g} to {high:.3g}: take {'log_softmax' if log else 'softmax'}, then gather"
    if log and low >= 0:
        sign = f"a negative log-likelihood, up to {high:.3g}: change its sign"
        looks = "probabilities, all within [0, 1]: take the logarithm" if high <= 1.001 else sign
    elif not log and high <= 0:
        looks = "log-probabilities, none above 0: take exp"
    raise ValueError(f"{name} looks like {looks}")


def _check_whole(name, probs, num_experts):
    """Probabilities [.., K] of the full softmax sum to less than 1, unless K = E; the gate's weights sum to 1. Without
    num_experts nobody can say whether K = E."""
    if num_experts not in (None, probs.shape[-1]) and (probs.sum(-1) - 1).abs().max() < 1e-6:
        raise ValueError(
            f"{name} sums to 1 over the K experts everywhere, like gate weights normalised over the top-K: take the "
            "full softmax over all experts" + (" (or the router has collapsed)" if probs.shape[-1] == 1 else "")
        )


def _check_experts(name, ids, num_experts):
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold expert ids, whole numbers, got {ids.dtype}: weights or a mask instead?")
    ids = ids.long()  # num_experts itself may not fit their type
    if num_experts is not None and not (0 <= ids.min() and ids.max() < num_experts):
        raise ValueError(
            f"{name} must lie in 0..{num_experts - 1}, got {ids.min()}..{ids.max()}: ids counted over all layers, or "
            "num_experts of another model?"
        )
    if (ids.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError(f"{name} names an expert twice for one token: the K of a token are distinct")


def _check_groups(rewards, advantages, G, prompts):
    rows = next((len(x) for x in (rewards, advantages, prompts) if x is not None), None)
    if G is not None and (G < 2 or rows is not None and rows % G):
        raise ValueError(f"group_size must be at least 2 and divide the {rows or 'number of'} rows, got {G}")
    if G is not None and prompts is not None:
        prompts = prompts.tolist() if isinstance(prompts, torch.Tensor) else list(prompts)
        for start in range(0, len(prompts), G):
            if any(x != prompts[start] for x in prompts[start : start + G]):
                raise ValueError(
                    f"rows {start} to {start + G - 1} are not answers to one prompt: the {G} of a group stand next to "
                    "each other, as repeat_interleave puts them (repeat does not)"
                )
    if G is not None and rewards is not None:
        R = rewards.double().view(-1, G)
        R = R[R.amax(1) > R.amin(1)]
        if len(R) and (R.mean(1).abs() < 1e-3).all() and (R.std(1) - 1).abs().max() < 1e-3:
            raise ValueError("rewards looks like advantages, mean 0 and deviation 1 in every group: hand over rewards")
    if advantages is not None and advantages.dim() == 1 and advantages.any():
        A = advantages.double()
        if ((A == 0) | (A == 1)).all():
            raise ValueError("advantages looks like rewards, all 0 or 1: see group_advantages")
        if G is not None and (A.view(-1, G).mean(1).abs() > 1e-2 * A.abs().max()).any():
            raise ValueError(f"advantages does not have mean 0 over groups of {G}: rewards, or rows out of order?")
