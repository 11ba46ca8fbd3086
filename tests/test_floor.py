"""Fits start as the Gaussian of the data, end no worse on held-out rows, and average folds where rows are few."""

import copy
import io

import pyro.distributions
import pytest
import torch
from asserts import refuses
from cases import shake
from torch.distributions import ExpTransform
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows.distributions import MixedHead, MixtureHead
from pyro_flows.infer import standardized
from pyro_flows.infer.density.gaussian import LARGEST_SAMPLE, better, can_start, fit_gaussian, start_as_gaussian
from pyro_flows.infer.density.prepare import Thinned
from pyro_flows.transforms import Coloring

pytestmark = pytest.mark.filterwarnings("ignore:fit_density")

BUILDERS = {
    "maf": pf.maf,
    "iaf": pf.iaf,
    "nsf": pf.nsf,
    "autoregressive": lambda dim, **o: pf.nsf(dim, autoregressive=True, **o),
    "realnvp": pf.realnvp,
    "nice": pf.nice,
    "cnf": pf.cnf,
    "mixed": lambda dim, **o: pf.Chain([*pf.maf(dim, **o), pf.LULinear(dim, permutation="random"), *pf.nsf(dim, **o)]),
}


def correlated(rows, dim=3, seed=0, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9), dtype=torch.double)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.double) @ mixing
    return (100 + 5 * x).to(dtype)


def small(dim=3, **options):
    torch.manual_seed(0)
    return pf.maf(dim, num_layers=2, hidden_dims=(16,), **options)


def fit(flow, data, *args, **options):
    return pf.fit_density(flow, data, *args, **{"progress": False, "max_epochs": 3, **options})


# The start


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_starts_as_the_gaussian(name, context_dim):
    torch.manual_seed(0)
    x = correlated(300, 3 + context_dim)
    value, context = x[:, :3], x[:, 3:] if context_dim else None
    flow = pf.Flow(BUILDERS[name](3, context_dim=context_dim)).double()
    units = [value.mean(0), value.std(0)] + ([] if context is None else [context.mean(0), context.std(0)])
    density = standardized(flow, *units)
    start_as_gaussian(density, value, context)
    expected = fit_gaussian(value, context)
    fresh = correlated(50, 3 + context_dim, seed=1)
    given = () if context is None else (fresh[:, 3:],)
    torch.testing.assert_close(
        density.log_prob(fresh[:, :3], *given), expected.log_prob(fresh[:, :3], *given), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_a_fit_that_learns_nothing_is_the_gaussian_of_its_training_rows(dtype):
    x = correlated(200, dtype=dtype)
    found = fit(small().to(dtype), x, validation_fraction=0, lr=1e-12, max_epochs=1)
    expected = fit_gaussian(x.double())
    torch.testing.assert_close(found.log_prob(x).double(), expected.log_prob(x.double()), rtol=1e-3, atol=1e-3)
    assert isinstance(found.distribution.chain[0], Coloring) and isinstance(
        found.distribution.chain[-1], pf.Standardization
    )


def test_constrained_data_start_as_the_gaussian_before_the_constraint():
    x = correlated(200) / 100
    chain = pf.Chain([*small().double(), ExpTransform()])
    found = fit(chain, x.exp(), validation_fraction=0, lr=1e-12, max_epochs=1)
    expected = fit_gaussian(x).log_prob(x) - x.sum(-1)
    torch.testing.assert_close(found.log_prob(x.exp()), expected, rtol=1e-4, atol=1e-3)


def test_a_loader_starts_as_the_gaussian_of_rows_from_all_of_it():
    x = correlated(400)
    x = x[x[:, 0].argsort()]  # the first rows are not like the others
    loader = DataLoader(TensorDataset(x), batch_size=64)
    found = fit(small().double(), loader, lr=1e-12, max_epochs=1)
    torch.testing.assert_close(found.log_prob(x), fit_gaussian(x).log_prob(x), rtol=1e-3, atol=1e-3)


def test_thinned_rows_are_evenly_spaced():
    thinned, rows = Thinned(), torch.arange(3.5 * LARGEST_SAMPLE)
    for piece in rows.split(999):
        thinned.add(piece, -piece)
    value, context = thinned.of_all()
    assert torch.equal(value, -context) and LARGEST_SAMPLE / 2 < len(value) <= LARGEST_SAMPLE
    assert set(value.diff().tolist()) == {float(thinned.stride)}


@pytest.mark.full
def test_a_trained_chain_keeps_what_it_has_learned():
    torch.manual_seed(0)
    x = torch.randn(600, 3)
    x[:, 1] += x[:, 0] ** 2
    first = fit(small(), x[:500], x[500:], max_epochs=30, lr=1e-2)
    second = fit(first.flow, x[:500], x[500:], max_epochs=1, lr=1e-12)
    assert second.validation > first.validation - 0.05
    shaken = fit(shake(small(), 0.3), x[:500], x[500:], max_epochs=1, lr=1e-12)
    assert shaken.distribution.chain[0].factor.diagonal().ne(1).any()


@pytest.mark.parametrize(
    "flow",
    [
        lambda: pf.Flow(small(), pyro.distributions.Laplace(torch.zeros(3), 1.0).to_event(1)),
        lambda: pf.Flow(pf.Chain([*small(), pf.ActNorm(3)])),
        lambda: pf.ncsf(3),
    ],
)
def test_other_models_start_as_they_are(flow):
    """A coloring, where the structure has one, stays the identity."""
    x = correlated(60, dtype=torch.float) / 50
    found = fit(flow(), x, max_epochs=1)
    for part in found.distribution.modules():
        assert not isinstance(part, Coloring) or torch.equal(part.factor, torch.eye(3))


def mixture(seed, **options):
    torch.manual_seed(seed)
    return pf.GaussianMixture(3, 2, **options)


@pytest.mark.parametrize(
    "base",
    [
        lambda: mixture(2),
        lambda: shake(mixture(1, full_covariance=True), 0.2, seed=1),
        lambda: pf.StudentT(3),
    ],
    ids=["mixture", "full-covariance", "t"],
)
def test_other_bases_start_with_the_covariance_of_the_rows(base):
    x = correlated(400)
    flow = pf.Flow(small(), base()).double()
    density = standardized(flow, x.mean(0), x.std(0))
    start_as_gaussian(density, x, None)
    drawn = density.sample((40_000,))
    torch.testing.assert_close(drawn.mean(0), x.mean(0), atol=0.3, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), x.T.cov(), atol=8.0, rtol=0.1)
    if isinstance(flow.base, pf.StudentT):  # a mixture with its components far apart is no Gaussian
        assert (density.log_prob(x) - fit_gaussian(x).log_prob(x)).mean() > -0.5


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_made_of_normals_starts_as_the_gaussian_in_any_order(dtype, weighted):
    x = correlated(200, 4, dtype=dtype) / 10
    weight = torch.linspace(0.2, 3.0, 200).to(dtype) if weighted else None
    made = pf.MADE(4, "normal", order=[2, 0, 3, 1], hidden_dims=(8,)).to(dtype)
    start_as_gaussian(made, x, None, weight)
    want = fit_gaussian(x.double(), weight=weight).log_prob(x.double())
    torch.testing.assert_close(made.log_prob(x).double(), want, atol=1e-9 if dtype == torch.double else 2e-3, rtol=1e-5)
    learned = shake(pf.MADE(4, "normal", hidden_dims=(8,)).to(dtype), 0.1)
    before = learned.log_prob(x)
    start_as_gaussian(learned, x, None)  # which is not fresh
    assert not can_start(learned, x, None) and torch.equal(learned.log_prob(x), before)


