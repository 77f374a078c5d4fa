"""The commands `rlhf-jax` and `python -m rlhf_jax`."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import NoReturn

from rlhf_jax.hosts.interrupts import own_process

ACCELERATORS = ("libtpu", "jax_plugins")
"""Packages that are there where JAX knows a TPU, or a GPU, whose drivers may have something to say."""


def main() -> NoReturn:
    """The command line of this process."""

    if os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS)):
        # XLA alarms in the log of a slow CPU, "Very slow compile?"; faults are exceptions, and `Progress` says waits
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    def command() -> int:
        from rlhf_jax import cli  # takes a while, in which Ctrl-C should be heard

        return cli.code_of(sys.argv[1:])

    own_process(command)


if __name__ == "__main__":
    main()
