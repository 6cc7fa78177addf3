"""Hostile programs, contained in every way this system offers."""

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stm_plugin import sandbox
from stm_plugin.sandbox import Limits, Outcome, SandboxError, isolation, run_code

pytestmark = pytest.mark.skipif(os.name != "posix", reason="model-written code is run on Linux and macOS only")

SECRET = "the-token-of-the-hub-4711"
OTHER_USER = 20_000 + os.getpid()  # not that of another run of these tests, whose processes would count
GOOD = "import math\nassert math.gcd(12, 18) == 6\n"

# A process of its own for each way, so that it can be another user's and have a secret in its environment from the
# start. It answers each line of JSON with one.
DRIVER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
import sandbox
namespaces = sys.argv[2] == "True"
status, cut, output = sandbox._run("", sandbox.Limits(seconds=60), namespaces)
sandbox._probe = lambda: (namespaces, cut)
print(json.dumps([status, output, sandbox.isolation()]), flush=True)
for line in sys.stdin:
    codes, limits = json.loads(line)
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda code: sandbox.run_code(code, sandbox.Limits(**limits)), codes))
    print(json.dumps(outcomes), flush=True)
"""


class Way:
    """One user, with or without namespaces."""

    def __init__(self, python: str, user: int | None, namespaces: bool):
        self.base = Path(tempfile.mkdtemp(prefix="stm-test-"))
        self.folders = self.base / "folders"
        self.folders.mkdir()
        shutil.copy(sandbox.__file__, self.base / "sandbox.py")
        self.base.chmod(0o755)
        (self.base / "sandbox.py").chmod(0o644)
        self.folders.chmod(0o777)
        self.user, self.namespaces = os.geteuid() if user is None else user, namespaces
        self.process = subprocess.Popen(
            [python, "-c", DRIVER, str(self.base), str(namespaces)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.defpath, "TMPDIR": str(self.folders), "STM_SECRET": SECRET},
            **({} if user is None else {"user": user, "group": user, "extra_groups": []}),
        )
        self.status, self.output, self.isolation = json.loads(self.process.stdout.readline())

    def run(self, code: str, **limits) -> Outcome:
        return self.run_together([code], **limits)[0]

    def run_quickly(self, code: str, within: float, **limits) -> Outcome:
        """The outcome of the first of three runs that takes less than so long: a busy machine may be slow once."""
        for _ in range(3):
            outcome = self.run(code, **limits)
            if outcome.seconds < within:
                return outcome
        raise AssertionError(f"not within {within} seconds in three runs: {outcome}")

    def run_together(self, codes: list[str], **limits) -> list[Outcome]:
        self.start(codes, **limits)
        return [Outcome(*fields) for fields in json.loads(self.process.stdout.readline())]

    def start(self, codes: list[str], **limits) -> None:
        self.process.stdin.write(json.dumps([codes, {"seconds": 60} | limits]) + "\n")
        self.process.stdin.flush()

    def leftovers(self) -> list[str]:
        """Processes that the launcher started: all have the throw-away folder in their command line."""
        return processes_with(str(self.folders))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        shutil.rmtree(self.base, ignore_errors=True)


def processes_with(text: str) -> list[str]:
    if sys.platform != "linux":
        done = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if text in line]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text in (line := path.read_text(errors="replace")):
                found.append(f"{path}: {line}")
    return found


def python_for(user: int | None) -> str | None:
    """A Python that this user can run."""
    if user is None:
        return sys.executable
    for python in (sys.executable, "/usr/bin/python3"):
        check = [python, "-c", "import ctypes, sys; sys.exit(sys.version_info < (3, 11))"]
        identity = {"user": user, "group": user, "extra_groups": []}
        try:
            if subprocess.run(check, cwd="/", capture_output=True, **identity).returncode == 0:
                return python
        except OSError:
            pass
    return None


WAYS = [
    pytest.param((None, True), id="as-we-are"),
    pytest.param((None, False), id="as-we-are-without-namespaces"),
    pytest.param((OTHER_USER, True), id="ordinary-user"),
    pytest.param((OTHER_USER, False), id="ordinary-user-without-namespaces"),
]


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    user, namespaces = request.param
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    # without namespaces root's code runs as another user, who has to read Python too
    needs = OTHER_USER if user is None and not namespaces and os.geteuid() == 0 else user
    python = python_for(needs)
    if python is None:
        pytest.skip("no Python of 3.11 or later here that other users than root can run")
    made = Way(python, user, namespaces)
    try:
        if made.status == "unavailable":
            pytest.skip(f"this system does not allow it: {made.output}")
        assert made.status == "passed", made.output
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def _nothing_is_left(request):
    """After every test: no process, no folder, and a good program still passes."""
    yield
    if "way" not in request.fixturenames:
        return
    way = request.getfixturevalue("way")
    assert way.leftovers() == []
    assert list(way.folders.iterdir()) == []
    outcome = way.run(GOOD)
    assert outcome.passed, outcome


# What passes and what does not.

PROGRAMS = {
    "good": (GOOD, "passed", ""),
    "raises": ("def f():\n    return 1 / 0\nf()", "failed", "line 2, in f\n    return 1 / 0"),
    "assertion": ("assert 1 == 2", "failed", "AssertionError"),
    "syntax": ("def f(:\n", "failed", "SyntaxError"),
    "null byte": ("x = '\0'", "failed", "null bytes"),
    "exit 3": ("import sys\nsys.exit(3)", "failed", "[exited with status 3]"),
    "exit text": ("import sys\nsys.exit('no more')", "failed", "no more"),
    "exit 0": ("import sys\nsys.exit(0)\nassert False", "ended early", "before its last line"),
    "exit None": ("raise SystemExit", "ended early", "before its last line"),
    "exit 256": ("raise SystemExit(256)", "ended early", "before its last line"),
    "_exit 0": ("import os\nos._exit(0)\nassert False", "ended early", "before its last line"),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'exit 0'])", "ended early", "before its last line"),
    "tests in a fork only": (
        "import os\npid = os.fork()\nif pid:\n    os.waitpid(pid, 0)\n    os._exit(0)\n",
        "ended early",
        "before its last line",
    ),
    "writes to all descriptors": (
        "import os\nfor i in range(3, 256):\n    try: os.write(i, b'passed' * 4)\n    except OSError: pass\n"
        "os._exit(0)",
        "ended early",
        "before its last line",
    ),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "killed", "SIGSEGV"),
    "killed": ("import os\nos.kill(os.getpid(), 9)", "killed", "SIGKILL"),
    "main module": (
        "import pickle, sys\nclass A: pass\nassert __name__ == '__main__'\nassert sys.modules['__main__'].A is A\n"
        "assert type(pickle.loads(pickle.dumps(A()))) is A\nassert sys.argv == [__file__]",
        "passed",
        "",
    ),
    "no input": ("import sys\nassert sys.stdin.read() == ''\nprint('ü€')", "passed", "ü€"),
    "its folder": (
        "import os, pathlib, tempfile\nassert os.listdir() == ['code.py']\nopen('a', 'w').write('b')\n"
        "assert pathlib.Path.home() == pathlib.Path.cwd() == pathlib.Path(tempfile.gettempdir())\n",
        "passed",
        "",
    ),
    "child process": (
        "import subprocess, sys\nout = subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True)\n"
        "assert out.stdout == b'42\\n', out",
        "passed",
        "",
    ),
}


def test_status(way):
    outcomes = way.run_together([code for code, _, _ in PROGRAMS.values()])
    for (name, (_, status, text)), outcome in zip(PROGRAMS.items(), outcomes, strict=True):
        assert outcome.status == status, (name, outcome)
        assert outcome.passed == (status == "passed"), (name, outcome)
        assert text in outcome.output, (name, outcome)
        assert 0 < outcome.seconds < 60, (name, outcome)


# Containment.


ENDLESS = [
    "while True: pass",
    "import time\ntime.sleep(600)",
    "import os\nos.close(1), os.close(2)\nwhile True: pass",
    "import signal\nfor i in range(1, 65):\n    try: signal.signal(i, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "import os, time\nwhile os.fork() == 0:  # orphan after orphan\n    if os.fork(): os._exit(0)\ntime.sleep(600)",
    "while True: print('x' * 1000)",
]


def test_endless_programs_are_ended(way):
    for code, outcome in zip(ENDLESS, way.run_together(ENDLESS, seconds=0.5), strict=True):
        assert (outcome.passed, outcome.status) == (False, "timed out")
        assert 0.5 <= outcome.seconds
        assert len(outcome.output) <= Limits().output_bytes + 100
        if outcome.seconds >= 4:
            way.run_quickly(code, 4, seconds=0.5)


def test_time_is_up_though_there_is_always_an_orphan_to_reap():
    """Which no program makes for sure, so that `waitpid` is a stand-in."""
    script = (
        "import os, runpy, sys\nsandbox = runpy.run_path(sys.argv[1])\nsandbox['_await_signals']()\n"
        "os.waitpid = lambda *_: (4711, 0)\nprint(sandbox['_status_in_time'](1, 0.1))"
    )
    command = [sys.executable, "-c", script, sandbox.__file__]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "None\n"


def test_a_fork_bomb_is_contained(way):
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert way.run_quickly(code, 4, seconds=0.5).status == "timed out"


def test_a_process_that_always_goes_on_in_its_child_is_caught(way):
    code = "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n    except OSError: pass"
    assert way.run_quickly(code, 4).status == "ended early"


def test_the_number_of_processes_is_limited(way):
    if "processes" not in way.isolation:
        pytest.skip("this system cannot limit the processes of one program")
    if not way.namespaces and way.user == os.geteuid() != 0:
        pytest.skip("without namespaces, what else this user runs counts too")
    code = (
        "import os, time\nmade = 0\nfor _ in range(300):\n    try:\n        if os.fork() == 0: time.sleep(600)\n"
        "        made += 1\n    except OSError: pass\nprint(made)"
    )
    assert 1 <= int(way.run(code, processes=8).output) <= 8


def test_a_daemon_does_not_outlive_the_program(way):
    code = (
        "import os, signal, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n        time.sleep(600)\n    os._exit(0)\nos.wait()\n"
    )
    assert way.run_quickly(code, 3).passed  # at once, and the fixture finds no process


def test_threads_left_running_do_not_hold_it_up(way):
    assert way.run("import threading, time\nthreading.Thread(target=time.sleep, args=[600]).start()").passed


def test_memory_is_limited(way):
    if "memory" not in way.isolation:
        pytest.skip("this system cannot limit memory")
    outcome = way.run("x = bytearray(10 * 1024**3)")
    assert outcome.status == "failed"
    assert "MemoryError" in outcome.output
    assert way.run("x = bytearray(200 * 1024**2)").passed
    assert not way.run("x = bytearray(200 * 1024**2)", memory_mib=128).passed


def test_a_file_is_limited(way):
    code = "with open('big', 'wb') as file:\n    for _ in range(100): file.write(bytes(2**20))"
    outcome = way.run(code)
    assert outcome.status == "failed"
    assert "File too large" in outcome.output or "No space left" in outcome.output
    assert way.run(code, file_mib=101).passed


def test_all_files_together_are_limited(way):
    code = "for i in range(40):\n    with open(str(i), 'wb') as file: file.write(bytes(2**20))"
    outcome = way.run(code)
    assert outcome.passed == ("disk space" not in way.isolation)
    if not outcome.passed:
        assert "No space left" in outcome.output
    code = "for i in range(2000): open(str(i), 'w').close()"
    assert way.run(code).passed == ("disk space" not in way.isolation)


def test_the_environment_holds_no_secret(way):
    outcome = way.run("import os\nprint(dict(os.environ))\nassert 'STM_SECRET' in os.environ")
    assert outcome.status == "failed"
    assert "PATH" in outcome.output
    assert SECRET not in outcome.output
    assert b"STM_SECRET" in Path(f"/proc/{way.process.pid}/environ").read_bytes() or sys.platform != "linux"


def test_other_processes_environments_cannot_be_read(way):
    if sys.platform != "linux":
        pytest.skip("/proc is Linux's")
    if "files" not in way.isolation and way.user != 0:
        pytest.skip("without namespaces, a user's processes can read each other")
    code = (
        "import glob\nfor path in glob.glob('/proc/*/environ'):\n    try: print(open(path, 'rb').read())\n"
        "    except OSError: pass"
    )
    outcome = way.run(code)
    assert outcome.passed
    assert SECRET not in outcome.output


def test_the_network_is_cut(way):
    if "network" not in way.isolation:
        pytest.skip("this system cannot cut the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = server.getsockname()
        code = f"import socket\nsocket.create_connection({address!r}, timeout=1).sendall(b'secret')"
        with socket.create_connection(address, timeout=60):
            server.accept()[0].close()  # so the server can be reached from outside
        outcome = way.run(code)
        assert outcome.status == "failed"
        assert "OSError" in outcome.output or "Error" in outcome.output.splitlines()[-2]
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_else_can_be_written_or_seen(way):
    if "files" not in way.isolation:
        pytest.skip("this system cannot hide its files")
    outside = way.base / "open-to-all"
    outside.write_text("here")
    way.base.chmod(0o777)
    outside.chmod(0o666)
    assert not way.run(f"print(open({str(outside)!r}).read())").passed
    code = (
        "import os\nfor folder, inner, _ in os.walk('/'):\n    if folder.startswith('/sandbox'): continue\n"
        "    if folder.count('/') > 3: inner.clear()\n    try: open(folder + '/stm-was-here', 'w').close()\n"
        "    except OSError: continue\n    print('wrote', folder)"
    )
    outcome = way.run(code)
    assert outcome.passed
    assert "wrote" not in outcome.output
    assert outside.read_text() == "here"


def test_privileges_are_gone(way):
    code = (
        "import os\nassert os.getuid() != 0 and os.getgid() != 0\n"
        "for call in (lambda: os.setuid(0), lambda: os.chroot('.'), lambda: os.setgroups([0])):\n"
        "    try: call()\n    except OSError: pass\n    else: assert False"
    )
    outcome = way.run(code)
    assert outcome.passed, outcome.output


def test_no_descriptor_is_inherited(way):
    code = (
        "import os\nfound = []\nfor i in range(4096):\n    try: os.fstat(i)\n    except OSError: continue\n"
        "    found.append(i)\nprint(found)"
    )
    found = json.loads(way.run(code).output)
    assert found[:3] == [0, 1, 2]
    assert len(found) == 4  # and the one that tells of its end


@pytest.mark.parametrize(
    "code",
    [
        "import os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)\nassert False",
        "import os\nos.mkdir('a')\nos.mkdir('a/b')\nopen('a/b/c', 'w').close()\nos.chmod('a/b', 0)\nos.chmod('a', 0)\n"
        "os.chmod('.', 0)\nassert False",
        "import os\nfor _ in range(1050):\n    try: os.mkdir('d')\n    except OSError: break\n"
        "    os.chdir('d')\nassert False",
        "import os\nos.chdir('/')\nassert False",
    ],
)
def test_the_folder_goes_whatever_happened_to_it(way, code):
    outcome = way.run(code)
    assert outcome.status == "failed"
    assert "AssertionError" in outcome.output


def test_a_link_in_the_folders_place_is_not_followed(way):
    victim = way.base / "victim"
    victim.mkdir(exist_ok=True)
    (victim / "kept").write_text("kept")
    for path in (victim, victim / "kept"):
        os.chown(path, way.user, -1)
    code = (
        "import os, shutil\nhome = os.environ['HOME']\nos.symlink({victim!r}, home + '/inner')\n"
        "try:\n    shutil.move(home, home + '-')\n    os.symlink({victim!r}, home)\n    shutil.rmtree(home + '-')\n"
        "except OSError: pass"
    )
    way.run(code.format(victim=str(victim)))
    assert (victim / "kept").read_text() == "kept"
    assert victim.stat().st_mode & 0o777 == 0o755


def test_others_processes_cannot_be_killed(way):
    if way.user == os.geteuid() != 0:
        pytest.skip("too dangerous, should it fail")
    outcome = way.run("import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\nos.kill(os.getppid(), 9)\nassert False")
    assert not outcome.passed
    assert way.process.poll() is None


SIGNALLING = {
    "kill": "os.kill(launcher, 9)",
    "kill of its group": "os.killpg(launcher, 9)",
    "tkill": "call(tkill, launcher, 9)",
    "tgkill": "call(tgkill, launcher, launcher, 9)",
    "rt_sigqueueinfo": "call(rt_sigqueueinfo, launcher, 9, information)",
    "rt_tgsigqueueinfo": "call(rt_tgsigqueueinfo, launcher, launcher, 9, information)",
    "pidfd_send_signal": "signal.pidfd_send_signal(os.pidfd_open(launcher), 9)",
    "prlimit": "resource.prlimit(launcher, resource.RLIMIT_NOFILE, (0, 0))",
    "fcntl": "own(told, launcher, 9)",
}


@pytest.mark.parametrize("how", SIGNALLING)
def test_a_program_cannot_kill_its_launcher_and_live_on(way, how):
    """And is ended with all that it started, which the fixture checks."""
    if sys.platform != "linux" or os.uname().machine not in sandbox._SYSCALLS:
        pytest.skip("the numbers of these calls are known on Linux, on two machines")
    code = """
