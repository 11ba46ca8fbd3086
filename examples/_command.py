"""The command lines of the scripts."""

import argparse
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path


def command(
    doc: str, smoke: str, *, folder: str = "", instead: str = "", picture: bool = False, **options: Mapping[str, object]
) -> Namespace:
    """Reads the command line of a script.

    Args:
        doc: the script's docstring.
        smoke: what ``--smoke`` does.
        folder: what the positional folder holds, for a script that needs one unless it is a smoke run.
        instead: an option that makes the folder unnecessary.
        picture: whether the script leaves a picture in ``--out``, which is made.
        **options: arguments of ``add_argument`` by the name of the option.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if folder:
        parser.add_argument("folder", type=Path, nargs="?", help=folder)
    parser.add_argument("--smoke", action="store_true", help=smoke)
    for name, how in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    if picture:
        parser.add_argument("--out", type=Path, help="folder for pictures (default: out, temporary with --smoke)")
    args = parser.parse_args()
    if folder and args.folder is None and not args.smoke and getattr(args, instead, None) is None:
        parser.error(f"give the folder of the data, {f'--{instead}, ' if instead else ''}or --smoke")
    if picture:
        args.out = args.out or Path(tempfile.mkdtemp() if args.smoke else "out")
        args.out.mkdir(parents=True, exist_ok=True)
        import matplotlib  # here, because other scripts run without it

        matplotlib.use("Agg")
    return args
