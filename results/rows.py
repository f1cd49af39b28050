"""Rows of runs, and the tables and verdicts that are made of them and of nothing else.

    python results/rows.py        results/*.csv -> results/tables.md

A row of NAME.csv is a run: its arm, its start (a seed and the model trained from it, from which all arms begin),
versions, the settings that differ within the experiment, named as flags, and its figures. An empty cell is a figure
that a run does not have. What all runs of an experiment share is in settings.csv, what an arm does in arms.csv. `again`
marks a run that was run once more, on another machine. Starts below 100 were for tuning and decide nothing. The code of
these runs has gone: `python -m results.mechanism` at commit d3a08cb made the erl-* rows, the others name theirs.
"""

import csv
import json
import math
import os
import pathlib
import statistics
import subprocess
from typing import NamedTuple

import torch
from scipy import stats

FOLDER = pathlib.Path(__file__).parent
FIRST_START, LEAST_STARTS, LEVEL = 100, 10, 0.05

# --- Reading and writing


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of results/NAME.csv as text, empty cells left out."""
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{column: cell for column, cell in row.items() if cell} for row in csv.DictReader(file)]


def parse_cell(text: str):
    """A number, true, false or null; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_rows(experiment: str) -> list[dict]:
    return [{k: parse_cell(cell) for k, cell in row.items() if k != "commit"} for row in read_table(experiment)]


def add_row(experiment: str, row: dict):
    """Append a run to results/EXPERIMENT.csv, unknown columns at the end. Numbers keep eight digits."""
    text = {k: f"{v:.8g}" if type(v) is float else v if type(v) is str else json.dumps(v) for k, v in row.items()}
    rows, path = [*read_table(experiment), text], FOLDER / f"{experiment}.csv"
    with open(f"{path}.tmp", "w", newline="") as file:
        columns = dict.fromkeys(column for row in rows for column in row)
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    os.replace(f"{path}.tmp", path)


def versions() -> dict:
    """What a row says of the code and the machine that made it."""
    command = ["git", "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True).stdout.strip()
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "commit": commit}


def confirmatory(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["start"] >= FIRST_START]


def by_start(rows: list[dict], arm: str, figure: str) -> dict[int, float]:
    """start -> a figure of an arm; runs without it and repeated runs are left out."""
    found = {row["start"]: row[figure] for row in rows if row["arm"] == arm and figure in row and not row.get("again")}
    return dict(sorted(found.items()))


def differences(rows: list[dict], arm: str, control: str, figure: str) -> list[float]:
    """arm less control in each start that has both; of a perplexity the difference of logarithms."""
    ours, theirs = by_start(rows, arm, figure), by_start(rows, control, figure)
    scale = math.log if figure.endswith("perplexity") else float
    return [scale(ours[start]) - scale(theirs[start]) for start in ours if start in theirs]


# ---------------------------------------------------------------------------------------------- Statistics and verdicts


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the 95 % t interval of it; at least two values."""
    mean, reach = statistics.fmean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, mean - reach, mean + reach


def sign_flip_p(values: list[float]) -> float:
    """Two-sided p of "no paired difference" by flipping signs: for figures that have two humps rather than one."""
    options = {"permutation_type": "samples", "vectorized": False, "rng": 0}
    return stats.permutation_test((values,), statistics.fmean, **options).pvalue


def holm(p: list[float], family: int) -> list[float]:
    """Adjusted p values; `family` counts the planned tests, those that could not run included."""
    adjusted, highest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (family - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


class Contrast(NamedTuple):
    claim: str
    experiment: str
    arm: str
    control: str
    figure: str
    margin: float  # of no difference: a quarter of the paper's effect (RAIS: of one that was chosen)
    sign: int = 1  # of the difference that the paper claims


PLANNED = (  # effects: ERL tables 3 and 4; ERPO table 1 (1.2 points over GSPO); RAIS: 4 points, chosen
    Contrast("ERL lowers perplexity", "erl-text", "erl", "lm", "best_perplexity", 0.008, -1),
    Contrast("ERL's credit raises MRR", "erl-text", "erl", "erl-expert-random", "mrr", 0.03),
    Contrast("ERPO beats GSPO", "answers", "erpo", "gspo", "accuracy", 0.003),
    Contrast("RAIS beats its base", "answers", "rais", "gmpo", "accuracy", 0.01),
    Contrast("it matters which tokens shifted", "answers", "rais", "rais-yoked", "accuracy", 0.01),
)


def verdicts(rows: dict[str, list[dict]]) -> list[tuple[str, str]]:
    """(verdict, why) of every planned contrast, from confirmatory starts alone.

    Two families of tests, each held to 5 % by Holm: of a difference (t), and of none beyond the margin (two one-sided
    t tests). A difference that is there and smaller than the margin is "no difference".
    """
    found = [differences(confirmatory(rows[c.experiment]), c.arm, c.control, c.figure) for c in PLANNED]
    enough = [i for i, values in enumerate(found) if len(values) >= LEAST_STARTS]

    def p(i: int, mean: float, side: str) -> float:
        return float(stats.ttest_1samp(found[i], mean, alternative=side).pvalue)

    margins = [c.margin for c in PLANNED]
    unequal = holm([p(i, 0, "two-sided") for i in enough], len(PLANNED))
    equal = holm([max(p(i, -margins[i], "greater"), p(i, margins[i], "less")) for i in enough], len(PLANNED))
    results = [("not decidable here", f"{len(values)} of at least {LEAST_STARTS} starts ran") for values in found]
    for i, different, same in zip(enough, unequal, equal, strict=True):
        claimed = statistics.fmean(found[i]) * PLANNED[i].sign > 0
        verdict = ("same direction" if claimed else "opposite") if different < LEVEL else "not decidable here"
        verdict = "no difference" if same < LEVEL else verdict
        results[i] = verdict, f"p {different:.2g} of a difference, {same:.2g} of none"
    return results


# -------------------------------------------------------------------------------------------------------------- Tables

ROUTING = "mrr router_entropy load_max original_score best_of_99_score perplexity_at_1 right_expert"
ERL = f"perplexity best_perplexity {ROUTING} right_route_perplexity", "perplexity best_perplexity mrr right_expert"
ANSWERS = "accuracy before_accuracy mean_reward_mean late_reward mean_clip_share mean_clipped_share mean_gamma_mean "
ANSWERS = ANSWERS + "mean_agreement median_cluster dropped_share", "accuracy mean_reward_mean late_reward"
REAL = "before_perplexity perplexity router_entropy load_max agreement", "perplexity router_entropy"
EXPERIMENTS = {  # about, figures, those that are compared within a start
    "erl-text": ("A dense byte model is upcycled and trained on for 120 steps.", *ERL),
    "erl-overfit": ("The same on 32 kB of text, read 19 times.", *ERL),
    "erl-domains": ("Each expert was trained on one of eight alphabets, then the routers are drawn anew.", *ERL),
    "erl-still": ("The same, and all but the routers stays nearly as it is.", *ERL),
    "erl-real": ("SmolLM2-135M upcycled, WikiText-2, 50 steps.", *REAL),
    "answers": ("Sums worked out in writing.", *ANSWERS),
}
INTRODUCTION = f"""# Tables

