"""Is the router's choice better than chance? A run's own routes among perturbed ones, and its decisions one by one.

    python eval_routing.py RUN                   routing.json and routing_*.png, written into the run folder
    python eval_routing.py RUN --compare RUN2    and how many tokens stay with their expert in RUN2 (ERPO figure 3)

Ranks (ERL section 6, table 4): each sample is scored along its original route and along 99 perturbed ones, 33 at each
of alpha = 0.25, 0.5, 0.75, the share of routing decisions replaced by random experts (eq. 6-9). A text sample is a
window of the model's context, scored by its perplexity. A task sample is an example, answered by greedy decoding and
scored by ROUGE-2, F1 or accuracy; its prompt is never perturbed.
Regret: at some decisions of the original route each expert is forced in turn, everything else as it is. How much more
probable would the best one have made the next token? It is chosen by the answer, so this is an upper bound.

S samples, R routes (the original first), T positions, N of them routed, L MoE layers, E experts, K active, V words.
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
from tqdm import tqdm

import data
from erl import random_routes
from moe import GPT, Routes, choose_experts, mix_experts
from support.arguments import Parser, number, one_of
from support.device import pick_device
from support.errors import UserError, as_user_error, run_program
from support.generation import Cache, generate
from support.head import token_log_probs
from support.routing_report import expert_load, routing_report
from support.routing_text import COLLAPSED, describe, write_results
from support.samples import Samples, compare, load_run, load_samples
from support.tasks import rng

ALPHAS, EACH = (0.25, 0.5, 0.75), 33  # the ranked routes: the original and 33 at each alpha
RANKED = 1 + EACH * len(ALPHAS)  # 100
FULL = 8  # further routes a sample with every decision replaced: the last point of the robustness curve, not ranked
CHANCE_MRR, CHANCE_HIT1 = sum(1 / r for r in range(1, RANKED + 1)) / RANKED, 1 / RANKED  # 0.0519, 0.01
# Decision: scores this close (for a text: mean log-likelihoods a token, in nats) are tied. Routes through copies of one
# expert, as in a freshly upcycled model, differ by float32 rounding (1e-7 measured), and rounding must not decide a
# rank; after 100 training steps the closest of a sample's routes are 2e-5 apart.
TIE = 1e-6

# ------------------------------------------------------------------- Ranks: one sample's score along each of its routes


def route_alphas() -> Tensor:
    """[R]: 0 for the original, 33 at each alpha, then those with everything replaced."""
    return torch.tensor([0.0] + [a for a in ALPHAS for _ in range(EACH)] + [1.0] * FULL)


def draw_routes(model: GPT, length: int, *key, first: int = 0) -> Routes:
    """Routes of one sample, R rows of `length` positions, the same for every batch size; key seeds the draw.

    Only positions from `first` on are perturbed. A task's prompt of P tokens stays as it is (first = P - 1: the last
    one predicts the answer's first token), as ERL's encoder-decoder models perturb their decoder alone.
    """
    c, device, alphas = model.config, model.wte.weight.device, route_alphas()
    sizes = len(alphas), length, len(c.moe_blocks), c.n_expert, c.top_k
    experts, forced = random_routes(*sizes, alphas, generator=rng(*key))
    forced[:, :first] = False
    return Routes(experts.to(device), forced.to(device))


def batches(model: GPT, routes: Routes, batch_size: int | None):
    """Parts of the R routes that go through the model together, the one with the original first."""
    at_once = 4096 if model.wte.weight.device.type == "cpu" else 65536  # tokens; a CPU wants them in its cache
    for part in torch.arange(len(routes.forced)).split(batch_size or max(1, at_once // routes.forced.shape[1])):
        yield Routes(routes.experts[part], routes.forced[part])


class Scored(NamedTuple):
    """A sample along its R routes, and what the routers did along the original one at its N positions."""

    values: Tensor  # float64 [R]: mean log-likelihood a token (text) or the task's score; higher is better
    tokens: Tensor  # int64 [N], what was routed
    experts: Tensor  # int64 [N, L, K]
    router_log_probs: Tensor  # float32 [N, L, E]


def own_routing(model: GPT, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last three entries of Scored of tokens [N] along the model's own route."""
    _, routing = model(tokens[None])
    return tokens.cpu(), routing.experts[0].cpu(), routing.logits[0].log_softmax(-1).cpu()


@torch.no_grad()
def score_text(model: GPT, window, routes: Routes, batch_size: int | None = None) -> Scored:
    """Log-likelihood of a window along every route. What comes before the first block with experts is computed once."""
    tokens, mask = (t.to(model.wte.weight.device) for t in window)
    hidden, values = model.stem(tokens[None, :-1]), []
    for part in batches(model, routes, batch_size):
        rows = len(part.forced)
        features, _ = model.branch(hidden.expand(rows, -1, -1), routes=part)
        log_probs = token_log_probs(features, model.wte.weight, tokens[1:].expand(rows, -1))  # [rows, T]
        values.append(log_probs[:, mask].cpu().double().mean(1))
    return Scored(torch.cat(values), *own_routing(model, tokens[:-1][mask]))


