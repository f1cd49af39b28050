"""support/grading.py and support/mathematics.py: what responses earn, and what they must not."""

import itertools
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

import data
from data import Example
from support import grading

ROOT = Path(__file__).parents[1]
REAL = ROOT / ".." / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data (the real data sets) is not there")
quick = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("3*5+7", 1),
        (" 7+5*3 ", 1),
        ("(5*3)+7", 1),
        ("7--5*3", 0),
        ("22", 0),
        ("3*5+7+0", 0),
        ("3*5", 0),
        ("7*3+1", 0),
        ("", 0),
        ("3*5+7)", 0),
        ("3*5+7=22", 0),
        ("3**5+7", 0),
        ("5//3+7", 0),
        ("__import__('os')", 0),
        ("3*5+7\x00", 0),
        ("(" * 60, 0),
        ("5/(3-3)+7", 0),
        ("3*5+07", 0),
        ("3" * 65, 0),
        ("3 5 7", 0),
        ("3,5,7", 0),
        ("٣*5+7", 0),
    ],
)
def test_countdown_evaluates_safely(response, right):
    example = Example("3 5 7=22:", "3*5+7", ("22",), (3, 5, 7))
    assert grading.measure_countdown(response, example) == {"accuracy": right}


def test_countdown_divides_exactly():
    assert grading.measure_countdown("6/4*2", Example("", "", ("3",), (2, 4, 6)))["accuracy"] == 1
    assert grading.measure_countdown("1/3*3", Example("", "", ("1",), (1, 3, 3)))["accuracy"] == 1


@quick
@given(st.text(alphabet="0123456789+-*/() ", max_size=70))
def test_countdown_never_crashes(response):
    assert grading.measure_countdown(response, Example("", "", ("22",), (3, 5, 7)))["accuracy"] in (0.0, 1.0)


# ------------------------------------------------------------------------------------------------- rewards, metrics


def f1_by_the_book(response, reference):
    """precision and recall of the words, each word matched at most as often as it stands in the other"""
    left, common = list(reference), 0
    for word in response:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(response), common / len(reference)
    return 2 * precision * recall / (precision + recall)


words = st.lists(st.sampled_from("red green blue cat dog".split()), max_size=8)


@quick
@given(words, st.lists(words, min_size=1, max_size=3))
def test_f1_is_the_books_and_the_best_reference_counts(response, references):
    example = Example("p", "a", tuple(" ".join(r) for r in references))
    best = max(f1_by_the_book(response, r) for r in references)
    assert grading.measure_unigrams(" ".join(response), example)["unigram_f1"] == pytest.approx(best)
    squad = grading.measure_squad(" ".join(response), example)
    assert squad["f1"] == pytest.approx(best)
    assert squad["exact_match"] == float(any(response == r for r in references))


@pytest.mark.parametrize(
    ("response", "references", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("denver  broncos", ["Carolina Panthers", "the Denver Broncos."], 1, 1),
        ("a U.S. theater", ["US theater"], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),
        ("Anthem", ["An them"], 0, 0),  # an article is a word of its own
        ("", ["Denver"], 0, 0),
    ],
)
def test_squad_normalises_as_the_official_script(response, references, exact, f1):
    got = grading.measure_squad(response, Example("p", "a", tuple(references)))
    assert got == {"exact_match": exact, "f1": pytest.approx(f1)}


def rouge_n_by_the_book(response, reference, n):
    grams = [Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (response, reference)]
    common = sum(min(count, grams[1][gram]) for gram, count in grams[0].items())
    return 2 * common / (sum(grams[0].values()) + sum(grams[1].values())) if common else 0.0


def rouge_l_by_the_book(response, reference):
    table = np.zeros((len(response) + 1, len(reference) + 1))
    for i, a in enumerate(response):
        for j, b in enumerate(reference):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    return 2 * table[-1, -1] / (len(response) + len(reference)) if table[-1, -1] else 0.0


@quick
@given(words, words.filter(bool))
def test_rouge_is_the_books(response, reference):
    got = grading.measure_summary(" ".join(response), Example("p", "a", (" ".join(reference),)))
    assert got["rouge1"] == pytest.approx(rouge_n_by_the_book(response, reference, 1))
    assert got["rouge2"] == pytest.approx(rouge_n_by_the_book(response, reference, 2))
    assert got["rougeL"] == pytest.approx(rouge_l_by_the_book(response, reference))


