"""Model-written code, run contained in a process of its own.

What it contains are accidents and casual cheating: endless loops, fork bombs, full disks, an early `exit(0)`, a look
for secrets in the environment. It is no security boundary against a determined attacker: the kernel is shared, and the
code could search its own process for the proof that it reached its end. For that, use a virtual machine.

`run_code` starts this file as a script (`python -s -P -S sandbox.py`), the launcher, so that nothing of the calling
process (its memory, threads, descriptors, environment) is there to begin with. The launcher makes namespaces where the
kernel lets it, forks a keeper (the first process of its own PID namespace), which forks the process that takes on the
limits and runs the code; the keeper watches the clock, and with its end the kernel ends all others. Only the standard
library is imported, so the file also works as a copy.
"""

import functools
import glob
import math
import os
import signal
import stat
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import subprocess

_MIB = 1024 * 1024
_GRACE = 10.0  # seconds the launcher has beyond the code's own, to start and to clean up
_INODES = 1000  # files and folders that fit into the throw-away folder, where that can be limited
_INSIDE = "/sandbox"  # the throw-away folder as the code sees it, where it sees nothing else
_OFFERED = ("processes", "network", "files", "disk space")  # what some systems can cut and others cannot
_SYSTEM = "/usr /bin /sbin /lib /lib32 /lib64 /nix/store /gnu/store /etc/alternatives /etc/ld.so.cache /etc/localtime"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SYSCALLS = {  # architecture; socket; fcntl; kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, prlimit64
    "x86_64": (0xC000003E, 41, 72, (62, 200, 234, 129, 297, 302)),
    "aarch64": (0xC00000B7, 198, 25, (129, 130, 131, 138, 240, 261)),
}
_IO_URING_SETUP, _PIDFD_SEND_SIGNAL = 425, 424  # on both
_AWAITED = (signal.SIGCHLD, signal.SIGALRM, signal.SIGTERM) if os.name == "posix" else ()  # by launcher and keeper


class SandboxError(RuntimeError):
    """Code could not be run contained; nothing is known about the code."""


class Outcome(NamedTuple):
    """What became of some code.

    Attributes:
        passed: It ran to its end, in time, within its limits and without an uncaught exception.
        status: "passed", "failed" (an uncaught exception or an exit status other than 0), "ended early" (an exit with
            status 0 before the last line), "timed out", or "killed" (by a signal).
        output: The last of what it wrote to standard output and error together, undecodable bytes replaced.
        seconds: Wall-clock time, the start of the process included.
    """

    passed: bool
    status: str
    output: str
    seconds: float


@dataclass(frozen=True)
class Limits:
    """What some code may use. All are positive.

    Attributes:
        seconds: Wall-clock time; also processor time of each of its processes, rounded up and one more.
        memory_mib: Address space of each of its processes, in MiB; the interpreter itself needs about 30.
        file_mib: Size of a file, and of all files together where `isolation()` names "disk space", in MiB.
        processes: Processes and threads at one time, its first included.
        output_bytes: How much of its output is kept.
    """

    seconds: float = 10.0
    memory_mib: int = 1024
    file_mib: int = 16
    processes: int = 16
    output_bytes: int = 64 * 1024

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that is not a positive number."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"the limit {field.name} is {value!r}; it must be a positive number.")


def run_code(code: str, limits: Limits = Limits(), name: str = "__main__") -> Outcome:
    """Run Python code contained, as a script of its own, and say whether it ran to its end.

    It may import the standard library and the packages installed here. It starts in an empty folder, which is its home
    and temporary folder too and is removed afterwards; its standard input is empty; its environment holds nothing of
    the caller's. Processes and threads it leaves behind are ended. What else is cut depends on the system: see
    `isolation`.

    "Ran to its end" is told by a random token that the process can only send behind the code's last line, not by the
    exit status: put the tests behind the code to be tested, and `sys.exit(0)` or `os._exit(0)` do not pass them.

    Works from any thread, and from several at once.

    Args:
        code: Python source.
        limits: What it may use.
        name: What the code finds as its `__name__`; it is a module of that name.

    Raises:
        SandboxError: The system cannot run it contained. Never because of what the code does.
    """
    start = time.monotonic()
    status, _, output = _run(code, limits, _probe()[0], name)
    if status in ("error", "unavailable"):
        raise SandboxError(f"this system cannot run model-written code contained: {output.strip()}")
    return Outcome(status == "passed", status, output, time.monotonic() - start)


