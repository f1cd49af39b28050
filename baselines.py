"""Losses that treat a MoE model as a dense one, the advantage they share, and weights for another engine's samples.

    group_advantages    ERPO eq. 2          how much better an answer is than the others to the same prompt
    grpo_loss           ERPO eq. 1-2        one importance ratio a token, clipped
    gspo_loss           ERPO eq. 3-4        one ratio a row, the geometric mean of its tokens', clipped
    gmpo_loss           arXiv 2507.20673    the same mean, but the tokens are clipped before it is taken
    cispo_loss          arXiv 2506.13585    the clipped ratio is a weight without gradient: no token loses its own
    sapo_loss           arXiv 2511.20347    a smooth gate on a token's ratio in place of the clip
    dppo_loss           arXiv 2602.04879    a token is left out when its probability, not its ratio, has moved too far
    mismatch_weights    TIS, IcePop, sequence mask: w = pi_old / mu of tokens that another engine's mu sampled

docs/losses.md sets the losses side by side. They share their arguments:
  log_probs, old_log_probs  [B, T]  log pi and log pi_old of the token that position t predicts, both at the
                                    temperature that was sampled; the gradient flows through log_probs alone
  advantages                [B]     one a row; no gradient
  response_mask             [B, T]  bool, true where the predicted token belongs to the response, its end token included
  weights                   [B, T]  of mismatch_weights, no gradient; None for 1 everywhere. A token's weight multiplies
                                    its objective, the denominator stays; GSPO and GMPO weigh rows
They return (loss, metrics), metrics as detached 0-d tensors:
  loss                      the loss
  ratio_mean, ratio_std     of the importance ratios: of response tokens, but of rows for GSPO
  ratio_neg_log             mean of -log ratio, an estimate of KL(pi_old || pi)
  clip_share                share of those ratios whose gradient the clip cuts off (CISPO: cuts down; not SAPO)
Reduction, all six: a mean over a row's response tokens (of the objective, but inside the exponent in GSPO and GMPO),
then the mean over all B rows: every row weighs the same however long it is. A row without response tokens adds 0 and
still counts. Padded positions may hold anything. A log ratio above 40 (in GSPO and GMPO a row's mean) counts as 40,
without gradient: exp would overflow later on.
ValueError: other shapes, a mask that is not bool, options out of range.

Needs torch alone. B rows (prompts x G responses, the G of a prompt next to each other), T positions.
"""

from typing import Literal

import torch


def group_advantages(rewards, group_size):
    """A = (R - mean) / (std + 1e-6) over each group of G rows (ERPO eq. 2), std the sample's (G - 1).

    rewards [B], any number type; group_size G. Returns [B], float32 (float64 stays), without gradient. A group whose
    rewards are equal within the rounding of sums gets exactly 0. Reads the rewards on the host once, to check them.
    ValueError: rewards not [B] or not below 1e15 in size, B no multiple of G, G below 2 (one has nothing to compare).
    """
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [B], got {list(rewards.shape)}")
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}")
    if len(rewards) % group_size:
        raise ValueError(f"group_size must divide the number of rows: {len(rewards)} rows, groups of {group_size}")
    R = _at_least_float32(rewards.detach()).view(-1, group_size)  # [P, G]
    if not (R.abs() < 1e15).all():  # a float32 cannot hold the square of more than 1e19
        raise ValueError(f"rewards must be finite and below 1e15 in size, got {rewards.tolist()}")
    A = (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-6)  # eq. 2
    # Three rewards of 0.1 do not have a mean of exactly 0.1: that they are equal is seen in max and min, not in std.
    # 50.1 + 30.2 + 20.3 and 20.3 + 30.2 + 50.1 differ in the last digit and count as equal as well.
    rounding = group_size * torch.finfo(R.dtype).eps * R.abs().amax(1, keepdim=True)
    equal = R.amax(1, keepdim=True) - R.amin(1, keepdim=True) <= rounding
    return A.masked_fill(equal, 0).flatten()


