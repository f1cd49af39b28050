"""The tables, verdicts and pictures of E1 and E2, from the rows of headroom.py and nothing else.

    python results/headroom_report.py       results/e1.md, real-router.png, smollm2.png

Start 0 chose the rates and stands in no figure; the rows of every other start are paired.
"""

import itertools
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import matplotlib
import torch

from results.headroom import CONFIRM, FREE_ARMS, LABELS, RATES, chosen_rates, figures_of
from results.rows import FOLDER, heading, interval, line, read_rows, sign_flip_p
from support.pictures import new_figure

CONFIRMED = ("exact", "ratio-uniform-log", "ratio-uniform", "erl", "random-credit")  # arms of PLAN.md's confirmation
SHOWN = ("nats", "regret", "random_cost", "mrr", "entropy", "max_load")
DRAWN = ("erl", "ratio-uniform", "draw-router", "random-credit", "constant")
PAIRS = (("erl", "random-credit"), ("ratio-uniform", "erl"), ("draw-router", "erl"), ("erl-again", "erl"))


def shares(rows) -> tuple[dict[tuple, dict], dict]:
    """(arm, rate) -> start -> share of the headroom recovered; start -> headroom, both ends at their chosen rates."""
    nats, rates = figures_of(rows, "nats"), chosen_rates(rows)
    none = nats["none", rates["none"]]
    headroom = less(none, nats["exact", rates["exact"]])
    return {k: {s: gain / headroom[s] for s, gain in less(none, x).items()} for k, x in nats.items()}, headroom


def less(a: dict, b: dict) -> dict:
    """Paired differences, by start."""
    return {start: a[start] - b[start] for start in a if start in b}


def ends(values: dict) -> tuple[float, float, float]:
    return interval(list(values.values()))


def show(values: dict) -> str:
    """The interval; of five starts or more, where a gap is wider than half the range, a sign-flip test of 0 too."""
    text, ordered = "{:.3f} [{:.3f}, {:.3f}]".format(*ends(values)), sorted(values.values())
    two_humps = max(b - a for a, b in itertools.pairwise(ordered)) > (ordered[-1] - ordered[0]) / 2
    return text + (f" (two humps, p {sign_flip_p(ordered):.3f})" if two_humps and len(ordered) > 4 else "")


def free_lines(title: str, rows: list[dict], headroom: float | None) -> list[str]:
    """The section of (c) or `prob`: nats against no router learning and random credit; with a headroom, verdicts.

    What exact credit would still gain says nothing with `prob`, where an expert's weight would change with the router.
    """
    of = {figure: {arm: x for (arm, _), x in figures_of(rows, figure).items()} for figure in (*SHOWN, "left")}
    starts = set.intersection(*(set(of["nats"].get(arm, ())) for arm in FREE_ARMS))  # with every arm
    of = {f: {arm: {s: x[s] for s in sorted(starts)} for arm, x in arms.items()} for f, arms in of.items()}
    nats, verdicts, rates = of["nats"], [], {r["rate"] for r in rows if r["start"]}
    about = f"New text, all weights learn, in {len(starts)} starts; routers' rate {', '.join(map(str, rates))}."
    lines = ["", f"## {title}", "", about, ""]
    lines += heading("arm", "gain over `none`", "gain over random credit", *(f"`{figure}`" for figure in of))
    for arm in FREE_ARMS:
        name, gradient = f"{arm} -".split()[:2]
        gains = [less(nats[c], nats[arm]) for c in ("none", f"random-credit {gradient}") if c in nats and c != arm]
        cells = [show(gain) for gain in gains] + ["-"] * (2 - len(gains))
        lines.append(line(f"`{arm}`", *cells, *(f"{statistics.fmean(x[arm].values()):.3f}" for x in of.values())))
        if name == "erl" and headroom is not None:
            holds = min(ends(gain)[1] for gain in gains) > 0 and max(of["max_load"][arm].values()) <= 0.9
            said = "holds" if holds else "is refuted" if ends(gains[0])[2] < headroom / 10 else "is not decided"
            verdicts.append(f"- `{arm}`: ERL's claim **{said}** by the plan's rule.")
    again = less(nats["erl router"], nats["erl-again router"])
    return [*lines, "", *verdicts, f"- `erl-again router` over `erl router`, the noise of a run: {show(again)} nats."]


