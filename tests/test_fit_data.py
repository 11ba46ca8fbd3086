"""What ``fit_density`` refuses or warns of, in words, before any training."""

import copy
import math
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from torch import nn
from torch.distributions import AffineTransform, ExpTransform, biject_to, constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows.infer.density.columns import copied
from pyro_flows.infer.density.prepare import Survey
from pyro_flows.infer.density.settings import Settings

SMALL = {"num_layers": 1, "hidden_dims": (8,)}


def fit(flow, data, *args, **options):
    return pf.fit_density(flow, data, *args, **{"progress": False, "max_epochs": 1, **options})


def flow(input_dim=2, context_dim=0):
    return pf.Flow(pf.maf(input_dim, context_dim=context_dim, **SMALL))


def normal(*shape):
    return torch.randn(*shape)


def spoilt(rows, value, *shape):
    return put(torch.randn(*shape), rows, value)


def put(data, rows, value):
    """The data, with this value in the second column of these rows."""
    data[rows, 1] = value
    return data


class Free(nn.Module):
    """A density that says nothing of shapes."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def log_prob(self, value, context=None):
        return dist.Normal(self.loc, 1.0).log_prob(value.float()).sum(-1)


class Unsummed(Free):
    def log_prob(self, value, context=None):
        return dist.Normal(self.loc, 1.0).log_prob(value)


class Detached(Free):
    def log_prob(self, value, context=None):
        return super().log_prob(value).detach()


def positive(input_dim=2):
    return pf.Flow([*pf.maf(input_dim, **SMALL), ExpTransform()])


def shifted():
    """Onto (1, inf), which torch's affine transform does not tell."""
    return pf.Flow([*pf.maf(2, **SMALL), ExpTransform(), AffineTransform(1.0, 2.0)])


