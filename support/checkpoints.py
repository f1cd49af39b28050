"""Models on disk: our own checkpoints, and GPT-2's weights from the hub or from a folder."""

import contextlib
import json
import os
from dataclasses import asdict

import torch
from torch import Tensor

from moe import GPT, MoEConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save_model(model: GPT, path: str, **metadata):
    """Weights as safetensors; the configuration and `metadata` (JSON values) travel in the file's header."""
    from safetensors.torch import save_file

    # one entry alone: safetensors writes several in an order that changes from run to run, and so would the bytes
    header = {"config": json.dumps(asdict(model.config) | {"metadata": metadata})}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata=header)


def load_model(path: str) -> tuple[GPT, dict]:
    """The model of `save_model` on the CPU, and its metadata. ValueError for a file that is none of ours."""
    with _open(path) as file:
        config, metadata = _header(file)
        # copies, for their alignment: CPU products of tensors that lie in the mapped file round otherwise
        weights = {k: file.get_tensor(k).clone() for k in file.keys()}
        if {w.dtype for w in weights.values()} not in ({dtype} for dtype in DTYPES):
            raise ValueError("its weights are not all of one floating-point type")
        model = _empty_model(config, weights)
        model.load_state_dict(weights, assign=True)
    return model, metadata


def read_config(path: str) -> MoEConfig:
    """The configuration of a checkpoint, without its weights. ValueError as of `load_model`."""
    with _open(path) as file:
        return _header(file)[0]


@contextlib.contextmanager
def _open(path: str):
    """The safetensors file. Whatever goes wrong with it is a ValueError of one sentence."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (
        SafetensorError,
        OSError,
        TypeError,
        RuntimeError,
        ValueError,
        OverflowError,
    ) as error:  # RecursionError too
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable checkpoint of this program: {reason}") from error


def _header(file) -> tuple[MoEConfig, dict]:
    header = file.metadata() or {}
    if "config" not in header:
        raise ValueError("there are weights in it, but no configuration")
    config = dict(json.loads(header["config"]))
    metadata = config.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError("the metadata in its header is not a table")
    return MoEConfig(**config), metadata


def _empty_model(config: MoEConfig, weights: dict[str, Tensor]) -> GPT:
    """A model to put `weights` into. None are drawn, so no random generator moves."""
    layers, shared = config.n_layer, config.n_shared_expert
    if layers > len(weights) or len(config.moe_blocks) * shared > len(weights):  # before a million modules are made
        raise ValueError(f"{layers} layers, {shared} shared experts: more than its {len(weights)} tensors can fill")
    with torch.device("meta"):
        return GPT(config)


def load_gpt2(source: str = "openai-community/gpt2") -> GPT:
    """GPT-2 as the dense model, from the hub or from a folder in transformers' format (config.json, model.safetensors).

    ValueError when it cannot be had or is not a GPT-2.
    """
    from safetensors.torch import load_file

    try:
        folder = source if os.path.isdir(source) else _folder_of_hub(source)
        theirs = _read_table(folder)
        weights = load_file(os.path.join(folder, "model.safetensors"))
    except Exception as error:  # the hub's errors have no common base; each means that there are no weights
        raise ValueError(
            f"GPT-2's weights could not be had from {source!r} ({type(error).__name__}): give --init a folder with "
            "config.json and model.safetensors, or a network and HF_ENDPOINT that reach the hub"
        ) from error
    return _fill_from_gpt2(_empty_model(_gpt2_config(theirs, source), weights), weights, source)


def read_gpt2_config(folder: str) -> MoEConfig:
    """The sizes in a folder of GPT-2's weights. ValueError where config.json is no GPT-2's."""
    try:
        theirs = _read_table(folder)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}/config.json is not readable ({type(error).__name__})") from error
    return _gpt2_config(theirs, folder)


def _read_table(folder: str) -> dict:
    with open(os.path.join(folder, "config.json")) as file:
        return dict(json.load(file))


def _gpt2_config(theirs: dict, source: str) -> MoEConfig:
    expected = dict(
        model_type="gpt2",
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )
    for key, value in expected.items():
        if theirs.get(key, value if key != "model_type" else None) != value:
            raise ValueError(f"{source!r} has {key} {theirs.get(key)!r}, not {value!r}: only GPT-2 can be loaded")
    sizes = dict(vocab_size="vocab_size", context="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
    return MoEConfig(n_expert=1, **{ours: theirs.get(key) for ours, key in sizes.items()})


def _folder_of_hub(source: str) -> str:
    """Where the hub's copy of config.json and model.safetensors lies on this machine."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    for file in ("config.json", "model.safetensors"):
        try:
            path = hf_hub_download(source, file, local_files_only=True)  # the cache needs no network
        except LocalEntryNotFoundError:
            get_hf_file_metadata(hf_hub_url(source, file))  # fails at once; a download tries for half a minute
            path = hf_hub_download(source, file)
    return os.path.dirname(path)


GPT2_NAMES = {  # ours: theirs
    "blocks.": "h.",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "w_in": "c_fc.weight",
    "b_in": "c_fc.bias",
    "w_out": "c_proj.weight",
    "b_out": "c_proj.bias",
}


def _fill_from_gpt2(model: GPT, weights: dict[str, Tensor], source: str) -> GPT:
    weights = {k.removeprefix("transformer."): w for k, w in weights.items()}
    state = {}
    for name, parameter in model.named_parameters():
        theirs = name
        for ours, other in GPT2_NAMES.items():
            theirs = theirs.replace(ours, other)
        w = weights.get(theirs)
        if w is None or w.numel() != parameter.numel():
            raise ValueError(f"{source!r} lacks {theirs} of {parameter.numel()} numbers: only GPT-2 can be loaded")
        # Conv1D keeps [in, out]: what our experts use too, and the transpose of nn.Linear.
        w = w.T if name.endswith(("qkv.weight", "proj.weight")) else w.view(parameter.shape)
        state[name] = w.float().clone(memory_format=torch.contiguous_format)  # aligned, see load_model
    model.load_state_dict(state, assign=True)
    return model


def is_finite(model) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())
