"""One thread for PyTorch: the models are so small that two threads mostly wait for each other."""

import io
import os
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# In CI every run tries the same cases: what it says is about the change. Everywhere else they are new each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def micro(monkeypatch, tmp_path):
    """A size that trains in milliseconds in place of "tiny", and a folder of its own for what runs write."""
    from training import MICRO

    from moe import SIZES

    monkeypatch.setitem(SIZES, "tiny", MICRO)
    monkeypatch.chdir(tmp_path)


# A run of the whole suite (or of these six files) ends in the lines and branches that the losses' and the model's own
# tests reach, and fails below 95 %. The tracer is on in these tests alone: a test takes up to twice as long with it.
ROOT = Path(__file__).parents[1]
COVERED = ["erl.py", "erpo.py", "rais.py", "baselines.py", "moe.py"]
COVERING = {"test_erl.py", "test_erpo.py", "test_rais.py", "test_baselines.py", "test_extremes.py", "test_moe.py"}
TRACER, REPORT = pytest.StashKey(), pytest.StashKey()


def pytest_collection_finish(session):
    options = session.config.option
    if options.keyword or options.collectonly or not COVERING <= {item.path.name for item in session.items}:
        return
    import coverage

    files = [str(ROOT / name) for name in COVERED]
    tracer = session.config.stash[TRACER] = coverage.Coverage(branch=True, include=files, data_file=None)
    with tracer.collect():  # once more, for the lines that an import runs
        for file in files:
            runpy.run_path(file, run_name=Path(file).stem)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if TRACER not in item.config.stash or item.path.name not in COVERING:
        return (yield)
    with item.config.stash[TRACER].collect():
        return (yield)


def pytest_sessionfinish(session):
    if TRACER in session.config.stash:
        report = session.config.stash[REPORT] = io.StringIO()
        share = session.config.stash[TRACER].report(file=report, show_missing=True)
        session.exitstatus = session.exitstatus or int(share < 95)


def pytest_terminal_summary(terminalreporter, config):
    if REPORT in config.stash:
        terminalreporter.write_line("\n" + config.stash[REPORT].getvalue())
