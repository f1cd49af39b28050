"""Four losses that treat a MoE model as a dense one: GRPO, GSPO, GMPO and CISPO, and the advantage they share.

    group_advantages    ERPO eq. 2      how much better an answer is than the others to the same prompt
    grpo_loss           ERPO eq. 1-2    one importance ratio a token
    gspo_loss           ERPO eq. 3-4    one ratio a row, the geometric mean of its tokens'
    gmpo_loss           GMPO            the same mean, but the tokens are clipped before it is taken
    cispo_loss          CISPO           the clipped ratio is a weight without gradient: no token loses its own

The losses share their arguments:
  log_probs, old_log_probs  [B, T]  log pi and log pi_old of the token that position t predicts, both at the
                                    temperature that was sampled; the gradient flows through log_probs alone
  advantages                [B]     one a row; no gradient
  response_mask             [B, T]  bool, true where the predicted token belongs to the response, its end token included
  clip_low, clip_high               each loss has its own meaning and defaults

What they return is (loss, metrics), metrics as detached 0-d tensors:
  loss            the loss
  ratio_mean, ratio_std    of the importance ratios: response tokens, but rows for GSPO
  ratio_neg_log   mean of -log ratio, an estimate of KL(pi_old || pi)
  clip_share      share of those ratios whose gradient the clip cuts off (CISPO: cuts down)
Reduction, all four: a mean over a row's response tokens (of the surrogate in GRPO and CISPO, inside the exponent in
GSPO and GMPO), then the mean over all B rows: every row weighs the same however long it is. A row without response
tokens adds 0 and still counts. Padded positions may hold anything. What goes into exp (a token's log ratio in GRPO and
CISPO, a row's mean in GSPO and GMPO) counts as 40 where it is above, without gradient: exp would overflow later on.
ValueError: other shapes, a mask that is not bool, a negative clip range.

Needs torch alone. B rows (prompts x G responses, the G of a prompt next to each other), T positions.
"""

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


def grpo_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_low: float = 0.2, clip_high: float = 0.28):
    """GRPO (ERPO eq. 1-2): min(w A, clip(w, 1 - low, 1 + high) A) a token; mean over tokens, then over rows.

    clip_low, clip_high   range of a token's ratio, 1 - clip_low to 1 + clip_high; at least 0
    """
    log_ratio, A, mask = _prepare(log_probs, old_log_probs, advantages, response_mask, clip_low, clip_high)
    ratio = _exp(log_ratio)  # eq. 2 [B, T]
    unclipped, clipped = ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A
    loss = -_row_mean(torch.minimum(unclipped, clipped), mask).mean()  # eq. 1
    return loss, _metrics(loss, log_ratio, clipped < unclipped, mask)


def gspo_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_low: float = 3e-4, clip_high: float = 4e-4):
    """GSPO (ERPO eq. 3-4): one ratio a row, the geometric mean over its tokens; mean over rows.

    The mean over tokens inside the exponent is the only place where length enters: a sum over tokens of the row's
    surrogate would weigh long rows more.

    clip_low, clip_high   range of a row's ratio, 1 - clip_low to 1 + clip_high; at least 0
    """
    log_ratio, A, mask = _prepare(log_probs, old_log_probs, advantages, response_mask, clip_low, clip_high)
    log_s, A, rows = _row_mean(log_ratio, mask), A.squeeze(1), mask.any(1)  # [B] each
    s = _exp(log_s)  # eq. 4
    unclipped, clipped = s * A, s.clamp(1 - clip_low, 1 + clip_high) * A
    loss = -torch.minimum(unclipped, clipped).mean()  # eq. 3; A is 0 in a row without tokens
    return loss, _metrics(loss, log_s, clipped < unclipped, rows)


def gmpo_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_low: float = 0.4, clip_high: float = 0.4):
    """GMPO: token log-ratios are clipped, then exp(their mean over the row) * A; mean over rows.

    The clip is one-sided and works on log w: at most clip_high where A > 0, at least -clip_low elsewhere. The other
    side stays open, as min() leaves it open in GRPO. (clip_share counts tokens of rows with A = 0 too.)

    clip_low, clip_high   range of a token's log ratio, -clip_low to clip_high; at least 0
    """
    log_ratio, A, mask = _prepare(log_probs, old_log_probs, advantages, response_mask, clip_low, clip_high)
    clipped = torch.where(A > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))  # [B, T]
    loss = -(_exp(_row_mean(clipped, mask)) * A.squeeze(1)).mean()
    return loss, _metrics(loss, log_ratio, clipped != log_ratio, mask)


def cispo_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_low: float = 1.0, clip_high: float = 4.0):
    """CISPO (arXiv 2506.13585, eq. 4-5): sg(clip(w, 1 - low, 1 + high)) A log pi a token; mean over tokens, then rows.

    A token outside the range keeps its gradient, with the bound as its weight. Decisions: the paper's reduction is one
    mean over the tokens of the whole group, here it is that of the other losses. The paper tunes clip_high alone, does
    not give it and sets no lower bound: 1.0 is none (w >= 0), 4.0 the bound of 5 on w that TRL's documentation
    recommends. Log-probabilities are finite.

    clip_low, clip_high   range of a token's weight, 1 - clip_low to 1 + clip_high; at least 0
    """
    log_ratio, A, mask = _prepare(log_probs, old_log_probs, advantages, response_mask, clip_low, clip_high)
    ratio = _exp(log_ratio.detach())  # [B, T]
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)  # eq. 5
    loss = -_row_mean(weight * A * log_probs, mask).mean()  # eq. 4
    return loss, _metrics(loss, log_ratio, weight != ratio, mask)


def _prepare(log_probs, old_log_probs, advantages, response_mask, clip_low, clip_high):
    """Check the arguments -> log ratio [B, T], advantages [B, 1] and mask, with zeros wherever there is no response."""
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
    if response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be torch.bool, got {response_mask.dtype}")
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low and clip_high must be at least 0, got {clip_low} and {clip_high}")
    # Padding is replaced before the exp: 0 * NaN would be NaN, in the value and in the gradient.
    log_ratio = _at_least_float32(log_probs) - _at_least_float32(old_log_probs.detach())
    log_ratio = log_ratio.masked_fill(~response_mask, 0)
    A = _at_least_float32(advantages.detach()).masked_fill(~response_mask.any(1), 0).unsqueeze(1)
    return log_ratio, A, response_mask


def _row_mean(x, mask):
    """Mean over each row's response tokens, [B, T] -> [B]; 0 for a row that has none."""
    return x.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)


@torch.no_grad()
def _metrics(loss, log_ratio, clip_acts, valid):
    """Statistics of the ratios where valid; log_ratio, clip_acts and valid of one shape."""
    n, ratio = valid.sum().clamp(min=1), _exp(log_ratio)
    mean = (ratio * valid).sum() / n
    return {
        "loss": loss.detach(),
        "ratio_mean": mean,
        "ratio_std": (((ratio - mean) ** 2 * valid).sum() / n).sqrt(),
        "ratio_neg_log": -(log_ratio * valid).sum() / n,
        "clip_share": (clip_acts & valid).sum() / n,
    }


def _exp(log_ratio):
    return log_ratio.clamp(max=40).exp()  # infinity * an advantage of 0 would be NaN


def _at_least_float32(x):
    """Lower precision (and whole numbers) are computed in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
