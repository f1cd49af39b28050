"""support/grading.py: what responses earn, and what they must not."""

import json
import random
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import grading
from support.grading import Example, as_text, measure_countdown, measure_exact, measure_math, measure_number, same_math

REAL = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data (the real data sets) is not there")
quick = settings(deadline=None, max_examples=50)


def rows(table):
    return [row for line in table.splitlines() for row in line.split("|")]


def earns(response, *references, measure=measure_number):
    return measure(response, Example("p", "a", references))["accuracy"]


def test_references_are_texts_and_only_texts_and_numbers_become_answers():
    for references in ("751", (751,), (None,), ["7", 5]):  # ("751") without its comma is "751"
        with pytest.raises(ValueError, match="tuple of texts"):
            Example("51+700=", "751", references)
    assert [as_text(v) for v in (" 23 ", 23, 2.5, [3, "5"], "", ["", ""])] == ["23", "23", "2.5", "3,5", "", ""]
    for value in ({"a": 1}, None, float("nan"), float("inf"), True, [1, None], [[True]], b"3"):
        assert as_text(value) is None


NO_COUNTDOWN = """22|3*5+7+0|3*5|7*3+1||3*5+7)|3*5+7=22|3**5+7|5//3+7|__import__('os')|5/(3-3)+7|3*5+07|3 5 7|3,5,7
٣*5+7|7--5*3|3(5)+7|(3,5,7)|()"""


def test_countdown_takes_every_expression_of_the_numbers_and_nothing_else():
    for response in ("3*5+7", " 7+5*3 ", "(5*3)+7"):
        assert measure_countdown(response, Example("", "", ("22",), (3, 5, 7))) == {"accuracy": 1.0}
    assert measure_countdown("1/3*3", Example("", "", ("1",), (1, 3, 3))) == {"accuracy": 1.0}  # no rounding
    for response in (*rows(NO_COUNTDOWN), "(" * 60, "3" * 65, "3*5+7\x00"):
        assert measure_countdown(response, Example("", "", ("22",), (3, 5, 7))) == {"accuracy": 0.0}, response


def f1_by_the_book(response, reference):
    """precision and recall of the words, each word matched at most as often as it stands in the other"""
    left, common = list(reference), 0
    for word in response:
        if word in left:
            left.remove(word)
            common += 1
    p, r = common / max(len(response), 1), common / max(len(reference), 1)
    return 2 * p * r / (p + r) if common else 0.0


def rouge_by_the_book(response, reference):
    """ROUGE-1, ROUGE-2 by counting, ROUGE-L by the table of longest common subsequences"""
    scores = {}
    for n in (1, 2):
        grams = [Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (response, reference)]
        total = sum(map(Counter.total, grams))
        scores[f"rouge{n}"] = 2 * sum(min(c, grams[1][g]) for g, c in grams[0].items()) / total if total else 0.0
    table = np.zeros((len(response) + 1, len(reference) + 1))
    for i, a in enumerate(response):
        for j, b in enumerate(reference):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    return scores | {"rougeL": 2 * table[-1, -1] / (len(response) + len(reference))}


words = st.lists(st.sampled_from("red green blue cat dog".split()), max_size=8)


@quick
@given(words, st.lists(words.filter(bool), min_size=1, max_size=3))
def test_f1_and_rouge_are_the_books(response, references):
    example = Example("p", "a", tuple(" ".join(r) for r in references))
    best = max(f1_by_the_book(response, r) for r in references)
    assert grading.measure_unigrams(" ".join(response), example)["unigram_f1"] == pytest.approx(best)
    squad = grading.measure_squad(" ".join(response), example)
    assert squad == {"exact_match": float(response in references), "f1": pytest.approx(best)}
    rouge = [rouge_by_the_book(response, r) for r in references]
    best = pytest.approx({name: max(scores[name] for scores in rouge) for name in rouge[0]})
    assert grading.measure_summary(" ".join(response), example) == best


def test_words_are_normalised_as_in_the_official_scripts():
    summary = grading.measure_summary("The cats sat on the mat.", Example("p", "a", ("the cat on the mat",)))
    assert summary["rouge2"] == pytest.approx(2 * 3 / 9)  # the-cat, on-the, the-mat of 5 and 4 pairs: "cats" is "cat"
    for response, references, exact, f1 in (
        ("denver  broncos", ("Carolina Panthers", "the Denver Broncos."), 1, 1),
        ("a U.S. theater", ("US theater",), 1, 1),
        ("Anthem and Denver", ("An them", "Denver"), 0, 1 / 2),  # an article is a word of its own
    ):
        got = grading.measure_squad(response, Example("p", "a", references))
        assert got == {"exact_match": exact, "f1": pytest.approx(f1)}


