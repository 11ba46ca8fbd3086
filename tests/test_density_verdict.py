"""Verdicts on densities: exact ones pass at the level, and each kind of misfit is found, named and numbered."""

import copy
import math
import pickle
import signal
import time
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import shake
from torch import nn
from torch.distributions import ExpTransform, Normal
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows.distributions import CategoricalHead, Ensemble, MixedHead
from pyro_flows.infer.density.judging import judge_rows
from pyro_flows.infer.diagnostics.densities import LABELS, MEANING, DensityChecks, judge_density, tail_chance
from pyro_flows.infer.diagnostics.neighborhoods import local_pvalues, neighborhoods
from pyro_flows.infer.diagnostics.two_sample import TwoSample, classify, normal_scores

pytestmark = pytest.mark.filterwarnings("ignore:fit_density")
fit = partial(pf.fit_density, progress=False)


def standard(columns=2, context_dim=0, **options):
    """A standard normal, which every new flow is."""
    return pf.Flow(pf.maf(columns, num_layers=1, hidden_dims=(4,), context_dim=context_dim), **options).eval()


# The classifier


def test_normal_scores_share_ties_and_ignore_monotone_maps():
    x = torch.tensor([[1.0], [2.0], [2.0], [5.0]])
    expected = torch.special.ndtri(torch.tensor([1, 4, 4, 7]).double() / 8).float()
    torch.testing.assert_close(normal_scores(x)[:, 0], expected)
    assert torch.equal(normal_scores(x.exp()), normal_scores(x))
    assert normal_scores(torch.tensor([[-math.inf], [0.0]])).isfinite().all()


@pytest.mark.parametrize("discrete", [False, True])
def test_classifier_holds_its_level(discrete):
    """Ties must not favor the rows, which come first."""
    torch.manual_seed(0)
    values = torch.randn(5, 60, 40, 2)
    if discrete:
        values = (values > 0.5).float()
    found = torch.tensor([classify(each[0], each[1:]).pvalue for each in values.transpose(0, 1).transpose(1, 2)[:60]])
    assert abs(found.mean() - 0.5) < 4 / math.sqrt(12 * 60)
    assert (found <= 0.1).double().mean() < 0.1 + 3.5 * math.sqrt(0.09 / 60)


@pytest.mark.parametrize("change", ["shift", "spread", "correlation"])
def test_classifier_finds_quadratic_differences(change):
    torch.manual_seed(0)
    x, draws = torch.randn(300, 3), torch.randn(4, 300, 3)
    same = classify(x, draws)
    if change == "shift":
        x = x + torch.tensor([0.5, 0.0, 0.0])
    elif change == "spread":
        x = x * torch.tensor([1.0, 1.5, 1.0])
    else:
        x = torch.stack([x[:, 0], 0.5 * x[:, 0] + 0.75**0.5 * x[:, 1], x[:, 2]], 1)
    found = classify(x, draws)
    assert found.pvalue == 1 / 500 < 0.05 < same.pvalue and found.auc > 0.54 and abs(same.auc - 0.5) < 0.08
    assert classify(x.exp(), draws.exp()) == found == classify(x, draws)


def test_classifier_sees_a_dependence_on_the_context_and_not_the_context():
    torch.manual_seed(0)
    context = 3 + torch.randn(300, 1).exp()
    x, draws = torch.randn(300, 1), torch.randn(4, 300, 1)

    def joined(value):
        return torch.cat([value, context.expand(*value.shape)], -1)

    assert classify(joined(x), joined(draws)).pvalue > 0.05
    assert classify(joined(x + 0.3 * (context - 4)), joined(draws)).pvalue < 0.01
    alone = context.expand(4, 300, 1)
    assert classify(context, alone) == TwoSample(1.0, 0.5)


@pytest.mark.parametrize("columns", [30, 250])
def test_classifier_reduces_many_columns(columns):
    torch.manual_seed(0)
    random = torch.get_rng_state()
    x, draws = torch.randn(100, columns), torch.randn(2, 100, columns)
    common = torch.randn(100, 1)
    assert classify(x, draws).pvalue > 0.02
    assert classify(x + common, draws).pvalue < 0.01
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), random)


# Neighborhoods


