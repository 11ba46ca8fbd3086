"""What the pictures hold: the numbers drawn, compared with numbers found another way."""

import inspect
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import shake
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.contour import QuadContourSet
from torch.distributions import ExpTransform

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.infer.density.judging import judge_rows
from pyro_flows.infer.diagnostics import importance, judge
from pyro_flows.infer.diagnostics.densities import judge_density
from pyro_flows.infer.guides.assessment import Assessment


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No setting of matplotlib, torch or NumPy changes, whatever is drawn; figures are closed afterwards."""
    matplotlib.use("Agg")
    before = dict(matplotlib.rcParams), np.random.get_state()[1].tolist(), torch.get_default_dtype()
    yield
    assert (dict(matplotlib.rcParams), np.random.get_state()[1].tolist(), torch.get_default_dtype()) == before
    plt.close("all")


def normal(*scales):
    return dist.Normal(torch.zeros(len(scales)), torch.tensor(scales)).to_event(1)


def flow_of(size, context_dim=0, dtype=torch.float32):
    return shake(pf.Flow(pf.realnvp(size, context_dim=context_dim, num_layers=2, hidden_dims=(8,))), 0.2).to(dtype)


def mesh(ax):
    (found,) = [part for part in ax.collections if isinstance(part, QuadMesh)]
    return found


def points(ax, index=0):
    found = [part for part in ax.collections if isinstance(part, PathCollection)]
    return np.asarray(found[index].get_offsets())


def stairs(ax):
    return [part.get_data() for part in ax.patches]


# Density


@pytest.mark.parametrize("model", [dist.Normal(1.0, 2.0), normal(2.0)], ids=["scalar", "vector"])
def test_density_of_one_dimension_is_the_line(model):
    line = plots.density(model, bounds=(-5, 7), points=101).lines[0]
    assert np.allclose(line.get_xdata(), np.linspace(-5, 7, 101))
    loc = 0.0 if model.event_shape else 1.0
    expected = np.exp(-0.5 * ((line.get_xdata() - loc) / 2) ** 2) / (2 * math.sqrt(2 * math.pi))
    assert np.allclose(line.get_ydata(), expected, atol=1e-6)


def test_density_of_two_dimensions_is_the_mesh():
    ax = plots.density(normal(0.5, 2.0), bounds=((-2, 2), (-7, 7)), points=81)
    x, y = np.meshgrid(np.linspace(-2, 2, 81), np.linspace(-7, 7, 81))
    expected = np.exp(-0.5 * ((x / 0.5) ** 2 + (y / 2) ** 2)) / (2 * math.pi)
    assert np.allclose(mesh(ax).get_array().reshape(81, 81), expected, atol=1e-6)
    assert ax.get_xlim() == (-2, 2) and ax.get_ylim() == (-7, 7)


def test_density_of_a_flow_holds_all_mass_where_the_picture_is_chosen():
    flow = flow_of(2)
    ax = plots.density(flow, points=150)
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    mass = mesh(ax).get_array().sum() * (x1 - x0) * (y1 - y0) / 149**2
    assert mass == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        at = flow.log_prob(torch.tensor([x0, y1], dtype=torch.float32)).exp().item()
    assert mesh(ax).get_array().reshape(150, 150)[-1, 0] == pytest.approx(at, rel=1e-4)


def test_density_is_evaluated_in_pieces_without_gradient(monkeypatch):
    flow = flow_of(2)
    sizes, graph = [], []

    def log_prob(self, value):
        sizes.append(len(value))
        found = original(self, value)
        graph.append(found.requires_grad)
        return found

    original = pf.distributions.FlowDistribution.log_prob
    monkeypatch.setattr(pf.distributions.FlowDistribution, "log_prob", log_prob)
    plots.density(flow, points=200)
    assert sum(sizes) == 200**2 and max(sizes) < 200**2 and not any(graph)


def test_density_picture_reaches_where_the_data_are():
    data = torch.randn(5000, 2) * torch.tensor([1.0, 10.0]) + 100
    ax = plots.density(normal(1.0, 1.0), data=data)
    assert 96 < ax.get_xlim()[0] < 98 and 102 < ax.get_xlim()[1] < 104
    assert 60 < ax.get_ylim()[0] < 75 and 125 < ax.get_ylim()[1] < 140
    assert len(points(ax)) == 1000


def test_density_of_one_dimension_beside_data():
    data = torch.randn(4000)
    ax = plots.density(dist.Normal(0.0, 1.0), data=data, bounds=(-6, 6))
    ((height, edges, _),) = stairs(ax)
    assert (height * np.diff(edges)).sum() == pytest.approx(1)
    # Rows outside the picture still count.
    ax = plots.density(dist.Normal(0.0, 1.0), data=data, bounds=(0, 6))
    ((height, edges, _),) = stairs(ax)
    assert (height * np.diff(edges)).sum() == pytest.approx((data >= 0).double().mean().item())


def test_density_ends_with_the_support():
    flow = pf.Flow(pf.Chain([pf.maf(1), ExpTransform()]))
    line = plots.density(flow, bounds=(-2, 5), points=701).lines[0]
    x, height = line.get_xdata(), line.get_ydata()
    assert (height[x <= 0] == 0).all()
    expected = np.exp(-0.5 * np.log(x[x > 0]) ** 2) / (x[x > 0] * math.sqrt(2 * math.pi))
    assert np.allclose(height[x > 0], expected, atol=1e-5)


def test_density_of_a_distribution_that_does_not_know_its_support():
    class Unknown(dist.Normal):
        @property
        def support(self):
            raise NotImplementedError

    line = plots.density(Unknown(0.0, 1.0, validate_args=False), bounds=(-1, 1), points=3).lines[0]
    assert line.get_ydata()[1] == pytest.approx(1 / math.sqrt(2 * math.pi))


def test_density_at_a_context():
    flow = flow_of(2, context_dim=3, dtype=torch.float64)
    context = [0.5, -1.0, 2.0]
    ax = plots.density(flow, context=context, bounds=((-3, 3), (-3, 3)), points=20)
    grid = torch.linspace(-3, 3, 20, dtype=torch.float64)
    rows = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        expected = flow.log_prob(rows, torch.tensor(context, dtype=torch.float64)).exp().reshape(20, 20).T
    assert np.allclose(mesh(ax).get_array().reshape(20, 20), expected, rtol=1e-10)
    for same in (np.array(context), torch.tensor([context]), torch.tensor(context, requires_grad=True)):
        again = plots.density(flow, context=same, bounds=((-3, 3), (-3, 3)), points=20)
        assert np.allclose(mesh(again).get_array(), mesh(ax).get_array())


def test_a_spike_leaves_the_rest_of_the_picture_its_colours():
    class Spiked(dist.MultivariateNormal):
        """A normal with a spike at one point of the grid, of one two-hundredth of the mass."""

        def log_prob(self, value):
            return super().log_prob(value) + 3.6 * (value.norm(dim=-1) < 0.01)

    model = Spiked(torch.zeros(2), torch.eye(2))
    box = ((-3, 3), (-3, 3))
    for each in (model, normal(1.0, 1.0)):
        found = mesh(plots.density(each, bounds=box, points=201))
        # Where a normal in two dimensions is denser than 1 - m of its maximum, it has the mass m.
        assert found.norm.vmax == pytest.approx(0.99 / (2 * math.pi), rel=0.01)
    assert mesh(plots.density(model, bounds=box, points=201)).get_array().max() > 5


def test_style_is_the_callers():
    ax = plots.density(normal(1.0, 1.0), points=10, cmap="magma", vmax=3.0)
    assert mesh(ax).get_cmap().name == "magma" and mesh(ax).norm.vmax == 3
    norm = matplotlib.colors.Normalize()
    assert mesh(plots.density(normal(1.0, 1.0), points=10, norm=norm)).norm is norm
    line = plots.density(dist.Normal(0.0, 1.0), color="red", linewidth=3).lines[0]
    assert line.get_color() == "red" and line.get_linewidth() == 3


def test_given_axes_are_drawn_into_and_left_as_they_are():
    fig, axes = plt.subplots(1, 4)
    assert plots.density(normal(1.0, 1.0), points=10, ax=axes[0]) is axes[0]
    assert plots.samples(normal(1.0, 1.0), num_samples=10, ax=axes[1]) is axes[1]
    assert plots.history([1.0, 2.0], ax=axes[2]) is axes[2]
    assert plots.calibration(normal(1.0, 1.0), torch.randn(10, 2), num_samples=10, ax=axes[3]) is axes[3]
    assert plt.get_fignums() == [fig.number]
    assert all(ax.spines["top"].get_visible() for ax in axes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((normal(1.0, 1.0, 1.0), {}), r"1 or 2 dimensions, got event shape \(3,\)"),
        ((dist.Normal(torch.zeros(2), 1.0), {}), r"empty batch shape, got \(2,\).*to_event"),
        ((normal(1.0, 1.0), {"bounds": (-1, 1)}), r"bounds with low < high for 2 dimensions, e.g. \(\(-3"),
        ((normal(1.0, 1.0), {"bounds": ((-1, 1), (1, -1))}), "bounds with low < high"),
        ((normal(1.0), {"bounds": (0, float("nan"))}), "1 of 2 numbers in bounds are NaN"),
        ((normal(1.0), {"points": 1}), "points to be an integer >= 2, got 1"),
        ((normal(1.0, 1.0), {"data": torch.zeros(5, 3)}), r"data of shape \(rows, 2\), got shape \(5, 3\)"),
        ((normal(1.0, 1.0), {"data": torch.zeros(2)}), r"data of shape \(rows, 2\), got shape \(2,\)"),
        ((normal(1.0, 1.0), {"data": torch.zeros(0, 2)}), "data is empty"),
        ((normal(1.0, 1.0), {"data": [[0.0, math.nan], [math.inf, 0.0]]}), "2 of 4 numbers in data are NaN"),
        ((normal(1.0, 1.0), {"context": torch.zeros(2)}), "takes no context"),
    ],
)
def test_density_says_what_does_not_fit(arguments, message):
    (model, options) = arguments
    refuses(ValueError, message, plots.density, model, **options)
    assert not plt.get_fignums(), "an error leaves no figure"


def test_densities_and_draws_that_are_nan_are_an_error():
    flow = flow_of(2)
    torch.nn.init.constant_(next(flow.chain[0].parameters()), math.nan)
    with pytest.raises(ValueError, match=r"NaN at 16 of 16 points.*locate_nonfinite"):
        plots.density(flow, bounds=((-1, 1), (-1, 1)), points=4)
    for picture in (plots.density, plots.samples, plots.corner):
        refuses(ValueError, r"draws are NaN or infinite.*locate_nonfinite", picture, flow)


def test_what_is_no_model_is_named():
    refuses(TypeError, r"Chain is a transform and has no density.*pf\.Flow", plots.density, pf.maf(2))
    refuses(TypeError, "expected a distribution, a Flow or the result of fitting a flow, got str", plots.density, "maf")
    with pytest.raises(TypeError, match="data to be real numbers, got ndarray of dtype complex"):
        plots.density(normal(1.0, 1.0), data=np.ones((3, 2)) * 1j)
    refuses(TypeError, "data to be real numbers, got list", plots.density, normal(1.0, 1.0), data=[["a", "b"]])
    refuses(ValueError, "built with context_dim=3: give context=", plots.density, flow_of(2, context_dim=3))
    with pytest.raises(ValueError, match=r"got \(4,\); give one context"):
        plots.density(flow_of(2, context_dim=3), context=torch.zeros(4, 3))


# Samples


def test_samples_are_beside_as_many_data():
    data = torch.arange(1000.0)[:, None].expand(-1, 2)
    ax = plots.samples(normal(1.0, 3.0), data, num_samples=100)
    shown, drawn = points(ax, 0), points(ax, 1)
    assert len(shown) == len(drawn) == 100
    assert shown[0, 0] == 0 and shown[-1, 0] == 999 and (np.diff(shown[:, 0]) > 8).all()
    assert 2 < drawn[:, 1].std() < 4
    assert -110 < ax.get_xlim()[0] < 0 and 999 < ax.get_ylim()[1] < 1110
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["data", "samples"]


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(7, 2, dtype=torch.float64, requires_grad=True),
        torch.ones(7, 2, dtype=torch.bfloat16),
        torch.ones(7, 2, dtype=torch.int64),
        np.ones((7, 2), dtype=np.float32),
        [[1.0, 1.0]] * 7,
        [torch.ones(2, requires_grad=True)] * 7,
        [(torch.tensor(1.0, requires_grad=True), 1)] * 7,
    ],
    ids=["float64 with gradient", "bfloat16", "int64", "array", "lists", "tensors", "mixed"],
)
def test_rows_come_in_many_kinds(given):
    assert np.array_equal(points(plots.samples(given)), np.ones((7, 2)))
    assert np.array_equal(points(plots.samples(normal(1.0, 1.0), given)), np.ones((7, 2)))


def test_samples_over_a_batch_of_contexts():
    flow = pf.Flow(pf.maf(2, context_dim=1, num_layers=1, hidden_dims=(8,)))
    ax = plots.samples(flow, context=torch.zeros(30, 1), num_samples=100)
    assert len(points(ax)) == 100


def test_samples_say_what_does_not_fit():
    refuses(ValueError, "expected two dimensions, got 3; plots", plots.samples, normal(1.0, 1.0, 1.0))
    refuses(ValueError, "num_samples to be an integer >= 1, got 0", plots.samples, normal(1.0, 1.0), num_samples=0)
    refuses(ValueError, "got a single number", plots.samples, torch.tensor(1.0))
    refuses(ValueError, "empty batch shape", plots.samples, dist.Normal(torch.zeros(2), 1.0))


# Corner


def test_corner_has_an_axes_for_each_pair_and_one_for_each_dimension():
    data = torch.randn(500, 3)
    fig = plots.corner(normal(1.0, 2.0, 3.0), data, names=["a", "b", "c"], num_samples=2000)
    assert len(fig.axes) == 6
    assert [ax.get_xlabel() for ax in fig.axes] == ["", "", "", "a", "b", "c"]
    assert [ax.get_ylabel() for ax in fig.axes] == ["", "b", "", "c", "", ""]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["data", "samples"]
    assert len(plots.corner(normal(1.0), num_samples=100).axes) == 1


def test_corner_histograms_are_densities():
    data = torch.randn(5000, 2)
    fig = plots.corner(normal(1.0, 1.0), data, num_samples=20_000)
    for ax in (fig.axes[0], fig.axes[2]):
        for height, edges, _ in stairs(ax):
            assert 0.98 < (height * np.diff(edges)).sum() <= 1
            middles = (edges[1:] + edges[:-1]) / 2
            assert np.abs(height - np.exp(-0.5 * middles**2) / math.sqrt(2 * math.pi)).max() < 0.06
    # Draws that the picture does not reach are missed: the histogram of a wider model is lower.
    fig = plots.corner(normal(10.0, 1.0), data, num_samples=20_000)
    height, edges, _ = stairs(fig.axes[0])[1]
    inside = 2 * dist.Normal(0.0, 10.0).cdf(torch.tensor(edges[-1])).item() - 1
    assert (height * np.diff(edges)).sum() == pytest.approx(inside, abs=0.03)


def test_corner_contours_hold_what_they_say():
    """For a standard normal in two dimensions the contour of mass m is a circle of radius sqrt(-2 log(1 - m))."""
    fig = plots.corner(normal(1.0, 1.0), num_samples=200_000)
    (contours,) = [part for part in fig.axes[1].collections if isinstance(part, QuadContourSet)]
    radii = [np.linalg.norm(path.vertices, axis=1) for path in contours.get_paths()]
    expected = [math.sqrt(-2 * math.log(1 - mass)) for mass in (0.9, 0.5)]
    for radius, truth in zip(radii, expected, strict=True):
        assert abs(radius.mean() - truth) < 0.08 and radius.std() < 0.1


def test_corner_draws_the_pairs_the_right_way_round():
    samples = torch.stack([torch.randn(2000), 100 + 0.1 * torch.randn(2000)], -1)
    across = torch.rand(5000) * 4 - 2
    bent = torch.stack([across, across**2], -1)
    (contours,) = [part for part in plots.corner(bent).axes[1].collections if isinstance(part, QuadContourSet)]
    x, y = contours.get_paths()[0].vertices.T
    assert np.abs(y - x**2).mean() < 0.9  # on the wrong side of the diagonal it would be 1.7
    below = plots.corner(samples, torch.flip(samples, (0,))).axes[1]
    assert abs(points(below)[:, 0].mean()) < 0.2 and abs(points(below)[:, 1].mean() - 100) < 0.2
    (contours,) = [part for part in below.collections if isinstance(part, QuadContourSet)]
    assert abs(contours.get_paths()[0].vertices[:, 1].mean() - 100) < 0.2


def test_corner_of_many_dimensions_asks_which():
    samples = torch.randn(100, 13)
    with pytest.raises(ValueError, match=r"1 to 12 dimensions, got 13; choose some of them, e.g. dims=\[0, 1, 2\]"):
        plots.corner(samples)
    fig = plots.corner(samples, dims=[12, 3])
    assert [ax.get_xlabel() for ax in fig.axes] == ["", "x[12]", "x[3]"]
    for dims in ([], [13], [-1], [True], [0.5]):
        refuses(ValueError, "dim", plots.corner, samples, dims=dims)
    for names in (["a"], "ab"):
        refuses(ValueError, "expected 2 names", plots.corner, samples, dims=[0, 1], names=names)


def test_corner_of_events_of_any_shape():
    model = pf.Flow(pf.realnvp((2, 2), num_layers=2, hidden_dims=(8,)))
    assert len(plots.corner(model, torch.randn(50, 2, 2), num_samples=50).axes) == 10
    refuses(ValueError, r"data of shape \(rows, 2, 2\), got shape \(50, 4\)", plots.corner, model, torch.randn(50, 4))


@pytest.mark.full
def test_corner_of_degenerate_rows():
    """A column of one value, and a single row, are drawn without a warning or an error."""
    flat = torch.randn(50, 2) * torch.tensor([1.0, 0.0]) + 5
    for fig in (plots.corner(flat), plots.corner(torch.ones(1, 2)), plots.corner(normal(1.0, 1.0), flat + 1e6)):
        fig.canvas.draw()
        assert len(fig.axes) == 3
        assert all(np.isfinite(ax.get_xlim()).all() and np.isfinite(ax.get_ylim()).all() for ax in fig.axes)


# History


RECORD = {
    "epoch": [1, 2, 3, 4, 5],
    "step": [10, 20, 30, 40, 50],
    "train": [-3.0, -2.0, -1.5, -1.2, -1.0],
    "validation": [-3.1, -2.2, -1.8, -1.9, -2.0],
    "lr": [0.01, 0.01, 0.01, 0.001, 0.001],
    "seconds": [0.1, 0.2, 0.3, 0.4, 0.5],
}


def curves(ax):
    return {line.get_label(): line for line in ax.lines}


def test_history_of_a_dictionary():
    ax = plots.history(RECORD)
    for name in ("train", "validation"):
        assert np.array_equal(curves(ax)[name].get_xdata(), RECORD["epoch"])
        assert np.array_equal(curves(ax)[name].get_ydata(), RECORD[name])
    best = curves(ax)["best: -1.800 at epoch 3"]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (3, -1.8)
    _, rate = ax.figure.axes
    assert np.array_equal(rate.lines[0].get_ydata(), RECORD["lr"]) and rate.get_yscale() == "log"
    assert "nats" in ax.get_ylabel() and ax.get_xlabel() == "epoch" and rate.get_ylabel() == "learning rate"


def test_history_of_a_fit_marks_the_epoch_that_the_fit_kept():
    ax = plots.history(SimpleNamespace(history=RECORD, best_epoch=4))
    assert "best: -1.900 at epoch 4" in curves(ax)
    ax = plots.history(SimpleNamespace(history=RECORD, best_epoch=0))  # the Gaussian that the flow started as
    assert list(curves(ax)["best: the start, at epoch 0"].get_xdata()) == [0, 0]
    refuses(ValueError, "best epoch, 9, is not among", plots.history, SimpleNamespace(history=RECORD, best_epoch=9))


def test_history_without_validation_or_with_a_constant_rate():
    for absent in ({}, {"validation": [None] * 5}, {"validation": [math.nan] * 5}):
        record = {"train": RECORD["train"], "lr": [0.1] * 5} | absent
        ax = plots.history(record)
        assert list(curves(ax)) == ["train"] and len(ax.figure.axes) == 1
        assert np.array_equal(curves(ax)["train"].get_xdata(), [1, 2, 3, 4, 5])
    some = plots.history({"train": RECORD["train"], "validation": [None, -2.0, None, -1.9, math.nan]})
    assert "best: -1.900 at epoch 4" in curves(some)


def test_history_leaves_a_bad_start_out():
    values = [-1e6, -1e3, *np.linspace(-3, -2, 50)]
    bottom, top = plots.history({"train": values}).get_ylim()
    assert -10 < bottom < -2.9 and -2 < top < -1.8
    bottom, top = plots.history({"train": [-4.0, -3.0, -2.0, -1.0]}).get_ylim()
    assert bottom < -4 and top > -1


def test_history_of_plain_values():
    losses = torch.randn(30, requires_grad=True)
    (line,) = plots.history(losses).lines
    assert np.array_equal(line.get_xdata(), np.arange(1, 31))
    assert np.allclose(line.get_ydata(), losses.detach())
    values = np.arange(1000.0)
    _, mean = plots.history(list(values)).lines
    assert np.allclose(mean.get_ydata(), mean.get_xdata() - 1), "the mean of a straight line is the line"


def test_history_says_what_does_not_fit():
    refuses(ValueError, r"values of 'train', got one with \['loss'\]", plots.history, {"loss": [1.0]})
    refuses(ValueError, "values of 'train'", plots.history, {"train": []})
    refuses(ValueError, "lists of equal length", plots.history, {"train": [1.0, 2.0], "validation": [1.0]})
    refuses(ValueError, "at least one value", plots.history, [])
    for wrong in (3.0, [[1.0], [2.0]], "ab"):
        refuses(TypeError, "list of numbers", plots.history, wrong)


# Calibration


def wave(n):
    """Contexts, and values whose location and scale they set."""
    context = torch.randn(n, 1)
    return torch.cat([context.sin(), context], -1) + torch.exp(0.5 * context) * torch.randn(n, 2), context


class Wave(dist.ConditionalDistribution):
    """The model that made them, or one whose scale is wrong."""

    def __init__(self, factor=1.0, shift=0.0):
        self.factor, self.shift = factor, shift

    def condition(self, context):
        loc = torch.cat([context.sin(), context], -1) + self.shift
        return dist.Normal(loc, self.factor * torch.exp(0.5 * context).expand(loc.shape)).to_event(1)


def test_pit_of_a_calibrated_model_is_uniform():
    data, context = wave(4000)
    u = plots.pit(Wave(), data, context, num_samples=19)
    assert u.shape == (4000, 2) and u.dtype == torch.float64 and u.device.type == "cpu"
    for column in u.T:
        steps = torch.arange(1, 4001, dtype=torch.float64) / 4000
        assert (column.sort().values - steps).abs().max() < 1.63 / math.sqrt(4000)  # Kolmogorov, 1 %


def test_pit_is_the_cumulative_distribution():
    data, context = wave(50)
    u = plots.pit(Wave(), data, context, num_samples=20_000)
    made = Wave().condition(context).base_dist
    assert (u - made.cdf(data)).abs().max() < 5 * math.sqrt(0.25 / 20_000)


def test_pit_does_not_depend_on_the_pieces(monkeypatch):
    """Each row meets its own context in whatever pieces the rows pass."""

    class Sharp(Wave):
        def condition(self, context):
            return dist.Normal(context, 1e-6).to_event(1)

    context = torch.arange(50.0)[:, None]
    for chunk in (1, 70, 1 << 20):
        monkeypatch.setattr(plots.calibrations, "CHUNK", chunk)
        above = plots.pit(Sharp(), context + 0.1, context, num_samples=10)
        below = plots.pit(Sharp(), context - 0.1, context, num_samples=10)
        assert (above > 10 / 11 - 1e-9).all() and (below < 1 / 11 + 1e-9).all()


def test_pit_with_ties_is_uniform():
    data = torch.randint(2, (4000, 1)).float()
    u = plots.pit(dist.Bernoulli(0.5 * torch.ones(1)).to_event(1), data, num_samples=9)
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.std() - math.sqrt(1 / 12)) < 0.01


def coverage(ax):
    """Nominal and empirical coverage of each dimension, and the band's edges."""
    drawn = [line for line in ax.lines if len(line.get_xdata()) > 2]
    outline = ax.collections[0].get_paths()[0].vertices
    nominal = drawn[0].get_xdata()
    low = np.array([outline[np.isclose(outline[:, 0], q), 1].min() for q in nominal])
    high = np.array([outline[np.isclose(outline[:, 0], q), 1].max() for q in nominal])
    return nominal, [line.get_ydata() for line in drawn], low, high


