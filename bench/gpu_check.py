"""Does the program compute on a GPU what it computes on a CPU? Part of bench/on_gpu.sh.

    python bench/gpu_check.py --device cuda

float32 on both: every loss and its gradient, training steps, generation, the head, ERL's passes. Then on the device
alone: bfloat16 against float32, compilation without a graph break, no wait for the device in forward and backward.
Prints a line a check and ends with status 1 if one of them failed.
"""

import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import bench  # noqa: E402, before torch: it imports train, which sets what torch reads
import train  # noqa: E402

# isort: split
import torch  # noqa: E402

from baselines import group_advantages  # noqa: E402
from moe import MoEConfig  # noqa: E402
from support.generation import generate  # noqa: E402
from support.tasks import rng  # noqa: E402

CHECKS = []


def check(f):
    CHECKS.append(f)
    return f


def near(a, b, what: str, atol=1e-4, rtol=1e-3):
    torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), atol=atol, rtol=rtol, msg=lambda m: f"{what}: {m}")


def sizes(device, dtype="float32"):
    """The arguments of bench.py that `bench.build` and `bench.Steps` read."""
    device = torch.device(device)
    return argparse.Namespace(model="tiny", quick=False, device=device, dtype=dtype, compile=False, batch_size=4)


def policies(device, B=8, T=12, L=3, K=2, E=8):
    """Two policies on the same rows, and the rewards of their groups."""
    g, made = rng("policies"), []
    for _ in range(2):
        logits = torch.randn(B, T, L, E, generator=g)
        experts, P = logits.topk(K).indices, logits.log_softmax(-1)
        made.append(train.Policy(-torch.rand(B, T, generator=g), experts, P.gather(-1, experts), P[..., :K], logits))
    new, old = (train.Policy(*(t.to(device) for t in p)) for p in made)
    mask = torch.arange(T) < torch.randint(4, T + 1, (B, 1), generator=g)
    return new, old, torch.rand(B, generator=g).to(device), mask.to(device)


@check
def losses(device):
    """Every loss of train.METHODS, value and gradient with respect to the log-probabilities."""
    for name, loss in train.METHODS.items():
        args, results = train.parse(["--algo", name, "--dataset", "addition", "--group-size", "4"]), []
        for where in ("cpu", device):
            new, old, rewards, mask = policies(where)
            new = new._replace(log_probs=new.log_probs.requires_grad_())
            advantages = group_advantages(rewards, 4)
            inputs = train.loss_inputs(new, old, rewards, advantages, mask, MoEConfig(n_expert=8), args)
            value, _ = loss(**inputs)
            results.append((value, *torch.autograd.grad(value, new.log_probs)))
        for a, b in zip(*results, strict=True):
            near(a, b, name, atol=1e-6)


@check
def training_steps(device):
    """Three steps of lm and of both kinds of ERL: the losses on the way, and the weights behind them."""
    # advantage "log": the sign of a gain of nearly 0 may differ
    for algo, options in (
        ("lm", {}),
        ("erl", {"advantage": "log", "erl_grad": "all"}),
        ("erl", {"advantage": "log", "erl_grad": "router"}),
    ):
        results = []
        for where in ("cpu", device):
            run, seen = bench.Steps(bench.build(sizes(where), 257), sizes(where), algo, **options), []
            for step in range(3):
                batch = run.task.batch(step).to(run.model.wte.weight.device)
                for loss, _ in (train.erl_losses if algo == "erl" else train.lm_losses)(
                    run.model, batch, run.args, step
                ):
                    run.optimizer.param_groups[0]["lr"] = 1e-4
                    run.update(loss)
                    seen.append(loss.detach().cpu())
            results.append((torch.stack(seen), torch.cat([p.detach().cpu().flatten() for p in run.model.parameters()])))
        (a, b), (c, d) = results
        near(a, c, f"losses of {algo} {options}")
        near(b, d, f"weights of {algo} {options}", atol=1e-4)


