"""Integer discrete flows beside sequential models: bits per pixel, bytes of a file, and images a second.

    python examples/benchmarks/integers.py                  # digits: four models, a CPU minute of training each
    python examples/benchmarks/integers.py --mnist FOLDER   # MNIST: an idf and a ConvMADE
    python examples/benchmarks/integers.py --depths 1 2 4   # digits as vectors, by flows of so many layers
    python examples/benchmarks/integers.py --smoke          # seconds

Digits are 8 x 8 images of 17 levels (Alpaydin and Kaynak, 1998), 1297 to train on, 200 to stop by and 300 to test on.
FOLDER holds ``mnist.npz`` with ``x_train`` and ``x_test``; the first 1,000 test images are coded.  All models go
through ``fit_density`` with the same seconds of CPU time, batch, schedule and weight decay.  ``idf, 2 parts`` and
``idf, 4 parts`` have as many couplings; the sequential models are a ``ConvMADE`` and a one-sided ``mintnet``
(dequantized for training, exact masses in files), which read an image pixel by pixel and wave by wave.  Bits per pixel
are those of the test images' masses, and of the file.  A rate is of all test images together, the best of five within
five seconds, without verification; each file is compared with the images.  Needs the extra "compression".
"""

import importlib.util
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from _runs import Table, command, machine
from _script import digits, general, mnist_bytes
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.distributions import LogisticMixtureHead
from pyro_flows.infer import Codec

Build = Callable[[tuple[int, ...], int, Tensor], nn.Module]


def integers(num_parts: int, num_layers: int, hidden_dims: tuple[int, ...]) -> Build:
    """An integer discrete flow whose base starts at the marginals."""

    def build(shape: tuple[int, ...], levels: int, train: Tensor) -> pf.Flow:
        options = {"num_parts": num_parts, "num_layers": num_layers, "num_scales": 3 if shape[1] == 8 else 2}
        flow = pf.Flow(pf.idf(shape, levels=levels, hidden_dims=hidden_dims, **options))
        flow.base.fit_marginals(train[:5000])
        return flow

    return build


def of_depth(layers: int, args: Namespace) -> tuple[str, ...]:
    """A row of the table of depths: digits as vectors of 64 numbers, two parts, networks of two layers of 64."""
    train, held_out, test = (part.flatten(1) for part in digits())
    torch.manual_seed(args.seed)
    flow = pf.Flow(pf.idf(64, levels=17, num_layers=layers, hidden_dims=(64, 64)))
    flow.base.fit_marginals(train)
    spent = fit(flow, train, held_out, 1.0 if args.smoke else args.seconds, args.seed, 64)
    with torch.no_grad():
        bits = [f"{pf.bits_per_dim(flow.log_prob(part), 64).mean():.3f}" for part in (train, test)]
    return f"{layers}", f"{sum(p.numel() for p in flow.parameters()):,}", *bits, f"{spent:.0f}"


def made(channels: int) -> Build:
    def build(shape: tuple[int, ...], levels: int, train: Tensor) -> pf.ConvMADE:
        model = pf.ConvMADE(shape, LogisticMixtureHead(levels, 5), hidden_channels=channels)
        return model.fit_marginals(train[:5000].float())

    return build


def mintnet(shape: tuple[int, ...], levels: int, train: Tensor) -> pf.Dequantized:
    chain = pf.Chain([pf.mintnet(shape, num_layers=4, one_sided=True), pf.LogitPixels(shape, levels)])
    return pf.Dequantized(pf.Flow(chain), levels)


DIGITS = {
    "idf, 2 parts": integers(2, 2, (32, 32)),
    "idf, 4 parts": integers(4, 1, (32, 32)),
    "ConvMADE": made(48),
    "mintnet, one-sided": mintnet,
}
MNIST = {"idf, 4 parts": integers(4, 1, (24, 24)), "ConvMADE": made(20)}


