"""Which tokens go where: a text coloured by the expert each token went to, for the terminal and as a picture, and each
expert's most frequent tokens."""

import colorsys
import unicodedata
from collections import Counter

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

WIDTH, FONT_SIZE = 100, 9  # characters in a line, points
EXPLAINED = (
    "Each token in the colour of the expert it goes to. Below, of each expert: its share of the layer's",
    "tokens, and its most frequent ones (12/40: 12 of the 40 times that the token stands in the text).",
)


def tokens_by_expert(
    tokens, experts: Tensor, num_experts: int, path=None, *, layers=None, shown=150, most=6, ends=()
) -> str:
    """-> the coloured text for a terminal, a part for every layer; and as a picture in `path`, if one is given.

    tokens   T strings, as the tokenizer decodes them one by one
    experts  int64 [T, L], or [T, L, K], whose first expert of a token is its colour and all of them are counted
    layers   those to show (None: all); shown: tokens of the text (the counts are of all T); most: tokens an expert
    ends     indices of tokens that end a text: a gap follows them

    ValueError: experts of another length or shape.
    """
    if experts.dim() not in (2, 3) or len(experts) != len(tokens):
        raise ValueError(f"experts must have shape [{len(tokens)}, L] or [{len(tokens)}, L, K], not {experts.shape}")
    experts = experts.cpu().view(len(tokens), experts.shape[1], -1)  # [T, L, K]
    tokens, lines = [visible(token) for token in tokens], [[(words, None)] for words in (*EXPLAINED, "")]
    for layer in range(experts.shape[1]) if layers is None else layers:
        chosen = experts[:, layer].tolist()
        lines += [[(f"layer {layer}", None)], *wrap(tokens[:shown], [k[0] for k in chosen[:shown]], ends), []]
        for expert, share, frequent in frequent_tokens(tokens, chosen, num_experts, most):
            counts = "  ".join(f"{t if t.strip() else '␣' * len(t)} {count}/{total}" for t, count, total in frequent)
            lines.append([(f" {expert:3} ", expert), (f" {share:5.1%}  {counts}"[: WIDTH - 5], None)])
        lines.append([])
    if path is not None:
        draw(lines, num_experts, path)
    return "\n".join("".join(painted(*part, num_experts) for part in line) for line in lines)


def frequent_tokens(tokens, chosen, num_experts: int, most: int) -> list[tuple]:
    """(expert, its share of the slots, [(token, times it got it, times in the text)]), the experts in their order."""
    total, slots = Counter(tokens), sum(map(len, chosen))
    of = [Counter() for _ in range(num_experts)]
    for token, experts in zip(tokens, chosen, strict=True):
        for expert in experts:
            of[expert][token] += 1
    ranked = [sorted(c.items(), key=lambda item: (-item[1], item[0]))[:most] for c in of]
    return [
        (expert, of[expert].total() / max(slots, 1), [(token, n, total[token]) for token, n in ranked[expert]])
        for expert in range(num_experts)
    ]


def visible(token: str) -> str:
    """Every character takes room: line ends and tabs as signs, what cannot be printed as a box."""
    signs = {"\n": "↵", "\t": "→", "\r": "↵"}
    token = "".join(signs.get(c, c if c.isprintable() else "□") for c in token) or "□"
    return token if columns(token) <= WIDTH else token[: WIDTH // 2 - 1] + "…"


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


def wrap(tokens, experts, ends=()) -> list[list]:
    """Lines of (token, expert), none wider than WIDTH; a gap without an expert behind the indices in `ends`."""
    lines, room = [], 0
    for i, (token, expert) in enumerate(zip(tokens, experts, strict=True)):
        if columns(token) > room:
            lines.append([])
            room = WIDTH
        lines[-1].append((token, expert))
        room -= columns(token)
        if i in ends and room:
            lines[-1].append((" ", None))
            room -= 1
    return lines


def colour(expert: int, num_experts: int) -> tuple[float, float, float]:
    """Neighbours in number are far apart in hue; light enough for black letters."""
    hue = expert / num_experts if num_experts <= 12 else (expert * 0.6180339887) % 1
    return colorsys.hls_to_rgb(hue, 0.78 if expert % 2 else 0.7, 0.9)


def painted(text: str, expert: int | None, num_experts: int) -> str:
    if expert is None:
        return text
    r, g, b = (round(255 * x) for x in colour(expert, num_experts))
    return f"\x1b[30;48;2;{r};{g};{b}m{text}\x1b[0m"


def draw(lines, num_experts: int, path):
    """The same lines as a PNG, a cell of a monospaced font for each character."""
    cell, height = 0.602 * FONT_SIZE / 72, 1.45 * FONT_SIZE / 72  # inches
    figure = Figure(figsize=((WIDTH + 2) * cell, (len(lines) + 1) * height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-1, WIDTH + 1), ylim=(len(lines) + 0.5, -0.5))
    axis.axis("off")
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    for y, line in enumerate(lines):
        x = 0
        for text, expert in line:
            if expert is not None:
                axis.add_patch(Rectangle((x, y), columns(text), 1, color=colour(expert, num_experts), lw=0))
            drawn = "".join(c if font.get_char_index(ord(c)) else "□" * columns(c) for c in text)
            axis.text(x, y + 0.5, drawn, family="DejaVu Sans Mono", size=FONT_SIZE, va="center", parse_math=False)
            x += columns(text)
    figure.savefig(path, dpi=130)
