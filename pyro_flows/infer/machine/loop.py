"""The skeleton of training, shared by every fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from pyro_flows.infer.machine.budget import Budget
from pyro_flows.infer.machine.checkpoint import Keeper
from pyro_flows.infer.machine.interrupts import interrupts_held_back

__all__ = ["TrainingLoop"]


class TrainingLoop(ABC):
    """Trains a module, and leaves it in its best state whatever ends the training."""

    def __init__(self, flow: nn.Module, budget: Budget) -> None:
        self.flow, self.budget = flow, budget

    def run(self, keeper: Keeper | None = None) -> None:
        """Trains to the end; leaves the flow in evaluation mode and without gradients.

        An interruption (``KeyboardInterrupt``, ``SystemExit``) makes ``keeper`` write the last kept state; a run
        resumed there equals one that never stopped.
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
        """Takes all remaining steps, and calls :meth:`keep` after each round."""

    @abstractmethod
    def settle(self) -> None:
        """Restores the best state, also after an error."""

    def keep(self, rows: int, *, write: bool = False) -> None:
        """Keeps the state for a checkpoint."""
        if self.keeper is not None:
            self.keeper.keep(rows, write=write)

    def snapshot(self) -> dict[str, Any]:
        """Copies the flow's state."""
        return {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in self.flow.state_dict().items()}
