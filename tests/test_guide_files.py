"""Saved fits of guides: every builder and support comes back from plain data, and what cannot is refused in words."""

import copy
import os
import pickle
import random
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import CASES, Sinh, altered, full_but, shake
from pyro.distributions import constraints as pyro_constraints
from torch.distributions import biject_to, constraints, transforms

import pyro_flows as pf
from pyro_flows.core.recipes import made_from, recipe
from pyro_flows.infer import AutoFlow, fit_guide, load_guide
from pyro_flows.infer.guides import result
from pyro_flows.infer.machine.files import read_state, write_state
from pyro_flows.infer.machine.records import device_of
from pyro_flows.infer.models.latents import same_support
from pyro_flows.infer.models.supports import plain_support, support_of

SMALL = {"num_layers": 2, "hidden_dims": (6,)}


def model():
    a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    b = pyro.sample("b", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Normal(a.sum(-1) + b, 1.0), obs=torch.tensor(1.0))


def fitted(builder=None, what=model, **options):
    return fit_guide(AutoFlow(what, builder, seed=0, start="prior", **options), steps=3, progress=False)


def drawn(fit):
    torch.manual_seed(3)
    return fit.sample(50)


def same(fit, loaded):
    """The same draws, densities, numbers and words, bit for bit."""
    first, second = drawn(fit), drawn(loaded)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    z = fit.assessment.draws[:20]
    with torch.no_grad():
        assert torch.equal(fit.flow.log_prob(z), loaded.flow.log_prob(z))
    assert torch.equal(fit.log_weights, loaded.log_weights)
    assert repr(fit) == repr(loaded)
    assert str(fit.verdict) == str(loaded.verdict)
    assert fit.verdict.numbers.keys() == loaded.verdict.numbers.keys()
    assert repr(fit.history) == repr(loaded.history)
    assert (fit.failures, fit.evaluations, fit.notes) == (loaded.failures, loaded.evaluations, loaded.notes)
    assert [p.requires_grad for p in fit.flow.parameters()] == [p.requires_grad for p in loaded.flow.parameters()]
    assert [(s.name, s.shape, s.dtype, s.start) for s in fit.latents] == [
        (s.name, s.shape, s.dtype, s.start) for s in loaded.latents
    ]


@pytest.fixture(scope="module")
def fit():
    return fitted()


# What comes back


@pytest.mark.full
def test_recipes_of_all_flows():
    """Of all public flows, with a case each; what holds something foreign says so."""
    foreign = ("own-univariate", "lambda", "continuous-given", "wrap-pyro")
    wrong = []
    for case in CASES:
        torch.manual_seed(0)
        flow = shake(case.build(0), 0.3).eval()
        if any(part in case.name for part in foreign):
            refuses(TypeError, "is not of this package", recipe, flow)
            continue
        again = made_from(recipe(flow))
        again.load_state_dict(flow.state_dict())
        x = case.draw((2,), torch.get_default_dtype(), torch.device("cpu"))
        if not torch.equal(flow(x), again.eval()(x)):
            wrong.append(case.name)
    assert not wrong


def test_arguments_are_remembered_as_they_were():
    """Later changes of a list or a tensor do not matter, and what cannot be copied does not stand in the way."""
    order, widths = torch.tensor([2, 0, 1]), [5, 6]
    layer = pf.Autoregressive(3, order=order, hidden_dims=widths)
    order.zero_()
    widths.clear()
    again = made_from(recipe(layer))
    assert torch.equal(again.net.order, layer.net.order)
    again.load_state_dict(layer.state_dict())
    flow = pf.Coupling((n for n in (2, 3)), hidden_dims=map(int, "56"), activation=torch.tanh)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        x = torch.randn(4, 2, 3)
        assert torch.equal(twin(x), flow(x))
        refuses(TypeError, "'<genexpr>' is not of this package", recipe, twin)


BUILDERS = {
    "default": None,
    "nice": partial(pf.nice, **SMALL),
    "realnvp-random": partial(pf.realnvp, mask="random", **SMALL),
    "maf": partial(pf.maf, **SMALL, order="random"),
    "iaf": lambda dim: pf.iaf(dim, **SMALL),
    "nsf": partial(pf.nsf, **SMALL, bins=4),
    "nsf-autoregressive": partial(pf.nsf, autoregressive=True, **SMALL),
    "cnf": partial(pf.cnf, hidden_dims=(6,)),
    "chain": lambda dim: pf.Chain(
        [pf.maf(dim, **SMALL).inv, pf.Permutation(dim), pf.LULinear(dim), pf.transforms.Householder(dim)]
    ),
    "list": lambda dim: [pf.Coupling(dim, pf.Spline(4), hidden_dims=(5,)), pf.Permutation(dim, "reverse")],
    "given-order": lambda dim: pf.iaf(dim, order=torch.tensor([2, 0, 1]), **SMALL),
    "torch": lambda dim: [pf.iaf(dim, **SMALL), transforms.AffineTransform(1.0, 2.0)],
    "function": lambda dim: pf.realnvp(dim, activation=torch.tanh, **SMALL),
}