def test_calibration_of_the_right_model_lies_within_the_band():
    data, context = wave(1500)
    nominal, curves, low, high = coverage(plots.calibration(Wave(), data, context, num_samples=200))
    assert len(curves) == 2
    for curve in curves:
        assert curve[0] == 0 and curve[-1] == 1 and (np.diff(curve) >= 0).all()
        assert ((low - 1e-12 <= curve) & (curve <= high + 1e-12)).all()
    assert (high - low).max() < 0.12 and ((low <= nominal) & (nominal <= high)).all()


@pytest.mark.parametrize(("wrong", "side"), [(Wave(1.5), 1), (Wave(0.7), -1), (Wave(shift=1.0), -1)])
def test_calibration_of_a_wrong_model_leaves_the_band(wrong, side):
    data, context = wave(1500)
    _, curves, low, high = coverage(plots.calibration(wrong, data, context, num_samples=200))
    for curve in curves:
        outside = curve > high if side > 0 else curve < low
        assert outside.mean() > 0.5


def test_calibration_against_the_closed_form():
    """A model of half the true width: its central interval q holds erf(erfinv(q) / 2)."""
    data = 2 * torch.randn(20_000, 1)
    nominal, (curve,), _, _ = coverage(plots.calibration(normal(1.0), data, num_samples=400))
    q = torch.tensor(nominal[1:-1])
    assert np.abs(curve[1:-1] - torch.erf(torch.erfinv(q) / 2).cpu().numpy()).max() < 0.02


