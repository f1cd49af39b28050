"""Data sets, tokenizers, rewards and metrics: one table (DATASETS), read from the hub or from local files.

    text sets   pydocs, wikitext2: load_text -> one long row of tokens; the metric is perplexity
    task sets   the others:        load_examples -> prompt, answer, references; a rule scores what a model writes

A row says how a record becomes an `Example` (support/problems.py), and how a response is scored (support/grading.py).

train, validation and test never share a problem. Where a published set has no split of its own for one of them,
`split_of` carves it out of another by a hash of the problem (the question's context, the document), so the division is
the same on every machine, for every seed, and for a part of the set as for the whole.
"""

import hashlib
import json
import os
import platform
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from support import grading, problems
from support.errors import UserError, as_user_error, nearest
from support.grading import Example

SPLITS = ("train", "validation", "test")
CACHE_VERSION = 2  # raise it when the same text and tokenizer give other tokens than before


class Tokenizer:
    """A tiktoken encoding in which text is only ever text: a literal "<|endoftext|>" is not the end token."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding, self.name = encoding, encoding.name
        self.vocab_size, self.end = encoding.n_vocab, encoding.eot_token

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without the end token and without ids that a padded vocabulary may hold (>= vocab_size)."""
        return self.encoding.decode([i for i in ids if i != self.end and 0 <= i < self.vocab_size], errors="replace")


def load_tokenizer(name: str, data_dir: str | None = None) -> Tokenizer:
    """ "bytes": the 256 bytes and an end token, vocabulary 257, no download. "gpt2": GPT-2's BPE, vocabulary 50257.

    tiktoken fetches GPT-2's two vocabulary files at their first use; TIKTOKEN_CACHE_DIR, or a folder `tiktoken-cache`
    in data_dir, holds them for a machine without network.
    """
    if name == "bytes":
        ranks, end = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
        # The pattern only cuts the text into pieces; with no merges every piece becomes its bytes.
        return Tokenizer(tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens=end))
    if name != "gpt2":
        raise nearest("tokenizer", name, ("gpt2", "bytes"))
    if data_dir and Path(data_dir, "tiktoken-cache").is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(data_dir, "tiktoken-cache")))
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as error:  # requests' errors, a proxy's, a broken file: all mean that the vocabulary is not there
        raise UserError(
            f"GPT-2's vocabulary is not on this machine and could not be fetched ({_one_line(error)}): put tiktoken's "
            "files into a folder that TIKTOKEN_CACHE_DIR names, or into DIR/tiktoken-cache of --data-dir DIR, or use "
            "--tokenizer bytes"
        ) from error


def prepare(dataset: str, tokenizer: str, data_dir: str | None = None) -> Tokenizer:
    """The tokenizer of a run. Whether the set can be read this way is asked first, which needs no network."""
    if data_dir and not os.path.isdir(data_dir):
        raise UserError(f"--data-dir {data_dir}: there is no such folder")
    find_sources(get_dataset(dataset), "train", data_dir)
    return load_tokenizer(tokenizer, data_dir)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


# --------------------------------------------------------------------------------------------------------- the table


class Hub(NamedTuple):
    """Where a set is on the Hugging Face hub."""

    id: str
    splits: dict[str, str]  # our split -> the hub's
    config: str | None = None
    revision: str | None = None
    columns: dict[str, str] = {}  # field -> the hub's column, where their names differ


@dataclass(frozen=True)
class DatasetSpec:
    name: str
    kind: str  # "text" | "task"
    tokenizer: str  # the default
    max_new_tokens: int  # a sensible length of a response, in tokens of that tokenizer
    measure: Callable[[str, Example], dict[str, float]]
    reward: str  # which of the measured numbers is rewarded
    metric: str  # which one ranks samples and checkpoints ("perplexity": not measured on responses)
    example: Callable[[dict], Example] | None = None  # a record -> an Example
    fields: tuple[str, ...] = ()  # what a record must have
    key: str = ""  # the field whose hash decides the split where several come from one file; "": the prompt
    files: dict[str, str] = field(default_factory=dict)  # split -> file below --data-dir
    hub: Hub | None = None
    text: Callable[[str], str] | None = None  # an embedded text: split -> text
    problems: Callable[[], Iterator[tuple[str, Example]]] | None = None  # a generated set: all problems
    test_sets: tuple[str, ...] = ()  # sets to test on, where it has no test split itself
    test_samples: int = 0  # examples of the final evaluation, 0 = all; sets of more than 1,000 say 500
    beams: int = 1  # of beam search; 1 is greedy, unless eval_temperature is above 0
    eval_temperature: float = 0.0
    eval_top_p: float = 1.0
    samples_per_problem: int = 1  # responses to each problem, where they are sampled

    @property
    def sampled(self) -> bool:
        """Whether its responses are drawn (eval_temperature, eval_top_p), not searched for (beams)."""
        return self.eval_temperature > 0


