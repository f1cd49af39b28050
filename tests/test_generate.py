"""support/generation.py: sampling, generation against teacher-forced forwards, another precision, beam search."""

import itertools

import numpy as np
import pytest
import test_moe
import torch
from test_moe import random_routes, rng

from moe import MIN_TEMPERATURE, Routes
from support.generation import Cache, beam_search, generate, sample_tokens, sampler_of

VARIANTS = [dict(n_expert=1), dict(top_k=2), dict(top_k=1, n_shared_expert=1, gate="prob", moe_every=1)]
PROMPTS = [[3, 1, 2], [4], [2, 2, 2, 2, 2, 1], [4], [1, 4]]  # of different lengths, one of them twice
END = 0
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def make(seed=0, **variant):
    return test_moe.make(seed, **dict(vocab_size=6, context=24, top_k=1) | variant)


@torch.no_grad()
def teacher_forced(model, tokens, routes=None, temperature=1.0):
    """-> log-probabilities [B, T, V], that of each next token [B, T], Routing"""
    features, routing = model(tokens[:, :-1], routes)
    log_probs = (model.head(features).float() / temperature).log_softmax(-1)
    return log_probs, log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1), routing


@pytest.mark.parametrize("V", [12, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3, 1e-60])  # the last one is 0 as a float32
def test_a_draw_is_the_inverse_of_the_nucleus_distribution(V, top_p):
    """By the book: one uniform number a row from the generator; the nucleus is the likeliest words of mass top_p."""
    N = 400
    probs = (3 * torch.randn(N, V, generator=rng(1))).softmax(-1)
    words, u = sample_tokens(probs, top_p, rng(2)), torch.rand(N, 1, generator=rng(2)).squeeze(1).tolist()
    seen = set()
    for p, word, share in zip(probs.double().numpy(), words.tolist(), u, strict=True):
        order = np.argsort(-p) if top_p < 1 else np.arange(V)
        kept = order[: np.searchsorted(p[order].cumsum(), top_p) + 1]
        cdf = p[kept].cumsum() / p[kept].sum()
        place = kept.tolist().index(word)
        assert (cdf[place - 1] if place else 0) - 1e-5 <= share < cdf[place] + 1e-5
        seen.add(place)
    assert len(seen) > 1 or top_p < 0.1


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_a_word_of_probability_zero_is_never_drawn(u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, u))
    for top_p, shape in itertools.product((1.0, 0.9, 0.1), ((3000, 9), (30, 5000))):
        logits, g = torch.randn(shape, generator=rng()), rng(1)
        impossible = torch.randn(shape, generator=g) < 0.3
        words = sample_tokens(logits.masked_fill(impossible, -torch.inf).softmax(-1), top_p, g)
        assert not (impossible[torch.arange(len(words)), words] & ~impossible.all(1)).any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@variants
def test_recorded_while_generating_equals_a_teacher_forced_forward(variant, temperature):
    """Along its own routes, along explored ones and along replayed ones."""
    ends = set()
    for seed, uniform in enumerate((None, None, True, False)):
        model, how = make(seed, **variant), dict(temperature=temperature, top_p=0.95, max_new_tokens=9, end_token=END)
        routed, state = uniform is not None and model.config.moe_blocks, torch.get_rng_state()
        routes = random_routes(model, len(PROMPTS), 14, seed, uniform=uniform) if routed else None
        rollout, again = (generate(model, PROMPTS, routes=routes, generator=rng(seed), **how) for _ in range(2))
        assert all(map(torch.equal, rollout, again)) and torch.equal(torch.get_rng_state(), state)
        T = rollout.tokens.shape[1] - 1
        routes = routes and Routes(routes.experts[:, :T], routes.forced[:, :T], uniform)
        log_probs, picked, routing = teacher_forced(model, rollout.tokens, routes, temperature)
        expected = torch.zeros_like(rollout.response_mask)
        for b, start in enumerate(map(len, PROMPTS)):
            response = rollout.tokens[b, start : start + 9].tolist()
            end = start + (response.index(END) + 1 if END in response else len(response))
            assert rollout.tokens[b, :start].tolist() == PROMPTS[b] and (rollout.tokens[b, end:] == END).all()
            expected[b, start - 1 : end - 1] = True
            assert torch.equal(rollout.experts[b, : end - 1], routing.experts[b, : end - 1])
            ours, theirs = (x[b, : end - 1] for x in (rollout.expert_log_probs, routing.expert_log_probs()))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
            assert rollout.responses(END)[b] == [t for t in response if t != END]
            ends.add(end - start)
        assert torch.equal(rollout.response_mask, expected) and expected[:, -1].any()
        torch.testing.assert_close(rollout.log_probs, picked * expected, atol=1e-5, rtol=0)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        torch.testing.assert_close(rollout.entropies, entropies * expected, atol=1e-5, rtol=0)
    assert len(ends) > 3 and 9 in ends  # some ended, so the longer ones went on beside finished rows


