"""Simulation-based calibration: exact inference is uniform, wrong inference is not, and what cannot be simulated."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch.distributions import constraints

from pyro_flows import plots
from pyro_flows.infer.diagnostics.calibration import Calibration, simulation_based_calibration
from pyro_flows.infer.diagnostics.prior import simulate
from pyro_flows.infer.diagnostics.uniformity import band, chi_square, ecdf_pvalues

SIZES = torch.zeros(4, 2)


def model(y, noise=1.0):
    """Two normal means, each of its own prior scale."""
    with pyro.plate("columns", 2, dim=-1):
        mu = pyro.sample("mu", dist.Normal(0.0, torch.tensor([0.5, 2.0])))
        with pyro.plate("rows", 4, dim=-2):
            pyro.sample("y", dist.Normal(mu, noise), obs=y)


def conjugate(data, seed, width=1.0, shift=0.0, n=99):
    precision = torch.tensor([4.0, 0.25]) + 4
    return {"mu": data["y"].sum(0) / precision + (shift + width * torch.randn(n, 2)) * precision**-0.5}


def calibrate(fit=conjugate, *args, **options):
    options = {"simulations": 200, "progress": False, **options}
    return simulation_based_calibration(model, fit, *(args or (SIZES,)), **options)


# Ranks


def test_exact_posterior_is_uniform():
    found = calibrate()
    assert found.ranks["mu"].shape == (200, 2) and found.ranks["mu"].dtype == torch.long
    assert found.ok and found.pvalues["mu"].shape == (2,)
    assert (found.simulations, found.num_samples, found.names) == (200, 99, ["mu[0]", "mu[1]"])
    assert "as even as chance allows" in str(found)
    ranks = found.ranks["mu"].double()
    assert int(ranks.min()) >= 0 and int(ranks.max()) <= 99
    assert ((ranks.mean(0) - 49.5).abs() < 5 * 28.9 / math.sqrt(200)).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"width": 0.5}, "draws are too narrow"),
        ({"width": 2.0}, "draws are too wide"),
        ({"shift": 0.7}, "draws lie too high"),
        ({"shift": -0.7}, "draws lie too low"),
    ],
)
def test_wrong_posteriors_are_not(wrong, words):
    found = calibrate(lambda data, seed: conjugate(data, seed, **wrong))
    assert not found.ok and found.worst < 1e-2
    assert "not uniform" in str(found) and "mu[0]: p = " in str(found) and words in str(found)


def test_false_alarms_are_as_rare_as_they_should_be():
    alarms = 0
    for seed in range(60):
        ranks = torch.randint(100, (100, 5), generator=torch.Generator().manual_seed(seed), device="cpu")
        alarms += not Calibration({"z": ranks}, 99).ok
    assert alarms <= 9  # 5 % at most; 9 of 60 has a chance of one in a thousand


def test_ties_are_broken_evenly():
    def coin(y):
        p = pyro.sample("p", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(0.0 * p, 1.0), obs=y)

    def fit(data, seed):
        return {"p": torch.distributions.Bernoulli(0.3).sample((19,))}

    assert simulation_based_calibration(coin, fit, torch.zeros(()), simulations=500, num_samples=19, progress=False).ok


def test_more_draws_are_thinned():
    def fit(data, seed):
        return {"mu": torch.arange(1000.0)[:, None].expand(1000, 2) / 1000 - 0.5}

    found = calibrate(fit, simulations=10, num_samples=9)
    data = [simulate_seed(seed) for seed in seeds(10)]
    for index, truth in enumerate(data):
        expected = (torch.linspace(0, 999, 9).round()[:, None] / 1000 - 0.5 < truth).sum(0)
        assert torch.equal(found.ranks["mu"][index], expected.cpu())


def seeds(n, seed=0):
    return torch.randint(2**31, (n,), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()


def simulate_seed(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return simulate(model, (SIZES,), {}).latents["mu"]


def test_a_seed_says_everything_and_generators_stay():
    state = torch.get_rng_state()
    first, second, third = calibrate(simulations=5), calibrate(simulations=5), calibrate(simulations=5, seed=1)
    assert torch.equal(first.ranks["mu"], second.ranks["mu"]) and not torch.equal(first.ranks["mu"], third.ranks["mu"])
    assert torch.equal(torch.get_rng_state(), state)


def test_each_fit_gets_its_data_seed_and_a_clean_store():
    pyro.param("kept", torch.tensor(3.0))
    seen = []

    def fit(data, seed):
        assert list(data) == ["y"] and data["y"].shape == (4, 2) and not data["y"].requires_grad
        assert dict(pyro.get_param_store().items()).keys() == {"kept"}
        with torch.no_grad():
            pyro.param("kept").add_(1.0)
        pyro.param("left", torch.zeros(2))
        assert pyro.param("kept").item() == 4.0
        seen.append((seed, float(data["y"].sum())))
        return conjugate(data, seed)

    calibrate(fit, simulations=4)
    assert len(set(seen)) == 4
    assert dict(pyro.get_param_store().items()).keys() == {"kept"} and pyro.param("kept").item() == 3.0


@pytest.mark.full
def test_stock_inference_of_pyro():
    def fit(data, seed):
        guide = AutoNormal(model)
        svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO(num_particles=8, vectorize_particles=True))
        for _ in range(60):
            svi.step(data["y"])
        with torch.no_grad():
            return {"mu": torch.stack([guide(data["y"])["mu"] for _ in range(19)])}

    found = calibrate(fit, simulations=10, num_samples=19)
    assert found.ranks["mu"].shape == (10, 2) and found.ok


# How data reach the fit


def test_data_go_to_the_argument_that_is_named():
    def other(x, values=None, scale=1.0):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slope * x, scale), obs=values)

    def fit(data, seed):
        assert data["values"].shape == (6,)
        precision = 1 + (x**2).sum() / 0.25
        return {"slope": (x * data["values"]).sum() / 0.25 / precision + precision**-0.5 * torch.randn(99)}

    x = torch.linspace(-1, 1, 6)
    for args in ((x, torch.zeros(6), 0.5), (x, None, 0.5)):
        names = {"obs": "values"}
        found = simulation_based_calibration(other, fit, *args, observed=names, simulations=100, progress=False)
        assert found.ok
    found = simulation_based_calibration(other, fit, x, scale=0.5, observed=names, simulations=10, progress=False)
    assert found.simulations == 10
    with pytest.raises(ValueError, match=r"no argument 'obs' for the data site 'obs', only \['x', 'values', 'scale'\]"):
        simulation_based_calibration(other, fit, x, torch.zeros(6), progress=False)
    refuses(ValueError, "observes nothing", simulation_based_calibration, other, fit, x, progress=False)
    with pytest.raises(ValueError, match=r"observed names \['nil'\]"):
        simulation_based_calibration(other, fit, x, observed={"nil": "values"}, progress=False)


def test_data_are_drawn_and_not_those_given():
    made = simulate(model, (torch.full((4, 2), 1e6),), {})
    assert made.data["y"].abs().max() < 100 and made.arguments == {"y": "y"} and set(made.latents) == {"mu"}


def test_modules_and_deterministic_sites():
    class Model(torch.nn.Module):
        def forward(self, y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def fit(data, seed):
        z = data["y"] / 2 + 0.5**0.5 * torch.randn(99)
        return {"z": z, "twice": 2 * z}

    found = simulation_based_calibration(Model(), fit, torch.zeros(()), simulations=50, progress=False)
    assert list(found.ranks) == ["z"] and found.ok


# What is refused


def improper(y):
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def masked_improper(y):
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (3,), ()).mask(torch.ones(3) > 0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def flat(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).mask(False).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def flat_by_handler(y):
    with poutine.mask(mask=False):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0).mask(False), obs=y)


def with_factor(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -(x**2))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def scaled(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def subsampled(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=3) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=y.expand(10)[index])


def without_latents(y):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def without_data(y):
    pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (improper, "prior of 'x' is improper"),
        (masked_improper, "prior of 'x' is improper"),
        (flat, "prior of 'x' is improper"),
        (flat_by_handler, "prior of 'x' is improper"),
        (with_factor, "has a factor 'penalty'"),
        (scaled, "density of 'y' is scaled"),
        (subsampled, "plate 'data' takes 3 of 10"),
        (without_latents, "no latents"),
        (without_data, "observes nothing"),
    ],
)
def test_models_that_cannot_be_simulated(refused, message):
    refuses(ValueError, message, simulation_based_calibration, refused, conjugate, torch.zeros(()), progress=False)


def test_a_plate_that_takes_all_is_no_subsample():
    def whole(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    assert simulate(whole, (torch.zeros(3),), {}).data["y"].shape == (3,)


def test_fits_that_do_not_fit():
    for result, message in (
        (torch.zeros(99, 2), "a dictionary from site to draws, got Tensor"),
        ({"nu": torch.zeros(99)}, "no draws of mu; it returned nu"),
        ({"mu": torch.zeros(98, 2)}, r"shape \(99 or more, 2\), got \(98, 2\)"),
        ({"mu": torch.zeros(99, 3)}, r"got \(99, 3\)"),
        ({"mu": torch.full((99, 2), math.nan)}, "draws of mu are NaN"),
    ):
        refuses(ValueError, message, calibrate, lambda data, seed, result=result: result)

    def fails(data, seed):
        raise FloatingPointError("loss is NaN")

    refuses(RuntimeError, r"fit of simulation 0 \(seed \d+\) failed: loss is NaN", calibrate, fails)
    for name in ("simulations", "num_samples"):
        refuses(ValueError, f"{name} to be an integer >= 2", calibrate, **{name: 1})


def test_default_dtype_does_not_matter(default_dtype):
    default_dtype(torch.float64)
    assert calibrate(simulations=20).ranks["mu"].shape == (20, 2)
    assert calibrate(lambda data, seed: {"mu": conjugate(data, seed)["mu"].float()}, simulations=20).num_samples == 99


# Uniformity


@pytest.mark.parametrize("draws", [7, 99, 100])
def test_pvalues_of_uniform_ranks_are_uniform(draws):
    ranks = torch.randint(draws + 1, (200, 2000), device="cpu")
    for pvalues in (chi_square(ranks, draws), ecdf_pvalues(ranks, draws)):
        for level in (0.05, 0.2, 0.5):
            assert float((pvalues <= level).double().mean()) == pytest.approx(level, abs=0.035 + 0.05 * (draws == 7))


def test_chi_square_by_hand():
    ranks = torch.tensor([0] * 30 + [1] * 20 + [2] * 10 + [3] * 20, device="cpu")[:, None]
    # Expected 20 each: (100 + 0 + 100 + 0) / 20 = 10 with 3 degrees of freedom.
    x = 10.0
    expected = math.erfc(math.sqrt(x / 2)) + math.sqrt(2 * x / math.pi) * math.exp(-x / 2)
    assert float(chi_square(ranks, 3)[0]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "draws"), [(50, 99), (300, 19)])
def test_band_holds_whole_curves_as_often_as_it_says(n, draws):
    place, low, high = band(n, draws, 0.1)
    ranks = torch.randint(draws + 1, (4000, n), generator=torch.Generator().manual_seed(7), device="cpu")
    last = (place * (draws + 1)).round() - 1
    share = (ranks[:, None, :] <= last[None, :, None]).sum(-1).double() / n
    inside = ((share >= low - 1e-9) & (share <= high + 1e-9)).all(1).double().mean()
    assert 0.89 <= float(inside) <= 0.94
    assert (low <= place).all() and (place <= high).all()


# The picture


def test_picture_is_the_distribution_functions():
    found = calibrate(lambda data, seed: conjugate(data, seed, width=0.5))
    ax = plots.ranks(found)
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["mu[0]", "mu[1]"]
    for k, line in enumerate(lines):
        x = line.get_xdata()
        share = (found.ranks["mu"][:, k].cpu().numpy()[None] < np.round(x * 100)[:, None]).mean(1)
        np.testing.assert_allclose(line.get_ydata(), share - x, atol=1e-12)
    place, low, high = (part.cpu().numpy() for part in found.bands())
    assert (lines[0].get_ydata() > high - place).any() and (lines[0].get_ydata() < low - place).any()
    ax = plots.ranks(found, kind="histogram", sites=["mu"])
    (heights,) = [patch.get_data().values for patch in ax.patches if patch.get_label() == "mu[0]"]
    np.testing.assert_array_equal(heights, torch.histc(found.ranks["mu"][:, 0].float(), 20, 0, 100).cpu().numpy())


def test_picture_is_drawn_into_given_axes_and_says_what_does_not_fit():
    from matplotlib import pyplot as plt

    found = calibrate(simulations=20)
    _, ax = plt.subplots()
    assert plots.ranks(found, ax) is ax
    refuses(ValueError, r"sites among \['mu'\], got \['nu'\]", plots.ranks, found, sites="nu")
    refuses(ValueError, "'ecdf' or 'histogram'", plots.ranks, found, kind="bars")
    refuses(TypeError, "got dict", plots.ranks, {})
    many = Calibration({"z": torch.randint(20, (30, 40), device="cpu")}, 19)
    for kind in ("ecdf", "histogram"):
        assert plots.ranks(many, kind=kind).get_legend() is None
    few, one = (Calibration({"z": torch.randint(20, (30, size), device="cpu")}, 19) for size in (3, 1))
    legend = plots.ranks(few).get_legend()
    assert [text.get_text() for text in legend.get_texts()] == few.names
    assert (
        plots.ranks(one).get_legend() is None
        and plots.ranks(one).get_xlabel() == f"rank of {one.names[0]}, as a fraction"
    )
    plt.close("all")
