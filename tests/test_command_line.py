"""Command lines: defaults that follow data and model, a loss's options as flags, and settings read back from a file."""

import argparse
import inspect
import json
import math
import typing
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import MICRO, args_of

import train
from erl import erl_objective, explore
from moe import GPT, SIZES, MoEConfig
from support import command_line
from support.arguments import Parser, add_options, number, one_of, options_of, saved_arguments
from support.checkpoints import save_model
from support.errors import UserError
from support.tasks import rng

ALGORITHMS = command_line.TEXT + tuple(train.METHODS)


# ------------------------------------------------------------------------------- a loss's keyword arguments are flags


def a_loss(x, *, low=0.1, high: float | None = None, kind: Literal["mean", "sum"] = "mean", steps: int = 3, on=False):
    """A loss.

    low, high  bounds;
    kind       how it is   reduced, 100 %
    """


def test_options_are_read_from_the_signature():
    options = options_of(a_loss)
    assert list(options) == ["low", "high", "kind", "steps", "on"]
    assert [o.type for o in options.values()] == [float, float, str, int, bool]
    assert [o.default for o in options.values()] == [0.1, None, "mean", 3, False]
    assert options["kind"].choices == ("mean", "sum") and options["low"].choices == ()
    assert options["low"].help == options["high"].help == "bounds"
    assert options["kind"].help == "how it is reduced, 100 %" and options["steps"].help == ""


def test_options_become_flags():
    p = Parser(add_help=True)
    add_options(p, "options", options_of(a_loss), {"low": "lower_bound"})
    assert vars(p.parse_args([])) == {"low": 0.1, "high": None, "kind": "mean", "steps": 3, "on": False}
    given = p.parse_args("--lower-bound 0.3 --high 2 --kind sum --steps 5 --on".split())
    assert vars(given) == {"low": 0.3, "high": 2.0, "kind": "sum", "steps": 5, "on": True}
    for line in ("--steps 1.5", "--kind median", "--high x", "--low nan"):
        with pytest.raises(UserError):
            p.parse_args(line.split())
    assert "100 %" in p.format_help()  # a percent sign in a docstring is not argparse's


def test_what_is_on_by_default_stays_on_and_can_be_turned_off():
    def loss(x, *, normalise: bool = True, cap: typing.Optional[float] = None):  # noqa: UP045 - also read
        pass

    p = Parser()
    add_options(p, "options", options_of(loss), {})
    assert vars(p.parse_args([])) == {"normalise": True, "cap": None}
    assert vars(p.parse_args(["--no-normalise", "--cap", "2"])) == {"normalise": False, "cap": 2.0}


@pytest.mark.parametrize("algo", ["erl", *train.METHODS])
def test_every_plain_keyword_of_a_loss_is_a_flag_with_the_default_of_its_signature(algo):
    functions = (explore, erl_objective) if algo == "erl" else (train.METHODS[algo],)
    args, expected = args_of(f"--algo {algo} --dataset pydocs"), {}
    for function in functions:
        for name, p in inspect.signature(function).parameters.items():
            if p.kind is p.KEYWORD_ONLY and isinstance(p.default, bool | int | float | str | None):
                expected[name] = p.default
    for name in ("num_experts", "group_size", "generator"):
        expected.pop(name, None)
    assert expected and {name: getattr(args, name) for name in expected} == expected
    assert set(train.OPTIONS[algo]) == set(expected)
    for name, option in train.OPTIONS[algo].items():  # the flag reaches the loss's argument, whatever its type
        value = {bool: "", int: "2", float: "0.25", str: option.choices[-1] if option.choices else ""}[option.type]
        got = getattr(args_of(f"--algo {algo} --{name.replace('_', '-')} {value}"), name)
        assert str(got) == (value or "True") and type(got) is option.type


