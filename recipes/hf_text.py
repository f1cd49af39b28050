"""What the recipes on text share: a transformers model, its tokenizer, windows of a data set, perplexity, files."""

import contextlib
import hashlib
import os
import shutil

import torch
from safetensors import SafetensorError

import data
from recipes.hf_routing import next_token_log_probs
from recipes.upcycle_hf import load_dense, upcycle
from support.errors import UserError
from support.routing_report import routing_report
from support.tasks import rng


def load_model(source: str, seed: int = 0, context: int = 1):
    """-> a mixture of experts in float32 and its tokenizer; a dense model is upcycled, its routers drawn from seed.

    In eval mode, which stays: dropout or router jitter between two passes would be taken for a gain of their routes.
    UserError where there is no model, or one of fewer than `context` positions.
    """
    try:
        model, tokenizer = load_dense(source)
        if not any(type(module).__name__.endswith("TopKRouter") for module in model.modules()):
            model = upcycle(model, generator=rng(seed, "router"))
    except (ValueError, OSError) as error:
        raise UserError(f"no model from {source!r}: {str(error).splitlines()[0]}") from error
    if context > model.config.max_position_embeddings:
        raise UserError(f"--context is at most {model.config.max_position_embeddings} in this model")
    return model.eval(), tokenizer


class HubTokenizer:
    """A transformers tokenizer as data.load_text wants it: text is only ever text."""

    def __init__(self, tokenizer):
        self.tokenizer, self.vocab_size, self.end = tokenizer, len(tokenizer), tokenizer.eos_token_id
        self.name = "hf-" + hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:8]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    def decode(self, ids) -> str:
        return self.tokenizer.decode([i for i in ids if i != self.end], clean_up_tokenization_spaces=False)


def load_windows(dataset, split, tokenizer, context, data_dir=None, limit=0) -> tuple[torch.Tensor, str]:
    """Whole windows of a split, int64 [N, context + 1], each token predicted once; limit: that many, evenly spread.

    And the name of the text: WikiText-2 is published raw and with <unk>, and their perplexities do not compare.
    """
    text = data.load_text(dataset, split, HubTokenizer(tokenizer), data_dir=data_dir)
    tokens = text.tokens
    count = (len(tokens) - 1) // context
    if not count:
        raise UserError(f"the {split} split of {dataset} has {len(tokens)} tokens: choose a context below that")
    chosen = [i * count // limit for i in range(limit)] if 0 < limit < count else range(count)
    rows = [torch.from_numpy(tokens[i * context :][: context + 1].astype("int64")) for i in chosen]
    return torch.stack(rows), text.variant


@torch.no_grad()
def evaluate(model, windows, accelerator, start=None):
    """Perplexity over windows [N, T + 1], which the processes share, and the routing report of this process's windows.

    start: router logits of an earlier evaluation, which the report then compares with -> figures, router logits.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    mine, logits, experts = torch.zeros(len(windows), device=accelerator.device), [], []
    for i in range(rank, len(windows), world):
        log_probs, tape = next_token_log_probs(model, windows[i : i + 1].to(accelerator.device))
        mine[i] = log_probs.double().mean()
        logits.append(torch.stack(tape.logits, 2).float().cpu())
        experts.append(tape.experts.cpu())
    mean = accelerator.reduce(mine, "sum").double().mean().item()
    logits, experts = torch.cat(logits), torch.cat(experts)  # [n, T, L, E], [n, T, L, K]: those of this process
    report = routing_report(logits, start, experts=experts)
    report = {name: value.item() for name, value in report.items() if value.dim() == 0}
    return {"perplexity": torch.tensor(-mean).exp().item(), "eval_windows": len(windows), **report}, logits


@contextlib.contextmanager
def written(path):
    """A path beside `path` to write a file or folder to, which takes its place at the end: whole or not at all.

    UserError where it cannot be written, as on a full disk. Nothing half-written stays behind.
    """
    aside = path + ".tmp"
    try:
        yield aside
        shutil.rmtree(path, ignore_errors=True)  # a folder has to be gone first
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as open, torch and safetensors call it
        reason = error.__context__ or error
        raise UserError(f"{path} could not be written ({reason}); once it can, --resume goes on") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.remove(aside)
