"""Saved fits to data: each kind comes back from plain data with all its numbers, and other files are refused."""

import copy
import json
import os
import warnings

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from asserts import output_of, refuses
from cases import full_but, shake
from torch import nn
from torch.distributions import transforms

import pyro_flows as pf
from pyro_flows.core.recipes import made_from, recipe
from pyro_flows.distributions import CategoricalHead, DistributionHead, MixedHead
from pyro_flows.infer.machine.files import read_state, write_state

SMALL = {"num_layers": 2, "hidden_dims": (6,)}
READ = {"kind": "saved fit of a density", "remedy": "give another"}


def real(rows=60, size=2):
    return torch.randn(rows, size) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]]) + 3.0


def mixed():
    return torch.stack([torch.randint(2, (60,)), torch.randint(3, (60,)), torch.randn(60)], 1)


def fitted(flow, data=None, context=None, **options):
    torch.manual_seed(1)
    data = real() if data is None else data
    own = {"steps": 3, "progress": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pf.fit_density(flow, data, context=context, **own)


def positive():
    shifted = transforms.ComposeTransform([transforms.ExpTransform(), transforms.AffineTransform(2.0, 3.0)])
    ends = transforms.CatTransform([transforms.ExpTransform().inv.inv, shifted], -1, [1, 1])
    return fitted(pf.Chain([pf.nsf(2, bins=4, **SMALL), ends]), real().exp() + 2.0)


def box():
    ends = torch.tensor([-9.0, -9.0]), torch.tensor([20.0, 22.0])
    return fitted(
        pf.Chain([pf.maf(2, **SMALL), transforms.SigmoidTransform(), transforms.AffineTransform(*ends, event_dim=1)]),
        real().clamp(-8, 8),
    )


def folds():
    return fitted(pf.maf(2, **SMALL), folds=2)


def folds_by_default():
    torch.manual_seed(1)
    return pf.fit_density(pf.maf(2, **SMALL), real(20), patience=1, schedule="constant", progress=False)


def pixels():
    return torch.randint(4, (40, 1, 4, 4)).float()


def dequantized(**options):
    flow = pf.Chain([pf.realnvp((1, 4, 4), **SMALL), pf.LogitPixels((1, 4, 4), 4)])
    return fitted(pf.Dequantized(flow, 4, **options), pixels())


def vectors():
    return F.normalize(torch.randn(60, 3), dim=-1)


KINDS = {
    "nsf": lambda: fitted(pf.nsf(2, bins=4, **SMALL)),
    "bounds": lambda: fitted(pf.nsf(2, bins=4, **SMALL), real().abs(), bounds=[(0, None), (-1.0, 99.0)]),
    "weights": lambda: fitted(pf.maf(2, **SMALL), real(), weights=torch.rand(60)),
    "inverse": lambda: fitted(pf.Chain([pf.Chain([pf.iaf(2, **SMALL), pf.Permutation(2)]).inv, pf.LULinear(2)])),
    "positive": positive,
    "box": box,
    "context": lambda: fitted(pf.maf(2, context_dim=1, **SMALL), context=torch.randn(60, 1)),
    "twice": lambda: fitted(pf.Chain([layer := pf.Coupling(2, hidden_dims=(5,)), pf.Permutation(2), layer])),
    "activations": lambda: fitted(
        pf.Chain([pf.realnvp(2, activation=F.gelu, **SMALL), pf.maf(2, activation=nn.LeakyReLU(0.2), **SMALL)])
    ),
    "student": lambda: fitted(pf.Flow(pf.maf(2, **SMALL), pf.StudentT(2, df=4.0, learnable=False))),
    "mixture": lambda: fitted(pf.Flow(pf.maf(2, **SMALL), pf.GaussianMixture(2, 3, full_covariance=True))),
    "laplace": lambda: fitted(pf.Flow(pf.maf(2, **SMALL), dist.Laplace(torch.zeros(2), 1.0).to_event(1))),
    "normal-base": lambda: fitted(
        pf.Flow(pf.maf(2, **SMALL), dist.MultivariateNormal(torch.ones(2), scale_tril=2 * torch.eye(2)))
    ),
    "folds": folds,
    "folds-by-default": folds_by_default,
    "made": lambda: fitted(pf.MADE(2, "normal", hidden_dims=(7,), order="any"), standardize=True),
    "made-mixed": lambda: fitted(
        pf.MADE(3, MixedHead([("bernoulli", [0]), (CategoricalHead(3), [1]), ("mixture", [2])]), hidden_dims=(7,)),
        mixed(),
    ),
    "made-pyro": lambda: fitted(
        pf.MADE(2, DistributionHead(dist.Gamma), hidden_dims=(7,), connectivity="random"), real().exp()
    ),
    "conv-made": lambda: fitted(pf.ConvMADE((1, 4, 4), CategoricalHead(4), hidden_channels=4, num_layers=2), pixels()),
    "gru": lambda: fitted(pf.ConvMADE((2, 5), "normal", network="gru", hidden_channels=4), torch.randn(60, 2, 5)),
    "dequantized": dequantized,
    "dequantizer": lambda: dequantized(dequantizer=pf.Dequantizer((1, 4, 4), context_dim=3, **SMALL)),
    "idf": lambda: fitted(pf.idf(4, levels=8, num_layers=2, hidden_dims=(6,)), torch.randint(8, (60, 4)).float()),
    "sphere": lambda: fitted(pf.sphere(3, num_layers=2), vectors()),
    "circle": lambda: fitted(pf.ncsf(2, bins=4, **SMALL), torch.rand(60, 2) * 6 - 3),
    "cnf": lambda: fitted(pf.cnf(2, hidden_dims=(6,))),
    "matching": lambda: fitted(pf.cnf(2, hidden_dims=(6,)), objective="flow_matching"),
    "series": lambda: fitted(pf.causal_maf((2, 5), num_layers=2, hidden_channels=4), torch.randn(60, 2, 5)),
    "glow": lambda: fitted(pf.glow((1, 4, 4), num_layers=2, num_scales=1, hidden_channels=4), torch.randn(60, 1, 4, 4)),
    "mintnet": lambda: fitted(pf.mintnet((1, 4, 4), num_layers=2, num_groups=2), pixels() + torch.rand(1)),
    "ensemble": lambda: fitted(
        pf.distributions.Ensemble([pf.Flow(pf.maf(2, **SMALL)), pf.MADE(2, "normal", hidden_dims=(5,))])
    ),
}

QUICK = ("context", "made-mixed")


def same(fit, loaded, *, verdict=True):
    """The same scores, draws, numbers and words, bit for bit."""
    part = fit.kept[0]
    rows = part.trained.take(torch.arange(15))
    assert torch.equal(fit.log_prob(rows.value, rows.context), loaded.log_prob(rows.value, rows.context))
    context = None if rows.context is None else rows.context[:2]
    drawn = []
    for each in (fit, loaded):
        torch.manual_seed(3)
        drawn.append(each.sample((4,), context))
    assert torch.equal(*drawn)
    assert repr(fit) == repr(loaded)
    assert repr(vars(fit)["history"]) == repr(loaded.history)
    for name in ("best_epoch", "stopped", "objective"):
        assert getattr(fit, name) == getattr(loaded, name)
    assert len(fit.members) == len(loaded.members) and len(fit.kept) == len(loaded.kept)
    frozen = [[p.requires_grad for p in each.distribution.parameters()] for each in (fit, loaded)]
    assert frozen[0] == frozen[1]
    assert type(fit.flow) is type(loaded.flow) and fit.flow.training == loaded.flow.training
    names = [[name for name, _ in each.distribution.named_parameters()] for each in (fit, loaded)]
    assert names[0] == names[1]  # parts are shared alike
    if verdict:
        assert str(fit.verdict) == str(loaded.verdict)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in KINDS]
)
def test_fits_come_back(name, tmp_path):
    fit = KINDS[name]()
    shake(fit.flow, 0.01)
    next(fit.flow.parameters()).requires_grad_(False)
    fit.save(tmp_path / "fit.pt")
    state = torch.get_rng_state()
    loaded = pf.load_density(tmp_path / "fit.pt")
    assert torch.equal(torch.get_rng_state(), state)
    same(fit, loaded, verdict=False)
    loaded.save(tmp_path / "again.pt")
    same(loaded, pf.load_density(str(tmp_path / "again.pt"), map_location=torch.device("cpu")), verdict=False)


