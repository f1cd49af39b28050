"""The programs as a user runs them: every algorithm on every data set, what a run folder holds, and bad input."""

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import bare, rows_of, summary_of

import data
import eval_routing
import train
from erl import explore
from moe import SIZES
from support import command_line, errors, run_folder
from support.checkpoints import load_model, save_model
from support.run_folder import find_checkpoint, load_state

ROOT = Path(__file__).parents[1]
REAL = ROOT / ".." / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data (the real data sets) is not there")
MICRO = dict(n_layer=4, n_head=2, n_embd=32, context=48)
ALGORITHMS = command_line.TEXT + tuple(train.METHODS)
# As little as a run can do: both phases, and an evaluation, a checkpoint and minibatches in each.
LITTLE = (
    "--steps 2 --pretrain-steps 2 --batch-size 2 --prompts-per-step 2 --group-size 2 --minibatches 2 "
    "--eval-samples 2 --test-samples 2 --max-new-tokens 4"
)
TASKS = [name for name, spec in data.DATASETS.items() if spec.kind == "task"]
METRICS = {
    "pydocs": ["perplexity", "bits_per_byte"],
    "wikitext2": ["perplexity", "bits_per_byte"],
    "samsum": ["rouge1", "rouge2", "rougeL"],
    "xsum": ["rouge1", "rouge2", "rougeL"],
    "squad": ["exact_match", "f1"],
    "gsm8k": ["accuracy"],
    "deepscaler": ["accuracy"],
    "addition": ["accuracy"],
    "countdown": ["accuracy"],
}


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A folder of its own, a "tiny" that trains in milliseconds, and the beginning of each split of pydocs."""
    texts = {split: data._pydocs(split)[:2000] for split in data.SPLITS}
    monkeypatch.setattr(data, "_pydocs", texts.get)
    monkeypatch.setitem(SIZES, "tiny", MICRO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(flags, out="r", little=LITTLE):
    """train.py in this process; a flag given twice counts as given last; a text is tested whole. -> summary.json"""
    tested = [] if any(f"--dataset {name}" in flags for name in TASKS) else ["--test-samples", "0"]
    assert train.main([*shlex.split(little), *tested, *shlex.split(flags), "--out", out]) == 0
    return summary_of(out)


def command(program, flags, cwd, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / program), *shlex.split(flags)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def png_size(path):
    head = Path(path).read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def check_folder(algo, dataset, out="r", steps=4):
    """What SPEC promises of a run folder."""
    summary, config = summary_of(out), json.loads(Path(out, "config.json").read_text())
    for name in METRICS[dataset]:
        assert math.isfinite(summary[name]) and math.isfinite(summary[f"best_{name}"])
        if name != "bits_per_byte" or not config["eval_samples"]:  # of whole splits alone
            assert math.isfinite(summary[f"validation_{name}"])
        assert 0 <= summary[name] <= 1 or dataset in ("pydocs", "wikitext2")
    begun = config["pretrain_steps"]
    assert begun < summary["best_step"] <= steps
    assert summary["test_samples"] > 0 and summary["validation_samples"] > 0
    best, _ = load_model(str(Path(out, "best", "model.safetensors")))
    assert best.count_parameters()[0] == summary["parameters"]
    assert summary["algo"] == algo and summary["dataset"] == dataset and summary["seed"] == 0
    assert summary["steps"] == steps
    assert summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert summary["parameters"] >= summary["active_parameters"] > 0
    assert (summary["parameters"] == summary["active_parameters"]) == (algo == "dense")
    weights = load_file(Path(out, "checkpoint", "model.safetensors"))
    assert sum(w.numel() for w in weights.values()) == summary["parameters"]
    assert all(w.isfinite().all() for w in weights.values())
    assert config["algo"] == algo and config["dataset"] == dataset and config["seed"] == 0
    rows = rows_of(out)
    assert all(isinstance(row["step"], int) and row["phase"] in ("supervised", algo, "evaluation") for row in rows)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert rows[-1]["step"] == steps
    trained = [row for row in rows if row["phase"] == algo]
    assert all(math.isfinite(row[k]) for row in trained for k in ("loss", "lr", "tokens_per_second"))
    width, height = png_size(Path(out, "curves.png"))
    assert 300 <= width <= 10_000 and 200 <= height <= 2_000
    left = {p.name for p in Path(out).iterdir()} - {".lock"}
    assert left == {"best", "checkpoint", "config.json", "curves.png", "metrics.jsonl", "summary.json"}
    return summary


# ----------------------------------------------------------------------------------- every algorithm, every data set


@pytest.mark.parametrize("dataset", ["pydocs", "addition", "countdown"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_on_every_set_that_needs_no_files(algo, dataset, here):
    run(f"--algo {algo} --dataset {dataset}")
    check_folder(algo, dataset)
    last = [row for row in rows_of() if row["phase"] == algo][-1]
    if algo != "dense" and algo in command_line.TEXT:
        assert 0 <= last["load_min"] <= 1 / 8 <= last["load_max"] <= 1
    if algo == "erl":
        assert last["ratio_mean"] == 1.0 and last["clip_share"] == 0.0
        assert last["perturbed_share"] > 0 and last["advantage_positive"] + last["advantage_negative"] <= 1 + 1e-6
    if algo in train.METHODS:
        assert ("ratio_neg_log_later" in last) == (last["updates"] > 1)
        assert {"reward_mean", "reward_std", "accuracy", "response_length", "silent_groups", "entropy"} <= set(last)
        assert 1 <= last["response_length"] <= 4


@pytest.fixture(scope="session")
def slices(tmp_path_factory):
    """The first records of the real files, so that a run reads, shuffles and tokenises little."""
    folder = tmp_path_factory.mktemp("slices")
    for spec in data.DATASETS.values():
        files = {f if (REAL / f).exists() else f.replace(".raw", ".tokens") for f in filter(None, spec.files.values())}
        for file in files:
            to = folder / file
            to.parent.mkdir(exist_ok=True)
            lines = (REAL / file).read_text(encoding="utf-8").split("\n")[:60]
            to.write_text("\n".join(lines), encoding="utf-8")
    (folder / "tiktoken-cache").symlink_to((REAL / "tiktoken-cache").resolve())
    return folder


PAIRS = [
    ("wikitext2", "erl"),
    ("wikitext2", "rais"),
    ("samsum", "erl"),
    ("samsum", "grpo"),
    ("xsum", "lm"),
    ("xsum", "gmpo"),
    ("squad", "dense"),
    ("squad", "erpo"),
    ("gsm8k", "erpo"),
    ("gsm8k", "gspo"),
    ("deepscaler", "erl"),
    ("deepscaler", "rais"),
]


@needs_real
@pytest.mark.parametrize(("dataset", "algo"), PAIRS)
def test_real_data(dataset, algo, slices, here, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    run(f"--algo {algo} --dataset {dataset} --data-dir {slices} --batch-size 1")
    summary = check_folder(algo, dataset)
    assert summary["parameters"] > 50257 * 32  # GPT-2's words
    if dataset == "deepscaler":
        names = ("math500", "aime24", "aime25", "minerva", "olympiad")
        mean = sum(summary[f"accuracy_{name}"] for name in names) / 5
        assert summary["accuracy"] == pytest.approx(mean)


# ------------------------------------------------------------------------------------------------ the flags, one by one


@pytest.mark.parametrize(
    "flags",
    [
        "--algo erl --wpl",
        "--algo erl --advantage log",
        "--algo erl --erl-grad all",
        "--algo erl --wpl --erl-grad all",
        "--algo erl --top-k 2 --alpha 1",
        "--algo erl --n-perturb 1 --delta 0",
        "--algo erl --gate prob",
        "--algo erl --n-shared-expert 1",
        "--algo erl --expert-capacity 4",
        "--algo erl --gate straight",
        "--algo erl --jitter 0.01 --balance-coef 0 --z-coef 0 --clip-grad 0",
        "--algo erl --freeze-router --erl-grad all",
        "--algo erl --inner-epochs 2 --router-lr-factor 3",
        "--algo erl --moe-every 1 --n-expert 3",
        "--algo erl --dataset addition --wpl",
        "--algo lm --gate prob --top-k 2 --n-shared-expert 1",
        "--algo grpo --replay routing",
        "--algo erpo --replay routing --entropy-reward absolute",
        "--algo erpo --entropy-reward none",
        "--algo erpo --entropy-alpha 1",
        "--algo erpo --answer-balance-coef 0.01 --freeze-router",
        "--algo cispo --replay routing",
        "--algo rais --shift-base gspo",
        "--algo rais --shift-base grpo --shift-floor 0.5 --replay routing",
        "--algo gspo --expert-capacity 4",
        "--algo gmpo --gate prob --n-shared-expert 1",
        "--algo grpo --temperature 0.7 --top-p 0.7 --beams 2",
        "--algo grpo --clip-low 0.1 --clip-high 0.5 --minibatches 1",
        "--algo erpo --top-k 1 --moe-every 4",
        "--algo dense --pretrain-steps 0 --steps 1",
        "--algo grpo --pretrain-steps 0 --steps 1",
    ],
)
def test_variants(flags, here):
    if "--dataset" not in flags and flags.split()[1] in train.METHODS:
        flags += " --dataset addition"
    run(flags)
    args = train.parse(shlex.split(f"{LITTLE} {flags}"))
    summary = check_folder(args.algo, args.dataset, steps=args.steps + args.pretrain_steps)
    if "--n-shared-expert 1" in flags:
        plain = run(flags.replace("--n-shared-expert 1", ""), "plain")
        assert summary["active_parameters"] > plain["active_parameters"]


def test_wpl_and_log_advantages_do_something(here):
    norms = {}
    for i, flags in enumerate(("", "--wpl", "--advantage log", "--alpha 0.1", "--delta 5")):
        run(f"--algo erl --pretrain-steps 0 --steps 3 --lr 0.01 {flags}", f"r{i}")
        (row,) = [row for row in rows_of(f"r{i}") if row["phase"] == "erl"]
        norms[flags] = row["router_grad_norm"]
        assert ("perturbed_lm_loss" in row) == (flags == "--wpl")
    assert len(set(norms.values())) == 5


def test_inner_epochs_move_the_ratio_and_let_the_clip_act(here):
    run("--algo erl --inner-epochs 3 --pretrain-steps 0 --steps 6 --lr 0.05 --advantage log --delta 5")
    last = [row for row in rows_of() if row["phase"] == "erl"][-1]
    assert last["ratio_mean"] != 1.0 and last["clip_share"] > 0


@pytest.mark.parametrize("algo", ["erl", "rais"])
def test_bfloat16(algo, here):
    """Every forward sees the weights as they are now: autocast can keep copies of them for too long."""
    flags = f"--algo {algo} --dataset pydocs --pretrain-lr 0.01"
    run(f"{flags} --dtype bfloat16")
    check_folder(algo, "pydocs")
    run(flags, "full")
    half, full = rows_of()[-1]["perplexity"], rows_of("full")[-1]["perplexity"]
    assert half != full and half == pytest.approx(full, rel=0.02) and full < 200
    weights = load_file("r/checkpoint/model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_compile(here, monkeypatch):
    """Captured as graphs the parts of the forward compute the same; writing machine code takes a minute: left out."""
    compiled = []
    real = torch.compile

    def capture(part):
        compiled.append(part.__name__)
        return real(part, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", capture)
    flags = "--algo lm --pretrain-steps 0 --steps 3"
    run(f"{flags} --compile")
    run(flags, "plain")
    assert {"stem", "branch"} <= set(compiled)
    losses = [[row["loss"] for row in rows_of(out)] for out in ("r", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) >= 4


def test_the_seed_decides_everything(here):
    weights = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(f"--algo grpo --dataset addition --seed {seed}", out)
        weights.append(Path(out, "checkpoint", "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


# ----------------------------------------------------------------------------------------------------------- --init


def test_init_from_a_run_and_from_its_file(here):
    dense = run("--algo dense --eval-samples 0", "dense")
    loss = [row["loss"] for row in rows_of("dense") if row["phase"] == "evaluation"][-2]  # validation, whole
    for source in ("dense", "dense/checkpoint/model.safetensors"):
        shutil.rmtree("r", ignore_errors=True)
        run(f"--algo erl --init {source} --pretrain-steps 0 --eval-samples 0")
        check_folder("erl", "pydocs", steps=2)
        first = rows_of()[0]
        assert first["phase"] == "evaluation" and first["step"] == 0
        assert first["loss"] == pytest.approx(loss, abs=1e-5)  # upcycled it computes what its parent does
    again = run("--algo erl --init r --pretrain-steps 0", "again")  # a MoE goes on as it is
    assert again["parameters"] > dense["parameters"]
    first, last = rows_of("again")[0]["loss"], rows_of("r")[-2]["loss"]
    assert rows_of("r")[-2]["split"] == "validation"
    assert first == pytest.approx(last, rel=0.2)
    run("--algo grpo --init dense --pretrain-steps 1 --top-k 2", "rl")
    check_folder("grpo", "pydocs", "rl", steps=3)


def test_init_from_a_folder_of_gpt2_weights(here):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=48, n_embd=32, n_layer=4, n_head=2)).eval()
    gpt2.save_pretrained("gpt2-folder")
    run("--algo erl --init gpt2-folder --pretrain-steps 0 --eval-samples 0")
    check_folder("erl", "pydocs", steps=2)
    tokenizer = data.load_tokenizer("bytes")
    text, nll = data.load_text("pydocs", "validation", tokenizer).tokens, []
    with torch.no_grad():
        for start in range(0, len(text) - 1, 48):
            window = torch.tensor(text[start : start + 49].tolist())[None]
            log_probs = gpt2(window[:, :-1]).logits.log_softmax(-1)
            nll += log_probs.gather(-1, window[:, 1:, None]).flatten().tolist()
    assert rows_of()[0]["loss"] == pytest.approx(-sum(nll) / len(nll), rel=1e-5)


def test_a_run_whose_size_has_no_name_goes_on(here):
    """Three layers of width 32: config.json says "custom", which --model does not know."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=48, n_embd=32, n_layer=3, n_head=2)).save_pretrained("own")
    run("--algo lm --init own --pretrain-steps 0 --eval-samples 2 --checkpoint-every 1")
    assert json.loads(Path("r/config.json").read_text())["model"] == "custom"
    whole = Path("r/metrics.jsonl").read_text()
    assert train.main(["--resume", "--out", "r"]) == 0 and Path("r/metrics.jsonl").read_text() == whole


