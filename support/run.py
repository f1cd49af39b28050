"""A run's folder and its state: what is written down, saved and evaluated; when is decided by the loops of train.py.

config.json  metrics.jsonl  summary.json  curves.png
checkpoint/model.safetensors  the last state: weights, optimizer, and the fields of `State`
best/model.safetensors        the weights with the best validation score since the algorithm began
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, field

from torch import Tensor
from tqdm import tqdm

from support.checkpoints import find_checkpoint, is_finite, load_model, save_checkpoint
from support.errors import UserError, as_user_error
from support.evaluation import evaluate, mean_scores
from support.optimizer import make_optimizer, restore

SCORES = "perplexity bits_per_byte rouge1 rouge2 rougeL exact_match f1 accuracy unigram_f1".split()


def write_json(path: str, value):
    with open(path + ".tmp", "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".tmp", path)


def read_metrics(out: str) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    path = os.path.join(out, "metrics.jsonl")
    try:
        with open(path) as file:
            return [json.loads(line) for line in file]
    except ValueError:
        raise UserError(f"{path} holds a line that is no row of metrics: put the run's own file back") from None


@dataclass
class State:
    """What a resumed run needs besides weights and optimizer; it travels in the checkpoint's header."""

    step: int = 0  # steps done, of both phases
    tokens: int = 0  # learned from
    seconds: float = 0.0
    metrics_bytes: int = 0  # length of metrics.jsonl
    updates: int = 0  # optimizer steps since the last line of metrics.jsonl ...
    clipped: int = 0  # ... and those whose gradient was clipped
    best_score: float | None = None  # validation score, higher is better
    best_step: int = -1
    before: dict = field(default_factory=dict)  # test scores where the algorithm began
    validation: dict = field(default_factory=dict)  # the last validation scores
    fingerprint: str = ""  # of the records that the run reads


