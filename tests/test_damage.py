"""Damaged or hostile model directories: whatever a file holds, one clear line about it, or it is read."""

import json
import os
import random
import shlex
import shutil
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_families import golden, write
from tiny import byte_tokenizer

from rlhf_jax.cli import main
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.models.hf import weights as hf_weights

JSON = ("config.json", "generation_config.json", "model.safetensors.index.json", "adapter_config.json")
ODD = (
    None, True, -1, 0, 1.5, 10**30, 2**31, "", "x", "../../x", "/etc/passwd", "\x00", "é" * 9, [], [[]], {}, {"a": 1},
    [None], ["x", 1], 1e308, -0.0, "a" * 5000, [0] * 3000,
)  # fmt: skip
RAW = (
    "", "[", "{", "null", "3", '"x"', "[1]", '{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}', "[" * 5000,
    '{"a":' * 3000, '{"vocab_size": ' + "9" * 5000 + "}", "\ufeff{}", '{"vocab_size": ' + "9" * 4000 + "}", "{}",
)  # fmt: skip


def make(path, kind="llama"):
    """A directory with every file that is read: sharded weights, generation settings, a tokenizer; or an adapter."""
    name = {"llama": "llama/rope_yarn_factors", "phi3": "phi3/longrope_long", "gemma3": "gemma3_text/layers_old",
            "gpt2": "gpt2/old", "neox": "gpt_neox/parallel_old", "qwen2": "qwen2/window_old"}[kind]  # fmt: skip
    write(path, golden(name))
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, shards = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, path / file)
        shards |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "temperature": 0.7}))
    return path


def adapter(path, base, **more):
    path.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, **more}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    site, rng = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    rows, columns = hf.read_config(base)[0].num_heads * 8, hf.read_config(base)[0].width
    shapes = {"lora_A": (2, columns), "lora_B": (rows, 2)}
    weights = {f"{site}.{k}.weight": rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    save_file(weights, path / "adapter_model.safetensors")
    return path


def read(path):
    """Everything that reads a model directory; UserErrors pass as lines, all else is a failure."""
    try:
        arch, raw = hf.read_config(path)
        hf.find_family(arch, raw)
        hf.read_generation(path)
        hf.load_params(path, arch, score_head=hf.has_score_head(path))
        return ""
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1100
        return str(error)


def walk(tree, path=()):
    """Every place in a JSON value."""
    yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from walk(tree[key], (*path, key))


def changed(rng, tree):
    """A value with one place replaced, taken out, or given a new neighbour."""
    tree = json.loads(json.dumps(tree))
    path = rng.choice([p for p in walk(tree) if p])
    node = tree
    for key in path[:-1]:
        node = node[key]
    what = rng.random()
    if what < 0.15:
        del node[path[-1]]
    elif what < 0.3 and isinstance(node, dict):
        node[rng.choice(["rope_scaling", "layer_types", "quantization_config", "sliding_window", "architectures"])] = (
            rng.choice(ODD)
        )
    else:
        node[path[-1]] = rng.choice(ODD)
    return tree


def damage(rng, path):
    """Change one file of a directory in one of many ways; returns what was done."""
    file = rng.choice([p for p in sorted(path.iterdir()) if p.is_file()])
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        text = rng.choice(RAW) if rng.random() < 0.25 else json.dumps(changed(rng, json.loads(data)))
        file.write_text(text)
        return f"{file.name}: {text[:300]}"
    kind = rng.choice(["cut", "byte", "header", "length", "gone", "directory", "latin"])
    if kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "byte":
        at = rng.randrange(min(len(data), 400))
        file.write_bytes(data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :])
    elif kind == "header" and file.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(changed(rng, json.loads(data[8 : 8 + length]))).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    elif kind == "length":
        file.write_bytes(struct.pack("<Q", rng.choice([0, 1, 2**20, 2**62, 2**64 - 1])) + data[8:])
    elif kind == "latin":
        file.write_bytes("é".encode("latin-1") + data)
    else:
        file.unlink()
        if kind == "directory":
            file.mkdir()
    return f"{file.name}: {kind}"


def fuzz(folder, seeds, kinds=("llama", "phi3", "gemma3", "gpt2", "neox", "qwen2")):
    """(inputs, refused ones) of so many damaged directories; stops at the first that is answered by a traceback."""
    refused = 0
    for kind in kinds:
        make(folder / kind, kind)
    adapter(folder / "adapter", folder / "llama")
    sources = [folder / kind for kind in (*kinds, "adapter")]
    for seed in seeds:
        rng = random.Random(seed)
        path = folder / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(rng.choice(sources), path)
        done = damage(rng, path)
        try:
            refused += bool(read(path))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {done}") from error
    return len(seeds), refused


def test_damaged_directories_are_refused_in_one_line_or_read(tmp_path):
    inputs, refused = fuzz(tmp_path, range(60))
    assert refused > inputs / 3


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("text", [*RAW[:-3], "é".encode("latin-1")], ids=lambda text: repr(text[:12]))
def test_every_file_that_is_no_json_is_named(tmp_path, name, text):
    path = make(tmp_path / "m")
    if name == "adapter_config.json":
        path = adapter(tmp_path / "a", path)
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(path / name) in read(path)


