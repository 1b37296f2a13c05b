import json
import multiprocessing
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from attar.errors import WorkspaceError
from attar.losses import Divergence, DivergenceTerm, Head, projected_loss
from attar.losses.sparse import SampledTerm
from attar.signals.hidden import HEAD, from_array, pack_head, to_array, unpack_head
from attar.signals.packing import pack_sampled, unpack_sampled
from attar.signals.sparse import example_random, logit_chunks, sampled
from attar.signals.store import SignalStore
from divergences import make_head, normal


def record(number, rows=None):
    """Arrays of several dtypes whose lengths differ, some of them empty."""
    rows = number % 4 if rows is None else rows
    rng = np.random.default_rng(number)
    return {
        "hidden": to_array(torch.from_numpy(rng.normal(size=(rows, 6))), torch.bfloat16),
        "ids": rng.integers(0, 256, 3 * rows, dtype=np.uint8),
        "entropy": rng.normal(size=rows).astype(np.float16),
        "scores": rng.normal(size=(1, 2, 3)).astype(np.float32),
    }


def filled(folder, shards=3, each=4):
    store = SignalStore(folder, {"teacher": "a"})
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        store.append([f"x{number}" for number in numbers], [record(number) for number in numbers], 10)
    return store


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def assert_holds(store, numbers):
    for number, found in zip(numbers, store.read([f"x{number}" for number in numbers]), strict=True):
        assert_same(found, record(number))


def test_records_come_back_in_the_order_asked(tmp_path):
    filled(tmp_path / "s")
    again = SignalStore(tmp_path / "s", {"teacher": "a"})
    assert again.ids == [f"x{number}" for number in range(12)]
    assert again.tokens == 30
    assert "x3" in again
    assert "x12" not in again
    assert_holds(again, [7, 0, 11, 7, 4])
    (one,) = again.read(["x3"], ["ids", "hidden"])
    assert list(one) == ["ids", "hidden"]
    one["ids"][0] += 1  # a copy
    assert_holds(again, [3])
    with pytest.raises(WorkspaceError, match="1 of 2 examples have no signal"):
        again.read(["x1", "w"])
    with pytest.raises(WorkspaceError, match="has no layer-3 of example x1; wanted one of entropy, hidden"):
        again.read(["x1"], ["layer-3"])


def test_a_shard_of_nothing_but_empty_arrays(tmp_path):
    store = SignalStore(tmp_path / "s", {})
    store.append(["a", "b"], [{"kept": np.zeros((0, 3), np.uint8)}] * 2, 0)
    again = SignalStore(tmp_path / "s", {})
    again.verify()
    assert again.read(["b"])[0]["kept"].shape == (0, 3)


def test_files_are_plain_arrays(tmp_path):
    filled(tmp_path / "s")
    scores = np.load(tmp_path / "s" / "shard-00001.scores.npy")
    np.testing.assert_array_equal(scores, np.concatenate([record(number)["scores"] for number in range(4, 8)]))


def test_another_fingerprint_is_refused_by_name(tmp_path):
    made = {"teacher": "a", "settings": {"k": 5}, "words": ("x", "y"), "temperature": 1.0}
    SignalStore(tmp_path / "s", made)
    assert SignalStore(tmp_path / "s", made).fingerprint["settings"] == {"k": 5}
    with pytest.raises(WorkspaceError, match="another settings, temperature;"):
        SignalStore(tmp_path / "s", made | {"settings": {"k": 6}, "temperature": 2.0})
    with pytest.raises(WorkspaceError, match="another revision;"):
        SignalStore(tmp_path / "s", made | {"revision": "main"})
    (tmp_path / "s" / "meta.json").write_text("{")
    with pytest.raises(WorkspaceError, match=r"meta\.json is damaged"):
        SignalStore(tmp_path / "s", made)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("array", ["hidden", "ids", "entropy", "scores"])
def test_a_flipped_byte_is_found_and_the_shard_named(tmp_path, array):
    filled(tmp_path / "s")
    # the last byte belongs to the last record of the shard that has any
    flip(tmp_path / "s" / f"shard-00001.{array}.npy", -1)
    store = SignalStore(tmp_path / "s", {"teacher": "a"})
    with pytest.raises(WorkspaceError, match=rf"shard-00001\.{array}\.npy is damaged: example x7 is not"):
        store.verify()
    with pytest.raises(WorkspaceError, match="example x7"):
        store.read(["x7"])
    # what is whole can be read
    assert_holds(store, [6, 8])


