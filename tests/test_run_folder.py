"""support/run_folder.py, support/optimizer.py: schedule, updates, checkpoints, the best one, and what kills a run."""

import argparse
import builtins
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from training import (
    MICRO,
    args_of,
    assert_same_run,
    bare,
    drive,
    rows_of,
    summary_of,
    weights_of,
)

import data
import train
from moe import GPT, MoEConfig
from support import run_folder
from support.checkpoints import load_model, save_model
from support.errors import UserError
from support.optimizer import learning_rate, make_optimizer, restore
from support.run_folder import NEW_STATE, Run, find_checkpoint, load_state
from support.tasks import rng

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are killed in children of one process")
TINY_RUN = "--dataset addition --batch-size 2 --eval-samples 2 --test-samples 2 --max-new-tokens 3"


# ------------------------------------------------------------------------------------------- schedule and optimizer


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 200, 5000])
def test_learning_rate_goes_up_to_the_peak_and_down_to_nothing(steps):
    rates = [learning_rate(step, steps, 2e-3) for step in range(steps)]
    warmup = min(100, max(1, steps // 20))
    top = rates.index(max(rates))
    assert top in (warmup - 1, warmup) and max(rates) == pytest.approx(2e-3)
    assert all(0 < a < b for a, b in itertools.pairwise(rates[:warmup]))
    down = rates[warmup:]
    assert all(a > b > 0 for a, b in itertools.pairwise(down))
    drops = [a - b for a, b in itertools.pairwise([*down, learning_rate(steps, steps, 2e-3)])]
    assert drops == pytest.approx([2e-3 / (steps - warmup)] * len(down) if steps > 1 else [])  # a straight line ...
    assert learning_rate(steps, steps, 2e-3) == 0  # ... that would reach 0 at the next step


def test_only_matrices_decay():
    model = GPT(MoEConfig(n_shared_expert=1, **MICRO), rng(0))
    optimizer = make_optimizer(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decay) == set(names.values())
    kept = {n for n, d in decay.items() if d == 0}
    assert kept == {n for n in decay if n.endswith("bias") or ".ln_" in n or n.startswith("ln_") or ".b_" in n}
    assert "blocks.1.mlp.experts.b_in" in kept and "blocks.1.mlp.shared.0.b_out" in kept  # two-dimensional, yet biases
    assert "blocks.1.mlp.experts.w_in" in decay and decay["blocks.1.mlp.router.weight"] == 0.1


def some_args(out="r", **changes):
    given = dict(clip_grad=1.0, weight_decay=0.1, router_lr_factor=1.0, eval_every=10**6, checkpoint_every=1)
    return argparse.Namespace(out=str(out), **given | changes)


def begun(model, out="r", steps=10, **changes) -> Run:
    """A run whose algorithm begins with `model`."""
    run = Run(some_args(out, **changes), dict(NEW_STATE), {"supervised": 0, "lm": steps}, lambda m: m)
    run.begin("lm", model, task=None, peak=1e-3)
    return run


def test_the_routers_have_a_learning_rate_of_their_own(micro, monkeypatch):
    flags = f"--algo lm {TINY_RUN} --pretrain-steps 0 --steps 2 --weight-decay 0 --top-k 2"
    for name, extra in (("frozen", "--freeze-router"), ("still", "--router-lr-factor 0"), ("free", ""), ("half", "")):
        extra = "--router-lr-factor 0.5" if name == "half" else extra
        train.run(args_of(f"{flags} --out {name} {extra}"))
    moved = {}
    for name in ("frozen", "still", "free", "half"):
        model, _ = load_model(f"{name}/checkpoint/model.safetensors")
        fresh = GPT(model.config.dense(), rng(0, "weights"))
        start = train.upcycle(fresh, model.config, rng(0, "routers"))
        change = [(p - q).abs().max().item() for p, q in zip(model.parameters(), start.parameters(), strict=True)]
        names = [n for n, _ in model.named_parameters()]
        moved[name] = max(c for n, c in zip(names, change, strict=True) if n.endswith("router.weight"))
        assert max(c for n, c in zip(names, change, strict=True) if "w_in" in n) > 1e-5
    assert moved["frozen"] == moved["still"] == 0
    assert moved["half"] == pytest.approx(moved["free"] / 2, rel=0.05)
    norms = {name: [r["router_grad_norm"] for r in rows_of(name) if r["phase"] == "lm"] for name in moved}
    assert all(n == 0 for n in norms["frozen"]) and all(n > 0 for n in norms["still"])


@pytest.mark.parametrize("limit", [1.0, 0.0, 1e-3])
def test_clipping_and_norms(limit, micro):
    model = GPT(MoEConfig(top_k=2, **MICRO), rng(0))
    run = begun(model, clip_grad=limit)
    tokens = torch.randint(0, 257, (2, 9), generator=rng(1))
    out = model(tokens[:, :-1], tokens[:, 1:])
    loss = out.lm_loss + out.balance_loss.sum()
    parameters = dict(model.named_parameters())
    expected = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True), strict=True)
    )
    norms = run.update(loss)

    def norm(found):
        return math.sqrt(sum(float(g.double().square().sum()) for g in found))

    whole = norm(expected.values())
    assert norms["grad_norm"].item() == pytest.approx(whole, rel=1e-4)  # before clipping
    routers = norm(g for n, g in expected.items() if n.endswith("router.weight"))
    assert norms["router_grad_norm"].item() == pytest.approx(routers, rel=1e-4) and 0 < routers < whole
    after = norm(p.grad for p in parameters.values())
    assert after == pytest.approx(min(whole, limit or math.inf), rel=1e-3)
    assert int(run.state["clipped"]) == (0 < limit < whole) and run.state["updates"] == 1


