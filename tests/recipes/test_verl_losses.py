"""recipes/verl_losses.py: our losses and weights, and verl's own, installed without its dependencies.

pip install -r recipes/requirements-trl.txt && pip install --no-deps verl==0.9.1
OMP_NUM_THREADS=1 python -m pytest tests/recipes/test_verl_losses.py
"""

import inspect
import sys
from importlib.metadata import distributions

import pytest
import torch

from baselines import dppo_loss, mismatch_weights, sapo_loss
from recipes import verl_losses
from recipes.verl_losses import OURS, call, difference, differences, example, load_verl
from support.errors import UserError

installed = any(d.name == "verl" and d.version == verl_losses.VERSION for d in distributions())
needs_verl = pytest.mark.skipif(not installed, reason=f"pip install --no-deps verl=={verl_losses.VERSION}")


@needs_verl
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shift", [1e-4, 0.1, 1.0])
def test_equal(name, shift):
    """Value and gradient, near the policy and far from it, where clips act; weighted; and RAIS on its bases."""
    for what, (value, gradient, largest) in differences(name, seed=1, shift=shift).items():
        assert value < 1e-6 and largest > 1e-3, what
        if (name, what) != ("gspo", "with weights"):
            assert gradient < 1e-6, what


@needs_verl
def test_the_gradient_of_weighted_gspo():
    """The difference that stays: verl's has each token's own weight, ours the row's mean. With one weight: the same."""
    log_probs, old, A, mask, _, _, weights = example(shift=1e-4)
    ours = lambda x: OURS["gspo"](x, old, A, mask, weights=weights)[0]  # noqa: E731
    theirs = lambda x: call("gspo", x, old, A, mask, weights)  # noqa: E731
    leaf = log_probs.clone().requires_grad_()
    weighted, plain = (torch.autograd.grad(call("gspo", leaf, old, A, mask, w), leaf)[0] for w in (weights, None))
    torch.testing.assert_close(weighted, plain * weights)
    assert difference(ours, theirs, log_probs)[1] > 1e-3
    weights = weights[:, :1].expand_as(mask)
    assert max(difference(ours, theirs, log_probs)[:2]) < 1e-6


@needs_verl
@pytest.mark.parametrize("kind, preset", [("tis", "decoupled_token_is"), ("icepop", "decoupled_token_icepop")])
@pytest.mark.parametrize("shift", [0.1, 1.0, 30.0])
def test_weights_equal_verls(kind, preset, shift, monkeypatch):
    """By the presets' own defaults, and with other bounds; far from the sampler as well."""
    load_verl()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, verl_losses._Unused()])
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    mu, old, _, mask, *_ = example(seed=2, shift=shift)
    bounds = {"threshold": 1.5} | ({"threshold_lower": 0.8} if kind == "icepop" else {})
    for options in ({}, bounds):
        config = getattr(RolloutCorrectionConfig, preset)(**options)
        spec = config.rollout_is, config.rollout_is_threshold
        theirs, _ = compute_rollout_correction_weights(old - mu, mask, *spec)
        ours = mismatch_weights(old, mu, mask, kind=kind, **options)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        assert 0 < (ours[mask] != (old - mu).exp()[mask]).float().mean() < 1 or shift == 0.1


@needs_verl
def test_defaults_are_verls():
    _, ActorConfig = load_verl()
    theirs = {name: p.default for name, p in inspect.signature(ActorConfig).parameters.items()}
    for loss, options in ((sapo_loss, ["tau_positive", "tau_negative"]), (dppo_loss, ["clip_low", "clip_high"])):
        for option in options:
            assert inspect.signature(loss).parameters[option].default == theirs[verl_losses.NAMES[option]], option


@needs_verl
@pytest.mark.parametrize("name", OURS)
def test_a_row_without_a_response(name):
    """The difference that stays: verl's losses average over the rows that have a response (not "geo_mean"), ours over
    all."""
    log_probs, old, A, mask, *_ = example()
    mask[2] = False
    scale = 1 if name == "geo_mean" else len(A) / (len(A) - 1)
    ours, theirs = lambda x: scale * OURS[name](x, old, A, mask)[0], lambda x: call(name, x, old, A, mask)
    assert max(difference(ours, theirs, log_probs)[:2]) < 1e-6


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(verl_losses, "version", lambda name: "0.8.0")
    with pytest.raises(UserError, match="found 0.8.0"):
        load_verl()
