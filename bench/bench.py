"""Benchmarks: what a mixture of experts, ERL's exploration, rollouts and the losses cost, beside their peers.

    python bench/bench.py step       the program's training step: our MoE, a dense model, transformers' MoE blocks
    python bench/bench.py layer      MoE layer against the number of experts, and K = 8 against K = 1
    python bench/bench.py erl        the program's ERL step against its LM step
    python bench/bench.py rollout    generation against transformers' GPT-2
    python bench/bench.py loss       ERPO and RAIS at the paper's scale
    python bench/bench.py growth     step time against experts, length, m, vocabulary

Each writes results/bench-NAME.json and .png. The arms of a group run interleaved, A B C A B C ..., in one process,
`--pairs` times after one warm-up; every figure is a median, with the quartiles. A ratio is the median over rounds of
(arm / first arm of the group) within the round. On a CPU the time is the process' CPU time with one thread (a shared
machine disturbs it least), on CUDA it lies between two events. Memory is the peak during a later step beyond what was
there before it: on a CPU the resident memory of a fresh process, on CUDA the allocator's. A training step is what
train.py does in one: batch, losses, backward, norms and clip, AdamW, bookkeeping (a line of the log every tenth step).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train  # noqa: E402, before torch: it sets what torch reads when it is imported

# isort: split
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from erl import erl_objective, explore  # noqa: E402
from erpo import erpo_loss  # noqa: E402
from moe import GPT, SIZES, MoE, MoEConfig, Routes, Routing  # noqa: E402
from rais import rais_loss  # noqa: E402
from support.arguments import number  # noqa: E402
from support.fast import speed_up  # noqa: E402
from support.generation import generate  # noqa: E402
from support.run_folder import NEW_STATE, Run  # noqa: E402
from support.tasks import TextBatches, rng  # noqa: E402


class Arm(NamedTuple):
    name: str
    make: Callable  # () -> a function without arguments that does the work once
    goal: float | None = None  # of the ratio to the group's first arm, or of seconds (see Group.relative)
    memory_goal: float | None = None  # GB
    work: float = 0.0  # floating-point operations of one call that MFU counts; 0: not known
    tokens: int = 0  # tokens that one call works on


class Group(NamedTuple):
    name: str
    arms: list[Arm]
    relative: str  # "time" (goal: at most), "speed" (goal: at least), or "seconds" (no ratio; goal: at most)
    memory: bool = False  # measure it


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


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


def quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return {"median": median.item(), "q1": q1.item(), "q3": q3.item()}


def memory_of(group: int, arm: int, args) -> float:
    """GB that one call adds at its peak, in a process that does nothing else (with --quick: a guess, in this one)."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    command = [sys.executable, os.path.abspath(__file__), *args.argv, "--memory-of", f"{group},{arm}"]
    return float(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True).stdout.split()[-1])


def peak_memory(f: Callable, device: torch.device) -> float:
    f()  # what compilation, tuning and the optimizer allocate once is not the step's
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    try:  # Linux: forget the peak of what was built before
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        with open("/proc/self/statm") as file:
            before = int(file.read().split()[1]) * resource.getpagesize()
        f()
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        f()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (peak - before) / 1e9


def warmed_up(arm: Arm, args) -> Callable | None:
    """The arm's work after its first calls; None for a peer that does not run here (some want another device)."""
    try:
        f = arm.make()
        for _ in range(3 if args.compile else 1):  # the first calls compile
            f()
        return f
    except Exception as error:
        if not arm.name.startswith("transformers"):
            raise
        print(f"{arm.name} is left out: {error}", file=sys.stderr)
        return None


