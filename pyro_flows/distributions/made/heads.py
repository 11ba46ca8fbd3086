"""Heads of binary values, categories, levels and real numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.core.checks import integer, joint_shape, positive_integers
from pyro_flows.distributions.made.head import Calls, Head
from pyro_flows.univariate.base import number, soft_clip

__all__ = [
    "BernoulliHead",
    "CategoricalHead",
    "LogisticMixtureHead",
    "MixtureHead",
    "NormalHead",
    "RelaxedBernoulliHead",
]


def _positive(name: str, what: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected {what} > 0, got {value}")
    return float(value)


def _off_ends(value: Tensor) -> Tensor:
    info = torch.finfo(value.dtype)
    return value.clamp(info.tiny, 1 - info.eps / 2)


def _unclip(value: Tensor, bound: float) -> Tensor:
    """The inverse of ``soft_clip``, bounded near the bound."""
    return torch.atanh((value / bound).clamp(-0.99, 0.99)) * bound


def _choosing(logits: Tensor, z: Tensor, room: Tensor, coded: Tensor, beyond: Tensor | None = None) -> Calls:
    """Calls that choose categories in place, by inversion of the cumulative probabilities.

    ``logits``, ``room`` and ``coded`` have shape ``(n, K, columns)``; ``room`` may be the memory of ``logits``.  ``z``,
    uniform in [0, 1) of shape ``(n, columns)``, becomes NaN where the logits are.  ``room`` becomes 1 for the
    categories before the chosen one, ``coded`` the one-hot code.  ``beyond``, shape ``(n, K, 1)``, is true from each
    dimension's last category on.
    """
    calls: Calls = [
        partial(torch.softmax, logits, 1, out=room),
        partial(torch.cumsum, room, 1, out=room),
        partial(z.mul_, room[:, -1]),  # all categories share the rounding
        partial(room.le_, z.unsqueeze(1)),
    ]
    if beyond is not None:  # an accelerator's parallel sum may be smaller at the last category than behind it
        calls.append(partial(room.masked_fill_, beyond, 0))
    return [
        *calls,
        partial(torch.eq, room[:, 0], 0, out=coded[:, 0]),
        partial(torch.sub, room[:, :-1], room[:, 1:], out=coded[:, 1:]),
    ]


def _spoiling(x: Tensor, z: Tensor) -> Callable[[], object]:
    """A call that spreads NaN from ``z`` to ``x``."""
    return partial(x.addcmul_, z, number(0.0, z.dtype) if z.device.type == "cpu" else torch.zeros_like(z))


def _copying(x: Tensor, features: Tensor) -> Calls:
    """Calls that copy values to features."""
    return [] if features.data_ptr() == x.data_ptr() else [partial(features.copy_, x)]


class RelaxedBernoulliHead(Head):
    r"""Values in (0, 1), :math:`x = \sigma((\theta + \ell) / t)` with logistic noise :math:`\ell` and temperature t.

    The parameter is the logit of a binary variable, which is 1 where :math:`x > 1/2` and to which x tends as the
    temperature falls to 0.  The density is that of x, so a bound on the evidence is one of the relaxed model.  Draws
    and values stay off 0 and 1 by the smallest positive number and by one rounding error.  In float32, at temperatures
    below some 0.2, densities near 1 have few digits.

    Args:
        temperature: :math:`t > 0`; the attribute may be changed later.

    Example:
        >>> made = pf.MADE(8, pf.distributions.RelaxedBernoulliHead(temperature=0.5))
        >>> x = made.rsample((5,))
        >>> bool(((x > 0) & (x < 1)).all())
        True

    References:
        The Concrete Distribution (Maddison et al., 2016), arXiv:1611.00712.
        Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2016), arXiv:1611.01144.
    """

    discrete = False
    has_rsample = True
    constraint = constraints.unit_interval

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = _positive("RelaxedBernoulliHead", "temperature", temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        value = _off_ends(value.to(params.dtype))
        log_value, log_rest = torch.log(value), torch.log1p(-value)
        noise = (log_value - log_rest) * self.temperature - params.squeeze(-1)
        # The noise's logistic density, and the slope t / (x (1 - x)).
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


class BernoulliHead(Head):
    r"""Binary values, :math:`p(x = 1) = \sigma(\theta)`; :math:`\theta` is a logit in nats.

    ``bias(data)`` gives the logits of the means, with half an observation added on either side.

    Example:
        >>> made = pf.MADE(8, pf.distributions.BernoulliHead())  # or "bernoulli"
        >>> x = made.sample((5,))
        >>> bool(((x == 0) | (x == 1)).all())
        True

    References:
        MADE (Germain et al., 2015), arXiv:1502.03509.
    """

    constraint = constraints.boolean

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        # Unlike x t - softplus(t), exact for nearly certain values.
        return F.logsigmoid((2 * value.to(params.dtype) - 1) * params.squeeze(-1))

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

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> Calls:
        # 1 where p > z, else the difference rounds up to a negative zero; a comparison would lose NaN.
        return [
            partial(torch.sigmoid, params[:, 0], out=features),
            partial(features.sub_, z),
            features.ceil_,
            features.abs_ if features.data_ptr() == x.data_ptr() else partial(torch.abs, features, out=x),
        ]


class CategoricalHead(Head):
    r"""Categories 0 to :math:`K_i - 1`, :math:`p(x = k) = e^{\theta_k} / \sum_{l < K_i} e^{\theta_l}`.

    Logits are in nats.  The network sees one-hot categories, of the largest number of classes; a dimension's excess
    logits are excluded.  ``bias(data)`` gives log frequencies, with half an observation added to each.  ``mean``
    averages category numbers, for ordered ones.

    Args:
        num_classes: the number :math:`K_i` of classes, one for all dimensions or one for each.

    Raises:
        ValueError: for numbers that are not positive integers, none above 1, or (in ``bind``) not one a dimension.

    Example:
        >>> made = pf.MADE(2, pf.distributions.CategoricalHead([3, 5]))
        >>> x = torch.cartesian_prod(torch.arange(3.0), torch.arange(5.0))
        >>> round(made.log_prob(x).exp().sum().item(), 3)
        1.0
    """

    index: Tensor
    last: Tensor
    excess: Tensor

    def __init__(self, num_classes: int | Iterable[int]) -> None:
        super().__init__()
        counts = positive_integers("CategoricalHead", "num_classes", num_classes)
        if max(counts) < 2:
            raise ValueError(f"CategoricalHead: expected num_classes of at least 2 somewhere, got {num_classes!r}")
        self.num_classes = counts
        self._same, self._listed = len(set(counts)) == 1, not isinstance(num_classes, int)
        self.num_params = self.num_features = max(counts)
        if self._same:
            self.constraint = constraints.integer_interval(0, self.num_params - 1)
        self.register_buffer("index", torch.arange(self.num_params), persistent=False)
        self._limit(())

    def _limit(self, counts: tuple[int, ...]) -> None:
        """Sets each dimension's last category and excess logits."""
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

    def tiled(self, places: int) -> Head:
        if not self._listed:
            return super().tiled(places)
        made = CategoricalHead([count for count in self.num_classes for _ in range(places)])
        return made.to(self.like).bind(self.input_dim * places)

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
        shape = joint_shape(index.shape, logp.shape[:-1])
        found = logp.expand(*shape, -1).gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)
        return torch.where(index == value, found, value - value - math.inf)  # NaN for NaN

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
        r"""Differentiable draws in place of one-hot features, shape ``(*, n, num_features)``.

        :math:`\mathrm{softmax}((\theta + g) / t)` with Gumbel noise :math:`g` tends to the one-hot code of a draw as
        the temperature :math:`t` falls to 0.

        Args:
            params: shape ``(*, n, num_params)``.
            temperature: positive.
            dims: the dimensions of the columns, by default all.
            hard: whether to return one-hot codes with the gradient of the soft ones (straight through, biased).

        References:
            See :class:`RelaxedBernoulliHead`.
        """
        _positive("CategoricalHead", "temperature", temperature)
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

    def num_values(self) -> list[int | None]:
        return [*self.num_classes]

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        value = value.unsqueeze(-1)
        return (value == self.index).to(value.dtype) + (value - value)  # NaN for NaN

    def start(self, data: Tensor | None) -> Tensor:
        if data is None:
            return super().start(None)
        counts = torch.stack([(data == k).sum(0) for k in range(self.num_params)], -1).to(data.dtype)
        return torch.log((counts + 0.5) / (len(data) + 0.5 * (self.last + 1)).unsqueeze(-1)).masked_fill(self.excess, 0)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> Calls:
        probs = torch.empty_like(params)
        coded = torch.unflatten(features, 0, (len(dims), self.num_features))
        if self._same:
            calls = _choosing(params, z, probs, coded)
        else:
            excess, last = self.excess[dims].unsqueeze(-1), self.last[dims, None, None]
            beyond = None if x.device.type == "cpu" else self.index.unsqueeze(-1) >= last
            calls = [
                partial(probs.copy_, params),
                partial(probs.masked_fill_, excess, -math.inf),
                *_choosing(probs, z, probs, coded, beyond),
            ]
        return [*calls, partial(torch.sum, probs, 1, out=x), _spoiling(x, z)]


