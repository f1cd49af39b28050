"""The experiments of PLAN.md and their arms, and the variants of a method that only an experiment needs.

A variant replaces one named function of train.py (or adds a loss to train.METHODS) in its own process: `Arm.setup` is
called before train.parse and says which. Everything else of a run is train.py as it stands.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

import data
import train
from baselines import gmpo_loss, grpo_loss
from erl import explore
from erpo import erpo_loss
from moe import Routes
from rais import CLIP_RANGES, rais_loss, router_shift
from support.arguments import options_of
from support.evaluation import text_windows
from support.tasks import rng

# ---------------------------------------------------------------------------------------------------------------------
# ERL: controls replace train.explore
# ---------------------------------------------------------------------------------------------------------------------


def explore_then(*changes: Callable):
    """A setup: what `explore` found is passed through every change(paths, generator) in turn."""

    def variant(forward, mask, top_k, *, generator=None, **options):
        paths = explore(forward, mask, top_k, generator=generator, **options)
        for change in changes:
            paths = change(paths, generator)
        return paths

    def setup():
        train.explore = variant

    return setup


def random_expert(paths, generator):
    """The decisions and advantages stay; what they are credited to are other experts, drawn anew: of all E, so that
    with one chance in E it is the expert that worked."""
    scores = torch.rand(*paths.experts.shape[:3], paths.original[1].shape[-1], generator=generator)
    experts = scores.topk(paths.experts.shape[3]).indices.to(paths.experts.device)  # [m * B, T, L, K]
    return paths._replace(experts=experts, old_router_log_probs=paths.perturbed[1].detach().gather(-1, experts))


def centred(paths, generator):
    """Advantages less their mean over the m passes at the same position: no position is better or worse as such."""
    A = paths.advantages.unflatten(0, (-1, len(paths.original[0])))  # [m, B, T]
    return paths._replace(advantages=(A - A.mean(0)).flatten(0, 1))


def level(paths, _):
    """Advantages less their mean over the replaced decisions at the same position: those that the loss counts, where
    `centred` counts all passes, and the worse ones have more replaced decisions."""
    shape, rows = paths.advantages.shape, len(paths.original[0])
    A, count = (x.unflatten(0, (-1, rows)) for x in (paths.advantages, paths.S.sum(-1)))  # [m, B, T]
    mean = (A * count).sum(0) / count.sum(0).clamp(min=1)
    return paths._replace(advantages=(A - mean).view(shape))


def constant(paths, _):
    """The same small negative advantage everywhere, about the mean that `centred` leaves: nothing is said."""
    return paths._replace(advantages=torch.full_like(paths.advantages, -0.13))


def shuffled(paths, generator):
    """The same advantages in random places."""
    A, counts = paths.advantages.clone(), paths.S.any(-1)
    A[counts] = A[counts][torch.randperm(int(counts.sum()), generator=generator)]
    return paths._replace(advantages=A)


def positive_alone(paths, _):
    return paths._replace(advantages=paths.advantages.clamp(min=0))


def negative_alone(paths, _):
    return paths._replace(advantages=paths.advantages.clamp(max=0))


def from_uniform(paths, _):
    """The policy that drew the experts is the uniform one, so the ratio is P / (1/E). What each expert is worth then
    weighs as much as the router would choose it, and the gradient of a constant advantage is 0 on average."""
    uniform = -math.log(paths.original[1].shape[-1])
    return paths._replace(old_router_log_probs=torch.full_like(paths.old_router_log_probs, uniform))


def explore_drawn(forward, mask, top_k, *, generator=None, **options):
    """`explore` whose experts are drawn from what the router gave them on the original pass (the public code of ERL's
    first author draws from the router by default): then it is the ratio 1 that belongs to them. That is exact in the
    first MoE layer; the second router reads something else in a perturbed pass, and there a rest of the drift stays."""
    P = None  # [B, T, L, E], the router's on the original pass, which comes first

    def forward_drawn(routes):
        nonlocal P
        if routes is None:
            passed = forward(None)
            P = passed[1].detach().exp().cpu()
            return passed
        copies = P.repeat(len(routes[0]) // len(P), 1, 1, 1)  # [m * B, T, L, E]
        drawn = torch.multinomial(copies.flatten(0, 2), top_k, generator=generator)
        routes[0].copy_(drawn.view(routes[0].shape))  # the experts of `explore` too: the same tensor
        return forward(routes)

    return explore(forward_drawn, mask, top_k, generator=generator, **options)


def drawn_from_router():
    train.explore = explore_drawn


def mean_alone(paths, generator):
    """The mean of the step's advantages everywhere."""
    counts = paths.S.any(-1)
    mean = paths.advantages[counts].mean() if counts.any() else 0.0
    return paths._replace(advantages=torch.full_like(paths.advantages, mean))


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def mean_log_p(log_p):
    """Its gradient is ERL's, on average over the uniform draw of the experts, where the advantage is -1."""
    return log_p.mean(-1)


