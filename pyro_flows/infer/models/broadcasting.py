"""Explains why a model does not run for many draws at once."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import re
import sysconfig
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.models.sites import Message, Model, run, sites_of, sum_beyond

__all__ = ["explain", "warn_once"]

_OURS = tuple(map(str, (Path(torch.__file__).parent, Path(pyro.__file__).parent, Path(__file__).parents[1])))
_STANDARD = str(Path(sysconfig.get_paths()["stdlib"]))
_NAME = r"[A-Za-z_][\w.]*"
_MATMUL = re.compile(rf"({_NAME}) ?@ ?({_NAME})")
_INDEXED = re.compile(rf"({_NAME})\[({_NAME})\]")
_VINDEXED = re.compile(rf"Vindex\(({_NAME})\)\[\.\.\., ?({_NAME})\]")

# Code that counts dimensions from the left or reads all, with better code, in order of preference.
_ADVICE = (
    (r"\bfloat\(|\bint\(|\bbool\(|\.item\(|\.tolist\(|\.numpy\(", "keep values as tensors, not as Python numbers"),
    (r"^\s*(if|elif|while|assert)\b", "choose by `torch.where(condition, a, b)` in place of `if`"),
    (r"torch\.tensor\(", "build tensors by `torch.stack([a, b], -1)` in place of `torch.tensor([a, b])`"),
    (r"\.(reshape|view|flatten|ravel)\(", "reshape the last dimensions only: `a.reshape(a.shape[:-1] + (...))`"),
    (r"\beinsum\(", "begin each part of the equation with `...`, which is all dimensions on the left"),
    (r"\.(mm|mv|dot|matmul|inner|outer|ger)\(", "multiply matrices by vectors as `(x * a.unsqueeze(-2)).sum(-1)`"),
    (r"\.t\(\)", "transpose the last two dimensions only: `a.mT`"),
    (r"\bdiag\(", "make diagonal matrices by `torch.diag_embed(a)`"),
    (
        r"\.(sum|mean|prod|max|min|norm|std|var)\(\)|torch\.(sum|mean|prod|max|min|norm)\(\w+\)",
        "name the dimension, counted from the right: `a.sum(-1)` in place of `a.sum()`",
    ),
    (
        r"\b(stack|cat|concat|concatenate)\((?!.*(-\d|dim|axis))",
        "stack along a dimension counted from the right: `torch.stack([a, b], -1)`, `torch.cat([a, b], -1)`",
    ),
    (
        r"\.(expand|repeat|squeeze|unsqueeze|cumsum|softmax|permute|transpose)\(\d",
        "count dimensions from the right: `a.unsqueeze(-1)` in place of `a.unsqueeze(0)`",
    ),
    (rf"{_NAME}\[\d+[\],]", "take entries of the last dimension: `a[..., 0]` in place of `a[0]`"),
)


_WARNED: weakref.WeakSet[Model] = weakref.WeakSet()


class _Line(NamedTuple):
    """A line of the user's code, and the names in its scope."""

    file: str
    number: int
    function: str
    first: int
    names: Mapping[str, object]

    @property
    def source(self) -> str:
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        source = self.source
        shown = source if len(source) <= 120 else source[:117] + "..."
        return f"{self.file}:{self.number}, in {self.function}" + (f", `{shown}`" if shown else "")


def explain(
    model: Model,
    latents: Latents,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    rows: Tensor,
    error: Exception | None,
    discrete: Collection[str] = (),
) -> str:
    """Says which line of a model does not broadcast over draws, and how to write it.

    ``error`` is the model's error for all unconstrained rows ``(S, dim)`` at once, or ``None`` if the densities
    differed from those of single rows. With ``discrete`` latents, which are summed out, sites are not compared.
    """
    line = None if error is None else _raised_at(error)
    what = "it gives other densities for many draws at once than for one at a time"
    if error is not None:
        words = re.sub(r"\s*Trace Shapes:.*", "", str(error), flags=re.DOTALL)  # which Pyro appends
        what = f"for many draws at once it raises {type(error).__name__}: {words}"
    if line is None and not discrete:
        site, line = _first_site_that_differs(model, latents, args, kwargs, rows)
        what += "" if site is None else f"; the first site that differs is {site!r}"
    if line is None:
        return f"{what}."
    cause = _suspect(line) or line
    where = f"\n  at {line}"
    if cause.number != line.number:
        where += f",\n  and the cause may be {cause}"
    return f"{what}{where}.\n  {_advice(cause, error, latents.max_plate_nesting, bool(discrete))}"


def warn_once(model: Model, message: str, stacklevel: int) -> None:
    """Warns about a model the first time only."""
    known = getattr(model, "__func__", model)  # each lookup makes a new method object
    with contextlib.suppress(TypeError):  # no weak references: warns each time
        if known in _WARNED:
            return
        _WARNED.add(known)
    warnings.warn(message, stacklevel=stacklevel + 1)


def _is_users(file: str) -> bool:
    if file.startswith("<frozen") or file.startswith(_OURS):
        return False
    return not file.startswith(_STANDARD) or "site-packages" in file


def _line(frame: FrameType, number: int) -> _Line:
    code = frame.f_code
    return _Line(code.co_filename, number, code.co_name, code.co_firstlineno, {**frame.f_globals, **frame.f_locals})


def _raised_at(error: Exception) -> _Line | None:
    found, at = None, error.__traceback__
    while at is not None:
        if _is_users(at.tb_frame.f_code.co_filename):
            found = _line(at.tb_frame, at.tb_lineno)
        at = at.tb_next
    return found