def test_a_prompt_of_several_rows_is_read_once():
    model, read = make(1), []
    model.wte.register_forward_pre_hook(lambda _, tokens: read.append(tokens[0].shape))
    generate(model, PROMPTS, max_new_tokens=3, end_token=END, generator=rng())
    assert read[0] == (len(PROMPTS) - 1, 6) and set(read[1:]) == {(len(PROMPTS), 1)}


def test_temperatures_near_zero_are_the_coldest():
    model, how = make(8), dict(max_new_tokens=8, end_token=END)
    temperatures = 0, MIN_TEMPERATURE, 1e-10, 1e-38, 1e-45
    greedy, coldest, *colder = (generate(model, PROMPTS, temperature=t, generator=rng(), **how) for t in temperatures)
    assert all(torch.equal(a, b) for cold in colder for a, b in zip(cold, coldest, strict=True))
    assert coldest.log_probs.isfinite().all() and coldest.entropies.isfinite().all()
    assert torch.equal(coldest.tokens, greedy.tokens)


def test_what_is_refused():
    model, good = make(), dict(prompts=[[1] * 20], max_new_tokens=4, end_token=END)
    generate(model, **good)
    wrong = [("prompts", []), ("prompts", [[1], []]), ("prompts", [[1] * 21]), ("temperature", -1.0)]
    for name, value in [*wrong, *(("top_p", p) for p in (0.0, 1.1, float("nan")))]:
        with pytest.raises(ValueError, match=name.rstrip("s")):
            generate(model, **good | {name: value})


@variants
def test_a_bfloat16_sampler_differs_by_its_precision_alone(variant):
    """Log-probabilities near the trainer's but not equal, some near ties of the routers decided otherwise."""
    model = make(9, vocab_size=50, n_embd=32, context=64, **variant)
    assert sampler_of(model, torch.float32) is model
    before = {name: w.clone() for name, w in model.state_dict().items()}
    sampler, prompts = sampler_of(model, torch.bfloat16), torch.randint(1, 50, (32, 5), generator=rng()).tolist()
    rollout = generate(sampler, prompts, max_new_tokens=50, end_token=END, generator=rng(1))
    assert rollout.log_probs.dtype == rollout.entropies.dtype == rollout.expert_log_probs.dtype == torch.float32
    assert rollout.log_probs.bfloat16().ne(rollout.log_probs).any()  # from logits in bfloat16, not rounded to it
    mask = rollout.response_mask
    (_, picked, routing), (_, theirs, their_routing) = (teacher_forced(m, rollout.tokens) for m in (model, sampler))
    assert 1e-4 < (picked - rollout.log_probs)[mask].abs().mean() < 0.1
    assert (theirs - rollout.log_probs)[mask].abs().mean() < 0.1
    assert sampler.wte.weight.dtype == Cache(sampler, 1, 1, 2).layers[0].kept.dtype == torch.bfloat16
    for layer, block in enumerate(model.config.moe_blocks):
        router = sampler.blocks[block].mlp.router.weight
        assert router.dtype == torch.float32 and torch.equal(router, before[f"blocks.{block}.mlp.router.weight"])
        expected = their_routing.inputs[layer].float() @ router.T
        torch.testing.assert_close(their_routing.logits[:, :, layer], expected)
        moved = (routing.experts[:, :, layer].sort(-1).values != rollout.experts[:, :, layer].sort(-1).values).any(-1)
        assert 0 < moved[mask].float().mean() < 0.2
    assert all(torch.equal(w, before[name]) and w.dtype == torch.float32 for name, w in model.state_dict().items())
    assert not {w.data_ptr() for w in model.parameters()} & {w.data_ptr() for w in sampler.parameters()}


def best_of_all(model, prompt, n, V):
    """The response with the highest mean log-probability among all of them, with a forward for each."""
    scores = []
    for length in range(1, n + 1):
        for response in itertools.product(range(V), repeat=length):
            if END not in response[:-1] and (length == n or response[-1] == END):
                _, picked, _ = teacher_forced(model, torch.tensor([[*prompt, *response]]))
                scores.append((picked[0, -length:].mean().item(), [t for t in response if t != END]))
    return max(scores)[1]


@variants
def test_beam_search_finds_the_best_of_all_sequences(variant):
    prompts, found = [[3, 1, 2], [1], [2, 3]], set()
    for seed in range(3, 6):
        model = make(seed, vocab_size=4, **variant)
        model.wte.weight.data[END] *= 3  # so that short responses win too
        model.blocks[1].attn.proj.weight.data *= 10  # and what was written before matters
        expected = [best_of_all(model, p, 3, 4) for p in prompts]
        assert beam_search(model, prompts, max_new_tokens=3, end_token=END, beams=64) == expected
        found |= {len(e) for e in expected}
    assert len(found) > 1


@variants
def test_one_beam_is_greedy_and_beams_of_companions_do_not_mix(variant):
    model, how = make(10, **variant), dict(max_new_tokens=9, end_token=END)
    assert beam_search(model, PROMPTS, beams=1, **how) == generate(model, PROMPTS, temperature=0, **how).responses(END)
    assert beam_search(model, PROMPTS, **how) == [beam_search(model, [p], **how)[0] for p in PROMPTS]
