"""Rewards and metrics: what a response is worth, each number a float in [0, 1].

A `measure_...(response, example)` reads `example.references` (any of them will do) and, for Countdown,
`example.numbers`. The reward of a response is one of the numbers that its metric reports.
"""

import ast
import functools
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from support import math_units, math_values, mathematics
from support.mathematics import Unread


@dataclass(frozen=True)
class Example:
    """A task: what the model reads, what the supervised phase teaches it to write, what its response is judged by."""

    prompt: str
    answer: str  # without the end token
    references: tuple[str, ...]  # any of them will do
    numbers: tuple[int, ...] = ()  # countdown: the numbers to use


# ------------------------------------------------------------------------------------------------- generated tasks


def measure_exact(response: str, example: Example) -> dict[str, float]:
    return {"accuracy": float(response.strip() in example.references)}


def measure_countdown(response: str, example: Example) -> dict[str, float]:
    """1 for an expression of + - * / that uses each number once and has the target's value, exactly."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,64}", response.strip()):  # short and harmless before the parser sees it
        return {"accuracy": 0.0}
    used: list[int] = []

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                used.append(number)
                return Fraction(number)
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.Div(), right):
                return value(left) / value(right)
        raise ValueError("not an expression of + - * /")

    try:
        result = value(ast.parse(response.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return {"accuracy": 0.0}
    right = sorted(used) == sorted(example.numbers) and result == int(example.references[0])
    return {"accuracy": float(right)}


# ------------------------------------------------------------------------------------------------------------ words


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
    words, references = squad_words(response), [squad_words(r) for r in example.references]
    return {"exact_match": float(words in references), "f1": max(_f1(words, r) for r in references)}


# Scripts without blanks between words: Thai to Myanmar, Khmer, Chinese and Japanese
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def rouge_words(text: str) -> list[str]:
    """rouge-score's words, and those of scripts that it does not see.

    Runs of a-z and 0-9, as rouge-score cuts them: of Latin text the numbers are its own, accents included (they part
    words there). From U+0250 on every letter, mark and digit belongs to a word; where a script has no blanks between
    words, each character with its marks is one.
    """
    words, within = [], ""  # what kind of word the character before stood in
    for c in text.lower():
        kind = "" if ord(c) < 0x250 else unicodedata.category(c)[0]
        if c in "abcdefghijklmnopqrstuvwxyz0123456789":
            kind = "latin"
        elif kind == "M" and within in ("other", "unspaced"):
            kind = within
        elif kind in ("L", "N"):
            kind = "unspaced" if _UNSPACED.match(c) else "other"
        else:
            kind = ""
        if kind and kind == within and not (kind == "unspaced" and unicodedata.category(c)[0] != "M"):
            words[-1] += c
        elif kind:
            words.append(c)
        within = kind
    return words


@functools.cache
def _rouge_scorer():
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer

    stem = functools.lru_cache(maxsize=65536)(PorterStemmer().stem)

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            return [stem(w) if len(w) > 3 and w.isascii() else w for w in rouge_words(text)]

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Tokenizer())


def measure_summary(response: str, example: Example) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and sentence-level ROUGE-L with Porter stemming, the best of the references."""
    scores = _rouge_scorer().score_multi(example.references, response)
    return {name: float(score.fmeasure) for name, score in scores.items()}  # of no words it is the integer 0


# ------------------------------------------------------------------------------------------------------ mathematics


def measure_math(response: str, example: Example) -> dict[str, float]:
    """1 if the final answer equals one of the references as mathematics."""
    answer = final_answer(response)
    return {"accuracy": float(any(same_math(reference, answer) for reference in example.references))}


def measure_number(response: str, example: Example) -> dict[str, float]:
    """1 if the final answer is the reference's number, worked out: 18, 18.00, $18, not 36/2 or 9 + 9."""
    answer = final_answer(response)
    return {"accuracy": float(any(same_math(reference, answer, number=True) for reference in example.references))}


