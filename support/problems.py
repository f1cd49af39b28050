"""Generated tasks: each function yields all problems of its set, the same ones in the same order everywhere.

A problem is (what decides its split, its Example): whatever has the same key stays in one split.
"""

import hashlib
import itertools
from collections.abc import Iterator

from support.grading import Example


def addition() -> Iterator[tuple[str, Example]]:
    """The 10,000 sums of two numbers below 100: (what decides the split, example). a + b and b + a stay together."""
    for a, b in itertools.product(range(100), repeat=2):
        yield f"{min(a, b)}+{max(a, b)}", Example(f"{a}+{b}=", str(a + b), (str(a + b),))


def written_addition() -> Iterator[tuple[str, Example]]:
    """20,000 sums of two numbers of eight digits, worked out from the right: "12+89=" -> "2+9+0=11;1+8+1=10;#101".

    A step is digit + digit + carry = two digits. The reward wants the whole answer: for the sum alone, a policy would
    drop the working, and with it the 80 tokens that the set is there for.
    """
    for i in range(20_000):
        digest = int.from_bytes(hashlib.sha256(f"written addition {i}".encode()).digest(), "big")
        a, b = (10**7 + digest // 10**shift % (9 * 10**7) for shift in (0, 20))
        steps, carry = [], 0
        for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
            total = int(x) + int(y) + carry
            steps.append(f"{x}+{y}+{carry}={total:02};")
            carry = total // 10
        answer = "".join(steps) + f"#{a + b}"
        yield f"{min(a, b)}+{max(a, b)}", Example(f"{a}+{b}=", answer, (answer,))


def countdown() -> Iterator[tuple[str, Example]]:
    """Three numbers from 1 to 9 in any order and a target from 1 to 99 that + - * reach using each number once.

    The answer is one of many, with the numbers in the order shown where that works; the reward takes any. The split
    is decided by the sorted numbers and the target: no problem returns in another order in another split.
    """
    operators = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for numbers in itertools.product(range(1, 10), repeat=3):
        found: dict[int, str] = {}
        for (a, b, c), p, q in itertools.product(itertools.permutations(numbers), operators, operators):
            left, right = operators[q](operators[p](a, b), c), operators[p](a, operators[q](b, c))
            found.setdefault(right if q == "*" != p else left, f"{a}{p}{b}{q}{c}")  # a product binds first
            found.setdefault(left, f"({a}{p}{b}){q}{c}")
        for target in filter(range(1, 100).__contains__, found):
            prompt = f"{numbers[0]} {numbers[1]} {numbers[2]}={target}:"
            yield f"{sorted(numbers)}={target}", Example(prompt, found[target], (str(target),), numbers)
