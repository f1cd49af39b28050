"""What eval_routing.py evaluates: the model of a run, and the samples of a data set."""

import os
from typing import NamedTuple

import torch

import data
from moe import GPT
from support.arguments import check_types, read_config
from support.checkpoints import is_finite, load_model
from support.errors import UserError, plainly
from support.evaluation import text_windows
from support.run_folder import find_checkpoint
from support.tasks import rng


def load_run(folder: str) -> tuple[GPT, dict, dict]:
    """A run's model, its arguments (config.json) and the checkpoint's metadata."""
    config = read_config(folder)
    wanted = {"dataset": str, "tokenizer": str, "data_dir": str | None, "max_new_tokens": int}
    check_types(folder, config, wanted)
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint yet: wait for its first one, or continue it with --resume")
    model, metadata = plainly(load_model, os.path.join(checkpoint, "model.safetensors"))
    if not model.config.moe_blocks:
        raise UserError(f"{folder} is a dense model: it has no routes to rank")
    if not is_finite(model):
        raise UserError(f"{folder} holds weights that are not finite: this checkpoint is broken")
    if not 0 < config["max_new_tokens"] < model.config.context:
        new, context = config["max_new_tokens"], model.config.context
        raise UserError(f"{folder} is not one run: answers of {new} tokens do not fit into its context of {context}")
    return model, {name: config.get(name) for name in wanted}, metadata


class Samples(NamedTuple):
    spec: data.DatasetSpec
    tokenizer: data.Tokenizer
    items: list  # in an order drawn from the seed: windows (tokens [T + 1], mask [T]) of a text, or data.Example
    max_new_tokens: int  # of an answer


def load_samples(args, model: GPT, config: dict) -> Samples:
    """All samples of the split; the first --samples of them are ranked."""
    context, name = model.config.context, args.dataset or config["dataset"]
    data_dir = args.data_dir or config["data_dir"]
    spec, tokenizer = data.get_dataset(name), data.load_tokenizer(config["tokenizer"], data_dir)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{args.run} is not one run: its model has a vocabulary of {model.config.vocab_size}, the "
            f"tokenizer of its config.json one of {tokenizer.vocab_size}"
        )
    if spec.kind == "text":
        text = data.load_text(name, args.split, tokenizer, data_dir=data_dir)
        windows = list(text_windows(text.tokens, context))
        windows = [w for w in windows if w[1].all()] or windows  # the short last one only where there is no other
        order = torch.randperm(len(windows), generator=rng(args.seed, "samples"))
        items = [windows[i] for i in order]
    else:
        items = data.load_examples(name, args.split, data_dir=data_dir, seed=args.seed)
    if not items:
        raise UserError(f"{name} has no sample in its {args.split} split")
    of_the_run = name in (config["dataset"], *data.get_dataset(config["dataset"]).test_sets)  # answers as long as there
    new = config["max_new_tokens"] if of_the_run else None
    return Samples(spec, tokenizer, items, new or min(spec.max_new_tokens, context // 2))


def prompt_of(example, model: GPT, samples: Samples) -> list[int]:
    return data.encode_prompt(example, samples.tokenizer, model.config.context - samples.max_new_tokens)
