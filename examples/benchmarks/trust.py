"""What the verdict is worth: wrong fits that it finds, right ones that it doubts, and evidences within their errors.

    python examples/benchmarks/trust.py                                     # 120 fits, about twenty minutes
    python examples/benchmarks/trust.py --kinds chain ring banana nested --seconds 2 --seeds 300 301 302 303 304 305
    python examples/benchmarks/trust.py --kinds ring spiral crescents --seconds 2 --refine 5  # refined ones, too
    python examples/benchmarks/trust.py --smoke                             # two fits, too short to count

Targets are those of ``_exact_targets.py``: sixteen kinds of densities with exact draws and a log evidence of 0, with
other numbers for each seed.  Each run is a process of its own with one thread, float64, and a budget of CPU seconds.

A fit is *right* if 20,000 draws, resampled by their weights, have every mean within 0.1 standard deviations and every
standard deviation within 10 %, of asinh(x) where tails are heavy.  It *covers all modes* if the search misses none.
The walk's statistics are the share of walkers whose weight is above the largest of the guide's draws, whose threshold
in the package was chosen on seeds below 100, and the largest certain shift of a mean; it alarms by either.  With
``--refine``, each fit is refined, too, and its chains' draws are held to the same errors.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _exact_targets import KINDS, target
from _runs import Row, command, complete, machine, markdown

DRAWS = 20_000
RIGHT = 0.1
SURE = 1.645  # standard errors of an interval of 90 %
THRESHOLDS = (0.001, 0.003, 0.005, 0.01, 0.02)
EVEN = 0.9  # effective part of the draws of a good guide
STRAY, FEW_STRAY, SHIFT = 0.003, 2, 0.1  # of the package's rule


def run(kind: str, seed: int, seconds: float, steps: int, refine: float) -> Row:
    """One fit."""
    time.monotonic = time.process_time
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    from pyro_flows.infer import AutoFlow, fit_guide

    known = target(kind, seed)
    begin = time.process_time()
    limit = {"steps": steps} if steps else {"seconds": seconds}
    fit = fit_guide(AutoFlow(known.model, seed=seed), progress=False, **limit)
    spent = time.process_time() - begin
    torch.manual_seed(seed)
    walk, probe = fit.assessment.walk, fit.assessment.probe
    found: Row = {}
    if refine:
        begin = time.process_time()
        refined = fit.refine(seconds=refine, progress=False)
        found = {"refined_cpu": time.process_time() - begin, "refined": known.errors(refined.sample(DRAWS)["x"])}
        found |= {"refined_ok": refined.verdict.ok, "refined_why": refined.verdict.text.split("Next: ")[1]}
    return found | {
        "kind": kind,
        "seed": seed,
        "seconds": seconds,
        "steps": steps,
        "refine": refine,
        "dim": known.dim,
        "ess": fit.ess,
        "verdict": fit.verdict.label,
        "ok": fit.verdict.ok,
        "errors": known.errors(fit.sample(DRAWS)["x"]),
        "resampled": known.errors(fit.sample(DRAWS, resampled=True)["x"]),
        "missing": 0.0 if probe is None else probe.missing_share,
        "above": None if walk is None else walk.above,
        "shift": None if walk is None else walk.shift,
        "walkers": 0 if walk is None else len(walk.log_weights),
        "moves": 0 if walk is None else walk.num_moves,
        "log_evidence": fit.log_evidence,
        "error": fit.importance.log_evidence_error,
        "cpu": spent,
    }


def alarms(row: Row) -> bool:
    """Whether the walk speaks against a fit, as the verdict has it."""
    strayed = row["above"] > STRAY and round(row["above"] * row["walkers"]) >= FEW_STRAY
    return strayed or row["shift"] > SHIFT


def is_right(row: Row, which: str = "resampled") -> bool:
    """Whether all means and standard deviations are as they should be."""
    return max(row[which]) < RIGHT


def roc(rows: list[Row]) -> str:
    """What each threshold of the walk finds and doubts."""
    walked = [row for row in rows if row["above"] is not None]
    wrong = [row for row in walked if not is_right(row) and row["missing"] < 0.01]
    even = [row for row in walked if is_right(row) and row["ess"] >= EVEN]
    uneven = [row for row in walked if is_right(row) and row["ess"] < EVEN]
    rules: dict[str, Callable[[Row], bool]] = {
        f"share above {least:g}": lambda row, least=least: row["above"] > least for least in THRESHOLDS
    }
    rules[f"a shift above {SHIFT}"] = lambda row: row["shift"] > SHIFT
    rules["the package's rule"] = alarms
    lines = []
    for words, rule in rules.items():
        lines.append([words, *(f"{sum(map(rule, part))} of {len(part)}" for part in (wrong, even, uneven))])
    pairs = [(x["above"] > y["above"]) + 0.5 * (x["above"] == y["above"]) for x in wrong for y in even + uneven]
    area = f"\nArea under the curve of the share: {sum(pairs) / len(pairs):.3f}" if pairs else ""
    header = ["", "wrong, all modes covered", f"right, ESS from {EVEN}", "right, ESS below"]
    return markdown(header, lines) + area


def verdicts(rows: list[Row]) -> str:
    """How often each verdict is given to right and to wrong fits."""
    lines = []
    for label in dict.fromkeys(row["verdict"] for row in rows):
        these = [row for row in rows if row["verdict"] == label]
        plain, resampled = (sum(is_right(row, which) for row in these) for which in ("errors", "resampled"))
        lines.append([label, str(len(these)), str(plain), str(resampled)])
    return markdown(["verdict", "fits", "right", "right, resampled"], lines)


def evidence(rows: list[Row]) -> str:
    """How often the log evidence, which is 0, lies in its interval."""
    lines = []
    for name, these in (("ok", [row for row in rows if row["ok"]]), ("all", rows)):
        inside = sum(abs(row["log_evidence"]) <= SURE * row["error"] + 1e-6 for row in these)
        lines.append([name, str(len(these)), f"{inside / max(len(these), 1):.0%}"])
    return markdown(["verdict", "fits", "within intervals of 90 %"], lines)


def refined(rows: list[Row]) -> str:
    """How many refined fits are right, and called so."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        these = [row for row in rows if row["kind"] == kind and row.get("refine")]
        pairs = [(is_right(row, "refined"), bool(row["refined_ok"])) for row in these]
        counts = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        lines.append([str(kind), str(len(these)), *map(str, counts)])
    whole = [str(sum(int(line[k]) for line in lines)) for k in range(1, 6)]
    header = ["refined", "fits", "right and ok", "right and not ok", "wrong and ok", "wrong and not ok"]
    return markdown(header, [*lines, ["all", *whole]])


