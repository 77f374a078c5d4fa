"""`rlhf-jax chat`: talk to a policy, or to two side by side, in the terminal or on a page; keep what is preferred.

`policy` draws answers, `talk` is the conversation and the votes, `terminal` and `page` are the two ways to hold it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.commands.chat.policy import Policy
from rlhf_jax.commands.chat.talk import preferred
from rlhf_jax.commands.chat.terminal import converse
from rlhf_jax.config import ChatArgs
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import read_rows
from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.files import Lines, hold_lines, mend
from rlhf_jax.sharding import make_mesh

START, VOTE = b'{"prompt": ', {"prompt", "chosen", "rejected", "votes", "models"}
"""How every line begins, and fields that every vote has."""


def run(config: ChatArgs) -> list[Row]:
    """Talk until the end; the preference rows of the votes, which `output` has too.

    With two policies, both answer the same conversation with the same noise; it goes on with the answer that is
    preferred, or with that of the first one.

    Raises:
        UserError: no policy is named, or one is none.
    """
    if not config.models:
        raise UserError("no policy is named; write rlhf-jax chat DIR, or chat DIR DIR to compare two")
    with held(config.output) as lines:
        mesh = make_mesh(config.mesh)
        policies = [Policy(path, config, mesh) for path in config.models]
        if config.page:
            from rlhf_jax.commands.chat.page import converse_on_page as talk  # needs bottle
        else:
            talk = converse
        votes = talk(config, policies, lines)
    if votes:
        kept = f" in {config.output}" if lines is not None else ", kept nowhere (--output)"
        tell(f"{len(votes)} votes{kept}; preferred: {preferred(votes, config.models)}")
    return votes


@contextlib.contextmanager
def held(output: str) -> Iterator[Lines | None]:
    """The file of votes while this process holds it; None where none is named.

    Raises:
        UserError: it cannot be written, another process writes it, or it holds something else than such votes.
    """
    if not output:
        yield None
        return
    path = Path(output)
    with hold_lines(output, "process", "stop that one, or give another --output"):
        mend(path, START, "vote of `rlhf-jax chat`")
        for row in read_rows(output) if path.stat().st_size else []:
            if not set(row) >= VOTE:
                raise UserError(f"{row['_where']}: not a vote of `rlhf-jax chat`; choose another --output")
        yield Lines(path)
        if not path.stat().st_size:
            path.unlink()