def test_band_holds_whole_curves_as_often_as_it_says():
    generator = np.random.default_rng(1)
    for rows in (40, 1000):
        ax = plots.calibration(normal(1.0), torch.randn(rows, 1), num_samples=50, level=0.9)
        nominal, _, low, high = coverage(ax)
        inside = 0
        for _ in range(600):
            curve = np.searchsorted(np.sort(generator.random(rows)), nominal, "right") / rows
            inside += bool(((low - 1e-12 <= curve) & (curve <= high + 1e-12))[1:-1].all())
        assert abs(inside / 600 - 0.9) < 0.05


def test_calibration_of_flows_with_and_without_a_context():
    flow = flow_of(3, context_dim=2)
    context = torch.randn(600, 2)
    data = flow(context).sample()
    ax = plots.calibration(
        flow, data.double().cpu().numpy(), context.double().cpu().numpy(), num_samples=100, names=["a", "b", "c"]
    )
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]
    _, curves, low, high = coverage(ax)
    assert all(((low - 1e-12 <= curve) & (curve <= high + 1e-12)).all() for curve in curves)
    # One context for all rows, and a wrong order of contexts.
    data = flow(context[0]).sample((600,))
    _, curves, low, high = coverage(plots.calibration(flow, data, context[0], num_samples=100))
    assert all(((low - 1e-12 <= curve) & (curve <= high + 1e-12)).all() for curve in curves)
    assert plots.pit(flow_of(2), torch.randn(5, 2), num_samples=10).shape == (5, 2)
    assert plots.pit(flow, data[:1], context[:1], num_samples=10).shape == (1, 3)


