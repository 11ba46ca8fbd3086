"""The base contract as code: :func:`check_transform`, and :func:`locate_nonfinite` for the origin of NaN."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pyro_flows.core.nonfinite import locate_nonfinite
from pyro_flows.core.transform import FlowTransform
from pyro_flows.testing.checks import ALL, OF_ROWS
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

    The error allowed scales with the terms of each result, e.g. :math:`|f(f^{-1}(y)) - y| \le a + r (|y| + |f'|\,|x|)`.
    Derivatives are compared in float64, on a deep copy and at most four rows; the transform and its ``.grad`` stay the
    same.

    Args:
        transform: any transform; first move its parameters away from their initial values.
        x: a base-side value, shape ``(*batch, *event_shape)``, of the transform's dtype and device.
        context: shape ``(*context_batch, context_dim)`` if the transform takes one.
        atol: the absolute error :math:`a` allowed, by default ``rtol``.
        rtol: the relative error :math:`r` allowed, by default 512 times the machine epsilon of ``x``.
        checks: a choice of ``CHECKS``; e.g. all but ``"copies"`` for a transform that holds a lambda.

    Raises:
        AssertionError: with the failed check, the expected value, the actual one and a hint.

    Example:
        >>> chain = pf.realnvp(3, num_layers=2)
        >>> for parameter in chain.parameters():
        ...     _ = torch.nn.init.normal_(parameter, std=0.1)
        >>> pf.testing.check_transform(chain, torch.randn(5, 3))
    """
    wanted = set(checks)
    if wanted - ALL.keys():
        raise ValueError(f"expected checks among {CHECKS}, got {sorted(wanted - ALL.keys())}")
    subject = Subject(transform, x, context, atol, rtol)
    for name, check in ALL.items():
        if name in wanted and (name not in OF_ROWS or subject.batch.numel()):
            subject.check = name
            try:
                check(subject)
            except AssertionError:
                raise
            except Exception as error:
                subject.fail("no error", f"{type(error).__name__}: {error}", "see the error above, raised on the way")