RIGHT = r"""18|18.|18.00|$18|\$18|**18**|`18`|\(18\)|$18$|x = 18|5 + 13 = 18|The answer is $18$.|It is **18**|It is (18)
The answer is \(18\).|It fell by $18.|There are now 18 students|The team scored 18 goals|about 18kg|that is 20-2=18
total: 20 - 2 = 18 eggs|That is $18/month|It is 18%, or so|I have 3, so 18.|He went 18 times a week|#### 18|#### $18
#### 18 points|#### 18 dollars|#### 18 miles per hour|#### 18 years old|#### 18.00|\boxed{18} and \boxed{
\boxed {18}|\boxed{17} or \boxed{18}|\boxed{\boxed{18}}|\boxed{\text{18}}|} \boxed{18}|\boxed{18\text{ cm}}
\boxed{18 apples}|The answer is $\frac{1}{2}$, no, $x = 18$."""
WRONG = r"""1 8|10 8|18 18|18, 18|180|18.5|1/18|18 thousand|18k|18 and a half|18 squared|18 pi|18th|x18|18x|2^18|3-18
so 18 000|so sqrt(18)|is 5 + 18|is 7 x 18|at 10:18|is 1.18.1|is 12,18|is 18/5/2024|is minus 18|is not 18
is 17 or 18|is 17 and 18|18 dozen eggs|\boxed{18|\boxed{18} or \boxed{17}|\boxed{17 18}|#### 36/2|#### 9+9|#### 9*2
####|#### 17 of 18|#### 18 dollars 18 dollars|\boxed{18} and then \boxed{17}|no number|\boxed{3\text{ of }18}
#### 18 \text{ thousand}"""


@pytest.mark.parametrize("response", rows(RIGHT + "\n" + WRONG))
def test_these_answers_are_18_and_these_are_not(response):
    right = response in rows(RIGHT)
    assert earns(response, "18") == right
    assert earns(response, "18", measure=measure_math) == (right or response in ("#### 36/2", "#### 9+9", "#### 9*2"))


def test_the_last_of_several_answers_counts():
    assert earns("It is now -3 degrees", "-3") == earns("The answer is −3", "-3") == earns("#### 1 mile", "1") == 1
    assert earns("2+2 = 4\n#### 4\nQuestion: and now?", "4") == earns("I have 3\nso it is 7, of 1,024.", "1024") == 1
    assert earns("\\boxed{18\nso 18", "18") == 0  # a box that is not closed
    assert earns("#### 17\n#### 18", "18") == earns(r"so $x = \frac{3}{4}$.", "3/4", measure=measure_math) == 1
    assert earns(r"\boxed{1} or rather \boxed{\frac{1}{2}}.", "0.5", measure=measure_math) == 1


