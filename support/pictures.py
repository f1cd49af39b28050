"""Pictures of runs: curves.png of one or of several, and the routing_*.png of eval_routing.py.

    python -m support.pictures RUN              once more its curves.png
    python -m support.pictures RUN RUN2 ...     RUN/comparison.png: a line an algorithm, mean and range of its seeds

--out FILE.png puts it elsewhere. Every picture is 1,200 pixels wide. Names that users chose are never read as formulas.
"""

import math
import os
import sys
import textwrap
import warnings
from collections import defaultdict
from statistics import fmean

if __name__ == "__main__":
    from support.errors import begin_program

    begin_program()

from support.arguments import Parser, read_config
from support.errors import UserError, run_program
from support.run import read_metrics

BY_CHANCE = {"color": "black", "ls": "--", "lw": 1}  # a line for what chance or evenness would give


def new_figure(height: float, width: float = 8):
    """A figure of so many inches, without pyplot: no window, no global state."""
    if "IPython" not in sys.modules:  # what a notebook runs inherits its MPLBACKEND, which may not be installed there
        os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def rounded(value: float, digits: int = 4) -> str:
    """What rounds to zero without being it keeps its order of magnitude."""
    return f"{value:.{digits}f}" if not value or abs(value) >= 0.5 * 10**-digits else f"{value:.0e}"


def save(figure, path: str):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font lacks some scripts
        figure.savefig(path, dpi=150)


def name_of(folder: str) -> str:
    """A folder's name for matplotlib: between two dollars it would be a formula."""
    return textwrap.shorten(os.path.basename(os.path.abspath(folder)), 80).replace("$", r"\$")


# --------------------------------------------------------------------------------------------------- Curves of training

PREDICTION = ("supervised", "dense", "lm", "erl")  # phases whose loss is one of next-token prediction
EVALUATED = ("perplexity", "accuracy", "f1", "rouge2")  # of these only the validation split, not the training batches
PANELS = (  # name in metrics.jsonl, title, unit; panels without a point are left out
    ("loss", "Training loss", "nats a token"),
    ("perplexity", "Validation perplexity", "exp of nats a token"),
    ("accuracy", "Validation accuracy", "share of the answers"),
    ("f1", "Validation F1", "mean over the answers"),
    ("rouge2", "Validation ROUGE-2", "mean over the answers"),
    ("reward_mean", "Reward", "mean over the samples"),
    ("entropy", "Entropy of the answers", "nats a token"),
    ("clip_share", "Clipped", "share of the ratios"),
    ("load_max", "Busiest expert", "share of tokens (dashed: even)"),
    ("router_entropy", "Entropy of the routers", "nats a token"),
)
POINTS = 60  # of a curve
NO_SETTING = {"seed", "out", "device", "resume", "compile", "data_dir", "init", "checkpoint_every"}  # of an algorithm


def read_curves(folder: str) -> tuple[dict, dict[str, dict[int, float]]]:
    """A run's config.json, and the points of each panel, {step: value}."""
    config, points = read_config(folder), defaultdict(dict)
    for row in read_metrics(folder):
        for name, _, _ in PANELS:
            wanted = row.get("split") == "validation" if name in EVALUATED else row["phase"] != "evaluation"
            wanted &= name != "loss" or row["phase"] in PREDICTION
            if wanted and isinstance(row.get(name), int | float):
                points[name][row["step"]] = row[name]
    if not any(points["clip_share"].values()):  # one update a draw: nothing to clip
        del points["clip_share"]
    return config, points


