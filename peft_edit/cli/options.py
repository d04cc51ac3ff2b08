"""Commands made from functions: each field of a dataclass that a function takes is an option of its command."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache, reduce
from inspect import Parameter, Signature, signature
from operator import or_
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..arguments import Argument, ArgumentError, Note, alternatives, check_value, choices_of, hints_of
from ..files import resolved
from ..plugin import register
from .listing import command_name
from .values import NONE, help_of, kind_of, parse, shown_type, to_json, to_text


class Fields:
    """Which fields of a dataclass a command takes, where they are not all, in `Annotated[kind, Fields(...)]`.

    Args:
        names: of the fields.
        of: the dataclass, where the parameter is a dict of the fields' values: the function makes the instance.
        changes: name of a field to what differs from its metadata here. "default" and "type" replace the field's own.

    Metadata of a field:
        help: one line.
        option: the option where it is not called as the field is, "--layers"; without dashes, a positional argument.
        positional: True for an argument without dashes of the field's name.
        arguments: what functions that the command calls name it otherwise, for their errors.
        negatable: True for a flag that is off by default and can be written `--no-flag`.
        repeated: True for an option that may be repeated.
        secret: True for what no result records.
        last: True for an option that `--help` shows after those of the command's own.
        output: True for a file or folder that the command writes. Recipes keep these, and know what a step reads.
        minimum, maximum, above, allowed, remedy: see `check_options`.
    """

    def __init__(self, *names: str, of: type | None = None, changes: Mapping[str, Mapping[str, Any]] | None = None):
        self.names, self.of, self.changes = names, of, dict(changes or {})


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        name: as keys of files and of results have it, "store_dtype".
        flag: as the command line has it, "--store-dtype"; of a positional argument its name.
        parameter: of the function.
        field: of the dataclass that the parameter takes; None where the parameter is the value itself.
        hint, default, metadata: as declared; MISSING for what must be given.
    """

    name: str
    flag: str
    parameter: str
    field: str | None
    hint: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def is_positional(self) -> bool:
        return not self.flag.startswith("-")

    @property
    def is_output(self) -> bool:
        return bool(self.metadata.get("output"))

    @property
    def is_secret(self) -> bool:
        return bool(self.metadata.get("secret"))

    @property
    def off(self) -> str | None:
        """How a flag is switched off; None where it cannot be."""
        can = kind_of(self.hint) is bool and (self.default is True or self.metadata.get("negatable"))
        return f"--no-{self.flag.removeprefix('--')}" if can else None

    def check(self, value: Any, name: str) -> None:
        """Raise ArgumentError, which calls it by a name, unless a value that was given is as declared."""
        hint = self.hint
        if not choices_of(hint):  # None cannot be given
            hint = reduce(or_, (kind for kind in alternatives(hint) if kind is not NoneType))
        check_value(name, value, hint, self.metadata)

    def answers_to(self, name: str) -> bool:
        """Whether functions may call it by this name."""
        return name == (self.field or self.parameter) or name in self.metadata.get("arguments", ())


