"""Reading and imposing routes, on tiny random models of each family."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.6", reason="pip install -r recipes/requirements.txt")

from recipes.hf_routing import Routes, find_routers, impose, record  # noqa: E402

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0)
FAMILIES = {
    "qwen3_moe": dict(num_experts=4, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True),
    "qwen3_moe sparse": dict(num_experts=4, moe_intermediate_size=24, head_dim=8, decoder_sparse_step=2),
    "qwen2_moe": dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=16),
    "olmoe": dict(num_experts=4),
    "olmoe renorm": dict(num_experts=4, norm_topk_prob=True),
    "mixtral": dict(num_local_experts=4),
    "gpt_oss": dict(num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 3),
}
PROB = ("qwen3_moe sparse", "qwen2_moe", "olmoe")  # their default: the top-K is not renormalised
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family, **changes):
    torch.manual_seed(0)
    sizes = SMALL | FAMILIES[family] | dict(attn_implementation="eager") | changes
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family.split()[0], **sizes))
    for router, _ in find_routers(model):  # far apart, so that no two experts are nearly equal
        torch.nn.init.normal_(router.weight, std=1.0)
    return model


def batch(T=7):
    return torch.randint(1, 50, (2, T), generator=torch.Generator().manual_seed(1))


def recorded(model, tokens):
    """The record of one forward."""
    with torch.no_grad(), record(model) as tape:
        model(tokens)
    return tape


def other_routes(tape):
    return Routes((tape.experts + 1) % 4, torch.ones_like(tape.experts[..., 0], dtype=torch.bool), uniform=False)


@every_family
@pytest.mark.parametrize("dtype, experts", [(torch.float32, "eager"), (torch.bfloat16, "grouped_mm")])
def test_own_routes_change_nothing_and_others_do(family, dtype, experts):
    """With padding, at which impossible experts are not read, and where routes matter to no real position."""
    model, tokens = make(family).to(dtype), batch()
    model.set_experts_implementation(experts)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :3] = mask[1, -2:] = False

    def logits():
        with torch.no_grad():
            return model(tokens, attention_mask=mask.long()).logits

    plain = logits()
    with record(model) as tape:
        own = logits()
    routes = tape.routes(mask)
    assert torch.equal(routes.forced, mask[..., None].expand_as(routes.forced))
    with impose(model, routes._replace(experts=routes.experts.masked_fill(~mask[..., None, None], -1))):
        with record(model) as again:
            replayed = logits()
    assert torch.equal(own, plain) and torch.equal(replayed, plain) and torch.equal(again.experts, tape.experts)
    others = other_routes(tape)
    with record(model) as outer, impose(model, others), record(model) as inner:  # in whichever order
        assert not torch.equal(logits(), plain)
    assert torch.equal(outer.experts, others.experts) and torch.equal(inner.experts, others.experts)
    assert tape.router_log_probs().dtype == torch.float32
    if dtype == torch.float32:  # in bfloat16 experts are equal that rounding made so
        assert torch.equal(tape.router_log_probs().topk(2).indices, tape.experts)
        with impose(model, others._replace(forced=~routes.forced)):
            torch.testing.assert_close(logits()[mask], plain[mask], rtol=0, atol=1e-6)


@every_family
def test_log_probs_and_weights_by_the_book(family):
    """Layer, row and position are where they belong: the routers' inputs are read by other means. router_only trains no
    more. Explored experts weigh 1/K each where the gate renormalises, P_e where it does not; replayed ones as ever."""
    model, tokens, inputs, weights = make(family), batch(), [], []
    for _, block in find_routers(model):
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with record(model) as tape:
        model(tokens)
    log_probs = tape.router_log_probs()
    for layer, (router, _) in enumerate(find_routers(model)):
        expected = (inputs[layer] @ router.weight.T + getattr(router, "bias", 0)).log_softmax(-1)
        torch.testing.assert_close(log_probs[:, :, layer], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tape.router_log_probs(router_only=True), log_probs, rtol=0, atol=0)
    tape.router_log_probs(router_only=True)[..., 0].mean().backward()
    trained = {id(p) for p in model.parameters() if p.grad is not None}
    assert trained == {id(p) for router, _ in find_routers(model) for p in router.parameters()}

    _, block = find_routers(model)[0]
    block.experts.register_forward_pre_hook(lambda _, args: weights.append(args[2].view(2, 7, 2)))
    for uniform in (True, False):
        routes = other_routes(tape)._replace(uniform=uniform)
        routes.forced[:, 3:] = False
        with torch.no_grad(), impose(model, routes):
            model(tokens)
        imposed, own = (log_probs[:, :, 0].exp().gather(-1, x[:, :, 0]) for x in (routes.experts, tape.experts))
        if family not in PROB:
            imposed, own = (x / x.sum(-1, keepdim=True) for x in (imposed, own))
            imposed = torch.full_like(imposed, 0.5) if uniform else imposed
        torch.testing.assert_close(weights[-1], torch.where(routes.forced[:, :, :1], imposed, own))


@every_family
def test_gradient_checkpointing(family):
    """The same gradient as without, through log-probabilities and output, and one record although layers run twice."""
    model, tokens, calls, grads = make(family).train(), batch(), [], []
    routes = other_routes(recorded(model, tokens))
    routes.forced[:, 3:] = False
    find_routers(model)[0][0].register_forward_hook(lambda *_: calls.append(1))
    for calls_so_far in (1, 3):  # the second time with checkpointing
        model.zero_grad()
        with impose(model, routes), record(model) as tape:
            loss = model(tokens, labels=tokens).loss
            (loss + tape.router_log_probs().gather(-1, routes.experts).mean()).backward()
        assert tape.experts.shape == routes.experts.shape and len(calls) == calls_so_far
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert all(router.weight.grad.abs().sum() > 0 for router, _ in find_routers(model))


def test_what_would_go_wrong_is_refused_and_hooks_are_gone():
    """Routes of another shape; layers computed again outside the block, which would route freely; the reentrant kind
    of checkpointing, which cannot be served; a gate that is not known."""
    model, tokens = make("mixtral").train(), batch()
    tape = recorded(model, tokens)
    routes = tape.routes()
    for experts in (routes.experts[:, :, :2], routes.experts[..., :1]):
        with pytest.raises(ValueError, match=r"\[B, T, 3, 2\]"), impose(model, routes._replace(experts=experts)):
            pass
    with pytest.raises(ValueError, match="7 positions"), impose(model, routes):
        model(tokens[:, :5])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with impose(model, other_routes(tape)):
        loss = model(tokens, labels=tokens).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if hook.__module__ == "recipes.hf_routing"]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    config = transformers.AutoConfig.for_model("granitemoe", **(SMALL | dict(num_local_experts=4)))
    other = transformers.AutoModelForCausalLM.from_config(config)
    for refused, says in ((model, "use_reentrant"), (other, "is not known")):
        with pytest.raises(ValueError, match=says):
            find_routers(refused)


@every_family
def test_generation_is_not_recorded(family):
    """Its forwards have a cache, under whichever name. Without one they are refused: they cannot be told apart."""
    model, tokens = make(family).eval(), batch()
    expected = recorded(model, tokens).experts
    with record(model) as tape:
        model(tokens)
        model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(tape.experts, expected)
    with pytest.raises(RuntimeError, match="one forward"), record(model):
        model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "block.compile"])
def test_a_compiled_model_that_passes_by_the_routers_is_an_error(how):
    """Compiled and called before, it runs without hooks that come later. Uncompiled for the moment, it has them."""
    torch._dynamo.reset()
    model, tokens = make("mixtral", num_hidden_layers=2).eval(), batch()
    with torch.no_grad():
        routes = other_routes(recorded(model, tokens))
        with impose(model, routes):
            expected = model(tokens).logits
        compiled = torch.compile(model, backend="eager") if how == "torch.compile" else model
        if how != "torch.compile":  # the backend does not matter to hooks
            {"model.compile": model, "block.compile": model.model.layers[1].mlp}[how].compile(backend="eager")
        compiled(tokens)
        for called in {model, compiled}:  # whichever of the two is handed over
            with pytest.raises(RuntimeError, match="routers never asked.* compiled"), impose(called, routes):
                compiled(tokens)
            with record(called) as tape:
                compiled(tokens)
            with pytest.raises(RuntimeError, match="routers were seen.* compiled"):
                tape.experts  # noqa: B018
            with torch.compiler.set_stance("force_eager"), impose(called, routes):
                torch.testing.assert_close(compiled(tokens).logits, expected)