def test_other_autoregressive_models_start_with_the_columns_of_the_rows():
    torch.manual_seed(0)
    x, bits = correlated(300) / 10, (torch.rand(300, 2) < torch.tensor([0.2, 0.9])).double()
    rows = torch.stack([bits[:, 0], x[:, 0], x[:, 1], bits[:, 1], x[:, 2]], 1)
    head = MixedHead([("bernoulli", [0, 3]), ("normal", [1, 4]), (MixtureHead(1), [2])])
    made = pf.MADE(5, head, hidden_dims=(8,)).double()
    start_as_gaussian(made, rows, None)
    share = bits.mean(0)
    want = fit_gaussian(x).log_prob(x) + (bits * share.log() + (1 - bits) * (1 - share).log()).sum(1)
    torch.testing.assert_close(made.log_prob(rows), want, atol=0.05, rtol=0)  # frequencies are smoothed
    series = 3 + torch.randn(50, 2, 5).double().cumsum(-1)
    conv = pf.ConvMADE((2, 5), "normal", hidden_channels=8).double()
    start_as_gaussian(conv, series, None)
    want = torch.distributions.Normal(series.mean(0), series.std(0, correction=0)).log_prob(series).sum((1, 2))
    torch.testing.assert_close(conv.log_prob(series), want, atol=1e-9, rtol=0)


def test_a_standardized_made_starts_as_the_gaussian_and_ends_no_worse():
    x = correlated(60, 5, dtype=torch.float)
    held_out = correlated(300, 5, seed=1, dtype=torch.float)
    made = pf.MADE(5, "normal", hidden_dims=(16,))
    found = fit(made, x, held_out, standardize=True, max_epochs=4, lr=0.03)
    want = fit_gaussian(x.double()).log_prob(held_out.double()).mean()
    assert found.best_epoch == 0 and found.validation == pytest.approx(want.item(), abs=1e-3)
    whole = fit_gaussian(torch.cat([x, held_out]).double()).log_prob(held_out.double())  # what it leaves behind
    torch.testing.assert_close(found.log_prob(held_out).double(), whole, atol=1e-2, rtol=1e-3)


