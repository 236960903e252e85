"""Options that several commands share, and those that are made of settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml

from ..data.names import data_folder, model_folder
from ..errors import ConfigError, one_line
from ..runtime.launch import check_device
from ..settings import N_M, PruneConfig, Settings, check_seed


V = TypeVar("V")


def checked(check: Callable[[Any], object]) -> Callable[[V], V]:
    """A callback that refuses a value, or any of several, while the command line is read."""

    def callback(value: V) -> V:
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            check(each)
        return value

    return callback


Model = Annotated[
    str,
    typer.Argument(
        help="Hub id or folder of a transformers or timm image classifier.", callback=checked(model_folder)
    ),
]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Hub ids or folders; the first is what others are compared with.",
        callback=checked(model_folder),
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and the object of --json).")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", callback=checked(check_device))]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew, where the last run of this was broken off.")]
DataSplit = Annotated[str, typer.Option(help="Split of --data.")]
Labelled = Annotated[
    str, typer.Option(help="Labelled images: Hub data set, image folder or parquet.", callback=checked(data_folder))
]
EvalData = Annotated[
    str | None, typer.Option(help="Labelled images to measure accuracy on.", callback=checked(data_folder))
]
EvalSplit = Annotated[str, typer.Option(help="Split of --eval-data.")]
Output = Annotated[Path, typer.Option(help="Folder for the result.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the Hub private.")]
Seed = Annotated[int, typer.Option(help="Of the choice of images.", callback=checked(check_seed))]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting of docs/settings.md; may be repeated."),
]


def setting(config: type[Settings], name: str, *names: str, panel: str | None = None, hidden: bool = False) -> Any:
    """The option of a setting, which is None where the user leaves it to the job: help and default are the field's.

    Args:
        config: the settings.
        name: of one of them.
        names: of the option, where it is not ``--name``.
        panel: of the help.
        hidden: from the help.
    """
    field = (config.own() | config.known())[name]
    text = " ".join((field.description or "").split()).replace("``", "")
    default: str | bool = not field.is_required() and field.default not in (None, ()) and str(field.default)
    if config is PruneConfig and name in N_M:
        default = f"{N_M[name]} for N:M, else {default}"
    return typer.Option(*names, help=text, show_default=default, rich_help_panel=panel, hidden=hidden)


def given(**settings: Any) -> dict[str, Any]:
    """Those that the user gave; the others keep the defaults of the job."""
    return {name: value for name, value in settings.items() if value is not None}


def settings_from(config: Settings, pairs: list[str] | None, path: Path | None = None, **own: Any) -> dict[str, Any]:
    """What the user changes of settings: by a file, over it by ``--set``, over these by options of their own.

    Args:
        config: the settings before that.
        pairs: the values of ``--set``.
        path: the file.
        own: values of options, None where they were not given.

    Raises:
        ConfigError: what cannot be read; in the file, what is no setting or out of range.
    """
    settings = {} if path is None else read_settings(path, config)
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if name not in config.known():
            raise config.unknown(name)
        if not equals:
            raise ConfigError(f"--set {pair!r}: expected NAME=VALUE.", "As in --set damping=1e-3.")
        settings[name] = read_yaml(text, f"--set {pair!r}")
    return settings | given(**own)


def read_settings(path: Path, config: Settings) -> dict[str, Any]:
    """Settings from a YAML file: one mapping, by their names.

    Raises:
        ConfigError: unreadable, no mapping, or a setting that is unknown or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Settings file {path} cannot be read: {one_line(error)}", "Expected YAML.") from error
    settings = read_yaml(text, f"Settings file {path}")
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError(
            f"Settings file {path}: expected a mapping of settings, got {type(settings).__name__}.",
            "One setting a line, as in `k: 5`.",
        )
    try:
        for name in settings:
            if name not in config.known():
                raise config.unknown(name)
        config.updated(**settings)
    except ConfigError as error:
        raise ConfigError(
            f"Settings file {path}: {error.message[0].lower()}{error.message[1:]}", error.remedy
        ) from error
    return settings


def read_yaml(text: str, what: str) -> Any:
    """
    Raises:
        ConfigError: no YAML.
    """
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML has errors of many kinds, for dates that are none and numbers too long for one
        raise ConfigError(f"{what} cannot be read: {one_line(error)}", "Expected YAML.") from error
