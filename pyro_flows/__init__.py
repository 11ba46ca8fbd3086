"""Normalizing flows for Pyro: every flow a ``TransformModule``, exact and fast in both directions.

Other names than these are in the subpackages, which need no import, as in ``pyro_flows.plots.density``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pyro_flows import distributions, flows, nets, transforms, univariate
from pyro_flows.core.chain import Chain
from pyro_flows.core.transform import FlowTransform, Inverse
from pyro_flows.core.wrap import Wrap
from pyro_flows.distributions import (
    MADE,
    ConvMADE,
    Dequantized,
    DiagonalNormal,
    Flow,
    GaussianMixture,
    StudentT,
    bits_per_dim,
)
from pyro_flows.distributions import Dequantizer as Dequantizer  # reachable; the names listed below are few
from pyro_flows.flows import (
    causal_maf,
    cnf,
    glow,
    iaf,
    idf,
    maf,
    mintnet,
    multiscale_realnvp,
    ncsf,
    nice,
    nsf,
    realnvp,
    sphere,
)
from pyro_flows.transforms import (
    ActNorm,
    Autoregressive,
    Continuous,
    Coupling,
    LogitPixels,
    LULinear,
    Mint,
    Permutation,
    Standardization,
)
from pyro_flows.transforms import ConvCoupling as ConvCoupling  # reachable, too
from pyro_flows.transforms import Rescaling as Rescaling
from pyro_flows.univariate import Spline

if TYPE_CHECKING:
    from pyro_flows import infer as infer
    from pyro_flows import plots as plots
    from pyro_flows import testing as testing
    from pyro_flows.infer import AutoFlow, fit_density, fit_guide, load_density, load_guide

__version__ = "0.1.0"

__all__ = [
    "MADE",
    "ActNorm",
    "AutoFlow",
    "Autoregressive",
    "Chain",
    "Continuous",
    "ConvMADE",
    "Coupling",
    "Dequantized",
    "DiagonalNormal",
    "Flow",
    "FlowTransform",
    "GaussianMixture",
    "Inverse",
    "LULinear",
    "LogitPixels",
    "Mint",
    "Permutation",
    "Spline",
    "Standardization",
    "StudentT",
    "Wrap",
    "bits_per_dim",
    "causal_maf",
    "cnf",
    "fit_density",
    "fit_guide",
    "glow",
    "iaf",
    "idf",
    "load_density",
    "load_guide",
    "maf",
    "mintnet",
    "multiscale_realnvp",
    "ncsf",
    "nice",
    "nsf",
    "realnvp",
    "sphere",
]

_LOADED = {module.__name__.rpartition(".")[2] for module in (distributions, flows, nets, transforms, univariate)}
_ON_USE = {"infer", "plots", "testing"}
_OF_INFER = {"AutoFlow", "fit_density", "fit_guide", "load_density", "load_guide"}


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _OF_INFER:
        return getattr(importlib.import_module(f"{__name__}.infer"), name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; names that are not here are in "
        f"{', '.join(sorted(_LOADED | _ON_USE))}"
    )


def __dir__() -> list[str]:
    return sorted({*__all__, *_LOADED, *_ON_USE, "__version__"})