def grpo_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_low=0.2, clip_high=0.28, weights=None):
    """GRPO (ERPO eq. 1-2): min(w A, clip(w, 1 - low, 1 + high) A) a token; mean over tokens, then over rows.

    clip_low, clip_high   range of a token's ratio, 1 - clip_low to 1 + clip_high; at least 0
    """
    log_ratio, A, W = _prepare(log_probs, old_log_probs, advantages, response_mask, weights, clip_low, clip_high)
    ratio = _exp(log_ratio)  # eq. 2 [B, T]
    unclipped, clipped = ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A
    loss = -_row_mean(torch.minimum(unclipped, clipped) * W, response_mask).mean()  # eq. 1
    return loss, _metrics(loss, log_ratio, response_mask, clip_share=clipped < unclipped)


def gspo_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_low=3e-4, clip_high=4e-4, weights=None):
    """GSPO (ERPO eq. 3-4): one ratio a row, the geometric mean over its tokens; mean over rows.

    The mean over tokens inside the exponent is the only place where length enters: a sum over tokens of the row's
    surrogate would weigh long rows more. The mean of a row's weights multiplies the row, as in TRL. verl has the same
    value, but there each token's share of the row's gradient has the token's own weight.

    clip_low, clip_high   range of a row's ratio, 1 - clip_low to 1 + clip_high; at least 0
    """
    log_ratio, A, W = _prepare(log_probs, old_log_probs, advantages, response_mask, weights, clip_low, clip_high)
    log_s, A, rows = _row_mean(log_ratio, response_mask), A.squeeze(1), response_mask.any(1)  # [B] each
    s = _exp(log_s)  # eq. 4
    unclipped, clipped = s * A, s.clamp(1 - clip_low, 1 + clip_high) * A
    # eq. 3; A is 0 in a row without tokens
    loss = -(torch.minimum(unclipped, clipped) * _row_mean(W, response_mask)).mean()
    return loss, _metrics(loss, log_s, rows, clip_share=clipped < unclipped)


def gmpo_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_low=0.4, clip_high=0.4, weights=None):
    """GMPO: token log-ratios are clipped, then exp(their mean over the row) * A; mean over rows.

    The clip is one-sided and works on log w: at most clip_high where A > 0, at least -clip_low elsewhere. The other
    side stays open, as min() leaves it open in GRPO. (clip_share counts tokens of rows with A = 0 too.)
    The geometric mean of a row's weights multiplies the row, as in verl. One zero among them would erase the row, so
    IcePop's weights are a ValueError; a row of zeros alone (a sequence mask) counts as 0. Weights are read on the host.

    clip_low, clip_high   range of a token's log ratio, -clip_low to clip_high; at least 0
    """
    log_ratio, A, W = _prepare(log_probs, old_log_probs, advantages, response_mask, weights, clip_low, clip_high)
    if weights is not None and ((W <= 0) & response_mask & (W > 0).any(1, keepdim=True)).any():
        raise ValueError("weights must be above 0 at every response token of a row, or 0 at all of them")
    clipped = torch.where(A > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))  # [B, T]
    row_weights = _row_mean(W.log(), response_mask).exp()  # [B]
    loss = -(_exp(_row_mean(clipped, response_mask)) * A.squeeze(1) * row_weights).mean()
    return loss, _metrics(loss, log_ratio, response_mask, clip_share=clipped != log_ratio)


def cispo_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_low=1.0, clip_high=4.0, weights=None):
    """CISPO (arXiv 2506.13585, eq. 4-5): sg(clip(w, 1 - low, 1 + high)) A log pi a token; mean over tokens, then rows.

    A token outside the range keeps its gradient, with the bound as its weight. Decisions: the paper's reduction is one
    mean over the tokens of the whole group, here it is that of the other losses. The paper tunes clip_high alone, does
    not give it and sets no lower bound: 1.0 is none (w >= 0), 4.0 the bound of 5 on w that TRL's documentation
    recommends. Log-probabilities are finite.

    clip_low, clip_high   range of a token's weight, 1 - clip_low to 1 + clip_high; at least 0
    """
    log_ratio, A, W = _prepare(log_probs, old_log_probs, advantages, response_mask, weights, clip_low, clip_high)
    ratio = _exp(log_ratio.detach())  # [B, T]
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)  # eq. 5
    loss = -_row_mean(bounded * A * log_probs * W, response_mask).mean()  # eq. 4
    return loss, _metrics(loss, log_ratio, response_mask, clip_share=bounded != ratio)


