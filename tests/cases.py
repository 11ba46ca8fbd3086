"""Every flow of the package once, small: what the contract tests run over."""

import copy
import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import transforms as torch_transforms

import pyro_flows as pf
from pyro_flows.testing import CHECKS
from pyro_flows.transforms import (
    Bounds,
    CausalAutoregressive,
    Coloring,
    Conv1x1,
    FixedSpline,
    Householder,
    IntegerCoupling,
    IntegerSplit,
    Plated,
    Preconditioner,
    RecursiveSphere,
    Split,
    Squeeze,
)
from pyro_flows.univariate import Shift, Univariate

CONTEXT_DIM = 2


@dataclass(frozen=True)
class Case:
    """A flow to test.

    Attributes:
        name: unique.
        covers: the public names that it stands for.
        build: from a ``context_dim`` (0 for none) to the flow; where it takes none, it is called with 0 only.
        event_shape: shape of a base-side value.
        takes_context: whether it can be built with a context.
        scale: how far ``shake`` moves its parameters.
        rtol: of ``check_transform``, in units of the machine epsilon; ``None`` for its own.
        positive: whether base-side values must be positive.
        angles: whether base-side values are angles, from one turn.
        whole: whether base-side values are whole numbers.
        sphere: whether base-side values have length 1.
        left_out: checks of ``check_transform`` that Python itself rules out for this one.
    """

    name: str
    covers: tuple[str, ...]
    build: Callable[[int], pf.FlowTransform]
    event_shape: tuple[int, ...]
    takes_context: bool = True
    scale: float = 0.5
    rtol: float | None = None
    positive: bool = False
    angles: bool = False
    whole: bool = False
    sphere: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def checks(self) -> list[str]:
        return [name for name in CHECKS if name not in self.left_out]

    def draw(self, batch: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A base-side value."""
        x = torch.randn(*batch, *self.event_shape, dtype=dtype, device=device)
        if self.angles:
            return 3 * torch.tanh(x)
        if self.whole:
            return (3 * x).round()
        if self.sphere:
            return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.abs() + 0.1 if self.positive else x


def generator(seed: int = 0) -> torch.Generator:
    """A generator of the CPU."""
    return torch.Generator().manual_seed(seed)


def seeded(seed: int) -> torch.Generator:
    """A generator of the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def shake(module: nn.Module, scale: float = 0.5, seed: int | None = None) -> nn.Module:
    """Moves all parameters far from where they start, zeros included, by normal noise; returns the module."""
    generator = None if seed is None else torch.Generator(next(module.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device))
    return module


def scaled(module: nn.Module, factor: float) -> nn.Module:
    """Multiplies all parameters; returns the module."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(factor)
    return module


def reload(saved: nn.Module, loaded: nn.Module) -> None:
    """Gives one module the state of another, by way of a file."""
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))


class Calls(nn.Module):
    """A module whose call is a method of another one, for ``functional_call``; parameters begin with ``inner.``."""

    def __init__(self, inner: nn.Module, method: str) -> None:
        super().__init__()
        self.inner, self.method = inner, method

    def forward(self, *args: object) -> object:
        return getattr(self.inner, self.method)(*args)


class Field(nn.Module):
    """A vector field: a function of the time, the place, and the tensors that it learns."""

    def __init__(self, function: Callable[..., Tensor], *learnt: Tensor) -> None:
        super().__init__()
        self.function = function
        self.learnt = nn.ParameterList(nn.Parameter(each.clone()) for each in learnt)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.function(t, x, *self.learnt)


def guide_of(flow: pf.Flow, site: str = "z") -> Callable[[], Tensor]:
    """A guide of one site, whose distribution is a flow that learns."""
    return lambda: pyro.sample(site, pyro.module("flow", flow)())


def train(flow: pf.Flow, data: Tensor, steps: int, lr: float, context: Tensor | None = None) -> list[float]:
    """Maximum likelihood by Adam on all data at once; the loss at each step."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -flow.log_prob(data, context).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def full_but(values: Iterable[object], *kept: object) -> list[object]:
    """Values for ``parametrize`` or a fixture, of which all but ``kept`` are left to the full suite."""
    values = list(values)
    if not all(each in values for each in kept):
        raise ValueError(f"expected some of {values}, got {kept}")
    return [value if value in kept else pytest.param(value, marks=pytest.mark.full) for value in values]


def altered(whole: dict, others: Iterable[object]) -> Iterator[tuple[tuple, object, object, dict]]:
    """Copies of nested dictionaries that lack an entry (``None``) or have another in its place.

    Gives the way to the entry, what it was and what it is, and the copy.
    """

    def entries(content: dict, *where: object) -> Iterator[tuple]:
        for key, value in content.items():
            yield (*where, key)
            if isinstance(value, dict):
                yield from entries(value, *where, key)

    for where in entries(whole):
        for other in others:
            content = copy.deepcopy(whole)
            holder = content
            for key in where[:-1]:
                holder = holder[key]
            known = holder.pop(where[-1])
            if other is not None:
                holder[where[-1]] = other
            yield where, known, other, content


class Sinh(Univariate):
    """A family as a user would write it: forward and inverse only, without closed forms for the engine.

    ``y = sinh(tanh(b) + asinh(x + m))``: increasing, neither affine nor odd, with both directions in closed form.
    """

    num_params = 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, bend = params.unbind(-1)
        inner, bend = torch.asinh(x + shift), torch.tanh(bend)
        return torch.sinh(inner + bend), torch.log(torch.cosh(inner + bend)) - torch.log(torch.cosh(inner))

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, bend = params.unbind(-1)
        inner, bend = torch.asinh(y), torch.tanh(bend)
        return torch.sinh(inner - bend) - shift, torch.log(torch.cosh(inner - bend)) - torch.log(torch.cosh(inner))


def diamond() -> Tensor:
    """An adjacency on four dimensions: 2 -> {0, 3} -> 1."""
    adjacency = torch.zeros(4, 4, dtype=torch.bool)
    adjacency[0, 2] = adjacency[3, 2] = adjacency[1, 0] = adjacency[1, 3] = adjacency[1, 2] = True
    return adjacency


_SMALL = {"hidden_dims": (8, 8)}


def _sine(x: Tensor) -> Tensor:
    return x + torch.sin(x)


def _leaves() -> Iterator[Case]:
    def coupling(name: str, shape: int | tuple[int, ...], *args: object, **options: object) -> Case:
        event = (shape,) if isinstance(shape, int) else shape

        def build(context_dim: int) -> pf.FlowTransform:
            return pf.Coupling(shape, *args, context_dim=context_dim, **{"hidden_dims": (8,), **options})

        return Case(f"coupling-{name}", ("Coupling",), build, event)

    yield coupling("affine", 3)
    yield coupling("half", 5, mask="half")
    yield coupling("half-flipped", 5, mask="half", flip=True)
    yield coupling("random", 4, mask="random")
    yield coupling("image", (2, 3), mask=[[True, False, True], [False, False, True]])
    yield coupling("one-dimension", 1)
    yield coupling("shift", 3, Shift())
    yield coupling("own-univariate", 3, Sinh())
    yield coupling("spline", 3, pf.Spline())
    yield coupling("spline-identity", (2, 2), pf.Spline(2, 2.0, "identity"), mask="half")

    def circular(name: str, dims: int, **options: object) -> Case:
        def build(context_dim: int) -> pf.FlowTransform:
            spline = pf.Spline(5, boundary="circular")
            return pf.Coupling(dims, spline, context_dim=context_dim, hidden_dims=(8,), **options)

        return Case(f"coupling-circular{name}", ("Coupling",), build, (dims,), angles=True)

    yield circular("", 3)
    yield circular("-mixed", 4, mask=[True, True, True, False], periodic=[False, True, False, True])
    yield circular("-one-dimension", 1)
    yield coupling("residual", 3, residual=True, hidden_dims=(6, 6), activation="tanh")

    def autoregressive(name: str, shape: int | tuple[int, ...], *args: object, **options: object) -> Iterator[Case]:
        event = (shape,) if isinstance(shape, int) else shape
        left_out = options.pop("left_out", ())
        for fast in ("density", "sampling"):

            def build(context_dim: int, fast: str = fast) -> pf.FlowTransform:
                settings = {"hidden_dims": (8, 8), "fast": fast, **options}
                return pf.Autoregressive(shape, *args, context_dim=context_dim, **settings)

            yield Case(f"autoregressive-{fast}-{name}", ("Autoregressive",), build, event, left_out=left_out)

    yield from autoregressive("affine", 4)
    yield from autoregressive("random-order", 5, order="random")
    yield from autoregressive("given-order", 4, order=[2, 0, 3, 1], activation="relu")
    yield from autoregressive("adjacency", 4, adjacency=diamond())
    yield from autoregressive("residual", 4, residual=True, activation="gelu")
    yield from autoregressive("no-hidden", 3, hidden_dims=())
    yield from autoregressive("narrow", 5, hidden_dims=(2, 3), activation="tanh")
    yield from autoregressive("activations", 4, activation=("isru", "silu"))
    yield from autoregressive("image", (2, 3), order="reverse")
    yield from autoregressive("one-dimension", 1)
    yield from autoregressive("shift", 3, Shift())
    yield from autoregressive("spline", 4, pf.Spline(4))
    yield from autoregressive("spline-identity", 9, pf.Spline(3, 2.0, "identity"), order="random")
    yield from autoregressive("spline-no-hidden", 3, pf.Spline(3), hidden_dims=())
    yield from autoregressive("own-univariate", 3, Sinh(), activation=_sine)
    # A lambda does not pickle, whoever holds it.
    yield from autoregressive("lambda", 3, activation=lambda x: x * torch.sigmoid(x), left_out=("copies",))

    def rescaling(shape: int | tuple[int, ...]) -> Callable[[int], pf.FlowTransform]:
        return lambda context_dim: pf.Rescaling(shape, context_dim=context_dim, hidden_dims=(8,))

    yield Case("rescaling", ("Rescaling",), rescaling(3), (3,))
    yield Case("rescaling-image", ("Rescaling",), rescaling((2, 3)), (2, 3))

    def permutation(name: str, shape: int | tuple[int, ...], indices: object) -> Case:
        event = (shape,) if isinstance(shape, int) else shape
        return Case(name, ("Permutation",), lambda _: pf.Permutation(shape, indices), event, takes_context=False)

    yield permutation("permutation-random", 4, "random")
    yield permutation("permutation-reverse", (2, 3), "reverse")
    yield permutation("permutation-given", 3, [2, 0, 1])

    def plain(name: str, flow: type[pf.FlowTransform], shape: int | tuple[int, ...], **options: object) -> Case:
        event = (shape,) if isinstance(shape, int) else shape
        return Case(name, (flow.__name__,), lambda _: flow(shape, **options), event, takes_context=False, scale=0.3)

    yield plain("lu-linear", pf.LULinear, 4)
    yield plain("lu-linear-random", pf.LULinear, 5, permutation="random", bias=False)
    yield plain("lu-linear-reverse", pf.LULinear, 3, permutation="reverse")
    yield plain("lu-linear-image", pf.LULinear, (2, 3), permutation=[4, 2, 0, 1, 3, 5])
    yield plain("lu-linear-one-dimension", pf.LULinear, 1)
    yield plain("householder", Householder, 4)
    yield plain("householder-odd", Householder, 5, num_reflections=3)
    yield plain("householder-many", Householder, 3, num_reflections=8)
    yield plain("householder-image", Householder, (2, 3), num_reflections=2)
    yield plain("householder-one-dimension", Householder, 1)

    def actnorm(name: str, shape: tuple[int, ...]) -> Case:
        def build(_: int) -> pf.FlowTransform:
            flow = pf.ActNorm(shape)
            flow.inverse_and_ladj(2 * torch.randn(50, *shape) + 1)  # its first batch
            return flow

        return Case(name, ("ActNorm",), build, shape, takes_context=False)

    yield actnorm("actnorm", (3,))
    yield actnorm("actnorm-series", (2, 4))
    yield actnorm("actnorm-image", (2, 3, 2))
    yield Case("actnorm-unset", ("ActNorm",), lambda _: pf.ActNorm(3).eval(), (3,), takes_context=False)

    def standardization(_: int) -> pf.FlowTransform:
        return pf.Standardization(torch.tensor([1.0, -20.0, 0.3]), torch.tensor([0.1, 3.0, 10.0]))

    yield Case("standardization", ("Standardization",), standardization, (3,), takes_context=False)

    def bounds(_: int) -> pf.FlowTransform:
        return Bounds([0.0, -3.0, -math.inf, -math.inf], [1.0, math.inf, 7.0, math.inf])

    yield Case("bounds", ("Bounds",), bounds, (4,), takes_context=False)

    def coloring(name: str, shape: tuple[int, ...]) -> Case:
        def build(context_dim: int) -> pf.FlowTransform:
            size = torch.Size(shape).numel()
            factor = 0.3 * torch.randn(size, size) + torch.diag(1 + torch.rand(size))
            factor.diagonal().abs_().add_(0.1)
            slope = torch.randn(size, context_dim) if context_dim else None
            return Coloring(torch.randn(shape), factor, slope)

        return Case(name, ("Coloring",), build, shape)

    yield coloring("coloring", (3,))
    yield coloring("coloring-image", (2, 3))

    def logit_pixels(name: str, shape: tuple[int, ...], **options: object) -> Case:
        build = lambda _: pf.LogitPixels(shape, **options)  # noqa: E731
        return Case(f"logit-pixels{name}", ("LogitPixels",), build, shape, takes_context=False)

    yield logit_pixels("", (2, 3))
    yield logit_pixels("-narrow", (3,), levels=17, margin=1e-6)

    def preconditioner(name: str, size: int, full: bool) -> Case:
        def build(_: int) -> pf.FlowTransform:
            generator = seeded(0)

            def normal(*shape: int) -> Tensor:
                return torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())

            scale = (0.3 * normal(size)).exp()
            if full:
                scale = torch.diag(scale) + 0.3 * normal(size, size).tril(-1)
            return Preconditioner(3 * normal(size), scale)

        return Case(name, ("Preconditioner",), build, (size,), takes_context=False, scale=0.3)

    def fixed_spline(name: str, size: int, dims: list[int]) -> Case:
        def build(_: int) -> pf.FlowTransform:
            x = torch.linspace(-3.0, 3.0, 7).repeat(len(dims), 1)
            slopes = torch.rand(len(dims), 7, generator=seeded(0), dtype=torch.float64).to(x) + 0.2
            return FixedSpline(size, torch.tensor(dims), torch.stack([x, x + 0.3 * x.sinh() - 2.0, slopes]))

        return Case(name, ("FixedSpline",), build, (size,), takes_context=False)

    yield fixed_spline("fixed-spline", 4, [3, 1])
    yield fixed_spline("fixed-spline-one-dimension", 1, [0])

    yield preconditioner("preconditioner", 4, full=True)
    yield preconditioner("preconditioner-diagonal", 4, full=False)
    yield preconditioner("preconditioner-one-dimension", 1, full=True)

    def plated(
        name: str,
        count: int,
        members: list[list[list[int]]],
        ancestors: list[list[list[int]]] | None,
        lengths: list[int] | None = None,
        differences: list[bool] | None = None,
    ) -> Case:
        def build(_: int) -> pf.FlowTransform:
            places = [torch.tensor(each) for each in members]
            above = None if ancestors is None else [torch.tensor(each).reshape(len(each), -1) for each in ancestors]
            size = count + sum(each.numel() for each in places)
            flow = pf.realnvp(count, num_layers=2, hidden_dims=(5,)) if count else None
            return Plated(size, flow, places, above, lengths, differences)

        size = count + sum(len(row) for each in members for row in each)
        return Case(name, ("Plated",), build, (size,), takes_context=False, scale=0.1)

    yield plated("plated", 2, [[[1], [2], [3]]], None)
    yield plated("plated-two-levels", 1, [[[4, 1], [0, 2]], [[5], [3], [6]]], [[[], []], [[4, 1], [0, 2], [0, 2]]])
    yield plated("plated-without-globals", 0, [[[0, 2], [3, 1]]], None)
    chains = [[[1], [3], [2], [5], [4], [6]], [[8, 9], [7, 10], [12, 11], [13, 14]]]
    yield plated("plated-chains", 1, chains, None, [3, 4])
    yield plated("plated-chains-of-differences", 1, chains, None, [6, 2], [True, True])

    def wrap(name: str, transform: torch_transforms.Transform, shape: tuple[int, ...], positive: bool = False) -> Case:
        build = lambda _: pf.Wrap(transform, shape)  # noqa: E731
        return Case(f"wrap-{name}", ("Wrap",), build, shape, takes_context=False, positive=positive)

    yield wrap("exp", torch_transforms.ExpTransform(), (3,))
    yield wrap("log", torch_transforms.ExpTransform().inv, (2, 2), positive=True)
    yield wrap("sigmoid", torch_transforms.SigmoidTransform(), (2,))
    yield wrap("affine", torch_transforms.AffineTransform(0.5, 2.0), (2, 3))
    yield wrap("stick-breaking", torch_transforms.StickBreakingTransform(), (3,))


