"""Vector fields :math:`v(t, x, c)` and products with their Jacobian.

Shapes everywhere: ``t`` a scalar, ``x`` ``(rows, *event_shape)``, ``context`` ``(rows or 1, context_dim)`` or ``None``.
The package's fields are smooth, for large steps, and start at zero, so a fresh flow is the identity.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyro_flows.core.checks import event_size, integer
from pyro_flows.core.modes import plain_eager

__all__ = ["Field", "GivenField", "unit_probes"]

_LOOP = 4  # up to this many products are faster one by one


class Field(nn.Module):
    """Abstract base of vector fields.

    A subclass defines :meth:`forward`, and for speed :meth:`products` and :meth:`with_divergence`.

    Args:
        event_shape: shape of one ``x``.
        context_dim: size of the context, 0 for none.
        time_dependent: whether the field may depend on ``t``.

    Example:
        >>> class Rotation(pf.transforms.continuous.Field):
        ...     def forward(self, t, x, context=None):
        ...         return torch.stack([-x[..., 1], x[..., 0]], -1)
        >>> layer = pf.Continuous(2, Rotation(2))
        >>> layer(torch.tensor([[1.0, 0.0]])).detach().round(decimals=2)  # by one radian
        tensor([[0.5400, 0.8400]])
    """

    #: Whether the exact divergence costs about as much as the field, in any dimension.
    cheap_divergence = False
    #: Whether ``forward`` also takes ``t`` of shape ``(rows,)``.
    rowwise_times = False

    def __init__(self, event_shape: int | Iterable[int], context_dim: int = 0, time_dependent: bool = True) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        self.context_dim, self.time_dependent = integer("", "context_dim", context_dim, 0), bool(time_dependent)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity, with the shape of ``x``."""
        raise TypeError(f"{type(self).__name__} must define forward(t, x, context=None) -> velocity")

    def at_times(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity of each row at its own time, ``t`` of shape ``(rows,)``; differentiable.

        Without ``rowwise_times``, ``torch.func.vmap`` runs over the rows.

        Raises:
            ValueError: if ``vmap`` cannot run the field.
        """
        if self.rowwise_times:
            return self(t, x, context)
        given = (t, x) if context is None else (t, x, context.expand(len(x), -1))

        def alone(t: Tensor, *row: Tensor) -> Tensor:
            return self(t, *(each.unsqueeze(0) for each in row))[0]

        try:
            return torch.func.vmap(alone, randomness="different")(*given)
        except RuntimeError as error:  # vmap's limits, in its words
            name = type(self.module if isinstance(self, GivenField) else self).__name__
            raise ValueError(
                f"field {name}: a time for each row was asked for, but it cannot be called under torch.func.vmap "
                f"({_first_line(error)}); make it do without .item(), branches on values and the like, or take t of "
                "shape (rows,) as well as scalars and set rowwise_times = True in its class"
            ) from error

    def products(self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The velocity, and :math:`J p` or :math:`J^\top p` (the cheaper one) for each probe.

        Probes and products have shape ``(count, rows, *event_shape)``.
        """
        if plain_eager():
            return self._pulled(t, x, probes, context)
        v, pull = torch.func.vjp(lambda x: self(t, x, context), x)[:2]
        if len(probes) == 1:
            return v, pull(probes[0])[0].unsqueeze(0)
        return v, torch.func.vmap(lambda probe: pull(probe)[0])(probes)

    def _pulled(self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        taped = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if taped and x.requires_grad else x.detach().requires_grad_()
            v = self(t, x, context)
        if not v.requires_grad:  # a constant
            return v, torch.zeros_like(probes)

        def pull(probe: Tensor, batched: bool = False) -> Tensor:
            found = torch.autograd.grad(
                v, x, probe, retain_graph=True, create_graph=taped, allow_unused=True, is_grads_batched=batched
            )[0]
            return torch.zeros_like(probe) if found is None else found

        if len(probes) == 1:
            pulled = pull(probes[0]).unsqueeze(0)
        else:
            pulled = torch.stack([pull(probe) for probe in probes]) if len(probes) <= _LOOP else pull(probes, True)
        return v if taped else v.detach(), pulled

    def with_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The velocity, and its exact divergence :math:`\sum_i \partial v_i / \partial x_i`, shape ``(rows,)``."""
        v, pushed = self.products(t, x, unit_probes(x), context)
        return v, pushed.flatten(2).diagonal(dim1=0, dim2=2).sum(-1)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def unit_probes(x: Tensor) -> Tensor:
    """One probe for each dimension, shape ``(D, rows, *event_shape)``."""
    event = x.shape[1:]
    eye = torch.eye(event.numel(), dtype=x.dtype, device=x.device)
    return eye.view(-1, 1, *event).expand(-1, *x.shape)


class GivenField(Field):
    """A user's module as a field, called as ``module(t, x)``, or ``module(t, x, context)`` with a context.

    The constructor tries the module on three rows.  A module with a true attribute ``rowwise_times`` also takes ``t``
    of shape ``(rows,)``.

    Raises:
        ValueError: if the module changes the shape, mixes rows, writes into ``x``, hides its dependence on ``x`` from
            autograd, or claims ``rowwise_times`` wrongly.
        TypeError: for anything but a module, a wrong signature, or a result that is not a tensor.

    Example:
        >>> class Linear(torch.nn.Linear):
        ...     def forward(self, t, x):
        ...         return super().forward(x)
        >>> field = pf.transforms.continuous.fields.GivenField(Linear(2, 2), 2)
        >>> field(torch.tensor(0.0), torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, module: nn.Module, event_shape: int | Iterable[int], context_dim: int = 0) -> None:
        super().__init__(event_shape, context_dim)
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected field to be a name or a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self.rowwise_times = bool(getattr(module, "rowwise_times", False))
        self._try()

    def _try(self) -> None:
        like = next((p for p in self.module.parameters() if p.is_floating_point()), torch.empty(0))
        x = like.new_empty(3, *self.event_shape)
        x.copy_(torch.linspace(-1, 1, x.numel()).view(x.shape))
        t = like.new_full((), 0.5)
        context = x.new_zeros(3, self.context_dim) if self.context_dim else None
        name, kept = type(self.module).__name__, x.clone()
        try:
            with torch.no_grad():
                self._call(t, x, context)
        except (TypeError, RuntimeError) as error:  # in Python's words or torch's
            takes = "field(t, x)" if context is None else "field(t, x, context)"
            shapes = f"t a scalar, x of shape {tuple(x.shape)}"
            shapes += "" if context is None else f", context of shape {tuple(context.shape)}"
            raise TypeError(
                f"field {name}: expected a module that can be called as {takes}, {shapes}; that ended in "
                f"{type(error).__name__} ({_first_line(error)})"
            ) from error
        if not x.is_meta and not torch.equal(x, kept):
            raise ValueError(f"field {name}: it writes into x; a field must leave its arguments as they are")
        with torch.no_grad():
            three = self(t, x, context)
            two = self(t, x[:2], None if context is None else context[:2])
        if three.is_meta:
            return
        if not torch.allclose(two, three[:2], rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ValueError(
                f"field {name}: a row has another velocity among other rows; a field must be a "
                "function that treats rows independently (no batch normalization, no mean over rows, no dropout)"
            )
        self._try_slopes(t, x, context, three)
        if self.rowwise_times:
            self._try_times(x, context)

    def _try_slopes(self, t: Tensor, x: Tensor, context: Tensor | None, v: Tensor) -> None:
        """Refuses a velocity detached from ``x``: zero divergence would make the density silently wrong."""
        if torch.is_inference_mode_enabled():  # no gradients at all
            return
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = self(t, x, context)
            if found.requires_grad and torch.autograd.grad(found.sum(), x, allow_unused=True)[0] is not None:
                return
        with torch.no_grad():
            if torch.equal(self(t, x + 0.5, context), v):
                return
        raise ValueError(
            f"field {type(self.module).__name__}: its velocity changes with x, but there is no gradient to say so, so "
            "that the divergence would be zero; compute it in torch, without detach(), .data or torch.no_grad()"
        )

    @torch.no_grad()
    def _try_times(self, x: Tensor, context: Tensor | None) -> None:
        times = torch.linspace(0.2, 0.8, len(x), dtype=x.dtype, device=x.device)
        rows = zip(times, x, [None] * len(x) if context is None else context, strict=True)
        want = torch.cat([self(t, row[None], None if c is None else c[None]) for t, row, c in rows])
        try:
            good = torch.allclose(self(times, x, context), want, rtol=1e-3, atol=1e-5, equal_nan=True)
        except (RuntimeError, ValueError):  # shapes that do not broadcast, or broadcast to others
            good = False
        if not good:
            raise ValueError(
                f"field {type(self.module).__name__}: it says rowwise_times = True, but t of shape (rows,) does not "
                "give each row its velocity at its own time; give t the dimensions of x, as in t.view(-1, 1), or "
                "leave rowwise_times out"
            )

    def _call(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        return self.module(t, x) if context is None else self.module(t, x, context)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None and len(context) != len(x):
            context = context.expand(len(x), -1)
        v = self._call(t, x, context)
        if not isinstance(v, Tensor):
            raise TypeError(f"field {type(self.module).__name__}: expected a tensor, got {type(v).__name__}")
        if v.shape != x.shape:
            raise ValueError(
                f"field {type(self.module).__name__}: expected a velocity with the shape of x, {tuple(x.shape)}, got "
                f"{tuple(v.shape)}; a field keeps the event's shape and gives one row for each"
            )
        return v
