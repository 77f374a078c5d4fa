"""Methods learn: on random walks each beats the SFT policy that all of them start from, by the gold reward."""

import functools
import math
from dataclasses import replace as with_fields

import numpy as np
import pytest

from rlhf_jax import group, preference, sft
from rlhf_jax.commands import quickstart as q
from rlhf_jax.config import (
    DataConfig,
    DPOArgs,
    DPOConfig,
    GRPOArgs,
    ModelConfig,
    OptimConfig,
    QuickstartArgs,
    ReinforcePPArgs,
    RLOOArgs,
    RRHFArgs,
    RRHFConfig,
    RunConfig,
    SFTConfig,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.tasks import random_walks as walks

pytestmark = pytest.mark.slow
GRAPH = walks.make_graph(0)
METHODS = {"grpo": GRPOArgs, "rloo": RLOOArgs, "reinforce_pp": ReinforcePPArgs}


def gold(model):
    """Mean optimality of a policy's walks and its standard error."""
    scores = np.array(walks.optimality(GRAPH, *q.sample_walks(model, 20, 99)))
    return scores.mean(), scores.std() / math.sqrt(len(scores))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A policy after SFT on random walks, which all methods share, and its gold reward."""
    path = tmp_path_factory.mktemp("base")
    walks.make_tokenizer().save_pretrained(path / "tokenizer")
    stage = q.sft_stage(QuickstartArgs(output_dir=str(path), progress=False), path)
    demos = walks.demonstrations(GRAPH, 1100, 0)
    stage = with_fields(stage, sft=SFTConfig(steps=100, num_samples=0))
    sft.run(stage, rows=demos[:1000], eval_rows=demos[1000:])
    model = str(path / "sft" / "model")
    return model, gold(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_groups_walks_better_than_sft(base, tmp_path, method):
    """RLOO with rows that are cut in the middle and go on in the next iteration."""
    model, (before, error) = base
    run = METHODS[method](
        model=ModelConfig(path=model),
        data=DataConfig(batch_size=128, max_prompt_length=2),
        sampling=q.SAMPLING,
        optim=OptimConfig(learning_rate=1e-3, schedule="linear", eps=1e-5),
        run=RunConfig(str(tmp_path / method), progress=False, eval_every=0),
    )
    run = replace(run, **{f"{method}__iterations": 20}, sampling__budget=5 if method == "rloo" else 0)
    optimality = functools.partial(walks.optimality, GRAPH)
    group.run(run, rows=walks.start_prompts() * 32, eval_rows=walks.start_prompts(), reward_functions=[optimality])
    after, its_error = gold(str(tmp_path / method / "model"))
    print({"sft": (before, error), method: (after, its_error)})
    assert after > before + 5 * math.hypot(error, its_error)


def test_dpo_and_rrhf_walk_better_than_sft(base, tmp_path):
    """Training sees the gold reward through noisy comparisons of SFT's own walks alone."""
    model, (before, error) = base
    prompts, first = q.sample_walks(model, 60, 1)
    _, second = q.sample_walks(model, 60, 2)
    pairs = walks.comparisons(GRAPH, prompts, first, second, 0)
    ranked = [
        {"prompt": p, "responses": [a, b], "scores": walks.optimality(GRAPH, [p, p], [a, b])}
        for p, a, b in zip(prompts, first, second, strict=True)
        if a != b
    ]
    shared = {
        "model": ModelConfig(path=model), "data": q.DATA, "optim": OptimConfig(learning_rate=3e-4),
    }  # fmt: skip
    out = lambda name: {"run": RunConfig(str(tmp_path / name), progress=False, eval_every=0)}  # noqa: E731
    preference.run(DPOArgs(**shared, **out("dpo"), dpo=DPOConfig(epochs=2)), rows=pairs[64:], eval_rows=pairs[:64])
    preference.run(
        RRHFArgs(**shared, **out("rrhf"), rrhf=RRHFConfig(epochs=2)), rows=ranked[64:], eval_rows=ranked[:64]
    )
    found = {name: gold(str(tmp_path / name / "model")) for name in ("dpo", "rrhf")}
    print({"sft": (before, error), **found})
    for after, its_error in found.values():
        assert after > before + 2 * math.hypot(error, its_error)
