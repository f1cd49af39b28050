"""Is the router's choice better than chance? Rank a run's own route among perturbed ones (ERL section 6, table 4).

    python eval_routing.py RUN                   routing.json and routing_*.png, written into the run folder
    python eval_routing.py RUN --compare RUN2    and how many tokens stay with their expert in RUN2 (ERPO figure 3)

Each sample is scored along its original route and along 99 perturbed ones, 33 at each of alpha = 0.25, 0.5, 0.75, the
share of routing decisions replaced by random experts with weight 1/K (ERL eq. 6-9). A text sample is a window of the
model's context and its score the perplexity (lower is better), whatever algorithm trained the model. A task sample is
an example, answered by greedy decoding with the routes imposed on prompt and answer alike; its score is ROUGE-2, F1
or accuracy. Shapes: S samples, R routes (the original first), T positions, L MoE layers, E experts, K active ones.
"""

import argparse
import math
import os
import sys
from dataclasses import replace
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import data
from erl import random_routes
from moe import GPT, Routes
from support.arguments import Parser, number, one_of, read_config
from support.checkpoints import load_model
from support.device import pick_device
from support.errors import UserError, plainly, sentence
from support.evaluation import text_windows
from support.fast import speed_up
from support.generation import generate
from support.run_folder import find_checkpoint, is_finite, write_json
from support.tasks import rng

ALPHAS, EACH = (0.25, 0.5, 0.75), 33  # the ranked routes: the original and 33 at each alpha
RANKED = 1 + EACH * len(ALPHAS)  # 100
FULL = 8  # further routes a sample with every decision replaced: the last point of the robustness curve, not ranked
CHANCE_MRR, CHANCE_HIT1 = sum(1 / r for r in range(1, RANKED + 1)) / RANKED, 1 / RANKED  # 0.0519, 0.01
# Decision: scores this close (for a text: mean log-likelihoods a token, in nats) are tied. Routes through copies of one
# expert, as in a freshly upcycled model, differ by float32 rounding (1e-7 measured), and rounding must not decide a
# rank; after 100 training steps the closest of a sample's routes are 2e-5 apart.
TIE = 1e-6
BINS = 20  # of the top-1 histogram, on [0, 1]
COMPARED_TOKENS, SMALLEST_CLUSTER = 10_000, 100  # ERPO figure 3: smaller clusters say nothing and are left blank


def parse(argv: list[str]) -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, count = p.add_argument, number(int, low=1)
    add("run", metavar="RUN", help="a run folder of train.py")
    add("--dataset", type=one_of("data set", tuple(data.DATASETS)), help="default: the one the run was trained on")
    add("--data-dir", help="read the set from files below this folder; default: as the run did")
    add("--samples", type=count, default=300, help="samples to rank, at most as many as the split has")
    add("--split", type=one_of("split", data.SPLITS), default="test")
    add("--batch-size", type=count, help="routes in one forward; default: fits the device")
    add("--device", type=one_of("device", ("auto", "cpu", "cuda", "mps")), default="auto")
    add("--seed", type=number(int, low=0), default=0, help="draws the samples and the random routes")
    add("--compare", metavar="RUN2", help="a second run: which tokens stay with their experts?")
    add("--out", metavar="DIR", help="where routing.json and the pictures go; default: RUN")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated: a run and the samples
# ---------------------------------------------------------------------------------------------------------------------


