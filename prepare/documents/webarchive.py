"""WARC and WET files, as web crawls write them: the records that are text."""

import io
import re
from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError, one_line
from prepare.documents.fields import MOST_ROW_BYTES, TOO_LONG
from prepare.storage.files import BlockFile
from prepare.units import BLOCK_BYTES, NOT_UTF8, Refused, Unreadable

NOT_WARC = "not WARC"
OTHER_RECORD = "not a text record"


def each_record(blocks: Iterator[bytes], name: str) -> Iterator[tuple[int, bytes | Refused]]:
    """The text of each record, and the byte at which the record begins."""
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError:
        raise UserError(f"reading {name} needs a package: pip install 'gpt-pipeline[warc]'") from None
    archive = ArchiveIterator(io.BufferedReader(BlockFile(blocks)))
    try:
        for record in archive:
            begin, text = archive.offset, _text(record)
            while record.raw_stream.read(BLOCK_BYTES):  # what was not text
                pass
            # warcio takes a record that the file's end truncates for a complete one.
            if not str(record.rec_headers.get_header("Content-Length")).isdigit() or record.raw_stream.limit:
                raise Unreadable(NOT_WARC, "a record is truncated, or does not tell its length")
            yield begin, text
    except Unreadable as fault:
        yield archive.offset, fault.refused
    except ArchiveLoadFailed as error:
        yield archive.offset, Refused(NOT_WARC, broken=True, detail=one_line(error))


def _text(record: Any) -> bytes | Refused:
    """What the record says of its content decides; a WET file's conversions are text."""
    headers = record.http_headers or record.rec_headers
    kind = (headers.get_header("Content-Type") or "").lower()
    plain = record.rec_type in ("response", "resource") and kind.startswith("text/plain")
    if not plain and record.rec_type != "conversion":
        return Refused(OTHER_RECORD)
    stream, text = record.content_stream(), bytearray()
    try:
        while block := stream.read(BLOCK_BYTES):
            text += block
            if len(text) > MOST_ROW_BYTES:
                return TOO_LONG
        encoding = re.search(r"charset=\"?([\w.:-]+)", kind)
        return bytes(text).decode(encoding[1] if encoding else "utf-8").encode()
    except UserError:
        raise
    except (LookupError, UnicodeError) as error:
        return Refused(NOT_UTF8, broken=True, detail=one_line(error))
    except Exception as error:  # the transfer encodings raise their own kinds
        return Refused(NOT_WARC, broken=True, detail=one_line(error))
