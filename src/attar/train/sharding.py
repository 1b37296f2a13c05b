"""Models over several devices: what accelerate leaves to its caller.

The student is accelerate's to wrap. The teacher never meets an optimiser, which accelerate's own door to FSDP2 and
DeepSpeed asks for, so it is spread here, by the same plugin. And a head is used without being called, so its weights
are not gathered by themselves.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import CapabilityError, UsageError

__all__ = ["check_launch", "is_sharded", "keep_precision", "spread_teacher", "whole", "whole_in_forward"]


def check_launch(accelerator: Any, *, asked_fsdp: bool) -> None:
    """Refuse a launch that would run as something else.

    Args:
        accelerator: accelerate's.
        asked_fsdp: whether the launcher's environment asks for FSDP.

    Raises:
        UsageError: FSDP1, whose weights are flat and cannot be read as a head; or FSDP where accelerate makes DDP of it
            without a word, as it does on CPUs.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UsageError(
            f"fsdp_version is {plugin.fsdp_version}; wanted 2: set it in the configuration of accelerate, beside "
            "distributed_type: FSDP"
        )
    if asked_fsdp and plugin is None and accelerator.num_processes > 1:
        raise UsageError(
            f"the launcher asks for FSDP and accelerate runs {accelerator.distributed_type} on "
            f"{accelerator.device.type}, where it does not shard; take FSDP out of its configuration, or launch on GPUs"
        )


def keep_precision(accelerator: Any, *, ids_alone: bool) -> None:
    """Keep FSDP2's mixed precision to weights and gradients: accelerate has it round the loss too.

    Args:
        accelerator: accelerate's.
        ids_alone: whether the student reads token ids, so that all floating-point numbers in a batch are signals of the
            teacher, which are kept as they are too.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=not ids_alone
        )


def is_sharded(accelerator: Any) -> bool:
    """Whether weights are spread over processes while nothing is computed: FSDP2, or DeepSpeed's stage 3."""
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return True
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def spread_teacher(accelerator: Any, teacher: nn.Module) -> nn.Module:
    """The teacher on its device; under FSDP2 and DeepSpeed's stage 3 sharded, layer by layer, as the student is."""
    state = accelerator.state
    if not is_sharded(accelerator):
        return teacher.to(accelerator.device)
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return _zero_3(teacher)
    from accelerate.utils import fsdp2_prepare_model

    own = copy.copy(plugin)
    if getattr(teacher, "_no_split_modules", None):
        # The names in the configuration are of the student's layers; the teacher's may be others.
        own.transformer_cls_names_to_wrap = None
    state.fsdp_plugin = own
    try:
        sharded: nn.Module = fsdp2_prepare_model(accelerator, teacher)
    finally:
        state.fsdp_plugin = plugin
    return sharded


def _zero_3(teacher: nn.Module) -> nn.Module:
    """Stage 3 without an optimiser: weights are partitioned, and gathered for a layer's forward."""
    import deepspeed

    dtype = next(teacher.parameters()).dtype
    engine: nn.Module = deepspeed.initialize(
        model=teacher,
        config={
            # It has to be given, and is used for nothing without an optimiser.
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        },
    )[0]
    return engine.eval()


def whole(tensor: Tensor) -> Tensor:
    """A weight that is not trained, whole; every process asks for it at once."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full().detach()


def whole_in_forward(tensor: Tensor) -> Tensor:
    """A trained weight while the forward of the module that it is sharded with runs, so that gradients go back to it.

    Raises:
        CapabilityError: FSDP2 shards it with a smaller module, whose forward is not running.
    """
    if hasattr(tensor, "full_tensor"):
        raise CapabilityError(
            f"the weights of the head, {tuple(tensor.shape)}, are sharded by themselves, and the loss reads them "
            "without calling the head; set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP with the classes of whole "
            "layers alone"
        )
    return tensor
