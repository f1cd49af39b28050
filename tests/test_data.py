"""data.py: tokenizers, splits, caches, errors, rewards and metrics, on made-up records and on the real ones."""

import json
import os
import platform
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st

import data

ROOT = Path(__file__).parents[1]
REAL = ROOT / ".." / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data (the real data sets) is not there")
quick = settings(deadline=None, max_examples=40)
BYTES = data.load_tokenizer("bytes")
TASKS = [s.name for s in data.DATASETS.values() if s.kind == "task"]


def write(folder, name, *rows):
    path = Path(folder, data.get_dataset(name[0]).files[name[1]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------- tokenizers


@quick
@given(st.text())
def test_bytes_are_the_utf8_bytes_and_come_back(text):
    ids = BYTES.encode(text)
    assert bytes(ids) == text.encode("utf-8")
    assert BYTES.decode(ids) == text


def test_bytes_tokenizer_has_the_end_token_of_its_own():
    assert (BYTES.name, BYTES.vocab_size, BYTES.end) == ("bytes", 257, 256)
    long = "line\r\n \n\n" * 10_000
    assert bytes(BYTES.encode(long)).decode() == long


@needs_real
def test_gpt2_from_a_data_folder_without_network(monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    gpt2 = data.load_tokenizer("gpt2", data_dir=str(REAL))
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert gpt2.encode("hello world") == [31373, 995]
    assert (gpt2.vocab_size, gpt2.end) == (50257, 50256)
    assert gpt2.decode([31373, 50256, 995, 50300]) == "hello world"


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b"])
def test_special_tokens_in_text_are_ordinary_text(text):
    assert BYTES.end not in BYTES.encode(text)
    assert BYTES.decode(BYTES.encode(text)) == text
    assert BYTES.decode([*BYTES.encode(text), 256, 300, 511]) == text  # the end token and a padded vocabulary's ids


def test_unknown_names_give_the_nearest_one():
    with pytest.raises(data.UserError, match=r"did you mean wikitext2\?"):
        data.get_dataset("wikitxt2")
    with pytest.raises(data.UserError, match=r"did you mean bytes\?"):
        data.load_tokenizer("byte")


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_is_whole():
    assert set(data.DATASETS) == {
        "pydocs",
        "wikitext2",
        "samsum",
        "xsum",
        "squad",
        "gsm8k",
        "deepscaler",
        "math500",
        "aime24",
        "aime25",
        "minerva",
        "olympiad",
        "amc",
        "countdown",
        "addition",
        "written-addition",
    }
    example = data.Example("p", "1", ("1",), (1, 1, 1))
    for spec in data.DATASETS.values():
        assert spec.kind in ("text", "task") and spec.tokenizer in ("gpt2", "bytes") and spec.max_new_tokens > 0
        measured = spec.measure("1", example)
        assert spec.reward in measured and (spec.metric in measured or spec.metric == "perplexity")
        assert set(spec.hub_splits) == (set(spec.files) if spec.hub else set())
        for name in spec.test_sets:
            assert data.get_dataset(name).test_only
    assert not data.get_dataset("gsm8k").test_only and not data.get_dataset("addition").test_only


def test_the_table_says_how_each_set_is_evaluated():
    sets = data.DATASETS.values()
    sampled = {s.name for s in sets if s.sampled}  # ERPO section 5.1; deepscaler's own validation split likewise
    assert sampled == {"deepscaler", "amc", *data.get_dataset("deepscaler").test_sets}
    assert {(s.eval_temperature, s.eval_top_p) for s in sets if s.sampled} == {(1.0, 0.7)}
    assert {s.name: s.samples_per_problem for s in sets if s.samples_per_problem > 1} == {"aime24": 16, "aime25": 16}
    assert {s.name for s in sets if s.beams == 6} == {"samsum", "xsum", "squad"}
    assert {s.name for s in sets if s.test_samples == 500} == {"xsum", "squad", "gsm8k"}  # more than 1,000 each
    assert not any(s.test_samples for s in sets if s.problems or s.kind == "text")


def test_split_of_is_the_same_everywhere():
    assert [data.split_of(k) for k in ("5", "6", "11")] == ["train", "test", "validation"]
    shares = Counter(data.split_of(str(i)) for i in range(20_000))
    assert abs(shares["train"] / 20_000 - 0.8) < 0.02 and abs(shares["test"] / 20_000 - 0.1) < 0.02


# ------------------------------------------------------------------------------------------------------------ text


def paragraphs(text):
    words = (" ".join(p.split()) for p in text.split("\n\n"))
    return {w for w in words if len(w) >= 60}


def test_pydocs_splits_share_no_paragraph(tmp_path):
    texts = {
        s: BYTES.decode(data.load_text("pydocs", s, BYTES, cache_dir=tmp_path).tokens.tolist()) for s in data.SPLITS
    }
    assert all(len(t) > 10_000 for t in texts.values())
    for a, b in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not paragraphs(texts[a]) & paragraphs(texts[b])


def test_text_split_starts_with_the_end_token_and_is_cached(tmp_path):
    split = data.load_text("pydocs", "test", BYTES, cache_dir=tmp_path)
    assert isinstance(split.tokens, np.memmap) and split.tokens.dtype == np.uint16
    assert split.tokens[0] == BYTES.end and BYTES.end not in split.tokens[1:]
    assert len(split.tokens) == split.num_bytes + 1  # one token a byte, each predicted once
    [file] = list(tmp_path.iterdir())
    before = file.stat().st_mtime_ns
    again = data.load_text("pydocs", "test", BYTES, cache_dir=tmp_path)
    assert np.array_equal(again.tokens, split.tokens) and file.stat().st_mtime_ns == before


def test_another_text_gets_another_cache(tmp_path):
    for text in ("one two\n", "one too\n"):
        write(tmp_path, ("wikitext2", "train"), text)
        split = data.load_text("wikitext2", "train", BYTES, data_dir=tmp_path, cache_dir=tmp_path / "cache")
        assert BYTES.decode(split.tokens.tolist()) == text
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_local_text_keeps_its_line_ends_and_counts_bytes(tmp_path):
    path = write(tmp_path, ("wikitext2", "test"), "")
    path.write_bytes("é\r\n \n".encode())
    split = data.load_text("wikitext2", "test", BYTES, data_dir=tmp_path, cache_dir=tmp_path)
    assert bytes(split.tokens[1:].astype(np.uint8)) == "é\r\n \n".encode() and split.num_bytes == 6


@needs_real
def test_wikitext2_is_one_string_of_gpt2_tokens(tmp_path):
    gpt2 = data.load_tokenizer("gpt2", data_dir=str(REAL))
    train = data.load_text("wikitext2", "train", gpt2, data_dir=REAL, cache_dir=tmp_path)
    assert len(train.tokens) - 1 == 2_448_382 and train.num_bytes == 10_797_148  # as its provenance counts them
    test = data.load_text("wikitext2", "test", gpt2, data_dir=REAL, cache_dir=tmp_path)
    assert gpt2.decode(test.tokens.tolist()).encode() == (REAL / "wikitext-2/wiki.test.tokens").read_bytes()


def test_the_text_says_which_variant_it_is(tmp_path):
    def load():
        return data.load_text("wikitext2", "test", BYTES, data_dir=tmp_path, cache_dir=tmp_path / "cache")

    raw = write(tmp_path, ("wikitext2", "test"), "raw\n")
    raw.with_suffix(".tokens").write_text("<unk>\n")
    assert (load().variant, load().num_bytes) == ("wikitext-2-raw-v1", 4)
    raw.unlink()
    assert (load().variant, load().num_bytes) == ("wikitext-2-v1 (tokenised, <unk>)", 6)
    raw.with_name("wiki.train.raw").write_text("raw\n")  # never one split of this and one of that
    with pytest.raises(data.UserError, match="wiki.test.raw is missing"):
        load()
    pydocs = data.load_text("pydocs", "test", BYTES, cache_dir=tmp_path / "cache")
    assert pydocs.variant == f"pydocs, Python {platform.python_version()}"


def test_continuations_do_not_overlap_and_follow_their_prompts(tmp_path):
    text = data.load_text("pydocs", "validation", BYTES, cache_dir=tmp_path)
    examples = data.continuation_examples(text, BYTES, prompt_tokens=48, answer_tokens=16, limit=None, seed=3)
    whole = BYTES.decode(text.tokens.tolist())
    assert len(examples) + examples.skipped == (len(text.tokens) - 1) // 64
    for e in examples[:200]:
        assert e.prompt + e.answer in whole and e.references == (e.answer,)
    assert sum(len(e.prompt + e.answer) for e in examples) <= len(whole)
    assert data.continuation_examples(text, BYTES, prompt_tokens=48, answer_tokens=16, limit=5, seed=3) == examples[:5]
    assert data.continuation_examples(text, BYTES, prompt_tokens=48, answer_tokens=16, limit=5, seed=4) != examples[:5]


# ------------------------------------------------------------------------------------------------- generated tasks


@pytest.mark.parametrize("name", ["addition", "countdown", "written-addition"])
def test_generated_splits_are_disjoint_whatever_the_seed(name):
    def problem(example):
        left, _, right = example.prompt.rstrip(":").partition("=")
        return (*sorted(left.replace("+", " ").split()), right)

    splits = {s: {problem(e) for seed in (0, 1) for e in data.load_examples(name, s, seed=seed)} for s in data.SPLITS}
    assert not splits["train"] & splits["validation"] and not splits["train"] & splits["test"]
    assert not splits["validation"] & splits["test"] and all(len(s) > 100 for s in splits.values())


def test_examples_come_in_the_seeds_order():
    first = data.load_examples("addition", "train", seed=1, limit=20)
    assert first == data.load_examples("addition", "train", seed=1)[:20]
    assert first != data.load_examples("addition", "train", seed=2, limit=20)


def test_every_generated_answer_earns_its_reward():
    for name in ("addition", "countdown", "written-addition"):
        spec = data.get_dataset(name)
        for split in data.SPLITS:
            for example in data.load_examples(name, split):
                assert data.reward(spec, example.answer, example) == 1, example
                assert len(BYTES.encode(example.answer)) + 1 <= spec.max_new_tokens
    for example in data.load_examples("addition", "test"):
        a, b = example.prompt[:-1].split("+")
        assert example.answer == str(int(a) + int(b))


def test_rewards_are_the_metrics_numbers():
    summary = data.Example("p", "a", ("the cat on the mat",))
    three = data.Example("p", "a", ("3",))
    for name, response, example in [
        ("samsum", "the cat sat", summary),
        ("squad", "the cat sat", summary),
        ("pydocs", "the cat sat", summary),
        ("gsm8k", "#### 3", three),
    ]:
        spec = data.get_dataset(name)
        scores = data.score(spec, [response, "zzz"], [example, example])
        assert scores[spec.reward] == pytest.approx(data.reward(spec, response, example) / 2)
        assert 0 < data.reward(spec, response, example) <= 1 and 0 < data.sample_score(spec, response, example) <= 1
    assert set(data.score(data.get_dataset("xsum"), ["a"], [summary])) == {"rouge1", "rouge2", "rougeL"}
    assert set(data.score(data.get_dataset("squad"), ["a"], [summary])) == {"exact_match", "f1"}
    assert set(data.score(data.get_dataset("math500"), ["a"], [summary])) == {"accuracy"}
    assert set(data.score(data.get_dataset("wikitext2"), ["a"], [summary])) == {"unigram_f1"}
    # of 2 and 4 pairs of words, the-cat in common
    assert data.sample_score(data.get_dataset("samsum"), "the cat sat", summary) == pytest.approx(2 / 6)


def test_score_needs_a_response_for_each_example():
    for responses, examples in ([[], []], [["a"], []]):
        with pytest.raises(ValueError, match="responses"):
            data.score(data.get_dataset("squad"), responses, examples)


# ---------------------------------------------------------------------------------------------------- real records


@needs_real
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("samsum", (14731, 818, 819)),
        ("xsum", 2131),
        ("squad", (12134, 10570)),
        ("gsm8k", (7473, 1319)),
        ("deepscaler", 5000),
        ("math500", (None, None, 500)),
        ("aime24", (None, None, 30)),
        ("aime25", (None, None, 30)),
        ("minerva", (None, None, 272)),
        ("amc", (None, None, 83)),
        ("olympiad", (None, None, 675)),
    ],
)
def test_real_records_become_examples_that_earn_their_reward(name, counts):
    spec = data.get_dataset(name)
    splits = {s: data.load_examples(name, s, data_dir=REAL) for s in spec.files}
    assert not any(s.skipped for s in splits.values())
    sizes = [len(splits[s]) if s in splits else None for s in data.SPLITS]
    if isinstance(counts, int):
        assert sum(filter(None, sizes)) == counts
    elif len(counts) == 2:  # validation carved out of train
        assert (sizes[0] + sizes[1], sizes[2]) == counts and 0.05 < sizes[1] / counts[0] < 0.15
    else:
        assert tuple(sizes) == counts
    for split in splits.values():
        for example in split[:40]:
            assert data.reward(spec, example.answer, example) == 1, example
            assert example.prompt[-1] == ":" and example.answer[0] == " "


@needs_real
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("squad", lambda e: e.prompt.rpartition("\nQuestion:")[0]),
        ("xsum", lambda e: e.prompt),
        ("gsm8k", lambda e: e.prompt),
        ("deepscaler", lambda e: e.prompt),
    ],
)
def test_real_splits_share_nothing(name, what):
    splits = [{what(e) for e in data.load_examples(name, s, data_dir=REAL)} for s in data.get_dataset(name).files]
    for i, a in enumerate(splits):
        for b in splits[i + 1 :]:
            assert a and b and not a & b


