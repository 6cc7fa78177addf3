"""Checks and tests, each in an environment of its own. `nox -l` lists them."""

import os
import shutil

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "pure", "trl", "axolotl-0.19"]

STACKS = ["1.9", "1.16"]
WITHOUT_TORCH = ["filelock>=3.12", "numpy>=1.26", "packaging>=23", "tqdm>=4.66", "xxhash>=3.4"]
TEST_TOOLS = ["hypothesis>=6.120", "pytest>=9", "pytest-timeout>=2.4", "pytest-xdist>=3.8", "pyyaml>=6"]
# One process a core, and no more than memory is likely to hold; the tests of a file share their fixtures.
PARALLEL = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"]


@nox.session(python="3.11")
def lint(session):
    """Ruff and mypy."""
    session.install(*WITHOUT_TORCH, "mypy>=2.4,<3", "ruff>=0.17,<0.18")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python=["3.11", "3.12", "3.13"])
def pure(session):
    """The tests that need neither torch nor a host."""
    session.install(*WITHOUT_TORCH, *TEST_TOOLS)
    session.install("--no-deps", ".")
    run_tests(session, *PARALLEL)


@nox.session(python="3.11")
@nox.parametrize("stack", STACKS, ids=STACKS)
def trl(session, stack):
    """All tests but the slow ones, against one TRL."""
    install_stack(session, stack)
    run_tests(session, "-m", "not slow", *PARALLEL)


@nox.session(python="3.11")
@nox.parametrize("stack", STACKS, ids=STACKS)
def slow(session, stack):
    """The tests that take minutes, against one TRL."""
    install_stack(session, stack)
    run_tests(session, "-m", "slow")


@nox.session(python="3.11", name="axolotl-0.19")
def axolotl_0_19(session):
    """The tests of Axolotl against 0.19 (3.6 GB); `-- -m slow` for those that take minutes."""
    test_axolotl(session, "0.19")


@nox.session(python="3.12", name="axolotl-0.21")
def axolotl_0_21(session):
    """The same against 0.21 (6.9 GB, so not among the default sessions)."""
    test_axolotl(session, "0.21")


@nox.session(python="3.11")
def benchmark(session):
    """Time and memory beside plain SFT, and scoring beside its floor."""
    install_stack(session, "1.16")
    session.run("python", "tests/benchmark.py", *session.posargs)


@nox.session(python="3.11", name="benchmark-axolotl")
def benchmark_axolotl(session):
    """The same for Axolotl 0.19."""
    install_axolotl(session, "0.19")
    session.run("python", "tests/benchmark.py", "--host", "axolotl", *session.posargs)


def test_axolotl(session, release):
    install_axolotl(session, release)
    run_tests(session, "-m", "not slow", "-k", "axolotl or example_configs", *PARALLEL)


def run_tests(session, *options):
    try:
        session.run("pytest", *options, *session.posargs)
    finally:
        if "REMOVE_ENVIRONMENTS" in os.environ:  # for a disk that does not hold all of them
            shutil.rmtree(session.virtualenv.location)


def install_axolotl(session, release):
    # as two steps: resolving both at once takes pip many times as long
    session.install(f"axolotl=={release}.0", "-c", f"constraints/axolotl-{release}.txt")
    session.install("-e", ".[demo,qlora,test]", "-c", f"constraints/axolotl-{release}.txt")


def install_stack(session, stack):
    session.install(
        "-c", f"constraints/trl-{stack}.txt", "-e", ".[deepspeed,demo,forgetting,qlora,test]", f"trl~={stack}.0"
    )
