"""support/pictures.py: the right points in the right panels."""

import json
import random

import pytest
from matplotlib.image import imread

from support import pictures


def make_run(folder, algo="erl", seed=0, dataset="pydocs", rows=None, **config):
    folder.mkdir(parents=True)
    config = {"algo": algo, "seed": seed, "dataset": dataset, "pretrain_steps": 20, "n_expert": 8, "lr": 1e-3} | config
    (folder / "config.json").write_text(json.dumps(config | {"out": str(folder)}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or text_rows(algo, seed)))
    return str(folder)


def text_rows(algo="erl", seed=0):
    draw = random.Random(f"{algo}{seed}").random
    for step in range(10, 41, 10):
        phase = "supervised" if step <= 20 else algo
        yield {"step": step, "phase": phase, "loss": 3 + draw(), "load_max": 0.4 * draw(), "accuracy": 1.0}
        yield {"step": step, "phase": "evaluation", "split": "validation", "perplexity": 20 + draw(), "loss": 99.0}
    yield {"step": 40, "phase": "evaluation", "split": "test", "perplexity": 555.0}


@pytest.fixture
def panels(monkeypatch):
    """The axes of the last figure that was saved, by their titles."""
    kept, save = {}, pictures.save

    def spy(figure, path):
        kept.clear()
        kept.update({axis.get_title(): axis for axis in figure.axes})
        save(figure, path)

    monkeypatch.setattr(pictures, "save", spy)
    return kept


def test_a_text_run(tmp_path, panels):
    rows = list(text_rows())
    pictures.plot_curves(make_run(tmp_path / "lr$_$wd $x^{"))  # a name is no formula
    assert set(panels) == {"Training loss", "Validation perplexity", "Busiest expert"}
    training = [r["loss"] for r in rows if r["phase"] != "evaluation"]  # that of evaluations is another split's
    assert panels["Training loss"].lines[0].get_ydata().tolist() == training
    shown = panels["Validation perplexity"].lines[0]
    assert shown.get_xdata().tolist() == [10, 20, 30, 40]
    assert shown.get_ydata().tolist() == [r["perplexity"] for r in rows if r.get("split") == "validation"]
    for axis in panels.values():
        assert axis.get_xlabel() == "step" and axis.get_ylabel()
        assert [20, 20] in [list(line.get_xdata()) for line in axis.lines]  # where ERL begins
    assert [1 / 8, 1 / 8] in [list(line.get_ydata()) for line in panels["Busiest expert"].lines]
    assert imread(next(tmp_path.glob("*/curves.png"))).shape[1] == 1200


def test_a_run_on_answers(tmp_path, panels):
    rows = [{"step": s, "phase": "supervised", "loss": 2.0, "load_max": 0.3} for s in (10, 20)]
    rows += [{"step": s, "phase": "grpo", "loss": -0.5, "reward_mean": 0.1, "clip_share": 0.0} for s in range(21, 41)]
    rows += [{"step": 40, "phase": "evaluation", "split": "validation", "accuracy": 0.2}]
    pictures.plot_curves(make_run(tmp_path / "run", "grpo", dataset="addition", rows=rows))
    # no panel of clip shares that are all 0; the policy loss is none of next-token prediction
    assert set(panels) == {"Training loss", "Validation accuracy", "Reward", "Busiest expert"}
    assert panels["Training loss"].lines[0].get_xdata().tolist() == [10, 20]


def test_many_steps_become_few_points_without_a_shift():
    run = {step: float(step) for step in range(1005, 4005)}
    steps, mean, low, high = pictures.mean_and_range([run, {s: v + 2 for s, v in run.items()}])
    assert len(steps) == pictures.POINTS and sum(steps) / len(steps) == pytest.approx(2504.5)
    for step, m, lowest, highest in zip(steps, mean, low, high, strict=True):
        assert (m, lowest, highest) == pytest.approx((step + 1, step, step + 2))
    steps, mean, _, _ = pictures.mean_and_range([{1: 1.0, 2: 2.0, 3: 3.0}, {1: 3.0, 2: 4.0}])
    assert (steps, mean) == ([1, 2], [2.0, 3.0])  # a run that stopped early shortens the mean, it does not bend it


def test_several_runs_are_a_line_and_a_band_an_algorithm(tmp_path, panels, capsys):
    folders = [make_run(tmp_path / f"{a}{s}", a, s) for a in ("erl", "lm") for s in range(3)]
    assert pictures.main(folders) == 0  # into the first run's folder
    assert "comparison.png: erl, 3 seeds; lm, 3 seeds" in capsys.readouterr().out
    assert (tmp_path / "erl0" / "comparison.png").is_file()
    axis = panels["Validation perplexity"]
    for line, band, algo in zip(axis.lines, axis.collections, ("erl", "lm"), strict=False):
        runs = [[r["perplexity"] for r in text_rows(algo, s) if r.get("split") == "validation"] for s in range(3)]
        for i, column in enumerate(zip(*runs, strict=True)):
            assert line.get_ydata()[i] == pytest.approx(sum(column) / 3)
            at_step = [y for x, y in band.get_paths()[0].vertices if x == 10 * (i + 1)]
            assert (min(at_step), max(at_step)) == pytest.approx((min(column), max(column)))


def test_runs_of_one_algorithm_are_told_apart_by_what_differs(tmp_path):
    folders = [make_run(tmp_path / f"{g}{s}", seed=s, erl_grad=g) for g in ("all", "router") for s in range(2)]
    folders.append(make_run(tmp_path / "lm", "lm", erl_grad="all"))
    groups, _ = pictures.group_runs(folders)
    assert list(groups) == ["erl --erl-grad all, 2 seeds", "erl --erl-grad router, 2 seeds", "lm"]
    twin, other = make_run(tmp_path / "twin", erl_grad="all"), make_run(tmp_path / "other", dataset="addition")
    for second in (twin, other):  # the same seed twice, two data sets
        assert pictures.main([folders[0], second]) == 2
