"""Where problems come from: records of published sets, rules that generate them, the text that comes with Python.

summary squad gsm8k mathematics      a record of a file or of the hub -> its Example
addition written_addition countdown  all problems of a generated set, the same ones in the same order everywhere:
                                     (what decides the split, Example); what has the same key stays in one split
"""

import hashlib
import itertools
import re
from collections.abc import Iterator

from support.grading import Example, as_text

# A record without a text gets no prompt, and is left out. The cue stands behind the text: where that is too long for
# the context, it is cut from the left and keeps its cue.


def summary(row: dict) -> Example:
    text, short = row["document" if "document" in row else "dialogue"].strip(), row["summary"].strip()
    return Example(text and f"{text}\nTL;DR:", f" {short}", (short,))


def squad(row: dict) -> Example:
    answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]  # the hub's form, ours
    answers, context, question = texts_of(answers) or ("",), row["context"].strip(), row["question"].strip()
    return Example(question and f"{context}\nQuestion: {question}\nAnswer:", f" {answers[0]}", answers)


def gsm8k(row: dict) -> Example:
    # "<<48/2=24>>" are marks for a calculator that no model here has
    solution, mark, final = re.sub(r"<<[^<>]*>>", "", row["answer"]).rpartition("####")
    question, final = row["question"].strip(), final.strip() if mark else ""
    return Example(question and f"Question: {question}\nAnswer:", f" {solution.strip()}\n#### {final}", (final,))


def mathematics(row: dict) -> Example:
    problem, answer = row["problem"].strip(), as_text(row["answer"])
    references = (answer, *texts_of(row.get("answer_variants") or []))
    return Example(problem and f"Problem: {problem}\nAnswer in \\boxed{{}}:", f" \\boxed{{{answer}}}", references)


def texts_of(value) -> tuple[str, ...]:
    """The texts and numbers of a list, empty ones left out. ValueError for a text: its letters are no answers."""
    texts = [as_text(v) for v in value] if isinstance(value, list | tuple) else [None]
    if None in texts:
        raise ValueError(f"expected a list of texts, got {value!r:.80}")
    return tuple(filter(None, texts))


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


def pydocs(split: str) -> str:
    """The help topics that come with CPython (the text differs a little between Python versions).

    Of ten topics in sorted order the first goes to the test set, the sixth to the validation set. Many topics repeat
    whole paragraphs of others ("compound" holds "for", "if", ...): a paragraph stays only where it stands first.
    """
    from pydoc_data.topics import topics

    seen, documents = set(), []
    for position, name in enumerate(sorted(topics)):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < 60 or words not in seen:  # short ones are headings and the like
                paragraphs.append(paragraph)
                seen.add(words)
        if {0: "test", 5: "validation"}.get(position % 10, "train") == split:
            documents.append("\n\n".join(paragraphs).strip())
    return "\n\n".join(filter(None, documents)) + "\n"
