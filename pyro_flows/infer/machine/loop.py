"""The skeleton of training: what every fit does around its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.checkpoint import Keeper
from pyro_flows.infer.machine.interrupts import interrupts_held_back

__all__ = ["TrainingLoop"]


class TrainingLoop(ABC):
    """Trains a module, and leaves it in its best state whatever ends the training.

    Attributes:
        flow: the module that is trained.
        budget: how long to train.
    """

    def __init__(self, flow: nn.Module, budget: Budget) -> None:
        self.flow, self.budget = flow, budget

    def run(self, keeper: Keeper | None = None) -> None:
        """Trains until something says stop; leaves the flow in evaluation mode and without gradients.

        An interruption (``KeyboardInterrupt``, ``SystemExit``) writes the state that was kept last on the way out;
        a run that resumes there equals one that never stopped.

        Args:
            keeper: writes checkpoints; ``None`` for none.
        """
        self.keeper = keeper
        interrupted = True
        try:
            self.train()
            interrupted = False
        except Exception:
            interrupted = False
            raise
        finally:
            with interrupts_held_back():
                self.settle()
                self.flow.zero_grad(set_to_none=True)
                self.flow.eval()
                if interrupted and keeper is not None:
                    keeper.leave()

    @abstractmethod
    def train(self) -> None:
        """Takes all steps that are left, and calls :meth:`keep` after each round of them."""

    @abstractmethod
    def settle(self) -> None:
        """Puts the best state back, after an error, too."""

    def keep(self, rows: int, *, write: bool = False) -> None:
        """Keeps the state for a checkpoint, as :meth:`~pyro_flows.infer.machine.checkpoint.Keeper.keep` does."""
        if self.keeper is not None:
            self.keeper.keep(rows, write=write)

    def snapshot(self) -> dict[str, Any]:
        """A copy of the flow's state."""
        return {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in self.flow.state_dict().items()}
