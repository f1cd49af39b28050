"""Command lines, files that something has changed, and the public functions besides the losses, on odd input.

What is held: a command line gives arguments or a UserError of one line. A file is read as it was written, or it is
refused in one line (UserError, ValueError), or what it says is another thing of the right kind (weights and texts have
no checksum); there is no other exception and no case takes a minute. Functions of tensors give finite numbers for
values from 1e-30 to 1e30, with NaN wherever a mask leaves it out.

    python -m pytest tests/test_fuzz_programs.py                      40 cases a test
    FUZZ_CASES=10000 python -m pytest tests/test_fuzz_programs.py     the long way
"""

import json
import math
import os
import shutil
import struct
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from training import BYTES, MICRO, args_of

import data
import eval_routing
import moe
import train
from moe import GPT, MoEConfig, Routes, choose_experts, router_losses, upcycle, within_capacity
from support import head, kernels, pictures
from support.check_inputs import check_inputs
from support.checkpoints import load_model, read_gpt2_config
from support.errors import UserError, sentence
from support.generation import sample_tokens
from support.routing_report import routing_report
from support.run_folder import NEW_STATE, Run, load_state, read_metrics
from support.samples import load_run, load_samples
from support.tasks import rng

CASES = int(os.environ.get("FUZZ_CASES", 40))
fuzz = settings(
    max_examples=CASES,
    deadline=timedelta(minutes=1),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # cases are small; making them smaller takes minutes
    report_multiple_bugs=False,
    print_blob=True,
)


def refused(call, *args, kinds=(UserError, ValueError)):
    """What the call gives, or None where it is refused in one line."""
    try:
        return call(*args)
    except kinds as error:
        text = sentence(error) if isinstance(error, UserError) else str(error)
        assert text and "\n" not in text, text
        return None


# ------------------------------------------------------------------------------------------------------ command lines

DIGITS = ["0", "1", "-1", "2", "8", "007", "1_000", "٣", "1e3", "1e-300", "1e400", "nan", "-inf", "0x10", "9" * 400]
ODD = ["", " ", "-", "--", "--=", "a\0b", "\udcff", "x" * 5000, "/", "..", "[" * 99, "%s", "{}", "é", "\n", "True"]


def words_of(program) -> tuple[list[str], list[str]]:
    """Flags of a program with those of every loss, and names that some of them take."""
    if program is eval_routing:
        flags = "--dataset --data-dir --samples --split --batch-size --device --seed --show-tokens --compare --out"
        return flags.split(), ["test", "cpu", "pydocs", *data.DATASETS]
    known = vars(args_of("--algo lm")).keys() | {name for options in train.OPTIONS.values() for name in options}
    flags = ["--" + name.replace("_", "-") for name in known] + ["--entropy-alpha", "--shift-base"]
    names = [*train.METHODS, "dense", "lm", "erl", *data.DATASETS, "tiny", "paper", "gpt2", "bytes", "router", "sum"]
    return sorted(flags), names


@pytest.mark.parametrize("program", [train, eval_routing], ids=["train", "eval_routing"])
@settings(fuzz, max_examples=5 * CASES)
@given(draw=st.data())
def test_command_lines_are_arguments_or_a_sentence(program, draw):
    flags, names = words_of(program)
    value = st.one_of(st.sampled_from(DIGITS), st.sampled_from(names), st.sampled_from(ODD), st.text(max_size=6))
    word = st.one_of(
        st.tuples(st.sampled_from(flags), value),
        st.tuples(st.sampled_from(flags)),
        st.tuples(value),
        st.builds(lambda flag, text: (f"{flag}={text}",), st.sampled_from(flags), value),
    )
    line = [w for part in draw.draw(st.lists(word, max_size=6)) for w in part if w not in ("-h", "--help")]
    if draw.draw(st.booleans()):
        line = ["run"] + line if program is eval_routing else ["--algo", draw.draw(st.sampled_from(names[:9]))] + line
    refused(program.parse, line, kinds=UserError)


# ------------------------------------------------------------------------------------------------------ mutated files