def erl_verdict(rows: list[dict]) -> str:
    """Does ERL recover more than a quarter, and more than random credit, without crowding one expert?"""
    rates, share = chosen_rates(rows), shares(rows)[0]
    erl, random = (share[arm, rates[arm]] for arm in ("erl", "random-credit"))
    even = max(figures_of(rows, "max_load")["erl", rates["erl"]].values()) <= 0.9
    holds = ends(erl)[1] > 0.25 and ends(less(erl, random))[1] > 0 and even
    verdict = "holds" if holds else "is refuted here" if ends(erl)[2] < 0.1 else "is not decided here"
    return f"- ERL's claim **{verdict}** ({len(erl)} starts)."


def confirmation_lines(title: str, rows: list[dict]) -> list[str]:
    """The claims of PLAN.md's confirmation, in their order: one is confirmed only if those before it are."""
    starts = set.intersection(*({r["start"] for r in rows if r["arm"] == arm} for arm in ("none", *CONFIRMED)))
    rows = [r for r in rows if r["start"] in starts and (r["start"] == 0 or r["start"] >= CONFIRM)]
    rates, (share, headroom) = chosen_rates(rows), shares(rows)
    of = {arm: share[arm, rates[arm]] for arm in CONFIRMED}
    check = "the check holds" if ends(headroom)[0] >= 0.03 and len(headroom) >= 4 else "the check fails"
    found = f"Learnable headroom in {len(headroom)} starts: {show(headroom)} nats: {check}"
    about = f"{found}. At the rates that start 0 chose:"
    lines = ["", f"## {title}", "", about, "", *heading("arm", "what it is", "rate", "share recovered")]
    lines += [line(f"`{arm}`", LABELS[arm], f"{rates[arm]:g}", show(x)) for arm, x in of.items()]
    log, fit, erl, random = (of[arm] for arm in CONFIRMED[1:])
    claims = {"The ratio that fits recovers more than ERL": less(fit, erl)}
    claims |= {"With the gain in place of its sign it recovers more than without": less(log, fit)}
    claims |= {"It then recovers .9 or more; its share less .9": {start: x - 0.9 for start, x in log.items()}}
    so_far, lines = True, [*lines, ""]
    for claim, gain in claims.items():
        so_far = so_far and ends(gain)[1] > 0
        lines.append(f"- {claim}: {show(gain)}: **{'confirmed' if so_far else 'not confirmed'}**.")
    return [*lines, erl_verdict(rows), f"- Share of `erl` less `random-credit`: {show(less(erl, random))}."]


def router_lines(title: str, rows: list[dict], picture: str) -> list[str]:
    """The section of a setting where the last router is trained alone: shares, verdicts, then shares by rate."""
    rates, of = chosen_rates(rows), {figure: figures_of(rows, figure) for figure in SHOWN}
    share, headroom = shares(rows)
    about = f"Learnable headroom in {len(headroom)} starts: {show(headroom)} nats. At chosen rates:"
    lines = ["", f"## {title}", "", about, ""]
    lines += heading("arm", "what it is", "rate", "share recovered", *(f"`{figure}`" for figure in SHOWN))
    for key in rates.items():
        cells = [f"{statistics.fmean(of[figure][key].values()):.3f}" for figure in SHOWN]
        lines.append(line(f"`{key[0]}`", LABELS[key[0]], f"{key[1]:g}", show(share[key]), *cells))
    lines += ["", erl_verdict(rows)]
    for arm, other in PAIRS:
        difference = less(share[arm, rates[arm]], share[other, rates[other]])
        lines.append(f"- Share of `{arm}` less `{other}`: {show(difference)}.")
    for key in (arm for arm in rates.items() if arm[0] in ("constant", "random-credit")):
        mrr, mean = statistics.fmean(of["mrr"][key].values()), ends(share[key])[0]
        verdict = "MRR is no evidence of credit" if mrr >= 0.17 and mean < 0.1 else "no verdict on MRR from it"
        lines.append(f"- `{key[0]}`: MRR {mrr:.3f}, share {mean:.3f}: {verdict}.")
    lines += ["", f"![share recovered and entropy against the rate]({picture})", ""]
    lines += ["Share recovered at every rate (exploratory), of the starts that ran it:", ""]
    lines += heading("arm", *(f"{rate:g}" for rate in RATES))
    cells = {f"`{arm}`": [share.get((arm, rate), {}) for rate in RATES] for arm in rates}
    for arm, other in PAIRS:
        pairs = ((share.get((arm, rate), {}), share.get((other, rate), {})) for rate in RATES)
        cells[f"`{arm}` less `{other}`"] = [less(*pair) for pair in pairs]
    return lines + [
        line(name, *(f"{show(x)}, {len(x)} starts" if len(x) > 1 else "-" for x in row)) for name, row in cells.items()
    ]


