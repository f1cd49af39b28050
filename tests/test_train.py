"""train.py: a step on text, and a step on generated answers, by the book."""

import copy
import math
from functools import partial

import pytest
import torch
from training import BYTES, MICRO, args_of, assert_same_weights, update_by_the_book

import data
import train
from baselines import group_advantages, grpo_loss, mismatch_weights
from erl import erl_objective, explore
from moe import GPT, MoEConfig, Routes, router_losses, upcycle
from support.errors import UserError
from support.optimizer import make_optimizer
from support.tasks import Batch, load_task, rng


def make(seed=0, dtype=torch.float64, **changes) -> tuple[GPT, Batch]:
    """A model all of whose parameters matter, and a batch of two rows, one with a prompt and one with padding."""
    sizes = dict(vocab_size=19, context=10, n_layer=4, n_head=2, n_embd=16, n_expert=4, moe_every=2)
    model = GPT(MoEConfig(**sizes | changes), rng(seed)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=rng(seed, name), dtype=torch.float64)
            p.copy_((0.8 if "router" in name else 0.25) * draw + (1 if "ln_" in name and "weight" in name else 0))
    B, T = 2, 7
    tokens = torch.randint(0, sizes["vocab_size"], (B, T + 1), generator=rng(seed, "tokens"))
    mask, routed = (torch.ones(B, T, dtype=torch.bool) for _ in range(2))
    mask[0, :2] = False  # a prompt: routed, not learned
    mask[1, 5:] = routed[1, 5:] = False  # padding
    return model, Batch(tokens, mask, routed)


def gradients(model, loss) -> dict:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def erl_losses(model, batch, args):
    """The losses of a step, one an inner epoch, and the paths that it drew: (loss, metrics, paths)."""
    seen = []

    def recorded(*given, **options):
        seen.append(explore(*given, **options))
        return seen[0]

    for loss, metrics in train.erl_losses(model, batch, args, 0, report=True, explore=recorded):
        yield loss, metrics, seen[0]


def run_model(model, tokens, routes=None, noise=None):
    features, routing = model(tokens, routes=routes, noise=noise)
    return model.head(features), routing