@needs_real
def test_real_records_read_as_they_should():
    gsm8k = data.load_examples("gsm8k", "test", data_dir=REAL)
    ducks = next(e for e in gsm8k if "ducks lay 16 eggs" in e.prompt)
    assert ducks.references == ("18",) and ducks.answer.endswith("\n#### 18") and "<<" not in ducks.answer
    squad = data.load_examples("squad", "test", data_dir=REAL)
    assert any(len(set(e.references)) > 1 for e in squad)
    minerva = data.load_examples("minerva", "test", data_dir=REAL)
    arcsin = next(e for e in minerva if e.references[0].startswith("np."))
    assert data.reward(data.get_dataset("minerva"), r"\boxed{\arcsin{\frac{1}{1.3}}}", arcsin) == 1


# ------------------------------------------------------------------------------------------------- skipped, cut, bad


def test_empty_records_are_left_out_and_counted(tmp_path):
    write(
        tmp_path,
        ("samsum", "train"),
        {"dialogue": "A: hi", "summary": "A greets."},
        {"dialogue": " ", "summary": "x"},
        {"dialogue": "B: hi", "summary": ""},
        {"dialogue": "C", "summary": None},
    )
    examples = data.load_examples("samsum", "train", data_dir=tmp_path)
    assert [e.answer for e in examples] == [" A greets."] and examples.skipped == 3
    encoded, counts = data.encode_examples(examples, BYTES, 64)
    assert len(encoded) == 1 and counts == {"kept": 1, "cut": 0, "skipped": 3, "too_long": 0, "empty": 3}

    write(
        tmp_path,
        ("squad", "test"),
        {"context": "c", "question": "q", "answers": []},
        {"context": "c", "question": "q", "answers": ["", "x"]},
        {"context": "c", "question": "q", "answers": ["y"]},
    )
    squad = data.load_examples("squad", "test", data_dir=tmp_path)
    assert squad.skipped == 1 and {e.references for e in squad} == {("x",), ("y",)}  # an empty answer is none
    write(tmp_path, ("gsm8k", "test"), {"question": "q", "answer": "none"}, {"question": "q", "answer": "#### 5"})
    assert data.load_examples("gsm8k", "test", data_dir=tmp_path).skipped == 1
    write(tmp_path, ("math500", "test"), {"problem": "p", "answer": ""}, {"problem": "p", "answer": 204})
    [example] = data.load_examples("math500", "test", data_dir=tmp_path)
    assert example.references == ("204",)


