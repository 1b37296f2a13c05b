"""`attar generate` as it is called: killed, dry, stopped, against a server that dies. Its teachers are scripted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from attar.cli import main
from servers import Reply, ScriptedServer, chat

SCRIPT = "import sys; sys.argv[0] = 'attar'; from attar.cli import main; main()"


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"{n}+{n}", "answer": 2 * n} for n in range(150)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write_recipe(folder, teacher, **part):
    content = {
        "name": "made",
        "task": "chat",
        "teacher": {"max_tokens": 16} | teacher,
        "data": {"train": "x.jsonl"},
        "collect": {"generate": {"source": {"kind": "prompts", "file": "prompts.jsonl"}} | part},
    }
    (folder / "attar.yaml").write_text(yaml.safe_dump(content))


def start(folder, *arguments):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent / "src"), str(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "ASKED": str(folder / "asked"), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "generate", str(folder / "attar.yaml"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Calls the verb in this process; returns its exit code and what it printed."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["attar", "generate", str(folder / "attar.yaml"), *arguments])
        monkeypatch.setenv("ASKED", str(folder / "asked"))
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return called


def rows_of(folder, name):
    path = folder / "runs" / "made" / "raw" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_run_goes_on_and_asks_nothing_that_is_stored(folder, call):
    write_recipe(folder, {"model": "teachers:SlowSums"}, samples=2, verify=[{"kind": "exact", "pattern": r"is (\d+)"}])
    process = start(folder)
    kept = folder / "runs" / "made" / "raw" / "generated.jsonl"
    deadline = time.monotonic() + 300
    while not (kept.exists() and kept.read_bytes().count(b"\n") >= 30):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = kept.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    stored = [json.loads(line) for line in before.splitlines()] + rows_of(folder, "rejected")
    assert 30 <= len(stored) < 300
    asked = (folder / "asked").read_text().splitlines()
    code, out, err = call("--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["kept"], result["rejected"], result["complete"]) == (150, {"verifier exact": 150}, True)
    assert kept.read_bytes().startswith(before)
    rows = rows_of(folder, "generated") + rows_of(folder, "rejected")
    keys = [(row["meta"]["prompt_id"], row["meta"]["sample"]) for row in rows]
    assert len(keys) == len(set(keys)) == 300
    later = {tuple(json.loads(line)) for line in (folder / "asked").read_text().splitlines()[len(asked) :]}
    assert later.isdisjoint({(row["messages"][0]["content"], row["meta"]["sample"]) for row in stored})
    assert len(later) == 300 - len(stored)


def test_a_dry_run_prints_the_range_and_the_verb_its_result(folder, call):
    write_recipe(folder, {"model": "teachers:Sums"}, target=5)
    code, out, _ = call("--dry-run")
    assert code == 0
    assert out.startswith("answers: 5 to 150 calls, ")
    assert not (folder / "runs").exists()
    code, out, _ = call("--dry-run", "--json", "--set", "collect.generate.target=7")
    assert json.loads(out)["plan"]["answers"]["calls"] == [7, 150]
    code, out, err = call()
    assert code == 0, err
    assert "raw/generated.jsonl: 5 of 5 kept\n" in out
    assert "teacher: 5 calls, 5 tokens asked, 20 answered, $0.0000" in out
    code, _, err = call("--set", "collect.generate.sample=2")
    assert code == 2
    assert "collect.generate.sample: unknown key (nearest: samples)" in err


def served(body):
    a, b = body["messages"][-1]["content"].split("+")
    return chat(f"The sum is {int(a) + int(b)}")


@pytest.fixture
def few(folder):
    """Fewer prompts, for what goes over the wire."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:60]))
    return folder


PRICE = {"input_usd_per_million_tokens": 1000, "output_usd_per_million_tokens": 1000}


def test_a_server_that_dies_in_the_middle_stops_the_run_with_exit_5_and_nothing_is_paid_twice(few, call):
    pytest.importorskip("openai")
    deadline = [30]

    def script(number, body, path):
        return served(body) if body is not None and number < deadline[0] else Reply(b"", cut=True)

    with ScriptedServer(script) as server:
        write_recipe(few, {"model": "openai:scripted-1", "base_url": server.url, "concurrency": 4, "price": PRICE})
        code, out, _ = call("--dry-run", "--json")
        planned = json.loads(out)["plan"]
        assert (code, planned["answers"]["calls"]) == (0, [60, 60])
        assert 0 < planned["usd"][0] < 60 * 0.012 < planned["usd"][1]
        code, _, err = call("--set", "teacher.timeout_s=2", "--set", "teacher.total_timeout_s=2")
        assert code == 5, err
        answered = len(rows_of(few, "generated"))
        assert 0 < answered <= 30
        deadline[0] = 10**9
        before = len(server.requests)
        code, out, err = call("--json")
        assert code == 0, err
        result = json.loads(out)
        assert (result["kept"], result["unanswered"]) == (60, {})
        assert result["teacher"]["usd"] == pytest.approx(60 * 0.012)
        assert len(server.requests) - before <= 60 - answered


def test_a_budget_that_ends_stops_the_run_with_exit_5_and_the_rest_is_asked_under_a_higher_one(few, call):
    pytest.importorskip("openai")
    with ScriptedServer(lambda number, body, path: served(body)) as server:
        teacher = {"model": "openai:scripted-1", "base_url": server.url, "concurrency": 1, "price": PRICE}
        write_recipe(few, teacher)
        code, _, err = call("--set", "budget.usd=0.9")
        assert code == 5, err
        assert "budget" in err
        kept = len(rows_of(few, "generated"))
        assert 0 < kept < 40
        code, out, err = call("--set", "budget.usd=100", "--json")
        assert code == 0, err
        assert json.loads(out)["kept"] == 60
        assert len(server.requests) == 60


def test_requests_that_failed_end_with_exit_5_until_they_are_answered(few, call):
    pytest.importorskip("openai")
    broken = True

    def script(number, body, path):
        bad = broken and body["messages"][-1]["content"] == "7+7"
        return Reply(b"", cut=True) if bad else served(body)

    with ScriptedServer(script) as server:
        write_recipe(few, {"model": "openai:scripted-1", "base_url": server.url, "concurrency": 4, "price": PRICE})
        code, out, err = call("--set", "teacher.timeout_s=5", "--set", "teacher.total_timeout_s=5")
        assert code == 5, err
        assert "requests failed that may do better: connection (1)" in err
        assert "59 kept" in out
        broken = False
        code, out, _ = call("--json")
        assert (code, json.loads(out)["kept"]) == (0, 60)
