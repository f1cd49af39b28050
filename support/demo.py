"""`python train.py` without flags: MoE, ERL and the control that matters, on an embedded text, in three minutes."""

import math
import os
import sys

import erl
from support.controls import random_expert
from support.pictures import plot_demo

# Of the table: figure, heading.
COLUMNS = {"perplexity": "perplexity", "original_score": "own route", "perturbed_score": "random ones", "mrr": "MRR"}
COLUMNS |= {"hit1": "Hit@1", "relative_router_entropy": "entropy", "top1_above_0.9": "top-1>0.9"}


def random_credit(*args, generator=None, **options):
    """`explore` of the control: what each random expert earned is credited to another one, drawn anew."""
    return random_expert(erl.explore(*args, generator=generator, **options), generator)


CONTROL = {"explore": random_credit}


def demo(run, parse):
    """A dense model learns the text, is upcycled and trained on in three ways. run, parse: those of train.py."""
    import eval_routing

    names = ["runs/demo", *(f"runs/demo-{i}" for i in range(2, 1000))]
    out = next(name for name in names if not os.path.exists(name))
    common = ["--dataset", "pydocs", "--batch-size", "4", "--eval-every", "1000"]
    start = ["--init", f"{out}/dense", "--steps", "80"]
    ours = ["--algo", "erl", "--erl-grad", "all", *start]
    arms = {
        "dense": ("a dense model learns the text", ["--algo", "dense", "--steps", "300"], {}),
        "MoE": ("its layers copied into 8 experts, trained on", ["--algo", "lm", *start], {}),
        "ERL": ("with ERL, gradient through the whole network", ours, {}),
        "control": ("ERL, but random experts get the credit (no flag: see support/demo.py)", ours, CONTROL),
    }
    rows = {}
    for name, (story, flags, variant) in arms.items():
        flags = [*common, *flags, "--out", f"{out}/{name}"]
        print(f"\n{name}: {story}\n  python train.py {' '.join(flags)}", file=sys.stderr)
        try:
            rows[name] = run(parse(flags), **variant)
        except KeyboardInterrupt:
            if variant:
                print("--resume would go on as plain ERL: run the demo anew instead", file=sys.stderr)
            raise
        if name != "dense":
            rows[name] |= eval_routing.run(eval_routing.parse([f"{out}/{name}", "--samples", "20", "--decisions", "0"]))
    print(table(rows))
    plot_demo(rows, path := f"{out}/demo.png")
    print(f"\n{verdict(rows)}\npicture: {path}; next: python train.py --algo erpo --dataset addition")


def table(rows: dict[str, dict]) -> str:
    ours, lines = rows["ERL"], ["", " " * 12 + "".join(f"{heading:>12}" for heading in COLUMNS.values())]
    for name, row in rows.items():
        lines.append(f"{name:12}" + "".join(f"{row[c]:12.3f}" if c in row else f"{'-':>12}" for c in COLUMNS))
    lines += [
        f"{'chance':12}{ours['chance_mrr']:48.3f}{ours['chance_hit1']:12.3f}",
        f"perplexity: of the test split. own route, random ones: of {ours['samples']} windows of it, along the "
        "router's route and along 99 in which 25, 50 or 75 % of the decisions are random (mean).",
        "MRR: mean reciprocal rank of the router's route among those 100; Hit@1: share of windows where it is first. "
        "Both also rise when the random routes get worse, or the router sharper.",
        "entropy: of the routers, as a share of log 8 (1: even). top-1>0.9: share of decisions with a P above 0.9.",
    ]
    return "\n".join(lines)


def verdict(rows: dict[str, dict]) -> str:
    """What the ranks of this one run say of ERL's credit, against the control that gives none."""
    ours, control = rows["ERL"], rows["control"]
    gap = ours["mrr"] - control["mrr"]
    noise = 1.96 * math.hypot(ours["mrr_standard_error"], control["mrr_standard_error"])
    said = f"{'above' if gap > 0 else 'below'} those of the control by more than the noise of the windows"
    if abs(gap) <= noise:
        said = "within the noise of the control, which credits experts at random"
    figures = f"MRR {ours['mrr']:.3f} against {control['mrr']:.3f}, MoE {rows['MoE']['mrr']:.3f}"
    between = f"difference {gap:+.3f}, 95 % interval {gap - noise:+.3f} to {gap + noise:+.3f}"
    advice = "One seed and 80 steps decide nothing: see docs/findings.md."
    return f"Verdict: ERL's ranks are {said} ({figures}; {between}). {advice}"