def test_lines_end_in_a_line_feed_wherever_a_set_comes_from(tmp_path):
    rows = [{"dialogue": "A: hi\r\nB: ho\rC: hu", "summary": "They\r\ngreet."}]
    write(tmp_path, ("samsum", "train"), *rows)
    expected = ("A: hi\nB: ho\nC: hu\nTL;DR:", " They\ngreet.")
    [example] = data.load_examples("samsum", "train", data_dir=tmp_path)
    assert (example.prompt, example.answer) == expected
    with FakeHub({"knkarthick/samsum": {"train": rows}}) as hub:
        got, _ = in_a_new_python(
            """
            [e] = data.load_examples("samsum", "train")
            print(json.dumps([e.prompt, e.answer]))
            """,
            tmp_path,
            HF_ENDPOINT=hub.url,
        )
    assert tuple(got) == expected


def test_a_split_without_examples_is_an_error(tmp_path):
    write(tmp_path, ("gsm8k", "train"), {"question": "q0", "answer": "#### 1"}, {"question": None, "answer": "#### 1"})
    split = data.split_of("q0")
    assert split == "train" and len(data.load_examples("gsm8k", "train", data_dir=tmp_path)) == 1
    with pytest.raises(data.UserError, match="gsm8k has no validation example"):
        data.load_examples("gsm8k", "validation", data_dir=tmp_path)
    text = data.TextSplit(np.array([256, *BYTES.encode("a b")]), 3)
    with pytest.raises(data.UserError, match="no window of 8"):
        data.continuation_examples(text, BYTES, prompt_tokens=4, answer_tokens=4)


