"""eval_routing.py: scores by plain forwards, models whose rank and regret are known by construction, the command."""

import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

import data
import eval_routing
from moe import GPT, MoEConfig, Routes, choose_experts, feed_forward, upcycle
from support.checkpoints import save_checkpoint
from support.routing_text import frequent_tokens, warnings_of
from support.samples import Samples, expert_consistency, load_run, load_samples
from support.tasks import rng

BYTES = data.load_tokenizer("bytes")
SMALL = dict(vocab_size=257, context=24, n_layer=2, n_head=2, n_embd=16, moe_every=1)


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


@torch.no_grad()
def log_probs_of(model, tokens, routes=None):
    features, routing = model(tokens[None], routes=routes)
    return model.head(features).double().log_softmax(-1)[0], routing


def ranks_with_ties_broken(values):
    """The original's rank (index 0) under every possible order in which equal routes may be listed."""
    routes = range(len(values))
    listed = (sorted(routes, key=lambda r: (-values[r], order[r])) for order in itertools.permutations(routes))
    return [1 + routes.index(0) for routes in listed]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_ties_count_as_their_expectation_and_rounding_is_a_tie(values):
    rounding = 1e-7 * torch.randn(1, len(values), generator=seeded(0), dtype=torch.float64)
    nearly = -2 + 1e-5 * torch.tensor([values]) + rounding
    better, tied = (t.tolist() for t in eval_routing.rank(nearly))
    ranks = ranks_with_ties_broken(values)
    expected = sum(1 / r for r in ranks) / len(ranks)
    assert eval_routing.reciprocal_rank(better[0], tied[0]) == pytest.approx(expected, abs=1e-12)
    shares = eval_routing.rank_shares(better, tied, len(values))
    assert shares == pytest.approx([ranks.count(r) / len(ranks) for r in range(1, len(values) + 1)], abs=1e-12)


def test_routes_are_the_original_33_at_each_alpha_and_full_ones():
    alphas = eval_routing.route_alphas().tolist()
    assert alphas == [0.0] + [0.25] * 33 + [0.5] * 33 + [0.75] * 33 + [1.0] * 8
    routes = eval_routing.draw_routes(random_model(n_expert=8), 200, 0, "routes", 7, first=40)
    assert not routes.forced[:, :40].any()
    share = routes.forced[:, 40:].double().mean((1, 2))
    assert share[0] == 0 and (share[100:] == 1).all()
    assert share[1:100].view(3, 33).mean(1).tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.02)


def rank_thrice(model, dataset, item, batch_size):
    """One sample three times, each with routes of its own: those of the seed 11 and its index."""
    samples = Samples(data.get_dataset(dataset), BYTES, [item] * 3, 3, 21)
    args = SimpleNamespace(samples=3, seed=11, batch_size=batch_size, split="test")
    return eval_routing.rank_samples(args, model, samples)


