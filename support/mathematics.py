r"""Answers in LaTeX or plain text, read whole or not at all.

`read` makes a tree in which every symbol of the text has its place, or raises Unread: nothing is skipped, rounded or
guessed at. `same` compares two trees by value: rationals exactly, everything else with 250 digits, letters by putting
the same random numbers in their places. Both are bounded in time and memory whatever the text says.

    "3x"                   ("mul", ("num", 3), ("sym", "x"))
    "x=5", "k \geq 2"      ("rel", "=", left, right)
    "1,2", "\{1,2\}"       ("list", a, b): in any order
    "(1,2)", "[1,2)"       ("tuple", "()", a, b): in this order
    "(0,1) \cup (2,3)"     ("union", a, b)
"""

import math
import random
import re
from fractions import Fraction

import mpmath

MAX_LENGTH = 500  # characters of a text, and with it the size of its tree
MAX_BITS = 8_000  # of a rational number
MAX_DEPTH = 40  # of brackets in brackets


class Unread(Exception):
    """This text, or this value, is not one that can be compared."""


# -------------------------------------------------------------------------------------------------- text to tokens

_UNICODE = str.maketrans(
    {c: f" {name} " for c, name in zip("×·÷π∞≤≥∪", r"\times \cdot / \pi \infty \le \ge \cup".split(), strict=True)}
    | {"−": "-", "–": "-", "°": r"^\circ", "′": "'", "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,"}
    | dict.fromkeys("€£¥", " ")
)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|,\\!|\\,)\s?\d{3})+(?!\d)")  # separators nobody misreads
_WORD = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname)\s?\{([^{}]*)\}"
_REWRITES = [
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|big|Big|displaystyle|quad|qquad)(?![a-zA-Z])|(?<!\\)\\[,;:! ()\[\]]|~|\\?\$"), " "),
    (re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)(?:\s?[CF]$)?"), " "),  # degrees
    (re.compile(r"\^\s?\{((?:\s?\\prime)+)\s?\}"), lambda m: "'" * m[1].count("prime")),
    (re.compile(r",?\s(?:and|or)\s|,?\s?\\text\{\s?(?:and|or)\s?\}"), " , "),
    (re.compile(r"\\[lr]vert(?![a-zA-Z])"), "|"),
    (re.compile(r"(?<![a-zA-Z])np\.(?=[a-z])"), ""),  # Minerva's np.arcsin
]
_UNIT = re.compile(rf"(?:{_WORD}\s?(?:\^\s?(?:\{{-?\d\}}|\d))?\s?)+$")
_PERCENT = re.compile(r"\\?%\s?(?=,|$)")
_TOKEN = re.compile(
    r"(?P<thousands>(?<!,)[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!,?\d))"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\d.]))?)"
    rf"|(?P<word>{_WORD})|\\[a-zA-Z]+|\\.|(?P<letters>[a-zA-Z]+)|\S",
    re.ASCII,
)


def clean(text: str) -> str:
    r"""The text without what carries no value ($, \left, spacing, degrees); a blank stays between what it parted."""
    text = text.translate(_UNICODE)
    if r"\begin" not in text:  # a doubled backslash that is no new row
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    text = _THOUSANDS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(". ")


def tokenize(text: str) -> list[str]:
    """Tokens of a cleaned text: numbers, commands, letters one by one (words and names of functions whole).

    A blank parts two numbers and says nothing else.
    """
    tokens, depth, at = [], 0, 0
    while at < len(text):
        if text[at] == " ":
            at += 1
            continue
        match = _TOKEN.match(text, at)
        if match is None:  # a lone backslash at the end
            raise Unread(text)
        at, token, kind = match.end(), match[0], match.lastgroup
        if kind == "thousands" and depth:  # in brackets a comma parts: (312,123,231)
            match = re.compile(r"\d+").match(text, match.start())
            at, token = match.end(), match[0]
        depth += (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}"))
        if kind == "thousands":
            tokens.append(token.replace(",", "") if not depth else token)
        elif match.re is _TOKEN and match["word"]:
            tokens += tokenize(match[match.re.groupindex["word"] + 1].strip())
        elif kind == "letters" and len(token) < 4 and token not in FUNCTIONS and token != "pi":
            tokens += token
        else:
            tokens.append(rf"\{token}" if kind == "letters" and (token in FUNCTIONS or token == "pi") else token)
    return tokens


