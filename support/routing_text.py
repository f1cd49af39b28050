"""A routing.json: written down with its pictures, in words for a terminal, and why its figures may mean little."""

import os

import torch

from support.pictures import draw_routing, rounded
from support.run import write_json

COLLAPSED = 0.95  # a layer whose K busiest experts get more than this share of its slots has collapsed
TIED = 0.99  # more ties than this share of the perturbed routes, and ranks are all but chance
CAUTION = (
    "note: MRR alone misleads. It rises when the own route gets better, and also when the perturbed routes get worse\n"
    "or the router sharper. Only a control tells them apart: the same run without ERL (--algo lm), or ERL whose\n"
    "credit goes to random experts. What the control reaches too was not learnt from the reward. Sharpness cannot\n"
    "raise the regret; a collapse, after which the other experts are useless, can lower it."
)


def write_results(result: dict, scored: list, tokenizer, out: str):
    """routing.json with warnings and frequent tokens, then the pictures: drawing may fail, and takes nothing along."""
    result["warnings"] = warnings_of(result, tokenizer.vocab_size)
    result["frequent_tokens"] = frequent_tokens(scored, tokenizer, len(result["expert_load"][0]))
    write_json(os.path.join(out, "routing.json"), result)
    draw_routing(result, out)


def frequent_tokens(scored: list, tokenizer, num_experts: int, most: int = 8) -> list:
    """Of each layer and expert: [token as text, how often it went there], the most frequent ones first."""
    tokens = torch.cat([s.tokens for s in scored])  # [N]
    experts = torch.cat([s.experts for s in scored])  # [N, L, K]

    def of(layer: int, expert: int) -> list:
        found, counts = tokens[(experts[:, layer] == expert).any(-1)].unique(return_counts=True)
        top = counts.sort(descending=True, stable=True).indices[:most]
        return [[tokenizer.decode([t]), n] for t, n in zip(found[top].tolist(), counts[top].tolist(), strict=True)]

    return [[of(layer, expert) for expert in range(num_experts)] for layer in range(experts.shape[1])]


def warnings_of(result: dict, vocab_size: int) -> list[str]:
    """Why the ranks of this run say little, if they do: sentences for a person."""
    K, E, found = result["top_k"], len(result["expert_load"][0]), []
    if layers := ", ".join(map(str, result["collapsed_layers"])):
        load = f"in MoE layer {layers} more than {COLLAPSED:.0%} of the load is on {K} of {E} experts"
        harm = "the layer is all but dense, and MRR shows the harm of experts that it never uses"
        found.append(f"collapsed: {load}; {harm}")
    if result["step"] == 0:
        found.append("untrained: this checkpoint is that of step 0")
    elif result["score"] == "perplexity" and result["original_score"] > vocab_size / 2:
        found.append(f"untrained: the perplexity is above half of the vocabulary's {vocab_size} tokens")
    if (tied := tied_share(result)) > TIED:
        why = "(experts that are copies of one another, or a task that is never solved)"
        found.append(
            f"{tied:.2%} of the routes are tied with the original {why}: MRR and Hit@1 are chance by construction"
        )
    return found


def tied_share(result: dict) -> float:
    return sum(result["tied_routes"]) / ((result["routes"] - 1) * result["samples"])


def describe(result: dict) -> str:
    """The figures as lines for a terminal; MRR never without what it hides."""
    load, score, even = result["expert_load"], result["score"], 1 / len(result["expert_load"][0])
    by_layer = " ".join(rounded(h, 2) for h in result["relative_router_entropy_by_layer"])
    vio = "a layer's largest expert load over its mean load, less 1; mean over the layers"
    errors = {name: rounded(result[f"{name}_standard_error"]) for name in ("mrr", "hit1")}
    rows = [  # a name, a figure, what it is
        *((name, result[name], f"+- {errors[name]} (chance {result[f'chance_{name}']:.4f})") for name in errors),
        ("original", result["original_score"], f"{score} along the router's own routes"),
        ("perturbed", result["perturbed_score"], f"along {result['routes'] - 1} perturbed routes a sample"),
        ("best of 99", result["best_of_99_score"], "along each sample's best perturbed route"),
        ("tied", tied_share(result), "of the perturbed routes score as the original does"),
        ("load", max(map(max, load)), f"of a layer's slots at its busiest expert (even: {even:.4f})"),
        ("max_vio", result["max_vio"], vio),
        ("dead experts", result["dead_experts"], f"of {sum(map(len, load))}"),
        ("entropy", result["relative_router_entropy"], f"of log E, the routers' softmax; by layer {by_layer}"),
        ("top-1 > 0.9", result["top1_above_0.9"], "of the routing decisions"),
    ]
    if regret := result.get("regret"):
        found, C = regret["all"], regret["candidates"]
        what = "nats that the best expert, chosen by the answer, would have gained (an upper bound)"
        rows.append(("regret", found["regret"], f"+- {rounded(found['regret_standard_error'])} {what}"))
        for part in ("confident", "fragile"):
            rows.append((f"  {part}", regret[part]["regret"], f"of {regret[part]['decisions']} {part} predictions"))
        rows += [
            ("random expert", found["random_expert_cost"], "nats that it costs in the own one's place"),
            ("rank", found["own_rank"], f"of {C} experts, the own one's mean (chance {regret['chance_rank']:.2f})"),
            ("own is best", found["own_best"], f"of the decisions (chance {regret['chance_best']:.4f})"),
        ]
    lines = [f"{result['samples']} samples of {result['dataset']} {result['split']}, score: {score}"]
    for name, value, what in rows:
        lines.append(f"{name:14}{rounded(value) if isinstance(value, float) else value:>10} {what}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"]), CAUTION])
