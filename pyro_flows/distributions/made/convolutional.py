"""MADE with the same network at all places of images and sequences: convolutional, recurrent or attending."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Size, Tensor, nn

from pyro_flows.core.checks import (
    check_context,
    check_tensor,
    choice,
    event_size,
    integer,
    joint_shape,
    positive_integers,
    refuse_as_site,
)
from pyro_flows.core.recipes import remembered
from pyro_flows.distributions.made.autoregressive import AutoregressiveDistribution, AutoregressiveModel
from pyro_flows.distributions.made.composed import as_head
from pyro_flows.distributions.made.head import Head
from pyro_flows.distributions.made.network import Member
from pyro_flows.distributions.made.steps import ModelSteps
from pyro_flows.distributions.shared import by_row
from pyro_flows.inverse.raster import RasterSweep, rows_at_once
from pyro_flows.nets.activations import Activation, activation_functions
from pyro_flows.nets.masked_convolutional import Stacks
from pyro_flows.nets.tokens import CausalAttention, TokenNet

__all__ = ["ConvMADE"]

IMAGE_LAYERS, LEAST_LAYERS, MOST_LAYERS = 7, 4, 12


def _sides(image: bool, kernel_size: int | Sequence[int], layers: int) -> list[int]:
    """How many neighbors on one side each kernel sees."""
    given = positive_integers("ConvMADE", "kernel_size", kernel_size)
    if image and any(size % 2 == 0 for size in given):
        raise ValueError(f"ConvMADE: expected odd kernel sizes for images, got {kernel_size!r}")
    least = 3 if image else 2
    if given[0] < least:
        raise ValueError(
            f"ConvMADE: expected a kernel_size of at least {least} in the first layer, which does not see the place "
            f"itself, got {kernel_size!r}"
        )
    sizes = itertools.chain(given, itertools.repeat(given[-1]))
    return [size // 2 if image else size - 1 for size in itertools.islice(sizes, layers)]


def _distances(given: int | Sequence[int] | None, image: bool, length: int, sides: Sequence[int]) -> list[int]:
    """The dilation of each layer."""
    if given is not None or image:
        later = itertools.cycle(positive_integers("ConvMADE", "dilations", (1, 2) if given is None else given))
        return [1, *itertools.islice(later, len(sides) - 1)]
    found, reach, step = [1], sides[0], 1
    for side in sides[1:]:
        if reach >= length - 1:  # everything is seen: start over
            reach, step = sides[0], 1
        found.append(step)
        reach, step = reach + side * step, step * 2
    return found


def _heads(head: str | Head, event: Size) -> tuple[Head, Head | None]:
    """A head for all dimensions and one for the channels, ``None`` where places differ."""
    try:
        own = as_head(head, event[0])
    except ValueError:
        return as_head(head, event.numel()), None
    return own.tiled(event[1:].numel()), own


@remembered
class ConvMADE(AutoregressiveModel):
    r"""MADE of images and sequences: :math:`p(x \mid c) = \prod_i p(x_i \mid x_{<i}, c)`, one network for all places.

    Images ``(C, H, W)`` are in raster order, sequences ``(C, T)`` in time, with the channels of a place in turn.  The
    event's channels share out the hidden channels.  Outputs start at the head's biases.  Three networks see the past:

    - ``"conv"``: masked convolutions.  Images have two stacks: one over the rows above, one over the past of the same
      row, which reads the first at every layer, so there is no blind spot to the upper right.  Sequences have only the
      second, dilated.  Kernels and dilations bound how far back a conditional looks.
    - ``"gru"``: a recurrent network, whose state sums up the whole past.
    - ``"attention"``: blocks of causal attention with rotary places, to the last ``window`` places or to all.

    ``reach`` is the number of steps (for convolutions over images, of rows or columns) back that are seen, ``None`` for
    all; beyond, a conditional knows positions only.  Without ``positions``, the default for sequences by ``"gru"`` and
    ``"attention"``, no parameter depends on the place: a sequence may have any length (``lengths``, :meth:`at_length`),
    and :class:`~pyro_flows.infer.Stream` continues it without end.

    A density costs one pass; in a pass, a GRU goes through the places one after another, and attention costs a score
    for each pair of places and head.  A draw goes from place to place with cached states: a convolution or GRU costs
    the same at each, attention in proportion to the window or the places before.  Differentiable draws (``rsample``) of
    convolutions take one pass for each dimension, those of the others one draw.  By ``"gru"`` and
    ``"attention"``, second derivatives need a value or a context that requires a gradient.

    Args:
        event_shape: ``(C, H, W)`` or ``(C, T)``.
        head: ``"bernoulli"``, ``"normal"``, ``"mixture"``, ``"logistic"``, or a head such as ``CategoricalHead(256)``.
            A head that lists dimensions lists the ``C`` channels, or all dimensions.
        network: ``"conv"``, ``"gru"`` or ``"attention"``.
        hidden_channels: hidden channels of each stack, or the size of the GRU's or attention's output; at least ``C``.
        num_layers: number of convolutions, GRU layers or blocks of attention; by default 7 convolutions for images, and
            for sequences enough to see the whole past, from 4 to 12; 1 GRU layer; 2 blocks.
        kernel_size: of convolutions, by default ``(7, 3)``: odd for images; for sequences the steps seen, including the
            present.  One for all layers or one for each, the last repeated; at least 3 (images) or 2 (sequences) in the
            first layer.
        dilations: distances within later kernels, repeated as necessary; by default 1, 2 for images, and for sequences
            1, 2, 4, ... until all is seen.
        num_heads: heads of attention, a divisor of ``hidden_channels``; by default 4, 2 or 1.
        window: the places that a block of attention sees, the last one before the present included; by default all.
        context_dim: size of the context, 0 for none; it enters every layer's bias, or the input and output of the GRU
            or attention.  It is the same at all places.
        positions: whether the first layer's bias depends on the place, and the output bias on the dimension.
        activation: a name or an elementwise function, or one for each layer (for the GRU and attention, for each of
            two hidden layers behind them).

    Raises:
        ValueError: for other events, even kernels for images, too few hidden channels, sizes out of range, options of
            another network, or an unknown head.

    Example:
        >>> made = pf.ConvMADE((1, 8, 8), "bernoulli", hidden_channels=16, num_layers=2)
        >>> x = made.sample((5,))
        >>> made.log_prob(x).shape
        torch.Size([5])

    References:
        Pixel Recurrent Neural Networks (van den Oord et al., 2016), arXiv:1601.06759.
        Two stacks: PixelCNN Decoders (van den Oord et al., 2016), arXiv:1606.05328.
        Dilation: WaveNet (van den Oord et al., 2016), arXiv:1609.03499.
        GRU: Learning Phrase Representations (Cho et al., 2014), arXiv:1406.1078.
        Attention: Attention Is All You Need (Vaswani et al., 2017), arXiv:1706.03762; over images: Image Transformer
        (Parmar et al., 2018), arXiv:1802.05751; places: RoFormer (Su et al., 2021), arXiv:2104.09864.
    """

    order: Tensor
    net: Stacks | TokenNet
    reach: int | None

    def __init__(
        self,
        event_shape: Sequence[int],
        head: str | Head = "bernoulli",
        *,
        network: str = "conv",
        hidden_channels: int = 64,
        num_layers: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        dilations: int | Sequence[int] | None = None,
        num_heads: int | None = None,
        window: int | None = None,
        context_dim: int = 0,
        positions: bool | None = None,
        activation: Activation = "elu",
    ) -> None:
        event = event_size(event_shape)
        if len(event) not in (2, 3):
            raise ValueError(
                f"ConvMADE: expected event_shape to be (C, H, W) or (C, T), got {tuple(event)}; for vectors see MADE"
            )
        whole, own = _heads(head, event)
        super().__init__(event, whole, integer("ConvMADE", "context_dim", context_dim, 0))
        self._own_head = (own,)  # not a part of the module, which has it tiled
        self.network = choice("ConvMADE", "network", network, ("conv", "gru", "attention"))
        self.hidden_channels = integer("ConvMADE", "hidden_channels", hidden_channels)
        if hidden_channels < event[0]:
            raise ValueError(
                f"ConvMADE: expected hidden_channels to be at least the number of channels {event[0]}, since each "
                f"needs one of its own, got {hidden_channels}"
            )
        options = {"kernel_size": kernel_size, "dilations": dilations, "num_heads": num_heads, "window": window}
        for name, given in options.items():
            needed = "attention" if name in ("num_heads", "window") else "conv"
            if given is not None and network != needed:
                raise ValueError(
                    f'ConvMADE: expected {name} with network="{needed}" only, got {given!r} with "{network}"; leave it '
                    "out"
                )
        if num_layers is not None:
            integer("ConvMADE", "num_layers", num_layers)
        self.positions = network == "conv" or len(event) == 3 if positions is None else bool(positions)
        if network == "conv":
            self.net = self._convolutions(
                num_layers, (7, 3) if kernel_size is None else kernel_size, dilations, activation
            )
        else:
            self.net = self._tokens(num_layers, num_heads, window, activation)
        start = self.head.bias().to(next(self.net.parameters()))
        start = start if self.positions else start.view(event[0], -1, start.shape[-1])[:, 0]
        self.bias = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
        self.register_buffer("order", self._order(), persistent=False)

    @property
    def _places(self) -> tuple[int, int, int]:
        """The event as ``(C, H, W)``."""
        channels, *places = self.event_shape
        return (channels, places[0], places[1]) if len(places) == 2 else (channels, 1, places[0])

    def _order(self) -> Tensor:
        return torch.arange(self.input_dim).view(self.event_shape[0], -1).T.reshape(-1)

    def _convolutions(
        self,
        num_layers: int | None,
        kernel_size: int | Sequence[int],
        dilations: int | Sequence[int] | None,
        activation: Activation,
    ) -> Stacks:
        shape, image = self._places, len(self.event_shape) == 3
        most = [IMAGE_LAYERS] if image else list(range(LEAST_LAYERS, MOST_LAYERS + 1))
        for layers in most if num_layers is None else [num_layers]:
            sides = _sides(image, kernel_size, layers)
            distances = _distances(dilations, image, shape[2], sides)
            self.reach = sum(side * distance for side, distance in zip(sides, distances, strict=True))
            if self.reach >= shape[2] - 1:
                break
        return Stacks(
            shape,
            self.head.num_features,
            self.head.num_params,
            self.hidden_channels,
            sides,
            distances,
            self.context_dim,
            self.positions,
            activation_functions(activation, layers),
        )

    def _tokens(
        self, num_layers: int | None, num_heads: int | None, window: int | None, activation: Activation
    ) -> TokenNet:
        size, behind = self.hidden_channels, activation_functions(activation, 2)
        memory: nn.GRU | CausalAttention
        if self.network == "gru":
            self.reach = None
            memory = nn.GRU(size, size, 1 if num_layers is None else num_layers, batch_first=True)
        else:
            layers = 2 if num_layers is None else num_layers
            pair = 2 * (len(self.event_shape) - 1)  # a head's least numbers that tell places apart
            heads = next((n for n in (4, 2) if size % n == 0 and size // n >= pair), 1)
            heads = heads if num_heads is None else integer("ConvMADE", "num_heads", num_heads)
            if size % heads or size // heads < pair:
                raise ValueError(
                    f"ConvMADE: expected num_heads to divide hidden_channels {size} into heads of at least {pair} "
                    f"numbers, got {heads}"
                )
            seen = None if window is None else integer("ConvMADE", "window", window)
            self.reach = None if seen is None else layers * (seen - 1) + 1
            memory = CausalAttention(size, layers, heads, seen, behind[0])
        return TokenNet(
            self._places,
            self.head.num_features,
            self.head.num_params,
            size,
            memory,
            self.context_dim,
            self.positions,
            behind,
        )

    # For the distribution.

    def _output_bias(self) -> Tensor:
        """The biases of all dimensions."""
        if self.positions:
            return self.bias
        return self.bias.unsqueeze(1).expand(-1, self.event_shape[1:].numel(), -1).flatten(0, 1)

    def params(self, value: Tensor, context: Tensor | None = None, member: Member | None = None) -> Tensor:
        value = self.cast(value)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        if context is not None:
            batch = joint_shape(batch, context.shape[:-1])
        net, rows = self.net, batch.numel()
        flat = value.expand(*batch, *self.event_shape).reshape(rows, self.input_dim)
        coded = self.head.features(flat).unflatten(1, net.shape).movedim(-1, 2).flatten(1, 2)
        made = net(coded, by_row(context, batch)).unflatten(1, (net.shape[0], -1)).movedim(2, -1).flatten(1, 3)
        return (made + self._output_bias()).view(*batch, self.input_dim, self.head.num_params)

    def step_scores(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        flat = self.cast(value).flatten(-len(self.event_shape))
        scores = self.head.log_prob(flat, self.params(value, context))
        return torch.unflatten(scores, -1, self.event_shape).sum(-len(self.event_shape))

    def set_bias(self, bias: Tensor) -> None:
        self.bias.copy_(bias)

    @torch.no_grad()
    def fit_marginals(self, rows: Tensor, *, as_normals: bool = False) -> AutoregressiveModel:
        if self.positions:
            return super().fit_marginals(rows, as_normals=as_normals)
        check_tensor("ConvMADE", "a tensor of rows", rows)
        pooled = self.cast(rows.to(self.device)).flatten(2).movedim(1, -1).flatten(0, 1)
        self.set_bias(self._shared_head().bias(pooled, as_normals=as_normals))
        return self

    def order_of(self, member: Member | None) -> Tensor:
        return self.order

    @torch.no_grad()
    def draw(self, batch: Size, context: Tensor | None, member: Member | None = None) -> Tensor:
        rows, context = batch.numel(), by_row(context, batch)
        out = self.bias.new_empty(rows, *self.net.shape)
        chunk = rows_at_once(self.net, self.device)
        for part in (slice(start, start + chunk) for start in range(0, rows, chunk)):
            out[part] = self.sweep(self.head, len(out[part]), None if context is None else context[part])
        return out.view(*batch, *self.event_shape)

    def sweep(self, head: Head, rows: int, context: Tensor | None) -> Tensor:
        """Values place by place from a head of all dimensions, shape ``(rows, C, H, W)``."""
        if isinstance(self.net, Stacks):
            return RasterSweep(self.net, head, self._output_bias(), rows, context).run()
        return self._drawn(head, rows, context, head.sample)

    def _drawn(self, head: Head, rows: int, context: Tensor | None, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        steps = ModelSteps(self.net.steps(rows, context), head, self.bias, self.event_shape[0])
        values = [steps.draw(pick) for _ in range(self.event_shape[1:].numel())]
        return torch.stack(values, -1).view(rows, *self.net.shape)

    def rdraw(self, batch: Size, context: Tensor | None, member: Member | None = None) -> Tensor:
        if isinstance(self.net, Stacks):
            return super().rdraw(batch, context, member)
        drawn = self._drawn(self.head, batch.numel(), by_row(context, batch), self.head.rsample)
        return drawn.view(*batch, *self.event_shape)

    # Sequences of any length.

    @property
    def shared_over_time(self) -> bool:
        """Whether this is a model of series none of whose parameters depends on the time."""
        return len(self.event_shape) == 2 and not self.positions and self._own_head[0] is not None

    def _shared_head(self) -> Head:
        """The head of the channels; refuses a model whose places differ."""
        (head,) = self._own_head
        if self.positions or head is None:
            raise ValueError(
                "ConvMADE: this model's parameters depend on the place: build it with positions=False, and a head of "
                f"the {self.event_shape[0]} channels"
            )
        return head.to(self.head.like)

    def at_length(self, times: int) -> ConvMADE:
        """The model of series of ``times`` steps with the same parameters, which both share.

        Raises:
            ValueError: for a model of images, or whose parameters depend on the time.

        Example:
            >>> made = pf.ConvMADE((1, 20), "normal", network="gru", hidden_channels=16)
            >>> made.at_length(50).sample((5,)).shape
            torch.Size([5, 1, 50])
        """
        integer("ConvMADE", "times", times)
        if len(self.event_shape) != 2:
            raise ValueError(f"ConvMADE: expected a model of series (C, T), got events {tuple(self.event_shape)}")
        head, net, other = self._shared_head(), copy.copy(self.net), copy.copy(self)
        other.event_shape = Size((self.event_shape[0], times))
        other.input_dim, net.shape = other.event_shape.numel(), other._places
        other._modules = {**self._modules, "head": head.tiled(times), "net": net}
        other._buffers = {**self._buffers, "order": other._order().to(self.order)}
        return other

    def stepper(self, rows: int, context: Tensor | None = None) -> ModelSteps:
        """The model of series step by step, beyond ``T`` too; ``context`` has shape ``(rows, context_dim)``.

        Raises:
            ValueError: for a model whose parameters depend on the time.
        """
        return ModelSteps(self.net.steps(rows, context), self._shared_head(), self.bias, self.event_shape[0])

    def forward(
        self, context: Tensor | None = None, *, lengths: Tensor | Iterable[int] | None = None
    ) -> AutoregressiveDistribution:
        """The distribution at a context of shape ``(*batch, context_dim)``.

        Args:
            context: the context, if the model takes one.
            lengths: steps of each series ``(C, T)``, integers from 1 to ``T`` that broadcast to the batch.  Later steps
                are padding, which counts in no density, may hold anything, NaN included, and is zero in draws.

        Raises:
            ValueError: for lengths of another kind, or of images.
        """
        refuse_as_site(self)
        if lengths is None:
            return super().forward(context)
        if len(self.event_shape) != 2:
            raise ValueError(f"ConvMADE: lengths are of series (C, T), and events are {tuple(self.event_shape)}")
        check_context(self, context)
        return AutoregressiveDistribution(self, context, lengths=lengths)

    condition = forward

    def log_prob(
        self, value: Tensor, context: Tensor | None = None, *, lengths: Tensor | Iterable[int] | None = None
    ) -> Tensor:
        """Log-density in nats; value, context and lengths broadcast."""
        return self(context, lengths=lengths).log_prob(value)

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        kind = "" if self.network == "conv" else f"network={self.network!r}, "
        return f"{tuple(self.event_shape)}, {kind}hidden_channels={self.hidden_channels}, reach={self.reach}{context}"
