"""Scores on held-out sets: perplexity of a text, the task metric of generated answers."""

import math

import torch

import data
from support.errors import UserError
from support.generation import beam_search, generate
from support.progress import Progress
from support.tasks import Task, rng


def text_windows(tokens, context: int, limit: int = 0):
    """Windows of a split as (tokens [T + 1], mask [T]), so that every token but the first is predicted exactly once.

    limit: that many windows, evenly spread over the split; 0 for all.
    """
    starts = list(range(0, len(tokens) - 1, context))
    if 0 < limit < len(starts):
        starts = [starts[i * len(starts) // limit] for i in range(limit)]
    for start in starts:
        window = torch.from_numpy(tokens[start : start + context + 1].astype("int64"))
        missing = context + 1 - len(window)
        yield torch.cat([window, window.new_zeros(missing)]), torch.arange(context) < context - missing


@torch.no_grad()
def evaluate_text(model, split: data.TextSplit, batch_size: int, limit: int = 0) -> dict[str, float]:
    """Perplexity per token; bits per byte of the text over the whole split; the windows they were measured on."""
    device, total, count = model.wte.weight.device, 0.0, 0
    every = list(text_windows(split.tokens, model.config.context, limit))
    for i in Progress(range(0, len(every), batch_size), desc="evaluating, batches of windows"):
        windows = every[i : i + batch_size]
        tokens, mask = (torch.stack(part).to(device) for part in zip(*windows, strict=True))
        features, _ = model.branch(model.stem(tokens[:, :-1]))
        nll, _ = model.lm_loss(features, tokens[:, 1:], mask)
        total, count = total + nll.item() * int(mask.sum()), count + int(mask.sum())
    scores = {"loss": total / count, "perplexity": math.exp(min(total / count, 700.0))}
    if not limit:
        scores["bits_per_byte"] = total / math.log(2) / split.num_bytes
    return scores | {"samples": len(every)}


def respond(model, task: Task, spec: data.DatasetSpec, examples, args, generator) -> list[str]:
    """Responses to the prompts of examples: by beam search, greedily, or drawn, `spec.samples_per_problem` of each."""
    tokenizer, beams = task.tokenizer, args.beams
    prompts = [data.encode_prompt(e, tokenizer, task.room) for e in examples for _ in range(spec.samples_per_problem)]
    rows, at_once = [], max(1, 128 // beams)
    drawn = {"temperature": spec.eval_temperature, "top_p": spec.eval_top_p, "generator": generator}
    how = {"max_new_tokens": args.max_new_tokens, "end_token": tokenizer.end}
    for i in Progress(range(0, len(prompts), at_once), desc="evaluating, batches of answers"):
        part = prompts[i : i + at_once]
        if spec.sampled:
            rows += generate(model, part, **drawn, **how).responses(tokenizer.end)
        elif beams > 1:
            rows += beam_search(model, part, beams=beams, **how)
        else:
            rows += generate(model, part, temperature=0, **how).responses(tokenizer.end)
    return [tokenizer.decode(row) for row in rows]


@torch.compiler.set_stance("force_eager")  # its shapes are many: compiling for each would cost more than it brings
def evaluate(model, task: Task, name: str, args, final: bool = False) -> dict[str, float]:
    """Scores on one of the held-out sets, and the number of `samples` (windows, examples) behind them."""
    held_out, broken = task.held_out[name], "the model's probabilities are not finite: lower --lr (or --pretrain-lr)"
    if task.spec.kind == "text":
        limit = args.test_samples if final else args.eval_samples
        scores = evaluate_text(model, held_out, 8, limit)
        if not math.isfinite(scores["loss"]):
            raise UserError(broken)
        return scores
    prompt = data.encode_prompt(held_out[0], task.tokenizer, task.room)
    with torch.no_grad():  # a broken model answers too: it must not score 0 as if it had been measured
        if not model(torch.tensor([prompt], device=model.wte.weight.device)).logits.isfinite().all():
            raise UserError(broken)
    spec = data.get_dataset(name) if name in data.DATASETS else task.spec  # the test sets of others
    responses = respond(model, task, spec, held_out, args, rng(args.seed, "evaluation", name))
    asked = [e for e in held_out for _ in range(spec.samples_per_problem)]
    return data.score(task.spec, responses, asked) | {"samples": len(held_out)}


def mean_scores(results: dict[str, dict]) -> dict:
    """Scores of one test set as they are; of several their mean, the number of samples in all, and each set's own."""
    sets = list(results.values())
    if not sets:
        return {}
    scores = {k: sum(s[k] for s in sets) / len(sets) for k in sets[0]} | {"samples": sum(s["samples"] for s in sets)}
    if len(sets) > 1:
        scores |= {f"{k}_{name}": v for name, s in results.items() for k, v in s.items()}
    return scores
