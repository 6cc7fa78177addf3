"""The page: figures and rows as data within one file of HTML, which a script in the same file draws.

Nothing is fetched, and the data run nothing: they stand in a block of JSON (no `<` in it), the script writes them as
text only, and the Content-Security-Policy allows this script and this style sheet by their hashes and no others.
"""

import base64
import hashlib
import html
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..constants import DEFAULT_THRESHOLD
from ..inspection.scored import ScoredData
from ..inspection.sweep import PAPER_BAND
from ..masking.receipt import Receipt
from ..tokens import visible
from .figures import BINS_PER_DECADE, Figures, Group, make_figures, pair_rows

_SCRIPTS = ("data.js", "charts.js", "rows.js", "tip.js", "main.js")
_MOST_BYTES = 20_000_000
"""Most bytes of token ids and scores that a page embeds, before base64."""


def write_report(datas: list[ScoredData], path: str | os.PathLike[str]) -> Path:
    """Write a report with the options of the runs (see `write_page`).

    Args:
        datas: Scored data: one, or two to be shown side by side.
        path: The file.

    Raises:
        ValueError: For data without label tokens.
    """
    return write_page(make_figures(datas, [data.options for data in datas]), path)


def write_page(figures: list[Figures], path: str | os.PathLike[str]) -> Path:
    """Write a report.

    Args:
        figures: Figures of one data set, or of two to be shown side by side.
        path: The file; its folder is made where it is missing.

    Returns:
        The file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(make_page(figures), encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def make_page(figures: list[Figures]) -> str:
    """The page of some figures, the same characters for the same figures."""
    style, scripts = _asset("page.css"), [_asset(name) for name in _SCRIPTS]
    script = "\n".join(['"use strict";', "{", *scripts, "}"])
    title = " | ".join(visible(one.data.name) for one in figures)
    policy = (
        f"default-src 'none'; style-src '{_policy_hash(style)}'; script-src '{_policy_hash(script)}'; img-src data:"
    )
    parts = {
        "POLICY": html.escape(policy, quote=True),
        "TITLE": html.escape(f"STM report: {title}"),
        "STYLE": style,
        "DATA": _json(_content(figures)),
        "SCRIPT": script,
    }
    page = _asset("page.html")
    for name, part in parts.items():
        before, after = page.split(f"%{name}%")
        page = before + part + after
    return page


def _content(figures: list[Figures]) -> dict[str, Any]:
    first = figures[0]
    pairs = pair_rows(figures)
    chosen = chosen_rows(figures, pairs)
    shown = [np.sort(rows[rows >= 0]) for rows in chosen.T]
    places = [np.where(rows < 0, -1, np.searchsorted(some, rows)) for some, rows in zip(shown, chosen.T, strict=True)]
    return {
        "stops": [
            {"nats": "inf" if np.isinf(stop.nats) else stop.nats, "text": stop.text, "note": stop.note}
            for stop in first.stops
        ],
        "start": first.start,
        "default_threshold": f"{DEFAULT_THRESHOLD:g}",
        "paper_band": PAPER_BAND,
        "bins_per_decade": BINS_PER_DECADE,
        "pairs": np.column_stack(places).tolist(),
        "num_pairs": len(pairs),
        "sources": [_source(one, rows) for one, rows in zip(figures, shown, strict=True)],
    }


def chosen_rows(figures: list[Figures], pairs: np.ndarray, most_bytes: int = _MOST_BYTES) -> np.ndarray:
    """The rows that the page shows: all of them, where they fit.

    Otherwise those of which the largest share is masked, as far as they fill half of the space, and others at even
    intervals.

    Args:
        figures: Figures of all data sets.
        pairs: Which rows belong together (see `pair_rows`).
        most_bytes: Most bytes of token ids and scores.

    Returns:
        Some of the pairs, in their order.
    """
    size, share = np.zeros(len(pairs), dtype=np.int64), np.zeros(len(pairs))
    for one, rows in zip(figures, pairs.T, strict=True):
        there = rows >= 0
        rows = rows[there]
        size[there] += 4 * np.diff(one.data.documents.row_offsets)[rows] + 4 * one.labels_per_row[rows]
        masked = one.masks.masked_per_row[rows] / np.maximum(1, one.labels_per_row[rows])
        share[there] = np.maximum(share[there], masked)
    if size.sum() <= most_bytes:
        return pairs
    highest_first = np.argsort(-share, kind="stable")
    highest = highest_first[np.cumsum(size[highest_first]) <= most_bytes // 2]
    others = np.setdiff1d(np.arange(len(pairs)), highest)
    room = most_bytes - int(size[highest].sum())
    evenly = others[:: max(1, -(-int(size[others].sum()) // room))]
    return pairs[np.union1d(highest, evenly[np.cumsum(size[evenly]) <= room])]


def _source(figures: Figures, chosen: np.ndarray) -> dict[str, Any]:
    data = figures.data
    return {
        "name": visible(data.name),
        "strategy": figures.options.stm_strategy,
        "keep_stop_tokens": figures.options.stm_keep_stop_tokens,
        "label_tokens": len(data.nll),
        "rows": len(figures.labels_per_row),
        "documents": len(data.documents),
        "stop_tokens": figures.masks.num_stop_tokens,
        "start": figures.start,
        "for_percent": figures.for_percent,
        "masked": figures.masked.tolist(),
        "rows_without_kept_tokens": figures.rows_without_kept_tokens.tolist(),
        "stop_tokens_masked": figures.stop_tokens_masked.tolist(),
        "histogram": figures.histogram.tolist(),
        "groups": [_group(group) for group in figures.groups],
        "strings": _group(figures.strings),
        "shown": _rows(figures, chosen),
        "receipt": _lines(data.receipt) if data.receipt is not None else [],
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "title": group.title,
        "note": group.note,
        "labels": group.labels,
        "totals": group.totals.tolist(),
        "masked": group.masked.tolist(),
    }


def _rows(figures: Figures, chosen: np.ndarray) -> dict[str, Any]:
    """Ids, label positions and scores of some rows, as base64 of little-endian arrays."""
    documents = figures.data.documents
    lengths = np.diff(documents.row_offsets)
    take = np.zeros(len(lengths), dtype=bool)
    take[chosen] = True
    tokens = np.repeat(take, lengths)
    labels = np.repeat(take, figures.labels_per_row)
    shown = np.where(documents.label_mask, documents.labels, documents.input_ids)[tokens]
    ids, index = np.unique(shown, return_inverse=True)
    own = figures.effective is figures.data.nll
    return {
        "row": chosen.tolist(),
        "lengths": lengths[chosen].tolist(),
        "texts": [visible(figures.data.kept.text_of[token_id], line_breaks=True) for token_id in ids.tolist()],
        "ids": ids.tolist(),
        "wide": len(ids) > 2**16,
        "index": _base64(index.astype("<u4" if len(ids) > 2**16 else "<u2")),
        "is_label": _base64(np.packbits(documents.label_mask[tokens], bitorder="little")),
        "nll": _base64(figures.data.nll[labels].astype("<f4")),
        "effective": None if own else _base64(figures.effective[labels].astype("<f4")),
        "group": figures.data.kept.row_groups[chosen].tolist() if figures.data.kept.groups else None,
        "groups": [visible(name) for name in figures.data.kept.groups],
    }


def _lines(receipt: Receipt, prefix: str = "") -> list[tuple[str, str]]:
    """The receipt as names and values."""
    lines: list[tuple[str, str]] = []
    for name, value in receipt.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
            lines.append((visible(prefix + name), visible(value if isinstance(value, str) else text)))
    return lines


def _asset(name: str) -> str:
    return files(__package__).joinpath("page_files", name).read_text(encoding="utf-8")


def _json(content: Any) -> str:
    """JSON that stands within HTML: no character of markup, and none beyond ASCII."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _policy_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