def _splits(pattern: str, names: str = "train validation test") -> dict[str, str]:
    """The file of each split. Splits that name the same file share it: a hash of each problem decides."""
    return {split: pattern.format(name) for split, name in zip(SPLITS, names.split(), strict=False)}


_UNIGRAMS = {"measure": grading.measure_unigrams, "reward": "unigram_f1", "metric": "perplexity"}
_SUMMARY = {"measure": grading.measure_summary, "reward": "rougeL", "metric": "rouge2", "example": problems.summary}
_SQUAD = {"measure": grading.measure_squad, "reward": "f1", "metric": "f1", "example": problems.squad}
_SQUAD |= {"fields": ("context", "question", "answers")}
_EXACT = {"measure": grading.measure_exact, "reward": "accuracy", "metric": "accuracy"}
_COUNTDOWN = _EXACT | {"measure": grading.measure_countdown}
_GSM8K = _EXACT | {"measure": grading.measure_number, "example": problems.gsm8k, "fields": ("question", "answer")}
_MATH = _EXACT | {"measure": grading.measure_math, "example": problems.mathematics, "fields": ("problem", "answer")}
_MATH |= {"eval_temperature": 1.0, "eval_top_p": 0.7}  # ERPO section 5.1


def _math_test(name: str, file: str, hub: str | None, split: str = "test", samples: int = 1, **columns) -> DatasetSpec:
    where = {"files": {"test": f"math-eval/{file}.jsonl"}, "hub": hub and Hub(hub, {"test": split}, columns=columns)}
    return DatasetSpec(name, "task", "gpt2", 512, **_MATH, **where, samples_per_problem=samples)


# fmt: off
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in (
    DatasetSpec("pydocs", "text", "bytes", 64, **_UNIGRAMS, text=problems.pydocs),
    DatasetSpec("wikitext2", "text", "gpt2", 32, **_UNIGRAMS, fields=("text",),
                files=_splits("wikitext-2/wiki.{}.raw", "train valid test"),
                hub=Hub("Salesforce/wikitext", _splits("{}"), "wikitext-2-raw-v1")),
    DatasetSpec("samsum", "task", "gpt2", 64, **_SUMMARY, beams=6, files=_splits("samsum/{}.jsonl", "train val test"),
                hub=Hub("knkarthick/samsum", _splits("{}")), fields=("dialogue", "summary")),
    DatasetSpec("xsum", "task", "gpt2", 64, **_SUMMARY, beams=6, files=_splits("xsum/xsum.jsonl"), test_samples=500,
                hub=Hub("EdinburghNLP/xsum", _splits("{}"), revision="refs/convert/parquet"),
                fields=("document", "summary"), key="document"),
    DatasetSpec("squad", "task", "gpt2", 32, **_SQUAD, beams=6, key="context", test_samples=500,
                files=_splits("squad-v1.1/{}.jsonl", "train_subset train_subset dev"),
                hub=Hub("rajpurkar/squad", _splits("{}", "train train validation"))),
    DatasetSpec("gsm8k", "task", "gpt2", 256, **_GSM8K, files=_splits("gsm8k/{}.jsonl", "train train test"),
                hub=Hub("openai/gsm8k", _splits("{}", "train train test"), "main"), key="question", test_samples=500),
    DatasetSpec("deepscaler", "task", "gpt2", 512, **_MATH, key="problem",
                files=_splits("deepscaler/train_subset.jsonl", "train validation"),
                hub=Hub("agentica-org/DeepScaleR-Preview-Dataset", _splits("train", "train validation")),
                test_sets=("math500", "aime24", "aime25", "minerva", "olympiad")),
    _math_test("math500", "math500", "HuggingFaceH4/MATH-500"),
    _math_test("aime24", "aime2024", "HuggingFaceH4/aime_2024", split="train", samples=16),
    _math_test("aime25", "aime2025", "math-ai/aime25", samples=16),
    _math_test("amc", "amc", None),  # its numbers on the hub are floats, and of a set of another name
    _math_test("minerva", "minerva_math", "math-ai/minervamath", problem="question"),
    _math_test("olympiad", "olympiadbench", "math-ai/olympiadbench", problem="question", answer="final_answer"),
    DatasetSpec("addition", "task", "bytes", 4, **_EXACT, problems=problems.addition),
    DatasetSpec("countdown", "task", "bytes", 8, **_COUNTDOWN, problems=problems.countdown),
    DatasetSpec("written-addition", "task", "bytes", 84, **_EXACT, problems=problems.written_addition),
)}
# fmt: on


