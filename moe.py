"""A GPT-2-style language model whose feed-forward layers can be mixtures of experts (MoE). It needs PyTorch alone.

Read from top to bottom: the configuration, what a routing decision is, the experts, the transformer, its output head,
upcycling. Three habits hold everywhere:

- Routing is a value. A forward takes `Routes` (decisions to impose: explored by ERL, or replayed from a rollout) and
  returns a `Routing` record (what the routers said and which experts worked). Nothing is kept in the modules.
- Noise is asked for, never implied. There is no dropout, `train()` and `eval()` behave the same, and router jitter is
  an argument: two forwards with the same routes give the same numbers.
- Letters in shape comments: B sequences, T positions, D width, L MoE layers, E experts a layer, K experts a token,
  N tokens, S = N * K token slots, V vocabulary, H heads.

What is here is the plain form. `support.fast.speed_up(model)` gives a model faster experts and a faster output head,
which compute the same; `support/generation.py` generates.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------------- configuration


GATES = {  # P: the router's softmax over all experts
    "renorm": "P_i / sum_topK P (ERL eq. 3): with K = 1 always 1, so the LM loss sends the router no gradient",
    "prob": "P_i (Switch, ERPO eq. 5)",
    "straight": "the value of renorm, P_i / (sum_topK P).detach(): a gradient through P with K = 1 too (a control)",
}


@dataclass(frozen=True)
class MoEConfig:
    """Sizes of a model. `n_expert = 1` is the dense GPT-2. Raises ValueError where the numbers do not fit together."""

    vocab_size: int = 257
    context: int = 256  # positions T a sequence may have
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_expert: int = 8  # experts per MoE layer
    top_k: int = 1  # experts a token passes through
    n_shared_expert: int = 0  # further experts that every token passes through
    moe_every: int = 2  # blocks moe_every-1, 2*moe_every-1, ... hold experts; the others are dense
    gate: str = "renorm"  # weight of a chosen expert, see GATES
    expert_capacity: int = 0  # tokens of one sequence an expert takes; later ones pass it by. 0: no limit (dropless)

    def __post_init__(self):
        for name, value in asdict(self).items():
            lowest = 0 if name in ("n_shared_expert", "expert_capacity") else 1
            if name != "gate" and (type(value) is not int or not lowest <= value < 2**31):
                raise ValueError(f"{name} must be an integer from {lowest} to {2**31 - 1}, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.top_k > self.n_expert:
            raise ValueError(f"top_k {self.top_k} is above n_expert {self.n_expert}: a token has only so many experts")
        if self.n_expert > 1 and self.moe_every > self.n_layer:
            raise ValueError(f"moe_every {self.moe_every} leaves none of the {self.n_layer} blocks with experts")
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, not {self.gate!r}")

    @property
    def moe_blocks(self) -> list[int]:
        """Indices of the blocks with experts (Switch: every second one)."""
        return [] if self.n_expert == 1 else list(range(self.moe_every - 1, self.n_layer, self.moe_every))

    def dense(self) -> "MoEConfig":
        """The same model without experts: what it can be upcycled from."""
        return replace(self, n_expert=1, top_k=1, n_shared_expert=0, expert_capacity=0)


SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, context=256),
    "small": dict(n_layer=6, n_head=6, n_embd=384, context=512),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, context=1024),
}


# ------------------------------------------------------------------------------------------------------------- routing


class Routes(NamedTuple):
    """Routing decisions imposed on a forward. Where `forced` is False the router decides as usual."""

    experts: Tensor  # int64 [B, T, L, K]; of one layer [B, T, K]
    forced: Tensor  # bool [B, T, L]; of one layer [B, T]
    uniform: bool = True  # weights of imposed experts: 1/K (exploration, ERL eq. 9), or the router's own gate (replay)

    def of_layer(self, layer: int) -> "Routes":
        return Routes(self.experts[:, :, layer], self.forced[:, :, layer], self.uniform)


class Routing(NamedTuple):
    """What the routers of one forward did. That of one layer has no dimension L, and its inputs are one tensor."""

    logits: Tensor  # float32 [B, T, L, E], before the softmax
    experts: Tensor  # int64 [B, T, L, K], the experts used
    forced: Tensor  # bool [B, T, L], decisions that were imposed
    inputs: tuple  # L tensors [B, T, D], what each router saw

    def expert_log_probs(self, experts: Tensor | None = None) -> Tensor:
        """log P of `experts` int64 [B, T, L, K] (default: those used) under the full softmax -> [B, T, L, K]."""
        return self.logits.log_softmax(-1).gather(-1, self.experts if experts is None else experts)


def choose_experts(logits: Tensor, config: MoEConfig, routes: Routes | None = None) -> tuple[Tensor, Tensor]:
    """Top-K experts and their gate weights (ERL eq. 1-3, 9; ERPO eq. 5).

    logits [B, T, E], routes of this layer -> experts, weights, both [B, T, K].
    """
    experts = logits.topk(config.top_k, dim=-1).indices  # softmax keeps the order: top-K of logits = top-K of P
    if routes is not None:
        experts = torch.where(routes.forced[..., None], routes.experts, experts)
    if config.gate == "prob":
        weights = logits.softmax(-1).gather(-1, experts)
    else:  # P_i / sum_topK P is the softmax over the chosen logits; written so, it cannot be 0/0
        weights = logits.gather(-1, experts).softmax(-1)
    if config.gate == "straight":  # the gradient is that of P_i / (sum_topK P).detach(): w_i * grad log P_i
        log_probs = logits.log_softmax(-1).gather(-1, experts)
        weights = weights.detach() * (log_probs - log_probs.detach()).exp()  # times exactly 1
    if routes is not None and routes.uniform:
        weights = torch.where(routes.forced[..., None], 1.0 / config.top_k, weights)
    return experts, weights


def within_capacity(experts: Tensor, n_expert: int, capacity: int, used: Tensor | None = None):
    """Which token slots find room. An expert takes the first `capacity` tokens of a sequence, in the order of time.

    Ranking by time, not by score, keeps the model causal: a later token can never push out an earlier one.
    experts [B, T, K], used [B, E] (slots taken before this call; None: none) -> keep bool [B, T, K], used [B, E].
    """
    B, T, K = experts.shape
    taken = F.one_hot(experts.reshape(B, T * K), n_expert)  # [B, TK, E]
    rank = taken.cumsum(1)  # [B, TK, E], 1-based place in the expert's queue
    if used is not None:
        rank = rank + used[:, None]
    keep = rank.gather(-1, experts.reshape(B, T * K, 1)) <= capacity
    return keep.view(B, T, K), rank[:, -1]


def router_losses(logits: Tensor, experts: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Switch's balance and z losses, a value per layer, and the load they were computed from.

    logits [B, T, L, E], experts [B, T, L, K], mask bool [B, T] (False: padding, counts nowhere, be it NaN).
    balance [L] = E * sum_i f_i * Pbar_i, which is 1 at perfect balance for every K; z [L] = mean(logsumexp(logits)^2);
    load [L, E] = f, the share of token slots sent to each expert.
    """
    B, T, L, E = logits.shape
    if mask is None:
        mask = torch.ones(B, T, dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~mask[..., None, None], 0.0)
    valid = mask[..., None, None].expand_as(experts).long()  # [B, T, L, K]
    places = experts + E * torch.arange(L, device=logits.device)[:, None]
    counts = torch.zeros(L * E, dtype=torch.long, device=logits.device)  # integers add up alike in every order
    counts = counts.scatter_add_(0, places.flatten(), valid.flatten()).view(L, E)
    load = counts / counts.sum(-1, keepdim=True).clamp(min=1)  # [L, E]
    weight = mask.to(logits.dtype) / mask.sum().clamp(min=1)  # [B, T]
    mean_probs = torch.einsum("bt,btle->le", weight, logits.softmax(-1))
    z = torch.einsum("bt,btl->l", weight, logits.logsumexp(-1).square())
    return E * (load * mean_probs).sum(-1), z, load


