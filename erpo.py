"""ERPO, expert relative policy optimization (Qian, Li, Mi, Shang, Zhang).

GRPO has one importance ratio a token, which is noisy when the token's experts change; GSPO has one a row, which is
blind to the token. ERPO has one for each expert: the tokens of a row that an expert serves form a cluster, and a
cluster gets its ratio (eq. 6-7), its reward (eq. 8-10), its advantage and its clip (eq. 11).

Needs torch alone. B rows (prompts x G responses, the G of a prompt next to each other), T positions, L MoE layers,
K active experts a token, E experts a layer; each (layer, expert) pair is an expert j of the paper.
"""

from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint


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
):
    """-J_ERPO (eq. 11). With E = K = L = 1, alpha = 0, GSPO's clip range and a response in every row it is GSPO.

    log_probs, old_log_probs        [B, T]        of the token that position t predicts; gradient through log_probs only
    rewards                         [B]           task reward a row, below 1e15 in size; checked on the host (no wait
                                                  for the device where they lie on the CPU)
    response_mask                   [B, T]        bool, true where the predicted token belongs to the response
    experts, old_experts            [B, T, L, K]  the experts that the new, the old policy used at position t: int64,
                                                  int32, int16, int8 or uint8, distinct within a token
    expert_probs, old_expert_probs  [B, T, L, K]  P(tau)[j] of those experts, P the router's full softmax over all E
                                                  (never the gate's weights, renormalised over the top-K); no gradient
    num_experts          experts a layer, E
    group_size           responses a prompt, G; at least 2
    alpha                weight of the entropy reward, within [0, 1] [section 5.1: 0.2]
    clip_low, clip_high  range of a cluster's ratio, 1 - clip_low to 1 + clip_high [section 5.1: 0.2, 0.28]
    entropy_reward       "relative" (eq. 9), "absolute" (the ablation sigma * H) or "none" (as alpha = 0)

    Decision (alignment): a token belongs to the clusters of position t, the forward pass that predicted it, not to
    those of the position at which it is read.
    Reduction: mean over the pairs that have a ratio in a row, then mean over all B rows.
    Padded positions may hold anything. An all-false mask gives 0 with gradient 0. A cluster's log ratio above 40 counts
    as 40, without gradient.
    Returns (loss, metrics), metrics as detached 0-d tensors; the ratios are those of all rows' pairs:
      loss                                  the loss
      ratio_mean, ratio_std, ratio_neg_log  of e; the last is the mean of -log e
      clip_share                            share of ratios whose gradient the clip cuts off
      clusters, dropped_clusters            pairs with a ratio; pairs active under one policy only
      expert_entropy, entropy_reward        mean H and mean R_ent (0 with "none") over pairs with a ratio
    ValueError: wrong shapes or types, G below 2 or no divisor of B, rewards that are not finite, unknown options, and
    on the CPU expert ids outside 0..E-1 (elsewhere the device reports them in its own way).
    """
    _check_tensors(
        log_probs, old_log_probs, rewards, response_mask, experts, old_experts, expert_probs, old_expert_probs
    )
    _check_options(len(rewards), group_size, alpha, clip_low, clip_high, entropy_reward)
    _check_ids(experts, old_experts, response_mask, num_experts)
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    R = rewards.to(dtype).to(log_probs.device, non_blocking=True)  # [B]

    # Size |X|, mean log-probability (T of eq. 6) and mean entropy term H of every cluster, all [B, L, E].
    # The new policy's clusters come from the new assignment, the old policy's from the old one.
    size, log_p, H = _clusters(log_probs.to(dtype), experts, expert_probs, response_mask, num_experts)
    with torch.no_grad():
        old_size, old_log_p, old_H = _clusters(
            old_log_probs.to(dtype), old_experts, old_expert_probs, response_mask, num_experts
        )
    # Decision: a pair active under one policy only has no ratio and is left out of the sum and of |E^i|.
    valid = (size > 0) & (old_size > 0)
    log_e = (log_p - old_log_p).masked_fill(~valid, 0)
    e = log_e.clamp(max=40).exp()  # eq. 7; infinity * an advantage of 0 would be NaN

    with torch.no_grad():  # rewards, entropies and advantages carry no gradient: only e does (eq. 12)
        if entropy_reward == "none":
            alpha = 0.0
        entropy = {"relative": H - old_H, "absolute": H, "none": torch.zeros_like(H)}[entropy_reward]
        R_ent = (_sigma(R, group_size)[:, None, None] * entropy).masked_fill(~valid, 0)  # eq. 9
        A = _advantages((1 - alpha) * R[:, None, None] + alpha * R_ent, valid, group_size)  # eq. 10

    unclipped, clipped = e * A, e.clamp(1 - clip_low, 1 + clip_high) * A
    pairs = valid.sum((1, 2)).clamp(min=1)  # |E^i| [B]
    # Decision: a row with no pair adds 0 (its A is 0) and still counts in the mean over rows.
    J = torch.minimum(unclipped, clipped).sum((1, 2)) / pairs  # eq. 11 [B]
    loss = -J.mean()

    metrics = _metrics(loss, e, log_e, clipped < unclipped, valid, (size > 0) ^ (old_size > 0), H, R_ent)
    return loss, metrics


