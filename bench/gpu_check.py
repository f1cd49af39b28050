"""All that a GPU is asked, in one command. PyTorch 2.11 or later, no network.

    python bench/gpu_check.py                         checks, then benchmarks: about ten minutes on one GPU
    python bench/gpu_check.py --checks                the checks alone: a minute or two
    python bench/gpu_check.py --device cpu --quick    does the command itself run?

float32 on the device against the CPU: every loss and its gradient, a model's forward and backward along its own and
along imposed routes, training steps, the head over 50,257 words, generation. On the device alone: the same run twice to
the same weights, bfloat16 against float32, compilation in one graph, no wait for the device in forward and backward.
Then the benchmarks of bench.py. Prints a line a check, whatever the others do; the status is 1 if one failed.
"""

import argparse
import os
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import bench  # noqa: E402, before torch: it imports train, which sets what torch reads
import train  # noqa: E402

# isort: split
import torch  # noqa: E402

from baselines import group_advantages  # noqa: E402
from moe import MoEConfig, Routes, router_losses  # noqa: E402
from support.checkpoints import find_checkpoint, load_model  # noqa: E402
from support.generation import Rollout, generate  # noqa: E402
from support.head import lm_loss, token_log_probs  # noqa: E402
from support.optimizer import clip_gradients, make_optimizer  # noqa: E402
from support.tasks import rng  # noqa: E402

CHECKS = []


def check(f):
    CHECKS.append(f)
    return f


def near(a, b, what: str, atol=1e-4, rtol=1e-3):
    a, b = (x.detach().cpu().float() for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=lambda message: f"{what}: {message}")


def sizes(device, dtype="float32"):
    """The arguments of bench.py that its functions read."""
    device = torch.device(device)
    return argparse.Namespace(model="tiny", quick=False, device=device, dtype=dtype, compile=False, batch_size=4)


def policies(device, B=8, T=12, L=3, K=2, E=8):
    """A rollout [B, T], the policy that wrote it and a newer one, log P of its routes under the newer one, rewards."""
    g, made = rng("policies"), []
    for _ in range(2):
        log_probs = torch.randn(B, T, L, E, generator=g).log_softmax(-1)
        experts = log_probs.topk(K).indices
        made.append((-torch.rand(B, T, generator=g), experts, log_probs.gather(-1, experts), log_probs))
    (*new, P), (*old, _) = made
    mask = torch.arange(T) < torch.randint(4, T + 1, (B, 1), generator=g)
    tokens = torch.randint(256, (B, T + 1), generator=g)
    tensors = [*new, P.gather(-1, old[1]), *old, torch.rand(B, generator=g), tokens, mask]
    *new, at_old, p, experts, P, rewards, tokens, mask = (t.to(device) for t in tensors)
    rollout = Rollout(tokens, mask, p, torch.zeros_like(p), experts, P)
    return train.Policy(*new), at_old, train.Policy(p, experts, P), rollout, rewards


@check
def losses(device):
    """Every loss of train.METHODS, value and gradient with respect to the log-probabilities."""
    for name, loss in train.METHODS.items():
        args, results = train.parse(["--algo", name, "--dataset", "addition", "--group-size", "4"]), []
        for where in ("cpu", device):
            new, at_old, old, rollout, rewards = policies(where)
            new = new._replace(log_probs=new.log_probs.requires_grad_())
            given = rollout, rewards, group_advantages(rewards, 4), MoEConfig(n_expert=8), args
            value, _ = loss(**train.loss_inputs(new, at_old, old, *given))
            results.append((value, *torch.autograd.grad(value, new.log_probs)))
        for a, b in zip(*results, strict=True):
            near(a, b, name, atol=1e-6)


def forced_routes(device, B=4, T=64, L=2, E=8) -> Routes:
    experts = torch.randint(E, (B, T, L, 1), generator=rng("experts"))
    return Routes(experts.to(device), (torch.rand(B, T, L, generator=rng("forced")) < 0.6).to(device))


