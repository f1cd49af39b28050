"""results/headroom.py: exact credit by a loop over experts, the share of a headroom, ranks of a decision."""

import pytest
import torch

from moe import GPT, SIZES, MoEConfig, Routes, token_log_probs
from results import headroom, headroom_report
from support.tasks import rng


def small_model(gate="renorm"):
    model = GPT(MoEConfig(vocab_size=257, n_expert=headroom.E, top_k=1, gate=gate, **SIZES["tiny"]), rng("model"))
    for p in model.parameters():  # experts that differ, or every route would be worth the same
        torch.nn.init.normal_(p, std=0.1, generator=rng("weights", p.shape)) if p.ndim == 3 else None
    return model


@pytest.mark.parametrize("gate", ["renorm", "prob"])
def test_exact_credit_is_what_forcing_each_expert_at_one_token_gives(gate):
    model, tokens = small_model(gate), torch.randint(257, (2, 9), generator=rng("tokens"))
    decisions = headroom.last_decisions(model, [tokens])
    with torch.no_grad():
        for expert in range(headroom.E):
            routes = Routes(torch.full((2, 8, 2, 1), expert), torch.zeros(2, 8, 2, dtype=torch.bool))
            routes.forced[:, 5, 1] = True
            features, _ = model(tokens[:, :-1], routes=routes)
            log_probs = token_log_probs(features, model.wte.weight, tokens[:, 1:])
            torch.testing.assert_close(decisions.log_probs[:, 5, expert], log_probs[:, 5])
    assert decisions.log_probs[:, 5].std(-1).min() > 1e-4


def test_the_own_route_scores_what_the_model_does_and_the_ranks_are_exact():
    model, tokens = small_model(), torch.randint(257, (3, headroom.T + 1), generator=rng("tokens"))
    decisions, weight = headroom.last_decisions(model, [tokens]), model.blocks[-1].mlp.router.weight.detach()
    kept, forced = headroom.draw_routes(decisions.log_probs)
    found = headroom.score(weight, decisions, kept, forced)
    features, routing = model(tokens[:, :-1])
    log_probs = token_log_probs(features, model.wte.weight, tokens[:, 1:]).detach()
    assert abs(found["nats"] + log_probs.mean().item()) < 1e-5
    routes = forced + (kept * log_probs[:, None]).sum(-1)  # [B, R]
    better = (routes / headroom.T > log_probs.mean(1, keepdim=True)).sum(1)
    assert abs(found["mrr"] - (1 / (1 + better)).mean().item()) < 1e-3
    assert abs(found["max_load"] - routing.experts[:, :, 1].flatten().bincount().max().item() / (3 * headroom.T)) < 1e-6


def test_exact_credit_finds_a_right_expert_and_a_constant_advantage_does_not():
    inputs = torch.randn(80, headroom.T, 128, generator=rng("inputs"))
    right = (inputs @ torch.randn(128, headroom.E, generator=rng("right"))).argmax(-1, keepdim=True)
    decisions = headroom.Decisions(inputs, torch.zeros(80, headroom.T, headroom.E).scatter(-1, right, 1.0) - 3)
    shares = {}
    for arm in ("exact", "erl", "constant"):
        means = [-0.5] * headroom.STEPS if arm == "constant" else []
        weight = headroom.train_last_router(arm, headroom.new_router(0, decisions), decisions, 3e-3, (0,), means)
        shares[arm] = ((inputs @ weight.T).argmax(-1, keepdim=True) == right).float().mean().item()
    assert shares["exact"] > 0.8 and shares["erl"] > 0.3 and shares["constant"] < 0.2, shares


def test_a_count_of_bytes_is_as_good_as_it_can_be_on_what_it_has_seen():
    text = torch.arange(4).repeat(600).numpy().astype("uint16")
    windows = torch.from_numpy(text[: headroom.T + 1].astype("int64"))[None]
    assert headroom.count_perplexity(text, windows, 4) < 1.2 < headroom.count_perplexity(text, windows, 1)


def test_the_report_is_that_of_the_rows():
    found = headroom_report.report(*map(headroom.read_rows, ("e1", "checks", "e1-free", "e1-prob")))
    assert (headroom_report.FOLDER / "e1.md").read_text() == found
