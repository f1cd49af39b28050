"""Tests of eval_routing.py: ranks and ties by enumeration, scores by plain forwards, models whose rank is known by
construction, the figures of the report, expert consistency by loops, and the command from its checkpoint to its files.
"""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

import data
import eval_routing
import train
from moe import GPT, MoEConfig, Routes, upcycle
from support import pictures
from support.checkpoints import save_model
from support.consistency import expert_consistency
from support.errors import UserError
from support.generation import generate
from support.verdict import describe, doubts

SMALL = dict(vocab_size=257, context=24, n_layer=2, n_head=2, n_embd=16, moe_every=1)
PICTURES = ("ranks", "robustness", "top1", "load", "tokens")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_model(seed=0, **sizes):
    """A model whose experts differ and whose routers are sure of themselves."""
    model = GPT(MoEConfig(**{**SMALL, "n_expert": 4, **sizes}), seeded(seed))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(seed + 1)), alpha=0.15)
    return model


def random_window(length=24, seed=5):
    return torch.randint(257, (length + 1,), generator=seeded(seed)), torch.ones(length, dtype=torch.bool)


def settled_model(chosen, writes):
    """One layer whose router always takes expert `chosen`; expert e makes the model write the token writes[e].

    The last norm sees little but the expert's bias, which points to the token's embedding; nothing depends on position.
    """
    model = GPT(MoEConfig(**{**SMALL, "n_layer": 1, "n_embd": 64}, n_expert=len(writes)), seeded(0))
    block = model.blocks[0]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.wte.weight.copy_(torch.randn(257, 64, generator=seeded(1)))
        model.ln_f.weight.fill_(1)
        block.ln_2.bias[0] = 1  # what the router sees, everywhere
        block.mlp.router.weight[chosen, 0] = 3
        block.mlp.experts.b_out.copy_(100 * model.wte.weight[torch.tensor(writes)])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


def ranks_with_ties_broken(values):
    """The original's rank (index 0) under every possible order in which equal routes may be listed."""
    ranks = []
    for order in itertools.permutations(range(len(values))):
        listed = sorted(range(len(values)), key=lambda route: (-values[route], order[route]))
        ranks.append(1 + listed.index(0))
    return ranks


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_ties_count_as_their_expectation(values):
    (better,), (tied,) = eval_routing.rank(torch.tensor([values], dtype=torch.float64))
    ranks = ranks_with_ties_broken(values)
    expected = sum(1 / r for r in ranks) / len(ranks)
    assert eval_routing.reciprocal_rank(int(better), int(tied)) == pytest.approx(expected, abs=1e-12)
    assert eval_routing.hit_at_1(int(better), int(tied)) == pytest.approx(ranks.count(1) / len(ranks), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5))
def test_rank_counts_better_and_equal_routes(place, rows):
    values = torch.rand(rows, 100, generator=seeded(place), dtype=torch.float64).round(decimals=1)
    better, tied = eval_routing.rank(values)
    for row in range(rows):
        original, others = values[row, 0], values[row, 1:]
        assert better[row] == sum(1 for v in others if v > original)
        assert tied[row] == sum(1 for v in others if v == original)


def test_equal_scores_are_at_chance_and_rounding_does_not_decide():
    better, tied = eval_routing.rank(torch.full((3, 100), -2.0, dtype=torch.float64))
    assert better.tolist() == [0] * 3 and tied.tolist() == [99] * 3
    harmonic = sum(1 / r for r in range(1, 101))
    assert eval_routing.reciprocal_rank(0, 99) == eval_routing.CHANCE_MRR == pytest.approx(harmonic / 100, abs=1e-15)
    assert eval_routing.hit_at_1(0, 99) == eval_routing.CHANCE_HIT1 == 0.01
    assert round(eval_routing.CHANCE_MRR, 4) == 0.0519
    noisy = -2 + 1e-7 * torch.rand(3, 100, generator=seeded(0), dtype=torch.float64)
    assert eval_routing.rank(noisy)[1].tolist() == [99] * 3
    clear = torch.tensor([[-2.0, -2.0 + 1e-5, -2.0 - 1e-5, -2.0]], dtype=torch.float64)
    assert [t.item() for t in eval_routing.rank(clear)] == [1, 1]


