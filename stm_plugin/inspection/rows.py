"""Rows for the terminal, each label token coloured by its perplexity, the masked ones struck through."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..masking.masks import Masks
from ..options import STMOptions, rule_in_words
from ..selection import perplexity
from ..tokens import visible
from .scored import ScoredData

BANDS = ((1.5, None), (2.5, 229), (10.0, 222), (100.0, 215), (math.inf, 209))
"""Upper perplexity of each band and its background among the terminal's 256 colours, with black text."""

_RESET = "\x1b[0m"
_STRUCK = "9"
_DIM = "\x1b[2m"
_BOLD = "\x1b[1m"


@dataclass(frozen=True)
class Style:
    """How rows are written.

    Attributes:
        colour: Whether ANSI codes are written; without them, masked tokens stand between `[-` and `-]`.
        redact: Whether masked tokens are left out, `[REDACTED]` in their place.
        context: How many tokens without a label are shown before each answer.
        most_tokens: How many tokens of a row are shown.
    """

    colour: bool
    redact: bool = False
    context: int = 40
    most_tokens: int = 2000


@dataclass(frozen=True)
class _Token:
    text: str
    nll: float
    is_label: bool
    masked: bool


def row_lines(data: ScoredData, masks: Masks, row: int, style: Style) -> list[str]:
    """A row with its share of masked tokens.

    Args:
        data: Scored data.
        masks: What is masked of it.
        row: Index of the row, from 0.
        style: How it is written.
    """
    tokens = list(_tokens(data, masks, row))
    shown, hidden = tokens[: style.most_tokens], len(tokens) - style.most_tokens
    num_labels, num_masked = sum(token.is_label for token in tokens), sum(token.masked for token in tokens)
    share = f"{num_masked:,} of {num_labels:,} label tokens masked ({num_masked / max(1, num_labels):.1%})"
    head = f"row {row}: {share}"
    text = "".join(_spans(shown, style))
    if hidden > 0:
        text += _dim(f" … {hidden:,} more tokens (--most_tokens)", style)
    return [f"{_BOLD}{head}{_RESET}" if style.colour else head, *text.split("\n")]


def heading(data: ScoredData, masks: Masks, options: STMOptions, style: Style) -> list[str]:
    """What is looked at, what is masked of all rows, and how to read the rest."""
    nats = masks.threshold_nats
    rule = rule_in_words(options.stm_strategy, f"{perplexity(nats):.6g}", options.stm_tuned_model)
    lines = [
        visible(data.name),
        f"{rule.removeprefix('those of ')} ({nats:.6g} nats, strategy {options.stm_strategy}): {masks.num_masked:,} "
        f"of {masks.documents.num_label_tokens:,} label tokens masked ({masks.masked_fraction:.2%})",
    ]
    sign = "[REDACTED]" if style.redact else "masked" if style.colour else "[-masked-]"
    if not style.colour:
        return [*lines, f"signs: {sign} ⏎ line break → tab · space"]
    lower, parts = "", []
    for upper, colour in BANDS:
        name = (
            f" {lower}{'–' if lower and upper < math.inf else ''}{f'{upper:g}' if upper < math.inf else ' and more'} "
        )
        parts.append(_coloured(name if lower else f" up to {upper:g} ", _codes(colour, False)))
        lower = f"{upper:g}"
    masked = sign if style.redact else _coloured(sign, _STRUCK)
    return [*lines, f"perplexity {''.join(parts)}  {masked}  {_dim('context', style)}"]


def _tokens(data: ScoredData, masks: Masks, row: int) -> Iterator[_Token]:
    documents = data.documents
    start, end = documents.row_offsets[row : row + 2].tolist()
    is_label = documents.label_mask[start:end]
    nll = np.full(end - start, np.nan)
    first = int(documents.label_mask[:start].sum())
    nll[is_label] = data.nll[first : first + int(is_label.sum())]
    ids = np.where(is_label, documents.labels_at(slice(start, end)), documents.input_ids[start:end]).tolist()
    for token_id, score, label, masked in zip(
        ids, nll.tolist(), is_label.tolist(), masks.masked[start:end].tolist(), strict=True
    ):
        yield _Token(data.kept.text_of[token_id], score, label, masked)


def _spans(tokens: list[_Token], style: Style) -> Iterator[str]:
    """The text of tokens, in runs of context, kept and masked ones."""
    for kind, group in groupby(tokens, key=lambda token: (token.is_label, token.masked)):
        run = list(group)
        if kind == (False, False):
            cut = run[max(0, len(run) - style.context) :]
            text = "".join(visible(token.text, line_breaks=True) for token in cut)
            yield _dim(("… " if len(cut) < len(run) else "") + text.replace("⏎\n", "\n").replace("→", "\t"), style)
        elif kind == (True, True) and style.redact:
            yield "[REDACTED]" if len(run) == 1 else f"[REDACTED ×{len(run)}]"
        elif not style.colour:
            text = "".join(map(_shown, run))
            yield f"[-{text}-]" if kind[1] else text
        else:
            yield "".join(_coloured(_shown(token), _codes(_band(token.nll), token.masked)) for token in run)


def _shown(token: _Token) -> str:
    """A label token's text: its white space as signs where it is masked, else as it is."""
    text = visible(token.text, line_breaks=True)
    if token.masked:
        return text.replace(" ", "·") if text.isspace() else text
    return text.replace("⏎\n", "\n").replace("→", "\t") if "\n" in token.text or "\t" in token.text else text


def _band(nll: float) -> int | None:
    return next(colour for upper, colour in BANDS if perplexity(nll) <= upper)


def _codes(background: int | None, masked: bool) -> str:
    codes = [_STRUCK] if masked else []
    if background is not None:
        codes.append(f"38;5;16;48;5;{background}")
    return ";".join(codes)


def _coloured(text: str, codes: str) -> str:
    """Text between ANSI codes, which end with each line so that no background runs on."""
    if not codes:
        return text
    return "\n".join(f"\x1b[{codes}m{line}{_RESET}" if line else line for line in text.split("\n"))


def _dim(text: str, style: Style) -> str:
    if not style.colour:
        return text
    return "\n".join(f"{_DIM}{line}{_RESET}" if line else line for line in text.split("\n"))
