"""A GPT-2-style language model whose feed-forward layers can be mixtures of experts (MoE).

Read from top to bottom: the configuration, what a routing decision is, the experts, the transformer, its output head,
generation, and checkpoints. Three habits hold everywhere:

- Routing is a value. A forward takes `Routes` (decisions to impose: explored by ERL, or replayed from a rollout) and
  returns a `Routing` record (what the routers said and which experts worked). Nothing is kept in the modules.
- Noise is asked for, never implied. There is no dropout, `train()` and `eval()` behave the same, and router jitter is
  an argument: two forwards with the same routes give the same numbers.
- Letters in shape comments: B sequences, T positions, D width, L MoE layers, E experts a layer, K experts a token,
  N tokens, S = N * K token slots, V vocabulary, H heads.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


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
    gate: str = "renorm"  # weight of a chosen expert: "renorm" P_i / sum_topK P (ERL eq. 3), "prob" P_i (ERPO eq. 5)
    expert_capacity: int = 0  # tokens of one sequence an expert takes; later ones pass it by. 0: no limit (dropless)

    def __post_init__(self):
        for name, value in asdict(self).items():
            lowest = 0 if name in ("n_shared_expert", "expert_capacity") else 1
            if name != "gate" and (not isinstance(value, int) or value < lowest):
                raise ValueError(f"{name} must be an integer of at least {lowest}, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.top_k > self.n_expert:
            raise ValueError(f"top_k {self.top_k} is above n_expert {self.n_expert}: a token has only so many experts")
        if self.n_expert > 1 and self.moe_every > self.n_layer:
            raise ValueError(f"moe_every {self.moe_every} leaves none of the {self.n_layer} blocks with experts")
        if self.gate not in ("renorm", "prob"):
            raise ValueError(f"gate must be 'renorm' or 'prob', not {self.gate!r}")

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


# ---------------------------------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------------------------------


class Routes(NamedTuple):
    """Routing decisions imposed on a forward. Where `forced` is False the router decides as usual."""

    experts: Tensor  # int64 [B, T, L, K]
    forced: Tensor  # bool [B, T, L]
    uniform: bool = True  # weights of imposed experts: 1/K (exploration, ERL eq. 9), or the router's own gate (replay)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, bool]:
        return self.experts[:, :, layer], self.forced[:, :, layer], self.uniform


class Routing(NamedTuple):
    """What the routers of one forward did."""

    logits: Tensor  # float32 [B, T, L, E], before the softmax
    experts: Tensor  # int64 [B, T, L, K], the experts used
    forced: Tensor  # bool [B, T, L], decisions that were imposed
    inputs: tuple  # L tensors [B, T, D], what each router saw

    def expert_log_probs(self, experts: Tensor | None = None) -> Tensor:
        """log P of `experts` int64 [B, T, L, K] (default: those used) under the full softmax -> [B, T, L, K]."""
        return self.logits.log_softmax(-1).gather(-1, self.experts if experts is None else experts)


def choose_experts(logits: Tensor, config: MoEConfig, imposed=None) -> tuple[Tensor, Tensor]:
    """Top-K experts and their gate weights (ERL eq. 1-3, 9; ERPO eq. 5).

    logits [B, T, E]; imposed None or (experts [B, T, K], forced [B, T], uniform) -> experts, weights, both [B, T, K].
    """
    experts = logits.topk(config.top_k, dim=-1).indices  # softmax keeps the order: top-K of logits = top-K of P
    if imposed is not None:
        forced = imposed[1][..., None]
        experts = torch.where(forced, imposed[0], experts)
    if config.gate == "renorm":  # P_i / sum_topK P is the softmax over the chosen logits; written so, it cannot be 0/0
        weights = logits.gather(-1, experts).softmax(-1)
    else:
        weights = logits.softmax(-1).gather(-1, experts)
    if imposed is not None and imposed[2]:
        weights = torch.where(forced, 1.0 / config.top_k, weights)
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

    logits [B, T, L, E], experts [B, T, L, K], mask bool [B, T] (False: padding, counts nowhere).
    balance [L] = E * sum_i f_i * Pbar_i, which is 1 at perfect balance for every K; z [L] = mean(logsumexp(logits)^2);
    load [L, E] = f, the share of token slots sent to each expert.
    """
    B, T, L, E = logits.shape
    mask = torch.ones(B, T, dtype=torch.bool, device=logits.device) if mask is None else mask
    counted = mask[..., None, None].expand_as(experts).long()
    places = experts + E * torch.arange(L, device=logits.device)[:, None]
    counts = torch.zeros(L * E, dtype=torch.long, device=logits.device)  # integers add up alike in every order
    counts = counts.scatter_add_(0, places.flatten(), counted.flatten()).view(L, E)
    load = counts / counts.sum(-1, keepdim=True).clamp(min=1)  # [L, E]
    weight = mask.to(logits.dtype) / mask.sum().clamp(min=1)  # [B, T]
    mean_probs = torch.einsum("bt,btle->le", weight, logits.softmax(-1))
    z = torch.einsum("bt,btl->l", weight, logits.logsumexp(-1).square())
    return E * (load * mean_probs).sum(-1), z, load


