"""Every test runs on 8 fake CPU devices, with rank promotion an error."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

# Programs this small spend their time in the compiler: LLVM at level 0, loops that are not made by MLIR, and one piece
# of code a program compile several times faster. The HLO passes are the same.
FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=8 {FAST}"
os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests and the programs they start compile the same steps: each worker keeps what it compiled until it ends.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rlhf_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Tracing takes longer than compiling. No line numbers in what is lowered, and the collector looks less often.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
gc.set_threshold(50_000, 20, 100)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402 (it reads what stands above)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
tests_run = 0


def pytest_runtest_teardown(item, nextitem):
    """Release compiled programs: thousands of them use up a process' memory maps (65,530 on Linux), and it dies."""
    global tests_run
    tests_run += 1
    if nextitem is None or nextitem.path != item.path or tests_run % 50 == 0:
        jax.clear_caches()


def pytest_unconfigure():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_pages():
    """A run leaves no page: the many runs of the tests would draw for minutes. The page has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_jax.runs.run.write_beside", lambda directory: "")
        yield


DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip("needs the real data in ../shared/data")
    return DATA
