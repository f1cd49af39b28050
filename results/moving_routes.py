"""E3 of PLAN.md: RSPO and ERPO on Countdown, with routers that learn so fast that routes move.

    python results/moving_routes.py --starts 0 --arms grpo --rates 1e-4     PLAN.md's check, on the tuning start
    python results/moving_routes.py                                         all arms: rows of results/e3.csv
    python results/moving_routes.py report                                  tables and verdicts: results/e3.md

A start is a model of its own that has learnt reference answers; all arms begin from it and read the same problems. What
has its row is not run again.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import shutil
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import torch
from scipy import stats

import train
from baselines import gmpo_loss
from rais import router_shift
from results.rows import add_row, heading, interval, line, means_table, read_rows, versions
from support.errors import UserError

FOLDER, WORK = pathlib.Path(__file__).parent, pathlib.Path("runs", "e3")
START = "--algo lm --dataset countdown --top-k 2 --pretrain-steps 0 --steps 600 --lr 1e-3 --eval-every 600"
ARM = "--dataset countdown --top-k 2 --pretrain-steps 0 --steps 200 --prompts-per-step 32 --minibatches 16 "
ARM += "--router-lr-factor 100 --answer-balance-coef 0.01 --eval-every 200"
RATES, WINDOW = (1e-4, 2e-4), 20  # batches at the beginning and at the end over which a reward is averaged
COLLAPSED = 0.5  # the reward of the last batches is below this part of that of the first ones
LABELS = {
    "grpo": "GRPO",
    "gmpo": "GMPO",
    "gspo": "GSPO",
    "erpo": "ERPO",
    "rais": "RAIS over GMPO",
    "rais-yoked": "GMPO with the update's mean gamma for all tokens",
    "gmpo-again": "GMPO in other bits (.975 of its loss, which Adam divides out): the noise of a run",
}
# A sampler that computes in bfloat16, at the first rate alone: GRPO and what is said to help. PLAN.md's small table.
SAMPLER = {
    "bf16": ("GRPO", "--algo grpo"),
    "bf16-r2": ("GRPO, routes of the policy before the batch (R2)", "--algo grpo --replay r2"),
    "bf16-r3": ("GRPO, the sampler's routes (R3)", "--algo grpo --replay r3"),
    "bf16-tis": ("GRPO, truncated importance weights (TIS)", "--algo grpo --mismatch tis"),
    "bf16-rais": ("RAIS over GRPO", "--algo rais --base grpo"),
}
PAIRS = (("rais", "gmpo"), ("rais", "rais-yoked"), ("erpo", "gspo"), ("gmpo-again", "gmpo"))
FIGURES = "collapsed area late_reward accuracy gamma kept_routes kept_decisions entropy router_entropy".split()
FIGURES += ["clip_share", "load_max"]
ENGINE = "collapsed area late_reward accuracy gamma kept_routes engine_gap update_gap clip_share".split()


def yoked_loss(log_probs, old_log_probs, advantages, response_mask, router_log_probs, old_router_log_probs):
    """RAIS over GMPO, but every token of the update has the update's mean gamma."""
    gamma = router_shift(router_log_probs, old_router_log_probs)[response_mask].mean()
    return gmpo_loss(log_probs, old_log_probs - gamma.log(), advantages, response_mask)


@functools.wraps(gmpo_loss)
def gmpo_again_loss(*args, **options):
    loss, metrics = gmpo_loss(*args, **options)
    return 0.975 * loss, metrics


def run_flags(flags: str, start: int, out: pathlib.Path) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    return train.run(train.parse(f"{flags} --seed {start} --out {out}".split()))


def run_arm(start: int, arm: str, rate: float) -> dict:
    """The row of a run."""
    begin, out = WORK / f"start-{start}", WORK / f"{start}-{arm}-{rate:g}"
    if not (begin / "summary.json").exists():
        run_flags(START, start, begin)
    row = {"start": start, "arm": arm, "rate": rate}
    try:
        algo = f"{SAMPLER[arm][1]} --rollout-dtype bfloat16" if arm in SAMPLER else f"--algo {arm}"
        summary = run_flags(f"{algo} --init {begin} {ARM} --lr {rate}", start, out)
    except UserError:  # probabilities that are not finite
        return row | {"collapsed": True} | versions()
    batches = [json.loads(text) for text in open(out / "metrics.jsonl")]
    batches = [batch for batch in batches if "reward_mean" in batch]

    def mean(name, part=slice(None)):
        return statistics.fmean([batch[name] for batch in batches[part] if name in batch] or [math.nan])

    first, late = (mean("reward_mean", part) for part in (slice(WINDOW), slice(-WINDOW, None)))
    row |= {"area": mean("reward_mean"), "first_reward": first, "late_reward": late}
    row |= {"collapsed": late < COLLAPSED * first}
    row |= {"accuracy": summary["accuracy"], "before": summary["before_accuracy"]}
    row |= {"gamma": mean("rollout_gamma_mean"), "kept_routes": 1 - mean("moved_anywhere")}
    row |= {"kept_decisions": mean("agreement"), "updates": mean("updates")}
    row |= {name: mean(name) for name in ("entropy", "router_entropy", "clip_share", "load_max")}
    row |= {name: mean(name) for name in ("engine_gap", "update_gap") if arm in SAMPLER}
    shutil.rmtree(out)
    return row | versions()


