"""What the runs say of the papers' claims, computed from results/runs/*.json alone (PLAN.md says why it is done so).

python results/verdict.py                          the five primary contrasts
python results/verdict.py --starts-needed 0.006    of a contrast whose paired differences have that spread
"""

import argparse
import json
import math
import pathlib
import random
import statistics
import sys
from typing import NamedTuple

RUNS = pathlib.Path(__file__).parent / "runs"
FIRST_START, LEAST_STARTS, LEVEL = 100, 10, 0.05  # starts below 100 are for tuning and count nowhere here
VERDICTS = ("same direction", "no difference", "opposite", "not decidable here")
# ERPO is about clusters: where they have fewer tokens, or more pairs than this have no ratio, nothing is tested.
LEAST_CLUSTER, MOST_DROPPED = 8, 0.05


class Contrast(NamedTuple):
    name: str
    claim: str  # the paper's figures
    experiment: str
    arm: str
    control: str
    figure: str
    effect: float  # the paper's, on the scale of `difference`
    margin: float  # of no difference: a quarter of it
    lower_is_better: bool = False


# Effects: ERL tables 3 and 4 (21.20 -> 20.53; .05 -> .17); ERPO table 1 (mean of 48.58 - 47.43 and 62.25 - 61.03 points
# over GSPO). RSPO's tables were not seen: 4 points were chosen as an effect, so one point as the margin.
PRIMARY = (
    Contrast("erl", "perplexity 21.20 -> 20.53", "erl-text", "erl", "lm", "best_perplexity", 0.032, 0.008, True),
    Contrast("credit", "MRR .05 -> .17, by credit", "erl-text", "erl", "erl-expert-random", "mrr", 0.12, 0.03),
    Contrast("erpo", "+1.2 points over GSPO", "answers", "erpo", "gspo", "accuracy", 0.012, 0.003),
    Contrast("rais", "better than its base", "answers", "rais", "gmpo", "accuracy", 0.04, 0.01),
    Contrast("where", "it matters which tokens shift", "answers", "rais", "rais-yoked", "accuracy", 0.04, 0.01),
)

# ---------------------------------------------------------------------------------------------------------------------
# Student's t, without scipy
# ---------------------------------------------------------------------------------------------------------------------


def student_tail(t: float, df: float) -> float:
    """P(T > t), by the continued fraction of the incomplete beta function."""
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    half = _incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return half if t >= 0 else 1 - half


def student_quantile(p: float, df: float) -> float:
    """t with P(T <= t) = p, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - student_tail(middle, df) < p else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d, fraction = 1.0, 0.0, 1.0  # Lentz
    for i in range(400):
        m = i // 2
        if i == 0:
            numerator = 1.0
        elif i % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + numerator * d or 1e-30)
        c = 1 + numerator / c or 1e-30
        fraction *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * (fraction - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Paired differences
# ---------------------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    starts: int
    mean: float  # of the paired differences; positive: in the direction of the paper's claim
    spread: float  # their standard deviation
    low: float  # 95 % interval of the mean, not adjusted for the number of contrasts
    high: float
    p_difference: float  # two-sided t test of mean = 0
    p_equivalence: float  # two one-sided t tests of |mean| >= margin


def read_runs(folder=RUNS) -> dict[tuple[str, str, int], dict]:
    """(experiment, arm, start) -> the run's JSON."""
    records = [json.loads(path.read_text()) for path in sorted(pathlib.Path(folder).glob("*/*.json"))]
    return {(r["experiment"], r["arm"], r["start"]): r for r in records}


def differences(runs, contrast: Contrast, first: int = FIRST_START) -> list[float]:
    """arm less control of every start that has both, positive in the paper's direction; of what is better when it is
    lower (perplexity) the difference of logarithms."""
    found = []
    for (experiment, arm, start), run in sorted(runs.items()):
        other = runs.get((experiment, contrast.control, start))
        if (experiment, arm) != (contrast.experiment, contrast.arm) or start < first or other is None:
            continue
        x, y = (r.get("figures", {}).get(contrast.figure) for r in (run, other))
        if x is not None and y is not None:
            found.append(math.log(y) - math.log(x) if contrast.lower_is_better else x - y)
    return found


