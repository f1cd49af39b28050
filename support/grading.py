"""Metrics of a response, each a float in [0, 1]; the reward is one of them. Any of an example's references will do."""

import ast
import contextlib
import functools
import itertools
import logging
import math
import operator
import re
import string
import zlib
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Example:
    """A task: what the model reads, what the supervised phase teaches it to write, what its response is judged by."""

    prompt: str
    answer: str  # without the end token
    references: tuple[str, ...]  # any of them will do
    numbers: tuple[int, ...] = ()  # countdown: the numbers to use

    def __post_init__(self):  # ("751") without its comma is a text, and each of its letters would be a right answer
        if isinstance(self.references, str) or not all(isinstance(r, str) for r in self.references):
            raise ValueError(f"references: expected a tuple of texts such as ('751',), got {self.references!r:.80}")


def as_text(value) -> str | None:
    """The text of an answer in a record: a text, a finite number, or a list of them; None for anything else."""
    if isinstance(value, list | tuple):
        items = [as_text(v) for v in value]
        return None if None in items else ",".join(filter(None, items))
    is_number = type(value) is int or isinstance(value, float) and math.isfinite(value)  # a bool is no number
    return value.strip() if isinstance(value, str) else str(value) if is_number else None


def measure_exact(response: str, example: Example) -> dict[str, float]:
    return {"accuracy": float(response.strip() in example.references and response.strip() != "")}


def measure_countdown(response: str, example: Example) -> dict[str, float]:
    """1 for an expression of + - * / that uses each number once and has the target's value, exactly."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
    used, right = [], False

    def value(node) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        used.append(node.value)  # AttributeError: this is no number
        return Fraction(node.value)

    if re.fullmatch(r"[0-9+\-*/() ]{1,64}", response.strip()):  # short and harmless before the parser sees it
        with contextlib.suppress(SyntaxError, AttributeError, ZeroDivisionError):
            right = value(ast.parse(response.strip(), mode="eval").body) == int(example.references[0])
    return {"accuracy": float(right and sorted(used) == sorted(example.numbers))}


def _f1(response: list[str], reference: list[str]) -> float:
    common = (Counter(response) & Counter(reference)).total()
    return 2 * common / (len(response) + len(reference)) if common else 0.0


def measure_unigrams(response: str, example: Example) -> dict[str, float]:
    """F1 between the words (split at white space) of the continuation and of the text that really follows."""
    return {"unigram_f1": max(_f1(response.split(), r.split()) for r in example.references)}


def squad_words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles, white space alone between the words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def measure_squad(response: str, example: Example) -> dict[str, float]:
    """Exact match and F1 as in the official script, but that a response without a word earns nothing."""
    words, references = squad_words(response), [squad_words(r) for r in example.references]
    return {"exact_match": float(bool(words) and words in references), "f1": max(_f1(words, r) for r in references)}


def measure_summary(response: str, example: Example) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and sentence-level ROUGE-L with Porter stemming, the best of the references."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = scorer.score_multi(example.references, response)
    return {name: float(score.fmeasure) for name, score in scores.items()}  # of no words it is the integer 0


def measure_math(response: str, example: Example) -> dict[str, float]:
    """1 if the final answer equals one of the references as mathematics."""
    answer = final_answer(response)
    return {"accuracy": float(any(same_math(reference, answer) for reference in example.references))}


def measure_number(response: str, example: Example) -> dict[str, float]:
    """1 if the final answer is the reference's number, worked out: 18, 18.00, $18, not 36/2 or 9 + 9."""
    number = plain_number(answer := _NAME.sub("", clean(final_answer(response))))
    worked_out = number is not None and ("/" not in answer or str(number) == answer)
    return {"accuracy": float(worked_out and any(same_math(r, answer) for r in example.references))}


_GROUP = r"(?:[^{}]++|\{" * 8 + "[^{}]*+" + r"\})*+" * 8  # what stands in braces, up to eight of them in each other
_BOXED = re.compile(rf"\\boxed\s*\{{({_GROUP})\}}")


def final_answer(text: str) -> str:
    r"""What a solution ends in: its last closed \boxed{...}, else the line behind its last "####", else its last line.

    In words it is the only number there, or the last number of a last line ("she had 9 and ate 2, so 7 are left").
    """
    boxes = _BOXED.findall(text)
    marked = bool(boxes) or "####" in text
    if marked:
        answer = boxes[-1] if boxes else text.rpartition("####")[2].strip().partition("\n")[0]
    else:  # a box that is begun and not closed is no answer
        answer = "" if r"\boxed" in text else text.strip().rpartition("\n")[2]
    if len(answer) > 2000:  # no answer is that long
        return ""
    formulas = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", answer) if not marked and "\\" in answer else []  # in words
    return number_in_words(answer, alone=marked) or ("".join(formulas[-1]) if formulas else answer)


