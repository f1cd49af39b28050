"""data.py: tokenizers, splits, records, errors, rewards and metrics, on made-up records and on the real ones."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_hub import RECORDS, FakeHub, in_a_new_python
from hypothesis import given, settings
from hypothesis import strategies as st

import data

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data (the real data sets) is not there")
quick = settings(deadline=None, max_examples=40)
BYTES = data.load_tokenizer("bytes")
EXAMPLE = st.tuples(st.text(max_size=30), st.text(max_size=12)).map(lambda t: data.Example(*t, t[1:]))


def write(folder, name, split, *rows) -> Path:
    path = Path(folder, data.get_dataset(name).files[split])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def refused(says, function, *arguments, **more):
    with pytest.raises(data.UserError, match=says):
        function(*arguments, **more)


@quick
@given(st.one_of(st.text(), st.text("\r\n a<|endoftext|>")))
def test_bytes_are_the_utf8_bytes_and_come_back(text):
    ids = BYTES.encode(text)
    assert bytes(ids) == text.encode("utf-8") and (BYTES.name, BYTES.vocab_size, BYTES.end) == ("bytes", 257, 256)
    assert BYTES.decode([*ids, 256, 300, 511]) == text  # the end token and a padded vocabulary's ids


@needs_real
def test_gpt2_from_a_data_folder(tmp_path):
    gpt2 = data.prepare("wikitext2", "gpt2", str(REAL))
    assert (gpt2.vocab_size, gpt2.end, gpt2.encode("hello world")) == (50257, 50256, [31373, 995])
    assert gpt2.decode([31373, 50256, 995, 50300]) == "hello world" and 50256 not in gpt2.encode("a<|endoftext|>b")
    train, test = (data.load_text("wikitext2", s, gpt2, data_dir=REAL, cache_dir=tmp_path) for s in ("train", "test"))
    assert len(train.tokens) - 1 == 2_448_382 and train.num_bytes == 10_797_148  # as its provenance counts them
    assert gpt2.decode(test.tokens.tolist()).encode() == (REAL / "wikitext-2/wiki.test.tokens").read_bytes()


def test_the_table_says_how_each_set_is_scored_and_evaluated():
    sets, example = data.DATASETS.values(), data.Example("p", "1", ("1",), (1, 1, 1))
    for spec in sets:
        measured = spec.measure("1", example)
        assert spec.reward in measured and (spec.metric in measured or spec.metric == "perplexity")
    sampled = {s.name: (s.eval_temperature, s.eval_top_p) for s in sets if s.sampled}  # ERPO section 5.1
    names = ("deepscaler", "amc", *data.get_dataset("deepscaler").test_sets)
    assert sampled == dict.fromkeys(names, (1.0, 0.7)) and len(sampled) == 7
    assert {s.name: s.samples_per_problem for s in sets if s.samples_per_problem > 1} == {"aime24": 16, "aime25": 16}
    assert {s.name for s in sets if s.beams == 6} == {"samsum", "xsum", "squad"}


def test_split_of_is_the_same_everywhere():
    assert [data.split_of(k) for k in ("5", "6", "11")] == ["train", "test", "validation"]
    assert all(data.split_of(f" {i}\n{i} ") == data.split_of(f"{i} {i}") for i in range(50))
    shares = Counter(data.split_of(str(i)) for i in range(20_000))
    assert abs(shares["train"] / 20_000 - 0.8) < 0.02 and abs(shares["test"] / 20_000 - 0.1) < 0.02


def test_pydocs_splits_share_no_paragraph(tmp_path):
    splits = [data.load_text("pydocs", s, BYTES, cache_dir=tmp_path) for s in data.SPLITS]
    texts = [BYTES.decode(split.tokens.tolist()) for split in splits]
    words = [{" ".join(p.split()) for p in t.split("\n\n") if len(" ".join(p.split())) >= 60} for t in texts]
    assert all(len(t) > 10_000 for t in texts) and len(set.union(*words)) == sum(map(len, words))


def test_a_text_starts_with_the_end_token_is_cached_and_says_its_variant(tmp_path):
    def load():
        return data.load_text("wikitext2", "test", BYTES, data_dir=tmp_path, cache_dir=tmp_path / "cache")

    for text in (b"\xc3\xa9\r\n \n", b"raw\n"):  # line ends stay as they are; another text is another cache
        raw = write(tmp_path, "wikitext2", "test", text)
        for _ in range(2):
            assert load().tokens.tolist() == [256, *text] and load().num_bytes == len(text)
    assert isinstance(load().tokens, np.memmap) and len(list((tmp_path / "cache").iterdir())) == 2
    raw.with_suffix(".tokens").write_text("<unk>\n")
    assert (load().variant, load().num_bytes) == ("wikitext-2-raw-v1", 4)
    raw.unlink()
    assert (load().variant, load().num_bytes) == ("wikitext-2-v1 (tokenised, <unk>)", 6)
    raw.with_name("wiki.train.raw").write_text("raw\n")  # never one split of this and one of that
    refused("wiki.test.raw is missing", load)


def test_continuations_do_not_overlap_and_follow_their_prompts():
    text, sizes = "".join(f"{i:04} " for i in range(500)) + " " * 81 + "é" * 40, dict(prompt_tokens=12, answer_tokens=8)
    split = data.TextSplit(np.array([256, *text.encode()]), 0)
    first, second = (data.continuation_examples(split, BYTES, **sizes, seed=s) for s in (3, 4))
    assert len(first) + first.skipped == len(text.encode()) // 20 and first.skipped == 4  # blanks
    assert first != second and sorted(e.prompt for e in first) == sorted(e.prompt for e in second)
    for e in first:
        assert "é" in e.prompt or text.index(e.prompt + e.answer) % 20 == 0
        assert "\ufffd" not in e.prompt + e.answer and e.references == (e.answer,)
    refused("no window of 20", data.continuation_examples, data.TextSplit(np.arange(4), 3), BYTES, **sizes)


@pytest.mark.parametrize("name", ["addition", "countdown", "written-addition"])
def test_generated_answers_earn_their_reward_and_splits_share_no_problem(name):
    def problem(example):  # whatever the order of its numbers
        left, _, right = example.prompt.rstrip(":").partition("=")
        return (*sorted(left.replace("+", " ").split()), right)

    spec, splits = data.get_dataset(name), [data.load_examples(name, s) for s in data.SPLITS]
    sets = [{problem(e) for e in examples} for examples in splits]
    assert len(set.union(*sets)) == sum(map(len, sets)) and all(len(s) > 100 for s in sets)
    for example in (e for examples in splits for e in examples):
        assert data.reward(spec, example.answer, example) == 1, example
        assert len(BYTES.encode(example.answer)) + 1 <= spec.max_new_tokens
    other = data.load_examples(name, "train", seed=1)
    assert splits[0] != other and sorted(map(repr, splits[0])) == sorted(map(repr, other))
    assert data.load_examples(name, "train", seed=1, limit=20) == other[:20]


def test_written_addition_is_worked_out_digit_by_digit_and_earns_as_a_whole():
    spec, examples = data.get_dataset("written-addition"), data.load_examples("written-addition", "test")
    for example in examples:
        a, b = example.prompt[:-1].split("+")
        steps, carry = "", 0
        for x, y in zip(reversed(a), reversed(b), strict=True):
            total = int(x) + int(y) + carry
            steps, carry = steps + f"{x}+{y}+{carry}={total:02};", total // 10
        assert len(a) == 8 and example.answer == f"{steps}#{int(a) + int(b)}"
    answer = examples[0].answer
    wrong = [answer[:i] + "x" + answer[i + 1 :] for i in range(len(answer))] + [answer.rpartition(";")[2], answer * 2]
    assert not any(data.reward(spec, text, examples[0]) for text in wrong)


def test_rewards_are_the_metrics_numbers():
    words = data.Example("p", "a", ("the cat on the mat",))
    reported = {"samsum": {"rouge1", "rouge2", "rougeL"}, "squad": {"exact_match", "f1"}, "pydocs": {"unigram_f1"}}
    for name, names in (reported | {"gsm8k": {"accuracy"}}).items():
        spec, three = data.get_dataset(name), data.Example("p", "a", ("3",))
        response, example = ("#### 3", three) if name == "gsm8k" else ("the cat sat", words)
        scores = data.score(spec, [response, "zzz"], [example, example])
        assert set(scores) == names and scores[spec.reward] == data.reward(spec, response, example) / 2 > 0
    assert data.sample_score(data.get_dataset("samsum"), "the cat sat", words) == pytest.approx(2 / 6)  # of ROUGE-2
    assert data.sample_score(data.get_dataset("pydocs"), "the cat", words) == pytest.approx(4 / 7)  # no perplexity


COUNTS = {"samsum": (14731, 818, 819), "xsum": 2131, "squad": (12134, 10570), "gsm8k": (7473, 1319), "deepscaler": 5000}
COUNTS |= {"math500": 500, "aime24": 30, "aime25": 30, "minerva": 272, "amc": 83, "olympiad": 675}


@needs_real
@pytest.mark.parametrize("name", COUNTS)
def test_real_records_become_examples_and_splits_share_nothing(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)  # no network is asked
    spec, counts = data.get_dataset(name), COUNTS[name]
    splits = [data.load_examples(name, s, data_dir=REAL) for s in spec.files]
    sizes = [len(s) for s in splits if not s.skipped]
    if isinstance(counts, tuple) and len(counts) == 2:  # validation carved out of train
        assert (sizes[0] + sizes[1], sizes[2]) == counts and 0.05 < sizes[1] / counts[0] < 0.15
    else:
        assert tuple(sizes) == counts or sum(sizes) == counts
    for e in (e for split in splits for e in split[:40]):
        assert data.reward(spec, e.answer, e) == 1 and e.prompt[-1] == ":" and e.answer[0] == " "
    keys = [{e.prompt.rpartition("\nQuestion:")[0] if name == "squad" else e.prompt for e in s} for s in splits]
    assert name == "samsum" or len(set.union(*keys)) == sum(map(len, keys))  # samsum's own splits share dialogues


MATH, SQUAD = {"problem": "p", "answer": "1"}, {"context": "c", "question": "q", "answers": ["a"]}
SAMSUM, GSM8K = {"dialogue": "A: hi\r\nB: ho\rC", "summary": "They\r\ngreet."}, {"question": "q", "answer": "#### 1"}
ODD = [
    ("math500", MATH, "answer", [{"a": 1}, None, float("nan"), 1e999, True, "", [], [True], [None], [{}]]),
    ("math500", MATH, "answer_variants", ["23", [None], {"a": 1}, 7]),
    ("math500", MATH, "problem", ["", " ", None, 7, ["p"]]),
    ("squad", SQUAD, "answers", ["ab", {"text": {"abc": 1}}, {"text": "ab"}, {}, [], [True], 7]),
    ("squad", SQUAD, "context", [7]),
    ("samsum", SAMSUM, "dialogue", [" ", {}]),
    ("samsum", SAMSUM, "summary", ["", None, 7]),
]


@pytest.mark.parametrize(("name", "good", "field", "values"), ODD)
def test_odd_records_are_left_out_and_counted(tmp_path, name, good, field, values):
    for odd in (good | {field: value} for value in values):
        write(tmp_path, name, "test", odd, good, odd)
        examples = data.load_examples(name, "test", data_dir=tmp_path)
        assert len(examples) == 1 and examples.skipped == 2 == data.encode_examples(examples, BYTES, 64)[1]["skipped"]
        write(tmp_path, name, "test", odd)
        refused("1 records were left out", data.load_examples, name, "test", data_dir=tmp_path)


def test_records_become_examples(tmp_path):
    rows = [MATH | {"answer": a} for a in (204, 0.5, ["1", 3], 10**400)]
    write(tmp_path, "math500", "test", *rows, MATH | {"answer_variants": ["2", 3]}, MATH | {"answer_variants": None})
    found = {e.references for e in data.load_examples("math500", "test", data_dir=tmp_path)}
    assert found == {("204",), ("0.5",), ("1,3",), (f"1{'0' * 400}",), ("1", "2", "3"), ("1",)}
    write(tmp_path, "squad", "test", b"\xef\xbb\xbf", SQUAD | {"answers": ["", " x "]})  # an empty answer is none
    assert data.load_examples("squad", "test", data_dir=tmp_path)[0].references == ("x",)
    write(tmp_path, "samsum", "test", SAMSUM)
    [example] = data.load_examples("samsum", "test", data_dir=tmp_path)  # lines end in a line feed
    assert (example.prompt, example.answer) == ("A: hi\nB: ho\nC\nTL;DR:", " They\ngreet.")
    write(tmp_path, "gsm8k", "test", *(GSM8K | {"answer": a} for a in ("2", "2 ####", "<<1+1=2>>1 #### 2 #### 3")))
    examples = data.load_examples("gsm8k", "test", data_dir=tmp_path)
    assert [e.answer for e in examples] == [" 1 #### 2\n#### 3"] and examples.skipped == 2


def test_small_sets_of_ones_own(tmp_path, monkeypatch):
    def load(split, example=lambda row: data.Example(row["q"], row["a"], (row["a"],)), data_dir=tmp_path, **more):
        spec = data.DatasetSpec("own", "task", "bytes", 4, **data._EXACT, example=example, **more)
        monkeypatch.setitem(data.DATASETS, "own", spec)
        return data.load_examples("own", split, data_dir=data_dir)

    def five(right):
        return lambda: ((i, data.Example(f"{i}=", "0", right)) for i in range(5))

    rows, file = [{"q": f"{i}+1=", "a": str(i + 1)} for i in range(100)], data._splits("own.jsonl")
    Path(tmp_path, "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = Counter(data.split_of(row["q"]) for row in rows)  # one file without a key: the prompt decides
    assert {s: len(load(s, files=file)) for s in data.SPLITS} == counts
    two = data._splits("own.jsonl", "train validation")  # no test split: its share is train's
    assert len(load("train", files=two)) == counts["train"] + counts["test"]
    assert len(load("train", problems=five(("0",)))) == 5
    refused("own has no test split: it has train, validation", load, "test", files=two)
    refused("own is read from files alone: --data-dir DIR reads", load, "train", files=file, data_dir=None)
    refused("own comes from the hub alone", load, "train", hub=data.Hub("a/b", {"train": "train"}))
    refused("own needs the field 'topic'", load, "train", files=file, key="topic")
    refused("own has no validation example.*add problems", load, "validation", problems=five(("0",)))
    refused("expected a tuple of texts", load, "train", problems=five("0"))  # ("0"), the comma forgotten


@quick
@given(st.lists(EXAMPLE, max_size=6), st.integers(1, 40), st.integers(0, 20))
def test_encoded_examples_fit_and_keep_their_ends(examples, context, new):
    encoded, counts = data.encode_examples(examples, BYTES, context, max_new_tokens=new)
    kept, expected = iter(encoded), Counter(kept=len(encoded))
    for e in examples:
        prompt, answer = e.prompt.encode(), e.answer.encode()
        whole, written = bool(prompt and answer), max(len(answer) + 1, new)
        expected["unreachable"] += whole and 0 < new < len(answer) + 1
        expected["empty"] += not whole
        expected["too_long"] += whole and written >= context
        expected["skipped"] += not whole or written >= context
        if whole and written < context:
            tokens, start = next(kept)
            assert tokens[-1] == BYTES.end and BYTES.end not in tokens[:-1] and bytes(tokens[start:-1]) == answer
            assert bytes(tokens[:start]) == prompt[-(context - written) :]  # no more is cut than must be
            assert bytes(data.encode_prompt(e, BYTES, context - written)) == prompt[-(context - written) :]
            expected["cut"] += start < len(prompt)
    assert next(kept, None) is None and counts == {name: expected[name] for name in counts}


def test_what_cannot_be_read_is_named(tmp_path):
    cases = {b"\n\n": "is empty", b"\xff\xfe": "not UTF-8", b'\n{"question": \n': "line 2: not a JSON object"}
    for content, says in (cases | {b'{"question": "q"}\n': "line 1: .*field 'answer'"}).items():
        write(tmp_path, "gsm8k", "test", content)
        refused(says, data.load_examples, "gsm8k", "test", data_dir=tmp_path)
    refused("is missing.*DIR/wikitext-2/wiki.train.raw", data.load_text, "wikitext2", "train", BYTES, data_dir=tmp_path)
    (tmp_path / "file").write_text("")
    refused("cannot be written", data.load_text, "pydocs", "test", BYTES, cache_dir=tmp_path / "file")
    refused("no such folder", data.prepare, "pydocs", "bytes", str(tmp_path / "nowhere"))
    refused("it is tested on math500, aime24", data.load_examples, "deepscaler", "test", data_dir=tmp_path)
    refused("math500 has no train split", data.load_examples, "math500", "train", data_dir=tmp_path)


def test_every_set_reads_from_the_hub_as_from_files(tmp_path):
    code = """
        tokenizer, out = data.load_tokenizer("bytes"), {}
        for spec in data.DATASETS.values():
            for split in spec.hub.splits if spec.hub else ():
                if spec.kind == "text":
                    text = data.load_text(spec.name, split, tokenizer, cache_dir=CACHE)
                    out[f"{spec.name} {split}"] = [tokenizer.decode(text.tokens.tolist()), text.variant]
                else:
                    examples = data.load_examples(spec.name, split)
                    out[f"{spec.name} {split}"] = [[e.prompt, e.answer, e.references] for e in examples]
        object.__setattr__(data.DATASETS["gsm8k"], "fields", ())  # a row that names none gets all
        assert len(data.load_examples("gsm8k", "validation")) == len(out["gsm8k validation"])
        object.__setattr__(data.DATASETS["samsum"], "fields", ("talk", "summary"))
        out["other columns"] = attempt(data.load_examples, "samsum", "train")
        print(json.dumps(out))
        """.replace("CACHE", repr(str(tmp_path / "cache")))
    with FakeHub(RECORDS) as hub:
        got, _ = in_a_new_python(code, tmp_path, HF_ENDPOINT=hub.url)
    assert got.pop("other columns") == "knkarthick/samsum has no column 'talk', only id, dialogue, summary"
    assert set(got) == {f"{s.name} {split}" for s in data.DATASETS.values() if s.hub for split in s.files}
    assert got["wikitext2 test"] == [" \n = title = \n \n", "wikitext-2-raw-v1"]
    assert got["samsum validation"] == [["A:\nvalidation\nTL;DR:", " S.", ["S."]]]
    assert got["xsum train"] == [["D train\nTL;DR:", " S.", ["S."]]]
    assert got["squad test"] == [["dev\nQuestion: q?\nAnswer:", " a", ["a", "the b"]]]
    assert got["gsm8k test"] == [["Question: q\nAnswer:", " x\n#### 1,000", ["1,000"]]]
    for name in ("squad", "gsm8k", "deepscaler"):  # validation is carved out of train
        parts = [[prompt for prompt, *_ in got[f"{name} {s}"]] for s in ("train", "validation")]
        assert all(parts) and len(parts[0] + parts[1]) == 100 and not set(parts[0]) & set(parts[1])
    references = [got[f"{n} test"][0][2][0] for n in ("math500", "aime24", "aime25", "minerva", "olympiad")]
    assert references == ["\\frac{1}{2}", "025", "70", "8.7e8", "1,3"]


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_network_one_message_says_what_to_do(tmp_path, env):
    """And what needs no network imports nothing that is slow to import."""
    code = """
        data.load_examples("addition", "train")
        slow = [m for m in ("datasets", "torch", "sympy", "rouge_score") if m in sys.modules]
        prepared = [attempt(data.prepare, *a, "gpt2") for a in (["wikitext2"], ["pydocs"])]
        print(json.dumps([slow, attempt(data.load_examples, "squad", "train"), *prepared]))
        """
    nowhere = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    (slow, squad, wikitext, pydocs), stderr = in_a_new_python(code, tmp_path, **nowhere, **env)
    assert "rajpurkar/squad" in squad and "DIR/squad-v1.1/train_subset.jsonl, DIR/squad-v1.1/dev.jsonl" in squad
    assert "HF_HUB_OFFLINE=1" in squad and "\n" not in squad + wikitext and "Retrying" not in stderr
    assert all("TIKTOKEN_CACHE_DIR" in text and text.endswith("--tokenizer bytes") for text in (wikitext, pydocs))
    assert slow == []
