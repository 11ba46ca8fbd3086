"""Networks that remember the tokens before each token: recurrent, or by causal attention.

A token is one place of an event ``(C, *places)``, in raster order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.modes import by_hand
from pyro_flows.nets.masked_convolutional import Stacks, StackSteps
from pyro_flows.nets.rotary import places_along, turned

__all__ = ["CausalAttention", "TokenNet", "TokenSteps"]

_AT_ONCE = 256  # tokens at a time that steps take; bounds the memory of the scores


class _Block(nn.Module):
    """Attention and a network of one hidden layer, both residual and normalized before."""

    def __init__(self, size: int, num_heads: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_heads, self.activation = num_heads, activation
        self.attention_norm, self.mix_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.ask = nn.Linear(size, 3 * size)  # queries, keys, values
        self.answer = nn.Linear(size, size)
        self.mix_in, self.mix_out = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(
        self, tokens: Tensor, places: Tensor, past: Tensor, allowed: Tensor, fused: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The tokens' outputs, and the keys and values of past and tokens, keys not yet turned."""
        asked = torch.unflatten(self.ask(self.attention_norm(tokens)), -1, (3, self.num_heads, -1))
        queries, keys, values = asked.permute(2, 0, 3, 1, 4)
        keys, values = (torch.cat(pair, -2) for pair in zip(past, (keys, values), strict=True))
        size, pair = keys.shape[-1], 2 * places.shape[-1]
        rotated = size // pair * pair
        queries = turned(queries, places[-tokens.shape[1] :], rotated)
        found = _attended(queries, turned(keys, places, rotated), values, allowed, fused)
        tokens = tokens + self.answer(found.transpose(1, 2).flatten(2))
        return tokens + self.mix_out(self.activation(self.mix_in(self.mix_norm(tokens)))), (keys, values)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, fused: bool) -> Tensor:
    if fused:  # half the time at hundreds of tokens, but no second derivatives, and no rules of torch.func
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.mT
    return torch.softmax(scores + torch.where(allowed, 0.0, -math.inf).to(scores), -1) @ values


