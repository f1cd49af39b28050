"""Read and impose the routing of a transformers MoE (Qwen2-MoE, Qwen3-MoE, OLMoE, Mixtral, GPT-OSS).

    pip install -r recipes/requirements.txt

    with record(model) as tape:                    # what the routers say, and which experts work
        output = model(tokens, attention_mask=mask)
    tape.router_log_probs()                        # [B, T, L, E], with gradient if the forward had one
    with impose(model, tape.routes()):             # the same experts again, the weights from the live logits
        output = model(tokens, attention_mask=mask)

Needs torch and transformers >= 5.6 alone. B sequences, T positions, L MoE layers, E experts, K active ones a token.

How: in transformers 5 every family has a router module that returns (logits, weights, experts). A forward hook on it
reads or replaces them; no weight and no class is touched. So it works with gradient checkpointing (not the reentrant
kind), with DDP, and with every implementation of the experts but a fused kernel that runs the router itself.
With gradient checkpointing call backward inside the `impose` block: the layers are computed again there.

A model that was compiled and called before runs without hooks that are added later: both blocks notice and raise.
Within `torch.compiler.set_stance("force_eager")` it runs uncompiled, and they work. (One that is called for the first
time in a block is compiled with its hooks, which takes a while and is right too.)
"""

from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

PASSED_BY = (
    "a model that was compiled and called before the block runs without hooks (set torch.compiler.set_stance to "
    '"force_eager" around the forward), and so does a fused kernel that holds the router'
)


class Routes(NamedTuple):
    """Routing decisions imposed on a forward. Where `forced` is False the router decides, and `experts` is not read."""

    experts: Tensor  # int64 [B, T, L, K]
    forced: Tensor  # bool [B, T, L]
    uniform: bool = True  # explored: weight 1/K, or P_e where the gate does not renormalise. False, replay: the gate's


class Tape:
    """What the routers did in the last full forward of a `record` block."""

    def __init__(self, routers):
        self.routers = routers
        self.logits, self.chosen, self.inputs = [], [], []  # a layer each: [B, T, E], [B, T, K], [B, T, D]

    @property
    def experts(self) -> Tensor:
        """int64 [B, T, L, K], the experts used, imposed ones included."""
        return torch.stack(self._filled(self.chosen), 2)

    def router_log_probs(self, router_only=False) -> Tensor:
        """Log of the full softmax, float32 [B, T, L, E]. router_only: the gradient stops at the routers' inputs."""
        logits = self._filled(self.logits)
        if router_only:  # `forward` passes by the hooks
            logits = [r.forward(h)[0].view_as(x) for r, h, x in zip(self.routers, self.inputs, logits, strict=True)]
        return torch.stack([x.float().log_softmax(-1) for x in logits], 2)

    def routes(self, mask=None, uniform=False) -> Routes:
        """To replay. mask bool [B, T]: false where there is padding, which the router may route as it likes."""
        experts = self.experts
        mask = torch.ones_like(experts[:, :, 0, 0]) if mask is None else mask.to(experts.device)
        return Routes(experts, mask.bool()[..., None].expand(experts.shape[:3]), uniform)

    def _filled(self, layers):
        if len(layers) != len(self.routers):
            raise RuntimeError(
                f"{len(layers)} of {len(self.routers)} routers were seen: run one full forward of the recorded model "
                f"in the block (generation is not recorded); {PASSED_BY}"
            )
        return layers


def renormalises(router) -> bool:
    """Whether the gate makes the weights of the K experts sum to 1. Mixtral and GPT-OSS have no option: always."""
    return getattr(router, "norm_topk_prob", True)


def gate_weights(router, logits, experts) -> Tensor:
    """Weights of `experts` as this family's own gate makes them. logits [N, E], experts [N, K] -> [N, K]."""
    if type(router).__name__.startswith("GptOss"):  # softmax over the chosen logits
        return logits.gather(-1, experts).softmax(-1)
    weights = logits.softmax(-1, dtype=torch.float32).gather(-1, experts)
    return weights / weights.sum(-1, keepdim=True) if renormalises(router) else weights


def find_routers(model) -> list:
    """[(router, the block that holds it)] in the order of the layers. ValueError for models that are not understood."""
    known, found = ("Mixtral", "GptOss"), []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not kind.endswith("TopKRouter"):
            continue
        if not hasattr(module, "norm_topk_prob") and not kind.startswith(known):
            raise ValueError(f"the gate of {kind} is not known: add it to gate_weights of hf_routing.py")
        found.append((module, model.get_submodule(name.rpartition(".")[0])))
    if not found:
        raise ValueError(f"{type(model).__name__} has no router that hf_routing.py knows (transformers >= 5.6)")
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError('reentrant checkpointing: gradient_checkpointing_kwargs must be {"use_reentrant": False}')
    return found


@torch.no_grad()
def check_router(router, args):
    """ValueError where the router does not return what this file takes it to return (`forward` passes by the hooks)."""
    logits, weights, experts = router.forward(*args)
    p = logits.float()
    if (p >= 0).all() and ((p.sum(-1) - 1).abs() < 1e-2).all():  # so did some versions before 5.6
        raise ValueError("this version's router logits are probabilities already: install transformers >= 5.6")
    if not torch.allclose(gate_weights(router, logits, experts).to(weights.dtype), weights, rtol=1e-2):
        raise ValueError(f"the weights of {type(router).__name__} are not those of the gate that hf_routing.py knows")


