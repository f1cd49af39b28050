"""train.py: batches, the losses of a step, updates on generated answers, checkpoints, and runs that were killed."""

import argparse
import copy
import json
import math
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import moe
import train
from data import UserError
from moe import GPT, SIZES, MoEConfig, Routes, Routing, load_model, upcycle
from train import Order, TextBatches, erl_losses, pad, rng, text_windows

ROOT = Path(__file__).parents[1]
MICRO = dict(n_layer=4, n_head=2, n_embd=32, context=32)
BYTES = data.load_tokenizer("bytes")
moderate = settings(deadline=None, max_examples=30)


@pytest.fixture
def micro(monkeypatch, tmp_path):
    """A size that trains in milliseconds in place of "tiny", and a folder of its own for what runs write."""
    monkeypatch.setitem(SIZES, "tiny", MICRO)
    monkeypatch.chdir(tmp_path)


def args_of(flags: str) -> argparse.Namespace:
    return train.parse(shlex.split(flags))


# ------------------------------------------------------------------------------------------------- order and batches


@moderate
@given(st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_each_epoch_visits_all_items_however_the_draws_are_asked_for(count, seed, chunks):
    total = sum(chunks)
    order, drawn, at = Order(count, seed), [], 0
    for n in chunks:
        drawn += order(at, n)
        at += n
    assert drawn == Order(count, seed)(0, total)  # in one go
    assert drawn[total // 2 :] == Order(count, seed)(total // 2, total - total // 2)  # from the middle on
    assert [epoch for epoch, _ in drawn] == [n // count for n in range(total)]
    for start in range(0, total - count + 1, count):
        assert sorted(item for _, item in drawn[start : start + count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = Order(50, 0)(0, 50), Order(50, 0)(50, 50)
    assert [i for _, i in first] != [i for _, i in second]
    assert first != Order(50, 1)(0, 50)


@moderate
@given(st.integers(3, 200), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_training_windows_do_not_overlap_and_targets_are_the_next_tokens(length, context, batch_size, seed):
    tokens = np.arange(length, dtype=np.uint16)  # a token's value is its place
    batches = TextBatches(tokens, context, batch_size, seed)
    steps = -(-2 * batches.per_epoch // batch_size)  # two epochs, up to the batch in which they end
    rows = []
    for step in range(steps):
        batch, mask = batches(step)
        assert batch.dtype == torch.int64 and mask.dtype == torch.bool
        assert batch.shape == (batch_size, batches.context + 1) and mask.shape == (batch_size, batches.context)
        assert mask.all()
        rows += batch
    for row in rows:
        assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + len(row)))  # inputs row[:-1], targets row[1:]
    for epoch in range(2):
        part = rows[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]
        predicted = torch.cat([row[1:] for row in part]).tolist()
        assert len(set(predicted)) == len(predicted)
        assert len(predicted) > length - 1 - 2 * batches.context  # little is left out


@moderate
@given(st.integers(2, 300), st.integers(1, 40))
def test_every_token_but_the_first_is_predicted_exactly_once(length, context):
    tokens = np.arange(length, dtype=np.uint16)
    predicted = []
    for window, mask in text_windows(tokens, context):
        assert window.shape == (context + 1,) and mask.shape == (context,)
        inputs, targets = window[:-1][mask], window[1:][mask]
        assert torch.equal(targets, inputs + 1)
        predicted += targets.tolist()
    assert predicted == list(range(1, length))


@moderate
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 10))
def test_a_limit_takes_that_many_different_windows(length, context, limit):
    tokens = np.arange(length, dtype=np.uint16)
    every = [window.tolist() for window, _ in text_windows(tokens, context)]
    some = [window.tolist() for window, _ in text_windows(tokens, context, limit)]
    assert len(some) == min(limit, len(every))
    places = [every.index(window) for window in some]
    assert sorted(set(places)) == places
    if len(some) > 1:
        assert max(np.diff(places)) <= -(-len(every) // len(some))  # spread over the whole split


@moderate
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=5))
def test_only_the_answer_and_its_end_token_are_learned(lengths):
    end = 99
    encoded = [data.Encoded([10 + i] * p + list(range(20, 20 + a)) + [end], p) for i, (p, a) in enumerate(lengths)]
    tokens, mask = pad(encoded, end)
    width = max(p + a + 1 for p, a in lengths)
    assert tokens.shape == (len(lengths), width) and mask.shape == (len(lengths), width - 1)
    for row, allowed, (_, a) in zip(tokens, mask, lengths, strict=True):
        assert row[1:][allowed].tolist() == [*range(20, 20 + a), end]


# ------------------------------------------------------------------------------------------- ERL's loss, by the book


def make(seed=0, dtype=torch.float64, n_perturb=3, **changes):
    """A model all of whose parameters matter, tokens [B, T + 1] and a mask with a prompt and padding."""
    sizes = dict(vocab_size=19, context=10, n_layer=4, n_head=2, n_embd=16, n_expert=4, moe_every=2)
    model = GPT(MoEConfig(**sizes | changes), rng(seed)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=rng(seed, name), dtype=torch.float64)
            p.copy_((0.8 if "router" in name else 0.25) * draw + (1 if "ln_" in name and "weight" in name else 0))
    B, T = 2, 7
    tokens = torch.randint(0, sizes["vocab_size"], (B, T + 1), generator=rng(seed, "tokens"))
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :2] = False  # a prompt
    mask[1, 5:] = False  # padding
    return model, tokens, mask


def erl_args(**changes):
    given = dict(n_perturb=3, alpha=0.6, erl_grad="all", wpl=False, advantage="static", clip_eps=0.2, delta=0.7)
    return argparse.Namespace(**given | changes)


def lm_by_the_book(logits, targets, mask):
    log_probs = F.log_softmax(logits, -1)
    terms = [-log_probs[b, t, targets[b, t]] for b, t in np.ndindex(*targets.shape) if mask[b, t]]
    return sum(terms) / len(terms)


def original_by_the_book(model, out, targets, mask):
    """L_o: the LM loss, and for each layer 0.001 * (E * sum_i f_i Pbar_i + mean logsumexp^2)."""
    loss, routing, E = lm_by_the_book(out.logits, targets, mask), out.routing, model.config.n_expert
    places = [(b, t) for b, t in np.ndindex(*mask.shape) if mask[b, t]]
    for layer in range(routing.logits.shape[2]):
        chosen = [int(e) for b, t in places for e in routing.experts[b, t, layer]]
        logits = torch.stack([routing.logits[b, t, layer] for b, t in places])
        mean_probs = F.softmax(logits, -1).mean(0)
        balance = E * sum(chosen.count(i) / len(chosen) * mean_probs[i] for i in range(E))
        loss = loss + 0.001 * (balance + torch.logsumexp(logits, -1).square().mean())
    return loss


def erl_by_the_book(model, tokens, mask, args, routes, old=None, advantages=None):
    """Eq. 6-17 with one original forward and m separate perturbed ones. -> loss, advantages, old probabilities."""
    inputs, targets, B = tokens[:, :-1], tokens[:, 1:], len(tokens)
    original = model(inputs)
    loss = original_by_the_book(model, original, targets, mask)
    o = F.log_softmax(original.logits, -1).detach()
    blocks = [model.blocks[i].mlp for i in model.config.moe_blocks]
    terms, perturbed_lm, drawn_A, drawn_P = [], [], {}, {}
    for j in range(args.n_perturb):
        mine = slice(j * B, (j + 1) * B)
        out = model(inputs, routes=Routes(routes.experts[mine], routes.forced[mine]))
        p = F.log_softmax(out.logits, -1)
        perturbed_lm.append(lm_by_the_book(out.logits, targets, mask))
        for b, t in np.ndindex(*mask.shape):
            gap = float((p - o)[b, t, targets[b, t]].detach())
            A = gap if args.advantage == "log" else 0 if abs(gap) <= train.ROUNDING else math.copysign(1, gap)
            drawn_A[j, b, t] = A
            if advantages is not None:
                A = advantages[j, b, t]
            for layer, block in enumerate(blocks):
                if not (mask[b, t] and routes.forced[j * B + b, t, layer]):
                    continue
                if args.erl_grad == "router":
                    logits = block.router.weight @ out.routing.inputs[layer][b, t].detach()
                else:
                    logits = out.routing.logits[b, t, layer]
                P, f, K = F.softmax(logits, -1), 0, model.config.top_k
                for i in routes.experts[j * B + b, t, layer].tolist():
                    drawn_P[j, b, t, layer, i] = float(P[i].detach())
                    r = P[i] / (float(P[i].detach()) if old is None else old[j, b, t, layer, i])
                    f = f - torch.minimum(r * A, torch.clamp(r, 1 - args.clip_eps, 1 + args.clip_eps) * A) / K
                terms.append(f)
    L_p = sum(terms) / len(terms)
    if args.wpl:
        L_p = L_p + sum(perturbed_lm) / len(perturbed_lm)
    return loss + args.delta * L_p, drawn_A, drawn_P


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def assert_same_gradients(model, loss, expected, **tolerance):
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("advantage", ["static", "log"])
@pytest.mark.parametrize("wpl", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("erl_grad", ["all", "router"])
def test_erl_is_its_equations_in_value_and_gradient(erl_grad, top_k, wpl, advantage):
    model, tokens, mask = make(seed=top_k, top_k=top_k)
    args = erl_args(erl_grad=erl_grad, wpl=wpl, advantage=advantage)
    loss, metrics, explored = erl_losses(model, model.stem, model.branch, tokens, mask, args, rng("draw"), None)
    expected, A, P = erl_by_the_book(model, tokens, mask, args, explored.routes)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(model, loss, expected)
    S = (explored.routes.forced & mask.repeat(args.n_perturb, 1)[..., None]).any(-1)
    assert explored.advantages[~S].abs().max() == 0  # nobody asks for these
    A = {(j, b, t): a if S[j * 2 + b, t] else 0.0 for (j, b, t), a in A.items()}
    ours = {(j, b, t): float(explored.advantages[j * 2 + b, t]) for j, b, t in A}
    assert ours == pytest.approx(A)
    assert len(set(ours.values())) > 1  # both better and worse routes were met

    # a second inner epoch: the first one's routes, advantages and old probabilities, at moved weights
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.5 if "router" in name else 0.02) * torch.randn(p.shape, generator=rng(name), dtype=p.dtype))
    again, metrics, kept = erl_losses(model, model.stem, model.branch, tokens, mask, args, rng("other"), explored)
    assert kept is explored
    expected, moved_A, _ = erl_by_the_book(model, tokens, mask, args, explored.routes, old=P, advantages=A)
    assert moved_A != A  # drawn anew they would be others
    torch.testing.assert_close(again, expected)
    assert_same_gradients(model, again, expected)
    assert abs(float(metrics["ratio_mean"]) - 1) > 1e-3 and float(metrics["clip_share"]) > 0


