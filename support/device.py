"""Where to compute."""

import torch


def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA, then MPS, then CPU. ValueError when the one asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    if not there.get(name):
        raise ValueError(f"this machine has no {name} device that PyTorch can use: leave --device out or say cpu")
    return torch.device(name)
