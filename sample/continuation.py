"""Tokens -> text that may be shown: complete characters, up to a stop string, and why it ended."""

import codecs
from collections.abc import Iterator, Sequence

from pipeline.vocabulary.tokenizer import Tokenizer
from sample.generate import Tokens

REPLACEMENT = "\ufffd".encode()


class AddedText:
    """What each token adds to the text after `context`: in some vocabularies a space depends on the
    tokens on both sides.

    Hugging Face's decoders return U+FFFD for an incomplete character; tokens are held back until it
    is complete.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self.tokenizer = tokenizer
        self.shown, self.held = context[-1:], list[int]()

    def add(self, token: int) -> bytes:
        self.held.append(token)
        if self._text().endswith(REPLACEMENT):
            return b""
        piece = self.rest()
        # One complete piece before the next is context enough, and keeps each decoding short.
        self.shown, self.held = self.held, []
        return piece

    def rest(self) -> bytes:
        """The text of the tokens that are held back."""
        return self._text()[len(self.tokenizer.decode_bytes(self.shown)) :]

    def _text(self) -> bytes:
        return self.tokenizer.decode_bytes(self.shown + self.held)


class Continuation:
    """One sample as it grows. `pieces` of text are final: the possible beginning of a stop string
    or character is held back.

    `token_ids` are all that were drawn except end-of-text; if a stop string ended the text, they
    reach past it. `finish_reason` is empty while the sample grows.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int], stops: Sequence[str] = ()) -> None:
        self.end_of_text, self.stops = tokenizer.end_of_text, stops
        self.pieces, self.finish_reason = list[str](), ""
        self.token_ids, self.log_probabilities = list[int](), list[float]()
        self._added = AddedText(tokenizer, context)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, token: int, log_probability: float | None = None) -> None:
        """Append `token`, unless the sample has ended."""
        if self.finish_reason:
            return
        if token == self.end_of_text:
            self.end("end_of_text")
            return
        self.token_ids.append(token)
        if log_probability is not None:
            self.log_probabilities.append(log_probability)
        self._take(self._characters.decode(self._added.add(token)))

    def end(self, reason: str) -> None:
        """Release the text that is held back, unless the sample has ended."""
        if self.finish_reason:
            return
        self._take(self._characters.decode(self._added.rest(), final=True))
        if not self.finish_reason:
            self.pieces.append(self._waiting)
            self.finish_reason = reason

    def _take(self, more: str) -> None:
        """Add text up to a stop string, or to what might become one."""
        self._waiting += more
        found = [(at + len(stop), at) for stop in self.stops if (at := self._waiting.find(stop)) >= 0]
        if found:  # the stop string that ends first was complete first, whatever the tokens' borders
            self.pieces.append(self._waiting[: min(found)[1]])
            self.finish_reason = "stop"
            return
        # What may still become a stop string is held back: a terminal takes no text back.
        ready = len(self._waiting) - max((overlap(self._waiting, stop) for stop in self.stops), default=0)
        self.pieces.append(self._waiting[:ready])
        self._waiting = self._waiting[ready:]


def overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def grow(texts: Sequence[Continuation], steps: Iterator[Tokens]) -> Iterator[None]:
    """Append tokens until every text has ended, or the steps have; yields after each step."""
    for ids, log_probabilities in steps:
        for text, token, *scores in zip(texts, ids, *([log_probabilities] if log_probabilities else []), strict=True):
            text.add(token, *scores)
        yield
        if all(text.finish_reason for text in texts):
            return
    for text in texts:
        text.end("length")
    yield
