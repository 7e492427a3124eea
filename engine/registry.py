"""The conversations in memory: found, brought back from the log, and let go when there are too many."""

import asyncio
from collections.abc import Iterator, Sequence

from engine.core import EngineCore
from engine.errors import Conflict, NotFound
from engine.history import num_computed, tokens_of
from engine.live import LiveConversation
from engine.token_log import TokenLog
from engine.types import ConversationId, ConversationRecord, Tenant, TurnRecord

SEQ_GAP = 2**20
"""After a restart `seq` goes on this far behind the last stored one: events that were sent but not stored
stay behind it.
"""


class Registry:
    """A conversation is here at most once.  Used on the event loop only."""

    def __init__(self, core: EngineCore, log: TokenLog, fingerprint: str, max_conversations: int) -> None:
        self._core, self._log = core, log
        self._fingerprint = fingerprint
        self._max_conversations = max_conversations
        self._live: dict[ConversationId, LiveConversation] = {}  # least recently used first
        self._loading: dict[tuple[Tenant, ConversationId], asyncio.Future[LiveConversation]] = {}

    def __iter__(self) -> Iterator[LiveConversation]:
        return iter(self._live.values())

    def __len__(self) -> int:
        return len(self._live)

    def get(self, id: ConversationId) -> LiveConversation | None:
        """The conversation if it is in memory, whoever it belongs to."""
        return self._live.get(id)

    async def find(self, tenant: Tenant, id: ConversationId) -> LiveConversation:
        """The conversation, brought back from the log if need be.  NotFound; Conflict for another model."""
        live = self._live.get(id)
        if live is None:
            key = tenant, id
            loading = self._loading.get(key)
            if loading is None:
                loading = self._loading[key] = asyncio.ensure_future(self._load(*key))
                loading.add_done_callback(lambda _: self._loading.pop(key))
            live = await asyncio.shield(loading)
        if live.record.tenant != tenant or live.is_deleted:
            raise not_found(id)
        return live

    async def loaded(self, tenant: Tenant, id: ConversationId) -> None:
        """Returns once nobody is bringing the conversation back any more."""
        while loading := self._loading.get((tenant, id)):
            await asyncio.wait([loading])

    async def read(self, tenant: Tenant, id: ConversationId) -> tuple[ConversationRecord, list[TurnRecord]]:
        """What the log holds of a conversation.  NotFound."""
        found = await asyncio.wrap_future(self._log.load(id))
        if found is None or found[0].tenant != tenant:
            raise not_found(id)
        return found

    def new(self, record: ConversationRecord, turns: Sequence[TurnRecord] = ()) -> LiveConversation:
        """A conversation that nobody finds yet."""
        core = self._core.new_conversation(
            record.id, record.tenant, tokens_of(turns), num_computed=num_computed(turns)
        )
        live = LiveConversation(record, core, {turn.turn_id: turn.digest for turn in turns}, record.seq_mark)
        live.knows_past = not turns
        live.history_rewritten = bool(turns) and turns[-1].history_rewritten
        live.idle.set()
        return live

    def keep(self, live: LiveConversation) -> LiveConversation:
        """From now on others find it, as the most recently used."""
        self._live.pop(live.record.id, None)
        self._live[live.record.id] = live
        return live

    def forget(self, live: LiveConversation) -> None:
        """It leaves memory; the log keeps what it has."""
        if self._live.get(live.record.id) is live:
            del self._live[live.record.id]
            self._core.forget(live.core)

    def unload_idle(self) -> None:
        """Let go of the least recently used beyond `max_conversations`, but of none in use."""
        surplus = len(self._live) - self._max_conversations
        if surplus > 0:
            idle = (live for live in self._live.values() if live.outbox is None and live.idle.is_set())
            for live in [live for live, _ in zip(idle, range(surplus), strict=False)]:
                self.forget(live)

    async def _load(self, tenant: Tenant, id: ConversationId) -> LiveConversation:
        record, turns = await self.read(tenant, id)
        if record.fingerprint != self._fingerprint:
            raise Conflict(
                f"{id} belongs to model {record.fingerprint}, this server has {self._fingerprint}; "
                "serve that model, or open a new conversation"
            )
        seq = record.seq_mark + SEQ_GAP
        await asyncio.wrap_future(self._log.set_seq_mark(id, seq))
        if id in self._live:  # it was just being opened
            return self._live[id]
        live = self.keep(self.new(record, turns))
        live.seq, live.retries = seq, True
        return live


def not_found(conversation_id: ConversationId) -> NotFound:
    return NotFound(f"there is no conversation {conversation_id}; open a new one or list yours")