@quick
@given(
    st.lists(st.tuples(st.text(max_size=30), st.text(max_size=12)).map(lambda t: data.Example(*t, t[1:])), max_size=6),
    st.integers(1, 40),
    st.integers(0, 20),
)
def test_encoded_examples_fit_and_keep_their_ends(examples, context, new):
    encoded, counts = data.encode_examples(examples, BYTES, context, min_new_tokens=new)
    kept = iter(encoded)
    cut = empty = too_long = 0
    for e in examples:
        prompt, answer = e.prompt.encode(), e.answer.encode()
        if not prompt or not answer:
            empty += 1
        elif max(len(answer) + 1, new) >= context:
            too_long += 1
        else:
            tokens, start = next(kept)
            assert tokens[-1] == BYTES.end and BYTES.end not in tokens[:-1]
            assert bytes(tokens[start:-1]) == answer
            assert 1 <= start and prompt.endswith(bytes(tokens[:start]))
            assert start + max(len(answer) + 1, new) <= context
            if start < len(prompt):  # no more is cut than must be
                cut += 1
                assert start + max(len(answer) + 1, new) == context
    assert next(kept, None) is None
    assert counts == {
        "kept": len(encoded),
        "cut": cut,
        "skipped": empty + too_long,
        "too_long": too_long,
        "empty": empty,
    }


