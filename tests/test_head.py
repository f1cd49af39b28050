"""support/head.py: the large-vocabulary head against moe.py's plain one, value and gradients."""

import pytest
import torch

import moe
from support import head


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(head, "BLOCK", 16)  # of 40 tokens a last block of 8


def case(seed, V=5000, dtype=torch.float32):
    """40 tokens, their targets, the first and the last word among them, and a mask."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(4, 10, 8, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, 8, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (4, 10), generator=g)
    targets[0, :2] = torch.tensor([0, V - 1])
    return features, weight, targets, torch.rand(4, 10, generator=g) < 0.7


def assert_same(ours, plain, features, weight, seed, tolerance=1e-5):
    """Values to 1e-5, and the gradients of their sum with random weights to `tolerance`."""
    to = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed))
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad((x * to).sum(), (features, weight)) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1, b.abs().max().item()), rtol=tolerance)


@pytest.mark.parametrize("V", [50, 5000])
@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_lm_loss_equals_the_plain_one(V, masked):
    for seed in range(3):
        features, weight, targets, mask = case(seed, V)
        mask = {"none": None, "some": mask, "all": mask & False}[masked]
        ours, plain = (f(features, weight, targets, mask) for f in (head.lm_loss, moe.lm_loss))
        assert_same(ours[0], plain[0], features, weight, seed)
        torch.testing.assert_close(ours[1], plain[1], atol=1e-5, rtol=1e-5)
        assert not ours[1].requires_grad and (masked != "all" or ours[0] == 0)


@pytest.mark.parametrize("V", [50, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_token_log_probs_equal_the_plain_ones(V, temperature):
    """In float32; in float64; and under autocast, where a block's gradient is rounded before it is added."""
    for seed, dtype in enumerate((torch.float32, torch.float32, torch.float64)):
        features, weight, targets, _ = case(seed, V, dtype)
        if temperature == 0:  # it counts as MIN_TEMPERATURE: small logits leave float32 its digits
            features, weight = ((x.detach() * 1e-2).requires_grad_() for x in (features, weight))
        for autocast in (False, dtype == torch.float32):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = (f(features, weight, targets, temperature) for f in (head.token_log_probs, moe.token_log_probs))
                assert_same(*found, features, weight, seed, 5e-3 if autocast else 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("f", [lambda *x: head.lm_loss(*x)[0], head.token_log_probs])
def test_no_tensor_holds_the_logits_of_all_tokens(f, autocast):
    features, weight, targets, _ = case(3)
    options = torch.profiler.profile(record_shapes=True), torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with options[0] as profile, options[1]:
        f(features, weight, targets).sum().backward()
    shapes = [shape for event in profile.events() for shape in event.input_shapes if len(shape) == 2]
    assert [16, 5000] in shapes and not any(40 in shape and max(shape) >= 500 for shape in shapes)
