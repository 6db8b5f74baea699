"""What all tables of the configuration file share.

Rules of this file:

1. A table is frozen. It refuses unknown keys, infinities and NaN; `true` and `false` are no numbers.
2. A repr shows no password of a URL.
3. A rule over several keys ends in `checked`, which reports all its faults at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from device.redaction import redacted

M = TypeVar("M", bound=BaseModel)
HomePath = Annotated[Path, AfterValidator(lambda path: _expanded(path))]
"""A path that may begin with `~`."""


class Section(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, object]]:
        """The fields that a repr shows, without the password of a URL."""
        for name, value in super().__repr_args__():
            yield name, redacted(value) if isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_truth(cls, value: object, info: ValidationInfo) -> object:
        """pydantic would take true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


def checked(model: M, faults: Sequence[str]) -> M:
    """`model`. Raises a validation error if there are `faults`, each `key = value: limit; remedy`."""
    if faults:
        raise PydanticCustomError("rules", "{faults}", {"faults": list(faults)})
    return model


def _expanded(path: Path) -> Path:
    if not path.parts:
        raise ValueError("must name a file or folder")
    if "\0" in str(path):
        raise ValueError("must not hold a zero byte")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("must not start with ~: there is no such home directory") from None
