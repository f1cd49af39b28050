"""Train a mixture-of-experts language model: two plain loops around the loss functions of this folder.

    python train.py                                  a demo of three minutes: dense, MoE, ERL on an embedded text
    python train.py --algo erl --dataset wikitext2   ERL on WikiText-2
    python train.py --algo erpo --dataset addition   reinforcement learning on generated answers

A run has two phases. First `--pretrain-steps` of next-token prediction: of a dense model, which is then upcycled into
experts (dense, lm, erl), or of the MoE itself on reference answers (all others). Then `--steps` of the algorithm.
Read `train_text` and `train_answers`; `run` at the end puts them together. Flags and their defaults are in
support/arguments.py, the run's folder in support/run.py. One process: for more machines see recipes/.
"""

import inspect
import sys
from functools import partial
from typing import NamedTuple

if __name__ == "__main__":
    from support.errors import begin_program

    begin_program()

import torch
from torch import Tensor

import baselines
import data
from erl import Pass, erl_objective, explore
from erpo import erpo_loss
from moe import GPT, MoEConfig, Routes, Routing, router_losses, upcycle
from rais import rais_loss
from support import arguments
from support.arguments import options_of
from support.checkpoints import check_model, find_checkpoint, initial_model, load_checkpoint
from support.demo import demo
from support.device import pick_device
from support.errors import UserError, as_user_error, run_program
from support.generation import Rollout, generate, sampler_of
from support.head import masked_lm_loss, masked_log_probs
from support.optimizer import clip_gradients, set_learning_rate
from support.pictures import plot_curves
from support.routing_report import ratio_report, routing_report
from support.run import Run, State, load_state, open_folder
from support.tasks import Batch, Task, load_task, rng

# Reinforcement learning on generated answers: a name and its loss. What a loss needs is what its parameters are called
# (see `loss_inputs`); its keyword arguments are flags of the program. A new method is a line here.
METHODS = {
    "grpo": baselines.grpo_loss,
    "gspo": baselines.gspo_loss,
    "gmpo": baselines.gmpo_loss,
    "cispo": baselines.cispo_loss,
    "sapo": baselines.sapo_loss,
    "dppo": baselines.dppo_loss,
    "erpo": erpo_loss,
    "rais": rais_loss,
}
EXPLORE, OBJECTIVE, WEIGHTS = map(options_of, (explore, erl_objective, baselines.mismatch_weights))
OPTIONS = {"erl": EXPLORE | OBJECTIVE} | {name: options_of(loss) for name, loss in METHODS.items()}
MISMATCH = {"mismatch_" + n: o._replace(name="mismatch_" + n) for n, o in WEIGHTS.items()}
LOG_EVERY = 10  # steps of text between two lines of metrics.jsonl; of generated answers each step has its line


def values_of(options, args) -> dict:
    return {name: getattr(args, name) for name in options}


# --------------------------------------- Next-token prediction: dense, lm, erl, and the first phase of every algorithm


def train_text(model: GPT, task: Task, args, run: Run, optimizer, peak_lr: float, losses):
    """losses(model, batch, args, step, report) -> (loss, metrics), once an optimizer step; report: with routing's."""
    run.evaluate_before()
    for step in run.steps_to_do():
        lr = set_learning_rate(optimizer, step, run.steps, peak_lr)
        batch, metrics = task.batch(step).to(model.wte.weight.device), {}
        logging = (run.state.step + 1) % LOG_EVERY == 0 or run.state.step + 1 == run.total
        for loss, found in losses(model, batch, args, step, report=logging):  # ERL: one an inner epoch
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            metrics |= found | run.count_update(clip_gradients(model, args.clip_grad))
            optimizer.step()
        run.finish_step(tokens=int(batch.mask.sum()))
        run.evaluate_if_due()
        if logging:
            run.log(metrics, lr)
        run.save_if_due(metrics, optimizer)


