"""A server that answers JSON with JSON, and errors without anything of what was sent or received.

A key, or what echoes it, cannot stand in a message or a log that is made of our own words, of numbers, and of what the
operating system says.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.hosts.attempts import attempt

LARGEST_REPLY = 1 << 20
"""Bytes of a reply; one of more is no answer."""


class Unanswered(Exception):
    """There was no whole answer this time; the text says why."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """An http address to post to."""

    def __init__(self, option: str, address: str, *, key: str = "", timeout: float = 0, limit: str = ""):
        """`option` is what the user calls the address, `limit` the option of `timeout`, seconds for a whole answer
        (0: any).
        """
        self.option, self.address, self.timeout, self.limit = option, address, timeout, limit
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, body: Any) -> Any:
        """The JSON that the server answers.

        Raises:
            Unanswered: the network or the server failed, or the answer was cut; another attempt may help.
            UserError: the server refuses the request.
        """
        data, error = json.dumps(body).encode(), None
        try:
            return json.loads(attempt(lambda: self._whole(data), self.timeout, self.limit))
        except Exception as raised:
            error = raised
        raise self._in_our_words(error)  # outside of `except`, so that no traceback shows the other one

    def _whole(self, data: bytes) -> bytes:
        request = urllib.request.Request(self.address, data, self._headers)
        deadline = time.monotonic() + (self.timeout or float("inf"))
        parts: list[bytes] = []
        with self._opener.open(request, timeout=self.timeout or None) as reply:
            while part := reply.read1(1 << 16):
                parts.append(part)
                if sum(map(len, parts)) > LARGEST_REPLY:
                    raise Unanswered(f"an answer of more than {LARGEST_REPLY} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            if reply.length:
                raise Unanswered("the answer was cut short")
        return b"".join(parts)

    def _in_our_words(self, error: Exception) -> Exception:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            answered = f"answered {error.code} {http.client.responses.get(error.code, '')}".strip()
            if error.code in (408, 425, 429) or error.code >= 500:
                return Unanswered(f"it {answered}")
            return UserError(f"{self.option} {answered}; check the address, the name of the model and the key")
        if isinstance(error, Unanswered):
            return Unanswered(*error.args)
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
            error = error.reason
        if isinstance(error, TimeoutError):
            return Unanswered(f"no whole answer in {self.timeout:g} s ({self.limit})")
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            return Unanswered(error.strerror)
        if isinstance(error, http.client.IncompleteRead):
            return Unanswered("the answer was cut short")
        if isinstance(error, (ValueError, RecursionError)):
            return Unanswered("the answer is no JSON")
        return Unanswered(f"the connection failed ({type(error).__name__})")
