"""Rows from the Hugging Face Hub and models to it, through huggingface_hub, with a Hub of the tests' own."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import FAST
from hub import SHA, TOKEN, Hub, served
from tiny import toy_directory

from rlhf_jax.data import hub_rows
from rlhf_jax.errors import UserError
from rlhf_jax.runs.push import model_card

ROWS = "".join(json.dumps({"prompt": f"p{i}", "response": "r"}) + "\n" for i in range(3)).encode()
SHORT = "--data.batch_size 2 --data.max_length 32 --data.max_prompt_length 16"
PROGRAM = """
import sys
from rlhf_jax.cli import code_of
for line in sys.stdin.read().splitlines():
    print("code", code_of(line.split()), flush=True)
"""


def at_the_hub(hub, lines, home, token=TOKEN):
    """What each command line printed, which ends with its exit code; one process for all."""
    with served(hub) as address:
        settings = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        settings["XLA_FLAGS"] = FAST  # one device, over which any batch divides
        env = {**os.environ, **settings, **({"HF_TOKEN": token} if token else {})}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], input="\n".join(lines), env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout.split("code ")


def test_rows_and_models_of_a_hub(tmp_path):
    hub, data = Hub(), "hf://datasets/own/data"
    hub.files["datasets", "own/data", "data/train-00000-of-00002.jsonl"] = ROWS
    hub.files["datasets", "own/data", "data/train-00001-of-00002.jsonl"] = ROWS
    hub.files["datasets", "own/data", "data/test.jsonl"] = ROWS
    inspect = "data inspect --examples 0 --path"
    beside = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json"]
    beside += ["adapter/adapter_config.json", "tokenizer.model", "notes.json", "runs/model.safetensors"]
    hub.files |= {("models", "owner/old", name): b"{}" for name in beside}
    policy = {path.name: path.read_bytes() for path in (toy_directory() / "policy").iterdir()}
    twice = ["consolidated.safetensors", "original/model-00001-of-00001.safetensors", "checkpoint-5/model.safetensors"]
    policy |= {name: policy["model.safetensors"] for name in twice}
    hub.files |= {("models", "own/policy", name): data for name, data in policy.items()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("nobody's business")
    run = tmp_path / "run"
    shown = {"stage": "sft", "eval/total": 1.25, "remarks": ["a remark"]}
    (run / "model").mkdir(parents=True)
    for path in (toy_directory() / "policy").iterdir():
        (run / "model" / path.name).write_bytes(path.read_bytes())
    config = {
        "model": {"path": "hf://own/base@v2"},
        "data": {"path": f"{data}@train"},
        "run": {"output_dir": str(run)},
    }
    (run / "run.json").write_text(json.dumps({"stage": "sft", "config": config, "status": "finished", "step": 7}))
    (run / "summary.json").write_text(json.dumps(shown))
    train = f"sft --model.path {toy_directory()}/policy --data.path {data}/data/test.jsonl --data.batch_size 2"
    pushed = f"--sft.steps 1 --sft.num_samples 0 --run.push_to_hub owner/trained --run.output_dir {tmp_path}/sft"
    lines = [
        f"{inspect} {data}", f"{inspect} {data}@test", f"{inspect} {data}@v1/data/test.jsonl", f"{inspect} {data}@dev",
        f"{inspect} {data}@v3/data/test.jsonl", f"{inspect} hf://datasets/own/other",
        f"convert {run}/model --push owner/new", f"convert {run}/model --output {tmp_path}/x --push odd",
        f"{train} {pushed} --run.progress false --run.report false",
        f"convert {run}/model --output {tmp_path}/mine --push owner/old", "inspect hf://own/policy",
    ]  # fmt: skip
    *said, _ = at_the_hub(hub, lines, tmp_path / "home")
    said = [text.partition("\n")[2] if i else text for i, text in enumerate(said)]
    assert "6 rows" in said[0] and "3 rows" in said[1] and "3 rows" in said[2]
    assert "no file has the split dev in its name; name one of data/train-00000-of-00002.jsonl" in said[3]
    assert "cannot be downloaded (RevisionNotFoundError" in said[4] and "(RepositoryNotFoundError" in said[5]
    assert f"to {'http'}" in said[6] and "push odd is no name of the Hub; write OWNER/NAME" in said[7]
    assert hub.made["owner/new"]["visibility"] == "private" and not (tmp_path / "x").exists()
    names = {name for kind, repository, name in hub.files if repository == "owner/new"}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    card = hub.files["models", "owner/new", "README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "own/base" and header["datasets"] == ["own/data"] and "sft" in header["tags"]
    assert "| eval/total | 1.25 |" in card and str(tmp_path) not in card
    weights = hub.files.get(("models", "owner/trained", "model.safetensors"))
    assert weights == (tmp_path / "sft" / "model" / "model.safetensors").read_bytes(), said[8]
    card = hub.files["models", "owner/trained", "README.md"].decode()
    summary = json.loads((tmp_path / "sft" / "summary.json").read_text())
    assert summary["pushed"].endswith("/owner/trained") and f"| eval/nll | {summary['eval/nll']:.6g} |" in card
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["own/data"] and str(tmp_path) not in card
    left = {name for _, repository, name in hub.files if repository == "owner/old"}
    assert left == names | {"notes.json", "runs/model.safetensors"}, said[9]  # nothing of the old model, no diary
    assert "head tied" in said[10]
    loaded = {path.partition("/resolve/")[2].partition("/")[2] for _, path in hub.asked if "/own/policy/" in path}
    assert "model.safetensors" in loaded and not loaded & set(twice)
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in everything and TOKEN not in "".join(said) + str(hub.files)


def test_of_a_model_the_weights_that_are_read_are_fetched_and_of_a_tokenizer_none(tmp_path):
    hub, policy = Hub(), toy_directory() / "policy"
    names = ["one", "shards", "words"]
    for path in policy.iterdir():
        for name in names:
            if path.is_file() and (name != "shards" or path.suffix != ".safetensors"):
                hub.files["models", f"own/{name}", path.name] = path.read_bytes()
    weights = (policy / "model.safetensors").read_bytes()
    tensors = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    index = {"weight_map": {name: "model-00001-of-00001.safetensors" for name in tensors if name != "__metadata__"}}
    hub.files["models", "own/shards", "model.safetensors.index.json"] = json.dumps(index).encode()
    hub.files["models", "own/shards", "model-00001-of-00001.safetensors"] = weights
    for name in ("consolidated.safetensors", "original/model.safetensors", "checkpoint-5/adapter_model.safetensors"):
        for of in names:
            hub.files["models", f"own/{of}", name] = weights
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    lines = [
        "inspect hf://own/one", "inspect hf://own/shards",
        f"data inspect {tmp_path}/rows.jsonl --examples 0 --tokenizer hf://own/words",
        f"sft --model.path hf://own/shards --model.tokenizer hf://own/words --data.path {tmp_path}/rows.jsonl "
        f"--sft.steps 1 --sft.num_samples 0 {SHORT} --run.output_dir {tmp_path}/run --run.report false",
    ]  # fmt: skip
    said = at_the_hub(hub, lines, tmp_path / "home")
    assert [text[0] for text in said[1:]] == ["0"] * 4, said
    asked = [path for method, path in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert asked == [
        f"/own/one/resolve/{SHA}/model.safetensors",
        f"/own/shards/resolve/{SHA}/model-00001-of-00001.safetensors",
    ]


def test_a_run_without_a_token_is_refused_before_it_starts(tmp_path):
    push = f"sft --run.output_dir {tmp_path}/run --run.push_to_hub owner/new --model.path {toy_directory()}/policy"
    said = at_the_hub(Hub(), [push], tmp_path / "home", token="")[0]
    assert "run.push_to_hub owner/new cannot be written to (" in said and "run `hf auth login` or set HF_TOKEN" in said
    assert not (tmp_path / "run").exists()


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: "sub/*.parquet"
  - split: test
    path: [a.jsonl, b.jsonl]
---
text"""


