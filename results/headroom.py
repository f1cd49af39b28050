"""E1 and E2 of PLAN.md: how much could routing bring, what of it can be learnt, and does ERL learn it?

    python results/headroom.py STARTS --data-dir DIR --setting a-new --check        PLAN.md's checks
    python results/headroom.py STARTS --data-dir DIR --setting a-new --all-rates    its arms
    python results/headroom.py STARTS --data-dir DIR --setting c                    all weights learn a new text
    python results/headroom.py STARTS --data-dir DIR --setting prob                 the same with the gate `prob`
    python results/headroom_report.py                                               tables, verdicts, pictures

STARTS/N is a run folder of `train.py --algo lm` with the settings of PLAN.md, for `--setting real` what real_model.py
wrote. A run that has its row is not run again.

With `moe_every = 2` the last block holds experts and no attention follows it: the expert that a token takes there
changes the prediction of that token alone. So one forward up to the last router, and all E experts applied to every
token, give the exact log p of the next token under every expert. B windows, T positions, D width, E experts, m passes,
R routes.
"""

import argparse
import itertools
import math
import os
import pathlib
import statistics
import sys
from collections import defaultdict
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

import data
from erl import Pass, erl_objective, explore, random_routes
from moe import GPT, Routes, feed_forward, lm_loss, router_losses, token_log_probs
from results.rows import add_row, read_rows, versions
from support.checkpoints import find_checkpoint, load_model
from support.controls import constant, random_expert
from support.optimizer import learning_rate, make_optimizer, set_learning_rate
from support.tasks import TextBatches, rng

T, E, RANKED, R = 256, 8, 300, 99  # context, experts, windows whose routes are ranked, perturbed routes of a window
STEPS, BATCH, RATES = 600, 8, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
ALPHA, M = 0.6, 3
LABELS = {  # the arms of PLAN.md
    "none": "balance and z losses alone",
    "exact": "exact credit",
    "erl": "ERL as written",
    "ratio-uniform": "ratio to the uniform draw",
    "draw-router": "experts drawn from the router",
    "random-credit": "ERL, random experts credited",
    "constant": "ERL, a constant advantage",
    "erl-again": "ERL once more, other draws",
}
ARMS = tuple(LABELS)
ABLATIONS = {  # options of `explore` that the paper varies; run by --arms
    "erl-log": {"advantage": "log"},
    "erl-alpha-0.1": {"alpha": 0.1},
    "erl-alpha-0.3": {"alpha": 0.3},
    "erl-alpha-0.9": {"alpha": 0.9},
    "ratio-uniform-log": {"advantage": "log"},
}
LABELS |= {"published": "as the public code, labels shifted"}  # its code is at commit 2791aff
LABELS |= {"erl-log": "ERL, advantage log", "ratio-uniform-log": "ratio to the uniform draw, advantage log"}
LABELS |= {f"erl-alpha-{alpha}": f"ERL, alpha {alpha}" for alpha in (0.1, 0.3, 0.9)}
TEXTS = {"a": "wikitext2", "a-new": "pydocs", "c": "pydocs", "prob": "pydocs", "real": "smollm2"}  # PLAN.md's settings
CONFIRM = 7  # starts of "real" from this one on read windows of their own, for the claims of PLAN.md's last plan
FREE = {"c": "e1-free", "prob": "e1-prob"}  # settings where all weights learn: their rows
BALANCE = {"renorm": 1e-3, "prob": 2e-2}  # by gate: with `prob` and .001 one expert takes nearly all
# (c), `prob`: an arm, and how far its RL loss reaches (--erl-grad); the rate of all but the routers, theirs on start 0
FREE_ARMS = ("none", "exact", "erl all", "random-credit all", "erl router", "random-credit router")
FREE_ARMS += ("ratio-uniform router", "erl-again router")
FREE_STEPS, FREE_RATE, FREE_RATES = 400, 3e-4, (3e-4, 3e-3, 1e-2)


class Decisions(NamedTuple):
    """What the last router decides on, and what each of its choices is worth."""

    inputs: Tensor  # [B, T, D], what the router reads
    log_probs: Tensor  # [B, T, E], log p of the next token under every expert


