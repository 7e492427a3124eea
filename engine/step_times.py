"""How long the next step will take, learned from how long steps took.

A step's seconds are taken to be linear in what it computes: so many for every step, each decoding row, each
token that such a row attends to, each prompt token, and each pair of a prompt token with a token before it.
The five coefficients are the state of a Kalman filter that lets them walk at random, so that they follow the
machine.  What no step varies keeps its value, and its uncertainty is bounded: hours of decoding do not make
the first prompt afterwards a surprise.  A single measurement moves them by no more than three standard
deviations would: a step that was held up by another process counts little.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.batch import Segment

_GUESS = np.array([5e-3, 1e-3, 1e-6, 3e-4, 1e-7])
"""Seconds: only the proportions count, the first measurement sets the scale.  Of two CPU cores with a model
of 160 million parameters, roughly.
"""
_GUESS_ERROR = 2.0  # standard deviation of each coefficient, in units of its guess
_WALK = 0.05  # a step, likewise
_NOISE = 0.1  # of a measurement, as a share of what was foreseen
_MAX_SURPRISE = 3.0  # standard deviations


class Work(NamedTuple):
    """What a step computes, as far as its time depends on it."""

    num_rows: int  # segments of a single token
    row_context: int  # tokens that they attend to, all together
    num_prompt: int  # tokens of all other segments
    num_pairs: int  # of those tokens with tokens before them

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> "Work":
        num_rows = row_context = num_prompt = num_pairs = 0
        for segment in segments:
            first, length = segment.first, segment.length
            if length == 1:
                num_rows += 1
                row_context += first
            else:
                num_prompt += length
                num_pairs += length * first + length * (length - 1) // 2
        return cls(num_rows, row_context, num_prompt, num_pairs)


class StepTimes:
    def __init__(self) -> None:
        self._unit = np.zeros(5)  # guesses on the scale of the first measurement
        self._state = np.ones(5)  # coefficients in these units; none is negative
        self._errors = np.eye(5) * _GUESS_ERROR**2  # their covariance

    @property
    def is_known(self) -> bool:
        """Whether anything was measured yet."""
        return bool(self._unit[0])

    def observe(self, work: Work, seconds: float) -> None:
        """A step took so long, its copies not counted."""
        if not self.is_known:
            self._unit = _GUESS * (seconds / float(_features(work) @ _GUESS))
        x = _features(work) * self._unit
        foreseen = float(x @ self._state)
        self._errors[np.diag_indices(5)] += _WALK**2
        toward = self._errors @ x
        noise = _NOISE * max(foreseen, float(x.max()) * _NOISE)
        variance = float(x @ toward) + noise**2
        surprise = _MAX_SURPRISE * float(np.sqrt(variance))
        gain = toward / variance
        self._state = np.maximum(self._state + gain * np.clip(seconds - foreseen, -surprise, surprise), 0.0)
        self._errors -= np.outer(gain, toward)
        shrink = np.minimum(1.0, _GUESS_ERROR / np.sqrt(np.maximum(self._errors.diagonal(), 1e-12)))
        self._errors *= np.outer(shrink, shrink)

    def seconds(self, work: Work) -> float:
        """Of a step that computes this."""
        return float(_features(work) @ (self._unit * self._state))

    def prompt_token_s(self, position: int) -> float:
        """What one prompt token more at `position` adds to a step."""
        _, _, _, token_s, pair_s = (self._unit * self._state).tolist()
        return float(token_s + position * pair_s)


def _features(work: Work) -> NDArray[np.float64]:
    return np.array((1, *work), np.float64)