@contextmanager
def _hooked(found, hook_of, prepend):
    """hook_of(layer, router)(args, output, B, T) -> output after every router; gone after the block, come what may.

    Yields the handles, and a set of the layers whose router has run.
    """
    handles, shapes, seen = [], {}, set()

    def note_shape(layer):
        def hook(block, args, kwargs):
            shapes[layer] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

        return hook

    def with_shape(layer, router):
        inner, state = hook_of(layer, router), {"checked": False}

        def hook(_, args, output):
            if not state["checked"]:
                check_router(router, args)
                state["checked"] = True
            seen.add(layer)
            return inner(args, output, *shapes[layer])

        return hook

    try:
        for layer, (router, block) in enumerate(found):
            handles.append(block.register_forward_pre_hook(note_shape(layer), with_kwargs=True))
            handles.append(router.register_forward_hook(with_shape(layer, router), prepend=prepend))
        yield handles, seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record(model):
    """Record the one full forward of `model` that runs in the block -> Tape, which outlives the block.

    Ignored: forwards that get a key-value cache, as those of `generate` do, and what gradient checkpointing computes
    again in backward. RuntimeError on a second forward (so also when `generate` runs without a cache), and where the
    Tape is read and a router was passed by.
    """
    found = find_routers(model)
    tape = Tape([router for router, _ in found])
    state = {"on": False}

    def start(module, args, kwargs):
        # transformers 5.24 calls the cache `cache`, versions before it `past_key_values`
        state["on"] = kwargs.get("cache") is None and kwargs.get("past_key_values") is None
        if state["on"] and tape.logits:
            raise RuntimeError("a record block holds one forward: open another block for the next")

    def stop(module, args, output):
        state["on"] = False

    def hook_of(layer, router):
        def hook(args, output, B, T):
            if state["on"]:
                logits, _, experts = output
                tape.logits.append(logits.view(B, T, -1))
                tape.chosen.append(experts.detach().view(B, T, -1))
                tape.inputs.append(args[0].detach().view(B, T, -1))

        return hook

    with _hooked(found, hook_of, prepend=False) as (handles, _):  # after the hooks of `impose`, whichever came first
        handles.append(model.register_forward_pre_hook(start, with_kwargs=True))
        handles.append(model.register_forward_hook(stop, always_call=True))
        yield tape


@contextmanager
def impose(model, routes):
    """Forwards of `model` in the block take the experts of `routes` (Routes, or any (experts, forced, uniform)) where
    they are forced.

    Their weights come from the live logits by the model's own gate. With `uniform` they are 1/K where that gate
    renormalises the top-K (Mixtral, GPT-OSS, norm_topk_prob=True; ERL eq. 9), and where it does not they are P_e all
    the same, as the router's own experts have them: 1/K would scale a random route otherwise than the router's.

    ValueError for routes of another shape, which also a decoding step of `generate` has. RuntimeError where a forward,
    or the whole block, passed by a router: nothing was imposed there.
    """
    experts, forced, uniform = routes
    found = find_routers(model)
    B, T, L, K = experts.shape
    if (L, K) != (len(found), found[0][0].top_k) or tuple(forced.shape) != (B, T, L):
        raise ValueError(
            f"routes for this model must have experts [B, T, {len(found)}, {found[0][0].top_k}] and forced "
            f"[B, T, {len(found)}], got {list(experts.shape)} and {list(forced.shape)}"
        )

    def hook_of(layer, router):
        def hook(args, output, rows, length):
            logits, own_weights, own = output  # [N, E], [N, K], [N, K]
            if (rows, length) != (B, T):
                raise ValueError(f"routes are of {B} rows and {T} positions, this forward has {rows} and {length}")
            here = forced[:, :, layer].reshape(-1, 1).to(own.device)
            chosen = torch.where(here, experts[:, :, layer].flatten(0, 1).to(own.device), own)
            weights = gate_weights(router, logits, chosen).to(own_weights.dtype)
            equal = uniform and renormalises(router)
            return logits, torch.where(here, 1 / K, weights) if equal else weights, chosen

        return hook

    with _hooked(found, hook_of, prepend=True) as (handles, seen):

        def check(*_):
            if len(seen) < L:
                raise RuntimeError(f"{L - len(seen)} of {L} routers never asked for their routes: {PASSED_BY}")

        handles.append(model.register_forward_pre_hook(lambda *_: seen.clear()))
        handles.append(model.register_forward_hook(check))
        yield
        check()  # a model that is compiled as a whole passes by its own hooks too


def next_token_log_probs(model, tokens, routes=None, attention_mask=None):
    """One recorded forward, along `routes` if given. tokens int64 [B, T + 1] -> log p of tokens[:, 1:] as float32
    [B, T], and the Tape of the T positions that predict them. The gradient is the caller's: no_grad or not."""
    mask = None if attention_mask is None else attention_mask[:, :-1]
    with impose(model, routes) if routes is not None else nullcontext(), record(model) as tape:
        logits = model(input_ids=tokens[:, :-1], attention_mask=mask, use_cache=False).logits  # [B, T, V]
    nll = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return -nll.view_as(tokens[:, 1:]), tape