# ---------------------------------------------------------------------------------------------------------------------
# Experts: one sort brings the tokens of an expert together, one grouped matrix product serves all experts
# ---------------------------------------------------------------------------------------------------------------------


class _Rearrange(torch.autograd.Function):
    """x[order // copies], whose gradient is a gather too: index_add would be slow, and not deterministic on CUDA."""

    @staticmethod
    def forward(ctx, x, order, inverse, copies):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)  # x[order] takes 8 times as long on a CPU

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return (grad.view(-1, ctx.copies, grad.shape[-1]).sum(1) if ctx.copies > 1 else grad), None, None, None


def has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether F.grouped_mm takes them: aligned rows, in float32 or bfloat16 on CPU, bfloat16 on CUDA (since Ampere)."""
    if not hasattr(F, "grouped_mm") or any(n * x.element_size() % 16 for n in weight.shape[1:]):
        return False
    if x.device.type == "cuda":
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def expert_networks(x, w_in, b_in, w_out, b_out, expert_ids, ends) -> Tensor:
    """gelu(x_s @ w_in[e_s] + b_in[e_s]) @ w_out[e_s] + b_out[e_s] for token slots sorted by expert.

    x [S, D], w_in [E, D, H], b_in [E, H], w_out [E, H, D], b_out [E, D], expert_ids [S] ascending, ends int32 [E]:
    where each expert's slots end -> [S, D].
    """
    long_turns = x.device.type == "cpu" and x.dtype == torch.float32 and len(w_in) <= len(x) // 128
    if long_turns or not (has_grouped_mm(x, w_in) and has_grouped_mm(x, w_out)):
        return _experts_in_turn(x, w_in, b_in, w_out, b_out, ends)
    hidden = F.gelu(_grouped_linear(x, w_in, b_in, expert_ids, ends), approximate="tanh")  # [S, H]
    return _grouped_linear(hidden, w_out, b_out, expert_ids, ends)


@torch.compiler.disable  # it reads `ends` on the host
def _experts_in_turn(x, w_in, b_in, w_out, b_out, ends) -> Tensor:
    """One expert after the other: where there is no grouped kernel (float64, MPS, ...), and fastest where each has many
    slots, as its hidden layer stays in a CPU's cache. They take slices of `unbind`, never `w_in[e]`: autograd would
    fill a gradient of all experts with zeros for each expert."""
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())  # unlike that of slices, its gradient is one cat
    weights = zip(w_in.unbind(0), b_in.unbind(0), w_out.unbind(0), b_out.unbind(0), strict=True)
    return torch.cat(
        [
            torch.addmm(b2, F.gelu(torch.addmm(b1, part, w1), approximate="tanh"), w2)
            for part, (w1, b1, w2, b2) in zip(parts, weights, strict=True)
        ]
    )


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, expert_ids: Tensor, ends: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        # A product adds up the bias' gradient in float32 and always in the same order; that of an embedding does
        # neither (bfloat16 sums on the CPU, atomic additions in compiled CUDA code).
        one_hot = F.one_hot(expert_ids, len(bias)).to(x.dtype)
        return torch.addmm(F.grouped_mm(x, weight, offs=ends), one_hot, bias)
    return _uncompiled_grouped_mm(x, weight, ends).add_(F.embedding(expert_ids, bias))


@torch.compiler.disable  # it knows the grouped product in bfloat16 only
def _uncompiled_grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight, offs=ends)


class Experts(nn.Module):
    """E feed-forward networks D -> 4D -> D with stacked weights, in GPT-2's [in, out] layout. E = 1: a dense layer."""

    def __init__(self, n_expert: int, n_embd: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(n_expert, n_embd, 4 * n_embd))
        self.b_in = nn.Parameter(torch.zeros(n_expert, 4 * n_embd))
        self.w_out = nn.Parameter(torch.empty(n_expert, 4 * n_embd, n_embd))
        self.b_out = nn.Parameter(torch.zeros(n_expert, n_embd))

    def forward(self, x: Tensor, experts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """x [N, D] through experts [N, K], summed with weights [N, K] (ERL eq. 1) -> [N, D]."""
        if self.w_in.shape[0] == 1:
            hidden = F.gelu(F.linear(x, self.w_in.squeeze(0).T, self.b_in.squeeze(0)), approximate="tanh")
            return F.linear(hidden, self.w_out.squeeze(0).T, self.b_out.squeeze(0))
        if torch.is_autocast_enabled(x.device.type):  # autocast does not know the grouped product
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w_in, b_in, w_out, b_out = (t.to(dtype) for t in (x, self.w_in, self.b_in, self.w_out, self.b_out))
        else:
            w_in, b_in, w_out, b_out = self.w_in, self.b_in, self.w_out, self.b_out
        N, K = experts.shape
        expert_ids, order = experts.reshape(-1).sort(stable=True)  # [S], [S]: slot s is token order[s] // K
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=x.device))
        every = torch.arange(w_in.shape[0], device=x.device)
        ends = torch.searchsorted(expert_ids, every, right=True, out_int32=True)  # on the device: no host read
        slots = _Rearrange.apply(x, order, inverse, K)  # [S, D]
        slots = expert_networks(slots, w_in, b_in, w_out, b_out, expert_ids, ends)  # [S, D]
        slots = _Rearrange.apply(slots, inverse, order, 1).view(N, K, -1)
        return (slots * weights[..., None].to(slots.dtype)).sum(1)


