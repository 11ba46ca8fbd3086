"""Images: handwritten digits learned by MintNet, drawn, taken to the base and back, and judged pixel by pixel.

    python examples/images.py               # prints tables, leaves two pictures in out/; two to three minutes
    python examples/images.py --data FOLDER # the same with 28 x 28 digits of mnist.npz in that folder
    python examples/images.py --smoke       # the same in seconds, with budgets too small to mean anything

Two flows learn 8 x 8 digits of 17 gray levels (Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998),
or those of MNIST, rounded to as many levels.
One has layers in both orientations and two squeezes: its draws, what becomes of digits on the way to the base and back,
and ways between two digits are in images_samples.png.  The other has layers in one orientation, so that its density is
a product of conditionals of single pixels: its maps of surprise, in images_anomalies.png, show which pixels of a digit
were tampered with.  The table says how well the scores of both tell digits from images of other kinds, hard ones among
them, by the area under the ROC curve (0.5 is chance).
"""

import math
import time
from argparse import Namespace
from pathlib import Path

import torch
from _script import FLOW, OTHER, TRUTH, begin, digits, mean_of, mnist, save, save_rows
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

import pyro_flows as pf
from pyro_flows.infer import AnomalyDetector, pixel_scores

LEVELS = 17


def fit(args: Namespace, train: Tensor, held_out: Tensor) -> dict[str, pf.Dequantized]:
    """Both flows, trained."""
    shape = train.shape[1:]
    small = shape[-1] < 16
    shapes = {
        "both orientations": {"num_layers": 6, "num_groups": (16, 8, 4) if small else (12, 8, 4), "squeeze": 2},
        "one orientation": {"num_layers": 4, "num_groups": 16 if small else 8, "one_sided": True},
    }
    if args.smoke:
        shapes["both orientations"] |= {"num_layers": 3, "num_groups": (4, 2, 1)}
        shapes["one orientation"] |= {"num_layers": 1, "num_groups": 2}
    budgets = {"both orientations": (2500, 5e-3), "one orientation": (1500, 1e-2)}
    if not small:
        budgets = {"both orientations": (200, 5e-3), "one orientation": (400, 1e-2)}
    models = {}
    for name, options in shapes.items():
        chain = pf.Chain([pf.mintnet(shape, **options), pf.LogitPixels(shape, LEVELS)])
        models[name] = model = pf.Dequantized(pf.Flow(chain), LEVELS)
        steps, lr = budgets[name]
        begun = time.process_time()
        pf.fit_density(
            model,
            train,
            validation=held_out,
            steps=10 if args.smoke else steps,
            batch_size=64 if small else 32,
            lr=lr,
            schedule="cosine",
            patience=10_000,
            seed=args.seed,
            progress=False,
        )
        print(f"{name}: {time.process_time() - begun:.0f} CPU seconds of training")
    return models


# Scores.


@torch.no_grad()
def bits(model: pf.Dequantized, rows: Tensor, draws: int = 20) -> tuple[str, str]:
    """Bits per pixel with two standard errors: of the bound by one noise, and by all of them together."""
    terms = model.scores(rows, num_noise_samples=draws, fresh=False)
    together = terms.logsumexp(0) - math.log(draws)
    found = (pf.bits_per_dim(scores, rows.shape[1:]) for scores in (terms.mean(0), together))
    loose, tight = map(mean_of, found)
    return loose, tight


