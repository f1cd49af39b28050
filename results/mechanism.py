"""The experiments that show what moves ERL's routers. Each run adds a row to results/NAME.csv.

    python -m results.mechanism erl-still --starts 104 105 106
    python -m results.mechanism erl-text --starts 110 --arms lm erl

erl-text: a dense byte model is upcycled and trained on. erl-domains: each expert is trained on one of eight alphabets,
then the routers are drawn anew, so that a right expert exists. erl-still: the same, and all but the routers stays
nearly as it is. What has a row is not run again, a run that was stopped goes on, and other starts can run beside it.
Arms that are not here have rows, with the commit whose code made them.
"""

import argparse
import datetime
import fcntl
import json
import pathlib
import platform
import shutil
import time
from types import SimpleNamespace

import torch

import eval_routing
import train
from erl import explore
from moe import Routes, token_log_probs
from results.rows import add_row, parse_cell, read_rows, read_table, versions
from support.checkpoints import find_checkpoint, initial_model, load_model
from support.controls import constant, level, random_expert
from support.evaluation import text_windows
from support.tasks import load_task, rng

WORK = pathlib.Path("runs", "results")
WINDOWS = 30  # of the test split, ranked; a window costs half a second
DOMAINS = 8

# --------------------------------------------------- Variants: functions that train.run takes in the place of its own


def controlled(control) -> dict:
    """ERL whose paths pass through control(paths, generator)."""

    def exploring(forward, mask, top_k, *, generator, **options):
        return control(explore(forward, mask, top_k, generator=generator, **options), generator)

    return {"explore": exploring}


def lm_pass(model, batch, args, report: bool, routes=None):
    """train.py's own pass of the MoE, along imposed routes if there are some. -> loss, metrics, Routing"""
    hidden = model.stem(batch.tokens[:, :-1])
    features, routing = model.branch(hidden, routes=routes)
    passed = SimpleNamespace(branch=lambda *_, **__: (features, routing), wte=model.wte)
    original, metrics = train.original_pass(passed, hidden, batch, args, None, report)
    return original.loss, metrics, routing


def mean_log_p_losses(model, batch, args, step, report):
    """MoE's loss and 0.065 times the mean of log P over the experts, which is what ERL's loss is on average over the
    uniform draw, with delta 0.5 and an advantage of -0.13 everywhere."""
    loss, metrics, routing = lm_pass(model, batch, args, report)
    yield loss + 0.065 * routing.logits.log_softmax(-1)[batch.routed].mean(), metrics


def domains_of(rows: int, step: int = 0) -> torch.Tensor:
    """[rows], the alphabets of a step's rows: in turn."""
    return (step * rows + torch.arange(rows)) % DOMAINS


def task_in_alphabets(args, context: int, generative: bool):
    """One text in eight alphabets: rows are written in them in turn, and so are the windows of the held-out texts.

    The last target of a window is the first byte of the next one, so 1 of 256 predictions is hopeless, for every arm.
    """
    task = load_task(args, context, generative)
    table, plain = torch.arange(task.tokenizer.vocab_size).repeat(DOMAINS, 1), task.batch
    for domain in range(1, DOMAINS):  # the first alphabet is that of the text
        table[domain, :256] = torch.randperm(256, generator=rng("cipher", domain))

    def batch(step):
        drawn = plain(step)
        return drawn._replace(tokens=table[domains_of(len(drawn.tokens), step)[:, None], drawn.tokens])

    def write(text):
        domain = torch.arange(len(text.tokens)) // context % DOMAINS
        return text._replace(tokens=table[domain, torch.from_numpy(text.tokens.astype("int64"))].numpy())

    batch.per_epoch = plain.per_epoch
    return task._replace(batch=batch, held_out={name: write(text) for name, text in task.held_out.items()})


