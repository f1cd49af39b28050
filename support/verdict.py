"""What routing.json says, in words: its figures as lines for a terminal, and why they may mean little."""

TIED = 0.99  # more ties than this share of the perturbed routes, and ranks are all but chance
COLLAPSED = 0.95  # a layer whose K busiest experts get more than this share of its slots has collapsed


def doubts(result: dict, vocab_size: int) -> list[str]:
    """Why the ranks of this run say little, if they do: sentences for a person."""
    found = []
    if layers := result["collapsed_layers"]:
        where, K = ", ".join(map(str, layers)), result["top_k"]
        found.append(
            f"collapsed: in MoE layer {where} more than {COLLAPSED:.0%} of the load is on {K} of "
            f"{len(result['expert_load'][0])} experts; the layer is all but dense, and MRR shows the harm of experts "
            "that it never uses"
        )
    if result["step"] == 0:
        found.append("untrained: this checkpoint is that of step 0")
    elif result["score"] == "perplexity" and result["original_score"] > vocab_size / 2:
        found.append(f"untrained: the perplexity is above half of the vocabulary's {vocab_size} tokens")
    if (tied := tied_share(result)) > TIED:
        found.append(
            f"{tied:.2%} of the routes are tied with the original (experts that are copies of one another, or a task "
            "that is never solved): MRR and Hit@1 are chance by construction"
        )
    return found


def tied_share(result: dict) -> float:
    """Of the perturbed routes, those that score as the original does."""
    return sum(result["tied_routes"]) / ((result["routes"] - 1) * result["samples"])


def describe(result: dict) -> str:
    """The figures as lines for a terminal; MRR never without what it hides."""
    original, perturbed, best = (result[f"{n}_score"] for n in ("original", "perturbed", "best_of_99"))
    experts, layers = len(result["expert_load"][0]), len(result["expert_load"])
    largest = max(map(max, result["expert_load"]))
    lines = [f"{result['samples']} samples of {result['dataset']} {result['split']}, score: {result['score']}"]
    for name in ("mrr", "hit1"):
        chance, error = result[f"chance_{name}"], result[f"{name}_standard_error"]
        lines.append(f"{name:14}{result[name]:10.4f} +- {error:.4f} (chance {chance:.4f})")
    lines += [
        f"{'original':14}{original:10.4f}",
        f"{'perturbed':14}{perturbed:10.4f} over {result['routes'] - 1} routes a sample",
        f"{'best of 99':14}{best:10.4f} along each sample's best perturbed route",
        "robustness    " + "  ".join(f"{a}: {s:.4f}" for a, s in result["robustness"].items()),
        f"{'tied':14}{tied_share(result):10.4f} of the perturbed routes score as the original does",
        f"{'load':14}{largest:10.4f} of a layer's slots at its busiest expert (even: {1 / experts:.4f}); max_vio "
        f"{result['max_vio']:.2f}, {result['dead_experts']} of {layers * experts} experts dead",
        f"{'entropy':14}{result['router_entropy']:10.4f} nats, {result['relative_router_entropy']:.2f} of log E; by "
        "layer " + " ".join(f"{h:.2f}" for h in result["relative_router_entropy_by_layer"]),
        f"{'top-1 > 0.9':14}{result['top1_above_0.9']:10.4f} of the routing decisions",
    ]
    return "\n".join(lines + [f"warning: {doubt}" for doubt in result["warnings"]])
