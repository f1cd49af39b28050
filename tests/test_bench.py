"""Every benchmark runs from its command line to its JSON and its picture, at the smallest sizes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench, every_dataset, threads = load("bench"), load("every_dataset"), load("threads")


@pytest.mark.parametrize("name", list(bench.BENCHMARKS))
def test_quick_run(name, tmp_path):
    threads = torch.get_num_threads()
    try:
        returned = bench.main([name, "--quick", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / f"bench-{name}.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert results.keys() >= {"benchmark", "torch", "device", "dtype", "threads", "pairs", "groups"}
    assert results["benchmark"] == name and results["pairs"] == 1
    for group in results["groups"]:
        assert len(group["arms"]) > 1
        for i, arm in enumerate(group["arms"]):
            assert 0 < arm["seconds"]["q1"] <= arm["seconds"]["median"] <= arm["seconds"]["q3"]
            if group["relative"] != "seconds" and i == 0:
                assert arm["relative"]["median"] == 1
            if "goal" in arm:
                key = "seconds" if group["relative"] == "seconds" else "relative"
                better = 1 if group["relative"] == "speed" else -1
                assert arm["met"] == (better * arm[key]["median"] >= better * arm["goal"])
    assert (tmp_path / f"bench-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_quartiles_and_speed_ratio(monkeypatch):
    """A ratio is taken within a round, and speed is its inverse."""
    assert bench.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    times = iter([1.0, 2.0, 10.0, 40.0, 100.0, 300.0])  # rounds of A, B: B takes 2, 4 and 3 times as long
    monkeypatch.setattr(bench, "seconds_of", lambda f, device: next(times))
    args = bench.argparse.Namespace(pairs=3, compile=False, device=torch.device("cpu"), dtype="float32", quick=True)
    arms = [bench.Arm("A", lambda: lambda: None), bench.Arm("B", lambda: lambda: None, goal=0.5)]
    (group,) = bench.measure([bench.Group("both", arms, "speed")], args)
    assert group["arms"][1]["relative"]["median"] == pytest.approx(1 / 3)
    assert group["arms"][1]["met"] is False


def test_naive_erl_is_the_same_algorithm(tmp_path):
    """The slow peer of the ERL benchmark and the program's own losses agree on the same routes: loss and gradient."""
    args = bench.parse(["erl", "--quick", "--out", str(tmp_path)])
    # advantage "log": a sign would turn the rounding of other matrix shapes into +1 or -1
    run = bench.Steps(bench.build(args, 50), args, "erl", advantage="log", erl_grad="all")
    batch, results = run.task.batch(0), []
    for f in (bench.train.erl_losses, bench.naive_erl_losses):
        ((loss, _),) = f(run.model, batch, run.args, 0)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(run.model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_a_step_is_the_programs_own(tmp_path):
    """A timed step learns what a step of train.py learns: batch, losses, clipped gradient, AdamW, bookkeeping."""
    args = bench.parse(["step", "--quick", "--out", str(tmp_path)])
    run = bench.Steps(bench.build(args, 50), args, clip_grad=0.25)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(10):
        run.once()
    assert run.state["step"] == 10 and run.state["tokens"] == 10 * 2 * 32
    (row,) = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 10 and row["grad_norm"] > 0.25 and row["clipped_share"] == 1
    assert all(not torch.equal(p, before[n]) for n, p in run.model.named_parameters())


def test_every_algorithm_on_a_data_set(tmp_path, capsys):
    """The table of all algorithms: a row a run with its score, or with the sentence that it failed with."""
    options = ["--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    assert every_dataset.main(["--datasets", "addition", *options]) == 0
    runs = json.loads((tmp_path / "every-dataset.json").read_text())["runs"]
    assert [r["algo"] for r in runs] == ["dense", "lm", "erl", "grpo", "gspo", "gmpo", "cispo", "erpo", "rais"]
    assert all(r["status"] == 0 and 0 <= r["scores"]["accuracy"] <= 1 for r in runs)
    assert every_dataset.main(["--datasets", "gsm8k", "--data-dir", str(tmp_path / "none"), *options]) == 1
    assert "9 runs, 9 failed" in capsys.readouterr().out
    runs = json.loads((tmp_path / "every-dataset.json").read_text())["runs"]
    assert all(r["status"] == 2 and r["error"].startswith("train.py: ") for r in runs)


@pytest.mark.parametrize(
    ("theirs", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_sleep_soon_unless_the_user_says_otherwise(theirs, spins):
    """Set before torch is imported, which reads it then."""
    code = "import sys, os, train; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | theirs
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == spins


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_threads_alone_and_beside_another_process(tmp_path):
    flags = ["--threads", "2", "--busy", "0", "1", "--steps", "1", "--rounds", "1", "--out", str(tmp_path)]
    rows = threads.main(flags)["rows"]
    assert [(r["threads"], r["busy"]) for r in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(0 < r["seconds"] == min(r["rounds"]) and r["others"] >= 0 for r in rows)
    assert json.loads((tmp_path / "threads.json").read_text())["rows"] == json.loads(json.dumps(rows))


def test_gpu_checks_hold_on_a_cpu_and_can_fail(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bench", bench)
    check = load("gpu_check")
    check.losses("cpu")
    check.generation("cpu")
    monkeypatch.setattr(
        check, "CHECKS", [lambda device: None, lambda device: check.near(torch.ones(1), torch.zeros(1), "sum")]
    )
    assert check.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert said.count("ok ") == 1 and "FAILED" in said and "sum: " in said


def test_on_gpu_refuses_what_it_does_not_know():
    script = Path(__file__).parents[1] / "bench" / "on_gpu.sh"
    done = subprocess.run(["bash", str(script), "--nonsense"], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "--nonsense" in done.stderr
