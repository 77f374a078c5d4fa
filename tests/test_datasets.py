"""Laws of sources other than JSON lines, field maps, mixtures and `rlhf-jax data inspect|prepare|aggregate`."""

import builtins
import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from test_data import CHATML, USER, tiny, turn

from rlhf_jax import cli
from rlhf_jax.commands import datasets
from rlhf_jax.config import DataAggregateArgs, DataConfig, DataInspectArgs, DataPrepareArgs, SFTArgs
from rlhf_jax.data import fields, lint, schemas, sources, tfds_rows
from rlhf_jax.data.ballots import ranking_row
from rlhf_jax.data.comparisons import preference_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.loading import load_rows
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

NAN = float("nan")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- TFDS

ROWS = {
    "sft": [
        {"prompt": "é a", "response": "b", "finished": False, "response_ids": [7, 2]},
        {"prompt": USER, "response": [turn("assistant", "yes")]},
    ],
    "preference": [
        {"prompt": USER, "chosen": "b", "rejected": "c", "votes": [2, 0, 1], "margin": 0.5, "rejected_ids": [5, 6]},
        {"prompt": "a", "chosen": "b", "rejected": "c", "finished": [True, False], "rater": "ann"},
    ],
    "ranking": [
        {
            "prompt": "a", "responses": [{"text": "b", "ids": [5, 1]}, "c", {"text": "d", "ids": []}],
            "ranks": [0, None, 1], "rater": "ann",
        },
        {"prompt": USER, "responses": ["b", "c"], "raters": [{"rater": "x", "ranks": [0, 1]}, {"ranks": [1, 1]}]},
    ],
    "prompts": [{"prompt": "a", "answer": "7", "id": 3}, {"prompt": USER, "answer": None}],
}  # fmt: skip
NORMAL = {
    "sft": schemas.sft_row,
    "preference": schemas.preference_row,
    "ranking": ranking_row,
    "prompts": schemas.prompt_row,
}


def plain(row):
    row = dataclasses.asdict(row) | {"where": ""} if dataclasses.is_dataclass(row) else {**row, "_where": ""}
    return json.loads(json.dumps(row, default=repr))


@pytest.mark.parametrize("schema", ROWS)
def test_a_prepared_dataset_gives_its_rows_back_in_order(tmp_path, schema, capsys):
    path = write(tmp_path / "rows.jsonl", ROWS[schema] * 3)
    out = datasets.run_prepare(DataPrepareArgs(path=path, schema=schema, out=str(tmp_path / "out"), eval_path=path))
    assert "train: kept 6 of 6 rows" in capsys.readouterr().out
    back = sources.read_rows(str(out))
    wanted = [plain(NORMAL[schema](row)) for row in sources.read_rows(path)]
    assert [plain(NORMAL[schema](row)) for row in back] == wanted
    half = sources.read_rows(f"{out}@test[:50%]")
    assert [plain(NORMAL[schema](row)) for row in half] == wanted[:3]
    assert half[0]["_where"] == f"{out}@test[:50%]:0"
    with pytest.raises(UserError, match="exists; choose another --out or pass"):
        datasets.run_prepare(DataPrepareArgs(path=path, schema=schema, out=str(tmp_path / "out")))


def test_what_a_prepared_dataset_does_not_hold_is_counted_by_name(tmp_path, capsys):
    rows = [{**row, "id": i, "more": 1} for i, row in enumerate(ROWS["ranking"])]
    rows.append({"prompt": "a", "responses": [{"text": "b", "model": "m", "rank": 0}, {"text": "c", "rank": 1}, None]})
    path = write(tmp_path / "rows.jsonl", rows)
    datasets.run_prepare(DataPrepareArgs(path=path, schema="ranking", out=str(tmp_path / "out")))
    said = capsys.readouterr().out
    assert '; 1 responses with "model", which is not stored; 1 responses that are null or empty, left out' in said
    assert "; fields not read: 'id' of 2, 'more' of 2" in said
    rated = [
        {"prompt": "a", "response": "b", "rating": 3, "rater": None},
        {"prompt": "a", "response": "c", "rater": "x"},
    ]
    path = write(tmp_path / "rated.jsonl", rated)
    datasets.run_prepare(DataPrepareArgs(path=path, schema="sft", out=str(tmp_path / "out")))
    assert "; fields not read: 'rating' of 1, 'rater' of 1\n" in capsys.readouterr().out
    path = write(tmp_path / "pairs.jsonl", ROWS["preference"])
    datasets.run_prepare(DataPrepareArgs(path=path, schema="ranking", out=str(tmp_path / "other")))
    assert "; 1 margins not used\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"row 1: this cannot be written as JSON \(a bytes has no form there\)"):
        tfds_rows.stored({"prompt": "a", "image": b"x", "_where": "row 1"}, "prompts", Counter())