@torch.no_grad()
def score_task(model: GPT, example, prompt, routes: Routes, samples: Samples, batch_size: int | None = None) -> Scored:
    """Scores of the answers that greedy decoding gives to a prompt along every route."""
    responses, rows, end = [], [], samples.tokenizer.end
    for part in batches(model, routes, batch_size):
        how = {"max_new_tokens": samples.max_new_tokens, "temperature": 0, "end_token": end}
        rollout = generate(model, [prompt] * len(part.forced), routes=part, **how)
        responses += map(samples.tokenizer.decode, rollout.responses(end))
        rows.append(rollout.tokens[0, : len(prompt) - 1 + int(rollout.response_mask[0].sum())])
    known = {text: data.sample_score(samples.spec, text, example) for text in set(responses)}
    values = torch.tensor([known[text] for text in responses], dtype=torch.float64)
    return Scored(values, *own_routing(model, rows[0]))  # of every token but the last one written


def rank_samples(args, model: GPT, samples: Samples) -> list[Scored]:
    scored, chosen = [], samples.items[: args.samples]
    if len(chosen) < args.samples:
        print(f"{samples.spec.name} {args.split} has {len(chosen)} samples, not {args.samples}", file=sys.stderr)
    for i, item in enumerate(tqdm(chosen, unit="sample", desc="ranking routes", disable=None, leave=False)):
        key = args.seed, "routes", i
        if samples.spec.kind == "text":
            scored.append(score_text(model, item, draw_routes(model, len(item[1]), *key), args.batch_size))
        else:
            prompt = samples.prompt(item)
            routes = draw_routes(model, len(prompt) + samples.max_new_tokens, *key, first=len(prompt) - 1)
            scored.append(score_task(model, item, prompt, routes, samples, args.batch_size))
    return scored


# ------------------------------------------------------------------------- Regret: every expert in turn at one decision


class Decision(NamedTuple):
    values: Tensor  # float64 [C], C = E - K + 1: log p of the next token under each candidate, the own expert first
    entropy: float  # of the prediction under the own expert, in nats


def decision_of(log_probs: Tensor, own: list[int], target: int) -> Decision:
    """log_probs [E, V]: the prediction with each expert in the place of the first of the K own ones.

    The other K - 1 own experts are no candidates: no expert works twice.
    """
    candidates = [own[0], *(e for e in range(len(log_probs)) if e not in own)]
    entropy = torch.special.entr(log_probs[own[0]].exp()).sum()
    return Decision(log_probs[candidates, target].double().cpu(), entropy.item())


@torch.no_grad()
def score_decision(model: GPT, tokens: list[int], layer: int) -> Decision:
    """The decision of `layer` at the last token but one; the last one is what it helps to predict.

    A forced expert takes the weight of the own one, whatever the gate would give it: what is compared is the experts.
    The tokens before it are read once, and their keys and values serve all E experts.
    """
    c, T, device = model.config, len(tokens) - 1, model.wte.weight.device
    prefix, every = torch.tensor([tokens[:-1]], device=device), torch.arange(c.n_expert, device=device)
    cache = Cache(model, 1, T - 1, T)
    model(prefix[:, :-1], cache=cache)
    cache.reorder(torch.zeros_like(every))  # E equal rows
    cache.step(torch.full_like(every, T - 1), T)

    def force_each(moe, args, output):
        x, routing = args[0], output[1]  # [E, 1, D]
        experts, weights = choose_experts(routing.logits, c)  # [E, 1, K]
        experts[:, 0, 0] = every
        out = mix_experts(x[:, 0], experts[:, 0], weights[:, 0], *moe.experts.parameters())[:, None]
        return sum((shared(x)[0] for shared in moe.shared), out), routing

    with model.blocks[c.moe_blocks[layer]].mlp.register_forward_hook(force_each):
        features, routing = model(prefix[:, -1:].expand(c.n_expert, 1), cache=cache)
    log_probs = model.head(features[:, 0]).float().log_softmax(-1)  # [E, V]
    return decision_of(log_probs, routing.experts[0, 0, layer].tolist(), tokens[-1])


def score_decisions(args, model: GPT, samples: Samples) -> list[Decision]:
    """--decisions of them, each in a row of its own, drawn from the samples in their order."""
    scored = []
    for i in tqdm(range(args.decisions), unit="decision", desc="forcing experts", disable=None, leave=False):
        row, first = samples.reference(samples.items[i % len(samples.items)])
        draw = rng(args.seed, "decisions", i)
        position = int(torch.randint(max(first, 1), max(len(row) - 1, 2), (), generator=draw))
        layer = int(torch.randint(len(model.config.moe_blocks), (), generator=draw))
        scored.append(score_decision(model, row[: position + 2], layer))
    return scored


