"""results/: the rows, statistics whose truth is known, and the runs that stay on small models."""

import itertools
import math
import shutil
import statistics

import pytest
import torch

from baselines import gmpo_loss
from rais import rais_loss
from results import moving_routes, rows
from results.rows import confirmatory, differences, holm, interval, sign_flip_p
from support.tasks import rng

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


def test_an_interval_and_a_sign_flip_test_by_hand():
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0]) == 2 / 2**4
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and high - mean == pytest.approx(mean - low) == pytest.approx(3.1824 * (5 / 12) ** 0.5, rel=1e-4)


def test_holm_counts_the_tests_that_could_not_run():
    assert holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, 0.04, 0.03], 5) == pytest.approx([0.05, 0.12, 0.12])
    assert holm([0.5, 0.9], 5) == [1.0, 1.0]


# ---- E3


def test_e3s_report_is_that_of_its_rows():
    assert (moving_routes.FOLDER / "e3.md").read_text() == moving_routes.report(moving_routes.read_rows("e3"))


def test_one_gamma_for_all_tokens_is_the_mean_of_the_update():
    shapes = (2, 3), (2, 3), (2, 3, 2, 1)
    new, old, router = (torch.randn(shape, generator=rng(0, i)).double() for i, shape in enumerate(shapes))
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

    runs = itertools.product((0, 1, 2), ("rais", "gmpo"), (1e-4, 2e-4))
    rows = [row(s, arm, x, s + x * (arm == "rais")) for s, arm, x in runs]
    rows[4]["collapsed"] = True  # start 1, rais
    assert moving_routes.differences(rows, "rais", "gmpo") == pytest.approx([1.5e-4] * 2)  # start 0 is for tuning
    assert moving_routes.differences(rows[:-1], "rais", "gmpo") == pytest.approx([1.5e-4])
    assert moving_routes.mcnemar(rows, "rais", "gmpo") == "1 against 0, p 1.00"