def test_random_order_has_the_chance_level():
    values = torch.rand(4000, 100, generator=seeded(3), dtype=torch.float64)
    pairs = list(zip(*(t.tolist() for t in eval_routing.rank(values, tolerance=0)), strict=True))
    mean, error = eval_routing.mean_and_error([eval_routing.reciprocal_rank(*pair) for pair in pairs])
    assert abs(mean - eval_routing.CHANCE_MRR) < 4 * error < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Scores of one sample
# ---------------------------------------------------------------------------------------------------------------------


def test_routes_are_the_original_33_at_each_alpha_and_full_ones():
    alphas = eval_routing.route_alphas().tolist()
    assert alphas[:100] == [0.0] + [0.25] * 33 + [0.5] * 33 + [0.75] * 33 and set(alphas[100:]) == {1.0}
    model = random_model(n_expert=8)
    routes = eval_routing.draw_routes(model, 200, 0, "routes", 7)
    share = routes.forced.double().mean((1, 2))
    assert share[0] == 0 and (share[100:] == 1).all()
    for alpha, first in ((0.25, 1), (0.5, 34), (0.75, 67)):
        assert abs(share[first : first + 33].mean() - alpha) < 0.02
    again = eval_routing.draw_routes(model, 200, 0, "routes", 7)
    other = eval_routing.draw_routes(model, 200, 0, "routes", 8)
    assert torch.equal(routes.experts, again.experts) and not torch.equal(routes.experts, other.experts)


