"""support/evaluation.py: scores of small cases whose numbers are known, and how each held-out set is asked."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import train
from moe import GPT, MoEConfig
from support.errors import UserError
from support.evaluation import evaluate, evaluate_text, mean_scores, text_windows
from support.generation import Rollout, beam_search, generate
from support.tasks import Task, rng

BYTES, END = data.load_tokenizer("bytes"), 256
ARGS = SimpleNamespace(seed=5, max_new_tokens=6, beams=3, temperature=0.3, top_p=0.95, eval_samples=2, test_samples=3)


def unigrams(context=4) -> GPT:
    """Predicts a with probability 1/2, b with 1/4, c and d with 1/8, whatever it has read."""
    model = GPT(MoEConfig(vocab_size=257, context=context, n_layer=1, n_head=1, n_embd=4, n_expert=1))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias[0] = 1.0  # logits: the embeddings' first dimension
        model.wte.weight[:, 0] = -100
        model.wte.weight[97:101, 0] = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log()
    return model


def split_of(text: str) -> data.TextSplit:
    return data.TextSplit(np.array([END, *BYTES.encode(text)], dtype=np.uint16), 20)


def task_of(spec, **held_out) -> Task:
    return Task(spec, BYTES, None, [], None, 10, held_out, "")


def test_windows_predict_every_token_but_the_first_once():
    for length, context in ((2, 5), (11, 5), (12, 5), (41, 4)):
        windows = list(text_windows(np.arange(length, dtype=np.uint16), context))
        assert all(torch.equal(tokens[:-1][mask] + 1, tokens[1:][mask]) for tokens, mask in windows)
        assert torch.cat([tokens[1:][mask] for tokens, mask in windows]).tolist() == list(range(1, length))
    for limit, starts in ((3, [0, 12, 24]), (4, [0, 8, 20, 28]), (1, [0])):  # of ten windows, evenly spread
        assert [w[0].item() for w, _ in text_windows(np.arange(41, dtype=np.uint16), 4, limit)] == starts


def test_perplexity_is_of_a_token_and_bits_are_of_a_byte():
    """Nine tokens in windows of 4, 4 and 1: 1 + 1 + 1 + 1, 2 + 2 + 2 + 2 and 3 bits. The text has 20 bytes."""
    split = split_of("aaaabbbbc")
    expected = {"loss": 15 / 9 * math.log(2), "perplexity": 2 ** (15 / 9), "bits_per_byte": 15 / 20, "samples": 3}
    for batch_size in (1, 2, 8):  # the last window's padding counts nowhere
        assert evaluate_text(unigrams(), split, batch_size) == pytest.approx(expected)
    assert "bits_per_byte" not in evaluate_text(unigrams(), split, 8, limit=2)  # only the whole split's bytes are known
    task = task_of(data.DATASETS["pydocs"], test=split_of("aaaabbbbbbbbcccc"))
    for final, bits, samples in ((False, 1.5, 2), (True, 5 / 3, 3)):  # windows 0 and 2; 0, 1 and 2
        scores = evaluate(unigrams(), task, "test", ARGS, final)
        assert scores["loss"] == pytest.approx(bits * math.log(2)) and scores["samples"] == samples


def toy(asked: list, **changes) -> data.DatasetSpec:
    """A task that writes down what it is asked to measure; the score is the place of the question."""
    measure = lambda response, e: asked.append((response, e.prompt)) or {"place": len(asked)}  # noqa: E731
    return data.DatasetSpec("toy", "task", "bytes", 6, measure, "place", "place", **changes)


def test_each_set_is_asked_as_its_own_spec_says(monkeypatch):
    """Not at the training temperature or top-p; from a seed of its own; responses to a problem side by side."""
    own, others = [], []
    spec = toy(own, eval_temperature=1.5, eval_top_p=0.8, samples_per_problem=3)
    examples = [data.Example(p, "", ()) for p in ("ab", "c", "which is longer than the room")]
    monkeypatch.setitem(data.DATASETS, "other", toy(others))
    task = task_of(spec, test=examples, other=examples)
    model = GPT(MoEConfig(vocab_size=257, context=16, n_layer=2, n_head=2, n_embd=16, n_expert=2), rng(1))
    model.wte.weight.data *= 20
    prompts, how = [BYTES.encode(e.prompt)[-10:] for e in examples], dict(max_new_tokens=6, end_token=END)
    rows, drawn = [0, 0, 0, 1, 1, 1, 2, 2, 2], dict(temperature=1.5, top_p=0.8, generator=rng(5, "evaluation", "test"))
    by_hand = generate(model, [prompts[i] for i in rows], **how, **drawn).responses(END)
    scores = evaluate(model, task, "test", ARGS)
    assert own == [(BYTES.decode(r), examples[i].prompt) for i, r in zip(rows, by_hand, strict=True)]
    assert scores == {"place": 5, "samples": 3} and len({r for r, _ in own}) > 3
    assert evaluate(model, task, "other", ARGS) == {"place": 2, "samples": 3} and len(own) == 9
    evaluate(model, task, "other", SimpleNamespace(**vars(ARGS) | {"beams": 1}))
    answers = beam_search(model, prompts, beams=3, **how), generate(model, prompts, temperature=0, **how).responses(END)
    assert [r for r, _ in others] == [BYTES.decode(row) for rows in answers for row in rows]


def test_a_broken_model_has_no_score():
    model = unigrams(16)
    model.ln_f.bias.data[0] = torch.nan
    for spec, held_out in ((data.DATASETS["pydocs"], split_of("abc")), (toy([]), [data.Example("a", "", ())])):
        with pytest.raises(UserError, match="not finite"):
            evaluate(model, task_of(spec, test=held_out), "test", ARGS)


def test_the_mean_over_test_sets_weighs_them_alike():
    one, two = {"share": 1.0, "samples": 1}, {"share": 0.0, "samples": 3}
    both = mean_scores({"x": one, "y": two})
    assert [both[k] for k in ("share", "samples", "share_x", "samples_y")] == [0.5, 4, 1.0, 3]
    assert mean_scores({}) == {} and mean_scores({"test": one}) == one


def test_accuracy_counts_full_rewards_and_entropy_is_a_mean_over_rows():
    entropies = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    rollout = Rollout(torch.tensor([[1, 2, 2, 2, 0], [1, 0, 0, 0, 0]]), entropies > 0, entropies, entropies, None, None)
    task, args = SimpleNamespace(tokenizer=SimpleNamespace(end=0)), SimpleNamespace(group_size=2)
    metrics = train.rollout_metrics(rollout, torch.tensor([0.9, 1.0]), task, args)
    assert metrics["accuracy"] == 0.5 and metrics["entropy"] == 2.0 and metrics["response_length"] == 2.5
