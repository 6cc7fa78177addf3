"""Rows as documents, and masked labels back into a data set, whatever `datasets` did to it before."""

import hashlib
import re
import struct
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from stm_plugin.scoring.documents import Documents, with_columns


def random_rows(num_rows=11, seed=0, longest=9):
    """Rows of ids and labels (about a third of them off), some of them empty."""
    rng = np.random.default_rng(seed)
    input_ids = [rng.integers(0, 50_000, size).tolist() for size in rng.integers(0, longest + 1, num_rows)]
    labels = [[-100 if rng.random() < 0.35 else token for token in row] for row in input_ids]
    return input_ids, labels


def cut(rng, length):
    """Lengths of documents that fill a row, empty ones among them."""
    ends = np.sort(rng.integers(0, length + 1, rng.integers(0, 4)))
    return np.diff([0, *ends, length]).tolist()


# The oracles, row by row and document by document.


def naive_documents(input_ids, labels, seq_lengths=None):
    documents = []
    for row in range(len(input_ids)):
        start = 0
        for length in [len(input_ids[row])] if seq_lengths is None else seq_lengths[row]:
            if length:
                documents.append((input_ids[row][start : start + length], labels[row][start : start + length]))
            start += length
    return documents


def nothing(documents):
    return np.zeros(len(documents.input_ids), dtype=bool)


def naive_digest(documents):
    """DESIGN.md: 'SHA-256 over the sorted list of per-document SHA-256 hashes of (`input_ids`, final `labels`),

    int64 little-endian'.
    """
    hashes = []
    for input_ids, labels in documents:
        hashes.append(hashlib.sha256(struct.pack(f"<{2 * len(labels)}q", *input_ids, *labels)).digest())
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def naive_label_mask(documents):
    return [t > 0 and label != -100 for _, labels in documents for t, label in enumerate(labels)]


def check_against_oracle(documents, input_ids, labels, seq_lengths=None):
    expected = naive_documents(input_ids, labels, seq_lengths)
    offsets = documents.document_offsets.tolist()
    assert len(documents) == len(expected)
    assert [
        (documents.input_ids[start:end].tolist(), documents.labels[start:end].tolist())
        for start, end in pairwise(offsets)
    ] == expected
    assert np.diff(documents.row_offsets).tolist() == [len(row) for row in input_ids]
    for column in (documents.input_ids, documents.labels):
        assert column.dtype == (np.int16 if (np.abs(column) < 2**15).all() else np.int32)
    mask = naive_label_mask(expected)
    assert documents.label_mask.tolist() == mask
    flat = [label for _, row in expected for label in row]
    assert documents.label_ids.tolist() == [label for label, on in zip(flat, mask, strict=True) if on]
    assert documents.num_label_tokens == sum(mask)
    assert documents.tokens_per_document.tolist() == [
        sum(label != -100 for label in one_labels[1:]) for _, one_labels in expected
    ]
    assert documents.num_unscored_labels == sum(one_labels[0] != -100 for _, one_labels in expected)
    assert documents.digest(nothing(documents)) == naive_digest(expected)
    return expected


@pytest.mark.parametrize("seed", range(8))
def test_rows_without_segments_are_documents(seed):
    input_ids, labels = random_rows(seed=seed)
    check_against_oracle(Documents.from_rows(input_ids, labels), input_ids, labels)


@pytest.mark.parametrize("seed", range(8))
def test_segments_are_documents(seed):
    rng = np.random.default_rng(seed)
    input_ids, labels = random_rows(seed=seed)
    seq_lengths = [cut(rng, len(row)) for row in input_ids]
    check_against_oracle(Documents.from_rows(input_ids, labels, seq_lengths), input_ids, labels, seq_lengths)


def test_no_rows_and_empty_rows():
    for input_ids in ([], [[]], [[], []]):
        documents = Documents.from_rows(input_ids, input_ids)
        check_against_oracle(documents, input_ids, input_ids)
        assert len(documents) == documents.num_label_tokens == documents.num_unscored_labels == 0
    check_against_oracle(Documents.from_rows([[]], [[]], [[]]), [[]], [[]], [[]])
    check_against_oracle(Documents.from_rows([[]], [[]], [[0, 0]]), [[]], [[]], [[0, 0]])


