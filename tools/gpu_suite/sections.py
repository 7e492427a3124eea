"""Sections and their cases.  A case passes, fails, misses the time it is to keep, or is left out for a
reason; each is written down at once, so that nothing is lost with the process.
"""

import json
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTIONS = {  # seconds with a GPU, and in a dry run
    "correctness": (120, 300),
    "speeds": (110, 120),
    "transfers": (30, 40),
    "engine": (110, 90),
    "throughput": (90, 60),
    "conversations": (90, 60),
}
MODULES = {name: f"tools.gpu_suite.{name}" for name in SECTIONS} | {
    "engine": "tools.gpu_suite.engine_tests"  # `engine` is what they test
}
PASSED, FAILED, MISSED, SKIPPED, LATE = "passed", "failed", "missed", "skipped", "no time"
BEGUN = "begun"
GOOD = PASSED, SKIPPED
_LINES, _WIDTH = 6, 200  # of a failure that are kept


class Skip(Exception):
    """What a case needs is not here."""


class DeviceLost(Exception):
    """Nothing more can be done on the device by this process."""


@dataclass
class Context:
    """Where a section stands: `done` are cases that an earlier process ended with."""

    section: str
    is_dry: bool
    deadline: float  # of time.monotonic
    records: Path
    done: frozenset[str] = frozenset()
    written: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def case(self, name: str, work: Callable[[], dict[str, Any] | None]) -> None:
        """Figures of `work` are kept with it; a `status` among them is its own."""
        if self._may_begin(name):
            with self._recorded(name) as figures:
                figures |= work() or {}

    async def case_on_loop(self, name: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        """The same on an event loop."""
        if self._may_begin(name):
            with self._recorded(name) as figures:
                figures |= await work()

    def _may_begin(self, name: str) -> bool:
        if name in self.done:
            return False
        self.write({"case": name, "status": BEGUN if self.left_s > 0 else LATE})
        return self.left_s > 0

    @contextmanager
    def _recorded(self, name: str) -> Iterator[dict[str, Any]]:
        """Whatever becomes of the body is written down; only DeviceLost leaves it."""
        begun, lost = time.monotonic(), False
        record: dict[str, Any] = {"status": PASSED}
        try:
            yield record
        except Skip as reason:
            record = {"status": SKIPPED, "reason": str(reason)}
        except ModuleNotFoundError as error:
            ours = (error.name or "").partition(".")[0] in ("engine", "kernels", "rpc", "tools", "tests")
            record = _failure(error) if ours else {"status": SKIPPED, "reason": f"needs {error.name}"}
        except Exception as error:
            record, lost = _failure(error), _device_is_lost()
        self.write({"case": name, **record, "seconds": round(time.monotonic() - begun, 2)})
        if lost:
            raise DeviceLost(name)

    def write(self, record: dict[str, Any]) -> None:
        self.written.append(record)
        with self.records.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _failure(error: Exception) -> dict[str, Any]:
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return {"status": FAILED, "error": [line[:_WIDTH] for line in lines[-_LINES:]]}


def _device_is_lost() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # whatever it says, the next case would say it too
        return True
    return False
