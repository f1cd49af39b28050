"""A tiny Llama with a tokenizer of bytes, as a folder."""

import tokenizers
import torch
import transformers


def byte_tokenizer():
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def save_tiny_llama(folder, **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