def test_gradient_router_stops_at_the_routers():
    model, tokens, mask = make()
    alone = gradients(model, train.lm_losses(model, model.stem, model.branch, tokens, mask)[0])
    for erl_grad in ("router", "all"):
        loss = erl_losses(model, model.stem, model.branch, tokens, mask, erl_args(erl_grad=erl_grad), rng(0), None)[0]
        moved = {n for n, g in gradients(model, loss).items() if not torch.allclose(g, alone[n], rtol=1e-9, atol=1e-12)}
        routers = {n for n in alone if n.endswith("router.weight")}
        assert len(routers) == 2
        if erl_grad == "router":
            assert moved == routers
        else:
            assert routers < moved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("erl_grad", ["all", "router"])
def test_nothing_perturbed_is_the_plain_step(erl_grad, dtype):
    model, tokens, mask = make(dtype=dtype)
    for advantage in ("static", "log"):
        args = erl_args(alpha=0.0, erl_grad=erl_grad, advantage=advantage)
        loss, metrics, explored = erl_losses(model, model.stem, model.branch, tokens, mask, args, rng(0), None)
        assert explored.advantages.abs().max() == 0
        assert metrics["rl_loss"] == 0 and metrics["perturbed_share"] == 0
        plain, _ = train.lm_losses(model, model.stem, model.branch, tokens, mask)
        tolerance = {} if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-6)
        assert_same_gradients(model, loss, plain, **tolerance)


