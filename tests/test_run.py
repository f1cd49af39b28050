"""A run's folder, its checkpoints and its end: killed and resumed runs, the best weights, what stops a user."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from training import (
    args_of,
    assert_same_run,
    assert_same_weights,
    drive,
    metrics_of,
    summary_of,
    update_by_the_book,
    weights_of,
    without_clock,
)

import moe
import train
from moe import GPT, MoEConfig, router_losses, upcycle
from support import checkpoints
from support import run as runs
from support.checkpoints import load_checkpoint, load_model, save_checkpoint
from support.errors import UserError
from support.optimizer import learning_rate, make_optimizer
from support.tasks import load_task, rng

LITTLE = "--dataset pydocs --batch-size 2 --eval-samples 2 --test-samples 2"

# ------------------------------------------------------------------------------------------ a whole run, by the book


def book_rate(step, steps, peak):
    """Up over a twentieth of the steps (at most 100), then linear to 0, counted from the phase's first step."""
    warmup = min(100, max(1, steps // 20))
    return peak * (step + 1) / warmup if step < warmup else peak * (steps - step) / (steps - warmup)


def book_phase(model, task, steps, peak):
    """Batches in their order, the LM loss with balance and z losses, the schedule and AdamW. -> the gradients' norms"""
    norms, moments = [], {}
    for step in range(steps):
        batch = task.batch(step)
        features, routing = model(batch.tokens[:, :-1])
        loss = F.cross_entropy(model.head(features).flatten(0, 1), batch.tokens[:, 1:].flatten())
        if routing.logits.shape[2]:
            balance, z, _ = router_losses(routing.logits, routing.experts)
            loss = loss + 1e-3 * balance.sum() + 1e-3 * z.sum()
        norms.append(update_by_the_book(model, loss, book_rate(step, steps, peak), moments))
    return norms


def test_a_run_of_two_phases_by_the_book(micro):
    """Dense steps, upcycling, MoE steps: batches, rates, decay, clipping and losses make these weights."""
    args = args_of(f"--algo lm {LITTLE} --pretrain-steps 3 --steps 4 --lr 2e-3 --out r --checkpoint-every 3")
    train.run(args)
    task, target = load_task(args, 32, generative=False), MoEConfig(vocab_size=257, **moe.SIZES["tiny"])
    model = GPT(target.dense(), rng(0, "weights"))
    norms = book_phase(model, task, 3, 1e-3)
    model = upcycle(model, target, rng(0, "routers"))
    norms += book_phase(model, task, 4, 2e-3)
    assert_same_weights(weights_of("r"), model.state_dict())
    last = next(r for r in metrics_of() if r["step"] == 7 and r["phase"] == "lm")
    assert last["lr"] == pytest.approx(book_rate(3, 4, 2e-3))
    assert last["grad_norm"] == pytest.approx(norms[-1], rel=0.01)
    assert last["clipped_share"] == pytest.approx(sum(n > 1 for n in norms) / 7)
    assert load_checkpoint("r/checkpoint/model.safetensors")[1]["tokens"] == 7 * 2 * 32


def test_learning_rates():
    """The schedule; routers have a rate of their own; matrices decay, biases and norms do not."""
    assert learning_rate(0, 1, 0.5) == 0.5
    for steps in (7, 40, 4000):
        expected = [book_rate(s, steps, 0.5) for s in range(steps)]
        assert [learning_rate(s, steps, 0.5) for s in range(steps)] == pytest.approx(expected)
    model = GPT(MoEConfig(n_layer=2, n_head=1, n_embd=8))
    groups = make_optimizer(model, 0.1, router_factor=7.0).param_groups
    routers = {p for n, p in model.named_parameters() if "router" in n}
    assert {p for g in groups if g["factor"] == 7 for p in g["params"]} == routers
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    matrices = {p for n, p in model.named_parameters() if not n.endswith(("bias", "b_in", "b_out")) and p.ndim > 1}
    assert {p for g in groups if g["weight_decay"] for p in g["params"]} == matrices


# ------------------------------------------------------------------------------------------ killed and resumed runs

RUNS = {
    "erl": f"--algo erl --erl-grad all {LITTLE} --inner-epochs 2 --jitter 0.01",
    "rais": "--algo rais --dataset addition --batch-size 4 --prompts-per-step 4 --group-size 4 --minibatches 2 "
    "--eval-samples 8 --test-samples 8 --max-new-tokens 4 --rollout-dtype bfloat16 --replay r3 --mismatch tis",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_bytes(name, tmp_path):
    """Killed in either phase, at the border, in a save, before and after an evaluation, before any checkpoint; Ctrl-C
    and SIGTERM save first. The clock goes on where it stopped."""
    body = f"""
    flags = {RUNS[name]!r} + " --pretrain-steps 4 --steps 5 --eval-every 3 --checkpoint-every 2 --out "
    assert run(flags + "straight") == 0
    killed = {{
        "early": lambda: at_step(1), "first": lambda: at_step(3), "second": lambda: at_step(8),
        "border": lambda: at_call(runs.Run, "save_if_due", 4), "done": lambda: at_call(runs.Run, "save_if_due", 9),
        "saving": lambda: at_call(checkpoints.os, "replace", 4, before=True),
        "saved": lambda: at_call(checkpoints.os, "replace", 4),
        "scored": lambda: at_call(runs.Run, "evaluate_if_due", 6),
        "better": lambda: at_call(runs.Run, "evaluate_if_due", 9),  # best/ is newer than the checkpoint
        "SIGINT": lambda: at_step(4, signal.SIGINT), "SIGTERM": lambda: at_step(7, signal.SIGTERM),
    }}
    if {name!r} != "erl":
        killed = {{out: killed[out] for out in ("first", "second", "saved")}}
    for out, patch in killed.items():
        assert run(flags + out, patch) == (130 if "SIG" in out else -signal.SIGKILL), out
        assert not os.path.exists(out + "/summary.json"), out
        if out == "second":
            assert run("--resume --out second", lambda: at_step(1)) == -signal.SIGKILL
        assert run("--resume --out " + out) == 0, out
    print(*killed)
    """
    done = drive(tmp_path, body)
    outs = [out for out in done.stdout.split() if (tmp_path / out).is_dir()]
    learned = [row for row in metrics_of(tmp_path / "straight") if row["phase"] == name]
    assert len(outs) >= 3 and any(row.get("updates", row.get("advantage_positive")) for row in learned)
    for out in outs:
        assert_same_run(tmp_path / "straight", tmp_path / out)
        clock = [row["seconds"] for row in metrics_of(tmp_path / out) if "seconds" in row]
        assert clock == sorted(clock)
    for out, step in (("SIGINT", 4), ("SIGTERM", 7)) if name == "erl" else ():  # 7: no checkpoint was due
        command = f"python train.py --resume --out {out}"
        assert f"interrupted at step {step} of 9, state saved; continue with: {command}\n" in done.stderr
        assert f"going on at step {step} of 9" in done.stderr
    assert "Traceback" not in done.stderr


def test_looking_at_a_run_does_not_change_it(micro):
    """Weights depend on no evaluation and no checkpoint; a finished run resumes to itself; another seed differs."""
    for out, often in (("a", 1), ("b", 100)):
        train.run(args_of(f"{RUNS['erl']} --pretrain-steps 2 --steps 3 --eval-every {often} --out {out}"))
    train.run(args_of(f"{RUNS['erl']} --pretrain-steps 2 --steps 3 --seed 1 --out c"))
    a, b, c = map(weights_of, "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    before, rows = summary_of("a"), metrics_of("a")
    train.run(args_of("--resume --out a"))
    assert without_clock(summary_of("a")) == without_clock(before)
    assert list(map(without_clock, metrics_of("a"))) == list(map(without_clock, rows))


# ------------------------------------------------------------------------------------------------------- evaluation

ANSWERS = "--dataset addition --prompts-per-step 4 --group-size 4 --max-new-tokens 4 --batch-size 4"
SCORES = [  # of validation: at step 1, at the end of the supervised phase, and at the algorithm's steps 3 to 6
    (f"--algo lm {LITTLE}", "perplexity", [1, 1, 9, 5, 7, 6]),
    (f"--algo grpo {ANSWERS}", "accuracy", [0.9, 0.9, 0.2, 0.5, 0.3, 0.4]),
]


@pytest.mark.parametrize(("flags", "metric", "scores"), SCORES)
def test_best_is_of_the_sets_own_metric_since_the_algorithm_began(flags, metric, scores, micro, monkeypatch):
    """Weights of another step in best/, or another run's, or none, are refused in a sentence."""
    validation, last_and_best = iter(scores), itertools.cycle([0.6, 0.8])

    def evaluate(model, task, name, args, final=False):
        value = next(validation) if name == "validation" else next(last_and_best) if final else 0.7
        return {"other": -value, metric: value, "samples": 2}

    monkeypatch.setattr(runs, "evaluate", evaluate)
    summary = train.run(args_of(f"{flags} --pretrain-steps 2 --steps 4 --eval-every 1 --out r"))
    assert summary["best_step"] == 4 == load_model("r/best/model.safetensors")[1]["step"]
    assert [summary[name + metric] for name in ("validation_", "", "best_")] == [scores[-1], 0.6, 0.8]
    assert summary.get(f"before_{metric}") == (0.7 if metric == "accuracy" else None)
    model, kept = load_model("r/best/model.safetensors")
    for other in ({"step": 5}, {"run": "other"}, None):
        if other:
            save_checkpoint("r/best/model.safetensors", model, **kept | other)
        with pytest.raises(UserError, match="does not hold this run's weights"):
            train.run(args_of("--resume --out r"))
        shutil.rmtree("r/best", ignore_errors=True)


# -------------------------------------------------------------------------------------------------- what stops a user


def test_a_run_that_is_not_what_it_was_does_not_resume(micro, monkeypatch, capsys):
    """Other flags, other records, an earlier version's flags (or it goes on as it was), files that were cut."""
    train.run(args_of(f"--algo lm {LITTLE} --pretrain-steps 1 --steps 2 --out r"))
    with pytest.raises(UserError, match="--lr was 0.0003 when r began"):
        args_of("--resume --out r --lr 1")
    real = train.load_task
    with monkeypatch.context() as patched, pytest.raises(UserError, match="records of pydocs have changed"):
        patched.setattr(train, "load_task", lambda *a: real(*a)._replace(fingerprint="other"))
        train.run(args_of("--resume --out r"))
    config = json.loads(Path("r/config.json").read_text())
    for change, says in (({"replay": "routing"}, "--replay r3"), ({"expert_capacity": 4}, "expert_capacity 4")):
        Path("r/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=says):
            args_of("--resume --out r")
    Path("r/config.json").write_text(json.dumps(config | {"expert_capacity": 0}))
    assert args_of("--resume --out r").steps == 2
    Path("r/config.json").write_text(json.dumps(config))
    capsys.readouterr()  # what was said so far
    for file, says in (("metrics.jsonl", "shorter than it was"), ("checkpoint/model.safetensors", "not a readable")):
        whole = Path("r", file).read_bytes()
        Path("r", file).write_bytes(whole[: len(whole) // 2])
        assert train.main(["--resume", "--out", "r"]) == 2
        assert says in (error := capsys.readouterr().err) and error.count("\n") == 1
        Path("r", file).write_bytes(whole)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Nothing half-written stays behind."""
    monkeypatch.chdir(tmp_path)
    model = GPT(MoEConfig(n_layer=2, n_head=1, n_embd=8))
    save_checkpoint("model", model, step=1)
    monkeypatch.setattr(checkpoints.os, "replace", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="could not be written .*No space left"):
        save_checkpoint("model", model, step=2)
    assert load_model("model")[1] == {"step": 1} and os.listdir() == ["model"]


def test_one_process_a_folder_and_file_systems_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "a", "w") as first, open(tmp_path / "a", "w") as second:
        runs.lock_file(first, "r")
        with pytest.raises(UserError, match="in use by another process"):
            runs.lock_file(second, "r")
        monkeypatch.setattr(fcntl, "flock", lambda *_: open("/no/such/lock"))  # an OSError, as ENOLCK is
        runs.lock_file(second, "r")


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_broken_numbers_are_never_saved(where, micro, monkeypatch):
    real = train.lm_losses

    def losses(model, *rest, **more):
        for loss, metrics in real(model, *rest, **more):
            if where == "weights":
                model.ln_f.bias.data[0] = torch.nan
                yield model.wte.weight.sum(), metrics
            else:
                yield loss * torch.nan, {"loss": loss * torch.nan}

    monkeypatch.setattr(train, "lm_losses", losses)
    args = args_of(f"--algo lm {LITTLE} --pretrain-steps 0 --steps 2 --checkpoint-every 1 --eval-every 9 --out r")
    with pytest.raises(UserError, match="nan at step 1|not finite at step 1"):
        train.run(args)
    assert not os.path.exists("r/checkpoint")
