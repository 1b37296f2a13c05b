import torch

from attar.losses import masked_mean

SHAPES = {2: (6, 4), 3: (2, 4, 4), 4: (4, 3, 2, 2)}


def features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(rank, dtype=torch.float64):
    return features(*SHAPES[rank], dtype=dtype), features(*SHAPES[rank], seed=1, dtype=dtype)


def mask_of(rank):
    """Every third row masked; tokens unevenly over sequences."""
    if rank == 3:
        return torch.tensor([[True, True, True, False], [True, True, False, False]])
    return torch.arange(SHAPES[rank][0]) % 3 != 2


def mean(values, mask=None):
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    return masked_mean(values.flatten(), mask.flatten())


def rotation(width, seed=9):
    return torch.linalg.qr(features(width, width, seed=seed))[0]
