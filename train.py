"""Train a mixture-of-experts language model: two plain loops around the loss functions of this folder.

    python train.py                                  a demo of three minutes: dense, MoE, ERL on an embedded text
    python train.py --algo erl --dataset wikitext2   ERL on WikiText-2
    python train.py --algo erpo --dataset addition   reinforcement learning on generated answers

A run has two phases. First `--pretrain-steps` of next-token prediction: of a dense model, which is then upcycled into
experts (dense, lm, erl), or of the MoE itself on reference answers (all others). Then `--steps` of the algorithm.
Read `train_text` and `train_answers`, then `run` for the order of events. Flags and their defaults, a peak
learning rate's too, are in support/command_line.py, its schedule in support/optimizer.py; what a step writes down, and
what a resumed run reads, in support/run_folder.py.

One process: for more machines see recipes/.
"""

import inspect
import os
import sys
from functools import partial
from typing import NamedTuple

# PyTorch reads these when it is imported; a user's own setting wins. On Linux it then asks for huge pages for tensors
# of 2 MB and more: fresh memory, page by page, was 30 % of the time of a layer of 128 experts.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# A thread that waits for its team looks 2,000 times (50 us) before it sleeps: 97 % of a step's parallel regions begin
# sooner. OpenMP's own 300,000 keep a core from the process that it waits for, and a step took 4 to 8 times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if __name__ == "__main__":
    from support.errors import begin_program

    begin_program()

import torch
from torch import Tensor

import data
from baselines import cispo_loss, gmpo_loss, group_advantages, grpo_loss, gspo_loss
from erl import erl_objective, explore
from erpo import erpo_loss
from moe import GPT, MoEConfig, Routes, router_losses, upcycle
from rais import rais_loss
from support import command_line
from support.arguments import options_of
from support.checkpoints import load_model
from support.device import pick_device
from support.errors import plainly, say, sentence
from support.fast import speed_up
from support.generation import Rollout, generate
from support.initial import check_model, check_step, initial_model
from support.pictures import plot_curves
from support.routing_report import routing_report
from support.run_folder import NEW_STATE, Run, find_checkpoint, load_state, open_folder, write_json
from support.tasks import Batch, Task, load_task, rng

# Reinforcement learning on generated answers: a name and its loss. What a loss needs is what its parameters are called
# (see `loss_inputs`); its keyword arguments are flags of the program. A new method is a line here.
METHODS = {
    "grpo": grpo_loss,
    "gspo": gspo_loss,
    "gmpo": gmpo_loss,
    "cispo": cispo_loss,
    "erpo": erpo_loss,
    "rais": rais_loss,
}
EXPLORE, OBJECTIVE = options_of(explore), options_of(erl_objective)
OPTIONS = {"erl": EXPLORE | OBJECTIVE} | {name: options_of(loss) for name, loss in METHODS.items()}


def option_values(options, args) -> dict:
    """The values of some options of a loss."""
    return {name: getattr(args, name) for name in options}


# ---------------------------------------------------------------------------------------------------------------------
# Next-token prediction: dense, lm, erl, and the first phase of every algorithm
# ---------------------------------------------------------------------------------------------------------------------


def train_text(model: GPT, task: Task, args, run: Run, algo: str):
    losses = erl_losses if algo == "erl" else lm_losses
    for step in run.steps():
        batch, report = task.batch(step).to(model.wte.weight.device), {}
        for loss, metrics in losses(model, batch, args, step):  # ERL: one an inner epoch
            report |= metrics | run.update(loss)
        routing = report.pop("routing", None)  # the router's own, of the original pass
        run.after(report, tokens=int(batch.mask.sum()), more=partial(describe_routing, routing, batch))


def lm_losses(model: GPT, batch: Batch, args, step: int):
    """L_o of the plain MoE (or dense) model, once. -> (loss, metrics)"""
    features, routing = model.branch(model.stem(batch.tokens[:, :-1]), noise=jitter(model, batch, args, step))
    yield original_loss(model, features, routing, batch, args)[:2]


