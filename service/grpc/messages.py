"""The messages of the Open Inference Protocol, and the schemas that reflection shows.

They are in a descriptor pool of their own: in protobuf's default pool, their names would collide with those of any
other stubs of the protocol, such as tritonclient's, in the same process.
"""

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from rednet.service.errors import MalformedRequest

SERVICE = "inference.GRPCInferenceService"

POOL = DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("inference.binpb").read_bytes()).file:
    POOL.Add(_file)
for _module in (health_pb2, reflection_pb2):
    POOL.AddSerializedFile(_module.DESCRIPTOR.serialized_pb)


def message_class(name: str) -> Any:
    """The class of a message of the protocol."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


def decode(kind: Any, data: bytes) -> Any:
    """Parse a message.

    Args:
        kind: its class.
        data: untrusted, and not large: a message can take fifty times the memory of its serialized form.

    Raises:
        MalformedRequest: it is not such a message.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise MalformedRequest(f"the message is not a valid {kind.DESCRIPTOR.name}") from None
