"""A judge as the reward: a number from -1 to 1 for every response (Lee et al. 2023, arXiv 2309.00267)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.config import RewardJudgeConfig
from rlhf_jax.data.numbers import float_of
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judge import NONSENSE, Answer
from rlhf_jax.feedback.judges import PAIRS, Form, ModelJudge, Silent, judge_by, make_ask
from rlhf_jax.inference.reward_functions import Columns, RewardFailure
from rlhf_jax.sharding import Mesh

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
BRACKETED = re.compile(rf"\[\[\s*{_NUMBER}\s*\]\]")
OF_SCALE = re.compile(rf"(?<![\w./-]){_NUMBER}\s*(?:/|out of)\s*([0-9]+)(?![\w/]|\.[0-9])")
WHOLE = re.compile(rf"(?:[\w' ]{{0,40}}?(?:is|[:=]))?\s*[\"'(]*{_NUMBER}[\"')]*[\s.!]*$", re.IGNORECASE)
ALONE = re.compile(rf"(?<![\w./-]){_NUMBER}(?![\w/-]|\.[0-9])")


def parse_score(answer: object, *, scale: int) -> Answer:
    """The score from 1 to `scale` that an answer says: a number as it is; of a text, the first of these that it has.

    1. [[7]], anywhere. 2. 7/10 or 7 out of 10, where `scale` is 10. 3. A first or last line that is a number, with or
    without words and a colon or "is" before it: "7", "**7.**", "Score: 7", "The score is 7". 4. The one number in it.

    A text with none of these is NONSENSE, and so is one with two that differ, and a number outside of the scale.
    """
    if not isinstance(answer, str):
        number = float_of(answer)
        said = set() if number is None else {number}
    else:
        text = re.sub(r"[*_`#]", "", answer).strip()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        wholes = [match[1] for line in lines[:1] + lines[-1:] if (match := WHOLE.match(line))]
        parts = [share if int(whole) == scale else "0" for share, whole in OF_SCALE.findall(text)]
        found = (BRACKETED.findall(text), parts, wholes, ALONE.findall(text))
        said = next(({float(number) for number in each} for each in found if each), set())
    score = said.pop() if len(said) == 1 else 0.0
    return score if 1 <= score <= scale else NONSENSE


def scores_form(scale: int) -> Form:
    """How questions for a score from 1 to `scale` are answered."""
    return Form({str(score): float(score) for score in range(1, scale + 1)}, partial(parse_score, scale=scale))


def check_against(config: RewardJudgeConfig, columns: Sequence[Mapping[str, object]], where: Sequence[str]) -> None:
    """Raise a UserError unless prompt rows, of these columns and places, have what responses are compared with."""
    name = config.against
    for row, place in zip(columns, where, strict=True):
        if name and not isinstance(row.get(name), str):
            raise UserError(
                f"{place}: no text in the field {name!r}, which reward.judge.against names; give each prompt the "
                "response to compare with, as `rlhf-jax sample` of the reference model writes it"
            )


class RewardJudge:
    """What config.judge of a `reward` group says of responses.

    Attributes:
        params: of a model of our own, else None.
        asked, unanswered: responses so far, and those of them that got no answer.
    """

    def __init__(self, config: RewardJudgeConfig, mesh: Mesh):
        """Load the model, if it is one."""
        self.config, self.asked, self.unanswered = config, 0, 0
        form = PAIRS if config.against else scores_form(config.scale)
        self.ask = make_ask(config, mesh, form, skip_long=True)
        self.params = self.ask.loaded.params if isinstance(self.ask, ModelJudge) else None
        self._told: Counter[str] = self.ask.remarks if isinstance(self.ask, ModelJudge) else Counter()

    @property
    def everywhere(self) -> bool:
        """Whether it computes on the devices of all processes, so that all ask the same together."""
        return bool(self.config.model.path)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Columns, key: jax.Array
    ) -> Float[np.ndarray, " N"]:
        """weight * (a number from -1 to 1), float32, NaN without an answer; `prompts` are what `plain_text` makes.

        Raises:
            RewardFailure: who is asked has gone.
            UserError: a judge function raised, or a server refuses.
        """
        questions = list(zip(prompts, responses, strict=True))
        try:
            said = self._compared(questions, columns, key) if self.config.against else self._scored(questions, key)
        except Silent as silent:
            raise RewardFailure(f"{silent.what}; mend that, or set reward.on_failure skip") from silent
        self.asked, self.unanswered = self.asked + len(said), self.unanswered + int(np.isnan(said).sum())
        return np.float32(self.config.weight) * said.astype(np.float32)

    @staticmethod
    def check_answered(said: Float[np.ndarray, " N"]) -> None:
        """Raise a RewardFailure if all is NaN of what belongs together: a batch, or what is held out, not a part."""
        if len(said) and np.isnan(said).all():
            raise RewardFailure(
                f"reward.judge: none of {len(said)} responses got an answer that says anything; look at "
                "reward.judge.template and max_prompt_length, or set reward.on_failure skip"
            )

    def _scored(self, questions: Sequence[tuple[str, str]], key: jax.Array) -> Float[np.ndarray, " N"]:
        votes, middle = self.config.votes, (1 + self.config.scale) / 2
        answers = iter(self.ask([question for question in questions for _ in range(votes)], key))
        of_each = ([a for a in islice(answers, votes) if not isinstance(a, str)] for _ in questions)
        scores = np.array([np.mean(said) if said else np.nan for said in of_each])
        return (scores - middle) / (self.config.scale - middle)

    def _compared(
        self, questions: Sequence[tuple[str, str]], columns: Columns, key: jax.Array
    ) -> Float[np.ndarray, " N"]:
        others = columns[self.config.against]
        groups = [(prompt, [text, other]) for (prompt, text), other in zip(questions, others, strict=True)]
        shares = [verdict.share for (verdict,) in judge_by(self.ask, self.config).verdicts(groups, key)]
        return np.array([np.nan if share is None else 2 * share - 1 for share in shares])

    def counts(self) -> dict[str, Any]:
        """{asked, unanswered, and remarks, what tokenising had to say, if anything}; `restore` is the way back."""
        told = {"remarks": dict(self._told)} if self._told else {}
        return {"asked": self.asked, "unanswered": self.unanswered} | told

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Go on counting from `counts`, those of an earlier process."""
        self.asked, self.unanswered = counts["asked"], counts["unanswered"]
        self._told.clear()
        self._told.update(counts.get("remarks", {}))

    def remarks(self) -> list[str]:
        """Lines about responses without an answer, if there were any, and what tokenising questions had to say."""
        lines = [f"reward.judge.model: of {self.asked} responses {n} {what}" for what, n in self._told.items()]
        if self.unanswered:
            lines += [
                f"reward.judge gave no answer to {self.unanswered} of {self.asked} responses, which taught nothing "
                "(rollout/unanswered)"
            ]
        return lines
