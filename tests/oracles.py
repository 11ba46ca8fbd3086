"""Slow and plain versions of what the package does cleverly, for comparison."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_flows as pf

Network = Callable[[nn.Module, Tensor, Tensor | None], Tensor]


def plain_network(net: pf.nets.MaskedMLP, x: Tensor, context: Tensor | None = None) -> Tensor:
    """A ``MaskedMLP`` written out with masked weights and torch's own products; shape ``(*batch, D, num_params)``."""
    weights, biases, masks = net.tensors()
    weights = [torch.where(mask != 0, weight, 0.0) for weight, mask in zip(weights, masks, strict=True)]
    pre = F.linear(x[..., net.order], weights[0], biases[0])
    if context is not None:
        pre = pre + F.linear(context, net.context_weight)
    stream, last = pre, len(weights) - 1
    for k in range(1, last + 1):
        pre = F.linear(net.activations[k - 1](pre), weights[k], biases[k])
        if net.residual and k % 2 == 0 and k < last:
            stream = pre = pre + stream
    params = pre.unflatten(-1, (net.num_params, net.input_dim)).transpose(-1, -2)
    return params[..., torch.argsort(net.order), :]


def d_pass(
    transform: pf.Autoregressive, value: Tensor, context: Tensor | None = None, network: Network = plain_network
) -> tuple[Tensor, Tensor]:
    """The slow direction of an autoregressive transform by ``input_dim`` full passes, differentiable throughout.

    After pass k the first k dimensions in the order are right, whatever the start was.
    """
    flat = value if len(transform.event_shape) == 1 else value.flatten(-len(transform.event_shape))
    if context is not None:
        batch = torch.broadcast_shapes(flat.shape[:-1], context.shape[:-1])
        flat = flat.expand(*batch, flat.shape[-1])
    move = transform.univariate.inverse
    solved = torch.zeros_like(flat)
    for _ in range(flat.shape[-1]):
        solved, ladj = move(flat, network(transform.net, solved, context))
    return solved.reshape(*solved.shape[:-1], *transform.event_shape), ladj.sum(-1)


def slow_direction(transform: pf.Autoregressive) -> Callable[..., tuple[Tensor, Tensor]]:
    """The method of a transform that goes through the engine."""
    return transform.inverse_and_ladj if transform.fast == "sampling" else transform.forward_and_ladj


def fast_direction(transform: pf.Autoregressive) -> Callable[..., tuple[Tensor, Tensor]]:
    """The method of a transform that takes one pass."""
    return transform.forward_and_ladj if transform.fast == "sampling" else transform.inverse_and_ladj


def jacobian(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian by one backward pass for each output number: shape ``(*out, *x.shape)``."""
    return torch.autograd.functional.jacobian(call, x)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error in units of the largest entry."""
    got, want = got.detach(), want.detach()
    if want.numel() == 0:
        return 0.0
    scale = want.abs().max().clamp(min=1e-300)
    return float(((got - want).abs().max() / scale).nan_to_num(nan=torch.inf))


def kept(run: Callable[..., object], *args: object) -> dict[int, int]:
    """Bytes of the storages that a call keeps for its gradient, by where they are."""
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        run(*args)
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}


def jacobians(out: Tensor, value: Tensor) -> Tensor:
    """Of each row, by one backward pass for each output number: ``(n, outputs, inputs)``."""
    columns = out.flatten(1).unbind(1)
    return torch.stack([torch.autograd.grad(c.sum(), value, retain_graph=True)[0].flatten(1) for c in columns], 1)
