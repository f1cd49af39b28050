"""support/kernels.py and support/head.py: each fast form against the plain one of moe.py, value and gradients; and what
test_moe.py asks of a model, asked of one that `speed_up` has been at.
"""

import copy

import pytest
import test_moe
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_moe import (  # noqa: F401 (run here with fast models, see `fast`)
    gradients,
    head_case,
    make_layer,
    plain_moe,
    random_routes,
    rng,
    test_a_forward_leaves_nothing_behind,
    test_a_later_token_changes_nothing_earlier,
    test_companions_and_padding_change_nothing,
    test_copies_of_the_branch_equal_separate_forwards,
    test_copies_with_nothing_forced_are_equal,
    test_every_route_of_a_fresh_upcycled_model_gives_the_same_log_probs,
    test_forced_routes_by_the_book,
    test_forward_by_the_book,
    test_half_precision_model_keeps_a_float32_router,
    test_jitter_is_asked_for_and_touches_the_router_alone,
    test_model_loss_is_the_mean_over_the_masked_tokens,
    test_relabelled_experts_compute_the_same,
    test_replaying_its_own_routes_changes_no_bit,
    test_route_again_reaches_the_routers_alone,
    test_router_is_float32_under_bfloat16_autocast,
    test_same_routes_same_numbers,
    test_top1_renorm_sends_the_router_no_gradient_and_the_other_gates_do,
    test_upcycled_model_equals_its_dense_parent,
    words,
)
from torch.autograd import gradcheck

import moe
from support import head, kernels
from support.fast import speed_up

seeds = st.integers(0, 10_000)
moderate = settings(deadline=None, max_examples=25)
plain_make, plain_upcycle = test_moe.make, test_moe.upcycle


