"""Several processes, as `accelerate launch` or `torchrun` starts them, that share one piece of work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from .models.run import TOKEN_BAR


T = TypeVar("T")

# A process that has done its share waits this long for the others; launchers end all when one fails.
TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    Attributes:
        index: its number, the main one's is 0.
        count: how many there are.
        device: where its model belongs; None for a process that is alone.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of some items: every `count`-th."""
        return items[self.index :: self.count]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        return gather_object([value]) if self.count > 1 else [value]

    def agree(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in every process. Where it fails in any, the first that failed raises its error and the
        others end quietly, so that one message is printed and nobody waits for a process that is gone."""
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as caught:
            error = caught
        failed = self.gather(error is not None)
        if True not in failed:
            return result
        if error is not None and failed.index(True) == self.index:
            raise error
        raise SystemExit(2)

    def from_main(self, function: Callable[..., T], *arguments: Any) -> T:
        """Result of a function that the main process alone calls, in every process; errors as in `agree`."""
        result = self.agree(function, *arguments) if self.is_main else self.agree(lambda: None)
        return broadcast_object_list([result])[0] if self.count > 1 else result

    def bar(self, what: str, total: int, done: int) -> tqdm:
        """Progress bar of this process's share, in tokens, of which some are done already."""
        if self.count > 1:
            what = f"{what}, process {self.index + 1} of {self.count}"
        # Bars of several processes would overwrite each other.
        hidden = not self.is_main
        return tqdm(total=total, initial=done, desc=what, leave=None, disable=hidden or total == 0, **TOKEN_BAR)


def processes() -> Processes:
    """Those that this process was started with; the first call meets the others."""
    started: Any = os.environ.get("WORLD_SIZE", "1")
    if int(started) < 2 and not torch.distributed.is_initialized():
        return Processes()
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
    return Processes(state.process_index, state.num_processes, state.device)
