"""Command lines: flags with bounds, a loss function's keyword arguments as flags, and the flags of train.py."""

import argparse
import inspect
import json
import math
import os
import re
import sys
import types
import typing

import torch

import data
from moe import GATES, SIZES
from support.checkpoints import drop_capacity, locate, look_at
from support.errors import UserError, as_user_error, nearest


class Help(argparse.RawDescriptionHelpFormatter):
    """Short placeholders, and a default behind every flag that has one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=27, width=110)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "placeholder", "TEXT")

    def _get_help_string(self, action):
        told = any(action.default is x for x in (None, False, argparse.SUPPRESS)) or "default" in action.help
        return action.help if told else f"{action.help} (default {action.default})"


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": Help} | kwargs)

    def error(self, message):
        raise UserError(message.replace("argument ", ""))


def one_of(kind: str, names):
    """An argparse type: a name out of `names`; for any other the error says which is nearest."""

    def check(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(str(nearest(kind, value, names)))
        return value

    check.placeholder = "NAME"
    return check


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite number within bounds."""
    told = {f"above {above}": above, f"at least {low}": low, f"at most {high}": high}
    bounds = " and ".join(bound for bound, value in told.items() if abs(value) < math.inf) or "finite"

    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not low <= value <= high or value <= above or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    check.placeholder = "N" if kind is int else "X"
    return check


# -------------------------------------------------------------------------- A loss's keyword arguments are its options


class Option(typing.NamedTuple):
    name: str
    type: type  # bool, int, float or str
    choices: tuple  # of a Literal
    default: object
    help: str


def options_of(function) -> dict[str, Option]:
    """The keyword-only arguments of a loss that have a default and a plain type, by name.

    The type is the annotation's (Literal gives choices, `float | None` a float) or that of the default; the help is
    what the docstring says behind the name: "clip_low, clip_high   at least 0".
    """
    options, documented = {}, getattr(function, "func", function)  # a functools.partial has its function's words
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            continue
        hint, choices = parameter.annotation, ()
        hint = type(parameter.default) if hint is parameter.empty else hint
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(part for part in hint.__args__ if part is not type(None))
        if typing.get_origin(hint) is typing.Literal:
            choices = typing.get_args(hint)
            hint = type(choices[0])
        if hint in (bool, int, float, str):
            options[name] = Option(name, hint, choices, parameter.default, _help(documented, name))
    return options


def _help(function, name: str) -> str:
    for line in (function.__doc__ or "").splitlines():
        names, _, text = line.strip().partition("  ")
        if name in names.split(", "):
            return re.sub(r"\s+", " ", text).strip().rstrip(";,")
    return ""


def add_options(group, options: dict[str, Option], aliases: dict[str, str]):
    """A flag for each option; `aliases` maps an option to an older name of its flag."""
    for o in options.values():
        flags = ["--" + n.replace("_", "-") for n in (o.name, aliases.get(o.name)) if n]
        how = {"default": o.default, "dest": o.name, "help": o.help.replace("%", "%%")}
        if o.type is bool:
            how["action"] = argparse.BooleanOptionalAction if o.default else "store_true"  # --name and --no-name
        elif o.type is str:
            how["type"] = one_of(o.name.replace("_", " "), o.choices) if o.choices else str
        else:
            how |= {"type": number(o.type), "choices": o.choices or None}
        try:
            group.add_argument(*flags, **how)
        except argparse.ArgumentError:
            advice = "give that option of your loss another name"
            raise UserError(f"{flags[0]} is a flag of the program: {advice}") from None


def read_config(folder: str) -> dict:
    """config.json of a run folder, as it stands but for the flags of earlier versions."""
    try:
        with open(os.path.join(folder, "config.json")) as file:
            saved = json.load(file)
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no run (no readable config.json)") from None
    with as_user_error():
        return drop_capacity(saved)


# ----------------------------------------------------------------------------------------------- The flags of train.py

TEXT = ("dense", "lm", "erl")  # algorithms that learn from the text, or the reference answers, of the data set
# Flags that an option of a loss had before: still understood.
ALIASES = {"alpha": "entropy_alpha", "base": "shift_base", "floor": "shift_floor"}
# What a resumed run may be given anew: it changes where and how fast a run goes, not what it computes.
FREE_ON_RESUME = {"resume", "out", "data_dir", "device", "compile"}
EPILOG = "[...]: what a paper states, for the sizes of its models."

