"""Whether two trees of support/mathematics.py have the same value.

Rationals are compared exactly, everything else with 250 digits of which 150 must agree, letters by putting the same
random numbers in their places. Numbers are kept within MAX_BITS, values with digits behind the last within 1e-40 and
1e40 (so that all digits count): time and memory are bounded, and what lies outside is Unread.
"""

import math
import random
from fractions import Fraction

import mpmath

from support.mathematics import Unread, nodes

MAX_BITS = 8_000  # of a rational number
_FUNCTIONS = {
    name: getattr(mpmath, name) for name in "sin cos tan cot sec csc sinh cosh tanh asin acos atan exp".split()
} | {"ln": mpmath.log, "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan}


def _point(name: str, k: int, steps: bool, signs: bool) -> Fraction:
    """The k-th number in the place of a letter. Where values go in steps: 1 to 12 first, then of every size."""
    draw = random.Random(f"{name} {k}")
    if not steps:
        value = Fraction(draw.randint(999, 9999), 3001)
    elif k < 12:
        value = Fraction((k + random.Random(name).randrange(12)) % 12 + 1)
    else:
        value = Fraction(draw.randint(1, 10 ** (k // 4)), draw.choice((1, 2, 3)))
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
        degree = min(y.denominator, 64)
        root = Fraction(*(round(mpmath.root(n, degree)) for n in (x.numerator, x.denominator)))
        if degree < 64 and root**degree == x:
            return _exact_power(root, y.numerator)
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
    result = _FUNCTIONS[name](value)
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
    all_nodes = [node for tree in trees for node in nodes(tree)]
    steps, signs = (any(n[0] in names for n in all_nodes) for names in (("floor", "ceil"), ("abs",)))
    letters = any(n[0] == "sym" or n[:2] == ("call", "log") for n in all_nodes)
    found, rounds = [], 1 if not letters else 28 if steps or signs else 4
    for k in range(rounds):
        try:
            found.append([_evaluate(tree, lambda name, k=k: _point(name, k, steps, signs)) for tree in trees])
        except Unread:
            if not steps or k - len(found) > 12:  # 2^n of a large n among many points
                raise
    return found


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
