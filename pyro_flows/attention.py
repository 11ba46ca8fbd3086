r"""Attention of each place of an image or series to those strictly before it: what a triangular map may add.

Tokens are places, in the order of a raster scan.  With :math:`p_i` the values at token :math:`i` and its neighbours
before it, and :math:`p_i^-` the same without token :math:`i` itself,

.. math:: q_i = Q \tanh(A^- p_i^- + a + s), \quad (k_j, v_j) = K \tanh(A p_j + b), \quad
    o_i = O \sum_{j < i} \operatorname{softmax}_j(q_i \cdot R_{i - j} k_j / \sqrt{m})\, v_j

over the tokens before, for each head of size :math:`m`, and over one learnt key and value that stand for no token, so
that the first token has something to attend to.  Neither the query nor any key of token :math:`i` sees token
:math:`i`: no :math:`o_i` depends on its own token, and the Jacobian is zero there and above, exactly.  Rotations
:math:`R` turn pairs of numbers by angles in proportion to the distance, so that what a token gets depends on distances
and no parameter depends on the size.  Values are bounded, and so is :math:`o`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flows.tracing import autocasting

__all__ = ["Attention", "AttentionNet", "AttentionWeights"]

_BASE = 100.0  # wavelengths of the rotations go from 2 pi up to nearly so many times that


class AttentionWeights(NamedTuple):
    """All that :class:`Attention` needs beside ``x``; ``M = heads * head_dim``, ``T`` neighbours before a token.

    Attributes:
        query_taps: :math:`A^-`, shape ``(M, T * C)``.
        query_bias: :math:`a`, or :math:`a + s` where rows have their own shift; shape ``(M,)`` or ``(n, M)``.
        query_mix: :math:`Q`, shape ``(M, M)``.
        key_taps: :math:`A`, shape ``(M, (T + 1) * C)``.
        key_bias: :math:`b`, shape ``(M,)``.
        key_mix: :math:`K`, keys before values, shape ``(2 * M, M)``.
        null: the key and the value that stand for no token, shape ``(2, heads, head_dim)``.
        out: :math:`O`, shape ``(C, M)``.
    """

    query_taps: Tensor
    query_bias: Tensor
    query_mix: Tensor
    key_taps: Tensor
    key_bias: Tensor
    key_mix: Tensor
    null: Tensor
    out: Tensor


class Attention(NamedTuple):
    """How tokens attend to each other; it holds no tensors, which come as :class:`AttentionWeights`.

    A call makes all tokens at once.  One token after the other takes a row of :meth:`patches` at a time:
    :meth:`queries` of what is before the token, :meth:`attend` to keys and values that are kept, and, once the token is
    known, its own by :meth:`keys_values`.

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
        """What each token gets, of the shape ``(n, C, H, W)`` of ``x``; costs ``O(n (H W)^2 M)``."""
        if autocasting(x.device):
            with torch.autocast(x.device.type, enabled=False):
                return self(x.to(weights.out.dtype), weights)
        image = x if self.lower else x.flip(-2, -1)
        places = self.places(x)
        patches = self.patches(image)
        queries = self.queries(patches[..., : -x.shape[1]], places, weights)
        keys, values = self.keys_values(patches, places, weights)
        got = self.attend(queries, keys, values, weights, self.allowed(x)).mT.reshape(x.shape)
        return got if self.lower else got.flip(-2, -1)

    def places(self, x: Tensor) -> Tensor:
        """Rows and columns of the tokens, shape ``(H * W, axes)``; of a single axis where the kernel has one row."""
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[-2:])
        if self.kernel[0] == 1:
            return columns.expand(len(rows), -1).reshape(-1, 1).to(x.dtype)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1).to(x.dtype)

    def allowed(self, x: Tensor) -> Tensor:
        """Which keys, that of no token first, each token attends to; boolean, shape ``(H * W, H * W + 1)``."""
        tokens = torch.arange(x.shape[-2] * x.shape[-1], device=x.device)
        back = tokens[:, None] - tokens
        allowed = back > 0 if self.window is None else (back > 0) & (back <= self.window)
        return F.pad(allowed, (1, 0), value=True)

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
            Shape ``(n, heads, tokens, head_dim + 1)``; the last number is for the key that stands for no token.
        """
        bias = weights.query_bias
        seen = torch.tanh(F.linear(before, weights.query_taps) + (bias if bias.dim() == 1 else bias.unsqueeze(-2)))
        found = self._heads(F.linear(seen, weights.query_mix) / math.sqrt(self.head_dim))
        # That key has no place: its score is of the query as it is before the rotation.
        return torch.cat((self._rotated(found, places), found @ weights.null[0].unsqueeze(-1)), -1)

    def keys_values(self, patches: Tensor, places: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens from their patches, which later tokens attend to.

        Args:
            patches: rows of :meth:`patches`, shape ``(n, tokens, (T + 1) * C)``.
            places: of these tokens, shape ``(tokens, axes)``.
            weights: all tensors.

        Returns:
            Shapes ``(n, heads, tokens, head_dim + 1)`` and ``(n, heads, tokens, head_dim)``.
        """
        seen = torch.tanh(F.linear(patches, weights.key_taps, weights.key_bias))
        keys, values = (self._heads(each) for each in F.linear(seen, weights.key_mix).chunk(2, -1))
        return F.pad(self._rotated(keys, places), (0, 1)), values

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
        null = F.pad(torch.zeros_like(weights.null[0]), (0, 1), value=1.0)[:, None].expand(rows, -1, -1, -1)
        keys = torch.cat((null, keys), -2)
        values = torch.cat((weights.null[1][:, None].expand(rows, -1, -1, -1), values), -2)
        scores = queries @ keys.mT
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        got = torch.softmax(scores, -1) @ values
        return F.linear(got.transpose(-3, -2).flatten(-2), weights.out)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, self.head_dim)).transpose(-3, -2)

    def _rotated(self, x: Tensor, places: Tensor) -> Tensor:
        """Turns pairs of numbers by angles in proportion to the places."""
        pairs = self.head_dim // (2 * places.shape[-1])
        speeds = _BASE ** (-torch.arange(pairs, device=x.device, dtype=x.dtype) / pairs)
        angles = (places.unsqueeze(-1) * speeds).flatten(-2)
        cos, sin = angles.cos(), angles.sin()
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


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
        self.null = nn.Parameter(torch.zeros(2, rule.heads, rule.head_dim))
        self.out = nn.Parameter(torch.zeros(channels, width))

    def weights(self) -> AttentionWeights:
        """The parameters, in their sequence."""
        return AttentionWeights(*(getattr(self, name) for name in AttentionWeights._fields))

    def extra_repr(self) -> str:
        return f"heads={self.rule.heads}, head_dim={self.rule.head_dim}, window={self.rule.window}"
