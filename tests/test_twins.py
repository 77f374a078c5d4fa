"""Runs in a bucket: whole whatever is killed when, held by one process, continued bit by bit."""

import contextlib
import itertools
import json
import re
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from buckets import Bucket, served
from test_cli import call, here, home  # noqa: F401 (fixtures)
from test_resume import rows_of, run_fit, same_bits, settings, signal_at

from rlhf_jax.cli.parsing import parse
from rlhf_jax.commands.sample import print_rows
from rlhf_jax.config import EvaluateArgs
from rlhf_jax.data.sources import read_rows
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.hosts import buckets
from rlhf_jax.runs import directory, listing, manifests, pieces, twin
from rlhf_jax.runs.journal import Journal

URL, HEAD = "gs://bucket/runs/a", twin.HEAD


@pytest.fixture
def bucket(monkeypatch):
    """A bucket; processes beat and push only where a test has them do so, and are given up for dead at once."""
    monkeypatch.setattr(buckets, "RETRIES", {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"})
    monkeypatch.setattr(twin, "PASS", 3600.0)
    monkeypatch.setattr(pieces, "PASS", 3600.0)
    monkeypatch.setattr(twin, "BEAT", 3600.0)
    monkeypatch.setattr(twin, "LIFETIME", 0.0)
    monkeypatch.setattr(twin.time, "sleep", lambda seconds: None)
    buckets.store.cache_clear()
    with served(Bucket(), monkeypatch) as service:
        yield service
    buckets.store.cache_clear()


@pytest.fixture
def held(monkeypatch):
    """The newest Twin, in a list."""
    made = []

    class Seen(twin.Twin):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(twin, "Twin", Seen)
    return made


def config_at(url=URL, **changes):
    return settings(url, eval_every=4, checkpoint__every=2, **changes)


def fit(held, config, **options):
    """A run whose state goes to the bucket before every step, after the save under way."""

    def before_step(out, i):
        out.checkpoints.wait()
        held[-1].push()

    return twin.in_buckets(run_fit)(config, before_step=before_step, **options)


def head_of(bucket):
    return json.loads(bucket.objects["runs/a/.run/head.json"][0])


def lines(bucket, name="metrics.jsonl"):
    """The lines of a finished run, without times."""
    rows = map(json.loads, bucket.objects[f"runs/a/{name}"][0].splitlines())
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(what a run on a disk returns, its lines)."""
    path = tmp_path_factory.mktemp("alone")
    return run_fit(config_at(path / "run")), rows_of(path / "run")


def test_a_run_in_a_bucket_is_that_on_a_disk_whatever_request_is_the_last_before_a_kill(bucket, held, alone):
    """After every so many writes nothing reaches the bucket any more; another machine goes on with what is there."""
    fit(held, config_at())
    count = sum(method == "POST" for method, *_ in bucket.asked)
    names = {name.removeprefix("runs/a/") for name in bucket.objects}
    assert names >= {"metrics.jsonl", "summary.json", "config.yaml", "run.json"} and count > 40
    assert {name for name in names if name.startswith(".run")} == {".run/head.json"} and head_of(bucket)[
        "holder"
    ] == ""
    for last in range(2, count, count // 5):
        bucket.objects.clear()
        left = iter(range(last))
        bucket.faults = [
            lambda method, name, left=left: next(left, None) is None and 403 if method == "POST" else None
        ]
        with contextlib.suppress(UserError):
            fit(held, config_at())
        bucket.faults = []
        assert same_bits(fit(held, config_at()), alone[0]), last
        assert lines(bucket) == alone[1] and not [n for n in bucket.objects if "-0" in n], last


def test_another_process_is_refused_while_one_beats_and_takes_over_from_one_that_does_not(bucket, held, monkeypatch):
    with twin.Twin(URL) as first:
        (first.place / "metrics.jsonl").write_text("{}\n")
        first.push()
        monkeypatch.setattr(twin, "LIFETIME", 3600.0)
        monkeypatch.setattr(twin.time, "sleep", lambda seconds: first._swap())
        with pytest.raises(UserError, match=r"^gs://bucket/runs/a is being written by process \d+ on "):
            twin.Twin(URL)
    monkeypatch.setattr(twin, "LIFETIME", 0.0)
    zombie = twin.Twin(URL)
    with twin.Twin(URL) as second:
        (second.place / "metrics.jsonl").write_text("{}\n{}\n")
        (zombie.place / "metrics.jsonl").write_text("{}\n[]\n[]\n")
        zombie.push()
        assert zombie.lost.startswith("process ") and not zombie._swap()
        with pytest.raises(UserError, match=r"was taken over by process .*; what this process did since"):
            zombie.__exit__(None, None, None)
    with twin.Twin(URL) as third:
        assert (third.place / "metrics.jsonl").read_text() == "{}\n{}\n"
    assert head_of(bucket)["epoch"] == 4


def test_a_swap_whose_reply_is_lost_is_known_again(bucket):
    with twin.Twin(URL) as one:
        lost = iter(["lost", None])
        bucket.faults = [lambda method, name: next(lost, None) if method == "POST" and name.endswith(HEAD) else None]
        (one.place / "a.jsonl").write_text("1\n")
        one.push()
        assert not one.lost and one._swap()
    assert head_of(bucket)["files"].keys() == {"a.jsonl"} and head_of(bucket)["holder"] == ""


@pytest.mark.parametrize(
    "head", ["{", "[]", '{"epoch": 1}', '{"epoch": 1, "holder": "", "beat": 0, "files": {"a": [1]}}']
)
def test_a_head_that_somebody_broke_is_one_line(bucket, head):
    bucket.put("runs/a/.run/head.json", head.encode())
    with pytest.raises(UserError, match=r"gs://bucket/runs/a/.run/head.json is broken"):
        twin.Twin(URL)


def test_lines_are_sent_once_and_whole(bucket):
    with twin.Twin(URL) as one:
        file = one.place / "metrics.jsonl"
        for text in ("1\n", "1\n2\n", "1\n2\n3\nhal", "1\n2\n3\nhalf\n"):
            file.write_text(text)
            one.push()
        sizes = [size for _, size, _ in head_of(bucket)["files"]["metrics.jsonl"]]
        assert sizes == [2, 2, 2, 5]
        file.touch()
        one.push()
        assert [size for _, size, _ in head_of(bucket)["files"]["metrics.jsonl"]] == sizes
        for name in ("checkpoints/writing-00000006/a", "checkpoints/deleting-00000003/a", ".model.new/a", ".lock"):
            (one.place / name).parent.mkdir(parents=True, exist_ok=True)
            (one.place / name).write_text("half")
        file.write_text("1\n9\n2\n3\n")  # cut and written anew
        one.push()
        assert [[size for _, size, _ in parts] for parts in head_of(bucket)["files"].values()] == [[8]]
        assert len([name for name in bucket.objects if name.endswith("metrics.jsonl")]) == 1


def test_events_and_traces_stay_when_a_run_goes_on_and_have_their_own_names_at_its_end(bucket):
    for time in "12":
        with twin.Twin(URL) as one:
            for name in (f"tensorboard/events.{time}", f"profile/{time}/trace", *["summary.json"] * (time == "2")):
                (one.place / name).parent.mkdir(parents=True, exist_ok=True)
                (one.place / name).write_text(time)
    made = {f"runs/a/{name}{time}" for name in ("tensorboard/events.", "profile/") for time in "12"}
    assert {name.removesuffix("/trace") for name in bucket.objects if "run/" not in name} >= made


@pytest.mark.parametrize("what", ["flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(bucket, held, alone, capsys, what):
    def before_step(out, i):
        out.checkpoints.wait()
        held[-1].push()
        if i == 7:
            bucket.faults = [lambda method, name: 403]
            raise KeyboardInterrupt

    with contextlib.suppress(UserError):
        twin.in_buckets(run_fit)(config_at(), before_step=before_step)
    bucket.faults = []
    files = head_of(bucket)["files"]
    path = max(path for path in files if path.startswith("checkpoints/00000006/state/"))
    name = f"runs/a/{files[path][0][0]}"
    data, _ = bucket.objects.pop(name)
    if what == "flipped":
        bucket.put(name, bytes([data[0] ^ 1]) + data[1:])
    capsys.readouterr()
    assert same_bits(fit(held, config_at()), alone[0]) and lines(bucket) == alone[1]
    said = capsys.readouterr().out
    assert "checkpoint of step 6 is damaged: " in said and "continuing after step 4 of 12" in said


def test_a_run_in_a_bucket_is_listed_and_resumed_from_anywhere(bucket, held, capsys):
    with pytest.raises(Stopped, match=r"continue with: rlhf-jax resume gs://bucket/runs/a$"):
        twin.in_buckets(run_fit)(config_at(), before_step=signal_at(5))
    twin.Twin("gs://bucket/runs/b").push()
    listing.show("gs://bucket/runs")
    head, row = capsys.readouterr().out.splitlines()[-2:]
    assert head.startswith("run ") and re.match(r"gs://bucket/runs/a +sft +stopped +6/12 ", row)
    (name, *_), *_ = head_of(bucket)["files"]["run.json"]
    bucket.put("runs/q/sft/run.json", bucket.objects[f"runs/a/{name}"][0])  # as of a stage of a quickstart
    listing.show("gs://bucket/runs/q")
    assert re.match(r"gs://bucket/runs/q/sft +sft +stopped +", capsys.readouterr().out.splitlines()[-1])
    with pytest.raises(UserError, match="gs://bucket/runs/q/sft holds no run"):
        listing.resume("gs://bucket/runs/q/sft", [])
    stage, options = listing.resume(f"{URL}/", [])
    assert stage == "sft" and options[options.index("--run.output_dir") + 1] == f"{URL}/"
    assert parse(stage, options).optim.learning_rate == 0.05
    with pytest.raises(Stopped):  # a slash at the end is no part of the run that reads itself
        twin.in_buckets(run_fit)(config_at(f"{URL}/"), before_step=signal_at(8))
    (name, *_), *_ = head_of(bucket)["files"]["config.yaml"]
    text = bucket.objects[f"runs/a/{name}"][0].decode()
    assert text.startswith(f"# rlhf-jax sft --config {URL}/config.yaml --run.output_dir {URL}-again\n")
    assert f"output_dir: {URL}\n" in text
    with pytest.raises(UserError, match="gs://bucket/runs/none: no such object, none below it"):
        listing.resume("gs://bucket/runs/none", [])
    assert not list(Path(tempfile.gettempdir()).glob("gs:*"))


def test_what_a_stage_leaves_in_a_bucket_is_what_it_leaves_on_a_disk(bucket, here, call):  # noqa: F811
    command = ["sft", "--config", "sft.yaml", "--sft.steps", "2", "--sft.num_samples", "0", "--run.output_dir"]
    assert call(*command, "disk")[0] == 0
    code, out, _ = call(*command, "gs://bucket/runs/a")
    assert code == 0 and out.splitlines()[-1].endswith("written to gs://bucket/runs/a")
    assert "gs://bucket/runs/a is finished" in call(*command, "gs://bucket/runs/a")[1]
    there = {name.removeprefix("runs/a/"): data for name, (data, _) in bucket.objects.items()}
    files = {str(path.relative_to("disk")): path.read_bytes() for path in Path("disk").rglob("*") if path.is_file()}
    assert there.keys() - {".run/head.json"} == files.keys() - {".lock"}
    assert all(there[name] == data for name, data in files.items() if name.startswith("model/"))
    assert "logits (language model)" in call("inspect", "gs://bucket/runs/a/model")[1]
    assert "is part of the run that would be replaced" in call(*command, URL, "--model.path", f"{URL}/model")[2]


def test_a_file_of_rows_in_a_bucket_is_gone_on_with_after_a_kill_and_written_whole(bucket, held):
    made_of, url, rows = {"seed": 0}, "gs://bucket/out/rows.jsonl", [{"i": i} for i in range(4)]
    held_by = lambda **options: Journal(url, made_of, overwrite=False, **options)  # noqa: E731
    with contextlib.suppress(UserError), held_by() as journal:
        journal.add(rows[:2])
        journal._twin.push()
        journal.add(rows[2:])
        bucket.faults = [lambda method, name: 403]  # killed
    bucket.faults = []
    with pytest.raises(UserError, match=r"rows.jsonl is made with seed 0, not 1"):
        Journal(url, {"seed": 1}, overwrite=False)
    with held_by() as journal:
        assert journal.rows == rows[:2]
        journal.add(rows[2:])
        zombie = journal._twin
        with twin.Twin(f"{url}.part"):
            pass
        with pytest.raises(UserError, match="was taken over by"):
            journal.finish(rows, {"n": 4})
        assert "out/rows.jsonl" not in bucket.objects and zombie.lost
        journal._twin = None
    with held_by() as journal:
        journal.add(rows[2:])
        journal.finish(rows, {"n": 4})
    assert read_rows(url)[3]["i"] == 3 and sorted(bucket.objects) == ["out/rows.jsonl", "out/rows.summary.json"]
    with pytest.raises(UserError, match=r"out/rows.jsonl exists; choose another name or pass --overwrite true"):
        held_by()
    bucket.put("out/rows.jsonl", bytes(1 << 20))
    sent = bucket.sent
    with pytest.raises(UserError, match=r"out/rows.jsonl exists; choose another name or pass --overwrite true"):
        held_by()
    assert bucket.sent - sent < 1 << 16  # it is not fetched to see whether it is there
    print_rows([{}], url)
    assert bucket.objects["out/rows.jsonl"][0] == b"{}\n" and sorted(bucket.objects) == ["out/rows.jsonl"]


def at(status, method, name):
    """A fault that never ends: this status to requests of a method of objects whose names end so.

    Who asks 500 times would ask for ever, and has another answer from then on.
    """
    asks = itertools.chain([status] * 500, itertools.repeat(401))
    return lambda asked, of: next(asks) if asked == method and (of or "").endswith(name) else None


REFUSED = {
    "the rows": (at(403, "POST", "out/rows.jsonl"), r"out/rows.jsonl: no credentials.*computed is in gs://.*\.part/"),
    "the rows, by a policy": (at(412, "POST", "out/rows.jsonl"), r"out/rows.jsonl: the service refuses it \(412\).*"),
    "the summary": (at(503, "POST", "summary.json"), r"the service cannot be asked.*what was computed is in gs://"),
    "the head": (at(412, "POST", "head.json"), r"what came last could not be written.*refuses it \(412\).*it is in /"),
    "all": (lambda method, name: 503, r"what came last could not be written.*it is in /"),
    "deleting": (at(403, "DELETE", ""), None),
    "every other reply": (None, None),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_last_write_to_a_bucket_that_is_refused_loses_nothing_and_says_where_the_rows_are(bucket, held, what):
    url, rows, (fault, line) = "gs://bucket/out/rows.jsonl", [{"i": i} for i in range(4)], REFUSED[what]
    lost = itertools.cycle(["lost", None])
    fault = fault or (lambda method, name: next(lost) if method != "GET" else None)
    refused = pytest.raises(UserError, match=line) if line else contextlib.nullcontext()
    with refused as error, Journal(url, {"seed": 0}, overwrite=False) as journal:
        journal.add(rows)
        bucket.faults = [fault]
        journal.finish(rows, {"n": 4})
    bucket.faults = []
    if line and (kept := re.search("it is in (/[^ ,]+)", str(error.value))):
        assert rows_in(Path(kept[1]) / "rows.jsonl")[1:5] == rows  # on this machine, under its own name
        shutil.rmtree(kept[1])
    elif line:
        with Journal(url, {"seed": 0}, overwrite=False) as journal:
            assert journal.rows == rows
            journal.finish(rows, {"n": 4})
    else:
        assert read_rows(url)[3]["i"] == 3 and "out/rows.summary.json" in bucket.objects


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


DAMAGE = {
    "flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "foreign": lambda data: b'{"i": 7}\n',
    "cut short": lambda data: data[:-1],
    "missing": None,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_rows_of_which_an_object_is_not_as_it_was_go_on_from_what_comes_before_it(bucket, capsys, what):
    url, rows = "gs://bucket/out/rows.jsonl", [{"i": i} for i in range(4)]
    with contextlib.suppress(UserError), Journal(url, {"seed": 0}, overwrite=False) as journal:
        for row in rows[:3]:
            journal.add([row])
            journal._twin.push()
        bucket.faults = [lambda method, name: 403]  # killed
    bucket.faults = []
    parts = json.loads(bucket.objects["out/rows.jsonl.part/.run/head.json"][0])["files"]["rows.jsonl"]
    name = f"out/rows.jsonl.part/{parts[1][0]}"
    data, _ = bucket.objects.pop(name)
    assert len(parts) == 3 and json.loads(data) == rows[1]
    if DAMAGE[what]:
        bucket.put(name, DAMAGE[what](data))
    bucket.put("out/rows.jsonl.part/.run/of-nobody", b"")
    with Journal(url, {"seed": 0}, overwrite=False) as journal:
        assert journal.rows == rows[:1] and "not all of it is there as it was written" in capsys.readouterr().out
        journal.add(rows[1:])
        journal._twin.push()
        head = json.loads(bucket.objects["out/rows.jsonl.part/.run/head.json"][0])
        named = {part for part, *_ in head["files"]["rows.jsonl"]} | {HEAD}
        assert {f"out/rows.jsonl.part/{part}" for part in named} == set(bucket.objects)
        journal.finish(rows)
    assert list(map(json.loads, bucket.objects["out/rows.jsonl"][0].splitlines())) == rows


def test_a_run_that_was_copied_into_a_bucket_is_no_run_of_it_and_is_not_replaced(bucket, held, tmp_path):
    """A run of a disk has no head there: whoever writes in a bucket would see an empty place."""
    run_fit(settings(tmp_path / "run"))
    bucket.put_tree(tmp_path / "run", "runs/a")
    before = dict(bucket.objects)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"^gs://bucket/runs/a holds run.json, but no .run/head.json: it was copied"
        ):
            fit(held, config_at())
    with pytest.raises(UserError, match=r"^gs://bucket/runs/a holds no run that goes on there: its files were copied"):
        listing.resume("gs://bucket/runs/a", [])
    evaluated = twin.in_buckets(lambda config: None, option="output_dir")
    bucket.put("runs/e/config.yaml", b"# rlhf-jax evaluate")
    with pytest.raises(UserError, match=r"^gs://bucket/runs/e holds config.yaml, but"):
        evaluated(EvaluateArgs(output_dir="gs://bucket/runs/e"))
    del bucket.objects["runs/e/config.yaml"]
    assert bucket.objects == before
    fit(held, config_at(run__overwrite=True))
    assert head_of(bucket)["files"]["run.json"]


def test_a_finished_run_is_left_as_it_is(bucket, held, capsys):
    fit(held, config_at())
    bucket.put("runs/a/model/config.json", b"{}")
    before = {name: data for name, data in bucket.objects.items() if "head" not in name}
    summary = twin.in_buckets(lambda config: directory.check_output_dir("sft", config))(config_at())
    assert summary["stage"] == "sft" and "gs://bucket/runs/a is finished; --run" in capsys.readouterr().out
    assert {name: data for name, data in bucket.objects.items() if "head" not in name} == before


RECIPE = """
defaults: {run: {progress: false, eval_every: 0}, progress: false}
stages:
- {name: task, command: data make, function: "rlhf_jax.tasks.random_walks:write", num: 64}
- command: sft
  model: {tokenizer: $task/tokenizer, arch: {vocab_size: 24, width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2,
    head_dim: 8, ffn_width: 32, max_positions: 32}}
  data: {path: $task/demonstrations.jsonl, eval_path: $task/held_out.jsonl, batch_size: 16, max_prompt_length: 2,
    max_length: 14}
  sft: {steps: 2, num_samples: 0}
- {command: sample, model: {path: $sft/model}, data_path: $task/prompts.jsonl, max_prompt_length: 2,
   sampling: {max_new_tokens: 4, chunk: 4}}
- {command: evaluate, model: {path: $sft/model}, data_path: $task/prompts.jsonl, max_prompt_length: 2,
   sampling: {max_new_tokens: 4, chunk: 4}, reward: {functions: ["rlhf_jax.tasks.random_walks:gold"]}}
"""


def test_a_recipe_in_a_bucket_goes_on_where_requests_failed_and_makes_what_it_makes_on_a_disk(
    bucket, here, call  # noqa: F811
):  # fmt: skip
    Path("recipe.yaml").write_text(RECIPE)
    command = ["recipe", "recipe.yaml", "--output_dir"]
    assert call(*command, "disk")[0] == 0
    there = "gs://bucket/r"
    stages = {"task": "task/", "sft": "sft/", "sample": "sample.jsonl.part/", "evaluate": "evaluate/"}
    for number, begins in enumerate(stages.values(), 1):  # from its third object on nothing is written
        left = iter(range(2))
        bucket.faults = [
            lambda method, name, begins=f"r/{begins}", left=left: (
                403 if method == "POST" and name.startswith(begins) and next(left, None) is None else None
            )
        ]
        code, out, err = call(*command, there)
        assert code == 2 and f"[{number}/4]" in out and f"[{number + 1}/4]" not in out
        assert "no credentials, or none" in err, err
    bucket.faults = []
    assert call(*command, there, "--dry_run", "true")[1].count("(finished") == 3
    assert call(*command, there)[0] == 0
    files = {str(path.relative_to("disk")): path.read_bytes() for path in Path("disk").rglob("*") if path.is_file()}
    names = {name.removeprefix("r/") for name in bucket.objects}
    assert {name for name in names if ".run/" not in name} == {name for name in files if not name.endswith(".lock")}
    same = [name for name in files if name.startswith(("task/", "sft/model/", "sample.jsonl", "evaluate/responses"))]
    assert len(same) > 10 and all(bucket.objects[f"r/{name}"][0] == files[name] for name in same)
    code, out, _ = call(*command, there)
    assert code == 0 and out.count("finished before") == 4
    bucket.put("r/sft/model/config.json", b"{}")
    assert "stage sft: gs://bucket/r/sft has changed since it was made" in call(*command, there)[2]
    assert call(*command, there, "--overwrite", "true")[0] == 0
    assert all(bucket.objects[f"r/{name}"][0] == files[name] for name in same)


def part_of(copy, number, data, step=2):
    """What a process writes of a checkpoint on its machine."""
    path = copy.place / "checkpoints" / f"{step:08d}"
    (path / "state" / "w").mkdir(parents=True)
    (path / "state" / "w" / f"{number}.0").write_bytes(data)
    if not number:
        (path / "record.json").write_text("{}")
    manifests.write_manifest(path, number)


def test_a_checkpoint_is_named_once_the_parts_of_all_processes_are_there_and_each_brings_what_it_needs(
    bucket, monkeypatch
):
    monkeypatch.setattr(pieces, "LONGEST", 4)  # no more of a file is in memory
    with twin.Twin(URL, count=2) as first, pieces.Piece(URL, 1, 2, first.epoch) as second:
        part_of(first, 0, b"a" * 9)
        part_of(second, 1, b"b" * 9)
        first.push()
        assert not first.has(2) and not head_of(bucket)["files"]
        bucket.faults = [lambda method, name: 403 if method == "POST" and name.endswith(".json") else None]
        with pytest.raises(OSError, match="no credentials"):  # its chunk came, its letter did not
            second.push()
        bucket.faults = []
        first.push()
        assert not first.has(2) and not second.has(2)
        second.push()
        first.push()
        assert first.has(2) and second.has(2)
    names = {name.removeprefix("runs/a/") for name in bucket.objects}
    named = {part for parts in head_of(bucket)["files"].values() for part, *_ in parts}
    assert not [name for name in names if "-of-" in name] and named < names
    for number in (0, 1):
        sent = head_of(bucket)["files"][f"checkpoints/00000002/state/w/{number}.0"]
        assert [size for _, size, _ in sent] == [4, 4, 1]
    below, whole = "checkpoints/00000002/", lambda name: not manifests.is_chunk(name)
    with twin.Twin(URL, count=2) as first, pieces.Piece(URL, 1, 2, first.epoch) as second:
        assert set(bucket.objects) == {
            f"runs/a/{name}" for name in {*named, HEAD}
        }  # the chunk without a letter is gone
        second.bring(below, whole)
        path = second.place / below
        assert set(manifests.listed(path)) == {"record.json", "state/w/0.0", "state/w/1.0"}
        assert manifests.damage(path, {"state/w/1.0"}) == "state/w/1.0 is missing, or does not belong there"
        second.bring(below, {"state/w/1.0"}.__contains__)
        assert not manifests.damage(path, {"state/w/1.0"}) and not (path / "state/w/0.0").exists()
        (path / "state/w/1.0").write_bytes(b"b" * 8 + b"c")
        assert manifests.damage(path, {"state/w/1.0"}) == "state/w/1.0 has changed (checksum)"
        (path / "state/w/7.0").write_bytes(b"")
        assert manifests.damage(path, set()) == "state/w/7.0 is missing, or does not belong there"
        (path / "manifest-1.json").write_text("[")
        assert manifests.damage(path, set()) == "manifest-1.json cannot be read"
        second.push()  # what came from the bucket is not sent again
        assert len(bucket.objects) == len(named) + 1


def test_what_is_being_fetched_is_not_sent(bucket, monkeypatch):
    with twin.Twin(URL) as one:
        part_of(one, 0, b"a" * 9)
    named, fetch, threads = head_of(bucket)["files"], pieces.fetch, []

    def half(url, parts, target):
        target.write_bytes(b"a")
        threads.append(threading.Thread(target=one.push))
        threads[-1].start()
        threads[-1].join(1.0)  # or it waits for what is fetched
        return fetch(url, parts, target)

    with twin.Twin(URL) as one:
        monkeypatch.setattr(pieces, "fetch", half)
        one.bring("checkpoints/00000002/", "state/w/0.0".__eq__)
        threads[0].join()
        assert len(threads) == 1 and head_of(bucket)["files"] == named


def test_the_chunks_that_a_box_needs_are_those_that_share_elements_with_it():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = rng.integers(1, 7, size=rng.integers(0, 4))
        chunk = [int(rng.integers(1, size + 1)) for size in shape]
        boxes = []
        for _ in range(rng.integers(1, 3)):
            first = [int(rng.integers(0, size)) for size in shape]
            boxes.append([(a, int(rng.integers(a + 1, size + 1))) for a, size in zip(first, shape, strict=True)])
        needed = {
            ".".join(str(i // size) for i, size in zip(at, chunk, strict=True)) or "0"
            for at in np.ndindex(*shape)
            if any(all(a <= i < b for i, (a, b) in zip(at, box, strict=True)) for box in boxes)
        }
        assert manifests.overlapping(boxes, chunk) == needed
