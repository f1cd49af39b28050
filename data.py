"""Data sets, tokenizers, rewards and metrics: one table (DATASETS), read from the hub or from local files.

    text sets   pydocs, wikitext2: load_text -> one long row of tokens; the metric is perplexity
    task sets   the others:        load_examples -> prompt, answer, references; a rule scores what a model writes

Every set says how a record becomes an `Example` (the `_..._example` functions) and how a response is scored (the
`measure_...` functions). The reward of a response is one of the numbers that its metric reports: nothing is trained
on one rule and judged by another.

train, validation and test never share a problem. Where a published set has no split of its own for one of them,
`split_of` carves it out of another by a stable hash of the problem (the question's context, the document), so the
division is the same on every machine, for every seed, and for a part of the set as for the whole.
"""

import contextlib
import hashlib
import json
import os
import platform
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from support import problems
from support.errors import UserError, nearest
from support.grading import (
    Example,
    as_text,
    measure_countdown,
    measure_exact,
    measure_math,
    measure_number,
    measure_squad,
    measure_summary,
    measure_unigrams,
)

SPLITS = ("train", "validation", "test")
CACHE_VERSION = 2  # raise it when the same text and tokenizer give other tokens than before


# ---------------------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """A tiktoken encoding in which text is only ever text: a literal "<|endoftext|>" is not the end token."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.name: str = encoding.name
        self.vocab_size: int = encoding.n_vocab
        self.end: int = encoding.eot_token

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
        ranks = {bytes([i]): i for i in range(256)}
        end = {"<|endoftext|>": 256}
        # The pattern only cuts the text into pieces; with no merges every piece becomes its bytes.
        return Tokenizer(tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks=ranks, special_tokens=end))
    if name != "gpt2":
        raise nearest("tokenizer", name, ("gpt2", "bytes"))
    folder = Path(data_dir, "tiktoken-cache") if data_dir else None
    ours = bool(folder and folder.is_dir() and "TIKTOKEN_CACHE_DIR" not in os.environ)  # the user's own comes first
    if ours:
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as error:  # requests' errors, a proxy's, a broken file: all mean that the vocabulary is not there
        raise UserError(
            f"GPT-2's vocabulary is not on this machine and could not be fetched ({_one_line(error)}): set "
            "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files to work offline (or put them into "
            "DIR/tiktoken-cache of --data-dir DIR), or use --tokenizer bytes"
        ) from error
    finally:
        if ours:
            del os.environ["TIKTOKEN_CACHE_DIR"]


def prepare(dataset: str, tokenizer: str, data_dir: str | None = None) -> Tokenizer:
    """The tokenizer of a run. Where it cannot be had, the set is tried too: one message names all that is missing."""
    spec = get_dataset(dataset)
    _check_split(spec, "train", data_dir)
    if data_dir and not os.path.isdir(data_dir):
        raise UserError(f"--data-dir {data_dir}: there is no such folder")
    try:
        return load_tokenizer(tokenizer, data_dir)
    except UserError as error:
        try:
            if spec.files and tokenizer == "gpt2":
                spec = _local(spec, data_dir)
                _read_file(spec, "train", data_dir) if data_dir else _read_hub(spec, "train")
        except UserError:
            files = ", ".join(f"DIR/{file}" for file in dict.fromkeys(spec.files.values()))
            raise UserError(
                f"neither {dataset} nor GPT-2's vocabulary is on this machine or could be fetched: --data-dir DIR "
                f"reads {files} and the vocabulary in DIR/tiktoken-cache (or TIKTOKEN_CACHE_DIR names its folder, or "
                "--tokenizer bytes needs none); --dataset pydocs needs neither"
            ) from error
        raise


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


# --------------------------------------------------------------------------------------------- records to examples


class Examples(list):
    """A list of Example that also knows how many records lacked a prompt or a reference, or held something odd."""

    skipped: int = 0