_NUMBER = re.compile(r"(?a)[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE]-?\d{1,3})?(?:/\d+)?")
_CHANGED_BEFORE = re.compile(
    r"(?:[^\s=(]|\w\(\s*|(?:[\d+*/^\[{√-]|\d\S*\s(?:and|plus|times|by|over|x)|\b(?:minus|negative|not|or))\s+)$"
)
_UNCHANGED_AFTER = re.compile(
    r"(?:%|(?:kg|m?g|[kcm]m|ml|mph|lbs?|oz|ft|hrs?|mins?|am|pm)\b)?(?:[.,;:!?)](?!\d)|/[a-z]{2}|(?!\s*(?:[-+*/^=(\[{√_]|"
    r"(?:hundred|thousand|[mb]illion|trillion|dozen|half|halve|third|quarter|fourth|fifth|sixth|eighth|tenth)s?\b|squared|"
    r"cubed|times \d|pi\b|and (?:a|an|one|two|three|four|five|\d)))(?:\s|$))"
)


def number_in_words(line: str, alone: bool) -> str | None:
    """The last number of a line in words, with `alone` the only one; None where its neighbours make another of it.

    So do operators, brackets, digits, letters (5 + 3, sqrt(2), 10 000, x2) and some words (5 thousand, minus 5), but
    not the name of what is counted, a unit or Markdown's signs.
    """
    line = re.sub(r"\\[()$]|[$*×·`\"€£]", " ", line.replace(r"\%", "%").replace("−", "-").replace("–", "-"))
    line = re.sub(r" ?/ ?(?=\d)", "/", re.sub(r"(?<=\d)\s*percent\b", "%", line)).lower()
    numbers = list(_NUMBER.finditer(line))
    if not numbers or "\\" in line or not re.search(r"[^\W\d_]{2}|^[^a-z]+=", line) or (alone and len(numbers) > 1):
        return None
    before, after = line[: numbers[-1].start()], line[numbers[-1].end() :]
    return numbers[-1][0] if not _CHANGED_BEFORE.search(before) and _UNCHANGED_AFTER.match(after) else None


_SIGNS = str.maketrans(
    dict(zip("×·π∞≤≥∪√", (rf"\{name} " for name in "times cdot pi infty le ge cup sqrt".split()), strict=True))
    | dict(zip("−–÷′\u2009\u202f€£¥°", ("-", "-", "/", "'", r"\,", r"\,", *"    "), strict=True))
)
_WORDS = r"\\(?:text|mbox|textbf|textit|textrm|mathrm)\s?\{([^{}]*)\}"
_CHANGES = r".*\{\s?(?:[ie]\}|hundred|thousand|[mb]illion|dozen|and a half|squared|cubed)"  # not the name of a unit
_REWRITES = (
    (r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|,\\!|\\,)\s?\d{3})+(?!\d)", lambda m: re.sub(r"\D", "", m[0])),  # 1{,}000
    (r"(?<!\\)\\[,;:! ()\[\]]|\\(?:left|right|[bB]ig|displaystyle|q?quad)(?![a-zA-Z])|~|\\?\$", " "),
    (r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)(?:\s?[CF]$)?|\\?%\s?$", " "),  # degrees, percent
    (r",?\s(?:and|or)\s|,?\s?\\text\{\s?(?:and|or)\s?\}", ","),
    (r"(?<![a-zA-Z\\])(?:np\.)?(arcsin|arccos|arctan|sin|cos|tan|ln|log|exp|sqrt|pi)(?![a-zA-Z])", r"\\\1"),
    (rf"^\s?{_WORDS}\s?$", r"\1"),
    (r"^\s?\(([A-Z])\)\s?$", r"\1"),  # a choice
    (rf"(?<=[\d)}}\]])\s?(?!{_CHANGES})(?:{_WORDS}[\s/]*(?:\^\{{?-?\d\}}?)?)+\s?$", ""),  # a unit
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(frac|sqrt)\s?(\w)", r"\\\1{\2}"),
    (rf"(\\frac\s?\{{{_GROUP}\}})\s?(\w)", r"\1{\2}"),
    (r"([\^_])\s?(\w)(?!\w)", r"\1{\2}"),
)


def clean(text: str) -> str:
    r"""An answer without what carries no value: $, \left, blanks, %, degrees, Markdown, a unit in \text."""
    text = " ".join((_BOXED.findall(text) or [text])[-1].translate(_SIGNS).split())
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split()).strip('*`" ').rstrip(". ")


def plain_number(text: str) -> Fraction | None:
    """The exact value of 18, 1,234.5, .5, 1e-20, 3/4; None for anything else."""
    try:
        return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
    except (ValueError, ZeroDivisionError):  # 1.5/2, 1/0
        return None


@functools.lru_cache(maxsize=8192)  # a group's responses repeat the same few answers
def same_math(reference: str, answer: str) -> bool:
    """Whether two answers are equal: by value where both can be read whole, else as texts.

    x = 5 equals 5, a list equals itself in another order, a tuple does not.
    """
    texts = [clean(text) for text in (reference, answer)]
    names = [_NAME.match(text) for text in texts]
    if not all(names) or names[0][1] == names[1][1]:
        texts = [_NAME.sub("", text, count=1) for text in texts]
    numbers = [plain_number(text) for text in texts]
    if None not in numbers:
        return numbers[0] == numbers[1]
    a, b = (re.sub(r"(?<!\d) | (?!\d)", "", text) for text in texts)  # a blank stays between two digits
    if a == b or (a.isalpha() and a.casefold() == b.casefold()):
        return b != ""
    return _same_value(*texts)


