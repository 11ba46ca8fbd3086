"""What an autoregressive network's outputs mean: binary values, categories, or normal numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.distributions.made.contract import Head
from pyro_flows.univariate.base import number, soft_clip

__all__ = [
    "BernoulliHead",
    "CategoricalHead",
    "NormalHead",
    "RelaxedBernoulliHead",
    "choose",
    "choosing",
    "soft_unclip",
    "spoiling",
]


class RelaxedBernoulliHead(Head):
    r"""Values in (0, 1), :math:`x = \sigma((\theta + \ell) / t)` with logistic noise :math:`\ell` and temperature t.

    The parameter is the logit of a binary variable, which is 1 where :math:`x > 1/2`; x tends to it as the temperature
    falls to 0.  The density is that of x itself, so that a bound on the evidence with it is that of the relaxed model.
    Draws and values are kept off 0 and 1 by the smallest positive number and by one rounding error: at temperatures
    below some 0.2 the logit of a value close to 1 has few digits left in float32, and the density as few.

    Args:
        temperature: :math:`t > 0`; the attribute of this name may be changed along the way.

    References:
        The Concrete Distribution (Maddison et al., 2016), arXiv:1611.00712.
        Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2016), arXiv:1611.01144.
    """

    discrete = False
    has_rsample = True
    constraint = constraints.unit_interval

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"RelaxedBernoulliHead: expected temperature > 0, got {temperature}")
        self.temperature = float(temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        value = _off_ends(value.to(params.dtype))
        log_value, log_rest = torch.log(value), torch.log1p(-value)
        noise = (log_value - log_rest) * self.temperature - params.squeeze(-1)
        # The logistic density of the noise, and the slope t / (x (1 - x)).
        density = F.logsigmoid(noise) + F.logsigmoid(-noise)
        return density + math.log(self.temperature) - log_value - log_rest

    def rsample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits = params.squeeze(-1)
        noise = torch.logit(_off_ends(torch.rand_like(logits)))
        return _off_ends(torch.sigmoid((logits + noise) / self.temperature))

    def inside(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        return (value > 0) & (value < 1)

    def allowed(self, dim: int) -> str:
        return "a number strictly between 0 and 1"


def _off_ends(value: Tensor) -> Tensor:
    info = torch.finfo(value.dtype)
    return value.clamp(info.tiny, 1 - info.eps / 2)


def soft_unclip(value: Tensor, bound: float) -> Tensor:
    """The inverse of ``soft_clip``, for values that it nearly reaches at most."""
    return torch.atanh((value / bound).clamp(-0.99, 0.99)) * bound


def choose(logits: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A category by inversion of the cumulative probabilities.

    Args:
        logits: shape ``(*, K)``.
        z: uniform numbers in [0, 1), shape ``(*)``.

    Returns:
        The index, and a zero that is NaN where the logits are.
    """
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    total = cumulative[..., -1]
    # Never the last but one beyond the total, since z is less than 1; nor one without probability.
    return (cumulative <= (z * total).unsqueeze(-1)).sum(-1), total - total


def choosing(logits: Tensor, z: Tensor, room: Tensor, coded: Tensor) -> list[Callable[[], object]]:
    """As :func:`choose`, in place, with the categories on the second axis.

    Args:
        logits: shape ``(n, K, columns)``.
        z: uniform in [0, 1), shape ``(n, columns)``; is NaN afterwards where the logits are.
        room: shape of the logits, may be them; ones for the categories before the one that is drawn afterwards.
        coded: likewise, is not them; the one-hot code afterwards.
    """
    return [
        partial(torch.softmax, logits, 1, out=room),
        partial(torch.cumsum, room, 1, out=room),
        partial(z.mul_, room[:, -1]),  # rounding is shared out among all categories
        partial(room.le_, z.unsqueeze(1)),
        partial(torch.eq, room[:, 0], 0, out=coded[:, 0]),
        partial(torch.sub, room[:, :-1], room[:, 1:], out=coded[:, 1:]),
    ]


def spoiling(x: Tensor, z: Tensor) -> Callable[[], object]:
    """A call that makes ``x`` NaN where ``z`` is, and else leaves it."""
    return partial(x.addcmul_, z, number(0.0, z.dtype) if z.device.type == "cpu" else torch.zeros_like(z))


