"""Flow matching: its loss and minimiser in closed form, its pairs, what it trains and what it refuses."""

import itertools
import math

import matplotlib
import matplotlib.pyplot as plt
import pyro.distributions as dist
import pytest
import torch
from asserts import refuses
from cases import Field, full_but, seeded, shake
from torch import nn
from torch.distributions import ExpTransform
from torch.utils.data import DataLoader, TensorDataset

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.infer import FlowMatching, fit_density
from pyro_flows.infer.density.matching import Matching, assigned, matched_parts
from pyro_flows.infer.density.settings import Schedule
from pyro_flows.infer.machine.randomness import own_randomness
from pyro_flows.transforms.continuous.layer import collect_penalties

MEAN = torch.tensor([1.0, -2.0], dtype=torch.double)
TRIL = torch.tensor([[0.5, 0.0], [0.8, 1.5]], dtype=torch.double)
GAUSSIAN = dist.MultivariateNormal(MEAN, scale_tril=TRIL)
SMALL = {"hidden_dims": (8,)}
FAST = {"progress": False, "max_epochs": 2, "batch_size": 50}


def match(flow, data, objective="flow_matching", **options):
    return fit_density(flow, data, objective=objective, **{**FAST, **options})


def cloud(rows=200, seed=3, columns=2):
    generator = seeded(seed)
    first = torch.randn(rows, columns, generator=generator)
    return 100 + 5 * first**2 + torch.randn(rows, columns, generator=generator)


def affine(matrix, shift):
    return Field(lambda t, x, matrix, shift: x @ matrix.T + shift, matrix, shift)


class Gaussians(nn.Module):
    """The field that is best for independent pairs from N(0, 1) to N(m, L L')."""

    def __init__(self, mean, tril):
        super().__init__()
        self.mean, self.tril = nn.Parameter(mean.clone()), nn.Parameter(tril.clone())

    def forward(self, t, x):
        covariance, eye = self.tril @ self.tril.T, torch.eye(len(self.mean), dtype=x.dtype)
        moved = t * covariance - (1 - t) * eye
        spread = t**2 * covariance + (1 - t) ** 2 * eye
        return self.mean + (x - t * self.mean) @ torch.linalg.solve(spread, moved)


class Rowwise(nn.Module):
    """Takes a time for each row, which vmap could not give it."""

    rowwise_times = True

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, t, x):
        if (t > 2).any():
            return x
        return self.linear(x) * torch.cos(t).reshape(-1, *(1,) * (x.dim() - 1))


def matching(field, settings=None, size=2, **options):
    flow = pf.Flow(pf.Continuous(size, field, rtol=1e-8, atol=1e-8, **options))
    return Matching(settings or FlowMatching(), flow, seed=5, held_out=10**6)


# The loss


def affine_loss(matrix, shift, t):
    """The expected loss of the field A z + b at a time: that of (t A - 1) x1 + ((1 - t) A + 1) x0 + b."""
    eye = torch.eye(2, dtype=torch.double)
    data, base = t * matrix - eye, (1 - t) * matrix + eye
    constant = data @ MEAN + shift
    return ((data @ TRIL).square().sum() + base.square().sum() + constant.square().sum()) / 2


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_loss_of_a_known_field(time):
    matrix, shift = torch.randn(2, 2, dtype=torch.double), torch.randn(2, dtype=torch.double)
    aim = matching(affine(matrix, shift), FlowMatching(time=time))
    data = GAUSSIAN.sample((200_000,))
    with torch.no_grad():
        got = -aim.scores(data, None)
    u = (torch.arange(1000, dtype=torch.double) + 0.5) / 1000
    times = u if time == "uniform" else torch.sigmoid(dist.Normal(0.0, 1.0).icdf(u))
    want = torch.stack([affine_loss(matrix, shift, t) for t in times]).mean()
    assert abs(got.mean() - want) < 5 * got.std() / math.sqrt(len(got))
    uniform = torch.stack([affine_loss(matrix, shift, t) for t in u]).mean()
    assert (abs(uniform - want) > 10 * got.std() / math.sqrt(len(got))) == (time == "logit_normal")


