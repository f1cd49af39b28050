"""recipes/verl_losses.py: our losses and verl's own, installed without its dependencies.

pip install -r recipes/requirements-trl.txt && pip install --no-deps verl==0.9.1
OMP_NUM_THREADS=1 python -m pytest tests/recipes/test_verl_losses.py
"""

import inspect
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from recipes import verl_losses
from recipes.verl_losses import BASES, OURS, call, difference, differences, example, load_verl
from support.errors import UserError

try:
    INSTALLED = version("verl") == verl_losses.VERSION
except PackageNotFoundError:
    INSTALLED = False
needs_verl = pytest.mark.skipif(not INSTALLED, reason=f"pip install --no-deps verl=={verl_losses.VERSION}")


@needs_verl
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("shift", [1e-4, 0.1, 1.0])
def test_equal(name, shift):
    """Value and gradient, near the policy and far from it, where clips act; the baseline and RAIS on it."""
    for value, gradient, largest in differences(name, seed=1, shift=shift):
        assert value < 1e-6 and gradient < 1e-6 and largest > 1e-3


@needs_verl
@pytest.mark.parametrize("name", BASES)
def test_a_row_without_a_response(name):
    """The difference that stays: verl's vanilla and gspo average over the rows that have a response, ours over all."""
    log_probs, old, A, mask, _, _ = example()
    mask[2] = False
    B = len(A)
    scale = 1 if name == "geo_mean" else B / (B - 1)
    value, gradient, _ = difference(
        lambda x: scale * OURS[name](x, old, A, mask)[0], lambda x: call(name, x, old, A, mask), log_probs
    )
    assert value < 1e-6 and gradient < 1e-6


@needs_verl
def test_the_second_clip_of_vanilla(monkeypatch):
    """Why clip_ratio_c is set: at verl's default of 3 a row with A < 0 and a larger ratio has no gradient."""
    registry, ActorConfig = load_verl()
    default = inspect.signature(ActorConfig).parameters["clip_ratio_c"].default
    log_probs, old, mask = torch.zeros(1, 4), torch.full((1, 4), -2.0), torch.ones(1, 4, dtype=torch.bool)
    A = torch.tensor([-1.0])
    assert call("vanilla", log_probs, old, A, mask) == pytest.approx(float(torch.tensor(2.0).exp()), rel=1e-6)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    loss, _ = registry["vanilla"](old, log_probs, A[:, None].expand(1, 4), mask, "seq-mean-token-mean", config)
    assert loss == default == 3


@needs_verl
@pytest.mark.parametrize("name", BASES)
def test_what_verl_passes(name):
    """The statement in the recipe's first lines: no routes among the arguments, nor among what ppo_loss keeps."""
    registry, _ = load_verl()
    assert [*inspect.signature(registry[name]).parameters] == [
        *("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights")
    ]
    source = Path(inspect.getfile(registry[name])).parents[2] / "workers/utils/losses.py"
    ppo_loss = source.read_text().split("def ppo_loss")[1].split("\ndef ")[0]
    assert "data.select(*fields)" in ppo_loss and "routed_experts" not in ppo_loss


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(verl_losses, "version", lambda name: "0.8.0")
    with pytest.raises(UserError, match="found 0.8.0"):
        load_verl()
