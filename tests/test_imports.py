"""The packages import downwards only, and in no circle: imports inside functions and for annotations count like all others."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# Rooms (folders and files of a package) from the ground up. A room imports from rooms of lines above its own, never from its
# own line or one below; what is not listed is an error, so that a new room is given its place.
ROOMS = {
    "comp": (
        "config cli files limits log",
        "config_io data",
        "model tiny",
        "parallel recipes fetch",
        "build warm_up",
        "eval runs",
        "train answer",
        "studies",
    ),
    "comp_kernels": (
        "_backends _processor _sources _units",
        "_checks _namespace _native",
        "_triton",
        "ops",
        "reference layers testing integrations",
        "_triton_compile hf_kernels",
        "info warm_up",
    ),
    "comp_kernels/ops": ("rope_attention _log_domain", "sinkhorn", "alignment_loss"),
}


def modules_of(package):
    """Module name -> file, of all modules below a folder; a package goes by its own name."""
    paths = sorted((REPOSITORY / package).rglob("*.py"))
    return {".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(name, path):
    """Dotted names that a module imports wherever it does, each with what it takes from there: "comp.data.batch.Sample"."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def graph_of(package):
    """Module -> modules of the same package that it imports."""
    modules = modules_of(package)

    def imported(name):
        return name if name in modules else name.rpartition(".")[0]  # a function or class is its module

    return {name: {imported(x) for x in imports(name, path)} & modules.keys() - {name} for name, path in modules.items()}


def test_imports_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "it.py"
    path.write_text(
        "import a.b\nfrom ..c import d\nif TYPE_CHECKING:\n    from .e import F\ndef f():\n    from . import g\n    import h\n"
    )
    assert set(imports("top.room.it", path)) == {"a.b", "top.c.d", "top.room.e.F", "top.room.g", "h"}


@pytest.mark.parametrize("package", ["comp", "comp_kernels"])
def test_no_circle(package):
    try:
        TopologicalSorter(graph_of(package)).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", ROOMS)
def test_every_arrow_points_down(package):
    prefix, top = package.replace("/", ".") + ".", package.split("/")[0]
    height = {room: number for number, line in enumerate(ROOMS[package]) for room in line.split()}

    def room(module):
        return module.removeprefix(prefix).split(".")[0]

    inside = {name: found for name, found in graph_of(top).items() if name.startswith(prefix)}
    assert {room(name) for name in inside} == height.keys()
    upward = [
        f"{name} imports {other}"
        for name, found in inside.items()
        for other in found
        if other.startswith(prefix) and room(other) != room(name) and height[room(other)] >= height[room(name)]
    ]
    assert not upward


def test_what_each_package_knows():
    def known(package):
        return {name.split(".")[0] for module, path in modules_of(package).items() for name in imports(module, path)}

    own = {path.name for path in REPOSITORY.iterdir() if path.is_dir()} | {"train"}
    assert known("comp_kernels") & own == {"comp_kernels"}
    assert known("comp") & own == {"comp", "comp_kernels"}
    # what the operators need to be imported; the rest, Triton among it, is imported by functions when it is asked for
    needed = {"torch", *sys.stdlib_module_names, "comp_kernels"}
    assert known("comp_kernels") - needed == {"triton", "transformers", "timm"}
