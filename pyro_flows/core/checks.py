"""Checks of arguments, each worded once."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor, nn

from pyro_flows.core.modes import autocasting, plain_eager

__all__ = [
    "WHOLE_BOUND",
    "admit",
    "boolean_mask",
    "check_context",
    "check_tensor",
    "choice",
    "event_size",
    "first_few",
    "first_floating",
    "integer",
    "joint_shape",
    "layer_widths",
    "like_given",
    "permutation_of",
    "positive_integers",
    "positive_seconds",
    "refuse_as_site",
    "refuse_other_kind",
    "sample_size",
    "without_leading_ones",
    "wrong_event",
]


WHOLE_BOUND = 2**52  # integer flows map the whole numbers from its negative up to it, and not it


def first_few(words: Iterable[object], most: int) -> str:
    """Lists words for a message, at most so many, with an ellipsis for the rest."""
    known = [str(word) for word in islice(words, most + 1)]
    return ", ".join(known[:most] + ["…"] * (len(known) > most))


def event_size(event_shape: int | Iterable[int]) -> Size:
    """The shape of one event, from an ``input_dim`` or a shape of positive integers."""
    shape = positive_integers("", "input_dim or event_shape", event_shape)
    if len(shape) > 8:
        raise ValueError(f"expected an event of at most 8 dimensions, got shape {shape}")
    return Size(shape)


def sample_size(sample_shape: int | Iterable[int]) -> Size:
    """A sample shape, also from a number of draws.

    Raises:
        TypeError, ValueError: for anything but integers, and negative ones.
    """
    if isinstance(sample_shape, Size):
        return sample_shape
    try:
        given: Any = (int(sample_shape),) if isinstance(sample_shape, Integral) else sample_shape
        shape = Size(given)
    except TypeError:
        raise TypeError(
            f"expected sample_shape to be a shape, such as (10,) or (), or a number of draws, got {sample_shape!r}"
        ) from None
    if any(n < 0 for n in shape):
        raise ValueError(f"expected sample_shape to have no negative numbers, got {sample_shape!r}")
    return shape


def refuse_as_site(module: nn.Module) -> None:
    """Refuses ``pyro.sample(name, module)`` from a module's ``forward``: a call returns the distribution, no draw.

    Raises:
        TypeError: if Pyro makes the call.
    """
    if not plain_eager():
        return
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == nn.Module.__module__:
        frame = frame.f_back
    if frame is not None and frame.f_globals.get("__name__") in ("pyro.primitives", "pyro.poutine.runtime"):
        name = type(module).__name__
        raise TypeError(
            f"pyro.sample: expected a distribution, got a {name}, which is a module that makes one; call it: "
            'pyro.sample("x", flow()), or flow(context)'
        )


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def integer(name: str, what: str, value: int, least: int = 1, *, odd: bool = False) -> int:
    """Returns an integer of at least ``least``, odd on request.

    Raises:
        ValueError: for anything else, Booleans included, with the caller ``name`` and the parameter ``what``.
    """
    if _is_integer(value, least) and (not odd or value % 2):
        return value
    kind = "an odd integer" if odd else "an integer"
    raise ValueError(f"{name}{': ' if name else ''}expected {what} to be {kind} >= {least}, got {value!r}")


def positive_integers(name: str, what: str, given: int | Iterable[int]) -> tuple[int, ...]:
    """Returns one positive integer or several as a tuple, or raises ValueError."""
    found = (given,) if isinstance(given, int) else tuple(given) if isinstance(given, Iterable) else ()
    if not found or not all(_is_integer(n, 1) for n in found):
        raise ValueError(f"{name}{': ' if name else ''}expected {what} to be positive integers, got {given!r}")
    return found


def positive_seconds(name: str, what: str, value: float | None) -> None:
    """Refuses seconds that are neither ``None``, for no limit, nor a positive number."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}: expected {what} to be a positive number, got {value!r}")


def layer_widths(name: str, what: str, sizes: object) -> tuple[int, ...]:
    """Returns the sizes of hidden layers, any number of them, as a tuple."""
    if not isinstance(sizes, Iterable) or isinstance(sizes, str):
        raise TypeError(
            f"{name}{': ' if name else ''}expected {what} to be positive integers in a tuple, which may be empty, got "
            f"{sizes!r}; two layers of 64 units are (64, 64)"
        )
    found = tuple(sizes)
    return positive_integers(name, what, found) if found else ()