@pytest.mark.parametrize(
    "name", ["../m2/model.safetensors", "/etc/passwd", ".", "..", "", "a/b", 3, None, ["x"], "x" * 300]
)
def test_an_index_names_files_beside_it_alone(tmp_path, name):
    path = make(tmp_path / "m")
    make(tmp_path / "m2")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    said = read(path)
    assert str(path) in said and ("index.json" in said or "is missing" in said)


@pytest.mark.parametrize("first", ["os.system('touch ran')#", "LlamaForCausalLM; 1 / 0", 3])
def test_the_command_that_a_line_offers_has_nothing_of_the_directory(tmp_path, first):
    path = write(tmp_path / "it's", golden("llama/smollm"), architectures=[first, "LlamaForCausalLM"])
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    command = shlex.split(read(path).partition("run ")[2])
    assert command[:2] == ["python", "-c"] and f"t.LlamaForCausalLM.from_pretrained({str(path)!r})" in command[2]


def chain(folder, count, end):
    """Adapters that stand on one another, the last of them on `end`."""
    names = [folder / f"a{i}" for i in range(count)]
    for name, below in zip(names, [*names[1:], end], strict=True):
        name.mkdir()
        (name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(below)}))
    return names[0]


@pytest.mark.parametrize("kind", ["itself", "dots", "link", "two", "long", "link that is a loop", "no text"])
def test_adapters_that_stand_on_themselves_end_at_once(tmp_path, capsys, kind):
    if kind in ("two", "long"):
        first = chain(tmp_path, 2 if kind == "two" else 60, tmp_path / "a0" if kind == "two" else make(tmp_path / "m"))
    else:
        first = tmp_path / "a"
        (tmp_path / "b").symlink_to(first)
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        bases = {"itself": first, "dots": first / ".." / "a", "link": tmp_path / "b", "no text": [str(first)]}
        base = bases.get(kind, tmp_path / "loop")
        first.mkdir()
        written = base if isinstance(base, list) else str(base)
        (first / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": written}))
    started = time.monotonic()
    for command in (["inspect", str(first)], ["convert", str(first), "--output", str(tmp_path / "new")]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and "adapter_config.json" in said, said
    assert "itself" in said or "stands on" in said or "is no str" in said or "which is no str" in said
    assert time.monotonic() - started < 5


def test_an_adapter_on_an_adapter_is_added_to_it(tmp_path):
    base = make(tmp_path / "m")
    one = adapter(tmp_path / "one", base)
    two = adapter(tmp_path / "two", one)
    arch, _ = hf.read_config(two)
    kernels = [hf.load_params(p, arch, score_head=False)["layers"]["attn"]["qkv"] for p in (base, one, two)]
    np.testing.assert_allclose(kernels[2] - kernels[1], kernels[1] - kernels[0], atol=1e-5)
    assert np.abs(kernels[1] - kernels[0]).max() > 0.01


@pytest.mark.parametrize("key", ["alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"])
@pytest.mark.parametrize("pattern", ["(", "(.*)" * 8 + r"\1\2[A-Z]"])
def test_a_regular_expression_of_an_adapter_that_is_none_or_finds_no_end(tmp_path, key, pattern):
    changes = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    changes[key] = {pattern: 3} if key == "alpha_pattern" else pattern
    said = read(adapter(tmp_path / "a", make(tmp_path / "m"), **changes))
    assert f"{key} makes the regular expression" in said and "adapter_config.json" in said


def test_weights_that_no_trained_model_has_are_said(tmp_path, capsys):
    arch, _ = hf.read_config(write(tmp_path / "m", golden("gemma/score")))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    layer = "model.layers.{}.mlp.down_proj.weight"
    tensors[layer.format(0)][0, 0], tensors[layer.format(1)][3, 2] = np.nan, -np.inf
    tensors["model.norm.weight"][:] = 0  # Gemma multiplies by 1 + it
    tensors["score.weight"][:] = 0
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        hf.load_params(tmp_path / "m", arch, score_head=True, dtype=dtype)
        said = capsys.readouterr().err.splitlines()[:2]  # then of bfloat16 how many are rounded
        names = ", ".join(map(layer.format, (0, 1)))
        expected = [f"weights of 2 tensors are not finite: {names}", "weights of 1 tensors are all zero: score.weight"]
        assert said == [f"{tmp_path / 'm'}: {line}" for line in expected]
    hf.load_params(write(tmp_path / "sound", golden("gemma/score")), arch, score_head=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": "x"}', '{"eos_token_id": [2, null]}', '{"eos_token_id": {}}', "[" * 5000]
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_stop_ids_of_any_type(tmp_path, name, text):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("failing", ["write", "rename", "fsync"])
def test_a_disk_that_fails_in_convert_loses_nothing(tmp_path, capsys, monkeypatch, failing):
    """Nothing half written remains, and what was there is as it was."""
    import safetensors.numpy

    source, target = make(tmp_path / "m"), tmp_path / "new"
    main_ = lambda *more: main(["convert", str(source), "--output", str(target), *more])  # noqa: E731
    with pytest.raises(SystemExit) as ended:
        main_()
    assert ended.value.code == 0
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def refuse_weights(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(hf_weights, "save_file", refuse_weights)
        else:
            patch.setattr(os, failing, refuse)
        with pytest.raises(SystemExit) as ended:
            main_("--overwrite", "true")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "No space left on device" in said and "Traceback" not in said
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "new"]