@check
def forward_and_backward(device):
    """Features, routes, router losses and all gradients of the model, along its own and along imposed routes."""
    tokens = torch.randint(257, (4, 64), generator=rng("tokens"))
    for imposed in (False, True):
        results = []
        for where in ("cpu", device):
            model = bench.build(sizes(where), 257, gate="prob")
            features, routing = model(tokens.to(where), routes=forced_routes(where) if imposed else None)
            balance, z, load = router_losses(routing.logits, routing.experts)
            loss = features.square().mean() + balance.sum() + z.sum()
            results.append([features, load, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
        for a, b in zip(*results, strict=True):
            if a is not None:
                near(a, b, f"routes imposed: {imposed}")


@check
def training_steps(device):
    """Three steps of lm and of both kinds of ERL: the losses on the way, and the weights behind them."""
    log = {"advantage": "log"}  # the sign of a gain of nearly 0 may differ
    for algo, flags in (("lm", {}), ("erl", log | {"erl_grad": "all"}), ("erl", log | {"erl_grad": "router"})):
        results = []
        for where in ("cpu", device):
            model = bench.build(sizes(where), 257)
            once = bench.training_step(model, sizes(where), algo, **flags)
            found = [once()["loss"].cpu() for _ in range(3)]
            results.append((torch.stack(found), torch.cat([p.flatten().cpu() for p in model.parameters()])))
        for a, b in zip(*results, strict=True):
            near(a, b, f"{algo} {flags}")


@check
def large_head(device):
    """The head over 50,257 words: LM loss, log-probabilities and gradients."""
    results = []
    for where in ("cpu", device):
        weight = (0.02 * torch.randn(50257, 128, generator=rng("weight"))).to(where).requires_grad_()
        x = torch.randn(64, 128, generator=rng("x")).to(where).requires_grad_()
        targets = torch.randint(50257, (64,), generator=rng("targets")).to(where)
        loss, log_probs = lm_loss(x, weight, targets)[0], token_log_probs(x, weight, targets)
        results.append((loss, log_probs, *torch.autograd.grad(loss + log_probs.mean(), [x, weight])))
    for a, b in zip(*results, strict=True):
        near(a, b, "head")


@check
def generation(device):
    """Greedy answers are the same words, and what a rollout records is what a forward says of it."""
    prompts, greedy = [[1, 2, 3], [4, 5, 6, 7], [8, 9]], []
    for where in ("cpu", device):
        model = bench.build(sizes(where), 257, top_k=2)
        with torch.no_grad():
            greedy.append(generate(model, prompts, max_new_tokens=16, end_token=256, temperature=0))
            sampled = generate(model, prompts, max_new_tokens=16, end_token=256, generator=rng("rollout"))
            features, routing = model(sampled.tokens[:, :-1])
            log_probs = token_log_probs(features, model.wte.weight, sampled.tokens[:, 1:])
        mask = sampled.response_mask
        near(log_probs[mask], sampled.log_probs[mask], "recorded log-probabilities")
        near(routing.expert_log_probs(sampled.experts)[mask], sampled.expert_log_probs[mask], "recorded routes")
    assert torch.equal(greedy[0].tokens, greedy[1].tokens.cpu()), "greedy answers differ"


@check
def the_same_run_twice(device):
    """Short runs of train.py, one of each loop, end in the same weights when they are repeated."""
    short = "--steps 4 --pretrain-steps 4 --eval-samples 4 --test-samples 4 --checkpoint-every 4 --seed 1"
    for flags in ("--algo erl --dataset pydocs --erl-grad all", "--algo gmpo --dataset addition --prompts-per-step 4"):
        weights = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as out:
                train.run(train.parse(f"{flags} {short} --device {device} --out {out}/run".split()))
                model, _ = load_model(find_checkpoint(f"{out}/run"))
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(*weights), f"{flags}: up to {(weights[0] - weights[1]).abs().max()} apart"


@check
def bfloat16(device):
    """Loss and gradient of an LM step in bfloat16 beside float32."""
    results, tokens = [], torch.randint(257, (4, 257), generator=rng("tokens")).to(device)
    for dtype in ("float32", "bfloat16"):
        model = bench.build(sizes(device), 257)
        with bench.autocast(sizes(device, dtype)):
            loss = lm_loss(model(tokens[:, :-1])[0], model.wte.weight, tokens[:, 1:])[0]
        loss.backward()
        grads = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(grads)))
    (a, g), (b, h) = results
    assert (a - b).abs() < 0.01 * a, f"loss {a} in float32, {b} in bfloat16"
    cosine = torch.nn.functional.cosine_similarity(g, h, dim=0)
    assert cosine > 0.99, f"cosine of the gradients {cosine}"


