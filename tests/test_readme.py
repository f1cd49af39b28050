"""What README.md and docs/ tell a reader to type, click or paste is there, and works."""

import argparse
import ast
import doctest
import glob
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest
from training import BYTES

import data
import eval_routing
import train
from support import pictures
from support.arguments import options_of
from support.errors import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "results" / "PLAN.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:python3?|torchrun|bash|pip|coverage) ")

# The commands of README's code blocks in their order. Each runs here with these further flags, in one folder, one after
# the other; ELSEWHERE ones make an environment, which takes minutes: .ci/run runs them word for word.
MICRO_TEXT = "--data-dir data --tokenizer bytes --pretrain-steps 2 --steps 2 --batch-size 2 --eval-samples 2"
MICRO_ANSWERS = "--pretrain-steps 2 --steps 2 --prompts-per-step 4 --eval-samples 4 --test-samples 4"
ELSEWHERE = None
COMMANDS = {
    "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && .venv/bin/python train.py": ELSEWHERE,
    "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt -r tests/requirements.txt && "
    ".venv/bin/python -m pytest": ELSEWHERE,
    "python train.py --algo erl --dataset wikitext2": MICRO_TEXT,
    "python train.py --algo erpo --dataset addition": MICRO_ANSWERS,
    "python eval_routing.py runs/erl-wikitext2-seed0-1": "--samples 2",
    "python eval_routing.py runs/erl-wikitext2-seed0-1 --show-tokens": "--samples 2",
    "python -m support.pictures runs/*-addition-* --out curves.png": "",
    "python train.py --resume --out runs/erl-wikitext2-seed0-1": "",
}


def blocks_of(text: str) -> list[str]:
    """The commands of the code blocks without a language or of a shell, comments left out, long lines put together."""
    commands = []
    for language, body in BLOCK.findall(text):
        if language in ("", "bash", "sh"):
            lines = body.replace("\\\n", " ").splitlines()
            commands += [" ".join(line.split(" #")[0].split()) for line in lines if not line.startswith("#")]
    return [c for c in commands if c]