def said(row: Row) -> str:
    """The line of one fit."""
    above = "-" if row["above"] is None else f"{row['above']:.4f}"
    mean, width = row["resampled"]
    about = f"{row['kind']:<10}{row['seed']:>5}  ESS {row['ess']:.3f}  resampled {mean:.3f} {width:.3f}  above {above}"
    about += f"  {row['cpu']:.1f} s  {row['verdict']}"
    if row.get("refine"):
        mean, width = row["refined"]
        words = "ok" if row["refined_ok"] else row["refined_why"]
        about += f"; refined {mean:.3f} {width:.3f}  {row['refined_cpu']:.1f} s  {words}"
    return about


def main() -> None:
    args = command(
        __doc__,
        "two fits of 60 steps",
        kinds={"nargs": "+", "default": list(KINDS), "choices": list(KINDS)},
        seeds={"type": int, "nargs": "+", "default": list(range(200, 208))},
        seconds={"type": float, "default": 5.0, "help": "CPU seconds of a fit"},
        steps={"type": int, "default": 0, "help": "steps in place of seconds"},
        refine={"type": float, "default": 0.0, "help": "CPU seconds of refining each fit"},
        jobs={"type": int, "default": 1, "help": "fits at a time"},
        results={"type": Path, "help": "JSON lines of fits, read and added to"},
    )
    if args.smoke:
        args.kinds, args.seeds, args.steps = ["gaussian", "chain"], [0], 60
    print(f"{machine()}; float64, one thread a fit, CPU seconds\n")
    rows = complete(
        run,
        [(kind, seed, args.seconds, args.steps, args.refine) for seed in args.seeds for kind in args.kinds],
        lambda row: (row["kind"], row["seed"], row["seconds"], row["steps"], row.get("refine", 0.0)),
        said,
        results=args.results,
        jobs=args.jobs,
        fresh=False,
    )
    for table in (verdicts(rows), roc(rows), evidence(rows), *([refined(rows)] if args.refine else [])):
        print("\n" + table)


if __name__ == "__main__":
    main()