def regret_figures(decisions: list[Decision]) -> dict:
    """The table `regret` of routing.json: all decisions, then those of confident and of fragile predictions."""
    values = torch.stack([d.values for d in decisions])  # [decisions, C]
    entropy = torch.tensor([d.entropy for d in decisions])
    if not values.isfinite().all():
        raise UserError("the model's log-probabilities are not finite: this checkpoint is broken")
    median, C = entropy.median().item(), values.shape[1]
    parts = {"all": entropy == entropy, "confident": entropy <= median, "fragile": entropy > median}
    found = {"candidates": C, "chance_rank": (C + 1) / 2, "chance_best": 1 / C, "median_entropy": median}
    for name, part in parts.items():
        rows = values[part]
        better, tied = rank(rows)
        found[name] = {"decisions": len(rows), "rank_shares": rank_shares(better.tolist(), tied.tolist(), C)}
        columns = {"regret": rows.amax(1) - rows[:, 0], "random_expert_cost": rows[:, 0] - rows.mean(1)}
        columns |= {"own_rank": 1 + better + tied / 2, "own_best": (better == 0) / (1 + tied)}
        for column, x in columns.items():
            found[name][column], found[name][f"{column}_standard_error"] = mean_and_error(x)
    return found


# ----------------------------------------------------------------- Ranks, and the other figures that belong beside them


def rank(values: Tensor, tolerance: float = TIE) -> tuple[Tensor, Tensor]:
    """values [S, R], the original first, higher is better -> how many others are better, and how many equal, [S]."""
    gap = values[:, 1:] - values[:, :1]
    return (gap > tolerance).sum(1), (gap.abs() <= tolerance).sum(1)


def reciprocal_rank(better: int, tied: int) -> float:
    """Expected 1/rank when ties are broken at random: the ranks better + 1 ... better + 1 + tied are equally likely."""
    return sum(1 / r for r in range(better + 1, better + tied + 2)) / (tied + 1)


def rank_shares(better: list[int], tied: list[int], ranks: int) -> list[float]:
    """Share of the samples at each rank; a tied sample is spread over the ranks that it shares."""
    shares = [0.0] * ranks
    for above, equal in zip(better, tied, strict=True):
        for r in range(above, above + equal + 1):
            shares[r] += 1 / (equal + 1) / len(better)
    return shares


