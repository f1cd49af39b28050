"""The output head for large vocabularies: `moe.lm_loss` and `moe.token_log_probs` without a table of [N, V] logits.

Over 50,257 words such a table costs more than the rest of a small model, in time and in memory. Here a block of tokens
is worked on at a time, on a CPU in tiles of words that stay in its cache. N tokens, n of a block, D width, V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import moe

BLOCK_ELEMENTS = 1 << 23  # logits of a block
CPU_TILE = (512, 384)  # tokens x words
SMALL_VOCABULARY = 1024  # up to here one product is fastest


def _head(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None = None):
    """log p(target) [N, 1] of x [N, D] and targets [N, 1]; with a scale [N, 1] also the gradients of
    sum_n scale_n * -log p(target_n) with respect to x and weight [V, D]."""
    (N, V), dtype = (len(x), len(weight)), torch.promote_types(x.dtype, torch.float32)
    size, width = CPU_TILE if x.device.type == "cpu" else (max(16, BLOCK_ELEMENTS // V), V)
    log_probs = x.new_zeros(N, 1, dtype=dtype)
    grad_x, grad_w = (None if scale is None else torch.zeros_like(t, dtype=dtype) for t in (x, weight))
    for tokens in (slice(i, i + size) for i in range(0, N, size)):
        tiles, norms = [], []
        for words in (slice(i, i + width) for i in range(0, V, width)):
            logits = (x[tokens] @ weight[words].T).to(dtype)  # [n, words]
            inside = (targets[tokens] >= words.start) & (targets[tokens] < words.start + logits.shape[1])  # [n, 1]
            place, one_hot = (targets[tokens] - words.start) * inside, inside.to(dtype)  # of the target in this tile
            picked = logits.gather(-1, place)
            log_probs[tokens] += picked * one_hot
            # logsumexp, in fewer passes over the logits
            norms.append(picked + F.cross_entropy(logits, place.squeeze(-1), reduction="none")[:, None])
            tiles += [] if scale is None else [(words, logits, place, one_hot)]
        log_norm = torch.cat(norms, -1).logsumexp(-1, keepdim=True)  # [n, 1]
        log_probs[tokens] -= log_norm
        for words, logits, place, one_hot in tiles:
            d = logits.sub_(log_norm).exp_().scatter_add_(-1, place, -one_hot).mul_(scale[tokens]).to(x.dtype)
            grad_x[tokens] += d @ weight[words]
            grad_w[words] += d.T @ x[tokens]
    return log_probs if scale is None else (log_probs, grad_x.to(x.dtype), grad_w.to(weight.dtype))


class _LMLoss(torch.autograd.Function):
    """sum_n scale_n * -log p(target_n), and log p [N, 1]. The forward makes the gradients, where the logits are."""

    @staticmethod
    def forward(ctx, x, weight, targets, scale):
        log_probs, *gradients = _head(x, weight, targets, scale)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(log_probs)
        return -(log_probs * scale).sum(), log_probs

    @staticmethod
    def backward(ctx, grad, _):
        return *((g * grad).to(g.dtype) for g in ctx.saved_tensors), None, None


class _TokenLogProbs(torch.autograd.Function):
    """log p(target_n) [N, 1]; the backward makes the logits of a block again instead of keeping them."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        ctx.save_for_backward(x, weight, targets)
        return _head(x, weight, targets)

    @staticmethod
    def backward(ctx, grad):
        _, *gradients = _head(*ctx.saved_tensors, -grad)
        return *gradients, None


def _operands(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] and weight [V, D] in the dtype that autocast asks for, targets [N, 1]."""
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
        features, weight = features.to(dtype), weight.to(dtype)
    return features.flatten(0, -2), weight, targets.reshape(-1, 1)


def lm_loss(features: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Arguments and results of `moe.lm_loss`."""
    if len(weight) <= SMALL_VOCABULARY:
        return moe.lm_loss(features, weight, targets, mask)
    keep = (torch.ones_like(targets, dtype=torch.bool) if mask is None else mask).reshape(-1, 1)
    scale = keep.to(torch.promote_types(features.dtype, torch.float32)) / keep.sum().clamp(min=1)
    if torch.is_grad_enabled():
        loss, log_probs = _LMLoss.apply(*_operands(features, weight, targets), scale)
        return loss, log_probs.view(targets.shape)
    log_probs = token_log_probs(features, weight, targets)  # without the gradients
    return -(log_probs.reshape(-1, 1) * scale).sum(), log_probs


def token_log_probs(features: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Arguments and result of `moe.token_log_probs`."""
    if len(weight) <= SMALL_VOCABULARY:
        return moe.token_log_probs(features, weight, targets, temperature)
    features = features / max(temperature, moe.MIN_TEMPERATURE)
    return _TokenLogProbs.apply(*_operands(features, weight, targets)).view(targets.shape)


# Over a large vocabulary the head is most of a small model's work, and most of a task's rows is prompt and padding: so
# it is asked about the positions that count and no others. A mask on the CPU lets nothing wait for the device.


def masked_lm_loss(model: moe.GPT, features: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of -log p(target) where mask [B, T] is True, and log p(target) [B, T] without gradient, 0 elsewhere."""
    loss, picked = lm_loss(*_at(mask, features, model.wte.weight, targets))
    return loss, _put_back(picked, mask)


def masked_log_probs(model: moe.GPT, features: Tensor, targets: Tensor, mask: Tensor, temperature=1.0) -> Tensor:
    """log p(target) [B, T] where mask [B, T] is True, differentiable, 0 elsewhere. features [B, T, D]."""
    return _put_back(token_log_probs(*_at(mask, features, model.wte.weight, targets), temperature), mask)


def _at(mask: Tensor, features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    features, targets, places = features.flatten(0, 1), targets.flatten(), mask.flatten().nonzero().squeeze(1)
    if len(places) < len(targets):
        places = places.to(features.device)
        features, targets = features.index_select(0, places), targets.index_select(0, places)
    return features, weight, targets


def _put_back(picked: Tensor, mask: Tensor) -> Tensor:
    return picked.new_zeros(mask.shape).masked_scatter(mask.to(picked.device), picked)
