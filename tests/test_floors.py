"""The architecture: imports go down only, and the core loads no framework.

The table is the project's plan of rooms. Every module has a floor; a module may import from lower floors, and from its
own as long as no cycle comes of it. Imports inside functions count as well, except where a room is entered on demand
only (`ON_DEMAND`), and blocks for type checkers do not, as they are not executed.
"""

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"flora_tensor": ROOT / "flora_tensor", "flora_torch": ROOT / "backends" / "flora_torch"}

FLOORS = {
    "flora_torch.demo": 14,
    "flora_torch.digits": 14,
    "flora_torch.digit_networks": 14,
    "flora_torch.peft": 13,
    "flora_torch.model": 12,
    "flora_torch.attachment": 12,
    "flora_torch.inventory": 12,
    "flora_torch.loading": 12,
    "flora_torch.saving": 12,
    "flora_torch.stacks": 12,
    "flora_torch.base_check": 12,
    "flora_torch.in_place": 12,
    "flora_torch.row_adapters": 12,
    "flora_torch.hot_swap": 12,
    "flora_torch.convert": 12,
    "flora_torch.selection": 12,
    "flora_torch.patterns": 12,
    "flora_torch.model_weights": 12,
    "flora_torch.calibration": 12,
    "flora_torch.kinds": 11,
    "flora_torch.bilinear": 11,
    "flora_torch.containers": 11,
    "flora_torch.experts": 11,
    "flora_torch.layers": 11,
    "flora_torch.weight_layer": 11,
    "flora_torch.flora_layer": 11,
    "flora_torch.adapted_module": 11,
    "flora_torch.freezing": 11,
    "flora_torch.reading": 11,
    "flora_torch.gradients": 12,
    "flora_torch.training": 12,
    "flora_torch.initialize": 11,
    "flora_torch.moment_starts": 11,
    "flora_torch.starts": 11,
    "flora_torch.update": 11,
    "flora_torch.pytree": 10,
    "flora_torch.base_weight": 10,
    "flora_torch.calling": 10,
    "flora_torch.rows": 11,
    "flora_torch.scaling": 11,
    "flora_torch.functional": 10,
    "flora_torch.chain": 10,
    "flora_torch.cost": 10,
    "flora_torch.plans": 10,
    "flora_torch.rebuild": 10,
    "flora_torch._caching": 10,
    "flora_torch.step_weights": 10,
    "flora_torch.steps": 10,
    "flora_torch.depthwise": 10,
    "flora_torch.geometry": 10,
    # torch above this line, never below
    "flora_tensor.cli": 5,
    "flora_tensor.extraction": 4,
    "flora_tensor.adapter_algebra": 4,
    "flora_tensor.adapter_fit": 4,
    "flora_tensor.conversion": 4,
    "flora_tensor.adapter_export": 4,
    "flora_tensor.comparison": 4,
    "flora_tensor.merging": 4,
    "flora_tensor.rank_study": 4,
    "flora_tensor.report": 4,
    "flora_tensor.html_report": 4,
    "flora_tensor.plots": 4,
    "flora_tensor.checkpoint": 3,
    "flora_tensor.checkpoint_writer": 3,
    "flora_tensor.adapter": 3,
    "flora_tensor.adapter_file": 3,
    "flora_tensor.moments": 3,
    "flora_tensor.interop": 3,
    "flora_tensor.allocation": 3,
    "flora_tensor.decomposition": 2,
    "flora_tensor.spectra": 2,
    "flora_tensor.ranks": 2,
    "flora_tensor.noise": 2,
    "flora_tensor._whiteness": 2,
    "flora_tensor.tucker_algebra": 1,
    "flora_tensor.tucker_tensor": 1,
    "flora_tensor.arrangement": 1,
    "flora_tensor.magnitudes": 1,
    "flora_tensor.stacking": 2,
    "flora_tensor.algebra": 0,
}
TORCH_FLOOR = 10

# The command line enters these rooms when a command asks for them, so that no other command needs torch.
ON_DEMAND = {("cli", "flora_torch")}

FRAMEWORKS = {"torch", "jax", "jaxlib", "tensorly", "cupy", "peft", "transformers"}


class Import(NamedTuple):
    """One import: of what, on which line, and whether it happens when the module is loaded."""

    name: str
    line: int
    at_module_level: bool


