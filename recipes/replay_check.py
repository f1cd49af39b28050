"""Do recorded routes belong where they are replayed? A function with two helpers, made to be pasted; torch alone.

For routes that another engine recorded (R3: the sampler's) and for the trainer's own of an earlier forward (R2). Run
the trainer's forward on a batch with the very weights that sampled it, with nothing imposed, and compare:

    assert not (wrong := check_replay(experts, log_probs, live_router_log_probs, live_log_probs, mask)), wrong

Shapes say nothing here: an offset of one, padding that has changed sides, the routes of another row or of an older
policy all have the right shape, and training goes on with them. A long, varied text says more than a short one.
"""

import torch


@torch.no_grad()
def check_replay(experts, log_probs, live_router_log_probs, live_log_probs, mask, *, enough=0.9, tolerance=0.1):
    """A sentence for each row and record that does not fit, and where it would; an empty list where everything does.

    experts                int64 [B, T, L, K]  recorded: by the engine that sampled (R3), by the trainer before (R2)
    log_probs              [B, T]              its log-probability of the token that position t predicts
    live_router_log_probs  [B, T, L, E]        the trainer's routers on the same weights and tokens, nothing imposed
    live_log_probs         [B, T]              the trainer's log-probability of the token that position t predicts
    mask                   bool [B, T]         positions that hold a token and have a recorded route
    enough                 share of recorded experts in the live top-K that counts as fitting: 1 for R2; engines that
                           round differently (R3) disagree about a few per cent (by chance it is about K / E)
    tolerance              mean difference of log-probabilities, in nats, that counts as equal
    """
    live, found = live_router_log_probs.topk(experts.shape[3]).indices, []  # [B, T, L, K]
    for row in range(len(mask)):
        at = mask[row].nonzero()[:, 0]  # positions that count
        if not len(at):
            continue
        lead, trail = int(at[0]), mask.shape[1] - 1 - int(at[-1])  # padding before and behind
        places = {s: f"moved by {s:+d}" for s in (-2, -1, 1, 2)}
        places |= {s: f"with another padding {s:+d}" for s in (-lead, trail) if s}
        for name, record, model, fits, bound in (
            ("experts", experts, live, agreement, enough),
            ("log_probs", log_probs, live_log_probs, nearness, -tolerance),
        ):
            here = fits(model[row, at], record[row, at])
            if here >= bound:
                continue
            shares = {}  # how well the record fits if it lies elsewhere
            for shift, how in places.items():
                inside = at[(at + shift >= 0) & (at + shift < len(record[row]))]
                if 2 * len(inside) >= len(at):
                    shares[how] = fits(model[row, inside], record[row, inside + shift])
            others = (i for i in range(len(mask)) if i != row)
            shares |= {f"those of row {i}": fits(model[row, at], record[i, at]) for i in others}
            best = max(shares, key=shares.get, default=None)
            # a hypothesis has to explain half of what is missing
            fitting = best is not None and shares[best] >= ((1 + here) / 2 if name == "experts" else bound)
            why = best if fitting else "of other weights, another dtype, or a wrong layer, expert or token"
            found.append(f"row {row}: {name} are {why}")
    return found


def agreement(live, recorded) -> float:
    """Share of the recorded experts [n, L, K] that are among the live ones."""
    return (recorded[..., :, None] == live[..., None, :]).any(-1).float().mean().item()


def nearness(live, recorded) -> float:
    """Mean |difference| of log-probabilities [n], negative: 0 is equal. NaN, as padding may hold, is infinitely far."""
    return -(recorded - live).abs().float().nan_to_num(nan=torch.inf, posinf=torch.inf).mean().item()