def test_rows_may_be_arrays_of_any_integer_dtype():
    input_ids, labels = random_rows()
    for dtype in (np.int32, np.int64):
        documents = Documents.from_rows(
            [np.array(row, dtype=dtype) for row in input_ids], [np.array(row, dtype=dtype) for row in labels]
        )
        check_against_oracle(documents, input_ids, labels)


def test_label_mask_is_not_the_labels_alone():
    """Position 0 of every document in a pack is no label token; the label itself stays in `labels`."""
    documents = Documents.from_rows([[1, 2, 3, 4, 5]], [[1, 2, 3, -100, 5]], [[2, 3]])
    assert documents.label_mask.tolist() == [False, True, False, False, True]
    assert documents.labels.tolist() == [1, 2, 3, -100, 5]
    assert documents.num_unscored_labels == 2


def test_labels_need_not_be_the_token_ids():
    """A host may train another id than the one that is read next."""
    documents = Documents.from_rows([[1, 2, 3]], [[-100, 9, 3]])
    assert documents.label_ids.tolist() == [9, 3]


@pytest.mark.parametrize(
    ("labels", "seq_lengths", "message"),
    [
        (
            [[1, 2], [3]],
            None,
            "labels has 2 entries in row 0, where input_ids has 3 (2 such rows). Give one label per",
        ),
        ([[1, 2, 3], [4, 5, 6]], None, "labels has 3 entries in row 1, where input_ids has 2 (1 such rows)."),
        ([[1, 2, 3]], None, "labels has 1 rows, input_ids has 2."),
        (
            [[1, 2, 3], [4, 5]],
            [[3], [1]],
            "seq_lengths (summed) has 1 entries in row 1, where input_ids has 2 (1 such",
        ),
        ([[1, 2, 3], [4, 5]], [[2, 1, 1], [2]], "seq_lengths (summed) has 4 entries in row 0, where input_ids has 3"),
        ([[1, 2, 3], [4, 5]], [[3]], "seq_lengths (summed) has 1 rows, input_ids has 2."),
    ],
)
def test_lengths_that_differ_are_refused(labels, seq_lengths, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Documents.from_rows([[1, 2, 3], [4, 5]], labels, seq_lengths)


def test_a_negative_segment_is_refused():
    """5 - 2 = 3 adds up, but would leave a document of 5 tokens in a row of 3."""
    with pytest.raises(ValueError, match="seq_lengths"):
        Documents.from_rows([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]], [[5, -2], [2]])


def test_content_hashes_tell_documents_apart():
    def hashes(*documents):
        return [tuple(one) for one in Documents.from_rows(*zip(*documents, strict=True)).content_hashes().tolist()]

    base = ([1, 2, 3], [-100, 2, 3])
    same = ([1, 2, 3], [1, 2, 3])  # position 0 has no score, so its label does not matter
    others = [
        ([1, 2, 4], [-100, 2, 3]),  # another token id under the same labels
        ([1, 2, 3], [-100, -100, 3]),
        ([1, 2, 3], [-100, 2, 4]),
        ([1, 2, 3, 4], [-100, 2, 3, -100]),
        ([2, 1, 3], [-100, 2, 3]),
        ([1, 2], [-100, 2]),
    ]
    found = hashes(base, same, *others)
    assert found[0] == found[1]
    assert len(set(found)) == 1 + len(others)
    assert hashes(*others[::-1]) == found[2:][::-1]


def test_rows_with_counts_flags_of_each_row():
    input_ids, labels = random_rows(seed=3)
    documents = Documents.from_rows(input_ids, labels)
    flags = np.random.default_rng(0).random(len(documents.input_ids)) < 0.4
    parts = np.split(flags, np.cumsum([len(row) for row in input_ids])[:-1])
    assert documents.rows_with(flags).tolist() == [int(part.sum()) for part in parts]


# The digest.


def test_digest_is_pinned():
    """It stands in receipts and must be the same in every version, on every host."""
    documents = Documents.from_rows([[1, 2, 3], [4, 5]], [[-100, 2, -100], [4, 5]])
    expected = naive_digest([([1, 2, 3], [-100, 2, -100]), ([4, 5], [4, 5])])
    assert documents.digest(nothing(documents)) == expected
    assert expected == "2bb8e51a7f7f4c5de3025a423aa2a5795fbcc3b3a427309115c95664bf6b4464"


