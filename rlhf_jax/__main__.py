"""The commands `rlhf-jax` and `python -m rlhf_jax`."""

from __future__ import annotations

import sys
from typing import NoReturn

from rlhf_jax.hosts.interrupts import own_process


def main() -> NoReturn:
    """The command line of this process."""

    def command() -> int:
        from rlhf_jax import cli  # takes a while, in which Ctrl-C should be heard

        return cli.code_of(sys.argv[1:])

    own_process(command)


if __name__ == "__main__":
    main()
