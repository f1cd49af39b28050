"""results/: the rows, statistics whose truth is known, and the runs that stay on small models."""

import itertools
import math
import random
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

import train
from baselines import gmpo_loss
from moe import GPT, SIZES, MoEConfig
from rais import rais_loss
from results import mechanism, moving_routes, rows
from results.rows import PLANNED, confirmatory, differences, holm, interval, sign_flip_p, verdicts
from support.tasks import Batch, rng

# ---- the rows


@pytest.mark.parametrize("name", rows.EXPERIMENTS)
def test_rows_are_whole(name):
    found, arms = rows.read_rows(name), {row["arm"]: row for row in rows.read_table("arms")}
    keys = [(row["arm"], row["start"], row["again"]) for row in found]
    assert len(set(keys)) == len(keys) and {arm for arm, _, _ in keys} <= arms.keys()
    assert all(set(row.get("controls", "").split()) <= arms.keys() for row in arms.values())
    for row in found:
        assert len(str(row["date"])) == 25 and row["torch"] and row["cpu_seconds"] > 0
        assert any(figure in row for figure in ("perplexity", "accuracy"))
        numbers = [v for k, v in row.items() if isinstance(v, float) and not k.startswith("--")]
        assert len(numbers) > 5 and all(map(math.isfinite, numbers))


def test_the_tables_are_those_of_the_rows():
    found = {name: rows.read_rows(name) for name in rows.EXPERIMENTS}
    assert (rows.FOLDER / "tables.md").read_text() == rows.tables(found, rows.read_table("arms"))


def test_planned_verdicts():
    found = verdicts({name: rows.read_rows(name) for name in rows.EXPERIMENTS})
    undecided = "not decidable here"
    assert [verdict for verdict, _ in found] == ["opposite", undecided, undecided, undecided, "opposite"]


def test_means_and_differences_of_the_rows_by_hand():
    found = confirmatory(rows.read_rows("erl-text"))
    mean = {arm: statistics.fmean(rows.by_start(found, arm, "mrr").values()) for arm in ("lm", "erl", "erl-constant")}
    assert mean == pytest.approx({"lm": 0.069, "erl": 0.585, "erl-constant": 0.976}, abs=1e-3)
    found = [row for row in found if not row["again"]]
    own = {row["start"]: math.log(row["perplexity"]) for row in found if row["arm"] == "erl"}
    base = {row["start"]: math.log(row["perplexity"]) for row in found if row["arm"] == "lm"}
    assert differences(found, "erl", "lm", "perplexity") == [own[s] - base[s] for s in range(100, 110)]


def test_a_row_is_added_and_the_others_stay(tmp_path, monkeypatch):
    shutil.copy(rows.FOLDER / "erl-still.csv", tmp_path)
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    before = rows.read_rows("erl-still")
    row = {"arm": "lm", "start": 7, "again": 0, "perplexity": 1 / 3, "--draw": "router", "--wpl": False, "new": 2}
    rows.add_row("erl-still", row)
    *others, added = rows.read_rows("erl-still")
    assert others == before and added == row | {"perplexity": 0.33333333}


# ---- statistics


def test_an_interval_by_hand():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and high - mean == pytest.approx(mean - low) == pytest.approx(3.1824 * (5 / 12) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_sign_flips_are_counted(n):
    draw = random.Random(n)
    values = [draw.gauss(0.4, 1) for _ in range(n)]
    flipped = [abs(sum(s * v for s, v in zip(f, values, strict=True))) for f in itertools.product((1, -1), repeat=n)]
    expected = sum(x >= abs(sum(values)) - 1e-12 for x in flipped) / 2**n
    assert sign_flip_p(values) == pytest.approx(expected, abs=1e-12)


def test_holm_counts_the_tests_that_could_not_run():
    assert holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, 0.04, 0.03], 5) == pytest.approx([0.05, 0.12, 0.12])
    assert holm([0.5, 0.9], 5) == [1.0, 1.0]