@dataclass(frozen=True)
class Run:
    """A command that runs. A function that takes one records with its results how they were made.

    Attributes:
        command: its name.
        options: all, as JSON values, by name; a file of them repeats the command.
        spell: how an argument is written here.
    """

    command: str
    options: Mapping[str, Any]
    spell: Callable[[Argument], str] = str

    def record(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Results with the command and its options."""
        return {"command": self.command, "options": dict(self.options), **results}

    def tell(self, note: object) -> str:
        """A note, or a warning, as it is written here."""
        note = note.args[0] if isinstance(note, Warning) and note.args else note
        return note.message(self.spell) if isinstance(note, Note) else str(note)


@cache
def options_of(function: Callable) -> tuple[Option, ...]:
    """The options of a function's command: positional arguments, its own options, and those that are last."""
    hints = get_type_hints(function, include_extras=True)
    options: list[Option] = []
    for parameter in signature(function).parameters.values():
        options += _options_of_parameter(parameter, hints[parameter.name])
    repeated = {option.name for option in options if [other.name for other in options].count(option.name) > 1}
    if repeated:
        raise TypeError(f"{function.__name__} has the option {min(repeated)} twice")
    return tuple(sorted(options, key=lambda option: (not option.is_positional, bool(option.metadata.get("last")))))


def _options_of_parameter(parameter: Parameter, hint: Any) -> Iterator[Option]:
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    kind = get_args(hint)[0] if extras else hint
    wanted = next((extra for extra in extras if isinstance(extra, Fields)), Fields())
    holder = wanted.of or kind
    if holder is Run:
        return
    if not dataclasses.is_dataclass(holder):
        metadata = next(extra for extra in extras if isinstance(extra, Mapping))
        default = MISSING if parameter.default is Parameter.empty else parameter.default
        yield _option(parameter.name, None, kind, default, metadata)
        return
    fields = {field.name: field for field in dataclasses.fields(holder)}
    for name in wanted.names or fields:
        changes = wanted.changes.get(name, {})
        default = fields[name].default
        if fields[name].default_factory is not MISSING:
            default = fields[name].default_factory()
        yield _option(
            parameter.name,
            name,
            changes.get("type") or hints_of(holder)[name],
            changes.get("default", default),
            {**fields[name].metadata, **changes},
        )


def _option(parameter: str, field: str | None, hint: Any, default: Any, metadata: Mapping[str, Any]) -> Option:
    name = field or parameter
    flag = metadata.get("option") or (name if metadata.get("positional") else f"--{name.replace('_', '-')}")
    return Option(flag.removeprefix("--").replace("-", "_"), flag, parameter, field, hint, default, metadata)


def spelling(options: Sequence[Option]) -> Callable[[Argument], str]:
    """How a command writes an argument: as its option, else as Python does."""

    def spell(argument: Argument) -> str:
        called = [option for option in options if option.answers_to(argument.name)]
        called += [option for option in options if option.name == argument.name]
        return (called and _spelt(called[0], argument)) or str(argument)

    return spell


def _spelt(option: Option, argument: Argument) -> str | None:
    if not argument.has_value:
        return option.flag
    value, kind = argument.value, kind_of(option.hint, option.metadata)
    if kind is bool:
        return {True: option.flag, False: option.off}.get(value)
    if option.is_positional:
        return None
    if value is None:
        return f"{option.flag} {NONE}" if None in choices_of(option.hint) else None
    return f"{option.flag} {shlex.quote(to_text(value))}"


@dataclass(frozen=True)
class Bound:
    """A command with values for its options, which are checked.

    Attributes:
        function: of the command.
        arguments: that it is called with.
    """

    function: Callable
    arguments: Mapping[str, Any]

    def run(self) -> None:
        self.function(**self.arguments)


def bind(
    function: Callable, options: Sequence[Option], texts: Mapping[str, Any], spell: Callable[[Argument], str] = str
) -> Bound:
    """A command with its options.

    Args:
        function: see `command`.
        options: all of the command.
        texts: name of each option to its value as the command line has it, see `default_text`.
        spell: how an argument is written there.

    Raises:
        ArgumentError: an option has a value that it cannot have, or that does not go with others.
    """
    values = _values(options, texts)
    for o in options:
        if values[o.name] != o.default:
            o.check(values[o.name], o.field or o.parameter)
    _check_apart(options, values)
    run = Run(command_name(function.__name__), as_recorded(options, texts), spell)
    return Bound(function, _arguments(function, options, values, run))


def as_recorded(options: Sequence[Option], texts: Mapping[str, Any]) -> dict[str, Any]:
    """A command's options as results record them, see `bind`."""
    values = _values(options, texts)
    return {o.name: to_json(values[o.name], o.hint, o.metadata) for o in options if not o.is_secret}


def _values(options: Sequence[Option], texts: Mapping[str, Any]) -> dict[str, Any]:
    return {o.name: parse(texts[o.name], o.hint, o.name, o.metadata) for o in options}


def default_text(option: Option) -> Any:
    """An option's default as the command line would give it; None where there is none, and MISSING where one must be
    given."""
    default = option.default
    return default if default in (MISSING, None) or kind_of(option.hint) is bool else to_text(default)


def command(function: Callable, elsewhere: Callable[[], Sequence[Option]] = tuple) -> Callable:
    """What typer makes the command of a function of: it parses the options, and calls the function with them.

    Args:
        function: each parameter is a dataclass (or some of its `Fields`), a `Run`, or a value that is annotated with
            metadata as those of fields, `Annotated[Path, {"help": "Folder.", "positional": True}]`.
        elsewhere: gives the options of other commands. An error that advises one of their values, which this command
            lacks, is about them: `collect with --tokens answer`.
    """
    options = options_of(function)
    own = spelling(options)

    def spell(argument: Argument) -> str:
        spelt = own(argument)
        return spelling(elsewhere())(argument) if spelt == str(argument) and argument.has_value else spelt

    def run(context: typer.Context, config: str | None = None, **texts: Any) -> None:
        try:
            bound = bind(function, options, texts, spell)
            register()
            bound.run()
        except ArgumentError as error:
            raise ValueError(error.message(spell)) from error

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    parameters = [
        Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *map(_typer_parameter, options),
        _config_parameter(options),
    ]
    run.__signature__ = Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _check_apart(options: Sequence[Option], values: Mapping[str, Any]) -> None:
    """Raise ArgumentError where results would be written into, or over, what the command reads or makes."""
    results = values.get("json")
    for option in options if results is not None else ():
        place = values[option.name]
        if option.is_positional and isinstance(place, (str, Path)) and str(place):
            place, target = resolved(Path(place)), resolved(Path(results))
            if target == place or place in target.parents:
                raise ArgumentError(
                    Argument("json"),
                    f" {results} is, or lies in, the {option.name} {values[option.name]}: choose another path",
                )


def _arguments(function: Callable, options: Sequence[Option], values: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """What a function is called with."""
    arguments: dict[str, Any] = {}
    for parameter, hint in get_type_hints(function, include_extras=True).items():
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        mine = {option.field: values[option.name] for option in options if option.parameter == parameter}
        if kind is Run:
            arguments[parameter] = run
        elif mine:
            arguments[parameter] = mine[None] if None in mine else kind(**mine)
    return arguments


def _typer_parameter(option: Option) -> Parameter:
    """The parameter from which typer makes an option. Its value is text, a flag, or a list: `parse` reads it."""
    kind, default = kind_of(option.hint, option.metadata), default_text(option)
    declared: dict[str, Any] = {
        "help": help_of(option.hint, option.metadata),
        "show_default": default not in (MISSING, None),
    }
    if kind is bool:
        annotation: Any = bool
    else:
        annotation = list[str] | None if kind == "repeated" else str | None
    if option.is_positional:
        annotation, info = Path if kind is Path else str, typer.Argument(**declared)
    else:
        if kind is not bool:
            declared["metavar"] = f"<{shown_type(option.hint, option.metadata)}>"
        info = typer.Option(f"{option.flag}/{option.off}" if option.off else option.flag, **declared)
    default = Parameter.empty if default is MISSING else default
    return Parameter(option.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info])


def _config_parameter(options: Sequence[Option]) -> Parameter:
    def take(context: typer.Context, file: str | None) -> str | None:
        from .config_file import read_config

        if file is not None:
            context.default_map = {**(context.default_map or {}), **read_config(Path(file), options)}
        return file

    told = "YAML file of options, named without their dashes. What is given here goes before it."
    info = typer.Option("--config", is_eager=True, callback=take, help=told, metavar="<path>")
    return Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, info])
