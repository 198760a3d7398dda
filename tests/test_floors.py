"""Hold the house's floors: no import runs upward, packages form no circle, and every module stands on a floor.

The check reads source by `ast` and imports nothing. It sees imports at any depth (in functions, under TYPE_CHECKING),
relative ones, submodules and public names taken from the `jaxmoe` facade, and `import_module("...")` of a literal.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = ("jaxmoe", "pallas_kernels", "sharding", "checkpoints", "scripts")
FACADE = "jaxmoe"

# Package -> floor. A module belongs to the longest prefix listed here. A new package gets a line.
FLOORS = {
    "jaxmoe.spec": 1,
    "jaxmoe.formats": 1,
    "jaxmoe.compat": 1,
    "pallas_kernels": 2,
    "jaxmoe.routing": 2,
    "jaxmoe.residency": 2,
    "sharding": 2,
    "jaxmoe.experts": 3,
    "jaxmoe.cache": 3,
    "checkpoints": 3,
    "jaxmoe.nn": 4,
    "jaxmoe.offload": 4,
    "jaxmoe.decode": 5,
    "jaxmoe.compress": 5,
    "jaxmoe.train": 5,
    "jaxmoe.engine": 6,
    "jaxmoe.report": 7,
    "jaxmoe.server": 7,
    "scripts": 8,
    "tests": 9,  # nothing below may import a test
}


class Import(NamedTuple):
    line: int
    target: str  # dotted module, or FACADE itself
    name: str | None = None  # what is taken from the facade, when the target is the facade


def package_of(module: str) -> str | None:
    """The longest prefix of `module` in FLOORS, or None."""
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in FLOORS), None)


def is_ours(module: str) -> bool:
    return module.split(".")[0] in (*ROOTS, "tests")


def is_module(root: Path, module: str) -> bool:
    path = root.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path.is_dir() and any(path.glob("*.py")))


def source_files(root: Path) -> list[Path]:
    return sorted(path for top in ROOTS for path in (root / top).rglob("*.py"))


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_names(root: Path) -> dict[str, str]:
    """The facade's dict literal, public name -> module, read without importing."""
    path = root / FACADE / "__init__.py"
    if path.is_file():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and "_PUBLIC" in [getattr(target, "id", None) for target in node.targets]:
                return ast.literal_eval(node.value)
    return {}


def absolute_base(module: str, is_package: bool, node: ast.ImportFrom) -> str | None:
    """What stands between `from` and `import`, made absolute; None if it climbs out of the package."""
    if node.level == 0:
        return node.module
    parts = module.split(".") if is_package else module.split(".")[:-1]
    keep = len(parts) - (node.level - 1)
    if keep < 1:
        return None
    return ".".join(parts[:keep] + ([node.module] if node.module else []))


def imports_of(root: Path, path: Path) -> Iterator[Import]:
    """Every import of our own modules in one file."""
    module = module_name(root, path)
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    facade_aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_ours(alias.name) and alias.name != FACADE:
                    yield Import(node.lineno, alias.name)
                if alias.name == FACADE or (alias.name.startswith(FACADE + ".") and alias.asname is None):
                    facade_aliases.add(alias.asname or FACADE)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(module, path.name == "__init__.py", node)
            if base is None:
                yield Import(node.lineno, "." * node.level + (node.module or ""))
            elif is_ours(base):
                for alias in node.names:
                    child = f"{base}.{alias.name}"
                    if is_module(root, child):
                        yield Import(node.lineno, child)
                    else:
                        yield Import(node.lineno, base, alias.name if base == FACADE else None)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            first = node.args[0]
            literal = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
            if called in ("import_module", "__import__") and is_ours(literal) and literal != FACADE:
                yield Import(node.lineno, literal)
    for node in ast.walk(tree):  # `import jaxmoe` brings nothing; what is then taken from it does
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in facade_aliases:
            child = f"{FACADE}.{node.attr}"
            yield Import(node.lineno, child) if is_module(root, child) else Import(node.lineno, FACADE, node.attr)


def facade_problems(root: Path) -> Iterator[str]:
    """The facade imports nothing at its top, and its names point at modules that stand on a floor."""
    path = root / FACADE / "__init__.py"
    if not path.is_file():
        return
    where = path.relative_to(root)
    pending: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield f"{where}:{node.lineno}: {FACADE} imports at its top; it may import nothing there"
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    for name, module in public_names(root).items():
        if package_of(module) is None:
            yield f"{where}:1: public name {name} comes from {module}, which stands on no floor"


