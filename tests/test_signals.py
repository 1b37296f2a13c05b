import numpy as np
import pytest

from attar.errors import WorkspaceError
from attar.signals.store import SignalStore


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
