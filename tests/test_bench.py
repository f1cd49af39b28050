"""Every benchmark runs at the smallest sizes; what is timed is the program's own step; the GPU's checks can fail."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import gpu_check  # noqa: E402

import bench  # noqa: E402


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_quick_run(name):
    for rows in bench.main([name, "--quick"]):
        assert all(0 < min(row["seconds"]) and min(row["ratio"]) > 0 for row in rows) and len(rows) > 1


def test_a_ratio_is_taken_within_a_round():
    times = [[1.0, 10.0, 100.0], [2.0, 40.0, 300.0]]  # the second takes 2, 4 and 3 times as long
    assert bench.ratios_of(times, "time")[1] == (2.5, 3.0, 3.5)
    assert bench.ratios_of(times, "speed")[1][1] == pytest.approx(1 / 3)


def test_a_timed_step_is_the_programs_own():
    args = bench.parse(["step", "--quick"])
    model = bench.build(args, 257)
    before = [p.detach().clone() for p in model.parameters()]
    assert {"loss", "rl_loss", "grad_norm"} <= bench.training_step(model, args, "erl", erl_grad="all")().keys()
    assert not any(map(torch.equal, model.parameters(), before))


def test_gpu_checks_hold_on_a_cpu_and_can_fail(monkeypatch, capsys):
    failing = lambda device: gpu_check.near(torch.ones(1), torch.zeros(1), "sum")  # noqa: E731
    monkeypatch.setattr(gpu_check, "CHECKS", [gpu_check.losses, gpu_check.generation, failing])
    assert gpu_check.main(["--device", "cpu", "--checks"]) == 1
    out = capsys.readouterr().out
    assert out.count("ok ") == 2 and "FAILED" in out and "sum: " in out
