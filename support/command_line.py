"""train.py's command line: its flags, their defaults, and what does not fit together."""

import argparse
import math
import sys

import torch

import data
from moe import SIZES
from support.arguments import Option, Parser, add_options, number, one_of, read_config, saved_arguments
from support.errors import UserError, say
from support.initial import locate, look_at

TEXT = ("dense", "lm", "erl")  # algorithms that learn from the text, or the reference answers, of the data set
# --preset paper: what the papers state, for their sizes of model. ERL table 7 (text: batch 4, tasks: 8; alpha and delta
# are the defaults already); ERPO section 5.1 (batches of 128 prompts in 4 minibatches, 8 responses a prompt).
PAPER_TEXT = {"lr": 1e-5, "weight_decay": 0.1, "epochs": 15.0, "n_perturb": 3, "clip_eps": 0.2, "erl_grad": "all"}
PAPER_ANSWERS = {"prompts_per_step": 128, "minibatches": 4, "group_size": 8}
# Flags that an option of a loss had before: still understood.
ALIASES = {"alpha": "entropy_alpha", "base": "shift_base", "floor": "shift_floor"}
# What a resumed run may be given anew: it changes where and how fast a run goes, not what it computes.
FREE_ON_RESUME = {"resume", "out", "data_dir", "device", "compile"}

EPILOG = "[...]: what a paper states, for the sizes of its models."

count, positive = number(int, low=1, high=10**8), number(float, above=0, high=1e30)
natural, share = number(int, low=0, high=10**8), number(float, low=0, high=1)
not_negative = number(float, low=0, high=1e30)


def parser(description: str, algo: str | None, options: dict[str, dict[str, Option]]) -> Parser:
    """options: of every algorithm that has some; their flags are there for `algo` alone (None: for all, as --help)."""
    usage = "python train.py [--algo NAME] [--dataset NAME] [--FLAG VALUE ...]     (no flags: the demo)"
    p = Parser(usage=usage, description=description, allow_abbrev=False, epilog=EPILOG)
    algos = TEXT + tuple(name for name in options if name not in TEXT)
    g = p.add_argument_group("what to run")
    g.add_argument("--algo", type=one_of("algorithm", algos), help=", ".join(algos))
    _data_flags(g)
    g.add_argument(
        "--preset", type=one_of("preset", ("paper",)), help="paper: what ERL table 7 or ERPO section 5.1 states"
    )
    for name, theirs in options.items():
        if algo == name:
            title = f"options of {name}: the keyword arguments of its loss"
            add_options(p, title, theirs, {} if name == "erl" else ALIASES)
    _model_flags(p.add_argument_group("model"))
    _training_flags(p.add_argument_group("training"))
    _answer_flags(p.add_argument_group("generated answers"))
    _run_flags(p.add_argument_group("the run"))
    if algo is None:
        flags = {name: " ".join("--" + o.replace("_", "-") for o in theirs) for name, theirs in options.items()}
        lines = (f"  --algo {name:6} {theirs}" for name, theirs in flags.items())
        p.epilog = "\n".join(["options of one algorithm, explained by --algo NAME --help:", *lines, "", EPILOG])
    return p


def _data_flags(g):
    g.add_argument("--dataset", type=one_of("data set", tuple(data.DATASETS)), help=", ".join(data.DATASETS))
    g.add_argument("--data-dir", metavar="DIR", help="read the set from files below DIR instead of the hub")
    g.add_argument("--tokenizer", type=one_of("tokenizer", ("gpt2", "bytes")), help="gpt2, bytes; default: the set's")


