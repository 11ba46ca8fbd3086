"""Models that do not run for many draws at once: the warning names the line, and what it advises works."""

import linecache
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import seeded
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex

from pyro_flows.infer.machine.pace import BYTES, Footprint, rows_at_once
from pyro_flows.infer.models.joint import JointDensity
from pyro_flows.infer.models.prototype import initializer, inspect

X = torch.randn(7, 3, generator=seeded(0))
Y = torch.randn(7, generator=seeded(1))
GROUP = torch.tensor([0, 2, 1, 1, 0, 2, 2])
SEEN = {"pyro": pyro, "dist": dist, "torch": torch, "X": X, "Y": Y, "GROUP": GROUP}

EVENT = 'b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))'
PLATE = 'with pyro.plate("columns", 3): b = pyro.sample("b", dist.Normal(0.0, 1.0))'
MATRIX = 'b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))'
ROWS = 'with pyro.plate("rows", 7): pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)'
VECTOR = 'pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=Y)'
# Lines of a model, and the number of the line that does not broadcast.
ADVISED = {
    "matrix times event in a plate": ((EVENT, "mean = X @ b", ROWS), 2),
    "matrix times plate": ((PLATE, "mean = X @ b", ROWS), 2),
    "matrix times event": ((EVENT, "mean = X @ b", VECTOR), 2),
    "event times matrix in a plate": ((EVENT, "mean = b @ X.T", ROWS), 2),
    "matrix times matrix": ((MATRIX, "hidden = X @ b", "mean = torch.tanh(hidden).sum(-1)", ROWS), 2),
    "plate by index": ((PLATE, "mean = b[GROUP]", ROWS), 2),
    "event by index": ((EVENT, "mean = b[GROUP]", ROWS), 2),
}


def made(name, lines):
    """A model of these lines, whose source can be looked up."""
    file = f"<model {name}>"
    text = "def model():\n" + "".join(f"    {line}\n" for line in lines)
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names = dict(SEEN)
    exec(compile(text, file, "exec"), names)
    return names["model"]


def joint(model, *args):
    _, latents = inspect(model, initializer(None, args, {}), args, {})
    return JointDensity(model, latents, args)


def warned(density, z):
    with pytest.warns(UserWarning, match="does not broadcast") as caught:
        value = density(z)
    assert len(caught) == 1
    return str(caught[0].message), value


@pytest.mark.parametrize("name", ADVISED)
def test_what_is_advised_broadcasts(name):
    lines, number = ADVISED[name]
    density = joint(made(name, lines))
    z = torch.randn(4, density.latents.dim)
    message, expected = warned(density, z)
    assert f"<model {name}>:{number + 1}, in model, `{lines[number - 1]}`" in message and not density.vectorized
    new, _ = re.search(r"Write `([^`]+)`( in place of `[^`]+`|, which)", message).groups()
    new = new.replace("pyro.ops.indexing.", "")
    old = re.search(r"(\S+ @ \S+|b\[GROUP\])", lines[number - 1])[1]
    again = [line.replace(old, new) for line in lines]
    SEEN["Vindex"] = Vindex
    better = joint(made(f"{name}, rewritten", again))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(better(z), expected)
    assert better.vectorized


def by_number():
    a = pyro.sample("a", dist.Normal(0, 1))
    pyro.sample("y", dist.Normal(float(a), 1.0), obs=torch.tensor(0.3))


def by_branch():
    a = pyro.sample("a", dist.Normal(0, 1))
    sd = 2.0
    if a > 0:
        sd = 1.0
    pyro.sample("y", dist.Normal(0.0, sd), obs=torch.tensor(0.3))


def by_shape():
    a = pyro.sample("a", dist.Normal(0, 1).expand([6]).to_event(1))
    square = a.reshape(2, 3)
    pyro.sample("y", dist.Normal(square, 1.0).to_event(2), obs=torch.zeros(2, 3))


def by_mean():
    a = pyro.sample("a", dist.Normal(0, 1).expand([3]).to_event(1))
    middle = a.mean()
    sd = torch.ones(2)
    pyro.sample("y", dist.Normal(middle, sd).to_event(1), obs=torch.zeros(2))


def by_kernel():
    length = pyro.sample("length", dist.LogNormal(0, 1))
    covariance = torch.exp(-(torch.cdist(X, X) ** 2) / length) + torch.eye(7)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(7), covariance), obs=Y)


class Layer(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[torch.nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self):
        mean = self.layer(X).squeeze(-1)
        with pyro.plate("rows", 7):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


@pytest.mark.parametrize(
    ("model", "line", "advice"),
    [
        (by_number, "dist.Normal(float(a), 1.0)", "as tensors"),
        (by_branch, "if a > 0:", "torch.where"),
        (by_shape, "a.reshape(2, 3)", "last dimensions"),
        (by_mean, "middle = a.mean()", "a.sum(-1)"),
        (by_kernel, "covariance = torch.exp", "`length[..., None, None]`"),
        (Layer(), "mean = self.layer(X).squeeze(-1)", "weight @ x.unsqueeze(-1)"),
    ],
)
def test_the_line_is_named(model, line, advice):
    density = joint(model)
    message, _ = warned(density, torch.randn(3, density.latents.dim))
    assert f"{__file__}:" in message and line in message and advice in message
    assert "Trace Shapes" not in message and message == density.why_not


def test_a_wrong_value_without_a_cause_names_its_site():
    def model():
        a = pyro.sample("a", dist.Normal(0, 1))
        pyro.factor("right", -(a**2))
        b = a if a.dim() == 0 else 2 * a
        pyro.factor("wrong", -b)

    message, _ = warned(joint(model), torch.ones(2, 1))
    assert "'wrong'" in message and 'pyro.factor("wrong", -b)' in message


def test_warns_once_for_a_model():
    """Whatever makes the density, and not for another model."""

    def model():
        a = pyro.sample("a", dist.Normal(0, 1))
        pyro.factor("f", -(float(a) ** 2))

    class Module(PyroModule):
        def forward(self):
            a = pyro.sample("a", dist.Normal(0, 1))
            pyro.factor("f", -(float(a) ** 2))

        def other(self):
            return self.forward()

    module = Module()
    for each in (model, module, module.other):
        first = joint(each)
        warned(first, torch.zeros(2, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = joint(module.other if each == module.other else each)
            again(torch.zeros(2, 1))
            first(torch.ones(2, 1))
        assert not again.vectorized and again.why_not.splitlines()[1:] == first.why_not.splitlines()[1:]


# Memory.


def test_footprint_adds_up_what_is_made():
    x = torch.zeros(1000)
    with Footprint() as found:
        y = (x + 1).expand(50, 1000)  # 4000 bytes; a view of them
        y.sum()  # 4 bytes
        x.add_(1.0)  # in place
    assert found.bytes == 4004


def test_rows_at_once():
    """As many as fit: a model of a million rows goes by a few draws at once, a small one by all."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0, 1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    for size, bounds in ((1_000_000, (2, 70)), (10, (1000, 1000))):
        density = joint(model, torch.zeros(size))
        assert rows_at_once(density, 1000) == 1000  # nothing is known yet
        density(torch.zeros(1, 1))
        assert bounds[0] <= rows_at_once(density, 1000) <= bounds[1]
        assert rows_at_once(density, 1) == 1
        if size > 10:
            assert density.pace.bytes_per_draw >= 4 * size and 1000 * density.pace.bytes_per_draw > BYTES