def test_the_share_of_clipped_updates_is_logged(micro):
    """Since the last line, of all updates: minibatches and inner epochs too."""
    for limit, share in (("1e-9", 1.0), ("0", 0.0), ("1e9", 0.0)):
        out = f"r{limit}"
        train.run(args_of(f"--algo lm {TINY_RUN} --pretrain-steps 0 --steps 12 --clip-grad {limit} --out {out}"))
        rows = [r for r in rows_of(out) if r["phase"] == "lm"]
        assert [r["step"] for r in rows] == [10, 12] and {r["clipped_share"] for r in rows} == {share}
    norms = []
    real = Run.update

    def update(self, loss):
        found = real(self, loss)
        norms.append(found["grad_norm"].item())
        return found

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Run, "update", update)
        middle = "--clip-grad 3.2"
        train.run(args_of(f"--algo erl {TINY_RUN} --inner-epochs 2 --pretrain-steps 0 --steps 12 {middle} --out some"))
    shares = [r["clipped_share"] for r in rows_of("some") if r["phase"] == "erl"]
    assert len(norms) == 24
    expected = [sum(n > 3.2 for n in part) / len(part) for part in (norms[:20], norms[20:])]
    assert shares == pytest.approx(expected) and 0 < shares[0] < 1


# -------------------------------------------------------------------------------------------------------- checkpoints