def test_noise_is_added_to_the_data():
    matrix, shift = torch.randn(2, 2, dtype=torch.double), torch.randn(2, dtype=torch.double)
    data = GAUSSIAN.sample((200_000,))
    with torch.no_grad():
        plain, noisy = (-matching(affine(matrix, shift), FlowMatching(sigma=s)).scores(data, None) for s in (0.0, 0.7))
    u = (torch.arange(1000, dtype=torch.double) + 0.5) / 1000
    more = torch.stack([(t * matrix - torch.eye(2, dtype=torch.double)).square().sum() / 2 for t in u]).mean() * 0.49
    assert abs(noisy.mean() - plain.mean() - more) < 5 * (noisy.var() + plain.var()).sqrt() / math.sqrt(len(data))


def test_best_field_takes_the_base_to_the_data():
    best = matching(Gaussians(MEAN, TRIL))
    data = GAUSSIAN.sample((50,))
    torch.testing.assert_close(best.density.log_prob(data), GAUSSIAN.log_prob(data), atol=1e-5, rtol=1e-6)
    data = GAUSSIAN.sample((20_000,))
    with best.fixed():
        least = best.scores(data, None).mean()
    (gradient,) = torch.autograd.grad(least, best.continuous.field.module.mean, retain_graph=True)
    assert gradient.abs().max() < 0.05
    for _ in range(3):  # any other field is worse
        other = matching(Gaussians(MEAN + 0.3 * torch.randn(2).double(), TRIL + 0.3 * torch.randn(2, 2).double()))
        with other.fixed():
            assert other.scores(data, None).mean() < least


@pytest.mark.full
@pytest.mark.parametrize("coupling", full_but(["independent", "optimal_transport"], "optimal_transport"))
def test_gaussian_is_recovered(coupling):
    torch.manual_seed(1)
    data, test = GAUSSIAN.sample((2000,)), GAUSSIAN.sample((2000,))
    flow = pf.cnf(2, field="concatsquash", hidden_dims=(24,)).double()
    settings = FlowMatching(coupling, pairs=1 if coupling == "optimal_transport" else None)
    found = match(
        flow, data, settings, max_epochs=20, batch_size=100, lr=0.02, schedule="cosine", validation_fraction=0.02
    )
    gap = (GAUSSIAN.log_prob(test).cpu() - found.log_prob(test)).mean()
    assert -0.01 < gap < 0.03
    draws = found.distribution.sample((4000,))
    torch.testing.assert_close(draws.mean(0), MEAN, atol=0.15, rtol=0)
    torch.testing.assert_close(draws.T.cov(), GAUSSIAN.covariance_matrix, atol=0.25, rtol=0)


def test_gradient_is_that_of_finite_differences():
    flow = shake(pf.cnf(2, hidden_dims=(4,), context_dim=1).double(), 0.5)
    aim = Matching(FlowMatching(sigma=0.1, pairs=3), pf.Flow(flow).train(), seed=5, held_out=0)
    data, context = cloud(20).double() / 50, torch.randn(20, 1, dtype=torch.double)

    def loss():
        with aim.fixed():
            return -aim.scores(data, context).mean()

    loss().backward()
    for parameter in flow.parameters():
        for k in range(min(3, parameter.numel())):
            flat = parameter.data.view(-1)
            kept, step, ends = flat[k].item(), 1e-5, []
            for end in (kept + step, kept - step):
                flat[k] = end
                ends.append(loss().item())
            flat[k] = kept
            assert abs((ends[0] - ends[1]) / (2 * step) - parameter.grad.view(-1)[k]) < 1e-7


def test_times_are_stratified():
    times = FlowMatching().times(torch.empty(1000, 2, dtype=torch.double))
    assert times.shape == (1000,) and times.dtype is torch.double
    ordered = times.sort().values * 1000
    assert ((ordered - torch.arange(1000)) >= 0).all() and ((ordered - torch.arange(1000)) < 1).all()
    assert not torch.equal(times, times.sort().values)
    logits = FlowMatching(time="logit_normal").times(torch.empty(4001, 1, dtype=torch.double)).logit()
    assert logits.median().abs() < 1e-2 and abs(logits.std() - 1) < 2e-2
    assert FlowMatching().times(torch.empty(0, 2)).shape == (0,)


# Pairs


def test_assignment_is_the_best_of_all():
    for event in ((2,), (1, 2, 2)):
        x0, x1 = torch.randn(5, *event), 3 + 2 * torch.randn(5, *event)
        costs = {order: (x0[list(order)] - x1).square().sum().item() for order in itertools.permutations(range(5))}
        best = min(costs, key=costs.get)
        assert torch.equal(assigned(x0, x1), x0[list(best)])


