"""RAIS, router-aware importance sampling (Zhang et al., arXiv 2510.23027; from v2 on RSPO, router-shift policy
optimization).

Between two updates the router drifts, and a token's importance ratio then compares different sets of experts. The
router-shift ratio gamma measures the drift where the token was routed, and shrinks the importance weight with it.

    router_shift    gamma = exp(-mean |log P - log P_old|), floored, without gradient
    rais_loss       log w' = log pi - log pi_old + log gamma, then GMPO, GSPO or GRPO as usual

In one line: rais_loss(base=b) is base b with `old_log_probs - gamma.log()` in place of `old_log_probs`.

Provenance: the formula is that of v2 as far as its text is public; equation numbers and the paper's own floor were not
seen. Two public ports do as this file does (mean over experts and layers, old experts, full softmax, detached, before
the clip, floor 0.8); a third multiplies the layers and masks tokens whose gamma is below 0.7.

Needs torch alone. B rows, T positions, L MoE layers, K active experts a token.
"""

from typing import Literal

import torch

CLIP_RANGES = {"gmpo": (0.4, 0.4), "gspo": (3e-4, 4e-4), "grpo": (0.2, 0.28)}  # (low, high), each base's own


@torch.no_grad()  # A gradient through gamma would reward rows with A < 0 for moving the router: training collapses.
def router_shift(
    router_log_probs, old_router_log_probs, *, floor: float = 0.8, layers: Literal["mean", "sum"] = "mean"
):
    """gamma [B, T] in [floor, 1]: 1 where the router has not moved, smaller the further it has.

    router_log_probs, old_router_log_probs [B, T, L, K]: log P of the K experts that the OLD policy activated, under the
    new and the old router; P the full softmax over all experts (renormalised over the top-K it never moves at K = 1).
    K at least 1; without a layer (L = 0) gamma is 1.
    floor   smallest gamma, within [0, 1]; 0 for none
    layers  how the layers' shifts are put together: "mean" or "sum" (a product of their gammas)
    Returns float32 (float64 stays), without gradient; NaN in gives NaN out, position by position.
    ValueError: shapes that differ or are not [B, T, L, K], floor outside [0, 1], unknown layers.
    """
    if router_log_probs.dim() != 4 or not router_log_probs.shape[3]:
        raise ValueError(f"router_log_probs must have shape [B, T, L, K], K > 0, got {list(router_log_probs.shape)}")
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
        difference = router_log_probs[:, :, layer].to(dtype) - old_router_log_probs[:, :, layer]  # [B, T, K]
        shift += difference.abs().mean(-1)  # over the K experts
    # Decision: "sum" exists because a port does that. Twelve layers that drift by 0.05 each: mean gives 0.951, sum
    # 0.549, already below the floor.
    if layers == "mean":
        shift /= max(L, 1)
    return (-shift).exp().clamp(min=floor)


def rais_loss(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    router_log_probs,
    old_router_log_probs,
    *,
    base: Literal["gmpo", "gspo", "grpo"] = "gmpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    floor: float = 0.8,
    layers: Literal["mean", "sum"] = "mean",
):
    """A base loss on importance ratios rescaled by gamma; an unmoved router gives exactly the base loss.

    log_probs, old_log_probs  [B, T]        log pi and log pi_old of the token that position t predicts
    advantages                [B]           one a row; no gradient
    response_mask             [B, T]        bool, true where the predicted token belongs to the response
    router_log_probs, old_router_log_probs  [B, T, L, K], log P of the OLD policy's experts: see router_shift
    base                 the loss whose ratios are rescaled: "gmpo" (the paper's own), "gspo" or "grpo"
    clip_low, clip_high  at least 0; not given, the base's own: gmpo 0.4, 0.4, gspo 3e-4, 4e-4, grpo 0.2, 0.28
    floor                smallest gamma, within [0, 1]; 0 for none
    layers               how the layers' shifts are put together: "mean" or "sum" (a product of their gammas)

    gamma enters before the clip (v2; v1 multiplied after it), which moves the range of w = pi / pi_old to 1 / gamma
    times the base's. For A < 0 it narrows: with GSPO's range and pi near pi_old, a mean gamma of 0.95 already cuts off
    the gradient of every row with A < 0; with GMPO's, of none (log 0.8 = -0.22 lies within -0.4).
    For A > 0 it widens: at gamma 0.8 GRPO's 0.8 to 1.28 is 1.0 to 1.6 in w.
    Reduction: the base's, a mean over a row's response tokens and then over all B rows; a row without any adds 0 and
    still counts. Padded positions may hold anything. What goes into exp counts as 40 above it.
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
    _check(log_probs, old_log_probs, advantages, response_mask, router_log_probs, low, high, floor)

    # Padding is replaced before exp and log: 0 * NaN would be NaN, in the value and in the gradient.
    mask = response_mask
    unfloored = router_shift(router_log_probs, old_router_log_probs, floor=0, layers=layers).masked_fill(~mask, 1)
    gamma = unfloored.clamp(min=floor)  # [B, T]
    old_log_probs = old_log_probs.detach() - gamma.log()  # the method, in float32 at least; what follows is the base
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0)  # log w' [B, T]
    A = advantages.detach().masked_fill(~mask.any(1), 0)[:, None]  # [B, 1]

    valid = mask
    if base == "gmpo":  # tokens clipped in log space on the side that A opens, then their geometric mean
        clipped = torch.where(A > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
        loss, clip_acts = -(_exp(_row_mean(clipped, mask)) * A).mean(), clipped != log_ratio
    else:  # grpo: one ratio a token; gspo: one a row, and _row_mean below is over that one
        if base == "gspo":
            log_ratio, valid = _row_mean(log_ratio, mask), mask.any(1, keepdim=True)  # [B, 1]
        ratio = _exp(log_ratio)
        unclipped, clipped = ratio * A, ratio.clamp(1 - low, 1 + high) * A
        loss, clip_acts = -_row_mean(torch.minimum(unclipped, clipped), valid).mean(), clipped < unclipped

    with torch.no_grad():
        n, tokens, ratio = valid.sum().clamp(min=1), mask.sum().clamp(min=1), _exp(log_ratio)
        mean = (ratio * valid).sum() / n
        metrics = {
            "loss": loss.detach(),
            "ratio_mean": mean,
            "ratio_std": (((ratio - mean) ** 2 * valid).sum() / n).sqrt(),
            "ratio_neg_log": -(log_ratio * valid).sum() / n,
            "clip_share": (clip_acts & valid).sum() / n,
            "gamma_mean": (gamma * mask).sum() / tokens,
            "gamma_min": gamma.min(),  # 1 where there is no response
            "floor_share": ((unfloored < floor) & mask).sum() / tokens,
        }
    return loss, metrics


def _check(log_probs, old_log_probs, advantages, response_mask, router_log_probs, low, high, floor):
    """What router_shift does not check itself."""
    if not (low >= 0 and high >= 0):
        raise ValueError(f"clip_low and clip_high must be at least 0, got {low} and {high}")
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


def _row_mean(x, mask):
    """Mean over each row's response tokens, [B, T] -> [B, 1]; 0 for a row that has none."""
    return x.masked_fill(~mask, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def _exp(log_ratio):
    return log_ratio.clamp(max=40).exp()  # infinity * an advantage of 0 would be NaN
