"""What routing could bring, and what of it can be learnt: exact credit, and the checks of PLAN.md's E1.

    python results/headroom.py STARTS --data-dir DIR --starts 0-6     one row a start in results/headroom.csv

STARTS/N is a run folder of `train.py --algo lm` (PLAN.md says with which settings). With `moe_every = 2` the last block
holds experts and no attention follows it. So the expert that a token takes there changes the prediction of that token
alone, and one forward up to the last router, with all E experts applied to every token, gives the exact log p of the
next token under every expert.

B windows, T positions, D width, E experts, N = B * T tokens, R routes of a window.
"""

import argparse
import csv
import math
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import data
from erl import random_routes
from moe import GPT, SIZES, MoEConfig, Routes, feed_forward, router_losses, token_log_probs
from support.optimizer import learning_rate
from support.tasks import TextBatches, rng

FOLDER = pathlib.Path(__file__).parent
CONTEXT, WINDOWS, RANKED = 256, 400, 300  # of the test split: windows scored, windows whose routes are ranked
ALPHAS, EACH = (0.25, 0.5, 0.75), 33  # the 99 perturbed routes of a window (ERL table 4)
STEPS, BATCH = 600, 8
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def load_start(path) -> GPT:
    """The model of a run folder. Its sizes are read off its weights."""
    path = pathlib.Path(path, "checkpoint", "model.safetensors")
    weights = {name: w for name, w in load_file(path).items() if not name.startswith("optimizer.")}
    experts = next(len(w) for name, w in weights.items() if name.endswith("router.weight"))
    model = GPT(MoEConfig(vocab_size=len(weights["wte.weight"]), n_expert=experts, top_k=1, **SIZES["tiny"]))
    model.load_state_dict(weights)
    return model.eval()


