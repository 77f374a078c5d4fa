"""Verifiers: known answers and traps, and that no response hangs or escapes the process that judges it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.config import RewardSourceConfig, resolve
from rlhf_jax.data.sources import read_rows
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.report import passes_at
from rlhf_jax.inference.reward_functions import combine
from rlhf_jax.tasks import gsm8k
from rlhf_jax.tasks.verifiers import programs, texts
from rlhf_jax.tasks.verifiers.sandbox import KERNELS, libc
from rlhf_jax.tasks.verifiers.texts import number_of

DATA = Path(__file__).parents[2] / "shared" / "data" / "rows"


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module} (the extra verifiers)")


def scores(name, responses, **columns):
    """By the name in a config, called as the methods call it."""
    config = RewardSourceConfig(functions=[f"rlhf_jax.tasks.verifiers:{name}"], timeout=120, retries=0)
    return combine(config, None)(["p"] * len(responses), list(responses), columns).tolist()


NUMBERS = [
    ("#### 18", "18", 1), ("#### 18", "17", 0), ("#### 1,234", 1234, 1), ("#### 1234", "1,234", 1),
    ("#### $18.00", "18", 1), ("A: 26", "26", 1), ("so 16-3 = 13.", 13, 1), ("it is -3", 3, 0), ("it is -3", -3, 1),
    ("16-3", 3, 1), ("-$5", -5, 1), ("3/4 of it", "0.75", 1), (r"\boxed{\frac{3}{4}}", "3/4", 1),
    (r"\boxed{18\text{ m}^2}", 18, 1),
    ("$1{,}234$", 1234, 1),
    (r"\boxed{x = 18} of 20", 18, 1), (r"\boxed{3} or \boxed{4}", 3, 0), (r"\boxed{3} or \boxed{4}", 4, 1),
    ("#### 17\nNo: #### 18", 18, 1), ("#### 18\nor 17", 18, 1), ("#### none, though 18", 17, 0), ("18 #### ", 18, 0),
    ("", 0, 0), ("none", 0, 0), ("1/0", 0, 0), (".5", 0.5, 1), ("5e3", 5000, 1), ("1e999999999", 1, 0),
    ("9" * 10_000, 9, 0), ("it is...18", 18, 1), ("10%", 10, 1), ("0.1", 0.1, 1), ("0.30000000000000004", 0.3, 0),
    ("#### 18", "9 * 2 = 18\n#### 18", 1), ("1,2345", 12345, 0), ("1 234", 1234, 0),
    ("\u22123", 3, 0), ("#### \u22123", -3, 1),
    # A sign and its number, whatever stands between them; a dash of a list or between operands is none.
    ("#### - 3", 3, 0), ("#### - 3", -3, 1), ("####-3", -3, 1), ("#### -$3", -3, 1), ("#### $-3", -3, 1),
    ("#### $ -3", -3, 1), ("#### - $ 3", -3, 1), ("#### \u2212 3", -3, 1), ("#### \u20133 apples", -3, 1),
    (r"\boxed{-\$3}", -3, 1), (r"\boxed{- 3}", 3, 0), ("#### (-3)", -3, 1), ("#### minus 3", 3, 0), ("- 3", -3, 1),
    ("#### Negative 3", -3, 1), ("x = - 3", -3, 1), ("It is: - 3", -3, 1), ("We have\n- 3 eggs", 3, 1),
    ("7 - 3", 3, 1), ("it is -\u20ac3", -3, 1), ("#### \u00a35", 5, 1), ("- 4 eggs\n- 3 eggs", 3, 1),
    # As the answers of the set are written.
    ("#### 3.", 3, 1), ("#### 1,000.", 1000, 1), ("#### 50%", 50, 1), ("#### 3 apples", 3, 1), ("#### +3", 3, 1),
    ("#### **18**", 18, 1), ("#### 18 / day", 18, 1), ("#### 3x = 18", 18, 1), ("#### 18, 20", 18, 1),
    # What only begins with the right number is not it.
    ("#### 10 - 3 = 7", 10, 0), ("#### 10 - 3 = 7", 7, 1), ("#### 10 - 3", 10, 0), ("#### 10 - 3", 3, 0),
    ("#### 3,5", 3, 0), ("#### 1,2345", 1, 0), ("#### 1.2.3", "1.2", 0), ("#### 3 * 4", 3, 0), ("#### 10^2", 10, 0),
    (r"\boxed{3 \times 4}", 3, 0), (r"\boxed{2\sqrt{3}}", 2, 0), ("#### 3 / 4", 3, 0), ("#### 3 / 4", 0.75, 1),
    ("#### 1 1/2", 1, 0), ("#### 1 1/2", 1.5, 1), (r"\boxed{-1\frac{1}{2}}", -1.5, 1), ("#### 18-20", 18, 0),
    # Fractions, signs, thousands and powers as LaTeX and models write them.
    (r"\boxed{\frac34}", 0.75, 1), (r"\boxed{\frac34}", 34, 0), (r"\boxed{-\dfrac{3}4}", -0.75, 1),
    (r"\boxed{\frac{-6}{2}}", -3, 1), (r"\boxed{\frac{-6}{2}}", -6, 0), (r"\boxed{2\frac12}", 2.5, 1),
    ("First.\nSo it is -\\frac{1}{2}.", -0.5, 1), (r"\boxed{\frac{3x}{4}}", 3, 0), (r"\boxed{\sqrt{16}}", 16, 0),
    (r"\boxed{\pm 5}", 5, 0), (r"\boxed{10^{3}}", 10, 0), ("#### 10^-3", 10, 0), ("#### 10\u00b2", 10, 0),
    ("#### \u20113", 3, 0), ("#### \u20113", -3, 1), ("it is \u20113", -3, 1), ("#### 1\u00bd cups", 1, 0),
    ("#### 1\u00bd cups", 1.5, 1), ("it is -\u00be", -0.75, 1), ("#### 1\u202f234", 1234, 1), ("1\u00a0234", 1234, 1),
    ("#### 1 234", 1, 0), ("#### 1_000", 1, 0), ("#### 1'000", 1, 0), ("#### 2:30", 2, 0), ("#### 5 m\u00b2", 5, 1),
    ("#### 3\u20444", 0.75, 1),
    # Powers, factorials, products, several numbers and parts of formulas are not what they begin or end with.
    ("#### 5!", 5, 0), (r"\boxed{5!}", 5, 0), ("The answer is 18!", 18, 1), ("#### 2 x 3", 2, 0), ("#### 2x3", 2, 0),
    ("#### 2 * x", 2, 0), ("#### 5 + x", 5, 0), ("#### 2^n", 2, 0), ("#### x^2", 2, 0), ("#### f(5)", 5, 0),
    ("#### \u221a16", 16, 0), ("#### sqrt(16)", 16, 0), ("#### 3 \u00d7 4", 3, 0), ("#### 2\u03c0", 2, 0),
    ("#### 2 or 3", 2, 0), (r"\boxed{2 \text{ or } 3}", 2, 0), ("#### 2 out of 3", 2, 0), ("#### 3 and a half", 3, 0),
    ("#### 3 hours 20 minutes", 3, 0), ("#### 5 squared", 5, 0), ("#### 2 : 3", 2, 0), ("#### 18 (eighteen)", 18, 1),
    ("#### 5 million", 5, 0), ("#### 5 million", 5_000_000, 1), ("#### $1.5 billion.", 1_500_000_000, 1),
    (r"\boxed{5\text{ thousand dollars}}", 5000, 1), ("#### 5k", 5, 0), ("#### $5M", 5, 0), ("#### 5 km", 5, 1),
    ("so 2-thousand, -3 million", -3_000_000, 1), ("#### 1/2 million", 0.5, 0), ("#### 5 hundred thousand", 500, 0),
    ("#### 5 dozen eggs", 5, 1), ("#### 18 m/s", 18, 1), ("#### 18 cm\u00b2", 18, 1),
]  # fmt: skip


def test_gsm8k_reads_one_final_number_and_compares_it_exactly():
    responses, answers, wanted = zip(*NUMBERS, strict=True)
    assert scores("gsm8k", responses, answer=list(answers)) == list(wanted)
    start = time.process_time()
    scores("gsm8k", ["1," * 100_000, r"\boxed{" * 20_000, "-" * 100_000], answer=[1, 1, 1])
    assert time.process_time() - start < 2
    with pytest.raises(UserError, match=r"^gsm8k: the answer 'none' holds no number; give every row one$"):
        scores("gsm8k", ["1"], answer=["none"])


LATEX = [
    (r"\boxed{\frac{1}{2}}", "0.5", 1), (r"so $\frac12$.", r"\frac{1}{2}", 1),
    (r"\boxed{\sqrt{\frac{1}{4}}}", "1/2", 1),
    (r"\boxed{\frac{1}{\frac{2}{3}}}", "1.5", 1), (r"\boxed{5\text{ cm}}", "5", 1), (r"\boxed{50\%}", "50", 1),
    (r"\boxed{1,234}", 1234, 1), ("1234", "1,234", 1), ("#### 1,234", 1234, 1), (r"\boxed{2x+2}", "2(x+1)", 1),
    (r"\boxed{(1,2)}", "(2,1)", 0), (r"\boxed{\{1,2\}}", r"\{2,1\}", 1), (r"\boxed{3} or \boxed{4}", "3", 0),
    (r"\boxed{3} or \boxed{4}", "4", 1), (r"\boxed{x=4}", "4", 1), (r"\boxed{3", "4", 0), ("", "3", 0), ("no", "3", 0),
    (r"The area is \boxed{\pi}.", r"We find \boxed{\pi} cm.", 1),
    (r"\boxed{1\,234}", "1234", 1), (r"\boxed{(1\,,\,234)}", "(1,234)", 1), (r"\boxed{\text{even}}", "even", 1),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1),
    # Prose is no product of its letters, and a formula no prose.
    ("first 3 then 4, so we have 12", "12", 1), ("#### 1,234 dollars", "1234", 1), ("it is -5", "-5", 1),
    ("Thus $x=3$ and $y=4$, so $x+y=7$", "7", 1), ("2x+3", "2x+3", 1), ("2x+3", "2", 0), ("sqrt(2)", r"\sqrt{2}", 1),
    (r"\boxed{x=3 and y=4}", "x=3, y=4", 1), ("Monday", "Monday", 1),
    (r"\boxed{9^{9^{9^{9}}}}", "3", 0),
    ("#### 18.", "18", 1), ("#### $1,000.\n", 1000, 1), (r"so \boxed{12.5.}", "12.5", 1), ("#### 18", "#### 18.", 1),
    ("#### - 3", "-3", 1), ("#### - 3", "3", 0), ("#### \u22123", "-3", 1),
    ("#### 1 1/2", "1", 0), ("#### 1 1/2", "3/2", 1), (r"\boxed{-2 1/2}", "-5/2", 1), ("3/2", "1 1/2", 1),
    ("#### 1\u00bd cups", "1.5", 1), ("#### \u20113", "-3", 1), ("#### 1\u202f234 m", "1234", 1),
    (r"\boxed{5 000}", "5000", 1), (r"\boxed{5 000}", "0", 0), ("#### 90\u00b0", "90", 1), ("1 100/200", "1.5", 1),
    # Units: of one side they are left out, of both compared; letters of formulas are none.
    (r"\boxed{20 cm^2}", "20", 1), ("20", r"20\text{ cm}^2", 1), (r"20\text{ cm}^2", "20 square centimeters", 1),
    ("20 cm^2", "20 cm", 0), ("20 cm\u00b2", "20 m^2", 0), ("5 km/h", "5", 1), ("5 km/h", "5 kilometers per hour", 1),
    ("5\u00b0C", "5", 1), (r"\boxed{5^\circ C}", "5\u00b0F", 0), ("9.8 m/s^2", "9.8", 1), ("40 mph", "40", 1),
    (r"\boxed{4\pi cm^2}", r"4\pi", 1), (r"4\pi cm^2", "4", 0), (r"\frac{1}{2} in", "1/2", 1), ("5 cm", "5 in", 0),
    ("5", "5t", 0), ("5x", "5", 0), ("5x m", "5x", 0), ("5 m^2", "5x", 0), ("3 hours 20 minutes", "20", 0),
    # Powers, roots, exponents and multiples as people type them.
    ("10\u00b2", "100", 1), ("10\u00b2", "10", 0), ("10\u207b\u00b3", "0.001", 1), ("x\u00b2 + 1", "1 + x^2", 1),
    ("\u221a16", "4", 1), ("\u221a16", "16", 0), ("2\u221a3", r"2\sqrt{3}", 1), ("\u221a(x+1)", r"\sqrt{x+1}", 1),
    ("1e3", "1000", 1), ("1e3", "1", 0), ("-1.5E-3", "-0.0015", 1), ("it is 2e3.", "2000", 1), ("4 pi", r"4\pi", 1),
    ("5 million", "5000000", 1), ("5 million", "5", 0), ("2 x 3", "6", 1), ("2 x 3", "2", 0), ("3\u00b74", "12", 1),
    ("(\u2212\u221e, 3]", r"(-\infty,3]", 1), ("x \u2265 5", r"x \geq 5", 1),
    # Words are no products of their letters.
    ("silent", "listen", 0), (r"\boxed{\text{silent}}", "listen", 0), ("on", r"\text{no}", 0),
    ("even not", "not even", 0),
    (r"\boxed{\text{Even}}", "even", 1), ("ABC", "abc", 0), (r"\text{red and blue}", "red, blue", 1), ("yx", "xy", 1),
    (r"\boxed{\text{A}}", "A", 1), ("even", "5", 0), ("5", "even", 0), (r"\boxed{No solution.}", "no solution", 1),
]  # fmt: skip


@needs("math_verify")
def test_math_compares_what_formulas_mean_and_no_exponent_hangs_it(monkeypatch, capsys):
    monkeypatch.setattr(texts, "SECONDS", 1)
    responses, answers, wanted = zip(*LATEX, strict=True)
    assert scores("math", responses, answer=list(answers)) == list(wanted)
    for nothing in ("", None):
        with pytest.raises(UserError, match=r"^math: the answer '' is neither a number nor LaTeX"):
            scores("math", ["none"], answer=[nothing])
    assert "took more than 1 s of computing or 2 GiB to check and count as wrong" in capsys.readouterr().out


def test_patterns_are_found_and_one_that_backtracks_for_ever_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(texts, "SECONDS", 0.3)
    responses = ["yes", "no", "", "a" * 50 + "b", "\ud800 yes"]
    patterns = ["(?i)YES", r"\Ayes\Z", "", "^(a+)+$", "yes"]
    assert scores("regex", responses, pattern=patterns) == [1, 0, 1, 0, 1]
    assert "regex: 1 of 5 responses took more than 0.3 s" in capsys.readouterr().out
    for wrong in ("(", None):
        with pytest.raises(UserError, match=r"^regex: the pattern .* does not compile"):
            scores("regex", ["a"], pattern=[wrong])


@needs("jsonschema")
def test_json_is_checked_strictly_and_nothing_is_fetched():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    good = ['{"a": 1}', '```JSON\n{"a": 1}\n```', ' {"a": 1, "b": [null]}\n']
    bad = [
        '{"a": 1.5}',
        '{"a": 1, "b": NaN}',
        '{"a": "x", "a": 1}',
        "",
        "[" * 100_000,
        'Sure: {"a": 1}',
        "{}",
        "9" * 9999,
    ]
    assert scores("json_schema", good + bad, schema=[schema] * 11) == [1] * 3 + [0] * 8
    assert scores("json_schema", good[:1], schema=[json.dumps(schema)]) == [1]
    assert scores("json_schema", ["1"], schema=[{"$ref": "https://example.com/schema"}]) == [0]
    for wrong in ({"type": "nope"}, "{", None):
        with pytest.raises(UserError, match=r"^json_schema: the schema .* is none"):
            scores("json_schema", ["1"], schema=[wrong])


THIEF = """
import os, sys
frame = sys._getframe(1)
while frame:
    for held in [v for v in frame.f_locals.values() if isinstance(v, dict)]:
        for secret in [v for v in held.values() if isinstance(v, str)]:
            for i in range(3, 64):
                try: os.write(i, secret.encode())
                except OSError: pass
    frame = frame.f_back
