"""What may import what, and what a published model carries: the rules of CONTRIBUTING.md that a machine can hold."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT


PACKAGE = ROOT / "modeling_nrccr"
# from the ground up: each imports from below, or from itself
LAYERS = (
    ("",),  # the files that a published model carries
    ("recipes",),
    ("loading",),
    ("translation",),
    ("data",),
    ("retrieval",),
    ("publishing",),
    ("training",),
    ("serving", "export"),
    ("space",),
    ("cli",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
TOP = ("modeling_nrccr", "modeling_nrccr.__main__")  # public names; the command
SHARED = ("modeling_nrccr.cli.common", "modeling_nrccr.cli.launch")  # of commands


def modules() -> dict[str, Path]:
    paths = [path for top in ("modeling_nrccr", "datasets_scripts") for path in (ROOT / top).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(module: str, path: Path, known: dict) -> list[tuple[str, bool]]:
    """Modules of ours that a module names, and whether it does so while it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {id(node) for top in ast.walk(tree) if isinstance(top, (ast.FunctionDef, ast.If)) for node in ast.walk(top)}
    found = []
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1] if node.level else [])
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        found += [(name, id(node) not in late) for name in names if name in known]
    return found


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    return None if parts[0] != "modeling_nrccr" else LAYER[parts[1] if len(parts) > 1 and parts[1] in LAYER else ""]


def folder_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYER else ""


def test_imports_go_down_only():
    known, wrong = modules(), []
    for module, path in known.items():
        for name, _ in imports(module, path, known):
            if module.startswith("datasets_scripts"):
                wrong += [f"{module} -> {name}"] if name.startswith("modeling_nrccr") else []
            elif name.startswith("datasets_scripts") or module in TOP or name in SHARED:
                continue
            elif layer_of(name) > layer_of(module) or (
                layer_of(name) == layer_of(module) and folder_of(name) != folder_of(module)
            ):
                wrong.append(f"{module} -> {name}")
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_round():
    known = modules()
    graph = {module: {name for name, _ in imports(module, path, known)} for module, path in known.items()}
    del graph["modeling_nrccr"]  # whose names are imported on first use
    done, rounds = set(), []

    def visit(module: str, trail: tuple[str, ...]):
        if module in trail:
            rounds.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done and module in graph:
            for name in sorted(graph[module]):
                visit(name, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    assert not rounds, "\n".join(rounds)


def test_nothing_imports_a_command():
    known = modules()
    commands = {name for name in known if name.startswith("modeling_nrccr.cli.") and name not in SHARED}
    commands -= {"modeling_nrccr.cli.main"}
    wrong = [
        f"{module} -> {name}"
        for module, path in known.items()
        for name, _ in imports(module, path, known)
        if name in commands and not module.startswith("modeling_nrccr.cli.")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("top", ["modeling_nrccr", "datasets_scripts", "examples", "benchmarks", "tests"])
def test_no_path_is_edited(top):
    edit = "sys." + "path"
    found = [str(path) for path in (ROOT / top).rglob("*.py") if edit in path.read_text(encoding="utf-8")]
    assert not found
