"""support/tasks.py: the order of examples, batches and what counts in them, and what a run says of its data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import BYTES, MICRO, args_of, summary_of

import data
import train
from support.errors import UserError
from support.tasks import Order, TextBatches, load_task, pad, rng

moderate = settings(deadline=None, max_examples=30)


@moderate
@given(st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_each_epoch_visits_all_items_however_the_draws_are_asked_for(count, seed, chunks):
    total, order, drawn = sum(chunks), Order(count, seed), []
    for n in chunks:
        drawn += order(len(drawn), n)
    assert drawn == Order(count, seed)(0, total)  # in one go
    assert drawn[total // 2 :] == Order(count, seed)(total // 2, total - total // 2)  # from the middle on
    assert [epoch for epoch, _ in drawn] == [n // count for n in range(total)]
    for start in range(0, total - count + 1, count):
        assert sorted(item for _, item in drawn[start : start + count]) == list(range(count))


def test_draws_are_those_of_their_key():
    first, second = Order(50, 0)(0, 50), Order(50, 0)(50, 50)
    assert [i for _, i in first] != [i for _, i in second] and first != Order(50, 1)(0, 50)
    assert Order(7, 3, "prompts")(5, 4) == [(0, 3), (0, 0), (1, 6), (1, 1)]  # what runs of other versions drew
    assert torch.randint(1000, (3,), generator=rng(0, "routes", 5)).tolist() == [898, 249, 234]


@moderate
@given(st.integers(3, 200), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_training_windows_do_not_overlap_and_targets_are_the_next_tokens(length, context, batch_size, seed):
    batches = TextBatches(np.arange(length, dtype=np.uint16), context, batch_size, seed)  # a token's value is its place
    rows = []
    for step in range(-(-2 * batches.per_epoch // batch_size)):  # two epochs, up to the batch in which they end
        tokens, mask, routed = batches(step)
        assert tokens.dtype == torch.int64 and tokens.shape == (batch_size, batches.context + 1)
        assert mask.shape == routed.shape == (batch_size, batches.context) and mask.all() and routed.all()
        rows += tokens
    for row in rows:
        assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + len(row)))  # inputs row[:-1], targets row[1:]
    for epoch in range(2):
        part = rows[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]
        predicted = torch.cat([row[1:] for row in part]).tolist()
        assert len(set(predicted)) == len(predicted) > length - 1 - 2 * batches.context  # little is left out


@moderate
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=5))
def test_only_the_answer_and_its_end_token_are_learned_and_all_but_padding_is_routed(lengths):
    encoded = [data.Encoded([10 + i] * p + list(range(20, 20 + a)) + [99], p) for i, (p, a) in enumerate(lengths)]
    tokens, mask, routed = pad(encoded, 99)
    assert len(tokens) == len(lengths) and mask.shape == routed.shape == tokens[:, 1:].shape
    for i, (row, (p, a)) in enumerate(zip(tokens, lengths, strict=True)):
        assert row[1:][mask[i]].tolist() == [*range(20, 20 + a), 99]
        assert row[:-1][routed[i]].tolist() == [10 + i] * p + list(range(20, 20 + a))  # all but the end, which is last


def test_what_is_cut_left_out_or_out_of_reach_is_said_once_and_changed_records_change_the_fingerprint(micro, capsys):
    def load(algo, last="A greets.", new=12):
        rows = [{"dialogue": "A: hi " * 20, "summary": "They greet."}, {"dialogue": "", "summary": "No prompt."}]  # cut
        rows += [{"dialogue": "A: hi", "summary": s} for s in ("x" * 60, last)]  # longer than the context, and whole
        for name in ("train", "val", "test"):
            Path("data/samsum").mkdir(parents=True, exist_ok=True)
            Path(f"data/samsum/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = f"--dataset samsum --tokenizer bytes --data-dir data --max-new-tokens {new}"
        task = load_task(args_of(f"--algo {algo} {flags}"), MICRO["context"], generative=algo == "grpo")
        return task, capsys.readouterr().err.splitlines()

    task, said = load("erl")
    assert said == [
        "samsum: 1 of 4 training examples had their prompt cut from the left (context 32 tokens)",
        "samsum: 2 of 4 training examples were left out (context 32 tokens)",
        "samsum: 2 of 6 held-out prompts are cut from the left to 20 tokens",
        "samsum: 2 held-out records lack a prompt or a right answer and were left out",
    ]
    tokens, mask, _ = task.batch(0)
    assert tokens.shape[1] <= 32 and mask.any(1).all()
    assert BYTES.decode(data.encode_prompt(task.held_out["test"][0], BYTES, 20)).endswith("\nTL;DR:")  # the cue stays
    with pytest.raises(UserError, match="--max-new-tokens 32 leaves no room"):
        load("grpo", new=32)
    again, said = load("grpo")
    assert "samsum: 2 of 4 training examples have an answer that does not fit into --max-new-tokens 12" in said
    assert "samsum: 2 of 4 training examples were left out of the supervised phase (context 32 tokens)" in said
    assert task.fingerprint == again.fingerprint != load("erl", "A greets!")[0].fingerprint


def test_epochs_are_passes_over_the_training_data(micro):
    small = "--dataset addition --eval-samples 2 --test-samples 2 --pretrain-steps 1 --max-new-tokens 1 --group-size 2"
    items = len(data.load_examples("addition", "train"))
    for algo, draws in (("dense", "--batch-size 50"), ("grpo", "--prompts-per-step 50 --minibatches 1")):
        args = args_of(
            f"--algo {algo} {small} {draws} --epochs 0.01 --checkpoint-every 99 --eval-every 99 --out {algo}"
        )
        train.run(args)
        assert args.steps == math.ceil(0.01 * items / 50) == 2
        assert summary_of(algo)["steps"] == 3  # with the one before the algorithm
