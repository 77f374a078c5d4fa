"""Judges: what answers mean, how biases cancel and show, and what becomes of nonsense, hangs and broken servers."""

from __future__ import annotations

import http.server
import json
import math
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ONE, byte_tokenizer, model_params

from rlhf_jax.config import ArchConfig, JudgeConfig, MeshConfig, ModelConfig
from rlhf_jax.data.agreement import length_bias
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judge import NO_ANSWER, NONSENSE, Judge, Verdict, parse, ranks
from rlhf_jax.feedback.judges import PAIRS, ModelJudge, ask_function, ask_server, expected, filled, make_judge
from rlhf_jax.feedback.report import judge_lines, judge_report
from rlhf_jax.hosts import attempts
from rlhf_jax.inference.scoring import Likelihood, example_of
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded, save_model
from rlhf_jax.sharding import make_mesh

KEY = jax.random.key(0)


def judge_of(fn, **options) -> Judge:
    return Judge(ask_function(fn, timeout=0, retries=0), **options)


SAID = {
    1.0: [
        "A", " A\n", "a", "A.", "(A)", "**A**", '"A"', "[A]", "Answer: A", "answer: a", "Response A",
        "The answer is A",
        "The better response is A.", "The better response is Response A because it is true.", "Response A is better.",
        "A is better than B.", "A is more helpful than B", "A is better because B is not relevant.", "I think A.",
        "I'd go with A.", "I prefer A over B.", "A wins.", "A\n\nResponse A is shorter than B.", "A. It is shorter.",
        "A, because it answers.", "A because it is right", "My final answer: A", "Winner: A", "[[a]]",
        '{"winner": "A"}', "Long talk about B and A.\n\nAnswer: A", "I'd say A, because it is true.", 1, True,
        np.True_, np.int64(1), jnp.asarray(1.0), Fraction(1), Decimal(1),
    ],
    0.0: [
        "B", "b", " B.", "**B**", "A is vague and B is wrong, so [[B]]", "A good answer is B", "A better answer is B.",
        "A short answer: B", "A response like B is better", "I think B is better than A.", "Response B", 0.0,
    ],
    0.5: ["tie", "TIE", "A tie", "a tie.", "It is a tie.", "It\u2019s a tie", "[[C]]", "[[tie]]", "Answer: tie",
          np.float32(0.5)],
    0.25: [0.25],
    NONSENSE: [
        "", "A or B", "a good one", "A good answer", "A response should be short.", "A few words", "Banana", "A's",
        "A-",
        "[[A]] or [[B]]", "A/B", "A\nB", "Neither A nor B", "A and B are equally good", "A is worse.", "Not A",
        "A is not better.", "A isn't better than B", "I don't think A is better", "The worse response is A.",
        "A better answer would say more.", "A: 7/10. B: 9/10", "A. Blue\nB. Green", "As an AI, A model cannot choose",
        "If A is better, say so", "The better response is A or B", "It is not a tie", "A tie-breaker is needed", "C",
        "A=B", "A: B", "I think A is worse than B.", "I'd say A is wrong.", "Could it be that A wins?",
        "Is A better than B? I cannot tell", "I think A, though short, is worse than B", np.ones(2),
        "The better response is a", "Both are good.\nThis is a", "I'd say a", "I cannot choose A",  # cut, and a not
        "I don\u2019t think A is better", 1.5, -0.1, None, float("nan"), ["A"],
    ],
}  # fmt: skip
"""What an answer means -> answers."""


@pytest.mark.parametrize(
    ("answer", "meaning"), [(answer, meaning) for meaning, each in SAID.items() for answer in each]
)
def test_an_answer_means_one_thing_or_nothing(answer, meaning):
    assert parse(answer) == meaning


@pytest.mark.parametrize("bias", [0.0, 0.1, 0.3])
def test_a_liking_for_a_place_shows_and_cancels(bias):
    """methods.md: a judge biased by b toward A shows 1/2 + b raw, and 1/2 +- .02 once both orders are asked."""
    rng = np.random.default_rng(0)
    pairs = [("p", [f"{n} a", f"{n} b"]) for n in range(6000)]
    biased = lambda prompt, a, b: "A" if rng.random() < 0.5 + bias else "B"  # noqa: E731
    found = judge_report([v for each in judge_of(biased).verdicts(pairs, KEY) for v in each])
    assert found["raw_first"] == pytest.approx(0.5 + bias, abs=0.02)
    assert found["slot_a"] == pytest.approx(0.5 + bias, abs=0.02)
    assert found["first"] == pytest.approx(0.5, abs=0.02)
    one_order = judge_report([v for each in judge_of(biased, both_orders=False).verdicts(pairs, KEY) for v in each])
    assert one_order["first"] == pytest.approx(0.5 + bias, abs=0.02) and one_order["consistency"] is None


