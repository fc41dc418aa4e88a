"""Hypothesis profiles, and the fixture that runs a test over every array library."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from support import NAMESPACES, namespace

try:
    import torch
except ModuleNotFoundError:
    torch: Any = None

# JAX computes in 64 bits where asked to, as the others do. It reads this when it is first imported.
os.environ["JAX_ENABLE_X64"] = "1"

# Data-dependent shapes make the first examples slow (compilation, imports), which says nothing about the tests.
_QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}

# "ci" repeats the same examples on every machine: a red run is a change in the code. "nightly" looks for new ones.
settings.register_profile("ci", derandomize=True, database=None, max_examples=40, **_QUIET)
settings.register_profile("dev", max_examples=40, **_QUIET)
settings.register_profile("nightly", max_examples=1000, **_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Session-wide, because hypothesis refuses fixtures that are made anew for each test function.
@pytest.fixture(scope="session", params=NAMESPACES)
def xp(request: pytest.FixtureRequest):
    """The array-API namespace of each library in turn."""
    return namespace(request.param)


@pytest.fixture(scope="module")
def one_thread():
    """Let PyTorch compute in one thread: tensors this small take longer to share than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def large_products():
    """Let tiny layers run as large ones do, which they stand for; see `torch_models.small_products`."""
    from flora_torch import chain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "_SMALL", 0)
        yield


@pytest.fixture
def seeded():
    """Let PyTorch draw the same random numbers in every test."""
    torch.manual_seed(0)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the modules that import torch where it is not installed: the core's other tests run without it."""
    needs_torch = r"^(from|import) (torch|flora_torch|families)\b"
    if torch is None and collection_path.match("test_*.py"):
        return re.search(needs_torch, collection_path.read_text(), re.MULTILINE) is not None or None
    return None


def pytest_report_header() -> str | None:
    """Say that a run proves nothing about PyTorch."""
    return "torch is not installed: what needs it is left out" if torch is None else None