@pytest.mark.parametrize("sizes", [{}, {"top_k": 2, "gate": "prob"}, {"moe_every": 2, "expert_capacity": 5}])
def test_text_scores_are_those_of_plain_forwards(sizes):
    model, (tokens, mask) = random_model(**sizes), random_window()
    mask[20:] = False  # the end of a text that is shorter than the context
    routes = eval_routing.draw_routes(model, 24, 0, "routes", 0)
    scored = eval_routing.score_text(model, (tokens, mask), routes)
    for r in (0, 1, 40, 80, 101):
        one = None if r == 0 else Routes(routes.experts[r : r + 1], routes.forced[r : r + 1])
        log_probs = model(tokens[None, :-1], routes=one).logits.detach().double().log_softmax(-1)[0]
        expected = sum(log_probs[t, tokens[t + 1]] for t in range(20)) / 20
        assert scored.values[r].item() == pytest.approx(expected.item(), abs=1e-5)
    assert scored.values.std() > 1e-3  # the routes do differ
    routing = model(tokens[None, :-1]).routing
    assert torch.equal(scored.experts, routing.experts[0, :20]) and scored.weight == 20
    torch.testing.assert_close(scored.router_log_probs, routing.logits[0, :20].log_softmax(-1).detach())
    assert torch.equal(scored.tokens, tokens[:20])
    for batch_size in (1, 7, 108):
        other = eval_routing.score_text(model, (tokens, mask), routes, batch_size)
        torch.testing.assert_close(other.values, scored.values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_freshly_upcycled_model_is_indifferent(top_k):
    dense = random_model(n_expert=1)
    model = upcycle(dense, MoEConfig(**SMALL, n_expert=8, top_k=top_k), seeded(2))
    scored = [
        eval_routing.score_text(model, random_window(seed=s), eval_routing.draw_routes(model, 24, s)) for s in range(3)
    ]
    result = eval_routing.figures(scored, text=True)
    assert result["tied_routes"] == [99] * 3 and result["better_routes"] == [0] * 3
    assert result["mrr"] == pytest.approx(eval_routing.CHANCE_MRR) and result["hit1"] == pytest.approx(0.01)
    assert result["perturbed_score"] == pytest.approx(result["original_score"], rel=1e-5)


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_router_that_is_right_or_wrong_by_construction(chosen):
    """The text is all "a", which only expert 0 writes: every use of the other expert costs, every use of it pays."""
    model = settled_model(chosen, writes=[97, 98])
    window, routes = (torch.full((25,), 97), torch.ones(24, dtype=torch.bool)), eval_routing.draw_routes(model, 24, 0)
    scored = eval_routing.score_text(model, window, routes)
    result = eval_routing.figures([scored], text=True)
    moved = sum(bool((routes.forced[r] & (routes.experts[r, ..., 0] != chosen)).any()) for r in range(1, 100))
    assert moved > 80
    better = moved if chosen == 1 else 0
    assert (result["better_routes"], result["tied_routes"]) == ([better], [99 - moved])
    assert result["mrr"] > 0.4 if chosen == 0 else result["mrr"] < 0.013
    assert (result["original_score"] < result["perturbed_score"]) == (chosen == 0)
    scores = list(result["robustness"].values())  # the more that is random, the worse (or better)
    assert scores == sorted(scores, reverse=chosen == 1)
    assert result["expert_load"] == [[float(j == chosen) for j in range(2)]]
    assert result["top1_above_0.9"] == 1  # e^3 / (e^3 + 1) = 0.953


def test_task_scores_follow_the_routes_of_prompt_end_and_answer():
    """Expert 0 writes "1", expert 1 "2": the answer says which expert worked at each position that writes."""
    model = settled_model(0, writes=[ord("1"), ord("2")])
    tokenizer, prompt = data.load_tokenizer("bytes"), [ord(c) for c in "9+9="]
    samples = eval_routing.Samples(data.get_dataset("addition"), tokenizer, [], 3)
    example = data.Example("9+9=", "111", ("111", "211"))
    routes = eval_routing.draw_routes(model, len(prompt) + 3, 4, first=len(prompt) - 1)
    scored = eval_routing.score_task(model, example, prompt, routes, samples)
    for r in range(len(routes.forced)):
        worked = [int(routes.experts[r, t, 0, 0]) if routes.forced[r, t, 0] else 0 for t in range(7)]
        answer = "".join("12"[worked[t]] for t in (3, 4, 5))  # the last prompt token writes the first one
        assert scored.values[r] == float(answer in ("111", "211"))
    assert scored.values[0] == 1 and 0 < scored.values[1:].mean() < 1
    assert scored.experts.tolist() == [[[0]]] * 6  # the last token written is never read
    assert scored.tokens.tolist() == [*prompt, ord("1"), ord("1")]
    assert scored.router_log_probs.shape == (6, 1, 2)
    for batch_size in (1, 50):
        other = eval_routing.score_task(model, example, prompt, routes, samples, batch_size)
        assert torch.equal(other.values, scored.values)
    ends = settled_model(0, writes=[tokenizer.end, ord("2")])  # the original writes nothing but the end token
    scored = eval_routing.score_task(ends, example, prompt, routes, samples)
    assert scored.experts.shape == (4, 1, 1) and scored.router_log_probs.shape == (4, 1, 2)  # others write more
    assert scored.tokens.tolist() == prompt


def test_perturbed_routes_and_the_prompt_do_not_meet(runs, tmp_path, monkeypatch):
    """Where the command scores a task, no decision at a position is replaced that predicts a token of the prompt."""
    score, seen = eval_routing.score_task, []

    def spy(model, example, prompt, routes, *more):
        seen.append((len(prompt), routes.forced))
        rows = [prompt] * len(routes.forced)
        rollout = generate(model, rows, max_new_tokens=4, end_token=256, temperature=0, routes=routes)
        before = rollout.experts[:, : len(prompt) - 1]
        assert (before == before[:1]).all()  # nothing that comes before the answer differs between the routes
        assert not (rollout.experts[:, len(prompt) - 1] == rollout.experts[:1, len(prompt) - 1]).all()
        return score(model, example, prompt, routes, *more)

    monkeypatch.setattr(eval_routing, "score_task", spy)
    evaluate("task", "--samples", "3", "--out", tmp_path)
    assert len(seen) == 3
    for P, forced in seen:
        assert not forced[:, : P - 1].any()  # position P - 1 predicts the first token of the answer
        share = forced[:, P - 1 :].double().mean((1, 2))
        assert share[0] == 0 and (share[100:] == 1).all()
        for alpha, first in ((0.25, 1), (0.5, 34), (0.75, 67)):
            assert abs(share[first : first + 33].mean() - alpha) < 0.12
    whole = eval_routing.draw_routes(random_model(), 24, 0)
    assert whole.forced[100:].all()  # a text has no prompt


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def made_up(value, weight, seed, n_expert=4, top_k=2, layers=2):
    """A sample of `weight` tokens with routers of their own, their experts the likeliest ones."""
    log_probs = (3 * torch.randn(weight, layers, n_expert, generator=seeded(seed))).log_softmax(-1)
    experts = log_probs.topk(top_k).indices
    return eval_routing.Scored(value, weight, torch.zeros(weight, dtype=torch.long), experts, log_probs)


def test_figures_by_the_book():
    alphas, S = eval_routing.route_alphas().tolist(), 5
    values = -3 + torch.rand(S, len(alphas), generator=seeded(0), dtype=torch.float64)
    weights = [24, 24, 24, 24, 7]
    scored = [made_up(values[s], weights[s], s) for s in range(S)]
    result = eval_routing.figures(scored, text=True)

    def perplexity(columns):
        total = sum(weights[s] * sum(-values[s, r].item() for r in columns) / len(columns) for s in range(S))
        return math.exp(total / sum(weights))

    assert result["original_score"] == pytest.approx(perplexity([0]))
    assert result["perturbed_score"] == pytest.approx(perplexity(range(1, 100)))
    assert list(result["robustness"]) == ["0", "0.25", "0.5", "0.75", "1"]
    for alpha, score in result["robustness"].items():
        assert score == pytest.approx(perplexity([r for r, a in enumerate(alphas) if a == float(alpha)]))
    assert result["robustness"]["0"] == result["original_score"]
    assert result["original_scores"] == pytest.approx([math.exp(-v) for v in values[:, 0].tolist()])
    best = [max(values[s, r].item() for r in range(1, 100)) for s in range(S)]
    expected = math.exp(-sum(w * b for w, b in zip(weights, best, strict=True)) / sum(weights))
    assert result["best_of_99_score"] == pytest.approx(expected) and expected < result["perturbed_score"]

    ranks = [1 + sum(values[s, r].item() > values[s, 0].item() for r in range(1, 100)) for s in range(S)]
    assert result["mrr"] == pytest.approx(sum(1 / r for r in ranks) / S)
    assert result["hit1"] == pytest.approx(sum(r == 1 for r in ranks) / S)


def test_the_pictures_title_and_its_points_are_one_score():
    """The whole is the mean of its samples, in the arithmetic that the score is defined in."""
    values = -3 + torch.rand(4, 108, generator=seeded(1), dtype=torch.float64)
    weights = [24, 24, 9, 1]
    scored = [made_up(values[s], weights[s], s) for s in range(4)]
    for text in (True, False):
        result = eval_routing.figures(scored, text=text)
        for name in ("original", "perturbed"):
            points = result[f"{name}_scores"]
            if text:
                points = [math.log(p) for p in points]
            mean = sum(w * p for w, p in zip(weights, points, strict=True)) / sum(weights)
            assert result[f"{name}_score"] == pytest.approx(math.exp(mean) if text else mean, rel=1e-12)


def test_the_routers_figures_by_loops():
    weights = [24, 24, 7]
    scored = [made_up(torch.zeros(108, dtype=torch.float64), weights[s], s) for s in range(3)]
    result = eval_routing.figures(scored, text=True)
    load, bins, above, count, entropy = [[0] * 4 for _ in range(2)], [0] * 20, 0, 0, [0.0, 0.0]
    for s in scored:
        for t, layer in itertools.product(range(s.weight), range(2)):
            p = s.router_log_probs[t, layer].exp().tolist()
            bins[min(int(max(p) * 20), 19)] += 1
            above, count = above + (max(p) > 0.9), count + 1
            entropy[layer] -= sum(x * math.log(x) for x in p) / sum(weights)
            for k in range(2):
                load[layer][s.experts[t, layer, k]] += 1
    load = [[n / sum(row) for n in row] for row in load]
    assert result["top1_histogram"] == pytest.approx([b / count for b in bins])
    assert result["top1_above_0.9"] == pytest.approx(above / count) and result["routing_decisions"] == count
    assert 0 < above < count
    for layer in range(2):
        assert result["expert_load"][layer] == pytest.approx(load[layer])
    assert result["router_entropy_by_layer"] == pytest.approx(entropy, rel=1e-4)
    assert result["router_entropy"] == pytest.approx(sum(entropy) / 2, rel=1e-4)
    relative = [h / math.log(4) for h in entropy]
    assert result["relative_router_entropy_by_layer"] == pytest.approx(relative, rel=1e-4)
    assert result["relative_router_entropy"] == pytest.approx(sum(relative) / 2, rel=1e-4)
    assert result["max_vio_by_layer"] == pytest.approx([4 * max(row) - 1 for row in load], rel=1e-4)
    assert result["dead_experts"] == 0 and result["top_k"] == 2


def test_task_scores_are_plain_means():
    values = torch.rand(3, 108, generator=seeded(0), dtype=torch.float64)
    sure = torch.tensor([0.0, -200.0, -200.0, -200.0]).expand(2, 1, 4)
    zeros = torch.zeros(2, 1, 1, dtype=torch.long)
    scored = [eval_routing.Scored(v, 1, zeros[:, 0, 0], zeros, sure) for v in values]
    result = eval_routing.figures(scored, text=False)
    assert result["original_score"] == pytest.approx(sum(v[0].item() for v in values) / 3)
    assert result["perturbed_score"] == pytest.approx(sum(v[r].item() for v in values for r in range(1, 100)) / 297)
    assert result["best_of_99_score"] == pytest.approx(sum(v[1:100].max().item() for v in values) / 3)
    assert result["perturbed_scores"] == pytest.approx([sum(v[1:100].tolist()) / 99 for v in values])
    assert result["top1_histogram"] == [0.0] * 19 + [1.0]  # a probability of exactly 1 is in the last bin
    assert result["dead_experts"] == 3 and result["max_vio"] == 3.0


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="not finite"):
        eval_routing.figures([made_up(torch.full((108,), math.nan), 1, 0)], text=True)


