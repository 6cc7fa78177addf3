"""Scores on disk: found as they were written, or refused; whole, or not there."""

import json
import os
import random
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_helpers import write

from stm_plugin.constants import SCORES_FORMAT_VERSION
from stm_plugin.scoring.store import MANIFEST, Draft, ScoresError, ScoresKey, ScoreStore, cache_home, default_root

KEY = ScoresKey(model="aa11", quantization="none", dtype="torch.float32", autocast="torch.bfloat16", data="bb22")
SHARD = "shard-000000000000.npy"
WRONG = r"^The scores in {} cannot be used: {}.* Delete that folder to have them made again, or set stm_scores_dir"


def some_scores(size=1000, seed=0):
    return np.random.default_rng(seed).exponential(size=size).astype(np.float32)


def visible(root):
    return [path.name for path in root.iterdir() if not path.name.startswith(".")]


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "scores")


@pytest.fixture
def entry(store):
    """A written entry."""
    return write(store, KEY, some_scores())


def refused(store, fault="", key=KEY, num_scores=1000):
    """Assert that reading an entry names its folder and the fault."""
    with pytest.raises(ScoresError, match=WRONG.format(store.path(key), fault)):
        store.read(key, num_scores)


@pytest.mark.parametrize("size", [0, 1, 7, 1000, 100_003])
def test_round_trip(store, size):
    scores = some_scores(size)
    path = write(store, KEY, scores)
    assert path == store.path(KEY) == store.root / KEY.name
    found = ScoreStore(store.root).read(KEY, size)
    assert found.dtype == np.float32
    assert found.tobytes() == scores.tobytes()
    found += 1  # a caller's own copy
    assert store.read(KEY, size).tobytes() == scores.tobytes()


def test_every_float_survives(store):
    scores = np.array([0.0, -0.0, np.inf, np.nan, 1e-45, 3.4e38, 0.1], dtype=np.float32)
    write(store, KEY, scores)
    assert store.read(KEY, 7).tobytes() == scores.tobytes()


def test_layout_on_disk(store, entry):
    """What another program, or a later version, may rely on."""
    assert sorted(path.name for path in entry.iterdir()) == [MANIFEST, SHARD]
    scores = np.load(entry / SHARD, allow_pickle=False)
    assert scores.dtype == np.dtype("<f4")
    assert (scores == some_scores()).all()
    manifest = json.loads((entry / MANIFEST).read_text())
    assert manifest["key"] == vars(KEY)
    assert manifest["num_scores"] == 1000
    assert visible(store.root) == [KEY.name]
    assert entry.stat().st_mode & 0o777 == 0o755  # others may read what one of them has made


def test_no_entry_is_none(store, entry):
    assert ScoreStore(store.root / "elsewhere").read(KEY, 1000) is None
    for name in vars(KEY):
        other = replace(KEY, **{name: 7 if name == "format_version" else "other"})
        assert store.read(other, 1000) is None


def test_each_part_of_the_key_names_another_folder():
    keys = [
        KEY,
        *(replace(KEY, **{name: 7 if name == "format_version" else "other"}) for name in vars(KEY)),
        ScoresKey(model="none", quantization="aa11", dtype="torch.float32", autocast="torch.bfloat16", data="bb22"),
    ]
    names = {key.name for key in keys}
    assert len(names) == len(keys)
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in names)
    assert KEY.name == "508174e51f2874c7835fbe584b38ad3a"  # pinned: another name would lose all that is stored


def test_writing_again_keeps_the_first(store, entry):
    before = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
    assert write(store, KEY, some_scores(seed=1)) == entry
    assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == before
    assert store.read(KEY, 1000).tobytes() == some_scores().tobytes()
    assert visible(store.root) == [KEY.name]


# Damage.


def test_every_bit_of_the_manifest_counts(store, entry):
    good = (entry / MANIFEST).read_bytes()
    for position in range(len(good)):
        for bit in range(8) if position % 5 == 0 else (position % 8,):
            damaged = bytearray(good)
            damaged[position] ^= 1 << bit
            (entry / MANIFEST).write_bytes(damaged)
            refused(store)
    (entry / MANIFEST).write_bytes(good)
    assert store.read(KEY, 1000) is not None