BYTE_STRINGS = [b"[" * 100_000, b'{"a":' * 100_000, b"\0", b"\xff\xfe", b"9" * 5000, b"9", b"-", b"NaN", b'"', b"\n"]
VALUES = [None, True, -1, 0, 1, 3, 0.5, 10**9, 10**18, 10**400, 1e308, math.nan, -math.inf, "", "x", "3", "\ud800"]
VALUES += ["a\0b", "/elsewhere", "../..", [], [1], [[]], ["x", 1], {}, {"text": 3}, {"a": {"b": []}}]
hits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "insert", "drop"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 255),
        st.sampled_from(BYTE_STRINGS),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, hits, within: int | None = None) -> bytes:
    """Bits flipped, the end cut off, something put in, a few bytes left out; `within` the first bytes."""
    for kind, place, bits, new in hits:
        i = int(place * min(len(content), within or len(content)))
        rest = {
            "flip": bytes([content[i] ^ bits]) + content[i + 1 :] if content else b"",
            "cut": b"",
            "insert": new + content[i:],
            "drop": content[i + bits :],
        }
        content = content[:i] + rest[kind]
    return content


def edited(table: dict, draw) -> dict:
    """The same table with one or two of its values other ones, or gone."""
    for _ in range(draw.draw(st.integers(1, 2))):
        key = draw.draw(st.sampled_from(sorted(table) or ["x"]))
        if draw.draw(st.integers(0, 5)):
            table = table | {key: draw.draw(st.sampled_from(VALUES))}
        else:
            table = {k: v for k, v in table.items() if k != key}
    return table


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run in "kept", of milliseconds; what a test changes is the copy "r"."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as m:
        m.setitem(moe.SIZES, "tiny", MICRO)
        m.chdir(folder)
        flags = "--dataset addition --batch-size 2 --eval-samples 2 --test-samples 2 --max-new-tokens 3"
        train.run(args_of(f"--algo lm {flags} --pretrain-steps 2 --steps 2 --checkpoint-every 3 --out kept"))
        shutil.copytree("kept", "r")
        m.setattr(pictures, "save", lambda figure, path: None)  # the time of a case
        yield folder


def text_or_table(name: str, draw) -> bytes:
    """A JSON file of the run, changed as bytes or as a table."""
    content = Path("kept", name).read_bytes()
    if draw.draw(st.booleans()):
        return damaged(content, draw.draw(hits))
    return json.dumps(edited(json.loads(content), draw)).encode()


@fuzz
@given(draw=st.data())
def test_a_changed_config_of_a_run(run_folder, draw):
    """By train.py --resume, eval_routing.py and the pictures."""
    Path("r/config.json").write_bytes(text_or_table("config.json", draw))
    args = refused(train.parse, ["--resume", "--out", "r"], kinds=UserError)
    assert args is None or (args.out, args.resume) == ("r", True)
    args = eval_routing.parse(["r"])
    if loaded := refused(load_run, "r", kinds=UserError):
        refused(load_samples, args, *loaded[:2], kinds=UserError)
    if grouped := refused(pictures.group_runs, ["r"], kinds=UserError):
        pictures.draw_curves(*grouped, "r.png")


@fuzz
@given(draw=st.data())
def test_changed_metrics_of_a_run(run_folder, draw):
    content = Path("kept/metrics.jsonl").read_bytes()
    if draw.draw(st.booleans()):
        content = damaged(content, draw.draw(hits))
    else:
        rows = [json.dumps(edited(json.loads(row), draw)) for row in content.splitlines()]
        content = "\n".join(rows).encode()
    Path("r/metrics.jsonl").write_bytes(content)
    shutil.copy("kept/config.json", "r/config.json")
    rows = refused(read_metrics, "r", kinds=UserError)
    if rows is not None:
        pictures.draw_curves(*pictures.group_runs(["r"]), "r.png")