def _model_flags(g):
    g.add_argument("--model", type=one_of("model", tuple(SIZES)), default="tiny", help=", ".join(SIZES))
    g.add_argument("--n-expert", type=count, default=8, help="experts of a MoE layer [ERL table 10: 8]")
    g.add_argument(
        "--top-k", type=count, help="experts of a token; default 1, for generated answers 2 [ERL table 10: 1]"
    )
    few = number(int, low=0, high=1000)  # each is a module
    g.add_argument("--n-shared-expert", type=few, default=0, help="further experts that every token passes")
    g.add_argument("--moe-every", type=count, default=2, help="every n-th block holds experts")
    gates = one_of("gate", ("renorm", "prob", "straight"))
    g.add_argument("--gate", type=gates, default="renorm", help="weights of the chosen experts: renorm, prob, straight")
    g.add_argument("--expert-capacity", type=natural, default=0, help="tokens of a sequence an expert takes, 0: all")
    sources = "scratch, gpt2, a run folder, a checkpoint, or a folder with GPT-2's weights"
    g.add_argument("--init", default="scratch", metavar="FROM", help=sources)


def _training_flags(g):
    g.add_argument(
        "--pretrain-steps", type=natural, help="next-token prediction before the algorithm; default 600-1000"
    )
    g.add_argument("--pretrain-lr", type=positive, default=1e-3, help="peak learning rate of those steps")
    g.add_argument("--steps", type=count, help="steps of the algorithm; default 1000, for generated answers 400")
    g.add_argument("--epochs", type=positive, help="in place of --steps: passes over the training data [ERL 5, 10, 15]")
    g.add_argument(
        "--batch-size", type=count, help="sequences a step, from text; default 4-32 [ERL table 7: 4, tasks 8]"
    )
    g.add_argument("--lr", type=positive, help="peak learning rate; default 1e-4 to 1e-3 [ERL table 7: 1e-5]")
    g.add_argument("--router-lr-factor", type=not_negative, default=1.0, help="the routers' rate is this times --lr")
    g.add_argument("--freeze-router", action="store_true", help="routers keep their weights")
    g.add_argument("--weight-decay", type=not_negative, default=0.1, help="of matrices [ERL table 7: 0.1]")
    g.add_argument("--clip-grad", type=not_negative, default=1.0, help="largest norm of the gradient, 0: no limit")
    g.add_argument("--balance-coef", type=not_negative, default=1e-3, help="of Switch's balance loss on text")
    g.add_argument("--z-coef", type=not_negative, default=1e-3, help="of Switch's router z loss on text")
    g.add_argument(
        "--jitter", type=share, default=0.0, help="noise on the routers' input, for lm and erl [Switch: 0.01]"
    )
    gradients = one_of("gradient", ("all", "router"))
    g.add_argument(
        "--erl-grad", type=gradients, default="router", help="how far ERL's RL loss reaches: router, all [ERL eq. 14]"
    )
    g.add_argument("--seed", type=natural, default=0, help="of weights, order of data, routes and answers")
    devices = one_of("device", ("auto", "cpu", "cuda", "mps"))
    g.add_argument("--device", type=devices, default="auto", help="auto, cpu, cuda, mps")
    dtypes = one_of("dtype", ("float32", "bfloat16"))
    g.add_argument("--dtype", type=dtypes, default="float32", help="of autocast: float32, bfloat16; routers: float32")
    g.add_argument("--compile", action="store_true", help="torch.compile the forward")


def _answer_flags(g):
    pair = number(int, low=2, high=10**8)
    g.add_argument("--group-size", type=pair, default=8, help="responses to a prompt [ERPO section 5.1: 4 or 8]")
    g.add_argument("--prompts-per-step", type=count, help="default 16, of short problems 64 [ERPO section 5.1: 128]")
    g.add_argument(
        "--minibatches", type=count, default=4, help="updates on one batch of responses [ERPO section 5.1: 4]"
    )
    g.add_argument("--max-new-tokens", type=count, help="longest response; default: the set's")
    g.add_argument("--temperature", type=positive, default=1.0, help="of sampling")
    g.add_argument("--top-p", type=number(float, above=0, high=1), default=1.0, help="of sampling")
    g.add_argument("--answer-balance-coef", type=not_negative, default=0.0, help="of the balance loss in the updates")
    replays = one_of("replay", ("none", "routing"))
    g.add_argument("--replay", type=replays, default="none", help="none, routing: updates use the rollout's experts")
    g.add_argument(
        "--beams", type=count, help="of evaluation; default 6 for samsum, xsum, squad, else 1 [ERL table 7: 6]"
    )


