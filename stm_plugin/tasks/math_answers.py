"""Whether a mathematical answer equals the reference, judged by math_verify in a process of its own.

math_verify interrupts itself by signals, which works in a main thread alone, takes the alarm of whoever has set one,
and stops no huge power. A process can be stopped whatever it does, and given limits.
"""

import atexit
import json
import re
import subprocess
import sys
from queue import Empty, Queue
from threading import Lock, Thread

_BOXES = re.compile(r"\\(?:boxed\s+([^\s${}\\]+)|(?:boxed|fbox)\s*\{)")

SECONDS = 20.0
"""Longest time for one answer; it counts as wrong then. math_verify gives up by itself after 5 s a step."""
_START_SECONDS = 60.0
_MEMORY_BYTES = 4 << 30


def same_answer(answer: str, solution: str) -> bool:
    r"""Whether an answer is mathematically equal to what is in the solution's last `\boxed{}`.

    Args:
        answer: A model's text, of which math_verify takes the final answer: a `\boxed{}`, or else the last formula or
            number.
        solution: The reference solution.

    Raises:
        ValueError: The solution has no `\boxed{}`.
        RuntimeError: math_verify cannot be started.
    """
    target = boxed(solution)
    if target is None:
        raise ValueError(rf"the solution has no \boxed{{}} answer: {solution[-200:]!r}")
    ours = boxed(answer)
    if ours is not None and ours.strip() == target.strip():
        return True
    return _judge.ask(answer, target)


def boxed(text: str) -> str | None:
    r"""What is in the last whole `\boxed{}` of a text, as MATH's solutions have it; None where there is none.

    Also in `\fbox{}`, and behind a `\boxed ` without braces up to the next space or `$`.
    """
    for found in reversed(list(_BOXES.finditer(text))):
        if found[1] is not None:
            return found[1].rstrip(".,;")
        depth = 0
        for place in range(found.end() - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[found.end() : place]
    return None


class _Judge:
    """The process that runs math_verify: started when first asked, again after one that had to be stopped."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.answers: Queue[str] = Queue()
        self.lock = Lock()

    def ask(self, answer: str, target: str) -> bool:
        """The verdict on one answer; False for one that takes too long or too much."""
        with self.lock:
            process = self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([answer, target]) + "\n")
                process.stdin.flush()
                verdict = self.answers.get(timeout=SECONDS)
            except (BrokenPipeError, Empty):
                verdict = ""
            if not verdict:
                self.stop()
            return verdict == "true"

    def _start(self) -> "subprocess.Popen[str]":
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.answers = Queue()
        # By its path, which needs no package to be found, and without its folder among those of modules (-P).
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        Thread(target=_read, args=(self.process, self.answers), daemon=True).start()
        try:
            ready = self.answers.get(timeout=_START_SECONDS)
        except Empty:
            ready = ""
        if ready != "ready":
            self.stop()
            raise RuntimeError(f"math_verify could not be started: run `{sys.executable} {__file__}` to see why.")
        return self.process

    def stop(self) -> None:
        """Stops the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _read(process: "subprocess.Popen[str]", answers: "Queue[str]") -> None:
    """Puts each line of a process's output, and an empty one at its end, into a queue."""
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line.strip())
    answers.put("")


_judge = _Judge()
atexit.register(_judge.stop)


def _serve() -> None:
    """The process's side: answers and targets in, one a line, verdicts out."""
    from math_verify import parse, verify

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (ImportError, ValueError):  # no such limits on this system, or lower ones already
        pass
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no verdict
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        answer, target = json.loads(line)
        try:
            verdict = bool(verify(parse(rf"\boxed{{{target}}}"), parse(answer)))
        except Exception:  # an answer that cannot be read is wrong, whatever sympy makes of it
            verdict = False
        out.write(f"{json.dumps(verdict)}\n")
        out.flush()


if __name__ == "__main__":
    _serve()
