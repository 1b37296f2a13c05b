"""Checked conversion of what a statistic is given: shapes, finite numbers, pairs of the same cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "binary", "matrix", "paired_matrices", "ratio_parts", "same_length", "vector"]

Array = npt.NDArray[np.float64]


def matrix(name: str, values: npt.ArrayLike) -> Array:
    """[seeds, cases] of finite numbers, at least one of each; raises ValueError otherwise."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; wanted [seeds, cases] with at least one of each")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def paired_matrices(name_a: str, a: npt.ArrayLike, name_b: str, b: npt.ArrayLike) -> tuple[Array, Array]:
    """Two matrices of the same cases, each as `matrix`."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim == second.ndim == 2 and (first.shape[1] != second.shape[1] or 0 in first.shape + second.shape):
        raise ValueError(
            f"{name_a} has shape {first.shape} and {name_b} {second.shape}; wanted [seeds, cases] of the same cases, "
            "at least one"
        )
    return matrix(name_a, first), matrix(name_b, second)


def vector(name: str, values: npt.ArrayLike) -> Array:
    """One dimension of finite numbers; raises ValueError otherwise."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; wanted one dimension")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def binary(name: str, values: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """One dimension of bool or 0/1; raises ValueError otherwise."""
    array = vector(name, values)
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError(f"{name} has values other than 0 and 1")
    return array.astype(np.bool_)


def same_length(name_a: str, a: npt.NDArray[Any], name_b: str, b: npt.NDArray[Any]) -> None:
    """Refuse, by ValueError, vectors that are not of the same cases, or of none."""
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{name_a} has {len(a)} cases and {name_b} {len(b)}; wanted as many, at least one")


def ratio_parts(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> tuple[Array, Array]:
    """Numerator and denominator of a ratio: vectors, not empty, the denominator above 0."""
    top, bottom = vector("numerator", numerator), vector("denominator", denominator)
    if not len(top) or not len(bottom):
        raise ValueError(f"numerator has {len(top)} values and denominator {len(bottom)}; wanted at least one of each")
    if bottom.min() <= 0:
        raise ValueError(f"the lowest value of denominator is {bottom.min():g}; wanted all above 0")
    return top, bottom