def load_windows(name: str, split: str, data_dir, count: int = WINDOWS) -> Tensor:
    """[count, T + 1] windows of a split's bytes, evenly spread over it."""
    tokens = data.load_text(name, split, data.load_tokenizer("bytes"), data_dir=data_dir).tokens
    starts = [i * (len(tokens) - CONTEXT - 1) // count for i in range(count)]
    return torch.stack([torch.from_numpy(tokens[s : s + CONTEXT + 1].astype("int64")) for s in starts])


def training_batches(name: str, data_dir, batch_size: int, seed) -> TextBatches:
    tokens = data.load_text(name, "train", data.load_tokenizer("bytes"), data_dir=data_dir).tokens
    return TextBatches(tokens, CONTEXT, batch_size, seed)


def ngram_perplexity(train: np.ndarray, windows: Tensor, order: int) -> float:
    """A count of n-grams of bytes that backs off to shorter ones (Witten-Bell), on the predictions of the windows."""
    train, windows = train.astype(np.uint64), windows.numpy().astype(np.uint64)
    p = np.full((len(windows), CONTEXT), 1 / 257)
    for n in range(1, order + 1):
        grams = sum(train[i : len(train) - n + 1 + i] * 257 ** (n - 1 - i) for i in range(n))
        keys, counts = np.unique(grams, return_counts=True)
        contexts, first, kinds = np.unique(keys // 257, return_index=True, return_counts=True)  # keys are sorted
        totals = np.add.reduceat(counts, first)
        here = np.arange(n - 1, CONTEXT)  # predictions whose whole context lies in the window; index t predicts t + 1
        gram = sum(windows[:, here + 2 - n + i] * 257 ** (n - 1 - i) for i in range(n))
        at, of = np.searchsorted(keys, gram), np.searchsorted(contexts, gram // 257)
        at, of = at.clip(max=len(keys) - 1), of.clip(max=len(contexts) - 1)
        count, known = counts[at] * (keys[at] == gram), contexts[of] == gram // 257
        total, kind = totals[of] * known, kinds[of] * known
        p[:, here] = np.where(known, (count + kind * p[:, here]) / np.maximum(total + kind, 1), p[:, here])
    return float(np.exp(-np.log(p).mean()))


# ---------------------------------------------------------------------------------------------------------------------
# Exact credit in the last block
# ---------------------------------------------------------------------------------------------------------------------


class Decisions(NamedTuple):
    """What the last router decides on, and what each of its choices is worth."""

    inputs: Tensor  # [B, T, D], what the router reads
    log_probs: Tensor  # [B, T, E], log p of the next token under every expert


@torch.no_grad()
def last_decisions(model: GPT, tokens: Tensor) -> Decisions:
    """Exact counterfactuals of the last block's decisions, all else along the own route. tokens [B, T + 1], K = 1."""
    x, last = model.stem(tokens[:, :-1]), model.blocks[-1]
    for block in model.blocks[model.first_moe_block : -1]:
        x, _ = block(x)
    x = x + last.attn(last.ln_1(x))
    h = last.ln_2(x)  # [B, T, D]
    networks = zip(*(p.unbind(0) for p in last.mlp.experts.parameters()), strict=True)
    outputs = (model.ln_f(x + feed_forward(h, *network)) for network in networks)
    return Decisions(h, torch.stack([token_log_probs(y, model.wte.weight, tokens[:, 1:]) for y in outputs], -1))


def decisions_of(model: GPT, batches) -> Decisions:
    """Of many batches [B, T + 1], one after the other."""
    return Decisions(*map(torch.cat, zip(*(last_decisions(model, tokens) for tokens in batches), strict=True)))


def router_loss(logits: Tensor, coefficient: float = 1e-3) -> Tensor:
    """Balance and z losses of one router's logits [B, T, E]."""
    balance, z, _ = router_losses(logits[:, :, None], logits.argmax(-1)[:, :, None, None])
    return (coefficient * balance + 1e-3 * z).sum()


def exact_credit(logits: Tensor, log_probs: Tensor) -> Tensor:
    """-E_P log p(next token): ERL's reward without noise and without a sign. Both [B, T, E]."""
    return -(logits.softmax(-1) * log_probs).sum(-1).mean()


def train_router(weight: Tensor, decisions: Decisions, rate: float, loss_of) -> Tensor:
    """One pass over the decisions with a router weight [E, D] and loss_of(step, inputs, log_probs, weight)."""
    weight = weight.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=rate, betas=(0.9, 0.999), weight_decay=0.1)
    parts = list(zip(*(t.split(BATCH) for t in decisions), strict=True))
    for step, part in enumerate(parts):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(parts), rate)
        optimizer.zero_grad()
        loss_of(step, *part, weight).backward()
        optimizer.step()
    return weight.detach()


def none_loss(step, inputs, log_probs, weight):
    return router_loss(inputs @ weight.T)


def exact_loss(step, inputs, log_probs, weight):
    logits = inputs @ weight.T
    return router_loss(logits) + exact_credit(logits, log_probs)


def draw_router(start: int, draw: int, shape=(8, 128)) -> Tensor:
    return torch.randn(shape, generator=rng(start, "new last router", draw))  # of deviation 1; Decision of moe.py: 0.1


class Ranking:
    """MRR of own routes among 99 perturbed ones in the last layer, drawn once for all routers that are compared."""

    def __init__(self, log_probs: Tensor):
        self.log_probs, self.kept, self.forced = log_probs[:RANKED], [], []  # [B, T, E], B of [R, T], B of [R]
        alphas = torch.tensor(ALPHAS).repeat_interleave(EACH)  # [R]
        for i, worth in enumerate(self.log_probs):
            experts, forced = random_routes(len(alphas), CONTEXT, 1, 8, 1, alphas, generator=rng("ranked", i))
            values = worth.expand(len(alphas), -1, -1).gather(-1, experts[:, :, 0])[..., 0]  # [R, T]
            self.kept.append(~forced[..., 0])
            self.forced.append((values * forced[..., 0]).sum(-1))

    def mrr(self, experts: Tensor) -> float:
        """experts [.., T] of the windows."""
        total, own = 0.0, self.log_probs.gather(-1, experts[:RANKED, :, None])[..., 0]  # [B, T]
        for worth, kept, forced in zip(own, self.kept, self.forced, strict=True):
            gap = (
                forced + kept.float() @ worth - worth.sum()
            ) / CONTEXT  # [R], positive: the perturbed route is better
            better, tied = int((gap > 1e-6).sum()), int((gap.abs() <= 1e-6).sum())
            total += sum(1 / r for r in range(better + 1, better + tied + 2)) / (
                tied + 1
            )  # ties: as expected of chance
        return total / len(own)


def score_router(weight: Tensor, test: Decisions, ranking: Ranking) -> dict:
    """Of the last block's decisions along the own route, on the test windows."""
    logits = test.inputs @ weight.T
    log_p, experts = logits.log_softmax(-1), logits.argmax(-1)
    own = test.log_probs.gather(-1, experts[..., None])[..., 0]
    return {
        "nats": -own.mean().item(),
        "regret": (test.log_probs.amax(-1) - own).mean().item(),
        "random_cost": (own - test.log_probs.mean(-1)).mean().item(),
        "mrr": ranking.mrr(experts),
        "entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
        "max_load": experts.flatten().bincount(minlength=8).max().item() / experts.numel(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: GPT, windows: Tensor, random: bool = False) -> float:
    """Along the own routes, or with every decision of every layer replaced by a random expert."""
    total, L = 0.0, len(model.config.moe_blocks)
    for i, part in enumerate(windows.split(16)):
        drawn = random_routes(len(part), CONTEXT, L, 8, 1, 1.0, generator=rng("random routes", i))
        features, _ = model(part[:, :-1], routes=Routes(*drawn) if random else None)
        total -= token_log_probs(features, model.wte.weight, part[:, 1:]).sum().item()
    return math.exp(total / windows[:, 1:].numel())


def check(model: GPT, train: Decisions, test: Decisions, start: int, data_dir) -> dict:
    """The figures of PLAN.md's four checks, and whether they hold."""
    windows, text = load_windows("wikitext2", "test", data_dir), training_batches("wikitext2", data_dir, 1, 0).tokens
    ranking, settled = Ranking(test.log_probs), model.blocks[-1].mlp.router.weight.detach()

    def nats(weight, loss):
        return min(score_router(train_router(weight, train, r, loss), test, ranking)["nats"] for r in RATES)

    own, anew = score_router(settled, test, ranking), 0.1 * draw_router(start, 0)
    found = {"perplexity": perplexity(model, windows)}
    found |= {f"count_{n}_perplexity": ngram_perplexity(text, windows, n) for n in (4, 5)}
    found["random_routes_cost"] = perplexity(model, windows, random=True) / found["perplexity"] - 1
    found |= {"nats": own["nats"], "best_expert_gain": own["regret"], "mrr": own["mrr"]}
    found["settled_gain"] = own["nats"] - nats(settled, exact_loss)
    found |= {"nats_none": nats(anew, none_loss), "nats_exact": nats(anew, exact_loss)}
    found["headroom"] = found["nats_none"] - found["nats_exact"]
    below = found["perplexity"] < found["count_4_perplexity"]
    learnable = found["random_routes_cost"] >= 0.05 and found["settled_gain"] < 0.005 and found["headroom"] >= 0.03
    return found | {"holds": below and learnable}


def versions() -> dict:
    """What stands in every row beside its figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True).stdout
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "commit": commit.strip()}


def read_rows(path) -> list[dict]:
    return list(csv.DictReader(open(path))) if pathlib.Path(path).exists() else []


def add_rows(path, rows: list[dict]):
    new = not pathlib.Path(path).exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()} for row in rows)


def prepare(folder, start: int, data_dir) -> tuple[GPT, Decisions, Decisions]:
    """A start, and its last block's decisions on STEPS training batches and on the test windows, kept beside it."""
    folder = pathlib.Path(folder, str(start))
    model, kept = load_start(folder), folder / "decisions.pt"
    if not kept.exists():
        batch = training_batches("wikitext2", data_dir, BATCH, f"arms of {start}")
        train = decisions_of(model, (batch(step).tokens for step in range(STEPS)))
        test = decisions_of(model, load_windows("wikitext2", "test", data_dir).split(16))
        torch.save((tuple(train), tuple(test)), kept)
    return model, *(Decisions(*part) for part in torch.load(kept))


def parse(description):
    p = argparse.ArgumentParser(description=description)
    p.add_argument("folder", help="holds the starts' run folders, 0, 1, ...")
    p.add_argument("--data-dir", help="as train.py's")
    p.add_argument("--starts", default="0-6", help="first-last")
    p.add_argument("--csv", help="the file that rows are added to")
    args = p.parse_args()
    first, _, last = args.starts.partition("-")
    args.starts = range(int(first), int(last or first) + 1)
    return args


def main():
    args = parse(__doc__.splitlines()[0])
    path = args.csv or FOLDER / "headroom.csv"
    for start in args.starts:
        if str(start) not in [row["start"] for row in read_rows(path)]:
            found = check(*prepare(args.folder, start, args.data_dir), start, args.data_dir)
            add_rows(path, [{"start": start} | found | versions()])


if __name__ == "__main__":
    main()