@pytest.fixture(scope="module", autouse=True)
def fast():
    """The models that the functions of test_moe.py make are fast ones here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_moe, "make", make)
        patch.setattr(test_moe, "upcycle", lambda *args: speed_up(plain_upcycle(*args)))
        yield


def make(*args, **changes) -> moe.GPT:
    return speed_up(plain_make(*args, **changes))


# ------------------------------------------------------------------------------------------------------------- speed_up


def test_speed_up_switches_one_model_and_its_copies():
    plain, model = plain_make(), make()
    assert speed_up(model) is model
    for twin in (model, copy.deepcopy(model)):
        for block in twin.config.moe_blocks:
            assert twin.blocks[block].mlp.experts.kernel is kernels.mix_experts
        assert (twin.lm_loss_kernel, twin.log_probs_kernel) == (head.lm_loss, head.token_log_probs)
    assert plain.blocks[1].mlp.experts.kernel is moe.mix_experts and plain.lm_loss_kernel is moe.lm_loss
    assert make().state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("V", [23, 5000])
@pytest.mark.parametrize("variant", test_moe.VARIANTS, ids=test_moe.name_of)
def test_a_fast_training_step_equals_the_plain_one(variant, V):
    model = plain_make(1, vocab_size=V, **variant)
    tokens = words(model)
    mask = torch.rand(tokens.shape, generator=rng()) < 0.7
    results = []
    for m in (model, speed_up(copy.deepcopy(model))):
        out = m(tokens, tokens, mask)
        loss = out.lm_loss + out.balance_loss.sum() + out.z_loss.sum()
        results.append((loss.detach(), *gradients(loss, list(m.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("path", ["grouped", "in turn", "by size"])
@moderate
@given(st.integers(2, 9), st.integers(1, 3), st.booleans(), st.integers(1, 40), seeds)
def test_fast_experts_equal_the_plain_ones(path, n_expert, top_k, skewed, N, seed):
    """Value and all gradients, by the grouped product and without it; experts without a token included."""
    top_k, g = min(top_k, n_expert), rng(seed)
    layer = make_layer(seed, n_expert=n_expert, top_k=top_k).experts
    x = torch.randn(N, 16, generator=g).requires_grad_()
    scores = torch.rand(N, n_expert, generator=g) + 2 * skewed * torch.arange(n_expert)
    experts, weights = scores.topk(top_k).indices, torch.rand(N, top_k, generator=g).requires_grad_()
    arguments = [x, weights, *layer.parameters()]
    to = torch.randn(N, 16, generator=g)
    with pytest.MonkeyPatch.context() as patch:
        if path == "in turn":
            patch.setattr(kernels, "has_grouped_mm", lambda *_: False)
        elif path == "by size":
            patch.setattr(kernels, "SLOTS_FOR_TURNS", 2)
        else:
            assert kernels.has_grouped_mm(x, layer.w_in) and not kernels.turns_are_faster(x, n_expert)
        fast = kernels.mix_experts(x, experts, *arguments[1:])
        ours = gradients((fast * to).sum(), arguments)
    plain = moe.mix_experts(x, experts, *arguments[1:])
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-4)
    for a, b in zip(ours, gradients((plain * to).sum(), arguments), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_which_experts_work_in_turn():
    x = torch.empty(8 * kernels.SLOTS_FOR_TURNS, 16)
    assert kernels.turns_are_faster(x, 8)
    assert not kernels.turns_are_faster(x[:-1], 8)
    assert not kernels.turns_are_faster(x.bfloat16(), 8)
    assert not kernels.turns_are_faster(x.to("meta"), 8)


def fast_layer(*args, **changes):
    layer = make_layer(*args, **changes)
    layer.experts.kernel = kernels.mix_experts
    return layer


@pytest.mark.parametrize("top_k, gate, capacity", [(1, "prob", 0), (2, "renorm", 0), (2, "prob", 2)])
def test_gradcheck_of_the_fast_layer(top_k, gate, capacity, monkeypatch):
    monkeypatch.setattr(test_moe, "make_layer", fast_layer)
    test_moe.test_gradcheck_of_the_layer(top_k, gate, capacity)


def test_fast_bfloat16_dispatch_is_as_exact_as_bfloat16(monkeypatch):
    monkeypatch.setattr(test_moe, "make_layer", fast_layer)
    test_moe.test_bfloat16_dispatch_is_as_exact_as_bfloat16()


@pytest.mark.parametrize("mix", [moe.mix_experts, kernels.mix_experts], ids=["plain", "fast"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_identical_experts_give_the_same_whatever_the_weights(top_k, mix):
    """Weights that sum to 1, in bfloat16: they are applied and added up in float32. Rounded first, 0.3 and 0.7 make
    0.9998 and results differ in the last digit."""
    layer = make_layer(6, n_expert=4, top_k=top_k)
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.copy_(p[:1].expand_as(p).clone())
    g = rng(7)
    x = torch.randn(500, 16, generator=g)
    results = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            experts = torch.rand(500, 4, generator=g).topk(top_k).indices
            weights = torch.rand(500, top_k, generator=g).softmax(-1)
            results.append(mix(x, experts, weights, *layer.experts.parameters()))
    assert results[0].dtype == torch.bfloat16
    assert (results[0] != results[1]).float().mean() < 1e-3


# ------------------------------------------------------------------------------------------------------ the output head


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(head, "CPU_TILE", (16, 1500))  # 16 tokens at a time, and a last tile of 500 words


def mean_loss(*args):
    return head.lm_loss(*args)[0]


@pytest.mark.parametrize("V", [50, 5000])
@pytest.mark.parametrize("masked", [None, 0.7, 0.0])
def test_fast_lm_loss_equals_log_softmax(V, masked, small_blocks):
    for seed in range(3):
        features, weight, targets, mask = head_case(seed, V=V, masked=masked or 0.0)
        mask = None if masked is None else mask
        loss, log_probs = head.lm_loss(features, weight, targets, mask)
        nll = -(features @ weight.T).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        keep = torch.ones_like(nll, dtype=torch.bool) if mask is None else mask
        plain = nll[keep].sum() / max(int(keep.sum()), 1)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(log_probs, moe.lm_loss(features, weight, targets, mask)[1])
        torch.testing.assert_close(loss, moe.lm_loss(features, weight, targets, mask)[0])
        assert not log_probs.requires_grad
        for a, b in zip(gradients(3 * loss, (features, weight)), gradients(3 * plain, (features, weight)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            assert masked != 0.0 or not a.any()


@pytest.mark.parametrize("V", [50, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_fast_token_log_probs_equal_the_plain_ones(V, temperature, small_blocks):
    for seed in range(3):
        features, weight, targets, _ = head_case(seed, V=V)
        ours = head.token_log_probs(features, weight, targets, temperature)
        plain = moe.token_log_probs(features, weight, targets, temperature)
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
        to = torch.randn(ours.shape, generator=rng(seed))
        expected = gradients((plain * to).sum(), (features, weight))
        for a, b in zip(gradients((ours * to).sum(), (features, weight)), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("f", [mean_loss, head.token_log_probs])
def test_gradcheck_of_the_blocked_head(f, small_blocks):
    features, weight, targets, _ = head_case(1, torch.float64, V=4100)
    assert f(features, weight, targets).dtype == torch.float64
    assert gradcheck(lambda x, w: f(x, w, targets), (features, weight), fast_mode=True)


def test_blocked_head_asks_only_for_the_gradients_needed(small_blocks, monkeypatch):
    for f in (mean_loss, head.token_log_probs):
        for needed in (0, 1):
            features, weight, targets, _ = head_case(2)
            whole = gradients(f(features, weight, targets).sum(), (features, weight))[needed]
            (weight if needed == 0 else features).requires_grad_(False)
            part = torch.autograd.grad(f(features, weight, targets).sum(), (features, weight)[needed])[0]
            assert torch.equal(whole, part)
        with torch.no_grad(), monkeypatch.context() as m:
            m.setattr(head, "_softmax_less_target", None)  # an evaluation computes no gradient
            assert not f(features.requires_grad_(), weight.requires_grad_(), targets).requires_grad


@pytest.mark.parametrize("f", [mean_loss, head.token_log_probs])
def test_blocked_head_under_bfloat16_autocast(f, small_blocks):
    features, weight, targets, _ = head_case(3)
    with torch.autocast("cpu", torch.bfloat16):
        value = f(features, weight, targets)
    assert value.dtype == torch.float32
    ours = gradients(value.mean(), (features, weight))
    plain = f(features, weight, targets)
    assert (value - plain).abs().max() < 0.1 and not torch.equal(value, plain)
    for a, b in zip(ours, gradients(plain.mean(), (features, weight)), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_blocked_head_keeps_each_operands_dtype(small_blocks):
    """bfloat16 features and a float32 weight (autocast): the weight's gradient is not rounded to bfloat16."""
    features, weight, targets, _ = head_case(4)
    half = features.detach().bfloat16().requires_grad_()
    for f in (mean_loss, head.token_log_probs):
        with torch.autocast("cpu", torch.bfloat16):
            grad_x, grad_w = gradients(f(half, weight, targets).sum(), (half, weight))
        assert grad_x.dtype == torch.bfloat16 and grad_w.dtype == torch.float32
        assert not torch.equal(grad_w, grad_w.bfloat16().float())


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 0.0])
def test_fast_temperatures_near_zero_are_the_coldest(temperature, small_blocks):
    features, weight, targets, _ = head_case(1)
    expected = head.token_log_probs(features, weight, targets, moe.MIN_TEMPERATURE)
    assert torch.equal(head.token_log_probs(features, weight, targets, temperature), expected)
    plain = moe.token_log_probs(features, weight, targets, temperature)
    torch.testing.assert_close(expected, plain, atol=1e-6 / moe.MIN_TEMPERATURE, rtol=1e-5)
    assert all(g.isfinite().all() for g in gradients(expected.sum(), (features, weight)))