@pytest.mark.parametrize(
    ("straight", "turned", "inconsistent", "share"),
    [
        (1.0, 0.0, "tie", 1.0),  # A, then B: the first response both times
        (0.9, 0.3, "tie", 0.8),
        (1.0, 1.0, "tie", 0.5),  # A, then A: each order another response
        (0.9, 0.8, "tie", 0.5),
        (0.9, 0.8, "mean", 0.55),
        (0.9, 0.8, "drop", None),
        (1.0, 0.5, "tie", 0.75),  # a tie contradicts nothing
        (0.2, 0.9, "drop", 0.15),
        (0.9, "?", "mean", None),  # one order alone would let its place decide
    ],
)
def test_both_orders_average_to_known_shares(straight, turned, inconsistent, share):
    judge = judge_of(lambda prompt, a, b: straight if a == "x" else turned, inconsistent=inconsistent)
    assert judge("p", "x", "y") == (None if share is None else pytest.approx(share))


def test_votes_are_averaged_within_an_order():
    said = iter(["A", "A", "B", "?", "B", "B"])  # 2/3 for x, then (without nonsense) 1 for x
    verdict = judge_of(lambda *question: next(said), votes=3).verdicts([("p", ["x", "y"])], KEY)[0][0]
    assert verdict.share == pytest.approx((2 / 3 + 1) / 2)
    assert judge_report([verdict])["nonsense"] == 1 and judge_report([verdict])["answers"] == 6


def test_a_ranking_of_several_asks_every_pair_of_different_texts_in_both_orders():
    asked = []

    def longest(prompt, a, b):
        asked.append((a, b))
        return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"

    texts = ["bb", "a", "cccc", "dd", "a"]
    verdicts = judge_of(longest).verdicts([("p", texts), ("q", ["z"])], KEY)
    assert ranks(5, verdicts[0]) == [1, 2, 0, 1, 2] and verdicts[1] == [] and ranks(1, []) == [None]
    assert len(asked) == 2 * 9 and len(set(asked)) == 2 * 6 and ("a", "a") not in asked  # a is there twice
    found = judge_report(verdicts[0])
    assert found["equal"] == 1 and found["ties"] == 1 and found["consistency"] == 1 and found["slot_a"] == 0.5
    assert found["longer_wins"] == 1 and found["length_correlation"] > 0.9
    assert any("!" in line and "length" in line for line in judge_lines(found))


def test_length_bias_of_known_pairs():
    correlation, wins = length_bias(np.array([3.0, -4.0, 0.0, 5.0]), np.array([0.5, 0.5, 0.5, 0.0]))
    assert wins == 0.5  # of the two with a difference and a decision
    assert correlation == pytest.approx((1.5 - 2.0) / math.sqrt((9 + 16 + 25) * 0.75))
    assert length_bias(np.zeros(2), np.ones(2)) == (None, None)


def test_nonsense_and_hangs_are_counted_and_give_no_verdict(monkeypatch):
    monkeypatch.setattr(attempts, "RETRY_WAIT", 0.0)
    calls = []

    def unreliable(prompt, a, b):
        calls.append(prompt)
        if prompt == "hang":
            time.sleep(20)
        return "I cannot say" if prompt == "nonsense" else "A" if a == "x" else "B"

    judge = Judge(ask_function(unreliable, timeout=0.05, retries=1))
    verdicts = [
        v for each in judge.verdicts([(p, ["x", "y"]) for p in ("hang", "nonsense", "fine")], KEY) for v in each
    ]
    assert [v.share for v in verdicts] == [None, None, 1.0]
    assert verdicts[0].forward == [NO_ANSWER] and calls.count("hang") == 4  # two orders, one retry each
    found = judge_report(verdicts)
    assert (found["no_answer"], found["nonsense"], found["no_verdict"], found["answers"]) == (2, 2, 2, 6)
    assert any("!" in line and "nonsense" in line for line in judge_lines(found))
    assert "any of 4 questions" not in judge_lines(found)[-1]
    assert "any of 4 questions" in judge_lines(judge_report(verdicts[:2]))[-1]
    assert judge_report([])["slot_a"] is None and judge_lines(judge_report([]))


def test_a_judge_that_raises_is_an_error():
    def broken(prompt, a, b):
        raise KeyError("nothing")

    with pytest.raises(UserError, match="judge function broken: KeyError: 'nothing'; mend it"):
        judge_of(broken)("p", "x", "y")


@pytest.mark.parametrize("failure", [time.sleep, sys.exit])
def test_a_judge_that_never_answers_ends_it(monkeypatch, failure):
    monkeypatch.setattr(attempts, "RETRY_WAIT", 0.0)
    judge = Judge(ask_function(lambda prompt, a, b: failure(20), timeout=0.02, retries=0))
    with pytest.raises(UserError, match="2 questions in a row had no answer"):
        judge("p", "x", "y")
    with pytest.raises(UserError, match="16 questions in a row had no answer"):  # whatever comes after
        judge.verdicts([("p", [str(i) for i in range(9)])], KEY)


