"""Where to compute."""

import torch


def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA, then MPS, then CPU. ValueError when the one asked for is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if name not in present:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu, cuda or mps")
    if not present[name]:
        raise ValueError(f"this machine has no {name} device that PyTorch can use: leave --device out or say cpu")
    return torch.device(name)
