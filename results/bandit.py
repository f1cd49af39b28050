"""ERL's loss on a bandit of eight arms: what the ratio to the router does when experts are drawn uniformly.

    python results/bandit.py        half a minute: results/bandit.csv and results/bandit.png

Every row of a batch is a router of its own, without context, with eight experts of unknown worth. A step compares three
random experts with the router's own one, as eq. 10 does; each look at an expert is noisy. The loss is erl.py's.
"""

import csv
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import matplotlib
import torch

from erl import Pass, erl_objective, explore
from results.rows import interval
from support.controls import constant, random_expert
from support.tasks import rng

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = pathlib.Path(__file__).parent
E, SEEDS, ROUTERS, STEPS = 8, 10, 64, 1000
NOISE = 2.0  # standard deviation of one look at an expert, whose worth is N(0, 1)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
VARIANTS = {  # name: options of explore, options of erl_objective, control
    "ERL as written": ({}, {}, None),
    "ratio to the uniform draw": ({}, {"ratio": "uniform"}, None),
    "experts drawn from the router": ({"draw": "router"}, {}, None),
    "ERL, random experts credited": ({}, {}, random_expert),
    "ERL, a constant advantage": ({}, {}, lambda paths, _: constant(paths)),
}


def learn(variant: str, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of routers whose choice is the best expert, and mean entropy in nats, of every seed: [SEEDS] each."""
    exploring, objective, control = VARIANTS[variant]
    worth = torch.cat([torch.randn(ROUTERS, E, generator=rng(seed, "worth")) for seed in range(SEEDS)])  # [B, E]
    logits = torch.cat([0.1 * torch.randn(ROUTERS, E, generator=rng(seed, "start")) for seed in range(SEEDS)])
    logits.requires_grad_()
    mask = torch.ones(len(worth), 1, dtype=torch.bool)  # T = 1
    for step in range(STEPS):
        generator = rng("step", step)

        def forward(routes, generator=generator):
            experts = logits.argmax(-1)[:, None] if routes is None else routes[0][:, 0, 0]  # [B or m * B, 1]
            copies = len(experts) // len(worth)
            seen = worth.repeat(copies, 1).gather(1, experts)
            seen = seen + NOISE * torch.randn(seen.shape, generator=generator)
            return Pass(seen, logits.log_softmax(-1).repeat(copies, 1)[:, None, None], logits.new_zeros(()))

        paths = explore(forward, mask, 1, alpha=1.0, generator=generator, **exploring)
        if control:
            paths = control(paths, generator)
        for loss, _ in erl_objective(forward, paths, delta=1.0, **objective):
            (gradient,) = torch.autograd.grad(loss * len(worth), logits)  # the loss is a mean over the routers
            logits.data -= rate * gradient
    log_p = logits.detach().log_softmax(-1)
    right = (log_p.argmax(-1) == worth.argmax(-1)).float()
    entropy = -(log_p.exp() * log_p).sum(-1)
    return right.view(SEEDS, -1).mean(1), entropy.view(SEEDS, -1).mean(1)


def draw_panels(path, rates, label: str, titles, panels, level: tuple[float, str]):
    """Two panels, each a dict name -> [(mean, low, high)] at the rates; level: a line in the first, and what it is."""
    plt.rcParams["font.size"] = 13
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for axis, title, curves in zip(axes, titles, panels, strict=True):
        for i, ((name, points), style) in enumerate(zip(curves.items(), "o- s- ^- o-- s--".split(), strict=True)):
            middle, low, high = torch.tensor(points).T
            reach, beside = torch.stack((middle - low, high - middle)), [rate * 1.06 ** (i - 2) for rate in rates]
            axis.errorbar(beside, middle, reach, fmt=style, capsize=3, label=name)
        axis.set(xscale="log", xlabel=label, title=title)
        axis.axhline(0, color="gray", linewidth=0.8)
    axes[0].axhline(level[0], color="gray", linestyle=":", label=level[1])
    where = {"loc": "outside lower center", "ncol": 3, "title": "bars: 95 % intervals; dashed: controls"}
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, **where)
    figure.savefig(path, dpi=110)


def main():
    results = {(name, rate): learn(name, rate) for name in VARIANTS for rate in RATES}
    with open(FOLDER / "bandit.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["variant", "rate", "seed", "right", "entropy", "steps", "noise", "torch"])
        for (name, rate), figures in results.items():
            for seed, (right, entropy) in enumerate(zip(*map(torch.Tensor.tolist, figures), strict=True)):
                table.writerow([name, rate, seed, f"{right:.4f}", f"{entropy:.4f}", STEPS, NOISE, torch.__version__])
    panels = [{v: [interval(results[v, rate][which].tolist()) for rate in RATES] for v in VARIANTS} for which in (0, 1)]
    titles = "share of right experts", "router entropy (nats)"
    draw_panels(FOLDER / "bandit.png", RATES, "learning rate", titles, panels, (1 / E, "chance"))


if __name__ == "__main__":
    main()
