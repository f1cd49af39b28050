"""A tiny Llama with a tokenizer of bytes, and a mixture of experts made from it, each as a folder."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from recipes.hf_routing import find_routers
from recipes.hf_text import load_model


def save_tiny_llama(folder) -> str:
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    ids = {c: i for i, c in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    of_bytes = Tokenizer(models.BPE(ids, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def save_tiny_moe(folder) -> str:
    """The tiny Llama, upcycled, with experts that differ."""
    model, _ = load_model(save_tiny_llama(folder))
    for _, block in find_routers(model):
        torch.nn.init.normal_(block.experts.down_proj, std=0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return str(folder)