def test_rouge_of_a_known_example():
    # 6 and 5 words, "the cat on the mat" in common; 2 of 5 and 4 pairs: on-the, the-mat; stemming: "cats" is "cat"
    got = grading.measure_summary("The cats sat on the mat.", Example("p", "a", ("the cat on the mat",)))
    assert got["rouge1"] == pytest.approx(2 * 5 / 11)
    assert got["rouge2"] == pytest.approx(2 * 3 / 9)  # the-cat, on-the, the-mat
    assert got["rougeL"] == pytest.approx(2 * 5 / 11)


# ----------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("025", "25", True),
        ("25", "025", True),
        ("025", "250", False),
        (r"336^\circ", "336", True),
        ("41.8", r"41.8^{\circ}", True),
        ("$166$", "166", True),
        ("$69$,$84$", "69, 84", True),
        ("3,5,7", "7, 3, 5", True),
        ("3,5,7", "3,5", False),
        ("3,5", "3,5,7", False),
        ("$69$,$84$", "84,69", True),
        ("16,3,1,1", "16,3,1", False),  # in any order, but all of them
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(2,1)", False),
        ("(3,2),(-3,2)", "(-3,2),(3,2)", True),
        ("8.7e8", r"8.7 \times 10^{8}", True),
        ("8.7e8", "870000000", True),
        ("8.7e8", "8.8e8", False),
        ("5.3e-9", "1e-9", False),
        ("5.3e-9", r"5.3\cdot 10^{-9}", True),  # both round to 0 at six decimals
        ("np.arcsin(10/13)", r"\arcsin{\frac{10}{13}}", True),
        ("np.arcsin(10/13)", r"\arcsin(10/14)", False),
        ("-1./3", r"-\frac{1}{3}", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"80\%", "80", True),
        ("1,234", "1234", True),
        ("18", r"\$18.00", True),
        (r"\text{even}", "even", True),
        ("x=5", "5", True),
        ("p - q", "-q+p", True),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19},1-\sqrt{19}", True),
        ("2", "", False),
        ("2", "two", False),
        ("2", "2+", False),
        ("7", "7 apples", True),
        ("7", "seven", False),
        ("7", "7 " + "indeed " * 9, False),
    ],
)
def test_same_math(reference, answer, equal):
    assert grading.same_math(reference, answer) is equal