def _run_flags(g):
    g.add_argument("--eval-every", type=count, help="steps between evaluations; default: ten in a run")
    g.add_argument("--eval-samples", type=natural, help="windows or examples of an evaluation on the way, 0: all")
    g.add_argument(
        "--test-samples", type=natural, help="of the last evaluation, 0: all; default: all, of large sets 500"
    )
    g.add_argument("--checkpoint-every", type=count, help="steps between checkpoints; default: with each evaluation")
    g.add_argument("--out", metavar="DIR", help="run folder; default: a new one below runs/")
    g.add_argument("--resume", action="store_true", help="continue the run in --out")


def parse(argv: list[str], description: str, options: dict[str, dict[str, Option]]) -> argparse.Namespace:
    """Arguments with every default filled in. UserError for what does not fit together."""
    first = Parser(add_help=False, allow_abbrev=False)
    for name in ("--algo", "--out"):
        first.add_argument(name)
    first.add_argument("--resume", action="store_true")
    seen, _ = first.parse_known_args(argv)
    saved = read_config(seen.out) if seen.resume and seen.out else {}
    algo = saved.get("algo", seen.algo)
    p = parser(description, algo if isinstance(algo, str) else None, options)
    args, unknown = p.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown(unknown[0], algo, options))
    given = _given(p, argv)
    if args.resume:
        if not args.out:
            raise UserError("--resume needs --out RUN: which run should go on?")
        return _resumed(p, args, saved, given, options)
    if args.algo is None:
        raise UserError("--algo is missing: " + ", ".join(TEXT + tuple(n for n in options if n not in TEXT)))
    args.dataset = args.dataset or "pydocs"
    _fill(args, given, generative=args.algo not in TEXT)
    return args


def _unknown(flag: str, algo: str | None, options) -> str:
    name = flag.partition("=")[0].lstrip("-").replace("-", "_")
    older = {old: new for new, old in ALIASES.items()}
    owners = [a for a, theirs in options.items() if name in theirs or a != "erl" and older.get(name) in theirs]
    if owners and flag.startswith("--"):
        return f"{flag.partition('=')[0]} is an option of --algo {' or '.join(owners)}, not of {algo}: leave it out"
    return f"unknown flag {flag}: see --help"


def _given(p: Parser, argv: list[str]) -> set[str]:
    """The names of the arguments that the user gave."""
    defaults = {action: action.default for action in p._actions}
    for action in p._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(p.parse_args(argv)))
    for action, default in defaults.items():
        action.default = default
    return given


def _resumed(p: Parser, args, saved: dict, given: set[str], options) -> argparse.Namespace:
    by_themselves = {name for name, o in options.get(str(saved.get("algo")), {}).items() if o.default is None}
    size = saved.get("model")  # "custom" is that of an --init whose size has no name
    readable = saved | {"model": "tiny"} if size == "custom" else saved
    values = saved_arguments(p, readable, args.out, {"data_dir", "epochs", "preset"} | by_themselves) | {"model": size}
    _check(argparse.Namespace(**values))
    for name in given - FREE_ON_RESUME:
        if values.get(name) != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} was {values.get(name)} when {args.out} began: leave it out, or start a new run")
    kept = {name: getattr(args, name) for name in FREE_ON_RESUME & given}
    return argparse.Namespace(**{**vars(args), **values, **kept})