def test_a_new_method_is_one_entry(monkeypatch):
    """An option of a loss that nobody has written a flag for: parsed, saved, checked and handed over."""

    def loss(log_probs, advantages, response_mask, *, sharpness: float = 2.0):
        """sharpness  of nothing"""
        if sharpness < 0:
            raise ValueError("sharpness must be at least 0")
        return (log_probs * response_mask).sum() * sharpness, {}

    monkeypatch.setitem(train.METHODS, "new", loss)
    monkeypatch.setitem(train.OPTIONS, "new", options_of(loss))
    args = args_of("--algo new --dataset addition --sharpness 3")
    assert args.sharpness == 3.0 and args.top_k == 2  # and it is one that learns from generated answers
    train.check_options(args)
    with pytest.raises(UserError, match="sharpness must be at least 0"):
        train.check_options(args_of("--algo new --sharpness -1"))
    policy = train.Policy(*[torch.ones(2, 3)] * len(train.Policy._fields))
    mask = torch.ones(2, 3, dtype=torch.bool)
    given = train.loss_inputs(policy, policy, torch.ones(2), torch.zeros(2), mask, MoEConfig(), args)
    assert set(given) == {"log_probs", "advantages", "response_mask", "sharpness"} and given["sharpness"] == 3.0


def test_older_names_of_options_are_understood():
    assert args_of("--algo erpo --entropy-alpha 0.5").alpha == args_of("--algo erpo --alpha 0.5").alpha == 0.5
    rais = args_of("--algo rais --shift-base gspo --shift-floor 0.6")
    assert (rais.base, rais.floor) == ("gspo", 0.6)
    assert args_of("--algo erl --alpha 0.3").alpha == 0.3


@pytest.mark.parametrize(
    ("flags", "owner"),
    [
        ("--algo grpo --shift-base gspo", "rais"),
        ("--algo grpo --floor 0.5", "rais"),
        ("--algo lm --delta 1", "erl"),
        ("--algo erl --entropy-alpha 0.5", "erpo"),
        ("--algo erpo --n-perturb=2", "erl"),
        ("--algo dense --wpl", "erl"),
    ],
)
def test_a_flag_of_another_algorithm_is_refused_and_its_owner_named(flags, owner):
    _, algo, flag, *_ = flags.replace("=", " ").split()
    with pytest.raises(UserError) as error:
        args_of(flags)
    assert f"{flag} is an option of --algo {owner}" in str(error.value) and f"not of {algo}" in str(error.value)


@pytest.mark.parametrize("option", ["--clip-low -0.1", "--clip-high -1"])
@pytest.mark.parametrize("algo", train.METHODS)
def test_the_losses_themselves_refuse_their_options_before_any_work(algo, option, micro):
    flags = f"--algo {algo} --dataset addition {option} --out r"
    with pytest.raises(UserError):
        train.run(args_of(flags))
    assert not Path("r").exists()


# ----------------------------------------------------------------------------------------------------------- defaults

PUBLISHED = dict(lr=1e-5, pretrain_steps=0, tokenizer="gpt2", model="gpt2")


def test_defaults_follow_the_data_and_the_algorithm():
    text, task = args_of("--algo erl"), args_of("--algo erl --dataset addition")
    assert (text.alpha, text.delta, task.alpha, task.delta) == (0.6, 0.5, 0.7, 2.0)  # ERL table 7
    assert args_of("--algo erl --dataset addition --alpha 0.6 --delta 0.5").alpha == 0.6  # given is given
    assert (text.erl_grad, args_of("--algo erl --preset paper").erl_grad) == ("router", "all")  # the second is eq. 14
    assert (text.top_k, args_of("--algo grpo").top_k) == (1, 2)
    assert (text.steps, args_of("--algo grpo").steps) == (1000, 400)
    assert args_of("--algo grpo --epochs 2").steps is None  # filled in once the data is read
    assert (args_of("--algo lm").lr, args_of("--algo dense").lr, args_of("--algo grpo").lr) == (3e-4, 1e-3, 1e-4)
    for name in ("samsum", "xsum", "squad"):
        assert args_of(f"--algo lm --dataset {name}").beams == 6
    for algo in ALGORITHMS:
        args = args_of(f"--algo {algo}")
        assert args.jitter == 0.0 and args.clip_grad == 1.0 and args.balance_coef == args.z_coef == 1e-3
        assert args.router_lr_factor == 1.0 and not args.freeze_router and args.answer_balance_coef == 0.0


