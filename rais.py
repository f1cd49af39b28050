"""RAIS, router-aware importance sampling (Zhang et al., arXiv 2510.23027; from v2 on RSPO, router-shift policy
optimization).

Between two updates the router drifts, and a token's importance ratio then compares different sets of experts. The
router-shift ratio gamma measures the drift where the token was routed, and shrinks the importance weight with it.

    router_shift    gamma = exp(-mean |log P - log P_old|), floored, without gradient
    rais_loss       log w' = log pi - log pi_old + log gamma, then GMPO, GSPO or GRPO as usual

Needs torch alone. B rows, T positions, L MoE layers, K active experts a token.
"""

import torch

CLIP_RANGES = {"gmpo": (0.4, 0.4), "gspo": (3e-4, 4e-4), "grpo": (0.2, 0.28)}  # (low, high), each base's own


@torch.no_grad()  # A gradient through gamma would reward rows with A < 0 for moving the router: training collapses.
def router_shift(router_log_probs, old_router_log_probs, *, floor=0.8, layers="mean"):
    """gamma [B, T] in [floor, 1]: 1 where the router has not moved, smaller the further it has.

    router_log_probs, old_router_log_probs [B, T, L, K]: log P of the K experts that the OLD policy activated, under the
    new and the old router; P the full softmax over all experts (renormalised over the top-K it never moves at K = 1).
    K at least 1; without a layer (L = 0) gamma is 1.
    floor: within [0, 1], 0 for none. layers: how the layers' shifts are put together, "mean" or "sum".
    Returns float32 (float64 stays), without gradient; NaN in gives NaN out, position by position.
    ValueError: shapes that differ or are not [B, T, L, K], floor outside [0, 1], unknown layers.
    """
    if router_log_probs.dim() != 4 or not router_log_probs.shape[3]:
        raise ValueError(
            f"router_log_probs must have shape [B, T, L, K], K above 0, got {list(router_log_probs.shape)}"
        )
    if old_router_log_probs.shape != router_log_probs.shape:
        raise ValueError(
            f"old_router_log_probs must have shape {list(router_log_probs.shape)}, "
            f"got {list(old_router_log_probs.shape)}"
        )
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie within [0, 1], got {floor}")
    if layers not in ("mean", "sum"):
        raise ValueError(f'layers must be "mean" or "sum", got {layers!r}')
    B, T, L, K = router_log_probs.shape
    dtype = torch.float64 if torch.float64 in (router_log_probs.dtype, old_router_log_probs.dtype) else torch.float32
    shift = router_log_probs.new_zeros(B, T, dtype=dtype)
    for layer in range(L):  # a layer at a time: 8 rows of 14336 x 48 x 8 are 176 MB in float32
        new, old = router_log_probs[:, :, layer].to(dtype), old_router_log_probs[:, :, layer].to(dtype)  # [B, T, K]
        shift += (new - old).abs().mean(-1)  # over the K experts
    # Decision: "sum" (a product over layers) exists because some implementations do that. Twelve layers that drift by
    # 0.05 each: mean gives 0.951, sum 0.549, already below the floor.
    if layers == "mean":
        shift /= max(L, 1)
    # Decision: a floor of 0.8, the default of the implementations that were seen; the paper's text gives none.
    return (-shift).exp().clamp(min=floor)


