"""ERPO, expert relative policy optimization (Qian, Li, Mi, Shang, Zhang).

GRPO has one importance ratio a token, noisy when the token's experts change; GSPO has one a row, blind to the token.
ERPO has one for each expert: the tokens of a row that an expert serves form a cluster, which gets its ratio (eq. 6-7),
its reward (eq. 8-10), its advantage and its clip (eq. 11). Needs torch alone.
B rows (prompts x G responses, the G of a prompt next to each other), T positions, L MoE layers, K active experts a
token, E experts a layer; each (layer, expert) pair is an expert j of the paper, J = L * E of them.
"""

from typing import Literal

import torch


def erpo_loss(
    log_probs,
    old_log_probs,
    rewards,
    response_mask,
    experts,
    old_experts,
    expert_probs,
    old_expert_probs,
    *,
    num_experts: int,
    group_size: int,
    alpha: float = 0.2,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    entropy_reward: Literal["relative", "absolute", "none"] = "relative",
    weights=None,
):
    """-J_ERPO (eq. 11). With E = K = L = 1, alpha = 0, GSPO's clip range and a response in every row it is GSPO.

    log_probs, old_log_probs        [B, T]        of the token that position t predicts; gradient through log_probs only
    rewards                         [B]           task reward a row, below 1e15 in size; checked on the host
    response_mask                   [B, T]        bool, true where the predicted token belongs to the response
    experts, old_experts            [B, T, L, K]  ids that the new, the old policy used at t; distinct, int64 ... uint8
    expert_probs, old_expert_probs  [B, T, L, K]  P(tau)[j] of those experts, P the router's full softmax over all E
                                                  (never the gate's weights, renormalised over the top-K); no gradient
    weights                         [B, T]        of baselines.mismatch_weights, no gradient; None for 1 everywhere
    num_experts, group_size                       experts a layer, E; responses a prompt, G, at least 2
    alpha                weight of the entropy reward, within [0, 1] [section 5.1: 0.2]
    clip_low, clip_high  range of a cluster's ratio, 1 - clip_low to 1 + clip_high [section 5.1: 0.2, 0.28]
    entropy_reward       "relative" (eq. 9), "absolute" (the ablation sigma * H) or "none" (as alpha = 0)

    Decisions: a token belongs to the clusters of position t, the forward pass that predicted it, not to those of the
    position at which it is read. The mean weight of a cluster of the new policy multiplies its surrogate.
    Reduction: mean over the pairs that have a ratio in a row, then mean over all B rows (a row with no pair adds 0).
    Padded positions may hold anything. A cluster's log ratio above 40 counts as 40, without gradient.
    Paid for plain code: several copies of [B, T, L, K], one of them int64, are alive at once (gigabytes at 14,000
    tokens of 48 layers and 8 experts), and on CUDA scatter_add adds in an order that changes from run to run.
    Returns (loss, metrics), metrics as detached 0-d tensors: loss; over the pairs with a ratio, of all rows,
      ratio_mean, ratio_std, ratio_neg_log  of e; the last is the mean of -log e
      clip_share                            share of ratios whose gradient the clip cuts off
      expert_entropy, entropy_reward        mean H and mean R_ent (0 with "none")
      clusters, dropped_clusters            pairs with a ratio; pairs active under one policy only
    ValueError: wrong shapes, types, groups or options, rewards not finite, on the CPU ids of experts outside 0..E-1.
    """
    _check(dict(locals()))
    if not (0 <= alpha <= 1 and clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"need alpha within [0, 1], clips of at least 0, got {alpha=}, {clip_low=}, {clip_high=}")
    if entropy_reward not in ("relative", "absolute", "none"):
        raise ValueError(f'entropy_reward must be "relative", "absolute" or "none", got {entropy_reward!r}')
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    R = rewards.detach().to(dtype).to(log_probs.device, non_blocking=True)  # [B]
    # Each policy has its own clusters: size |X|, mean log-probability (eq. 6), mean of -P log P (eq. 8), all [B, J].
    shared = response_mask, num_experts
    size, log_p, H = _clusters(log_probs.to(dtype), experts, expert_probs, *shared)
    old_size, old_log_p, old_H = _clusters(old_log_probs.detach().to(dtype), old_experts, old_expert_probs, *shared)
    W = 1 if weights is None else _clusters(weights.detach().to(dtype), experts, expert_probs, *shared)[1]
    # Decision: a pair active under one policy only has no ratio and is left out of the sum and of |E^i|.
    valid = (size > 0) & (old_size > 0)
    log_e = (log_p - old_log_p).masked_fill(~valid, 0)
    e = log_e.clamp(max=40).exp()  # eq. 7, alone with a gradient (eq. 12); infinity * an A of 0 would be NaN
    alpha = 0.0 if entropy_reward == "none" else alpha
    change = {"relative": H - old_H, "absolute": H, "none": torch.zeros_like(H)}[entropy_reward]
    R_ent = (_sigma(R, group_size)[:, None] * change).masked_fill(~valid, 0)  # eq. 9
    A = _advantages((1 - alpha) * R[:, None] + alpha * R_ent, valid, group_size)  # eq. 10
    unclipped, clipped = e * A, e.clamp(1 - clip_low, 1 + clip_high) * A
    loss = -((torch.minimum(unclipped, clipped) * W).sum(1) / valid.sum(1).clamp(min=1)).mean()  # eq. 11
    n, ratio = valid.sum().clamp(min=1), e.detach()
    mean = (ratio * valid).sum() / n
    return loss, {
        "loss": loss.detach(),
        "ratio_mean": mean,
        "ratio_std": (((ratio - mean) ** 2 * valid).sum() / n).sqrt(),
        "ratio_neg_log": -log_e.detach().sum() / n,
        "clip_share": (clipped < unclipped).sum() / n,
        "clusters": valid.sum(),
        "dropped_clusters": ((size > 0) ^ (old_size > 0)).sum(),
        "expert_entropy": (H * valid).sum() / n,
        "entropy_reward": R_ent.sum() / n,
    }