def fit(model: nn.Module, train: Tensor, held_out: Tensor, seconds: float, seed: int, batch: int) -> float:
    """Trains a model; CPU seconds."""
    as_given = train.long() if not isinstance(model, pf.ConvMADE) else train.float()
    begun = time.process_time()
    pf.fit_density(
        model,
        as_given,
        validation=held_out.to(as_given.dtype),
        seconds=seconds,
        max_epochs=100_000,
        batch_size=batch,
        schedule="cosine",
        patience=100_000,
        weight_decay=0.1,
        seed=seed,
        progress=False,
    )
    return time.process_time() - begun


def rate(call: Callable[[], object], images: int) -> tuple[object, float]:
    """The result, and the best rate of up to five calls within five seconds, in images a second."""
    spent, found, first = math.inf, None, time.process_time()
    for _ in range(5):
        begun = time.process_time()
        found = call()
        spent = min(spent, time.process_time() - begun)
        if time.process_time() - first > 5:
            break
    return found, images / spent


def main() -> None:
    if importlib.util.find_spec("constriction") is None:
        print("The range coder is missing: pip install 'pyro-flows[compression]'")
        return
    args = command(
        __doc__,
        "a second of training each",
        mnist={"type": Path, "help": "the folder of mnist.npz: its images in place of digits"},
        models={"nargs": "+", "choices": DIGITS, "default": None, "help": "some of them"},
        seconds={"type": float, "default": 60, "help": "CPU time of training, each"},
        depths={"type": int, "nargs": "+", "help": "numbers of layers of flows of vectors, in place of the models"},
        seed={"type": int, "default": 0},
    )
    time.monotonic = time.process_time  # budgets are CPU time
    torch.set_num_threads(1)
    if args.depths:
        depths = Table("layers", "parameters", "bits per pixel, train", "test", "CPU s")
        for layers in args.depths:
            depths.add(*of_depth(layers, args))
        print(f"\n{depths}\n")
        return
    (train, held_out, test), levels = (digits(), 17) if args.mnist is None else (mnist_bytes(args.mnist), 256)
    held_out = held_out[:500]
    seconds = 1.0 if args.smoke else args.seconds
    if args.smoke:
        train, held_out, test = train[:200], held_out[:20], test[:20]
    shape, pixels = tuple(test.shape[1:]), test.numel()
    print(f"{machine()}; one thread, seed {args.seed}, {seconds:g} CPU s of training each, {len(test)} images\n")
    table = Table(
        "", "parameters", "bits per pixel", "file, bytes", "bits per pixel", "encode, 1/s", "decode, 1/s", "CPU s"
    )
    models = DIGITS if args.mnist is None else MNIST
    for name in args.models or models:
        torch.manual_seed(args.seed)
        model = models[name](shape, levels, train)
        spent = fit(model, train, held_out, seconds, args.seed, 16 if levels > 17 else 64)
        codec = Codec(model)
        data, encoding = rate(lambda: codec.encode(test, verify=False), len(test))  # noqa: B023
        restored, decoding = rate(lambda: codec.decode(data), len(test))  # noqa: B023
        if not torch.equal(restored, test):
            sys.exit(f"{name}: what was restored is not what was coded")
        bits = float(codec.bits(test).sum()) / pixels
        weights = sum(p.numel() for p in model.parameters())
        sizes = f"{len(data):,}", f"{8 * len(data) / pixels:.3f}"
        table.add(name, f"{weights:,}", f"{bits:.3f}", *sizes, f"{encoding:,.0f}", f"{decoding:,.0f}", f"{spent:.0f}")
    for name, size in general(test.numpy(), (levels - 1).bit_length()).items():
        if name in ("png", "bz2", "lzma"):
            table.add(name, "", "", f"{size:,}", f"{8 * size / pixels:.3f}", "", "", "")
    print(f"\n{table}\n")


if __name__ == "__main__":
    main()
