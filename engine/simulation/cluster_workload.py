"""Requests for a simulated cluster, drawn from a seed."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    number: int  # order of arrival
    prompt_tokens: int
    reply_tokens: int
    at_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.reply_tokens


# Infinite-LLM's evaluation has nine traces "built from ShareGPT4, L-Eval and length distributions of a real
# service".  Known are the ranges of lengths, and that traces 0 to 2 differ in their standard deviation.  All
# else here is our reading.
SHORT_RANGE = (1_000, 60_000)
SHORT_MEAN = 15_000  # near the 12,000 that prompts of Mooncake's public trace have in the mean
SHORT_DEVIATIONS = (5_000, 10_000, 15_000)  # of a beta distribution over the range
LONG_LEAST = 1_000
LONG_MOST = (200_000, 400_000, 600_000, 1_000_000, 1_500_000, 2_000_000)  # the first and last are known
# Long lengths are uniform in their logarithm: as many of 1-2K as of 1,000-2,000K.
# Replies are lognormal with the mean of Mooncake's public trace and the spread of `tools.bench.workload`.
REPLY_MEAN, REPLY_SPREAD = 343.0, 0.8

TRACES = {
    **{str(number): f"1-60K, deviation {each // 1000}K" for number, each in enumerate(SHORT_DEVIATIONS)},
    **{str(number): f"1-{each // 1000:,}K" for number, each in enumerate(LONG_MOST, 3)},
}
"""What each trace is, for people."""


def drawn_requests(trace: str, count: int, seed: int) -> list[Request]:
    """Of one of TRACES, all there at once."""
    draw = random.Random(f"trace {trace} {seed}")
    number = int(trace)
    length: Callable[[], float]
    if number < len(SHORT_DEVIATIONS):
        a, b = beta_of(SHORT_RANGE, SHORT_MEAN, SHORT_DEVIATIONS[number])
        low, high = SHORT_RANGE

        def length() -> float:
            return low + (high - low) * draw.betavariate(a, b)
    else:
        log_low, log_high = math.log(LONG_LEAST), math.log(LONG_MOST[number - len(SHORT_DEVIATIONS)])

        def length() -> float:
            return math.exp(draw.uniform(log_low, log_high))

    requests = []
    for index in range(count):
        total = int(length())
        reply = draw.lognormvariate(math.log(REPLY_MEAN) - REPLY_SPREAD**2 / 2, REPLY_SPREAD)
        replied = min(max(1, round(reply)), total - 1)
        requests.append(Request(index, total - replied, replied))
    return requests


def beta_of(bounds: tuple[int, int], mean: float, deviation: float) -> tuple[float, float]:
    """Parameters of the beta distribution over `bounds` with this mean and standard deviation."""
    low, high = bounds
    share = (mean - low) / (high - low)
    spread = (deviation / (high - low)) ** 2
    concentration = share * (1 - share) / spread - 1
    return share * concentration, (1 - share) * concentration