def test_neighborhoods_halve_rows_and_keep_values_together():
    torch.manual_seed(0)
    along = torch.linspace(0, 1, 400).exp().unsqueeze(1)
    cells = neighborhoods(along)
    assert cells.bincount().tolist() == [25] * 16 and (cells.diff().abs() <= 15).all()
    assert all((cells[along[:, 0].argsort()] == k).nonzero().diff(dim=0).eq(1).all() for k in range(16))
    sides = (torch.rand(300, 1) < 0.2).float()
    assert sorted(neighborhoods(sides).bincount().tolist()) == sorted(sides[:, 0].long().bincount().tolist())
    assert neighborhoods(torch.zeros(200, 3)).max() == 0 and neighborhoods(torch.randn(49, 2)).max() == 0


def test_local_pvalues_are_of_standard_normals():
    torch.manual_seed(0)
    cells = torch.arange(400) % 8
    pvalues, normals = local_pvalues(torch.rand(400, 300), cells)
    assert normals.shape == (8, 300, 2)
    torch.testing.assert_close(normals.mean((0, 1)), torch.zeros(2).double(), atol=0.08, rtol=0)
    torch.testing.assert_close(normals.std((0, 1)), torch.ones(2).double(), atol=0.06, rtol=0)
    assert (pvalues < 0.05).double().mean() < 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / 300)
    places = torch.rand(400, 2)
    places[cells == 3, 1] = places[cells == 3, 1] ** 0.4
    pvalues, normals = local_pvalues(places, cells)
    assert pvalues[0] > 0.01 and pvalues[1] < 1e-3
    assert divmod(int(normals[:, 1].abs().argmax()), 2) == (3, 0) and normals[3, 1, 0] > 3


# The rule


def checks(rows=200, copies=20, **others):
    """Numbers of an exact density of two columns."""
    torch.manual_seed(1)
    scores, draws = torch.randn(rows).double(), torch.randn(copies, rows).double() - 0.5
    given = {
        "scores": scores.clamp(min=-2.0),
        "index": torch.arange(rows),
        "names": ["x[0]", "x[1]"],
        "rival_scores": scores - 1,
        "draws": draws,
        "ranks": torch.randint(copies + 1, (rows, 3)),
        "two_sample": TwoSample(0.4, 0.5),
    }
    if "training" in others:
        given["training_index"] = torch.arange(len(others["training"]))
    return DensityChecks(**{**given, **others})


def uneven(power, rows=200):
    torch.manual_seed(2)
    ranks = torch.randint(21, (rows, 3))
    ranks[:, 1] = (21 * torch.rand(rows) ** power).floor().long()
    return ranks


@pytest.mark.parametrize(
    ("label", "others"),
    [
        ("good", {}),
        ("good, few rows judged", {"rows": 60}),
        ("not judged", {"rows": 19}),
        ("not judged", {"draws": None, "ranks": None, "two_sample": None}),
        ("misfit", {"two_sample": TwoSample(0.002, 0.7)}),
        ("good, small differences", {"two_sample": TwoSample(0.002, 0.53)}),
        ("good", {"two_sample": TwoSample(0.02, 0.7)}),  # three more tests might have found that
        ("misfit", {"ranks": uneven(2.0)}),
        ("worse than a Gaussian", {"rival_scores": torch.full((200,), 2.0)}),
        ("worse than independent columns", {"rival_scores": torch.full((200,), 2.0), "rival": "independent columns"}),
        ("good", {"rival_scores": (torch.manual_seed(1), torch.randn(200).double().clamp(min=-2.0) + 0.005)[1]}),
        ("good, overfitted", {"training": torch.randn(500) + 1.0}),
        ("good", {"training": torch.randn(500) + 0.05}),
        ("repeated values", {"repeated": ("values that many rows share",)}),
        ("misfit", {"failures": 0.1}),
        ("good", {"failures": 0.001}),
        ("misfit", {"scores": torch.cat([torch.full((5,), -99.0), torch.zeros(195)])}),
    ],
)
def test_label(label, others):
    found = judge_density(checks(**others))
    assert found.label == label
    assert found.ok is (label in ("good", "good, small differences", "good, overfitted"))
    assert "Next: " in str(found) and " ".join(str(found).split()).startswith(f"{label}: {MEANING[label]}")