def routes_by_row(experts: torch.Tensor, T: int, config) -> Routes:
    """Routes [B, T, L, K] that send all of row b to experts[b]."""
    experts = experts.view(-1, 1, 1, 1).expand(-1, T, len(config.moe_blocks), config.top_k)
    return Routes(experts, torch.ones_like(experts[..., 0], dtype=torch.bool))


def one_expert_a_domain(model, batch, args, step, report):
    """The start of erl-domains: expert e of every layer sees alphabet e alone."""
    B, T = batch.mask.shape
    yield lm_pass(model, batch, args, report, routes_by_row(domains_of(B, step), T, model.config))[:2]


def with_new_routers(args, tokenizer, dense_first):
    model, target = initial_model(args, tokenizer, dense_first)
    for name, p in model.named_parameters():
        if name.endswith("router.weight"):
            torch.nn.init.normal_(p, std=0.1, generator=rng(args.seed, "new routers", name))
    return model, target


# ------------------------------------------------------------------------------------------------------ The experiments


def arms_of(prefix: str, flags: str) -> dict[str, tuple[str, dict]]:
    """ERL and its controls: name -> flags, hooks of train.run."""
    return {
        prefix: (flags, {}),
        f"{prefix}-random": (flags, controlled(random_expert)),
        f"{prefix}-constant": (flags, controlled(lambda paths, _: constant(paths, -0.13))),
        f"{prefix}-level": (flags, controlled(lambda paths, _: level(paths))),
        f"{prefix}-weighted": (f"{flags} --ratio uniform", {}),
        f"{prefix}-weighted-random": (f"{flags} --ratio uniform", controlled(random_expert)),
        f"{prefix}-drawn": (f"{flags} --draw router", {}),
    }


LM, MEAN_LOG_P = {"lm": ("--algo lm", {})}, {"mean-log-p": ("--algo lm", {"lm_losses": mean_log_p_losses})}
ALL, ROUTER = arms_of("erl", "--algo erl --erl-grad all"), arms_of("erl-router", "--algo erl --erl-grad router")
ALL["erl-expert-random"] = ALL.pop("erl-random")
LEARN_DOMAINS = {"load_task": task_in_alphabets, "lm_losses": one_expert_a_domain}
NEW_ROUTERS = {"load_task": task_in_alphabets, "initial_model": with_new_routers}


TEXT = "--dataset pydocs --batch-size 4 --eval-samples 40 --device cpu"
DENSE = f"{TEXT} --algo dense --steps 400 --eval-every 400"
DOMAINS_LEARNED = f"{TEXT} --algo lm --pretrain-steps 0 --lr 1e-3 --steps 600 --eval-every 600"
SHORT = f"{TEXT} --steps 120 --eval-every 40 --checkpoint-every 120"
STILL = f"{TEXT} --steps 360 --eval-every 120 --checkpoint-every 360 --lr 3e-6 --router-lr-factor 1000"
EXPERIMENTS = {  # flags of the start, flags of every arm, arms, hooks of the start, hooks of every arm
    "erl-text": (DENSE, SHORT, LM | MEAN_LOG_P | ALL | ROUTER, {}, {}),
    "erl-domains": (DOMAINS_LEARNED, SHORT, LM | ALL | ROUTER, LEARN_DOMAINS, NEW_ROUTERS),
    "erl-still": (DOMAINS_LEARNED, STILL, LM | ROUTER, LEARN_DOMAINS, NEW_ROUTERS),
}

# -------------------------------------------------------------------------------------------------------------- Running


@torch.no_grad()
def right_experts(model, windows) -> dict:
    """Of 64 windows: the share of decisions for the expert of the window's alphabet, and the perplexity if all were."""
    tokens = torch.stack([tokens for tokens, _ in windows[:64]])  # [64, T + 1]
    right = routes_by_row(domains_of(len(tokens)), tokens.shape[1] - 1, model.config)
    share = (model(tokens[:, :-1])[1].experts == right.experts).float().mean()
    features, _ = model(tokens[:, :-1], routes=right)
    nll = -token_log_probs(features, model.wte.weight, tokens[:, 1:]).mean()
    return {"right_expert": share.item(), "right_route_perplexity": nll.exp().item()}


