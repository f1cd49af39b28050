"""Dense Llama-type models become mixtures of experts that compute the same."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from tiny_hf import save_tiny_llama  # noqa: E402

from recipes.hf_routing import find_routers, impose, record  # noqa: E402
from recipes.upcycle_hf import largest_gap, load_dense, upcycle  # noqa: E402

SMALL = dict(vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=5, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=64)
PARENTS = {
    "llama": dict(tie_word_embeddings=True),
    "llama, head of its own": dict(tie_word_embeddings=False, rms_norm_eps=1e-3),
    "mistral": dict(sliding_window=None, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "qwen2": dict(hidden_act="gelu"),
}


def make(parent, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(parent.split(",")[0], **(SMALL | PARENTS.get(parent, {}) | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():  # biases and norms too must be seen to arrive
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.5)
    return model


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("every, top_k, shared", [(1, 1, False), (2, 2, True), (3, 1, True)])
def test_computes_what_its_parent_computes(parent, every, top_k, shared):
    dense = make(parent)
    model = upcycle(dense, num_experts=4, top_k=top_k, every=every, shared=shared)
    assert largest_gap(dense, model) < 2e-6
    assert dense.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    blocks = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert blocks == list(range(every - 1, 5, every))
    one = sum(p.numel() for p in dense.model.layers[0].mlp.parameters())
    extra = len(blocks) * ((3 + shared) * one + 4 * 32 + 32)  # three more copies, the router, the shared expert's gate
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters()) + extra


def test_routers_are_fresh_and_any_route_computes_what_the_parent_computes():
    """And once an expert has changed it does not: routes are really imposed."""
    dense, tokens, weights = make("llama"), torch.arange(20).view(2, 10), []
    for seed in (1, 0, 0):
        model = upcycle(dense, num_experts=4, top_k=2, generator=torch.Generator().manual_seed(seed))
        weights.append(torch.stack([router.weight for router, _ in find_routers(model)]))
    another, weight, same = weights
    assert torch.equal(weight, same) and not torch.equal(weight, another) and 0.085 < weight.std() < 0.115
    with torch.no_grad():
        with record(model) as tape:
            expected = model(tokens).logits
        with impose(model, tape.routes()._replace(experts=(tape.experts + 1) % 4)):
            torch.testing.assert_close(model(tokens).logits, expected)
            find_routers(model)[0][1].experts.down_proj[2].zero_()
            assert (model(tokens).logits - expected).abs().max() > 1e-3


OTHERS = [("qwen3", dict(head_dim=8)), ("gpt2", dict(n_embd=24)), ("llama", dict(mlp_bias=True))]
OTHERS += [("mistral", dict(sliding_window=48)), ("granite", dict(residual_multiplier=0.3))]


@pytest.mark.parametrize("kind, changes", OTHERS)
def test_other_parents_are_refused(kind, changes):
    config = transformers.AutoConfig.for_model(kind, **({} if kind == "gpt2" else SMALL) | changes)
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="only a Llama-type model|off by|sliding window|intermediate_size"):
        upcycle(dense, num_experts=2, every=1)


def test_a_saved_model_is_loaded_by_transformers(tmp_path):
    """It computes the same, and can be sampled."""
    dense, _ = load_dense(save_tiny_llama(tmp_path / "dense"))
    upcycle(dense, num_experts=3, shared=True).save_pretrained(tmp_path / "moe")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert largest_gap(dense, loaded) < 2e-6 and loaded.config.num_experts == 3
    tokens = torch.arange(20).view(2, 10)
    assert loaded.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 13)