Made by `python results/rows.py` from the rows of `results/*.csv`; figures have the names of its columns
([`docs/metrics.md`](../docs/metrics.md)). Means ± standard deviations over starts. Differences are paired within a
start, with unadjusted 95 % t intervals; of a perplexity the ratio is shown, and below 1 is better. MRR has two humps,
so its p is that of a sign-flip permutation test. Chance is MRR .052 and one right expert in eight; entropy is in nats,
at most {math.log(8):.3f}. `perplexity_at_1` is along routes that are all random, `original_score` along the own ones.
Only the planned contrasts get a verdict."""


def line(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def heading(*cells) -> list[str]:
    return [line(*cells), line(*["---"] * len(cells))]


def shown(values) -> str:
    """Mean ± standard deviation over the starts."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}" if values else "-"


def compared(values: list[float], figure: str) -> str:
    """Mean paired difference and its 95 % interval; of a perplexity the ratio."""
    if len(values) < 2:
        return "-"
    if figure.endswith("perplexity"):
        return "{:.4f} [{:.4f}, {:.4f}]".format(*map(math.exp, interval(values)))
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval(values)) + f", p {sign_flip_p(values):.3f}" * (figure == "mrr")


def planned_lines(rows: dict[str, list[dict]]) -> list[str]:
    """The planned contrasts and their verdicts, a line each."""
    lines = []
    for c, (verdict, why) in zip(PLANNED, verdicts(rows), strict=True):
        values = differences(confirmatory(rows[c.experiment]), c.arm, c.control, c.figure)
        found = f"`{c.arm}` less `{c.control}`, `{c.figure}`, {len(values)} starts: {compared(values, c.figure)}"
        lines.append(f"- {c.claim} ({found}): **{verdict}** ({why})")
    return lines


def means_table(rows: list[dict], arms: list[dict], figures: list[str]) -> list[str]:
    """A row an arm that ran: the mean of every figure that some run has."""
    here = [figure for figure in figures if any(figure in row for row in rows)]
    lines = heading("arm", "what it is", "starts", *(f"`{figure}`" for figure in here))
    for arm in arms:
        if starts := {row["start"] for row in rows if row["arm"] == arm["arm"] and not row.get("again")}:
            found = [by_start(rows, arm["arm"], figure).values() for figure in here]
            cells = [shown(v) + (f" ({len(v)} starts)" if 0 < len(v) < len(starts) else "") for v in found]
            lines.append(line(f"`{arm['arm']}`", arm["about"], len(starts), *cells))
    return lines


def paired_table(rows: list[dict], arms: list[dict], figures: list[str]) -> list[str]:
    """A row a pair of an arm and one of its controls that ran in two starts or more."""
    here = [figure for figure in figures if any(figure in row for row in rows)]
    lines = heading("arm", "less", "starts", *(f"`{figure}`" for figure in here))
    for name, control in ((arm["arm"], c) for arm in arms for c in arm.get("controls", "").split()):
        found = [differences(rows, name, control, figure) for figure in here]
        if (starts := max(map(len, found))) > 1:
            cells = [compared(values, figure) for values, figure in zip(found, here, strict=True)]
            lines.append(line(f"`{name}`", f"`{control}`", starts, *cells))
    return lines


def tables(rows: dict[str, list[dict]], arms: list[dict]) -> str:
    """All of results/tables.md."""
    parts = [INTRODUCTION, "## Planned contrasts", "\n".join(planned_lines(rows))]
    for name, (about, figures, paired) in EXPERIMENTS.items():
        parts += [f"## `{name}`", about, *means_table(confirmatory(rows[name]), arms, figures.split())]
        parts += ["Paired within the start:", *paired_table(confirmatory(rows[name]), arms, paired.split())]
    return "\n\n".join(parts).replace("|\n\n|", "|\n|") + "\n"


def main():
    rows, arms = {name: read_rows(name) for name in EXPERIMENTS}, read_table("arms")
    (FOLDER / "tables.md").write_text(tables(rows, arms))
    print("\n".join(planned_lines(rows)))


if __name__ == "__main__":
    main()
