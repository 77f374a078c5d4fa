"""Random walks to a goal: a task whose best policy is known exactly (the benchmark of CarperAI/trlx, written afresh).

A random directed graph of 21 nodes, written as the letters a..u; a is the goal. The prompt is a start node ("f"), the
response the rest of a walk of at most 10 nodes ("q a"), and the end-of-sequence token, which the data code appends,
says that the walk ends. A walk is the better the closer its length is to the shortest one.
"""

from __future__ import annotations

import functools
import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.tasks import label_pairs, write_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GOAL = 0
NUM_NODES = 21
MAX_TRIES = 20_000


@dataclass(frozen=True, eq=False)
class Graph:
    """A directed graph on which every node can walk to the goal, node 0.

    Attributes:
        adjacency: bool[n, n], True at [i, j] if a walk may step from i to j; the diagonal is False.
        max_length: nodes of the longest walk, the start included.
        shortest: int[n], nodes on the shortest walk from each node to the goal, both included; 1 at the goal.
    """

    adjacency: np.ndarray
    max_length: int
    shortest: np.ndarray


def make_graph(
    seed: int, num_nodes: int = NUM_NODES, max_length: int = 10, edge_probability: float = 0.1, slack: int = 3
) -> Graph:
    """A random graph, drawn anew until every node has an outgoing edge and a way to the goal.

    Args:
        seed: of the edges.
        num_nodes: n, from 2 to 26.
        max_length: nodes of the longest walk; the goal is within reach of every node.
        edge_probability: of each of the n (n - 1) edges, independently.
        slack: nodes that the longest walk has to spare from every start. Without any, a start whose shortest walk is
            nearly the longest allowed has no graded reward, and random walks from it show no success to learn from.

    Raises:
        UserError: no letters for so many nodes, or no such graph among many draws.
    """
    if not 2 <= num_nodes <= len(string.ascii_lowercase):
        raise UserError(f"num_nodes {num_nodes} does not fit the letters a..z; set it between 2 and 26")
    rng = np.random.default_rng(seed)
    for _ in range(MAX_TRIES):
        adjacency = rng.random((num_nodes, num_nodes)) < edge_probability
        np.fill_diagonal(adjacency, False)
        if not adjacency.any(axis=1).all():
            continue
        shortest = _shortest(adjacency)
        if shortest.min() > 0 and shortest.max() <= max_length - slack:
            adjacency.setflags(write=False)
            shortest.setflags(write=False)
            return Graph(adjacency, max_length, shortest)
    raise UserError(
        f"none of {MAX_TRIES} graphs with edge_probability {edge_probability} leads from all {num_nodes} nodes to the "
        f"goal within {max_length - slack} nodes; raise edge_probability or max_length, or lower slack"
    )


def _shortest(adjacency: np.ndarray) -> np.ndarray:
    """Nodes on the shortest walk from each node to the goal, int[n], 0 where there is none; breadth first."""
    shortest = np.zeros(len(adjacency), dtype=int)
    shortest[GOAL] = nodes = 1
    while True:
        frontier = (shortest == 0) & adjacency[:, shortest == nodes].any(axis=1)
        if not frontier.any():
            return shortest
        nodes += 1
        shortest[frontier] = nodes


