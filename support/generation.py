"""Generation: sampling with a cache of keys and values, and beam search.

B sequences, P tokens of the longest prompt, T positions, H heads, L MoE layers, E experts, K experts a token, V words.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe import GPT, MIN_TEMPERATURE, Routes


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


class LayerCache:
    """Keys and values of one block, and the slots that experts of limited capacity have given away."""

    def __init__(self, keys: Tensor, values: Tensor, used: Tensor):
        self.keys, self.values = keys, values  # [B, H, longest, D/H]
        self.used = used  # int64 [B, E]
        self.places = None  # int64 [B], where the next token of each row stands; None while the prompts are read
        self.mask = None  # bool [B, 1, 1, longest so far], what the next token may see

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v, and returns the attention of q over all that was kept. All [B, H, T, D/H]."""
        B, _, T, _ = q.shape
        if self.places is None:
            self.keys[:, :, :T], self.values[:, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        rows, longest = torch.arange(B, device=q.device), self.mask.shape[-1]  # T = 1: one new token a row
        self.keys[rows, :, self.places] = k[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, self.places] = v[:, :, 0].to(self.keys.dtype)
        keys, values = self.keys[:, :, :longest].to(q.dtype), self.values[:, :, :longest].to(q.dtype)
        if q.is_cuda:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        # the CPU's kernel is made for many queries, and several times slower with one
        scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~self.mask, -torch.inf)
        return scores.softmax(-1).to(q.dtype) @ values


class Cache:
    """What `GPT.stem` and `GPT.branch` take while a batch is generated; every row grows at its own position."""

    def __init__(self, model: GPT, rows: int, width: int, length: int):
        """Room for `length` tokens a row, of which prompts of up to `width` tokens are read first."""
        c, w = model.config, model.wte.weight
        self.positions = torch.arange(width, device=w.device)  # of the tokens that are read next
        # one zeroed block of memory for all layers; each holds its part of it
        keys, values = torch.zeros(
            2, c.n_layer, rows, c.n_head, length, c.n_embd // c.n_head, device=w.device, dtype=w.dtype
        )
        used = torch.zeros(c.n_layer, rows, c.n_expert, device=w.device, dtype=torch.long)
        self.layers = [LayerCache(*layer) for layer in zip(keys, values, used, strict=True)]

    def step(self, places: Tensor, longest: int):
        """The next token of each row stands at places [B]; no row is then longer than `longest`."""
        self.positions = places[:, None]
        mask = (torch.arange(longest, device=places.device) <= self.positions)[:, None, None]
        for layer in self.layers:
            layer.places, layer.mask = places, mask

    def reorder(self, rows: Tensor):
        """Row i becomes a copy of row rows[i]."""
        for layer in self.layers:
            layer.keys, layer.values, layer.used = (
                t.index_select(0, rows) for t in (layer.keys, layer.values, layer.used)
            )


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
        outside = probs.cumsum(-1) - probs >= top_p
        outside[:, 0] = False  # the first word always stays, also where top_p is 0 as a float32
        probs = probs.masked_fill(outside, 0.0)
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


def _next_token(logits: Tensor, temperature: float, top_p: float, generator) -> tuple[Tensor, Tensor, Tensor]:
    """A token of each row, its log-probability, and the entropy it was drawn from. logits [B, V] -> three [B]."""
    if temperature not in (0, 1):
        logits = logits / max(temperature, MIN_TEMPERATURE)
    probs = logits.softmax(-1)
    log_norm = logits.amax(-1) - probs.amax(-1).log()  # logsumexp, in the two cheapest passes over the words
    new = _draw(probs, top_p, generator) if temperature else logits.argmax(-1)
    log_prob = logits.gather(-1, new[:, None]).squeeze(-1) - log_norm
    entropy = (log_norm - torch.linalg.vecdot(probs, logits)).clamp_(min=0)  # -sum p (logit - log_norm)
    return new, log_prob, entropy


class _Prompts(NamedTuple):
    """Prompts that a model has read."""

    tokens: Tensor  # int64 [B, P + max_new_tokens], filled up with the end token
    lengths: Tensor  # int64 [B]
    cache: Cache
    experts: Tensor  # int64 [B, P, L, K]
    expert_log_probs: Tensor  # float32 [B, P, L, K]
    last: Tensor  # [B, D], features of each prompt's last token


