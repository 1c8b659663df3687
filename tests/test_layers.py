"""The layers of docs/architecture.md: reads every #include and import and refuses an arrow back."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "xlstm_distill"
CSRC = ROOT / "csrc"
LONGEST = 800  # lines a file

# ---- C ------------------------------------------------------------------------------------------

C_MAY_INCLUDE = {
    "base": {"base"},
    "kernels": {"kernels", "base"},
    "ops": {"ops", "kernels", "base"},
    "model": {"model", "ops", "base"},
    "python": {"python", "model", "ops", "kernels", "base"},
}
C_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".c", ".h"))
by_c_file = pytest.mark.parametrize("path", C_FILES, ids=lambda p: str(p.relative_to(CSRC)))


def layer(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


@by_c_file
def test_includes_point_down(path):
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        assert (CSRC / name).is_file(), f"{name}: includes are named from csrc/"
        assert Path(name).parts[0] in C_MAY_INCLUDE[layer(path)], f"{path.name} includes {name}"


@by_c_file
def test_c_keeps_its_promises(path):
    """OpenMP in ops only, NumPy in one file, no allocation, output or exit below the binding."""
    code = re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\])*\"", "", path.read_text(), flags=re.DOTALL)
    if layer(path) not in ("ops", "python"):
        assert "#pragma omp" not in code and "omp.h" not in code, "OpenMP belongs in ops"
    if layer(path) == "python":
        assert "#pragma omp" not in code, "OpenMP belongs in ops"
    else:
        assert "Python.h" not in code
        banned = r"\b(malloc|calloc|realloc|free|alloca|printf|puts|fprintf|exit|abort|assert)\s*\("
        assert not (found := re.search(banned, code)), found
    if "numpy/" in code:
        assert path.name in ("arrays.c", "binding.h"), "arrays.c is the one file that knows NumPy"


# ---- Python -------------------------------------------------------------------------------------

# A module may import from its own row and from rows below.
LEVELS = [
    ["cli", "commands", "__main__"],
    [
        "run",
        "checks",
        "sharing",
        "quickstart",
        "budget",
        "room",
        "domains",
        "assess",
        "sweep",
        "processes",
        "serve",
    ],
    ["recipe", "rundir", "progress", "trackers"],
    [
        "accumulation",
        "align",
        "bench",
        "bench_cases",
        "cleaning",
        "data",
        "distill",
        "evaluate",
        "inside",
        "layerwise",
        "linearize",
        "lm_eval_adapter",
        "lora",
        "merge",
        "optim",
        "plots",
        "prompts",
        "report",
        "sampling",
        "shards",
        "sources",
        "streams",
        "targets",
        "training",
    ],
    ["model", "generate"],
    ["scoring"],
    ["state"],
    ["parameters"],
    ["ops"],
    ["runtime"],
    ["_core_f32", "_core_f64"],
]
# Leaves: below the model, no arrays of the core; each may import those after it.
LEAVES = [
    "texts",
    "checkpoints",
    "tokenizer",
    "packages",
    "config",
    "families",
    "atomic",
    "json_files",
    "communicator",
    "spool",
    "rows",
    "durations",
    "errors",
]
# They check everything else and depend on nothing.
ALONE = ["reference", "testing"]


def module_of(path: Path) -> str:
    """Top-level name in the package: "ops" for ops/basic.py, "" for the package itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py").removesuffix(".pyi")


def imports(path: Path, text: str | None = None) -> list[str]:
    """Full names of what a file imports, names after `from` included, type-only blocks left out."""
    text = path.read_text() if text is None else text
    package = ["xlstm_distill", *path.relative_to(PACKAGE).parts[:-1]]
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found.extend(f"{source}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
    return found


def own(names: list[str]) -> set[str]:
    """Top-level modules of this package among imported names."""
    return {n.split(".")[1] for n in names if n.startswith("xlstm_distill.")}


def allowed(module: str) -> set[str]:
    if module in ALONE:
        return {module}
    if module in LEAVES:
        return set(LEAVES[LEAVES.index(module) :])
    for n, row in enumerate(LEVELS):
        if module in row:
            return {m for below in LEVELS[n:] for m in below} | set(LEAVES)
    raise AssertionError(f"{module} has no level: give it one here and in docs/architecture.md")


PYTHON_FILES = sorted(p for p in PACKAGE.rglob("*.py"))
by_module = pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


@by_module
def test_imports_point_down(path):
    module = module_of(path)
    if not module:
        return  # the package itself re-exports
    wrong = own(imports(path)) - allowed(module)
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_no_module_imports_itself_in_the_end():
    graph: dict[str, set[str]] = {}
    for path in PYTHON_FILES:
        module = module_of(path)
        if module:
            graph.setdefault(module, set()).update(own(imports(path)) - {module})

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way, module])
        if module not in done:
            for below in sorted(graph.get(module, ())):
                follow(below, (*way, module))
            done.add(module)

    done: set[str] = set()
    for module in sorted(graph):
        follow(module, ())


@by_module
def test_reference_and_testing_import_numpy_only(path):
    if module_of(path) not in ALONE:
        return
    standard = {"__future__", "collections", "math", "typing", "zlib", "dataclasses"}
    outside = {n.split(".")[0] for n in imports(path)} - standard
    assert outside <= {"numpy", "xlstm_distill"}, f"{path.name} imports {sorted(outside)}"


@by_module
def test_torch_is_never_imported(path):
    """It is an oracle of the tests; users need not have it."""
    roots = {n.split(".")[0] for n in imports(path)}
    assert not roots & {"torch", "transformers", "xlstm", "mlstm_kernels"}


@by_module
def test_what_an_extra_brings_is_imported_in_one_module(path):
    homes = {"lm_eval": "lm_eval_adapter", "starlette": "serve", "uvicorn": "serve"}
    for root in {n.split(".")[0] for n in imports(path)} & set(homes):
        assert module_of(path) == homes[root], f"{path.name} imports {root}"


def test_the_checks_see_what_they_should():
    path = PACKAGE / "checkpoints" / "example.py"
    text = (
        "from ..config import A\nfrom . import gguf\nimport numpy\ndef f():\n from .. import cli\n"
    )
    found = imports(path, text)
    assert found == [
        "xlstm_distill.config.A",
        "xlstm_distill.checkpoints.gguf",
        "numpy",
        "xlstm_distill.cli",
    ]
    assert module_of(path) == "checkpoints"
    assert own(found) - allowed("checkpoints") == {"cli"}
    with pytest.raises(AssertionError, match="has no level"):
        allowed("unheard_of")


# ---- all files ----------------------------------------------------------------------------------

SOURCES = sorted(
    p
    for folder in ("csrc", "xlstm_distill", "tests", "benchmarks")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in (".c", ".h", ".py", ".pyi")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines < LONGEST, f"{path.relative_to(ROOT)} has {lines} lines, split it"