def test_final_answer():
    assert grading.final_answer(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert grading.final_answer("2+2 = 4\n#### 4\nQuestion: and now?") == "4"
    assert grading.final_answer("I have 3\nso it is 7, of 1,024.") == "1,024"
    assert grading.final_answer("it is 3/4") == "3/4" and grading.final_answer("x^2 + 1") == "x^2 + 1"
    assert grading.final_answer("it is \\frac{1}{2}") == "it is \\frac{1}{2}"
    assert grading.final_answer(r"\boxed{1") == r"\boxed{1"
    assert grading.final_answer("") == ""


@pytest.mark.parametrize(
    "response",
    [
        "",
        "####",
        "####\n",
        "#" * 99,
        "\x00",
        "\ud800",
        "9" * 5000,
        "1.2.3.4",
        r"\boxed{}",
        r"\boxed{\frac{1}{",
        r"\boxed{1/0}",
        r"\boxed{2e9999}",
        r"\boxed{\int}",
        r"\boxed{\begin{pmatrix}1}",
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{" + "(" * 400 + "}",
    ],
)
def test_what_cannot_be_read_earns_nothing(response, caplog):
    assert data.reward(data.get_dataset("math500"), response, Example("p", "a", (r"\frac{1}{2}",))) == 0
    assert not caplog.records  # a rollout of nonsense does not fill the log


@quick
@given(st.text(max_size=30))
def test_math_never_crashes(response):
    assert data.reward(data.get_dataset("gsm8k"), response, Example("p", "a", ("17",))) in (0.0, 1.0)


def test_math_works_outside_the_main_thread():
    results = []
    grading._same_math.cache_clear()
    thread = threading.Thread(target=lambda: results.append(grading.same_math("x+1", "1+x")))
    thread.start()
    thread.join()
    assert results == [True]


@needs_real
@pytest.mark.parametrize("name", ["math500", "aime24", "aime25", "minerva", "olympiad"])
def test_every_real_answer_is_equal_to_itself(name):
    spec = data.get_dataset(name)
    examples = data.load_examples(name, "test", data_dir=REAL)
    assert examples.skipped == 0
    for example in examples:
        for reference in example.references:  # Minerva's variants too
            assert data.reward(spec, f"We get \\boxed{{{reference}}}.", example) == 1, reference


@needs_real
def test_a_real_answer_is_not_its_neighbours():
    spec = data.get_dataset("math500")
    examples = data.load_examples("math500", "test", data_dir=REAL, limit=120)
    for example, other in zip(examples, examples[1:], strict=False):
        if example.references != other.references:
            assert data.reward(spec, other.answer, example) == 0, (example.references, other.references)


# Each with its right value. Those of one kind stand together; the numbers are equal (1) or not (0).
@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        # blanks never join numbers; a mixed number is one
        ("18", "17 1", 0),
        ("108", "10 8", 0),
        ("11/2", "1 1/2", 0),
        ("111", "1 1 1", 0),
        ("5/4", "1 1/4", 1),
        ("-5/4", "-1 1/4", 1),
        (r"137 \frac{1}{2}", "275/2", 1),
        (r"1\frac{4}{5}", "1.8", 1),
        ("5/2", "1 3/2", 0),  # no mixed number
        ("18", "18 18", 0),
        ("18", "18, 18", 0),
        ("18", "18; 18", 0),
        ("-2,-2", "-2", 0),
        ("6", "2 3", 0),
        ("36", "x 36", 0),
        ("1/2", r"0 \frac{1}{2}", 0),
        ("1/2", r"\frac{2}{2} \frac{1}{2}", 0),
        (r"\frac{\dot{x}_{0}}{\omega} \sin (\omega t)", r"\dot{x}_{0} \sin(\omega t) / \omega", 1),
        (r"\dot{x}", "x", 0),
        (r"1950^\circ C", r"1950^\circ   C", 1),
        ("8", "1 (8)", 0),
        ("8", "(1)(8)", 0),
        ("8", r"1 \cdot 8", 1),
        ("-5", "3 -5", 0),
        ("-2", "3 -5", 0),
        ("-2", "3 - 5", 1),
        # separators of thousands that nobody misreads
        ("10080", r"10,\!080", 1),
        (r"11,\! 111,\! 111,\! 100", "11111111100", 1),
        ("1234567", "1{,}234{,}567", 1),
        ("10000", r"10\,000", 1),
        ("1234.5", "1,234.5", 1),
        ("0", "10 000", 0),
        ("1234", "12,34", 0),
        ("1234", "1,2,3,4", 0),
        ("(312,123,231)", "(312, 123, 231)", 1),  # in brackets a comma parts
        ("312123231", "(312,123,231)", 0),
        # what a library lost: bases, parts, derivatives, very small numbers, letters
        ("52_8", "52_9", 0),
        ("52_8", "52_{8}", 1),
        ("52_8", "52", 0),
        ("52_8", "42", 0),
        (r"\frac{1}{3}E_1+\frac{2}{3}E_2", "2/3", 0),
        (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{E_1+2E_2}{3}", 1),
        (r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}", "2", 0),
        (r"\frac{dx}{dt}=kx-a", "kx = a", 0),
        (r"\frac{dx}{dt}=kx-a", r"\frac{x}{t}=kx-a", 0),
        (r"\frac{dx}{dt}=kx-a", r"\frac{d x}{d t} = k x - a", 1),
        (r"\frac{d^{2} v}{d t^{2}}+v=0", r"\frac{v}{t^2}+v=0", 0),
        (r"x^{\prime}+\frac{r}{V} x-r c=0", r"x' + \frac{r}{V}x - rc = 0", 1),
        ("I(0)", "0", 0),  # a value of a function, not I times 0
        ("(1-e^{-t}) u(t)", "(1-e^{-t}) ut", 0),
        ("n(n-1)", "n^2-n", 1),
        ("10^{-20}", "10^{-30}", 0),
        ("10^{-20}", "1e-20", 1),
        ("1/3", "0.333333", 0),
        (r"\sqrt{2}", "1.41421356", 0),
        (r"10^{30}+1", "10^{30}", 0),
        (r"2^{1009}", "2^{1009}+1", 0),
        (r"\pi+10^{30}", r"e+10^{30}", 0),
        (r"3\mathrm{i}", "3", 0),
        ("7.6 Z", "7.6", 0),
        ("2RC", "2", 0),
        ("2", "2RC", 0),
        (r"\angle A=90", "90", 0),
        (r"\int x", "x", 0),
        ("east", "seat", 0),
        ("on", "no", 0),
        (r"\text{east}", "East", 1),
        (r"\text{(C)}", "C", 1),
        (r"\text{(C)}", "B", 0),
        (r"\log_{10} 250", r"\ln 250", 0),
        (r"\log 100", "2", 0),  # of which base?
        (r"\frac{\log 2}{\log 2-\log 3}", r"\frac{\ln 2}{\ln 2-\ln 3}", 1),
        (r"\lfloor\sqrt{n-1}\rfloor", r"\lfloor\sqrt{n}\rfloor", 0),
        (r"\lfloor n/2016 \rfloor", "0", 0),
        (r"2^{\lfloor n/2\rfloor}", r"2^{\lfloor\frac n2\rfloor}", 1),
        (r"\left\lfloor\frac{2 n}{3}\right\rfloor+1", r"1+\lfloor 2n/3 \rfloor", 1),
        ("|x|", "x", 0),
        ("|-3|", "3", 1),
        ("(1,2)", "[1,2]", 0),
        ("(1,2]", "(1,2)", 0),
        (r"(-\infty, 0) \cup\{1\}", r"\{1\} \cup (-\infty,0)", 1),
        (r"(-\infty, 0)", r"(\infty, 0)", 0),
        # equal by value
        ("9", "3^2", 1),
        ("2", r"\sqrt4", 1),
        (r"\frac{\sqrt{21}}{5}", r"\sqrt{21}/5", 1),
        (r"\frac{8}{\sqrt[3]{7}}", r"8 \cdot 7^{-1/3}", 1),
        (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}", 1),
        (r"\frac{100!}{2^{50}}", r"\frac{100!}{2^{51}}", 0),
        (r"(n-2) 2^{n}+1", "2^n(n-2)+1", 1),
        ("1", r"\sin^2 x+\cos^2 x", 1),
        (r"e^{i\pi}", "-1", 1),
        (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}", 1),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", 0),
        ("5x - 7y + 11z + 4 = 0", "7y - 5x - 11z = 4", 1),
        ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z + 5 = 0", 0),
        ("y = 2x + 3", "2x + 3", 1),
        ("f(x)=2 x", "2x", 1),
        ("x=5", "y=5", 0),
        ("x=5", "0=0", 0),
        (r"x \in [-2,7]", "[-2,7]", 1),
        (r"k \geqslant 2", r"2 \le k", 1),
        (r"k \geqslant 2", "k > 2", 0),
        (r"k \geqslant 2", "2", 0),
        (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt5, 1+\sqrt5", 1),
        (r"N=\lfloor 2n/3\rfloor+1", r"\lfloor 2n/3\rfloor+1", 1),
        (r"\boxed{N=197}", "197", 1),
        ("\\[\n\\frac{n(n+1)}{2}\n\\]", "n(n+1)/2", 1),
        # units in words
        ("18", "18 people", 1),
        ("18", "18 years old", 1),
        ("18", "18kg", 1),
        ("18", "18 cups of water", 1),
        ("864", r"864 \mbox{ inches}^2", 1),
        (r"5.4 \text{ cents}", "5.4", 1),
        (r"\frac{270}7\text{ degrees}", "270/7", 1),
        ("18", "18 thousand", 0),
        ("18", r"18 \text{ thousand}", 0),
        ("18", "18k", 0),
        ("18", "18 and a half", 0),
        ("18", "18 squared", 0),
        ("18", "18 pi", 0),
        ("18", "18 x", 0),
        ("18", "18 or 20", 0),
        ("18", "18 is wrong", 0),
        ("18", "minus 18", 0),
    ],
)
def test_mathematics_is_read_whole_or_not_at_all(reference, answer, equal):
    assert grading.same_math(reference, answer) == bool(equal)
    assert grading.same_math(reference, reference)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("The answer is .5", ".5"),
        ("The answer is −5", "-5"),
        ("The answer is -5.", "-5"),
        ("That makes 1.5e3 grams", "1.5e3"),
        ("so 1 / 2", "1/2"),
        ("so 1 1/2 cups", "1 1/2"),
        ("total: 16 - 3 = 13 eggs", "13"),
        ("that is 16-3=13", "13"),
        ("She has $18.50.", "18.50"),
        ("It is **18**", "18"),
        ("It is (18)", "18"),
        ("It is 18%, or so", "18"),
        ("about 5kg", "5"),
        ("of 1,024.", "1,024"),
        *[
            (line, None)
            for line in (
                "so 10 000",
                "so sqrt(2)",
                "so sqrt( 2 )",
                "is 5 + 3 apples",
                "is 7 x 3",
                "is 3-5",
                "is x2",
                "is 2^3",
                "at 10:30",
                "is 1.2.3",
                "is 12,34",
                "is 4/5/2024",
                "is 12 1 1/2",
                "is 5 thousand",
                "is 2 dozen eggs",
                "is 18 and a half",
                "is minus 5",
                "is not 5",
                "is 5 or 7",
                "is 5 \u221a2",
                "is 18th",
                "is \u0663",
                "no number",
            )
        ],
    ],
)
def test_the_last_number_is_whole_or_none(line, number):
    assert grading.last_number(line) == number
    assert grading.final_answer(f"5\n{line}") == (number or line)
    if number is None:  # and what is left is no number either
        assert not any(grading.same_math(str(n), grading.final_answer(line)) for n in (0, 1, 2, 3, 5, 8, 18, 30))


