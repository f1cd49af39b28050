"""ERL, exploration-driven reinforcement learning of the router (Kim & Kang, Findings of EMNLP 2025).

Send a text through the model twice: once along the router's own routes, once with a random fraction alpha of the
routing decisions replaced by random experts. Where the perturbed pass predicts the next token better, the random
experts become more probable. Where it predicts it worse, they become less probable.

    random_routes    eq. 6-9             which decisions are replaced, and by which experts
    erl_advantage    eq. 10-11 and 18    for each predicted token the sign of the gain, or the gain
    erl_loss         eq. 12-14           the clipped surrogate on the router's probabilities
    explore          eq. 6-11            first half of a step: m perturbed passes, drawn, run and scored
    erl_objective    eq. 14-17           second half: L = L_o + delta * L_p, once an inner epoch

The last two make the method from any model, seen as one function forward(routes) (see `explore`):

    paths = explore(forward, mask, top_k)
    for loss, metrics in erl_objective(forward, paths):
        loss.backward(); optimizer.step(); optimizer.zero_grad()

Needs torch alone. B sequences, T positions, L MoE layers, K active experts a token, E experts a layer.
"""

import math
from typing import Literal, NamedTuple

import torch


def random_routes(batch, length, layers, num_experts, top_k, alpha, *, generator=None, device=None):
    """Draw the random experts of a perturbed pass, and the decisions that use them (eq. 6-9).

    alpha: probability that a decision is replaced, a number or a tensor [B] (one a row), within [0, 1].
    Returns experts int64 [B, T, L, K], distinct within a decision, and perturbed bool [B, T, L], true where they
    replace the router's choice. The same generator state gives the same experts whatever alpha is.
    ValueError: alpha outside [0, 1] or of another shape, top_k not in 1..num_experts.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
    alpha = torch.as_tensor(alpha, dtype=torch.float32)
    if alpha.shape not in ((), (batch,)):
        raise ValueError(f"alpha must be a number or a tensor of shape [{batch}], got shape {list(alpha.shape)}")
    if not ((alpha >= 0) & (alpha <= 1)).all():  # written so that NaN fails too
        raise ValueError(f"alpha must lie within [0, 1], got {alpha.tolist()}")
    scores = torch.rand(batch, length, layers, num_experts, generator=generator, device=device)  # eq. 7-8
    experts = scores.topk(top_k).indices  # eq. 9 [B, T, L, K]; uniform over all E, the router's own choice included
    # Decision: each decision is drawn independently with probability alpha (the paper's M ~ alpha * l * t).
    draw = torch.rand(batch, length, layers, generator=generator, device=device)  # in [0, 1): 0 is never, 1 is always
    return experts, draw < alpha.to(draw.device).view(-1, 1, 1)  # [B, T, L]


def erl_advantage(perturbed_log_probs, original_log_probs, kind="static"):
    """How much better the perturbed pass predicts each token: the sign (eq. 10-11), or with "log" the gap (eq. 18).

    Both inputs are finite log-probabilities of the token that a position predicts, of one shape (any). The paper
    compares probabilities: their difference has the same sign, but is 0 where both are too small for the dtype.
    Returns a tensor of that shape, float32 (float64 stays), without gradient. The two passes must differ in their
    routes alone, or the sign makes a full +1 or -1 of dropout, jitter or rounding (see `rounding`).
    ValueError: shapes that differ, unknown kind.
    """
    if kind not in ("static", "log"):
        raise ValueError(f'kind must be "static" or "log", got {kind!r}')
    _check_shape("original_log_probs", original_log_probs, perturbed_log_probs.shape)
    difference = _at_least_float32(perturbed_log_probs.detach()) - _at_least_float32(original_log_probs.detach())
    return difference if kind == "log" else difference.sign()


def erl_loss(router_log_probs, old_router_log_probs, advantages, perturbed, *, clip_eps=0.2):
    """L_RL (eq. 12-14): the clipped surrogate, averaged over every perturbed decision and its K experts.

    router_log_probs      [B, T, L, K]  log P of the randomly chosen experts, P the router's full softmax (never the
                                        renormalised gate, which is 0 outside the top-K); the gradient flows here
    old_router_log_probs  [B, T, L, K]  the same, recorded when the perturbed pass was drawn; no gradient
    advantages            [B, T]        of the token that position t predicts; no gradient
    perturbed             [B, T, L]     bool, the set S: replaced decisions at positions whose prediction counts
    clip_eps                            0.2 in the paper, at least 0; infinity for no clip

    For m perturbed passes pass m * B rows. Entries outside S may hold anything. An empty S gives 0 with gradient 0.
    A log ratio above 40 counts as 40, without gradient, because exp would overflow.
    Reduction: sum over S and K, divided by |S| * K; so a long text weighs more than a short one.
    Caution: the experts are drawn uniformly, and eq. 12 divides by the router's probability as if the router had drawn
    them. An advantage A that says nothing of the expert then moves the logit of expert e along A (1/E - P(e)). Where
    A is below 0 at a position, that sharpens it. `erl_objective(ratio="uniform")` divides by 1/E instead.
    Returns (loss, metrics), metrics as detached 0-d tensors over the perturbed decisions:
      rl_loss                                  the loss
      ratio_mean                               mean of r = P / P_old; 1 as long as the router has not moved
      clip_share                               share of (decision, expert) whose gradient the clip cuts off
      advantage_positive, advantage_negative   share of decisions whose route was better, worse
      perturbed_share                          |S| / (B * T * L), padding counted in the denominator
    ValueError: a shape or mask type other than the above, clip_eps below 0.
    """
    if router_log_probs.dim() != 4 or not router_log_probs.shape[3]:
        raise ValueError(f"router_log_probs must have shape [B, T, L, K], K > 0, got {list(router_log_probs.shape)}")
    B, T, L, K = router_log_probs.shape
    _check_shape("old_router_log_probs", old_router_log_probs, (B, T, L, K))
    _check_shape("advantages", advantages, (B, T))
    _check_shape("perturbed", perturbed, (B, T, L), torch.bool)
    if not clip_eps >= 0:
        raise ValueError(f"clip_eps must be at least 0, got {clip_eps}")

    # Entries outside S are replaced before the exp: 0 * NaN would be NaN, in the value and in the gradient.
    in_S = perturbed.unsqueeze(-1)  # [B, T, L, 1]
    log_ratio = _at_least_float32(router_log_probs) - _at_least_float32(old_router_log_probs.detach())
    ratio = log_ratio.masked_fill(~in_S, 0).clamp(max=40).exp()  # eq. 12 [B, T, L, K]
    # One advantage a token: the decisions of all layers at position t answer for the token predicted there.
    A = _at_least_float32(advantages.detach())[:, :, None, None].masked_fill(~in_S, 0)  # [B, T, L, 1]
    unclipped, clipped = ratio * A, ratio.clamp(1 - clip_eps, 1 + clip_eps) * A
    objective = torch.minimum(unclipped, clipped)  # eq. 13; exactly 0 outside S
    decisions = perturbed.sum().clamp(min=1)  # |S|
    loss = -objective.sum() / (decisions * K)  # eq. 14, with the 1/K of eq. 13

    return loss, {
        "rl_loss": loss.detach(),
        "ratio_mean": (ratio.detach() * in_S).sum() / (decisions * K),
        "clip_share": (clipped < unclipped).sum() / (decisions * K),
        "advantage_positive": (A > 0).sum() / decisions,
        "advantage_negative": (A < 0).sum() / decisions,
        "perturbed_share": perturbed.sum() / max(perturbed.numel(), 1),
    }


class Pass(NamedTuple):
    """What a caller's forward returns: of the original pass over B rows, or of the perturbed ones over m * B."""

    log_probs: torch.Tensor  # [.., T] of the token that position t predicts; read without gradient
    router_log_probs: torch.Tensor  # [.., T, L, E], the routers' full softmax; the RL loss's gradient enters here
    loss: torch.Tensor | None  # 0-d: L_o of the original pass; the LM loss of the perturbed ones, read by wpl alone


