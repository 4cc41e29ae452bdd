"""Flags and numbers of a request, as JSON or as a form field sends them."""

import contextlib
import typing

from llm_service.errors import ServiceError

FLAG_WORDS = {
    "true": True,
    "1": True,
    "false": False,
    "0": False,
}


def read_flag(name: str, value: object) -> bool:
    """Return a flag; a form field sends it as a word."""
    if isinstance(value, str):
        value = FLAG_WORDS.get(value.lower())
    if not isinstance(value, bool):
        raise ServiceError("bad_field", f'"{name}" must be true or false.')
    return value


def read_number(name: str, value: typing.Any) -> float:
    """Return a number from 0; a form field sends it as a word."""
    with contextlib.suppress(ValueError, TypeError):
        number = float(value)
        if 0 <= number < float("inf") and not isinstance(value, bool):
            return number
    raise ServiceError("bad_field", f'"{name}" must be a number from 0.')