class MoE(nn.Module):
    """Router, E experts of which a token passes K, and shared experts that every token passes (ERL section 2.1)."""

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

    def forward(self, x: Tensor, imposed=None, noise: Tensor | None = None, used: Tensor | None = None):
        """x [B, T, D] -> output [B, T, D], router logits [B, T, E], experts [B, T, K], used [B, E] (see capacity).

        noise [B, T, D]: factors near 1 on the router's input (Switch's jitter), or None.
        """
        config = self.config
        logits = self.router_logits(x if noise is None else x * noise)
        experts, weights = choose_experts(logits, config, imposed)
        if config.expert_capacity:
            keep, used = within_capacity(experts, config.n_expert, config.expert_capacity, used)
            weights = weights * keep
        flat = x.reshape(-1, x.shape[-1])
        out = self.experts(flat, experts.flatten(0, 1), weights.flatten(0, 1))
        for shared in self.shared:
            out = out + shared(flat)
        return out.view_as(x), logits, experts, used


# ---------------------------------------------------------------------------------------------------------------------
# The transformer
# ---------------------------------------------------------------------------------------------------------------------


class Cache:
    """Preallocated keys and values of a batch that is being generated; every row grows at its own position."""

    def __init__(self, model: "GPT", rows: int, length: int):
        c, w = model.config, model.wte.weight
        shape = (c.n_layer, rows, c.n_head, length, c.n_embd // c.n_head)
        self.keys = torch.zeros(shape, device=w.device, dtype=w.dtype)
        self.values = torch.zeros_like(self.keys)
        self.used = torch.zeros(c.n_layer, rows, c.n_expert, device=w.device, dtype=torch.long)
        self.positions = None  # [B] where the next token of each row stands; None while the prompts are read
        self.longest = 0  # no row is longer than this
        self.mask = None  # bool [B, 1, 1, longest], what the next token may see

    def step(self, positions: Tensor, longest: int):
        self.positions, self.longest = positions, longest
        self.mask = (torch.arange(longest, device=positions.device) <= positions[:, None])[:, None, None]

    def reorder(self, rows: Tensor):
        """Row i becomes a copy of row rows[i] (beam search)."""
        self.keys, self.values, self.used = (t.index_select(1, rows) for t in (self.keys, self.values, self.used))


class Attention(nn.Module):
    def __init__(self, config: MoEConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif cache.positions is None:
            cache.keys[layer, :, :, :T], cache.values[layer, :, :, :T] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # T = 1: one new token a row
            rows = torch.arange(B, device=x.device)
            cache.keys[layer, rows, :, cache.positions] = k[:, :, 0].to(cache.keys.dtype)
            cache.values[layer, rows, :, cache.positions] = v[:, :, 0].to(cache.keys.dtype)
            keys, values = cache.keys[layer, :, :, : cache.longest], cache.values[layer, :, :, : cache.longest]
            if x.is_cuda:
                y = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=cache.mask)
            else:  # the CPU's kernel is made for many queries, and several times slower with one
                scores = (q @ keys.to(q.dtype).mT * q.shape[-1] ** -0.5).masked_fill(~cache.mask, -torch.inf)
                y = scores.softmax(-1).to(q.dtype) @ values.to(q.dtype)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, config: MoEConfig, moe: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MoE(config) if moe else Experts(1, config.n_embd)

    def attend(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        return x + self.attn(self.ln_1(x), cache, layer)


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

    def stem(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Everything before the first router. tokens int64 [B, T] -> hidden [B, T, D]."""
        B, T = tokens.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens are more than the model's context of {self.config.context}")
        decoding = cache is not None and cache.positions is not None
        positions = cache.positions[:, None] if decoding else torch.arange(T, device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for i in range(self._first):
            x = self.blocks[i].attend(x, cache, i)
            x = x + self.blocks[i].mlp(self.blocks[i].ln_2(x))
        if self._first < len(self.blocks):
            x = self.blocks[self._first].attend(x, cache, self._first)
        return x

    def branch(self, x: Tensor, routes: Routes | None = None, cache: Cache | None = None, noise=None):
        """From the first router to the last norm. hidden [B, T, D] -> features [B, T, D], Routing.

        noise: None, or L tensors [B, T, D] of factors on the routers' inputs (see `jitter`).
        """
        B, T, _ = x.shape
        config, moe_blocks = self.config, self.config.moe_blocks
        if routes is not None:
            want = (B, T, len(moe_blocks), config.top_k)
            if tuple(routes.experts.shape) != want or tuple(routes.forced.shape) != want[:3]:
                raise ValueError(
                    f"routes for this forward must have experts {list(want)} and forced {list(want[:3])}, "
                    f"not {list(routes.experts.shape)} and {list(routes.forced.shape)}"
                )
        logits, chosen, inputs = [], [], []
        for i in range(self._first, len(self.blocks)):
            block = self.blocks[i]
            if i > self._first:
                x = block.attend(x, cache, i)
            h = block.ln_2(x)
            if i not in moe_blocks:
                x = x + block.mlp(h)
                continue
            layer = len(chosen)
            imposed = None if routes is None else routes.of_layer(layer)
            used = None if cache is None else cache.used[i]
            out, layer_logits, experts, used = block.mlp(h, imposed, None if noise is None else noise[layer], used)
            if cache is not None:
                cache.used[i] = used
            x = x + out
            logits.append(layer_logits)
            chosen.append(experts)
            inputs.append(h)
        forced = routes.forced if routes is not None else x.new_zeros(B, T, len(moe_blocks), dtype=torch.bool)
        if moe_blocks:
            routing = Routing(torch.stack(logits, 2), torch.stack(chosen, 2), forced, tuple(inputs))
        else:
            routing = Routing(x.new_zeros(B, T, 0, 1), forced[..., None].long(), forced, ())
        return self.ln_f(x), routing

    def head(self, features: Tensor) -> Tensor:
        """features [..., D] -> logits [..., V]."""
        return F.linear(features, self.wte.weight)

    def forward(self, tokens, targets=None, mask=None, routes=None, noise=None) -> Output:
        """tokens [B, T], targets [B, T] the tokens they predict, mask bool [B, T] predictions that count."""
        features, routing = self.branch(self.stem(tokens), routes, noise=noise)
        balance, z, load = router_losses(routing.logits, routing.experts, mask)
        if targets is None:
            return Output(self.head(features), None, balance, z, load, routing)
        loss = lm_loss(features, self.wte.weight, targets, mask)
        return Output(None, loss, balance, z, load, routing)

    @property
    def _first(self) -> int:
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


# ---------------------------------------------------------------------------------------------------------------------
# The output head. With 50,257 words a [N, V] log-softmax costs more than the rest of a small model, so no function
# here makes one: they work on blocks of tokens, and on a CPU on tiles of them that stay in its cache. Their plain twins
# are in tests/test_moe.py.
# ---------------------------------------------------------------------------------------------------------------------

BLOCK_ELEMENTS = 1 << 23  # logits that exist at a time
CPU_TILE = (512, 384)  # tokens x words
SMALL_VOCABULARY = 1024  # up to here one product is fastest


def _blocks(x: Tensor, weight: Tensor):
    """Operands in the dtype that autocast asks for, slices of the tokens, slices of the words."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    N, V = x.shape[0], weight.shape[0]
    size, width = CPU_TILE if x.device.type == "cpu" else (max(16, BLOCK_ELEMENTS // V), V)
    words = [slice(i, min(i + width, V)) for i in range(0, V, width)]
    return x, weight, [slice(i, i + size) for i in range(0, N, size)], words


def _place(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Where targets [n, 1] stand among some of the words, and whether they do."""
    place, last = targets - words.start, words.stop - words.start - 1
    return place.clamp(0, last), (place >= 0) & (place <= last)


def _block_log_probs(x, w, targets, words, temperature, tiles=None) -> tuple[Tensor, Tensor]:
    """log p(target) and the log normaliser of a block, both [n, 1]. tiles: a list that receives the logits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    target_logits, norms = torch.zeros(targets.shape, device=x.device, dtype=dtype), []
    for v in words:
        logits = (x @ w[v].T).to(dtype)
        if temperature != 1:
            logits.div_(temperature)
        place, inside = _place(targets, v)
        picked = logits.gather(-1, place)
        target_logits += picked.masked_fill(~inside, 0)
        # logsumexp, in fewer passes over the logits
        norms.append(picked + F.cross_entropy(logits, place.squeeze(-1), reduction="none")[:, None])
        if tiles is not None:
            tiles.append(logits)
    log_norm = torch.cat(norms, -1).logsumexp(-1, keepdim=True)
    return target_logits - log_norm, log_norm


def _softmax_less_target(logits, log_norm, targets, words) -> Tensor:
    """The gradient of -log p(target) with respect to a tile of logits, which it overwrites."""
    place, inside = _place(targets, words)
    return logits.sub_(log_norm).exp_().scatter_add_(-1, place, -inside.to(logits.dtype))


class _LMLoss(torch.autograd.Function):
    """sum_n scale_n * -log p(target_n), and log p(target_n). The gradient is computed in the forward, where the logits
    are at hand."""

    @staticmethod
    def forward(ctx, features, weight, targets, scale):
        x, w, blocks, words = _blocks(features, weight)
        need_x, need_w, *_ = ctx.needs_input_grad
        log_probs = torch.empty(x.shape[0], 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        grad_x = torch.zeros_like(x, dtype=log_probs.dtype) if need_x else None
        grad_w = torch.zeros_like(w, dtype=weight.dtype) if need_w else None
        targets, scale = targets[:, None], scale[:, None]
        for s in blocks:
            tiles = [] if need_x or need_w else None
            log_probs[s], log_norm = _block_log_probs(x[s], w, targets[s], words, 1.0, tiles)
            scaled = (x[s] * scale[s]).to(x.dtype)
            for v, logits in zip(words, tiles or (), strict=False):
                d = _softmax_less_target(logits, log_norm, targets[s], v).to(x.dtype)
                if need_x:
                    grad_x[s] += d @ w[v]
                if need_w:
                    grad_w[v] += d.T @ scaled
        ctx.save_for_backward((grad_x * scale).to(features.dtype) if need_x else None, grad_w)
        log_probs = log_probs.squeeze(-1)
        ctx.mark_non_differentiable(log_probs)
        return -(log_probs * scale.squeeze(-1)).sum(), log_probs

    @staticmethod
    def backward(ctx, grad, _):
        grad_x, grad_w = ctx.saved_tensors
        return None if grad_x is None else grad_x * grad, None if grad_w is None else grad_w * grad, None, None


class _TokenLogProbs(torch.autograd.Function):
    """log p(target_n) for each token; the backward computes the logits of a block again instead of keeping them."""

    @staticmethod
    def forward(ctx, features, weight, targets, temperature):
        x, w, blocks, words = _blocks(features, weight)
        out, log_norm = torch.empty(
            2, x.shape[0], 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        for s in blocks:
            out[s], log_norm[s] = _block_log_probs(x[s], w, targets[s, None], words, temperature)
        ctx.save_for_backward(features, weight, targets, log_norm)
        ctx.temperature, ctx.dtype = temperature, x.dtype
        return out.squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        features, weight, targets, log_norm = ctx.saved_tensors
        x, w, blocks, words = _blocks(features.to(ctx.dtype), weight.to(ctx.dtype))
        need_x, need_w, *_ = ctx.needs_input_grad
        grad_x = torch.zeros_like(x, dtype=log_norm.dtype) if need_x else None
        grad_w = torch.zeros_like(weight) if need_w else None
        scale = -grad[:, None] / ctx.temperature
        for s in blocks:
            scaled = (x[s] * scale[s]).to(x.dtype)
            for v in words:
                logits = (x[s] @ w[v].T).to(log_norm.dtype).div_(ctx.temperature)
                d = _softmax_less_target(logits, log_norm[s], targets[s, None], v).to(x.dtype)
                if need_x:
                    grad_x[s] += d @ w[v]
                if need_w:
                    grad_w[v] += d.T @ scaled
        return (grad_x * scale).to(features.dtype) if need_x else None, grad_w, None, None


def lm_loss(features: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the masked tokens of -log p(target), in nats.

    features [B, T, D], weight [V, D], targets int64 [B, T], mask bool [B, T] -> 0-d. An empty mask gives 0.
    """
    return lm_loss_and_log_probs(features, weight, targets, mask)[0]


def lm_loss_and_log_probs(features, weight, targets, mask=None) -> tuple[Tensor, Tensor]:
    """`lm_loss`, and log p(target) of every token [B, T] as `token_log_probs` gives it, without gradient."""
    shape, features, targets = targets.shape, features.flatten(0, -2), targets.flatten()
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.flatten()
    scale = keep.to(torch.promote_types(features.dtype, torch.float32)) / keep.sum().clamp(min=1)
    if weight.shape[0] <= SMALL_VOCABULARY:
        nll = F.cross_entropy(F.linear(features, weight).to(scale.dtype), targets, reduction="none")
        return (nll * scale).sum(), -nll.detach().view(shape)
    if not torch.is_grad_enabled():  # a parameter asks for its gradient even then, and it is computed in the forward
        features, weight = features.detach(), weight.detach()
    loss, log_probs = _LMLoss.apply(features, weight, targets, scale)
    return loss, log_probs.view(shape)


def token_log_probs(features: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) of every token under softmax(logits / temperature), differentiable in features and weight.

    features [B, T, D], weight [V, D], targets int64 [B, T] -> [B, T], float32 (float64 stays float64).
    """
    if weight.shape[0] <= SMALL_VOCABULARY:
        logits = F.linear(features, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return _TokenLogProbs.apply(features.flatten(0, -2), weight, targets.flatten(), temperature).view(targets.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """Generated sequences, aligned as the losses want them: index t belongs to the forward at position t, which
    predicts the token at t + 1. Rows are prompt, response, padding; T is the length of the longest row less one."""

    tokens: Tensor  # int64 [B, T + 1]
    response_mask: Tensor  # bool [B, T], True where the predicted token belongs to the response, its end token included
    log_probs: Tensor  # float32 [B, T], under softmax(logits / temperature), 0 outside the response
    entropies: Tensor  # float32 [B, T], of that distribution, in nats
    experts: Tensor  # int64 [B, T, L, K]
    expert_log_probs: Tensor  # float32 [B, T, L, K], log P of those experts

    def responses(self, end_token: int) -> list[list[int]]:
        """The generated tokens of each row, without the end token."""
        rows = zip(self.tokens[:, 1:].tolist(), self.response_mask.tolist(), strict=True)
        return [[t for t, m in zip(tokens, mask, strict=True) if m and t != end_token] for tokens, mask in rows]


def sample_tokens(logits: Tensor, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """One token a row from softmax(logits), cut to its nucleus of mass top_p. logits [B, V] -> int64 [B].

    By the inverse of the cumulative distribution: torch.multinomial over 50,257 words costs more than the model.
    """
    return _draw(logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)), top_p, generator)


def _draw(probs: Tensor, top_p: float, generator: torch.Generator | None) -> Tensor:
    """`sample_tokens` of probabilities [B, V]."""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    device = probs.device if generator is None else generator.device
    if top_p < 1:
        probs, words = probs.sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # the first word always stays
    u = torch.rand(len(probs), 1, generator=generator, device=device).to(probs.device)
    index = _invert_long_cdf(probs, u) if probs.shape[-1] > 4096 else _invert_cdf(probs, u)
    return (index if top_p >= 1 else words.gather(-1, index)).squeeze(-1)


def _invert_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The first index whose running sum of weights [B, V] exceeds the share u [B, 1] of their total -> [B, 1]."""
    cdf = weights.cumsum(-1)
    # u is at most 1 - 2^-24, so u * total stays below the total in float32 too: the word found has probability above 0.
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=weights.shape[-1] - 1)


def _invert_long_cdf(weights: Tensor, u: Tensor, run: int = 256) -> Tensor:
    """The same, first among runs of words and then within one: a running sum over all words is serial work."""
    V = weights.shape[-1]
    whole = V // run
    rest = weights[:, whole * run :].sum(-1, keepdim=True)
    sums = torch.cat([weights[:, : whole * run].unflatten(1, (whole, run)).sum(-1), rest], -1)  # [B, runs]
    place = _invert_cdf(sums, u)
    ends = sums.cumsum(-1)
    share = (u * ends[:, -1:] - (ends - sums).gather(-1, place)) / sums.gather(-1, place)  # of the run's own sum
    words = place * run + torch.arange(run, device=u.device)  # [B, run]
    inside = weights.gather(-1, words.clamp(max=V - 1)).masked_fill(words >= V, 0)
    return words.gather(-1, _invert_cdf(inside, share.clamp(0, 1 - 2**-24)))


def _read_prompts(model: GPT, prompts: list[list[int]], max_new_tokens: int, end_token: int, routes=None):
    """Prompts of different lengths, padded on the right, and the cache after reading them.

    A prompt that several rows share (a group's responses, the beams) is read once. -> tokens [B, P + max_new_tokens],
    lengths [B], cache, experts and their log P [B, P, L, K], features [B, D] of each prompt's last token.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("every prompt needs at least one token")
    width = max(map(len, prompts))
    if width + max_new_tokens > model.config.context:
        raise ValueError(
            f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the context of {model.config.context}"
        )
    imposed, keys = None, [tuple(p) for p in prompts]
    if routes is not None:  # each row has routes of its own, and is read on its own
        imposed = Routes(routes.experts[:, :width], routes.forced[:, :width], routes.uniform)
        keys = list(range(len(prompts)))
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    back = [place[key] for key in keys]  # each row's place among the distinct prompts
    first = [back.index(i) for i in range(len(place))]  # the first row of each distinct prompt
    device = model.wte.weight.device
    tokens = torch.tensor([p + [end_token] * (width + max_new_tokens - len(p)) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    cache = Cache(model, len(first), width + max_new_tokens)
    features, routing = model.branch(model.stem(tokens[first, :width], cache), imposed, cache)
    # Padding on the right is invisible to the causal prompt, and generated tokens overwrite its keys. Only the places
    # it took from experts of limited capacity must be given back.
    if model.config.expert_capacity:
        inside = torch.arange(width, device=device) < lengths[first, None]
        for layer, block in enumerate(model.config.moe_blocks):
            slots = F.one_hot(routing.experts[:, :, layer], model.config.n_expert).sum(2)  # [B, P, E]
            cache.used[block] = (slots * inside[..., None]).sum(1)
    back = torch.tensor(back, device=device)
    if len(first) < len(prompts):
        cache.reorder(back)
    last = features[back, lengths - 1]
    return tokens, lengths, cache, routing.experts[back], routing.expert_log_probs()[back].float(), last


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    end_token: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    routes: Routes | None = None,
) -> Rollout:
    """Sample one response to each prompt, until its end token or max_new_tokens. temperature 0 takes the likeliest.

    Log-probabilities and routes are those of the forwards that sampled, so no second forward is needed. They are of
    the whole tempered distribution, also with top_p < 1 (Decision: the importance ratio compares policies, not
    nuclei). `routes` imposes decisions on tokens read and written: index t of a row is its position t, and there are
    at least (longest prompt + max_new_tokens - 1) of them. Raises ValueError for fewer routes, an empty prompt, prompts
    too long for the context, a negative temperature and top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    most = max(map(len, prompts), default=0) + max_new_tokens - 1  # the last token written is never read
    if routes is not None and (len(routes.experts) != len(prompts) or routes.experts.shape[1] < most):
        raise ValueError(f"routes must cover {len(prompts)} rows and {most} positions, not {routes.experts.shape[:2]}")
    tokens, lengths, cache, *read, last = _read_prompts(model, prompts, max_new_tokens, end_token, routes)
    device, B, width = tokens.device, len(prompts), read[0].shape[1]
    # places for the tokens still to come behind those of the prompt
    experts, expert_log_probs = (F.pad(t, (0, 0, 0, 0, 0, max_new_tokens)) for t in read)
    log_probs, entropies = torch.zeros(2, B, tokens.shape[1], device=device)
    mask = torch.zeros(B, tokens.shape[1], dtype=torch.bool, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    rows, positions = torch.arange(B, device=device), lengths - 1
    wrote, routed = [], []  # what each step decided: all written to its places at the end
    for step in range(max_new_tokens):
        logits = model.head(last).float()  # [B, V]
        if temperature not in (0, 1):
            logits = logits / temperature
        probs = logits.softmax(-1)
        log_norm = logits.amax(-1) - probs.amax(-1).log()  # logsumexp, in the two cheapest passes over the words
        new = _draw(probs, top_p, generator) if temperature else logits.argmax(-1)
        log_prob = logits.gather(-1, new[:, None]).squeeze(-1) - log_norm
        entropy = (log_norm - torch.linalg.vecdot(probs, logits)).clamp_(min=0)  # -sum p (logit - log_norm)
        new = new.masked_fill(done, end_token)
        wrote.append((new, ~done, log_prob.masked_fill(done, 0), entropy.masked_fill(done, 0)))
        positions = positions + 1
        done = done | (new == end_token)
        if step + 1 == max_new_tokens or done.all():
            break
        cache.step(positions, width + step + 1)
        imposed = None
        if routes is not None:  # [B, 1, L, K]: every row is at a position of its own
            imposed = Routes(*(t[rows, positions][:, None] for t in routes[:2]), routes.uniform)
        features, routing = model.branch(model.stem(new[:, None], cache), imposed, cache)
        last = features[:, 0]
        routed.append((routing.experts[:, 0], routing.expert_log_probs()[:, 0].float()))
    places = lengths[:, None] - 1 + torch.arange(len(wrote), device=device)  # [B, steps]
    records = (tokens[:, 1:], mask, log_probs, entropies), (experts, expert_log_probs)
    for kept, values, at in zip(records, (wrote, routed), (places, places[:, 1:]), strict=True):
        for record, value in zip(kept, zip(*values, strict=True), strict=False):  # no routes of a single step
            record[rows[:, None], at] = torch.stack(value, 1)
    T = int((lengths + mask.sum(1)).max()) - 1
    return Rollout(
        tokens[:, : T + 1], mask[:, :T], log_probs[:, :T], entropies[:, :T], experts[:, :T], expert_log_probs[:, :T]
    )


@torch.no_grad()
def beam_search(
    model: GPT, prompts: list[list[int]], *, max_new_tokens: int, end_token: int, beams: int = 6
) -> list[list[int]]:
    """The response of each prompt with the highest mean log-probability a token among `beams` kept ones.

    A finished beam stays among the candidates with its sum; the search compares sums, the final choice means.
    """
    P, V = len(prompts), model.config.vocab_size
    copies = [p for p in prompts for _ in range(beams)]
    tokens, lengths, cache, _, _, last = _read_prompts(model, copies, max_new_tokens, end_token)
    device, width = tokens.device, int(lengths.max())
    scores = torch.full((P, beams), -math.inf, device=device)
    scores[:, 0] = 0  # all beams of a prompt start equal: only one may branch
    written = torch.zeros(P, beams, 0, dtype=torch.long, device=device)
    done = torch.zeros(P, beams, dtype=torch.bool, device=device)
    counts = torch.zeros(P, beams, device=device)
    frozen = torch.full((V,), -math.inf, device=device)
    frozen[end_token] = 0
    for step in range(max_new_tokens):
        log_probs = model.head(last).float().log_softmax(-1).view(P, beams, V)
        log_probs = torch.where(done[..., None], frozen, log_probs)
        scores, best = (scores[..., None] + log_probs).view(P, -1).topk(beams)
        parent, new = best // V, best % V
        written = torch.cat([written.gather(1, parent[..., None].expand_as(written)), new[..., None]], -1)
        done, counts = done.gather(1, parent), counts.gather(1, parent)
        counts = counts + ~done
        done = done | (new == end_token)
        if step + 1 == max_new_tokens or done.all():
            break
        rows = (torch.arange(P, device=device)[:, None] * beams + parent).flatten()
        cache.reorder(rows)
        cache.step(lengths + step, width + step + 1)
        last = model.branch(model.stem(new.view(-1, 1), cache), cache=cache)[0][:, 0]
    winner = (scores / counts).argmax(-1)
    rows = written[torch.arange(P, device=device), winner].tolist()
    return [row[: row.index(end_token)] if end_token in row else row for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Upcycling, checkpoints, GPT-2's weights, devices
# ---------------------------------------------------------------------------------------------------------------------


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


def save_model(model: GPT, path: str, **metadata):
    """Weights as safetensors; the configuration and `metadata` (JSON values) travel in the file's header."""
    from safetensors.torch import save_file

    # one entry alone: safetensors writes several in an order that changes from run to run, and so would the bytes
    header = {"config": json.dumps(asdict(model.config) | {"metadata": metadata})}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata=header)


def load_model(path: str) -> tuple[GPT, dict]:
    """The model of `save_model` on the CPU, and its metadata. ValueError for a file that is none of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if "config" not in header:
                raise ValueError("there are weights in it, but no configuration")
            # copies, for their alignment: CPU products of tensors that lie in the mapped file round otherwise
            weights = {k: file.get_tensor(k).clone() for k in file.keys()}
        config = dict(json.loads(header["config"]))
        metadata = config.pop("metadata", {})
        with torch.device("meta"):  # no weights are drawn, so no random generator moves
            model = GPT(MoEConfig(**config))
        model.load_state_dict(weights, assign=True)
        return model, metadata
    except (SafetensorError, OSError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a readable checkpoint of this program: {reason}") from error


def load_gpt2(source: str = "openai-community/gpt2") -> GPT:
    """GPT-2 as the dense model, from the hub or from a folder in transformers' format (config.json, model.safetensors).

    ValueError when it cannot be had or is not a GPT-2.
    """
    from safetensors.torch import load_file

    try:
        if os.path.isdir(source):
            folder = source
        else:
            from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
            from huggingface_hub.errors import LocalEntryNotFoundError

            for file in ("config.json", "model.safetensors"):
                try:
                    path = hf_hub_download(source, file, local_files_only=True)  # the cache needs no network
                except LocalEntryNotFoundError:
                    get_hf_file_metadata(hf_hub_url(source, file))  # fails at once; a download tries for half a minute
                    path = hf_hub_download(source, file)
                folder = os.path.dirname(path)
        with open(os.path.join(folder, "config.json")) as file:
            theirs = dict(json.load(file))
        weights = load_file(os.path.join(folder, "model.safetensors"))
    except Exception as error:  # the hub's errors have no common base; each means that there are no weights
        raise ValueError(
            f"GPT-2's weights could not be had from {source!r} ({type(error).__name__}): give --init a folder with "
            "config.json and model.safetensors, or a network and HF_ENDPOINT that reach the hub"
        ) from error
    expected = dict(
        model_type="gpt2",
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )
    for key, value in expected.items():
        if theirs.get(key, value if key != "model_type" else None) != value:
            raise ValueError(f"{source!r} has {key} {theirs.get(key)!r}, not {value!r}: only GPT-2 can be loaded")
    sizes = dict(vocab_size="vocab_size", context="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
    with torch.device("meta"):
        model = GPT(MoEConfig(n_expert=1, **{ours: theirs.get(key) for ours, key in sizes.items()}))
    names = {
        "blocks.": "h.",
        "attn.qkv": "attn.c_attn",
        "attn.proj": "attn.c_proj",
        "w_in": "c_fc.weight",
        "b_in": "c_fc.bias",
        "w_out": "c_proj.weight",
        "b_out": "c_proj.bias",
    }
    weights = {k.removeprefix("transformer."): w for k, w in weights.items()}
    state = {}
    for name, parameter in model.named_parameters():
        theirs_name = name
        for ours, other in names.items():
            theirs_name = theirs_name.replace(ours, other)
        w = weights.get(theirs_name)
        if w is None or w.numel() != parameter.numel():
            raise ValueError(f"{source!r} lacks {theirs_name} of {parameter.numel()} numbers: only GPT-2 can be loaded")
        # Conv1D keeps [in, out]: what our experts use too, and the transpose of nn.Linear.
        w = w.T if name.endswith(("qkv.weight", "proj.weight")) else w.view(parameter.shape)
        state[name] = w.float().clone(memory_format=torch.contiguous_format)  # aligned, see load_model
    model.load_state_dict(state, assign=True)
    return model


def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA, then MPS, then CPU. ValueError when the one asked for is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if name not in present:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu, cuda or mps")
    if not present[name]:
        raise ValueError(f"this machine has no {name} device that PyTorch can use: leave --device out or say cpu")
    return torch.device(name)
