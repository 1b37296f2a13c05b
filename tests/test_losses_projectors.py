import pytest
import torch
from torch import nn

from attar.losses import FEATURE_LOSSES, build_projectors, projector_key


def test_projectors():
    pairs = [("a.0", "b.0"), ("a.1", "b.1"), ("c", "d"), ("e", "f"), ("g", "h"), ("a.0", "b.0")]
    ours = {"a.0": (2, 5, 4), "a.1": (2, 5, 6), "c": (2, 3, 7, 7), "e": (2, 5, 4), "g": (9, 4)}
    theirs = {"b.0": (2, 5, 6), "b.1": (2, 5, 6), "d": torch.Size((2, 8, 7, 7)), "f": (2, 5, 6), "h": (9, 3)}
    losses = [FEATURE_LOSSES[name] for name in ("mse", "cosine", "mse", "cka", "mse", "cosine")]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    projectors = build_projectors(pairs, ours, theirs, losses, seed=3)
    assert torch.rand(1) == expected
    keys = [projector_key(*one) for one in pairs]
    assert list(projectors) == [keys[0], keys[1], keys[2], keys[4]]
    assert {key: type(one) for key, one in projectors.items()} == {
        keys[0]: nn.Linear,
        keys[1]: nn.Identity,
        keys[2]: nn.Conv2d,
        keys[4]: nn.Linear,
    }
    for key, (student, teacher), loss in zip(keys, pairs, losses, strict=True):
        if key in projectors:
            projected = projectors[key](torch.randn(ours[student], requires_grad=True))
            assert projected.shape == theirs[teacher]
            loss(projected, torch.randn(theirs[teacher])).sum().backward()
    weight = projectors[keys[0]].weight
    assert weight.grad is not None
    torch.testing.assert_close(weight.T @ weight, torch.eye(4))
    assert (projectors[keys[0]].bias == 0).all()
    again = build_projectors(pairs, ours, theirs, losses, seed=3)
    other = build_projectors(pairs, ours, theirs, losses, seed=4)
    assert torch.equal(again[keys[0]].weight, weight)
    assert not torch.equal(other[keys[0]].weight, weight)
    assert not torch.equal(projectors[keys[4]].weight[:, :3], weight[:3, :3])
    again.load_state_dict(other.state_dict())


def test_keys_are_safe_and_different():
    paths = ["a.b", "a/b", "a~b", "a~1b", "a", "layers.-1[0]", "x:input", "", "keys"]
    keys = {projector_key(student, teacher) for student in paths for teacher in paths}
    assert len(keys) == len(paths) ** 2
    nn.ModuleDict({key: nn.Identity() for key in keys})


@pytest.mark.parametrize(
    ("shapes", "loss", "message"),
    [
        (
            ((2, 5, 4), (2, 7, 6)),
            "mse",
            r"'s' has shape \(2, 5, 4\) and 't' \(2, 7, 6\); wanted the same but for the width",
        ),
        (((2, 3, 8, 8), (2, 3, 4, 4)), "mse", r"'s' has shape \(2, 3, 8, 8\) and 't' \(2, 3, 4, 4\)"),
        (((3, 4), (2, 4)), "cosine", "wanted the same but for the width"),
        (((2, 3, 8, 8), (2, 3, 8, 8)), "cosine", "wanted 2 or 3 dimensions for both"),
        (((2, 4), (2, 5, 4)), "mse", "wanted 2 or 3 or 4 dimensions"),
        (((2, 4), (2, 4)), "attention_transfer", "wanted 4 dimensions"),
    ],
)
def test_projectors_refuse_shapes(shapes, loss, message):
    with pytest.raises(ValueError, match=message):
        build_projectors([("s", "t")], {"s": shapes[0]}, {"t": shapes[1]}, [FEATURE_LOSSES[loss]], seed=0)


def test_projectors_refuse_what_is_missing():
    with pytest.raises(ValueError, match="1 pairs and 0 losses"):
        build_projectors([("s", "t")], {}, {}, [], seed=0)
    with pytest.raises(ValueError, match="'s' has no shape among the student's: x"):
        build_projectors([("s", "t")], {"x": (1, 2)}, {}, [FEATURE_LOSSES["mse"]], seed=0)
    with pytest.raises(ValueError, match="'t' has no shape among the teacher's: none"):
        build_projectors([("s", "t")], {"s": (1, 2)}, {}, [FEATURE_LOSSES["mse"]], seed=0)