def test_assignment_uses_each_draw_once_in_groups():
    x0, x1 = torch.randn(1000, 2), torch.randn(1000, 2)
    got = assigned(x0, x1)
    assert torch.equal(got[got[:, 0].argsort()], x0[x0[:, 0].argsort()])
    assert (got - x1).square().sum() < 0.2 * (x0 - x1).square().sum()
    for group in (slice(0, 250), slice(750, 1000)):
        assert torch.equal(got[group], assigned(x0[group], x1[group]))
    assert assigned(x0[:0], x1[:0]).shape == (0, 2)


class Counting(Rowwise):
    def forward(self, t, x):
        self.rows = len(x)
        return super().forward(t, x)


@pytest.mark.parametrize(
    "event, rows, pairs, training, held_out",
    [(2, 64, None, 8, 16), (2, 20, None, 16, 16), (2, 600, None, 1, 6), (2, 64, 3, 3, 16), (1024, 8, None, 4, 16)],
)
def test_pairs_of_a_row(event, rows, pairs, training, held_out):
    """As many as make 512 pairs or 2^15 numbers in a step, and 4096 or 2^18 in a validation, but 16 at most."""
    field = Counting(event)
    aim = Matching(FlowMatching(pairs=pairs), pf.Flow(pf.Continuous(event, field)), seed=5, held_out=rows)
    data = torch.randn(rows, event)
    for train, count in ((True, training), (False, held_out)):
        aim.density.train(train)
        assert aim.scores(data, None).shape == (rows,)
        assert field.rows == count * rows


@torch.no_grad()
def test_a_score_is_that_of_its_own_row():
    flow = shake(pf.cnf(2, hidden_dims=(4,), context_dim=1), 0.5)
    aim = Matching(FlowMatching(pairs=3), pf.Flow(flow).train(), seed=5, held_out=0)
    data, context = torch.randn(5, 2), torch.randn(5, 1)

    def scores():
        with aim.fixed():
            return aim.scores(data, context)

    before = scores()
    for given in (data, context):
        given[3] += 1
        after = scores()
        assert (after != before).nonzero().flatten().tolist() == [3]
        before = after


def test_fixed_pairs_are_not_those_that_training_begins_with():
    aim = matching(affine(torch.eye(2), torch.zeros(2)))
    with aim.fixed():
        held_out = torch.rand(4)
    with own_randomness(aim.device, aim.seed):
        assert not torch.equal(torch.rand(4), held_out)


def test_optimal_transport_lowers_the_loss():
    data = cloud(300)
    found = {
        c: match(pf.cnf(2, **SMALL), data, FlowMatching(c), max_epochs=5) for c in ("independent", "optimal_transport")
    }
    losses = {name: fit.history["validation"][-1] for name, fit in found.items()}
    assert losses["optimal_transport"] > 0.5 * losses["independent"]


def test_gains_count_from_a_ten_thousandth():
    schedule = Schedule("constant", 1, Matching.notable)
    assert [schedule.judge(score) for score in (-1.0, -0.9998, -0.99975)] == ["go", "go", "stop"]


def test_penalties_have_no_part_in_matching():
    histories = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        histories.append(match(pf.cnf(2, kinetic=weight, jacobian=weight, **SMALL), cloud()).history["train"])
    assert histories[0] == histories[1]


# What is trained


def test_other_parts_are_gone_through_exactly():
    """The scores are those of a field alone, with draws and rows taken to its two ends by hand."""
    field = shake(pf.cnf(2, **SMALL), 0.5)
    front = pf.LULinear(2)
    back = pf.Chain([pf.Standardization(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])), ExpTransform()])
    for part in (front, back):
        shake(part, 0.3).requires_grad_(False)
    flow = pf.Flow(pf.Chain([front, pf.Chain([field]), back]), dist.StudentT(8.0, torch.zeros(2), 1.0).to_event(1))
    before, middle, after = matched_parts(flow, FlowMatching())
    assert [*before, *after] == [front, *back] and middle is field[0]
    data = torch.rand(50, 2) + 0.5
    aim = Matching(FlowMatching(pairs=1), flow, seed=5, held_out=10**6)
    with aim.fixed():
        got = aim.scores(data, None)
    with aim.fixed():
        x0 = front(flow.base().sample((50,)))
        x1 = back.inv(data)
        t = FlowMatching().times(x1)
        z = (1 - t.unsqueeze(1)) * x0 + t.unsqueeze(1) * x1
        v = torch.cat([middle.field(time, row[None]) for time, row in zip(t, z, strict=True)])
        want = -(v - (x1 - x0)).square().mean(1)
    torch.testing.assert_close(got, want)