def test_digest_depends_on_documents_alone():
    rng = np.random.default_rng(5)
    input_ids, labels = random_rows(num_rows=9, seed=5)
    plain = Documents.from_rows(input_ids, labels)
    digest = plain.digest(nothing(plain))
    order = rng.permutation(9)
    shuffled = Documents.from_rows([input_ids[i] for i in order], [labels[i] for i in order])
    assert shuffled.digest(nothing(shuffled)) == digest
    packs = [order[:4], order[4:6], order[6:]]
    packed = Documents.from_rows(
        [[token for i in pack for token in input_ids[i]] for pack in packs],
        [[label for i in pack for label in labels[i]] for pack in packs],
        [[len(input_ids[i]) for i in pack] for pack in packs],
    )
    assert packed.digest(nothing(packed)) == digest
    wrapped = Documents.from_rows([[*chain(*input_ids)]], [[*chain(*labels)]])
    assert wrapped.digest(nothing(wrapped)) != digest  # another context


def test_digest_sees_every_id_every_label_and_every_repetition():
    input_ids, labels = random_rows(num_rows=4, seed=1, longest=5)
    documents = Documents.from_rows(input_ids, labels)
    seen = {documents.digest(nothing(documents))}
    for position in range(len(documents.labels)):
        row = int(np.searchsorted(documents.row_offsets, position, side="right")) - 1
        token = position - documents.row_offsets[row]
        if labels[row][token] == -100:
            more = [list(row) for row in labels]
            more[row][token] = input_ids[row][token]
            other = Documents.from_rows(input_ids, more)
            seen.add(other.digest(nothing(other)))
        else:
            seen.add(documents.digest(np.arange(len(documents.labels)) == position))
        ids = [list(row) for row in input_ids]
        ids[row][token] += 1
        other = Documents.from_rows(ids, labels)
        seen.add(other.digest(nothing(other)))
    twice = Documents.from_rows([*input_ids, input_ids[-1]], [*labels, labels[-1]])
    seen.add(twice.digest(nothing(twice)))
    assert len(seen) == 2 * len(documents.labels) + 2


# Data sets.


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.fixture
def make_dataset(datasets):
    """A data set of random rows with columns that STM has no business with."""

    def make(num_rows=11, seed=0, packed=False, **columns):
        input_ids, labels = random_rows(num_rows, seed)
        rng = np.random.default_rng(seed + 100)
        columns = {"name": [f"row {i}" for i in range(num_rows)], "input_ids": input_ids, "labels": labels} | columns
        columns["weights"] = [rng.random(2).tolist() for _ in range(num_rows)]
        if packed:
            columns["seq_lengths"] = [cut(rng, len(row)) for row in input_ids]
        return datasets.Dataset.from_dict(columns)

    return make


VIEWS = {
    "as it is": lambda ds: ds,
    "a slice": lambda ds: ds.select(range(3, 9)),
    "filter": lambda ds: ds.filter(lambda row: len(row["input_ids"]) % 2 == 1),
    "some rows, repeated": lambda ds: ds.select([5, 2, 2, 9, 0, 5, 5]),
    "reversed": lambda ds: ds.select(range(len(ds) - 1, -1, -1)),
    "shuffle": lambda ds: ds.shuffle(seed=1),
    "shuffle twice": lambda ds: ds.shuffle(seed=1).select([1, 2, 3, 4, 8]).shuffle(seed=2),
    "shard": lambda ds: ds.shard(num_shards=3, index=1),
    "shard, not contiguous": lambda ds: ds.shard(num_shards=3, index=1, contiguous=False),
    "sort": lambda ds: ds.sort("name", reverse=True),
    "split": lambda ds: ds.train_test_split(test_size=4, seed=3)["train"],
    "concatenated": lambda ds: _concatenated(ds),
    "one row": lambda ds: ds.select([7]),
    "skip and take": lambda ds: ds.skip(2).take(5),
    "other columns gone": lambda ds: ds.remove_columns(["name", "weights"]),
    "renamed": lambda ds: ds.rename_column("name", "label_name").shuffle(seed=0),
}