def test_prompts_are_cut_from_the_left():
    example = data.Example("a long dialogue\nTL;DR:", " x", ("x",))
    assert BYTES.decode(data.encode_prompt(example, BYTES, 7)) == "\nTL;DR:"
    assert BYTES.decode(data.encode_prompt(example, BYTES, 100)) == example.prompt
    with pytest.raises(ValueError, match="max_tokens"):
        data.encode_prompt(example, BYTES, 0)


# --------------------------------------------------------------------------------------------------------- the hub


def in_a_new_python(code, home, **env):
    """Runs code that prints JSON: HF_ENDPOINT and the like are read once, when the libraries are imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()} | env
    # The libraries' threads can abort an interpreter that is shutting down ("terminate called without an active
    # exception", seen once on a busy machine): the process ends before it comes to that.
    code = f"import json, os, sys, data\n{textwrap.dedent(code)}\nsys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=env | {"HF_HOME": str(home)},
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


THREE = ("train", "validation", "test")
RECORDS = {  # as the hub's tables have them, columns that we do not use included
    "Salesforce/wikitext:wikitext-2-raw-v1": {s: [{"text": ""}, {"text": f" = {s} = \n"}, {"text": ""}] for s in THREE},
    "knkarthick/samsum": {s: [{"id": "1", "dialogue": f"A: {s}", "summary": "S."}] for s in THREE},
    "EdinburghNLP/xsum": {s: [{"document": f"D {s}", "summary": "S.", "id": "1"}] for s in THREE},
    "rajpurkar/squad": {
        "train": [
            {
                "id": f"{i}",
                "title": "t",
                "context": f"c{i % 100}",
                "question": "q?",
                "answers": {"text": ["a"], "answer_start": [0]},
            }
            for i in range(200)
        ],
        "validation": [
            {
                "id": "d",
                "title": "t",
                "context": "dev",
                "question": "q?",
                "answers": {"text": ["a", "the b"], "answer_start": [0, 1]},
            }
        ],
    },
    "openai/gsm8k:main": {
        "train": [{"question": f"q{i}", "answer": "1+1=<<1+1=2>>2\n#### 2"} for i in range(100)],
        "test": [{"question": "q", "answer": "x\n#### 1,000"}],
    },
    "agentica-org/DeepScaleR-Preview-Dataset": {
        "train": [{"problem": f"p{i}", "answer": "1", "solution": "s"} for i in range(100)]
    },
    "HuggingFaceH4/MATH-500": {"test": [{"problem": "p", "solution": "s", "answer": "\\frac{1}{2}", "level": 1}]},
    "HuggingFaceH4/aime_2024": {"train": [{"id": 1, "problem": "p", "solution": "s", "answer": "025"}]},
    "math-ai/aime25": {"test": [{"problem": "p", "answer": "70", "id": "0"}]},
    "math-ai/minervamath": {"test": [{"question": "p", "answer": "8.7e8"}]},
    "math-ai/olympiadbench": {"test": [{"question": "p", "final_answer": ["1", "3"], "solution": ["s"]}]},
}


def test_every_set_reads_from_the_hub_as_from_files(tmp_path):
    with FakeHub(RECORDS) as hub:
        got, _ = in_a_new_python(
            """
            out = {}
            tokenizer = data.load_tokenizer("bytes")
            for spec in data.DATASETS.values():
                for split in spec.hub_splits:
                    if spec.kind == "text":
                        text = data.load_text(spec.name, split, tokenizer, cache_dir=CACHE)
                        out[f"{spec.name} {split}"] = tokenizer.decode(text.tokens.tolist())
                    else:
                        examples = data.load_examples(spec.name, split)
                        out[f"{spec.name} {split}"] = [[e.prompt, e.answer, e.references] for e in examples]
            print(json.dumps(out))
            """.replace("CACHE", repr(str(tmp_path / "cache"))),
            tmp_path,
            HF_ENDPOINT=hub.url,
        )
    assert set(got) == {f"{s.name} {split}" for s in data.DATASETS.values() for split in s.hub_splits}
    assert got["wikitext2 test"] == " \n = test = \n \n"
    assert got["samsum validation"] == [["A: validation\nTL;DR:", " S.", ["S."]]]
    assert got["xsum train"] == [["D train\nTL;DR:", " S.", ["S."]]]
    assert got["squad test"] == [["dev\nQuestion: q?\nAnswer:", " a", ["a", "the b"]]]
    contexts = [{prompt.partition("\n")[0] for prompt, *_ in got[f"squad {s}"]} for s in ("train", "validation")]
    assert not contexts[0] & contexts[1] and len(got["squad train"]) + len(got["squad validation"]) == 200
    assert got["gsm8k test"] == [["Question: q\nAnswer:", " x\n#### 1,000", ["1,000"]]]
    assert len(got["gsm8k train"]) + len(got["gsm8k validation"]) == 100 and got["gsm8k validation"]
    assert len(got["deepscaler train"]) + len(got["deepscaler validation"]) == 100
    assert [got[f"{n} test"][0][2][0] for n in ("math500", "aime24", "aime25", "minerva", "olympiad")] == [
        "\\frac{1}{2}",
        "025",
        "70",
        "8.7e8",
        "1,3",
    ]


def test_a_hub_table_with_other_columns_is_refused(tmp_path):
    with FakeHub({"knkarthick/samsum": {"test": [{"text": "A: hi", "summary": "S."}]}}) as hub:
        got, _ = in_a_new_python(
            """
            try:
                data.load_examples("samsum", "test")
            except data.UserError as error:
                print(json.dumps(str(error)))
            """,
            tmp_path,
            HF_ENDPOINT=hub.url,
        )
    assert "knkarthick/samsum has no column 'dialogue', only text, summary" in got and "--data-dir" in got


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_network_one_sentence_says_what_to_do(tmp_path, env):
    got, stderr = in_a_new_python(
        """
        errors = []
        for load in (lambda: data.load_examples("squad", "train"),
                     lambda: data.load_text("wikitext2", "test", data.load_tokenizer("bytes"), cache_dir="unused")):
            try:
                load()
            except data.UserError as error:
                errors.append(str(error))
        print(json.dumps(errors))
        """,
        tmp_path,
        **env,
    )
    assert "rajpurkar/squad" in got[0] and "DIR/squad-v1.1/train_subset.jsonl" in got[0]
    assert "Salesforce/wikitext" in got[1] and "--data-dir DIR" in got[1] and "HF_HUB_OFFLINE=1" in got[1]
    assert not any("\n" in error for error in got) and "Retrying" not in stderr
    assert not (ROOT / "unused").exists()


def test_without_network_gpt2_names_the_variable(tmp_path):
    got, _ = in_a_new_python(
        """
        try:
            data.load_tokenizer("gpt2")
        except data.UserError as error:
            print(json.dumps(str(error)))
        """,
        tmp_path,
        TIKTOKEN_CACHE_DIR=str(tmp_path / "none"),
        HTTPS_PROXY="http://127.0.0.1:9",
    )
    assert "TIKTOKEN_CACHE_DIR" in got and "--tokenizer bytes" in got and "\n" not in got


def test_without_network_one_message_names_the_set_and_the_vocabulary(tmp_path):
    got, _ = in_a_new_python(
        """
        errors = []
        for arguments in (("wikitext2", "gpt2"), ("samsum", "gpt2", DIR), ("pydocs", "gpt2"), ("amc", "bytes"),
                          ("squad", "gpt3"), ("addition", "bytes")):
            try:
                errors.append(data.prepare(*arguments).name)
            except data.UserError as error:
                errors.append(str(error))
        print(json.dumps(errors))
        """.replace("DIR", repr(str(tmp_path))),
        tmp_path,
        TIKTOKEN_CACHE_DIR=str(tmp_path / "none"),
        HTTPS_PROXY="http://127.0.0.1:9",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    for message, file in ((got[0], "DIR/wikitext-2/wiki.train.raw"), (got[1], "DIR/samsum/train.jsonl")):
        assert "neither" in message and file in message and "DIR/tiktoken-cache" in message
        assert "--dataset pydocs" in message and "\n" not in message
    assert "--tokenizer bytes" in got[2] and "neither" not in got[2]  # pydocs is there
    assert "amc is read from files alone" in got[3] and "--data-dir DIR" in got[3]
    assert "did you mean" in got[4] and got[5] == "bytes"


@needs_real
def test_prepare_gives_the_tokenizer_where_all_is_there():
    assert data.prepare("samsum", "gpt2", str(REAL)).name == "gpt2"


@needs_real
def test_a_data_folder_needs_no_network(tmp_path):
    got, _ = in_a_new_python(
        """
        import socket, sys
        def refuse(*_): raise AssertionError("network")
        socket.socket.connect = refuse
        out = [len(data.load_examples(s.name, split, data_dir=DIR, limit=2))
               for s in data.DATASETS.values() if s.kind == "task" for split in s.files]
        data.load_text("wikitext2", "test", data.load_tokenizer("gpt2", DIR), data_dir=DIR, cache_dir=CACHE)
        print(json.dumps([out, [m for m in ("datasets", "torch", "sympy", "rouge_score") if m in sys.modules]]))
        """.replace("DIR", repr(str(REAL))).replace("CACHE", repr(str(tmp_path))),
        tmp_path,
    )
    assert set(got[0]) == {2} and got[1] == []  # nor what is slow to import


# --------------------------------------------------------------------------------------------- what users really write


def a_set(tmp_path, monkeypatch, rows, **spec):
    """A set of one's own: records in files below tmp_path."""
    files = {split: f"{split}.jsonl" for split in rows}
    for split, records in rows.items():
        (tmp_path / files[split]).write_text("".join(json.dumps(r) + "\n" for r in records))
    how = dict(files=files, columns={"problem": "problem", "answer": "answer"}) | spec
    monkeypatch.setitem(data.DATASETS, "own", data.DatasetSpec("own", "task", "bytes", 4, **data._MATH, **how))
    return lambda split: data.load_examples("own", split, data_dir=str(tmp_path))