@check
def generation(device):
    """Greedy answers are the same words, and what a rollout records is what a forward says of it."""
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    rows = []
    for where in ("cpu", device):
        model = bench.build(sizes(where), 257, top_k=2)
        greedy = generate(model, prompts, max_new_tokens=16, end_token=256, temperature=0)
        rows.append(greedy)
        sampled = generate(model, prompts, max_new_tokens=16, end_token=256, generator=rng("rollout"))
        with torch.no_grad():
            features, routing = model.branch(model.stem(sampled.tokens[:, :-1]))
            log_probs = model.token_log_probs(features, sampled.tokens[:, 1:])
        mask = sampled.response_mask
        near(log_probs[mask], sampled.log_probs[mask], "recorded log-probabilities")
        near(routing.expert_log_probs(sampled.experts)[mask], sampled.expert_log_probs[mask], "recorded routes")
    assert torch.equal(rows[0].tokens, rows[1].tokens.cpu()), "greedy answers differ"
    near(rows[0].log_probs, rows[1].log_probs, "log-probabilities")


@check
def large_head(device):
    """The head in blocks over 50,257 words: LM loss, log-probabilities and gradients."""
    results = []
    for where in ("cpu", device):
        model = bench.build(sizes(where), 50257)
        x = torch.randn(64, model.config.n_embd, generator=rng("x")).to(where).requires_grad_()
        targets = torch.randint(50257, (64,), generator=rng("targets")).to(where)
        loss, _ = model.lm_loss(x, targets)
        log_probs = model.token_log_probs(x, targets)
        results.append((loss, log_probs, *torch.autograd.grad(loss + log_probs.mean(), [x, model.wte.weight])))
    for a, b in zip(*results, strict=True):
        near(a, b, "head")


@check
def bfloat16(device):
    """Loss and gradient of an LM step in bfloat16 beside float32."""
    results = []
    for dtype in ("float32", "bfloat16"):
        args = sizes(device, dtype)
        run = bench.Steps(bench.build(args, 257), args)
        batch = run.task.batch(0).to(run.model.wte.weight.device)
        with run.autocast:
            ((loss, _),) = train.lm_losses(run.model, batch, run.args, 0)
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten().float() for p in run.model.parameters()])))
    (a, g), (b, h) = results
    assert (a - b).abs() < 0.01 * a, f"loss {a} in float32, {b} in bfloat16"
    cosine = torch.nn.functional.cosine_similarity(g, h, dim=0)
    assert cosine > 0.99, f"cosine of the gradients {cosine}"


@check
def compiles_whole(device):
    """stem and branch as train.py --compile compiles them, in bfloat16 and in one graph each, along routes too."""
    torch._dynamo.reset()
    args = sizes(device, "bfloat16")
    model = bench.build(args, 257)
    tokens = torch.randint(257, (4, 64), generator=rng("tokens")).to(device)
    stem, branch = torch.compile(model.stem, fullgraph=True), torch.compile(model.branch, fullgraph=True)
    drawn = train.Routes(
        torch.randint(8, (4, 64, 2, 1), generator=rng("r")), torch.rand(4, 64, 2, generator=rng("f")) < 0.6
    )
    drawn = drawn._replace(experts=drawn.experts.to(device), forced=drawn.forced.to(device))
    with bench.autocast(args):
        for routes in (None, drawn):
            features, routing = branch(stem(tokens), routes)
            (features.float().square().mean() + routing.logits.logsumexp(-1).mean()).backward()
            expected = model.branch(model.stem(tokens), routes)[0]
            near(features.float(), expected.float(), "compiled features", atol=0.1, rtol=0.1)


@check
def no_wait_for_the_device(device):
    """Forward, losses and backward of the model read nothing on the host (CUDA alone can tell)."""
    args = sizes(device, "bfloat16")
    model, tokens = bench.build(args, 257), torch.randint(257, (4, 257), generator=rng("tokens")).to(device)
    for strict in (False, True):  # once before: what is set up once may wait
        if strict and torch.device(device).type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with bench.autocast(args):
                out = model(tokens[:, :-1], tokens[:, 1:])
                (out.lm_loss + out.balance_loss.sum() + out.z_loss.sum()).backward()
        finally:
            if torch.device(device).type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    failed = 0
    for f in CHECKS:
        try:
            f(args.device)
            print(f"ok      {f.__name__}", flush=True)
        except Exception as error:  # whatever it is, the others are worth knowing too
            failed += 1
            print(f"FAILED  {f.__name__}: {str(error)[:2000] or repr(error)}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
