"""Is the router's choice better than chance? eval_routing.py's question, figures and pictures for a transformers MoE.

    pip install -r recipes/requirements.txt
    python -m recipes.eval_hf out/erl/model --out out/erl --samples 20     # --data-dir ../shared/data: without the hub

MODEL is a hub id or folder of a Qwen2-MoE, Qwen3-MoE, OLMoE, Mixtral or GPT-OSS; a dense one is upcycled.
Each sample is a window of a text, scored along its own route and along 99 perturbed ones; at --decisions decisions each
expert is forced in turn (see eval_routing.py). Writes routing.json and the pictures of eval_routing.py.
"""

import os
import sys

import torch
from tqdm import tqdm

from erl import random_routes
from eval_routing import Decision, Scored, decision_of, figures, regret_figures, route_alphas
from recipes.hf_routing import Routes, find_routers, next_token_log_probs
from recipes.hf_text import HubTokenizer, load_model, load_windows
from support.arguments import Parser, number, one_of
from support.device import pick_device
from support.errors import run_program
from support.routing_text import describe, write_results
from support.tasks import rng


def parse(argv=None):
    p = Parser(prog="python -m recipes.eval_hf", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, count = p.add_argument, number(int, low=1)
    add("model", metavar="MODEL")
    add("--out", required=True, help="folder of the results")
    add("--samples", type=count, default=20, help="windows of the test split, evenly spread; each is scored 108 times")
    add("--context", type=count, default=256)
    add("--decisions", type=number(int, low=0), default=1000, help="decisions at which each expert is forced; 0: none")
    add("--batch-size", type=count, default=4, help="routes in one forward")
    add("--dataset", type=one_of("text set", ("wikitext2", "pydocs")), default="wikitext2")
    add("--data-dir", help="read the set below this folder, not from the hub")
    add("--seed", type=number(int, low=0), default=0, help="draws the random routes and the decisions")
    return p.parse_args(argv)


class HubModel:
    """A model's sizes, and how its routes and its decisions are scored."""

    def __init__(self, model):
        self.routers = [router for router, _ in find_routers(model)]
        self.model, self.device = model.eval(), next(model.parameters()).device
        self.layers, self.n_expert = len(self.routers), self.routers[0].weight.shape[0]
        self.top_k = self.routers[0].top_k

    def draw_routes(self, length, *key) -> Routes:
        """Of one sample: R rows of `length` positions, the same for every batch size."""
        alphas = route_alphas()
        sizes = len(alphas), length, self.layers, self.n_expert, self.top_k
        return Routes(*random_routes(*sizes, alphas, generator=rng(*key)))

    @torch.no_grad()
    def score_text(self, tokens, routes, batch_size) -> Scored:
        """A window [T + 1] along R routes, the original first."""
        values, original = [], None
        for part in torch.arange(len(routes.forced)).split(batch_size):
            here = Routes(routes.experts[part], routes.forced[part])
            log_probs, tape = next_token_log_probs(self.model, tokens.expand(len(part), -1).to(self.device), here)
            values.append(log_probs.cpu().double().mean(1))
            if original is None:
                original = tokens[:-1], tape.experts[0].cpu(), tape.router_log_probs()[0].cpu()
        return Scored(torch.cat(values), *original)

    @torch.no_grad()
    def score_decision(self, tokens, layer: int) -> Decision:
        """The decision of `layer` at the last but one of tokens [T + 1]; see eval_routing.score_decision."""
        tokens, chosen = tokens.to(self.device), []
        cache = self.model(input_ids=tokens[None, :-2], use_cache=True).past_key_values
        cache.batch_repeat_interleave(self.n_expert)

        def force_each(router, args, output):
            logits, weights, experts = output  # [E, ...], a row an expert
            chosen.append(experts[0].tolist())  # of the own route: all rows are equal up to here
            every = torch.arange(len(experts), device=self.device)[:, None]
            return logits, weights, torch.cat([every, experts[:, 1:]], 1)

        last = tokens[-2].expand(self.n_expert, 1)
        with self.routers[layer].register_forward_hook(force_each):
            logits = self.model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]  # [E, V]
        return decision_of(logits.float().log_softmax(-1), chosen[0], int(tokens[-1]))

    def score_decisions(self, windows, count: int, seed: int) -> list[Decision]:
        decisions = []
        for i in tqdm(range(count), disable=None, leave=False, unit="decision", desc="forcing experts"):
            draw = rng(seed, "decisions", i)
            position = int(torch.randint(1, windows.shape[1] - 1, (), generator=draw))
            layer = int(torch.randint(self.layers, (), generator=draw))
            decisions.append(self.score_decision(windows[i % len(windows), : position + 2], layer))
        return decisions


def run(args) -> dict:
    model, tokenizer = load_model(args.model, args.seed, args.context)
    hub = HubModel(model.to(pick_device("auto")))
    windows, text = load_windows(args.dataset, "test", tokenizer, args.context, args.data_dir, args.samples)
    os.makedirs(args.out, exist_ok=True)
    scored = []
    for i, window in enumerate(tqdm(windows, disable=None, unit="sample", desc="ranking routes")):
        routes = hub.draw_routes(args.context, args.seed, "routes", i)
        scored.append(hub.score_text(window, routes, args.batch_size))
    names = {"run": args.model, "step": None, "dataset": text, "split": "test", "seed": args.seed}
    result = names | {"score": "perplexity"} | figures(scored, text=True)
    if decisions := hub.score_decisions(windows, args.decisions, args.seed):
        result["regret"] = regret_figures(decisions)
    write_results(result, scored, HubTokenizer(tokenizer), args.out)
    return result


def main(argv=None) -> int:
    def program():
        args = parse(argv)
        print(f"{describe(run(args))}\nrouting.json and the pictures are in {args.out}")

    return run_program("eval_hf", program)


if __name__ == "__main__":
    sys.exit(main())
