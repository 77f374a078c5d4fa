"""Objects in buckets of Google Cloud Storage, `gs://bucket/name`, by tensorstore, which orbax brings.

An object is there whole or not at all, and every write gives it another generation, by which a reader sees that it is
still reading the same. A listing that is refused, or of a bucket that does not exist, comes back empty from here, so
an object of the name itself is always asked for first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tensorstore
from rlhf_jax.errors import UserError, reason

SCHEME = "gs://"
"""How the name of what lies in a bucket begins."""

RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
"""How often a request that fails for no fault of ours is repeated: for about 25 seconds in all."""

LOGIN = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the file of a key"


class Object(NamedTuple):
    """What was read of an object, and which of its versions that was."""

    data: bytes
    generation: bytes


class Gone(OSError):
    """An object is missing, is another one, or ends too early."""


PIECE, AT_ONCE = 8 << 20, 4
"""Bytes of a long object that are read in one request, and such requests at a time."""


def in_bucket(path: object) -> bool:
    """Whether a path names something in a bucket."""
    return isinstance(path, str) and path.startswith(SCHEME)


def split(url: str) -> tuple[str, str]:
    """Bucket and name of `gs://bucket/name`, without a slash at its end.

    Raises:
        UserError: one of the two is empty, or a part of the name is no name of a file.
    """
    bucket, _, name = url.removeprefix(SCHEME).rstrip("/").partition("/")
    if not bucket or not name:
        raise UserError(f"{url} names no object of a bucket; write gs://BUCKET/NAME")
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
        raise UserError(f"{url}: a part of its name is empty, ., .. or has a \\, which no file of ours has; mend it")
    return bucket, name


def trimmed(url: str) -> str:
    """The name of something in a bucket without slashes at its end; raises as `split`."""
    split(url)
    return url.rstrip("/")


def nothing(url: str) -> UserError:
    """What is to be raised of a name that names nothing."""
    return UserError(f"{url}: no such object, none below it, and maybe no such bucket; check both names")


@functools.cache
def store(bucket: str) -> tensorstore.KvStore:
    """A bucket, whose keys are the names of its objects.

    Raises:
        UserError: the file of the credentials is not there, without which tensorstore asks as nobody.
    """
    import tensorstore as ts

    if (key := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")) and not os.path.isfile(key):
        raise UserError(f"GOOGLE_APPLICATION_CREDENTIALS is {key}, no file; name the file of a key, or unset it")
    return ts.KvStore.open(
        {"driver": "gcs", "bucket": bucket}, context=ts.Context({"gcs_request_retries": RETRIES})
    ).result()


def _result(url: str, asked: Callable[[], Any]) -> Any:
    """What `asked` returns, which waits for the service.

    Raises:
        OSError: why it is not, and what to do.
    """
    try:
        return asked()
    except UserError:
        raise
    except (ValueError, RuntimeError, NotImplementedError) as error:
        kind = Gone if str(error).startswith("OUT_OF_RANGE") else OSError
        raise kind(errno.EIO, why(error), url) from error


@contextlib.contextmanager
def asked(url: str) -> Iterator[None]:
    """Around what is asked of a bucket: a refusal becomes a UserError about the object, or else `url`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{getattr(error, 'filename', None) or url}: {reason(error)}") from error


def why(error: Exception) -> str:
    """What tensorstore says of a request that failed, in words, with the cure."""
    text = str(error)
    code = match[1] if (match := re.search(r"http_response_code='(\d+)'", text)) else ""
    if code in ("401", "403") or text.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
        return f"no credentials, or none that may do this; {LOGIN}"
    if code == "404":
        return "there is no such bucket; check its name"
    if text.startswith("OUT_OF_RANGE"):
        return "it is cut short; upload it again"
    if match := re.search("(bucket|object) name", text):
        return f"no {match[1]} has such a name; check it"
    said = " ".join(re.sub(r"\[[a-z_]+=.*", "", text.partition("failed: ")[2] or text).split())
    if "credentials file" in said:
        return f"{said.partition(': ')[2]}; {LOGIN}"
    return f"the service cannot be asked ({reason(ValueError(said))}); check the network, or try later"


