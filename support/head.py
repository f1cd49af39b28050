"""The output head for large vocabularies, and for the positions that count: `moe.lm_loss` and `moe.token_log_probs`.

Over 50,257 words a table of logits [N, V] costs more than the rest of a small model. So a block of tokens is worked on
at a time, and its logits are computed again in the backward: by PyTorch's own function on a CPU in float32, where it is
faster, elsewhere by checkpoints around moe.py's head. N tokens, D width, V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moe

BLOCK = 256  # tokens
SMALL_VOCABULARY = 1024  # up to here one product is fastest


def token_log_probs(features: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Arguments and result of `moe.token_log_probs`."""
    if len(weight) <= SMALL_VOCABULARY:
        return moe.token_log_probs(features, weight, targets, temperature)
    x, words = features.flatten(0, -2), targets.flatten()  # [N, D], [N]
    float32 = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if float32 and hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13 has it
        blocks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=BLOCK)
        x = x / max(temperature, moe.MIN_TEMPERATURE)
        return -F.linear_cross_entropy(x, weight, words, reduction="none", options=blocks).view(targets.shape)
    how, parts = {"use_reentrant": False, "preserve_rng_state": False}, (x.split(BLOCK), words.split(BLOCK))
    found = [checkpoint(moe.token_log_probs, a, weight, b, temperature, **how) for a, b in zip(*parts, strict=True)]
    return torch.cat(found).view(targets.shape)


def lm_loss(features: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Arguments and results of `moe.lm_loss`."""
    if len(weight) <= SMALL_VOCABULARY:
        return moe.lm_loss(features, weight, targets, mask)
    log_probs = token_log_probs(features, weight, targets)
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    return -(log_probs * keep).sum() / keep.sum().clamp(min=1), log_probs.detach()


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