def test_a_damaged_description_or_size_is_found_when_it_is_opened(tmp_path):
    filled(tmp_path / "s")
    description = tmp_path / "s" / "shard-00002.json"
    whole = description.read_bytes()
    for content in (
        whole.replace(b'"x9"', b'"x1"'),
        whole[:-5],
        b"[]",
        b"",
        whole.replace(b'"tokens":10', b'"tokens":11'),
    ):
        description.write_bytes(content)
        with pytest.raises(WorkspaceError, match=r"shard-00002\.json is damaged"):
            SignalStore(tmp_path / "s", {"teacher": "a"})
    description.write_bytes(whole)
    data = tmp_path / "s" / "shard-00000.ids.npy"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(WorkspaceError, match=r"shard-00000\.ids\.npy is damaged: its size"):
        SignalStore(tmp_path / "s", {"teacher": "a"})
    data.unlink()
    with pytest.raises(WorkspaceError, match=r"delete shard-00000\.\* in .* and run `attar score` again"):
        SignalStore(tmp_path / "s", {"teacher": "a"})


def test_a_deleted_shard_is_made_again_beside_the_others(tmp_path):
    filled(tmp_path / "s")
    for path in (tmp_path / "s").glob("shard-00001.*"):
        path.unlink()
    store = SignalStore(tmp_path / "s", {"teacher": "a"})
    assert "x5" not in store
    store.append(["x5"], [record(5)], 1)
    assert_holds(SignalStore(tmp_path / "s", {"teacher": "a"}), [0, 5, 8, 11])


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import attar.signals.store as module

left, write = [int(sys.argv[2])], module.write_atomic

def write_atomic(path, content):
    left[0] -= 1
    if left[0] < 0:
        path.with_name(path.name + ".partial").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

module.write_atomic = write_atomic
store = module.SignalStore(Path(sys.argv[1]), {})
for number in range(len(store.ids), 4):
    store.append([str(number)], [{"a": np.full((number, 2), number), "b": np.ones(3)}], number)
