"""Laws of checkpoints: all or nothing, bit by bit, on any mesh, and never silently wrong."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import MeshConfig
from rlhf_jax.errors import UserError
from rlhf_jax.runs import checkpoint
from rlhf_jax.runs.checkpoint import Checkpoints, damage
from rlhf_jax.sharding import make_mesh, tree_shardings


def tree(seed: int = 0, mesh=None):
    """Parameters under names of the sharding rules, moments, a counter and a coefficient."""
    rng = np.random.default_rng(seed)
    kernel = lambda: jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)  # noqa: E731
    half = lambda: {"head": {"kernel": kernel()}, "score": {"kernel": jnp.ones(16), "bias": jnp.float32(rng.normal())}}  # noqa: E731
    found = {
        "state": {"step": jnp.int32(seed), "params": {"policy": half(), "value": half()}},
        "kl_coef": jnp.float32(0.1),
    }
    found["average"] = half()
    return jax.device_put(found, tree_shardings(mesh or make_mesh(MeshConfig()), found))


def host(found) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def same(a, b) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(host(a), host(b), strict=True))


def record(step: int, best: int | None = None) -> dict:
    return {"step": step, "best": best}


@pytest.fixture
def kept(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_every=0)


def saved(kept: Checkpoints, *steps: int) -> None:
    for step in steps:
        kept.save(step, tree(step), record(step))
    kept.wait()
    assert kept.failure is None


def test_what_was_saved_comes_back_on_half_the_devices_and_half_of_these_again(kept):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    now = tree(3, mesh)
    for step, (sizes, count) in enumerate([((1, 2, 2), 4), ((1, 1, 2), 2), ((4, 2, 1), 8)]):
        kept.save(step, now, record(step))
        kept.wait()
        mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[:count])
        now = kept.restore(step, tree(7, mesh))
        assert same(now, tree(3, mesh))
        assert now["average"]["head"]["kernel"].sharding.mesh.size == count


def test_a_part_comes_back_alone(kept):
    saved(kept, 5)
    part = {"state": {"params": {"policy": tree(0)["state"]["params"]["policy"]}}}
    assert same(kept.restore(5, part), {"state": {"params": {"policy": tree(5)["state"]["params"]["policy"]}}})


def test_arrays_may_be_donated_as_soon_as_save_returns(kept):
    state = jax.device_put({"head": {"kernel": np.arange(4_000_000, dtype=np.float32).reshape(2000, 2000)}})
    expected = host(state)[0].copy()
    add = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    kept.save(1, state, record(1))
    for _ in range(20):
        state = add(state)
    kept.wait()
    (found,) = host(kept.restore(1, state))
    np.testing.assert_array_equal(found, expected)


def test_the_last_ones_the_multiples_and_the_best_stay(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_every=4)
    for step in range(11):
        kept.save(step, {"kl_coef": jnp.float32(step)}, record(step, best=3 if step >= 3 else step))
    kept.wait()
    assert kept.steps() == [3, 4, 8, 9, 10]
    assert {path.name for path in kept.directory.iterdir()} == {f"{step:08d}" for step in kept.steps()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, zero, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_checkpoint_with_any_file_harmed_is_named_set_aside_and_the_one_before_is_used(kept, harm):
    saved(kept, 1, 2)
    good = shutil.copytree(kept.path(2), kept.directory.parent / "good")
    files = [path.relative_to(good) for path in sorted(good.rglob("*")) if path.is_file()]
    assert len(files) > 5 and Path("manifest.json") in files and Path("record.json") in files
    for number, name in enumerate(files):
        harm(kept.path(2) / name)
        harmed = {p.name: p.read_bytes() for p in kept.path(2).rglob("*") if p.is_file()}
        said: list[str] = []
        assert kept.newest_intact(said.append) == 1, name
        (line,) = said
        assert line.startswith("checkpoint of step 2 is damaged: ") and "\n" not in line
        assert str(name) in line or name == Path("manifest.json")
        assert harm is not truncate or "bytes instead of" in line or name == Path("manifest.json")
        aside = kept.directory / ("00000002.damaged" + (f"-{number}" if number else ""))
        assert {p.name: p.read_bytes() for p in aside.rglob("*") if p.is_file()} == harmed
        shutil.copytree(good, kept.path(2))
    assert kept.newest_intact(print) == 2
    assert same(kept.restore(2, tree(0)), tree(2))


def test_a_directory_or_a_file_that_does_not_belong_is_damage_too(kept):
    saved(kept, 1)
    (kept.path(1) / "state" / "d" / "foreign").write_text("x")
    assert "foreign" in damage(kept.path(1))


def test_when_all_are_damaged_the_run_is_refused_and_never_started_anew_in_silence(kept):
    saved(kept, 1, 2)
    for step in (1, 2):
        flip(kept.path(step) / "record.json")
    for _ in range(2):
        with pytest.raises(UserError, match=r"holds damaged checkpoints only; start anew with --run.overwrite true"):
            kept.newest_intact(lambda line: None)


def test_what_a_kill_left_half_written_or_half_deleted_goes_away(kept):
    saved(kept, 1, 2)
    shutil.copytree(kept.path(2), kept.directory / "writing-00000003")
    shutil.copytree(kept.path(2), kept.directory / "deleting-00000001")
    assert kept.newest_intact(pytest.fail) == 2
    assert sorted(path.name for path in kept.directory.iterdir()) == ["00000001", "00000002"]


def test_a_save_is_invisible_until_it_is_whole(kept, monkeypatch):
    saved(kept, 1)
    seen = []
    write = checkpoint.write_manifest

    def watched(path, number):
        seen.append((kept.steps(), path.name))
        write(path, number)
        seen.append((kept.steps(), damage(path)))

    monkeypatch.setattr(checkpoint, "write_manifest", watched)
    saved(kept, 2)
    assert seen == [([1], "writing-00000002"), ([1], "")] and kept.steps() == [1, 2]


@pytest.fixture
def small_files():
    """No file of this process grows beyond 2000 bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    yield lambda: limit((2000, hard))
    limit((soft, hard))


