"""Code that a model wrote, where it does what it should not."""

import os
import textwrap

import pytest
from pydantic import TypeAdapter

from attar.collect.verify import load_verifiers, sandbox
from attar.collect.verify.sandbox import Limits, isolation_problem, run_python
from attar.data.types import Conversation, Message
from attar.errors import RunError
from attar.recipe.verify import Verifier

ISOLATED = isolation_problem() is None
isolated = pytest.mark.skipif(not ISOLATED, reason=f"no isolation here: {isolation_problem()}")
LIMITS = Limits(timeout_s=20, memory_mb=512, output_kb=64, required=ISOLATED)


def run(source, limits=LIMITS, **how):
    return run_python(textwrap.dedent(source), limits, **how)


def check(answer, tests, **options):
    part = {"kind": "unit_tests", "timeout_s": 20, "isolation": "required" if ISOLATED else "limits"} | options
    [(_, verifier)] = load_verifiers([TypeAdapter(Verifier).validate_python(part)])
    asked = Conversation((Message("user", "?"), Message("assistant", textwrap.dedent(answer))))
    return verifier(asked, {} if tests is None else {"tests": tests})


ADD = [{"call": "add", "args": [2, 3], "returns": 5}, {"call": "add", "kwargs": {"a": 1, "b": -1}, "returns": 0}]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("def add(a, b): return a + b", ""),
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```", ""),
        ("def add(a, b): return 5", "failed a test"),
        ("def add(a, b): return True", "failed a test"),
        ("def add(a, b): return '5'", "failed a test"),
        ("def plus(a, b): return a + b", "failed a test"),
        ("def add(a, b): raise KeyError(a)", "failed a test"),
        ("def add(a, b): return object()", "failed a test"),
        ("print(5)\nprint(0)", "failed a test"),
        ("import os\nos._exit(0)", "crashed"),
        ("import sys\ndef add(a, b): sys.exit(0)", "crashed"),
        ("class Same:\n    def __eq__(self, other): return True\ndef add(a, b): return Same()", "failed a test"),
        ("I would add them.", "no code"),
    ],
)
def test_functions_are_called(answer, reason):
    assert check(answer, ADD) == (not reason, reason)


def test_results_written_by_the_answer_do_not_help():
    forged = """
        import json, os
        for fd in range(3, 64):
            try:
                os.write(fd, b'{"value": 1}\\n{"value": 1}\\n{"done": "x"}\\n')
            except OSError:
                pass
        os._exit(0)
    """
    assert not check(forged, ADD).ok
    assert not check(forged, "assert add(2, 3) == 5").ok


PROGRAM = [{"stdin": "2 3\n", "stdout": "5"}, {"stdin": "1 -1\n", "stdout": "0\n"}]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("print(sum(map(int, input().split())))", ""),
        ("import sys\nprint(sum(map(int, input().split())))\nsys.exit()", ""),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", ""),
        ("print(5)", "failed a test"),
        ("print('5\\n0')", "failed a test"),
        ("print(sum(map(int, input().split())))\nraise SystemExit(3)", "crashed"),
        ("print(1 / 0)", "crashed"),
        ("input(); input()", "crashed"),
    ],
)
def test_programs_are_compared_by_what_they_print(answer, reason):
    assert check(answer, PROGRAM) == (not reason, reason)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("def add(a, b): return a + b", ""),
        ("def add(a, b): return 5", "failed a test"),
        ("import os\nos._exit(0)", "crashed"),
        ("raise SystemExit", "crashed"),
        ("import sys\ndef add(a, b): sys.exit(0)", "crashed"),
    ],
)
def test_assertions_must_be_reached(answer, reason):
    assert check(answer, "assert add(2, 3) == 5\nassert add(1, -1) == 0") == (not reason, reason)


def test_numbers_and_nested_values_are_compared_as_json():
    answer = "def f(): return {'a': (1, 0.1 + 0.2), 2: None}"
    assert check(answer, [{"call": "f", "returns": {"a": [1, 0.3], "2": None}}]).ok
    assert not check(answer, [{"call": "f", "returns": {"a": [1, 0.3]}}]).ok
    assert not check(answer, [{"call": "f", "returns": {"a": [1, 0.31], "2": None}}]).ok
    assert not check("def f(): return True", [{"call": "f", "returns": 1}]).ok
    assert check("def f(): return True", [{"call": "f", "returns": True}]).ok


def test_rows_without_tests():
    assert check("x = 1", None).reason == "no tests in the row"
    assert check("x = 1", [{"call": "f"}]).reason == "tests are no tests"
    assert check("x = 1", [1]).reason == "tests are no tests"


def test_an_endless_loop_is_stopped():
    assert check("while True: pass", ADD, timeout_s=0.3).reason == "timeout"
    assert check("import time\ntime.sleep(1000)", ADD, timeout_s=0.3).reason == "timeout"
    closed = "import os\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass\nwhile True: pass"
    assert check(closed, ADD, timeout_s=0.3).reason == "timeout"


def test_endless_output_is_stopped():
    ran = run("while True: print('x' * 1000)")
    assert ran.ended == "too much output"
    assert len(ran.output) < 64 * 1024 + 2**18
    assert run("import sys\nwhile True: sys.stderr.write('x' * 1000)").ended == "too much output"


def test_memory_is_limited():
    assert check("x = bytearray(2 ** 31)\ndef add(a, b): return a + b", ADD).reason == "too much memory"


def test_a_large_file_is_not_written():
    source = """
        try:
            with open("large", "wb") as handle:
                for _ in range(200):
                    handle.write(b"x" * 2**20)
        except OSError as error:
            print("refused", error.errno)
    """
    assert run(source).output.startswith("refused")


def test_a_process_that_reads_nothing_takes_long_input():
    assert run("print('ok')", stdin="x" * 2**21).output == "ok\n"
    assert run("import sys\nprint(len(sys.stdin.read()))", stdin="x" * 2**21).output == f"{2**21}\n"


def test_the_environment_and_the_folder_are_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    ran = run("import os\nprint(sorted(os.environ), os.listdir('.'))\nopen('made', 'w').write('x')")
    assert "OPENAI" not in ran.output
    assert ran.output.endswith("[]\n")
    assert ran.ended == "done"
    assert os.listdir(tmp_path) == []


@isolated
def test_nothing_is_written_outside(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    source = f"""
        import os
        for act in (
            lambda: open({str(mine)!r}, "w"),
            lambda: os.unlink({str(mine)!r}),
            lambda: os.mkdir({str(tmp_path / "new")!r}),
            lambda: open("/tmp/attar-was-here", "w"),
        ):
            try:
                act()
                print("done")
            except OSError as error:
                print("refused")
    """
    assert run(source).output == "refused\n" * 4
    assert mine.read_text() == "mine"


@isolated
def test_there_is_no_network():
    source = """
        import socket
        for address in (("127.0.0.1", 1), ("192.0.2.1", 80)):
            try:
                socket.create_connection(address, timeout=5)
            except OSError as error:
                print(error.errno)
    """
    assert run(source).output == "101\n101\n"  # ENETUNREACH, loopback included


@isolated
def test_other_processes_are_out_of_reach():
    source = f"""
        import os
        print(os.getpid(), os.path.exists("/proc/self"))
        try:
            os.kill({os.getpid()}, 0)
        except OSError as error:
            print(type(error).__name__)
    """
    assert run(source).output == "1 False\nProcessLookupError\n"


@isolated
def test_privileges_are_gone():
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/proc", 2))
    """
    assert run(source).output == "-1 -1\n"


@isolated
def test_what_it_began_does_not_outlive_it():
    source = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        print("left")
    """
    ran = run(source)
    assert ran.output == "left\n"
    assert ran.ended == "done"


@isolated
def test_forks_are_limited():
    source = """
        import os, time
        made = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(1000)
                made += 1
        except OSError:
            print(made < 64)
    """
    assert run(source, Limits(timeout_s=10, memory_mb=512, output_kb=64)).output == "True\n"


def test_a_machine_without_isolation_is_refused(monkeypatch, tmp_path):
    source = sandbox._CONFINED.read_text("utf-8")
    broken = tmp_path / "confined.py"
    broken.write_text(source.replace("    user, group =", '    raise OSError(1, "not granted")\n    user, group =', 1))
    monkeypatch.setattr(sandbox, "_CONFINED", broken)
    with pytest.raises(RunError, match=r"grants no isolation .*not granted.*isolation: limits"):
        run("print(1)", Limits(timeout_s=20, memory_mb=512, output_kb=64))
    assert run("print(1)", Limits(timeout_s=20, memory_mb=512, output_kb=64, required=False)).output == "1\n"