count, natural = number(int, low=1, high=10**8), number(int, low=0, high=10**8)
positive, not_negative = number(float, above=0, high=1e30), number(float, low=0, high=1e30)
share = number(float, low=0, high=1)


def parser(description: str, algo: str | None, options: dict[str, dict[str, Option]], mismatch) -> Parser:
    """options: of every algorithm that has some; their flags are there for `algo` alone. mismatch: of that weight."""
    usage = "python train.py [--algo NAME] [--dataset NAME] [--FLAG VALUE ...]     (no flags: the demo)"
    p = Parser(usage=usage, description=description, allow_abbrev=False, epilog=EPILOG)

    def flag(name, kind, default, help, choices=None, **more):
        if choices:
            kind, help = one_of(kind, choices), ", ".join((*choices, *([help] if help else [])))
        g.add_argument(name, type=kind, default=default, help=help, **more)

    g = p.add_argument_group("what to run")
    flag("--algo", "algorithm", None, "", TEXT + tuple(name for name in options if name not in TEXT))
    flag("--dataset", "data set", None, "", tuple(data.DATASETS))
    flag("--data-dir", str, None, "read the set from files below DIR instead of the hub", metavar="DIR")
    flag("--tokenizer", "tokenizer", None, "default: the set's", ("gpt2", "bytes"))
    if algo in options:
        own = p.add_argument_group(f"options of {algo}: the keyword arguments of its loss")

    g = p.add_argument_group("model")
    flag("--model", "model", "tiny", "", tuple(SIZES))
    flag("--n-expert", count, 8, "experts of a MoE layer [ERL table 10: 8]")
    flag("--top-k", count, None, "experts of a token; default 1, for generated answers 2 [ERL table 10: 1]")
    flag("--n-shared-expert", number(int, low=0, high=1000), 0, "further experts that every token passes")
    flag("--moe-every", count, 2, "every n-th block holds experts")
    flag("--gate", "gate", "renorm", "weights of the chosen experts", GATES)
    sources = "scratch, gpt2, a run folder, a checkpoint, or a folder with GPT-2's weights"
    flag("--init", str, "scratch", sources, metavar="FROM")

    g = p.add_argument_group("training")
    flag("--pretrain-steps", natural, None, "next-token prediction before the algorithm; default 600-1000")
    flag("--pretrain-lr", positive, 1e-3, "peak learning rate of those steps")
    flag("--steps", count, None, "steps of the algorithm; default 1000, for generated answers 400")
    flag("--epochs", positive, None, "in place of --steps: passes over the training data [ERL 5, 10, 15]")
    flag("--batch-size", count, None, "sequences a step, from text; default 4-32 [ERL table 7: 4, tasks 8]")
    flag("--lr", positive, None, "peak learning rate; default 1e-4 to 1e-3 [ERL table 7: 1e-5]")
    flag("--router-lr-factor", not_negative, 1.0, "the routers' rate is this times --lr")
    g.add_argument("--freeze-router", action="store_true", help="routers keep their weights")
    flag("--weight-decay", not_negative, 0.1, "of matrices [ERL table 7: 0.1]")
    flag("--clip-grad", not_negative, 1.0, "largest norm of the gradient, 0: no limit")
    flag("--balance-coef", not_negative, 1e-3, "of Switch's balance loss on text")
    flag("--z-coef", not_negative, 1e-3, "of Switch's router z loss on text")
    flag("--jitter", share, 0.0, "noise on the routers' input, for lm and erl [Switch: 0.01]")
    flag("--erl-grad", "gradient", "router", "how far ERL's RL loss reaches [ERL eq. 14: all]", ("all", "router"))
    flag("--seed", natural, 0, "of weights, order of data, routes and answers")
    flag("--device", "device", "auto", "", ("auto", "cpu", "cuda", "mps"))
    flag("--dtype", "dtype", "float32", "of autocast; routers stay in float32", ("float32", "bfloat16"))
    g.add_argument("--compile", action="store_true", help="torch.compile the forward")

    g = p.add_argument_group("generated answers")
    flag("--group-size", number(int, low=2, high=10**8), 8, "responses to a prompt [ERPO section 5.1: 4 or 8]")
    flag("--prompts-per-step", count, None, "default 16, of short problems 64 [ERPO section 5.1: 128]")
    flag("--minibatches", count, 4, "updates on one batch of responses [ERPO section 5.1: 4]")
    flag("--max-new-tokens", count, None, "longest response; default: the set's")
    flag("--temperature", positive, 1.0, "of sampling")
    flag("--top-p", number(float, above=0, high=1), 1.0, "of sampling")
    flag("--rollout-dtype", "dtype", None, "what the sampler computes in; default: --dtype", ("float32", "bfloat16"))
    replays = "updates along their own routes, those of the policy before them (R2), or the sampler's (R3)"
    flag("--replay", "replay", "none", replays, ("none", "r2", "r3"))
    weights = "how the sampler's mismatch weighs tokens or answers; see mismatch_weights in baselines.py"
    flag("--mismatch", "kind of weight", "none", weights, ("none", "tis", "icepop", "sequence-mask"))
    add_options(g, mismatch, {})
    flag("--answer-balance-coef", not_negative, 0.0, "of the balance loss in the updates")
    flag("--beams", count, None, "of evaluation; default 6 for samsum, xsum, squad, else 1 [ERL table 7: 6]")

    g = p.add_argument_group("the run")
    flag("--eval-every", count, None, "steps between evaluations; default: ten in a run")
    flag("--eval-samples", natural, None, "windows or examples of an evaluation on the way, 0: all")
    flag("--test-samples", natural, None, "of the last evaluation, 0: all; default: all, of large sets 500")
    flag("--checkpoint-every", count, None, "steps between checkpoints; default: with each evaluation")
    flag("--out", str, None, "run folder; default: a new one below runs/", metavar="DIR")
    g.add_argument("--resume", action="store_true", help="continue the run in --out")
    if algo in options:  # last: an option must not take the name of a flag
        add_options(own, options[algo], {} if algo == "erl" else ALIASES)
    if algo is None:
        flags = {name: " ".join("--" + o.replace("_", "-") for o in theirs) for name, theirs in options.items()}
        lines = (f"  --algo {name:6} {theirs}" for name, theirs in flags.items())
        p.epilog = "\n".join(["options of one algorithm, explained by --algo NAME --help:", *lines, "", EPILOG])
    return p


