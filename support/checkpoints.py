"""Models on disk: checkpoints, GPT-2's weights from the hub or a folder, and the model that a run starts from.

A checkpoint is one safetensors file: the weights by their names, the optimizer's tensors under `optimizer.`, and in its
header the configuration and whatever else there is, as JSON.
"""

import contextlib
import json
import os
from dataclasses import asdict, replace

import torch
from torch import Tensor

from moe import GPT, SIZES, MoEConfig
from support.errors import UserError, as_user_error
from support.tasks import rng

OPTIMIZER = "optimizer."


def save_checkpoint(path: str, model: GPT, optimizer=None, **metadata):
    """Write the file aside and rename it: whoever is killed meanwhile leaves a whole one, old or new.

    metadata: JSON values. UserError where it cannot be written; nothing half-written stays behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: w.contiguous() for name, w in model.state_dict().items()}
    for name, p in model.named_parameters() if optimizer else ():
        tensors |= {f"{OPTIMIZER}{name}.{key}": x for key, x in optimizer.state.get(p, {}).items()}
    # One entry alone: safetensors writes several in an order that changes from run to run, and so would the bytes.
    header = {"config": json.dumps(asdict(model.config) | {"metadata": metadata})}
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save_file(tensors, path + ".tmp", metadata=header)
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk comes as any of them
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        advice = "make room for it; what was saved before stays"
        raise UserError(f"{path} could not be written ({error}): {advice}") from error


def load_checkpoint(path: str) -> tuple[GPT, dict, dict[str, Tensor]]:
    """The model of `save_checkpoint` on the CPU in float32, its metadata, and the optimizer's tensors.

    ValueError for a file that is none of ours.
    """
    with _open(path) as (file, config, metadata):
        # Copies, for their alignment: CPU products of tensors that lie in the mapped file round otherwise.
        tensors = {name: file.get_tensor(name).float().clone() for name in file.keys()}
        optimizer = {n.removeprefix(OPTIMIZER): tensors.pop(n) for n in list(tensors) if n.startswith(OPTIMIZER)}
        with torch.device("meta"):  # no weights are drawn, so no random generator moves
            model = GPT(config)
        model.load_state_dict(tensors, assign=True)
    return model, metadata, optimizer


def load_model(path: str) -> tuple[GPT, dict]:
    """`load_checkpoint` without the optimizer."""
    return load_checkpoint(path)[:2]


def read_config(path: str) -> MoEConfig:
    """The configuration of a checkpoint, without its weights. ValueError for a file that is none of ours."""
    with _open(path) as (_, config, _):
        return config


@contextlib.contextmanager
def _open(path: str):
    """-> the open file, the configuration and the metadata in its header"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if "config" not in header:
                raise ValueError("there are weights in it, but no configuration")
            config = json.loads(header["config"])
            metadata = config.pop("metadata", {})
            yield file, MoEConfig(**drop_capacity(config)), metadata
    except (SafetensorError, OSError, TypeError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable checkpoint of this program: {reason}") from error


def drop_capacity(settings: dict) -> dict:
    """Settings of an earlier version without expert_capacity. ValueError if it was used: no expert drops tokens now."""
    if settings.get("expert_capacity", 0) != 0:
        raise ValueError(f"expert_capacity {settings['expert_capacity']} is no longer there: every token is served")
    return {name: value for name, value in settings.items() if name != "expert_capacity"}


# ----------------------------------------------------------------------------------------------------- GPT-2's weights

GPT2_NAMES = {"blocks.": "h.", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj"}  # ours: theirs
GPT2_NAMES |= {"w_in": "c_fc.weight", "b_in": "c_fc.bias", "w_out": "c_proj.weight", "b_out": "c_proj.bias"}
# What our model computes, and transformers' default where a config.json does not name it.
GPT2_SETTINGS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
GPT2_SETTINGS |= {"scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}


def load_gpt2(source: str) -> GPT:
    """GPT-2 as the dense model, from the hub or from a folder in transformers' format (config.json, model.safetensors).

    ValueError when it cannot be had or is not a GPT-2.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    try:
        files = ["config.json", "model.safetensors"]
        folder = source if os.path.isdir(source) else snapshot_download(source, allow_patterns=files)
        weights = load_file(os.path.join(folder, "model.safetensors"))
    except Exception as error:  # the hub's errors have no common base; each means that there are no weights
        lacks = f"GPT-2's weights could not be had from {source!r} ({type(error).__name__})"
        advice = "or a network and HF_ENDPOINT that reach the hub"
        raise ValueError(f"{lacks}: give --init a folder with config.json and model.safetensors, {advice}") from error
    with torch.device("meta"):
        model = GPT(read_gpt2_config(folder))
    weights, state = {name.removeprefix("transformer."): w for name, w in weights.items()}, {}
    for name, parameter in model.named_parameters():
        other = name
        for ours, theirs in GPT2_NAMES.items():
            other = other.replace(ours, theirs)
        w = weights.get(other)
        if w is None or w.numel() != parameter.numel():
            raise ValueError(f"{source!r} lacks {other} of {parameter.numel()} numbers: only GPT-2 can be loaded")
        # Conv1D keeps [in, out]: what our experts use too, and the transpose of nn.Linear.
        w = w.T if name.endswith(("qkv.weight", "proj.weight")) else w.view(parameter.shape)
        state[name] = w.float().clone(memory_format=torch.contiguous_format)  # aligned, see load_checkpoint
    model.load_state_dict(state, assign=True)
    return model


def read_gpt2_config(folder: str) -> MoEConfig:
    """The dense configuration of a folder in transformers' format. ValueError for another kind of model."""
    with open(os.path.join(folder, "config.json")) as file:
        theirs = json.load(file)
    theirs = GPT2_SETTINGS | {"model_type": None} | theirs
    for key, value in (GPT2_SETTINGS | {"model_type": "gpt2"}).items():
        if theirs[key] != value:
            raise ValueError(f"{folder!r} has {key} {theirs[key]!r}, not {value!r}: only GPT-2 can be loaded")
    sizes = {name: theirs.get(name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return MoEConfig(n_expert=1, context=theirs.get("n_positions"), **sizes)


# ------------------------------------------------------------------------------------ The model that a run starts from

EXPERT_FLAGS = ("n_expert", "top_k", "n_shared_expert", "moe_every", "gate")


def find_checkpoint(out: str, name: str = "checkpoint") -> str | None:
    """The file of a run's checkpoint (or of its "best" one), or None."""
    path = os.path.join(out, name, "model.safetensors")
    return path if os.path.isfile(path) else None


def locate(source: str) -> tuple[str, str]:
    """What --init names: ("scratch" | "gpt2" | "checkpoint", where it is)."""
    if source == "scratch":
        return "scratch", source
    if source == "gpt2":
        return "gpt2", "openai-community/gpt2"
    if path := source if os.path.isfile(source) else find_checkpoint(source):
        return "checkpoint", path
    if all(os.path.isfile(os.path.join(source, name)) for name in ("config.json", "model.safetensors")):
        return "gpt2", source
    raise UserError(f"--init {source}: there is no run, checkpoint file or GPT-2 folder of that name")


def size_of(config: MoEConfig) -> str:
    """The name of a model's size, "custom" if it has none."""
    return next((name for name, sizes in SIZES.items() if asdict(config).items() >= sizes.items()), "custom")


def look_at(source: str) -> tuple[str | None, int | None]:
    """Size and vocabulary of the model that --init names, without reading its weights; None where it names none."""
    if source in ("scratch", "gpt2"):
        return ("gpt2", 50257) if source == "gpt2" else (None, None)
    kind, where = locate(source)
    with as_user_error():
        config = read_config(where) if kind == "checkpoint" else read_gpt2_config(where)
    return size_of(config), config.vocab_size


def initial_model(args, tokenizer, dense_first: bool) -> tuple[GPT, MoEConfig]:
    """The model that --init names, and the configuration that the algorithm trains."""
    kind, where = locate(args.init)
    with as_user_error():
        if kind == "scratch":
            target = MoEConfig(vocab_size=tokenizer.vocab_size, **SIZES[args.model], **expert_settings(args))
            return GPT(target.dense() if dense_first else target, rng(args.seed, "weights")), target
        model = load_model(where)[0] if kind == "checkpoint" else load_gpt2(where)
    args.model = size_of(model.config)  # its own size, whatever --model says
    if args.pretrain_steps and dense_first and model.config.n_expert > 1:
        raise UserError("--pretrain-steps trains a dense model, and --init names one with experts: set it to 0")
    return model, check_model(args, tokenizer, model, f"--init {args.init}")


def expert_settings(args) -> dict:
    return {"n_expert": 1} if args.algo == "dense" else {name: getattr(args, name) for name in EXPERT_FLAGS}


def check_model(args, tokenizer, model: GPT, source: str) -> MoEConfig:
    """The configuration that the algorithm trains, if `model` can become it. UserError if it cannot."""
    if not is_finite(model):
        raise UserError(f"{source} holds weights that are not finite: take another one")
    if model.config.vocab_size != tokenizer.vocab_size:
        sizes = f"{model.config.vocab_size}, the tokenizer {tokenizer.name} one of {tokenizer.vocab_size}"
        raise UserError(f"{source} has a vocabulary of {sizes}: choose the tokenizer that it was trained with")
    with as_user_error():
        wanted = replace(model.config, **expert_settings(args))
    if model.config.n_expert == 1 or wanted == model.config:
        return wanted
    if args.algo == "dense":
        raise UserError(f"{source} has experts: --algo dense needs a dense model")
    theirs = asdict(model.config)
    flags = " ".join(f"--{k.replace('_', '-')} {theirs[k]}" for k, v in asdict(wanted).items() if v != theirs[k])
    raise UserError(f"{source} has other experts than the flags ask for: add {flags}")


def is_finite(model) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())
