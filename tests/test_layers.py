"""The import graph: no arrow from a lower layer to a higher one, no circle of modules.

Imports inside functions and under ``TYPE_CHECKING`` count. Names in strings, such as entries of registries, do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Packages and modules of ``deepgen_jax`` from the ground up; those of one row may import each other.
LAYERS = (
    (
        "errors", "user_warnings", "files", "local_paths", "locks", "strict_json", "terminal", "config", "options",
        "random_keys", "registry", "settings",
    ),
    ("parallel",),
    ("models",),
    ("flow",),
    ("stores",),
    ("data",),
    ("convert",),
    ("inference",),
    ("rewards",),
    ("training",),
    ("rl",),
    ("evaluation",),
    ("serving",),
    ("aot",),
    ("nano",),
    ("configs",),
    ("cli",),
)
#: Packages at the top of the tree.
ELSEWHERE = {"convert": ROOT / "convert", "configs": ROOT / "configs"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    folders = {"": ROOT / "deepgen_jax", **ELSEWHERE}
    found = {}
    for prefix, folder in folders.items():
        for file in folder.rglob("*.py"):
            parts = [part for part in (prefix, *file.relative_to(folder).with_suffix("").parts) if part]
            found[".".join(["deepgen_jax", *parts]).removesuffix(".__init__")] = file
    return found


def imported(tree: ast.AST, package: str, known: set[str]) -> Iterator[tuple[str, int]]:
    """(module, line) of the package's modules that nodes of a tree import; relative imports are of ``package``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *(node.module or "").split(".")]).rstrip(".")
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "deepgen_jax")


def package_of(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def layer(module: str) -> int:
    """Place in :data:`LAYERS`; the public ``__init__`` is above all, and counts as the ground where it is imported."""
    name = (*module.split("."), "")[1]
    return next((place for place, names in enumerate(LAYERS) if name in names), -1 if not name else len(LAYERS))


def test_layers_name_every_package():
    found = {(*name.split("."), "")[1] for name in modules()} - {""}
    assert found == {name for names in LAYERS for name in names}


def test_nothing_imports_from_a_layer_above():
    known = modules()
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {target}"
        for module, file in known.items()
        if module != "deepgen_jax"
        for target, line in imported(ast.parse(file.read_text("utf-8")), package_of(module, file), set(known))
        if layer(target) > layer(module)
    ]
    assert wrong == []


def test_modules_have_no_import_cycles():
    """Among imports at the top of modules, which run when a module is first imported."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, file in known.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        package = package_of(module, file)
        graph[module] = {target for node in top for target, _ in imported(node, package, set(known))} - {module}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                if target != "deepgen_jax":  # Its attributes are loaded when they are first used.
                    visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