def _concatenated(ds):
    import datasets

    return datasets.concatenate_datasets([ds.select([4, 1]), ds.shuffle(seed=4), ds.select(range(2, 5))])


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("view", VIEWS)
def test_reads_the_rows_that_the_data_set_shows(make_dataset, view, packed):
    dataset = VIEWS[view](make_dataset(packed=packed))
    rows = dataset.to_list()
    documents = Documents.from_dataset(dataset)
    columns = [[row[name] for row in rows] for name in ("input_ids", "labels")]
    check_against_oracle(documents, *columns, [row["seq_lengths"] for row in rows] if packed else None)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("view", VIEWS)
def test_writes_the_rows_that_the_data_set_shows(make_dataset, view, packed):
    dataset = VIEWS[view](make_dataset(packed=packed))
    before = dataset.to_list()
    documents = Documents.from_dataset(dataset)
    new_labels = np.where(documents.input_ids % 3 == 0, np.int32(-100), documents.input_ids + 1)
    counts = np.array([sum(row["input_ids"]) for row in before])
    masked = with_columns(dataset, documents, new_labels, num_masked=counts)
    assert masked.to_list() == [
        row
        | {
            "labels": [-100 if token % 3 == 0 else token + 1 for token in row["input_ids"]],
            "num_masked": sum(row["input_ids"]),
        }
        for row in before
    ]
    assert dataset.to_list() == before
    assert list(masked.features) == [*[name for name in dataset.features if name != "labels"], "labels", "num_masked"]
    assert {name: masked.features[name] for name in dataset.features} == dict(dataset.features)
    assert Documents.from_dataset(masked).labels.tolist() == new_labels.tolist()
    assert masked._fingerprint != dataset._fingerprint


def test_masked_rows_can_be_worked_on_further(make_dataset):
    dataset = make_dataset().shuffle(seed=3).select(range(8))
    documents = Documents.from_dataset(dataset)
    masked = with_columns(dataset, documents, documents.input_ids, num_masked=np.arange(8))
    assert masked.shuffle(seed=0).sort("num_masked")["num_masked"][:] == list(range(8))
    assert masked.filter(lambda row: row["num_masked"] > 5)["name"][:] == dataset["name"][6:]
    assert masked.map(lambda row: {"twice": 2 * row["num_masked"]})["twice"][:] == [2 * i for i in range(8)]
    again = with_columns(masked, documents, documents.labels, num_masked=np.arange(8) * 10)
    assert again["num_masked"][:] == [10 * i for i in range(8)]
    assert again["labels"][:] == dataset["labels"][:]


def test_two_masks_of_one_data_set_have_two_fingerprints(make_dataset):
    """Else `map` on the second would find the cache of the first."""
    dataset = make_dataset()
    documents = Documents.from_dataset(dataset)
    fingerprints = {
        with_columns(dataset, documents, labels, num_masked=np.zeros(11, dtype=np.int64))._fingerprint
        for labels in (documents.labels, documents.input_ids, -documents.input_ids)
    }
    assert len(fingerprints) == 3


def test_without_labels_every_token_is_a_label(make_dataset):
    dataset = make_dataset().remove_columns("labels").select([3, 1, 4])
    documents = Documents.from_dataset(dataset)
    assert documents.labels.tolist() == documents.input_ids.tolist()
    masked = with_columns(dataset, documents, -documents.labels)
    assert masked["labels"][:] == [[-token for token in row] for row in dataset["input_ids"]]
    assert masked.features["labels"] == dataset.features["input_ids"]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