# The guard: what passes to math-verify is short, flat and of bounded cost, so that no time limit (a signal) is needed.
MAX_LENGTH = 200
_NAME = re.compile(r"^([a-zA-Z](?:_\{\w+\})?(?:\(\w\))?)\s*(?:=|\\in(?![a-zA-Z]))\s*")
_COMMANDS = """frac sqrt cdot times div pi infty pm cup (?:arc)?(?:sin|cos|tan)h? cot sec csc ln log exp alpha beta
    gamma delta epsilon theta lambda mu nu rho sigma tau phi omega Delta Omega""".split()
_READABLE = re.compile(
    rf"(?a)(?:\\(?:{'|'.join(_COMMANDS)})(?![a-zA-Z])|\\(?:begin|end)\{{[bp]matrix\}}|\\[{{}}\\]"
    r"|[a-zA-Z\d\s+*/^!()\[\]{}_,;.&-])+"
)
_UNREADABLE = re.compile(  # two numbers side by side, another base, words, derivatives, f(x); a command is # here
    r"\d\s+[-+]?[\d.]|[a-zA-Z})\]]\s*\d|[\d)]\s*\(\d+\)|\d\s*_|\d[eE]\d|[a-zA-Z]{4}|(?<![a-zA-Z])d\s*[a-zA-Z#]"
    r"|[fghu]\s*\(|[a-zA-Z]\s*\([^()+-]*\)|!\s*!|\d{16}|(?<![\d.])0\s*#"
)
_EXPONENT = re.compile(r"\^\{[^{}^!]*(?:\{[^{}^!]*\}[^{}^!]*)*\}(?!\s*\^)")  # no power in or on a power


def _read(text: str):
    """The tree that math-verify's reader makes of a text; ValueError where the text is too long, too deep or odd."""
    import sympy as sp
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    if (number := plain_number(text)) is not None:
        return sp.Rational(number.numerator, number.denominator)
    bare = re.sub(r"\\(?:begin|end)\{\w*\}|\\[a-zA-Z]+", "#", text)
    depth = max(itertools.accumulate((c in "([{") - (c in ")]}") for c in text), default=0)
    readable = len(text) <= MAX_LENGTH and depth <= 5 and _READABLE.fullmatch(text) and not _UNREADABLE.search(bare)
    flat = text.count("^") == len(_EXPONENT.findall(text)) and not re.fullmatch(r"[a-zA-Z\s]*", bare)
    if not readable or not flat:
        raise ValueError("too long, too deep, odd, or letters alone")
    text = re.sub(r"(\d*)\.(\d*)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}", text)  # exactly
    text = text.replace("E", r"\Xi ").replace("I", r"\Psi ")  # which the reader takes for Euler's number and for i
    tree = latex2sympy(text, is_real=True, conversion_config=ConversionConfig(lowercase_symbols=False))
    tree = sp.Tuple(*tree.shape, *tree.flat()) if isinstance(tree, sp.MatrixBase) else tree
    if isinstance(tree, sp.FiniteSet) and len(tree) <= text.count(",") and not re.search(r"[(\[]", text):
        raise ValueError("a list that holds a value twice: the reader's set holds it once")
    return tree


def _number(tree, k: int):
    """A tree with the k-th random numbers in the letters' places, each part a fraction or a number of 60 digits."""
    import sympy as sp

    if not isinstance(tree, sp.Expr):
        return tree.func(*(_number(part, k) for part in tree.args)) if tree.args else tree
    point = {x: sp.Float(1 + zlib.crc32(f"{k} {x}".encode()) / 2**32, 60) for x in tree.free_symbols}
    point |= {x: sp.I for x in point if x.name == "i"}
    grown = [abs(part.evalf(10)) for part in tree.atoms(sp.Pow, sp.factorial) if not point]
    if not all(1 < value * 10**999 < 10**1998 for value in grown):
        raise ValueError("a number too large to work out")
    value = tree.evalf(60, subs=point) if point else tree.doit()
    value = value if value.is_Rational else value.evalf(60)
    if not value.is_Rational and abs(value) < 1e-30:
        raise ValueError("a number too small for 60 digits")
    return value


def _same_value(reference: str, answer: str) -> bool:
    """math-verify's verdict on numbers: of letters it would ask sympy's `simplify`, whose time has no bound."""
    try:
        from math_verify import verify
        from sympy import Expr

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time limit
        a, b = _read(reference), _read(answer)
        same_kind = type(a) is type(b) or (isinstance(a, Expr) and isinstance(b, Expr))  # not (1,2) for 1,2
        limits = {"float_rounding": 45, "numeric_precision": 60, "timeout_seconds": None}
        return same_kind and all(verify(_number(a, k), _number(b, k), **limits) for k in range(3))
    except Exception:  # what a reader of LaTeX and a computer algebra system may raise has no end
        return False
