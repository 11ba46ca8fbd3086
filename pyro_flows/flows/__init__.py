"""Builders of flows, one per paper, each a :class:`~pyro_flows.core.chain.Chain`.

Each takes ``input_dim`` or an event shape, then keywords; ``hidden_dims=None`` means two hidden layers of width
``4 * input_dim``, between 64 and 512.  A chain has no base distribution: pass it to ``TransformedDistribution``,
``AutoNormalizingFlow`` or :class:`~pyro_flows.distributions.Flow`.  :func:`from_pyro` takes over what Pyro's own
transforms have learned.
"""

from pyro_flows.flows.continuous import cnf
from pyro_flows.flows.from_pyro import from_pyro
from pyro_flows.flows.images import glow, multiscale_realnvp
from pyro_flows.flows.integers import idf
from pyro_flows.flows.mint import MINTNET_CONFIGURATIONS, mintnet
from pyro_flows.flows.series import causal_maf
from pyro_flows.flows.sphere import sphere
from pyro_flows.flows.vectors import iaf, maf, ncsf, nice, nsf, realnvp

__all__ = [
    "MINTNET_CONFIGURATIONS",
    "causal_maf",
    "cnf",
    "from_pyro",
    "glow",
    "iaf",
    "idf",
    "maf",
    "mintnet",
    "multiscale_realnvp",
    "ncsf",
    "nice",
    "nsf",
    "realnvp",
    "sphere",
]
