"""Finds a model's latents at a feasible point, and refuses those that no fixed vector represents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterable, Mapping
from inspect import signature
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints, transform_to
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves

from pyro_flows.infer.models.joint import FAILURES, JointDensity
from pyro_flows.infer.models.latents import Latents, same_support
from pyro_flows.infer.models.lifted import Angles, Circles
from pyro_flows.infer.models.sites import Message, Model, latent_messages, run

__all__ = [
    "feasible",
    "finite_start",
    "initializer",
    "inspect",
    "latent_shapes",
    "on_circles",
    "parameters_of",
    "resized",
    "same_objects",
    "sizes_of",
]

Init = Callable[[Message], Tensor]
Sizes = dict[tuple[object, ...], int | str]


def feasible(site: Message, like: Tensor | None = None) -> Tensor:
    """Returns a value in the middle of the support, or a sample of, for example, a discrete one.

    ``like`` gives the dtype and device if the distribution cannot be sampled.
    """
    fn = site["fn"]
    transform = _to_support(fn.support)
    try:
        value = fn.sample().detach()
        if transform is not None:
            value = transform(torch.zeros_like(transform.inv(value)))
    except NotImplementedError:  # an improper prior
        if transform is None:
            raise _no_bijection(site) from None
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        value = transform(torch.zeros(shape) if like is None else like.new_zeros(shape))
    return _replaceable(value)


def _replaceable(value: Any) -> Tensor:
    """Lets a reparametrization replace an initial value without a warning."""
    value._pyro_custom_init = False
    return value


def _to_support(support: constraints.Constraint) -> Transform | None:
    """Maps the line onto a support, not always one to one: a reparametrization may yet replace the site."""
    for registry in (biject_to, transform_to):
        try:
            return registry(support)
        except NotImplementedError:
            continue
    return None


def _no_bijection(site: Message) -> ValueError:
    return ValueError(
        f"AutoFlow: no bijection from the line is known for the support of site {site['name']!r}, "
        f"{site['fn'].support!r}; register one (torch.distributions.biject_to.register), or sample it as "
        "ImproperUniform on a known support with its log-density in pyro.factor"
    )


def initializer(chosen: Init | None, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Init:
    """Returns the user's initializer, with :func:`feasible` where that cannot sample."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    like = next((t for t in tensors if t.is_floating_point()), None)

    def init(site: Message) -> Tensor:
        if chosen is not None:
            try:
                return chosen(site)
            except NotImplementedError:
                pass
        return feasible(site, like)

    return init


class PartError(ValueError):
    """A run sees only a part of a plate that has latents."""


def inspect(
    model: Model, init: Init, args: tuple[object, ...], kwargs: Mapping[str, object], deadline: float = math.inf
) -> tuple[Trace, Latents]:
    """Traces the model at an initial point, lays out its latents, and reruns it at four more points until a deadline.

    Raises:
        ValueError: for a model without latents; for a latent that is discrete, in a sequential or subsampled plate, or
            with a support that has no bijection from the line or depends on another latent; or if the latents change
            between runs.
    """
    model = Circles()(model)
    trace = run(InitMessenger(init)(model), args, kwargs)
    messages = latent_messages(trace)
    for message in messages.values():
        _refuse_site(message)
    latents = Latents.of(trace)
    if not len(latents):
        raise ValueError(
            "AutoFlow: this model has no latent variables: every sample site is observed, or hidden from the guide"
        )
    if latents.dim == 0:
        raise ValueError(f"AutoFlow: the latent sites {list(messages)} are all empty")
    # Opposite points with the same random numbers reveal a structure that depends on a sign.
    for radius in (0.3, -0.3, 1.0, -1.0):

        def moved(site: Message, radius: float = radius) -> Tensor:
            value = init(site)
            transform = _to_support(site["fn"].support)
            if transform is None:  # a reparametrization replaces this value
                return value
            free = transform.inv(value)
            return _replaceable(transform(free + radius * (2 * torch.rand_like(free) - 1)))

        try:
            with torch.random.fork_rng():
                other = run(InitMessenger(moved)(model), args, kwargs)
        except FAILURES:
            continue  # an undefined model shows no structure
        _refuse_change(messages, other)
        if time.monotonic() > deadline:
            break
    return trace, latents


def on_circles(model: Model, latents: Latents) -> Model:
    """The model with its latent angles on circles, if it has any."""
    return Circles()(model) if any(_has_angles(site.support) for site in latents) else model


def _has_angles(support: constraints.Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, Angles)


def _refuse_site(site: Message) -> None:
    name = site["name"]
    try:
        with helpful_support_errors(site):
            biject_to(site["fn"].support)
    except NotImplementedError as error:
        raise _no_bijection(site) from error
    inner = site["fn"]
    while isinstance(getattr(inner, "base_dist", None), Distribution):
        inner = inner.base_dist
    if isinstance(inner, dist.Delta):
        raise ValueError(
            f"AutoFlow: site {name!r} is a Delta, a value and no latent: write pyro.deterministic({name!r}, value)"
        )
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized:
            raise ValueError(
                f"AutoFlow: site {name!r} lies in the sequential plate {frame.name!r}: write it as a vectorized one, "
                f"`with pyro.plate({frame.name!r}, {frame.size}):`, or as one site with an event dimension"
            )
        if frame.full_size is not None and frame.full_size != frame.size:
            raise PartError(
                f"AutoFlow: the latent site {name!r} lies in the plate {frame.name!r}, of which a run sees "
                f"{frame.size} of {frame.full_size}: one vector for all runs would share these latents between "
                "different data. Let the model take its data by index, `with pyro.plate(...) as i: ... obs=y[i]`, so "
                "that it can run on the whole plate; or amortize: in a guide of your own, "
                f"`with pyro.plate({frame.name!r}, ..., subsample_size=...) as i: pyro.sample({name!r}, "
                "flow(context_of(data[i])))` with a conditional flow"
            )


