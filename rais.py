"""RAIS, router-aware importance sampling (Zhang et al., arXiv 2510.23027; from v2 on RSPO, router-shift policy
optimization).

Between two updates the router drifts, and a token's importance ratio then compares different sets of experts. The
router-shift ratio gamma measures the drift where the token was routed, and shrinks the importance weight with it.

    router_shift    gamma = exp(-mean |log P - log P_old|), floored, without gradient
    rais_loss       log w' = log pi - log pi_old + log gamma, then GMPO, GSPO or GRPO as usual

To copy RAIS, copy router_shift, which needs torch alone, and hand `old_log_probs - gamma.log()` to the loss that you
already have in place of `old_log_probs`. rais_loss does just that with the losses of baselines.py.

Provenance: the formula is that of v2 as far as its text is public; equation numbers and the paper's own floor were not
seen. Two public ports do as this file does (mean over experts and layers, old experts, full softmax, detached, before
the clip, floor 0.8); a third multiplies the layers and masks tokens whose gamma is below 0.7.

B rows, T positions, L MoE layers, K active experts a token.
"""

from typing import Literal

import torch

from baselines import gmpo_loss, grpo_loss, gspo_loss

BASES = {"gmpo": gmpo_loss, "gspo": gspo_loss, "grpo": grpo_loss}


@torch.no_grad()  # A gradient through gamma would reward rows with A < 0 for moving the router.
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
    shape, old_shape = list(router_log_probs.shape), list(old_router_log_probs.shape)
    if old_shape != shape:
        raise ValueError(f"old_router_log_probs must have shape {shape}, got {old_shape}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie within [0, 1], got {floor}")
    if layers not in ("mean", "sum"):
        raise ValueError(f'layers must be "mean" or "sum", got {layers!r}')
    B, T, L, K = shape
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
    weights=None,
):
    """The base loss with `old_log_probs - gamma.log()` for `old_log_probs`; an unmoved router gives the base loss.

    log_probs, old_log_probs, advantages, response_mask, weights: as in baselines.py; weights act as in the base
    router_log_probs, old_router_log_probs  [B, T, L, K], log P of the OLD policy's experts: see router_shift
    base                 the loss whose ratios are rescaled: "gmpo" (the paper's own), "gspo" or "grpo"
    clip_low, clip_high  at least 0; not given, the base's own: gmpo 0.4, 0.4, gspo 3e-4, 4e-4, grpo 0.2, 0.28
    floor                smallest gamma, within [0, 1]; 0 for none
    layers               how the layers' shifts are put together: "mean" or "sum" (a product of their gammas)

    gamma enters before the clip (v2; v1 multiplied after it), which moves the range of w = pi / pi_old to 1 / gamma
    times the base's. For A < 0 it narrows: with GSPO's range and pi near pi_old, a mean gamma of 0.95 already cuts off
    the gradient of every row with A < 0; with GMPO's, of none (log 0.8 = -0.22 lies within -0.4).
    For A > 0 it widens: at gamma 0.8 GRPO's 0.8 to 1.28 is 1.0 to 1.6 in w.
    Returns (loss, metrics): the base's, whose ratios are now the rescaled ones w', and
      gamma_mean, gamma_min   over response tokens, floored, as they enter the loss
      floor_share             share of response tokens whose unfloored gamma is below the floor
    ValueError: wrong shapes or options, a mask that is not bool.
    """
    if base not in BASES:
        raise ValueError(f'base must be "gmpo", "gspo" or "grpo", got {base!r}')
    unfloored = router_shift(router_log_probs, old_router_log_probs, floor=0, layers=layers)  # [B, T]
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie within [0, 1], got {floor}")
    if old_log_probs.shape != unfloored.shape:
        routes, shape = list(router_log_probs.shape), list(old_log_probs.shape)
        raise ValueError(f"old_log_probs and router_log_probs must share B and T, got {shape} and {routes}")
    gamma = unfloored.clamp(min=floor)
    ranges = {k: v for k, v in (("clip_low", clip_low), ("clip_high", clip_high)) if v is not None}
    shifted = old_log_probs - gamma.log()  # the method
    loss, metrics = BASES[base](log_probs, shifted, advantages, response_mask, weights=weights, **ranges)
    n = response_mask.sum().clamp(min=1)
    metrics["gamma_mean"] = gamma.masked_fill(~response_mask, 0).sum() / n
    metrics["gamma_min"] = gamma.masked_fill(~response_mask, 1).min()  # 1 where there is no response
    metrics["floor_share"] = ((unfloored < floor) & response_mask).sum() / n
    return loss, metrics
