import errno
import json
import os
import threading
import time

import pytest

from attar.collect import store, writer
from attar.collect.exchange import Capture, timestamp_of
from attar.collect.redact import Redactor, pseudonym
from attar.collect.store import Deletions, Reading, Segments, delete, encode, lock, read_exchanges
from attar.collect.writer import Writer
from attar.errors import DataError, WorkspaceError
from attar.proxy import Call

DAY = 86_400


def row(id, *, age_s=0.0, **labels):
    moment = timestamp_of(time.time() - age_s)
    return {"id": id, "timestamp": moment, "workload": "w", "episode": None, "user": None} | labels


def outcome(value, *, age_s=0.0, **labels):
    moment = timestamp_of(time.time() - age_s)
    return {"timestamp": moment, "workload": None, "episode": None, "exchange": None} | labels | {"outcome": value}


def write(folder, rows, series="exchanges", name=None):
    folder.mkdir(exist_ok=True)
    path = folder / f"{series}-{name or timestamp_of(time.time())[:10] + '-0001'}.jsonl"
    path.write_bytes(b"".join(map(encode, rows)))
    return path


def ids(folder):
    return [r["id"] for r in read_exchanges(folder)]


def test_segments_begin_anew_by_size_day_and_start(tmp_path, monkeypatch):
    segments = Segments(tmp_path, "exchanges", 10)
    for line in (b"12345678\n", b"2\n", b"3\n"):
        segments.append(line)
    now = time.time()
    monkeypatch.setattr(store.time, "time", lambda: now + DAY)
    segments.append(b"4\n")
    segments.close()
    again = Segments(tmp_path, "exchanges", 10)
    again.append(b"5\n")
    again.close()
    today, tomorrow = timestamp_of(now)[:10], timestamp_of(now + DAY)[:10]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        f"exchanges-{today}-0001.jsonl": b"12345678\n2\n",
        f"exchanges-{today}-0002.jsonl": b"3\n",
        f"exchanges-{tomorrow}-0001.jsonl": b"4\n",
        f"exchanges-{tomorrow}-0002.jsonl": b"5\n",
    }


def test_a_write_that_fails_half_way_leaves_whole_lines(tmp_path, monkeypatch):
    segments = Segments(tmp_path, "exchanges", 1000)
    segments.append(b"whole\n")
    real = os.write

    def full(file, data):
        if len(data) > 3:
            return real(file, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        segments.append(b"too long\n")
    monkeypatch.undo()
    segments.append(b"next\n")
    segments.close()
    assert next(tmp_path.iterdir()).read_bytes() == b"whole\nnext\n"


def test_rows_come_back_with_their_outcomes(tmp_path):
    rows = [row("a", episode="e"), row("b", episode="e", workload="v"), row("c"), row("ü\ud800", episode="f")]
    write(tmp_path, rows)
    write(
        tmp_path,
        [
            outcome(1, episode="e"),
            outcome("good", exchange="a"),
            outcome(2, episode="e", workload="v"),
            outcome(3, episode="x"),
        ],
        "outcomes",
    )
    got = {r["id"]: [o["outcome"] for o in r["outcomes"]] for r in read_exchanges(tmp_path)}
    assert got == {"a": ["good", 1], "b": [1, 2], "c": [], "ü\ud800": []}
    assert [{k: v for k, v in r.items() if k != "outcomes"} for r in read_exchanges(tmp_path)] == rows


def test_a_torn_line_is_passed_over_and_counted(tmp_path):
    path = write(tmp_path, [row("a"), row("b")])
    path.write_bytes(path.read_bytes()[:-3])
    write(tmp_path, [row("c")], name="2099-01-01-0001")
    reading = Reading()
    assert [r["id"] for r in read_exchanges(tmp_path, reading)] == ["a", "c"]
    assert (reading.rows, reading.damaged) == (2, 1)


def test_a_folder_that_holds_nothing(tmp_path):
    with pytest.raises(DataError, match=r"holds no exchanges-\*\.jsonl"):
        next(read_exchanges(tmp_path))
    with pytest.raises(DataError, match="is no folder"):
        delete(tmp_path / "none", episode="e")


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"episode": "e"}, ["b", "c", "d"]),
        ({"user": "u"}, ["c", "d"]),
        ({"user": "alice@example.com"}, ["a", "b", "d"]),
        ({"older_than_days": 3}, ["a", "b", "c"]),
        ({"episode": "u", "user": "e"}, ["a", "b", "c", "d"]),
    ],
)
def test_deleting(tmp_path, asked, left):
    rows = [
        row("a", episode="e", user="u", age_s=1),
        row("b", episode="f", user="u", age_s=1),
        row("c", user=pseudonym("alice@example.com"), age_s=1),
        row("d", age_s=4 * DAY),
    ]
    old = write(tmp_path, rows[3:], name=timestamp_of(time.time() - 4 * DAY)[:10] + "-0001")
    write(tmp_path, rows[:3])
    write(tmp_path, [outcome(i, exchange=i, age_s=1) for i in "abcd"] + [outcome("ef", episode="f")], "outcomes")
    n = delete(tmp_path, **asked)
    assert sorted(ids(tmp_path)) == left
    text = b"".join(path.read_bytes() for path in tmp_path.glob("*-*.jsonl")).decode()
    assert [i for i in "abcd" if f'"id":"{i}"' in text or f'"exchange":"{i}"' in text] == left
    of_f = '"outcome":"ef"' in text
    assert of_f == (asked != {"user": "u"})
    assert n == 2 * (4 - len(left)) + (not of_f)
    assert old.exists() == ("d" in left)
    for word in ("alice", '"u"', '"e"'):
        assert word not in (tmp_path / "deletions.jsonl").read_text()


