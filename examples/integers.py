"""An integer discrete flow: two dependent counts, and handwritten digits as whole numbers.

    python examples/integers.py           # integers.png in out/; about a minute of CPU time
    python examples/integers.py --smoke   # in seconds, with budgets too small to mean anything

Two counts, the second about twice the first, have a mass at every pair of whole numbers; the masses of all pairs add up
to 1.  8 x 8 digits of 17 gray levels (Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998) go through
the flow to its base and back, without a difference in any pixel, in batches of any size.
"""

import sys
import time

import torch
from _script import SHADES, begin, digits, save
from matplotlib import pyplot as plt
from torch import Tensor

import pyro_flows as pf


def counts(n: int) -> Tensor:
    """Rows of two counts."""
    first = torch.poisson(torch.full((n,), 6.0))
    return torch.stack((first, 2 * first + torch.randint(3, (n,))), -1).long()


def of_counts(steps: int, seed: int) -> tuple[pf.Flow, Tensor]:
    """A flow of two counts, and its masses on a grid."""
    rows = counts(3000)
    flow = pf.Flow(pf.idf(2, levels=32, num_layers=2))
    flow.base.fit_marginals(rows)
    fit = pf.fit_density(flow, rows, steps=steps, lr=1e-2, seed=seed, progress=False)
    side = torch.arange(-300, 300)
    with torch.no_grad():
        masses = flow.log_prob(torch.cartesian_prod(side, side)).exp().view(600, 600)
    print(f"two counts: {fit.validation:.3f} nats of a new row; all masses add up to {masses.sum():.12f}")
    return flow, masses[300:320, 300:340]


def of_digits(steps: int, seed: int) -> tuple[pf.Flow, Tensor]:
    """A flow of digits, and the test digits."""
    train, held_out, test = digits()
    flow = pf.Flow(pf.idf((1, 8, 8), levels=17, num_layers=1, num_parts=4, num_scales=3))
    flow.base.fit_marginals(train)
    options = {"validation": held_out, "schedule": "cosine", "patience": 10_000, "weight_decay": 0.1, "progress": False}
    pf.fit_density(flow, train, steps=steps, seed=seed, **options)
    with torch.no_grad():
        bits = pf.bits_per_dim(flow.log_prob(test), (1, 8, 8)).mean()
        base = flow.chain.inv(test)
        back = torch.cat([flow.chain(part) for part in base.split(7)])
    if not torch.equal(back, test.double()):
        sys.exit("the way back in other batches is not exact")
    print(
        f"digits: {bits:.3f} bits per pixel; all {len(test)} come back in batches of 7, from {int(base.min())} to "
        f"{int(base.max())} in the base"
    )
    return flow, test


def main() -> None:
    args = begin(__doc__)
    begun = time.process_time()
    _, masses = of_counts(20 if args.smoke else 200, args.seed)
    flow, test = of_digits(4 if args.smoke else 300, args.seed)
    print(f"{time.process_time() - begun:.0f} CPU seconds")
    fig, axes = plt.subplot_mosaic(
        [["data", "digits"], ["flow", "base"], ["flow", "draws"]],
        figsize=(9, 4),
        width_ratios=[1, 2],
        layout="constrained",
    )
    seen = torch.zeros(20, 40)
    for first, second in counts(3000):
        if first < 20 and second < 40:
            seen[first, second] += 1
    for name, values, title in (("data", seen, "two counts"), ("flow", masses, "masses of the flow")):
        axes[name].imshow(values.T.numpy(), origin="lower", cmap=SHADES, aspect="auto", interpolation="none")
        axes[name].set(title=title, xlabel="first", ylabel="second")
    with torch.no_grad():
        rows = {"digits": test[:12], "base": flow.chain.inv(test[:12]), "draws": flow.sample((12,))}
    titles = {"digits": "test digits", "base": "the same in the base", "draws": "draws"}
    for name, images in rows.items():
        strip = torch.nn.functional.pad(images.double(), (0, 1)).permute(2, 0, 3, 1).reshape(8, -1)
        low, high = (-8, 16) if name == "base" else (0, 16)
        axes[name].imshow(strip.numpy(), cmap="Greys", vmin=low, vmax=high, interpolation="none")
        axes[name].set(title=titles[name], xticks=[], yticks=[])
    save(fig, args.out / "integers.png")


if __name__ == "__main__":
    main()