def test_braces_within_texts_stay():
    config = JudgeConfig(template="{prompt}|{a}|{b}")
    assert filled(config, ("{a}", "{b} {x}", "\\1")) == "{a}|{b} {x}|\\1"


# --- a server


class Handler(http.server.BaseHTTPRequestHandler):
    """Prefers the response with more x; misbehaves as the prompt says."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        prompt, a, b = body["messages"][0]["content"].split("|")
        earlier = sum(1 for _, _, old in self.server.seen if old == body)
        if prompt == "slow":
            time.sleep(1.0)
        if prompt == "moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            return
        failing = prompt == "broken" or (prompt == "flaky" and earlier == 1)
        code = 503 if failing else 401 if prompt == "secret" else 200
        text = {"odd": "Who knows?", "empty": None}.get(prompt, self.server.says(a, b))
        choice = {"message": {"content": text}}
        if body.get("logprobs") and prompt != "odd":
            likeliest = [{"token": token, "logprob": math.log(p)} for token, p in text.items()]
            choice["logprobs"] = {"content": [{"top_logprobs": likeliest[: body["top_logprobs"]]}]}
        reply = json.dumps({"choices": [choice]} if prompt != "junk" else [1]).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(attempts, "RETRY_WAIT", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.seen, found.handle_error = [], lambda *args: None  # a client that gave up is no news
        found.says = lambda a, b: "A" if a.count("x") > b.count("x") else "B"
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def served(server, **options) -> Judge:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    config = JudgeConfig(url=url, url_model="m", template="{prompt}|{a}|{b}", **{"retries": 1, **options})
    return Judge(ask_server(config))


def test_a_server_is_asked_as_openai_would_be(server, monkeypatch, capfd):
    monkeypatch.setenv("A_KEY", "sesame")
    judge = served(server, api_key_env="A_KEY", workers=3)
    groups = [(f"p{i}", ["x" * i, "x" * (9 - i)]) for i in range(8)]
    assert [v.share for each in judge.verdicts(groups, KEY) for v in each] == [0.0] * 5 + [1.0] * 3
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sesame"
    assert body["model"] == "m" and body["temperature"] == 0 and body["max_tokens"] == 16
    assert "sesame" not in "".join(capfd.readouterr())


def test_a_server_that_misbehaves_is_counted(server):
    judge = served(server, timeout=0.2)
    names = ["fine", "flaky", "odd", "empty", "junk", "broken", "slow"]
    found = [v for each in judge.verdicts([(name, ["xx", "x"]) for name in names], KEY) for v in each]
    assert [v.share for v in found] == [1.0, 1.0, None, None, None, None, None]
    assert [v.forward[0] for v in found[2:]] == [NONSENSE] * 2 + [NO_ANSWER] * 3
    tries = [body["messages"][0]["content"].split("|")[0] for _, _, body in server.seen]
    assert tries.count("broken") == 4 and tries.count("flaky") == 4 and tries.count("odd") == 2


@pytest.mark.parametrize(("prompt", "code"), [("secret", "401 Unauthorized"), ("moved", "302 Found")])
def test_a_server_that_refuses_or_points_elsewhere_is_an_error(server, prompt, code, monkeypatch):
    monkeypatch.setenv("A_KEY", "sesame")
    with pytest.raises(UserError, match=f"answered {code}; check the address") as error:
        served(server, api_key_env="A_KEY")(prompt, "x", "y")
    assert "sesame" not in str(error.value) and len(server.seen) <= 2  # not tried again


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"url": "localhost:8000"}, "no http address"),
        ({"url": "file:///etc/passwd"}, "no http address"),
        (
            {"url": "http://localhost", "api_key_env": "NO_SUCH_KEY"},
            "judge.api_key_env names no environment variable that is set",
        ),
        ({}, "none is given"),
        ({"url": "http://localhost", "function": "a:b"}, "judge.function and judge.url are given"),
    ],
)
def test_judges_that_cannot_be_asked_say_so(options, line):
    with pytest.raises(UserError, match=line):
        make_judge(JudgeConfig(**options), make_mesh(MeshConfig(), devices=ONE))


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [
        (-0.5, -0.5, 0.5),
        (-800.0, -801.0, 1 / (1 + math.exp(-1))),
        (-9999.0, -9999.0, 0.5),
        (-math.inf, -3.0, 0.0),
        (1e-7, -40.0, 1.0),
        (-math.inf, -math.inf, NONSENSE),
        (math.nan, -1.0, NONSENSE),
        (-1.0, math.nan, NONSENSE),
        (math.inf, -1.0, NONSENSE),
        (2.5, -1.0, NONSENSE),
        (True, -1.0, NONSENSE),
    ],
)
def test_log_probs_of_any_size_are_weighed_and_what_is_none_is_no_answer(a, b, share):
    """A NaN among them was a verdict of NaN; two of less than -745 were none."""
    said = [{"token": "A", "logprob": a}, {"token": " B", "logprob": b}, {"token": "The", "logprob": -0.1}]
    found = expected(PAIRS, said)
    assert found == (share if isinstance(share, str) else pytest.approx(share))


# --- a language model


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A random decoder over bytes."""
    path = tmp_path_factory.mktemp("judge") / "lm"
    hf = byte_tokenizer()
    arch = ArchConfig(
        vocab_size=len(hf), width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_width=32,
        max_positions=160,
    )  # fmt: skip
    model = Model(arch)
    hf.save_pretrained(path.parent / "tokenizer")
    params = jax.device_put(model_params(model, 3), jax.sharding.SingleDeviceSharding(ONE[0]))
    save_model(path, Loaded(model, params), params, Tokenizer.load(str(path.parent / "tokenizer")))
    return path