LATE = torch.tensor([4, 17, 30, 31, 32, 33, 34])
ERRORS = {
    "empty": (lambda: fit(flow(), torch.zeros(0, 2)), r"data is empty, shape \(0, 2\)"),
    "empty-loader": (lambda: fit(flow(), DataLoader(normal(3, 2)[:0])), "DataLoader given as data is empty"),
    "nan": (lambda: fit(flow(), spoilt(LATE, np.nan, 50, 2)), r"in 7 of 50 rows \(rows 4, 17, 30, 31, 32, …\)"),
    "inf": (lambda: fit(flow(), spoilt([3], -np.inf, 50, 2)), r"data has NaN, infinity.* 1 of 50 rows \(row 3\)"),
    "too-large": (lambda: fit(flow(), spoilt([3], 1e30, 50, 2).double() ** 2), "too large for torch.float32"),
    "nan-validation": (lambda: fit(flow(), normal(50, 2), spoilt([3], np.nan, 9, 2)), r"validation has NaN.*row 3"),
    "nan-context": (
        lambda: fit(flow(2, 2), normal(50, 2), context=spoilt([8], np.nan, 50, 2)),
        r"context has NaN.*1 of 50 rows \(row 8\)",
    ),
    "nan-loader": (
        lambda: fit(flow(), DataLoader(spoilt([8], np.nan, 50, 2), batch_size=5)),
        r"batch 1 of the DataLoader given as data, values, has NaN.* 1 of 5 rows \(row 3\)",
    ),
    "constant": (
        lambda: fit(flow(3), torch.cat([normal(50, 1), torch.ones(50, 2)], 1)),
        "columns 1, 2 are constant .*infinite",
    ),
    "constant-in-float32": (
        lambda: fit(flow(), spoilt([], 0, 50, 2).double() * torch.tensor([1.0, 1e-9]) + 1),
        r"column 1 is constant \(in torch.float32\)",
    ),
    "constant-loader": (lambda: fit(flow(), DataLoader(torch.ones(50, 2))), "columns 0, 1 are constant"),
    "one-row": (lambda: fit(flow(), normal(1, 2), validation_fraction=0), "at least 2 rows"),
    "duplicated": (lambda: fit(flow(4), normal(50, 2).repeat(1, 2)), "columns 0 and 2 determine each other"),
    "dependent": (
        lambda: fit(
            flow(3), normal(5000, 2)[:, [0, 1, 1]] * torch.tensor([1, 1e-2, -3e3]) + torch.tensor([5.0, 100, 0])
        ),
        "columns 1 and 2 determine each other",
    ),
    "dependent-loader": (lambda: fit(flow(), DataLoader(normal(50, 1).repeat(1, 2))), "columns 0 and 1 determine"),
    "dependent-in-the-open": (
        lambda: fit(positive(), normal(50, 1).exp() ** torch.tensor([1.0, 2.0])),
        "columns 0 and 1 determine",
    ),
    "large-batch": (lambda: fit(flow(), normal(50, 2), batch_size=46), "batch_size=46 is more than the 45 rows"),
    "few-rows": (lambda: fit(flow(), normal(9, 2)), "9 rows are too few to hold out 10% of them; give validation="),
    "columns": (
        lambda: fit(flow(3), normal(50, 2)),
        r"expected data of shape \(rows, 3\) \(input_dim columns\), got shape \(50, 2\)",
    ),
    "image": (lambda: fit(pf.nice((2, 3)), normal(50, 6)), r"of shape \(rows, 2, 3\), got shape \(50, 6\)"),
    "one-dimension": (lambda: fit(flow(2), normal(50)), r"of shape \(rows, 2\)"),
    "number": (lambda: fit(Free(), torch.tensor(1.0)), r"expected data of shape \(rows, ...\), got shape \(\)"),
    "validation-columns": (
        lambda: fit(flow(), normal(50, 2), normal(20, 3)),
        r"expected validation of shape \(rows, 2\).*got shape \(20, 3\)",
    ),
    "validation-columns-of-a-module": (
        lambda: fit(Free(), normal(50, 2), normal(20, 3)),
        r"validation with columns as in data, of shape \(2,\) a row, got \(3,\)",
    ),
    "validation-contexts-of-a-module": (
        lambda: fit(Free(), normal(50, 2), normal(20, 2), context=normal(50, 1)),
        r"validation with contexts as in data, of shape \(1,\) a row, got None",
    ),
    "no-context": (lambda: fit(flow(2, 3), normal(50, 2)), "context_dim=3: give a context for each row of data"),
    "no-validation-context": (
        lambda: fit(flow(2, 1), normal(50, 2), normal(50, 2), normal(50, 1)),
        "each row of validation .*validation_context=",
    ),
    "needless-context": (lambda: fit(flow(), normal(50, 2), context=normal(50, 1)), "context_dim=0, but contexts came"),
    "needless-pairs": (
        lambda: fit(flow(), DataLoader(TensorDataset(normal(50, 2), normal(50, 1)))),
        "contexts came with data: leave them out",
    ),
    "short-context": (
        lambda: fit(flow(2, 1), normal(50, 2), context=normal(49, 1)),
        r"each of the 50 rows of data, got context of shape \(49, 1\)",
    ),
    "wide-context": (
        lambda: fit(flow(2, 1), normal(50, 2), context=normal(50, 2)),
        r"context of shape \(rows, 1\) \(context_dim columns\), got shape \(50, 2\)",
    ),
    "context-besides-loader": (
        lambda: fit(flow(2, 1), DataLoader(normal(50, 2)), context=normal(50, 1)),
        r"context was given besides a DataLoader; let the loader yield pairs",
    ),
    "validation-context-alone": (
        lambda: fit(flow(2, 1), normal(50, 2), context=normal(50, 1), validation_context=normal(9, 1)),
        "validation_context was given without validation",
    ),
    "support": (
        lambda: fit(positive(), put(normal(50, 2).exp(), [3, 5], -1.0)),
        r"2 of 50 rows of data \(rows 3, 5\) lie outside of the flow's support",
    ),
    "support-edge": (lambda: fit(positive(), put(normal(50, 2).exp(), [7], 0.0)), r"1 of 50 rows of data \(row 7\)"),
    "support-of-validation": (
        lambda: fit(positive(), normal(50, 2).exp(), normal(50, 2)),
        "rows of validation .* lie outside",
    ),
    "support-of-a-loader": (
        lambda: fit(positive(), DataLoader(-normal(50, 2).exp())),
        "a batch of data .* lie outside",
    ),
    "support-untold": (lambda: fit(shifted(), normal(50, 2).exp()), "rows of data .* lie outside"),
    "simplex": (
        lambda: fit(pf.Flow([*pf.maf(2, **SMALL), biject_to(constraints.simplex)]), normal(50, 3).exp()),
        "50 of 50 rows .*Simplex",
    ),
    "frozen": (lambda: fit(flow().requires_grad_(False), normal(50, 2)), "trainable parameters.*requires_grad_"),
    "unsummed": (lambda: fit(Unsummed(), normal(50, 2), batch_size=9), r"log_prob of Unsummed .*got shape \(5, 2\)"),
    "detached": (lambda: fit(Detached(), normal(50, 2)), "does not depend on any parameter"),
    "foreign-optimizer": (
        lambda: fit(flow(), normal(50, 2), optimizer=torch.optim.SGD(flow().parameters(), lr=0.1)),
        "holds none of the flow's trainable parameters",
    ),
    "lr": (lambda: fit(flow(), normal(50, 2), lr=0.0), "expected lr > 0, got 0.0"),
    "lr-nan": (lambda: fit(flow(), normal(50, 2), lr=float("nan")), "expected lr > 0, got nan"),
    "epochs": (lambda: fit(flow(), normal(50, 2), max_epochs=0), "max_epochs to be an integer >= 1, got 0"),
    "batch": (lambda: fit(flow(), normal(50, 2), batch_size=2.5), "batch_size to be an integer >= 1, got 2.5"),
    "fraction": (lambda: fit(flow(), normal(50, 2), validation_fraction=1.0), "0 <= validation_fraction < 1"),
    "decay": (lambda: fit(flow(), normal(50, 2), weight_decay=-0.1), "weight_decay >= 0, got -0.1"),
    "schedule": (lambda: fit(flow(), normal(50, 2), schedule="linear"), "schedule to be .*plateau.*got 'linear'"),
}
TYPE_ERRORS = {
    "words": (lambda: fit(flow(), [["a", "b"]]), "a NumPy array of numbers or a DataLoader, got list of dtype <U1"),
    "dataset": (lambda: fit(flow(), TensorDataset(normal(50, 2))), "got TensorDataset; a Dataset goes in a DataLoader"),
    "complex": (lambda: fit(flow(), normal(50, 2) + 1j), "real numbers, got torch.complex64"),
    "triples": (
        lambda: fit(flow(), DataLoader(TensorDataset(*(normal(50, 2) for _ in range(3))))),
        r"yield x, \(x,\) or \(x, context\), got a list of 3",
    ),
    "mapping": (lambda: fit(flow(), DataLoader([{"x": 1.0}] * 50)), r"yield x, .*, got a dict"),
    "distribution": (lambda: fit(flow()(), normal(50, 2)), "got FlowDistribution; .*the module that made it"),
    "transform": (lambda: fit(ExpTransform(), normal(50, 2)), r"got ExpTransform; put .* in a Chain"),
    "module": (lambda: fit(nn.Linear(2, 2), normal(50, 2)), r"got Linear; .*needs a method log_prob"),
    "optimizer": (lambda: fit(flow(), normal(50, 2), optimizer="adam"), "torch optimizer, .* got str"),
    "optimizer-factory": (lambda: fit(flow(), normal(50, 2), optimizer=lambda p: None), "got NoneType"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match="(?s)" + message) as error:
        call()
    assert str(error.value).startswith("fit_density: ")


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_type_errors(name):
    call, message = TYPE_ERRORS[name]
    refuses(TypeError, "(?s)" + message, call)


def test_refusal_leaves_the_flow_as_it_was():
    given = flow()
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(ValueError):
        fit(given, torch.zeros(50, 2))
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def test_data_are_not_written_to():
    data, context = torch.randn(100, 2), torch.randn(100, 1)
    copies = data.clone(), context.clone()
    fit(flow(2, 1), data, context=context, batch_size=20)
    assert torch.equal(data, copies[0]) and torch.equal(context, copies[1])
    frozen = np.random.default_rng(0).normal(size=(100, 2))
    frozen.flags.writeable = False
    fit(flow(), frozen)
    leaf = data.clone().requires_grad_()
    fit(flow(), leaf)
    assert leaf.grad is None


# Nearly degenerate is not degenerate


def test_close_to_dependent_is_accepted():
    a = torch.randn(500, 1)
    near, once_apart = torch.cat([a, a + 1e-4 * torch.randn(500, 1)], 1), put(torch.cat([a, a], 1), [499], 0.123)
    for data in (near, once_apart, torch.cat([a, a.square()], 1)):
        assert math.isfinite(fit(flow(), data).validation)


def test_constant_contexts_are_harmless():
    context = torch.cat([torch.ones(100, 1), torch.randn(100, 1)], 1)
    found = fit(flow(2, 2), torch.randn(100, 2), context=context)
    assert found.distribution.context_scale[0] == 1
    assert found.distribution(torch.tensor([1.0, 0.0])).sample().isfinite().all()


# Spikes


def grid(rows=400, step=0.5):
    return torch.cat([torch.randn(rows, 1), (torch.randn(rows, 1) / step).round() * step], 1)


def half_zero(rows=400):
    data = torch.randn(rows, 2)
    data[: rows // 2, 0] = 0.0
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (grid(), r"column 1 is discrete: .*\(dequantize; the smallest steps are 0.5\)"),
        (half_zero(), r"many rows share.*: 0 in \d+ of 360 rows of column 0; .*two-part"),
        (DataLoader(grid(), batch_size=50), "column 1 is discrete"),
        (torch.randint(0, 5, (400, 2)), "columns 0, 1 are discrete: .*1, 1"),
    ],
    ids=["grid", "half-zero", "loader", "integers"],
)
def test_spikes_are_warned_of_where_the_call_is(data, message):
    with pytest.warns(UserWarning, match=message) as caught:
        pf.fit_density(flow(), data, progress=False, max_epochs=1)
    assert caught[0].filename == __file__