def _prompt(text: str, pattern: str) -> str:
    """The cue stands behind the text: a text too long for the context is cut from the left and keeps its cue."""
    return pattern.format(text.strip()) if text.strip() else ""


def _summary_example(row: dict) -> Example:
    text, summary = row.get("dialogue", row.get("document")), row["summary"].strip()
    return Example(_prompt(text, "{}\nTL;DR:"), " " + summary, (summary,))


def _squad_example(row: dict) -> Example:
    answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]  # the hub's form, ours
    answers = tuple(a.strip() for a in _texts(answers) if a.strip()) or ("",)
    pattern = row["context"].strip().replace("{", "{{").replace("}", "}}") + "\nQuestion: {}\nAnswer:"
    return Example(_prompt(row["question"], pattern), " " + answers[0], answers)


def _gsm8k_example(row: dict) -> Example:
    # "<<48/2=24>>" are marks for a calculator that no model here has
    solution, mark, final = re.sub(r"<<[^<>]*>>", "", row["answer"]).rpartition("####")
    final = final.strip() if mark else ""
    return Example(_prompt(row["question"], "Question: {}\nAnswer:"), f" {solution.strip()}\n#### {final}", (final,))


def _math_example(row: dict) -> Example:
    references = (as_text(row["answer"]), *(v.strip() for v in _texts(row.get("answer_variants") or []) if v.strip()))
    answer = f" \\boxed{{{references[0]}}}"
    return Example(_prompt(row["problem"], "Problem: {}\nAnswer in \\boxed{{}}:"), answer, references)


def _texts(value) -> list[str]:
    """A list of texts. ValueError for a text, whose letters would be taken one by one, and for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"expected a list of texts, got {value!r:.80}")
    return list(value)


# --------------------------------------------------------------------------------------------------------- the table


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
    key: str = ""  # the field whose hash decides the split where several come from one file; "": the prompt
    files: dict[str, str] = field(default_factory=dict)  # split -> file below --data-dir
    hub: tuple[str, str | None, str | None] | None = None  # id, configuration, revision
    hub_splits: dict[str, str] = field(default_factory=dict)  # split -> the hub's split
    columns: dict[str, str] = field(default_factory=dict)  # field -> column of the hub
    problems: Callable[[], Iterator[tuple[str, Example]]] | None = None  # generated sets: all problems
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

    @property
    def test_only(self) -> bool:
        return bool(self.files) and "train" not in self.files


def _files(pattern: str, *names: str) -> dict[str, str]:
    return {split: pattern.format(name) for split, name in zip(SPLITS, names, strict=False)}


def _columns(names: str) -> dict[str, str]:
    """ "problem answer=final_answer": our names of the fields, and the hub's where they differ."""
    return {name.partition("=")[0]: name.rpartition("=")[2] for name in names.split()}


_OWN_SPLITS = _files("{}", "train", "validation", "test")
_FROM_TRAIN = _files("{}", "train", "train", "test")  # the validation split is carved out of train
_UNIGRAMS = {"measure": measure_unigrams, "reward": "unigram_f1", "metric": "perplexity"}
_SUMMARY = {"measure": measure_summary, "reward": "rougeL", "metric": "rouge2", "example": _summary_example}
_SQUAD = {"measure": measure_squad, "reward": "f1", "metric": "f1", "example": _squad_example}
_EXACT = {"measure": measure_exact, "reward": "accuracy", "metric": "accuracy"}
_COUNTDOWN = _EXACT | {"measure": measure_countdown}
_MATH = {"measure": measure_math, "reward": "accuracy", "metric": "accuracy", "example": _math_example}
_GSM8K = _MATH | {"measure": measure_number, "example": _gsm8k_example}
_SAMPLED = {"eval_temperature": 1.0, "eval_top_p": 0.7}  # ERPO section 5.1