TEMPLATE = "{prompt} A:{a} B:{b} Best:"


def test_the_log_probs_of_the_letters_are_the_verdict(language_model):
    """p = p(" A") / (p(" A") + p(" B")) after the question, each letter with the space that text puts before it."""
    mesh = make_mesh(MeshConfig(), devices=ONE)
    config = JudgeConfig(model=ModelConfig(path=str(language_model)), template=TEMPLATE, max_prompt_length=120)
    judge = ModelJudge(config, mesh)
    questions = [("Tea?", "yes", "no"), ("Coffee or milk?", "milk", "both, please")]
    found = judge(questions, KEY)
    model, params, tokenizer = judge.loaded.model, judge.loaded.params, judge.tokenizer
    for question, p in zip(questions, found, strict=True):
        ids = tokenizer.encode_prompt(filled(config, question))
        total = []
        for letter in (" A", " B"):
            tokens = np.array([*ids, *tokenizer.hf(letter)["input_ids"]])[None]
            places = np.arange(tokens.shape[1])[None]
            hidden = model.apply(params, tokens, places, np.ones_like(tokens))
            logits = np.asarray(model.project(params, hidden), np.float64)[0]
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total.append(sum(logprobs[i - 1, tokens[0, i]] for i in range(len(ids), tokens.shape[1])))
        assert p == pytest.approx(1 / (1 + np.exp(total[1] - total[0])), abs=1e-5)
    assert abs(found[0] - found[1]) > 0.01  # the question matters
    with pytest.raises(UserError, match=r"has \d+ tokens, more than judge.max_prompt_length 120; raise it"):
        judge([("x" * 200, "a", "b")], KEY)


def test_what_a_model_writes_is_parsed_and_random_text_is_nonsense(language_model):
    mesh = make_mesh(MeshConfig(), devices=ONE)
    config = JudgeConfig(
        model=ModelConfig(path=str(language_model)), template=TEMPLATE, max_prompt_length=120, answer="sample",
        temperature=1.0, votes=2, max_new_tokens=3, batch_size=4,
    )  # fmt: skip
    judge = make_judge(config, mesh)
    groups = [(f"Number {n}?", ["one", "two", "three"]) for n in range(3)]
    first, again = (judge.verdicts(groups, KEY) for _ in range(2))
    assert first == again  # the key decides
    found = judge_report([v for each in first for v in each])
    assert found["answers"] == 3 * 3 * 4 and found["nonsense"] > 18


def test_log_probs_do_not_depend_on_padding_or_batch(language_model):
    mesh = make_mesh(MeshConfig(), devices=ONE)
    judge = ModelJudge(
        JudgeConfig(model=ModelConfig(path=str(language_model)), template=TEMPLATE, max_prompt_length=120), mesh
    )
    rng = np.random.default_rng(0)
    examples = [example_of(rng.integers(3, 200, n), rng.integers(3, 200, m)) for n, m in [(3, 4), (20, 1), (0, 5)]]
    model, params = judge.loaded.model, judge.loaded.params
    alone = [Likelihood(model, mesh, batch_size=1, multiple=1).targets(params, [e])[0] for e in examples]
    together = Likelihood(model, mesh, batch_size=2).targets(params, examples)
    assert [len(x) for x in together] == [4, 1, 4]  # nothing predicts a first token
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_verdict_goes_through_json():
    verdict = Verdict(0, 1, [0.1 + 0.2, NONSENSE], [0.25], None, -3)
    assert Verdict(**json.loads(json.dumps(vars(verdict)))) == verdict
