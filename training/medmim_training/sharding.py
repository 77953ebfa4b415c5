"""Weights split over processes (FSDP2): each holds a share of every weight, of its gradient and of its moments.

With torch alone: accelerate splits on GPUs only, and this way a cluster runs what the tests run. What is saved is
whole, so a checkpoint does not depend on how many processes wrote it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def repeated_parts(module: nn.Module) -> list[nn.Module]:
    """What a network is a chain of, such as blocks: members with weights of its lists, inner lists first."""
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList | nn.Sequential)]
    return [part for each in reversed(lists) for part in each if next(part.parameters(), None) is not None]


def shard(module: nn.Module, device: torch.device) -> None:
    """Splits the weights of a module over all processes, in place; each repeated part is put together when it runs.

    Args:
        module: Called through its `forward` from now on.
        device: Of this process.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    module.to(device)
    for part in (*repeated_parts(module), module):
        fully_shard(part, mesh=mesh)


def whole(state: Any) -> Any:
    """A nested state with every split tensor put together, on the CPU. All processes must call this."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), state)


def load_whole(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimizer a whole state, split as the weights that it is for.

    Args:
        optimizer: Its weights may be split or not.
        state: As `whole` gives it.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def like(weight: Tensor, tensor: Tensor) -> Tensor:
        if not isinstance(weight, DTensor) or tensor.shape != weight.shape:  # the number of steps is not split
            return tensor
        return distribute_tensor(tensor, weight.device_mesh, weight.placements)

    moments = {
        number: {name: like(weights[number], tensor) for name, tensor in moment.items()}
        for number, moment in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
