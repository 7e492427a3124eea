"""Which part of a history a turn needs when every layer of the model attends through a sliding window.

The position to be computed attends to a window of positions.  What of them has no KV is computed as well, and
attends to a window of its own, and so on, until a window is whole or the history begins.  What lies before
need not be anywhere.

KV that is computed again is exact in every layer, because blocks are shared and outlive the turn.  A limit of
layers x window would be exact only for the output of the last position: at the beginning of such a stretch
the upper layers would have attended to nothing.
"""

import numpy as np
from numpy.typing import NDArray


def first_needed(held: NDArray[np.int64], num_tokens: int, block_size: int, window: int) -> int:
    """The number of the first block that computing position `num_tokens` - 1 needs; all behind it are needed
    too.

    held [num_blocks]: of each block of the first `num_tokens` tokens, how many tokens from its first on have
    KV or are going to get it by a copy.  The row at position p sees p - window + 1 .. p.
    """
    starts = np.arange(len(held)) * block_size
    ends = np.minimum(starts + block_size, num_tokens)
    holes = np.flatnonzero(starts + held < ends)
    computed_from = np.append((starts + held)[holes], num_tokens - 1)  # the last is computed in any case
    seen_from = np.maximum(computed_from - window + 1, 0)
    out_of_sight = np.flatnonzero(ends[holes] <= seen_from[1:])
    return int(seen_from[out_of_sight[-1] + 1 if len(out_of_sight) else 0]) // block_size
