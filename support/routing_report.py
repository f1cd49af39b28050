"""What the routers of a batch do, and how far they are from the routers that recorded it. To copy: needs torch alone.

report = routing_report(routing.logits, mask=mask)                                   # one pass
report = routing_report(routing.logits, rollout.expert_log_probs, mask, old_experts=rollout.experts)
report = routing_report(new_tape.router_log_probs(), old_tape.router_log_probs(), mask, top_k=8)
"""

import torch


@torch.no_grad()
def routing_report(new, old=None, mask=None, *, experts=None, old_experts=None, top_k=1, floor=0.8):
    """B rows, T positions, L MoE layers, E experts, K active ones -> dict of detached float32 tensors.

    new          [B, T, L, E]        router logits or log-probabilities (full softmax) of the policy at hand
    old          None, and there is nothing to compare with; or of the policy that recorded the routes
                 [B, T, L, E]        logits or log-probabilities; or, where a rollout kept no more than that,
                 [B, T, L, K]        log P of `old_experts` (full softmax). It is this one if `old_experts` is given.
    mask         bool [B, T]         tokens that count; padding may hold anything (None: all count)
    experts      int64 [B, T, L, K]  that `new` used (None: the top-K of `new`)
    old_experts  int64 [B, T, L, K]  that the old policy used (None: the top-K of `old`)
    top_k        K, read only where no experts are given
    floor        of gamma

    Of the tokens that count, 0-d unless another shape is given:
      router_entropy     mean entropy of the router's softmax in nats; and router_entropy_by_layer [L]
      top1_above_0.9     share of decisions whose largest probability is above 0.9
      load_min load_max  smallest and largest share of a layer's slots that one expert got; even load is 1 / E
      max_vio            largest load of a layer over the mean load, less 1, mean over layers; and max_vio_by_layer [L]
      dead_experts       number of (layer, expert) pairs without a token
      route_bytes        of these routes, in the smallest integers that can name E experts
    and with `old`:
      agreement          share of the old slots whose expert `new` uses too; and agreement_by_layer [L]
      moved_anywhere     share of tokens that have another set of experts in at least one layer
      gamma_mean gamma_min   router-shift ratio exp(-mean over L and K |log P - log P_old|) at the old experts, floored
      floor_share        share of tokens whose unfloored gamma is below the floor
    Without a token that counts every value is 0 (gamma_min 1). ValueError: shapes that do not fit.
    """
    if new.dim() != 4:
        raise ValueError(f"new must have shape [B, T, L, E], got {list(new.shape)}")
    B, T, L, E = new.shape
    mask = torch.ones(B, T, dtype=torch.bool, device=new.device) if mask is None else mask
    K = next((x.shape[-1] for x in (experts, old_experts) if x is not None), top_k)
    of_old = None if old is None else ((B, T, L, E) if old_experts is None else (B, T, L, K))
    wanted = (("mask", mask, (B, T)), ("old", old, of_old))
    wanted += (("experts", experts, (B, T, L, K)), ("old_experts", old_experts, (B, T, L, K)))
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    here = mask.bool()[:, :, None, None]  # [B, T, 1, 1]
    tokens = mask.sum().clamp(min=1)

    def mean(x):  # [B, T] or [B, T, L] -> 0-d or [L]
        return x.float().masked_fill(~here.view(B, T, *[1] * (x.dim() - 2)), 0).sum((0, 1)) / tokens

    # Padding is replaced before it is computed with: 0 * NaN would be NaN. log_softmax leaves log-probabilities as is.
    log_probs = new.float().masked_fill(~here, 0).log_softmax(-1)
    experts = log_probs.topk(K).indices if experts is None else experts.masked_fill(~here, 0)
    entropy = mean(-(log_probs.exp() * log_probs.clamp(min=-100)).sum(-1))  # [L]; a probability of 0 adds 0
    places = experts + E * torch.arange(L, device=new.device)[:, None]
    counts = torch.zeros(L * E, device=new.device, dtype=torch.long)
    counts = counts.scatter_add_(0, places.flatten(), here.expand_as(experts).long().flatten()).view(L, E)
    load = counts / (tokens * K)  # [L, E]
    max_vio = (load.amax(-1) * E - 1).clamp(min=0)
    size = 1 if E <= 2**8 else 2 if E <= 2**16 else 4
    report = {
        "router_entropy": entropy.mean(),
        "router_entropy_by_layer": entropy,
        "top1_above_0.9": mean(log_probs.amax(-1).exp() > 0.9).mean(),
        "load_min": load.min(),
        "load_max": load.max(),
        "max_vio": max_vio.mean(),
        "max_vio_by_layer": max_vio,
        "dead_experts": (counts == 0).sum().float() * mask.any(),
        "route_bytes": mask.sum().float() * (L * K * size),
    }
    if old is None:
        return report
    old = old.float().masked_fill(~here, 0)
    if old_experts is None:
        old = old.log_softmax(-1)
        old_experts = old.topk(K).indices
        old = old.gather(-1, old_experts)
    old_experts = old_experts.masked_fill(~here, 0)
    kept = (old_experts[..., :, None] == experts[..., None, :]).any(-1).float().mean(-1)  # [B, T, L]
    shift = (log_probs.gather(-1, old_experts) - old).abs().mean((2, 3))  # [B, T]
    gamma = (-shift).exp()
    report |= {
        "agreement": mean(kept).mean(),
        "agreement_by_layer": mean(kept),
        "moved_anywhere": mean((kept < 1).any(-1)),
        "gamma_mean": mean(gamma.clamp(min=floor)),
        "gamma_min": gamma.clamp(min=floor).masked_fill(~mask.bool(), 1).min(),
        "floor_share": mean(gamma < floor),
    }
    return report