os._exit(0)
"""
"""It passes on what it finds in the frames that it is called from."""
SQUARE = "def f(x):\n    return x * x\n"
PROGRAMS = {
    SQUARE: 1,
    f"So:\n```python\ndef f(x): pass\n```\nor better\n```python\n{SQUARE}```\nDone.": 1,
    f"```bash\npip install it\n```\nThen:\n```python title='f.py'\n{SQUARE}```\nIt prints:\n```text\n4\n```\n": 1,
    "def f(x): return x + x": 0,
    "": 0,
    "def f(": 0,
    "print('all tests passed'); raise SystemExit(0)": 0,
    "import os; print('ok', flush=True); os._exit(0)": 0,
    f"import os\nos._exit = os.write = print\n{SQUARE}": 1,
    "import os\nos.closerange(3, 10**5)\n" + SQUARE: 0,
    "import os\nfor i in range(3, 3000):\n    try: os.write(i, b'passed')\n    except OSError: pass\nos._exit(0)": 0,
    "import builtins\nbuiltins.exec = builtins.compile = builtins.map = lambda *a, **k: []": 0,
    THIEF: 0,
    f"{SQUARE}\ndef g(x: int): pass\nassert g.__annotations__['x'] is int": 1,
    "def f(x): return f(x)": 0,
    "x = [0] * 10**10": 0,
    "while True: print('x' * 10**5)": 0,
    "open('big', 'wb').write(bytes(10**8))": 0,
    f"open('mine', 'w').write('x')\n{SQUARE}": 1,
    f"import os\nassert 'RLHF_JAX_RUN_CODE' not in os.environ\n{SQUARE}": 1,
}


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv(programs.ALLOWED, "1")
    programs._check_machine()
    monkeypatch.setattr(programs, "SECONDS", 1)


def test_programs_pass_by_their_tests_alone(allowed):
    tests = ["assert f(2) == 4", "assert f(-3) == 9"]
    assert scores("code", PROGRAMS, tests=[tests] * len(PROGRAMS)) == list(PROGRAMS.values())
    cases = [{"input": "3\n", "output": "9"}, {"input": "4", "output": "16\n"}]
    written = {"print(int(input()) ** 2)": 1, "input(); print(9)": 0,
               "print(int(input()) ** 2); raise SystemExit(1)": 0,
               "if __name__ == '__main__':\n    print(int(input()) ** 2, ' ')": 1}  # fmt: skip
    assert scores("code", written, tests=[cases] * 4) == list(written.values())
    assert scores("code", [SQUARE], tests=["assert f(1) == 1"]) == [1]
    for wrong in (None, [], "", [1], [{"input": "1"}]):
        with pytest.raises(UserError, match=r"^code: tests .* are no text"):
            scores("code", [SQUARE], tests=[wrong])


def test_programs_that_never_end_are_ended(allowed, monkeypatch):
    monkeypatch.setattr(programs, "CLOCK", 2)
    start = time.monotonic()
    assert scores("code", ["while True: pass", "import time; time.sleep(1e6)"], tests=["0"] * 2) == [0, 0]
    assert time.monotonic() - start < 30


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's")
def test_programs_reach_neither_processes_nor_network_nor_files_of_ours(allowed, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.write_text("kept")
    programs._check_machine.cache_clear()
    scores("code", [SQUARE], tests=["0"])
    told = capsys.readouterr().out
    assert platform.machine() not in KERNELS or not ("starting processes" in told or "network" in told)
    assert libc.syscall(444, None, 0, 1) < 1 or "writing" not in told, "there is Landlock"
    hostile = {
        "starting processes": "import os\nwhile True: os.fork()",
        "the network": "import socket\nsocket.create_connection(('127.0.0.1', 1))",
        "writing outside a temporary folder": f"open({str(mine)!r}, 'w')",
    }
    held = {what: program for what, program in hostile.items() if what not in told}
    held |= {
        "signals": f"import os; os.kill({os.getpid()}, 9)",
        "limits": "import resource as r; r.setrlimit(r.RLIMIT_CPU, (9, 9))",
    }
    assert scores(
        "code", [f"try:\n    exec({p!r})\nexcept OSError: pass" for p in held.values()], tests=["0"] * len(held)
    )
    assert scores("code", held.values(), tests=["0"] * len(held)) == [0] * len(held)
    assert mine.read_text() == "kept"


def test_what_a_verifier_needs_is_asked_when_it_is_named(monkeypatch):
    monkeypatch.delenv(programs.ALLOWED, raising=False)
    with pytest.raises(
        UserError, match=r"^the verifier code runs programs that a model wrote; set the environment var"
    ):
        resolve("rlhf_jax.tasks.verifiers:code")
    with pytest.raises(UserError, match="RLHF_JAX_RUN_CODE=1"):
        programs.code([], [], tests=[])
    monkeypatch.setattr("rlhf_jax.tasks.verifiers.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^the verifier math needs the package math-verify, .* 'rlhf-jax\[verifiers\]'$"
    ):
        resolve("rlhf_jax.tasks.verifiers:math")
    with pytest.raises(UserError, match="has no function 'maths'"):
        resolve("rlhf_jax.tasks.verifiers:maths")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")
def test_real_solutions_are_right_and_those_of_other_questions_wrong():
    rows = read_rows(str(DATA / "gsm8k_test.sft.jsonl.gz"))
    solutions, answers = [row["response"][0]["content"] for row in rows], [row["answer"] for row in rows]
    others = solutions[1:] + solutions[:1]
    same = [a == b for a, b in zip(answers, answers[1:] + answers[:1], strict=True)]
    assert scores("gsm8k", solutions, answer=answers) == [1] * 1319 and sum(same) < 30
    assert scores("gsm8k", others, answer=answers) == same
    assert gsm8k.form([], solutions) == [1] * 1319
    assert scores("gsm8k", solutions, answer=solutions) == [1] * 1319
    for split, count in (
        ("train", 7473),
        ("test", 1319),
    ):  # as published: a question, and a solution that ends in ####
        rows = read_rows(str(DATA / f"gsm8k_{split}.sft.jsonl.gz"))
        texts = [row["response"][0]["content"] for row in rows]
        published = [
            {"question": row["prompt"][0]["content"], "answer": text} for row, text in zip(rows, texts, strict=True)
        ]
        made = gsm8k.prompts(published)
        numbers, wanted = ([number_of(row["answer"]) for row in some] for some in (made, rows))  # 1,080 is 1080
        assert numbers == wanted and len(made) == count
        assert scores("gsm8k", texts, answer=[row["answer"] for row in made]) == [1] * count
        assert all(gsm8k.form([], texts))
    judged = read_rows(str(DATA / "gsm8k_solutions.rank.jsonl.gz"))
    items = [(item, answer) for row, answer in zip(judged, answers, strict=True) for item in row["responses"]]
    found = scores("gsm8k", [item["text"] for item, _ in items], answer=[answer for _, answer in items])
    agreed = np.mean([bool(score) == item["correct"] for score, (item, _) in zip(found, items, strict=True)])
    assert agreed > 0.999, agreed
    if importlib.util.find_spec("math_verify"):
        assert scores("math", solutions[:20], answer=answers[:20]) == [1] * 20
        assert scores("math", others[:20], answer=answers[:20]) == same[:20]


def test_gsm8k_prompts_and_form():
    row = {"question": " How many? ", "answer": "9 * 2 = 18\n#### 1,018"}
    (made,) = gsm8k.prompts([row])
    assert made["answer"] == "1,018" and made["prompt"][0]["content"].startswith("How many?\n\nThink")
    for wrong in ({"answer": "18"}, {"answer": 18}, {"question": 1}):
        with pytest.raises(UserError, match=r"^GSM8K row 0: "):
            gsm8k.prompts([{**row, **wrong}])
    (made,) = gsm8k.prompts([row], enable_thinking=False)
    assert made["chat_template_kwargs"] == {"enable_thinking": False}
    right = ["so\n#### \u221218", "so\n\n#### $1,234.5\n"]
    wrong = ["#### 18", "so #### 18", "so\n#### 18 eggs", "#### 1\n#### 18", "so\n18", "so\n####", "", "so\n#### ,"]
    assert gsm8k.form([], right + wrong) == [1] * 2 + [0] * 8


def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one():
    rewards = np.array([[1, 0, 0, 2.0], [0, 0.9, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [np.nan, 1, 1, 1]])
    found = passes_at(rewards, list("abcde"), [1, 2, 4, 8])
    assert list(found) == ["pass@1", "pass@2", "pass@4"]
    for k in (1, 2, 4):
        each = [np.mean([(row[list(of)] >= 1).any() for of in combinations(range(4), k)]) for row in rewards[:4]]
        assert found[f"pass@{k}"]["rate"] == pytest.approx(np.mean(each)) and found[f"pass@{k}"]["prompts"] == 4
