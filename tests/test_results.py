"""results/: verdicts from synthetic runs whose truth is known, and the arms' variants on small tensors."""

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from baselines import gmpo_loss, grpo_loss, gspo_loss
from erl import explore
from erpo import erpo_loss
from rais import rais_loss
from results import verdict
from results.verdict import PRIMARY, Estimate, decide, differences, estimate, holm, student_quantile, student_tail

# ---- Student's t


@pytest.mark.parametrize(
    "p, df, t",  # tables
    [(0.975, 1, 12.7062), (0.975, 9, 2.2622), (0.95, 4, 2.1318), (0.995, 30, 2.7500), (0.975, 1000, 1.9623)],
)
def test_student_quantiles_are_those_of_the_tables(p, df, t):
    assert student_quantile(p, df) == pytest.approx(t, abs=1e-4)
    assert student_quantile(1 - p, df) == pytest.approx(-t, abs=1e-4)


@pytest.mark.parametrize("t, df", [(-3.0, 2), (0.0, 5), (0.3, 9), (1.0, 3), (25.0, 9), (4.5, 50)])
def test_student_tail_is_the_integral_of_its_density(t, df):
    x = torch.linspace(t, t + 400, 4_000_001, dtype=torch.float64)
    constant = torch.lgamma(torch.tensor((df + 1) / 2)) - torch.lgamma(torch.tensor(df / 2))
    density = (
        constant.double() - 0.5 * torch.log(torch.tensor(df * torch.pi)) - (df + 1) / 2 * (x * x / df).log1p()
    ).exp()
    assert student_tail(t, df) == pytest.approx(torch.trapezoid(density, x).item(), abs=1e-5)


# ---- estimates and verdicts


def test_an_estimate_by_hand():
    found = estimate([1.0, 2.0, 3.0, 4.0], margin=1.0)
    error = (5 / 3) ** 0.5 / 2
    assert (found.starts, found.mean, found.spread) == (4, 2.5, pytest.approx((5 / 3) ** 0.5))
    assert found.high - found.mean == pytest.approx(3.1824 * error, rel=1e-4)
    assert found.p_difference == pytest.approx(2 * student_tail(2.5 / error, 3))
    assert found.p_equivalence == pytest.approx(1 - student_tail(1.5 / error, 3))


def test_a_prediction_interval_holds_one_more_value_as_often_as_it_says():
    low, high = verdict.prediction_interval([1.0, 2.0, 3.0, 4.0])
    assert (low + high) / 2 == 2.5 and high - 2.5 == pytest.approx(3.1824 * (5 / 3) ** 0.5 * 1.25**0.5, rel=1e-4)
    draw, inside = random.Random(1), 0
    for _ in range(2000):
        *seen, new = (draw.gauss(3, 2) for _ in range(6))
        low, high = verdict.prediction_interval(seen)
        inside += low <= new <= high
    assert 0.93 < inside / 2000 < 0.97


def test_equal_differences_and_a_single_one():
    assert estimate([0.5], 1.0) is None
    same = estimate([0.5] * 10, 0.1)
    assert same.low == same.high == 0.5 and decide(same, same.p_difference, same.p_equivalence) == "same direction"
    zero = estimate([0.0] * 10, 0.1)
    assert decide(zero, zero.p_difference, zero.p_equivalence) == "no difference"


def test_holm_counts_the_tests_that_could_not_run():
    assert holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, 0.04, 0.03], 5) == pytest.approx([0.05, 0.12, 0.12])
    assert holm([0.5, 0.9], 5) == [1.0, 1.0]


@pytest.mark.parametrize(
    "p_difference, p_equivalence, mean, expected",
    [
        (0.01, 0.5, 1.0, "same direction"),
        (0.01, 0.5, -1.0, "opposite"),
        (0.01, 0.01, 1.0, "no difference"),  # there, and too small to count
        (0.6, 0.2, 1.0, "not decidable here"),
    ],
)
def test_the_four_verdicts(p_difference, p_equivalence, mean, expected):
    found = Estimate(10, mean, 1.0, 0.0, 0.0, p_difference, p_equivalence)
    assert decide(found, p_difference, p_equivalence) == expected and expected in verdict.VERDICTS


