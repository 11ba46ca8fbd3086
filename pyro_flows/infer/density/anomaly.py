"""Anomalies: unlikely rows, and how rare they are among usual ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.core.modes import evaluating
from pyro_flows.distributions import Dequantized, bits_per_dim
from pyro_flows.infer.density.data import admit_rows, expected_by, name_rows
from pyro_flows.infer.density.objective import evaluate, scores_of

__all__ = ["AnomalyDetector"]


class AnomalyDetector:
    r"""Scores rows by bits per dimension, and says how rare such scores are among reference rows.

    The score of a row :math:`n` of whole numbers is a mean over dequantization noise,
    :math:`b = -\frac{1}{K D \log 2} \sum_k \log p(n + u_k)`.  The noise, and so the score, is a function of the row.
    For real data :math:`b = -\log p / (D \log 2)`.

    One-sided, rows of many bits are anomalies.  But flows can give bland images *fewer* bits than their training
    images.  Two-sided, rows far from the mean are anomalies, :math:`|b - \bar b|`, which finds bland images and misses
    some others.

    A p-value is the share of reference rows that are at least as extreme, the row itself included:
    :math:`(1 + \#\{i: s_i \ge s\}) / (m + 1)`; two-sided, the mean also includes the row.  If usual rows are
    exchangeable with reference rows, a p-value is at most :math:`\alpha` with probability at most :math:`\alpha`,
    whatever the model.  Reference rows must not have been used to fit or stop the model, as such rows have fewer bits
    than new ones.

    Args:
        model: a :class:`~pyro_flows.distributions.dequantization.Dequantized`, a
            :class:`~pyro_flows.distributions.flow.Flow` or any other module with ``log_prob``.
        reference: usual, held-out rows, shape ``(rows, *event_shape)``, a tensor or an array.
        context: contexts of the reference rows, shape ``(rows, context_dim)``, if the model takes one.
        num_noise_samples: the number :math:`K` of noise draws for a ``Dequantized``.
        two_sided: whether too few bits are as suspect as too many.

    Attributes:
        reference: ascending bits per dimension of the reference rows, in float64 on the CPU.
        mean: the mean of ``reference``.

    Raises:
        ValueError: for rows that the model does not take, or fewer than 2 reference rows.
        FloatingPointError: if a score is NaN.

    Example:
        >>> flow = pf.Flow(pf.nsf(2))  # in practice, a fitted one
        >>> detector = pf.infer.AnomalyDetector(flow, torch.randn(200, 2))
        >>> rows = torch.tensor([[0.0, 0.0], [10.0, -10.0]])
        >>> detector.flag(rows).tolist()
        [False, True]

    References:
        Detecting Out-of-Distribution Inputs Using Typicality (Nalisnick et al., 2019), arXiv:1906.02994.
        A Gentle Introduction to Conformal Prediction (Angelopoulos & Bates, 2021), arXiv:2107.07511.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Any,
        context: Any = None,
        *,
        num_noise_samples: int = 8,
        two_sided: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module) or not callable(getattr(model, "log_prob", None)):
            raise TypeError(
                f"AnomalyDetector: expected a Dequantized, a Flow or a module with log_prob, got {type(model).__name__}"
            )
        self.model, self.num_noise_samples, self.two_sided = model, num_noise_samples, two_sided
        bits = self.bits(reference, context)
        if len(bits) < 2:
            raise ValueError(f"AnomalyDetector: expected 2 or more reference rows, got {len(bits)}")
        if not bits.isfinite().all():
            raise ValueError(
                f"AnomalyDetector: {int((~bits.isfinite()).sum())} of {len(bits)} reference rows "
                f"({name_rows((~bits.isfinite()).nonzero()[:, 0])}) have no density; leave them out"
            )
        self.reference, self.mean = bits.sort().values, float(bits.mean())

    def __repr__(self) -> str:
        sides = "two-sided" if self.two_sided else "one-sided"
        return (
            f"AnomalyDetector({type(self.model).__name__}, {len(self.reference):,} reference rows of {self.mean:.4g} "
            f"bits per dimension, {sides})"
        )

    @torch.no_grad()
    def bits(self, rows: Any, context: Any = None) -> Tensor:
        """Bits per dimension, shape ``(rows,)``, in float64 on the CPU; costs ``num_noise_samples`` scores a row."""
        expected = expected_by(self.model, "AnomalyDetector", "a tensor or an array of numbers")
        admitted = admit_rows(rows, context, expected, "rows", "context", least=0)
        with evaluating(self.model):
            scores = [] if not len(admitted.value) else evaluate(self._log_prob, admitted)
            log_prob = torch.cat(
                [torch.zeros(0, dtype=torch.float64, device="cpu"), *(part.double().cpu() for part in scores)]
            )
        if log_prob.isnan().any():
            where = name_rows(log_prob.isnan().nonzero()[:, 0])
            raise FloatingPointError(f"AnomalyDetector: the log-density is NaN in {where}; look for NaN in the model")
        bits = bits_per_dim(log_prob, admitted.value.shape[1:])
        return torch.as_tensor(bits, device="cpu")

    def scores(self, rows: Any, context: Any = None) -> Tensor:
        """Scores for thresholds: bits, or two-sided their distance from the mean; shape ``(rows,)``."""
        bits = self.bits(rows, context)
        return (bits - self.mean).abs() if self.two_sided else bits

    def p_values(self, rows: Any, context: Any = None) -> Tensor:
        """Conformal p-values, shape ``(rows,)``, from ``1 / (m + 1)`` to 1 with ``m`` reference rows.

        Example:
            >>> detector = pf.infer.AnomalyDetector(pf.Flow(pf.nsf(2)), torch.randn(199, 2))
            >>> round(detector.p_values(torch.tensor([[10.0, 10.0]])).item(), 3)  # 1 / 200
            0.005
        """
        bits, m = self.bits(rows, context), len(self.reference)
        if not self.two_sided:
            return (1 + m - torch.searchsorted(self.reference, bits)).double() / (m + 1)
        center = (m * self.mean + bits) / (m + 1)
        mirrored = 2 * center - bits
        above = m - torch.searchsorted(self.reference, torch.maximum(bits, mirrored))
        below = torch.searchsorted(self.reference, torch.minimum(bits, mirrored), right=True)
        # At infinitely many bits the center is NaN, and no reference row is as far out.
        return torch.where(bits.isfinite(), 1 + above + below, 1).double() / (m + 1)

    def threshold(self, level: float = 0.05) -> float:
        """The score above which at most a share ``level`` of usual rows lies.

        Args:
            level: between 0 and 1, at least ``1 / (m + 1)`` with ``m`` reference rows.

        Example:
            >>> detector = pf.infer.AnomalyDetector(pf.Flow(pf.nsf(2)), torch.randn(199, 2))
            >>> detector.threshold(0.01) > detector.threshold(0.1)
            True
        """
        m = len(self.reference)
        if not 0 < level < 1:
            raise ValueError(f"AnomalyDetector: expected level to be between 0 and 1, got {level}")
        allowed = math.floor(level * (m + 1) + 1e-9)
        if not allowed:
            raise ValueError(
                f"AnomalyDetector: {m} reference rows are too few for a level of {level:g}; give "
                f"{math.ceil(1 / level - 1)} or more, or a level of at least {1 / (m + 1):.3g}"
            )
        scores = (self.reference - self.mean).abs().sort().values if self.two_sided else self.reference
        return float(scores[m - allowed])

    def flag(self, rows: Any, context: Any = None, level: float = 0.05) -> Tensor:
        """Whether each row's score exceeds :meth:`threshold`, shape ``(rows,)``.

        Example:
            >>> detector = pf.infer.AnomalyDetector(pf.Flow(pf.nsf(2)), torch.randn(199, 2))
            >>> detector.flag(torch.tensor([[0.0, 0.0], [10.0, 10.0]]), level=0.01).tolist()
            [False, True]
        """
        return self.scores(rows, context) > self.threshold(level)

    def _log_prob(self, rows: Tensor, context: Tensor | None) -> Tensor:
        if isinstance(self.model, Dequantized):
            return self.model.scores(rows, context, self.num_noise_samples, fresh=False).mean(0)
        return scores_of("AnomalyDetector", self.model, rows, context)
