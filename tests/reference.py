"""The losses by the book: NumPy, one loop over rows, tokens, layers and experts, written from the equations.

Slow on purpose. Arrays in, Python floats (or arrays) out, float64 throughout.
"""

import math

import numpy as np


def clipped(ratio, A, low, high):
    """min(r A, clip(r, 1 - low, 1 + high) A)"""
    return min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)


# ---------------------------------------------------------------------------------------------------------------- ERL


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