def _published(name, tokens, scoring, files, hub, hub_splits, columns, config=None, revision=None, **more):
    """A set that the hub has and --data-dir may have; GPT-2's words."""
    hub, columns = (hub, config, revision) if hub else None, _columns(columns)
    kind, where = "task" if "example" in scoring else "text", dict(files=files, hub=hub, hub_splits=hub_splits)
    return DatasetSpec(name, kind, "gpt2", tokens, **scoring, **where, columns=columns, **more)


def _math_test(name, file, hub, split="test", columns="problem answer", samples=1):
    files, splits = {"test": f"math-eval/{file}.jsonl"}, {"test": split} if hub else {}
    return _published(name, 512, _MATH | _SAMPLED, files, hub, splits, columns, samples_per_problem=samples)


_WIKITEXT = _files("wikitext-2/wiki.{}.raw", "train", "valid", "test")
_SAMSUM = _files("samsum/{}.jsonl", "train", "val", "test")
_XSUM = _files("xsum/xsum.jsonl", "", "", "")  # a file without splits: all three are carved out of it
_SQUAD_FILES = _files("squad-v1.1/{}.jsonl", "train_subset", "train_subset", "dev")
_GSM8K_FILES = _files("gsm8k/{}.jsonl", "train", "train", "test")
_DEEPSCALER = _files("deepscaler/train_subset.jsonl", "", "")
_TEST_SETS = ("math500", "aime24", "aime25", "minerva", "olympiad")
_RAW = "wikitext-2-raw-v1"

