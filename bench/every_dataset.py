"""Every algorithm on every data set, for a step or two: does each path run to its end, and what does it report?

    python bench/every_dataset.py --data-dir ../shared/data

The models see a handful of records: their scores say that a metric was computed, nothing about an algorithm. The sets
that are generated or embedded run too. Prints a line a run, writes results/every-dataset.json, and exits with 1 if a
run failed. With one thread it takes about half an hour, most of it for WikiText-2, whose whole test split is read.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train  # noqa: E402, before torch: it sets what torch reads when it is imported

# isort: split
import torch  # noqa: E402
from support.command_line import TEXT  # noqa: E402

import data  # noqa: E402
from support.arguments import number  # noqa: E402

FLAGS = """--steps 2 --batch-size 2 --prompts-per-step 2 --minibatches 2 --group-size 4 --max-new-tokens 8 --beams 2
--eval-samples 4 --eval-every 100""".split()
METRICS = ("perplexity", "rouge1", "rouge2", "rougeL", "exact_match", "f1", "accuracy")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="as of train.py; without it the sets come from the hub")
    parser.add_argument("--datasets", nargs="*", help="default: all that can be trained on")
    parser.add_argument("--threads", type=number(int, low=1), default=1, help="CPU threads")
    parser.add_argument("--out", default="results", help="folder of the JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for dataset in args.datasets or [name for name, spec in data.DATASETS.items() if not spec.test_only]:
        for algo in (*TEXT, *train.METHODS):
            with tempfile.TemporaryDirectory() as folder:
                flags = ["--algo", algo, "--dataset", dataset, *FLAGS, "--out", f"{folder}/run"]
                flags += ["--pretrain-steps", "2"] if algo != "dense" else []
                flags += ["--data-dir", args.data_dir] if args.data_dir else []
                said, begun = io.StringIO(), time.perf_counter()
                try:
                    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                        status = train.main(flags)
                except Exception as error:  # a crash is what this looks for: on to the next run
                    status = 1
                    print(repr(error), file=said)
                row = {"dataset": dataset, "algo": algo, "status": status}
                if status:
                    row["error"] = said.getvalue().strip().splitlines()[-1]
                else:
                    with open(f"{folder}/run/summary.json") as file:
                        row["scores"] = {k: v for k, v in json.load(file).items() if k in METRICS}
            rows.append(row)
            scores = " ".join(f"{k} {v:.3f}" for k, v in row.get("scores", {}).items())
            seconds = f"{time.perf_counter() - begun:.0f} s"
            print(f"{dataset:12}{algo:8}{seconds:>6}  {row.get('error', scores)}", flush=True)
    failed = sum(row["status"] != 0 for row in rows)
    print(f"{len(rows)} runs, {failed} failed")
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "every-dataset.json"), "w") as file:
        json.dump({"torch": torch.__version__, "flags": FLAGS, "runs": rows}, file, indent=1)
        file.write("\n")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