def _composites() -> Iterator[Case]:
    def nested(context_dim: int) -> pf.FlowTransform:
        inner = pf.Chain(
            [
                pf.Permutation(3, [1, 2, 0]),
                pf.maf(3, num_layers=1, context_dim=context_dim, **_SMALL),
                torch_transforms.AffineTransform(0.5, 2.0),
            ]
        )
        parts = [inner, pf.Coupling(3, hidden_dims=(8,)), pf.iaf(3, num_layers=1, context_dim=context_dim, **_SMALL)]
        return pf.Chain([parts[0], pf.Chain(parts[1:]).inv])

    yield Case("chain-nested", ("Chain", "Inverse"), nested, (3,))

    def onto_positive(context_dim: int) -> pf.FlowTransform:
        return pf.Chain([pf.maf(3, num_layers=1, context_dim=context_dim, **_SMALL), torch_transforms.ExpTransform()])

    yield Case("chain-onto-positive", ("Chain",), onto_positive, (3,), scale=0.3)

    def conditioned(_: int) -> pf.FlowTransform:
        flow = pf.Autoregressive(3, context_dim=CONTEXT_DIM, hidden_dims=(8,))
        return flow.condition(torch.tensor([0.5, -1.0]))

    yield Case("conditioned", ("Conditioned",), conditioned, (3,), takes_context=False)


