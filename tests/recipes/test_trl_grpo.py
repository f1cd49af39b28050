"""recipes/trl_grpo.py: TRL's real trainers, a tiny random Qwen3-MoE, a CPU."""

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="needs recipes/requirements-trl.txt")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402

from recipes import trl_grpo  # noqa: E402
from recipes.replay_check import check_replay  # noqa: E402
from recipes.trl_grpo import MoEGRPOTrainer, prompts, rule, tiny_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

G = 4  # rows a group


def make(tmp_path, trainer=MoEGRPOTrainer, config=GRPOConfig, model=None, reward=rule, seed=0, **args):
    """A trainer on a fresh tiny model: always the same weights and prompts for a seed. args: loss, loss_options,
    rollout_func, and settings of `config`."""
    own = {name: args.pop(name) for name in ("loss", "loss_options", "rollout_func") if name in args}
    qwen, tokenizer = tiny_model(seed)
    settings = dict(output_dir=str(tmp_path), seed=seed, per_device_train_batch_size=2 * G, num_generations=G)
    settings |= dict(max_completion_length=12, learning_rate=3e-3, logging_steps=1, save_strategy="no")
    settings |= dict(report_to="none", bf16=False, use_cpu=True, disable_tqdm=True)
    made = trainer(
        model=qwen if model is None else model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=prompts(seed, 64),
        args=config(**settings | args),
        **own,
    )
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps  # train() sets it
    made.model.train()
    return made


def first_batches(trainer):
    """The microbatches of the trainer's first generation batch."""
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer._buffered_inputs


