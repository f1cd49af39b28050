"""train.py: the objectives of a step on text by the book, and updates on generated answers."""

import argparse
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import BYTES, MICRO, args_of, assert_same_gradients, gradients, make, places, step_args

import data
import train
from baselines import group_advantages
from moe import GPT, SIZES, MoEConfig, Routes, Routing, upcycle
from support.errors import UserError
from support.generation import generate
from support.run_folder import make_optimizer
from support.tasks import Batch, Order, load_task, rng

# ------------------------------------------------------------------------------------------- ERL's loss, by the book


def erl_losses(model, batch, args, step=0):
    """The losses of a step, one an inner epoch, and the paths that it drew: (loss, metrics, paths)."""
    seen, real = [], train.explore

    def explore(*given, **options):
        seen.append(real(*given, **options))
        return seen[0]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "explore", explore)
        for loss, metrics in train.erl_losses(model, batch, args, step):
            yield loss, metrics, seen[0]


def lm_by_the_book(logits, targets, mask):
    log_probs = F.log_softmax(logits, -1)
    terms = [-log_probs[b, t, targets[b, t]] for b, t in places(mask)]
    return sum(terms) / len(terms)


def router_losses_by_the_book(routing, routed, E):
    """For each layer E * sum_i f_i Pbar_i and mean logsumexp^2, over every token that is not padding."""
    balance, z, loads = [], [], []
    for layer in range(routing.logits.shape[2]):
        chosen = [int(e) for b, t in places(routed) for e in routing.experts[b, t, layer]]
        logits = torch.stack([routing.logits[b, t, layer] for b, t in places(routed)])
        mean_probs = F.softmax(logits, -1).mean(0)
        loads.append([chosen.count(i) / len(chosen) for i in range(E)])
        balance.append(E * sum(f * mean_probs[i] for i, f in enumerate(loads[-1])))
        z.append(torch.logsumexp(logits, -1).square().mean())
    return sum(balance), sum(z), loads


def original_by_the_book(model, out, batch, args):
    """L_o: the LM loss over the mask, and the router losses of each layer over what is routed."""
    balance, z, _ = router_losses_by_the_book(out.routing, batch.routed, model.config.n_expert)
    lm = lm_by_the_book(out.logits, batch.tokens[:, 1:], batch.mask)
    return lm + args.balance_coef * balance + args.z_coef * z


def erl_by_the_book(model, batch, args, paths, noise=None, old=None, advantages=None):
    """Eq. 6-17 with one original forward and m separate perturbed ones. -> loss, advantages, old probabilities.

    A second inner epoch (`old` and `advantages` given) is delta * L_RL alone.
    """
    inputs, targets, mask, B = batch.tokens[:, :-1], batch.tokens[:, 1:], batch.mask, len(batch.tokens)
    original = model(inputs, noise=noise)
    o = F.log_softmax(original.logits, -1).detach()
    blocks = [model.blocks[i].mlp for i in model.config.moe_blocks]
    terms, perturbed_lm, drawn_A, drawn_P = [], [], {}, {}
    for j in range(args.n_perturb):
        S = paths.S[j * B : (j + 1) * B]
        out = model(inputs, routes=Routes(paths.experts[j * B : (j + 1) * B], S), noise=noise)
        p = F.log_softmax(out.logits, -1)
        perturbed_lm.append(lm_by_the_book(out.logits, targets, mask))
        for b, t in places(mask):
            before = float(o[b, t, targets[b, t]])
            gap = float(p[b, t, targets[b, t]].detach()) - before
            gap = 0 if abs(gap) <= 4 * 2**-23 * max(4, abs(before)) else gap  # four units in float32's last place
            A = drawn_A[j, b, t] = gap if args.advantage == "log" else float(np.sign(gap))
            if advantages is not None:
                A = advantages[j, b, t]
            for layer, block in enumerate(blocks):
                if not S[b, t, layer]:
                    continue
                if args.erl_grad == "router":
                    logits = block.router.weight @ out.routing.inputs[layer][b, t].detach()
                else:
                    logits = out.routing.logits[b, t, layer]
                P, f, K = F.softmax(logits, -1), 0, model.config.top_k
                for i in paths.experts[j * B + b, t, layer].tolist():
                    drawn_P[j, b, t, layer, i] = float(P[i].detach())
                    r = P[i] / (float(P[i].detach()) if old is None else old[j, b, t, layer, i])
                    f = f - torch.minimum(r * A, torch.clamp(r, 1 - args.clip_eps, 1 + args.clip_eps) * A) / K
                terms.append(f)
    L_p = sum(terms) / len(terms)
    if old is not None:
        return args.delta * L_p, drawn_A, drawn_P
    if args.wpl:
        L_p = L_p + sum(perturbed_lm) / len(perturbed_lm)
    return original_by_the_book(model, original, batch, args) + args.delta * L_p, drawn_A, drawn_P