class NormalHead(Head):
    r"""Real values, :math:`x = m + e^s z` with :math:`z \sim N(0, 1)` and :math:`s = c \tanh(a / c)`.

    The parameters are :math:`(m, a)`: the conditional of an affine autoregressive flow.  ``bias(data)`` gives means and
    log standard deviations.

    Args:
        max_log_scale: the bound :math:`c` on the absolute log-scale; standardize data of another scale.

    Example:
        >>> made = pf.MADE(3, pf.distributions.NormalHead(), context_dim=2)  # or "normal"
        >>> made.log_prob(torch.randn(7, 3), torch.randn(7, 2)).shape
        torch.Size([7])

    References:
        Masked Autoregressive Flow (Papamakarios et al., 2017), arXiv:1705.07057.
    """

    num_params, location = 2, slice(0, 1)
    discrete, has_rsample, constraint = False, True, constraints.real

    def __init__(self, max_log_scale: float = 5.0) -> None:
        super().__init__()
        self.max_log_scale = _positive("NormalHead", "max_log_scale", max_log_scale)

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

    def start(self, data: Tensor | None) -> Tensor:
        if data is None:
            return super().start(None)
        return self.normal(data.mean(0), data.std(0, correction=0).clamp(min=torch.finfo(data.dtype).tiny))

    def normal(self, loc: Tensor, scale: Tensor) -> Tensor:
        return torch.stack((loc, _unclip(scale.log(), self.max_log_scale)), -1)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> Calls:
        bound = self.max_log_scale
        return [
            partial(torch.mul, params[:, 1], number(1.0 / bound, x.dtype), out=x),
            x.tanh_,
            partial(x.mul_, number(bound, x.dtype)),
            x.exp_,
            z.normal_,
            partial(torch.addcmul, params[:, 0], z, x, out=x),
            *_copying(x, features),
        ]


