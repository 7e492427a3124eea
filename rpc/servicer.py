"""The two services of continuo.proto, on top of a `Backend`."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from engine.errors import InvalidRequest
from rpc import codec
from rpc._generated import continuo_pb2 as pb
from rpc._generated import continuo_pb2_grpc as pb_grpc
from rpc.auth import Authenticator, Principal
from rpc.backend import Attachment, Backend
from rpc.status import Answering, Context
from rpc.stream import ConversationStream, attached

DEFAULT_PAGE, MAX_PAGE = 50, 500


class ConversationsServicer(pb_grpc.ConversationsServicer):
    def __init__(self, backend: Backend, authenticator: Authenticator) -> None:
        self._backend = backend
        self._authenticator = authenticator

    async def Converse(self, requests: AsyncIterator[pb.ClientEvent], context: Context) -> None:
        async with Answering(context):
            caller = _caller(self._authenticator, context)
            first = await anext(aiter(requests), pb.ClientEvent())
            attachment: Attachment
            match first.WhichOneof("event"):
                case "open":
                    attachment = await self._backend.open(caller.tenant, codec.open_request(first.open))
                    greeting = pb.ServerEvent(opened=attached(attachment))
                case "resume":
                    attachment = await self._backend.resume(caller.tenant, codec.resume_request(first.resume))
                    greeting = pb.ServerEvent(resumed=attached(attachment))
                case other:
                    found = f"it was {other}" if other else "it was empty or missing"
                    raise InvalidRequest(f"the first event of a stream must be open or resume; {found}")
            await ConversationStream(attachment, requests, context).run(greeting)

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        async with Answering(context):
            caller = _caller(self._authenticator, context)
            begin, size = _turn_number(request.page_token), _page_size(request.page_size)
            record, turns = await self._backend.get(
                caller.tenant, codec.conversation_id(request.conversation_id)
            )
            end = begin + size
            return pb.GetResponse(
                conversation=codec.conversation(record),
                turns=[codec.committed_turn(turn) for turn in turns[begin:end]],
                next_page_token=str(end) if end < len(turns) else "",
            )

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        async with Answering(context):
            caller = _caller(self._authenticator, context)
            size, page = _page_size(request.page_size), request.page_token or None
            records, next_page = await self._backend.list(caller.tenant, dict(request.labels), size, page)
            conversations = [codec.conversation(record) for record in records]
            return pb.ListResponse(conversations=conversations, next_page_token=next_page or "")

    async def Fork(self, request: pb.ForkRequest, context: Context) -> pb.ForkResponse:
        async with Answering(context):
            caller = _caller(self._authenticator, context)
            record = await self._backend.fork(caller.tenant, codec.fork_request(request))
            return pb.ForkResponse(conversation=codec.conversation(record))

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        async with Answering(context):
            caller = _caller(self._authenticator, context)
            await self._backend.delete(caller.tenant, codec.conversation_id(request.conversation_id))
            return pb.DeleteResponse()


class EngineServicer(pb_grpc.EngineServicer):
    """`begin_drain(grace_s)` begins the shutdown and returns at once; None = the server's own grace."""

    def __init__(
        self, backend: Backend, authenticator: Authenticator, begin_drain: Callable[[float | None], None]
    ) -> None:
        self._backend = backend
        self._authenticator = authenticator
        self._begin_drain = begin_drain

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        async with Answering(context):
            caller = _caller(self._authenticator, context)
            asked = codec.generate_request(request, timeout_s=context.time_remaining())
            async with aclosing(self._backend.generate(caller.tenant, asked)) as events:
                async for event in events:
                    await context.write(codec.generate_event(event))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with Answering(context):
            token_ids = await self._backend.tokenize(request.text, request.allow_special)
            return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with Answering(context):
            text = await self._backend.detokenize(tuple(request.token_ids), request.skip_special)
            return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        async with Answering(context):
            return codec.model_info(self._backend.model_info())

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        async with Answering(context):
            _caller(self._authenticator, context).require_admin("GetLoad")
            return codec.load(self._backend.load())

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        async with Answering(context):
            _caller(self._authenticator, context).require_admin("Drain")
            self._begin_drain(codec.drain_grace(request))
            return pb.DrainResponse()


def _caller(authenticator: Authenticator, context: Context) -> Principal:
    return authenticator.principal(context.invocation_metadata())


def _page_size(asked: int) -> int:
    if asked < 0:
        raise InvalidRequest(f"page_size is {asked}; it must be 0 (the server's choice) or positive")
    return min(asked or DEFAULT_PAGE, MAX_PAGE)


def _turn_number(page_token: str) -> int:
    if page_token and not page_token.isdecimal():
        raise InvalidRequest(
            f"page_token {page_token[:40]!r} did not come from this server; begin again without it"
        )
    return int(page_token or 0)
