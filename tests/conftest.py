"""Hypothesis profiles, and the fixture that runs a test over every array library."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from support import NAMESPACES, namespace

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


@pytest.fixture
def seeded():
    """Let PyTorch draw the same random numbers in every test."""
    torch.manual_seed(0)
