"""What the benchmarks share: command lines, runs in processes of their own that are kept as lines of JSON, tables."""

import json
import platform
import statistics
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).parent.parent
Row = dict[str, object]
sys.path.append(str(EXAMPLES))

from _command import command  # noqa: E402

__all__ = [
    "EXAMPLES",
    "Row",
    "Table",
    "alone",
    "between",
    "command",
    "complete",
    "machine",
    "markdown",
    "shaken",
    "spread",
    "trained",
]


def complete(
    run: Callable[..., Row],
    wanted: Iterable[tuple],
    key: Callable[[Row], Hashable],
    say: Callable[[Row], str],
    *,
    results: Path | None = None,
    jobs: int = 1,
    fresh: bool = True,
) -> list[Row]:
    """Makes the runs that the file lacks, and returns all that are wanted, in their order.

    Args:
        run: one run; takes the entries of a wanted key.
        wanted: keys.
        key: the key of a result.
        say: the line to print of a new result.
        results: lines of JSON, read and added to.
        jobs: how many processes run at a time.
        fresh: whether each run has a process of its own.
    """
    stored = results.read_text().splitlines() if results is not None and results.exists() else []
    known = {key(row): row for row in map(json.loads, stored)}
    wanted = list(wanted)
    missing = [each for each in dict.fromkeys(wanted) if each not in known]
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1 if fresh else None) as pool:
        for future in as_completed([pool.submit(run, *each) for each in missing]):
            row = future.result()
            known[key(row)] = row
            if results is not None:
                with results.open("a") as file:
                    print(json.dumps(row), file=file)
            print(say(row), flush=True)
    return [known[each] for each in wanted]


def machine() -> str:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, torch {torch.__version__}, Python {platform.python_version()}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


class Table:
    """A table whose rows are printed as they come, and all together by ``str``."""

    def __init__(self, *header: str) -> None:
        self.header, self.rows = header, []

    def add(self, *row: str) -> None:
        self.rows.append(row)
        print("  ".join(row), flush=True)

    def __str__(self) -> str:
        return markdown(self.header, self.rows)


def alone() -> None:
    """Prepares a process that measures: one thread, no warnings, no validation of arguments."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributions.Distribution.set_default_validate_args(False)


@torch.no_grad()
def shaken(model: nn.Module, scale: float) -> nn.Module:
    """A model with normal noise on its parameters, so that there is something to solve."""
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return model


def between(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the standard deviation of several."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def trained(
    model: nn.Module,
    train: Tensor,
    validation: Tensor,
    args: Namespace,
    smoke_steps: int,
    batch_size: int,
    checkpoint: Path | None = None,
) -> tuple[nn.Module, float, int]:
    """A model of images after ``args.seconds`` of training, the CPU seconds that it took, and its steps.

    A part of the images is enough to stop by; all of them would take as long as training.
    """
    import pyro_flows as pf  # here, because workers that time other libraries import this module, too

    budget = {"steps": smoke_steps} if args.smoke else {"seconds": args.seconds, "max_epochs": 10_000}
    begin = time.process_time()
    found = pf.fit_density(
        model,
        train.to(args.device),
        validation=validation.to(args.device),
        progress=False,
        seed=args.seed,
        batch_size=min(batch_size, len(train)),
        schedule="cosine",
        patience=10_000,
        lr=args.lr,
        checkpoint=checkpoint,
        checkpoint_every=1,
        **budget,
    )
    return model.eval(), time.process_time() - begin, int(found.history["step"][-1])
