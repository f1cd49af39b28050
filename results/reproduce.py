"""Run the experiments of PLAN.md: every arm in every start, one process and one JSON file a run.

    python results/reproduce.py --list
    python results/reproduce.py erl-text --starts 100-109 --jobs 2 --minutes 150
    python results/reproduce.py erl-text --starts 0-2 --arms lm,erl,erl-router
    python results/reproduce.py erl-text --starts 100 --arms lm,erl --again     once more, to results/again/
    python results/reproduce.py erl-real --starts 100-102                       needs recipes/requirements.txt
    python results/reproduce.py report                tables, pictures and docs/findings.md from the JSON alone

A start is a seed and a model trained from it, from which all its arms begin. Runs whose JSON is there are not run
again, and a run that was stopped goes on from its last checkpoint; the arms that the primary contrasts need come first.
Everything goes through train.run and eval_routing (erl-real: recipes/erl_hf.py); models lie in runs/results/ while
they are needed.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs with a thread each do more than one with two

import torch  # noqa: E402

import eval_routing  # noqa: E402
import train  # noqa: E402
from results.arms import EXPERIMENTS, Experiment  # noqa: E402
from results.verdict import RUNS, read_runs  # noqa: E402
from support.errors import UserError, sentence  # noqa: E402
from support.fast import speed_up  # noqa: E402
from support.generation import generate  # noqa: E402
from support.run_folder import find_checkpoint, read_metrics, write_json  # noqa: E402
from support.samples import load_run, load_samples  # noqa: E402
from support.tasks import rng  # noqa: E402

WORK = ROOT / "runs" / "results"
WINDOWS = 30  # ranked (the pilot, starts 0 and 1: 60); the paper ranks 300 samples, at half a second a window
# glibc gives large blocks back to the system as soon as they are freed and gets them anew, page by page, for the next
# step: a quarter of the time of a step of 413 M parameters. The figures do not depend on it.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def json_path(experiment: str, arm: str, start: int) -> pathlib.Path:
    return RUNS / experiment / f"{arm}-{start}.json"


# ---------------------------------------------------------------------------------------------------------------------
# One run, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def run_again():
    """What runs now goes to results/again/, as if nothing had run before."""
    global RUNS, WORK
    RUNS, WORK = RUNS.with_name("again"), WORK / "again"


def flags_of(experiment: str, arm: str, start: int) -> list[str]:
    """The command line of a run of train.py, or of the experiment's recipe."""
    e, folder = EXPERIMENTS[experiment], WORK / experiment / str(start)
    if e.recipe:
        return f"{e.common} {e.arms[arm].flags} --seed {start} --out {folder / arm}".split()
    own = e.start if arm == "start" else f"{e.then} --init {folder / 'start'} {e.arms[arm].flags}"
    return f"{e.common} {own} --seed {start} --device cpu --out {folder / arm}".split()


def run_one(experiment: str, arm: str, start: int, data_dir: str | None = None):
    """Run it, or what is left of it, and write its JSON. A user's error (a loss that is not finite) is a result."""
    e, out = EXPERIMENTS[experiment], WORK / experiment / str(start) / arm
    setups = (e.start_setup,) if arm == "start" else (e.arm_setup, e.arms[arm].setup)
    for setup in filter(None, setups):
        setup()
    flags = flags_of(experiment, arm, start) + (["--data-dir", data_dir] if data_dir else [])
    record = {"experiment": experiment, "arm": arm, "start": start, "versions": versions()}
    record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        begun = time.process_time()
        record["figures"] = run_recipe(flags, out) if e.recipe else run_train(flags, out, e, arm)
        settings = json.loads((out / "config.json").read_text())
        record["settings"] = {k: v for k, v in settings.items() if k not in ("out", "init", "data_dir")}
        record["cpu_seconds"] = round(time.process_time() - begun, 1)
    except UserError as error:
        record["failed"] = sentence(error).replace(str(ROOT), ".")
    path = json_path(experiment, arm, start)
    path.parent.mkdir(parents=True, exist_ok=True)
    if arm != "start" or not path.exists():  # a start whose model was gone: what it gave the first time stays
        write_json(str(path), record)
    if arm != "start":
        shutil.rmtree(out, ignore_errors=True)


def run_train(flags: list[str], out: pathlib.Path, e: Experiment, arm: str) -> dict:
    """A run of train.py in the folder `out`, begun, continued or already there -> its figures."""
    train.plot_curves = lambda *_: None  # two seconds a run
    if not find_checkpoint(str(out)):
        shutil.rmtree(out, ignore_errors=True)
    elif not (out / "summary.json").exists():
        flags = ["--resume", "--out", str(out), "--algo", json.loads((out / "config.json").read_text())["algo"]]
    args = train.parse(flags)
    if not (out / "summary.json").exists():
        train.run(args)
    return figures_of(args, e, arm, out)


