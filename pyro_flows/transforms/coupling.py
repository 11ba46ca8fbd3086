"""Coupling transforms: NICE's additive and RealNVP's affine layers, for any mask and any univariate map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from pyro_flows.core.checks import choice
from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Activation
from pyro_flows.nets.dense import MLP
from pyro_flows.univariate.base import Affine, Univariate

__all__ = ["Coupling", "coupling_mask"]

_ROWS = 2048  # of a batch at a time, where no gradient is wanted

Mask = str | Tensor | Sequence[bool]


def coupling_mask(event_shape: Size, mask: Mask) -> Tensor:
    """The dimensions that a coupling leaves as they are, boolean, of shape ``event_shape``.

    ``"half"`` keeps the first half, ``"alternating"`` every other one beginning with the second, ``"random"`` a random
    half; a boolean mask is taken as given.  With one dimension nothing is kept: the coupling is then elementwise.
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
    given = torch.as_tensor(mask).cpu()
    if given.dtype != torch.bool or given.shape != event_shape:
        raise ValueError(
            f"expected a boolean mask of shape {tuple(event_shape)}, got {given.dtype} of shape {tuple(given.shape)}"
        )
    if given.all() or (size > 1 and not given.any()):
        raise ValueError(
            f"expected mask to keep some dimensions and move others, got one that keeps {int(given.sum())} of {size}"
        )
    return given.clone()