def differences(rows: list[dict], arm: str, control: str, figure: str = "area", rates=RATES) -> list[float]:
    """arm less control in each start that has both at every rate, the mean over the rates."""
    of = {(r["start"], r["rate"], r["arm"]): r[figure] for r in rows if r["start"] and figure in r}
    pairs = [[(of.get((s, x, arm)), of.get((s, x, control))) for x in rates] for s in sorted({s for s, *_ in of})]
    whole = [found for found in pairs if None not in itertools.chain(*found)]
    return [statistics.fmean(a - b for a, b in found) for found in whole]


def report(rows: list[dict]) -> str:
    """All of results/e3.md."""
    about = "Made by `python results/moving_routes.py report` from `e3.csv`; see PLAN.md. Start 0 is for tuning."
    lines = ["# E3", "", about]
    for rate in RATES:
        lines += ["", f"## Learning rate {rate:g}", "", *table_at(rows, rate, LABELS, FIGURES)]
    lines += ["", "## Paired within a start", ""]
    rates, compared = [f"at {r:g}" for r in RATES], ((), ("area", RATES[:1]), ("area", RATES[1:]), ("accuracy",))
    lines += heading("arm", "less", "starts", "`area`, mean of both rates", *rates, "`accuracy`", "collapses")
    for arm, control in PAIRS:
        parts = [differences(rows, arm, control, *of) for of in compared]
        if len(parts[0]) > 1:
            cells = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(*interval(part)) for part in parts]
            lines.append(line(f"`{arm}`", f"`{control}`", len(parts[0]), *cells, mcnemar(rows, arm, control)))
    lines += ["", *(f"- {text}" for text in verdicts(rows)), *sampler_lines(rows)]
    return "\n".join(lines) + "\n"


def table_at(rows: list[dict], rate: float, labels: dict[str, str], figures) -> list[str]:
    arms = [{"arm": arm, "about": label} for arm, label in labels.items()]
    return means_table([r for r in rows if r["rate"] == rate and r["start"]], arms, figures)


def sampler_lines(rows: list[dict]) -> list[str]:
    """The table with the bfloat16 sampler: no verdicts, differences from GRPO with the same sampler."""
    lines = ["", f"## A sampler in bfloat16, learning rate {RATES[0]:g} (exploratory)", ""]
    lines += table_at(rows, RATES[0], {arm: label for arm, (label, _) in SAMPLER.items()}, ENGINE)
    lines.append("")
    for arm, control in [("bf16", "grpo"), *((arm, "bf16") for arm in SAMPLER if arm != "bf16")]:
        found = [differences(rows, arm, control, figure, RATES[:1]) for figure in ("area", "accuracy")]
        area, accuracy = ("{:+.4f} [{:+.4f}, {:+.4f}]".format(*interval(values)) for values in found)
        lines.append(f"- `{arm}` less `{control}`, {len(found[0])} starts: `area` {area}, `accuracy` {accuracy}.")
    return lines


def mcnemar(rows: list[dict], arm: str, control: str) -> str:
    """Starts and rates in which one of the two alone collapsed, and the exact two-sided p."""
    of = {(r["start"], r["rate"], r["arm"]): r["collapsed"] for r in rows if r["start"]}
    pairs = [(of[s, x, arm], of[s, x, control]) for s, x, a in of if a == arm and (s, x, control) in of]
    alone = [sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)]
    p = stats.binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0
    return f"{alone[0]} against {alone[1]}, p {p:.2f}"


def verdicts(rows: list[dict]) -> list[str]:
    """PLAN.md's: the interval of the difference in area, mean of both rates, beside the noise of a run."""
    found = []
    for arm, control in PAIRS[:-1]:
        if len(values := differences(rows, arm, control)) > 1:
            _, low, high = interval(values)
            said = "is ahead" if low > 0 else "is behind" if high < 0 else "no difference is seen"
            found.append(f"{LABELS[arm]} less {LABELS[control]}: **{said}** ({len(values)} starts).")
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("report", nargs="?", choices=("report",))
    p.add_argument("--starts", type=int, nargs="+", default=range(1, 6), help="seeds (default 1 to 5)")
    p.add_argument("--arms", nargs="+", choices=(*LABELS, *SAMPLER), default=LABELS, help="default: all but bf16's")
    p.add_argument("--rates", type=float, nargs="+", default=RATES)
    args = p.parse_args()
    if args.report:
        (FOLDER / "e3.md").write_text(report(read_rows("e3")))
        return
    torch.set_num_threads(1)
    for arm, loss in {"rais-yoked": yoked_loss, "gmpo-again": gmpo_again_loss}.items():
        train.METHODS[arm], train.OPTIONS[arm] = loss, train.options_of(loss)
    for start, rate, arm in itertools.product(args.starts, args.rates, args.arms):
        if (start, arm, rate) not in {(r["start"], r["arm"], r["rate"]) for r in read_rows("e3")}:
            add_row("e3", run_arm(start, arm, rate))


if __name__ == "__main__":
    main()
