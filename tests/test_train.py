"""train.py: a step on text, and a step on generated answers, by the book."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import BYTES, MICRO, args_of, assert_same_gradients, gradients, make, places, step_args

import data
import train
from baselines import group_advantages, mismatch_weights
from erl import explore
from moe import GPT, MoEConfig, Routes, upcycle
from support.errors import UserError
from support.optimizer import make_optimizer
from support.tasks import Batch, load_task, rng

# ------------------------------------------------------------------------------------------- ERL's loss, by the book


def erl_losses(model, batch, args, step=0):
    """The losses of a step, one an inner epoch, and the paths that it drew: (loss, metrics, paths)."""
    seen = []

    def recorded(*given, **options):
        seen.append(explore(*given, **options))
        return seen[0]

    for loss, metrics in train.erl_losses(model, batch, args, step, report=True, explore=recorded):
        yield loss, metrics, seen[0]


def run_model(model, tokens, routes=None, noise=None):
    features, routing = model(tokens, routes=routes, noise=noise)
    return model.head(features), routing


def lm_by_the_book(logits, targets, mask):
    log_probs = F.log_softmax(logits, -1)
    terms = [-log_probs[b, t, targets[b, t]] for b, t in places(mask)]
    return sum(terms) / len(terms)


def original_by_the_book(model, logits, routing, batch, args):
    """L_o: the LM loss over the mask; balance and z losses of each layer over every token that is not padding."""
    loss, E = lm_by_the_book(logits, batch.tokens[:, 1:], batch.mask), model.config.n_expert
    for layer in range(routing.logits.shape[2]):
        chosen = [int(e) for b, t in places(batch.routed) for e in routing.experts[b, t, layer]]
        router = torch.stack([routing.logits[b, t, layer] for b, t in places(batch.routed)])
        P = F.softmax(router, -1).mean(0)
        loss = loss + args.balance_coef * E * sum(chosen.count(i) / len(chosen) * P[i] for i in range(E))
        loss = loss + args.z_coef * torch.logsumexp(router, -1).square().mean()
    return loss


def erl_by_the_book(model, batch, args, paths, noise=None, old=None, advantages=None):
    """Eq. 6-17 with one original forward and m separate perturbed ones. -> loss, advantages, old probabilities.

    A second inner epoch (`old` and `advantages` given) is delta * L_RL alone.
    """
    inputs, targets, mask, B = batch.tokens[:, :-1], batch.tokens[:, 1:], batch.mask, len(batch.tokens)
    logits, routing = run_model(model, inputs, noise=noise)
    o = F.log_softmax(logits, -1).detach()
    blocks = [model.blocks[i].mlp for i in model.config.moe_blocks]
    terms, perturbed_lm, drawn_A, drawn_P = [], [], {}, {}
    for j in range(args.n_perturb):
        S = paths.S[j * B : (j + 1) * B]
        out, perturbed = run_model(model, inputs, Routes(paths.experts[j * B : (j + 1) * B], S), noise)
        p = F.log_softmax(out, -1)
        perturbed_lm.append(lm_by_the_book(out, targets, mask))
        for b, t in places(mask):
            before = float(o[b, t, targets[b, t]].detach())
            gap = float(p[b, t, targets[b, t]].detach()) - before
            gap = 0 if abs(gap) <= 4 * 2**-23 * max(4, abs(before)) else gap  # four units in float32's last place
            A = drawn_A[j, b, t] = gap if args.advantage == "log" else float(np.sign(gap))
            A = A if advantages is None else advantages[j, b, t]
            for layer, block in enumerate(blocks):
                if not S[b, t, layer]:
                    continue
                router = perturbed.logits[b, t, layer]
                if args.erl_grad == "router":
                    router = block.router.weight @ perturbed.inputs[layer][b, t].detach()
                P, f, K = F.softmax(router, -1), 0, model.config.top_k
                for i in paths.experts[j * B + b, t, layer].tolist():
                    now = drawn_P[j, b, t, layer, i] = float(P[i].detach())
                    r = P[i] / (now if old is None else old[j, b, t, layer, i])
                    if args.ratio == "uniform":
                        f = f - P[i] * model.config.n_expert * A / K
                    else:
                        f = f - torch.minimum(r * A, torch.clamp(r, 1 - args.clip_eps, 1 + args.clip_eps) * A) / K
                terms.append(f)
    L_p = sum(terms) / len(terms)
    if old is not None:
        return args.delta * L_p, drawn_A, drawn_P
    if args.wpl:
        L_p = L_p + sum(perturbed_lm) / len(perturbed_lm)
    return original_by_the_book(model, logits, routing, batch, args) + args.delta * L_p, drawn_A, drawn_P


def move(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.5 if "router" in name else 0.02) * torch.randn(p.shape, generator=rng(name), dtype=p.dtype))


@pytest.mark.parametrize(
    ("erl_grad", "top_k", "wpl", "advantage", "jitter"),
    [
        ("all", 1, False, "static", 0.0),
        ("router", 1, False, "log", 0.3),
        ("all", 2, True, "static", 0.3),
        ("router", 2, True, "static", 0.0),
    ],
)
def test_erl_is_its_equations_in_value_and_gradient(erl_grad, top_k, wpl, advantage, jitter):
    model, batch = make(seed=top_k, top_k=top_k)
    changes = dict(erl_grad=erl_grad, wpl=wpl, advantage=advantage, top_k=top_k, jitter=jitter)
    args = step_args(inner_epochs=2, balance_coef=0.02, **changes)
    noise = train.jitter(model, batch, args, 0)
    assert (noise is None) == (not jitter)
    assert noise is None or not torch.equal(noise[0], noise[1])  # each layer has its own
    epochs = erl_losses(model, batch, args)
    loss, metrics, paths = next(epochs)
    expected, A, P = erl_by_the_book(model, batch, args, paths, noise)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(model, loss, expected)
    S = paths.S.any(-1)
    ours = {(j, b, t): float(paths.advantages[j * 2 + b, t]) for j, b, t in A if S[j * 2 + b, t]}
    assert ours == pytest.approx({place: A[place] for place in ours}) and len(set(ours.values())) > 1
    move(model)  # an update: the ratio leaves 1, the clip begins to act
    loss, metrics, _ = next(epochs)
    expected, *_ = erl_by_the_book(model, batch, args, paths, noise, old=P, advantages=A)
    assert metrics["clip_share"] > 0
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(model, loss, expected)


def test_the_ratio_to_the_uniform_policy_and_draws_from_the_router():
    model, batch = make(seed=5)
    args = step_args(ratio="uniform", clip_eps=None)
    loss, _, paths = next(erl_losses(model, batch, args))
    expected, *_ = erl_by_the_book(model, batch, args, paths)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(model, loss, expected)
    drawn = next(erl_losses(model, batch, step_args(draw="router", clip_eps=None)))[2]
    assert torch.equal(drawn.S, paths.S) and not torch.equal(drawn.experts, paths.experts)


def test_a_prompt_and_padding_are_never_perturbed():
    model, batch = make()
    paths = next(erl_losses(model, batch, step_args(alpha=1.0)))[2]
    assert torch.equal(paths.S, batch.mask.repeat(3, 1)[..., None].expand(-1, -1, 2))


@pytest.mark.parametrize("losses", [train.lm_losses, train.erl_losses])
def test_router_losses_and_reports_count_prompts_and_not_padding(losses):
    model, batch = make()
    loss, metrics = next(losses(model, batch, step_args(delta=0.0), 0, report=True))
    logits, routing = run_model(model, batch.tokens[:, :-1])
    torch.testing.assert_close(loss, original_by_the_book(model, logits, routing, batch, step_args()))
    counts = torch.stack([(routing.experts[batch.routed] == e).sum((0, 2)) for e in range(4)], -1)  # [L, E]
    assert float(metrics["load_max"]) == pytest.approx(float((counts / batch.routed.sum()).max()))
    assert "load_max" not in next(losses(model, batch, step_args(), 0, report=False))[1]


def test_gradient_router_stops_at_the_routers():
    model, batch = make()
    plain = gradients(model, next(train.lm_losses(model, batch, step_args(), 0, report=False))[0])
    found = gradients(model, next(train.erl_losses(model, batch, step_args(erl_grad="router"), 0, report=False))[0])
    for name in plain:
        same = torch.allclose(plain[name], found[name], rtol=1e-9, atol=1e-12)
        assert same != ("router" in name), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("erl_grad", ["all", "router"])
def test_copies_of_one_expert_are_neither_better_nor_worse(erl_grad, dtype):
    dense, batch = make(n_expert=1, top_k=1, dtype=torch.float32, vocab_size=257, n_embd=64)
    model = upcycle(dense, MoEConfig(**{**dense.config.__dict__, "n_expert": 4}), rng(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        paths = next(erl_losses(model, batch, step_args(erl_grad=erl_grad, dtype=dtype)))[2]
    assert paths.S.any() and (paths.advantages[paths.S.any(-1)] == 0).all()


def test_the_credit_goes_to_the_position_that_predicts():
    """One expert alone knows the next token of one position: the advantages there and nowhere else say so."""
    model, _ = make(vocab_size=257, n_layer=2)
    tokens = torch.arange(8)[None] + 5
    batch = Batch(tokens, torch.ones(1, 7, dtype=torch.bool), torch.ones(1, 7, dtype=torch.bool))
    with torch.no_grad():
        model.blocks[1].mlp.experts.w_out.zero_(), model.blocks[1].mlp.experts.b_out.zero_()
        model.blocks[1].mlp.router.weight.zero_()
        model.wte.weight.zero_(), model.ln_f.weight.fill_(1.0), model.ln_f.bias.zero_()
        model.wte.weight[5 + torch.arange(8), torch.arange(8)] = 1.0  # each token has a direction of its own
        model.blocks[1].mlp.experts.b_out[3] = 50 * model.wte.weight[tokens[0, 4]]  # says token 4, at every position
    paths = next(erl_losses(model, batch, step_args(n_perturb=40, alpha=1.0)))[2]
    chosen = paths.experts[..., 0, 0] == 3  # [m, T]
    assert (paths.advantages[:, 3][chosen[:, 3]] > 0).all()  # position 3 predicts token 4
    assert (paths.advantages[:, 4][chosen[:, 4]] < 0).all()  # position 4 reads it
    assert (paths.advantages[~chosen] == 0).all()


# ------------------------------------------------------------------------------------------------- generated answers

RL = [*train.METHODS, "rais --base gspo", "rais --base grpo"]


def uneven(spec, response, example):
    """A reward that an untrained model meets in several sizes."""
    return sum(map(ord, response)) % 3 / 2


class OneStep:
    """A model, its task and an optimizer in the place of a run, with a record of what `train_answers` hands on."""

    steps, phase = 1, "answers"

    def __init__(self, monkeypatch, flags, reward=uneven, lr=1e-2):
        common = "--dataset addition --max-new-tokens 4 --group-size 4 --prompts-per-step 4"
        self.args = args_of(f"{common} {flags}")
        self.args.lr = lr
        config = MoEConfig(vocab_size=257, top_k=2, gate=self.args.gate, **MICRO)
        self.model = GPT(config, rng(0))
        with torch.no_grad():
            self.model.wte.weight.mul_(8)  # opinions, so that an update shows
            self.model.wte.weight[BYTES.end] *= 3  # the end token comes often
        self.task = load_task(self.args, config.context, generative=True)
        self.optimizer = make_optimizer(self.model, 0.1)
        self.rollouts, self.forwards, self.losses = [], [], []

        def recorded(name, record):
            real = getattr(train, name)

            def function(*given):
                result = real(*given)
                record.append((given, result))
                return result

            monkeypatch.setattr(train, name, function)

        recorded("sample", self.rollouts), recorded("policy_forward", self.forwards)
        recorded("loss_inputs", self.losses)
        monkeypatch.setattr(data, "reward", reward)

    def evaluate_before(self): ...
    def evaluate_if_due(self): ...
    def save_if_due(self, metrics, optimizer): ...
    def steps_to_do(self):
        return [self.now]

    def count_update(self, norms):
        return norms

    def finish_step(self, tokens):
        self.tokens = tokens

    def log(self, metrics, lr):
        self.report = {k: float(v) for k, v in metrics.items() if not getattr(v, "shape", ())} | {"lr": lr}

    def step(self, step=0):
        for record in (self.rollouts, self.forwards, self.losses):
            record.clear()
        self.now = step
        train.train_answers(self.model, self.task, self.args, self, self.optimizer)
        self.rollout = self.rollouts[0][1]
        self.inputs = [result for _, result in self.losses]
        return self.report


def answers_by_the_book(model, rollout, rewards, args, loss_of, rate):
    """Four minibatches of one group each: forwards, losses, clipping and AdamW written out. -> the updated model"""
    for step, rows in enumerate(torch.arange(16).view(4, 4)):
        R = rewards[rows]
        if len(set(R.tolist())) == 1:
            continue
        A, mask, tokens = (R - R.mean()) / (R.std() + 1e-6), rollout.response_mask[rows], rollout.tokens[rows]
        logits, routing = run_model(model, tokens[:, :-1])
        picked = (logits / args.temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        old = picked.detach() if step == 0 else rollout.log_probs[rows]
        loss = loss_of(picked, old, A, mask)
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
        for name, p, g in zip(names, parameters, grads, strict=True):
            if g is not None:
                m, v, n = model.moments.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p), 0])
                g, n = g * min(1.0, 1 / (norm + 1e-6)), n + 1
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                model.moments[name] = [m, v, n]
                decays = name.endswith(("weight", "w_in", "w_out")) and "ln_" not in name
                with torch.no_grad():
                    p.mul_(1 - rate * 0.1 * decays)
                    p.sub_(rate * m / (1 - 0.9**n) / ((v / (1 - 0.999**n)).sqrt() + 1e-8))
    return model


def test_a_step_on_answers_by_the_book(micro, monkeypatch):
    """GRPO from rollout to weights: the old policy, the temperature, four minibatches, clipping and AdamW."""
    run = OneStep(monkeypatch, "--algo grpo --minibatches 4 --temperature 1.3 --seed 3", lr=1e-3)
    book = copy.deepcopy(run.model)
    book.moments = {}
    run.step()
    rewards = run.task.rewards(run.rollout, run.task.prompts(0, 4, 4)[0])

    def grpo(log_probs, old, A, mask):
        total = 0
        for b in range(4):
            terms = []
            for t in range(mask.shape[1]):
                if mask[b, t]:
                    w = (log_probs[b, t] - old[b, t]).exp()
                    terms.append(torch.minimum(w * A[b], w.clamp(0.8, 1.28) * A[b]))
            total = total - sum(terms) / len(terms) / 4
        return total

    book = answers_by_the_book(book, run.rollout, rewards, run.args, grpo, rate=1e-3)
    for (name, ours), theirs in zip(run.model.named_parameters(), book.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    lengths = run.rollout.response_mask.sum(1)
    ends = sum(bool((row[1:][m] == BYTES.end).any()) for row, m in zip(*run.rollout[:2], strict=True))
    assert run.tokens == lengths.sum() and run.report["reward_mean"] == pytest.approx(rewards.mean().item())
    assert run.report["cut_responses"] == pytest.approx(1 - ends / 16) and run.report["lr"] == 1e-3
    assert run.report["accuracy"] == pytest.approx((rewards == 1).float().mean().item())  # a half is no right answer
    by_row = [run.rollout.entropies[b].sum() / lengths[b] for b in range(16)]  # each row weighs the same
    assert run.report["entropy"] == pytest.approx(float(sum(by_row)) / 16, rel=1e-5)


def test_the_share_of_a_minibatch_and_equal_rewards(micro, monkeypatch):
    """Two groups a minibatch, one of them silent: its rows get no forward and still count in the mean over rows."""
    silent = iter([0.0] * 4 + [0, 1, 0, 1] + [1.0] * 8)
    run = OneStep(monkeypatch, "--algo grpo --minibatches 2", reward=lambda *_: next(silent))
    report = run.step()
    assert report["updates"] == 1 and report["silent_groups"] == 0.75
    (inputs,) = run.inputs
    assert len(inputs["log_probs"]) == 4 and inputs["advantages"].abs().sum() > 0
    loss, _ = train.METHODS["grpo"](**inputs)
    assert report["loss"] == pytest.approx(loss.item() / 2)  # 4 of the minibatch's 8 rows


@pytest.mark.parametrize("replay", ["none", "r2", "r3"])
@pytest.mark.parametrize("algo", RL)
def test_the_first_ratio_of_a_batch_is_exactly_one(algo, replay, micro, monkeypatch):
    run = OneStep(monkeypatch, f"--algo {algo} --minibatches 1 --replay {replay}")
    for step in range(2):  # the second step's rollout comes from an updated policy: 1 again
        report = run.step(step)
        assert report["updates"] == 1 and report["grad_norm"] > 0
        assert report["ratio_mean"] == 1.0 and report["ratio_std"] == 0.0 and report.get("clip_share", 0) == 0.0
        if "rais" in algo:
            assert report["gamma_mean"] == report["gamma_min"] == 1.0 and report["floor_share"] == 0.0
        if algo == "erpo":
            assert report["clusters"] > 0 and report["dropped_clusters"] == 0 and report["entropy_reward"] == 0.0


@pytest.mark.parametrize("algo", RL)
def test_later_minibatches_see_an_older_policy(algo, micro, monkeypatch):
    run = OneStep(monkeypatch, f"--algo {algo} --minibatches 4")
    report = run.step()
    assert report["updates"] == len(run.inputs) > 2 and report["ratio_std"] > 0
    for i, ((given, _), inputs) in enumerate(zip(run.losses, run.inputs, strict=True)):
        policy, at_old_experts, old, rollout, rewards = given[:5]
        mask = rollout.response_mask
        gap = (policy.log_probs - old.log_probs)[mask].abs().max()
        shift = (at_old_experts - old.expert_log_probs)[mask].abs().max()
        assert (gap == 0 and shift == 0) if i == 0 else (gap > 1e-4 and shift > 1e-4)
        torch.testing.assert_close(old.log_probs[mask], rollout.log_probs[mask])  # what was recorded while sampling
        assert torch.equal(inputs.get("advantages", group_advantages(rewards, 4)), group_advantages(rewards, 4))
    if "rais" in algo:
        assert report["gamma_min"] < report["gamma_mean"] < 1.0  # the router has moved
        (_, at_old, old, *_), inputs = run.losses[2]  # at the experts of the old policy, whatever the new one chooses
        _, routing = run.forwards[2][1]
        assert torch.equal(inputs["old_router_log_probs"], old.expert_log_probs)
        assert torch.equal(inputs["router_log_probs"], routing.logits.log_softmax(-1).gather(-1, old.experts))
    later = [train.METHODS[run.args.algo](**x)[1]["ratio_neg_log"] for x in run.inputs[1:]]
    assert report["ratio_neg_log_later"] == pytest.approx(float(sum(later)) / len(later), rel=1e-4)


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_with_one_precision_both_replays_are_the_samplers_routes(replay, micro, monkeypatch):
    run = OneStep(monkeypatch, f"--algo grpo --minibatches 2 --replay {replay}")
    run.step()
    for (_, rollout, _, routes), (policy, routing) in run.forwards:
        assert torch.equal(routes, rollout.experts) and torch.equal(policy.experts, rollout.experts)
        assert routing.forced.all()
    (_, rollout, *_), (policy, routing) = run.forwards[-1]
    weights = routing.logits.gather(-1, rollout.experts).softmax(-1)  # today's, not the sampler's
    assert not torch.allclose(weights[..., 0].exp(), rollout.expert_log_probs[..., 0].exp())


@pytest.mark.parametrize("algo", ["grpo", "gspo", "rais", "erpo", "dppo"])
def test_three_policies(algo, micro, monkeypatch):
    """A bfloat16 sampler: pi_old is the trainer's, on all rows, before any update; mu is what was recorded."""
    mismatch = "" if algo == "dppo" else "--mismatch tis"
    run = OneStep(monkeypatch, f"--algo {algo} --minibatches 2 --rollout-dtype bfloat16 --replay r3 {mismatch}")
    before = copy.deepcopy(run.model)
    report = run.step()
    rollout, mask = run.rollout, run.rollout.response_mask
    forced = Routes(rollout.experts, torch.ones_like(rollout.experts[..., 0], dtype=torch.bool), uniform=False)
    logits, _ = run_model(before, rollout.tokens[:, :-1], forced)
    pi_old = logits.log_softmax(-1).gather(-1, rollout.tokens[:, 1:, None]).squeeze(-1).detach()
    asked = torch.cat([result[0].log_probs for given, result in run.forwards[:2]])
    torch.testing.assert_close(asked[mask], pi_old[mask], atol=1e-5, rtol=1e-4)
    gap = (pi_old - rollout.log_probs)[mask].abs()
    assert 1e-4 < gap.mean() < 0.3  # two precisions
    inputs, (given, _) = run.inputs[-1], run.losses[-1]
    part = given[3]
    if algo == "dppo":
        assert torch.equal(inputs["old_log_probs"], part.log_probs) and "weights" not in inputs
    else:
        expected = mismatch_weights(given[2].log_probs, part.log_probs, part.response_mask, kind="tis")
        assert torch.equal(inputs["weights"], expected) and expected[part.response_mask].std() > 0
        assert not torch.equal(inputs["old_log_probs"], part.log_probs)
    assert torch.equal(given[2].experts, part.experts)  # R3: pi_old went along mu's routes
    assert report["engine_moved_tokens"] == 0.0
    assert report["engine_gap"] == pytest.approx(float(gap.mean()), rel=0.6) and report["engine_kl"] > 0