class _Lines(Messenger):
    """Records the line that sampled each site."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, _Line] = {}

    def _pyro_sample(self, msg: Message) -> None:
        frame = inspect.currentframe()
        while frame is not None and not _is_users(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            self.lines[msg["name"]] = _line(frame, frame.f_lineno)


@torch.no_grad()
def _first_site_that_differs(
    model: Model, latents: Latents, args: tuple[object, ...], kwargs: Mapping[str, object], rows: Tensor
) -> tuple[str | None, _Line | None]:
    """Finds the first site whose log-densities for all rows at once differ, and its line."""
    nesting = latents.max_plate_nesting

    def scores(z: Tensor, keep: int, seen: Messenger) -> Iterator[tuple[str, Tensor | None]]:
        values, _ = latents.unpack(z, nesting if keep else 0)
        with torch.random.fork_rng(devices=[z.device] if z.is_cuda else []):
            torch.manual_seed(0)
            trace = run(seen(model), args, kwargs, values)
        for name, site in sites_of(trace, frozenset()).items():
            try:
                each = site.log_prob()
            except Exception:  # distributions raise anything at wrong shapes
                yield name, None
                continue
            if keep and each.dim() > nesting:
                yield name, sum_beyond(each, 1) if each.dim() == nesting + 1 else None
            else:
                yield name, each.sum()

    seen = _Lines()
    with contextlib.suppress(Exception):
        alone = [dict(scores(row, 0, seen)) for row in rows]
        with pyro.validation_enabled(False):
            together = dict(scores(rows, 1, seen))
        for name, found in together.items():
            wanted = torch.stack([each for each in (one[name] for one in alone) if each is not None])
            if found is None or found.dim() > 1 or (found.dim() and found.shape[0] not in (1, len(rows))):
                return name, seen.lines.get(name)
            if not ((found - wanted).abs() <= 1e-3 + 1e-4 * wanted.abs()).all():
                return name, seen.lines.get(name)
    return None, None


def _suspect(line: _Line) -> _Line | None:
    known = [_MATMUL, _INDEXED, _VINDEXED, *(re.compile(pattern) for pattern, _ in _ADVICE)]
    for number in range(line.number, line.first, -1):
        candidate = line._replace(number=number)
        if any(pattern.search(candidate.source) for pattern in known):
            return candidate
    return None


def _advice(line: _Line, error: Exception | None, nesting: int, enumerates: bool) -> str:
    source = line.source
    product, indexed = _MATMUL.search(source), _VINDEXED.search(source) or _INDEXED.search(source)
    if product:
        return _about_product(product[1], product[2], line, nesting)
    if _in_linear(error):
        kept = ("", "") if nesting else (".unsqueeze(-3)", ".unsqueeze(-2)")
        return (
            f"Apply weights of a linear layer as `(weight{kept[0]} @ x.unsqueeze(-1)).squeeze(-1) + bias{kept[1]}` "
            "to broadcast over draws of them."
        )
    if indexed:
        values, index = indexed.groups()
        if enumerates or "Vindex" in source:
            return (
                f"Write `pyro.ops.indexing.Vindex({values}.unsqueeze(-2))[..., {index}]`, which takes an entry of the "
                "last dimension for each value of a discrete latent and each draw."
            )
        known = _value(line, values)
        if known is None or (known.dim() > 1 and known.shape[-2] == 1):
            return f"Write `pyro.ops.indexing.Vindex({values})[..., {index}]`, which indexes the last dimension."
        if known.dim():
            return f"Write `{values}[..., {index}]`, which indexes the last dimension."
    for pattern, words in _ADVICE:
        if re.search(pattern, source):
            return words[0].upper() + words[1:] + "."
    names = dict.fromkeys(re.findall(_NAME, source))
    values = {name: value for name in names if (value := _value(line, name)) is not None and value.shape[:1] == (2,)}
    if not values:
        return "Values of the latents have one more dimension there, left of all others."
    first = next(iter(values))
    return (
        f"For two draws {_shapes(values)}: append dimensions where that meets vectors or matrices, "
        f"`{first}[..., None]` or `{first}[..., None, None]`."
    )


def _shapes(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"`{name}` has shape {tuple(value.shape)}" for name, value in values.items())


def _about_product(left: str, right: str, line: _Line, nesting: int) -> str:
    names = [name.removesuffix(".T") for name in (left, right)]
    first, second = (_value(line, name) for name in names)
    known = {name: value for name, value in zip(names, (first, second), strict=True) if value is not None}
    said = f"in place of `{left} @ {right}`" + (f" ({_shapes(known)} for two draws)" if known else "")
    turned = first is not None and first.shape[:1] == (2,) and (second is None or second.shape[:1] != (2,))
    latent, name, data = (first, left, right) if turned else (second, right, left)
    if latent is None:
        return f"Write `({left} * {right}.unsqueeze(-2)).sum(-1)` {said}."
    if turned:
        data = data.removesuffix(".T") if data.endswith(".T") else f"{data}.mT"
    event = latent.dim() - 1 - nesting
    if event >= 2:
        rows = f"{data}.unsqueeze(-2)"
        return f"Write `({rows} @ {name}).squeeze(-2)` {said}."
    spread = name if event == 1 and nesting else f"{name}.unsqueeze(-2)"
    return f"Write `({data} * {spread}).sum(-1)` {said}."


def _value(line: _Line, name: str) -> Tensor | None:
    first, *rest = name.split(".")
    found: Any = line.names.get(first)
    for part in rest:
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, Tensor) else None


def _in_linear(error: Exception | None) -> bool:
    at = None if error is None else error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename.endswith(str(Path("nn", "modules", "linear.py"))):
            return True
        at = at.tb_next
    return False
