"""Pictures of runs: curves.png of one or of several, and the routing_*.png of eval_routing.py.

    python -m support.pictures RUN [RUN ...] --out FILE.png     a line an algorithm: its mean and range over the seeds

Every picture is made for a width of 800 pixels. Names that users chose are shown as they are, never read as formulas.
"""

import math
import os
import sys
import textwrap
import warnings
from collections import defaultdict
from typing import NamedTuple

if __name__ == "__main__":
    from support.errors import begin_program

    begin_program()

from support.arguments import Parser, check_types, read_config
from support.errors import UserError, say, sentence
from support.run_folder import read_metrics

WIDTH = 8  # inches; saved at 150 dots an inch
NAMES = {"rouge2": "ROUGE-2", "f1": "F1"}  # of scores
BY_CHANCE = {"color": "black", "ls": "--", "lw": 1}  # a line for what chance or evenness would give


def new_figure(height: float):
    """A figure without pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def save(figure, path: str):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a folder's name in another script
        figure.savefig(path, dpi=150)


def plain(text: str) -> str:
    """Text that a user chose, for matplotlib: between two dollars it would be a formula."""
    return "".join(c if c.isprintable() else "□" for c in textwrap.shorten(text, 80)).replace("$", r"\$")


# ---------------------------------------------------------------------------------------------------------------------
# Curves of training
# ---------------------------------------------------------------------------------------------------------------------

PREDICTION = ("supervised", "dense", "lm", "erl")  # phases whose loss is one of next-token prediction, in nats
PANELS = (  # name in metrics.jsonl, title, unit; panels without a point are left out
    ("loss", "Training loss", "nats a token"),
    ("perplexity", "Validation perplexity", "exp of nats a token"),
    ("accuracy", "Validation accuracy", "share of the answers"),
    ("f1", "Validation F1", "mean over the answers"),
    ("rouge2", "Validation ROUGE-2", "mean over the answers"),
    ("reward_mean", "Reward", "mean over the samples"),
    ("entropy", "Entropy of the answers", "nats a token"),
    ("clip_share", "Clipped", "share of the ratios"),
    ("load_max", "Busiest expert", "share of a layer's tokens"),
    ("router_entropy", "Entropy of the routers", "nats a token"),
)
POINTS = 60  # of a curve
EVALUATED = ("perplexity", "accuracy", "f1", "rouge2")  # of these only the validation split, not the training batches


class Curves(NamedTuple):
    """One run's config.json, and the points of each panel, {step: value}."""

    config: dict
    points: dict[str, dict[int, float]]


def read_curves(folder: str) -> Curves:
    config, points = read_config(folder), defaultdict(dict)
    for row in read_metrics(folder):
        evaluation = row["phase"] == "evaluation"
        for name, _, _ in PANELS:
            wanted = row.get("split") == "validation" if name in EVALUATED else not evaluation
            wanted &= name != "loss" or row["phase"] in PREDICTION
            if wanted and isinstance(row.get(name), int | float):
                points[name][row["step"]] = row[name]
    check_types(folder, config, {"algo": str, "dataset": str, "n_expert": int, "pretrain_steps": int, "seed": int})
    if not any(points["clip_share"].values()):  # one update a draw: nothing to clip
        del points["clip_share"]
    return Curves(config, points)