def measure(groups: list[Group], args) -> list[dict]:
    results = []
    for g, group in enumerate(groups):
        ready = [(i, arm, f) for i, arm in enumerate(group.arms) if (f := warmed_up(arm, args))]
        work = [f for *_, f in ready]
        times = [[] for _ in work]
        for _ in range(args.pairs):
            for f, t in zip(work, times, strict=True):
                t.append(seconds_of(f, args.device))
        arms, numbers = [], [(i, arm) for i, arm, _ in ready]
        del ready, work, f
        for (i, arm), t in zip(numbers, times, strict=True):
            row = {"name": arm.name, "seconds": quartiles(t)}
            if arm.tokens:
                row["tokens_per_second"] = arm.tokens / row["seconds"]["median"]
            if group.relative != "seconds":
                ratios = [a / b if group.relative == "time" else b / a for a, b in zip(t, times[0], strict=True)]
                row["relative"] = quartiles(ratios)
            if arm.goal is not None:
                value = row["seconds" if group.relative == "seconds" else "relative"]["median"]
                row["goal"] = arm.goal
                row["met"] = value >= arm.goal if group.relative == "speed" else value <= arm.goal
            if arm.work and peak_flops(args):
                row["mfu"] = arm.work / row["seconds"]["median"] / peak_flops(args)
            if group.memory:
                row["memory_gb"] = peak_memory(arm.make(), args.device) if args.quick else memory_of(g, i, args)
                if arm.memory_goal is not None:
                    row["memory_goal_gb"], row["memory_met"] = arm.memory_goal, row["memory_gb"] <= arm.memory_goal
            arms.append(row)
        results.append({"name": group.name, "relative": group.relative, "arms": arms})
        show(results[-1])
    return results


def show(group: dict):
    sign = "<=" if group["relative"] != "speed" else ">="
    relative = {"time": "time / first", "speed": "speed / first", "seconds": ""}[group["relative"]]
    print(f"\n{group['name']}\n{'':34}{'ms (quartiles)':>26}{relative:>22}{'goal':>9}{'GB':>14}{'MFU':>7}")
    for arm in group["arms"]:
        s, r = arm["seconds"], arm.get("relative")
        cells = [f"{1000 * s['median']:.1f} ({1000 * s['q1']:.1f}-{1000 * s['q3']:.1f})".rjust(26)]
        cells.append((f"{r['median']:.2f} ({r['q1']:.2f}-{r['q3']:.2f})" if r else "").rjust(22))
        goal = f"{sign} {arm['goal']:g}" + ("" if arm["met"] else " !") if "goal" in arm else ""
        memory = f"{arm['memory_gb']:.2f}" if "memory_gb" in arm else ""
        if "memory_goal_gb" in arm:
            memory += f" <= {arm['memory_goal_gb']:g}" + ("" if arm["memory_met"] else " !")
        cells += [goal.rjust(9), memory.rjust(14), (f"{arm['mfu']:.1%}" if "mfu" in arm else "").rjust(7)]
        print(f"{arm['name']:34}{''.join(cells)}", flush=True)


def peak_flops(args) -> float | None:
    """Dense bfloat16 operations a second that the maker states for the device; None: not known, no MFU."""
    if args.device.type != "cuda" or args.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(args.device)
    known = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "4090": 165e12, "L40": 181e12}
    return next((flops for part, flops in known.items() if part in name), None)


def model_flops(model: GPT, B: int, T: int) -> float:
    """Forward and backward of an LM step: 6 a parameter of the matrices that a token passes, and the attention."""
    c = model.config
    active = model.count_parameters()[1] - model.wpe.weight.numel()  # the tied wte counts once, as the head
    return B * T * (6 * active + 12 * c.n_layer * c.n_embd * T)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def build(args, vocab_size: int, n_expert: int = 8, context: int = 0, seed: str = "model", **changes) -> GPT:
    size = {**SIZES[args.model], "vocab_size": vocab_size, "n_expert": n_expert, **changes}
    if args.quick:
        size |= dict(n_layer=2, n_embd=32, n_head=2, context=32)
    if context:
        size["context"] = context
    return speed_up(GPT(MoEConfig(**size), generator=rng(0, seed)).to(args.device))