class _Mixture(Head):
    """Abstract base of mixtures; parameters are all logits, then all means, then all log-scales."""

    def __init__(self, num_components: int, max_log_scale: float) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_components = integer(name, "num_components", num_components)
        self.max_log_scale = _positive(name, "max_log_scale", max_log_scale)
        self.num_params = 3 * num_components

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, means and log-scales, shape ``(*, n, num_components)``."""
        logits, loc, raw = torch.unflatten(params, -1, (3, self.num_components)).unbind(-2)
        return logits, loc, soft_clip(raw, self.max_log_scale)

    def _middles(self, dtype: torch.dtype) -> Tensor:
        """The middles of ``num_components`` equal parts of (0, 1)."""
        return (torch.arange(self.num_components, dtype=dtype, device=self.like.device) + 0.5) / self.num_components

    def _quantiles(self, data: Tensor) -> Tensor:
        """The data's quantiles at the middles, shape ``(D, num_components)``."""
        places = self._middles(torch.double) * (len(data) - 1)
        return data.sort(0).values[places.round().long()].T

    def _packed(self, loc: Tensor, scale: Tensor, logits: Tensor | None = None) -> Tensor:
        """Parameters, of equal weights unless others are given."""
        raw = _unclip(scale.log().expand_as(loc), self.max_log_scale)
        return torch.cat((torch.zeros_like(loc) if logits is None else logits, loc, raw), -1)

    def _picking(self, z: Tensor, params: Tensor, x: Tensor) -> tuple[Calls, Tensor]:
        """Calls that draw a component: its mean to ``x``, its scale to the result."""
        logits, loc, raw = torch.unflatten(params, 1, (3, self.num_components)).unbind(1)
        room, code, scale = torch.empty_like(logits), torch.empty_like(logits), torch.empty_like(x)
        bound = self.max_log_scale
        calls: Calls = [
            *_choosing(logits, z, room, code),
            partial(torch.mul, code, raw, out=room),
            partial(torch.sum, room, 1, out=scale),
            partial(scale.mul_, number(1.0 / bound, x.dtype)),
            scale.tanh_,
            partial(scale.mul_, number(bound, x.dtype)),
            scale.exp_,
            partial(torch.mul, code, loc, out=room),
            partial(torch.sum, room, 1, out=x),
            _spoiling(x, z),
        ]
        return calls, scale


