"""What one asks of a density: marginals, conditionals, modes, entropy and divergence."""

from pyro_flows.distributions.queries.answers import Conditional, Marginal
from pyro_flows.distributions.queries.estimates import estimate_entropy, estimate_kl
from pyro_flows.distributions.queries.modes import Modes
from pyro_flows.distributions.queries.rough import Estimate

__all__ = ["Conditional", "Estimate", "Marginal", "Modes", "estimate_entropy", "estimate_kl"]