def choice(name: str, what: str, value: str, options: Iterable[str], otherwise: str = "") -> str:
    """Returns one of the options.

    Raises:
        ValueError: for another value; ``otherwise`` names further ones that are allowed.
    """
    known = list(options)
    if isinstance(value, str) and value in known:
        return value
    words = [*map(repr, known), *([otherwise] if otherwise else [])]
    told = ", ".join(words[:-1]) + f" or {words[-1]}" if len(words) > 1 else words[0]
    raise ValueError(f"{name}{': ' if name else ''}expected {what} to be {told}, got {value!r}")


def boolean_mask(name: str, event_shape: Size, mask: object) -> Tensor:
    """Returns a copy of a mask that keeps some dimensions of an event and moves others; it may move a single one."""
    given = torch.as_tensor(mask).to(torch.get_default_device())
    prefix = f"{name}: " if name else ""
    if given.dtype != torch.bool or given.shape != event_shape:
        raise ValueError(
            f"{prefix}expected a boolean mask of shape {tuple(event_shape)}, got {given.dtype} of shape "
            f"{tuple(given.shape)}"
        )
    if given.all() or (given.numel() > 1 and not given.any()):
        raise ValueError(
            f"{prefix}expected mask to keep some dimensions and move others, got one that keeps {int(given.sum())} of "
            f"{given.numel()}"
        )
    return given.clone()


def permutation_of(name: str, size: int, permutation: object, known: Iterable[str]) -> Tensor:
    """The indices of a permutation, given or by one of the ``known`` names."""
    if isinstance(permutation, str):
        choice(name, "permutation", permutation, known, "indices")
        if permutation == "random":
            return torch.randperm(size)
        return torch.arange(size).flip(0) if permutation == "reverse" else torch.arange(size)
    natural = torch.arange(size)
    indices = torch.as_tensor(permutation).to(natural.device).flatten()
    if indices.is_floating_point() or not torch.equal(indices.sort().values, natural):
        raise ValueError(f"{name}: expected a permutation of 0..{size - 1}, got {indices.tolist()}")
    return indices.long().clone()


def wrong_event(transform: object, shape: Size, event: Size) -> str:
    """The message for a value without the expected event shape."""
    want = f"last dimension {event[0]} (input_dim)" if len(event) == 1 else f"trailing shape {tuple(event)}"
    return f"{type(transform).__name__}: expected a value with {want}, got shape {tuple(shape)}"


def admit(transform: Any, value: Tensor, context: Tensor | None, data_side: bool) -> Tensor:
    """Checks a flow's value and its context, and expands the value to the whole batch shape."""
    event = transform.data_shape if data_side else transform.event_shape
    name = type(transform).__name__
    check_tensor(name, "a tensor", value)
    shape = value.shape
    cut = len(shape) - len(event)
    if cut < 0 or shape[cut:] != event:
        raise ValueError(wrong_event(transform, shape, event))
    kin = first_floating(transform)
    if transform.discrete:
        if kin is not None:
            _same_device(name, "value", value, kin)
        value = _whole(name, value)
    elif not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point value, got {value.dtype}; use value.float()")
    elif kin is not None:
        if kin.dtype.itemsize < 4:
            _refuse_half(name, transform, kin.dtype)
        _same_kind(name, "value", value, kin)
    check_context(transform, context)
    if context is None:
        return value
    batch = shape[:cut]
    try:
        whole = joint_shape(batch, context.shape[:-1])
    except ValueError:
        raise ValueError(
            f"{name}: batch shape {tuple(batch)} of the value and {tuple(context.shape[:-1])} of the context do not "
            "broadcast"
        ) from None
    return value if whole == batch else value.expand(whole + event)


def _whole(name: str, value: Tensor) -> Tensor:
    """Whole numbers of any dtype, in float64; refuses others."""
    if value.is_complex():
        raise TypeError(f"{name}: expected whole numbers, got {value.dtype}")
    made = value.double()
    if not value.numel() or value.is_meta or not plain_eager():
        return made
    found = made.detach()
    wrong = (found != found.floor()) | (found < -WHOLE_BOUND) | (found >= WHOLE_BOUND)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: expected whole numbers from -2 ** 52 to 2 ** 52 - 1, got {found[where].item():.17g} at {where} "
            f"({int(wrong.sum())} such in {wrong.numel()}); round fractions, leave out rows with NaN, and subtract a "
            "constant from numbers that are too large"
        )
    return made