def shaken(fit):
    shake(fit.flow, 0.1)
    return fit


def fit_and_file(tmp_path, flow=None, **options):
    fit = fitted(pf.maf(2, **SMALL) if flow is None else flow, **options)
    fit.save(tmp_path / "fit.pt")
    return fit, tmp_path / "fit.pt"


@pytest.mark.full
def test_columns_come_back(tmp_path):
    pandas = pytest.importorskip("pandas")
    fit, path = fit_and_file(
        tmp_path, data=pandas.DataFrame(real().numpy(), columns=["a", "b"]), bounds={"b": (-50, 50)}
    )
    loaded = pf.load_density(path)
    assert loaded.columns == ("a", "b") and loaded.kept[0].trained.columns == ("a", "b")
    assert list(loaded.summary(num_samples=100).index) == list(fit.summary(num_samples=100).index)
    same(fit, loaded, verdict=False)


def test_verdicts_come_back(tmp_path):
    """One that was computed before, and one that is computed from the rows in the file."""
    fit, path = fit_and_file(tmp_path)
    assert pf.load_density(path)._verdict is None
    same(fit, pf.load_density(path))
    fit.save(path)
    loaded = pf.load_density(path)
    assert loaded._verdict is not None and str(loaded) == str(fit)
    same(fit, loaded)
    assert loaded.verdict.numbers == fit.verdict.numbers and loaded.verdict.pvalues == fit.verdict.pvalues
    assert torch.equal(loaded.verdict.checks.scores, fit.verdict.checks.scores)


