"""Reading and imposing routes, on tiny random models of each family."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from recipes.hf_routing import Routes, find_routers, gate_weights, impose, record  # noqa: E402

SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    pad_token_id=0,
    attn_implementation="eager",
)
FAMILIES = {
    "qwen3_moe": dict(num_experts=4, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True),
    "qwen3_moe prob": dict(num_experts=4, moe_intermediate_size=24, head_dim=8, norm_topk_prob=False),
    "qwen3_moe sparse": dict(num_experts=4, moe_intermediate_size=24, head_dim=8, decoder_sparse_step=2),
    "qwen2_moe": dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=16),
    "olmoe": dict(num_experts=4),
    "olmoe renorm": dict(num_experts=4, norm_topk_prob=True),
    "mixtral": dict(num_local_experts=4),
    "gpt_oss": dict(num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 3),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family, seed=0):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family.split()[0], **(SMALL | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for router, _ in find_routers(model):  # far apart, so that no two experts are nearly equal
        torch.nn.init.normal_(router.weight, std=1.0)
    return model


def batch(T=7):
    torch.manual_seed(1)
    return torch.randint(1, 50, (2, T))


def other_routes(tape, E=4):
    return Routes((tape.experts + 1) % E, torch.ones_like(tape.experts[..., 0], dtype=torch.bool), uniform=False)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_own_routes_change_nothing(family, dtype, implementation):
    model, tokens = make(family).to(dtype), batch()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        plain = model(tokens).logits
        with record(model) as tape:
            recorded = model(tokens).logits
        with impose(model, tape.routes()), record(model) as again:
            replayed = model(tokens).logits
    assert torch.equal(recorded, plain) and torch.equal(replayed, plain)
    assert torch.equal(again.experts, tape.experts)
    L = len(find_routers(model))
    assert tape.router_log_probs().shape == (2, 7, L, 4) and tape.experts.shape == (2, 7, L, 2)
    torch.testing.assert_close(tape.router_log_probs().exp().sum(-1), torch.ones(2, 7, L))
    assert tape.router_log_probs().dtype == torch.float32
    if dtype == torch.float32:  # in bfloat16 experts are equal that rounding made so
        assert torch.equal(tape.router_log_probs().topk(2).indices, tape.experts)


@every_family
def test_log_probs_are_of_the_routers_own_inputs(family):
    """Layer, row and position are where they belong: the routers' inputs are read by other means."""
    model, tokens, seen = make(family), batch(), []
    for _, block in find_routers(model):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), record(model) as tape:
        model(tokens)
    for layer, (router, _) in enumerate(find_routers(model)):
        for row, t in ((0, 0), (1, 3), (1, 6)):
            logits = router.weight @ seen[layer][row, t] + getattr(router, "bias", 0)
            expected = logits.log_softmax(-1)
            torch.testing.assert_close(tape.router_log_probs()[row, t, layer], expected, rtol=1e-4, atol=1e-5)


@every_family
def test_other_routes_change_the_output_and_train_the_router(family):
    model, tokens = make(family), batch()
    with record(model) as tape:
        plain = model(tokens).logits
    with impose(model, other_routes(tape)), record(model) as imposed:
        output = model(tokens).logits
    assert torch.equal(imposed.experts, other_routes(tape).experts)
    assert (output - plain).abs().max() > 1e-4
    output.square().mean().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router, _ in find_routers(model))


@every_family
def test_gates_as_written_down(family):
    router, _ = find_routers(make(family))[0]
    logits, experts = torch.tensor([[1.0, -0.5, 0.2, 2.0]]), torch.tensor([[2, 0]])
    p = logits.softmax(-1)[0]
    renormalised = torch.stack([p[2], p[0]]) / (p[2] + p[0])
    plain = family in ("qwen3_moe prob", "qwen3_moe sparse", "qwen2_moe", "olmoe")  # their default: not renormalised
    expected = torch.stack([p[2], p[0]]) if plain else renormalised
    torch.testing.assert_close(gate_weights(router, logits, experts)[0], expected)


@every_family
def test_uniform_weights(family):
    """1/K each where they are forced, the router's own weights elsewhere."""
    model, tokens = make(family), batch()
    with torch.no_grad(), record(model) as tape:
        model(tokens)
    routes = Routes(tape.experts, torch.ones_like(tape.experts[..., 0], dtype=torch.bool))
    seen = []
    _, block = find_routers(model)[0]
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    routes.forced[:, 3:] = False
    with torch.no_grad(), impose(model, routes):
        model(tokens)
    weights = seen[0].view(2, 7, 2)
    assert torch.equal(weights[:, :3], torch.full((2, 3, 2), 0.5))
    assert not (weights[:, 3:] == 0.5).any()


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked(family, side):
    """Impossible experts at padded positions are not read, and no real position depends on the routes there."""
    model, tokens = make(family), batch()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    if side == "right":
        mask = mask.flip(1)
    mine = mask.bool()
    with torch.no_grad():
        with record(model) as tape:
            plain = model(tokens, attention_mask=mask).logits
        routes = tape.routes(mask)
        assert torch.equal(routes.forced, mine[..., None].expand_as(routes.forced))
        wild = routes.experts.masked_fill(~mine[..., None, None], -1)
        with impose(model, routes._replace(experts=wild)):
            replayed = model(tokens, attention_mask=mask).logits
        elsewhere = Routes((tape.experts + 1) % 4, ~routes.forced, uniform=True)
        with impose(model, elsewhere):
            padded_only = model(tokens, attention_mask=mask).logits
    assert torch.equal(replayed, plain)
    torch.testing.assert_close(padded_only[mine], plain[mine], rtol=0, atol=1e-6)