def test_r2_and_r3_differ_with_a_sampler_of_another_precision(micro, monkeypatch):
    routes = {}
    for replay in ("r2", "r3"):
        flags = "--algo grpo --minibatches 1 --prompts-per-step 16 --max-new-tokens 16 --rollout-dtype bfloat16"
        run = OneStep(monkeypatch, f"{flags} --replay {replay}")
        report = run.step()
        routes[replay] = run.forwards[-1][0][3]
        differs = (routes[replay].sort(-1).values != run.losses[0][0][3].experts.sort(-1).values).any()
        assert differs == (replay == "r2") and (report["engine_moved_decisions"] > 0) == (replay == "r2")


def test_bfloat16_training_asks_pi_old_once_more(micro, monkeypatch):
    run = OneStep(monkeypatch, "--algo gmpo --minibatches 2 --dtype bfloat16")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        report = run.step()
    assert len(run.forwards) == 4 and report["engine_gap"] > 0
    with torch.no_grad():
        assert run.forwards[0][1][0].log_probs.requires_grad is False


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_ends_the_run(value, micro, monkeypatch):
    with pytest.raises(UserError, match="a reward must be finite"):
        OneStep(monkeypatch, "--algo grpo", reward=lambda *_: value).step()


def test_a_balance_loss_in_the_updates_counts_prompts_and_responses_and_not_padding(micro, monkeypatch):
    run = OneStep(monkeypatch, "--algo grpo --minibatches 1 --answer-balance-coef 0.5")
    run.step()
    (_, rollout, *_), (_, routing) = run.forwards[0]
    routed = torch.zeros_like(rollout.response_mask)
    for b, row in enumerate(rollout.response_mask):
        routed[b, : int(row.nonzero().max()) + 1] = True
    P, used = routing.logits[routed].softmax(-1), routing.experts[routed]  # [n, L, E], [n, L, K]
    f = torch.stack([(used == e).float().mean((0, 2)) for e in range(8)], -1)
    torch.testing.assert_close(train.balance_loss(routing, rollout, run.args), 0.5 * 8 * (f * P.mean(0)).sum())
