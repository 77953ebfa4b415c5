"""The catalog and what outside code adds to it; all of it without torch."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

import medmim
from fakes import RECORD
from medmim import hub
from medmim.checkpoints import SHARD_BYTES
from medmim.errors import SpecError, UnknownModelError
from medmim.factory import DECODERS

WEIGHTS = {
    **RECORD,
    "repo": "org/name",
    "revision": "a" * 40,
    "encoder": [{"name": "model.safetensors", "sha256": "0" * 64, "size": 10}],
}


class Outside:
    """Stands for an architecture of somebody else."""

    def __init__(self, width=3):
        self.width = width


@pytest.fixture
def filled(registry):
    """A registry with three more models: two sizes of one family, the larger with two sets of weights."""
    registry.register_model("conv_10", cls=Outside, family="conv", tags=["simmim"])
    second = {**copy.deepcopy(WEIGHTS), "tag": "second"}
    registry.register_model(
        "conv_9", family="conv", args={"width": 9}, tags=["mae", "cnn"], weights=[WEIGHTS, second], description="nine"
    )
    registry.register_model("conv_9a", family="conv")
    return registry


# --- importing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["medmim.list_models()", "medmim.list_pretrained()", "medmim.is_model('vit_t_mae3d')", "dir(medmim)"]
)
def test_listing_imports_nothing_heavy(code):
    heavy = {"torch", "monai", "timm", "pydantic", "numpy", "huggingface_hub"}
    check = f"import sys, medmim; {code}; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_public_name_is_there_and_known_to_editors():
    for name in medmim.__all__:
        assert getattr(medmim, name) is not None
        assert name in dir(medmim)
    tree = ast.parse(inspect.getsource(medmim))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"medmim.{module}" for name, module in medmim._MODULE_OF.items()}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = medmim.no_such_name
    assert (Path(medmim.__file__).parent / "py.typed").is_file()  # without it type checkers take all of it for Any


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert medmim.__version__ == project["version"]


# --- the catalog ------------------------------------------------------------------------------------------------------


def test_the_catalog_has_the_vits_of_the_paper():
    sizes = {"t": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
    for size, (width, depth, heads) in sizes.items():
        for suffix, patch in (("", 16), ("_p8", 8)):
            args = medmim.model_info(f"vit_{size}_mae3d{suffix}").args
            assert (args["embed_dim"], args["depth"], args["num_heads"]) == (width, depth, heads)
            assert args["patch_size"] == (patch,) * 3
            assert args["img_size"] == (96, 96, 96)
            assert args["in_chans"] == 1


@pytest.mark.parametrize("name", medmim.list_models())
def test_every_entry_is_whole(name, registry):
    info = medmim.model_info(name)
    assert info.name == name
    assert info.description
    assert "\n" not in info.description
    family = registry.find_family(info.family, needed_by=name)
    assert set(info.args) <= set(inspect.signature(family.cls).parameters)
    assert len({weights.tag for weights in info.weights}) == len(info.weights)


@pytest.mark.parametrize("name", medmim.list_pretrained())
def test_every_set_of_weights_is_whole(name):
    (weights,) = medmim.model_info(name).weights
    assert re.fullmatch(r"[A-Za-z0-9.+-]+", weights.license)
    assert re.fullmatch(r"@\w+\{[\w:-]+,.+\}\s*", weights.citation, re.DOTALL)
    assert weights.citation.count("{") == weights.citation.count("}")
    assert all(file.size <= SHARD_BYTES + 1_000_000 for file in weights.files)
    assert (weights.decoder is None) == (weights.decoder_spec is None)
    assert weights.decoder_spec is None or weights.decoder_spec.kind in DECODERS
    assert (weights.repo is None) == (weights.revision is None)
    packaged = hub.PACKAGED / name
    assert packaged.is_dir() or weights.repo is not None
    if packaged.is_dir():
        spec, _ = hub.read_model(hub.Folder(packaged))
        assert spec.name == name
        assert spec.weights == weights.model_copy(update={"repo": None, "revision": None})


def test_a_catalog_file_gives_families_models_and_weights(registry, monkeypatch, tmp_path):
    catalog = {
        "family": {"class": "medmim.spec:Window", "args": {"numerator": 3, "sides": [1, 2, 3]}},
        "models": {
            "half": {"description": "d", "args": {"denominator": 2}, "weights": ["fake"]},
            "other": {"description": "d", "args": {"numerator": 4}},
        },
    }
    (tmp_path / "number.toml").write_text(tomli_w.dumps(catalog))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/half.fake.toml").write_text(tomli_w.dumps(WEIGHTS))
    monkeypatch.setattr(registry, "CATALOG", tmp_path)
    registry._catalog.cache_clear()
    try:
        assert medmim.list_models() == ["half", "other"]
        assert medmim.list_pretrained() == ["half.fake"]
        assert medmim.model_info("half").args == {"numerator": 3, "sides": (1, 2, 3), "denominator": 2}
        assert medmim.model_info("other").args["numerator"] == 4
        assert medmim.model_info("half").weights[0].repo == "org/name"
        assert registry.find_family("number", needed_by="half").cls.__name__ == "Window"
        assert registry.find_family("number", needed_by="half").adapt is None
    finally:
        registry._catalog.cache_clear()


def test_records_and_tags_of_the_catalog_are_the_same(registry):
    assert {path.stem for path in (registry.CATALOG / "weights").iterdir()} == set(medmim.list_pretrained())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**WEIGHTS, "revision": "main"}, "catalog/weights/m.fake.toml: revision"),
        ({**WEIGHTS, "tag": "other"}, "catalog/weights/m.fake.toml: its tag is 'other'"),
        (None, "m.fake.toml: cannot be read"),
    ],
)
def test_a_bad_record_of_the_catalog_is_refused_when_it_is_asked_for(record, message, registry, monkeypatch, tmp_path):
    catalog = {"family": {"class": "medmim.spec:Window"}, "models": {"m": {"description": "d", "weights": ["fake"]}}}
    (tmp_path / "bad.toml").write_text(tomli_w.dumps(catalog))
    (tmp_path / "weights").mkdir()
    if record is not None:
        (tmp_path / "weights/m.fake.toml").write_text(tomli_w.dumps(record))
    monkeypatch.setattr(registry, "CATALOG", tmp_path)
    registry._catalog.cache_clear()
    try:
        assert medmim.list_pretrained() == ["m.fake"]
        with pytest.raises(SpecError, match=re.escape(message)):
            medmim.model_info("m")
    finally:
        registry._catalog.cache_clear()


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"filter": "conv_*"}, ["conv_9", "conv_9a", "conv_10"]),
        ({"filter": ["conv_9*", "vit_t_mae3d"]}, ["conv_9", "conv_9a", "vit_t_mae3d"]),
        ({"filter": "conv_*", "exclude_filters": "*9*"}, ["conv_10"]),
        ({"filter": "conv_*", "exclude_filters": ["*a", "*0"]}, ["conv_9"]),
        ({"filter": "conv_*", "tags": "mae"}, ["conv_9"]),
        ({"filter": "conv_*", "tags": ["mae", "simmim"]}, []),
        ({"filter": "conv_*", "pretrained": True}, ["conv_9"]),
        ({"filter": "conv"}, []),
        ({"filter": "vit_?_mae3d"}, ["vit_b_mae3d", "vit_l_mae3d", "vit_s_mae3d", "vit_t_mae3d"]),
    ],
)
def test_list_models(filled, arguments, expected):
    assert medmim.list_models(**arguments) == expected


@pytest.mark.parametrize("filter", ["conv_9", "conv_*", "conv_9.*", ["*.fake", "conv_9.second"]])
def test_list_pretrained(filled, filter):
    assert medmim.list_pretrained(filter) == ["conv_9.fake", "conv_9.second"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("vit_t_mae3d", True),
        ("conv_9", True),
        ("conv_9.fake", True),
        ("conv_9.other", False),
        ("conv_9.", False),
        ("conv_10.fake", False),
        ("nothing", False),
        ("vit_*", False),
        ("", False),
    ],
)
def test_is_model(filled, name, known):
    assert medmim.is_model(name) is known


def test_model_info(filled):
    info = medmim.model_info("conv_9")
    assert (info.name, info.family, info.description, info.tags) == ("conv_9", "conv", "nine", ("mae", "cnn"))
    assert [weights.tag for weights in info.weights] == ["fake", "second"]
    assert [weights.tag for weights in medmim.model_info("conv_9.second").weights] == ["second"]
    info.args["width"] = 0
    assert medmim.model_info("conv_9").args == {"width": 9}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_t_mae", "there is no model 'vit_t_mae'; nearest: vit_t_mae3d"),
        ("resnet50", "there is no model 'resnet50'; medmim.list_models() has all"),
        ("conv_9.fak", "conv_9 has no weights tagged 'fak'; it has: fake, second"),
        ("conv_10.fake", "conv_10 has no weights tagged 'fake'; it has none yet"),
    ],
)
def test_a_wrong_name_gets_the_right_ones(filled, name, message):
    with pytest.raises(UnknownModelError, match=re.escape(message)):
        medmim.model_info(name)


# --- registering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_t_mae3d", {"family": "vit"}, "exists already"),
        ("conv_9", {"cls": Outside}, "exists already"),
        ("new", {"cls": Outside, "family": "vit"}, "family 'vit' exists already"),
        ("new", {"cls": Outside, "family": "conv"}, "family 'conv' exists already"),
        ("new", {}, "family= that exists, or a cls="),
        ("New", {"cls": Outside}, "cannot name a model"),
        ("a.b", {"cls": Outside}, "cannot name a model"),
        ("new", {"cls": Outside, "family": "a:b"}, "cannot name a family"),
        ("new", {"cls": Outside, "args": [9]}, "register_model('new'): args must be arguments by name, not [9]"),
        ("new", {"cls": Outside, "tags": 3}, "filters and tags are texts"),
        ("new", {"cls": Outside, "weights": [WEIGHTS, WEIGHTS]}, "same tag"),
        ("new", {"cls": Outside, "weights": [{**WEIGHTS, "license": None}]}, "register_model('new'): license"),
    ],
)
def test_what_cannot_be_registered_is_refused_and_leaves_nothing(filled, name, arguments, message):
    before = medmim.list_models()
    with pytest.raises(SpecError, match=re.escape(message)):
        medmim.register_model(name, **arguments)
    assert medmim.list_models() == before
    with pytest.raises(UnknownModelError):
        filled.find_family("new", needed_by="x")


def test_an_unknown_family_names_the_known_ones(filled):
    with pytest.raises(
        UnknownModelError, match=r"new: there is no model family 'nofamily'; this medmim knows: conv, .*vit"
    ):
        medmim.register_model("new", family="nofamily")


def test_a_family_is_named_after_its_first_model(registry):
    medmim.register_model("alone", cls=Outside, tags="cnn")  # one tag, not three letters
    assert medmim.list_models(tags="cnn") == ["alone"]
    assert medmim.model_info("alone").family == "alone"
    assert registry.find_family("alone", needed_by="x").cls is Outside
