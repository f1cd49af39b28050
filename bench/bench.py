"""Benchmarks: what a mixture of experts, ERL's exploration, rollouts and the losses cost, beside their peers.

    python bench/bench.py step       the program's training step, dense and MoE; a MoE layer
    python bench/bench.py erl        the program's ERL step against its LM step
    python bench/bench.py rollout    generation against transformers' GPT-2
    python bench/bench.py loss       ERPO and RAIS at the paper's scale

The arms of a group take turns, A B C A B C ..., in one process, `--rounds` times after a warm-up. Every figure is a
median with its quartiles, and a ratio is taken within a round, so that it compares what ran side by side. On a CPU the
time is the process' CPU time with one thread, which a shared machine disturbs least; on CUDA it lies between two
events. Memory is what a step adds at its peak, on a CPU in a fresh process. `!` marks a goal that was missed.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from support.errors import begin_program  # noqa: E402

begin_program()  # before torch: it sets what torch reads when it is imported

# isort: split
import torch  # noqa: E402

import train  # noqa: E402
from erpo import erpo_loss  # noqa: E402
from moe import GPT, SIZES, MoEConfig  # noqa: E402
from rais import rais_loss  # noqa: E402
from support.arguments import number  # noqa: E402
from support.generation import generate  # noqa: E402
from support.optimizer import make_optimizer  # noqa: E402
from support.tasks import TextBatches, rng  # noqa: E402


class Arm(NamedTuple):
    name: str
    make: Callable  # () -> a function without arguments that does the work once
    goal: float | None = None  # of the ratio to the group's first arm, or of seconds (see Group.kind)


class Group(NamedTuple):
    title: str
    arms: list[Arm]
    kind: str  # "time" (goal: a ratio of at most), "speed" (of at least), or "seconds" (no ratio; at most)
    memory: bool = False


# ----------------------------------------------------------------------------------------------------------- Measuring


def seconds_of(f: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.process_time()
    f()
    return time.process_time() - begun


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    return tuple(statistics.quantiles(values, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def ratios_of(times: list[list[float]], kind: str) -> list[tuple[float, float, float]]:
    """Quartiles of (arm / first arm) within the rounds; of a speed the other way round."""
    sign = -1 if kind == "speed" else 1
    return [quartiles([(a / b) ** sign for a, b in zip(arm, times[0], strict=True)]) for arm in times]


def warmed_up(arm: Arm) -> Callable | None:
    """The arm's work after its first calls; None for a peer that does not run here."""
    try:
        f = arm.make()
        for _ in range(3):  # the first calls compile, or allocate
            f()
        return f
    except Exception as error:
        if not arm.name.startswith("transformers"):
            raise
        print(f"{arm.name} is left out: {error}", file=sys.stderr)
        return None


def measure(group: Group, place: int, args) -> list[dict]:
    """A row an arm: its name, quartiles of seconds and of the ratio, memory in GB, and whether its goal is met."""
    ready = [(i, arm, f) for i, arm in enumerate(group.arms) if (f := warmed_up(arm))]
    times = [[] for _ in ready]
    for _ in range(args.rounds):
        for (_, _, f), seconds in zip(ready, times, strict=True):
            seconds.append(seconds_of(f, args.device))
    rows = []
    for (i, arm, _), seconds, ratio in zip(ready, times, ratios_of(times, group.kind), strict=True):
        value, rows = (quartiles(seconds) if group.kind == "seconds" else ratio)[1], [*rows, {"name": arm.name}]
        met = arm.goal is None or (value >= arm.goal if group.kind == "speed" else value <= arm.goal)
        rows[-1] |= {"seconds": quartiles(seconds), "ratio": ratio, "goal": arm.goal, "met": met}
        if group.memory and sys.platform == "linux":
            rows[-1]["memory"] = peak_memory(arm.make(), args.device) if args.quick else memory_of(place, i, args)
    return rows


def show(group: Group, rows: list[dict]):
    sign, relative = (">=", "speed / first") if group.kind == "speed" else ("<=", "time / first")
    print(f"\n{group.title}\n{'':40}{'ms (quartiles)':>26}{relative:>20}{'goal':>10}{'GB':>8}")
    for row in rows:
        low, median, high = (1000 * x for x in row["seconds"])
        cells = f"{row['name']:40}{f'{median:.1f} ({low:.1f}-{high:.1f})':>26}"
        ratio = "" if group.kind == "seconds" else "{1:.2f} ({0:.2f}-{2:.2f})".format(*row["ratio"])
        goal = "" if row["goal"] is None else f"{sign} {row['goal']:g}" + ("" if row["met"] else " !")
        print(f"{cells}{ratio:>20}{goal:>10}" + (f"{row['memory']:8.2f}" if "memory" in row else ""), flush=True)


