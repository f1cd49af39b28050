"""recipes/trl_grpo.py: TRL's real trainers, a tiny random Qwen3-MoE, a CPU."""

import contextlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("trl", reason="needs recipes/requirements-trl.txt")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402

from baselines import mismatch_weights  # noqa: E402
from recipes import trl_grpo  # noqa: E402
from recipes.trl_grpo import MoEGRPOTrainer, prompts, rule, tiny_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
G = 4  # rows a group
PREFIX = "vllm_importance_sampling_"


def make(tmp_path, trainer=MoEGRPOTrainer, config=GRPOConfig, **args):
    """A trainer on a fresh tiny model, always the same. args: the trainer's own, and settings of `config`."""
    own = {name: args.pop(name) for name in ("loss", "loss_options", "rollout_func") if name in args}
    model, tokenizer = tiny_model(0)
    settings = dict(output_dir=str(tmp_path), per_device_train_batch_size=2 * G, num_generations=G, seed=0)
    settings |= dict(max_completion_length=12, learning_rate=3e-3, logging_steps=1, save_strategy="no")
    settings |= dict(report_to="none", bf16=False, use_cpu=True, disable_tqdm=True)
    own |= dict(processing_class=tokenizer, reward_funcs=rule, train_dataset=prompts(0, 64))
    made = trainer(model=model, args=config(**settings | args), **own)
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps  # train() sets it
    made.model.train()
    return made


def first_batches(trainer):
    """The microbatches of the trainer's first generation batch."""
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer._buffered_inputs


def gradients(trainer, batch, model=None):
    """-> loss and every parameter's gradient, through the trainer's own loss. model: its model, wrapped."""
    trainer.model.zero_grad()
    with contextlib.ExitStack() as trainer._until_backward:  # as in training_step
        loss = trainer.compute_loss(model or trainer.model, batch)
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def largest_difference(one, other):
    assert one.keys() == other.keys() and one
    return max((one[n] - other[n]).abs().max().item() for n in one)


def read(model, batch):
    """What transformers itself says of a batch -> log-probs [B, C] at temperature 0.7, the routers' P [B, C, L, E]."""
    ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=attention, output_router_logits=True)
    C, log_probs = batch["completion_ids"].shape[1], (out.logits / 0.7).log_softmax(-1)[:, :-1]
    P = torch.stack([x.view(*ids.shape, -1).softmax(-1) for x in out.router_logits], 2)
    return log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -C:], P[:, -C - 1 : -1]


GSPO = dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4)
TRL = {  # how TRL is told to compute the same (its loss, and our clip ranges), and how far off the policy to go
    "grpo": (GRPOTrainer, GRPOConfig, dict(loss_type="grpo", epsilon_high=0.28), 0.3),
    "gspo": (GRPOTrainer, GRPOConfig, GSPO, 1e-3),
    "gmpo": (GMPOTrainer, GMPOConfig, dict(epsilon=0.4, epsilon_high=0.4), 0.5),
    "sapo": (GRPOTrainer, GRPOConfig, dict(loss_type="sapo"), 0.3),
}
AUX = dict(temperature=1.0, gradient_accumulation_steps=4, gradient_checkpointing=False)  # aux loss at its default
NO_AUX = dict(temperature=0.7, router_aux_loss_coef=0.0, gradient_accumulation_steps=2, num_iterations=2)


def disturb(batch, noise):
    """The same batch off the policy, with a tool mask."""
    draw, shape = torch.Generator().manual_seed(1), batch["old_per_token_logps"].shape
    old = batch["old_per_token_logps"] + noise * torch.randn(shape, generator=draw)
    return {**batch, "old_per_token_logps": old, "tool_mask": (torch.rand(shape, generator=draw) < 0.8).long()}


@pytest.mark.parametrize("loss, args", [(loss, NO_AUX) for loss in TRL] + [("grpo", AUX), ("gspo", AUX)])
def test_equals_trl(tmp_path, loss, args):
    """Loss and all gradients, off the policy, with clipped tokens, a tool mask, and a row without a completion."""
    theirs, config, settings, noise = TRL[loss]
    ours, theirs = make(tmp_path, loss=loss, **args), make(tmp_path, theirs, config, **settings, **args)
    batch = disturb(first_batches(ours)[0], noise)
    batch["completion_mask"] = batch["completion_mask"].clone()
    batch["completion_mask"][2] = 0
    (a, ours_grad), (b, theirs_grad) = gradients(ours, batch), gradients(theirs, batch)
    assert loss == "sapo" or 0 < ours._metrics["train"]["clip_share"][-1] < 1  # the clip acted, and not everywhere
    if loss == "gmpo":  # where TRL's adds -A for the row without a completion, a constant; ours adds 0
        b = b + batch["advantages"][2] / len(batch["advantages"]) / ours.current_gradient_accumulation_steps
    apart, largest = largest_difference(ours_grad, theirs_grad), max(g.abs().max() for g in theirs_grad.values())
    assert abs(a - b) < 1e-6 and apart < 1e-6 and largest > 1e-3