class Paths(NamedTuple):
    """m perturbed passes over B rows, and how they fared against the original one. Rows are m copies of the batch."""

    original: Pass
    perturbed: Pass  # for the first inner epoch, when nothing has been updated yet
    experts: torch.Tensor  # int64 [m * B, T, L, K], the random experts
    S: torch.Tensor  # bool [m * B, T, L], the decisions that use them: what erl_loss takes as `perturbed`
    advantages: torch.Tensor  # [m * B, T], of the token that position t predicts
    old_router_log_probs: torch.Tensor  # [m * B, T, L, K], log P of the random experts when they were drawn
    draw: str  # what drew the experts: "uniform" or "router"


def explore(
    forward,
    mask,
    top_k,
    *,
    alpha: float = 0.6,
    n_perturb: int = 3,
    draw: Literal["uniform", "router"] = "uniform",
    advantage: Literal["static", "log"] = "static",
    rounding_units: float = 8.0,
    dtype=torch.float32,
    generator=None,
):
    """Draw m perturbed passes, run them and score them against the original pass (eq. 6-11). -> Paths

    forward(routes)  the caller's model on the caller's batch. routes is None for the original pass over B rows, or
                     (experts int64 [m*B, T, L, K], S bool [m*B, T, L]) for m copies of them, one after the other:
                     where S is true the experts are used, elsewhere the router decides. Their weight is 1/K each
                     (eq. 9), or the router's P of them where that is the gate of the model's own routes.
                     The passes must differ in their routes alone: no dropout, the same jitter or none.
                     -> log_probs, router_log_probs, loss as in `Pass`. L_o is the LM, balance and z loss. The RL loss's
                     gradient goes through router_log_probs as far as the caller lets it.
    mask             bool [B, T], predictions that count: not padding, and of a task the answer alone
    top_k            K
    alpha            share of routing decisions that are replaced [table 7 and train.py's default: 0.6, on tasks 0.7]
    n_perturb        perturbed passes m per original one [table 7: 3]
    draw             of the random experts: uniform (eq. 7), or from the router's P on the original pass
    advantage        "static" is the sign of the gain (eq. 10-11), "log" the gain itself (eq. 18)
    rounding_units   gains up to that many units of rounding count as none (see `rounding`); deep models need more
    dtype            what the model computes in: how large rounding is
    generator        draws the routes, on the CPU

    Decision: only decisions at positions that predict a counting token are replaced. On a task the prompt stays as it
    is: the paper's tasks run on encoder-decoder models whose decoder alone is perturbed.
    draw="router" is what the first author's public code does by default. The ratio to the router then is the right one
    in the first MoE layer alone: a later router reads something else in a perturbed pass than in the original one.
    ValueError: n_perturb below 1, rounding_units below 0, unknown draw, draw="router" with K > 1, another shape or type
    of the mask or of what forward returns, and what random_routes and erl_advantage refuse.
    """
    if n_perturb < 1 or not rounding_units >= 0:
        raise ValueError(f"n_perturb must be at least 1, rounding_units at least 0, got {n_perturb}, {rounding_units}")
    if draw not in ("uniform", "router") or draw == "router" and top_k > 1:
        raise ValueError(f'draw must be "uniform" or, with top_k 1, "router"; got {draw!r} with top_k {top_k}')
    original = Pass(*forward(None))
    if original.router_log_probs.dim() != 4:
        raise ValueError(f"forward must return router_log_probs [B, T, L, E], got {original.router_log_probs.dim()}-d")
    original_log_probs, (B, T, L, E) = original.log_probs.detach(), original.router_log_probs.shape
    _check_shape("mask", mask, (B, T), torch.bool)
    experts, replaced = random_routes(n_perturb * B, T, L, E, top_k, alpha, generator=generator)  # eq. 6-9
    if draw == "router":
        P = original.router_log_probs.detach().exp().cpu().repeat(n_perturb, 1, 1, 1)  # [m * B, T, L, E]
        experts = torch.multinomial(P.flatten(0, 2), top_k, generator=generator).view(experts.shape)
    S = (replaced & mask.cpu().repeat(n_perturb, 1).unsqueeze(-1)).to(original_log_probs.device)  # [m * B, T, L]
    experts = experts.to(original_log_probs.device)
    perturbed = Pass(*forward((experts, S)))
    _check_shape("log_probs of forward(routes)", perturbed.log_probs, S.shape[:2])
    _check_shape("router_log_probs of forward(routes)", perturbed.router_log_probs, (*S.shape, E))
    before, after = original_log_probs.repeat(n_perturb, 1), perturbed.log_probs.detach()  # [m * B, T]
    equal = (after - before).abs() <= rounding(before, dtype, rounding_units)
    # All layers at position t answer for the token predicted there; where no decision is in S, A is never read.
    A = erl_advantage(torch.where(equal, before, after), before, advantage)  # eq. 10-11
    old_router_log_probs = perturbed.router_log_probs.detach().gather(-1, experts)
    return Paths(original, perturbed, experts, S, A, old_router_log_probs, draw)