class MixtureHead(_Mixture):
    r"""Real values from a mixture of normals, :math:`p(x) = \sum_j w_j N(x; m_j, e^{2 s_j})`.

    The parameters are the logits of :math:`w` of all :math:`K` components, their means :math:`m`, and :math:`a` with
    :math:`s = c \tanh(a / c)`.  ``bias()`` spreads the means over the quantiles of a standard normal, ``bias(data)``
    over those of the data; the scales make up the variance.  A MADE with this head is the MADE-MoG.  A draw costs as
    much as one of a normal.

    Args:
        num_components: the number :math:`K` of components.
        max_log_scale: the bound :math:`c` on the absolute log-scale; standardize data of another scale.

    Example:
        >>> made = pf.MADE(3, pf.distributions.MixtureHead(num_components=5))
        >>> made.log_prob(torch.randn(7, 3)).shape
        torch.Size([7])

    References:
        RNADE (Uria et al., 2013), arXiv:1306.0186.
        Masked Autoregressive Flow (Papamakarios et al., 2017), arXiv:1705.07057.
    """

    discrete, constraint = False, constraints.real

    def __init__(self, num_components: int = 10, max_log_scale: float = 5.0) -> None:
        super().__init__(num_components, max_log_scale)
        self.location = slice(self.num_components, 2 * self.num_components)

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits, loc, log_scale = self._parts(params)
        z = (value.to(params.dtype).unsqueeze(-1) - loc) * torch.exp(-log_scale)
        joint = torch.log_softmax(logits, -1) - 0.5 * z * z - log_scale
        return torch.logsumexp(joint, -1) - 0.5 * math.log(2 * math.pi)

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits, loc, _ = self._parts(params)
        return (torch.softmax(logits, -1) * loc).sum(-1)

    def start(self, data: Tensor | None) -> Tensor:
        middles = torch.special.ndtri(self._middles(torch.double))
        rest = (1 - middles.square().mean()).sqrt()  # the deviation that the means leave
        if data is None:
            return self._packed(middles.expand(self.input_dim, -1), rest.expand(self.input_dim, 1))
        scale = data.double().std(0, correction=0).unsqueeze(-1).clamp(min=torch.finfo(data.dtype).tiny)
        return self._packed(self._quantiles(data).double(), rest * scale)

    def normal(self, loc: Tensor, scale: Tensor) -> Tensor:
        apart = 0.5 * torch.special.ndtri(self._middles(torch.double))  # so near that their sum is a normal to 1e-3
        scale = scale.double().unsqueeze(-1)
        return self._packed(loc.unsqueeze(-1) + scale * apart, scale * (1 - apart.square().mean()).sqrt())

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> Calls:
        calls, scale = self._picking(z, params, x)
        return [*calls, z.normal_, partial(x.addcmul_, z, scale), *_copying(x, features)]


ROWS, WEIGHINGS = 2000, 20  # of a logistic mixture's start
NARROW, REST = 0.15, 1 / 16  # least scales: of a spike, in levels, and of the rest, in units of half the range


