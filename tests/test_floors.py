"""The house stands: imports go down only.

Files are parsed, never imported, so that an import inside a function or under TYPE_CHECKING counts as well.
What a module pulls in at run time is checked in a fresh interpreter, for the few doors that must stay light.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.tools.talking_models import write_talking_model

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("kernels", "engine", "rpc", "tools")

# The longest matching room counts. A module of the engine without a line of its own is on floor 4.
FLOORS = {
    "kernels": 0,
    "engine.config": 1,
    "engine.errors": 1,
    "engine.load": 1,
    "engine.types": 1,
    "engine.cache": 2,
    "engine.models": 2,
    "engine.text": 2,
    "engine.dist": 3,
    "engine": 4,
    "engine.async_engine": 5,
    "engine.attachment": 5,
    "engine.core": 5,
    "engine.cuda.parts": 5,
    "engine.in_flight": 5,
    "engine.loader": 5,
    "engine.operations": 5,
    "engine.parts": 5,
    "engine.registry": 5,
    "engine.simulation": 5,
    "engine.step_loop": 5,
    "engine.turns": 5,
    "rpc": 6,
    "tools": 7,
}
ENGINE_DOOR = 5  # `engine` itself hands out names of all its floors
FOREIGN = -1
NOT_EACH_OTHER = 2  # the rooms of this floor do not know one another
RPC_MAY_NAME = 1  # the floor of errors and types; of those above, rpc sees only what `engine` itself exports
KERNELS_MAY_IMPORT = {"numpy", "torch", "triton"}


def room_of(module: str) -> str | None:
    """The room of the house that a dotted module name lies in; None for a foreign one."""
    return max((room for room in FLOORS if f"{module}.".startswith(f"{room}.")), key=len, default=None)


def floor_of(module: str) -> int:
    if module == "engine":
        return ENGINE_DOOR
    room = room_of(module)
    return FOREIGN if room is None else FLOORS[room]


def house_files() -> dict[str, Path]:
    """Dotted module name -> file, of all that is ours and not generated."""
    files = {}
    for room in HOUSE:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if "_generated" not in parts:
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = house_files()


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported_modules(module: str, source: str) -> Iterator[str]:
    """Every module that `source` names in an import, relative ones resolved against `module`."""
    package = module if FILES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source, filename=module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield name if is_module(name) else origin


def broken_rules(module: str, source: str) -> list[str]:
    """What a module of the house imports against the rules, each as a sentence."""
    here, room = floor_of(module), room_of(module)
    broken = []
    for name in imported_modules(module, source):
        floor, other = floor_of(name), room_of(name)
        if floor > here:
            broken.append(f"{module} (floor {here}) reaches up to {name} (floor {floor})")
        if floor == here == NOT_EACH_OTHER and other != room:
            broken.append(f"{module} knows {name}, a room beside it")
        if room == "rpc" and name.startswith("engine.") and floor != RPC_MAY_NAME:
            broken.append(f"{module} reaches past the engine's public names to {name}")
        if room == "kernels" and floor == FOREIGN and name.partition(".")[0] not in sys.stdlib_module_names:
            if name.partition(".")[0] not in KERNELS_MAY_IMPORT:
                broken.append(f"{module} imports {name}: kernels stand on torch, triton and numpy alone")
    return broken


def test_imports_go_down():
    assert {module.partition(".")[0] for module in FILES} == set(HOUSE)
    broken = [line for module, path in FILES.items() for line in broken_rules(module, path.read_text())]
    assert not broken, "\n".join(broken)


def is_call_of_gpu_kernels(module: str, name: str) -> bool:
    """Contracts call the kernels that keep them, and those are made for the contracts' types: the one way
    back there is.  The light doors below see to it that it is taken at the call.
    """
    inside = "kernels.gpu."
    return room_of(module) == "kernels" and name.startswith(inside) and not module.startswith(inside)


def test_no_module_imports_itself_by_a_detour():
    graph = {
        module: {
            name
            for name in imported_modules(module, path.read_text())
            if name in FILES and not is_call_of_gpu_kernels(module, name)
        }
        for module, path in FILES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the ring


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("kernels.rope", "from engine.types import Clock", "reaches up"),
        ("kernels.rope", "import pandas", "numpy alone"),
        ("engine.types", "import engine.cache", "reaches up"),
        ("engine.cache.manager", "from ..scheduler import Scheduler", "reaches up"),
        ("engine.cache.manager", "from engine import models", "a room beside it"),
        ("engine.scheduler", "def f():\n    import engine.core", "reaches up"),
        ("engine.core", "from rpc import codec", "reaches up"),
        ("rpc.servicer", "from engine.core import EngineCore", "public names"),
        ("rpc.servicer", "import tools.cli", "reaches up"),
    ],
)
def test_an_import_against_the_rules_is_found(module, source, complaint):
    (line,) = broken_rules(module, source)
    assert complaint in line


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "engine.models.decoder",
            "from kernels.rope import rope_kv_write\nfrom engine.errors import EngineError",
        ),
        ("engine.cache.manager", "from engine.cache.block_pool import BlockPool"),
        ("rpc.servicer", "from engine import AsyncEngine\nfrom engine.errors import NotFound\nimport grpc"),
        ("tools.cli", "import rpc.server, engine.core, kernels.dispatch"),
    ],
)
def test_an_import_within_the_rules_is_let_pass(module, source):
    assert broken_rules(module, source) == []


def test_only_tools_read_the_environment():
    readers = [
        module
        for module, path in FILES.items()
        if floor_of(module) < FLOORS["tools"]
        for node in ast.walk(ast.parse(path.read_text(), filename=module))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    assert not readers, f"the environment is read below tools/: {readers}"


def test_what_serving_imports_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # Servers on GPUs have triton from torch's CUDA build, others do not need it.
    serving_gpus = {"triton"}
    serving, developing = (
        {re.match(r"[\w-]+", line).group().lower() for line in lines}
        for lines in (project["dependencies"] + extras["server"], extras["dev"] + extras["bench"])
    )
    distributions = packages_distributions()
    imported = set()
    for module, path in FILES.items():
        for name in imported_modules(module, path.read_text()):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in HOUSE:
                continue
            offered_by = {distribution.lower() for distribution in distributions.get(top, [top])}
            allowed = serving | developing if floor_of(module) == FLOORS["tools"] else serving
            allowed = allowed | serving_gpus if module.startswith("kernels.gpu") else allowed
            assert offered_by & allowed, (
                f"{module} imports {name}, which pyproject.toml does not declare for it"
            )
            imported |= offered_by
    assert serving <= imported, f"declared in pyproject.toml and never imported: {sorted(serving - imported)}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("kernels", {"torch", "triton"}),
        ("engine", {"torch", "triton", "numpy", "tokenizers"}),
        ("engine.scheduler", {"torch", "asyncio"}),
        ("engine.cache", {"torch", "asyncio"}),
        ("engine.dist.gmanager", {"torch", "asyncio"}),
        ("engine.dist.rmanager", {"torch", "asyncio", "numpy"}),
        ("engine.loader", {"triton"}),
        ("rpc.server", {"triton"}),
        ("rpc.client", {"torch", "engine", "kernels", "numpy", "tokenizers", "google.rpc"}),
        ("tools.cli", {"torch"}),
        ("tools.top", {"torch", "engine", "kernels", "numpy", "tokenizers", "google.rpc"}),
    ],
)
def test_a_light_module_stays_light(module, heavy):
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == [], f"import {module} also loads these"


NO_TRITON = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize("before", [NO_TRITON, "import sys"], ids=["not installed", "installed"])
def test_a_cpu_engine_does_without_triton(before, tmp_path):
    model = write_talking_model(tmp_path / "model")
    words = ["generate", str(model), "--prompt", "Hello.\n", "--device", "cpu", "--max-new-tokens", "4"]
    code = (
        f"{before}\nfrom tools.cli import main\nassert main({words}) == 0\nassert 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Miso\n"), done.stderr
