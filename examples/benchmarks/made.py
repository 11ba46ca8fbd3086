"""MADE on binary data: held-out log-likelihoods beside the paper's, with settings chosen by validation alone.

    python examples/benchmarks/made.py FOLDER                   # five sets, three seeds; about half an hour
    python examples/benchmarks/made.py FOLDER --sets dna        # one set; minutes
    python examples/benchmarks/made.py --smoke                  # synthetic data, seconds

FOLDER holds one ``NAME.npz`` a set: ``dim``, and ``x_train``, ``x_valid`` and ``x_test`` as packed bits.  Any such file
will do; nothing is chosen by a set's name.

With the first seed, each of a few candidates is trained (``CANDIDATES``: the natural order, lists of a few or of many
random orders, endless orders with dropout of inputs); the one with the best validation score is then trained with the
other seeds too.  All have one hidden layer of 500 units, start from the data's marginals, and are left in the state of
their best validation score, which may be long before the last step.  Lists and endless orders are scored as ensembles.
Scores are nats per row: the mean over test rows and seeds, with two standard errors over rows, and the spread over
seeds; times are CPU seconds of training.
Independent Bernoullis have the training rows' means, smoothed by one row.
"""

import functools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _runs import Row, alone, command, complete, machine, markdown
from torch import Tensor

import pyro_flows as pf

PAPER = {"adult": -13.12, "connect4": -11.90, "dna": -79.66, "mushrooms": -9.68, "nips": -277.28}
CANDIDATES: dict[str, dict[str, object]] = {
    "natural order": {"order": "identity", "connectivity": "random", "num_masks": 1},
    "4 orders": {"order": "any", "connectivity": "random", "num_masks": 4},
    "32 orders": {"order": "any", "num_masks": 32, "mask_inputs": True},
    "any order, dropout": {"order": "any", "dropout": 0.2, "ensemble_size": 32},
}
WATCHED = 4  # members of an ensemble that validation looks at along the way
PATIENCE = 0.25  # of all epochs without a better validation score, after which training ends


