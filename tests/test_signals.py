import numpy as np
import pytest

from attar.errors import WorkspaceError
from attar.signals.labels import Calibration, _bias_to_prior
from attar.signals.store import SignalStore


def test_bias_reaches_the_prior():
    rng = np.random.default_rng(0)
    logits = rng.normal(loc=[2.0, 0.0, -1.0, 0.5], size=(500, 4))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    prior = np.array([0.4, 0.3, 0.2, 0.1])
    shifted = log_probs + _bias_to_prior(log_probs, prior)
    shares = (np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(shares, prior, atol=1e-8)


def test_calibration_survives_json_and_gives_distributions():
    calibration = Calibration(np.array([[0.1, -0.3], [0.2, 1 / 3]]), np.array([0.5, -0.5]))
    raw = np.array([[[-1.0, -2.0], [-3.0, -0.5]]], dtype=np.float32)
    result = calibration.apply(raw)
    np.testing.assert_allclose(np.exp(result).sum(1), 1)
    assert (Calibration.from_json(calibration.to_json()).apply(raw) == result).all()


def test_store_reads_back_in_the_order_asked(tmp_path):
    store = SignalStore(tmp_path / "s", {"teacher": "a"})
    store.append(["x", "y"], np.array([[1.0], [2.0]], dtype=np.float32), 3)
    store.append(["z"], np.array([[3.0]], dtype=np.float32), 4)
    again = SignalStore(tmp_path / "s", {"teacher": "a"})
    assert again.ids == ["x", "y", "z"]
    assert again.tokens == 7
    assert again.read(["z", "x"]).tolist() == [[3.0], [1.0]]
    with pytest.raises(WorkspaceError, match="1 of 2 examples have no signal"):
        again.read(["x", "w"])


def test_store_refuses_another_teacher_by_name(tmp_path):
    SignalStore(tmp_path / "s", {"teacher": "a", "prompts": "p"})
    with pytest.raises(WorkspaceError, match="another teacher"):
        SignalStore(tmp_path / "s", {"teacher": "b", "prompts": "p"})


def test_store_finds_a_flipped_byte(tmp_path):
    store = SignalStore(tmp_path / "s", {})
    store.append(["x"], np.zeros((1, 4), dtype=np.float32), 1)
    shard = tmp_path / "s" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"shard-00000\.npy is damaged"):
        SignalStore(tmp_path / "s", {})
