"""The programs as a user runs them: every algorithm, the real data sets, the demo, and what stops a newcomer."""

import json
import math
import os
import shlex
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import metrics_of, summary_of

import data
import train
from moe import SIZES
from support import demo
from support.checkpoints import load_model

ROOT = Path(__file__).parents[1]
REAL = ROOT / ".." / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data (the real data sets) is not there")
MICRO = dict(n_layer=4, n_head=2, n_embd=32, context=48)
TEXT = ("dense", "lm", "erl")
# As little as a run can do: both phases, and an evaluation, a checkpoint and minibatches in each.
LITTLE = (
    "--steps 2 --pretrain-steps 2 --batch-size 2 --prompts-per-step 2 --group-size 2 --minibatches 2 "
    "--eval-samples 2 --test-samples 2 --max-new-tokens 4"
)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A folder of its own, a "tiny" that trains in milliseconds, and the beginning of each split of pydocs."""
    pydocs = data.DATASETS["pydocs"]
    texts = {split: pydocs.text(split)[:2000] for split in data.SPLITS}
    monkeypatch.setitem(data.DATASETS, "pydocs", replace(pydocs, text=texts.get))
    monkeypatch.setitem(SIZES, "tiny", MICRO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(flags, out="r"):
    """train.py in this process; a flag given twice counts as given last. -> summary.json"""
    assert train.main([*shlex.split(LITTLE), *shlex.split(flags), "--out", out]) == 0
    return summary_of(out)


def command(program, flags, cwd, **environment):
    how = dict(cwd=cwd, capture_output=True, text=True, timeout=600)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, str(ROOT / program), *shlex.split(flags)], env=environment, **how)


def check_folder(algo, dataset, out="r"):
    """What is promised of a run folder."""
    summary, config, rows = summary_of(out), json.loads(Path(out, "config.json").read_text()), metrics_of(out)
    metric = data.get_dataset(dataset).metric
    for name in (metric, f"best_{metric}", f"validation_{metric}"):
        assert math.isfinite(summary[name])
    assert (summary["algo"], summary["dataset"], summary["seed"], summary["steps"]) == (algo, dataset, 0, 4)
    assert summary["seconds"] > 0 and summary["tokens_per_second"] > 0 and summary["test_samples"] == 2
    assert 2 < summary["best_step"] <= 4 and config["algo"] == algo
    assert (summary["parameters"] == summary["active_parameters"]) == (algo == "dense")
    weights = load_file(Path(out, "checkpoint", "model.safetensors"))
    own = [w for name, w in weights.items() if not name.startswith("optimizer.")]
    assert sum(w.numel() for w in own) == summary["parameters"]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows) and rows[-1]["step"] == 4
    assert all(math.isfinite(row[k]) for row in rows if row["phase"] == algo for k in ("loss", "lr", "seconds"))
    width, height = struct.unpack(">II", Path(out, "curves.png").read_bytes()[16:24])
    assert 300 <= width <= 10_000 and 200 <= height <= 2_000
    left = {p.name for p in Path(out).iterdir()} - {".lock"}
    assert left == {"best", "checkpoint", "config.json", "curves.png", "metrics.jsonl", "summary.json"}
    return [row for row in rows if row["phase"] == algo][-1]


ALGORITHMS = [(algo, "pydocs", "") for algo in TEXT] + [(algo, "addition", "") for algo in train.METHODS]
VARIANTS = [
    ("erl", "pydocs", "--wpl --advantage log --erl-grad all --inner-epochs 2 --jitter 0.01 --n-shared-expert 1"),
    ("erl", "pydocs", "--ratio uniform --gate prob --dtype bfloat16"),
    ("erl", "pydocs", "--draw router --gate straight --freeze-router --erl-grad all"),
    ("erpo", "addition", "--dtype bfloat16 --replay r2 --answer-balance-coef 0.1 --top-p 0.9"),
    ("grpo", "pydocs", "--rollout-dtype bfloat16 --mismatch icepop"),
    ("rais", "countdown", "--rollout-dtype bfloat16 --replay r3 --mismatch tis --mismatch-threshold 3"),
]


@pytest.mark.parametrize(("algo", "dataset", "flags"), ALGORITHMS + VARIANTS)
def test_every_algorithm(algo, dataset, flags, here):
    run(f"--algo {algo} --dataset {dataset} {flags}")
    last = check_folder(algo, dataset)
    if algo in train.METHODS:
        assert {"reward_mean", "accuracy", "response_length", "cut_responses", "silent_groups", "entropy"} <= set(last)
        engine = {"engine_gap", "engine_kl", "engine_moved_tokens", "engine_moved_decisions"}
        assert engine & set(last) == (engine if "bfloat16" in flags else set())
    elif algo != "dense":
        assert 0 <= last["load_min"] <= 1 / 8 <= last["load_max"] <= 1
    if algo == "erl" and not flags:
        assert last["ratio_mean"] == 1.0 and last["clip_share"] == 0.0 and last["perturbed_share"] > 0


@pytest.fixture(scope="session")
def slices(tmp_path_factory):
    """The first records of the real files, so that a run reads, shuffles and tokenises little."""
    folder = tmp_path_factory.mktemp("slices")
    for spec in data.DATASETS.values():
        files = {f if (REAL / f).exists() else f.replace(".raw", ".tokens") for f in filter(None, spec.files.values())}
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            with open(REAL / file, encoding="utf-8", newline="") as lines:
                (folder / file).write_text("".join(line for line, _ in zip(lines, range(60), strict=False)))
    (folder / "tiktoken-cache").symlink_to((REAL / "tiktoken-cache").resolve())
    return folder


@needs_real
@pytest.mark.parametrize(
    ("dataset", "algo"), [("wikitext2", "erl"), ("samsum", "lm"), ("xsum", "erl"), ("squad", "grpo"), ("gsm8k", "rais")]
)
def test_real_data(dataset, algo, slices, here, monkeypatch):
    """Through --data-dir, with GPT-2's tokenizer; no network is touched."""
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a connection"))
    monkeypatch.setitem(SIZES, "tiny", MICRO | {"context": 256})
    run(f"--algo {algo} --dataset {dataset} --data-dir {slices} --beams 2")
    check_folder(algo, dataset)


