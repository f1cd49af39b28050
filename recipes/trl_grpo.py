"""ERPO, RAIS, and GSPO with routing replay (R2) inside TRL's GRPOTrainer.

    python3 -m venv .venv && .venv/bin/pip install -r recipes/requirements-trl.txt
    .venv/bin/python recipes/trl_grpo.py --loss erpo
    .venv/bin/torchrun --nproc_per_node 2 recipes/trl_grpo.py --loss rais

This trains a tiny random Qwen3-MoE on a rule that it can learn in a minute ("low 7 3" wants digits below 5, "high 2"
the others); --random-rewards is the control. For your own model, reward and data, give MoEGRPOTrainer what GRPOTrainer
takes, and a loss:

    MoEGRPOTrainer(loss="rais", loss_options={"base": "gspo"}, model=..., reward_funcs=..., args=GRPOConfig(...), ...)

What it adds to TRL's trainer: the old policy's log-probabilities and routes are recorded once a generation batch, a
microbatch at a time, and travel with it; whole groups stay in one microbatch; ERPO gets the rewards as they are. Where
another engine sampled, every loss gets the weights of baselines.mismatch_weights, by GRPOConfig's settings
vllm_importance_sampling_*. The rest is TRL's, its auxiliary loss included, which moves a router even where every
advantage is 0 (router_aux_loss_coef=0 switches it off). Clip ranges are loss_options; settings that this trainer does
not read are refused. vLLM itself was not run, and its routes are not known here, so replay R3 is not possible. More in
docs/frameworks.md.
"""

import argparse
import contextlib
import math
import os
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root, when run as a file
from baselines import gmpo_loss, grpo_loss, gspo_loss, mismatch_weights, sapo_loss  # noqa: E402
from erpo import erpo_loss  # noqa: E402
from rais import rais_loss  # noqa: E402
from recipes.hf_routing import impose, record  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.routing_report import routing_report  # noqa: E402

ROW_LOSSES = {"grpo": grpo_loss, "gspo": gspo_loss, "gmpo": gmpo_loss, "sapo": sapo_loss, "gspo-replay": gspo_loss}
LOSSES = ("erpo", "rais", *ROW_LOSSES)
# Settings of GRPOConfig that change TRL's loss and would do nothing here.
NOT_READ = """loss_type importance_sampling_level epsilon epsilon_high delta beta sapo_temperature_pos
sapo_temperature_neg off_policy_mask_threshold top_entropy_quantile entropy_coef use_adaptive_entropy""".split()
KINDS = {"token_truncate": "tis", "token_mask": "icepop", "sequence_mask": "sequence-mask"}  # of mismatch_weights


class MoEGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with one of LOSSES; loss_options are its keyword arguments (clip_low, alpha, floor ...)."""

    def __init__(self, model, reward_funcs=None, args=None, *, loss, loss_options=None, **kwargs):
        args = args or GRPOConfig("trl_grpo")
        if loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        for name in NOT_READ:
            if getattr(args, name) != GRPOConfig.__dataclass_fields__[name].default:
                raise UserError(f"leave GRPOConfig's {name} at its default: the losses here do not read it")
        if args.per_device_train_batch_size % args.num_generations:
            raise UserError(
                f"make per_device_train_batch_size ({args.per_device_train_batch_size}) a multiple of num_generations "
                f"({args.num_generations}): a microbatch holds whole groups"
            )
        mode, low = args.vllm_importance_sampling_mode, args.vllm_importance_sampling_clip_min
        if mode not in KINDS or mode == "token_truncate" and low is not None:
            raise UserError(f"vllm_importance_sampling_mode: {', '.join(KINDS)}; token_truncate without a clip_min")
        super().__init__(model, reward_funcs, args, **kwargs)
        self.loss, self.loss_options = loss, loss_options or {}
        self._until_backward = contextlib.ExitStack()

    def _calculate_rewards(self, *args, **kwargs):
        rewards = super()._calculate_rewards(*args, **kwargs)  # [rows of all processes, reward functions]
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(1)  # as TRL adds them up
        self._rewards = weighted.masked_fill(rewards.isnan().all(1), float("nan"))  # no reward at all: ERPO refuses it
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if "num_images" in batch:
            raise UserError("give prompts without images: this trainer's forward passes on text alone")
        first = self.accelerator.process_index * len(inputs)
        batch["rewards"] = self._rewards[first : first + len(inputs)]  # [B], this process's rows
        return batch

    def _prepare_inputs(self, generation_batch):
        """TRL's own without its shuffle of rows, which tears groups apart; the sampler has shuffled the prompts."""
        if not self.model.training:
            return self._record_old_policy(self._generate_and_score_completions(generation_batch))
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            # A microbatch at a time, as the training forward will see it: so the first ratio and gamma are exactly 1.
            self._buffered_inputs = [self._record_old_policy(part) for part in split_tensor_dict(batch, steps)]
        return self._buffered_inputs[self._step % steps]

    @torch.no_grad()
    def _record_old_policy(self, batch):
        with record(self.accelerator.unwrap_model(self.model)) as tape:
            batch["old_per_token_logps"] = self._forward(self.model, batch)[0]  # [B, C]
        batch["old_routes"] = tape.routes(torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1))
        batch["old_router_log_probs"] = tape.router_log_probs().gather(-1, tape.experts)  # [B, P + C, L, K]
        if "sampling_per_token_logps" in batch and self.vllm_importance_sampling_correction:
            batch["mismatch_weights"] = self._mismatch_weights(batch)
        return batch

    def _mismatch_weights(self, batch):
        """pi_old / mu of each token [B, C], mu the sampler, truncated or masked as GRPOConfig says."""
        old, sampler = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
        sampler = torch.where(sampler.isnan(), old, sampler)  # vLLM had none for this token: weight 1, as in TRL
        kind, low = KINDS[self.vllm_importance_sampling_mode], self.vllm_importance_sampling_clip_min
        high = self.vllm_importance_sampling_clip_max
        if kind == "sequence-mask":
            bounds = {"clip_min": low, "clip_max": high}
        else:
            bounds = {"threshold": math.inf if high is None else high, "threshold_lower": low or 0.0}
        return mismatch_weights(old, sampler, self._mask(batch), kind=kind, **bounds)

    def _mask(self, batch):
        """bool [B, C]: completion tokens, without those that a tool wrote, which are no action."""
        return batch["completion_mask"] * batch.get("tool_mask", 1) > 0

    def _forward(self, model, batch):
        """-> log-probs, entropies [B, C] at the sampling temperature (TRL's head divides by it), and the aux loss."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # [B, P + C]
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length, more = batch["completion_ids"].shape[1], {"compute_aux_loss": self.aux_loss_enabled}
        return self._get_per_token_logps_and_entropies(model, ids, attention_mask, length, compute_entropy=True, **more)

    def training_step(self, *args, **kwargs):
        # Gradient checkpointing runs the forward again inside backward: imposed routes have to stay that long.
        with contextlib.ExitStack() as self._until_backward:
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        unwrapped, training = self.accelerator.unwrap_model(model), self.model.training
        with contextlib.ExitStack() as in_eval:
            if self.loss == "gspo-replay":
                (self._until_backward if training else in_eval).enter_context(impose(unwrapped, inputs["old_routes"]))
            with record(unwrapped) as tape:
                log_probs, entropies, aux_loss = self._forward(model, inputs)  # [B, C] each, 0-d
        mask, weights = self._mask(inputs), inputs.get("mismatch_weights")  # [B, C] each, or no weights
        # The routing of a token is that of the position that predicted it, one before its own.
        at = slice(-mask.shape[1] - 1, -1)
        router = tape.router_log_probs().detach()[:, at]  # [B, C, L, E]
        experts, old_experts = tape.experts[:, at], inputs["old_routes"].experts[:, at]  # [B, C, L, K]
        old_router = inputs["old_router_log_probs"][:, at]  # [B, C, L, K], of old_experts

        old_log_probs, options = inputs["old_per_token_logps"], {"weights": weights, **self.loss_options}
        row = (log_probs, old_log_probs, inputs["advantages"], mask)
        if self.loss == "erpo":
            probs, old_probs = router.gather(-1, experts).exp(), old_router.exp()
            routing = (experts, old_experts, probs, old_probs)
            group_size = self.num_generations if training else self.num_generations_eval
            sizes = {"num_experts": router.shape[-1], "group_size": group_size}
            loss, metrics = erpo_loss(log_probs, old_log_probs, inputs["rewards"], mask, *routing, **sizes, **options)
        elif self.loss == "rais":
            loss, metrics = rais_loss(*row, router.gather(-1, old_experts), old_router, **options)
        else:
            loss, metrics = ROW_LOSSES[self.loss](*row, **options)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = aux_loss.detach()
        if weights is not None:
            gap = (old_log_probs - inputs["sampling_per_token_logps"]).nan_to_num(0).abs()  # |log pi_old - log mu|
            for name, x in (("weight", weights), ("logp_difference", gap)):
                metrics[f"sampling/{name}_mean"] = (x * mask).sum() / mask.sum().clamp(min=1)
        metrics["entropy"] = (entropies.detach() * mask).sum() / mask.sum().clamp(min=1)
        report = routing_report(router, old_router, mask, experts=experts, old_experts=old_experts)
        metrics |= {f"routing/{name}": value for name, value in report.items() if value.dim() == 0}
        self._log("train" if training else "eval", metrics)
        return loss / (self.current_gradient_accumulation_steps if training else 1)

    def _log(self, mode, metrics):
        """Into TRL's log, each the mean over processes and microbatches (so gamma_min is a mean of minima)."""
        means = self.accelerator.reduce(torch.stack([m.float() for m in metrics.values()]), "mean").tolist()
        for name, value in zip(metrics, means, strict=True):
            self._metrics[mode][name].append(value)


