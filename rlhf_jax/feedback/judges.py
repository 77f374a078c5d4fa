"""Whom a judge asks: a Python function, a server, or a language model of our own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

import jax

from rlhf_jax.config import JudgeArgs, JudgeConfig, SamplingConfig, SourcesArgs, key_of, resolve
from rlhf_jax.data.messages import Messages, transcript
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, reason
from rlhf_jax.feedback.endpoint import Endpoint, Unanswered
from rlhf_jax.feedback.judge import NO_ANSWER, Answer, Ask, Judge, Question, parse
from rlhf_jax.feedback.phases import Make
from rlhf_jax.hosts.attempts import Failed, persist
from rlhf_jax.inference.generate import Generator
from rlhf_jax.inference.scoring import Likelihood, example_of
from rlhf_jax.models.loading import check_length, check_vocabulary, load_model, load_tokenizer
from rlhf_jax.sharding import Mesh, make_mesh

PLACES = re.compile(r"\{(?:prompt|a|b)\}")

LIMIT = "judge.timeout"

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

    def make(start: int, stop: int) -> list[Row]:
        groups = [groups_of(i) for i in range(start, stop)]
        plain = [
            (prompt if isinstance(prompt, str) else transcript(prompt).strip(), texts)
            for each in groups
            for prompt, texts in each
        ]
        of_groups = iter(judge.verdicts(plain, jax.random.fold_in(key, start)))
        return [{"verdicts": [asdict(v) for _ in each for v in next(of_groups)]} for each in groups]

    return make


def make_judge(config: JudgeConfig, mesh: Mesh) -> Judge:
    """The judge that the config names."""
    config.check_one()
    if config.function:
        ask = ask_function(resolve(config.function), timeout=config.timeout, retries=config.retries)
    else:
        ask = ask_server(config) if config.url else ModelJudge(config, mesh)
    return Judge(ask, votes=config.votes, both_orders=config.both_orders, inconsistent=config.inconsistent)


def ask_function(fn: Callable[[str, str, str], object], *, timeout: float, retries: int) -> Ask:
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

    def ask(questions: Sequence[Question], key: jax.Array) -> list[Answer]:
        tried = partial(persist, timeout=timeout, retries=retries, limit=LIMIT, final=(UserError,))
        return _counted(f"judge function {name}", (partial(tried, partial(one, question)) for question in questions))

    return ask


def ask_server(config: JudgeConfig) -> Ask:
    """A chat endpoint of OpenAI's form, `workers` requests at once.

    Raises:
        UserError: when asked, a request that the server refuses, or no answers any more.
    """
    address = config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    key = key_of("judge.api_key_env", config.api_key_env) if config.api_key_env else ""
    endpoint = Endpoint("judge.url", address, key=key, timeout=config.timeout, limit=LIMIT)

    def one(question: Question) -> Answer:
        body = {
            "model": config.url_model,
            "messages": [{"role": "user", "content": filled(config.template, question)}],
            "temperature": config.temperature,
            "max_tokens": config.max_new_tokens,
        }
        try:
            return parse(endpoint.post(body)["choices"][0]["message"]["content"])
        except (LookupError, TypeError):
            raise Unanswered("an answer that is no chat completion") from None

    def ask(questions: Sequence[Question], key: jax.Array) -> list[Answer]:
        with ThreadPoolExecutor(config.workers) as pool:  # the endpoint keeps the time itself
            tried = partial(persist, timeout=0, retries=config.retries, limit=LIMIT, final=(UserError,))
            waiting = [pool.submit(tried, partial(one, question)) for question in questions]
            try:
                return _counted("judge.url", (answer.result for answer in waiting))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return ask


def _counted(whom: str, answers: Iterable[Callable[[], Answer]]) -> list[Answer]:
    """What each call returns, or NO_ANSWER if it raises Failed.

    Raises:
        UserError: all of them are failures, or MOST_FAILURES in a row are: whoever is asked has gone.
    """
    counted: list[Answer] = []
    in_a_row = 0
    last: BaseException | None = None
    for answer in answers:
        try:
            counted.append(answer())
            in_a_row = 0
        except Failed as failure:
            in_a_row, last = in_a_row + 1, failure.__cause__
            counted.append(NO_ANSWER)
        if in_a_row == MOST_FAILURES:
            break
    if last is not None and (in_a_row == MOST_FAILURES or in_a_row == len(counted)):
        raise UserError(
            f"{whom}: {in_a_row} questions in a row had no answer ({reason(last)}); mend that, then give the same "
            "command again, which goes on here"
        )
    return counted


def filled(template: str, question: Question) -> str:
    """The template with a question in it; braces within the texts stay as they are."""
    parts = dict(zip(("{prompt}", "{a}", "{b}"), question, strict=True))
    return PLACES.sub(lambda place: parts[place[0]], template)


class ModelJudge:
    """A language model of our own that answers questions.

    logprob: p = sigmoid(log p(A) - log p(B)) of the two letters as answers. sample: what it writes, with noise of its
    own for each question of a call.
    """

    def __init__(self, config: JudgeConfig, mesh: Mesh):
        """Load the model.

        Raises:
            UserError: it cannot hold a question, or its tokenizer does not tell A from B.
        """
        self.config, self.mesh = config, mesh
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
        said = [[{"role": "assistant", "content": letter}] for letter in "AB"]
        self.letters = [tokenizer.encode_response(each, finished=False) for each in said]
        if self.letters[0] == self.letters[1]:
            raise UserError(f"{config.model.path}: its tokenizer does not tell A from B; choose another judge")
        longest = config.max_prompt_length + max(map(len, self.letters))
        check_length(model.arch, longest, "judge.max_prompt_length and the answer =")
        self.likelihood = Likelihood(model, mesh, batch_size=2 * config.batch_size)

    def __call__(self, questions: Sequence[Question], key: jax.Array) -> list[Answer]:
        """An answer to each question.

        Raises:
            UserError: a question is too long.
        """
        texts = [filled(self.config.template, question) for question in questions]
        chat = self.tokenizer.hf.chat_template
        prompts: list[str | Messages] = [[{"role": "user", "content": text}] if chat else text for text in texts]
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        longest, limit = max(map(len, ids)), self.config.max_prompt_length
        if longest > limit:
            raise UserError(
                f"a question to the judge has {longest} tokens, more than judge.max_prompt_length {limit}; raise it, "
                "or judge shorter responses"
            )
        with jax.set_mesh(self.mesh.grid):
            if self.config.answer == "sample":
                rows = [{"prompt": prompt, "_where": "a question"} for prompt in prompts]
                size = self.config.batch_size
                drawn = self.generator.responses(self.loaded.params, rows, key, batch_size=size)
                return [parse(one.text) for one in drawn]
            examples = [example_of(prompt, letter) for prompt in ids for letter in self.letters]
            said = [float(logprobs.sum()) for logprobs in self.likelihood.targets(self.loaded.params, examples)]
        return [1 / (1 + math.exp(min(b - a, 700.0))) for a, b in zip(said[::2], said[1::2], strict=True)]
