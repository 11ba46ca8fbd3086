r"""Attention of each place of an image or series to those strictly before it: what a triangular map may add.

Tokens are places, in the order of a raster scan.  With :math:`p_i` the values at token :math:`i` and its neighbours
before it, and :math:`p_i^-` the same without token :math:`i` itself,

.. math:: q_i = Q \tanh(A^- p_i^- + a + s), \quad (k_j, v_j) = K \tanh(A p_j + b), \quad
    o_i = O \sum_{j < i} \operatorname{softmax}_j(q_i \cdot R_{j - i} k_j / \sqrt{m})\, v_j

over the tokens before, for each head of size :math:`m`, and over one learnt key and value that stand for no token, so
that the first token has something to attend to.  Neither the query nor any key of token :math:`i` sees token
:math:`i`: no :math:`o_i` depends on its own token, and the Jacobian is zero there and above, exactly.  Rotations
:math:`R` turn pairs of numbers by angles in proportion to the distance along an axis, and leave a few numbers as they
are; so what a token gets depends on distances, and no parameter depends on the size.  The key of no token has those
few numbers alone, and so no distance.  Values are bounded, and so is :math:`o`.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.modes import autocasting, plain_eager
from pyro_flows.core.steps import Past

__all__ = ["Attention", "AttentionNet", "AttentionSteps", "AttentionWeights"]

_BASE = 100.0  # wavelengths of the rotations go from 2 pi up to nearly so many times that


_AT_ONCE = 256  # steps of a series, so that there are never scores of all pairs


def _numbers(first: int, count: int, device: torch.device) -> Tensor:
    """Places along an axis; far out, single precision could not tell one angle from the next."""
    kind = torch.float32 if device.type == "mps" else torch.float64
    return torch.arange(first, first + count, device=device, dtype=kind)


class AttentionWeights(NamedTuple):
    """All that :class:`Attention` needs beside ``x``; ``M = heads * head_dim``, ``T`` neighbours before a token.

    Attributes:
        query_taps: :math:`A^-`, shape ``(M, T * C)``.
        query_bias: :math:`a`, or :math:`a + s` where rows have their own shift; shape ``(M,)`` or ``(n, M)``.
        query_mix: :math:`Q`, shape ``(M, M)``.
        key_taps: :math:`A`, shape ``(M, (T + 1) * C)``.
        key_bias: :math:`b`, shape ``(M,)``.
        key_mix: :math:`K`, keys before values, shape ``(2 * M, M)``.
        null_key: stands for no token, shape ``(heads, U)``, of the ``U`` numbers that are not rotated.
        null_value: its value, shape ``(heads, head_dim)``.
        out: :math:`O`, shape ``(C, M)``.
    """

    query_taps: Tensor
    query_bias: Tensor
    query_mix: Tensor
    key_taps: Tensor
    key_bias: Tensor
    key_mix: Tensor
    null_key: Tensor
    null_value: Tensor
    out: Tensor


class Attention(NamedTuple):
    """How tokens attend to each other; it holds no tensors, which come as :class:`AttentionWeights`.

    A call makes all tokens at once; :class:`AttentionSteps` goes from one to the next.

    Attributes:
        kernel: rows and columns of the neighbourhood, odd.
        heads: number of heads.
        head_dim: size of each.
        window: how many tokens before it a token attends to; ``None`` for all of them.
        lower: whether tokens attend to those before them, or, if false, to those after them.
    """

    kernel: tuple[int, int]
    heads: int
    head_dim: int
    window: int | None = None
    lower: bool = True

    def __call__(self, x: Tensor, weights: AttentionWeights) -> Tensor:
        """What each token gets, of the shape ``(n, C, H, W)`` of ``x``.

        Costs ``O(n (H W)^2 M)``, and memory for ``n * heads * (H W)^2`` numbers, which are kept for a gradient; without
        one there is no need for them on a CPU.
        """
        if autocasting(x.device):
            with torch.autocast(x.device.type, enabled=False):
                return self(x.to(weights.out.dtype), weights)
        image = x if self.lower else x.flip(-2, -1)
        places = self.places(x)
        patches = self.patches(image)
        queries = self.queries(patches[..., : -x.shape[1]], places, weights)
        keys, values = self.keys_values(patches, places, weights)
        # Nothing comes after the last token.
        keys, values = keys[..., :-1, :], values[..., :-1, :]
        got = self.attend(queries, keys, values, weights, self.allowed(*self.tokens(x))).mT.reshape(x.shape)
        return got if self.lower else got.flip(-2, -1)

    @property
    def rotated(self) -> int:
        """How many numbers of a head are rotated: a pair for each axis, as many times as leave some that are not."""
        pair = 2 * self.axes
        return (self.head_dim - 1) // pair * pair

    @property
    def axes(self) -> int:
        """1 where the kernel has one row, else 2."""
        return 1 if self.kernel[0] == 1 else 2

    def places(self, x: Tensor) -> Tensor:
        """Rows and columns of the tokens, shape ``(H * W, axes)``."""
        rows, columns = (_numbers(0, n, x.device) for n in x.shape[-2:])
        if self.axes == 1:
            return columns.expand(len(rows), -1).reshape(-1, 1)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the tokens that ask, and of those that answer, all but the last."""
        tokens = torch.arange(x.shape[-2] * x.shape[-1], device=x.device)
        return tokens, tokens[:-1]

    def allowed(self, asking: Tensor, answering: Tensor) -> Tensor:
        """Which keys, of no token and of those that answer, each token attends to; boolean.

        Args:
            asking: numbers of tokens.
            answering: numbers of tokens.
        """
        back = asking[:, None] - answering
        allowed = back > 0 if self.window is None else (back > 0) & (back <= self.window)
        return F.pad(allowed, (1, 0), value=True)

    def reach(self, convolved: int) -> int | None:
        """How many steps back a step of a series looks, ``convolved`` without attention; ``None`` for all."""
        return None if self.window is None else max(convolved, self.window + self.kernel[1] // 2)

    def patches(self, x: Tensor) -> Tensor:
        """A token's neighbours before it, then the token itself; shape ``(n, H * W, (T + 1) * C)``."""
        (down, right), (height, width) = (n // 2 for n in self.kernel), x.shape[-2:]
        padded = F.pad(x, (right, right, down, 0))
        taps = [(i, j) for i in range(down + 1) for j in range(2 * right + 1 if i < down else right + 1)]
        seen = [padded[..., i : i + height, j : j + width] for i, j in taps]
        return torch.cat(seen, 1).flatten(2).mT

    def queries(self, before: Tensor, places: Tensor, weights: AttentionWeights) -> Tensor:
        """Queries of tokens from the neighbours before them.

        Args:
            before: rows of :meth:`patches` without the token itself, shape ``(n, tokens, T * C)``.
            places: of these tokens, shape ``(tokens, axes)``.
            weights: all tensors.

        Returns:
            Shape ``(n, heads, tokens, head_dim)``.
        """
        bias = weights.query_bias
        seen = torch.tanh(F.linear(before, weights.query_taps) + (bias if bias.dim() == 1 else bias.unsqueeze(-2)))
        return self._turn(self._heads(F.linear(seen, weights.query_mix) / math.sqrt(self.head_dim)), places)

    def keys_values(self, patches: Tensor, places: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens from their patches, which later tokens attend to.

        Args:
            patches: rows of :meth:`patches`, shape ``(n, tokens, (T + 1) * C)``.
            places: of these tokens, shape ``(tokens, axes)``.
            weights: all tensors.

        Returns:
            Both of shape ``(n, heads, tokens, head_dim)``.
        """
        seen = torch.tanh(F.linear(patches, weights.key_taps, weights.key_bias))
        keys, values = (self._heads(each) for each in F.linear(seen, weights.key_mix).chunk(2, -1))
        return self._turn(keys, places), values

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, allowed: Tensor | None = None
    ) -> Tensor:
        """What tokens get, shape ``(n, tokens, C)``.

        Args:
            queries: of the tokens that get something.
            keys: of the tokens that give; there may be none.
            values: of the same.
            weights: all tensors.
            allowed: as :meth:`allowed`; ``None`` if each token attends to all keys.
        """
        rows = values.shape[0]
        null = F.pad(weights.null_key, (self.rotated, 0)), weights.null_value
        first = (each[:, None].expand(rows, -1, -1, -1) for each in null)
        keys, values = (torch.cat(each, -2) for each in zip(first, (keys, values), strict=True))
        bias = None if allowed is None else keys.new_zeros(allowed.shape).masked_fill_(~allowed, -math.inf)
        if plain_eager() and not torch.is_grad_enabled() and keys.device.type == "cpu":
            # Without a map of all pairs; it has no second derivatives, and elsewhere less than full precision.
            got = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
        else:
            scores = queries @ keys.mT
            # A sum has a cheaper gradient than masked_fill.
            got = torch.softmax(scores if bias is None else scores + bias, -1) @ values
        return F.linear(got.transpose(-3, -2).flatten(-2), weights.out)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, self.head_dim)).transpose(-3, -2)

    def _turn(self, x: Tensor, places: Tensor) -> Tensor:
        """Rotates pairs of numbers by angles in proportion to the places."""
        half = self.rotated // 2
        pairs = half // self.axes
        speeds = _BASE ** (-torch.arange(pairs, device=x.device, dtype=places.dtype) / pairs)
        angles = (places.unsqueeze(-1) * speeds).flatten(-2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b, rest = x.split((half, half, self.head_dim - self.rotated), -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), -1)


class AttentionNet(nn.Module):
    """The parameters of :class:`Attention`; what comes out is zero at first.

    Args:
        channels: :math:`C`.
        rule: how tokens attend to each other.
    """

    def __init__(self, channels: int, rule: Attention) -> None:
        super().__init__()
        self.rule = rule
        width, (down, right) = rule.heads * rule.head_dim, (n // 2 for n in rule.kernel)
        before = channels * (down * rule.kernel[1] + right)

        def uniform(out: int, into: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(out, into) - 1) / math.sqrt(into))

        self.query_taps = uniform(width, before)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.query_mix = uniform(width, width)
        self.key_taps = uniform(width, before + channels)
        self.key_bias = nn.Parameter(torch.zeros(width))
        self.key_mix = uniform(2 * width, width)
        self.null_key = nn.Parameter(torch.zeros(rule.heads, rule.head_dim - rule.rotated))
        self.null_value = nn.Parameter(torch.zeros(rule.heads, rule.head_dim))
        self.out = nn.Parameter(torch.zeros(channels, width))

    def weights(self) -> AttentionWeights:
        """The parameters, in their sequence."""
        return AttentionWeights(*(getattr(self, name) for name in AttentionWeights._fields))

    def extra_repr(self) -> str:
        return f"heads={self.rule.heads}, head_dim={self.rule.head_dim}, window={self.rule.window}"


class AttentionSteps:
    """Attention in a series from one step to the next: keys and values are kept, as many as the window has or all.

    Args:
        rule: how tokens attend to each other, from the first to the last.
        weights: all tensors.
        rows: how many series go on side by side.
        channels: of each.
    """

    def __init__(self, rule: Attention, weights: AttentionWeights, rows: int, channels: int) -> None:
        self.rule, self.weights, self.taken = rule, weights, 0
        self.past = Past(rows, channels, rule.kernel[1] // 2, 1, weights.out)
        self.keys = self.values = weights.out.new_zeros(rows, rule.heads, 0, rule.head_dim)

    def _places(self, count: int) -> Tensor:
        return _numbers(self.taken, count, self.keys.device).unsqueeze(-1)

    def ahead(self) -> Tensor:
        """What the next step gets, which depends on those before it alone; shape ``(rows, C)``."""
        before = self.past.seen().mT.flatten(1).unsqueeze(1)
        queries = self.rule.queries(before, self._places(1), self.weights)
        return self.rule.attend(queries, self.keys, self.values, self.weights).squeeze(1)

    def take(self, y: Tensor) -> Tensor:
        """What the next steps get, and takes these steps; both of shape ``(rows, C, n)``.

        In pieces of 256 steps, each of which costs scores of its steps with the keys kept before it and its own.
        """
        return torch.cat([self._take(some) for some in y.split(_AT_ONCE, -1)], -1)

    def _take(self, y: Tensor) -> Tensor:
        count, kept = y.shape[-1], self.keys.shape[-2]
        joined = self.past.join(y)
        taps = [joined[..., j : j + count] for j in range(self.past.taps + 1)]
        patches, places = torch.cat(taps, 1).mT, self._places(count)
        queries = self.rule.queries(patches[..., : -y.shape[1]], places, self.weights)
        made = self.rule.keys_values(patches, places, self.weights)
        keys, values = (torch.cat(pair, -2) for pair in zip((self.keys, self.values), made, strict=True))
        tokens = torch.arange(kept + count, device=y.device)
        allowed = self.rule.allowed(tokens[kept:], tokens)
        got = self.rule.attend(queries, keys, values, self.weights, allowed)
        first = 0 if self.rule.window is None else max(kept + count - self.rule.window, 0)
        self.keys, self.values = keys[..., first:, :].contiguous(), values[..., first:, :].contiguous()
        self.taken += count
        return got.mT

    def repeated(self, times: int) -> AttentionSteps:
        """A copy that goes its own way, with all rows so many times over."""
        made = copy.copy(self)
        made.past = self.past.repeated(times)
        made.keys, made.values = (each.repeat(times, 1, 1, 1) for each in (self.keys, self.values))
        if self.weights.query_bias.dim() == 2:  # a context gave each row its own
            made.weights = self.weights._replace(query_bias=self.weights.query_bias.repeat(times, 1))
        return made