def _fill(args, given: set[str], generative: bool):
    """Defaults that depend on the algorithm, the data set and the model that --init names."""
    spec = data.get_dataset(args.dataset)
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs say the same thing: give one of them")
    size, vocabulary = look_at(args.init)
    if size and "model" in given and args.model != size:
        say(f"--init {args.init} brings its own size: --model {args.model} counts for nothing", sys.stderr)
    args.model = size if size in SIZES else args.model
    text, short, started = spec.kind == "text", spec.problems is not None, size is not None
    trained_before = size == "gpt2" or locate(args.init)[0] == "gpt2"  # GPT-2's weights, or what was made from them
    if args.preset == "paper":
        paper = PAPER_ANSWERS if generative else PAPER_TEXT | {"batch_size": 4 if spec.kind == "text" else 8}
        kept = given | ({"epochs"} if args.steps else set())
        vars(args).update({name: v for name, v in paper.items() if hasattr(args, name) and name not in kept})
    if args.algo == "erl" and not text:  # ERL table 7
        defaults = {"alpha": 0.7, "delta": 2.0}
        vars(args).update({name: value for name, value in defaults.items() if name not in given})
    if trained_before:
        lr = 1e-5  # ERL table 7
    elif generative:
        lr = 1e-4
    elif args.algo == "dense" and not started:
        lr = 1e-3  # a small model from random weights
    else:
        lr = 3e-4  # an upcycled small model, which its first phase has trained
    defaults = {
        "tokenizer": "gpt2" if vocabulary == 50257 else "bytes" if vocabulary == 257 else spec.tokenizer,
        "top_k": 2 if generative else 1,
        "pretrain_steps": 0 if started or args.algo == "dense" else 600 if generative else 1000,
        "batch_size": 32 if short else 4 if text and args.model == "gpt2" else 8,
        "lr": lr,
        "max_new_tokens": min(spec.max_new_tokens, SIZES[args.model]["context"] // 2),
        "beams": spec.beams,
        "eval_samples": 64 if text else 0 if short else 200,
        "test_samples": spec.test_samples,
        "prompts_per_step": 64 if short else 16,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _check(args)
    if args.steps is None and args.epochs is None:
        args.steps = 400 if generative else 1000


def _check(args):
    """Flags that do not fit together, a hand-edited config.json included."""
    spec = data.get_dataset(args.dataset)
    if spec.test_only:
        tested = args.dataset in data.get_dataset("deepscaler").test_sets
        why = "train on deepscaler, which is tested on it" if tested else "train on gsm8k or deepscaler"
        raise UserError(f"{args.dataset} is a test set: {why}")
    if args.algo != "dense" and args.n_expert == 1:
        raise UserError(f"--n-expert 1 leaves nothing to route: --algo {args.algo} needs at least 2 (dense has one)")
    if args.algo == "erl" and args.freeze_router and args.erl_grad == "router":
        raise UserError("--freeze-router and --erl-grad router leave ERL nothing to learn: give --erl-grad all")
    if args.algo not in TEXT and args.prompts_per_step % args.minibatches:
        raise UserError(
            f"--prompts-per-step {args.prompts_per_step} is not divisible by --minibatches {args.minibatches}: a "
            "group's responses stay together"
        )


def fill_steps(args, task, generative: bool):
    """Steps from epochs, and the intervals that follow from the number of steps."""
    if args.steps is None:
        draws = args.prompts_per_step if generative else args.batch_size
        items = len(task.examples) if generative else task.batch.per_epoch
        args.steps = max(1, math.ceil(args.epochs * items / draws))
    args.eval_every = args.eval_every or max(1, (args.pretrain_steps + args.steps) // 10)
    args.checkpoint_every = args.checkpoint_every or args.eval_every


def describe(args, step: int, size: int, active: int):
    """What a person wants to know at the start of a run, or where it goes on."""
    phases = f"{args.pretrain_steps} supervised steps, then " if args.pretrain_steps else ""
    total = args.pretrain_steps + args.steps
    if step:
        say(f"all {total} steps are done" if step == total else f"going on at step {step} of {total}", sys.stderr)
    say(
        f"{args.algo} on {args.dataset}: {phases}{args.steps} steps at learning rate {args.lr:g}, seed {args.seed}, "
        f"{torch.get_num_threads()} thread(s)\n{size:,} parameters, {active:,} active a token; every setting in "
        f"{args.out}/config.json",
        sys.stderr,
    )