def test_init_from_a_run_a_file_and_a_folder_of_gpt2(here):
    run("--algo dense --dataset pydocs", "dense")
    assert run("--algo lm --pretrain-steps 0 --init dense")["steps"] == 2
    run("--algo lm --pretrain-steps 0 --init dense/best/model.safetensors --n-expert 4", "four")
    assert load_model("four/checkpoint/model.safetensors")[0].config.n_expert == 4
    with safe_open("dense/best/model.safetensors", "pt") as file:
        header, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file({n: w.half() for n, w in weights.items()}, "half.safetensors", metadata=header)
    save_file({n: w * torch.nan for n, w in weights.items()}, "nan.safetensors", metadata=header)
    run("--algo lm --init half.safetensors --pretrain-steps 0", "half")
    assert {w.dtype for w in load_file("half/checkpoint/model.safetensors").values()} == {torch.float32}
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=257, n_positions=48, n_embd=32, n_layer=3, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained("own")
    run("--algo lm --init own --pretrain-steps 0", "from_gpt2")
    assert json.loads(Path("from_gpt2/config.json").read_text())["model"] == "custom"
    assert train.main(["--resume", "--out", "from_gpt2"]) == 0
    for flags, says in (
        ("--init four --algo dense --pretrain-steps 0", "has experts"),
        ("--init four --algo lm --pretrain-steps 0", "--n-expert 4"),
        ("--init nothing --algo lm", "there is no run"),
        ("--init dense --tokenizer gpt2 --algo lm --data-dir .", "vocabulary"),
        ("--init nan.safetensors --algo lm", "not finite"),
    ):
        done = command("train.py", f"{LITTLE} {flags} --out x", here)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_loss_that_diverges_ends_the_run(here, capsys):
    flags = "--algo lm --dataset pydocs --lr 1e30 --clip-grad 0 --pretrain-steps 0 --steps 30 --out r"
    assert train.main([*shlex.split(LITTLE), *shlex.split(flags)]) == 2
    assert "lower --lr" in capsys.readouterr().err