def test_no_warning_without_need():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(flow(), torch.randn(400, 2).mul(100).round())  # a fine grid
        fit(flow(), grid(90))  # too few rows to tell
        fit(Free(), torch.randint(0, 2, (400, 2)))  # no flow
        fit(flow(), grid() + torch.rand(400, 2) / 2)  # dequantized
    assert not caught


# Moments


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_moments_of_pieces(pieces):
    data = 1e5 + torch.randn(999, 2, 3, dtype=torch.float64)
    survey = Survey()
    for piece in data.tensor_split(pieces):
        survey.add(piece)
    loc, scale = survey.loc_and_scale()
    torch.testing.assert_close(loc, data.mean(0).cpu(), rtol=1e-13, atol=0)
    torch.testing.assert_close(scale, data.std(0).cpu(), rtol=1e-9, atol=0)


def test_defaults_by_the_amount_of_data():
    settings = Settings(
        validation_fraction=0.1,
        standardize=None,
        batch_size=None,
        max_epochs=None,
        steps=None,
        seconds=None,
        lr=1e-3,
        schedule="plateau",
        patience=None,
        weight_decay=0.0,
        clip_norm=None,
        average=0.0,
        checkpoint_every=1,
        compile=False,
        seed=0,
    )
    batches = [settings.batch_size_for(rows) for rows in (20, 500, 5000, 10**5, 10**7)]
    assert batches == sorted(batches) and batches[0] == 20 < batches[1] < batches[-1] == batches[-2]
    for rows, size in zip((20, 500, 5000, 10**5, 10**7), batches, strict=True):
        sizes = settings.sizes(size, -(-rows // size), rows)
        assert not 64 < size < 1024 or rows / 64 < size < rows / 16
        assert sizes.patience >= 5 and 20 <= sizes.max_epochs <= 1000
        assert sizes.total_steps == sizes.max_epochs * -(-rows // size)
        wanted = min(max(rows, 100), 600)  # steps without improvement
        assert sizes.patience == 5 or wanted <= sizes.patience * -(-rows // size) < wanted + -(-rows // size)


def test_held_out_copies_of_training_rows_are_told():
    x = torch.randn(300, 2)
    with pytest.warns(UserWarning, match="100% of the held-out rows are copies of training rows, .*drop_duplicates"):
        fit(flow(), x.repeat(4, 1), folds=1)
    with pytest.warns(UserWarning, match="50% of the held-out rows"):
        fit(flow(), x, torch.cat((x[:50], torch.randn(50, 2))))


@pytest.mark.parametrize(
    ("seen", "fresh", "share"),
    [
        ([torch.randn(4000, 2).mul(50).round()], [torch.randn(500, 2).mul(50).round()], 0.0),
        ([torch.randint(2, (400, 2))], [torch.randint(2, (40, 2))], 0.0),
        ([torch.randn(400, 2).clip(min=0.0)], [torch.randn(100, 2).clip(min=0.0)], 0.0),
        ([torch.arange(4000.0)[:, None]], [torch.arange(50.0)[:, None]], 0.0),  # one number cannot tell
        (2 * [torch.arange(4000.0)[:, None]], 2 * [torch.arange(50.0)[:, None]], 1.0),  # with its context it can
        ([torch.arange(4000.0)[:, None], torch.randn(4000, 1)], 2 * [torch.arange(50.0)[:, None]], 0.0),
        (
            [torch.stack((torch.arange(4000.0), torch.zeros(4000)), 1)],
            [torch.stack((torch.arange(3990.0, 4010), -torch.zeros(20)), 1)],
            0.5,
        ),
    ],
    ids=["rounded", "coins", "spike", "one-number", "context", "other-context", "half"],
)
def test_share_of_copies(seen, fresh, share):
    assert copied(seen, fresh) == share


def test_rows_with_labels_in_another_order_are_refused():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.random.default_rng(0).normal(size=(50, 2)), columns=["x", "y"])
    x, turned = frame[["x"]], frame[["y"]].iloc[::-1]
    message = r"context in the order of the rows of data, .*same labels.*; give context.loc\[data.index\]"
    refuses(ValueError, message, fit, flow(1, 1), x, context=turned, folds=1)
    refuses(ValueError, "weights in the order of", fit, flow(), frame, weights=turned["y"].abs(), folds=1)
    given = fit(flow(1, 1), x, context=turned.loc[x.index], weights=turned["y"].abs().to_numpy(), folds=1)
    refuses(ValueError, message, given.log_prob, x, turned)
    moved = turned.loc[x.index].set_axis(range(7, 57))  # other labels say nothing
    assert torch.equal(given.log_prob(x, moved), given.log_prob(x.to_numpy(), moved.to_numpy()))
