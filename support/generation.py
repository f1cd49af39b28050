"""Generation: sampling with a cache of keys and values, in the trainer's precision or in another, and beam search.

B sequences, P tokens of the longest prompt, T positions, H heads, L MoE layers, K experts a token, V words.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe import GPT, MIN_TEMPERATURE


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


def sampler_of(model: GPT, dtype: torch.dtype) -> GPT:
    """The model as an engine of another precision runs it: weights, arithmetic and cache in `dtype`, float32 routers.

    A model of that dtype is its own sampler. Otherwise this is a copy that shares nothing with it and has no gradients:
    make one for every batch. Autocast would change its arithmetic, so generate outside of it.
    """
    if model.wte.weight.dtype == dtype:
        return model
    with torch.device("meta"):  # nothing is allocated or drawn for weights that are replaced
        sampler = GPT(model.config)
    weights = {n: w.to(torch.float32 if "router" in n else dtype, copy=True) for n, w in model.state_dict().items()}
    sampler.load_state_dict(weights, assign=True)
    return sampler.requires_grad_(False)


class LayerCache:
    """Keys and values of one block."""

    def __init__(self, kept: Tensor):
        self.kept = kept  # [2, B, H, longest, D/H]
        self.places = None  # int64 [B], where the next token of each row stands; None while the prompts are read
        self.mask = None  # bool [B, 1, 1, longest so far], what the next token may see

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v, and returns the attention of q over all that was kept. All [B, H, T, D/H]."""
        new = torch.stack([k, v], 1).to(self.kept.dtype)  # under autocast the cache has another dtype
        if self.places is None:
            self.kept[..., : q.shape[2], :] = new.transpose(0, 1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.kept[:, torch.arange(len(q), device=q.device), :, self.places] = new[:, :, :, 0]  # one token a row
        keys, values = self.kept[..., : self.mask.shape[-1], :].to(q.dtype)
        if q.is_cuda:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        # The CPU's kernel is made for many queries, and several times slower with one.
        scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~self.mask, -torch.inf)
        return scores.softmax(-1).to(q.dtype) @ values


class Cache:
    """The `cache` of a model's forward while a batch is generated; every row grows at its own position."""

    def __init__(self, model: GPT, rows: int, width: int, length: int):
        """Room for `length` tokens a row, of which prompts of up to `width` tokens are read first."""
        c, w = model.config, model.wte.weight
        self.positions = torch.arange(width, device=w.device)  # of the tokens that are read next
        size = (c.n_layer, 2, rows, c.n_head, length, c.n_embd // c.n_head)
        self.layers = [LayerCache(kept) for kept in torch.zeros(size, device=w.device, dtype=w.dtype)]

    def step(self, places: Tensor, longest: int):
        """The next token of each row stands at places [B]; no row is then longer than `longest`."""
        self.positions = places[:, None]
        mask = (torch.arange(longest, device=places.device) <= self.positions)[:, None, None]
        for layer in self.layers:
            layer.places, layer.mask = places, mask

    def reorder(self, rows: Tensor):
        """Row i becomes a copy of row rows[i]."""
        for layer in self.layers:
            layer.kept = layer.kept.index_select(1, rows)


def _read_prompts(model: GPT, prompts: list[list[int]], max_new_tokens: int, end_token: int, routes=None):
    """-> a Rollout with room for the responses, whose tokens and routes hold the prompts; the lengths of the prompts
    int64 [B]; the cache; the features [B, D] of each prompt's last token.

    Prompts are padded on the right: a causal model does not see it, and new tokens overwrite its keys. One that several
    rows share (the responses of a group, the beams) is read once.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("every prompt needs at least one token")
    width, device = max(map(len, prompts)), model.wte.weight.device
    if (length := width + max_new_tokens) > (context := model.config.context):
        raise ValueError(f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the context of {context}")
    distinct = {}  # prompts; with routes of its own each row is read on its own
    back = [distinct.setdefault((tuple(p), i if routes else 0), len(distinct)) for i, p in enumerate(prompts)]
    first = [back.index(i) for i in range(len(distinct))]  # the first row of each distinct prompt
    tokens = torch.tensor([p + [end_token] * (length - len(p)) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    routes = routes and routes._replace(experts=routes.experts[:, :width], forced=routes.forced[:, :width])
    cache = Cache(model, len(first), width, length)
    features, routing = model(tokens[first, :width], routes, cache=cache)
    back = torch.tensor(back, device=device)
    if len(first) < len(prompts):
        cache.reorder(back)
    nothing, room = torch.zeros(2, *tokens.shape, device=device), (0, 0, 0, 0, 0, max_new_tokens)
    routed = (F.pad(x[back], room) for x in (routing.experts, routing.expert_log_probs().float()))
    rollout = Rollout(tokens, torch.zeros_like(tokens, dtype=torch.bool), *nothing, *routed)
    return rollout, lengths, cache, features[back, lengths - 1]


def sample_tokens(probs: Tensor, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """One token a row from probs [B, V], cut to its nucleus of mass top_p -> int64 [B].

    By the inverse of the cumulative distribution: torch.multinomial over 50,257 words costs more than the model.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    device = probs.device if generator is None else generator.device
    if top_p < 1:
        probs, words = probs.sort(-1, descending=True)
        outside = probs.cumsum(-1) - probs >= top_p
        outside[:, 0] = False  # the first word always stays, also where top_p is 0 as a float32
        probs = probs.masked_fill(outside, 0.0)
    u, cdf = torch.rand(len(probs), 1, generator=generator, device=device).to(probs.device), probs.cumsum(-1)
    # u is at most 1 - 2^-24: u * total stays below the total in float32 too, and no probability of 0 is found.
    index = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=probs.shape[-1] - 1)
    return (index if top_p >= 1 else words.gather(-1, index)).squeeze(-1)


