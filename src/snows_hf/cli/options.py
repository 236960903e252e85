"""Options that several commands share, and those that are made of settings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
import yaml

from ..data.names import data_folder, model_folder
from ..errors import ConfigError, one_line
from ..runtime.launch import check_device
from ..settings import ALPS, PruneConfig, Settings, check_seed


V = TypeVar("V")


def checked(check: Callable[[Any], object]) -> Callable[[V], V]:
    """A callback that refuses a value, or any of several, while the command line is read."""

    def callback(value: V) -> V:
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            check(each)
        return value

    return callback


def model_argument(help: str, metavar: str | None = None) -> Any:
    """An argument that is a model, or several."""
    return typer.Argument(help=help, metavar=metavar, callback=checked(model_folder))


def images_option(help: str, **more: Any) -> Any:
    """An option that is a data set."""
    return typer.Option(help=help, callback=checked(data_folder), **more)


Model = Annotated[str, model_argument("Hub id or folder of a vision model of transformers or timm.")]
Models = Annotated[
    list[str], model_argument("Hub ids or folders; the first is what others are compared with.", "MODEL...")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", callback=checked(check_device))]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew, where the last run of this was broken off.")]
DataSplit = Annotated[str, typer.Option(help="Split of --data.")]
Images = Annotated[str, images_option("Images: Hub data set, image folder or parquet.")]
Labelled = Annotated[str, images_option("Labelled images: Hub data set, image folder or parquet.")]
EvalData = Annotated[str | None, images_option("Labelled images to measure accuracy on.")]
EvalSplit = Annotated[str, typer.Option(help="Split of --eval-data.")]
Output = Annotated[Path, typer.Option(help="Folder for the result.")]
Drawn = Annotated[int, typer.Option(help="Images to draw.")]
Seed = Annotated[int, typer.Option(help="Of the choice of images.", callback=checked(check_seed))]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the Hub private.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and the object of --json).")]


def setting(config: type[Settings], name: str, panel: str | None = None, hidden: bool = False) -> Any:
    """The option of a setting, which is None where the user leaves it to the job: help and default are the field's.

    Args:
        config: the settings.
        name: of one of them.
        panel: of the help.
        hidden: from the help.
    """
    field = (config.own() | config.known())[name]
    text = " ".join((field.description or "").split()).replace("``", "")
    default: str | bool = not field.is_required() and field.default not in (None, ()) and str(field.default)
    if config is PruneConfig and name in ALPS:
        default = f"for N:M and in ViTs {ALPS[name]}; else {default}"
    return typer.Option(help=text, show_default=default, rich_help_panel=panel, hidden=hidden)


def option_type(kind: Any) -> Any:
    """What typer is to read for a field of this annotation, besides None: text for a choice, a list for names."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return str
    return list[str] if origin is tuple else option_type(parts[0]) if parts else kind


def read_pairs(pairs: Sequence[str], config: type[Settings]) -> dict[str, Any]:
    """The settings of ``--set``; names, of layers say, may come as in YAML or with commas between.

    Raises:
        ConfigError: no setting, or no value that can be read.
    """
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in config.known():
            raise config.unknown(name)
        if not equals:
            raise ConfigError(f"--set {pair!r}: expected NAME=VALUE.", "As in --set damping=1e-3.")
        several = option_type(config.known()[name].annotation) == list[str] and not text.startswith("[")
        settings[name] = [part.strip() for part in text.split(",")] if several else read_yaml(text, f"--set {pair!r}")
    return settings


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
        fault = f"{error.message[0].lower()}{error.message[1:]}"
        raise ConfigError(f"Settings file {path}: {fault}", error.remedy) from error
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