def parse(argv: list[str], description: str, options: dict[str, dict[str, Option]], mismatch) -> argparse.Namespace:
    """Arguments with every default filled in. UserError for what does not fit together."""
    first = Parser(add_help=False, allow_abbrev=False)  # what decides which flags there are
    first.add_argument("--algo")
    first.add_argument("--out")
    first.add_argument("--resume", action="store_true")
    seen, _ = first.parse_known_args(argv)
    saved = read_config(seen.out) if seen.resume and seen.out else {}
    p = parser(description, saved.get("algo", seen.algo), options, mismatch)
    args, unknown = p.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if owners := [a for a, theirs in options.items() if name in theirs]:
            raise UserError(f"{flag} is an option of --algo {' or '.join(owners)}, not of {args.algo}: leave it out")
        raise UserError(f"unknown flag {flag}: see --help")
    for action in p._actions:  # once more without defaults: what the user gave
        action.default = argparse.SUPPRESS
    given = set(vars(p.parse_args(argv)))
    if args.resume and not args.out:
        raise UserError("--resume needs --out RUN: which run should go on?")
    if args.resume:
        return _resumed(args, saved, given)
    if args.algo is None:
        raise UserError("--algo is missing: " + ", ".join(TEXT + tuple(n for n in options if n not in TEXT)))
    args.dataset = args.dataset or "pydocs"
    _fill(args, given, generative=args.algo not in TEXT)
    return args


def _resumed(args, saved: dict, given: set[str]) -> argparse.Namespace:
    """The saved arguments of the run in args.out, and what may be given anew."""
    if saved.get("replay") == "routing":
        raise UserError(f"{args.out} ran with --replay routing, which is --replay r3 now: start a new run with that")
    if lacks := [name for name in vars(args) if name not in saved and name != "resume"]:
        raise UserError(f"{args.out}/config.json is not that of a run of this program: it lacks {lacks[0]}")
    for name in given - FREE_ON_RESUME:
        if saved[name] != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} was {saved[name]} when {args.out} began: leave it out, or start a new run")
    kept = {name: getattr(args, name) for name in FREE_ON_RESUME & given}
    return argparse.Namespace(**{name: saved.get(name) for name in vars(args)} | kept)


