"""One thread for PyTorch: the models are so small that two threads mostly wait for each other."""

import os

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
