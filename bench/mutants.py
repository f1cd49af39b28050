"""Mutation testing: one thing in a source file is changed, and a test has to notice; so for every thing in turn.

    pip install mutmut==3.8.1                      # beside tests/requirements.txt; nothing else needs it
    python bench/mutants.py                        # erl.py erpo.py rais.py baselines.py: 25 minutes of one core
    python bench/mutants.py moe.py                 # routing, gates, capacity, router losses and upcycling
    python bench/mutants.py rais.py --work DIR     # a second call with DIR tries survivors again

Prints every mutant that no test kills, and ends with status 1 unless docs/mutants.md lists it with the reason why it
changes nothing. Works on a copy: the repository stays as it is.

mutmut makes the mutants (numbers, comparisons, operators, arguments, strings, conditions); one more operator here drops
a method call: x.detach() becomes x. Functions under @torch.no_grad() are mutated too, which mutmut alone would leave
out: in the copy their decorator is applied at the end of the file. Texts of errors are not mutated.
"""

import argparse
import ast
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ["erl.py", "erpo.py", "rais.py", "baselines.py"]
LOSS_TESTS = ["test_erl.py", "test_erpo.py", "test_rais.py", "test_baselines.py", "test_extremes.py"]
PARTS_OF_MOE = ["choose_experts", "within_capacity", "router_losses", "upcycle"]
ABOUT_SOURCES = (
    "imports_only_torch or imports_torch_and or stands_alone"  # tests that read the files, which are mutated now
)
CONFIG = """[mutmut]
source_paths=
    {sources}
also_copy=
    {others}
    tests/
do_not_mutate_patterns=
    raise ValueError
    ^ +f?"
pytest_add_cli_args=
    -q
    -p no:cacheprovider
    -k=not ({skipped})
pytest_add_cli_args_test_selection=
    {tests}
"""


def undecorated(source: str) -> str:
    """The same module, with the decorators of its functions applied at its end."""
    lines, calls = source.splitlines(), []
    for node in ast.parse(source).body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            calls.append(f"{node.name} = {ast.unparse(decorator)}({node.name})")
            lines[decorator.lineno - 1] = ""
    return "\n".join([*lines, *calls, ""])


def prepare(work: Path, sources: list[str]) -> None:
    """The top level's modules, support/, tests/ and mutmut's settings in a folder of their own."""
    work.mkdir(parents=True, exist_ok=True)
    others = [path.name for path in ROOT.glob("*.py") if path.name not in sources]
    for name in sources:
        text = undecorated((ROOT / name).read_text(encoding="utf-8"))
        if not (work / name).exists() or (work / name).read_text(encoding="utf-8") != text:
            (work / name).write_text(text, encoding="utf-8")
    for name in [*others, "pyproject.toml"]:
        shutil.copy(ROOT / name, work)
    for folder in ("support", "tests"):
        shutil.copytree(ROOT / folder, work / folder, dirs_exist_ok=True)
    tests = [f"tests/{t}" for t in (LOSS_TESTS if sources != ["moe.py"] else ["test_moe.py"])]
    indent = "\n    ".join
    settings = CONFIG.format(
        sources=indent(sources), others=indent([*others, "support/"]), tests=indent(tests), skipped=ABOUT_SOURCES
    )
    (work / "setup.cfg").write_text(settings, encoding="utf-8")


def drop_method_call(node):
    """x.f(...) -> x"""
    import libcst as cst

    function = node.func
    if isinstance(function, cst.Attribute) and getattr(function.value, "value", None) not in ("torch", "F"):
        yield function.value


def forget_survivors(sources: list[str]) -> None:
    """So that a second call in the same folder tries them again: a test may have been written since."""
    from mutmut.mutation.data import SourceFileMutationData

    for path in map(Path, sources):
        data = SourceFileMutationData(path=path)
        data.load()
        data.exit_code_by_key = {key: code if code == 1 else None for key, code in data.exit_code_by_key.items()}
        if data.exit_code_by_key:
            data.save()


def survivors(sources: list[str]):
    """(file and function, the changed lines) of every mutant that was tried and not killed."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    for path in map(Path, sources):
        data = SourceFileMutationData(path=path)
        data.load()
        tried = {key: status_by_exit_code[code] for key, code in data.exit_code_by_key.items() if code is not None}
        print(f"{path}: {len(tried)} mutants, {sum(s in ('killed', 'timeout') for s in tried.values())} killed")
        for key, status in tried.items():
            if status not in ("killed", "timeout"):
                diff = get_diff_for_mutant(key, path=path).splitlines()
                change = [line for line in diff if line[:1] in ("-", "+") and line[:3] not in ("---", "+++")]
                yield f"{path}, {key.split('x_', 1)[-1].split('__mutmut')[0]}", "\n".join(change)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=LOSSES, metavar="FILE", help=f"of {' '.join(LOSSES)}, or moe.py")
    parser.add_argument("--work", type=Path, help="folder of the copy; default: a new temporary one")
    args = parser.parse_args()
    if args.files != ["moe.py"] and not set(args.files) <= set(LOSSES):
        parser.error(f"FILE must be of {' '.join(LOSSES)}, or moe.py alone, got {' '.join(args.files)}")
    work = args.work or Path(tempfile.mkdtemp(prefix="mutants-"))
    prepare(work, args.files)
    os.chdir(work)
    os.environ["OMP_NUM_THREADS"] = "1"

    import libcst as cst
    from mutmut import __main__ as mutmut
    from mutmut.mutation import mutators

    mutators.mutation_operators.append((cst.Call, drop_method_call))
    names = [f"moe.x_{part}__mutmut_*" for part in PARTS_OF_MOE] if args.files == ["moe.py"] else []
    forget_survivors(args.files)
    mutmut._run(names, max_children=1)

    listed, new = (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8"), 0
    print()
    for where, change in survivors(args.files):
        if change not in listed:
            new += 1
            print(f"survives: {where}\n{change}")
    print(f"{new} mutants survive and are not in docs/mutants.md")
    return int(new > 0)


if __name__ == "__main__":
    sys.exit(main())