def test_elo_intervals_take_the_votes_on_a_prompt_as_one(tmp_path):
    """Ten raters who say the same of a prompt, or ten votes on it, tell as much about the models as one does."""
    rng = np.random.default_rng(0)
    won = rng.random(40) < 0.6
    items = lambda first: [{"text": "x", "model": "ab"[not first]}, {"text": "y", "model": "ab"[first]}]  # noqa: E731

    def width(raters):
        rows = [
            {
                "prompt": f"p{n}",
                "responses": items(first),
                "raters": [{"rater": f"{r}", "ranks": [0, 1]} for r in raters],
            }
            for n, first in enumerate(won.tolist())
        ]
        path = write(tmp_path / "rows.jsonl", rows)
        config = DataAggregateArgs(path=path, by="model", intervals=200, prior=1e-6)
        return [item["interval"] for item in datasets.run_aggregate(config)[0]["responses"]]

    np.testing.assert_allclose(width(range(10)), width([0]), atol=2e-3)
    low, high = width(range(10))[0]
    assert high - low > 0.4  # in nats, half the difference: 2 * 1.96 * sqrt(1 / (40 * .24)) / 2


def test_tfds_opens_what_we_prepare_without_us_and_without_tensorflow(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS["preference"])
    out = datasets.run_prepare(DataPrepareArgs(path=path, schema="preference", out=str(tmp_path)))
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"b = tfds.builder_from_directory({str(out)!r})\n"
        "print(b.as_data_source(split='train')[0]['chosen'].decode(), b.info.splits['train'].num_examples)\n"
        "print({'rlhf_jax', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "b 2\nset()\n"


def test_rows_that_are_dropped_are_not_prepared(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}])
    config = DataPrepareArgs(path=path, schema="sft", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r'r.jsonl:2: "response" is empty'):
        datasets.run_prepare(dataclasses.replace(config, strict=True))
    out = datasets.run_prepare(config)
    assert "kept 1 of 2 rows; dropped 1 with an empty turn" in capsys.readouterr().out
    assert len(sources.read_rows(str(out))) == 1


def test_builders_that_are_not_prepared_fail_at_once_with_the_cure(tmp_path):
    started = time.time()
    with pytest.raises(UserError, match=r"not prepared in .*nothing is downloaded.*download_and_prepare\(\)"):
        tfds_rows.read_builder("imdb_reviews", "train", str(tmp_path))
    with pytest.raises(UserError, match=r"tfds:imdb_reviws: .* the catalogue here knows imdb_reviews"):
        sources.read_rows("tfds:imdb_reviws@train")
    assert time.time() - started < 10


def test_split_errors_name_the_splits_there_are(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS["sft"])
    out = datasets.run_prepare(DataPrepareArgs(path=path, schema="sft", out=str(tmp_path)))
    with pytest.raises(UserError, match=r"@dev: no such split, or an empty one; there are train, and slices"):
        sources.read_rows(f"{out}@dev")
    with pytest.raises(UserError, match="or an empty one"):
        sources.read_rows(f"{out}@train[:0]")
    (out / "features.json").write_text("{")
    with pytest.raises(UserError, match="no readable TFDS dataset"):
        sources.read_rows(str(out))


@pytest.mark.parametrize("name", [name for name in fields.catalogue() if name.startswith("tfds:")])
def test_the_catalogue_names_fields_that_tfds_declares(name):
    import tensorflow_datasets as tfds

    features = tfds.builder(name.removeprefix("tfds:"), try_gcs=False).info.features
    for template in fields.catalogue()[name]["fields"].values():
        for path in fields.PLACE.findall(template):
            feature = features
            for part in path.split("."):
                feature = feature[part]
            assert isinstance(feature, tfds.features.Text)


# --- Parquet, field maps, mixtures


