"""ERL on a transformers model: the same as on moe.py, on two processes as on one, after a stop as without."""

import copy
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate", reason="pip install -r recipes/requirements.txt")
transformers = pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from tiny_hf import save_tiny_moe  # noqa: E402

import erl  # noqa: E402
from erl import erl_objective, explore  # noqa: E402
from moe import GPT, MoEConfig, Routes, mix_experts, router_losses, token_log_probs  # noqa: E402
from recipes import erl_hf  # noqa: E402
from recipes.hf_text import load_model, load_windows  # noqa: E402


def arguments(**changes):
    return SimpleNamespace(**{**vars(erl_hf.parse(["--out", "unused"])), **changes})


def close(a, b, tolerance=1e-5):
    """Within a share of the largest number; there are tensors without any, the shared expert's of width 0."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().amax().item() if b.numel() else 0)


class TopKRouter(torch.nn.Module):
    """moe.py's router with the three outputs that every router of transformers has."""

    def __init__(self, router, config):
        super().__init__()
        self.weight, self.top_k, self.norm_topk_prob = router.weight, config.top_k, config.gate == "renorm"

    def forward(self, x):
        logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        weights, experts = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True) if self.norm_topk_prob else weights, experts


class SparseMLP(torch.nn.Module):
    """moe.py's block of experts with a gate in it, as transformers has them."""

    def __init__(self, moe):
        super().__init__()
        self.gate, self.experts = TopKRouter(moe.router, moe.config), moe.experts

    def forward(self, x, routes, noise):
        _, weights, experts = self.gate(x)
        return mix_experts(x.flatten(0, 1), experts, weights, *self.experts.parameters()).view_as(x), None


def like_transformers(model: GPT):
    """A copy of moe.py's model with such blocks, which takes and returns what a model of transformers does."""
    inner = copy.deepcopy(model)
    for i in model.config.moe_blocks:
        inner.blocks[i].mlp = SparseMLP(inner.blocks[i].mlp)
    outer = torch.nn.ModuleList([inner])
    outer.forward = lambda input_ids, **_: SimpleNamespace(logits=inner.head(inner(input_ids)[0]))
    return outer


def forward_of_moe(model: GPT, tokens, mask, gradient):
    """train.py's ERL in its plainest form."""

    def forward(routes):
        m = 1 if routes is None else 3
        features, routing = model(tokens[:, :-1].repeat(m, 1), routes=routes and Routes(*routes))
        log_probs = token_log_probs(features, model.wte.weight, tokens[:, 1:].repeat(m, 1))
        if routes is None:
            balance, z, _ = router_losses(routing.logits, routing.experts, mask)
            loss = -(log_probs * mask).sum() / mask.sum() + 0.001 * (balance.sum() + z.sum())
            return log_probs, routing.logits.log_softmax(-1), loss
        logits = model.route_again(routing.inputs) if gradient == "router" else routing.logits
        return log_probs.detach(), logits.log_softmax(-1), None

    return forward


