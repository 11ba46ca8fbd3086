"""Densities with exact draws and a log evidence of 0, each with numbers of its own for every seed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Generator, Tensor

__all__ = ["KINDS", "Target", "target"]

COUNT = 40_000
HALF_LOG = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Target:
    """A normalized density of vectors."""

    name: str
    dim: int
    log_p: Callable[[Tensor], Tensor]
    draws: Tensor
    """Exact ones, ``(40000, dim)``."""
    quantities: Callable[[Tensor], Tensor]
    """Whose means and standard deviations count; bounded by logarithms where tails are heavy."""

    def model(self) -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (self.dim,)))
        pyro.factor("density", self.log_p(x))

    def errors(self, draws: Tensor) -> tuple[float, float]:
        """Largest error of a mean, in standard deviations, and of a standard deviation, in parts."""
        found, known = self.quantities(draws), self.quantities(self.draws)
        sd = known.std(0)
        return float(((found.mean(0) - known.mean(0)).abs() / sd).max()), float((found.std(0) / sd - 1).abs().max())


def normal(x: Tensor, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> Tensor:
    """Log-density of a normal."""
    return -0.5 * ((x - loc) / scale) ** 2 - torch.as_tensor(scale).log() - HALF_LOG


class Numbers:
    """The numbers of a target."""

    def __init__(self, seed: int) -> None:
        self.generator = Generator().manual_seed(seed)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def log_between(self, low: float, high: float) -> float:
        return math.exp(self.between(math.log(low), math.log(high)))

    def dim(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normals(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniforms(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def turn(self, dim: int) -> Tensor:
        return torch.linalg.qr(self.normals(dim, dim))[0]


Made = tuple[int, Callable[[Tensor], Tensor], Tensor]


def gaussian(of: Numbers) -> Made:
    """Normal, with a condition number up to 10,000."""
    dim = of.dim(2, 20)
    sds = torch.logspace(0, of.between(0, 2), dim, dtype=torch.float64)
    turn, loc = of.turn(dim), of.normals(dim)
    return dim, lambda z: normal((z - loc) @ turn, 0.0, sds).sum(-1), loc + of.normals(COUNT, dim) * sds @ turn.mT


def banana(of: Numbers) -> Made:
    """A parabola that bends by much or little, and is thin or not."""
    dim, bend, width = of.dim(2, 6), of.log_between(0.3, 4), of.log_between(0.1, 1)
    x = of.normals(COUNT, dim)
    x[:, 1] = bend * (x[:, 0] ** 2 - 1) + width * x[:, 1]

    def log_p(z: Tensor) -> Tensor:
        across = normal(z[..., 1], bend * (z[..., 0] ** 2 - 1), width)
        return normal(z[..., 0]) + across + normal(z[..., 2:]).sum(-1)

    return dim, log_p, x


def chain(of: Numbers) -> Made:
    """Steps of Rosenbrock's kind, each the square of the one before."""
    dim, first, width = of.dim(2, 6), of.between(0.2, 0.7), of.between(0.15, 0.6)
    x = [0.8 + first * of.normals(COUNT)]
    for _ in range(dim - 1):
        x.append(x[-1] ** 2 + width * of.normals(COUNT))

    def log_p(z: Tensor) -> Tensor:
        return normal(z[..., 0], 0.8, first) + normal(z[..., 1:], z[..., :-1] ** 2, width).sum(-1)

    return dim, log_p, torch.stack(x, 1)


def ring(of: Numbers) -> Made:
    """A ring, in up to four dimensions."""
    dim, radius, width = of.dim(2, 4), of.between(2, 8), of.between(0.2, 0.8)
    way = of.normals(COUNT, 2)
    x = (radius + width * of.normals(COUNT, 1)) * way / way.norm(dim=-1, keepdim=True)

    def log_p(z: Tensor) -> Tensor:
        r = (z[..., :2].square().sum(-1) + 1e-12).sqrt()
        # A negative radius is the opposite point, and as good as never drawn.
        return normal(r, radius, width) - r.log() - math.log(2 * math.pi) + normal(z[..., 2:]).sum(-1)

    return dim, log_p, torch.cat([x, of.normals(COUNT, dim - 2)], 1)


def funnel(of: Numbers) -> Made:
    """A log-scale and what it scales."""
    dim, width = of.dim(2, 12), of.between(0.3, 4)
    x = of.normals(COUNT, dim)
    x[:, 0] *= width
    x[:, 1:] *= (x[:, :1] / 2).exp()

    def log_p(z: Tensor) -> Tensor:
        v = z[..., :1]
        scaled = -0.5 * z[..., 1:] ** 2 * (-v).exp() - 0.5 * v - HALF_LOG
        return normal(v[..., 0], 0.0, width) + scaled.sum(-1)

    return dim, log_p, x