def test_a_text_where_texts_belong_is_refused():
    with pytest.raises(ValueError, match="a tuple of texts"):
        data.Example("51+700=", "751", ("751"))


@pytest.mark.parametrize("answer", [{"a": 1}, None, float("nan"), True, [1, {"a": 2}], ""])
def test_answers_that_are_no_text_are_left_out_and_counted(answer, tmp_path, monkeypatch):
    read = a_set(tmp_path, monkeypatch, {"train": [{"problem": "p", "answer": answer}, {"problem": "q", "answer": 7}]})
    examples = read("train")
    assert [e.references for e in examples] == [("7",)] and examples.skipped == 1


def test_variants_are_a_list(tmp_path, monkeypatch):
    rows = [{"problem": "p", "answer": "23", "answer_variants": v} for v in ("23", ["23.0"], [4])]
    examples = a_set(tmp_path, monkeypatch, {"train": rows})("train")
    assert [e.references for e in examples] == [("23", "23.0")] and examples.skipped == 2


def test_squads_answers_are_a_list_too():
    row = {"context": "c", "question": "q", "answers": {"text": {"abc": 1}}}
    assert data._to_example(data.get_dataset("squad"), row) is None
    assert data._to_example(data.get_dataset("squad"), row | {"answers": ["a {b}"]}).references == ("a {b}",)


