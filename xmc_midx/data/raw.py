"""Layer 2. Files of raw text, an instance a record, as TSV, CSV or JSON lines: text and labels, one after the other.

Before it: `files` (streams of lines). After it: `prepare` makes features and label ids of the records. Nothing is held
beyond a record and a chunk of lines; the first fault is a `DataError` with file and line, and nothing is repaired.

======  ===============================================================================================================
TSV     `labels TAB text` on each line, no head, no quotes; with columns named, a head line comes first
CSV     a head line; columns `text` and `labels` (or `label`), or those that are named; quoted fields may hold newlines
JSONL   an object a line, labels a list of numbers or strings; keys `text` and `labels` (or `label`), those that are
        named, or the XMC repository's `title`, `content`, `target_ind` (with `target_rel`: what has 0 is no label)
======  ===============================================================================================================

Several text columns are joined by a blank. Labels of TSV and CSV are separated by a comma, or what is chosen.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xmc_midx.data.files import MAX_LINE_BYTES, LineChunks, plain_name
from xmc_midx.data.problems import excerpt, json_kind, raise_error, shown
from xmc_midx.errors import DataError, UsageError

__all__ = ["TextForm", "TextLayout", "TextRecord", "form_of", "read_names", "read_texts", "text_form"]

TextForm = Literal["tsv", "csv", "jsonl"]

_FORMS: Mapping[str, TextForm] = {
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}

MAX_LABELS = 100_000
"""Labels of one instance."""
MAX_NAME = 500
"""Characters of a label's name; what is longer is mostly a text in the wrong column."""

_TEXT_KEY = "text"
_LABEL_KEYS = ("labels", "label")
_HEADS = ({"labels", "text"}, {"label", "text"})
_XMC_TEXTS = ("title", "content")
_XMC_LABELS, _XMC_RELEVANCE = "target_ind", "target_rel"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLayout:
    """Where text and labels stand in a file.

    Raises
    ------
    UsageError : a delimiter or separator cannot be one.
    """

    form: TextForm | None = None
    """None goes by the file's name."""
    text_columns: tuple[str, ...] = ()
    """Names in the head line, or keys; empty takes what the module's table says."""
    label_column: str | None = None
    label_separator: str = ","
    """Between the labels of a TSV or CSV field; blanks around a label are dropped."""
    delimiter: str = ","
    """Between the fields of CSV: one character."""

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise UsageError(f"Delimiter {self.delimiter!r}: expected one character, such as ',' or ';'.")
        if not self.label_separator or self.label_separator in "\r\n":
            raise UsageError(f"Label separator {self.label_separator!r}: expected one or more characters.")


@dataclass(frozen=True, slots=True)
class TextRecord:
    """An instance as it stands in a file."""

    line: int
    """Where it begins, from 1."""
    text: str
    """May be empty."""
    labels: tuple[str, ...]
    """Ids or names, each once, without blanks around them; may be empty."""


def form_of(path: Path) -> TextForm | None:
    """The form that a file's name tells, if it does."""
    return _FORMS.get(Path(plain_name(path)).suffix.lower())


def text_form(path: Path) -> TextForm:
    """The form that a file's name tells.

    Raises
    ------
    UsageError : it tells none.
    """
    form = form_of(path)
    if form is None:
        raise UsageError(
            f"{path}: the name does not say what it is; expected .tsv, .csv or .jsonl (perhaps .gz, .bz2, .xz).",
            hint="Say it with --format.",
        )
    return form


def read_texts(path: str | Path, layout: TextLayout | None = None) -> Iterator[TextRecord]:
    """The records of a file, in its order.

    Accepted: CRLF, a byte order mark, blank lines after the last record.

    Parameters
    ----------
    path : UTF-8, plain, .gz, .bz2 or .xz.
    layout : None goes by the file's name.

    Raises
    ------
    DataError : with `file:line` of the first fault: a missing column or key, a blank or short record, a label that is
        empty, too long or given twice, quotes that do not close, bytes that are not UTF-8.
    UsageError : the file's name does not tell the form and the layout does not either.
    """
    path, layout = Path(path), layout or TextLayout()
    form = layout.form or text_form(path)
    if form == "jsonl":
        return _read_jsonl(path, layout)
    if form == "csv":
        return _read_table(path, layout, _csv_rows(path, layout.delimiter), delimiter=layout.delimiter)
    if layout.text_columns or layout.label_column is not None:
        return _read_table(path, layout, _tsv_rows(path), delimiter="\t")
    return _read_pairs(path, layout)


