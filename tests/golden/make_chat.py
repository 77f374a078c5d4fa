"""Makes chat.json: the token ids that TRL's SFTTrainer makes of conversations, for tests that have no TRL.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 && peer/bin/pip install trl==1.16.0
    peer/bin/python tests/golden/make_chat.py

The code that runs is TRL's: the function `tokenize_fn` within SFTTrainer's `_prepare_dataset`, cut out of its source.
The templates and the conversations are those of tests/chats.py. {TEMPLATE: {CONVERSATION: {ids, prompt}}}: the ids of
the whole conversation, and how many of them TRL takes for the prompt. Where a template refuses a conversation: null.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from accelerate import PartialState  # noqa: E402
from chats import CONVERSATIONS, TEMPLATES, chat_tokenizer  # noqa: E402
from jinja2 import TemplateError  # noqa: E402
from trl.data_utils import is_conversational  # noqa: E402
from trl.trainer import sft_trainer  # noqa: E402


def tokenize_fn():
    """TRL's function of one example."""
    source = textwrap.dedent(inspect.getsource(sft_trainer.SFTTrainer._prepare_dataset))
    found = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == "tokenize_fn")
    scope = {**vars(sft_trainer), "is_conversational": is_conversational}
    exec(compile(ast.Module([found], []), "tokenize_fn", "exec"), scope)
    return scope["tokenize_fn"]


def main() -> None:
    """Write the file."""
    PartialState()  # without it TRL's warnings are errors
    tokenize, found = tokenize_fn(), {}
    for name, template in TEMPLATES.items():
        hf, found[name] = chat_tokenizer(template), {}
        for case, (prompt, answer) in CONVERSATIONS.items():
            example = {"prompt": prompt, "completion": [answer]}
            try:
                out = tokenize(example, hf, "text", False, None)
            except TemplateError:
                found[name][case] = None
                continue
            found[name][case] = {"ids": out["input_ids"], "prompt": out["completion_mask"].index(1)}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(cases)}" for name, cases in found.items())
    (HERE / "chat.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