def first_starts(rows: list[dict], setting: str) -> list[dict]:
    return [r for r in rows if r["setting"] == setting and r["start"] < CONFIRM]


def report(rows: list[dict], checks: list[dict], free: list[dict], prob: list[dict]) -> str:
    """All of results/e1.md."""
    about = "Made by `python results/headroom_report.py` from `checks.csv` and `e1*.csv`; see PLAN.md."
    columns = [c for c in checks[0] if c not in ("torch", "cpu")]
    lines = ["# E1 and E2", "", about, "", "## Checks", "", *heading(*(f"`{c}`" for c in columns))]
    for r in checks:
        lines.append(line(*(f"{r[c]:.4g}" if type(r.get(c)) is float else r.get(c, "-") for c in columns)))
    of = {setting: first_starts(rows, setting) for setting in ("a-new", "real")}
    lines += router_lines("(a-new)", of["a-new"], "real-router.png")
    lines += free_lines("(c)", free, statistics.fmean(shares(of["a-new"])[1].values()))
    lines += free_lines("(c) with the gate `prob` (exploratory)", prob, None) if prob else []
    lines += router_lines("E2: SmolLM2-135M", of["real"], "smollm2.png")
    lines += confirmation_lines("E2 on other windows: the confirmation", [r for r in rows if r["setting"] == "real"])
    return "\n".join(lines) + "\n"


def draw_shares(rows: list[dict], path: pathlib.Path):
    """Share recovered and entropy against the rate."""
    matplotlib.rcParams["font.size"] = 13
    figure, titles = new_figure(4.6, 12), ("share of the learnable gain recovered", "router entropy (nats)")
    axes = figure.subplots(1, 2)
    for axis, title, figures in zip(axes, titles, (shares(rows)[0], figures_of(rows, "entropy")), strict=True):
        for i, (arm, style) in enumerate(zip(DRAWN, "o- s- ^- o-- s--".split(), strict=True)):
            middle, low, high = torch.tensor([ends(figures[arm, rate]) for rate in RATES]).T
            beside = [rate * 1.06 ** (i - 2) for rate in RATES]
            axis.errorbar(beside, middle, (middle - low, high - middle), fmt=style, capsize=3, label=LABELS[arm])
        axis.set(xscale="log", xlabel="learning rate of the router", title=title)
        axis.axhline(0, color="gray", linewidth=0.8)
    axes[0].axhline(1, color="gray", linestyle=":", label="exact credit, best rate")
    where = {"loc": "outside lower center", "ncol": 3, "title": "bars: 95 % intervals; dashed: controls"}
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, **where)
    figure.savefig(path, dpi=110)


def main():
    rows, *others = map(read_rows, ("e1", "checks", "e1-free", "e1-prob"))
    (FOLDER / "e1.md").write_text(report(rows, *others))
    for setting, name in {"a-new": "real-router.png", "real": "smollm2.png"}.items():
        draw_shares(first_starts(rows, setting), FOLDER / name)


if __name__ == "__main__":
    main()