def like_given(name: str, given: Tensor, made: Tensor) -> Tensor:
    """Returns whole numbers in the floating dtype of the given ones.

    Raises:
        ValueError: if that dtype cannot hold one of them.
    """
    cast = made.to(given.dtype)
    if cast is made or not made.numel() or made.is_meta or not plain_eager():
        return cast
    if ((cast != made) & made.isfinite()).any():
        largest = made.detach().abs().max().item()
        raise ValueError(
            f"{name}: the result has whole numbers up to {largest:.17g}, which {given.dtype} cannot hold exactly; give "
            "values as integers or in float64"
        )
    return cast


def joint_shape(*shapes: Iterable[int]) -> Size:
    """Returns the shape to which these broadcast; raises ``ValueError`` if they do not.

    ``torch.broadcast_shapes`` takes ten times as long, and imports sympy.
    """
    return Size(broadcast_shape(*shapes))


def check_context(transform: Any, context: Tensor | None) -> None:
    """Checks the presence, size, dtype and device of a context for a module with a ``context_dim``."""
    if context is None and transform.context_dim == 0:
        return
    name = type(transform).__name__
    if context is None:
        raise ValueError(
            f"{name} was built with context_dim={transform.context_dim}: call it with a context, give context=, or "
            "call .condition(context) first"
        )
    if transform.context_dim == 0:
        raise ValueError(f"{name} was built with context_dim=0, but a context was given: leave it out")
    check_tensor(name, "a tensor as context", context)
    if context.dim() == 0 or context.shape[-1] != transform.context_dim:
        raise ValueError(
            f"{name}: expected a context with last dimension {transform.context_dim} (context_dim), "
            f"got shape {tuple(context.shape)}"
        )
    kin = first_floating(transform)
    if kin is not None:
        _same_kind(name, "context", context, kin)


def without_leading_ones(context: Tensor) -> Tensor:
    """A context without leading batch dimensions of size 1."""
    while context.dim() > 1 and context.shape[0] == 1:
        context = context.squeeze(0)
    return context


def check_tensor(name: str, what: str, value: object) -> None:
    """Refuses any value but a tensor."""
    if not isinstance(value, Tensor):
        hint = "e.g. torch.as_tensor(x, dtype=torch.float32)"
        if hasattr(value, "filled"):
            hint = "fill in what is masked, then torch.tensor(array.filled())"
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}; convert it, {hint}")


def refuse_other_kind(name: str, what: str, value: Tensor, module: nn.Module) -> Tensor:
    """Refuses a value that is no tensor of the module's device and dtype.

    Autocast allows another dtype, which is converted.
    """
    check_tensor(name, f"a tensor as {what}", value)
    kin = first_floating(module)
    if kin is None:
        return value
    _same_kind(name, what, value, kin)
    return value.to(kin.dtype)


def _refuse_half(name: str, transform: nn.Module, dtype: torch.dtype) -> None:
    """Refuses half-precision parameters where a part or its univariate map needs more."""
    for module in transform.modules():
        for part in (module, getattr(module, "univariate", None)):
            if not getattr(part, "half_precision", True):
                raise TypeError(
                    f"{name}: {type(part).__name__} needs float32 or float64, but the parameters are {dtype}; call "
                    "flow.float(), and to have the networks compute in half precision, score and sample under "
                    "torch.autocast"
                )


def _same_kind(name: str, what: str, value: Tensor, kin: Tensor) -> None:
    if value.dtype != kin.dtype and not autocasting(value.device):
        raise TypeError(
            f"{name}: the {what} is {value.dtype} but the parameters are {kin.dtype}; "
            f"convert one of them, e.g. {what}.to({kin.dtype})"
        )
    _same_device(name, what, value, kin)


def _same_device(name: str, what: str, value: Tensor, kin: Tensor) -> None:
    if value.device != kin.device:
        raise ValueError(
            f"{name}: the {what} is on {value.device} but the parameters are on {kin.device}; "
            f"move one of them, e.g. flow.to({str(value.device)!r})"
        )


def first_floating(module: nn.Module) -> Tensor | None:
    """A floating-point parameter or buffer, for its dtype and device."""
    # Asked at each call, so without the slower module.parameters().
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None and tensor.is_floating_point():
                return tensor
    for child in module._modules.values():
        found = None if child is None else first_floating(child)
        if found is not None:
            return found
    return None