def synthetic(truth: dict, spread=0.25, starts=range(100, 112), seed=0) -> dict:
    """Runs in which every primary contrast has `truth` times its effect and paired noise of spread times it."""
    draw, runs = random.Random(seed), {}
    for c in PRIMARY:
        for start in starts:
            base, noise = 0.3 + draw.random(), spread * c.effect * draw.gauss(0, 1)
            difference = truth.get(c.name, 0.0) * c.effect + noise
            for arm, shift in ((c.control, 0.0), (c.arm, difference)):
                value = base * 2.718281828459045 ** (-shift) if c.lower_is_better else base + shift
                record = {"experiment": c.experiment, "arm": f"{c.name}:{arm}", "start": start}
                runs[c.experiment, record["arm"], start] = record | {"figures": {c.figure: value}}
    return runs


CONTRASTS = [c._replace(arm=f"{c.name}:{c.arm}", control=f"{c.name}:{c.control}") for c in PRIMARY]


def test_verdicts_find_what_is_there():
    truth = {"erl": 1.0, "credit": -1.0, "erpo": 1.0, "rais": 0.0, "where": 0.0}
    rows = verdict.verdicts(synthetic(truth, spread=0.06), CONTRASTS)
    found = {r["contrast"].name: r["verdict"] for r in rows}
    same, none = "same direction", "no difference"
    assert found == {"erl": same, "credit": "opposite", "erpo": same, "rais": none, "where": none}


def test_noise_is_seldom_called_a_difference_and_an_effect_at_the_margin_seldom_none():
    wrong = [0, 0]
    for seed in range(120):
        for which, truth, called in ((0, 0.0, ("same direction", "opposite")), (1, 0.2501, ("no difference",))):
            runs = synthetic(dict.fromkeys(("erl", "credit", "erpo", "rais", "where"), truth), 0.4, seed=seed)
            wrong[which] += any(r["verdict"] in called for r in verdict.verdicts(runs, CONTRASTS))
    assert wrong[0] <= 13 and wrong[1] <= 13  # 5 % of 120 are 6; more than 13 have a chance of 0.4 %


def test_power_grows_with_starts_and_says_how_many_are_needed():
    few, many = verdict.power(10, 0.02, 0.032, 0.008, 200), verdict.power(40, 0.02, 0.032, 0.008, 200)
    assert many[0] >= few[0] and many[1] >= few[1]
    assert verdict.starts_needed(0.001, 0.032, 0.008) == verdict.LEAST_STARTS
    assert verdict.starts_needed(1.0, 0.032, 0.008, most=12) is None


def test_only_pairs_of_confirmatory_starts_count():
    c = CONTRASTS[0]
    runs = synthetic({"erl": 1.0}, starts=[0, 1, 100, 101, 102])
    del runs[c.experiment, c.control, 101]
    runs[c.experiment, c.arm, 102] = {"failed": "the loss is nan", "start": 102}
    assert len(differences(runs, c)) == 1 and len(differences(runs, c, first=0)) == 3
    row = verdict.verdicts(runs, CONTRASTS)[0]
    assert (row["verdict"], row["why"]) == ("not decidable here", "1 of at least 10 starts ran")


def test_nothing_ran():
    rows = verdict.verdicts({})
    assert [r["verdict"] for r in rows] == ["not decidable here"] * 5
    assert all("0 of at least 10" in r["why"] and verdict.line(r) for r in rows)


@pytest.mark.parametrize("figures, word", [({"median_cluster": 2.0}, "cluster"), ({"dropped_share": 0.31}, "ratio")])
def test_erpo_is_not_judged_by_clusters_of_two_tokens(figures, word):
    arm = "start" if "median_cluster" in figures else "erpo"
    runs = {("answers", arm, 100): {"figures": figures}}
    row = next(r for r in verdict.verdicts(runs) if r["contrast"].arm == "erpo")
    assert row["verdict"] == "not testable here" and word in row["why"]
    fine = {("answers", "start", 100): {"figures": {"median_cluster": 12.0}}}
    assert verdict.not_testable(fine) == ""


