"""The base contract as code: hold your own transforms to it, and find the part of a flow that makes NaN.

:func:`check_transform` runs the checks named in ``CHECKS`` and fails with a message that says which one, what was
expected, what came, and what to look at.  :func:`locate_nonfinite` walks a flow part by part.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pyro_flows.core.nonfinite import locate_nonfinite
from pyro_flows.core.transform import FlowTransform
from pyro_flows.testing.checks import ALL
from pyro_flows.testing.subject import Subject

__all__ = ["CHECKS", "check_transform", "locate_nonfinite"]

CHECKS = tuple(ALL)
"""Names of all checks, in the order in which they run."""


def check_transform(
    transform: FlowTransform,
    x: Tensor,
    context: Tensor | None = None,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    checks: Iterable[str] = CHECKS,
) -> None:
    r"""Holds a transform to the base contract of :class:`~pyro_flows.FlowTransform`.

    Rounding is judged by what enters a result: :math:`|f(f^{-1}(y)) - y| \le a + r (|y| + |f'|\,|x|)`, and likewise for
    everything else that is computed twice.  Derivatives are compared in float64, on a deep copy and at most four rows.
    The transform itself is left as it is, apart from gradients: nothing is accumulated in ``.grad``.

    Args:
        transform: any transform; parameters are best moved away from their initial values before.
        x: a base-side value of shape ``(*batch, *event_shape)``, of the transform's dtype and device.
        context: shape ``(*context_batch, context_dim)`` if the transform takes one.
        atol: the absolute error :math:`a` allowed, by default equal to ``rtol``.
        rtol: the relative error :math:`r` allowed, by default 512 times the machine epsilon of ``x``.
        checks: which ones to run, of ``CHECKS``; e.g. all but ``"copies"`` for a transform that holds a lambda.

    Raises:
        AssertionError: naming the check that failed, what was expected, what came, and what to look at.
    """
    wanted = set(checks)
    if wanted - ALL.keys():
        raise ValueError(f"expected checks among {CHECKS}, got {sorted(wanted - ALL.keys())}")
    subject = Subject(transform, x, context, atol, rtol)
    for name, check in ALL.items():
        if name in wanted:
            subject.check = name
            try:
                check(subject)
            except AssertionError:
                raise
            except Exception as error:
                subject.fail("no error", f"{type(error).__name__}: {error}", "see the error above, raised on the way")
