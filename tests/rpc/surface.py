"""Everything that clients of continuo.v1 rely on, a line each: the snapshot in v1_surface.txt only grows.

python -m tests.rpc.surface     adds what is new in continuo.proto to the snapshot
"""

from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from rpc._generated import continuo_pb2 as pb

SNAPSHOT = Path(__file__).with_name("v1_surface.txt")
TYPES = {
    getattr(FieldDescriptor, name): name.removeprefix("TYPE_").lower()
    for name in dir(FieldDescriptor)
    if name.startswith("TYPE_")
}


def surface() -> list[str]:
    """What continuo.proto defines now, in the order of the file."""
    return [*_services(), *_messages(), *_enums()]


def _services() -> Iterator[str]:
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            takes = "stream " * method.client_streaming + method.input_type.full_name
            gives = "stream " * method.server_streaming + method.output_type.full_name
            yield f"rpc {service.full_name}/{method.name}({takes}) returns ({gives})"


def _messages() -> Iterator[str]:
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        yield f"message {message.full_name}"
        for field in message.fields:
            yield f"field {message.full_name}.{field.name} = {field.number} {_kind(field, message)}"


def _kind(field: FieldDescriptor, message: Descriptor) -> str:
    named = field.message_type or field.enum_type
    kind = named.full_name if named else TYPES[field.type]
    oneof = field.containing_oneof
    if oneof is None:
        return f"repeated {kind}" if field.is_repeated else kind
    is_optional = oneof.name == f"_{field.name}"
    return f"optional {kind}" if is_optional else f"{kind} in {oneof.name}"


def _enums() -> Iterator[str]:
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        for value in enum.values:
            yield f"enum {enum.full_name}.{value.name} = {value.number}"


if __name__ == "__main__":
    known = SNAPSHOT.read_text().splitlines() if SNAPSHOT.exists() else []
    new = [line for line in surface() if line not in known]
    SNAPSHOT.write_text("\n".join([*known, *new]) + "\n")
    print(f"{len(new)} lines added to {SNAPSHOT}")