def test_a_folder_of_gpt2s_weights_has_the_defaults_of_gpt2(micro, monkeypatch):
    """By a folder in transformers' format, by a checkpoint of that size, and by a run: what was loaded decides."""
    small = dict(n_layer=2, n_head=2, n_embd=8, context=16)
    monkeypatch.setitem(SIZES, "gpt2", small)
    model = GPT(MoEConfig(vocab_size=50257, n_expert=1, **small), rng(0))
    Path("weights").mkdir()
    sizes = dict(vocab_size=50257, n_positions=16, n_layer=2, n_head=2, n_embd=8)
    Path("weights/config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    Path("weights/model.safetensors").write_bytes(b"")  # nobody reads them yet
    Path("run/checkpoint").mkdir(parents=True)
    for path in ("run/checkpoint/model.safetensors", "file.safetensors"):
        save_model(model, path)
    for algo in ("lm", "erl", "dense", "erpo"):
        for dataset in ("wikitext2", "samsum"):
            flags = f"--algo {algo} --dataset {dataset} --init "
            hub = vars(args_of(flags + "gpt2"))
            assert {name: hub[name] for name in PUBLISHED} == PUBLISHED
            assert hub["batch_size"] == (4 if dataset == "wikitext2" else 8)
            for source in ("weights", "run", "file.safetensors"):
                assert vars(args_of(flags + source)) | {"init": "gpt2"} == hub


def test_published_weights_of_another_size_have_the_learning_rate_of_published_weights(micro):
    Path("medium").mkdir()
    sizes = dict(vocab_size=50257, n_positions=1024, n_layer=24, n_head=16, n_embd=1024)
    Path("medium/config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    Path("medium/model.safetensors").write_bytes(b"")
    args = args_of("--algo erl --dataset wikitext2 --init medium")
    assert (args.lr, args.pretrain_steps, args.tokenizer) == (1e-5, 0, "gpt2")


def test_defaults_of_a_small_model_that_goes_on(micro):
    save_model(GPT(MoEConfig(vocab_size=257, n_expert=1, **MICRO), rng(0)), "dense.safetensors")
    args = args_of("--algo erl --dataset addition --init dense.safetensors")
    assert (args.model, args.tokenizer, args.pretrain_steps, args.lr) == ("tiny", "bytes", 0, 3e-4)


# ------------------------------------------------------------------------------------------------ types and mistakes


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.floats(), st.integers(), st.text(max_size=8)))
def test_a_number_is_finite_within_its_bounds_or_refused(value):
    for kind, bounds in (
        (int, dict(low=1, high=10**8)),
        (float, dict(above=0, high=1e30)),
        (float, dict(low=0, high=1)),
    ):
        try:
            got = number(kind, **bounds)(str(value))
        except argparse.ArgumentTypeError as error:
            assert str(error)
            continue
        assert type(got) is kind and math.isfinite(got)
        assert got >= bounds.get("low", got) and got <= bounds["high"] and got > bounds.get("above", -math.inf)


def test_a_name_that_does_not_exist_has_a_nearest_one():
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean erpo?"):
        one_of("algorithm", ALGORITHMS)("erp")


def test_a_frozen_router_and_a_loss_of_the_router_alone_exclude_each_other():
    with pytest.raises(UserError, match="nothing to learn"):
        args_of("--algo erl --freeze-router")
    args_of("--algo erl --freeze-router --erl-grad all")


# ------------------------------------------------------------------------------------------- settings read from a file


def written(flags) -> dict:
    """config.json of a run, as `open_folder` writes it."""
    args = args_of(flags)
    args.out = "r"
    args.eval_every = args.checkpoint_every = 10
    saved = {k: v for k, v in vars(args).items() if k != "resume"}
    Path("r").mkdir(exist_ok=True)
    Path("r/config.json").write_text(json.dumps(saved))
    return saved


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_what_was_saved_is_what_is_read(algo, micro):
    saved = written(f"--algo {algo} --dataset addition --lr 2e-5 --seed 7 --data-dir d")
    assert vars(args_of("--resume --out r")) == saved | {"resume": True}
    again = args_of("--resume --out r --seed 7 --lr 2e-5 --device cpu --data-dir other")
    assert (again.device, again.data_dir, again.seed) == ("cpu", "other", 7)
    with pytest.raises(UserError, match="--seed was 7 when r began"):
        args_of("--resume --out r --seed 8")


BAD = {int: [1.5, "2", True, [1], {}, None, -7, 10**30], float: ["x", True, [0.1], float("nan"), float("inf"), {}]}
BAD |= {str: [3, True, ["a"], {}, None], bool: [1, "yes", None, 0.0]}


