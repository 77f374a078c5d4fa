"""GSM8K, grade school mathematics with a checkable answer (Cobbe et al. 2021, arXiv 2110.14168): prompts and rewards.

`rlhf_jax.tasks.verifiers:gsm8k` says whether an answer is right, `form` here whether it stands where it should.
`rlhf-jax evaluate` with `pass_at` measures a model: configs/gsm8k_evaluate.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.tasks.verifiers.texts import marked, number_of, typed

INSTRUCTION = 'Think step by step. Then write "####" and the answer, a number alone, on the last line.'

LAST_LINE = re.compile(r"####\s*\$?-?[0-9.,/]+\s*")


def prompts(rows: Sequence[Mapping[str, Any]], **template: object) -> list[dict[str, Any]]:
    """Prompt rows {prompt, answer} of rows {question, answer} as published.

    A prompt is a message that ends in INSTRUCTION, and `answer` the number that the solution ends with, as text. What
    else is given goes to the chat template: enable_thinking=False keeps Qwen3 from thinking past the response's end.

    Raises:
        UserError: a row without the two fields, or an answer without a number behind "####".
    """
    made, more = [], {"chat_template_kwargs": template} if template else {}
    for i, row in enumerate(rows):
        question, solution = row.get("question"), row.get("answer")
        answer = marked(solution) if isinstance(solution, str) else None
        if not (isinstance(question, str) and question) or answer is None or number_of(answer) is None:
            raise UserError(
                f'GSM8K row {i}: it is no {{question, answer}} with a number behind "####"; mend or remove it'
            )
        content = f"{question.strip()}\n\n{INSTRUCTION}"
        made.append({"prompt": [{"role": "user", "content": content}], "answer": answer, **more})
    return made


def form(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
    """1.0 where a response is some text and then, on its last line, the only "####" with a number alone.

    A reward function; its weight should be small beside that of the right answer (reward.function_weights: [1, 0.1]).
    """
    return [float(_in_form(response)) for response in responses]


def _in_form(response: str) -> bool:
    text, line, last = typed(response).rstrip().rpartition("\n")
    return bool(
        line and text.strip() and LAST_LINE.fullmatch(last) and "####" not in text and number_of(last) is not None
    )