def lm_losses(model: GPT, batch: Batch, args, step: int, report: bool):
    """L_o of the plain MoE (or dense) model, once. -> (loss, metrics)"""
    noise, hidden = jitter(model, batch, args, step), model.stem(batch.tokens[:, :-1])
    original, metrics = original_pass(model, hidden, batch, args, noise, report)
    yield original.loss, metrics


def erl_losses(model: GPT, batch: Batch, args, step: int, report: bool, explore=explore):
    """ERL's objective on one batch, once an inner epoch. -> (loss, metrics)

    The passes share what lies before the first block with experts, and the noise on the routers' input if there is
    any: they differ in their routes alone.
    """
    tokens, m, noise = batch.tokens[:, :-1], args.n_perturb, jitter(model, batch, args, step)
    hidden, targets = model.stem(tokens), batch.tokens[:, 1:].repeat(m, 1)  # [B, T, D], [m * B, T]
    original, original_metrics = original_pass(model, hidden, batch, args, noise, report)

    def forward(routes):
        if routes is None:
            return original
        # Apart from the original, not in one batch with it: the backward then leaves out what follows the last router
        # of the perturbed passes, which nothing but their LM loss needs.
        with torch.set_grad_enabled(args.erl_grad == "all" or args.wpl):
            shared = hidden if args.inner_epochs == 1 else model.stem(tokens)  # a later epoch has other weights
            repeated = noise and [n.repeat(m, 1, 1) for n in noise]
            features, routing = model.branch(shared.repeat(m, 1, 1), Routes(*routes), noise=repeated)
        # "router": the routers are asked again about what they saw, and the gradient stops there.
        logits = model.route_again(routing.inputs) if args.erl_grad == "router" else routing.logits
        if args.wpl:
            lm_loss, log_probs = masked_lm_loss(model, features, targets, batch.mask.repeat(m, 1))
        else:  # the RL loss sends no gradient through the head, and reads log p where a decision was replaced
            with torch.no_grad():
                lm_loss, log_probs = None, masked_log_probs(model, features, targets, routes[1].any(-1))
        return log_probs, logits.log_softmax(-1), lm_loss

    dtype, generator = getattr(torch, args.dtype), rng(args.seed, "routes", step)
    paths = explore(forward, batch.mask, args.top_k, dtype=dtype, generator=generator, **values_of(EXPLORE, args))
    for loss, metrics in erl_objective(forward, paths, **values_of(OBJECTIVE, args)):
        yield loss, original_metrics | metrics


def original_pass(model: GPT, hidden: Tensor, batch: Batch, args, noise, report: bool) -> tuple[Pass, dict]:
    """L_o (ERL section 3.3): LM loss, and the balance and z losses over every token that is not padding.

    -> log p [B, T] of the next token (0 where the prediction does not count), log P [B, T, L, E], L_o; and metrics.
    """
    features, routing = model.branch(hidden, noise=noise)
    loss, log_probs = masked_lm_loss(model, features, batch.tokens[:, 1:], batch.mask)
    metrics = {"loss": loss.detach()}
    if routing.logits.shape[2]:
        balance, z, _ = router_losses(routing.logits, routing.experts, batch.routed)  # [L], [L]
        loss = loss + args.balance_coef * balance.sum() + args.z_coef * z.sum()  # Switch: each MoE layer adds its own
        metrics |= {"balance_loss": balance.detach().mean(), "z_loss": z.detach().mean()}
        if report:
            metrics |= routing_report(routing.logits, mask=batch.routed, experts=routing.experts)
    return Pass(log_probs, routing.logits.detach().log_softmax(-1), loss), metrics


def jitter(model: GPT, batch: Batch, args, step: int) -> list[Tensor] | None:
    """Switch's noise on the routers' input, factors from U(1 - jitter, 1 + jitter), the same for every pass of a step.

    -> L tensors [B, T, D], or None, the default.
    """
    layers = len(model.config.moe_blocks)
    if not args.jitter or not layers:
        return None
    draw = torch.rand(layers, *batch.mask.shape, model.config.n_embd, generator=rng(args.seed, "jitter", step))
    return list(1 + args.jitter * (2 * draw.to(model.wte.weight.device) - 1))


