"""The optimizer of a run, its learning rate, the norm of its gradient, and its state read back from a checkpoint."""

import math

import torch

from support.errors import UserError


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear down to 0 (ERL table 7). Decision: before that up over the first twentieth, at most 100 steps."""
    warmup = min(100, max(1, steps // 20))
    return peak * ((step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup))


def make_optimizer(model, weight_decay: float, router_factor: float = 1.0):
    """AdamW with ERL table 7's betas (0.9, 0.999) and weight decay. Decision: matrices decay, biases and norms do not.

    A group's `factor` scales its learning rate: that of the routers may differ.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    routers = [p for n, p in named if n.endswith("router.weight")]
    others = [p for n, p in named if p.ndim <= 1 or ".b_" in n]
    matrices = [p for n, p in named if not any(p is q for q in routers + others)]
    groups = (matrices, weight_decay, 1.0), (others, 0.0, 1.0), (routers, weight_decay, router_factor)
    groups = [{"params": p, "weight_decay": decay, "factor": factor} for p, decay, factor in groups if p]
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=fused)


def set_learning_rate(optimizer, step: int, steps: int, peak: float) -> float:
    """Give every group its rate for a step of a phase. -> the rate of factor 1."""
    rate = learning_rate(step, steps, peak)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return optimizer.param_groups[0]["lr"]


def clip_gradients(model, limit: float) -> dict:
    """Scale the gradient down to the norm `limit` (0: never). -> its norm before, and that of the routers' part."""
    routers = [p.grad for n, p in model.named_parameters() if n.endswith("router.weight") and p.grad is not None]
    router_norm = torch.nn.utils.get_total_norm(routers)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return {"grad_norm": norm.detach(), "router_grad_norm": router_norm.detach()}


def restore(optimizer, model, saved: dict[str, torch.Tensor]):
    """Give an optimizer the moments of a checkpoint, by its parameters' names. UserError where they do not fit."""
    names, state = {p: n for n, p in model.named_parameters()}, {}
    for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        kept = {key: saved.get(f"{names[p]}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if all(x is None for x in kept.values()):  # it never had a gradient
            continue
        if any(x is None or key != "step" and x.shape != p.shape for key, x in kept.items()):
            raise UserError(f"the checkpoint's optimizer does not fit the weights: see {names[p]}")
        state[index] = kept
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
