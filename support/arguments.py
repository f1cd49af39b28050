"""Command lines: flags with bounds, and a loss function's keyword arguments as flags."""

import argparse
import inspect
import json
import math
import os
import re
import types
import typing

from support.errors import UserError, nearest


class Help(argparse.RawDescriptionHelpFormatter):
    """Short placeholders, one column of names, and a default behind every flag that has one."""

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


def number(kind, low=None, high=None, above=None):
    """An argparse type: a finite number within bounds."""

    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        inside = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
        if not inside or kind is float and not math.isfinite(value):
            bounds = [f"above {above}"] * (above is not None) + [f"at least {low}"] * (low is not None)
            bounds += [f"at most {high}"] * (high is not None)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'finite'}, not {text}")
        return value

    check.placeholder = "N" if kind is int else "X"
    return check


# ---------------------------------------------------------------------------------------------------------------------
# A loss's keyword arguments are its options
# ---------------------------------------------------------------------------------------------------------------------


class Option(typing.NamedTuple):
    name: str
    type: type  # bool, int, float or str
    choices: tuple  # of a Literal
    default: object
    help: str


def options_of(*functions) -> dict[str, Option]:
    """The keyword-only arguments of loss functions that have a default and a plain type, by name.

    The type is the annotation's (Literal gives choices, `float | None` a float) or that of the default; the help is
    what the docstring says behind the name: "clip_low, clip_high   at least 0".
    """
    options = {}
    for function in functions:
        hints = typing.get_type_hints(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
                continue
            hint, choices = hints.get(name, type(parameter.default)), ()
            if typing.get_origin(hint) in (types.UnionType, typing.Union):
                hint = next(part for part in hint.__args__ if part is not type(None))
            if typing.get_origin(hint) is typing.Literal:
                hint, choices = str, typing.get_args(hint)
            if hint in (bool, int, float, str):
                options[name] = Option(name, hint, choices, parameter.default, _help(function, name))
    return options


def _help(function, name: str) -> str:
    for line in (function.__doc__ or "").splitlines():
        names, _, text = line.strip().partition("  ")
        if name in names.split(", "):
            return re.sub(r"\s+", " ", text).strip().rstrip(";,")
    return ""


def add_options(parser, title: str, options: dict[str, Option], aliases: dict[str, str]):
    """A flag for each option, in a group of its own; `aliases` maps an option to an older name of its flag."""
    group = parser.add_argument_group(title)
    for o in options.values():
        flags = ["--" + n.replace("_", "-") for n in (o.name, aliases.get(o.name)) if n]
        text = o.help.replace("%", "%%")
        if o.type is bool:
            on_or_off = argparse.BooleanOptionalAction if o.default else "store_true"  # --name and --no-name
            group.add_argument(*flags, action=on_or_off, default=o.default, dest=o.name, help=text)
            continue
        plain = {int: number(int, low=1, high=10**6), float: number(float), str: str}[o.type]
        kind = one_of(o.name.replace("_", " "), o.choices) if o.choices else plain
        group.add_argument(*flags, type=kind, default=o.default, dest=o.name, help=text)


# ---------------------------------------------------------------------------------------------------------------------
# The arguments of a run that is resumed
# ---------------------------------------------------------------------------------------------------------------------


def read_config(folder: str) -> dict:
    """config.json of a run folder, as it stands."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path) as file:
            saved = json.load(file)
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{folder} holds no run (no readable config.json)") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not that of a run of this program")
    return saved


def check_types(folder: str, saved: dict, wanted: dict):
    """UserError unless each of some saved arguments is of its type: for programs that read no more than these."""
    for name, kind in wanted.items():
        if not isinstance(saved.get(name), kind):
            raise UserError(f"{folder}/config.json was changed by hand: {name} cannot be {saved.get(name)!r}")


def saved_arguments(parser: Parser, saved: dict, folder: str, may_lack: set[str]) -> dict:
    """A run's saved arguments, each read back through the type of its own flag; those in `may_lack` may be None."""
    values = {}
    for action in parser._actions:
        if action.dest in ("help", "resume"):
            continue
        if action.dest not in saved:
            raise UserError(f"{folder}/config.json is not that of a run of this program: it lacks {action.dest}")
        value = values[action.dest] = saved[action.dest]
        try:
            if isinstance(action.default, bool):
                right = isinstance(value, bool)
            else:
                right = (action.type or str)(str(value)) == value if value is not None else action.dest in may_lack
        except argparse.ArgumentTypeError:
            right = False
        if not right:
            raise UserError(f"{folder}/config.json was changed by hand: {action.dest} cannot be {value!r}")
    return values