def student(of: Numbers) -> Made:
    """Student's t, independent."""
    dim, df = of.dim(1, 8), of.log_between(2, 30)
    gamma = torch.distributions.Gamma(df / 2, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(of.dim(0, 2**30))
        chi = gamma.sample((COUNT, dim)).double()
    t = dist.StudentT(torch.tensor(df, dtype=torch.float64))
    return dim, lambda z: t.log_prob(z).sum(-1), of.normals(COUNT, dim) * (df / chi).sqrt()


def bumps(of: Numbers) -> Made:
    """Up to four normals, near enough that a flow spans them."""
    dim, count = of.dim(2, 6), of.dim(2, 4)
    loc = of.between(1, 4) * of.normals(count, dim)
    sds = 0.5 + of.uniforms(count)
    share = (0.2 + of.uniforms(count)).log().log_softmax(0)
    which = torch.multinomial(share.exp(), COUNT, replacement=True, generator=of.generator)

    def log_p(z: Tensor) -> Tensor:
        return (share + normal(z[..., None, :], loc, sds[:, None]).sum(-1)).logsumexp(-1)

    return dim, log_p, loc[which] + sds[which, None] * of.normals(COUNT, dim)


def gamma(of: Numbers) -> Made:
    """Logarithms of Gamma variables."""
    dim = of.dim(1, 8)
    shape = 0.4 + 8 * of.uniforms(dim) ** 2
    with torch.random.fork_rng():
        torch.manual_seed(of.dim(0, 2**30))
        x = torch.distributions.Gamma(shape, 1.0).sample((COUNT,)).clamp(min=1e-300).log()
    return dim, lambda z: (shape * z - z.exp() - shape.lgamma()).sum(-1), x


def skewed(of: Numbers) -> Made:
    """Correlated normals under a sinh of their own for each."""
    dim = of.dim(2, 10)
    skew, tail = 0.6 * of.normals(dim), 0.7 + 0.6 * of.uniforms(dim)
    mix = of.turn(dim) * (0.5 + of.uniforms(dim))
    logdet = float(torch.linalg.slogdet(mix)[1])
    back = torch.linalg.inv(mix)

    def log_p(z: Tensor) -> Tensor:
        u = (z.asinh() - skew) / tail
        inner = normal(u @ back.mT).sum(-1) - logdet
        return inner - (tail.log() + 0.5 * (z**2).log1p()).sum(-1)

    return dim, log_p, (skew + tail * (of.normals(COUNT, dim) @ mix.mT)).sinh()


def nested(of: Numbers) -> Made:
    """Scales of scales, as in a horseshoe."""
    dim, width = of.dim(2, 5), of.between(0.3, 1.5)
    noise = of.normals(COUNT, 1 + 2 * dim)
    top, local = noise[:, :1], noise[:, 1 : dim + 1]
    x = torch.cat([width * top, width * local, (width * (top + local)).exp() * noise[:, dim + 1 :]], 1)

    def log_p(z: Tensor) -> Tensor:
        top, local, low = z[..., :1], z[..., 1 : dim + 1], z[..., dim + 1 :]
        log_scale = top + local
        scaled = -0.5 * low**2 * (-2 * log_scale).exp() - log_scale - HALF_LOG
        return normal(z[..., : dim + 1], 0.0, width).sum(-1) + scaled.sum(-1)

    return 1 + 2 * dim, log_p, x


def wave(of: Numbers) -> Made:
    """A thin curve that follows a sine."""
    dim, height, length, width = of.dim(2, 5), of.between(1, 3), of.between(1, 2.5), of.between(0.1, 0.5)
    x = of.normals(COUNT, dim)
    x[:, 1] = height * (length * x[:, 0]).sin() + width * x[:, 1]

    def log_p(z: Tensor) -> Tensor:
        across = normal(z[..., 1], height * (length * z[..., 0]).sin(), width)
        return normal(z[..., 0]) + across + normal(z[..., 2:]).sum(-1)

    return dim, log_p, x


def cross(of: Numbers) -> Made:
    """Two long normals across each other."""
    dim, long, short, share = of.dim(2, 4), of.between(2, 6), of.between(0.1, 0.5), of.between(0.3, 0.7)
    first = of.uniforms(COUNT, 1) < share
    x = of.normals(COUNT, dim)
    x[:, :2] *= torch.where(first, torch.tensor([long, short]), torch.tensor([short, long]))

    def log_p(z: Tensor) -> Tensor:
        a, b = z[..., 0], z[..., 1]
        one = math.log(share) + normal(a, 0.0, long) + normal(b, 0.0, short)
        other = math.log1p(-share) + normal(a, 0.0, short) + normal(b, 0.0, long)
        return torch.logaddexp(one, other) + normal(z[..., 2:]).sum(-1)

    return dim, log_p, x


def _polar(z: Tensor, angle: float, spread: float, radius: float, turn: float, width: float) -> Tensor:
    """Log-density in the plane of a normal angle, with a radius that is normal around a line in it."""
    r = (z.square().sum(-1) + 1e-12).sqrt()
    angles = torch.atan2(z[..., 1], z[..., 0]).unsqueeze(-1) + 2 * math.pi * torch.arange(-3, 4)
    each = normal(angles, angle, spread) + normal(r.unsqueeze(-1), radius + turn * angles, width)
    return each.logsumexp(-1) - r.log()


def _on_polar(of: Numbers, count: int, angle: float, spread: float, radius: float, turn: float, width: float) -> Tensor:
    angles = angle + spread * of.normals(count)
    r = radius + turn * angles + width * of.normals(count)
    return torch.stack([r * angles.cos(), r * angles.sin()], -1)


def spiral(of: Numbers) -> Made:
    """One turn or so around the origin, outward."""
    numbers = of.between(-1, 1), of.between(0.8, 1.6), of.between(6, 9), of.between(0.4, 0.8), of.between(0.15, 0.4)
    return 2, lambda z: _polar(z, *numbers), _on_polar(of, COUNT, *numbers)


def crescents(of: Numbers) -> Made:
    """Two half-moons that open toward each other."""
    numbers = 0.0, of.between(0.5, 0.9), of.between(2.5, 4), 0.0, of.between(0.15, 0.4)
    away, share = torch.tensor([of.between(-1.5, 0), of.between(0.5, 2)], dtype=torch.float64), of.between(0.35, 0.65)
    x = _on_polar(of, COUNT, *numbers) + away
    x = torch.where(of.uniforms(COUNT, 1) < share, x, -x)

    def log_p(z: Tensor) -> Tensor:
        one, other = (_polar(sign * z - away, *numbers) for sign in (1, -1))
        return torch.logaddexp(math.log(share) + one, math.log1p(-share) + other)

    return 2, log_p, x


def shell(of: Numbers) -> Made:
    """A sphere in three to five dimensions."""
    dim, radius, width = of.dim(3, 5), of.between(3, 6), of.between(0.2, 0.6)
    way = of.normals(COUNT, dim)
    x = (radius + width * of.normals(COUNT, 1)) * way / way.norm(dim=-1, keepdim=True)
    area = math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)

    def log_p(z: Tensor) -> Tensor:
        r = (z.square().sum(-1) + 1e-12).sqrt()
        return normal(r, radius, width) - (dim - 1) * r.log() - area

    return dim, log_p, x