def test_compile(here, monkeypatch, capsys):
    """The parts of a step are compiled and the run ends as others do; without a compiler it is one sentence."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend="aot_eager"))
    run("--algo erl --dataset pydocs --compile")
    environment = {"PATH": "", "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    done = command("train.py", f"{LITTLE} --algo lm --dataset pydocs --compile --out x", here, **environment)
    assert done.returncode == 2 and "--compile needs" in done.stderr.splitlines()[-1], done.stderr[-2000:]


def test_the_commands_in_a_notebook_and_on_a_poor_terminal(tmp_path):
    """Nothing is patched here: train, then rank; with the backend that notebooks set, in a terminal of ASCII."""
    environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii"}
    flags = f"--algo erl --dataset pydocs {LITTLE} --test-samples 0 --out r"
    done = command("train.py", flags, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "2,705,024 parameters, 861,056 active" in done.stderr
    summary = summary_of(tmp_path / "r")
    assert 50 < summary["perplexity"] < 500  # four steps from a uniform guess over 257
    assert f", {summary['test_samples']} windows) after 4 steps" in done.stdout
    done = command("eval_routing.py", "r --samples 1 --decisions 2", tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    routing = json.loads((tmp_path / "r" / "routing.json").read_text())
    wanted = "mrr hit1 chance_mrr chance_hit1 samples original_score perturbed_score robustness top1_histogram"
    assert {*wanted.split(), "top1_above_0.9", "expert_load", "regret"} <= set(routing)
    assert list(map(float, routing["robustness"])) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_while_a_program_starts_is_no_traceback(tmp_path):
    """While PyTorch is imported: a module in its place sends the signal."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = command("train.py", "--algo lm", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode in (130, -signal.SIGINT) and "Traceback" not in done.stderr


def test_the_demo(here, monkeypatch, capsys):
    """Its four runs, the table and a verdict that is computed from the control."""
    few, real = "--steps 2 --eval-samples 2 --test-samples 2".split(), demo.random_expert
    seen = []
    monkeypatch.setattr(demo, "random_expert", lambda *given: seen.append(0) or real(*given))
    demo.demo(train.run, lambda flags: train.parse([*flags, *few]))
    out = capsys.readouterr().out
    assert len(seen) == 2 and Path("runs/demo/demo.png").stat().st_size > 10_000
    rows = {arm: summary_of(f"runs/demo/{arm}") for arm in ("dense", "MoE", "ERL", "control")}
    assert all(f"{row['perplexity']:.3f}" in out for row in rows.values()) and "Verdict: ERL's ranks are" in out
    for ours, control, says in (0.5, 0.45, "within"), (0.5, 0.4, "above"), (0.3, 0.4, "below"):
        found = {"MoE": 0.1, "ERL": ours, "control": control}
        rows = {name: {"mrr": mrr, "mrr_standard_error": 0.03} for name, mrr in found.items()}
        assert says in demo.verdict(rows)  # within: a difference below 1.96 * 0.03 * sqrt(2) = 0.083


def test_without_a_network(tmp_path):
    """One sentence that says what works without."""
    offline = dict.fromkeys(("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    offline |= {"HF_HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    done = command("train.py", f"--algo erl --dataset wikitext2 {LITTLE}", tmp_path, **offline)
    assert done.returncode == 2 and "--data-dir" in done.stderr and done.stderr.count("\n") == 1
    done = command("train.py", f"--algo lm --init gpt2 --data-dir {tmp_path} {LITTLE}", tmp_path, **offline)
    assert done.returncode == 2 and "Traceback" not in done.stderr
