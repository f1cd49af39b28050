"""What README.md and docs/ tell a reader to type, click or paste is there, and works."""

import ast
import doctest
import inspect
import itertools
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import BYTES

import data
import eval_routing
import train
from support.arguments import options_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "results" / "PLAN.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
MICRO_TEXT = "--data-dir data --tokenizer bytes --pretrain-steps 2 --steps 2 --batch-size 2 --eval-samples 2"
MICRO_ANSWERS = "--pretrain-steps 2 --steps 2 --prompts-per-step 4 --eval-samples 4 --test-samples 4"


def commands_of(page: Path) -> list[str]:
    """Every command of a page that begins with python, in blocks, tables and text; RUN stands for a run folder.

    "`python train.py --algo erl ...`; `--algo lm`" are two: the second is the first with that flag.
    """
    text, found = page.read_text(encoding="utf-8"), []
    for command, other in re.findall(r"`(python [^`]+)`(?:; `(--algo \w+)`)?", BLOCK.sub("", text)):
        found += [command, re.sub(r"--algo \w+", other, command)] if other else [command]
    found += [line for _, body in BLOCK.findall(text) for line in body.splitlines() if line.startswith("python ")]
    return [" ".join(command.split(" #")[0].split()) for command in found]


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


def test_ci_finds_the_two_commands_that_make_an_environment():
    demo, tests = (line for line in README.splitlines() if line.startswith("python3 -m venv "))
    assert demo.endswith("train.py") and tests.endswith("-m pytest")
    assert "'^python3 -m venv '" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_program_and_flags_that_exist(command, micro, capsys):
    _, program, *argv = shlex.split(command)
    if program == "-m":
        program = argv.pop(0)
    if program == "pytest":
        assert all((ROOT / a).exists() for a in argv if a.startswith("tests"))
        return
    path = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    assert path.exists(), path
    if program == "train.py" and "--help" in argv:
        with pytest.raises(SystemExit, match="^0$"):
            train.parse(argv)
    elif program == "train.py" and "--algo" in argv:  # without are the demo, and --resume, which runs below
        assert train.parse(argv).algo == argv[argv.index("--algo") + 1]
    elif program == "eval_routing.py":
        eval_routing.parse(argv)
    else:
        source = path.read_text(encoding="utf-8") + (ROOT / "support" / "arguments.py").read_text(encoding="utf-8")
        assert all(f'"{flag}"' in source for flag in argv if flag.startswith("--")), argv


def test_every_flag_that_a_page_names_exists():
    ours = [p for p in ROOT.glob("**/*.py") if p.parts[len(ROOT.parts)] not in ("tests", ".venv")]
    known = {f"--{name.replace('_', '-')}" for options in train.OPTIONS.values() for name in options}
    known.update(*(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")) for path in ours))
    known |= {"--help", "--no-deps", "--nproc_per_node", "--custom-loss-function-path"}  # of pip, torchrun, verl, ...
    known |= {"--use-routing-replay", "--use-rollout-routing-replay"}
    for page in PAGES[:1] + PAGES[2:]:  # the plan tells of programs that are no longer there
        text = page.read_text(encoding="utf-8")
        code = " ".join(re.findall(r"`([^`]+)`", BLOCK.sub("", text)) + [body for _, body in BLOCK.findall(text)])
        flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        assert not [flag for flag in flags if not {flag, flag.replace("--no-", "--")} & known], page
    paper = train.parse("--algo erl --dataset wikitext2 --init gpt2 --erl-grad all --epochs 15".split())  # ERL table 7
    found = paper.lr, paper.batch_size, paper.n_perturb, paper.alpha, paper.delta, paper.clip_eps, paper.weight_decay
    assert found == (1e-5, 4, 3, 0.6, 0.5, None, 0.1)


def test_the_first_rows_of_the_table_run_one_after_the_other(micro, capsys):
    Path("data", "wikitext-2").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        text = "".join(f"The {i}th line of {split}, with a word or two.\n" for i in range(60))
        Path("data", "wikitext-2", f"wiki.{split}.raw").write_text(text)
    for algo in ("erl", "lm"):
        assert train.main(f"--algo {algo} --dataset wikitext2 {MICRO_TEXT} --out {algo}".split()) == 0
        assert eval_routing.main(f"{algo} --samples 2 --decisions 3".split()) == 0
    assert train.main(f"--algo erpo --dataset addition {MICRO_ANSWERS} --out erpo".split()) == 0
    assert train.main("--resume --out erl".split()) == 0
    out, err = capsys.readouterr()
    assert "MRR alone misleads" in out and "all 4 steps are done" in err


def test_the_example_to_copy_runs_and_its_number_is_looked_at():
    for text, failed in ((README, 0), (re.sub(r"^0\.\d+$", "0.123", README, flags=re.M), 1)):
        example = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
        found = doctest.DocTestRunner(verbose=False).run(example, out=lambda _: None)
        assert found.failed == failed and found.attempted > 3


def test_a_method_and_two_data_sets_as_the_pages_add_them(micro, monkeypatch):
    section = README.split("## Add a method")[1].split("\n## ")[0] + (ROOT / "docs" / "data-sets.md").read_text()
    rows, names = [], vars(data) | {"problems": SimpleNamespace()}
    for statement in ast.parse("\n".join(body for _, body in BLOCK.findall(section))).body:
        if isinstance(statement, ast.Expr):
            rows += eval(ast.unparse(statement), names)
        else:
            exec(ast.unparse(statement), names)
            setattr(names["problems"], statement.name, names[statement.name])
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
    assert train.main(f"--algo lm --dataset novel {MICRO_TEXT} --out n".split()) == 2  # there is no folder data
    assert train.main(f"--algo lm --dataset novel {MICRO_TEXT} --data-dir . --out n".split()) == 0
    texts = [data.load_text("novel", s, BYTES, data_dir=".") for s in data.SPLITS]
    chapters = [set(re.findall(r"Chapter \d+", BYTES.decode(t.tokens.tolist()))) for t in texts]
    assert all(chapters) and sum(map(len, chapters)) == len(set.union(*chapters)) == 80  # no paragraph in two splits


def test_the_names_that_a_loss_may_ask_for_are_listed():
    section = README.split("## Add a method")[1].split("\n```")[0]
    asked = {n for loss in train.METHODS.values() for n in inspect.signature(loss).parameters}
    flags = {n for options in train.OPTIONS.values() for n in options}
    assert asked - flags <= set(re.findall(r"`(\w+)`", section))
    trained = [name for name, spec in data.DATASETS.items() if "train" in (spec.files or data.SPLITS)]
    assert not [name for name in trained if f"`{name}`" not in README]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    for picture, text, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists() and text, target
        assert not picture or len(text.split()) > 3, f"{target}: who does not see the picture reads {text!r}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", there.read_text("utf-8")), re.M)
            words = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
            assert anchor in [re.sub(r"[^\w\- ]", "", w).replace(" ", "-") for w in words], target  # as GitHub does


def test_every_test_that_a_page_names_exists():
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    named = re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)`", pages)
    assert named and not [n for file, n in named if f"def {n}(" not in (ROOT / "tests" / file).read_text("utf-8")]