def tampered(digits: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits with ``count`` pixels moved by at least 5 levels, and their places, shape ``(rows, count)``."""
    flat = digits.flatten(1)
    places = torch.rand(flat.shape, generator=generator).topk(count, 1).indices
    other = (flat.gather(1, places) + 5 + torch.randint(8, places.shape, generator=generator)) % LEVELS
    return flat.scatter(1, places, other).view_as(digits), places


def anomalies(digits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Images of other kinds, made of digits where that is possible."""
    half = digits.shape[2] // 2
    shuffle = torch.rand(digits.flatten(1).shape, generator=generator).argsort(1)
    one = (len(digits), 1, 1, 1)
    return {
        "noise": torch.randint(LEVELS, digits.shape, generator=generator),
        "inverted": LEVELS - 1 - digits,
        "pixels shuffled": digits.flatten(1).gather(1, shuffle).view_as(digits),
        "one level": torch.randint(LEVELS, one, generator=generator).expand_as(digits),
        "white": torch.zeros_like(digits),
        "a quarter turn": digits.rot90(1, (2, 3)),
        "mirrored": digits.flip(3),
        "halves of two": torch.cat((digits[:, :, :half], digits.roll(1, 0)[:, :, half:]), 2),
        "half as dark": digits // 2,
        "a quarter as dark": digits // 4,
        "3 pixels": tampered(digits, 3, generator)[0],
        "2 pixels": tampered(digits, 2, generator)[0],
        "1 pixel": tampered(digits, 1, generator)[0],
    }


def area(odd: Tensor, usual: Tensor) -> float:
    """Under the ROC curve: how often an odd one has the larger score."""
    return float((odd[:, None] > usual).double().mean() + (odd[:, None] == usual).double().mean() / 2)


def judge(models: dict[str, pf.Dequantized], reference: Tensor, usual: Tensor, kinds: dict[str, Tensor]) -> Tensor:
    """Prints how well digits are told from images of other kinds; returns the bits of all, by the first model."""
    print(f"\nDigits and other images, {len(usual)} of each, with {len(reference)} digits as reference")
    print(f"{'':<34}{'both orientations':<19}{'one orientation':<15}")
    print(f"{'':<20}{'bits':<7}{'flagged':<9}{'more':<8}{'either':<11}{'more':<8}{'either':<8}")
    pairs = [[AnomalyDetector(m, reference, two_sided=two) for two in (False, True)] for m in models.values()]
    first = pairs[0][0]
    own = [d.scores(usual) for pair in pairs for d in pair]
    for name, rows in {"digits": usual, **kinds}.items():
        flagged = first.flag(rows, level=0.05).double().mean()
        areas = (area(d.scores(rows), each) for d, each in zip((d for pair in pairs for d in pair), own, strict=True))
        line = "".join(f"{each:<{width}.3f}" for each, width in zip(areas, (8, 11, 8, 8), strict=True))
        print(f"{name:<20}{first.bits(rows).mean():<7.2f}{flagged:<9.2f}{line}".rstrip())
    print(
        "  bits, flagged: mean bits per pixel; share of more bits than the threshold of level 0.05; by the first flow"
    )
    print(
        "  more, either: area under the ROC curve, if images of more bits are suspect, or those of fewer bits as well"
    )
    return torch.stack([first.bits(rows) for rows in (usual, *kinds.values())])


def locate(model: pf.Dequantized, reference: Tensor, digits: Tensor, generator: torch.Generator, most: int = 5) -> None:
    """Prints how often tampered pixels are among the most surprising ones."""
    pixels = digits[0].numel()
    print(
        f"\nTampered pixels among the {most} of {pixels} that surprise most (chance: {most / pixels:.2f}), by maps as"
    )
    print("they are, and held against mean and standard deviation of each place in the reference")
    usual = pixel_scores(model, reference).flatten(1)
    for count in (1, 2, 3):
        rows, places = tampered(digits, count, generator)
        maps = pixel_scores(model, rows).flatten(1)
        shares = []
        for each in (maps, (maps - usual.mean(0)) / usual.std(0)):
            top = each.topk(most, 1).indices
            shares.append((places[:, :, None] == top[:, None]).any(-1).double().mean())
        print(f"  {count} of them: {shares[0]:.2f}, {shares[1]:.2f}")


# There and back.


@torch.no_grad()
def base_of(model: pf.Dequantized, digits: Tensor) -> Tensor:
    """Where the middles of pixels lie in the base."""
    return model.flow.chain.inverse_and_ladj(digits + 0.5)[0]


@torch.no_grad()
def intensities(model: pf.Dequantized, base: Tensor) -> Tensor:
    """Of pixels, in units of levels."""
    return model.flow.chain.forward_and_ladj(base)[0]


def there_and_back(model: pf.Dequantized, digits: Tensor) -> Tensor:
    """Prints how exact that is, and what it takes; returns the digits as they come back."""
    back = intensities(model, base_of(model, digits))
    error = (back - digits - 0.5).abs().max()
    same = (back.floor() == digits).double().mean()
    solves = [part.last_solve for part in model.flow.modules() if isinstance(part, pf.Mint)]
    sweeps = sum(solve.sweeps for solve in solves) / len(solves)
    print(f"\n{len(digits)} digits to the base and back, in {back.dtype}: {same:.2%} of the levels are the same")
    print(f"  largest error of an intensity: {error:.1e} levels")
    print(f"  sweeps of the solver: {sweeps:.1f} a layer; longest chain: {max(s.waves for s in solves)} coordinates")
    return back.floor().clamp(0, LEVELS - 1)


def between(model: pf.Dequantized, ends: Tensor, count: int) -> Tensor:
    """Images on the way between two digits, along the great circle through their places in the base."""
    a, b = base_of(model, ends)
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    t = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    length = a.norm() ** (1 - t) * b.norm() ** t
    way = ((1 - t) * angle).sin() * a / a.norm() + (t * angle).sin() * b / b.norm()
    return intensities(model, length * way / angle.sin()).floor().clamp(0, LEVELS - 1)


# Pictures.


def show(ax: Axes, image: Tensor, cmap: str = "Greys", most: float = LEVELS - 1) -> None:
    ax.imshow(image.squeeze(0).numpy(), cmap=cmap, vmin=0, vmax=most)
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(visible=True, color="#dddddd", linewidth=0.5)


def draw_samples(model: pf.Dequantized, test: Tensor, path: Path, columns: int = 12) -> None:
    """Digits, the same after a way to the base and back, draws, and ways between digits."""
    cool = 0.7 * torch.randn(columns, *test.shape[1:])
    blend = torch.linspace(0, 1, columns).view(-1, 1, 1, 1)
    rows = [
        ("digits", test[:columns]),
        ("there and back", there_and_back(model, test)[:columns]),
    ]
    if test.shape[-1] < 16:  # draws of large images take far more training than this to become digits
        rows += [("draws", model.sample((columns,))), ("base times 0.7", intensities(model, cool).floor())]
    for ends in (test[:2], test[2:4]):
        rows.append(("between, in the base", between(model, ends, columns)))
        rows.append(("between, by pixels", (1 - blend) * ends[0] + blend * ends[1]))
    save_rows(rows, LEVELS - 1, path)


def draw_anomalies(
    model: pf.Dequantized, digits: Tensor, names: list[str], scores: Tensor, generator: torch.Generator, path: Path
) -> None:
    """Digits with two pixels tampered with, maps of surprise, and bits per pixel of all kinds of images."""
    columns, side = 8, digits.shape[-1]
    reach = 0.5 if side < 16 else 1.5  # of the frame around a pixel
    shown = digits[:columns]
    rows, places = tampered(shown, 2, generator)
    maps = pixel_scores(model, rows) / math.log(2)
    fig = plt.figure(figsize=(8.6, 8.4))
    grid = fig.add_gridspec(3, columns, left=0.17, right=0.92, top=0.995, bottom=0.62, wspace=0.05, hspace=0.05)
    for row, (name, images) in enumerate((("digits", shown), ("2 pixels changed", rows), ("surprise, bits", maps))):
        for column in range(columns):
            ax = fig.add_subplot(grid[row, column])
            show(ax, images[column], *(("YlOrRd", 12) if row == 2 else ()))
            if column == 0:
                ax.set_ylabel(name, rotation=0, ha="right", va="center")
            for place in places[column].tolist() if row else ():
                y, x = divmod(place, side)
                corner, size = (x - reach, y - reach), 2 * reach
                ax.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=FLOW, linewidth=1.2))
    bar = fig.colorbar(ax.images[0], cax=fig.add_axes((0.935, 0.63, 0.014, 0.1)), ticks=[0, 6, 12])
    bar.outline.set_visible(False)
    ax = fig.add_axes((0.19, 0.07, 0.79, 0.5))
    low, first, middle, third, high = torch.quantile(scores, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double(), 1)
    lines = torch.arange(len(names))
    ax.barh(lines, third - first, 0.6, first, color=[FLOW] + [OTHER] * (len(names) - 1), alpha=0.8)
    ax.hlines(lines, low, high, color=TRUTH, linewidth=1)
    ax.plot(middle, lines, "|", color=TRUTH, markersize=9)
    ax.set_yticks(lines, names)
    ax.set(xscale="log", xlabel="bits per pixel by the other flow: quartiles, and 5 to 95 %")
    ticks = [t for t in (0.2, 0.5, 1, 2, 3, 5, 10, 20, 50) if scores.min() < t < scores.max()]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.invert_yaxis()
    save(fig, path)