def figures_of(args, summary: dict, alphabets: bool) -> dict:
    """What a row says of a finished run: its scores, right experts, and ranks."""
    figures = {k: v for k, v in summary.items() if isinstance(v, (int, float)) and k not in ("seed", "steps")}
    if args.algo == "dense":
        return figures
    (model, _), samples = load_model(find_checkpoint(args.out)), []
    task = (task_in_alphabets if alphabets else load_task)(args, model.config.context, False)
    windows = list(text_windows(task.held_out["test"].tokens, model.config.context))
    figures |= right_experts(model, windows) if alphabets else {}
    whole = [window for window in windows if window[1].all()]
    for i, chosen in enumerate(torch.randperm(len(whole), generator=rng(0, "samples"))[:WINDOWS]):
        routes = eval_routing.draw_routes(model, model.config.context, 0, "routes", i)
        samples.append(eval_routing.score_text(model, whole[chosen], routes))
    ranks = eval_routing.figures(samples, text=True)
    load = [share for layer in ranks["expert_load"] for share in layer]
    figures |= {k: v for k, v in ranks.items() if isinstance(v, (int, float))}
    figures |= {"load_max": max(load), "load_min": min(load), "windows": figures.pop("samples")}
    return figures | {f"perplexity_at_{alpha}": score for alpha, score in ranks["robustness"].items()}


def done_of(name: str) -> set[tuple[str, int]]:
    """(arm, start) of the rows that are there."""
    return {(row["arm"], row["start"]) for row in read_rows(name) if not row["again"]}


def run_one(name: str, arm: str, start: int):
    """Train one run, or go on with it, and add its row."""
    (begin, then, arms, hooks, arm_hooks), out = EXPERIMENTS[name], WORK / name / str(start) / arm
    if arm != "start":
        begin, hooks = f"{then} {arms[arm][0]} --init {out.parent / 'start'}", arm_hooks | arms[arm][1]
    if find_checkpoint(str(out)):
        begin = "--resume"
    else:
        shutil.rmtree(out, ignore_errors=True)
    args, begun = train.parse(f"{begin} --seed {start} --out {out}".split()), time.process_time()
    row = {"arm": arm, "start": start, "again": 0, "python": platform.python_version()} | versions()
    figures = figures_of(args, train.run(args, **hooks), bool(arm_hooks))
    row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row["cpu_seconds"] = round(time.process_time() - begun, 1)
    shared = {r["setting"]: parse_cell(r[name]) for r in read_table("settings") if name in r}
    settings = json.loads((out / "config.json").read_text())
    settings = {f"--{k.replace('_', '-')}": v for k, v in settings.items() if k not in ("out", "init", "data_dir")}
    with open(WORK / "lock", "w") as lock:  # another process may add a row of another start
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (arm, start) not in done_of(name):  # the first row of a start whose model had to be trained anew stays
            add_row(name, row | {k: v for k, v in settings.items() if k not in shared or shared[k] != v} | figures)
    if arm != "start":
        shutil.rmtree(out)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=EXPERIMENTS)
    p.add_argument("--starts", type=int, nargs="+", default=range(100, 110), help="seeds (default 100 to 109)")
    p.add_argument("--arms", nargs="+", help="only these")
    args = p.parse_args(argv)
    known = EXPERIMENTS[args.name][2]
    if unknown := set(args.arms or ()) - set(known):
        p.error(f"{args.name} has no arm {', '.join(unknown)}: {', '.join(known)}")
    torch.set_num_threads(1)  # two processes with a thread each do more than one with two
    for start in args.starts:
        todo = [arm for arm in args.arms or known if (arm, start) not in done_of(args.name)]
        if todo and not (WORK / args.name / str(start) / "start" / "summary.json").exists():
            run_one(args.name, "start", start)
        for arm in todo:
            run_one(args.name, arm, start)


if __name__ == "__main__":
    main()