def commands_of(page: Path) -> list[str]:
    """Every command of a page, those within the text included."""
    text = page.read_text(encoding="utf-8")
    quoted = [" ".join(q.split()) for q in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
    return [c for c in blocks_of(text) + quoted if PROGRAM.match(c)]


def commands_in(program: Path) -> list[str]:
    """The commands in a program's docstring, a line each, with two blanks or a comment before what is said of them."""
    lines = (ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or "").splitlines()
    lines = [re.split(r"\s{2,}|\s#", line.strip())[0] for line in lines if line.startswith("    ")]
    return [line for line in lines if PROGRAM.match(line)]


PROGRAMS = sorted(p for folder in (".", "recipes", "bench", "results", "support") for p in ROOT.glob(f"{folder}/*.py"))
SOURCES = [(p, commands_of(p)) for p in PAGES] + [(p, commands_in(p)) for p in PROGRAMS]
DOCUMENTED = sorted({(p.name, part) for p, commands in SOURCES for c in commands for part in c.split(" && ")})


# ----------------------------------------------------------------------------------------------------------- commands


def test_every_command_of_the_readme_has_its_way_of_being_checked():
    assert blocks_of(README) == list(COMMANDS)
    elsewhere = [c for c, more in COMMANDS.items() if more is ELSEWHERE]
    assert all(c.startswith("python3 -m venv ") for c in elsewhere)  # which is how .ci/run finds them
    assert "'^python3 -m venv '" in (ROOT / ".ci" / "run").read_text()


def test_the_commands_of_the_readme_run_one_after_the_other(micro, capsys):
    text = "".join(f"The {i}th line of a text, with a word or two.\n" for i in range(60))
    for split in ("train", "valid", "test"):
        path = Path("data", "wikitext-2", f"wiki.{split}.raw")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{split}: {text}")
    programs = {"train.py": train.main, "eval_routing.py": eval_routing.main, "support.pictures": pictures.main}
    for command, more in COMMANDS.items():
        if more is not ELSEWHERE:
            _, *argv = shlex.split(f"{command} {more}")
            program = argv.pop(0) if argv[0] != "-m" else argv.pop(0) and argv.pop(0)
            argv = [name for a in argv for name in (sorted(glob.glob(a)) or [a] if "*" in a else [a])]
            assert programs[program](argv) == 0, (command, capsys.readouterr().err)
    out, err = capsys.readouterr()
    assert "layer 1" in out and "all 4 steps are done" in err
    for name in ("curves.png", "runs/erl-wikitext2-seed0-1/routing.json", "runs/erpo-addition-seed0-1/curves.png"):
        assert Path(name).exists(), name


class Parsed(BaseException):
    """Raised in place of what a program does once it has read its command line."""


def module_at(path: Path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if path.parent.name != "bench":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_only(path: Path, argv: list[str], monkeypatch):
    """Hand a command line to a program's own parser. What it refuses is a SystemExit or an error here."""
    if path.name == "train.py":
        return train.parse(argv) if argv else None  # without a flag: the demo
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    with pytest.raises(Parsed) as parsed:
        module_at(path).main()
    return parsed.value.args[0]


@pytest.mark.parametrize(("page", "command"), DOCUMENTED)
def test_every_documented_command_is_understood(page, command, monkeypatch, capsys):
    """Its program and files exist, and the program's own parser takes its flags."""
    settings, words = [], shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        settings.append(words.pop(0).split("=")[0])
    program, *argv = words
    tests = [a for a in argv if a.startswith("tests")]
    if program.endswith("pip"):
        files = [ROOT / a for a in argv if a.endswith(".txt")]
        assert all(f.exists() for f in files) and (files or all("==" in a for a in argv if a[0] not in "-i"))
    elif "pytest" in argv or "venv" in argv:
        paths = [ROOT / a for a in tests]
        assert all(p.exists() for p in paths)
        source = "".join(p.read_text(encoding="utf-8") for p in paths if p.is_file())
        chosen = argv[argv.index("-k") + 1].split(" or ") if "-k" in argv else []
        assert all(re.search(rf"def test_\w*{k}", source) for k in chosen), f"no test is called like {chosen}"
        assert all(s in source for s in settings)
    elif program != "coverage":
        while not (argv[0] == "-m" or argv[0].endswith((".py", ".sh"))):
            argv.pop(0)  # torchrun's own flags
        name = argv.pop(0)
        path = argv.pop(0).replace(".", "/") + ".py" if name == "-m" else name
        check_program(ROOT / path, argv, monkeypatch)


def check_program(path: Path, argv: list[str], monkeypatch):
    assert path.exists(), path
    flags = [a.split("=")[0] for a in argv if a.startswith("--")]
    if path.parent.name == "recipes" or path.suffix == ".sh":  # needs transformers, or is no Python
        source = path.read_text(encoding="utf-8")
        assert all(f'"{flag}"' in source or f"{flag})" in source for flag in flags), flags
    elif "--help" in argv:
        with pytest.raises(SystemExit) as stop:
            module_at(path).main(argv)
        assert stop.value.code == 0
    elif "--resume" not in argv:  # that reads a run: it is run above
        for name in module_at(path).BENCHMARKS if "NAME" in argv else [""]:
            parse_only(path, [name if a == "NAME" else a for a in argv], monkeypatch)
    if path.name == "reproduce.py":
        arms = module_at(path).EXPERIMENTS
        assert argv[0] in ("report", *arms) or argv[0].startswith("--")


def test_a_flag_that_does_not_exist_would_be_seen(monkeypatch, capsys):
    for program, argv in (
        ("train.py", "--algo lm --nonsense 3"),
        ("eval_routing.py", "run --nonsense"),
        ("support/pictures.py", "run --nonsense"),
        ("results/reproduce.py", "erl-text --nonsense"),
        ("bench/threads.py", "--nonsense"),
    ):
        with pytest.raises((SystemExit, UserError, pytest.fail.Exception)):
            parse_only(ROOT / program, argv.split(), monkeypatch)


# -------------------------------------------------------------------------------------------------- the copy example


def run_examples(text: str) -> doctest.TestResults:
    test = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    return doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None)


def test_the_example_to_copy_runs_and_its_number_is_looked_at():
    assert run_examples(README).failed == 0 < run_examples(README).attempted
    changed = re.sub(r"^0\.\d+$", "0.123", README, flags=re.M)
    assert changed != README and run_examples(changed).failed == 1


# --------------------------------------------------------------------------------------- add a method, add a data set


def added() -> tuple[dict, list]:
    """What README tells one to add: its functions by name, and the rows of DATASETS."""
    section = README.split("## Add a method")[1].split("\n## ")[0]
    rows, names = [], vars(data) | {"problems": SimpleNamespace(), "Example": data.Example}
    for statement in ast.parse("\n".join(body for _, body in BLOCK.findall(section))).body:
        if isinstance(statement, ast.Expr):
            rows += eval(ast.unparse(statement), names)
        else:
            exec(ast.unparse(statement), names)
            setattr(names["problems"], statement.name, names[statement.name])
    return names, rows


def test_a_method_and_two_data_sets_as_the_readme_adds_them(micro, monkeypatch):
    names, rows = added()
    monkeypatch.setitem(train.METHODS, "reinforce", names["reinforce_loss"])
    monkeypatch.setitem(train.OPTIONS, "reinforce", options_of(names["reinforce_loss"]))
    for row in rows:
        monkeypatch.setitem(data.DATASETS, row.name, row)
    Path("novel.txt").write_text("\n\n".join(f"Chapter {i}: it was a dark and stormy night." for i in range(80)))
    argv = f"--algo reinforce --strength 0.5 --dataset double {MICRO_ANSWERS} --out r"
    rewards = itertools.cycle([0.0, 1.0])  # two supervised steps answer nothing right, and equal rewards update nothing
    with monkeypatch.context() as patched:
        patched.setattr(data, "reward", lambda *_: next(rewards))
        assert train.main(argv.split()) == 0
    updates = [row["updates"] for row in map(json.loads, open("r/metrics.jsonl")) if "updates" in row]
    assert updates == [4, 4]
    assert train.main(f"--algo lm --dataset novel {MICRO_TEXT} --out n".split()) == 2
    assert train.main(f"--algo lm --dataset novel {MICRO_TEXT} --data-dir . --out n".split()) == 0
    assert json.loads(Path("n/summary.json").read_text())["data_variant"] == "novel"
    texts = [data.load_text("novel", s, BYTES, data_dir=".") for s in data.SPLITS]
    chapters = [set(re.findall(r"Chapter \d+", BYTES.decode(t.tokens.tolist()))) for t in texts]
    assert all(chapters) and sum(map(len, chapters)) == len(set.union(*chapters)) == 80  # no paragraph in two splits
    for between in ("\r\n\r\n", "\n \t\n"):  # of another system; with blanks on the empty line
        Path("novel.txt").write_bytes(between.join(f"Chapter {i}:\na dark night." for i in range(80)).encode())
        texts = [data.load_text("novel", s, BYTES, data_dir=".") for s in data.SPLITS]
        chapters = [set(re.findall(r"Chapter \d+", BYTES.decode(t.tokens.tolist()))) for t in texts]
        assert all(chapters) and sum(map(len, chapters)) == len(set.union(*chapters)) == 80
    Path("novel.txt").write_text("one paragraph")
    assert train.main("--algo lm --dataset novel --data-dir . --out m".split()) == 2


def test_the_names_that_a_loss_may_ask_for_are_listed():
    section = README.split("## Add a method")[1].split("\n```")[0]
    asked = {n for loss in train.METHODS.values() for n in inspect.signature(loss).parameters}
    flags = {n for options in train.OPTIONS.values() for n in options}
    assert asked - flags <= set(re.findall(r"`(\w+)`", section))


# ------------------------------------------------------------------------------------------------- links and figures


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(" ", "-")


def anchors_of(page: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)}


