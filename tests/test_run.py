"""A run's folder, its checkpoints and its end: killed and resumed runs, the best weights, what stops a user."""

import errno
import json
import os
import shutil
from pathlib import Path

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
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

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
    task = load_task(args, 32, generative=False)
    target = MoEConfig(vocab_size=257, **moe.SIZES["tiny"])
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


@pytest.mark.parametrize("steps", [1, 7, 40, 4000])
def test_learning_rate(steps):
    assert [learning_rate(s, steps, 0.5) for s in range(steps)] == pytest.approx(
        [book_rate(s, steps, 0.5) for s in range(steps)] if steps > 1 else [0.5]
    )


def test_routers_have_a_rate_of_their_own():
    model = GPT(MoEConfig(n_layer=2, n_head=1, n_embd=8))
    groups = make_optimizer(model, 0.1, router_factor=7.0).param_groups
    routers = {p for n, p in model.named_parameters() if "router" in n}
    assert [g["factor"] for g in groups if set(g["params"]) & routers] == [7.0]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


# ------------------------------------------------------------------------------------------ killed and resumed runs

RUNS = {
    "erl": f"--algo erl --erl-grad all {LITTLE} --inner-epochs 2 --jitter 0.01",
    "rais": "--algo rais --dataset addition --batch-size 4 --prompts-per-step 4 --group-size 4 --minibatches 2 "
    "--eval-samples 8 --test-samples 8 --max-new-tokens 4 --rollout-dtype bfloat16 --replay r3 --mismatch tis",
}


@needs_fork
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_bytes(name, tmp_path):
    """Killed in either phase, at the border, in a save, before and after an evaluation, and before any checkpoint."""
    body = f"""
    flags = {RUNS[name]!r} + " --pretrain-steps 4 --steps 5 --eval-every 3 --checkpoint-every 2 --out "
    assert run(flags + "straight") == 0
    killed = {{
        "early": lambda: at_step(1), "first": lambda: at_step(3), "second": lambda: at_step(8),
        "border": lambda: at_call(runs.Run, "save_if_due", 4), "done": lambda: at_call(runs.Run, "save_if_due", 9),
        "saving": lambda: at_call(checkpoints.os, "replace", 4, before=True),
        "saved": lambda: at_call(checkpoints.os, "replace", 4),
        "scored": lambda: at_call(runs.Run, "evaluate_if_due", 6),
    }}
    if {name!r} != "erl":
        killed = {{out: killed[out] for out in ("first", "second", "saved")}}
    for out, patch in killed.items():
        assert run(flags + out, patch) == -signal.SIGKILL, out
        assert not os.path.exists(out + "/summary.json"), out
        if out == "second":
            assert run("--resume --out second", lambda: at_step(1)) == -signal.SIGKILL
        assert run("--resume --out " + out) == 0, out
    print(*killed)
    """
    outs = drive(tmp_path, body).stdout.split()
    outs = [out for out in outs if (tmp_path / out).is_dir()]
    learned = [row for row in metrics_of(tmp_path / "straight") if row["phase"] == name]
    assert len(outs) >= 3 and any(row.get("updates", row.get("advantage_positive")) for row in learned)
    for out in outs:
        assert_same_run(tmp_path / "straight", tmp_path / out)


@needs_fork
def test_ctrl_c_and_sigterm_save_and_resume_to_the_same_bytes(tmp_path):
    body = f"""
    flags = {RUNS["erl"]!r} + " --pretrain-steps 3 --steps 4 --eval-every 2 --checkpoint-every 100 --out "
    assert run(flags + "straight") == 0
    for out, step, signum in (("border", 3, signal.SIGINT), ("second", 5, signal.SIGTERM)):
        assert run(flags + out, lambda: at_step(step, signum)) == 130, out
        assert os.path.exists(out + "/checkpoint/model.safetensors")
        assert run("--resume --out " + out) == 0, out
    """
    stderr = drive(tmp_path, body).stderr
    for out, step in (("border", 3), ("second", 5)):
        command = f"python train.py --resume --out {out}"
        assert f"interrupted at step {step} of 7, state saved; continue with: {command}\n" in stderr
        assert_same_run(tmp_path / "straight", tmp_path / out)
    assert "Traceback" not in stderr


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