def floor_problems(root: Path) -> list[str]:
    """Every breach of the floors under `root`, as lines that begin with file:line."""
    public = public_names(root)
    problems = list(facade_problems(root))
    edges: dict[str, dict[str, str]] = {}  # importer package -> imported package -> first place
    for path in source_files(root):
        module = module_name(root, path)
        where = path.relative_to(root)
        package = package_of(module)
        if package is None and module != FACADE:
            problems.append(f"{where}:1: {module} stands on no floor; give its package a line in FLOORS")
            continue
        for line, target, name in imports_of(root, path):
            if target == FACADE:
                if name is None or (name.startswith("__") and name.endswith("__")):
                    continue
                if name not in public:
                    problems.append(f"{where}:{line}: {FACADE}.{name} is neither a module nor a public name")
                    continue
                target = public[name]
            target_package = package_of(target)
            if package is None:
                problems.append(f"{where}:{line}: {FACADE} imports {target}; the facade may import none of our modules")
            elif target_package is None:
                problems.append(f"{where}:{line}: {module} imports {target}, which stands on no floor")
            elif FLOORS[target_package] > FLOORS[package]:
                problems.append(
                    f"{where}:{line}: {package} (floor {FLOORS[package]}) imports {target}"
                    f" of {target_package} (floor {FLOORS[target_package]}): upward"
                )
            elif target_package != package:
                edges.setdefault(package, {}).setdefault(target_package, f"{where}:{line}")
    return problems + circle_problems(edges)