def test_bits_of_a_shard_count(store, entry):
    good = (entry / SHARD).read_bytes()
    rng = random.Random(0)
    for position in [*range(0, 128, 9), *rng.sample(range(len(good)), 200), len(good) - 1]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.randrange(8)
        (entry / SHARD).write_bytes(damaged)
        refused(store, f"{SHARD} has been altered, cut short")
    (entry / SHARD).write_bytes(good)
    assert store.read(KEY, 1000).tobytes() == some_scores().tobytes()


@pytest.mark.parametrize("name", [MANIFEST, SHARD])
def test_truncation_and_growth(store, entry, name):
    good = (entry / name).read_bytes()
    rng = random.Random(1)
    lengths = [0, 1, 2, 127, 128, 129, len(good) // 2, len(good) - 4, len(good) - 1, *rng.sample(range(len(good)), 40)]
    for length in lengths:
        if name == MANIFEST and good[length:].isspace():
            continue  # all but the last line feed is all there is to read
        (entry / name).write_bytes(good[:length])
        refused(store)
    (entry / name).write_bytes(good + b"\0\0\0\0")
    refused(store)


def test_swapped_scores_are_refused(store, entry):
    """A whole, valid shard of another entry."""
    other = write(store, replace(KEY, data="other"), some_scores(seed=1))
    (entry / SHARD).write_bytes((other / SHARD).read_bytes())
    refused(store, f"{SHARD} has been altered")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"7", b'"key"', b"{", b"\xff\xfe", b'{"key": null}', b'{"checksum": "", "key": []}'],
    ids=repr,
)
def test_no_manifest_at_all(store, entry, content):
    (entry / MANIFEST).write_bytes(content)
    refused(store, f"its {MANIFEST} is missing or damaged")


def test_missing_parts(store, entry):
    (entry / SHARD).unlink()
    refused(store, f"{SHARD} cannot be read")
    (entry / MANIFEST).unlink()
    refused(store, f"its {MANIFEST} is missing or damaged")
    entry.rmdir()
    assert store.read(KEY, 1000) is None
    entry.write_text("a file where the folder should be")
    refused(store, f"its {MANIFEST} is missing or damaged")


def forge(entry, change):
    """Change a manifest and give it the checksum that then holds."""
    from stm_plugin.scoring.store import _manifest_checksum

    manifest = json.loads((entry / MANIFEST).read_text())
    del manifest["checksum"]
    change(manifest)
    (entry / MANIFEST).write_text(json.dumps(manifest | {"checksum": _manifest_checksum(manifest)}))


def forge_shard(entry, content):
    """A shard with a content, and with the checksums that then hold."""
    from stm_plugin.scoring.store import _shard_checksum

    content += bytes(8)  # the token budget
    checksum = _shard_checksum(KEY, 0, content)
    (entry / SHARD).write_bytes(content + checksum)

    def change(manifest):
        manifest["shards"][0][2:] = [checksum.hex(), 0]

    forge(entry, change)


def test_a_changed_manifest_is_refused(store, entry):
    manifest = json.loads((entry / MANIFEST).read_text())
    manifest["unit"] = "bits"
    (entry / MANIFEST).write_text(json.dumps(manifest))
    refused(store, f"its {MANIFEST} has been altered")


def test_another_format_version_is_refused(store, entry):
    def change(manifest):
        manifest["key"]["format_version"] = SCORES_FORMAT_VERSION + 1

    forge(entry, change)
    refused(store, f"it has format version {SCORES_FORMAT_VERSION + 1}, this is {SCORES_FORMAT_VERSION}")


@pytest.mark.parametrize("name", ["model", "quantization", "autocast", "data"])
def test_an_entry_of_another_key_is_refused(store, entry, name):
    """A folder that was renamed or copied to where another key looks for it."""
    key = replace(KEY, **{name: "other"})
    entry.rename(store.path(key))
    refused(store, f"its {name} is '{getattr(KEY, name)}', expected 'other'", key=key)


