"""`rlhf-jax inspect` and `convert`, and names of the Hub."""

import dataclasses
import json
import re
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import ARCH, byte_tokenizer, toy_directory
from transformers import AutoTokenizer

from rlhf_jax.cli import main
from rlhf_jax.commands import inspection
from rlhf_jax.config import ConvertArgs, InspectArgs, MeshConfig, ModelConfig
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import hf
from rlhf_jax.models.hf import hub
from rlhf_jax.models.hf.layout import leaf_shapes, nested
from rlhf_jax.models.loading import load_model
from rlhf_jax.sharding import make_mesh

UNTIED = dataclasses.replace(ARCH, num_layers=3, num_kv_heads=1, tied_head=False, vocab_size=272)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tree_of(arch, score_head, seed=0):
    rng = np.random.default_rng(seed)
    shapes = leaf_shapes(arch, score_head=score_head)
    return nested({leaf: rng.standard_normal(shape).astype(np.float32) for leaf, shape in shapes.items()})


def write(path, arch=UNTIED, *, score_head=False, tokenizer=None, **options):
    params = tree_of(arch, score_head)
    hf.save_model(path, arch, params, eos_ids=[2], pad_id=0, score_head=score_head, **options)
    if tokenizer:
        tokenizer.save_pretrained(path)
    return path


def tensors_of(path):
    files = sorted(path.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def refused(capsys, *arguments):
    """The line with which a command is refused."""
    code, _, said = run(capsys, *arguments)
    assert code == 2 and said.count("\n") == 1, said
    return said


def lines_of(out):
    """Name -> text of the lines above the memory."""
    pairs = (re.split(r" {2,}", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    return {pair[0]: pair[-1] for pair in pairs}


# ---- inspect


def test_inspect_counts_what_the_files_hold(tmp_path, capsys):
    path = write(tmp_path / "m", tokenizer=byte_tokenizer(chat_template=CHATML))
    code, out, _ = run(capsys, "inspect", str(path), "--batch", "5", "--length", "7")
    count = sum(array.size for array in tensors_of(path).values())
    lines = lines_of(out)
    assert code == 0
    assert lines["parameters"] == f"{count:,}"
    assert lines["family"] == "llama, logits (language model)"
    assert lines["shape"] == "3 layers, width 16, 2 heads of 8 (1 key-value), MLP 32"
    assert lines["vocabulary"] == "272, head untied"
    assert lines["chat template"] == "yes"
    assert lines["begin"] == "none"
    assert "<|im_end|>" in lines["stop"]  # the template's closing token is one, too
    found = inspection.run_inspect(InspectArgs(str(path), batch=5, length=7))
    cache = 2 * 2 * 3 * 5 * 7 * 1 * 8  # keys and values, bfloat16, 3 layers, 5 rows of 7 tokens, 1 head of 8
    sft, separate, group, shared, plain, int8, nf4, rollout = found["memory"].values()
    ends = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 32), (16, 32), (32, 16)]  # q, k, v, out, gate, up, down
    kernels = 3 * sum(a * b for a, b in ends)
    assert plain == 4 * count + 3 * 16 * 16 * sum(a + b for a, b in ends)  # adapters of rank 16 are trained
    assert int8 == plain - 3 * kernels + 3 * 4 * sum(b for _, b in ends)  # a byte, and a float32 scale of each output
    blocks = 3 * (16 + 8 + 8 + 2 * 16 + 32 + 32 + 16)  # the last input axis of "out" is one of two heads
    assert nf4 == plain - 3.5 * kernels + 4 * blocks
    assert sft == (4 + 8 + 4) * count  # weights, two moments, gradient
    assert separate == 2 * 16 * count + 2 * 4 * count
    assert group == 16 * count + 2 * 4 * count
    assert shared == 16 * count + 4 * count
    assert rollout == 2 * count + cache
    assert f"{inspection.size(rollout)}  rollout: bfloat16 copy and KV cache of 5 x 7 tokens" in out


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30 * 7 / 2, "3.5 GiB")]
)
def test_sizes_in_words(num_bytes, text):
    assert inspection.size(num_bytes) == text