@pytest.mark.parametrize(
    ("response", "earned"),
    [
        (r"\boxed{18} and then \boxed{", 1),
        (r"\boxed{18} and then \boxed{17", 1),
        (r"\boxed{18", 0),
        ("\\boxed{18\nso 18", 0),
        (r"\boxed{17} or \boxed{18}", 1),
        (r"\boxed{18} or \boxed{17}", 0),
        (r"\boxed {18}", 1),
        (r"\boxed{\boxed{18}}", 1),
        (r"\boxed{\text{18}}", 1),
        (r"} \boxed{18}", 1),
        (r"{ \boxed{18}", 1),
        (r"\boxed{17 1}", 0),
        ("#### 10 8", 0),
        ("#### 18", 1),
        ("#### 18.", 1),
        ("#### $18", 1),
        ("#### 18.00", 1),
        ("#### 18 dollars", 1),
        ("#### 18 apples", 1),
        ("#### 18 people", 1),
        ("#### 18 years old", 1),
        ("#### 18 miles per hour", 1),
        ("#### 18 dollars 18 dollars", 0),
        ("#### 18 thousand dollars", 0),
        ("#### 36/2", 0),  # not worked out
        ("#### 9+9", 0),  # the sum is asked for
        ("#### 9*2", 0),
        ("#### 18\n#### 17", 0),
        ("####", 0),
    ],
)
def test_what_a_response_to_gsm8k_earns(response, earned):
    example = Example("p", "a", ("18",))
    assert data.reward(data.get_dataset("gsm8k"), response, example) == earned


