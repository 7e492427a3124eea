"""Where the KV of idle conversations sleeps, on one rank or on others.

A block leaves its rank's device for its host, for the device or the host of another rank, or is dropped; one
value decides, as it does within a rank (Pensieve's retention value), less what coming back costs.
"""

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from engine.cache.costs import CostTable


class Place(IntEnum):
    """In the order in which idle blocks move on."""

    DEVICE = 0
    HOST = 1
    OTHER_DEVICE = 2  # of another rank
    OTHER_HOST = 3
    DROPPED = 4


def sleeping_places(
    ends: NDArray[np.int64],
    idle_s: NDArray[np.float64],
    room: Mapping[Place, int],
    back_s: Mapping[Place, float],
    costs: CostTable,
) -> NDArray[np.int8]:
    """A Place for each block, which ends at token `ends` of a conversation that has been idle for `idle_s`.

    `room`: blocks that fit, `back_s`: seconds per block to have it on the device again; places without room
    may be left out.  Place by place, the blocks go in for which it saves most: the cost of computing less
    that of coming back, over idle time.  Where that saves nothing a block is not kept, though there be room.
    """
    places = np.full(len(ends), Place.DROPPED, np.int8)
    compute_s = np.asarray(costs.compute_s(ends.astype(np.float64)))
    for place in sorted(room):
        saved = (compute_s - back_s.get(place, 0.0)) / (idle_s + 1e-9)
        left = np.flatnonzero((places == Place.DROPPED) & (saved > 0))
        # Equal values: the later blocks stay, as leading ones cost least to compute again.
        best = left[np.lexsort((-ends[left], -saved[left]))][: room[place]]
        places[best] = place
    return places
