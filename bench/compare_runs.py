"""One table and one picture of several runs: python bench/compare_runs.py runs/*-addition-seed* --out results/addition

Groups the run folders by algorithm, prints before -> after of the test metric (mean, lowest and highest over the seeds)
as a Markdown table, and draws the validation metric and the reward over the steps, a line a run, a colour an algorithm.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def spread(values) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("runs", nargs="+", metavar="RUN")
    p.add_argument("--metric", default="accuracy")
    p.add_argument("--out", required=True, help="writes OUT.png and OUT.json")
    args = p.parse_args(argv)
    groups, dataset = defaultdict(list), None

    def refuse(sentence: str) -> int:
        print(f"compare_runs.py: {sentence}", file=sys.stderr)
        return 2

    for run in map(Path, args.runs):
        try:
            summary = json.loads((run / "summary.json").read_text())
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            algo, seed, its_dataset, _ = (summary[name] for name in ("algo", "seed", "dataset", "seconds"))
        except (OSError, ValueError, TypeError, KeyError) as error:
            return refuse(f"{run} is no finished run ({error})")
        value = summary.get(args.metric)
        if not isinstance(value, float) or not math.isfinite(value):
            return refuse(f"{run} has no {args.metric} in its summary.json")
        if its_dataset != (dataset := dataset or its_dataset):
            return refuse(f"{run} ran on {its_dataset}, the runs before it on {dataset}: their scores do not compare")
        if seed in (s["seed"] for s, _ in groups[algo]):
            return refuse(f"{run}: {algo} with seed {seed} was given before")
        groups[algo].append((summary, rows))

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    panels = (("evaluation", args.metric, f"validation {args.metric}"), (None, "reward_mean", "mean reward of samples"))
    table = {}
    print(f"| algorithm | seeds | test {args.metric} before | after | minutes |\n| --- | --- | --- | --- | --- |")
    for i, (algo, runs) in enumerate(sorted(groups.items())):
        runs = sorted(runs, key=lambda run: run[0]["seed"])  # "seed10" is listed before "seed2"
        before, after = [s.get(f"before_{args.metric}") for s, _ in runs], [s[args.metric] for s, _ in runs]
        minutes = [s["seconds"] / 60 for s, _ in runs]
        seeds = [s["seed"] for s, _ in runs]
        table[algo] = {"seeds": seeds, "before": before, "after": after, "minutes": minutes}
        shown = "-" if None in before else spread(before)
        print(f"| `{algo}` | {len(seeds)} | {shown} | {spread(after)} | {sum(minutes) / len(minutes):.1f} |")
        for axis, (phase, name, _) in zip(axes, panels, strict=True):
            for j, (_, rows) in enumerate(runs):
                rows = [r for r in rows if name in r and r.get("split", "validation") == "validation"]
                points = [(r["step"], r[name]) for r in rows if phase is None or r["phase"] == phase]
                if points:
                    label = algo if j == 0 else None
                    axis.plot(*zip(*points, strict=True), color=f"C{i}", alpha=0.7, lw=1, label=label)
    for axis, (_, _, title) in zip(axes, panels, strict=True):
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
        if axis.get_lines():
            axis.legend()
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{out}.png", dpi=110)
        Path(f"{out}.json").write_text(json.dumps(table, indent=2) + "\n")
    except OSError as error:
        return refuse(f"cannot write {out}.png and {out}.json: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
