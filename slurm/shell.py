"""A shell script, cut into commands and words as bash would cut it: enough of the grammar to find mistakes. Nothing is run."""

import re
import shlex
from dataclasses import dataclass

# What may stand before a program's name without being it.
_PREFIXES = {"if", "then", "else", "elif", "while", "until", "do", "!", "{", "time", "exec", "command", "nohup", "env"}
_ASSIGNING = {"export", "declare", "local", "readonly", "typeset"}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)
_OPERATOR = re.compile(r"&&|\|\||\|&|;;&?|;&|[;&|()]")
_REDIRECTION = re.compile(r"&>>?|<<<|<<-?|[<>]&|>>|>\||<>|[<>](?!\()")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?\})")


@dataclass
class Command:
    """One simple command: where it begins, its words as written, and the operator that ends it."""

    line: int
    words: list[str]
    end: str
    background: bool = False

    @property
    def plain(self) -> list[str]:
        """The program and its arguments, without keywords and assignments before them."""
        words = self.words
        while words and (words[0] in _PREFIXES or _ASSIGNMENT.fullmatch(words[0])):
            words = words[1:]
        return words

    @property
    def assignments(self) -> list[tuple[str, str]]:
        """The variables that it sets, with their values as written."""
        plain = self.plain
        setting = plain[1:] if plain and plain[0] in _ASSIGNING else self.words[: len(self.words) - len(plain)]
        return [(match[1], match[2]) for word in setting if (match := _ASSIGNMENT.fullmatch(word))]


class Script:
    """A script's commands in the order they end, those of substitutions before the one they stand in."""

    def __init__(self, text: str, first_line: int = 1) -> None:
        reader = _Reader(text, first_line)
        reader.read_list("")
        self.commands, self.comments = reader.found, reader.comments
        code = list(text)
        for start, stop in reader.blanks:
            code[start:stop] = ["\n" if c == "\n" else " " for c in text[start:stop]]
        # The lines without comments and here-documents.
        self.lines = [line.rstrip() for line in "".join(code).splitlines()]
        # What the script assigns to each variable, in its order.
        self.variables: dict[str, list[str]] = {}
        for name, word in (assignment for command in self.commands for assignment in command.assignments):
            self.variables.setdefault(name, []).append(value(word))

    def expand(self, text: str) -> str:
        """`text` with the script's own variables replaced by all that they are set to; others stay as they are."""
        for _ in range(4):  # variables made of variables
            text = _VARIABLE.sub(lambda match: " ".join(self.variables.get(match[1] or match[2], [match[0]])), text)
            if len(text) > 100_000:  # one that is made of itself, such as PATH
                break
        return text


def value(word: str) -> str:
    """A word with its quotes taken away."""
    try:
        return " ".join(shlex.split(word))
    except ValueError:
        return word


def expanded_here(word: str) -> str:
    """What of a word this shell expands: single quotes and backslashes keep the rest for another one."""

    def kept(match: re.Match[str]) -> str:
        return re.sub(r"\\.", "", match[0]) if match[0].startswith('"') else ""

    return re.sub(r"""'[^']*'|\\.|"(?:\\.|[^"\\])*\"""", kept, word, flags=re.DOTALL)