def test_small_sets_of_ones_own(tmp_path, monkeypatch):
    """Five problems, one file without `key`, no test split: clear sentences, or it works."""
    rows = [{"problem": f"problem {i}", "answer": i} for i in range(40)]
    one = {split: "train.jsonl" for split in data.SPLITS}
    read = a_set(tmp_path, monkeypatch, {"train": rows}, **{"files": one})
    parts = [{e.prompt for e in read(split)} for split in data.SPLITS]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == 40
    read = a_set(tmp_path, monkeypatch, {"train": rows, "validation": rows[:3]})
    with pytest.raises(data.UserError, match="own has no test split: it has train, validation"):
        read("test")
    problems = lambda: ((str(i), data.Example(f"{i}=", str(i), (str(i),))) for i in range(5))  # noqa: E731
    few = data.DatasetSpec("few", "task", "bytes", 4, **data._EXACT, problems=lambda: list(problems()))
    monkeypatch.setitem(data.DATASETS, "few", few)
    found = 0
    for split in data.SPLITS:
        try:
            found += len(data.load_examples("few", split))
        except data.UserError as error:
            assert "has no" in str(error) and "add examples" in str(error)
    assert found == 5


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    read = a_set(tmp_path, monkeypatch, {"train": [{"problem": "p", "answer": 1}]})
    for content, says in ((b"{", "line 1: not a JSON object"), (b"[1]", "needs the field"), (b"", "is empty"),
                          (b"\xff", "is not UTF-8"), (None, "is missing")):  # fmt: off
        (tmp_path / "train.jsonl").unlink() if content is None else (tmp_path / "train.jsonl").write_bytes(content)
        with pytest.raises(data.UserError, match=says):
            read("train")


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(data.UserError, match="token cache .* cannot be written"):
        data.load_text("pydocs", "test", data.load_tokenizer("bytes"), cache_dir=str(tmp_path / "cache" / "x"))
