"""`python train.py` without flags: ERL and the control that matters, on an embedded text, in three minutes."""

import os
import sys

import eval_routing
import train
from results.arms import explore_then, random_expert
from support.errors import say

COLUMNS = {  # of the table: figure, heading
    "perplexity": "perplexity",
    "original_score": "original",
    "perturbed_score": "perturbed",
    "mrr": "MRR",
    "hit1": "Hit@1",
    "relative_router_entropy": "entropy",
    "top1_above_0.9": "top-1>0.9",
}


def demo() -> int:
    """A dense model learns the text, is upcycled and trained on in three ways; ends in a table of their routing."""
    out = "runs/demo"
    if os.path.exists(out):
        out = next(p for i in range(2, 10**6) if not os.path.exists(p := f"runs/demo-{i}"))
    common = ["--dataset", "pydocs", "--batch-size", "4", "--eval-every", "1000"]
    start = ["--init", f"{out}/dense", "--steps", "80"]
    erl = ["--algo", "erl", "--erl-grad", "all", *start]
    arms = {
        "dense": ("a dense model learns the text", ["--algo", "dense", "--steps", "300"]),
        "MoE": ("its layers copied into 8 experts, trained on", ["--algo", "lm", *start]),
        "ERL": ("with ERL, gradient through the whole network", erl),
        "ERL-random": ("the control: the same, but random experts get the credit (no flag does that)", erl),
    }
    rows, explore = {}, train.explore
    try:
        for name, (story, flags) in arms.items():
            say(f"\n{name}: {story}\n  python train.py {' '.join(common + flags)}", sys.stderr)
            if name == "ERL-random":
                explore_then(random_expert)()  # replaces train.explore
            try:
                rows[name] = train.run(train.parse([*common, *flags, "--out", f"{out}/{name}"]))
            except KeyboardInterrupt:
                if name == "ERL-random":
                    say("that would go on as plain ERL: run the demo anew instead", sys.stderr)
                raise
            if name != "dense":
                rows[name] |= eval_routing.run(eval_routing.parse([f"{out}/{name}", "--samples", "20"]))
    finally:
        train.explore = explore
    say(
        table(rows)
        + f"\npictures: {out}/ERL/routing_ranks.png and beside it; next: python train.py --algo erpo --dataset addition"
    )
    return 0


def table(rows: dict[str, dict]) -> str:
    lines = ["", " " * 12 + "".join(f"{heading:>12}" for heading in COLUMNS.values())]
    for name, row in rows.items():
        lines.append(f"{name:12}" + "".join(f"{row[c]:12.3f}" if c in row else f"{'-':>12}" for c in COLUMNS))
    ours = rows["ERL"]
    return "\n".join(
        [
            *lines,
            f"{'chance':12}{ours['chance_mrr']:48.3f}{ours['chance_hit1']:12.3f}",
            f"perplexity: of the test split. original, perturbed: of {ours['samples']} windows of it, along the "
            f"router's route and along 99 random ones; MRR +- {ours['mrr_standard_error']:.3f}.",
            "MRR rises when the router's route gets better, and when the random ones get worse or the router sharper: "
            "entropy (1: even) tells.",
            "What ERL-random does too is no credit that ERL has learnt.",
        ]
    )