def mean_and_range(runs: list[dict[int, float]]) -> tuple[list, list, list, list]:
    """Steps that all runs share, and over the runs: mean, lowest, highest.

    Of more than POINTS steps neighbours are averaged first, within each run: single steps are mostly noise.
    """
    steps = sorted(set.intersection(*map(set, runs)))
    parts = defaultdict(list)
    for s in steps:
        parts[(s - steps[0]) * POINTS // (steps[-1] - steps[0] + 1) if len(steps) > POINTS else s].append(s)
    columns = [[fmean([run[s] for s in part]) for run in runs] for part in parts.values()]
    return [fmean(p) for p in parts.values()], [*map(fmean, columns)], [*map(min, columns)], [*map(max, columns)]


def draw_curves(groups: dict[str, list], title: str, path: str):
    """A panel a quantity, a line a group of runs (of `read_curves`): their mean, and a band from lowest to highest."""
    every = [run for runs in groups.values() for run in runs]
    panels = [panel for panel in PANELS if any(points.get(panel[0]) for _, points in every)]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = new_figure(0.6 + 2.5 * rows)
    begins = {steps for config, _ in every if (steps := config.get("pretrain_steps"))}  # of the algorithm itself
    figure.suptitle(title + "\ndotted: the algorithm begins" * bool(begins))
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    last = max((step for _, found in every for points in found.values() for step in points), default=1)
    experts = {config.get("n_expert") for config, _ in every}
    for axis, (name, heading, unit) in zip(axes, panels, strict=False):
        for i, (label, runs) in enumerate(groups.items()):
            steps, mean, low, high = mean_and_range([points.get(name, {}) for _, points in runs])
            axis.plot(steps, mean, color=f"C{i}", marker="o" if len(steps) < 25 else "", ms=3, label=label)
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.2, lw=0)
        axis.set(xlabel="step", ylabel=unit, title=heading, xlim=(0, last * 1.02))
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()
        if name == "perplexity" and high > 5 * low > 0:  # it falls from hundreds to tens, and from 12 to 11
            axis.set_yscale("log", subs=(2, 5))
            axis.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        if name == "load_max" and len(experts) == 1:
            axis.axhline(1 / max(experts), **BY_CHANCE)
        for step in begins:
            axis.axvline(step, color="0.4", ls=":", lw=1.2)
    for axis in axes[len(panels) :]:
        axis.remove()
    if len(groups) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save(figure, path)


def plot_curves(out: str):
    """curves.png of a run, from its config.json and metrics.jsonl."""
    run = read_curves(out)
    algo, dataset = run[0]["algo"], run[0]["dataset"]
    draw_curves({algo: [run]}, f"{name_of(out)}: {algo} on {dataset}", os.path.join(out, "curves.png"))


def plot_demo(rows: dict[str, dict], path: str):
    """Of each run of the demo that was ranked: MRR, and the scores along its own and along random routes."""
    ranked = {name: row for name, row in rows.items() if "mrr" in row}

    def of(key):
        return [row[key] for row in ranked.values()]

    figure = new_figure(3.6)
    left, right = figure.subplots(1, 2)
    left.errorbar(list(ranked), of("mrr"), [1.96 * e for e in of("mrr_standard_error")], fmt="o", capsize=4)
    left.axhline(of("chance_mrr")[0], label="chance", **BY_CHANCE)
    left.set(title="MRR of the router's route (95 % over windows)", ylim=(0, None))
    right.plot(list(ranked), of("original_score"), "o", label="the router's route")
    right.plot(list(ranked), of("perturbed_score"), "x", label="99 partly random routes")
    right.set(title=f"{of('score')[0]} (one run)")
    for axis in (left, right):
        axis.margins(x=0.2)
        axis.legend(fontsize=8)
    save(figure, path)


def group_runs(folders: list[str]) -> tuple[dict[str, list], str]:
    """Runs that differ in their seed alone, by the name of their algorithm and what else tells them apart."""
    runs = {folder: read_curves(folder) for folder in folders}
    configs = {folder: config for folder, (config, _) in runs.items()}
    groups, seen, dataset = defaultdict(list), {}, configs[folders[0]]["dataset"]
    for folder, config in configs.items():
        if config["dataset"] != dataset:
            theirs = f"{folder} ran on {config['dataset']}, {folders[0]} on {dataset}"
            raise UserError(f"{theirs}: their scores do not compare")
        key = tuple((k, str(v)) for k, v in sorted(config.items()) if k not in NO_SETTING)
        if (other := seen.setdefault((key, config["seed"]), folder)) != folder:
            raise UserError(f"{folder} and {other} are the same settings with the same seed: leave one of them out")
        same = [c for c in configs.values() if c["algo"] == config["algo"]]
        differ = [k for k in sorted(config) if k not in NO_SETTING and len({str(c.get(k)) for c in same}) > 1]
        label = " ".join([config["algo"], *(f"--{k.replace('_', '-')} {config[k]}" for k in differ)])
        groups[label].append(runs[folder])
    return {f"{k}, {len(v)} seeds" if len(v) > 1 else k: v for k, v in groups.items()}, dataset


# -------------------------------------------------------------------------------------------------------------- Routing


