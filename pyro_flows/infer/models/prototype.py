"""A first look at a model: its latents at a feasible point, and what no guide of one fixed vector could represent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterable, Mapping
from inspect import signature

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints, transform_to
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from pyro_flows.infer.models.joint import FAILURES, JointDensity
from pyro_flows.infer.models.latents import Latents, same_support

__all__ = ["feasible", "finite_start", "inspect", "latent_shapes", "parameters_of", "resized", "sizes_of"]

ANGLES = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


Init = Callable[[dict[str, object]], Tensor]


def feasible(site: dict[str, object], like: Tensor | None = None) -> Tensor:
    """A value in the middle of the support, also where the distribution cannot be sampled.

    Where the support has no middle, as that of a discrete site, the value is a sample.

    Args:
        site: of a trace.
        like: gives dtype and device where the distribution has no tensors of its own.
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
    value._pyro_custom_init = False  # a reparameterization may replace it without a warning
    return value


def _to_support(support: constraints.Constraint) -> Transform | None:
    """From the line; onto the support, but perhaps not one to one: a reparameterization may still replace the site."""
    for registry in (biject_to, transform_to):
        try:
            return registry(support)
        except NotImplementedError:
            continue
    return None


def _no_bijection(site: dict[str, object]) -> ValueError:
    return ValueError(
        f"AutoFlow: no bijection from the line is known for the support of site {site['name']!r}, "
        f"{site['fn'].support!r}; register one (torch.distributions.biject_to.register), or sample it as "
        "ImproperUniform on a known support with its log-density in pyro.factor"
    )