def test_labels_have_meanings():
    assert set(LABELS) == set(MEANING)


def test_training_rows_that_are_judged_make_no_good_verdict():
    assert judge_density(checks(), seen=True).label == "good, by training rows"


def test_numbers_against_direct_sums():
    given = checks(training=torch.randn(300).double())
    found = judge_density(given)
    assert found.numbers["score"] == pytest.approx(float(given.scores.mean()))
    difference = given.scores - given.rival_scores
    assert found.numbers["gain"] == pytest.approx(float(difference.mean()))
    assert found.numbers["gain_error"] == pytest.approx(float(difference.std()) / math.sqrt(200))
    gap = float(given.training.mean() - given.scores.mean())
    error = math.sqrt(float(given.training.var()) / 300 + float(given.scores.var()) / 200)
    assert found.numbers["gap"] == pytest.approx(gap) and found.numbers["gap_error"] == pytest.approx(error)
    assert found.numbers["overfitting"] == pytest.approx(1 - float(Normal(0.0, 1.0).cdf(torch.tensor(gap / error))))
    assert found.numbers["pvalue"] == min(1.0, 4 * min(found.pvalues.values()))
    assert set(found.pvalues) == {"classifier", "columns", "log-density", "rows"}


def test_rows_below_all_draws_are_counted_exactly():
    """The lowest of rows and draws are all rows: a hypergeometric probability.  Ties are not continued."""
    scores = torch.cat([torch.full((3,), -2.0), torch.zeros(97)]).double()
    given = {"ranks": torch.randint(11, (100, 3)), "draws": -torch.ones(10, 100).double()}
    found = judge_density(checks(rows=100, copies=10, scores=scores, **given))
    assert found.pvalues["rows"] == pytest.approx(2 * math.comb(100, 3) / math.comb(1100, 3))
    assert found.unexplained == []


def test_one_row_far_below_the_draws_is_named():
    scores = torch.randn(200).double() - 0.5
    scores[[7, 9]] = -40.0
    found = judge_density(checks(scores=scores, index=torch.arange(100, 300), training=scores[:50]))
    assert found.unexplained == [107, 109] and "2 of the judged rows (107, 109)" in found.text
    assert found.unexplained_training == [7, 9] and "StudentT" in found.text and found.pvalues["rows"] < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("df", [2.0, 200.0])
def test_tails_of_scores_are_continued(df):
    """Against the distribution function, far beyond 20,000 draws, where heavy and light tails differ most."""
    torch.manual_seed(1)
    heavy = torch.distributions.StudentT(torch.tensor(df).double())
    draws, far = heavy.sample((20_000,)), torch.tensor([-2.0, -5.0, -8.0, -50.0]).double()
    scipy = pytest.importorskip("scipy.stats")
    exact = torch.from_numpy(scipy.t.cdf(far.numpy(), df))
    found = tail_chance(far, draws)
    assert df > 100 or ((found / exact).log().abs() < 0.3 + 0.2 * exact.log().abs()).all()
    assert (found >= 0.3 * exact).all() and found[0] == pytest.approx(float(exact[0]), rel=0.1)
    assert found[3] < (1e-3 if df < 100 else 1e-12) and tail_chance(torch.tensor([-math.inf]), draws) == 0


def test_densities_of_zero_are_unexplained():
    scores = torch.zeros(200)
    scores[7] = -math.inf
    found = judge_density(checks(scores=scores))
    assert found.unexplained == [7] and "density zero" in found.text and found.label == "worse than a Gaussian"


# Fits


def test_a_verdict_is_computed_once_and_leaves_no_trace():
    torch.manual_seed(0)
    found = fit(standard(), torch.randn(600, 2), steps=10)
    random = torch.get_rng_state()
    found.flow.train()
    assert "verdict" not in repr(found)
    first = found.verdict
    assert found.verdict is first and f"verdict: {first.label}" in repr(found) and str(first) in str(found)
    assert found.flow.training and torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in found.flow.parameters())
    assert first.numbers["rows"] == 60 and first.numbers["copies"] == 80
    assert "60 held-out rows" in first.text