def picked_from(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def erl_by_the_book(model, batch, args, noise=None):
    """The paper's objective of forwards that share nothing: an original one, and one for each of m perturbed passes."""

    def forward(routes):
        passes = [None] if routes is None else zip(*(x.chunk(args.n_perturb) for x in routes), strict=True)
        log_probs, router, losses = [], [], []
        for one in passes:
            logits, routing = run_model(model, batch.tokens[:, :-1], one and Routes(*one), noise)
            log_probs.append(picked_from(logits, batch.tokens))
            losses.append(-log_probs[-1][batch.mask].mean())
            if one is None:  # L_o: balance and z losses of each layer over every token that is not padding
                balance, z, _ = router_losses(routing.logits, routing.experts, batch.routed)
                losses[0] = losses[0] + args.balance_coef * balance.sum() + args.z_coef * z.sum()
            router.append(routing.logits)
            if args.erl_grad == "router":
                asked = zip(routing.inputs, model.config.moe_blocks, strict=True)
                router[-1] = torch.stack([x.detach() @ model.blocks[i].mlp.router.weight.T for x, i in asked], 2)
        return torch.cat(log_probs), torch.cat(router).log_softmax(-1), sum(losses) / len(losses)

    draw, rest = (train.values_of(options, args) for options in (train.EXPLORE, train.OBJECTIVE))
    paths = explore(forward, batch.mask, args.top_k, generator=rng(args.seed, "routes", 0), **draw)
    for loss, _ in erl_objective(forward, paths, **rest):
        yield loss, paths


# Of a flag that is given twice the last one counts.
ERL = "--algo erl --dataset pydocs --delta 0.7 --z-coef 0.001 --balance-coef 0.02 --erl-grad all --inner-epochs 2 "
VARIANTS = ["", "--erl-grad router --advantage log --jitter 0.3", "--top-k 2 --wpl --jitter 0.3"]
VARIANTS += ["--erl-grad router --top-k 2 --wpl", "--ratio uniform --inner-epochs 1", "--draw router --alpha 1"]


@pytest.mark.parametrize("flags", VARIANTS)
def test_erl_is_its_equations_in_value_and_gradient(flags):
    args = args_of(ERL + flags)
    model, batch = make(seed=args.top_k, top_k=args.top_k)
    noise = train.jitter(model, batch, args, 0)
    assert (noise is None) == (not args.jitter)
    if noise:  # each layer has its own, the passes the same
        assert not torch.equal(*noise) and 0.7 <= noise[0].min() < 0.8 and 1.2 < noise[0].max() <= 1.3
    ours, book = erl_losses(model, batch, args), erl_by_the_book(model, batch, args, noise)
    for epoch in range(args.inner_epochs):
        (loss, metrics, paths), (expected, drawn) = next(ours), next(book)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
        assert epoch == 0 or metrics["clip_share"] > 0
        with torch.no_grad():  # an update: the ratio leaves 1, the clip begins to act
            for name, p in model.named_parameters():
                p.add_((0.5 if "router" in name else 0.02) * torch.randn(p.shape, generator=rng(name), dtype=p.dtype))
    assert torch.equal(paths.S, drawn.S) and torch.equal(paths.experts, drawn.experts) and paths.S.any()


@pytest.mark.parametrize("losses", [train.lm_losses, train.erl_losses])
def test_router_losses_and_reports_count_prompts_and_not_padding(losses):
    model, batch = make()
    args = args_of(ERL + "--delta 0")  # of ERL too L_o is left
    loss, metrics = next(losses(model, batch, args, 0, report=True))
    torch.testing.assert_close(loss, next(erl_by_the_book(model, batch, args))[0])
    _, routing = run_model(model, batch.tokens[:, :-1])
    counts = torch.stack([(routing.experts[batch.routed] == e).sum((0, 2)) for e in range(4)], -1)  # [L, E]
    assert float(metrics["load_max"]) == pytest.approx(float((counts / batch.routed.sum()).max()))
    assert "load_max" not in next(losses(model, batch, args, 0, report=False))[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("erl_grad", ["all", "router"])
def test_copies_of_one_expert_are_neither_better_nor_worse(erl_grad, dtype):
    dense, batch = make(n_expert=1, top_k=1, dtype=torch.float32, vocab_size=257, n_embd=64)
    model = upcycle(dense, MoEConfig(**{**dense.config.__dict__, "n_expert": 4}), rng(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        paths = next(erl_losses(model, batch, args_of(f"{ERL} --erl-grad {erl_grad} --dtype {dtype}")))[2]
    assert paths.S.any() and (paths.advantages[paths.S.any(-1)] == 0).all()


RL = [*train.METHODS, "rais --base gspo", "rais --base grpo"]


def uneven(spec, response, example):
    """A reward that an untrained model meets in several sizes."""
    return sum(map(ord, response)) % 3 / 2


class OneStep:
    """A model, its task and an optimizer in the place of a run, with a record of what `train_answers` hands on."""

    steps, phase = 1, "answers"

    def __init__(self, monkeypatch, flags, reward=uneven, lr=1e-2):
        common = "--dataset addition --max-new-tokens 4 --group-size 4 --prompts-per-step 4"
        self.args = args_of(f"{common} {flags} --lr {lr}")
        self.model = GPT(MoEConfig(vocab_size=257, top_k=2, gate=self.args.gate, **MICRO), rng(0))
        with torch.no_grad():
            self.model.wte.weight.mul_(8)  # opinions, so that an update shows
            self.model.wte.weight[BYTES.end] *= 3  # the end token comes often
        self.task = load_task(self.args, MICRO["context"], generative=True)
        self.optimizer = make_optimizer(self.model, 0.1)
        self.rollouts, self.forwards, self.losses = records = [], [], []

        def recorded(*given, real, record):
            record.append((given, real(*given)))
            return record[-1][1]

        for name, record in zip(("sample", "policy_forward", "loss_inputs"), records, strict=True):
            monkeypatch.setattr(train, name, partial(recorded, real=getattr(train, name), record=record))
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


def test_a_step_on_answers_by_the_book(micro, monkeypatch):
    """GRPO from rollout to weights: the old policy, the temperature, four minibatches, clipping and AdamW."""
    run = OneStep(monkeypatch, "--algo grpo --minibatches 4 --temperature 1.3 --seed 3", lr=1e-3)
    book, moments = copy.deepcopy(run.model), {}
    run.step()
    rollout, rewards = run.rollout, run.task.rewards(run.rollout, run.task.prompts(0, 4, 4)[0])
    for step, rows in enumerate(torch.arange(16).view(4, 4)):  # one group each
        R, tokens = rewards[rows], rollout.tokens[rows]
        if len(set(R.tolist())) > 1:
            log_probs = picked_from(run_model(book, tokens[:, :-1])[0] / 1.3, tokens)
            old = log_probs.detach() if step == 0 else rollout.log_probs[rows]
            A = (R - R.mean()) / (R.std() + 1e-6)
            loss, _ = grpo_loss(log_probs, old, A, rollout.response_mask[rows], clip_low=0.2, clip_high=0.28)
            update_by_the_book(book, loss, 1e-3, moments)
    assert_same_weights(run.model.state_dict(), book.state_dict())
    lengths = rollout.response_mask.sum(1)
    ends = sum(bool((row[1:][m] == BYTES.end).any()) for row, m in zip(*rollout[:2], strict=True))
    assert run.tokens == lengths.sum() and run.report["reward_mean"] == pytest.approx(rewards.mean().item())
    assert run.report["cut_responses"] == pytest.approx(1 - ends / 16) and run.report["lr"] == 1e-3


def test_the_share_of_a_minibatch_and_equal_rewards(micro, monkeypatch):
    """Two groups a minibatch, one of them silent: its rows get no forward and still count in the mean over rows."""
    silent = iter([0.0] * 4 + [0, 1, 0, 1] + [1.0] * 8)
    run = OneStep(monkeypatch, "--algo cispo --minibatches 2", reward=lambda *_: next(silent))
    book = copy.deepcopy(run.model)
    report = run.step()
    assert report["updates"] == 1 and report["silent_groups"] == 0.75
    (inputs,), tokens = run.inputs, run.rollout.tokens[4:8]
    assert len(inputs["log_probs"]) == 4 and inputs["advantages"].abs().sum() > 0
    log_probs = picked_from(run_model(book, tokens[:, :-1])[0], tokens)
    loss, _ = train.METHODS["cispo"](**inputs | {"log_probs": log_probs})
    norm = update_by_the_book(book, loss / 2, 0, {})  # 4 of the minibatch's 8 rows
    assert (report["loss"], report["grad_norm"]) == pytest.approx((loss.item() / 2, norm), rel=1e-4) and norm > 0


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


@pytest.mark.parametrize("sampler", ["float32", "bfloat16"])
@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_r2_replays_the_old_policys_routes_and_r3_the_samplers(replay, sampler, micro, monkeypatch):
    """They are the same but for R2 with a sampler of another precision."""
    flags = "--algo grpo --minibatches 2 --prompts-per-step 16 --max-new-tokens 16"
    run = OneStep(monkeypatch, f"{flags} --replay {replay} --rollout-dtype {sampler}")
    report = run.step()
    (_, rollout, _, routes), (policy, routing) = run.forwards[-1]
    assert routing.forced.all() and torch.equal(policy.experts, routes)
    moved = (replay, sampler) == ("r2", "bfloat16")
    assert (routes.sort(-1).values != rollout.experts.sort(-1).values).any() == moved
    assert (report.get("engine_moved_decisions", 0) > 0) == moved


@pytest.mark.parametrize("algo", ["grpo", "gspo", "rais", "erpo", "dppo"])
def test_three_policies(algo, micro, monkeypatch):
    """A bfloat16 sampler: pi_old is the trainer's, on all rows, before any update; mu is what was recorded."""
    mismatch = "" if algo == "dppo" else "--mismatch tis"
    run = OneStep(monkeypatch, f"--algo {algo} --minibatches 2 --rollout-dtype bfloat16 --replay r3 {mismatch}")
    before = copy.deepcopy(run.model)
    report = run.step()
    rollout, mask = run.rollout, run.rollout.response_mask
    forced = Routes(rollout.experts, torch.ones_like(rollout.experts[..., 0], dtype=torch.bool), uniform=False)
    pi_old = picked_from(run_model(before, rollout.tokens[:, :-1], forced)[0], rollout.tokens).detach()
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


def test_bfloat16_training_asks_pi_old_once_more(micro, monkeypatch):
    run = OneStep(monkeypatch, "--algo gmpo --minibatches 2 --dtype bfloat16")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # it samples so too
        report = run.step()
    assert len(run.forwards) == 4 and 0 < report["engine_gap"] < 0.05
    assert run.rollout.log_probs.dtype == run.rollout.expert_log_probs.dtype == torch.float32
    assert not run.forwards[0][1][0].log_probs.requires_grad


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
    balance, _, _ = router_losses(routing.logits, routing.experts, routed)
    torch.testing.assert_close(train.balance_loss(routing, rollout, run.args), 0.5 * balance.sum())
