"""Lossless compression by entropy coding with exact conditionals."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.core.checks import WHOLE_BOUND
from pyro_flows.core.modes import on_cpu
from pyro_flows.distributions import MADE, ConvMADE, Dequantized, Flow
from pyro_flows.infer.compression.conditionals import Conditionals, NetworkConditionals
from pyro_flows.infer.compression.container import DTYPES, MOST_ROWS, Header, corrupt, pack, unpack
from pyro_flows.infer.compression.decisions import Piece, Reader, even, write
from pyro_flows.infer.compression.integers import IntegerModel, from_plain, plain
from pyro_flows.infer.compression.triangular import FlowConditionals

__all__ = ["Codec"]

_ROOM = 2**25  # numbers that a pass may hold


class Codec:
    r"""Lossless compression of rows of whole numbers by a model of them: ``decode(encode(x))`` is ``x``, bit for bit.

    A file takes about :math:`-\log_2 P(x)` bits, by arithmetic coding with the conditionals
    :math:`P(x_i \mid x_{<i}, c)` of

    - a :class:`~pyro_flows.distributions.made.MADE` or :class:`~pyro_flows.distributions.made.ConvMADE` with head
      ``"bernoulli"``, ``CategoricalHead``, ``LogisticMixtureHead``, a ``MixedHead`` of these, or another of levels 0 to
      :math:`L - 1`;
    - an integer flow, :func:`~pyro_flows.flows.idf`, of whole numbers from :math:`-2^{52}` to :math:`2^{52} - 1`, whose
      base is coded in one go for each scale: decoding takes one pass, too;
    - a flow of :class:`~pyro_flows.transforms.Mint` layers of one orientation, over independent normals, on
      :class:`~pyro_flows.transforms.pixels.LogitPixels`, or a ``Dequantized`` of one.  With earlier pixels at their
      centers, :math:`P(n_i \mid n_{<i}) = \Phi(f_i(n_i + 1)) - \Phi(f_i(n_i))`, plus the tails at the first and the
      last level.

    Encoding takes one pass.  Decoding takes one sweep, as draws do (for a ``Mint`` stack ``waves.max() + 1`` passes).
    Each number takes about :math:`\log_2 L` decisions, each with one cumulative probability.

    Three steps make the bits agree across machines: the model is copied to the CPU in double precision; cumulative
    probabilities are rounded to multiples of :math:`2^{-18}` for integer arithmetic; the file notes the rounding within
    :math:`2^{-36}` of where it changes.  So other threads, batches and releases can read a file, from a model in single
    or double precision, if its probabilities agree within :math:`2^{-36}`.  Networks with very large weights can miss
    that; check sums then refuse the file, so wrong numbers are never returned.  ``encode`` verifies that its own
    machine can read the file.  The codec ignores later changes of the model.

    Args:
        model: the model.
        number: the member that codes, of a ``MADE`` with several orders or masks.

    Attributes:
        levels: the number of levels of each dimension, shape ``(D,)``; ``None`` for all whole numbers.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for a model without levels, or a flow not of one orientation.

    Example:
        >>> pixels = torch.randint(2, (100, 8))
        >>> codec = pf.infer.Codec(pf.MADE(8))  # in practice, a fitted one
        >>> file = codec.encode(pixels)
        >>> torch.equal(codec.decode(file), pixels)
        True

    References:
        Arithmetic Coding for Data Compression (Witten, Neal & Cleary, 1987).
        The coder: Understanding Entropy Coding With Asymmetric Numeral Systems (Bamler, 2022), arXiv:2201.01741.
    """

    @on_cpu
    def __init__(self, model: nn.Module, *, number: int = 0) -> None:
        self._model = _conditionals(model, number)
        self.levels = self._model.levels
        self._size = self._model.event_shape.numel()
        self._digest = self._model.digest()

    def __repr__(self) -> str:
        levels: object = "all whole numbers"
        if self.levels is not None:
            low, high = int(self.levels.min()), int(self.levels.max())
            levels = low if low == high else f"{low} to {high}"
        return f"Codec(event_shape={tuple(self._model.event_shape)}, levels={levels})"

    @on_cpu
    @torch.no_grad()
    def bits(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r""":math:`-\log_2 P(x)`, shape ``(*batch,)``, in float64: the least size of a file.

        Args:
            x: whole numbers, shape ``(*batch, *event_shape)``.
            context: broadcasts to ``(*batch, context_dim)``, if the model takes one.

        Example:
            >>> codec = pf.infer.Codec(pf.MADE(8))
            >>> codec.bits(torch.randint(2, (100, 8))).shape
            torch.Size([100])
        """
        rows, batch, contexts = self._admit(x, context)
        pieces = self._pieces(contexts, self._rows())
        found = [-self._model.log_prob(rows[part], own) / math.log(2) for part, own in pieces]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *found]).view(batch)

    @on_cpu
    @torch.no_grad()
    def encode(self, x: Tensor, context: Tensor | None = None, *, verify: bool = True) -> bytes:
        """Writes rows as a file.

        Args:
            x: integers or booleans, shape ``(*batch, *event_shape)``.
            context: broadcasts to ``(*batch, context_dim)``, if the model takes one; not part of the file.
            verify: whether to decode each piece, at the cost of decoding; a piece that fails is written without the
                model, with a warning.

        Raises:
            TypeError: unless ``x`` is a tensor of integers or booleans.
            ValueError: for another shape, or numbers beyond the levels.
            FloatingPointError: if the model gives NaN.
            ImportError: without the package constriction.

        Example:
            >>> codec, pixels = pf.infer.Codec(pf.MADE(8)), torch.randint(2, (100, 8))
            >>> len(codec.encode(pixels)) < 100 * 8  # bytes
            True
        """
        rows, batch, contexts = self._admit(x, context)
        pieces, failed = [], 0
        for part, own in self._pieces(contexts, self._rows()):
            mine = rows[part]
            piece = self._write(mine, own)
            # Rows that surprise the model are written without it.
            width = 64.0 * self._size if self.levels is None else float(self.levels.log2().sum())
            without = 32 * len(piece.words) > len(mine) * width + 64
            if not without and verify and not self._reads(piece, mine, own):
                failed, without = failed + 1, True
            pieces.append((self._write_plain(mine) if without else piece, without))
        if failed:
            warnings.warn(
                f"Codec: {failed} of {len(pieces)} pieces could not be decoded and were written without the model: "
                "its probabilities are not reproducible to 2 ** -36, as happens with very large weights",
                RuntimeWarning,
                stacklevel=2,
            )
        header = Header(x.dtype, self._digest, _sum(rows), self._context_sum(contexts), tuple(batch), self._rows())
        return pack(header, pieces)

    @on_cpu
    @torch.no_grad()
    def decode(self, data: bytes, context: Tensor | None = None) -> Tensor:
        """Reads the rows given to :meth:`encode`, in their dtype, on the CPU, shape ``(*batch, *event_shape)``.

        Args:
            data: the result of :meth:`encode`.
            context: the context given to :meth:`encode`.

        Raises:
            TypeError: unless ``data`` are bytes.
            ValueError: for data that are corrupt, truncated, of another model or context, or cannot be decoded here.

        Example:
            >>> codec, pixels = pf.infer.Codec(pf.MADE(8)), torch.randint(2, (100, 8))
            >>> torch.equal(codec.decode(codec.encode(pixels)), pixels)
            True
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"Codec: expected the bytes of encode, got {type(data).__name__}")
        header, pieces = unpack(bytes(data))
        if header.model != self._digest:
            raise ValueError(
                "Codec: expected data that this model has encoded, got those of another; parameters, levels and order "
                "must be the same to the last digit"
            )
        if header.rows > max(1, _ROOM // self._model.numbers):
            raise corrupt("their pieces have more rows than are written at once")
        batch = torch.Size(header.batch)
        contexts = self._contexts(context, batch)
        if header.context != self._context_sum(contexts):
            raise ValueError("Codec: expected the context with which the data were encoded, got another")
        parts = zip(pieces, self._pieces(contexts, header.rows), strict=True)
        found = [self._read(*piece, part.stop - part.start, own) for piece, (part, own) in parts]
        rows = torch.cat([torch.zeros(0, self._size, dtype=torch.long), *found])
        if _sum(rows) != header.data:
            raise ValueError(
                "Codec: the file is whole, but the rows decoded are not those encoded: the model's probabilities "
                "here differ from those of the encoder by more than 2 ** -36, as happens with very large weights"
            )
        made = rows.to(header.dtype)
        if not torch.equal(made.long(), rows):
            raise corrupt(f"they say that the numbers are {header.dtype}, which cannot hold them")
        return made.view(*batch, *self._model.event_shape)

    def _reads(self, piece: Piece, rows: Tensor, context: Tensor | None) -> bool:
        try:
            return torch.equal(self._read(piece, False, len(rows), context), rows)
        except (ValueError, FloatingPointError):
            return False

    def _write(self, rows: Tensor, context: Tensor | None) -> Piece:
        if isinstance(self._model, IntegerModel):
            return self._model.write(rows, context)
        return write(rows, self._model.levels, self._model.steps, self._model.edges(rows, context))

    def _write_plain(self, rows: Tensor) -> Piece:
        if self.levels is None:
            return plain(rows)
        return write(rows, self.levels, [torch.arange(self._size)], even(self.levels))

    def _read(self, piece: Piece, without: bool, rows: int, context: Tensor | None) -> Tensor:
        if isinstance(self._model, IntegerModel):
            return from_plain(piece, rows, self._size) if without else self._model.read(piece, rows, context)
        reader = Reader(piece, self._model.levels, rows)
        if without:
            return reader.read(torch.arange(self._size), even(self._model.levels))
        return self._model.find(rows, context, reader.read)

    def _rows(self) -> int:
        return max(1, min(MOST_ROWS, _ROOM // self._model.numbers))

    def _pieces(self, contexts: Tensor, size: int) -> Iterator[tuple[slice, Tensor | None]]:
        for start in range(0, len(contexts), size):
            own = contexts[start : start + size]
            yield slice(start, start + len(own)), own if self._model.context_dim else None

    def _admit(self, x: Any, context: Tensor | None) -> tuple[Tensor, torch.Size, Tensor]:
        """64-bit rows of shape ``(rows, D)``, the batch shape, and contexts."""
        event = self._model.event_shape
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"Codec: expected a tensor of integers or booleans, got {got}; convert other whole numbers, e.g. by "
                "x.long() or x.to(torch.uint8)"
            )
        cut = x.dim() - len(event)
        if cut < 0 or x.shape[cut:] != event:
            want = ", ".join(map(str, ("*batch", *event)))
            raise ValueError(f"Codec: expected x of shape ({want}), got shape {tuple(x.shape)}")
        batch = x.shape[:cut]
        rows = x.detach().to("cpu", torch.long).reshape(batch.numel(), self._size)
        if self.levels is None:
            _refuse_large(rows)
            return rows, batch, self._contexts(context, batch)
        wrong = (rows < 0) | (rows >= self.levels)
        if bool(wrong.any()):
            row, dim = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"Codec: expected levels 0 to {int(self.levels[dim]) - 1} in dimension {dim}, got "
                f"{int(rows[row, dim])} in row {row} ({int(wrong.sum())} such in {wrong.numel()})"
            )
        return rows, batch, self._contexts(context, batch)

    def _context_sum(self, contexts: Tensor) -> int | None:
        return _sum(contexts) if self._model.context_dim else None

    def _contexts(self, context: Any, batch: torch.Size) -> Tensor:
        """Contexts of all rows, shape ``(rows, context_dim)``."""
        dim = self._model.context_dim
        if not dim and context is not None:
            raise ValueError("Codec: the model has context_dim=0, but a context was given: leave it out")
        context = context if dim else torch.zeros(0)
        if not isinstance(context, Tensor):
            raise ValueError(
                f"Codec: the model has context_dim={dim}: give a context of shape (*batch, {dim}), got "
                f"{type(context).__name__}"
            )
        try:
            made = context.detach().to("cpu", torch.float64).expand(*batch, dim)
        except RuntimeError:
            raise ValueError(
                f"Codec: expected a context that broadcasts to shape {(*batch, dim)}, got shape {tuple(context.shape)}"
            ) from None
        return made.reshape(batch.numel(), dim)


def _refuse_large(rows: Tensor) -> None:
    wrong = (rows < -WHOLE_BOUND) | (rows >= WHOLE_BOUND)
    if bool(wrong.any()):
        row, dim = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"Codec: expected whole numbers from -2 ** 52 to 2 ** 52 - 1, got {int(rows[row, dim])} in dimension {dim} "
            f"of row {row} ({int(wrong.sum())} such in {wrong.numel()})"
        )


def _conditionals(model: Any, number: int) -> Conditionals | IntegerModel:
    if isinstance(model, (MADE, ConvMADE)):
        return NetworkConditionals(model, number)
    if isinstance(model, Flow) and model.chain.discrete:
        return IntegerModel(model)
    if isinstance(model, (Flow, Dequantized)):
        return FlowConditionals(model)
    raise TypeError(
        "Codec: expected a MADE or ConvMADE, a Flow of integers (idf), or one of Mint layers of one orientation, got "
        f"{type(model).__name__}"
    )


def _sum(rows: Tensor) -> int:
    array = rows.contiguous().numpy()
    return zlib.crc32(array.astype(array.dtype.newbyteorder("<")).tobytes())
