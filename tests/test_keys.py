"""No two uses of a run's key draw the same numbers."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ARCH, ONE, TOY_ROWS, toy_run

import rlhf_jax
from rlhf_jax.config import LoRAConfig, MeshConfig, ModelConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.keys import NUMBERS, branch
from rlhf_jax.models.hf.layout import flattened
from rlhf_jax.models.loading import load_model
from rlhf_jax.ppo import train
from rlhf_jax.sharding import make_mesh

RUN = jax.random.key(0)  # the run's seed is 0


def paths_of(depth=2, width=6):
    """Every key at most `depth` numbers below the branches of training and evaluation, as the loops fold them in."""
    keys = [branch(RUN, purpose) for purpose in ("training", "evaluation", "held-out loss")] + [RUN]
    for _ in range(depth):
        yield from keys
        keys = [key for parent in keys for key in jax.random.split(parent, width)]
    yield from keys


def test_split_is_fold_in():
    """Why a key is a path of integers; were it not so, the table of branches would still hold."""
    split, folded = jax.random.split(RUN, 3), [jax.random.fold_in(RUN, i) for i in range(3)]
    assert [jax.random.key_data(a).tolist() for a in split] == [jax.random.key_data(a).tolist() for a in folded]


def test_branches_are_told_apart():
    assert len(set(NUMBERS.values())) == len(NUMBERS)
    assert min(NUMBERS[name] for name in ("adapters", "critic's adapters")) >= 4  # Model.init splits into four


def fresh(*trees):
    """All leaves that are drawn at random."""
    return [leaf for tree in trees for name, leaf in flattened(tree).items() if name.endswith("/a")]


@pytest.mark.parametrize("stage", ["a model of its own", "ppo"])
def test_adapters_have_numbers_that_no_loop_draws(stage):
    lora, mesh = LoRAConfig(rank=2), make_mesh(MeshConfig(), devices=ONE)
    if stage == "ppo":
        _, loop = train.setup(replace(toy_run("unused"), lora=lora), **TOY_ROWS)
        leaves = fresh(loop.state.params["policy"], loop.state.params["value"])
    else:
        leaves = fresh(load_model(ModelConfig(arch=ARCH), mesh, branch(RUN, "weights"), lora=lora).params)
    assert len(leaves) >= 4
    draws = {}
    for leaf in leaves:
        bound = float(np.prod(leaf.shape[1:-1])) ** -0.5
        assert not any(np.array_equal(leaf, other) for other in leaves if other is not leaf)
        draw = jax.jit(jax.vmap(lambda key, s=leaf.shape, b=bound: jax.random.uniform(key, s, minval=-b, maxval=b)))
        draws = draw(jax.numpy.stack(list(paths_of())))
        assert not (np.asarray(draws) == np.asarray(leaf)).all(axis=tuple(range(1, draws.ndim))).any()


def test_random_layers_have_numbers_that_no_loop_draws():
    """The first kernel of layer i was drawn from the key of iteration i's rollout."""
    params = load_model(ModelConfig(arch=ARCH), make_mesh(MeshConfig(), devices=ONE), branch(RUN, "weights")).params
    kernel = np.asarray(params["layers"]["attn"]["qkv"][0])
    for key in paths_of():
        assert not np.array_equal(kernel, ARCH.init_std * jax.random.normal(key, kernel.shape))


def test_branches_have_their_numbers_in_one_place():
    """A literal number folded into a key is a branch that the table does not know."""
    root = Path(rlhf_jax.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") in ("fold_in", "key_at")
        and any(isinstance(argument, ast.Constant) for argument in node.args[1:])
    ]
    assert found == []