def rollout(words, trainer):
    """Random completions of another engine, with log-probabilities that are those of no model."""
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(2, 14, (n,), generator=draw).tolist() for n in (1, 2, 3, 4, 5, 2, 1, 3)]
    log_probs = [(-2.6 + 0.5 * torch.randn(len(x), generator=draw)).tolist() for x in ids]
    log_probs[4][0] = None  # as TRL keeps a NaN
    prompt_ids = trainer.processing_class(text=words)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": log_probs}


WEIGHTS = {  # the loss that takes them, and GRPOConfig's settings
    "grpo": dict(mode="token_truncate", clip_max=1.2),
    "sapo": dict(mode="token_mask", clip_max=1.5, clip_min=0.7),
    "gspo": dict(mode="sequence_mask", clip_max=1.5, clip_min=0.5),
}


@pytest.mark.parametrize("loss", WEIGHTS)
def test_another_sampler_is_weighed_as_in_trl(tmp_path, loss):
    """TRL's own code for vLLM, without it: the sampler is a rollout_func. Off the policy, with a tool mask."""
    sampler = {PREFIX + name: value for name, value in WEIGHTS[loss].items()}
    sampler |= dict(rollout_func=rollout, router_aux_loss_coef=0.0, temperature=0.7)
    theirs, config, settings, noise = TRL[loss]
    ours, theirs = make(tmp_path, loss=loss, **sampler), make(tmp_path, theirs, config, **settings, **sampler)
    theirs.use_vllm, theirs._last_loaded_step = True, 0  # nothing to load
    batch = first_batches(ours)[0]
    reference = theirs._generate_and_score_completions(next(iter(theirs.get_train_dataloader())))  # rows unshuffled
    mask, weights = batch["completion_mask"].bool(), batch["mismatch_weights"]
    torch.testing.assert_close(weights[mask], reference["importance_sampling_ratio"].expand_as(weights)[mask])
    assert weights[mask].unique().numel() > 2 and (loss == "grpo" or (weights[mask] == 0).any())
    a, ours_grad = gradients(ours, disturb(batch, noise))
    b, theirs_grad = gradients(theirs, disturb(reference, noise))
    assert abs(a - b) < 1e-6 and largest_difference(ours_grad, theirs_grad) < 1e-6
    ours.loss = "erpo"  # the others take them too
    unweighted = gradients(ours, batch | {"mismatch_weights": None})[1]
    assert largest_difference(gradients(ours, batch)[1], unweighted) > 1e-6


def test_defaults_are_trls():
    """Those of SAPO are in test_equals_trl."""
    theirs = {name.removeprefix(PREFIX): x.default for name, x in GRPOConfig.__dataclass_fields__.items()}
    ours = inspect.signature(mismatch_weights).parameters
    assert theirs["mode"] == "sequence_mask"
    assert all(ours[name].default == theirs[name] for name in ("clip_max", "clip_min"))


@pytest.mark.parametrize("loss", ["erpo", "rais", "sapo", "gspo-replay"])
def test_first_ratio_and_gamma_are_exactly_1(tmp_path, loss):
    """In real training: exactly 1 right after a generation, in every microbatch; not in the second pass over it."""
    settings = dict(gradient_accumulation_steps=2, num_iterations=2, max_steps=4, temperature=0.8)
    trainer = make(tmp_path, loss=loss, **settings)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ratio_mean" in log]
    assert len(logs) == 4
    for log in logs[::2]:
        assert log["ratio_mean"] == log["routing/agreement"] == log.get("gamma_mean", 1) == log.get("gamma_min", 1) == 1
        assert log["ratio_std"] == log["ratio_neg_log"] == log.get("clip_share", 0) == 0
    for log in logs[1::2]:
        assert log["ratio_std"] > 0 and log["routing/gamma_mean"] < 1


