"""What is public is documented in full, what the documents promise runs, and functions stay short.

The reader of docstrings below knows just enough of the numpydoc format: sections are underlined, entries start at the
margin as ``name, name : type``.
"""

import ast
import doctest
import functools
import importlib
import inspect
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from test_floors import MODULES, PACKAGES, ROOT

pytest.importorskip("torch")  # flora_torch is documented too

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
LONGEST_FUNCTION = 60

# --- reading -----------------------------------------------------------------------------------------


def sections(doc: str) -> dict[str, list[str]]:
    """Split a docstring into its numpydoc sections; what comes first is the section with the empty name."""
    lines = inspect.cleandoc(doc).splitlines()
    found: dict[str, list[str]] = {"": []}
    current = found[""]
    for line, following in zip(lines, [*lines[1:], ""]):
        if following and set(following) == {"-"} and line and not line.startswith(" "):
            current = found[line] = []
        elif not (line and set(line) == {"-"}):
            current.append(line)
    return found


def entries(section: list[str]) -> dict[str, str]:
    """Return the text of each entry of a section (its type and description) by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section:
        if line and not line.startswith(" "):
            head, _, kind = line.partition(" : ")
            names = [name.strip().lstrip("*") for name in head.split(",")]
            found |= dict.fromkeys(names, kind)
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


@functools.cache
def syntax(subject: Any) -> Any:
    """Return the syntax tree of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(subject))).body[0]


def annotations(function: Callable[..., Any]) -> dict[str, str]:
    """Return the annotations of a function as they are written (`Array` is an alias that leaves no trace)."""
    arguments = syntax(function).args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    found = {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in every if a is not None}
    returns = syntax(function).returns
    return {name: kind for name, kind in found.items() if name not in {"self", "cls"}} | {
        "return": ast.unparse(returns) if returns else "None"
    }


def holds_arrays(annotation: str) -> bool:
    return re.search(r"\b(Array|Tensor|ndarray)\b", annotation) is not None


def raises(function: FunctionType, depth: int = 1) -> bool:
    """Tell whether a function raises by itself, or hands its arguments to one of the package's that does.

    `array_namespace`, which refuses what is no array, is left out: it would demand the same line of every function.
    """
    calls: set[str] = set()
    for node in ast.walk(syntax(function)):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "_refuse":
                return True
            calls.add(name)
    if depth == 0:
        return False
    called = (inspect.unwrap(function).__globals__.get(name) for name in calls - {"array_namespace"})
    return any(
        isinstance(f, FunctionType) and f.__module__.split(".")[0] in PACKAGES and raises(f, depth - 1) for f in called
    )


# --- judging -----------------------------------------------------------------------------------------


def complaints_about_parameters(documented: dict[str, str], written: dict[str, str]) -> Iterator[str]:
    for name, annotation in written.items():
        if name == "return":
            continue
        if name not in documented:
            yield f"the parameter {name} is not documented"
        elif holds_arrays(annotation) and "shape" not in documented[name]:
            yield f"the shape of {name} is not documented"
    for name in documented.keys() - written.keys():
        yield f"the parameter {name} is documented but does not exist"


def complaints_about_function(function: FunctionType, *, method: bool = False) -> Iterator[str]:
    if not function.__doc__:
        yield "there is no docstring"
        return
    doc, written = sections(function.__doc__), annotations(function)
    yield from complaints_about_parameters(entries(doc.get("Parameters", [])), written)
    if written["return"] not in {"None", "NoReturn"}:
        results = doc.get("Returns", doc.get("Yields"))
        if results is None:
            # A method that takes nothing can say all there is in its one line.
            if not method or len(written) > 1 or not function.__doc__.startswith("Return"):
                yield "there is no section Returns"
        elif holds_arrays(written["return"]) and "shape" not in " ".join(results):
            yield "the shape of the result is not documented"
    if raises(function) and "Raises" not in doc:
        yield "it can raise, but there is no section Raises"
    if not method:
        if "References" not in doc:
            yield "there is no section References"
        if ">>>" not in "\n".join(doc.get("Examples", [])):
            yield "there is no example"


