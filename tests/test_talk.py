"""A conversation in the terminal: pieces are one answer, two policies see one conversation, votes are rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import jax
import pytest
from tiny import model_params, toy_directory

from rlhf_jax import cli
from rlhf_jax.commands.chat import held
from rlhf_jax.commands.chat import policy as policy_module
from rlhf_jax.commands.chat.talk import Talk
from rlhf_jax.config import ChatArgs, MeshConfig, SamplingConfig
from rlhf_jax.data.messages import prompt_of
from rlhf_jax.data.schemas import preference_row
from rlhf_jax.data.tokenizer import OTHER_IDS
from rlhf_jax.errors import UserError
from rlhf_jax.inference.generate import Generator
from rlhf_jax.sharding import make_mesh

GREEDY = SamplingConfig(max_new_tokens=5, chunk=2, temperature=0.0)
TALK = [
    *("--plain", "true", "--sampling.max_new_tokens", "5", "--sampling.min_new_tokens", "3"),
    *("--sampling.chunk", "2", "--sampling.temperature", "2"),
]


@pytest.fixture
def typed(monkeypatch):
    """Types lines, then the end of the input."""

    def type_(*lines):
        left = iter(lines)
        monkeypatch.setattr("builtins.input", lambda question: next(left, None) or chat_end())

    def chat_end():
        raise EOFError

    return type_


def taken(pieces):
    """(all that a generator yields, what it returns)."""
    seen = []
    while True:
        try:
            seen.append(next(pieces))
        except StopIteration as end:
            return seen, end.value


def test_the_pieces_of_an_answer_are_that_of_one_draw_and_are_written_as_they_come():
    config, mesh = ChatArgs(sampling=GREEDY, plain=True), make_mesh(MeshConfig())
    policy = policy_module.Policy(str(toy_directory() / "policy"), config, mesh)
    whole = Generator(policy.loaded.model, policy.tokenizer, GREEDY, mesh, max_prompt_length=8)
    with jax.set_mesh(mesh.grid):
        drawn = whole.responses(policy.loaded.params, [{"prompt": "b"}, {"prompt": "c d"}], jax.random.key(0))
    for one in drawn:
        pieces, answer = taken(policy.answer(one.prompt, jax.random.key(1)))
        assert (answer.ids, answer.text, answer.finished) == (one.ids.tolist(), one.text, one.finished)
        assert "".join(pieces) == answer.text and len(pieces) == -(-len(answer.ids) // 2)
    (stop,), (b,) = policy.tokenizer.eos_ids, policy.tokenizer.hf.encode("b", add_special_tokens=False)
    for drawn, finished in (([b, stop], False), ([stop], True)):  # of the last piece one token is kept
        policy._draw = lambda context, *_, last=drawn: (last, True) if len(context) > 4 else ([b, b], False)
        _, answer = taken(policy.answer("b", jax.random.key(1)))
        assert (answer.ids, answer.finished) == ([b] * 4 + drawn[:1], finished)


def test_a_conversation_holds_what_was_preferred_and_texts_have_no_history():
    talk = Talk([{"role": "system", "content": "s"}])
    talk.ask("one")
    talk.answered("1")
    talk.answered("2")  # another answer in its place
    talk.ask("two")
    said = [(turn["role"], turn["content"]) for turn in talk.prompt]
    assert said == [("system", "s"), ("user", "one"), ("assistant", "2"), ("user", "two")]
    plain = Talk(None)
    plain.ask("one")
    plain.ask("two")
    assert plain.prompt == "two"


def test_what_got_an_empty_answer_is_no_turn_so_that_every_prompt_is_one_that_training_reads(
    typed, capsys, monkeypatch
):
    talk = Talk([])
    for question, answer in (("one", ""), ("two", " \n"), ("three", "3"), ("four", "")):
        talk.ask(question)
        talk.answered(answer)
        assert talk.is_answered == (answer == "3")
        assert prompt_of({}, talk.prompt) == talk.prompt
    assert [turn["content"] for turn in talk.prompt] == ["three", "3", "four"]

    seen = []
    monkeypatch.setattr(policy_module.Policy, "__init__", lambda self, *_: None)
    monkeypatch.setattr(policy_module.Policy, "answer", lambda self, prompt, key: silent(seen, prompt))
    typed("b", "   ", "c", "/again")
    cli.dispatch(["chat", "somewhere"])
    assert [prompt[-1]["content"] for prompt in seen] == ["b", "c", "c"] and {len(prompt) for prompt in seen} == {1}
    assert capsys.readouterr().out.count("[the answer is empty, so what is said next takes the place of the ques") == 3


def silent(seen, prompt):
    """A policy that says nothing."""
    seen.append(prompt)
    yield ""
    return policy_module.Answer("", [1], True)


def test_two_policies_answer_with_the_same_noise_and_votes_are_rows_that_a_reward_model_reads(
    typed, tmp_path, monkeypatch, capsys
):
    place, output = str(toy_directory() / "policy"), tmp_path / "votes.jsonl"
    typed("b", "c", "/again", "/reset", "/again")
    cli.dispatch(["chat", place, place, *TALK])  # never asks: both say the same
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:2] in ("A:", "B:")]
    assert len(lines) == 6 and [line[2:] for line in lines[::2]] == [line[2:] for line in lines[1::2]]
    assert lines[2] != lines[4]  # other noise

    load = policy_module.load_model
    monkeypatch.setattr(policy_module, "load_model", lambda *given: moved(load(*given), given[0].path))
    typed("e d b", "a", "c", "b", "d", "t", "e", "", "/quit")
    (tmp_path / "other").symlink_to(place)
    cli.dispatch(["chat", place, str(tmp_path / "other"), "--output", str(output), *TALK, "--max_prompt_length", "2"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    said = capsys.readouterr().out
    assert re.search(r"^3 votes in .*; preferred: .*policy 1; .*other 1; ties 1$", said, re.M) and [
        row["prompt"] for row in rows
    ] == ["e d b", "c", "d"]
    assert said.count("[the first 1 tokens were not seen: max_prompt_length]") == 2  # of both policies
    assert [row.get("prompt_seen") for row in rows] == ["d b", None, None]
    assert [row["models"][0] == place for row in rows] == [True, False, True]
    policy, remarks = policy_module.load_tokenizer(replace(ChatArgs().model, path=place)), Counter[str]()
    for row, label in zip(rows, (1, 1, 0.5), strict=True):
        assert preference_row(row)["label"] == label
        for side, finished in zip(("chosen", "rejected"), row["finished"], strict=True):
            ids = row[f"{side}_ids"]
            assert policy.encode_response(row[side], row["prompt"], finished=finished, ids=ids, remarks=remarks) == ids
    assert not remarks[OTHER_IDS]


@pytest.mark.parametrize(("there", "line"), [
    (b'{"prompt": "b", "response": "c"}\n', "votes.jsonl:1: not a vote of `rlhf-jax chat`; choose another --output"),
    (b'{"prompt": "b"}\n{"text": "c"}', "votes.jsonl: the last line is no vote of `rlhf-jax chat`"),
    (b"notes", "votes.jsonl: the last line is no vote of `rlhf-jax chat`"),
])  # fmt: skip
def test_a_file_of_others_gets_no_votes_and_loses_no_line(tmp_path, there, line):
    (tmp_path / "votes.jsonl").write_bytes(there)
    with pytest.raises(UserError, match=line):
        cli.dispatch(["chat", "nowhere", "--output", str(tmp_path / "votes.jsonl")])
    assert (tmp_path / "votes.jsonl").read_bytes() == there


def test_votes_without_a_last_line_break_stay_and_one_process_writes(tmp_path):
    vote = {"prompt": "b", "chosen": "c", "rejected": "d", "votes": [1, 0, 0], "models": ["x", "y"]}
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(vote))
    with held(str(path)) as lines:
        with pytest.raises(UserError, match="is being written by another process"), held(str(path)):
            pass
        lines.add([vote])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [vote, vote]


def moved(loaded, path):
    """A policy with other weights if its path says so."""
    return replace(loaded, params=model_params(loaded.model, 7)) if path.endswith("other") else loaded


@pytest.mark.parametrize(("given", "line"), [
    ([], "no policy is named"),
    (["a", "b", "c"], "more than two"),
    (["a", "--system", "x", "--plain", "true"], "leave one out"),
    (["a", "--output", "v.txt"], "name a .jsonl file"),
    (["a", "--blind", "true"], "blind hides which of two policies said what, and models has 1; name two"),
    (["none"], "no such directory"),
])  # fmt: skip
def test_what_cannot_be_talked_to_is_one_line(given, line):
    with pytest.raises(UserError, match=line):
        cli.dispatch(["chat", *given])
