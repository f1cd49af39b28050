"""Is the router's choice better than chance? Rank a run's own route among perturbed ones (ERL section 6, table 4).

    python eval_routing.py RUN                   routing.json and routing_*.png, written into the run folder
    python eval_routing.py RUN --show-tokens     and in the terminal: which tokens go to which expert
    python eval_routing.py RUN --compare RUN2    and how many tokens stay with their expert in RUN2 (ERPO figure 3)

Each sample is scored along its original route and along 99 perturbed ones, 33 at each of alpha = 0.25, 0.5, 0.75, the
share of routing decisions replaced by random experts with weight 1/K (ERL eq. 6-9). A text sample is a window of the
model's context and its score the perplexity (lower is better), whatever algorithm trained the model. A task sample is
an example, answered by greedy decoding; its score is ROUGE-2, F1 or accuracy. Its prompt is never perturbed.

MRR rises too when the perturbed routes get worse, and says nothing of a router that sends all tokens to one expert. So
it stands beside the scores of both, the best perturbed route's, the load and the router's entropy, and `warnings`.
Shapes: S samples, R routes (the original first), T positions, N of them routed, L MoE layers, E experts, K active ones.
"""

import argparse
import math
import os
import sys
from typing import NamedTuple

if __name__ == "__main__":
    from support.errors import begin_program

    begin_program()

import torch
from torch import Tensor

import data
from erl import random_routes
from moe import GPT, Routes
from support.arguments import Parser, number, one_of
from support.consistency import compare
from support.device import pick_device
from support.errors import UserError, plainly, say, sentence
from support.fast import speed_up
from support.generation import generate
from support.pictures import draw_routing
from support.progress import Progress
from support.routing_report import routing_report
from support.run_folder import write_json
from support.samples import Samples, load_run, load_samples, prompt_of
from support.tasks import rng
from support.verdict import COLLAPSED, describe, doubts
from support.which_tokens import tokens_by_expert

ALPHAS, EACH = (0.25, 0.5, 0.75), 33  # the ranked routes: the original and 33 at each alpha
RANKED = 1 + EACH * len(ALPHAS)  # 100
FULL = 8  # further routes a sample with every decision replaced: the last point of the robustness curve, not ranked
CHANCE_MRR, CHANCE_HIT1 = sum(1 / r for r in range(1, RANKED + 1)) / RANKED, 1 / RANKED  # 0.0519, 0.01
# Decision: scores this close (for a text: mean log-likelihoods a token, in nats) are tied. Routes through copies of one
# expert, as in a freshly upcycled model, differ by float32 rounding (1e-7 measured), and rounding must not decide a
# rank; after 100 training steps the closest of a sample's routes are 2e-5 apart.
TIE = 1e-6
BINS = 20  # of the top-1 histogram, on [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# The routes, and one sample's score along each of them
# ---------------------------------------------------------------------------------------------------------------------


def route_alphas() -> Tensor:
    """[R]: 0 for the original, 33 at each alpha, then those with everything replaced."""
    return torch.tensor([0.0] + [a for a in ALPHAS for _ in range(EACH)] + [1.0] * FULL)


def draw_routes(model: GPT, length: int, *key, first: int = 0) -> Routes:
    """Routes of one sample, R rows of `length` positions, the same for every batch size; key seeds the draw.

    Only positions from `first` on are perturbed. A task's prompt of P tokens stays as it is (first = P - 1: the last
    one predicts the answer's first token), as ERL's encoder-decoder models perturb their decoder alone.
    """
    c, device = model.config, model.wte.weight.device
    alphas = route_alphas()
    drawn = random_routes(len(alphas), length, len(c.moe_blocks), c.n_expert, c.top_k, alphas, generator=rng(*key))
    routes = Routes(*(t.to(device) for t in drawn))
    routes.forced[:, :first] = False
    return routes