def read_names(path: str | Path) -> Iterator[str]:
    """Label names of JSON lines, `title` of each object, as in the XMC repository's `lbl.json`.

    Titles are those of products and pages: runs of white space become one blank, and an empty one is shown as the
    label's number, as in `read_labels`.

    Raises
    ------
    DataError : with `file:line`: a line is no object, or has no `title`.
    """
    path = Path(path)
    for number, (line, record) in enumerate(_objects(path)):
        title = " ".join(_text_of(record, "title", f"{path}:{line}").split())
        # A lone surrogate cannot be written.
        yield title.encode("utf-8", "replace").decode() or str(number)


# ------------------------------------------------------------------------ lines


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines without their ends, from 1; blank ones after the last record are left out."""
    blank: int | None = None
    for number, line in _decoded(path):
        text = line.removesuffix("\n").removesuffix("\r")
        if not text.strip(" "):
            blank = blank or number
            continue
        if blank is not None:
            raise _blank_line(path, blank)
        yield number, text


def _blank_line(path: Path, line: int) -> DataError:
    return DataError(f"{path}:{line}: the line is blank, expected an instance.", hint="Remove it; nothing is skipped.")


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their newlines."""
    for first, chunk in LineChunks(path, raise_error):
        for number, line in enumerate(chunk[:-1].split(b"\n"), start=first):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, line, error) from None
            if "\0" in text:
                raise DataError(f"{path}:{number}: holds a NUL byte, expected text.", hint=_ENCODING_HINT)
            yield number, f"{text}\n"


_ENCODING_HINT = "Is it UTF-16? Convert it: iconv -f UTF-16 -t UTF-8."


def _not_utf8(path: Path, number: int, line: bytes, error: UnicodeDecodeError) -> DataError:
    wide = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
    found = excerpt(line[max(error.start - 10, 0) : error.start + 20])
    hint = _ENCODING_HINT if wide else "Convert it, perhaps with: iconv -f LATIN1 -t UTF-8."
    return DataError(f"{path}:{number}: {found} is not UTF-8.", hint=hint)


# ------------------------------------------------------------------- TSV and CSV


def _read_pairs(path: Path, layout: TextLayout) -> Iterator[TextRecord]:
    """`labels TAB text`."""
    for number, line in _lines(path):
        labels, *texts = line.split("\t")
        if number == 1 and {name.strip().lower() for name in (labels, *texts)} in _HEADS:
            hint = "With a head line: --text-column and --label-column."
            raise DataError(f"{path}:1: is a head line, expected an instance, labels TAB text.", hint=hint)
        if len(texts) != 1:
            raise _not_a_pair(path, number, line, len(texts))
        yield TextRecord(number, texts[0], _split_labels(labels, layout.label_separator, f"{path}:{number}"))