@pytest.mark.full
def test_parts_are_shared_as_before(tmp_path):
    """A step of the flow moves its distribution, too."""
    _, path = fit_and_file(tmp_path, pf.Chain([layer := pf.Coupling(2, hidden_dims=(5,)), pf.Permutation(2), layer]))
    loaded = pf.load_density(path)
    first, _, again = loaded.flow.chain
    assert first is again
    x, before = real(5), loaded.log_prob(real(5) * 0 + 1)
    own = {id(p) for p in loaded.distribution.parameters()}
    assert own and {id(p) for p in loaded.flow.parameters()} <= own
    with torch.no_grad():
        for p in loaded.flow.parameters():
            p.add_(0.3)
    assert not torch.allclose(loaded.log_prob(x * 0 + 1), before)
    more = pf.fit_density(loaded.flow, real(), steps=2, progress=False)
    assert more.flow is loaded.flow


ELSEWHERE = """
import sys, torch, pyro_flows as pf
torch.set_default_dtype(torch.float64)
fit = pf.load_density(sys.argv[1])
print(fit.log_prob([[1.0, 2.0], [3.0, 4.0]]).tolist())
"""


@pytest.mark.full
def test_another_process(tmp_path):
    fit, path = fit_and_file(tmp_path, pf.nsf(2, **SMALL))
    assert json.loads(output_of("-c", ELSEWHERE, path)) == pytest.approx(
        fit.log_prob([[1.0, 2.0], [3.0, 4.0]]).tolist(), abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes(dtype, tmp_path, default_dtype):
    """A flow made in one dtype and moved to the other comes back in any default dtype, constants to the last bit."""
    base = pf.StudentT(2, df=4.3, learnable=False)  # whose constant is not exact
    flow = pf.Flow(pf.maf(2, **SMALL), base).to(dtype)
    fit, path = fit_and_file(tmp_path, flow, data=real().to(dtype))
    for other in (torch.float64, torch.float32):
        default_dtype(other)
        loaded = pf.load_density(path)
        assert torch.get_default_dtype() == other
        default_dtype(torch.float32)
        assert loaded.flow.base.raw_df.dtype == dtype and torch.equal(loaded.flow.base.raw_df, fit.flow.base.raw_df)
        same(fit, loaded, verdict=False)


# What a file of plain data cannot hold.


class Shifted(pf.FlowTransform):
    """A layer from outside of the package."""

    sampling_cost = density_cost = "1 product"

    def __init__(self, dim, by):
        super().__init__(dim)
        self.by = nn.Parameter(torch.full((dim,), by))

    def forward_and_ladj(self, x, context=None):
        return x + self.by, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y - self.by, y.new_zeros(y.shape[:-1])


class Normal(nn.Module):
    """A density from outside of the package."""

    event_shape, context_dim = (2,), 0

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).to_event(1).log_prob(value)

    def sample(self, sample_shape=()):
        return dist.Normal(self.loc, 1.0).to_event(1).sample(sample_shape)


OWN = {
    "layer": lambda: pf.Chain([pf.maf(2, **SMALL), Shifted(2, 0.5)]),
    "activation": lambda: pf.Chain([pf.maf(2, activation=lambda x: x.tanh(), **SMALL), pf.LULinear(2)]),
    "density": Normal,
}


