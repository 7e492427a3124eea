"""A simulated cluster: requests get their replies, blocks come back, and counters say what was sent."""

from dataclasses import asdict, replace

import pytest

from engine.simulation.cluster import SYSTEMS, Cluster, ClusterSettings, Figures
from engine.simulation.cluster_profiles import SETUPS
from engine.simulation.cluster_rank import Scheduling
from engine.simulation.cluster_workload import Request, drawn_requests
from engine.simulation.network import networks, partial_bytes, query_bytes

SETUP = SETUPS["a100-7b"]
NETWORKS = networks(SETUP.nvlink, SETUP.infiniband)
LENDING = ("v1", "v2")
DECODING = Scheduling(prefills=False)


def cluster(system: str, num_instances: int = 4, **changes: object) -> Cluster:
    settings = ClusterSettings(SETUP, NETWORKS["infiniband"], num_instances, system, DECODING)
    return Cluster(replace(settings, **changes))


def timeless(figures: Figures) -> dict[str, object]:
    return {name: value for name, value in asdict(figures).items() if name != "wall_s"}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("trace", ["2", "4"])
def test_every_request_that_fits_gets_its_whole_reply(system: str, trace: str) -> None:
    requests = drawn_requests(trace, 40, 3)
    ranks = cluster(system)
    figures = ranks.run(requests, limit_s=20_000)
    fitting = [request for request in requests if ranks.can_ever_serve(request)]
    assert figures.unfinished == 0
    assert figures.refused == len(requests) - len(fitting)
    assert figures.tokens == sum(request.reply_tokens for request in fitting)
    assert figures.refused == 0 or (system, trace) == ("isolated", "4")


@pytest.mark.parametrize("system", LENDING)
def test_all_blocks_come_back(system: str) -> None:
    ranks = cluster(system)
    ranks.run(drawn_requests("4", 40, 5), limit_s=20_000)
    ranks.agenda.run_until(ranks.agenda.now + 60)
    assert ranks.pool is not None
    for memory in ranks.pool.memories:
        assert memory.num_free == memory.num_blocks
        assert (memory.num_lent, memory.num_remote, memory.num_moving) == (0, 0, 0)


@pytest.mark.parametrize("system", LENDING)
def test_a_run_can_be_repeated(system: str) -> None:
    first, again, other = (timeless(cluster(system).run(drawn_requests("2", 40, seed))) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("system", LENDING)
def test_a_conversation_longer_than_a_rank_lies_on_several(system: str) -> None:
    ranks = cluster(system)
    own = ranks.num_blocks * 32
    figures = ranks.run([Request(0, 3 * own, 200)], limit_s=1_000)
    assert figures.tokens == 200 and figures.remote_share > 0.3
    assert cluster("isolated").run([Request(0, 3 * own, 200), Request(1, 100, 5)]).refused == 1


@pytest.mark.parametrize("system", LENDING)
def test_a_conversation_as_long_as_a_rank_begins_too(system: str) -> None:
    ranks = cluster(system)
    assert ranks.run([Request(0, 32 * ranks.num_blocks - 300, 200)], limit_s=1_000).tokens == 200


@pytest.mark.parametrize("system", LENDING)
def test_wire_bytes_are_holders_times_query_and_partial(system: str) -> None:
    """In each layer of each step, for each token: nothing that grows with the context."""
    ranks = cluster(system)
    ranks.run(drawn_requests("4", 40, 3), limit_s=20_000)
    shape = SETUP.shape
    counters = [rank.counters for rank in ranks.ranks]
    assert sum(each.wire_bytes for each in counters) > 0
    for each in counters:
        assert each.wire_bytes == each.holder_layers * (query_bytes(shape) + partial_bytes(shape))


@pytest.mark.parametrize("system", LENDING)
def test_a_rank_without_remote_blocks_posts_nothing_and_waits_for_nobody(system: str) -> None:
    """Its figures are those of a rank that is alone, beside neighbours that lend and borrow."""
    long = [Request(100, 180_000, 300), Request(101, 180_000, 300)]
    short = [Request(2 + 4 * n, 3_000, 200) for n in range(8)]
    ranks = cluster(system, max_lent_share=0.4)
    quiet = ranks.ranks[2]
    lonely = cluster("isolated")
    ranks.run([*long, *short], limit_s=20_000)
    lonely.run(short)
    assert ranks.ranks[0].counters.messages > 0 == quiet.counters.messages == quiet.counters.wire_bytes
    assert quiet.counters.waited_s == 0
    assert quiet.counters.generated == lonely.ranks[2].counters.generated
    slowed_s = quiet.counters.ended_s - lonely.ranks[2].counters.ended_s
    assert slowed_s <= quiet.counters.served_s + 1e-9


def test_settling_debts_leaves_less_remote_in_a_long_run() -> None:
    """DistKV-LLM, DGFM: on against off."""
    shares = []
    for settles in (True, False):
        runs = [cluster("v1", 8, settles=settles).run(drawn_requests("2", 240, seed)) for seed in (1, 2, 3)]
        shares.append(sum(figures.remote_share for figures in runs))
    settled, unsettled = shares
    assert settled < unsettled


def test_a_cap_bounds_what_a_rank_lends() -> None:
    ranks = cluster("v1", max_lent_share=0.25)
    most = 0

    def look() -> None:
        nonlocal most
        assert ranks.pool is not None
        most = max(most, *(memory.num_lent for memory in ranks.pool.memories))
        ranks.agenda.after(0.1, look)

    look()
    ranks.run(drawn_requests("3", 40, 3), limit_s=20_000)
    assert 0 < most <= 0.25 * ranks.num_blocks


def test_what_moves_in_the_background_is_bounded_and_costs_nothing_up_to_16_tokens() -> None:
    seconds = [
        cluster("v2", 8, scheduling=replace(DECODING, moved_tokens_per_step=tokens))
        .run(drawn_requests("2", 160, 1))
        .seconds
        for tokens in (0, 16)
    ]
    alone_s = cluster("isolated", 8).run(drawn_requests("2", 160, 1)).seconds
    assert seconds[0] == pytest.approx(alone_s)  # nothing can move, so nothing changes
    assert seconds[1] != pytest.approx(alone_s)