# ------------------------------------------------------------------------------------------------- the real commands


def test_the_commands(tmp_path):
    """Train on the whole embedded text, then rank the routes; nothing is patched here."""
    done = command("train.py", f"--algo erl --dataset pydocs {LITTLE} --test-samples 0 --out r", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("erl on pydocs: 2 supervised steps, then 2 steps at learning rate 0.0003, seed 0")
    assert "2,705,024 parameters, 861,056 active" in done.stderr
    summary = check_folder("erl", "pydocs", tmp_path / "r")
    assert 50 < summary["perplexity"] < 500  # four steps from a uniform guess over 257
    assert summary["bits_per_byte"] == pytest.approx(math.log2(summary["perplexity"]), rel=0.01)
    assert summary["test_samples"] > 100 and f", {summary['test_samples']} windows) after 4 steps" in done.stdout
    done = command("eval_routing.py", "r --samples 1 --compare r", tmp_path)
    assert done.returncode == 0, done.stderr
    routing = json.loads((tmp_path / "r" / "routing.json").read_text())
    wanted = {
        "mrr",
        "hit1",
        "chance_mrr",
        "chance_hit1",
        "samples",
        "original_score",
        "perturbed_score",
        "robustness",
        "top1_histogram",
        "top1_above_0.9",
        "expert_load",
    }
    assert wanted <= set(routing) and routing["samples"] == 1
    assert list(map(float, routing["robustness"])) == [0, 0.25, 0.5, 0.75, 1]
    pictures = list((tmp_path / "r").glob("routing*.png"))
    assert pictures and all(min(png_size(p)) > 100 for p in pictures)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("moment", "program"),
    [
        ("torch", "train.py --algo lm --out r"),
        ("torch.nn", "train.py --algo lm --out r"),
        ("tqdm", "train.py --algo lm --out r"),
        ("torch", "eval_routing.py r"),
        ("tqdm", "eval_routing.py r"),
        ("torch", "support/pictures.py r --out r"),
    ],
)
def test_ctrl_c_in_the_first_seconds_is_no_traceback(moment, program, tmp_path, monkeypatch):
    """While PyTorch and the rest are imported: Python says which module it has just read."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script, *flags = program.split()
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / script), *flags],
        cwd=tmp_path,
        text=True,
        stderr=subprocess.PIPE,
    )
    try:
        begun = any(moment in line.split("|")[-1] for line in process.stderr)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    finally:
        process.wait(timeout=300)
    assert begun and process.returncode == 130 and "Traceback" not in err and not (tmp_path / "r").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_cannot_be_said_is_left_out():
    with open("/dev/full", "w") as stream:
        errors.say("this is where the disk is full", stream)
        errors.say("and this goes to nowhere", stream)


def test_nobody_reads_what_a_run_says(tmp_path):
    """`train.py ... | head -0`, streams closed from the start or full: the run is whole, and says nothing of it."""
    flags = f"{sys.executable} {ROOT / 'train.py'} --algo lm --dataset addition {LITTLE} --model tiny --out"

    def bash(line):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=900, env=env)

    for out, rest in (
        ("piped", "| true; exit ${PIPESTATUS[0]}"),
        ("closed", ">&-"),
        ("full", ">/dev/full"),
        ("silent", "<&- >&- 2>&-"),
    ):
        done = bash(f"{flags} {out} {rest}")
        assert done.returncode == 0, (out, done.stderr)
        assert "rror" not in done.stderr and "Traceback" not in done.stderr
        assert summary_of(tmp_path / out)["steps"] == 4
        assert [bare(row) for row in rows_of(tmp_path / out)] == [bare(row) for row in rows_of(tmp_path / "piped")]
    done = bash(f"{flags} piped 2>&-")  # a mistake: the folder is not empty
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    done = bash(f"{sys.executable} {ROOT / 'eval_routing.py'} silent --samples 2 >&- 2>&-")
    assert done.returncode == 0 and (tmp_path / "silent" / "routing.json").exists()


def test_a_folder_of_its_own_choice(here):
    for i in (1, 2):
        assert train.main(shlex.split(f"--algo lm --dataset addition {LITTLE}")) == 0
        check_folder("lm", "addition", f"runs/lm-addition-seed0-{i}")


def test_the_demo(here, monkeypatch, capsys):
    parse, ranked = train.parse, eval_routing.parse
    monkeypatch.setattr(train, "parse", lambda argv: parse([*argv, "--steps", "2", "--batch-size", "2"]))
    monkeypatch.setattr(eval_routing, "parse", lambda argv: ranked([*argv, "--samples", "2"]))
    Path("runs/demo").mkdir(parents=True)  # an earlier demo stays
    assert train.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "perplexity" in line and "MRR" in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("chance"))
    table = {line.split()[0]: line.split()[1:] for line in lines[at + 1 : end]}
    assert list(table) == ["dense", "MoE", "ERL", "ERL-random"] and float(table["dense"][0]) > 1
    ours, control = (Path("runs/demo-2", n, "checkpoint/model.safetensors").read_bytes() for n in ("ERL", "ERL-random"))
    assert ours != control and train.explore is explore  # the control is another run, and nothing is left of it
    for name in list(table)[1:]:  # perplexity, of perturbed routes, MRR, Hit@1
        assert len(table[name]) >= 4 and all(math.isfinite(float(cell)) for cell in table[name])
    assert lines[end].split()[-2:] == ["0.052", "0.010"] and "runs/demo-2" in lines[-1]
    assert {p.name for p in Path("runs/demo-2").iterdir()} == set(table)


# --------------------------------------------------------------------------------------------------------- bad input


def contents(folder):
    """Every file of a folder and what is in it; the cache of tokens is nobody's work."""
    return {
        str(p.relative_to(folder)): p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if ".cache" not in p.parts and p.name != ".lock"
    }


