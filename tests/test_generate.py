"""support/generation.py: sampling, generation against teacher-forced forwards, beam search against all sequences."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoints import gpt2  # noqa: F401 (a fixture)
from test_moe import make, random_routes, rng

from moe import MIN_TEMPERATURE, Routes
from support import generation
from support.checkpoints import load_gpt2
from support.fast import speed_up
from support.generation import beam_search, generate, sample_tokens

VARIANTS = [
    dict(n_expert=1, top_k=1),
    dict(top_k=1),
    dict(top_k=2, n_shared_expert=1, gate="prob", moe_every=1),
    dict(top_k=1, expert_capacity=3),
    dict(top_k=2, expert_capacity=2, moe_every=1),
]
PROMPTS = [[3, 1, 2], [4], [2, 2, 2, 2, 2, 1], [4], [1, 4]]  # of different lengths, one of them twice
END = 0
seeds = st.integers(0, 10_000)
name_of = lambda v: " ".join(f"{k}={x}" for k, x in v.items())  # noqa: E731


def small(seed=0, **variant):
    return speed_up(make(seed, **dict(vocab_size=6, context=24) | variant))


def rows_of(rollout, max_new_tokens):
    """(row, length of the prompt, length with the response) of each of the PROMPTS, from the tokens alone."""
    for b, prompt in enumerate(PROMPTS):
        response = rollout.tokens[b, len(prompt) : len(prompt) + max_new_tokens].tolist()
        n = response.index(END) + 1 if END in response else len(response)
        yield b, len(prompt), len(prompt) + n


# ------------------------------------------------------------------------------------------------------------ sampling


def nucleus(probs, top_p):
    """The likeliest words until their mass reaches top_p, renormalised."""
    kept, mass = np.zeros_like(probs), 0.0
    for word in np.argsort(-probs):
        if mass >= top_p:
            break
        kept[word] = probs[word]
        mass += probs[word]
    return kept / kept.sum()


@pytest.mark.parametrize("V", [50, 5000])
@pytest.mark.parametrize("top_p", [1e-12, 1e-60])  # the second is 0 as a float32
def test_the_smallest_nucleus_is_the_likeliest_word(top_p, V):
    logits = torch.zeros(3, V)
    logits[torch.arange(3), torch.tensor([0, 7, V - 1])] = 1.0
    assert sample_tokens(logits, top_p, rng(0)).tolist() == [0, 7, V - 1]


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.5, 0.01])
def test_samples_follow_the_nucleus(top_p):
    """Frequencies of 40,000 draws within five standard deviations; no word outside of the nucleus."""
    N, V = 40_000, 12
    logits = 1.5 * torch.randn(V, generator=rng(1))
    expected = nucleus(logits.double().softmax(-1).numpy(), top_p)
    words = sample_tokens(logits.expand(N, V), top_p, rng(2))
    assert words.shape == (N,) and words.dtype == torch.int64
    counts = np.bincount(words.numpy(), minlength=V)
    assert not counts[expected == 0].any()
    assert (np.abs(counts / N - expected) <= 5 * np.sqrt(expected * (1 - expected) / N)).all()


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 70), st.integers(1, 20))
def test_the_search_in_runs_finds_the_same_words(seed, V, run):
    """Weights with zeros, runs that do not divide V; at the ends of the unit interval too."""
    g = rng(seed)
    weights = torch.rand(100, V, generator=g, dtype=torch.float64) * (torch.rand(100, V, generator=g) < 0.5)
    weights[:, seed % V] += 0.1
    u = torch.rand(100, 1, generator=g, dtype=torch.float64)
    u[0], u[1] = 0, 1 - 2**-24
    found = generation._invert_long_cdf(weights, u, run)
    assert torch.equal(found, generation._invert_cdf(weights, u))
    single = generation._invert_long_cdf(
        weights.float(), u.float(), run
    )  # rounding may move it, but to no impossible word
    assert (weights.gather(-1, single) > 0).all()


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0.05, 1.0))
def test_a_word_of_probability_zero_is_never_drawn(seed, top_p):
    g = rng(seed)
    logits = torch.randn(500, 9, generator=g)
    impossible = torch.rand(500, 9, generator=g) < 0.6
    impossible[:, seed % 9] = False
    logits[impossible] = -torch.inf
    words = sample_tokens(logits, top_p, g)
    assert not impossible[torch.arange(500), words].any()


def test_the_ends_of_the_unit_interval_draw_possible_words(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.3, 1.0, 0.1, -torch.inf, -torch.inf]])
    for u, word in ((0.0, 1), (1 - 2**-24, 3)):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **_: torch.full(shape, u))
        assert sample_tokens(logits).item() == word
        assert sample_tokens(logits, 0.999).item() == (2 if u == 0 else 3)


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_the_largest_number_below_one_draws_a_possible_word(seed):
    g = rng(seed)
    logits = 3 * torch.randn(200, 40, generator=g)
    logits[:, -(seed % 20 + 1) :] = -torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 2**-24))
        words = sample_tokens(logits)
    assert (logits[torch.arange(200), words] > -torch.inf).all()


def test_samples_come_from_the_generator_given():
    logits = torch.randn(50, 100, generator=rng(3))
    assert torch.equal(sample_tokens(logits, 0.9, rng(4)), sample_tokens(logits, 0.9, rng(4)))
    assert not torch.equal(sample_tokens(logits, 0.9, rng(4)), sample_tokens(logits, 0.9, rng(5)))
    for top_p in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="top_p"):
            sample_tokens(logits, top_p)


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_recorded_while_generating_equals_a_teacher_forced_forward(variant, temperature):
    ended = 0
    for seed in range(4):
        model = small(seed, **variant)
        rollout = generate(
            model, PROMPTS, max_new_tokens=9, end_token=END, temperature=temperature, generator=rng(seed), top_p=0.95
        )
        out = model(rollout.tokens[:, :-1])
        log_probs = (out.logits / temperature).log_softmax(-1)
        experts = out.routing.experts
        expert_log_probs = out.routing.expert_log_probs()
        for b, start, end in rows_of(rollout, 9):
            assert rollout.tokens[b, :start].tolist() == PROMPTS[b]
            assert torch.equal(rollout.experts[b, : end - 1], experts[b, : end - 1])
            torch.testing.assert_close(
                rollout.expert_log_probs[b, : end - 1], expert_log_probs[b, : end - 1], atol=1e-5, rtol=0
            )
            for t in range(start - 1, end - 1):
                ours = rollout.log_probs[b, t], rollout.entropies[b, t]
                entropy = -(log_probs[b, t].exp() * log_probs[b, t]).sum()
                assert abs(ours[0] - log_probs[b, t, rollout.tokens[b, t + 1]]) < 1e-5
                assert abs(ours[1] - entropy) < 1e-5
            ended += end - start < 9
    assert ended > 0  # some responses ended, so the longer ones went on beside finished rows


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=name_of)
def test_imposed_routes_are_used_while_generating(variant):
    model = small(5, **variant)
    routes = random_routes(model, len(PROMPTS), 6 + 9 - 1, seed=1)
    rollout = generate(model, PROMPTS, max_new_tokens=9, end_token=END, generator=rng(), routes=routes)
    T = rollout.tokens.shape[1] - 1
    out = model(rollout.tokens[:, :-1], routes=Routes(routes.experts[:, :T], routes.forced[:, :T]))
    log_probs = out.logits.log_softmax(-1).gather(-1, rollout.tokens[:, 1:, None]).squeeze(-1)
    for b, start, end in rows_of(rollout, 9):
        assert torch.equal(rollout.experts[b, : end - 1], out.routing.experts[b, : end - 1])
        s = slice(start - 1, end - 1)
        torch.testing.assert_close(rollout.log_probs[b, s], log_probs[b, s], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="14 positions"):
        short = Routes(routes.experts[:, :-1], routes.forced[:, :-1])
        generate(model, PROMPTS, max_new_tokens=9, end_token=END, routes=short)


def test_response_mask_holds_the_response_and_its_end_token():
    lengths = set()
    for seed in range(5):
        rollout = generate(small(seed), PROMPTS, max_new_tokens=7, end_token=END, generator=rng(seed))
        B, T = rollout.response_mask.shape
        assert rollout.tokens.shape == (B, T + 1) and B == len(PROMPTS)
        longest = 0
        for b, start, end in rows_of(rollout, 7):
            expected = [start - 1 <= t < end - 1 for t in range(T)]
            assert rollout.response_mask[b].tolist() == expected
            assert (rollout.tokens[b, end:] == END).all()
            assert not rollout.log_probs[b][~rollout.response_mask[b]].any()
            assert not rollout.entropies[b][~rollout.response_mask[b]].any()
            response = rollout.tokens[b, start:end].tolist()
            assert rollout.responses(END)[b] == [t for t in response if t != END]
            longest = max(longest, end)
            lengths.add(end - start)
        assert T == longest - 1
    assert len(lengths) > 3 and 7 in lengths


def test_a_prompt_may_hold_the_end_token():
    model = small(3)
    rollout = generate(model, [[1, END, 2, END]], max_new_tokens=4, end_token=END, generator=rng(1))
    assert not rollout.response_mask[0, :3].any() and rollout.response_mask[0, 3]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_generation_is_reproducible_and_moves_nothing_else(top_p):
    model = small(top_k=2, expert_capacity=2)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 1, 2]])
    before, state = model(tokens).logits, torch.get_rng_state()
    how = dict(max_new_tokens=9, end_token=END, top_p=top_p)
    first = generate(model, PROMPTS, generator=rng(1), **how)
    again = generate(model, PROMPTS, generator=rng(1), **how)
    other = generate(model, PROMPTS, generator=rng(2), **how)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(before, model(tokens).logits)
    assert not first.log_probs.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_companions_do_not_change_what_a_row_writes(variant):
    model = small(6, **variant)
    how = dict(max_new_tokens=9, end_token=END, temperature=0)
    together = generate(model, PROMPTS, **how).responses(END)
    assert together == [generate(model, [p], **how).responses(END)[0] for p in PROMPTS]


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_greedy_is_the_argmax_of_full_forwards(variant):
    model = small(7, **variant)
    rollout = generate(model, PROMPTS, max_new_tokens=8, end_token=END, temperature=0)
    for prompt, response in zip(PROMPTS, rollout.responses(END), strict=True):
        row = list(prompt)
        for _ in range(8):
            row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
            if row[-1] == END:
                break
        assert response == [t for t in row[len(prompt) :] if t != END]


def test_every_top_p_of_a_narrow_nucleus_is_greedy():
    model = small(8)
    how = dict(max_new_tokens=8, end_token=END)
    narrow = generate(model, PROMPTS, top_p=1e-6, generator=rng(), **how)
    assert torch.equal(narrow.tokens, generate(model, PROMPTS, temperature=0, **how).tokens)


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-10])
def test_temperatures_near_zero_are_the_coldest(temperature):
    """And not 0/0 or infinity, in the response or its records."""
    model = small(8)
    cold, coldest = (
        generate(model, PROMPTS, max_new_tokens=8, end_token=END, temperature=t, generator=rng())
        for t in (temperature, MIN_TEMPERATURE)
    )
    assert all(torch.equal(a, b) for a, b in zip(cold, coldest, strict=True))
    assert cold.log_probs.isfinite().all() and cold.entropies.isfinite().all()
    greedy = generate(model, PROMPTS, max_new_tokens=8, end_token=END, temperature=0)
    assert torch.equal(cold.tokens, greedy.tokens)


def test_generation_refuses_what_it_cannot_do():
    model = small()
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            generate(model, prompts, max_new_tokens=3, end_token=END)
        with pytest.raises(ValueError, match="at least one token"):
            beam_search(model, prompts, max_new_tokens=3, end_token=END)
    with pytest.raises(ValueError, match="20 tokens and 5 new ones .* context of 24"):
        generate(model, [[1] * 20], max_new_tokens=5, end_token=END)
    generate(model, [[1] * 20], max_new_tokens=4, end_token=END)
    with pytest.raises(ValueError, match="temperature"):
        generate(model, [[1]], max_new_tokens=3, end_token=END, temperature=-1.0)
    with pytest.raises(ValueError, match="top_p"):
        generate(model, [[1]], max_new_tokens=3, end_token=END, top_p=0.0)


def test_generation_under_bfloat16_autocast():
    """Same dtypes as without it; log-probabilities near those of a forward under autocast."""
    model = small(9, top_k=1)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = generate(model, PROMPTS, max_new_tokens=8, end_token=END, generator=rng())
        logits = model(rollout.tokens[:, :-1]).logits
    assert rollout.log_probs.dtype == rollout.expert_log_probs.dtype == torch.float32
    log_probs = logits.float().log_softmax(-1).gather(-1, rollout.tokens[:, 1:, None]).squeeze(-1)
    assert (rollout.log_probs - log_probs)[rollout.response_mask].abs().median() < 0.05


# --------------------------------------------------------------------------------------------------------- beam search


def best_of_all(model, prompt, n, V):
    """The response with the highest mean log-probability among all of them, with a forward for each."""
    best = (-np.inf, None)
    for length in range(1, n + 1):
        for response in itertools.product(range(V), repeat=length):
            ended = response[-1] == END
            if END in response[:-1] or (length < n and not ended):
                continue
            log_probs = model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
            total = sum(log_probs[len(prompt) - 1 + i, t].item() for i, t in enumerate(response))
            best = max(best, (total / length, [t for t in response if t != END]))
    return best[1]


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=name_of)
def test_beam_search_finds_the_best_of_all_sequences(variant):
    prompts, found = [[3, 1, 2], [1], [2, 3]], set()
    for seed in range(3, 6):
        model = small(seed, vocab_size=4, **variant)
        model.wte.weight.data[END] *= 3  # so that short responses win too
        expected = [best_of_all(model, p, 3, 4) for p in prompts]
        assert beam_search(model, prompts, max_new_tokens=3, end_token=END, beams=64) == expected
        found |= {len(e) for e in expected}
    assert len(found) > 1


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_one_beam_is_greedy(variant):
    model = small(10, **variant)
    greedy = generate(model, PROMPTS, max_new_tokens=9, end_token=END, temperature=0)
    assert beam_search(model, PROMPTS, max_new_tokens=9, end_token=END, beams=1) == greedy.responses(END)


def test_beams_of_companions_do_not_mix():
    model = small(11, top_k=2, expert_capacity=3)
    together = beam_search(model, PROMPTS, max_new_tokens=8, end_token=END, beams=6)
    assert together == [beam_search(model, [p], max_new_tokens=8, end_token=END, beams=6)[0] for p in PROMPTS]


# -------------------------------------------------------------------------------------------------------- transformers


def test_dense_generation_equals_that_of_transformers(gpt2):  # noqa: F811
    theirs, folder = gpt2
    prompts = torch.randint(1, 61, (4, 6), generator=rng(13))
    how = dict(do_sample=False, max_new_tokens=14, eos_token_id=0, pad_token_id=0)
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **how)
    ours = generate(load_gpt2(str(folder)), prompts.tolist(), max_new_tokens=14, end_token=0, temperature=0)
    width = min(expected.shape[1], ours.tokens.shape[1])
    assert torch.equal(ours.tokens[:, :width], expected[:, :width]) and width > 8
    assert not ours.tokens[:, width:].any() and not expected[:, width:].any()
