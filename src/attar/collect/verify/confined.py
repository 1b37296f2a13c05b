"""Runs Python that a model wrote, inside a process of its own; started by ``sandbox.py``, and imports nothing of attar.

Before the code runs, the process gives up what it can, in this order: network, sight of other processes and the right
to write (namespaces, where the kernel grants them to a user), privileges, time, memory. What comes of it is written to
a pipe as JSON, a line each: ``{"isolation": null or why there is none}``, then ``{"value": ..}`` or ``{"error": ..}``
for each call, then ``{"done": nonce}``.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from typing import Any

_NEW = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mounts, IPC, users, processes, network
_MS_NOSUID, _MS_NODEV, _MS_PRIVATE = 2, 4, 1 << 18
_MOUNT_SETATTR, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, 0x8000, 1
_CAPSET = {"x86_64": 126, "aarch64": 91}
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_NOBODY = 65534


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _isolate(folder: str, size: int) -> None:
    """Leave the machine's network, processes and files; ``folder`` becomes an empty one in memory, of ``size`` bytes.

    Returns in a child process, which is the first of its namespace: when it ends, all that it began end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    machine = os.uname().machine
    if machine not in _CAPSET:
        raise OSError(0, f"not known how to on {machine}")
    user, group = os.geteuid(), os.getegid()
    if os.getuid() == 0:
        # The kernel counts no processes of root; files are still reached by the effective user.
        os.setresuid(_NOBODY, -1, -1)
    _checked(libc.unshare(_NEW), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, _MS_PRIVATE, 0)
    call = [ctypes.c_long(_MOUNT_SETATTR), ctypes.c_long(-100), b"/", ctypes.c_long(_AT_RECURSIVE), attributes]
    _checked(libc.syscall(*call, ctypes.c_size_t(len(attributes))), "mount_setattr")
    # Processes are seen in /proc, and servers are spoken to through sockets in /run.
    empty = "size=4096,mode=555"
    for place, options in ((folder, f"size={size},mode=700"), ("/proc", empty), ("/run", empty)):
        flags = _MS_NOSUID | _MS_NODEV
        if os.path.isdir(place):
            _checked(libc.mount(b"tmpfs", place.encode(), b"tmpfs", flags, options.encode()), f"mount on {place}")
    os.chdir(folder)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(128 - code if code < 0 else code)
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    none = struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
    _checked(libc.syscall(ctypes.c_long(_CAPSET[machine]), struct.pack("Ii", 0x20080522, 0), none), "capset")
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _limit(job: dict[str, Any], counted: bool) -> None:
    # The caller watches the clock; this ends what it can no longer reach.
    seconds, size = int(job["timeout_s"]) + 10, job["memory_mb"] << 20
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, size),
        (resource.RLIMIT_FSIZE, job["file_mb"] << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        # Elsewhere it would count all that the user runs.
        *([(resource.RLIMIT_NPROC, job["processes"])] if counted else []),
    ):
        resource.setrlimit(kind, (value, value))


def _answer(call: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    try:
        value = made[call["call"]](*call.get("args", []), **call.get("kwargs", {}))
        return {"value": json.loads(json.dumps(value))}
    except KeyError as error:
        return {"error": f"KeyError: {error}" if call["call"] in made else "no such function"}
    except (TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    except Exception as error:
        return {"error": f"{type(error).__name__}"}


def main() -> None:
    """Run the job that stands in the file named by the first argument."""
    with open(sys.argv[1]) as handle:
        job = json.load(handle)
    os.unlink(sys.argv[1])
    told = os.fdopen(int(sys.argv[2]), "w", buffering=1)
    try:
        _isolate(os.getcwd(), job["file_mb"] << 20)
        problem = None
    except OSError as error:
        problem = str(error)
    told.write(json.dumps({"isolation": problem}) + "\n")
    if problem is not None and job["required"]:
        return
    _limit(job, counted=problem is None)
    source, tests, calls = job["source"], job["tests"], job["calls"]
    nonce = job["nonce"]
    del job
    module = types.ModuleType("__main__" if calls is None and tests is None else "answer")
    sys.modules[module.__name__] = module
    made = vars(module)
    exec(compile(source, "answer.py", "exec"), made)
    for call in calls or ():
        told.write(json.dumps(_answer(call, made)) + "\n")
    if tests is not None:
        exec(compile(tests, "tests.py", "exec"), made)
    told.write(json.dumps({"done": nonce}) + "\n")


if __name__ == "__main__":
    main()