def router_loss(strength: float, of: Callable = entropy):
    """A setup: plain LM training with `strength` times the mean of of(routers' log-probabilities [.., E]) added to the
    loss. Of the entropy: sharpening, ERL's suspected side effect, alone. Replaces train.original_loss."""
    plain = train.original_loss

    def variant(model, features, routing, batch, args):
        loss, metrics, log_probs = plain(model, features, routing, batch, args)
        if routing.logits.shape[2]:
            loss = loss + strength * of(routing.logits.log_softmax(-1))[batch.routed].mean()
        return loss, metrics, log_probs

    def setup():
        train.original_loss = variant

    return setup


def with_dropout(losses: Callable):
    """losses(model, batch, args, step) each of whose passes has dropout of its own, 0.1 of what enters the first
    router's layer."""

    def variant(model, batch, args, step):
        branch, generator = model.branch, rng(args.seed, "dropout", step)

        def dropped(hidden, *rest, **named):
            keep = torch.rand(hidden.shape, generator=generator).to(hidden.device) >= 0.1
            return branch(hidden * keep / 0.9, *rest, **named)

        model.branch = dropped
        try:
            yield from losses(model, batch, args, step)
        finally:
            model.branch = branch

    return variant


def lm_with_dropout():
    """MoE with the dropout of `as_published`. Replaces train.lm_losses."""
    train.lm_losses = with_dropout(train.lm_losses)