def test_a_card_says_which_files_a_split_has():
    names = ["README.md", "b.jsonl", "sub/2.parquet", "a.jsonl", "sub/1.parquet", "train.jsonl"]
    split = lambda name, card=CARD: hub_rows.of_split("x", names, card, name)  # noqa: E731
    assert split("train") == ["sub/1.parquet", "sub/2.parquet"] and split("test") == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="no such split; there are train, test"):
        split("dev")
    assert split("train", "---\nconfigs: 3\n---\n") == ["train.jsonl"]  # a header that says nothing
    assert split("train", "---\nconfigs:\n- data_files: a.jsonl\n---\n") == ["a.jsonl"]
    two = "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n"
    with pytest.raises(UserError, match=r"several configurations \(a, b\)"):
        split("train", two)


def test_a_card_shows_no_place_of_this_machine():
    config = {"model": {"path": "/home/me/models/llama"}, "data": {"path": "/data/rows.jsonl", "fields": ["a={b}"]}}
    card = model_card("a/b", "reward", {**config, "run": {"output_dir": "/home/me/run"}}, {"x": {"y": 2.0}, "z": True})
    assert "/home" not in card and "/data/" not in card and "rows.jsonl" in card and "from llama." in card
    assert "| x.y | 2 |" in card and "| z |" not in card and "text-classification" in card