def test_parquet_rows_are_those_of_json_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": USER, "chosen": "b", "rejected": "c", "votes": [1, 0, 0]}] * 2
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    path = str(tmp_path / "r.parquet")
    assert sources.read_rows(path) == [{**row, "_where": f"{path}:{i + 1}"} for i, row in enumerate(rows)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"bad.parquet: no readable Parquet"):
        sources.read_rows(str(tmp_path / "bad.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "r.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="Parquet needs pyarrow; pip install pyarrow, or convert"):
        sources.read_rows(str(tmp_path / "r.parquet"))


def test_field_maps_rename_nest_and_surround():
    row = {"q": "why", "a": {"text": "so", "votes": [1, 0, 0]}, "_where": "f:1"}
    [mapped] = sources.rows_from([row], ["prompt=Q: {q}\nA:", "response={a.text}", "votes={a.votes}"])
    assert mapped == {"prompt": "Q: why\nA:", "response": "so", "votes": [1, 0, 0], "_where": "f:1"}
    with pytest.raises(UserError, match=r'^f:1: no field "a.tex" \(found: q, a\); give data.fields that fit'):
        sources.rows_from([row], ["prompt={a.tex}"])
    with pytest.raises(UserError, match=r"data.fields 'prompt' is no field map; write name="):
        sources.rows_from([row], ["prompt"])


def test_mixtures_keep_every_row_and_the_ratio():
    a, b = ([{"prompt": f"{name}{i}"} for i in range(size)] for name, size in (("a", 100), ("b", 30)))
    mixed = sources.mix([a, b], [1, 1], seed=0)
    count = Counter(row["prompt"] for row in mixed)
    assert set(count) == {row["prompt"] for row in a + b}
    assert sum(n for name, n in count.items() if name[0] == "b") == 100 == len(mixed) - 100
    assert {n for name, n in count.items() if name[0] == "b"} == {3, 4}
    assert sources.mix([a, b], [100, 30], seed=0) == a + b
    assert sources.mix([a, b], [1, 1], seed=0) == mixed != sources.mix([a, b], [1, 1], seed=1)


def test_mixtures_repeat_no_held_out_row(tmp_path):
    paths = [
        write(tmp_path / f"{n}.jsonl", [{"prompt": f"{n}{i}"} for i in range(s)]) for n, s in (("a", 90), ("b", 9))
    ]
    data = DataConfig(path=paths[0], mixture=paths[1:], mixture_weights=[1, 1], eval_fraction=0.3)
    train, held_out = load_rows(data, None, None, seed=0)
    names = Counter(row["prompt"] for row in held_out)
    assert set(names.values()) == {1} and not names.keys() & {row["prompt"] for row in train}
    sides = Counter(row["prompt"][0] for row in train)
    assert sides["a"] == sides["b"]
    with pytest.raises(UserError, match=r"mixture_weights \[1\] are not 2 positive numbers; give one"):
        DataConfig(mixture=["x"], mixture_weights=[1])


# --- inspect


@pytest.fixture(scope="module")
def chat():
    return Tokenizer(tiny(CHATML))


def test_inspect_finds_what_is_wrong(chat):
    rows = sources.rows_from(
        [
            {"prompt": "a b", "chosen": "c d e", "rejected": "c", "id": 1},
            {"prompt": "a b", "chosen": "c d e", "rejected": "c", "id": 1},
            {"prompt": "b", "chosen": "d e f", "rejected": "c d", "votes": [2, 1, 0], "id": 1},
            {"prompt": "c", "chosen": "a", "rejected": "a "},
            {"prompt": "d", "chosen": "", "rejected": "a"},
        ]
    )
    held_out = [{"prompt": "b", "chosen": "a b", "rejected": "a", "_where": "h:1"}]
    found = lint.inspect(rows, held_out, chat, 1, 5)
    assert found["dropped"] == {"with chosen equal to rejected": (1, ["row 3"]), "with an empty turn": (1, ["row 4"])}
    assert found["repeated"] == (1, ["row 1 = row 0"])
    assert found["ids"] == (1, ["row 2 = row 0"])
    assert found["leaked"] == (1, ["h:1 = row 2"])
    assert found["longer_wins"] == 1.0
    assert found["length_correlation"] > 0.9
    assert found["agreement"] == pytest.approx(1 / 3)
    assert found["cut_prompts"] == pytest.approx(2 / 4)
    assert found["cut_rows"] == pytest.approx(2 / 4)  # two tokens, three and the stop id
    assert found["lengths"]["response"][-1] == 4
    text = "\n".join(lint.lines(found))
    for part in (
        "! 1 with an empty turn, dropped: row 4",
        "! 1 rows are there twice",
        "! 1 rows have the id of another: row 2 = row 0",
        "! length: the longer response",
    ):
        assert part in text


def test_length_that_says_nothing_correlates_with_nothing():
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{i}", "chosen": "a" * int(rng.integers(1, 50)), "rejected": "b" * int(rng.integers(1, 50))}
        for i in range(800)
    ]
    found = lint.inspect(sources.rows_from(rows), [], None, 100, 100)
    assert abs(found["length_correlation"]) < 0.1 and abs(found["longer_wins"] - 0.5) < 0.06
    assert found["unit"] == "characters" and found["agreement"] is None


