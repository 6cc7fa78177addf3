"""What token ids say, as text that a person can read and a terminal or a page can show."""

import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from .scoring.documents import Documents

TOKEN_CLASSES = (
    "whitespace",
    "punctuation",
    "digits",
    "words",
    "code identifiers",
    "stop tokens",
    "parts of characters",
)
"""The classes that `token_classes` counts in, by their number."""

_WHITESPACE, _PUNCTUATION, _DIGITS, _WORDS, _IDENTIFIERS, _STOP, _PARTS = range(len(TOKEN_CLASSES))
_BYTES = re.compile(r"[ -~]?(<0x[0-9A-F]{2}>)+")
_NAME = re.compile(r"[^\W\d]\w*")
_NAME_OF_CODE = re.compile(r"_|\d|[a-z][A-Z]")
_BYTE_LETTERS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_LETTER = {chr(byte): byte for byte in _BYTE_LETTERS} | {
    chr(0x100 + index): byte for index, byte in enumerate(sorted({*range(256)} - {*_BYTE_LETTERS}))
}
"""How byte-level BPE writes bytes (OpenAI's `bytes_to_unicode`, backwards)."""


def token_texts(tokenizer: Any, token_ids: Iterable[int]) -> list[str]:
    """The text that each token adds to what stands before it.

    A token that is no whole characters reads as its bytes, such as `<0xE2><0x80>` (after a space, ` <0xE2>`).

    Args:
        tokenizer: A tokenizer of transformers.
        token_ids: Ids, of its vocabulary.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # the first token of a text may lose its space
    before = _decode(tokenizer, anchor)
    texts = []
    for token_id in token_ids:
        text = _decode(tokenizer, [*anchor, token_id])
        text = text[len(before) :] if text.startswith(before) else _decode(tokenizer, [token_id])
        if "\N{REPLACEMENT CHARACTER}" in text or not text:
            text = _written_as_bytes(tokenizer.convert_ids_to_tokens(token_id), text)
        texts.append(text)
    return texts


def visible(text: str, *, line_breaks: bool = False) -> str:
    """Text without anything that acts rather than shows.

    Control and formatting characters (escape codes, NUL, marks of writing direction), separators, lone surrogates and
    unassigned ones become `<U+202E>`; tabs and line breaks become `→`, `⏎` and `←`.

    Args:
        text: Any text.
        line_breaks: Whether a line break also breaks the line, after its sign.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_sign(character, line_breaks) for character in text)


def _sign(character: str, line_breaks: bool) -> str:
    if character == "\n":
        return "⏎\n" if line_breaks else "⏎"
    if character in _SIGNS:
        return _SIGNS[character]
    acts = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
    return f"<U+{ord(character):04X}>" if acts else character


_SIGNS = {"\t": "→", "\r": "←"}


def token_classes(documents: Documents, text_of: dict[int, str], stop_token_ids: Iterable[int]) -> np.ndarray:
    """The class of each label token, as an index of `TOKEN_CLASSES`.

    A token belongs to the word that it lies in, and that word is a code identifier if it has an underscore, a digit
    after a letter or a capital after a small letter, or stands directly before `(` or `[`.

    Args:
        documents: A data set's documents.
        text_of: Text of each token id that occurs.
        stop_token_ids: Ids that end a turn or a text.

    Returns:
        Shape `(N,)`, uint8.
    """
    ids, inverse = np.unique(documents.input_ids, return_inverse=True)
    texts = [text_of[token_id] for token_id in ids.tolist()]
    class_of_id = np.array([_class_of(text) for text in texts], dtype=np.uint8)
    class_of_id[np.isin(ids, list(stop_token_ids))] = _STOP
    classes = class_of_id[inverse]
    lengths = np.array([len(text) for text in texts], dtype=np.int64)[inverse]
    first_letter = np.array([_first_letter(text) for text in texts], dtype=np.int64)[inverse]
    for start, end in pairwise(documents.document_offsets.tolist()):
        text = "".join([texts[index] for index in inverse[start:end].tolist()])
        in_code = np.zeros(len(text) + 1, dtype=bool)
        for match in _NAME.finditer(text):
            if text[match.end() : match.end() + 1] in ("(", "[") or _NAME_OF_CODE.search(match[0]):
                in_code[match.start() : match.end()] = True
        begins = np.cumsum(lengths[start:end]) - lengths[start:end] + first_letter[start:end]
        here = classes[start:end]
        here[in_code[np.minimum(begins, len(text))] & np.isin(here, (_WORDS, _DIGITS))] = _IDENTIFIERS
    return classes[documents.label_mask]


def _class_of(text: str) -> int:
    """The class of a token by its own text."""
    if _BYTES.fullmatch(text):
        return _PARTS
    if not text or text.isspace():
        return _WHITESPACE
    letters = [character for character in text if character.isalnum() or character == "_"]
    if not any(character.isalnum() for character in letters):
        return _PUNCTUATION
    return _DIGITS if all(character.isdigit() for character in letters) else _WORDS


def _first_letter(text: str) -> int:
    """Where the first letter, digit or underscore of a token stands; 0 where there is none."""
    return next((index for index, character in enumerate(text) if character.isalnum() or character == "_"), 0)


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _written_as_bytes(token: str | None, text: str) -> str:
    """What a token of single bytes, or one that decodes to nothing, is called."""
    if token is None:
        return text
    if all(letter in _BYTE_OF_LETTER for letter in token) and text:
        letters = bytes(_BYTE_OF_LETTER[letter] for letter in token)
        return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"<0x{byte:02X}>" for byte in letters)
    return token
