"""Do recorded routes belong where they are replayed? A test to copy into a framework; needs torch alone.

For routes that another engine recorded (R3: the sampler's) and for the trainer's own of an earlier forward (R2, which
with these weights must agree exactly). Run the trainer's forward on a batch with the very weights that sampled it, with
nothing imposed, and compare:

    findings = check_replay(experts, log_probs, live_router_log_probs, live_log_probs, mask)
    assert not findings, "\\n".join(map(str, findings))

Shapes say nothing here: an offset of one, padding that was on the right when routes were recorded and is on the left
when they are replayed, the routes of another row, or those of an older policy all have the right shape, and training
goes on with them. Run it once at step 0 and in a test; a long, varied text says more than a short one.
B rows, T positions, L MoE layers, E experts, K active ones a token.
"""

from typing import NamedTuple

import torch


class Finding(NamedTuple):
    kind: str  # "offset", "left padding", "other row", "not in the top-K" (routes); "log-prob offset", "log-probs"
    rows: list  # of the batch
    detail: str

    def __str__(self):
        return f"{self.kind}, rows {', '.join(map(str, self.rows))}: {self.detail}"


@torch.no_grad()
def check_replay(
    experts, log_probs, live_router_log_probs, live_log_probs, mask, *, enough=0.9, tolerance=0.1
) -> list[Finding]:
    """An empty list where everything fits, else what is wrong with which rows.

    experts                int64 [B, T, L, K]  recorded: by the engine that sampled (R3), by the trainer before (R2)
    log_probs              [B, T]              its log-probability of the token that position t predicts
    live_router_log_probs  [B, T, L, E]        the trainer's routers on the same weights and tokens, nothing imposed
    live_log_probs         [B, T]              the trainer's log-probability of the token that position t predicts
    mask                   bool [B, T]         positions that hold a token and have a recorded route
    enough                 share of recorded experts in the live top-K that counts as fitting: 1 for R2; engines that
                           round differently (R3) disagree about a few per cent (by chance it is about K / E)
    tolerance              mean difference of log-probabilities, in nats, that counts as equal
    """
    B, T, L, K = experts.shape
    live = live_router_log_probs.topk(K).indices  # [B, T, L, K]
    found = {}  # (kind, detail) -> rows

    def note(row, kind, detail):
        found.setdefault((kind, detail), []).append(row)

    for row in range(B):
        at = mask[row].nonzero().squeeze(-1)  # positions that count
        if not len(at):
            continue
        lead, trail = int(at[0]), T - 1 - int(at[-1])  # padding before and behind
        here = agreement(experts[row], live[row], at, 0)
        if here < enough:
            kind, detail = explain(experts, live, row, at, here, lead, trail)
            note(row, kind, detail)
        gap = difference(log_probs[row], live_log_probs[row], at, 0)
        if not gap <= tolerance:  # NaN is a finding too
            moved = {s: difference(log_probs[row], live_log_probs[row], at, s) for s in shifts(lead, trail)}
            best = min(moved, key=moved.get)
            if moved[best] <= tolerance:
                note(row, "log-prob offset", why_moved(best, lead, trail))
            else:
                note(row, "log-probs", "they differ by more than the tolerance: other weights, temperature or tokens?")
    return [Finding(kind, rows, detail) for (kind, detail), rows in found.items()]


def shifts(lead, trail):
    return sorted({-2, -1, 1, 2, -lead, trail} - {0}, key=abs)


def agreement(recorded, live, at, shift) -> float:
    """Share of the experts recorded[t + shift] that are in the top-K of live[t], at the positions `at`. [T, L, K] each;
    0 where fewer than half of them have a counterpart."""
    there = at + shift
    inside = (there >= 0) & (there < len(recorded))
    if 2 * int(inside.sum()) < len(at):
        return 0.0
    theirs, mine = recorded[there[inside]], live[at[inside]]
    return (theirs[..., :, None] == mine[..., None, :]).any(-1).float().mean().item()


def difference(recorded, live, at, shift) -> float:
    """Mean |recorded[t + shift] - live[t]| in nats; infinite where fewer than half of them have a counterpart."""
    there = at + shift
    inside = (there >= 0) & (there < len(recorded))
    if 2 * int(inside.sum()) < len(at):
        return float("inf")
    return (recorded[there[inside]] - live[at[inside]]).abs().float().mean().item()


def explain(experts, live, row, at, here, lead, trail) -> tuple[str, str]:
    """Why the routes of a row do not fit: the hypothesis under which they fit best, if they fit under any."""
    moved = {s: agreement(experts[row], live[row], at, s) for s in shifts(lead, trail)}
    best = max(moved, key=moved.get)
    rows = {other: agreement(experts[other], live[row], at, 0) for other in range(len(experts)) if other != row}
    other = max(rows, key=rows.get, default=None)
    middle = (1 + here) / 2  # a hypothesis must explain half of what is missing
    if moved[best] >= max(middle, rows.get(other, 0)):
        return "left padding" if best in (-lead, trail) else "offset", why_moved(best, lead, trail)
    if other is not None and rows[other] >= middle:
        return "other row", "they are those of another row of the batch"
    return "not in the top-K", "live routers choose others: an older policy, another dtype, or a wrong layer or expert"


def why_moved(shift, lead, trail) -> str:
    """A row with a single padded place could be moved by an offset of one as well: the other rows tell."""
    if shift in (-lead, trail):
        return "recorded with another padding than replayed: each row is moved by its own padding"
    return f"entry t {'+' if shift > 0 else '-'} {abs(shift)} belongs to position t"
