"""Flows of images at the papers' sizes."""

import pytest
import torch
from asserts import refuses

import pyro_flows as pf
from pyro_flows.flows import MINTNET_CONFIGURATIONS
from pyro_flows.nets import ConvNet

NETWORKS = {
    **{
        f"mintnet {name}": (pf.mintnet, (1, 28, 28) if name == "mnist" else (3, 32, 32), dict(options))
        for name, options in MINTNET_CONFIGURATIONS.items()
    },
    "glow cifar10": (
        pf.glow,
        (3, 32, 32),
        {"num_scales": 3, "num_layers": 32, "hidden_channels": 512, "kernel_size": (3, 1, 3)},
    ),
    "realnvp cifar10": (pf.multiscale_realnvp, (3, 32, 32), {"num_scales": 2, "hidden_channels": 64, "num_blocks": 8}),
    "realnvp imagenet32": (pf.multiscale_realnvp, (3, 32, 32), {"num_blocks": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_at_the_papers_size(name):
    build, shape, options = NETWORKS[name]
    torch.manual_seed(0)
    flow = build(shape, **options)
    with torch.no_grad():
        if build is pf.glow:
            flow(torch.randn(4, *shape))  # sets the normalization
        for p in flow.parameters():
            p.add_(0.02 * p.abs().mean().clamp(min=0.01) * torch.randn_like(p))
        flow.double()
        y = torch.randn(2, *shape, dtype=torch.float64)
        x, ladj = flow.inverse_and_ladj(y)
        back, forth = flow.forward_and_ladj(x)
    assert ladj.isfinite().all() and not torch.allclose(x, y)
    torch.testing.assert_close(back, y, rtol=0, atol=1e-7)
    torch.testing.assert_close(forth, -ladj, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", MINTNET_CONFIGURATIONS)
def test_layers_of_the_papers_networks_are_triangular(name):
    """In 32 sampled rows of the Jacobian of the first layers of each size."""
    build, shape, options = NETWORKS[f"mintnet {name}"]
    torch.manual_seed(0)
    layers = {}
    for part in build(shape, **options):
        if isinstance(part, pf.Mint):
            layers.setdefault((part.event_shape, part.lower), part)
    assert len(layers) == 6  # three sizes, two directions
    for (event, lower), layer in layers.items():
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.1 * torch.randn_like(p))
        y = torch.randn(event, requires_grad=True)
        x = layer.inverse_and_ladj(y)[0].flatten()
        for row in torch.randperm(len(x))[:32].tolist():
            (seen,) = torch.autograd.grad(x[row], y, retain_graph=True)
            beyond = seen.flatten()[row + 1 :] if lower else seen.flatten()[:row]
            assert seen.flatten()[row] > 0 and not beyond.any()


@pytest.mark.parametrize("space_dims", [1, 2])
def test_three_kernel_sizes(space_dims):
    """The blocks of 1 x 1 see no further than the first and the last convolution."""
    net = ConvNet(2, 2, space_dims=space_dims, num_blocks=3, kernel_size=(3, 1, 3), hidden_channels=4, zero_init=False)
    assert [layer.weight.shape[-1] for layer in (net.first, *net.blocks, net.last)] == [3, *[1] * 6, 3]
    x = torch.randn(2, *(9,) * space_dims, requires_grad=True)
    net(x)[(slice(None), *(4,) * space_dims)].sum().backward()
    seen = x.grad.abs().sum(0).movedim(0, -1).reshape(9, -1).sum(1)
    assert (seen > 0).tolist() == [False] * 2 + [True] * 5 + [False] * 2


def test_kernel_sizes_are_checked():
    for wrong in (2, (3, 2, 3), (3, 3), (3, 1, 3, 3), (3, -1, 3), 0, "three"):
        refuses(ValueError, "kernel_size", pf.glow, (1, 8, 8), kernel_size=wrong)
    flow = pf.glow((1, 8, 8), kernel_size=[5, 1, 3], num_layers=1)
    assert flow.inverse_and_ladj(torch.randn(2, 1, 8, 8))[1].shape == (2,)
