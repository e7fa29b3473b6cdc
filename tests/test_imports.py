"""What loading the library takes, which way its modules import one another, and how long their parts are."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import coup_lib

PACKAGE = Path(coup_lib.__file__).parent
ROOMS = (  # in this order
    "method",
    "networks",
    "attacks and defences",
    "evaluation",
    "reporting",
    "auditing",
    "studies",
    "cli",
)
HEAVY = ("sklearn", "scipy", "pandas", "torchsde", "matplotlib", "robustbench", "autoattack", "pyautoattack")


def test_the_method_loads_nothing_heavy_but_torch():
    program = "import sys, coup_lib.purify; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded and not loaded & set(HEAVY)


def test_what_a_user_imports_comes_from_the_package_itself():
    for name in coup_lib.__all__:
        assert getattr(coup_lib, name).__module__.startswith("coup_lib.")
    assert {"coup", "diffpure", "reverse_only", "Attack", "load_score"} <= set(coup_lib.__all__)


def test_the_commands_help_waits_for_nothing_heavy():
    program = "import sys, coup_lib.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "coup_lib" in loaded and not loaded & {"torch", "numpy", *HEAVY}


def modules():
    """Every module's name below coup_lib and its file."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports(file):
    """What a file imports, wherever in its code: modules, and also names in them, which may be modules."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("coup_lib.") for name in found if name.startswith("coup_lib.")}


def room(module):
    """Where a module stands in `ROOMS`."""
    if module in ("ascent", "attacks", "defences", "outside", "rays"):
        return ROOMS.index("attacks and defences")
    first, dot, _ = module.partition(".")
    return ROOMS.index(first) if dot or first in ROOMS else ROOMS.index("method")


def import_graph():
    """Every module but the package itself → what it imports."""
    files = {name: file for name, file in modules() if name}
    return {name: imports(file) & set(files) for name, file in files.items()}


def test_no_module_imports_itself_in_a_circle():
    graph = import_graph()
    assert len(graph) > 40 and "score" in graph["guidance"] and "adjoint" in graph["gradients"]
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("sde") < order.index("purify") < order.index("studies.report")


def test_each_room_imports_only_from_those_before_it():
    back = {
        (module, imported)
        for module, found in import_graph().items()
        for imported in found
        if room(imported) > room(module)
    }
    assert not back


def test_no_class_and_no_function_is_long():
    most = {ast.ClassDef: 150, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}  # lines, from def or class on
    looked, long = 0, {}
    for module, file in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            if limit := most.get(type(node)):
                looked, lines = looked + 1, node.end_lineno - node.lineno + 1
                if lines > limit:
                    long[f"{module}.{node.name}"] = lines
    assert looked > 500 and not long