def _fill(args, given: set[str], generative: bool):
    """Defaults that depend on the algorithm, the data set and the model that --init names."""
    spec, (size, vocabulary) = data.get_dataset(args.dataset), look_at(args.init)
    text, short, started = spec.kind == "text", spec.problems is not None, size is not None
    if started and "model" in given and args.model != size:
        print(f"--init {args.init} brings its own size: --model {args.model} counts for nothing", file=sys.stderr)
    args.model = size if size in SIZES else args.model
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs say the same thing: give one of them")
    if args.algo == "erl" and not text:  # ERL table 7: tasks
        vars(args).update({name: v for name, v in {"alpha": 0.7, "delta": 2.0}.items() if name not in given})
    if size == "gpt2" or locate(args.init)[0] == "gpt2":
        lr = 1e-5  # GPT-2's weights, or what was made from them [ERL table 7]
    elif args.algo == "dense" and not started:
        lr = 1e-3  # a small model from random weights
    else:
        lr = 1e-4 if generative else 3e-4  # a small model that its first phase has trained
    defaults = {
        "tokenizer": {50257: "gpt2", 257: "bytes"}.get(vocabulary, spec.tokenizer),
        "steps": None if args.epochs else 400 if generative else 1000,
        "top_k": 2 if generative else 1,
        "pretrain_steps": 0 if started or args.algo == "dense" else 600 if generative else 1000,
        "batch_size": 32 if short else 4 if text and args.model == "gpt2" else 8,
        "lr": lr,
        "max_new_tokens": min(spec.max_new_tokens, SIZES[args.model]["context"] // 2),
        "rollout_dtype": args.dtype,
        "beams": spec.beams,
        "eval_samples": 64 if text else 0 if short else 200,
        "test_samples": spec.test_samples,
        "prompts_per_step": 64 if short else 16,
    }
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    _check(args, spec, generative)


def _check(args, spec, generative: bool):
    if spec.files and "train" not in spec.files:
        trained = [s.name for s in data.DATASETS.values() if args.dataset in s.test_sets]
        raise UserError(f"{args.dataset} is a test set" + f": train on {' or '.join(trained)}" * bool(trained))
    if args.algo != "dense" and args.n_expert == 1:
        raise UserError(f"--n-expert 1 leaves nothing to route: --algo {args.algo} needs at least 2 (dense has one)")
    if args.algo == "erl" and args.freeze_router and args.erl_grad == "router":
        raise UserError("--freeze-router and --erl-grad router leave ERL nothing to learn: give --erl-grad all")
    if generative and args.prompts_per_step % args.minibatches:
        numbers = f"--prompts-per-step {args.prompts_per_step} is not divisible by --minibatches {args.minibatches}"
        raise UserError(f"{numbers}: a group's responses stay together")
    if args.algo == "dppo" and args.mismatch != "none":
        raise UserError("dppo compares with the sampler itself and takes no weight: leave --mismatch out")


def fill_steps(args, task, generative: bool):
    """Steps from epochs, and the intervals that follow from the number of steps."""
    if args.steps is None:
        draws = args.prompts_per_step if generative else args.batch_size
        items = len(task.examples) if generative else task.batch.per_epoch
        args.steps = max(1, math.ceil(args.epochs * items / draws))
    args.eval_every = args.eval_every or max(1, (args.pretrain_steps + args.steps) // 10)
    args.checkpoint_every = args.checkpoint_every or args.eval_every


def announce(args, step: int, size: int, active: int):
    """What a person wants to know at the start of a run, or where it goes on."""
    total, first = args.pretrain_steps + args.steps, f"{args.pretrain_steps} supervised steps, then "
    if step:
        where = f"all {total} steps are done" if step == total else f"going on at step {step} of {total}"
        print(where, file=sys.stderr)
    steps = f"{first if args.pretrain_steps else ''}{args.steps} steps at learning rate {args.lr:g}, seed {args.seed}"
    print(f"{args.algo} on {args.dataset}: {steps}, {torch.get_num_threads()} thread(s)", file=sys.stderr)
    print(f"{size:,} parameters, {active:,} active a token; every setting in {args.out}/config.json", file=sys.stderr)