def _clusters(log_probs, experts, probs, mask, num_experts):
    """Size of every cluster, and over it the means of log_probs [B, T] and of -P log P [B, T, L, K]: three [B, J]."""
    B, _, L, _ = experts.shape
    j = experts + num_experts * torch.arange(L, device=experts.device)[:, None]  # one int64 id for layer and expert
    j = j.masked_fill_(~mask[:, :, None, None], L * num_experts).flatten(1)  # padding: a bucket of its own, cut off
    P = probs.detach().to(log_probs.dtype)
    entropy = P.clamp(min=torch.finfo(P.dtype).tiny).log_().mul_(P).neg_()  # 0 at P = 0
    values = P.new_ones(1).expand(j.shape), log_probs[:, :, None, None].expand_as(P), entropy  # each token L * K times
    buckets = log_probs.new_zeros(B, L * num_experts + 1)
    size, *sums = (buckets.scatter_add(1, j, x.flatten(1))[:, :-1] for x in values)
    return size, *(x / size.clamp(min=1) for x in sums)


def _sigma(R, group_size):
    """sigma = -sign(R - mean of the group) (eq. 9), [B] -> [B]; a difference within the mean's rounding counts as 0."""
    R = R.view(-1, group_size)
    difference = R - R.mean(1, keepdim=True)
    rounding = group_size * torch.finfo(R.dtype).eps * R.abs().amax(1, keepdim=True)
    return -(difference.sign() * (difference.abs() > rounding)).flatten()


def _advantages(R, valid, group_size):
    """A_ij: the rewards R_ij [B, J] of a pair, standardised over those rows of its group in which it has a ratio.

    Decisions: the standard deviation is the sample's (n - 1) plus 1e-6; fewer than two such rows, or R_ij equal within
    rounding, give 0. (A pair that served only rows of equal task reward is standardised over its entropy rewards.)
    """
    R, valid = (x.unflatten(0, (-1, group_size)) for x in (R, valid))  # [P, G, J]
    n = valid.sum(1, keepdim=True)  # [P, 1, J]
    difference = R - (R * valid).sum(1, keepdim=True) / n.clamp(min=1)
    std = ((difference**2 * valid).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    highest = R.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)  # std of equal rewards is a residue of rounding
    lowest = R.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    rounding = group_size * torch.finfo(R.dtype).eps * torch.maximum(highest, -lowest)  # of the largest
    return (difference / (std + 1e-6)).masked_fill(~(valid & (highest - lowest > rounding)), 0).flatten(0, 1)


def _check(given):
    """ValueError for wrong shapes, types, ids and groups; `given` are erpo_loss's arguments by name."""
    experts, mask, rewards, G = given["experts"], given["response_mask"], given["rewards"], given["group_size"]
    if experts.dim() != 4 or experts.numel() == 0:
        raise ValueError(f"experts must have shape [B, T, L, K], none of them 0, got {list(experts.shape)}")
    for name, x in ((name, x) for name, x in given.items() if isinstance(x, torch.Tensor)):
        shape = experts.shape[: 4 if "expert" in name else 1 if name == "rewards" else 2]
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be torch.bool, got {mask.dtype}")
    if not (rewards.double().abs() < 1e15).all():  # a float32 cannot hold the square of more than 1e19
        raise ValueError(f"rewards must be finite and below 1e15 in size, got {rewards.tolist()}")
    if G < 2 or len(rewards) % G:
        raise ValueError(f"group_size must be at least 2 and divide the number of rows: {len(rewards)} rows, got {G}")
    for name, ids in (("experts", experts), ("old_experts", given["old_experts"])):
        if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ValueError(f"{name} must be of an integer type (int64 ... int8 or uint8), got {ids.dtype}")
        if ids.device.type == "cpu":  # elsewhere the check would wait for the device
            lowest, highest = (int(end) for end in ids.masked_fill(~mask[:, :, None, None], 0).aminmax())
            if not 0 <= lowest <= highest < given["num_experts"]:
                raise ValueError(f"{name} must lie in 0..{given['num_experts'] - 1}, got {lowest}..{highest}")
