"""support/which_tokens.py: the colours and counts are those of the experts."""

import re
import warnings

import matplotlib.image
import pytest
import torch

from support.which_tokens import WIDTH, colour, columns, frequent_tokens, tokens_by_expert, visible

WORDS = ["The", " cat", " sat", " on", " the", " mat", "\n", " cat"]
EXPERTS = torch.tensor([[0, 2], [1, 2], [0, 2], [2, 2], [0, 2], [1, 2], [2, 2], [1, 0]])


def pieces(text, num_experts):
    """(text, expert) of every coloured piece."""
    by_colour = {";".join(str(round(255 * x)) for x in colour(e, num_experts)): e for e in range(num_experts)}
    return [(t, by_colour[c]) for c, t in re.findall(r"\x1b\[30;48;2;([\d;]+)m(.*?)\x1b\[0m", text)]


def test_each_token_has_its_experts_colour_in_every_layer():
    first, second = tokens_by_expert(WORDS, EXPERTS, 3).split("layer 1")
    text = [w.replace("\n", "↵") for w in WORDS]
    legend = [(f" {e:3} ", e) for e in range(3)]
    assert pieces(first, 3) == [*zip(text, EXPERTS[:, 0].tolist(), strict=True), *legend]
    assert pieces(second, 3) == [*zip(text, EXPERTS[:, 1].tolist(), strict=True), *legend]
    assert "\n\nlayer 0\n" in first and " cat 2/2" not in second and " cat 1/2" in second


def test_counts_are_of_all_tokens_and_all_experts_of_a_token():
    found = frequent_tokens(["a", "b", "a", "a"], [[0, 1], [1, 0], [0, 2], [2, 1]], 4, most=2)
    assert found == [
        (0, 3 / 8, [("a", 2, 3), ("b", 1, 1)]),
        (1, 3 / 8, [("a", 2, 3), ("b", 1, 1)]),
        (2, 2 / 8, [("a", 2, 3)]),
        (3, 0.0, []),
    ]
    text = tokens_by_expert(WORDS, EXPERTS, 3, layers=[0], shown=2)
    assert "layer 1" not in text and [t for t, _ in pieces(text, 3)[:-3]] == ["The", " cat"]
    assert " cat 2/2" in text


def test_lines_are_no_wider_than_the_page_and_nothing_is_lost():
    words = [f" w{i}" for i in range(90)] + ["  " * 100, " 漢字", "$x_1$"]
    experts = torch.arange(len(words))[:, None] % 5
    text = tokens_by_expert(words, experts, 5, shown=len(words))
    plain = re.sub(r"\x1b\[[\d;]*m", "", text).split("\n")
    assert max(map(columns, plain)) <= WIDTH
    assert [t for t, _ in pieces(text, 5)[:-5]] == [visible(w) for w in words]


def test_a_gap_follows_the_end_of_a_text():
    text = tokens_by_expert(WORDS, EXPERTS, 3, layers=[0], ends={1, 6})
    gaps = re.sub(r"\x1b\[30;48[^m]*m(.*?)\x1b\[0m", r"<\1>", text).split("\n")[4]
    assert gaps == "<The>< cat> < sat>< on>< the>< mat><↵> < cat>"
    words = ["x" * 50] * 4  # where a line is full, its end is gap enough
    text = tokens_by_expert(words, torch.zeros(4, 1, dtype=torch.long), 1, ends={1})
    assert re.sub(r"\x1b\[[\d;]*m", "", text).split("\n")[4:6] == ["x" * 100] * 2


def test_the_picture_has_as_much_of_a_colour_as_its_expert_has_letters(tmp_path):
    words = ["    "] * 60  # no ink, only the background
    experts = torch.tensor([[0]] * 30 + [[1]] * 20 + [[2]] * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens_by_expert([*words, " 漢$_^\x00\n"], torch.cat([experts, torch.tensor([[3]])]), 4, tmp_path / "a.png")
    image = torch.tensor(matplotlib.image.imread(tmp_path / "a.png")[..., :3])
    area = [((image - torch.tensor(colour(e, 4))).abs().amax(-1) < 0.01).sum().item() for e in range(4)]
    legend = area[2] / (10 * 4 + 5)  # a cell; every expert has five more cells in the legend
    assert area[0] / legend == pytest.approx(30 * 4 + 5, rel=0.05)
    assert area[1] / legend == pytest.approx(20 * 4 + 5, rel=0.05)
    assert 0 < area[3] < area[2]


def test_colours_are_apart():
    for E in (2, 8, 64):
        colours = torch.tensor([colour(e, E) for e in range(E)])
        assert colours.unique(dim=0).shape[0] == E and colours.min() > 0.3


def test_experts_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"\[8, L\]"):
        tokens_by_expert(WORDS, EXPERTS[:-1], 3)
