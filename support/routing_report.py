"""What the routers of a batch do, and how far they are from the routers that recorded it. To copy: needs torch alone.

report = routing_report(routing.logits, mask=mask)                                   # one pass
report = routing_report(routing.logits, rollout.expert_log_probs, mask, old_experts=rollout.experts)
report = routing_report(new_tape.router_log_probs(), old_tape.router_log_probs(), mask, top_k=8)
"""

import torch


def expert_load(experts, num_experts, mask):
    """experts [B, T, L, K] of any integer type, mask bool [B, T] -> share of a layer's slots at each expert, [L, E]."""
    L, E, here = experts.shape[2], num_experts, mask[:, :, None, None]
    places = experts.long().masked_fill(~here, 0) + E * torch.arange(L, device=experts.device)[:, None]
    counts = torch.zeros(L * E, device=experts.device, dtype=torch.long)  # integers add up alike in every order
    counts.scatter_add_(0, places.flatten(), here.expand_as(places).long().flatten())
    return counts.view(L, E) / (mask.sum() * experts.shape[3]).clamp(min=1)


@torch.no_grad()
def routing_report(new, old=None, mask=None, *, experts=None, old_experts=None, top_k=1, floor=0.8):
    """B rows, T positions, L MoE layers, E experts, K active ones -> dict of detached float32 tensors.

    new          [B, T, L, E]   router logits or log-probabilities (full softmax) of the policy at hand
    old          [B, T, L, E]   the same of the policy that recorded the routes; if `old_experts` is given [B, T, L, K],
                                log P of those experts alone (full softmax)
    mask         bool [B, T]    tokens that count; padding may hold anything (None: all count)
    experts      [B, T, L, K]   that `new` used, of any integer type (None: the top-K of `new`)
    old_experts  [B, T, L, K]   that the old policy used (None: the top-K of `old`)
    top_k, floor   K, read only where no experts are given; the floor of gamma

    Of the tokens that count, 0-d unless [L] follows:
      router_entropy     mean entropy of the router's softmax in nats; and router_entropy_by_layer [L]
      top1_above_0.9     share of decisions whose largest probability is above 0.9
      load_min load_max  smallest and largest share of a layer's slots that one expert got; even load is 1 / E
      max_vio            largest load of a layer over the mean load, less 1, mean over layers; and max_vio_by_layer [L]
      dead_experts       (layer, expert) pairs without a token
    with `old`:
      agreement          share of the old slots whose expert `new` uses too; and agreement_by_layer [L]
      moved_anywhere     share of tokens that have another set of experts in at least one layer
      gamma_mean gamma_min   router-shift ratio exp(-mean over L and K |log P - log P_old|) at the old experts, floored;
      floor_share        share of tokens whose unfloored gamma is below the floor
    Without a token that counts every value is 0 (gamma_min 1). ValueError: shapes that do not fit.
    """
    if new.dim() != 4:
        raise ValueError(f"new must have shape [B, T, L, E], got {list(new.shape)}")
    B, T, L, E = new.shape
    mask = torch.ones(B, T, dtype=torch.bool, device=new.device) if mask is None else mask.bool()
    K = next((x.shape[-1] for x in (experts, old_experts) if x is not None), top_k)
    wanted = [("mask", mask, (B, T)), ("old", old, (B, T, L, E if old_experts is None else K))]
    wanted += [("experts", experts, (B, T, L, K)), ("old_experts", old_experts, (B, T, L, K))]
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    here = mask[:, :, None, None]  # [B, T, 1, 1]

    def mean(x):  # [B, T] or [B, T, L] -> 0-d or [L]
        return x.float().masked_fill(~here.view(B, T, *[1] * (x.dim() - 2)), 0).sum((0, 1)) / mask.sum().clamp(min=1)

    # Padding is replaced before it is computed with: 0 * NaN would be NaN. log_softmax leaves log-probabilities as is.
    log_P = new.float().masked_fill(~here, 0).log_softmax(-1)  # [B, T, L, E]
    experts = log_P.topk(K).indices if experts is None else experts.long().masked_fill(~here, 0)
    entropy = mean(-(log_P.exp() * log_P.clamp(min=-100)).sum(-1))  # [L]; a probability of 0 adds 0
    load = expert_load(experts, E, mask)  # [L, E]
    max_vio = (load.amax(-1) * E - 1).clamp(min=0)  # [L]
    report = {"router_entropy": entropy.mean(), "router_entropy_by_layer": entropy}
    report |= {"top1_above_0.9": mean(log_P.amax(-1).exp() > 0.9).mean()}
    report |= {"load_min": load.min(), "load_max": load.max(), "dead_experts": (load == 0).sum().float() * mask.any()}
    report |= {"max_vio": max_vio.mean(), "max_vio_by_layer": max_vio}
    if old is not None:
        old = old.float().masked_fill(~here, 0)
        if old_experts is None:
            old, old_experts = old.log_softmax(-1).topk(K)
        old_experts = old_experts.long().masked_fill(~here, 0)
        kept = (old_experts[..., :, None] == experts[..., None, :]).any(-1).float().mean(-1)  # [B, T, L]
        gamma = (-(log_P.gather(-1, old_experts) - old).abs().mean((2, 3))).exp()  # [B, T]
        report |= {"agreement": mean(kept).mean(), "agreement_by_layer": mean(kept)}
        report |= {"moved_anywhere": mean((kept < 1).any(-1)), "floor_share": mean(gamma < floor)}
        gamma = gamma.clamp(min=floor)
        report |= {"gamma_mean": mean(gamma), "gamma_min": gamma.masked_fill(~mask, 1).min()}
    return report


@torch.no_grad()
def ratio_report(name, log_probs, then, mask):
    """Of r = p / p_then over the tokens of mask bool [B, T], from their log-probabilities [B, T]:

    NAME_gap, mean |log r|; NAME_kl, the k3 estimate of KL(p_then, p), mean of r - 1 - log r; NAME_ratio_p01, _p50 and
    _p99, quantiles of r. Without a token 0 and 1.
    """
    log_ratio = (log_probs.float() - then.float())[mask]  # [N]
    log_ratio = log_ratio if len(log_ratio) else log_ratio.new_zeros(1)
    report = {f"{name}_gap": log_ratio.abs().mean(), f"{name}_kl": (log_ratio.exp() - 1 - log_ratio).mean()}
    return report | {f"{name}_ratio_p{q:02}": log_ratio.exp().quantile(q / 100) for q in (1, 50, 99)}
