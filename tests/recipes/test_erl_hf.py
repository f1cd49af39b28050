"""ERL on a transformers model: as written down, on two processes as on one, after a stop as without."""

import contextlib
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
from moe import router_losses  # noqa: E402
from recipes import erl_hf  # noqa: E402
from recipes.hf_routing import Routes, find_routers, impose  # noqa: E402
from recipes.hf_text import load_model, load_windows  # noqa: E402


def arguments(**changes):
    return SimpleNamespace(**{**vars(erl_hf.parse(["--out", "unused"])), **changes})


def close(a, b, tolerance=1e-5):
    """Within a share of the largest number; there are tensors without any, the shared expert's of width 0."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().amax().item() if b.numel() else 0)


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


def forward_by_the_book(model, tokens, gradient):
    """What erl.py asks for, of a whole batch: the routers' logits are computed from what their blocks are given."""
    routers, blocks = zip(*find_routers(model), strict=True)

    def forward(routes):
        rows, hidden = tokens if routes is None else tokens.repeat(3, 1), []
        hooks = [block.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for block in blocks]
        with contextlib.nullcontext() if routes is None else impose(model, Routes(*routes)):
            log_probs = model(input_ids=rows[:, :-1]).logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1)
        for hook in hooks:
            hook.remove()
        if routes is not None and gradient == "router":
            hidden = [x.detach() for x in hidden]
        logits = torch.stack([x @ router.weight.T for x, router in zip(hidden, routers, strict=True)], 2)
        loss = -log_probs.mean()
        for window in logits.split(1) if routes is None else ():  # balance and z losses are of a window each
            balance, z, _ = router_losses(window, window.topk(routers[0].top_k).indices)
            loss = loss + 0.001 * (balance.sum() + z.sum()) / len(tokens)
        return log_probs, logits.log_softmax(-1), loss

    return forward


@pytest.mark.parametrize("gradient, top_k, renormalised", [("router", 1, True), ("all", 1, False), ("all", 2, True)])
def test_a_step_is_the_loss_of_its_batch_by_the_book(tiny, gradient, top_k, renormalised, monkeypatch):
    """In value and gradient, with the routes that each window drew. The RL loss reaches the routers alone with
    `router`, and more with `all`."""
    model, tokens = tiny
    for router, _ in find_routers(model):
        monkeypatch.setattr(router, "top_k", top_k)
        monkeypatch.setattr(router, "norm_topk_prob", renormalised)
    metrics, grads = gradient_of(model, tokens, gradient=gradient)
    mask, forward = torch.ones(3, 24, dtype=torch.bool), forward_by_the_book(model, tokens, gradient)
    draws = [erl.random_routes(3, 24, 2, 8, top_k, 0.6, generator=erl_hf.rng(0, "routes", 0, i)) for i in range(3)]
    routes = tuple(torch.stack(of_all, 1).flatten(0, 1) for of_all in zip(*draws, strict=True))  # pass, then window
    model.zero_grad()
    with monkeypatch.context() as m:
        m.setattr(erl, "random_routes", lambda *_, **__: routes)
        paths = explore(forward, mask, top_k, rounding_units=erl_hf.ROUNDING_UNITS)
    ((loss, whole),) = erl_objective(forward, paths)
    loss.backward()
    assert paths.advantages.any() and metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in whole:
        assert metrics[name] == pytest.approx(whole[name].item(), rel=1e-4, abs=1e-6)
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(grads[name], p.grad)

    _, lm = gradient_of(model, tokens, arm="lm")
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
