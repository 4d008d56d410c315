"""How a file is to be read: what its first bytes say, then its suffix; and the opening of text."""

from __future__ import annotations

import codecs
import collections
import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.csv as pa_csv

from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.errors import UserError

PARQUET_SUFFIXES = (".parquet", ".pq")
TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".inter")
LOOSE_SUFFIXES = (".txt", ".dat")  # as often notes as tables
ALL_SUFFIXES = (*PARQUET_SUFFIXES, *TEXT_SUFFIXES, *LOOSE_SUFFIXES)
_COMPRESSED = (".gz", ".zst", ".bz2", ".lz4", ".xz")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
}
_OTHER = {
    b"PK\x03\x04": "a ZIP archive (or an Excel workbook); unpack it, or save it as CSV",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it: xz -d",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"ORC": "an ORC file; convert it to Parquet",
    b"Obj\x01": "an Avro file; convert it to Parquet",
    b"ARROW1": "an Arrow file; convert it to Parquet",
    b"SQLite format 3": "an SQLite database; export a table as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save it as CSV",
    b"\x89HDF": "an HDF5 file; convert it to Parquet",
    b"%PDF": "a PDF",
}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD_BYTES = 1 << 16
_DELIMITERS = ("\t", ",", ";", "|")
_BLOCK_BYTES = 32 << 20
_HEADER_BLOCK_BYTES = 1 << 20
_NOT_UTF8 = "UTF-8 text; convert the file: iconv -f LATIN1 -t UTF-8 OLD > NEW"


@dataclasses.dataclass(frozen=True)
class Format:
    """How a file is read.

    Attributes:
      compression: Of a text file: "gzip", "zstd", …; None for none.
      encoding: Of a text file; "" for Parquet.
      delimiter: Between values.
      quote: Around values; "" if quote marks are part of them.
      null_words: Texts that stand for a missing value.
    """

    compression: str | None = None
    encoding: str = ""
    delimiter: str = ""
    quote: str = ""
    null_words: tuple[str, ...] = ()

    @property
    def is_parquet(self) -> bool:
        """Or text."""
        return not self.encoding

    def describe(self) -> str:
        """For people."""
        if self.is_parquet:
            return "Parquet"
        between = {"\t": "tabs"}.get(self.delimiter, f"{self.delimiter!r}")
        packed = f", {self.compression}" if self.compression else ""
        coded = "" if self.encoding == "utf-8" else f" in {self.encoding.upper()}"
        return f"text{coded}{packed}, {between} between values, quotes {self.quote or 'none'}"