def synthetic(truth: dict, spread=0.1, starts=range(100, 112)) -> tuple[dict, list]:
    """Rows in which every planned contrast has truth times four margins, in the paper's direction, and paired noise."""
    draw, found, contrasts = random.Random(0), {"erl-text": [], "answers": []}, []
    for i, c in enumerate(PLANNED):
        contrasts.append(c._replace(arm=f"{i}:{c.arm}", control=f"{i}:{c.control}"))
        for start in starts:
            base, shift = 0.3 + draw.random(), 4 * c.margin * c.sign * (truth.get(i, 0) + spread * draw.gauss(0, 1))
            value = base * math.exp(shift) if c.figure.endswith("perplexity") else base + shift
            for arm, x in ((contrasts[-1].control, base), (contrasts[-1].arm, value)):
                found[c.experiment].append({"arm": arm, "start": start, "again": 0, c.figure: x})
    return found, contrasts


def test_verdicts_find_what_is_there():
    found = [verdict for verdict, _ in verdicts(*synthetic({0: 1, 1: -1, 2: 1}))]
    assert found == ["same direction", "opposite", "same direction", "no difference", "no difference"]
    noisy = [verdict for verdict, _ in verdicts(*synthetic({}, spread=1))]
    assert noisy == ["not decidable here"] * 5


def test_only_pairs_of_ten_confirmatory_starts_count():
    found, contrasts = synthetic({0: 1}, starts=range(95, 109))  # five for tuning, nine that count
    assert verdicts(found, contrasts)[0] == ("not decidable here", "9 of at least 10 starts ran")
    found, contrasts = synthetic({0: 1})
    found["erl-text"] = [row for row in found["erl-text"] if row["arm"][0] != "0" or row["start"] > 102]
    assert verdicts(found, contrasts)[0] == ("not decidable here", "9 of at least 10 starts ran")
    again = [row | {"again": 1, "start": 100} for row in found["erl-text"]]
    assert len(differences(found["erl-text"] + again, contrasts[0].arm, contrasts[0].control, contrasts[0].figure)) == 9


# ---- the runs


@pytest.mark.parametrize("name", mechanism.EXPERIMENTS)
def test_every_arm_is_a_command_line_that_the_program_understands(name):
    start, then, arms, *_ = mechanism.EXPERIMENTS[name]
    for flags in (start, *(f"{then} {flags}" for flags, _ in arms.values())):
        train.check_options(train.parse(f"{flags} --seed 1".split()))
    assert {row["arm"] for row in rows.read_table("arms")} >= set(arms) - {"erl-weighted-random"}


def small_model(**size) -> GPT:
    c = MoEConfig(vocab_size=257, context=32, n_layer=2, n_head=2, n_embd=16, n_expert=8, **size)
    return GPT(c, rng("small"))


def test_mean_log_p_is_what_a_constant_advantage_is_on_average():
    model, args = small_model(), train.parse(["--algo", "lm"])
    every = torch.ones(2, 32, dtype=torch.bool)
    batch = Batch(torch.randint(257, (2, 33), generator=rng("tokens")), every, every)
    ((plain, _),) = train.lm_losses(model, batch, args, 0, False)
    ((more, _),) = mechanism.mean_log_p_losses(model, batch, args, 0, False)
    P = model(batch.tokens[:, :-1])[1].logits.double().softmax(-1)
    drawn = sum(0.5 * -(-0.13 * P[..., e].log()).mean() for e in range(8)) / 8  # delta -A log P, A = -0.13
    assert (more - plain).item() == pytest.approx(drawn.item(), rel=1e-3) != 0