class LogisticMixtureHead(_Mixture):
    r"""Levels 0 to :math:`L - 1`, such as those of a pixel, from a mixture of logistics cut into bins.

    .. math:: P(x = k) = \sum_j w_j
        \left[\sigma\!\left(\frac{k + 1/2 - M_j}{S_j}\right) - \sigma\!\left(\frac{k - 1/2 - M_j}{S_j}\right)\right],

    with the tails added to the first and the last level.  The parameters are the logits of :math:`w` of all :math:`K`
    components, their means :math:`m`, and :math:`a`, in units in which levels go from -1 to 1: :math:`M = (m + 1) h`
    and :math:`S = h e^{c \tanh(a / c)}` with :math:`h = (L - 1) / 2`.  The network sees :math:`x / h - 1`.

    Log-masses are accurate far out in the tails; probabilities add up to 1.  ``bias()`` spreads the means evenly,
    ``bias(data)`` gives each component a part of the sorted data, and weights them by expectation maximization.
    ``mean`` sums over all levels.

    Args:
        levels: the number :math:`L` of levels.
        num_components: the number :math:`K` of components.
        max_log_scale: the bound :math:`c`; by default the smallest scale is about a tenth of a level, and at most
            :math:`e^{-7}`.

    Example:
        >>> head = pf.distributions.LogisticMixtureHead(levels=16, num_components=3)
        >>> x = pf.MADE(4, head).sample((5,))
        >>> bool(((x >= 0) & (x <= 15)).all())
        True

    References:
        PixelCNN++ (Salimans et al., 2017), arXiv:1701.05517.
    """

    def __init__(self, levels: int = 256, num_components: int = 10, max_log_scale: float | None = None) -> None:
        self.levels = integer("LogisticMixtureHead", "levels", levels, 2)
        self.half_range = 0.5 * (levels - 1)
        super().__init__(
            num_components, max(7.0, math.log(10 * self.half_range)) if max_log_scale is None else max_log_scale
        )
        self.constraint = constraints.integer_interval(0, levels - 1)

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits; means and log-scales in levels."""
        logits, loc, log_scale = super()._parts(params)
        return logits, (loc + 1) * self.half_range, log_scale + math.log(self.half_range)

    def log_prob(self, value: Tensor, params: Tensor, dims: Tensor | None = None) -> Tensor:
        return torch.logsumexp(self._joint(value, params), -1)

    def _joint(self, value: Tensor, params: Tensor) -> Tensor:
        """The log-mass of a value and each component, along the last dimension."""
        logits, loc, log_scale = self._parts(params)
        level = value.to(params.dtype).unsqueeze(-1)
        rate = torch.exp(-log_scale)
        # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - e^(a - b)), without cancellation; b - a is the rate.
        upper = F.logsigmoid((level + 0.5 - loc) * rate)
        lower = F.logsigmoid((loc - (level - 0.5)) * rate)
        width = torch.log(-torch.expm1(-rate))
        first, last = level <= 0, level >= self.levels - 1
        zero = torch.zeros_like(upper)
        mass = torch.where(last, zero, upper) + torch.where(first, zero, lower + torch.where(last, zero, width))
        return torch.log_softmax(logits, -1) + mass

    def mean(self, params: Tensor, dims: Tensor | None = None) -> Tensor:
        logits, loc, log_scale = self._parts(params)
        rate = torch.exp(-log_scale)
        above = torch.zeros_like(loc)
        for level in range(1, self.levels):  # the sum of P(x >= level)
            above = above + torch.sigmoid((loc - (level - 0.5)) * rate)
        return (torch.softmax(logits, -1) * above).sum(-1)

    def allowed(self, dim: int) -> str:
        return f"a level, 0 to {self.levels - 1},"

    def code(self, value: Tensor, dims: Tensor | None = None) -> Tensor:
        return (value * (1.0 / self.half_range) - 1).unsqueeze(-1)

    def start(self, data: Tensor | None) -> Tensor:
        if data is None:
            loc = (2 * self._middles(self.like.dtype) - 1).expand(self.input_dim, -1)
            return self._packed(loc, loc.new_full((self.input_dim, 1), 1 / self.num_components))
        rows = data[:: -(-len(data) // ROWS)]
        parts = (rows / self.half_range - 1).sort(0).values.tensor_split(self.num_components)
        filled = [part if len(part) else rows[-1:] / self.half_range - 1 for part in parts]
        loc = torch.stack([part.mean(0) for part in filled], -1)
        # A logistic of scale 1 has a standard deviation of 1.8.  The last component covers what others leave out.
        scale = torch.stack([part.std(0, correction=0) for part in filled], -1) / 1.8
        scale = scale.clamp(min=NARROW / self.half_range)
        scale[:, -1] = scale[:, -1].clamp(min=REST)
        logits = torch.zeros_like(loc)
        for _ in range(WEIGHINGS):  # expectation maximization of the weights
            shares = self._joint(rows, self._packed(loc, scale, logits)).softmax(-1).mean(0)
            logits = (shares + 1e-3).log()
        return self._packed(loc, scale, logits)

    def draws(self, dims: Tensor, z: Tensor, params: Tensor, x: Tensor, features: Tensor) -> Calls:
        calls, scale = self._picking(z, params, x)
        half, one = number(self.half_range, x.dtype), number(1.0, x.dtype)
        return [
            *calls,
            z.uniform_,
            z.logit_,
            partial(x.addcmul_, z, scale),
            partial(x.add_, one),
            partial(x.mul_, half),
            x.round_,
            partial(x.clamp_, 0, self.levels - 1),
            partial(torch.mul, x, number(1.0 / self.half_range, x.dtype), out=features),
            partial(features.sub_, one),
        ]