# --------------------------------------------------------------------------------- properties of the mathematics

numbers = st.one_of(
    st.integers(-9999, 9999).map(str),
    st.decimals(-999, 999, places=2).map(str),
    st.tuples(st.integers(1, 99), st.integers(2, 99)).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
    st.tuples(st.integers(1, 9), st.integers(2, 9)).map(lambda t: rf"{t[0]}\sqrt{{{t[1]}}}"),
    st.tuples(st.integers(1, 9), st.sampled_from("xyn")).map(lambda t: rf"{t[0]}{t[1]}+\frac{{1}}{{{t[1]}}}"),
)
harmless = st.sampled_from(
    [
        lambda a: f" {a} ",
        lambda a: f"{a}.",
        lambda a: f"${a}$",
        lambda a: f"\\({a}\\)",
        lambda a: a.replace(r"\frac", r"\dfrac"),
        lambda a: a.replace("+", r" \, + \; "),
        lambda a: rf"\left({a}\right)",
        lambda a: f"{{{a}}}",
        lambda a: rf"\boxed{{{a}}}",
        lambda a: f"x = {a}" if "x" not in a else a,
        lambda a: rf"{a} \text{{ cm}}^2",
        lambda a: rf"\displaystyle {a}",
    ]
)


@quick
@given(numbers, st.lists(harmless, max_size=1), st.booleans())
def test_a_right_answer_stays_right_under_rewriting(number, rewritings, box):
    answer = number
    for rewrite in rewritings:
        answer = rewrite(answer)
    response = f"so \\boxed{{{answer}}}" if box else f"so\n#### {answer}"
    assert grading.measure_math(response, Example("p", "a", (number,)))["accuracy"] == 1, response