@torch.no_grad()
def last_decisions(model: GPT, batches) -> Decisions:
    """Exact counterfactuals of the last block, all else along the own route (K = 1), of many tokens [B, T + 1].

    An expert has the weight that the gate gives it: 1 with `renorm`, with `prob` the router's P of it.
    """
    found, last = [], model.blocks[-1]
    for tokens in batches:
        x = model.stem(tokens[:, :-1])
        for block in model.blocks[model.first_moe_block : -1]:
            x, _ = block(x)
        x = x + last.attn(last.ln_1(x))
        h = last.ln_2(x)  # [B, T, D]
        networks = zip(*(p.unbind(0) for p in last.mlp.experts.parameters()), strict=True)
        P = last.mlp.router(h).softmax(-1).unbind(-1) if model.config.gate == "prob" else [torch.ones(())] * E
        outputs = (model.ln_f(x + p[..., None] * feed_forward(h, *net)) for p, net in zip(P, networks, strict=True))
        worth = [token_log_probs(y, model.wte.weight, tokens[:, 1:]) for y in outputs]
        found.append((h, torch.stack(worth, -1)))
    return Decisions(*map(torch.cat, zip(*found, strict=True)))


def exact_credit(logits: Tensor, log_probs: Tensor) -> Tensor:
    """-E_P log p(next token): ERL's reward without its noise and its sign. Both [B, T, E]."""
    return -(logits.softmax(-1) * log_probs).sum(-1).mean()


def router_loss(logits: Tensor) -> Tensor:
    """Balance and z losses of one router's logits [B, T, E]."""
    balance, z, _ = router_losses(logits[:, :, None], logits.argmax(-1)[:, :, None, None])
    return 1e-3 * (balance + z).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


def erl_arm(arm: str, forward, mask: Tensor, generator, means: list) -> Tensor:
    """L_o + delta * L_p. `means`: ERL's mean advantage at each step; ERL adds to it, `constant` uses it up."""

    options = {"alpha": ALPHA, "n_perturb": M, "draw": "router" if arm == "draw-router" else "uniform"}
    paths = explore(forward, mask, 1, **options | ABLATIONS.get(arm, {}), generator=generator)
    if arm == "erl":
        counted = paths.S.sum(-1)
        means.append(((paths.advantages * counted).sum() / counted.sum()).item())
    elif arm == "random-credit":
        paths = random_expert(paths, generator)
    elif arm == "constant":
        paths = constant(paths, means.pop(0))
    ((loss, _),) = erl_objective(forward, paths, ratio="uniform" if arm.startswith("ratio-uniform") else "router")
    return loss


def last_router_loss(arm: str, weight: Tensor, inputs: Tensor, log_probs: Tensor, generator, means: list) -> Tensor:
    """An arm's loss where the last router alone is trained: all that it needs of the model are the decisions."""
    logits = inputs @ weight.T  # [B, T, E]
    if arm in ("none", "exact"):
        return router_loss(logits) + (exact_credit(logits, log_probs) if arm == "exact" else 0)

    def forward(routes):
        copies = 1 if routes is None else M
        log_p = logits.repeat(copies, 1, 1).log_softmax(-1)  # [B or m * B, T, E]
        experts = log_p.argmax(-1, keepdim=True)
        if routes is not None:
            experts = torch.where(routes[1], routes[0][:, :, 0], experts)
        worth = log_probs.repeat(copies, 1, 1).gather(-1, experts)[..., 0]
        return Pass(worth, log_p[:, :, None], router_loss(logits) if routes is None else None)

    return erl_arm(arm, forward, torch.ones(inputs.shape[:2], dtype=torch.bool), generator, means)


def train_last_router(arm: str, weight: Tensor, decisions: Decisions, rate: float, key=(), means=None) -> Tensor:
    """STEPS updates of a router weight [E, D] on the decisions, again from their beginning where they end."""
    weight = weight.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.999), weight_decay=0.1)
    parts = list(zip(*(t.split(BATCH) for t in decisions), strict=True))
    for step, part in zip(range(STEPS), itertools.cycle(parts), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, rate)
        optimizer.zero_grad()
        generator = rng(*key, "again" if arm == "erl-again" else "routes", step)
        last_router_loss(arm, weight, *part, generator, means).backward()
        optimizer.step()
    return weight.detach()