def test_only_the_field_moves_and_data_keep_their_units():
    data = cloud()
    chain = pf.Chain([pf.ActNorm(2).requires_grad_(False), *pf.cnf(2, **SMALL)])
    found = match(chain, data)
    kinds = [type(part).__name__ for part in found.distribution.chain]
    assert kinds == ["Coloring", "ActNorm", "Continuous", "Standardization"]
    assert found.objective == "flow_matching" and not found.flow.training
    want = found.distribution.log_prob(data).detach()
    torch.testing.assert_close(found.log_prob(data), want.cpu())
    assert math.isfinite(found.validation) and "nats" in repr(found)
    assert max(found.history["validation"]) == found.history["validation"][found.best_epoch - 1]
    assert -10 < found.history["train"][0] < 0
    positive = pf.Chain([*pf.cnf(2, **SMALL), ExpTransform()])
    found = match(positive, data.abs())
    assert (found.distribution.sample((50,)) > 0).all()


def test_validation_is_the_likelihood_of_held_out_rows():
    data, held_out = cloud(), cloud(80, seed=4)
    found = fit_density(pf.cnf(2, **SMALL), data, held_out, objective="flow_matching", **FAST)
    assert abs(found.validation - found.log_prob(held_out).double().mean()) < 1e-4
    without = match(pf.cnf(2, **SMALL), data, validation_fraction=0)
    assert math.isnan(without.validation) and "negative matching loss" in repr(without) and "nats" not in repr(without)
    assert without.best_epoch == 1 + max(range(2), key=without.history["train"].__getitem__)
    plain = fit_density(pf.realnvp(2, num_layers=1, **SMALL), data, **FAST)
    assert plain.objective == "likelihood" and "nats" in repr(plain)


def test_history_is_drawn_in_its_own_units():
    matplotlib.use("Agg")
    for objective, label in (
        ("flow_matching", "negative matching loss"),
        ("likelihood", "log-likelihood (nats per row)"),
    ):
        found = match(pf.cnf(2, solver="rk4", solver_steps=2, **SMALL), cloud(), objective)
        axes = plots.history(found)
        assert axes.get_ylabel() == label
        plt.close(axes.figure)


def test_held_out_scores_are_a_function():
    """With a rate of nothing the score of each epoch is the same, and so is that of the same flow in another fit."""
    flow = shake(pf.cnf(2, **SMALL), 0.5)
    options = {"lr": 1e-30, "max_epochs": 3, "average": 0.0}
    scores = match(flow, cloud(), **options).history["validation"]
    assert len(set(scores)) == 1
    assert match(flow, cloud(), **options).history["validation"] == scores
    assert match(flow, cloud(), seed=1, **options).history["validation"] != scores


@pytest.mark.parametrize("kind", ["loader", "images", "given", "rowwise", "series"])
def test_kinds_of_data_and_fields(kind):
    data = cloud()
    if kind == "loader":
        data = (data - 100) / 5
        loader = DataLoader(TensorDataset(data[:150]), batch_size=40)
        settings = FlowMatching("optimal_transport", "logit_normal", 0.01)
        found = fit_density(pf.cnf(2, **SMALL), loader, data[150:], objective=settings, progress=False, max_epochs=2)
        assert found.history["step"] == [4, 8]
    elif kind in ("images", "series"):
        event = (1, 4, 4) if kind == "images" else (2, 5)
        flow = pf.cnf(event, field="conv", hidden_dims=(4,), solver="rk4", solver_steps=2)
        found = match(flow, torch.randn(100, *event), FlowMatching(coupling="optimal_transport"))
        assert found.distribution.sample((3,)).shape == (3, *event)
    else:
        field = Rowwise(2) if kind == "rowwise" else affine(2 * torch.eye(2), torch.ones(2))
        found = match(pf.cnf(2, field=field), data, max_epochs=10)
        assert found.history["validation"][-1] > found.history["validation"][0]
    assert math.isfinite(found.validation)