def mean_and_range(runs: list[dict[int, float]]) -> tuple[list, list, list, list]:
    """Steps that all runs share, and over the runs: mean, lowest, highest.

    Of more than POINTS steps neighbours are averaged first, within each run: single steps are mostly noise.
    """
    steps = sorted(set.intersection(*map(set, runs)))
    places = {s: (s - steps[0]) * POINTS // (steps[-1] - steps[0] + 1) if len(steps) > POINTS else s for s in steps}
    parts = [[s for s in steps if places[s] == place] for place in dict.fromkeys(places.values())]
    columns = [[average([run[step] for step in part]) for run in runs] for part in parts]
    return list(map(average, parts)), list(map(average, columns)), list(map(min, columns)), list(map(max, columns))


def average(values: list) -> float:
    return sum(values) / len(values)


def draw_curves(groups: dict[str, list[Curves]], title: str, path: str):
    """A panel a quantity, a line a group of runs: the mean, and from the lowest to the highest run a band."""
    every = [run for runs in groups.values() for run in runs]
    panels = [panel for panel in PANELS if any(run.points.get(panel[0]) for run in every)]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = new_figure(0.6 + 2.5 * rows)
    figure.suptitle(title)
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    last = max((step for run in every for points in run.points.values() for step in points), default=1)
    for axis, (name, heading, unit) in zip(axes, panels, strict=False):
        for i, (label, runs) in enumerate(groups.items()):
            steps, mean, low, high = mean_and_range([run.points.get(name, {}) for run in runs])
            axis.plot(steps, mean, color=f"C{i}", marker="o" if len(steps) < 25 else "", ms=3, label=label)
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.2, lw=0)
        axis.set(xlabel="step", ylabel=unit, title=heading, xlim=(0, last * 1.02))
        axis.grid(alpha=0.3)
        if name == "perplexity":
            _logarithmic(axis)
        if name == "load_max":
            _even_load(axis, every)
        mark_beginnings(axis, every, words=axis is axes[0])
    for axis in axes[len(panels) :]:
        axis.remove()
    if len(groups) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save(figure, path)