def erl_losses(model: GPT, batch: Batch, args, step: int):
    """ERL's objective on one batch, once an inner epoch. -> (loss, metrics)

    All passes share what lies before the first router, and the noise on the routers' input if there is any: they
    differ in their routes alone.
    """
    tokens, m, shared, original_metrics = batch.tokens, args.n_perturb, None, {}
    noise = jitter(model, batch, args, step)

    def forward(routes):
        nonlocal shared  # what lies before the first router: the original pass leaves it to the first perturbed one
        hidden = model.stem(tokens[:, :-1]) if shared is None else shared  # [B, T, D]
        shared = hidden if routes is None else None  # a later inner epoch has other weights
        if routes is None:
            features, routing = model.branch(hidden, noise=noise)
            loss, metrics, log_probs = original_loss(model, features, routing, batch, args)
            original_metrics.update(metrics)
            return log_probs, routing.logits.detach().log_softmax(-1), loss
        # Apart from the original, not in one batch with it: the backward then leaves out what follows the last router
        # of the perturbed passes, which nothing but their LM loss needs.
        repeated = None if noise is None else [n.repeat(m, 1, 1) for n in noise]
        with torch.set_grad_enabled(args.erl_grad == "all" or args.wpl):
            routes_1_over_k = Routes(*routes, uniform=True)  # weight 1/K each (eq. 9)
            features, routing = model.branch(hidden.repeat(m, 1, 1), routes_1_over_k, noise=repeated)
        # "router": the routers are asked again about what they saw, and the gradient stops there.
        logits = model.route_again(routing.inputs) if args.erl_grad == "router" else routing.logits
        log_probs, lm_loss = perturbed_log_probs(model, features, batch, routes[1], args)
        return log_probs, logits.log_softmax(-1), lm_loss

    dtype, generator = getattr(torch, args.dtype), rng(args.seed, "routes", step)
    paths = explore(forward, batch.mask, args.top_k, dtype=dtype, generator=generator, **option_values(EXPLORE, args))
    for loss, metrics in erl_objective(forward, paths, **option_values(OBJECTIVE, args)):
        yield loss, original_metrics | metrics


def original_loss(model: GPT, features, routing, batch: Batch, args):
    """L_o (ERL section 3.3): LM loss, and the balance and z losses over every token that is not padding.

    -> L_o, metrics, log p [B, T] of the next token without gradient, 0 where the prediction does not count.
    """
    mask, device = batch.mask, features.device
    lm_loss, picked = model.lm_loss(*select_positions(mask, features, batch.tokens[:, 1:]))
    log_probs = picked.new_zeros(mask.shape).masked_scatter(mask.to(device), picked)
    metrics = {"loss": lm_loss.detach()}
    if not routing.logits.shape[2]:
        return lm_loss, metrics, log_probs
    balance, z, _ = router_losses(routing.logits, routing.experts, batch.routed)  # [L], [L]
    loss = lm_loss + args.balance_coef * balance.sum() + args.z_coef * z.sum()  # Switch: each MoE layer adds its own
    metrics |= {"balance_loss": balance.detach().mean(), "z_loss": z.detach().mean()}
    metrics["routing"] = routing._replace(logits=routing.logits.detach(), inputs=())
    return loss, metrics, log_probs


def describe_routing(routing, batch: Batch) -> dict:
    """Load, entropy and the like over every token that is not padding; nothing of a dense model."""
    return {} if routing is None else routing_report(routing.logits, mask=batch.routed, experts=routing.experts)


