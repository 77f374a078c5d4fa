"""A conversation with one policy or two: what is to be answered, what it goes on with, and the votes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from rlhf_jax.commands.chat.policy import Answer
from rlhf_jax.config import ChatArgs
from rlhf_jax.data.messages import Messages, Text
from rlhf_jax.data.rows import Row

NAMES = "AB"
"""What the two policies are called."""
UNANSWERED = "the answer is empty, so what is said next takes the place of the question"


class Talk:
    """A conversation: `prompt` is what is to be answered, empty before anything is asked.

    It goes on with texts, so a policy sees earlier answers as the rows of votes have them and training reads them.
    Without a text there is no turn that a row could hold: a question that got none is not gone on with.
    """

    def __init__(self, messages: Messages | None):
        """`messages` begin it; None is of texts without history."""
        self.prompt: Text = ""
        self._messages, self._answer = messages, ""

    def ask(self, text: str) -> None:
        """Go on with what the user says."""
        if self._messages is None:
            self.prompt = text
            return
        if isinstance(self.prompt, list) and self.is_answered:
            self._messages = [*self.prompt, {"role": "assistant", "content": self._answer}]
        self.prompt = [*self._messages, {"role": "user", "content": text}]

    def answered(self, text: str) -> None:
        """What the conversation goes on with."""
        self._answer = text

    @property
    def is_answered(self) -> bool:
        """Whether there is an answer that one can go on with; texts without history need none."""
        return self._messages is None or bool(self._answer.strip())


def started(config: ChatArgs) -> Talk:
    """A conversation in which nothing is said yet."""
    system: Messages = [{"role": "system", "content": config.system}] if config.system else []
    return Talk(None if config.plain else system)


def sides(config: ChatArgs, number: int) -> list[int]:
    """The policies by the side on which they give the answers of this number: in order, or if blind by the seed."""
    order = list(range(len(config.models)))
    if config.blind:
        random.Random(f"{config.seed} {number}").shuffle(order)
    return order


def preferred(votes: Sequence[Row], models: list[str]) -> str:
    """How often each of two policies was preferred."""
    ties = sum(row["votes"] == [0, 0, 1] for row in votes)
    counts = Counter(row["models"][0] for row in votes if row["votes"] != [0, 0, 1])
    return "; ".join([*(f"{model} {counts[model]}" for model in models), f"ties {ties}"])


def comparable(answers: Sequence[Answer]) -> bool:
    """Whether a vote on them is a row: of empty or equal answers it is none."""
    texts = [answer.text.strip() for answer in answers]
    return len(set(texts)) == 2 and all(texts)


def first_said(answers: Sequence[Answer]) -> int:
    """The answer that a conversation goes on with where none is preferred: the first, or the other if it is empty."""
    return 0 if answers[0].text.strip() or not answers[-1].text.strip() else 1


def preference(prompt: Text, answers: list[Answer], models: list[str], best: int, *, tie: bool) -> Row:
    """A vote as a preference row, with the ids that were sampled and the directories of who said it."""
    chosen, rejected = answers[best], answers[1 - best]
    return {
        "prompt": prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_ids": chosen.ids,
        "rejected_ids": rejected.ids,
        "finished": [chosen.finished, rejected.finished],
        "votes": [0, 0, 1] if tie else [1, 0, 0],
        "models": [models[best], models[1 - best]],
        **({"prompt_seen": chosen.seen or rejected.seen} if chosen.seen or rejected.seen else {}),
    }
