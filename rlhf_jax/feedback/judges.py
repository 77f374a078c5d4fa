"""Whom judges ask: a Python function, a server, or a language model of our own."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.config import JudgeArgs, JudgeConfig, SamplingConfig, SourcesArgs, key_of, resolve
from rlhf_jax.data.messages import Messages, transcript
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, reason, tell
from rlhf_jax.feedback.endpoint import Endpoint, Unanswered
from rlhf_jax.feedback.judge import NO_ANSWER, NONSENSE, Answer, Ask, Judge, Question, parse
from rlhf_jax.feedback.phases import Make
from rlhf_jax.hosts.attempts import Failed, persist
from rlhf_jax.inference.generate import Generator
from rlhf_jax.inference.scoring import Likelihood, example_of
from rlhf_jax.models.loading import check_length, check_model, check_vocabulary, load_model, load_tokenizer
from rlhf_jax.sharding import Mesh, make_mesh


@dataclass(frozen=True)
class Form:
    """What answers to a kind of question mean.

    Attributes:
        choices: the answers between which a model's log-probs choose, and the number that each means.
        read: the number that a written answer means, or NONSENSE.
    """

    choices: Mapping[str, float]
    read: Callable[[object], Answer]


PAIRS = Form({"A": 1.0, "B": 0.0}, parse)
"""Which of two responses is better: the chance that A is."""


class Silent(UserError):
    """Whoever is asked has gone; `what` is the line without a cure."""

    def __init__(self, what: str):
        """Of a line without a cure."""
        super().__init__(f"{what}; mend that, then give the same command again, which goes on here")
        self.what = what


MOST_FAILURES = 16
"""So many questions in a row without an answer end the command."""

Group = tuple[str | Messages, list[str]]
"""(prompt, responses)"""


def verdicts(
    config: SourcesArgs | JudgeArgs, judge: Judge | None, groups_of: Callable[[int], list[Group]], key: jax.Array
) -> Make:
    """Makes rows {verdicts} on all pairs of the responses of each group that a thing has; `judge` replaces config's.

    A judge reads messages as a transcript, since the models that it compares may be shown them in different templates.
    """
    judge = judge or make_judge(config.judge, make_mesh(config.mesh))

    def make(start: int, stop: int) -> Iterator[Row]:
        groups = [groups_of(i) for i in range(start, stop)]
        plain = [(plain_text(prompt), texts) for each in groups for prompt, texts in each]
        of_groups = judge.in_turn(plain, jax.random.fold_in(key, start))
        for each in groups:
            yield {"verdicts": [asdict(v) for _ in each for v in next(of_groups)]}

    return make


def asks_alone(config: JudgeConfig, judge: Judge | None) -> bool:
    """Whether a question has the same answer whatever else is asked with it, as of a server or function, but of no
    model of ours, whose noise is that of a batch; nothing is known of a `judge` that replaces the config's.
    """
    return judge is None and not config.model.path


def plain_text(prompt: str | Messages) -> str:
    """A prompt as a judge reads it."""
    return prompt if isinstance(prompt, str) else transcript(prompt).strip()


def make_judge(config: JudgeConfig, mesh: Mesh) -> Judge:
    """The judge of pairs that the config names."""
    return judge_by(make_ask(config, mesh, PAIRS), config)


def check_judge(config: JudgeConfig) -> None:
    """Raise a UserError if the judge is a model that cannot be loaded."""
    if config.model.path:
        length = config.max_prompt_length + (config.max_new_tokens if config.answer == "sample" else 1)
        check_model(config.model, length, f"{config.group}max_prompt_length and the answer =")


def judge_by(ask: Ask, config: JudgeConfig) -> Judge:
    """The judge of pairs that asks in this way."""
    return Judge(ask, votes=config.votes, both_orders=config.both_orders, inconsistent=config.inconsistent)


def make_ask(config: JudgeConfig, mesh: Mesh, form: Form, *, skip_long: bool = False) -> Ask:
    """Whom the config names, for questions of a form; `skip_long` as of `ModelJudge`."""
    config.check_one()
    if config.function:
        function = resolve(config.function)
        return ask_function(function, timeout=config.timeout, retries=config.retries, group=config.group)
    return ask_server(config, form) if config.url else ModelJudge(config, mesh, form, skip_long=skip_long)


def ask_function(
    fn: Callable[[str, str, str], object], *, timeout: float, retries: int, group: str = JudgeConfig.group
) -> Ask:
    """fn(prompt, a, b), one question after another, each within `timeout` seconds (0: any).

    Raises:
        UserError: when asked, if the function raises, or answers nothing any more.
    """
    name = getattr(fn, "__name__", repr(fn))

    def one(question: Question) -> Answer:
        try:
            return parse(fn(*question))
        except TimeoutError:
            raise
        except Exception as error:
            raise UserError(f"judge function {name}: {type(error).__name__}: {reason(error)}; mend it") from error

    def ask(questions: Sequence[Question], key: jax.Array) -> Iterator[Answer]:
        tried = partial(persist, timeout=timeout, retries=retries, limit=f"{group}timeout", final=(UserError,))
        return _counted(f"judge function {name}", (partial(tried, partial(one, question)) for question in questions))

    return ask


def ask_server(config: JudgeConfig, form: Form = PAIRS) -> Ask:
    """A chat endpoint of OpenAI's form, `workers` requests at once.

    Raises:
        UserError: when asked, a request that the server refuses, or no answers any more.
    """
    address = config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    url, limit = f"{config.group}url", f"{config.group}timeout"
    key = key_of(f"{config.group}api_key_env", config.api_key_env) if config.api_key_env else ""
    endpoint = Endpoint(url, address, key=key, timeout=config.timeout, limit=limit)

    def one(question: Question) -> Answer:
        body = {
            "model": config.url_model,
            "messages": [{"role": "user", "content": filled(config, question)}],
            "temperature": config.temperature,
            "max_tokens": config.max_new_tokens,
        }
        if config.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": config.top_logprobs, "max_tokens": 1}
        try:
            choice = endpoint.post(body)["choices"][0]
            if config.top_logprobs:
                return expected(form, choice["logprobs"]["content"][0]["top_logprobs"])
            return form.read(choice["message"]["content"])
        except (LookupError, TypeError):
            what = "chat completion with top_logprobs" if config.top_logprobs else "chat completion"
            raise Unanswered(f"an answer that is no {what}") from None

    def ask(questions: Sequence[Question], key: jax.Array) -> Iterator[Answer]:
        with ThreadPoolExecutor(config.workers) as pool:  # the endpoint keeps the time itself
            tried = partial(persist, timeout=0, retries=config.retries, limit=limit, final=(UserError,))
            waiting = [pool.submit(tried, partial(one, question)) for question in questions]
            try:
                yield from _counted(url, (answer.result for answer in waiting))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return ask


def expected(form: Form, likeliest: Sequence[Mapping[str, Any]]) -> Answer:
    """The expectation of what the choices mean over the probabilities of first tokens {token, logprob}.

    White space around a token is not looked at; NONSENSE if none is a choice, or if a log-prob of one is no such.
    """
    said = [(one["token"].strip(), one["logprob"]) for one in likeliest]
    chosen = [(form.choices[token], logprob) for token, logprob in said if token in form.choices]
    most = max((logprob for _, logprob in chosen), default=-math.inf)
    if most == -math.inf or not all(logprob < 0.01 for _, logprob in chosen):  # above 0 by rounding; a NaN is not
        return NONSENSE
    shares = [(value, math.exp(logprob - most)) for value, logprob in chosen]
    return sum(value * share for value, share in shares) / sum(share for _, share in shares)


def _counted(whom: str, answers: Iterable[Callable[[], Answer]]) -> Iterator[Answer]:
    """What each call returns, or NO_ANSWER if it raises Failed, once one after it has returned.

    Raises:
        Silent: all of them are failures, or MOST_FAILURES in a row are.
    """
    in_a_row, one_came = 0, False
    last: BaseException | None = None
    for answer in answers:
        try:
            found = answer()
        except Failed as failure:
            in_a_row, last = in_a_row + 1, failure.__cause__
            if in_a_row == MOST_FAILURES:
                break
        else:
            yield from [NO_ANSWER] * in_a_row
            yield found
            in_a_row, one_came = 0, True
    if last is not None and (in_a_row == MOST_FAILURES or not one_came):
        raise Silent(f"{whom}: {in_a_row} questions in a row had no answer ({reason(last)})")
    yield from [NO_ANSWER] * in_a_row


def filled(config: JudgeConfig, question: Question) -> str:
    """The config's template with a question in it; braces within the texts stay as they are."""
    parts = dict(zip((f"{{{place}}}" for place in config.places), question, strict=True))
    return re.sub("|".join(map(re.escape, parts)), lambda place: parts[place[0]], config.template or config.default)


