"""The child process of `programs`: a script that gives up what it may do and then runs a program of a model.

Read from standard input: {code, tests?, input?, marker}. The marker is written to the pipe `channel` when all is done:
nothing else proves it, since a program may print what it likes and end when it likes.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType
from typing import Any

KERNELS = {
    "x86_64": (0xC000003E, {56, 57, 58, 435, 41, 62, 129, 200, 234, 424, 101, 310, 311, 425, 160, 302, 272, 308, 321}),
    "aarch64": (0xC00000B7, {220, 435, 198, 129, 138, 130, 131, 424, 117, 270, 271, 425, 164, 261, 97, 268, 280}),
}
"""Machine -> its mark in seccomp, and the numbers of clone, fork, vfork, clone3, socket, kill, rt_sigqueueinfo, tkill,
tgkill, pidfd_send_signal, ptrace, process_vm_readv and _writev, io_uring_setup, setrlimit, prlimit64, unshare, setns,
bpf."""

WRITING, TRUNCATING = 0x1FF2, 1 << 14
"""Landlock's rights to write, make and remove files; and to cut them, known since version 3."""

libc = ctypes.CDLL(None, use_errno=True)


def limit(seconds: int, memory: int, output: int) -> None:
    """Limits of time, memory, and the size of files; no core dump; where the system holds root to it, no process."""
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (output, output),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_NPROC: (0, 0),
    }
    for which, values in limits.items():
        resource.setrlimit(which, values)


def write_only_below(folder: str) -> None:
    """No writing elsewhere, by Landlock (Linux 5.13)."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return
    rights = WRITING | (TRUNCATING if version >= 3 else 0)
    rules = libc.syscall(444, ctypes.create_string_buffer(struct.pack("Q", rights)), 8, 0)
    place = os.open(folder, os.O_RDONLY)
    libc.syscall(445, rules, 1, ctypes.create_string_buffer(struct.pack("=Qi", rights, place)), 0)
    libc.syscall(446, rules, 0)
    os.close(place)
    os.close(rules)


def refuse_calls() -> None:
    """No processes or threads, no sockets, no signals to others, no new limits, by seccomp."""
    if platform.machine() not in KERNELS:
        return
    mark, numbers = KERNELS[platform.machine()]
    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, mark), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    steps += [(above, len(numbers) + 1, 0, 0x40000000)]  # another way to call the same
    steps += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(sorted(numbers))]
    steps += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001)]  # allowed; not permitted
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    libc.prctl(22, 2, program, 0, 0)


def ran(run: Callable[..., object], program: CodeType, names: dict[str, Any], may_exit: bool) -> None:
    """Run a program, which of its own accord `may_exit` well."""
    try:
        run(program, names)
    except SystemExit as error:
        if not may_exit or error.code not in (None, 0):
            raise


def steps_of(job: dict[str, str], channel: int) -> Iterator[object]:
    """The program, its tests and the proof, each done when it is asked for.

    All is compiled and looked up before the program runs, which may put what it likes in its place; and what is left
    to do is in no frame that the program is called from.
    """
    tests = job.get("tests")
    names: dict[str, Any] = {"__name__": "__main__" if tests is None else "program"}
    compiled = partial(compile, mode="exec", dont_inherit=True)  # not with the __future__ of this file
    steps: list[Callable[[], object]] = [partial(ran, exec, compiled(job["code"], "program"), names, tests is None)]
    if tests is not None:
        steps.append(partial(exec, compiled(tests, "tests"), names))
    steps += [lambda: sys.stdout.flush(), partial(os.write, channel, job["marker"].encode())]
    return map(lambda step: step(), steps)


def main(folder: str, channel: int, seconds: int, memory: int, output: int) -> None:
    end = os._exit
    os.chdir(folder)
    job = json.load(sys.stdin)
    with tempfile.TemporaryFile(dir=folder) as given:
        given.write(job.pop("input", "").encode())
        given.seek(0)
        os.dup2(given.fileno(), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    limit(seconds, memory, output)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    write_only_below(folder)
    refuse_calls()
    try:
        asked = [job]
        del job
        deque(steps_of(asked.pop(), channel), maxlen=0)
    except BaseException:
        end(1)
    end(0)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
