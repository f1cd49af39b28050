"""The optimizer of a run, its learning rate, and its state read back from a file."""

import torch


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
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "factor": 1.0},
        {"params": others, "weight_decay": 0.0, "factor": 1.0},
        {"params": routers, "weight_decay": weight_decay, "factor": router_factor},
    ]
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.999), fused=fused)


def restore(optimizer, saved: dict):
    """Give an optimizer the moments of a checkpoint.

    ValueError, KeyError, TypeError or AttributeError where they do not fit.
    """
    groups = optimizer.state_dict()["param_groups"]  # ours: a file has no say in rates and decay
    for ours, theirs in zip(groups, saved["param_groups"], strict=True):
        if ours["params"] != theirs["params"]:
            raise ValueError("it is of other parameters")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for index, moments in saved["state"].items():  # before torch takes them: it asks no questions
        shape = tuple(parameters[index].shape)
        if not isinstance(moments, dict) or {k: tuple(m.shape) for k, m in moments.items()} != {
            "step": (),
            "exp_avg": shape,
            "exp_avg_sq": shape,
        }:
            raise ValueError("its moments have other shapes")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
