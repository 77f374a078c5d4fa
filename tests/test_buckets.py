"""Models, rows and configs that lie in a bucket, read through tensorstore from a service of the tests' own."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from buckets import Bucket, served
from safetensors.numpy import load_file, save_file
from test_inspection import refused, run
from tiny import ARCH, toy_directory

from rlhf_jax.commands.plan.programs import find_arch
from rlhf_jax.config import MeshConfig, ModelConfig
from rlhf_jax.data.sources import read_rows
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import buckets, copies
from rlhf_jax.models.contents import digest_of
from rlhf_jax.models.hf.stored import stored_tensors
from rlhf_jax.models.loading import load_model
from rlhf_jax.sharding import make_mesh


@pytest.fixture
def bucket(monkeypatch):
    """A bucket with the toy's policy and reward model, and rows."""
    monkeypatch.setattr(buckets, "RETRIES", {"max_retries": 2, "initial_delay": "1ms", "max_delay": "1ms"})
    buckets.store.cache_clear()
    with served(Bucket(), monkeypatch) as service:
        service.put_tree(toy_directory(), "models")
        rows = b'{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n'
        service.put("rows/r.jsonl", rows)
        service.put("rows/r.jsonl.gz", gzip.compress(rows))
        yield service
    buckets.store.cache_clear()


def arrays_of(path, mesh, head="vocabulary"):
    loaded = load_model(ModelConfig(path=str(path)), mesh, jax.random.key(0), head=head)
    return loaded, jax.tree.map(np.asarray, loaded.params)


@pytest.mark.parametrize("name, head", [("policy", "vocabulary"), ("reward", "trained")])
def test_a_model_of_a_bucket_is_that_of_the_directory(bucket, name, head):
    grid = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, there = arrays_of(f"gs://bucket/models/{name}", grid, head)
    _, here = arrays_of(toy_directory() / name, grid, head)
    jax.tree.map(np.testing.assert_array_equal, there, here)


def test_contents_are_the_same_wherever_they_lie(bucket, monkeypatch):
    monkeypatch.setattr("rlhf_jax.models.contents.SMALL", 1 << 12)  # the weights are a large file then
    assert digest_of("gs://bucket/models/policy") == digest_of(str(toy_directory() / "policy")) != ""
    assert digest_of("gs://bucket/models/nothing") == digest_of("gs://nowhere/a") == ""


def test_chat_templates_by_name_are_part_of_a_model_in_a_bucket(bucket, tmp_path):
    """transformers writes them into a directory of their own."""
    tokenizer = Tokenizer.load(str(toy_directory() / "policy"))
    tokenizer.hf.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    local_model = Path(shutil.copytree(toy_directory() / "policy", tmp_path / "m"))
    tokenizer.save(str(local_model))
    copies.upload_model(local_model, "gs://bucket/named")
    load = lambda: Tokenizer.load("gs://bucket/named").hf.chat_template  # noqa: E731
    assert load() == tokenizer.hf.chat_template
    assert digest_of("gs://bucket/named") == digest_of(str(local_model))
    (local_model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0] }}")
    assert digest_of("gs://bucket/named") != digest_of(str(local_model))
    copies.upload_model(toy_directory() / "policy", "gs://bucket/named")  # of which nothing else is left
    assert not [name for name in bucket.objects if name.startswith("named/additional")] and not load()


