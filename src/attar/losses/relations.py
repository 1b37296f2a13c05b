"""Losses that compare relations: how rows lie to one another in the student, and in the teacher.

Widths may differ, so no projector is needed (but for ``contrastive``). ``minilm_relations`` relates the tokens of one
sequence, so its values sum over sequences as any others do. The rest relate the rows of one call: they see the
micro-batch alone, and not the same when a batch is cut otherwise. Their values are one a row all the same, so that
``masked_mean`` with the whole batch's denominator gives each micro-batch the weight of its rows. Too small a
micro-batch has few relations; a single row has none, and its value is 0 without a gradient.

Rows are tokens where the features are [batch, length, width]: their relations take [tokens, tokens] numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses.divergences import divergence
from attar.losses.kinds import Divergence
from attar.losses.rows import Inputs, at_least_float32, check_mask, check_shapes, over_rows, unit

__all__ = ["cka", "contrastive", "minilm_relations", "rkd", "similarity_preserving"]

MINILM_RELATIONS = Inputs("minilm_relations", ranks=(3,), same="positions")
CKA = Inputs("cka", ranks=(2, 3, 4), same="rows")
SIMILARITY_PRESERVING = Inputs("similarity_preserving", ranks=(2, 3, 4), same="rows")
RKD = Inputs("rkd", ranks=(2, 4), same="rows")
CONTRASTIVE = Inputs("contrastive", ranks=(2, 3), same="everything")


def minilm_relations(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, relation_heads: int) -> Tensor:
    """KL between the self-attention relations of the teacher's and the student's queries (keys, values).

    Wang et al. 2021, arXiv:2012.15828 (MiniLMv2), section 3: the vectors of all attention heads are concatenated and
    split again into relation heads, as many for both, each of which relates token i to token j by
    softmax_j(x_i x_j / sqrt(its width)). A tap on q_proj gives the Q-Q relation, on k_proj K-K, on v_proj V-V; the
    paper adds the three up. It has no causal mask: every token of the sequence that is not padding is related to.

    Args:
        student: [batch, length, student's width], floating point: one projection, before positions are rotated in.
        teacher: [batch, length, teacher's width].
        mask: [batch, length], bool, False for padding: a token that is neither related nor related to.
        relation_heads: divides both widths; more than attention heads is finer.

    Returns:
        [batch, length], nats, the mean over relation heads: 0 where the relations agree, never negative; at least
        float32. Its mean over tokens is the paper's, which divides by the length of each sequence, where those agree.

    Raises:
        ValueError: the shapes do not fit, or the heads do not divide the widths.
    """
    check_shapes(MINILM_RELATIONS, student.shape, teacher.shape)
    check_mask(MINILM_RELATIONS, student, mask)
    if relation_heads < 1 or student.shape[-1] % relation_heads or teacher.shape[-1] % relation_heads:
        raise ValueError(
            f"minilm_relations: relation_heads is {relation_heads}; wanted a divisor of both widths, "
            f"{student.shape[-1]} and {teacher.shape[-1]}: of {math.gcd(student.shape[-1], teacher.shape[-1])}"
        )
    batch, length, _ = student.shape
    weights = None if mask is None else mask[:, None, :].expand(batch, relation_heads, length).flatten()

    def scores(features: Tensor) -> Tensor:
        """Of each token of each relation head with every token: [batch * heads * length, length]."""
        if mask is not None:
            features = features.masked_fill(~mask[..., None], 0.0)
        heads = features.reshape(batch, length, relation_heads, -1).transpose(1, 2)
        products: Tensor = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
        if mask is not None:
            products = products.masked_fill(~mask[:, None, None, :], -math.inf)
        return products.flatten(0, 2)

    student, teacher = at_least_float32(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        values = divergence(scores(student), scores(teacher), Divergence("forward_kl"), weights)
    return values.view(batch, relation_heads, length).mean(dim=1)


def cka(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - CKA, the linear centred kernel alignment of all rows.

    Kornblith et al. 2019, arXiv:1905.00414, section 3: |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, columns centred. It
    does not change when either side is rotated or scaled. With fewer rows than widths it is near 1 for anything, so
    that the loss says little in a small micro-batch.

    Args:
        student: [n, width], [batch, length, width] or [n, channels, height, width] (flattened).
        teacher: as many rows.
        mask: bool, one a row.

    Returns:
        One value a row, the same for all that count: 0 where they agree, at most 1, which a side whose rows are all
        the same gets, without a gradient; at least float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    return over_rows(CKA, _cka, student, teacher, mask)


def similarity_preserving(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of the similarities of each row with all.

    Tung and Mori 2019, arXiv:1907.09682, section 3: the matrix of inner products of rows, each of its rows
    divided by its norm. The mean over rows is the paper's loss, the sum over the matrix divided by rows squared.

    Args:
        student: [n, width], [batch, length, width] or [n, channels, height, width] (flattened).
        teacher: as many rows.
        mask: bool, one a row.

    Returns:
        One value a row: 0 where the similarities agree, never negative; at least float32.

    Raises:
        ValueError: the shapes do not fit.
    """

    def similarities(rows: Tensor) -> Tensor:
        rows = rows.flatten(1)
        return unit(rows @ rows.T)

    return over_rows(
        SIMILARITY_PRESERVING,
        lambda student, teacher: (similarities(student) - similarities(teacher)).square().mean(dim=1),
        student,
        teacher,
        mask,
    )


def rkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    distance: float = 1.0,
    angle: float = 2.0,
) -> Tensor:
    """Huber loss on the distances of pairs of rows, and on the angles of triples.

    Park et al. 2019, arXiv:1904.05068, section 3.2. Distances are divided by their mean, so that neither side's
    scale matters. Each pair and each triple of different rows counts once for the row that it belongs to: the first
    of a pair, the corner of a triple. The paper's weights for metric learning are in the ratio 1 : 2, as here.

    Args:
        student: [n, width] or [n, channels, height, width] (flattened). Memory grows with n^2 (width + n).
        teacher: as many rows.
        mask: [n], bool.
        distance: weight of the distances, at least 0.
        angle: weight of the angles, at least 0.

    Returns:
        [n], weighted means over a row's pairs and triples: 0 where the relations agree, never negative; at least
        float32. Fewer than three rows have no angles.

    Raises:
        ValueError: the shapes do not fit, a weight is negative, or both are 0.
    """
    if not (min(distance, angle) >= 0 and 0 < distance + angle < math.inf):
        raise ValueError(f"rkd: distance is {distance} and angle {angle}; wanted at least 0, and one above it")

    def values(student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) < 2:
            return _none(student)
        offsets = [rows[None] - rows[:, None] for rows in (student.flatten(1), teacher.flatten(1))]
        total = student.new_zeros(len(student))
        if distance:
            total = total + distance * _huber(*map(_distances, offsets)) / (len(student) - 1)
        if angle and len(student) > 2:
            pairs = (len(student) - 1) * (len(student) - 2)
            total = total + angle * _huber(*map(_angles, offsets)) / pairs
        return total

    return over_rows(RKD, values, student, teacher, mask)


def contrastive(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 0.07) -> Tensor:
    """Cross-entropy of picking a row's own teacher among the teachers of all rows, by cosine over temperature.

    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, equation 4) between student and teacher, as Tian et al. 2020
    (arXiv:1910.10699, CRD) have it, with their temperature; the negatives are the other rows of the call, where they
    keep a memory bank of the whole data set. It is not 0 where the two agree.

    Args:
        student: [n, width] or [batch, length, width].
        teacher: the same shape.
        mask: bool, one a row; a masked row is no negative either.
        temperature: above 0.

    Returns:
        One value a row, nats, above 0 where there are two rows; at least float32.

    Raises:
        ValueError: the shapes do not fit, or the temperature is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"contrastive: temperature is {temperature}; wanted a finite number above 0")

    def values(student: Tensor, teacher: Tensor) -> Tensor:
        own = torch.arange(len(student), device=student.device)
        return F.cross_entropy(unit(student) @ unit(teacher).T / temperature, own, reduction="none")

    return over_rows(CONTRASTIVE, values, student, teacher, mask)


def _cka(student: Tensor, teacher: Tensor) -> Tensor:
    if len(student) < 2:
        return _none(student)
    student, teacher = _centred(student.flatten(1)), _centred(teacher.flatten(1))
    if len(student) <= min(student.shape[1], teacher.shape[1]):  # |Y'X|^2 = <XX', YY'>: whichever is smaller is built
        products = [rows @ rows.T for rows in (student, teacher)]
        shared = (products[0] * products[1]).sum()
    else:
        products = [rows.T @ rows for rows in (student, teacher)]
        shared = (student.T @ teacher).square().sum()
    norms = torch.linalg.vector_norm(products[0]) * torch.linalg.vector_norm(products[1])
    alignment: Tensor = shared / norms.masked_fill(norms == 0, 1.0)
    return (1 - alignment).clamp(min=0.0).expand(len(student))


def _centred(rows: Tensor) -> Tensor:
    """Rows less their mean, of norm 1 in all, as fourth powers follow; 0 where only rounding tells them apart."""
    centred = rows - rows.mean(dim=0)
    rounding = 10 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows)
    centred = centred.masked_fill(torch.linalg.vector_norm(centred) <= rounding, 0.0)
    return unit(centred.flatten()).view_as(centred)


def _distances(offsets: Tensor) -> Tensor:
    """Of each pair [n, n], over their mean."""
    lengths = torch.linalg.vector_norm(offsets, dim=-1)
    mean = lengths.sum() / (len(lengths) * (len(lengths) - 1))
    relative: Tensor = lengths / mean.masked_fill(mean == 0, 1.0)
    return relative


def _angles(offsets: Tensor) -> Tensor:
    """Cosines at each row [n] between the ways to two others [n, n]; 0 where those are the same."""
    directions = unit(offsets)
    same = torch.eye(len(offsets), dtype=torch.bool, device=offsets.device)
    return (directions @ directions.transpose(-1, -2)).masked_fill(same, 0.0)


def _huber(student: Tensor, teacher: Tensor) -> Tensor:
    """Summed over all but the first dimension."""
    return F.smooth_l1_loss(student, teacher, reduction="none").flatten(1).sum(dim=1)


def _none(rows: Tensor) -> Tensor:
    """The values of rows that have no relations: 0, connected to the graph."""
    return rows.flatten(1).sum(dim=1) * 0
