"""A run and its folder: the order of steps, updates, evaluations, checkpoints, and what is written down of them.

config.json  metrics.jsonl  summary.json  curves.png
checkpoint/  model.safetensors, state.pt: the last state
best/        model.safetensors: the weights with the best validation score since the algorithm began
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zipfile

import torch
from safetensors import SafetensorError
from torch import Tensor

from support.checkpoints import is_finite, load_model, save_model
from support.errors import UserError, plainly, say
from support.evaluation import evaluate, mean_scores
from support.optimizer import learning_rate, make_optimizer, restore
from support.progress import Progress

LOG_EVERY = 10  # steps between two lines of metrics.jsonl, where a step is one update on text


def write_json(path: str, value):
    with open(path + ".tmp", "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".tmp", path)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run
# ---------------------------------------------------------------------------------------------------------------------


def replace_folder(path: str, write):
    """Write a folder aside and rename it: whoever is killed meanwhile leaves a whole one, old or new."""
    old, aside = path + ".old", path + ".tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.makedirs(aside)
        write(aside)
    except (OSError, RuntimeError, SafetensorError):  # each library reports a full disk in its own way
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if os.path.isdir(path):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(aside, path)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(out: str, name: str = "checkpoint") -> str | None:
    """The folder of the newest whole checkpoint of a run, or None."""
    return next((p for n in (name, name + ".old") if os.path.isdir(p := os.path.join(out, n))), None)


SCORES = "perplexity bits_per_byte rouge1 rouge2 rougeL exact_match f1 accuracy unigram_f1".split()
NEW_STATE = {
    "step": 0,  # steps done, of both phases
    "metrics_bytes": 0,  # length of metrics.jsonl
    "seconds": 0.0,
    "tokens": 0,  # tokens learned from
    "updates": 0,  # optimizer steps since the last line of metrics.jsonl ...
    "clipped": 0,  # ... and those whose gradient was clipped
    "best_score": -math.inf,  # validation score, higher is better
    "best_step": -1,
    "before": {},  # test scores where the algorithm began
    "optimizer": {},
}


def load_state(folder: str) -> dict:
    """state.pt of a checkpoint, every byte as it was written and every entry of the type that it had."""
    try:
        with zipfile.ZipFile(path := os.path.join(folder, "state.pt")) as file:
            if file.testzip():  # torch.load does not look at the checksums
                raise ValueError
        state = torch.load(path, map_location="cpu", weights_only=True)
        if {k: type(v) for k, v in state.items()} != {k: type(v) for k, v in NEW_STATE.items()}:
            raise TypeError
        if min(state["step"], state["metrics_bytes"]) < 0 or not all(map(_is_score, state["before"].items())):
            raise ValueError
        return state
    except Exception as error:  # torch.load has no error type of its own for a broken file
        raise UserError(f"{folder}/state.pt is not a readable checkpoint of this program") from error


def _is_score(item) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], int | float)


def _is_row(row) -> bool:
    """A step, a phase (of an evaluation the split too), and numbers or lists of them."""
    if not (isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("phase"), str)):
        return False
    values = [v if isinstance(v, list) else [v] for k, v in row.items() if k not in ("phase", "split")]
    return isinstance(row.get("split", ""), str) and all(isinstance(x, int | float) for v in values for x in v)


def read_metrics(out: str) -> list[dict]:
    path = os.path.join(out, "metrics.jsonl")
    try:
        with open(path) as file:
            rows = [json.loads(line) for line in file]
        if all(map(_is_row, rows)):
            return rows
    except (ValueError, RecursionError):
        pass
    raise UserError(
        f"{path} holds a line that is no row of metrics: put the run's own file back, or start a new run with "
        f"--init {out}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """Two phases of steps over one folder; see `steps`, `update` and `after`, which the training loops call.

    Stopping, saving, finiteness, logging, the schedule and the summary are decided here and nowhere else.
    """

    def __init__(self, args, state: dict, phases: dict[str, int], prepare):
        """phases: steps of "supervised" and of the algorithm; prepare: puts a loaded model where it is to run."""
        self.args, self.out, self.state, self.phases, self.prepare = args, args.out, state, phases, prepare
        self.total = sum(phases.values())
        self.begun = time.perf_counter() - state["seconds"]
        self.stop_asked = self.stop_at_once = False
        self.metrics_path = os.path.join(self.out, "metrics.jsonl")

    @property
    def step(self) -> int:
        return self.state["step"]

    # ---- what the training loops call

    def begin(self, phase: str, model, task, peak: float):
        """The next phase: its model, its peak learning rate and an optimizer of its own."""
        self.phase, self.model, self.task, self.peak = phase, model, task, peak
        self.first = 0 if phase == "supervised" else self.phases["supervised"]
        self.end = self.first + self.phases[phase]
        self.optimizer = make_optimizer(model, self.args.weight_decay, self.args.router_lr_factor)
        self.routers = [p for n, p in model.named_parameters() if n.endswith("router.weight")]
        if self.step > self.first:  # resumed within the phase
            try:
                restore(self.optimizer, self.state["optimizer"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self.out}/checkpoint/state.pt does not fit the weights: {error}") from error

    def steps(self):
        """The steps of this phase that are still to do, counted from its beginning."""
        while self.step < self.end:
            if self.phase != "supervised" and self.step == self.first:
                self._evaluate_before()
            elif self.step and self.step % self.args.eval_every == 0:
                # after the checkpoint of this step: a run that is interrupted here evaluates when it goes on
                self._evaluate_on_the_way()
            rate = learning_rate(self.step - self.first, self.end - self.first, self.peak)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            yield self.step - self.first

    def update(self, loss: Tensor) -> dict[str, Tensor]:
        """One optimizer step, its gradient clipped to the norm --clip-grad (0: never). -> the norms before."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.args.clip_grad or math.inf
        router_norm = torch.nn.utils.get_total_norm([p.grad for p in self.routers if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.state["updates"] += 1
        self.state["clipped"] = self.state["clipped"] + (norm.detach() > limit)  # a tensor: no wait for the device
        return {"grad_norm": norm.detach(), "router_grad_norm": router_norm.detach()}

    def after(self, metrics: dict, tokens: int, every: int = LOG_EVERY, more=dict):
        """A step is done: write it down (each `every` steps; `more` gives what is only computed for that), save, stop
        if that was asked for."""
        self.state["step"] += 1
        self.state["tokens"] += tokens
        self.bar.update()
        stopping, finished = self.stop_asked, self.step == self.total
        saving = stopping or finished or self.step % self.args.checkpoint_every == 0
        logging = finished or self.step % every == 0
        if logging or saving:
            metrics = plain_numbers(metrics)
            self._check_finite(metrics)
        if logging:
            metrics |= plain_numbers(more())
            self._log_step(metrics)
        if saving:
            self._save()
        if stopping:
            raise KeyboardInterrupt(f" at step {self.step} of {self.total}, state saved")

    def finish(self) -> dict:
        """Final scores of the last and of the best weights -> summary.json."""
        self.stop_at_once = True  # all steps are saved: nothing to wait for
        self.seconds = time.perf_counter() - self.begun
        validation = self._evaluate_on_the_way()
        results = self._evaluate(self._tests(), final=True)
        summary = mean_scores(results) | {f"validation_{k}": v for k, v in validation.items()}
        summary["test_samples"] = summary.pop("samples")
        summary |= {f"before_{k}": v for k, v in self.state["before"].items()}
        best = results
        if self.state["best_step"] < self.step:
            weights = os.path.join(find_checkpoint(self.out, "best"), "model.safetensors")
            model = self.prepare(plainly(load_model, weights)[0])
            best = {name: evaluate(model, self.task, name, self.args, final=True) for name in results}
        summary |= {f"best_{k}": v for k, v in mean_scores(best).items() if k != "samples"}
        summary["best_step"] = self.state["best_step"]
        return summary | self._facts()

    def result_line(self, summary: dict) -> str:
        """The run's last words: its scores, on what, and of how many samples."""
        scores = ", ".join(f"{k} {summary[k]:.4g}" for k in SCORES if k in summary)
        units = "windows" if self.task.spec.kind == "text" else "examples"
        return (
            f"{self.out}: {scores} on {' and '.join(self._tests())} ({self.task.variant}, "
            f"{summary['test_samples']} {units}) after {self.total} steps"
        )

    # ---- evaluation

    def _tests(self) -> list[str]:
        return [name for name in self.task.held_out if name != "validation"]

    def _evaluate(self, names, final: bool = False) -> dict[str, dict]:
        """Scores on held-out sets, written down once all of them are there."""
        results = {name: evaluate(self.model, self.task, name, self.args, final) for name in names}
        for name, scores in results.items():
            self._log(step=self.step, phase="evaluation", split=name, **scores)
        return results

    def _evaluate_before(self):
        """Where the algorithm begins: on tasks the test scores too, since the first phase decides most of them."""
        names = self.task.held_out if self.task.spec.kind == "task" else ("validation",)
        results = self._evaluate(names)
        results.pop("validation")
        self.state["before"] = mean_scores(results)

    def _evaluate_on_the_way(self) -> dict:
        scores = self._evaluate(["validation"])["validation"]
        if self.phase != "supervised":
            self._keep_best(scores)
        return scores

    def _keep_best(self, scores: dict):
        metric = self.task.spec.metric
        score = -scores["perplexity"] if metric == "perplexity" else scores[metric]
        if score > self.state["best_score"]:
            self.state |= {"best_score": score, "best_step": self.step}
            self._write_folder("best", self._write_model)

    def _write_model(self, folder: str):
        save_model(self.model, os.path.join(folder, "model.safetensors"), step=self.step)

    # ---- writing down

    def _log(self, **row):
        try:
            with open(self.metrics_path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.metrics_path} could not be written ({error.strerror}); {self._kept()}") from error

    def _log_step(self, metrics: dict):
        state, seconds = self.state, time.perf_counter() - self.begun
        rate = state["tokens"] / seconds
        shown = {"loss": f"{metrics['loss']:.3f}", "tok/s": f"{rate:.0f}"}
        if "reward_mean" in metrics:
            shown["reward"] = f"{metrics['reward_mean']:.3f}"
        if "load_max" in metrics:
            shown["load"] = f"{metrics['load_min']:.2f}-{metrics['load_max']:.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.shown = ", ".join(f"{k} {v}" for k, v in shown.items())
        clipped = float(state["clipped"]) / max(1, state["updates"])
        state |= {"updates": 0, "clipped": 0}
        lr = self.optimizer.param_groups[0]["lr"]
        measured = {"seconds": round(seconds, 2), "tokens_per_second": round(rate, 1)}
        self._log(step=self.step, phase=self.phase, lr=lr, **metrics, clipped_share=clipped, **measured)

    def _check_finite(self, metrics: dict):
        broken = [
            f"{k} is {metrics[k]}" for k in ("loss", "grad_norm", "entropy") if not math.isfinite(metrics.get(k, 0))
        ]
        if not broken and not is_finite(self.model):
            broken = ["the weights are not finite"]
        if broken:
            raise UserError(
                f"{broken[0]} at step {self.step}: lower --lr (or --pretrain-lr) in a new run; {self._kept()}"
            )

    def _kept(self) -> str:
        return f"{self.out} keeps the last checkpoint" if find_checkpoint(self.out) else "nothing was saved"

    def _save(self):
        state = self.state
        state["optimizer"], state["clipped"] = self.optimizer.state_dict(), int(state["clipped"])
        state["metrics_bytes"], state["seconds"] = os.path.getsize(self.metrics_path), time.perf_counter() - self.begun

        def write(folder):
            self._write_model(folder)
            torch.save(state, os.path.join(folder, "state.pt"))

        self._write_folder("checkpoint", write)

    def _write_folder(self, name: str, write):
        try:
            replace_folder(os.path.join(self.out, name), write)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the {name} of step {self.step} could not be written ({error}): make room for {self.out}, then "
                "continue with --resume from the checkpoint before"
            ) from error

    def _facts(self) -> dict:
        """What a summary says besides its scores."""
        args, (parameters, active) = self.args, self.model.count_parameters()
        return {
            "parameters": parameters,
            "active_parameters": active,
            "algo": args.algo,
            "dataset": args.dataset,
            "data_variant": self.task.variant,
            "seed": args.seed,
            "steps": self.total,
            "seconds": round(self.seconds, 2),
            "tokens_per_second": round(self.state["tokens"] / self.seconds, 1),
        }

    # ---- the context in which it runs

    @contextlib.contextmanager
    def open(self):
        """One process a folder, Ctrl-C and SIGTERM that save first, a bar; metrics.jsonl as the checkpoint knew it."""
        with open(os.path.join(self.out, ".lock"), "w") as lock:
            lock_file(lock, self.out)
            with open(self.metrics_path, "ab") as file:
                if file.tell() < self.state["metrics_bytes"]:
                    raise UserError(
                        f"{self.metrics_path} is shorter than it was when the checkpoint was saved: put the run's own "
                        f"file back, or start a new run with --init {self.out}"
                    )
                file.truncate(self.state["metrics_bytes"])  # lines after the checkpoint will be written again
            read_metrics(self.out)  # better to hear of a spoilt line now than after the last step
            if self.state["best_step"] >= 0 and not find_checkpoint(self.out, "best"):
                raise UserError(f"{self.out}/best is gone, the weights of step {self.state['best_step']}: put it back")
            with (
                self._stops_politely(),
                Progress(total=self.total, initial=self.step, unit="step", desc="training", leave=True) as bar,
            ):
                self.bar = bar
                try:
                    yield
                except KeyboardInterrupt as stop:
                    bar.close()
                    again = f"python train.py --resume --out {shlex.quote(self.out)}"
                    say(f"\ninterrupted{stop}; continue with: {again}", sys.stderr)
                    raise

    @contextlib.contextmanager
    def _stops_politely(self):
        """The first Ctrl-C (or SIGTERM) ends the run after the current step, its state saved; a second one at once."""

        def handler(signum, frame):
            if self.stop_asked or self.stop_at_once:
                raise KeyboardInterrupt
            self.stop_asked = True
            with contextlib.suppress(OSError):  # print is not for handlers
                os.write(2, b"\nstopping after this step; Ctrl-C once more stops at once\n")

        try:
            previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread
            previous = {}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)


def plain_numbers(metrics: dict) -> dict:
    """Tensors as numbers, those of more than one element as lists."""
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in metrics.items()}


def lock_file(file, out: str):
    """One process a run folder."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock
        pass
    except OSError:
        raise UserError(f"{out} is in use by another process") from None


def _free_folder(name: str) -> str:
    """The first of NAME-1, NAME-2, ... that is not there, made at once: two runs that start together get one each."""
    for i in range(1, 10**9):
        with contextlib.suppress(FileExistsError):
            os.makedirs(f"{name}-{i}")
            return f"{name}-{i}"


def open_folder(args):
    """args.out becomes the run's folder: a new one, or with --resume the one that is there, if it is free."""
    if args.out and not args.resume and os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"{args.out} is not empty: continue its run with --resume, or name another folder with --out")
    try:
        args.out = args.out or _free_folder(os.path.join("runs", f"{args.algo}-{args.dataset}-seed{args.seed}"))
        os.makedirs(args.out, exist_ok=True)
        if not args.resume:
            write_json(os.path.join(args.out, "config.json"), {k: v for k, v in vars(args).items() if k != "resume"})
    except OSError as error:
        raise UserError(f"cannot write the run folder {args.out or 'runs'}: {error.strerror}") from error