def _builders() -> Iterator[Case]:
    variants: dict[str, list[tuple[str, int | tuple[int, ...], dict[str, object]]]] = {
        "nice": [
            ("", 3, {}),
            ("-image", (2, 3), {"mask": "half"}),
            ("-one-dimension", 1, {}),
            ("-no-rescale", 3, {"rescale": False, "mask": "random"}),
        ],
        "realnvp": [
            ("", 4, {}),
            ("-half", 5, {"mask": "half", "num_layers": 2}),
            ("-random", 4, {"mask": "random", "num_layers": 4}),
            ("-given", 3, {"mask": [True, False, False], "num_layers": 2}),
            ("-image", (2, 3), {"mask": "alternating", "num_layers": 2, "residual": True}),
            ("-one-dimension", 1, {"num_layers": 2}),
            ("-own-univariate", 3, {"univariate": Sinh(), "num_layers": 2}),
        ],
    }
    for name in ("maf", "iaf"):
        variants[name] = [
            ("", 4, {}),
            ("-random", 5, {"order": "random", "num_layers": 2}),
            ("-adjacency", 4, {"adjacency": diamond(), "num_layers": 2}),
            ("-residual", 3, {"residual": True, "num_layers": 2}),
            ("-narrow", 5, {"hidden_dims": (2,), "num_layers": 2}),
            ("-image", (2, 3), {"num_layers": 2}),
            ("-one-dimension", 1, {"num_layers": 2}),
            ("-own-univariate", 3, {"univariate": Sinh(), "num_layers": 2}),
        ]
    variants["nsf"] = [
        ("", 4, {}),
        ("-autoregressive", 4, {"autoregressive": True}),
        ("-autoregressive-adjacency", 4, {"autoregressive": True, "adjacency": diamond(), "num_layers": 2}),
        ("-identity", 3, {"boundary": "identity", "num_layers": 2, "mask": "half", "bound": 3.0}),
        ("-image", (2, 3), {"num_layers": 2, "residual": True, "bins": 3}),
        ("-one-dimension", 1, {"num_layers": 2}),
        ("-autoregressive-one-dimension", 1, {"num_layers": 2, "autoregressive": True}),
    ]
    variants["ncsf"] = [
        ("", 3, {"num_layers": 4}),
        ("-mixed", 4, {"num_layers": 2, "periodic": [True, False, True, False], "mask": "half"}),
        ("-one-dimension", 1, {"num_layers": 2}),
        ("-random", (2, 2), {"num_layers": 2, "mask": "random", "residual": True}),
    ]
    for name, each in variants.items():
        builder = getattr(pf, name)
        for suffix, shape, options in each:

            def build(
                context_dim: int,
                builder: Callable[..., pf.Chain] = builder,
                shape: int | tuple[int, ...] = shape,
                options: dict[str, object] = options,
            ) -> pf.FlowTransform:
                return builder(shape, context_dim=context_dim, **{**_SMALL, **options})

            event = (shape,) if isinstance(shape, int) else shape
            scale = 0.1 if name in ("nsf", "ncsf") else 0.2
            yield Case(name + suffix, (name, "Chain"), build, event, scale=scale, angles=name == "ncsf")


