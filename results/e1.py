"""E1 of PLAN.md: does ERL find what exact credit finds? Runs, verdicts, table and picture.

    python results/e1.py STARTS --data-dir DIR --setting a     the last router is drawn anew and alone is trained
    python results/e1.py STARTS --data-dir DIR --setting b     all routers are drawn anew, everything is free
    python results/e1.py STARTS --data-dir DIR --setting c     another text, everything is free
    python results/e1.py report                                tables, verdicts and picture from results/e1.csv

STARTS is what results/headroom.py takes. A run that has its row in results/e1.csv is not run again.
"""

import argparse
import itertools
import pathlib
import statistics
import sys
from collections import defaultdict

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import matplotlib
import torch
from scipy import stats

from erl import Pass, erl_objective, explore
from moe import Routes, lm_loss, router_losses, token_log_probs
from results import headroom
from results.headroom import FOLDER, RATES, STEPS, Ranking, exact_credit, exact_loss, router_loss, score_router
from support.controls import constant, random_expert
from support.optimizer import learning_rate, make_optimizer
from support.tasks import rng

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CSV = FOLDER / "e1.csv"
ARMS = ["none", "exact", "erl", "ratio-uniform", "draw-router", "random-credit", "constant", "published", "erl-again"]
ALPHA, M = 0.6, 3
MODEL_RATE = 3e-4  # (b), (c): of everything but the routers
FREE_ARMS = [("none", "all"), ("exact", "all"), ("erl", "all"), ("erl", "router"), ("ratio-uniform", "router")]
FREE_ARMS += [("random-credit", "all"), ("random-credit", "router"), ("draw-router", "router")]