def mean_and_error(x) -> tuple[float, float]:
    """Mean over the samples and its standard error (0 for a single sample)."""
    x = torch.as_tensor(x, dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else 0.0


def figures(scored: list[Scored], text: bool) -> dict:
    """What routing.json says of the ranked samples.

    Decision: one score everywhere. The perplexity of some tokens along some routes is exp of the mean of all their
    negative log-likelihoods, be it of one sample or of all; so a mean over routes is a geometric one, and the whole is
    the geometric mean of its samples. A task's score is a plain mean.
    """
    values = torch.stack([s.values for s in scored])  # [S, R]
    weights = torch.tensor([len(s.tokens) if text else 1 for s in scored], dtype=torch.float64)  # [S]
    if not values.isfinite().all() or not all(s.router_log_probs.isfinite().all() for s in scored):
        raise UserError("the model's log-probabilities are not finite: this checkpoint is broken")

    def in_units(mean: Tensor) -> Tensor:
        return (-mean).clamp(max=700).exp() if text else mean

    def score(columns: Tensor) -> float:  # of all samples along these routes
        return in_units((columns.mean(1) * weights).sum() / weights.sum()).item()

    better, tied = (t.tolist() for t in rank(values[:, :RANKED]))
    pairs = list(zip(better, tied, strict=True))
    mrr, mrr_error = mean_and_error([reciprocal_rank(*pair) for pair in pairs])
    hit1, hit1_error = mean_and_error([(above == 0) / (1 + equal) for above, equal in pairs])
    alphas, perturbed = route_alphas(), values[:, 1:RANKED]
    result = {"samples": len(scored), "routes": RANKED}
    result |= {"mrr": mrr, "mrr_standard_error": mrr_error, "chance_mrr": CHANCE_MRR}
    result |= {"hit1": hit1, "hit1_standard_error": hit1_error, "chance_hit1": CHANCE_HIT1}
    result |= {"original_score": score(values[:, :1]), "perturbed_score": score(perturbed)}
    result["best_of_99_score"] = score(perturbed.amax(1, keepdim=True))  # of each sample its best perturbed route
    result["robustness"] = {f"{a:g}": score(values[:, alphas == a]) for a in (0.0, *ALPHAS, 1.0)}
    result |= router_figures(scored)
    result |= {"better_routes": better, "tied_routes": tied, "rank_shares": rank_shares(better, tied, RANKED)}
    own, others = in_units(values[:, 0]).tolist(), in_units(perturbed.mean(1)).tolist()
    return result | {"original_scores": own, "perturbed_scores": others}


def router_figures(scored: list[Scored]) -> dict:
    """What the routers did along the original routes. Relative entropy: 1 where all experts are equally likely."""
    log_probs = torch.cat([s.router_log_probs for s in scored])[None]  # [1, N, L, E]
    experts = torch.cat([s.experts for s in scored])[None]  # [1, N, L, K]
    E, K, top1 = log_probs.shape[-1], experts.shape[-1], log_probs.amax(-1).exp()  # [1, N, L]
    report = {name: value.tolist() for name, value in routing_report(log_probs, experts=experts).items()}
    load = expert_load(experts, E, torch.ones(experts.shape[:2], dtype=torch.bool))  # [L, E]
    entropies = [h / math.log(E) for h in report["router_entropy_by_layer"]]
    found = {"top1_histogram": (torch.histc(top1, 20, 0, 1) / top1.numel()).tolist()}
    found |= {"top1_above_0.9": report["top1_above_0.9"], "routing_decisions": top1.numel(), "top_k": K}
    found |= {name + end: report[name + end] for name in ("router_entropy", "max_vio") for end in ("", "_by_layer")}
    found |= {"relative_router_entropy": report["router_entropy"] / math.log(E)}
    found |= {"relative_router_entropy_by_layer": entropies, "expert_load": load.tolist()}
    collapsed = (load.topk(K).values.sum(-1) > COLLAPSED).nonzero().flatten().tolist()
    return found | {"dead_experts": int(report["dead_experts"]), "collapsed_layers": collapsed}


# ---------------------------------------------------------------------------------------------------------- The program


def parse(argv: list[str]) -> argparse.Namespace:
    usage, epilog = "python eval_routing.py RUN [--FLAG VALUE ...]", "[...]: what the paper does."
    p = Parser(usage=usage, description=__doc__.split("\n\n")[0], allow_abbrev=False, epilog=epilog)
    add, count, whole = p.add_argument, number(int, low=1, high=10**8), number(int, low=0, high=10**8)
    add("run", metavar="RUN", help="a run folder of train.py")
    add("--dataset", type=one_of("data set", tuple(data.DATASETS)), help="default: the one the run was trained on")
    add("--data-dir", metavar="DIR", help="read the set from files below DIR; default: as the run did")
    add("--split", type=one_of("split", data.SPLITS), default="test", help="train, validation, test")
    add("--samples", type=count, default=300, help="samples to rank, at most those of the split [ERL section 6: 300]")
    add("--decisions", type=whole, default=1000, help="decisions at which each expert is forced; 0: none")
    add("--seed", type=whole, default=0, help="draws the samples, the random routes and the decisions")
    add("--compare", metavar="RUN2", help="a second run: which tokens stay with their experts [ERPO figure 3]")
    add("--out", metavar="DIR", help="where routing.json and the pictures go; default: RUN")
    add("--device", type=one_of("device", ("auto", "cpu", "cuda", "mps")), default="auto", help="auto, cpu, cuda, mps")
    add("--batch-size", type=count, help="routes in one forward; default: fits the device")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> dict:
    """Evaluate a run (see `parse`), write routing.json and the pictures, and return what routing.json holds."""
    args.out = args.out or args.run
    model, config, metadata = load_run(args.run)
    with as_user_error():
        model = model.to(pick_device(args.device))
    samples = load_samples(args, model, config)
    os.makedirs(args.out, exist_ok=True)
    if not os.access(args.out, os.W_OK):  # before the minutes that it takes
        raise UserError(f"cannot write into {args.out}: permission denied")
    compared = compare(args, model, config, samples) if args.compare else {}  # first: its mistakes show at once
    scored, decisions = rank_samples(args, model, samples), score_decisions(args, model, samples)
    text = samples.spec.kind == "text"
    result = {"run": args.run, "step": metadata.get("step"), "dataset": samples.spec.name, "split": args.split}
    result |= {"seed": args.seed, "score": "perplexity" if text else samples.spec.metric}
    result |= figures(scored, text) | compared | ({"regret": regret_figures(decisions)} if decisions else {})
    write_results(result, scored, samples.tokenizer, args.out)
    return result


def main(argv: list[str] | None = None) -> int:
    def program():
        args = parse(sys.argv[1:] if argv is None else argv)
        print(f"{describe(run(args))}\nrouting.json and the pictures are in {args.out}")

    return run_program("eval_routing.py", program)


if __name__ == "__main__":
    sys.exit(main())
