"""A density as marginals and conditionals see it."""

from __future__ import annotations

import torch
from torch import Size, Tensor

__all__ = ["Piece", "kept", "places_of", "put"]


class Piece:
    """Abstract base: a density whose marginals are known for *closed* sets of dimensions.

    Events are flat, shape ``(*batch, n)``.  *Inner* coordinates are such in which dimensions of the event move one by
    one, as far as possible on the whole line.  Sets of dimensions are boolean masks of shape ``(n,)`` on the CPU.  The
    numbers outside of a set never count.

    Attributes:
        size: the number ``n`` of dimensions.
        batch_shape: the batch shape of the density.
        reference: an event in inner coordinates, shape ``(*batch_shape, n)``.
        discrete: whether all dimensions are discrete.
        on_line: whether inner coordinates are free to take any values.
    """

    size: int
    batch_shape: Size
    reference: Tensor
    discrete = False
    on_line = True

    def closed(self, some: Tensor) -> Tensor:
        """The smallest closed set that holds ``some`` dimensions."""
        raise NotImplementedError

    def to_inner(self, y: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        """Inner coordinates, and the sum of log-slopes of ``some`` dimensions, from the event to these."""
        raise NotImplementedError

    def to_outer(self, z: Tensor) -> Tensor:
        """The event of inner coordinates."""
        raise NotImplementedError

    def score(self, z: Tensor, closed: Tensor) -> Tensor:
        """Log-density of a closed set in inner coordinates, shape ``(*batch,)``."""
        raise NotImplementedError

    def propose(self, z: Tensor, some: Tensor, closed: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws the other dimensions of a closed set given ``some``, of any law that covers theirs.

        Returns events, shape ``(num_samples, *batch, n)``, and the log-densities of what was drawn.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Does what :meth:`propose` needs once."""

    def complete(self, z: Tensor, closed: Tensor) -> Tensor:
        """Draws the dimensions outside of a closed set, exactly; in inner coordinates."""
        raise NotImplementedError

    def states(self, some: Tensor) -> Tensor | None:
        """All values of ``some`` dimensions, shape ``(states, number of them)``, if they are few."""
        return None

    def filled(self, y: Tensor, places: Tensor, batch: Size) -> Tensor:
        """An event with ``y``, shape ``(*, len(places))``, at these places and the reference elsewhere."""
        with torch.no_grad():
            whole = self.to_outer(self.reference)
        whole = whole.expand((*batch, self.size))
        return whole.index_copy(-1, places.to(y.device), y.to(whole.dtype).expand(*batch, len(places)))


def places_of(some: Tensor, like: Tensor) -> Tensor:
    """The indices of a set, on the device of another tensor."""
    return some.nonzero()[:, 0].to(like.device)


def put(z: Tensor, some: Tensor, values: Tensor) -> Tensor:
    """Replaces a set of the numbers of events by ``values``, shape ``(*batch, number of them)``."""
    whole = z.expand(values.shape[:-1] + z.shape[-1:])
    return whole.index_copy(-1, places_of(some, z), values.to(z.dtype))


def kept(some: Tensor, z: Tensor, other: Tensor) -> Tensor:
    """Numbers of ``z`` in a set, and of ``other`` outside of it."""
    return torch.where(some.to(z.device), z, other)
