"""The model that a run starts from: new, GPT-2's weights, or a checkpoint of this program."""

import os
from dataclasses import asdict, replace

from moe import GPT, SIZES, MoEConfig
from support.checkpoints import is_finite, load_gpt2, load_model, read_config, read_gpt2_config
from support.errors import UserError, plainly
from support.run_folder import find_checkpoint
from support.tasks import rng

EXPERT_FLAGS = ("n_expert", "top_k", "n_shared_expert", "moe_every", "gate", "expert_capacity")


def locate(source: str) -> tuple[str, str]:
    """What --init names: ("scratch" | "gpt2" | "checkpoint", where it is)."""
    if source in ("scratch", "gpt2"):
        return source, source
    if os.path.isfile(source):
        return "checkpoint", source
    if os.path.isdir(source) and (folder := find_checkpoint(source)):
        return "checkpoint", os.path.join(folder, "model.safetensors")
    if all(os.path.isfile(os.path.join(source, name)) for name in ("config.json", "model.safetensors")):
        return "gpt2", source
    raise UserError(f"--init {source}: there is no run, checkpoint file or GPT-2 folder of that name")


def size_of(config: MoEConfig) -> str:
    """The name of a model's size, "custom" if it has none."""
    sizes = {name: getattr(config, name) for name in SIZES["tiny"]}
    return next((name for name in SIZES if SIZES[name] == sizes), "custom")


def look_at(source: str) -> tuple[str | None, int | None]:
    """Size and vocabulary of the model that --init names, without reading its weights; None where it names none."""
    kind, where = locate(source)
    if kind == "scratch":
        return None, None
    if where == "gpt2":
        return "gpt2", 50257
    config = plainly(read_gpt2_config if kind == "gpt2" else read_config, where)
    return size_of(config), config.vocab_size


def expert_settings(args) -> dict:
    return {"n_expert": 1} if args.algo == "dense" else {name: getattr(args, name) for name in EXPERT_FLAGS}


def new_model(args, tokenizer, dense_first: bool) -> tuple[GPT, MoEConfig]:
    """A model of random weights, and the configuration that the algorithm trains."""
    size = SIZES[args.model]
    target = plainly(lambda: MoEConfig(vocab_size=tokenizer.vocab_size, **size, **expert_settings(args)))
    return GPT(target.dense() if dense_first else target, rng(args.seed, "weights")), target


def initial_model(args, tokenizer, dense_first: bool) -> tuple[GPT, MoEConfig]:
    """The model that --init names, and the configuration that the algorithm trains."""
    kind, where = locate(args.init)
    if kind == "scratch":
        return new_model(args, tokenizer, dense_first)
    model = plainly(load_gpt2) if where == "gpt2" else None
    if model is None:
        model = plainly(load_gpt2, where) if kind == "gpt2" else plainly(load_model, where)[0]
    args.model = size_of(model.config)  # its own size, whatever --model says
    source = f"--init {args.init}"
    if args.pretrain_steps and dense_first and model.config.n_expert > 1:
        raise UserError("--pretrain-steps trains a dense model, and --init names one with experts: set it to 0")
    return model, check_model(args, tokenizer, model, source)


def check_model(args, tokenizer, model: GPT, source: str) -> MoEConfig:
    """The configuration that the algorithm trains, if `model` can become it. UserError if it cannot."""
    if not is_finite(model):
        raise UserError(f"{source} holds weights that are not finite: take another one")
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{source} has a vocabulary of {model.config.vocab_size}, the tokenizer {tokenizer.name} "
            f"one of {tokenizer.vocab_size}: choose the tokenizer that it was trained with"
        )
    wanted = plainly(lambda: replace(model.config, **expert_settings(args)))
    if model.config.n_expert == 1 or wanted == model.config:
        return wanted
    if args.algo == "dense":
        raise UserError(f"{source} has experts: --algo dense needs a dense model")
    theirs = asdict(model.config)
    flags = " ".join(f"--{k.replace('_', '-')} {theirs[k]}" for k, v in asdict(wanted).items() if v != theirs[k])
    raise UserError(f"{source} has other experts than the flags ask for: add {flags}")


def check_step(step: int, config: MoEConfig, target: MoEConfig, args):
    """A checkpoint must stand where its run can have been."""
    total, begun = args.pretrain_steps + args.steps, step > args.pretrain_steps
    if step > total or begun and config != target:
        raise UserError(f"the checkpoint in {args.out} is not of this run: step {step} of {total}, holding {config}")