def memory_of(group: int, arm: int, args) -> float:
    """GB that one call adds at its peak, in a process that does nothing else."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    command = [sys.executable, os.path.abspath(__file__), *args.argv, "--memory-of", str(group), str(arm)]
    return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


def peak_memory(f: Callable, device: torch.device) -> float:
    f()  # what compilation and the optimizer allocate once is not the step's
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    with open("/proc/self/clear_refs", "w") as file:  # Linux: forget the peak of what was built before
        file.write("5")
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    f()
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return (peak - before) / 1e9


# ------------------------------------------------------------------------------------------- Models and training steps


def build(args, vocab_size: int, n_expert: int = 8, **changes) -> GPT:
    size = {**SIZES[args.model], "vocab_size": vocab_size, "n_expert": n_expert, **changes}
    if args.quick:
        size |= dict(n_layer=2, n_embd=32, n_head=2, context=32)
    return GPT(MoEConfig(**size), generator=rng(0, "model")).to(args.device)


def autocast(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16", cache_enabled=False)


class OneStep:
    """What train.train_text takes for support/run.py's Run: one step a call, nothing evaluated, written or saved."""

    def __init__(self):
        self.state, self.steps, self.total, self.metrics = SimpleNamespace(step=0), 10**8, 10**8, {}

    def steps_to_do(self):
        return [self.state.step]

    def count_update(self, norms: dict) -> dict:
        return norms

    def finish_step(self, tokens: int):
        self.state.step += 1

    def save_if_due(self, metrics: dict, optimizer):
        self.metrics = metrics

    def nothing(self, *_):
        pass

    evaluate_before = evaluate_if_due = log = nothing


def training_step(model: GPT, args, algo: str = "lm", **flags) -> Callable:
    """The program's own training step on random words: batch, losses, backward, norms and clip, AdamW."""
    flags |= {"algo": algo, "batch_size": args.batch_size, "dtype": args.dtype, "top_k": model.config.top_k}
    options = train.parse([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])
    words = torch.randint(model.config.vocab_size, (1 << 16,), generator=rng("words")).numpy()
    task = SimpleNamespace(batch=TextBatches(words, model.config.context, args.batch_size, 0))
    if args.compile:  # as train.py --compile does it
        model.stem, model.branch = torch.compile(model.stem), torch.compile(model.branch)
    optimizer, run, losses = make_optimizer(model, 0.1), OneStep(), getattr(train, f"{algo}_losses")

    def once():
        with autocast(args):
            train.train_text(model, task, options, run, optimizer, 1e-5, losses)
        return run.metrics

    return once


# ------------------------------------------------------------------------------ The benchmarks: each returns its groups


def step(args) -> list[Group]:
    """The program's LM step with models that differ in their MoE blocks alone, and one MoE layer on 2,048 tokens."""
    V = 257 if args.model == "tiny" else 50304

    def text(name, n_expert=8, goal=None):  # gate `prob`: what Switch does with K = 1
        return Arm(name, lambda: training_step(build(args, V, n_expert, gate="prob"), args), goal)

    def layer(name, n_expert, goal=None):
        def make():
            model = build(args, V, n_expert, n_layer=2)
            x = torch.randn(1, 256 if args.quick else 2048, model.config.n_embd, generator=rng("x")).to(args.device)
            module, x = model.blocks[1].mlp, x.requires_grad_()

            def once():
                with autocast(args):
                    out = module(x)[0]
                torch.autograd.grad(out.float().sum(), [x, *module.parameters()], allow_unused=True)

            return once

        return Arm(name, make, goal)

    steps = [text("dense", 1), text("ours, 8 experts", goal=0.92 if args.model == "tiny" else 0.8)]
    layers = [layer("8 experts", 8), layer("64 experts", 64, goal=1.6), layer("128 experts", 128)]
    return [
        Group(f"training step, {args.model}, V = {V}, top-1", steps, "speed"),
        Group("one MoE layer, forward and backward, 2,048 tokens", layers, "time"),
    ]


def erl(args) -> list[Group]:
    """The program's ERL step against its LM step, m = 3."""
    goals, groups = {257: (3.2, 1.9), 50257: (2.15, 1.85)}, []
    for V in (257, 50257):

        def arm(name, algo="erl", goal=None, V=V, **flags):
            return Arm(name, lambda: training_step(build(args, V), args, algo, **flags), goal)

        exact, router = goals[V] if args.model == "tiny" else (None, None)
        arms = [
            arm("LM step", "lm"),
            arm("ERL, gradient through all (all)", goal=exact, erl_grad="all"),
            arm("ERL, gradient of the routers (router)", goal=router, erl_grad="router"),
        ]
        groups.append(Group(f"ERL step, {args.model}, V = {V}, m = 3", arms, "time", memory=True))
    return groups