def test_the_same_fit_has_the_same_verdict():
    torch.manual_seed(0)
    data = torch.randn(400, 2)
    flow = standard()
    first, second = fit(copy.deepcopy(flow), data, steps=5), fit(flow, data, steps=5)
    second = pickle.loads(pickle.dumps(second))
    torch.manual_seed(6)
    assert str(first.verdict) == str(second.verdict) == str(copy.deepcopy(first).verdict)
    assert str(first.judge(data)) == str(second.judge(data))


def test_rows_that_the_density_cannot_explain_are_numbered_as_given():
    torch.manual_seed(0)
    data = torch.randn(900, 2)
    data[[11, 333, 500, 707]] = 40.0
    found = fit(standard(), data, steps=20, seed=1, validation_fraction=0.5)
    held_out, trained = found.kept[0].fresh, found.kept[0].trained
    assert torch.equal(data[held_out.index], held_out.value) and torch.equal(data[trained.index], trained.value)
    assert {*held_out.index.tolist(), *trained.index.tolist()} == set(range(900))
    verdict = found.verdict
    assert {*verdict.unexplained, *verdict.unexplained_training} == {11, 333, 500, 707}
    assert found.judge(data[5:30]).unexplained == [6]


@pytest.mark.parametrize("context_dim", [0, 1])
def test_members_are_judged_on_rows_that_they_have_not_seen(context_dim):
    torch.manual_seed(0)
    data, context = torch.randn(120, 2), torch.randn(120, 1) if context_dim else None
    data[17] = 50.0
    found = fit(standard(context_dim=context_dim), data, context=context, folds=3, steps=10)
    assert sorted(torch.cat([part.fresh.index for part in found.kept]).tolist()) == list(range(120))
    for part in found.kept:
        assert torch.equal(part.fresh.value, data[part.fresh.index])
        assert torch.equal(part.trained.value, data[part.trained.index])
        assert not set(part.fresh.index.tolist()) & set(part.trained.index.tolist())
    verdict = found.verdict
    assert verdict.numbers["rows"] == 120 and verdict.unexplained == [17]
    assert verdict.numbers["score"] == pytest.approx(found.validation, abs=1e-4)
    assert "by a member that did not see it" in verdict.text


def test_a_fit_that_ends_as_the_gaussian_is_judged_by_rows_that_it_has_not_seen():
    torch.manual_seed(0)
    data = torch.randn(300, 2)
    found = fit(standard(), data[:200], data[200:], steps=1, lr=1e-8)
    assert found.best_epoch == 0 and found.kept[0].density is not found.distribution
    assert found.verdict.numbers["score"] == pytest.approx(found.validation, abs=1e-4)
    assert abs(found.verdict.numbers["gain"]) < 1e-2 and "by the Gaussian of the others" in found.verdict.text


@pytest.mark.full
def test_verdicts_say_which_rows_they_rest_on():
    torch.manual_seed(0)
    data = torch.randn(300, 2)
    assert fit(standard(), data, steps=5, validation_fraction=0).verdict.label == "good, by training rows"
    loader = DataLoader(TensorDataset(data), batch_size=50)
    found = fit(standard(), loader, data[:150], max_epochs=2)
    assert found.verdict.numbers["rows"] == 150 and torch.equal(found.kept[0].trained.value.sort(0)[0], data.sort(0)[0])
    seen = fit(standard(), loader, max_epochs=2).verdict
    assert seen.label == "good, by training rows" and "gap" not in seen.numbers


def test_large_data_are_not_kept():
    data = torch.randn(30_000, 3)
    found = fit(standard(3), data, steps=1)
    kept = found.kept[0]
    assert (len(kept.fresh), len(kept.trained)) == (2000, 10_000)
    assert kept.trained.value.untyped_storage().nbytes() == 10_000 * 3 * 4


# Any density


def test_exact_densities_pass_with_a_context_and_in_float64(default_dtype):
    default_dtype(torch.float64)
    torch.manual_seed(0)
    flow = shake(standard(3, 2).float(), 0.3)
    context = torch.randn(1200, 2, dtype=torch.float32)
    with torch.no_grad():
        rows = flow.sample((), context)
    found = judge_rows(flow, rows[:400], context[:400], training=rows[400:], training_context=context[400:])
    assert found.label == "good" and "16 neighborhoods" in found.text and found.numbers["pvalue"] > 0.05
    assert judge_rows(flow.double(), rows[:400], context[:400]).label == "good"


