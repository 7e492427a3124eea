"""The table from engine errors to status, and what a client makes of it."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from engine import errors
from rpc import failure
from rpc._generated import continuo_pb2 as pb
from rpc.status import STATUS, error_message, status_of

AT_START = {errors.ConfigError, errors.ModelFolderError}  # no caller is there to hear them


def test_every_error_that_a_caller_could_see_has_a_status():
    assert set(STATUS) == set(errors.EngineError.__subclasses__()) - AT_START


@pytest.mark.parametrize("kind", STATUS)
def test_the_client_raises_one_class_per_status(kind):
    told = error_message(kind("why"))
    raised = failure.error_of_message(told)
    assert type(raised).code is STATUS[kind] and str(raised) == "why"
    assert raised.retry_after_s == kind.retry_after_s and told.retryable == (kind.retry_after_s is not None)


def test_reasons_are_stable_names():
    reasons = {error_message(kind("")).reason for kind in STATUS}
    assert reasons == {
        "INVALID_REQUEST",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "CONFLICT",
        "CONTEXT_OVERFLOW",
        "QUEUE_FULL",
        "DRAINING",
        "ATTACHMENT_TAKEN",
        "TURN_CANCELLED",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "DEADLINE_EXCEEDED",
        "ENGINE_STOPPED",
        "DATA_DIR_ERROR",
    }


async def test_standard_tools_find_reason_and_retry_delay_in_the_status(channel, engine):
    engine.refuse = errors.QueueFull("256 turns wait already")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        request = pb.GenerateRequest(text="hi").SerializeToString()
        await channel.unary_stream("/continuo.v1.Engine/Generate")(request).read()
    status = await rpc_status.aio.from_call(_Failed(refused.value))
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info) and status.details[1].Unpack(retry)
    assert (info.reason, info.domain, retry.retry_delay.seconds) == ("QUEUE_FULL", "continuo", 1)
    assert (status.code, status.message) == (8, "256 turns wait already")


class _Failed:
    """The three questions that grpc_status asks of a call, answered from its error."""

    def __init__(self, error):
        self.error = error

    async def code(self):
        return self.error.code()

    async def details(self):
        return self.error.details()

    async def trailing_metadata(self):
        return self.error.trailing_metadata()


def test_an_error_that_is_no_engine_error_tells_nothing_of_itself(caplog):
    code, message, _ = status_of(ValueError("the text of a conversation"))
    assert code is grpc.StatusCode.INTERNAL and "conversation" not in message
    assert "the text of a conversation" in caplog.text


def test_a_status_of_a_newer_server_is_still_a_continuo_error():
    raised = failure.error_of_message(pb.Error(code=99, reason="NEW", message="news"))
    assert type(raised) is failure.ContinuoError and raised.reason == "NEW"