def gradients(trainer, batch):
    """-> loss and every parameter's gradient, through the trainer's own loss."""
    trainer.model.zero_grad()
    with contextlib.ExitStack() as trainer._until_backward:  # as in training_step
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def hooks_left(model):
    """The recipe's own: transformers leaves one of its own on every router."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if hook.__module__ == "recipes.hf_routing"]


def largest_difference(one, other):
    assert one.keys() == other.keys() and one
    return max((one[n] - other[n]).abs().max().item() for n in one)


def rows(batch, keep):
    return {
        k: type(v)(v.experts[keep], v.forced[keep], v.uniform) if k == "old_routes" else v[keep] if v.dim() else v
        for k, v in batch.items()
    }


TRL = {  # how TRL is told to compute the same: its loss, and our clip ranges
    "grpo": (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "gspo": (
        GRPOTrainer,
        GRPOConfig,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gmpo": (GMPOTrainer, GMPOConfig, {"epsilon": 0.4, "epsilon_high": 0.4}),
    "sapo": (GRPOTrainer, GRPOConfig, {"loss_type": "sapo"}),
}


@pytest.mark.parametrize("loss", TRL)
@pytest.mark.parametrize(
    "args",
    [
        dict(temperature=0.7, router_aux_loss_coef=0.0, gradient_accumulation_steps=2, num_iterations=2),
        dict(temperature=1.0, gradient_accumulation_steps=4, gradient_checkpointing=False),  # aux loss at its default
    ],
)
def test_equals_trl(tmp_path, loss, args):
    """Loss and all gradients, off the policy, with clipped tokens, a tool mask, and a row without a completion."""
    theirs, config, settings = TRL[loss]
    if loss == "gmpo" and "router_aux_loss_coef" not in args:
        args = args | {"router_aux_loss_coef": 0.0}  # TRL's GMPOTrainer has no auxiliary loss
    ours = make(tmp_path, loss=loss, **args)
    theirs = make(tmp_path, theirs, config, **settings, **args)
    batch = dict(first_batches(ours)[0])
    draw = torch.Generator().manual_seed(1)
    noise = {"grpo": 0.3, "gspo": 1e-3, "gmpo": 0.5, "sapo": 0.3}[loss]
    shape = batch["old_per_token_logps"].shape
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + noise * torch.randn(shape, generator=draw)
    batch["tool_mask"] = (torch.rand(shape, generator=draw) < 0.8).long()
    batch["completion_mask"] = batch["completion_mask"].clone()
    batch["completion_mask"][2] = 0
    (a, ours_grad), (b, theirs_grad) = gradients(ours, batch), gradients(theirs, batch)
    assert loss == "sapo" or 0 < ours._metrics["train"]["clip_share"][-1] < 1  # the clip acted, and not everywhere
    if loss == "gmpo":  # where TRL's adds -A for the row without a completion, a constant; ours adds 0
        b = b + batch["advantages"][2] / shape[0] / ours.current_gradient_accumulation_steps
    apart, largest = largest_difference(ours_grad, theirs_grad), max(g.abs().max() for g in theirs_grad.values())
    print(f"{loss}: loss {abs(a - b):.1e}, gradient {apart:.1e} of {largest:.1e}")
    assert abs(a - b) < 1e-6 and apart < 1e-6 and largest > 1e-3


@pytest.mark.parametrize("loss", ["erpo", "rais", "sapo", "gspo-replay"])
def test_first_ratio_and_gamma_are_exactly_1(tmp_path, loss):
    """In real training: exactly 1 right after a generation, in every microbatch; not in the second pass over it."""
    trainer = make(tmp_path, loss=loss, gradient_accumulation_steps=2, num_iterations=2, max_steps=4, temperature=0.8)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ratio_mean" in log]
    assert len(logs) == 4
    for log in logs[::2]:
        assert log["ratio_mean"] == log["routing/agreement"] == 1
        if loss == "rais":
            assert log["gamma_mean"] == log["gamma_min"] == 1
        assert log["ratio_std"] == log["ratio_neg_log"] == log.get("clip_share", 0) == 0
        assert log["routing/gamma_min"] == pytest.approx(1, abs=1e-6)  # the report normalises once more
    for log in logs[1::2]:
        assert log["ratio_std"] > 0 and log["routing/gamma_mean"] < 1
    assert {"routing/router_entropy", "routing/top1_above_0.9", "routing/max_vio", "routing/dead_experts"} <= {*logs[0]}


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe", "GptOss"])
def test_other_families(tmp_path, family):
    """Random tiny models: RAIS trains them, from a first ratio and gamma of exactly 1; aux loss at the model's own."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8, "num_experts": 8}
    sizes |= {"num_experts_per_tok": 2, "vocab_size": 14, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=64, initializer_range=0.1)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    trainer = make(tmp_path, model=model, loss="rais", num_iterations=2, max_steps=4)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ratio_mean" in log]
    for log in logs[::2]:
        assert log["ratio_mean"] == log["gamma_mean"] == log["gamma_min"] == log["routing/agreement"] == 1
    assert logs[1]["gamma_mean"] < 1 and logs[1]["ratio_std"] > 0 and logs[1]["aux_loss"] > 1


