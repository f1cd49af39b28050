"""eval_routing.py's figures on a transformers model."""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from tiny_hf import save_tiny_llama  # noqa: E402

from recipes import eval_hf  # noqa: E402
from recipes.hf_routing import Routes, find_routers  # noqa: E402
from recipes.hf_text import load_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An upcycled model whose experts differ."""
    parent = save_tiny_llama(tmp_path_factory.mktemp("llama"))
    model, tokenizer = load_model(parent)
    for _, block in find_routers(model):
        torch.nn.init.normal_(block.experts.down_proj, std=0.3, generator=torch.Generator().manual_seed(1))
    out = str(tmp_path_factory.mktemp("moe"))
    model.save_pretrained(out), tokenizer.save_pretrained(out)
    return out


def test_scores_are_mean_log_probabilities_along_the_routes(folder):
    model, _ = load_model(folder)
    hub = eval_hf.HubModel(model)
    tokens = torch.arange(1, 14)
    routes = hub.draw_routes(12, 0, "x")
    scored = hub.score_text(tokens, routes, 7)
    assert scored.values.shape == (108,) and scored.experts.shape == (12, 2, 1)
    assert scored.router_log_probs.shape == (12, 2, hub.n_expert) and torch.equal(scored.tokens, tokens[:-1])
    assert not routes.forced[0].any() and routes.forced[-1].all()
    with torch.no_grad():
        own = model(tokens[None, :-1]).logits.log_softmax(-1)[0].gather(-1, tokens[1:, None]).mean()
    torch.testing.assert_close(scored.values[0].float(), own)
    log_probs, _, experts = hub.forward(tokens[None], Routes(routes.experts[-1:], routes.forced[-1:]))
    assert torch.equal(experts, routes.experts[-1:])
    torch.testing.assert_close(scored.values[-1].float(), log_probs.mean())
    again = hub.score_text(tokens, routes, 108)
    torch.testing.assert_close(again.values, scored.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.experts, scored.experts)


def test_the_program(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [folder, "--out", str(tmp_path / "out"), "--samples", "3", "--context", "16", "--dataset", "pydocs"]
    assert eval_hf.main(line) == 0
    result = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert result["samples"] == 3 and 0.0099 < result["mrr"] <= 1 and len(result["expert_load"]) == 2
    assert f"{result['mrr']:.4f}" in capsys.readouterr().out
    for name in ("routing_ranks.png", "routing_load.png", "routing_tokens.png"):
        assert (tmp_path / "out" / name).stat().st_size > 3000
    assert "layer 1" in (tmp_path / "out" / "routing_tokens.txt").read_text()


def test_copies_of_one_expert_tie(tmp_path, monkeypatch):
    """A freshly upcycled model: every route scores the same, and MRR is chance."""
    monkeypatch.chdir(tmp_path)
    parent = save_tiny_llama(tmp_path / "llama")
    args = eval_hf.parse([parent, "--out", "out", "--samples", "2", "--context", "16", "--dataset", "pydocs"])
    result = eval_hf.run(args)
    assert result["tied_routes"] == [99, 99] and result["mrr"] == pytest.approx(result["chance_mrr"])


def test_mistakes_are_told_in_one_sentence(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, word in ((["--context", "500"], "--context"), (["--samples", "0"], "--samples")):
        assert eval_hf.main([folder, "--out", "out", "--dataset", "pydocs", *more]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("eval_hf: ") and word in error[-1]