def refused(flags, folder, capsys):
    """Exit status 2, one sentence on stderr, and every file as it was. -> the sentence"""
    capsys.readouterr()
    before = contents(folder)
    assert train.main(shlex.split(flags)) == 2
    out, err = capsys.readouterr()
    assert out == "" and contents(folder) == before
    lines = [line for line in err.splitlines() if line and not line.startswith("{")]
    assert len(lines) == 1 and lines[0].startswith("train.py: "), err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--algo erll", "did you mean erl?"),
        ("--algo PPO", "did you mean"),
        ("--dataset pydocs", "--algo is missing"),
        ("--algo erl --dataset wikitext", "did you mean wikitext2?"),
        ("--algo erl --dataset gsm8", "did you mean gsm8k?"),
        ("--algo erl --dataset math500", "is a test set"),
        ("--algo erl --model huge", "unknown model 'huge'"),
        ("--algo erl --tokenizer byte", "did you mean bytes?"),
        ("--algo erl --gate norm", "did you mean renorm?"),
        ("--algo erl --top-k 9", "top_k 9 is above n_expert 8"),
        ("--algo erl --n-expert 1", "--n-expert 1 leaves nothing"),
        ("--algo erl --top-k 0", "--top-k: must be at least 1"),
        ("--algo lm --n-shared-expert 100000000", "--n-shared-expert: must be at least 0 and at most 1000"),
        ("--algo lm --moe-every 5", "moe_every 5 leaves none"),
        ("--algo erl --alpha 1.1", "alpha must lie within [0, 1]"),
        ("--algo erl --alpha -0.1", "alpha must lie within [0, 1]"),
        ("--algo erl --alpha nan", "--alpha"),
        ("--algo erl --batch-size 0", "--batch-size: must be at least 1"),
        ("--algo erl --batch-size -4", "--batch-size"),
        ("--algo erl --steps 0", "--steps: must be at least 1"),
        ("--algo erl --steps 2.5", "is not a whole number"),
        ("--algo erl --lr 0", "--lr: must be above 0"),
        ("--algo erl --lr -1e-3", "--lr"),
        ("--algo erl --lr much", "'much' is not a number"),
        ("--algo erl --lr inf", "--lr"),
        ("--algo erl --epochs 0", "--epochs"),
        ("--algo erl --lr", "expected one"),
        ("--algo erl --steps 3 --epochs 1", "give one of them"),
        ("--algo erl --learning-rate 1", "--learning-rate"),
        ("--algo erl --data", "--data"),
        ("--algo erl --seed -1", "--seed"),
        ("--algo erl --device tpu", "unknown device"),
        ("--algo grpo --group-size 1", "--group-size: must be at least 2"),
        ("--algo grpo --top-p 0", "--top-p"),
        ("--algo grpo --temperature 0", "--temperature: must be above 0"),
        ("--algo rais --shift-floor 2", "floor must lie within [0, 1]"),
        ("--algo grpo --prompts-per-step 6 --minibatches 4", "not divisible by --minibatches"),
        ("--algo erpo --entropy-reward some", "unknown entropy reward"),
        ("--algo rais --shift-base ppo", "unknown base"),
        ("--algo grpo --dataset addition --max-new-tokens 48", "leaves no room for a prompt"),
        ("--algo erl --init nowhere", "there is no run, checkpoint file or GPT-2 folder"),
        (
            "--algo erl --dataset samsum --tokenizer bytes --data-dir nowhere",
            "--data-dir nowhere: there is no such folder",
        ),
        ("--resume", "--resume needs --out"),
        ("--resume --out nowhere", "holds no run"),
    ],
)
def test_mistakes_in_the_flags(flags, says, here, capsys):
    assert says in refused(flags, here, capsys)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device, here, capsys):
    if (torch.cuda if device == "cuda" else torch.backends.mps).is_available():
        pytest.skip(f"this machine has {device}")
    assert f"no {device} device" in refused(f"--algo dense --device {device}", here, capsys)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"dialogue": "A: hi"\n', "line 1: not a JSON object"),
        ('{"dialogue": "A: hi"}\n', "needs the field 'summary'"),
        ("[1, 2]\n", "line 1: samsum needs the field"),
        ('{"dialogue": "", "summary": "x"}\n', "has no train example"),
        ('{"dialogue": "A: hi", "summary": ""}\n', "has no train example"),
        ('{"dialogue": 3, "summary": "x"}\n', "is not text"),
        ('{"dialogue": "A: hi", "summary": "%s"}\n' % ("x" * 100), "fits into 48 tokens"),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_mistakes_in_the_files(rows, says, here, capsys):
    good = '{"dialogue": "A: hi", "summary": "A greets."}\n'
    (here / "d" / "samsum").mkdir(parents=True)
    for name in ("train", "val", "test"):
        (here / "d" / "samsum" / f"{name}.jsonl").write_text(good)
    bad = here / "d" / "samsum" / "train.jsonl"
    bad.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    flags = "--dataset samsum --tokenizer bytes --data-dir d --max-new-tokens 4 --out r"
    if says == "fits into 48 tokens":  # here the records left out are counted as well
        assert train.main(shlex.split(f"--algo erl {flags}")) == 2
        assert says in capsys.readouterr().err.splitlines()[-1] and not Path("r").exists()
        return
    for algo in ("erl", "grpo"):
        assert says in refused(f"--algo {algo} {flags}", here, capsys)


