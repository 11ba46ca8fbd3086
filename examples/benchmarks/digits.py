"""Handwritten digits: image flows and flows of vectors at equal time, by bits per pixel, with draws as a picture.

    python examples/benchmarks/digits.py                          # five models, three seeds, a CPU minute a run
    python examples/benchmarks/digits.py --models mintnet glow    # some of them
    python examples/benchmarks/digits.py --smoke                  # seconds

8 x 8 images of 17 levels (Alpaydin and Kaynak, 1998; the 1797 that scikit-learn has), split by one fixed permutation
into 1297 to train on, 200 to stop by and 300 to test on.  Pixels are dequantized by uniform noise and put on the real
line by a logit with margin 1e-6; a score is the bound of one noise, averaged over 20 of them, in bits per pixel.  All
models go through ``fit_density`` with the same batch, schedule and weight decay, and as many steps as take
``--seconds`` of CPU time, by a measurement of twenty beforehand.  Each has a learning rate of its own out of two,
chosen by validation with the first seed; the state of the best validation score is what is tested.  Flows of vectors
have an ``ActNorm`` at the data end, which brings pixels to unit scale.  Two more models are there for those who ask:
``mintnet-attention`` with one head in each layer and the order that it needs, and ``mintnet-position`` with that order
alone.
"""

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable

import torch
from _runs import command, complete, machine, markdown
from _script import digits, save_rows
from torch import Tensor

import pyro_flows as pf

LEVELS, SHAPE, NOISES = 17, (1, 8, 8), 20
MINTNET = {"num_layers": 8, "num_groups": (16, 16), "squeeze": 1, "act_norm": True}
MODELS: dict[str, Callable[[], pf.FlowTransform]] = {
    "mintnet": lambda: pf.mintnet(SHAPE, **MINTNET),
    "mintnet-position": lambda: pf.mintnet(SHAPE, order="position", **MINTNET),
    "mintnet-attention": lambda: pf.mintnet(SHAPE, attention=1, **MINTNET),
    "glow": lambda: pf.glow(SHAPE),
    "multiscale_realnvp": lambda: pf.multiscale_realnvp(SHAPE),
    "realnvp": lambda: pf.Chain([*pf.realnvp(SHAPE), pf.ActNorm(SHAPE)]),
    "maf": lambda: pf.Chain([*pf.maf(SHAPE), pf.ActNorm(SHAPE)]),
}
USUAL = ["mintnet", "glow", "multiscale_realnvp", "realnvp", "maf"]
RATES = (2e-3, 6e-3)


def fit(name: str, seed: int, lr: float, seconds: float) -> tuple[pf.Dequantized, float, float]:
    """A trained model, its validation score in bits per pixel, and CPU seconds."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    train, held_out, _ = digits()
    chain = MODELS[name]()
    model = pf.Dequantized(pf.Flow(pf.Chain([chain, pf.LogitPixels(SHAPE, LEVELS, margin=1e-6)])), LEVELS, seed=seed)
    options = {
        "validation": held_out,
        "progress": False,
        "seed": seed,
        "batch_size": 64,
        "schedule": "cosine",
        "patience": 10_000,
        "max_epochs": 100_000,
        "weight_decay": 0.3,
        "lr": lr,
    }
    trial = copy.deepcopy(model)
    pf.fit_density(trial, train, **options, steps=2)
    begin = time.process_time()
    pf.fit_density(trial, train, **options, steps=20)
    steps = max(2, int(20 * seconds / (time.process_time() - begin)))
    begin = time.process_time()
    found = pf.fit_density(model, train, **options, steps=steps)
    return model.eval(), pf.bits_per_dim(-found.validation, SHAPE) * -1, time.process_time() - begin


@torch.no_grad()
def score(model: pf.Dequantized, x: Tensor) -> tuple[float, float]:
    """Bits per pixel of the usual bound, and of the one that 20 noises together make."""
    terms = pf.bits_per_dim(model.scores(x, num_noise_samples=NOISES, fresh=False), SHAPE)
    tight = pf.bits_per_dim(torch.logsumexp(terms * -math.log(2) * 64, 0) - math.log(NOISES), SHAPE)
    return terms.mean().item(), tight.mean().item()


def run(name: str, seed: int, lr: float, seconds: float) -> dict[str, object]:
    """One line of the results."""
    model, validation, spent = fit(name, seed, lr, seconds)
    train, _, test = digits()
    loose, tight = score(model, test)
    torch.manual_seed(0)
    return {
        "name": name,
        "seed": seed,
        "lr": lr,
        "validation": validation,
        "train": score(model, train[:300])[0],
        "test": loose,
        "tight": tight,
        "seconds": spent,
        "parameters": sum(p.numel() for p in model.parameters()),
        "draws": model.sample((14,)).tolist(),  # a tensor would end with the process
    }


def main() -> None:
    args = command(
        __doc__,
        "two models, a second each",
        picture=True,
        models={"nargs": "+", "choices": MODELS, "default": USUAL},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        seconds={"type": float, "default": 60, "help": "CPU time of training, each"},
        rates={"type": float, "nargs": "+", "default": list(RATES), "help": "learning rates to choose from"},
        jobs={"type": int, "default": 1, "help": "runs at a time"},
    )
    if args.smoke:
        args.seconds, args.seeds, args.rates, args.models = 0.3, [0], [3e-3], args.models[:2]
    print(f"{machine()}; float32, one thread, {args.seconds:g} CPU s of training each, seeds {args.seeds}\n")
    collect = functools.partial(
        complete,
        functools.partial(run, seconds=args.seconds),
        key=lambda r: (r["name"], r["seed"], r["lr"]),
        say=lambda r: (
            f"{r['name']:<20} seed {r['seed']}, lr {r['lr']:g}: validation {r['validation']:.3f}, "
            f"test {r['test']:.3f}, {r['seconds']:.0f} s"
        ),
        jobs=args.jobs,
        fresh=not args.smoke,
    )
    first = collect([(name, args.seeds[0], lr) for name in args.models for lr in args.rates])
    best = {n: min((r for r in first if r["name"] == n), key=lambda r: r["validation"]) for n in args.models}
    more = collect([(n, seed, best[n]["lr"]) for n in args.models for seed in args.seeds[1:]])
    rows = []
    for name, found in best.items():
        runs = [found, *(r for r in more if r["name"] == name)]

        def mean(key: str, runs: list[dict[str, object]] = runs) -> str:
            each = [r[key] for r in runs]
            spread = f" ({min(each):.3f}-{max(each):.3f})" if len(each) > 1 else ""
            return f"{statistics.mean(each):.3f}{spread}"

        size = f"{found['parameters'] / 1000:.0f} k"
        seconds = f"{statistics.mean(r['seconds'] for r in runs):.0f}"
        rows.append(
            [name, size, f"{found['lr']:g}", mean("train"), mean("validation"), mean("test"), mean("tight"), seconds]
        )
    head = [
        "",
        "parameters",
        "learning rate",
        "train",
        "validation",
        "test",
        f"test, {NOISES} noises together",
        "CPU s",
    ]
    print("\n" + markdown(head, rows) + "\n")
    drawn = [(name, torch.tensor(found["draws"])) for name, found in best.items()]
    save_rows([("test images", digits()[2][:14]), *drawn], LEVELS - 1, args.out / "digits.png")


if __name__ == "__main__":
    main()