@torch.no_grad()
def _metrics(loss, e, log_e, clip_acts, valid, dropped, H, R_ent):
    n = valid.sum().clamp(min=1)
    mean = (e * valid).sum() / n
    return {
        "loss": loss.detach(),
        "ratio_mean": mean,
        "ratio_std": (((e - mean) ** 2 * valid).sum() / n).sqrt(),
        "ratio_neg_log": -log_e.sum() / n,
        "clip_share": clip_acts.sum() / n,
        "clusters": valid.sum(),
        "dropped_clusters": dropped.sum(),
        "expert_entropy": (H * valid).sum() / n,
        "entropy_reward": R_ent.sum() / n,
    }


def _sigma(R, group_size):
    """sigma = -sign(R - mean of the group) (eq. 9), [B] -> [B].

    A difference within the rounding of the mean counts as 0: three rewards of 0.1 do not have a mean of exactly 0.1.
    """
    R = R.view(-1, group_size)
    difference = R - R.mean(1, keepdim=True)
    rounding = group_size * torch.finfo(R.dtype).eps * R.abs().amax(1, keepdim=True)
    return -(difference.sign() * (difference.abs() > rounding)).flatten()


def _advantages(rewards, valid, group_size):
    """A_ij: the rewards R_ij [B, L, E] of one pair, standardised over the rows of its group.

    Decisions: mean and standard deviation run over the rows in which the pair has a ratio; the standard deviation is
    the sample's (n - 1) plus 1e-6; fewer than two such rows, or R_ij equal within rounding, give 0. (A pair that served
    only rows of equal task reward is thus standardised over its entropy rewards alone, however small they are.)
    """
    R, valid = (x.unflatten(0, (-1, group_size)) for x in (rewards, valid))  # [P, G, L, E]
    n = valid.sum(1, keepdim=True)  # [P, 1, L, E]
    difference = R - (R * valid).sum(1, keepdim=True) / n.clamp(min=1)
    std = ((difference**2 * valid).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    highest = R.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    lowest = R.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    # That rewards are equal is seen in these two; std is left with a residue of rounding.
    rounding = group_size * torch.finfo(R.dtype).eps * torch.maximum(highest, -lowest)  # of the largest
    return (difference / (std + 1e-6)).masked_fill(~(valid & (highest - lowest > rounding)), 0).flatten(0, 1)


def _clusters(log_probs, experts, expert_probs, mask, num_experts):
    """Size, mean log-probability (eq. 6) and mean of -P log P (eq. 8) of every cluster: three [B, L, E].

    A layer at a time, each checkpointed: so the largest tensor made is [B, T, K] (off the CPU [B, T, E + 1]), where
    autograd would keep an int64 copy of all ids. Its backward is a gather, in a fixed order: a token receives the
    gradient of every cluster it is in (eq. 12).
    """
    layers = [
        checkpoint(_layer_sums, log_probs, ids, p, mask, num_experts, use_reentrant=False, preserve_rng_state=False)
        for ids, p in zip(experts.unbind(2), expert_probs.detach().unbind(2), strict=True)
    ]
    size, log_prob_sum, entropy_sum = (torch.stack(sums, 1) for sums in zip(*layers, strict=True))
    tokens = size.clamp(min=1)
    return size, log_prob_sum / tokens, entropy_sum / tokens


def _layer_sums(log_probs, ids, p, mask, num_experts):
    """One layer's clusters: size, sum of log_probs, sum of -P log P, three [B, E]; ids and p of shape [B, T, K]."""
    ids = ids.long().masked_fill(~mask.unsqueeze(-1), num_experts)  # padding: a bucket E of its own, cut off below
    p = p.to(log_probs.dtype)
    entropy = p.clamp(min=torch.finfo(p.dtype).tiny).log_().mul_(p).neg_()  # -P log P, 0 at P = 0
    log_probs = log_probs.unsqueeze(-1).expand(ids.shape)  # a token is in each of its K clusters
    bucket_sums = _bucket_sums if ids.device.type == "cpu" else _bucket_sums_without_atomics
    return [bucket_sums(x, ids, num_experts + 1)[:, :-1] for x in (torch.ones_like(p), log_probs, entropy)]


def _bucket_sums(values, ids, buckets):
    """Sum of values [B, T, K] over each bucket of ids [B, T, K] -> [B, buckets]."""
    return values.new_zeros(len(values), buckets).scatter_add(1, ids.flatten(1), values.flatten(1))


def _bucket_sums_without_atomics(values, ids, buckets):
    """The same for CUDA, where scatter_add adds in an order that changes from run to run: as a token's experts are
    distinct, each cell of [B, T, buckets] is written at most once (the padding's aside), and a sum over T follows."""
    return values.new_zeros(*values.shape[:2], buckets).scatter(2, ids, values).sum(1)


def _check_tensors(
    log_probs, old_log_probs, rewards, response_mask, experts, old_experts, expert_probs, old_expert_probs
):
    if experts.dim() != 4 or experts.numel() == 0:
        raise ValueError(f"experts must have shape [B, T, L, K], none of them 0, got {list(experts.shape)}")
    B, T, L, K = experts.shape
    for name, tensor, shape in (
        ("log_probs", log_probs, (B, T)),
        ("old_log_probs", old_log_probs, (B, T)),
        ("rewards", rewards, (B,)),
        ("response_mask", response_mask, (B, T)),
        ("old_experts", old_experts, (B, T, L, K)),
        ("expert_probs", expert_probs, (B, T, L, K)),
        ("old_expert_probs", old_expert_probs, (B, T, L, K)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be torch.bool, got {response_mask.dtype}")
    if not (rewards.double().abs() < 1e15).all():  # a float32 cannot hold the square of more than 1e19
        raise ValueError(f"rewards must be finite and below 1e15 in size, got {rewards.tolist()}")


def _check_options(rows, group_size, alpha, clip_low, clip_high, entropy_reward):
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}")
    if rows % group_size:
        raise ValueError(f"group_size must divide the number of rows: {rows} rows, groups of {group_size}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie within [0, 1], got {alpha}")
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low and clip_high must be at least 0, got {clip_low} and {clip_high}")
    if entropy_reward not in ("relative", "absolute", "none"):
        raise ValueError(f'entropy_reward must be "relative", "absolute" or "none", got {entropy_reward!r}')


def _check_ids(experts, old_experts, response_mask, num_experts):
    for name, ids in (("experts", experts), ("old_experts", old_experts)):
        if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ValueError(f"{name} must be of an integer type (int64 ... int8 or uint8), got {ids.dtype}")
        for layer in range(
            ids.shape[2] if ids.device.type == "cpu" else 0
        ):  # elsewhere the check would wait for the device
            # As int64: num_experts itself may not fit the type of the ids. 0 is valid.
            lowest, highest = ids[:, :, layer].long().masked_fill(~response_mask.unsqueeze(-1), 0).aminmax()
            if not 0 <= lowest <= highest < num_experts:
                used = ids[:, :, layer][response_mask]  # [response tokens, K]
                raise ValueError(
                    f"{name} must lie in 0..{num_experts - 1} at response positions, "
                    f"got {used.min()}..{used.max()} in layer {layer}"
                )
