"""`rlhf-jax certify`: where log-probs part, of which layers, and a method that trains what it samples to the bit."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tiny import ARCH, ONE, TOY_ROWS, model_params, toy_run, walks

from rlhf_jax import cli, config
from rlhf_jax.commands import certify
from rlhf_jax.commands.certify import compared, gap, lines, shallow
from rlhf_jax.config.functions import replace
from rlhf_jax.group import train as group_train
from rlhf_jax.models import Model
from rlhf_jax.models.hf.layout import flattened, leaf_shapes
from rlhf_jax.ppo import train
from rlhf_jax.sharding import make_mesh


def test_the_gap_names_the_first_token_that_differs_and_the_farthest():
    mask = np.arange(4) < np.array([[4], [2], [3]])
    a, b = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    assert gap(mask, a, b)["first"] is None and gap(mask, a, b)["equal"] == 1
    b[2, 1], b[0, 1], b[0, 3], b[1, 3] = 0.1, 0.2, 0.5, 9.0  # the last one is padding
    found = gap(mask, a, b)
    assert (found["first"], found["largest_at"]) == ([0, 1], [0, 3])
    np.testing.assert_allclose([found["equal"], found["mean"], found["largest"]], [6 / 9, 0.8 / 9, 0.5], rtol=1e-6)
    found |= {"hidden": "", "layer": 2, "update_ratio_max": 1.25, "update_approx_kl": 0.1}
    shown = "\n".join(lines({"tokens": 9, **found}))
    assert "row 0, token 3" in shown and "lowest 2 layer(s)" in shown and "up to 1.25" in shown


def test_the_lowest_layers_of_a_model_are_the_same_from_one_stack_and_from_two():
    sparse = {"num_experts": 4, "experts_per_token": 2, "dense_layers": 2, "dense_width": 8, "router": "sigmoid"}
    model = Model(dataclasses.replace(ARCH, num_layers=3, sliding_window=2, window_layers=(0, 2), **sparse))
    params = model_params(model, 0)
    ids = jnp.arange(8).reshape(1, 8)
    for layers in (1, 2, 3):
        hidden = []
        for tree in (params, model.split(params, 1), model.split(params, 2)):
            low, cut = shallow(model, tree, layers)
            assert low.arch.num_layers == layers and set(low.arch.window_layers) <= set(range(layers))
            hidden.append(jax.jit(low.apply)(cut, ids, ids, jnp.ones_like(ids)))
        np.testing.assert_array_equal(hidden[0], hidden[1])
        np.testing.assert_array_equal(hidden[0], hidden[2])


def test_the_lowest_layers_have_the_parts_of_their_shape_where_layers_share_keys_and_have_inputs():
    shared = {"shared_kv_layers": 2, "shared_kv_ffn_width": 8, "layer_input_width": 4}
    model = Model(dataclasses.replace(ARCH, num_layers=3, **shared))
    params = model_params(model, 0)
    for tree in (params, model.split(params, 1)):
        for layers in (1, 2, 3):
            low, cut = shallow(model, tree, layers)
            found = {name: leaf.shape for name, leaf in flattened(low.merged(cut)).items()}
            assert found == leaf_shapes(low.arch, score_head=False)


@pytest.mark.parametrize(("changes", "hidden"), [({"top_p": 0.6}, "top_p"), ({"min_new_tokens": 3}, "min_new_tokens")])
def test_a_law_of_a_part_of_the_vocabulary_is_named_and_no_layer_is_blamed_for_it(monkeypatch, changes, hidden):
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=ONE))
    asked = {"ppo__old_logprobs": "recompute", **{f"sampling__{name}": value for name, value in changes.items()}}
    found = compared(*train.setup(replace(toy_run(), **asked), **TOY_ROWS), 0, layers=True)
    shown = "\n".join(lines(found))
    assert found["largest"] > 0.01 and "layer" not in found and "layer" not in shown
    assert f"law: sampling.{hidden} draws from a part of the vocabulary" in shown
    assert found["update_ratio_max"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_in_bfloat16_what_is_sampled_is_what_is_trained(tmp_path, capsys):
    """Nearly all to the bit on this mesh, with top-k as without: products round where the code says, once each."""
    rows, file = tmp_path / "rows.jsonl", tmp_path / "ppo.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in walks.start_prompts() * 2))
    changes = {"data__path": str(rows), "data__eval_path": str(rows), "sampling__top_k": 5}
    run = replace(toy_run(), model__compute_dtype="bfloat16", **changes)
    file.write_text(yaml.safe_dump(config.to_dict(run)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["certify", str(file), "--json", "true", "--layers", "false"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == 0
    assert found["tokens"] > 50 and found["equal"] > 0.9 and found["largest"] < 0.02
    assert abs(found["update_ratio_max"] - 1) < 0.02


def test_rows_that_are_cut_are_certified_too(monkeypatch):
    """With `mask_truncated` an untrained model, which ends no row, had a ratio "up to -inf"."""
    taken = []

    class Taken(Exception):
        """Instead of the models."""

    def setup(args):
        taken.append(args)
        raise Taken

    monkeypatch.setattr(group_train, "setup", setup)
    args = cli.parse("grpo", ["--grpo.mask_truncated", "true", "--reward.functions", "[tests.tiny:none]"])
    with pytest.raises(Taken):
        certify.run(config.CertifyArgs(), args)
    assert not taken[0].grpo.mask_truncated and taken[0].grpo.old_logprobs == "recompute"