@quick
@given(
    st.integers(1000, 10**9), st.sampled_from([",", "{,}", r",\!", r"\,", "\u2009"]), st.sampled_from(["", " dollars"])
)
def test_separators_of_thousands_and_units_change_nothing(number, separator, unit):
    answer = f"{number:,}".replace(",", separator) + unit
    assert grading.measure_number(f"#### {answer}", Example("p", "a", (str(number),)))["accuracy"] == 1


@quick
@given(
    st.integers(0, 9999), st.integers(0, 9999), st.sampled_from(["", " ", ", ", "; ", " and ", "\n", "  ", "~", r"\ "])
)
def test_wrong_answers_side_by_side_never_become_right(a, b, between):
    for reference in {str(a), str(b), f"{a}{b}", str(a + b), str(a * b)}:
        if between == "" and reference == f"{a}{b}".lstrip("0"):
            continue  # one number, written without a blank
        joined = f"{a}{between}{b}"
        right = between == "" and int(joined) == int(reference)
        right = right or between == "\n" and int(reference) == a  # the line behind "####" is the answer
        assert grading.measure_math(f"#### {joined}", Example("p", "", (reference,)))["accuracy"] == right
        boxed = between == "" and int(joined) == int(reference)
        assert grading.measure_math(rf"\boxed{{{joined}}}", Example("p", "", (reference,)))["accuracy"] == boxed


@quick
@given(numbers, numbers, st.sampled_from([" {}", ", {}", "{}", " apples {}", " = {}", r" \text{{ or }} {}", " or {}"]))
def test_a_wrong_answer_never_becomes_right_by_appending_the_right_one(right, wrong, appended):
    if grading.same_math(right, wrong):
        return
    answer = wrong + appended.format(right)
    if appended == "{}" and not right.startswith(("-", "\\")):
        return  # digits behind digits are another number
    if appended == "{}" and grading.compared_by(answer) == "value":
        return  # one expression: 3-5, 2\sqrt{3}
    assert not grading.same_math(right, answer), answer
    assert not grading.same_math(right, f"{wrong} {wrong}")


@quick
@given(st.text(alphabet=r"0123456789xyei+-*/^_=(){}[]|!,.\ $%<>&", max_size=40))
def test_any_text_is_read_or_refused_and_equals_itself_or_nothing(text):
    equal = grading.same_math(text, text)
    assert isinstance(equal, bool) and (equal or grading.compared_by(text) == "refused")


def squeezed(text: str) -> list[str]:
    """Without blanks, braces, units, degrees and "x =", the items of a list in order: another road to "the same"."""
    text = re.sub(
        r"\\(?:text|mbox)\{.*|\^\{?\\circ\}?C?|\\?%|\\left|\\right|\\!|(?<=\\)[dt](?=frac)|[\s{}$\\.]|,(?=\d{3}\b)",
        "",
        text,
    )
    text = re.sub(r"^(?:[a-z]|f\(x\))=", "", text)
    return sorted(text.replace("times10^", "e").split(","))


