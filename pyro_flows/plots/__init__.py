"""Pictures of densities, samples, training and calibration: ``from pyro_flows import plots``.

Each function draws into ``ax``, or by default into a new figure, and returns the axes or the figure.  Matplotlib's
settings stay, and nothing is shown: call ``matplotlib.pyplot.show`` or ``savefig``.

A *model* is a distribution, a :class:`~pyro_flows.distributions.flow.Flow` or the result of a fit.  Data, samples and
contexts are tensors, arrays or lists, of any dtype and device.  No gradient is recorded.
"""

from pyro_flows.plots.calibrations import calibration, pit
from pyro_flows.plots.densities import density
from pyro_flows.plots.globes import globe
from pyro_flows.plots.histories import history
from pyro_flows.plots.ranks import ranks
from pyro_flows.plots.scatters import corner, samples
from pyro_flows.plots.verdicts import verdict

__all__ = ["calibration", "corner", "density", "globe", "history", "pit", "ranks", "samples", "verdict"]
