"""`rlhf-jax env`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from rlhf_jax import __version__
from rlhf_jax.config import EnvArgs
from rlhf_jax.errors import reason, tell
from rlhf_jax.runs.curves import text_table

PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain", "transformers",
    "tokenizers", "safetensors", "qwix", "jsonargparse", "tensorflow-datasets", "numpy", "torch",
)  # fmt: skip
VARIABLES = re.compile(r"(JAX|XLA|LIBTPU|TPU|CUDA)_\w+|HF_HUB_OFFLINE")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH", re.IGNORECASE)
HOMES = re.compile(r"/(?:home|Users)/[^/\s:,]+|/root\b")


def run(config: EnvArgs) -> dict[str, str]:
    """Print and return name -> what there is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "rlhf-jax": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.platform()}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB",
        **{name: version for name in PACKAGES if (version := version_of(name))},
        **{n: without_homes(v) for n, v in os.environ.items() if VARIABLES.fullmatch(n) and not SECRET.search(n)},
    }
    if config.devices:
        found["devices"] = devices()
    tell(text_table(["what", "is"], list(found.items())))
    return found


def version_of(package: str) -> str:
    """The version of an installed package; empty if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def devices() -> str:
    """What jax computes on, or why that is not known."""
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # of a driver, or of another process that holds them
        return without_homes(f"none: {type(error).__name__}: {reason(error)}")
    kind = f"{found[0].device_kind} ({found[0].platform})"
    return f"{len(found)} x {kind}, of {jax.process_count()} process(es)"


def without_homes(text: str) -> str:
    """A text whose paths do not say whose they are."""
    return HOMES.sub("~", text.replace(str(Path.home()), "~") if len(str(Path.home())) > 1 else text)