def get_dataset(name: str) -> DatasetSpec:
    if name not in DATASETS:
        raise nearest("data set", name, tuple(DATASETS))
    return DATASETS[name]


def split_of(key: str) -> str:
    """Eight tenths train, one validation, one test, by a hash that is the same on every machine."""
    words = " ".join(key.split())  # some sets hold a problem twice with other white space
    digit = int.from_bytes(hashlib.sha256(words.encode("utf-8", "replace")).digest()[:8], "big") % 10
    return {8: "validation", 9: "test"}.get(digit, "train")


# ---------------------------------------------------------------------------------------------------- reading records


def find_sources(spec: DatasetSpec, split: str, data_dir: str | None) -> dict[str, str]:
    """Of each split the file below data_dir, or the hub's split. UserError where `split` has none."""
    if spec.files and not spec.hub and not data_dir:
        file = next(iter(spec.files.values()))
        raise UserError(f"{spec.name} is read from files alone: --data-dir DIR reads DIR/{file}")
    if spec.hub and not spec.files and data_dir:
        raise UserError(f"{spec.name} comes from the hub alone: leave --data-dir out")
    sources = spec.files if data_dir else spec.hub.splits if spec.hub else {}
    if spec.text or spec.problems:  # made here
        sources = dict.fromkeys(SPLITS, spec.name)
    if split not in sources:
        why, names = ("is tested on", spec.test_sets) if spec.test_sets else ("has", sources or ["none"])
        raise UserError(f"{spec.name} has no {split} split: it {why} {', '.join(names)}")
    if spec.name == "wikitext2" and data_dir:  # where a folder holds no raw file, the tokenised ones, another text
        tokenised = {s: file.replace(".raw", ".tokens") for s, file in sources.items()}
        there = [any(Path(data_dir, f).exists() for f in files.values()) for files in (sources, tokenised)]
        return tokenised if there == [False, True] else sources
    return sources


def _read_file(spec: DatasetSpec, file: str, data_dir: str) -> str:
    path = Path(data_dir, file)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # not read_text: line ends stay as they are
    except FileNotFoundError:
        raise UserError(f"{path} is missing: --data-dir DIR reads {spec.name} from DIR/{file}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path} is empty: {spec.name} is read from it")
    return text


def _read_jsonl(spec: DatasetSpec, file: str, data_dir: str) -> list[dict]:
    rows = []
    for number, line in enumerate(_read_file(spec, file, data_dir).split("\n"), 1):
        if line.strip():
            where = f"{Path(data_dir, file)}, line {number}"
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(f"{where}: not a JSON object") from None
            for name in {*spec.fields, spec.key} - {""}:
                if not isinstance(rows[-1], dict) or name not in rows[-1]:
                    raise UserError(f"{where}: {spec.name} needs the field {name!r}")
    return rows


def _read_hub(spec: DatasetSpec, split: str):
    """The rows of a published set: a datasets.Dataset whose columns have our names."""
    try:
        import datasets
        import huggingface_hub

        if not datasets.config.HF_HUB_OFFLINE:  # asked once, or the library would retry for half a minute, aloud
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
        rows = datasets.load_dataset(spec.hub.id, spec.hub.config, revision=spec.hub.revision, split=split)
    except Exception as error:  # no network, no such id, a broken download, no `datasets`: each with its own class
        raise UserError(
            f"{spec.hub.id} could not be read from the hub ({_one_line(error)}): without network --data-dir DIR reads "
            f"{', '.join(f'DIR/{file}' for file in dict.fromkeys(spec.files.values()))}, HF_HUB_OFFLINE=1 what was "
            "downloaded before; HF_ENDPOINT names a mirror, --dataset pydocs needs nothing"
        ) from error
    names = [*dict.fromkeys(name for name in (*spec.fields, spec.key, *spec.hub.columns) if name)]
    theirs = {spec.hub.columns.get(name, name): name for name in names}
    for column in theirs:
        if column not in rows.column_names:
            raise UserError(f"{spec.hub.id} has no column {column!r}, only {', '.join(rows.column_names)}")
    rows = rows.select_columns([*theirs]) if spec.fields else rows  # a row that names none gets all of them
    return rows.rename_columns({c: name for c, name in theirs.items() if c != name})