def test_calibration_says_what_does_not_fit():
    flow = flow_of(2, context_dim=1)
    with pytest.raises(ValueError, match="one context for each of 5 rows of data, got 4"):
        plots.calibration(flow, torch.randn(5, 2), torch.randn(4, 1))
    with pytest.raises(ValueError, match=r"context of shape \(rows, context_dim\), got shape \(5, 1, 1\)"):
        plots.calibration(flow, torch.randn(5, 2), torch.randn(5, 1, 1))
    refuses(ValueError, r"data of shape \(rows, 2\)", plots.calibration, flow, torch.randn(5, 3), torch.randn(5, 1))
    refuses(ValueError, "last dimension 1", plots.calibration, flow, torch.randn(5, 2), torch.randn(5, 2))
    refuses(ValueError, "level between 0 and 1", plots.calibration, normal(1.0, 1.0), torch.randn(5, 2), level=95)
    refuses(ValueError, "num_samples to be an integer", plots.pit, normal(1.0, 1.0), torch.randn(5, 2), num_samples=0.5)
    refuses(ValueError, "in context are NaN", plots.pit, flow, torch.randn(5, 2), np.full((5, 1), math.nan))
    with pytest.raises(ValueError, match="a draw of the model is NaN"):
        plots.pit(dist.Normal(torch.full((1,), math.nan), 1.0, validate_args=False).to_event(1), torch.zeros(3, 1))


