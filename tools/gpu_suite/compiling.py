"""Launches without a GPU: what a launcher would launch is recorded, and compiled ahead of time."""

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import kernels.gpu
from kernels import dispatch
from kernels.gpu.launch import Launch
from tools.gpu_suite.sections import LATE

CAPABILITY = 90


def modules() -> list[Any]:
    """All of kernels.gpu that ship forms of kernels."""
    names = [each.name for each in pkgutil.iter_modules(kernels.gpu.__path__)]
    found = [importlib.import_module(f"kernels.gpu.{name}") for name in names]
    return [module for module in found if hasattr(module, "shipped")]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """In the body, kernels take tensors in the host's memory and launch nothing: outputs hold anything."""
    launches: list[Launch] = []
    launch = Launch.__call__

    def record(self: Launch, grid: tuple[int, ...], *args: Any) -> None:
        if len(args) != len(self.signature):
            raise TypeError(f"{self.name} takes {list(self.signature)}, got {len(args)} arguments")
        launches.append(self)

    Launch.__call__ = record  # type: ignore[method-assign]
    try:
        with dispatch.use("triton"):
            yield launches
    finally:
        Launch.__call__ = launch  # type: ignore[method-assign]


def compile_what(work: Callable[[], object], left_s: Callable[[], float]) -> dict[str, Any]:
    """Compiles all that `work` launches."""
    with recorded() as launches:
        work()
    if not launches:
        raise AssertionError("nothing was launched")
    return compile_all(launches, left_s)


def compile_all(launches: list[Launch], left_s: Callable[[], float]) -> dict[str, Any]:
    begun = time.monotonic()
    forms = {_key(launch): launch for launch in launches}
    for launch in forms.values():
        if left_s() <= 0:
            return {"status": LATE, "error": [f"not all {len(forms)} forms were compiled"]}
        _compiled(_key(launch), launch)
    return {"forms": len(forms), "compile_s": round(time.monotonic() - begun, 2)}


_known: dict[str, Launch] = {}


def _compiled(key: str, launch: Launch) -> None:
    _known.setdefault(key, launch)
    _compile(key)


@cache
def _compile(key: str) -> None:
    from kernels.gpu.compiled import compile_launch

    launch = _known[key]
    try:
        compile_launch(launch, CAPABILITY)
    except Exception as error:
        raise RuntimeError(f"{launch.name or launch.kernel} does not compile") from error


def _key(launch: Launch) -> str:
    shape = launch.signature, launch.constants, launch.num_warps, launch.num_stages
    return f"{launch.kernel.__module__}.{launch.kernel.__name__} {shape}"