@pytest.mark.parametrize("columns", [None, ["input_ids"], ["input_ids", "labels"], ["name"]], ids=str)
@pytest.mark.parametrize("output_all_columns", [False, True])
def test_an_output_format_stays(make_dataset, kind, columns, output_all_columns):
    pytest.importorskip(kind if kind != "arrow" else "pyarrow", reason=f"{kind} is not installed")
    plain = make_dataset(seed=2).shuffle(seed=2)
    dataset = plain.with_format(kind, columns=columns, output_all_columns=output_all_columns)
    documents = Documents.from_dataset(dataset)
    check_against_oracle(documents, plain["input_ids"][:], plain["labels"][:])
    new_labels = documents.input_ids + 5
    masked = with_columns(dataset, documents, new_labels, num_masked=np.arange(11))
    assert masked.format["type"] == dataset.format["type"]
    assert masked.format["output_all_columns"] == output_all_columns
    shown = {"labels", "num_masked"} | set(columns or dataset.column_names)
    assert set(masked.format["columns"]) == shown
    assert dataset.format["columns"] == (columns or plain.column_names)
    if kind in ("torch", "numpy"):
        assert set(masked[4]) == (shown if not output_all_columns else {*plain.column_names, "num_masked"})
        assert type(masked[4]["labels"]) is type(dataset.with_format(kind)[4]["input_ids"])
        assert masked[4]["labels"].dtype == dataset.with_format(kind)[4]["labels"].dtype
    unformatted = masked.with_format(None)
    assert unformatted["labels"][:] == [[token + 5 for token in row] for row in plain["input_ids"]]
    assert unformatted["name"][:] == plain["name"][:]
    assert unformatted["num_masked"][:] == list(range(11))


def test_format_arguments_stay(make_dataset):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dataset = make_dataset().with_format("torch", dtype=torch.int16, columns=["input_ids", "labels"])
    documents = Documents.from_dataset(dataset)
    masked = with_columns(dataset, documents, documents.labels)
    assert masked[0]["labels"].dtype == torch.int16


@pytest.mark.parametrize("id_type", ["int16", "int32", "int64", "uint16", "uint32"])
@pytest.mark.parametrize("list_kind", ["list", "large list"])
@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "no labels"])
def test_list_types(datasets, id_type, list_kind, with_labels):
    kind = datasets.LargeList if list_kind == "large list" else datasets.List
    rng = np.random.default_rng(0)
    rows = {"input_ids": [rng.integers(0, 30_000, size).tolist() for size in (4, 0, 3, 7, 1)]}
    features = {"input_ids": kind(datasets.Value(id_type))}
    if with_labels:
        rows["labels"] = [[-100, *row[1:]] if row else [] for row in rows["input_ids"]]
        features["labels"] = kind(datasets.Value(id_type.removeprefix("u")))
    if with_labels and id_type == "uint16":
        features["labels"] = kind(datasets.Value("int32"))
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features)).select([3, 1, 0, 4])
    documents = Documents.from_dataset(dataset)
    check_against_oracle(documents, dataset["input_ids"][:], dataset[[*features][-1]][:])
    masked = with_columns(dataset, documents, np.where(documents.label_mask, np.int32(-100), documents.labels))
    assert masked["labels"][:] == [[*row[:1], *[-100] * (len(row) - 1)] for row in dataset[[*features][-1]]]
    if with_labels:
        assert masked.features == dataset.features


@pytest.mark.parametrize("view", ["all rows", "some rows"])
def test_rows_of_one_fixed_length(datasets, view):
    rows = np.arange(24).reshape(6, 4).tolist()
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=4)})
    dataset = datasets.Dataset.from_dict({"input_ids": rows}, features=features)
    if view == "some rows":
        dataset = dataset.select([4, 0, 1])
    documents = Documents.from_dataset(dataset)
    masked = with_columns(dataset, documents, -documents.labels)
    assert masked["labels"][:] == [[-token for token in row] for row in dataset["input_ids"]]


def test_segments_of_other_integer_types(datasets):
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "seq_lengths": datasets.LargeList(datasets.Value("uint8")),
        }
    )
    dataset = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4, 5], []], "seq_lengths": [[1, 0, 2], [2], []]}, features=features
    )
    check_against_oracle(
        Documents.from_dataset(dataset), dataset["input_ids"][:], dataset["input_ids"][:], dataset["seq_lengths"][:]
    )