def _logarithmic(axis):
    """The falls of a perplexity from hundreds to tens and from 12 to 11 in one panel."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_ylim()
    if low > 0 and high > 5 * low:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel(f"{axis.get_ylabel()} (log scale)")


def _even_load(axis, runs: list[Curves]):
    experts = {run.config.get("n_expert") for run in runs}
    if len(experts) == 1 and (E := experts.pop()) and E > 1:
        axis.axhline(1 / E, label=f"even: 1/{E}", **BY_CHANCE)
        axis.set_ylim(0, 1)
        axis.text(0.99, 1 / E + 0.02, f"even: 1/{E}", ha="right", fontsize=8, transform=axis.get_yaxis_transform())


def mark_beginnings(axis, runs: list[Curves], words: bool):
    """Where pre-training ends and the algorithm begins."""
    begins = defaultdict(set)  # at a step, these algorithms
    for run in runs:
        if run.config.get("pretrain_steps"):
            begins[run.config["pretrain_steps"]].add(run.config["algo"])
    for step, algos in begins.items():
        axis.axvline(step, color="0.4", ls=":", lw=1.2)
        if words:
            text = f"{algos.pop().upper()} begins" if len(algos) == 1 else "the algorithms begin"
            side = "left" if step < 0.6 * axis.get_xlim()[1] else "right"
            where = {"ha": side, "va": "top", "transform": axis.get_xaxis_transform()}
            axis.text(step, 0.97, f" {text} ", fontsize=8, color="0.3", **where)


def plot_curves(out: str):
    """curves.png of a run, from its config.json and metrics.jsonl."""
    run = read_curves(out)
    name, c = os.path.basename(os.path.abspath(out)), run.config
    draw_curves({c["algo"]: [run]}, f"{plain(name)}: {c['algo']} on {c['dataset']}", os.path.join(out, "curves.png"))


IGNORED = {
    "seed",
    "out",
    "device",
    "resume",
    "compile",
    "data_dir",
    "init",
    "checkpoint_every",
}  # no algorithm of its own


def group_runs(folders: list[str]) -> tuple[dict[str, list[Curves]], str]:
    """Runs that differ in their seed alone, by the name of their algorithm and what else tells them apart."""
    runs = {folder: read_curves(folder) for folder in folders}
    first = runs[folders[0]].config
    seen = {}
    for folder, run in runs.items():
        if run.config.get("dataset") != first.get("dataset"):
            theirs = f"{folder} ran on {run.config.get('dataset')}, {folders[0]} on {first.get('dataset')}"
            raise UserError(f"{theirs}: their scores do not compare")
        key = tuple((k, str(v)) for k, v in sorted(run.config.items()) if k not in IGNORED)
        if (other := seen.setdefault((key, run.config.get("seed")), folder)) != folder:
            raise UserError(f"{folder} and {other} are the same settings with the same seed: leave one of them out")
    groups = defaultdict(list)
    for run in runs.values():
        groups[_label(run, list(runs.values()))].append(run)
    return {f"{k}, {len(v)} seeds" if len(v) > 1 else k: v for k, v in groups.items()}, str(first.get("dataset"))


def _label(run: Curves, runs: list[Curves]) -> str:
    """The algorithm, and the settings in which runs of this algorithm differ."""
    algo = run.config.get("algo")
    same = [r.config for r in runs if r.config.get("algo") == algo]
    differ = [k for k in sorted(run.config) if k not in IGNORED and len({str(c.get(k)) for c in same}) > 1]
    return plain(" ".join([str(algo), *(f"--{k.replace('_', '-')} {run.config[k]}" for k in differ)]))


# ---------------------------------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------------------------------


def draw_routing(result: dict, out: str):
    """routing_ranks.png, _robustness.png, _top1.png, _load.png and, of two runs, _consistency.png of a routing.json."""
    run, split = plain(os.path.basename(os.path.abspath(result["run"]))), f"{result['dataset']} {result['split']}"
    score, E = NAMES.get(result["score"], result["score"]), len(result["expert_load"][0])
    better = "lower is better" if score == "perplexity" else "higher is better"

    def path(kind: str) -> str:
        return os.path.join(out, f"routing_{kind}.png")

    _draw_ranks(result, f"{run}, {split}, {result['samples']} samples", score, better, path("ranks"))
    _draw_robustness(result, f"{run}, {split}", f"{score} ({better})", path("robustness"))
    _draw_top1(result, f"{run}, {split}: {result['top1_above_0.9']:.1%} of the decisions above 0.9", path("top1"))
    entropies = [f"{i}  (entropy {h:.2f})" for i, h in enumerate(result["relative_router_entropy_by_layer"])]
    title = f"{run}, {split}: share of a layer's tokens that an expert gets (even: {1 / E:.3f})\n"
    title += f"in brackets: entropy of the layer's router, as a share of log {E}"
    heat_map(result["expert_load"], entropies, title, None, path("load"))
    if "expert_consistency" in result:
        other, least = plain(os.path.basename(os.path.abspath(result["compared_with"]))), result["smallest_cluster"]
        title = f"{split}: share of an expert's tokens in {run}\nthat stay with it in {other} "
        title += f"(white: below {least} tokens)"
        rows = result["expert_consistency"]
        heat_map(rows, list(map(str, range(len(rows)))), title, 1.0, path("consistency"))


def _draw_ranks(result: dict, title: str, score: str, better: str, path: str):
    """How often the original has which rank; and each sample's original against its perturbed score."""
    routes = result["routes"]
    shares = [0.0] * routes  # of the samples at each rank; a tied sample is spread over the ranks it shares
    for above, tied in zip(result["better_routes"], result["tied_routes"], strict=True):
        for r in range(above, above + tied + 1):
            shares[r] += 100 / (tied + 1) / result["samples"]
    figure = new_figure(4.4)
    beside = (
        f"router entropy {result['relative_router_entropy']:.2f} of log E, top-1 above 0.9: "
        f"{result['top1_above_0.9']:.1%}, busiest expert {max(map(max, result['expert_load'])):.1%} of a layer, "
        f"max_vio {result['max_vio']:.2f}, dead experts {result['dead_experts']}"
    )
    figure.suptitle(f"{title}\n{beside}", fontsize=9)
    left, right = figure.subplots(1, 2)
    left.bar([i + 3 for i in range(0, routes, 5)], [sum(shares[i : i + 5]) for i in range(0, routes, 5)], width=4.6)
    left.axhline(500 / routes, label="chance", **BY_CHANCE)
    left.set(xlabel=f"rank of the original among {routes} routes (1: best)", ylabel="samples [%]", xlim=(0, routes + 1))
    left.set_title(
        f"MRR {result['mrr']:.3f} (chance {result['chance_mrr']:.3f})\n"
        f"Hit@1 {100 * result['hit1']:.1f} % (chance {100 * result['chance_hit1']:.0f} %)",
        fontsize=10,
    )
    leave_room(left)
    x, y = result["original_scores"], result["perturbed_scores"]
    side = "above" if score == "perplexity" else "below"
    right.axhline(0, label=f"{side} this line the router's own route is better", **BY_CHANCE)
    right.scatter(x, [b - a for a, b in zip(x, y, strict=True)], s=14, alpha=0.5, label="a sample")
    right.set(xlabel=f"{score}, original route", ylabel=f"{score}, perturbed - original")
    right.set_title(
        f"{score} {result['original_score']:.4g}, perturbed {result['perturbed_score']:.4g}\n"
        f"best of {routes - 1}: {result['best_of_99_score']:.4g} ({better})",
        fontsize=10,
    )
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    right.legend(loc="upper right", fontsize=8)
    if result["warnings"]:
        text = "\n".join(textwrap.fill(f"Warning: {doubt}", 120) for doubt in result["warnings"])
        figure.supxlabel(text, color="firebrick", fontsize=8)
    save(figure, path)