def check_groups(batch):
    """Rows of one prompt stand together, and rewards and advantages are those of these very rows."""
    P = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    for start in range(0, 2 * G, G):
        assert all(p == P[start] for p in P[start : start + G])
    ids = [c[m.bool()].tolist() for c, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    words = [trl_grpo.WORDS[p[0]] for p in P]
    assert batch["rewards"].tolist() == pytest.approx(rule(words, ids, lambda *_: None))
    R = batch["rewards"].view(-1, G)
    torch.testing.assert_close(
        batch["advantages"], ((R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)).flatten()
    )


def test_erpo_gets_what_the_batch_holds(tmp_path, monkeypatch):
    """Rewards untouched, the group's size, and the routing of the position that predicted each token: compared with the
    model's own router logits, in rows with padding on the left."""
    seen = []
    monkeypatch.setattr(trl_grpo, "erpo_loss", lambda *a, **k: seen.append((a, k)) or original(*a, **k))
    original = sys.modules["erpo"].erpo_loss
    trainer = make(tmp_path, loss="erpo", loss_options={"alpha": 0.5}, temperature=0.7)
    batch = first_batches(trainer)[0]
    assert (batch["prompt_mask"] == 0).any()
    with torch.no_grad():
        for p in trainer.model.parameters():  # the new policy
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trainer.compute_loss(trainer.model, batch)
    (log_probs, old_log_probs, rewards, mask, experts, old_experts, probs, old_probs), options = seen[0]
    assert options == {"num_experts": 8, "group_size": G, "alpha": 0.5, "weights": None}
    assert torch.equal(rewards, batch["rewards"]) and torch.equal(mask, batch["completion_mask"].bool())

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    fresh, _ = tiny_model(0)  # the old policy: the trainer's model as it was
    C = mask.shape[1]
    for model, seen_log_probs, seen_experts, seen_probs in (
        (trainer.model, log_probs, experts, probs),
        (fresh, old_log_probs, old_experts, old_probs),
    ):
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=attention_mask, output_router_logits=True)
        want = (out.logits / 0.7).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -C:]
        torch.testing.assert_close(seen_log_probs[mask], want[mask], rtol=1e-5, atol=1e-5)
        P = torch.stack([x.view(*ids.shape, -1).softmax(-1) for x in out.router_logits], 2)[:, -C - 1 : -1]
        want = P.topk(2)
        assert torch.equal(seen_experts.sort(-1).values[mask], want.indices.sort(-1).values[mask])
        torch.testing.assert_close(seen_probs.sort(-1).values[mask], want.values.sort(-1).values[mask])
    assert not torch.equal(experts[mask], old_experts[mask])


def test_microbatches(tmp_path):
    """Groups stay whole, with their own raw rewards; what travels with each passes the check that others may copy."""
    trainer = make(tmp_path, loss="erpo", steps_per_generation=4, gradient_accumulation_steps=4)
    assert len(first_batches(trainer)) == 4
    for batch in trainer._buffered_inputs:
        check_groups(batch)
        C = batch["completion_ids"].shape[1]
        with trl_grpo.record(trainer.model) as tape, torch.no_grad():
            log_probs = trainer._forward(trainer.model, batch)[0]
        at, mask = slice(-C - 1, -1), batch["completion_mask"].bool()
        routes, live = batch["old_routes"].experts[:, at], tape.router_log_probs()[:, at]
        assert check_replay(routes, batch["old_per_token_logps"], live, log_probs, mask, enough=1, tolerance=0) == []
        assert check_replay(routes.roll(1, 0), batch["old_per_token_logps"], live, log_probs, mask)


def test_rais_looks_at_the_old_experts(tmp_path, monkeypatch):
    """gamma compares the new and the old router at the experts that the old policy chose."""
    seen = []
    monkeypatch.setattr(trl_grpo, "rais_loss", lambda *a, **k: seen.append(a) or original(*a, **k))
    original = sys.modules["rais"].rais_loss
    trainer = make(tmp_path, loss="rais")
    batch = first_batches(trainer)[0]
    gate = trainer.model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.copy_(gate.weight.roll(1, 0))  # expert e is now called e + 1
    trainer.compute_loss(trainer.model, batch)
    _, _, advantages, mask, new, old = seen[0]
    assert torch.equal(advantages, batch["advantages"])
    C = mask.shape[1]
    # In layer 0 the inputs have not changed, so the new log P of expert e is the old one of e - 1.
    fresh, _ = tiny_model(0)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = fresh(input_ids=ids, attention_mask=attention_mask, output_router_logits=True).router_logits[0]
    log_P = logits.view(*ids.shape, -1).log_softmax(-1)[:, -C - 1 : -1]  # [B, C, E]
    experts = batch["old_routes"].experts[:, -C - 1 : -1, 0]
    torch.testing.assert_close(new[..., 0, :][mask], log_P.roll(1, -1).gather(-1, experts)[mask])
    torch.testing.assert_close(old[..., 0, :][mask], log_P.gather(-1, experts)[mask])


