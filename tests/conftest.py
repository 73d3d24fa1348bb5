"""What every test stands on: eight CPU devices, full fp32 matrix products, strict dtype promotion, no network."""

import gc
import os
import tempfile
from pathlib import Path

# Read when the library is first imported, so before anything below imports it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = "NOT RUN: set R1JAX_TEST_ASSETS to the folder with the data"


def pytest_configure(config: pytest.Config) -> None:
    """Sets jax up before any test imports r1jax: a backend that has started keeps its number of devices."""
    # No test finds rows that an earlier run has tokenised; processes that a test starts read the variable too.
    cache = tempfile.TemporaryDirectory(prefix="r1jax-cache-")
    os.environ["R1JAX_CACHE"] = cache.name
    config.add_cleanup(cache.cleanup)
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") and (0, 10) <= jax.__version_info__ <= (0, 11, 0):
        # The older way to compile loops for a CPU takes half of the time, and runs of tests mostly compile; a module in
        # one piece saves another tenth. jax 0.11.2 does not know the first, and what XLA does not know ends a process;
        # those that a test starts have both too.
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # The default is TF32 on GPU: parity needs the full product.
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_collection_finish() -> None:
    """Takes what the imports left out of garbage collection: going through it again cost a twentieth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder named by R1JAX_TEST_ASSETS. Unset, the test is counted as NOT RUN; set but not a folder, it fails."""
    folder = os.environ.get("R1JAX_TEST_ASSETS")
    if not folder:
        pytest.skip(NOT_RUN)
    path = Path(folder).resolve()
    assert path.is_dir(), f"R1JAX_TEST_ASSETS: need a folder, got {folder}"
    return path


@pytest.fixture(scope="session")
def smollm2(assets: Path) -> Path:
    """SmolLM2-135M-Instruct as an HF directory; `make test-real` writes it with the maker among the assets."""
    path = ROOT / ".cache" / "smollm2"
    assert (path / "model.safetensors").is_file(), f"{path}: no model there; run `make test-real`"
    return path


def pytest_terminal_summary(terminalreporter) -> None:
    """Says how many tests were left out for want of assets, so that a green run cannot pass for a whole one."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NOT_RUN in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"NOT RUN for want of R1JAX_TEST_ASSETS: {count}", yellow=True)
