"""Clients of the simulated engine: the conversations of `tools.bench`, under virtual time.

Figures have the names and definitions of `tools.bench.metrics`.  A client is at the server: no wire, no text.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from engine.conversation import Conversation, Turn
from engine.core import TokenEvent
from engine.simulation.profiles import Profile
from engine.simulation.simulated_engine import CoreSizes, SimulatedEngine, build_core
from engine.simulation.step_costs import cost_table
from engine.simulation.timed import TimedRunner, TimedTransfer
from engine.simulation.timeline import timeline_of
from engine.simulation.virtual_time import Agenda
from engine.types import ConversationId, SamplingParams, Tenant, TurnId, Usage
from tools.bench.driver import FILLING, People
from tools.bench.population import Member
from tools.measure import percentile

TENANT = Tenant("simulated")
SHARED_TOKEN = 0  # of prompts that all conversations begin with


@dataclass(frozen=True, slots=True)
class Setting:
    """What an engine is simulated with.  `stateless` gives all KV up after every turn."""

    profile: Profile
    sizes: CoreSizes
    context_tokens: int
    stateless: bool = False


@dataclass(eq=False, slots=True)
class _Client:
    member: Member
    live: Conversation
    turn: int  # that is said now or next
    begun_s: float = 0.0


class _Done(NamedTuple):
    """What is kept of a turn; times are virtual."""

    ended_s: float
    ttft_s: float
    e2e_s: float
    reply_tokens: int
    usage: Usage


class SimulatedLoad:
    """One point of a sweep.  `run` may be called once."""

    def __init__(self, setting: Setting, people: People) -> None:
        self._setting, self._people = setting, people
        self._agenda = Agenda()
        costs, sizes = setting.profile.costs, setting.sizes
        table = cost_table(costs, sizes.block_size, setting.context_tokens)
        self._core = build_core(
            sizes, table, TimedRunner(), TimedTransfer(), self._agenda, frozenset(), setting.context_tokens
        )
        self._engine = SimulatedEngine(
            self._core, timeline_of(costs, sizes.block_size), self._agenda, sizes.run_ahead, self._on_step
        )
        self._by_row: dict[int, _Client] = {}  # whose turn is in flight
        self._done: list[_Done] = []
        self._num_sent = 0
        self._fill_next: Callable[[], None] | None = None  # while histories are computed

    def run(self, warmup_s: float, duration_s: float) -> dict[str, Any]:
        """The figures of the turns that end within `duration_s` after `warmup_s` of virtual time."""
        begun = time.perf_counter()
        clients = self._fill()
        filled = time.perf_counter()
        began_s, num_steps = self._agenda.now, self._engine.num_steps
        self._done.clear()
        for client in clients:
            client.begun_s = began_s
            self._agenda.at(began_s + client.member.due_s, partial(self._say, client))
        arrivals = self._people.arrivals()

        def arrive(member: Member | None) -> None:
            if member is not None:
                self._arrived(member)
            upcoming = next(arrivals, None)
            if upcoming is not None:
                at_s, newcomer = upcoming
                self._agenda.at(began_s + at_s, partial(arrive, newcomer))

        arrive(None)
        self._agenda.run_until(began_s + warmup_s)
        self._num_sent = 0
        self._agenda.run_until(began_s + warmup_s + duration_s)
        figures = self._figures(began_s + warmup_s, duration_s)
        return figures | {
            "steps": self._engine.num_steps - num_steps,
            "fill_wall_s": filled - begun,
            "wall_s": time.perf_counter() - filled,
        }

    # -- conversations

    def _fill(self) -> list[_Client]:
        """Conversations that are there at the beginning, with the KV of their histories computed."""
        members = self._people.initial()
        clients = [_Client(member, self._open(member), member.turn) for member in members]
        waiting = iter(clients)

        def fill_next() -> None:
            for client in waiting:
                if client.member.history_tokens > 1:
                    self._begin(client, client.member.history_tokens - 1, 1)
                    return

        self._fill_next = fill_next
        for _ in range(FILLING):
            fill_next()
        while self._by_row:
            self._agenda.happen()
        self._fill_next = None
        return clients

    def _arrived(self, member: Member) -> None:
        client = _Client(member, self._open(member), member.turn, self._agenda.now)
        self._say(client)

    def _open(self, member: Member) -> Conversation:
        return self._core.new_conversation(ConversationId(f"c{member.number}"), TENANT)

    def _say(self, client: _Client) -> None:
        exchange = client.member.script.exchanges[client.turn]
        self._num_sent += 1
        self._begin(client, exchange.new_tokens, exchange.reply_tokens)

    def _begin(self, client: _Client, new_tokens: int, reply_tokens: int) -> None:
        """With ids that only this conversation has, so that no two share blocks by chance."""
        shared = min(client.member.script.shared_tokens, new_tokens) if not client.live.tokens else 0
        prompt = (SHARED_TOKEN,) * shared + (client.member.number,) * (new_tokens - shared)
        left = self._core.context_left(client.live) - new_tokens
        sampling = SamplingParams(max_tokens=max(1, min(reply_tokens, left)))
        turn = self._core.begin(client.live, TurnId(""), prompt, sampling, seed=0)
        self._by_row[turn.row] = client
        self._engine.wake()

    def _on_step(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            if event.finish_reason is not None:
                self._ended(event.turn)

    def _ended(self, turn: Turn) -> None:
        client, now = self._by_row.pop(turn.row), self._agenda.now
        if self._setting.stateless:
            self._core.manager.drop(client.live.table)
        self._core.confirm(turn)
        if self._fill_next is not None:
            self._fill_next()
            return
        assert turn.usage is not None and turn.first_token_s is not None
        ttft_s, e2e_s = turn.first_token_s - turn.arrived_s, now - turn.arrived_s
        self._done.append(_Done(now, ttft_s, e2e_s, turn.num_generated, turn.usage))
        client.turn += 1
        exchanges = client.member.script.exchanges
        if client.turn < len(exchanges):
            exchange = exchanges[client.turn]
            due_s = now + exchange.think_s
            if exchange.at_s is not None:
                due_s = max(now, client.begun_s + exchange.at_s)
            self._agenda.at(due_s, partial(self._say, client))
        elif (successor := self._people.successor()) is not None:
            self._agenda.at(now, partial(self._arrived, successor))

    # -- figures

    def _figures(self, since_s: float, duration_s: float) -> dict[str, Any]:
        ended = [done for done in self._done if since_s <= done.ended_s]
        history = sum(done.usage.prompt_tokens - done.usage.new_tokens for done in ended)
        sources = {
            name: sum(getattr(done.usage, f"{name}_tokens") for done in ended)
            for name in ("cached_device", "cached_host", "recomputed")
        }
        statistics = self._core.manager.statistics()
        return {
            "turns": len(ended),
            "turns_per_s": len(ended) / duration_s,
            "due_turns_per_s": self._num_sent / duration_s,
            "unfinished_turns": len(self._by_row),
            "output_tokens_per_s": sum(done.reply_tokens for done in ended) / duration_s,
            "history_tokens": history,
            "recomputed_tokens": sources["recomputed"],
            **{f"{name}_share": value / history if history else None for name, value in sources.items()},
            **_spread("ttft_ms", [1000 * done.ttft_s for done in ended]),
            **_spread("normalised_ms", [1000 * done.e2e_s / done.reply_tokens for done in ended]),
            "stored_blocks": statistics.num_stored,
            "loaded_blocks": statistics.num_loaded,
        }


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        f"{name}_mean": math.fsum(values) / len(values) if values else None,
        f"{name}_p50": percentile(values, 0.5) if values else None,
        f"{name}_p90": percentile(values, 0.9) if values else None,
    }
