"""Command lines: a loss's options as flags, a method of one's own, and defaults that follow data and model."""

import argparse
import functools
from typing import Literal

import pytest
import torch
from training import MICRO, args_of

import train
from baselines import grpo_loss
from moe import GPT, MoEConfig
from support.arguments import Parser, add_options, number, options_of
from support.checkpoints import save_checkpoint
from support.errors import UserError
from support.tasks import rng

ALGORITHMS = ["dense", "lm", "erl", *train.METHODS]

# ------------------------------------------------------------------------------- a loss's keyword arguments are flags


def a_loss(x, *, low=0.1, high: float | None = None, kind: Literal["mean", "sum"] = "mean", steps: int = 0, on=False):
    """A loss.

    low, high  bounds;
    kind       how it is   reduced, 100 %
    """


def test_options_are_read_from_the_signature_and_become_flags():
    options = options_of(a_loss)
    assert [o.type for o in options.values()] == [float, float, str, int, bool]
    assert [o.default for o in options.values()] == [0.1, None, "mean", 0, False]
    assert options["low"].help == options["high"].help == "bounds"
    assert options["kind"].help == "how it is reduced, 100 %"
    p = Parser()
    add_options(p, options, {"low": "lower_bound"})
    assert vars(p.parse_args([])) == {"low": 0.1, "high": None, "kind": "mean", "steps": 0, "on": False}
    found = p.parse_args("--lower-bound 0.3 --high 2 --kind sum --steps 5 --on".split())
    assert vars(found) == {"low": 0.3, "high": 2.0, "kind": "sum", "steps": 5, "on": True}
    for line in ("--steps 1.5", "--kind median", "--high x", "--low nan"):
        with pytest.raises(UserError):
            p.parse_args(line.split())
    assert "100 %" in p.format_help()


def a_method(monkeypatch, loss):
    monkeypatch.setitem(train.METHODS, "new", loss)
    monkeypatch.setitem(train.OPTIONS, "new", options_of(loss))


LITTLE = "--dataset addition --prompts-per-step 2 --group-size 2 --max-new-tokens 4 --minibatches 2 --batch-size 2"


def good(log_probs, advantages, response_mask, *, sharpness: float = 2.0, power: int = 0, level: Literal[1, 2] = 1):
    """sharpness  of nothing"""
    if sharpness < 0:
        raise ValueError("sharpness must be at least 0")
    return (log_probs * response_mask).sum() * sharpness, {}


def test_a_method_of_ones_own_runs_and_is_resumed(micro, monkeypatch):
    a_method(monkeypatch, good)
    flags = f"--algo new {LITTLE} --level 2 --power -3 --pretrain-steps 1 --steps 1 --eval-samples 2 --out r"
    assert train.main(flags.split()) == 0
    args = args_of("--resume --out r")
    assert (args.sharpness, args.power, args.level) == (2.0, -3, 2)
    train.run(args)
    with pytest.raises(ValueError, match="sharpness must be at least 0"):
        train.check_options(args_of("--algo new --sharpness -1"))
    a_method(monkeypatch, functools.partial(grpo_loss, clip_high=0.4))
    args = args_of("--algo new")
    train.check_options(args)
    assert args.clip_high == 0.4


def asks_for_more(log_probs, advantages, something):
    return log_probs.sum(), {}


def option_is_a_flag(log_probs, *, seed: int = 0):
    return log_probs.sum(), {}


LOSSES = [
    (lambda log_probs: log_probs.sum(), "must return (loss, metrics): a 0-d tensor with gradient, and a dict"),
    (lambda log_probs: (log_probs.sum(1), {}), "must return (loss, metrics)"),
    (lambda log_probs: (log_probs.detach().sum(), {}), "must return (loss, metrics)"),
    (asks_for_more, "something"),
    (option_is_a_flag, "--seed is a flag of the program"),
]


@pytest.mark.parametrize(("loss", "says"), LOSSES)
def test_a_method_that_does_not_fit_is_refused_before_any_work(loss, says, micro, monkeypatch, capsys):
    a_method(monkeypatch, loss)
    assert train.main(f"--algo new {LITTLE} --pretrain-steps 1 --steps 1 --out r".split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


MISTAKES = {
    "--algo gmpo --mismatch icepop": "weights must be above 0",
    "--algo dppo --mismatch tis": "dppo compares with the sampler itself",
    "--algo erl --ratio uniform --clip-eps 0.2": 'ratio "uniform"',
    "--algo erl --draw router --top-k 2": 'top_k 1, "router"',
    "--algo grpo --clip-low -1": "clip_low",
    "--algo lm --alpha 0.3": "is an option of --algo erl or erpo",
    "--algo lm --steps 1 --epochs 1": "say the same thing",
    "--algo lm --n-expert 1": "leaves nothing to route",
    "--algo grpo --prompts-per-step 6": "not divisible by --minibatches",
    "--algo erl --freeze-router": "leave ERL nothing to learn",
    "--algo lm --dataset math500": "is a test set",
    "--algo lm --dataset wikitext": "did you mean wikitext2?",
    "--algo erppo": "did you mean erpo?",
    "--algo lm --steps 0": "at least 1",
    "--algo lm --out .": "is not empty",
    "--dataset pydocs": "--algo is missing",
    "--resume": "--resume needs --out",
    "--resume --out nowhere": "holds no run",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_what_does_not_fit_is_one_sentence_before_any_work(flags, micro, capsys):
    open("something", "w").close()
    assert train.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert MISTAKES[flags] in error and error.startswith("train.py: ") and error.count("\n") == 1


def test_defaults_follow_the_data_the_algorithm_and_the_model(micro):
    text, task = args_of("--algo erl"), args_of("--algo erl --dataset samsum")
    assert (text.alpha, text.delta, text.top_k, text.tokenizer, text.lr) == (0.6, 0.5, 1, "bytes", 3e-4)
    assert (task.alpha, task.delta, task.beams) == (0.7, 2.0, 6)  # ERL table 7
    assert args_of("--algo erl --dataset samsum --alpha 0.3").alpha == 0.3
    answers = args_of("--algo rais --dataset gsm8k --dtype bfloat16")
    assert (answers.top_k, answers.prompts_per_step, answers.rollout_dtype) == (2, 16, "bfloat16")
    assert args_of("--algo erpo --entropy-alpha 0.5").alpha == 0.5  # an older name of the flag
    save_checkpoint("m.safetensors", GPT(MoEConfig(n_expert=1, **MICRO), rng(0)))  # it needs no first phase
    started = args_of("--algo lm --init m.safetensors")
    assert (started.pretrain_steps, started.lr) == (0, 3e-4)
    assert args_of("--algo lm --init m.safetensors --pretrain-steps 3").pretrain_steps == 3


def test_a_number_is_finite_within_its_bounds_or_refused():
    check = number(float, low=0, high=2)
    assert [check(text) for text in ("0", "2", "0.5")] == [0, 2, 0.5]
    for text in ("-0.1", "2.1", "nan", "inf", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be|not a number"):
            check(text)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_options_of_a_loss_have_their_signatures_defaults_and_help_names_every_flag(algo, capsys):
    args = args_of(f"--algo {algo}")
    for name, option in train.OPTIONS.get(algo, {}).items():
        assert getattr(args, name) == option.default, name
    train.check_options(args)
    with pytest.raises(SystemExit, match="^0$"):
        train.parse(["--algo", algo, "--help"])
    text = capsys.readouterr().out
    assert not [name for name in vars(args) if "--" + name.replace("_", "-") not in text]
    assert torch.is_grad_enabled()