def load_run(folder: str) -> tuple[GPT, dict, dict]:
    """A run's model, its arguments (config.json) and the checkpoint's metadata."""
    config = read_config(folder)
    config = {name: config.get(name) for name in ("dataset", "tokenizer", "data_dir", "max_new_tokens")}
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint yet: wait for its first one, or continue it with --resume")
    model, metadata = plainly(load_model, os.path.join(checkpoint, "model.safetensors"))
    if not model.config.moe_blocks:
        raise UserError(f"{folder} is a dense model: it has no routes to rank")
    if not is_finite(model):
        raise UserError(f"{folder} holds weights that are not finite: this checkpoint is broken")
    return model, config, metadata


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
    new = config["max_new_tokens"] if name == config["dataset"] else None
    return Samples(spec, tokenizer, items, new or min(spec.max_new_tokens, context // 2))


def prompt_of(example, model: GPT, samples: Samples) -> list[int]:
    return data.encode_prompt(example, samples.tokenizer, model.config.context - samples.max_new_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# One sample along R routes
# ---------------------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    values: Tensor  # float64 [R]: mean log-likelihood a token (text) or the task's score; higher is better
    weight: int  # predicted tokens (text) or 1
    experts: Tensor  # int64 [N, L, K], of the original route at its N positions
    top1: Tensor  # float32 [N, L], the routers' largest probability there


def route_alphas() -> Tensor:
    """[R]: 0 for the original, 33 at each alpha, then those with everything replaced."""
    return torch.tensor([0.0] + [a for a in ALPHAS for _ in range(EACH)] + [1.0] * FULL)


def draw_routes(model: GPT, length: int, *key) -> Routes:
    """Routes of one sample, R rows of `length` positions, the same for every batch size."""
    c, device = model.config, model.wte.weight.device
    alphas = route_alphas()
    drawn = random_routes(len(alphas), length, len(c.moe_blocks), c.n_expert, c.top_k, alphas, generator=rng(*key))
    return Routes(*(t.to(device) for t in drawn))


def batches(model: GPT, routes: Routes, batch_size: int | None):
    """Parts of the R routes that go through the model together, the one with the original first."""
    at_once = 4096 if model.wte.weight.device.type == "cpu" else 65536  # tokens; a CPU wants them in its cache
    for part in torch.arange(len(routes.forced)).split(batch_size or max(1, at_once // routes.forced.shape[1])):
        yield Routes(routes.experts[part], routes.forced[part])


@torch.no_grad()
def score_text(model: GPT, window, routes: Routes, batch_size: int | None = None) -> Scored:
    """Log-likelihood of a window along every route; all of them share what comes before the first router."""
    tokens, mask = (t.to(model.wte.weight.device) for t in window)
    hidden, values, original = model.stem(tokens[None, :-1]), [], None
    for part in batches(model, routes, batch_size):
        rows = len(part.forced)
        features, routing = model.branch(hidden.expand(rows, -1, -1), part)
        log_probs = model.token_log_probs(features, tokens[1:].expand(rows, -1))
        values.append(log_probs[:, mask].cpu().double().mean(1))
        if original is None:
            original = routing.experts[0, mask].cpu(), routing.logits[0, mask].softmax(-1).amax(-1).cpu()
    return Scored(torch.cat(values), int(mask.sum()), *original)


def score_task(model: GPT, example, prompt, routes: Routes, samples: Samples, batch_size: int | None = None) -> Scored:
    """Scores of the answers that greedy decoding gives to a prompt along every route."""
    values, known, original = [], {}, None
    for part in batches(model, routes, batch_size):
        rollout = generate(
            model,
            [prompt] * len(part.forced),
            max_new_tokens=samples.max_new_tokens,
            temperature=0,
            end_token=samples.tokenizer.end,
            routes=part,
        )
        for response in map(samples.tokenizer.decode, rollout.responses(samples.tokenizer.end)):
            if response not in known:  # many routes give the same answer
                known[response] = data.sample_score(samples.spec, response, example)
            values.append(known[response])
        if original is None:
            read = len(prompt) - 1 + int(rollout.response_mask[0].sum())  # every token but the last one written
            original = rollout.experts[0, :read].cpu(), rollout.expert_log_probs[0, :read].exp().amax(-1).cpu()
    return Scored(torch.tensor(values, dtype=torch.float64), 1, *original)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and other figures
# ---------------------------------------------------------------------------------------------------------------------


def rank(values: Tensor, tolerance: float = TIE) -> tuple[Tensor, Tensor]:
    """values [S, R], the original first, higher is better -> how many others are better, and how many equal, [S]."""
    gap = values[:, 1:] - values[:, :1]
    return (gap > tolerance).sum(1), (gap.abs() <= tolerance).sum(1)


def reciprocal_rank(better: int, tied: int) -> float:
    """Expected 1/rank when ties are broken at random: the ranks better + 1 ... better + 1 + tied are equally likely."""
    return sum(1 / r for r in range(better + 1, better + tied + 2)) / (tied + 1)


def hit_at_1(better: int, tied: int) -> float:
    """The probability of rank 1 when ties are broken at random."""
    return 1 / (tied + 1) if better == 0 else 0.0


def mean_and_error(x: list[float]) -> tuple[float, float]:
    """Mean over the samples and its standard error (0 for a single sample)."""
    x = torch.tensor(x, dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else 0.0


def figures(scored: list[Scored], config, text: bool) -> dict:
    """Everything routing.json says of the ranked samples."""
    values = torch.stack([s.values for s in scored])  # [S, R]
    weights = torch.tensor([float(s.weight) for s in scored], dtype=torch.float64)
    if not values.isfinite().all():
        raise UserError("the model's log-probabilities are not finite: this checkpoint is broken")

    def score(columns: Tensor) -> float:  # of all tokens (text) or answers along these routes
        mean = ((columns.mean(1) * weights).sum() / weights.sum()).item()
        return math.exp(min(-mean, 700.0)) if text else mean

    def by_sample(columns: Tensor) -> list[float]:
        return ((-columns).clamp(max=700).exp() if text else columns).mean(1).tolist()

    better, tied = (t.tolist() for t in rank(values[:, :RANKED]))
    mrr, mrr_error = mean_and_error([reciprocal_rank(*pair) for pair in zip(better, tied, strict=True)])
    hit1, hit1_error = mean_and_error([hit_at_1(*pair) for pair in zip(better, tied, strict=True)])
    alphas = route_alphas()
    top1, experts = torch.cat([s.top1 for s in scored]), torch.cat([s.experts for s in scored])  # [N, L], [N, L, K]
    slots = torch.stack([experts == j for j in range(config.n_expert)], -1).sum((0, 2))  # [L, E]
    return {
        "samples": len(scored),
        "mrr": mrr,
        "mrr_standard_error": mrr_error,
        "chance_mrr": CHANCE_MRR,
        "hit1": hit1,
        "hit1_standard_error": hit1_error,
        "chance_hit1": CHANCE_HIT1,
        "original_score": score(values[:, :1]),
        "perturbed_score": score(values[:, 1:RANKED]),
        "robustness": {f"{a:g}": score(values[:, alphas == a]) for a in (0.0, *ALPHAS, 1.0)},
        "top1_histogram": (torch.histc(top1, BINS, 0, 1) / top1.numel()).tolist(),
        "top1_above_0.9": (top1 > 0.9).double().mean().item(),
        "expert_load": (slots / slots.sum(1, keepdim=True)).tolist(),
        "routing_decisions": top1.numel(),
        "better_routes": better,
        "tied_routes": tied,
        "original_scores": by_sample(values[:, :1]),
        "perturbed_scores": by_sample(values[:, 1:RANKED]),
    }


@torch.no_grad()
def expert_consistency(first: GPT, second: GPT, rows, tokenizer) -> tuple[Tensor, Tensor]:
    """ERPO figure 3, from `first` to `second` over the same tokens. rows: lists of token ids.

    -> share [L, E] of the tokens that `first` routes to an expert and `second` too (NaN without a token), and the
    number of those tokens, int64 [L, E].
    """
    device, E = first.wte.weight.device, first.config.n_expert
    tokens_of, kept = 0, 0
    for i in range(0, len(rows), 16):
        part = rows[i : i + 16]
        width = max(map(len, part))
        tokens = torch.tensor([row + [tokenizer.end] * (width - len(row)) for row in part], device=device)
        inside = torch.arange(width, device=device) < torch.tensor([[len(row)] for row in part], device=device)
        used = []
        for model in (first, second):
            experts = model.branch(model.stem(tokens))[1].experts[inside]  # [N, L, K]
            used.append(torch.stack([(experts == j).any(-1) for j in range(E)], -1))  # [N, L, E]
        tokens_of, kept = tokens_of + used[0].sum(0), kept + (used[0] & used[1]).sum(0)
    return (kept / tokens_of).cpu(), tokens_of.cpu()


def compare(args, model: GPT, config: dict, samples: Samples) -> dict:
    second, second_config, _ = load_run(args.compare)
    same_shape = replace(second.config, gate=model.config.gate, expert_capacity=model.config.expert_capacity)
    if same_shape != model.config or config["tokenizer"] != second_config["tokenizer"]:
        raise UserError(f"{args.run} and {args.compare} cannot be compared: their models or tokenizers differ")
    rows, count = [], 0
    for n, item in enumerate(samples.items):
        if n >= args.samples and count >= COMPARED_TOKENS:
            break
        if samples.spec.kind == "text":
            row = item[0][:-1][item[1]].tolist()
        else:  # the prompt with the reference answer: a text that is the same for both
            row = prompt_of(item, model, samples)
            row += samples.tokenizer.encode(item.answer)[: samples.max_new_tokens]
        rows.append(row)
        count += len(row)
    share, tokens = expert_consistency(model, speed_up(second.to(model.wte.weight.device)), rows, samples.tokenizer)
    large = tokens >= SMALLEST_CLUSTER
    shown = [[share[i, j].item() if large[i, j] else None for j in range(share.shape[1])] for i in range(len(share))]
    return {
        "compared_with": args.compare,
        "compared_tokens": count,
        "expert_consistency": shown,
        "expert_consistency_tokens": tokens.tolist(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw(result: dict, out: str):
    """routing_ranks.png, routing_robustness.png, routing_top1.png, routing_load.png, routing_consistency.png"""
    run, split = os.path.basename(os.path.abspath(result["run"])), f"{result['dataset']} {result['split']}"
    score = {"rouge2": "ROUGE-2", "f1": "F1"}.get(result["score"], result["score"])
    best = "lower is better" if score == "perplexity" else "higher is better"
    shares = [0.0] * RANKED  # of the samples at each rank; a tied sample is spread over the ranks it shares
    for better, tied in zip(result["better_routes"], result["tied_routes"], strict=True):
        for r in range(better, better + tied + 1):
            shares[r] += 100 / (tied + 1) / result["samples"]

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{run}, {split}, {result['samples']} samples")
    left, right = figure.subplots(1, 2)
    left.bar([i + 3 for i in range(0, RANKED, 5)], [sum(shares[i : i + 5]) for i in range(0, RANKED, 5)], width=4.6)
    left.axhline(5, color="black", ls="--", lw=1, label="chance: 5 % in each bar")
    left.set(xlabel=f"rank of the original among {RANKED} routes (1: best)", ylabel="samples [%]", xlim=(0, RANKED + 1))
    left.set_title(
        f"MRR {result['mrr']:.3f} (chance {CHANCE_MRR:.3f}), "
        f"Hit@1 {100 * result['hit1']:.1f} % (chance {100 * CHANCE_HIT1:.0f} %)",
        fontsize=10,
    )
    leave_room(left)
    x, y = result["original_scores"], result["perturbed_scores"]
    ends = [min(x + y), max(x + y)]
    right.plot(ends, ends, color="black", ls="--", lw=1, label="equal")
    right.scatter(x, y, s=14, alpha=0.5, label="a sample")
    right.set(xlabel=f"{score}, original route", ylabel=f"mean {score}, {RANKED - 1} perturbed routes")
    right.set_title(
        f"{score} {result['original_score']:.4g}, perturbed {result['perturbed_score']:.4g} ({best})", fontsize=10
    )
    right.legend(fontsize=9)
    figure.savefig(os.path.join(out, "routing_ranks.png"), dpi=130)

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis = figure.subplots()
    points = [(float(alpha), value) for alpha, value in result["robustness"].items()]
    axis.plot(*zip(*points, strict=True), marker="o", label="perturbed")
    axis.axhline(points[0][1], color="black", ls="--", lw=1, label="original route")
    axis.set(
        xlabel="share of routing decisions replaced (alpha)",
        ylabel=f"{score} ({best})",
        title=f"{run}, {split}",
        xticks=[alpha for alpha, _ in points],
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(os.path.join(out, "routing_robustness.png"), dpi=130)

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis, E = figure.subplots(), len(result["expert_load"][0])
    axis.bar([(i + 0.5) / BINS for i in range(BINS)], [100 * h for h in result["top1_histogram"]], width=0.9 / BINS)
    axis.axvline(1 / E, color="black", ls="--", lw=1, label=f"1/{E}: all experts equally likely")
    axis.set(xlabel="largest router probability of a decision", ylabel="routing decisions [%]", xlim=(0, 1))
    axis.set_title(f"{run}, {split}: {100 * result['top1_above_0.9']:.1f} % above 0.9", fontsize=10)
    leave_room(axis)
    figure.savefig(os.path.join(out, "routing_top1.png"), dpi=130)

    heat_map(
        result["expert_load"],
        f"{run}, {split}: share of each layer's tokens (even load: {1 / E:.3f})",
        None,
        os.path.join(out, "routing_load.png"),
    )
    if "expert_consistency" in result:
        other = os.path.basename(os.path.abspath(result["compared_with"]))
        heat_map(
            result["expert_consistency"],
            f"{split}: share of an expert's tokens in {run}\nthat stay with it in "
            f"{other} (white: below {SMALLEST_CLUSTER} tokens)",
            1.0,
            os.path.join(out, "routing_consistency.png"),
        )


def leave_room(axis):
    """A legend above bars of per cents."""
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
    axis.set_yticks([tick for tick in axis.get_yticks() if tick <= 100])
    axis.legend(loc="upper right", fontsize=9)


def heat_map(rows: list[list[float | None]], title: str, highest: float | None, path: str):
    """[L, E] as colours, with the numbers where there is room for them; None stays white."""
    L, E = len(rows), len(rows[0])
    figure = Figure(figsize=(min(2.2 + 0.62 * E, 16), min(1.9 + 0.5 * L, 16)), layout="constrained")
    axis = figure.subplots()
    values = [[math.nan if v is None else v for v in row] for row in rows]
    image = axis.imshow(values, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
    axis.set(xlabel="expert", ylabel="MoE layer", xticks=range(0, E, 1 + E // 33), yticks=range(0, L, 1 + L // 25))
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis)
    for i, row in enumerate(rows if E <= 20 and L <= 24 else []):
        for j, v in enumerate(row):
            if v is not None:
                ink = "white" if v < 0.6 * image.norm.vmax else "black"
                axis.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=8, color=ink)
    figure.savefig(path, dpi=130)


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict:
    """Evaluate a run (see `parse`), write routing.json and the pictures, and return what routing.json holds."""
    device = plainly(pick_device, args.device)
    model, config, metadata = load_run(args.run)
    model = speed_up(model.to(device))
    samples = load_samples(args, model, config)
    out = args.out or args.run
    try:
        os.makedirs(out, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from None
    compared = compare(args, model, config, samples) if args.compare else {}  # first: its mistakes show at once

    text, chosen = samples.spec.kind == "text", samples.items[: args.samples]
    if len(chosen) < args.samples:
        print(f"{samples.spec.name} {args.split} has {len(chosen)} samples, not {args.samples}", file=sys.stderr)
    scored = []
    for i, item in enumerate(tqdm(chosen, disable=None, unit="sample", desc="ranking routes")):
        key = args.seed, "routes", i
        if text:
            scored.append(score_text(model, item, draw_routes(model, len(item[1]), *key), args.batch_size))
        else:
            prompt = prompt_of(item, model, samples)
            routes = draw_routes(model, len(prompt) + samples.max_new_tokens, *key)
            scored.append(score_task(model, item, prompt, routes, samples, args.batch_size))
    metric = "perplexity" if text else samples.spec.metric
    result = {
        "run": args.run,
        "step": metadata.get("step"),
        "dataset": samples.spec.name,
        "split": args.split,
        "seed": args.seed,
        "score": metric,
        **figures(scored, model.config, text),
        **compared,
    }
    try:
        draw(result, out)
        write_json(os.path.join(out, "routing.json"), result)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from None
    return result


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        result = run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (text := sentence(error)) is None:
            raise
        print(f"eval_routing.py: {text}", file=sys.stderr)
        return 2
    print(f"{result['samples']} samples of {result['dataset']} {result['split']}, score: {result['score']}")
    for name in ("mrr", "hit1"):
        error = result[f"{name}_standard_error"]
        print(f"{name:10}{result[name]:10.4f} +- {error:.4f} (chance {result[f'chance_{name}']:.4f})")
    print(f"{'original':10}{result['original_score']:10.4f}\n{'perturbed':10}{result['perturbed_score']:10.4f}")
    print("robustness", "  ".join(f"{a}: {s:.4f}" for a, s in result["robustness"].items()))
    tied = sum(result["tied_routes"]) / ((RANKED - 1) * result["samples"])
    print(
        f"{'tied':10}{tied:10.4f} of the perturbed routes score as the original does"
        + (": MRR and Hit@1 are chance by construction" if tied == 1 else "")
    )
    print(f"routing.json and the pictures are in {args.out or args.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