class Examples(list):
    """A list of Example that also knows how many records were left out, and why the first of them was."""

    skipped: int = 0
    reason: str = ""


def load_examples(
    name: str, split: str, *, data_dir: str | None = None, seed: int = 0, limit: int | None = None
) -> Examples:
    """The examples of a task set in an order drawn from `seed`, at most `limit` of them.

    Records without a prompt (an empty dialogue) or a reference, or that hold something else than texts where texts
    belong, are left out and counted in `.skipped`.
    """
    spec = get_dataset(name)
    if spec.kind != "task":
        raise ValueError(f"{name} is text: use load_text, and continuation_examples to generate from it")
    sources = find_sources(spec, split, data_dir)
    if spec.problems:
        with as_user_error():  # a user's own function may hand a text over where a tuple of texts belongs
            rows = [example for key, example in spec.problems() if split_of(str(key)) == split]
    else:
        rows = _read_jsonl(spec, sources[split], data_dir) if data_dir else _read_hub(spec, sources[split])
    carved = not spec.problems and list(sources.values()).count(sources[split]) > 1
    examples, order = Examples(), list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for i in order:
        if limit is not None and len(examples) >= limit:
            break
        row, example, reason = rows[i], None, "it has no prompt or no right answer"
        try:
            example = row if spec.problems else spec.example({name: _plain(value) for name, value in row.items()})
        except (TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
            reason = _one_line(error)
        key = row[spec.key] if carved and spec.key else example.prompt if example else ""
        if carved and not _belongs(str(key), split, sources):
            continue
        if example and example.prompt and any(example.references[:1]):
            examples.append(example)
        else:
            examples.skipped, examples.reason = examples.skipped + 1, examples.reason or reason
    if not examples and limit != 0:
        why = f"{examples.skipped} records were left out, one because {examples.reason}" if examples.skipped else ""
        rest = "a hash decides each problem's split and gave none to this one: add problems"
        raise UserError(f"{name} has no {split} example: {why or rest}")
    return examples


def _plain(value):
    """No value is an empty text; lines end in a line feed, wherever the set comes from."""
    return "" if value is None else value.replace("\r\n", "\n").replace("\r", "\n") if isinstance(value, str) else value


def _belongs(key: str, split: str, sources: dict[str, str]) -> bool:
    """Whether a record of a file that several splits share is this split's; shares of splits elsewhere go to train."""
    its = split_of(key)
    return (its if sources.get(its) == sources[split] else "train") == split


class TextSplit(NamedTuple):
    """A split of a text set. tokens[0] is the end token, so that every token of the text is predicted exactly once."""

    tokens: np.ndarray  # [1 + number of tokens of the text], a read-only memory map of uint16 (uint32 for V > 65536)
    num_bytes: int  # UTF-8 bytes of the text, for bits per byte
    variant: str = ""  # which text it is: perplexities of two variants are not to be compared


def _read_text(spec: DatasetSpec, split: str, data_dir: str | None) -> tuple[str, str]:
    """The text of a split, and its variant."""
    sources = find_sources(spec, split, data_dir)
    if spec.text:
        return spec.text(split), f"{spec.name}, Python {platform.python_version()}"
    if not data_dir:  # the hub has one row a line, and an empty row for the line that holds one blank
        return "".join(row or " \n" for row in _read_hub(spec, sources[split])["text"]), spec.hub.config or spec.name
    text, variants = _read_file(spec, sources[split], data_dir), {}
    if list(sources.values()).count(sources[split]) > 1:  # one file: each paragraph belongs to one split
        paragraphs = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))
        text = "\n\n".join(p for p in paragraphs if _belongs(p, split, sources)) + "\n"
        if not text.strip():
            raise UserError(f"{spec.name} has no {split} paragraph: an empty line stands between paragraphs")
    if spec.name == "wikitext2":
        variants = {".raw": "wikitext-2-raw-v1", ".tokens": "wikitext-2-v1 (tokenised, <unk>)"}
    return text, variants.get(Path(sources[split]).suffix, spec.name)