class _Parting(NamedTuple):
    """Which dimensions a coupling keeps, and how its network sees them: angles by cosine and sine."""

    layout: str  # where the kept dimensions are: "first", "last", "even", "odd" or "scattered"
    kept_at: Tensor  # indices of the kept dimensions,
    moved_at: Tensor  # and of the others
    undo: Tensor  # where each dimension stands among the kept ones followed by the others
    angular: Tensor | None  # which of the kept dimensions are angles, if any is
    all_angles: bool

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the other dimensions."""
        kept, moved = self.kept_at.shape[0], self.moved_at.shape[0]
        if self.layout == "first":
            return x.narrow(-1, 0, kept), x.narrow(-1, kept, moved)
        if self.layout == "last":
            return x.narrow(-1, moved, kept), x.narrow(-1, 0, moved)
        if self.layout in ("even", "odd"):
            even, odd = x[..., ::2], x[..., 1::2]
            return (even, odd) if self.layout == "even" else (odd, even)
        return x.index_select(-1, self.kept_at), x.index_select(-1, self.moved_at)

    def join(self, kept: Tensor, moved: Tensor) -> Tensor:
        """Undoes :meth:`split`."""
        if self.layout == "last":
            return torch.cat((moved, kept), -1)
        if self.layout in ("even", "odd"):
            return torch.stack((kept, moved) if self.layout == "even" else (moved, kept), -1).flatten(1)
        flat = torch.cat((kept, moved), -1)
        return flat.index_select(-1, self.undo) if self.layout == "scattered" else flat

    def features(self, kept: Tensor) -> Tensor:
        """What the network sees of the kept dimensions."""
        if self.angular is None:
            return kept
        if self.all_angles:
            return torch.cat((kept.cos(), kept.sin()), -1)
        angles = kept.index_select(-1, self.angular)
        return torch.cat((kept.index_copy(-1, self.angular, angles.cos()), angles.sin()), -1)


class Coupling(FlowTransform):
    r"""Moves some dimensions by univariate maps whose parameters depend on the others.

    :math:`y_k = x_k` for the kept dimensions, :math:`y_m = u(x_m; p(x_k, c))` for the moved ones.

    The Jacobian is triangular and :math:`\log|\det| = \sum_m \log u'`; the inverse is
    :math:`x_m = u^{-1}(y_m; p(y_k, c))`.  Each direction costs one pass of a dense network.

    Args:
        event_shape: an ``input_dim`` or the shape of one event.
        univariate: the family of scalar maps; ``Affine()`` for RealNVP, ``Shift()`` for NICE.
        mask: which dimensions to keep: ``"half"``, ``"alternating"``, ``"random"`` (drawn once, saved in the
            ``state_dict``) or a boolean mask of shape ``event_shape``, true where kept.
        flip: whether to move what ``mask`` keeps and keep the rest.
        periodic: boolean, shape ``event_shape``, true where a dimension is an angle; by default all are if the
            univariate is periodic, else none.  The conditioner sees angles by cosine and sine.
        save_mask: whether the mask is part of the ``state_dict``; by default if it was drawn here.
        context_dim: size of the context, 0 for none.
        hidden_dims, residual, activation: of the conditioner, an :class:`~pyro_flows.nets.MLP`.

    Raises:
        ValueError: for a mask of another shape, or one that keeps all or nothing (with more than one dimension); for a
            periodic univariate that would move anything but angles, or another one that would move an angle.

    References:
        Density estimation using Real NVP (Dinh et al., 2016), arXiv:1605.08803.
        NICE: Non-linear Independent Components Estimation (Dinh et al., 2014), arXiv:1410.8516.
    """

    order: Tensor
    undo: Tensor
    kept_at: Tensor
    moved_at: Tensor

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
        # Kept dimensions first, then the moved ones.
        self.register_buffer("order", torch.argsort(~kept, stable=True), persistent=saved)
        self.register_buffer("undo", torch.argsort(self.order), persistent=False)
        self.register_buffer("kept_at", self.order[: self.num_kept].clone(), persistent=False)
        self.register_buffer("moved_at", self.order[self.num_kept :].clone(), persistent=False)
        self._find_layout()
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
        """Notes which dimensions are angles; returns how many of those are kept."""
        if periodic is None:
            angle = torch.full(self.event_shape, self.univariate.periodic)
        else:
            angle = torch.as_tensor(periodic).bool().cpu()
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
        count = int(angle.flatten()[kept].sum())
        if angle.any():
            self.register_buffer("angle", angle, persistent=False)
            # Of the kept dimensions, in their order.
            self.register_buffer("angular", torch.nonzero(angle.flatten()[kept]).flatten(), persistent=False)
        self._all_angles = count == self.num_kept and count > 0
        self._some_angles = count > 0
        return count

    @property
    def periodic(self) -> Tensor | None:
        """Boolean, shape ``event_shape``: which dimensions are angles; ``None`` if none is."""
        return self._buffers.get("angle")

    def _find_layout(self) -> None:
        # Slices are cheaper than gathers.
        size, kept = self.order.numel(), self.kept_at.tolist()
        layouts = {"first": range(self.num_kept), "last": range(size - self.num_kept, size)}
        if size % 2 == 0:
            layouts |= {"even": range(0, size, 2), "odd": range(1, size, 2)}
        self._layout = next((name for name, places in layouts.items() if kept == list(places)), "scattered")

    @property
    def mask(self) -> Tensor:
        """Boolean, shape ``event_shape``; true where a dimension is kept."""
        return (torch.argsort(self.order) < self.num_kept).reshape(self.event_shape)

    def _parting(self) -> _Parting:
        held: Mapping[str, Any] = self._buffers
        indices = (held["kept_at"], held["moved_at"], held["undo"])
        return _Parting(self._layout, *indices, held["angular"] if self._some_angles else None, self._all_angles)

    def _move(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        dims = len(self.event_shape)
        batch = value.shape[: value.dim() - dims]
        flat = value if len(batch) == dims == 1 else value.reshape(batch.numel(), self.order.numel())
        if len(flat) > 2 * _ROWS and context is None and not torch.is_grad_enabled() and value.device.type == "cpu":
            # In pieces that stay in the processor's cache, since nothing of them is kept.
            pieces = [self._rows(rows, batch, None, inverse) for rows in flat.split(_ROWS)]
            moved, ladj = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        else:
            moved, ladj = self._rows(flat, batch, context, inverse)
        return (moved, ladj) if flat is value else (moved.view(value.shape), ladj.view(batch))

    def _rows(self, flat: Tensor, batch: Size, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """:meth:`_move` of a batch in one dimension, ``batch`` before; the univariate sees samples as columns."""
        parting = self._parting()
        kept, moved = parting.split(flat)
        features = parting.features(kept)
        if context is not None and len(batch) != 1:
            features = features.view(*batch, features.shape[-1])
        params = self.net(features, context)
        if context is not None and len(batch) != 1:
            params = params.reshape(batch.numel(), *params.shape[-2:])
        move = self.univariate.inverse if inverse else self.univariate.forward
        moved, slope = move(moved.t(), params.transpose(0, 1))
        return parting.join(kept, moved.t()), slope.sum(0)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(x, context, inverse=False)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(y, context, inverse=True)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        with torch.no_grad():
            self.undo.copy_(torch.argsort(self.order))
            self.kept_at.copy_(self.order[: self.num_kept])
            self.moved_at.copy_(self.order[self.num_kept :])
        self._find_layout()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.univariate}, keeps {self.num_kept}"