def same_text(a: list[str], b: list[str]) -> bool:
    r"""Whether the tokens are the same; x^{2} is x^2."""
    a, b = (re.sub(r"\{\n(\S+)\n\}", r"\1", "\n".join(tokens)) for tokens in (a, b))
    return a == b


def words_of(text: str) -> str:
    """The letters of an answer in words, however it is capitalised, spaced and set; "" for anything else."""
    text = re.sub(_WORD, r" \1 ", text)
    return "".join(text.split()).casefold() if re.fullmatch(r"[a-zA-Z ]+", text) else ""


# -------------------------------------------------------------------------------------------------- tokens to a tree

_REALS = "sin cos tan cot sec csc sinh cosh tanh".split()
FUNCTIONS = {
    **{name: getattr(mpmath, name) for name in _REALS},
    **{f"arc{name}": getattr(mpmath, f"a{name}") for name in ("sin", "cos", "tan")},
    **{f"a{name}": getattr(mpmath, f"a{name}") for name in ("sin", "cos", "tan")},
    "ln": mpmath.log,
    "log": mpmath.log,  # of a base that is not said: see _evaluate
    "exp": mpmath.exp,
    "sqrt": mpmath.sqrt,
}
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi "
    "omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega hbar ell infty".split()
)
_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\lt": "<", r"\gt": ">"} | {
    rf"\{name}": sign
    for sign, names in (("<=", "le leq leqslant"), (">=", "ge geq geqslant"))
    for name in names.split()
}
_CLOSERS = {"(": ")]", "[": ")]", r"\{": (r"\}",)}


def _is_number(token: str) -> bool:
    return token[0] in "0123456789" or token[0] == "." and len(token) > 1


def _is_integer(token: str) -> bool:
    return token.isascii() and token.isdecimal()


def _is_letter(token: str) -> bool:
    return (len(token) == 1 and token.isascii() and token.isalpha()) or token[1:] in _GREEK and token[0] == "\\"


