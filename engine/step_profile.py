"""Where the time of every step went, as lines of a file.

A step's time begins when the step before it ended, or its launch where steps run ahead, so nothing is left
out: the parts of a step add up to its seconds, and the seconds of all steps to the time that has passed.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from engine.batch import StepPlan
from engine.errors import ConfigError
from kernels.marks import PARTS, Part

_logger = logging.getLogger(__name__)


class StepRecorder:
    """Told what happens, in order, by whichever thread does it: the step thread while there is a step, else
    the loop.  This one records nothing; it is what runs unless somebody asks for a profile.
    """

    def start(self) -> None:
        """What was marked before does not count."""

    def mark(self, part: Part, seconds: float | None = None) -> None:
        """The time since the last mark went to `part`, or `seconds` of it."""

    def end(self, plan: StepPlan) -> None:
        """The step that carries out `plan` is over, or launched where steps run ahead."""

    def pause(self) -> None:
        """Nothing is to be computed: what comes until the next mark is no step's work."""

    def close(self) -> None: ...


class StepFile(StepRecorder):
    """Writes a JSON object per step: `step` (its number), `end_s` (by the clock), `tokens`, `segments`,
    `decode_rows` (segments of one token), `seconds`, and the seconds of every part.

    Written are TOGETHER steps at once, or what there is when there is nothing to compute: line by line it
    would take 0.1 ms of every step.  What writing takes belongs to the next step.  Raises ConfigError if the
    file cannot be written; where that happens later, recording ends with a warning.
    """

    TOGETHER = 32

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._file: BinaryIO | None = None
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise ConfigError(f"no step profile can be written to {path}: {error.strerror}") from None
        self.start()

    def start(self) -> None:
        self._begun_s = self._at_s = self._clock()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._ended: list[tuple[StepPlan, float, float, dict[Part, float]]] = []

    def mark(self, part: Part, seconds: float | None = None) -> None:
        now = self._clock() if seconds is None else self._at_s + seconds
        self._seconds[part] += now - self._at_s
        self._at_s = now

    def end(self, plan: StepPlan) -> None:
        self.mark("host")
        self._ended.append((plan, self._begun_s, self._at_s, self._seconds))
        self._begun_s = self._at_s
        self._seconds = dict.fromkeys(PARTS, 0.0)
        if len(self._ended) == self.TOGETHER:
            self._write()

    def pause(self) -> None:
        self.mark("host")
        self._write()

    def close(self) -> None:
        self._write()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _write(self) -> None:
        lines, self._ended = [_line(*each) for each in self._ended], []
        if self._file is None or not lines:
            return
        try:
            self._file.write("".join(lines).encode())
        except OSError as error:  # no reason for an engine to fail
            _logger.warning("the step profile %s ends here: %s", self._path, error.strerror)
            self.close()


def _line(plan: StepPlan, begun_s: float, end_s: float, parts: dict[Part, float]) -> str:
    lengths = [segment.length for segment in plan.segments]
    line: dict[str, float] = {
        "step": plan.number,
        "end_s": round(end_s, 7),
        "tokens": sum(lengths),
        "segments": len(lengths),
        "decode_rows": lengths.count(1),
        "seconds": round(end_s - begun_s, 7),
    }
    line |= {str(part): round(seconds, 7) for part, seconds in parts.items()}
    return json.dumps(line) + "\n"
