"""Values of a module, out of the way and back."""

import torch
from torch import Tensor, nn


class Parking:
    """Where the values of parameters wait on the CPU. The parameters stay the same objects all the while."""

    def __init__(self):
        self._parked: list[tuple[Tensor, torch.device, Tensor]] = []

    @property
    def bytes(self) -> int:
        return sum(kept.nbytes for _, _, kept in self._parked)

    def move(self, module: nn.Module) -> None:
        """Moves a module's parameters and buffers to the CPU; what is there stays."""
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type != "cpu":
                self._park(tensor, tensor.data.cpu())

    def cast(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Leaves parameters of `dtype` where they were, and keeps their values on the CPU."""
        for tensor in module.parameters():
            if tensor.is_floating_point() and tensor.dtype != dtype:
                self._park(tensor, tensor.data.cpu(), tensor.data.to(dtype))

    def back(self) -> None:
        """Puts all values back where they were. What fails for lack of memory can be tried again."""
        while self._parked:
            tensor, device, kept = self._parked[-1]
            tensor.data = kept.to(device)  # the very tensor where it was on the CPU
            self._parked.pop()

    def _park(self, tensor: Tensor, kept: Tensor, replacement: Tensor | None = None) -> None:
        self._parked.append((tensor, tensor.device, kept))
        tensor.data = kept if replacement is None else replacement
