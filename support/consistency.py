"""Two models over the same tokens: which tokens stay with their expert (ERPO figure 3)."""

from dataclasses import replace

import torch
from torch import Tensor

from moe import GPT
from support.errors import UserError
from support.fast import speed_up
from support.samples import Samples, load_run, prompt_of

COMPARED_TOKENS, SMALLEST_CLUSTER = 10_000, 100  # ERPO figure 3: smaller clusters say nothing and are left blank


@torch.no_grad()
def expert_consistency(first: GPT, second: GPT, rows, tokenizer) -> tuple[Tensor, Tensor]:
    """ERPO figure 3, from `first` to `second` over the same tokens. rows: lists of token ids.

    -> share [L, E] of the tokens that `first` routes to an expert and `second` too (NaN without a token), and the
    number of those tokens, int64 [L, E].
    """
    device, E = first.wte.weight.device, first.config.n_expert
    tokens_of, kept = 0, 0
    for i in range(0, len(rows), 16):
        part = rows[i : i + 16]
        width = max(map(len, part))
        tokens = torch.tensor([row + [tokenizer.end] * (width - len(row)) for row in part], device=device)
        inside = torch.arange(width, device=device) < torch.tensor([[len(row)] for row in part], device=device)
        used = []
        for model in (first, second):
            experts = model.branch(model.stem(tokens))[1].experts[inside]  # [N, L, K]
            used.append(torch.stack([(experts == j).any(-1) for j in range(E)], -1))  # [N, L, E]
        tokens_of, kept = tokens_of + used[0].sum(0), kept + (used[0] & used[1]).sum(0)
    return (kept / tokens_of).cpu(), tokens_of.cpu()


def compare(args, model: GPT, config: dict, samples: Samples) -> dict:
    second, second_config, _ = load_run(args.compare)
    same_shape = replace(second.config, gate=model.config.gate, expert_capacity=model.config.expert_capacity)
    if same_shape != model.config or config["tokenizer"] != second_config["tokenizer"]:
        raise UserError(f"{args.run} and {args.compare} cannot be compared: their models or tokenizers differ")
    rows, count = [], 0
    for n, item in enumerate(samples.items):
        if n >= args.samples and count >= COMPARED_TOKENS:
            break
        if samples.spec.kind == "text":
            row = item[0][:-1][item[1]].tolist()
        else:  # the prompt with the reference answer: a text that is the same for both
            row = prompt_of(item, model, samples)
            row += samples.tokenizer.encode(item.answer)[: samples.max_new_tokens]
        rows.append(row)
        count += len(row)
    share, tokens = expert_consistency(model, speed_up(second.to(model.wte.weight.device)), rows, samples.tokenizer)
    large = tokens >= SMALLEST_CLUSTER
    shown = [[share[i, j].item() if large[i, j] else None for j in range(share.shape[1])] for i in range(len(share))]
    return {
        "compared_with": args.compare,
        "compared_tokens": count,
        "smallest_cluster": SMALLEST_CLUSTER,
        "expert_consistency": shown,
        "expert_consistency_tokens": tokens.tolist(),
    }
