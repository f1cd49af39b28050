"""What the tests of training share: a model of milliseconds, a step's arguments, and runs of child processes."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import data
import train
from support.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[1]
MICRO = dict(n_layer=4, n_head=2, n_embd=32, context=32)
BYTES = data.load_tokenizer("bytes")


def args_of(flags: str) -> argparse.Namespace:
    return train.parse(shlex.split(flags))


def assert_same_weights(ours: dict, theirs: dict):
    for name, w in theirs.items():
        close = dict(atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(ours[name], w, **close)


def update_by_the_book(model, loss, rate, moments) -> float:
    """AdamW: the gradient clipped to the norm 1, Adam's recursion (0.9, 0.999), decay 0.1 of matrices alone. -> norm"""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in grads if g is not None]).norm().item()
    for name, p, g in zip(names, parameters, grads, strict=True):
        if g is not None:
            m, v, n = moments.get(name, (0, 0, 0))
            g, n = g * min(1.0, 1 / (norm + 1e-6)), n + 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            moments[name] = m, v, n
            matrix = name.endswith(("weight", "w_in", "w_out")) and "ln_" not in name
            with torch.no_grad():
                p.mul_(1 - rate * 0.1 * matrix)
                p.sub_(rate * m / (1 - 0.9**n) / ((v / (1 - 0.999**n)).sqrt() + 1e-8))
    return norm


def metrics_of(out="r") -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def summary_of(out="r") -> dict:
    return json.loads(Path(out, "summary.json").read_text())


def without_clock(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "metrics_bytes")}


def weights_of(out, name="checkpoint") -> dict:
    return load_checkpoint(str(Path(out, name, "model.safetensors")))[0].state_dict()


def assert_same_run(a, b):
    """Equal weights, optimizer, metrics and summary but for the clock, to the bit."""
    for name in ("checkpoint", "best"):
        left, right = (load_checkpoint(str(Path(f, name, "model.safetensors"))) for f in (a, b))
        for x, y in ((left[0].state_dict(), right[0].state_dict()), (left[2], right[2])):
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        assert name == "best" or left[2]  # the optimizer
        ids = {"run": None}  # of config.json, which holds the folder's name
        assert without_clock(left[1] | ids) == without_clock(right[1] | ids)
    rows = [[without_clock(row) for row in metrics_of(f)] for f in (a, b)]
    assert rows[0] == rows[1] and len(rows[0]) > 3
    assert without_clock(summary_of(a)) == without_clock(summary_of(b))
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))


# A process that trains a small model several times; each run is a child of its own, killed where its line says.
DRIVER = """
    import os, signal, sys, time, traceback
    sys.path[:0] = [{root!r}]
    import torch
    torch.set_num_threads(1)
    import moe, train, data
    from support import checkpoints, run as runs
    moe.SIZES["tiny"] = {micro!r}
    pydocs, problems = data.DATASETS["pydocs"].text, data.DATASETS["addition"].problems
    texts = {{split: pydocs(split)[:3000] for split in data.SPLITS}}
    object.__setattr__(data.DATASETS["pydocs"], "text", texts.get)
    few = list(problems())[:300]
    object.__setattr__(data.DATASETS["addition"], "problems", lambda: few)
    data.reward = lambda spec, response, example: sum(map(ord, response)) % 3 / 2  # an untrained model earns some
    train.plot_curves = lambda out: None  # half of a run's time

    def kill(signum=signal.SIGKILL):
        os.kill(os.getpid(), signum)

    def at_call(owner, name, n, signum=signal.SIGKILL, before=False):  # of a function, when its n-th call has ended
        real, calls = getattr(owner, name), []
        def function(*args, **more):
            calls.append(0)
            if before and len(calls) == n:
                kill(signum)
            result = real(*args, **more)
            if not before and len(calls) == n:
                kill(signum)
            return result
        setattr(owner, name, function)

    def at_step(n, signum=signal.SIGKILL):  # when it is done, before its checkpoint
        at_call(runs.Run, "finish_step", n, signum)

    def run(line, patch=lambda: None):
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            try:
                patch()
                code = train.main(line.split())
            except BaseException:
                traceback.print_exc()
                code = 99
            sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
"""


def drive(folder, body: str):
    script = textwrap.dedent(DRIVER.format(root=str(ROOT), micro=MICRO)) + textwrap.dedent(body)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how = dict(cwd=folder, capture_output=True, text=True, timeout=900, env=environment)
    done = subprocess.run([sys.executable, "-c", script], **how)
    assert done.returncode == 0, done.stderr
    return done
