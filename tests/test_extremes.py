"""A token that became likelier (or less likely) by many orders of magnitude, in every loss: no overflow, no NaN."""

import math

import pytest
import torch

from baselines import gmpo_loss, grpo_loss, gspo_loss
from erl import erl_loss
from erpo import erpo_loss
from rais import rais_loss

ROWS = torch.ones(4, 2, dtype=torch.bool)
ROUTER = torch.zeros(4, 2, 1, 1)
EXPERTS = torch.zeros(4, 2, 1, 1, dtype=torch.int64)


def erpo(new, old, advantages):  # the rewards of a group of four, centred already
    probs = torch.full((4, 2, 1, 1), 0.5)
    return erpo_loss(new, old, advantages, ROWS, EXPERTS, EXPERTS, probs, probs, num_experts=1, group_size=4)


def rais(base):
    return lambda new, old, advantages: rais_loss(new, old, advantages, ROWS, ROUTER, ROUTER, base=base)


LOSSES = {
    "grpo": lambda new, old, advantages: grpo_loss(new, old, advantages, ROWS),
    "gspo": lambda new, old, advantages: gspo_loss(new, old, advantages, ROWS),
    "gmpo": lambda new, old, advantages: gmpo_loss(new, old, advantages, ROWS),
    "rais grpo": rais("grpo"),
    "rais gspo": rais("gspo"),
    "rais gmpo": rais("gmpo"),
    "erpo": erpo,
    "erl": lambda new, old, advantages: erl_loss(
        new[:, :, None, None], old[:, :, None, None], advantages[:, None].expand(4, 2), ROWS[..., None]
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantages", [[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, -1.0, 0.0]])
@pytest.mark.parametrize("log_ratio", [1e3, 90.0, -90.0, -1e3])
def test_log_ratios_beyond_the_range_of_exp(name, advantages, log_ratio):
    old = torch.full((4, 2), -1.0)
    old[0] += -log_ratio  # the first row moves, and one token of the second
    old[1, 0] += -log_ratio
    new = torch.full((4, 2), -1.0, requires_grad=True)
    loss, metrics = LOSSES[name](new, old, torch.tensor(advantages))
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.isfinite() and gradient.isfinite().all()
    assert all(value.isfinite() for value in metrics.values()), metrics
    if not any(advantages):
        assert loss == 0 and not gradient.any()


def test_a_bound_that_no_ordinary_ratio_meets():
    """Up to a ratio of e^40 nothing is cut off: the gradient of a row with A < 0 is that of the plain ratio."""
    new = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    loss, _ = grpo_loss(new, new.detach() - 39, -torch.ones(4, dtype=torch.float64), ROWS)
    (gradient,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(gradient, torch.full_like(new, torch.tensor(39.0).double().exp().item() / 8))


@pytest.mark.parametrize("name", LOSSES)
def test_a_log_ratio_above_40_counts_as_40(name):
    """e^40 where the reward is worst, in a row that no clip stops: the largest term that a loss can have."""
    A = torch.tensor([-1.0, 1.0, 1.0, -1.0]).double()
    new, old = torch.full((4, 2), -1.0).double(), torch.full((4, 2), -1.0).double()
    old[0] = -46.0
    at = LOSSES[name](new, old, A)[0] / math.exp(40)
    old[0] = -41.0
    torch.testing.assert_close(at, LOSSES[name](new, old, A)[0] / math.exp(40), rtol=1e-12, atol=0)
    old[0] = -40.5
    assert LOSSES[name](new, old, A)[0] / math.exp(40) == pytest.approx(at.item() * math.exp(-0.5), rel=1e-9)
