"""What every command has: options made of a stage's dataclass, and a help page in sections that fit
80 columns.

A stage's options class holds each name, type and default; a command adds how a field appears. The
class is imported when its command is parsed or its help is asked for, so that `pipeline --help`
needs none.
"""

from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import click

from pipeline.errors import EXIT_INTERRUPTED
from pipeline.machine import meeting

# A field's line of help, or what differs from its own name and type as click calls it, and `flag`.
Shown = str | dict[str, Any]
PATH = click.Path(path_type=Path)  # a shell completes the names of files
METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


class Argument(click.Argument):
    """A positional argument with a line of help, which click has from 8.5 on."""

    def __init__(self, *names: Any, help: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.explanation = help


class Page(click.Command):
    """A command under a heading of `pipeline --help`, its help ending in an `example` to copy."""

    def __init__(self, *names: Any, group: str = "Commands", example: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.heading, self.example = group, example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_lines(formatter, "Example", self.example.splitlines())


class Command(Page):
    """A command that runs. `options` names the class that its fields, as `shown`, and their values
    make, as package.module:Class; `on_ranks`, whether torchrun or srun may start it on several
    nodes.
    """

    def __init__(
        self, *names: Any, options: str = "", shown: dict[str, Shown] | None = None, on_ranks: bool = False,
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(*names, **settings)
        self.options, self.shown, self.on_ranks = options, shown or {}, on_ranks

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        # Every page and parse of click asks for the parameters here first.
        if self.shown:
            entries = {entry.name: entry for entry in fields(resolve_name(self.options))}
            self.params[:0] = [parameter_of(entries[name], shown) for name, shown in self.shown.items()]
            self.shown = {}
        return super().get_params(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # for the name of the help page
            raise
        if self.options and not ctx.resilient_parsing:  # a shell that completes has half a command line
            ctx.params = self._with_options(ctx.params)
        return rest

    def _with_options(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The fields of the options class as one parameter, `options`, and the others as they are."""
        kind, others, values = resolve_name(self.options), parameters.copy(), {}
        for entry in fields(kind):
            value = others.pop(entry.name, None)
            # None stands for an option that was not given: the class's default holds.
            if value is not None:
                values[entry.name] = list(value) if get_origin(entry.type) is list else value
        return {"options": kind(**values), **others}

    def parse(self, arguments: Iterable[str]) -> dict[str, Any]:
        """The parameters that the command's function would be called with."""
        parameters: dict[str, Any] = self.make_context(f"pipeline {self.name}", list(arguments)).params
        return parameters

    def invoke(self, ctx: click.Context) -> Any:
        if self.on_ranks:
            # Before a stage imports torch, which takes minutes from a shared disk.
            meeting.check_nodes()
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = self.get_params(ctx)
        arguments = [(p.human_readable_name, p.explanation) for p in parameters if isinstance(p, Argument)]
        options = [p.get_help_record(ctx) for p in parameters if isinstance(p, click.Option)]
        for title, rows in (("Arguments", arguments), ("Options", [row for row in options if row])):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=26)


class Group(Page, click.Group):
    """Commands under headings, none of their lines truncated."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Nothing, `help` and `help COMMAND` ask for a page too.
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] in ([], ["help"]) else args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line first, into log files too
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[str]] = {}
        for name, command in self.commands.items():
            if command.hidden:
                continue
            assert isinstance(command, Page) and command.help
            groups.setdefault(command.heading, []).append(f"{name:<12} {command.help.splitlines()[0]}")
        for heading, lines in groups.items():
            write_lines(formatter, heading, lines)
        click.Command.format_options(self, ctx, formatter)


def write_lines(formatter: click.HelpFormatter, title: str, lines: Iterable[str]) -> None:
    """A section of a help page, its lines as they are: none is wrapped."""
    with formatter.section(title):
        for line in lines:
            formatter.write(f"  {line}".rstrip() + "\n")


def parameter_of(entry: "Field[Any]", shown: Shown) -> click.Parameter:
    """A field of an options class as click has it: of a list, an option that may be given several
    times, or the command's argument if it has no default.
    """
    kind, many = _type_of(entry.type)
    required = entry.default is entry.default_factory  # both MISSING
    settings: dict[str, Any] = {"type": PATH if kind is Path else kind, "metavar": METAVARS.get(kind)}
    settings |= {"required": required} | ({"help": shown} if isinstance(shown, str) else shown)
    if many and required:
        return Argument([entry.name], nargs=-1, **settings)
    names = [settings.pop("flag", "--" + entry.name.replace("_", "-")), entry.name]
    if not settings["required"] and kind is not bool and entry.default not in (None, "", (), MISSING):
        default = f"{entry.default:_}" if isinstance(entry.default, int) else entry.default
        settings["help"] += f" [default: {default}]"
    # With is_flag=False click would take an option without its value.
    return click.Option(names, **({"is_flag": True} if kind is bool else {"multiple": many}) | settings)


def _type_of(annotation: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several."""
    if isinstance(annotation, UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    if get_origin(annotation) in (list, tuple):
        return get_args(annotation)[0], True
    return annotation, False