def test_inspect_the_stories_model(shared_data, capsys):
    path = shared_data / "models" / "stories260K-hf"
    code, out, _ = run(capsys, "inspect", str(path))
    lines = lines_of(out)
    assert code == 0
    assert sum(array.size for array in tensors_of(path).values()) == 260_032
    assert (lines["parameters"], lines["vocabulary"]) == ("260,032", "512, head tied")
    assert (lines["begin"], lines["stop"]) == ("1 '<s>'", "2 '</s>'")
    assert lines["chat template"].startswith("none")


def test_inspect_config_json_alone(tmp_path, capsys):
    """A model that is not here: everything but the tokenizer, and the same numbers as with weights."""
    for kind, score_head in (("logits", False), ("scores", True)):
        path = write(tmp_path / kind, score_head=score_head)
        whole = lines_of(run(capsys, "inspect", str(path))[1])
        alone = tmp_path / f"{kind}.json"
        shutil.copy(path / "config.json", alone)
        lines = lines_of(run(capsys, "inspect", str(alone))[1])
        assert lines["family"].startswith(f"llama, {kind}") and lines["family"].endswith("; no weights here")
        same = ("parameters", "shape", "vocabulary", "features")
        assert {name: lines[name] for name in same} == {name: whole[name] for name in same}
    raw = json.loads(alone.read_text())
    del raw["architectures"]  # some of the first checkpoints
    alone.write_text(json.dumps(raw))
    assert lines_of(run(capsys, "inspect", str(alone))[1])["family"].startswith("llama, logits")