def demonstrations(graph: Graph, num: int, seed: int) -> list[dict[str, str]]:
    """`num` random walks, good and bad ones, as rows {"prompt", "response"}.

    From a uniformly drawn start, each steps along uniformly drawn edges to the goal, or to `max_length` nodes.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for start in rng.integers(GOAL + 1, len(graph.adjacency), size=num):
        walk = [int(start)]
        while walk[-1] != GOAL and len(walk) < graph.max_length:
            walk.append(int(rng.choice(np.flatnonzero(graph.adjacency[walk[-1]]))))
        letters = [string.ascii_lowercase[node] for node in walk]
        rows.append({"prompt": letters[0], "response": " ".join(letters[1:])})
    return rows


def start_prompts(num_nodes: int = NUM_NODES) -> list[dict[str, str]]:
    """Every start node but the goal, as rows {"prompt"}."""
    return [{"prompt": letter} for letter in string.ascii_lowercase[GOAL + 1 : num_nodes]]


def optimality(graph: Graph, prompts: Sequence[str], responses: Sequence[str], **columns: object) -> list[float]:
    """The gold reward, (max_length - n) / (max_length - shortest[start]) for a legal walk of n nodes to the goal.

    It is 1 for a shortest walk and 0 for whatever is no legal walk that ends at the goal: missing edges, other text,
    more than max_length nodes, nodes after the goal. A start whose shortest walk is as long as the longest allowed
    one earns 1 for reaching the goal. Prompts are start nodes, one letter each, responses letters separated by white
    space, without special tokens. `functools.partial(optimality, graph)` is a reward function.
    """
    return [_optimality(graph, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _optimality(graph: Graph, prompt: str, response: str) -> float:
    """`optimality` of one walk."""
    letters = string.ascii_lowercase[: len(graph.adjacency)]
    words = [prompt.strip(), *response.split()]
    if len(words) > graph.max_length or any(len(word) != 1 or word not in letters for word in words):
        return 0.0
    walk = [letters.index(word) for word in words]
    legal = all(graph.adjacency[here, there] for here, there in itertools.pairwise(walk))
    if not legal or GOAL in walk[:-1] or walk[-1] != GOAL or len(walk) == 1:
        return 0.0
    room = graph.max_length - int(graph.shortest[walk[0]])
    return (graph.max_length - len(walk)) / room if room else 1.0


@functools.cache
def graph_0() -> Graph:
    """The graph of seed 0, which functions that a config names walk on."""
    return make_graph(0)


def gold(prompts: Sequence[str], responses: Sequence[str], **columns: object) -> list[float]:
    """`optimality` on `graph_0`: a reward function by name, as reward.gold or reward.functions take one."""
    return optimality(graph_0(), prompts, responses)


def preference(graph: Graph, prompt: str, a: str, b: str) -> float:
    """The chance that a judge prefers `a`, sigmoid((gold(a) - gold(b)) / 0.2 + 0.5): a liking for the first place."""
    first, second = optimality(graph, [prompt, prompt], [a, b])
    return 1 / (1 + math.exp(-((first - second) / 0.2 + 0.5)))


def judge(prompt: str, a: str, b: str) -> float:
    """`preference` on `graph_0`: a judge by name, as judge.function takes one."""
    return preference(graph_0(), prompt, a, b)


def write(directory: Path, num: int, seed: int) -> None:
    """What a chain on `graph_0` starts from; `rlhf-jax data make` calls it.

    tokenizer/; demonstrations.jsonl, `num` random walks; held_out.jsonl, a tenth as many others; prompts.jsonl, `num`
    start nodes in turn; eval_prompts.jsonl, each twelve times.
    """
    make_tokenizer().save_pretrained(directory / "tokenizer")
    walks, starts = demonstrations(graph_0(), num + -(-num // 10), seed), start_prompts()
    write_rows(directory / "demonstrations.jsonl", walks[:num])
    write_rows(directory / "held_out.jsonl", walks[num:])
    write_rows(directory / "prompts.jsonl", (starts * -(-num // len(starts)))[:num])
    write_rows(directory / "eval_prompts.jsonl", starts * 12)


def comparisons(
    graph: Graph,
    prompts: Sequence[str],
    responses_a: Sequence[str],
    responses_b: Sequence[str],
    seed: int,
    noise: float = 0.1,
) -> list[dict[str, str]]:
    """Rows {"prompt", "chosen", "rejected"}, labelled by `optimality` with errors; see `label_pairs`."""
    scores_a, scores_b = optimality(graph, prompts, responses_a), optimality(graph, prompts, responses_b)
    return label_pairs(prompts, responses_a, responses_b, scores_a, scores_b, seed, noise)


def make_tokenizer(num_nodes: int = NUM_NODES) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per node: <pad> 0, <eos> 1, <unk> 2, then the letters; it adds no special tokens.

    Texts split at white space only, and decoded tokens are joined by single spaces. `save_pretrained` writes it,
    `AutoTokenizer.from_pretrained` reads it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *string.ascii_lowercase[:num_nodes]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