@pytest.mark.parametrize("name", full_but(OWN, "layer"))
@pytest.mark.parametrize("options", [{}, pytest.param({"folds": 2}, marks=pytest.mark.full)], ids=["one", "folds"])
def test_own_code_is_given_again(name, options, tmp_path):
    fit = fitted(OWN[name](), **options)
    path = tmp_path / "fit.pt"
    with pytest.warns(UserWarning, match=r"cannot hold the architecture .*load_density\(path, flow=...\)"):
        fit.save(path)
    refuses(
        ValueError, r"flow was left out, which a file .* cannot hold.*give the flow .*flow=...\)", pf.load_density, path
    )
    given = OWN[name]()
    before = copy.deepcopy(given.state_dict())
    loaded = pf.load_density(path, flow=given)
    same(fit, loaded, verdict=False)
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())
    refuses(ValueError, "cannot be read", pf.load_density, path, flow=pf.realnvp(3, **SMALL))


@pytest.mark.full
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("folds", [1, 2])
def test_own_code_between_bounds_keeps_its_quantiles(dim, folds, tmp_path):
    """Those of one number are exact, by the inverse of the distribution function, which the bounds are a part of."""
    torch.manual_seed(0)
    data, bounds = 2 + 3 * torch.rand(60, dim), [(2, 5)] * dim

    def made():
        return pf.Chain([Shifted(dim, 0.5), *pf.nsf(dim, num_layers=1, hidden_dims=(8,))])

    fit, path = pf.fit_density(made(), data, bounds=bounds, folds=folds, steps=3, progress=False), tmp_path / "fit.pt"
    with pytest.warns(UserWarning, match="cannot hold the architecture"):
        fit.save(path)
    for given in (made(), pf.Flow(made())):
        loaded = pf.load_density(path, flow=given)
        levels = [0.0, 0.05, 0.5, 0.95, 1.0]
        found = loaded.quantile(levels)
        assert torch.equal(found, fit.quantile(levels)) and (found.diff(dim=0) >= 0).all()
        assert found.min() >= 2 and found.max() <= 5
        assert torch.equal(loaded.interval(0.9)[1], fit.interval(0.9)[1])
        same(fit, loaded, verdict=False)
        if dim == 1:
            cdf = loaded.distribution().cdf(found[1:4])
            torch.testing.assert_close(cdf, torch.tensor(levels[1:4]), atol=1e-4, rtol=0)


class OwnHead(pf.distributions.made.Head):
    """A normal of unit scale."""

    discrete, has_rsample, constraint = False, True, torch.distributions.constraints.real

    def log_prob(self, value, params, dims=None):
        return dist.Normal(params[..., 0], 1.0).log_prob(value)

    def rsample(self, params, dims=None):
        return dist.Normal(params[..., 0], 1.0).rsample()


@pytest.mark.full
def test_an_own_head_in_small_data(tmp_path):
    """Folds by default add the start, a further copy of the model."""
    torch.manual_seed(1)
    rows, made = real(20), pf.MADE(2, OwnHead(), hidden_dims=(8,))
    fit = pf.fit_density(made, rows, patience=1, schedule="constant", lr=0.1, progress=False)
    assert len(fit.distribution) == 6
    with pytest.warns(UserWarning, match="'OwnHead' is not of this package"):
        fit.save(tmp_path / "fit.pt")
    again = pf.load_density(tmp_path / "fit.pt", flow=pf.MADE(2, OwnHead(), hidden_dims=(8,)))
    assert torch.equal(again.log_prob(rows), fit.log_prob(rows))


@pytest.mark.full
def test_own_code_in_small_data(tmp_path):
    """Folds by default add a Gaussian, a further copy of the flow."""
    torch.manual_seed(1)
    fit = pf.fit_density(OWN["layer"](), real(20), patience=1, schedule="constant", progress=False)
    assert len(fit.distribution) == 6
    with pytest.warns(UserWarning, match="'Shifted' is not of this package"):
        fit.save(tmp_path / "fit.pt")
    same(fit, pf.load_density(tmp_path / "fit.pt", flow=OWN["layer"]()), verdict=False)