def autocast(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16", cache_enabled=False)


class Steps(Run):
    """The program's own run on random words, `once` for one step; nothing is evaluated or saved."""

    def __init__(self, model: GPT, args, algo: str = "lm", losses=None, **options):
        """losses: None, the program's own; or others like train.lm_losses. options: of train.py."""
        self.folder = tempfile.TemporaryDirectory()
        options |= dict(algo=algo, out=self.folder.name, steps=10**8, eval_every=10**8, checkpoint_every=10**8, lr=1e-5)
        options |= dict(dtype=args.dtype, top_k=model.config.top_k)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        super().__init__(train.parse(flags), dict(NEW_STATE), {"supervised": 10**8}, None)
        if args.compile:  # as train.py --compile does it
            model.stem, model.branch = torch.compile(model.stem), torch.compile(model.branch)
        words = torch.randint(model.config.vocab_size, (1 << 16,), generator=rng(0, "words")).numpy()
        task = SimpleNamespace(batch=TextBatches(words, model.config.context, args.batch_size, 0))
        self.bar, self.algo, self.losses, self.autocast = tqdm(disable=True), algo, losses, autocast(args)
        self.begin("supervised", model, task, 1e-5)

    def steps(self):
        yield next(super().steps())

    def once(self):
        with self.autocast:
            if self.losses is None:
                return train.train_text(self.model, self.task, self.args, self, self.algo)
            for step in self.steps():
                batch, report = self.task.batch(step).to(self.model.wte.weight.device), {}
                for loss, metrics in self.losses(self.model, batch, self.args, step):
                    report |= metrics | self.update(loss)
                self.after(report, tokens=int(batch.mask.sum()))


class Peer(nn.Module):
    """A MoE block of transformers in the place of ours. A hook catches its router's logits, so that the balance and z
    losses around it are the same. Autocast does not know its grouped product: bfloat16 takes bfloat16 weights."""

    def __init__(self, block: nn.Module, router: nn.Module, ours: MoE, logits_of: Callable, args):
        super().__init__()
        self.dtype = getattr(torch, args.dtype)
        self.block, self.logits_of, self.logits = block.to(self.dtype), logits_of, None
        with torch.no_grad():
            for p in block.parameters():
                p.normal_(std=0.02)
            next(router.parameters()).copy_(ours.router.weight)  # the same tokens go to the same experts
        router.register_forward_hook(self.listen)

    def listen(self, module, inputs, output):
        self.logits = self.logits_of(output)

    def forward(self, x, routes=None, noise=None, cache=None):
        out = self.block(x.to(self.dtype)).to(x.dtype)
        logits = self.logits.view(*x.shape[:2], -1).float()
        experts = logits.topk(1).indices
        return out, Routing(logits, experts, torch.zeros_like(experts[..., 0], dtype=torch.bool), x)


def switch_block(ours: MoE, args) -> Peer:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    D = ours.config.n_embd
    config = SwitchTransformersConfig(
        d_model=D,
        d_ff=4 * D,
        num_experts=ours.config.n_expert,
        expert_capacity=1 << 30,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        dense_act_fn="gelu_pytorch_tanh",
    )
    block = SwitchTransformersSparseMLP(config)
    return Peer(block, block.router, ours, lambda output: output[2], args)


def qwen_block(ours: MoE, args, implementation: str, activation: str) -> Peer:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    D, aligned = ours.config.n_embd, 8 if args.dtype == "bfloat16" else 4
    config = Qwen3MoeConfig(
        hidden_size=D,
        num_experts=ours.config.n_expert,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        moe_intermediate_size=8 * D // 3 // aligned * aligned,  # three matrices of it hold what our two of 4D hold
        experts_implementation=implementation,
        hidden_act=activation,
    )
    block = Qwen3MoeSparseMoeBlock(config)
    return Peer(block, block.gate, ours, lambda output: output[0], args)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmarks: each returns its groups of arms
# ---------------------------------------------------------------------------------------------------------------------


def step(args) -> list[Group]:
    """The program's training step with models that differ in their MoE blocks alone."""
    V = 257 if args.model == "tiny" else 50304

    def arm(name, n_expert=8, replace=None, **goal):
        model = build(args, V, n_expert, gate="prob")  # what Switch and Qwen do with K = 1

        def make():
            if replace is not None:
                for i in model.config.moe_blocks:
                    model.blocks[i].mlp = replace(model.blocks[i].mlp, args).to(args.device)
            return Steps(model, args).once

        B, T = args.batch_size, model.config.context
        return Arm(name, make, work=model_flops(model, B, T), tokens=B * T, **goal)

    arms = [arm("dense", 1), arm("ours, 8 experts", goal=0.95 if args.model == "tiny" else 0.8)]
    if has_transformers():
        arms.append(arm("transformers Switch", replace=switch_block))
        # its own activation is SiLU, which costs less than the tanh-GELU of the other arms
        for kind, act in (("eager", "silu"), ("grouped_mm", "silu"), ("grouped_mm", "gelu_pytorch_tanh")):
            name = f"transformers Qwen3-MoE, {kind}" + (", GELU" if act != "silu" else "")
            arms.append(arm(name, replace=lambda o, a, k=kind, act=act: qwen_block(o, a, k, act)))
    else:
        print("transformers is not installed: its blocks are left out", file=sys.stderr)
    return [Group(f"training step, {args.model}, V = {V}, top-1", arms, "speed")]


def layer(args) -> list[Group]:
    """Forward and backward of one MoE layer on 2,048 tokens."""
    D = SIZES[args.model]["n_embd"] if not args.quick else 32
    N = 256 if args.quick else 2048

    def arm(name, n_expert, top_k=1, narrower=1, **goal):
        def make():
            torch.manual_seed(0)
            module = speed_up(GPT(MoEConfig(n_embd=D, n_expert=n_expert, top_k=top_k, n_layer=2))).blocks[1].mlp
            if n_expert > 1:
                nn.init.normal_(module.router.weight, std=0.1)
                e, H = module.experts, 4 * D // narrower  # K experts of width 4D / K make the work of one of 4D
                e.w_in, e.b_in = (
                    nn.Parameter(0.02 * torch.randn(n_expert, D, H)),
                    nn.Parameter(torch.zeros(n_expert, H)),
                )
                e.w_out = nn.Parameter(0.02 * torch.randn(n_expert, H, D))
            module = module.to(args.device)
            x = torch.randn(N, D, generator=rng(0, "x")).to(args.device).requires_grad_()
            grad = torch.randn(N, D, generator=rng(0, "grad")).to(args.device)
            wanted = [x, *module.parameters()]

            def once():
                with autocast(args):
                    out = module(x[None])[0][0] if n_expert > 1 else module(x)
                torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True)

            return once

        return Arm(name, make, tokens=N, **goal)

    experts, goals = [8, 16] if args.quick else [8, 16, 32, 64, 128], {64: 1.5, 128: 3.0}
    growing = [arm(f"{E} experts", E, goal=goals.get(E)) for E in experts]
    same_size = [arm(f"{8 * K} experts, K = {K}", 8 * K, K, K, goal=1.4 if K == 8 else None) for K in (1, 2, 4, 8)]
    same_count = [arm("64 experts, K = 1", 64), arm("64 experts, K = 8", 64, 8, 8, goal=1.4)]
    return [
        Group(f"MoE layer, {N} tokens, width {D}, top-1", [*growing, arm("dense, the same active size", 1)], "time"),
        Group("K experts of 1/K the width, the same active and total size", same_size, "time"),
        Group("K experts of 1/K the width, 64 experts each", same_count, "time"),
    ]