def test_ranges_are_fetched_as_they_are_needed_and_given_back(bucket, tmp_path):
    """A device that holds the first half of a tensor's rows fetches that half."""
    big = {"w": np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024), "v": np.ones(3, np.float32)}
    save_file(big, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    bucket.put("big/model.safetensors", data)
    folder = copies.local("gs://bucket/big")
    stored = stored_tensors(folder)
    whole = stored["w"].lazy()
    bucket.sent, half = 0, whole[:512, ::2]
    stored["w"].bring(whole, half)
    np.testing.assert_array_equal(half, big["w"][:512, ::2])
    assert 1 << 21 <= bucket.sent < (1 << 21) + 3 * copies.BLOCK
    bucket.sent = 0
    stored["w"].bring(whole, whole[100:200])
    assert bucket.sent == 0
    np.testing.assert_array_equal(stored["v"].map(), big["v"])
    copies.release(folder)
    np.testing.assert_array_equal(stored["w"].map(), big["w"])
    bucket.put("big/model.safetensors", data)
    copies.release(folder)
    with pytest.raises(UserError, match=r"model.safetensors: it was replaced or deleted while it was read"):
        stored["w"].map()


def test_a_long_object_is_read_a_few_pieces_at_a_time(bucket, monkeypatch):
    monkeypatch.setattr(buckets, "PIECE", 10)
    monkeypatch.setattr(buckets, "AT_ONCE", 3)
    bucket.put("long", bytes(range(95)))
    read, asked = buckets.read_parts, []
    monkeypatch.setattr(buckets, "read_parts", lambda url, bounds: asked.append(bounds) or read(url, bounds))
    assert b"".join(buckets.stream("gs://bucket/long", 95)) == bytes(range(95)) and list(map(len, asked)) == [
        3,
        3,
        3,
        1,
    ]
    for url, size in (("gs://bucket/long", 96), ("gs://bucket/none", 1)):
        with pytest.raises(buckets.Gone):
            list(buckets.stream(url, size))


def test_a_copy_is_asked_for_again_and_sent_only_if_it_has_changed(bucket):
    assert len(read_rows("gs://bucket/rows/r.jsonl")) == 2
    bucket.sent = 0
    read_rows("gs://bucket/rows/r.jsonl")
    copies.local("gs://bucket/models/policy")
    again = bucket.sent
    copies.local("gs://bucket/models/policy")
    assert bucket.sent - again < 2000  # the listing
    bucket.put("rows/r.jsonl", b'{"prompt": "new"}\n')
    assert read_rows("gs://bucket/rows/r.jsonl")[0]["prompt"] == "new"
    del bucket.objects["rows/r.jsonl"]
    with pytest.raises(UserError, match="no such object"):
        read_rows("gs://bucket/rows/r.jsonl")


def test_rows_say_where_in_the_bucket_they_stand(bucket):
    rows = read_rows("gs://bucket/rows/r.jsonl.gz")
    assert [row["_where"] for row in rows] == [f"gs://bucket/rows/r.jsonl.gz:{i}" for i in (1, 2)]
    bucket.put("rows/bad.jsonl", b'{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(UserError, match=r"^gs://bucket/rows/bad.jsonl:2: not JSON"):
        read_rows("gs://bucket/rows/bad.jsonl")


def test_a_name_with_an_at_sign_is_that_of_an_object_where_there_is_one(bucket):
    bucket.put("rows/me@home.jsonl", b'{"prompt": "a"}\n')
    assert read_rows("gs://bucket/rows/me@home.jsonl")[0]["prompt"] == "a"
    assert digest_of("gs://bucket/rows/me@home.jsonl") != ""
    with pytest.raises(UserError, match="gs://bucket/rows/none: no such object"):
        read_rows("gs://bucket/rows/none@train")


def test_a_command_that_fails_leaves_no_copies(bucket, tmp_path):
    bucket.put("rows/bad.jsonl", b'{"prompt"\n')
    command = [sys.executable, "-m", "rlhf_jax", "data", "inspect", "gs://bucket/rows/bad.jsonl"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "gs://bucket/rows/bad.jsonl:1: not JSON" in done.stderr
    assert not list(tmp_path.glob("rlhf-jax-*"))


def test_every_command_that_reads_takes_a_bucket(bucket, tmp_path, capsys):
    assert "logits (language model)" in run(capsys, "inspect", "gs://bucket/models/policy")[1]
    bucket.put(
        "configs/sft.yaml", b"data: {path: gs://bucket/rows/r.jsonl}\nmodel: {path: gs://bucket/models/policy}\n"
    )
    code, said, _ = run(capsys, "data", "inspect", "--config", "gs://bucket/configs/sft.yaml", "--examples", "0")
    assert code == 0 and "2 rows" in said
    assert find_arch("gs://bucket/models/policy") == ARCH
    assert run(capsys, "convert", "gs://bucket/models/policy/", "--output", str(tmp_path / "m"))[0] == 0
    names = load_file(toy_directory() / "policy" / "model.safetensors").keys()
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == names


def test_an_adapter_in_a_bucket_stands_on_a_model_in_one(bucket, tmp_path):
    raw = {"peft_type": "LORA", "base_model_name_or_path": "gs://bucket/models/policy", "r": 1, "lora_alpha": 1}
    bucket.put("adapter/adapter_config.json", json.dumps(raw).encode())
    save_file({}, tmp_path / "adapter_model.safetensors")
    bucket.put("adapter/adapter_model.safetensors", (tmp_path / "adapter_model.safetensors").read_bytes())
    mesh = make_mesh(MeshConfig())
    jax.tree.map(
        np.testing.assert_array_equal,
        arrays_of("gs://bucket/adapter", mesh)[1],
        arrays_of(toy_directory() / "policy", mesh)[1],
    )


MISTAKES = {
    "gs:/bucket/x": "nothing of that kind is read or written here; write gs://BUCKET/NAME",
    "s3://bucket/x": "nothing of that kind is read or written here; write a path of this machine, or gs://",
    "gs://bucket": "names no object of a bucket; write gs://BUCKET/NAME",
    "gs://bucket/../x": "a part of its name is empty",
    "gs://bucket/none": "no such object, none below it, and maybe no such bucket",
    "gs://nowhere/none": "no such object, none below it, and maybe no such bucket",
    "gs://b/x": "no bucket has such a name",
    "gs://bucket/cut": "it is cut short; upload it again",
    "gs://bucket/odd": "model.safetensors is no complete safetensors file",
}


@pytest.mark.parametrize("path", MISTAKES)
def test_a_mistake_in_the_name_of_a_bucket_is_one_line(bucket, capsys, path):
    config = (toy_directory() / "policy" / "config.json").read_bytes()
    weights = (toy_directory() / "policy" / "model.safetensors").read_bytes()
    for name, data in (("cut", weights[:-1]), ("odd", b"\4" + bytes(7) + b"oops")):
        bucket.put(f"{name}/config.json", config)
        bucket.put(f"{name}/model.safetensors", data)
    assert MISTAKES[path] in refused(capsys, "inspect", path)


LINES = {
    "sft --run.output_dir gs://bucket": "gs://bucket names no object of a bucket; write gs://BUCKET/NAME",
    "sft --run.output_dir gs://": "gs:// names no object of a bucket; write gs://BUCKET/NAME",
    "sft --run.output_dir GS://bucket/run": "nothing of that kind is read or written here; write gs://BUCKET/NAME",
    "recipe instructgpt --output_dir gs://bucket/": "gs://bucket names no object of a bucket",
    "sft --run.output_dir hf://own/run": "to the Hub go models alone, by run.push_to_hub or `rlhf-jax convert --push`",
    "data inspect hf://own/name": "is no name of rows on the Hub; write hf://datasets/OWNER/NAME/FILE",
    "runs gs://nowhere/runs": "no such object, none below it, and maybe no such bucket; check both names",
    "resume gs://": "gs:// names no object of a bucket; write gs://BUCKET/NAME",
    "resume gs://bucket/": "gs://bucket/ names no object of a bucket; write gs://BUCKET/NAME",
    "runs gs://": "gs:// names no object of a bucket; write gs://BUCKET/NAME",
    "inspect gs://": "gs:// names no object of a bucket; write gs://BUCKET/NAME",
    "resume gs://nowhere/run/": "gs://nowhere/run: no such object, none below it, and maybe no such bucket",
    "resume gs://bucket/models": "gs://bucket/models holds no run (run.json is missing or broken)",
    "report gs://bucket/rows": "a run that has ended in a bucket has its report.html there",
    "watch gs://bucket/rows": "a run that has ended in a bucket has its report.html there",
}


@pytest.mark.parametrize("line", LINES)
def test_a_command_that_names_no_place_of_a_bucket_or_the_hub_is_one_line(bucket, capsys, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    assert LINES[line] in refused(capsys, *line.split())
    assert os.listdir(tmp_path) == [] and all(method == "GET" for method, *_ in bucket.asked)


def test_credentials_that_cannot_be_read_are_one_line(bucket, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    said = refused(capsys, "inspect", "gs://bucket/models/policy")
    assert f"GOOGLE_APPLICATION_CREDENTIALS is {tmp_path}/none.json, no file; name the file of a key" in said
    broken = buckets.why(ValueError("UNKNOWN: Unexpected content of the JSON credentials file: /x [source='a']"))
    assert broken == f"Unexpected content of the JSON credentials file: /x; {buckets.LOGIN}"


@pytest.mark.parametrize(
    "status, said",
    [
        (401, "no credentials, or none"),
        (403, "no credentials, or none"),
        (503, "the service cannot be asked"),
        (400, "the service cannot be asked"),
    ],
)
def test_what_the_service_refuses_is_one_line(bucket, capsys, status, said):
    bucket.faults.append(lambda method, name: status)
    assert said in refused(capsys, "inspect", "gs://bucket/models/policy")
    assert said in refused(capsys, "data", "inspect", "gs://bucket/rows/r.jsonl")
    assert said in refused(capsys, "sft", "--config", "gs://bucket/configs/sft.yaml")
    assert len(bucket.asked) < 12


def test_a_service_that_nobody_answers_is_one_line(bucket, capsys, monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:1")
    assert "the service cannot be asked" in refused(capsys, "inspect", "gs://bucket/models/policy")


def test_a_reply_that_is_lost_is_asked_for_again(bucket):
    lost = iter(["lost", 503])
    bucket.faults.append(lambda method, name: next(lost, None))
    assert len(read_rows("gs://bucket/rows/r.jsonl")) == 2


def test_a_model_in_a_bucket_is_the_old_one_or_the_new_one_or_none(bucket, capsys, tmp_path):
    convert = ["convert", str(toy_directory() / "policy"), "--dtype", "float32", "--output"]
    assert run(capsys, *convert, str(tmp_path / "m"))[0] == 0
    assert run(capsys, *convert, "gs://bucket/out/m/")[0] == 0
    there = {name.removeprefix("out/m/"): data for name, (data, _) in bucket.objects.items() if name[:4] == "out/"}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert "holds a model; give --overwrite true" in refused(capsys, *convert, "gs://bucket/out/m")
    for name in ("model-00001-of-00002.safetensors", "adapter/adapter_config.json"):
        bucket.put(f"out/m/{name}", b"of an older one")
    bucket.put("out/m/notes.json", b"mine")
    bucket.faults.append(lambda method, name: 403 if method == "POST" and name == "out/m/tokenizer.json" else None)
    said = refused(capsys, *convert, "gs://bucket/out/m", "--overwrite", "true")
    kept = Path(re.search(r"no credentials, or none .*; what was to be written is in (\S+)", said)[1])
    assert there == {path.name: path.read_bytes() for path in (kept / "model").iterdir()}
    shutil.rmtree(kept)
    assert "has no config.json" in refused(capsys, "inspect", "gs://bucket/out/m")
    bucket.faults.clear()
    lost = iter([None, "lost"])
    bucket.faults.append(lambda method, name: next(lost, None) if method == "POST" else None)
    assert run(capsys, *convert, "gs://bucket/out/m", "--overwrite", "true")[0] == 0
    assert {name for name in bucket.objects if name[:4] == "out/"} == {
        f"out/m/{name}" for name in [*there, "notes.json"]
    }
    assert "there is no such bucket" in refused(capsys, *convert, "gs://nowhere/m")


def test_a_page_is_not_written_in_a_bucket(bucket, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "report", "runs/x", "--output", "gs://bucket/out/x.html")
    assert "of what is written only runs, evaluations, recipes, rows and models" in said
    assert os.listdir(tmp_path) == [] and all(method == "GET" for method, *_ in bucket.asked)