def _spheres() -> Iterator[Case]:
    def layer(name: str, size: int, **options: object) -> Case:
        def build(context_dim: int) -> pf.FlowTransform:
            return RecursiveSphere(size, context_dim=context_dim, **{"hidden_dims": (8,), "bins": 4, **options})

        return Case(f"recursive-sphere-{name}", ("RecursiveSphere",), build, (size,), scale=0.3, sphere=True)

    yield layer("2", 3)
    yield layer("1", 2)
    yield layer("3", 4, axis=1)
    yield layer("5", 6, bins=3, residual=True, hidden_dims=(6, 6))

    def build(context_dim: int) -> pf.FlowTransform:
        return pf.sphere(3, context_dim=context_dim, num_layers=3, bins=4, **_SMALL)

    yield Case("sphere", ("sphere", "RecursiveSphere", "Chain"), build, (3,), scale=0.2, sphere=True)


def _images() -> Iterator[Case]:
    small = {"hidden_channels": 3, "num_blocks": 1}

    def coupling(name: str, shape: tuple[int, ...], *args: object, **options: object) -> Case:
        def build(context_dim: int) -> pf.FlowTransform:
            return pf.ConvCoupling(shape, *args, context_dim=context_dim, **{**small, **options})

        return Case(f"conv-coupling-{name}", ("ConvCoupling",), build, shape, scale=0.3)

    corner = torch.zeros(2, 2, 2, dtype=torch.bool)
    corner[0, 0, 1] = corner[1, 1] = True
    yield coupling("checkerboard", (2, 2, 3))
    yield coupling("channels", (3, 2, 2), mask="channels", flip=True, activation="elu")
    yield coupling("boolean", (2, 2, 2), Shift(), mask=corner, num_blocks=0)
    yield coupling("series", (2, 3), pf.Spline(3), mask="channels")
    yield coupling("series-checkerboard", (1, 5), pf.Spline(2), flip=True, kernel_size=1)
    yield coupling("one-number", (1, 1, 1))
    yield coupling("own-univariate", (1, 2, 2), Sinh())

    def plain(name: str, covers: str, flow: Callable[[], pf.FlowTransform]) -> Case:
        made = flow()
        return Case(name, (covers,), lambda _: flow(), tuple(made.event_shape), takes_context=False, scale=0.2)

    yield plain("squeeze", "Squeeze", lambda: Squeeze((2, 4, 2)))
    yield plain("squeeze-series", "Squeeze", lambda: Squeeze((3, 4)))
    yield plain("conv1x1", "Conv1x1", lambda: Conv1x1((3, 2, 2)))
    yield plain("conv1x1-series", "Conv1x1", lambda: Conv1x1((4, 3), start="permutation", bias=True))
    yield plain("conv1x1-identity", "Conv1x1", lambda: Conv1x1((2, 1, 2), start="identity"))
    yield plain("conv1x1-one-channel", "Conv1x1", lambda: Conv1x1((1, 2)))

    def split(context_dim: int) -> pf.FlowTransform:
        options = {"context_dim": context_dim, "hidden_channels": 3}
        last = Split(None, (2, 2, 2), **options)
        return Split(pf.Chain([last, Conv1x1((2, 2, 2))]), (4, 2, 2), **options)

    yield Case("split", ("Split",), split, (4, 2, 2), scale=0.2)
    squeezing = lambda _: pf.Chain([Squeeze((1, 4)).inv, Conv1x1((2, 2)), Squeeze((1, 4))])  # noqa: E731
    series = lambda c: Split(squeezing(c), (2, 4), context_dim=c, hidden_channels=3, num_blocks=1)  # noqa: E731
    yield Case("split-series", ("Split",), series, (2, 4), scale=0.2)

    def realnvp(shape: tuple[int, ...], **options: object) -> Callable[[int], pf.FlowTransform]:
        settings = {**small, "num_couplings": 1, "activation": "elu", **options}
        return lambda context_dim: pf.multiscale_realnvp(shape, context_dim=context_dim, **settings)

    covers = ("multiscale_realnvp", "Chain", "Split", "Inverse")
    yield Case("multiscale_realnvp", covers, realnvp((1, 4, 4), num_scales=2), (1, 4, 4), scale=0.1)
    spline = realnvp((1, 4), num_scales=3, univariate=pf.Spline(3))
    yield Case("multiscale_realnvp-nsf-series", covers, spline, (1, 4), scale=0.1)

    def glow(shape: tuple[int, ...], **options: object) -> Callable[[int], pf.FlowTransform]:
        def build(context_dim: int) -> pf.FlowTransform:
            settings = {**small, "num_layers": 2, "activation": "elu", **options}
            flow = pf.glow(shape, context_dim=context_dim, **settings)
            flow.inverse_and_ladj(2 * torch.randn(50, *shape) + 1, torch.randn(context_dim) if context_dim else None)
            return flow  # after its first batch

        return build

    covers = ("glow", "Chain", "Split", "Inverse")
    yield Case("glow", covers, glow((2, 4, 4), num_layers=1), (2, 4, 4), scale=0.1)
    yield Case("glow-series", covers, glow((1, 4), num_scales=1), (1, 4), scale=0.1)