@pytest.mark.full
def test_folds_of_a_made_return_to_the_gaussian(tmp_path):
    x, fresh = (correlated(rows, 5, dtype=torch.float) for rows in (80, 500))
    want = fit_gaussian(x.double()).log_prob(fresh.double())
    found = pf.fit_density(
        pf.MADE(5, "normal", hidden_dims=(16,)), x, progress=False, patience=3, standardize=True, lr=0.01
    )
    assert {each.best_epoch for each in found.members} == {0} and len(found.distribution) == 6
    torch.testing.assert_close(found.log_prob(fresh).double(), want, atol=1e-2, rtol=1e-3)
    found.save(tmp_path / "fit.pt")
    again = pf.load_density(tmp_path / "fit.pt")
    assert torch.equal(again.log_prob(fresh), found.log_prob(fresh))


# The end


def test_the_gaussian_stays_where_nothing_is_better():
    x = correlated(60, 6, dtype=torch.float)
    held_out = correlated(400, 6, seed=1, dtype=torch.float)
    found = fit(pf.nsf(6, num_layers=1), x, held_out, max_epochs=8, lr=0.03)
    assert found.best_epoch == 0 and "epoch 0" in repr(found)
    assert found.validation > max(found.history["validation"])
    expected = fit_gaussian(x.double()).log_prob(held_out.double()).mean()
    assert found.validation == pytest.approx(expected.item(), abs=1e-3)
    # What the fit leaves behind is the Gaussian of all rows.
    fresh, whole = correlated(100, 6, seed=2, dtype=torch.float), torch.cat([x, held_out]).double()
    want = fit_gaussian(whole).log_prob(fresh.double())
    torch.testing.assert_close(found.log_prob(fresh).double(), want, atol=1e-2, rtol=1e-3)


def test_without_held_out_rows_training_decides():
    found = fit(small(), correlated(60, dtype=torch.float), validation_fraction=0)
    assert found.best_epoch > 0 and found.validation != found.validation


@pytest.mark.parametrize("context_dim", [0, 2])
def test_saved_loaded_and_resumed(context_dim, tmp_path):
    x = correlated(200, 3 + context_dim, dtype=torch.float)
    options = {"context": x[:, 3:]} if context_dim else {}
    path = tmp_path / "fit.pt"
    whole = fit(small(context_dim=context_dim), x[:, :3], max_epochs=4, **options)
    fit(small(context_dim=context_dim), x[:, :3], max_epochs=2, checkpoint=path, **options)
    found = fit(small(context_dim=context_dim), x[:, :3], max_epochs=4, checkpoint=path, **options)
    given = (x[:, 3:],) if context_dim else ()
    assert torch.equal(found.log_prob(x[:, :3], *given), whole.log_prob(x[:, :3], *given))
    file = io.BytesIO()
    torch.save(found.distribution.state_dict(), file)
    file.seek(0)
    loaded = standardized(pf.Flow(small(context_dim=context_dim)))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.log_prob(x[:, :3], *given), found.distribution.log_prob(x[:, :3], *given))


def test_scores_number_by_number_see_the_coloring():
    """One triangular order runs through the coloring and a layer of the same order."""
    x = correlated(200)
    torch.manual_seed(0)
    found = fit(pf.maf(3, num_layers=1, hidden_dims=(8,)).double(), x, max_epochs=2)
    scores = pf.infer.pixel_scores(found.distribution, x)
    torch.testing.assert_close(-scores.sum(-1), found.log_prob(x))


# Folds by default


@pytest.mark.full
def test_folds_are_kept_where_they_are_better():
    torch.manual_seed(0)
    curved = torch.randn(400, 3)
    curved[:, 1] += 2 * curved[:, 0] ** 2
    found = pf.fit_density(small(), curved[:200], progress=False, patience=8, batch_size=64, lr=0.02)
    *flows, gaussian = found.distribution.members
    assert len(flows) == 5 and all(each.best_epoch for each in found.members)
    reference = fit_gaussian(curved[:200].double()).log_prob(curved[200:].double())
    torch.testing.assert_close(gaussian.log_prob(curved[200:]).double(), reference, atol=1e-2, rtol=1e-3)
    assert (found.log_prob(curved[200:]) - reference).mean() > 0.3


