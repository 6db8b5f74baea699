"""Types of the fields of messages: bounded numbers, names, texts, images and labels.

Rules of this file:

1. Numbers are finite, and whole numbers fit 53 bits, which every JSON reader keeps exactly.
2. Every text, list and object is bounded, so that no message can be huge.
3. Input of operators is checked strictly (printable names, strict base64, canonical sample numbers). A board's own
   names (`Known`) are only bounded: it must be able to publish every name that it has learned.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from edgeear.names import MAX_NAME, is_name

MAX_WHOLE: Final = (1 << 53) - 1
MAX_IMAGE: Final = 4 << 20
"""Bytes of an image to infer, before base64."""
MAX_REQUEST_IMAGE: Final = 1 << 20
"""Bytes of an image that a board sends to be labelled, before base64."""
MAX_LABELS: Final = 10_000
MAX_DOMAINS: Final = 256
SIGNATURES: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
"""First bytes of a JPEG and of a PNG."""
ID: Final = r"^[A-Za-z0-9_.:-]{1,64}$"
"""Of a command."""
_SAMPLE_KEYS: Final[dict[str, JsonValue]] = {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,15})$"}}


def _printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("printable", "must be printable characters only")
    return text


def _image(most: int) -> Any:
    """Strict base64 of a JPEG or PNG of at most `most` bytes."""
    limit = 4 * math.ceil(most / 3)

    def check(text: str) -> str:
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except (ValueError, binascii.Error):
            data = None
        if data is None or binascii.b2a_base64(data[3 * (len(text) // 4 - 1) :], newline=False).decode() != text[-4:]:
            raise PydanticCustomError("base64", "must be base64 with padding and without line breaks")
        if len(data) > most:
            raise PydanticCustomError(
                "image", "must be at most {most} bytes, has {size}", {"most": most, "size": len(data)}
            )
        if not data.startswith(SIGNATURES):
            raise PydanticCustomError("image", "must be a JPEG or PNG file: send one of these")
        return text

    schema: dict[str, JsonValue] = {"contentEncoding": "base64", "contentMediaType": "image/jpeg"}
    return Field(min_length=4, max_length=limit, json_schema_extra=schema), AfterValidator(check)


def _labels(value: object) -> object:
    """Stops at the first wrong entry, so that ten thousand wrong ones cost no more than one."""
    if not isinstance(value, Mapping):
        return value
    if not 1 <= len(value) <= MAX_LABELS:
        facts = {"most": MAX_LABELS, "size": len(value)}
        raise PydanticCustomError("labels", "must have 1 to {most} entries, has {size}", facts)
    return {_sample(key): _class_name(key, name) for key, name in value.items()}


def _sample(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 16 and str(int(key)) == key:
        key = int(key)
    if type(key) is int and 0 <= key <= MAX_WHOLE:
        return key
    message = "key {key} must be a sample number: decimal digits, 0 to 2^53 - 1"
    raise PydanticCustomError("labels", message, {"key": shown(key)})


def _class_name(key: object, name: object) -> str:
    if isinstance(name, str) and is_name(name):
        return name
    message = "sample {key}: {name} must be a class name of 1 to 128 printable characters"
    raise PydanticCustomError("labels", message, {"key": shown(key), "name": shown(name)})


def shown(value: object) -> str:
    """`value` in at most 60 ASCII characters."""
    if isinstance(value, str):
        value = value[:60]
    elif isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    elif isinstance(value, int) and abs(value) > MAX_WHOLE:
        return "a whole number beyond 2^53"
    return ascii(value)[:60]


Count = Annotated[int, Field(ge=0, le=MAX_WHOLE)]
Whole = Annotated[int, Field(ge=-MAX_WHOLE, le=MAX_WHOLE)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Moment = Annotated[float, Field(ge=0, le=253_402_300_799, allow_inf_nan=False)]
"""Unix seconds, up to the year 9999."""
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_printable)]
"""Of a class or a domain, as an operator may give it."""
Known = Annotated[str, Field(min_length=1, max_length=255)]
"""Of a class, a domain or an encoder that the board has, possibly from the name of a folder."""
Text = Annotated[str, Field(max_length=2000)]
Session = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
CommandId = Annotated[str, Field(pattern=ID)]
Scalar = Annotated[str, Field(max_length=500)] | Whole | Number | bool | None
Data = Annotated[dict[Annotated[str, Field(min_length=1, max_length=64)], Scalar], Field(max_length=64)]
Labels = Annotated[
    dict[int, Name],
    Field(min_length=1, max_length=MAX_LABELS, json_schema_extra=_SAMPLE_KEYS),
    BeforeValidator(_labels),
]
Image = Annotated[str, *_image(MAX_IMAGE)]
RequestImage = Annotated[str, *_image(MAX_REQUEST_IMAGE)]