def text_arm(
    name, args, V, algo="lm", n_expert=8, context=0, losses=None, goal=None, memory_goal=None, **options
) -> Arm:
    """The program's training step on text. options: of train.py --algo `algo`."""

    def make():
        return Steps(build(args, V, n_expert, context), args, algo, losses, **options).once

    return Arm(name, make, goal, memory_goal, tokens=args.batch_size * build(args, V, n_expert, context).config.context)


def naive_erl_losses(model: GPT, batch, args, step: int):
    """ERL as the equations read: one forward after the other from the first block on, log-softmax over all words."""
    tokens, B = batch.tokens, len(batch.tokens)

    def one(routes):
        features, routing = model.branch(model.stem(tokens[:, :-1]), routes)
        log_probs = model.head(features).float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)  # [B, T]
        return log_probs, routing

    def forward(routes):
        if routes is None:
            log_probs, routing = one(None)
            mask = batch.mask.to(log_probs.device)
            balance, z, _ = train.router_losses(routing.logits, routing.experts, batch.routed.to(log_probs.device))
            lm_loss = -(log_probs * mask).sum() / mask.sum()
            loss = lm_loss + args.balance_coef * balance.sum() + args.z_coef * z.sum()
            return log_probs, routing.logits.log_softmax(-1), loss
        passes = [one(Routes(*r)) for r in zip(*(t.split(B) for t in routes), strict=True)]
        log_probs, logits = (torch.cat(t) for t in zip(*((p, r.logits) for p, r in passes), strict=True))
        return log_probs, logits.log_softmax(-1), None

    generator = rng(args.seed, "routes", step)
    paths = explore(forward, batch.mask, args.top_k, generator=generator, **train.option_values(train.EXPLORE, args))
    for loss, metrics in erl_objective(forward, paths, **train.option_values(train.OBJECTIVE, args)):
        yield loss, metrics | {"loss": paths.original[2].detach()}


