"""MintNet layers: what the log-determinant costs beside the convolutions, and the inverse against its alternatives.

    python examples/benchmarks/mintnet.py            # about ten minutes
    python examples/benchmarks/mintnet.py --tables attention    # some of them
    python examples/benchmarks/mintnet.py --smoke    # seconds, on sizes too small to mean anything

Five tables. *Pass*: value and log-determinant of a layer, and a training step, against the three dense convolutions of
the same sizes with the same activations, in turns; and the peak memory that each takes beyond its arguments without a
gradient, in hidden maps, of many events (on Linux). *Inverse*: evaluations and time of the safeguarded solver, of plain
Newton-Jacobi sweeps, of damped ones as the paper has them (factor 1/3.5), and of solving one coordinate after the other
on crops of 7 x 7, on layers with weights ``--gain`` times Xavier's. *Gradient*: the solve with its implicit gradient
against the solve alone. *Attention*: a layer with one head against the same in the order by position without it, pass,
step and solve, with random weights ``--gain`` times Xavier's, attention's too. *Digits*: a net of 16 layers, trained
for ``--seconds`` on 8 x 8 digits: 64 draws, of the net as it is, to 1e-9 and to rounding, and of the net with all
weights doubled; and how many of them 100 sweeps for each layer miss.

CPU seconds of one thread, float32 for the passes and float64 for the solves; medians over rounds, least and greatest.
"""

import statistics
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from _runs import Table, between, command, machine
from _script import digits
from _timing import grown, kept, shown, spent
from torch import Tensor, nn

import pyro_flows as pf

TABLES = ("pass", "inverse", "gradient", "attention", "digits")
Shape = tuple[int, int, int]