class ModelJudge:
    """A language model of our own that answers questions.

    logprob: the expectation of what its choices mean, over their probabilities as answers: of A and B the chance
    p(A) / (p(A) + p(B)). sample: what it writes, with noise of its own for each question of a call.

    Attributes:
        remarks: what tokenising questions had to say, counted; each is said when it first occurs.
    """

    def __init__(self, config: JudgeConfig, mesh: Mesh, form: Form = PAIRS, *, skip_long: bool = False):
        """Load the model; with `skip_long`, questions that are too long have no answer.

        Raises:
            UserError: it cannot hold a question, or its tokenizer does not tell two choices apart.
        """
        self.config, self.mesh, self.form, self.skip_long = config, mesh, form, skip_long
        self.remarks = Counter[str]()
        self.tokenizer = tokenizer = load_tokenizer(config.model)
        with jax.set_mesh(mesh.grid):
            length = config.max_prompt_length + (config.max_new_tokens if config.answer == "sample" else 0)
            self.loaded = load_model(config.model, mesh, jax.random.key(0), length=length)
        model = self.loaded.model
        check_vocabulary(model.arch, tokenizer, config.model.path)
        if config.answer == "sample":
            sampling = SamplingConfig(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
            longest = config.max_prompt_length
            self.generator = Generator(model, tokenizer, sampling, mesh, max_prompt_length=longest)
            return
        said = [[{"role": "assistant", "content": choice}] for choice in form.choices]
        self.choices = [tokenizer.encode_response(each, finished=False) for each in said]
        if len(set(map(tuple, self.choices))) < len(self.choices):
            names = " from ".join([*form.choices][:2])
            raise UserError(f"{config.model.path}: its tokenizer does not tell {names}; choose another judge")
        longest = config.max_prompt_length + max(map(len, self.choices))
        check_length(model.arch, longest, f"{config.group}max_prompt_length and the answer =")
        self.likelihood = Likelihood(model, mesh, batch_size=2 * config.batch_size)

    def __call__(self, questions: Sequence[Question], key: jax.Array) -> list[Answer]:
        """An answer to each question.

        Raises:
            UserError: a question is too long.
        """
        texts = [filled(self.config, question) for question in questions]
        chat = self.tokenizer.hf.chat_template
        prompts: list[str | Messages] = [[{"role": "user", "content": text}] if chat else text for text in texts]
        remarks = Counter[str]()
        ids = [self.tokenizer.encode_prompt(prompt, remarks) for prompt in prompts]
        for remark in [name for name in +remarks if name not in self.remarks]:
            tell(f"! {self.config.group}model: of {len(ids)} questions {remarks[remark]} {remark}", error=True)
        self.remarks += remarks
        longest, limit = max(map(len, ids)), self.config.max_prompt_length
        if longest > limit and not self.skip_long:
            raise UserError(
                f"a question to the judge has {longest} tokens, more than {self.config.group}max_prompt_length "
                f"{limit}; raise it, or judge shorter responses"
            )
        asked = [i for i, each in enumerate(ids) if len(each) <= limit]
        answers: list[Answer] = [NO_ANSWER] * len(ids)
        if asked:
            with jax.set_mesh(self.mesh.grid):
                said = self._answers([prompts[i] for i in asked], [ids[i] for i in asked], key)
            for i, answer in zip(asked, said, strict=True):
                answers[i] = answer
        return answers

    def _answers(
        self, prompts: Sequence[str | Messages], ids: Sequence[Sequence[int]], key: jax.Array
    ) -> Sequence[Answer]:
        if self.config.answer == "sample":
            rows = [{"prompt": prompt, "_where": "a question"} for prompt in prompts]
            size = self.config.batch_size
            drawn = self.generator.responses(self.loaded.params, rows, key, batch_size=size)
            return [self.form.read(one.text) for one in drawn]
        examples = [example_of(prompt, choice) for prompt in ids for choice in self.choices]
        said = [logprobs.sum(dtype=np.float64) for logprobs in self.likelihood.targets(self.loaded.params, examples)]
        chances = chosen(np.reshape(said, (len(ids), -1)), self.choices)
        return (chances @ np.array([*self.form.choices.values()])).tolist()


def chosen(logprobs: Float[np.ndarray, "N K"], choices: Sequence[Sequence[int]]) -> Float[np.ndarray, "N K"]:
    """The probability of each of K continuations given that it is one of them, of the log-probs of all their tokens.

    Where one goes on as another begins, as 10 and 1, the shorter one's own share is without the longer one's.
    """
    shares = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    within = [[len(a) < len(b) and list(b[: len(a)]) == list(a) for b in choices] for a in choices]
    longer = np.array(within, np.float64)  # [K, K], whether choice b goes on where a ends
    # Of three in a row the longest is a part of the middle one, so what each has of its own is taken off.
    own = shares.copy()
    for i in sorted(range(len(choices)), key=lambda i: -len(choices[i])):
        own[:, i] = np.maximum(shares[:, i] - own @ longer[i], 0.0)
    return own / own.sum(axis=1, keepdims=True)
