"""Builders: one a paper, each a :class:`~pyro_flows.core.chain.Chain`.

They share one vocabulary: ``input_dim`` (or an event shape) first, then keywords.  For vectors ``hidden_dims=None``
means two hidden layers of width ``4 * input_dim``, at least 64 and at most 512.  A chain has no base distribution of
its own: give it to ``TransformedDistribution``, to ``AutoNormalizingFlow``, or to
:class:`~pyro_flows.distributions.Flow`.
"""

from pyro_flows.flows.continuous import cnf
from pyro_flows.flows.images import glow, multiscale_realnvp
from pyro_flows.flows.mint import MINTNET_CONFIGURATIONS, mintnet
from pyro_flows.flows.series import causal_maf
from pyro_flows.flows.vectors import iaf, maf, ncsf, nice, nsf, realnvp

__all__ = [
    "MINTNET_CONFIGURATIONS",
    "causal_maf",
    "cnf",
    "glow",
    "iaf",
    "maf",
    "mintnet",
    "multiscale_realnvp",
    "ncsf",
    "nice",
    "nsf",
    "realnvp",
]