_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed."""
    opened, last = [], None
    for brace in _BRACE.finditer(text):
        if brace[0] == "}" and opened:
            start = opened.pop()
            if start >= 0 and (last is None or start > last[0]):
                last = start, brace.start()
        elif brace[0] == "{":
            opened.append(-1)
        elif brace[0].startswith("\\boxed"):
            opened.append(brace.end())
    return text[slice(*last)] if last else None


def final_answer(text: str) -> str:
    r"""What a solution ends in: its last closed \boxed{...}, else the line behind its last "####", else its last line.

    Of a last line in words ("so she has 7 apples") it is the last number, if that is one whole number.
    """
    answer = boxed(text)
    if answer is not None:
        return answer
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    if "\\boxed" in text:  # begun and not finished: no answer
        return text[text.rfind("\\boxed") :]
    line = text.strip().rpartition("\n")[2]
    if len(line) <= mathematics.MAX_LENGTH and "\\" not in line and re.search(r"[^\W\d_]{2}", line):
        return last_number(line) or line
    return line


_WHOLE = re.compile(
    r"[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:/\d+)?", re.ASCII
)


def last_number(line: str) -> str | None:
    """The last number of a line in words, read whole or not at all.

    Nothing where more belongs to it than its digits: an operator or bracket (5 + 3, sqrt(2)), digits beside it
    (10 000), letters (x2), a word that changes it (5 thousand, minus 5, 18 and a half).
    """
    line = re.sub(r" ?/ ?(?=\d)", "/", line.replace("−", "-").replace("–", "-"))
    words = line.split()
    at = next((i for i in reversed(range(len(words))) if any(c.isdigit() for c in words[i])), None)
    if at is None:
        return None
    number = words[at].rpartition("=")[2]
    stopped = number[-1:] in tuple(".,;:!?")
    number = number.rstrip(".,;:!?*\"'")
    number = number[1:-1] if number[:1] + number[-1:] == "()" else number.rstrip(")")
    number = math_units.without_words(number.lstrip("$€£#*\"'").removesuffix("%"))
    before, after = "".join(words[at - 1 : at]).lower(), "" if stopped else "".join(words[at + 1 : at + 2]).lower()
    if not _WHOLE.fullmatch(number) or math_units.changes_number(before) or math_units.changes_number(after):
        return None
    if re.search(r"[\d+*/^(\[{√×·÷-]$|^(?:x|by|times)$", before) and "=" not in words[at]:
        whole = re.fullmatch(r"-?\d+", before) and re.fullmatch(r"(\d+)/(\d+)", number)  # 1 1/2
        further = words[at - 2] if at > 1 else ""
        return f"{before} {number}" if whole and not re.search(r"[\d+*/^(-]$", further) else None
    return None if re.match(r"[+*/^=×·÷(\[{π√_-]", after) else number


def same_math(reference: str, answer: str, number: bool = False) -> bool:
    r"""Whether two answers are equal: by value where both can be read whole, else token by token.

    x = 5 equals 5, a list equals itself in another order, a tuple does not; units in words behind a number count for
    nothing. With `number` the answer must be a number that needs no working out. An answer of more than 500
    characters is none.
    """
    if max(len(reference), len(answer)) > mathematics.MAX_LENGTH:
        return False
    return _same_math(reference, answer, number)


@functools.lru_cache(maxsize=8192)  # a group's responses repeat the same few answers
def _same_math(reference: str, answer: str, number: bool) -> bool:
    reference, answer = (mathematics.clean(boxed(text) or text) for text in (reference, answer))
    try:
        tokens = mathematics.tokenize(reference)
        if tokens and mathematics.same_text(tokens, mathematics.tokenize(answer)):
            return True
    except Unread:
        return False
    if tokens and "".join(tokens).isalpha() and "".join(tokens).casefold() == mathematics.words_of(answer):
        return True
    try:
        expected = mathematics.read(reference)
        plain = mathematics.is_number(expected)
        given = mathematics.read(math_units.without_words(answer) if plain else answer)
        return (not number or mathematics.is_number(given)) and math_values.same(expected, given)
    except Unread:
        return False


def compared_by(reference: str) -> str:
    """How answers are compared with a reference: by "value", as "text", or not at all ("refused")."""
    text = mathematics.clean(boxed(reference) or reference)
    try:
        if len(reference) > mathematics.MAX_LENGTH or not mathematics.tokenize(text):
            return "refused"
        tree = mathematics.read(text)
        return "value" if math_values.same(tree, tree) else "text"
    except Unread:
        return "text"