def one_map(S: torch.Tensor, generator):
    """`published`: which decisions are replaced is drawn for each layer and token, an exact count, for all rows."""
    rows, T, L = S.shape
    for part in S.split(rows // M):
        chosen = torch.randperm(T * L, generator=generator)[: round(ALPHA * T * L)]
        part.copy_(torch.zeros(T * L, dtype=torch.bool).index_fill(0, chosen, True).view(T, L).expand_as(part))


def arm_loss(arm: str, forward, mask, generator, means: list):
    """L_o + delta * L_p of an arm. `means`: ERL's mean advantage at each step; ERL adds to it, `constant` uses it up."""

    def mapped(routes):
        if arm == "published" and routes is not None:
            one_map(routes[1], generator)  # S of `explore` too: the same tensor
        return forward(routes)

    drawn = "router" if arm in ("draw-router", "published") else "uniform"
    paths = explore(mapped, mask, 1, alpha=ALPHA, n_perturb=M, draw=drawn, generator=generator)
    if arm == "erl":
        counted = paths.S.sum(-1)
        means.append(((paths.advantages * counted).sum() / counted.sum()).item())
    elif arm == "random-credit":
        paths = random_expert(paths, generator)
    elif arm == "constant":
        paths = constant(paths, means.pop(0))
    ((loss, _),) = erl_objective(forward, paths, ratio="uniform" if arm == "ratio-uniform" else "router")
    return loss


def cached_loss(arm: str, key: tuple, means: list):
    """(a): loss_of for train_router. All that an arm needs of the model are the cached decisions."""

    def loss_of(step, inputs, log_probs, weight):
        generator = rng(*key, "again" if arm == "erl-again" else "routes", step)
        noise = 0.01 if arm == "published" else 0.0

        def logits(copies):
            x = inputs.repeat(copies, 1, 1)
            return (x * (1 + noise * (2 * torch.rand(x.shape, generator=generator) - 1)) if noise else x) @ weight.T

        def forward(routes):
            z = logits(1 if routes is None or not noise else M)  # [B or m * B, T, E]
            z = z if routes is None or noise else z.repeat(M, 1, 1)
            experts = z.argmax(-1, keepdim=True)  # [.., T, 1]
            if routes is not None:
                experts = torch.where(routes[1], routes[0][:, :, 0], experts)
            worth = log_probs.repeat(len(z) // len(log_probs), 1, 1).gather(-1, experts)[..., 0]
            return Pass(worth, z.log_softmax(-1)[:, :, None], router_loss(z) if routes is None else None)

        if arm in ("none", "exact"):
            z = logits(1)
            return router_loss(z) + (exact_credit(z, log_probs) if arm == "exact" else 0)
        return arm_loss(arm, forward, torch.ones(inputs.shape[:2], dtype=torch.bool), generator, means)

    return loss_of


def run_a(folder, start: int, draws, data_dir, path):
    done = {(r["start"], r["draw"], r["rate"]) for r in headroom.read_rows(path) if r["setting"] == "a"}
    wanted = [(d, r) for d in draws for r in RATES if (str(start), str(d), f"{r:.6g}") not in done]
    if not wanted:
        return
    _, train, test = headroom.prepare(folder, start, data_dir)
    ranking = Ranking(test.log_probs)
    for draw, rate in wanted:
        rows, means = [], []
        for arm in ARMS:
            weight = headroom.draw_router(start, draw) * (1.0 if arm == "published" else 0.1)
            weight = headroom.train_router(weight, train, rate, cached_loss(arm, (start, draw), means))
            row = {"setting": "a", "start": start, "draw": draw, "arm": arm, "gradient": "router", "rate": rate}
            rows.append(row | score_router(weight, test, ranking) | {"headroom_left": ""} | headroom.versions())
        headroom.add_rows(path, rows)


def free_loss(model, tokens, arm: str, gradient: str, generator):
    """(b), (c): an arm's loss on one batch [B, T + 1], everything free."""
    targets, hidden = tokens[:, 1:], model.stem(tokens[:, :-1])

    def forward(routes):
        if routes is None:
            features, routing = model.branch(hidden)
            loss, log_probs = lm_loss(features, model.wte.weight, targets)
            balance, z, _ = router_losses(routing.logits, routing.experts)
            loss = loss + (1e-3 * (balance + z)).sum()
            if arm == "exact":
                logits = model.route_again(routing.inputs)[:, :, -1]
                loss = loss + exact_credit(logits, headroom.last_decisions(model, tokens).log_probs)
            return Pass(log_probs, routing.logits.detach().log_softmax(-1), loss)
        with torch.set_grad_enabled(gradient == "all"):
            features, routing = model.branch(hidden.repeat(M, 1, 1), routes=Routes(*routes))
        logits = routing.logits if gradient == "all" else model.route_again(routing.inputs)
        with torch.no_grad():
            log_probs = token_log_probs(features, model.wte.weight, targets.repeat(M, 1))
        return Pass(log_probs, logits.log_softmax(-1), None)

    if arm in ("none", "exact"):
        return forward(None).loss
    return arm_loss(arm, forward, torch.ones_like(targets, dtype=torch.bool), generator, [])


def run_free(setting: str, folder, start: int, data_dir, path):
    text = "pydocs" if setting == "c" else "wikitext2"
    rates, windows = chosen_rates(headroom.read_rows(path)), headroom.load_windows(text, "test", data_dir, 200)
    done = {(r["setting"], r["start"], r["arm"], r["gradient"]) for r in headroom.read_rows(path)}
    for arm, gradient in FREE_ARMS:
        if (setting, str(start), arm, gradient) in done:
            continue
        model, batch = (
            headroom.load_start(pathlib.Path(folder, str(start))),
            headroom.training_batches(text, data_dir, 4, f"free {start}"),
        )
        for i in model.config.moe_blocks if setting == "b" else ():
            torch.nn.init.normal_(model.blocks[i].mlp.router.weight, std=0.1, generator=rng(start, "new routers", i))
        optimizer = make_optimizer(model, 0.1, rates[arm] / MODEL_RATE)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, STEPS, MODEL_RATE) * group["factor"]
            optimizer.zero_grad()
            free_loss(model, batch(step).tokens, arm, gradient, rng(start, "routes", step)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        test, weight = headroom.decisions_of(model, windows.split(16)), model.blocks[-1].mlp.router.weight.detach()
        figures = score_router(weight, test, ranking := Ranking(test.log_probs))
        with torch.no_grad():
            experts = model(windows[:64, :-1])[1].experts
        loads = [experts[:, :, layer].flatten().bincount(minlength=8).max() / (64 * 256) for layer in range(2)]
        figures["max_load"] = max(figures["max_load"], *map(float, loads))
        more = headroom.training_batches(text, data_dir, 4, f"left {start}")
        more = headroom.decisions_of(model, (more(step).tokens for step in range(100)))
        left = headroom.train_router(weight, more, 1e-2, exact_loss)
        figures["headroom_left"] = figures["nats"] - score_router(left, test, ranking)["nats"]
        row = {"setting": setting, "start": start, "draw": "", "arm": arm, "gradient": gradient, "rate": rates[arm]}
        headroom.add_rows(path, [row | figures | headroom.versions()])


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

SHOWN = ("nats", "regret", "mrr", "entropy", "max_load")
LABELS = {
    "erl": "ERL as written",
    "ratio-uniform": "ratio to the uniform draw",
    "draw-router": "experts drawn from the router",
}
LABELS |= {"random-credit": "ERL, random experts credited", "constant": "ERL, a constant advantage"}


def chosen_rates(rows) -> dict[str, float]:
    """Of each arm in (a): the rate with the fewest nats on start 0, the tuning start."""
    nats = of_starts(rows, "a", "nats", tuning=True)
    return {arm: min(RATES, key=lambda rate: nats[arm, "router", rate][0]) for arm in ARMS}


def of_starts(rows, setting: str, figure: str, tuning: bool = False) -> dict[tuple, list[float]]:
    """(arm, gradient, rate) -> a figure of each start, in their order, averaged over the draws of a start."""
    found = defaultdict(lambda: defaultdict(list))
    for r in rows:
        if r["setting"] == setting and (r["start"] == "0") == tuning:
            found[r["arm"], r["gradient"], float(r["rate"])][int(r["start"])].append(float(r[figure] or "nan"))
    return {arm: [statistics.fmean(starts[s]) for s in sorted(starts)] for arm, starts in found.items()}


def interval(values) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % t interval."""
    mean, n = statistics.fmean(values), len(values)
    reach = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5 if n > 1 else float("inf")
    return mean, mean - reach, mean + reach


def show(values) -> str:
    mean, low, high = interval(values)
    text, ordered = f"{mean:.4f} [{low:.4f}, {high:.4f}]", sorted(values)
    if len(values) > 2 and max(less(ordered[1:], ordered[:-1])) > (ordered[-1] - ordered[0]) / 2:  # bimodal
        flips = itertools.product((1, -1), repeat=len(values))  # exact test of a mean of 0
        sums = [abs(sum(sign * v for sign, v in zip(flip, values, strict=True))) for flip in flips]
        text += f", p = {statistics.fmean(s >= abs(sum(values)) - 1e-12 for s in sums):.3f}"
    return text


def less(a, b) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def report_a(rows) -> list[str]:
    rates, nats = chosen_rates(rows), of_starts(rows, "a", "nats")
    arm = {name: (name, "router", rates[name]) for name in ARMS}
    none, headroom_ = nats[arm["none"]], less(nats[arm["none"]], nats[arm["exact"]])
    share = {key: [x / h for x, h in zip(less(none, values), headroom_, strict=True)] for key, values in nats.items()}
    lines = [f"## (a) The last router alone, {len(none)} starts, headroom {show(headroom_)} nats", ""]
    lines += ["| arm | rate | share recovered | " + " | ".join(SHOWN) + " |", "| --- " * (3 + len(SHOWN)) + "|"]
    for name in ARMS:
        figures = [statistics.fmean(of_starts(rows, "a", f)[arm[name]]) for f in SHOWN]
        lines.append(
            f"| {name} | {rates[name]:g} | {show(share[arm[name]])} | " + " | ".join(f"{x:.4f}" for x in figures) + " |"
        )
    erl, gain = share[arm["erl"]], less(share[arm["erl"]], share[arm["random-credit"]])
    collapsed = max(of_starts(rows, "a", "max_load")[arm["erl"]]) > 0.9
    holds = interval(erl)[1] >= 0.25 and interval(gain)[1] > 0 and not collapsed
    verdict = "holds" if holds else "is refuted" if interval(erl)[2] < 0.1 else "is not decided"
    lines += [
        "",
        f"ERL less random credit: {show(gain)}. ERL once more less ERL: {show(less(share[arm['erl-again']], erl))}.",
    ]
    lines += [f"**ERL's claim {verdict} in (a).**"]
    for name in ("constant", "random-credit"):
        mrr, mean = (statistics.fmean(x) for x in (of_starts(rows, "a", "mrr")[arm[name]], share[arm[name]]))
        lines.append(
            f"{name}: MRR {mrr:.3f}, share {mean:.3f}: MRR is {'no ' * (mrr >= 0.17 and mean < 0.1)}evidence of credit."
        )
    draw_picture(share, of_starts(rows, "a", "entropy"))
    return lines


def report_free(rows, setting: str, tenth: float) -> list[str]:
    figures = {f: {key[:2]: v for key, v in of_starts(rows, setting, f).items()} for f in (*SHOWN, "headroom_left")}
    nats, lines = figures["nats"], []
    for key, values in nats.items():
        n = len(values)
        gains = [
            show(less(nats[other][:n], values))
            for other in (("none", "all"), ("random-credit", key[1]))
            if other in nats
        ]
        lines.append(
            f"| {' '.join(key)} | {n} | "
            + " | ".join(gains)
            + " | "
            + " | ".join(f"{statistics.fmean(f[key]):.4f}" for f in figures.values())
            + " |"
        )
    return [f"## ({setting})", "", *lines]


def draw_picture(share, entropy):
    plt.rcParams["font.size"] = 13
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for panel, title, values in zip(
        panels, ("share of the learnable headroom recovered", "router entropy (nats)"), (share, entropy), strict=True
    ):
        for (name, label), style in zip(LABELS.items(), ("o-", "s-", "^-", "o--", "s--"), strict=True):
            points = [interval(values[name, "router", rate]) for rate in RATES]
            middle, low, high = zip(*points, strict=True)
            panel.errorbar(RATES, middle, [less(middle, low), less(high, middle)], fmt=style, capsize=3, label=label)
        panel.set(xscale="log", xlabel="learning rate of the router", title=title)
    panels[0].axhline(1, color="gray", linestyle=":", label="exact credit, best rate")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, frameon=False)
    figure.savefig(FOLDER / "real-router.png", dpi=110)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", help="of the starts, or `report`")
    p.add_argument("--data-dir")
    p.add_argument("--setting", choices="abc", default="a")
    p.add_argument("--starts", default="0-6", help="first-last")
    p.add_argument("--draws", type=int, nargs="+", default=[0], help="of the new router in (a)")
    p.add_argument("--csv", default=CSV)
    args = p.parse_args()
    if args.folder == "report":
        rows = headroom.read_rows(args.csv)
        lines = report_a(rows)
        for setting in {r["setting"] for r in rows} - {"a"}:
            lines += ["", *report_free(rows, setting, 0.1)]
        print("\n".join(lines))
        sys.exit()
    first, _, last = args.starts.partition("-")
    for start in range(int(first), int(last or first) + 1):
        if args.setting == "a":
            run_a(args.folder, start, args.draws, args.data_dir, args.csv)
        else:
            run_free(args.setting, args.folder, start, args.data_dir, args.csv)
