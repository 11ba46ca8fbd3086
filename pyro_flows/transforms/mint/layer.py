"""Mint layers: monotone maps of images and series by masked convolutions, with a triangular Jacobian."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.checks import admit, integer
from pyro_flows.core.steps import Stepper
from pyro_flows.core.transform import FlowTransform
from pyro_flows.inverse.newton import solve_triangular
from pyro_flows.inverse.newton_sweeps import SolveReport, SolverSettings
from pyro_flows.nets.dense import MLP
from pyro_flows.transforms.mint.attention import Attention, AttentionNet
from pyro_flows.transforms.mint.map import MintMap, MintSteps
from pyro_flows.transforms.mint.orders import as_image, earlier_taps, kernel_of, ranks, waves
from pyro_flows.transforms.mint.slopes import convolutions, monotone
from pyro_flows.univariate.base import soft_clip

__all__ = ["Mint"]

_GAIN = 0.005  # first weights, relative to Xavier's rule

_MOST = 3.0  # bound of the logarithms of a context's factors


def _attention(
    event: Size, kernel: tuple[int, int], heads: int, head_dim: int, window: int | None, lower: bool
) -> Attention | None:
    integer("Mint", "attention", heads, 0)
    integer("Mint", "head_dim", head_dim)
    if window is not None:
        integer("Mint", "window", window)
    if not heads:
        if window is not None:
            raise ValueError(
                f"Mint: window={window} needs attention, got attention={heads}; set it to a number of heads, or leave "
                "window out"
            )
        return None
    least = 2 * (len(event) - 1) + 1
    if head_dim < least:
        raise ValueError(
            f"Mint: expected head_dim >= {least}, a pair of numbers for each axis of the event and one more, got "
            f"{head_dim}"
        )
    # With a kernel of one place, queries would see nothing.
    return Attention(kernel_of("Mint", event, max(*kernel, 3)), heads, head_dim, window, lower)


class Mint(FlowTransform):
    r"""A Mint layer: increasing in each coordinate, from data to base in one pass.

    .. math:: x = L(y) = t \odot y + \sum_k W_{3,k} * h\Bigl(\sum_j W_{2,kj} * h(W_{1,j} * y + b_{1,j}) + b_{2,k}\Bigr)
        + b_3

    by convolutions :math:`W` masked so that coordinate :math:`i` depends on those before it in a total order of
    channels and places, and on itself through center taps, each with a fixed random sign and a learned magnitude, whose
    products are never negative.  With :math:`h` increasing and :math:`t > 0` the Jacobian is triangular with a positive
    diagonal :math:`d`, and :math:`\log|\det \partial x / \partial y| = \sum_i \log d_i` exactly.  The diagonal costs
    one small matrix product per channel and place; :math:`t \le d \le t + \sum_{k,j} |a_{3,k} a_{2,kj} a_{1,j}|`.

    Base to data takes ``pyro_flows.inverse.newton.solve_triangular``, which ends for all finite parameters, after about
    as many passes as the longest chain of dependencies, ``waves.max() + 1``, or fewer, and differentiates implicitly.
    ``last_solve`` reports its costs.

    With ``attention``, each pixel (or time) adds causal attention :math:`A_i(y_{<i})` to the pixels strictly before it
    (formula in ``pyro_flows.transforms.mint.attention``).  Slopes, bounds and log-determinant stay exact.  A pass costs
    :math:`O((HW)^2)` more, the gradient keeps a softmax of that size for each head and event, and the longest chain has
    all coordinates.

    A context shifts the hidden maps, the queries and the output, and multiplies :math:`t` and the groups of the last
    convolution by positive numbers.

    Args:
        event_shape: ``(channels, height, width)`` or ``(channels, time)``.
        num_groups: hidden maps per channel, :math:`K` (paper: 45 to 85 at full size, fewer for more channels).
        kernel_size: an odd integer; a larger one makes longer chains, so sampling takes more passes.
        order: ``"channel"``, one channel after another, with shorter chains; or ``"position"``, one pixel (or time)
            after another with all its channels, which attention needs and has by default.
        lower: whether a coordinate depends on those before it, or else on those after it.
        dilation: distance of the taps of all convolutions; shortens the chains of a series by that factor.
        context_dim: size of the context, 0 for none.
        hidden_dims: widths of the hidden layers of the context's network.
        activation: :math:`h`: ``"elu"``, ``"softplus"``, ``"tanh"``, ``"sigmoid"`` or ``"leaky_relu"`` (whose density
            jumps).
        min_slope: :math:`m`, the smallest :math:`t = \sqrt{r^2 + m^2}` of a learned :math:`r`.
        attention: number of heads, 0 for none; they add zero at first.
        head_dim: size of keys and values of each head, at least 5 for images and 3 for series.
        window: the pixels back (in the order) that attention reaches; ``None`` for all.  It bounds the state that
            continues a series, not the cost of a pass.
        shared_scale: whether :math:`t` (and a context's shift of the output) is one number per channel, not per
            coordinate; a ``state_dict`` then loads into a layer for another size.
        tolerance: of the solver, relative; ``None`` for one near rounding.
        max_sweeps: limit of the solver; ``None`` for as many sweeps as needed.
        on_fail: whether to ``"raise"`` or ``"warn"`` at the limit.

    Raises:
        ValueError: for an event of another number of dimensions, an even kernel, an activation that is not increasing,
            attention in the order by channel, or options out of range.

    Example:
        >>> layer = pf.Mint((1, 6, 6), num_groups=4)
        >>> x, ladj = layer.inverse_and_ladj(torch.randn(5, 1, 6, 6))
        >>> x.shape, ladj.shape
        (torch.Size([5, 1, 6, 6]), torch.Size([5]))

    References:
        MintNet: Building Invertible Neural Networks with Masked Convolutions (Song et al., 2019), arXiv:1907.07945.
        Attention Is All You Need (Vaswani et al., 2017), arXiv:1706.03762.
        RoFormer: Enhanced Transformer with Rotary Position Embedding (Su et al., 2021), arXiv:2104.09864.
    """

    sampling_cost = "1 solve"
    density_cost = "1 pass"
    last_solve: SolveReport | None = None
    waves: Tensor
    min_slope: Tensor
    places: Tensor
    signs: Tensor
    taps_0: Tensor
    taps_1: Tensor
    taps_2: Tensor
    bias_0: Tensor
    bias_1: Tensor
    bias_2: Tensor
    net: MLP

    def __init__(
        self,
        event_shape: Iterable[int],
        *,
        num_groups: int = 16,
        kernel_size: int = 3,
        order: str | None = None,
        lower: bool = True,
        dilation: int = 1,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64,),
        activation: str = "elu",
        min_slope: float = 1e-3,
        attention: int = 0,
        head_dim: int = 16,
        window: int | None = None,
        shared_scale: bool = False,
        tolerance: float | None = None,
        max_sweeps: int | None = None,
        on_fail: str = "raise",
    ) -> None:
        super().__init__(event_shape, context_dim)
        image = as_image("Mint", self.event_shape)
        channels = image[0]
        self.kernel = kernel = kernel_of("Mint", self.event_shape, kernel_size)
        integer("Mint", "num_groups", num_groups)
        integer("Mint", "dilation", dilation)
        if not (isinstance(min_slope, (int, float)) and 0 < min_slope < 1):
            raise ValueError(f"Mint: expected min_slope between 0 and 1, got {min_slope!r}")
        rule = _attention(self.event_shape, kernel, attention, head_dim, window, bool(lower))
        self.num_groups, self.dilation, self.shared_scale = num_groups, dilation, bool(shared_scale)
        if attention and order == "channel":
            raise ValueError(
                "Mint: attention goes from pixel to pixel with all their channels, so it needs order='position', got "
                "order='channel'; leave order out, or set attention=0"
            )
        self.order, self.lower = order or ("position" if attention else "channel"), bool(lower)
        self.activation = monotone("Mint", activation).name
        self.settings = SolverSettings(tolerance, max_sweeps, on_fail).check("Mint")
        wave = waves(image, kernel, self.order, self.lower, dilation)
        if rule is not None:  # depends on all before
            wave = ranks(image, self.order, self.lower)
        self.register_buffer("waves", wave.view(self.event_shape), persistent=False)
        self._add_taps(earlier_taps(channels, kernel, self.order, self.lower))
        self.map = MintMap(f"Mint layer {tuple(self.event_shape)}", self.waves, self.convolutions, rule)
        self.attention = None if rule is None else AttentionNet(channels, rule)
        space = (1,) * (len(self.event_shape) - 1) if shared_scale else self.event_shape[1:]
        self.scale = nn.Parameter(torch.full((channels, *space), math.sqrt(1 - min_slope**2)))
        self.register_buffer("min_slope", torch.tensor(float(min_slope)), persistent=False)
        if context_dim:
            outputs = 3 * channels * num_groups + 2 * self.scale.numel() + attention * head_dim
            self.net = MLP(0, outputs, hidden_dims=hidden_dims, context_dim=context_dim)

    def _add_taps(self, earlier: Tensor) -> None:
        """Makes the parameters of the convolutions, and their places in the weights."""
        channels, groups = earlier.shape[0], self.num_groups
        middle = torch.zeros_like(earlier)
        middle[:, :, self.kernel[0] // 2, self.kernel[1] // 2] = torch.eye(channels, dtype=torch.bool)
        free, center = (each.flatten().nonzero().squeeze(-1) for each in (earlier, middle))
        self.convolutions = convolutions(monotone("Mint", self.activation), earlier | middle, groups, self.dilation)
        self.register_buffer("places", torch.cat((free, center)), persistent=False)
        area = math.prod(self.kernel) * channels
        sides = ((groups, 1), (groups, groups), (1, groups))
        std = [_GAIN * math.sqrt(2 / (area * (out + into))) for out, into in sides]
        for k, (out, into) in enumerate(sides):
            # Hidden channel c * K + k belongs to channel c.
            taps = std[k] * torch.randn(len(free), out, into)
            if len(free):
                self.register_parameter(f"taps_{k}", nn.Parameter(taps))
            else:  # some optimizers fail on empty parameters
                self.register_buffer(f"taps_{k}", taps, persistent=False)
            bound = 1 / math.sqrt(area * into) if k < 2 else 0.0
            self.register_parameter(f"bias_{k}", nn.Parameter(bound * (2 * torch.rand(channels * out) - 1)))
        # Centers of one channel and group: K of the second convolution, one of the first, one of the third.
        widths = torch.tensor([*[std[1]] * groups, std[0], std[2]])
        self.centres = nn.Parameter(widths * torch.randn(channels, groups, groups + 2))
        signs = 2.0 * torch.randint(0, 2, (2, channels, groups)) - 1
        self.register_buffer("signs", signs.to(self.centres.dtype))

    def _dense(self, taps: Tensor, centers: Tensor) -> Tensor:
        """A convolution's weight from its free taps ``(F, out, in)`` and centers ``(C, out, in)``."""
        channels, (_, out, into) = self.event_shape[0], taps.shape
        table = taps.new_zeros(channels * channels * math.prod(self.kernel), out, into)
        table = table.index_copy(0, self.places, torch.cat((taps, centers)))
        blocks = table.view(channels, channels, *self.kernel, out, into).permute(0, 4, 1, 5, 2, 3)
        return blocks.reshape(channels * out, channels * into, *self.kernel)

    def _weights(self, context: Tensor | None, batch: Size) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Shared tensors, and tensors with an entry for each row; see ``MintMap.split``."""
        square, first, last = self.centres.abs().split((self.num_groups, 1, 1), -1)
        # Free signs for the first and the third convolution, their product for the second.
        into, out = self.signs.unsqueeze(-1)
        square, first, last = square * (out * into.mT), first * into, last * out
        shared = (
            *(() if self.attention is None else self.attention.weights()),
            self._dense(self.taps_0, first),
            self._dense(self.taps_1, square),
            self._dense(self.taps_2, last.mT),
            square * first.mT,
            last.squeeze(-1).contiguous(),
        )
        scale = torch.hypot(self.scale, self.min_slope)
        row = (1,) if len(self.event_shape) == 2 else ()
        space = row + scale.shape[1:]
        if context is None:
            last = self.bias_2[:, None, None]
            return (*shared, self.bias_0, self.bias_1, last, scale.view(-1, *space)), ()
        hidden, rows = self.bias_0.numel(), batch.numel()
        made = self.net(context[..., :0], context).squeeze(-1).to(scale.dtype).expand(*batch, -1)
        sizes = [hidden] * 3 + [scale.numel()] * 2
        made = made.reshape(rows, made.shape[-1])
        first, second, gate, stretch, last = made[:, : sum(sizes)].split(sizes, -1)
        stretch = soft_clip(stretch.view(rows, *scale.shape), _MOST).exp()
        scale = self.min_slope + (scale - self.min_slope) * stretch
        last = last.view(scale.shape) + self.bias_2.view(-1, *(1 for _ in self.event_shape[1:]))
        spread = [each.view(rows, each.shape[1], *space) for each in (last, scale)]
        rowwise = (self.bias_0 + first, self.bias_1 + second, *spread, soft_clip(gate, _MOST).exp())
        return shared, rowwise if self.attention is None else (*rowwise, made[:, sum(sizes) :])

    def inverse_and_log_slopes(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to base, and :meth:`log_slopes`, for a checked value and context."""
        batch = self._batch_of(y)
        rows = y.reshape(batch.numel(), *self.event_shape)
        x, slopes = self.map.value_and_slope(rows, *self._weights(context, batch))
        return x.view(y.shape), slopes.log().view(y.shape)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logs = self.inverse_and_log_slopes(y, context)
        return x, logs.flatten(-len(self.event_shape)).sum(-1)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch = self._batch_of(x)
        shared, rowwise = self._weights(context, batch)
        rows = x.reshape(batch.numel(), *self.event_shape).to(self.scale.dtype)
        y, self.last_solve = solve_triangular(self.map, rows, shared, rowwise, self.settings)
        slopes = self.map.value_and_slope(y, shared, rowwise)[1]
        return y.view(x.shape), -slopes.log().flatten(1).sum(-1).view(batch)

    def log_slopes(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        r""":math:`\log d_i = \log \partial x_i / \partial y_i`, of the shape of ``y``; the sum is the log-determinant.

        Summed over the layers of a flow of one orientation, plus the base's log-density at each coordinate: the exact
        log-density of each coordinate given those before it.

        Args:
            y: data-side value, shape ``(*batch, *event_shape)``.
            context: shape ``(*context_batch, context_dim)``, broadcast against the batch.
        """
        return self.inverse_and_log_slopes(admit(self, y, context, data_side=True), context)[1]

    @property
    def _causal(self) -> bool:
        """Whether each step of a series depends only on those before it, with all their channels."""
        by_time = self.order == "position" or self.event_shape[0] == 1
        return len(self.event_shape) == 2 and self.lower and by_time

    @property
    def reach(self) -> int | None:
        if not self._causal:
            return None
        convolved = 3 * (self.kernel[1] // 2) * self.dilation
        return convolved if self.attention is None else self.attention.rule.reach(convolved)

    @property
    def shared_over_time(self) -> bool:
        return len(self.event_shape) == 2 and self.shared_scale

    def stepper(self, rows: int, context: Tensor | None = None) -> Stepper:
        """Goes through a series step by step; see :mod:`pyro_flows.core.steps`.

        Args:
            rows: number of series at once.
            context: shape ``(rows, context_dim)``, for a layer that takes one.

        Raises:
            ValueError: for a layer that does not go by time, or whose parameters differ between times.
        """
        if not (self._causal and self.shared_over_time):
            raise ValueError(
                f"Mint: expected a layer of a series (C, T) with lower=True, order='position' and shared_scale=True to "
                f"go through step by step, got event shape {tuple(self.event_shape)}, lower={self.lower}, "
                f"order={self.order!r}, shared_scale={self.shared_scale}; see mintnet(..., causal=True)"
            )
        side = self.kernel[1] // 2
        return MintSteps(self.map, self.settings, side, self.dilation, rows, *self._weights(context, Size([rows])))

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("last_solve", None)
        return state

    def extra_repr(self) -> str:
        kind = "lower" if self.lower else "upper"
        apart = f", dilation={self.dilation}" if self.dilation > 1 else ""
        return (
            f"{super().extra_repr()}, num_groups={self.num_groups}, {kind}, by {self.order}, {self.activation}{apart}"
        )