def rais_loss(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    router_log_probs,
    old_router_log_probs,
    *,
    base="gmpo",
    clip_low=None,
    clip_high=None,
    floor=0.8,
    layers="mean",
):
    """A base loss on importance ratios rescaled by gamma; an unmoved router gives exactly the base loss.

    log_probs, old_log_probs  [B, T]        log pi and log pi_old of the token that position t predicts
    advantages                [B]           one a row; no gradient
    response_mask             [B, T]        bool, true where the predicted token belongs to the response
    router_log_probs, old_router_log_probs  [B, T, L, K], with floor and layers: see router_shift; no gradient
    base                      "gmpo" (the paper's own base), "gspo" or "grpo"
    clip_low, clip_high       at least 0; None is the base's own: gmpo 0.4, 0.4 (in log space), gspo 3e-4, 4e-4,
                              grpo 0.2, 0.28

    gamma enters before the clip (v2; v1 multiplied after it). So with GSPO's range a mean gamma of 0.95 is already
    outside: as long as pi is near pi_old, every row with A < 0 loses its gradient. With GMPO's it is not: log 0.8 =
    -0.22 lies within -0.4.
    Reduction: the base's, a mean over a row's response tokens and then over all B rows; a row without any adds 0 and
    still counts. Padded positions may hold anything. A log ratio above 40 counts as 40.
    ValueError: wrong shapes or options, a mask that is not bool.
    Returns (loss, metrics), metrics as detached 0-d tensors:
      loss                                  the loss
      ratio_mean, ratio_std, ratio_neg_log  of the rescaled ratios w' (response tokens; rows for gspo)
      clip_share                            share of those whose gradient the clip cuts off
      gamma_mean, gamma_min                 over response tokens, floored, as they enter the loss
      floor_share                           share of response tokens whose unfloored gamma is below the floor
    """
    if base not in CLIP_RANGES:
        raise ValueError(f'base must be "gmpo", "gspo" or "grpo", got {base!r}')
    low = CLIP_RANGES[base][0] if clip_low is None else clip_low
    high = CLIP_RANGES[base][1] if clip_high is None else clip_high
    if not (low >= 0 and high >= 0):
        raise ValueError(f"clip_low and clip_high must be at least 0, got {clip_low} and {clip_high}")
    if log_probs.dim() != 2 or log_probs.numel() == 0:
        raise ValueError(f"log_probs must have shape [B, T], neither of them 0, got {list(log_probs.shape)}")
    B, T = log_probs.shape
    for name, tensor, shape in (
        ("old_log_probs", old_log_probs, (B, T)),
        ("advantages", advantages, (B,)),
        ("response_mask", response_mask, (B, T)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if router_log_probs.dim() == 4 and router_log_probs.shape[:2] != (B, T):
        raise ValueError(
            f"router_log_probs must have shape {[B, T, *router_log_probs.shape[2:]]}, "
            f"got {list(router_log_probs.shape)}"
        )
    if response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be torch.bool, got {response_mask.dtype}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie within [0, 1], got {floor}")

    # Padding is replaced before exp and log: 0 * NaN would be NaN, in the value and in the gradient.
    mask = response_mask
    unfloored = router_shift(router_log_probs, old_router_log_probs, floor=0, layers=layers).masked_fill(~mask, 1)
    gamma = unfloored.clamp(min=floor)  # [B, T]
    log_probs, old_log_probs, advantages = (
        x if x.dtype == torch.float64 else x.float() for x in (log_probs, old_log_probs.detach(), advantages.detach())
    )
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0) + gamma.log()  # log w' [B, T]
    A = advantages.masked_fill(~mask.any(1), 0)  # [B]

    def row_mean(x):
        return x.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)  # [B, T] -> [B]

    def exp(x):
        return x.clamp(max=40).exp()  # infinity * an advantage of 0 would be NaN

    valid = mask
    if base == "gmpo":  # tokens clipped in log space on the side that A opens, then their geometric mean
        clipped = torch.where(A[:, None] > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
        loss, clip_acts = -(exp(row_mean(clipped)) * A).mean(), clipped != log_ratio
    elif base == "gspo":  # one ratio a row
        log_ratio, valid = row_mean(log_ratio), mask.any(1)
        ratio = exp(log_ratio)
        unclipped, clipped = ratio * A, ratio.clamp(1 - low, 1 + high) * A
        loss, clip_acts = -torch.minimum(unclipped, clipped).mean(), clipped < unclipped
    else:  # grpo: one ratio a token
        ratio = exp(log_ratio)
        unclipped, clipped = ratio * A[:, None], ratio.clamp(1 - low, 1 + high) * A[:, None]
        loss, clip_acts = -row_mean(torch.minimum(unclipped, clipped)).mean(), clipped < unclipped

    with torch.no_grad():
        n, tokens, ratio = valid.sum().clamp(min=1), mask.sum().clamp(min=1), exp(log_ratio)
        mean = (ratio * valid).sum() / n
        metrics = {
            "loss": loss.detach(),
            "ratio_mean": mean,
            "ratio_std": (((ratio - mean) ** 2 * valid).sum() / n).sqrt(),
            "ratio_neg_log": -log_ratio.masked_fill(~valid, 0).sum() / n,
            "clip_share": (clip_acts & valid).sum() / n,
            "gamma_mean": (gamma * mask).sum() / tokens,
            "gamma_min": gamma.min(),  # 1 where there is no response
            "floor_share": ((unfloored < floor) & mask).sum() / tokens,
        }
    return loss, metrics
