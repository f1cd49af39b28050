"""Our losses beside those registered in verl 0.9.1: the same numbers; and what verl would need for RAIS.

    python3 -m venv .venv && .venv/bin/pip install -r recipes/requirements-trl.txt
    .venv/bin/pip install --no-deps verl==0.9.1
    .venv/bin/python recipes/verl_losses.py

It prints how far our losses are from verl's "vanilla", "gspo", "geo_mean", "cispo", "sapo" and "dppo_tv" on random
numbers, in value and in gradient; then the same with weights for another engine's samples, and rais_loss from the first
three with gamma in the old log-probabilities.

What to set in verl for this, what stays different, what verl passes to a registered loss (no routes), and what RAIS
and ERPO would need from it, is in docs/frameworks.md. RAIS would need one line around any registered loss:
`old_log_prob - gamma.log()` for old_log_prob (rais.router_shift).
"""

import inspect
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import MagicMock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root, when run as a file
from baselines import cispo_loss, dppo_loss, gmpo_loss, grpo_loss, gspo_loss, sapo_loss  # noqa: E402
from rais import rais_loss, router_shift  # noqa: E402
from support.errors import UserError  # noqa: E402

VERSION = "0.9.1"
OURS = {"vanilla": grpo_loss, "gspo": gspo_loss, "geo_mean": gmpo_loss}
OURS |= {"cispo": cispo_loss, "sapo": sapo_loss, "dppo_tv": dppo_loss}
BASES = {"vanilla": "grpo", "gspo": "gspo", "geo_mean": "gmpo"}
NAMES = {"clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high", "max_ratio": "clip_ratio_c"}  # verl's
NAMES |= {"tau_positive": "tau_pos", "tau_negative": "tau_neg"}
# Imported by verl, not by its losses' work.
UNUSED = ("codetiming", "hydra", "omegaconf", "orjson", "ray", "tensordict")


class _Unused(MetaPathFinder, Loader):
    """Stands in for the packages of UNUSED that are not installed, so that verl can be imported."""

    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in UNUSED else None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __name__=spec.name, __version__="0")

    def exec_module(self, module):
        pass


def load_verl():
    """-> (verl's registry of policy losses, its ActorConfig). UserError without this very version."""
    try:
        found = version("verl")
    except PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise UserError(f"install verl {VERSION} (pip install --no-deps verl=={VERSION}), found {found}")
    finder = _Unused()
    sys.meta_path.append(finder)  # asked last: what is installed is used
    try:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
        from verl.workers.config import ActorConfig
    finally:
        sys.meta_path.remove(finder)
    return POLICY_LOSS_REGISTRY, ActorConfig


def call(name, log_probs, old_log_probs, advantages, response_mask, weights=None):
    """verl's loss `name` with our options and reduction. Shapes as in baselines.py -> 0-d."""
    registry, ActorConfig = load_verl()
    options = {"clip_ratio_c": 1e9}
    for option, parameter in inspect.signature(OURS[name]).parameters.items():
        if option in NAMES:
            options[NAMES[option]] = parameter.default
    loss, _ = registry[name](
        old_log_prob=old_log_probs,
        log_prob=log_probs,
        advantages=advantages[:, None].expand_as(log_probs),  # verl has one a token
        response_mask=response_mask,
        loss_agg_mode="seq-mean-token-mean",
        config=ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options),
        rollout_is_weights=weights,
    )
    return loss


def example(seed=0, B=8, T=16, L=3, K=2, shift=0.3):
    """Random policies that are `shift` apart, a mask with a response in every row, routers apart as well, weights."""
    draw = torch.Generator().manual_seed(seed)
    log_probs = -3 * torch.rand(B, T, generator=draw)
    old_log_probs = log_probs + shift * torch.randn(B, T, generator=draw)
    mask = torch.rand(B, T, generator=draw) < 0.7
    mask[:, 0] = True
    new, old = (-2 * torch.rand(B, T, L, K, generator=draw) for _ in range(2))
    advantages, weights = torch.randn(B, generator=draw), 0.1 + 2 * torch.rand(B, T, generator=draw)
    return log_probs, old_log_probs, advantages, mask, old + 0.3 * (new - old), old, weights


def difference(ours, theirs, log_probs):
    """Two functions of log_probs -> the largest difference of value and of gradient, and the largest gradient."""
    values, gradients = [], []
    for function in (ours, theirs):
        leaf = log_probs.clone().requires_grad_()
        loss = function(leaf)
        values.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    (a, b), (g, h) = values, gradients
    return (a - b).abs().item(), (g - h).abs().max().item(), h.abs().max().item()


def differences(name, **options):
    """-> {what: difference} of our loss from verl's `name`, of the weighted one, and of RAIS where it is a base."""
    log_probs, old, A, mask, router, old_router, weights = example(**options)
    ours = OURS[name]
    row, weigh = (old, A, mask), {"weights": weights}
    found = {ours.__name__: difference(lambda x: ours(x, *row)[0], lambda x: call(name, x, *row), log_probs)}
    pair = difference(lambda x: ours(x, *row, **weigh)[0], lambda x: call(name, x, *row, **weigh), log_probs)
    found["with weights"] = pair
    if name in BASES:
        shifted = old - router_shift(router, old_router).log()
        found["rais_loss"] = difference(
            lambda x: rais_loss(x, old, A, mask, router, old_router, base=BASES[name])[0],
            lambda x: call(name, x, shifted, A, mask),
            log_probs,
        )
    return found


def main():
    print("verl's loss   ours          value    gradient  largest gradient")
    for name in OURS:
        for ours, (value, gradient, largest) in differences(name).items():
            print(f"{name:12}  {ours:12}  {value:.1e}  {gradient:.1e}   {largest:.1e}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
