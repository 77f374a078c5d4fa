"""What a reward leads to, without PPO: gold of the policy that is best for it at a price of the KL, on random walks.

    python -m benchmarks.optimum --output_dir runs/ensembles --models 'reward_512_*'

The policy that maximises reward - price * KL to the SFT model p is p exp(reward / price), normalised for each start.
Walks are short, so it is computed: over all legal walks to the goal, and those that leave the graph at the first step,
at the second, or at each before the goal, as far as p is above a bound, that PPO finds them. `--models` are
directories below those of the seeds that benchmarks.ensembles made. Gold by price, means over the seeds: of single
members, of their mean, least score and lower bounds; and the KL.
"""

from __future__ import annotations

import argparse
import string
from functools import cache
from pathlib import Path

import jax
import numpy as np

from benchmarks.studies import shown
from rlhf_jax.config import MeshConfig, ModelConfig
from rlhf_jax.data.encoding import Limits
from rlhf_jax.inference.scoring import Likelihood, RewardModel, score_example
from rlhf_jax.models.loading import load_model, load_tokenizer
from rlhf_jax.runs.curves import text_table
from rlhf_jax.sharding import make_mesh
from rlhf_jax.tasks import random_walks as walks

LENGTH, ROWS = 12, 512
COEFS = (1.0, 2.0, 3.0, 4.0)


def candidates(graph: walks.Graph) -> list[tuple[str, str]]:
    """(start, rest) of the walks that are weighed."""
    nodes, most = range(len(graph.adjacency)), graph.max_length - 1

    @cache
    def legal(node: int, steps: int) -> list[tuple[int, ...]]:
        """Rests of walks from a node to the goal in at most so many steps."""
        if node == walks.GOAL:
            return [()]
        after = np.flatnonzero(graph.adjacency[node]).tolist() if steps else []
        return [(there, *rest) for there in after for rest in legal(there, steps - 1)]

    found = []
    for start in nodes[1:]:
        rests = dict.fromkeys(legal(start, most))
        rests |= dict.fromkeys((x, *rest) for x in nodes for rest in [*legal(x, 5), ()])
        rests |= dict.fromkeys((x, y, walks.GOAL) for x in nodes for y in nodes)
        legally = np.flatnonzero(graph.adjacency[start]).tolist()
        rests |= dict.fromkeys((y, x, *rest) for y in legally for x in nodes for rest in legal(x, 4))
        letters = string.ascii_lowercase
        found += [(letters[start], " ".join(letters[node] for node in rest)) for rest in rests if len(rest) <= most]
    return found


class Optimum:
    """The walks of a graph that an SFT model finds likelier than a bound, and what models say of them.

    Attributes:
        logprobs: of each walk, in nats.
        gold: of each walk.
    """

    def __init__(self, graph: walks.Graph, base: Path, bound: float):
        self.mesh = make_mesh(MeshConfig())
        settings, pairs = ModelConfig(path=str(base)), candidates(graph)
        tokenizer, limits = load_tokenizer(settings), Limits(2, LENGTH)
        examples = [score_example(row_of(pair), tokenizer, limits) for pair in pairs]
        with jax.set_mesh(self.mesh.grid):
            loaded = load_model(settings, self.mesh, jax.random.key(0), length=LENGTH)
            likelihood = Likelihood(loaded.model, self.mesh, batch_size=ROWS, multiple=LENGTH)
            logprobs = np.array([each.sum() for each in likelihood.targets(loaded.params, examples)])
        likely = np.flatnonzero(logprobs > bound)
        self.pairs, self.logprobs = [pairs[i] for i in likely], logprobs[likely]
        starts, texts = zip(*self.pairs, strict=True)
        self.starts, self.gold = np.array(starts), np.array(walks.optimality(graph, starts, texts))

    def scores(self, model: Path) -> np.ndarray:
        """[N, E] of the members of a reward model."""
        judge = RewardModel(ModelConfig(path=str(model)), self.mesh, Limits(2, LENGTH), batch_size=ROWS)
        said = judge.scores([judge.example(row_of(pair)) for pair in self.pairs], LENGTH)
        return said.reshape(len(said), -1)

    def best(self, reward: np.ndarray, price: float) -> tuple[float, float]:
        """(gold, KL) of the policy that is best for a reward [N] at a price of a nat, means over the starts."""
        golds, kls = list[float](), list[float]()
        for start in np.unique(self.starts):
            at = self.starts == start
            tilted = self.logprobs[at] + reward[at] / price
            log_sum = np.logaddexp.reduce(tilted)
            law = np.exp(tilted - log_sum)
            golds.append(float(law @ self.gold[at]))
            kls.append(float(law @ reward[at] / price - log_sum))
        return float(np.mean(golds)), float(np.mean(kls))


def row_of(pair: tuple[str, str]) -> dict[str, object]:
    """A walk that ends, as models score one."""
    return {"prompt": pair[0], "response": pair[1], "finished": True}


def rewards_of(members: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> [N] or, of each member by itself, [N, E]."""
    found = {"single": members}
    if members.shape[1] > 1:
        found |= {"mean": members.mean(axis=1), "min": members.min(axis=1)}
        found |= {f"lower_bound, {c:g} std": members.mean(axis=1) - c * members.std(axis=1) for c in COEFS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/ensembles")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--models", default="reward_512_*", help="directories of reward models, below those of seeds")
    parser.add_argument("--prices", type=float, nargs="+", default=[0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05])
    parser.add_argument("--bound", type=float, default=-10.0, help="nats, of the walks that are weighed")
    args = parser.parse_args()
    found: dict[str, list[np.ndarray]] = {}
    for seed in args.seeds:
        path = Path(args.output_dir) / f"seed_{seed}"
        optimum = Optimum(walks.make_graph(seed), path / "sft" / "model", args.bound)
        members = np.concatenate([optimum.scores(each / "model") for each in sorted(path.glob(args.models))], axis=1)
        for name, reward in rewards_of(members).items():
            each = np.atleast_2d(reward.T)
            of_prices = [np.mean([optimum.best(one, price) for one in each], axis=0) for price in args.prices]
            found.setdefault(name, []).append(np.array(of_prices))  # [prices, 2]
    rows = []
    for name, each in found.items():
        golds, kls = np.moveaxis(np.array(each), 2, 0)  # [seeds, prices]
        rows.append([name, *(shown(of_price) for of_price in golds.T), *(f"{kls[:, i].mean():.1f}" for i in (0, -1))])
    print(text_table(["reward", *(f"gold at {price:g}" for price in args.prices), "KL, first", "last"], rows))


if __name__ == "__main__":
    main()