def test_inspect_a_reward_model(capsys):
    path = toy_directory() / "reward"
    lines = lines_of(run(capsys, "inspect", "--model", str(path))[1])
    assert lines["family"] == "llama, scores (reward or value model)"
    biased = {"score.bias": np.zeros(1)} | tensors_of(path)  # stored where it is not 0
    assert lines["parameters"] == f"{sum(array.size for array in biased.values()):,}"


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_the_mesh_table_says_what_a_device_holds(tmp_path, capsys, monkeypatch, mesh):
    arch = dataclasses.replace(UNTIED, num_heads=4, num_kv_heads=2)
    path, config = write(tmp_path / "m", arch), MeshConfig(*mesh)
    monkeypatch.setattr(inspection, "size", lambda num_bytes: f"{num_bytes:.0f}")
    options = [f"--mesh.{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    _, out, _ = run(capsys, "inspect", str(path), *options)
    last, training = (line.split() for line in out.strip().splitlines()[-2:])
    params = hf.load_params(path, arch, score_head=False, mesh=make_mesh(config))
    held = {device: 0 for device in jax.devices()}
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert last[0] == "sum" and set(held.values()) == {int(last[1])}
    assert training == ["with", "Adam", "and", "gradient", str(4 * int(last[1]))]  # 16 bytes instead of 4
    changed = (
        run(capsys, "inspect", str(path), *options, "--mesh.rules", '["D=-"]')[1].strip().splitlines()[-2].split()
    )
    assert (int(changed[1]) > int(last[1])) == (config.fsdp > 1)


def test_a_mesh_that_does_not_divide_is_one_line(tmp_path, capsys):
    path = write(tmp_path / "m")
    said = refused(capsys, "inspect", str(path), "--mesh.tensor", "2")
    assert "does not divide by tensor = 2; choose another mesh" in said


def test_inspect_without_a_model_is_one_line(tmp_path, capsys):
    assert "no model is named" in refused(capsys, "inspect")
    assert "no directory" in refused(capsys, "inspect", str(tmp_path / "nowhere"))
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert f"has no config.json; give {tmp_path / 'run' / 'model'}" in refused(
        capsys, "inspect", str(tmp_path / "run")
    )


# ---- convert


@pytest.mark.parametrize("score_head", [False, True])
def test_convert_there_and_back(tmp_path, capsys, score_head):
    path, names = write(tmp_path / "m", score_head=score_head), ["half", "again", "full"]
    half, again, full = (tmp_path / name for name in names)
    assert run(capsys, "convert", str(path), "--output", str(half))[0] == 0
    assert run(capsys, "convert", str(half), "--output", str(full), "--dtype", "float32")[0] == 0
    assert run(capsys, "convert", str(full), "--output", str(again))[0] == 0
    before, stored = tensors_of(path), tensors_of(half)
    assert stored.keys() == before.keys()
    for name, array in before.items():
        head = name.startswith("score.")
        assert stored[name].dtype == (np.float32 if head else ml_dtypes.bfloat16)
        rounded = array if head else array.astype(ml_dtypes.bfloat16)
        assert stored[name].tobytes() == rounded.tobytes() == tensors_of(again)[name].tobytes()
        assert tensors_of(full)[name].tobytes() == rounded.astype(np.float32).tobytes()
    assert hf.read_config(full)[0] == hf.read_config(path)[0] == UNTIED
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert hf.has_score_head(half) == score_head


def test_convert_into_shards(tmp_path, capsys):
    path, target = write(tmp_path / "m"), tmp_path / "shards"
    code, out, _ = run(
        capsys, "convert", str(path), "--output", str(target), "--dtype", "float32", "--shard_gb", "1e-5"
    )
    assert code == 0 and str(target) in out
    index = json.loads((target / "model.safetensors.index.json").read_text())
    before, files = tensors_of(path), sorted(target.glob("*.safetensors"))
    assert len(files) > 3 and not (target / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in before.values())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    for file in files:
        held = load_file(file)
        assert sum(array.nbytes for array in held.values()) <= 10_000 or len(held) == 1
    params = hf.load_params(target, UNTIED, score_head=False)
    jax.tree.map(np.testing.assert_array_equal, params, tree_of(UNTIED, False))


def test_tokenizer_generation_config_and_template_come_along(tmp_path, capsys):
    path, target = write(tmp_path / "m", tokenizer=byte_tokenizer(chat_template=CHATML)), tmp_path / "new"
    generation = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [2, 3], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation))
    assert run(capsys, "convert", str(path), "--output", str(target))[0] == 0
    assert {file.stat().st_mode for file in path.iterdir()} == {file.stat().st_mode for file in target.iterdir()}
    old, new = (Tokenizer.load(str(folder)) for folder in (path, target))
    for name in ("eos_ids", "end_id", "pad_id", "bos_id", "vocab_size"):
        assert getattr(old, name) == getattr(new, name)
    messages = [{"role": "user", "content": "tea?"}]
    assert old.encode_prompt(messages) == new.encode_prompt(messages)
    assert new.hf.chat_template == CHATML
    found = json.loads((target / "generation_config.json").read_text())
    assert found == generation | {"eos_token_id": list(old.eos_ids)}
    assert AutoTokenizer.from_pretrained(target).decode(old.encode_prompt("tea?")) == "tea?"


def test_convert_refuses_to_overwrite(tmp_path, capsys):
    path, target = write(tmp_path / "m"), tmp_path / "new"
    target.mkdir()
    (target / "notes.txt").write_text("stay")
    arguments = ("convert", str(path), "--output", str(target))
    assert run(capsys, *arguments)[0] == 0  # a directory without a model is no harm
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    assert "holds a model; give --overwrite true to replace it" in refused(capsys, *arguments, "--dtype", "float32")
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert run(capsys, *arguments, "--dtype", "float32", "--overwrite", "true")[0] == 0
    assert (target / "notes.txt").read_text() == "stay"
    assert {array.dtype for array in tensors_of(target).values()} == {np.dtype(np.float32)}
    (tmp_path / "file").write_text("")
    assert "is a file; name a directory" in refused(capsys, "convert", str(path), "--output", str(tmp_path / "file"))
    assert "output is empty" in refused(capsys, "convert", str(path))
    assert "float16" in refused(capsys, *arguments, "--dtype", "float16")