class BernoulliHead(Head):
    r"""Binary values, :math:`p(x = 1) = \sigma(\theta)`; :math:`\theta` is a logit in nats.

    ``bias(data)`` gives the logits of the means, with half an observation added on either side.

    References:
        MADE: Masked Autoencoder for Distribution Estimation (Germain et al., 2015), arXiv:1502.03509.
    """

    constraint = constraints.boolean

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        # Unlike x t - softplus(t), right to all digits also where a value is nearly certain.
        return F.logsigmoid((2 * value.to(params.dtype) - 1) * params.squeeze(-1))

    def sample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            logits = params.squeeze(-1)
            return torch.sigmoid(logits).sub_(torch.rand_like(logits)).ceil_().abs_()

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        """Probabilities of 1."""
        return torch.sigmoid(params.squeeze(-1))

    def relaxed(self, temperature: float) -> Head:

        head = RelaxedBernoulliHead(temperature)
        return head if self._input_dim is None else head.bind(self._input_dim)

    def allowed(self, dim: int) -> str:
        return "0 or 1"

    def start(self, data: Tensor | None) -> Tensor:
        if data is None:
            return super().start(None)
        return torch.logit((data.sum(0) + 0.5) / (len(data) + 1)).unsqueeze(-1)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> list[Callable[[], object]]:
        # 1 where p > z: the difference rounded up is that, or a negative zero; unlike a comparison it lets NaN through.
        return [
            partial(torch.sigmoid, params[:, 0], out=features),
            partial(features.sub_, z),
            features.ceil_,
            features.abs_ if features.data_ptr() == x.data_ptr() else partial(torch.abs, features, out=x),
        ]


