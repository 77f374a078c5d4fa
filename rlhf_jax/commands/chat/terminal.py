"""The conversation in the terminal."""

from __future__ import annotations

from collections.abc import Generator

import jax

from rlhf_jax.commands.chat.policy import Answer, Policy
from rlhf_jax.commands.chat.talk import NAMES, UNANSWERED, comparable, first_said, preference, sides, started
from rlhf_jax.config import ChatArgs
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import tell
from rlhf_jax.hosts.files import Lines

HELP = "type to talk; /again another answer, /reset forgets the conversation, /quit (or Ctrl-D) ends"
VOTE = "better: a, b, t (tie), or Enter: "


def converse(config: ChatArgs, policies: list[Policy], lines: Lines | None) -> list[Row]:
    """Talk until /quit or the end of the input; the preference rows of the votes, which `lines` gets too."""
    votes = list[Row]()
    tell(HELP)
    talk, number = started(config), 0
    while (typed := asked("> ")) is not None and typed != "/quit":
        if typed in ("/reset", "/help") or not typed.strip():
            talk = started(config) if typed == "/reset" else talk
            tell(HELP if typed == "/help" else "", end="\n" if typed.strip() else "")
            continue
        if typed != "/again":
            talk.ask(typed)
        elif not talk.prompt:
            tell("there is nothing to answer yet")
            continue
        number += 1
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        order = sides(config, number)
        answers = [_told(policies[i].answer(talk.prompt, key), name if policies[1:] else "")
                   for i, name in zip(order, NAMES, strict=False)]  # fmt: skip
        best = first_said(answers)
        if comparable(answers):
            said = (asked(VOTE) or "").strip().lower()
            best = 1 if said == "b" else 0
            if said in ("a", "b", "t"):
                votes.append(
                    preference(talk.prompt, answers, [config.models[i] for i in order], best, tie=said == "t")
                )
                if lines is not None:
                    lines.add(votes[-1:], sync=True)
        talk.answered(answers[best].text)
        if not talk.is_answered:
            tell(f"[{UNANSWERED}]")
    return votes


def _told(pieces: Generator[str, None, Answer], name: str) -> Answer:
    """The answer of a policy, written while it is drawn."""
    tell(f"{name}: " if name else "", end="")
    while True:
        try:
            tell(next(pieces), end="")
        except StopIteration as end:
            answer: Answer = end.value
            break
    unseen = f" [the first {answer.left_out} tokens were not seen: max_prompt_length]" if answer.left_out else ""
    cut = "" if answer.finished else " [cut off: sampling.max_new_tokens]"
    tell(cut + unseen + "".join(f" [{remark}]" for remark in answer.remarks))
    return answer


def asked(question: str) -> str | None:
    """A line that the user types; None at the end of the input."""
    try:
        return input(question)
    except EOFError:
        tell()
        return None