def run_recipe(flags: list[str], out: pathlib.Path) -> dict:
    """A run of recipes/erl_hf.py, the same way -> what it says of the held-out windows, before and after, and means."""
    from accelerate import Accelerator  # only erl-real needs the packages of the recipes

    from recipes import erl_hf

    if (out / "checkpoint.pt").exists():
        flags = [*flags, "--resume"]
    else:
        shutil.rmtree(out, ignore_errors=True)
    erl_hf.train(erl_hf.parse(flags), Accelerator(cpu=True))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    means = step_means([r for r in rows if "loss" in r])
    before, after = (r for r in rows if "perplexity" in r)
    return {f"before_{k}": before[k] for k in ("perplexity", "router_entropy")} | means | after


def versions() -> dict:
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cpu = torch.backends.cpu.get_cpu_capability()  # another instruction set rounds otherwise
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__, "cpu": cpu}


def figures_of(args, e: Experiment, arm: str, out: pathlib.Path) -> dict:
    summary = json.loads((out / "summary.json").read_text())
    figures = {k: v for k, v in summary.items() if isinstance(v, (int, float)) and k not in ("seed", "steps")}
    figures |= means_of(str(out), summary["algo"])
    if "perplexity" in summary:
        if e.figures:
            model = load_run(str(out))[0]
            figures |= e.figures(model, train.load_task(args, model.config.context, False))
        return figures if arm == "start" or summary["algo"] == "dense" else figures | ranks(out)
    return figures | {"median_cluster": median_cluster(args, load_run(str(out))[0])}


def step_means(rows: list[dict]) -> dict:
    names = {k for r in rows for k, v in r.items() if isinstance(v, (int, float))}
    names -= {"step", "seconds", "tokens_per_second", "lr"}
    return {f"mean_{k}": statistics.fmean(r[k] for r in rows if k in r) for k in sorted(names)}


