"""What eval_routing.py evaluates: the model of a run, and the samples of a data set."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import data
from moe import GPT
from support.arguments import read_config
from support.checkpoints import find_checkpoint, load_model
from support.errors import UserError, as_user_error
from support.evaluation import text_windows
from support.tasks import rng


def load_run(folder: str) -> tuple[GPT, dict, dict]:
    """A run's model, its arguments (config.json) and the checkpoint's metadata."""
    config, checkpoint = read_config(folder), find_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint yet: wait for its first one, or continue it with --resume")
    with as_user_error():
        model, metadata = load_model(checkpoint)
    if not model.config.moe_blocks:
        raise UserError(f"{folder} is a dense model: it has no routes to rank")
    return model, config, metadata


class Samples(NamedTuple):
    spec: data.DatasetSpec
    tokenizer: data.Tokenizer
    items: list  # in an order drawn from the seed: windows (tokens [T + 1], mask [T]) of a text, or data.Example
    max_new_tokens: int  # of an answer
    room: int  # for a prompt

    def prompt(self, example) -> list[int]:
        return data.encode_prompt(example, self.tokenizer, self.room)

    def reference(self, item) -> tuple[list[int], int]:
        """A sample's tokens (T + 1), of a task with the reference answer, and the first prediction that counts."""
        if self.spec.kind == "text":
            tokens, mask = item
            return tokens[: int(mask.sum()) + 1].tolist(), 0
        prompt, answer = self.prompt(item), self.tokenizer.encode(item.answer)[: self.max_new_tokens]
        return [*prompt, *answer, self.tokenizer.end], len(prompt) - 1


def load_samples(args, model: GPT, config: dict) -> Samples:
    """All samples of the split; the first --samples of them are ranked."""
    context, name = model.config.context, args.dataset or config["dataset"]
    data_dir = args.data_dir or config["data_dir"]
    spec, tokenizer = data.get_dataset(name), data.load_tokenizer(config["tokenizer"], data_dir)
    if tokenizer.vocab_size != model.config.vocab_size:
        sizes = f"a vocabulary of {model.config.vocab_size}, its config.json's tokenizer one of {tokenizer.vocab_size}"
        raise UserError(f"{args.run} is not one run: its model has {sizes}")
    if spec.kind == "text":
        windows = list(text_windows(data.load_text(name, args.split, tokenizer, data_dir=data_dir).tokens, context))
        windows = [w for w in windows if w[1].all()] or windows  # the short last one only where there is no other
        items = [windows[i] for i in torch.randperm(len(windows), generator=rng(args.seed, "samples"))]
    else:
        items = data.load_examples(name, args.split, data_dir=data_dir, seed=args.seed)
    if not items:
        raise UserError(f"{name} has no sample in its {args.split} split")
    of_the_run = name in (config["dataset"], *data.get_dataset(config["dataset"]).test_sets)  # answers as long as there
    new = config["max_new_tokens"] if of_the_run else min(spec.max_new_tokens, context // 2)
    return Samples(spec, tokenizer, items, new, context - new)


COMPARED_TOKENS, SMALLEST_CLUSTER = 10_000, 100  # ERPO figure 3: smaller clusters say nothing and are left blank


@torch.no_grad()
def expert_consistency(first: GPT, second: GPT, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ERPO figure 3, from `first` to `second` over the same rows of tokens.

    -> share [L, E] of the tokens that `first` routes to an expert and `second` too (NaN without a token), and the
    number of those tokens, int64 [L, E].
    """
    tokens_of, kept, every = 0, 0, torch.arange(first.config.n_expert, device=first.wte.weight.device)
    for row in rows:
        tokens = torch.tensor([row], device=every.device)
        used = [(m(tokens)[1].experts[0, ..., None] == every).any(2) for m in (first, second)]  # [T, L, E] each
        tokens_of, kept = tokens_of + used[0].sum(0), kept + (used[0] & used[1]).sum(0)
    return (kept / tokens_of).cpu(), tokens_of.cpu()


def compare(args, model: GPT, config: dict, samples: Samples) -> dict:
    """Which tokens stay with their expert from one run to the other, over COMPARED_TOKENS or more where there are."""
    second, second_config, _ = load_run(args.compare)
    same_sizes = replace(second.config, gate=model.config.gate) == model.config
    if not same_sizes or config["tokenizer"] != second_config["tokenizer"]:
        raise UserError(f"{args.run} and {args.compare} cannot be compared: their models or tokenizers differ")
    rows, count = [], 0
    for i, item in enumerate(samples.items):
        if i >= args.samples and count >= COMPARED_TOKENS:
            break
        rows.append(samples.reference(item)[0][:-1])  # of a task prompt and answer: the same text for both
        count += len(rows[-1])
    share, tokens = expert_consistency(model, second.to(model.wte.weight.device), rows)
    shown = share.masked_fill(tokens < SMALLEST_CLUSTER, math.nan).tolist()
    result = {"compared_with": args.compare, "compared_tokens": count, "smallest_cluster": SMALLEST_CLUSTER}
    result["expert_consistency"] = [[None if math.isnan(x) else x for x in row] for row in shown]
    return result | {"expert_consistency_tokens": tokens.tolist()}