def move(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.5 if "router" in name else 0.02) * torch.randn(p.shape, generator=rng(name), dtype=p.dtype))


@pytest.mark.parametrize("jitter", [0.0, 0.3])
@pytest.mark.parametrize("advantage", ["static", "log"])
@pytest.mark.parametrize("wpl", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("erl_grad", ["all", "router"])
def test_erl_is_its_equations_in_value_and_gradient(erl_grad, top_k, wpl, advantage, jitter):
    model, batch = make(seed=top_k, top_k=top_k)
    args = step_args(
        erl_grad=erl_grad, wpl=wpl, advantage=advantage, top_k=top_k, jitter=jitter, inner_epochs=2, balance_coef=0.02
    )
    noise = model.jitter(batch.mask.shape, jitter, rng(0, "jitter", 0))
    assert (noise is None) == (not jitter)
    epochs = erl_losses(model, batch, args)
    loss, metrics, paths = next(epochs)
    expected, A, P = erl_by_the_book(model, batch, args, paths, noise)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(model, loss, expected)
    S = paths.S.any(-1)
    A = {(j, b, t): a if S[j * 2 + b, t] else 0.0 for (j, b, t), a in A.items()}
    ours = {(j, b, t): float(paths.advantages[j * 2 + b, t]) for j, b, t in A if S[j * 2 + b, t]}
    assert ours == pytest.approx({place: a for place, a in A.items() if place in ours})
    assert len(set(ours.values())) > 1  # both better and worse routes were met

    # a second inner epoch: the first one's routes, advantages and old probabilities, at moved weights; no LM loss
    move(model)
    again, metrics, _ = next(epochs)
    expected, moved_A, _ = erl_by_the_book(model, batch, args, paths, noise, old=P, advantages=A)
    assert moved_A != A  # drawn anew they would be others
    torch.testing.assert_close(again, expected)
    assert_same_gradients(model, again, expected)
    assert abs(float(metrics["ratio_mean"]) - 1) > 1e-3 and float(metrics["clip_share"]) > 0
    assert next(epochs, None) is None


def test_two_inner_epochs_are_one_epoch_of_the_language_model():
    """Without an RL loss (delta 0) the second epoch has no gradient at all, and wPL's LM loss is learned once too."""
    model, batch = make()
    for wpl in (False, True):
        losses = list(train.erl_losses(model, batch, step_args(delta=0.0, inner_epochs=2, wpl=wpl), 0))
        assert len(losses) == 2
        first, second = (gradients(model, loss) for loss, _ in losses)
        assert any(g.any() for g in first.values()) and not any(g.any() for g in second.values())


def test_a_prompt_and_padding_are_never_perturbed():
    model, batch = make()
    (_, metrics, paths), *_ = erl_losses(model, batch, step_args(alpha=1.0))
    assert torch.equal(paths.S, batch.mask.repeat(3, 1)[..., None].expand_as(paths.S))
    assert float(metrics["perturbed_share"]) == pytest.approx(float(batch.mask.float().mean()))
    original = paths.original[0].repeat(3, 1)
    assert not (original[~batch.mask.repeat(3, 1)]).any()  # what does not count is not read either


def test_what_a_prompt_holds_meets_no_perturbation():
    """Before the answer the perturbed pass is the original one: the same features to the last bit of float64."""
    model, batch = make(context=10)
    mask = batch.mask.clone()
    mask[:, :4] = False
    seen, real = [], model.branch

    def branch(hidden, routes=None, **given):
        features, routing = real(hidden, routes, **given)
        seen.append((features.detach(), routing.experts))
        return features, routing

    model.branch = branch
    next(train.erl_losses(model, batch._replace(mask=mask), step_args(alpha=1.0), 0))
    (original, chosen), (perturbed, taken) = seen
    assert torch.equal(chosen[:, :4].repeat(3, 1, 1, 1), taken[:, :4])
    torch.testing.assert_close(original[:, :4].repeat(3, 1, 1), perturbed[:, :4], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(original[:, 4:].repeat(3, 1, 1), perturbed[:, 4:], atol=1e-3)


@pytest.mark.parametrize("losses", [train.lm_losses, train.erl_losses])
def test_router_losses_and_load_count_prompts_and_not_padding(losses):
    model, batch = make(top_k=2)
    args = step_args(balance_coef=0.3, z_coef=0.2, delta=0.0, top_k=2)
    loss, metrics = next(losses(model, batch, args, 0))
    out = model(batch.tokens[:, :-1])
    balance, z, loads = router_losses_by_the_book(out.routing, batch.routed, 4)
    lm = lm_by_the_book(out.logits, batch.tokens[:, 1:], batch.mask)
    expected = lm + 0.3 * balance + 0.2 * z
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(model, loss, expected)
    assert metrics["loss"].item() == pytest.approx(lm.item())  # what is logged as loss is the LM loss
    assert metrics["balance_loss"].item() == pytest.approx(balance.item() / 2)
    assert metrics["z_loss"].item() == pytest.approx(z.item() / 2)
    logged = train.describe_routing(metrics["routing"], batch)
    assert logged["load_min"].item() == pytest.approx(min(map(min, loads)))
    assert logged["load_max"].item() == pytest.approx(max(map(max, loads)))
    assert logged["max_vio"].item() == pytest.approx(sum(4 * max(load) - 1 for load in loads) / 2)
    for other in (batch.mask, torch.ones_like(batch.mask)):  # neither the answers alone nor all positions
        assert abs(router_losses_by_the_book(out.routing, other, 4)[0].item() - balance.item()) > 1e-3


def routers_of(found):
    return {n for n in found if n.endswith("router.weight")}


def test_gradient_router_stops_at_the_routers():
    model, batch = make()
    alone = gradients(model, next(train.lm_losses(model, batch, step_args(), 0))[0])
    for erl_grad in ("router", "all"):
        loss = next(train.erl_losses(model, batch, step_args(erl_grad=erl_grad), 0))[0]
        moved = {n for n, g in gradients(model, loss).items() if not torch.allclose(g, alone[n], rtol=1e-9, atol=1e-12)}
        routers = routers_of(alone)
        assert len(routers) == 2
        if erl_grad == "router":
            assert moved == routers
        else:
            assert routers < moved


@pytest.mark.parametrize(("gate", "top_k"), [("renorm", 1), ("renorm", 2), ("prob", 1), ("straight", 1)])
def test_the_language_model_reaches_the_routers_by_their_gate_alone(gate, top_k):
    """K = 1 with weights that are renormalised: the weight is 1 whatever the router says, and it learns nothing."""
    model, batch = make(gate=gate, top_k=top_k)
    found = gradients(model, next(train.lm_losses(model, batch, step_args(balance_coef=0.0, z_coef=0.0), 0))[0])
    reached = {n for n in routers_of(found) if found[n].abs().max() > 1e-9}
    assert reached == (set() if (gate, top_k) == ("renorm", 1) else routers_of(found))
    for coefs in (dict(balance_coef=1e-3, z_coef=0.0), dict(balance_coef=0.0, z_coef=1e-3)):
        found = gradients(model, next(train.lm_losses(model, batch, step_args(**coefs), 0))[0])
        assert all(found[n].abs().max() > 1e-9 for n in routers_of(found))


def test_a_straight_gate_gives_the_original_and_perturbed_passes_the_same_weights():
    ((_, metrics, paths),) = erl_losses(*make(gate="straight"), step_args())
    ((_, expected, theirs),) = erl_losses(*make(gate="renorm"), step_args())
    assert torch.equal(paths.advantages, theirs.advantages)
    torch.testing.assert_close(metrics, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("erl_grad", ["all", "router"])
def test_nothing_perturbed_is_the_plain_step(erl_grad, dtype):
    model, batch = make(dtype=dtype)
    for advantage in ("static", "log"):
        args = step_args(alpha=0.0, erl_grad=erl_grad, advantage=advantage)
        (loss, metrics, paths), *_ = erl_losses(model, batch, args)
        assert not paths.S.any()
        assert metrics["rl_loss"] == 0 and metrics["perturbed_share"] == 0
        plain, _ = next(train.lm_losses(model, batch, args, 0))
        tolerance = {} if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-6)
        assert_same_gradients(model, loss, plain, **tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("erl_grad", ["all", "router"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_copies_of_one_expert_are_neither_better_nor_worse(top_k, erl_grad, dtype):
    """A freshly upcycled model: whatever route is taken, what remains is rounding, and no sign must be made of it."""
    config = MoEConfig(vocab_size=257, top_k=top_k, **SIZES["tiny"])
    model = upcycle(GPT(config.dense(), rng(0)), config, rng(1))

    def advantages(length, **options):
        tokens = torch.randint(0, 257, (2, length + 1), generator=rng(length))
        every = torch.ones(2, length, dtype=torch.bool)
        args = step_args(erl_grad=erl_grad, top_k=top_k, dtype=dtype, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            ((_, _, paths),) = erl_losses(model, Batch(tokens, every, every), args)
        assert paths.S.any()
        return paths.advantages[paths.S.any(-1)]

    for length in (4, 8, 64):
        assert advantages(length).abs().max() == 0
    if (top_k, dtype) == (2, "float32"):  # with 1/2 + 1/2 for P_i + P_j: the rounding is there
        assert advantages(64, rounding_units=0.0).abs().max() == 1


def test_experts_that_differ_are_told_apart_in_bfloat16_too():
    model, batch = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ((_, _, paths),) = erl_losses(model, batch, step_args(dtype="bfloat16"))
    assert paths.advantages[paths.S.any(-1)].abs().float().mean() > 0.5


@pytest.mark.parametrize("says", ["next", "current"])
def test_the_credit_goes_to_the_position_that_predicts(says):
    """A branch whose perturbed pass knows the right next token at one position alone."""
    T, t0, m = 6, 3, 2
    config = MoEConfig(vocab_size=16, n_embd=16, context=8, n_layer=4, n_head=2, n_expert=4, moe_every=2)
    model = GPT(config, rng(0))
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(16))  # a feature is a vote for a token
    tokens = torch.arange(1, T + 2)[None]
    every = torch.ones(1, T, dtype=torch.bool)
    leaf = torch.randn(m, T, 2, 4, generator=rng(1), requires_grad=True)
    real = model.branch

    def branch(hidden, routes=None, noise=None):
        features = torch.zeros(len(hidden), T, 16)
        if routes is None:
            return features, real(hidden)[1]
        features[:, t0, tokens[0, t0 + 1 if says == "next" else t0]] = 5.0
        return features, Routing(leaf, routes.experts, routes.forced, (hidden, hidden))

    model.branch = branch
    args = step_args(n_perturb=m, alpha=0.8)
    ((loss, _, paths),) = erl_losses(model, Batch(tokens, every, every), args)
    decided = paths.S.any(-1)
    expected = torch.zeros(m, T)
    expected[:, t0] = 1 if says == "next" else -1  # a token that is not the next one is worse than no opinion
    assert torch.equal(paths.advantages[decided], expected[decided])
    (gradient,) = torch.autograd.grad(loss, leaf)
    touched = gradient.abs().sum(-1) > 0  # [m, T, L]
    assert paths.S[:, t0].any()
    expected = paths.S.clone()
    expected[:, torch.arange(T) != t0] = False
    assert torch.equal(touched, expected)


# ------------------------------------------------------------------------------------------------------------- jitter


@pytest.mark.parametrize("losses", [train.lm_losses, train.erl_losses])
def test_jitter_is_off_by_default_and_the_same_for_every_pass_of_a_step(losses):
    model, batch = make()
    seen, real = [], model.branch

    def branch(hidden, routes=None, noise=None, **given):
        seen.append(noise)
        return real(hidden, routes, noise=noise, **given)

    model.branch = branch
    for algo in ("lm", "erl"):
        assert args_of(f"--algo {algo}").jitter == 0.0
    list(losses(model, batch, step_args(), 0))
    assert seen and all(noise is None for noise in seen)
    drawn = {}
    for step in (0, 1):
        seen.clear()
        list(losses(model, batch, step_args(jitter=0.1, inner_epochs=2), step))
        assert len(seen) == (3 if losses is train.erl_losses else 1)
        first = drawn[step] = seen[0]
        assert len(first) == 2 and all(0.9 <= n.min() < n.max() <= 1.1 for n in first)
        for other in seen[1:]:
            assert all(torch.equal(n.repeat(3, 1, 1), o) for n, o in zip(first, other, strict=True))
    assert not torch.equal(drawn[0][0], drawn[1][0])  # another step, other noise


# ------------------------------------------------------------------------------------------------- generated answers

RL = [*train.METHODS, "rais --base gspo", "rais --base grpo"]


def uneven(spec, response, example):
    """A reward that an untrained model meets in several sizes."""
    return sum(map(ord, response)) % 3 / 2


class Rollouts:
    """A model, its task, an optimizer in the place of a run, and records of what `train_answers` hands on."""

    def __init__(self, monkeypatch, flags, reward=uneven, lr=1e-2):
        self.args = args_of(f"--dataset addition --max-new-tokens 4 --group-size 4 --prompts-per-step 4 {flags}")
        config = MoEConfig(vocab_size=257, top_k=2, **MICRO)
        self.model = GPT(config, rng(0))
        with torch.no_grad():
            self.model.wte.weight.mul_(8)  # opinions, so that an update shows
            self.model.wte.weight[BYTES.end] *= 3  # the end token comes often
        self.task = load_task(self.args, config.context, generative=True)
        self.optimizer = make_optimizer(self.model, 0.1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.asked, self.losses, self.rewarded, self.learned = [], [], [], []
        real_forward, real_inputs = train.policy_forward, train.loss_inputs

        def forward(model, rollout, args):
            self.asked.append(rollout)
            return real_forward(model, rollout, args)

        def inputs(new, old, *rest):
            self.losses.append((new, old, *rest))
            return real_inputs(new, old, *rest)

        def rewarded(spec, response, example):
            self.rewarded.append(example)
            return reward(spec, response, example)

        monkeypatch.setattr(train, "policy_forward", forward)
        monkeypatch.setattr(train, "loss_inputs", inputs)
        monkeypatch.setattr(data, "reward", rewarded)

    # What train_answers asks of a run.

    def steps(self):
        yield self.now

    def update(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.learned.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"grad_norm": norm}

    def after(self, metrics, tokens, every):
        assert every == 1 and tokens == round(float(metrics["response_length"]) * 4 * self.args.prompts_per_step)
        self.report = {k: float(v) for k, v in metrics.items() if not getattr(v, "shape", ())}

    def step(self, step=0):
        self.asked.clear(), self.losses.clear(), self.rewarded.clear(), self.learned.clear()
        self.now = step
        train.train_answers(self.model, self.task, self.args, self)
        return self.report


def loss_of(args, new, old, rewards, response_mask, config):
    advantages = group_advantages(rewards, 4)
    return train.METHODS[args.algo](**train.loss_inputs(new, old, rewards, advantages, response_mask, config, args))


@pytest.mark.parametrize("replay", ["none", "routing"])
@pytest.mark.parametrize("algo", RL)
def test_the_first_ratio_of_a_batch_is_exactly_one(algo, replay, micro, monkeypatch):
    run = Rollouts(monkeypatch, f"--algo {algo} --minibatches 1 --replay {replay}")
    for step in range(3):  # the second step's rollout comes from an updated policy: 1 again
        report = run.step(step)
        assert report["updates"] == 1
        assert report["ratio_mean"] == 1.0 and report["ratio_std"] == 0.0 and report["clip_share"] == 0.0
        assert report["grad_norm"] > 0
        if "rais" in algo:
            assert report["gamma_mean"] == report["gamma_min"] == 1.0 and report["floor_share"] == 0.0
        if algo == "erpo":
            assert report["clusters"] > 0 and report["dropped_clusters"] == 0
            assert report["entropy_reward"] == 0.0


@pytest.mark.parametrize("algo", RL)
def test_later_minibatches_see_an_older_policy(algo, micro, monkeypatch):
    run = Rollouts(monkeypatch, f"--algo {algo} --minibatches 4")
    report = run.step()
    assert report["updates"] == len(run.losses) == 4
    for i, ((new, old, *_), rows) in enumerate(zip(run.losses, run.asked, strict=True)):
        mask = rows.response_mask
        gap = (new.log_probs - old.log_probs)[mask].abs().max()
        shift = (new.log_probs_at_old_experts - old.log_probs_at_old_experts)[mask].abs().max()
        assert (gap == 0 and shift == 0) if i == 0 else (gap > 1e-4 and shift > 1e-4)
        torch.testing.assert_close(old.log_probs[mask], rows.log_probs[mask])  # what was recorded while sampling
    assert report["ratio_std"] > 0
    if "rais" in algo:
        assert report["gamma_min"] < report["gamma_mean"] < 1.0  # the router has moved


def test_router_shift_compares_the_same_experts(micro, monkeypatch):
    """Where the update's forward chooses other experts than the rollout did, an unmoved router is still unmoved."""
    run = Rollouts(monkeypatch, "--algo rais --minibatches 1")
    run.step()
    rows = run.asked[0]._replace(experts=(run.asked[0].experts + 1) % 8)
    new, _ = train.policy_forward(run.model, rows, run.args)
    assert not torch.equal(new.expert_log_probs, new.log_probs_at_old_experts)
    old = train.Policy(*(t.detach() for t in new))
    _, metrics = loss_of(run.args, new, old, run.losses[0][2], rows.response_mask, run.model.config)
    assert metrics["gamma_min"] == 1.0


def test_a_group_stays_together(micro, monkeypatch):
    run = Rollouts(monkeypatch, "--algo grpo --minibatches 2 --prompts-per-step 6")
    run.step()
    examples = [e.prompt for e in run.rewarded]
    assert len(examples) == 24
    assert all(len(set(examples[i : i + 4])) == 1 for i in range(0, 24, 4))  # rows of a group are neighbours
    assert len(set(examples)) == 6
    drawn = [run.task.examples[i].prompt for _, i in Order(len(run.task.examples), 0, "prompts")(0, 6)]
    assert examples[::4] == drawn
    prompts = []
    for rows in run.asked:
        starts = rows.response_mask.int().argmax(1)
        texts = [BYTES.decode(row[: s + 1].tolist()) for row, s in zip(rows.tokens, starts, strict=True)]
        assert len(texts) % 4 == 0 and all(len(set(texts[i : i + 4])) == 1 for i in range(0, len(texts), 4))
        prompts += texts[::4]
    kept = [p for p in drawn if p in prompts]
    assert prompts == kept and len(kept) >= 3  # in their order; groups with equal rewards are not asked again


def test_the_end_token_belongs_to_the_response(micro, monkeypatch):
    run = Rollouts(monkeypatch, "--algo grpo --minibatches 1 --prompts-per-step 8")
    report = run.step()
    (rows,) = run.asked
    ended = 0
    for tokens, mask in zip(rows.tokens[:, 1:], rows.response_mask, strict=True):
        response = tokens[mask].tolist()
        assert response and BYTES.end not in response[:-1]
        assert response[-1] == BYTES.end or len(response) == 4
        ended += response[-1] == BYTES.end
    assert 0 < ended < len(rows.tokens)  # both kinds were there
    assert report["response_length"] <= 4


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_log_probs_are_those_of_the_temperature_that_was_sampled(temperature, micro, monkeypatch):
    run = Rollouts(monkeypatch, f"--algo grpo --minibatches 1 --temperature {temperature}")
    before = copy.deepcopy(run.model)
    run.step()
    ((new, *_),), (rows,) = run.losses, run.asked
    log_probs = F.log_softmax(before(rows.tokens[:, :-1]).logits / temperature, -1)
    expected = log_probs.gather(-1, rows.tokens[:, 1:, None]).squeeze(-1)
    mask = rows.response_mask
    torch.testing.assert_close(new.log_probs[mask], expected[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.log_probs[mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algo", [*RL, "erpo --entropy-reward absolute"])
def test_equal_rewards_change_nothing_and_are_counted(algo, micro, monkeypatch):
    run = Rollouts(monkeypatch, f"--algo {algo} --minibatches 2", reward=lambda *_: 0.1)
    before = copy.deepcopy(run.model.state_dict())
    report = run.step()
    assert report["silent_groups"] == 1.0 and report["updates"] == 0 and report["loss"] == 0
    assert report["reward_mean"] == pytest.approx(0.1) and report["reward_std"] == pytest.approx(0, abs=1e-6)
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not run.optimizer.state  # not even a step of momentum or weight decay


@pytest.mark.parametrize("algo", [*RL, "erpo --entropy-reward absolute"])
def test_silent_groups_still_count_in_the_mean_over_rows(algo, micro, monkeypatch):
    quiet = {}

    def reward(spec, response, example):  # every other group gets equal rewards
        return 1.0 if quiet.setdefault(example.prompt, len(quiet) % 2) else uneven(spec, response, example)

    run = Rollouts(monkeypatch, f"--algo {algo} --minibatches 1", reward)
    model, args, before = run.model, run.args, copy.deepcopy(run.model)
    report = run.step()
    assert report["silent_groups"] >= 0.5 and len(run.losses[0][2]) <= 8 < 16
    examples = [run.task.examples[i] for _, i in Order(len(run.task.examples), 0, "prompts")(0, 4) for _ in range(4)]
    rollout = generate(
        before,
        [BYTES.encode(e.prompt) for e in examples],
        max_new_tokens=4,
        end_token=BYTES.end,
        generator=rng(0, "rollout", 0),
    )
    rewards = torch.tensor(
        [reward(None, BYTES.decode(r), e) for r, e in zip(rollout.responses(BYTES.end), examples, strict=True)]
    )
    assert float(rewards.mean()) == pytest.approx(report["reward_mean"])
    new, _ = train.policy_forward(before, rollout, args)
    old = train.Policy(*(t.detach() for t in new))
    loss, _ = loss_of(args, new, old, rewards, rollout.response_mask, before.config)
    assert loss.item() == pytest.approx(report["loss"], abs=1e-6)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(before.parameters(), 1.0)
    assert norm.item() == pytest.approx(report["grad_norm"], rel=1e-4)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("V", [257, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_is_asked_at_the_response_alone_and_answers_the_same(temperature, V):
    """Log-probabilities and gradients are those of a softmax over all positions, under the mask."""
    model = GPT(MoEConfig(vocab_size=V, **MICRO), rng(0))
    rollout = generate(model, [[1, 2, 3, 4, 5], [6], [7, 8]], max_new_tokens=6, end_token=0, generator=rng(1))
    mask, targets = rollout.response_mask, rollout.tokens[:, 1:, None]
    assert 0 < int(mask.sum()) < mask.numel()
    args = argparse.Namespace(replay="none", temperature=temperature, answer_balance_coef=0.0)
    ours = train.policy_forward(model, rollout, args)[0].log_probs
    plain = (model(rollout.tokens[:, :-1]).logits / temperature).log_softmax(-1).gather(-1, targets).squeeze(-1)
    assert not ours[~mask].any()
    torch.testing.assert_close(ours[mask], plain[mask])
    weight = torch.randn(mask.shape, generator=rng(2))
    assert_same_gradients(model, (ours * weight).sum(), (plain * weight * mask).sum(), atol=1e-5, rtol=1e-3)


def test_replayed_experts_do_not_change(micro, monkeypatch):
    changed = {}
    for replay in ("none", "routing"):
        run = Rollouts(monkeypatch, f"--algo grpo --minibatches 4 --replay {replay}", lr=5e-2)
        report = run.step()
        assert report["updates"] == 4
        changed[replay] = 1 - report["agreement"]
        for (new, *_), rows in zip(run.losses, run.asked, strict=True):
            same = torch.equal(new.experts, rows.experts)
            assert same or replay == "none"
            torch.testing.assert_close(  # the router is free to move, only its choice is not
                new.expert_log_probs, new.log_probs_at_old_experts if replay == "routing" else new.expert_log_probs
            )
        monkeypatch.undo()
        monkeypatch.setitem(SIZES, "tiny", MICRO)
    assert changed["routing"] == 0.0 < changed["none"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_ends_the_run(value, micro, monkeypatch):
    run = Rollouts(monkeypatch, "--algo grpo --minibatches 1", reward=lambda *_: value)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(UserError, match="must be finite"):
        run.step()
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())


def test_bfloat16_rollouts_start_from_one_too(micro, monkeypatch):
    run = Rollouts(monkeypatch, "--algo rais --minibatches 2 --dtype bfloat16", lr=0.0)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        report = run.step()
    # nothing moves at learning rate 0, so later minibatches see the rounding between forwards of other shapes alone
    assert report["updates"] == 2 and abs(report["ratio_mean"] - 1) < 1e-3


# ----------------------------------------------------------------------------------- what a run of them says and does


@pytest.mark.parametrize("algo", RL)
def test_minus_log_ratio_is_also_given_without_the_first_minibatch(algo, micro, monkeypatch):
    """The first ratio of a batch is 1 by construction: a mean over all minibatches is too small."""
    run = Rollouts(monkeypatch, f"--algo {algo} --minibatches 4")
    report = run.step()
    each = []
    for given in list(run.losses):
        each.append(float(train.METHODS[run.args.algo](**train.loss_inputs(*given))[1]["ratio_neg_log"]))
    assert len(each) == 4 and each[0] == 0 and any(abs(x) > 1e-6 for x in each[1:])
    assert report["ratio_neg_log_later"] == pytest.approx(sum(each[1:]) / 3, rel=1e-4, abs=1e-7)
    assert report["ratio_neg_log"] == pytest.approx(sum(each) / 4, rel=1e-4, abs=1e-7)
    once = Rollouts(monkeypatch, f"--algo {algo} --minibatches 1").step()
    assert "ratio_neg_log_later" not in once


@pytest.mark.parametrize(("gate", "top_k"), [("renorm", 2), ("prob", 1), ("renorm", 1)])
@pytest.mark.parametrize("algo", train.METHODS)
def test_the_gradient_reaches_every_router(algo, gate, top_k, micro, monkeypatch):
    run = Rollouts(monkeypatch, f"--algo {algo} --minibatches 1")
    config = MoEConfig(vocab_size=257, top_k=top_k, gate=gate, **MICRO)
    weights = run.model.state_dict()
    run.model = GPT(config)
    run.model.load_state_dict(weights)
    run.optimizer = make_optimizer(run.model, 0.0)
    run.step()
    (found,) = run.learned
    routers = [n for n, _ in run.model.named_parameters() if n.endswith("router.weight")]
    assert len(routers) == 2
    reached = {n: n in found and found[n].abs().max().item() > 1e-9 for n in routers}
    assert all(reached.values()) if (gate, top_k) != ("renorm", 1) else not any(reached.values())
    assert all(g.isfinite().all() for g in found.values())


def test_a_balance_loss_in_the_updates_counts_prompts_and_responses_and_not_padding(micro, monkeypatch):
    run = Rollouts(monkeypatch, "--algo grpo --minibatches 1 --answer-balance-coef 0.5")
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    rollout = generate(run.model, prompts, max_new_tokens=6, end_token=BYTES.end, generator=rng(1))
    _, aux = train.policy_forward(run.model, rollout, run.args)
    lengths = [len(p) + len(r) for p, r in zip(prompts, rollout.responses(BYTES.end), strict=True)]
    ends = rollout.response_mask.sum(1).tolist()
    routed = torch.zeros_like(rollout.response_mask)
    for row, (prompt, answered) in enumerate(zip(prompts, ends, strict=True)):
        routed[row, : len(prompt) + answered - 1] = True  # position t predicts t + 1: the last token is read nowhere
    assert not routed.all() and max(lengths) > 0
    routing = run.model(rollout.tokens[:, :-1]).routing
    expected, _, _ = router_losses_by_the_book(routing, routed, 8)
    assert aux.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    plain, none = train.policy_forward(run.model, rollout, args_of("--algo grpo --dataset addition"))
    assert none == 0.0
    aux.backward()
    assert all(run.model.blocks[i].mlp.router.weight.grad.any() for i in (1, 3))


def test_agreement_is_the_share_of_choices_that_the_updated_router_makes_too(micro, monkeypatch):
    run = Rollouts(monkeypatch, "--algo grpo --minibatches 1")
    rollout = generate(run.model, [[1, 2], [3]], max_new_tokens=4, end_token=BYTES.end, generator=rng(1))
    new, _ = train.policy_forward(run.model, rollout, run.args)
    assert train.moved_routes(new, rollout)["agreement"] == 1
    other = rollout.experts.clone()
    for expert in range(8):  # in every decision the first of two becomes one that was not chosen
        free = (rollout.experts != expert).all(-1) & (other[..., 0] == rollout.experts[..., 0])
        other[..., 0] = torch.where(free, expert, other[..., 0])
    moved = train.moved_routes(new, rollout._replace(experts=other))
    assert moved["agreement"].item() == pytest.approx(0.5) and moved["moved_anywhere"] == 1
    assert moved["agreement_by_layer"].tolist() == pytest.approx([0.5, 0.5])