@pytest.mark.parametrize("algo", ["erl", "rais"])
def test_a_config_edited_by_hand_to_other_types_is_one_sentence(algo, micro):
    saved = written(f"--algo {algo} --dataset addition")
    for name, value in saved.items():
        for bad in BAD[type(value)] if value is not None else [[1], {}]:
            if name in train.OPTIONS[algo] and bad == -7:
                continue  # a loss's own bounds are its own business, see check_options
            Path("r/config.json").write_text(json.dumps(saved | {name: bad}))
            with pytest.raises(UserError) as error:
                args_of("--resume --out r")
            assert str(error.value).startswith("r/config.json"), (name, bad)
            assert name in str(error.value)
        Path("r/config.json").write_text(json.dumps({k: v for k, v in saved.items() if k != name}))
        with pytest.raises(UserError, match=f"lacks {name}"):
            args_of("--resume --out r")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"minibatches": 7}, "not divisible by --minibatches 7"),
        ({"dataset": "math500"}, "is a test set"),
        ({"n_expert": 1}, "leaves nothing to route"),
        ({"algo": "erl"}, "lacks alpha"),
        ({"algo": ["rais"]}, "algo cannot be"),
        ({"algo": "ppo"}, "algo cannot be"),
        ({"base": "ppo"}, "base cannot be 'ppo'"),
    ],
)
def test_a_config_edited_by_hand_must_fit_together_too(change, says, micro):
    saved = written("--algo rais --dataset addition")
    Path("r/config.json").write_text(json.dumps(saved | change))
    with pytest.raises(UserError) as error:
        args_of("--resume --out r")
    assert says in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '"lm"', "nul", "[" * 100_000, '{"algo": ' + "9" * 5000 + "}"])
def test_a_config_that_is_none_is_one_sentence(text, micro):
    Path("r").mkdir()
    Path("r/config.json").write_text(text)
    with pytest.raises(UserError):
        args_of("--resume --out r")


def test_options_that_have_no_value_of_their_own_may_lack_one():
    p = Parser()
    p.add_argument("--a", type=number(int))
    p.add_argument("--b", type=number(float))
    assert saved_arguments(p, {"a": 1, "b": None}, "r", {"b"}) == {"a": 1, "b": None}
    with pytest.raises(UserError, match="a cannot be None"):
        saved_arguments(p, {"a": None, "b": 1.0}, "r", {"b"})


def test_help_names_every_flag_and_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and not err
    wanted = ["--algo", "--resume", "--test-samples", "--freeze-router", "--entropy-reward", "--data-dir", "--init"]
    assert all(flag in out for flag in [*wanted, "--erl-grad", "--replay", "--base"])
    for algo, options in train.OPTIONS.items():
        with pytest.raises(SystemExit):
            train.main(["--algo", algo, "--help"])
        out = capsys.readouterr().out
        assert all("--" + name.replace("_", "-") in out for name in options)
        assert all(o.help for o in options.values()), algo  # each has its line in the loss's docstring


@pytest.mark.parametrize("algo", [None, *ALGORITHMS])
def test_help_is_short_and_says_defaults_and_the_papers_values(algo):
    """Every flag has its words in one column, under a short line on usage; [...] is a paper's value with its place."""
    p = command_line.parser("about", algo, train.OPTIONS)
    text = p.format_help()
    assert all(a.help for a in p._actions) and len(text.splitlines()) < 90
    assert text.startswith("usage: python train.py [--algo NAME]") and text.index("\n") < 110
    assert "--lr X " in text and "[ERL table 7: 1e-5]" in text and "--z-coef X " in text and "(default 0.001)" in text
    assert "--jitter X" in text and "[Switch: 0.01] (default 0.0)" in text and "LR_FACTOR" not in text
    if algo == "erl":
        assert text.index("--alpha X") < text.index("--model NAME") and "[table 7: 3] (default 3)" in text


def test_help_of_the_other_programs(capsys):
    import eval_routing
    from support import pictures

    for program, words in ((eval_routing, "--samples N "), (pictures, "--out FILE.png ")):
        with pytest.raises(SystemExit) as stop:
            program.main(["--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and words in out and len(out.splitlines()) < 35