# fmt: off
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in (
    DatasetSpec("pydocs", "text", "bytes", 64, **_UNIGRAMS),
    _published("wikitext2", 32, _UNIGRAMS, _WIKITEXT, "Salesforce/wikitext", _OWN_SPLITS, "text", _RAW),
    _published("samsum", 64, _SUMMARY, _SAMSUM, "knkarthick/samsum", _OWN_SPLITS, "dialogue summary", beams=6),
    _published("xsum", 64, _SUMMARY, _XSUM, "EdinburghNLP/xsum", _OWN_SPLITS, "document summary",
               revision="refs/convert/parquet", key="document", beams=6, test_samples=500),
    _published("squad", 32, _SQUAD, _SQUAD_FILES, "rajpurkar/squad", _files("{}", "train", "train", "validation"),
               "context question answers", key="context", beams=6, test_samples=500),
    _published("gsm8k", 256, _GSM8K, _GSM8K_FILES, "openai/gsm8k", _FROM_TRAIN, "question answer", "main",
               key="question", test_samples=500),
    _published("deepscaler", 512, _MATH | _SAMPLED, _DEEPSCALER, "agentica-org/DeepScaleR-Preview-Dataset",
               _files("train", "", ""), "problem answer", key="problem", test_sets=_TEST_SETS),
    _math_test("math500", "math500", "HuggingFaceH4/MATH-500"),
    _math_test("aime24", "aime2024", "HuggingFaceH4/aime_2024", "train", samples=16),
    _math_test("aime25", "aime2025", "math-ai/aime25", samples=16),
    _math_test("amc", "amc", None),  # its numbers on the hub are floats, and of a set of another name
    _math_test("minerva", "minerva_math", "math-ai/minervamath", columns="problem=question answer"),
    _math_test("olympiad", "olympiadbench", "math-ai/olympiadbench", columns="problem=question answer=final_answer"),
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


def _check_split(spec: DatasetSpec, split: str, data_dir: str | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if spec.files and not spec.hub and not data_dir:
        file = next(iter(spec.files.values()))
        raise UserError(f"{spec.name} is read from files alone: --data-dir DIR reads DIR/{file}")
    if spec.files and split not in spec.files:
        there = f"it is tested on {', '.join(spec.test_sets)}" if spec.test_sets else f"it has {', '.join(spec.files)}"
        raise UserError(f"{spec.name} has no {split} split: {there}")


def _read_file(spec: DatasetSpec, split: str, data_dir: str) -> str:
    path = Path(data_dir, spec.files[split])
    try:
        text = path.read_bytes().decode("utf-8-sig")  # not read_text: line ends stay as they are
    except FileNotFoundError:
        raise UserError(f"{path} is missing: --data-dir DIR reads {spec.name} from DIR/{spec.files[split]}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path} is empty: {spec.name} expects its {split} records there")
    return text


def _read_jsonl(spec: DatasetSpec, split: str, data_dir: str) -> list[dict]:
    rows, path = [], Path(data_dir, spec.files[split])
    for number, line in enumerate(_read_file(spec, split, data_dir).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: not a JSON object") from None
        missing = [c for c in spec.columns if not isinstance(row, dict) or c not in row]
        if missing:
            raise UserError(f"{path}, line {number}: {spec.name} needs the field {missing[0]!r}")
        rows.append(row)
    return rows


def _read_hub(spec: DatasetSpec, split: str):
    """The rows of a published set: a datasets.Dataset whose columns have our names."""
    hub_id, config, revision = spec.hub
    try:
        import datasets
        import huggingface_hub

        if not datasets.config.HF_HUB_OFFLINE:  # asked once, or the library would retry for half a minute, aloud
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
        rows = datasets.load_dataset(hub_id, config, revision=revision, split=spec.hub_splits[split])
    except Exception as error:  # no network, no such id, a broken download, no `datasets`: each with its own class
        raise UserError(
            f"{hub_id} could not be read from the hub ({_one_line(error)}): --data-dir DIR reads "
            f"DIR/{spec.files[split]} without network, HF_HUB_OFFLINE=1 what was downloaded before, "
            "HF_ENDPOINT names a mirror, --dataset pydocs needs nothing"
        ) from error
    missing = [c for c in spec.columns.values() if c not in rows.column_names]
    if missing:
        raise UserError(
            f"{hub_id} has no column {missing[0]!r}, only {', '.join(rows.column_names)}: --data-dir DIR "
            f"reads DIR/{spec.files[split]} instead"
        )
    rows = rows.select_columns(list(spec.columns.values()))
    return rows.rename_columns({theirs: ours for ours, theirs in spec.columns.items() if ours != theirs})


def load_examples(
    name: str, split: str, *, data_dir: str | None = None, seed: int = 0, limit: int | None = None
) -> Examples:
    """The examples of a task set in an order drawn from `seed`, at most `limit` of them.

    Records without a prompt (an empty dialogue) or without a reference are left out and counted in `.skipped`.
    """
    spec = get_dataset(name)
    if spec.kind != "task":
        raise ValueError(f"{name} is text: use load_text, and continuation_examples to generate from it")
    _check_split(spec, split, data_dir)
    if spec.problems:
        rows = [example for key, example in spec.problems() if split_of(key) == split]
    else:
        rows = _read_jsonl(spec, split, data_dir) if data_dir else _read_hub(spec, split)
    sources = spec.files if data_dir else spec.hub_splits
    carved = not spec.problems and list(sources.values()).count(sources[split]) > 1
    examples, order = Examples(), list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for i in order:
        if limit is not None and len(examples) >= limit:
            break
        example = rows[i] if spec.problems else _to_example(spec, rows[i])
        key = rows[i][spec.key] if carved and spec.key else example.prompt if example else ""
        if carved and not _belongs(str(key), split, sources):
            continue
        if example and example.prompt and example.references[0]:
            examples.append(example)
        else:
            examples.skipped += 1
    if not examples and limit != 0:
        where = "of its problems none" if spec.problems else f"of {len(rows)} records in {sources[split]} none"
        raise UserError(
            f"{spec.name} has no {split} example: {where} falls into this split and has a prompt and a reference "
            f"({examples.skipped} left out); splits are drawn by a hash, so a small set may lack one: add examples"
        )
    return examples


def _to_example(spec: DatasetSpec, row: dict) -> Example | None:
    """None for a record that holds something else than texts where texts belong: it is left out and counted."""
    try:
        return spec.example({name: _plain(value) for name, value in row.items()})
    except (TypeError, AttributeError, KeyError, ValueError):
        return None


def _plain(value):
    """No value is an empty text; lines end in a line feed, wherever the set comes from."""
    return "" if value is None else value.replace("\r\n", "\n").replace("\r", "\n") if isinstance(value, str) else value


def _belongs(key: str, split: str, sources: dict[str, str]) -> bool:
    """Whether a record of a file that several splits share is this split's; shares of splits elsewhere go to train."""
    its = split_of(key)
    return (its if sources.get(its) == sources[split] else "train") == split


# -------------------------------------------------------------------------------------------------------------- text


class TextSplit(NamedTuple):
    """A split of a text set. tokens[0] is the end token, so that every token of the text is predicted exactly once."""

    tokens: np.ndarray  # [1 + number of tokens of the text], a read-only memory map of uint16 (uint32 for V > 65536)
    num_bytes: int  # UTF-8 bytes of the text, for bits per byte
    variant: str = ""  # which text it is: perplexities of two variants are not to be compared


def _local(spec: DatasetSpec, data_dir: str | None) -> DatasetSpec:
    """WikiText's raw files; where a folder holds none of them, the tokenised ones, another text: the files say it."""
    tokenised = {split: file.replace(".raw", ".tokens") for split, file in spec.files.items()}
    there = [any(Path(data_dir or "", f).exists() for f in files.values()) for files in (spec.files, tokenised)]
    return replace(spec, files=tokenised) if there == [False, True] else spec


def load_text(
    name: str, split: str, tokenizer: Tokenizer, *, data_dir: str | None = None, cache_dir: str = ".cache"
) -> TextSplit:
    """A text set's split as tokens, cached below cache_dir under a hash of the text, the tokenizer and this code."""
    spec = get_dataset(name)
    if spec.kind != "text":
        raise ValueError(f"{name} is a task set: use load_examples")
    _check_split(spec, split, data_dir)
    if name == "pydocs":
        text, variant = _pydocs(split), f"pydocs, Python {platform.python_version()}"
    elif data_dir:
        spec = _local(spec, data_dir)
        text = _read_file(spec, split, data_dir)
        variants = {".raw": "wikitext-2-raw-v1", ".tokens": "wikitext-2-v1 (tokenised, <unk>)"}
        variant = variants.get(Path(spec.files[split]).suffix, name) if spec.hub else name
        if list(spec.files.values()).count(spec.files[split]) > 1:  # one file: each paragraph belongs to one split
            paragraphs = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))
            text = "\n\n".join(p for p in paragraphs if _belongs(p, split, spec.files)) + "\n"
            if not text.strip():
                raise UserError(f"{name} has no {split} paragraph: an empty line stands between paragraphs")
    else:  # the hub has one row a line, and an empty row for the line that holds one blank
        text, variant = "".join(row or " \n" for row in _read_hub(spec, split)["text"]), spec.hub[1]
    raw = text.encode("utf-8")
    made_of = f"{CACHE_VERSION} {tokenizer.name} {tokenizer.vocab_size} {hashlib.sha256(raw).hexdigest()}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    path = Path(cache_dir, f"{name}-{split}-{tokenizer.name}-{key}.npy")
    if not path.exists():
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a killed run leaves no half a cache behind
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                np.save(file, np.array([tokenizer.end, *tokenizer.encode(text)], dtype=dtype))
            os.replace(aside, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise UserError(f"the token cache {path} cannot be written: {error.strerror}") from None
    return TextSplit(np.load(path, mmap_mode="r"), len(raw), variant)


def _pydocs(split: str) -> str:
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


def continuation_examples(
    text: TextSplit,
    tokenizer: Tokenizer,
    *,
    prompt_tokens: int,
    answer_tokens: int,
    limit: int | None = None,
    seed: int = 0,
) -> Examples:
    """A text set as a task: windows that do not overlap, the first part the prompt, what follows the reference.

    Windows without a word in either part are left out and counted in `.skipped`.
    """
    if prompt_tokens < 1 or answer_tokens < 1:
        raise ValueError(f"prompt_tokens and answer_tokens: expected at least 1, got {prompt_tokens}, {answer_tokens}")
    width = prompt_tokens + answer_tokens
    starts = list(range(1, len(text.tokens) - width + 1, width))
    random.Random(seed).shuffle(starts)
    examples = Examples()
    for start in starts:
        if limit is not None and len(examples) >= limit:
            break
        window = text.tokens[start : start + width].tolist()
        # a cut inside a character leaves U+FFFD at the edge, which the text does not hold
        prompt = tokenizer.decode(window[:prompt_tokens]).strip("\ufffd")
        answer = tokenizer.decode(window[prompt_tokens:]).strip("\ufffd")
        if prompt.strip() and answer.strip():
            examples.append(Example(prompt, answer, (answer,)))
        else:
            examples.skipped += 1
    if not examples and limit != 0:
        raise UserError(f"the text, {len(text.tokens) - 1} tokens, holds no window of {width} with words in both parts")
    return examples


# ----------------------------------------------------------------------------------------------- examples to tokens


class Encoded(NamedTuple):
    tokens: list[int]  # prompt + answer + end token
    answer_start: int  # the position of the answer's first token


def encode_prompt(example: Example, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """The prompt's last `max_tokens` tokens: cut from the left, where the cue is not."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    return tokenizer.encode(example.prompt)[-max_tokens:]


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, context: int, *, min_new_tokens: int = 0
) -> tuple[list[Encoded], dict[str, int]]:
    """Prompt + answer + end token in at most `context` tokens, and the counts to report once.

    A prompt is cut from the left until the answer (or min_new_tokens, if that is more) fits behind it: "cut". Left
    out are answers that do not fit behind even one token of their prompt ("too_long") and examples without a prompt,
    an answer or a reference ("empty", with those that load_examples left out); "skipped" is the sum of the two.
    """
    encoded, counts = [], {"kept": 0, "cut": 0, "skipped": 0, "too_long": 0, "empty": getattr(examples, "skipped", 0)}
    for example in examples:
        prompt, answer = tokenizer.encode(example.prompt), [*tokenizer.encode(example.answer), tokenizer.end]
        room = context - max(len(answer), min_new_tokens)
        if not prompt or len(answer) == 1 or not any(example.references):
            counts["empty"] += 1
        elif room < 1:
            counts["too_long"] += 1
        else:
            counts["cut"] += len(prompt) > room
            prompt = prompt[-room:]
            encoded.append(Encoded(prompt + answer, len(prompt)))
    counts["kept"], counts["skipped"] = len(encoded), counts["too_long"] + counts["empty"]
    return encoded, counts


# ------------------------------------------------------------------------------------------------------------ scoring


def reward(spec: DatasetSpec, response: str, example: Example) -> float:
    """What a response earns, in [0, 1]."""
    return spec.measure(response, example)[spec.reward]


def sample_score(spec: DatasetSpec, response: str, example: Example) -> float:
    """The number that ranks routes on one sample: ROUGE-2, F1 or accuracy (unigram F1 on text)."""
    measured = spec.measure(response, example)
    return measured[spec.metric if spec.metric in measured else spec.reward]


def score(spec: DatasetSpec, responses: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The means over all responses, as fractions: rouge1 rouge2 rougeL | exact_match f1 | accuracy | unigram_f1."""
    if not responses or len(responses) != len(examples):
        raise ValueError(
            f"responses: expected one for each of the {len(examples)} examples and at least one, got {len(responses)}"
        )
    measured = [spec.measure(r, e) for r, e in zip(responses, examples, strict=True)]
    return {name: sum(m[name] for m in measured) / len(measured) for name in measured[0]}
