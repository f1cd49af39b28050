"""What a CPU can check of the CUDA path: under torch.compile neither the parts of a training step nor ERL's and RAIS's
losses break the graph (`fullgraph` raises where the host would read a tensor; ERPO's loss checks rewards on the host),
in bfloat16, where the experts' product is grouped.
"""

import pytest
import torch
from test_moe import gradients, make, noise_for, words

from erl import erl_advantage, erl_loss, random_routes
from moe import GPT, MoEConfig, Routes, router_losses
from rais import rais_loss
from support.head import lm_loss, token_log_probs


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(f):
    return torch.compile(f, backend="aot_eager", fullgraph=True)


CONFIG = MoEConfig(vocab_size=31, n_layer=2, n_head=2, n_embd=32, context=16, n_expert=4, top_k=2, gate="prob")


@pytest.fixture
def model():
    return GPT(CONFIG, torch.Generator().manual_seed(0))


def test_stem_and_branch_with_and_without_routes(model):
    """As train.py compiles them: forward and backward, plain, and along imposed routes."""
    tokens = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(1))
    drawn = random_routes(2, 16, 1, 4, 2, 0.5, generator=torch.Generator().manual_seed(2))
    stem, branch = whole(model.stem), whole(model.branch)
    with torch.autocast("cpu", torch.bfloat16):
        for routes in (None, Routes(*drawn)):
            compiled, eager = branch(stem(tokens), routes=routes), model(tokens, routes=routes)
            assert torch.equal(compiled[1].experts, eager[1].experts)
            results = []
            for features, routing in (compiled, eager):
                loss = features.float().square().mean() + router_losses(routing.logits, routing.experts)[0].sum()
                results.append(torch.autograd.grad(loss, list(model.blocks.parameters()), allow_unused=True))
            for a, b in zip(*results, strict=True):
                assert (a is None) == (b is None)
                assert a is None or (a - b).norm() <= 0.05 * b.norm() + 1e-4


def step_loss(model, forward, tokens, **more):
    features, routing = forward(tokens, **more)
    balance, z, _ = router_losses(routing.logits, routing.experts)
    return lm_loss(features, model.wte.weight, tokens)[0] + balance.sum() + z.sum()


@pytest.mark.parametrize("V", [23, 5000])
def test_compiled_training_step_equals_the_eager_one(V):
    """Float32 on the CPU: the loop over experts stays outside the graph. Loss and gradients."""
    model = make(8, vocab_size=V, n_shared_expert=1, n_layer=2)
    tokens, results = words(model), []
    for f in (model, torch.compile(model, backend="aot_eager")):
        loss = step_loss(model, f, tokens, noise=noise_for(model, tokens))
        results.append((loss.detach(), *gradients(loss, list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_losses():
    """Each against its eager value; V = 5000 takes the head in blocks."""
    g = torch.Generator().manual_seed(0)
    x, w, targets = torch.randn(2, 8, 16, generator=g), torch.randn(5000, 16, generator=g), torch.arange(16).view(2, 8)
    P = torch.randn(2, 8, 3, 4, generator=g).log_softmax(-1)
    log_probs, A, mask = -torch.rand(2, 8, generator=g), torch.randn(2, 8, generator=g), targets % 5 > 0
    for f, arguments in (
        (lm_loss, (x, w, targets, mask)),
        (token_log_probs, (x, w, targets)),
        (erl_advantage, (log_probs, A)),
        (erl_loss, (P, P + 0.1, A, mask[..., None].expand(2, 8, 3))),
        (rais_loss, (log_probs, log_probs + 0.1, A[:, 0], mask, P, P + 0.1)),
    ):
        torch.testing.assert_close(whole(f)(*arguments), f(*arguments))
