"""A GPT-2-style language model whose feed-forward layers can be mixtures of experts (MoE). It needs PyTorch alone.

- Routing is a value. A forward takes `Routes` (decisions to impose: explored by ERL, or replayed from a rollout) and
  returns a `Routing` record (what the routers said and which experts worked). Nothing is kept in the modules.
- Noise is asked for, never implied. There is no dropout, `train()` and `eval()` behave the same, and router jitter is
  an argument: two forwards with the same routes give the same numbers.
- No token is dropped: an expert takes all tokens that are sent to it, however many they are.

Letters in shape comments: B sequences, T positions, D width, L MoE layers, E experts a layer, K experts a token,
N tokens, S = N * K token slots, V vocabulary, H heads.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

GATES = ("renorm", "prob", "straight")


@dataclass(frozen=True)
class MoEConfig:
    """Sizes of a model. `n_expert = 1` is the dense GPT-2. Raises ValueError where the numbers do not fit together."""

    vocab_size: int = 257
    context: int = 256  # positions that a sequence may have
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_expert: int = 8  # experts per MoE layer
    top_k: int = 1  # experts a token passes through
    n_shared_expert: int = 0  # further experts that every token passes through
    moe_every: int = 2  # blocks moe_every-1, 2*moe_every-1, ... hold experts; the others are dense
    gate: str = "renorm"  # weight of a chosen expert, see choose_experts

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name != "gate" and (type(value) is not int or value < (name != "n_shared_expert")):
                raise ValueError(f"{name} must be a whole number above 0 (n_shared_expert may be 0), not {value!r}")
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
        return replace(self, n_expert=1, top_k=1, n_shared_expert=0)


SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, context=256),
    "small": dict(n_layer=6, n_head=6, n_embd=384, context=512),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, context=1024),
}


class Routes(NamedTuple):
    """Routing decisions imposed on a forward. Where `forced` is False the router decides as usual."""

    experts: Tensor  # int64 [B, T, L, K]; of one layer [B, T, K]
    forced: Tensor  # bool [B, T, L]; of one layer [B, T]
    uniform: bool = True  # explored routes: weight 1/K (ERL eq. 9), with gate `prob` P. False, replay: the gate's own


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
    """Top-K experts and their gate weights (ERL eq. 1-3, 9; ERPO eq. 5), P the router's softmax over all experts.

    renorm: P_i / sum_topK P (ERL eq. 3). With K = 1 that is always 1, so the LM loss sends the router no gradient.
    prob: P_i (Switch, ERPO eq. 5). straight: the value of renorm, the gradient of P_i / (sum_topK P).detach().
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
    # Decision: with `prob` a random expert weighs P too, as the router's own does. Weight 1 would scale it otherwise.
    if routes is not None and routes.uniform and config.gate != "prob":
        weights = torch.where(routes.forced[..., None], 1.0 / config.top_k, weights)
    return experts, weights