def perturbed_log_probs(model: GPT, features, batch: Batch, S, args):
    """log p [m * B, T] of the next token along perturbed routes, 0 where it is not read, and their LM loss or None.

    The RL loss sends no gradient through the head, and needs it at S alone; the LM loss of wPL needs all of it.
    """
    targets = batch.tokens[:, 1:].repeat(args.n_perturb, 1)
    if args.wpl:
        mask = batch.mask.repeat(args.n_perturb, 1)
        lm_loss, picked = model.lm_loss(*select_positions(mask, features, targets))
    else:
        mask, lm_loss = S.any(-1), None
        with torch.no_grad():
            picked = model.token_log_probs(*select_positions(mask, features, targets))
    return picked.new_zeros(mask.shape).masked_scatter(mask.to(features.device), picked), lm_loss


def select_positions(mask: Tensor, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, D] and targets [n] of the n positions where mask [B, T] is True: what the head is asked about.

    Over 50,257 words the head is most of a small model's work, and prompts and padding are most of a task's rows. Where
    the mask lies on the CPU, nothing waits for the device.
    """
    features, targets, places = features.flatten(0, 1), targets.flatten(), mask.flatten().nonzero().squeeze(1)
    if len(places) == len(targets):
        return features, targets
    places = places.to(features.device)
    return features.index_select(0, places), targets.index_select(0, places)


def jitter(model: GPT, batch: Batch, args, step: int):
    """Switch's noise on the routers' input, the same for every pass of a step; None by default."""
    return model.jitter(batch.mask.shape, args.jitter, rng(args.seed, "jitter", step))


# ---------------------------------------------------------------------------------------------------------------------
# Reinforcement learning on generated answers: METHODS
# ---------------------------------------------------------------------------------------------------------------------


class Policy(NamedTuple):
    """What a policy says of given responses, index t for the token that position t predicts."""

    log_probs: Tensor  # [B, T], 0 outside the response
    experts: Tensor  # [B, T, L, K]
    expert_log_probs: Tensor  # [B, T, L, K], log P of `experts`
    log_probs_at_old_experts: Tensor  # [B, T, L, K], log P (of this policy) of the experts that the rollout used
    router_logits: Tensor | None = None  # [B, T, L, E]; a rollout keeps none


def train_answers(model: GPT, task: Task, args, run: Run):
    G, N, device = args.group_size, args.prompts_per_step, model.wte.weight.device
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
    for step in run.steps():
        examples, prompts = task.prompts(step, N, G)  # N * G rows, those of a group next to each other
        generator = rng(args.seed, "rollout", step)
        rollout = generate(model, prompts, end_token=task.tokenizer.end, generator=generator, **sampling)
        rewards = task.rewards(rollout, examples).to(device)  # [N * G]
        advantages = group_advantages(rewards, G)
        if args.dtype != "float32":  # bfloat16 forwards of other shapes differ by more than rounding: ask once more
            rollout = recorded_again(model, rollout, args)
        updates = []
        for rows, share in minibatches(rewards, args):
            part = Rollout(*(t[rows] for t in rollout))
            new, aux_loss = policy_forward(model, part, args)
            if not updates:
                # Nothing has been updated yet: the old policy is this one. The numbers recorded while sampling differ
                # from it by rounding (other matrix shapes), and the first ratio of a batch must be exactly 1.
                old = Policy(*(t.detach() for t in new))
            else:
                old = Policy(part.log_probs, part.experts, part.expert_log_probs, part.expert_log_probs)
            inputs = loss_inputs(new, old, rewards[rows], advantages[rows], part.response_mask, model.config, args)
            loss, metrics = METHODS[args.algo](**inputs)
            norms = run.update(loss * share + aux_loss)
            updates.append(moved_routes(new, part) | metrics | norms | {"loss": loss.detach() * share})
        metrics = rollout_metrics(rollout, rewards, G) | mean_metrics(updates)
        run.after(metrics, tokens=int(rollout.response_mask.sum()), every=1)


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
    return (group_advantages(rewards, group_size) == 0).view(-1, group_size).all(1)


def policy_forward(model: GPT, rollout: Rollout, args) -> tuple[Policy, Tensor | float]:
    """Teacher-forced forward over a rollout's rows, with gradient, and the balance loss if it is asked for.

    Decision: by default it is not. A group of equal rewards must give no update, and whether it helps here is open.
    """
    routes, mask = None, rollout.response_mask
    if args.replay == "routing":  # the experts of the rollout, weighted by the router of today
        routes = Routes(rollout.experts, torch.ones_like(rollout.experts[..., 0], dtype=torch.bool), uniform=False)
    features, routing = model.branch(model.stem(rollout.tokens[:, :-1]), routes)
    picked = model.token_log_probs(*select_positions(mask, features, rollout.tokens[:, 1:]), args.temperature)
    log_probs = picked.new_zeros(mask.shape).masked_scatter(mask, picked)
    aux_loss = 0.0
    if args.answer_balance_coef:
        routed = mask.flip(1).cumsum(1).flip(1) > 0  # prompt and response: up to the last response token
        aux_loss = args.answer_balance_coef * router_losses(routing.logits, routing.experts, routed)[0].sum()
    at_old_experts = routing.expert_log_probs(rollout.experts)
    policy = Policy(log_probs, routing.experts, routing.expert_log_probs(), at_old_experts, routing.logits)
    return policy, aux_loss


def loss_inputs(new: Policy, old: Policy, rewards, advantages, response_mask, config: MoEConfig, args) -> dict:
    """What the chosen loss asks for, by the names of its parameters, and its options."""
    given = {
        "log_probs": new.log_probs,  # [B, T]
        "old_log_probs": old.log_probs,
        "rewards": rewards,  # [B]
        "advantages": advantages,  # [B]
        "response_mask": response_mask,  # [B, T]
        "experts": new.experts,  # [B, T, L, K], the new policy's own
        "old_experts": old.experts,
        "expert_probs": new.expert_log_probs.exp(),
        "old_expert_probs": old.expert_log_probs.exp(),
        "router_log_probs": new.log_probs_at_old_experts,  # both at the experts that the OLD policy used
        "old_router_log_probs": old.log_probs_at_old_experts,
        "num_experts": config.n_expert,
        "group_size": args.group_size,
    }
    wanted = inspect.signature(METHODS[args.algo]).parameters
    return {name: given[name] for name in wanted if name in given} | option_values(OPTIONS[args.algo], args)


def recorded_again(model: GPT, rollout: Rollout, args) -> Rollout:
    """The rollout as a forward of the updates' shapes sees it."""
    with torch.no_grad():
        seen, _ = policy_forward(model, rollout, args)
    return rollout._replace(log_probs=seen.log_probs, experts=seen.experts, expert_log_probs=seen.expert_log_probs)


