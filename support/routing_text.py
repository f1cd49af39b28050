"""A routing.json in words for a terminal, why its figures may mean little, and a text in the colours of its experts."""

import colorsys
import itertools
import os
import unicodedata
from collections import Counter

import torch
from torch import Tensor

from support.pictures import draw_routing, new_figure, rounded, save
from support.run import write_json

COLLAPSED = 0.95  # a layer whose K busiest experts get more than this share of its slots has collapsed
TIED = 0.99  # more ties than this share of the perturbed routes, and ranks are all but chance
CAUTION = (
    "note: MRR alone misleads. It rises when the own route gets better, and also when the perturbed routes get worse\n"
    "or the router sharper. Only a control tells them apart: the same run without ERL (--algo lm), or ERL whose\n"
    "credit goes to random experts. What the control reaches too was not learnt from the reward. Sharpness cannot\n"
    "raise the regret; a collapse, after which the other experts are useless, can lower it."
)
WIDTH = 100  # characters in a line of coloured text
EXPLAINED = """Each token in the colour of the expert it goes to. Below, of each expert: its share of the layer's
tokens, and its most frequent ones (12/40: 12 of the 40 times that the token stands in the text).
"""


def write_results(result: dict, scored: list, tokenizer, out: str) -> str:
    """Adds the warnings; writes routing.json before anything that may fail is drawn. -> the tokens in colours."""
    result["warnings"] = warnings_of(result, tokenizer.vocab_size)
    write_json(os.path.join(out, "routing.json"), result)
    draw_routing(result, out)
    words = [[tokenizer.decode([token]) for token in s.tokens.tolist()] for s in scored]
    num_experts = len(result["expert_load"][0])
    lines = token_lines(words, torch.cat([s.experts for s in scored]), num_experts)
    draw_tokens(lines, num_experts, os.path.join(out, "routing_tokens.png"))
    return coloured(lines, num_experts)


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


def token_lines(samples: list[list[str]], experts: Tensor, num_experts: int, shown=300, most=6) -> list:
    """A text with its experts and each expert's most frequent tokens, as lines of (text, expert or None).

    samples  lists of tokens, N in all, as the tokenizer decodes them one by one; a gap follows each sample.
             The first `shown` tokens are shown, all are counted.
    experts  int64 [N, L, K]: the first of a token is its colour, all of them are counted
    """
    words = [visible(token) for tokens in samples for token in tokens]
    ends = set(itertools.accumulate(map(len, samples)))  # a sample ends before these
    total, lines = Counter(words), [[(text, None)] for text in EXPLAINED.split("\n")]
    for layer, chosen in enumerate(experts.transpose(0, 1).tolist()):  # [N][K]
        lines += [[(f"layer {layer}", None)], *wrap(words[:shown], [used[0] for used in chosen[:shown]], ends), []]
        counts = [Counter() for _ in range(num_experts)]
        for word, used in zip(words, chosen, strict=True):
            for expert in used:
                counts[expert][word] += 1
        for expert, count in enumerate(counts):
            frequent = sorted(count.items(), key=lambda item: (-item[1], item[0]))[:most]
            text = "  ".join(f"{w if w.strip() else '␣' * len(w)} {n}/{total[w]}" for w, n in frequent)
            share = count.total() / experts[:, layer].numel()
            lines.append([(f" {expert:3} ", expert), (f" {share:5.1%}  {text}"[: WIDTH - 5], None)])
        lines.append([])
    return lines


def visible(token: str) -> str:
    """Every character takes room: line ends and tabs as signs, what cannot be printed as a box."""
    signs = {"\n": "↵", "\t": "→", "\r": "↵"}
    token = "".join(signs.get(c, c if c.isprintable() else "□") for c in token) or "□"
    return token if columns(token) <= WIDTH else token[: WIDTH // 2 - 1] + "…"


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


def wrap(words: list[str], experts: list[int], ends) -> list[list]:
    """Lines of (word, expert), none wider than WIDTH; a gap without an expert behind the first n words, n in `ends`."""
    lines, room = [], 0
    for n, (word, expert) in enumerate(zip(words, experts, strict=True), start=1):
        if columns(word) > room:
            lines.append([])
            room = WIDTH
        lines[-1].append((word, expert))
        room -= columns(word)
        if n in ends and room:
            lines[-1].append((" ", None))
            room -= 1
    return lines


def colour(expert: int, num_experts: int) -> tuple[float, float, float]:
    """Neighbours in number are far apart in hue; light enough for black letters."""
    hue = expert / num_experts if num_experts <= 12 else (expert * 0.6180339887) % 1
    return colorsys.hls_to_rgb(hue, 0.78 if expert % 2 else 0.7, 0.9)


def coloured(lines: list, num_experts: int) -> str:
    """The lines of `token_lines` for a terminal."""

    def painted(text, expert):
        if expert is None:
            return text
        rgb = ";".join(str(round(255 * x)) for x in colour(expert, num_experts))
        return f"\x1b[30;48;2;{rgb}m{text}\x1b[0m"

    return "\n".join("".join(painted(*part) for part in line) for line in lines)


def draw_tokens(lines: list, num_experts: int, path: str):
    """The same as a PNG, a cell of a monospaced font for each character."""
    cell, height = 0.602 / 8, 1.45 / 8  # inches, for letters of 9 points, an eighth of an inch
    figure = new_figure((len(lines) + 1) * height, (WIDTH + 2) * cell)
    from matplotlib.font_manager import findfont, get_font  # after new_figure, which chooses the backend

    font = get_font(findfont("DejaVu Sans Mono"))
    figure.set_layout_engine("none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-1, WIDTH + 1), ylim=(len(lines) + 0.5, -0.5))
    axis.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for text, expert in line:
            if expert is not None:
                axis.barh(y + 0.5, columns(text), height=1, left=x, color=colour(expert, num_experts))
            drawn = "".join(c if font.get_char_index(ord(c)) else "□" * columns(c) for c in text)
            axis.text(x, y + 0.5, drawn, family="DejaVu Sans Mono", size=9, va="center", parse_math=False)
            x += columns(text)
    save(figure, path)
