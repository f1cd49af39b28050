"""support/pictures.py: the right points in the right panels, words and units on every axis, several runs in a plot."""

import json
import math
import random
import warnings

import pytest
from matplotlib.image import imread

from support import pictures
from support.errors import UserError


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


def answer_rows(algo="grpo"):
    for step in range(10, 21, 10):
        yield {"step": step, "phase": "supervised", "loss": 2.0, "load_max": 0.3}
    for step in range(21, 41):
        yield {"step": step, "phase": algo, "loss": -0.5, "reward_mean": 0.1, "accuracy": 0.7, "clip_share": 0.0}
        yield {"step": step, "phase": "evaluation", "split": "validation", "accuracy": 0.2}


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, in order."""
    kept, save = [], pictures.save

    def spy(figure, path):
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(pictures, "save", spy)
    return kept


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes}


def test_a_text_run(tmp_path, figures):
    rows = list(text_rows())
    pictures.plot_curves(make_run(tmp_path / "run"))
    found = panels(figures[0])
    assert set(found) == {"Training loss", "Validation perplexity", "Busiest expert"}
    training = [r["loss"] for r in rows if r["phase"] != "evaluation"]  # that of evaluations is another split's
    assert found["Training loss"].lines[0].get_ydata().tolist() == training
    shown = found["Validation perplexity"].lines[0]
    assert shown.get_xdata().tolist() == [10, 20, 30, 40]
    assert shown.get_ydata().tolist() == [r["perplexity"] for r in rows if r.get("split") == "validation"]
    for axis in found.values():
        assert axis.get_xlabel() == "step" and axis.get_ylabel()
        assert [20, 20] in [list(line.get_xdata()) for line in axis.lines]  # where ERL begins
    assert [t.get_text().strip() for t in found["Training loss"].texts] == ["ERL begins"]
    even = [list(line.get_ydata()) for line in found["Busiest expert"].lines]
    assert [1 / 8, 1 / 8] in even


def test_a_run_on_answers(tmp_path, figures):
    pictures.plot_curves(make_run(tmp_path / "run", "grpo", dataset="addition", rows=list(answer_rows())))
    found = panels(figures[0])
    # no panel of clip shares that are all 0; the policy loss is none of next-token prediction
    assert set(found) == {"Training loss", "Validation accuracy", "Reward", "Busiest expert"}
    assert found["Training loss"].lines[0].get_xdata().tolist() == [10, 20]
    assert set(found["Validation accuracy"].lines[0].get_ydata()) == {0.2}  # not the batches' 0.7
    size = imread(tmp_path / "run" / "curves.png").shape
    assert size[1] == 1200 and 400 < size[0] < 2000


def test_perplexities_that_fall_far_are_on_a_log_scale_with_plain_numbers(tmp_path, figures):
    rows = [
        {"step": s, "phase": "evaluation", "split": "validation", "perplexity": p}
        for s, p in ((0, 250.0), (10, 40.0), (20, 12.0))
    ]
    pictures.plot_curves(make_run(tmp_path / "run", "dense", rows=rows, pretrain_steps=0))
    axis = panels(figures[0])["Validation perplexity"]
    assert axis.get_yscale() == "log" and "log scale" in axis.get_ylabel()
    labels = [t.get_text() for t in axis.get_yticklabels()]
    assert {"20", "50", "100", "200"} <= set(labels) and not any("$" in t for t in labels)
    assert not [line for line in axis.lines if list(line.get_xdata()) == [0, 0]]  # no beginning to mark


def test_a_run_without_a_point_is_drawn_too(tmp_path):
    rows = [{"step": 1, "phase": "erl"}]
    pictures.plot_curves(make_run(tmp_path / "run", rows=rows))
    assert (tmp_path / "run" / "curves.png").is_file()


def test_the_name_of_a_run_is_no_formula(tmp_path, figures):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.plot_curves(make_run(tmp_path / "lr$_$wd 漢 $x^{"))
    title = figures[0]._suptitle
    assert title._preprocess_math(title.get_text()) == ("lr$_$wd 漢 $x^{: erl on pydocs", False)


def test_many_steps_become_few_points_without_a_shift():
    run = {step: float(step) for step in range(1000, 4000)}
    steps, mean, low, high = pictures.mean_and_range([run, {s: v + 2 for s, v in run.items()}])
    assert len(steps) == pictures.POINTS
    for step, m, lowest, highest in zip(steps, mean, low, high, strict=True):
        assert (m, lowest, highest) == pytest.approx((step + 1, step, step + 2))
    assert sum(steps) / len(steps) == pytest.approx(2499.5)
    uneven = dict.fromkeys([*range(0, 100, 10), *range(100, 200)], 1.0)  # the sparse part keeps its points
    steps = pictures.mean_and_range([uneven])[0]
    assert [s for s in steps if s < 95] == list(range(0, 100, 10))


def test_several_runs_are_a_line_and_a_band_an_algorithm(tmp_path, figures, capsys):
    folders = [make_run(tmp_path / f"{a}{s}", a, s) for a in ("erl", "lm") for s in range(3)]
    assert pictures.main([*folders, "--out", str(tmp_path / "all.png")]) == 0
    assert "erl, 3 seeds; lm, 3 seeds" in capsys.readouterr().out
    axis = panels(figures[0])["Validation perplexity"]
    for line, band, algo in zip(axis.lines, axis.collections, ("erl", "lm"), strict=False):
        runs = [[r["perplexity"] for r in text_rows(algo, s) if r.get("split") == "validation"] for s in range(3)]
        columns = list(zip(*runs, strict=True))
        assert line.get_ydata().tolist() == pytest.approx([sum(c) / 3 for c in columns])
        assert line.get_label() == f"{algo}, 3 seeds"
        corners = band.get_paths()[0].vertices
        for step, column in zip((10, 20, 30, 40), columns, strict=True):
            at_step = [y for x, y in corners if x == step]
            assert (min(at_step), max(at_step)) == pytest.approx((min(column), max(column)))
    assert imread(tmp_path / "all.png").shape[1] == 1200
    assert "band from the lowest to the highest" in figures[0].get_suptitle()
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == ["erl, 3 seeds", "lm, 3 seeds"]


def test_runs_of_one_algorithm_are_told_apart_by_what_differs(tmp_path):
    folders = [make_run(tmp_path / f"{g}{s}", seed=s, erl_grad=g) for g in ("all", "router") for s in range(2)]
    folders.append(make_run(tmp_path / "lm", "lm", erl_grad="all"))
    groups, dataset = pictures.group_runs(folders)
    assert list(groups) == ["erl --erl-grad all, 2 seeds", "erl --erl-grad router, 2 seeds", "lm"]
    assert dataset == "pydocs" and sorted(map(len, groups.values())) == [1, 2, 2]
    assert all(math.isclose(run.config["lr"], 1e-3) for runs in groups.values() for run in runs)


def test_a_run_that_stopped_early_shortens_the_mean_instead_of_bending_it():
    steps, mean, _, _ = pictures.mean_and_range([{1: 1.0, 2: 2.0, 3: 3.0}, {1: 3.0, 2: 4.0}])
    assert (steps, mean) == ([1, 2], [2.0, 3.0])


def test_mistakes_are_one_sentence(tmp_path, capsys):
    erl, other = make_run(tmp_path / "erl"), make_run(tmp_path / "other", dataset="addition")
    twin = make_run(tmp_path / "twin")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    picture = str(tmp_path / "x.png")
    for argv, says in (
        ([erl, other, "--out", picture], "other ran on addition"),
        ([erl, twin, "--out", picture], "same settings with the same seed"),
        ([str(tmp_path / "nothing"), "--out", picture], "holds no run"),
        ([str(tmp_path / "bare"), "--out", picture], "metrics.jsonl: No such file"),
        ([erl, "--out", str(tmp_path / "x.pdf")], "is a PNG"),
        ([erl, "--out", str(tmp_path / "no" / "x.png")], "No such file"),
        ([erl], "--out"),
        (["--out", picture], "RUN"),
    ):
        assert pictures.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and says in err and err.startswith("support.pictures: ") and err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(UserError):
        pictures.group_runs([erl, twin])
