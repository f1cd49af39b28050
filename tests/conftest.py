"""One thread for PyTorch: the models are so small that two threads mostly wait for each other."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Every run tries the same cases, and remembers none: what it says is about the change.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")


@pytest.fixture
def micro(monkeypatch, tmp_path):
    """A size that trains in milliseconds in place of "tiny", and a folder of its own for what runs write."""
    from training import MICRO

    from moe import SIZES

    monkeypatch.setitem(SIZES, "tiny", MICRO)
    monkeypatch.chdir(tmp_path)


def pytest_terminal_summary(terminalreporter):
    """One line that says why tests were left out."""
    skipped = terminalreporter.stats.get("skipped", [])
    if reasons := sorted({report.longrepr[2].removeprefix("Skipped: ") for report in skipped}):
        terminalreporter.write_line("left out: " + "; ".join(reasons))
