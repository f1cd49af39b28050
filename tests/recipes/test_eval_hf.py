"""eval_routing.py's figures on a transformers model."""

import itertools
import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from tiny_hf import save_tiny_llama, save_tiny_moe  # noqa: E402

from recipes import eval_hf  # noqa: E402
from recipes.hf_routing import Routes, find_routers, next_token_log_probs  # noqa: E402
from recipes.hf_text import load_model, load_windows  # noqa: E402
from support.tasks import rng  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_moe(tmp_path_factory.mktemp("moe"))


def test_scores_are_mean_log_probabilities_along_the_routes(folder):
    model, _ = load_model(folder)
    hub = eval_hf.HubModel(model)
    tokens = torch.arange(1, 14)
    routes = hub.draw_routes(12, 0, "x")
    scored = hub.score_text(tokens, routes, 7)
    assert scored.values.shape == (108,) and scored.router_log_probs.shape == (12, 2, hub.n_expert)
    assert torch.equal(scored.experts, scored.router_log_probs.topk(1).indices)
    assert torch.equal(scored.tokens, tokens[:-1])
    assert not routes.forced[0].any() and routes.forced[-1].all()
    with torch.no_grad():
        own = model(tokens[None, :-1]).logits.log_softmax(-1)[0].gather(-1, tokens[1:, None]).mean()
    torch.testing.assert_close(scored.values[0].float(), own)
    log_probs, tape = next_token_log_probs(model, tokens[None], Routes(routes.experts[-1:], routes.forced[-1:]))
    assert torch.equal(tape.experts, routes.experts[-1:])
    torch.testing.assert_close(scored.values[-1].float(), log_probs.mean())
    again = hub.score_text(tokens, routes, 108)
    torch.testing.assert_close(again.values, scored.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.experts, scored.experts)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_forced_expert_takes_the_place_and_the_weight_of_the_own_one(folder, top_k):
    """Against whole forwards without a cache, in which the layer's expert is replaced in the sum that it stands in."""
    model, _ = load_model(folder)
    for router, _ in find_routers(model):
        router.top_k = top_k
    hub, tokens = eval_hf.HubModel(model), torch.arange(1, 14)
    experts = next_token_log_probs(model, tokens[None])[1].experts
    for layer, length in itertools.product(range(2), (2, 12)):
        found = hub.score_decision(tokens[: length + 1], layer)
        own = experts[0, length - 1, layer].tolist()
        expected = []
        for e in [own[0], *(e for e in range(hub.n_expert) if e not in own)]:

            def replace(module, args, output, e=e):
                output[2][-1, 0] = e  # the first expert of the last token; its weight stays

            with torch.no_grad(), hub.routers[layer].register_forward_hook(replace):
                logits = model(tokens[None, :length]).logits[0, -1]
            expected.append(logits.log_softmax(-1)[tokens[length]])
        torch.testing.assert_close(found.values.float(), torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert found.values.std() > 1e-4


def test_windows_and_decisions_are_spread_over_the_split(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(folder)
    every, _ = load_windows("pydocs", "test", tokenizer, 16)
    few, _ = load_windows("pydocs", "test", tokenizer, 16, limit=3)
    assert few.tolist() == [every[i * len(every) // 3].tolist() for i in range(3)]
    hub = eval_hf.HubModel(model)
    for i, decision in enumerate(hub.score_decisions(few, 6, seed=5)):
        draw = rng(5, "decisions", i)
        position, layer = (int(torch.randint(*bounds, (), generator=draw)) for bounds in ((1, 16), (0, 2)))
        expected = hub.score_decision(few[i % 3][: position + 2], layer)
        assert torch.equal(decision.values, expected.values)


def test_the_program(folder, tmp_path, capsys, monkeypatch):
    """And of a freshly upcycled model, of copies of one expert: every route scores the same, and MRR is chance."""
    monkeypatch.chdir(tmp_path)
    results = []
    for model in (folder, save_tiny_llama(tmp_path / "llama")):
        flags = "--out out --samples 2 --context 16 --dataset pydocs --decisions 6"
        assert eval_hf.main([model, *flags.split()]) == 0
        results.append(json.loads((tmp_path / "out" / "routing.json").read_text()))
        assert f"{results[-1]['mrr']:.4f}" in capsys.readouterr().out
        for name in ("ranks", "load", "regret"):
            picture = tmp_path / "out" / f"routing_{name}.png"
            assert picture.stat().st_size > 3000
            picture.unlink()
    result, copies = results
    assert result["samples"] == 2 and 0.0099 < result["mrr"] <= 1 and len(result["expert_load"]) == 2
    assert result["regret"]["all"]["decisions"] == 6
    assert sum(n for _, n in result["frequent_tokens"][1][0]) > 0
    assert copies["tied_routes"] == [99, 99] and copies["mrr"] == pytest.approx(copies["chance_mrr"])
    regret = copies["regret"]
    assert regret["all"]["own_rank"] == regret["chance_rank"] and regret["all"]["regret"] < 1e-5
