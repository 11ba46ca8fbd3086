"""Coupling transforms for any mask and any univariate map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Size, Tensor

from pyro_flows.core.checks import boolean_mask, choice
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.dense import MLP
from pyro_flows.univariate.base import Affine, Univariate

__all__ = ["Coupling", "coupling_mask"]

_ROWS = 2048  # rows of a batch at a time without gradients

Mask = str | Tensor | Sequence[bool]


def coupling_mask(event_shape: Size, mask: Mask) -> Tensor:
    """The dimensions that a coupling keeps, boolean, of shape ``event_shape``.

    ``"half"`` keeps the first half, ``"alternating"`` every other dimension from the second on, ``"random"`` a random
    half; a single dimension is moved.

    Example:
        >>> pf.transforms.coupling.coupling_mask(torch.Size([4]), "alternating").tolist()
        [False, True, False, True]
    """
    size = event_shape.numel()
    if isinstance(mask, str):
        if mask == "half":
            kept = torch.arange(size) < size // 2
        elif mask == "alternating":
            kept = torch.arange(size) % 2 == 1
        else:
            choice("", "mask", mask, ("half", "alternating", "random"), "boolean")
            kept = torch.randperm(size) < size // 2
        return kept.reshape(event_shape)
    return boolean_mask("", event_shape, mask)


class Coupling(FlowTransform):
    r"""Moves some dimensions by univariate maps whose parameters depend on the others.

    :math:`y_k = x_k` for the kept dimensions, :math:`y_m = u(x_m; p(x_k, c))` for the moved ones, with a triangular
    Jacobian, :math:`\log|\det| = \sum_m \log u'` and the inverse :math:`x_m = u^{-1}(y_m; p(y_k, c))`.  Each direction
    costs one pass of a dense network.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        univariate: the family of scalar maps; ``Affine()`` for RealNVP, ``Shift()`` for NICE.
        mask: the dimensions to keep: ``"half"``, ``"alternating"``, ``"random"`` (drawn once, saved in the
            ``state_dict``) or boolean, of shape ``event_shape``.
        flip: whether to move the dimensions in ``mask`` and keep the rest.
        periodic: boolean, shape ``event_shape``, true for angles; by default all if the univariate is periodic, else
            none.  The conditioner sees angles by cosine and sine.
        save_mask: whether the ``state_dict`` has the mask; by default if it was drawn here.
        context_dim: size of the context, 0 for none.
        hidden_dims, residual, activation: options of the conditioner, an :class:`~pyro_flows.nets.MLP`.

    Raises:
        ValueError: for a mask of another shape or, with several dimensions, one that keeps all or none; if a periodic
            univariate would move anything but angles, or another one an angle.

    Example:
        >>> layer = pf.Coupling(4, pf.Spline(bound=4.0), mask="half")
        >>> x = torch.randn(5, 4)
        >>> torch.equal(layer(x)[:, :2], x[:, :2])  # the kept half
        True

    References:
        Density estimation using Real NVP (Dinh et al., 2016), arXiv:1605.08803.
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), arXiv:1410.8516.
    """

    order: Tensor  # kept dimensions first
    undo: Tensor
    angle: Tensor | None
    angular: Tensor | None  # places of angles among the kept dimensions

    def __init__(
        self,
        event_shape: int | Iterable[int],
        univariate: Univariate | None = None,
        *,
        mask: Mask = "alternating",
        flip: bool = False,
        periodic: Tensor | Sequence[bool] | None = None,
        save_mask: bool | None = None,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        residual: bool = False,
        activation: Activation = "silu",
    ) -> None:
        super().__init__(event_shape, context_dim)
        self.univariate = Affine() if univariate is None else univariate
        kept = coupling_mask(self.event_shape, mask).flatten()
        if flip and kept.numel() > 1:
            kept = ~kept
        self.num_kept = int(kept.sum())
        saved = isinstance(mask, str) and mask == "random" if save_mask is None else save_mask
        self.register_buffer("order", torch.argsort(~kept, stable=True), persistent=saved)
        self.register_buffer("undo", torch.argsort(self.order), persistent=False)
        self._find_start()
        angles = self._angles(periodic, kept)
        self.net = MLP(
            self.num_kept + angles,
            kept.numel() - self.num_kept,
            num_params=self.univariate.num_params,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            residual=residual,
            activation=activation,
        )

    def _angles(self, periodic: Tensor | Sequence[bool] | None, kept: Tensor) -> int:
        """Registers the angles; returns how many are kept."""
        if periodic is None:
            angle = torch.full(self.event_shape, self.univariate.periodic)
        else:
            angle = torch.as_tensor(periodic).bool().to(kept.device)
        if angle.shape != self.event_shape:
            raise ValueError(
                f"Coupling: expected periodic to have shape {tuple(self.event_shape)}, got {tuple(angle.shape)}"
            )
        moved = angle.flatten()[~kept]
        if (moved != self.univariate.periodic).any():
            what = ("angles", "others") if self.univariate.periodic else ("no angles", "angles")
            raise ValueError(
                f"Coupling: {self.univariate} moves {what[0]}, but the mask leaves it {what[1]} to move; keep these, "
                "and move them in a coupling of their own"
            )
        places = torch.nonzero(angle.flatten()[kept]).flatten()
        self.register_buffer("angle", angle if angle.any() else None, persistent=False)
        self.register_buffer("angular", places if len(places) else None, persistent=False)
        return len(places)

    @property
    def periodic(self) -> Tensor | None:
        """Boolean, shape ``event_shape``, true for angles; ``None`` without angles."""
        return self.angle

    @property
    def mask(self) -> Tensor:
        """Boolean, shape ``event_shape``; true where a dimension is kept."""
        return (torch.argsort(self.order) < self.num_kept).reshape(self.event_shape)

    def _find_start(self) -> None:
        """Finds masks that keep every other dimension or one end, where slices are cheaper than gathers."""
        size, kept = self.order.numel(), self.order[: self.num_kept].tolist()
        self._start = next((k for k in (0, 1) if size % 2 == 0 and kept == list(range(k, size, 2))), None)
        halves = list(range(self.num_kept)), list(range(size - self.num_kept, size))
        self._half = halves.index(kept) if kept in halves else None

    def _features(self, kept: Tensor) -> Tensor:
        """The network's input: angles by cosine and sine."""
        if self.angular is None:
            return kept
        angles = kept.index_select(-1, self.angular)
        return torch.cat((kept.index_copy(-1, self.angular, angles.cos()), angles.sin()), -1)

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        dims = len(self.event_shape)
        batch = value.shape[: value.dim() - dims]
        flat = value if len(batch) == dims == 1 else value.reshape(batch.numel(), self.order.numel())
        if len(flat) > 2 * _ROWS and context is None and not torch.is_grad_enabled() and value.device.type == "cpu":
            # These pieces fit in the processor's cache.
            pieces = [self._rows(rows, batch, None, inverse) for rows in flat.split(_ROWS)]
            moved, ladj = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        else:
            moved, ladj = self._rows(flat, batch, context, inverse)
        return (moved, ladj) if flat is value else (moved.view(value.shape), ladj.view(batch))

    def _rows(self, flat: Tensor, batch: Size, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """Moves rows flattened from ``batch``; the univariate sees samples as columns."""
        if self._start is not None:
            kept, moved = flat[:, self._start :: 2], flat[:, 1 - self._start :: 2]
        elif self._half is not None:
            cut = len(self.order) - self.num_kept if self._half else self.num_kept
            kept, moved = flat.tensor_split((cut,), -1)[:: -1 if self._half else 1]
        else:
            kept, moved = (flat.index_select(-1, places) for places in self.order.tensor_split((self.num_kept,)))
        features = self._features(kept)
        if context is not None and len(batch) != 1:
            features = features.view(*batch, features.shape[-1])
        params = self.net(features, context)
        if context is not None and len(batch) != 1:
            params = params.reshape(batch.numel(), *params.shape[-2:])
        move = self.univariate.inverse if inverse else self.univariate.forward
        moved, slope = move(moved.t(), params.transpose(0, 1))
        pair = kept, moved.t()
        if self._start is not None:
            return torch.stack(pair[::-1] if self._start else pair, -1).flatten(1), slope.sum(0)
        joined = torch.cat(pair[::-1] if self._half else pair, -1)
        return joined if self._half is not None else joined.index_select(-1, self.undo), slope.sum(0)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(x, context, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(y, context, inverse=True)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        with torch.no_grad():
            self.undo.copy_(torch.argsort(self.order))
        self._find_start()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.univariate}, keeps {self.num_kept}"
