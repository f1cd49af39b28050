"""What the tests of training share: a model of milliseconds, a step's arguments, and runs of child processes."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

import data
import train
from moe import GPT, MoEConfig
from support.tasks import Batch, rng

ROOT = Path(__file__).parents[1]
MICRO = dict(n_layer=4, n_head=2, n_embd=32, context=32)
BYTES = data.load_tokenizer("bytes")


def args_of(flags: str) -> argparse.Namespace:
    return train.parse(shlex.split(flags))


def make(seed=0, dtype=torch.float64, **changes) -> tuple[GPT, Batch]:
    """A model all of whose parameters matter, and a batch of two rows, one with a prompt and one with padding."""
    sizes = dict(vocab_size=19, context=10, n_layer=4, n_head=2, n_embd=16, n_expert=4, moe_every=2)
    model = GPT(MoEConfig(**sizes | changes), rng(seed)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=rng(seed, name), dtype=torch.float64)
            p.copy_((0.8 if "router" in name else 0.25) * draw + (1 if "ln_" in name and "weight" in name else 0))
    B, T = 2, 7
    tokens = torch.randint(0, sizes["vocab_size"], (B, T + 1), generator=rng(seed, "tokens"))
    mask, routed = (torch.ones(B, T, dtype=torch.bool) for _ in range(2))
    mask[0, :2] = False  # a prompt: routed, not learned
    mask[1, 5:] = routed[1, 5:] = False  # padding
    return model, Batch(tokens, mask, routed)


def step_args(**changes) -> argparse.Namespace:
    """The arguments that a step on text reads."""
    erl = dict(
        n_perturb=3,
        alpha=0.6,
        erl_grad="all",
        wpl=False,
        advantage="static",
        clip_eps=0.2,
        delta=0.7,
        rounding_units=8.0,
    )
    common = dict(inner_epochs=1, top_k=1, balance_coef=1e-3, z_coef=1e-3, jitter=0.0, seed=0, dtype="float32")
    return argparse.Namespace(**erl | common | changes)


def gradients(model, loss) -> dict:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def assert_same_gradients(model, loss, expected, **tolerance):
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def places(mask):
    return [(b, t) for b, t in np.ndindex(*mask.shape) if mask[b, t]]


# ---------------------------------------------------------------------------------------------------------------------
# Run folders
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(out="r") -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def summary_of(out="r") -> dict:
    return json.loads(Path(out, "summary.json").read_text())


def bare(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}


def weights_of(out, name="checkpoint") -> bytes:
    return Path(out, name, "model.safetensors").read_bytes()


def assert_same_run(a, b):
    """The same bytes of weights, equal optimizer, metrics and summary but for the clock."""
    assert weights_of(a) == weights_of(b) and weights_of(a, "best") == weights_of(b, "best")
    left, right = (torch.load(Path(f, "checkpoint", "state.pt"), weights_only=True) for f in (a, b))
    assert left["optimizer"]["param_groups"] == right["optimizer"]["param_groups"]
    states = [s.pop("optimizer")["state"] for s in (left, right)]
    assert states[0].keys() == states[1].keys() and states[0]
    for i in states[0]:
        assert all(torch.equal(states[0][i][k], states[1][i][k]) for k in states[0][i])
    clock = {"seconds": 0, "metrics_bytes": 0}  # the clock's digits have bytes too
    assert left | clock == right | clock
    rows = [[bare(row) for row in rows_of(f)] for f in (a, b)]
    assert rows[0] == rows[1] and len(rows[0]) > 3
    assert bare(summary_of(a)) == bare(summary_of(b))
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))


# A process that trains a small model several times; each run is a child of its own, killed where its line says.
DRIVER = """
    import os, random, signal, sys, time, traceback
    sys.path[:0] = [{root!r}]
    import torch
    torch.set_num_threads(1)
    import moe, train, data
    from support import evaluation, run_folder
    moe.SIZES["tiny"] = {micro!r}
    pydocs, problems = data._pydocs, data.DATASETS["addition"].problems
    texts = {{split: pydocs(split)[:3000] for split in data.SPLITS}}
    data._pydocs = texts.get
    few = list(problems())[:300]
    object.__setattr__(data.DATASETS["addition"], "problems", lambda: few)
    data.reward = lambda spec, response, example: sum(map(ord, response)) % 3 / 2  # an untrained model earns some

    train.plot_curves = lambda out: None  # half of a run's time

    def kill(signum=signal.SIGKILL):
        os.kill(os.getpid(), signum)

    def at_step(n, signum=signal.SIGKILL):  # when a step is done, before its checkpoint
        class Bar(run_folder.Progress):
            steps = 0
            def update(self, *args):
                super().update(*args)
                self.steps += 1
                if self.steps == n:
                    kill(signum)
        run_folder.Progress = Bar

    def after_checkpoint(n):
        real = run_folder.Run._save
        def save(run):
            real(run)
            if run.step == n:
                kill()
        run_folder.Run._save = save

    def between_renames(n):
        real, calls = os.rename, []
        def rename(a, b):
            calls.append(a)
            real(a, b)
            if len(calls) == n:
                kill()
        os.rename = rename

    def in_evaluation(n):  # of the n-th set that is scored, after its first batch
        class Bar(evaluation.Progress):
            begun = 0
            def __iter__(self):
                Bar.begun += 1
                for item in super().__iter__():
                    yield item
                    if Bar.begun == n:
                        kill()
        evaluation.Progress = Bar

    def in_write(owner, name, n):  # of a file: half of what the n-th call of a function writes is on the disk
        real, sizes = getattr(owner, name), []
        def write(*args, **more):
            path = getattr(args[0], "metrics_path", args[-1])
            sizes.append(os.path.getsize(path) if os.path.exists(path) else 0)
            real(*args, **more)
            if len(sizes) == n:
                os.truncate(path, (sizes[-1] + os.path.getsize(path)) // 2)
                kill()
        setattr(owner, name, write)

    def run(line, patch=lambda: None, killed_after=None):
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
        if killed_after is not None:
            time.sleep(killed_after)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
"""


def drive(folder, body: str):
    script = textwrap.dedent(DRIVER.format(root=str(ROOT), micro=MICRO)) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done