EQUAL = r"""025|25 ; 1,234|1234 ; 10,\!080|10080 ; 10\,000|10000 ; 1{,}234{,}567|1234567 ; 0.5|\frac{1}{2} ; .5|1/2
8.7e8|8.7 \times 10^{8} ; 10^{-20}|1e-20 ; 9|3^2 ; 2|\sqrt4 ; 18|16+2 ; 1.8|1\frac{4}{5} ; -2|3 - 5 ; 80\%|80
4/3|\frac43 ; 336^\circ|336 ; 5.4 \text{ cents}|5.4 ; 864 \mbox{ inches}^2|864 ; \text{even}|Even ; \text{(C)}|C
x=5|5 ; 5|x = 5 ; x \in [-2,7]|[-2,7] ; y = 2x + 3|3+2x ; f(x)=2 x|2x ; \boxed{N=197}|197 ; p - q|-q+p ; n(n-1)|n^2-n
1|\sin^2 x+\cos^2 x ; 3,5,7|7, 3, 5 ; $69$,$84$|84,69 ; (1,2)|(1, 2) ; (3,2),(-3,2)|(-3,2),(3,2)
1 \pm \sqrt{19}|1+\sqrt{19},1-\sqrt{19} ; \{1\pm\sqrt{5},-2\}|-2, 1-\sqrt5, 1+\sqrt5
(-\infty, 0) \cup\{1\}|\{1\} \cup (-\infty,0) ; \frac{8}{\sqrt[3]{7}}|8 \cdot 7^{-1/3}
\frac{\sqrt{21}}{5}|\sqrt{21}/5 ; \frac{1}{3}E_1+\frac{2}{3}E_2|\frac{E_{1}+2E_{2}}{3}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}|\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}
np.arcsin(10/13)|\arcsin{\frac{10}{13}} ; \frac{dx}{dt}=kx-a|\frac{d x}{d t} = k x - a ; 52_8|52_{8}
2^{1009}|2 \cdot 2^{1008} ; \left(\frac{1}{2}, x\right)|(0.5,x)"""
UNEQUAL = r"""18|10 8 ; 108|10 8 ; 18|17 1 ; 111|1 1 1 ; 11/2|1 1/2 ; 1/2|0 \frac{1}{2} ; 6|2 3 ; 8|1 (8) ; 9|1 (8)
8|(1)(8) ; -5|3 -5 ; 36|x 36 ; 0|10 000 ; 18|18, 18 ; 18|18; 18 ; 18|18 18 ; -2,-2|-2 ; 16,3,1,1|16,3,1
16,3,1,1|16,3,3,1 ; 3,5,7|3,5 ; 3,5|3,5,7 ; 1234|1,2,3,4 ; 52_8|52_9 ; 52_8|52 ; 52_8|42 ; 10^{-20}|10^{-30}
10^{-20}\pi|10^{-30}\pi ; 10^{-60}\pi|10^{-70}\pi ; 1/3|0.333333 ; \frac{x}{3}|0.333333x ; \sqrt{2}|1.41421356
10^{30}+1|10^{30} ; 2^{1009}|2^{1009}+1 ; \pi+10^{30}|e+10^{30} ; e|2.718281828459045 ; 8.7e8|8.8e8 ; east|seat ; on|no
2|two ; 7|seven ; 2|2+ ; 2|2 E_1 ; 2|2RC ; 7.6 Z|7.6 ; 2E|2e ; 3I|3i ; P+p|2p ; 3\mathrm{i}|3 ; \frac{dx}{dt}=kx|kx
\frac{dx}{dt}=kx|\frac{x}{t}=kx ; \dot{x}|x ; I(0)|0 ; x=5|y=5 ; x=5|0=0 ; 4|7y - 5x = 4 ; \frac{dx}{dt}|\frac{dy}{dt}
5|0=5 ; k \geqslant 2|2 ; (1,2)|(2,1) ; (1,2)|[1,2] ; (1,2]|(1,2) ; (1,2)|1,2 ; (312,123,231)|312123231
(-\infty, 0)|(\infty, 0) ; x'|x ; \log_{10} 250|\ln 250
\begin{pmatrix} 1 \\ 2 \end{pmatrix}|\begin{pmatrix} 1 & 2 \end{pmatrix} ; 18|18 \text{ thousand}"""


def pairs(table):
    return [pair.split("|") for pair in table.replace("\n", " ; ").split(" ; ")]


@pytest.mark.parametrize(("reference", "answer"), [*pairs(EQUAL), *pairs(UNEQUAL), ["|x|", "x"]])
def test_equal_and_unequal_answers(reference, answer):
    assert same_math(reference, answer) is same_math(answer, reference) is ([reference, answer] in pairs(EQUAL))
    assert same_math(reference, reference) is same_math(answer, answer) is True


numbers = st.one_of(
    st.integers(-9999, 9999).map(str),
    st.tuples(st.integers(1, 99), st.integers(2, 99)).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
    st.tuples(st.integers(1, 9), st.integers(2, 9)).map(lambda t: rf"{t[0]}\sqrt{{{t[1]}}}"),
    st.tuples(st.integers(1, 9), st.sampled_from("xyn")).map(lambda t: rf"{t[0]}{t[1]}+\frac{{1}}{{{t[1]}}}"),
)
FORMS = rows(r" {} |{}.|${}$|\({}\)|\left({}\right)|\boxed{{{}}}|{}\text{{ cm}}^2|\displaystyle {}")


@quick
@given(numbers, numbers, st.sampled_from(FORMS), st.sampled_from([" {}", ", {}", "; {}", " and {}", " = {}", "~{}"]))
def test_forms_change_nothing_and_a_wrong_answer_beside_the_right_one_stays_wrong(right, wrong, form, beside):
    assert earns(rf"so \boxed{{{form.format(right)}}}", right, measure=measure_math) == 1
    if not same_math(right, wrong):
        assert not same_math(right, form.format(wrong))
        if not right.startswith("-"):  # 3 -5 may be read as a difference
            assert not same_math(right, wrong + beside.format(right))