def test_a_wrong_dependence_on_the_context_is_placed():
    torch.manual_seed(0)
    context = torch.randn(800, 1)
    rows = torch.randn(800, 2)
    rows[:, 1] += torch.where(context[:, 0] > 0.5, 1.0, 0.0)
    found = judge_rows(standard(2, 1), rows, context)
    assert found.label == "misfit" and "x[1] worst near (" in found.text and "draws lie too low" in found.text
    place = float(found.text.split("worst near (")[1].split(")")[0])
    assert place > 0.5


@pytest.mark.full
def test_the_rival_is_a_gaussian_behind_the_support():
    """Here it is the exact density, so the gain is exactly that of the flow over its log-normal."""
    torch.manual_seed(0)
    rows = torch.randn(900, 1).mul(0.5).add(1.0).exp()
    flow = pf.Flow(pf.Chain([*standard(1).chain, ExpTransform()])).eval()
    found = judge_rows(flow, rows[:300], training=rows[300:])
    logs = rows[300:].double().log()
    expected = dist.LogNormal(logs.mean(), logs.std()).log_prob(rows[:300, 0].double())
    torch.testing.assert_close(found.checks.rival_scores, expected, atol=1e-4, rtol=1e-4)
    assert found.label == "worse than a Gaussian"


@pytest.mark.full
def test_mixed_columns_have_frequencies_for_a_rival():
    torch.manual_seed(0)
    made = shake(pf.MADE(3, MixedHead([("bernoulli", [0]), (CategoricalHead(3), [1]), ("normal", [2])])), 0.3).eval()
    rows = made.sample((800,))
    found = judge_rows(made, rows[:300], training=rows[300:])
    assert found.label == "good" and found.checks.rival == "a Gaussian beside independent discrete columns"
    known, own = rows[300:], rows[:300].long()
    expected = Normal(known[:, 2].mean(), known[:, 2].std()).log_prob(rows[:300, 2])
    for k, classes in ((0, 2), (1, 3)):
        counts = known[:, k].long().bincount(minlength=classes)
        expected = expected + ((counts[own[:, k]] + 0.5) / (500 + 0.5 * classes)).log()
    torch.testing.assert_close(found.checks.rival_scores, expected.double(), atol=1e-3, rtol=1e-3)
    assert judge_rows(made, torch.cat([rows[:300, :2], rows[:300, 2:] + 1.0], 1)).label == "misfit"


def test_repeated_values_make_scores_meaningless():
    torch.manual_seed(0)
    rows = torch.randn(600, 2)
    rows[rows[:, 1] < -1, 1] = -1.0
    assert judge_rows(standard(), rows).label == "repeated values"
    binary = (torch.rand(600, 4) < 0.5).float()
    assert judge_rows(pf.MADE(4, "bernoulli").eval(), binary).label != "repeated values"


@pytest.mark.full
def test_many_folds_repeat_no_values():
    torch.manual_seed(0)
    found = fit(standard(), torch.randn(100, 2), folds=25, steps=1)
    assert found.verdict.label != "repeated values" and not found.verdict.checks.repeated


@pytest.mark.full
def test_what_is_left_out_is_said():
    torch.manual_seed(0)
    wide = judge_rows(standard(300), torch.randn(120, 300), training=torch.randn(120, 300))
    assert "independent normals" in wide.text and wide.numbers["gain"] > 0 and wide.ok
    rows = torch.randn(400, 2).round()
    told = judge_rows(Scores(lambda shape: torch.randn(*shape, 2)), rows[:200], training=rows[200:])
    assert "no simple density to compare with, as values repeat" in told.text and "gain" not in told.numbers


class Scores(nn.Module):
    """A standard normal that only scores, unless it is given a way to draw."""

    def __init__(self, sample=None):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        if sample is not None:
            self.sample = sample

    def log_prob(self, value):
        return Normal(self.loc, 1.0).log_prob(value).sum(-1)