def test_the_loss_mask_is_shown(chat):
    row = {"prompt": USER, "response": "yes", "_where": "f:1"}
    shown = lint.render(row, chat, loss_on="response", color=False)
    assert shown.startswith("--- f:1: conversational prompt-completion\n")
    assert shown.count("[[") == 1 and "[[yes" in shown
    assert "\033[32m" in lint.render(row, chat, loss_on="response", color=True)
    pair = {"prompt": USER, "chosen": "yes", "rejected": "no", "_where": "f:2"}
    shown = lint.render(pair, chat, loss_on="response", color=False)
    assert "rank 0: [[yes" in shown and "rank 1: [[no" in shown
    assert "dropped with an empty turn" in lint.render({**pair, "chosen": ""}, chat, loss_on="all", color=False)


def test_inspect_prints_and_returns_its_findings(tmp_path, capsys):
    tiny(CHATML).save_pretrained(tmp_path / "tok")
    path = write(tmp_path / "r.jsonl", [{"prompt": f"a {w}", "response": w} for w in "abcdefgh"])
    found = datasets.run_inspect(DataInspectArgs(path=path, tokenizer=str(tmp_path / "tok"), examples=2))
    out = capsys.readouterr().out
    assert found["rows"] == 8 and "held out" not in out
    assert out.count("--- ") == 2 and "\033[" not in out and "8 prompt-completion" in out
    mixed = SFTArgs(
        data=DataConfig(path=path, mixture=[write(tmp_path / "s.jsonl", [{"prompt": "a a", "response": "a"}])])
    )
    found = datasets.run_inspect(DataInspectArgs(), mixed)
    assert (found["rows"], found["repeated"][0]) == (9, 1)
    assert datasets.run_inspect(DataInspectArgs(path=path), mixed)["rows"] == 8
    capsys.readouterr()
    unranked = [{"prompt": "a", "responses": ["b", "c"]}]
    (tmp_path / "sft.yaml").write_text(f"model: {{tokenizer: {tmp_path / 'tok'}}}\ndata: {{max_length: 6}}\nsft: {{}}")
    stage = ["--config", str(tmp_path / "sft.yaml"), "--data.path", write(tmp_path / "u.jsonl", unranked)]
    with pytest.raises(SystemExit):
        cli.main(["data", "inspect", *stage, "--examples", "1"])
    out = capsys.readouterr().out
    assert "over 6 tokens" in out and "over 3 tokens" in out
    assert "  1 pairs of responses, which nobody has compared" in out and "nan" not in out and "response: [[b" in out


@pytest.mark.parametrize("field", ["label", "rating"])
@pytest.mark.parametrize("value", ["yes", None, [1], float("nan")])
def test_inspect_refuses_what_every_stage_refuses(field, value):
    rows = sources.rows_from([{"prompt": "a", "response": "b", field: value}])
    with pytest.raises(UserError, match=f'row 0: "{field}" is'):
        lint.inspect(rows, [], None, 9, 9)


# --- aggregate


