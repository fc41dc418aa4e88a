"""Use the installed wheel in an environment that has its hard dependencies only; a program, not a test module."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

import flora_tensor as ft


def main() -> None:
    """Check where the package comes from, what it lacks, what it ships, and that it decomposes a tensor exactly."""
    home = Path(ft.__file__).parent
    assert "site-packages" in home.parts, f"flora_tensor was imported from {home}, not from the wheel"
    for name in ("torch", "jax", "tensorly", "matplotlib"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed: this environment is not bare"
    assert importlib.util.find_spec("flora_torch") is not None, "the wheel lacks the package flora_torch"
    assert (home / "py.typed").exists(), "the wheel lacks py.typed"

    x = np.random.default_rng(0).standard_normal((6, 5, 3, 3))
    fit = ft.tucker(x, rtol=1e-12)
    ft.st_hosvd(np.ones((300, 200, 3), dtype=np.float32), ranks=1)  # large modes need SciPy
    error = np.linalg.norm(x - fit.tucker.to_tensor()) / np.linalg.norm(x)
    assert error < 1e-12, f"a full-rank decomposition is off by {error:.1e}"
    print(f"flora_tensor {ft.__version__} from the wheel, python {sys.version.split()[0]}: relative error {error:.1e}")


if __name__ == "__main__":
    main()