@pytest.mark.parametrize("sizes", [{}, {"top_k": 2, "gate": "prob"}, {"moe_every": 2}])
def test_text_scores_are_those_of_plain_forwards(sizes):
    model, (tokens, mask) = random_model(**sizes), random_window()
    mask[20:] = False  # the end of a text that is shorter than the context
    routing = log_probs_of(model, tokens[:20])[1]
    for i, scored in enumerate(rank_thrice(model, "pydocs", (tokens, mask), 7)):
        routes = eval_routing.draw_routes(model, 24, 11, "routes", i)
        for r in (0, 1, 40, 80, 101):
            one = None if r == 0 else Routes(routes.experts[r : r + 1], routes.forced[r : r + 1])
            log_probs, _ = log_probs_of(model, tokens[:-1], one)
            expected = sum(log_probs[t, tokens[t + 1]] for t in range(20)) / 20
            assert scored.values[r].item() == pytest.approx(expected.item(), abs=1e-5)
        assert torch.equal(scored.experts, routing.experts[0]) and torch.equal(scored.tokens, tokens[:20])
        torch.testing.assert_close(scored.router_log_probs, routing.logits[0].log_softmax(-1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_freshly_upcycled_model_is_indifferent(top_k):
    model, window = upcycle(random_model(n_expert=1), MoEConfig(**SMALL, n_expert=8, top_k=top_k)), random_window()
    scored, C = eval_routing.score_text(model, window, eval_routing.draw_routes(model, 24, 0)), 9 - top_k
    result = eval_routing.figures([scored], text=True)
    assert (result["tied_routes"], result["better_routes"], result["hit1"]) == ([99], [0], 0.01)
    assert result["mrr"] == pytest.approx(eval_routing.CHANCE_MRR)
    regret = eval_routing.regret_figures([eval_routing.score_decision(model, window[0].tolist(), 1)])["all"]
    assert (regret["own_rank"], regret["own_best"]) == pytest.approx(((C + 1) / 2, 1 / C)) and regret["regret"] < 1e-5


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_router_that_is_right_or_wrong_by_construction(chosen):
    """The text is all "a", which only expert 0 writes: every use of the other expert costs, every use of it pays."""
    model = settled_model(chosen, writes=[97, 98])
    window, routes = (torch.full((25,), 97), torch.ones(24, dtype=torch.bool)), eval_routing.draw_routes(model, 24, 0)
    result = eval_routing.figures([eval_routing.score_text(model, window, routes)], text=True)
    moved = sum(bool((routes.forced[r] & (routes.experts[r, ..., 0] != chosen)).any()) for r in range(1, 100))
    assert (result["better_routes"], result["tied_routes"]) == ([moved if chosen else 0], [99 - moved])
    scores = list(result["robustness"].values())  # the more that is random, the worse (or better)
    assert scores == sorted(scores, reverse=chosen == 1)
    assert result["expert_load"] == [[float(j == chosen) for j in range(2)]]
    assert result["top1_above_0.9"] == 1  # e^3 / (e^3 + 1) = 0.953

    found = eval_routing.regret_figures([eval_routing.score_decision(model, [97] * n, 0) for n in (3, 9)])["all"]
    a, b = (log_probs_of(settled_model(e, [97, 98]), torch.tensor([97]))[0][0, 97].item() for e in (0, 1))
    assert found["regret"] == pytest.approx(a - b if chosen else 0, abs=1e-5)
    assert found["random_expert_cost"] == pytest.approx((b - a if chosen else a - b) / 2, abs=1e-5)
    assert (found["own_rank"], found["own_best"]) == ((2, 0) if chosen else (1, 1))


@pytest.mark.parametrize("batch_size", [None, 1, 50])
def test_task_scores_follow_the_routes_of_prompt_end_and_answer(batch_size):
    """Expert 0 writes "1", expert 1 "2": the answer says which expert worked at each position that writes. A prompt is
    never perturbed but for its last token."""
    right = "111", "211", "122"
    model, example = settled_model(0, writes=[ord("1"), ord("2")]), data.Example("9+9=", "111", right)
    for i, scored in enumerate(rank_thrice(model, "addition", example, batch_size)):
        routes = eval_routing.draw_routes(model, 7, 11, "routes", i, first=3)
        for r in range(len(routes.forced)):
            worked = [int(routes.experts[r, t, 0, 0]) if routes.forced[r, t, 0] else 0 for t in range(7)]
            answer = "".join("12"[worked[t]] for t in (3, 4, 5))  # the last prompt token writes the first one
            assert scored.values[r] == float(answer in right)
        assert scored.values[0] == 1 and 0 < scored.values[1:].mean() < 1
        assert scored.experts.tolist() == [[[0]]] * 6 and scored.router_log_probs.shape == (6, 1, 2)
        assert bytes(scored.tokens.tolist()) == b"9+9=11"  # the last token written is never read


def forward_with(model, tokens, layer, expert):
    """log p [V] after the last of `tokens`; `expert` takes the first one's place and weight there in `layer`."""

    def exchange(moe, args, output):
        x, experts, weights = args[0][0, -1], *choose_experts(output[1].logits[0, -1], model.config)
        new, own = (feed_forward(x, *(w[e] for w in moe.experts.parameters())) for e in (expert, experts[0]))
        output[0][0, -1] += weights[0] * (new - own)

    with model.blocks[model.config.moe_blocks[layer]].mlp.register_forward_hook(exchange):
        return log_probs_of(model, tokens)[0][-1]


SIZES = [dict(top_k=2), dict(top_k=2, gate="prob", n_shared_expert=1), dict(n_layer=4, moe_every=2, gate="straight")]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_forced_expert_takes_the_place_and_the_weight_of_the_own_one(sizes):
    tokens, seen = random_window(10)[0], set()
    for layer, length, seed in itertools.product(range(2), (3, 10), range(3)):
        model, prefix, target = random_model(seed, **sizes), tokens[:length], tokens[length]
        found = eval_routing.score_decision(model, [*prefix.tolist(), target.item()], layer)
        log_probs, routing = log_probs_of(model, prefix)
        chosen, own = routing.experts[0, -1, layer].tolist(), log_probs[-1]
        seen.add(chosen[0])
        others = [forward_with(model, prefix, layer, e) for e in range(4) if e not in chosen]
        expected = torch.stack([p[target] for p in (own, *others)])
        torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)
        assert found.values.std() > 1e-3
        assert found.entropy == pytest.approx(-(own.exp() * own).sum().item(), rel=1e-5)
    assert len(seen) > 1


def test_decisions_are_drawn_one_a_row_from_the_predictions_that_count():
    model, rows = random_model(), [[*b"12+3=15", 256], [*b"4+4=8", 256]]
    examples = [data.Example("12+3=", "15", ("15",)), data.Example("4+4=", "8", ("8",))]
    samples = Samples(data.get_dataset("addition"), BYTES, examples, 4, 20)
    scored = eval_routing.score_decisions(SimpleNamespace(seed=3, decisions=12), model, samples)
    for i, decision in enumerate(scored):
        row, draw = rows[i % 2], rng(3, "decisions", i)
        first = row.index(ord("="))  # it predicts the answer's first token
        position = int(torch.randint(first, len(row) - 1, (), generator=draw))
        layer = int(torch.randint(2, (), generator=draw))
        expected = eval_routing.score_decision(model, row[: position + 2], layer)
        assert torch.equal(decision.values, expected.values)
    assert len({d.values[0].item() for d in scored}) > 4


def test_regret_figures_by_the_book():
    values = (-3 + 2 * torch.rand(9, 4, generator=seeded(0), dtype=torch.float64)).round(decimals=1)
    values[0, 1:] = values[0, 0] = -1.0  # all tied
    values[1] = torch.tensor([-0.5, -1.0, -2.0, -3.0])  # the own one is best
    entropies = [2.0, 0.1, 0.5, 1.5, 0.2, 1.0, 3.0, 0.3, 2.5]
    found = eval_routing.regret_figures([*map(eval_routing.Decision, values, entropies)])
    assert (found["candidates"], found["chance_rank"], found["chance_best"]) == (4, 2.5, 0.25)
    assert found["median_entropy"] == 1.0
    confident = [i for i, h in enumerate(entropies) if h <= 1.0]
    parts = {"all": range(9), "confident": confident, "fragile": [i for i in range(9) if i not in confident]}
    for name, part in parts.items():
        rows = [values[i].tolist() for i in part]
        ranks = [ranks_with_ties_broken(row) for row in rows]
        columns = {
            "regret": [max(row) - row[0] for row in rows],
            "random_expert_cost": [row[0] - statistics.fmean(row) for row in rows],
            "own_rank": [statistics.fmean(r) for r in ranks],
            "own_best": [r.count(1) / len(r) for r in ranks],
        }
        assert found[name]["decisions"] == len(rows)
        for column, x in columns.items():
            assert found[name][column] == pytest.approx(statistics.fmean(x), abs=1e-12)
            error = statistics.stdev(x) / math.sqrt(len(x))
            assert found[name][f"{column}_standard_error"] == pytest.approx(error, abs=1e-12)
        shares = [statistics.fmean(r.count(place) / len(r) for r in ranks) for place in range(1, 5)]
        assert found[name]["rank_shares"] == pytest.approx(shares, abs=1e-12)


@pytest.mark.parametrize("text", [True, False])
def test_figures_by_the_book(text):
    """Of samples of 4 experts in 2 layers, 2 a token. Entropy and max_vio are tested with routing_report."""
    alphas, S, weights = eval_routing.route_alphas().tolist(), 5, [24, 24, 24, 24, 7]
    values = -3 + torch.rand(S, len(alphas), generator=seeded(0), dtype=torch.float64)
    values[0, 0], values[1, 103], values[2, 5] = -1.5, -1.2, values[2, 0]  # own best; a full route best; a tie
    routers = [(3 * torch.randn(n, 2, 4, generator=seeded(n + s))).log_softmax(-1) for s, n in enumerate(weights)]
    scored = [eval_routing.Scored(v, r[:, 0, 0], r.topk(2).indices, r) for v, r in zip(values, routers, strict=True)]
    result = eval_routing.figures(scored, text=text)
    rows, weights = values.tolist(), weights if text else [1] * S

    def score(of_sample):  # the mean over samples, of a text weighted by tokens and as a perplexity
        mean = sum(w * of_sample(row) for w, row in zip(weights, rows, strict=True)) / sum(weights)
        return pytest.approx(math.exp(-mean) if text else mean)

    assert result["original_score"] == score(lambda row: row[0])
    assert result["perturbed_score"] == score(lambda row: statistics.fmean(row[1:100]))
    assert result["best_of_99_score"] == score(lambda row: max(row[1:100]))
    assert list(result["robustness"]) == ["0", "0.25", "0.5", "0.75", "1"]
    for alpha, found in result["robustness"].items():
        columns = [r for r, a in enumerate(alphas) if a == float(alpha)]
        assert found == score(lambda row, columns=columns: statistics.fmean(row[r] for r in columns))
    each = [statistics.fmean(row[1:100]) for row in rows]
    assert result["perturbed_scores"] == pytest.approx([math.exp(-x) for x in each] if text else each)

    better = [sum(v > row[0] for v in row[1:100]) for row in rows]
    assert result["better_routes"] == better and result["tied_routes"] == [0, 0, 1, 0, 0]
    reciprocal = [1 / (1 + b) for b in better]
    reciprocal[2] = (1 / (1 + better[2]) + 1 / (2 + better[2])) / 2
    assert result["mrr"] == pytest.approx(statistics.fmean(reciprocal))
    assert result["mrr_standard_error"] == pytest.approx(statistics.stdev(reciprocal) / math.sqrt(S))
    assert result["hit1"] == pytest.approx(sum(b == 0 for b in better) / S) and result["hit1"] > 0

    log_probs = torch.cat(routers)
    experts = log_probs.topk(2).indices
    top1 = log_probs.exp().amax(-1).flatten().tolist()
    bins = [sum(min(int(20 * p), 19) == b for p in top1) / len(top1) for b in range(20)]
    assert result["top1_histogram"] == pytest.approx(bins) and result["routing_decisions"] == len(top1)
    loads = [(experts[:, layer] == e).double().mean().item() for layer in range(2) for e in range(4)]
    assert sum(result["expert_load"], []) == pytest.approx(loads)
    entropy = torch.special.entr(log_probs.exp()).sum(-1).mean(0) / math.log(4)
    assert result["relative_router_entropy_by_layer"] == pytest.approx(entropy.tolist(), rel=1e-4)
    assert result["relative_router_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("top_k", "tokens", "collapsed"),  # with two experts a token, beside expert 0: together 0.96 of the slots, or 0.94
    [(1, [960, 20, 20], True), (1, [940, 30, 30], False), (2, [0, 920, 80], True), (2, [0, 880, 120], False)],
)
def test_ranks_that_say_little_are_told(top_k, tokens, collapsed):
    """Of 1,000 tokens of one layer, a number at each expert."""
    experts = torch.arange(3).repeat_interleave(torch.tensor(tokens))[:, None, None]
    experts = torch.cat([torch.zeros_like(experts), experts], -1)[..., -top_k:]
    value, even = -2 + torch.rand(108, generator=seeded(0), dtype=torch.float64), torch.zeros(1000, 1, 3)
    sample = eval_routing.Scored(value, experts[:, 0, 0], experts, even.log_softmax(-1))
    result = eval_routing.figures([sample], text=True)
    result |= {"step": 5, "score": "perplexity", "dataset": "pydocs", "split": "test"}
    assert result["collapsed_layers"] == [0] * collapsed and len(warnings_of(result, 257)) == collapsed
    for change in ({"step": 0}, {"original_score": 140.0}, {"tied_routes": [99]}):
        assert len(warnings_of(result | change, 257)) == 1 + collapsed
    for change in ({"original_score": 140.0, "score": "accuracy"}, {"tied_routes": [98]}):
        assert len(warnings_of(result | change, 257)) == collapsed


def test_frequent_tokens_are_counted_for_each_layer_and_expert():
    tokens, experts = torch.tensor([97, 98, 97, 97]), torch.tensor([[[0], [2]], [[1], [2]], [[0], [1]], [[1], [2]]])
    sample = eval_routing.Scored(torch.zeros(100), tokens, experts, torch.zeros(4, 2, 3))
    first, second = frequent_tokens([sample, sample], BYTES, 3)
    assert first == [[["a", 4]], [["a", 2], ["b", 2]], []] and second == [[], [["a", 2]], [["a", 4], ["b", 2]]]


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_consistency_by_loops(top_k):
    models = random_model(0, top_k=top_k), random_model(9, top_k=top_k)
    rows = [random_window(length, seed)[0].tolist() for seed, length in enumerate([23, 4, 11] * 4)]
    share, tokens = expert_consistency(*models, rows)
    first, second = (torch.cat([log_probs_of(m, torch.tensor(row))[1].experts[0] for row in rows]) for m in models)
    for layer, e in itertools.product(range(2), range(4)):
        stays = [e in second[t, layer] for t in range(len(first)) if e in first[t, layer]]
        assert tokens[layer, e] == len(stays)
        assert not stays or share[layer, e].item() == pytest.approx(statistics.fmean(stays))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of random models: "text" and "other" on pydocs, "task" on addition, "dense"; "empty" has no model."""
    folder = tmp_path_factory.mktemp("runs")
    models = [random_model(0), random_model(9), random_model(3), random_model(n_expert=1), None]
    for name, model in zip(("text", "other", "task", "dense", "empty"), models, strict=True):
        (folder / name).mkdir()
        config = {"dataset": "addition" if name == "task" else "pydocs", "tokenizer": "bytes", "data_dir": None}
        (folder / name / "config.json").write_text(json.dumps(config | {"max_new_tokens": 4}))
        if model:
            save_checkpoint(str(folder / name / "checkpoint" / "model.safetensors"), model, step=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the token cache goes there too
        yield folder


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures, which are most of a small run's time."""
    monkeypatch.setattr("support.pictures.save", lambda *_: None)


def evaluate(*argv):
    return eval_routing.run(eval_routing.parse(["--device", "cpu", "--decisions", "6", *map(str, argv)]))


def test_the_command(runs, tmp_path, capsys):
    assert eval_routing.main(["text", "--samples", "2", "--decisions", "6", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "0.0519" in out and "regret" in out
    result = json.loads((runs / "text" / "routing.json").read_text())
    for kind in ("ranks", "robustness", "top1", "load", "regret"):
        assert imread(runs / "text" / f"routing_{kind}.png")[..., :3].std() > 0.03  # not blank
    assert (result["samples"], result["score"], result["step"], result["split"]) == (2, "perplexity", 3, "test")
    assert result["regret"]["all"]["decisions"] == 6 and result["regret"]["candidates"] == 4
    assert evaluate("text", "--samples", "2", "--out", tmp_path) == result  # into another folder


def test_samples_are_windows_of_the_split_in_an_order_drawn_from_the_seed(runs, undrawn, monkeypatch, tmp_path, capsys):
    tokens = random_window(24 * 5 + 7)[0]

    def load_text(name, split, *_, **__):
        assert (name, split) == ("pydocs", "validation")
        return data.TextSplit(tokens.numpy().astype("uint16"), 127)

    monkeypatch.setattr(data, "load_text", load_text)
    model, config, _ = load_run("text")
    flags = ["text", "--split", "validation", "--seed", "4", "--out", tmp_path]
    samples = load_samples(eval_routing.parse([*map(str, flags)]), model, config)
    order = torch.randperm(5, generator=rng(4, "samples")).tolist()  # the short last window is no sample
    assert [item[0].tolist() for item in samples.items] == [tokens[24 * i : 24 * i + 25].tolist() for i in order]
    assert evaluate(*flags)["samples"] == 5 and "has 5 samples, not 300" in capsys.readouterr().err
    tokens = tokens[:9]  # unless there is no other
    assert evaluate(*flags)["samples"] == 1


def test_a_test_set_has_its_own_rules_and_the_run_s_room_for_answers(runs, tmp_path):
    """math500 is what a run on deepscaler is tested on: the same room for prompt and answer as there."""
    (model, config, _), path = load_run("text"), tmp_path / data.get_dataset("math500").files["test"]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    args = eval_routing.parse(["text", "--dataset", "math500", "--data-dir", str(tmp_path)])
    for dataset, new in (("deepscaler", 3), ("gsm8k", 12)):  # 12: half of the context
        samples = load_samples(args, model, config | {"max_new_tokens": 3, "dataset": dataset})
        assert (samples.spec.name, samples.max_new_tokens, samples.room) == ("math500", new, 24 - new)


def test_compare(runs, undrawn, tmp_path):
    flags = "task", "--samples", "3", "--compare", "task", "--out", tmp_path
    task = evaluate(*flags)
    assert task["score"] == "accuracy" and evaluate(*flags, "--batch-size", "17") == task
    examples = data.load_examples("addition", "test")  # all of them, prompt and answer: fewer than 10,000 tokens
    assert task["compared_tokens"] == sum(len(e.prompt + e.answer[:4]) for e in examples)
    tokens = sum(task["expert_consistency_tokens"], [])  # of each expert of each layer
    assert sum(tokens) == 2 * task["compared_tokens"] and min(tokens) < 100 < max(tokens)
    assert sum(task["expert_consistency"], []) == [1.0 if n >= 100 else None for n in tokens]
    text = evaluate("text", "--samples", "2", "--compare", "other", "--out", tmp_path)
    assert text["compared_tokens"] >= 10_000  # more than the ranked samples hold
    assert any(share is not None and share < 1 for share in sum(text["expert_consistency"], []))


def test_mistakes_are_one_sentence(runs, capsys):
    for flags in ("nothing", "empty", "text --dataset pydoc", "text --compare dense"):
        assert eval_routing.main([*flags.split(), "--device", "cpu"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
