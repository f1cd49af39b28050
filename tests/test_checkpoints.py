"""support/checkpoints.py and support/device.py: files of ours and of others, GPT-2's weights, devices."""

import json
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, in_a_new_python
from safetensors.torch import load_file, save_file
from test_moe import SMALL, make, rng, run

from moe import MoEConfig, upcycle
from support.checkpoints import load_checkpoint, load_gpt2, load_model, read_config, save_checkpoint
from support.device import pick_device
from support.errors import UserError
from support.optimizer import make_optimizer, restore

# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checkpoint_round_trip(tmp_path, dtype):
    """Weights, metadata and the optimizer's tensors by the names of their parameters; always float32 when read. The
    same state is the same bytes, and no random number is drawn."""
    model = make(7, dtype, n_shared_expert=1, gate="prob")
    optimizer = make_optimizer(model, 0.1)
    sum(p.square().sum() for n, p in model.named_parameters() if "ln_f" not in n).backward()
    optimizer.step()
    path, draws = str(tmp_path / "new" / "model.safetensors"), torch.get_rng_state()
    for name in (path, str(tmp_path / "again")):
        save_checkpoint(name, model, optimizer, step=7, nested={"a": [1, 2.5, None]})
    assert Path(path).read_bytes() == (tmp_path / "again").read_bytes()
    loaded, metadata, moments = load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), draws)
    assert loaded.config == read_config(path) == model.config
    assert metadata == {"step": 7, "nested": {"a": [1, 2.5, None]}}
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[k].float(), theirs[k]) and theirs[k].dtype == torch.float32 for k in ours)
    other = make_optimizer(loaded, 0.1)
    restore(other, loaded, moments)
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert ("ln_f" in name) == (a not in optimizer.state) == (b not in other.state)
        assert all(torch.equal(x.float(), other.state[b][k].float()) for k, x in optimizer.state.get(a, {}).items())
    moments["wte.weight.exp_avg"] = torch.zeros(3)
    with pytest.raises(UserError, match="does not fit the weights: see wte.weight"):
        restore(make_optimizer(loaded, 0.1), loaded, moments)


def test_broken_and_foreign_files_are_refused(tmp_path):
    save_checkpoint(str(tmp_path / "good"), make())
    whole, weights = (tmp_path / "good").read_bytes(), load_file(tmp_path / "good")
    (tmp_path / "truncated").write_bytes(whole[:-100])
    (tmp_path / "garbage").write_bytes(b"\x80" * 4000)
    save_file({"w": torch.zeros(3)}, tmp_path / "foreign")
    for name, change in (("bigger", {"n_embd": 32}), ("dropping", {"expert_capacity": 4})):
        save_file(weights, tmp_path / name, metadata={"config": json.dumps(SMALL | change)})
    for name in "truncated garbage foreign bigger dropping missing".split():
        with pytest.raises(ValueError, match="is not a readable checkpoint") as error:
            load_model(str(tmp_path / name))
        assert "\n" not in str(error.value)
    save_file(weights, tmp_path / "earlier", metadata={"config": json.dumps(SMALL | {"expert_capacity": 0})})
    assert load_model(str(tmp_path / "earlier"))[0].config == MoEConfig(**SMALL)


# ------------------------------------------------------------------------------------------------------ GPT-2's weights


TOKENS = torch.arange(60).view(3, 20)


@pytest.fixture
def gpt2(tmp_path):
    """A random GPT-2 by transformers, in which every weight counts -> its folder, its logits."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, n_positions=20, n_embd=32, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    g = rng(11)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
        model.save_pretrained(tmp_path / "gpt2")
        return tmp_path / "gpt2", model(TOKENS).logits


def test_gpt2_of_transformers_gives_the_same_logits(gpt2):
    folder, expected = gpt2
    ours = load_gpt2(str(folder))
    torch.testing.assert_close(run(ours, TOKENS).logits, expected, atol=1e-4, rtol=0)
    # The hub's file has no "transformer." before the names, and the causal masks as buffers.
    weights = load_file(folder / "model.safetensors")
    assert all(name.startswith("transformer.") for name in weights)
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 20, 20).tril()}, folder / "model.safetensors")
    torch.testing.assert_close(run(load_gpt2(str(folder)), TOKENS).logits, expected, atol=1e-4, rtol=0)
    moe_model = upcycle(ours, MoEConfig(**vars(ours.config) | dict(n_expert=4, top_k=2, n_shared_expert=1)), rng())
    torch.testing.assert_close(run(moe_model, TOKENS).logits, run(ours, TOKENS).logits, atol=2e-6, rtol=1e-6)
    config = json.loads((folder / "config.json").read_text())
    for change, says in (
        (dict(model_type="bert"), "bert"),
        (dict(activation_function="relu"), "relu"),
        (dict(n_embd=64), "only GPT-2"),
        (dict(n_layer=4), "lacks h.3"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=says):
            load_gpt2(str(folder))


def test_gpt2_comes_from_the_hub_and_without_one_it_is_one_sentence(gpt2, tmp_path):
    folder, expected = gpt2
    code = """
        import torch
        from support.checkpoints import load_gpt2
        try:
            model = load_gpt2("some/gpt2")
            print(json.dumps(model.head(model(torch.arange(60).view(3, 20))[0]).double().sum().item()))
        except ValueError as error:
            print(json.dumps(str(error)))
        """
    with FakeHub({}, models={"some/gpt2": folder}) as hub:
        found, _ = in_a_new_python(code, tmp_path / "hub", HF_ENDPOINT=hub.url)
    assert found == pytest.approx(expected.double().sum().item(), abs=1e-2)
    said, _ = in_a_new_python(code, tmp_path / "none", HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("GPT-2's weights could not be had from 'some/gpt2'") and "HF_ENDPOINT" in said


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device() == torch.device(best)
    with pytest.raises(ValueError, match="tpu"):
        pick_device("tpu")
