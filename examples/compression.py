"""Lossless compression: images in fewer bytes than other compressors need, and back, bit for bit.

    python examples/compression.py                  # digits: a table, compression.png in out/; about two minutes
    python examples/compression.py --mnist FOLDER   # also 1,000 of MNIST; some 10 minutes of training first
    python examples/compression.py --smoke          # in seconds, with budgets too small to mean anything

A convolutional MADE learns 8 x 8 digits of 17 gray levels (Optical Recognition of Handwritten Digits, Alpaydin and
Kaynak, 1998).  A codec then writes the 300 test digits to a file by entropy coding with the model's conditionals, and
reads them again.  The table has sizes beside the model's own bound, -log2 of the probability of these digits, and those
of general compressors: bz2 and lzma of the levels as bytes, and packed to 5 bits each, and PNG of all digits on one
sheet.  What a general compressor makes can be read by anyone; the codec's file only by who has the model, whose size is
named too.  With --mnist, the same for the first 1,000 test images of MNIST, of 256 levels, from FOLDER/mnist.npz with
arrays x_train and x_test.  Needs the extra "compression".
"""

import importlib.util
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from _script import FLOW, OTHER, TRUTH, begin, digits, general, mnist_bytes, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

import pyro_flows as pf
from pyro_flows.distributions import LogisticMixtureHead
from pyro_flows.infer import Codec

BOUND, OURS = "bound by the model", "codec"


def fit(args: Namespace, train: Tensor, held_out: Tensor, levels: int) -> pf.ConvMADE:
    """A model, trained."""
    large = levels > 17
    channels = 8 if args.smoke else 20 if large else 48
    conv = pf.ConvMADE(tuple(train.shape[1:]), LogisticMixtureHead(levels, 5), hidden_channels=channels)
    conv.fit_marginals(train[:5000].float())
    begun = time.process_time()
    pf.fit_density(
        conv,
        train.float(),
        validation=held_out.float(),
        steps=20 if args.smoke else 9000 if large else 1000,
        batch_size=16 if large else None,
        schedule="cosine" if large else "plateau",
        patience=10_000 if large else None,
        seed=args.seed,
        progress=False,
    )
    print(f"{time.process_time() - begun:.0f} CPU seconds of training")
    return conv


def compress(model: pf.ConvMADE, images: Tensor, levels: int, path: Path) -> dict[str, int]:
    """Writes, reads, compares, and prints sizes in bytes."""
    codec = Codec(model)
    begun = time.process_time()
    path.write_bytes(codec.encode(images, verify=False))
    written = time.process_time()
    restored = codec.decode(path.read_bytes())
    took = time.process_time() - written
    if restored.dtype != images.dtype or not torch.equal(restored, images):
        sys.exit("what was restored is not what was compressed")
    sizes = {BOUND: round(float(codec.bits(images).sum()) / 8), OURS: path.stat().st_size}
    sizes |= general(images.numpy(), (levels - 1).bit_length())
    print(f"All {len(images)} images restored bit for bit: {written - begun:.1f} s to write, {took:.1f} s to read")
    weights = sum(p.numel() for p in model.parameters()) * 4
    print(f"(the model itself: {weights:,} bytes)")
    for name, size in sorted(sizes.items(), key=lambda each: each[1]):
        print(f"  {name:<26}{size:>9,} bytes {8 * size / images.numel():7.3f} bits per pixel")
    return {name: 8 * size / images.numel() for name, size in sizes.items()}


def draw(ax: Axes, title: str, sizes: dict[str, float]) -> None:
    """Bars of bits per pixel, the smallest on top, without the uncompressed sizes."""
    shown = sorted((item for item in sizes.items() if "uncompressed" not in item[0]), key=lambda item: -item[1])
    names, values = zip(*shown, strict=True)
    colors = [TRUTH if name == BOUND else FLOW if name == OURS else OTHER for name in names]
    bars = ax.barh(names, values, color=colors, height=0.7)
    ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    ax.set(title=title, xlabel="bits per pixel", xlim=(0, max(values) * 1.12))


def main() -> None:
    if importlib.util.find_spec("constriction") is None:
        print("The range coder is missing: pip install 'pyro-flows[compression]'")
        return
    args = begin(__doc__, mnist={"type": Path, "help": "the folder of mnist.npz"})
    sets = {"300 digits, 8 x 8 of 17 levels": (digits(), 17)}
    if args.mnist is not None:
        sets["1,000 of MNIST, 28 x 28 of 256 levels"] = (mnist_bytes(args.mnist), 256)
    fig, axes = plt.subplots(1, len(sets), figsize=(4.8 * len(sets), 2.6), squeeze=False, layout="constrained")
    for ax, (title, ((train, held_out, test), levels)) in zip(axes[0], sets.items(), strict=True):
        print(title)
        test = test[:20] if args.smoke else test
        model = fit(args, train, held_out[:50] if args.smoke else held_out, levels)
        draw(ax, title, compress(model, test, levels, args.out / "images.pfz"))
    save(fig, args.out / "compression.png")


if __name__ == "__main__":
    main()