def erl(args) -> list[Group]:
    """The program's ERL step against its LM step, m = 3."""
    vocabularies = [257, 500] if args.quick else [257, 50257] if args.model == "tiny" else [50304]
    goals = {257: (2.3, 1.55), 50257: (2.15, 1.8), 50304: (2.0, 2.0)}
    groups = []
    for V in vocabularies:
        exact, router = goals.get(V, (None, None))
        room = 0.6 if V == 50257 else None
        full = dict(algo="erl", erl_grad="all", memory_goal=room)
        arms = [
            text_arm("LM step", args, V),
            text_arm("ERL, exact gradient (all)", args, V, goal=exact, **full),
            text_arm("ERL, gradient of routers (router)", args, V, goal=router, **full | {"erl_grad": "router"}),
            text_arm("ERL, m forwards in turn", args, V, algo="erl", losses=naive_erl_losses),
        ]
        groups.append(Group(f"ERL step, {args.model}, V = {V}, m = 3", arms, "time", memory=True))
    return groups


def rollout(args) -> list[Group]:
    """Sampled generation, every row to its full length. Ours also records log-probabilities, entropies and routes."""
    R, new, prompt = (4, 4, 8) if args.quick else (64, 64, 32)

    def group(V):
        prompts = torch.randint(V, (R, prompt), generator=rng(0, "prompts"))

        def ours(n_expert):
            model, draw = build(args, V, n_expert), rng(0, "rollout")

            def once():
                with autocast(args):  # an end token that no model writes: all rows keep their full length
                    generate(model, prompts.tolist(), max_new_tokens=new, end_token=-1, generator=draw)

            return once

        def theirs():
            return transformers_generate(build(args, V).config, prompts, new, args)

        arms = [Arm("transformers GPT-2", theirs, tokens=R * new)] if has_transformers() else []
        arms.append(Arm("ours, dense", lambda: ours(1), 1.3 if V == 257 else 3.0, tokens=R * new))
        arms.append(Arm("ours, 8 experts", lambda: ours(8), 1.0, tokens=R * new))
        return Group(f"rollout, {R} prompts of {prompt} x {new} new tokens, {args.model}, V = {V}", arms, "speed")

    return [group(V) for V in ([257, 500] if args.quick else [257, 50257])]


