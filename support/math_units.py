"""Units behind a number, in words: dropped where they only name what is counted."""

import re

WORD = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname)\s?\{([^{}]*)\}"
_NO_UNITS = set(
    "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy "
    "eighty ninety hundred thousand thou million mil mill billion trillion dozen score half halves third fourth "
    "quarter fifth sixth sixes eighth tenth hundredth thousandth millionth and or not no plus minus point over divided "
    "multiplied squared cubed factorial negative double triple twice mod base sqrt root pi infinity".split()
)
_SHORT_UNITS = set(
    "kg mg cm mm km mi ft oz lb hr mph kph am pm ml kb mb gb in of per a an sq cu pt qt yd yr hz ev".split()
)
_UNIT = re.compile(rf"(?:{WORD}\s?(?:\^\s?(?:\{{-?\d\}}|\d))?\s?)+$")
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
    names = re.findall(WORD, words)
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
