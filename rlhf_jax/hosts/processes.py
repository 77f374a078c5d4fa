"""Several processes as one program: how they find one another, agree, and end together.

Every process runs the same Python over the same rows (JAX's multi-controller model), and its devices hold a part of
every array. The functions here are called by all processes at the same place, or none comes back.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.interrupts import clear

Value = TypeVar("Value")


@jax.jit
def pack(values: tuple[jax.Array, ...]) -> jax.Array:
    """Scalars as one float32 array, so that they leave the device in one transfer."""
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in values])


GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that say where process 0 listens, how many processes there are, and which one this is."""

LOST = 3
"""Exit code of a process that another one of the run has left alone."""

CONNECT_SECONDS, HEARTBEAT_SECONDS, GOODBYE_SECONDS = 300, 60, 60
"""How long a process waits for the others to start, to give a sign of life, and to end."""

_WHY_ABORTED = (
    "error: JAX ended this process, most likely because another one of the run ended (its own output says "
    "why); start all of them again with the same command and they continue from the newest checkpoint"
)


def initialize() -> None:
    """Join the other processes of this run, if there are any; before anything touches a device.

    They are given by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or JAX
    finds them: tasks of SLURM (srun) or Open MPI (mpirun), or the workers of a TPU slice. JAX_NUM_PROCESSES=1 forbids
    to look. Where nothing hints at others, nothing is tried.

    Raises:
        UserError: the variables contradict each other, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    arguments = _given()
    if arguments is None and not _has_company():
        return
    try:
        jax.distributed.initialize(
            **(arguments or {}),
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=GOODBYE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        if arguments is None and isinstance(error, ValueError):  # a TPU whose surroundings JAX does not know: Colab
            return
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the other processes cannot be reached ({reason}); start all of them, and check {', '.join(GIVEN)}"
        ) from error
    if several():
        _explain_abort()


def _given() -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize from the environment; None if it is for JAX to find out."""
    address, count, index = (os.environ.get(name, "") for name in GIVEN)
    if not address:
        if index or count not in ("", "1"):
            raise UserError(f"{GIVEN[0]} is not set, but {GIVEN[1] if count else GIVEN[2]} is; set all of {GIVEN}")
        return None
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)) or not address.partition(":")[2]:
        raise UserError(
            f"{GIVEN[0]}={address} {GIVEN[1]}={count} {GIVEN[2]}={index} do not name a process; give the host:port of "
            "process 0, how many processes there are, and which one this is, from 0"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _has_company() -> bool:
    """Whether the surroundings hint at other processes: a launcher that started several, or a TPU machine."""
    environment = os.environ
    if environment.get(GIVEN[1]) == "1":
        return False
    launched = "SLURM_STEP_NODELIST" in environment and environment.get("SLURM_NTASKS", "1") != "1"
    if launched or environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return True
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if not chips or "tpu" not in platforms or importlib.util.find_spec("libtpu") is None:
        return False
    named = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")  # on GKE
    return "," in named or "MEGASCALE_COORDINATOR_ADDRESS" in environment if named else True


def _explain_abort() -> None:
    """Have a line of ours follow JAX's when it aborts, in a thread of C++, since another process has gone."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(_: int) -> None:
        os.write(2, f"\nrlhf-jax: {_WHY_ABORTED}\n".encode())
        clear()
        os._exit(LOST)

    global _explain  # C keeps no reference
    _explain = explain
    ctypes.CDLL(None).signal(int(signal.SIGABRT), explain)


_explain: object = None


def why_lost(error: BaseException) -> str:
    """The same line where what failed is an exchange with a process that has gone; else empty."""
    gone = re.search(r"(?i)gloo|by peer|heartbeat|coordination service", str(error))
    return _WHY_ABORTED if several() and isinstance(error, jax.errors.JaxRuntimeError) and gone else ""


def several() -> bool:
    """Whether the run has several processes."""
    return jax.process_count() > 1


def share() -> tuple[int, int]:
    """(number of this process, from 0; how many there are)."""
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


def any_of(flags: list[bool]) -> list[bool]:
    """Each flag: whether it is set in any process."""
    if not several():
        return flags
    return multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist()


def check_shared(file: Path, what: str) -> None:
    """Raise a UserError, about `what`, unless all processes see a file that process 0 wrote."""
    (unseen,) = any_of([not file.is_file()])
    if unseen:
        raise UserError(
            f"{what}: not all processes see what process 0 writes there; put it on a file system that all hosts share"
        )


def from_first(function: Callable[[], Value]) -> Value:
    """What `function()` returns in process 0, a JSON value, in all of them.

    Raises:
        UserError: it raised one there.
    """
    if not several():
        return function()
    answer = b""
    if is_first():
        try:
            answer = json.dumps({"value": function()}).encode()
        except UserError as error:
            answer = json.dumps({"error": str(error)}).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
    padded = np.zeros(length, np.uint8)
    padded[: len(answer)] = np.frombuffer(answer, np.uint8)
    said = json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def to_host(tree: object) -> Any:
    """Arrays as numpy, whole, in every process; where parts lie in other processes, they are gathered."""

    def whole(x: object) -> object:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        tell(text)