class _Reader:
    def __init__(self, text: str, line: int) -> None:
        self.text, self.first_line, self.at = text, line, 0
        self.found: list[Command] = []
        self.comments: list[tuple[int, str]] = []  # with their lines
        self.blanks: list[tuple[int, int]] = []
        self._heredocs: list[tuple[str, bool]] = []

    def read_list(self, closing: str) -> None:
        """Commands up to `closing`, which is taken too, or to the end of the text."""
        level: list[Command] = []
        words: list[str] = []
        start = depth = 0
        while self.at < len(self.text):
            c = self.text[self.at]
            operator = _OPERATOR.match(self.text, self.at)
            if c in " \t\r" or self.text.startswith("\\\n", self.at):
                self.at += 1 if c != "\\" else 2
            elif c == "#":
                self._comment()
            elif redirection := _REDIRECTION.match(self.text, self.at):
                self._redirect(redirection[0])
            elif self.text.startswith("((", self.at) and _PREFIXES.issuperset(words):
                self._balanced("(", ")")
            elif c == "\n" or operator:
                end = operator[0] if operator else "\n"
                self.at += len(end)
                if words:
                    level.append(Command(self._line_of(start), words, end))
                    self.found.append(level[-1])
                    words = []
                depth += (end == "(") - (end == ")")
                if end == "\n":
                    self._skip_heredocs()
                elif end == ")" == closing and depth < 0:
                    break
            else:
                start = start if words else self.at
                word = self._word()
                # The number before a redirection is a file's, not a word.
                if not (word.isdigit() and self.text[self.at : self.at + 1] in ("<", ">")):
                    words.append(word)
        if words:
            level.append(Command(self._line_of(start), words, "\n"))
            self.found.append(level[-1])
        for command, following in zip(reversed(level), [None, *reversed(level)], strict=False):
            joined = following is not None and command.end in ("|", "|&", "&&", "||")
            command.background = command.end == "&" or (joined and following is not None and following.background)

    def _line_of(self, at: int) -> int:
        return self.first_line + self.text.count("\n", 0, at)

    def _comment(self) -> None:
        start = self.at
        self._blank(self.text.find("\n", start))
        self.comments.append((self._line_of(start), self.text[start : self.at]))

    def _blank(self, stop: int) -> None:
        stop = len(self.text) if stop < 0 else stop
        self.blanks.append((self.at, stop))
        self.at = stop

    def _redirect(self, operator: str) -> None:
        self.at += len(operator)
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1
        target = self._word()
        if operator in ("<<", "<<-"):
            self._heredocs.append((value(target), operator == "<<-"))

    def _skip_heredocs(self) -> None:
        for delimiter, indented in self._heredocs:
            end = re.compile(rf"^{chr(9) + '*' if indented else ''}{re.escape(delimiter)}$", re.MULTILINE)
            match = end.search(self.text, self.at)
            self._blank(match.end() if match else -1)
        self._heredocs = []

    def _word(self) -> str:
        start = self.at
        while self.at < len(self.text):
            c = self.text[self.at]
            if c in " \t\r\n;&|<>)" or (c == "(" and self.text[self.at - 1 : self.at] not in ("=", "<", ">")):
                if c in "<>" and self.text.startswith("(", self.at + 1):  # a process in the place of a file
                    self.at += 1
                    continue
                break
            self._piece()
        if self.at == start:  # nothing that a word may begin with: go on behind it
            self.at += 1
        return self.text[start : self.at]

    def _piece(self, quoted: bool = False) -> None:
        """A quoted string, a substitution, or one character; between double quotes a single one is a character."""
        c = self.text[self.at]
        if c == "\\":
            self.at += 2
        elif self.text.startswith("$'", self.at) and not quoted:
            self._to(re.compile(r"(?:\\.|[^\\'])*'", re.DOTALL), self.at + 2)
        elif c == "'" and not quoted:
            self._to(re.compile("[^']*'"), self.at + 1)
        elif c == '"':
            self.at += 1
            while self.at < len(self.text) and self.text[self.at] != '"':
                self._piece(quoted=True)
            self.at += 1
        elif c == "`":
            start = self.at + 1
            self._to(re.compile("[^`]*`"), start)
            self.found += Script(self.text[start : self.at - 1], self._line_of(start)).commands
        elif self.text.startswith("$((", self.at) or (c == "(" and not quoted):
            self._balanced("(", ")", quoted)
        elif self.text.startswith("${", self.at):
            self._balanced("{", "}", quoted)
        elif self.text.startswith("$(", self.at):
            self.at += 2
            self.read_list(")")
        else:
            self.at += 1

    def _to(self, pattern: re.Pattern[str], start: int) -> None:
        """Behind what matches from `start` on; to the end of the text where nothing closes it."""
        match = pattern.match(self.text, start)
        self.at = match.end() if match else len(self.text)

    def _balanced(self, opening: str, closing: str, quoted: bool = False) -> None:
        """From before an opening bracket to behind the one that closes it."""
        depth = 0
        while self.at < len(self.text):
            c = self.text[self.at]
            if c in "\\'\"":
                self._piece(quoted)
                continue
            depth += (c == opening) - (c == closing)
            self.at += 1
            if c == closing and depth == 0:
                return
