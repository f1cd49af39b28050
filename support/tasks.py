"""What a run reads of its data set: batches for next-token prediction, prompts to answer, held-out sets.

Every random draw is a function of (seed, what for, step): a resumed run needs no generator's state.
"""

import hashlib
import sys
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import data
from support.errors import UserError


def rng(*key) -> torch.Generator:
    """A CPU generator for one purpose, e.g. rng(seed, "routes", step). The same key draws the same numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Order:
    """The order in which `count` items are drawn: each epoch visits all of them, in an order of its own.

    What the n-th draw is depends on (seed, n) alone: a resumed run goes on where the killed one stopped.
    """

    def __init__(self, count: int, *key):
        self.count, self.key, self.epoch = count, key, None

    def __call__(self, start: int, number: int) -> list[tuple[int, int]]:
        """(epoch, item) of the draws start, start + 1, ..."""
        drawn = []
        for n in range(start, start + number):
            epoch, place = divmod(n, self.count)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = torch.randperm(self.count, generator=rng(*self.key, epoch)).tolist()
            drawn.append((epoch, self.order[place]))
        return drawn


class Batch(NamedTuple):
    tokens: Tensor  # int64 [B, T + 1]; position t reads token t and predicts token t + 1
    mask: Tensor  # bool [B, T], predictions that count: all of a text, of a task those of the answer and its end token
    routed: Tensor  # bool [B, T], positions that are not padding: prompts included

    def to(self, device) -> "Batch":
        """The mask stays on the CPU: choosing positions for the output head then waits for no device."""
        return Batch(self.tokens.to(device), self.mask, self.routed.to(device))


class TextBatches:
    def __init__(self, tokens, context: int, batch_size: int, seed: int):
        if len(tokens) < 3:
            raise UserError("the training text is empty")
        self.tokens, self.context = tokens, min(context, len(tokens) - 2)
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = max(1, (len(tokens) - 1) // self.context - 1)  # room for the epoch's offset
        self.order = Order(self.per_epoch, seed, "text")

    def __call__(self, step: int) -> Batch:
        rows = []
        for epoch, i in self.order(step * self.batch_size, self.batch_size):
            # the windows of every epoch begin elsewhere, or the same tokens would always lack context
            room = len(self.tokens) - 1 - self.per_epoch * self.context
            offset = int(torch.randint(room + 1, (), generator=rng(self.seed, "offset", epoch)))
            start = offset + i * self.context
            rows.append(torch.from_numpy(self.tokens[start : start + self.context + 1].astype("int64")))
        every = torch.ones(len(rows), self.context, dtype=torch.bool)
        return Batch(torch.stack(rows), every, every)


class TaskBatches:
    def __init__(self, encoded, batch_size: int, seed: int, end: int):
        self.encoded, self.batch_size, self.end, self.per_epoch = encoded, batch_size, end, len(encoded)
        self.order = Order(len(encoded), seed, "task")

    def __call__(self, step: int) -> Batch:
        return pad([self.encoded[i] for _, i in self.order(step * self.batch_size, self.batch_size)], self.end)


def pad(encoded, end: int) -> Batch:
    """Rows of data.Encoded, padded on the right."""
    width = max(len(e.tokens) for e in encoded)
    tokens = torch.tensor([e.tokens + [end] * (width - len(e.tokens)) for e in encoded])
    predicted = torch.arange(1, width)  # position t predicts token t + 1
    starts = torch.tensor([[e.answer_start] for e in encoded])
    stops = torch.tensor([[len(e.tokens)] for e in encoded])
    return Batch(tokens, (predicted >= starts) & (predicted < stops), predicted < stops)


class Task(NamedTuple):
    """Everything that a run reads of its data set."""

    spec: data.DatasetSpec
    tokenizer: data.Tokenizer
    batch: TextBatches | TaskBatches  # step -> Batch, for next-token prediction
    examples: list  # prompts to generate from
    order: Order  # in which they are asked
    room: int  # tokens a prompt may have
    held_out: dict  # "validation" and the test sets -> TextSplit or list of Example
    variant: str  # of the text, where there are several
    fingerprint: str = ""  # of the records that the run reads

    def prompts(self, step: int, number: int, group_size: int) -> tuple[list, list[list[int]]]:
        """The examples of a step and their prompts as tokens, each `group_size` times, one after the other."""
        examples = [self.examples[i] for _, i in self.order(step * number, number) for _ in range(group_size)]
        return examples, [data.encode_prompt(e, self.tokenizer, self.room) for e in examples]

    def rewards(self, rollout, examples) -> Tensor:
        """What the responses earn, float32 [B] on the CPU."""
        responses = [self.tokenizer.decode(row) for row in rollout.responses(self.tokenizer.end)]
        rewards = [float(data.reward(self.spec, r, e)) for r, e in zip(responses, examples, strict=True)]
        rewards = torch.tensor(rewards, dtype=torch.float32)
        if not rewards.isfinite().all():
            bad = int((~rewards.isfinite()).nonzero()[0])
            raise UserError(f"the reward of {responses[bad]!r} is {rewards[bad]}: a reward must be finite")
        return rewards


def load_task(args, context: int, generative: bool) -> Task:
    """The data set of a run. What is cut, left out or out of reach is counted once, on stderr."""
    spec, tokenizer = data.get_dataset(args.dataset), data.load_tokenizer(args.tokenizer, args.data_dir)
    room = context - args.max_new_tokens
    if room < 2:
        leaves = f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt"
        raise UserError(f"{leaves}: the context has {context} positions")
    if spec.kind == "text":
        splits = {s: data.load_text(args.dataset, s, tokenizer, data_dir=args.data_dir) for s in data.SPLITS}
        batch, examples = TextBatches(splits["train"].tokens, context, args.batch_size, args.seed), []
        if generative:
            lengths = {"prompt_tokens": room // 2, "answer_tokens": args.max_new_tokens}
            examples = data.continuation_examples(splits["train"], tokenizer, seed=args.seed, **lengths)
        held_out, variant = {s: splits[s] for s in ("validation", "test")}, splits["test"].variant
    else:
        load, variant = partial(data.load_examples, data_dir=args.data_dir), spec.name
        examples = load(args.dataset, "train")
        held_out = {"validation": load(spec.name, "validation", limit=args.eval_samples or None)}
        for name in spec.test_sets or (spec.name,):
            held_out["test" if name == spec.name else name] = load(name, "test", limit=args.test_samples or None)
        new = args.max_new_tokens if generative else 0
        encoded, counts = data.encode_examples(examples, tokenizer, context, max_new_tokens=new)
        _report_counts(spec, counts, context, held_out, tokenizer, room, new)
        if not encoded:
            raise UserError(f"no training example of {args.dataset} fits into {context} tokens")
        batch = TaskBatches(encoded, args.batch_size, args.seed, tokenizer.end)
    order = Order(max(1, len(examples)), args.seed, "prompts")
    read = hashlib.sha256()
    for records in (splits["train"] if spec.kind == "text" else examples, *held_out.values()):
        read.update(repr(records).encode() if isinstance(records, list) else records.tokens.tobytes())
    return Task(spec, tokenizer, batch, examples, order, room, held_out, variant, read.hexdigest()[:16])


def _report_counts(spec, counts: dict, context: int, held_out: dict, tokenizer, room: int, new: int):
    questions = [e for split in held_out.values() for e in split]
    cut = sum(len(tokenizer.encode(e.prompt)) > room for e in questions)
    skipped = sum(split.skipped for split in held_out.values())
    examples = f"of {counts['kept'] + counts['skipped']} training examples"
    left_out = "were left out" + " of the supervised phase" * bool(new)  # the policy may be asked them all the same
    for count, text in (
        (counts["cut"], f"{examples} had their prompt cut from the left (context {context} tokens)"),
        (counts["skipped"], f"{examples} {left_out} (context {context} tokens)"),
        (counts["unreachable"], f"{examples} have an answer that does not fit into --max-new-tokens {new}"),
        (cut, f"of {len(questions)} held-out prompts are cut from the left to {room} tokens"),
        (skipped, "held-out records lack a prompt or a right answer and were left out"),
    ):
        if count:
            print(f"{spec.name}: {count} {text}", file=sys.stderr)