def test_what_comes_after_a_deletion_stays(tmp_path):
    write(tmp_path, [row("a", episode="e", age_s=1), row("b", episode="e", age_s=-60)])
    delete(tmp_path, episode="e")
    assert ids(tmp_path) == ["b"]


def test_one_recorder_a_folder(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(WorkspaceError, match="another recorder is at work"):
        lock(tmp_path)
    write(tmp_path, [row("a", episode="e", age_s=1), row("b", age_s=1)])
    # While somebody else has the folder, a deletion is heeded by readers and erased by that one.
    assert delete(tmp_path, episode="e") is None
    assert ids(tmp_path) == ["b"]
    held.release()
    held = lock(tmp_path)
    held.release()


# The writer


def capture(body=b"{}", **labels):
    made = Capture(Call("POST", b"/v1/chat/completions", b"", [], body, labels))
    made.status = 200
    return made


def make(folder, **options):
    return Writer(
        folder,
        Redactor(("email",), {}),
        **{"segment_bytes": 1 << 20, "queue_bytes": 1 << 20, "keep_days": None} | options,
    )


def until(condition, seconds=100.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_everything_that_was_handed_over_is_on_disk_at_the_end(tmp_path):
    made = make(tmp_path)
    for i in range(500):
        made.submit(capture(b'{"n": %d}' % i))
    future = made.outcome(outcome("a@b.co fine", episode="x@y.zz"))
    made.close()
    made.close()
    future.result(0)
    assert [r["request"]["n"] for r in read_exchanges(tmp_path)] == list(range(500))
    assert (made.recorded, made.outcomes, made.waiting_bytes, made.lost.total()) == (500, 1, 0, 0)
    stored = json.loads(next(tmp_path.glob("outcomes-*")).read_text())
    assert (stored["outcome"], stored["episode"]) == ("[EMAIL] fine", pseudonym("x@y.zz"))


def test_a_full_queue_loses_and_counts_and_never_waits(tmp_path, monkeypatch):
    go = threading.Event()
    real = writer.build_row
    monkeypatch.setattr(writer, "build_row", lambda *a: go.wait(100) and real(*a))
    made = make(tmp_path, queue_bytes=1000)
    for _ in range(4):
        made.submit(capture(b'"' + b"x" * 398 + b'"'))
    assert made.lost == {"queue full": 2}
    made.submit(capture(b"x" * 1001))
    assert made.lost == {"queue full": 2, "too large": 1}
    assert "too large" in made.last_error
    go.set()
    until(lambda: made.waiting_bytes == 0)
    made.submit(capture())
    made.close()
    assert made.recorded == 3


def test_a_row_that_cannot_be_built_is_lost_alone(tmp_path, monkeypatch, caplog):
    deep = b"[" * 100_000 + b"]" * 100_000
    made = make(tmp_path)
    for body in (b"1", deep, b"2"):
        made.submit(capture(body))
    made.close()
    assert [r["request"] for r in read_exchanges(tmp_path)] == [1, 2]
    assert made.lost == {"row not built": 1}
    assert "RecursionError" in caplog.text


def test_a_full_disk_loses_counts_and_says_so_and_goes_on_when_there_is_room(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    made = make(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(store.os, "write", full)
        made.submit(capture(b"1"))
        until(lambda: made.lost["write failed"] == 1)
        future = made.outcome(outcome(1, episode="e"))
        with pytest.raises(OSError, match="No space"):
            future.result(100)
    made.submit(capture(b"2"))
    made.close()
    assert [r["request"] for r in read_exchanges(tmp_path)] == [2]
    assert made.lost == {"write failed": 1, "outcome not written": 1}
    assert "No space left on device" in made.last_error
    assert caplog.text.count("not recorded") == 2


def test_a_deletion_beside_a_recorder_is_erased_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_LOOK_S", 0.05)
    made = make(tmp_path)
    made.submit(capture(b"1", episode="e"))
    made.submit(capture(b"2", episode="f"))
    late = capture(b"3", episode="e")
    until(lambda: made.recorded == 2)
    time.sleep(0.002)
    assert delete(tmp_path, episode="e") is None
    until(lambda: made.erased == 1)
    # A call that was under way when its episode was deleted is not written.
    made.submit(late)
    time.sleep(0.002)
    made.submit(capture(b"4", episode="e"))
    made.close()
    assert [r["request"] for r in read_exchanges(tmp_path)] == [2, 4]
    text = b"".join(path.read_bytes() for path in tmp_path.glob("exchanges-*"))
    assert text.count(b"\n") == 2


def test_rows_that_are_too_old_are_erased_when_a_recorder_starts(tmp_path):
    write(
        tmp_path,
        [row("a", age_s=3 * DAY), row("b", age_s=1.5 * DAY)],
        name=timestamp_of(time.time() - 2 * DAY)[:10] + "-0001",
    )
    made = make(tmp_path, keep_days=2)
    until(lambda: made.erased == 1)
    made.close()
    assert ids(tmp_path) == ["b"]
    other = make(tmp_path)
    other.close()
    assert ids(tmp_path) == ["b"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make(tmp_path / "file" / "raw")


def test_deletions_are_read_as_they_are_written(tmp_path):
    Deletions.of(episode="e").save(tmp_path)
    Deletions.of(user="u", older_than_days=2).save(tmp_path)
    found = Deletions.load(tmp_path)
    assert found.hit(row("a", episode="e", age_s=1))
    assert found.hit(row("a", user="u", age_s=1))
    assert found.hit(row("a", age_s=3 * DAY))
    assert not found.hit(row("a", episode="u", user="e", age_s=DAY))