def leaves(value, path=()):
    """Where the values of nested tables are."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


@fuzz
@given(draw=st.data())
def test_a_changed_state_of_a_run(run_folder, draw):
    """Zip files have checksums: a state is what it was, or refused. One with another value fits or is refused."""
    path = Path("r/checkpoint/state.pt")
    content = Path("kept/checkpoint/state.pt").read_bytes()
    state = load_state("kept/checkpoint")
    changed = draw.draw(st.booleans())
    if changed:
        where = draw.draw(st.sampled_from(list(leaves(state))[1:]))
        table = state
        for key in where[:-1]:
            table = table[key]
        table[where[-1]] = draw.draw(st.sampled_from([*VALUES[:-1], torch.zeros(3), torch.tensor(1)]))
        torch.save(state, path)
    else:
        path.write_bytes(damaged(content, draw.draw(hits)))
    found = refused(load_state, "r/checkpoint", kinds=UserError)
    if found is None:
        return
    if not changed:
        assert repr(found) == repr(state)
    json.dumps(found["before"])  # goes into summary.json
    model, _ = load_model("kept/checkpoint/model.safetensors")
    args = args_of("--algo lm --dataset addition --steps 2 --pretrain-steps 2 --out r")
    run = Run(args, dict(NEW_STATE) | found, {"supervised": 2, "lm": 2}, lambda m: m)
    refused(run.begin, "lm", model, None, 1e-3, kinds=UserError)


@fuzz
@given(draw=st.data())
def test_changed_weights(run_folder, draw):
    content, path = Path("kept/checkpoint/model.safetensors").read_bytes(), "r/checkpoint/model.safetensors"
    length = struct.unpack("<Q", content[:8])[0]
    if draw.draw(st.booleans()):
        content = damaged(content, draw.draw(hits), within=draw.draw(st.sampled_from([8, 8 + length, None])))
    else:
        header = json.loads(content[8 : 8 + length])
        config = json.dumps(edited(json.loads(header["__metadata__"]["config"]), draw))
        header = json.dumps(header | {"__metadata__": {"config": config}}).encode()
        content = struct.pack("<Q", len(header)) + header + content[8 + length :]
    Path(path).write_bytes(content)
    if loaded := refused(load_model, path, kinds=ValueError):
        assert isinstance(loaded[0], GPT)


@fuzz
@given(draw=st.data())
def test_a_changed_configuration_of_gpt2(run_folder, draw):
    sizes = dict(vocab_size=50257, n_positions=8, n_layer=2, n_head=2, n_embd=4, model_type="gpt2")
    content = json.dumps(sizes).encode()
    table = draw.draw(st.booleans())
    content = json.dumps(edited(sizes, draw)).encode() if table else damaged(content, draw.draw(hits))
    Path("config.json").write_bytes(content)
    config = refused(read_gpt2_config, ".", kinds=ValueError)
    assert config is None or isinstance(config, MoEConfig)


ROWS = {
    "samsum": {"dialogue": "A: one\nB: two", "summary": "One and two."},
    "squad": {"context": "It was in 1066.", "question": "When?", "answers": ["1066", "in 1066"]},
    "gsm8k": {"question": "1 + 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
    "math500": {"problem": "What is $1/2$?", "answer": "\\frac{1}{2}", "answer_variants": ["0.5"]},
}


@pytest.mark.parametrize("name", ROWS)
@fuzz
@given(draw=st.data())
def test_changed_data_sets(run_folder, name, draw):
    """Read, encoded and scored: what is scored is a number in [0, 1]."""
    spec, rows = data.get_dataset(name), [ROWS[name]] * 3
    if table := draw.draw(st.booleans()):
        rows = [edited(ROWS[name], draw), *rows]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = Path("sets", spec.files["test"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if table else damaged(content, draw.draw(hits)))
    examples = refused(lambda: data.load_examples(name, "test", data_dir="sets"), kinds=UserError)
    if examples is not None:
        encoded, counts = data.encode_examples(examples, BYTES, 64)
        assert len(encoded) == counts["kept"] and all(len(e.tokens) <= 64 for e in encoded)
        scores = data.score(spec, [e.answer for e in examples], examples)
        assert all(0 <= s <= 1 for s in scores.values())


@fuzz
@given(hits=hits)
def test_a_changed_text_is_a_text_or_a_sentence(run_folder, hits):
    for split, file in data.get_dataset("wikitext2").files.items():
        Path("sets", file).parent.mkdir(parents=True, exist_ok=True)
        Path("sets", file).write_bytes(damaged(f"the {split}\n = A title = \n \n".encode(), hits))
    text = refused(lambda: data.load_text("wikitext2", "test", BYTES, data_dir="sets", cache_dir="c"), kinds=UserError)
    assert text is None or len(text.tokens) == 1 + text.num_bytes


@fuzz
@given(hits=hits, within=st.sampled_from([128, None]))
def test_a_changed_token_cache_is_made_again(run_folder, hits, within):
    whole = np.array(data.load_text("pydocs", "test", BYTES, cache_dir="cache").tokens)
    [file] = Path("cache").iterdir()
    content = damaged(file.read_bytes(), hits, within)
    file.unlink()  # not written in place: the array may still be mapped
    file.write_bytes(content)
    assert np.array_equal(data.load_text("pydocs", "test", BYTES, cache_dir="cache").tokens, whole)


# -------------------------------------------------------------------------------------------------- tensors of any size

sizes = st.fixed_dictionaries(
    dict(
        B=st.integers(1, 3),
        T=st.integers(1, 5),
        L=st.integers(1, 3),
        E=st.integers(1, 6),
        power=st.integers(-30, 30),
        seed=st.integers(0, 10**6),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    )
)


def numbers(case, stream, *shape, power=None):
    """Of either sign, sizes from 1e-30 to 10^power; every tenth 0."""
    g, top = rng(case["seed"], stream), case["power"] if power is None else power
    sizes = 10.0 ** (-30 + (top + 30) * torch.rand(shape, generator=g, dtype=torch.float64))
    return (sizes * torch.randint(-9, 11, shape, generator=g).clamp(-1, 1)).to(case["dtype"])


@pytest.mark.parametrize("gate", moe.GATES)
@fuzz
@given(case=sizes, uniform=st.booleans())
def test_choose_experts(gate, case, uniform):
    B, T, E, g = case["B"], case["T"], case["E"], rng(case["seed"])
    K = 1 + case["seed"] % E
    config = MoEConfig(n_expert=E, top_k=K, gate=gate, moe_every=1)
    logits = numbers(case, 1, B, T, E).requires_grad_()
    imposed = torch.rand(B, T, E, generator=g).topk(K).indices
    forced = torch.rand(B, T, generator=g) < 0.5
    for routes in (None, Routes(imposed, forced, uniform)):
        experts, weights = choose_experts(logits, config, routes)
        assert experts.shape == weights.shape == (B, T, K) and ((0 <= experts) & (experts < E)).all()
        assert all(len(set(row)) == K for row in experts.flatten(0, 1).tolist())
        assert weights.isfinite().all() and (weights >= 0).all() and (weights <= 1.01).all()
        if gate != "prob":
            torch.testing.assert_close(weights.sum(-1).double(), torch.ones(B, T).double(), atol=2e-2, rtol=0)
        (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
        assert gradient.isfinite().all()
        keep, used = within_capacity(experts, E, 1 + case["seed"] % 4)
        taken = torch.nn.functional.one_hot(experts, E).sum((1, 2))
        assert torch.equal(used, taken) and keep.sum() == taken.clamp(max=1 + case["seed"] % 4).sum()


@fuzz
@given(case=sizes, junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_router_losses_and_the_report(case, junk):
    """z is a square: of logits above 1.8e19 it is beyond float32, and a run that gets there ends (`loss is inf`)."""
    B, T, L, E, g = *(case[k] for k in "BTLE"), rng(case["seed"])
    K = 1 + case["seed"] % E
    mask = torch.rand(B, T, generator=g) < (0.0, 0.5, 2.0)[case["seed"] % 3]
    clean = [numbers(case, i, B, T, L, E) for i in (1, 2)]
    experts = [x.float().topk(K).indices for x in clean]
    new, old = (x.masked_fill(~mask[..., None, None], junk).requires_grad_() for x in clean)
    balance, z, load = router_losses(new, experts[0], mask)
    assert balance.isfinite().all() and load.isfinite().all() and not z.isnan().any()
    assert z.isfinite().all() or clean[0].abs().max() > 1e19
    assert all(
        torch.equal(x, y) for x, y in zip((balance, z, load), router_losses(clean[0], experts[0], mask), strict=True)
    )
    (gradient,) = torch.autograd.grad(balance.sum(), new)
    assert gradient.isfinite().all() and not gradient[~mask].any()
    report = routing_report(new, old, mask, top_k=K)
    assert all(x.isfinite().all() for x in report.values()), report
    unpadded = routing_report(*clean, mask, top_k=K)
    assert all(torch.equal(x, unpadded[name]) for name, x in report.items())


@fuzz
@given(case=sizes, top_p=st.floats(0, 1), V=st.sampled_from([1, 2, 50, 5000]))
def test_sample_tokens(case, top_p, V):
    logits = numbers(case, 1, case["B"], V)
    if top_p == 0:
        with pytest.raises(ValueError, match="top_p"):
            sample_tokens(logits, top_p)
        return
    words = sample_tokens(logits, top_p, rng(case["seed"]))
    assert words.shape == (case["B"],) and ((0 <= words) & (words < V)).all()
    assert (logits.float().softmax(-1).gather(-1, words[:, None]) > 0).all()


@fuzz
@given(case=sizes, V=st.sampled_from([2, 50, 1500]), log_temperature=st.integers(-30, 30))
def test_the_two_output_heads(case, V, log_temperature):
    """Products up to 1e30 of features and weights; NaN where the loss's mask is False."""
    dtype = torch.float64 if case["dtype"] == torch.float64 else torch.float32
    half = case["power"] // 2
    x = numbers(case, 1, case["B"], case["T"], 4, power=half).to(dtype)
    weight = numbers(case, 2, V, 4, power=half).to(dtype)
    targets = torch.randint(V, x.shape[:2], generator=rng(case["seed"]))
    found = [part.token_log_probs(x, weight, targets, 10.0**log_temperature) for part in (moe, head)]
    found += [part.lm_loss(x, weight, targets)[1] for part in (moe, head)]
    assert all(f.isfinite().all() and (f <= 1e-4).all() for f in found)
    scale = 1e-5 * (x.abs().amax() * weight.abs().amax()).double() + 1e-5
    for one, other, by in ((*found[:2], max(10.0**log_temperature, moe.MIN_TEMPERATURE)), (*found[2:], 1)):
        assert ((one - other).double().abs() <= scale / by + 1e-5).all()


