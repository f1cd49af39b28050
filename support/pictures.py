"""curves.png of a run."""

import os

from support.run_folder import read_metrics

PANELS = ["loss", "perplexity", "accuracy", "f1", "rouge2", "reward_mean", "clip_share", "entropy", "load_max"]


def plot_curves(out: str):
    """What metrics.jsonl holds, one panel a quantity."""
    from matplotlib.figure import Figure

    rows = [row for row in read_metrics(out) if row.get("split", "validation") == "validation"]
    names = [n for n in PANELS if any(n in r for r in rows)]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for phase in dict.fromkeys(r["phase"] for r in rows):
            points = [(r["step"], r[name]) for r in rows if r["phase"] == phase and name in r]
            if points:
                dots = "o" if phase == "evaluation" or len(points) == 1 else ""
                axis.plot(*zip(*points, strict=True), marker=dots, ms=3, label=phase)
        axis.set(xlabel="step", ylabel=name)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(os.path.join(out, "curves.png"), dpi=120)