def _not_a_pair(path: Path, number: int, line: str, num_tabs: int) -> DataError:
    hint: str | None = "An instance without labels begins with the tab."
    if num_tabs:
        hint = "With more columns: a head line first, and --text-column and --label-column. In a text: blanks for tabs."
        return DataError(f"{path}:{number}: has {num_tabs + 1} columns, expected labels TAB text.", hint=hint)
    if line.lstrip().startswith("{"):
        hint = "Is it JSON lines? --format jsonl."
    elif any(mark in line for mark in ",;"):
        hint = f"Is it CSV? --format csv. {hint}"
    return DataError(f"{path}:{number}: has no tab, expected labels TAB text.", hint=hint)


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(path):
        yield number, line.split("\t")


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, fields) of each record."""
    blank: int | None = None
    end = 0
    reader = csv.reader((line for _, line in _decoded(path)), delimiter=delimiter, strict=True)
    while True:
        # The module's limit for all readers is 128 kB a field; ours is that of a line. It is read at each record.
        limit = csv.field_size_limit(MAX_LINE_BYTES)
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise _bad_csv(path, end + 1, error) from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        begin, end = end + 1, reader.line_num
        if not any(row) and len(row) <= 1:
            blank = blank or begin
            continue
        if blank is not None:
            raise _blank_line(path, blank)
        yield begin, row


def _bad_csv(path: Path, line: int, error: csv.Error) -> DataError:
    if "expected after" in str(error):
        hint = 'A quote inside a quoted field is written twice: "".'
    elif "new-line" in str(error):
        hint = "Are its lines separated by carriage returns alone? Convert them to newlines."
    else:
        hint = 'Is a quote " not closed?'
    return DataError(f"{path}:{line}: the record is no CSV ({str(error).rstrip('.')}).", hint=hint)


def _read_table(
    path: Path, layout: TextLayout, rows: Iterator[tuple[int, list[str]]], *, delimiter: str
) -> Iterator[TextRecord]:
    """Records of a table with a head line."""
    line, head = next(rows, (1, []))
    head = [name.strip() for name in head]
    if not head:
        raise DataError(f"{path}: is empty, expected a head line and instances.")
    wanted: list[tuple[str, ...]] = [(name,) for name in layout.text_columns or (_TEXT_KEY,)]
    wanted.append(_LABEL_KEYS if layout.label_column is None else (layout.label_column,))
    *texts, labels = _columns(path, line, head, wanted, delimiter)
    for number, row in rows:
        if len(row) != len(head):
            raise DataError(
                f"{path}:{number}: has {len(row)} fields, expected {len(head)} as in the head line.",
                hint=f"Does a field hold {_mark(delimiter)}{'' if delimiter == chr(9) else ' outside quotes'}?",
            )
        text = " ".join(row[column] for column in texts)
        yield TextRecord(number, text, _split_labels(row[labels], layout.label_separator, f"{path}:{number}"))


def _columns(path: Path, line: int, head: Sequence[str], wanted: Sequence[Sequence[str]], delimiter: str) -> list[int]:
    """Where the first of some names stands in the head line, for each of `wanted`."""
    found = [next((head.index(name) for name in names if name in head), None) for names in wanted]
    if None in found:
        other = next((mark for mark in ",;\t|" if len(head) == 1 and mark in head[0] and mark != delimiter), None)
        hint = "Name them with --text-column and --label-column; the first line is the head."
        if other is not None:
            hint = f"Is the delimiter {_mark(other)}? --delimiter {'tab' if other == chr(9) else repr(other)}."
        shown = ", ".join(ascii(name[:40]) for name in head[:8]) + (", ..." if len(head) > 8 else "")
        expected = " and ".join(_either(names) for names in wanted)
        raise DataError(f"{path}:{line}: has the columns {shown}; expected {expected}.", hint=hint)
    columns = [column for column in found if column is not None]
    for column in columns:
        if head.count(head[column]) > 1:
            raise DataError(f"{path}:{line}: has several columns {head[column]!r}, expected one.")
    return columns


def _either(names: Sequence[str]) -> str:
    first, *others = map(repr, names)
    return f"{first} (or {', '.join(others)})" if others else first


def _mark(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else repr(delimiter)


def _split_labels(field: str, separator: str, place: str) -> tuple[str, ...]:
    if not field.strip():
        return ()
    return _checked_labels(field.split() if separator == " " else field.split(separator), place)


def _checked_labels(labels: Sequence[str], place: str) -> tuple[str, ...]:
    if len(labels) > MAX_LABELS:
        raise DataError(f"{place}: has {len(labels):,} labels, expected at most {MAX_LABELS:,}.")
    checked = tuple(_checked_label(label, place) for label in labels)
    if len(set(checked)) != len(checked):
        twice = Counter(checked).most_common(1)[0][0]
        raise DataError(f"{place}: the label {shown(twice)} stands there twice, expected each once.")
    return checked


def _checked_label(label: str, place: str) -> str:
    label = label.strip()
    if not label:
        raise DataError(
            f"{place}: a label is empty, expected a name or an id.", hint="Is a separator too many, or another one?"
        )
    if len(label) > MAX_NAME:
        raise DataError(
            f"{place}: the label {shown(label)} has {len(label):,} characters, expected at most {MAX_NAME}.",
            hint="Are the columns swapped, or is the separator another one?",
        )
    # A name is a line of labels.txt, up to a tab.
    if any(c < " " or "\x7f" <= c < "\xa0" or "\ud800" <= c < "\ue000" for c in label):
        raise DataError(f"{place}: the label {shown(label)} holds a control character, expected a name or an id.")
    return label


# ------------------------------------------------------------------------- JSONL


def _read_jsonl(path: Path, layout: TextLayout) -> Iterator[TextRecord]:
    keys: tuple[Sequence[str], str] | None = None
    for line, record in _objects(path):
        place = f"{path}:{line}"
        keys = keys or _keys(record, layout, place)
        text_keys, label_key = keys
        # Sets of titles alone leave the content out.
        keys_there = [key for key in text_keys if layout.text_columns or key in record or key != _XMC_TEXTS[1]]
        text = " ".join(_text_of(record, key, place) for key in keys_there)
        yield TextRecord(line, text, _labels_of(record, label_key, place))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
            whole = number == 1 and line.lstrip().startswith(("[", "{")) and line.rstrip().endswith(("[", "{", ","))
            hint = "One object a line is expected: jq -c '.[]' makes that of an array." if whole else None
            raise DataError(f"{path}:{number}: is not JSON ({reason[0].lower()}{reason[1:]}).", hint=hint) from None
        if not isinstance(value, dict):
            hint = "jq -c '.[]' makes lines of an array." if isinstance(value, list) else None
            raise DataError(f"{path}:{number}: is {json_kind(value)}, expected an object a line.", hint=hint)
        yield number, value


def _keys(record: Mapping[str, Any], layout: TextLayout, place: str) -> tuple[Sequence[str], str]:
    """The keys of text and labels, from the first record where they are not given."""
    texts: Sequence[str] = layout.text_columns
    if not texts:
        texts = next((keys for keys in ((_TEXT_KEY,), _XMC_TEXTS) if keys[0] in record), ())
    wanted = (*_LABEL_KEYS, _XMC_LABELS) if layout.label_column is None else (layout.label_column,)
    label_key = next((key for key in wanted if key in record), None)
    if not texts or label_key is None:
        shown = ", ".join(ascii(key[:40]) for key in list(record)[:8]) + (", ..." if len(record) > 8 else "")
        expected = f"{_either(texts or (_TEXT_KEY, 'title'))} and {_either(wanted)}"
        raise DataError(
            f"{place}: has the keys {shown or 'none'}; expected {expected}.",
            hint="Name them with --text-column and --label-column.",
        )
    return texts, label_key


def _text_of(record: Mapping[str, Any], key: str, place: str) -> str:
    if key not in record:
        raise DataError(f"{place}: has no key {key!r}.")
    value = record[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: {key!r} is {json_kind(value)}, expected a string.")
    return value


def _labels_of(record: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    if key not in record:
        raise DataError(f"{place}: has no key {key!r}.", hint="An instance without labels has an empty list: [].")
    values = record[key]
    if not isinstance(values, list):
        raise DataError(f'{place}: {key!r} is {json_kind(values)}, expected a list, such as ["a", "b"] or [3, 17].')
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(f"{place}: {key!r} holds {json_kind(value)}, expected numbers or strings.")
    labels = _checked_labels([str(value) for value in values], place)
    if key != _XMC_LABELS or _XMC_RELEVANCE not in record:
        return labels
    relevance = record[_XMC_RELEVANCE]
    if not isinstance(relevance, list) or len(relevance) != len(labels):
        found = f"{len(relevance)} values" if isinstance(relevance, list) else json_kind(relevance)
        raise DataError(f"{place}: {_XMC_RELEVANCE!r} is {found}, expected one for each of {len(labels)} labels.")
    for value in relevance:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise DataError(f"{place}: {_XMC_RELEVANCE!r} holds {json_kind(value)}, expected numbers from 0.")
    return tuple(label for label, value in zip(labels, relevance, strict=True) if value > 0)