def draw_routing(result: dict, out: str):
    """routing_ranks.png, _robustness.png, _top1.png and _load.png of a routing.json; _regret.png and, of two runs,
    _consistency.png if it has them."""
    title, load = f"{name_of(result['run'])}, {result['dataset']} {result['split']}", result["expert_load"]
    score = {"rouge2": "ROUGE-2", "f1": "F1"}.get(result["score"], result["score"])
    better = f"{'lower' if score == 'perplexity' else 'higher'} is better"
    _draw_ranks(result, f"{title}, {result['samples']} samples", score, better, f"{out}/routing_ranks.png")
    _draw_robustness(result, title, f"{score} ({better})", f"{out}/routing_robustness.png")
    _draw_top1(result, title, f"{out}/routing_top1.png")
    names = [f"{i}  (entropy {rounded(h, 2)})" for i, h in enumerate(result["relative_router_entropy_by_layer"])]
    loads = f"share of a layer's tokens that an expert gets (even: {1 / len(load[0]):.3f})"
    brackets = "in brackets: entropy of the layer's router, over log E"
    heat_map(load, names, f"{title}: {loads}\n{brackets}", None, f"{out}/routing_load.png")
    if "regret" in result:
        _draw_regret(result["regret"], title, f"{out}/routing_regret.png")
    if "expert_consistency" in result:
        rows, least = result["expert_consistency"], result["smallest_cluster"]
        stay = f"share of an expert's tokens that stay with it in {name_of(result['compared_with'])}"
        title = f"{title}\n{stay}\n(white: below {least} tokens)"
        heat_map(rows, list(map(str, range(len(rows)))), title, 1.0, f"{out}/routing_consistency.png")


def _draw_ranks(result: dict, title: str, score: str, better: str, path: str):
    """How often the original has which rank; and each sample's original against its perturbed score."""
    routes, shares = result["routes"], result["rank_shares"]
    figure, percent = new_figure(4.6), {k: rounded(100 * result[k], 1) for k in ("top1_above_0.9", "hit1")}
    beside = (  # MRR never without what it hides
        f"router entropy {rounded(result['relative_router_entropy'], 2)} of log E, top-1 above 0.9: "
        f"{percent['top1_above_0.9']} %, busiest expert {max(map(max, result['expert_load'])):.1%} of a layer, "
        f"dead experts {result['dead_experts']},\nmax_vio {rounded(result['max_vio'], 2)} (a layer's largest expert "
        "load over its mean load, less 1; mean over the layers)"
    )
    figure.suptitle(f"{title}\n{beside}", fontsize=9)
    left, right = figure.subplots(1, 2)
    fives = [100 * sum(shares[i : i + 5]) for i in range(0, routes, 5)]
    left.bar([i + 3 for i in range(0, routes, 5)], fives, width=4.6)
    left.axhline(500 / routes, label="chance", **BY_CHANCE)
    left.set(xlabel=f"rank of the original among {routes} routes (1: best)", ylabel="samples [%]", xlim=(0, routes + 1))
    mrr = f"MRR {result['mrr']:.3f} (chance {result['chance_mrr']:.3f})"
    hit1 = f"Hit@1 {percent['hit1']} % (chance {100 * result['chance_hit1']:.0f} %)"
    left.set_title(f"{mrr}\n{hit1}", fontsize=10)
    leave_room(left)
    x, y = result["original_scores"], result["perturbed_scores"]
    side = "above" if score == "perplexity" else "below"
    right.axhline(0, label=f"{side} this line the router's own route is better", **BY_CHANCE)
    right.scatter(x, [b - a for a, b in zip(x, y, strict=True)], s=14, alpha=0.5, label="a sample")
    right.set(xlabel=f"{score}, original route", ylabel=f"{score}, perturbed - original")
    own, best = (f"{result[f'{name}_score']:.4g}" for name in ("original", "best_of_99"))
    scores = f"{score} {own}, perturbed {result['perturbed_score']:.4g}\nbest of {routes - 1}: {best} ({better})"
    right.set_title(scores, fontsize=10)
    right.margins(y=0.25)  # room for the legend
    right.legend(loc="upper right", fontsize=8)
    if result["warnings"]:
        text = "\n".join(textwrap.fill(f"Warning: {warning}", 120) for warning in result["warnings"])
        figure.supxlabel(text, color="firebrick", fontsize=8)
    save(figure, path)