def test_conditional_density():
    torch.manual_seed(0)
    context = 1000 + 50 * torch.randn(3000, 1)
    data = torch.cat([0.1 * context, -0.2 * context], -1) + torch.randn(3000, 2) * torch.tensor([2.0, 3.0])
    flow = pf.cnf(2, context_dim=1, hidden_dims=(16, 16))
    options = {"max_epochs": 25, "batch_size": 100, "lr": 1e-2, "schedule": "cosine"}
    found = match(flow, data[:2500], context=context[:2500], **options)
    exact = dist.Normal(torch.cat([0.1 * context, -0.2 * context], -1), torch.tensor([2.0, 3.0])).to_event(1)
    gap = (exact.log_prob(data).cpu() - found.log_prob(data, context))[2500:].mean()
    assert -0.05 < gap < 0.1


@pytest.mark.parametrize("other", [False, True], ids=["default", "not-default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype, other, default_dtype):
    default_dtype(torch.float64 if (dtype is torch.float32) == other else torch.float32)
    flow = pf.Flow(pf.Chain([pf.cnf(2, context_dim=1, **SMALL).to(dtype)]))
    context = torch.randn(200, 1)
    found = match(flow, cloud(), FlowMatching(time="logit_normal", sigma=0.1), context=context)
    assert {p.dtype for p in found.distribution.parameters()} == {dtype}
    assert found.log_prob(cloud(), context).dtype is dtype
    match(
        pf.cnf(2, field=affine(torch.eye(2, dtype=dtype), torch.zeros(2, dtype=dtype))),
        cloud(),
        FlowMatching("optimal_transport"),
    )


# Penalties of the likelihood


@pytest.mark.parametrize("weights", [{"kinetic": 3.0}, {"jacobian": 2.0}, {"kinetic": 3.0, "jacobian": 2.0}])
def test_penalties_are_in_the_loss_and_not_in_the_score(weights):
    data = cloud(100).double()
    options = {"hidden_dims": (4,), "gradient": "backprop", "solver": "rk4", "solver_steps": 4}
    torch.manual_seed(2)
    flow = shake(pf.cnf(2, **options, **weights).double(), 0.3)
    start = {name: value.clone() for name, value in flow.state_dict().items()}
    sgd = torch.optim.SGD(flow.parameters(), lr=1.0)
    settings = {"validation_fraction": 0, "batch_size": 100, "max_epochs": 1, "average": 0.0, "clip_norm": None}
    found = fit_density(flow, data, progress=False, optimizer=sgd, **settings)
    moved = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.load_state_dict(start)
    z = (data - found.distribution.chain[-1].loc) / found.distribution.chain[-1].scale
    with collect_penalties() as penalties:
        score = pf.Flow([found.distribution.chain[0], flow]).log_prob(z).mean()
    assert len(penalties.parts) == 1 and penalties.total() > 1e-3
    assert abs(found.history["train"][0] - (score - found.distribution.chain[-1].scale.log().sum())) < 1e-9
    flow.zero_grad()
    (penalties.total() - score).backward()
    for name, parameter in flow.named_parameters():
        torch.testing.assert_close(moved[name], start[name] - parameter.grad)


# Seeds and checkpoints


@pytest.mark.cpu("compares states of the CPU's generator")
def test_runs_are_reproducible_and_leave_the_generators_alone():
    made = []
    for _ in range(2):
        torch.manual_seed(len(made) + 5)
        state = torch.get_rng_state()
        flow = shake(pf.cnf(2, **SMALL), 0.0)
        before = torch.get_rng_state()
        flow.load_state_dict(made[0][1] if made else flow.state_dict())
        start = {name: value.clone() for name, value in flow.state_dict().items()}
        found = match(flow, cloud(), FlowMatching("optimal_transport", sigma=0.1))
        assert torch.equal(torch.get_rng_state(), before) and not torch.equal(before, state)
        made.append((found, start))
    first, second = (found for found, _ in made)
    assert first.history["train"] == second.history["train"] and first.validation == second.validation
    states = first.distribution.state_dict(), second.distribution.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_resumed_run_equals_one_that_never_stopped(tmp_path):
    def go(epochs, **options):
        torch.manual_seed(0)
        return match(pf.cnf(2, **SMALL), cloud(), **{"max_epochs": epochs, "average": 0.9, **options})

    path = tmp_path / "fit.pt"
    go(2, checkpoint=path)
    resumed, whole = go(5, checkpoint=path), go(5)
    for column in ("train", "validation", "lr"):
        assert resumed.history[column] == whole.history[column]
    assert (resumed.validation, resumed.best_epoch) == (whole.validation, whole.best_epoch)
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.distribution.parameters(), whole.distribution.parameters(), strict=True)
    )
    for objective in ("likelihood", FlowMatching(sigma=0.1)):
        with pytest.raises(ValueError, match=r"another settings: objective is FlowMatching\(.*sigma=0\.0"):
            go(5, checkpoint=path, objective=objective)


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"coupling": "ot"}, "expected coupling to be 'independent' or 'optimal_transport', got 'ot'"),
        ({"time": None}, "expected time to be 'uniform' or .*, got None"),
        ({"sigma": -0.1}, "expected sigma to be a number >= 0, got -0.1"),
        ({"sigma": True}, "expected sigma to be a number >= 0, got True"),
        ({"sigma": math.nan}, "expected sigma to be a number >= 0, got nan"),
        ({"sigma": "1"}, "expected sigma to be a number >= 0"),
        ({"pairs": 0}, "expected pairs to be an integer >= 1, got 0"),
        ({"pairs": 1.0}, "expected pairs to be an integer >= 1, got 1.0"),
    ],
)
def test_settings_are_checked(options, message):
    refuses(ValueError, message, FlowMatching, **options)