import ctypes, errno, fcntl, os, resource, signal
tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo = {numbers}
information = (ctypes.c_int * 32)(0, 0, -1)
launcher = os.getppid()
tell, told = os.pipe()

def call(*arguments):
    if ctypes.CDLL(None, use_errno=True).syscall(*arguments):
        raise OSError(ctypes.get_errno(), "")

def own(descriptor, pid, number):
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, pid)
    fcntl.fcntl(descriptor, 10, number)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_ASYNC)

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        try:
            {signalling}
        except OSError as error:
            os.write(told, errno.errorcode[error.errno].encode())
        else:
            os.write(told, b"done")
        signal.pause()
    os._exit(0)
os.wait()
print(os.read(tell, 100))
"""
    outcome = way.run(code.format(numbers=sandbox._SYSCALLS[os.uname().machine][3][1:5], signalling=SIGNALLING[how]))
    if not way.namespaces:  # with them, its parent is the first process of its own, which no signal from there ends
        assert (outcome.passed, outcome.output) in [(True, "b'EACCES'\n"), (True, "b'EPERM'\n")]


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGCHLD", "SIGPIPE", "SIGSTOP"])
def test_a_signal_to_its_parent_changes_nothing(way, name):
    code = "import os, signal, time\ntry: os.kill(os.getppid(), signal.{})\nexcept OSError: pass\ntime.sleep(0.1)"
    if name == "SIGSTOP" and "processes" not in way.isolation:
        pytest.skip("this system cannot refuse it, so that its time is what ends it")
    assert way.run(code.format(name)).passed


def test_programs_end_with_the_evaluation(way):
    code = "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(600)"
    made = Way(way.process.args[0], None if way.user == os.geteuid() else way.user, way.namespaces)
    try:
        made.start([code], seconds=300)
        wait_until(lambda: len(made.leftovers()) >= 3)
        made.process.send_signal(signal.SIGKILL)
        wait_until(lambda: not made.leftovers())
    finally:
        made.close()


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


# As it is called.


def can_run() -> bool:
    try:
        return bool(isolation())
    except SandboxError:
        return False


needs_a_way = pytest.mark.skipif(os.name != "posix" or not can_run(), reason="no way to run contained code here")


@needs_a_way
def test_installed_packages_can_be_imported():
    outcome = run_code("import packaging.version\nprint(packaging.__file__)")
    assert outcome.passed, outcome.output


@needs_a_way
def test_from_several_threads():
    codes = [GOOD, "assert False", "while True: pass", "import os\nos._exit(0)", "open('x', 'w').write('y')"] * 3
    gc.collect()  # what tests before this one have left open
    before = (open_descriptors(), children())
    with ThreadPoolExecutor(5) as pool:
        outcomes = list(pool.map(lambda code: run_code(code, Limits(seconds=1 if "while" in code else 60)), codes))
    expected = ["passed", "failed", "timed out", "ended early", "passed"] * 3
    assert [outcome.status for outcome in outcomes] == expected
    assert (open_descriptors(), children()) == before


def open_descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def children() -> list[str]:
    """Children of this process, zombies too."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended; its children are another's
            found += path.read_text().split()
    return sorted(found)


