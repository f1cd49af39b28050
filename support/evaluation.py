"""Scores on held-out sets: perplexity of a text, the task metric of generated answers."""

import math

import torch
from tqdm import tqdm

import data
from support.errors import UserError
from support.generation import beam_search, generate
from support.head import lm_loss
from support.tasks import Task, rng


def text_windows(tokens, context: int, limit: int = 0):
    """Windows (tokens [T + 1], mask [T]) that predict every token but the first once; limit: as many, evenly spread."""
    starts = range(0, len(tokens) - 1, context)
    number = min(limit or len(starts), len(starts))
    for start in (starts[i * len(starts) // number] for i in range(number)):
        window = torch.from_numpy(tokens[start : start + context + 1].astype("int64"))
        missing = context + 1 - len(window)
        yield torch.cat([window, window.new_zeros(missing)]), torch.arange(context) < context - missing


def check_finite(values: torch.Tensor):
    if not values.isfinite().all():
        raise UserError("the model's probabilities are not finite: lower --lr (or --pretrain-lr)")


@torch.no_grad()
def evaluate_text(model, split: data.TextSplit, batch_size: int, limit: int = 0) -> dict[str, float]:
    """Perplexity per token, bits per byte of the text (of the whole split alone), and the number of windows."""
    weight, total, count = model.wte.weight, 0.0, 0
    windows = list(text_windows(split.tokens, model.config.context, limit))
    for i in tqdm(range(0, len(windows), batch_size), desc="evaluating, batches of windows", disable=None, leave=False):
        tokens, mask = (torch.stack(t).to(weight.device) for t in zip(*windows[i : i + batch_size], strict=True))
        loss, _ = lm_loss(model(tokens[:, :-1])[0], weight, tokens[:, 1:], mask)
        check_finite(loss)
        total, count = total + loss.item() * int(mask.sum()), count + int(mask.sum())
    whole = {} if limit else {"bits_per_byte": total / math.log(2) / split.num_bytes}
    perplexity = math.exp(min(total / count, 700.0))  # exp(710) overflows
    return {"loss": total / count, "perplexity": perplexity, **whole, "samples": len(windows)}


def respond(model, task: Task, spec: data.DatasetSpec, examples, args, generator) -> list[str]:
    """A response to the prompt of each example: drawn as `spec` says, found by beam search, or greedy."""
    rows, at_once = [], max(1, 128 // args.beams)
    prompts = [data.encode_prompt(e, task.tokenizer, task.room) for e in examples]
    drawn = {"temperature": spec.eval_temperature, "top_p": spec.eval_top_p, "generator": generator}  # 0 is greedy
    how = {"max_new_tokens": args.max_new_tokens, "end_token": task.tokenizer.end}
    for i in tqdm(range(0, len(prompts), at_once), desc="evaluating, batches of answers", disable=None, leave=False):
        part = prompts[i : i + at_once]
        if args.beams > 1 and not spec.sampled:
            rows += beam_search(model, part, beams=args.beams, **how)
        else:
            rows += generate(model, part, **drawn, **how).responses(task.tokenizer.end)
    return [task.tokenizer.decode(row) for row in rows]


@torch.compiler.set_stance("force_eager")  # its shapes are many: compiling for each would cost more than it brings
@torch.no_grad()
def evaluate(model, task: Task, name: str, args, final: bool = False) -> dict[str, float]:
    """Scores on one of the held-out sets, and the number of `samples` (windows, examples) behind them."""
    held_out, spec = task.held_out[name], data.DATASETS.get(name, task.spec)  # a test set may be another data set
    if spec.kind == "text":
        return evaluate_text(model, held_out, 8, args.test_samples if final else args.eval_samples)
    prompt = torch.tensor([data.encode_prompt(held_out[0], task.tokenizer, task.room)], device=model.wte.weight.device)
    check_finite(model.head(model(prompt)[0]))  # a broken model answers too, and would score 0
    examples = [e for e in held_out for _ in range(spec.samples_per_problem)]  # those of a problem side by side
    responses = respond(model, task, spec, examples, args, rng(args.seed, "evaluation", name))
    return data.score(spec, responses, examples) | {"samples": len(held_out)}


def mean_scores(results: dict[str, dict]) -> dict:
    """Scores of one test set as they are; of several their mean, the number of samples in all, and each set's own."""
    sets = list(results.values())
    if len(sets) < 2:
        return sets[0] if sets else {}
    scores = {k: sum(s[k] for s in sets) / len(sets) for k in sets[0]} | {"samples": sum(s["samples"] for s in sets)}
    return scores | {f"{k}_{name}": v for name, s in results.items() for k, v in s.items()}
