"""Runs a model on all members of plates of which it usually sees a part."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from pyro_flows.infer.models.sites import Message, Model, latent_messages, run

__all__ = ["WholePlates", "partly_seen"]

_ACTIVE = threading.local()


class WholePlates(Messenger):
    """A handler within which these plates have all of their members, whatever subsample the model asks for.

    Pyro compares a subsample with the size that the model gives, so no ordinary handler can enlarge it.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def __enter__(self) -> Any:
        _install()
        _ACTIVE.names = [*getattr(_ACTIVE, "names", []), self.names]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.names = _ACTIVE.names[:-1]
        super().__exit__(*error)


def _install() -> None:
    """Lets plates ask once, by thread, which of them are to be whole."""
    usual = SubsampleMessenger._subsample
    if hasattr(usual, "_asks"):
        return

    @functools.wraps(usual)
    def asking(
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Tensor | None = None,
        *options: Any,
    ) -> Any:
        if size is not None and any(name in names for names in getattr(_ACTIVE, "names", [])):
            subsample_size, subsample = size, None
        return usual(name, size, subsample_size, subsample, *options)

    asking._asks = True  # type: ignore[attr-defined]
    SubsampleMessenger._subsample = staticmethod(asking)  # type: ignore[assignment, method-assign]


@torch.no_grad()
def partly_seen(model: Model, init: Any, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, int]:
    """Returns the plates with latents of which a run sees a part, with the part's size.

    Empty also for models that cannot run on all members, because they hold the data of some only.
    """
    messages: dict[str, Message]
    with torch.random.fork_rng():
        messages = latent_messages(run(InitMessenger(init)(model), args, kwargs))
        frames = {frame for message in messages.values() for frame in message["cond_indep_stack"] if frame.vectorized}
        found = {frame.name: frame.size for frame in frames if frame.full_size not in (None, frame.size)}
        if not found:
            return {}
        try:
            trace = run(WholePlates(frozenset(found))(InitMessenger(init)(model)), args, kwargs)
            trace.compute_log_prob()
        except Exception:  # models raise anything at other sizes
            return {}
    return found