def test_modules_that_cannot_draw_are_not_judged():
    found = fit(Scores(), torch.randn(500, 2), steps=3)
    assert found.verdict.label == "not judged" and "no attribute 'sample'" in found.verdict.text
    assert "score" in found.verdict.numbers


def test_draws_that_are_not_finite_count():
    def sample(shape):
        drawn = torch.randn(*shape, 2)
        drawn[::4] = math.nan
        return drawn

    found = judge_rows(Scores(sample), torch.randn(300, 2))
    assert found.label == "misfit" and "25.00% of the draws are not finite" in found.text


@pytest.mark.full
def test_slow_draws_are_cut():
    def sample(shape, row):
        time.sleep(row * shape[0])
        return torch.randn(*shape, 2)

    found = judge_rows(Scores(partial(sample, row=1e-4)), torch.randn(1000, 2), seconds=0.5)
    assert 1 <= found.numbers["copies"] < 20 and "of 20" in found.text and found.numbers["rows"] == 1000
    slower = judge_rows(Scores(partial(sample, row=5e-4)), torch.randn(1000, 2), seconds=0.15)
    assert 20 <= slower.numbers["rows"] < 500 and "of 1,000 rows were judged" in slower.text


def test_interrupted_verdicts_leave_the_fit_whole():
    torch.manual_seed(0)
    module = Scores(lambda shape: torch.randn(*shape, 2))
    found = fit(module, torch.randn(500, 2), steps=3)
    draw, module.sample = module.sample, lambda shape: signal.raise_signal(signal.SIGINT)
    random = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        str(found)
    assert torch.equal(random, torch.get_rng_state()) and "verdict" not in repr(found)
    module.sample = draw
    assert found.verdict.numbers["rows"] == 50


def test_another_default_device_changes_nothing():
    torch.manual_seed(0)
    flow, rows, context = standard(2, 1), torch.randn(100, 2), torch.randn(100, 1)
    expected = str(judge_rows(flow, rows, context))
    with torch.device("meta"):
        assert str(judge_rows(flow, rows, context)) == expected


def test_rows_are_checked():
    found = fit(standard(), torch.randn(100, 2), steps=3)
    refuses(ValueError, "expected data of shape", found.judge, torch.randn(100, 3))
    refuses(ValueError, "NaN", found.judge, torch.full((50, 2), math.nan))
    inside = pf.Flow([standard().chain, ExpTransform()])
    refuses(ValueError, "outside of the flow's support", judge_rows, inside, -torch.ones(50, 2))


# Level and power


@pytest.mark.full
@pytest.mark.parametrize("kind", ["flow", "context", "discrete", "ensemble"])
def test_exact_densities_are_rejected_at_the_level(kind):
    rejected = 0
    for seed in range(60):
        torch.manual_seed(seed)
        if kind == "discrete":
            model = shake(pf.MADE(3, CategoricalHead(3), hidden_dims=(8,)), 0.5).eval()
        else:
            models = [shake(standard(2, int(kind == "context")), 0.4) for _ in range(1 + 2 * (kind == "ensemble"))]
            model = models[0] if kind != "ensemble" else Ensemble(models)
        context = torch.randn(150, 1) if kind == "context" else None
        rows = model.sample((150,)) if context is None else model.sample((), context)
        rejected += judge_rows(model, rows.detach(), context).numbers["pvalue"] < 0.05
    assert rejected <= 8  # at 5 %, more happen in one of 200 cases


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        lambda x: 1.3 * x,
        lambda x: x + torch.tensor([0.35, 0.0]),
        lambda x: torch.stack([x[:, 0], 0.4 * x[:, 0] + 0.84**0.5 * x[:, 1]], 1),
        lambda x: x / (torch.distributions.Chi2(3.0).sample((len(x), 1)) / 3).sqrt() / 3**0.5,
        lambda x: x + 4.0 * (torch.rand(len(x), 1) < 0.1),
    ],
    ids=["narrow", "shifted", "correlated", "tails", "mode"],
)
def test_misfits_are_found(change):
    found = 0
    for seed in range(10):
        torch.manual_seed(seed)
        found += judge_rows(standard(), change(torch.randn(400, 2))).numbers["pvalue"] < 0.05
    assert found >= 9