def free_loss(model: GPT, tokens: Tensor, arm: str, gradient: str, generator) -> Tensor:
    """An arm's loss on one batch [B, T + 1] where everything is trained."""
    targets, hidden = tokens[:, 1:], model.stem(tokens[:, :-1])

    def forward(routes):
        if routes is None:
            features, routing = model.branch(hidden)
            loss, log_probs = lm_loss(features, model.wte.weight, targets)
            balance, z, _ = router_losses(routing.logits, routing.experts)
            loss = loss + (BALANCE[model.config.gate] * balance + 1e-3 * z).sum()
            if arm == "exact":
                logits, worth = model.route_again(routing.inputs)[:, :, -1], last_decisions(model, [tokens]).log_probs
                loss = loss + exact_credit(logits, worth)
            return Pass(log_probs, routing.logits.detach().log_softmax(-1), loss)
        with torch.set_grad_enabled(gradient == "all"):
            features, routing = model.branch(hidden.repeat(M, 1, 1), routes=Routes(*routes))
        logits = routing.logits if gradient == "all" else model.route_again(routing.inputs)
        with torch.no_grad():
            log_probs = token_log_probs(features, model.wte.weight, targets.repeat(M, 1))
        return Pass(log_probs, logits.log_softmax(-1), None)

    if arm in ("none", "exact"):
        return forward(None).loss
    return erl_arm(arm, forward, torch.ones_like(targets, dtype=torch.bool), generator, [])


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def draw_routes(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """99 perturbed routes of each window (ERL table 4) in the last layer, the same for all routers that are compared.

    log_probs [B, T, E] -> where the own expert stays [B, R, T], and the sum of log p where it does not [B, R].
    """
    log_probs = log_probs[:RANKED]
    alphas = torch.tensor((0.25, 0.5, 0.75)).repeat_interleave(R // 3).repeat(len(log_probs))
    experts, forced = random_routes(len(alphas), T, 1, log_probs.shape[-1], 1, alphas, generator=rng("ranked"))
    worth = log_probs.repeat_interleave(R, 0).gather(-1, experts[:, :, 0])[..., 0] * forced[..., 0]  # [B * R, T]
    return (~forced).float().view(-1, R, T), worth.sum(-1).view(-1, R)


def score(weight: Tensor, test: Decisions, kept: Tensor, forced: Tensor) -> dict:
    """Of the last block's decisions along the own route; kept and forced as `draw_routes` gives them."""
    log_p = (test.inputs @ weight.T).log_softmax(-1)
    experts = log_p.argmax(-1, keepdim=True)
    own = test.log_probs.gather(-1, experts)[..., 0]  # [B, T]
    ranked = own[:RANKED, :, None]
    gap = (forced + (kept @ ranked)[..., 0] - ranked.sum(1)) / T  # [B, R], positive: the perturbed route is better
    places = zip((gap > 1e-6).sum(1).tolist(), (gap.abs() <= 1e-6).sum(1).tolist(), strict=True)
    # ties count as their expectation under random tie-breaking
    mrr = statistics.fmean(statistics.fmean(1 / r for r in range(n + 1, n + tied + 2)) for n, tied in places)
    return {
        "nats": -own.mean().item(),
        "regret": (test.log_probs.amax(-1) - own).mean().item(),
        "random_cost": (own - test.log_probs.mean(-1)).mean().item(),
        "mrr": mrr,
        "entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
        "max_load": experts.flatten().bincount().max().item() / experts.numel(),
    }


def count_perplexity(train: np.ndarray, windows: Tensor, order: int) -> float:
    """A count of n-grams of bytes that backs off to shorter ones (Witten-Bell), on the predictions of the windows."""
    train, windows = train.astype(np.uint64), windows.numpy().astype(np.uint64)
    p = np.full((len(windows), T), 1 / 257)
    for n in range(1, order + 1):
        keys, counts = np.unique(
            sum(train[i : len(train) - n + 1 + i] * 257 ** (n - 1 - i) for i in range(n)), return_counts=True
        )
        contexts, first, kinds = np.unique(keys // 257, return_index=True, return_counts=True)  # keys are sorted
        totals, here = np.add.reduceat(counts, first), np.arange(n - 1, T)  # the whole context lies in the window
        gram = sum(windows[:, here + 2 - n + i] * 257 ** (n - 1 - i) for i in range(n))  # index t predicts t + 1
        at = np.searchsorted(keys, gram).clip(max=len(keys) - 1)
        of = np.searchsorted(contexts, gram // 257).clip(max=len(contexts) - 1)
        known, seen = contexts[of] == gram // 257, counts[at] * (keys[at] == gram)
        p[:, here] = np.where(known, (seen + kinds[of] * p[:, here]) / (totals[of] + kinds[of]), p[:, here])
    return float(np.exp(-np.log(p).mean()))


@torch.no_grad()
def random_perplexity(model: GPT, windows: Tensor) -> float:
    """With every decision of every layer replaced by a random expert."""
    total, L = 0.0, len(model.config.moe_blocks)
    for i, part in enumerate(windows.split(16)):
        routes = Routes(*random_routes(len(part), T, L, E, 1, 1.0, generator=rng("random routes", i)))
        total += lm_loss(model(part[:, :-1], routes=routes)[0], model.wte.weight, part[:, 1:])[0].item() * len(part)
    return math.exp(total / len(windows))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def load_text(name: str, data_dir, batch_size: int, *key) -> tuple[TextBatches, Tensor]:
    """Training batches, and 400 windows [400, T + 1] (or what there is), evenly spread over the test split."""
    splits = [
        data.load_text(name, s, data.load_tokenizer("bytes"), data_dir=data_dir).tokens for s in ("train", "test")
    ]
    count = min(400, len(splits[1]) // T)
    starts = [i * (len(splits[1]) - T - 1) // count for i in range(count)]
    windows = torch.stack([torch.from_numpy(splits[1][s : s + T + 1].astype("int64")) for s in starts])
    return TextBatches(splits[0], T, batch_size, key), windows


def prepare(folder: pathlib.Path, start: int, text: str, data_dir) -> tuple[Decisions, Decisions]:
    """A start's decisions on STEPS training batches (at most an epoch) and on the test windows, kept beside it."""
    if not (kept := folder / f"decisions-{text}.pt").exists():
        model, _ = load_model(find_checkpoint(folder))
        batch, windows = load_text(text, data_dir, BATCH, "arms", start)
        parts = (batch(step).tokens for step in range(min(STEPS, batch.per_epoch // BATCH))), windows.split(16)
        torch.save([tuple(last_decisions(model, part)) for part in parts], kept)
    return tuple(Decisions(*part) for part in torch.load(kept))


def new_router(start: int, decisions: Decisions) -> Tensor:
    shape = decisions.log_probs.shape[-1], decisions.inputs.shape[-1]  # [E, D]
    return 0.1 * torch.randn(shape, generator=rng(start, "new last router", 0))


def run_check(folder: pathlib.Path, start: int, text: str, data_dir) -> dict:
    train, test = prepare(folder, start, text, data_dir)
    routes = draw_routes(test.log_probs)

    def nats(arm, weight):
        return min(score(train_last_router(arm, weight, train, r), test, *routes)["nats"] for r in RATES)

    anew = {f"nats_{arm}": nats(arm, new_router(start, train)) for arm in ("none", "exact")}
    anew["headroom"] = anew["nats_none"] - anew["nats_exact"]
    if text == "smollm2":
        return anew
    (model, _), (batch, windows) = load_model(find_checkpoint(folder)), load_text(text, data_dir, 1)
    settled = model.blocks[-1].mlp.router.weight.detach()
    own, random = score(settled, test, *routes), random_perplexity(model, windows)
    found = {"perplexity": math.exp(own["nats"]), "random_cost": random / math.exp(own["nats"]) - 1}
    found |= {f"count_{n}": count_perplexity(batch.tokens, windows, n) for n in (4, 5)}
    found |= {"nats": own["nats"], "regret": own["regret"], "gain_own_router": own["nats"] - nats("exact", settled)}
    return found | anew


def run_arms(folder: pathlib.Path, start: int, text: str, data_dir, rate: float, arms: set):
    """Rows of those arms at one rate."""
    (train, test), means = prepare(folder, start, text, data_dir), []
    routes = draw_routes(test.log_probs)
    for arm in (*ARMS, *ABLATIONS):
        if arm in arms or arm == "erl" and "constant" in arms:  # `constant` takes the means of `erl`
            weight = train_last_router(arm, new_router(start, train), train, rate, (start, 0), means)
            if arm in arms:
                yield {"draw": 0, "arm": arm, "rate": rate} | score(weight, test, *routes)


def run_free(folder: pathlib.Path, start: int, text: str, data_dir, arm: str, rate: float) -> dict:
    """The row of one arm of (c). `left`: what exact credit would still gain on its last router."""
    (batch, windows), (more, _) = (load_text(text, data_dir, 4, use, start) for use in ("free", "left"))
    (model, _), (name, gradient) = load_model(find_checkpoint(folder)), f"{arm} all".split()[:2]
    optimizer = make_optimizer(model, 0.1, rate / FREE_RATE)
    for step in range(FREE_STEPS):
        set_learning_rate(optimizer, step, FREE_STEPS, FREE_RATE)
        optimizer.zero_grad()
        generator = rng(start, "again" if name == "erl-again" else "routes", step)
        free_loss(model, batch(step).tokens, name, gradient, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    test, weight = last_decisions(model, windows.split(16)), model.blocks[-1].mlp.router.weight.detach()
    figures = score(weight, test, *(routes := draw_routes(test.log_probs)))
    with torch.no_grad():  # the largest load of any layer
        loads = [layer.flatten().bincount(minlength=E) for layer in model(windows[:64, :-1])[1].experts.unbind(2)]
    figures["max_load"] = max(load.max().item() / load.sum().item() for load in loads)
    decisions = last_decisions(model, (more(step).tokens for step in range(100)))
    left = figures["nats"] - score(train_last_router("exact", weight, decisions, 1e-2), test, *routes)["nats"]
    return {"arm": arm, "rate": rate} | figures | {"left": left}


def free_rate(rows) -> float:
    """The routers' rate of every arm of (c): ERL's best on start 0, so that no difference is one of rates."""
    nats = figures_of(rows, "nats", tuning=True)
    return min(FREE_RATES, key=lambda rate: nats["erl router", rate][0])


def run_all_free(name: str, folder: pathlib.Path, start: int, text: str, data_dir):
    """The arms of (c) or of `prob` in one start; on the tuning start ERL alone, at every rate."""
    rates = FREE_RATES if start == 0 else [free_rate(read_rows("e1-free"))]
    for arm, rate in itertools.product(["erl router"] if start == 0 else FREE_ARMS, rates):
        if (start, arm, rate) not in {(r["start"], r["arm"], r["rate"]) for r in read_rows(name)}:
            add_row(name, {"start": start} | run_free(folder, start, text, data_dir, arm, rate) | versions())


def figures_of(rows, figure: str, tuning: bool = False) -> dict[tuple, dict]:
    """(arm, rate) -> start -> a figure."""
    found = defaultdict(dict)
    for r in rows:
        if (r["start"] == 0) == tuning:
            found[r["arm"], r["rate"]][r["start"]] = r[figure]
    return found


def chosen_rates(rows) -> dict[str, float]:
    """Of each arm of a setting: the rate with the fewest nats on start 0, the tuning start."""
    nats = figures_of(rows, "nats", tuning=True)
    rates = {arm: min(RATES, key=lambda rate: nats[arm, rate][0]) for arm in dict.fromkeys(arm for arm, _ in nats)}
    return rates | {"erl-again": rates["erl"]}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", help="of the starts")
    p.add_argument("--data-dir", help="as train.py's")
    p.add_argument("--setting", choices=TEXTS, default="a-new")
    p.add_argument("--check", action="store_true", help="the checks of the setting instead of its arms")
    p.add_argument("--starts", type=int, nargs="+", default=range(7))
    p.add_argument("--arms", nargs="+", choices=[*ARMS, *ABLATIONS], default=ARMS, help="where the router is alone")
    p.add_argument("--all-rates", action="store_true", help="not only the rates that start 0 chose")
    args = p.parse_args()
    name = "checks" if args.check else "e1"
    for start in args.starts:
        where = pathlib.Path(args.folder, str(start)), start, TEXTS[args.setting], args.data_dir
        if args.setting in FREE and not args.check:
            run_all_free(FREE[args.setting], *where)
            continue
        of_setting = [r for r in read_rows(name) if r["setting"] == args.setting]
        rows = [r for r in of_setting if r["start"] == start]
        found = [] if rows or not args.check else [run_check(*where)]
        chosen = {} if args.check or args.all_rates else chosen_rates(of_setting)
        for rate in () if args.check else RATES:
            arms = {arm for arm in args.arms if chosen.get(arm, rate) == rate}
            arms -= {r["arm"] for r in rows if r["rate"] == rate}
            found = itertools.chain(found, run_arms(*where, rate, arms) if arms else ())
        for row in found:
            add_row(name, {"setting": args.setting, "start": start} | row | versions())


if __name__ == "__main__":
    main()