def _refuse_change(first: dict[str, Message], trace: Trace) -> None:
    """Refuses latent sites that change between runs."""
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, site in first.items():
        found = nodes.get(name)
        if found is None or found["value"].shape != site["value"].shape:
            what = "is missing" if found is None else f"has shape {tuple(found['value'].shape)}"
            raise ValueError(
                f"AutoFlow: the latent site {name!r}, of shape {tuple(site['value'].shape)}, {what} at other values of "
                "the latents: a guide over one fixed vector needs the same sites in every run"
            )
        if not same_support(site["fn"].support, found["fn"].support):
            raise ValueError(
                f"AutoFlow: the support of site {name!r} depends on another latent. Sample it on a fixed support, and "
                "compute the bounded value from it (for `x ~ Uniform(0, b)`: `u ~ Uniform(0, 1)`, `x = b * u`)"
            )
    extra = latent_messages(trace).keys() - first.keys()
    if extra:
        raise ValueError(
            f"AutoFlow: the latent sites {sorted(extra)} are there only at some values of the other latents: a guide "
            "over one fixed vector needs the same sites in every run"
        )


@torch.no_grad()
def finite_start(density: JointDensity, trace: Trace, latents: Latents, attempts: int = 20) -> Tensor:
    """Returns a point, shape ``(dim,)``, with finite log-density: the prototype's, or one nearby.

    Raises:
        ValueError: if none is found; names the sites whose log-density is not finite.
    """
    values = {name: message["value"].detach() for name, message in latent_messages(trace).items()}
    first = point = latents.pack(values)
    error: Exception | None = None
    for attempt in range(attempts + 1):
        try:
            if density(point[None]).isfinite().all():
                return point
        except FAILURES as raised:
            error = raised
        point = first + min(0.2 * (attempt + 1), 2.0) * (2 * torch.rand_like(first) - 1)
    try:
        bad = {name: value.item() for name, value in density.sites(first).items() if not value.isfinite()}
    except FAILURES as raised:
        raise ValueError(
            f"AutoFlow: the model raises at the initial values of its latents, and at {attempts} points near them: "
            f"{type(raised).__name__}: {raised}"
        ) from raised
    if error is not None and not bad:
        raise ValueError(
            f"AutoFlow: the model runs at the initial values of its latents, but its density cannot be computed there, "
            f"nor at {attempts} points near them: {type(error).__name__}: {error}"
        ) from error
    cause = "" if error is None else f" ({type(error).__name__}: {error})"
    sites = ", ".join(f"{name!r} ({value})" for name, value in bad.items()) or "the supports' Jacobians"
    raise ValueError(
        f"AutoFlow: the log-density is not finite at the initial values of the latents, nor at {attempts} points near "
        f"them; it comes from {sites}{cause}. Check the data, or say where to start: "
        "init_loc_fn=init_to_value(values={...})"
    ) from error


def sizes_of(model: Model, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Sizes:
    """Returns the sizes of tensors, integers, strings and flags in a call, by place."""
    try:
        bound = signature(model).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
    except (TypeError, ValueError):  # some callables have no signature
        arguments = {"args": args, "kwargs": dict(kwargs)}
    sizes: Sizes = {}
    for path, leaf in tree_flatten_with_path(dict(arguments))[0]:
        shape = getattr(leaf, "shape", None)
        if isinstance(shape, tuple):
            sizes.update({(path, dim): size for dim, size in enumerate(shape)})
        elif isinstance(leaf, (int, str)):
            sizes[(path, None)] = str(leaf) if isinstance(leaf, (bool, str)) else leaf
    return sizes


def resized(plates: Iterable[int], then: Sizes, now: Sizes) -> bool:
    """Whether, for some plate, every argument that had its size has a new one."""
    for plate in set(plates):
        found = [now[place] for place, size in then.items() if size == plate and place in now]
        if found and plate not in found:
            return True
    return False


def latent_shapes(
    model: Model, args: tuple[object, ...], kwargs: Mapping[str, object], observed: Container[str]
) -> dict[str, tuple[int, ...]] | None:
    """Returns the shapes of a model's latents at arguments that may lack data; ``None`` if it cannot run."""
    try:
        with torch.random.fork_rng(), torch.no_grad():
            trace = run(InitMessenger(initializer(None, args, kwargs))(model), args, kwargs)
    except FAILURES:
        return None
    found = {name: site["fn"] for name, site in latent_messages(trace).items() if name not in observed}
    return {name: tuple(fn.batch_shape + fn.event_shape) for name, fn in found.items()}


def parameters_of(trace: Trace) -> dict[str, Tensor]:
    """Copies the parameters in a model's trace that a Pyro optimizer would train, by name."""
    store = pyro.get_param_store()
    found = {}
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, site in nodes.items():
        if site["type"] != "param":
            continue
        value = store[name] if name in store else site["value"]  # a run may see only part of it
        free = value.unconstrained() if hasattr(value, "unconstrained") else value
        if free.requires_grad:
            found[name] = value.detach().clone()
    return found


def same_objects(first: object, second: object) -> bool:
    """Whether two nests of arguments hold the same objects."""
    (one, one_spec), (other, other_spec) = tree_flatten(first), tree_flatten(second)
    return one_spec == other_spec and all(a is b for a, b in zip(one, other, strict=True))
