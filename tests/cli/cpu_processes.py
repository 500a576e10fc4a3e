"""Lets Axolotl train in several processes on CPUs (gloo), which the host keeps to accelerators. For tests only.

List `tests.cli.cpu_processes.CpuProcesses` as the first plugin and launch with torchrun and ACCELERATE_USE_CPU=true.
Six places stand in the way: the process group is made for accelerators, a torch with CUDA is asked whether the
processes' GPUs reach each other, the device map is that of a GPU, the device mesh is built for CUDA, accelerate does
not look at the FSDP settings of CPU processes, and gives CPUs numbers (cpu:0), to which torch loads no optimiser's
state.
"""

from __future__ import annotations

from typing import Any

import axolotl.utils.trainer
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

_build_device_mesh = ParallelismConfig.build_device_mesh
_set_device = PartialState.set_device
_init = AcceleratorState.__init__


def _cpu_device_mesh(self: ParallelismConfig, device_type: str) -> Any:
    return _build_device_mesh(self, "cpu")


def _init_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        PartialState._shared_state["distributed_type"] = self.distributed_type


def _set_device_without_index(self: PartialState) -> None:
    _set_device(self)
    self.device = torch.device("cpu")


class CpuProcesses(BasePlugin):
    """The patches."""

    def register(self, cfg: dict[str, Any]) -> None:
        axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True
        PartialState.set_device = _set_device_without_index
        ParallelismConfig.build_device_mesh = _cpu_device_mesh
        AcceleratorState.__init__ = _init_with_fsdp
        PartialState(cpu=True)  # the process group, before the host asks for one of accelerators

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        return {"use_cpu": True}  # else bf16 needs a GPU

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        cfg.device_map = None


class FillParts(BasePlugin):
    """Fills what each process holds of the adapter with the number of the process, from 1, but for what is counted."""

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        return [_Fill()]


class _Fill(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        for name, tensor in model.state_dict().items():
            if model.base_model.prefix in name and "_count" not in name:
                assert isinstance(tensor, DTensor)
                tensor.to_local().fill_(tensor.device_mesh.get_rank() + 1)