@pytest.mark.parametrize("num_scores", [0, 999, 1001])
def test_another_count_is_refused(store, entry, num_scores):
    refused(store, f"it holds 1000 scores, the data has {num_scores} label tokens", num_scores=num_scores)


def test_shards_that_do_not_add_up_are_refused(store, entry):
    def drop(manifest):
        manifest["shards"] = []

    forge(entry, drop)
    refused(store, "its shards hold 0 scores, expected 1000")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x93NUMPY", b"PK\x05\x06" + bytes(18), b"PK\x03\x04", b"\0" * 4128],
    ids=["empty", "magic alone", "empty archive", "archive cut short", "zeros"],
)
def test_a_shard_that_is_no_array_is_refused(store, entry, content):
    """With the checksums to match, so that what reads the array has to tell."""
    forge_shard(entry, content)
    refused(store, SHARD)


def test_nothing_is_unpickled(store, entry, tmp_path):
    """A shard that is an object array, with the checksums to match, runs no code and yields no scores."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    np.save(entry / SHARD, np.array([Trap()] * 2, dtype=object), allow_pickle=True)
    forge_shard(entry, (entry / SHARD).read_bytes())
    with pytest.raises(ScoresError):
        store.read(KEY, 1000)
    assert not (tmp_path / "sprung").exists()


# Writing.


@contextmanager
def no_file_longer_than(num_bytes):
    """Let every write beyond a file size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "num_scores"),
    [(100, 1000), (128, 1000), (1000, 1000), (100_000, 100_000), (300, 10)],
    ids=["header", "first score", "a few scores", "many scores", "manifest"],
)
def test_a_write_that_fails_in_the_middle_leaves_nothing(store, limit, num_scores):
    store.root.mkdir()
    with no_file_longer_than(limit), pytest.raises(ScoresError, match=f"^Scores could not be written to {store.root}"):
        write(store, KEY, some_scores(num_scores))
    assert visible(store.root) == []
    assert store.read(KEY, num_scores) is None
    write(store, KEY, some_scores(num_scores))
    assert store.read(KEY, num_scores).tobytes() == some_scores(num_scores).tobytes()


@pytest.mark.parametrize("lost", [1, 4, 64, 128, 132, 4000, 4096])
def test_a_disk_that_is_full_for_the_last_bytes(store, lost):
    """NumPy's `tofile` ignores an error while it flushes its last block: the file is short, and nothing is raised."""
    store.root.mkdir()
    scores = some_scores(10_000)
    with (
        no_file_longer_than(128 + 4 * 10_000 - lost),
        pytest.raises(ScoresError, match=r"^Scores could not be written"),
    ):
        write(store, KEY, scores)
    assert visible(store.root) == []


