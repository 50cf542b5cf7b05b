"""Takes large values out of serialized protobuf messages, and puts them in, without parsing.

An empty submessage has two bytes, and takes a hundred once it is parsed: a request of 32 MB could take 2 GB, and block
the event loop for a second. So large values are taken out as views first, and the rest must be small.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rednet.service.errors import MalformedRequest, ServiceError

MAX_REST_BYTES = 65_536
MAX_REST_FIELDS = 1_000  # reading as many takes a millisecond
VARINT, LENGTH_DELIMITED = 0, 2  # wire types
FIXED_BYTES = {1: 8, 5: 4}  # the others that are in use
MAX_VARINT_BYTES = 10


class Taken(NamedTuple):
    """A field that is taken out of a message.

    Attributes:
        max_count: how often it may occur.
        error: raised if it occurs more often.
    """

    max_count: int
    error: ServiceError


def split(message: memoryview, fields: Mapping[int, Taken]) -> tuple[bytes, Mapping[int, Sequence[memoryview]]]:
    """Take length-delimited fields out of a message.

    Args:
        message: untrusted.
        fields: to be taken out, by number.

    Returns:
        The message without the fields, and the values of each of them.

    Raises:
        MalformedRequest: the message is invalid, or the rest is too large.
    """
    values: dict[int, list[memoryview]] = {number: [] for number in fields}
    rest, rest_fields = bytearray(), 0
    position, size = 0, len(message)
    while position < size:
        start = position
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            _, end = _varint(message, position)
        elif wire_type == LENGTH_DELIMITED:
            length, position = _varint(message, position)
            end = position + length
        elif wire_type in FIXED_BYTES:
            end = position + FIXED_BYTES[wire_type]
        else:
            raise _invalid()
        if end > size:
            raise _invalid()
        if wire_type == LENGTH_DELIMITED and number in fields:
            if len(values[number]) == fields[number].max_count:
                raise fields[number].error
            values[number].append(message[position:end])
        else:
            rest += message[start:end]
            rest_fields += 1
            if len(rest) > MAX_REST_BYTES or rest_fields > MAX_REST_FIELDS:
                limits = f"{MAX_REST_FIELDS} fields and {MAX_REST_BYTES} bytes"
                raise MalformedRequest(f"the message has more than {limits} besides the values of its input")
        position = end
    return bytes(rest), values


def field(number: int, value: bytes) -> bytes:
    """A serialized length-delimited field."""
    head = bytearray()
    for part in (number << 3 | LENGTH_DELIMITED, len(value)):
        left = part
        while left >= 0x80:
            head.append(left & 0x7F | 0x80)
            left >>= 7
        head.append(left)
    return bytes(head) + value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A varint, and the position behind it."""
    value = 0
    for index, byte in enumerate(message[position : position + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise _invalid()


def _invalid() -> MalformedRequest:
    return MalformedRequest("the message is not valid protobuf")