@fuzz
@given(case=sizes)
def test_the_two_ways_through_experts(case):
    E, D, N, K = case["E"], 4, case["B"] * case["T"], 1 + case["seed"] % case["E"]
    power = min(case["power"], 6)
    x, w_in, b_in, w_out, b_out = (
        numbers(case | {"dtype": torch.float32}, i, *shape, power=power)
        for i, shape in enumerate([(N, D), (E, D, 16), (E, 16), (E, 16, D), (E, D)])
    )
    experts = torch.rand(N, E, generator=rng(case["seed"])).topk(K).indices
    weights = numbers(case, 9, N, K, power=0).float().softmax(-1)
    ways = [part.mix_experts(x, experts, weights, w_in, b_in, w_out, b_out) for part in (moe, kernels)]
    assert all(y.shape == x.shape and y.isfinite().all() for y in ways)
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-4 * float(1 + ways[0].abs().max()))


@fuzz
@given(case=sizes, every=st.integers(1, 3), shared=st.integers(0, 2), gate=st.sampled_from(list(moe.GATES)))
def test_upcycle(case, every, shared, gate):
    """The parent's logits where gates sum to 1, whatever the experts; a ValueError where another size differs."""
    L, E, K, g = case["L"], case["E"], 1 + case["seed"] % case["E"], rng(case["seed"])
    size = dict(vocab_size=11, context=6, n_layer=L, n_head=2, n_embd=8)
    parent = GPT(MoEConfig(n_expert=1, **size), g).double()
    experts = dict(n_expert=E, top_k=K, n_shared_expert=shared, moe_every=every, gate=gate)
    config = refused(lambda: MoEConfig(**size, **experts), kinds=ValueError)
    assert (config is None) == (E > 1 and every > L)
    if config is None:
        return
    model, tokens = upcycle(parent, config, g), torch.randint(11, (2, 6), generator=g)
    logits, expected = model(tokens).logits, parent(tokens).logits
    assert logits.isfinite().all() and model.config == config and model.wte.weight.dtype == torch.float64
    if E == 1 or gate != "prob":
        torch.testing.assert_close(logits, expected)
    assert refused(upcycle, parent, MoEConfig(**size | {"n_embd": 16}, **experts), kinds=ValueError) is None
    assert E == 1 or refused(upcycle, model, config, kinds=ValueError) is None


@fuzz
@given(case=sizes, junk=st.sampled_from([math.nan, math.inf, 1e30]))
def test_check_inputs(case, junk):
    """It says nothing or raises a ValueError, whatever the padding holds."""
    B, T, L, E = 2 * case["B"], case["T"], case["L"], case["E"]
    K = 1 + case["seed"] % E
    mask = torch.rand(B, T, generator=rng(case["seed"])) < 0.7
    given = {"response_mask": mask, "log_probs": numbers(case, 1, B, T), "expert_probs": numbers(case, 2, B, T, L, K)}
    given["experts"] = torch.randint(-1, E + 1, (B, T, L, K), generator=rng(case["seed"], 3))
    said = refused(
        lambda: check_inputs(**given, num_experts=E, rewards=numbers(case, 4, B), group_size=2), kinds=ValueError
    )
    for name, x in list(given.items())[1:3]:
        given[name] = x.masked_fill(~mask.view(B, T, *[1] * (x.dim() - 2)), junk)
    assert said == refused(lambda: check_inputs(**given, num_experts=E), kinds=ValueError)