def complaints_about_class(cls: type) -> Iterator[str]:
    if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):
        yield "there is no docstring"
        return
    if issubclass(cls, BaseException):
        return  # a name and when it is raised are all there is to say
    doc = sections(cls.__doc__)
    documented = entries(doc.get("Parameters", [])) | entries(doc.get("Attributes", []))
    parameters = [p for p in inspect.signature(cls).parameters if p not in {"args", "kwargs"} and p[0] != "_"]
    for name in (p for p in parameters if p not in documented):
        yield f"the parameter {name} is not documented"
    for node in syntax(cls).body:
        if isinstance(node, ast.AnnAssign) and holds_arrays(ast.unparse(node.annotation)):
            name = ast.unparse(node.target)
            if name in documented and "shape" not in documented[name]:
                yield f"the shape of {name} is not documented"
    if any(raises(f) for f in constructors(cls)) and "Raises" not in doc:
        yield "it can raise, but there is no section Raises"
    # A record, which has attributes only, is cited where the function that returns it is.
    if "Parameters" in doc and "References" not in doc:
        yield "there is no section References"
    yield from complaints_about_members(cls)


def constructors(cls: type) -> list[FunctionType]:
    """Return what runs when an instance is made, without what a dataclass writes by itself, which has no source."""
    found = [f for f in (vars(cls).get("__init__"), vars(cls).get("__post_init__")) if isinstance(f, FunctionType)]
    return [f for f in found if f.__code__.co_filename != "<string>"]


def is_documented_below(cls: type, name: str) -> bool:
    """Tell whether a class of ours that this one derives from documents the member."""
    ours = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] in PACKAGES]
    return any(getattr(vars(base).get(name), "__doc__", None) for base in ours)


def complaints_about_members(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        subject = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not subject.__doc__ and is_documented_below(cls, name):
            continue
        if isinstance(subject, FunctionType):
            yield from (f"{name}: {c}" for c in complaints_about_function(subject, method=True))
        elif isinstance(subject, property | functools.cached_property) and not subject.__doc__:
            yield f"{name}: there is no docstring"


def public_names() -> list[str]:
    modules = {package: importlib.import_module(package) for package in PACKAGES}
    return [f"{p}.{name}" for p, module in modules.items() for name in getattr(module, "__all__", ())]


@pytest.mark.parametrize("name", public_names())
def test_what_is_public_is_documented(name):
    package, _, attribute = name.partition(".")
    subject = getattr(importlib.import_module(package), attribute)
    if isinstance(subject, type):
        complaints = list(complaints_about_class(subject))
    elif isinstance(subject, FunctionType):
        complaints = list(complaints_about_function(subject))
    elif attribute == "__version__":
        assert isinstance(subject, str)
        return
    else:
        pytest.fail(f"{name} is neither a function nor a class; give it a rule here")
    assert not complaints, f"{name}: " + "; ".join(complaints)


def test_both_packages_say_what_is_public():
    for package in PACKAGES:
        module = importlib.import_module(package)
        assert getattr(module, "__all__", ()), f"{package} has no __all__, or an empty one"
        assert list(module.__all__) == sorted(set(module.__all__)), f"{package}.__all__ is not sorted or has doubles"


def test_a_listing_of_a_package_is_what_is_public():
    for package in PACKAGES:
        module = importlib.import_module(package)
        assert dir(module) == module.__all__


@pytest.mark.parametrize("name", public_names())
def test_what_public_functions_return_is_public(name):
    package, _, attribute = name.partition(".")
    result = getattr(getattr(importlib.import_module(package), attribute), "__annotations__", {}).get("return")
    if isinstance(result, type) and result.__module__.split(".")[0] in PACKAGES:
        assert f"{result.__module__.split('.')[0]}.{result.__name__}" in public_names()


def test_no_module_bears_the_name_of_a_public_function():
    modules = {name.rpartition(".")[2] for name in MODULES} - set(PACKAGES)
    public = {name.partition(".")[2] for name in public_names()}
    assert not modules & public


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function with its number of lines, its docstring not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_doc = ast.get_docstring(node) is not None
            yield node.name, node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1) * has_doc


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    long = [f"{name} has {lines} lines" for name, lines in functions_of(MODULES[module]) if lines > LONGEST_FUNCTION]
    assert not long, f"{module}: {', '.join(long)}; at most {LONGEST_FUNCTION}"