class _Reader:
    """Recursive descent; each method reads one level of precedence from self.tokens[self.at] on."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth, self.sign = tokens, 0, 0, ""

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise Unread(token)
        self.at += 1
        return token

    def items(self) -> list:
        """What stands between commas; one with +- is two."""
        found = []
        while True:
            start, self.sign = self.at, ""
            found.append(self.relation())
            if self.sign:
                if self.tokens[start : self.at].count(r"\pm") > 1:
                    raise Unread(r"\pm")
                self.at, self.sign = start, "-"
                found.append(self.relation())
                self.sign = ""
            if self.peek() not in (",", ";"):
                return found
            self.take()

    def relation(self):
        name = self.name_of_function()
        left = name or self.union()
        if self.peek() == r"\in" and left[0] == "sym":
            self.take()
            return self.union()
        sign = _RELATIONS.get(self.peek())
        if sign is None:
            return left
        self.take()
        return ("rel", sign, left, self.union())  # a second sign is left over, and so unread

    def name_of_function(self):
        r"""The f(x) of "f(x) = ..."."""
        head = self.tokens[self.at : self.at + 5]
        if (
            len(head) == 5
            and _is_letter(head[0])
            and _is_letter(head[2])
            and head[1::2] == ["(", ")"]
            and head[4] == "="
        ):
            self.at += 4
            return ("sym", "".join(head[:4]))
        return None

    def union(self):
        parts = [self.sum()]
        while self.peek() == r"\cup":
            self.take()
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("union", *parts)

    def sum(self):
        total = None
        while total is None or self.peek() in ("+", "-", r"\pm"):
            sign = self.take() if self.peek() in ("+", "-", r"\pm") else "+"
            if sign == r"\pm":
                sign = self.sign = self.sign or "+"
            term = self.product()
            term = ("neg", term) if sign == "-" else term
            total = term if total is None else ("add", total, term)
        return total

    def product(self):
        result = self.mixed_number() or self.factor()
        while True:
            token = self.peek()
            if token in ("*", r"\cdot", r"\times"):
                self.take()
                result = ("mul", result, self.factor())
            elif token in ("/", r"\div"):
                self.take()
                result = ("div", result, self.factor())
            elif token and (_is_letter(token) or token in ("(", "[", "{", r"\pi", r"\frac", r"\sqrt", r"\binom")):
                result = ("mul", result, self.factor())
            elif token[1:] in FUNCTIONS or token in (r"\lfloor", r"\lceil"):
                result = ("mul", result, self.factor())
            elif (
                _is_number(token or " ")
                and self.tokens[self.at - 1] == ")"
                and any(n[0] == "sym" for n in _nodes(result))
            ):
                result = ("mul", result, self.factor())  # (n-2) 2^n
            else:  # another number is left over: numbers side by side are no product
                return result

    def mixed_number(self):
        r"""1 1/4, 1 \frac{1}{4}: an integer and a fraction below 1."""
        whole, start = self.peek(), self.at
        if not _is_integer(whole):
            return None
        self.take()
        if self.peek() == r"\frac":
            fraction = self.factor()
        elif _is_integer(self.peek()) and self.peek(1) == "/" and _is_integer(self.peek(2)):
            fraction = ("div", self.factor(), self.take("/") and self.factor())
        else:
            self.at = start
            return None
        if fraction[0] == "div" and fraction[1][0] == fraction[2][0] == "num":
            if fraction[1][1] >= fraction[2][1]:
                raise Unread("an improper fraction beside a number")
            return ("add", ("num", Fraction(whole)), fraction)
        self.at = start
        return None

    def factor(self):
        """An atom with its powers and factorials."""
        base = self.atom()
        while self.peek() in ("^", "!"):
            if self.take() == "!":
                base = ("factorial", base)
            else:
                base = ("pow", base, self.exponent())
                if self.peek() == "^":
                    raise Unread("a double superscript")
        return base

    def exponent(self):
        if self.peek() == "-":
            self.take()
            return ("neg", self.atom())
        return self.atom()

    def argument(self):
        r"""{...} or one character, as in \frac43 and \sqrt2."""
        token = self.peek()
        if _is_number(token or " ") and len(token) > 1:
            if len(token) != 2 or not _is_integer(token):
                raise Unread(token)
            self.tokens[self.at : self.at + 1] = list(token)
        return self.atom()

    def atom(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unread("too deep")
        try:
            return self.atom_within()
        finally:
            self.depth -= 1

    def atom_within(self):
        token = self.take()
        if _is_number(token):
            if self.peek() == "_":  # another base
                raise Unread(token)
            return ("num", Fraction(token))
        if token == r"\pi" or token in "ei":
            return ("const", token)
        if _is_letter(token):
            return self.symbol(token)
        if token in ("(", "[", r"\{"):
            return self.bracket(token)
        if token in ("{", "|", r"\lfloor", r"\lceil"):
            inner = self.sum()
            self.take({"{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}[token])
            return inner if token == "{" else ({"|": "abs"}.get(token, token[2:]), inner)
        if token in (r"\frac", r"\binom"):
            return ({r"\frac": "div"}.get(token, "binom"), self.argument(), self.argument())
        if token[0] == "\\" and token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token == r"\begin":
            return self.matrix()
        raise Unread(token)

    def group(self) -> list[str]:
        """The tokens of {...}, braces left out, or the one token."""
        if self.peek() != "{":
            return [self.take()]
        start, depth = self.at + 1, 0
        while True:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
            if depth == 0:
                return self.tokens[start : self.at - 1]

    def symbol(self, name: str):
        if self.peek() == "_":
            self.take()
            name += "_" + "".join(self.group())
        if self.peek() == "'":  # a derivative
            raise Unread("'")
        if self.peek() == "(":  # n(n-1) is a product; x(t), I(0), f(x+1) are values of functions
            inner = self.tokens[self.at + 1 :]
            inner = inner[: inner.index(")")] if ")" in inner else inner
            if name[0] in "fghuFGH" or not {"+", "-"} & set(inner[1:]):
                raise Unread(name)
        return ("sym", name)

    def bracket(self, opening: str):
        sign = self.sign
        items = self.items()
        self.sign = sign or self.sign
        closing = self.take(*_CLOSERS[opening])
        if opening == r"\{":
            return ("list", *items)
        if len(items) > 1:
            return ("tuple", opening + closing, *items)
        if opening + closing not in ("()", "[]") or items[0][0] == "rel":
            raise Unread(opening)
        return items[0]

    def function(self, name: str):
        if name == "sqrt":
            if self.peek() != "[":
                return ("pow", self.argument(), ("num", Fraction(1, 2)))
            self.take()
            index = self.sum()
            self.take("]")
            return ("pow", self.argument(), ("div", ("num", Fraction(1)), index))
        power = base = None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                power = self.exponent()
            elif name == "log":
                base = self.argument()
            else:
                raise Unread("_")
        if power and power[0] == "neg":  # sin^{-1} is the inverse, not 1 / sin
            raise Unread("^")
        value = self.factor() if self.peek() in ("(", "{", "[") else self.plain_product()
        value = ("div", ("call", "ln", value), ("call", "ln", base)) if base else ("call", name, value)
        return ("pow", value, power) if power else value

    def plain_product(self):
        r"""The 2x of \sin 2x: numbers, letters and fractions up to the next sign, bracket or function."""
        result = self.factor()
        while _is_letter(self.peek() or " ") or self.peek() in (r"\pi", r"\frac"):
            result = ("mul", result, self.factor())
        return result

    def matrix(self):
        environment = self.group()
        if "".join(environment) not in ("pmatrix", "bmatrix", "matrix"):
            raise Unread("".join(environment))
        rows = [[self.sum()]]
        while self.peek() != r"\end":
            if self.take("&", r"\\") == "&":
                rows[-1].append(self.sum())
            elif self.peek() != r"\end":
                rows.append([self.sum()])
        self.take()
        if self.group() != environment:
            raise Unread(r"\end")
        return ("tuple", "matrix", *(("tuple", "row", *row) for row in rows))


def _is_derivative(tokens: list[str]) -> bool:
    r"""\frac{dx}{dt}, \frac{d^2 x}{dt^2}: two d, each before a letter; d would cancel."""
    text = " ".join(tokens)
    return len(re.findall(r"(?<!\S)d (?:\^ (?:\d|\{ \d \}) )?(?:[a-zA-Z]|\\[a-z]+)(?!\S)", text)) > 1


def read(text: str):
    """The tree of a cleaned text; Unread where one symbol of it has no place."""
    if len(text) > MAX_LENGTH:
        raise Unread("too long")
    text = _PERCENT.sub("", without_unit(text)).strip()
    tokens = tokenize(text)
    if not tokens or _is_derivative(tokens) or re.fullmatch(r"[a-zA-Z ]{2,}", text):
        raise Unread(text)
    if re.search(r"(?:[\d)]|(?<!matrix)\}) [-+][\d.(\\]", text):  # 3 -5: a difference, or two numbers side by side?
        raise Unread(text)
    reader = _Reader(tokens)
    try:
        items = reader.items()
    except RecursionError:
        raise Unread("too deep") from None
    if reader.peek():
        raise Unread(reader.peek())
    return items[0] if len(items) == 1 else ("list", *items)


# ------------------------------------------------------------------------------------------------------------- units

_NO_UNITS = set(
    "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy "
    "eighty ninety hundred thousand thou million mil mill billion trillion dozen score half halves third fourth "
    "quarter fifth sixth sixes eighth tenth hundredth thousandth millionth and or not no plus minus point over divided "
    "multiplied squared cubed factorial negative double triple twice mod base sqrt root pi infinity".split()
)
_SHORT_UNITS = set(
    "kg mg cm mm km mi ft oz lb hr mph kph am pm ml kb mb gb in of per a an sq cu pt qt yd yr hz ev".split()
)
_QUANTITY = re.compile(r"(?P<value>.*[\d}])(?P<gap> ?)(?P<words>[a-zA-Z]+(?:[ /-][a-zA-Z]+){0,5})")


def _are_units(words: str) -> bool:
    """Whether words only name what is counted: "years old", "kg per day"; not "thousand", "and a half", "x"."""
    words = re.findall(r"[a-zA-Z]+", words.lower())
    return bool(words) and all(
        (len(w) > 2 or w in _SHORT_UNITS or w[:-1] in _SHORT_UNITS) and not {w, w[:-1]} & _NO_UNITS for w in words
    )


def changes_number(word: str) -> bool:
    """Whether a word beside a number makes another of it: minus 5, 5 thousand, 18 and a half."""
    word = word.strip(".,;:!?()*\"'")
    return bool({word, word[:-1]} & _NO_UNITS)


def without_unit(text: str) -> str:
    r"""Without a unit in \text{...} behind a value: 864 \mbox{ inches}^2."""
    unit = _UNIT.search(text)
    if not unit or not re.search(r"[\w})\]]\s?$", text[: unit.start()]):
        return text
    words = re.sub(r"\^\s?(?:\{-?\d\}|\d)", "", unit[0])
    names = re.findall(_WORD, words)
    if unit[0].startswith(r"\mathrm") and any(len(n.strip(" ~")) < 2 for n in names):  # 3\mathrm{i}
        return text
    one = {"m", "s", "g", "l", "h", "k", "c", "f", "j", "n", "w", "v", "a", "b"}
    if all(w.lower() in one or _are_units(w) for n in names for w in re.findall(r"[a-zA-Z]+", n)) and any(names):
        return text[: unit.start()].strip()
    return text


def without_words(text: str) -> str:
    """Without words behind a number: "18 years old", "5kg". For answers where a number is asked for."""
    match = _QUANTITY.fullmatch(text)
    if match and _are_units(match["words"]) and (match["gap"] or match["words"].lower() in _SHORT_UNITS):
        return match["value"]
    return text


# ------------------------------------------------------------------------------------------------------------ values


def is_number(tree) -> bool:
    """12, -3, 1/2, 1 1/2, 3e8, 3 \times 10^8: a number that needs no working out."""
    match tree:
        case ("num", _):
            return True
        case ("neg", x):
            return is_number(x)
        case ("div", x, ("num", _)) | ("add", ("num", _), ("div", ("num", _) as x, ("num", _))):
            return is_number(x)
        case ("mul", ("num", _) as x, ("pow", ("num", ten), power)):
            return ten == 10 and is_number(x) and is_number(power)
    return False


def _nodes(tree):
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from _nodes(part)


def _point(name: str, k: int, steps: bool, signs: bool) -> Fraction:
    """The k-th number in the place of a letter; among them many integers where values go in steps."""
    draw = random.Random(f"{name} {k}")
    value = (
        Fraction(draw.randint(1, 400), draw.choice((1, 1, 2, 3))) if steps else Fraction(draw.randint(999, 9999), 3001)
    )
    return -value if signs and draw.random() < 0.5 else value


def _exact(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Unread("a number too large")
    return value


def _exact_power(base: Fraction, power: int) -> Fraction:
    if abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
        raise Unread("a number too large")
    if base == 0 and power <= 0:
        raise Unread("0 to the 0")
    return base**power


def _bounded(value):
    """Values with digits behind the last have the same number of them that count: neither tiny nor huge."""
    size = abs(value)
    if not mpmath.isfinite(value) or size > mpmath.mpf(10) ** 40 or 0 < size < mpmath.mpf(10) ** -40:
        raise Unread("a value too large or too small")
    return value


def _inexact(value):
    if isinstance(value, Fraction):
        return _bounded(mpmath.mpf(value.numerator) / value.denominator)
    return value


def _add(x, y):
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _exact(x + y)
    x, y = _inexact(x), _inexact(y)
    total = x + y  # what rounding leaves of a difference is 0
    return Fraction(0) if abs(total) <= mpmath.mpf(10) ** -150 * abs(x) else _bounded(total)


def _power(x, y):
    if isinstance(y, Fraction) and y.denominator == 1 and isinstance(x, Fraction):
        return _exact_power(x, int(y))
    if isinstance(x, Fraction) and isinstance(y, Fraction) and x > 0:  # sqrt(4) is 2, exactly
        roots = (
            [round(mpmath.root(n, y.denominator)) for n in (x.numerator, x.denominator)] if y.denominator < 64 else [0]
        )
        if all(r and r**y.denominator == n for r, n in zip(roots, (x.numerator, x.denominator), strict=False)):
            return _exact_power(Fraction(*roots), y.numerator)
    if x == 0:
        if isinstance(y, Fraction) and y > 0:
            return Fraction(0)
        raise Unread("0 to the 0")
    x, y = _inexact(x), _inexact(y)
    if abs(y * mpmath.log(x)) > 100:
        raise Unread("a value too large or too small")
    return _bounded(mpmath.power(x, y))


def _divide(x, y):
    if y == 0:
        raise Unread("division by 0")
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _exact(x / y)
    return _bounded(_inexact(x) / _inexact(y))


def _call(name: str, x):
    value = _inexact(x)
    if abs(value) > 90 and name not in ("ln", "log"):
        raise Unread("an argument too large")
    if name in ("ln", "log") and value == 0:
        raise Unread("the logarithm of 0")
    result = FUNCTIONS[name](value)
    if abs(result) < mpmath.mpf(10) ** -150:  # sin(pi)
        return Fraction(0)
    return _bounded(result)


def _evaluate(tree, at):
    """The value of a tree; `at` gives a letter's. A Fraction wherever it is rational for sure."""
    match tree:
        case ("num", value):
            return _exact(value)
        case ("sym", name):
            return at(name)
        case ("const", name):
            return {"e": mpmath.e, "i": mpmath.mpc(0, 1)}.get(name, mpmath.pi) * mpmath.mpf(1)
        case ("neg", x):
            return -_evaluate(x, at)
        case ("add", x, y):
            return _add(_evaluate(x, at), _evaluate(y, at))
        case ("mul", x, y):
            x, y = _evaluate(x, at), _evaluate(y, at)
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                return _exact(x * y)
            return Fraction(0) if x == 0 or y == 0 else _bounded(_inexact(x) * _inexact(y))
        case ("div", x, y):
            return _divide(_evaluate(x, at), _evaluate(y, at))
        case ("pow", x, y):
            return _power(_evaluate(x, at), _evaluate(y, at))
        case ("call", "log", x):  # without its base known, log 2 is neither ln 2 nor log_10 2; log 2 / log 3 is known
            return _divide(_call("ln", _evaluate(x, at)), at(r"\log"))
        case ("call", name, x):
            return _call(name, _evaluate(x, at))
        case ("abs", x):
            return abs(_evaluate(x, at))
        case ("floor" | "ceil" as name, x):
            value = _evaluate(x, at)
            if not isinstance(value, Fraction | mpmath.mpf):
                raise Unread("a step of a complex number")
            step = int(mpmath.floor(_inexact(value))) if not isinstance(value, Fraction) else value.__floor__()
            return Fraction(step if name == "floor" or value == step else step + 1)
        case ("factorial", x):
            return _binomial(_evaluate(x, at), None)
        case ("binom", x, y):
            return _binomial(_evaluate(x, at), _evaluate(y, at))
    raise Unread(tree[0])