def erl_objective(
    forward,
    paths,
    *,
    delta: float = 0.5,
    ratio: Literal["router", "uniform"] = "router",
    clip_eps: float | None = None,
    wpl: bool = False,
    inner_epochs: int = 1,
):
    """L = L_o + delta * L_p (eq. 15-17), an iterator of (loss, metrics): the caller updates after each of them.

    forward, paths  as `explore` took and gave them
    delta           weight of the perturbed loss L_p [table 7 and train.py's default: 0.5, on tasks 2]
    ratio           of P to the router's own P_old (eq. 12), or to the uniform policy that drew: E P, no clip
    clip_eps        range of the importance ratio around 1; default 0.2 [table 7: 0.2]
    wpl             add the LM loss of the perturbed passes to L_p (eq. 17)
    inner_epochs    optimizer steps on the same perturbed routes

    The first loss reuses the passes of `explore`, so its ratio to the router is exactly 1. Further ones run the same
    routes through the updated model, and the clip begins to act. Decision: they hold delta * L_RL alone; two inner
    epochs are not two epochs of the LM loss.
    ratio="uniform" is the ratio that belongs to a uniform draw (see erl_loss). It needs one, one inner epoch and no
    clip_eps. ValueError: anything else with it, delta below 0, inner_epochs below 1, wpl without that loss, and what
    erl_loss refuses.
    """
    if not delta >= 0 or inner_epochs < 1:
        raise ValueError(f"delta must be at least 0, inner_epochs at least 1, got {delta}, {inner_epochs}")
    if wpl and paths.perturbed.loss is None:
        raise ValueError("wpl needs the LM loss of the perturbed passes: forward returned None for it")
    if ratio not in ("router", "uniform"):
        raise ValueError(f'ratio must be "router" or "uniform", got {ratio!r}')
    old_router_log_probs, clip = paths.old_router_log_probs, 0.2 if clip_eps is None else clip_eps
    if ratio == "uniform":
        if paths.draw != "uniform" or clip_eps is not None or inner_epochs > 1:
            raise ValueError('ratio "uniform" goes with draw "uniform", no clip_eps and inner_epochs 1')
        E = paths.perturbed.router_log_probs.shape[-1]
        old_router_log_probs, clip = torch.full_like(old_router_log_probs, -math.log(E)), math.inf
    for epoch in range(inner_epochs):
        again = Pass(*forward((paths.experts, paths.S))) if epoch else paths.perturbed
        log_probs = again.router_log_probs.gather(-1, paths.experts)  # [m * B, T, L, K]
        loss, metrics = erl_loss(log_probs, old_router_log_probs, paths.advantages, paths.S, clip_eps=clip)
        if wpl:
            metrics["perturbed_lm_loss"] = again.loss.detach()
        L_p = loss + again.loss if wpl and epoch == 0 else loss  # eq. 17, eq. 15
        yield (paths.original.loss if epoch == 0 else 0) + delta * L_p, metrics  # eq. 16


def rounding(log_probs, dtype=torch.float32, units: float = 8.0):
    """The gap up to which two log-probabilities of a token, computed in `dtype`, count as equal; shape of log_probs.

    Two routes that compute the same in another order (experts that are copies of each other, as in a freshly upcycled
    model; batches of other sizes) differ by rounding, and a sign would make +1 and -1 of it. Decision: the bound is
    `units` units in the last place of the log-probability, or of 4 nats where it is nearer to 0, since it is a
    difference of logits, which are larger. Copies of one expert were up to 4.7 units apart in 4 blocks, and 36 in 30.
    """
    return units * torch.finfo(dtype).eps * log_probs.abs().clamp(min=4)


def _at_least_float32(x):
    """Lower precision is computed in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _check_shape(name, tensor, shape, dtype=None):
    if tuple(tensor.shape) != tuple(shape) or dtype not in (None, tensor.dtype):
        wanted = f"shape {list(shape)}" + f" and type {dtype}" * (dtype is not None)
        raise ValueError(f"{name} must have {wanted}, got {list(tensor.shape)}, {tensor.dtype}")