def check_groups(batch):
    """Rows of one prompt stand together, and rewards and advantages are those of these very rows."""
    P = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    assert all(P[i] == P[i - i % G] for i in range(2 * G))
    ids = [c[m.bool()].tolist() for c, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    assert batch["rewards"].tolist() == pytest.approx(rule([trl_grpo.WORDS[p[0]] for p in P], ids, lambda *_: None))
    R = batch["rewards"].view(-1, G)
    A = (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"], A.flatten())


def test_microbatches_and_what_the_losses_get(tmp_path, monkeypatch):
    """Groups stay whole, with their own raw rewards. The losses get what both policies say of these rows, at the
    position that predicted each token, with padding on the left."""
    for name in ("erpo_loss", "rais_loss"):
        monkeypatch.setattr(trl_grpo, name, Mock(wraps=getattr(trl_grpo, name)))
    trainer = make(tmp_path, loss="erpo", steps_per_generation=4, gradient_accumulation_steps=4, temperature=0.7)
    batches = first_batches(trainer)
    assert len(batches) == 4
    for batch in batches:
        check_groups(batch)
    batch = batches[-1]
    assert (batch["prompt_mask"] == 0).any()
    with torch.no_grad():
        for p in trainer.model.parameters():  # the new policy
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trainer.compute_loss(trainer.model, batch)
    trainer.loss = "rais"
    trainer.compute_loss(trainer.model, batch)
    routed, options = trl_grpo.erpo_loss.call_args
    log_probs, old_log_probs, rewards, mask, experts, old_experts, probs, old_probs = routed
    assert options == {"num_experts": 8, "group_size": G, "weights": None}
    assert torch.equal(rewards, batch["rewards"]) and torch.equal(mask, batch["completion_mask"].bool())
    (new, new_P), (old, old_P) = read(trainer.model, batch), read(tiny_model(0)[0], batch)
    close = lambda a, b: torch.testing.assert_close(a[mask], b[mask], rtol=1e-5, atol=1e-5)  # noqa: E731
    close(log_probs, new), close(old_log_probs, old)
    for got, P, chosen in ((probs, new_P, experts), (old_probs, old_P, old_experts)):
        close(chosen.sort(-1).values, P.topk(2).indices.sort(-1).values)
        close(got, P.gather(-1, chosen.clamp(min=0)))
    assert not torch.equal(experts[mask], old_experts[mask])
    _, _, advantages, _, router, old_router = trl_grpo.rais_loss.call_args.args
    assert torch.equal(advantages, batch["advantages"])  # and the routers, both at the experts of the old policy:
    close(router.exp(), new_P.gather(-1, old_experts)), close(old_router.exp(), old_P.gather(-1, old_experts))


def test_replay_holds_through_backward(tmp_path):
    """With routers that would now choose otherwise, the old routes are used in the forward and, where gradient
    checkpointing computes it again, in the backward: the same gradients with it and without. Nothing stays behind."""
    found = []
    for checkpointing in (True, False):
        trainer = make(tmp_path, loss="gspo-replay", gradient_checkpointing=checkpointing, num_iterations=2)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})  # as train() does
        batch = first_batches(trainer)[0]
        for layer in trainer.model.model.layers:
            layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.flip(0)
        batch["old_per_token_logps"] = trainer._forward(trainer.model, batch)[0].detach()  # ratio near 1: no clip
        trainer.create_optimizer()
        trainer._step = 1  # the second pass over the generation
        loss = trainer.training_step(trainer.model, batch, None)
        metrics, hooks = trainer._metrics["train"], [m._forward_hooks.values() for m in trainer.model.modules()]
        assert metrics["routing/agreement"] == [1.0] and metrics["routing/gamma_mean"][0] < 1
        assert not [hook for of in hooks for hook in of if hook.__module__ == "recipes.hf_routing"]
        found.append((loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}))
    (a, one), (b, other) = found
    assert abs(a - b) < 1e-6 and largest_difference(one, other) < 1e-6
    assert one["model.layers.0.mlp.gate.weight"].abs().max() > 0


TWO_PROCESSES = """
import os, sys, torch
from test_trl_grpo import check_groups, first_batches, gradients, make, move
out, *losses = sys.argv[1:]
for loss in losses:
    trainer = make(out, loss=loss, router_aux_loss_coef=0.0)
    check_groups(first_batches(trainer)[0])  # each process has its own rows and their rewards
    rank = trainer.accelerator.process_index
    batch = torch.load(f"{out}/{loss}.pt", weights_only=False)[rank]
    model = trainer.accelerator.prepare(move(trainer.model))
    torch.save(gradients(trainer, batch, model)[1], f"{out}/{loss}.{rank}")
trainer.accelerator.end_training()
os._exit(0)
"""


@torch.no_grad()
def move(model):
    for p in model.parameters():
        p.mul_(1.01)
    return model


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """Of one process that accumulates over two microbatches, which are the two processes'."""
    ones = {}
    for loss in ("erpo", "gspo-replay"):
        halves = dict(per_device_train_batch_size=G, gradient_accumulation_steps=2)
        trainer = make(tmp_path, loss=loss, router_aux_loss_coef=0.0, **halves)
        batches = first_batches(trainer)
        torch.save(batches, tmp_path / f"{loss}.pt")
        move(trainer.model)
        first, second = (gradients(trainer, batch)[1] for batch in batches)
        ones[loss] = {name: first[name] + second[name] for name in first}
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    torchrun(tmp_path / "two.py", tmp_path, *ones)
    for loss, one in ones.items():
        assert all(largest_difference(one, torch.load(tmp_path / f"{loss}.{rank}")) < 1e-6 for rank in (0, 1))


def test_torchrun_trains(tmp_path):
    out = torchrun(ROOT / "recipes/trl_grpo.py", "--loss", "rais", "--steps", "5", "--output-dir", tmp_path)
    assert "rais: share by the rule" in out


def torchrun(*command):
    """Both programs leave by os._exit. An interpreter that ends after DDP over gloo is aborted now and then (SIGABRT,
    "terminate called without an active exception", no Python frame), as eight lines of plain torch are."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, command)]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": paths}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