def router_losses(logits: Tensor, experts: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Switch's balance and z losses, a value per layer, and the load they were computed from.

    logits [B, T, L, E], experts [B, T, L, K], mask bool [B, T] (False: padding, counts nowhere, be it NaN).
    balance [L] = E * sum_i f_i * Pbar_i, which is 1 at perfect balance for every K; z [L] = mean(logsumexp(logits)^2);
    load [L, E] = f, the share of token slots sent to each expert.
    """
    B, T, L, E = logits.shape
    mask = torch.ones(B, T, dtype=torch.bool, device=logits.device) if mask is None else mask
    logits = logits.masked_fill(~mask[..., None, None], 0.0)
    valid = mask[..., None, None].expand_as(experts).long()  # [B, T, L, K]
    places = experts + E * torch.arange(L, device=logits.device)[:, None]
    counts = torch.zeros(L * E, dtype=torch.long, device=logits.device)  # integers add up alike in every order
    counts = counts.scatter_add_(0, places.flatten(), valid.flatten()).view(L, E)
    load = counts / counts.sum(-1, keepdim=True).clamp(min=1)  # [L, E]
    weight = (mask.to(logits.dtype) / mask.sum().clamp(min=1))[..., None]  # [B, T, 1]
    # Sums, not products of matrices: autocast would compute those in bfloat16.
    mean_probs = (weight[..., None] * logits.softmax(-1)).sum((0, 1))  # [L, E]
    z = (weight * logits.logsumexp(-1).square()).sum((0, 1))  # [L]
    return E * (load * mean_probs).sum(-1), z, load


def feed_forward(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """GPT-2's layer, gelu(x @ w_in + b_in) @ w_out + b_out. x [..., D], w_in [D, 4D], w_out [4D, D] -> [..., D]."""
    return F.linear(F.gelu(F.linear(x, w_in.T, b_in), approximate="tanh"), w_out.T, b_out)


def mix_experts(x: Tensor, experts: Tensor, weights: Tensor, w_in, b_in, w_out, b_out) -> Tensor:
    """ERL eq. 1: y_n = sum_k weights[n, k] * E_i(x_n) with i = experts[n, k].

    x [N, D], experts [N, K], weights [N, K], w_in [E, D, 4D], b_in [E, 4D], w_out [E, 4D, D], b_out [E, D] -> [N, D].
    One sort brings the rows of an expert together, so that each expert computes its own rows and no others.
    """
    if torch.is_autocast_enabled(x.device.type):  # autocast does not know the grouped product
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, b_in, w_out, b_out = (t.to(dtype) for t in (x, w_in, b_in, w_out, b_out))
    (N, K), E = experts.shape, len(w_in)
    expert_ids, order = experts.flatten().sort(stable=True)  # [S] each
    # Each slot is read once and written once, forward and backward: no sum in an order that changes from run to run.
    x = x[:, None].expand(N, K, -1).reshape(N * K, -1).index_select(0, order)  # [S, D]
    if _grouped_product_is_faster(x, w_in):
        ends = torch.searchsorted(expert_ids, torch.arange(E, device=x.device), right=True, out_int32=True)  # [E]
        one_hot = F.one_hot(expert_ids, E).to(x.dtype)  # [S, E]; its product adds the bias, whose gradient it sums
        hidden = torch.addmm(F.grouped_mm(x, w_in, offs=ends), one_hot, b_in)  # [S, 4D]
        y = torch.addmm(F.grouped_mm(F.gelu(hidden, approximate="tanh"), w_out, offs=ends), one_hot, b_out)
    else:
        counts = expert_ids.bincount(minlength=E).tolist()  # slots of each expert, read on the host
        # `unbind`, never w_in[e]: autograd would fill a gradient of all experts with zeros for each expert
        networks = zip(w_in.unbind(0), b_in.unbind(0), w_out.unbind(0), b_out.unbind(0), strict=True)
        y = torch.cat([feed_forward(rows, *network) for rows, network in zip(x.split(counts), networks, strict=True)])
    y = torch.zeros_like(y).index_copy(0, order, y).view(N, K, -1)  # back in the order of the tokens
    # The weights stay float32 under bf16 autocast: rounded, they would no longer sum to 1.
    return (y * weights[..., None]).sum(1).to(y.dtype)


def _grouped_product_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether F.grouped_mm takes x [S, D] and weight [E, D, 4D], and beats a loop over the experts."""
    aligned = hasattr(F, "grouped_mm") and all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    if x.is_cuda:  # it spares the host read of the counts
        return aligned and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    # In float32 the compiler does not know it, and experts with many slots are faster one after the other: the hidden
    # layer of one then stays in the cache until it is used.
    float32 = x.dtype == torch.float32 and len(x) < 128 * len(weight) and not torch.compiler.is_compiling()
    return aligned and x.device.type == "cpu" and (x.dtype == torch.bfloat16 or float32)


class Experts(nn.Module):
    """The stacked weights of E feed-forward networks D -> 4D -> D, in GPT-2's [in, out] layout."""

    def __init__(self, n_expert: int, n_embd: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(n_expert, n_embd, 4 * n_embd))
        self.b_in = nn.Parameter(torch.zeros(n_expert, 4 * n_embd))
        self.w_out = nn.Parameter(torch.empty(n_expert, 4 * n_embd, n_embd))
        self.b_out = nn.Parameter(torch.zeros(n_expert, n_embd))


class Dense(Experts):
    """One network that every token passes: GPT-2's own layer, and a shared expert. Its arguments are those of MoE."""

    def __init__(self, config: MoEConfig):
        super().__init__(1, config.n_embd)

    def forward(self, x: Tensor, routes=None, noise=None) -> tuple[Tensor, None]:
        return feed_forward(x, *(p.squeeze(0) for p in self.parameters())), None


class MoE(nn.Module):
    """Router, E experts of which a token passes K, and shared experts for all tokens (ERL sections 2.1, 4.2)."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config.n_expert, config.n_embd)
        self.shared = nn.ModuleList(Dense(config) for _ in range(config.n_shared_expert))

    def router_logits(self, x: Tensor) -> Tensor:
        """float32 even under bf16 autocast: bf16 logits would move the top-K and the importance ratios. -> [..., E]"""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.router.weight.to(dtype))

    def forward(self, x: Tensor, routes: Routes | None = None, noise: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x [B, T, D], routes of this layer -> output [B, T, D] and the layer's Routing.

        noise [B, T, D]: factors on the router's input, or None.
        """
        router_input = x if noise is None else x * noise
        logits = self.router_logits(router_input)  # [B, T, E]
        experts, weights = choose_experts(logits, self.config, routes)  # [B, T, K]
        flat = (t.flatten(0, 1) for t in (x, experts, weights))  # [N, D], [N, K], [N, K]
        out = mix_experts(*flat, *self.experts.parameters()).view_as(x)
        for shared in self.shared:
            out = out + shared(x)[0]
        forced = torch.zeros_like(experts[..., 0], dtype=torch.bool) if routes is None else routes.forced
        return out, Routing(logits, experts, forced, router_input)


MIN_TEMPERATURE = 1e-4  # lower temperatures count as this one: float32 has no digits left for such log-probabilities


def lm_loss(features: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean over the masked tokens of -log p(target), in nats, and log p of every target, without gradient.

    features [..., D], weight [V, D], targets int64 [...], mask bool [...] (None: all) -> 0-d (no token: 0), [...].
    """
    logits = F.linear(features, weight).flatten(0, -2)  # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, targets.flatten(), reduction="none")  # [N]
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    scale = keep.flatten().to(nll.dtype) / keep.sum().clamp(min=1)
    return (nll * scale).sum(), -nll.detach().view(targets.shape)


def token_log_probs(features: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) of every token under softmax(logits / temperature), float32 (float64 stays float64).

    features [..., D], weight [V, D], targets int64 [...] -> [...], differentiable in features and weight.
    """
    logits = F.linear(features, weight)  # [..., V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / max(temperature, MIN_TEMPERATURE)
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


class Attention(nn.Module):
    """Causal self-attention. With a cache (see GPT.forward) the queries also see what the cache has kept."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache=None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) if cache is None else cache.attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Attention, then a feed-forward layer: dense, or a mixture of experts (whose Routing is then not None)."""

    def __init__(self, config: MoEConfig, has_experts: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MoE(config) if has_experts else Dense(config)

    def forward(self, x: Tensor, routes=None, noise=None, cache=None) -> tuple[Tensor, Routing | None]:
        x = x + self.attn(self.ln_1(x), cache)  # [B, T, D]
        out, routing = self.mlp(self.ln_2(x), routes, noise)
        return x + out, routing


class GPT(nn.Module):
    """The language model. `generator` (a CPU torch.Generator) draws the initial weights."""

    def __init__(self, config: MoEConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # the head too: GPT-2 ties the two
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i in config.moe_blocks) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.first_moe_block = config.moe_blocks[0] if config.moe_blocks else config.n_layer
        for name, p in self.named_parameters():
            if name.endswith("router.weight"):
                nn.init.normal_(p, std=0.1, generator=generator)  # Decision: N(0, 0.1) gives the standard deviation
            elif name.endswith(("w_out", "proj.weight")):  # GPT-2: residual branches start small
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer), generator=generator)
            elif name.endswith(("weight", "w_in")) and p.ndim > 1:
                nn.init.normal_(p, std=0.02, generator=generator)
            elif name.endswith("bias"):  # PyTorch draws those of a Linear
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, routes: Routes | None = None, noise=None, cache=None) -> tuple[Tensor, Routing]:
        """tokens int64 [B, T] -> features [B, T, D] of the last norm, for `head`, and the Routing of all layers.

        routes: decisions to impose, of shape [B, T, L, K]; ValueError for another one.
        noise: None, or L tensors [B, T, D] of factors on the routers' inputs (Switch's jitter).
        cache: None, or what generation keeps: an object with the tokens' `positions` (int64 [T] or [B, T]) and a list
        `layers`, one object a block, with `attend(q, k, v)`.
        """
        return self.branch(self.stem(tokens, cache), routes, noise, cache)

    # The same in two parts. ERL runs `stem` once and `branch` for 1 + m routes: the blocks before the first one with
    # experts compute the same for all of them.

    def stem(self, tokens: Tensor, cache=None) -> Tensor:
        """The embeddings, and the blocks before the first one with experts. tokens int64 [B, T] -> hidden [B, T, D]."""
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens are more than the model's context of {self.config.context}")
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions
        x = self.wte(tokens) + self.wpe(positions)
        for i, block in enumerate(self.blocks[: self.first_moe_block]):
            x, _ = block(x, cache=cache and cache.layers[i])
        return x

    def branch(self, x: Tensor, routes: Routes | None = None, noise=None, cache=None) -> tuple[Tensor, Routing]:
        """The other blocks and the last norm. hidden [B, T, D] -> features [B, T, D], Routing; see `forward`."""
        B, T, _ = x.shape
        L, K, layers = len(self.config.moe_blocks), self.config.top_k, []
        if routes is not None and (routes.experts.shape, routes.forced.shape) != ((B, T, L, K), (B, T, L)):
            wanted = f"routes for this forward must have experts {[B, T, L, K]} and forced {[B, T, L]}"
            raise ValueError(f"{wanted}, not {list(routes.experts.shape)} and {list(routes.forced.shape)}")
        for i, block in enumerate(self.blocks[self.first_moe_block :], self.first_moe_block):
            layer = min(len(layers), L - 1)  # a dense block ignores what it is given
            own = routes and Routes(routes.experts[:, :, layer], routes.forced[:, :, layer], routes.uniform)
            x, routing = block(x, own, noise and noise[layer], cache and cache.layers[i])
            layers += [] if routing is None else [routing]
        if not layers:
            none = torch.zeros(B, T, 0, 1, dtype=torch.long, device=x.device)
            return self.ln_f(x), Routing(none.to(x.dtype), none, none[..., 0].bool(), ())
        logits, experts, forced, inputs = zip(*layers, strict=True)
        return self.ln_f(x), Routing(torch.stack(logits, 2), torch.stack(experts, 2), torch.stack(forced, 2), inputs)

    def head(self, features: Tensor) -> Tensor:
        """features [..., D] -> logits [..., V]."""
        return F.linear(features, self.wte.weight)

    def route_again(self, inputs) -> Tensor:
        """Router logits [B, T, L, E] of recorded router inputs, which are detached: only routers get a gradient."""
        routers = [self.blocks[i].mlp for i in self.config.moe_blocks]
        return torch.stack([r.router_logits(h.detach()) for r, h in zip(routers, inputs, strict=True)], 2)

    def count_parameters(self) -> tuple[int, int]:
        """Parameters in total, and those that one token uses (ERL table 10)."""
        total = sum(p.numel() for p in self.parameters())
        layers = [self.blocks[i].mlp.experts for i in self.config.moe_blocks]
        one_expert_each = sum(p[0].numel() for experts in layers for p in experts.parameters())
        return total, total - (self.config.n_expert - self.config.top_k) * one_expert_each


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