@needs_a_way
def test_its_signals_are_those_of_a_new_python_whatever_they_are_here():
    code = (
        "import signal\nassert not signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "print({int(n): str(signal.getsignal(n)).split(' at ')[0] for n in sorted(signal.valid_signals())})\n"
        "try: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: print('interrupted')"
    )
    caller = (
        "import signal, sys\nfrom stm_plugin.sandbox import Limits, run_code\n"
        "for number in signal.valid_signals() - {9, 19}: signal.signal(number, signal.SIG_IGN)  # but KILL, STOP\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "print(run_code(sys.argv[1], Limits(seconds=60)).output, end='')"
    )
    printed = [
        subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120).stdout
        for arguments in ([code], [caller, code])
    ]
    assert printed[0].endswith("interrupted\n")
    assert printed[1] == printed[0]


@needs_a_way
def test_endless_output_takes_no_memory_and_its_end_is_kept():
    tracemalloc.start()
    try:
        outcome = run_code("print('x' * 50_000_000)\nprint('the end')", Limits(seconds=60, output_bytes=1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert outcome.passed
    assert len(outcome.output) == 1000
    assert outcome.output.endswith("x\nthe end\n")
    assert peak < 2_000_000


@needs_a_way
def test_runs_are_alike():
    code = "print({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"
    assert len({run_code(code).output for _ in range(3)}) == 1


@needs_a_way
def test_isolation_names_what_is_cut_and_what_is_not():
    names = isolation()
    assert {"time", "file size", "environment"} <= set(names)
    for name in ("memory", "processes", "network", "files", "disk space"):
        assert (name in names) != (f"not cut: {name}" in names)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1"])
@pytest.mark.parametrize("name", ["seconds", "memory_mib", "file_mib", "processes", "output_bytes"])
def test_limits_are_positive(name, value):
    with pytest.raises(ValueError, match=f"the limit {name} is .*; it must be a positive number"):
        Limits(**{name: value})


def test_where_there_is_no_way_it_says_so(monkeypatch):
    sandbox._probe.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_run", lambda *_: ("unavailable", (), "not here"))
        with pytest.raises(SandboxError, match="cannot run model-written code contained: not here"):
            run_code(GOOD)
        patch.setattr(os, "name", "nt")
        with pytest.raises(SandboxError, match="needs Linux or macOS; on Windows, run the evaluation in WSL"):
            run_code(GOOD)
    sandbox._probe.cache_clear()


def test_a_system_without_namespaces_is_told_apart():
    """The order of the ways: namespaces first, and never another way when they fail for one program."""
    calls = []

    def run(code, limits, namespaces, name="__main__"):
        calls.append(namespaces)
        return ("unavailable", (), "") if namespaces else ("passed", ("memory",), "")

    original, sandbox._run = sandbox._run, run
    sandbox._probe.cache_clear()
    try:
        assert "not cut: network" in isolation()
        assert run_code(GOOD).passed
    finally:
        sandbox._run = original
        sandbox._probe.cache_clear()
    assert calls == ([True, False, False] if sys.platform == "linux" else [False, False])