def test_the_program_reads_json_and_prints_a_line_a_contrast(tmp_path):
    for (experiment, arm, start), record in synthetic({"erl": 1.0}).items():
        if not arm.startswith("erl:"):
            continue
        path = tmp_path / experiment / f"{arm.split(':')[1]}-{start}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record | {"arm": arm.split(":")[1]}))
    command = [sys.executable, verdict.__file__, "--runs", str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 5 and "best_perplexity of erl against lm" in lines[0] and "same direction" in lines[0]


def test_the_line_of_sharpening_alone():
    points = {"lm": (2.0, 0.05), "sharpen-0.1": (1.0, 0.15), "sharpen-0.3": (0.5, 0.35), "erl": (1.5, 0.18)}
    runs = {("e", arm, 100): {"figures": {"router_entropy": h, "mrr": m}} for arm, (h, m) in points.items()}
    assert verdict.above_line(runs, "e", "erl") == [pytest.approx(0.18 - 0.10)]
    line = sorted([(2.0, 0.05), (1.0, 0.15), (0.5, 0.35)])
    for x, y in ((0.1, 0.35), (0.75, 0.25), (1.0, 0.15), (3.0, 0.05)):
        assert verdict.interpolate(line, x) == pytest.approx(y)
    assert verdict.above_line(runs | {("e", "erl", 0): runs["e", "erl", 100]}, "e", "erl", 0) == [pytest.approx(0.08)]


# ---- the variants


@pytest.fixture
def arms(monkeypatch):
    """results.arms; what its setups replace is put back."""
    import data
    import train
    from results import arms

    for module, names in (
        (train, "explore erl_losses lm_losses original_loss perturbed_log_probs load_task initial_model".split()),
        (data, ["load_text"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(train, "METHODS", dict(train.METHODS))
    monkeypatch.setattr(train, "OPTIONS", dict(train.OPTIONS))
    return arms


def toy_forward(B=2, T=5, L=2, E=4):
    """A model whose token log-probability is the better the more often expert 0 is used, in passes that force it."""
    logits = torch.randn(B, T, L, E, generator=torch.Generator().manual_seed(1))

    def forward(routes):
        if routes is None:
            return torch.full((B, T), -2.0), logits.log_softmax(-1), torch.zeros(())
        experts, S = routes
        gain = ((experts[..., 0] == 0) & S).float().sum(-1) - 0.4
        return -2.0 + 0.1 * gain, logits.repeat(len(experts) // B, 1, 1, 1).log_softmax(-1), None

    return forward, torch.ones(B, T, dtype=torch.bool)


def test_controls_keep_what_they_say_and_change_the_rest(arms):
    forward, mask = toy_forward()
    plain = explore(forward, mask, 1, generator=torch.Generator().manual_seed(3))
    found = {}
    for name, change in (("random", arms.random_expert), ("centred", arms.centred), ("mean", arms.mean_alone)):
        found[name] = change(plain, torch.Generator().manual_seed(4))
        assert torch.equal(found[name].S, plain.S)
    random_one = found["random"]
    assert torch.equal(random_one.advantages, plain.advantages)
    assert 0.1 < (random_one.experts == plain.experts).float().mean() < 0.5  # 1 / E = 0.25
    expected = plain.perturbed[1].gather(-1, random_one.experts)
    assert torch.equal(random_one.old_router_log_probs, expected)
    assert found["centred"].advantages.view(3, 2, 5).mean(0).abs().max() < 1e-6
    counts = plain.S.any(-1)
    assert found["mean"].advantages.unique().tolist() == [pytest.approx(plain.advantages[counts].mean().item())]
    positive, negative = (change(plain, None).advantages for change in (arms.positive_alone, arms.negative_alone))
    assert torch.equal(positive + negative, plain.advantages) and positive.min() == 0 == negative.max()
    assert positive.max() == 1 and negative.min() == -1
    arms.explore_then(arms.centred, lambda paths, _: arms.random_expert(paths, torch.Generator().manual_seed(4)))()
    both = arms.train.explore(forward, mask, 1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(both.experts, random_one.experts) and torch.equal(both.advantages, found["centred"].advantages)
    uniform = arms.from_uniform(plain, None)
    torch.testing.assert_close(uniform.old_router_log_probs.exp(), torch.full_like(plain.old_router_log_probs, 1 / 4))
    assert torch.equal(uniform.experts, plain.experts) and torch.equal(uniform.advantages, plain.advantages)
    flat = arms.level(plain, None).advantages
    counted = (flat[..., None] * plain.S).sum(-1).view(3, 2, 5).sum(0)  # over the replaced decisions of a position
    assert counted.abs().max() < 1e-6 and flat.abs().max() > 0.5
    torch.testing.assert_close((flat - plain.advantages).view(3, 2, 5).std(0), torch.zeros(2, 5), rtol=0, atol=1e-6)
    mixed = arms.shuffled(plain, torch.Generator().manual_seed(4))
    assert not torch.equal(mixed.advantages, plain.advantages)
    assert torch.equal(mixed.advantages[counts].sort().values, plain.advantages[counts].sort().values)


def test_experts_are_drawn_as_often_as_the_router_gives_them(arms):
    forward, mask = toy_forward(T=400)
    arms.drawn_from_router()
    paths = arms.train.explore(forward, mask, 1, alpha=1.0, generator=torch.Generator().manual_seed(5))
    P, experts = paths.original[1].exp().repeat(3, 1, 1, 1), paths.experts[..., 0]
    for e in range(4):  # each decision is a draw of its own with chance P(e)
        expected, spread = P[..., e].sum().item(), (P[..., e] * (1 - P[..., e])).sum().sqrt().item()
        assert abs((experts == e).sum().item() - expected) < 4 * spread
    likely = (P.argmax(-1) == experts).float().mean().item()
    assert likely == pytest.approx(P.max(-1).values.mean().item(), abs=0.04) and likely > 0.4
    assert torch.equal(paths.old_router_log_probs, paths.perturbed[1].gather(-1, paths.experts))


@pytest.mark.parametrize("weighted, drift", [(False, True), (True, False)])
def test_a_constant_advantage_drifts_unless_it_is_weighted(arms, weighted, drift):
    """The mean gradient over all experts, each as often as it is drawn: that of a lower or higher mean log P, or 0."""
    logits = torch.tensor([1.0, 0.5, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1).view(4, 1, 1, 1)  # four rows, in each another expert
    old = torch.full_like(log_p, -torch.tensor(4.0).log().item()) if weighted else log_p
    from erl import erl_loss

    erl_loss(log_p, old, -torch.ones(4, 1), torch.ones(4, 1, 1, dtype=torch.bool), clip_eps=100)[0].backward()
    push = -1.0 * (1 / 4 - logits.detach().softmax(-1)) if drift else torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(-logits.grad, push)
    if drift:  # a step down the gradient sharpens
        entropy = [-(x.exp() * x).sum() for x in (y.log_softmax(-1) for y in (logits, logits - 0.1 * logits.grad))]
        assert entropy[1] < entropy[0]


def policies(B=4, T=12, L=2, K=2, E=4):
    draw = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(B, T, generator=draw)
    mask = torch.arange(T) < torch.tensor([[12], [9], [7], [12]])
    experts, old_experts = (torch.rand(B, T, L, E, generator=draw).topk(K).indices for _ in range(2))
    new, old = (0.2 * torch.randn(B, T, L, K, generator=draw) - 1.5 for _ in range(2))
    return {
        "log_probs": log_probs.requires_grad_(),
        "old_log_probs": log_probs.detach() + 0.1 * torch.randn(B, T, generator=draw),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "response_mask": mask,
        "router_log_probs": new.requires_grad_(),
        "old_router_log_probs": old,
    }, (experts, old_experts, new.detach().exp(), old.exp())


def test_gammas_yoked_shuffled_and_with_a_gradient(arms):
    p, _ = policies()
    still = p | {"router_log_probs": p["old_router_log_probs"]}
    base = {k: p[k] for k in ("log_probs", "old_log_probs", "advantages", "response_mask")}
    yoked = arms.yoked(gmpo_loss)
    for loss in (yoked, arms.gamma_shuffled, arms.with_gradient):
        assert loss(**still)[0].item() == pytest.approx(gmpo_loss(**base)[0].item(), abs=1e-6)
        assert loss(**p)[0].item() != pytest.approx(gmpo_loss(**base)[0].item(), abs=1e-4)
        assert loss(**p)[1]["gamma_mean"].item() == pytest.approx(rais_loss(**p)[1]["gamma_mean"].item(), abs=1e-6)
    assert arms.with_gradient(**p)[0].item() == pytest.approx(rais_loss(**p)[0].item(), abs=1e-6)
    for loss, flows in ((rais_loss, False), (yoked, False), (arms.with_gradient, True)):
        p["router_log_probs"].grad = None
        loss(**p)[0].backward()
        assert (p["router_log_probs"].grad is not None) == flows
    assert arms.rais_over("gspo")(**p)[0].item() == rais_loss(**p, base="gspo")[0].item()
    assert arms.rais_over("gspo")(**still)[0].item() == pytest.approx(gspo_loss(**base)[0].item(), abs=1e-6)
    assert arms.yoked(grpo_loss)(**still)[0].item() == pytest.approx(grpo_loss(**base)[0].item(), abs=1e-6)
    gamma = yoked(**p)[1]["gamma_mean"].item()
    base_of_mean = base | {"old_log_probs": p["old_log_probs"] - math.log(gamma)}
    assert arms.yoked(grpo_loss)(**p)[0].item() == pytest.approx(grpo_loss(**base_of_mean)[0].item(), abs=1e-6)
    moved = {"clip_low": 1 - 0.8 / gamma, "clip_high": 1.28 / gamma - 1}  # one gamma is another clip range
    clipped = grpo_loss(**base, **moved)[0].item()
    assert arms.yoked(grpo_loss)(**p)[0].item() == pytest.approx(gamma * clipped, abs=1e-6)
    assert clipped != pytest.approx(grpo_loss(**base)[0].item(), abs=1e-4)
    scaled = arms.scaled(grpo_loss, 0.5)(**base)
    assert scaled[0].item() == pytest.approx(0.5 * grpo_loss(**base)[0].item(), abs=1e-6) and scaled[1]
    positive = grpo_loss(**base | {"advantages": torch.tensor([1.0, 0.0, 0.5, 0.0])})[0]
    assert arms.positive_only(**base)[0].item() == positive.item()
    arms.no_update(p["log_probs"], p["response_mask"])[0].backward()


def test_over_gmpo_gamma_says_nothing_of_single_tokens():
    """It enters through its mean over an answer: its other tokens may have it as well. Over GRPO that is a change."""
    p, _ = policies(T=7)
    p["response_mask"] = torch.ones(4, 7, dtype=torch.bool)
    turned = p | {k: p[k].detach().roll(1, 1) for k in ("router_log_probs", "old_router_log_probs")}
    for base, differ in (("gmpo", False), ("grpo", True)):
        found = []
        for given in (p, turned):
            loss = rais_loss(**given, base=base, clip_low=9.0, clip_high=9.0)[0]  # no token is clipped
            found.append(torch.autograd.grad(loss, p["log_probs"])[0])
        assert ((found[0] - found[1]).abs().max() > 1e-4 * found[0].abs().max()) == differ


def test_permuted_clusters_keep_their_sizes_and_the_pairing_of_old_and_new(arms, monkeypatch):
    p, routes = policies()
    seen = {}

    def spy(log_probs, old_log_probs, rewards, response_mask, *moved, **sizes):
        seen["moved"] = moved
        return erpo_loss(log_probs, old_log_probs, rewards, response_mask, *moved, **sizes)

    monkeypatch.setattr(arms, "erpo_loss", spy)
    given = (p["log_probs"], p["old_log_probs"], torch.tensor([1.0, 0.0, 1.0, 0.0]), p["response_mask"])
    loss, metrics = arms.erpo_permuted(*given, *routes, num_experts=4, group_size=2)
    plain_loss, plain = erpo_loss(*given, *routes, num_experts=4, group_size=2)
    assert loss.item() != plain_loss.item() and metrics["clusters"] == plain["clusters"]
    mask = p["response_mask"]
    for b in range(4):
        for layer in range(2):
            before = torch.cat([r[b, :, layer].float() for r in routes], -1)[mask[b]]
            after = torch.cat([r[b, :, layer].float() for r in seen["moved"]], -1)[mask[b]]
            assert not torch.equal(before, after)
            assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))


def test_sharpening_adds_the_entropy_of_the_routers_and_its_rival_their_mean_log_p(arms):
    import train
    from moe import GPT, MoEConfig
    from support.tasks import Batch

    model = GPT(MoEConfig(n_layer=2, n_embd=32, context=16), torch.Generator().manual_seed(0))
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    every = torch.ones(2, 16, dtype=torch.bool)
    batch = Batch(tokens, every, every)
    args = train.parse(["--algo", "lm", "--steps", "1"])
    features, routing = model.branch(model.stem(tokens[:, :-1]))
    plain = train.original_loss(model, features, routing, batch, args)[0]
    arms.router_loss(0.5)()
    sharper = train.original_loss(model, features, routing, batch, args)[0]
    entropy = torch.distributions.Categorical(logits=routing.logits).entropy().mean()
    assert (sharper - plain).item() == pytest.approx(0.5 * entropy.item(), rel=1e-4)
    arms.router_loss(0.065, arms.mean_log_p)()
    both = train.original_loss(model, features, routing, batch, args)[0]
    # ERL's loss with the advantage -0.13, averaged over the experts that it may draw
    P = routing.logits.double().softmax(-1)
    drawn = sum(0.5 * -(-0.13 * P[..., e].log()).mean() for e in range(8)) / 8
    assert (both - sharper).item() == pytest.approx(drawn.item(), rel=1e-3)


@pytest.mark.parametrize("name", ["erl-text", "erl-overfit", "erl-domains", "erl-still", "answers"])
def test_every_arm_is_a_command_line_that_the_program_understands(arms, name):
    import train

    e = arms.EXPERIMENTS[name]
    for arm in e.arms.values():
        if arm.setup and arm.flags.split()[1] not in ("lm", "erl"):
            arm.setup()
        args = train.parse(f"{e.common} {e.then} {arm.flags} --seed 1".split())
        train.check_options(args)
    for c in PRIMARY:
        if c.experiment == name:
            assert {c.arm, c.control} <= set(e.arms) and e.arms[c.arm].tier == e.arms[c.control].tier == 0


@pytest.mark.parametrize("drawn", [False, True])
def test_one_map_of_places_holds_for_all_rows_and_layers(arms, drawn):
    arms.as_published(*([arms.explore_drawn] if drawn else []))()
    forward, mask = toy_forward(B=3, T=50)
    paths = arms.train.explore(forward, mask, 1, alpha=0.5, generator=torch.Generator().manual_seed(0))
    assert paths.S.shape == (9, 50, 2) and 10 < paths.S[0, :, 0].sum() < 40
    assert torch.equal(paths.S, paths.S[:1, :, :1].expand_as(paths.S))
    P = paths.original[1].exp().repeat(3, 1, 1, 1)
    likely = P.gather(-1, paths.experts).mean().item()  # uniform draws: 1 / 4 on average
    assert likely == pytest.approx((P**2).sum(-1).mean().item() if drawn else 0.25, abs=0.03)


def test_dropout_differs_between_passes_and_goes_away_again(arms):
    seen = []

    class Model:
        def branch(self, hidden):
            seen.append(hidden)

    def losses(model, batch, args, step):
        for _ in range(2):
            model.branch(torch.ones(100, 10))
        yield None

    model = Model()
    whole = model.branch
    list(arms.with_dropout(losses)(model, None, SimpleNamespace(seed=0), 3))
    list(arms.with_dropout(losses)(model, None, SimpleNamespace(seed=0), 3))
    assert model.branch == whole and torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    for hidden in seen:
        assert hidden.unique().tolist() == pytest.approx([0, 1 / 0.9]) and 0.85 < (hidden > 0).float().mean() < 0.95


def test_alphabets_are_permutations_and_rows_take_turns(arms):
    table = arms.ciphers(257)
    assert table.shape == (8, 257) and torch.equal(table[0], torch.arange(257)) and (table[:, 256] == 256).all()
    assert all(torch.equal(row.sort().values, torch.arange(257)) for row in table)
    assert len({tuple(row.tolist()) for row in table}) == 8
    assert [arms.domains_of(4, step).tolist() for step in (0, 1, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


def test_the_right_expert_is_the_one_of_the_windows_alphabet(arms):
    from types import SimpleNamespace

    def branch(tokens, routes=None):
        rows, T = tokens.shape
        number = tokens[:, 0] // 256  # a window's first token is its place in the text
        if routes is None:  # the first layer sends a window to the expert of its number, the second all to expert 1
            experts = torch.stack([number % 8, torch.ones_like(number)], -1)[:, None, :, None].expand(rows, T, 2, 1)
            return None, SimpleNamespace(experts=experts)
        assert routes[1].all()
        right = (routes[0][..., 0] == (number % 8)[:, None, None]).all(-1)
        return torch.where(right, math.log(1 / 5), -100.0), None  # worse where a layer is sent elsewhere

    stem, token_log_probs = (lambda tokens: tokens), (lambda features, targets: features)
    model = SimpleNamespace(branch=branch, stem=stem, token_log_probs=token_log_probs)
    model.config = SimpleNamespace(context=256)
    task = SimpleNamespace(held_out={"test": SimpleNamespace(tokens=torch.arange(100 * 256 + 1).numpy())})
    found = arms.right_experts(model, task)
    assert found == {"right_expert": (1 + 1 / 8) / 2, "right_route_perplexity": pytest.approx(5)}


# ---- runs and the report

SHRUNK = """
import json, pathlib, sys
sys.path.insert(0, {root!r})
from results import arms, reproduce
e = arms.EXPERIMENTS["erl-domains"]
short = "--dataset pydocs --batch-size 2 --eval-samples 1 --test-samples 1"
start = "--algo lm --pretrain-steps 0 --steps 2"
arms.EXPERIMENTS["erl-domains"] = e._replace(common=short, start=start, then="--steps 2")
reproduce.RUNS, reproduce.WORK, reproduce.WINDOWS = pathlib.Path("json"), pathlib.Path("work").absolute(), 1
reproduce.run_one("erl-domains", sys.argv[1], 3)
"""


def test_a_start_and_an_arm_run_and_leave_their_json(tmp_path):
    root = str(verdict.RUNS.parents[1])
    for arm in ("start", "erl-published"):
        subprocess.run([sys.executable, "-c", SHRUNK.format(root=root), arm], cwd=tmp_path, check=True, timeout=600)
    record = json.loads((tmp_path / "json" / "erl-domains" / "erl-published-3.json").read_text())
    assert (record["experiment"], record["arm"], record["start"]) == ("erl-domains", "erl-published", 3)
    assert record["settings"]["seed"] == 3 and record["settings"]["algo"] == "erl" and "failed" not in record
    assert {"torch", "python", "commit", "cpu"} == set(record["versions"])
    wanted = (
        "perplexity best_perplexity mrr hit1 best_of_99_score router_entropy load_max top1_above_0.9 mean_grad_norm"
    )
    assert {"right_expert", *wanted.split()} <= set(record["figures"]) and record["figures"]["windows"] == 1
    assert not (tmp_path / "work" / "erl-domains" / "3" / "erl-published").exists()  # the start's model stays
    assert (tmp_path / "work" / "erl-domains" / "3" / "start" / "summary.json").exists()


def test_runs_that_have_a_json_are_not_run_again_and_primary_arms_come_first(tmp_path, monkeypatch):
    from results import reproduce

    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "WORK", tmp_path / "work")
    arms = ["lm", "erl", "erl-shuffled"]
    order = [run[1:] for run in reproduce.missing("erl-text", [100, 101], arms)]
    late = [("erl-shuffled", 100), ("erl-shuffled", 101)]
    assert order == [(a, s) for s in (100, 101) for a in ("start", "lm", "erl")] + late
    for arm in ("start", "lm", "erl"):
        path = reproduce.json_path("erl-text", arm, 100)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    order = [run[1:] for run in reproduce.missing("erl-text", [100], arms)]
    assert order == [("start", 100), ("erl-shuffled", 100)]  # its model is gone
    (tmp_path / "work" / "erl-text" / "100" / "start").mkdir(parents=True)
    (tmp_path / "work" / "erl-text" / "100" / "start" / "summary.json").write_text("{}")
    assert [run[1:] for run in reproduce.missing("erl-text", [100], arms)] == [("erl-shuffled", 100)]
    assert reproduce.missing("erl-text", [100], ["lm", "erl"]) == []
    assert reproduce.numbers("100-102,7") == [100, 101, 102, 7]


def test_the_report_is_made_of_the_json_and_leaves_other_words_alone(tmp_path):
    from results import report

    def write(arm, start, figures, experiment="erl-text", folder="runs", day="2026-11-25"):
        path = tmp_path / folder / experiment / f"{arm}-{start}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"experiment": experiment, "arm": arm, "start": start, "figures": figures, "date": f"{day}T12:00:00"}
        path.write_text(json.dumps(record))

    draw = random.Random(0)
    for start in range(100, 110):
        for arm, entropy, mrr, perplexity in (
            ("lm", 2.0, 0.05, 9.0),
            ("sharpen-0.1", 1.0, 0.2, 9.05),
            ("erl", 1.2, 0.3, 9.3),
            ("erl-expert-random", 1.3, 0.15, 9.2),
        ):
            noise = 1 + 0.002 * draw.gauss(0, 1)
            figures = {key: 1.0 for key, _, _ in report.COLUMNS if not key.startswith("right")}
            figures |= {"windows": 60, "router_entropy": entropy}
            figures |= {
                "load_max": 0.9 if arm == "erl" else 0.3,
                "mrr": mrr * noise,
                "best_perplexity": perplexity * noise,
            }
            figures |= {f"perplexity_at_{alpha:g}": 9 + alpha + start / 100 for alpha in report.ALPHAS}
            write(arm, start, figures)
        for arm, right, perplexity in (
            ("lm", 0.12, 21.0),
            ("erl-router", 0.2, 20.0),
            ("erl-router-random", 0.12, 20.5),
        ):
            figures = {key: 1.0 for key, _, _ in report.COLUMNS} | {"windows": 60, "right_expert": right}
            for experiment in ("erl-domains", "erl-still"):
                last = perplexity**2  # twice the difference of logarithms
                write(arm, start, figures | {"best_perplexity": perplexity, "perplexity": last}, experiment)
    # The machine that runs once more is another one: the first figure is like the others, the second is not.
    write("erl", 100, {"mrr": 0.3003, "best_perplexity": 9.9}, folder="again", day="2026-11-27")
    for start in (100, 101, 102):
        for arm, perplexity in (("lm", 20.0), ("erl", 19.0), ("expert-random", 19.5)):
            figures = {"before_perplexity": 30.0, "perplexity": perplexity, "router_entropy": 1.0 + start / 100}
            write(arm, start, figures, "erl-real")
        for arm, accuracy in (("gmpo-more", 0.5), ("rais-more", 0.6 + start / 10000)):
            figures = {"accuracy": accuracy, "mean_reward_mean": accuracy / 2, "late_reward": accuracy / 4}
            write(arm, start, figures, "answers")
    findings = tmp_path / "findings.md"
    findings.write_text("Before.\n" + "\nold\n".join(report.MARKS) + "\nAfter.\n")
    for _ in range(2):
        report.write(findings, tmp_path / "erl.png", tmp_path / "runs")
        text = findings.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "old" not in text
    claims = [line for line in text.splitlines() if line.startswith(("| `erl`: ", "| `credit`: ", "| `erpo`: "))]
    assert "**opposite**" in claims[0] and "-3.2" in claims[0] and "| 10 |" in claims[0]
    assert "**same direction**" in claims[1] and "**not decidable here** (0 of at least 10 starts ran" in claims[2]
    assert "| everything, as the paper sets it | `erl` | 10 | 0.30 ± 0.00 | 0.30 - 0.30 | 1.20 ± 0.00 | +3.2" in text
    paper = "| MoE-ERL, the paper | 0.35 | 0.18 | 0.80 | 26.94 | 14.19 | 2.93 | 0.56 | 0.02 |"
    ours = "as the paper sets it | 0.30 | 1.00 | 1.00 | 10.04 | 10.29 | 10.54 | 10.79 | 11.04 |"
    assert paper in text and ours in text  # 9 + alpha + the mean of 1.00 to 1.09
    assert "| `erl` | 10 | 0." in text and "| `lm` | 0 | - | 10 | 0." in text
    assert (
        "| arm | perplexity against `lm`, % | of the last checkpoint | MRR less that of `lm` | above the line |" in text
    )
    assert "| `sharpen-0.1` | -0.5" in text and " | on it |" in text  # 100 x log(9 / 9.05) = -0.55
    credit = "| `erl-router` | `erl-router-random` |"
    assert (
        f"{credit} +2.47 [+2.47, +2.47] | +4.94 [+4.94, +4.94] | +0.000 [-0.000, +0.000] | +0.080 [+0.080, +0.080] |"
        in text
    )
    assert (
        f"{credit} 0.98 [0.98, 0.98] | 0.95 [0.95, 0.95] | +0.000 [-0.000, +0.000] | +0.080 [+0.080, +0.080] |" in text
    )  # 20 / 20.5
    found = "0.20 ± 0.00 | 0.20 - 0.20 | 1.00 ± 0.00 | 1.00 ± 0.00 | 0.95 [0.95, 0.95] | 0.91 [0.91, 0.91]"  # 20 / 21
    assert f"| everything | `erl-router` | 10 | {found} |" in text
    assert "| `answers` | - | `gmpo-more` (3), `rais-more` (3) | `none`" in text
    assert "| `erl-text/erl-100` | mrr | 0.29" in text and "| 0.3003 | 2 | 0.29" in text
    assert [line.split(" | ")[-1] for line in text.splitlines() if "/erl-100`" in line] == ["no |", "yes |"]
    assert "| `erl` | `lm` | 3 | +5.13 [+5.13, +5.13] | +0.000" in text
    assert "| `erl` | `expert-random` | 3 | +2.60 [+2.60, +2.60] |" in text
    assert "| `rais-more` | `gmpo-more` | 3 | +0.110 [+0.110, +0.110] | +0.055 [+0.055, +0.055] | +0.028" in text
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("erl.png", "domains.png"))
