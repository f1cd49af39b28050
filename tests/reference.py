"""The losses by the book: NumPy, one loop over rows, tokens, layers and experts, written from the equations.

Slow on purpose. Arrays in, Python floats (or arrays) out, float64 throughout.
"""

import math

import numpy as np


def clipped(ratio, A, low, high):
    """min(r A, clip(r, 1 - low, 1 + high) A)"""
    return min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)


def erl_advantage(perturbed_log_probs, original_log_probs, kind="static"):
    out = np.zeros(perturbed_log_probs.shape)
    for index in np.ndindex(*out.shape):
        p, o = perturbed_log_probs[index], original_log_probs[index]
        out[index] = p - o if kind == "log" else (1 if p > o else -1 if p < o else 0)  # eq. 10, 11, 18
    return out


def erl_loss(new, old, advantages, perturbed, clip_eps=0.2):
    B, T, L, K = new.shape
    losses = []
    for b in range(B):
        for t in range(T):
            for layer in range(L):
                if not perturbed[b, t, layer]:
                    continue
                f = 0.0
                for k in range(K):
                    ratio = math.exp(new[b, t, layer, k] - old[b, t, layer, k])  # eq. 12
                    f -= clipped(ratio, advantages[b, t], clip_eps, clip_eps) / K  # eq. 13
                losses.append(f)
    return sum(losses) / len(losses) if losses else 0.0  # eq. 14


def group_advantages(rewards, group_size):
    out = []
    for start in range(0, len(rewards), group_size):
        group = [float(r) for r in rewards[start : start + group_size]]
        mean = sum(group) / group_size
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (group_size - 1))
        equal = all(r == group[0] for r in group)
        out += [0.0 if equal else (r - mean) / (std + 1e-6) for r in group]  # ERPO eq. 2
    return np.array(out)


def policy_loss(base, new, old, advantages, mask, low, high, log_gamma=None, weights=None, max_ratio=20.0):
    """-J of a loss of baselines.py; with log_gamma [B, T] RAIS over it. low and high are tau_negative and tau_positive
    in SAPO."""
    B, T = new.shape
    total = 0.0
    for b in range(B):
        A, tokens = advantages[b], [t for t in range(T) if mask[b, t]]
        if not tokens:
            continue  # adds 0, still counts in B
        n = len(tokens)
        w = [new[b, t] - old[b, t] + (0 if log_gamma is None else log_gamma[b, t]) for t in tokens]
        v = [1.0 if weights is None else weights[b, t] for t in tokens]
        J = 0.0
        if base == "gspo":
            J = clipped(math.exp(sum(w) / n), A, low, high) * sum(v) / n  # eq. 3-4
        elif base == "gmpo":
            J = math.exp(sum(min(x, high) if A > 0 else max(x, -low) for x in w) / n) * A * math.prod(v) ** (1 / n)
        for t, x, weight in zip(tokens, w, v, strict=True):
            r = math.exp(x)
            if base == "grpo":
                J += weight * clipped(r, A, low, high) / n  # eq. 1-2
            elif base == "cispo":  # eq. 4-5 of CISPO
                J += weight * min(max(r, 1 - low), 1 + high) * A * new[b, t] / n
            elif base == "sapo":
                tau = high if A > 0 else low
                J += weight * 4 / tau / (1 + math.exp(-tau * (r - 1))) * A / n
            elif base == "dppo":
                moved = math.exp(new[b, t]) - math.exp(old[b, t])
                if moved <= high if A > 0 else moved >= -low:
                    J += weight * min(r, max_ratio) * A * new[b, t] / n
        total -= J
    return total / B


def mismatch_weights(old, rollout, mask, kind, low, high):
    """TIS, IcePop or the sequence mask: from low to high."""
    out = np.zeros(old.shape)
    for b, t in np.ndindex(*old.shape):
        if not mask[b, t]:
            continue
        w = math.exp(old[b, t] - rollout[b, t])
        if kind == "sequence-mask":
            w = math.prod(math.exp(old[b, s] - rollout[b, s]) for s in range(old.shape[1]) if mask[b, s])
        out[b, t] = min(w, high) if kind == "tis" else w if low <= w <= high else 0.0
    return out