def main() -> None:
    args = begin(__doc__, data={"type": Path, "help": "folder of mnist.npz"})
    print(f"torch {torch.__version__}, float32, {torch.get_num_threads()} threads, seed {args.seed}")
    train, held_out, test = (part.long() for part in (mnist(args.data) if args.data else digits()))
    held_out, test = held_out[:200], test[: 80 if args.data else 300]
    models = {name: model.eval() for name, model in fit(args, train, held_out).items()}
    print(f"\nBits per pixel, of {LEVELS} levels (two standard errors), by the bound of one noise and of 20 together")
    for name, model in models.items():
        for which, rows in (("train", train[: len(test)]), ("test", test)):
            loose, tight = bits(model, rows)
            print(f"  {name}, {which:<6}{loose}    {tight}")
    # Neither trained on nor stopped by: half is for reference, half to be judged.
    reference, usual = test.chunk(2)
    generator = torch.Generator().manual_seed(args.seed)
    kinds = anomalies(usual, generator)
    first, second = models.values()
    kinds["draws of the flow"] = first.sample((len(usual),))
    scores = judge(models, reference, usual, kinds)
    locate(second, reference, usual, generator)
    draw_samples(first, test, args.out / "images_samples.png")
    draw_anomalies(second, usual, ["digits", *kinds], scores, generator, args.out / "images_anomalies.png")


if __name__ == "__main__":
    main()