# ---------------------------------------------------------------------------------------------- a task to try it on

WORDS = ["<pad>", "<eos>", "low", "high", *"0123456789"]


def tiny_model(seed):
    """A random Qwen3-MoE (2 layers, 8 experts, 2 active; 60 thousand weights) and its tokenizer of 14 words."""
    torch.manual_seed(seed)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    more = {"norm_topk_prob": True, "max_position_embeddings": 64, "initializer_range": 0.1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **more)), tokenizer


def prompts(seed, rows=512):
    """Prompts of several lengths: "low" or "high", then up to three digits that mean nothing."""
    draw = random.Random(seed)
    words = [[draw.choice(("low", "high")), *draw.choices("0123456789", k=draw.randrange(4))] for _ in range(rows)]
    return Dataset.from_dict({"prompt": [" ".join(row) for row in words]})


def rule(prompts, completion_ids, log_metric, **_):
    """The share of a completion's tokens that are digits of the half that the prompt asks for."""
    asked = [set(range(4, 9) if prompt.startswith("low") else range(9, 14)) for prompt in prompts]
    shares = [sum(i in half for i in ids) / len(ids) for half, ids in zip(asked, completion_ids, strict=True)]
    log_metric("rule", sum(shares) / len(shares))
    return shares


def random_rewards(prompts, completion_ids, log_metric, **_):
    """The control: rewards that know nothing; the rule's share is logged all the same."""
    rule(prompts, completion_ids, log_metric)
    return [random.random() for _ in prompts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=LOSSES, default="rais")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps, each of 32 rows a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--random-rewards", action="store_true", help="the control: rewards without meaning")
    parser.add_argument("--output-dir", default="runs/trl_grpo")
    args = parser.parse_args()

    torch.set_num_threads(1)  # a model this small gains nothing from threads, and waits for them on a busy machine
    model, tokenizer = tiny_model(args.seed)
    sizes = {"num_generations": 8, "max_completion_length": 12, "per_device_train_batch_size": 16}  # two groups
    steps = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": args.steps}
    quiet = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    device = {"bf16": False, "use_cpu": not torch.cuda.is_available()}
    trainer = MoEGRPOTrainer(
        loss=args.loss,
        model=model,
        processing_class=tokenizer,
        reward_funcs=random_rewards if args.random_rewards else rule,
        train_dataset=prompts(args.seed),
        args=GRPOConfig(args.output_dir, seed=args.seed, learning_rate=args.lr, **sizes, **steps, **quiet, **device),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        shares = [log["rule"] for log in trainer.state.log_history if "rule" in log]
        fifth = max(1, len(shares) // 5)
        first, last = sum(shares[:fifth]) / fifth, sum(shares[-fifth:]) / fifth
        print(f"{args.loss}: share by the rule {first:.3f} in the first fifth, {last:.3f} in the last")
    trainer.accelerator.end_training()
    if trainer.accelerator.num_processes > 1:  # torch's threads outlive DDP, and may abort an interpreter that ends
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