def sapo_loss(
    log_probs, old_log_probs, advantages, response_mask, *, tau_positive=1.0, tau_negative=1.05, weights=None
):
    """SAPO (arXiv 2511.20347): f(w) A a token, f(w) = 4 / tau sigmoid(tau (w - 1)); mean over tokens, then over rows.

    The gate's slope is 4 p (1 - p) with p the sigmoid: 1 at w = 1 and ever smaller to both sides, where GRPO's clip
    cuts at once. Metrics have its mean, gate_mean, in place of clip_share. Defaults are those of the paper, of TRL
    (sapo_temperature_pos, sapo_temperature_neg) and of verl (tau_pos, tau_neg).

    tau_positive   how steep the gate is where A > 0; above 0
    tau_negative   the same elsewhere, larger so that unlikely tokens are pushed down less; above 0
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"tau_positive and tau_negative must be above 0, got {tau_positive} and {tau_negative}")
    log_ratio, A, W = _prepare(log_probs, old_log_probs, advantages, response_mask, weights)
    tau = torch.full_like(A, tau_negative).masked_fill(A > 0, tau_positive)  # [B, 1]
    p = torch.sigmoid(tau * (_exp(log_ratio) - 1))  # [B, T]
    loss = -_row_mean(4 / tau * p * A * W, response_mask).mean()
    return loss, _metrics(loss, log_ratio, response_mask, gate_mean=4 * p * (1 - p))


def dppo_loss(
    log_probs, old_log_probs, advantages, response_mask, *, clip_low=0.2, clip_high=0.2, max_ratio=20.0, weights=None
):
    """DPPO, binary total variation (arXiv 2602.04879): sg(min(w, max_ratio)) A log pi a token; mean over tokens, rows.

    A token counts as 0 where pi - pi_old, a difference of probabilities, is above clip_high and A > 0, or below
    -clip_low and A <= 0: a likely token is stopped at a small ratio, an unlikely one may grow many times. In the paper
    the policy to stay near is the one that sampled. So hand over mu's log-probabilities as old_log_probs where they
    were recorded, and then no weights (w = pi / mu corrects by itself); elsewhere pi_old's. They are finite.
    Copied from verl's "dppo_tv"; max_ratio is its clip_ratio_c, 20 where a configuration has none. 0.2 is the range of
    verl's ActorConfig and of prime-rl's default loss; verl's script for the paper sets 0.15.

    clip_low, clip_high   how far a token's probability may fall or rise, as a difference; at least 0
    max_ratio             largest ratio that a token's gradient is multiplied with; above 0
    """
    if not max_ratio > 0:
        raise ValueError(f"max_ratio must be above 0, got {max_ratio}")
    log_ratio, A, W = _prepare(log_probs, old_log_probs, advantages, response_mask, weights, clip_low, clip_high)
    new, old = (_at_least_float32(x.detach()).exp() for x in (log_probs, old_log_probs))
    left_out = torch.where(A > 0, new - old > clip_high, new - old < -clip_low)  # [B, T]
    ratio = _exp(log_ratio.detach()).clamp(max=max_ratio)
    loss = -_row_mean((ratio * A * log_probs * W).masked_fill(left_out, 0), response_mask).mean()
    return loss, _metrics(loss, log_ratio, response_mask, clip_share=left_out)


@torch.no_grad()
def mismatch_weights(
    old_log_probs,
    rollout_log_probs,
    response_mask,
    *,
    kind: Literal["tis", "icepop", "sequence-mask"],
    threshold: float | None = None,
    threshold_lower: float = 0.5,
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
):
    """Weights [B, T] of tokens that another engine's policy mu sampled, from w = pi_old / mu; 0 at padding.

    old_log_probs, rollout_log_probs  [B, T]  log pi_old (the trainer before its updates) and log mu of the same tokens
    kind  "tis", truncated importance sampling: min(w, threshold) a token; verl 0.9.1's decoupled_token_is
          "icepop": w a token, 0 outside threshold_lower to threshold; verl's decoupled_token_icepop
          "sequence-mask": the product of a row's w at each of its tokens, 0 outside clip_min to clip_max; TRL 1.16.0's
          "sequence_mask", the default there, where all names begin with vllm_importance_sampling_
    threshold        largest w of "tis" (not given: 2.0) and of "icepop" (5.0)
    threshold_lower  smallest w of "icepop"
    clip_max         largest product of "sequence-mask"; None for no bound
    clip_min         smallest product of "sequence-mask"; None for no bound
    ValueError: other shapes, a mask that is not bool, an unknown kind, bounds below 0 or in the wrong order.
    """
    if kind not in ("tis", "icepop", "sequence-mask"):
        raise ValueError(f'kind must be "tis", "icepop" or "sequence-mask", got {kind!r}')
    _check_shapes("old_log_probs", old_log_probs, rollout_log_probs=rollout_log_probs, response_mask=response_mask)
    log_ratio = _at_least_float32(old_log_probs) - _at_least_float32(rollout_log_probs)
    log_ratio = log_ratio.masked_fill(~response_mask, 0)  # [B, T]
    if kind == "sequence-mask":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
        low, high = (0.0 if clip_min is None else clip_min), (float("inf") if clip_max is None else clip_max)
    else:
        default = {"tis": 2.0, "icepop": 5.0}[kind]
        low, high = (0.0 if kind == "tis" else threshold_lower), (default if threshold is None else threshold)
    if not 0 <= low <= high:
        raise ValueError(f"the bounds of {kind} must be at least 0 and in order, got {low} to {high}")
    w = _exp(log_ratio)
    w = w.clamp(max=high) if kind == "tis" else w.masked_fill((w < low) | (w > high), 0)
    return w.masked_fill(~response_mask, 0)


def _prepare(log_probs, old_log_probs, advantages, response_mask, weights, clip_low=0.0, clip_high=0.0):
    """Check the arguments -> log ratio [B, T], advantages [B, 1], weights [B, T]: 0 wherever there is no response."""
    weights = torch.ones_like(log_probs) if weights is None else weights.detach()
    others = {"old_log_probs": old_log_probs, "advantages": advantages, "weights": weights}
    _check_shapes("log_probs", log_probs, **others, response_mask=response_mask)
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low and clip_high must be at least 0, got {clip_low} and {clip_high}")
    # Padding is replaced before the exp: 0 * NaN would be NaN, in the value and in the gradient.
    log_ratio = _at_least_float32(log_probs) - _at_least_float32(old_log_probs.detach())
    log_ratio = log_ratio.masked_fill(~response_mask, 0)
    A = _at_least_float32(advantages.detach()).masked_fill(~response_mask.any(1), 0).unsqueeze(1)
    return log_ratio, A, weights.to(log_ratio.dtype).masked_fill(~response_mask, 0)


def _check_shapes(name, first, **others):
    if first.dim() != 2 or first.numel() == 0:
        raise ValueError(f"{name} must have shape [B, T], neither of them 0, got {list(first.shape)}")
    for other, x in others.items():
        shape = first.shape[:1] if other == "advantages" else first.shape
        if x.shape != shape:
            raise ValueError(f"{other} must have shape {list(shape)}, got {list(x.shape)}")
        if other == "response_mask" and x.dtype != torch.bool:
            raise ValueError(f"response_mask must be torch.bool, got {x.dtype}")


def _row_mean(x, mask):
    """Mean over each row's response tokens, [B, T] -> [B]; 0 for a row that has none."""
    return x.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)


@torch.no_grad()
def _metrics(loss, log_ratio, valid, **share):
    """Statistics of the ratios where valid, and the mean of one more quantity; all of one shape but the loss."""
    n, ratio = valid.sum().clamp(min=1), _exp(log_ratio)
    mean = (ratio * valid).sum() / n
    return {
        "loss": loss.detach(),
        "ratio_mean": mean,
        "ratio_std": (((ratio - mean) ** 2 * valid).sum() / n).sqrt(),
        "ratio_neg_log": -(log_ratio * valid).sum() / n,
    } | {name: (x * valid).sum() / n for name, x in share.items()}


def _exp(log_ratio):
    return log_ratio.clamp(max=40).exp()  # infinity * an advantage of 0 would be NaN


def _at_least_float32(x):
    """Lower precision (and whole numbers) are computed in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
