"""From a request to what it appends: checked, rendered, tokenised, or found in the log."""

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import fields, replace
from hashlib import blake2b

from engine.errors import ContextOverflow, InvalidRequest, NotFound
from engine.history import tokens_of
from engine.live import LiveConversation, TurnInput
from engine.sampler import SamplerRules
from engine.text.messages import tools_as_values
from engine.text_service import PastTurn, TextService, TurnPrompt
from engine.token_log import TokenLog
from engine.types import (
    ConversationRecord,
    FinishReason,
    Message,
    OpenRequest,
    RegenerateRequest,
    RewritePolicy,
    SamplingParams,
    Timing,
    TurnId,
    TurnRecord,
    TurnRequest,
    Usage,
)

HISTORY = TurnId("history")
"""The turn that holds what was said before a conversation was opened."""
HISTORY_SEQ = 2
"""Of its `TurnDone`: 1 is that it was accepted."""


class TurnInputs:
    def __init__(
        self,
        log: TokenLog,
        text: TextService,
        sampler: SamplerRules,
        defaults: SamplingParams,
        *,
        vocab_size: int,
        context_tokens: int,
    ) -> None:
        self._log, self._text, self._sampler = log, text, sampler
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens

    def check(self, request: TurnRequest) -> None:
        """InvalidRequest for what no conversation could take."""
        if bool(request.messages) == bool(request.token_ids):
            what = "both messages and token ids" if request.messages else "neither text nor token ids"
            raise InvalidRequest(f"turn {request.turn_id} has {what}; send one of them")
        for token_id in (min(request.token_ids, default=0), max(request.token_ids, default=0)):
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(f"token id {token_id} is outside the vocabulary of {self._vocab_size}")

    async def of(self, live: LiveConversation, request: TurnRequest | RegenerateRequest) -> TurnInput:
        """What `request` appends to the history as it stands.  Raises EngineError if it cannot be."""
        sampling = request.sampling.over(live.record.sampling).over(self._defaults)
        bad_word_ids = await self._checked(sampling)
        if isinstance(request, RegenerateRequest):
            input = await self._again(live, request, sampling)
        else:
            input = await self._next(live, request, sampling)
        return replace(input, bad_word_ids=bad_word_ids)

    async def check_open(self, request: OpenRequest) -> None:
        """InvalidRequest for a conversation in which no turn could be taken."""
        tools_as_values(request.tools)
        await self.check_defaults(request.sampling)

    async def check_defaults(self, sampling: SamplingParams) -> None:
        """InvalidRequest for defaults of a conversation that no turn could take."""
        await self._checked(sampling.over(self._defaults))

    async def of_history(self, record: ConversationRecord, messages: tuple[Message, ...]) -> TurnRecord:
        """The first turn of a conversation that begins with `messages`.  InvalidRequest, ContextOverflow."""
        ids = await self._text.history(record.system, messages, record.tools, record.created_at)
        if len(ids) > self._context_tokens:
            raise ContextOverflow(
                f"the history has {len(ids)} tokens and the context {self._context_tokens}; shorten it"
            )
        return TurnRecord(
            turn_id=HISTORY,
            number=0,
            first_token=0,
            prompt_ids=tuple(ids),
            reply_ids=(),
            messages=messages,
            reply_text="",
            finish_reason=FinishReason.APPENDED,
            matched_stop=None,
            usage=Usage(prompt_tokens=len(ids), new_tokens=len(ids)),
            timing=Timing(),
            created_at=record.created_at,
            done_seq=HISTORY_SEQ,
            digest=digest_of(TurnRequest(HISTORY, messages, wants_reply=False)),
        )

    async def committed_turns(self, live: LiveConversation) -> list[TurnRecord]:
        loaded = await asyncio.wrap_future(self._log.load(live.record.id))
        return loaded[1] if loaded is not None else []

    async def _checked(self, sampling: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The ids of its bad words.  InvalidRequest if this model cannot sample so."""
        words = sampling.bad_words
        bad_word_ids = await self._text.bad_word_ids(words) if words else ()
        self._sampler.check(sampling, bad_word_ids)
        return bad_word_ids

    async def _next(
        self, live: LiveConversation, request: TurnRequest, sampling: SamplingParams
    ) -> TurnInput:
        ids: Sequence[int] = request.token_ids
        first_token, rewritten_from, rewritten_to = len(live.core.tokens), None, 0
        if request.messages:
            prompt = await self._prompt(live, request)
            ids, first_token, rewritten_from = prompt.ids, prompt.first_token, prompt.rewritten_from
            if first_token < len(live.core.tokens):
                said = await self._rendered(live, request, RewritePolicy.KEEP)  # and nothing of the past
                rewritten_to = first_token + len(ids) - len(said.ids)
        keeps = live.record.on_rewrite is RewritePolicy.KEEP
        if not ids:
            raise InvalidRequest(f"turn {request.turn_id} adds no token to the conversation; send some text")
        return TurnInput(
            request.turn_id,
            digest_of(request),
            len(live.turns),
            first_token,
            tuple(ids),
            request.messages,
            sampling,
            request.timeout_s,
            request.wants_reply,
            history_rewritten=keeps and (live.history_rewritten or rewritten_from is not None),
            rewritten_from=rewritten_from,
            rewritten_to=rewritten_to,
        )

    async def _prompt(self, live: LiveConversation, request: TurnRequest) -> TurnPrompt:
        turns = live.not_in_past
        if not live.knows_past:
            turns = [PastTurn.of(turn) for turn in await self.committed_turns(live)]
        if turns:
            await self._text.extend_past(live.past, live.record.system, tuple(turns))
        live.not_in_past.clear()
        live.knows_past = True
        return await self._rendered(live, request, live.record.on_rewrite)

    async def _rendered(
        self, live: LiveConversation, request: TurnRequest, policy: RewritePolicy
    ) -> TurnPrompt:
        record = live.record
        return await self._text.prompt(
            live.past,
            live.core.tokens[:],
            request.messages,
            system=record.system,
            now=record.created_at,
            tools=record.tools,
            wants_reply=request.wants_reply,
            policy=policy,
        )

    async def _again(
        self, live: LiveConversation, request: RegenerateRequest, sampling: SamplingParams
    ) -> TurnInput:
        records, name = await self.committed_turns(live), live.record.id
        if not records:
            raise InvalidRequest(f"{name} has no turn yet, so there is no reply to regenerate")
        wanted = request.replaces if request.replaces is not None else records[-1].turn_id
        old = next((record for record in records if record.turn_id == wanted), None)
        if old is None:
            raise NotFound(f"turn {wanted} is not in {name}; nothing was regenerated")
        if old.finish_reason is FinishReason.APPENDED:
            raise InvalidRequest(
                f"turn {wanted} of {name} was appended and has no reply to regenerate; send a turn behind it"
            )
        return TurnInput(
            request.turn_id,
            digest_of(request),
            old.number,
            old.first_token,
            old.prompt_ids,
            old.messages,
            sampling,
            request.timeout_s,
            history_rewritten=old.history_rewritten,
            before=tokens_of(records[: old.number])[: old.first_token],
        )


_FIRST_FIELDS = {Message: 2, SamplingParams: 10}


def digest_of(request: TurnRequest | RegenerateRequest) -> bytes:
    """Of what a turn asks for, by which a repeated turn id is recognised.

    Logs keep digests, so what is the same must be written the same for ever: as the first version did, which
    had the first so many fields of each class, and what came later only where it is set.
    """
    ids = array("q")  # holds anything that a client may send; not checked yet
    if isinstance(request, RegenerateRequest):
        asked, messages = f"regenerate {request.replaces!r}", _written(())
    else:
        asked, messages = "" if request.wants_reply else "append", _written(request.messages)
        ids.extend(request.token_ids)
    text = f"{asked}({messages}, {_written(request.sampling)})"
    return blake2b(text.encode() + ids.tobytes(), digest_size=16).digest()


def _written(value: object) -> str:
    """As `repr`, without fields that came later and are not set."""
    if isinstance(value, Message | SamplingParams):
        num_first = _FIRST_FIELDS[type(value)]
        given = [(f.name, getattr(value, f.name), f.default) for f in fields(value)]
        told = [*given[:num_first], *(field for field in given[num_first:] if field[1] != field[2])]
        return f"{type(value).__name__}({', '.join(f'{name}={part!r}' for name, part, _ in told)})"
    assert isinstance(value, tuple)
    parts = [_written(part) for part in value]
    return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
