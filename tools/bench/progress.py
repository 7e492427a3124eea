"""How far a sweep is, on stderr: a bar that is drawn over itself, or without a terminal a line per point."""

import shutil
import sys
from typing import Self

from tools.bench.generator import Progress
from tools.bench.plan import Point

BAR = 20  # characters


class Progressing:
    def __init__(self, num_points: int) -> None:
        self._num_points = num_points
        self._num_done = 0
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wipe()

    def at(self, point: Point, progress: Progress) -> None:
        if self._is_terminal:
            full = round(BAR * progress.share)
            text = f"{'█' * full}{'░' * (BAR - full)} {self._name(point)}: {progress.what}"
            self._write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K")

    def done(self, point: Point, text: str) -> None:
        self._wipe()
        self._write(f"{self._name(point)}: {text}\n")
        self._num_done += 1

    def _name(self, point: Point) -> str:
        return f"[{self._num_done + 1}/{self._num_points}] {point.configuration.name}, {point.load}"

    def _wipe(self) -> None:
        if self._is_terminal:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)
