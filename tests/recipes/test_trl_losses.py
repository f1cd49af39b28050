"""baselines.py beside TRL's own code: SAPO, and the weights for another engine's samples, in value and gradient.

pip install -r recipes/requirements-trl.txt
OMP_NUM_THREADS=1 python -m pytest tests/recipes/test_trl_losses.py

TRL computes the weights where vLLM has sampled. There is no vLLM here: GRPOTrainer generates with transformers, gets
made-up log-probabilities in the place of vLLM's, and runs its own code from there on.
"""

import inspect
import math

import pytest
import torch

pytest.importorskip("trl", reason="needs recipes/requirements-trl.txt")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from baselines import grpo_loss, gspo_loss, mismatch_weights, sapo_loss  # noqa: E402
from recipes.trl_grpo import prompts, rule, tiny_model  # noqa: E402

G = 4  # rows a group
LOSSES = {  # ours, and how TRL is told to compute the same
    "grpo": (grpo_loss, {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "gspo": (
        gspo_loss,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "sapo": (sapo_loss, {"loss_type": "sapo"}),
}
PREFIX = "vllm_importance_sampling_"
MODES = {  # our kind, and TRL's mode and bounds for it; its own defaults for the sequence mask
    "tis": {"mode": "token_truncate", "clip_max": 2.0},
    "icepop": {"mode": "token_mask", "clip_min": 0.5, "clip_max": 5.0},
    "sequence-mask": {},
}


def trainer_and_batch(tmp_path, monkeypatch, seed=0, spread=0.5, **settings):
    """TRL's trainer and its first generation batch, whose completions have log-probabilities of another sampler."""
    model, tokenizer = tiny_model(seed)
    args = GRPOConfig(
        str(tmp_path),
        seed=seed,
        per_device_train_batch_size=2 * G,
        num_generations=G,
        max_completion_length=12,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        router_aux_loss_coef=0.0,
        **settings,
    )
    given = dict(processing_class=tokenizer, reward_funcs=rule, train_dataset=prompts(seed, 64))
    trainer = GRPOTrainer(model=model, args=args, **given)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    generate = trainer._generate
    draw = torch.Generator().manual_seed(seed)

    def as_if_vllm(prompts):
        result = list(generate(prompts))
        completions, level = result[1], -math.log(model.config.vocab_size)
        assert result[4] is None  # where vLLM's log-probabilities stand
        result[4] = [(level + spread * torch.randn(len(ids), generator=draw)).tolist() for ids in completions]
        trainer.use_vllm = True  # from here on
        return tuple(result)

    monkeypatch.setattr(trainer, "_generate", as_if_vllm)
    return trainer, trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("loss, kind", [("grpo", "tis"), ("gspo", "sequence-mask"), ("sapo", "icepop")])
def test_equals_trl(tmp_path, monkeypatch, loss, kind):
    """The weights, then the loss that takes them and all its gradients: off the policy, with a tool mask."""
    ours, settings = LOSSES[loss]
    spread = 0.1 if kind == "sequence-mask" else 0.7
    modes = {PREFIX + name: value for name, value in MODES[kind].items()}
    trainer, batch = trainer_and_batch(tmp_path, monkeypatch, spread=spread, **settings, **modes)
    mask = batch["completion_mask"].bool()
    weights = mismatch_weights(batch["old_per_token_logps"], batch["sampling_per_token_logps"], mask, kind=kind)
    theirs = batch["importance_sampling_ratio"].expand_as(weights)  # [B, T], or [B, 1]
    torch.testing.assert_close(weights[mask], theirs[mask], atol=1e-6, rtol=1e-6)
    assert weights[mask].unique().numel() > 3  # neither all 0 nor all 1

    draw = torch.Generator().manual_seed(1)
    noise = 1e-3 if loss == "gspo" else 0.3
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + noise * torch.randn(mask.shape, generator=draw)
    batch["tool_mask"] = (torch.rand(mask.shape, generator=draw) < 0.8).long()
    mask = mask & batch["tool_mask"].bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length, values, gradients = batch["completion_ids"].shape[1], [], []
    for who in ("TRL", "ours"):
        trainer.model.zero_grad()
        if who == "TRL":
            value = trainer._compute_loss(trainer.model, batch)
        else:
            new, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention_mask, length)
            value, metrics = ours(new, batch["old_per_token_logps"], batch["advantages"], mask, weights=weights)
        value.backward()
        values.append(value.detach())
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert values[0].item() == pytest.approx(values[1].item(), abs=1e-6)
    assert max((gradients[0][n] - gradients[1][n]).abs().max() for n in gradients[0]) < 1e-6
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3
    assert metrics.get("clip_share", 0.5) > 0 and metrics.get("gate_mean", 0.5) < 1


def test_defaults_are_trls():
    theirs = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    ours = {name: p.default for name, p in inspect.signature(mismatch_weights).parameters.items()}
    assert theirs[PREFIX + "mode"] == "sequence_mask"
    assert [ours["clip_max"], ours["clip_min"]] == [theirs[PREFIX + "clip_max"], theirs[PREFIX + "clip_min"]]
    ours = {name: p.default for name, p in inspect.signature(sapo_loss).parameters.items()}
    assert ours["tau_positive"] == theirs["sapo_temperature_pos"] == 1.0
    assert ours["tau_negative"] == theirs["sapo_temperature_neg"] == 1.05