def test_a_text_without_words(here, capsys):
    (here / "d" / "wikitext-2").mkdir(parents=True)
    for name in ("train", "valid", "test"):
        (here / "d" / "wikitext-2" / f"wiki.{name}.tokens").write_text(" word\n")
    flags = "--dataset wikitext2 --tokenizer bytes --data-dir d --out r"
    assert "holds no window of" in refused(f"--algo grpo {flags}", here, capsys)
    (here / "d" / "wikitext-2" / "wiki.valid.tokens").write_text("\n")
    assert "wiki.valid.tokens is empty" in refused(f"--algo erl {flags}", here, capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A dense and a MoE run; each test works on a copy."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as m:
        m.setitem(SIZES, "tiny", MICRO)
        m.chdir(folder)
        for algo in ("dense", "lm"):
            run(f"--algo {algo} --dataset addition", algo)
    return folder


@pytest.fixture
def runs(finished, here):
    shutil.copytree(finished, here, dirs_exist_ok=True)
    return here


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_run_folder_in_use(runs, capsys):
    flags = f"--algo lm --dataset addition {LITTLE}"
    assert "is not empty: continue its run with --resume" in refused(f"{flags} --out lm", runs, capsys)
    Path("notes.txt").write_text("mine")
    assert "cannot write the run folder notes.txt" in refused(f"{flags} --out notes.txt", runs, capsys)
    assert "cannot write the run folder" in refused(f"{flags} --out notes.txt/r", runs, capsys)
    with open("lm/.lock", "w") as lock:  # another process trains there
        run_folder.lock_file(lock, "lm")
        assert "is in use by another process" in refused("--resume --out lm", runs, capsys)


def test_resume_refuses_another_run(runs, capsys):
    says = refused("--resume --out lm --lr 0.5", runs, capsys)
    assert "--lr was 0.0003 when lm began: leave it out, or start a new run" in says
    assert "--algo was lm" in refused("--resume --out lm --algo erl", runs, capsys)
    for text in ("[1]", "{}", '"lm"', '{"algo": "lm", "model_type": "gpt2"}', "not JSON"):
        Path("other").mkdir(exist_ok=True)
        Path("other/config.json").write_text(text)
        for flags in ("", " --seed 0"):
            assert "other" in refused(f"--resume --out other{flags}", runs, capsys)


@pytest.mark.parametrize("spoil", [f"{what} {how}" for what in ("weights", "state") for how in ("cut", "text", "gone")])
def test_resume_from_a_broken_checkpoint(spoil, runs, capsys):
    what, how = spoil.split()
    path = Path("lm/checkpoint", "model.safetensors" if what == "weights" else "state.pt")
    {"cut": cut, "text": lambda p: p.write_text("nonsense"), "gone": Path.unlink}[how](path)
    assert "is not a readable checkpoint" in refused("--resume --out lm", runs, capsys)


def test_init_refuses_what_does_not_fit(runs, capsys):
    common = f"--dataset addition {LITTLE} --out r"
    flags = f"--algo erl {common}"
    weights = load_file("lm/checkpoint/model.safetensors")
    save_file(weights, "foreign.safetensors")
    Path("text.safetensors").write_text("nonsense")
    shutil.copy("dense/checkpoint/model.safetensors", "cut.safetensors")
    cut(Path("cut.safetensors"))
    for name in ("foreign", "text", "cut"):
        assert "is not a readable checkpoint" in refused(f"{flags} --init {name}.safetensors", runs, capsys)
    moe = f"{common} --pretrain-steps 0 --init lm"
    assert "add --n-expert 8" in refused(f"--algo erl {moe} --n-expert 4", runs, capsys)
    assert "add --top-k 1" in refused(f"--algo grpo {moe}", runs, capsys)  # generated answers default to 2
    assert "--algo dense needs a dense model" in refused(f"--algo dense {moe}", runs, capsys)
    assert "set it to 0" in refused(f"--algo erl {moe} --pretrain-steps 3", runs, capsys)
    assert "top_k 9 is above" in refused(f"{flags} --init dense --top-k 9", runs, capsys)
    Path("empty").mkdir()
    assert "there is no run" in refused(f"{flags} --init empty", runs, capsys)
    Path("half").mkdir()
    Path("half/config.json").write_text('{"model_type": "llama"}')
    save_file(weights, "half/model.safetensors")
    assert "half" in refused(f"{flags} --init half", runs, capsys)


@needs_real
def test_another_vocabulary(runs, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(REAL / "tiktoken-cache"))
    says = refused("--algo erl --dataset pydocs --tokenizer gpt2 --init dense", runs, capsys)
    assert "has a vocabulary of 257, the tokenizer gpt2 one of 50257" in says


def test_a_loss_that_diverges_ends_the_run(here, capsys):
    assert train.main(shlex.split(f"--algo dense --dataset addition {LITTLE} --steps 40 --lr 1e18 --out r")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    folder = find_checkpoint("r")
    assert "lower --lr" in last and ("r keeps the last checkpoint" if folder else "nothing was saved") in last
    assert not Path("r/summary.json").exists()
    if folder:
        weights = load_file(Path(folder, "model.safetensors"))
        assert all(w.isfinite().all() for w in weights.values())


def test_without_a_network(tmp_path):
    """Nothing listens on port 9: each program says which flag or variable makes it work offline."""
    closed = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "no-words"),
    }
    (tmp_path / "no-words").mkdir()
    cases = {
        "--algo erl --dataset samsum --tokenizer bytes": ["--data-dir", "HF_ENDPOINT"],
        "--algo erl --dataset pydocs --tokenizer bytes --init gpt2": ["--init", "HF_ENDPOINT"],
        "--algo erl --dataset wikitext2": ["TIKTOKEN_CACHE_DIR", "--tokenizer bytes"],
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags.split(), "--out", "r"],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | closed,
        )
        for flags in cases
    ]
    for process, (flags, words) in zip(started, cases.items(), strict=True):
        out, err = process.communicate(timeout=900)
        assert process.returncode == 2, (flags, err)
        assert len(err.splitlines()) == 1 and err.startswith("train.py: "), (flags, err)
        assert all(word in err for word in words), (flags, err)
    assert not (tmp_path / "r").exists()