def test_a_killed_writer_leaves_no_entry(tmp_path):
    """SIGXFSZ ends the process in the middle of the shard: no handler of ours runs."""
    script = (
        "import resource, signal, sys, numpy as np\n"
        "from stm_plugin.scoring.store import ScoreStore, ScoresKey\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "key = ScoresKey('aa11', 'none', 'torch.float32', 'torch.bfloat16', 'bb22')\n"
        "with ScoreStore(sys.argv[1]).writing(key, 1000, 4096) as draft:\n"
        "    draft.put(0, np.ones(1000, 'f4'))\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=root, capture_output=True)
    assert done.returncode < 0, done.stderr
    store = ScoreStore(tmp_path)
    assert list(tmp_path.iterdir()) != []  # a draft
    assert store.read(KEY, 1000) is None
    write(store, KEY, some_scores())
    assert store.read(KEY, 1000).tobytes() == some_scores().tobytes()


def test_a_root_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        store = ScoreStore(root)
        message = (
            rf"^Scores cannot be written to {root} \(.*\)\. Set stm_scores_dir \(or the environment variable STM_"
        )
        with pytest.raises(ScoresError, match=message):
            store.check_writable()
        with pytest.raises(ScoresError, match=message):
            write(store, KEY, some_scores())


def test_a_read_only_file_system():
    root = ScoreStore("/proc/stm-scores")  # even root cannot write there
    with pytest.raises(ScoresError, match=r"^Scores cannot be written to /proc/stm-scores "):
        root.check_writable()


def test_check_writable_makes_the_root_and_leaves_it_empty(tmp_path):
    store = ScoreStore(tmp_path / "a" / "b" / "scores")
    store.check_writable()
    assert list(store.root.iterdir()) == []


def test_a_file_where_the_entry_belongs(store):
    store.check_writable()
    store.path(KEY).write_text("not a folder")
    refused(store)
    with pytest.raises(ScoresError):
        write(store, KEY, some_scores())


def test_a_writer_that_fails_lets_go_of_the_entry(store, monkeypatch):
    """Also while its error, and with it all it was doing, is still held."""
    with monkeypatch.context() as failing:
        failing.setattr(Draft, "recover", lambda draft: 1 / 0)
        with pytest.raises(ZeroDivisionError) as held, store.writing(KEY, 1000, 4096):
            pass
    with ScoreStore(store.root).writing(KEY, 1000, 4096, patience=0) as draft:
        assert len(draft.scores) == 1000
    assert held.traceback


def test_many_writers_at_once(store):
    """All of them return the same whole entry, and no draft is left."""
    store.check_writable()
    barrier, failures = threading.Barrier(8), []

    def write_one(seed):
        try:
            barrier.wait()
            path = write(ScoreStore(store.root), KEY, some_scores(20_000, seed))
            assert path == store.path(KEY)
            assert store.read(KEY, 20_000) is not None
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write_one, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = store.read(KEY, 20_000).tobytes()
    assert found in [some_scores(20_000, seed).tobytes() for seed in range(8)]
    assert visible(store.root) == [KEY.name]


def test_writers_in_two_processes(store):
    script = (
        "import sys, numpy as np\n"
        "from stm_plugin.scoring.store import ScoreStore, ScoresKey\n"
        "scores = np.random.default_rng(int(sys.argv[2])).exponential(size=1000).astype(np.float32)\n"
        "sys.stdin.readline()\n"
        "key = ScoresKey('aa11', 'none', 'torch.float32', 'torch.bfloat16', 'bb22')\n"
        "store = ScoreStore(sys.argv[1])\n"
        "with store.writing(key, 1000, 4096) as draft:\n"
        "    if draft.missing:\n"
        "        draft.put(0, scores)\n"
        "    draft.finish()\n"
        "print(store.path(key))\n"
    )
    root = Path(__file__).resolve().parents[1]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, store.root, str(seed)],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (0, 1)
    ]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    paths = [writer.communicate()[0].strip() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert paths == [str(store.path(KEY))] * 2
    assert store.read(KEY, 1000).tobytes() in [some_scores(seed=seed).tobytes() for seed in (0, 1)]
    assert visible(store.root) == [KEY.name]


# Where.


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("STM_HOME", str(tmp_path / "home"))
    assert cache_home() == tmp_path / "home"
    assert default_root() == ScoreStore().root == ScoreStore(None).root == tmp_path / "home" / "scores"
    for unset in ("", None):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("STM_HOME") if unset is None else monkeypatch.setenv("STM_HOME", unset)
        assert default_root() == tmp_path / ".cache" / "stm_plugin" / "scores"
    monkeypatch.setenv("STM_HOME", "~/elsewhere")
    assert default_root() == tmp_path / "elsewhere" / "scores"
    assert ScoreStore("~/mine").root == tmp_path / "mine"
    assert ScoreStore(os.fspath(tmp_path)).root == tmp_path


def test_making_a_store_makes_no_folder(tmp_path):
    store = ScoreStore(tmp_path / "scores")
    assert store.read(KEY, 3) is None
    assert not store.root.exists()
