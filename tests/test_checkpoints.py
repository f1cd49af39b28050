"""support/checkpoints.py and support/device.py: files of ours and of others, GPT-2's weights, devices."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_moe import SMALL, make, rng, words

from moe import MoEConfig, upcycle
from support.checkpoints import load_gpt2, load_model, read_config, save_model
from support.device import pick_device

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_round_trip(tmp_path, dtype):
    model = make(7, dtype, n_shared_expert=1, gate="prob", expert_capacity=5)
    path = str(tmp_path / "model.safetensors")
    save_model(model, path, step=7, tokenizer="bytes", nested={"a": [1, 2.5, None]})
    before = torch.get_rng_state()
    loaded, metadata = load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == read_config(path) == model.config
    assert metadata == {"step": 7, "tokenizer": "bytes", "nested": {"a": [1, 2.5, None]}}
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    assert all(p.requires_grad for p in loaded.parameters())
    tokens = words(model)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    os.remove(path)  # the loaded weights do not hang on the file
    loaded.wte.weight.data.add_(1)


def test_broken_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "good.safetensors"
    save_model(make(), str(path))
    whole = path.read_bytes()
    names = ("truncated", "empty", "garbage", "foreign", "other", "missing")
    bad = {name: tmp_path / f"{name}.safetensors" for name in names}
    bad["truncated"].write_bytes(whole[:-100])
    bad["empty"].write_bytes(b"")
    bad["garbage"].write_bytes(b"\x80" * 4000)
    save_file({"w": torch.zeros(3)}, bad["foreign"])
    weights = load_file(path)
    config = json.dumps(SMALL)
    save_file({k: v for k, v in weights.items() if "router" not in k}, bad["other"], metadata={"config": config})
    changes = {
        "unknown": {"colour": 3},
        "impossible": {"top_k": 9},
        "bigger": {"n_embd": 32},
        "text": {"n_layer": "3"},
        "null": {"n_head": None},
        "bool": {"n_expert": True},
        "number": {"gate": 1},
        "table": {"context": {"a": 1}},
        "many": {"n_layer": 10**9},
        "huge": {"vocab_size": 10**30},
        "words": {"metadata": "step 3"},
    }
    headers = {name: json.dumps(SMALL | change) for name, change in changes.items()}
    headers |= {"list": "[1]", "pairs": "[[1, 2]]", "nothing": "null", "half": '{"n_layer": 3', "deep": "[" * 200_000}
    headers |= {"deeper": '{"a":' * 200_000, "digits": '{"n_layer": ' + "9" * 10_000 + "}"}
    for name, header in headers.items():
        bad[name] = tmp_path / f"{name}.safetensors"
        save_file(weights, bad[name], metadata={"config": header})
    dtypes = {"one-bfloat16": weights | {"ln_f.bias": weights["ln_f.bias"].bfloat16()}}
    dtypes |= {"one-integer": weights | {"ln_f.bias": weights["ln_f.bias"].int()}}
    dtypes |= {"all-integer": {k: w.int() for k, w in weights.items()}}
    for name, tensors in dtypes.items():
        bad[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, bad[name], metadata={"config": config})
    bad["folder"] = tmp_path
    no_config = {"truncated", "empty", "garbage", "foreign", "missing", "folder"}
    no_config |= headers.keys() - {"bigger", "many"}  # those are possible, if not with these weights
    for name, file in bad.items():
        if name in no_config:
            with pytest.raises(ValueError, match="is not a readable checkpoint"):
                read_config(str(file))
        else:
            read_config(str(file))
        with pytest.raises(ValueError) as error:
            load_model(str(file))
        message = str(error.value)
        assert str(file) in message and "\n" not in message and len(message) < len(str(file)) + 500


HUGE = [
    dict(n_layer=10**7),
    dict(n_layer=10**18),
    dict(n_shared_expert=10**8),
    dict(n_layer=20, moe_every=1, n_shared_expert=40),
    dict(n_expert=10**8),
    dict(n_expert=2**31 - 1),
    dict(n_embd=2**30),
    dict(n_embd=2**30, n_expert=10**8),
    dict(vocab_size=2**31 - 1, context=2**31 - 1),
    dict(vocab_size=10**30),
    dict(expert_capacity=10**30),
]


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory of a process")
def test_a_header_that_claims_a_huge_model_is_refused_in_seconds_and_little_memory(tmp_path):
    """Of a file of some kB. Tensors of any size are only described, and there are no more modules than tensors."""
    path = tmp_path / "model.safetensors"
    save_model(make(), str(path))
    weights = load_file(path)
    for i, claim in enumerate(HUGE):
        save_file(weights, tmp_path / f"{i}.safetensors", metadata={"config": json.dumps(SMALL | claim)})
    code = f"""