def test_replay_holds_through_backward(tmp_path):
    """With routers that would now choose otherwise, the old routes are used in the forward and, where gradient
    checkpointing computes it again, in the backward: the same gradients with it and without. Nothing stays behind."""
    found = []
    for checkpointing in (True, False):
        trainer = make(tmp_path, loss="gspo-replay", gradient_checkpointing=checkpointing, num_iterations=2)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})  # as train() does
        batch = first_batches(trainer)[0]
        with torch.no_grad():
            for layer in trainer.model.model.layers:
                layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0))
        batch["old_per_token_logps"] = trainer._forward(trainer.model, batch)[0].detach()  # ratio near 1: no clip
        trainer.create_optimizer()
        trainer._step = 1  # the second pass over the generation
        loss = trainer.training_step(trainer.model, batch, None)
        assert trainer._metrics["train"]["routing/agreement"] == [1.0]
        assert trainer._metrics["train"]["routing/gamma_mean"][0] < 1
        found.append((loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}))
        assert not hooks_left(trainer.model)
    (a, one), (b, other) = found
    assert abs(a - b) < 1e-6 and largest_difference(one, other) < 1e-6
    assert one["model.layers.0.mlp.gate.weight"].abs().max() > 0


@pytest.mark.parametrize("loss", ["erpo", "rais", "gspo-replay", "grpo"])
def test_accumulated_gradient_is_that_of_the_whole(tmp_path, loss):
    """Two microbatches of a group each give the gradient of one of two groups (without the auxiliary loss, which is a
    product of two means over a microbatch's tokens)."""
    trainer = make(tmp_path, loss=loss, router_aux_loss_coef=0.0)
    batch = first_batches(trainer)[0]
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.01)
    _, whole = gradients(trainer, batch)
    trainer.current_gradient_accumulation_steps = 2
    parts = [gradients(trainer, rows(batch, slice(i, i + G)))[1] for i in (0, G)]
    assert largest_difference(whole, {n: parts[0][n] + parts[1][n] for n in whole}) < 1e-6
    assert max(g.abs().max() for g in whole.values()) > 1e-4


def test_what_the_auxiliary_loss_does(tmp_path):
    """Without a difference in reward there is no policy gradient; by default the router is trained all the same."""

    def same(prompts, **_):
        return [1.0] * len(prompts)

    for coefficient in (None, 0.0):
        trainer = make(tmp_path, loss="rais", reward=same, router_aux_loss_coef=coefficient)
        loss, grad = gradients(trainer, first_batches(trainer)[0])
        router = grad["model.layers.0.mlp.gate.weight"].abs().max()
        if coefficient is None:
            assert loss == pytest.approx(0.001 * trainer._metrics["train"]["aux_loss"][0]) and router > 0
        else:
            assert loss == 0 and router == 0 and "aux_loss" not in trainer._metrics["train"]


def noisy_rollout(words, trainer):
    """Random completions of another engine, with log-probabilities that are those of no model."""
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(2, 14, (n,), generator=draw).tolist() for n in (1, 2, 3, 4, 5, 2, 1, 3)]
    log_probs = [(-2.6 + 0.5 * torch.randn(len(x), generator=draw)).tolist() for x in ids]
    log_probs[4][0] = None  # as TRL keeps a NaN
    prompt_ids = trainer.processing_class(text=words)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": log_probs}


SETTINGS = [("token_truncate", 1.2, None), ("token_mask", 1.5, 0.7), ("sequence_mask", 1.5, 0.5)]


