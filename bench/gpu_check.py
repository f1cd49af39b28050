"""All that a GPU is asked, in one command. PyTorch 2.11 or later, no network.

    python bench/gpu_check.py                         checks, then the benchmarks of bench.py: ten minutes on one GPU
    python bench/gpu_check.py --device cpu --quick    does the command itself run?

In float32 the device is compared with the CPU; then it is asked whether a run repeats to the last bit, how far bfloat16
is from float32, whether the model compiles into one graph, and whether forward and backward wait for the host. Every
part runs, whatever the others do, and has its line; the status is 1 if one failed.
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
from moe import MoEConfig, Routes, lm_loss, router_losses, token_log_probs  # noqa: E402
from support.checkpoints import find_checkpoint, load_model  # noqa: E402
from support.generation import Rollout, generate  # noqa: E402
from support.tasks import rng  # noqa: E402


def near(a, b, what: str, atol=1e-4, rtol=1e-3):
    a, b = a.detach().cpu().float(), b.detach().cpu().float()
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=lambda message: f"{what}: {message}")


def compare(f, device, what: str, **tolerance):
    """f(where) -> tensors, on the CPU and on the device."""
    for a, b in zip(f("cpu"), f(device), strict=True):
        near(a, b, what, **tolerance)


def sizes(device, dtype="float32"):
    """The arguments of bench.py that its functions read."""
    device = torch.device(device)
    return argparse.Namespace(model="tiny", quick=False, device=device, dtype=dtype, compile=False, batch_size=4)


def policies(device, B=8, T=12, L=3, K=2, E=8):
    """A newer policy, log P of the old routes under it, the older policy and its rollout, and rewards [B]."""
    g = rng("policies")
    log_P, p = torch.randn(2, B, T, L, E, generator=g).log_softmax(-1), -torch.rand(2, B, T, generator=g)
    experts, rewards = log_P.topk(K).indices, torch.rand(B, generator=g)
    at_old, P = log_P[0].gather(-1, experts[1]), log_P.gather(-1, experts)
    mask = torch.arange(T) < torch.randint(4, T + 1, (B, 1), generator=g)
    p, experts, P, at_old, rewards, mask = (t.to(device) for t in (p, experts, P, at_old, rewards, mask))
    new, old = (train.Policy(*(t[i] for t in (p, experts, P))) for i in (0, 1))
    return new, at_old, old, Rollout(None, mask, old.log_probs, None, old.experts, old.expert_log_probs), rewards


def losses(device):
    """Every loss of train.METHODS, value and gradient with respect to the log-probabilities."""
    for name, loss in train.METHODS.items():
        args = train.parse(["--algo", name, "--dataset", "addition", "--group-size", "4"])

        def value_and_gradient(where, loss=loss, args=args):
            new, at_old, old, rollout, rewards = policies(where)
            new = new._replace(log_probs=new.log_probs.requires_grad_())
            given = rollout, rewards, group_advantages(rewards, 4), MoEConfig(n_expert=8), args
            value, _ = loss(**train.loss_inputs(new, at_old, old, *given))
            return value, *torch.autograd.grad(value, new.log_probs)

        compare(value_and_gradient, device, name, atol=1e-6)


def training_steps(device):
    """The first step of lm and of both kinds of ERL, with the head of a large vocabulary: loss and gradients."""
    log = {"advantage": "log"}  # the sign of a gain of nearly 0 may differ
    for algo, flags in (("lm", {}), ("erl", log | {"erl_grad": "all"}), ("erl", log | {"erl_grad": "router"})):

        def loss_and_gradients(where, algo=algo, flags=flags):
            model = bench.build(sizes(where), 5000, gate="prob")
            loss = bench.training_step(model, sizes(where), algo, gate="prob", **flags)()["loss"]
            return [loss, *(p.grad for p in model.parameters())]

        compare(loss_and_gradients, device, f"{algo} {flags}", atol=1e-5)


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


def the_same_run_twice(device):
    """Short runs of train.py, one of each loop, end in the same weights when they are repeated."""
    short = (
        "--dataset pydocs --steps 4 --pretrain-steps 4 --eval-samples 4 --test-samples 4 --max-new-tokens 16 --seed 1"
    )
    for algo in ("erl --erl-grad all", "gmpo --prompts-per-step 4"):
        weights = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as out:
                train.run(train.parse(f"--algo {algo} {short} --device {device} --out {out}/run".split()))
                model, _ = load_model(find_checkpoint(f"{out}/run"))
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(*weights), f"{algo}: up to {(weights[0] - weights[1]).abs().max()} apart"


def bfloat16(device):
    """Loss and gradient of an LM step in bfloat16 beside float32."""
    results, tokens = [], torch.randint(257, (4, 257), generator=rng("tokens")).to(device)
    for dtype in ("float32", "bfloat16"):
        model = bench.build(sizes(device), 257, gate="prob")
        with bench.autocast(sizes(device, dtype)):
            loss = lm_loss(model(tokens[:, :-1])[0], model.wte.weight, tokens[:, 1:])[0]
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss.detach(), torch.cat([g.flatten().float() for g in grads])))
    (a, g), (b, h) = results
    cosine = torch.nn.functional.cosine_similarity(g, h, dim=0)
    assert (a - b).abs() < 0.01 * a and cosine > 0.99, f"loss {a} and {b}, cosine of the gradients {cosine}"


def forced_routes(device, B=4, T=64, L=2, E=8) -> Routes:
    experts = torch.randint(E, (B, T, L, 1), generator=rng("experts"))
    return Routes(experts.to(device), (torch.rand(B, T, L, generator=rng("forced")) < 0.6).to(device))


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


def no_wait_for_the_device(device):
    """Forward, losses and backward of the model read nothing on the host (CUDA alone can tell)."""
    model, tokens = bench.build(sizes(device), 257), torch.randint(257, (4, 257), generator=rng("tokens")).to(device)
    for mode in ("default", "error"):  # at first: what is set up once may wait
        if torch.device(device).type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        with bench.autocast(sizes(device, "bfloat16")):
            features, routing = model(tokens[:, :-1])
            balance, z, _ = router_losses(routing.logits, routing.experts)
            loss = lm_loss(features, model.wte.weight, tokens[:, 1:])[0] + balance.sum() + z.sum()
        loss.backward()


CHECKS = [losses, training_steps, generation, the_same_run_twice, bfloat16, compiles_whole, no_wait_for_the_device]


def benchmarks(device: str, quick: bool):
    """bench.py at the size of GPT-2 (with --quick: tiny), eager and compiled; ERL at its own batch of four."""
    common = ["--device", device, "--model", "tiny" if quick else "gpt2", *["--quick"] * quick]
    for argv in (["step"], ["step", "--compile"], ["erl", "--batch-size", "4"], ["rollout"], ["loss"]):
        yield f"bench.py {' '.join(argv + common)}", lambda argv=argv: bench.main(argv + common)


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
    if args.device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    done += [attempt(name, f) for name, f in ([] if args.checks else benchmarks(args.device, args.quick))]
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