# --- the documents -----------------------------------------------------------------------------------


def blocks(document: str, *languages: str) -> list[str]:
    """Return the fenced code blocks of a document that are in one of the languages."""
    text = (ROOT / document).read_text()
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("README.md", "python", "pycon")
    assert code, "README.md has no Python block"
    scope: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(code):
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, scope, f"README.md, block {number}", "README.md", 0)
            report: list[str] = []
            failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append, clear_globs=False)
            assert not failed.failed, "".join(report)
            scope |= test.globs
        else:
            exec(compile(block, f"README.md, block {number}", "exec"), scope)


def test_the_readme_names_every_public_function():
    text, missing = (ROOT / "README.md").read_text(), []
    for name in public_names():
        package, _, attribute = name.partition(".")
        public = getattr(importlib.import_module(package), attribute)
        if isinstance(public, FunctionType) and not re.search(rf"\b{attribute}\b", text):
            missing.append(name)
    assert not missing, f"README.md, which function for which job, lacks {', '.join(missing)}"


def commands(document: str) -> list[list[str]]:
    """Return every `make …` and `flora-tensor …` of a document's shell blocks and code spans, in words."""
    lines = [
        line
        for block in blocks(document, "sh", "bash", "shell", "console")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`\n]+)`", prose)
    words = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines if "'" not in line]
    return [w for w in words if w and w[0] in {"make", "flora-tensor"}]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_documents_exist(document):
    click = pytest.importorskip("click")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*(?=:)|[A-Z_]+(?= =))", makefile, flags=re.MULTILINE))
    found = commands(document)
    assert found, f"{document} names no command"
    for program, *words in found:
        line = f"{document}: {program} {' '.join(words)}"
        if program == "make":
            assert {w.partition("=")[0] for w in words} <= targets, f"{line}: not in the Makefile"
            continue
        main = importlib.import_module("flora_tensor.cli").main
        if not words:
            continue
        command = main.get_command(click.Context(main), words[0])
        assert command is not None or words[0].startswith("-"), f"{line}: there is no such command"
        subject = command or main
        known = {option for p in subject.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        options = {w.split("=")[0] for w in words if re.match(r"--?[a-zA-Z]", w)}
        assert options <= known, f"{line}: there is no option {', '.join(sorted(options - known))}"


def test_every_target_of_the_makefile_is_in_its_help():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY:(.*)$", text, flags=re.MULTILINE)[1].split())
    defined = set(re.findall(r"^([a-z][\w-]*):", text, flags=re.MULTILINE))
    helped = set(re.findall(r"make ([a-z-]+) ", text))
    assert phony == defined
    assert defined - {"help", "doctest"} <= helped


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 50


# --- the judge itself --------------------------------------------------------------------------------


def test_the_judge_finds_what_is_missing():
    def silent(x):
        raise ValueError

    def partial(x: "Array", n: int) -> "Array":  # noqa: F821
        """Do something.

        Parameters
        ----------
        x : array
            No word on its form.
        m : int
            A name from an earlier version.

        Returns
        -------
        array
            Nor here.
        """
        raise ValueError(x, n)

    assert list(complaints_about_function(silent)) == ["there is no docstring"]
    assert list(complaints_about_function(partial)) == [
        "the shape of x is not documented",
        "the parameter n is not documented",
        "the parameter m is documented but does not exist",
        "the shape of the result is not documented",
        "it can raise, but there is no section Raises",
        "there is no section References",
        "there is no example",
    ]