def test_the_clock_goes_on_where_it_stopped(micro, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: float(next(ticks)))
    args = args_of(f"--algo lm {LITTLE} --pretrain-steps 0 --steps 30 --checkpoint-every 25 --eval-every 25 --out r")
    with monkeypatch.context() as m:
        m.setattr(runs.Run, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(args)
    saved = load_checkpoint("r/checkpoint/model.safetensors")[1]["seconds"]
    assert train.run(args_of("--resume --out r"))["seconds"] > saved > 1


# ------------------------------------------------------------------------------------------------------- evaluation


def scores_by_name(table):
    def evaluate(model, task, name, args, final=False):
        return dict(table(name, final)) | {"samples": 2}

    return evaluate


def test_best_is_of_the_sets_own_metric_and_before_of_the_test_set(micro, monkeypatch):
    """On a task: accuracy decides though other figures stand first; before_ and best_ are scores of the test set."""
    validation = iter([0.2, 0.5, 0.3])

    def table(name, final):
        accuracy = next(validation) if name == "validation" else 0.9 if final else 0.7
        return {"other": -accuracy, "accuracy": accuracy}

    monkeypatch.setattr(runs, "evaluate", scores_by_name(table))
    flags = "--algo grpo --dataset addition --prompts-per-step 4 --group-size 4 --max-new-tokens 4 --batch-size 4"
    summary = train.run(args_of(f"{flags} --pretrain-steps 2 --steps 4 --eval-every 4 --out r"))
    assert summary["best_step"] == 4 and summary["before_accuracy"] == 0.7 and summary["accuracy"] == 0.9
    assert summary["validation_accuracy"] == 0.3 and summary["best_accuracy"] == 0.9


def test_of_a_text_the_lowest_perplexity_since_the_algorithm_began_is_best(micro, monkeypatch):
    found = {0: 1.0, 2: 9.0, 4: 5.0, 6: 7.0}  # by step; the first is of the supervised phase
    run = []
    monkeypatch.setattr(runs.Run, "begin", lambda self, *a, real=runs.Run.begin: (run.append(self), real(self, *a))[1])
    table = lambda name, final: {"loss": 0.0, "perplexity": found.get(run[-1].state.step, 1.0)}  # noqa: E731
    monkeypatch.setattr(runs, "evaluate", scores_by_name(table))
    summary = train.run(args_of(f"--algo lm {LITTLE} --pretrain-steps 2 --steps 4 --eval-every 2 --out r"))
    assert summary["best_step"] == 4 and load_model("r/best/model.safetensors")[1]["step"] == 4


@pytest.mark.parametrize("spoil", ["gone", "another run's"])
def test_best_weights_that_are_not_this_runs(spoil, micro, monkeypatch):
    flags = f"--algo lm {LITTLE} --pretrain-steps 0 --steps 4 --eval-every 2 --out "
    with monkeypatch.context() as m:
        m.setattr(runs.Run, "finish", lambda self: 1 / 0)
        for out in ("r", "other --seed 1"):
            with pytest.raises(ZeroDivisionError):
                train.run(args_of(flags + out))
    shutil.rmtree("r/best")
    if spoil != "gone":
        shutil.copytree("other/best", "r/best")
    with pytest.raises(UserError, match="does not hold this run's weights"):
        train.run(args_of("--resume --out r"))


# -------------------------------------------------------------------------------------------------- what stops a user


@pytest.fixture
def finished(micro):
    train.run(args_of(f"--algo lm {LITTLE} --pretrain-steps 1 --steps 2 --checkpoint-every 1 --out r"))


def test_records_that_have_changed(finished, monkeypatch):
    real = train.load_task
    changed = lambda *a: real(*a)._replace(fingerprint="other")  # noqa: E731
    with pytest.raises(UserError, match="records of pydocs have changed"):
        train.run(args_of("--resume --out r"), load_task=changed)


def test_flags_of_a_resumed_run_and_earlier_versions(finished):
    with pytest.raises(UserError, match="--lr was 0.0003 when r began"):
        args_of("--resume --out r --lr 1")
    config = json.loads(Path("r/config.json").read_text())
    for change, says in (({"replay": "routing"}, "--replay r3"), ({"expert_capacity": 4}, "expert_capacity 4")):
        Path("r/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=says):
            args_of("--resume --out r")
    Path("r/config.json").write_text(json.dumps(config | {"expert_capacity": 0}))
    assert args_of("--resume --out r").steps == 2
    model, metadata = load_model("r/checkpoint/model.safetensors")
    save_checkpoint("r/checkpoint/model.safetensors", model, step=metadata["step"])  # as earlier versions did
    with pytest.raises(UserError, match="of an earlier version"):
        train.run(args_of("--resume --out r"))


def test_a_full_disk_leaves_the_last_checkpoint(finished, monkeypatch, capsys):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = weights_of("r")
    with monkeypatch.context() as m:
        m.setattr(checkpoints.os, "replace", full)
        model = GPT(MoEConfig(n_layer=2, n_head=1, n_embd=8))
        with pytest.raises(UserError, match="could not be written .*No space left"):
            save_checkpoint("r/checkpoint/model.safetensors", model)
    assert all(torch.equal(w, before[n]) for n, w in weights_of("r").items())
    assert os.listdir("r/checkpoint") == ["model.safetensors"]  # nothing half-written stays


def test_a_broken_checkpoint_and_a_metrics_file_that_was_cut(finished, capsys):
    path = Path("r/checkpoint/model.safetensors")
    whole, rows = path.read_bytes(), Path("r/metrics.jsonl").read_bytes()
    Path("r/metrics.jsonl").write_bytes(rows[: len(rows) // 2])
    assert train.main(["--resume", "--out", "r"]) == 2 and "shorter than it was" in capsys.readouterr().err
    path.write_bytes(whole[: len(whole) // 2])
    assert train.main(["--resume", "--out", "r"]) == 2 and "not a readable checkpoint" in capsys.readouterr().err


def test_one_process_a_folder_and_file_systems_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "a", "w") as first, open(tmp_path / "a", "w") as second:
        runs.lock_file(first, "r")
        with pytest.raises(UserError, match="in use by another process"):
            runs.lock_file(second, "r")
        for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            error = OSError(number, "no locks here")
            monkeypatch.setattr(fcntl, "flock", lambda *a, error=error: (_ for _ in ()).throw(error))
            runs.lock_file(second, "r")


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_broken_numbers_are_never_saved(where, micro, monkeypatch):
    real = train.lm_losses

    def losses(model, *rest, **more):
        for loss, metrics in real(model, *rest, **more):
            if where == "weights":
                with torch.no_grad():
                    model.ln_f.bias[0] = torch.nan
                loss = model.wte.weight.sum()
            yield (loss * torch.nan, {"loss": loss * torch.nan}) if where == "loss" else (loss, metrics)

    args = args_of(f"--algo lm {LITTLE} --pretrain-steps 0 --steps 2 --checkpoint-every 1 --eval-every 9 --out r")
    with pytest.raises(UserError, match="nan at step 1|not finite at step 1"):
        train.run(args, lm_losses=losses)
    assert not os.path.exists("r/checkpoint")