def as_published(exploring: Callable = explore):
    """A setup: ERL as the public code of its first author does it, as far as reading it tells: the advantage is about
    the probability of the token that a position reads, not of the one that it predicts (there of the tokens that its
    own forward has seen); each pass has dropout of its own (see with_dropout); one map of perturbed positions holds for
    all rows, layers and perturbed passes. Replaces train.explore, train.erl_losses, train.original_loss and
    train.perturbed_log_probs. With explore_drawn its experts are drawn from the router too, as they are there."""
    plain_loss, plain_log_probs = train.original_loss, train.perturbed_log_probs

    def of_tokens_read(model, features, batch):
        with torch.no_grad():
            return model.token_log_probs(features, batch.tokens[:, :-1].repeat(len(features) // len(batch.mask), 1))

    def original_loss(model, features, routing, batch, args):
        loss, metrics, _ = plain_loss(model, features, routing, batch, args)
        return loss, metrics, of_tokens_read(model, features, batch)

    def perturbed_log_probs(model, features, batch, S, args):
        return of_tokens_read(model, features, batch), plain_log_probs(model, features, batch, S, args)[1]

    def one_map(forward, mask, top_k, *, alpha, generator=None, **options):
        def forward_on_one_map(routes):
            if routes is not None:
                places = (torch.rand(routes[1].shape[1], generator=generator) < alpha).to(routes[1].device)  # [T]
                routes[1].copy_(places[None, :, None].expand_as(routes[1]))  # S of `explore` too: the same tensor
            return forward(routes)

        return exploring(forward_on_one_map, mask, top_k, alpha=alpha, generator=generator, **options)

    def setup():
        train.explore, train.erl_losses = one_map, with_dropout(train.erl_losses)
        train.original_loss, train.perturbed_log_probs = original_loss, perturbed_log_probs

    return setup


# ---------------------------------------------------------------------------------------------------------------------
# ERL: kinds of starts
# ---------------------------------------------------------------------------------------------------------------------


def little_text():
    """The training text cut to 32 kB. Replaces data.load_text."""
    plain = data.load_text

    def load_text(name, split, *rest, **named):
        text = plain(name, split, *rest, **named)
        return text._replace(tokens=text.tokens[: 32 * 1024]) if split == "train" else text

    data.load_text = load_text


DOMAINS = 8


def ciphers(vocabulary: int) -> torch.Tensor:
    """[DOMAINS, vocabulary] permutations of the 256 bytes: one text in eight alphabets. The first is the text."""
    table = torch.arange(vocabulary).repeat(DOMAINS, 1)
    for domain in range(1, DOMAINS):
        table[domain, :256] = torch.randperm(256, generator=rng("cipher", domain))
    return table


def domains_of(rows: int, step: int) -> torch.Tensor:
    """[rows] of a step's batch: in turn."""
    return (step * rows + torch.arange(rows)) % DOMAINS


def eight_domains():
    """Training rows are written in the eight alphabets in turn, and so are the windows of the held-out texts (the
    last target of a window is the first byte of the next one, so 1 of 256 predictions is hopeless, for every arm).
    Replaces data.load_text and train.load_task."""
    plain_text, plain_task = data.load_text, train.load_task

    def load_text(name, split, tokenizer, **named):
        text = plain_text(name, split, tokenizer, **named)
        if split == "train":
            return text
        tokens = torch.from_numpy(text.tokens.astype("int64"))
        domain = torch.arange(len(tokens)) // 256 % DOMAINS
        return text._replace(tokens=ciphers(tokenizer.vocab_size)[domain, tokens].numpy())

    def load_task(args, context, generative):
        task = plain_task(args, context, generative)
        table, plain = ciphers(task.tokenizer.vocab_size), task.batch

        def batch(step):
            drawn = plain(step)
            domain = domains_of(len(drawn.tokens), step)
            return drawn._replace(tokens=table[domain[:, None], drawn.tokens])

        batch.per_epoch = plain.per_epoch
        return task._replace(batch=batch)

    data.load_text, train.load_task = load_text, load_task


def one_expert_a_domain():
    """The start of erl-domains: a MoE whose expert e of every layer sees alphabet e alone. Replaces train.lm_losses."""
    eight_domains()

    def lm_losses(model, batch, args, step):
        c, (B, T) = model.config, batch.mask.shape
        domain = domains_of(B, step).to(batch.tokens.device).view(-1, 1, 1, 1)
        experts = domain.expand(B, T, len(c.moe_blocks), c.top_k)
        routes = Routes(experts, torch.ones_like(experts[..., 0], dtype=torch.bool))
        features, routing = model.branch(model.stem(batch.tokens[:, :-1]), routes)
        yield train.original_loss(model, features, routing, batch, args)[:2]

    train.lm_losses = lm_losses


def new_routers():
    """The arms of erl-domains: the start's routers are drawn anew. Replaces train.initial_model."""
    eight_domains()
    plain = train.initial_model

    def initial_model(args, tokenizer, dense_first):
        model, target = plain(args, tokenizer, dense_first)
        for name, p in model.named_parameters():
            if name.endswith("router.weight"):
                torch.nn.init.normal_(p, std=0.1, generator=rng(args.seed, "new routers", name))
        return model, target

    train.initial_model = initial_model


@torch.no_grad()
def right_experts(model, task) -> dict:
    """Of the first 64 windows of the test split: the share of decisions for the expert of the window's alphabet, and
    the perplexity were all decisions for it."""
    windows = itertools.islice(text_windows(task.held_out["test"].tokens, model.config.context), 64)
    tokens = torch.stack([window for window, _ in windows])
    hidden = model.stem(tokens[:, :-1])
    experts = model.branch(hidden)[1].experts  # [64, T, L, K]
    domain = torch.arange(len(tokens)) % DOMAINS  # a window is as long as the pieces that eight_domains writes
    right = domain[:, None, None, None].expand_as(experts)
    features, _ = model.branch(hidden, Routes(right, torch.ones_like(right[..., 0], dtype=torch.bool)))
    log_probs = model.token_log_probs(features, tokens[:, 1:])
    share = (experts == right).float().mean().item()
    return {"right_expert": share, "right_route_perplexity": (-log_probs.mean()).exp().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Generated answers: losses that are entries of train.METHODS
# ---------------------------------------------------------------------------------------------------------------------


def method(name: str, loss: Callable):
    """A setup: --algo NAME."""

    def setup():
        train.METHODS[name], train.OPTIONS[name] = loss, options_of(loss)

    return setup


def no_update(log_probs, response_mask):
    """The start, evaluated as the arms are."""
    return 0 * log_probs.masked_fill(~response_mask, 0).sum(), {"ratio_neg_log": log_probs.new_zeros(())}


def answers_are_drawn():
    """Held-out answers are sampled as those in training are, at temperature 1 from all of the vocabulary: what the
    methods change, where greedy answers say little. Changes the data set's row."""
    spec = data.DATASETS["written-addition"]
    data.DATASETS["written-addition"] = dataclasses.replace(spec, eval_temperature=1.0, eval_top_p=1.0)


def begin_answers():
    answers_are_drawn()
    method("none", no_update)()


def positive_only(
    log_probs, old_log_probs, advantages, response_mask, *, clip_low: float = 0.2, clip_high: float = 0.28
):
    """GRPO on the responses that were better than their group alone."""
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    return grpo_loss(log_probs, old_log_probs, advantages.clamp(min=0), response_mask, **clip)


def yoked(base: Callable):
    """The base with every token's gamma replaced by the mean gamma of this very update: the size of the shift without
    knowing where."""

    def loss(log_probs, old_log_probs, advantages, response_mask, router_log_probs, old_router_log_probs):
        gamma = router_shift(router_log_probs, old_router_log_probs)
        mean = gamma[response_mask].mean() if response_mask.any() else gamma.new_ones(())
        loss, metrics = base(log_probs, old_log_probs - mean.log(), advantages, response_mask)
        return loss, metrics | {"gamma_mean": mean}

    return loss


def scaled(base: Callable, scale: float = 0.975):
    """The base with a loss `scale` times as large (a common gamma of stale batches). Adam divides that out, so but for
    the limit on the gradient it is the same method in other bits: what two runs of one method differ by."""

    def loss(log_probs, old_log_probs, advantages, response_mask):
        loss, metrics = base(log_probs, old_log_probs, advantages, response_mask)
        return scale * loss, metrics

    return loss


def gamma_shuffled(log_probs, old_log_probs, advantages, response_mask, router_log_probs, old_router_log_probs):
    """RAIS with the update's gammas given to random tokens of it."""
    gamma = router_shift(router_log_probs, old_router_log_probs)
    values = gamma[response_mask]
    order = torch.randperm(len(values), generator=rng("gammas", len(values), float(log_probs.detach().sum())))
    gamma = gamma.masked_scatter(response_mask, values[order.to(values.device)])
    loss, metrics = gmpo_loss(log_probs, old_log_probs - gamma.log(), advantages, response_mask)
    return loss, metrics | {"gamma_mean": values.mean()}


def with_gradient(log_probs, old_log_probs, advantages, response_mask, router_log_probs, old_router_log_probs):
    """RAIS without its stop-gradient: GMPO on log w + log gamma, gamma with a gradient."""
    shift = (router_log_probs - old_router_log_probs).abs().mean((2, 3)).masked_fill(~response_mask, 0)  # [B, T]
    gamma = (-shift).exp().clamp(min=0.8)
    loss, metrics = gmpo_loss(log_probs + gamma.log(), old_log_probs, advantages, response_mask)
    return loss, metrics | {"gamma_mean": gamma.detach()[response_mask].mean()}


def rais_over(base: str):
    """RAIS over another base, its options those of rais_loss."""

    def loss(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        router_log_probs,
        old_router_log_probs,
        *,
        floor: float = 0.8,
        layers: Literal["mean", "sum"] = "mean",
    ):
        low, high = CLIP_RANGES[base]
        options = {"base": base, "clip_low": low, "clip_high": high, "floor": floor, "layers": layers}
        given = (log_probs, old_log_probs, advantages, response_mask, router_log_probs, old_router_log_probs)
        return rais_loss(*given, **options)

    return loss


def erpo_permuted(
    log_probs,
    old_log_probs,
    rewards,
    response_mask,
    experts,
    old_experts,
    expert_probs,
    old_expert_probs,
    *,
    num_experts: int,
    group_size: int,
):
    """ERPO whose clusters have the sizes of the real ones and no meaning: within each row and layer the tokens change
    places, old and new policy alike."""
    B, T, L, K = experts.shape
    generator = rng("permuted", float(log_probs.detach().sum()))
    scores = torch.rand(B, T, L, generator=generator).to(experts.device)
    # Response positions in their order, and in a random order; padding stays behind them, where it is.
    place = torch.arange(T, device=experts.device).view(1, T, 1).expand(B, T, L)
    outside = ~response_mask[:, :, None].expand(B, T, L)
    there = torch.where(outside, T + place, place).argsort(1)
    other = torch.where(outside, T + place, scores).argsort(1)
    source = torch.empty_like(there).scatter_(1, there, other)[..., None].expand(B, T, L, K)
    moved = [x.gather(1, source) for x in (experts, old_experts, expert_probs, old_expert_probs)]
    sizes = {"num_experts": num_experts, "group_size": group_size}
    return erpo_loss(log_probs, old_log_probs, rewards, response_mask, *moved, **sizes)


# ---------------------------------------------------------------------------------------------------------------------
# The experiments
# ---------------------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    flags: str  # of train.py, beside those of the experiment
    about: str
    setup: Callable | None = None
    tier: int = 1  # 0: a primary contrast needs it; then 1, then 2, where time is short


class Experiment(NamedTuple):
    about: str
    common: str  # flags of every run
    start: str  # flags of the run that all arms of a start begin from
    then: str  # flags of every arm
    arms: dict[str, Arm]
    start_setup: Callable | None = None
    arm_setup: Callable | None = None  # before the arm's own
    minutes: tuple[float, float] = (1.0, 1.0)  # of one core: the start's run, an arm
    figures: Callable | None = None  # (model, task) -> figures of its own, of every arm
    recipe: bool = False  # a run of recipes/erl_hf.py, which begins from its model by itself: no start's run


SHARPENING = (0.01, 0.03, 0.1, 0.3)
ERL, ROUTER = "--algo erl --erl-grad all", "--algo erl --erl-grad router"  # as the paper writes it; train.py's default
ERL_ARMS = {
    "lm": Arm("--algo lm", "MoE", tier=0),
    "erl": Arm(ERL, "ERL, gradient through the whole network (eq. 14)", tier=0),
    "erl-expert-random": Arm(ERL, "ERL that credits random experts", explore_then(random_expert), 0),
    "erl-router": Arm(ROUTER, "ERL, gradient to the routers alone (default)"),
    "erl-router-random": Arm(ROUTER, "ERL to the routers alone, random experts", explore_then(random_expert)),
    "erl-centred": Arm(ERL, "ERL, advantages centred within each position", explore_then(centred)),
    "erl-centred-random": Arm(ERL, "ERL, centred advantages, random experts", explore_then(centred, random_expert)),
    "erl-level": Arm(ERL, "ERL, mean 0 at each position", explore_then(level)),
    "erl-level-random": Arm(ERL, "ERL, mean 0 at each position, random experts", explore_then(level, random_expert)),
    "erl-constant": Arm(ERL, "ERL, advantage -0.13 everywhere", explore_then(constant)),
    "erl-router-level": Arm(ROUTER, "ERL to the routers alone, mean 0 at each position", explore_then(level)),
    "erl-router-constant": Arm(ROUTER, "ERL to the routers alone, advantage -0.13 everywhere", explore_then(constant)),
    "erl-shuffled": Arm(ERL, "ERL, advantages shuffled", explore_then(shuffled)),
    "erl-mean": Arm(ERL, "ERL, the mean advantage alone", explore_then(mean_alone)),
    "erl-positive": Arm(ERL, "ERL, positive advantages alone", explore_then(positive_alone)),
    "erl-negative": Arm(ERL, "ERL, negative advantages alone", explore_then(negative_alone)),
    "erl-clipped": Arm(ERL, "ERL, ratio to the uniform policy", explore_then(from_uniform)),
    "erl-weighted": Arm(
        f"{ERL} --clip-eps 100", "ERL, ratio to the uniform policy, no clip", explore_then(from_uniform)
    ),
    "erl-drawn": Arm(ERL, "ERL, experts drawn from the router", drawn_from_router),
    "erl-router-drawn": Arm(ROUTER, "ERL to the routers alone, experts drawn from the router", drawn_from_router),
    "erl-router-weighted": Arm(
        f"{ROUTER} --clip-eps 100", "ERL to the routers alone, ratio to the uniform policy", explore_then(from_uniform)
    ),
    "erl-router-weighted-random": Arm(
        f"{ROUTER} --clip-eps 100",
        "ERL to the routers alone, ratio to the uniform policy, random experts",
        explore_then(random_expert, from_uniform),
    ),
    **{f"sharpen-{s:g}": Arm("--algo lm", f"MoE + {s:g} x router entropy", router_loss(s)) for s in SHARPENING},
    # 0.065 = delta times the 0.13 of `erl-constant`
    "mean-log-p": Arm("--algo lm", "MoE + 0.065 x mean over the experts of log P", router_loss(0.065, mean_log_p)),
    "dense": Arm("--algo dense", "the dense model, trained on", tier=2),
    "erl-wpl": Arm(f"{ERL} --wpl", "ERL with the perturbed passes' LM loss (wPL)", tier=2),
    "erl-published": Arm(ERL, "ERL as published, experts drawn uniformly", as_published(), 2),
    "erl-published-drawn": Arm(ERL, "ERL as published, experts drawn from the router", as_published(explore_drawn), 2),
    "lm-dropout": Arm("--algo lm", "MoE with the dropout of ERL as published", lm_with_dropout, 2),
    "lm-straight": Arm("--algo lm --gate straight", "MoE, gate with a gradient", tier=2),
    "lm-plain": Arm("--algo lm --balance-coef 0 --z-coef 0", "MoE without balance and z loss", tier=2),
    "erl-plain": Arm(f"{ERL} --balance-coef 0 --z-coef 0", "ERL without balance and z loss", tier=2),
    "erl-delta-0.1": Arm(f"{ERL} --delta 0.1", "ERL, a fifth of the paper's weight of the RL loss", tier=2),
    "erl-no-clip": Arm(f"{ERL} --clip-grad 0", "ERL without a limit on the gradient", tier=2),
}


MORE = "--prompts-per-step 32 --lr 6e-5"  # four times the answers an update, which bear twice the learning rate
REPLAY, FROZEN = "--replay routing", "--freeze-router"
ANSWER_ARMS = {
    "none": Arm("--algo none --steps 1", "no update", method("none", no_update)),
    "positive": Arm("--algo positive", "GRPO, positive advantages alone", method("positive", positive_only)),
    "grpo": Arm("--algo grpo", "GRPO"),
    "gspo": Arm("--algo gspo", "GSPO", tier=0),
    "gmpo": Arm("--algo gmpo", "GMPO", tier=0),
    "cispo": Arm("--algo cispo", "CISPO"),
    "erpo": Arm("--algo erpo", "ERPO", tier=0),
    "erpo-none": Arm("--algo erpo --entropy-reward none", "ERPO without entropy reward"),
    "erpo-absolute": Arm("--algo erpo --entropy-reward absolute", "ERPO, absolute entropy"),
    "erpo-permuted": Arm(
        "--algo erpo-permuted", "ERPO, clusters without meaning", method("erpo-permuted", erpo_permuted)
    ),
    "rais": Arm("--algo rais", "RAIS over GMPO", tier=0),
    "rais-yoked": Arm("--algo rais-yoked", "GMPO, the update's mean gamma", method("rais-yoked", yoked(gmpo_loss)), 0),
    "rais-shuffled": Arm("--algo rais-shuffled", "RAIS, gammas shuffled", method("rais-shuffled", gamma_shuffled)),
    "rais-gradient": Arm(
        "--algo rais-gradient", "RAIS, gradient through gamma", method("rais-gradient", with_gradient)
    ),
    "rais-grpo": Arm("--algo rais-grpo", "RAIS over GRPO", method("rais-grpo", rais_over("grpo"))),
    "rais-grpo-yoked": Arm(
        "--algo rais-grpo-yoked", "GRPO, the update's mean gamma", method("rais-grpo-yoked", yoked(grpo_loss))
    ),
    "grpo-scaled": Arm("--algo grpo-scaled", "GRPO, 0.975 of its loss", method("grpo-scaled", scaled(grpo_loss))),
    "gmpo-scaled": Arm("--algo gmpo-scaled", "GMPO, 0.975 of its loss", method("gmpo-scaled", scaled(gmpo_loss))),
    "rais-gspo": Arm("--algo rais-gspo", "RAIS over GSPO", method("rais-gspo", rais_over("gspo"))),
    "rais-no-floor": Arm("--algo rais --floor 0", "RAIS without a floor", tier=2),
    "rais-sum": Arm("--algo rais --layers sum", "RAIS, layers multiplied", tier=2),
    "gmpo-replay": Arm(f"--algo gmpo {REPLAY}", "GMPO, routes replayed", tier=2),
    "gmpo-frozen": Arm(f"--algo gmpo {FROZEN}", "GMPO, router frozen", tier=2),
    **{
        f"gmpo-balance{name}": Arm(
            f"--algo gmpo --answer-balance-coef 1e-3 {flags}", f"GMPO, 1e-3 balance{about}", tier=2
        )
        for name, flags, about in (
            ("", "", ""),
            ("-replay", REPLAY, ", routes replayed"),
            ("-frozen", FROZEN, ", router frozen"),
        )
    },
    # The arms' setting is 8 prompts a batch in 4 updates: 240 updates of 2 prompts. Here updates of 2 prompts are taken
    # from larger batches, whose later ones are staler, or from fresh ones, none of them stale; "1 update a batch" takes
    # its 8 prompts together.
    **{
        f"{algo}-{name}": Arm(f"--algo {algo} {flags}", f"{algo}, {about}", tier=2)
        for algo in ("gmpo", "rais", "grpo")
        for name, about, flags in (
            ("1-of-a-batch", "1 update a batch", "--minibatches 1"),
            ("16-of-a-batch", "16 updates a batch of 32", "--prompts-per-step 32 --minibatches 16 --steps 15"),
            ("64-of-a-batch", "64 updates a batch of 128", "--prompts-per-step 128 --minibatches 64 --steps 4"),
            ("fresh", "fresh batches of 2 prompts", "--prompts-per-step 2 --minibatches 1 --steps 240"),
        )
    },
}
SWEPT = ("grpo", "gspo", "gmpo", "cispo", "erpo", "rais")
ROUTERS = ("gmpo-replay", "gmpo-frozen", "gmpo-balance", "gmpo-balance-replay", "gmpo-balance-frozen")
CONTROLS = ("rais-yoked", "rais-grpo", "rais-grpo-yoked", "grpo-scaled", "gmpo-scaled", *ROUTERS)
MORE_OF = (*SWEPT, "erpo-permuted", "erpo-none", *CONTROLS)
ANSWER_ARMS |= {
    f"{name}-more": ANSWER_ARMS[name]._replace(
        flags=f"{ANSWER_ARMS[name].flags} {MORE}", about=f"{ANSWER_ARMS[name].about}, four times the answers", tier=1
    )
    for name in MORE_OF
}
ANSWER_ARMS |= {  # the sweep: half and twice that learning rate
    f"{name}-more-{speed}": ANSWER_ARMS[f"{name}-more"]._replace(
        flags=f"{ANSWER_ARMS[f'{name}-more'].flags} --lr {rate}",
        about=f"{ANSWER_ARMS[f'{name}-more'].about}, {times} the learning rate",
    )
    for name in SWEPT
    for speed, rate, times in (("slow", "3e-5", "half"), ("fast", "1.2e-4", "twice"))
}
ANSWER_ARMS |= {  # as many answers and updates; the last of 16 updates a batch is off the policy by 15
    f"{name}-stale": ANSWER_ARMS[name]._replace(
        flags=f"{ANSWER_ARMS[name].flags} --prompts-per-step 128 --minibatches 16 --steps 15",
        about=f"{ANSWER_ARMS[name].about}, 16 updates a batch of 128 prompts",
    )
    for name in [f"{n}-more" for n in MORE_OF if not n.startswith(("erpo-", "gmpo-balance"))]
}

TEXT = "--dataset pydocs --batch-size 4 --eval-samples 40"
ERL_DOMAINS = Experiment(
    "positive control: each expert was trained on one of eight alphabets, then the routers are drawn anew",
    TEXT,
    "--algo lm --pretrain-steps 0 --lr 1e-3 --steps 600 --eval-every 600",
    "--steps 120 --eval-every 40 --checkpoint-every 120",
    {name: arm for name, arm in ERL_ARMS.items() if name != "dense"},  # its start is a MoE
    one_expert_a_domain,
    new_routers,
    minutes=(1.3, 1.0),
    figures=right_experts,
)
EXPERIMENTS = {
    "erl-text": Experiment(
        "a tiny dense byte model of the embedded text, upcycled; all arms from the same model",
        TEXT,
        "--algo dense --steps 400 --eval-every 400",
        "--steps 120 --eval-every 40 --checkpoint-every 120",
        ERL_ARMS,
        minutes=(1.7, 1.3),
    ),
    "erl-overfit": Experiment(
        "as erl-text, on 32 kB of it, which are read 19 times and overfitted a little",
        TEXT,
        "--algo dense --steps 500 --eval-every 500",
        "--steps 120 --eval-every 40 --checkpoint-every 120",
        ERL_ARMS,
        little_text,
        little_text,
        minutes=(1.4, 1.3),
    ),
    "erl-domains": ERL_DOMAINS,
    "erl-still": ERL_DOMAINS._replace(
        about="positive control: as erl-domains, where all but the routers stays nearly as it is (rate 3e-6, "
        "routers 3e-3)",
        then="--steps 360 --eval-every 120 --checkpoint-every 360 --lr 3e-6 --router-lr-factor 1000",
        arms={name: ERL_ARMS[name] for name in ("lm", *(a for a in ERL_ARMS if a.startswith("erl-router")))},
        minutes=(1.3, 2.0),
    ),
    "answers": Experiment(
        "sums of two numbers of eight digits, worked out in writing; all arms from the same supervised model",
        "--dataset written-addition --top-k 2 --test-samples 500 --eval-samples 100 --prompts-per-step 8",
        "--algo none --batch-size 16 --pretrain-steps 1000 --steps 1 --eval-every 1000",
        "--pretrain-steps 0 --steps 60 --lr 3e-5 --eval-every 60 --minibatches 4",
        ANSWER_ARMS,
        begin_answers,
        answers_are_drawn,
        minutes=(4.0, 2.0),
    ),
    "erl-real": Experiment(
        "SmolLM2-135M upcycled to 413 M parameters, WikiText-2; the gradient of ERL to the routers alone",
        "--model smollm2 --dataset wikitext2 --steps 50 --eval-windows 32 --checkpoint-every 50",
        "",
        "",
        {
            "lm": Arm("--arm lm", "MoE", tier=0),
            "erl": Arm("--arm erl", "ERL", tier=0),
            "expert-random": Arm("--arm expert-random", "ERL that credits random experts", tier=0),
            "centred": Arm("--arm centred", "ERL, advantages centred within each position", tier=0),
        },
        minutes=(0.0, 9.0),
        recipe=True,
    ),
}
