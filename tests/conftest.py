"""One thread for PyTorch: the models are so small that two threads mostly wait for each other."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def micro(monkeypatch, tmp_path):
    """A size that trains in milliseconds in place of "tiny", and a folder of its own for what runs write."""
    from training import MICRO

    from moe import SIZES

    monkeypatch.setitem(SIZES, "tiny", MICRO)
    monkeypatch.chdir(tmp_path)