class Run:
    """One run: its arguments, folder, state and progress bar.

    `phases` maps "supervised" and the algorithm to their numbers of steps. `phase` is the current one, `first` the
    step of the run at which it begins, `steps` its length.
    """

    def __init__(self, args, state: State, phases: dict[str, int], task, prepare):
        """prepare: puts a loaded model where it is to run."""
        self.args, self.out, self.state, self.phases, self.task = args, args.out, state, phases, task
        self.prepare, self.total = prepare, sum(phases.values())
        self.tests = [name for name in task.held_out if name != "validation"]
        self.begun, self.stop_asked, self.stop_at_once = time.perf_counter() - state.seconds, False, False
        self.metrics_path = os.path.join(self.out, "metrics.jsonl")
        with open(os.path.join(self.out, "config.json"), "rb") as file:
            self.id = hashlib.sha256(file.read()).hexdigest()[:16]

    # ---- steps

    def begin(self, phase: str, model, saved_optimizer: dict):
        """The next phase. -> its optimizer, new or as it was saved within the phase"""
        self.phase, self.model, self.steps = phase, model, self.phases[phase]
        self.first = 0 if phase == "supervised" else self.phases["supervised"]
        optimizer = make_optimizer(model, self.args.weight_decay, self.args.router_lr_factor)
        if self.state.step > self.first:
            restore(optimizer, model, saved_optimizer)
        return optimizer

    def steps_to_do(self):
        """The steps of this phase that are still to do, counted from its beginning."""
        return range(self.state.step - self.first, self.steps)

    def count_update(self, norms: dict) -> dict:
        self.state.updates += 1
        self.state.clipped = self.state.clipped + (norms["grad_norm"] > (self.args.clip_grad or math.inf))
        return norms

    def finish_step(self, tokens: int):
        self.state.step += 1
        self.state.tokens += tokens
        self.bar.update()

    def is_due(self, every: int) -> bool:
        """Whether the step just done is one in `every`, or the run's last."""
        return self.state.step % every == 0 or self.state.step == self.total

    # ---- evaluation

    def evaluate(self, names, final: bool = False) -> dict[str, dict]:
        """Scores on held-out sets, written down once all of them are there."""
        results = {name: evaluate(self.model, self.task, name, self.args, final) for name in names}
        for name, scores in results.items():
            self.log_row(step=self.state.step, phase="evaluation", split=name, **scores)
        return results

    def evaluate_before(self):
        """Where the algorithm begins: on tasks the test scores too, since the first phase decides most of them."""
        if self.phase != "supervised" and self.state.step == self.first:
            results = self.evaluate(self.task.held_out if self.task.spec.kind == "task" else ["validation"])
            results.pop("validation")
            self.state.before = mean_scores(results)

    def evaluate_if_due(self):
        """Validation scores; the best weights since the algorithm began are kept."""
        step, state = self.state.step, self.state
        if not self.is_due(self.args.eval_every) or self.phase == "supervised" and step == self.steps:
            return
        state.validation = self.evaluate(["validation"])["validation"]
        metric = self.task.spec.metric
        score = -state.validation["perplexity"] if metric == "perplexity" else state.validation[metric]
        if self.phase != "supervised" and (state.best_score is None or score > state.best_score):
            state.best_score, state.best_step = score, step
            save_checkpoint(os.path.join(self.out, "best", "model.safetensors"), self.model, step=step, run=self.id)

    # ---- writing down

    def log_row(self, **row):
        try:
            with open(self.metrics_path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.metrics_path} could not be written ({error.strerror}); {self._kept()}") from error

    def log(self, metrics: dict, lr: float):
        """A step's metrics as a line of metrics.jsonl and on the bar."""
        state, seconds = self.state, time.perf_counter() - self.begun
        metrics = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self.check_finite(metrics)
        speed = {"seconds": round(seconds, 2), "tokens_per_second": round(state.tokens / seconds, 1)}
        shown = {"loss": f"{metrics['loss']:.3f}", "tok/s": f"{state.tokens / seconds:.0f}"}
        shown |= {"reward": f"{metrics['reward_mean']:.3f}"} if "reward_mean" in metrics else {}
        self.bar.set_postfix(shown, refresh=False)
        clipped = float(state.clipped) / max(1, state.updates)
        state.updates = state.clipped = 0
        self.log_row(step=state.step, phase=self.phase, lr=lr, **metrics, clipped_share=clipped, **speed)

    def check_finite(self, metrics: dict):
        """Broken numbers end a run before they are saved."""
        broken = [f"{k} is {metrics[k]}" for k in ("loss", "grad_norm") if not math.isfinite(metrics.get(k, 0))]
        if broken := broken or ["the weights are not finite"] * (not is_finite(self.model)):
            lower = "lower --lr (or --pretrain-lr) in a new run"
            raise UserError(f"{broken[0]} at step {self.state.step}: {lower}; {self._kept()}")

    def _kept(self) -> str:
        return f"{self.out} keeps the last checkpoint" if find_checkpoint(self.out) else "nothing was saved"

    def save_if_due(self, metrics: dict, optimizer):
        """The checkpoint of a step that is due, or after which a stop was asked for, which then follows."""
        stopping = self.stop_asked
        if stopping or self.is_due(self.args.checkpoint_every):
            self.check_finite({k: v.item() for k, v in metrics.items() if isinstance(v, Tensor) and v.numel() == 1})
            state = self.state
            state.clipped, state.seconds = int(state.clipped), time.perf_counter() - self.begun
            state.metrics_bytes = os.path.getsize(self.metrics_path)
            path = os.path.join(self.out, "checkpoint", "model.safetensors")
            save_checkpoint(path, self.model, optimizer, run=self.id, **asdict(state))
        if stopping:
            raise KeyboardInterrupt(f" at step {self.state.step} of {self.total}, state saved")

    def finish(self) -> dict:
        """Final scores of the last and of the best weights -> summary.json."""
        self.stop_at_once, state, args = True, self.state, self.args  # all steps are saved: nothing to wait for
        seconds = time.perf_counter() - self.begun
        last = best = self.evaluate(self.tests, final=True)
        if state.best_step < state.step:
            model = self.prepare(self.load_best(state.best_step))
            best = {name: evaluate(model, self.task, name, args, final=True) for name in self.tests}
        summary = dict(mean_scores(last))
        summary["test_samples"] = summary.pop("samples")
        summary |= {f"validation_{k}": v for k, v in state.validation.items()}
        summary |= {f"before_{k}": v for k, v in state.before.items()}
        summary |= {f"best_{k}": v for k, v in mean_scores(best).items() if k != "samples"}
        parameters, active = self.model.count_parameters()
        summary |= {"best_step": state.best_step, "parameters": parameters, "active_parameters": active}
        summary |= {"algo": args.algo, "dataset": args.dataset, "data_variant": self.task.variant, "seed": args.seed}
        speed = round(state.tokens / seconds, 1)
        summary |= {"steps": self.total, "seconds": round(seconds, 2), "tokens_per_second": speed}
        write_json(os.path.join(self.out, "summary.json"), summary)
        return summary

    def load_best(self, step: int | None = None):
        """This run's best weights, of any step where none is given: a killed run's may be newer than its checkpoint."""
        if path := find_checkpoint(self.out, "best"):
            with as_user_error():
                model, kept = load_model(path)
            if kept.get("run") == self.id and step in (None, kept.get("step")):
                return model
        wanted = f"this run's weights of step {self.state.best_step}"
        raise UserError(f"{self.out}/best does not hold {wanted}: put them back and resume")

    def result_line(self, summary: dict) -> str:
        """The run's last words: its scores, on what, of how many samples, and what they were before the algorithm."""
        scores = []
        for name in (name for name in SCORES if name in summary):
            before = f" (before: {summary[f'before_{name}']:.4g})" if f"before_{name}" in summary else ""
            scores.append(f"{name} {summary[name]:.4g}{before}")
        units = "windows" if self.task.spec.kind == "text" else "examples"
        samples = f"{' and '.join(self.tests)} ({self.task.variant}, {summary['test_samples']} {units})"
        return f"{self.out}: {', '.join(scores)} on {samples} after {self.total} steps"

    # ---- the context in which it runs

    @contextlib.contextmanager
    def open(self):
        """One process a folder, Ctrl-C and SIGTERM that save first, a bar; metrics.jsonl as the checkpoint knew it."""
        with open(os.path.join(self.out, ".lock"), "w") as lock:
            lock_file(lock, self.out)
            with open(self.metrics_path, "ab") as file:
                if file.tell() < self.state.metrics_bytes:
                    shorter = f"{self.metrics_path} is shorter than it was when the checkpoint was saved"
                    advice = f"put the run's own file back, or start a new run with --init {self.out}"
                    raise UserError(f"{shorter}: {advice}")
                file.truncate(self.state.metrics_bytes)  # lines after the checkpoint will be written again
            if self.state.best_step >= 0:
                self.load_best()  # better to hear now that it is gone than after the last step
            often = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines in a file
            bar = tqdm(total=self.total, initial=self.state.step, desc="training", mininterval=often, delay=0.1)
            with self._stops_politely(), bar as self.bar:
                try:
                    yield
                except KeyboardInterrupt as stop:
                    self.bar.close()
                    again = f"python train.py --resume --out {shlex.quote(self.out)}"
                    print(f"\ninterrupted{stop}; continue with: {again}", file=sys.stderr)
                    raise

    @contextlib.contextmanager
    def _stops_politely(self):
        """The first Ctrl-C (or SIGTERM) ends the run after the current step, its state saved; a second one at once."""

        def handler(signum, frame):
            if self.stop_asked or self.stop_at_once:
                raise KeyboardInterrupt
            self.stop_asked = True
            os.write(2, b"\nstopping after this step; Ctrl-C once more stops at once\n")  # print is not for handlers

        previous = {}
        with contextlib.suppress(ValueError):  # only the main thread may catch signals
            previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)