def isolation() -> list[str]:
    """What is cut from the code that `run_code` runs on this system, and what is not.

    Returns:
        Always "time", "file size" and "environment"; "memory" but on macOS; where the system allows it "processes"
        (their number is limited, and none outlives the code), "network", "files" (it sees Python, the system's
        libraries and its own folder, and can write to that folder only) and "disk space" (of all its files together);
        and "not cut: ..." for each that is missing.

    Raises:
        SandboxError: As `run_code`.
    """
    cut = ["time", "file size", "environment", *_probe()[1]]
    return cut + [f"not cut: {name}" for name in ("memory", *_OFFERED) if name not in cut]


@functools.cache
def _probe() -> tuple[bool, tuple[str, ...]]:
    """Whether namespaces can be made here, and what is cut: found by running an empty script once."""
    if os.name != "posix":
        raise SandboxError(
            "running model-written code contained needs Linux or macOS; on Windows, run the evaluation in WSL."
        )
    output = "Python does not know its own executable"
    for namespaces in (True, False) if sys.platform == "linux" else (False,):
        status, cut, output = _run("", Limits(seconds=60), namespaces)  # slowness is no lack of ability
        if status == "passed":
            return namespaces, cut
        if status != "unavailable":
            break
    raise SandboxError(f"this system cannot run model-written code contained: {output.strip() or status}")


# The calling process.


def _run(code: str, limits: Limits, namespaces: bool, name: str = "__main__") -> tuple[str, tuple[str, ...], str]:
    """Run some code in one of the two ways.

    Returns:
        The status: that of an `Outcome`, or "unavailable" if there are no namespaces to be had, or "error"; what was
        cut; and the output, with the reason for the status behind it.
    """
    import tempfile

    folder = tempfile.mkdtemp(prefix="stm-sandbox-")
    try:
        report, output = _launch(code, limits, namespaces, folder, name)
    finally:
        _remove(folder)
    if not report:
        return "killed", (), output
    status, cut, note = report.split("\t", 2)
    if output and note and not output.endswith("\n"):
        output += "\n"
    return status, tuple(filter(None, cut.split(","))), output + note


