from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.costs import CostTable
from engine.dist.hops import Place, sleeping_places

COSTS = CostTable({32: 1.0, 1024: 4.0}, load_s=0.5)
BACK_S = {Place.DEVICE: 0.0, Place.HOST: 0.5, Place.OTHER_DEVICE: 1.5, Place.OTHER_HOST: 2.0}
BLOCKS = st.lists(st.tuples(st.integers(1, 100), st.sampled_from([1.0, 5.0, 60.0, 3600.0])), max_size=40)
ROOM = st.fixed_dictionaries({place: st.integers(0, 12) for place in BACK_S})


def placed(blocks: list[tuple[int, float]], room: dict[Place, int]) -> list[Place]:
    ends = np.array([32 * end for end, _ in blocks], np.int64)
    idle_s = np.array([idle for _, idle in blocks])
    return [Place(place) for place in sleeping_places(ends, idle_s, room, BACK_S, COSTS)]


@given(BLOCKS, ROOM)
def test_blocks_fit_and_none_sleeps_where_computing_it_is_cheaper(blocks, room):
    places = placed(blocks, room)
    assert all(num <= room[place] for place, num in Counter(places).items() if place != Place.DROPPED)
    for (end, _), place in zip(blocks, places, strict=True):
        assert place == Place.DROPPED or BACK_S[place] < COSTS.compute_s(32 * end)


@given(BLOCKS, ROOM)
def test_of_one_conversation_the_later_blocks_sleep_nearer(blocks, room):
    places = placed(blocks, room)
    for idle in {idle for _, idle in blocks}:
        same = sorted((e, place) for (e, i), place in zip(blocks, places, strict=True) if i == idle)
        for (early, before), (late, after) in pairwise(same):
            assert early == late or after <= before


@given(BLOCKS, ROOM)
def test_room_elsewhere_never_costs_anything(blocks, room):
    """Whatever the others offer: what sleeps here stays here, and no more is dropped."""
    alone = placed(blocks, {**room, Place.OTHER_DEVICE: 0, Place.OTHER_HOST: 0})
    pooled = placed(blocks, room)
    for before, after in zip(alone, pooled, strict=True):
        assert after == before or (
            before == Place.DROPPED and after in (Place.OTHER_DEVICE, Place.OTHER_HOST)
        )


def test_blocks_move_on_as_their_conversation_stays_idle():
    room = {Place.DEVICE: 1, Place.HOST: 1, Place.OTHER_DEVICE: 1, Place.OTHER_HOST: 1}
    blocks = [(32, 10.0), (32, 20.0), (32, 30.0), (32, 40.0), (32, 50.0)]
    assert placed(blocks, room) == list(Place)
    assert placed([(1, 10.0), (1, 20.0), (1, 30.0)], room) == [Place.DEVICE, Place.HOST, Place.DROPPED]