def sample_with_load(shares, top_k=1):
    """1,000 tokens of one layer, a share of them at each expert (top_k 2: expert 0 beside it)."""
    chosen = torch.cat([torch.full((round(1000 * share),), e) for e, share in enumerate(shares)])
    experts = chosen[:, None, None]
    if top_k == 2:
        experts = torch.cat([torch.zeros_like(experts), experts], -1)
    value = -2 + torch.rand(108, generator=seeded(0), dtype=torch.float64)
    log_probs = torch.zeros(1000, 1, len(shares)).log_softmax(-1)
    return eval_routing.Scored(value, 1000, chosen, experts, log_probs)


@pytest.mark.parametrize(
    "shares, top_k, collapsed",
    [
        ([0.96, 0.02, 0.02], 1, True),
        ([0.94, 0.03, 0.03], 1, False),
        ([0, 0.92, 0.04, 0.04], 2, True),  # experts 0 and 1 have 0.96 of the slots
        ([0, 0.88, 0.06, 0.06], 2, False),
    ],
)
def test_a_collapsed_layer_is_told(shares, top_k, collapsed):
    result = eval_routing.figures([sample_with_load(shares, top_k)], text=True)
    assert result["collapsed_layers"] == ([0] if collapsed else [])
    told = doubts({**result, "step": 5, "score": "perplexity"}, 257)
    assert len(told) == collapsed and all("collapsed: in MoE layer 0 more than 95%" in doubt for doubt in told)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"step": 0}, "untrained: this checkpoint is that of step 0"),
        ({"original_score": 140.0}, "untrained: the perplexity is above half of the vocabulary's 257 tokens"),
        ({"original_score": 140.0, "score": "accuracy"}, None),
        ({"tied_routes": [99]}, "100.00% of the routes are tied"),
        ({"tied_routes": [98]}, None),
        ({}, None),
    ],
)
def test_an_untrained_model_is_told(change, says):
    result = eval_routing.figures([sample_with_load([0.5, 0.5])], text=True)
    told = doubts({**result, "step": 5, "score": "perplexity", **change}, 257)
    assert [doubt.startswith(says) for doubt in told] == [True] * (says is not None)


