"""How answers are compared with the references of the mathematical sets: python bench/grading.py --data-dir DIR

A line a set: how many of its references are compared by value, as text, or not at all (see docs/grading.md).
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.grading import compared_by, measure_math, measure_number  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="a folder that holds the sets; default: the hub")
    parser.add_argument("--list", action="store_true", help="print every reference that is not compared by value")
    args = parser.parse_args()
    print("| set | references | by value | as text | refused |\n| --- | --- | --- | --- | --- |")
    for spec in data.DATASETS.values():
        if spec.measure not in (measure_math, measure_number) or not (spec.hub or args.data_dir):
            continue
        sources = spec.files if args.data_dir else spec.hub_splits
        examples = [e for split in sources for e in data.load_examples(spec.name, split, data_dir=args.data_dir)]
        references = [r for example in examples for r in example.references]
        ways = {r: compared_by(r) for r in references}
        counts = Counter(ways[r] for r in references)
        print(f"| {spec.name} | {len(references)} | {counts['value']} | {counts['text']} | {counts['refused']} |")
        if args.list:
            print(*(f"    {way}: {r!r}" for r, way in ways.items() if way != "value"), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"grading.py: {error}", file=sys.stderr)
        sys.exit(2)
