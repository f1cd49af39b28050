"""support/tasks.py: the order of examples, batches and what counts in them, and what a run says of its data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import BYTES, MICRO, args_of, summary_of

import data
import train
from support.tasks import Order, TextBatches, load_task, pad, rng

moderate = settings(deadline=None, max_examples=30)


@moderate
@given(st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_each_epoch_visits_all_items_however_the_draws_are_asked_for(count, seed, chunks):
    total, order, drawn = sum(chunks), Order(count, seed), []
    for n in chunks:
        drawn += order(len(drawn), n)
    assert drawn == [draw for n in range(total) for draw in Order(count, seed)(n, 1)]  # each by itself
    assert [epoch for epoch, _ in drawn] == [n // count for n in range(total)]
    assert all(sorted(i for e, i in drawn if e == epoch) == list(range(count)) for epoch in range(total // count))


def test_draws_are_those_of_their_key():
    assert Order(50, 0)(0, 50) != Order(50, 1)(0, 50) != [(0, i) for _, i in Order(50, 1)(50, 50)]
    assert Order(7, 3, "prompts")(5, 4) == [(0, 3), (0, 0), (1, 6), (1, 1)]  # what runs of other versions drew
    assert torch.randint(1000, (3,), generator=rng(0, "routes", 5)).tolist() == [898, 249, 234]
    assert TextBatches(np.arange(99, dtype=np.uint16), 10, 6, 0)(1).tokens[:, 0].tolist() == [81, 51, 57, 17, 87, 27]


@moderate
@given(st.integers(3, 200), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_training_windows_do_not_overlap_and_targets_are_the_next_tokens(length, context, batch_size, seed):
    batches = TextBatches(np.arange(length, dtype=np.uint16), context, batch_size, seed)  # a token's value is its place
    rows = []
    for step in range(-(-2 * batches.per_epoch // batch_size)):  # two epochs, up to the batch in which they end
        tokens, mask, routed = batches(step)
        assert tokens.dtype == torch.int64 and mask.all() and routed.all()
        assert mask.shape == routed.shape == tokens[:, 1:].shape == (batch_size, batches.context)
        rows += tokens
    assert torch.equal(TextBatches(batches.tokens, context, batch_size, seed)(step).tokens, tokens)  # of step alone
    assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + len(row))) for row in rows)  # one after another
    for part in (rows[: batches.per_epoch], rows[batches.per_epoch : 2 * batches.per_epoch]):
        predicted = torch.cat([row[1:] for row in part]).tolist()
        assert len(set(predicted)) == len(predicted) > length - 1 - 2 * batches.context  # little is left out


@moderate
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=5))
def test_only_the_answer_and_its_end_token_are_learned_and_all_but_padding_is_routed(lengths):
    encoded = [data.Encoded([10 + i] * p + list(range(20, 20 + a)) + [99], p) for i, (p, a) in enumerate(lengths)]
    tokens, mask, routed = pad(encoded, 99)
    for i, (row, (p, a)) in enumerate(zip(tokens, lengths, strict=True)):
        assert row[1:][mask[i]].tolist() == [*range(20, 20 + a), 99]
        assert row[:-1][routed[i]].tolist() == [10 + i] * p + list(range(20, 20 + a))  # all but the end, which is last


def load(algo="erl", new=12, **last):
    """Of three equal splits, but for the last summary where it is given: one prompt that is cut, two rows left out."""
    Path("data/samsum").mkdir(parents=True, exist_ok=True)
    for name in ("train", "val", "test"):
        summaries = ("A: hi " * 20, "They greet."), ("", "No."), ("A: hi", "x" * 60), ("A: hi", last.get(name, "Hi."))
        rows = "\n".join(json.dumps({"dialogue": d, "summary": s}) for d, s in summaries)
        Path(f"data/samsum/{name}.jsonl").write_text(rows)
    flags = f"--algo {algo} --dataset samsum --tokenizer bytes --data-dir data --max-new-tokens {new}"
    return load_task(args_of(flags), MICRO["context"], generative=algo == "grpo")


def test_what_is_cut_left_out_or_out_of_reach_is_counted_once(micro, capsys):
    task, counts = load(), ["1 of 4", "2 of 4", "2 of 6", "2 held-out"]
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"samsum: {count}") for line, count in zip(said, counts, strict=True)] == [True] * 4, said
    assert task.batch(0).tokens.shape[1] <= 32 and task.batch(0).mask.any(1).all()
    assert BYTES.decode(data.encode_prompt(task.held_out["test"][0], BYTES, 20)).endswith("\nTL;DR:")  # the cue stays
    load("grpo")
    assert "2 of 4 training examples have an answer that does not fit" in capsys.readouterr().err
    with pytest.raises(data.UserError, match="--max-new-tokens 32 leaves no room"):
        load("grpo", new=32)


def test_a_changed_record_of_any_split_changes_the_fingerprint_and_nothing_else_does(micro):
    tasks = load(), load("grpo", new=8), load(train="Ho."), load(val="Ho."), load(test="Ho.")
    assert tasks[0].fingerprint == tasks[1].fingerprint and len({task.fingerprint for task in tasks}) == 4
    assert all(map(torch.equal, tasks[0].batch(3), load().batch(3)))  # a batch is a function of the seed and the step


def test_epochs_are_passes_over_the_training_data(micro):
    small = "--dataset addition --eval-samples 2 --test-samples 2 --pretrain-steps 1 --max-new-tokens 1 --group-size 2"
    for algo, draws in (("dense", "--batch-size 50"), ("grpo", "--prompts-per-step 50 --minibatches 1")):
        args = args_of(f"--algo {algo} {small} {draws} --epochs 0.01 --out {algo}")
        train.run(args)
        assert 50 < 0.01 * len(data.load_examples("addition", "train")) < 100
        assert args.steps == 2 == summary_of(algo)["steps"] - 1  # one step before the algorithm