@pytest.mark.full
def test_folds_return_to_the_gaussian_unless_they_are_better_by_more_than_chance():
    x, fresh = (correlated(rows, dtype=torch.float) for rows in (80, 500))
    want = fit_gaussian(x.double()).log_prob(fresh.double())
    found = pf.fit_density(small(), x, progress=False, patience=4, batch_size=64, lr=0.01)
    assert len(found.members) == 5 and {each.best_epoch for each in found.members} == {0}
    torch.testing.assert_close(found.log_prob(fresh).double(), want, atol=1e-2, rtol=1e-3)
    assert found.validation < fit_gaussian(x.double()).log_prob(x.double()).mean()  # of rows held out


def test_better_by_more_than_chance():
    torch.manual_seed(0)
    assert better(torch.randn(400) + 0.3) and not better(torch.randn(400)) and not better(torch.zeros(50))
    assert not better(torch.cat([torch.randn(99) * 0.1, torch.tensor([500.0])]))


def test_few_rows_are_fitted_in_folds_by_default():
    x = correlated(60, dtype=torch.float)
    flow = pf.Flow(small())
    found = pf.fit_density(flow, x, progress=False, patience=2, batch_size=48, lr=0.03)
    assert found.flow is flow and len(found.members) == 5 and "5 members" in repr(found)
    assert isinstance(found.distribution, pf.distributions.Ensemble)
    assert found.members[0].flow is flow and found.history is found.members[0].history
    torch.testing.assert_close(found.log_prob(x), found.distribution.log_prob(x).detach())
    alone = pf.fit_density(copy.deepcopy(flow), x, progress=False, patience=2, batch_size=48, folds=1)
    assert not alone.members and isinstance(alone.distribution, pf.Flow)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2},
        {"max_epochs": 1},
        {"validation_fraction": 0.2, "seconds": 0.05},
        {"validation": correlated(20, dtype=torch.float), "seconds": 0.05},
        {"seconds": 0.05},
        {"checkpoint": "fit.pt", "seconds": 0.05},
    ],
)
def test_what_says_otherwise(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = pf.fit_density(small(), correlated(60, dtype=torch.float), progress=False, **options)
    assert not found.members and isinstance(found.distribution, pf.Flow)


@pytest.mark.full
def test_few_rows_with_contexts_and_of_a_made():
    x = correlated(60, 4, dtype=torch.float)
    value, context = x[:, :3].numpy(), x[:, 3:].numpy()
    options = {"progress": False, "patience": 2, "lr": 0.02}
    found = pf.fit_density(small(context_dim=1), value, context=context, **options)
    assert len(found.members) == 5 and found.log_prob(value, context).isfinite().all()
    assert found.sample((2,), context[:4]).shape == (2, 4, 3)
    made = pf.fit_density(pf.MADE(4, "bernoulli", hidden_dims=(8,)), torch.randint(2, (60, 4)), **options)
    assert len(made.members) == 5 and len(made.distribution) == 6  # with the independent columns of all rows
    refuses(
        ValueError,
        "without validation",
        pf.fit_density,
        small(context_dim=1),
        value,
        None,
        context,
        validation_context=context,
    )


@pytest.mark.full
def test_warnings_of_folds_come_once_and_from_the_call():
    x = (correlated(200, dtype=torch.float) / 5).round()
    with pytest.warns(UserWarning, match="discrete") as told:
        pf.fit_density(small(), x, progress=False, patience=1, lr=1e-9, seconds=20)
    assert len(told) == 1 and told[0].filename == __file__


def test_rows_keep_their_numbers_and_digits_in_folds():
    x = correlated(60, dtype=torch.float).abs()
    x[41] = -1
    chain = pf.Chain([*small(), ExpTransform()])
    refuses(ValueError, r"1 of 60 rows of data \(row 41\)", pf.fit_density, chain, x, progress=False)
    refuses(TypeError, "got dict", pf.fit_density, small(), {"a": 1}, progress=False)
    close = correlated(60)
    close[:, 0] = 1e9 + torch.rand(60, dtype=torch.double)
    with pytest.warns(UserWarning, match="column 0") as told, pytest.raises(ValueError, match="constant"):
        pf.fit_density(small(), close, progress=False)
    assert told[0].filename == __file__


def test_an_error_in_the_first_fold_carries_its_fit(monkeypatch):
    from pyro_flows.infer.density.loop import DensityTraining

    close, calls = DensityTraining._close_epoch, []

    def interrupt(self, bar):
        close(self, bar)
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(DensityTraining, "_close_epoch", interrupt)
    flow = pf.Flow(small())
    with pytest.raises(KeyboardInterrupt) as stop:
        pf.fit_density(flow, correlated(60, dtype=torch.float), progress=False)
    assert stop.value.fit.flow is flow and not stop.value.fit.members


def test_folds_of_nothing_are_refused():
    refuses(ValueError, "folds", fit, small(), correlated(60, dtype=torch.float), folds=0)