class Dense(nn.Module):
    """Three convolutions of the sizes of a layer, without masks and log-determinant."""

    def __init__(self, shape: Shape, groups: int) -> None:
        super().__init__()
        hidden = shape[0] * groups
        self.first = nn.Conv2d(shape[0], hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.third = nn.Conv2d(hidden, shape[0], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.elu(self.second(F.elu(self.first(x), inplace=True)), inplace=True))


def layer_of(shape: Shape, groups: int, gain: float = 1.0, **options: object) -> pf.Mint:
    """A layer with weights ``gain`` times those of Xavier's rule (fresh ones are a two-hundredth)."""
    layer = pf.Mint(shape, num_groups=groups, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("taps", "cent")):
                parameter.mul_(200 * gain)
            elif name.startswith("attention"):
                parameter.normal_().mul_(gain / parameter.shape[-1] ** 0.5)
    return layer


# The pass.


def _grown(kind: str, shape: Shape, groups: int, batch: int) -> float:
    """By how many bytes the peak memory of this process grows in one pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    call = Dense(shape, groups) if kind == "dense" else layer_of(shape, groups).inverse_and_ladj
    x = torch.randn(batch, *shape)
    with torch.no_grad():
        call(x[:1])
        return grown(lambda: call(x))


def peak(kind: str, shape: Shape, groups: int) -> float:
    """The same, in hidden maps, by a fresh process, for a batch whose hidden map has 64 MiB."""
    each = 4 * groups * torch.Size(shape).numel()
    batch = -(-(2**26) // each)
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (kind, shape, groups, batch)) / (each * batch)


def passes(sizes: list[tuple[Shape, int, int]], rounds: int) -> None:
    head = ["event, groups, batch", "pass", "pass / convolutions", "step / step"]
    table = Table(*head, "peak, ours and theirs, hidden maps")
    for shape, groups, batch in sizes:
        torch.manual_seed(0)
        layer, dense, x = layer_of(shape, groups), Dense(shape, groups), torch.randn(batch, *shape)

        def score(step: bool, layer: pf.Mint = layer, x: Tensor = x) -> None:
            with torch.set_grad_enabled(step):
                z, ladj = layer.inverse_and_ladj(x)
                if step:
                    (z.square().sum() - ladj.sum()).backward()

        def plain(step: bool, dense: Dense = dense, x: Tensor = x) -> None:
            with torch.set_grad_enabled(step):
                y = dense(x)
                if step:
                    y.square().sum().backward()

        for step in (False, True):
            score(step), plain(step)
        taken = [[spent(lambda f=f, s=s: f(s)) for s in (False, True) for f in (score, plain)] for _ in range(rounds)]
        forward, step = [a / b for a, b, _, _ in taken], [c / d for _, _, c, d in taken]
        held = (
            [peak(kind, shape, groups) for kind in ("mint", "dense")] if Path("/proc/self/clear_refs").exists() else []
        )
        maps = ", ".join(f"{each:.1f}" for each in held) or "?"
        first = shown(statistics.median(t[0] for t in taken))
        table.add(f"{shape}, {groups}, {batch}", first, between(forward), between(step), maps)
    print(f"\n{table}\n")


# The inverse.


def newton(layer: pf.Mint, z: Tensor, factor: float, sweeps: int, tolerance: float) -> tuple[Tensor, int]:
    """Sweeps of ``x + factor (z - f(x)) / d(x)`` until all is within the tolerance."""
    solved, weights = layer.map, layer._weights(None, z.shape[:1])
    x = z.clone()
    for k in range(sweeps):
        value, slope = solved.value_and_slope(x, *weights)
        step = (z - value) / slope
        x = x + factor * step
        if not step.isfinite().all() or bool((step.abs() <= tolerance * (1 + x.abs())).all()):
            return x, k + 1
    return x, sweeps


def one_by_one(layer: pf.Mint, z: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """One coordinate after the other, by Newton's method on the crop that it depends on."""
    solved = layer.map
    *convolutions, scale = layer._weights(None, z.shape[:1])[0]
    _, height, width = layer.event_shape
    x, evaluations = torch.zeros_like(z), 0
    for place in layer.waves.flatten().argsort(stable=True).tolist():
        c, rest = divmod(place, height * width)
        i, j = divmod(rest, width)
        top, left = max(i - 3, 0), max(j - 3, 0)
        window = (slice(None), slice(None), slice(top, i + 4), slice(left, j + 4))
        part = (*convolutions, scale[window[1:]])
        for _ in range(30):
            value, slope = solved.value_and_slope(x[window].contiguous(), part, ())
            evaluations += 1
            step = (z[:, c, i, j] - value[:, c, i - top, j - left]) / slope[:, c, i - top, j - left]
            x[:, c, i, j] += step
            if bool((step.abs() <= tolerance * (1 + x[:, c, i, j].abs())).all()):
                break
    return x, evaluations


@torch.no_grad()
def inverses(sizes: list[tuple[Shape, int, int]], gain: float, tolerance: float, rounds: int) -> None:
    head = ["event, groups, batch", "chain", "ours: evaluations (time, error)", "plain", "damped", "sequential"]
    table = Table(*head, "evaluations, ours / sequential", "time, sequential / ours")
    for shape, groups, batch in sizes:
        torch.manual_seed(0)
        layer = layer_of(shape, groups, gain).double()
        y = torch.randn(batch, *shape, dtype=torch.float64)
        z = layer.inverse_and_ladj(y)[0]
        layer.settings = layer.settings._replace(tolerance=tolerance)
        times: dict[str, list[float]] = {"ours": [], "plain": [], "damped": [], "sequential": []}
        found: dict[str, tuple[Tensor, int]] = {}

        def ours(layer: pf.Mint, z: Tensor) -> tuple[Tensor, int]:
            return layer(z), layer.last_solve.evaluations

        calls = {
            "ours": ours,
            "plain": partial(newton, factor=1.0, sweeps=1000, tolerance=tolerance),
            "damped": partial(newton, factor=1 / 3.5, sweeps=1000, tolerance=tolerance),
            "sequential": partial(one_by_one, tolerance=tolerance),
        }
        for k in range(rounds):
            for name, call in calls.items():
                if name == "sequential" and k:
                    continue
                begin = time.process_time()
                found[name] = call(layer, z)
                times[name].append(time.process_time() - begin)
        base = statistics.median(times["ours"])
        errors = {name: ((x - y).abs() / (1 + y.abs())).max().item() for name, (x, _) in found.items()}
        cells = [f"{shape}, {groups}, {batch}", str(int(layer.waves.max()) + 1)]
        cells += [f"{found[n][1]} ({shown(statistics.median(times[n]))}, {errors[n]:.0e})" for n in found]
        ratio = found["sequential"][1] / found["ours"][1]
        cells += [f"1/{ratio:.0f}", f"{times['sequential'][0] / base:.1f}"]
        table.add(*cells)
    print(f"\n{table}\n")


def gradients(sizes: list[tuple[Shape, int, int]], gain: float, rounds: int) -> None:
    table = Table("event, groups, batch", "solve", "solve and gradient / solve", "kept for the gradient")
    for shape, groups, batch in sizes:
        torch.manual_seed(0)
        layer = layer_of(shape, groups, gain)
        z = torch.randn(batch, *shape)

        def alone(layer: pf.Mint = layer, z: Tensor = z) -> None:
            with torch.no_grad():
                layer.forward_and_ladj(z)

        def both(layer: pf.Mint = layer, z: Tensor = z) -> None:
            x, ladj = layer.forward_and_ladj(z)
            (x.square().sum() + ladj.sum()).backward()

        alone(), both()
        taken = [(spent(alone), spent(both)) for _ in range(rounds)]
        held = {}
        for limit in (1e-2, None):
            layer.settings = layer.settings._replace(tolerance=limit)
            size = kept(lambda layer=layer, z=z: layer.forward_and_ladj(z)) / 2**20
            held[layer.last_solve.sweeps] = size
        table.add(
            f"{shape}, {groups}, {batch}",
            shown(statistics.median(a for a, _ in taken)),
            between([b / a for a, b in taken]),
            ", ".join(f"{size:.2f} MiB after {sweeps} sweeps" for sweeps, size in held.items()),
        )
    print(f"\n{table}\n")


def attention(sizes: list[tuple[Shape, int, int]], gain: float, rounds: int) -> None:
    head = ["event, groups, batch", "pass without, x with", "step", "solve", "sweeps of chain: without, with"]
    table = Table(*head)
    for shape, groups, batch in sizes:
        torch.manual_seed(0)
        layers = [layer_of(shape, groups, gain, order="position", attention=heads) for heads in (0, 1)]
        x = torch.randn(batch, *shape)

        def score(layer: pf.Mint, step: bool, x: Tensor = x) -> None:
            with torch.set_grad_enabled(step):
                z, ladj = layer.inverse_and_ladj(x)
                if step:
                    (z.square().sum() - ladj.sum()).backward()

        def solve(layer: pf.Mint, x: Tensor = x) -> None:
            with torch.no_grad():
                layer.forward_and_ladj(x)

        calls = [*(partial(score, step=step) for step in (False, True)), solve]
        for layer in layers:
            for call in calls:
                call(layer)
        taken = [[[spent(partial(call, layer)) for layer in layers] for call in calls] for _ in range(rounds)]
        cells = [f"{shape}, {groups}, {batch}"]
        for k in range(len(calls)):
            without = statistics.median(t[k][0] for t in taken)
            cells.append(f"{shown(without)}, x {between([t[k][1] / t[k][0] for t in taken], 1)}")
        cells.append(", ".join(f"{layer.last_solve.sweeps} of {layer.last_solve.waves}" for layer in layers))
        table.add(*cells)
    print(f"\n{table}\n")


# A trained net.


def draws_of_a_net(seconds: float, seed: int, pairs: int, draws: int) -> None:
    torch.manual_seed(seed)
    train, held_out, _ = digits()
    chain = pf.mintnet((1, 8, 8), num_layers=pairs, num_groups=(16, 8, 4), squeeze=2)
    model = pf.Dequantized(pf.Flow(pf.Chain([chain, pf.LogitPixels((1, 8, 8), 17)])), 17)
    pf.fit_density(model, train, held_out, progress=False, seconds=seconds, batch_size=64, schedule="cosine", lr=6e-3)
    layers = [part for part in chain if isinstance(part, pf.Mint)]
    head = [f"net of {len(layers)} layers", f"sweeps of {draws} draws", "bisections", "time"]
    table = Table(*head, "draws more than 1e-5 off (largest error)", f"of {draws} by 100 sweeps a layer")
    for factor, tolerance in ((1, 1e-9), (1, None), (2, None)):
        net = chain.double().eval()
        with torch.no_grad():
            for layer in layers:
                layer.settings = layer.settings._replace(tolerance=tolerance)
                for name, parameter in layer.named_parameters():
                    if name.startswith(("taps", "cent")):
                        parameter.mul_(factor)
            z = torch.randn(draws, 1, 8, 8, dtype=torch.float64)
            taken = spent(lambda net=net, z=z: net(z))
            y = net(z)
            sweeps = [layer.last_solve.sweeps for layer in layers]
            bisections = sum(layer.last_solve.bisections for layer in layers)
            error = (net.inverse_and_ladj(y)[0] - z).abs().amax((1, 2, 3))
            failed = {}
            for name, damping in (("plain", 1.0), ("damped by 1.1", 1 / 1.1), ("damped by 3.5", 1 / 3.5)):
                # The paper's recipe for the same net: 100 sweeps for each layer.
                value = z
                for part in net:
                    if isinstance(part, pf.Mint):
                        value = newton(part, value, damping, 100, 0.0)[0]
                    else:
                        value = part.forward_and_ladj(value)[0]
                back = (net.inverse_and_ladj(value)[0] - z).abs().amax((1, 2, 3))
                failed[name] = int((~(back <= 1e-5)).sum())
        table.add(
            f"weights x {factor}, to {tolerance or 'rounding'}",
            f"{sum(sweeps)}, at most {max(sweeps)} a layer",
            str(bisections),
            shown(taken),
            f"{int((~(error <= 1e-5)).sum())} of {draws} ({error.max():.0e})",
            ", ".join(f"{n}: {k}" for n, k in failed.items()),
        )
    print(f"\n{table}")


def main() -> None:
    args = command(
        __doc__,
        "sizes and budgets too small to mean anything",
        tables={"nargs": "+", "choices": TABLES, "default": list(TABLES)},
        rounds={"type": int, "default": 5},
        gain={"type": float, "default": 2.0},
        seconds={"type": float, "default": 100, "help": "of training, for the last table"},
        seed={"type": int, "default": 0},
    )
    torch.set_num_threads(1)
    print(f"{machine()}; one thread, seed {args.seed}, {args.rounds} rounds in turns\n")
    small: list[tuple[Shape, int, int]] = [((1, 4, 4), 3, 2), ((2, 4, 4), 2, 2)]
    wide = [
        ((1, 8, 8), 16, 64),
        ((1, 28, 28), 45, 32),
        ((4, 14, 14), 11, 32),
        ((3, 32, 32), 85, 4),
        ((12, 16, 16), 21, 8),
    ]
    deep = [((1, 8, 8), 16, 1), ((1, 8, 8), 16, 32), ((1, 28, 28), 16, 8), ((3, 16, 16), 8, 4)]
    if args.smoke:
        args.rounds, args.seconds = 1, 0.5
    if "pass" in args.tables:
        passes(small if args.smoke else wide, args.rounds)
    if "inverse" in args.tables:
        inverses(small if args.smoke else deep, args.gain, 1e-8, args.rounds)
    if "gradient" in args.tables:
        gradients(small if args.smoke else deep[1:], args.gain, args.rounds)
    if "attention" in args.tables:
        attention(small if args.smoke else deep[1:], args.gain, args.rounds)
    if "digits" in args.tables:
        draws_of_a_net(args.seconds, args.seed, *((3, 4) if args.smoke else (8, 64)))


if __name__ == "__main__":
    main()
