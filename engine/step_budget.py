"""How many tokens of which prompt the next step computes: plain numbers in, plain numbers out.

While somebody decodes, a step computes only so many prompt tokens that it is expected to last at most
`ratio` times as long as with the decoding rows alone: their tokens keep coming at an even pace.  But never
fewer than `least`: a linear layer needs some rows to be worth reading its weights for, and few rows that
decode would make a prompt take its time for nothing.

Who gets them: the shortest remaining prompt first, which makes the mean time to the first token least and
lets a short turn pass a long document; but the oldest has a quarter for itself, so that none starves.  Turns
that arrive later cannot delay it: of n tokens a step it is computed within 4/n steps for each that it lacks,
and then another is the oldest.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

OLDEST_SHARE = 4
"""One of so many prompt tokens is the oldest prompt's."""


@dataclass(frozen=True, slots=True)
class Pacing:
    """With 16 conversations at once, each turn 100 new tokens and a reply of 64, the 99th percentile of the
    gaps between tokens is so many times their mean: measured with llama-160m on two CPU cores 1.8 with these
    values and 2.0 with a ratio of 2, at the same tokens a second.  In virtual time with a ratio of 2, for
    costs like those of llama-160m and qwen2.5-0.5b (`tests/engine/test_pacing.py`): 1.5 and 1.4; with a ratio
    of 2.5 1.9 and 1.7; with at least 96 tokens 2.0 and 2.2; without a pace 7 and 10, which answers 2 or 3 %
    more tokens a second, the first of a reply 1.9 times as late.

    Beside 8 rows of llama-160m a prompt token adds 1.11 ms of CPU time in a chunk of 32, 0.75 in one of 48,
    0.82 in one of 64 and 0.69 in one of 256.
    """

    ratio: float = 1.75
    least: int = 48  # tokens


def paced(
    pacing: Pacing, room: int, decode_s: float, missing: Sequence[int], token_s: Sequence[float]
) -> list[int]:
    """As `shared`, of the most tokens that `pacing` allows beside rows whose decoding alone takes `decode_s`
    seconds.  A token of each prompt adds `token_s` seconds.
    """
    spare_s = (pacing.ratio - 1) * decode_s

    def added_s(num_tokens: int) -> float:
        return sum(n * s for n, s in zip(shared(num_tokens, missing), token_s, strict=True))

    room = min(room, sum(missing))
    fits = bisect_right(range(room), spare_s, key=lambda i: added_s(i + 1))
    return shared(min(room, max(fits, pacing.least)), missing)


def shared(num_tokens: int, missing: Sequence[int]) -> list[int]:
    """Of `num_tokens`, how many each prompt gets of those that it misses.  `missing`: in order of arrival."""
    chunks = [0] * len(missing)
    if not missing:
        return chunks
    chunks[0] = min(missing[0], -(-num_tokens // OLDEST_SHARE))
    left = num_tokens - chunks[0]
    for i in sorted(range(len(missing)), key=missing.__getitem__):
        more = min(missing[i] - chunks[i], left)
        chunks[i] += more
        left -= more
    return chunks