class CategoricalHead(Head):
    r"""Categories 0 to :math:`K_i - 1`, :math:`p(x = k) = e^{\theta_k} / \sum_{l < K_i} e^{\theta_l}`.

    Logits are in nats.  The network is given categories one-hot, with the largest number of classes for all
    dimensions; logits beyond a dimension's own number are excluded exactly.  ``bias(data)`` gives the logarithms of
    the frequencies, with half an observation added to each.  Expectations are those of the category's number, which
    mean something only where categories are ordered.

    Args:
        num_classes: the number :math:`K_i` of classes, one for all dimensions or one for each.

    Raises:
        ValueError: for numbers that are no positive integers, none above 1, or (in ``bind``) not one a dimension.
    """

    def __init__(self, num_classes: int | Iterable[int]) -> None:
        super().__init__()
        counts = (num_classes,) if isinstance(num_classes, int) else tuple(num_classes)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts) or max(counts, default=0) < 2:
            raise ValueError(
                "CategoricalHead: expected num_classes to be a positive integer or a list of such, one of which is "
                f"at least 2, got {num_classes!r}"
            )
        self.num_classes = counts
        self._same, self._listed = len(set(counts)) == 1, not isinstance(num_classes, int)
        self.num_params = self.num_features = max(counts)
        if self._same:
            self.constraint = constraints.integer_interval(0, self.num_params - 1)
        self.register_buffer("index", torch.arange(self.num_params), persistent=False)
        self._limit(())

    def _limit(self, counts: tuple[int, ...]) -> None:
        """Each dimension's last category, and which logits are in excess."""
        last = torch.tensor(counts, dtype=torch.long, device=self.index.device) - 1
        self.register_buffer("last", last, persistent=False)
        self.register_buffer("excess", self.index > last.unsqueeze(-1), persistent=False)

    def _settle(self, input_dim: int) -> None:
        if self._listed and len(self.num_classes) != input_dim:
            raise ValueError(
                f"CategoricalHead: expected num_classes to list one number for each of the {input_dim} dimensions, "
                f"got {len(self.num_classes)}"
            )
        if not self._listed:
            self.num_classes = self.num_classes[:1] * input_dim
        self._limit(self.num_classes)

    def extra_repr(self) -> str:
        return f"num_classes={list(self.num_classes)}" if self._listed else f"num_classes={self.num_params}"

    def _logits(self, params: Tensor, dims: Tensor | None) -> Tensor:
        if self._same:
            return params
        return params.masked_fill(self.excess if dims is None else self.excess[dims], -math.inf)

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        value = value.to(params.dtype)
        index = torch.nan_to_num(value).clamp(0, self.num_params - 1).long()
        logp = torch.log_softmax(self._logits(params, dims), -1)
        shape = torch.broadcast_shapes(index.shape, logp.shape[:-1])
        found = logp.expand(*shape, -1).gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)
        return torch.where(index == value, found, value - value - math.inf)  # NaN for NaN

    def sample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            index, none = choose(self._logits(params, dims), torch.rand_like(params[..., 0]))
            if not self._same:  # a parallel sum may come out smaller at a dimension's last category than behind it
                index = torch.minimum(index, self.last if dims is None else self.last[dims])
            return index + none

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        probs = torch.softmax(self._logits(params, dims), -1)
        return (probs * self.index.to(probs.dtype)).sum(-1)

    def relaxed(self, temperature: float) -> Head:
        raise NotImplementedError(
            "CategoricalHead has no relaxed form as a head, because such a value is a point of a simplex and not one "
            "number per dimension: take relaxed_features(params, temperature), or BernoulliHead for two classes"
        )

    def relaxed_features(
        self, params: Tensor, temperature: float, dims: Tensor | None = None, *, hard: bool = False
    ) -> Tensor:
        r"""Differentiable draws in the place of one-hot features, shape ``(*, n, num_features)``.

        :math:`\mathrm{softmax}((\theta + g) / t)` with Gumbel noise :math:`g`: each adds up to 1, and tends to the
        one-hot code of a draw as the temperature :math:`t` falls to 0.

        Args:
            params: shape ``(*, n, num_params)``.
            temperature: positive.
            dims: as elsewhere.
            hard: whether the result is one-hot, with the gradient of the soft one (straight through, biased).

        References:
            The Concrete Distribution (Maddison et al., 2016), arXiv:1611.00712.
            Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2016), arXiv:1611.01144.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"CategoricalHead: expected temperature > 0, got {temperature}")
        noise = torch.empty_like(params).exponential_().clamp_(min=torch.finfo(params.dtype).tiny).log_()
        soft = torch.softmax((self._logits(params, dims) - noise) / temperature, -1)
        if not hard:
            return soft
        top = soft.argmax(-1, keepdim=True) == self.index
        return top.to(soft.dtype) - soft.detach() + soft

    def inside(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        if self._same:
            return super().inside(value, dims)
        value = self.floating(value)
        last = self.last if dims is None else self.last[dims]
        return (value >= 0) & (value <= last) & (value == value.round())

    def allowed(self, dim: int) -> str:
        return f"one of the categories 0 to {self.num_classes[dim] - 1}"

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        value = value.unsqueeze(-1)
        return (value == self.index).to(value.dtype) + (value - value)  # NaN for NaN

    def start(self, data: Tensor | None) -> Tensor:
        if data is None:
            return super().start(None)
        counts = torch.stack([(data == k).sum(0) for k in range(self.num_params)], -1).to(data.dtype)
        return torch.log((counts + 0.5) / (len(data) + 0.5 * (self.last + 1)).unsqueeze(-1)).masked_fill(self.excess, 0)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> list[Callable[[], object]]:
        probs = torch.empty_like(params)
        coded = features.unflatten(0, (len(dims), self.num_features))
        calls: list[Callable[[], object]] = []
        source = params
        if not self._same:
            excess = self.excess[dims].unsqueeze(-1)
            calls = [partial(probs.copy_, params), partial(probs.masked_fill_, excess, -math.inf)]
            source = probs
        calls += choosing(source, z, probs, coded)
        return [*calls, partial(torch.sum, probs, 1, out=x), spoiling(x, z)]


class NormalHead(Head):
    r"""Real values, :math:`x = m + e^s z` with :math:`z \sim N(0, 1)` and :math:`s = c \tanh(a / c)`.

    The parameters are :math:`(m, a)`: the conditional of an affine autoregressive flow.  ``bias(data)`` gives means
    and log standard deviations.

    Args:
        max_log_scale: the bound :math:`c` on the absolute log-scale; data of another scale is to be standardised.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057.
    """

    num_params = 2
    discrete = False
    has_rsample = True
    constraint = constraints.real

    def __init__(self, max_log_scale: float = 5.0) -> None:
        super().__init__()
        if not 0 < max_log_scale < math.inf:
            raise ValueError(f"NormalHead: expected max_log_scale > 0, got {max_log_scale}")
        self.max_log_scale = float(max_log_scale)

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        loc, raw = params.unbind(-1)
        log_scale = soft_clip(raw, self.max_log_scale)
        z = (value.to(params.dtype) - loc) * torch.exp(-log_scale)
        return -0.5 * z * z - log_scale - 0.5 * math.log(2 * math.pi)

    def rsample(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        loc, raw = params.unbind(-1)
        return torch.addcmul(loc, torch.randn_like(loc), soft_clip(raw, self.max_log_scale).exp())

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        return params[..., 0]

    def allowed(self, dim: int) -> str:
        return "a number"

    def start(self, data: Tensor | None) -> Tensor:
        if data is None:
            return super().start(None)
        scale = data.std(0, correction=0).clamp(min=torch.finfo(data.dtype).tiny)
        return torch.stack((data.mean(0), soft_unclip(scale.log(), self.max_log_scale)), -1)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> list[Callable[[], object]]:
        bound = self.max_log_scale
        calls: list[Callable[[], object]] = [
            partial(torch.mul, params[:, 1], number(1.0 / bound, x.dtype), out=x),
            x.tanh_,
            partial(x.mul_, number(bound, x.dtype)),
            x.exp_,
            z.normal_,
            partial(torch.addcmul, params[:, 0], z, x, out=x),
        ]
        return calls if features.data_ptr() == x.data_ptr() else [*calls, partial(features.copy_, x)]