FIRST = gaussian, banana, chain, ring, funnel, student, bumps, gamma, skewed, nested


def islands(of: Numbers) -> Made:
    """Two to four normals far apart, each up to five times as wide as another."""
    dim, count, apart = of.dim(1, 10), of.dim(2, 4), of.log_between(4, 20)
    loc = apart * of.normals(count, dim)
    sds = 0.4 * 5 ** of.uniforms(count)
    share = (0.2 + of.uniforms(count)).log().log_softmax(0)
    which = torch.multinomial(share.exp(), COUNT, replacement=True, generator=of.generator)

    def log_p(z: Tensor) -> Tensor:
        return (share + normal(z[..., None, :], loc, sds[:, None]).sum(-1)).logsumexp(-1)

    return dim, log_p, loc[which] + sds[which, None] * of.normals(COUNT, dim)


KINDS = {each.__name__: each for each in (*FIRST, wave, cross, spiral, crescents, shell, islands)}
HEAVY = ("chain", "funnel", "student", "skewed", "nested")


def target(kind: str, seed: int) -> Target:
    """The kind with the numbers of a seed."""
    dim, log_p, draws = KINDS[kind](Numbers(1000 * seed + list(KINDS).index(kind)))
    return Target(f"{kind}-{seed}", dim, log_p, draws, torch.asinh if kind in HEAVY else lambda z: z)
