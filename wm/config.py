"""Configuration: frozen dataclasses <- YAML files <- `key=value` words.

Every dataclass stands beside the code it configures and holds the defaults; the files in `conf/`
hold differences only. OmegaConf merges and checks types here and nowhere else: the rest of the
project sees frozen dataclasses.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wm import WMError
from wm.files import read_text, shipped

T = TypeVar("T")

CONF = shipped("conf")
LARGEST, DEEPEST = 2**20, 20  # of a file: characters, and levels of nesting
GROUPS = ("env", "scale")  # `env=takecover` picks conf/env/takecover.yaml


class ConfigError(WMError):
    """An unknown key, a wrong type or a value out of range."""


def bounded(default: float, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that `load` accepts only within [low, high]."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


def added(default: Any, low: float | None = None, high: float | None = None) -> Any:
    """A `bounded` field, added when there were finished stages without it: see `covered`."""
    metadata = {"low": low, "high": high, "added": True}
    return dataclasses.field(default=default, metadata=metadata)


def load(schema: type[T], words: Sequence[str], conf: Path = CONF) -> T:
    """Build `schema` from conf/config.yaml, the chosen env and scale, and `key=value` words.

    A scale file may hold a section named after a game: it applies to that game alone.

    Raises:
        ConfigError: naming the offending key and the nearest valid one.
    """
    if malformed := [word for word in words if "=" not in word]:
        raise ConfigError(f"'{malformed[0]}' is not of the form key=value")
    chosen = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in GROUPS)
    overrides = [word for word in words if word.split("=", 1)[0] not in GROUPS]
    for key in (word.split("=", 1)[0] for word in overrides):
        if key == "env.name":  # its settings are chosen with it
            raise ConfigError("a game is chosen by env=NAME, not by env.name=NAME")
        if key not in flat(plain(schema())):
            raise ConfigError(_unknown(schema, key))

    base = read_yaml(conf / "config.yaml")
    env = chosen.get("env", base.env.name)
    scale = chosen.get("scale", base.scale)
    env_layer = read_yaml(_choice(conf, "env", env))
    scale_layer = read_yaml(_choice(conf, "scale", scale))
    games = {name: scale_layer.pop(name) for name in choices(conf, "env") if name in scale_layer}
    names = OmegaConf.create({"env": {"name": env}, "scale": scale})
    layers = [base, env_layer, scale_layer, games.get(env, OmegaConf.create()), names]
    return merge(schema, *layers, dotlist(overrides))


def merge(schema: type[T], *layers: Any) -> T:
    """Merge plain or OmegaConf mappings, later ones over earlier ones, into a checked `schema`.

    Raises:
        ConfigError: naming the offending key and the nearest valid one.
    """
    tree = OmegaConf.structured(schema)
    try:
        for layer in layers:
            tree = OmegaConf.merge(tree, layer)
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(schema, error)) from None
    for key, value, low, high in _bounds(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} is not a number")
        if (low is not None and value < low) or (high is not None and value > high):
            nearest = low if low is not None and value < low else high
            raise ConfigError(
                f"{key}={value} is out of range; the nearest valid value is {nearest}"
            )
    return config


def choices(conf: Path, group: str) -> list[str]:
    """The names in a group, for instance the games under conf/env."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def plain(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts of plain values."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def covered(config: Any) -> dict[str, Any]:
    """What a fingerprint covers: `plain`, but added fields only where they are changed.

    So what was made before a field was thought of keeps its fingerprint.
    """
    tree = plain(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("added") and value == field.default:
            del tree[field.name]
        elif dataclasses.is_dataclass(value):
            tree[field.name] = covered(value)
    return tree


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys (what MLflow shows as parameters)."""
    items: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        items |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return items


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(schema: type[T], path: Path) -> T:
    """Read a resolved configuration back."""
    return merge(schema, read_yaml(path))


def read_yaml(path: Path) -> DictConfig:
    """A file of plain values, perhaps a stranger's.

    Raises:
        ConfigError: if it cannot be read or holds more than values.
    """
    try:
        text = read_text(path)
        _check_plain(text)
        tree = OmegaConf.create(text)
    except Exception as error:  # the YAML parser's own, of many classes
        raise ConfigError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"cannot read {path}: it holds no keys")
    return tree


def _check_plain(text: str) -> None:
    """Refuse tags, which may make objects, references, which may multiply until no memory is left,
    interpolations, which may read the environment, and nesting without end.
    """
    if len(text) > LARGEST:
        raise ConfigError(f"it is longer than {LARGEST} characters")
    depth = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ConfigError("it holds references or tags")
        if "${" in getattr(event, "value", ""):
            raise ConfigError("it holds interpolations")
        if depth > DEEPEST:
            raise ConfigError(f"it is nested deeper than {DEEPEST}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def dotlist(words: Sequence[str]) -> Any:
    """`key=value` words as OmegaConf's tree.

    Raises:
        ConfigError: if a value is not YAML.
    """
    try:
        return OmegaConf.from_dotlist(list(words))
    except Exception as error:  # the YAML parser's own errors, of many classes
        raise ConfigError(f"cannot read {' '.join(words)}: {one_line(error)}") from None


def _choice(conf: Path, group: str, name: str) -> Path:
    if name not in choices(conf, group):
        valid = choices(conf, group)
        nearest = (difflib.get_close_matches(str(name), valid, n=1) or valid)[0]
        raise ConfigError(
            f"{group}={name} is unknown; did you mean {nearest}? ({', '.join(valid)})"
        )
    return conf / group / f"{name}.yaml"


def _unknown(schema: type, key: str) -> str:
    """What to say of a key that is not there: the nearest of the same last word, or of all."""
    keys = list(flat(plain(schema())))
    same_leaf = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    nearest = difflib.get_close_matches(key, same_leaf or keys, n=1, cutoff=0.0)[0]
    return f"unknown key '{key}'; did you mean '{nearest}'?"


def _explain(schema: type, error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key)
    if key in flat(plain(schema())):
        return f"{key}: {str(error.msg or error).splitlines()[0]}"
    return _unknown(schema, key)


def _bounds(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _bounds(value, f"{prefix}{field.name}.")
        elif field.metadata:
            yield f"{prefix}{field.name}", value, field.metadata["low"], field.metadata["high"]
