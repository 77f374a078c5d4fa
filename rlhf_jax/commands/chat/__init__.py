"""`rlhf-jax chat`: talk to a policy, or to two side by side, in the terminal or on a page; keep what is preferred.

`policy` draws answers, `talk` is the conversation and the votes, `terminal` and `page` are the two ways to hold it.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.commands.chat.policy import Policy
from rlhf_jax.commands.chat.talk import preferred
from rlhf_jax.commands.chat.terminal import converse
from rlhf_jax.config import ChatArgs
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.files import Lines, check_writable
from rlhf_jax.sharding import make_mesh


def run(config: ChatArgs) -> list[Row]:
    """Talk until the end; the preference rows of the votes, which `output` has too.

    With two policies, both answer the same conversation with the same noise; it goes on with the answer that is
    preferred, or with that of the first one.

    Raises:
        UserError: no policy is named, or one is none.
    """
    if not config.models:
        raise UserError("no policy is named; write rlhf-jax chat DIR, or chat DIR DIR to compare two")
    if config.output:
        check_writable(Path(config.output).parent, f"output {config.output}")
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    policies = [Policy(path, config, mesh) for path in config.models]
    lines = Lines(Path(config.output)) if config.output else None
    if config.page:
        from rlhf_jax.commands.chat.page import converse_on_page as talk  # needs bottle
    else:
        talk = converse
    votes = talk(config, policies, lines)
    if votes:
        kept = f" in {config.output}" if lines is not None else ", kept nowhere (--output)"
        tell(f"{len(votes)} votes{kept}; preferred: {preferred(votes, config.models)}")
    return votes