@pytest.mark.parametrize("mode, high, low", SETTINGS)
def test_another_sampler_is_weighed_as_in_trl(tmp_path, mode, high, low):
    """TRL's own code for vLLM, without it: the sampler is a rollout_func."""
    settings = dict(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=high, temperature=0.7)
    settings |= dict(vllm_importance_sampling_clip_min=low, rollout_func=noisy_rollout, router_aux_loss_coef=0.0)
    ours = make(tmp_path, loss="grpo", **settings)
    theirs = make(tmp_path, GRPOTrainer, GRPOConfig, loss_type="grpo", epsilon_high=0.28, **settings)
    theirs.use_vllm, theirs._last_loaded_step = True, 0  # nothing to load
    batch = first_batches(ours)[0]
    reference = theirs._generate_and_score_completions(next(iter(theirs.get_train_dataloader())))  # rows unshuffled
    mask, weights = batch["completion_mask"].bool(), batch["mismatch_weights"]
    assert torch.equal(batch["completion_ids"], reference["completion_ids"])
    expected = reference["importance_sampling_ratio"].expand_as(weights)
    torch.testing.assert_close(weights[mask], expected[mask])
    assert weights[mask].unique().numel() > 2 and (mode == "token_truncate" or (weights[mask] == 0).any())
    (a, ours_grad), (b, theirs_grad) = gradients(ours, batch), gradients(theirs, reference)
    assert abs(a - b) < 1e-6 and largest_difference(ours_grad, theirs_grad) < 1e-6
    assert ours._metrics["train"]["sampling/weight_mean"][-1] == pytest.approx(weights[mask].mean().item())
    for loss in ("erpo", "rais"):  # the others take them too; RAIS over GMPO refuses a single zero in a row
        ours.loss = loss
        if loss == "rais" and mode == "token_mask":
            with pytest.raises(ValueError, match="weights"):
                gradients(ours, batch)
        else:
            unweighted = gradients(ours, batch | {"mismatch_weights": None})[1]
            assert largest_difference(gradients(ours, batch)[1], unweighted) > 1e-6


TWO_PROCESSES = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from test_trl_grpo import G, check_groups, first_batches, make, rows
from pathlib import Path
out = Path(sys.argv[1])
for loss in sys.argv[2:]:
    batch = torch.load(out / f"{{loss}}.pt", weights_only=False)
    trainer = make(out, loss=loss, router_aux_loss_coef=0.0)
    assert trainer.accelerator.num_processes == 2
    check_groups(first_batches(trainer)[0])  # each process has its own rows and their rewards
    model = trainer.accelerator.prepare(trainer.model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    rank = trainer.accelerator.process_index
    trainer.compute_loss(model, rows(batch, slice(rank * G, rank * G + G))).backward()
    if rank == 0:
        grads = {{n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}}
        torch.save(grads, out / f"{{loss}}.grad.pt")
trainer.accelerator.end_training()
"""


def test_two_processes_give_the_gradient_of_one(tmp_path):
    ones = {}
    for loss in ("erpo", "gspo-replay"):
        trainer = make(tmp_path, loss=loss, router_aux_loss_coef=0.0)
        batch = first_batches(trainer)[0]
        torch.save(batch, tmp_path / f"{loss}.pt")
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1.01)
        ones[loss] = gradients(trainer, batch)[1]
    (tmp_path / "two.py").write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parent), root=str(ROOT)))
    torchrun(tmp_path / "two.py", tmp_path, *ones)
    for loss, one in ones.items():
        assert largest_difference(one, torch.load(tmp_path / f"{loss}.grad.pt")) < 1e-6


def test_torchrun_trains(tmp_path):
    out = torchrun(ROOT / "recipes/trl_grpo.py", "--loss", "rais", "--steps", "5", "--output-dir", tmp_path)
    assert "rais: share by the rule" in out


def torchrun(*command):
    """Two processes in a session of their own, which ends with them.

    A process that does not end its process group may be aborted at exit (one of eleven runs: "terminate called without
    an active exception", no Python frame left). Ours end it. Should a child be aborted all the same, it may try once
    more, and a warning has its words.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, command)]
    for attempt in range(2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        child = subprocess.Popen(
            run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            out, _ = child.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        if "SIGABRT" not in out or attempt:
            break
        warnings.warn(f"a child was aborted, once more:\n{out}", stacklevel=2)
    assert child.returncode == 0, out
    return out
