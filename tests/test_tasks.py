"""support/tasks.py: the order of examples, batches and what counts in them, and what a run says of its data."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import BYTES, MICRO, args_of, summary_of

import data
import train
from support.errors import UserError
from support.tasks import Order, TextBatches, load_task, pad

moderate = settings(deadline=None, max_examples=30)

# ------------------------------------------------------------------------------------------------- order and batches


@moderate
@given(st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_each_epoch_visits_all_items_however_the_draws_are_asked_for(count, seed, chunks):
    total = sum(chunks)
    order, drawn, at = Order(count, seed), [], 0
    for n in chunks:
        drawn += order(at, n)
        at += n
    assert drawn == Order(count, seed)(0, total)  # in one go
    assert drawn[total // 2 :] == Order(count, seed)(total // 2, total - total // 2)  # from the middle on
    assert [epoch for epoch, _ in drawn] == [n // count for n in range(total)]
    for start in range(0, total - count + 1, count):
        assert sorted(item for _, item in drawn[start : start + count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = Order(50, 0)(0, 50), Order(50, 0)(50, 50)
    assert [i for _, i in first] != [i for _, i in second]
    assert first != Order(50, 1)(0, 50)


@moderate
@given(st.integers(3, 200), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_training_windows_do_not_overlap_and_targets_are_the_next_tokens(length, context, batch_size, seed):
    tokens = np.arange(length, dtype=np.uint16)  # a token's value is its place
    batches = TextBatches(tokens, context, batch_size, seed)
    steps = -(-2 * batches.per_epoch // batch_size)  # two epochs, up to the batch in which they end
    rows = []
    for step in range(steps):
        tokens, mask, routed = batches(step)
        assert tokens.dtype == torch.int64 and mask.dtype == routed.dtype == torch.bool
        assert tokens.shape == (batch_size, batches.context + 1)
        assert mask.shape == routed.shape == (batch_size, batches.context)
        assert mask.all() and routed.all()
        rows += tokens
    for row in rows:
        assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + len(row)))  # inputs row[:-1], targets row[1:]
    for epoch in range(2):
        part = rows[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]
        predicted = torch.cat([row[1:] for row in part]).tolist()
        assert len(set(predicted)) == len(predicted)
        assert len(predicted) > length - 1 - 2 * batches.context  # little is left out


@moderate
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=5))
def test_only_the_answer_and_its_end_token_are_learned_and_all_but_padding_is_routed(lengths):
    end = 99
    encoded = [data.Encoded([10 + i] * p + list(range(20, 20 + a)) + [end], p) for i, (p, a) in enumerate(lengths)]
    tokens, mask, routed = pad(encoded, end)
    width = max(p + a + 1 for p, a in lengths)
    assert tokens.shape == (len(lengths), width) and mask.shape == routed.shape == (len(lengths), width - 1)
    for i, (row, (p, a)) in enumerate(zip(tokens, lengths, strict=True)):
        assert row[1:][mask[i]].tolist() == [*range(20, 20 + a), end]
        assert row[:-1][routed[i]].tolist() == [10 + i] * p + list(range(20, 20 + a))  # all but the end, which is last


def test_counts_are_said_once(tmp_path, micro, capsys):
    """Prompts longer than the context are cut from the left, records without an answer left out; both are counted."""
    rows = [
        {"dialogue": "A: hi " * 20, "summary": "They greet."},  # cut
        {"dialogue": "A: hi", "summary": "A greets."},
        {"dialogue": "", "summary": "Nobody is there."},  # empty
        {"dialogue": "A: hi", "summary": "x" * 60},  # an answer longer than the context
    ]
    for name in ("train", "val", "test"):
        path = tmp_path / "data" / "samsum" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = "--dataset samsum --tokenizer bytes --data-dir data --max-new-tokens 12"
    task = load_task(args_of(f"--algo erl {flags}"), MICRO["context"], generative=False)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "samsum: 1 of 4 training examples had their prompt cut from the left (context 32 tokens)",
        "samsum: 2 of 4 training examples were left out (context 32 tokens)",
        "samsum: 2 of 6 held-out prompts are cut from the left to 20 tokens, 2 held-out records lack a prompt or a "
        "reference",
    ]
    tokens, mask, _ = task.batch(0)
    assert tokens.shape[1] <= 32 and mask.any(1).all()
    prompt = BYTES.decode(data.encode_prompt(task.held_out["test"][0], BYTES, 20))
    assert prompt.endswith("\nTL;DR:")  # the cue stays

    load_task(
        args_of(f"--algo grpo {flags}"), MICRO["context"], generative=True
    )  # a response needs room even behind a short answer
    said = capsys.readouterr().err
    assert "2 of 4 training examples had their prompt cut" not in said
    assert (
        "2 of 4 training examples were left out of the supervised phase (context" in said
    )  # and are asked all the same


def test_no_room_for_a_prompt(micro):
    with pytest.raises(UserError, match="--max-new-tokens 32 leaves no room"):
        load_task(args_of("--algo grpo --dataset addition --max-new-tokens 32"), MICRO["context"], generative=True)


def test_epochs_are_passes_over_the_training_data(micro):
    small = (
        "--dataset addition --eval-samples 2 --test-samples 2 --pretrain-steps 1 --checkpoint-every 99 --eval-every 99"
    )
    items = len(data.load_examples("addition", "train"))
    for algo, draws in (("dense", "--batch-size 50"), ("grpo", "--prompts-per-step 50 --minibatches 1")):
        args = args_of(f"--algo {algo} {small} {draws} --epochs 0.01 --group-size 2 --max-new-tokens 1 --out {algo}")
        train.run(args)
        assert args.steps == math.ceil(0.01 * items / 50) == 2
        assert summary_of(algo)["steps"] == 3  # with the one before the algorithm
