"""Eight CPU devices and no implicit promotion, so that careless code fails here first."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

from cbn_jax.core.backward import note_optimizer

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# The long one is chosen by ``--hypothesis-profile=long``.
settings.register_profile("short", max_examples=12, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=300, deadline=None)
settings.load_profile("short")


def pytest_configure(config):
    """Most of the time goes into compiling, so compiled programs are kept between runs."""
    cache = getattr(config, "cache", None)  # None under -p no:cacheprovider
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def optimizations(request):
    """XLA optimizes in tests marked ``program``, which read its programs, and nowhere else.

    Unoptimized programs compile faster and compute the same up to rounding.
    """
    always = os.environ.get("CBN_JAX_OPTIMIZE") == "1"
    off = not always and request.node.get_closest_marker("program") is None
    jax.config.update("jax_disable_most_optimizations", off)


# These import what only the extra ``studies`` installs.
STUDIES = [
    "test_benchmarks.py",
    "test_colabs.py",
    "test_data.py",
    "test_data_parallel.py",
    "test_examples.py",
    "test_landscape.py",
    "test_norm_batch.py",
    "test_packaging.py",
    "test_processes.py",
    "test_resume.py",
    "test_site.py",
    "test_svg.py",
    "test_tables.py",
]
collect_ignore = [] if importlib.util.find_spec("tyro") else STUDIES


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs hold memory maps, and Linux allows a process some 65,000."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def eight_devices():
    """A parallel test that sees one device proves nothing."""
    assert jax.device_count() == 8


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the benchmarks keep prepared data."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def loose():
    """Implicit promotion of dtypes, which optax's counters need."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", autouse=True)
def optimizer_in_this_process():
    """Without one, a gradient of a method with backward statistics warns."""
    note_optimizer()