@pytest.mark.parametrize("name", full_but(BUILDERS, "default", "maf", "nsf-autoregressive", "chain"))
def test_builders_come_back(name, tmp_path):
    dtype = [torch.float32, torch.float64][list(BUILDERS).index(name) % 2]
    found = fitted(BUILDERS[name], dtype=dtype)
    shake(found.flow, 0.05)
    next(found.flow.parameters()).requires_grad_(False)
    found.save(tmp_path / "guide.pt")
    state = torch.get_rng_state()
    loaded = load_guide(tmp_path / "guide.pt")
    assert torch.equal(torch.get_rng_state(), state)
    same(found, loaded)
    loaded.save(tmp_path / "again.pt")
    same(found, load_guide(str(tmp_path / "again.pt"), map_location=torch.device("cpu")))


BASES = {
    "learnable": lambda: pf.DiagonalNormal(3, learnable=True),
    "student": lambda: pf.StudentT(3, df=4.0, learn_affine=True),
    "student-fixed": lambda: pf.StudentT(3, df=7.0, learnable=False, min_df=2.0),
    "circle": lambda: pf.distributions.UniformCircle(3, [True, False, True]),
    "mixture": lambda: pf.GaussianMixture(3, 2, full_covariance=True),
    "laplace": lambda: dist.Laplace(torch.zeros(3), 1.0).to_event(1),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_come_back(name, fit, tmp_path):
    found = copy.copy(fit)
    chain = pf.Chain([pf.ncsf(3, periodic=[True, False, True])]) if name == "circle" else fit.flow.chain
    found.flow = shake(pf.Flow(copy.deepcopy(chain), BASES[name]()), 0.05)
    found.save(tmp_path / "guide.pt")
    same(found, load_guide(tmp_path / "guide.pt"))


class Cold(dist.Normal):
    """A distribution from outside of torch and Pyro."""


def test_own_bases_are_refused_at_once(fit, tmp_path):
    found = copy.copy(fit)
    found.flow = pf.Flow(fit.flow.chain, Cold(torch.zeros(3), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"cannot hold this flow's base: 'Cold' is not of this package; take one"):
        found.save(tmp_path / "guide.pt")
    assert not os.listdir(tmp_path)


SUPPORTS = {
    "real": constraints.real,
    "real-vector": constraints.real_vector,
    "matrix": constraints.independent(constraints.real, 2),
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "greater": constraints.greater_than(torch.tensor([1.0, -2.0])),
    "greater-eq": constraints.greater_than_eq(3),
    "less": constraints.less_than(-1.5),
    "interval": constraints.interval(torch.tensor([0.0, 1.0], dtype=torch.float64), 5.0),
    "half-open": constraints.half_open_interval(0.5, 0.75),
    "unit": constraints.unit_interval,
    "box": constraints.independent(constraints.interval(-torch.ones(2), torch.ones(2)), 1),
    "simplex": constraints.simplex,
    "simplices": constraints.independent(constraints.simplex, 1),
    "corr-cholesky": constraints.corr_cholesky,
    "corr-matrix": pyro_constraints.corr_matrix,
    "lower-cholesky": constraints.lower_cholesky,
    "positive-definite": constraints.positive_definite,
    "softplus-positive": pyro_constraints.softplus_positive,
    "ordered": pyro_constraints.ordered_vector,
    "positive-ordered": pyro_constraints.positive_ordered_vector,
    "cat": constraints.cat([constraints.real, constraints.greater_than(torch.tensor(2.0))], dim=-1, lengths=[1, 3]),
    "sphere": pyro_constraints.sphere,
    "stack": constraints.stack([constraints.positive, constraints.interval(-1, 1)], dim=-1),
    "mixture": constraints.MixtureSameFamilyConstraint(constraints.interval(torch.tensor(0.0), torch.tensor(2.0))),
    "nested": constraints.independent(
        constraints.cat([constraints.independent(constraints.positive, 0), constraints.less_than(0.5)], 0, [2, 1]), 1
    ),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports_come_back(name, tmp_path):
    support = SUPPORTS[name]
    write_state(tmp_path / "file", plain_support(support), kind="support")
    again = support_of(read_state(tmp_path / "file", kind="support", remedy=""))
    assert type(again) is type(support) and same_support(again, support) and same_support(support, again)
    x = torch.randn(5, 4) if "definite" not in name else torch.randn(5, 6)
    if name in ("corr-cholesky", "corr-matrix", "lower-cholesky"):
        x = torch.randn(5, 6)
    if any(part in name for part in ("greater", "interval", "box", "stack")) and name != "greater-eq":
        x = x[:, :2]
    if name == "nested":
        x = torch.randn(3)
    assert torch.equal(biject_to(support)(x), biject_to(again)(x))


def test_every_known_support_is_tried():
    registered = {cls for cls in biject_to._registry if cls.__module__.startswith(("torch", "pyro."))}
    assert registered <= {type(support) for support in SUPPORTS.values()}


def varied():
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    pyro.sample("bounded", dist.Uniform(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 6.0])).to_event(1))
    pyro.sample("mix", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)))
    with pyro.plate("plate", 2):
        pyro.sample("low", dist.Pareto(2.0, 3.0))
    pyro.sample("y", dist.Normal(pyro.sample("scale", dist.LogNormal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))


@pytest.mark.full
def test_supports_in_a_fit(tmp_path):
    found = fitted(partial(pf.realnvp, **SMALL), varied)
    found.save(tmp_path / "guide.pt")
    loaded = load_guide(tmp_path / "guide.pt")
    same(found, loaded)
    for site, other in zip(found.latents, loaded.latents, strict=True):
        assert same_support(site.support, other.support)
    values = {name: value[:5] for name, value in drawn(found).items()}
    assert torch.equal(found.latents.pack(values), loaded.latents.pack(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(dtype, fit, tmp_path, default_dtype):
    fit.save(tmp_path / "guide.pt")
    before = torch.get_default_dtype()
    default_dtype(dtype)
    loaded = load_guide(tmp_path / "guide.pt")
    default_dtype(before)
    same(fit, loaded)


def test_the_file_names_no_module(fit, tmp_path):
    fit.save(tmp_path / "guide.pt")
    content = (tmp_path / "guide.pt").read_bytes()
    for word in (b"pyro_flows.", b"torch.", b"transforms", b"infer", b"pickle"):
        assert word not in content


# Where the builder has to be given again


class Moves(pf.FlowTransform):
    def __init__(self, dim, by=1.0):
        super().__init__(dim)
        self.shift = torch.nn.Parameter(torch.full((dim,), by))

    def forward_and_ladj(self, x, context=None):
        return x + self.shift, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y - self.shift, y.new_zeros(y.shape[:-1])


def wave(x):
    return x.tanh()


OWN = {
    "own-transform": (Moves, "'Moves'"),
    "own-in-a-chain": (lambda dim: pf.Chain([pf.maf(dim, **SMALL), Moves(dim)]), "'Moves'"),
    "own-univariate": (lambda dim: pf.realnvp(dim, univariate=Sinh(), **SMALL), "'Sinh'"),
    "function": (lambda dim: pf.realnvp(dim, activation=wave, **SMALL), "'wave'"),
    "field": (lambda dim: pf.cnf(dim, field=Field(dim)), "'Field'"),
}


class Field(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = torch.nn.Linear(dim, dim)

    def forward(self, t, x):
        return torch.tanh(self.net(x))


@pytest.mark.full
@pytest.mark.parametrize("name", full_but(OWN, "own-in-a-chain", "function"))
def test_builders_of_ones_own_are_given_again(name, tmp_path):
    builder, word = OWN[name]
    found = fitted(builder)
    with pytest.warns(UserWarning, match=rf"{word} is not of this package.*load_guide\(path, builder=...\)"):
        found.save(tmp_path / "guide.pt")
    with pytest.raises(ValueError, match=rf"{word} is not of this package; give the guide's builder, load_guide"):
        load_guide(tmp_path / "guide.pt")
    same(found, load_guide(tmp_path / "guide.pt", builder=builder))


def test_another_builder_is_refused(tmp_path):
    found = fitted(lambda dim: pf.realnvp(dim, activation=wave, **SMALL))
    shake(found.flow, 0.3)
    with pytest.warns(UserWarning, match="builder"):
        found.save(tmp_path / "guide.pt")
    others = {
        "made again, is another one": lambda dim: pf.realnvp(dim, activation=torch.sin, **SMALL),
        "size mismatch": lambda dim: pf.realnvp(dim, num_layers=2, hidden_dims=(7,)),
        "Unexpected key": lambda dim: pf.realnvp(dim, num_layers=1, hidden_dims=(6,)),
        "to give a flow of 3 dimensions": lambda dim: pf.realnvp(dim + 1, **SMALL),
    }
    for word, builder in others.items():
        with pytest.raises(ValueError, match=rf"(?s)guide\.pt' cannot be read.*{word}"):
            load_guide(tmp_path / "guide.pt", builder=builder)


def test_parts_changed_after_they_were_made_are_noticed(tmp_path):
    def builder(dim):
        made = pf.realnvp(dim, **SMALL)
        made.parts[0].univariate = pf.univariate.Affine(0.01)
        return made

    found = fitted(builder)
    shake(found.flow, 0.5)
    with pytest.warns(UserWarning, match="changed after they were made"):
        found.save(tmp_path / "guide.pt")
    refuses(ValueError, "changed after they were made", load_guide, tmp_path / "guide.pt")
    same(found, load_guide(tmp_path / "guide.pt", builder=builder))


def test_own_supports_are_refused_at_once(fit, tmp_path):
    class Halves(constraints.Constraint):
        event_dim = 0

        def check(self, value):
            return value.abs() < 0.5

    found = copy.copy(fit)
    found.latents = copy.deepcopy(fit.latents)
    object.__setattr__(found.latents.sites[0], "support", Halves())
    with pytest.raises(ValueError, match=r"support of the latent 'a'.*not a constraint of torch or Pyro"):
        found.save(tmp_path / "guide.pt")
    assert not os.listdir(tmp_path)


# What is refused


@pytest.mark.full
def test_missing_and_other_parts_are_refused(fit, tmp_path):
    path, options = tmp_path / "guide.pt", {"kind": result.KIND, "version": result.VERSION}
    fit.save(path)
    whole = read_state(path, **options, remedy="")
    for name in ("draws", "log_p", "log_q"):
        whole["assessment"][name] = whole["assessment"][name][:20]
    write_state(path, whole, **options)
    assert len(load_guide(path).log_weights) == 20
    tried = 0
    first = next(iter(whole["flow"]["state"]))
    for where, known, other, content in altered(whole, (None, "text", 3, torch.zeros(3, 5, 7))):
        if "state" in where[:-1] and where[-1] != first:
            continue  # all are read alike
        if "numbers" in where[:-1] and (other is None or isinstance(other, int)):
            continue  # any numbers by any names
        if isinstance(known, str | int | float) and isinstance(other, str | int):
            continue  # another value, not another type
        write_state(path, content, **options)
        with pytest.raises(ValueError, match=r"guide\.pt' cannot be read"):
            load_guide(path)
            raise AssertionError((where, other))
        tried += 1
    assert tried > 100


def test_flipped_bits_and_cut_files_are_refused(fit, tmp_path):
    path, rand = tmp_path / "guide.pt", random.Random(0)
    fit.save(path)
    whole = path.read_bytes()
    damaged = []
    for k in range(300):
        bad = bytearray(whole)
        bad[k if k < 100 else rand.randrange(len(bad))] ^= 1 << rand.randrange(8)
        damaged.append(bytes(bad))
    damaged += [whole[: rand.randrange(len(whole))] for _ in range(50)] + [b"", whole + b"\0", whole + whole]
    for bad in damaged:
        path.write_bytes(bad)
        refuses(ValueError, r"guide\.pt' cannot be read: .*; give the path of a file", load_guide, path)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_code_in_a_file_is_not_run(tmp_path):
    path = tmp_path / "guide.pt"
    torch.save({"format": 1, "flow": Evil(tmp_path / "owned")}, path)
    refuses(ValueError, "cannot be read: it is no such file", load_guide, path)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(FileNotFoundError):
        load_guide(tmp_path / "none")
    refuses(ValueError, "which is no file", load_guide, tmp_path)


@pytest.mark.parametrize("name", ["os.system", "Flow", "nn.Linear", "FlowTransform", "__import__"])
def test_names_that_are_no_flows_are_refused(name, fit, tmp_path):
    path, options = tmp_path / "guide.pt", {"kind": result.KIND, "version": result.VERSION}
    fit.save(path)
    content = read_state(path, **options, remedy="")
    content["flow"]["chain"] = {"make": name, "args": ["touch owned"], "kwargs": {}}
    write_state(path, content, **options)
    refuses(ValueError, "cannot be read: its contents are not as expected", load_guide, path)


def test_map_location(fit, tmp_path):
    path = tmp_path / "guide.pt"
    fit.save(path)
    for where in (None, "cpu", torch.device("cpu"), {"cpu": "cpu"}, {}, lambda storage, place: storage):
        assert next(load_guide(path, where).flow.parameters()).device.type == "cpu"
    refuses(ValueError, r"the device .* is not there .*map_location='cpu'", load_guide, path, "cuda:99")
    assert device_of({"cuda:0": "cpu"}, "cuda:0", "") == torch.device("cpu")
    assert device_of(lambda storage, place: None, "cpu", "") == torch.device("cpu")


def test_places_that_are_no_files(fit, tmp_path):
    refuses(ValueError, "a folder that exists", fit.save, tmp_path / "nowhere" / "guide.pt")
    refuses(ValueError, "which is something else", fit.save, tmp_path)