# ----------------------------------------------------------------------------------------- what a resumed run may find


@pytest.mark.parametrize("spoil", ["gone", "short", "text"])
def test_resume_without_the_lines_that_were_written(spoil, runs, capsys):
    path = Path("lm/metrics.jsonl")
    if spoil == "gone":
        path.unlink()
    elif spoil == "short":
        cut(path)
    else:
        path.write_text("x" + path.read_text()[1:])
    assert train.main(shlex.split("--resume --out lm")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "lm/metrics.jsonl" in last and "--init lm" in last


def test_resume_with_the_checkpoint_of_another_run(runs, capsys):
    for other, out in (("dense", "lm"), ("lm", "dense")):
        shutil.move(f"{out}/checkpoint", "kept")
        shutil.copytree(f"{other}/checkpoint", f"{out}/checkpoint")
        assert f"the checkpoint in {out}" in refused(f"--resume --out {out}", runs, capsys)
        shutil.rmtree(f"{out}/checkpoint")
        shutil.move("kept", f"{out}/checkpoint")


def test_resume_needs_the_checkpoint_and_not_what_the_run_began_with(runs):
    run("--algo lm --dataset addition --init dense", "next")
    before = Path("next/summary.json").read_text()
    shutil.rmtree("dense")
    assert train.main(shlex.split("--resume --out next")) == 0
    new, old = json.loads(Path("next/summary.json").read_text()), json.loads(before)
    assert new["accuracy"] == old["accuracy"] and new["steps"] == old["steps"]


def test_a_full_disk_leaves_the_last_checkpoint(runs, capsys, monkeypatch):
    real, saves = torch.save, []

    def save(*args):
        saves.append(1)
        if len(saves) == 3:
            raise RuntimeError("unexpected pos 64 vs 0")  # what PyTorch says of a full disk
        real(*args)

    monkeypatch.setattr(torch, "save", save)
    assert train.main(shlex.split(f"--algo lm --dataset addition {LITTLE} --checkpoint-every 1 --out r")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the checkpoint of step 3 could not be written" in last and "--resume" in last
    assert load_state(find_checkpoint("r"))["step"] == 2 and not Path("r/checkpoint.tmp").exists()
    assert train.main(shlex.split("--resume --out r")) == 0


@pytest.mark.parametrize(
    "flags",
    ["--algo grpo --pretrain-steps 1 --pretrain-lr 1e30", "--algo lm --lr 1e30", "--algo dense --steps 1 --lr 1e30"],
)
def test_weights_that_are_not_finite_give_no_score(flags, here, capsys):
    assert train.main(shlex.split(f"{LITTLE} --dataset addition {flags} --out r")) == 2
    assert "lower --lr (or --pretrain-lr)" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("r/summary.json").exists()


def test_spoilt_weights_are_no_beginning(runs, capsys):
    path = Path("dense/checkpoint/model.safetensors")
    model, _ = load_model(str(path))
    with torch.no_grad():
        model.wte.weight[3] = float("nan")
    save_model(model, str(path))
    says = refused(f"--algo lm --dataset addition {LITTLE} --init dense --out r", runs, capsys)
    assert "--init dense holds weights that are not finite" in says


def test_a_model_from_elsewhere_brings_its_own_size(runs, monkeypatch, capsys):
    run("--algo lm --dataset addition --init dense --model small", "r")
    assert "--init dense brings its own size: --model small counts for nothing" in capsys.readouterr().err
    assert json.loads(Path("r/config.json").read_text())["model"] == "tiny"


def test_what_the_user_hears_of_the_machine():
    assert errors.sentence(PermissionError(13, "Permission denied", "r/.lock")) == "r/.lock: Permission denied"
    assert "--batch-size" in errors.sentence(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert "--batch-size" in errors.sentence(torch.OutOfMemoryError("CUDA out of memory"))
    assert errors.sentence(RuntimeError("shape mismatch")) is None  # the program's fault: a traceback