# ---------------------------------------------------------------- Reinforcement learning on generated answers: METHODS


class Policy(NamedTuple):
    """What a policy says of given responses, index t for the token that position t predicts."""

    log_probs: Tensor  # [B, T], 0 outside the response
    experts: Tensor  # int64 [B, T, L, K], its own, or those that were imposed on it
    expert_log_probs: Tensor  # [B, T, L, K], log P of `experts`


def rows_of(record, rows: Tensor):
    """Some rows of a Rollout or a Policy."""
    return type(record)(*(t[rows] for t in record))


def train_answers(model: GPT, task: Task, args, run: Run, optimizer):
    G, N, device = args.group_size, args.prompts_per_step, model.wte.weight.device
    run.evaluate_before()
    for step in run.steps_to_do():
        lr = set_learning_rate(optimizer, step, run.steps, args.lr)
        examples, prompts = task.prompts(step, N, G)  # N * G rows, those of a group next to each other
        rollout = sample(model, prompts, task, args, step)
        rewards = task.rewards(rollout, examples).to(device)  # [N * G]
        advantages = baselines.group_advantages(rewards, G)
        old, updates = policy_before(model, rollout, args), []
        for rows, share in minibatches(rewards, args):
            part, old_part = rows_of(rollout, rows), rows_of(old, rows)
            routes = None if args.replay == "none" else old_part.experts
            policy, routing = policy_forward(model, part, args, routes)
            report = moved_routes(policy, routing, old_part, part, args)
            at_old_experts = routing.expert_log_probs(old_part.experts)  # [B, T, L, K]
            if not updates:
                # Nothing has been updated yet: the old policy is this one. The numbers recorded before differ from it
                # by rounding (other matrix shapes), and the first ratio of a batch must be exactly 1.
                old_part = Policy(policy.log_probs.detach(), policy.experts, policy.expert_log_probs.detach())
                at_old_experts = routing.expert_log_probs()
            given = policy, at_old_experts, old_part, part, rewards[rows], advantages[rows]
            loss, metrics = METHODS[args.algo](**loss_inputs(*given, model.config, args))
            optimizer.zero_grad(set_to_none=True)
            (loss * share + balance_loss(routing, part, args)).backward()
            norms = run.count_update(clip_gradients(model, args.clip_grad))
            optimizer.step()
            updates.append(report | metrics | norms | {"loss": loss.detach() * share})
        metrics = rollout_metrics(rollout, rewards, task, args) | mean_metrics(updates)
        if not same_arithmetic(args):
            metrics |= engine_metrics(old, rollout)
        run.finish_step(tokens=int(rollout.response_mask.sum()))
        run.evaluate_if_due()
        run.log(metrics, lr)
        run.save_if_due(metrics, optimizer)


def sample(model: GPT, prompts, task: Task, args, step: int) -> Rollout:
    """Responses of the sampler, mu: the model itself, or what an engine of another precision makes of its weights."""
    how = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
    how |= {"end_token": task.tokenizer.end, "generator": rng(args.seed, "rollout", step)}
    if args.rollout_dtype == args.dtype:
        return generate(model, prompts, **how)
    with torch.autocast(model.wte.weight.device.type, enabled=False):
        return generate(sampler_of(model, getattr(torch, args.rollout_dtype)), prompts, **how)