def load_text(
    name: str, split: str, tokenizer: Tokenizer, *, data_dir: str | None = None, cache_dir: str = ".cache"
) -> TextSplit:
    """A text set's split as tokens, cached below cache_dir under a hash of the text, the tokenizer and this code."""
    spec = get_dataset(name)
    if spec.kind != "text":
        raise ValueError(f"{name} is a task set: use load_examples")
    text, variant = _read_text(spec, split, data_dir)
    raw = text.encode("utf-8")
    made_of = f"{CACHE_VERSION} {tokenizer.name} {tokenizer.vocab_size} {hashlib.sha256(raw).hexdigest()}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    path = Path(cache_dir, f"{name}-{split}-{tokenizer.name}-{key}.npy")
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a killed run leaves no half a cache behind
    try:
        if not os.path.exists(path):  # not path.exists(), which raises where the folder may not be looked into
            path.parent.mkdir(parents=True, exist_ok=True)
            dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
            with open(aside, "wb") as file:
                np.save(file, np.array([tokenizer.end, *tokenizer.encode(text)], dtype=dtype))
            os.replace(aside, path)
        return TextSplit(np.load(path, mmap_mode="r"), len(raw), variant)
    except OSError as error:
        if os.path.exists(aside):
            os.unlink(aside)
        raise UserError(f"the token cache {path} cannot be written or read: {error.strerror}") from None


def continuation_examples(
    text: TextSplit, tokenizer: Tokenizer, *, prompt_tokens: int, answer_tokens: int, seed: int = 0
) -> Examples:
    """A text set as a task: windows that do not overlap, the first part the prompt, what follows the reference.

    Windows without a word in either part are left out and counted in `.skipped`.
    """
    width = prompt_tokens + answer_tokens
    starts = list(range(1, len(text.tokens) - width + 1, width))
    random.Random(seed).shuffle(starts)
    examples = Examples()
    for start in starts:
        window = text.tokens[start : start + width].tolist()
        # a cut inside a character leaves U+FFFD at the edge, which the text does not hold
        prompt = tokenizer.decode(window[:prompt_tokens]).strip("\ufffd")
        answer = tokenizer.decode(window[prompt_tokens:]).strip("\ufffd")
        if prompt.strip() and answer.strip():
            examples.append(Example(prompt, answer, (answer,)))
        else:
            examples.skipped += 1
    if not examples:
        raise UserError(f"the text, {len(text.tokens) - 1} tokens, holds no window of {width} with words in both parts")
    return examples


class Encoded(NamedTuple):
    tokens: list[int]  # prompt + answer + end token
    answer_start: int  # the position of the answer's first token


def encode_prompt(example: Example, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """The prompt's last `max_tokens` tokens: cut from the left, where the cue is not."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    return tokenizer.encode(example.prompt)[-max_tokens:]


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, context: int, *, max_new_tokens: int = 0
) -> tuple[list[Encoded], dict[str, int]]:
    """Prompt + answer + end token in at most `context` tokens, and the counts to report once.

    A prompt is cut from the left until the answer (or max_new_tokens, if that is more) fits behind it: "cut". Left
    out are answers that do not fit behind even one token of their prompt ("too_long") and examples without a prompt,
    an answer or a reference ("empty", with those that load_examples left out); "skipped" is the sum of the two.
    "unreachable" counts the answers, end token included, that do not fit into max_new_tokens (0: nothing is written).
    """
    encoded, counts = [], dict.fromkeys(("kept", "cut", "skipped", "too_long", "empty", "unreachable"), 0)
    counts["empty"] = getattr(examples, "skipped", 0)
    for example in examples:
        prompt, answer = tokenizer.encode(example.prompt), [*tokenizer.encode(example.answer), tokenizer.end]
        room = context - max(len(answer), max_new_tokens)
        if not prompt or len(answer) == 1 or not any(example.references):
            counts["empty"] += 1
            continue
        counts["unreachable"] += 0 < max_new_tokens < len(answer)
        if room < 1:
            counts["too_long"] += 1
        else:
            counts["cut"] += len(prompt) > room
            prompt = prompt[-room:]
            encoded.append(Encoded(prompt + answer, len(prompt)))
    counts["kept"], counts["skipped"] = len(encoded), counts["too_long"] + counts["empty"]
    return encoded, counts


def reward(spec: DatasetSpec, response: str, example: Example) -> float:
    """What a response earns, in [0, 1]."""
    return spec.measure(response, example)[spec.reward]


def sample_score(spec: DatasetSpec, response: str, example: Example) -> float:
    """The number that ranks routes on one sample: ROUGE-2, F1 or accuracy (unigram F1 on text)."""
    measured = spec.measure(response, example)
    return measured[spec.metric if spec.metric in measured else spec.reward]


def score(spec: DatasetSpec, responses: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The means over all responses, as fractions: rouge1 rouge2 rougeL | exact_match f1 | accuracy | unigram_f1."""
    measured = [spec.measure(r, e) for r, e in zip(responses, examples, strict=True)]
    return {name: sum(m[name] for m in measured) / len(measured) for name in measured[0]}
