"""Every bug is put in and found, and a clean record passes."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from recipes.hf_routing import next_token_log_probs  # noqa: E402
from recipes.replay_check import check_replay  # noqa: E402

B, T = 4, 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    for p in model.parameters():  # a model with opinions: log-probabilities that differ between positions
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def look(model, tokens, attention):
    """-> experts [B, T, L, K], router log-probs [B, T, L, E], log-probs [B, T]."""
    log_probs, tape = next_token_log_probs(model, tokens, attention_mask=attention)
    return tape.experts, tape.router_log_probs(), log_probs


def batch(lengths, side):
    """Random rows of these lengths, with padding -> tokens [B, T + 1], attention [B, T + 1], mask [B, T]."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 60, (n + 1,), generator=generator) for n in lengths]
    tokens, attention = torch.zeros(2, len(rows), T + 1, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(T + 1 - len(row), T + 1)
        tokens[i, place], attention[i, place] = row, 1
    return tokens, attention, (attention[:, :-1] * attention[:, 1:]).bool()


LENGTHS = [T, T - 3, T - 7, T - 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_clean_record_passes(model, side):
    tokens, attention, mask = batch(LENGTHS, side)
    mask[3] = False  # a row without a token
    experts, live, log_probs = look(model, tokens, attention)
    noisy = live + 0.02 * torch.randn(live.shape, generator=torch.Generator().manual_seed(0))
    assert check_replay(experts, log_probs + 0.01, noisy, log_probs, mask) == []
    experts[~mask], log_probs[~mask] = -1, float("nan")  # what padding holds is nobody's business, in a record too
    assert check_replay(experts, log_probs, live, log_probs, mask) == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("by", [-1, 1])
def test_each_bug_is_found(model, side, by):
    """An offset, padding on the other side, another row, layers in another order, other log-probabilities."""
    tokens, attention, mask = batch(LENGTHS, side)
    experts, live, log_probs = look(model, tokens, attention)

    def wrong(experts, log_probs):
        return check_replay(experts, log_probs, live, truth, mask)

    truth, unknown = log_probs, "of other weights, another dtype, or a wrong layer, expert or token"
    assert wrong(experts.roll(by, 1), truth) == [f"row {i}: experts are moved by {by:+d}" for i in range(B)]
    for record in (truth, truth.masked_fill(~mask, torch.nan)):  # whatever padding holds
        assert wrong(experts, record.roll(by, 1)) == [f"row {i}: log_probs are moved by {by:+d}" for i in range(B)]
    assert wrong(experts.flip(2), truth) == [f"row {i}: experts are {unknown}" for i in range(B)]
    for broken in (1.5 * truth, truth / 0):
        assert wrong(experts, broken) == [f"row {i}: log_probs are {unknown}" for i in range(B)]

    other = look(model, *batch(LENGTHS, "left" if side == "right" else "right")[:2])[0]
    paddings = [n if side == "right" else -n for n in (0, 3, 7, 5)]
    expected = [f"row {i}: experts are with another padding {n:+d}" for i, n in enumerate(paddings) if n]
    assert wrong(other, truth) == expected

    tokens, attention, mask = batch([T] * B, side)
    experts, live, truth = look(model, tokens, attention)
    swapped = [f"row {i}: experts are those of row {1 - i}" for i in range(2)]
    assert wrong(experts[[1, 0, 2, 3]], truth) == swapped