import resource, sys, time
sys.path[:0] = [{str(ROOT)!r}]
from support.checkpoints import load_model
before = resource.getrusage(resource.RUSAGE_SELF)
for i in range({len(HUGE)}):
    try:
        load_model(f"{{i}}.safetensors")
        print(i, "was loaded")
    except ValueError as error:
        assert "is not a readable checkpoint" in str(error) and "\\n" not in str(error), error
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_utime - before.ru_utime < 30 and after.ru_maxrss - before.ru_maxrss < 100_000)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "True\n" and done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------ GPT-2's weights


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 by transformers, in which every weight counts -> (model, folder)."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, n_positions=20, n_embd=32, n_layer=3, n_head=4)
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    g = rng(11)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder, safe_serialization=True)
    return model, folder


def test_gpt2_of_transformers_gives_the_same_logits(gpt2, tmp_path):
    theirs, folder = gpt2
    tokens = torch.randint(0, 61, (3, 20), generator=rng(12))
    expected = theirs(tokens).logits.detach()
    ours = load_gpt2(str(folder))
    torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-4, rtol=0)
    assert ours.count_parameters()[0] == theirs.num_parameters()
    # The hub's file has no "transformer." before the names, and the causal masks as buffers.
    weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    assert weights.keys() != load_file(folder / "model.safetensors").keys()
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20).tril() for i in range(3)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.testing.assert_close(load_gpt2(str(tmp_path))(tokens).logits, expected, atol=1e-4, rtol=0)
    moe_model = upcycle(ours, MoEConfig(**vars(ours.config) | dict(n_expert=4, top_k=2, n_shared_expert=1)), rng())
    torch.testing.assert_close(moe_model(tokens).logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(moe_model(tokens).logits, ours(tokens).logits, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="bert"), "bert"),
        (dict(activation_function="relu"), "relu"),
        (dict(n_embd=64), "only GPT-2"),
        (dict(n_layer=4), "lacks h.3"),
        (dict(n_layer=None), "n_layer"),
        (dict(n_layer="3"), "n_layer"),
        (dict(n_layer=10**9), "more than"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn"),
    ],
)
def test_other_models_are_refused(gpt2, tmp_path, change, message):
    _, folder = gpt2
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        load_gpt2(str(tmp_path))


def test_a_deep_configuration_of_gpt2_is_refused(gpt2, tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="RecursionError"):
        load_gpt2(str(tmp_path))


def test_a_folder_without_gpt2_is_refused(gpt2, tmp_path):
    _, folder = gpt2
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for content in (None, b"", b"nonsense"):
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_gpt2(str(tmp_path))


def load_through_hub(endpoint, cache):
    code = (
        "import torch; from support.checkpoints import load_gpt2\n"
        "try: print(float(load_gpt2('some/gpt2')(torch.arange(20)[None]).logits.double().sum()))\n"
        "except ValueError as error: print('ValueError:', error)"
    )
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    env |= dict(HF_ENDPOINT=endpoint, HF_HOME=str(cache), OMP_NUM_THREADS="1", NO_PROXY="*")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_gpt2_comes_from_the_hub(gpt2, tmp_path):
    """A hub on loopback, as far as one download needs it."""
    theirs, folder = gpt2
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.partition("/some/gpt2/resolve/main/")[2]
            body = (folder / name).read_bytes() if name in ("config.json", "model.safetensors") else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        got = load_through_hub(f"http://127.0.0.1:{server.server_port}", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert any(path.endswith("model.safetensors") for path in asked)
    assert abs(float(got) - theirs(torch.arange(20)[None]).logits.double().sum().item()) < 1e-2


def test_an_unreachable_hub_is_one_sentence(tmp_path):
    message = load_through_hub("http://127.0.0.1:9", tmp_path)
    assert message.startswith("ValueError: GPT-2's weights could not be had from 'some/gpt2'")
    assert "HF_ENDPOINT" in message


# ------------------------------------------------------------------------------------------------------------- devices


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device() == torch.device(
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    with pytest.raises(ValueError, match="tpu"):
        pick_device("tpu")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(ValueError, match=name):
                pick_device(name)