def tables_in(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The files of a folder that are parts of a table, by their names, and those that are not.

    `.txt` and `.dat` are where there is nothing else; what is hidden is in neither list.
    """
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    files = [
        f for f in files if not any(p.startswith((".", "_")) for p in f.relative_to(folder).parts)
    ]
    for suffixes in ((*PARQUET_SUFFIXES, *TEXT_SUFFIXES), LOOSE_SUFFIXES):
        found = [f for f in files if _suffix(f) in suffixes]
        if found:
            return found, [f for f in files if f not in set(found)]
    return [], files


def detect(file: str, config: LogConfig) -> Format:
    """Looks at a file's first bytes.

    Raises:
      UserError: it holds neither Parquet nor text in columns.
    """
    with open(file, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return Format(null_words=config.null_words)
    for magic, what in _OTHER.items():
        if head.startswith(magic):
            raise UserError(f"{file} cannot be read: it is {what}")
    if _suffix(pathlib.Path(file)) in PARQUET_SUFFIXES and head:
        raise UserError(
            f"{file} cannot be read: a Parquet file begins with PAR1, this one does not"
        )
    compression = next((c for magic, c in _MAGIC.items() if head.startswith(magic)), None)
    if compression:
        try:
            with pa.input_stream(file, compression=compression) as unpacked:
                head = unpacked.read(_HEAD_BYTES)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read: {compression}: {error}") from error
    encoding = _encoding(file, head)
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head).lstrip("\ufeff")
    header = next((line for line in text.splitlines() if line), "")
    delimiter = _delimiter(file, header, config.delimiter)
    quote = {"none": "", "auto": '"'}.get(config.quote, config.quote)
    if config.quote == "auto" and delimiter == "\t" and '"' not in header:
        quote = ""  # tab-separated values are not quoted, and titles begin with quote marks
    return Format(compression, encoding, delimiter, quote, config.null_words)


def _suffix(path: pathlib.Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _encoding(file: str, head: bytes) -> str:
    for bom, encoding in _BOMS:
        if head.startswith(bom):
            return encoding
    zeros = [head[k:4096:2].count(0) / max(1, len(head[k:4096:2])) for k in (0, 1)]
    if not max(zeros):
        return "utf-8"
    # Without a mark: the upper byte of most characters of a log is 0.
    if max(zeros) > 0.5 and min(zeros) < 0.1:
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    raise UserError(f"{file} cannot be read: it is not text (it holds bytes of 0) and not Parquet")


def _delimiter(file: str, header: str, configured: str) -> str:
    """The configured one, that of the suffix, or the one that most often occurs in the header."""
    if configured != "auto":
        return "\t" if configured in ("tab", r"\t") else configured
    suffix = _suffix(pathlib.Path(file))
    default = {".csv": ","}.get(suffix, "\t" if suffix in TEXT_SUFFIXES else "")
    if default and default in header:
        return default
    if "::" in header:
        raise UserError(
            f"{file}: columns are separated by '::', which is two characters; write one instead: "
            f"sed 's/::/\\t/g' {file} > NEW.tsv"
        )
    counts = collections.Counter({d: header.count(d) for d in _DELIMITERS})
    best, count = counts.most_common(1)[0]
    return best if count else default or ","


class CountedLines(io.RawIOBase):
    """A file in UTF-8, whose lines are counted while it is read.

    Attributes:
      lines: So far, with the header.
    """

    def __init__(self, file: str, format_: Format):
        super().__init__()
        self._stream = pa.input_stream(file, compression=format_.compression)
        self._decoder = (
            codecs.getincrementaldecoder(format_.encoding)()
            if format_.encoding != "utf-8"
            else None
        )
        self._newlines, self._last = 0, b"\n"

    @property
    def lines(self) -> int:
        """Lines that have been read, a last one without a newline as well."""
        return self._newlines + (self._last != b"\n")

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        """Up to that many bytes, or a few more."""
        data = self._stream.read(size if size >= 0 else None)
        if self._decoder is not None:
            decoded = self._decoder.decode(data, final=not data).encode()
            while data and not decoded:  # less than a character
                data = self._stream.read(4)
                decoded = self._decoder.decode(data, final=not data).encode()
            data = decoded
        self._newlines += data.count(b"\n")
        self._last = data[-1:] or self._last
        return data

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()
        super().close()


def text_schema(file: str, format_: Format) -> pa.Schema:
    """The columns of a text file, as bytes.

    Raises:
      UserError: the header is not UTF-8.
      pa.ArrowException: it cannot be read.
    """
    stream = CountedLines(file, format_)
    try:
        with _open(stream, format_, None, [], lambda _: "skip") as reader:
            return pa.schema([(name, pa.binary()) for name in reader.schema.names])
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read: its header is not {_NOT_UTF8}") from error
    finally:
        stream.close()


def open_text(
    stream: CountedLines,
    format_: Format,
    schema: pa.Schema,
    names: Sequence[str],
    handler: Callable[[pa_csv.InvalidRow], str],
) -> pa_csv.CSVStreamingReader:
    """Opens a text file; all columns are bytes, since only some rows may be valid text.

    Args:
      stream: Its content.
      format_: How to read it.
      schema: Its columns.
      names: Columns to read.
      handler: Told of rows of a wrong width.
    """
    return _open(stream, format_, names, schema.names, handler)


def _open(
    stream: CountedLines,
    format_: Format,
    names: Sequence[str] | None,
    columns: Sequence[str],
    handler: Callable[[pa_csv.InvalidRow], str],
) -> pa_csv.CSVStreamingReader:
    return pa_csv.open_csv(
        pa.PythonFile(stream, mode="r"),
        # One thread: rows are numbered only then.
        pa_csv.ReadOptions(
            use_threads=False, block_size=_BLOCK_BYTES if columns else _HEADER_BLOCK_BYTES
        ),
        pa_csv.ParseOptions(
            delimiter=format_.delimiter,
            quote_char=format_.quote or False,
            double_quote=bool(format_.quote),
            newlines_in_values=bool(format_.quote),
            invalid_row_handler=handler,
        ),
        pa_csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.binary()),
            include_columns=names,
            strings_can_be_null=True,
            null_values=["", *format_.null_words],
            check_utf8=False,
        ),
    )