def load(folder: Path | None, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows of bits."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        cause = torch.rand(240, 1, generator=generator) < 0.5
        x = ((torch.rand(240, 6, generator=generator) < 0.9) == cause).float()
        return x[:120], x[120:180], x[180:]
    held = np.load(folder / f"{name}.npz")
    dim = int(held["dim"])
    parts = (np.unpackbits(held[f"x_{part}"], axis=1)[:, :dim] for part in ("train", "valid", "test"))
    return tuple(torch.from_numpy(part).float() for part in parts)


def independent(train: Tensor, test: Tensor) -> float:
    """Score of independent Bernoullis."""
    logits = torch.logit((train.sum(0) + 0.5) / (len(train) + 1))
    return torch.distributions.Bernoulli(logits=logits).log_prob(test).sum(-1).double().mean().item()


def run(folder: Path | None, name: str, candidate: str, seed: int, steps: int) -> Row:
    """Trains one candidate, in a process of its own."""
    alone()
    train, validation, test = load(folder, name)
    torch.manual_seed(seed)
    width = 500 if folder else 20
    made = pf.MADE(train.shape[1], hidden_dims=(width,), seed=seed, **CANDIDATES[candidate]).fit_marginals(train)
    whole, made.ensemble_size = made.ensemble_size, min(made.ensemble_size, WATCHED)
    size = min(64, len(train))
    epochs = -(-steps // -(-len(train) // size))
    start = time.process_time()
    pf.fit_density(
        made,
        train,
        validation=validation,
        batch_size=size,
        lr=2e-3,
        schedule="cosine",
        steps=steps,
        patience=max(20, round(PATIENCE * epochs)),
        progress=False,
        seed=seed,
    )
    spent = time.process_time() - start
    made.ensemble_size = whole
    with torch.no_grad():
        scores = [torch.cat([made.log_prob(p) for p in part.split(1000)]).double() for part in (validation, test)]
    return {
        "set": name,
        "candidate": candidate,
        "seed": seed,
        "steps": steps,
        "validation": scores[0].mean().item(),
        "test": scores[1].mean().item(),
        "error": 2 * scores[1].std().item() / len(test) ** 0.5,
        "seconds": spent,
        "independent": independent(train, test),
        "rows": [len(train), train.shape[1]],
    }


def chosen(rows: list[Row], name: str, seed: int) -> str:
    """The candidate with the best validation score."""
    these = [row for row in rows if (row["set"], row["seed"]) == (name, seed)]
    return str(max(these, key=lambda row: row["validation"])["candidate"])


def table(rows: list[Row], sets: list[str], seeds: list[int]) -> str:
    """Test scores of what was chosen."""
    lines = []
    for name in sets:
        best = chosen(rows, name, seeds[0])
        these = [row for row in rows if (row["set"], row["candidate"]) == (name, best) and row["seed"] in seeds]
        tests = [float(row["test"]) for row in these]
        spread = f", {statistics.stdev(tests):.2f} over seeds" if len(tests) > 1 else ""
        search = sum(float(r["seconds"]) for r in rows if (r["set"], r["seed"]) == (name, seeds[0]))
        size = these[0]["rows"]
        lines.append(
            [
                f"{name} ({size[1]} columns, {size[0]} rows)",
                f"{these[0]['independent']:.2f}",
                f"{PAPER[name]:.2f}" if name in PAPER else "",
                f"{statistics.mean(tests):.2f} ± {statistics.mean(float(r['error']) for r in these):.2f}{spread}",
                best,
                f"{statistics.mean(float(r['seconds']) for r in these):.0f}; {search:.0f}",
            ]
        )
    header = ["", "independent", "MADE (paper)", "MADE here", "chosen", "CPU s of a run; of the choice"]
    return markdown(header, lines)


def trials(rows: list[Row], sets: list[str], seed: int) -> str:
    """Validation and test scores of all candidates."""
    lines = []
    for candidate in CANDIDATES:
        line = [candidate]
        for name in sets:
            key = (name, candidate, seed)
            these = [row for row in rows if (row["set"], row["candidate"], row["seed"]) == key]
            line.append(f"{these[0]['validation']:.2f} / {these[0]['test']:.2f}" if these else "")
        lines.append(line)
    return markdown(["validation / test", *sets], lines)


def main() -> None:
    args = command(
        __doc__,
        "synthetic data, a few steps",
        folder="where the data are",
        sets={"nargs": "+", "help": "by default all files of the folder"},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        steps={"type": int, "default": 20000},
        jobs={"type": int, "default": 1, "help": "runs at a time"},
        results={"type": Path, "help": "JSON lines of runs, read and added to"},
    )
    if args.smoke:
        args.folder, args.sets, args.seeds, args.steps = None, ["synthetic"], [0, 1], 10
        args.results = Path(tempfile.mkdtemp()) / "runs.jsonl"
    sets = args.sets or sorted(path.stem for path in args.folder.glob("*.npz"))
    print(f"{machine()}; at most {args.steps} steps, seeds {args.seeds}, float32, one thread a run\n")
    first, *others = args.seeds

    def made(wanted: list[tuple[str, str, int]]) -> list[Row]:
        return complete(
            functools.partial(run, args.folder),
            [(*each, args.steps) for each in wanted],
            lambda r: (r["set"], r["candidate"], r["seed"], r["steps"]),
            lambda r: (
                f"{r['set']:<12}{r['candidate']:<22}seed {r['seed']}  validation {r['validation']:9.3f}  "
                f"test {r['test']:9.3f}  {r['seconds']:6.1f} s"
            ),
            results=args.results or Path("made.jsonl"),
            jobs=args.jobs,
            fresh=not args.smoke,
        )

    rows = made([(name, candidate, first) for name in sets for candidate in CANDIDATES])
    rows += made([(name, chosen(rows, name, first), seed) for name in sets for seed in others])
    print("\n" + table(rows, sets, args.seeds) + "\n")
    print(trials(rows, sets, first))


if __name__ == "__main__":
    main()
