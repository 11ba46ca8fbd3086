"""Records of results in files: checked values of annotated types, and the device to read to."""

from __future__ import annotations

import typing
from dataclasses import is_dataclass
from typing import Any

import torch

__all__ = ["device_of", "read"]


def read(kind: Any, value: Any, name: str = "it") -> Any:
    """Makes a value of an annotated type from plain data, and dataclasses from their entries.

    Raises:
        ValueError: if entries are missing, unknown or of another type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in parts:
        return None if value is None else read(parts[0], value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        kinds = typing.get_type_hints(kind)
        if kinds.keys() != value.keys():
            raise ValueError(f"{name!r} has {sorted(value)}, expected {sorted(kinds)}")
        made: Any = kind
        return made(**{part: read(kinds[part], each, part) for part, each in value.items()})
    if kind is not Any and not isinstance(value, (int, float) if kind is float else origin or kind):
        raise ValueError(f"{name!r} is a {type(value).__name__}")
    if origin is list:
        return [read(parts[0], each, name) for each in value]
    return {key: read(parts[1], each, name) for key, each in value.items()} if origin is dict else value


def device_of(map_location: Any, saved: str, who: str) -> torch.device:
    """Returns the device for a ``map_location`` of ``torch.load``.

    Raises:
        ValueError: for an unavailable device.
    """
    place = map_location.get(saved, saved) if isinstance(map_location, dict) else map_location
    try:
        if isinstance(place, str | int | torch.device):
            return torch.empty(0, device=place).device
        return torch.serialization._get_restore_location(place)(torch.empty(0).untyped_storage(), saved).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{who}: the device {str(place or saved)!r} is not there ({error}); give another one, e.g. "
            "map_location='cpu'"
        ) from error