def _mint() -> Iterator[Case]:
    def layer(name: str, shape: tuple[int, ...], **options: object) -> Case:
        def build(context_dim: int) -> pf.FlowTransform:
            settings = {"num_groups": 2, "hidden_dims": (4,), "tolerance": 1e-14, **options}
            return pf.Mint(shape, context_dim=context_dim, **settings)

        return Case(f"mint{name}", ("Mint",), build, shape)

    yield layer("", (2, 2, 2))
    yield layer("-upper", (1, 2, 3), lower=False, activation="tanh", num_groups=3)
    yield layer("-position", (3, 1, 2), order="position", activation="softplus")
    yield layer("-series", (2, 3), kernel_size=5, shared_scale=True, activation="sigmoid")
    yield layer("-one-number", (1, 1, 1), num_groups=1, kernel_size=1)
    attention = {"attention": 1, "head_dim": 5}
    yield layer("-attention", (2, 2, 2), **attention, lower=False)
    yield layer("-attention-series", (1, 5), **attention, window=2, shared_scale=True)

    def mintnet(shape: tuple[int, ...], **options: object) -> Callable[[int], pf.FlowTransform]:
        settings = {"num_groups": 2, "hidden_dims": (4,), "tolerance": 1e-14, **options}
        return lambda context_dim: pf.mintnet(shape, context_dim=context_dim, **settings)

    covers = ("mintnet", "Mint", "Chain", "Squeeze", "Inverse")
    yield Case("mintnet", covers, mintnet((1, 4, 2), num_layers=2, squeeze=1), (1, 4, 2), scale=0.2)
    split = mintnet((2, 4), num_layers=2, squeeze=1, split=True)
    yield Case("mintnet-split-series", covers, split, (2, 4), scale=0.1)
    causal = mintnet((2, 5), num_layers=1, causal=True, dilations=(1, 2))
    yield Case("mintnet-causal", ("mintnet", "Mint", "Chain"), causal, (2, 5), scale=0.2)