def test_what_is_overwritten_leaves_nothing_of_the_old_model(tmp_path):
    path, old = write(tmp_path / "m"), write(tmp_path / "old", tokenizer=byte_tokenizer(chat_template=CHATML))
    (old / "adapter").mkdir()
    (old / "notes.txt").write_text("stay")
    for name in ("adapter_config.json", "adapter_model.safetensors", "model.safetensors-00001-of-00002.safetensors"):
        (old / name).write_text("{}")  # with the first transformers would read the model that it names
    inspection.run_convert(ConvertArgs(str(path), str(old), overwrite=True))
    assert {file.name for file in old.iterdir()} == {*(file.name for file in path.iterdir()), "notes.txt"}


def test_an_adapter_is_replaced_by_its_model_when_told_to_alone(tmp_path, capsys):
    path, old = write(tmp_path / "m"), tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_text("{}")
    assert "holds a model; give --overwrite true" in refused(capsys, "convert", str(path), "--output", str(old))
    assert [file.name for file in old.iterdir()] == ["adapter_config.json"]


def test_convert_in_place(tmp_path):
    """The source may be the target: it is read before it is replaced, and its adapter stays."""
    path = write(tmp_path / "m", tokenizer=byte_tokenizer())
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text("{}")
    params = tree_of(UNTIED, False)
    inspection.run_convert(ConvertArgs(str(path), str(path), overwrite=True))
    found = hf.load_params(path, UNTIED, score_head=False)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(ml_dtypes.bfloat16)), found, params)
    assert Tokenizer.load(str(path)).eos_ids == (2,)
    assert (path / "adapter" / "adapter_config.json").read_text() == "{}"


def test_what_a_run_wrote_converts_and_samples(tmp_path):
    """The model directory of a run: `toy_directory` is written by the same function as every stage's."""
    for name, head in (("policy", "vocabulary"), ("reward", "trained")):
        path = inspection.run_convert(ConvertArgs(str(toy_directory() / name), str(tmp_path / name)))
        mesh = make_mesh(MeshConfig())
        loaded = load_model(ModelConfig(path=str(path)), mesh, jax.random.key(0), head=head)
        before = load_model(ModelConfig(path=str(toy_directory() / name)), mesh, jax.random.key(0), head=head)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), before.params)
        if "score" in rounded:
            rounded["score"] = before.params["score"]
        jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)
        assert Tokenizer.load(str(path)).eos_ids == Tokenizer.load(str(toy_directory() / name)).eos_ids


def reward_of_length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo average", "grpo"])
def test_a_checkpoint_of_a_run_converts_and_the_newest_to_what_the_run_itself_would_write(
    tmp_path, capsys, monkeypatch, stage
):
    """From another directory; the run of SFT begins with a model of its own shape."""
    rows, toy = tmp_path / "rows.jsonl", toy_directory()
    monkeypatch.chdir(toy.parent)
    pair = {"chosen": "b c", "rejected": "c"} if stage == "reward" else {"response": "b c"}
    rows.write_text("".join(json.dumps({"prompt": f"a{i}", **pair}) + "\n" for i in range(60)))
    stage, _, average = stage.partition(" ")
    arguments = [
        stage, f"--data.path={rows}", "--data.batch_size=8", "--data.max_prompt_length=8", "--data.eval_fraction=0.5",
        "--run.keep_best=false",
        f"--run.output_dir={tmp_path / 'run'}", "--checkpoint.every=1", "--checkpoint.keep_finished=true",
        "--run.progress=false",
    ]  # fmt: skip
    shape = f"--model.arch={json.dumps(dataclasses.asdict(hf.read_config(toy / 'policy')[0]))}"
    arguments += [shape, f"--model.tokenizer={toy.name}/policy"] * (stage == "sft")
    arguments += [f"--model.path={toy.name}/policy"] * (stage != "sft")
    more = {
        "sft": ["--data.max_length=24", "--sft.steps=2", "--sft.num_samples=0"],
        "reward": ["--data.max_length=24", "--reward.steps=2", "--reward.head_init=normal", "--model.eos_ids=[1]"],
        "ppo": ["--ppo.iterations=2", "--ppo.minibatches=1"],
        "grpo": ["--grpo.iterations=2"],
    }
    for online in ("ppo", "grpo"):
        more[online] += ["--reward.functions=[test_inspection:reward_of_length]", "--sampling.max_new_tokens=4"]
    more[stage] += [f"--{stage}.ema_decay=0.7"] if average else []
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *more[stage]])
    assert ended.value.code == 0
    (tmp_path / "run" / "model").rename(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code, _, said = run(capsys, "convert", str(tmp_path / "run"), "--output", str(tmp_path / "new"))
    assert code == 0, said
    expected, found = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "new")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(tensor, found[name], rtol=1e-5 if name.startswith("score") else 0)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "new" / file).read_text()) == json.loads((tmp_path / "model" / file).read_text())
    if stage == "sft":  # a table over checkpoints
        run(capsys, "convert", str(tmp_path / "run"), "--step", "1", "--output", str(tmp_path / "first"))
        name, first = next(iter(tensors_of(tmp_path / "first").items()))
        assert not np.array_equal(first, found[name].astype(first.dtype))
    of_run = ("convert", str(tmp_path / "run"), "--output", str(tmp_path / "x"))
    assert "no checkpoint of step 3, but of 1, 2" in refused(capsys, *of_run, "--step", "3")
    assert "step 3 is asked for, but" in refused(capsys, "convert", str(tmp_path / "new"), *of_run[2:], "--step", "3")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for group, name in (("lora", "rank"), ("ppo", "trainable_layers")):
        changed = {**record, "config": {**record["config"], group: {name: 1}}}
        (tmp_path / "run" / "run.json").write_text(json.dumps(changed))
        assert "trains adapters or top layers alone" in refused(capsys, *of_run)
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert "has no intact checkpoint yet" in refused(capsys, *of_run)


