"""support/routing_report.py against the same figures counted token by token."""

import math

import numpy as np
import pytest
import torch

from support.routing_report import expert_load, ratio_report, routing_report

B, T, L, E, K = 3, 5, 2, 6, 2


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, B, T, L, E, generator=g) * 3
    mask = torch.rand(B, T, generator=g) > 0.3
    mask[0, :2] = mask[1, 3:] = False  # on both sides
    return new, new + 0.4 * torch.rand(B, T, 1, 1, generator=g) * old, mask


def by_hand(new, old, mask, floor=0.8):
    """Every figure with loops over tokens."""
    P, P_old = new.softmax(-1), old.softmax(-1)
    tokens = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]
    count, kept = [[0] * E for _ in range(L)], [0] * L
    entropy, sharp, moved, gammas = [[] for _ in range(L)], 0, 0, []
    for b, t in tokens:
        shift, anywhere = [], False
        for layer in range(L):
            p, o = P[b, t, layer].tolist(), P_old[b, t, layer].tolist()
            mine, theirs = (sorted(range(E), key=lambda i, x=x: -x[i])[:K] for x in (p, o))
            for i in mine:
                count[layer][i] += 1
            entropy[layer].append(-sum(x * math.log(x) for x in p))
            sharp += max(p) > 0.9
            kept[layer] += len(set(mine) & set(theirs)) / K
            anywhere |= set(mine) != set(theirs)
            shift += [abs(math.log(p[i]) - math.log(o[i])) for i in theirs]
        moved += anywhere
        gammas.append(math.exp(-sum(shift) / len(shift)))
    n = len(tokens)
    load = [[c / (n * K) for c in row] for row in count]
    report = {
        "router_entropy_by_layer": [sum(x) / n for x in entropy],
        "top1_above_0.9": sharp / (n * L),
        "load_min": min(map(min, load)),
        "load_max": max(map(max, load)),
        "max_vio_by_layer": [max(row) * E - 1 for row in load],
        "dead_experts": sum(c == 0 for row in count for c in row),
        "agreement_by_layer": [x / n for x in kept],
        "moved_anywhere": moved / n,
        "gamma_mean": sum(max(x, floor) for x in gammas) / n,
        "gamma_min": max(min(gammas), floor),
        "floor_share": sum(x < floor for x in gammas) / n,
    }
    return report | {name: sum(report[name + "_by_layer"]) / L for name in ("router_entropy", "max_vio", "agreement")}


@pytest.mark.parametrize("seed", range(3))
def test_against_loops(seed):
    new, old, mask = tensors(seed)
    expected = by_hand(new, old, mask)
    assert 0 < expected["moved_anywhere"] and 0 < expected["floor_share"] < 1
    report = routing_report(new, old, mask, top_k=K)
    assert set(report) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(report[name], torch.tensor(value, dtype=torch.float32), rtol=1e-5, atol=1e-6)
    of_log_probs = routing_report(new.log_softmax(-1), old.log_softmax(-1), mask, top_k=K)
    for name, value in report.items():
        torch.testing.assert_close(of_log_probs[name], value)


def test_a_ratio_by_the_book():
    """Over the tokens that count alone."""
    mask = tensors()[2]
    now, then = -torch.rand(2, B, T, generator=torch.Generator().manual_seed(1))
    gaps = [(now[b, t] - then[b, t]).item() for b in range(B) for t in range(T) if mask[b, t]]
    now[~mask] = math.nan
    report = ratio_report("engine", now, then, mask)
    assert report["engine_gap"].item() == pytest.approx(sum(map(abs, gaps)) / len(gaps), rel=1e-5)
    assert report["engine_kl"].item() == pytest.approx(sum(math.exp(x) - 1 - x for x in gaps) / len(gaps), rel=1e-4)
    for q in (1, 50, 99):
        expected = np.quantile(np.exp(gaps), q / 100)
        assert report[f"engine_ratio_p{q:02}"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_every_integer_type_and_anything_in_padding(kind):
    new, old, mask = tensors()
    old_experts, experts = old.topk(K).indices, new.topk(K).indices
    kept = old.log_softmax(-1).gather(-1, old_experts)
    clean = routing_report(new, old, mask, top_k=K)
    experts, old_experts = (x.to(kind) for x in (experts, old_experts))
    load = expert_load(experts, E, mask)
    for x, wild in ((new, math.nan), (kept, -math.inf), (experts, 255), (old_experts, 100)):
        x[~mask] = wild
    for name, value in routing_report(new, kept, mask, experts=experts, old_experts=old_experts).items():
        torch.testing.assert_close(value, clean[name])
    torch.testing.assert_close(expert_load(experts, E, mask), load)
    assert (load.amax(-1) * E - 1).tolist() == pytest.approx(clean["max_vio_by_layer"].tolist())


def test_nothing_that_counts():
    new, old, mask = tensors()
    report = routing_report(new, old, mask & False, top_k=K) | ratio_report(
        "engine", *mask.float().expand(2, B, T), mask & False
    )
    for name, value in report.items():
        assert (value == (1 if name == "gamma_min" or "ratio" in name else 0)).all(), name


def test_no_gradient_any_dtype_and_a_probability_of_zero():
    new, old, mask = tensors()
    report = routing_report(new.bfloat16().requires_grad_(), old.bfloat16(), mask, top_k=K)
    assert all(v.isfinite().all() and not v.requires_grad and v.dtype == torch.float32 for v in report.values())
    certain = torch.full((1, 1, 1, 4), -math.inf)
    certain[..., 2] = 0
    report = routing_report(certain, experts=torch.zeros(1, 1, 1, 1))  # imposed experts count as used
    assert report["router_entropy"] == 0 and report["top1_above_0.9"] == report["load_max"] == 1
    assert report["max_vio"] == report["dead_experts"] == 3