def learnt_base():
    return pf.Flow(pf.cnf(2, **SMALL), pf.DiagonalNormal(2, learnable=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: pf.maf(2, num_layers=1), r"exactly one Continuous part, e.g. pf.cnf\(2\), to train; got 0 of them"),
        (lambda: pf.Chain([*pf.cnf(2), *pf.cnf(2)]), "got 2 of them among .*objective='likelihood'"),
        (lambda: pf.Chain([pf.cnf(2).inv]), "one inside another part or an inverse"),
        (lambda: pf.Chain([pf.ActNorm(2), *pf.cnf(2)]), r"chain\.parts\.0\.loc.*freeze them \(part\.requires_grad_"),
        (learnt_base, r"parameters of the base or of other parts also want a gradient: base\."),
        (lambda: pf.cnf(2).requires_grad_(False), "it has no trainable parameters"),
        (lambda: pf.cnf(2, time_dependent=False), "needs a field that depends on time.*time_dependent=True"),
        (lambda: Scores(), "got a Scores, whose density is its own"),
    ],
)
def test_flows_that_cannot_be_matched(make, message):
    refuses(ValueError, message, match, make(), cloud())


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def log_prob(self, value):
        return -(value - self.loc).square().sum(-1)


def test_worded_errors():
    with pytest.raises(
        ValueError, match=r"objective to be 'likelihood', 'flow_matching' or a FlowMatching\(...\), got"
    ):
        match(pf.cnf(2), cloud(), "matching")
    refuses(ValueError, "expected objective to be", match, pf.cnf(2), cloud(), torch.zeros(2))
    with pytest.raises(ValueError, match=r"without regard to contexts.*take coupling='independent'"):
        match(pf.cnf(2, context_dim=1), cloud(), FlowMatching("optimal_transport"), context=torch.randn(200, 1))
    blind = Field(lambda t, x, matrix: x @ matrix * float(t), torch.eye(2))  # it asks for the value of the time
    with pytest.raises(ValueError, match=r"field Field: a time for each row .*\(.*\); make it .*rowwise_times = True"):
        match(pf.cnf(2, field=blind), cloud())
    boasts = Field(lambda t, x, matrix: x @ matrix * t, torch.eye(2))
    boasts.rowwise_times = True
    refuses(ValueError, "field Field: it says rowwise_times = True, but", pf.cnf, 2, field=boasts)


def test_what_is_not_finite_is_named():
    flow = pf.cnf(2, **SMALL)
    with torch.no_grad():
        flow[0].field.layers[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"negative matching loss of a batch is nan.*layers\.0\.weight has 1 "):
        match(flow, cloud())
    huge = pf.cnf(2, field=affine(1e30 * torch.eye(2), torch.zeros(2)))
    refuses(FloatingPointError, "every parameter is finite, the velocity or its square is not", match, huge, cloud())


def test_an_error_of_the_solver_does_not_undo_the_fit():
    flow = pf.cnf(2, **SMALL, solver_steps=1)
    with pytest.warns(
        RuntimeWarning, match="is trained, but its held-out log-likelihood could not be computed: .*solver_steps"
    ):
        found = match(flow, cloud(), lr=0.05, max_epochs=10)
    assert math.isnan(found.validation) and len(found.history["train"]) == 10
