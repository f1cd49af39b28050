"""Tables and pictures of the experiments, from results/runs/*.json alone: docs/findings.md, results/erl.png.

`write()` replaces what stands between the two marks of docs/findings.md; the words around them are a person's.
"""

import datetime
import math
import pathlib
import statistics

from matplotlib.figure import Figure

import eval_routing
from results.arms import EXPERIMENTS
from results.verdict import (
    FIRST_START,
    RUNS,
    Contrast,
    above_line,
    differences,
    estimate,
    prediction_interval,
    read_runs,
    verdicts,
)

ROOT = pathlib.Path(__file__).parent.parent
FINDINGS = ROOT / "docs" / "findings.md"
MARKS = ("<!-- from here: python results/reproduce.py report -->", "<!-- to here -->")
STILL = "erl-still"  # whose arms differ by factors, not by percents
LAST = "of the last checkpoint"
TAKEN_OVER = 0.85  # share of a layer's tokens at one expert
CHANCE_MRR = sum(1 / r for r in range(1, 101)) / 100
# Figures of the ERL tables: name in the JSON, heading, digits
COLUMNS = (
    ("best_perplexity", "best perplexity", 3),
    ("perplexity", "last", 3),
    ("mrr", "MRR", 3),
    ("hit1", "Hit@1", 3),
    ("original_score", "own route", 3),
    ("perturbed_score", "99 others", 3),
    ("best_of_99_score", "best of 99", 3),
    ("router_entropy", "entropy", 3),
    ("load_max", "largest load", 3),
    ("top1_above_0.9", "above 0.9", 3),
    ("right_expert", "right expert", 3),
    ("right_route_perplexity", "perplexity along the right route", 3),
)
# The control of an arm that credits random experts instead: what it lacks is learnt credit.
RANDOM = {
    "erl": "erl-expert-random",
    "erl-centred": "erl-centred-random",
    "erl-level": "erl-level-random",
    "erl-router": "erl-router-random",
    "erl-router-weighted": "erl-router-weighted-random",
}
# What the arms of `erl-text` keep of ERL with gradient `all`.
LEFT = {
    "lm": "nothing: MoE",
    "erl": "everything, as the paper sets it",
    "erl-expert-random": "advantages and positions; random experts credited",
    "erl-negative": "negative advantages alone",
    "erl-positive": "positive advantages alone",
    "erl-constant": "nothing but an advantage of -0.13 everywhere",
    "mean-log-p": "nothing, no random route either: 0.065 x the mean of log P over all experts, added to MoE's loss",
    "erl-centred": "centred within each position over all passes (still -0.13 on average over what the loss counts)",
    "erl-centred-random": "the same, random experts credited",
    "erl-level": "mean 0 over what the loss counts at each position",
    "erl-level-random": "the same, random experts credited",
    "erl-shuffled": "advantages in random places",
    "erl-mean": "the mean of each step alone (about 0)",
    "erl-weighted": "everything, ratio to the uniform policy, no clip",
    "erl-clipped": "everything, ratio to the uniform policy, clipped",
    "erl-drawn": "everything, experts drawn from the router",
    "erl-router": "everything, gradient to the routers alone (default)",
    "erl-router-constant": "an advantage of -0.13 everywhere, gradient to the routers alone",
    "erl-wpl": "everything, and the LM loss of the perturbed passes (wPL)",
    "erl-no-clip": "everything, no limit on the gradient",
    "erl-plain": "everything, no balance and z losses",
    "lm-plain": "nothing: MoE without balance and z losses",
    "lm-straight": "nothing: MoE whose gate has a gradient",
    "erl-published": "as the public code of the first author does it, experts drawn uniformly",
    "erl-published-drawn": "the same, experts drawn from the router as there",
    "lm-dropout": "nothing: MoE with the dropout of that",
    "sharpen-0.3": "nothing; an entropy penalty instead",
}
# The same of `erl-still`, with the gradient to the routers alone.
RIGHT = {
    "lm": "nothing: MoE, whose balance loss moves the routers",
    "erl-router-constant": "nothing but an advantage of -0.13 everywhere",
    "erl-router-random": "advantages and positions; random experts credited",
    "erl-router": "everything",
    "erl-router-level": "mean 0 over what the loss counts at each position",
    "erl-router-drawn": "everything, experts drawn from the router",
    "erl-router-weighted-random": "ratio to the uniform policy, random experts credited",
    "erl-router-weighted": "everything, ratio to the uniform policy, no clip",
}
# What the ERL paper shows of a better router (SAMSum): MRR and Hit@1 of table 4, "approximately" the share of top-1
# probabilities above 0.9 of section 6.3, ROUGE-2 of table 5 with a fraction of the decoder's decisions at random.
ALPHAS = (0, *eval_routing.ALPHAS, 1)
PAPER = {
    "MoE": (0.11, 0.068, 0.5, 26.68, 27.10, 26.42, 26.05, 25.11),
    "MoE-ERL": (0.35, 0.184, 0.8, 26.94, 14.19, 2.93, 0.56, 0.02),
    "MoE-ERL, wPL": (0.16, 0.117, 0.67, 27.20, 26.99, 27.01, 27.18, 27.01),
}
BESIDE_PAPER = ("lm", "erl", "erl-wpl", "erl-constant", "erl-level")
# Arms of `answers` and what each is to be compared with; and so those that end in -more, -more-slow, -fast and -stale.
AGAINST = {
    "erpo": ("gspo", "erpo-none", "erpo-permuted"),
    "erpo-none": ("gspo",),
    "erpo-absolute": ("erpo-none",),
    "erpo-permuted": ("gspo",),
    "rais": ("gmpo", "gmpo-scaled", "rais-yoked", "rais-shuffled", "rais-gradient", "rais-no-floor", "rais-sum"),
    "rais-yoked": ("gmpo", "gmpo-scaled"),
    "rais-grpo": ("grpo", "grpo-scaled", "rais-grpo-yoked"),
    "rais-grpo-yoked": ("grpo", "grpo-scaled"),
    "grpo-scaled": ("grpo",),
    "gmpo-scaled": ("gmpo",),
    "gmpo": ("gspo",),
    "rais-gspo": ("gspo",),
    "positive": ("grpo",),
    "gmpo-frozen": ("gmpo",),
    "gmpo-replay": ("gmpo",),
    "gmpo-balance": ("gmpo",),
    "gmpo-balance-frozen": ("gmpo-frozen",),
    "gmpo-balance-replay": ("gmpo-replay",),
}


