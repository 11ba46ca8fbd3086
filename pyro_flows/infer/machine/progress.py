"""The progress bar of a fit."""

from __future__ import annotations

from tqdm.auto import tqdm

from pyro_flows.infer.machine.processes import heed

__all__ = ["ProgressBar"]

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"


class ProgressBar:
    """A bar from 0 to 100 %, which vanishes at the end."""

    def __init__(self, name: str, show: bool) -> None:
        self._bar = tqdm(total=100, desc=name, disable=not show, leave=False, unit="%", bar_format=_FORMAT)

    @property
    def hidden(self) -> bool:
        """Whether nothing is shown."""
        return bool(self._bar.disable)

    def show(self, fraction: float | None, what: str) -> None:
        """Says what is done, and moves the bar if a fraction is given; heeds an interruption."""
        heed()
        if fraction is not None:
            self._bar.n = min(100, int(100 * fraction))
        self._bar.set_postfix_str(what)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
