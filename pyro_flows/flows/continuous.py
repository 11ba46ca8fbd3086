"""The builder of continuous-time flows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import choice, event_size
from pyro_flows.transforms import Continuous
from pyro_flows.transforms.continuous.field_nets import ChainField, ConvField
from pyro_flows.transforms.continuous.fields import Field

__all__ = ["cnf"]


def _named(kind: str, event: tuple[int, ...], hidden_dims: Sequence[int] | None, **options: Any) -> Field:
    choice("cnf", "field", kind, ("concatsquash", "mlp", "conv"), "a torch.nn.Module")
    if kind == "conv":
        return ConvField(event, hidden_channels=(32, 32) if hidden_dims is None else hidden_dims, **options)
    if hidden_dims is None:
        hidden_dims = (min(max(64, 4 * event_size(event).numel()), 512),) * 2
    return ChainField(event, hidden_dims=hidden_dims, squash=kind == "concatsquash", **options)


def cnf(  # noqa: D417 -- the class documents the other options
    event_shape: int | Iterable[int],
    *,
    context_dim: int = 0,
    hidden_dims: Sequence[int] | None = None,
    field: str | nn.Module = "concatsquash",
    time_dependent: bool = True,
    activation: str | Callable[[Tensor], Tensor] = "tanh",
    divergence: str = "auto",
    noise: str = "rademacher",
    num_probes: int | None = None,
    scoring: str = "auto",
    solver: str = "dopri5",
    rtol: float | Sequence[float] = 1e-5,
    atol: float | Sequence[float] = 1e-5,
    solver_steps: int | None = None,
    gradient: str = "auto",
    per_row: bool = False,
    kinetic: float = 0.0,
    jacobian: float = 0.0,
) -> Chain:
    r"""Continuous normalizing flow (FFJORD): one :class:`~pyro_flows.transforms.Continuous` transform.

    Rows follow :math:`\dot z = v(t, z, c)` from the base at :math:`t = 0` to the data at :math:`t = 1`.  A fresh flow
    is exactly the identity.

    Args:
        event_shape: an ``input_dim`` or the shape of one event; ``(C, H, W)`` or ``(C, T)`` for ``field="conv"``.
        context_dim: size of the context, 0 for none.
        hidden_dims: widths of the field's hidden layers; by default two of ``4 * input_dim``, at least 64 and at most
            512 (FFJORD: three of 64 for toy data, two or three of some 10 per dimension for tables), or two of 32
            channels for ``"conv"``.  With up to two, ``"mlp"`` and ``"concatsquash"`` have a cheap exact divergence.
        field: ``"concatsquash"`` (FFJORD), ``"mlp"``, ``"conv"``, or a module, as for ``Continuous``.
        time_dependent: whether the package's own fields depend on time.
        activation: activation of the package's own fields: ``"tanh"``, ``"softplus"``, ``"silu"`` or a smooth
            elementwise function (FFJORD: softplus or tanh).
        divergence, noise, num_probes, scoring, solver, rtol, atol, solver_steps, gradient, per_row, kinetic, jacobian:
            as in :class:`~pyro_flows.transforms.Continuous`.  The papers use an implicit Adams solver and the adjoint
            (Chen et al.); Hutchinson's estimate with one probe of either noise, dopri5 at 1e-5 and the adjoint
            (FFJORD); rk4 with 4 steps and both penalties at 0.01 (RNODE: Finlay et al.).

    The papers' flows learn the end time or stack several fields.  Here the field's scale replaces the former, and a
    :class:`~pyro_flows.core.chain.Chain` of flows is the latter.

    Raises:
        ValueError, TypeError: for options and fields, as in :class:`~pyro_flows.transforms.Continuous`.

    Example:
        >>> flow = pf.Flow(pf.cnf(2))
        >>> x = flow.sample((5,))
        >>> flow.log_prob(x).shape
        torch.Size([5])

    References:
        Neural Ordinary Differential Equations (Chen et al., 2018), arXiv:1806.07366.
        FFJORD (Grathwohl et al., 2019), arXiv:1810.01367.
        How to train your neural ODE (Finlay et al., 2020), arXiv:2002.02798.
    """
    event = event_size(event_shape)
    if isinstance(field, str):
        options = {"context_dim": context_dim, "time_dependent": time_dependent, "activation": activation}
        field = _named(field, event, hidden_dims, **options)
    return Chain(
        [
            Continuous(
                event,
                field,
                context_dim=context_dim,
                divergence=divergence,
                noise=noise,
                num_probes=num_probes,
                scoring=scoring,
                solver=solver,
                rtol=rtol,
                atol=atol,
                solver_steps=solver_steps,
                gradient=gradient,
                per_row=per_row,
                kinetic=kinetic,
                jacobian=jacobian,
            )
        ]
    )
