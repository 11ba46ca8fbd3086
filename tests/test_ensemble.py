"""Ensembles: the mean density of several, its draws, and fits that hold out each row once."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import shake

import pyro_flows as pf

pytestmark = pytest.mark.filterwarnings("ignore:fit_density")


def flows(count=3, context_dim=0, dim=2):
    torch.manual_seed(0)
    return [pf.Flow(shake(pf.maf(dim, hidden_dims=(8,), context_dim=context_dim), 0.3)) for _ in range(count)]


@pytest.mark.parametrize("context_dim", [0, 2])
def test_density_is_the_mean_of_densities(context_dim):
    members = flows(context_dim=context_dim)
    ensemble = pf.distributions.Ensemble(members)
    context = (torch.randn(7, 2),) if context_dim else ()
    x = torch.randn(7, 2)
    expected = torch.stack([each.log_prob(x, *context).exp() for each in members]).mean(0).log()
    torch.testing.assert_close(ensemble.log_prob(x, *context), expected)
    torch.testing.assert_close(ensemble(*context).log_prob(x), expected)
    assert (len(ensemble), ensemble.event_shape, ensemble.context_dim) == (3, (2,), context_dim)
    nested = pf.distributions.Ensemble([ensemble, pf.distributions.Ensemble(members)])
    torch.testing.assert_close(nested.log_prob(x, *context), expected)


def test_gradients_reach_all_members_and_far_values_stay_finite():
    ensemble = pf.distributions.Ensemble(flows())
    ensemble.log_prob(torch.full((1, 2), 1e4)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ensemble.parameters())


@pytest.mark.full
def test_draws_come_from_all_members():
    """Three normals far apart: their shares, and their order, are random."""
    members = [pf.Flow(pf.maf(1, hidden_dims=(4,), num_layers=1)) for _ in range(3)]
    placed = [pf.Flow([each.chain, dist.transforms.AffineTransform(100.0 * k, 1.0)]) for k, each in enumerate(members)]
    torch.manual_seed(0)
    drawn = pf.distributions.Ensemble(placed).sample((3000,))[:, 0]
    nearest = (drawn / 100).round()
    assert set(nearest.tolist()) == {0.0, 1.0, 2.0}
    counts = nearest.long().bincount()
    assert ((counts - 1000).abs() < 4 * math.sqrt(3000 * 2 / 9)).all()
    same = (nearest[1:] == nearest[:-1]).double().mean()
    assert abs(same - 1 / 3) < 0.05


def test_shapes_contexts_and_pyro():
    ensemble = pf.distributions.Ensemble(flows(context_dim=2))
    assert ensemble.sample((4,), torch.randn(5, 2)).shape == (4, 5, 2)
    assert ensemble.sample((), torch.randn(1, 5, 2)).shape == (5, 2)
    made = pf.distributions.Ensemble(flows())
    assert made.sample().shape == (2,) and made.sample((0,)).shape == (0, 2)
    with pyro.plate("rows", 6):
        assert pyro.sample("x", made()).shape == (6, 2)
    assert (
        pyro.poutine.trace(lambda: pyro.sample("y", made(), obs=torch.zeros(2))).get_trace().log_prob_sum().isfinite()
    )
    own = pyro.sample("z", ensemble(torch.randn(5, 2)).expand([3, 5]))
    assert own.shape == (3, 5, 2)


def test_contexts_reach_their_rows():
    """Each draw has the context of its own place."""
    ensemble = pf.distributions.Ensemble([pf.Flow(pf.maf(1, hidden_dims=(8,), context_dim=1)) for _ in range(2)])
    for member in ensemble.members:  # x = z / 100 + context
        member.chain = pf.Chain([dist.transforms.AffineTransform(0.0, 0.01, event_dim=1), Shifted()])
    context = torch.arange(50.0).unsqueeze(-1)
    drawn = ensemble.sample((3,), context)
    assert (drawn - context).abs().max() < 0.1


class Shifted(pf.FlowTransform):
    def __init__(self):
        super().__init__(1, 1)

    def forward_and_ladj(self, x, context=None):
        return x + context, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y - context, y.new_zeros(y.shape[:-1])


def test_support_dtype_copies_and_state():
    inside = pf.distributions.Ensemble([pf.Flow([each.chain, dist.transforms.ExpTransform()]) for each in flows()])
    assert not inside.support.check(torch.tensor([-1.0, 1.0]))
    refuses(ValueError, "within", inside().log_prob, torch.tensor([-1.0, 1.0]))
    ensemble = pf.distributions.Ensemble(flows()).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    assert ensemble.sample((3,)).dtype == torch.float64
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        torch.testing.assert_close(other.log_prob(x), ensemble.log_prob(x))
    fresh = pf.distributions.Ensemble(flows()).double()
    shake(fresh, 1.0)
    fresh.load_state_dict(ensemble.state_dict())
    torch.testing.assert_close(fresh.log_prob(x), ensemble.log_prob(x))


def test_discrete_members():
    ensemble = pf.distributions.Ensemble([pf.MADE(3, "bernoulli", hidden_dims=(8,)) for _ in range(2)])
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    assert ensemble.log_prob(x).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert ensemble.support.check(ensemble.sample((9,))).all()


def test_bad_members():
    refuses(ValueError, "at least one member", pf.distributions.Ensemble, [])
    refuses(TypeError, "modules with log_prob", pf.distributions.Ensemble, [torch.nn.Linear(2, 2)])
    refuses(ValueError, "one event shape", pf.distributions.Ensemble, [*flows(1), *flows(1, dim=3)])
    refuses(ValueError, "one event shape", pf.distributions.Ensemble, [*flows(1), *flows(1, context_dim=2)])
    refuses(ValueError, "call it with a context", pf.distributions.Ensemble(flows(context_dim=2)).sample)


def rows(count=40):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3)).cumsum(1)


def fit(data=None, **options):
    torch.manual_seed(0)
    flow = pf.maf(2, hidden_dims=(8,), num_layers=1)
    return pf.fit_density(flow, rows() if data is None else data, **{"steps": 20, "progress": False, **options})


def test_folds_hold_out_each_row_once():
    data = rows(100)
    data[:, 1] += 3 * data[:, 0] ** 2
    found = fit(data, folds=4, steps=60, lr=0.03)
    assert len(found.members) == 4 and isinstance(found.distribution, pf.distributions.Ensemble)
    assert "4 members" in repr(found)
    x = data[:5]
    expected = torch.stack([each.log_prob(x).exp() for each in found.members]).mean(0).log()
    torch.testing.assert_close(found.log_prob(x), expected)
    torch.testing.assert_close(found.distribution.log_prob(x), expected)
    # 25 rows have each member's own held-out score.
    held_out = [each.validation for each in found.members]
    assert found.validation == pytest.approx(sum(held_out) / 4) and len(set(held_out)) == 4
    states = [torch.cat([p.reshape(-1) for p in each.flow.parameters()]) for each in found.members]
    assert all(not torch.equal(states[0], other) for other in states[1:])
    assert len(found.history["epoch"]) == sum(len(each.history["epoch"]) for each in found.members)


def test_folds_repeat_and_resume(tmp_path):
    first, path = fit(folds=3), tmp_path / "fit.pt"
    again = fit(folds=3, checkpoint=path)
    assert first.validation == again.validation
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fit.pt.0", "fit.pt.1", "fit.pt.2"]
    (tmp_path / "fit.pt.2").unlink()
    assert fit(folds=3, checkpoint=path).validation == first.validation


def test_folds_with_contexts_arrays_and_discrete_columns():
    torch.manual_seed(0)
    context = torch.randn(30, 1)
    flow = pf.maf(2, hidden_dims=(8,), num_layers=1, context_dim=1)
    found = pf.fit_density(flow, rows(30).numpy(), context=context.numpy(), folds=3, steps=10, progress=False)
    assert found.sample((2,), context[:3]).shape == (2, 3, 2)
    bits = torch.randint(2, (60, 4))
    made = pf.fit_density(pf.MADE(4, "bernoulli", hidden_dims=(8,)), bits, folds=2, steps=10, progress=False)
    assert made.log_prob(bits).shape == (60,)


def test_an_interrupted_fold_leaves_the_members_before_it(monkeypatch):
    from pyro_flows.infer.density.loop import DensityTraining

    train, calls = DensityTraining.train, []

    def interrupt(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        train(self)

    monkeypatch.setattr(DensityTraining, "train", interrupt)
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(folds=4)
    assert len(stop.value.fit.members) == 2


def test_folds_that_cannot_be():
    refuses(ValueError, "folds", fit, folds=0)
    refuses(ValueError, "from 2 folds", fit, folds=41)
    refuses(ValueError, "without validation", fit, folds=3, validation=rows())
    loader = torch.utils.data.DataLoader(rows(), batch_size=10)
    refuses(ValueError, "data must be rows", fit, loader, folds=3)


@pytest.mark.full
def test_folds_share_the_seconds():
    found = fit(folds=3, steps=None, seconds=3.0)
    assert sum(each.history["seconds"][-1] for each in found.members) < 6.0
    assert {each.stopped for each in found.members} <= {"seconds", "patience"}
