"""Mutation testing: each line of the losses is changed in turn; a test has to notice.

    pip install mutmut==3.8.1                      # beside tests/requirements.txt; not needed for anything else
    python bench/mutants.py                        # erl.py erpo.py rais.py baselines.py: about an hour of one core
    python bench/mutants.py rais.py --work DIR     # one file; a second call with the same DIR repeats what changed

Prints one line for every mutant that no test kills, and ends with status 1 unless docs/mutants.md lists it with the
reason why it changes nothing. Works on a copy: the repository stays as it is.

mutmut makes the mutants (numbers, comparisons, operators, arguments, strings, conditions), and one more operator here
drops a method call: x.detach() becomes x. Functions under @torch.no_grad() are mutated too, which mutmut alone would
leave out: in the copy their decorator is applied at the end of the file. Texts of errors are not mutated.
"""

import argparse
import ast
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ["erl.py", "erpo.py", "rais.py", "baselines.py"]
TESTS = ["test_erl.py", "test_erpo.py", "test_rais.py", "test_baselines.py", "test_extremes.py"]
CONFIG = """[mutmut]
source_paths=
    {sources}
also_copy=
    {files}
    tests/
do_not_mutate_patterns=
    raise ValueError
    ^ +f?"
pytest_add_cli_args=
    -q
    -p no:cacheprovider
    --deselect=tests/test_baselines.py::test_each_loss_file_imports_only_torch_and_the_standard_library
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
    (work / "tests").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        new = undecorated(text) if name in sources else text
        if not (work / name).exists() or (work / name).read_text(encoding="utf-8") != new:
            (work / name).write_text(new, encoding="utf-8")
    for name in ["conftest.py", "reference.py", *TESTS]:
        shutil.copy(ROOT / "tests" / name, work / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", work)
    indent = "\n    ".join
    config = CONFIG.format(sources=indent(sources), files=indent(FILES), tests=indent(f"tests/{t}" for t in TESTS))
    (work / "setup.cfg").write_text(config, encoding="utf-8")
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")


def drop_method_call(node):
    """x.f(...) -> x"""
    import libcst as cst

    function = node.func
    if isinstance(function, cst.Attribute) and getattr(function.value, "value", None) != "torch":
        yield function.value


def survivors(sources: list[str]):
    """(file and function, the changed lines) of every mutant that no test killed."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    for path in map(Path, sources):
        data = SourceFileMutationData(path=path)
        data.load()
        print(f"{path}: {len(data.exit_code_by_key)} mutants")
        for key, code in data.exit_code_by_key.items():
            if status_by_exit_code[code] not in ("killed", "timeout"):
                lines = [
                    x
                    for x in get_diff_for_mutant(key, path=path).splitlines()
                    if x[:1] in "+-" and x[1:3] not in ("--", "++")
                ]
                yield f"{path} {key.split('x_', 1)[1].split('__mutmut')[0]}", "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, metavar="FILE", help=f"of {' '.join(FILES)}")
    parser.add_argument("--work", type=Path, help="folder of the copy; default: a new temporary one")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="mutants-"))
    prepare(work, args.files)
    os.chdir(work)
    os.environ["OMP_NUM_THREADS"] = "1"

    import libcst as cst
    from mutmut import __main__ as mutmut
    from mutmut.mutation import mutators

    mutators.mutation_operators.append((cst.Call, drop_method_call))
    mutmut._run([], max_children=1)

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
