"""support/evaluation.py: windows, perplexity and bits per byte by the book, and of how many samples a score is."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from training import BYTES, args_of, make, rows_of, summary_of

import data
import train
from support.evaluation import evaluate_text, text_windows

moderate = settings(deadline=None, max_examples=30)


@moderate
@given(st.integers(2, 300), st.integers(1, 40))
def test_every_token_but_the_first_is_predicted_exactly_once(length, context):
    tokens = np.arange(length, dtype=np.uint16)
    predicted = []
    for window, mask in text_windows(tokens, context):
        assert window.shape == (context + 1,) and mask.shape == (context,)
        inputs, targets = window[:-1][mask], window[1:][mask]
        assert torch.equal(targets, inputs + 1)
        predicted += targets.tolist()
    assert predicted == list(range(1, length))


@moderate
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 10))
def test_a_limit_takes_that_many_different_windows(length, context, limit):
    tokens = np.arange(length, dtype=np.uint16)
    every = [window.tolist() for window, _ in text_windows(tokens, context)]
    some = [window.tolist() for window, _ in text_windows(tokens, context, limit)]
    assert len(some) == min(limit, len(every))
    places = [every.index(window) for window in some]
    assert sorted(set(places)) == places
    if len(some) > 1:
        assert max(np.diff(places)) <= -(-len(every) // len(some))  # spread over the whole split


def test_perplexity_and_bits_per_byte_by_the_book():
    model, _ = make(vocab_size=257, context=12, dtype=torch.float32)
    text = "Straße, naïve, 東京: forty tokens or a few more."
    split = data.TextSplit(np.array([BYTES.end, *BYTES.encode(text)], dtype=np.uint16), len(text.encode()))
    nll = []
    for start in range(0, len(split.tokens) - 1, 12):
        window = torch.tensor(split.tokens[start : start + 13].tolist())[None]
        log_probs = F.log_softmax(model(window[:, :-1]).logits, -1)[0]
        nll += [-log_probs[t, window[0, t + 1]].item() for t in range(window.shape[1] - 1)]
    assert len(nll) == len(split.tokens) - 1 and len(nll) % 12
    for batch_size in (1, 3, 8):  # the last window's padding counts nowhere
        scores = evaluate_text(model, split, batch_size)
        assert scores["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
        assert scores["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / len(text.encode()), rel=1e-5)
    some = evaluate_text(model, split, 8, limit=1)
    assert some["loss"] == pytest.approx(sum(nll[:12]) / 12, rel=1e-5)
    assert "bits_per_byte" not in some  # only the whole split has a number of bytes

    assert scores["samples"] == -(-(len(split.tokens) - 1) // 12) and some["samples"] == 1


# ----------------------------------------------------------------------------------------------- of how many samples

SHORT = "--batch-size 2 --pretrain-steps 1 --steps 1"


def test_test_samples_limits_the_final_evaluation_and_both_say_of_how_many(micro, capsys):
    args = args_of(f"--algo lm --dataset addition {SHORT} --eval-samples 3 --test-samples 5 --max-new-tokens 3 --out r")
    train.run(args)
    assert "(addition, 5 examples)" in capsys.readouterr().out
    assert summary_of()["test_samples"] == 5 and summary_of()["validation_samples"] == 3
    seen = {(r["split"], r["samples"]) for r in rows_of() if r["phase"] == "evaluation"}
    assert seen == {("validation", 3), ("test", 5)}


def test_of_a_text_the_whole_test_split_is_scored_unless_asked_otherwise(micro, monkeypatch, capsys):
    texts = {split: data._pydocs(split)[:700] for split in data.SPLITS}
    monkeypatch.setattr(data, "_pydocs", texts.get)
    windows = -(-700 // 32)
    for flags, tested in (("", windows), ("--test-samples 4", 4)):
        out = f"r{tested}"
        train.run(args_of(f"--algo lm --dataset pydocs {SHORT} --eval-samples 3 {flags} --out {out}"))
        summary = summary_of(out)
        assert summary["test_samples"] == tested and summary["validation_samples"] == 3
        assert ("bits_per_byte" in summary) == (not flags)  # only the whole split has a number of bytes
        assert f", {tested} windows) after 2 steps" in capsys.readouterr().out


def test_large_task_sets_are_tested_on_a_stated_number():
    for name in ("samsum", "xsum", "squad", "gsm8k"):
        assert args_of(f"--algo lm --dataset {name} --tokenizer bytes").test_samples == data.DATASETS[name].test_samples
    assert data.DATASETS["xsum"].test_samples == data.DATASETS["squad"].test_samples == 500
    for name in ("pydocs", "wikitext2", "addition"):
        assert args_of(f"--algo lm --dataset {name} --tokenizer bytes").test_samples == 0