def _draw_robustness(result: dict, title: str, score: str, path: str):
    figure = new_figure(4)
    axis = figure.subplots()
    points = [(float(alpha), value) for alpha, value in result["robustness"].items()]
    axis.plot(*zip(*points, strict=True), marker="o", label="perturbed")
    axis.axhline(points[0][1], label="original route", **BY_CHANCE)
    axis.set(xlabel="share of routing decisions replaced (alpha)", ylabel=score, title=title)
    axis.set_xticks([alpha for alpha, _ in points])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save(figure, path)


def _draw_top1(result: dict, title: str, path: str):
    figure, shares, E = new_figure(4), result["top1_histogram"], len(result["expert_load"][0])
    axis, bins = figure.subplots(), len(result["top1_histogram"])
    axis.bar([(i + 0.5) / bins for i in range(bins)], [100 * h for h in shares], width=0.9 / bins)
    axis.axvline(1 / E, label=f"1/{E}: all experts equally likely", **BY_CHANCE)
    axis.set(xlabel="largest router probability of a decision", ylabel="routing decisions [%]", xlim=(0, 1))
    axis.set_title(title, fontsize=10)
    leave_room(axis)
    save(figure, path)


def leave_room(axis):
    """A legend above bars of per cents."""
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
    axis.set_yticks([tick for tick in axis.get_yticks() if tick <= 100])
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
                axis.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=8, color=ink)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs in one picture
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    about = "Curves of several runs in one picture: a line an algorithm, the mean and range over its seeds."
    p = Parser(prog="python -m support.pictures", description=about)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py, on one data set")
    p.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    try:
        args = p.parse_args(argv)
        if not args.out.endswith(".png"):
            raise UserError(f"--out {args.out}: the picture is a PNG, so name it so")
        groups, dataset = group_runs(args.runs)
        band = any(len(runs) > 1 for runs in groups.values())
        draw_curves(groups, dataset + ": mean over the seeds, band from the lowest to the highest" * band, args.out)
    except Exception as error:
        if (text := sentence(error)) is None:
            raise
        say(f"support.pictures: {text}", sys.stderr)
        return 2
    say(f"{args.out}: {'; '.join(groups)}".replace(r"\$", "$"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
