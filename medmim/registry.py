"""Which models there are: the catalog that ships with medmim, and what code outside it registers.

A name is `architecture` or `architecture.tag`; the tag names a set of weights, the first one listed is the default.
In the catalog a file for each family lists its models with their tags, and `weights/NAME.toml` is the record of a set
of weights, which is read only when somebody asks for it. Nothing here imports torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from medmim.errors import SpecError, UnknownModelError
from medmim.limits import CONFIG_BYTES, plain_arguments, read_text

if TYPE_CHECKING:
    from medmim.spec import WeightsSpec

CATALOG = Path(__file__).parent / "catalog"
PACKAGED = Path(__file__).parent / "weights"  # those that came with this medmim; a wheel has the small ones alone

ALL_MODELS = "medmim.list_models() has all, and so has `medmim list`"  # for errors, in Python or on a command line

_OWN_CODE = re.compile(r"medmim(?:\.\w+)+:\w+")
# medmim.spec has the same rules; importing it would cost every listing pydantic.
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAG = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass(frozen=True)
class Family:
    """What builds the models of one family.

    Attributes:
        cls: The constructor. All arguments are given by keyword and are plain data.
        adapt: `adapt(state, model, source_args) -> state`, which fits weights saved from a model built with
            `source_args` to a model of another input size, patch size or number of channels; None if none can be.
    """

    cls: Callable[..., Any]
    adapt: Callable[..., Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What the registry knows about a model.

    Attributes:
        name: The architecture, without a tag.
        family: The family that builds it; `config.json` names it too.
        description: One line.
        args: Arguments of the constructor.
        tags: Words to filter by, such as "mae".
        weights: The sets of weights, the default one first; the named one alone where a tag was asked for.
    """

    name: str
    family: str
    description: str
    args: Mapping[str, Any]
    tags: tuple[str, ...]
    weights: tuple[WeightsSpec, ...]


@dataclass(frozen=True)
class _Entry:
    """A model as the catalog has it: by tag, its weights are still plain data, or the file that has them."""

    family: str
    description: str
    args: Mapping[str, Any]
    tags: tuple[str, ...]
    weights: Mapping[str, Mapping[str, Any] | Path]


_registered_models: dict[str, _Entry] = {}
_registered_families: dict[str, Family] = {}


# --- asking -----------------------------------------------------------------------------------------------------------


def list_models(
    filter: str | Iterable[str] = "*",
    *,
    exclude_filters: str | Iterable[str] = (),
    tags: str | Iterable[str] = (),
    pretrained: bool = False,
) -> list[str]:
    """Names of architectures, in natural order.

    Args:
        filter: Wildcards, one or several of which must match: "vit_*", ["vit_t*", "vit_s*"].
        exclude_filters: Wildcards none of which may match.
        tags: Words all of which the model must carry, such as "mae".
        pretrained: Lists only architectures that have weights.
    """
    filter, exclude, tags = _several(filter), _several(exclude_filters), _several(tags)
    return sorted(
        (
            name
            for name, entry in _models().items()
            if _matches(name, filter)
            and not _matches(name, exclude)
            and set(tags) <= set(entry.tags)
            and (entry.weights or not pretrained)
        ),
        key=_natural,
    )


def list_pretrained(filter: str | Iterable[str] = "*") -> list[str]:
    """Full names, `architecture.tag`, of all weights; the wildcards match the full name or the architecture."""
    filter = _several(filter)
    return sorted(
        (
            f"{name}.{tag}"
            for name, entry in _models().items()
            for tag in entry.weights
            if _matches(name, filter) or _matches(f"{name}.{tag}", filter)
        ),
        key=_natural,
    )


def is_installed(name: str) -> bool:
    """Whether weights, by their full name, came with this medmim; others are taken from a hub, if they are there."""
    return (PACKAGED / name).is_dir()


def is_model(name: str) -> bool:
    """Whether `architecture` or `architecture.tag` is known."""
    architecture, separator, tag = name.partition(".") if isinstance(name, str) else ("", "", "")
    entry = _models().get(architecture)
    return entry is not None and (not separator or tag in entry.weights)


