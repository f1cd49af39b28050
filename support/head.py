"""A fast output head: `moe.lm_loss` and `moe.token_log_probs` for large vocabularies.

With 50,257 words a [N, V] log-softmax costs more than the rest of a small model, so no function here makes one: they
work on blocks of tokens, and on a CPU on tiles of them that stay in its cache. `support.fast.speed_up` switches them
on. N tokens, D width, V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import moe

BLOCK_ELEMENTS = 1 << 23  # logits that exist at a time
CPU_TILE = (512, 384)  # tokens x words
SMALL_VOCABULARY = 1024  # up to here one product is fastest


def _blocks(x: Tensor, weight: Tensor):
    """Operands in the dtype that autocast asks for, slices of the tokens, slices of the words."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    N, V = x.shape[0], weight.shape[0]
    size, width = CPU_TILE if x.device.type == "cpu" else (max(16, BLOCK_ELEMENTS // V), V)
    words = [slice(i, min(i + width, V)) for i in range(0, V, width)]
    return x, weight, [slice(i, i + size) for i in range(0, N, size)], words


def _place(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Where targets [n, 1] stand among some of the words, and whether they do."""
    place, last = targets - words.start, words.stop - words.start - 1
    return place.clamp(0, last), (place >= 0) & (place <= last)


def _block_log_probs(x, w, targets, words, temperature, tiles=None) -> tuple[Tensor, Tensor]:
    """log p(target) and the log normaliser of a block, both [n, 1]. tiles: a list that receives the logits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    target_logits, norms = torch.zeros(targets.shape, device=x.device, dtype=dtype), []
    for v in words:
        logits = (x @ w[v].T).to(dtype)
        if temperature != 1:
            logits.div_(temperature)
        place, inside = _place(targets, v)
        picked = logits.gather(-1, place)
        target_logits += picked.masked_fill(~inside, 0)
        # logsumexp, in fewer passes over the logits
        norms.append(picked + F.cross_entropy(logits, place.squeeze(-1), reduction="none")[:, None])
        if tiles is not None:
            tiles.append(logits)
    log_norm = torch.cat(norms, -1).logsumexp(-1, keepdim=True)
    return target_logits - log_norm, log_norm


def _softmax_less_target(logits, log_norm, targets, words) -> Tensor:
    """The gradient of -log p(target) with respect to a tile of logits, which it overwrites."""
    place, inside = _place(targets, words)
    return logits.sub_(log_norm).exp_().scatter_add_(-1, place, -inside.to(logits.dtype))


class _LMLoss(torch.autograd.Function):
    """sum_n scale_n * -log p(target_n), and log p(target_n). The gradient is computed in the forward, where the logits
    are at hand."""

    @staticmethod
    def forward(ctx, features, weight, targets, scale):
        x, w, blocks, words = _blocks(features, weight)
        need_x, need_w, *_ = ctx.needs_input_grad
        log_probs = torch.empty(x.shape[0], 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        grad_x = torch.zeros_like(x, dtype=log_probs.dtype) if need_x else None
        grad_w = torch.zeros_like(w, dtype=weight.dtype) if need_w else None
        targets, scale = targets[:, None], scale[:, None]
        for s in blocks:
            tiles = [] if need_x or need_w else None
            log_probs[s], log_norm = _block_log_probs(x[s], w, targets[s], words, 1.0, tiles)
            scaled = (x[s] * scale[s]).to(x.dtype)
            for v, logits in zip(words, tiles or (), strict=False):
                d = _softmax_less_target(logits, log_norm, targets[s], v).to(x.dtype)
                if need_x:
                    grad_x[s] += d @ w[v]
                if need_w:
                    grad_w[v] += d.T @ scaled
        ctx.save_for_backward((grad_x * scale).to(features.dtype) if need_x else None, grad_w)
        log_probs = log_probs.squeeze(-1)
        ctx.mark_non_differentiable(log_probs)
        return -(log_probs * scale.squeeze(-1)).sum(), log_probs

    @staticmethod
    def backward(ctx, grad, _):
        grad_x, grad_w = ctx.saved_tensors
        return None if grad_x is None else grad_x * grad, None if grad_w is None else grad_w * grad, None, None


class _TokenLogProbs(torch.autograd.Function):
    """log p(target_n) for each token; the backward computes the logits of a block again instead of keeping them."""

    @staticmethod
    def forward(ctx, features, weight, targets, temperature):
        x, w, blocks, words = _blocks(features, weight)
        out, log_norm = torch.empty(
            2, x.shape[0], 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        for s in blocks:
            out[s], log_norm[s] = _block_log_probs(x[s], w, targets[s, None], words, temperature)
        ctx.save_for_backward(features, weight, targets, log_norm)
        ctx.temperature, ctx.dtype = temperature, x.dtype
        return out.squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        features, weight, targets, log_norm = ctx.saved_tensors
        x, w, blocks, words = _blocks(features.to(ctx.dtype), weight.to(ctx.dtype))
        need_x, need_w, *_ = ctx.needs_input_grad
        grad_x = torch.zeros_like(x, dtype=log_norm.dtype) if need_x else None
        grad_w = torch.zeros_like(weight) if need_w else None
        scale = -grad[:, None] / ctx.temperature
        for s in blocks:
            scaled = (x[s] * scale[s]).to(x.dtype)
            for v in words:
                logits = (x[s] @ w[v].T).to(log_norm.dtype).div_(ctx.temperature)
                d = _softmax_less_target(logits, log_norm[s], targets[s, None], v).to(x.dtype)
                if need_x:
                    grad_x[s] += d @ w[v]
                if need_w:
                    grad_w[v] += d.T @ scaled
        return (grad_x * scale).to(features.dtype) if need_x else None, grad_w, None, None


def lm_loss(features: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Arguments and results of `moe.lm_loss`."""
    if weight.shape[0] <= SMALL_VOCABULARY:
        return moe.lm_loss(features, weight, targets, mask)
    shape, features, targets = targets.shape, features.flatten(0, -2), targets.flatten()
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.flatten()
    scale = keep.to(torch.promote_types(features.dtype, torch.float32)) / keep.sum().clamp(min=1)
    if not torch.is_grad_enabled():  # a parameter asks for its gradient even then, and it is computed in the forward
        features, weight = features.detach(), weight.detach()
    loss, log_probs = _LMLoss.apply(features, weight, targets, scale)
    return loss, log_probs.view(shape)


def token_log_probs(features: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Arguments and result of `moe.token_log_probs`."""
    if weight.shape[0] <= SMALL_VOCABULARY:
        return moe.token_log_probs(features, weight, targets, temperature)
    temperature = max(temperature, moe.MIN_TEMPERATURE)
    return _TokenLogProbs.apply(features.flatten(0, -2), weight, targets.flatten(), temperature).view(targets.shape)