@pytest.mark.full
def test_changed_parts_are_noticed(tmp_path):
    """A part with another option than it was made with would come back as it was made."""

    def changed():
        chain = pf.nsf(2, bins=4, **SMALL)
        for layer in chain:
            layer.univariate = pf.Spline(4, bound=2.0)
        return chain

    fit, path = shaken(fitted(changed())), tmp_path / "fit.pt"
    with pytest.warns(UserWarning, match="made again, is another one.*parts that were changed"):
        fit.save(path)
    refuses(ValueError, "made again, is another one", pf.load_density, path, flow=pf.nsf(2, bins=4, **SMALL))
    same(fit, pf.load_density(path, flow=changed()), verdict=False)


# Files


def test_damaged_and_foreign_files(tmp_path):
    fit, path = fit_and_file(tmp_path)
    whole = path.read_bytes()
    refuses(FileNotFoundError, "nothing", pf.load_density, tmp_path / "nothing")
    path.write_bytes(whole[:-9])
    refuses(ValueError, "damaged or not whole .* DensityFit.save", pf.load_density, path)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes(changed)
    refuses(ValueError, "check sum is wrong", pf.load_density, path)
    torch.save({"a": 1}, path)
    refuses(ValueError, "no such file", pf.load_density, path)
    write_state(path, {"modules": {}, "fit": {}}, kind="saved fit of a guide", version=4)
    refuses(ValueError, "it is a saved fit of a guide", pf.load_density, path)
    write_state(path, {"modules": {}, "fit": {}}, kind=READ["kind"], version=99)
    refuses(ValueError, "version 99", pf.load_density, path)
    refuses(ValueError, "folder that exists", fit.save, tmp_path / "no" / "fit.pt")
    refuses(ValueError, "no file", pf.load_density, tmp_path)


def _spoil(state, name):
    modules, fit = state["modules"], state["fit"]
    tensor = next(key for key, value in modules["state"].items() if isinstance(value, torch.Tensor))
    if name == "class":
        modules["plan"] = [{"make": "Popen", "args": ["true"], "kwargs": {}}]
    elif name == "function":
        modules["plan"] = [{"name": "torch load"}]
    elif name == "same":
        modules["plan"] = [{"same": 7}]
    elif name == "given":
        modules["plan"] = [{"given": [0, "chain"]}]
    elif name == "lacking":
        del modules["state"][tensor]
    elif name == "shape":
        modules["state"][tensor] = torch.zeros(77)
    elif name == "other-numbers":
        modules["state"] = {key: value * 0 + 1 for key, value in modules["state"].items()}
    elif name == "entry":
        del fit["entries"]["stopped"]
    elif name == "kind":
        fit["entries"]["history"] = [1, 2]
    elif name == "history":
        fit["entries"]["history"]["epoch"] = []
    elif name == "epoch":
        fit["entries"]["best_epoch"] = 99
    elif name == "rows":
        fit["kept"][0]["trained"]["value"] = torch.zeros(3, 9)
    elif name == "index":
        fit["flow"] = 12
    elif name == "label":
        fit["verdict"]["label"] = "perfect"


SPOILED = ("class", "function", "same", "given", "lacking", "shape", "other-numbers", "entry", "kind", "history")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    fit, path = fit_and_file(tmp_path_factory.mktemp("judged"))
    str(fit)
    fit.save(path)
    return path


@pytest.mark.parametrize("name", [*SPOILED, "epoch", "rows", "index", "label"])
def test_hostile_contents_are_refused(name, judged, tmp_path):
    """A file with a right checksum and other contents."""
    state = read_state(judged, **READ)
    _spoil(state, name)
    write_state(tmp_path / "bad", state, kind=READ["kind"])
    refuses(ValueError, "cannot be read: its contents are not as expected", pf.load_density, tmp_path / "bad")


def test_nothing_outside_of_the_tables_is_made():
    for plain in ({"make": "torch load", "args": [], "kwargs": {}}, {"name": "os system"}, {"name": "nn _reduction"}):
        refuses(ValueError, "there is no", made_from, plain)
    refuses(TypeError, "'print' is not of this package", recipe, print)
    refuses(TypeError, "'Shifted' is not of this package", recipe, Shifted(2, 0.5))


def test_a_kill_leaves_the_old_file(tmp_path, monkeypatch):
    fit, path = fit_and_file(tmp_path)
    before = path.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_flows.infer.machine.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted(pf.realnvp(2, **SMALL)).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["fit.pt"]
    same(fit, pf.load_density(path), verdict=False)


def test_devices(judged):
    refuses(ValueError, "load_density: the device 'cuda:77' is not there", pf.load_density, judged, "cuda:77")
    assert pf.load_density(judged, {"cpu": "cpu"}).distribution.chain[1] is not None