def test_aggregate_ranks_models_and_names_the_liar(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30):
        for rater in ("ann", "bob", "eve"):
            truth = [0, 1, 2] if rng.random() < 0.9 else [1, 0, 2]
            ranks = [2 - r for r in truth] if rater == "eve" else truth
            models = [{"text": f"{m} {i}", "model": m, "rank": r} for m, r in zip("xyz", ranks, strict=True)]
            rows.append({"prompt": f"p{i}", "responses": models, "rater": rater})
    path, output = write(tmp_path / "r.jsonl", rows), str(tmp_path / "out.jsonl")
    datasets.run_aggregate(DataAggregateArgs(path=path, output=output, intervals=20))
    merged = sources.read_rows(output)
    assert len(merged) == 30
    assert np.mean([[item["rank"] for item in row["responses"]] == [0, 1, 2] for row in merged]) > 0.8
    assert all(item["interval"][0] <= item["interval"][1] for item in merged[0]["responses"])
    assert "least reliable: eve 0.1" in capsys.readouterr().out
    [row] = datasets.run_aggregate(DataAggregateArgs(path=path, by="model", intervals=50))
    assert [(item["text"], item["rank"]) for item in row["responses"]] == [("x", 0), ("y", 1), ("z", 2)]
    table = capsys.readouterr().out.split("Elo ")[1].splitlines()
    assert [line.split()[-1] for line in table[1:4]] == ["x", "y", "z"]
    with pytest.raises(UserError, match=r'r.jsonl:1: a response has no field "size"; correct --by'):
        datasets.run_aggregate(DataAggregateArgs(path=path, by="size"))


def item(text, model, rank):
    return {"text": text, "model": model, "rank": rank}


BY_MODEL = {
    "one text of two models": (
        [
            {"prompt": "a", "responses": [item("x", "m", 0), item("y", "n", 1)]},
            {"prompt": "a", "responses": [item("x", "n", 0), item("y", "m", 1)]},
        ],
        [("m", "n")],
        [("n", "m")],
    ),
    "two responses of one model": (
        [{"prompt": "a", "responses": [item("x", "m", 0), item("y", "n", 1), item("z", "m", 2)]}],
        [("m", "n")],
        [("n", "m")],
    ),
    "one text twice in a row": (
        [{"prompt": "a", "responses": [item("x", "m", 0), item("x", "n", 0), item("y", "o", 1)]}],
        [("m", "o"), ("n", "o")],
        [],
    ),
    "one text of one model, ranked twice": (
        [{"prompt": "a", "responses": [item("x", "m", 0), item("x", "m", 2), item("y", "n", 1)]}],
        [("m", "n")],
        [("n", "m")],
    ),
    "three against one": (
        [{"prompt": "a", "responses": [item("x", "m", 0), item("y", "n", 1), item("z", "n", 1), item("w", "n", 2)]}],
        [("m", "n")] * 3,
        [],
    ),
}


@pytest.mark.parametrize("method", ["bradley_terry", "plackett_luce", "crowd_bt"])
@pytest.mark.parametrize("case", BY_MODEL)
def test_every_response_counts_for_its_own_model(case, method, tmp_path):
    """As if each verdict on two of them were a row of its own."""
    rows, won, lost = BY_MODEL[case]
    path = write(tmp_path / "r.jsonl", rows)
    pairs = won + lost
    single = [{"prompt": str(i), "responses": [item("x", a, 0), item("y", b, 1)]} for i, (a, b) in enumerate(pairs)]
    if case == "one text twice in a row":
        single.append({"prompt": "tie", "responses": [item("x", "m", 0), item("y", "n", 0)]})
    other = write(tmp_path / "s.jsonl", single)
    [found], [wanted] = (
        datasets.run_aggregate(DataAggregateArgs(path=p, by="model", method=method, intervals=0))
        for p in (path, other)
    )
    if method != "bradley_terry":  # a ranking of three is more than its pairs, three ballots more reliable than one
        found, wanted = ({i["text"]: i["rank"] for i in row["responses"]} for row in (found, wanted))
    assert found == wanted