def module_names() -> dict[str, Path]:
    """Return every module of both packages by its dotted name."""
    found = {}
    for package, directory in PACKAGES.items():
        for path in sorted(directory.rglob("*.py")):
            parts = (package, *path.relative_to(directory).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = module_names()


def imports_of(tree: ast.AST, module: str, *, is_package: bool = False, inside: bool = False) -> Iterator[Import]:
    """Yield every import below a syntax tree, relative ones resolved, those for type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, not inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (Import(resolve(base, alias.name), node.lineno, not inside) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            rest = ast.Module(body=node.orelse, type_ignores=[])
            yield from imports_of(rest, module, is_package=is_package, inside=inside)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(node, module, is_package=is_package, inside=inside or function)


def resolve(base: str, name: str) -> str:
    """Return the module that ``from base import name`` loads: base, or a submodule of it."""
    return f"{base}.{name}" if f"{base}.{name}" in MODULES else base


def imports(module: str) -> list[Import]:
    path = MODULES[module]
    return list(imports_of(ast.parse(path.read_text()), module, is_package=path.name == "__init__.py"))


@functools.cache
def floor(module: str) -> int | None:
    """Return a module's floor: the table's or its room's; a private module is as high as the highest one it uses."""
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        if (name := ".".join(parts[:length])) in FLOORS:
            return FLOORS[name]
    if len(parts) > 1 and parts[1].startswith("_"):
        below = [floor(i.name) for i in imports(module) if i.name in MODULES and i.name != module]
        ground = 0 if parts[0] == "flora_tensor" else TORCH_FLOOR
        return max([ground, *(f for f in below if f is not None)])
    return None


def on_demand(module: str, package: str) -> bool:
    """Tell whether a module may enter another package when it is asked to."""
    return (module.partition(".")[2].split(".")[0], package) in ON_DEMAND


def test_every_module_is_on_a_floor():
    homeless = [m for m in MODULES if m not in PACKAGES and floor(m) is None and not m.endswith("__main__")]
    assert not homeless, f"give these modules a floor in tests/test_floors.py: {', '.join(homeless)}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    if module in PACKAGES or module.endswith("__main__"):
        return  # a package's front door, and the door to its command line, see every room
    for name, line, _ in imports(module):
        root = name.split(".")[0]
        if root not in PACKAGES or on_demand(module, root):
            continue
        assert name not in PACKAGES or root != module.split(".")[0], (
            f"{module}, line {line}: imports from its own package's front door; import the room itself"
        )
        below = floor(name) if name not in PACKAGES else 0
        assert below is not None
        assert below <= floor(module), f"{module} (floor {floor(module)}), line {line}: imports {name} (floor {below})"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("flora_tensor")])
def test_the_core_never_imports_a_framework(module):
    for name, line, at_module_level in imports(module):
        root = name.split(".")[0]
        if root in FRAMEWORKS:
            assert not at_module_level, f"{module}, line {line}: imports {name} when it is loaded"
        if root == "flora_torch":
            assert on_demand(module, root), f"{module}, line {line}: the core imports {name}"
            assert not at_module_level, f"{module}, line {line}: imports {name} when it is loaded"


def test_there_are_no_cycles():
    graph = {
        module: {i.name for i in imports(module) if i.name in MODULES and i.name not in PACKAGES}
        for module in MODULES
        if module not in PACKAGES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' -> '.join(error.args[1])}")


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after a statement."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_core_loads_no_framework():
    loaded = loaded_by("import flora_tensor")
    assert "flora_tensor" in loaded
    # SciPy takes as long to load as all the rest, and small tensors do without.
    assert not loaded & (FRAMEWORKS | {"matplotlib", "sklearn", "pandas", "scipy"})
    # Nor what NumPy itself leaves for later, its tests among it: array_api_compat.numpy takes longer than NumPy does.
    assert "unittest" not in loaded - loaded_by("import numpy")


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("flora_tensor.") and "__main__" not in m])
def test_no_room_of_the_core_loads_a_framework(module):
    assert not loaded_by(f"import {module}") & FRAMEWORKS


def test_importing_the_core_prints_and_warns_nothing():
    command = [sys.executable, "-W", "error", "-c", "import flora_tensor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_importing_the_layers_loads_no_host_for_them():
    assert not loaded_by("import flora_torch") & {"peft", "transformers", "accelerate"}


def test_decomposing_an_array_loads_no_other_framework():
    loaded = loaded_by("import numpy, flora_tensor; flora_tensor.tucker(numpy.ones((3, 4, 5)), ranks=(1, 1, 1))")
    assert not loaded & (FRAMEWORKS | {"scipy"})


def test_the_oldest_versions_tried_are_the_oldest_allowed():
    """`make oldest` on the oldest Python proves the floors of pyproject.toml, so its pins have to be those."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    floors = dict(line.split(">=") for line in [*project["dependencies"], *extras["viz"], *extras["tensorly"]])
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split(";")[0].split("==") for line in reversed(lines))  # the first line of a name counts
    for name, floor in floors.items():
        assert f"{pins[name]}.".startswith(f"{floor}.")


# --- the reader itself -------------------------------------------------------------------------------


def test_the_reader_sees_every_kind_of_import():
    source = """
import torch
from flora_tensor import algebra, unfold
from . import spectra
from .ranks import select_ranks
if TYPE_CHECKING:
    import jax
else:
    import tensorly
def f():
    import cupy.linalg
try:
    import peft
except ImportError:
    pass
class C:
    import transformers
"""
    found = {(i.name, i.at_module_level) for i in imports_of(ast.parse(source), "flora_tensor.decomposition")}
    assert found == {
        ("torch", True),
        ("flora_tensor.algebra", True),
        ("flora_tensor", True),
        ("flora_tensor.spectra", True),
        ("flora_tensor.ranks", True),
        ("tensorly", True),
        ("cupy.linalg", False),
        ("peft", True),
        ("transformers", True),
    }
