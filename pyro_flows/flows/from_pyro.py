"""Trained transforms of Pyro as transforms of this package."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import transforms as pyros
from pyro.nn.auto_reg_nn import ConditionalAutoRegressiveNN
from pyro.nn.dense_nn import ConditionalDenseNN
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_flows.core.transform import FlowTransform
from pyro_flows.nets.activations import Function
from pyro_flows.nets.degrees import least_degree
from pyro_flows.transforms import Autoregressive, Coupling
from pyro_flows.univariate.clamped import ClampedAffine

__all__ = ["from_pyro"]

_AUTOREGRESSIVE = (pyros.AffineAutoregressive, pyros.ConditionalAffineAutoregressive)
_COUPLING = (pyros.AffineCoupling, pyros.ConditionalAffineCoupling)

# The names of functions in this package's table, by how equal modules print.
_NAMES = {
    repr(module): name
    for name, module in (
        ("elu", nn.ELU()),
        ("gelu", nn.GELU()),
        ("leaky_relu", nn.LeakyReLU()),
        ("relu", nn.ReLU()),
        ("sigmoid", nn.Sigmoid()),
        ("silu", nn.SiLU()),
        ("tanh", nn.Tanh()),
    )
}


def from_pyro(transform: Transform | nn.Module) -> FlowTransform:
    r"""Takes over a transform of Pyro with its weights: the same map, with the engines of this package.

    The result maps, scores and samples as the original, to rounding, whatever the sizes, the permutation, the
    activation and the bounds of the log-scale: :math:`y = e^{s} x + m`, :math:`x = (y - m) e^{-s}` with
    :math:`(m, s)` by the same network.  An autoregressive transform, which Pyro inverts in ``input_dim`` passes, takes
    one sweep.  Weights are copied, in their dtype and on their device; the original stays as it is.

    Hidden units of this package's masked networks are spread evenly over degrees, and Pyro's are not, so the network of
    an autoregressive transform may become wider, by a half in four dimensions and less in more.  The additional units
    have weights of zero.

    Args:
        transform: an ``AffineAutoregressive`` or ``AffineCoupling`` of Pyro, or one of their conditional forms, which
            becomes a transform with a context; or the ``inv`` of one.

    Raises:
        TypeError: for another transform. Pyro's others work in a :class:`~pyro_flows.core.chain.Chain` as they are,
            wrapped.
        ValueError: for a network that is not Pyro's ``AutoRegressiveNN`` or ``DenseNN``, one with skip connections or
            other outputs than a shift and a log-scale, ``stable=True``, or a coupling along another axis than the last.

    Example:
        >>> import pyro.distributions.transforms as T
        >>> theirs = T.affine_autoregressive(5, hidden_dims=[20])
        >>> ours = pf.flows.from_pyro(theirs)
        >>> x = torch.randn(100, 5)
        >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
        True

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), arXiv:1606.04934.
        Density estimation using Real NVP (Dinh et al., 2016), arXiv:1605.08803.
    """
    inverse = getattr(transform, "_inv", None)  # of torch's inverse, the transform itself
    if type(transform).__name__ == "_InverseTransform" and inverse is not None:
        return from_pyro(inverse).inv
    if isinstance(transform, _AUTOREGRESSIVE):
        return _autoregressive(transform)
    if isinstance(transform, _COUPLING):
        return _coupling(transform)
    raise TypeError(
        f"from_pyro: expected Pyro's AffineAutoregressive or AffineCoupling, or a conditional form of these, got "
        f"{type(transform).__name__}; put other transforms into a Chain as they are"
    )


def _options(transform: Any) -> Mapping[str, Any]:
    # The conditional forms keep the options of the transforms that they make.
    return transform.kwargs if hasattr(transform, "kwargs") else vars(transform)


def _univariate(transform: Any) -> ClampedAffine:
    options = _options(transform)
    if options.get("stable", False):
        raise ValueError(
            "from_pyro: expected a transform with stable=False, got stable=True, whose map is another; put it into a "
            "Chain as it is"
        )
    return ClampedAffine(options.get("log_scale_min_clip", -5.0), options.get("log_scale_max_clip", 3.0))


def _check(network: Any, kind: type[nn.Module], name: str, outputs: list[int]) -> None:
    given = list(getattr(network, "param_dims", ()))
    if not isinstance(network, kind):
        raise ValueError(f"from_pyro: expected a network of Pyro's class {name}, got {type(network).__name__}")
    if given != outputs:
        raise ValueError(
            f"from_pyro: expected a {name} with param_dims={outputs}, a shift and a log-scale, got {given}"
        )


def _activation(module: nn.Module) -> str | Function:
    if getattr(module, "inplace", False):
        plain: Any = copy.copy(module)
        plain.inplace = False
        module = plain
    return _NAMES.get(repr(module), module)


def _places(degrees: Tensor, least: int, most: int) -> tuple[Tensor, Tensor, int]:
    """Finds units, their places in a layer that has as many units of each degree, and the width of this layer."""
    units = torch.argsort(degrees, stable=True)
    units = units[degrees[units] <= most]  # others reach no output
    groups = (degrees[units] - least).clamp(min=0)  # below, a unit sees nothing
    counts = torch.bincount(groups, minlength=1)
    count = max(int(counts.max()), 1)
    begins = counts.cumsum(0) - counts
    return units, groups * count + torch.arange(len(units)) - begins[groups], count * (most - least + 1)


@torch.no_grad()
def _autoregressive(transform: Any) -> FlowTransform:
    network = getattr(transform, "arn", None) or transform.nn
    _check(network, ConditionalAutoRegressiveNN, "AutoRegressiveNN", [1, 1])
    if network.skip_layer is not None:
        raise ValueError(
            "from_pyro: expected a network without skip connections, got one with them; put the transform into a Chain "
            "as it is"
        )
    size, contexts, order = network.input_dim, network.context_dim, network.permutation.cpu()
    least, degrees = least_degree(size, contexts > 0), torch.arange(size) + 1  # of the inputs by rank
    sources, places = [order + contexts], [torch.arange(size)]
    widths: list[int] = []
    for layer in network.layers[:-1]:
        # The last input that a unit really sees.
        seen = layer.mask.cpu()[:, sources[0]] if not widths else layer.mask.cpu()
        degrees = (seen.bool() * degrees).amax(1)
        units, place, width = _places(degrees, least, size - 1)
        sources.append(units)
        places.append(place)
        widths.append(width)
    sources.append(torch.cat((order, size + order)))
    places.append(torch.arange(2 * size))
    ours = Autoregressive(
        size,
        _univariate(transform),
        fast="sampling",
        context_dim=contexts,
        hidden_dims=widths,
        order=order,
        activation=_activation(network.f),
    ).to(network.layers[0].weight)
    for k, (weight, bias, bits) in enumerate(zip(*ours.net.tensors(), strict=True)):
        layer = network.layers[k]
        masked = (layer.weight * layer.mask)[sources[k + 1]]
        moved = torch.zeros_like(weight)
        moved[places[k + 1][:, None], places[k]] = masked[:, sources[k]]
        if (moved[bits == 0] != 0).any():
            raise ValueError("from_pyro: expected the masks of Pyro's AutoRegressiveNN, got others")
        weight.copy_(moved)
        bias.zero_()[places[k + 1]] = layer.bias[sources[k + 1]]
        if contexts and k == 0:
            ours.net.context_weight.zero_()[places[1]] = masked[:, :contexts]
    return ours


@torch.no_grad()
def _coupling(transform: Any) -> FlowTransform:
    network, kept = transform.nn, transform.split_dim
    if _options(transform).get("dim", -1) != -1:
        raise ValueError(
            f"from_pyro: expected a coupling that splits the last axis, dim=-1, got dim={_options(transform)['dim']}; "
            "put it into a Chain as it is"
        )
    moved = network.param_dims[0] if isinstance(network, ConditionalDenseNN) else 0
    _check(network, ConditionalDenseNN, "DenseNN", [moved, moved])
    ours = Coupling(
        kept + moved,
        _univariate(transform),
        mask=[True] * kept + [False] * moved,
        context_dim=network.context_dim,
        hidden_dims=network.hidden_dims,
        activation=_activation(network.f),
    ).to(network.layers[0].weight)
    for layer, theirs in zip(ours.net.layers, network.layers, strict=True):
        layer.load_state_dict(theirs.state_dict())
    # Pyro has the context first.
    first = ours.net.layers[0].weight
    first.copy_(first.roll(-network.context_dim, 1))
    return ours