def transformers_generate(c: MoEConfig, prompts: torch.Tensor, new: int, args) -> Callable:
    """transformers' GPT-2 of the same size, with its cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = dict(vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)
    config = GPT2Config(**size, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model, ids = GPT2LMHeadModel(config).to(args.device).eval(), prompts.to(args.device)
    given = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, use_cache=True)
    given |= dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0)

    def once():
        with autocast(args):
            model.generate(ids, **given)

    return once


def loss(args) -> list[Group]:
    """ERPO and RAIS, forward and backward, at ERPO's scale: seconds of one core."""
    B, T, L, K, E, G = (4, 64, 2, 2, 8, 4) if args.quick else (8, 14336, 48, 8, 128, 4)

    def inputs(id_type, prob_type):
        draw, rows = rng(0, "loss"), []
        for _ in range(2):  # new, old
            start = torch.randint(E, (B, T, L, 1), generator=draw)
            experts = ((start + 5 * torch.arange(K)) % E).to(id_type)  # distinct within a token: 5 does not divide E
            probs = torch.rand(B, T, L, K, generator=draw).softmax(-1).to(prob_type)
            rows.append((experts.to(args.device), probs.to(args.device)))
        log_probs, old = -torch.rand(2, B, T, generator=draw).to(args.device)
        rewards = torch.rand(B, generator=draw)
        mask = (torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1), generator=draw)).to(args.device)
        return log_probs.requires_grad_(), old, rewards, mask, rows

    def erpo(id_type, prob_type):
        log_probs, old, rewards, mask, ((experts, probs), (old_experts, old_probs)) = inputs(id_type, prob_type)

        def once():
            value, _ = erpo_loss(
                log_probs, old, rewards, mask, experts, old_experts, probs, old_probs, num_experts=E, group_size=G
            )
            torch.autograd.grad(value, log_probs)

        return once

    def rais(prob_type):
        log_probs, old, rewards, mask, ((_, probs), (_, old_probs)) = inputs(torch.uint8, prob_type)
        new_router, old_router, advantages = probs.log_(), old_probs.log_(), rewards.to(args.device)

        def once():
            value, _ = rais_loss(log_probs, old, advantages, mask, new_router, old_router)
            torch.autograd.grad(value, log_probs)

        return once

    arms = [
        Arm("ERPO, int64 and float32", lambda: erpo(torch.int64, torch.float32), 2.0, 0.3),
        Arm("ERPO, uint8 and bfloat16", lambda: erpo(torch.uint8, torch.bfloat16), 2.0, 0.3),
        Arm("RAIS, float32", lambda: rais(torch.float32), 2.0),
        Arm("RAIS, bfloat16", lambda: rais(torch.bfloat16), 2.0),
    ]
    shape = f"B {B}, T {T}, L {L}, K {K}, E {E}"
    return [Group(f"loss, forward and backward, {shape}", arms, "seconds", memory=True)]


def growth(args) -> list[Group]:
    """Step time when one size grows; the others stay at 8 experts, T = 256, m = 3, V = 257."""
    axes = {
        "experts": ("n_expert", [8, 16, 32, 64, 128]),
        "sequence length": ("context", [64, 128, 256, 512, 1024]),
        "perturbed forwards m": ("n_perturb", [1, 2, 3, 5, 8]),
        "vocabulary": ("V", [257, 1024, 4096, 16384, 50257]),
    }
    if args.quick:
        small = {"n_expert": [2, 4], "context": [8, 16], "n_perturb": [1, 2], "V": [257, 500]}
        axes = {title: (axis, small[axis]) for title, (axis, _) in axes.items()}
    kinds = {
        "LM": {},
        "ERL all": {"algo": "erl", "erl_grad": "all"},
        "ERL router": {"algo": "erl", "erl_grad": "router"},
    }

    def arms(axis, values):
        for kind, options in kinds.items():
            needless = kind == "LM" and axis == "n_perturb"  # the LM step does not depend on m: one arm will do
            for value in values[:1] if needless else values:
                sizes = {"V": 257, "n_expert": 8, "context": 0 if args.quick else 256}
                changed = {} if needless else {axis: value}
                yield text_arm(f"{kind} {value}", args, **sizes | changed | options)

    return [Group(title, list(arms(*axis)), "time") for title, axis in axes.items()]


def has_transformers() -> bool:
    try:
        import transformers

        transformers.logging.set_verbosity_error()
    except ImportError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and the entry