def _read_prompts(model: GPT, prompts: list[list[int]], max_new_tokens: int, end_token: int, routes=None) -> _Prompts:
    """Prompts of different lengths, padded on the right. One that several rows share (the responses of a group, the
    beams) is read once."""
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("every prompt needs at least one token")
    width = max(map(len, prompts))
    if width + max_new_tokens > model.config.context:
        raise ValueError(
            f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the context of {model.config.context}"
        )
    keys = [tuple(p) for p in prompts]
    if routes is not None:  # each row has routes of its own, and is read on its own
        routes = Routes(routes.experts[:, :width], routes.forced[:, :width], routes.uniform)
        keys = list(range(len(prompts)))
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    back = [place[key] for key in keys]  # each row's place among the distinct prompts
    first = [back.index(i) for i in range(len(place))]  # the first row of each distinct prompt
    device = model.wte.weight.device
    tokens = torch.tensor([p + [end_token] * (width + max_new_tokens - len(p)) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    cache = Cache(model, len(first), width, width + max_new_tokens)
    features, routing = model.branch(model.stem(tokens[first, :width], cache), routes, cache)
    # Padding on the right is invisible to the causal prompt, and generated tokens overwrite its keys. Only the places
    # it took from experts of limited capacity must be given back.
    if model.config.expert_capacity:
        inside = torch.arange(width, device=device) < lengths[first, None]
        for layer, block in enumerate(model.config.moe_blocks):
            slots = F.one_hot(routing.experts[:, :, layer], model.config.n_expert).sum(2)  # [B, P, E]
            cache.layers[block].used = (slots * inside[..., None]).sum(1)
    back = torch.tensor(back, device=device)
    if len(first) < len(prompts):
        cache.reorder(back)
    last = features[back, lengths - 1]
    return _Prompts(tokens, lengths, cache, routing.experts[back], routing.expert_log_probs()[back].float(), last)


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
    read = _read_prompts(model, prompts, max_new_tokens, end_token, routes)
    cache, last, width = read.cache, read.last, read.experts.shape[1]
    done = torch.zeros_like(read.lengths, dtype=torch.bool)
    rows = torch.arange(len(prompts), device=done.device)
    written, routed = [], []  # what each step decided
    for step in range(max_new_tokens):
        new, log_prob, entropy = _next_token(model.head(last).float(), temperature, top_p, generator)
        new = new.masked_fill(done, end_token)
        written.append((new, ~done, log_prob.masked_fill(done, 0), entropy.masked_fill(done, 0)))
        done = done | (new == end_token)
        if step + 1 == max_new_tokens or done.all():
            break
        places = read.lengths + step
        cache.step(places, width + step + 1)
        imposed = None
        if routes is not None:  # [B, 1, L, K]: every row is at a position of its own
            imposed = Routes(
                routes.experts[rows, places][:, None], routes.forced[rows, places][:, None], routes.uniform
            )
        features, routing = model.branch(model.stem(new[:, None], cache), imposed, cache)
        last = features[:, 0]
        routed.append((routing.experts[:, 0], routing.expert_log_probs()[:, 0].float()))
    return _rollout(read, written, routed, max_new_tokens)


def _rollout(read: _Prompts, written: list, routed: list, max_new_tokens: int) -> Rollout:
    """Puts what the steps decided at its places, behind the prompts."""
    tokens, lengths, device = read.tokens, read.lengths, read.tokens.device
    log_probs, entropies = torch.zeros(2, *tokens.shape, device=device)
    mask = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
    room = (0, 0, 0, 0, 0, max_new_tokens)  # places for the written tokens
    experts, expert_log_probs = F.pad(read.experts, room), F.pad(read.expert_log_probs, room)
    rows = torch.arange(len(tokens), device=device)[:, None]
    places = lengths[:, None] - 1 + torch.arange(len(written), device=device)  # [B, steps]
    for record, values in zip((tokens[:, 1:], mask, log_probs, entropies), zip(*written, strict=True), strict=True):
        record[rows, places] = torch.stack(values, 1)
    if routed:  # the first token was written where the prompt's last token was routed
        for record, values in zip((experts, expert_log_probs), zip(*routed, strict=True), strict=True):
            record[rows, places[:, 1:]] = torch.stack(values, 1)
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
    read = _read_prompts(model, copies, max_new_tokens, end_token)
    cache, last, device, width = read.cache, read.last, read.tokens.device, read.experts.shape[1]
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
        cache.step(read.lengths + step, width + step + 1)
        last = model.branch(model.stem(new.view(-1, 1), cache), cache=cache)[0][:, 0]
    winner = (scores / counts).argmax(-1)
    rows = written[torch.arange(P, device=device), winner].tolist()
    return [row[: row.index(end_token)] if end_token in row else row for row in rows]