def _next_token(logits: Tensor, temperature: float, top_p: float, generator) -> tuple[Tensor, Tensor, Tensor]:
    """A token of each row, its log-probability, and the entropy it was drawn from. logits [B, V] -> three [B]."""
    if temperature not in (0, 1):
        logits = logits / max(temperature, MIN_TEMPERATURE)
    probs = logits.softmax(-1)
    log_norm = logits.amax(-1) - probs.amax(-1).log()  # logsumexp, in the two cheapest passes over the words
    new = sample_tokens(probs, top_p, generator) if temperature else logits.argmax(-1)
    log_prob = logits.gather(-1, new[:, None]).squeeze(-1) - log_norm
    entropy = (log_norm - torch.linalg.vecdot(probs, logits)).clamp_(min=0)  # -sum p (logit - log_norm)
    return new, log_prob, entropy


@torch.no_grad()
def generate(
    model: GPT, prompts, *, max_new_tokens: int, end_token: int, temperature=1.0, top_p=1.0, generator=None, routes=None
) -> Rollout:
    """Sample one response to each prompt, until its end token or max_new_tokens. Temperature 0 takes the likeliest.

    Log-probabilities and routes are those of the forwards that sampled, so no second forward is needed. They are of
    the whole tempered distribution, also with top_p < 1 (Decision: the importance ratio compares policies, not
    nuclei). `routes` imposes decisions on tokens read and written: index t of a row is its position t, and there are
    at least (longest prompt + max_new_tokens - 1) of them. Raises ValueError for an empty prompt, prompts too long for
    the context, a negative temperature and top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    rollout, lengths, cache, last = _read_prompts(model, prompts, max_new_tokens, end_token, routes)
    tokens, response_mask, log_probs, entropies, experts, expert_log_probs = rollout
    rows, done = torch.arange(len(prompts), device=lengths.device), torch.zeros_like(lengths, dtype=torch.bool)
    for step in range(max_new_tokens):
        new, log_prob, entropy = _next_token(model.head(last).float(), temperature, top_p, generator)
        new = new.masked_fill(done, end_token)
        places = lengths + step  # of the new tokens: every row is at a position of its own
        tokens[rows, places] = new
        before = rows, places - 1
        response_mask[before] = ~done
        log_probs[before], entropies[before] = log_prob.masked_fill(done, 0), entropy.masked_fill(done, 0)
        done = done | (new == end_token)
        if step + 1 == max_new_tokens or done.all():
            break
        cache.step(places, tokens.shape[1] - max_new_tokens + step + 1)
        now = rows[:, None], places[:, None]
        imposed = routes and routes._replace(experts=routes.experts[now], forced=routes.forced[now])
        features, routing = model(new[:, None], imposed, cache=cache)
        last = features[:, 0]
        experts[rows, places] = routing.experts[:, 0]
        expert_log_probs[rows, places] = routing.expert_log_probs()[:, 0].float()
    T = int((lengths + response_mask.sum(1)).max()) - 1
    return Rollout(tokens[:, : T + 1], *(record[:, :T] for record in rollout[1:]))


@torch.no_grad()
def beam_search(model: GPT, prompts, *, max_new_tokens: int, end_token: int, beams: int = 6) -> list[list[int]]:
    """The response of each prompt with the highest mean log-probability a token among `beams` kept ones.

    A finished beam stays among the candidates with its sum; the search compares sums, the final choice means.
    """
    P, V, copies = len(prompts), model.config.vocab_size, [p for p in prompts for _ in range(beams)]
    rollout, lengths, cache, last = _read_prompts(model, copies, max_new_tokens, end_token)
    width, each = rollout.tokens.shape[1] - max_new_tokens, torch.arange(P, device=last.device)[:, None]
    scores = torch.full((P, beams), -math.inf, device=last.device)
    scores[:, 0] = 0  # all beams of a prompt start equal: only one may branch
    only_end = torch.full((V,), -math.inf, device=last.device).index_fill(0, lengths.new_tensor(end_token), 0)
    written, done = lengths.new_zeros(P, beams, 0), torch.zeros_like(scores, dtype=torch.bool)
    for step in range(max_new_tokens):
        log_probs = model.head(last).float().log_softmax(-1).view(P, beams, V)
        log_probs[done] = only_end
        scores, best = (scores[..., None] + log_probs).view(P, -1).topk(beams)
        parent, new = best // V, best % V  # [P, beams]
        written = torch.cat([written[each, parent], new[..., None]], -1)  # [P, beams, step + 1]
        done = new == end_token
        if step + 1 == max_new_tokens or done.all():
            break
        cache.reorder((each * beams + parent).flatten())
        cache.step(lengths + step, width + step + 1)
        last = model(new.view(-1, 1), cache=cache)[0][:, 0]
    counts = ((written != end_token).sum(-1) + 1).clamp(max=written.shape[-1])  # the end token is one of them
    rows = written[each[:, 0], (scores / counts).argmax(-1)].tolist()
    return [[t for t in row if t != end_token] for row in rows]