# ---- the Hub


@pytest.fixture
def downloads(monkeypatch):
    """Calls of snapshot_download, which gives the toy's policy."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options["revision"], options["allow_patterns"]))
        return str(toy_directory() / "policy")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.downloaded.cache_clear()
    yield calls
    hub.downloaded.cache_clear()


def test_a_name_of_the_hub_works_wherever_a_directory_does(tmp_path, capsys, downloads):
    assert run(capsys, "inspect", "hf://owner/name")[0] == 0
    assert run(capsys, "inspect", "hf://owner/name@v1.2")[0] == 0
    assert run(capsys, "convert", "hf://owner/name", "--output", str(tmp_path / "m"))[0] == 0
    config = ModelConfig(path="hf://owner/name")
    loaded = load_model(config, make_mesh(MeshConfig()), jax.random.key(0))
    assert loaded.model.arch == ARCH
    asked = [call for call in downloads if call[1] != "policy"]  # what is not of the commit that was found
    assert [call[:2] for call in asked] == [("owner/name", None), ("owner/name", "v1.2")]  # asked once each
    assert len(downloads) == 4 and {"*.json", "*.jinja"} <= set(asked[0][2])
    assert not any("bin" in pattern for call in downloads for pattern in call[2])


def test_plain_paths_never_go_to_the_network(tmp_path, capsys, downloads):
    assert run(capsys, "inspect", str(toy_directory() / "policy"))[0] == 0
    assert "give a directory, or hf://owner/name for a model of the Hub" in refused(capsys, "inspect", "owner/name")
    assert "hf://" in refused(capsys, "convert", "owner/name", "--output", str(tmp_path / "m"))
    assert downloads == []


@pytest.mark.parametrize("name", ["hf://", "hf://name", "hf://a/b/c", "hf:///b", "hf://a/@main"])
def test_what_is_no_name_of_the_hub(capsys, downloads, name):
    assert "is no name of the Hub; write hf://owner/name or" in refused(capsys, "inspect", name)
    assert downloads == []


def test_offline_is_one_line(tmp_path, capsys, monkeypatch):
    """HF_HUB_OFFLINE is set for the tests: the real function finds nothing and says so."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.downloaded.cache_clear()
    said = refused(capsys, "inspect", "hf://nobody/nothing-at-all")
    assert said.startswith("rlhf-jax: error: hf://nobody/nothing-at-all cannot be downloaded (")
    assert "check the name and the network, or give a directory" in said
    assert "hf://nobody/nothing-at-all" in refused(
        capsys, "sample", "--model.path", "hf://nobody/nothing-at-all", "--prompts", "[a]"
    )