@check
def compiles_whole(device):
    """stem and branch as train.py --compile compiles them, in bfloat16 and in one graph each, along routes too."""
    torch._dynamo.reset()
    model, tokens = bench.build(sizes(device), 257), torch.randint(257, (4, 64), generator=rng("tokens")).to(device)
    stem, branch = torch.compile(model.stem, fullgraph=True), torch.compile(model.branch, fullgraph=True)
    with bench.autocast(sizes(device, "bfloat16")):
        for routes in (None, forced_routes(device)):
            features, routing = branch(stem(tokens), routes=routes)
            (features.float().square().mean() + routing.logits.logsumexp(-1).mean()).backward()
            near(features, model.branch(model.stem(tokens), routes=routes)[0], "compiled features", 0.1, 0.1)


@check
def no_wait_for_the_device(device):
    """Forward, losses, backward and update of the model read nothing on the host (CUDA alone can tell)."""
    model, tokens = bench.build(sizes(device), 257), torch.randint(257, (4, 257), generator=rng("tokens")).to(device)
    optimizer = make_optimizer(model, 0.1)
    for strict in (False, True):  # once before: what is set up once may wait
        if strict and torch.device(device).type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with bench.autocast(sizes(device, "bfloat16")):
                features, routing = model(tokens[:, :-1])
                balance, z, _ = router_losses(routing.logits, routing.experts)
                loss = lm_loss(features, model.wte.weight, tokens[:, 1:])[0] + balance.sum() + z.sum()
            loss.backward()
            clip_gradients(model, 1.0)
            optimizer.step()
        finally:
            if torch.device(device).type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def benchmarks(device, quick):
    """bench.py at the size of GPT-2 (with --quick: tiny), eager and compiled; ERL at its own batch of four."""
    model = ["--device", device, "--model", "tiny" if quick else "gpt2", *["--quick"] * quick]
    plans = [["step", *model], ["step", *model, "--compile"], ["erl", *model, "--batch-size", "4"]]
    for argv in [*plans, ["rollout", *model], ["loss", "--device", device, *["--quick"] * quick]]:
        print("\n==", "python bench/bench.py", *argv)
        yield lambda argv=argv: bench.main(argv)


def attempt(name: str, f) -> bool:
    try:
        f()
    except Exception as error:  # whatever it is, the others are worth knowing too
        print(f"FAILED  {name}: {str(error)[:2000] or repr(error)}", flush=True)
        return False
    print(f"ok      {name}", flush=True)
    return True


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--checks", action="store_true", help="no benchmarks")
    p.add_argument("--quick", action="store_true", help="the benchmarks at their smallest sizes")
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("this machine has no CUDA device that PyTorch can use: --device cpu --quick tries the command")
    done = [attempt(f.__name__, lambda f=f: f(args.device)) for f in CHECKS]
    if not args.checks:
        done += [attempt("benchmark", f) for f in benchmarks(args.device, args.quick)]
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