def read(url: str, *, unless: bytes | None = None) -> Object | None:
    """An object; None if it is missing. Of one that is still the generation `unless` no bytes are sent.

    Raises:
        OSError: it cannot be read; says why.
    """
    bucket, name = split(url)
    found = _result(url, lambda: store(bucket).read(name, if_not_equal=unless).result())
    if found.state == "unspecified":
        return Object(b"", unless or b"")
    return Object(found.value, found.stamp.generation) if found.state == "value" else None


def exists(url: str) -> bool:
    """Whether there is an object of this name; no bytes of it are sent.

    Raises:
        OSError: it cannot be asked for; says why.
    """
    bucket, name = split(url)
    return bool(_result(url, lambda: store(bucket).read(name, byte_range=slice(0, 0)).result()).state != "missing")


def read_parts(url: str, bounds: Sequence[tuple[int, int]], *, of: bytes = b"") -> list[Object]:
    """Of an object, the bytes from `first` to before `last` of each of the bounds, all asked for at once.

    Raises:
        OSError: it cannot be read, is missing, ends earlier, or is not the generation `of` any more; says why.
    """
    bucket, name = split(url)
    asked = [store(bucket).read(name, byte_range=slice(first, last)) for first, last in bounds]
    found = [_result(url, future.result) for future in asked]
    if any(each.state != "value" or of not in (b"", each.stamp.generation) for each in found):
        raise Gone(errno.ESTALE, "it was replaced or deleted while it was read; start again", url)
    return [Object(each.value, each.stamp.generation) for each in found]


def stream(url: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of an object, a few pieces in memory at a time.

    Raises:
        Gone: it is missing, or shorter.
        OSError: it cannot be read; says why.
    """
    bounds = [(first, min(first + PIECE, size)) for first in range(0, size, PIECE)]
    for i in range(0, len(bounds), AT_ONCE):
        yield from (piece.data for piece in read_parts(url, bounds[i : i + AT_ONCE]))


def write(url: str, data: bytes) -> None:
    """Put an object there, in the place of one of that name.

    Raises:
        OSError: it is not written, and what was there is as it was; says why.
    """
    bucket, name = split(url)
    if not _result(url, lambda: store(bucket).write(name, data).result()).generation:
        raise refused(url)  # tensorstore takes a 412 for a condition that is not met, also where there is none


def refused(url: str) -> OSError:
    """What is to be raised where the service answers 412 for no condition of ours, as by a policy of the bucket."""
    cure = "look at the policies of the bucket and its organisation, or take another"
    return OSError(errno.EPERM, f"the service refuses it (412); {cure}", url)


def swap(url: str, data: bytes, of: bytes | None) -> bytes | None:
    """Put an object in the place of the generation `of`, None for none: its generation, or None if another is there.

    A swap whose reply is lost may look like one that was refused.

    Raises:
        OSError: it may be written or not, or it is refused though no other is there; says why.
    """
    bucket, name = split(url)
    now = lambda: _result(url, lambda: store(bucket).read(name).result())  # noqa: E731
    if of is None:
        missing = now()
        if missing.state != "missing":
            return None
        of = missing.stamp.generation
    made = _result(url, lambda: store(bucket).write(name, data, if_equal=of).result()).generation
    if not made and now().stamp.generation == of:
        raise refused(url)
    return made or None


def delete(url: str) -> None:
    """Delete an object, if it is there.

    Raises:
        OSError: it cannot be deleted; says why.
    """
    bucket, name = split(url)
    _result(url, lambda: store(bucket).write(name, None).result())


def there(url: str) -> str:
    """What `url` names: "object", "directory", which objects lie below, or nothing.

    Raises:
        OSError: it cannot be listed; says why.
    """
    _, name = split(url)
    if _listed(url, name, f"{name}\0"):
        return "object"
    return "directory" if below(url) else ""


def below(url: str) -> list[str]:
    """The names of all objects below `url`/, without that, sorted.

    Raises:
        OSError: they cannot be listed; says why.
    """
    _, name = split(url)
    return sorted(key[len(name) + 1 :] for key in _listed(url, f"{name}/", f"{name}0"))  # 0 follows /


def _listed(url: str, first: str, last: str) -> list[str]:
    """The names in the bucket of `url` from `first` to before `last`."""
    import tensorstore as ts

    within, (bucket, _) = ts.KvStore.KeyRange(first, last), split(url)
    return [key.decode() for key in _result(url, lambda: store(bucket).list(within).result())]
