"""`continuo health`: asks a server whether it can serve, as a container's health check does."""

from argparse import Namespace
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tools.connection import UsageError, authorities, nobody_answers

TIMEOUT_S = 3.0


class NotServing(Exception):
    """The server cannot serve, or nobody answers."""


EXPECTED: tuple[type[Exception], ...] = (NotServing, UsageError)
USAGE: tuple[type[Exception], ...] = (UsageError,)


def run(chosen: Namespace) -> int:
    with _channel(chosen) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise NotServing(nobody_answers(error.details(), chosen.server)) from None
    status = HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != HealthCheckResponse.SERVING:
        raise NotServing(f"{chosen.server} is {status}")
    print(status)
    return 0


def _channel(chosen: Namespace) -> grpc.Channel:
    trusted = authorities(chosen)
    if isinstance(trusted, Path):
        return grpc.secure_channel(chosen.server, grpc.ssl_channel_credentials(trusted.read_bytes()))
    return grpc.insecure_channel(chosen.server)