@pytest.mark.full
def test_interrupted_fits_are_saved(tmp_path):
    class Stop(torch.utils.data.Dataset):
        def __init__(self):
            self.count, self.rows = 0, real()

        def __len__(self):
            return 60

        def __getitem__(self, k):
            self.count += 1
            if self.count > 200:
                raise KeyboardInterrupt
            return self.rows[k]

    with pytest.raises(KeyboardInterrupt) as stopped:
        fitted(pf.maf(2, **SMALL), torch.utils.data.DataLoader(Stop(), 30), steps=None, max_epochs=50)
    fit = stopped.value.fit
    fit.save(tmp_path / "fit.pt")
    same(fit, pf.load_density(tmp_path / "fit.pt"))


# Recipes of what is not ours

FOREIGN = {
    "affine": transforms.AffineTransform(torch.ones(2), 2.0),
    "compose": transforms.ComposeTransform([transforms.ExpTransform(), transforms.AffineTransform(1.0, 2.0)]),
    "inverse": transforms.SigmoidTransform().inv,
    "independent": transforms.IndependentTransform(transforms.PowerTransform(torch.tensor(2.0)), 1),
    "stack": transforms.StackTransform([transforms.ExpTransform(), transforms.SoftplusTransform()], -1),
    "stick": transforms.StickBreakingTransform(),
    "reshape": transforms.ReshapeTransform((2,), (1, 2)),
    "cdf": transforms.CumulativeDistributionTransform(torch.distributions.Normal(1.0, 2.0)),
    "ordered": dist.transforms.OrderedTransform(),
    "lower": dist.transforms.LowerCholeskyAffine(torch.ones(2), torch.eye(2) * 2),
    "permute": dist.transforms.Permute(torch.tensor([1, 0])),
    "haar": dist.transforms.HaarTransform(dim=-1),
    "gamma": dist.Gamma(torch.tensor([1.0, 2.0]), 3.0).to_event(1),
    "bernoulli": dist.Bernoulli(probs=torch.tensor(0.3)),
    "categorical": dist.Categorical(logits=torch.randn(4)),
    "normals": dist.MultivariateNormal(torch.zeros(2), covariance_matrix=torch.tensor([[2.0, 0.3], [0.3, 1.0]])),
    "lognormal": dist.LogNormal(torch.zeros(2), 1.5).to_event(1),
    "mix": dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)),
    "transformed": dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [transforms.ExpTransform()]),
    "expanded": dist.StudentT(4.0, 0.0, 1.0).expand([2]).to_event(1),
    "uniform": torch.distributions.Uniform(torch.zeros(2), 3.0),
    "von-mises": dist.VonMises(torch.zeros(2), 1.0),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_objects_come_back(name, tmp_path):
    value = FOREIGN[name]
    write_state(tmp_path / "file", recipe(value), kind="it")
    again = made_from(read_state(tmp_path / "file", kind="it", remedy=""))
    assert type(again) is type(value)
    if isinstance(value, torch.distributions.Distribution):
        assert (again.batch_shape, again.event_shape) == (value.batch_shape, value.event_shape)
        x = value.sample((5,))
        assert torch.allclose(value.log_prob(x), again.log_prob(x), rtol=1e-5)
    else:
        x = torch.rand(5, 2) * 0.4 + 0.3
        assert torch.equal(value(x), again(x))


NETS = {
    "sequence": nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Sequential(nn.Linear(3, 2, bias=False), nn.Softplus(2.0))),
    "convolution": nn.Conv1d(1, 2, 3, padding=1, groups=1),
    "norm": nn.LayerNorm((2,)),
    "prelu": nn.PReLU(),
}


@pytest.mark.parametrize("name", NETS)
def test_nets_of_torch_come_back(name):
    net = NETS[name]
    again = made_from(recipe(net))
    again.load_state_dict(net.state_dict())
    x = torch.randn(5, *((1, 2) if name == "convolution" else (2,)))
    assert torch.equal(net(x), again(x))
    assert recipe(torch.tanh) == {"name": "torch tanh"} and made_from({"name": "functional gelu"}) is F.gelu


def test_what_torch_does_not_tell_is_refused():
    refuses(TypeError, "not known how this GRU was made", recipe, nn.GRU(2, 3))
    bare = copy.copy(FOREIGN["affine"])
    del bare.scale
    refuses(TypeError, "not known how this AffineTransform was made", recipe, bare)