def links_of(page: Path) -> list[tuple[str, str, str]]:
    """("!" of a picture or "", text, target)."""
    return re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    links = links_of(page)
    for picture, text, target in links:
        if "://" in target:
            url = urlparse(target)
            assert url.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", url.netloc), target
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors_of(there), target
        assert text, f"{target} has no text"
        assert not picture or len(text.split()) > 3, f"{target}: who does not see the picture reads {text!r}"
    assert links or page.name != "README.md"


def test_a_link_that_leads_nowhere_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    for text in ("[a](nothing.md)", "[a](#nothing)", "[a](http://example.com)", "![a](page.md)", "[](page.md)"):
        page.write_text(f"# Something\n{text}\n")
        with pytest.raises(AssertionError):
            test_every_link_leads_somewhere(page)
    page.write_text("# Something: `else`\n[a](#something-else) [b](page.md) [c](https://example.com/x)\n")
    test_every_link_leads_somewhere(page)


def test_the_ratios_of_how_fast_are_those_of_the_docs():
    section = README.split("## How fast")[1].split("\n## ")[0]
    ratios = re.findall(r"\| ([\d.]+) \|$", section, re.M)
    speed = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert len(ratios) == 5 and all(f"| {ratio} (" in speed for ratio in ratios)


def test_the_readme_is_short_and_names_every_method_and_data_set():
    assert len(README.splitlines()) <= 200
    assert not [n for n in [*train.OPTIONS, *data.DATASETS] if f"`{n}`" not in README and n not in ("amc",)]
