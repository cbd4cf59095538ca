"""A script, run by sandbox.py in a process of its own: shuts itself in, says how far that went, and runs the program it is given.

    python -I -S jail.py SPEC < program

SPEC is JSON. Standard output gets one JSON object, what could be shut; standard error is the program's output. Three processes: this one,
the first of a new process namespace, whose end ends all others in it, and the program. The standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from typing import Any

# of linux/sched.h, linux/mount.h, linux/prctl.h
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
MOUNT_ATTR_RDONLY, AT_RECURSIVE, AT_FDCWD, SYS_MOUNT_SETATTR = 0x1, 0x8000, -100, 442
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 38, 9
NOBODY = 65534


def main() -> None:
    spec, program = json.loads(sys.argv[1]), sys.stdin.buffer.read()
    libc = ctypes.CDLL(None, use_errno=True)
    os.chdir(spec["folder"])
    has_network_cut = _unshares(libc, CLONE_NEWNET | CLONE_NEWIPC)
    has_own_processes = _unshares(libc, CLONE_NEWPID)
    has_own_files = _unshares(libc, CLONE_NEWNS)
    child = os.fork()
    if child:
        os._exit(_status_of(child))
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    held = {"network": has_network_cut, "processes": has_own_processes, "files": has_own_files and _seals_files(libc, spec)}
    with open("program.py", "wb") as file:
        file.write(program)
    print(json.dumps(held | {"user": _drops_rights(spec) or os.geteuid() != 0}), flush=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    child = os.fork()
    if child:
        os._exit(_status_of(child))
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    _run(spec)


def _unshares(libc: Any, flags: int) -> bool:
    """Whether new namespaces could be had: as root directly, else within a namespace of users."""
    if libc.unshare(flags) == 0:
        return True
    ids = {"uid": os.geteuid(), "gid": os.getegid()}
    if libc.unshare(CLONE_NEWUSER):
        return False
    _write("/proc/self/setgroups", "deny")
    for kind, number in ids.items():  # files can only be made by users that the namespace knows
        _write(f"/proc/self/{kind}_map", f"{number} {number} 1")
    return bool(libc.unshare(flags) == 0)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _seals_files(libc: Any, spec: dict[str, Any]) -> bool:
    """Make everything read-only but the program's folder, which becomes memory of a bounded size."""
    folder = spec["folder"].encode()
    options = f"size={spec['folder_bytes']},mode=777".encode()
    if libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) or libc.mount(b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options):
        return False
    os.chdir(spec["folder"])  # into what is mounted there now
    return _set_read_only(libc, b"/", True, AT_RECURSIVE) and _set_read_only(libc, b".", False, 0)


def _set_read_only(libc: Any, path: bytes, is_read_only: bool, flags: int) -> bool:
    """mount_setattr(2), which the C library may not have; its attributes are four words: to set, to clear, propagation, user namespace."""
    change = (MOUNT_ATTR_RDONLY, 0) if is_read_only else (0, MOUNT_ATTR_RDONLY)
    attributes = (ctypes.c_uint64 * 4)(*change, 0, 0)
    done: int = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, ctypes.byref(attributes), ctypes.sizeof(attributes))
    return done == 0


def _drops_rights(spec: dict[str, Any]) -> bool:
    """Root is bound by no limit on processes; a user without rights is."""
    if not spec["drops_rights"]:
        return False
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    except OSError:
        return False
    return True


def _run(spec: dict[str, Any]) -> None:
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limits = {
        resource.RLIMIT_CPU: spec["cpu_seconds"],
        resource.RLIMIT_AS: spec["memory_bytes"],
        resource.RLIMIT_FSIZE: spec["file_bytes"],
        resource.RLIMIT_NOFILE: spec["open_files"],
        resource.RLIMIT_NPROC: 0,  # no further process or thread
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    os.execve(spec["python"], [spec["python"], "-I", "-S", "-B", "program.py"], {})


def _status_of(child: int) -> int:
    """Exit status; 128 and the signal's number for a process that a signal ended."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