def model_info(name: str) -> ModelInfo:
    """Everything known about a model.

    Args:
        name: `architecture`, or `architecture.tag` for one set of weights alone.

    Raises:
        UnknownModelError: With the nearest names, or the tags that exist.
        SpecError: For a weights record that says something impossible.
    """
    if not isinstance(name, str):
        raise UnknownModelError(f"a name of a model is text, not of type {type(name).__name__}; {ALL_MODELS}")
    architecture, separator, tag = name.partition(".")
    entry = _models().get(architecture)
    if entry is None:
        raise UnknownModelError(f"there is no model {architecture!r}; {nearest(architecture, _models())}{ALL_MODELS}")
    if separator and tag not in entry.weights:
        tags = ", ".join(entry.weights)
        raise UnknownModelError(
            f"{architecture} has no weights tagged {tag!r}; " + (f"it has: {tags}" if tags else "it has none yet")
        )
    weights = tuple(
        read_weights(architecture, each, record)
        for each, record in entry.weights.items()
        if not separator or each == tag
    )
    return ModelInfo(architecture, entry.family, entry.description, dict(entry.args), entry.tags, weights)


def find_family(name: str, *, needed_by: str) -> Family:
    """What builds the models of a family; imports it.

    Args:
        name: The family.
        needed_by: The model or file that names it, for the error.

    Raises:
        UnknownModelError: With the families that exist.
    """
    if name in _registered_families:
        return _registered_families[name]
    families, _ = _catalog()
    if name not in families:
        known = ", ".join(sorted({*families, *_registered_families}))
        raise UnknownModelError(f"{needed_by}: there is no model family {name!r}; this medmim knows: {known}")
    paths = families[name]
    return Family(resolve_name(paths["class"]), resolve_name(paths["adapt"]) if "adapt" in paths else None)


# --- registering ------------------------------------------------------------------------------------------------------


def register_model(
    name: str,
    *,
    family: str | None = None,
    cls: Callable[..., Any] | None = None,
    adapt: Callable[..., Mapping[str, Any]] | None = None,
    args: Mapping[str, Any] | None = None,
    description: str = "",
    tags: str | Sequence[str] = (),
    weights: Sequence[WeightsSpec | Mapping[str, Any]] = (),
) -> None:
    """Adds a model from outside this repository: a variant of a known family, or a class of your own.

    Args:
        name: `[a-z][a-z0-9_]*`, not taken yet.
        family: The known family that it is a variant of; with `cls`, the name of a new family (default: `name`).
        cls: The constructor, for a new family (see `Family`); it follows the model contract of the encoders here.
        adapt: Fits weights to other sizes, for a new family (see `Family`).
        args: Arguments of the constructor.
        description: One line.
        tags: Words to filter by.
        weights: Sets of weights, the default one first.

    Raises:
        SpecError: For a name that is taken or impossible, or weights records that are, and for args that have no names.
        UnknownModelError: For an unknown family without `cls`.
    """
    from medmim.spec import WeightsSpec

    for what, word in (("model", name), ("family", family or name)):
        if not isinstance(word, str) or not _NAME.fullmatch(word):
            raise SpecError(f"{word!r} cannot name a {what}: use lower-case letters, digits and _, a letter first")
    if name in _models():
        raise SpecError(f"a model {name!r} exists already; choose another name")
    if cls is None:
        if family is None:
            raise SpecError(f"{name} needs a family= that exists, or a cls= that builds it")
        find_family(family, needed_by=name)
    elif (family or name) in {*_catalog()[0], *_registered_families}:
        raise SpecError(f"a model family {family or name!r} exists already; choose another name")
    source, words = f"register_model({name!r})", tuple(_several(tags))
    records = [data if isinstance(data, WeightsSpec) else WeightsSpec.parse(data, source=source) for data in weights]
    if len({record.tag for record in records}) < len(records):
        raise SpecError(f"{source}: two sets of weights have the same tag")
    if not isinstance(args or {}, Mapping):
        raise SpecError(f"{source}: args must be arguments by name, not {args!r}")
    if cls is not None:
        _registered_families[family or name] = Family(cls, adapt)
    _registered_models[name] = _Entry(
        family=family or name,
        description=description,
        args=as_arguments(args or {}),
        tags=words,
        weights={record.tag: record.to_data() for record in records},
    )


# --- reading the catalog ----------------------------------------------------------------------------------------------