class CausalAttention(nn.Module):
    r"""Blocks of attention of each token to itself and those before it, in the last ``window`` or all.

    Keys and queries are turned by their places, so that outputs depend on distances, and no parameter on the number of
    tokens.

    Args:
        size: the size of tokens and outputs.
        num_layers: number of blocks.
        num_heads: number of heads, a divisor of ``size``.
        window: the tokens that a token attends to, itself included; ``None`` for all.
        activation: activation of the blocks' networks.

    References:
        Attention Is All You Need (Vaswani et al., 2017), arXiv:1706.03762.
        RoFormer (Su et al., 2021), arXiv:2104.09864.
    """

    def __init__(
        self, size: int, num_layers: int, num_heads: int, window: int | None, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.blocks = nn.ModuleList(_Block(size, num_heads, activation) for _ in range(num_layers))
        self.norm = nn.LayerNorm(size)

    def start(self, rows: int, like: Tensor) -> Tensor:
        """What is remembered before the first token: keys and values, ``(2 * layers, rows, heads, 0, head size)``."""
        size = self.norm.weight.numel() // self.num_heads
        return like.new_zeros(2 * len(self.blocks), rows, self.num_heads, 0, size)

    def forward(self, tokens: Tensor, past: Tensor, places: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        """Outputs of the next tokens, shape ``(rows, n, size)``, and what is remembered after them.

        Args:
            tokens: shape ``(rows, n, size)``.
            past: from :meth:`start` or the last call.
            places: of the tokens remembered and the next, shape ``(kept + n, axes)``.
            fused: whether no second derivatives are wanted.
        """
        count, kept = tokens.shape[1], past.shape[-2]
        every = torch.arange(kept + count, device=tokens.device)
        back = every[kept:, None] - every
        allowed = back >= 0 if self.window is None else (back >= 0) & (back < self.window)
        made: list[Tensor] = []
        for k, block in enumerate(self.blocks):
            tokens, both = block(tokens, places, past[2 * k : 2 * k + 2], allowed, fused)
            made += both
        first = 0 if self.window is None else max(kept + count + 1 - self.window, 0)
        return self.norm(tokens), torch.stack([each[..., first:, :] for each in made])


def _unrolled(net: nn.GRU, tokens: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """The GRU's outputs and last states by plain products."""
    last = []
    for layer, state in enumerate(past):
        into, again, into_bias, again_bias = (
            getattr(net, f"{kind}_l{layer}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        made = []
        for given in F.linear(tokens, into, into_bias).unbind(1):
            kept = F.linear(state, again, again_bias)
            size = state.shape[-1]
            reset, update = torch.sigmoid(given[:, : 2 * size] + kept[:, : 2 * size]).chunk(2, -1)
            new = torch.tanh(given[:, 2 * size :] + reset * kept[:, 2 * size :])
            state = new + update * (state - new)
            made.append(state)
        tokens = torch.stack(made, 1)
        last.append(state)
    return tokens, torch.stack(last)


class TokenNet(nn.Module):
    r"""Parameters of each place given those before it, :math:`(n, C F, H, W) \to (n, C P, H, W)`.

    A memory sums up the places before, :math:`s_i = m(x_{<i}, c)`, and :class:`Stacks` of a single place, with context
    :math:`(s_i, c)`, give the parameters of its channels in turn.  The parameters start at zero.

    Args:
        shape: shape of the event, ``(C, H, W)``.
        features: number of inputs that code one channel of the event.
        num_params: number of outputs per channel.
        hidden: size of the memory's output, and number of hidden channels.
        memory: a ``torch.nn.GRU`` or :class:`CausalAttention`, of inputs and outputs of size ``hidden``.
        context_dim: size of the context, 0 for none.
        positions: whether each place has a learned token, added to its input.
        activations: of the two hidden layers at a place.
    """

    place_tokens: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int, int],
        features: int,
        num_params: int,
        hidden: int,
        memory: nn.GRU | CausalAttention,
        context_dim: int,
        positions: bool,
        activations: Sequence[Callable[[Tensor], Tensor]],
    ) -> None:
        super().__init__()
        channels, height, width = self.shape = shape
        self.features, self.num_params, self.hidden = features, num_params, hidden
        self.into = nn.Linear(channels * features + context_dim, hidden)
        self.memory = memory
        known = nn.Parameter(torch.zeros(height * width, hidden)) if positions else None
        self.register_parameter("place_tokens", known)
        layers = len(activations)
        self.at_place = Stacks(
            (channels, 1, 1),
            features,
            num_params,
            hidden,
            [0] * layers,
            [1] * layers,
            hidden + context_dim,
            False,
            activations,
        )

    @property
    def numbers_per_draw(self) -> int:
        """About how many numbers a pass or a sweep holds per row."""
        layers = self.memory.num_layers if isinstance(self.memory, nn.GRU) else 2 * len(self.memory.blocks)
        return math.prod(self.shape[1:]) * self.hidden * (4 + 6 * layers)

    def start(self, rows: int) -> Tensor:
        """What is remembered before the first place; rows along its second dimension."""
        like = self.into.weight
        if isinstance(self.memory, nn.GRU):
            return like.new_zeros(self.memory.num_layers, rows, self.hidden)
        return self.memory.start(rows, like)

    def remember(self, before: Tensor, context: Tensor | None, past: Tensor, taken: int) -> tuple[Tensor, Tensor]:
        """The context of the next places, shape ``(rows, n, hidden + context_dim)``, and what is then remembered.

        Args:
            before: codes of the place before each, ``(rows, n, C F)``; zeros before the first.
            context: ``None`` or ``(rows, context_dim)``.
            past: from :meth:`start` or the last call.
            taken: number of places taken before.
        """
        rows, count = before.shape[:2]
        # Torch's own kernels know neither all derivatives nor torch.func, and a GRU's none outside of training.
        fused = by_hand() and not (before.requires_grad or (context is not None and context.requires_grad))
        told = [] if context is None else [context.unsqueeze(1).expand(rows, count, -1)]
        tokens = self.into(torch.cat((before, *told), -1))
        if self.place_tokens is not None:
            tokens = tokens + self.place_tokens[taken : taken + count]
        if isinstance(self.memory, nn.GRU):
            fused = fused and (self.training or not torch.is_grad_enabled())
            seen, past = self.memory(tokens, past) if fused else _unrolled(self.memory, tokens, past)
        else:
            places = self._places(taken - past.shape[-2], taken + count)
            seen, past = self.memory(tokens, past, places, fused)
        return torch.cat((seen, *told), -1), past

    def _places(self, first: int, last: int) -> Tensor:
        """Rows and columns of tokens, or times; shape ``(tokens, axes)``."""
        height, width = self.shape[1:]
        tokens = places_along(first, last - first, self.into.weight.device)
        if height == 1:
            return tokens.unsqueeze(-1)
        return torch.stack((tokens.div(width, rounding_mode="floor"), tokens.remainder(width)), -1)

    def parameters_of(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Parameters ``(rows, n, C P)`` of places with codes ``tokens``, ``(rows, n, C F)``."""
        flat = tokens.flatten(0, 1)[..., None, None]
        return torch.unflatten(self.at_place(flat, seen.flatten(0, 1))[..., 0, 0], 0, tokens.shape[:2])

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """``context``: ``None`` or ``(n, context_dim)``."""
        tokens = x.flatten(2).mT
        before = F.pad(tokens[:, :-1], (0, 0, 1, 0))
        seen, _ = self.remember(before, context, self.start(len(x)), 0)
        return self.parameters_of(tokens, seen).mT.unflatten(-1, x.shape[-2:])

    def steps(self, rows: int, context: Tensor | None) -> TokenSteps:
        """The network place by place, for a number of rows."""
        return TokenSteps(self, rows, context)

    def extra_repr(self) -> str:
        return f"{self.shape}, features={self.features}, num_params={self.num_params}, hidden={self.hidden}"


class TokenSteps:
    """A :class:`TokenNet` place by place; has the interface of :class:`StackSteps`."""

    def __init__(self, net: TokenNet, rows: int, context: Tensor | None) -> None:
        self.net, self.context, self.taken = net, context, 0
        self.past = net.start(rows)
        self.last = self.past.new_zeros(rows, 1, net.into.in_features - (0 if context is None else context.shape[-1]))

    def _remember(self, before: Tensor) -> Tensor:
        seen, self.past = self.net.remember(before, self.context, self.past, self.taken)
        self.taken += before.shape[1]
        return seen

    def known(self, x: Tensor) -> Tensor:
        """Outputs at the next places from their codes, ``(rows, C F, n)`` to ``(rows, C, num_params, n)``."""
        tokens = x.mT
        before = torch.cat((self.last, tokens), 1)[:, :-1]
        seen = torch.cat([self._remember(some) for some in before.split(_AT_ONCE, 1)], 1)
        self.last = tokens[:, -1:]
        out = self.net.parameters_of(tokens, seen)
        return torch.unflatten(out.mT, 1, (self.net.shape[0], self.net.num_params))

    def next(self, find: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The codes of the next place, ``(rows, C F)``; ``find`` as in :meth:`StackSteps.next`."""
        seen = self._remember(self.last).squeeze(1)
        made = StackSteps(self.net.at_place, len(seen), seen).next(find)
        self.last = made.unsqueeze(1)
        return made

    def repeated(self, times: int) -> TokenSteps:
        """An independent copy with all rows repeated."""
        made = copy.copy(self)
        made.context = None if self.context is None else self.context.repeat(times, 1)
        made.past = self.past.repeat(1, times, *[1] * (self.past.dim() - 2))
        made.last = self.last.repeat(times, 1, 1)
        return made
