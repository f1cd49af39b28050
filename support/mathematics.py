r"""Answers in LaTeX or plain text, read whole or not at all.

`read` makes a tree in which every symbol of the text has its place, or raises Unread: nothing is skipped, rounded or
guessed at. support/math_values.py compares two trees.

    "3x"                   ("mul", ("num", 3), ("sym", "x"))
    "x=5", "k \geq 2"      ("rel", "=", left, right)
    "1,2", "\{1,2\}"       ("list", a, b): in any order
    "(1,2)", "[1,2)"       ("tuple", "()", a, b): in this order
    "(0,1) \cup (2,3)"     ("union", a, b)
"""

import re
from fractions import Fraction
from math import gcd

from support.math_units import WORD, without_unit

MAX_LENGTH = 500  # characters of a text, and with it the size of its tree
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
_REWRITES = [
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|big|Big|displaystyle|quad|qquad)(?![a-zA-Z])|(?<!\\)\\[,;:! ()\[\]]|~|\\?\$"), " "),
    (re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)(?:\s?[CF]$)?"), " "),  # degrees
    (re.compile(r"\^\s?\{((?:\s?\\prime)+)\s?\}"), lambda m: "'" * m[1].count("prime")),
    (re.compile(r",?\s(?:and|or)\s|,?\s?\\text\{\s?(?:and|or)\s?\}"), " , "),
    (re.compile(r"\\[lr]vert(?![a-zA-Z])"), "|"),
    (re.compile(r"(?<![a-zA-Z])np\.(?=[a-z])"), ""),  # Minerva's np.arcsin
]
_PERCENT = re.compile(r"\\?%\s?(?=,|$)")
_TOKEN = re.compile(
    r"(?P<thousands>(?<!,)[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!,?\d))"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\d.]))?)"
    rf"|(?P<word>{WORD})|\\[a-zA-Z]+|\\.|(?P<letters>[a-zA-Z]+)|\S",
    re.ASCII,
)


def clean(text: str) -> str:
    r"""The text without what carries no value ($, \left, spacing, degrees); a blank stays between what it parted."""
    text = " ".join(text.translate(_UNICODE).split())
    if r"\begin" not in text:  # a doubled backslash that is no new row
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    text = _THOUSANDS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(". ")


def tokenize(text: str) -> list[str]:
    """Tokens of a cleaned text: numbers, commands, letters one by one (words and names of functions whole)."""
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
    text = re.sub(WORD, r" \1 ", text)
    return "".join(text.split()).casefold() if re.fullmatch(r"[a-zA-Z ]+", text) else ""


# -------------------------------------------------------------------------------------------------- tokens to a tree

FUNCTIONS = set("sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan asin acos atan ln log exp sqrt".split())
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi "
    "omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega hbar ell infty".split()
)
_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\lt": "<", r"\gt": ">"} | {
    rf"\{name}": sign
    for sign, names in (("<=", "le leq leqslant"), (">=", "ge geq geqslant"))
    for name in names.split()
}
_STARTS = ("(", "[", "{", r"\pi", r"\frac", r"\sqrt", r"\binom", r"\lfloor", r"\lceil")  # of a factor
_ACCENTS = (r"\dot", r"\ddot", r"\hat", r"\bar", r"\vec", r"\tilde")
_CLOSERS = {"(": ")]", "[": ")]", r"\{": (r"\}",)}


def _is_number(token: str) -> bool:
    return token[:1].isascii() and (token[:1].isdecimal() or token[:1] == "." and len(token) > 1)


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
        f, opening, x, closing, sign = [*self.tokens[self.at : self.at + 5], "", "", "", "", ""][:5]
        if opening + closing + sign != "()=" or not (_is_letter(f) and _is_letter(x)):
            return None
        self.at += 4
        return ("sym", f"{f}({x})")

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
            if self.peek() in ("*", r"\cdot", r"\times"):
                self.take()
                result = ("mul", result, self.factor())
            elif self.peek() in ("/", r"\div"):
                self.take()
                result = ("div", result, self.factor())
            elif self.continues(result):
                result = ("mul", result, self.factor())
                if all(n[0] in ("num", "neg", "mul", "div") for n in nodes(result)):
                    raise Unread("numbers side by side")
            else:
                return result

    def continues(self, result) -> bool:
        """Whether a product goes on without a sign. Before a number it does not, but for (n-2) 2^n."""
        token = self.peek()
        if _is_number(token):
            return self.tokens[self.at - 1] == ")" and any(n[0] == "sym" for n in nodes(result))
        return _is_letter(token) or token[1:] in FUNCTIONS or token in _STARTS

    def mixed_number(self):
        r"""1 1/4, 1 \frac{1}{4}: an integer and a fraction below 1."""
        whole, start = self.peek(), self.at
        if not _is_integer(whole):
            return None
        self.take()
        fraction = None
        if self.peek() == r"\frac":
            fraction = self.factor()
        elif _is_integer(self.peek()) and self.peek(1) == "/" and _is_integer(self.peek(2)):
            fraction = ("div", self.factor(), self.take("/") and self.factor())
        if not fraction or any(part[0] != "num" for part in fraction[1:]):
            self.at = start
            return None
        if fraction[1][1] >= fraction[2][1] or whole.startswith("0"):
            raise Unread("a number and a fraction that make no mixed number")
        return ("add", ("num", Fraction(whole)), fraction)

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
        if _is_number(token) and len(token) > 1:
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
        if token in _ACCENTS:
            return self.symbol(token + "".join(self.group()))
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
        while _is_letter(self.peek()) or self.peek() in (r"\pi", r"\frac"):
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
    if reader.peek():  # a symbol is left over
        raise Unread(reader.peek())
    return items[0] if len(items) == 1 else ("list", *items)


def is_number(tree) -> bool:
    r"""12, -3, 1/2, 1 1/2, 3e8, 3 \times 10^8: a number that needs no working out, as 36/2 does."""
    match tree:
        case ("num", _):
            return True
        case ("neg", x):
            return is_number(x)
        case ("div", ("num", x), ("num", y)) | ("add", ("num", _), ("div", ("num", x), ("num", y))):
            return x.denominator == y.denominator == 1 < y and gcd(int(x), int(y)) == 1
        case ("mul", ("num", _) as x, ("pow", ("num", ten), power)):
            return ten == 10 and is_number(x) and is_number(power)
    return False


def nodes(tree):
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from nodes(part)