def rollout(args) -> list[Group]:
    """Sampled generation, every row to its full length. Ours also records log-probabilities, entropies and routes."""
    R, new, prompt = (4, 4, 8) if args.quick else (64, 64, 32)

    def group(V):
        prompts = torch.randint(V, (R, prompt), generator=rng("prompts"))

        def ours(n_expert):
            model, draw = build(args, V, n_expert), rng("rollout")

            def once():
                with autocast(args):  # an end token that no model writes: all rows keep their full length
                    generate(model, prompts.tolist(), max_new_tokens=new, end_token=-1, generator=draw)

            return once

        def theirs():
            from transformers import GPT2Config, GPT2LMHeadModel

            c = build(args, V).config
            size = dict(vocab_size=V, n_positions=c.context, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)
            model = GPT2LMHeadModel(GPT2Config(**size, eos_token_id=None, bos_token_id=None, pad_token_id=0))
            model, ids = model.to(args.device).eval(), prompts.to(args.device)
            how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0)

            def once():
                with autocast(args):
                    model.generate(ids, **how)

            return once

        arms = [Arm("transformers GPT-2", theirs), Arm("ours, dense", lambda: ours(1), 1.3 if V == 257 else 3.0)]
        arms.append(Arm("ours, 8 experts", lambda: ours(8), 1.0))
        return Group(f"rollout, {R} prompts of {prompt} x {new} new tokens, {args.model}, V = {V}", arms, "speed")

    return [group(V) for V in (257, 50257)]


def loss(args) -> list[Group]:
    """ERPO and RAIS, forward and backward, at ERPO's scale: seconds of one core."""
    B, T, L, K, E, G = (4, 64, 2, 2, 8, 4) if args.quick else (8, 14336, 48, 8, 128, 4)

    def inputs():
        draw, device = rng("loss"), args.device
        starts = torch.randint(E, (2, B, T, L, 1), generator=draw)
        experts = ((starts + 5 * torch.arange(K)) % E).to(torch.uint8).to(device)  # distinct: 5 does not divide E
        probs = torch.rand(2, B, T, L, K, generator=draw).softmax(-1).to(device)
        log_probs, old = -torch.rand(2, B, T, generator=draw).to(device)
        rewards = torch.rand(B, generator=draw).to(device)
        mask = (torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1), generator=draw)).to(device)
        return log_probs.requires_grad_(), old, rewards, mask, experts, probs

    def erpo():
        log_probs, old, rewards, mask, (experts, old_experts), (probs, old_probs) = inputs()
        given = log_probs, old, rewards, mask, experts, old_experts, probs, old_probs
        return lambda: erpo_loss(*given, num_experts=E, group_size=G)[0].backward(inputs=[log_probs])

    def rais():
        log_probs, old, advantages, mask, _, probs = inputs()
        given = log_probs, old, advantages, mask, *probs.log_()
        return lambda: rais_loss(*given)[0].backward(inputs=[log_probs])

    arms, shape = [Arm("ERPO", erpo, 4.0), Arm("RAIS", rais, 2.0)], f"B {B}, T {T}, L {L}, K {K}, E {E}"
    return [Group(f"loss, forward and backward, {shape}", arms, "seconds", memory=True)]


BENCHMARKS = {f.__name__: f for f in (step, erl, rollout, loss)}


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("benchmark", choices=BENCHMARKS)
    p.add_argument("--rounds", type=number(int, low=1), default=7, help="of A B C ...")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: in bfloat16")
    p.add_argument("--model", choices=SIZES, default="tiny")
    p.add_argument("--batch-size", type=number(int, low=1), default=8)
    p.add_argument("--compile", action="store_true", help="torch.compile the model, as train.py --compile does")
    p.add_argument("--quick", action="store_true", help="smallest sizes, one round: does it run?")
    p.add_argument("--memory-of", type=int, nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    args.argv, args.device = argv, torch.device(args.device)
    args.dtype = "bfloat16" if args.device.type == "cuda" else "float32"
    if args.device.type == "cuda" and not torch.cuda.is_available():
        p.error("this machine has no CUDA device that PyTorch can use: leave --device out")
    if args.quick:
        args.rounds, args.batch_size = 1, 2
    return args


def main(argv: list[str] | None = None) -> list[list[dict]]:
    args = parse(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    groups, results = BENCHMARKS[args.benchmark](args), []
    if args.memory_of:
        group, arm = args.memory_of
        print(peak_memory(groups[group].arms[arm].make(), args.device))
        return []
    for i, group in enumerate(groups):
        results.append(measure(group, i, args))
        show(group, results[-1])
    return results


if __name__ == "__main__":
    main()