def test_a_full_disk_fails_the_save_leaves_no_trace_and_the_one_before_intact(kept, small_files, caplog, capfd):
    saved(kept, 1)
    small_files()
    rng = np.random.default_rng(0)
    kept.save(2, {"head": {"kernel": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}}, record(2))
    kept.wait()
    step, reason = kept.failure
    assert (step, reason) == (2, "File too large")
    assert not caplog.records and not "".join(capfd.readouterr())  # no traceback of orbax's around our line
    assert [path.name for path in kept.directory.iterdir()] == ["00000001"] and not damage(kept.path(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    kept.failure = None
    saved(kept, 3)
    assert kept.steps() == [1, 3]


FAILING = """
import resource, signal, sys
import numpy as np
from rlhf_jax.runs.checkpoint import Checkpoints

kept = Checkpoints(__import__("pathlib").Path(sys.argv[1]), keep_last=1, keep_every=0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
rng = np.random.default_rng(0)
for step in (1, 2):
    kept.save(step, {f"x{i}": rng.normal(size=(99, 99)).astype(np.float32) for i in range(40)}, {"step": step})
    kept.wait()
    print(*kept.failure)
"""


def test_a_failed_save_of_many_arrays_says_its_line_alone(tmp_path):
    """The threads of all arrays report to an event loop that ended with the first failure."""
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(tmp_path / "kept")], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("1 File too large\n2 File too large\n", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("OUT_OF_RANGE: Failed to write 8 bytes to file 4 [os_error_code='28']", "No space left on device"),
        ("Error while serializing: I/O error: Disk quota exceeded (os error 122)", "Disk quota exceeded"),
        (
            "RESOURCE_EXHAUSTED: Out of memory\n while trying",
            "ValueError: RESOURCE_EXHAUSTED: Out of memory while trying",
        ),
    ],
)
def test_what_the_system_said_is_the_reason_whoever_passes_it_on(text, said):
    assert checkpoint.reason_of(ValueError(text)) == said


@pytest.mark.parametrize("where", ["mkdir", "rename"])
def test_a_directory_without_permission_fails_the_save_in_words(kept, monkeypatch, where):
    saved(kept, 1)

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, where, refuse)
    kept.save(2, tree(2), record(2))
    kept.wait()
    assert kept.failure == (2, "Permission denied")
    monkeypatch.undo()
    assert kept.steps() == [1] and not damage(kept.path(1))


@pytest.mark.parametrize("other", [{"more": jnp.ones(3)}, {"head": {"kernel": jnp.ones((16, 25))}}])
def test_a_checkpoint_of_another_model_is_refused_in_one_line(kept, other):
    saved(kept, 1)
    other = {"average": {**tree(0)["average"], **other}}
    with pytest.raises(UserError, match=r"does not fit this run \(") as error:
        kept.restore(1, other)
    assert "\n" not in str(error.value)


def test_the_record_is_what_was_given(kept):
    kept.save(4, {"kl_coef": jnp.float32(1)}, {"best": None, "metrics": {"loss/nll": 0.1 + 0.2, "x": float("nan")}})
    kept.wait()
    found = kept.record(4)["metrics"]
    assert found["loss/nll"] == 0.1 + 0.2 and np.isnan(found["x"])
    assert json.loads((kept.path(4) / "manifest.json").read_text())["files"].keys() > {"record.json"}