@pytest.mark.parametrize("method", ["bradley_terry", "plackett_luce", "crowd_bt"])
@pytest.mark.parametrize(
    "silent",
    [
        {"responses": [{"text": "a", "rank": 0}, {"text": "a", "rank": 1}]},
        {"responses": ["a", "b"], "raters": []},
        {"responses": ["a", "b"], "ranks": [None, None]},
    ],
)
def test_prompts_on_which_nobody_says_anything_stand_anywhere(silent, method, tmp_path):
    """First, between others, last and alone: they change nothing of the others, in aggregation and in training."""
    told = [{"prompt": p, "responses": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]} for p in "pq"]
    limits = Limits(98, 99, "error")
    [wanted, _] = datasets.run_aggregate(DataAggregateArgs(path=write(tmp_path / "r.jsonl", told), method=method))
    for place in (0, 1, 2):
        rows = [*told[:place], {"prompt": "silent", **silent}, *told[place:]]
        run = DataAggregateArgs(path=write(tmp_path / "r.jsonl", rows), method=method)
        found = {row["prompt"]: row["responses"] for row in datasets.run_aggregate(run)}
        assert [found[p] for p in "pq"] == [wanted["responses"]] * 2
        assert all(one["rank"] is None for one in found["silent"])
        examples, report = preference_examples(sources.rows_from(rows), Tokenizer(tiny()), limits, aggregate=method)
        assert len(examples) == 2 and report.dropped == {"with fewer than two ranked responses": 1}


def test_values_that_are_equal_are_one(tmp_path):
    """However their fields are ordered."""
    made = [item("x", {"name": "a", "t": 1}, 0), item("y", "b", 1), item("z", {"t": 1, "name": "a"}, 2)]
    rows = [{"prompt": "p", "responses": made}]
    [row] = datasets.run_aggregate(DataAggregateArgs(path=write(tmp_path / "r.jsonl", rows), by="model", intervals=0))
    assert [one["strength"] for one in row["responses"]] == [0, 0]


def test_one_value_compares_nothing(tmp_path):
    rows = [{"prompt": p, "responses": [item("x", "a", 0), item("y", "a", 1)]} for p in "pq"]
    with pytest.raises(UserError, match='all responses have one "model"'):
        datasets.run_aggregate(DataAggregateArgs(path=write(tmp_path / "r.jsonl", rows), by="model"))


def test_the_verdicts_on_one_text_that_stands_twice_all_count(tmp_path):
    rows = [{"prompt": "a", "responses": ["x", "y", "x"], "ranks": [0, 1, 2]}]
    [row] = datasets.run_aggregate(DataAggregateArgs(path=write(tmp_path / "r.jsonl", rows), intervals=20))
    assert [(i["text"], i["rank"]) for i in row["responses"]] == [("x", 0), ("y", 0)]
    labels = [("x", True), ("x", False), ("y", False)]
    rows = [{"prompt": "a", "completion": text, "label": good} for text, good in labels]
    [row] = datasets.run_aggregate(DataAggregateArgs(path=write(tmp_path / "s.jsonl", rows), intervals=0))
    assert [(i["text"], i["rank"]) for i in row["responses"]] == [("x", 0), ("y", 1)]


def test_votes_count_as_ballots_and_fractions_as_parts_of_one(tmp_path):
    """Thirty thousand votes are no more work than three."""
    votes = [[30_000, 10_000, 0], [3, 1, 0], [0.75, 0.25, 0]]
    rows = [{"prompt": f"p{i}", "chosen": "x", "rejected": "y", "votes": v} for i, v in enumerate(votes)]
    out = datasets.run_aggregate(
        DataAggregateArgs(path=write(tmp_path / "r.jsonl", rows), prior=1e-6, method="bradley_terry", intervals=50)
    )
    for row in out:
        assert row["responses"][0]["strength"] == pytest.approx(np.log(3) / 2, abs=1e-3)
    wide = [np.ptp(row["responses"][0]["interval"]) for row in out]
    assert wide[0] < 0.05 < wide[1]


def test_data_commands_run_from_the_command_line(tmp_path):
    path = write(tmp_path / "r.jsonl", ROWS["ranking"])
    call = lambda *a: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "rlhf_jax", "data", *a], capture_output=True, text=True, cwd=tmp_path
    )
    done = call("prepare", path, "--schema", "ranking", "--out", "made")
    assert (done.returncode, done.stderr) == (0, "") and "builder_from_directory" in done.stdout
    done = call("prepare", path, "--schema", "rankings", "--out", "x")
    assert done.returncode == 2 and "give one of sft, preference, ranking, prompts" in done.stderr
    done = call("make", "os:getcwd", "--out", "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "os:getcwd failed (TypeError: posix.getcwd() takes no keyword" in done.stderr
    done = call("inspct", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