# ------------------------------------------------------------------------------------------------------------- experts


def feed_forward(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """GPT-2's layer, gelu(x @ w_in + b_in) @ w_out + b_out. x [..., D], w_in [D, 4D], w_out [4D, D] -> [..., D]."""
    return F.linear(F.gelu(F.linear(x, w_in.T, b_in), approximate="tanh"), w_out.T, b_out)


def mix_experts(x: Tensor, experts: Tensor, weights: Tensor, w_in, b_in, w_out, b_out) -> Tensor:
    """ERL eq. 1: y_n = sum_k weights[n, k] * E_i(x_n) with i = experts[n, k], in the plain form.

    x [N, D], experts [N, K], weights [N, K], w_in [E, D, 4D], b_in [E, 4D], w_out [E, 4D, D], b_out [E, D] -> [N, D].
    One sort brings the rows of an expert together, so that each expert computes its own rows and no others.
    """
    N, K = experts.shape
    order = experts.flatten().argsort(stable=True)  # [S], slots sorted by expert; slot s belongs to token s // K
    counts = experts.flatten().bincount(minlength=len(w_in)).tolist()  # slots of each expert
    rows = x.index_select(0, order // K).split(counts)
    # `unbind`, never w_in[e]: autograd would fill a gradient of all experts with zeros for each expert
    networks = zip(w_in.unbind(0), b_in.unbind(0), w_out.unbind(0), b_out.unbind(0), strict=True)
    y = torch.cat([feed_forward(part, *network) for part, network in zip(rows, networks, strict=True)])  # [S, D]
    y = torch.zeros_like(y).index_copy(0, order, y).view(N, K, -1)  # back in the order of the tokens
    # The weights stay float32 under bf16 autocast: rounded, they would no longer sum to 1.
    return (y * weights[..., None]).sum(1).to(y.dtype)


class Experts(nn.Module):
    """E feed-forward networks D -> 4D -> D with stacked weights, in GPT-2's [in, out] layout. E = 1: a dense layer."""

    def __init__(self, n_expert: int, n_embd: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(n_expert, n_embd, 4 * n_embd))
        self.b_in = nn.Parameter(torch.zeros(n_expert, 4 * n_embd))
        self.w_out = nn.Parameter(torch.empty(n_expert, 4 * n_embd, n_embd))
        self.b_out = nn.Parameter(torch.zeros(n_expert, n_embd))
        self.kernel = mix_experts  # support.fast.speed_up puts a faster one here

    def forward(self, x: Tensor, experts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """x [N, D] through experts [N, K], summed with weights [N, K] (ERL eq. 1) -> [N, D]."""
        if len(self.w_in) == 1:
            return feed_forward(x, *(p.squeeze(0) for p in (self.w_in, self.b_in, self.w_out, self.b_out)))
        return self.kernel(x, experts, weights, self.w_in, self.b_in, self.w_out, self.b_out)


class MoE(nn.Module):
    """Router, E experts of which a token passes K, and shared experts for all tokens (ERL sections 2.1, 4.2)."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config.n_expert, config.n_embd)
        self.shared = nn.ModuleList(Experts(1, config.n_embd) for _ in range(config.n_shared_expert))

    def router_logits(self, x: Tensor) -> Tensor:
        """float32 even under bf16 autocast: bf16 logits would move the top-K and the importance ratios. -> [..., E]"""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.router.weight.to(dtype))

    def forward(self, x: Tensor, routes: Routes | None = None, noise: Tensor | None = None, cache=None):
        """x [B, T, D], routes of this layer -> output [B, T, D] and the layer's Routing.

        noise [B, T, D]: factors near 1 on the router's input (Switch's jitter), or None. cache: see GPT.stem.
        """
        config = self.config
        router_input = x if noise is None else x * noise
        logits = self.router_logits(router_input)  # [B, T, E]
        experts, weights = choose_experts(logits, config, routes)  # [B, T, K]
        if config.expert_capacity:
            used = None if cache is None else cache.used
            keep, used = within_capacity(experts, config.n_expert, config.expert_capacity, used)
            weights = weights * keep
            if cache is not None:
                cache.used = used
        flat = x.flatten(0, 1)
        out = self.experts(flat, experts.flatten(0, 1), weights.flatten(0, 1))
        for shared in self.shared:
            out = out + shared(flat)
        forced = torch.zeros_like(experts[..., 0], dtype=torch.bool) if routes is None else routes.forced
        return out.view_as(x), Routing(logits, experts, forced, router_input)


# ----------------------------------------------------------------------------------------------------- the output head

MIN_TEMPERATURE = 1e-4  # lower temperatures count as this one: float32 has no digits left for such log-probabilities


def lm_loss(features: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean over the masked tokens of -log p(target), in nats, and log p of every target, without gradient.

    features [..., D], weight [V, D], targets int64 [...], mask bool [...] -> 0-d, [...]. An empty mask gives 0.
    """
    logits = F.linear(features, weight).flatten(0, -2)  # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, targets.flatten(), reduction="none")  # [N]
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    scale = keep.flatten().to(nll.dtype) / keep.sum().clamp(min=1)
    return (nll * scale).sum(), -nll.detach().view(targets.shape)


def token_log_probs(features: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) of every token under softmax(logits / temperature), differentiable in features and weight.

    features [..., D], weight [V, D], targets int64 [...] -> [...], float32 (float64 stays float64).
    """
    logits = F.linear(features, weight)  # [..., V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / max(temperature, MIN_TEMPERATURE)
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


# ----------------------------------------------------------------------------------------------------- the transformer


class Attention(nn.Module):
    """Causal self-attention. With a cache (see GPT.stem) the queries also see what the cache has kept."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache=None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Attention, then a feed-forward layer: dense, or a mixture of experts. x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: MoEConfig, has_experts: bool):
        super().__init__()
        self.has_experts = has_experts
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MoE(config) if has_experts else Experts(1, config.n_embd)

    def forward(self, x: Tensor, routes=None, noise=None, cache=None) -> tuple[Tensor, Routing | None]:
        return self.feed_forward(self.attend(x, cache), routes, noise, cache)

    def attend(self, x: Tensor, cache=None) -> Tensor:
        return x + self.attn(self.ln_1(x), cache)

    def feed_forward(self, x: Tensor, routes=None, noise=None, cache=None) -> tuple[Tensor, Routing | None]:
        """The arguments of MoE.forward -> x, and the layer's Routing (None without experts)."""
        h = self.ln_2(x)
        out, routing = self.mlp(h, routes, noise, cache) if self.has_experts else (self.mlp(h), None)
        return x + out, routing


class Output(NamedTuple):
    """What `GPT.forward` returns."""

    logits: Tensor | None  # [B, T, V]; None when targets were given: the loss does not need them all at once
    lm_loss: Tensor | None  # 0-d, mean negative log-likelihood of the targets under the mask, in nats
    balance_loss: Tensor  # [L]
    z_loss: Tensor  # [L]
    load: Tensor  # [L, E] share of token slots sent to each expert
    routing: Routing


class GPT(nn.Module):
    """The language model. `generator` (a CPU torch.Generator) draws the initial weights."""

    def __init__(self, config: MoEConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # the head too: GPT-2 ties the two
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i in config.moe_blocks) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # What asks the head; support.fast.speed_up puts faster ones here.
        self.lm_loss_kernel, self.log_probs_kernel = lm_loss, token_log_probs
        for name, p in self.named_parameters():
            if name.endswith("router.weight"):
                nn.init.normal_(p, std=0.1, generator=generator)  # Decision: N(0, 0.1) gives the standard deviation
            elif name.endswith(("w_out", "proj.weight")):  # GPT-2: residual branches start small
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer), generator=generator)
            elif name.endswith(("weight", "w_in")) and p.ndim > 1:
                nn.init.normal_(p, std=0.02, generator=generator)
            elif name.endswith("bias"):  # PyTorch draws those of a Linear
                nn.init.zeros_(p)

    # The forward in three parts. ERL runs `stem` once and `branch` for 1 + m routes: what comes before the first
    # routing decision is the same for all of them.

    def stem(self, tokens: Tensor, cache=None) -> Tensor:
        """Everything before the first router. tokens int64 [B, T] -> hidden [B, T, D].

        cache: None, or what generation keeps: an object with the tokens' `positions` (int64 [T] or [B, T]) and a list
        `layers`, one object a block, with `attend(q, k, v)` and the slots `used` [B, E] of experts of limited capacity.
        """
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens are more than the model's context of {self.config.context}")
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions
        x = self.wte(tokens) + self.wpe(positions)
        caches = [None] * len(self.blocks) if cache is None else cache.layers
        first = self.first_moe_block
        for block, layer_cache in zip(self.blocks[:first], caches[:first], strict=True):
            x, _ = block(x, cache=layer_cache)
        return self.blocks[first].attend(x, caches[first]) if first < len(self.blocks) else x

    def branch(self, x: Tensor, routes: Routes | None = None, cache=None, noise=None) -> tuple[Tensor, Routing]:
        """From the first router to the last norm. hidden [B, T, D] -> features [B, T, D], Routing.

        noise: None, or L tensors [B, T, D] of factors on the routers' inputs (see `jitter`). Raises ValueError for
        routes of another shape.
        """
        B, T, _ = x.shape
        L, K = len(self.config.moe_blocks), self.config.top_k
        if routes is not None and (routes.experts.shape, routes.forced.shape) != ((B, T, L, K), (B, T, L)):
            raise ValueError(
                f"routes for this forward must have experts {[B, T, L, K]} and forced {[B, T, L]}, "
                f"not {list(routes.experts.shape)} and {list(routes.forced.shape)}"
            )
        caches = [None] * len(self.blocks) if cache is None else cache.layers
        layers = []  # the Routing of each
        for i in range(self.first_moe_block, len(self.blocks)):
            block, layer = self.blocks[i], len(layers)
            layer_routes = routes.of_layer(layer) if routes is not None and block.has_experts else None
            layer_noise = noise[layer] if noise is not None and block.has_experts else None
            run = (
                block.feed_forward if i == self.first_moe_block else block
            )  # `stem` has done the first one's attention
            x, routing = run(x, layer_routes, layer_noise, caches[i])
            if routing is not None:
                layers.append(routing)
        if not layers:
            none = torch.zeros(B, T, 0, 1, dtype=torch.long, device=x.device)
            return self.ln_f(x), Routing(none.to(x.dtype), none, none[..., 0].bool(), ())
        logits, experts, forced, inputs = zip(*layers, strict=True)
        return self.ln_f(x), Routing(torch.stack(logits, 2), torch.stack(experts, 2), torch.stack(forced, 2), inputs)

    def head(self, features: Tensor) -> Tensor:
        """features [..., D] -> logits [..., V]."""
        return F.linear(features, self.wte.weight)

    def lm_loss(self, features: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """features [..., D] -> mean of -log p(target) over the mask, and log p(target) [...] without gradient."""
        return self.lm_loss_kernel(features, self.wte.weight, targets, mask)

    def token_log_probs(self, features: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """features [..., D] -> log p(target) [...] under softmax(logits / temperature), differentiable."""
        return self.log_probs_kernel(features, self.wte.weight, targets, temperature)

    def forward(self, tokens, targets=None, mask=None, routes=None, noise=None, routed=None) -> Output:
        """tokens [B, T], targets [B, T] the tokens they predict.

        mask bool [B, T]: the predictions that count for the LM loss. routed bool [B, T]: the tokens that are not
        padding, over which the router losses and the load run: a prompt is routed, though nothing is learnt from its
        words. None: all. routes, noise: see `branch`.
        """
        features, routing = self.branch(self.stem(tokens), routes, noise=noise)
        balance, z, load = router_losses(routing.logits, routing.experts, routed)
        if targets is None:
            return Output(self.head(features), None, balance, z, load, routing)
        return Output(None, self.lm_loss(features, targets, mask)[0], balance, z, load, routing)

    @property
    def first_moe_block(self) -> int:
        """The first block with experts (n_layer where there is none)."""
        return self.config.moe_blocks[0] if self.config.moe_blocks else self.config.n_layer

    def route_again(self, inputs) -> Tensor:
        """Router logits [B, T, L, E] of recorded router inputs, which are detached: only routers get a gradient."""
        routers = [self.blocks[i].mlp for i in self.config.moe_blocks]
        return torch.stack([r.router_logits(h.detach()) for r, h in zip(routers, inputs, strict=True)], 2)

    def jitter(self, shape, amount: float, generator: torch.Generator) -> list[Tensor] | None:
        """Switch's router input jitter: factors from U(1 - amount, 1 + amount), L tensors [B, T, D]."""
        if not amount or not self.config.moe_blocks:
            return None
        device = self.wte.weight.device
        draw = torch.rand(len(self.config.moe_blocks), *shape, self.config.n_embd, generator=generator).to(device)
        return list(1 + amount * (2 * draw - 1))

    def count_parameters(self) -> tuple[int, int]:
        """Parameters in total, and those that one token uses (ERL table 10)."""
        total = sum(p.numel() for p in self.parameters())
        layers = [self.blocks[i].mlp.experts for i in self.config.moe_blocks]
        one_expert_each = sum(p[0].numel() for experts in layers for p in experts.parameters())
        return total, total - (self.config.n_expert - self.config.top_k) * one_expert_each


# ----------------------------------------------------------------------------------------------------------- upcycling


def upcycle(dense: GPT, config: MoEConfig, generator: torch.Generator | None = None) -> GPT:
    """A MoE whose experts are all copies of the dense model's feed-forward layers, with new routers (ERL section 4.2).

    With the renorm gate it computes what its parent computes. Decision: with n shared experts the copies' output
    layers are divided by 1 + n, so that routed and shared experts together still add up to the parent's layer.
    Raises ValueError when `dense` has experts already or differs from `config` in another size.
    """
    theirs, ours = (replace(c.dense(), moe_every=1, gate="prob") for c in (dense.config, config))
    if dense.config.n_expert > 1 or theirs != ours:
        raise ValueError(f"cannot upcycle {dense.config} into {config}: only the experts may differ")
    model = GPT(config, generator).to(dense.wte.weight)
    state, source = model.state_dict(), dense.state_dict()
    for name, value in state.items():
        part = name.replace("mlp.experts.", "mlp.")
        for i in range(config.n_shared_expert):
            part = part.replace(f"mlp.shared.{i}.", "mlp.")
        if part in source:  # all but the routers
            scale = 1 / (1 + config.n_shared_expert) if part != name and "_out" in name else 1
            value.copy_(source[part] * scale)  # [1, ...] broadcasts over the experts
    return model