# ---------------------------------------------------------------------------------------------------------------------


KINDS = {"LM": "C0", "ERL all": "C1", "ERL router": "C2"}


def draw(results: dict, path: str):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = results["groups"]
    if results["benchmark"] == "growth":
        figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
        for axis, group in zip(axes, groups, strict=True):
            draw_growth(axis, group)
        axes[0].legend()
    else:
        count = [len(g["arms"]) for g in groups]
        size, heights = (8, 1.0 * len(groups) + 0.36 * sum(count)), {"height_ratios": count}
        figure, axes = plt.subplots(
            len(groups), 1, figsize=size, squeeze=False, layout="constrained", gridspec_kw=heights
        )
        for axis, group in zip(axes[:, 0], groups, strict=True):
            draw_bars(axis, group)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_growth(axis, group: dict):
    for kind, color in KINDS.items():
        arms = [a for a in group["arms"] if a["name"].startswith(kind + " ")]
        x, s = [int(a["name"].removeprefix(kind + " ")) for a in arms], [a["seconds"] for a in arms]
        y, low, high = ([1000 * t[q] for t in s] for q in ("median", "q1", "q3"))
        if len(arms) == 1:  # the LM step does not depend on m
            axis.axhline(y[0], color=color, label=kind)
            continue
        spread = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        axis.errorbar(x, y, spread, marker="o", ms=4, capsize=2, label=kind, color=color)
    axis.set(xlabel=group["name"], ylabel="step, ms")
    if group["name"] != "perturbed forwards m":
        axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(v) for v in x])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def draw_bars(axis, group: dict):
    for y, arm in enumerate(group["arms"]):
        s = arm["seconds" if group["relative"] == "seconds" else "relative"]
        axis.barh(y, s["median"], color="C0", height=0.6)
        axis.plot([s["q1"], s["q3"]], [y, y], color="black", lw=1.5)
        if "goal" in arm:
            axis.plot([arm["goal"]] * 2, [y - 0.4, y + 0.4], color="C3", lw=2)
    axis.set_yticks(range(len(group["arms"])), [a["name"] for a in group["arms"]])
    axis.invert_yaxis()
    axis.set_title(group["name"], fontsize=10)
    label = {"time": "time relative to the first", "speed": "speed relative to the first", "seconds": "seconds"}
    axis.set_xlabel(label[group["relative"]] + " (red: goal)")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


BENCHMARKS = {f.__name__: f for f in (step, layer, erl, rollout, loss, growth)}


def parse(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    count = number(int, low=1)
    parser.add_argument("--pairs", type=count, default=7, help="rounds of A B C ...")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(SIZES), default="tiny")
    parser.add_argument("--batch-size", type=count, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the products; default: bfloat16 on CUDA")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model, as train.py --compile does")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads")
    parser.add_argument("--out", default="results", help="folder of the JSON and the picture")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one round: does it run?")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = argv
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device that PyTorch can use: leave --device out")
    try:
        os.makedirs(args.out, exist_ok=True)  # before the work, not after it
    except OSError as error:
        parser.error(f"cannot write into {args.out}: {error.strerror}")
    args.device = torch.device(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    if args.quick:
        args.pairs, args.batch_size = 1, 2
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(args.threads)
    groups = BENCHMARKS[args.benchmark](args)
    if args.memory_of:
        group, arm = map(int, args.memory_of.split(","))
        print(peak_memory(groups[group].arms[arm].make(), args.device))
        return {}
    results = {
        "benchmark": args.benchmark,
        "torch": torch.__version__,
        "device": device_name(args.device),
        "dtype": args.dtype,
        "compiled": args.compile,
        "threads": torch.get_num_threads(),
        "pairs": args.pairs,
        "model": args.model,
        "batch_size": args.batch_size,
        "groups": measure(groups, args),
    }
    path = os.path.join(args.out, f"bench-{args.benchmark}")
    with open(path + ".json", "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    draw(results, path + ".png")
    return results


if __name__ == "__main__":
    main()