def _binomial(n, k):
    """n! where k is None. Of integers it is exact; of the random numbers in letters' places, the gamma function's."""
    values = [v for v in (n, k) if v is not None]
    whole = all(isinstance(v, Fraction) and v.denominator == 1 and v >= 0 for v in values)
    if any(not isinstance(v, Fraction) or abs(v) > (900 if whole else 40) for v in values):
        raise Unread("a factorial too large")
    if whole:
        return _exact(Fraction(math.factorial(int(n)) if k is None else math.comb(int(n), int(k))))
    return _bounded(mpmath.factorial(_inexact(n)) if k is None else mpmath.binomial(_inexact(n), _inexact(k)))


def _ratios(pairs) -> bool:
    """Whether the second numbers are one multiple, not 0, of the first ones."""
    pairs = [(x, y) for x, y in pairs if x != 0 or y != 0]  # N = floor(x) may hold at a random point
    if len(pairs) < 3 or any(x == 0 or y == 0 for x, y in pairs):
        return False
    ratios = [_divide(x, y) for x, y in pairs]
    return all(_add(r, -ratios[0]) == 0 for r in ratios)


def _values(trees) -> list[list]:
    """Values of the trees at the same points, a list a point."""
    nodes = [node for tree in trees for node in _nodes(tree)]
    steps, signs = any(n[0] in ("floor", "ceil") for n in nodes), any(n[0] == "abs" for n in nodes)
    letters = any(n[0] == "sym" or n[:2] == ("call", "log") for n in nodes)
    rounds = 1 if not letters else 24 if steps or signs else 4
    return [[_evaluate(t, lambda n, k=k: _point(n, k, steps, signs)) for t in trees] for k in range(rounds)]