def test_rows_and_windows_take_turns_in_eight_alphabets():
    args = train.parse("--algo lm --dataset pydocs --batch-size 4".split())
    plain, task = (load(args, 256, False) for load in (mechanism.load_task, mechanism.task_in_alphabets))
    table = {}  # (alphabet, byte) -> letter: from the batches, and then as it must be in the windows
    for step in range(6):
        for row, (ours, theirs) in enumerate(zip(plain.batch(step).tokens, task.batch(step).tokens, strict=True)):
            for byte, letter in zip(ours.tolist(), theirs.tolist(), strict=True):
                assert table.setdefault(((4 * step + row) % 8, byte), letter) == letter
    assert all(letter == byte for (alphabet, byte), letter in table.items() if alphabet == 0)
    assert all(len({x for (a, _), x in table.items() if a == n}) == sum(a == n for a, _ in table) for n in range(8))
    assert sum(letter == byte for (alphabet, byte), letter in table.items() if alphabet) < len(table) / 20
    for name, text in plain.held_out.items():
        written = task.held_out[name].tokens
        for i, (byte, letter) in enumerate(zip(text.tokens[:8192].tolist(), written[:8192].tolist(), strict=True)):
            assert table.setdefault((i // 256 % 8, byte), letter) == letter


def test_the_right_expert_is_the_one_of_the_windows_alphabet():
    model, T = small_model(), 32
    windows = [(torch.randint(257, (T + 1,), generator=rng("window", i)), None) for i in range(16)]
    with torch.no_grad():
        experts = [model(tokens[None, :-1])[1].experts.flatten() for tokens, _ in windows]
    share = sum((e == i % 8).float().mean().item() for i, e in enumerate(experts)) / len(windows)
    found = mechanism.right_experts(model, windows)
    assert found["right_expert"] == pytest.approx(share) and 0 < share < 0.5
    assert 200 < found["right_route_perplexity"] < 300  # it knows nothing
    shape = SimpleNamespace(moe_blocks=[1], top_k=1)
    assert mechanism.routes_by_row(torch.tensor([3, 5]), 4, shape).experts.unique().tolist() == [3, 5]


def test_a_start_and_an_arm_run_and_leave_their_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", dict(n_layer=2, n_head=2, n_embd=16, context=64))
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    monkeypatch.setattr(mechanism, "WINDOWS", 2)
    start, then, *rest = mechanism.EXPERIMENTS["erl-still"]
    short = "--steps 2 --checkpoint-every 1 --eval-samples 1 --test-samples 1"
    monkeypatch.setitem(mechanism.EXPERIMENTS, "erl-still", (f"{start} {short}", f"{then} {short}", *rest))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time there is nothing left to do
        mechanism.main("erl-still --starts 3 --arms erl-router-random lm".split())
    begun, credited, moe = rows.read_rows("erl-still")
    assert (begun["arm"], credited["arm"], moe["arm"]) == ("start", "erl-router-random", "lm")
    wanted = "perplexity best_perplexity mrr router_entropy load_max original_score right_expert"
    assert {*wanted.split(), "best_of_99_score", "perplexity_at_1", "right_route_perplexity"} <= credited.keys()
    assert credited["windows"] == 2 and credited["--algo"] == "erl" and credited["start"] == credited["--seed"] == 3
    assert (tmp_path / "runs/results/erl-still/3/start/summary.json").exists()  # the start's model stays
    assert not (tmp_path / "runs/results/erl-still/3/lm").exists()


def test_e3s_report_is_that_of_its_rows():
    assert (moving_routes.FOLDER / "e3.md").read_text() == moving_routes.report(moving_routes.read_rows("e3"))


def test_one_gamma_for_all_tokens_is_the_mean_of_the_update():
    new, old, router = (
        torch.randn(2, 3, *more, generator=rng(0, i)).double() for i, more in enumerate(((), (), (2, 1)))
    )
    A, mask, old_router = torch.tensor([1.0, -1.0]).double(), torch.tensor([[True, True, False]] * 2), router - 0.1
    loss, _ = moving_routes.yoked_loss(new, old, A, mask, router, old_router)  # the same shift everywhere: RAIS itself
    torch.testing.assert_close(loss, rais_loss(new, old, A, mask, router, old_router)[0])
    old_router[0, 0] += 0.1  # one of the four tokens has gamma 1
    loss, _ = moving_routes.yoked_loss(new, old, A, mask, router, old_router)
    mean = (3 * math.exp(-0.1) + 1) / 4
    torch.testing.assert_close(loss, gmpo_loss(new, old - math.log(mean), A, mask)[0])


def test_e3_pairs_starts_at_both_rates_and_counts_collapses_of_one_alone():
    def row(start, arm, rate, area, collapsed=False):
        return {"start": start, "arm": arm, "rate": rate, "area": area, "collapsed": collapsed}

    rows = [
        row(s, arm, x, s + x * (arm == "rais")) for s in (0, 1, 2) for arm in ("rais", "gmpo") for x in (1e-4, 2e-4)
    ]
    rows[4]["collapsed"] = True  # start 1, rais
    assert moving_routes.differences(rows, "rais", "gmpo") == pytest.approx([1.5e-4] * 2)  # start 0 is for tuning
    assert moving_routes.differences(rows[:-1], "rais", "gmpo") == pytest.approx([1.5e-4])
    assert moving_routes.mcnemar(rows, "rais", "gmpo") == "1 against 0, p 1.00"