def router_shift(new, old, floor=0.8, layers="mean"):
    B, T, L, K = new.shape
    gamma = np.zeros((B, T))
    for b in range(B):
        for t in range(T):
            shift = 0.0
            for layer in range(L):
                shift += sum(abs(new[b, t, layer, k] - old[b, t, layer, k]) for k in range(K)) / K
            gamma[b, t] = max(math.exp(-shift / max(L, 1) if layers == "mean" else -shift), floor)
    return gamma


def erpo(new, old, rewards, mask, experts, old_experts, probs, old_probs, E, G, alpha, low, high, kind, weights=None):
    """(loss, d loss / d new [B, T] by eq. 12 with the clip, counts) from clusters kept as lists of positions."""
    B, T, L, K = experts.shape
    alpha = 0.0 if kind == "none" else alpha
    pairs = [(layer, j) for layer in range(L) for j in range(E)]

    def cluster(assignment, b, layer, j):
        """The (t, k) at which row b uses expert j of a layer: X_j^i."""
        return [(t, k) for t in range(T) if mask[b, t] for k in range(K) if assignment[b, t, layer, k] == j]

    X, e, dropped = {}, {}, 0
    for b in range(B):
        for layer, j in pairs:
            now, before = cluster(experts, b, layer, j), cluster(old_experts, b, layer, j)
            dropped += bool(now) != bool(before)
            if not now or not before:
                continue
            mean_new = sum(new[b, t] for t, _ in now) / len(now)  # eq. 6
            mean_old = sum(old[b, t] for t, _ in before) / len(before)
            X[b, layer, j], e[b, layer, j] = now, math.exp(mean_new - mean_old)  # eq. 7

    def entropy(assignment, P, b, layer, j):
        terms = [-P[b, t, layer, k] * math.log(P[b, t, layer, k]) for t, k in cluster(assignment, b, layer, j)]
        return sum(terms) / len(terms)  # eq. 8

    R, R_ent, now_H = {}, {}, {}
    for b, layer, j in e:
        group = [rewards[i] for i in range(B) if i // G == b // G]
        deviation = rewards[b] - sum(group) / len(group)
        sigma = 0 if abs(deviation) < 1e-9 else -1 if deviation > 0 else 1  # eq. 9
        H, H_old = entropy(experts, probs, b, layer, j), entropy(old_experts, old_probs, b, layer, j)
        now_H[b, layer, j] = H
        R_ent[b, layer, j] = sigma * (H if kind == "absolute" else H - H_old)  # eq. 9
        R[b, layer, j] = (1 - alpha) * rewards[b] + alpha * R_ent[b, layer, j]  # eq. 10

    loss, gradient, acts = 0.0, np.zeros((B, T)), 0
    for b in range(B):
        active = [pair for pair in pairs if (b, *pair) in e]  # E^i
        for pair in active:
            rows = [i for i in range(B) if i // G == b // G and (i, *pair) in e]
            values = [R[(i, *pair)] for i in rows]
            A = 0.0
            if len(rows) > 1 and max(values) > min(values):
                mean = sum(values) / len(values)
                std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
                A = (R[(b, *pair)] - mean) / (std + 1e-6)
            ratio, tokens = e[(b, *pair)], [t for t, _ in X[(b, *pair)]]
            W = 1.0 if weights is None else sum(weights[b, t] for t in tokens) / len(tokens)
            loss -= W * clipped(ratio, A, low, high) / len(active) / B  # eq. 11
            acts += clipped(ratio, A, low, high) < ratio * A
            if clipped(ratio, A, low, high) == ratio * A:
                for t in tokens:
                    gradient[b, t] -= W * ratio * A / len(tokens) / len(active) / B  # eq. 12
    counts = {"clusters": len(e), "dropped_clusters": dropped, "clip_share": acts / max(len(e), 1)}
    return loss, gradient, counts | {"e": e, "H": now_H, "R_ent": R_ent}
