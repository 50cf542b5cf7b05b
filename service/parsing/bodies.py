"""A request body as plain data: what its headers say about it, what it may hold, and what was found in it.

These values cross a process boundary: a large body is parsed in another process (`rednet.service.parsing.worker`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rednet.service.types import Upload

OVERSHOOT = 4.0  # how far pixels that a caller normalised may go beyond the largest that a photo can have


@dataclass(frozen=True, slots=True)
class BodyFormat:
    """How a body is to be read. Strings and None only: it travels as JSON.

    Attributes:
        protocol: "v1": an image, a form or JSON, by `content_type`; "v2": an infer request.
        content_type: the header of that name.
        header_length: the header `Inference-Header-Content-Length`; only "v2" looks at it.
    """

    protocol: Literal["v1", "v2"]
    content_type: str = ""
    header_length: str | None = None


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What a body may hold. Numbers only: it travels as JSON.

    Attributes:
        max_images: in one body.
        side: of normalised pixels [3, side, side].
        max_abs_pixel: their largest absolute value.
    """

    max_images: int
    side: int
    max_abs_pixel: float

    @classmethod
    def of(cls, max_images: int, preprocess: Mapping[str, Any]) -> "BodyLimits":
        """The limits for a network with this preprocessing, given as `/v1/model` shows it."""
        extremes = [
            max(mean / std, (1 - mean) / std) for mean, std in zip(preprocess["mean"], preprocess["std"], strict=True)
        ]
        return cls(max_images, preprocess["crop"], OVERSHOOT * max(extremes))


@dataclass(frozen=True, slots=True)
class InferOptions:
    """What an infer request asks for, beside its images. JSON values only: it travels as JSON.

    Attributes:
        id: the caller's, to be echoed; None: the request has none.
        outputs: the tensors to answer with, and whether as binary data.
        classes: for which of them to answer with the highest values as text instead, and how many.
    """

    id: str | None
    outputs: Mapping[str, bool]
    classes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """What a body holds.

    Attributes:
        images: at least one, in order. A memoryview may show a part of the body.
        infer: what else it asks for; None where it is not an infer request.
        ignored: the names of those parts of a form that are not images.
    """

    images: Sequence[Upload]
    infer: InferOptions | None = None
    ignored: Sequence[str] = field(default_factory=list)