def lock_file(file, out: str):
    """One process a run folder. File systems without locks, as some clusters' homes, go without one."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out} is in use by another process") from None
    except (ImportError, OSError):  # Windows; a file system that cannot lock
        pass


def open_folder(args):
    """args.out becomes the run's folder: a new one, or with --resume the one that is there."""
    if args.out and not args.resume and os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"{args.out} is not empty: continue its run with --resume, or name another folder with --out")
    try:
        args.out = args.out or _free_folder(os.path.join("runs", f"{args.algo}-{args.dataset}-seed{args.seed}"))
        os.makedirs(args.out, exist_ok=True)
        if not args.resume:
            write_json(os.path.join(args.out, "config.json"), {k: v for k, v in vars(args).items() if k != "resume"})
    except OSError as error:
        raise UserError(f"cannot write the run folder {args.out or 'runs'}: {error.strerror}") from error


def _free_folder(name: str) -> str:
    """The first of NAME-1, NAME-2, ... that is not there, made at once: two runs that start together get one each."""
    for i in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            os.makedirs(f"{name}-{i}")
            return f"{name}-{i}"


def load_state(args, metadata: dict) -> State:
    """The state in the header of a run's checkpoint."""
    if metadata.keys() != State().__dict__.keys() | {"run"}:
        raise UserError(f"{args.out}'s checkpoint is of an earlier version: start a new run with --init {args.out}")
    return State(**{name: value for name, value in metadata.items() if name != "run"})