def estimate(values: list[float], margin: float) -> Estimate | None:
    """None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    error = max(spread / math.sqrt(n), 1e-300)
    reach = student_quantile(0.975, n - 1) * error
    p_equivalence = max(student_tail((mean + margin) / error, n - 1), student_tail((margin - mean) / error, n - 1))
    p_difference = 2 * student_tail(abs(mean) / error, n - 1)
    return Estimate(n, mean, spread, mean - reach, mean + reach, p_difference, p_equivalence)


def prediction_interval(values: list[float]) -> tuple[float, float]:
    """Where one more value lies with 95 % chance, if these are normal and it is like them."""
    n = len(values)
    reach = student_quantile(0.975, n - 1) * statistics.stdev(values) * math.sqrt(1 + 1 / n)
    return statistics.fmean(values) - reach, statistics.fmean(values) + reach


def holm(p: list[float], family: int) -> list[float]:
    """Adjusted p-values; `family` counts the tests that were planned, those that could not run included."""
    adjusted, highest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (family - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------


def decide(found: Estimate, p_difference: float, p_equivalence: float) -> str:
    """The verdict from adjusted p-values. A difference that is there and smaller than the margin is no difference."""
    if p_equivalence < LEVEL:
        return "no difference"
    if p_difference < LEVEL:
        return "same direction" if found.mean > 0 else "opposite"
    return "not decidable here"


def verdicts(runs, contrasts=PRIMARY) -> list[dict]:
    """One row a contrast: its verdict, the estimate, and why where nothing was decided."""
    found = [estimate(differences(runs, c), c.margin) for c in contrasts]
    enough = [i for i, f in enumerate(found) if f is not None and f.starts >= LEAST_STARTS]
    # Two families, each held to 5 %: wrong differences, and wrong "no difference"s. A contrast cannot be both at once.
    unequal = dict(zip(enough, holm([found[i].p_difference for i in enough], len(contrasts)), strict=True))
    equal = dict(zip(enough, holm([found[i].p_equivalence for i in enough], len(contrasts)), strict=True))
    rows = []
    for i, (contrast, f) in enumerate(zip(contrasts, found, strict=True)):
        row = {"contrast": contrast, "estimate": f, "verdict": "not decidable here", "why": ""}
        refused = not_testable(runs) if contrast.arm == "erpo" else ""
        if refused:
            row |= {"verdict": "not testable here", "why": refused}
        elif i not in enough:
            starts = f.starts if f else len(differences(runs, contrast))
            row["why"] = f"{starts} of at least {LEAST_STARTS} starts ran"
        else:
            row["verdict"] = decide(f, unequal[i], equal[i])
            row["why"] = f"Holm: p {unequal[i]:.2g} of a difference, {equal[i]:.2g} of none"
        rows.append(row)
    return rows


def not_testable(runs) -> str:
    """Why ERPO's clusters are too small here, "" where they are not or nothing has run."""
    answers = [(arm, run.get("figures", {})) for (name, arm, _), run in runs.items() if name == "answers"]
    sizes = [f["median_cluster"] for arm, f in answers if arm == "start" and "median_cluster" in f]
    dropped = [f["dropped_share"] for arm, f in answers if arm == "erpo" and "dropped_share" in f]
    if sizes and min(sizes) < LEAST_CLUSTER:
        return f"median cluster of {min(sizes):g} tokens, below {LEAST_CLUSTER}"
    if dropped and max(dropped) > MOST_DROPPED:
        return f"{100 * max(dropped):.1f} % of the pairs have no ratio, more than {100 * MOST_DROPPED:g} %"
    return ""


def above_line(runs, experiment: str, arm: str, first: int = FIRST_START) -> list[float]:
    """MRR of an arm's runs less that of sharpening alone at the same router entropy, in the same start (exploratory).

    The line goes through `lm` and the start's sharpen-* runs, straight between neighbours, level beyond its ends.
    """
    found = []
    for (name, a, start), run in sorted(runs.items()):
        if (name, a) == (experiment, arm) and start >= first and "mrr" in run.get("figures", {}):
            line = [
                (r["figures"]["router_entropy"], r["figures"]["mrr"])
                for (n, other, s), r in runs.items()
                if (n, s) == (experiment, start) and (other == "lm" or other.startswith("sharpen-")) and "figures" in r
            ]
            if len(line) > 1:
                found.append(run["figures"]["mrr"] - interpolate(sorted(line), run["figures"]["router_entropy"]))
    return found


def interpolate(points: list[tuple[float, float]], x: float) -> float:
    """On straight lines between points sorted by x; level beyond the ends."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


# ---------------------------------------------------------------------------------------------------------------------
# How many starts
# ---------------------------------------------------------------------------------------------------------------------


def power(starts: int, spread: float, effect: float, margin: float, draws: int = 1000) -> tuple[float, float]:
    """Chances of "same direction" where the paper's effect is true, and of "no difference" where there is none, at the
    first and hardest step of Holm."""
    generator, hits = random.Random(0), [0, 0]
    for _ in range(draws):
        noise = [generator.gauss(0, spread) for _ in range(starts)]
        for which, truth in enumerate((effect, 0.0)):
            f = estimate([truth + x for x in noise], margin)
            p = (min(1, len(PRIMARY) * q) for q in (f.p_difference, f.p_equivalence))
            hits[which] += decide(f, *p) == ("same direction", "no difference")[which]
    return hits[0] / draws, hits[1] / draws


def starts_needed(spread: float, effect: float, margin: float, most: int = 60) -> int | None:
    """The smallest number of starts that gives both chances 80 %, None above `most`."""
    return next((n for n in range(LEAST_STARTS, most + 1) if min(power(n, spread, effect, margin, 400)) >= 0.8), None)


def line(row: dict) -> str:
    c, f = row["contrast"], row["estimate"]
    shown = f"{f.mean:+.4f} [{f.low:+.4f}, {f.high:+.4f}] of {f.starts} starts" if f else "no two starts"
    figures = f"{c.figure} of {c.arm} against {c.control}"
    return f"{c.name:8}{figures:46}{shown}; margin {c.margin:g}: {row['verdict']} ({row['why']})"


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--runs", default=RUNS, help="folder of the JSON files")
    p.add_argument("--starts-needed", type=float, metavar="SPREAD", help="instead: with this spread, a line a contrast")
    args = p.parse_args(argv)
    if args.starts_needed is not None:
        for c in PRIMARY:
            needed = starts_needed(args.starts_needed, c.effect, c.margin)
            print(f"{c.name:8}effect {c.effect:g}, margin {c.margin:g}: {needed or 'more than 60'} starts")
        return 0
    for row in verdicts(read_runs(args.runs)):
        print(line(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