def same(a, b) -> bool:
    """Whether two trees have the same value; Unread where that cannot be said."""
    try:
        with mpmath.workdps(250):
            return _same(a, b)
    except (ArithmeticError, ValueError, RecursionError) as error:  # a pole of the gamma function, a very long sum
        raise Unread(type(error).__name__) from None


def _same(a, b) -> bool:
    if a[0] == b[0] in ("list", "union"):
        left = list(b[1:])
        for item in a[1:]:
            found = next((i for i, other in enumerate(left) if _same(item, other)), None)
            if found is None:
                return False
            del left[found]
        return not left
    if a[0] == b[0] == "tuple":
        return a[1] == b[1] and len(a) == len(b) and all(_same(x, y) for x, y in zip(a[2:], b[2:], strict=True))
    if a[0] == b[0] == "rel":
        return _same_relation(a, b)
    for one, other in ((a, b), (b, a)):  # x = 5 answers what 5 answers
        if one[:2] == ("rel", "=") and one[2][0] == "sym":
            return _same(one[3], other)
        if one[0] == "list" and len(one) == 2:
            return _same(one[1], other)
    if {a[0], b[0]} & {"list", "union", "tuple", "rel"}:
        return False
    return all(_add(x, -y) == 0 for x, y in _values([a, b]))


def _same_relation(a, b) -> bool:
    signs = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
    sides = [("add", tree[2], ("neg", tree[3])) for tree in (a, b)]
    pairs = _values(sides)
    if not _ratios(pairs):
        return False
    if a[1] == "=" or b[1] == "=":
        return a[1] == b[1]
    ratio = next(_divide(x, y) for x, y in pairs if y != 0)
    return b[1] == (a[1] if ratio > 0 else signs[a[1]])