# What they share


def test_documented_signatures_are_the_real_ones():
    page = (Path(__file__).parent.parent / "docs" / "api" / "plots.md").read_text()
    for name in plots.__all__:
        (found,) = re.findall(rf"^{name}(\(.*\))$", page, re.MULTILINE)
        bare = [p.replace(annotation=p.empty) for p in inspect.signature(getattr(plots, name)).parameters.values()]
        assert found == str(inspect.Signature(bare)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_dtypes_while_the_other_is_the_default(dtype, default_dtype):
    flow = flow_of(2, context_dim=1, dtype=dtype)
    default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    context, data = np.zeros(1), np.random.default_rng(0).normal(size=(20, 2))
    assert plots.density(flow, context=context, data=data, points=10).collections
    assert plots.samples(flow, data, 10, context=context).collections
    assert len(plots.corner(flow, data, num_samples=50, context=context).axes) == 3
    assert plots.calibration(flow, data, np.zeros((20, 1)), num_samples=10).lines
    assert {parameter.dtype for parameter in flow.parameters()} == {dtype}


def test_nothing_is_remembered_of_a_gradient():
    flow = flow_of(2)
    for draw in (plots.density, plots.samples, plots.corner):
        draw(flow)
    plots.calibration(flow, torch.randn(5, 2), num_samples=10)
    assert all(parameter.grad is None for parameter in flow.parameters())
    flow.log_prob(torch.randn(3, 2)).sum().backward()


def test_a_picture_teaches_a_flow_nothing():
    """A layer that is set by its first batch in training mode is not set by a picture's points."""
    for context_dim, context in ((0, None), (1, torch.zeros(1))):
        flow = pf.Flow(pf.Chain([pf.ActNorm(2), *pf.maf(2, context_dim=context_dim, num_layers=1)]))
        flow.chain[1].eval()
        modes = [module.training for module in flow.modules()]
        state = {name: value.clone() for name, value in flow.state_dict().items()}
        for model in (flow, flow.condition(context)):
            given = context if model is flow else None
            plots.density(model, context=given, points=10)
            plots.samples(model, num_samples=10, context=given)
            plots.corner(model, num_samples=10, context=given)
            plots.calibration(model, torch.randn(10, 2), given, num_samples=10)
        assert [module.training for module in flow.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())


def test_the_result_of_a_fit_is_a_model():
    torch.manual_seed(0)
    data = 100 + 10 * torch.randn(400, 2) * torch.tensor([1.0, 0.1])
    fit = pf.fit_density(pf.maf(2, num_layers=1), data, progress=False, steps=30)
    ax = plots.density(fit, data=data, points=60)
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    assert mesh(ax).get_array().sum() * (x1 - x0) * (y1 - y0) / 59**2 == pytest.approx(1, abs=0.1)
    assert abs(np.median(points(plots.samples(fit), 0)[:, 0]) - 100) < 5
    plots.corner(fit, data, num_samples=100)
    plots.calibration(fit, data, num_samples=20)
    drawn = curves(plots.history(fit))
    assert np.array_equal(drawn["train"].get_ydata(), fit.history["train"])
    assert any(f"at epoch {fit.best_epoch}" in name for name in drawn)


def test_the_result_of_a_fit_takes_contexts_in_their_own_units():
    context = 1000 + 100 * torch.randn(600, 1)
    data = context + torch.randn(600, 1)
    fit = pf.fit_density(
        pf.maf(1, context_dim=1, num_layers=1), data, context=context, progress=False, steps=200, lr=1e-2
    )
    ax = plots.density(fit, context=[1100.0], bounds=(1000, 1200))
    line = ax.lines[0]
    assert abs(line.get_xdata()[line.get_ydata().argmax()] - 1100) < 20
    assert plots.pit(fit, data[:50], context[:50], num_samples=20).shape == (50, 1)


def test_a_module_without_a_distribution_is_no_model():
    class Scores(torch.nn.Module):
        def log_prob(self, value):
            return value.sum(-1)

    for module in (Scores(), torch.nn.Linear(2, 2)):
        for context in (None, torch.zeros(1)):
            with pytest.raises(TypeError, match=f"result of fitting a flow.*, got {type(module).__name__}"):
                plots.density(module, context=context)


def test_devices(device):
    flow = flow_of(2, context_dim=1).to(device)
    data, context = torch.randn(20, 2, device=device), torch.randn(20, 1, device=device)
    assert plots.density(flow, context=context[0].cpu(), data=data, points=10).collections
    assert plots.samples(flow, data, num_samples=10, context=context[0]).collections
    assert len(plots.corner(flow, data, num_samples=50, context=context).axes) == 3
    assert plots.calibration(flow, data, context, num_samples=10).lines
    assert plots.history({"train": data[:, 0]}).lines
    assert all(parameter.device.type == device.type for parameter in flow.parameters())


# Verdict


def test_verdict_shows_ranks_scores_and_unexplained_rows():
    torch.manual_seed(1)
    rows = torch.randn(300, 2)
    rows[5] = 9.0
    found = judge_rows(pf.Flow(pf.maf(2, num_layers=1, hidden_dims=(4,))).eval(), rows, training=torch.randn(500, 2))
    fig = plots.verdict(found, names=["a", "b"])
    left, middle, right = fig.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b", "log-density"]
    own, other = found.checks.scores.numpy(), found.checks.rival_scores.numpy()
    low = np.quantile(np.concatenate([own, other]), 0.005)
    assert np.allclose(points(middle), np.stack([other.clip(low), own.clip(low)], 1))
    assert middle.get_title() == f"{(own - other).mean():+.2f} nats a row on average"
    assert [text.get_text() for text in right.texts] == ["5"] and right.get_yscale() == "log"
    assert np.allclose(points(right), [(own[list(found.checks.index).index(5)], 1 / 300)])
    curves = {line.get_label(): line.get_xdata() for line in right.lines}
    assert {name: len(x) for name, x in curves.items()} == {
        "draws": 300 * found.checks.copies,
        "training rows": 500,
        "judged rows": 300,
    }
    assert np.allclose(curves["judged rows"], np.sort(own))


def test_verdict_without_a_rival_or_draws():
    torch.manual_seed(0)
    found = judge_rows(flow_of(2), torch.randn(40, 2))
    assert plots.verdict(found).axes[1].get_title() == "nothing to compare with"
    refuses(TypeError, "fit_density", plots.verdict, torch.zeros(3))
    bare = SimpleNamespace(
        verdict=judge_density(replace(found.checks, ranks=None, draws=None, notes=("no way to draw",)))
    )
    refuses(ValueError, "no way to draw", plots.verdict, bare)
    refuses(ValueError, "expected 2 names", plots.verdict, found, names=["a"])


def guide_fit(log_p, log_q, shares=None, guide_shares=None, missed=()):
    """What a fit of a guide holds, of draws with these log-densities and modes with these masses."""
    found = importance(log_p - log_q)
    probe = None
    if shares is not None:
        missed = torch.tensor(missed)
        probe = SimpleNamespace(share=torch.tensor(shares), guide_share=torch.tensor(guide_shares), missed=missed)
    assessment = Assessment(log_q[:, None], log_p, log_q, found, probe, None, judge(found))
    return SimpleNamespace(assessment=assessment, verdict=assessment.verdict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verdict_of_a_guide_shows_weights_and_modes(dtype):
    torch.manual_seed(0)
    log_q = dist.Normal(0.0, 1.0).log_prob(torch.randn(1000)).to(dtype)
    log_p = log_q - 3 + 0.1 * torch.randn(1000, dtype=dtype)  # an evidence of about -3
    log_p[7] = -math.inf
    fit = guide_fit(log_p, log_q, [0.7, 0.3], [1.0, 0.0], [False, True])
    left, middle, right = plots.verdict(fit).axes
    kept = log_p.isfinite()
    shift = fit.assessment.importance.log_evidence
    own, other = log_q[kept].double().numpy(), (log_p[kept].double() - shift).numpy()
    low = np.quantile(np.concatenate([own, other]), 0.005)
    assert np.allclose(points(left), np.stack([own.clip(low), other.clip(low)], 1), atol=1e-5)
    assert f"{fit.assessment.importance.ess:.2f}" in left.get_title()
    weights, above = middle.lines[0].get_data()
    assert np.allclose(weights, np.sort(np.exp(other - own)), rtol=1e-5) and np.mean(weights) == pytest.approx(
        1, abs=0.01
    )
    assert np.allclose(above, [(weights >= weight).mean() for weight in weights])
    assert [round(bar.get_height(), 3) for bar in right.patches] == [0.7, 0.3, 1.0, 0.0]
    assert [text.get_text() for text in right.texts] == ["missed"] and right.get_title() == fit.verdict.label


def test_verdict_of_a_guide_without_modes_or_weights():
    log_q = torch.linspace(-3, -1, 200)
    right = plots.verdict(guide_fit(log_q - 1, log_q)).axes[2]
    assert [text.get_text() for text in right.texts] == ["modes were not searched"]
    refuses(TypeError, "columns of a density", plots.verdict, guide_fit(log_q, log_q), names=["a"])
    lost = guide_fit(log_q, log_q)
    object.__setattr__(lost.assessment, "log_p", torch.full((200,), -math.inf))
    refuses(ValueError, "no draw of the guide has a finite weight", plots.verdict, lost)
