"""``AutoFlow``: a normalizing flow as the guide of any Pyro model with continuous latents."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.params.param_store import param_with_module_name
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_flows.core.chain import Chain
from pyro_flows.core.checks import choice, integer, positive_seconds
from pyro_flows.core.memo import Kept
from pyro_flows.core.transform import FlowTransform
from pyro_flows.distributions import Flow, FlowDistribution
from pyro_flows.infer.guides.builders import Builder, as_flow_of, default_builder, find_structure, structured
from pyro_flows.infer.guides.modes import with_base_of
from pyro_flows.infer.guides.posterior import PathPosterior, Steady, preconditioner_of, with_spline_of
from pyro_flows.infer.machine.processes import led
from pyro_flows.infer.machine.randomness import seeded
from pyro_flows.infer.models import prototype, sites
from pyro_flows.infer.models.enumeration import can_be_summed, hidden_sites, unblocked
from pyro_flows.infer.models.joint import FAILURES, JointDensity
from pyro_flows.infer.models.latents import Latents
from pyro_flows.infer.models.structure import Structure
from pyro_flows.infer.models.whole import WholePlates, partly_seen
from pyro_flows.infer.search.conditionals import straight_start
from pyro_flows.transforms import FixedSpline, Preconditioner

__all__ = ["AutoFlow"]

NOT_BUILT = "AutoFlow: this guide has not seen its model yet: call .setup(*args) with its arguments"
NO_MODEL = "AutoFlow: this guide comes from a pickle, which holds no model; make a new one and load its state_dict"
SLOW_SECONDS = 20.0  # for the start of a model that runs one draw at a time
SEARCH = 0.2  # least share of the start's seconds for its search
INNER = 0.85  # the same, for the start of a guide with the model's structure, before any other
GRADIENTS, CALLS = 1000, 300  # for which that start may take its seconds once more
RECORDING = 0.7  # the same, for a recording of the density
FULL_RANK = 300  # dimensions up to which the preconditioner is full
STARTS = ("pathfinder", "prior")
DEPENDENCIES = ("model", "dense")
_BUILT = itertools.count()


class AutoFlow(AutoContinuous):
    r"""An autoguide whose posterior is a flow: :math:`z = g(\mu + S (A\, f(u) + b))`, :math:`u \sim N(0, I)`.

    :math:`z` holds all latents in unconstrained space, :math:`f` is a flow that starts as the identity, :math:`\mu` and
    :math:`S` come from an informed start, and the triangular :math:`A` and :math:`b` are learned. :math:`g` is the
    identity, or fixed splines (:class:`~pyro_flows.transforms.FixedSpline`) of latents in which the start finds kinks
    or heavy tails. Where ``fit_guide`` finds several modes, :math:`u` follows a normal for each. The guide takes the
    model's arguments and works with ``SVI`` and any ELBO, vectorized particles, plates, ``AutoGuideList``,
    ``NeuTraReparam`` and ``Predictive``. :func:`~pyro_flows.infer.fit_guide` trains and judges it.

    The first call, or :meth:`setup`, runs the model and builds the flow. A draw costs one pass of the flow in its
    sampling direction; a step with the path gradient costs one more in the density direction. Hide and enumerate
    discrete latents: ``AutoFlow(poutine.block(config_enumerate(model), hide=["k"]))`` with ``TraceEnum_ELBO``.

    Args:
        model: a Pyro model.
        builder: a function from a number of dimensions to a flow, e.g. ``partial(pf.realnvp, num_layers=8)``; by
            default :func:`~pyro_flows.infer.guides.builders.default_builder`.
        dependencies: ``"dense"``, any latent may depend on any other; or ``"model"``, members of plates are independent
            given global latents and their ancestors in nested plates, or form chains, as gradients of the density
            confirm (see :class:`~pyro_flows.transforms.Plated`), and the builder makes the flow of the globals. By
            default ``"model"`` for more than 64 latents, of which at most 32 are global, without a builder.
        start: ``"pathfinder"``, quasi-Newton paths and Laplace's approximation, ranked by their ELBO; or ``"prior"``, a
            small Gaussian around the initial point.
        init_loc_fn: a function to each site's initial value (see ``pyro.infer.autoguide.initialization``); by default
            mid-support, even under an improper prior.
        path_gradient: whether the entropy term uses only the path gradient (see ``PathPosterior``).
        num_particles: the draws per step of ``fit_guide``; by default 128, or fewer for slow models.
        tempering: the posterior's first weight against the base in ``fit_guide``, which rises to 1 over the first 60 %
            of the steps; 0.05 helps with several modes, ``None`` disables tempering.
        num_starts: the number of dispersed points from which to search for the start.
        start_seconds: the wall time for the guide's start, by default 20 if the model runs one draw at a time.
        dtype: the flow's dtype; by default that of the latents.
        seed: the seed for all random choices: fits by steps are reproducible, fits by seconds nearly so.

    Attributes:
        flow: the :class:`~pyro_flows.distributions.Flow` of the unconstrained latents, once built.
        latents: the latents' names, shapes and supports, once built.
        structure: the global latents and the members of plates or steps of chains; ``None`` for a dense guide.

    Raises:
        ValueError: for unknown options; and, at the first call, for models that no such guide can represent, or
            without the structure that ``dependencies="model"`` demands.

    Example:
        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0, 1)), 1), obs=y)
        >>> guide, adam = pf.AutoFlow(model), pyro.optim.Adam({"lr": 1e-3})
        >>> svi = pyro.infer.SVI(model, guide, adam, pyro.infer.Trace_ELBO())
        >>> round(svi.step(torch.tensor(2.0)), 1)  # nats; the start is the posterior here
        2.3

    References:
        Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), arXiv:1505.05770; Pathfinder (Zhang et
        al., 2022), arXiv:2108.03782; Advances in Black-Box VI (Agrawal, Sheldon & Domke, 2020), arXiv:2006.10343.
    """

    latents: Latents
    flow: Flow
    initial: Tensor
    structure: Structure | None
    plain_model: sites.Model  # the original one

    def __init__(
        self,
        model: sites.Model,
        builder: Builder | None = None,
        *,
        dependencies: str | None = None,
        start: str = "pathfinder",
        init_loc_fn: prototype.Init | None = None,
        path_gradient: bool = True,
        num_particles: int | None = None,
        tempering: float | None = None,
        num_starts: int = 4,
        start_seconds: float | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"AutoFlow: expected model to be a Pyro model, a callable, got {type(model).__name__}")
        if builder is not None and (not callable(builder) or isinstance(builder, torch.nn.Module)):
            raise TypeError(
                "AutoFlow: expected builder to be a function from a number of dimensions to a flow, e.g. "
                f"partial(pf.realnvp, num_layers=8), got {type(builder).__name__}"
            )
        choice("AutoFlow", "start", start, STARTS)
        if dependencies is not None:
            choice("AutoFlow", "dependencies", dependencies, DEPENDENCIES)
        if tempering is not None and not 0 < tempering <= 1:
            raise ValueError(f"AutoFlow: expected tempering to be in (0, 1], got {tempering}")
        if num_particles is not None:
            integer("AutoFlow", "num_particles", num_particles)
        positive_seconds("AutoFlow", "start_seconds", start_seconds)
        super().__init__(model, init_loc_fn=prototype.feasible)
        self._rename()
        self.__dict__["plain_model"] = model  # past torch, which would register a module
        self.builder, self.start, self.init_loc_fn = builder, start, init_loc_fn
        self.dependencies = dependencies
        self.path_gradient, self.num_particles, self.tempering = path_gradient, num_particles, tempering
        self.num_starts, self.flow_dtype, self.seed = num_starts, dtype, seed
        self.subsampled = False
        self.vectorized: bool | None = None  # False once the model is known not to broadcast
        self.start_seconds = start_seconds
        self.start_evaluations = 0
        self.model_parameters: dict[str, Tensor] = {}  # the model's own, at their first values
        self.of_prior = False  # whether to fit the prior on purpose
        self.unobserved = False
        self.hidden_data: frozenset[str] = frozenset()
        self.discrete: frozenset[str] = frozenset()  # hidden sites that the density sums out
        self.why_not_summed: str | None = None
        self.why_dense: str | None = None  # in spite of a structure
        self._hidden: frozenset[str] = frozenset()
        self._draws_hidden = False  # whether the density draws hidden latents that are not summed out
        self._parts: dict[str, int] = {}  # sizes of the parts of plates that a run of the model sees
        self._sizes: prototype.Sizes = {}  # the arguments at building
        self._fitting: prototype.Sizes = {}  # the last other arguments that fit
        self._observed: set[str] = set()
        self._steady = Steady()
        self._sorted = Kept()

    # Building.

    def setup(self, *args: object, **kwargs: object) -> AutoFlow:
        """Runs the model on its arguments and builds the flow at an informed start; returns the guide."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            if self.master is None:  # else the list of guides makes them
                with poutine.block():
                    self._create_plates(*args, **kwargs)  # NeuTra needs them before any call
        return self

    def restart(self) -> AutoFlow:
        """Discards the flow, so that the next call rebuilds the guide, with new parameter names; returns the guide."""
        self.prototype_trace = self.vectorized = None
        self._sizes = self._fitting = {}
        self.why_dense = None
        for name in ("flow", "latents", "structure", "_first_density"):
            if hasattr(self, name):
                delattr(self, name)
        self._rename()
        return self

    def hide_discrete(self, *args: object, **kwargs: object) -> AutoFlow:
        """Hides discrete latents from this guide, so that its density sums them out; returns the guide.

        Raises:
            ValueError: if Pyro cannot enumerate one of them.
        """
        if self.prototype_trace is None:
            init = prototype.initializer(self.init_loc_fn, args, kwargs)

            def drawn_if_discrete(site: sites.Message) -> Tensor:
                return site["fn"].sample() if site["fn"].support.is_discrete else init(site)

            with torch.random.fork_rng():
                trace = sites.run(InitMessenger(drawn_if_discrete)(self.plain_model), args, kwargs)
            known = sites.sites_of(trace, frozenset()).values()
            drawn = [site for site in known if site.kind == sites.DRAWN and site.fn.support.is_discrete]
            for site in drawn:
                if not can_be_summed(site):
                    raise ValueError(
                        f"AutoFlow: the discrete latent site {site.name!r} ({type(site.fn).__name__}) has no finite "
                        "list of values to sum over (enumeration): bound it, e.g. Categorical on 0 ... K in place of "
                        "Poisson; write independent ones in a pyro.plate, not by to_event; or sum it out by hand"
                    )
            if drawn:
                self.__dict__["plain_model"] = poutine.block(self.plain_model, hide=[site.name for site in drawn])
        return self

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        if self.prototype_trace is not None:
            return
        limit = math.inf if self.start_seconds is None else self.start_seconds
        begin = time.monotonic()
        init = prototype.initializer(self.init_loc_fn, args, kwargs)
        with seeded(self.seed):
            try:
                trace, latents = prototype.inspect(self.plain_model, init, args, kwargs, begin + 0.3 * limit)
            except prototype.PartError:
                self._parts = partly_seen(self.plain_model, init, args, kwargs)
                if not self._parts:
                    raise
                self.__dict__["plain_model"] = WholePlates(frozenset(self._parts))(self.plain_model)
                trace, latents = prototype.inspect(self.plain_model, init, args, kwargs, begin + 0.3 * limit)
            self.__dict__["plain_model"] = prototype.on_circles(self.plain_model, latents)
            self._model = (InitMessenger(init)(self.plain_model),)
            try:
                super()._setup_prototype(*args, **kwargs)
                for name, size in self._parts.items():
                    # So that the guide's own plates see a part, as the model's do in training.
                    self._prototype_frames[name] = self._prototype_frames[name]._replace(size=size)
                self.latents, self.subsampled = latents, sites.is_part(trace)
                self.model_parameters = prototype.parameters_of(trace)
                self._observed = set(trace.observation_nodes)
                self._look_behind(trace, args, kwargs)
                density = self._density(args, kwargs, None)
                # One at a time, because random hidden sites look like a failure to broadcast.
                alone = self._density(args, kwargs, False)
                initial = self._finite_start(alone, trace)
                density._own = alone._own
                # A slow first run, which may import modules, leaves the search a part of the time.
                searched = density.still() if self.subsampled else density
                with poutine.block():
                    self.structure = find_structure(trace, latents, searched, initial, self.dependencies, self.builder)
                deadline = max(begin + limit, time.monotonic() + SEARCH * limit)
                chain = self._chain(self.builder or default_builder, density, initial, deadline)
                self.flow = Flow(chain.to(device=initial.device, dtype=self.flow_dtype or initial.dtype))
                self.initial = initial
                self.vectorized = None if density.vectorized else False
                self.start_evaluations = density.evaluations + alone.evaluations
                density.evaluations = 0
                self._first_density = density
            except BaseException:
                self.prototype_trace = None  # so that the next call retries
                raise
        self._sizes, self._steady = prototype.sizes_of(self.plain_model, args, kwargs), Steady()

    def _finite_start(self, alone: JointDensity, trace: Trace) -> Tensor:
        try:
            return prototype.finite_start(alone, trace, self.latents)
        except ValueError as error:
            if not self.discrete:
                raise
            raise ValueError(
                f"{error}\nThe discrete latents {sorted(self.discrete)} are summed out, so the model runs with all of "
                "their values at once, in dimensions on the left: choose by torch.where, not by `if`, and keep data "
                "that depend on them in their plates (https://pyro.ai/examples/enumeration.html)"
            ) from error

    def _look_behind(self, trace: Trace, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Finds sites hidden by ``poutine.block``: discrete latents to sum out, and data."""
        self.discrete, self.why_not_summed, self.unobserved = frozenset(), None, False
        values = {name: message["value"].detach() for name, message in sites.latent_messages(trace).items()}
        hidden = hidden_sites(self.plain_model, values, args, kwargs)
        self._hidden = frozenset(hidden)
        self.hidden_data = frozenset(name for name, site in hidden.items() if site.kind in (sites.DATA, sites.FACTOR))
        drawn = {name: site for name, site in hidden.items() if site.kind == sites.DRAWN}
        if all(map(can_be_summed, drawn.values())):
            self.discrete = frozenset(drawn)
        nesting = [sites.nesting_of(hidden[name].message) for name in self.discrete | self.hidden_data]
        self.latents.max_plate_nesting = max([self.latents.max_plate_nesting, *nesting])
        point = self.latents.pack(values)
        try:
            self._density(args, kwargs, False)(point[None])
        except NotImplementedError as error:
            self.why_not_summed = str(error)
            self.discrete = frozenset()
        except FAILURES:  # the density is undefined here
            pass
        self._draws_hidden = bool(drawn) and not self.discrete
        self.unobserved = not self._density(args, kwargs, False).is_observed(point, self._draws_hidden)

    def _chain(self, builder: Builder, density: JointDensity, initial: Tensor, deadline: float) -> Chain:
        """Makes the flow at the start."""
        if self.structure is not None:
            chain = self._structured(self.structure, builder, density, initial, deadline)
            if chain is not None:
                return chain
            self.structure, self.why_dense = None, "a start with those of the model was not found in time"
        made = as_flow_of(builder, len(initial))
        loc, scale, splines = self._find_start(density, initial, deadline)
        return Chain([made, Preconditioner(loc, scale), *splines])

    def _structured(
        self, structure: Structure, builder: Builder, density: JointDensity, initial: Tensor, deadline: float
    ) -> Chain | None:
        """Makes a flow with a structure; ``None`` if that is not demanded, and no start is found."""
        seconds = None if deadline == math.inf else INNER * max(0.0, deadline - time.monotonic())
        if seconds is not None and self.start_seconds is not None:
            pace = density.pace
            slow = max(GRADIENTS * pace.seconds_per_draw, CALLS * pace.shortest)
            seconds = max(seconds, min(slow, self.start_seconds))
        searches = self._searches(density, initial)
        with poutine.block():
            return structured(
                structure,
                builder,
                initial,
                density.still() if self.subsampled else density,
                seconds if searches else 0,
                (lambda: self._find_start(density, initial, deadline)) if self.dependencies or not searches else None,
            )

    def _searches(self, density: JointDensity, initial: Tensor) -> bool:
        """Whether there is a density to search for a start."""
        # Without data, a climb would leave the user's initial point; with hidden draws, there is no density to climb.
        hidden = self.unobserved and bool(self.hidden_data) and not self.of_prior
        chosen = hidden and (self.init_loc_fn is not None or not self._shown)
        drawn = (self._draws_hidden or not self.subsampled) and density.random_at(initial)  # not only which rows
        return not (self.start == "prior" or chosen or drawn)

    def _find_start(
        self, density: JointDensity, initial: Tensor, deadline: float
    ) -> tuple[Tensor, Tensor, list[FixedSpline]]:
        dim = len(initial)
        if not self._searches(density, initial):
            scale, knots = torch.full_like(initial, 0.1), None
        else:
            with poutine.block():
                with torch.no_grad():
                    density(initial[None])  # finds out whether it broadcasts
                seconds = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
                if seconds is None and not density.many_at_once:
                    seconds = SLOW_SECONDS
                found, knots = led(
                    density.still() if self.subsampled else density,
                    initial,
                    lambda density: straight_start(
                        density,
                        initial,
                        num_starts=self.num_starts,
                        seconds=seconds,
                        full_rank_up_to=FULL_RANK,
                        dtype=self.flow_dtype,
                    ),
                )
            initial, scale = found.loc, found.scale
        if scale.dim() == 1 and dim <= FULL_RANK:
            scale = torch.diag_embed(scale)
        spline = [] if knots is None else [FixedSpline(dim, knots.dims, knots.knots)]
        return initial, scale, spline

    def density(self, *args: object, **kwargs: object) -> JointDensity:
        """Returns the joint density over this guide's latents, at these arguments of the model."""
        if self.prototype_trace is None:
            self.setup(*args, **kwargs)
        elif prototype.sizes_of(self.plain_model, args, kwargs) != self._sizes:
            self._compare_latents(args, kwargs)
        # The first density keeps what building found out.
        known = self.__dict__.pop("_first_density", None)
        if known is not None and prototype.same_objects((known.args, known.kwargs), (args, kwargs)):
            return known
        return self._density(args, kwargs, self.vectorized)

    def _density(self, args: tuple[object, ...], kwargs: dict[str, object], vectorize: bool | None) -> JointDensity:
        # pyro.markov needs all sites; hidden ones do not count.
        model, ignored = unblocked(self.plain_model) if self._shown else self.plain_model, self._hidden - self._shown
        # Quiet, because stock SVI runs the model one draw at a time.
        density = JointDensity(model, self.latents, args, kwargs, vectorize, self.discrete, ignored, quiet=True)
        if self.start_seconds is not None:
            density.recorded.seconds = RECORDING * self.start_seconds
        return density

    @property
    def _shown(self) -> frozenset[str]:
        """Hidden sites that the density includes: the model in training has the data, even if the guide sees none."""
        return self.discrete | self.hidden_data if self.unobserved and not self.of_prior else self.discrete

    @property
    def model(self) -> sites.Model:
        """The model, with the initial values of its latents."""
        if self._model is None:
            raise AttributeError(NO_MODEL)
        return self._model[0]

    @property
    def preconditioner(self) -> Preconditioner:
        """The affine part of the flow."""
        return preconditioner_of(self.flow)

    @property
    def is_built(self) -> bool:
        """Whether the guide has seen its model."""
        return "latents" in self.__dict__

    def _built(self) -> Flow:
        if not self.is_built:
            raise ValueError(NOT_BUILT)
        return self.flow

    def extra_repr(self) -> str:
        if not self.is_built:
            return "not built"
        how = "dense" if self.structure is None else f"by the model: {self.structure}"
        if self.why_dense is not None:
            how += f" ({self.why_dense})"
        return f"{self.latents.dim} latents, dependencies {how}"

    def __getattr__(self, name: str) -> Any:
        # A property's own error would end here without its message.
        if name in ("model", "plain_model"):
            raise AttributeError(NO_MODEL)
        if name in ("flow", "latents", "structure", "preconditioner", "initial", "latent_dim") and not self.is_built:
            raise AttributeError(NOT_BUILT)
        return super().__getattr__(name)

    # The interface of Pyro's autoguides.

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Samples the latents; takes the model's arguments, returns values by site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        elif self._model is not None:
            sizes = prototype.sizes_of(self.plain_model, args, kwargs)
            plates = (frame.size for frame in self._prototype_frames.values())
            # Pyro may silently replay rows in a plate of another size.
            if sizes not in (self._sizes, self._fitting) and prototype.resized(plates, self._sizes, sizes):
                self._compare_latents(args, kwargs, known=True)
        return super().forward(*args, **kwargs)

    def _compare_latents(self, args: tuple[object, ...], kwargs: dict[str, object], known: bool = False) -> None:
        """Refuses arguments that change the model's latents, or only the shapes of ``known`` ones.

        Unknown latents, as for a new group, are drawn from the model.
        """
        here: dict[str, tuple[int, ...]] = {site.name: tuple(site.shape) for site in self.latents}
        there = prototype.latent_shapes(self.plain_model, args, kwargs, self._observed)
        there = here if there is None else there  # unknown where the model does not run
        names = [n for n in here if n in there] if known else {**here, **there}
        name = next((n for n in names if here.get(n) != there.get(n)), None)
        if name is not None:
            raise ValueError(
                f"AutoFlow: with these arguments the latent site {name!r} has shape {there.get(name)}, but this guide "
                f"was built for {here.get(name)}: a guide belongs to data of one shape. Make a new guide for these, or "
                "give missing data as a mask"
            )
        self._fitting = prototype.sizes_of(self.plain_model, args, kwargs)

    def get_base_dist(self) -> torch.distributions.Distribution:
        """Returns the standard normal, event shape ``(latent_dim,)``."""
        return self._built().base()

    def get_transform(self, *args: object, **kwargs: object) -> FlowTransform:
        """Returns the map from the base to the unconstrained latents."""
        return self._built().chain

    def get_posterior(self, *args: object, **kwargs: object) -> FlowDistribution:
        """Returns the distribution of the unconstrained latents; its ``log_prob`` has the whole derivative."""
        return self._built()()

    def sample_latent(self, *args: object, **kwargs: object) -> Tensor:
        """Samples the vector of unconstrained latents."""
        flow = self._built()
        self._refuse_foreign(flow)
        if self.path_gradient:
            # TraceEnum_ELBO is linear in the guide's log-density.
            linear = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
            posterior = PathPosterior(flow.base(), [flow.chain], linear=linear)
        else:
            posterior = flow()
        latent = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
        if latent.requires_grad and not torch.jit.is_tracing():
            self._steady.watch(flow, latent)
        return latent

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, object], Tensor]]:
        for site, value in super()._unpack_latent(latent):
            value = value.to(site["value"].dtype)  # the flow may have its own dtype
            for frame in site["cond_indep_stack"]:
                if frame.name in self._parts:
                    free = len(self._unconstrained_shapes[site["name"]]) - len(site["fn"].batch_shape)
                    value = value.index_select(frame.dim - free, self.plates[frame.name].indices.to(value.device))
            yield site, value

    def _refuse_foreign(self, flow: Flow) -> None:
        """Refuses parameters in Pyro's store that ``SVI`` would train instead."""
        if not self._pyro_context.active or pyro.settings.get("module_local_params"):
            return
        stored, module = pyro.get_param_store()._params, self._pyro_get_fullname("flow")
        for name, parameter in flow.named_parameters():
            if stored.get(param_with_module_name(module, name), parameter) is not parameter:
                raise ValueError(
                    "AutoFlow: Pyro's parameter store holds other parameters under the name of this guide, "
                    f"{module!r}, and SVI would train those: call pyro.clear_param_store() before training this guide, "
                    f"or take them over by pyro.module({module!r}, guide.flow, update_module_params=True)"
                )

    @torch.no_grad()
    def sample_posterior(self, num_samples: int = 1000) -> dict[str, Tensor]:
        """Draws all latents by site, shape ``(num_samples, *site.shape)``."""
        flow = self._built()
        return self.latents.draws(flow.sample((num_samples,)))

    @torch.no_grad()
    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Returns medians of the unconstrained marginals, from 10,000 draws, mapped to the sites' supports."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Iterable[float], *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Returns quantiles of the unconstrained marginals, mapped to the supports; shape ``(n, *site.shape)``."""
        self.setup(*args, **kwargs)
        z = self._sorted_draws()
        levels = torch.as_tensor(list(quantiles), dtype=z.dtype, device=z.device).double().unsqueeze(-1)
        if not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"AutoFlow: expected quantiles between 0 and 1, got {levels.squeeze(-1).tolist()}")
        rising = torch.cat([torch.full((site.size,), site.increasing, device=z.device) for site in self.latents])
        place = torch.where(rising, levels, 1 - levels) * (len(z) - 1)
        below = place.long()
        above = (below + 1).clamp(max=len(z) - 1)
        return self.latents.draws(torch.lerp(z.gather(0, below), z.gather(0, above), (place - below).to(z.dtype)))

    def _sorted_draws(self) -> Tensor:
        """Makes 10,000 draws, each column sorted, and caches them."""
        flow = self._built()

        def make() -> Tensor:
            with seeded(0):  # the same answer at each call
                z = flow.sample((10_000,)).sort(0).values
            return torch.where(z[-1].isnan(), torch.nan, z)

        memo: Any = flow.chain._memo
        return self._sorted.get(flow, memo, make)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes over the spline of the guide that was saved, which another start may not have found."""
        if self.is_built:
            flow = with_spline_of(state_dict, f"{prefix}flow.chain.parts.", self.flow)
            self.flow = with_base_of(state_dict, f"{prefix}flow.base.", flow)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Copies keep the model; pickles, which cannot hold most models, do not.

    def __deepcopy__(self, memo: dict[int, object]) -> AutoFlow:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        memo[id(self.prototype_trace)] = self.prototype_trace  # immutable, and holds the data
        for key, value in self.__getstate__().items():
            new.__dict__[key] = copy.deepcopy(value, memo)
        new.__dict__.update((name, self.__dict__[name]) for name in ("_model", "plain_model") if name in self.__dict__)
        new._rename()
        return new

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        state.update(_model=None, master=None)
        for name in ("plain_model", "_first_density"):
            state.pop(name, None)
        # Pickle refuses the weak references of parameters in Pyro's store.
        state["_modules"] = copy.deepcopy(self._modules)
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._rename()

    def _rename(self) -> None:
        """Gives a new guide or a copy its own name in Pyro's store, unless its owner names it."""
        if "." not in self._pyro_name:
            count = next(_BUILT)
            self._pyro_name = type(self).__name__ + (f"_{count}" if count else "")