@every_family
@pytest.mark.parametrize("imposed", [False, True])
def test_gradient_checkpointing(family, imposed):
    """The same gradient as without, through log-probabilities and output, and one record although layers run twice."""
    grads = []
    for checkpointing in (False, True):
        model, tokens = make(family).train(), batch()
        with torch.no_grad(), record(model) as tape:
            model(tokens)
        routes = other_routes(tape)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            calls = []
            find_routers(model)[0][0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with impose(model, routes if imposed else routes._replace(forced=routes.forced & False)):
            with record(model) as tape:
                loss = model(tokens, labels=tokens).loss
                logs = tape.router_log_probs().gather(-1, routes.experts)
                (loss + logs.mean()).backward()
        assert tape.experts.shape == routes.experts.shape
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 2
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_backward_after_a_record_block_works_too(family):
    model, tokens = make(family).train(), batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with record(model) as tape:
        model(tokens)
    tape.router_log_probs()[..., 0].mean().backward()
    assert find_routers(model)[0][0].weight.grad.abs().sum() > 0


@every_family
def test_imposed_experts_are_recorded_whichever_block_is_the_outer_one(family):
    model, tokens = make(family), batch()
    with torch.no_grad():
        with record(model) as tape:
            model(tokens)
        routes = other_routes(tape)
        with record(model) as outer, impose(model, routes), record(model) as inner:
            model(tokens)
    assert torch.equal(outer.experts, routes.experts) and torch.equal(inner.experts, routes.experts)


def test_checkpointed_layers_of_imposed_routes_are_not_computed_again_without_them():
    model, tokens = make("mixtral").train(), batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad(), record(model) as tape:
        model(tokens)
    with impose(model, other_routes(tape)):
        loss = model(tokens, labels=tokens).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_reentrant_checkpointing_is_refused():
    model = make("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"), record(model):
        pass


@every_family
def test_router_only_gradient(family):
    model, tokens = make(family), batch()
    with record(model) as tape:
        model(tokens)
    torch.testing.assert_close(tape.router_log_probs(router_only=True), tape.router_log_probs(), rtol=0, atol=0)
    tape.router_log_probs(router_only=True)[..., 0].mean().backward()
    routers = {id(p) for router, _ in find_routers(model) for p in router.parameters()}
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in routers)


@every_family
def test_hooks_are_gone(family):
    model, tokens = make(family), batch()
    before = hooks_of(model)
    with torch.no_grad(), record(model) as tape:
        model(tokens)
    assert hooks_of(model) == before
    with pytest.raises(KeyError), record(model), impose(model, tape.routes()):
        assert hooks_of(model) > before
        raise KeyError
    assert hooks_of(model) == before
    with pytest.raises(ValueError, match="7 positions"), impose(model, tape.routes()):
        model(tokens[:, :5])
    assert hooks_of(model) == before


@every_family
def test_generation_is_not_recorded(family):
    model, tokens = make(family).eval(), batch()
    with record(model) as tape:
        model.generate(tokens, max_new_tokens=4, do_sample=False)
    with pytest.raises(RuntimeError, match="0 of "):
        tape.experts  # noqa: B018
    with record(model) as tape:
        model(tokens)
        expected = tape.experts.clone()
        model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(tape.experts, expected)


def test_generation_without_a_cache_is_refused():
    model, tokens = make("mixtral").eval(), batch()
    with pytest.raises(RuntimeError, match="one forward"), record(model):
        model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False)


def test_probabilities_in_place_of_logits_are_refused(monkeypatch):
    model = make("qwen3_moe")
    kind = type(find_routers(model)[0][0])
    forward = kind.forward

    def softmaxed(self, hidden_states):
        logits, weights, experts = forward(self, hidden_states)
        return logits.softmax(-1), weights, experts

    monkeypatch.setattr(kind, "forward", softmaxed)
    with pytest.raises(ValueError, match="probabilities already"), record(model):
        model(batch())


def test_another_gate_is_refused():
    model = make("qwen3_moe")
    find_routers(model)[0][0].register_buffer("unused", torch.zeros(1))
    type_of = type(find_routers(model)[0][0])

    class Doubled(type_of):
        def forward(self, hidden_states):
            logits, weights, experts = super().forward(hidden_states)
            return logits, 2 * weights, experts

    Doubled.__name__ = type_of.__name__
    find_routers(model)[0][0].__class__ = Doubled
    with pytest.raises(ValueError, match="not those of the gate"), record(model):
        model(batch())


def test_a_dense_model_and_an_unknown_gate_are_refused():
    config = transformers.LlamaConfig(**{k: v for k, v in SMALL.items() if k != "num_experts_per_tok"})
    with pytest.raises(ValueError, match="no router"), record(transformers.LlamaForCausalLM(config)):
        pass
    config = transformers.AutoConfig.for_model("granitemoe", **(SMALL | dict(num_local_experts=4)))
    with pytest.raises(ValueError, match="is not known"):
        find_routers(transformers.AutoModelForCausalLM.from_config(config))


def test_routes_of_another_shape_are_refused():
    model, tokens = make("mixtral"), batch()
    with torch.no_grad(), record(model) as tape:
        model(tokens)
    routes = tape.routes()
    for experts in (routes.experts[:, :, :2], routes.experts[..., :1]):
        with pytest.raises(ValueError, match=r"\[B, T, 3, 2\]"), impose(model, routes._replace(experts=experts)):
            pass