def rollout_metrics(rollout: Rollout, rewards: Tensor, group_size: int) -> dict:
    lengths = rollout.response_mask.sum(1).float()
    return {
        "reward_mean": rewards.mean(),
        "reward_std": rewards.std(),
        "accuracy": (rewards >= 1).float().mean(),
        "response_length": lengths.mean(),
        "silent_groups": zero_variance_groups(rewards, group_size).float().mean(),
        "entropy": (rollout.entropies.sum(1) / lengths.clamp(min=1)).mean(),
    }


def moved_routes(new: Policy, rollout: Rollout) -> dict:
    """How far the updated router is from the one that wrote the responses: agreement, gamma, entropy, load ..."""
    mask = rollout.response_mask
    old, experts = rollout.expert_log_probs, {"experts": new.experts, "old_experts": rollout.experts}
    report = routing_report(new.router_logits, old, mask, **experts)
    # gamma against the rollout; RAIS's own metrics of that name are against the policy that its ratio compares with
    return {name.replace("gamma", "rollout_gamma").replace("floor", "rollout_floor"): x for name, x in report.items()}


def mean_metrics(updates: list[dict]) -> dict:
    """Means over the updates of a step; of -log ratio without the first one too, where it is 0 by construction."""
    metrics = {name: sum(u[name] for u in updates) / len(updates) for name in (updates[0] if updates else ())}
    if (later := updates[1:]) and "ratio_neg_log" in metrics:  # a method need not report it
        metrics["ratio_neg_log_later"] = sum(u["ratio_neg_log"] for u in later) / len(later)
    return {"loss": 0.0} | metrics | {"updates": len(updates)}


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def run(args) -> dict:
    """One training run from its arguments (see `parse`) to summary.json, whose content it returns."""
    device, generative = plainly(pick_device, args.device), args.algo in METHODS
    check_options(args)

    def prepare(model: GPT) -> GPT:
        """The one place where a model gets its device, its fast kernels and the compiler."""
        model = speed_up(model.to(device))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (args.freeze_router and name.endswith("router.weight")))
        if args.compile:
            model.stem, model.branch = torch.compile(model.stem), torch.compile(model.branch)
        return model

    tokenizer = data.prepare(args.dataset, args.tokenizer, args.data_dir)
    checkpoint = find_checkpoint(args.out) if args.resume else None
    if checkpoint:
        model, state = plainly(load_model, os.path.join(checkpoint, "model.safetensors"))[0], load_state(checkpoint)
        target = check_model(args, tokenizer, model, f"the checkpoint in {args.out}")
    else:
        model, target = initial_model(args, tokenizer, dense_first=not generative)
        state = dict(NEW_STATE)
    task = load_task(args, target.context, generative)
    command_line.fill_steps(args, task, generative)
    check_step(state["step"], model.config, target, args)
    phases = {"supervised": args.pretrain_steps, args.algo: args.steps}
    open_folder(args)
    process = Run(args, state, phases, prepare)
    # Without its cache: the bfloat16 copies of the weights would outlive the updates, and those that generation makes
    # without a gradient would serve the forward that needs one.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16", cache_enabled=False)
    with process.open(), autocast:
        command_line.describe(args, state["step"], *GPT(target).count_parameters())
        if state["step"] < args.pretrain_steps:
            if generative and model.config != target:
                model = upcycle(model, target, rng(args.seed, "routers"))
            model = prepare(model)
            process.begin("supervised", model, task, args.pretrain_lr)
            train_text(model, task, args, process, "supervised")
        if model.config != target:
            model = upcycle(model, target, rng(args.seed, "routers"))
        model = prepare(model)
        process.begin(args.algo, model, task, args.lr)
        if generative:
            train_answers(model, task, args, process)
        else:
            train_text(model, task, args, process, args.algo)
        summary = process.finish()
    write_json(os.path.join(args.out, "summary.json"), summary)
    plot_curves(args.out)
    say(process.result_line(summary))
    return summary


