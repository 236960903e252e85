"""What all commands share: how a job is run, ``--json`` and ``--quiet``, and options made of settings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, TypeVar

import typer

from ..settings import Settings
from .options import Json, Quiet, option_type, read_pairs, setting
from .sink import Sink, open_sink
from .watch import Watch


T = TypeVar("T")
Command = Callable[..., None]


@dataclass(frozen=True)
class Call:
    """A command that was called.

    Attributes:
        sink: where its output goes.
        options: what it was given, by the names of its parameters, besides settings.
    """

    sink: Sink
    options: dict[str, Any]

    def run(self, job: Callable[..., T], **others: Any) -> T:
        """What a job returns that is given those of the options which it takes, over them ``others``, and watched."""
        with Watch(self.sink) as watch:
            known = self.options | {"on_stage": watch.stage, "on_progress": watch.progress}
            takes = signature(job).parameters
            return job(**{name: value for name, value in known.items() if name in takes} | others)


def with_options(
    config: type[Settings] | None = None, *names: str, panels: Mapping[str, str] | None = None
) -> Callable[[Command], Command]:
    """Makes a command for typer of a function ``(call, OPTIONS…, **settings)``.

    Added are ``--json`` and ``--quiet``, which make the sink of the :class:`Call`, and for settings ``--set`` and
    options of their own, which win over ``--set``. The function gets the settings that the user gave.

    Args:
        config: the settings.
        names: of those with an option of their own.
        panels: of the help, by the names of settings and ``set``; where there are any, the help leaves out the other
            settings.
    """

    def decorate(function: Command) -> Command:
        @wraps(function)
        def command(as_json: bool, quiet: bool, pairs: list[str] | None = None, **options: Any) -> None:
            own = {name: options.pop(name) for name in names}
            settings = read_pairs(pairs, config) if config and pairs else {}
            settings |= {name: value for name, value in own.items() if value not in (None, [])}
            function(Call(open_sink(as_json, quiet), options), **options, **settings)

        parameters = [p for p in signature(function).parameters.values() if p.name not in ("call", "settings")]
        if config:
            parameters += settings_options(config, names, panels or {})
        parameters += [keyword("as_json", Json, False), keyword("quiet", Quiet, False)]
        shown = Signature([p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters])
        vars(command)["__signature__"] = shown  # which is what typer reads
        return command

    return decorate


def settings_options(config: type[Settings], names: Sequence[str], panels: Mapping[str, str]) -> Iterator[Parameter]:
    """An option for each of the named settings, and ``--set``."""
    for name in names:
        about = setting(config, name, panel=panels.get(name), hidden=bool(panels) and name not in panels)
        yield keyword(name, Annotated[option_type(config.known()[name].annotation) | None, about])
    about = typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any setting of docs/settings.md; repeatable.",
        rich_help_panel=panels.get("set"),
    )
    yield keyword("pairs", Annotated[list[str] | None, about])


def keyword(name: str, annotation: Any, default: Any = None) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