def policy_before(model: GPT, rollout: Rollout, args) -> Policy:
    """pi_old, the trainer's policy before the first update, on all rows of a batch.

    Where sampler and trainer both compute in float32 it is what the rollout recorded, within rounding. Otherwise the
    trainer is asked: along its own routes, or with R3 along the sampler's.
    """
    if same_arithmetic(args):
        return Policy(rollout.log_probs, rollout.experts, rollout.expert_log_probs)
    every, parts = torch.arange(len(rollout.tokens), device=rollout.tokens.device), []
    with torch.no_grad():
        for rows in every.chunk(args.minibatches):
            part = rows_of(rollout, rows)
            parts.append(policy_forward(model, part, args, part.experts if args.replay == "r3" else None)[0])
    return Policy(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def same_arithmetic(args) -> bool:
    """Whether sampler and trainer agree within rounding (in bfloat16 forwards of other shapes differ by more)."""
    return args.dtype == args.rollout_dtype == "float32"


def minibatches(rewards: Tensor, args):
    """Rows of each minibatch, whole groups of them, and their share of the minibatch.

    The rows of a group of equal rewards (nothing to prefer) add exactly 0 to a loss that is a mean over rows, so
    they get no forward; a minibatch of nothing else gets no update.
    """
    equal = zero_variance_groups(rewards, args.group_size).repeat_interleave(args.group_size)  # [B]
    for rows in torch.arange(len(rewards), device=rewards.device).chunk(args.minibatches):
        learned = rows[~equal[rows]]
        if len(learned):
            yield learned, len(learned) / len(rows)


def zero_variance_groups(rewards: Tensor, group_size: int) -> Tensor:
    return (baselines.group_advantages(rewards, group_size) == 0).view(-1, group_size).all(1)


def policy_forward(model: GPT, rollout: Rollout, args, routes: Tensor | None) -> tuple[Policy, Routing]:
    """Teacher-forced forward over a rollout's rows, along the model's own routes or imposed experts [B, T, L, K].

    Imposed experts have the weights that the router gives them today (replay).
    """
    mask, forced = rollout.response_mask, torch.ones_like(rollout.experts[..., 0], dtype=torch.bool)
    replayed = None if routes is None else Routes(routes, forced, uniform=False)
    features, routing = model(rollout.tokens[:, :-1], routes=replayed)
    log_probs = masked_log_probs(model, features, rollout.tokens[:, 1:], mask, args.temperature)
    return Policy(log_probs, routing.experts, routing.expert_log_probs()), routing


def balance_loss(routing: Routing, rollout: Rollout, args) -> Tensor | float:
    """Decision: 0 by default. A group of equal rewards must give no update, and whether it helps here is open."""
    if not args.answer_balance_coef:
        return 0.0
    routed = rollout.response_mask.flip(1).cumsum(1).flip(1) > 0  # prompt and response: up to the last response token
    return args.answer_balance_coef * router_losses(routing.logits, routing.experts, routed)[0].sum()


def loss_inputs(policy: Policy, at_old_experts, old: Policy, rollout: Rollout, rewards, advantages, config, args):
    """What the chosen loss asks for, by the names of its parameters, and its options."""
    given = {
        "log_probs": policy.log_probs,  # [B, T]
        "old_log_probs": old.log_probs,
        "rewards": rewards,  # [B]
        "advantages": advantages,  # [B]
        "response_mask": rollout.response_mask,  # [B, T]
        "experts": policy.experts,  # [B, T, L, K], the new policy's own
        "old_experts": old.experts,
        "expert_probs": policy.expert_log_probs.exp(),
        "old_expert_probs": old.expert_log_probs.exp(),
        "router_log_probs": at_old_experts,  # both at the experts that the OLD policy used
        "old_router_log_probs": old.expert_log_probs,
        "num_experts": config.n_expert,
        "group_size": args.group_size,
    }
    if args.mismatch != "none":
        options = {name.removeprefix("mismatch_"): value for name, value in values_of(MISMATCH, args).items()}
        mu, mask = rollout.log_probs, rollout.response_mask
        given["weights"] = baselines.mismatch_weights(old.log_probs, mu, mask, kind=args.mismatch, **options)
    if args.algo == "dppo" and args.rollout_dtype != args.dtype:
        given["old_log_probs"] = rollout.log_probs  # its anchor is the sampler itself
    wanted = inspect.signature(METHODS[args.algo]).parameters
    return {name: given[name] for name in wanted if name in given} | values_of(OPTIONS[args.algo], args)


def rollout_metrics(rollout: Rollout, rewards: Tensor, task: Task, args) -> dict:
    lengths = rollout.response_mask.sum(1).float()
    ended = ((rollout.tokens[:, 1:] == task.tokenizer.end) & rollout.response_mask).any(1)
    return {
        "reward_mean": rewards.mean(),
        "reward_std": rewards.std(),
        "accuracy": (rewards >= 1).float().mean(),
        "response_length": lengths.mean(),
        "cut_responses": 1 - ended.float().mean(),  # share without an end token: --max-new-tokens was too few
        "silent_groups": zero_variance_groups(rewards, args.group_size).float().mean(),
        "entropy": (rollout.entropies.sum(1) / lengths.clamp(min=1)).mean(),
    }


def engine_metrics(old: Policy, rollout: Rollout) -> dict:
    """How far the trainer before its updates is from the sampler over response tokens: ratio and experts."""
    differs = (old.experts.sort(-1).values != rollout.experts.sort(-1).values).any(-1)[rollout.response_mask]  # [n, L]
    moved = {"engine_moved_tokens": differs.any(-1).float().mean(), "engine_moved_decisions": differs.float().mean()}
    return moved | ratio_report("engine", old.log_probs, rollout.log_probs, rollout.response_mask)


def moved_routes(policy: Policy, routing: Routing, old: Policy, rollout: Rollout, args) -> dict:
    """How far the router, and with three policies the ratio, is from what they were before the updates."""
    experts = {"experts": policy.experts, "old_experts": old.experts}
    report = routing_report(routing.logits, old.expert_log_probs, rollout.response_mask, **experts)
    if not same_arithmetic(args):  # the other part of the ratio is engine_metrics'
        report |= ratio_report("update", policy.log_probs, old.log_probs, rollout.response_mask)
    # RAIS's own metrics have the plain names, and 1 in the first update of a batch, where its old policy is the new one
    return {name.replace("gamma", "rollout_gamma").replace("floor", "rollout_floor"): x for name, x in report.items()}


def mean_metrics(updates: list[dict]) -> dict:
    """Means over the updates of a step; of -log ratio without the first one too, where it is 0 by construction."""
    metrics = {name: sum(u[name] for u in updates) / len(updates) for name in (updates[0] if updates else ())}
    if (later := updates[1:]) and "ratio_neg_log" in metrics:  # a method need not report it
        metrics["ratio_neg_log_later"] = sum(u["ratio_neg_log"] for u in later) / len(later)
    return {"loss": 0.0} | metrics | {"updates": len(updates)}


# --------------------------------------------------------------------------------------------------------------- A run


def run(args, *, explore=explore) -> dict:
    """One training run from its arguments (see `parse`) to summary.json, whose content it returns.

    A control of ERL puts a function of its own in the place of `explore` (see support/demo.py).
    """
    with as_user_error():
        device, generative = pick_device(args.device), args.algo in METHODS
        check_options(args)

    def prepare(model: GPT, experts: bool = True) -> GPT:
        """The one place where a model gets its experts, its device and the compiler."""
        if experts and model.config != target:
            model = upcycle(model, target, rng(args.seed, "routers"))
        for name, parameter in model.to(device).named_parameters():
            parameter.requires_grad_(not (args.freeze_router and name.endswith("router.weight")))
        if args.compile:
            model.stem, model.branch = torch.compile(model.stem), torch.compile(model.branch)
        return model

    tokenizer = data.prepare(args.dataset, args.tokenizer, args.data_dir)
    if args.resume and (checkpoint := find_checkpoint(args.out)):
        with as_user_error():
            model, metadata, optimizer_tensors = load_checkpoint(checkpoint)
        state, target = load_state(args, metadata), check_model(args, tokenizer, model, checkpoint)
    else:
        model, target = initial_model(args, tokenizer, dense_first=not generative)
        state, optimizer_tensors = State(), {}
    task = load_task(args, target.context, generative)
    if state.fingerprint not in ("", task.fingerprint):
        raise UserError(f"the records of {args.dataset} have changed since {args.out} began: put them back to resume")
    state.fingerprint = task.fingerprint
    arguments.fill_steps(args, task, generative)
    open_folder(args)
    process = Run(args, state, {"supervised": args.pretrain_steps, args.algo: args.steps}, task, prepare)
    # Without its cache: the bfloat16 copies of the weights would outlive the updates, and those that generation makes
    # without a gradient would serve the forward that needs one.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16", cache_enabled=False)
    with process.open(), autocast:
        arguments.announce(args, state.step, *GPT(target).count_parameters())
        if state.step < args.pretrain_steps:
            model = prepare(model, experts=generative)
            optimizer = process.begin("supervised", model, optimizer_tensors)
            train_text(model, task, args, process, optimizer, args.pretrain_lr, lm_losses)
        model = prepare(model)
        optimizer = process.begin(args.algo, model, optimizer_tensors)
        if generative:
            train_answers(model, task, args, process, optimizer)
        else:
            losses = partial(erl_losses, explore=explore) if args.algo == "erl" else lm_losses
            train_text(model, task, args, process, optimizer, args.lr, losses)
        summary = process.finish()
    plot_curves(args.out)
    print(process.result_line(summary))
    return summary


def parse(argv: list[str]):
    return arguments.parse(argv, __doc__.split("\n\n")[0], OPTIONS, MISMATCH)


def check_options(args):
    """Let the losses themselves refuse options before any work is done: they are called on a few zeros. ValueError."""
    if args.algo in METHODS:
        B, T = args.group_size, 2
        zeros, mask, rows = torch.zeros(B, T, requires_grad=True), torch.ones(B, T, dtype=torch.bool), torch.zeros(B)
        experts, P = torch.zeros(B, T, 1, 1, dtype=torch.long), torch.zeros(B, T, 1, 1)
        policy = Policy(zeros, experts, P)
        log_mu = torch.tensor([[0.0, -10.0]]).expand(B, T)  # the second token is far outside any band
        rollout = Rollout(torch.zeros(B, T + 1, dtype=torch.long), mask, log_mu, zeros.detach(), experts, P)
        check_loss(args.algo, loss_inputs(policy, P, policy, rollout, rows, rows, MoEConfig(), args), args)
    elif args.algo == "erl":

        def forward(routes):
            rows, E = 2 if routes is None else len(routes[0]), max(2, args.top_k)
            return torch.zeros(rows, 1), torch.zeros(rows, 1, 1, E, requires_grad=True), torch.zeros(())

        paths = explore(forward, torch.ones(2, 1, dtype=torch.bool), args.top_k, **values_of(EXPLORE, args))
        next(erl_objective(forward, paths, **values_of(OBJECTIVE, args)))


def check_loss(name: str, inputs: dict, args):
    """ValueError unless the loss takes these arguments and returns what the loop needs."""
    try:
        result = METHODS[name](**inputs)
    except TypeError as error:
        raise ValueError(f"the loss of {name} cannot be called with {', '.join(inputs)}: {error}") from error
    if "weights" not in inputs and args.mismatch != "none":
        raise ValueError(f"the loss of {name} has no argument weights: leave --mismatch out")
    loss = result[0] if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict) else None
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        raise ValueError(f"the loss of {name} must return (loss, metrics): a 0-d tensor with gradient, and a dict")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_program("train.py", lambda: run(parse(argv)) if argv else demo(run, parse))


if __name__ == "__main__":
    sys.exit(main())
