"""results/real_model.py on a tiny Llama: what stands before the last MLP, and log p under every expert."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from tiny_hf import save_tiny_llama  # noqa: E402

from recipes.upcycle_hf import load_dense  # noqa: E402
from results import real_model  # noqa: E402
from support.tasks import rng  # noqa: E402


def test_log_p_under_an_expert_is_that_of_the_model_with_that_mlp(tmp_path):
    model, _ = load_dense(save_tiny_llama(tmp_path / "llama"))
    model.eval().requires_grad_(False)
    tokens = torch.randint(model.config.vocab_size, (4, 17), generator=rng("tokens"))
    x, mlp = real_model.before_last_mlp(model, tokens), model.model.layers[-1].mlp
    expert = real_model.train_expert(model, x, tokens, 0)
    found = real_model.decisions_of(model, x, tokens, [mlp, expert])
    losses = []
    for e, network in enumerate((mlp, expert)):
        model.model.layers[-1].mlp = network
        with torch.no_grad():
            log_probs = model(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        torch.testing.assert_close(found.log_probs[..., e], log_probs)
        losses.append(-log_probs.mean().item())
    assert losses[1] < losses[0] - 1e-3  # the expert has learnt its windows, and the parent stayed as it was
    torch.testing.assert_close(found.inputs, model.model.layers[-1].post_attention_layernorm(x))
