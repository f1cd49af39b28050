"""ERL's controls: what `explore` found, with its meaning taken away in one respect. For experiments, not for training.

    paths = explore(forward, mask, top_k, generator=generator)
    paths = random_expert(paths, generator)
    for loss, metrics in erl_objective(forward, paths): ...

What a control does as well as ERL is no credit that ERL gives. m passes, B rows, T positions, L layers, K experts.
"""

import torch

from erl import Paths


def random_expert(paths: Paths, generator) -> Paths:
    """The same decisions and advantages are credited to other experts, drawn anew and uniformly from all E."""
    E = paths.perturbed.router_log_probs.shape[-1]
    scores = torch.rand(*paths.experts.shape[:3], E, generator=generator)
    experts = scores.topk(paths.experts.shape[3]).indices.to(paths.experts.device)  # [m * B, T, L, K]
    old_router_log_probs = paths.perturbed.router_log_probs.detach().gather(-1, experts)
    return paths._replace(experts=experts, old_router_log_probs=old_router_log_probs)


def shuffled(paths: Paths, generator) -> Paths:
    """The same advantages in random places among those that the loss reads."""
    A, counts = paths.advantages.clone(), paths.S.any(-1)
    A[counts] = A[counts][torch.randperm(int(counts.sum()), generator=generator).to(A.device)]
    return paths._replace(advantages=A)


def level(paths: Paths) -> Paths:
    """Advantages less their mean over the replaced decisions at the same position: no position is worse as such."""
    rows = len(paths.original.log_probs)
    A, count = (x.unflatten(0, (-1, rows)) for x in (paths.advantages, paths.S.sum(-1)))  # [m, B, T]
    mean = (A * count).sum(0) / count.sum(0).clamp(min=1)  # [B, T]
    return paths._replace(advantages=(A - mean).flatten(0, 1))


def constant(paths: Paths, value: float | None = None) -> Paths:
    """The same advantage everywhere: `value`, or the step's own mean over the replaced decisions."""
    if value is None:
        count = paths.S.sum(-1)
        value = ((paths.advantages * count).sum() / count.sum().clamp(min=1)).item()
    return paths._replace(advantages=torch.full_like(paths.advantages, value))
