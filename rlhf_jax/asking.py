"""Whom a judge asks: a Python function, a server, or a language model of our own. Floor 2."""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax import rewards
from rlhf_jax.config import JudgeConfig, SamplingConfig, resolve
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generator
from rlhf_jax.judge import NO_ANSWER, Answer, Ask, Judge, Question, parse
from rlhf_jax.likelihood import Likelihood, example_of
from rlhf_jax.stage import check_length, check_vocabulary, load_model, load_tokenizer

PLACES = re.compile(r"\{(?:prompt|a|b)\}")

LARGEST_REPLY = 1 << 20
"""Bytes of a server's reply that are read."""


def make_judge(config: JudgeConfig, mesh: Mesh, function: Callable[..., Any] | None = None) -> Judge:
    """The judge that the config names; `function` replaces its function."""
    if function is None:
        config.check_one()
    if function is not None or config.function:
        ask = ask_function(function or resolve(config.function), timeout=config.timeout, retries=config.retries)
    else:
        ask = ask_server(config) if config.url else ModelJudge(config, mesh)
    return Judge(ask, votes=config.votes, both_orders=config.both_orders, inconsistent=config.inconsistent)


def ask_function(fn: Callable[[str, str, str], Any], *, timeout: float, retries: int) -> Ask:
    """fn(prompt, a, b), one question after another, each within `timeout` seconds (0: any).

    Raises:
        UserError: when asked, if the function raises.
    """
    name = getattr(fn, "__name__", repr(fn))

    def ask(questions: Sequence[Question], key: jax.Array) -> list[Answer]:
        def one(question: Question) -> Any:
            try:
                return rewards.attempt(lambda: fn(*question), timeout)
            except TimeoutError:
                raise
            except Exception as error:
                raise UserError(f"judge function {name}: {type(error).__name__}: {error}; mend it") from error

        return [_persist(partial(one, question), retries) for question in questions]

    return ask


def _persist(call: Callable[[], Any], retries: int) -> Answer:
    """What call() says, tried again after a time-out or a failure of the network; NO_ANSWER if all attempts fail."""
    for i in range(retries + 1):
        try:
            return parse(call())
        except OSError:  # TimeoutError and URLError are OSErrors
            if i < retries:
                time.sleep(rewards.RETRY_WAIT * 2**i)
    return NO_ANSWER


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


def ask_server(config: JudgeConfig) -> Ask:
    """A chat endpoint of OpenAI's form, `workers` requests at once. Nothing that is sent or read is logged.

    Raises:
        UserError: no http address, no key in the environment; when asked, a request that the server refuses.
    """
    if not config.url.startswith(("http://", "https://")):
        raise UserError(f"judge.url {config.url!r} is no http address; write it as http://localhost:8000/v1")
    address = config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    if config.api_key_env:
        if not os.environ.get(config.api_key_env):
            raise UserError(f"judge.api_key_env {config.api_key_env}: no such environment variable; export the key")
        headers["Authorization"] = f"Bearer {os.environ[config.api_key_env]}"
    opener = urllib.request.build_opener(_NoRedirect)
    timeout = config.timeout or None

    def one(question: Question) -> Any:
        body = {
            "model": config.url_model,
            "messages": [{"role": "user", "content": filled(config.template, question)}],
            "temperature": config.temperature,
            "max_tokens": config.max_new_tokens,
        }
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with opener.open(request, timeout=timeout) as reply:
                return _content(reply.read(LARGEST_REPLY))
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 429 or error.code >= 500:
                raise  # an OSError: tried again
            raise UserError(
                f"judge.url {config.url} answered {error.code} {error.reason}; check the address, judge.url_model and "
                "judge.api_key_env"
            ) from None

    def ask(questions: Sequence[Question], key: jax.Array) -> list[Answer]:
        with ThreadPoolExecutor(config.workers) as pool:
            waiting = [pool.submit(_persist, partial(one, question), config.retries) for question in questions]
            try:
                return [answer.result() for answer in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return ask


def _content(reply: bytes) -> Any:
    """The text of a chat completion; None, which parses to nonsense, if it is something else."""
    try:
        return json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None


def filled(template: str, question: Question) -> str:
    """The template with a question in it; braces within the texts stay as they are."""
    parts = dict(zip(("{prompt}", "{a}", "{b}"), question, strict=True))
    return PLACES.sub(lambda found: parts[found[0]], template)


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
        with jax.set_mesh(mesh):
            self.loaded = load_model(config.model, mesh, jax.random.key(0))
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
        self.likelihood = Likelihood(model, mesh, pad_id=tokenizer.pad_id, batch_size=2 * config.batch_size)

    def __call__(self, questions: Sequence[Question], key: jax.Array) -> list[Answer]:
        """An answer to each question.

        Raises:
            UserError: a question is too long.
        """
        prompts = [self._prompt(question) for question in questions]
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        longest, limit = max(map(len, ids)), self.config.max_prompt_length
        if longest > limit:
            raise UserError(
                f"a question to the judge has {longest} tokens, more than judge.max_prompt_length {limit}; raise it, "
                "or judge shorter responses"
            )
        with jax.set_mesh(self.mesh):
            if self.config.answer == "sample":
                rows = [{"prompt": prompt, "_where": "a question"} for prompt in prompts]
                size = self.config.batch_size
                _, texts, _ = self.generator.texts(self.loaded.params, rows, key, batch_size=size)
                return [parse(text) for text in texts]
            examples = [example_of(prompt, letter) for prompt in ids for letter in self.letters]
            found = [float(logprobs.sum()) for logprobs in self.likelihood.targets(self.loaded.params, examples)]
        return [1 / (1 + math.exp(min(b - a, 700.0))) for a, b in zip(found[::2], found[1::2], strict=True)]

    def _prompt(self, question: Question) -> Any:
        text = filled(self.config.template, question)
        return [{"role": "user", "content": text}] if self.tokenizer.hf.chat_template else text