def test_many_reads(datasets, monkeypatch):
    """More rows than one read takes, so that a mistake between reads shows."""
    import stm_plugin.scoring.documents

    monkeypatch.setattr(stm_plugin.scoring.documents, "_ROWS_PER_READ", 3)
    input_ids, labels = random_rows(20, seed=9)
    dataset = datasets.Dataset.from_dict({"input_ids": input_ids, "labels": labels})
    check_against_oracle(Documents.from_dataset(dataset), input_ids, labels)
    check_against_oracle(Documents.from_dataset(dataset.select(range(19, -1, -1))), input_ids[::-1], labels[::-1])
    chunked = datasets.concatenate_datasets([dataset.select([i]) for i in range(20)])
    check_against_oracle(Documents.from_dataset(chunked), input_ids, labels)


def test_no_rows(make_dataset):
    for dataset in (make_dataset(0), make_dataset().filter(lambda row: False)):
        documents = Documents.from_dataset(dataset)
        assert len(documents) == 0
        assert documents.row_offsets.tolist() == [0]


# Data on the disk.


def files_below(folder: Path):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("view", ["as it is", "shuffle", "some rows, repeated"])
def test_a_loaded_data_set_gets_no_cache_file(make_dataset, datasets, tmp_path, view, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # the real one is others' too
    folder = tmp_path / "prepared"
    VIEWS[view](make_dataset()).save_to_disk(folder)
    dataset = datasets.load_from_disk(folder)
    before, cache_before = files_below(folder), files_below(Path(datasets.config.HF_DATASETS_CACHE))
    documents = Documents.from_dataset(dataset)
    masked = with_columns(dataset, documents, documents.input_ids + 7, num_masked=np.arange(len(dataset)))
    assert masked["labels"][:] == [[token + 7 for token in row] for row in dataset["input_ids"]]
    assert files_below(folder) == before
    assert files_below(Path(datasets.config.HF_DATASETS_CACHE)) == cache_before
    assert datasets.load_from_disk(folder).to_list() == dataset.to_list()
    masked.save_to_disk(tmp_path / "masked")
    assert datasets.load_from_disk(tmp_path / "masked").to_list() == masked.to_list()


def test_a_loaded_data_set_is_never_masked_from_an_old_cache(make_dataset, datasets, tmp_path):
    """Other labels for the same rows: what a map cache keyed by the rows alone would mix up."""
    make_dataset().save_to_disk(tmp_path / "prepared")
    for shift in (1, 2, 3):
        dataset = datasets.load_from_disk(tmp_path / "prepared")
        documents = Documents.from_dataset(dataset)
        masked = with_columns(dataset, documents, documents.input_ids + shift)
        assert masked["labels"][:] == [[token + shift for token in row] for row in dataset["input_ids"]]


# What is refused.


def test_rows_without_ids_are_refused(datasets):
    dataset = datasets.Dataset.from_dict({"text": ["a"], "labels": [[1]]})
    message = "STM needs tokenized rows with an 'input_ids' column before training starts; this data set has ['text', "
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Documents.from_dataset(dataset)


def test_a_transform_is_refused(make_dataset):
    dataset = make_dataset()
    for transformed in (
        dataset.with_transform(lambda batch: batch),
        dataset.with_transform(lambda batch: batch, columns=["input_ids"]),
    ):
        with pytest.raises(ValueError, match=r"^STM cannot mask a data set with a transform .* Dataset\.map"):
            Documents.from_dataset(transformed)
    assert len(Documents.from_dataset(dataset.with_transform(lambda batch: batch).with_format(None))) > 0


@pytest.mark.parametrize("column", ["input_ids", "labels", "seq_lengths"])
@pytest.mark.parametrize("value", [None, [None, 2, 3], [1, 2, None]], ids=str)
def test_missing_values_are_refused(datasets, column, value):
    columns = {
        "input_ids": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "labels": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "seq_lengths": [[1, 1, 1], [1, 1, 1], [3]],
    }
    columns[column][1] = value
    with pytest.raises(ValueError, match=f"^Column '{column}' has missing values "):
        Documents.from_dataset(datasets.Dataset.from_dict(columns))


def test_missing_values_in_rows_that_are_not_shown_do_not_matter(datasets):
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2], None, [3, 4]], "labels": [[1, 2], [1], [3, 4]]})
    documents = Documents.from_dataset(dataset.select([2, 0]))
    assert documents.input_ids.tolist() == [3, 4, 1, 2]
    masked = with_columns(dataset.select([2, 0]), documents, -documents.labels)
    assert masked["labels"][:] == [[-3, -4], [-1, -2]]