def _draw_robustness(result: dict, title: str, score: str, path: str):
    figure, points = new_figure(4), {float(alpha): value for alpha, value in result["robustness"].items()}
    axis = figure.subplots()
    axis.plot(points.keys(), points.values(), marker="o", label="perturbed")
    axis.axhline(points[0.0], label="original route", **BY_CHANCE)
    axis.set(xlabel="share of routing decisions replaced (alpha)", ylabel=score, title=title, xticks=list(points))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save(figure, path)


def _draw_top1(result: dict, title: str, path: str):
    figure, shares, E = new_figure(4), result["top1_histogram"], len(result["expert_load"][0])
    axis, bins = figure.subplots(), len(shares)
    axis.bar([(i + 0.5) / bins for i in range(bins)], [100 * h for h in shares], width=0.9 / bins)
    axis.axvline(1 / E, label=f"1/{E}: all experts equally likely", **BY_CHANCE)
    axis.set(xlabel="largest probability of a routing decision", ylabel="decisions [%]", xlim=(0, 1), title=title)
    leave_room(axis)
    save(figure, path)


def _draw_regret(regret: dict, title: str, path: str):
    """At which rank the own expert stands, and what the best and a random expert are worth against it."""
    figure, C = new_figure(4.2), regret["candidates"]
    figure.suptitle(f"{title}: each expert in turn at {regret['all']['decisions']} decisions", fontsize=10)
    left, right = figure.subplots(1, 2)
    for i, part in enumerate(("all", "confident", "fragile")):
        found, style = regret[part], {"width": 0.25, "color": f"C{i}"}
        for rank, share in enumerate(found["rank_shares"], start=1):
            left.bar(rank + 0.27 * (i - 1), 100 * share, label=part if rank == 1 else None, **style)
        for x, name in enumerate(("regret", "random_expert_cost")):
            error = 1.96 * found[f"{name}_standard_error"]
            right.bar(x + 0.27 * (i - 1), found[name], yerr=error, capsize=3, **style)
    left.axhline(100 / C, label="chance", **BY_CHANCE)
    left.set(xlabel=f"rank of the own expert among {C} (1: best)", ylabel="decisions [%]")
    leave_room(left)
    right.axhline(0, color="black", lw=0.8)
    names = "regret: the best expert,\nchosen by the answer", "cost of a\nrandom expert"
    right.set(ylabel="nats of the next token's log p (95 %)", xticks=(0, 1), xticklabels=names)
    right.set_title("fragile: entropy of the prediction above its median", fontsize=9)
    save(figure, path)


def leave_room(axis):
    """For a legend above bars."""
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
    axis.legend(loc="upper right", fontsize=9)


def heat_map(rows: list[list[float | None]], names: list[str], title: str, highest: float | None, path: str):
    """[L, E] as colours, with the numbers where there is room for them; None stays white."""
    L, E = len(rows), len(rows[0])
    figure = new_figure(min(2 + 0.4 * L, 12))
    axis = figure.subplots()
    values = [[math.nan if v is None else v for v in row] for row in rows]
    image = axis.imshow(values, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
    each = 1 + L // 25
    axis.set(xlabel="expert", ylabel="MoE layer", xticks=range(0, E, 1 + E // 33))
    axis.set_yticks(range(0, L, each), names[::each])
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis)
    for i, row in enumerate(rows if E <= 16 and L <= 24 else []):
        for j, v in enumerate(row):
            if v is not None:
                ink = "white" if v < 0.6 * image.norm.vmax else "black"
                axis.text(j, i, rounded(v, 2), ha="center", va="center", fontsize=8, color=ink)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------- The program


def compare_runs(argv: list[str]):
    about = "Curves of runs: of several a line an algorithm, the mean and range over its seeds."
    p = Parser(prog="python -m support.pictures", description=about)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py, on one data set")
    p.add_argument("--out", metavar="FILE.png", help="default: in RUN, curves.png or, of several runs, comparison.png")
    args = p.parse_args(argv)
    out = args.out or os.path.join(args.runs[0], "comparison.png" if args.runs[1:] else "curves.png")
    if not out.endswith(".png"):
        raise UserError(f"--out {out}: the picture is a PNG, so name it so")
    groups, dataset = group_runs(args.runs)
    band = ": mean over the seeds, band from the lowest to the highest" * any(len(r) > 1 for r in groups.values())
    draw_curves(groups, dataset + band, out)
    print(f"{out}: {'; '.join(groups)}")


def main(argv: list[str] | None = None) -> int:
    return run_program("support.pictures", lambda: compare_runs(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