def parse(argv: list[str]):
    """Arguments with every default filled in. UserError for what does not fit together."""
    return command_line.parse(argv, __doc__.split("\n\n")[0], OPTIONS)


def check_options(args):
    """Let the losses themselves refuse options, before any work is done: they are called on a few zeros."""
    if args.algo in METHODS:
        rows, zeros = torch.zeros(args.group_size), torch.zeros(args.group_size, 1, 1, 1)
        policy, mask = Policy(zeros[:, :, 0, 0], zeros.long(), zeros, zeros), zeros[:, :, 0, 0] == 0
        inputs = loss_inputs(policy, policy, rows, rows, mask, MoEConfig(), args)
        plainly(lambda: METHODS[args.algo](**inputs))
    elif args.algo == "erl":

        def forward(routes):
            rows = 2 if routes is None else len(routes[0])
            return torch.zeros(rows, 1), torch.zeros(rows, 1, 1, 1, requires_grad=True), torch.zeros(())

        mask = torch.ones(2, 1, dtype=torch.bool)
        paths = plainly(lambda: explore(forward, mask, 1, **option_values(EXPLORE, args)))
        plainly(lambda: next(erl_objective(forward, paths, **option_values(OBJECTIVE, args))))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv:
            from results.demo import demo  # it imports this file

            return demo()
        run(parse(argv))
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (text := sentence(error)) is None:
            raise
        say(f"train.py: {text}", sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