def means_of(out: str, algo: str) -> dict:
    """Mean over the algorithm's steps of what they logged; of the gradient's norm the spread too, and of the reward the
    mean of the last third, which is thousands of answers where the test split has hundreds."""
    rows = [r for r in read_metrics(out) if r["phase"] == algo]
    found = step_means(rows)
    norms = [r["grad_norm"] for r in rows if "grad_norm" in r]
    if len(norms) > 1:
        found["spread_grad_norm"] = statistics.stdev(norms)
    rewards = [r["reward_mean"] for r in rows if "reward_mean" in r]
    if len(rewards) >= 3:
        found["late_reward"] = statistics.fmean(rewards[-(len(rewards) // 3) :])
    if found.get("mean_clusters"):
        dropped = found["mean_dropped_clusters"]
        found["dropped_share"] = dropped / (dropped + found["mean_clusters"])
    return found


def ranks(out: pathlib.Path) -> dict:
    """What eval_routing says of WINDOWS windows of the test split; without its pictures."""
    args = eval_routing.parse([str(out), "--samples", str(WINDOWS)])
    model, config, _ = load_run(str(out))
    scored = eval_routing.rank_samples(args, speed_up(model), load_samples(args, model, config))
    result = eval_routing.figures(scored, text=True)
    load = [share for layer in result["expert_load"] for share in layer]
    figures = {k: v for k, v in result.items() if isinstance(v, (int, float))}
    figures |= {"load_max": max(load), "load_min": min(load), "windows": figures.pop("samples")}
    return figures | {f"perplexity_at_{alpha}": score for alpha, score in result["robustness"].items()}


@torch.no_grad()
def median_cluster(args, model) -> float:
    """Tokens of an (answer, layer, expert) cluster that has any, over answers to 64 prompts."""
    task = train.load_task(args, model.config.context, True)
    prompts, generator = task.prompts(0, 64, 1)[1], rng(args.seed, "clusters")
    how = {"max_new_tokens": args.max_new_tokens, "end_token": task.tokenizer.end, "generator": generator}
    rollout = generate(model, prompts, **how)
    chosen = torch.nn.functional.one_hot(rollout.experts, model.config.n_expert).sum(3)  # [B, T, L, E]
    sizes = (chosen * rollout.response_mask[:, :, None, None]).sum(1)
    return sizes[sizes > 0].float().median().item()


# ---------------------------------------------------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------------------------------------------------


def missing(experiment: str, starts: list[int], arms: list[str]) -> list[tuple[str, str, int]]:
    """Runs without a JSON, in the order in which they are to run: first what the primary contrasts need."""
    e, runs = EXPERIMENTS[experiment], []
    for tier in sorted({a.tier for a in e.arms.values()}):
        for start in starts:
            todo = [n for n in arms if e.arms[n].tier == tier and not json_path(experiment, n, start).exists()]
            if todo:
                runs += [(experiment, name, start) for name in ([] if e.recipe else ["start"]) + todo]
    have_model = {s for s in starts if (WORK / experiment / str(s) / "start" / "summary.json").exists()}
    done = {(experiment, "start", s) for s in have_model if json_path(experiment, "start", s).exists()}
    return [r for r in dict.fromkeys(runs) if r not in done]


def minutes_of(runs) -> list[float]:
    """Minutes of a core that each run will take: as such runs took before, or else as EXPERIMENTS says."""
    before: dict[tuple[str, str], list[float]] = {}
    for (experiment, arm, _), record in read_runs().items():
        if "cpu_seconds" in record:
            before.setdefault((experiment, arm), []).append(record["cpu_seconds"] / 60)
    expected = []
    for experiment, arm, _ in runs:
        guess = EXPERIMENTS[experiment].minutes[arm != "start"]
        expected.append(statistics.median(before.get((experiment, arm), [guess])))
    return expected


def run_all(runs, jobs: int, minutes: float, more: list[str]):
    """Each in a process of its own with the flags `more`, `jobs` at a time; none is begun that would not end within
    `minutes`."""
    expected, begun, running = minutes_of(runs), time.monotonic(), {}
    print(f"{len(runs)} runs, {sum(expected):.0f} minutes of a core; {jobs} at a time for {minutes:g} minutes at most")
    waiting = list(zip(runs, expected, strict=True))
    try:
        while waiting or running:
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                print(f"{'/'.join(map(str, run))}: " + (outcome(run) if process.returncode == 0 else "broke off"))
                if process.returncode:  # not the run's own doing (those are results): stop and look
                    waiting = []
            left = minutes - (time.monotonic() - begun) / 60
            ready = [w for w in waiting if w[1] <= left and not start_is_awaited(w[0], waiting, running)]
            if len(running) < jobs and ready:
                waiting.remove(ready[0])
                command = [sys.executable, __file__, "--one", *map(str, ready[0][0]), *more]
                streams = {"stdout": subprocess.DEVNULL, "stderr": log_of(ready[0][0])}
                running[subprocess.Popen(command, **streams, env=os.environ | KEEP_MEMORY)] = ready[0][0]
            elif not running:
                break
            else:
                time.sleep(0.5)
    finally:
        for process in running:
            process.terminate()  # train.py saves its state and goes on from there
        for process in running:
            process.wait()
    if waiting:
        print(f"{len(waiting)} runs are left for the next time: the same command goes on")


def start_is_awaited(run, waiting, running) -> bool:
    start = (run[0], "start", run[2])
    return run != start and (start in running.values() or any(w[0] == start for w in waiting))


def outcome(run) -> str:
    record = json.loads(json_path(*run).read_text())
    figures = record.get("figures", {})
    shown = [f"{k} {figures[k]:.4g}" for k in ("perplexity", "mrr", "router_entropy", "accuracy") if k in figures]
    return record.get("failed") or ", ".join(shown) + f", {record['cpu_seconds']:.0f} s"


def log_of(run):
    folder = WORK / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / f"{'-'.join(map(str, run))}.txt", "w")


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """ "3", "0,4" or "100-109" """
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def show_experiments():
    for name, e in EXPERIMENTS.items():
        ran = sorted({start for n, _, start in read_runs() if n == name})
        minutes = e.minutes[0] + e.minutes[1] * len(e.arms)
        print(f"{name}: {e.about}\n  about {minutes:.0f} minutes of a core a start; starts with a result: {ran}")
        for arm, a in e.arms.items():
            print(f"  {arm:29}{a.about}")


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", help="an experiment, or report")
    p.add_argument("--list", action="store_true", help="experiments, arms, what has run")
    p.add_argument("--starts", type=numbers, default=numbers("100-109"), help='e.g. "100-109" or "0,1"; tuning: 0-2')
    p.add_argument("--arms", help="only these, separated by commas")
    p.add_argument("--tier", type=int, default=2, help="0: only what the primary contrasts need; 1: the controls too")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default 2)")
    p.add_argument(
        "--minutes", type=float, default=150.0, help="no run begins that would not end in them (default 150)"
    )
    p.add_argument(
        "--again", action="store_true", help="to results/again/, as if nothing had run: does it come out alike?"
    )
    p.add_argument("--data-dir", help="erl-real: read the text below this folder, not from the hub")
    p.add_argument("--one", nargs=3, metavar=("NAME", "ARM", "START"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.again:
        run_again()
    if args.one:
        run_one(args.one[0], args.one[1], int(args.one[2]), args.data_dir)
    elif args.list or not args.name:
        show_experiments()
    elif args.name == "report":
        from results import report

        report.write()
    elif args.name not in EXPERIMENTS:
        p.error(f"there is no experiment {args.name}: {', '.join(EXPERIMENTS)}")
    else:
        known = EXPERIMENTS[args.name].arms
        arms = args.arms.split(",") if args.arms else [n for n, a in known.items() if a.tier <= args.tier]
        if unknown := [n for n in arms if n not in known]:
            p.error(f"{args.name} has no arm {unknown[0]}: {', '.join(known)}")
        more = ["--again"] * args.again + (["--data-dir", args.data_dir] if args.data_dir else [])
        run_all(missing(args.name, args.starts, arms), args.jobs, args.minutes, more)
    return 0


def stop(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    if "--one" not in sys.argv:  # a run has its own way to end: it saves its state first
        signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
