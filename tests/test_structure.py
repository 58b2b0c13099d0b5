"""The rooms of the package: what may import what."""

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import deperceiver_hf

PACKAGE = Path(deperceiver_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}
# From the ground up. A room imports rooms of lower floors only.
FLOORS = (
    ("models", "errors", "jobs", "output_files", "machine"),
    ("data", "backbone_weights", "saved_models", "drawing"),
    ("evaluation",),
    ("training", "prediction"),
    ("model_cards", "benchmarks", "demo"),
    ("conversion", "comparison"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_modules(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its text, functions included."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{origin}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {origin}
    return found & MODULES.keys() - {module}


def room_of(module: str) -> str:
    """The first part of a module's path inside the package."""
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda path: path.name)
def test_hub_files_import_their_siblings_only(path):
    """transformers copies `from .sibling import name` and nothing else when it saves a model's code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module is not None
            assert (path.parent / f"{node.module}.py").is_file()
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == PACKAGE.name for name in names)


def test_second_architecture_does_not_import_the_first():
    shared = {"attention", "backbone", "configuration_backbone", "detection_processing", "matching"}
    for path in (PACKAGE / "models").glob("*_deperceiver_v2.py"):
        for module in imported_modules(f"{PACKAGE.name}.models.{path.stem}"):
            name = module.rpartition(".")[2]
            assert name.endswith("_deperceiver_v2") or name.removesuffix("_deperceiver") in shared


def test_no_import_circle():
    TopologicalSorter({module: imported_modules(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_no_import_of_a_room_above(module):
    room = room_of(module)
    for imported in imported_modules(module):
        other = room_of(imported)
        assert other == room or FLOOR_OF[other] <= FLOOR_OF[room], f"{module} imports {imported}"


def test_the_top_of_the_package_fits_one_look():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules | packages | {"__init__", "__main__"} == FLOOR_OF.keys()
    assert len(modules) <= 10
    assert len(packages) <= 8


def test_modules_of_version_0_2_are_found_by_their_names_with_a_warning():
    with pytest.warns(FutureWarning, match=r"evaluation_job is deperceiver_hf\.evaluation\.job now"):
        from deperceiver_hf.evaluation_job import prepare_evaluation
    from deperceiver_hf.evaluation import job

    assert prepare_evaluation is job.prepare_evaluation
    for old in deperceiver_hf._MOVED:
        sys.modules.pop(f"deperceiver_hf.{old}", None)
        with pytest.warns(FutureWarning, match=old):
            module = importlib.import_module(f"deperceiver_hf.{old}")
        with pytest.raises(AttributeError):
            _ = module.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("deperceiver_hf.nothing")