def initializer(chosen: Init | None, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Init:
    """The user's way to initialise sites, with :func:`feasible` where that cannot sample."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    like = next((t for t in tensors if t.is_floating_point()), None)

    def init(site: dict[str, object]) -> Tensor:
        if chosen is not None:
            try:
                return chosen(site)
            except NotImplementedError:
                pass
        return feasible(site, like)

    return init


def inspect(
    model: object, init: Init, args: tuple[object, ...], kwargs: Mapping[str, object], deadline: float = math.inf
) -> tuple[object, Latents]:
    """A trace of the model at an initial point, observations included, and the layout of its latents.

    The model runs at four more points, or at one if the deadline, by ``time.monotonic()``, is over by then.

    Raises:
        ValueError: for a model without latents, with a discrete or spherical latent or one whose support has no
            bijection from the line, with a sequential plate, with latents in a subsampled plate, with an
            angle, with a support that depends on another latent, or whose latents change from one run to the next.
    """
    trace = _run(InitMessenger(init)(model), args, kwargs)
    # The finished trace is what counts, however sites got their values: reparameterized sites are no latents any more.
    for name, site in _latent(trace):
        try:
            with helpful_support_errors(site):
                biject_to(site["fn"].support)
        except NotImplementedError as error:
            raise _no_bijection(site) from error
        inner = site["fn"]
        while not isinstance(inner, ANGLES) and isinstance(getattr(inner, "base_dist", None), Distribution):
            inner = inner.base_dist
        if isinstance(inner, ANGLES):
            raise ValueError(
                f"AutoFlow: site {name!r} is an angle ({type(inner).__name__}), whose density repeats along the line, "
                "so that it has no posterior there. Sample it as ImproperUniform on constraints.interval(-pi, pi), "
                "with its log-density in pyro.factor"
            )
        if isinstance(inner, dist.Delta):
            raise ValueError(
                f"AutoFlow: site {name!r} is a Delta, a value and no latent: write pyro.deterministic({name!r}, value)"
            )
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise ValueError(
                    f"AutoFlow: site {name!r} lies in the sequential plate {frame.name!r}: write it as a vectorised "
                    f"one, `with pyro.plate({frame.name!r}, {frame.size}):`, or as one site with an event dimension"
                )
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"AutoFlow: the latent site {name!r} lies in the plate {frame.name!r}, of which a run sees "
                    f"{frame.size} of {frame.full_size}: one vector for all runs would share these latents between "
                    "different data. Give the whole plate at once, or amortise: in a guide of your own, "
                    f"`with pyro.plate({frame.name!r}, ..., subsample_size=...) as i: pyro.sample({name!r}, "
                    "flow(context_of(data[i])))` with a conditional flow"
                )
    latents = Latents(trace)
    if not len(latents):
        raise ValueError(
            "AutoFlow: this model has no latent variables: every sample site is observed, or hidden from the guide"
        )
    if latents.dim == 0:
        raise ValueError(f"AutoFlow: the latent sites {[site.name for site in latents]} are all empty")
    _refuse_change(model, init, trace, args, kwargs, deadline)
    return trace, latents


def _run(model: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    with poutine.block():
        return poutine.trace(model).get_trace(*args, **kwargs)


def _latent(trace: object) -> list[tuple[str, dict[str, object]]]:
    return [(name, site) for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]


def _refuse_change(
    model: object,
    init: Init,
    trace: object,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    deadline: float,
) -> None:
    """Runs the model at other latent values and compares its sites with those of the trace."""
    # Opposite points, as random numbers start anew each time: whatever hangs on a sign is seen.
    for radius in (0.3, -0.3, 1.0, -1.0):

        def moved(site: dict[str, object], radius: float = radius) -> Tensor:
            value = init(site)
            transform = _to_support(site["fn"].support)
            if transform is None:  # its reparameterization gives it another value
                return value
            free = transform.inv(value)
            value = transform(free + radius * (2 * torch.rand_like(free) - 1))
            value._pyro_custom_init = False
            return value

        try:
            with torch.random.fork_rng():
                other = _run(InitMessenger(moved)(model), args, kwargs)
        except FAILURES:
            continue  # a point where the model is not defined says nothing about its structure
        for name, site in _latent(trace):
            found = other.nodes.get(name)
            if found is None or found["value"].shape != site["value"].shape:
                what = "is missing" if found is None else f"has shape {tuple(found['value'].shape)}"
                raise ValueError(
                    f"AutoFlow: the latent site {name!r}, of shape {tuple(site['value'].shape)}, {what} at other "
                    "values of the latents: a guide over one fixed vector needs the same sites in every run"
                )
            if not same_support(site["fn"].support, found["fn"].support):
                raise ValueError(
                    f"AutoFlow: the support of site {name!r} depends on another latent. Sample it on a fixed support, "
                    "and compute the bounded value from it (for `x ~ Uniform(0, b)`: `u ~ Uniform(0, 1)`, `x = b * u`)"
                )
        extra = {n for n, _ in _latent(other)} - {n for n, _ in _latent(trace)}
        if extra:
            raise ValueError(
                f"AutoFlow: the latent sites {sorted(extra)} are there only at some values of the other latents: a "
                "guide over one fixed vector needs the same sites in every run"
            )
        if time.monotonic() > deadline:
            return


@torch.no_grad()
def finite_start(density: JointDensity, trace: object, latents: Latents, attempts: int = 20) -> Tensor:
    """An unconstrained point, shape ``(dim,)``, where the log-density is finite: the prototype's, or one near it.

    Raises:
        ValueError: if none is found; it names the sites whose log-density is not finite.
    """
    values = {site.name: trace.nodes[site.name]["value"].detach() for site in latents}
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
    raised = "" if error is None else f" ({type(error).__name__}: {error})"
    sites = ", ".join(f"{name!r} ({value})" for name, value in bad.items()) or "the supports' Jacobians"
    raise ValueError(
        f"AutoFlow: the log-density is not finite at the initial values of the latents, nor at {attempts} points near "
        f"them; it comes from {sites}{raised}. Check the data, or say where to start: "
        "init_loc_fn=init_to_value(values={...})"
    ) from error


Sizes = dict[tuple[object, ...], int | str]


def sizes_of(model: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Sizes:
    """What the arguments of a call show, by its place: sizes of tensors and arrays, integers, strings and flags."""
    try:
        bound = signature(model).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
    except (TypeError, ValueError):  # nothing is known of some callables
        arguments = {"args": args, "kwargs": dict(kwargs)}
    sizes = {}
    for path, leaf in tree_flatten_with_path(dict(arguments))[0]:
        shape = getattr(leaf, "shape", None)
        if isinstance(shape, tuple):
            sizes.update({(path, dim): size for dim, size in enumerate(shape)})
        elif isinstance(leaf, int | str):
            sizes[(path, None)] = str(leaf) if isinstance(leaf, bool | str) else leaf
    return sizes


def resized(plates: Iterable[int], then: Sizes, now: Sizes) -> bool:
    """Whether one of the plates seems to have another size now: so has each argument that had its size then."""
    for plate in set(plates):
        found = [now[place] for place, size in then.items() if size == plate and place in now]
        if found and plate not in found:
            return True
    return False


def latent_shapes(
    model: object, args: tuple[object, ...], kwargs: Mapping[str, object], observed: Container[str]
) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a model's latents at some arguments, in which data may be missing; ``None`` if it cannot run."""
    try:
        with torch.random.fork_rng(), torch.no_grad():
            trace = _run(InitMessenger(initializer(None, args, kwargs))(model), args, kwargs)
    except FAILURES:
        return None
    sites = [(name, site["fn"]) for name, site in _latent(trace) if name not in observed]
    return {name: tuple(fn.batch_shape + fn.event_shape) for name, fn in sites}


def parameters_of(trace: object) -> dict[str, Tensor]:
    """Copies of the parameters in a trace of a model that an optimizer of Pyro's would train, by name."""
    store = pyro.get_param_store()
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] != "param":
            continue
        value = store[name] if name in store else site["value"]  # in a plate, a run may see a part of it
        free = value.unconstrained() if hasattr(value, "unconstrained") else value
        if free.requires_grad:
            found[name] = value.detach().clone()
    return found