@pytest.mark.parametrize("gradient", ["router", "all"])
@pytest.mark.parametrize("top_k, gate", [(1, "renorm"), (2, "renorm"), (1, "prob"), (2, "prob")])
def test_the_same_weights_in_moe_py_give_the_same_loss_and_gradient(gradient, top_k, gate):
    config = MoEConfig(50, 32, 4, 4, 32, n_expert=4, top_k=top_k, gate=gate)
    ours, draw = GPT(config, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    for i in config.moe_blocks:  # experts that differ
        torch.nn.init.normal_(ours.blocks[i].mlp.experts.w_out, std=0.3, generator=draw)
    theirs = like_transformers(ours)
    tokens, mask = torch.randint(0, 50, (2, 13), generator=draw), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    hf_forward, results = erl_hf.make_forward(theirs, tokens, mask, arguments(gradient=gradient)), []
    for model, forward in ((ours, forward_of_moe(ours, tokens, mask, gradient)), (theirs, hf_forward)):
        paths = explore(forward, mask, top_k, generator=torch.Generator().manual_seed(1))
        ((loss, metrics),) = erl_objective(forward, paths)
        loss.backward()
        routers = [p.grad for n, p in model.named_parameters() if n.endswith(("router.weight", "gate.weight"))]
        results.append((paths, loss, metrics, torch.stack(routers)))
    (paths, loss, metrics, grad), (hf_paths, hf_loss, hf_metrics, hf_grad) = results
    assert (paths.advantages != 0).any() and metrics["rl_loss"] != 0 and grad.shape == (2, 4, 32)
    assert torch.equal(paths.S, hf_paths.S) and torch.equal(paths.advantages, hf_paths.advantages)
    close(hf_loss, loss)
    close(hf_grad, grad)
    torch.testing.assert_close(hf_metrics, metrics, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def tiny(folder):
    """That model, and a batch of three windows."""
    model, tokenizer = load_model(folder)
    return model, load_windows("pydocs", "test", tokenizer, 24, limit=3)[0]


def gradient_of(model, tokens, **changes):
    one = SimpleNamespace(num_processes=1, process_index=0)
    metrics = erl_hf.step_gradient(model, tokens, arguments(**changes), 0, one)
    return metrics, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["router", "all"])
def test_the_sum_over_windows_is_the_loss_of_the_batch(tiny, gradient, monkeypatch):
    """Against erl_objective on all windows at once, with the routes that each window drew. Balance and z are off: they
    are of a window each. The RL loss reaches the routers alone with `router`, and more with `all`."""
    model, tokens = tiny
    metrics, grads = gradient_of(model, tokens, gradient=gradient, aux=0.0)
    mask = torch.ones(3, 24, dtype=torch.bool)
    forward = erl_hf.make_forward(model, tokens, mask, arguments(gradient=gradient, aux=0.0))
    draws = [erl.random_routes(3, 24, 2, 8, 1, 0.6, generator=erl_hf.rng(0, "routes", 0, i)) for i in range(3)]
    routes = tuple(torch.stack(of_all, 1).flatten(0, 1) for of_all in zip(*draws, strict=True))  # pass, then window
    model.zero_grad()
    monkeypatch.setattr(erl, "random_routes", lambda *_, **__: routes)
    ((loss, whole),) = erl_objective(forward, explore(forward, mask, 1, rounding_units=erl_hf.ROUNDING_UNITS))
    loss.backward()
    monkeypatch.undo()
    assert whole["rl_loss"] != 0 and metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in whole:
        assert metrics[name] == pytest.approx(whole[name].item(), rel=1e-4, abs=1e-6)
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(grads[name], p.grad)

    _, lm = gradient_of(model, tokens, arm="lm", aux=0.0)
    routers = {n for n in lm if n.endswith("mlp.gate.weight")}
    gaps = {n: (grads[n] - lm[n]).abs().amax().item() for n in lm if lm[n].numel()}
    moved = {n for n, gap in gaps.items() if gap > 1e-5 * lm[n].abs().amax() + 1e-9}
    assert routers <= moved and (moved == routers) == (gradient == "router")


def test_arms(tiny):
    """Without replaced decisions ERL is LM; each control moves the routers elsewhere than ERL does."""
    model, tokens = tiny
    lm, grads = gradient_of(model, tokens, arm="lm")
    none, same = gradient_of(model, tokens, alpha=0.0)
    assert none["loss"] == pytest.approx(lm["loss"]) and none["rl_loss"] == 0
    torch.testing.assert_close(same, grads, rtol=1e-5, atol=1e-8)
    gates = {arm: gradient_of(model, tokens, arm=arm)[1]["model.layers.1.mlp.gate.weight"] for arm in erl_hf.ARMS}
    for arm, gate in gates.items():
        assert all((gate - other).abs().max() > 1e-6 for name, other in gates.items() if name != arm)


def command(folder, out, *more):
    settings = "--dataset pydocs --context 24 --batch-size 3 --eval-windows 3 --checkpoint-every 2 --lr 1e-3".split()
    return ["--model", folder, "--out", str(out), *settings, *more]


def log(out):
    return [json.loads(x) | {"seconds": None} for x in open(out / "metrics.jsonl")]


def test_stopped_and_continued_is_the_same_to_the_last_bit(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the token cache
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert erl_hf.main(command(folder, whole, "--steps", "4")) == 0
    step_gradient = erl_hf.step_gradient

    def stopping(model, tokens, args, step, accelerator):
        if step == 3:  # after the checkpoint of step 2 and the line of step 3
            raise KeyboardInterrupt
        return step_gradient(model, tokens, args, step, accelerator)

    with monkeypatch.context() as m:
        m.setattr(erl_hf, "step_gradient", stopping)
        assert erl_hf.main(command(folder, parts, "--steps", "4")) == 130
    assert erl_hf.main(command(folder, parts, "--steps", "4", "--resume")) == 0
    a, b = (torch.load(out / "checkpoint.pt") for out in (whole, parts))
    assert a["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 / 4)  # of the last of four steps
    assert a["step"] == b["step"] == 4
    one, other = ((x["model"], x["optimizer"]["state"]) for x in (a, b))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    first, *_, last = log(whole)
    assert log(whole) == log(parts) and [line["step"] for line in log(whole)] == [0, 1, 2, 3, 4, 4]
    assert last["perplexity"] < first["perplexity"]
    saved = transformers.AutoModelForCausalLM.from_pretrained(whole / "model")
    assert torch.equal(saved.model.layers[1].mlp.gate.weight, a["model"]["model.layers.1.mlp.gate.weight"])
    assert erl_hf.main(command(folder, whole, "--steps", "4")) == 2  # a run is there already
    assert erl_hf.main(command(folder, whole, "--steps", "5", "--resume")) == 2  # another run
    assert "--steps" in capsys.readouterr().err


def test_two_processes_compute_what_one_does(folder, tmp_path, monkeypatch):
    """Loss, size of the gradient (AdamW's first step hides it), weights."""
    monkeypatch.chdir(tmp_path)
    assert erl_hf.main(command(folder, tmp_path / "one", "--steps", "2")) == 0
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    line += ["recipes.erl_hf", *command(folder, tmp_path / "two", "--steps", "2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    how = dict(cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    done = subprocess.run(line, env=environment, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 4 and one[1]["rl_loss"] != 0
    for x, y in zip(one, two, strict=True):
        for name in ("loss", "rl_loss", "grad_norm", "perplexity"):
            assert y.get(name, 0) == pytest.approx(x.get(name, 0), rel=1e-4, abs=1e-6)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("one", "two"))
    close(b["model.layers.1.mlp.gate.weight"], a["model.layers.1.mlp.gate.weight"], 1e-3)


def test_a_full_disk_and_mistakes_are_told_in_one_sentence(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    nowhere, below_a_file = str(tmp_path / "nowhere"), str(tmp_path / "file" / "run")
    mistakes = [("--model", nowhere), ("--out", below_a_file), ("--context", "500"), ("--batch-size", "10000000")]
    for flag, value in mistakes:  # no folder stays behind: the right command is not taken for another run's
        assert erl_hf.main([*command(folder, tmp_path / "run"), flag, value]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("erl_hf: ") and (flag in error or value in error)

    run, limits = command(folder, tmp_path / "run", "--steps", "1"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file may be larger
    try:
        assert erl_hf.main(run) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pt could not be written" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "metrics.jsonl"]
    assert erl_hf.main([*run, "--resume"]) == 0