@pytest.mark.parametrize("erl_grad", ["all", "router"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_copies_of_one_expert_are_neither_better_nor_worse(top_k, erl_grad, monkeypatch):
    """A freshly upcycled model: whatever route is taken, what remains is rounding, and no sign must be made of it."""
    config = MoEConfig(vocab_size=257, top_k=top_k, **SIZES["tiny"])
    model = upcycle(GPT(config.dense(), rng(0)), config, rng(1))

    def advantages(length):
        tokens = torch.randint(0, 257, (2, length + 1), generator=rng(length))
        mask = torch.ones(2, length, dtype=torch.bool)
        args = erl_args(erl_grad=erl_grad)
        return erl_losses(model, model.stem, model.branch, tokens, mask, args, rng(0), None)[2].advantages

    for length in (4, 8, 64):
        assert advantages(length).abs().max() == 0
    monkeypatch.setattr(train, "ROUNDING", 0.0)
    if top_k == 2:  # with 1/2 + 1/2 for P_i + P_j: the rounding is there
        assert advantages(64).abs().max() == 1


@pytest.mark.parametrize("says", ["next", "current"])
def test_the_credit_goes_to_the_position_that_predicts(says):
    """A branch whose perturbed pass knows the right next token at one position alone."""
    T, t0, m = 6, 3, 2
    config = MoEConfig(vocab_size=16, n_embd=16, context=8, n_layer=4, n_head=2, n_expert=4, moe_every=2)
    model = GPT(config, rng(0))
    with torch.no_grad():
        model.wte.weight.copy_(torch.eye(16))  # a feature is a vote for a token
    tokens = torch.arange(1, T + 2)[None]
    mask = torch.ones(1, T, dtype=torch.bool)
    leaf = torch.randn(m, T, 2, 4, generator=rng(1), requires_grad=True)

    def branch(hidden, routes=None):
        features = torch.zeros(len(hidden), T, 16)
        if routes is None:
            return features, model.branch(hidden)[1]
        features[:, t0, tokens[0, t0 + 1 if says == "next" else t0]] = 5.0
        return features, Routing(leaf, routes.experts, routes.forced, (hidden, hidden))

    args = erl_args(n_perturb=m, alpha=0.8)
    loss, _, explored = erl_losses(model, model.stem, branch, tokens, mask, args, rng(2), None)
    expected = torch.zeros(m, T)
    expected[:, t0] = 1 if says == "next" else -1  # a token that is not the next one is worse than no opinion
    assert torch.equal(explored.advantages, expected)
    (gradient,) = torch.autograd.grad(loss, leaf)
    touched = gradient.abs().sum(-1) > 0  # [m, T, L]
    assert explored.routes.forced[:, t0].any()
    expected = explored.routes.forced.clone()
    expected[:, torch.arange(T) != t0] = False
    assert torch.equal(touched, expected)


# -------------------------------------------------------------------------------------------------------- evaluation


def test_perplexity_and_bits_per_byte_by_the_book():
    model, _, _ = make(vocab_size=257, context=12, dtype=torch.float32)
    text = "Straße, naïve, 東京: forty tokens or a few more."
    split = data.TextSplit(np.array([BYTES.end, *BYTES.encode(text)], dtype=np.uint16), len(text.encode()))
    nll = []
    for start in range(0, len(split.tokens) - 1, 12):
        window = torch.tensor(split.tokens[start : start + 13].tolist())[None]
        log_probs = F.log_softmax(model(window[:, :-1]).logits, -1)[0]
        nll += [-log_probs[t, window[0, t + 1]].item() for t in range(window.shape[1] - 1)]
    assert len(nll) == len(split.tokens) - 1 and len(nll) % 12
    for batch_size in (1, 3, 8):  # the last window's padding counts nowhere
        scores = train.evaluate_text(model, split, batch_size)
        assert scores["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
        assert scores["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / len(text.encode()), rel=1e-5)
    some = train.evaluate_text(model, split, 8, limit=1)
    assert some["loss"] == pytest.approx(sum(nll[:12]) / 12, rel=1e-5)
    assert "bits_per_byte" not in some  # only the whole split has a number of bytes


# ------------------------------------------------------------------------------------------- schedule and optimizer


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 200, 5000])
def test_learning_rate_goes_up_to_the_peak_and_down_to_a_tenth(steps):
    rates = [train.learning_rate(step, steps, 2e-3) for step in range(steps)]
    warmup = min(100, max(1, steps // 20))
    top = rates.index(max(rates))
    assert top in (warmup - 1, warmup) and max(rates) == pytest.approx(2e-3)
    assert all(0 < a < b for a, b in zip(rates[:warmup], rates[1:warmup], strict=False))
    assert all(a > b > 0 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert train.learning_rate(steps, steps, 2e-3) == pytest.approx(2e-4 if steps > 1 else 2e-3)


def test_only_matrices_decay():
    model = GPT(MoEConfig(n_shared_expert=1, **MICRO), rng(0))
    optimizer = train.make_optimizer(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decay) == set(names.values())
    kept = {n for n, d in decay.items() if d == 0}
    assert kept == {n for n in decay if n.endswith("bias") or ".ln_" in n or n.startswith("ln_") or ".b_" in n}
    assert "blocks.1.mlp.experts.b_in" in kept and "blocks.1.mlp.shared.0.b_out" in kept  # two-dimensional, yet biases
    assert "blocks.1.mlp.experts.w_in" in decay and decay["blocks.1.mlp.router.weight"] == 0.1


# ------------------------------------------------------------------------------------------------- generated answers

RL = ["grpo", "gspo", "gmpo", "erpo", "rais", "rais --shift-base gspo", "rais --shift-base grpo"]


def uneven(spec, response, example):
    """A reward that an untrained model meets in several sizes."""
    return sum(map(ord, response)) % 3 / 2


class Rollouts:
    """A model, its task and optimizer, and records of what `reinforce` hands on."""

    def __init__(self, monkeypatch, flags, reward=uneven, lr=1e-2):
        self.args = args_of(f"--dataset addition --max-new-tokens 4 --group-size 4 --prompts-per-step 4 {flags}")
        config = MoEConfig(vocab_size=257, top_k=2, **MICRO)
        self.model = GPT(config, rng(0))
        with torch.no_grad():
            self.model.wte.weight.mul_(8)  # opinions, so that an update shows
            self.model.wte.weight[BYTES.end] *= 3  # the end token comes often
        self.task = train.load_task(self.args, config)
        self.optimizer = train.make_optimizer(self.model, 0.1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.asked, self.losses, self.rewarded = [], [], []
        real_ask, real_loss = train.ask_policy, train.policy_loss

        def ask(model, stem, branch, rollout, args):
            self.asked.append(rollout)
            return real_ask(model, stem, branch, rollout, args)

        def loss(args, new, old, *rest):
            self.losses.append((new, old, *rest))
            return real_loss(args, new, old, *rest)

        def rewarded(spec, response, example):
            self.rewarded.append(example)
            return reward(spec, response, example)

        monkeypatch.setattr(train, "ask_policy", ask)
        monkeypatch.setattr(train, "policy_loss", loss)
        monkeypatch.setattr(data, "reward", rewarded)

    def step(self, step=0):
        self.asked.clear(), self.losses.clear(), self.rewarded.clear()
        model = self.model
        report = train.reinforce(model, model.stem, model.branch, self.optimizer, self.task, self.args, step)
        return {k: float(v) for k, v in report.items()}


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
        shift = (new.old_expert_log_probs - old.old_expert_log_probs)[mask].abs().max()
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
    new = train.ask_policy(run.model, run.model.stem, run.model.branch, rows, run.args)
    assert not torch.equal(new.expert_log_probs, new.old_expert_log_probs)
    old = train.Policy(*(t.detach() for t in new))
    rewards = run.losses[0][2]
    advantages = train.group_advantages(rewards, 4)
    _, metrics = train.policy_loss(run.args, new, old, rewards, advantages, rows.response_mask, 8)
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
    rollout = moe.generate(
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
    new = train.ask_policy(before, before.stem, before.branch, rollout, args)
    old = train.Policy(*(t.detach() for t in new))
    advantages = train.group_advantages(rewards, 4)
    loss, _ = train.policy_loss(args, new, old, rewards, advantages, rollout.response_mask, 8)
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
    rollout = moe.generate(model, [[1, 2, 3, 4, 5], [6], [7, 8]], max_new_tokens=6, end_token=0, generator=rng(1))
    mask, targets = rollout.response_mask, rollout.tokens[:, 1:, None]
    assert 0 < int(mask.sum()) < mask.numel()
    args = argparse.Namespace(replay="none", temperature=temperature)
    ours = train.ask_policy(model, model.stem, model.branch, rollout, args).log_probs
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
        changed[replay] = report["experts_changed"]
        for (new, *_), rows in zip(run.losses, run.asked, strict=True):
            same = torch.equal(new.experts, rows.experts)
            assert same or replay == "none"
            torch.testing.assert_close(  # the router is free to move, only its choice is not
                new.expert_log_probs, new.old_expert_log_probs if replay == "routing" else new.expert_log_probs
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
    with torch.autocast("cpu", torch.bfloat16):
        report = run.step()
    # nothing moves at learning rate 0, so later minibatches see the rounding between forwards of other shapes alone
    assert report["updates"] == 2 and abs(report["ratio_mean"] - 1) < 1e-3


# ------------------------------------------------------------------------------------------------------- reading data


def test_counts_are_said_once(tmp_path, micro, capsys):
    """Prompts longer than the context are cut from the left, records without an answer left out; both are counted."""
    rows = [
        {"dialogue": "A: hi " * 20, "summary": "They greet."},  # cut
        {"dialogue": "A: hi", "summary": "A greets."},
        {"dialogue": "", "summary": "Nobody is there."},  # empty
        {"dialogue": "A: hi", "summary": "x" * 60},  # an answer longer than the context
    ]
    for name in ("train", "val", "test"):
        path = tmp_path / "data" / "samsum" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = "--dataset samsum --tokenizer bytes --data-dir data --max-new-tokens 12"
    config = MoEConfig(vocab_size=257, **MICRO)
    task = train.load_task(args_of(f"--algo erl {flags}"), config)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "samsum: 1 of 4 training examples had their prompt cut from the left (context 32 tokens)",
        "samsum: 2 of 4 training examples were left out (context 32 tokens)",
        "samsum: 2 of 6 held-out prompts are cut from the left to 20 tokens, 2 held-out records lack a prompt or a "
        "reference",
    ]
    tokens, mask = task.batches(0)
    assert tokens.shape[1] <= 32 and mask.any(1).all()
    prompt = BYTES.decode(data.encode_prompt(task.held_out["test"][0], BYTES, 20))
    assert prompt.endswith("\nTL;DR:")  # the cue stays

    train.load_task(args_of(f"--algo grpo {flags}"), config)  # a response needs room even behind a short answer
    assert "2 of 4 training examples had their prompt cut" not in capsys.readouterr().err


def test_no_room_for_a_prompt(micro):
    with pytest.raises(UserError, match="--max-new-tokens 32 leaves no room"):
        train.load_task(args_of("--algo grpo --dataset addition --max-new-tokens 32"), MoEConfig(**MICRO))


def test_epochs_are_passes_over_the_training_data(micro):
    small = "--dataset addition --eval-samples 2 --pretrain-steps 1 --checkpoint-every 10000 --eval-every 10000"
    items = len(data.load_examples("addition", "train"))
    for algo, draws in (("dense", "--batch-size 50"), ("grpo", "--prompts-per-step 50 --minibatches 1")):
        args = args_of(f"--algo {algo} {small} {draws} --epochs 0.01 --group-size 2 --max-new-tokens 1 --out {algo}")
        train.run(args)
        assert args.steps == math.ceil(0.01 * items / 50) == 2
        assert json.loads(Path(algo, "summary.json").read_text())["steps"] == 3  # with the one before the algorithm


# -------------------------------------------------------------------------------------------------------- checkpoints


def saved(folder, model, step):
    optimizer = train.make_optimizer(model, 0.1)
    Path(folder).mkdir(exist_ok=True)
    train.save_checkpoint(str(folder), model, optimizer, step, metrics_bytes=0, seconds=0.0, tokens=0)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("killed_at", ["makedirs", "save_model", "torch.save", "rename 1", "rename 2", "rmtree"])
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(killed_at, tmp_path, monkeypatch):
    model = GPT(MoEConfig(**MICRO), rng(0))
    saved(tmp_path, model, 1)
    calls = {"rename": 0, "rmtree": 0}

    def crash(*_, **__):
        raise Crash

    with monkeypatch.context() as m:
        if killed_at.startswith("rename"):
            real = os.rename

            def rename(*paths):
                calls["rename"] += 1
                if calls["rename"] == int(killed_at[-1]):
                    raise Crash
                real(*paths)

            m.setattr(os, "rename", rename)
        elif killed_at == "rmtree":  # the last one: the old checkpoint stands beside the new one

            def rmtree(path, **_):
                calls["rmtree"] += path.endswith(".old")
                if calls["rmtree"] == 2:
                    raise Crash

            m.setattr(train.shutil, "rmtree", rmtree)
        else:
            owner, name = {
                "makedirs": (os, "makedirs"),
                "save_model": (train, "save_model"),
                "torch.save": (torch, "save"),
            }[killed_at]
            m.setattr(owner, name, crash)
        with pytest.raises(Crash):
            saved(tmp_path, model, 2)
    folder = train.find_checkpoint(str(tmp_path))
    assert os.path.basename(folder) == ("checkpoint.old" if killed_at == "rename 2" else "checkpoint")
    loaded, state = train.load_checkpoint(folder)
    assert state["step"] == (2 if killed_at == "rmtree" else 1)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))

    saved(tmp_path, model, 3)  # the next save clears up
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    assert train.load_checkpoint(train.find_checkpoint(str(tmp_path)))[1]["step"] == 3


def test_equal_weights_are_equal_bytes(tmp_path):
    model = GPT(MoEConfig(**MICRO), rng(0))
    for i in range(8):
        moe.save_model(model, str(tmp_path / f"{i}.safetensors"), step=3)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint.tmp").mkdir()  # half a save
    assert train.find_checkpoint(str(tmp_path)) is None


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_spoilt_weights_are_never_saved(where, micro, monkeypatch):
    flags = "--algo dense --dataset addition --steps 5 --batch-size 2 --eval-samples 2 --checkpoint-every 1 --out r"
    real, steps = train.lm_losses, []

    def spoilt(*args):
        loss, metrics = real(*args)
        steps.append(1)
        if len(steps) == 3:
            factor = torch.full((), math.nan)
            if where == "loss":
                loss, metrics["loss"] = loss * factor, metrics["loss"] * factor
            else:  # the loss is finite, its gradient is not
                loss.register_hook(lambda g: g * factor)
        return loss, metrics

    monkeypatch.setattr(train, "lm_losses", spoilt)
    with pytest.raises(UserError, match="is nan at step 3: lower --lr"):
        train.run(args_of(flags))
    model, state = train.load_checkpoint(train.find_checkpoint("r"))
    assert state["step"] == 2 and all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------ killed and resumed runs

# A process that trains a small model several times; each run is a child of its own, killed where its line says.
DRIVER = """
    import os, signal, sys, traceback
    sys.path[:0] = [{root!r}]
    import torch
    torch.set_num_threads(1)
    import moe, train, data
    moe.SIZES["tiny"] = {micro!r}
    pydocs, problems = data._pydocs, data.DATASETS["addition"].problems
    texts = {{split: pydocs(split)[:3000] for split in data.SPLITS}}
    data._pydocs = texts.get
    few = list(problems())[:300]
    object.__setattr__(data.DATASETS["addition"], "problems", lambda: few)
    data.reward = lambda spec, response, example: sum(map(ord, response)) % 3 / 2  # an untrained model earns some

    train.plot_curves = lambda out: None  # half of a run's time

    def kill(signum=signal.SIGKILL):
        os.kill(os.getpid(), signum)

    def at_step(n, signum=signal.SIGKILL):  # when a step is done, before its checkpoint
        class Bar(train.tqdm):
            steps = 0
            def update(self, *args):
                super().update(*args)
                self.steps += 1
                if self.steps == n:
                    kill(signum)
        train.tqdm = Bar

    def after_checkpoint(n):
        real = train.save_checkpoint
        def save(out, model, optimizer, step, **state):
            real(out, model, optimizer, step, **state)
            if step == n:
                kill()
        train.save_checkpoint = save

    def between_renames(n):
        real, calls = os.rename, []
        def rename(a, b):
            calls.append(a)
            real(a, b)
            if len(calls) == n:
                kill()
        os.rename = rename

    def run(line, patch=lambda: None):
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            try:
                patch()
                code = train.main(line.split())
            except BaseException:
                traceback.print_exc()
                code = 99
            sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
"""


def drive(folder, body):
    script = textwrap.dedent(DRIVER.format(root=str(ROOT), micro=MICRO)) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done


def bare(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}


def assert_same_run(a, b):
    """The same bytes of weights, equal optimizer, metrics and summary but for the clock."""
    weights = [Path(f, "checkpoint", "model.safetensors").read_bytes() for f in (a, b)]
    assert weights[0] == weights[1]
    left, right = (torch.load(Path(f, "checkpoint", "state.pt"), weights_only=True) for f in (a, b))
    assert left["step"] == right["step"] and left["tokens"] == right["tokens"]
    assert left["optimizer"]["param_groups"] == right["optimizer"]["param_groups"]
    states = [s["optimizer"]["state"] for s in (left, right)]
    assert states[0].keys() == states[1].keys() and states[0]
    for i in states[0]:
        assert all(torch.equal(states[0][i][k], states[1][i][k]) for k in states[0][i])
    rows = [[bare(json.loads(line)) for line in Path(f, "metrics.jsonl").read_text().splitlines()] for f in (a, b)]
    assert rows[0] == rows[1] and len(rows[0]) > 3
    summaries = [bare(json.loads(Path(f, "summary.json").read_text())) for f in (a, b)]
    assert summaries[0] == summaries[1]
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))


RUNS = {
    "erl": "--algo erl --dataset pydocs --batch-size 2 --inner-epochs 2 --eval-samples 2",
    "grpo": "--algo grpo --dataset addition --batch-size 4 --prompts-per-step 4 --group-size 4 --minibatches 2 "
    "--eval-samples 8 --max-new-tokens 4 --temperature 1.3",
    "erpo": "--algo erpo --dataset addition --batch-size 4 --prompts-per-step 4 --group-size 4 --minibatches 2 "
    "--eval-samples 8 --max-new-tokens 4 --expert-capacity 6 --dtype bfloat16",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are killed in children of one process: needs fork")
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_bytes(name, tmp_path):
    """Killed in the first phase, at its end, in the algorithm, in a save, and before there was a checkpoint."""
    outs = ["early", "first", "border", "begun", "second", "saving", "done", "twice"]
    outs = outs if name == "erl" else ["early", "border", "second"]
    body = f"""
    flags = {RUNS[name]!r} + " --pretrain-steps 4 --steps 5 --eval-every 3 --checkpoint-every 2 --out "
    assert run(flags + "straight") == 0
    killed = {{
        "early": lambda: at_step(1), "first": lambda: at_step(3), "border": lambda: after_checkpoint(4),
        "begun": lambda: at_step(5), "second": lambda: at_step(8), "saving": lambda: between_renames(6),
        "done": lambda: after_checkpoint(9),
    }}
    for out in {outs!r}:
        assert run(flags + out, killed.get(out, killed["first"])) == -signal.SIGKILL, out
        assert not os.path.exists(out + "/summary.json"), out
        if out == "twice":
            assert run("--resume --out twice", lambda: at_step(4)) == -signal.SIGKILL
        assert run("--resume --out " + out + " " + flags.split(" --pretrain")[0]) == 0, out
    """
    drive(tmp_path, body)
    rows = [json.loads(x) for x in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["phase"] == name]
    assert any(row.get("updates", row.get("advantage_positive")) for row in trained)  # there was something to learn
    for out in outs:
        assert_same_run(tmp_path / "straight", tmp_path / out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are interrupted in children of one process: needs fork")
def test_ctrl_c_saves_says_how_to_go_on_and_resumes_to_the_same_bytes(tmp_path):
    body = f"""
    flags = {RUNS["grpo"]!r} + " --pretrain-steps 3 --steps 4 --eval-every 2 --out "
    assert run(flags + "straight") == 0
    for out, step in (("border", 3), ("second", 6)):  # 6 ends in an evaluation
        assert run(flags + out, lambda: at_step(step, signal.SIGINT)) == 130, out

    def in_last_evaluation():  # all steps are done and saved: there is nothing to wait for
        real = train.evaluate
        def evaluate(*args, final=False):
            if final:
                kill(signal.SIGINT)
            return real(*args)
        train.evaluate = evaluate
    assert run(flags + "last", in_last_evaluation) == 130
    """
    stderr = drive(tmp_path, body).stderr
    for out, step in (("border", 3), ("second", 6), ("last", None)):
        saved = f" at step {step} of 7, state saved" if step else ""
        command = f"python train.py --resume --out {out}"
        assert f"interrupted{saved}; continue with: {command}\n" in stderr
        assert not (tmp_path / out / "summary.json").exists()
    assert "Traceback" not in stderr
    drive(
        tmp_path,
        """
    for out in ("border", "second", "last"):
        assert run("--resume --out " + out) == 0, out
    """,
    )
    for out in ("border", "second", "last"):
        assert_same_run(tmp_path / "straight", tmp_path / out)


def test_a_finished_run_resumes_to_itself(micro, tmp_path):
    flags = "--algo lm --dataset addition --steps 2 --pretrain-steps 2 --batch-size 2 --eval-samples 4 --out r"
    train.run(args_of(flags))
    weights = Path("r/checkpoint/model.safetensors").read_bytes()
    summary = json.loads(Path("r/summary.json").read_text())
    train.run(args_of("--resume --out r"))
    assert Path("r/checkpoint/model.safetensors").read_bytes() == weights
    assert bare(json.loads(Path("r/summary.json").read_text())) == bare(summary)


def test_phases_and_the_upcycled_model(micro):
    """Before the algorithm the model is dense; it begins as its parent, and so do both of its arms."""
    common = "--dataset addition --pretrain-steps 3 --steps 1 --batch-size 2 --eval-samples 4"
    seen = {}
    for algo in ("lm", "erl"):
        real, models = train.update, []

        def update(model, optimizer, loss, models=models, real=real):
            models.append((model.config.n_expert, {k: v.clone() for k, v in model.state_dict().items()}))
            return real(model, optimizer, loss)

        with pytest.MonkeyPatch.context() as m:
            m.setattr(train, "update", update)
            train.run(args_of(f"--algo {algo} {common} --out {algo}"))
        assert [n for n, _ in models] == [1, 1, 1, 8]
        seen[algo] = models[-1][1]
    assert all(torch.equal(seen["lm"][k], seen["erl"][k]) for k in seen["lm"])  # the same start for both
    experts = seen["lm"]["blocks.1.mlp.experts.w_in"]
    assert torch.equal(experts[0], experts[5])
    model, metadata = load_model("lm/checkpoint/model.safetensors")
    assert model.config.n_expert == 8 and metadata["step"] == 4
