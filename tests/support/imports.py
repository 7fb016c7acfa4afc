"""What imports what in the five packages, lazy imports included; the floors of ascendspeed-core."""

import ast
from collections.abc import Collection, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

FLOORS = (
    ("device",),
    ("config",),
    ("launch", "megatron"),
    ("kernels",),
    ("models",),
    ("weights", "parallel"),
    ("build",),
    ("data", "observability"),
    ("optim", "objectives"),
    ("planner",),
    ("training",),
    ("verification",),
    ("commands",),
    ("cli",),
)
"""Folders and files of ascendspeed-core, lowest first; neighbours on one floor do not import each other."""

Graph = Mapping[str, frozenset[str]]
"""By module the modules and packages of this repository that it imports."""


def import_graph(repository: Path = REPOSITORY) -> Graph:
    """Read the imports of every file but `__init__.py`; those for type checkers alone do not count."""
    files: dict[str, Path] = {}
    for source in sorted(repository.glob("packages/*/src")):
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    modules = sorted(name for name, path in files.items() if path.name != "__init__.py")
    return {name: frozenset(_imports(files[name]) & files.keys() - {name}) for name in modules}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of modules that reach each other (Tarjan, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name] & graph.keys()):
            if other not in index:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], index[other])
        if lowest[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                cycles.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return cycles


def upward_imports(graph: Graph) -> list[str]:
    """Return what a floor of ascendspeed-core imports that is not below it, with both files."""
    floor_of = {name: number for number, names in enumerate(FLOORS) for name in names}
    found = []
    for name, imported in graph.items():
        for other in sorted(imported):
            here, there = _folder(name), _folder(other)
            if here and there and here != there and floor_of[there] >= floor_of[here]:
                found.append(f"{_file(name)} imports {_file(other)}")
    return found


def _folder(module: str) -> str | None:
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "ascendspeed_core" and rest else None


def _file(module: str) -> str:
    return module.partition(".")[2].replace(".", "/") + ".py"


def package_graph(repository: Path = REPOSITORY) -> Graph:
    """Read the imports of every file, `__init__.py` included, with the packages that they run on the way.

    Importing `a.b.c` from outside runs `a/__init__.py` and `a/b/__init__.py` first. A file inside a package depends on
    its `__init__.py` only if it takes a name from it: `from a.b import c` for a module `c` does not.
    """
    files: dict[str, Path] = {}
    for source in sorted(repository.glob("packages/*/src")):
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in files.items():
        imported = _imports(path) & files.keys()
        own = {".".join(name.split(".")[:count]) for count in range(1, name.count(".") + 1)}
        run = {
            ".".join(other.split(".")[:count])
            for other in imported
            for count in range(1, other.count(".") + 1)
        }
        taken = {package for package in own & imported if _takes_a_name(path, package, files.keys())}
        graph[name] = frozenset((imported | run) - own | taken) - {name}
    return graph


def _takes_a_name(path: Path, package: str, modules: Collection[str]) -> bool:
    return any(
        f"{package}.{alias.name}" not in modules
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == package
        for alias in node.names
    )
