"""Train a mixture-of-experts language model: a plain loop around the loss functions of this folder.

    python train.py                                  a demo of three minutes: dense, MoE, ERL on an embedded text
    python train.py --algo erl --dataset wikitext2   ERL on WikiText-2
    python train.py --algo erpo --dataset addition   reinforcement learning on generated answers

A run has two phases. First `--pretrain-steps` of next-token prediction: of a dense model, which is then upcycled into
experts (dense, lm, erl), or of the MoE itself on reference answers (grpo, gspo, gmpo, erpo, rais). Then `--steps` of
the algorithm. Read `erl_losses` and `policy_loss` for what the algorithms do with the model, `main_loop` for the order
of events. Every random draw is a function of (seed, what for, step), so a resumed run needs no generator's state and
continues to the same bytes.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import data
from baselines import gmpo_loss, group_advantages, grpo_loss, gspo_loss
from data import UserError
from erl import erl_advantage, erl_loss, random_routes
from erpo import erpo_loss
from moe import (
    GPT,
    SIZES,
    MoEConfig,
    Rollout,
    Routes,
    beam_search,
    generate,
    lm_loss,
    lm_loss_and_log_probs,
    load_gpt2,
    load_model,
    pick_device,
    router_losses,
    save_model,
    token_log_probs,
    upcycle,
)
from rais import rais_loss

SUPERVISED = ("dense", "lm", "erl")  # learn from the text of the data set
GENERATIVE = ("grpo", "gspo", "gmpo", "erpo", "rais")  # learn from what the model itself writes
LOG_EVERY = 10  # steps between two lines of metrics.jsonl in the supervised algorithms
AUX_COEFFICIENT = 1e-3  # of the balance and of the z loss, as switch-base-8 (ERL section 4.3)
ROUTER_JITTER = 0.01  # likewise; only where no second forward is compared with the first
# Decision: two log-probabilities of a token closer than this many nats are equal. Experts that are copies of each other
# (a freshly upcycled model), and forwards of different batch size, differ by float32 rounding, up to 1e-6 measured;
# the sign in ERL's advantage would make +1 and -1 of it.
ROUNDING = 1e-5
# On Linux PyTorch then asks for huge pages for CPU tensors of 2 MB and more. Fresh memory, page by page, was 30 % of
# the time of a layer of 128 experts and 19 % of a rollout over 50,257 words. PyTorch reads it at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.replace("argument ", ""))


def one_of(kind: str, names):
    """An argparse type: a name out of `names`; for any other the error says which is nearest."""

    def check(value: str) -> str:
        if value not in names:
            guess = difflib.get_close_matches(value, names, n=1, cutoff=0)[0]
            raise argparse.ArgumentTypeError(f"unknown {kind} {value!r}: did you mean {guess}? ({', '.join(names)})")
        return value

    return check


def number(kind, low=None, high=None, above=None):
    """An argparse type: a finite number within bounds."""

    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        inside = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
        if not (math.isfinite(value) and inside):
            bounds = [f"above {above}"] * (above is not None) + [f"at least {low}"] * (low is not None)
            bounds += [f"at most {high}"] * (high is not None)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds)}, not {text}")
        return value

    return check


def parser() -> Parser:
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = p.add_argument
    count, share = number(int, low=1, high=10**8), number(float, low=0, high=1)
    positive = number(float, above=0, high=1e30)
    add("--algo", type=one_of("algorithm", SUPERVISED + GENERATIVE), help=", ".join(SUPERVISED + GENERATIVE))
    add("--dataset", type=one_of("data set", tuple(data.DATASETS)), help=", ".join(data.DATASETS))
    add("--data-dir", help="read the set from files below this folder instead of the hub")
    add("--tokenizer", type=one_of("tokenizer", ("gpt2", "bytes")), help="default: fits the data set")
    add("--model", type=one_of("model", tuple(SIZES)), default="tiny", help=", ".join(SIZES))
    add("--n-expert", type=count, default=8, help="experts per MoE layer")
    add("--top-k", type=count, help="experts a token passes; default 1, for generated answers 2")
    add("--n-shared-expert", type=number(int, low=0), default=0, help="further experts that every token passes")
    add("--moe-every", type=count, default=2, help="every n-th block holds experts")
    add("--gate", type=one_of("gate", ("renorm", "prob")), default="renorm", help="weights of chosen experts")
    add("--expert-capacity", type=number(int, low=0), default=0, help="tokens of a sequence an expert takes; 0: all")
    add("--init", default="scratch", help="scratch, gpt2, a run folder, a checkpoint file, a folder of GPT-2's weights")
    add("--pretrain-steps", type=number(int, low=0), help="steps of next-token prediction before the algorithm")
    add("--pretrain-lr", type=positive, default=1e-3, help="learning rate of those steps")
    add("--steps", type=count, help="steps of the algorithm")
    add("--epochs", type=positive, help="instead of --steps: passes over the training data")
    add("--batch-size", type=count, help="sequences a step (supervised algorithms and phase)")
    add("--lr", type=positive, help="peak learning rate of the algorithm")
    add("--weight-decay", type=number(float, low=0), default=0.1)
    add("--seed", type=number(int, low=0), default=0)
    add("--device", type=one_of("device", ("auto", "cpu", "cuda", "mps")), default="auto")
    add(
        "--dtype",
        type=one_of("dtype", ("float32", "bfloat16")),
        default="float32",
        help="of autocast; the router and the losses are computed in float32 all the same",
    )
    add("--compile", action="store_true", help="torch.compile the forward")
    g = p.add_argument_group("ERL")
    g.add_argument("--alpha", type=share, help="share of routing decisions that are replaced (0.6 text, 0.7 tasks)")
    g.add_argument("--delta", type=number(float, low=0), help="weight of the perturbed loss (0.5 text, 2.0 tasks)")
    g.add_argument("--n-perturb", type=count, default=3, help="perturbed forwards m per original one")
    g.add_argument("--clip-eps", type=positive, default=0.2)
    g.add_argument("--wpl", action="store_true", help="add the LM loss of the perturbed forwards (eq. 17)")
    g.add_argument("--advantage", type=one_of("advantage", ("static", "log")), default="static")
    g.add_argument(
        "--erl-grad",
        type=one_of("gradient", ("all", "router")),
        default="all",
        help="how far the RL loss's gradient goes: the whole network (eq. 14) or the router alone",
    )
    g.add_argument("--inner-epochs", type=count, default=1, help="optimizer steps on the same perturbed routes")
    g = p.add_argument_group("generated answers")
    g.add_argument("--group-size", type=number(int, low=2), default=8, help="responses a prompt")
    g.add_argument("--prompts-per-step", type=count, help="default 16; 64 for the generated problems, which are short")
    g.add_argument("--minibatches", type=count, default=4, help="optimizer steps on one batch of responses")
    g.add_argument("--max-new-tokens", type=count, help="longest response; default: fits the data set")
    g.add_argument("--temperature", type=positive, default=1.0)
    g.add_argument("--top-p", type=number(float, above=0, high=1), default=1.0)
    g.add_argument("--clip-low", type=positive, help="default: the algorithm's own")
    g.add_argument("--clip-high", type=positive)
    g.add_argument("--entropy-alpha", type=share, default=0.2, help="ERPO: weight of the entropy reward")
    g.add_argument(
        "--entropy-reward", type=one_of("entropy reward", ("relative", "absolute", "none")), default="relative"
    )
    g.add_argument(
        "--shift-base",
        type=one_of("base", ("gmpo", "gspo", "grpo")),
        default="gmpo",
        help="RAIS: the loss whose ratios are rescaled",
    )
    g.add_argument("--shift-floor", type=number(float, above=0, high=1), default=0.8, help="RAIS: gamma's floor")
    g.add_argument(
        "--replay",
        type=one_of("replay", ("none", "routing")),
        default="none",
        help="routing: the update uses the experts of the rollout",
    )
    g.add_argument("--beams", type=count, help="beams of the evaluation; default 6 for samsum, xsum and squad, else 1")
    add("--eval-every", type=count, help="steps between evaluations; default: ten in a run")
    add("--eval-samples", type=number(int, low=0), help="samples an evaluation uses; 0: all")
    add("--checkpoint-every", type=count, help="steps between checkpoints; default: with each evaluation")
    add("--out", help="run folder; default: a new one below runs/")
    add("--resume", action="store_true", help="continue the run in --out")
    return p


# What a resumed run may be given anew: it changes where and how fast a run goes, not what it computes.
FREE_ON_RESUME = ("resume", "out", "data_dir", "device", "compile")


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments with every default filled in. UserError for what does not fit together."""
    args = parser().parse_args(argv)
    if args.resume:
        only_given = parser()
        for action in only_given._actions:
            action.default = argparse.SUPPRESS
        given = set(vars(only_given.parse_args(argv)))
        if not args.out:
            raise UserError("--resume needs --out RUN: which run should go on?")
        try:
            with open(os.path.join(args.out, "config.json")) as file:
                saved = json.load(file)
        except (OSError, ValueError):
            raise UserError(f"{args.out} holds no run to resume (no readable config.json)") from None
        if not isinstance(saved, dict) or set(vars(args)) - set(saved) - {"resume"}:
            raise UserError(f"{args.out}/config.json is not that of a run of this program")
        for name in given - set(FREE_ON_RESUME):
            if saved.get(name) != getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} was {saved.get(name)} when {args.out} began: leave it out, or start a new run")
        kept = {name: getattr(args, name) for name in FREE_ON_RESUME if name in given}
        return argparse.Namespace(**{**vars(args), **saved, **kept})

    if args.algo is None:
        raise UserError("--algo is missing: " + ", ".join(SUPERVISED + GENERATIVE))
    args.dataset = args.dataset or "pydocs"
    spec = data.get_dataset(args.dataset)
    if spec.test_only:
        raise UserError(f"{args.dataset} is a test set: train on gsm8k or deepscaler, which is tested on it")
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs say the same thing: give one of them")
    if args.algo != "dense" and args.n_expert == 1:
        raise UserError(f"--n-expert 1 leaves nothing to route: --algo {args.algo} needs at least 2 (dense has one)")
    generative, text, pretrained = args.algo in GENERATIVE, spec.kind == "text", args.init != "scratch"
    short = spec.problems is not None  # generated problems of a few bytes
    if args.init == "gpt2":
        args.model = "gpt2"
    defaults = {
        "tokenizer": "gpt2" if args.init == "gpt2" else spec.tokenizer,
        "top_k": 2 if generative else 1,
        "pretrain_steps": 0 if pretrained or args.algo == "dense" else 600 if generative else 1000,
        # ERL table 7: batch 4 of 1,024 tokens for text, 8 for tasks, learning rate 1e-5 on published weights; models
        # that start from scratch are small and want more
        "batch_size": 32 if short else 4 if text and args.model == "gpt2" else 8,
        "lr": 1e-5
        if args.init == "gpt2"
        else 1e-4
        if generative
        else 1e-3
        if args.algo == "dense" and not pretrained
        else 3e-4,
        "alpha": 0.6 if text else 0.7,
        "delta": 0.5 if text else 2.0,
        "max_new_tokens": min(spec.max_new_tokens, SIZES[args.model]["context"] // 2),
        "beams": 6 if args.dataset in ("samsum", "xsum", "squad") else 1,
        "eval_samples": 64 if text else 0 if short else 200,
        "prompts_per_step": 64 if short else 16,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if generative and args.prompts_per_step % args.minibatches:
        raise UserError(
            f"--prompts-per-step {args.prompts_per_step} is not divisible by --minibatches "
            f"{args.minibatches}: a group's responses stay together"
        )
    if args.steps is None and args.epochs is None:
        args.steps = 400 if generative else 1000
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Randomness and batches
# ---------------------------------------------------------------------------------------------------------------------


def rng(*key) -> torch.Generator:
    """A CPU generator for one purpose, e.g. rng(seed, "routes", step). The same key draws the same numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Order:
    """The order in which `count` items are drawn: each epoch visits all of them, in an order of its own.

    What the n-th draw is depends on (seed, n) alone: a resumed run goes on where the killed one stopped.
    """

    def __init__(self, count: int, *key):
        self.count, self.key, self.epoch = count, key, None

    def __call__(self, start: int, number: int) -> list[tuple[int, int]]:
        """(epoch, item) of the draws start, start + 1, ..."""
        drawn = []
        for n in range(start, start + number):
            epoch, place = divmod(n, self.count)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = torch.randperm(self.count, generator=rng(*self.key, epoch)).tolist()
            drawn.append((epoch, self.order[place]))
        return drawn


class TextBatches:
    """Windows of a text: tokens int64 [B, T + 1] and the mask bool [B, T] of predictions that count."""

    def __init__(self, tokens, context: int, batch_size: int, seed: int):
        if len(tokens) < 3:
            raise UserError("the training text is empty")
        self.tokens, self.context = tokens, min(context, len(tokens) - 2)
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = max(1, (len(tokens) - 1) // self.context - 1)  # room for the epoch's offset
        self.order = Order(self.per_epoch, seed, "text")

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = []
        for epoch, i in self.order(step * self.batch_size, self.batch_size):
            # the windows of every epoch begin elsewhere, or the same tokens would always lack context
            room = len(self.tokens) - 1 - self.per_epoch * self.context
            offset = int(torch.randint(room + 1, (), generator=rng(self.seed, "offset", epoch)))
            start = offset + i * self.context
            rows.append(torch.from_numpy(self.tokens[start : start + self.context + 1].astype("int64")))
        return torch.stack(rows), torch.ones(len(rows), self.context, dtype=torch.bool)


class TaskBatches:
    """Prompt + answer rows, padded on the right; only predictions of the answer and its end token count."""

    def __init__(self, encoded, batch_size: int, seed: int, end: int):
        self.encoded, self.batch_size, self.end = encoded, batch_size, end
        self.per_epoch = len(encoded)
        self.order = Order(len(encoded), seed, "task")

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        return pad([self.encoded[i] for _, i in self.order(step * self.batch_size, self.batch_size)], self.end)


def pad(encoded, end: int) -> tuple[Tensor, Tensor]:
    """Rows of data.Encoded -> tokens [B, T + 1], mask [B, T]; position t predicts the token at t + 1."""
    width = max(len(e.tokens) for e in encoded)
    tokens = torch.tensor([e.tokens + [end] * (width - len(e.tokens)) for e in encoded])
    places = torch.arange(1, width)
    starts, stops = (
        torch.tensor([[n] for n in ns]) for ns in zip(*((e.answer_start, len(e.tokens)) for e in encoded), strict=True)
    )
    return tokens, (places >= starts) & (places < stops)


class Task(NamedTuple):
    """Everything that a run reads of its data set."""

    spec: data.DatasetSpec
    tokenizer: data.Tokenizer
    batches: TextBatches | TaskBatches  # for next-token prediction
    examples: list  # prompts to generate from
    held_out: dict  # "validation" and the test sets -> TextSplit or list of Example


def load_task(args, config: MoEConfig) -> Task:
    """The data set of a run; counts of cut and skipped examples are said once, on stderr."""
    spec, tokenizer = data.get_dataset(args.dataset), data.load_tokenizer(args.tokenizer, args.data_dir)
    generative = args.algo in GENERATIVE
    if args.max_new_tokens > config.context - 2:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt: the context has "
            f"{config.context} positions"
        )
    if spec.kind == "text":
        splits = {s: data.load_text(args.dataset, s, tokenizer, data_dir=args.data_dir) for s in data.SPLITS}
        batches = TextBatches(splits["train"].tokens, config.context, args.batch_size, args.seed)
        examples = []
        if generative:
            prompt_tokens = (config.context - args.max_new_tokens) // 2
            examples = data.continuation_examples(
                splits["train"],
                tokenizer,
                prompt_tokens=prompt_tokens,
                answer_tokens=args.max_new_tokens,
                seed=args.seed,
            )
        held_out = {"validation": splits["validation"], "test": splits["test"]}
    else:
        read = {"data_dir": args.data_dir, "seed": 0}
        limit = args.eval_samples or None
        examples = data.load_examples(args.dataset, "train", **read)
        held_out = {"validation": data.load_examples(args.dataset, "validation", limit=limit, **read)}
        for name in spec.test_sets or (args.dataset,):
            held_out["test" if name == args.dataset else name] = data.load_examples(name, "test", limit=limit, **read)
        empty = [name for name, split in held_out.items() if not split]
        if empty:
            raise UserError(f"{args.dataset} has no example to evaluate on in {', '.join(empty)}")
        encoded, counts = data.encode_examples(
            examples, tokenizer, config.context, min_new_tokens=args.max_new_tokens if generative else 0
        )
        for key, sentence in (("cut", "had their prompt cut from the left"), ("skipped", "were left out")):
            if counts[key]:
                whole = counts["kept"] + counts["skipped"]
                print(
                    f"{args.dataset}: {counts[key]} of {whole} training examples {sentence} "
                    f"(context {config.context} tokens)",
                    file=sys.stderr,
                )
        questions, room = [e for split in held_out.values() for e in split], config.context - args.max_new_tokens
        cut = sum(len(tokenizer.encode(e.prompt)) > room for e in questions)
        skipped = sum(split.skipped for split in held_out.values())
        if cut or skipped:
            print(
                f"{args.dataset}: {cut} of {len(questions)} held-out prompts are cut from the left to {room} tokens, "
                f"{skipped} held-out records lack a prompt or a reference",
                file=sys.stderr,
            )
        if not encoded:
            raise UserError(f"no training example of {args.dataset} fits into {config.context} tokens")
        batches = TaskBatches(encoded, args.batch_size, args.seed, tokenizer.end)
    if generative and not examples:
        raise UserError(f"{args.dataset} has no prompt to generate from")
    return Task(spec, tokenizer, batches, examples, held_out)


# ---------------------------------------------------------------------------------------------------------------------
# Losses of a step
# ---------------------------------------------------------------------------------------------------------------------


class Explored(NamedTuple):
    """What inner epochs of ERL share: the draw of the first one, and what was true when it was drawn."""

    routes: Routes
    advantages: Tensor  # [m * B, T]
    old_log_probs: Tensor  # [m * B, T, L, K]


def lm_losses(model: GPT, stem, branch, tokens: Tensor, mask: Tensor, noise=None):
    """L_o: LM, balance and z loss of the original forward (ERL section 3.3).

    tokens [B, T + 1], mask [B, T] of the predictions that count, which may stay on the CPU.
    """
    features, routing = branch(stem(tokens[:, :-1]), noise=noise)
    return original_loss(model, features, routing, tokens, mask)[:2]


def counted(mask: Tensor, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What the head is asked: features [n, D] and targets [n] of the n positions where mask [B, T] is True.

    Over 50,257 words the head is most of a small model's work, and prompts and padding are most of a task's rows. Where
    the mask lies on the CPU, nothing waits for the device.
    """
    features, targets, places = features.flatten(0, 1), targets.flatten(), mask.flatten().nonzero().squeeze(1)
    if len(places) == len(targets):
        return features, targets
    places = places.to(features.device)
    return features.index_select(0, places), targets.index_select(0, places)


def original_loss(model: GPT, features, routing, tokens, mask):
    """-> L_o, metrics, log p(target) [B, T] without gradient, 0 where the mask is False."""
    features, targets = counted(mask, features, tokens[:, 1:])
    nll, said = lm_loss_and_log_probs(features, model.wte.weight, targets)
    mask = mask.to(tokens.device)
    log_probs = said.new_zeros(mask.shape).masked_scatter(mask, said)
    balance, z, load = router_losses(routing.logits, routing.experts, mask)
    loss = nll + AUX_COEFFICIENT * (balance.sum() + z.sum())  # Switch: each MoE layer adds its own
    metrics = {"loss": nll.detach()}
    if len(load):
        metrics |= {
            "balance_loss": balance.detach().mean(),
            "z_loss": z.detach().mean(),
            "load_min": load.min(),
            "load_max": load.max(),
        }
    return loss, metrics, log_probs


def erl_losses(model: GPT, stem, branch, tokens: Tensor, mask: Tensor, args, generator, explored: Explored | None):
    """L = L_o + delta * L_p (ERL eq. 16): one original forward and m perturbed ones. -> loss, metrics, Explored.

    All forwards share everything before the first router (`stem`), and differ in their routes alone.
    """
    config, m = model.config, args.n_perturb
    hidden = stem(tokens[:, :-1])  # [B, T, D]
    B, T, _ = hidden.shape
    if explored is None:
        drawn = random_routes(
            m * B, T, len(config.moe_blocks), config.n_expert, config.top_k, args.alpha, generator=generator
        )
        routes = Routes(*(t.to(hidden.device) for t in drawn))
    else:
        routes = explored.routes
    # Apart from the original, not in one batch with it: the backward then leaves out what follows the last router of
    # the perturbed forwards, which nothing but the perturbed LM loss needs.
    features, original = branch(hidden)
    with torch.set_grad_enabled(args.erl_grad == "all" or args.wpl):
        perturbed_features, perturbed = branch(hidden.repeat(m, 1, 1), routes)
    # "router": the routers are asked again about what they saw, and the gradient stops there
    logits = model.route_again(perturbed.inputs) if args.erl_grad == "router" else perturbed.logits
    log_probs = logits.log_softmax(-1).gather(-1, routes.experts)  # [mB, T, L, K], log P of the random experts
    loss, lm_metrics, original_log_probs = original_loss(model, features, original, tokens, mask)
    perturbed_mask = mask.repeat(m, 1)
    S = routes.forced & perturbed_mask.to(hidden.device)[..., None]  # perturbed decisions that predict a token
    if explored is None:
        with torch.no_grad():  # the RL loss has no gradient through the head, and needs it at S alone
            answering = S.any(-1)  # [mB, T]
            before = original_log_probs.repeat(m, 1)[answering]
            targets = tokens[:, 1:].repeat(m, 1)[answering]
            after = token_log_probs(perturbed_features[answering], model.wte.weight, targets)
            after = torch.where((after - before).abs() <= ROUNDING, before, after)
            advantages = before.new_zeros(answering.shape)
            advantages[answering] = erl_advantage(after, before, args.advantage)
        explored = Explored(routes, advantages, log_probs.detach())
    rl, metrics = erl_loss(log_probs, explored.old_log_probs, explored.advantages, S, clip_eps=args.clip_eps)
    perturbed_loss = rl
    if args.wpl:
        features, targets = counted(perturbed_mask, perturbed_features, tokens[:, 1:].repeat(m, 1))
        extra = lm_loss(features, model.wte.weight, targets)
        perturbed_loss, metrics["perturbed_lm_loss"] = rl + extra, extra.detach()
    return loss + args.delta * perturbed_loss, lm_metrics | metrics, explored


class Policy(NamedTuple):
    """What a policy says of given responses, index t for the token that position t predicts."""

    log_probs: Tensor  # [B, T], 0 outside the response
    experts: Tensor  # [B, T, L, K]
    expert_log_probs: Tensor  # [B, T, L, K], log P of `experts`
    old_expert_log_probs: Tensor  # [B, T, L, K], log P of the experts that the OLD policy used


def ask_policy(model: GPT, stem, branch, rollout: Rollout, args) -> Policy:
    """Teacher-forced forward over a rollout's rows, with gradient."""
    routes = None
    if args.replay == "routing":
        forced = torch.ones(rollout.experts.shape[:3], dtype=torch.bool, device=rollout.tokens.device)
        routes = Routes(rollout.experts, forced, uniform=False)
    features, routing = branch(stem(rollout.tokens[:, :-1]), routes)
    mask = rollout.response_mask
    features, targets = counted(mask, features, rollout.tokens[:, 1:])
    said = token_log_probs(features, model.wte.weight, targets, args.temperature)
    log_probs = said.new_zeros(mask.shape).masked_scatter(mask, said)
    return Policy(log_probs, routing.experts, routing.expert_log_probs(), routing.expert_log_probs(rollout.experts))


def policy_loss(args, new: Policy, old: Policy, rewards: Tensor, advantages: Tensor, mask: Tensor, num_experts: int):
    """The loss of the chosen algorithm on whole groups of responses. -> loss, metrics."""
    ranges = {"clip_low": args.clip_low, "clip_high": args.clip_high}
    ranges = {name: value for name, value in ranges.items() if value is not None}
    if args.algo == "erpo":
        return erpo_loss(
            new.log_probs,
            old.log_probs,
            rewards,
            mask,
            new.experts,
            old.experts,
            new.expert_log_probs.exp(),
            old.expert_log_probs.exp(),
            num_experts=num_experts,
            group_size=args.group_size,
            alpha=args.entropy_alpha,
            entropy_reward=args.entropy_reward,
            **ranges,
        )
    if args.algo == "rais":
        return rais_loss(
            new.log_probs,
            old.log_probs,
            advantages,
            mask,
            new.old_expert_log_probs,
            old.old_expert_log_probs,
            base=args.shift_base,
            floor=args.shift_floor,
            **ranges,
        )
    loss = {"grpo": grpo_loss, "gspo": gspo_loss, "gmpo": gmpo_loss}[args.algo]
    return loss(new.log_probs, old.log_probs, advantages, mask, **ranges)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def text_windows(tokens, context: int, limit: int = 0):
    """Windows of a split as (tokens [T + 1], mask [T]), so that every token but the first is predicted exactly once.

    limit: that many windows, evenly spread over the split; 0 for all.
    """
    starts = list(range(0, len(tokens) - 1, context))
    if 0 < limit < len(starts):
        starts = [starts[i * len(starts) // limit] for i in range(limit)]
    for start in starts:
        window = torch.from_numpy(tokens[start : start + context + 1].astype("int64"))
        missing = context + 1 - len(window)
        yield (torch.cat([window, window.new_zeros(missing)]), torch.arange(context) < context - missing)


@torch.no_grad()
def evaluate_text(model: GPT, split: data.TextSplit, batch_size: int, limit: int = 0) -> dict[str, float]:
    """Perplexity per token (and bits per byte of the text, over the whole split)."""
    device, total, count = model.wte.weight.device, 0.0, 0
    every = list(text_windows(split.tokens, model.config.context, limit))
    for i in range(0, len(every), batch_size):
        windows = every[i : i + batch_size]
        tokens, mask = (torch.stack(part).to(device) for part in zip(*windows, strict=True))
        nll = model(tokens[:, :-1], tokens[:, 1:], mask).lm_loss
        total, count = total + nll.item() * int(mask.sum()), count + int(mask.sum())
    scores = {"loss": total / count, "perplexity": math.exp(min(total / count, 700.0))}
    if not limit:
        scores["bits_per_byte"] = total / math.log(2) / split.num_bytes
    return scores


def respond(model: GPT, task: Task, examples, args, generator=None, samples: int = 1) -> list[str]:
    """Responses to the prompts of examples: beam search, the likeliest token (beams 1), or with `samples` > 1 that many
    draws a prompt at temperature 1 and top-p 0.7 (ERPO section 5.1)."""
    tokenizer, room = task.tokenizer, model.config.context - args.max_new_tokens
    prompts = [data.encode_prompt(e, tokenizer, room) for e in examples for _ in range(samples)]
    rows, at_once = [], max(1, 128 // args.beams)
    how = {"max_new_tokens": args.max_new_tokens, "end_token": tokenizer.end}
    for i in range(0, len(prompts), at_once):
        part = prompts[i : i + at_once]
        if args.beams > 1 and samples == 1:
            rows += beam_search(model, part, beams=args.beams, **how)
        elif samples == 1:
            rows += generate(model, part, temperature=0, **how).responses(tokenizer.end)
        else:
            rows += generate(model, part, top_p=0.7, generator=generator, **how).responses(tokenizer.end)
    return [tokenizer.decode(row) for row in rows]


def evaluate(model: GPT, task: Task, name: str, args, final: bool = False) -> dict[str, float]:
    """Scores on a held-out set: perplexity of a text, the task metric of generated answers."""
    held_out, samples = task.held_out[name], 16 if name in ("aime24", "aime25") else 1
    broken = UserError("the model's probabilities are not finite: lower --lr (or --pretrain-lr) in a new run")
    if task.spec.kind == "text":
        scores = evaluate_text(model, held_out, 8, 0 if final else args.eval_samples)
        if not math.isfinite(scores["loss"]):
            raise broken
        return scores
    prompt = data.encode_prompt(held_out[0], task.tokenizer, model.config.context - args.max_new_tokens)
    with torch.no_grad():  # a broken model answers too: it must not score 0 as if it had been measured
        if not model(torch.tensor([prompt], device=model.wte.weight.device)).logits.isfinite().all():
            raise broken
    # ERPO section 5.1: 16 responses a problem of the small AIME sets (Avg@16), one elsewhere
    responses = respond(model, task, held_out, args, rng(args.seed, "evaluation", name), samples)
    return data.score(task.spec, responses, [e for e in held_out for _ in range(samples)])


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def told_plainly():
    """A ValueError in here is the user's mistake: the library's sentence becomes the program's."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def write_json(path: str, value):
    with open(path + ".tmp", "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".tmp", path)


def open_run(args) -> str:
    """The run's folder: a new one, or with --resume the one that is there. UserError when it is not free."""
    if not args.out:
        name = f"{args.algo}-{args.dataset}-seed{args.seed}"
        taken = lambda n: os.path.exists(os.path.join("runs", n))  # noqa: E731
        args.out = os.path.join("runs", next(n for i in range(1, 10**6) if not taken(n := f"{name}-{i}")))
    if not args.resume and os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"{args.out} is not empty: continue its run with --resume, or name another folder with --out")
    try:
        os.makedirs(args.out, exist_ok=True)
        if not args.resume:
            write_json(os.path.join(args.out, "config.json"), {k: v for k, v in vars(args).items() if k != "resume"})
    except OSError as error:
        raise UserError(f"cannot write the run folder {args.out}: {error.strerror}") from error
    return args.out


def save_checkpoint(out: str, model: GPT, optimizer, step: int, **state):
    """A folder with weights and the rest, written aside and renamed: a killed run leaves a whole checkpoint."""
    new, old, aside = (os.path.join(out, name) for name in ("checkpoint", "checkpoint.old", "checkpoint.tmp"))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.makedirs(aside)
        save_model(model, os.path.join(aside, "model.safetensors"), step=step)
        torch.save({"step": step, "optimizer": optimizer.state_dict(), **state}, os.path.join(aside, "state.pt"))
    except (OSError, RuntimeError, SafetensorError) as error:  # each library reports a full disk in its own way
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written ({error}): make room for {out}, then "
            "continue with --resume from the one before"
        ) from error
    if os.path.isdir(new):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(new, old)
    os.rename(aside, new)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(out: str) -> str | None:
    """The folder of the newest whole checkpoint of a run, or None."""
    return next((p for n in ("checkpoint", "checkpoint.old") if os.path.isdir(p := os.path.join(out, n))), None)


def load_checkpoint(folder: str) -> tuple[GPT, dict]:
    with told_plainly():
        model, _ = load_model(os.path.join(folder, "model.safetensors"))
    try:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
        numbers = all(isinstance(state[name], (int, float)) for name in ("metrics_bytes", "seconds", "tokens"))
        if not (isinstance(state["step"], int) and isinstance(state["optimizer"], dict) and numbers):
            raise TypeError
        return model, state
    except Exception as error:  # torch.load has no error type of its own for a broken file
        raise UserError(f"{folder}/state.pt is not a readable checkpoint of this program") from error


def load_initial(source: str) -> GPT:
    """The model that --init names."""
    with told_plainly():
        if source == "gpt2":
            return load_gpt2()
        if os.path.isfile(source):
            return load_model(source)[0]
        if os.path.isdir(source) and (folder := find_checkpoint(source)):
            return load_model(os.path.join(folder, "model.safetensors"))[0]
        if os.path.isfile(os.path.join(source, "config.json")) and os.path.isfile(
            os.path.join(source, "model.safetensors")
        ):
            return load_gpt2(source)
    raise UserError(f"--init {source}: there is no run, checkpoint file or GPT-2 folder of that name")


def is_finite(model: GPT) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def initial_models(args, tokenizer, saved: GPT | None = None) -> tuple[GPT, MoEConfig]:
    """The model that a run starts from, or goes on from (`saved`), and the configuration that its algorithm trains."""
    with told_plainly():
        experts = (
            {"n_expert": 1}
            if args.algo == "dense"
            else {
                name: getattr(args, name)
                for name in ("n_expert", "top_k", "n_shared_expert", "moe_every", "gate", "expert_capacity")
            }
        )
        if args.init == "scratch" and saved is None:
            target = MoEConfig(vocab_size=tokenizer.vocab_size, **SIZES[args.model], **experts)
            first = target.dense() if args.algo in SUPERVISED else target
            return GPT(first, rng(args.seed, "weights")), target
        model, source = load_initial(args.init) if saved is None else saved, f"--init {args.init}"
        if saved is not None:
            source = f"the checkpoint in {args.out}"
        else:  # its own size, whatever --model says
            size = {name: getattr(model.config, name) for name in SIZES["tiny"]}
            args.model = next((name for name in SIZES if SIZES[name] == size), "custom")
        if not is_finite(model):
            raise UserError(f"{source} holds weights that are not finite: take another one")
        if model.config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{source} has a vocabulary of {model.config.vocab_size}, the tokenizer {tokenizer.name} "
                f"one of {tokenizer.vocab_size}: choose the tokenizer that it was trained with"
            )
        if model.config.n_expert == 1:
            return model, replace(model.config, **experts)
        if args.algo == "dense":
            raise UserError(f"{source} has experts: --algo dense needs a dense model")
        if args.pretrain_steps and args.algo in SUPERVISED and saved is None:
            raise UserError("--pretrain-steps trains a dense model, and --init names one with experts: set it to 0")
        wanted = replace(model.config, **experts)
        if wanted != model.config:
            differ = [k for k, v in asdict(wanted).items() if v != asdict(model.config)[k]]
            flags = " ".join(f"--{k.replace('_', '-')} {getattr(model.config, k)}" for k in differ)
            raise UserError(f"{source} has other experts than the flags ask for: add {flags}")
        return model, model.config


def make_optimizer(model: GPT, weight_decay: float):
    """AdamW (ERL table 7: betas 0.9, 0.999); matrices decay, biases and norms do not."""
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and ".b_" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or ".b_" in n]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=model.wte.weight.is_cuda or None)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear schedule: up over the first twentieth (at most 100 steps), then down to a tenth of the peak."""
    warmup = min(100, max(1, steps // 20))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - 0.9 * (step - warmup) / max(1, steps - warmup))


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def run(args) -> dict:
    """One training run from its arguments (see `parse`) to summary.json, whose content it returns."""
    with told_plainly():
        device = pick_device(args.device)
    tokenizer = data.load_tokenizer(args.tokenizer, args.data_dir)
    folder = find_checkpoint(args.out) if args.resume else None
    saved, state = load_checkpoint(folder) if folder else (None, None)
    model, target = initial_models(args, tokenizer, saved)
    task = load_task(args, target)
    if args.steps is None:
        draws = args.prompts_per_step if args.algo in GENERATIVE else args.batch_size
        items = len(task.examples) if args.algo in GENERATIVE else task.batches.per_epoch
        args.steps = max(1, math.ceil(args.epochs * items / draws))
    total = args.pretrain_steps + args.steps
    args.eval_every = args.eval_every or max(1, total // 10)
    args.checkpoint_every = args.checkpoint_every or args.eval_every

    if state is None:
        state = {"step": 0, "metrics_bytes": 0, "seconds": 0.0, "tokens": 0, "optimizer": None}
    else:
        begun = state["step"] > (args.pretrain_steps if args.algo in SUPERVISED else 0)  # the target is trained already
        if state["step"] > total or begun and model.config != target:
            raise UserError(
                f"the checkpoint in {args.out} is not of this run: it stands at step {state['step']} of "
                f"{total} and holds {model.config}"
            )
    optimizer_state = state["optimizer"]
    if state["step"] == args.pretrain_steps:
        optimizer_state = None  # the first phase is over: the algorithm has an optimizer of its own
    out = open_run(args)
    with locked(out):
        try:
            return main_loop(args, out, device, model.to(device), target, task, state, optimizer_state)
        except KeyboardInterrupt as stop:
            again = f"python train.py --resume --out {shlex.quote(out)}"
            print(f"\ninterrupted{stop}; continue with: {again}", file=sys.stderr)
            raise


@contextlib.contextmanager
def locked(out: str):
    """One process a run folder."""
    with open(os.path.join(out, ".lock"), "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: no lock
            pass
        except OSError:
            raise UserError(f"{out} is in use by another process") from None
        yield


def main_loop(args, out, device, model: GPT, target: MoEConfig, task: Task, state: dict, optimizer_state) -> dict:
    P, total = args.pretrain_steps, args.pretrain_steps + args.steps
    print(json.dumps({k: v for k, v in vars(args).items() if v is not None}), file=sys.stderr)
    # Without its cache: the bfloat16 copies of the weights would outlive the updates, and those that generation makes
    # without a gradient would serve the forward that needs one.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16", cache_enabled=False)
    metrics_path = os.path.join(out, "metrics.jsonl")
    with open(metrics_path, "ab") as file:
        if file.tell() < state["metrics_bytes"]:
            raise UserError(
                f"{metrics_path} is shorter than it was when the checkpoint was saved: put the run's own "
                f"file back, or start a new run with --init {out}"
            )
        file.truncate(state["metrics_bytes"])  # lines after the checkpoint will be written again
    read_metrics(out)  # better to hear of a spoilt line now than after the last step
    begun, tokens_seen, step = time.perf_counter() - state["seconds"], state["tokens"], state["step"]

    def log(**row):
        row = {k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()}
        with open(metrics_path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def spoilt(what: str) -> UserError:
        kept = f"{out} keeps the last checkpoint" if find_checkpoint(out) else "nothing was saved"
        return UserError(f"{what} at step {step}: lower --lr (or --pretrain-lr) in a new run; {kept}")

    def save():
        if not is_finite(model):
            raise spoilt("the weights are not finite")
        save_checkpoint(
            out,
            model,
            optimizer,
            step,
            metrics_bytes=os.path.getsize(metrics_path),
            seconds=time.perf_counter() - begun,
            tokens=tokens_seen,
        )

    def begin_phase(model):
        if model.config != target and (step >= P or args.algo in GENERATIVE):
            model = upcycle(model, target, rng(args.seed, "routers")).to(device)
        stem, branch = model.stem, model.branch
        if args.compile:
            stem, branch = torch.compile(stem), torch.compile(branch)
        return model, stem, branch, make_optimizer(model, args.weight_decay)

    model, stem, branch, optimizer = begin_phase(model)
    if optimizer_state is not None:
        try:
            optimizer.load_state_dict(optimizer_state)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out}/checkpoint/state.pt does not fit the weights beside it: {error}") from error
    if step == 0:
        total_parameters, active = (model if model.config == target else GPT(target)).count_parameters()
        print(f"{total_parameters:,} parameters, {active:,} active a token; run folder {out}", file=sys.stderr)
    else:
        print(f"going on at step {step} of {total}", file=sys.stderr)

    with stop_politely() as stop, tqdm(total=total, initial=step, disable=None, unit="step") as bar, autocast:
        while step < total:
            if step == P:  # the algorithm begins
                model, stem, branch, optimizer = begin_phase(model)
                for name in task.held_out if task.spec.kind == "task" else ("validation",):
                    log(step=step, phase="evaluation", split=name, **evaluate(model, task, name, args))
            elif step and step % args.eval_every == 0:
                # after the checkpoint of this step: a run that is interrupted here evaluates when it goes on
                log(step=step, phase="evaluation", split="validation", **evaluate(model, task, "validation", args))
            algo = args.algo if step >= P else "supervised"
            within, length, peak = (step, P, args.pretrain_lr) if step < P else (step - P, args.steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(within, length, peak)

            if algo in GENERATIVE:
                metrics = reinforce(model, stem, branch, optimizer, task, args, step - P)
                tokens_seen += int(metrics.pop("tokens"))
            else:
                tokens, mask = task.batches(step)
                tokens, tokens_seen = tokens.to(device), tokens_seen + int(mask.sum())
                explored = None
                for _ in range(args.inner_epochs if algo == "erl" else 1):
                    if algo == "erl":
                        draw = rng(args.seed, "routes", step)
                        loss, metrics, explored = erl_losses(model, stem, branch, tokens, mask, args, draw, explored)
                    else:
                        shape = (tokens.shape[0], tokens.shape[1] - 1)
                        noise = model.jitter(shape, ROUTER_JITTER, rng(args.seed, "jitter", step))
                        loss, metrics = lm_losses(model, stem, branch, tokens, mask, noise)
                    metrics["grad_norm"] = update(model, optimizer, loss)
            step += 1
            bar.update()

            stopping = stop.asked
            saving = stopping or step % args.checkpoint_every == 0 or step == total
            logging = step % LOG_EVERY == 0 or algo in GENERATIVE or step == total
            if logging or saving:
                metrics = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
                for name in ("loss", "grad_norm", "entropy"):  # such a gradient has spoilt the weights just now
                    if not math.isfinite(metrics.get(name, 0.0)):
                        raise spoilt(f"{name} is {metrics[name]}")
            if logging:
                seconds = time.perf_counter() - begun
                shown = {"loss": f"{metrics['loss']:.3f}", "tok/s": f"{tokens_seen / seconds:.0f}"}
                if "reward_mean" in metrics:
                    shown["reward"] = f"{metrics['reward_mean']:.3f}"
                if "load_max" in metrics:
                    shown["load"] = f"{metrics['load_min']:.2f}-{metrics['load_max']:.2f}"
                bar.set_postfix(shown, refresh=False)
                log(
                    step=step,
                    phase=algo,
                    lr=optimizer.param_groups[0]["lr"],
                    **metrics,
                    seconds=round(seconds, 2),
                    tokens_per_second=round(tokens_seen / seconds, 1),
                )
            if saving:
                save()
            if stopping:
                raise KeyboardInterrupt(f" at step {step} of {total}, state saved")
        stop.at_once = True  # all steps are saved: nothing to wait for
        seconds = time.perf_counter() - begun
        results = {name: evaluate(model, task, name, args, final=True) for name in task.held_out}

    for name, scores in results.items():
        log(step=step, phase="evaluation", split=name, **scores)
    tests = {name: scores for name, scores in results.items() if name != "validation"}
    summary = {k: sum(s[k] for s in tests.values()) / len(tests) for k in next(iter(tests.values()))}
    if len(tests) > 1:  # several test sets: their mean, and each
        summary |= {f"{k}_{name}": v for name, scores in tests.items() for k, v in scores.items()}
    summary |= {f"validation_{k}": v for k, v in results["validation"].items()}
    for row in read_metrics(out):  # where the first phase left the model, on the first test set
        if row["phase"] == "evaluation" and row["step"] == P and row["split"] == next(iter(tests)):
            summary |= {f"before_{k}": v for k, v in row.items() if k in summary}
            break
    total_parameters, active = model.count_parameters()
    summary |= {
        "parameters": total_parameters,
        "active_parameters": active,
        "algo": args.algo,
        "dataset": args.dataset,
        "seed": args.seed,
        "steps": total,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens_seen / seconds, 1),
    }
    write_json(os.path.join(out, "summary.json"), summary)
    plot_curves(out)
    scores = ", ".join(f"{k} {summary[k]:.4g}" for k in next(iter(tests.values())))
    print(f"{out}: {scores} on {' and '.join(tests)} after {total} steps")
    return summary


def update(model: GPT, optimizer, loss: Tensor) -> Tensor:
    """One optimizer step with the gradient clipped to norm 1. -> the norm before."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return norm.detach()


