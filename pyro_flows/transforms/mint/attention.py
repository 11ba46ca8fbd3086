r"""Attention of each place of an image or series to those strictly before it, which keeps a map triangular.

Tokens are places in raster order.  With :math:`p_i` the values at token :math:`i` and its neighbors before it, and
:math:`p_i^-` the same without token :math:`i`,

.. math:: q_i = Q \tanh(A^- p_i^- + a + s), \quad (k_j, v_j) = K \tanh(A p_j + b), \quad
    o_i = O \sum_{j < i} \operatorname{softmax}_j(q_i \cdot R_{j - i} k_j / \sqrt{m})\, v_j

for each head of size :math:`m`.  One learned key and value stand for no token, for the first token to attend to.  No
:math:`o_i` depends on token :math:`i`: the Jacobian is exactly zero there and above.  Rotations :math:`R` turn pairs of
numbers by angles proportional to the distance along an axis; a few numbers, the only ones in the key of no token, are
not turned.  So outputs depend on distances, and no parameter depends on the size.  Values are bounded, and so is
:math:`o`.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.core.modes import full_precision, plain_eager
from pyro_flows.core.steps import Past
from pyro_flows.nets.rotary import places_along, turned

__all__ = ["Attention", "AttentionNet", "AttentionSteps", "AttentionWeights"]

_AT_ONCE = 256  # steps at a time; bounds the memory of the scores


class AttentionWeights(NamedTuple):
    """The tensors of :class:`Attention` beside ``x``; ``M = heads * head_dim``, ``T`` neighbors before a token.

    Attributes:
        query_taps: :math:`A^-`, shape ``(M, T * C)``.
        query_bias: :math:`a`, or :math:`a + s` with a shift for each row; shape ``(M,)`` or ``(n, M)``.
        query_mix: :math:`Q`, shape ``(M, M)``.
        key_taps: :math:`A`, shape ``(M, (T + 1) * C)``.
        key_bias: :math:`b`, shape ``(M,)``.
        key_mix: :math:`K`, keys before values, shape ``(2 * M, M)``.
        null_key: key of no token, its ``U`` unrotated numbers, shape ``(heads, U)``.
        null_value: value of no token, shape ``(heads, head_dim)``.
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
    """How tokens attend to each other.

    A call computes all tokens at once; :class:`AttentionSteps` goes from one to the next.

    Attributes:
        kernel: rows and columns of the neighborhood, odd.
        heads: the number of heads.
        head_dim: the size of each head.
        window: the number of tokens back that a token attends to; ``None`` for all.
        lower: whether tokens attend to those before them, or else to those after.
    """

    kernel: tuple[int, int]
    heads: int
    head_dim: int
    window: int | None = None
    lower: bool = True

    @full_precision
    def __call__(self, x: Tensor, weights: AttentionWeights) -> Tensor:
        """The outputs of all tokens, of the shape ``(n, C, H, W)`` of ``x``.

        Costs ``O(n (H W)^2 M)``, and memory for ``n * heads * (H W)^2`` numbers, except on a CPU without gradient.
        """
        x = x.to(weights.out.dtype)
        image = x if self.lower else x.flip(-2, -1)
        places = self.places(x)
        patches = self.patches(image)
        queries = self.queries(patches[..., : -x.shape[1]], places, weights)
        keys, values = self.keys_values(patches, places, weights)
        keys, values = keys[..., :-1, :], values[..., :-1, :]
        tokens = torch.arange(len(places), device=x.device)
        out = self.attend(queries, keys, values, weights, self.allowed(tokens, tokens[:-1])).mT.reshape(x.shape)
        return out if self.lower else out.flip(-2, -1)

    @property
    def rotated(self) -> int:
        """The rotated numbers of a head: as many pairs per axis as leave a number."""
        pair = 2 * self.axes
        return (self.head_dim - 1) // pair * pair

    @property
    def axes(self) -> int:
        """1 where the kernel has one row, else 2."""
        return 1 if self.kernel[0] == 1 else 2

    def places(self, x: Tensor) -> Tensor:
        """Rows and columns of the tokens, shape ``(H * W, axes)``."""
        rows, columns = (places_along(0, n, x.device) for n in x.shape[-2:])
        if self.axes == 1:
            return columns.expand(len(rows), -1).reshape(-1, 1)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)

    def allowed(self, asking: Tensor, answering: Tensor) -> Tensor:
        """Boolean: which keys, of no token and of ``answering``, the tokens ``asking`` attend to."""
        back = asking[:, None] - answering
        allowed = back > 0 if self.window is None else (back > 0) & (back <= self.window)
        return F.pad(allowed, (1, 0), value=True)

    def reach(self, convolved: int) -> int | None:
        """The steps back that a step of a series sees, ``None`` for all; ``convolved`` of them without attention."""
        return None if self.window is None else max(convolved, self.window + self.kernel[1] // 2)

    def patches(self, x: Tensor) -> Tensor:
        """The neighbors before each token, then the token itself; shape ``(n, H * W, (T + 1) * C)``."""
        (down, right), (height, width) = (n // 2 for n in self.kernel), x.shape[-2:]
        padded = F.pad(x, (right, right, down, 0))
        taps = [(i, j) for i in range(down + 1) for j in range(2 * right + 1 if i < down else right + 1)]
        seen = [padded[..., i : i + height, j : j + width] for i, j in taps]
        return torch.cat(seen, 1).flatten(2).mT

    def queries(self, before: Tensor, places: Tensor, weights: AttentionWeights) -> Tensor:
        """Queries of tokens, shape ``(n, heads, tokens, head_dim)``.

        ``before`` holds rows of :meth:`patches` without the token itself, shape ``(n, tokens, T * C)``; ``places`` are
        the tokens'.
        """
        bias = weights.query_bias
        seen = torch.tanh(F.linear(before, weights.query_taps) + (bias if bias.dim() == 1 else bias.unsqueeze(-2)))
        return turned(self._heads(F.linear(seen, weights.query_mix) / math.sqrt(self.head_dim)), places, self.rotated)

    def keys_values(self, patches: Tensor, places: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens, both of shape ``(n, heads, tokens, head_dim)``, from rows of :meth:`patches`."""
        seen = torch.tanh(F.linear(patches, weights.key_taps, weights.key_bias))
        keys, values = (self._heads(each) for each in F.linear(seen, weights.key_mix).chunk(2, -1))
        return turned(keys, places, self.rotated), values

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, weights: AttentionWeights, allowed: Tensor | None = None
    ) -> Tensor:
        """Outputs of tokens, shape ``(n, tokens, C)``, that attend to the ``allowed`` ones of the keys, or to all."""
        rows = values.shape[0]
        null = F.pad(weights.null_key, (self.rotated, 0)), weights.null_value
        first = (each[:, None].expand(rows, -1, -1, -1) for each in null)
        keys, values = (torch.cat(each, -2) for each in zip(first, (keys, values), strict=True))
        bias = None if allowed is None else keys.new_zeros(allowed.shape).masked_fill_(~allowed, -math.inf)
        if plain_eager() and not torch.is_grad_enabled() and keys.device.type == "cpu":
            # Spares the scores, but has no second derivatives, and less precision on other devices.
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
        else:
            scores = queries @ keys.mT
            # A sum has a cheaper gradient than masked_fill.
            out = torch.softmax(scores if bias is None else scores + bias, -1) @ values
        return F.linear(out.transpose(-3, -2).flatten(-2), weights.out)

    def _heads(self, tokens: Tensor) -> Tensor:
        return torch.unflatten(tokens, -1, (self.heads, self.head_dim)).transpose(-3, -2)


class AttentionNet(nn.Module):
    """The parameters of :class:`Attention`; its outputs start at zero."""

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
        """The parameters, in order."""
        return AttentionWeights(*(getattr(self, name) for name in AttentionWeights._fields))

    def extra_repr(self) -> str:
        return f"heads={self.rule.heads}, head_dim={self.rule.head_dim}, window={self.rule.window}"


class AttentionSteps:
    """Attention in ``rows`` series side by side, step by step: keeps the keys and values of the window, or all."""

    def __init__(self, rule: Attention, weights: AttentionWeights, rows: int, channels: int) -> None:
        self.rule, self.weights, self.taken = rule, weights, 0
        self.past = Past(rows, channels, rule.kernel[1] // 2, 1, weights.out)
        self.keys = self.values = weights.out.new_zeros(rows, rule.heads, 0, rule.head_dim)

    def _places(self, count: int) -> Tensor:
        return places_along(self.taken, count, self.keys.device).unsqueeze(-1)

    def ahead(self) -> Tensor:
        """The output of the next step from those before it, shape ``(rows, C)``."""
        before = self.past.seen().mT.flatten(1).unsqueeze(1)
        queries = self.rule.queries(before, self._places(1), self.weights)
        return self.rule.attend(queries, self.keys, self.values, self.weights).squeeze(1)

    def take(self, y: Tensor) -> Tensor:
        """Takes the next steps, shape ``(rows, C, n)``, and returns their outputs; 256 at a time."""
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
        out = self.rule.attend(queries, keys, values, self.weights, allowed)
        first = 0 if self.rule.window is None else max(kept + count - self.rule.window, 0)
        self.keys, self.values = keys[..., first:, :].contiguous(), values[..., first:, :].contiguous()
        self.taken += count
        return out.mT

    def repeated(self, times: int) -> AttentionSteps:
        """An independent copy with all rows repeated."""
        made = copy.copy(self)
        made.past = self.past.repeated(times)
        made.keys, made.values = (each.repeat(times, 1, 1, 1) for each in (self.keys, self.values))
        if self.weights.query_bias.dim() == 2:  # a context gave each row its own
            made.weights = self.weights._replace(query_bias=self.weights.query_bias.repeat(times, 1))
        return made