def _series() -> Iterator[Case]:
    small = {"hidden_channels": 3, "num_convolutions": 2}

    def layer(name: str, shape: tuple[int, ...], *args: object, **options: object) -> Case:
        def build(context_dim: int) -> pf.FlowTransform:
            return CausalAutoregressive(shape, *args, context_dim=context_dim, **{**small, **options})

        return Case(f"causal-{name}", ("CausalAutoregressive",), build, shape, scale=0.3)

    yield layer("sampling", (2, 3), fast="sampling", kernel_size=2)
    yield layer("spline", (1, 4), pf.Spline(3))
    yield layer("own-univariate", (2, 2), Sinh(), activation="tanh", dilations=2)
    yield layer("one-number", (1, 1), num_convolutions=1)

    def build(context_dim: int) -> pf.FlowTransform:
        return pf.causal_maf((2, 3), context_dim=context_dim, **small)

    yield Case("causal_maf", ("causal_maf", "CausalAutoregressive", "Chain"), build, (2, 3), scale=0.2)


class _Waves(nn.Module):
    """A field as a user would write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(x)) * torch.cos(t)


def _continuous() -> Iterator[Case]:
    # Two solves agree as far as the tolerance, 1e-12, and not to rounding.
    fine = {"solver": "dopri8", "rtol": 1e-12, "atol": 1e-12}
    ulps = 2.0**16

    def cnf(name: str, shape: int | tuple[int, ...], **options: object) -> Case:
        event = (shape,) if isinstance(shape, int) else shape

        def build(context_dim: int) -> pf.FlowTransform:
            return pf.cnf(shape, context_dim=context_dim, **{"hidden_dims": (4,), **fine, **options})

        return Case("cnf" + name, ("cnf", "Continuous", "Chain"), build, event, scale=0.2, rtol=ulps)

    yield cnf("", 2)
    yield cnf("-mlp", 1, field="mlp", activation="softplus", per_row=True, gradient="backprop")
    yield cnf("-series", (1, 2), field="conv", hidden_dims=(2,))

    given = lambda _: pf.Continuous(2, _Waves(2), **fine)  # noqa: E731

    yield Case("continuous-given", ("Continuous",), given, (2,), takes_context=False, scale=0.2, rtol=ulps)


def _integers() -> Iterator[Case]:
    small = {"hidden_dims": (5,), "levels": 8}

    def coupling(name: str, shape: int | tuple[int, ...], mask: list[bool], **options: object) -> Case:
        event = (shape,) if isinstance(shape, int) else shape
        build = lambda c: IntegerCoupling(shape, mask, context_dim=c, **{**small, **options})  # noqa: E731
        return Case(f"integer-coupling{name}", ("IntegerCoupling",), build, event, whole=True)

    yield coupling("", 3, [True, False, True])
    yield coupling("-image", (3, 2, 3), [False, True, False])
    yield coupling("-series", (2, 4), [True, False], kernel_size=1, hidden_dims=())
    yield coupling("-one-dimension", 1, [False])

    def idf(name: str, shape: int | tuple[int, ...], **options: object) -> Case:
        event = (shape,) if isinstance(shape, int) else shape
        build = lambda c: pf.idf(shape, context_dim=c, **{**small, "num_layers": 2, **options})  # noqa: E731
        covers = ("idf", "IntegerCoupling", "Chain") + (("IntegerSplit",) if len(event) > 1 else ())
        return Case(f"idf{name}", covers, build, event, whole=True, scale=0.3)

    yield idf("", 5, num_parts=4)
    yield idf("-one-dimension", 1)
    yield idf("-image", (1, 4, 8), num_scales=2)
    yield idf("-series", (2, 8), num_scales=2, num_parts=3, num_layers=1)

    def split(context_dim: int) -> pf.FlowTransform:
        inner = IntegerCoupling((2, 2, 2), [True, False], context_dim=context_dim, **small)
        return IntegerSplit(inner, (4, 2, 2))

    yield Case("integer-split", ("IntegerSplit",), split, (4, 2, 2), whole=True)


def _inverses(cases: list[Case]) -> Iterator[Case]:
    for name in (
        "coupling-image",
        "autoregressive-density-affine",
        "rescaling",
        "nice",
        "realnvp",
        "maf",
        "iaf",
        "nsf",
    ):
        case = next(case for case in cases if case.name == name)

        def build(context_dim: int, inner: Callable[[int], pf.FlowTransform] = case.build) -> pf.FlowTransform:
            return inner(context_dim).inv

        yield Case(f"inverse-{name}", ("Inverse",), build, case.event_shape, scale=case.scale)


CASES = [*_leaves(), *_composites(), *_builders(), *_spheres(), *_images(), *_mint(), *_series(), *_continuous()]
CASES += _inverses(CASES)
# Bijections of whole numbers: in the contract only, since no other test draws values that they take.
INTEGERS = list(_integers())
# The first case of each flow, and the others for the full suite.
FIRST = list({case.covers[0]: case for case in reversed(CASES)}.values())
EACH_FLOW = full_but(CASES, *FIRST)
BUILDERS = [case for case in CASES if case.name in ("nice", "realnvp", "maf", "iaf", "nsf", "ncsf")]
INTEGER_BUILDERS = [case for case in INTEGERS if case.name == "idf"]
IMAGE_BUILDERS = [case for case in CASES if case.name in ("causal_maf", "cnf", "glow", "mintnet", "multiscale_realnvp")]