def test_mrr_is_never_printed_alone():
    result = eval_routing.figures([sample_with_load([0.97, 0.03, 0])], text=True)
    result |= {"step": 3, "score": "perplexity", "dataset": "pydocs", "split": "test"}
    result["warnings"] = doubts(result, 257)
    text = describe(result)
    for name in ("mrr", "hit1", "original", "perturbed", "best of 99", "load", "entropy", "top-1 > 0.9", "warning:"):
        assert any(line.startswith(name) for line in text.splitlines())
    assert "0.9700 of a layer's slots" in text and "1 of 3 experts dead" in text and "1.00 of log E" in text
    assert f"max_vio {3 * 0.97 - 1:.2f}" in text and f"{math.log(3):.4f} nats" in text


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_consistency_by_loops(top_k):
    first, second, tokenizer = random_model(0, top_k=top_k), random_model(9, top_k=top_k), data.load_tokenizer("bytes")
    rows = [random_window(length, seed)[0].tolist() for seed, length in enumerate([23, 4, 11, 23] * 6)]
    share, tokens = expert_consistency(first, second, rows, tokenizer)
    count, kept = [[0] * 4 for _ in range(2)], [[0] * 4 for _ in range(2)]
    for row in rows:
        used = [m(torch.tensor([row])).routing.experts[0].tolist() for m in (first, second)]  # [T][L][K]
        for t, layer in itertools.product(range(len(row)), range(2)):
            for j in used[0][t][layer]:
                count[layer][j] += 1
                kept[layer][j] += j in used[1][t][layer]
    assert tokens.tolist() == count
    for layer, j in itertools.product(range(2), range(4)):
        if count[layer][j]:
            assert share[layer, j].item() == pytest.approx(kept[layer][j] / count[layer][j])
    assert 0 < sum(map(sum, kept)) < sum(map(sum, count))
    same, _ = expert_consistency(first, first, rows, tokenizer)
    assert (same[tokens > 0] == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders: "text" and "task" made by train.py, "small", "other" and "dense" with a small random model."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the token cache goes there too
        common = ["--steps", "2", "--pretrain-steps", "2", "--eval-samples", "4", "--device", "cpu"]
        train.run(train.parse(["--algo", "erl", "--out", "text", *common]))
        train.run(train.parse(["--algo", "grpo", "--dataset", "addition", "--out", "task", *common]))
        models = {
            "small": random_model(0),
            "other": random_model(9),
            "dense": random_model(0, n_expert=1),
            "wide": random_model(0, n_expert=8),
        }
        for name, model in models.items():
            (folder / name / "checkpoint").mkdir(parents=True)
            save_model(model, folder / name / "checkpoint" / "model.safetensors", step=3)
            config = {"dataset": "pydocs", "tokenizer": "bytes", "data_dir": None, "max_new_tokens": 4}
            (folder / name / "config.json").write_text(json.dumps(config))
        yield folder


def evaluate(*argv):
    return eval_routing.run(eval_routing.parse(["--device", "cpu", *map(str, argv)]))


def check_folder(folder, result, pictures=PICTURES):
    assert json.loads((folder / "routing.json").read_text()) == result
    for kind in pictures:
        pixels = imread(folder / f"routing_{kind}.png")
        assert pixels.shape[0] > 200 and pixels.shape[1] > 200
        assert pixels[..., :3].std() > 0.03  # not blank
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_text_run_from_the_command_line(runs, tmp_path):
    program = Path(eval_routing.__file__)
    done = subprocess.run(
        [sys.executable, program, "text", "--samples", "2", "--device", "cpu"], cwd=runs, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "mrr" in done.stdout and "0.0519" in done.stdout and "\x1b[" not in done.stdout
    result = json.loads((runs / "text" / "routing.json").read_text())
    check_folder(runs / "text", result)
    contract = (
        "mrr hit1 chance_mrr chance_hit1 samples original_score perturbed_score robustness top1_histogram "
        "top1_above_0.9 expert_load dataset split step seed score best_of_99_score router_entropy "
        "router_entropy_by_layer relative_router_entropy max_vio dead_experts warnings"
    )
    assert set(contract.split()) <= set(result)
    assert (result["samples"], result["score"], result["step"], result["split"]) == (2, "perplexity", 4, "test")
    assert result["robustness"]["0"] == result["original_score"]
    assert len(result["top1_histogram"]) == 20 and sum(result["top1_histogram"]) == pytest.approx(1)
    assert len(result["expert_load"]) == 2 and all(sum(row) == pytest.approx(1) for row in result["expert_load"])
    assert evaluate("text", "--samples", "2", "--out", tmp_path / "new") == result  # by Python; into another folder
    check_folder(tmp_path / "new", result)


def test_task_run(runs):
    result = evaluate("task", "--samples", "6")
    check_folder(runs / "task", result)
    assert result["score"] == "accuracy" and result["samples"] == 6
    assert all(0 <= score <= 1 for score in result["robustness"].values())
    assert evaluate("task", "--samples", "6", "--batch-size", "17") == result  # routes do not depend on the batches
    text = evaluate("task", "--samples", "1", "--dataset", "pydocs", "--out", "elsewhere")
    assert text["score"] == "perplexity" and text["dataset"] == "pydocs"
    assert (runs / "elsewhere" / "routing.json").is_file()


def test_results_are_written_before_anything_is_drawn(runs, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no picture today")

    for name in ("draw_routing", "show_tokens"):
        with monkeypatch.context() as patch:
            patch.setattr(eval_routing, name, fail)
            with pytest.raises(RuntimeError, match="no picture today"):
                evaluate("small", "--samples", "2", "--out", tmp_path / name)
        assert json.loads((tmp_path / name / "routing.json").read_text())["samples"] == 2


@pytest.mark.parametrize("name", ["lr$_$wd", r"a\$b$\$x^{$", "{0} %s 漢字\n"])
def test_names_are_never_read_as_mathematics(runs, tmp_path, monkeypatch, name):
    shutil.copytree(runs / "small", runs / name, dirs_exist_ok=True)
    titles, save = [], pictures.save

    def spy(figure, path):
        titles.extend(t for axis in figure.axes for t in (axis.title, figure._suptitle) if t and t.get_text())
        save(figure, path)

    monkeypatch.setattr(pictures, "save", spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(name, "--samples", "2", "--compare", name, "--out", tmp_path)
    check_folder(tmp_path, result, (*PICTURES, "consistency"))
    shown = name.replace("\n", "")
    for title in titles:
        text, mathematics = title._preprocess_math(title.get_text())
        assert not mathematics
    assert sum(shown in title._preprocess_math(title.get_text())[0] for title in titles) >= 5


def test_the_tokens_in_the_terminal(runs, tmp_path, capsys):
    tokens, config = random_window()[0], json.loads((runs / "small" / "config.json").read_text())
    assert eval_routing.main(["small", "--samples", "2", "--show-tokens", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("Each token")
        and "\nlayer 0\n" in out
        and "layer 1\n" in out
        and out.count("\x1b[30;48;2;") > 2 * 24
    )
    model, _, _ = eval_routing.load_run("small")
    samples = eval_routing.load_samples(eval_routing.parse(["small"]), model, config)
    words = samples.tokenizer.decode([samples.items[0][0][0].item()])  # the first token of the first sample
    first = re.search(r"\x1b\[30;48;2;[\d;]+m(.*?)\x1b", out).group(1)
    assert first == words.replace("\n", "↵") and len(tokens) == 25
    assert "mrr" in out.rsplit("\x1b[0m", 1)[1]


def test_seeds_and_samples(runs, tmp_path):
    one = evaluate("small", "--samples", "12", "--out", tmp_path)
    assert evaluate("small", "--samples", "12", "--out", tmp_path) == one
    assert (
        evaluate("small", "--samples", "12", "--seed", "1", "--out", tmp_path)["original_scores"]
        != one["original_scores"]
    )
    more = evaluate("small", "--samples", "14", "--out", tmp_path)
    assert more["original_scores"][:12] == one["original_scores"]  # the same order of samples and routes
    other = evaluate("small", "--samples", "12", "--split", "validation", "--out", tmp_path)
    assert other["split"] == "validation" and other["original_scores"] != one["original_scores"]


def test_a_split_with_fewer_samples_is_ranked_whole(runs, tmp_path, capsys, monkeypatch):
    text = data.TextSplit(random_window(24 * 3 + 5)[0].numpy().astype("uint16"), 77)
    monkeypatch.setattr(data, "load_text", lambda *args, **kwargs: text)
    assert evaluate("small", "--out", tmp_path)["samples"] == 3  # the short last window is no sample
    assert "pydocs test has 3 samples, not 300" in capsys.readouterr().err
    text = data.TextSplit(text.tokens[:9], 8)
    assert evaluate("small", "--out", tmp_path)["samples"] == 1  # unless there is no other


def test_compare(runs, tmp_path):
    same = evaluate("small", "--samples", "2", "--compare", "small", "--out", tmp_path)
    check_folder(tmp_path, same, (*PICTURES, "consistency"))
    assert same["compared_tokens"] >= 10_000  # more than the ranked samples hold
    pairs = [
        (share, tokens)
        for rows in zip(same["expert_consistency"], same["expert_consistency_tokens"], strict=True)
        for share, tokens in zip(*rows, strict=True)
    ]
    assert len(pairs) == 8 and sum(share == 1.0 for share, _ in pairs) > 1
    assert all(share == (1.0 if tokens >= 100 else None) for share, tokens in pairs)
    assert sum(tokens for _, tokens in pairs) == 2 * same["compared_tokens"]
    other = evaluate("small", "--samples", "2", "--compare", "other", "--out", tmp_path)
    assert any(share is not None and share < 1 for row in other["expert_consistency"] for share in row)
    assert other["mrr"] == same["mrr"]


def test_the_comparison_of_task_runs_reads_prompt_and_answer(runs, tmp_path):
    result = evaluate("task", "--samples", "3", "--compare", "task", "--out", tmp_path)
    examples = data.load_examples("addition", "test")
    assert result["compared_tokens"] == sum(len(e.prompt + e.answer) for e in examples)  # all: fewer than 10,000
    assert all(share in (1.0, None) for row in result["expert_consistency"] for share in row)


def test_a_test_set_of_the_run_has_the_run_s_answers(runs):
    """math500 is what a run on deepscaler is tested on: the same room for prompt and answer as there."""
    model, config, _ = eval_routing.load_run("small")
    path = Path("maths", data.get_dataset("math500").files["test"])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    args = eval_routing.parse(["small", "--dataset", "math500", "--data-dir", "maths"])
    config |= {"max_new_tokens": 3}
    assert eval_routing.load_samples(args, model, config | {"dataset": "deepscaler"}).max_new_tokens == 3
    assert (
        eval_routing.load_samples(args, model, config | {"dataset": "gsm8k"}).max_new_tokens
        == model.config.context // 2
    )


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nothing"], "nothing holds no run (no readable config.json)"),
        (["dense"], "dense is a dense model: it has no routes to rank"),
        (["unfinished"], "unfinished has no checkpoint yet"),
        (["broken"], "not a readable checkpoint of this program"),
        (["garbled"], "is not that of a run of this program"),
        (["small", "--dataset", "wikitext2", "--data-dir", "empty"], "wiki.test.raw is missing"),
        (["small", "--dataset", "pydoc"], "did you mean pydocs?"),
        (["small", "--split", "tests"], "did you mean test?"),
        (["small", "--dataset", "deepscaler"], "deepscaler has no test split: test on --dataset math500 or aime24"),
        (["small", "--samples", "0"], "at least 1"),
        (["small", "--batch-size", "x"], "not a whole number"),
        (["small", "--compare", "dense"], "dense is a dense model"),
        (["small", "--compare", "wide"], "small and wide cannot be compared"),
        (["small", "--compare", "tokens"], "small and tokens cannot be compared"),
        (["foreign"], "foreign is not one run"),
        (["small", "--out", "small/config.json"], "cannot write into small/config.json"),
        ([], "required: RUN"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(runs, argv, says, capsys):
    for name in ("unfinished", "broken", "garbled", "tokens", "foreign", "empty"):
        shutil.rmtree(runs / name, ignore_errors=True)
        shutil.copytree(runs / "small", runs / name)
    shutil.rmtree(runs / "unfinished" / "checkpoint")
    (runs / "broken" / "checkpoint" / "model.safetensors").write_bytes(b"\0" * 100)
    (runs / "garbled" / "config.json").write_text("[1]")
    config = json.loads((runs / "small" / "config.json").read_text())
    (runs / "tokens" / "config.json").write_text(json.dumps({**config, "tokenizer": "other"}))
    save_model(random_model(vocab_size=300), runs / "foreign" / "checkpoint" / "model.safetensors")
    before = runs / "small" / "routing.json"
    before.write_text("kept")
    assert eval_routing.main([*argv, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.startswith("eval_routing.py: ") and err.count("\n") == 1
    assert before.read_text() == "kept" and not list((runs / "small").glob("*.png"))


def test_a_mistake_ends_the_command_with_status_2(runs):
    done = subprocess.run([sys.executable, eval_routing.__file__, "nothing"], cwd=runs, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