def test_labels_of_other_length_are_refused(make_dataset):
    input_ids, labels = random_rows(11)
    labels[4] = [*labels[4], 5]
    message = f"labels has {len(labels[4])} entries in row 4, where input_ids has {len(input_ids[4])} (1 such rows)."
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Documents.from_dataset(make_dataset(labels=labels))


def test_segments_of_other_length_are_refused(make_dataset):
    dataset = make_dataset(packed=True).map(lambda row, i: {"seq_lengths": [*row["seq_lengths"], int(i == 6)]}, True)
    with pytest.raises(ValueError, match=r"^seq_lengths \(summed\) has \d entries in row 6"):
        Documents.from_dataset(dataset)


def test_ids_that_are_no_integers_are_refused(datasets):
    for column in ("input_ids", "labels"):
        columns = {"input_ids": [[1, 2]], "labels": [[1, 2]]} | {column: [[1.5, 2.5]]}
        with pytest.raises(ValueError, match=column):
            Documents.from_dataset(datasets.Dataset.from_dict(columns))


# --- Positions and batches ------------------------------------------------------------------------------------------


def test_positions_that_jump_are_refused():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = {"input_ids": [[1, 2, 3], [4, 5]], "position_ids": [[0, 1, 2], [0, 1]]}
    Documents.from_dataset(datasets.Dataset.from_dict(rows))
    for positions in ([[0, 1, 7], [0, 1]], [[0, 1, 2], [3, 5]], [[0, 0, 1], [0, 1]]):
        with pytest.raises(ValueError, match="do not count up by one"):
            Documents.from_dataset(datasets.Dataset.from_dict(rows | {"position_ids": positions}))
    packed = {"input_ids": [[1, 2, 3, 4]], "seq_lengths": [[1, 3]], "position_ids": [[0, 0, 1, 2]]}
    assert len(Documents.from_dataset(datasets.Dataset.from_dict(packed))) == 2


def test_a_padded_batch_is_cut_into_its_rows():
    ids = np.array([[0, 5, 6], [7, 8, 0]])
    documents, where = Documents.from_batch(ids, ids, np.array([[0, 1, 1], [1, 1, 0]]))
    assert documents.input_ids.tolist() == [5, 6, 7, 8]
    assert documents.document_offsets.tolist() == [0, 2, 4]
    assert where.tolist() == [1, 2, 3, 4]


def test_padding_between_tokens_is_refused_unless_positions_say_what_it_parts():
    ids, mask = np.array([[5, 6, 0, 7], [5, 6, 7, 8]]), np.array([[1, 1, 0, 1], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding between its tokens and no position_ids"):
        Documents.from_batch(ids, ids, mask)
    documents, _ = Documents.from_batch(ids, ids, mask, np.array([[0, 1, 0, 0], [0, 1, 2, 3]]))
    assert documents.document_offsets.tolist() == [0, 2, 3, 7]


def test_a_packed_batch_is_cut_where_positions_start_anew():
    ids = np.arange(6)[None]
    documents, where = Documents.from_batch(ids, ids, None, np.array([[0, 1, 2, 0, 0, 1]]))
    assert documents.document_offsets.tolist() == [0, 3, 4, 6]
    assert where.tolist() == [0, 1, 2, 3, 4, 5]
    numbered, _ = Documents.from_batch(ids, ids, np.array([[1, 1, 1, 2, 3, 0]]), np.arange(6)[None])
    assert numbered.document_offsets.tolist() == [0, 3, 4, 5]
    with pytest.raises(ValueError, match="do not count up by one"):
        Documents.from_batch(ids, ids, None, np.array([[0, 1, 2, 5, 6, 7]]))


def test_parts_are_joined_with_their_bounds():
    parts = [Documents.from_rows([[1, 2], [3]], [[1, 2], [3]]), Documents.from_rows([[4, 5]], [[-100, 5]], [[1, 1]])]
    joined = Documents.concatenate(parts)
    assert joined.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert joined.labels.tolist() == [1, 2, 3, -100, 5]
    assert joined.document_offsets.tolist() == [0, 2, 3, 4, 5]
    assert joined.row_offsets.tolist() == [0, 2, 3, 5]