def reinforce(model: GPT, stem, branch, optimizer, task: Task, args, step: int) -> dict:
    """One step on generated answers: prompts x G responses, their rewards, then an update per minibatch of groups."""
    G, N, tokenizer = args.group_size, args.prompts_per_step, task.tokenizer
    device = model.wte.weight.device
    order = Order(len(task.examples), args.seed, "prompts")
    examples = [task.examples[i] for _, i in order(step * N, N) for _ in range(G)]  # a group's rows are contiguous
    prompts = [data.encode_prompt(e, tokenizer, model.config.context - args.max_new_tokens) for e in examples]
    rollout = generate(
        model,
        prompts,
        max_new_tokens=args.max_new_tokens,
        end_token=tokenizer.end,
        temperature=args.temperature,
        top_p=args.top_p,
        generator=rng(args.seed, "rollout", step),
    )
    responses = [tokenizer.decode(r) for r in rollout.responses(tokenizer.end)]
    rewards = torch.tensor([data.reward(task.spec, r, e) for r, e in zip(responses, examples, strict=True)])
    if not rewards.isfinite().all():
        bad = int((~rewards.isfinite()).nonzero()[0])
        raise UserError(f"the reward of {responses[bad]!r} is {rewards[bad]}: a reward must be finite")
    rewards = rewards.to(device)
    advantages = group_advantages(rewards, G)
    groups = rewards.view(N, G)
    silent = groups.amax(1) == groups.amin(1)  # equal rewards: nothing to prefer, no update
    lengths = rollout.response_mask.sum(1).float()
    report = {
        "reward_mean": rewards.mean(),
        "reward_std": rewards.std(),
        "accuracy": (rewards >= 1).float().mean(),
        "response_length": lengths.mean(),
        "silent_groups": silent.float().mean(),
        "entropy": (rollout.entropies.sum(1) / lengths.clamp(min=1)).mean(),
        "tokens": lengths.sum(),
    }

    if args.dtype != "float32":  # bfloat16 forwards of other shapes differ by more than rounding: ask once more
        with torch.no_grad():
            said = ask_policy(model, stem, branch, rollout, args)
        rollout = rollout._replace(
            log_probs=said.log_probs, experts=said.experts, expert_log_probs=said.expert_log_probs
        )
    sums, updates = {}, 0
    for part in torch.arange(N * G, device=device).chunk(args.minibatches):
        # The rows of a silent group add exactly 0 to the loss, a mean over rows: they need no forward.
        whole, part = len(part), part[~silent[part // G]]
        if not len(part):
            continue
        rows = Rollout(*(t[part] for t in rollout))
        mask = rows.response_mask
        new = ask_policy(model, stem, branch, rows, args)
        if updates == 0:
            # Nothing has been updated yet: the old policy is this one. The numbers recorded while sampling differ from
            # it by rounding (other matrix shapes), and the first ratio of a batch must be exactly 1.
            old = Policy(*(t.detach() for t in new))
        else:
            old = Policy(rows.log_probs, rows.experts, rows.expert_log_probs, rows.expert_log_probs)
        loss, metrics = policy_loss(args, new, old, rewards[part], advantages[part], mask, model.config.n_expert)
        loss = loss * (len(part) / whole)
        metrics = {**metrics, "loss": loss.detach(), "grad_norm": update(model, optimizer, loss)}
        same = (new.experts[..., :, None] == rows.experts[..., None, :]).any(-1)  # [b, T, L, K]
        metrics["experts_changed"] = 1 - same[mask].float().mean()
        updates += 1
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value
    report |= {name: value / updates for name, value in sums.items()}
    report["updates"] = updates
    report.setdefault("loss", torch.zeros(()))
    return report


class Stop:
    asked = False
    at_once = False


@contextlib.contextmanager
def stop_politely():
    """The first Ctrl-C ends the run after the current step, with its state saved; a second one ends it at once."""
    stop = Stop()

    def handler(signum, frame):
        if stop.asked or stop.at_once:
            raise KeyboardInterrupt
        stop.asked = True
        os.write(2, b"\nstopping after this step; Ctrl-C once more stops at once\n")  # print is not for handlers

    try:
        previous = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not in the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def read_metrics(out: str) -> list[dict]:
    path = os.path.join(out, "metrics.jsonl")
    try:
        with open(path) as file:
            return [json.loads(line) for line in file]
    except ValueError:
        raise UserError(
            f"{path} holds a line that is not JSON: put the run's own file back, or start a new run with --init {out}"
        ) from None


def plot_curves(out: str):
    """curves.png: what metrics.jsonl holds, one panel a quantity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read_metrics(out) if row.get("split", "validation") == "validation"]
    names = ["loss", "perplexity", "accuracy", "f1", "rouge2", "reward_mean", "clip_share", "entropy", "load_max"]
    names = [n for n in names if any(n in r for r in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for phase in dict.fromkeys(r["phase"] for r in rows):
            points = [(r["step"], r[name]) for r in rows if r["phase"] == phase and name in r]
            if points:
                dots = "o" if phase == "evaluation" or len(points) == 1 else ""
                axis.plot(*zip(*points, strict=True), marker=dots, ms=3, label=phase)
        axis.set(xlabel="step", ylabel=name)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(os.path.join(out, "curves.png"), dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The demo and the entry
# ---------------------------------------------------------------------------------------------------------------------


def demo() -> int:
    """A dense model of the embedded text, upcycled and trained on in three ways; ends in a table of their routing."""
    import eval_routing

    out = "runs/demo"
    if os.path.exists(out):
        out = next(p for i in range(2, 10**6) if not os.path.exists(p := f"runs/demo-{i}"))
    common = ["--dataset", "pydocs", "--batch-size", "4", "--eval-every", "1000"]
    start = ["--init", f"{out}/dense", "--steps", "80"]
    arms = {
        "dense": ["--algo", "dense", "--steps", "300"],
        "MoE": ["--algo", "lm", *start],
        "ERL": ["--algo", "erl", *start],
        "ERL-router": ["--algo", "erl", "--erl-grad", "router", *start],
    }
    table = []
    for name, flags in arms.items():
        print(f"\n{name}: python train.py {' '.join(common + flags)}", file=sys.stderr)
        row = run(parse([*common, *flags, "--out", f"{out}/{name}"]))
        if name != "dense":
            row |= eval_routing.run(eval_routing.parse([f"{out}/{name}", "--samples", "20"]))
        table.append((name, row))
    columns = ("perplexity", "original_score", "perturbed_score", "mrr", "hit1")
    print(f"\n{'':12}{'perplexity':>12}{'original':>12}{'perturbed':>12}{'MRR':>12}{'Hit@1':>12}")
    for name, row in table:
        cells = "".join(f"{row[c]:12.3f}" if c in row else f"{'-':>12}" for c in columns)
        print(f"{name:12}{cells}")
    print(f"{'chance':12}{row['chance_mrr']:48.3f}{row['chance_hit1']:12.3f}")
    print(
        f"perplexity: of the test split; original, perturbed: of {row['samples']} windows of it, along the router's "
        f"route and along 99 random ones\npictures and metrics: {out}"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv:
            return demo()
        run(parse(argv))
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (sentence := users_mistake(error)) is None:
            raise
        print(f"train.py: {' '.join(sentence.split())}", file=sys.stderr)  # one line, whatever it quotes
        return 2


def users_mistake(error: Exception) -> str | None:
    """What to tell the user; None where the program is to blame."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory: lower --batch-size, --prompts-per-step, --n-expert or --model"
    return str(error) if isinstance(error, UserError) else None


if __name__ == "__main__":
    sys.exit(main())