def circle_problems(edges: dict[str, dict[str, str]]) -> list[str]:
    """One circle between packages, if there is any, with the place of each import in it."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]  # graphlib lists each node before the one that imports it
        steps = [(a, b, edges[a][b]) for a, b in zip(circle, circle[1:], strict=False)]
        return [f"{steps[0][2]}: circle: " + ", ".join(f"{a} imports {b} at {place}" for a, b, place in steps)]
    return []


def test_repository_keeps_its_floors():
    problems = floor_problems(REPOSITORY)
    assert not problems, "\n" + "\n".join(problems)


def test_check_reads_every_root():
    read = {path.relative_to(REPOSITORY).parts[0] for path in source_files(REPOSITORY)}
    assert read >= {root for root in ROOTS if any((REPOSITORY / root).rglob("*.py"))} >= {"jaxmoe"}


def test_packages_have_init_files():
    """A folder without __init__.py works from a clone and is missing from the wheel."""
    folders = {path.relative_to(REPOSITORY).parent for path in source_files(REPOSITORY)}
    packaged = {folder for folder in folders if folder.parts[0] != "scripts"}
    missing = sorted(str(folder) for folder in packaged if not (REPOSITORY / folder / "__init__.py").is_file())
    assert not missing, f"no __init__.py in: {', '.join(missing)}"


def test_facade_imports_nothing_and_resolves_its_names():
    code = (
        "import sys, jaxmoe\n"
        "heavy = sorted({'jax', 'flax', 'numpy', 'jaxmoe.spec'} & set(sys.modules))\n"
        "assert not heavy, f'importing jaxmoe imported {heavy}'\n"
        "assert set(jaxmoe._PUBLIC) <= set(dir(jaxmoe))\n"
        "for name in jaxmoe._PUBLIC: getattr(jaxmoe, name)\n"
        "assert not hasattr(jaxmoe, 'no_such_name')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


FACADE_SOURCE = '_PUBLIC = {"Spec": "jaxmoe.spec", "Engine": "jaxmoe.engine.run"}\n'
GOOD_TREE = {
    "jaxmoe/__init__.py": FACADE_SOURCE,
    "jaxmoe/spec.py": "import jax\nfrom dataclasses import dataclass\n",
    "jaxmoe/formats.py": "from jaxmoe import spec, __version__\nfrom .spec import Spec\n",
    "jaxmoe/routing/__init__.py": "from .stages import route\n",
    "jaxmoe/routing/stages.py": "from .. import formats\nfrom . import other\n",
    "jaxmoe/routing/other.py": "import jaxmoe.spec as s\nimport jaxmoe\nx = jaxmoe.Spec, jaxmoe.formats\n",
    "jaxmoe/nn/__init__.py": "",
    "jaxmoe/nn/moe.py": "from ..routing import route\nfrom pallas_kernels.op import api\n",
    "jaxmoe/engine/__init__.py": "from jaxmoe.nn import moe\n",
    "jaxmoe/engine/run.py": "from jaxmoe import nn\n",
    "pallas_kernels/__init__.py": "",
    "pallas_kernels/op/__init__.py": "from jaxmoe import Spec\n",
    "pallas_kernels/op/api.py": "from sharding.hardware import peak\n",
    "sharding/__init__.py": "",
    "sharding/hardware.py": "import math\n",
    "checkpoints/__init__.py": "",
    "scripts/generate.py": "from jaxmoe import Engine\nimport jaxmoe\njaxmoe.Engine, jaxmoe.__version__\n",
}


def write_tree(root: Path, tree: dict[str, str]) -> Path:
    for name, source in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def test_checker_passes_a_good_tree(tmp_path):
    assert floor_problems(write_tree(tmp_path, GOOD_TREE)) == []


BREACHES = {
    "absolute": ({"jaxmoe/routing/bad.py": "\nimport jaxmoe.nn.moe\n"}, "routing/bad.py:2", "upward"),
    "from_module": ({"jaxmoe/routing/bad.py": "from jaxmoe.nn.moe import f\n"}, "routing/bad.py:1", "upward"),
    "from_facade_submodule": ({"jaxmoe/routing/bad.py": "from jaxmoe import nn\n"}, "routing/bad.py:1", "upward"),
    "from_facade_name": ({"jaxmoe/routing/bad.py": "from jaxmoe import Engine\n"}, "routing/bad.py:1", "upward"),
    "facade_attribute": ({"sharding/bad.py": "import jaxmoe as j\n\nj.Engine\n"}, "sharding/bad.py:3", "upward"),
    "facade_attribute_submodule": ({"sharding/bad.py": "import jaxmoe.spec\njaxmoe.nn\n"}, "bad.py:2", "upward"),
    "facade_unknown": ({"sharding/bad.py": "from jaxmoe import Nothing\n"}, "sharding/bad.py:1", "neither"),
    "facade_star": ({"scripts/bad.py": "from jaxmoe import *\n"}, "scripts/bad.py:1", "neither"),
    "relative": ({"jaxmoe/routing/bad.py": "from ..nn import moe\n"}, "routing/bad.py:1", "upward"),
    "relative_from_init": ({"jaxmoe/cache/__init__.py": "from ..nn.moe import f\n"}, "cache/__init__.py:1", "upward"),
    "relative_submodule": ({"jaxmoe/routing/deep/bad.py": "from ... import nn\n"}, "deep/bad.py:1", "upward"),
    "relative_too_far": ({"sharding/bad.py": "from ... import nn\n"}, "sharding/bad.py:1", "no floor"),
    "in_function": ({"sharding/bad.py": "def f():\n    import checkpoints\n"}, "sharding/bad.py:2", "upward"),
    "type_checking": ({"sharding/bad.py": "if TYPE_CHECKING:\n    import checkpoints\n"}, "bad.py:2", "upward"),
    "import_module": ({"sharding/bad.py": "importlib.import_module('checkpoints')\n"}, "bad.py:1", "upward"),
    "kernel_to_cache": ({"pallas_kernels/op/cpu.py": "import jaxmoe.cache.kv\n"}, "op/cpu.py:1", "upward"),
    "script": ({"jaxmoe/report/__init__.py": "from scripts import generate\n"}, "report/__init__.py:1", "upward"),
    "test": ({"scripts/bad.py": "from tests.conftest import x\n"}, "scripts/bad.py:1", "upward"),
    "circle_of_two": ({"sharding/bad.py": "import pallas_kernels\n"}, "sharding/bad.py:1", "circle"),
    "circle_of_three": (
        {"sharding/bad.py": "import jaxmoe.routing\n", "jaxmoe/routing/bad.py": "import pallas_kernels.op\n"},
        "jaxmoe/routing/bad.py:1",
        "circle",
    ),
    "circle_of_files": ({"jaxmoe/spec.py": "from .formats import pack\n"}, "jaxmoe/spec.py:1", "circle"),
    "unlisted_package": ({"jaxmoe/novel/__init__.py": ""}, "jaxmoe/novel/__init__.py:1", "no floor"),
    "unlisted_target": ({"scripts/bad.py": "import jaxmoe.novel\n"}, "scripts/bad.py:1", "no floor"),
    "facade_top_import": ({"jaxmoe/__init__.py": "try:\n    import os\nexcept E: pass\n"}, "__init__.py:2", "top"),
    "facade_own_module": (
        {"jaxmoe/__init__.py": FACADE_SOURCE + "def f():\n    from .spec import Spec\n"},
        "jaxmoe/__init__.py:3",
        "facade may import none",
    ),
    "facade_unlisted_name": ({"jaxmoe/__init__.py": "_PUBLIC = {'N': 'jaxmoe.novel'}\n"}, "__init__.py:1", "no floor"),
}


@pytest.mark.parametrize(("change", "place", "reason"), BREACHES.values(), ids=BREACHES.keys())
def test_checker_fails_a_bad_tree(tmp_path, change, place, reason):
    problems = floor_problems(write_tree(tmp_path, GOOD_TREE | change))
    assert any(place in problem and reason in problem for problem in problems), problems
