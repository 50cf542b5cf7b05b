"""Values that describe a request body: its format, its limits and its parsed contents.

They cross a process boundary: large bodies are parsed in another process (`rednet.service.parsing.worker`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rednet.service.types import Upload

PIXEL_RANGE_FACTOR = 4.0  # normalised pixels may exceed the largest value that a photo can have by this factor


@dataclass(frozen=True, slots=True)
class BodyFormat:
    """How to parse a body. Strings and None only, as it is sent as JSON.

    Attributes:
        protocol: "v1": an image, a form or JSON, depending on `content_type`; "v2": an infer request; "embeddings": a
            request in OpenAI's format.
        content_type: the `Content-Type` header.
        header_length: the `Inference-Header-Content-Length` header, for "v2" only.
    """

    protocol: Literal["v1", "v2", "embeddings"]
    content_type: str = ""
    header_length: str | None = None


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on the contents of a body. Numbers only, as it is sent as JSON.

    Attributes:
        max_images: in one body.
        side: of normalised pixels [3, side, side].
        max_abs_pixel: largest absolute value of normalised pixels.
    """

    max_images: int
    side: int
    max_abs_pixel: float

    @classmethod
    def of(cls, max_images: int, preprocess: Mapping[str, Any]) -> "BodyLimits":
        """Derive the limits from a network's preprocessing, in the format of `/v1/model`."""
        extremes = [
            max(mean / std, (1 - mean) / std) for mean, std in zip(preprocess["mean"], preprocess["std"], strict=True)
        ]
        return cls(max_images, preprocess["crop"], PIXEL_RANGE_FACTOR * max(extremes))


@dataclass(frozen=True, slots=True)
class InferOptions:
    """The options of an infer request. JSON values only, as it is sent as JSON.

    Attributes:
        id: of the request, echoed in the response; None: the request has no id.
        outputs: names of the requested output tensors, and whether each is sent as binary data. If it is empty, all
            outputs of the model are requested.
        classes: number of classes to return as text, for the outputs that request classification.
        binary: whether outputs are sent as binary data if none is named.
    """

    id: str | None
    outputs: Mapping[str, bool]
    classes: Mapping[str, int] = field(default_factory=dict)
    binary: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """The options of an embeddings request. JSON values only, as it is sent as JSON.

    Attributes:
        model: the name of the requested model.
        as_base64: whether vectors are requested as base64 rather than as lists of numbers.
        dimensions: the requested length of the vectors; None: the model's.
    """

    model: str
    as_base64: bool
    dimensions: int | None


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """The contents of a body.

    Attributes:
        images: at least one, in order. A memoryview may refer to a part of the body.
        infer: the options of an infer request; None for other requests.
        embeddings: the options of an embeddings request; None for other requests.
        ignored: names of the form parts that are not images.
    """

    images: Sequence[Upload]
    infer: InferOptions | None = None
    embeddings: EmbeddingOptions | None = None
    ignored: Sequence[str] = field(default_factory=list)