@needs_real
@pytest.mark.parametrize("name", ["math500", "aime24", "aime25", "amc", "minerva", "olympiad", "gsm8k", "deepscaler"])
def test_every_reference_equals_itself_and_no_other_of_another_value(name):
    split = "train" if name == "deepscaler" else "test"
    problems = [e.references for e in data.load_examples(name, split, data_dir=REAL)]
    references = sorted({r for problem in problems for r in problem})
    assert all(grading.same_math(r, r) for r in references)
    one_problem = {frozenset(pair) for problem in problems for pair in itertools.combinations(problem, 2)}
    drawn = references if len(references) <= 100 else random.Random(0).sample(references, 100)
    for a, b in itertools.combinations(drawn, 2):
        if grading.same_math(a, b):
            assert frozenset((a, b)) in one_problem or squeezed(a) == squeezed(b), (a, b)


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "9^{9999999}",
        "999!",
        "(999!)!",
        r"\binom{900}{450}^{900}",
        "1/" * 240 + "3",
        "+".join(["1"] * 250),
        "9e999" + "9e999".join("*" * 60),
        "{" * 250 + "1" + "}" * 249,
        "(" * 250,
        r"\sin" * 100 + "1",
        r"\sqrt" * 90 + "2",
        r"\lfloor n" + "!" * 99 + r"\rfloor",
        r"\frac" * 90,
        "-" * 499,
        "|" * 500,
        "x^" * 240 + "2",
        r"\lfloor" + "(n+1)" * 60 + r"\rfloor",
        "e^{" * 100 + "1" + "}" * 100,
        r"\log_{1} 5",
        r"\tan(\pi/2)",
        "0^0",
        "(-1)!",
    ],
)
def test_mathematics_is_bounded_in_time(answer):
    before = time.perf_counter()
    for reference in (r"\lfloor n \rfloor", "17", answer[:500]):
        grading.same_math(reference, answer)
    assert time.perf_counter() - before < 5


@pytest.mark.parametrize(
    "piece",
    [
        "<<",
        r"\boxed{",
        "{",
        "}",
        "####",
        "1,",
        "1 ",
        "9",
        ".",
        "/ ",
        r"\frac",
        "(",
        " ",
        "\n",
        "a ",
        "12,345",
        r"\text{",
    ],
)
def test_long_responses_take_no_longer_than_they_are_long(piece):
    response = piece * (100_000 // len(piece))
    example = Example("p", "a", ("18", "x+1"))
    before = time.perf_counter()
    for measure in (grading.measure_math, grading.measure_number, grading.measure_countdown, grading.measure_squad):
        assert measure(response, example) in ({"accuracy": 0.0}, {"exact_match": 0.0, "f1": 0.0})
    grading.last_number(response), grading.rouge_words(response)
    assert time.perf_counter() - before < 3


# ---------------------------------------------------------------------------------- rewards are floats; other scripts


@pytest.mark.parametrize("response", ["", " ", "...", "the", "18", r"\boxed{18}"])
def test_every_number_that_is_measured_is_a_float(response):
    example = Example("p", "a", ("18",), (1, 8, 9))
    for spec in data.DATASETS.values():
        assert all(type(value) is float for value in spec.measure(response, example).values())
        assert type(data.reward(spec, response, example)) is float


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Привет, мир!", ["привет", "мир"]),
        ("你好, world", ["你", "好", "world"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("한국 어", ["한국", "어"]),
        ("Γειά σου 12", ["γειά", "σου", "12"]),
        ("नमस्ते", ["नमस्ते"]),
        ("سلام دنیا", ["سلام", "دنیا"]),
        ("café", ["caf"]),  # as rouge-score has it
    ],
)
def test_rouge_sees_other_scripts(text, words):
    assert grading.rouge_words(text) == words
    same = grading.measure_summary(text, Example("p", "a", (text,)))
    assert same["rouge1"] == same["rougeL"] == 1.0
    assert grading.measure_summary("zzz", Example("p", "a", (text,)))["rouge1"] == 0.0


@quick
@given(st.text(alphabet=st.characters(max_codepoint=0x17F)), st.text(alphabet="abc The running, cats' é2$\n"))
def test_rouge_of_latin_text_is_that_of_rouge_score(response, reference):
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    theirs = {name: score.fmeasure for name, score in scorer.score(reference, response).items()}
    assert grading.measure_summary(response, Example("p", "a", (reference,))) == theirs


@needs_real
def test_the_counts_in_the_docs_are_those_of_the_command():
    run = subprocess.run(
        [sys.executable, "bench/grading.py", "--data-dir", str(REAL)], cwd=ROOT, capture_output=True, text=True
    )
    rows = run.stdout.strip().splitlines()
    assert run.returncode == 0 and len(rows) == 2 + 8, run.stderr
    assert "\n".join(rows) in (ROOT / "docs" / "grading.md").read_text(encoding="utf-8")


def test_the_command_says_what_is_missing(tmp_path):
    run = subprocess.run(
        [sys.executable, "bench/grading.py", "--data-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2 and "gsm8k/train.jsonl is missing" in run.stderr and "Traceback" not in run.stderr
