"""What every command has: options made of a stage's dataclass, and a help page in sections that fit
80 columns.

A stage's options class holds each name, type and default; what is written here is how a field
appears on the command line. The class is imported when its command is parsed or its help is asked
for, so that `pipeline --help` needs none.
"""

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import click

from pipeline.errors import EXIT_INTERRUPTED

Rows = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Shown:
    """How a field of the options appears: its help, and what differs from the field's own name and
    type.
    """

    help: str
    flag: str = ""  # by default the field's name
    metavar: str | None = None
    kind: Any = None  # a type of click, or a function from text to value
    is_argument: bool = False
    is_required: bool = False  # although the field has a default


class Argument(click.Argument):
    """A positional argument with a line of help, which only recent releases of click know."""

    def __init__(self, name: str, metavar: str, help: str, **settings: Any) -> None:
        super().__init__([name], metavar=metavar, **settings)
        self.explanation = help


class Command(click.Command):
    """A command of one group of `pipeline --help`.

    The first line of `help` is its line there. `sections` give more of its own page; `example` is a
    command to copy.
    """

    def __init__(
        self, name: str, *, group: str = "", example: str = "", options: Callable[[], type] | None = None,
        shown: dict[str, Shown] | None = None, sections: Callable[[], Iterable[tuple[str, Rows]]] = tuple, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(name, **settings)
        self.heading, self.example, self.sections = group, example, sections
        self.options, self.shown = options, shown or {}
        self._from_options: list[click.Parameter] = []

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        # Every page and parse of click asks for the parameters here first.
        if self.options is not None and not self._from_options:
            by_name = {entry.name: entry for entry in fields(self.options())}
            self._from_options = [parameter_of(by_name[name], shown) for name, shown in self.shown.items()]
            self.params = [*self._from_options, *self.params]
        return super().get_params(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # for the name of the help page
            raise

    def options_from(self, parameters: dict[str, Any]) -> Any:
        """The options class filled by name from those of the parsed `parameters` that were
        given.
        """
        assert self.options is not None
        kind = self.options()
        types = {entry.name: entry.type for entry in fields(kind)}
        # None stands for an option that was not given: the class's default holds.
        given = {name: value for name, value in parameters.items() if name in types and value is not None}
        return kind(**{name: list(v) if get_origin(types[name]) is list else v for name, v in given.items()})

    def parse(self, arguments: Iterable[str]) -> dict[str, Any]:
        """What the command makes of its arguments, without running it."""
        parameters: dict[str, Any] = self.make_context(f"pipeline {self.name}", list(arguments)).params
        return parameters

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command's function with its parameters; where it has options, with those as one
        object first.
        """
        if self.options is None or self.callback is None:
            return super().invoke(ctx)
        options = self.options_from(ctx.params)
        return self.callback(options, **{name: v for name, v in ctx.params.items() if name not in self.shown})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = self.get_params(ctx)
        arguments = [(p.metavar or "", p.explanation) for p in parameters if isinstance(p, Argument)]
        options = [p.get_help_record(ctx) for p in parameters if isinstance(p, click.Option)]
        for title, rows in (("Arguments", arguments), ("Options", [row for row in options if row])):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=26)
        for title, more in self.sections():
            with formatter.section(title):
                for name, text in more:  # a line each, so that `grep` finds a key with all that is said of it
                    formatter.write(f"  {name:<24} {text}".rstrip() + "\n")
        write_example(formatter, self.example)


class Group(click.Group):
    """Commands under headings, none of their lines truncated; without a command it shows its
    help.
    """

    def __init__(self, *arguments: Any, group: str = "", example: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.subcommand_metavar = "COMMAND ..."
        self.heading, self.example = group, example

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line first, into log files too
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            heading = getattr(command, "heading", "") or "Commands"
            groups.setdefault(heading, []).append((name, (command.help or "").splitlines()[0]))
        for title, rows in groups.items():
            with formatter.section(title):
                for name, text in rows:
                    formatter.write(f"  {name:<12} {text}\n")
        click.Command.format_options(self, ctx, formatter)
        write_example(formatter, self.example)


def write_example(formatter: click.HelpFormatter, example: str) -> None:
    if example:
        with formatter.section("Example"):
            for line in example.splitlines():
                formatter.write(f"  {line}\n")


def parameter_of(entry: "Field[Any]", shown: Shown) -> click.Parameter:
    """A field of an options class as click has it: of a list, an option that may be given several
    times.
    """
    kind, many = _type_of(entry.type)
    if shown.kind is not None:
        kind, many = shown.kind, False
    required = shown.is_required or entry.default is entry.default_factory  # both MISSING
    if shown.is_argument:
        nargs = -1 if many else 1
        return Argument(entry.name, shown.metavar or "", shown.help, nargs=nargs, required=required, type=kind)
    names = [shown.flag or "--" + entry.name.replace("_", "-"), entry.name]
    if kind is bool:
        return click.Option(names, is_flag=True, help=shown.help)
    shows_default = not required and not many and entry.default not in (None, "", ())
    note = f" [default: {_text(entry.default)}]" if shows_default else ""
    metavar = shown.metavar or {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(kind)
    return click.Option(names, help=shown.help + note, type=kind, multiple=many, required=required, metavar=metavar)


def _type_of(annotation: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several."""
    if isinstance(annotation, UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    if get_origin(annotation) in (list, tuple):
        return get_args(annotation)[0], True
    return annotation, False


def _text(default: Any) -> str:
    return f"{default:_}" if isinstance(default, int) else str(default)