"""


@pytest.mark.parametrize("writes", [3, 4, 5, 7])
def test_a_killed_run_loses_the_shard_in_work_only(tmp_path, writes):
    def run(folder, writes):
        return subprocess.run([sys.executable, "-c", KILLED, folder, str(writes)], capture_output=True, text=True)

    # three writes a shard: two arrays and the description
    first = run(tmp_path / "s", writes)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert SignalStore(tmp_path / "s", {}).ids == [str(number) for number in range(writes // 3)]
    for folder in ("s", "undisturbed"):
        again = run(tmp_path / folder, 99)
        assert again.returncode == 0, again.stderr
    ours = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir() if p.suffix != ".partial"}
    assert ours == {p.name: p.read_bytes() for p in (tmp_path / "undisturbed").iterdir()}


def test_reading_an_example_touches_its_bytes_only(tmp_path, monkeypatch):
    import attar.signals.store as module

    store = SignalStore(tmp_path / "s", {})
    store.append(["a", "b", "c"], [record(number, 5) for number in range(3)], 0)
    again = SignalStore(tmp_path / "s", {})
    assert not again._shards[0]._maps
    read = []
    monkeypatch.setattr(module, "_checksum", lambda array: read.append(array.nbytes) or 0)
    with pytest.raises(WorkspaceError):
        again.read(["b"], ["hidden"])
    assert read == [5 * 6 * 2]
    assert isinstance(again._shards[0]._maps["hidden"], np.memmap)


def test_a_pickled_store_carries_no_content(tmp_path):
    store = filled(tmp_path / "s", shards=1)
    store.append(["big"], [{"big": np.zeros((1, 1 << 20), np.uint8)}], 0)
    store.read(["big"])
    content = pickle.dumps(store)
    assert len(content) < 10_000
    assert_holds(pickle.loads(content), [0, 3])
    assert store._shards[1]._maps


def _read_in_a_worker(store, numbers, results):
    assert_holds(store, numbers)
    results.put(len(numbers))


# From Python 3.12 on, a fork beside threads is warned of; a DataLoader forks all the same.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_several_processes_read_at_once(tmp_path):
    store = filled(tmp_path / "s")
    assert_holds(store, [0])  # maps are open already
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_read_in_a_worker, args=(store, list(range(12))[::step], results)) for step in (1, -1)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [12, 12]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def test_what_does_not_fit_is_refused(tmp_path):
    store = filled(tmp_path / "s", shards=1)
    one = {"a": np.zeros((2, 3), np.float32)}
    for ids, records, message in [
        (["p"], [], "1 ids and 0 records"),
        ([], [], "at least one"),
        (["x1"], [one], "example x1 has a signal already"),
        (["p", "p"], [one, one], "example p has a signal already"),
        (["p", "q"], [one, {"b": one["a"]}], "example q has arrays b; wanted a"),
        (["p", "q"], [one, {"a": np.zeros((2, 4), np.float32)}], r"a of example q .* wanted float32 and \[rows, 3\]"),
        (["p", "q"], [one, {"a": np.zeros((2, 3))}], "a of example q has dtype float64"),
        (["p"], [{"a": np.array(1.0)}], r"shape \(\)"),
        (["p"], [{"a.b": one["a"]}], "letters, digits"),
        (["p"], [{}], "letters, digits"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.append(ids, records, 0)
    assert SignalStore(tmp_path / "s", {"teacher": "a"}).ids == store.ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hidden_states_and_the_head_give_the_teachers_logits(tmp_path, dtype):
    states = normal(5, 4).to(dtype)
    head = make_head(4, seed=1, bias=True, padding=2, softcap=3.0, scale=0.5)
    head = Head(head.weight.detach().to(dtype), head.bias.detach().to(dtype), 0.5, 3.0, head.size)
    store = SignalStore(tmp_path / "s", {"kind": "hidden"})
    store.append([HEAD], [pack_head(head, dtype)], 0)
    inner = to_array(normal(5, 7, seed=3), torch.bfloat16)
    store.append(["x"], [{"hidden": to_array(states, dtype), "layer-12": inner}], 5)
    again = SignalStore(tmp_path / "s", {"kind": "hidden"})
    back = unpack_head(again.read([HEAD])[0])
    hidden = from_array(again.read(["x"])[0]["hidden"])
    assert hidden.dtype == back.weight.dtype == dtype
    assert (back.scale, back.softcap, back.vocabulary) == (0.5, 3.0, head.size)
    torch.testing.assert_close(back.logits(hidden), head.logits(states), rtol=0, atol=0)
    student = normal(5, 3, seed=6), make_head(3, seed=7)
    losses = [
        projected_loss(*student, [DivergenceTerm(Divergence(), h, t)]) for h, t in ((hidden, back), (states, head))
    ]
    assert losses[0].total == losses[1].total
    plain = unpack_head(pack_head(Head(head.weight), dtype))
    assert (plain.bias, plain.softcap, plain.size) == (None, None, len(head.weight))


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        to_array(torch.tensor([1e5]), torch.float16)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        to_array(torch.tensor([1.0]), torch.int8)


def test_a_sampled_signal_goes_through_the_store_to_the_loss(tmp_path):
    hidden, head = normal(6, 4), make_head(4, seed=1)
    random = example_random(0, "x")
    signal = sampled(logit_chunks(hidden, head, 4), 0.1, random, 2.0)
    store = SignalStore(tmp_path / "s", {"kind": "sampled", "temperature": 2.0, "settings": {"threshold": 0.1}})
    store.append(["x"], [pack_sampled(signal, head.size, random)], 6)
    back = unpack_sampled(store.read(["x"])[0], head.size)
    which = Divergence(temperature=2.0)
    values = [
        projected_loss(
            normal(6, 3, seed=8),
            make_head(3, seed=9),
            [SampledTerm(which, one.ids, one.entry_weights, one.entropy, 2.0)],
        ).total.item()
        for one in (signal, back)
    ]
    assert values[1] == pytest.approx(values[0], abs=0.1)
    assert json.loads((tmp_path / "s" / "meta.json").read_text())["settings"] == {"threshold": 0.1}