def saved(folder, model, step):
    """A run in `folder` that saves `model` as its state after `step` steps."""
    run = begun(model, folder)
    run.state["step"] = step - 1
    Path(folder).mkdir(exist_ok=True)
    with run.open():
        run.after({"loss": 0.0}, tokens=1)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("killed_at", ["makedirs", "save_model", "torch.save", "rename 1", "rename 2", "rmtree"])
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(killed_at, tmp_path, monkeypatch):
    model = GPT(MoEConfig(**MICRO), rng(0))
    saved(tmp_path, model, 1)
    calls = {"rename": 0, "rmtree": 0}

    def crash(*_, **__):
        raise Crash

    with monkeypatch.context() as m:
        if killed_at.startswith("rename"):
            real = os.rename

            def rename(*paths):
                calls["rename"] += 1
                if calls["rename"] == int(killed_at[-1]):
                    raise Crash
                real(*paths)

            m.setattr(os, "rename", rename)
        elif killed_at == "rmtree":  # the last one: the old checkpoint stands beside the new one

            def rmtree(path, **_):
                calls["rmtree"] += path.endswith(".old")
                if calls["rmtree"] == 2:
                    raise Crash

            m.setattr(shutil, "rmtree", rmtree)
        else:
            owner, name = {
                "makedirs": (os, "makedirs"),
                "save_model": (run_folder, "save_model"),
                "torch.save": (torch, "save"),
            }[killed_at]
            m.setattr(owner, name, crash)
        with pytest.raises(Crash):
            saved(tmp_path, model, 2)
    folder = find_checkpoint(str(tmp_path))
    assert os.path.basename(folder) == ("checkpoint.old" if killed_at == "rename 2" else "checkpoint")
    loaded, _ = load_model(os.path.join(folder, "model.safetensors"))
    assert load_state(folder)["step"] == (2 if killed_at == "rmtree" else 1)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))

    saved(tmp_path, model, 3)  # the next save clears up
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"checkpoint"}
    assert load_state(find_checkpoint(str(tmp_path)))["step"] == 3


def test_equal_weights_are_equal_bytes(tmp_path):
    model = GPT(MoEConfig(**MICRO), rng(0))
    for i in range(8):
        save_model(model, str(tmp_path / f"{i}.safetensors"), step=3)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint.tmp").mkdir()  # half a save
    assert find_checkpoint(str(tmp_path)) is None


