"""Settings of what a bug report needs."""

from __future__ import annotations

from rlhf_jax.config.settings import settings


@settings
class EnvArgs:
    """All of `rlhf-jax env`: versions, the machine and its devices, without names of people, paths or tokens.

    Args:
        devices: ask jax for its devices, which starts them; a TPU or GPU that another process holds is left alone
            with false.
    """

    devices: bool = True