def batches(model: GPT, routes: Routes, batch_size: int | None):
    """Parts of the R routes that go through the model together, the one with the original first."""
    at_once = 4096 if model.wte.weight.device.type == "cpu" else 65536  # tokens; a CPU wants them in its cache
    for part in torch.arange(len(routes.forced)).split(batch_size or max(1, at_once // routes.forced.shape[1])):
        yield Routes(routes.experts[part], routes.forced[part])


class Scored(NamedTuple):
    """A sample along its R routes, and what the routers did along the original one at its N positions."""

    values: Tensor  # float64 [R]: mean log-likelihood a token (text) or the task's score; higher is better
    weight: int  # predicted tokens (text) or 1
    tokens: Tensor  # int64 [N], what was routed
    experts: Tensor  # int64 [N, L, K]
    router_log_probs: Tensor  # float32 [N, L, E]


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
            original = routing.experts[0, mask].cpu(), routing.logits[0, mask].log_softmax(-1).cpu()
    return Scored(torch.cat(values), int(mask.sum()), tokens[:-1][mask].cpu(), *original)


@torch.no_grad()
def score_task(model: GPT, example, prompt, routes: Routes, samples: Samples, batch_size: int | None = None) -> Scored:
    """Scores of the answers that greedy decoding gives to a prompt along every route."""
    values, known, original = [], {}, None
    end = samples.tokenizer.end
    for part in batches(model, routes, batch_size):
        prompts = [prompt] * len(part.forced)
        how = {"max_new_tokens": samples.max_new_tokens, "temperature": 0, "end_token": end}
        rollout = generate(model, prompts, routes=part, **how)
        for response in map(samples.tokenizer.decode, rollout.responses(end)):
            if response not in known:  # many routes give the same answer
                known[response] = data.sample_score(samples.spec, response, example)
            values.append(known[response])
        if original is None:
            read = len(prompt) - 1 + int(rollout.response_mask[0].sum())  # every token but the last one written
            original = rollout.tokens[0, :read]
    _, routing = model.branch(model.stem(original[None]))  # the router's softmax over all E, which rollouts do not keep
    return Scored(
        torch.tensor(values, dtype=torch.float64),
        1,
        original.cpu(),
        routing.experts[0].cpu(),
        routing.logits[0].log_softmax(-1).cpu(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ranks, and the other figures that belong beside them
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


def figures(scored: list[Scored], text: bool) -> dict:
    """What routing.json says of the ranked samples.

    Decision: one score everywhere. The perplexity of some tokens along some routes is exp of the mean of all their
    negative log-likelihoods, be it of one sample or of all; so a mean over routes is a geometric one, and the whole is
    the geometric mean of its samples. A task's score is a plain mean.
    """
    values = torch.stack([s.values for s in scored])  # [S, R]
    weights = torch.tensor([float(s.weight) for s in scored], dtype=torch.float64)  # [S]
    if not values.isfinite().all():
        raise UserError("the model's log-probabilities are not finite: this checkpoint is broken")

    def shown(mean: Tensor) -> Tensor:
        return (-mean).clamp(max=700).exp() if text else mean

    def score(columns: Tensor) -> float:  # of all samples along these routes
        return shown((columns.mean(1) * weights).sum() / weights.sum()).item()

    better, tied = (t.tolist() for t in rank(values[:, :RANKED]))
    mrr, mrr_error = mean_and_error([reciprocal_rank(*pair) for pair in zip(better, tied, strict=True)])
    hit1, hit1_error = mean_and_error([hit_at_1(*pair) for pair in zip(better, tied, strict=True)])
    alphas, perturbed = route_alphas(), values[:, 1:RANKED]
    return {
        "samples": len(scored),
        "routes": RANKED,
        "mrr": mrr,
        "mrr_standard_error": mrr_error,
        "chance_mrr": CHANCE_MRR,
        "hit1": hit1,
        "hit1_standard_error": hit1_error,
        "chance_hit1": CHANCE_HIT1,
        "original_score": score(values[:, :1]),
        "perturbed_score": score(perturbed),
        "best_of_99_score": score(perturbed.amax(1, keepdim=True)),  # of each sample its best perturbed route
        "robustness": {f"{a:g}": score(values[:, alphas == a]) for a in (0.0, *ALPHAS, 1.0)},
        **router_figures(scored),
        "better_routes": better,
        "tied_routes": tied,
        "original_scores": shown(values[:, 0]).tolist(),
        "perturbed_scores": shown(perturbed.mean(1)).tolist(),
    }


def router_figures(scored: list[Scored]) -> dict:
    """What the routers did along the original routes. Relative entropy: 1 where all experts are equally likely."""
    log_probs = torch.cat([s.router_log_probs for s in scored])  # [N, L, E]
    experts = torch.cat([s.experts for s in scored])  # [N, L, K]
    (_, L, E), K = log_probs.shape, experts.shape[-1]
    report = {k: v.tolist() for k, v in routing_report(log_probs[None], experts=experts[None]).items()}
    places = experts + E * torch.arange(L)[:, None]
    load = places.flatten().bincount(minlength=L * E).view(L, E) / experts[:, 0].numel()  # share of a layer's slots
    busiest = load.topk(K).values.sum(-1)  # [L]
    top1 = log_probs.amax(-1).exp()
    by_layer = ("router_entropy", "max_vio")
    return {
        "top1_histogram": (torch.histc(top1, BINS, 0, 1) / top1.numel()).tolist(),
        "top1_above_0.9": report["top1_above_0.9"],
        "routing_decisions": top1.numel(),
        "top_k": K,
        "expert_load": load.tolist(),
        **{name + end: report[name + end] for name in by_layer for end in ("", "_by_layer")},
        "relative_router_entropy": report["router_entropy"] / math.log(E),
        "relative_router_entropy_by_layer": [h / math.log(E) for h in report["router_entropy_by_layer"]],
        "dead_experts": int(report["dead_experts"]),
        "collapsed_layers": (busiest > COLLAPSED).nonzero().flatten().tolist(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    usage, epilog = "python eval_routing.py RUN [--FLAG VALUE ...]", "[...]: what the paper does."
    p = Parser(usage=usage, description=__doc__.split("\n\n")[0], allow_abbrev=False, epilog=epilog)
    count = number(int, low=1, high=10**8)
    add = p.add_argument_group("what to rank").add_argument
    add("run", metavar="RUN", help="a run folder of train.py")
    add("--dataset", type=one_of("data set", tuple(data.DATASETS)), help="default: the one the run was trained on")
    add("--data-dir", metavar="DIR", help="read the set from files below DIR; default: as the run did")
    add("--split", type=one_of("split", data.SPLITS), default="test", help="train, validation, test")
    add("--samples", type=count, default=300, help="samples to rank, at most those of the split [ERL section 6: 300]")
    add("--seed", type=number(int, low=0, high=10**8), default=0, help="draws the samples and the random routes")
    add = p.add_argument_group("what else it shows").add_argument
    add("--show-tokens", action="store_true", help="print the first tokens in the colours of their experts")
    add("--compare", metavar="RUN2", help="a second run: which tokens stay with their experts [ERPO figure 3]")
    add("--out", metavar="DIR", help="where routing.json and the pictures go; default: RUN")
    add = p.add_argument_group("the machine").add_argument
    devices = one_of("device", ("auto", "cpu", "cuda", "mps"))
    add("--device", type=devices, default="auto", help="auto, cpu, cuda, mps")
    add("--batch-size", type=count, help="routes in one forward; default: fits the device")
    return p.parse_args(argv)


def rank_samples(args, model: GPT, samples: Samples) -> list[Scored]:
    scored, chosen = [], samples.items[: args.samples]
    if len(chosen) < args.samples:
        say(f"{samples.spec.name} {args.split} has {len(chosen)} samples, not {args.samples}", sys.stderr)
    for i, item in enumerate(Progress(chosen, unit="sample", desc="ranking routes")):
        key = args.seed, "routes", i
        if samples.spec.kind == "text":
            scored.append(score_text(model, item, draw_routes(model, len(item[1]), *key), args.batch_size))
        else:
            prompt = prompt_of(item, model, samples)
            routes = draw_routes(model, len(prompt) + samples.max_new_tokens, *key, first=len(prompt) - 1)
            scored.append(score_task(model, item, prompt, routes, samples, args.batch_size))
    return scored


def run(args: argparse.Namespace) -> dict:
    """Evaluate a run (see `parse`), write routing.json and the pictures, and return what routing.json holds."""
    device, out = plainly(pick_device, args.device), args.out or args.run
    model, config, metadata = load_run(args.run)
    model = speed_up(model.to(device))
    samples = load_samples(args, model, config)
    try:
        os.makedirs(out, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from None
    compared = compare(args, model, config, samples) if args.compare else {}  # first: its mistakes show at once
    scored = rank_samples(args, model, samples)
    text = samples.spec.kind == "text"
    result = {
        "run": args.run,
        "step": metadata.get("step"),
        "dataset": samples.spec.name,
        "split": args.split,
        "seed": args.seed,
        "score": "perplexity" if text else samples.spec.metric,
        **figures(scored, text),
        **compared,
    }
    result["warnings"] = doubts(result, model.config.vocab_size)
    try:
        write_json(os.path.join(out, "routing.json"), result)  # before anything that may fail is drawn
        draw_routing(result, out)
        coloured = show_tokens(scored, samples.tokenizer, os.path.join(out, "routing_tokens.png"))
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from None
    if args.show_tokens:
        say(coloured)
    return result


def show_tokens(scored: list[Scored], tokenizer, path: str) -> str:
    """Which tokens go where: a picture, and the same for a terminal."""
    words = [tokenizer.decode([token]) for s in scored for token in s.tokens.tolist()]
    experts, num_experts = torch.cat([s.experts for s in scored]), scored[0].router_log_probs.shape[-1]
    ends = set((torch.tensor([len(s.tokens) for s in scored]).cumsum(0) - 1).tolist())
    return tokens_by_expert(words, experts, num_experts, path, shown=300, ends=ends)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        result = run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (text := sentence(error)) is None:
            raise
        say(f"eval_routing.py: {text}", sys.stderr)
        return 2
    say(describe(result))
    say(f"routing.json and the pictures are in {args.out or args.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
