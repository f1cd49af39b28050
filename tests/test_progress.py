"""support/progress.py: without a terminal a line now and then, and how long it still takes."""

import pytest

from support import progress
from support.progress import Progress, duration


def test_the_first_step_does_not_count_in_what_is_left(monkeypatch, capsys):
    """It waits for kernels, memory and, before it, an evaluation: five steps of 2 s after one of 100 s leave 8 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    bar = Progress(total=10, desc="training", disable=True)
    for seconds in (100, 2, 2, 2, 2, 2):
        now[0] += seconds
        bar.update()
    assert capsys.readouterr().err == "training: 2 of 10, about 16 s left\n"  # then none for half a minute
    now[0] += 26
    bar.update()
    assert capsys.readouterr().err == "training: 7 of 10, about 18 s left\n"  # 36 s for six steps


def test_a_resumed_run_counts_its_own_steps_alone(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    bar = Progress(total=100, initial=90, desc="training", disable=True)
    for _ in range(2):
        now[0] += 4
        bar.update()
    assert capsys.readouterr().err == "training: 92 of 100, about 32 s left\n"


@pytest.mark.parametrize(("seconds", "words"), [(7.4, "7 s"), (99, "99 s"), (125, "2 min"), (3900, "1:05 h")])
def test_duration(seconds, words):
    assert duration(seconds) == words