def test_moments_are_read_back_where_they_fit(tmp_path):
    model = GPT(MoEConfig(**MICRO), rng(0))
    optimizer = make_optimizer(model, 0.1)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    saved_state = optimizer.state_dict()
    fresh = make_optimizer(GPT(MoEConfig(**MICRO), rng(1)), 0.2, router_factor=3.0)
    restore(fresh, saved_state)
    assert all(g["weight_decay"] in (0.2, 0.0) for g in fresh.param_groups)  # rates and decay are the flags' business
    moments = fresh.state_dict()["state"]
    assert moments and moments.keys() == saved_state["state"].keys()
    for i, kept in saved_state["state"].items():
        assert all(torch.equal(kept[k], moments[i][k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    other = GPT(MoEConfig(**MICRO | {"n_embd": 16}), rng(1))  # as many parameters, of other shapes
    for model, state in (
        (other, saved_state),
        (GPT(MoEConfig(**MICRO | {"n_layer": 2}), rng(1)), saved_state),
        (other, {"state": {}, "param_groups": []}),
        (other, {"state": {0: {"step": 1}}, "param_groups": make_optimizer(other, 0.1).state_dict()["param_groups"]}),
        (other, {"param_groups": make_optimizer(other, 0.1).state_dict()["param_groups"]}),
    ):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            restore(make_optimizer(model, 0.1), state)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_spoilt_weights_are_never_saved(where, micro, monkeypatch):
    flags = f"--algo dense {TINY_RUN} --steps 5 --checkpoint-every 1 --out r"
    real, steps = train.lm_losses, []

    def spoilt(*args):
        for loss, metrics in real(*args):
            steps.append(1)
            if len(steps) == 3:
                factor = torch.full((), math.nan)
                if where == "loss":
                    loss, metrics["loss"] = loss * factor, metrics["loss"] * factor
                else:  # the loss is finite, its gradient is not
                    loss.register_hook(lambda g, factor=factor: g * factor)
            yield loss, metrics

    monkeypatch.setattr(train, "lm_losses", spoilt)
    with pytest.raises(UserError, match="is nan at step 3: lower --lr"):
        train.run(args_of(flags))
    folder = find_checkpoint("r")
    model, _ = load_model(os.path.join(folder, "model.safetensors"))
    assert load_state(folder)["step"] == 2 and all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ full disks


def disk_full_at(monkeypatch, path, n):
    """The n-th time that `path` is opened for writing there is no room left: what /dev/full says of every write."""
    real, opened = builtins.open, []

    def full(name, mode="r", *args, **kwargs):
        if str(name) == path and mode[0] in "wa":
            opened.append(name)
            if len(opened) == n:
                return real("/dev/full", mode)
        return real(name, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_at_a_line_of_metrics_names_the_checkpoint_and_the_run_goes_on(micro, capsys, monkeypatch):
    flags = f"--algo lm {TINY_RUN} --pretrain-steps 1 --steps 4 --eval-every 1 --checkpoint-every 1"
    assert train.main(f"{flags} --out straight".split()) == 0
    with monkeypatch.context() as m:
        disk_full_at(m, "r/metrics.jsonl", 6)
        assert train.main(f"{flags} --out r".split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: r/metrics.jsonl could not be written (No space left on device)")
    assert "r keeps the last checkpoint" in last
    assert find_checkpoint("r") and not Path("r/summary.json").exists()
    assert train.main("--resume --out r".split()) == 0
    assert_same_run("straight", "r")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["config.json.tmp", "summary.json.tmp"])
def test_a_full_disk_at_another_file_is_a_sentence(name, micro, capsys, monkeypatch):
    with monkeypatch.context() as m:
        disk_full_at(m, f"r/{name}", 1)
        assert train.main(f"--algo lm {TINY_RUN} --pretrain-steps 1 --steps 1 --out r".split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: ") and "No space left on device" in last
    assert not Path("r/summary.json").exists()


@pytest.mark.parametrize("path", ["r", "r/.lock", "r/checkpoint.tmp", "r/best.tmp"])
def test_a_folder_that_cannot_be_written_is_a_sentence(path, micro, capsys, monkeypatch):
    """As on a read-only file system (whoever runs the tests may be root, whom no permission stops)."""
    real_open, real_makedirs = builtins.open, os.makedirs

    def refuse(name):
        if str(name) == path:
            raise OSError(30, "Read-only file system", name)

    def makedirs(name, *args, **kwargs):
        refuse(name)
        return real_makedirs(name, *args, **kwargs)

    def opened(name, *args, **kwargs):
        refuse(name)
        return real_open(name, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", makedirs)
    monkeypatch.setattr(builtins, "open", opened)
    assert train.main(f"--algo lm {TINY_RUN} --pretrain-steps 1 --steps 1 --out r".split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: ") and "Read-only file system" in last and "r" in last


# ----------------------------------------------------------------------------------------------------- best and last


def mark_of(model) -> float:
    """A number that tells weights apart."""
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def play(monkeypatch, scores, metric="accuracy"):
    """Evaluations say `scores` of the validation set, one after the other, and of the test set the step's weights."""
    given, real = iter(scores), run_folder.evaluate

    def evaluate(model, task, name, args, final=False):
        found = real(model, task, name, args, final)
        if name == "validation":
            return found | {metric: next(given)}
        return found | {metric: mark_of(model)}

    monkeypatch.setattr(run_folder, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("scores", "best_step"),
    [([0.9, 0.8, 0.1, 0.5, 0.3, 0.2], 4), ([0.9, 0.9, 0.1, 0.2, 0.2, 0.1], 4), ([0, 0, 0.1, 0.2, 0.3, 0.4], 6)],
)
def test_the_best_weights_since_the_algorithm_began_are_kept_and_tested(scores, best_step, micro, monkeypatch):
    """Evaluations at 1 (first phase), 2 (before), then 3, 4, 5 of the algorithm and 6, the end; ties: the earlier."""
    play(monkeypatch, scores)
    flags = f"--algo lm {TINY_RUN} --pretrain-steps 2 --steps 4 --eval-every 1 --lr 0.01 --out r"
    train.run(args_of(flags))
    summary = summary_of()
    assert summary["best_step"] == best_step
    best, metadata = load_model("r/best/model.safetensors")
    last, _ = load_model("r/checkpoint/model.safetensors")
    assert metadata["step"] == best_step
    marks = [mark_of(best), mark_of(last)]
    assert summary["best_accuracy"] == pytest.approx(marks[0], rel=1e-9)
    assert summary["accuracy"] == pytest.approx(marks[1], rel=1e-9)
    assert (marks[0] == marks[1]) == (best_step == 6)
    assert summary["validation_accuracy"] == scores[-1]
    assert {p.name for p in Path("r/best").iterdir()} == {"model.safetensors"}


def test_of_a_text_the_lowest_perplexity_is_best(micro, monkeypatch):
    texts = {split: data._pydocs(split)[:700] for split in data.SPLITS}
    monkeypatch.setattr(data, "_pydocs", texts.get)
    play(monkeypatch, [2.0, 2.0, 9.0, 3.0, 5.0, 4.0], "perplexity")
    train.run(args_of("--algo lm --batch-size 2 --pretrain-steps 2 --steps 4 --eval-every 1 --out r"))
    assert summary_of()["best_step"] == 4 and load_model("r/best/model.safetensors")[1]["step"] == 4
    assert summary_of()["best_perplexity"] == pytest.approx(mark_of(load_model("r/best/model.safetensors")[0]))


def test_resuming_without_the_best_weights_is_refused_before_any_work(micro, capsys):
    flags = f"--algo lm {TINY_RUN} --pretrain-steps 0 --steps 4 --eval-every 1 --checkpoint-every 1 --out r"
    assert train.main(flags.split()) == 0
    shutil.move("r/best", "kept")
    assert train.main("--resume --out r".split()) == 2
    assert "r/best is gone" in capsys.readouterr().err.splitlines()[-1]
    shutil.move("kept", "r/best.old")  # as a kill between the two renames leaves it
    assert train.main("--resume --out r".split()) == 0


# ------------------------------------------------------------------------------------------ killed and resumed runs

RUNS = {
    "erl": "--algo erl --erl-grad all --dataset pydocs --batch-size 2 --inner-epochs 2 --eval-samples 2 --jitter 0.01",
    "grpo": "--algo grpo --dataset addition --batch-size 4 --prompts-per-step 4 --group-size 4 --minibatches 2 "
    "--eval-samples 8 --max-new-tokens 4 --temperature 1.3",
    "erpo": "--algo erpo --dataset addition --batch-size 4 --prompts-per-step 4 --group-size 4 --minibatches 2 "
    "--eval-samples 8 --max-new-tokens 4 --expert-capacity 6 --dtype bfloat16",
}


@needs_fork
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_bytes(name, tmp_path):
    """Killed in either phase, between the two, in a save, in a write, in an evaluation, and before any checkpoint."""
    outs = ["early", "first", "border", "begun", "second", "saving", "best", "done", "twice", "weights", "state", "row"]
    outs += ["evaluation-1", "evaluation-3", "evaluation-5"]  # of the first phase, of the second, of the test set
    outs = outs if name == "erl" else ["early", "border", "second", "evaluation-6"]
    body = f"""
    flags = {RUNS[name]!r} + " --pretrain-steps 4 --steps 5 --eval-every 3 --checkpoint-every 2 --out "
    assert run(flags + "straight") == 0
    killed = {{
        "early": lambda: at_step(1), "first": lambda: at_step(3), "border": lambda: after_checkpoint(4),
        "begun": lambda: at_step(5), "second": lambda: at_step(8), "saving": lambda: between_renames(6),
        "best": lambda: between_renames(9), "done": lambda: after_checkpoint(9),
        "weights": lambda: in_write(run_folder, "save_model", 5), "state": lambda: in_write(torch, "save", 3),
        "row": lambda: in_write(run_folder.Run, "_log", 3),
    }} | {{f"evaluation-{{n}}": lambda n=n: in_evaluation(n) for n in range(1, 7)}}
    for out in {outs!r}:
        assert run(flags + out, killed.get(out, killed["first"])) == -signal.SIGKILL, out
        assert not os.path.exists(out + "/summary.json"), out
        if out == "twice":
            assert run("--resume --out twice", lambda: at_step(4)) == -signal.SIGKILL
        assert run("--resume --out " + out + " " + flags.split(" --pretrain")[0]) == 0, out
    """
    drive(tmp_path, body)
    trained = [row for row in rows_of(tmp_path / "straight") if row["phase"] == name]
    assert any(row.get("updates", row.get("advantage_positive")) for row in trained)  # there was something to learn
    for out in outs:
        assert_same_run(tmp_path / "straight", tmp_path / out)


@needs_fork
@pytest.mark.parametrize("name", ["erl", "erpo"])
def test_runs_killed_at_random_moments_resume_to_the_same_bytes(name, tmp_path):
    """3 SIGKILLs; KILLS=30 is the long mode, KILLS_SEED other moments. Each run is killed until it has ended."""
    kills, seed = int(os.environ.get("KILLS", 3)), os.environ.get("KILLS_SEED", "0")
    body = f"""
    flags = {RUNS[name]!r} + " --pretrain-steps 4 --steps 5 --eval-every 3 --checkpoint-every 2 --out "
    begun = time.monotonic()
    assert run(flags + "straight") == 0
    length, draw, killed, out = time.monotonic() - begun, random.Random({seed!r}), 0, 0
    while killed < {kills}:
        out += 1
        line = flags + str(out)
        while True:
            moment = draw.uniform(0, 0.9 * length) if killed < {kills} else None
            status = run(line, killed_after=moment)
            if os.path.exists(str(out) + "/config.json"):
                line = "--resume --out " + str(out)
            if status == 0:
                break
            assert status == -signal.SIGKILL, status
            killed += 1
    """
    drive(tmp_path, body)
    outs = [p for p in tmp_path.iterdir() if p.name.isdigit()]
    assert outs
    for out in outs:
        assert_same_run(tmp_path / "straight", out)


@needs_fork
def test_ctrl_c_and_sigterm_save_say_how_to_go_on_and_resume_to_the_same_bytes(tmp_path):
    body = f"""
    flags = {RUNS["grpo"]!r} + " --pretrain-steps 3 --steps 4 --eval-every 2 --out "
    assert run(flags + "straight") == 0
    for out, step, signum in (("border", 3, signal.SIGINT), ("second", 6, signal.SIGTERM)):  # 6 ends in an evaluation
        assert run(flags + out, lambda: at_step(step, signum)) == 130, out

    def in_last_evaluation():  # all steps are done and saved: there is nothing to wait for
        real = run_folder.evaluate
        def evaluate(model, task, name, args, final):
            if final:
                kill(signal.SIGINT)
            return real(model, task, name, args, final)
        run_folder.evaluate = evaluate
    assert run(flags + "last", in_last_evaluation) == 130

    def twice():  # the second Ctrl-C does not wait for the step's end
        real = train.policy_forward
        def forward(*args):
            kill(signal.SIGINT)
            kill(signal.SIGTERM)
            raise RuntimeError("it went on")
        train.policy_forward = forward
    assert run(flags + "twice", twice) == 130
    """
    stderr = drive(tmp_path, body).stderr
    for out, step in (("border", 3), ("second", 6), ("last", None), ("twice", None)):
        saved = f" at step {step} of 7, state saved" if step else ""
        command = f"python train.py --resume --out {out}"
        assert f"interrupted{saved}; continue with: {command}\n" in stderr
        assert not (tmp_path / out / "summary.json").exists()
    assert "Traceback" not in stderr
    drive(
        tmp_path,
        """
    for out in ("border", "second", "last", "twice"):
        assert run("--resume --out " + out) == 0, out
    """,
    )
    for out in ("border", "second", "last", "twice"):
        assert_same_run(tmp_path / "straight", tmp_path / out)


def test_a_finished_run_resumes_to_itself(micro, tmp_path):
    train.run(args_of(f"--algo lm {TINY_RUN} --steps 2 --pretrain-steps 2 --out r"))
    weights, summary, rows = weights_of("r"), summary_of(), rows_of()
    train.run(args_of("--resume --out r"))
    assert weights_of("r") == weights
    assert bare(summary_of()) == bare(summary)
    assert list(map(bare, rows_of())) == list(map(bare, rows))


@needs_fork
@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_gives_the_same_bytes_however_often_a_run_looks_up(name, tmp_path):
    """Weights depend on no evaluation, no line of metrics and no checkpoint; another seed gives others."""
    body = f"""
    flags = {RUNS[name]!r} + " --pretrain-steps 3 --steps 4 --out "
    assert run(flags + "a --eval-every 3 --checkpoint-every 3") == 0
    assert run(flags + "b --eval-every 3 --checkpoint-every 3") == 0
    def log_each():
        run_folder.Run.after.__defaults__ = (1, *run_folder.Run.after.__defaults__[1:])
    assert run(flags + "often --eval-every 1 --checkpoint-every 1", log_each) == 0
    assert run(flags + "never --eval-every 1000 --checkpoint-every 1000") == 0
    assert run(flags + "other --eval-every 1000 --checkpoint-every 1000 --seed 1") == 0
    """
    drive(tmp_path, body)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    weights = {out: weights_of(tmp_path / out) for out in ("a", "often", "never", "other")}
    assert weights["a"] == weights["often"] == weights["never"] != weights["other"]
    assert len(rows_of(tmp_path / "often")) > len(rows_of(tmp_path / "never"))


def test_phases_and_the_upcycled_model(micro):
    """Before the algorithm the model is dense; it begins as its parent, and so do both of its arms."""
    seen = {}
    for algo in ("lm", "erl"):
        real, models = Run.update, []

        def update(run, loss, models=models, real=real):
            models.append((run.model.config.n_expert, {k: v.clone() for k, v in run.model.state_dict().items()}))
            return real(run, loss)

        with pytest.MonkeyPatch.context() as m:
            m.setattr(Run, "update", update)
            train.run(args_of(f"--algo {algo} {TINY_RUN} --pretrain-steps 3 --steps 1 --out {algo}"))
        assert [n for n, _ in models] == [1, 1, 1, 8]
        seen[algo] = models[-1][1]
    assert all(torch.equal(seen["lm"][k], seen["erl"][k]) for k in seen["lm"])  # the same start for both
    experts = seen["lm"]["blocks.1.mlp.experts.w_in"]
    assert torch.equal(experts[0], experts[5])
    model, metadata = load_model("lm/checkpoint/model.safetensors")
    assert model.config.n_expert == 8 and metadata["step"] == 4


# ----------------------------------------------------------------------------------------- what a resumed run may find


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as m:
        m.setitem(train.command_line.SIZES, "tiny", MICRO)
        m.chdir(folder)
        train.run(args_of(f"--algo lm {TINY_RUN} --pretrain-steps 2 --steps 2 --checkpoint-every 3 --out r"))
    return folder / "r"


@pytest.fixture
def again(finished, micro):
    shutil.copytree(finished, "r")


GOOD = {"step": 1, "phase": "lm", "loss": 1.0}


@pytest.mark.parametrize(
    "line",
    ["[1]", "3", "null", '"x"', "{}", '{"step": 1}', '{"phase": "lm"}', '{"step": "1", "phase": "lm"}', "[" * 100_000]
    + [
        json.dumps(GOOD | change)
        for change in ({"loss": "low"}, {"loss": {}}, {"phase": 3}, {"split": [1]}, {"x": None})
    ]
    + [json.dumps(GOOD | {"max_vio_by_layer": [1.0, "2"]}), "\xff\xfe"],
)
def test_lines_that_are_no_rows_of_metrics_end_in_a_sentence_before_any_work(line, again, capsys):
    path = Path("r/metrics.jsonl")
    size = load_state("r/checkpoint")["metrics_bytes"]
    path.write_bytes((line.encode("latin-1") + b"\n").ljust(size + 100, b" "))  # as long as the checkpoint knew it
    assert train.main("--resume --out r".split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "r/metrics.jsonl holds a line that is no row of metrics" in last and "--init r" in last


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_resumed_run_writes_into_its_own_folder_alone(checkpoint, micro):
    """Folders that an edited config.json names are read at most. (Tokens are cached in .cache, as ever.)"""
    for file in data.get_dataset("wikitext2").files.values():
        Path("data", file).parent.mkdir(parents=True, exist_ok=True)
        Path("data", file).write_text("some words of a text\n" * 40)
    flags = (
        "--algo lm --dataset wikitext2 --tokenizer bytes --data-dir data --batch-size 2 --pretrain-steps 0 --steps 2"
    )
    for out in ("r", "other"):
        assert train.main(f"{flags} --eval-every 1 --out {out}".split()) == 0
    shutil.move("data", "moved")
    os.remove("r/summary.json")
    if not checkpoint:  # then --init is asked once more
        shutil.rmtree("r/checkpoint")
    config = json.loads(Path("r/config.json").read_text())
    Path("r/config.json").write_text(json.dumps(config | {"out": "named", "init": "other", "data_dir": "moved"}))

    def outside():
        found = [p for p in Path().rglob("*") if p.parts[0] not in ("r", ".cache")]
        return {str(p): p.read_bytes() if p.is_file() else None for p in found}

    before = outside()
    assert train.main("--resume --out r".split()) == 0 and summary_of("r")["steps"] == 2
    assert outside() == before and not Path("named").exists()


def spoil_state(**changes):
    path = Path("r/checkpoint/state.pt")
    state = torch.load(path, weights_only=True) | changes
    torch.save({k: v for k, v in state.items() if v is not None}, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 500},
        {"step": -1},
        {"step": 1.0},
        {"step": "x"},
        {"step": torch.tensor(3)},
        {"optimizer": None},
        {"optimizer": []},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"optimizer": {"state": 3, "param_groups": 4}},
        {"metrics_bytes": None},
        {"metrics_bytes": -5},
        {"metrics_bytes": 10**9},
        {"before": 1},
        {"best_score": "high"},
        {"best_step": None},
        {"clipped": torch.tensor(1)},
        {"more": 1},
    ],
)
def test_a_state_of_other_types_ends_in_a_sentence(changes, again, capsys):
    spoil_state(**({"step": 3} | changes))
    assert train.main("--resume --out r".split()) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("train.py: ") and "Traceback" not in err


@pytest.mark.parametrize("content", [[1], "text", {"optimizer": {}}, None])
def test_a_state_that_is_no_state_ends_in_a_sentence(content, again, capsys):
    torch.save(content, "r/checkpoint/state.pt")
    assert train.main("--resume --out r".split()) == 2
    assert "is not a readable checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_moments_of_other_shapes_end_in_a_sentence(again, capsys):
    state = torch.load("r/checkpoint/state.pt", weights_only=True)
    moments = state["optimizer"]["state"]
    first = next(iter(moments))
    moments[first]["exp_avg"] = torch.zeros(3)
    spoil_state(step=3, optimizer=state["optimizer"])
    assert train.main("--resume --out r".split()) == 2
    assert "does not fit the weights" in capsys.readouterr().err.splitlines()[-1]