def row(*cells) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def heading(*cells) -> list[str]:
    return [row(*cells), row(*["---"] * len(cells))]


def values_of(runs, experiment: str, arm: str, figure: str, first: int) -> list[float]:
    return [
        r["figures"][figure]
        for (e, a, start), r in sorted(runs.items())
        if (e, a) == (experiment, arm) and start >= first and figure in r.get("figures", {})
    ]


def shown(values: list[float], digits: int) -> str:
    """Mean and standard deviation over starts."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def of_starts(values: list[float], all_values: list[float]) -> str:
    """How many starts have a figure, where that is not all of them."""
    return f" ({len(values)} starts)" if 0 < len(values) < len(all_values) else ""


def interval(values: list[float], margin: float = 1.0, scale: float = 1.0, digits: int = 3) -> str:
    found = estimate(values, margin)
    if found is None:
        return "-"
    mean, low, high = (scale * x for x in (found.mean, found.low, found.high))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def factor(values: list[float]) -> str:
    """Of perplexities whose logarithms differ by these values: the geometric mean of the ratios and its interval."""
    found = estimate(values, 1.0)
    if found is None:
        return "-"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*(math.exp(-x) for x in (found.mean, found.high, found.low)))


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def claims(runs) -> list[str]:
    lines = heading("claim", "ours", "difference, 95 % interval", "control", "starts", "verdict", "command")
    for found in verdicts(runs):
        c: Contrast = found["contrast"]
        ours = " against ".join(
            shown(values_of(runs, c.experiment, arm, c.figure, FIRST_START), 3) for arm in (c.arm, c.control)
        )
        values = differences(runs, c)
        scale, unit = (100, " %") if c.lower_is_better else (1, "")
        difference = interval(values, c.margin, scale) + unit if len(values) > 1 else "-"
        command = f"`python results/reproduce.py {c.experiment} --starts 100-109 --tier 0`"
        verdict = f"**{found['verdict']}** ({found['why']}; margin {scale * c.margin:g}{unit})"
        name = f"`{c.name}`: {c.figure.replace('_', ' ')}, {c.claim}"
        lines.append(row(name, ours, difference, f"`{c.control}`", len(values), verdict, command))
    return lines


def means_table(runs, experiment: str, columns, counted: str, first: int) -> list[str]:
    """A row an arm that has the figure `counted`; columns: name in the JSON, heading, digits."""
    lines = heading("arm", "starts", *(name for _, name, _ in columns))
    for arm in EXPERIMENTS[experiment].arms:
        if ran := values_of(runs, experiment, arm, counted, first):
            found = [(values_of(runs, experiment, arm, key, first), digits) for key, _, digits in columns]
            lines.append(row(f"`{arm}`", len(ran), *(shown(v, digits) + of_starts(v, ran) for v, digits in found)))
    return lines


def erl_tables(runs, experiment: str, first: int) -> list[str]:
    arms = [a for a in EXPERIMENTS[experiment].arms if values_of(runs, experiment, a, "perplexity", first)]
    columns = [c for c in COLUMNS if any(values_of(runs, experiment, a, c[0], first) for a in arms)]
    right = "right_expert" in [name for name, _, _ in columns]  # then there is no line of sharpening alone
    lines = means_table(runs, experiment, columns, "perplexity", first)
    lines += [
        "",
        "Paired within the start, 95 % intervals, unadjusted (exploratory, but for the primary contrasts; positive "
        "is lower perplexity, larger MRR; percents are 100 x the log ratio, a factor below 1 is lower perplexity)."
        + ("" if right else " The line: MRR of sharpening alone at the same entropy, beyond its ends that of the end."),
        "",
    ]
    last = "right experts" if right else "above the line"
    unit = "factor" if experiment == STILL else "%"
    lines += heading("arm", f"perplexity against `lm`, {unit}", LAST, "MRR less that of `lm`", last)
    for arm in arms:
        if arm != "lm":
            line = "on it" if arm.startswith("sharpen") else interval(above_line(runs, experiment, arm, first))
            lines.append(
                row(f"`{arm}`", *paired(runs, experiment, arm, "lm", first, right), *([] if right else [line]))
            )
    if set(RANDOM.values()) & set(arms):
        lines += ["", "Credit: paired with the same arm when it credits random experts:", ""]
        lines += heading("arm", "control", f"perplexity, {unit}", LAST, "MRR", *(["right experts"] if right else []))
    for arm, control in RANDOM.items():
        if control in arms:
            lines.append(row(f"`{arm}`", f"`{control}`", *paired(runs, experiment, arm, control, first, right)))
    words = "Runs in which one expert took over a layer (exploratory; the bound was chosen after the runs):"
    return [*lines, "", words, "", *by_load(runs, experiment, first)]


def paired(runs, experiment: str, arm: str, control: str, first: int, right: bool) -> list[str]:
    """Perplexity of the best and of the last checkpoint in percent (positive is lower; of STILL a factor), MRR and,
    where there is one, the share of decisions for the right expert, less those of the control in the same start."""

    def gaps(figure: str):
        c = Contrast("", "", experiment, arm, control, figure, 1, 1, figure.endswith("perplexity"))
        return differences(runs, c, first)

    both = [gaps("best_perplexity"), gaps("perplexity")]
    cells = [factor(g) if experiment == STILL else interval(g, scale=100, digits=2) for g in both]
    cells.append(interval(gaps("mrr")))
    return cells + ([interval(gaps("right_expert"))] if right else [])


def by_load(runs, experiment: str, first: int) -> list[str]:
    """MRR of the runs in which some expert has taken over a layer, and of the others."""
    lines = heading("arm", f"runs with a load above {TAKEN_OVER:g}", "their MRR", "other runs", "their MRR")
    for arm in EXPERIMENTS[experiment].arms:
        mrr, load = (values_of(runs, experiment, arm, k, first) for k in ("mrr", "load_max"))
        parts = [[m for m, x in zip(mrr, load, strict=True) if (x > TAKEN_OVER) == over] for over in (True, False)]
        cells = [c for part in parts for c in (len(part), f"{min(part):.3f} to {max(part):.3f}" if part else "-")]
        lines += [row(f"`{arm}`", *cells)] if mrr else []
    return lines


def worded(runs, experiment: str, words: dict[str, str], figures: dict[str, str]) -> list[str]:
    """Arms in words: the first figure with its range over starts, the others, perplexity against MoE (lower is better)
    of the best and of the last checkpoint, whose figures the others are. figures: name in the JSON -> heading."""
    names, unit = list(figures.values()), "factor" if experiment == STILL else "%"
    cost = f"perplexity against MoE, {unit}"
    lines = heading("what is left of ERL", "arm", "starts", names[0], "from - to", *names[1:], cost, LAST)
    for arm, about in words.items():
        found = [values_of(runs, experiment, arm, figure, FIRST_START) for figure in figures]
        if found[0]:
            contrasts = [
                Contrast("", "", experiment, arm, "lm", f, 1, 1, True) for f in ("best_perplexity", "perplexity")
            ]
            both = [differences(runs, c) for c in contrasts]
            costs = [factor(g) if experiment == STILL else interval([-x for x in g], scale=100, digits=2) for g in both]
            means, ends = [shown(f, 2) for f in found], f"{min(found[0]):.2f} - {max(found[0]):.2f}"
            cells = (len(found[0]), means[0], ends, *means[1:], *(["", ""] if arm == "lm" else costs))
            lines.append(row(about, f"`{arm}`", *cells))
    return lines


def beside_paper(runs) -> list[str]:
    """The figures with which the paper shows that the router has become better, its own and those of `erl-text`."""
    lines = heading("", "MRR", "Hit@1", "above 0.9", *(f"score at {alpha:g}" for alpha in ALPHAS))
    lines += [row(f"{name}, the paper", *(f"{x:.2f}" for x in figures)) for name, figures in PAPER.items()]
    names = ("mrr", "hit1", "top1_above_0.9", *(f"perplexity_at_{alpha:g}" for alpha in ALPHAS))
    for arm in BESIDE_PAPER:
        found = [values_of(runs, "erl-text", arm, name, FIRST_START) for name in names]
        if all(found):
            lines.append(row(f"`{arm}`, ours: {LEFT[arm]}", *(f"{statistics.fmean(v):.2f}" for v in found)))
    return lines


def answer_tables(runs, first: int) -> list[str]:
    columns = (
        ("accuracy", "accuracy"),
        ("before_accuracy", "before"),
        ("mean_reward_mean", "training reward"),
        ("late_reward", "of the last third"),
        ("mean_clip_share", "clip share"),
        ("mean_clipped_share", "updates cut by the limit on the gradient"),
        ("mean_ratio_neg_log_later", "mean -log ratio"),
        ("mean_gamma_mean", "gamma"),
        ("mean_agreement", "routes kept"),
        ("spread_grad_norm", "spread of gradient norm"),
        ("dropped_share", "pairs without ratio"),
    )
    lines = means_table(runs, "answers", [(*c, 3) for c in columns], "accuracy", first)
    lines += ["", "Accuracy, paired within the start, 95 % intervals, unadjusted (exploratory):", ""]
    lines += heading("arm", "less `none`", "less `gmpo`", "less `gspo`")
    for arm in EXPERIMENTS["answers"].arms:
        pairs = [Contrast("", "", "answers", arm, control, "accuracy", 1, 1) for control in ("none", "gmpo", "gspo")]
        cells = [interval(differences(runs, c, first)) if c.control != arm else "-" for c in pairs]
        if set(cells) != {"-"}:
            lines.append(row(f"`{arm}`", *cells))
    rows = []
    for more in ("", "-more", "-more-slow", "-more-fast", "-more-stale"):
        for arm, control in ((a + more, c + more) for a, cs in AGAINST.items() for c in cs):
            names = ("accuracy", "mean_reward_mean", "late_reward")
            gaps = [differences(runs, Contrast("", "", "answers", arm, control, f, 1, 1), first) for f in names]
            if len(gaps[0]) > 1:
                cells = [interval(v) + of_starts(v, gaps[0]) for v in gaps]
                rows.append(row(f"`{arm}`", f"`{control}`", len(gaps[0]), *cells))
    if rows:
        words = "Against its control (exploratory, but for the primary contrasts):"
        lines += ["", words, "", *heading("arm", "less", "starts", "accuracy", "training reward", "of the last third")]
    lines += rows
    sizes = values_of(runs, "answers", "start", "median_cluster", first)
    return lines + ["", f"Median cluster of the starting models: {shown(sizes, 1)} tokens."]


def real_tables(runs, first: int) -> list[str]:
    columns = (
        ("before_perplexity", "before", 3),
        ("perplexity", "perplexity", 3),
        ("before_router_entropy", "entropy before", 3),
        ("router_entropy", "entropy", 3),
        ("load_max", "largest load", 3),
        ("agreement", "routes kept", 3),
        ("mean_advantage_positive", "advantage +1", 3),
        ("mean_advantage_negative", "-1", 3),
        ("mean_grad_norm", "gradient norm", 2),
    )
    lines, arms = means_table(runs, "erl-real", columns, "perplexity", first), EXPERIMENTS["erl-real"].arms
    lines += [
        "",
        "Paired within the start, 95 % intervals, unadjusted (exploratory; positive is lower; 100 x log ratio):",
        "",
    ]
    lines += heading("arm", "less", "starts", "perplexity, %", "entropy")
    for arm, control in [(a, "lm") for a in arms if a != "lm"] + [("erl", "expert-random"), ("erl", "centred")]:
        perplexity = differences(runs, Contrast("", "", "erl-real", arm, control, "perplexity", 1, 1, True), first)
        entropy = differences(runs, Contrast("", "", "erl-real", arm, control, "router_entropy", 1, 1), first)
        cells = interval(perplexity, scale=100, digits=2), interval(entropy)
        lines.append(row(f"`{arm}`", f"`{control}`", len(perplexity), *cells))
    return lines


def again_table(runs, again) -> list[str]:
    """Runs that were run once more, and where one more start of the same arm would lie."""
    lines = heading("run", "figure", "first", "again", "days between", "one more start, 95 %", "inside")
    for (experiment, arm, start), run in sorted(again.items()):
        first = runs.get((experiment, arm, start))
        if first is None:
            continue
        then, now = (datetime.datetime.fromisoformat(r["date"]) for r in (first, run))
        for name in ("best_perplexity", "mrr", "router_entropy", "accuracy"):
            values = values_of(runs, experiment, arm, name, FIRST_START)
            if name not in run["figures"] or len(values) < 2:
                continue
            (low, high), value = prediction_interval(values), run["figures"][name]
            cells = (
                f"{first['figures'][name]:.7g}",
                f"{value:.7g}",
                (now.date() - then.date()).days,
                f"{low:.3f} to {high:.3f}",
            )
            inside = "yes" if low <= value <= high else "no"
            lines.append(row(f"`{experiment}/{arm}-{start}`", name.replace("_", " "), *cells, inside))
    return lines


def not_run(runs) -> list[str]:
    lines = heading("experiment", "arms with 10 confirmatory starts", "with fewer", "with none", "command that goes on")
    for name, e in EXPERIMENTS.items():
        count = {arm: len({s for n, a, s in runs if (n, a) == (name, arm) and s >= FIRST_START}) for arm in e.arms}
        cells = (
            ", ".join(f"`{a}`" for a, n in count.items() if n >= 10),
            ", ".join(f"`{a}` ({n})" for a, n in count.items() if 0 < n < 10),
            ", ".join(f"`{a}`" for a, n in count.items() if not n),
        )
        command = f"`python results/reproduce.py {name} --starts 100-109 --jobs 2 --minutes 600`"
        lines.append(row(f"`{name}`", *(c or "-" for c in cells), command))
    failed = [f"`{e}/{a}-{s}`: {r['failed']}" for (e, a, s), r in sorted(runs.items()) if "failed" in r]
    return lines + (["", "Runs that broke off: " + "; ".join(failed)] if failed else [])


def generated(runs, again) -> str:
    parts = ["## Claims", *claims(runs)]
    if values_of(runs, "erl-text", "erl", "mrr", FIRST_START):
        words = "`erl-text`, means over starts; perplexity paired within the start (100 x log ratio, lower is better):"
        figures = {"mrr": "MRR", "router_entropy": "entropy"}
        parts += ["## What is left of ERL, and what it does", words, *worded(runs, "erl-text", LEFT, figures)]
        if values_of(runs, "erl-text", "erl", "perplexity_at_1", FIRST_START):
            words = (
                "Means; score of the test windows or summaries with a fraction 0 to 1 of the decisions at random: the "
                "paper's is ROUGE-2 of SAMSum (higher is better), ours perplexity of `erl-text` (lower is better)."
            )
            parts += ["## The paper's tables 4 and 5, and ours", words, *beside_paper(runs)]
    if values_of(runs, STILL, "lm", "mrr", FIRST_START):
        words = (
            f"`{STILL}`, means over starts; one decision in eight is right by chance; perplexity as a factor of MoE's:"
        )
        figures = {"right_expert": "right experts", "router_entropy": "entropy", "mrr": "MRR"}
        parts += ["## What finds the right experts", words, *worded(runs, STILL, RIGHT, figures)]
    for name, e in EXPERIMENTS.items():
        for first, which in ((FIRST_START, "confirmatory starts"), (0, "tuning starts, which decide nothing")):
            some = {k: r for k, r in runs.items() if k[0] == name and (k[2] >= FIRST_START) == (first > 0)}
            if any(k[1] != "start" for k in some):
                parts += [f"## `{name}`: {which}", e.about[0].upper() + e.about[1:] + "."]
                tables = {"answers": answer_tables, "erl-real": real_tables}.get(name)
                parts += tables(some, first) if tables else [erl_table_words(some), *erl_tables(some, name, first)]
    parts += ["## The same runs once more", *again_table(runs, again)] if again else []
    parts += ["## What has not run", *not_run(runs)]
    text = []
    for part in filter(None, parts):  # a blank line between paragraphs, none within a table
        text += [part] if part.startswith("|") and text and text[-1].startswith("|") else ["", part]
    return "\n".join(text).strip() + "\n"


def erl_table_words(runs) -> str:
    windows = {r["figures"].get("windows") for r in runs.values() if "windows" in r.get("figures", {})}
    return (
        f"Mean ± standard deviation over starts. Ranks, entropy, load over {', '.join(map(str, sorted(windows)))} "
        f"windows of the test split along 100 routes; chance is MRR {CHANCE_MRR:.3f}, Hit@1 0.010; entropy in nats, at "
        f"most {math.log(8):.3f}; even load 0.125."
    )


def write(findings=FINDINGS, picture=ROOT / "results" / "erl.png", folder=RUNS):
    runs = read_runs(folder)
    before, after = findings.read_text().split(MARKS[0])[0], findings.read_text().split(MARKS[1])[1]
    text = generated(runs, read_runs(folder.with_name("again")))
    findings.write_text(before + MARKS[0] + "\n\n" + text + "\n" + MARKS[1] + after)
    drawn = [n for n in EXPERIMENTS if any(k[0] == n and "mrr" in r.get("figures", {}) for k, r in runs.items())]
    if controls := [n for n in drawn if EXPERIMENTS[n].figures]:
        draw_controls(runs, controls, picture.with_name("domains.png"))
    if experiments := [n for n in drawn if n not in controls]:
        draw(runs, experiments, picture)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures
# ---------------------------------------------------------------------------------------------------------------------

# Colour, words of the legend, arms
GROUPS = (
    ("black", "MoE", ("lm",)),
    ("tab:red", "ERL as the paper sets it, gradient through the whole network", ("erl",)),
    ("tab:blue", "the same with random experts credited (two arms)", ("erl-expert-random", "erl-centred-random")),
    ("tab:purple", "ERL, centred within a position (-0.13 is left of the mean)", ("erl-centred",)),
    ("tab:orange", "an advantage of -0.13 everywhere: no information", ("erl-constant",)),
    ("tab:cyan", "no random route at all: 0.065 x mean log P added to MoE's loss", ("mean-log-p",)),
    ("maroon", "ERL, negative advantages alone", ("erl-negative",)),
    (
        "tab:green",
        "ERL, mean 0 at each position, or + alone, or with a ratio that fits the draw (6 arms)",
        "erl-level erl-level-random erl-positive erl-weighted erl-clipped erl-drawn".split(),
    ),
    ("tab:olive", "ERL, advantages in random places, or their overall mean alone", ("erl-shuffled", "erl-mean")),
    (
        "gold",
        "ERL, gradient to the routers alone (default; 3 arms), or a fifth of the weight",
        ("erl-router", "erl-router-random", "erl-router-constant", "erl-delta-0.1"),
    ),
    (
        "deeppink",
        "ERL with wPL, without a limit on the gradient, without balance and z losses, as published",
        ("erl-wpl", "erl-no-clip", "erl-plain", "erl-published", "erl-published-drawn"),
    ),
    (
        "dimgray",
        "MoE, gate straight, without balance and z losses, with dropout",
        ("lm-straight", "lm-plain", "lm-dropout"),
    ),
)
CONTROLS = {
    "lm": "black",
    "erl": "tab:red",
    "erl-expert-random": "tab:pink",
    "erl-router": "tab:orange",
    "erl-router-random": "tab:green",
    "erl-router-level": "tab:purple",
    "erl-router-drawn": "gold",
    "erl-router-constant": "tab:gray",
    "erl-router-weighted": "tab:blue",
    "erl-router-weighted-random": "tab:cyan",
}


def to_draw(runs, experiment: str) -> tuple[dict, str]:
    """(arm, start) -> figures of the confirmatory starts, or, where there are none, of the tuning ones; and which."""
    mine = {(a, s): r["figures"] for (e, a, s), r in runs.items() if e == experiment and "mrr" in r.get("figures", {})}
    confirmatory = any(s >= FIRST_START for _, s in mine)
    mine = {k: f for k, f in mine.items() if (k[1] >= FIRST_START) == confirmatory}
    return mine, "confirmatory" if confirmatory else "tuning"


def draw(runs, experiments: list[str], path):
    """MRR against router entropy, a dot a run; below it what the run cost or gained in perplexity."""
    figure = Figure(figsize=(max(8, 6.4 * len(experiments)), 9.5), layout="constrained")
    axes = figure.subplots(2, len(experiments), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
    labels = {}
    for column, experiment in enumerate(experiments):
        mine, kind = to_draw(runs, experiment)
        top, bottom = axes[:, column]
        draw_column(mine, top, bottom, labels)
        starts = sorted({s for _, s in mine})
        top.set_title(f"{experiment}: {len(starts)} {kind} starts ({starts[0]}-{starts[-1]})")
        bottom.set_xlabel(f"router entropy [nats] (all experts alike: {math.log(8):.2f}); sharper to the right")
        top.invert_xaxis()
    axes[0, 0].set_ylabel("MRR of the own route among 100")
    axes[1, 0].set_ylabel("perplexity against MoE [%]\n(lower is better)")
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", fontsize=9, ncols=len(experiments))
    figure.suptitle(
        "Does ERL find better experts? A dot is a run.\n"
        "Orange and cyan know nothing of any expert or token, and rank the own route as high as ERL does or higher.\n"
        "Green: without that drift MRR is that of MoE.",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def draw_controls(runs, experiments: list[str], path):
    """Perplexity over the share of decisions for the right expert, where there is one."""
    figure = Figure(figsize=(max(8, 6 * len(experiments)), 6), layout="constrained")
    axes, labels = figure.subplots(1, len(experiments), squeeze=False)[0], {}
    for axis, experiment in zip(axes, experiments, strict=True):
        mine, kind = to_draw(runs, experiment)
        mine = {k: f for k, f in mine.items() if k[0] in CONTROLS and "right_expert" in f}
        draw_control(mine, experiment == STILL, axis, labels)
        axis.set_title(f"{experiment}: {len({s for _, s in mine})} {kind} starts", fontsize=11)
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", fontsize=9, ncols=2)
    figure.suptitle(
        "A right route exists. Does ERL find it? A line leads to the same start with random experts credited."
    )
    figure.savefig(path, dpi=110)


def draw_control(figures: dict, still: bool, axis, labels: dict):
    """A dot a run, a line to the control that credits random experts; against MoE of the same start, or, where the
    experts stay still, absolute and with the right route for comparison."""
    bases = {s: f["best_perplexity"] for (a, s), f in figures.items() if a == "lm"}
    dots = {
        (a, s): (f["right_expert"], f["best_perplexity"] if still else 100 * (f["best_perplexity"] / bases[s] - 1))
        for (a, s), f in figures.items()
        if still or s in bases
    }
    for arm, colour in CONTROLS.items():
        if mine := [dot for (a, _), dot in sorted(dots.items()) if a == arm]:
            about = EXPERIMENTS["erl-domains"].arms[arm].about
            labels[about] = axis.scatter(*zip(*mine, strict=True), color=colour, alpha=0.8)
    for (arm, s), dot in dots.items():
        if (RANDOM.get(arm), s) in dots:
            axis.plot(*zip(dot, dots[RANDOM[arm], s], strict=True), color="tab:gray", lw=0.8, zorder=0)
    labels["one in eight is right by chance"] = axis.axvline(1 / 8, color="black", ls=":", lw=1)
    axis.set_xlabel("share of decisions for the expert that was\ntrained on the window's alphabet")
    if still:
        right = [f["right_route_perplexity"] for f in figures.values() if "right_route_perplexity" in f]
        labels["along the right route"] = axis.scatter([1], [statistics.fmean(right)], color="black", marker="*", s=120)
        axis.set_yscale("log")
        axis.set_yticks(ticks := [10, 20, 40, 80, 160], ticks)
        axis.minorticks_off()
        axis.set_ylabel("perplexity (lower is better)")
    else:
        axis.axhline(0, color="black", lw=1)
        axis.set_ylabel("perplexity against MoE\nof the same start [%] (lower is better)")


def draw_column(figures: dict, top, bottom, labels: dict):
    named = {arm for _, _, arms in GROUPS for arm in arms}
    sharpening = tuple(sorted({a for a, _ in figures if a.startswith("sharpen-")}))
    others = tuple(sorted({a for a, _ in figures} - named - set(sharpening)))
    last = (("tab:brown", "other arms", others), ("tab:gray", "MoE + entropy penalty: sharpening alone", sharpening))
    for colour, about, arms in (*GROUPS, *last):
        dots = [(f, s) for (a, s), f in figures.items() if a in arms]
        if not dots:
            continue
        style = {"color": colour, "marker": "x" if arms is sharpening else "o", "s": 34, "alpha": 0.8}
        labels[about] = top.scatter([f["router_entropy"] for f, _ in dots], [f["mrr"] for f, _ in dots], **style)
        changes = [(f["router_entropy"], f["best_perplexity"], figures.get(("lm", s))) for f, s in dots]
        changes = [(h, 100 * (p / base["best_perplexity"] - 1)) for h, p, base in changes if base]
        bottom.scatter(*zip(*changes, strict=True), **style) if changes else None
    line = {}  # arm -> its mean point
    for arm in {a for a, _ in figures if a == "lm" or a.startswith("sharpen-")}:
        ran = [f for (a, _), f in figures.items() if a == arm]
        line[arm] = tuple(statistics.fmean(f[k] for f in ran) for k in ("router_entropy", "mrr"))
    labels["its line, through means over starts"] = top.plot(
        *zip(*sorted(line.values()), strict=True), color="tab:gray", lw=2
    )[0]
    labels["chance (0.052)"] = top.axhline(CHANCE_MRR, color="black", ls=":", lw=1)
    bottom.axhline(0, color="black", lw=1)