def _launch(code: str, limits: Limits, namespaces: bool, folder: str, name: str) -> tuple[str, str]:
    """Start the launcher and wait for its end.

    Returns:
        Its report, empty if it did not live to make one, and the output.
    """
    import subprocess

    packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    report, report_end = os.pipe()
    try:
        numbers = [str(number) for number in (report_end, int(namespaces), *_numbers(limits))]
        process = subprocess.Popen(
            # -I would ignore PYTHONHASHSEED, which makes runs alike; -S: no .pth files, which may import anything
            [
                sys.executable,
                "-s",
                "-P",
                "-S",
                "-X",
                "utf8",
                os.path.abspath(__file__),
                folder,
                name,
                *numbers,
                *packages,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=_environment(folder),
            pass_fds=(report_end,),
            start_new_session=True,
        )
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(report_end)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(BrokenPipeError), process.stdin:
            process.stdin.write(code.encode("utf-8", "replace"))
        return _collect(process, report, limits)
    finally:
        _end(process)
        process.stdout.close()
        os.close(report)


def _numbers(limits: Limits) -> list[float]:
    return [getattr(limits, field.name) for field in fields(limits)]


def _environment(folder: str) -> dict[str, str]:
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    environment |= {"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:  # some Pythons do not start without it
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _collect(process: "subprocess.Popen[bytes]", report: int, limits: Limits) -> tuple[str, str]:
    """Read the report, and the last of the output, until the launcher has ended or should have long ago."""
    import selectors
    from subprocess import TimeoutExpired

    assert process.stdout is not None
    stdout, deadline = process.stdout.fileno(), time.monotonic() + limits.seconds + _GRACE
    texts = {report: bytearray(), stdout: bytearray()}

    def read(descriptor: int) -> int:
        text, data = texts[descriptor], os.read(descriptor, 65536)
        text += data
        del text[: -(int(limits.output_bytes) if descriptor == stdout else 65536)]
        return len(data)

    with selectors.DefaultSelector() as selector:
        for descriptor in texts:
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        while report in selector.get_map() and b"\n" not in texts[report] and time.monotonic() < deadline:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                if not read(key.fd):
                    selector.unregister(key.fd)
    with suppress(TimeoutExpired):
        process.wait(max(1.0, deadline - time.monotonic()))
    with suppress(BlockingIOError):
        for _ in range(32):  # what is left in the pipe, but not for ever
            if not read(stdout):
                break
    return texts[report].decode().partition("\n")[0], texts[stdout].decode("utf-8", "replace")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Let the launcher end what it started and then itself, if it has not ended already."""
    from subprocess import TimeoutExpired

    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except TimeoutExpired:
            process.kill()
            process.wait()


def _remove(folder: str) -> None:
    """Remove a folder with all in it, though it may be very deep, unreadable, gone, or a link to somewhere else."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            os.unlink(folder)
            return
        os.chmod(folder, 0o700)
        while entries := list(os.scandir(folder)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry)
                    continue
                os.chmod(entry, 0o700)
                for inner in list(os.scandir(entry)):
                    if inner.is_dir(follow_symlinks=False):  # moved up, so that paths stay short
                        os.chmod(inner, 0o700)
                        os.rename(inner, os.path.join(folder, os.urandom(16).hex()))
                    else:
                        os.unlink(inner)
                os.rmdir(entry)
        os.rmdir(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        import logging

        logging.getLogger(__name__).warning("the folder %s of model-written code cannot be removed: %s", folder, error)


# The launcher and the keeper.


class _Job(NamedTuple):
    """What the launcher is to do.

    Attributes:
        folder: The throw-away folder; with namespaces, where its file system and the code's root are mounted.
        report: Descriptor to which one line goes: status, what was cut, note, with tabs between.
        namespaces: Whether to make namespaces.
        limits: Of the code.
        packages: Folders of installed packages.
        code: Its source.
        name: Its `__name__`.
        user: User id to run it as, if that is another.
        others: Processes and threads of that user that the code's limit does not mean.
    """

    folder: str
    report: int
    namespaces: bool
    limits: Limits
    packages: list[str]
    code: bytes
    name: str
    user: int | None
    others: int


class _UnavailableError(Exception):
    """The kernel makes no namespaces for us."""


def _main(arguments: list[str]) -> NoReturn:
    """Do as `_launch` asks, report, and exit."""
    num_limits = len(fields(Limits))
    folder, name, report, namespaces, *numbers = arguments[: 4 + num_limits]
    values: list[Any] = [float(number) for number in numbers]
    limits, packages = Limits(*values), arguments[4 + num_limits :]
    cut: tuple[str, ...] = ()
    try:
        os.umask(0o022)
        code = sys.stdin.buffer.read()
        user, others = _user_for_code(namespaces == "1")
        job = _Job(folder, int(report), namespaces == "1", limits, packages, code, name, user, others)
        cut = _enter_namespaces(job) if job.namespaces else _prepare_without_namespaces(job)
        status, note = _keep(job)
    except _UnavailableError as error:
        status, note = "unavailable", str(error)
    except BaseException as error:
        status, note = "error", f"{type(error).__name__}: {error}"
    _report(int(report), status, cut, note)
    os._exit(0)


def _report(report: int, status: str, cut: Iterable[str], note: str) -> None:
    """Write the one line that the caller reads; of several, it heeds the first."""
    os.write(report, "\t".join([status, ",".join(cut), note.replace("\n", " ") + "\n"]).encode())


def _user_for_code(namespaces: bool) -> tuple[int | None, int]:
    """The user id that code gets if we are root, whom no process limit binds, and how many tasks it has already."""
    user = None
    if os.geteuid() == 0:
        user = 65534  # "nobody"
        if sys.platform == "linux":
            with open("/proc/self/uid_map", encoding="ascii") as file:
                if file.read().split() == ["0", "0", str(2**32 - 1)]:  # every id may be used: take one nobody has
                    return 0x90000000 + int.from_bytes(os.urandom(3), "big"), 0
    elif namespaces and tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (5, 14):
        return None, 2  # counted for each user namespace: the launcher and the keeper
    return user, _num_tasks(os.geteuid() if user is None else user) + namespaces


def _num_tasks(user: int) -> int:
    """Processes and threads of a user; 0 on systems without /proc."""
    total = 0
    for path in glob.glob("/proc/[0-9]*/status"):
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            values = dict(line.split(":", 1) for line in file)
            total += int(values["Threads"]) if int(values["Uid"].split()[0]) == user else 0
    return total


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library; raises OSError if it returns something other than 0."""
    import ctypes

    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _prctl(option: int, value: int) -> None:
    from ctypes import c_ulong

    _call("prctl", option, c_ulong(value), c_ulong(0), c_ulong(0), c_ulong(0))


def _enter_namespaces(job: _Job) -> tuple[str, ...]:
    """Go on as the first process of new mount, IPC, network and PID namespaces, and as root's or in a user namespace.

    The launcher stays behind, waits for that process and exits.

    Returns:
        What is cut by them.
    """
    group, user, is_root = os.getegid(), os.geteuid(), os.geteuid() == 0
    try:
        _prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, if the caller dies
        # CLONE_NEWNS, NEWIPC, NEWPID, NEWNET, NEWUSER
        _call("unshare", 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000 | (0 if is_root else 0x10000000))
        if not is_root:
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                    file.write(text)
    except OSError as error:
        raise _UnavailableError(f"no namespaces: {error}") from error
    _await_signals()
    keeper = os.fork()
    if keeper:
        while not os.waitpid(keeper, os.WNOHANG)[0]:  # it has ended when all of its namespace have
            if signal.sigwait(_AWAITED) == signal.SIGTERM:
                os.kill(keeper, signal.SIGKILL)
        os._exit(0)
    try:
        _prctl(1, signal.SIGKILL)
        _volunteer_when_memory_runs_out()
        _enter_root(job)
    except OSError as error:
        raise _UnavailableError(f"no namespaces: {error}") from error
    return ("memory", *_OFFERED)


def _volunteer_when_memory_runs_out() -> None:
    """Be the first that the kernel ends when the machine's memory is used up, before the evaluation."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    from ctypes import c_ulong

    _call("mount", *texts[:3], c_ulong(flags), texts[3])


def _enter_root(job: _Job) -> None:
    """Make and enter a file system that holds Python, the system's libraries and an empty folder of limited size.

    All but the folder is read-only, and nothing else of this system is in it: neither homes nor /proc.
    """
    nosuid, nodev, remount, bind, move, recursive, private = 2, 4, 32, 4096, 8192, 16384, 1 << 18
    readonly = 1
    _mount("none", "/", None, recursive | private)
    _mount("tmpfs", job.folder, "tmpfs", nosuid, "mode=755,size=1m")
    shown = [*_SYSTEM.split(), *_DEVICES, sys.base_prefix, sys.base_exec_prefix, *job.packages]
    for path in sorted({os.path.abspath(path) for path in shown}, key=len):  # a folder before what is in it
        target = job.folder + path
        if os.path.lexists(target) or not os.path.exists(path):
            continue
        if os.path.islink(path) and os.path.dirname(path) == "/":  # /bin is usr/bin on most systems
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(target, os.O_CREAT, 0o644))
        _mount(path, target, None, bind | recursive)
        if path not in _DEVICES:
            flags = os.statvfs(target).f_flag  # those of a mount that is not ours have to stay
            _mount("none", target, None, remount | bind | readonly | flags & 0xC0F | (flags & 4096 and 1 << 21))
    folder = job.folder + _INSIDE
    os.mkdir(folder)
    if not os.path.lexists(job.folder + "/tmp"):
        os.symlink(_INSIDE, job.folder + "/tmp")
    user, group = (os.geteuid(), os.getegid()) if job.user is None else (job.user, job.user)
    size = f"size={int(job.limits.file_mib * _MIB)},nr_inodes={_INODES},mode=700,uid={user},gid={group}"
    _mount("tmpfs", folder, "tmpfs", nosuid | nodev, size)
    _mount("none", job.folder, None, remount | bind | readonly | nosuid)
    os.chdir(job.folder)
    _mount(".", "/", None, move)
    os.chroot(".")


def _prepare_without_namespaces(job: _Job) -> tuple[str, ...]:
    """Take the ways there are without namespaces.

    Returns:
        What is cut by them.
    """
    if job.user is not None:
        os.chown(job.folder, job.user, job.user)
    if sys.platform != "linux":
        return ()
    _volunteer_when_memory_runs_out()
    _prctl(1, signal.SIGTERM)
    _prctl(4, 0)  # PR_SET_DUMPABLE: not to be read or traced by the code, if its user is the same
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become ours
    refused = _refuse_calls()
    # Of our user, it could else kill us and live on, and descendants that went into the background have to be found.
    ended = (refused or job.user is not None) and os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return ("memory", *(["processes"] if ended else []), *(["network"] if refused else []))


def _refuse_calls() -> bool:
    """Let the kernel refuse `socket`, io_uring, which can do the same, and what could end this process or limit it.

    Returns:
        Whether it is known how, on this machine.
    """
    import ctypes
    import struct

    if os.uname().machine not in _SYSCALLS or sys.maxsize < 2**32:
        return False
    architecture, socket, fcntl, by_pid = _SYSCALLS[os.uname().machine]
    load, equal, at_least, leave, on = 0x20, 0x15, 0x35, 0x06, "on"
    blocks: dict[str, list[tuple[int, int, str, str]]] = {
        "which call": [  # operation, operand (a number, or where it is), where to go on if true, if false
            (load, 4, on, on),
            (equal, architecture, on, "refuse"),
            (load, 0, on, on),
            (at_least, 0x40000000, "refuse", on),  # the calls of x32
            *((equal, number, "refuse", on) for number in (socket, _IO_URING_SETUP, _PIDFD_SEND_SIGNAL)),
            *((equal, number, "to whom", on) for number in by_pid),
            (equal, fcntl, "to do what", "allow"),
        ],
        "to whom": [(load, 16, on, on)]
        + [(equal, pid % 2**32, "refuse", on) for pid in (os.getpid(), -os.getpid())]
        + [(equal, -1 % 2**32, "refuse", "allow")],
        "to do what": [(load, 24, on, on), (equal, 10, "refuse", "allow")],  # F_SETSIG: which signal a file sends
        "allow": [(leave, 0x7FFF0000, on, on)],
        "refuse": [(leave, 0x00050000 | 13, on, on)],  # EACCES
    }
    steps = [step for block in blocks.values() for step in block]
    places = {name: steps.index(block[0]) for name, block in blocks.items()}
    program = b"".join(
        struct.pack("HBBI", step, *(places.get(to, place + 1) - place - 1 for to in (if_true, if_false)), operand)
        for place, (step, operand, if_true, if_false) in enumerate(steps)
    )
    packed = ctypes.create_string_buffer(program)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    try:
        _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
        filter_mode = ctypes.c_ulong(2)
        _call("prctl", 22, filter_mode, ctypes.byref(Program(len(steps), ctypes.addressof(packed))))  # PR_SET_SECCOMP
    except OSError:
        return False
    return True


def _keep(job: _Job) -> tuple[str, str]:
    """Run the code in a child, end it when its time is up, and end all that it leaves behind.

    Returns:
        Status and note.
    """
    token = os.urandom(16)
    proof, proof_end = os.pipe()
    os.set_blocking(proof, False)  # a process left behind may hold the other end
    _await_signals()
    child = os.fork()
    if child == 0:
        os.close(proof)
        try:
            _take_on_limits(job)
        except BaseException as error:
            _report(job.report, "error", (), f"{type(error).__name__}: {error}")
            os._exit(1)
        os.close(job.report)
        _execute(job, os.path.join(os.environ["HOME"], "code.py"), proof_end, token)
    os.close(proof_end)
    status = None
    try:
        status = _status_in_time(child, job.limits.seconds)
    finally:
        if status is None:
            os.kill(child, signal.SIGKILL)  # it may not have come to have a group of its own
        if not job.namespaces:
            _end_descendants(child)
    if status is None:
        return "timed out", f"[ended after {job.limits.seconds:g} seconds]"
    try:
        proven = os.read(proof, 64) == token
    except BlockingIOError:
        proven = False
    return _verdict(status, proven)


def _await_signals() -> None:
    """Let all signals wait, so that none interrupts anything; `sigwait` tells of some when it is called."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    for number in _AWAITED:
        signal.signal(number, lambda *_: None)  # or some systems would drop those that are ignored by default


def _status_in_time(child: int, seconds: float) -> int | None:
    """What `waitpid` says of a child; None if time is up first, or we are told to end. Orphans are reaped."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    while not {signal.SIGALRM, signal.SIGTERM} & signal.sigpending():  # orphans may come faster than they are reaped
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            return status
        if not ended and signal.sigwait(_AWAITED) != signal.SIGCHLD:
            break
    return None


def _verdict(status: int, proven: bool) -> tuple[str, str]:
    """Status and note for what `waitpid` says of the code's process."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        if number == signal.SIGXCPU:
            return "timed out", "[ended: its processor time was used up]"
        return "killed", f"[killed by {name}]"
    if os.WEXITSTATUS(status) != 0:
        return "failed", f"[exited with status {os.WEXITSTATUS(status)}]"
    if not proven:
        return "ended early", "[exited with status 0 before its last line]"
    return "passed", ""


def _end_descendants(child: int) -> None:
    """Kill and reap all descendants, those that went into the background too."""
    deadline = time.monotonic() + _GRACE / 2
    with suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    while time.monotonic() < deadline:
        _kill_below(os.getpid())
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _kill_below(pid: int) -> None:
    """Kill the descendants of a process, parents first: what is killed forks no more, and its children become ours."""
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with suppress(OSError), open(path, encoding="ascii") as file:
            for child in map(int, file.read().split()):
                with suppress(OSError):
                    os.kill(child, signal.SIGKILL)
                    _kill_below(child)


# The code's own process.


def _take_on_limits(job: _Job) -> None:
    """Become the process that the code may have."""
    _reset_signals()
    os.setsid()
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)  # as descriptor 0, the lowest free one
    if sys.platform == "linux":
        _prctl(1, signal.SIGKILL)
    _set_limits(job)
    if job.user is not None:
        os.setgroups([])
        os.setgid(job.user)
        os.setuid(job.user)
    if sys.platform == "linux":
        _prctl(1, signal.SIGKILL)  # again: `setuid` undoes it
        _drop_capabilities()
    folder = _INSIDE if job.namespaces else job.folder
    library = os.path.dirname(os.__file__)
    if not os.access(library, os.R_OK | os.X_OK):
        raise SandboxError(
            f"only root can read Python's library in {library}, and code is not run as root. Run this as an ordinary "
            "user, or with a Python that all users can read."
        )
    os.environ.clear()
    os.environ.update(_environment(folder))
    os.chdir(folder)
    sys.path += job.packages
    sys.executable = getattr(sys, "_base_executable", sys.executable)  # the one of a virtual environment is not here


def _reset_signals() -> None:
    """Have every signal as a Python that was just started has it, whatever it was to us or to the evaluation."""
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT}:
        with suppress(OSError):  # SIGKILL, say
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _set_limits(job: _Job) -> None:
    import resource

    seconds = math.ceil(job.limits.seconds) + 1
    limits = {
        "RLIMIT_AS": int(job.limits.memory_mib * _MIB),
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": seconds,  # its soft limit ends a process by SIGXCPU, a second before the hard one
        "RLIMIT_FSIZE": int(job.limits.file_mib * _MIB),
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NOFILE": 256,
        "RLIMIT_NPROC": int(job.limits.processes) + job.others,
    }
    for name, limit in limits.items():
        which = getattr(resource, name, None)
        if which is None or (name == "RLIMIT_NPROC" and sys.platform != "linux"):  # not there, or not countable
            continue
        ceiling = resource.getrlimit(which)[1]
        hard = limit + 1 if name == "RLIMIT_CPU" else limit
        if ceiling != resource.RLIM_INFINITY:
            limit, hard = min(limit, ceiling), min(hard, ceiling)
        with suppress(ValueError, OSError) if sys.platform == "darwin" else nullcontext():
            resource.setrlimit(which, (limit, hard))


def _drop_capabilities() -> None:
    """Give up what being root, or the first of a user namespace, allows, for good."""
    import ctypes

    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    version_3 = 0x20080522
    _call("capset", (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)())


def _execute(job: _Job, path: str, proof: int, token: bytes) -> NoReturn:
    """Run the code as the main module, say so if it reaches its end, and exit."""
    code, main, pid = job.code, ModuleType(job.name), os.getpid()
    getpid, leave, write = os.getpid, os._exit, os.write  # the code may change those in `os`
    main.__file__, sys.argv = path, [path]
    sys.modules["__main__"] = sys.modules[job.name] = main
    status = 1
    try:
        with open(path, "wb") as file:  # so that tracebacks and `inspect` find it
            file.write(code)
        exec(compile(code, path, "exec", dont_inherit=True), main.__dict__)
        status = 0
        with suppress(Exception):
            sys.stdout.flush()
        if getpid() == pid:
            write(proof, token)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(error.code + "\n")
    except BaseException as error:
        frames = error.__traceback__
        sys.excepthook(type(error), error.with_traceback(frames and frames.tb_next), None)
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        leave(status & 0xFF)


if __name__ == "__main__":
    _main(sys.argv[1:])
