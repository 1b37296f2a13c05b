"""Hidden states as signals: the states at the head's input, and the head, from which the teacher's logits follow.

At a width of 576, in bfloat16, a token takes 1,152 bytes where its logits take 98,304; the head is stored once. What
follows is dense: any divergence, at any temperature. The idea of carrying states in place of logits is KDFlow's,
arXiv:2603.01875.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attar.losses.terms import Head

__all__ = ["HEAD", "from_array", "pack_head", "to_array", "unpack_head"]

HEAD = "teacher-head"
"""The id under which a store keeps the head, beside the examples. No example has it: theirs are hashes."""


def to_array(states: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    """A tensor, rounded to a dtype, for a store; bfloat16 as its bits, uint16, as numpy has none.

    Args:
        states: floating point, any shape.
        dtype: bfloat16, float16, float32 or float64.

    Raises:
        ValueError: another dtype, or a state that is not finite, or not once it is rounded.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; wanted bfloat16, float16, float32 or float64")
    rounded = states.detach().cpu().to(dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise ValueError(
            f"the largest state is {float(states.abs().max())}, which is not finite in {dtype}; wanted finite ones, "
            "and bfloat16 where float16 is too narrow"
        )
    array: npt.NDArray[Any] = (rounded.view(torch.uint16) if dtype == torch.bfloat16 else rounded).numpy()
    return array


def from_array(array: npt.NDArray[Any]) -> Tensor:
    """What ``to_array`` made, in its dtype."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def pack_head(head: Head, dtype: torch.dtype) -> dict[str, npt.NDArray[Any]]:
    """A head as arrays ``weight`` [rows, width], ``bias`` [rows or none] and ``numbers`` [3]."""
    bias = torch.zeros(0) if head.bias is None else head.bias
    softcap = math.nan if head.softcap is None else head.softcap
    return {
        "weight": to_array(head.weight, dtype),
        "bias": to_array(bias, dtype),
        "numbers": np.array([head.scale, softcap, head.size]),
    }


def unpack_head(packed: Mapping[str, npt.NDArray[Any]]) -> Head:
    """The head that ``pack_head`` packed, its padding marked as such."""
    scale, softcap, vocabulary = packed["numbers"].tolist()
    return Head(
        from_array(packed["weight"]),
        from_array(packed["bias"]) if len(packed["bias"]) else None,
        scale,
        None if math.isnan(softcap) else softcap,
        int(vocabulary),
    )
