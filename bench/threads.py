"""What other processes cost a training step, for several ways in which OpenMP's threads may wait.

    python bench/threads.py                                       train.py's own setting beside one thread
    python bench/threads.py --spin 300000 10000 1000 100 0        other values of GOMP_SPINCOUNT (libgomp's: 300000)

The step is that of `bench.py step`, 8 experts, V = 257; the figure is wall-clock time, the best of `--rounds` rounds in
which the settings take turns, alone and beside 1, 2, ... processes that compute all the time (--busy). "others" is the
share of the machine that other processes took meanwhile: where it is not near 0 the machine was not idle, and the
figures are too high. Linux only. Prints a table, writes results/threads.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TICK = 1 / os.sysconf("SC_CLK_TCK")
WORK = """
import sys, time
sys.path.insert(0, {here!r})
import bench, torch
torch.set_num_threads({threads})
args = bench.parse(["step", "--out", {out!r}])
step = bench.Steps(bench.build(args, 257), args).once
step()
print("ready", flush=True)
for line in sys.stdin:
    begun = time.perf_counter()
    for _ in range(int(line)):
        step()
    print((time.perf_counter() - begun) / int(line), flush=True)
"""


class Worker:
    """A process that takes steps when it is asked to, and sleeps otherwise."""

    def __init__(self, threads: int, spin: str, out: str):
        environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
        if spin != "own":
            environment["GOMP_SPINCOUNT"] = spin
        code = WORK.format(here=HERE, threads=threads, out=out)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit("threads.py: the training step does not run here: see python bench/bench.py step")

    def seconds(self, steps: int) -> float:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def processor_seconds(pid: int | None = None) -> float:
    """What a process used so far; None: the whole machine."""
    if pid is None:
        with open("/proc/stat") as file:
            user, nice, system = map(int, file.readline().split()[1:4])
        return (user + nice + system) * TICK
    with open(f"/proc/{pid}/stat") as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) * TICK


def measure(worker: Worker, busy: int, steps: int) -> tuple[float, float]:
    """Seconds of a step beside `busy` processes, and the share of the machine that all others took."""
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        time.sleep(0.2 if busy else 0)
        ours = [worker.process.pid, *(r.pid for r in rivals)]
        begun, before, mine = time.perf_counter(), processor_seconds(), sum(map(processor_seconds, ours))
        seconds = worker.seconds(steps)
        mine, all_ = sum(map(processor_seconds, ours)) - mine, processor_seconds() - before
        return seconds, max(0.0, all_ - mine) / (time.perf_counter() - begun) / os.cpu_count()
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a step; default: all")
    parser.add_argument("--spin", nargs="*", default=["own"], help="GOMP_SPINCOUNT, or own: train.py's")
    parser.add_argument("--busy", nargs="*", type=int, default=[0, 1, 2], help="numbers of other processes")
    parser.add_argument("--steps", type=int, default=10, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="results", help="folder of the JSON")
    args = parser.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    settings = [(1, "own")] + [(args.threads, spin) for spin in args.spin]
    workers, cells = [Worker(*setting, args.out) for setting in settings], {}
    for _ in range(args.rounds):
        for busy in args.busy:
            for setting, worker in zip(settings, workers, strict=True):
                cells.setdefault((setting, busy), []).append(measure(worker, busy, args.steps))
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
    rows = []
    print(f"{'ms a step (others)':24}" + "".join(f"{f'beside {b}' if b else 'alone':>16}" for b in args.busy))
    for threads, spin in settings:
        best = {b: min(cells[(threads, spin), b]) for b in args.busy}
        name = "1 thread" if threads == 1 else f"{threads} threads, spin {spin}"
        print(f"{name:24}" + "".join(f"{f'{1000 * s:.0f} ({o:.0%})':>16}" for s, o in best.values()), flush=True)
        for busy, (seconds, others) in best.items():
            every = [s for s, _ in cells[(threads, spin), busy]]
            rows.append(dict(threads=threads, spin=spin, busy=busy, seconds=seconds, others=others, rounds=every))
    results = {"benchmark": "threads", "cores": os.cpu_count(), "steps": args.steps, "rows": rows}
    with open(os.path.join(args.out, "threads.json"), "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    return results


if __name__ == "__main__":
    main()
