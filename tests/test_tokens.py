"""What token ids say: nothing that acts, and each token in its class."""

import unicodedata

import numpy as np
import pytest
from report_helpers import IGNORE

from stm_plugin.scoring.documents import Documents
from stm_plugin.tokens import TOKEN_CLASSES, token_classes, token_texts, visible


def test_texts_joined_are_the_text(tokenizer):
    text = "def add_numbers(a, b):\n\treturn a + b  # Paris, 12"
    ids = tokenizer(text)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == text
    assert token_texts(tokenizer, [tokenizer.eos_token_id]) == ["<|im_end|>"]


def test_tokens_that_are_no_whole_characters_read_as_bytes(tokenizer):
    ids = tokenizer("é🤗")["input_ids"]
    texts = "".join(token_texts(tokenizer, ids))
    assert texts == "<0xC3><0xA9><0xF0><0x9F><0xA4><0x97>"


def test_a_leading_space_stays():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    core = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("▁the", -1.0), ("b", -1.0)], 0, False)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert token_texts(tokenizer, [3, 4]) == [" the", "b"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain <b>", "plain <b>"),
        ("\x1b[2J\x00", "<U+001B>[2J<U+0000>"),
        ("a\u202eb\u200f", "a<U+202E>b<U+200F>"),
        ("\ud800", "<U+D800>"),
        ("\t\r\n", "→←⏎"),
        ("\u2028\u0085\ufeff", "<U+2028><U+0085><U+FEFF>"),
        ("مرحبا é 数", "مرحبا é 数"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_visible_leaves_nothing_that_acts():
    for code in [*range(0x3000), 0xD800, 0xDFFF, 0xFEFF, 0xFFF9, 0xE0001, 0x10FFFF]:
        for character in visible(chr(code), line_breaks=True).replace("⏎\n", ""):
            assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp"), hex(code)
    assert visible("a\nb", line_breaks=True) == "a⏎\nb"


def classes_of(*texts, stop=()):
    ids = np.arange(len(texts) + 1, dtype=np.int32)
    labels = ids.copy()
    labels[0] = IGNORE
    offsets = np.array([0, len(ids)])
    documents = Documents.of(ids, labels, offsets, offsets)
    found = token_classes(documents, dict(enumerate(["", *texts])), [1 + texts.index(text) for text in stop])
    return [TOKEN_CLASSES[index] for index in found]


def test_classes():
    texts = ["  ", "\n", " ,", "):", " 12", "7", " the", "é", "<|im_end|>", "<0xE2><0x80>", ""]
    assert classes_of(*texts, stop=["<|im_end|>"]) == [
        "whitespace",
        "whitespace",
        "punctuation",
        "punctuation",
        "digits",
        "digits",
        "words",
        "words",
        "stop tokens",
        "parts of characters",
        "whitespace",
    ]


def test_a_word_is_of_code_by_what_it_is_part_of():
    assert classes_of(" max", "_", "len", " of", " a", "1", " is", " print", "(", "x", ")", " in", "Camel", " =") == [
        "code identifiers",
        "punctuation",
        "code identifiers",
        "words",
        "code identifiers",
        "code identifiers",
        "words",
        "code identifiers",
        "punctuation",
        "words",
        "punctuation",
        "code identifiers",
        "code identifiers",
        "punctuation",
    ]


def test_words_do_not_run_on_into_the_next_document():
    rows = [[5, 1, 2], [5, 3, 4]]
    documents = Documents.from_rows(rows, rows)
    found = token_classes(documents, {5: "", 1: " the", 2: " end", 3: "(", 4: " of"}, [])
    assert [TOKEN_CLASSES[index] for index in found] == ["words", "words", "punctuation", "words"]