HEAVY = r"""9^{9^{9^{9}}}|9^{9999999}|10000000!!|999!|(999!)!|\binom{9^9}{9^8}|\binom{99999999}{49999999}|e^{9^{9^9}}
2^{2^{99}}x|(x+y+z+w)^{30}(x-y)^{30}|(x+1)^{999}-(x-1)^{999}|\sum_{k=1}^{10^9} k^k|\prod_{k=1}^{99999} k|1e999999999
\int_0^1 e^{x^x} dx|\lim_{x \to 0} \frac{\sin x}{x}|\tan(\tan(\tan(\tan(9^{999}))))|0^0|1/0|\log_{1} 5|9^{99*9^9}
\operatorname{eye}(99999)|(\sin x+\cos y+\tan z)^{9}|\sqrt{2+\sqrt{3+\sqrt{5+\sqrt{7+\sqrt{11}}}}}|((9^{99})^{99})^{99}
\sin x \sin(2x)\sin(3x)\sin(4x)\sin(5x)\sin(6x)|9^{\frac{999}{.000001}}"""


def heavy():
    yield from rows(HEAVY)
    for n in (15, 90, 1000):
        for piece in rows(r"\frac|\sqrt|{|(|-|x^|1/|e^{|\sin|9e99*|\frac{1}{|9|99999|x+|x+1,|+1|(x+1)"):
            yield piece * n + "1"
        for opening, closing in (r"\frac{1}{1+", "}"), ("(", ")"), (r"\sqrt{2+", "}"), ("{", "}"), ("[", "]"):
            yield opening * n + "1" + closing * n


def test_nothing_hangs_in_any_thread():
    verdicts = {}

    def grade():  # math-verify's time limits are signals, which no other thread than the main one may set
        verdicts["x"] = same_math(r"\frac{x+1}{2}", r"0.5+\frac{x}{2}")
        for answer in heavy():
            for reference in (r"\frac{x}{2}", r"x+\sqrt{2}", f"{answer} + 0"):
                verdicts[reference, answer] = same_math(reference, answer)

    thread = threading.Thread(target=grade, daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive(), f"no end behind {[*verdicts][-1]}"
    assert verdicts.pop("x") is True and not any(v for (r, _), v in verdicts.items() if "+ 0" not in r)


def test_empty_and_long_responses_earn_nothing():
    measures = measure_math, measure_number, measure_exact
    for measure in (*measures, grading.measure_squad, grading.measure_unigrams):
        assert not any(v for text in ("", " \n") for v in measure(text, Example("p", "a", ("", "the"))).values())
    for piece in ["1 ", ". ", "\n", "a ", *rows(r"<<|\boxed{|{|}|####|1,|9|/ |(|\text{|$|\(|$\ ")]:
        for measure in (*measures, measure_countdown):
            assert earns(piece * (50_000 // len(piece)), "18", "x+1", measure=measure) == 0, piece


@quick
@given(st.text(max_size=40) | st.text(alphabet=r"0123456789xyEei+-*/^_=(){}[]|!,.\ $%<>&#", max_size=40))
def test_grading_never_raises_and_every_score_is_a_float(text):
    example = Example("p", "a", ("17", text))
    for measure in (measure_math, measure_number, measure_exact, grading.measure_squad, grading.measure_summary):
        assert all(type(score) is float and 0 <= score <= 1 for score in measure(text, example).values())
    assert measure_countdown(text, Example("p", "a", ("8",), (1, 7)))["accuracy"] in (0.0, 1.0)


@needs_real
def test_every_real_reference_equals_itself_and_not_its_neighbour():
    lines = [line for f in sorted(REAL.glob("math-eval/*.jsonl")) for line in f.read_text("utf-8").splitlines()]
    references = [as_text(json.loads(line)["answer"]) for line in lines]
    random.Random(0).shuffle(references)
    for reference, other in zip(references[:150], references[1:], strict=False):
        assert earns(f"We get \\boxed{{{reference}}}.", reference, measure=measure_math) == 1, reference
        if same_math(reference, other):  # the same but for the way it is written
            letters = [re.sub(r"[\s${}\\]|^x=|left|right|text|\.0*$", "", text) for text in (reference, other)]
            assert letters[0] == letters[1], (reference, other)


@needs_real
def test_gsm8k_solutions_are_right_and_near_misses_wrong():
    lines = (REAL / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    for line in random.Random(0).sample(lines, 300):
        final = (solution := json.loads(line)["answer"]).rpartition("####")[2].strip()
        assert earns(solution, final) == 1
        for miss in (f"{final}1", f"{final} 1", f"1 {final}", f"{final}.5", f"{final}/7", f"{final} million"):
            assert earns(f"#### {miss}", final) == earns(f"The answer is {miss}.", final) == 0, miss