@cache
def _catalog() -> tuple[dict[str, Mapping[str, str]], dict[str, _Entry]]:
    """Families (import paths of their class and adapter) and models of the TOML files, one family a file."""
    families, models = {}, {}
    for path in sorted(CATALOG.glob("*.toml")):
        families[path.stem], entries = read_catalog(path)
        models |= entries
    return families, models


def read_catalog(path: Path) -> tuple[Mapping[str, Any], dict[str, _Entry]]:
    """One file of the catalog: its family, and its models by name; records of weights are not read.

    Raises:
        SpecError: For what is no TOML, and for what is missing or of another type than it must be.
    """
    source = f"catalog/{path.name}"
    data = _read_toml(path, source)
    family = _require(data, "family", dict, source)
    for key in ("class", "adapt"):
        if key in family and not _OWN_CODE.fullmatch(_require(family, key, str, source)):
            raise SpecError(f"{source}: {key} {family[key]!r} must be code of medmim; use register_model for your own")
    _require(family, "class", str, source)
    shared = _require(family, "args", dict, source, {})
    models = {}
    for name, model in _require(data, "models", dict, source).items():
        if not _NAME.fullmatch(name) or not isinstance(model, dict):
            raise SpecError(f"{source}: {name!r} must be a name of lower-case letters, digits and _, and a table")
        where = f"{source}: {name}"
        args = {**shared, **_require(model, "args", dict, where, {})}
        try:
            args = as_arguments(plain_arguments(args))
        except ValueError as error:
            raise SpecError(f"{where}: args: {error}") from None
        sets = _require(model, "weights", list, where, [])
        if not all(isinstance(tag, str) and _TAG.fullmatch(tag) for tag in sets):
            raise SpecError(f"{where}: weights must be tags, of lower-case letters, digits and _")
        weights = {tag: path.parent / "weights" / f"{name}.{tag}.toml" for tag in sets}
        tags = tuple(_require(model, "tags", list, where, []))
        if not all(isinstance(tag, str) for tag in tags):
            raise SpecError(f"{where}: tags must be words")
        models[name] = _Entry(path.stem, _require(model, "description", str, where), args, tags, weights)
    return family, models


def read_weights(architecture: str, tag: str, record: Mapping[str, Any] | Path) -> WeightsSpec:
    """The record of a set of weights, from plain data or from its file in the catalog.

    Raises:
        SpecError: For what is no TOML, and for a record that says something impossible.
    """
    from medmim.spec import WeightsSpec

    if not isinstance(record, Path):
        return WeightsSpec.parse(record, source=f"weights {tag!r} of {architecture}")
    source = f"catalog/weights/{record.name}"
    weights = WeightsSpec.parse(_read_toml(record, source), source=source)
    if weights.tag != tag:
        raise SpecError(f"{source}: its tag is {weights.tag!r}; a record is called after its model and its tag")
    return weights


def _read_toml(path: Path, source: str) -> dict[str, Any]:
    text = read_text(path, CONFIG_BYTES)
    try:
        return tomllib.loads(text)
    # A number of too many digits is a ValueError too.
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{source}: not readable as TOML ({error})") from None


def _require(table: Mapping[str, Any], key: str, kind: type, source: str, default: Any = None) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind):
        raise SpecError(f"{source}: {key} must be {'a table' if kind is dict else f'a {kind.__name__}'}")
    return value


def _models() -> dict[str, _Entry]:
    return {**_catalog()[1], **_registered_models}


def as_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments from TOML or JSON, which have lists where constructors take tuples."""
    return {key: _as_tuple(value) for key, value in args.items()}


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list | tuple) else value


# --- names ------------------------------------------------------------------------------------------------------------


def nearest(word: str, known: Collection[str]) -> str:
    """The known words most like `word`, as a clause for an error message ("nearest: a, b; "); "" if none is alike."""
    import difflib

    alike = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(alike)}; " if alike else ""


def _several(words: str | Iterable[str]) -> list[str]:
    several = [words] if isinstance(words, str) or not isinstance(words, Iterable) else list(words)
    if not all(isinstance(word, str) for word in several):
        raise SpecError(f"filters and tags are texts, or lists of them, not {words!r}")
    return several


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _natural(name: str) -> list[str | int]:
    # re.split with a group alternates text and digits, so that only like is compared with like.
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
