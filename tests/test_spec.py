"""Records that come from files: what they keep, what they refuse, and how they say so."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pydantic
import pytest

from fakes import RECORD, TRAINING
from medmim.errors import SpecError
from medmim.spec import FileSpec, ModelSpec, Percentile, VolumeSpec, WeightsSpec, Window

FILE = {"name": "model.safetensors", "sha256": "0" * 64, "size": 10}
MODEL = {
    "medmim": 1,
    "architecture": "vit_t_mae3d",
    "family": "vit",
    "args": {"img_size": [32, 48, 16], "pos_embed": "sincos", "init_values": None},
    "weights": {
        **RECORD,
        "repo": "org/name",
        "revision": "a" * 40,
        "encoder": [FILE],
        "decoder": {**FILE, "name": "decoder.safetensors"},
        "training": TRAINING,
        "evidence": [
            {"dataset": "d", "protocol": "p", "metric": "nMSE", "value": 0.2, "baselines": {"mean": 1.0}, "cases": 5}
        ],
    },
}


def changed(path: str, value):
    """MODEL with the value at a dotted path replaced, or removed for `...`."""
    data = copy.deepcopy(MODEL)
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


def test_a_model_round_trips_through_json():
    spec = ModelSpec.parse(MODEL, source="config.json")
    again = ModelSpec.parse(json.loads(json.dumps(spec.to_data())), source="config.json")
    assert again == spec
    assert again.to_data() == spec.to_data()
    assert spec.name == "vit_t_mae3d.fake"
    assert [file.name for file in spec.weights.files] == ["model.safetensors", "decoder.safetensors"]
    assert spec.weights.volume.intensity == {"CT": Window(low=-1000, high=1000), "MR": Percentile()}
    assert spec.weights.volume.spacing == (2.0, 2.0, 3.0)
    assert spec.weights.volume.modalities == ("CT", "MR")


def test_without_weights_the_name_has_no_tag():
    assert ModelSpec(architecture="vit_t_mae3d", family="vit").name == "vit_t_mae3d"


def test_unknown_keys_of_a_later_version_are_ignored():
    data = changed("weights.volume.added_later", 3)
    data["also_later"] = {}
    assert ModelSpec.parse(data, source="x") == ModelSpec.parse(MODEL, source="x")


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("medmim", 2, "medmim"),
        ("architecture", "../vit", "architecture"),
        ("architecture", "Vit", "architecture"),
        ("family", "os.path:join", "family"),
        ("args", [1], "args"),
        ("weights.tag", "a.b", "weights.tag"),
        ("weights.repo", "../evil", "weights.repo"),
        ("weights.revision", "main", "weights.revision"),
        ("weights.encoder", [], "weights.encoder"),
        ("weights.encoder.0.sha256", "0" * 63, "weights.encoder.0.sha256"),
        ("weights.encoder.0.size", 0, "weights.encoder.0.size"),
        ("weights.license", ..., "weights.license"),
        ("weights.citation", ..., "weights.citation"),
        ("weights.volume", ..., "weights.volume"),
        ("weights.volume.orientation", "RAR", "weights.volume.orientation"),
        ("weights.volume.orientation", "RA", "weights.volume.orientation"),
        ("weights.volume.spacing", [2.0, 2.0], "weights.volume.spacing.2"),
        ("weights.volume.spacing", [2.0, 2.0, 0.0], "weights.volume.spacing.2"),
        ("weights.volume.spacing", [2.0, 2.0, float("nan")], "weights.volume.spacing.2"),
        ("weights.volume.intensity", {}, "weights.volume.intensity"),
        ("weights.volume.intensity.CT", {"kind": "window", "low": 5, "high": 5}, "weights.volume.intensity.CT"),
        ("weights.volume.intensity.CT", {"kind": "code"}, "weights.volume.intensity.CT"),
        ("weights.volume.intensity.MR", {"kind": "percentile", "high": 101}, "weights.volume.intensity.MR"),
        ("weights.volume.intensity.US", {"kind": "zscore"}, "weights.volume.intensity.US"),
        ("weights.decoder_spec.kind", "os:system", "weights.decoder_spec.kind"),
        ("weights.training.steps", -1, "weights.training.steps"),
        ("weights.training.data", [], "weights.training.data"),
    ],
)
def test_impossible_values_name_the_file_and_the_field(path, value, field):
    with pytest.raises(SpecError) as error:
        ModelSpec.parse(changed(path, value), source="some/config.json")
    assert str(error.value).startswith(f"some/config.json: {field}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_not_a_mapping_is_refused(data):
    with pytest.raises(SpecError, match="top level"):
        ModelSpec.parse(data, source="x")


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "a/../../b", "..\\b", "", ".", "a\\b"])
def test_a_file_stays_inside_its_folder(name):
    with pytest.raises(SpecError, match="inside the model folder"):
        FileSpec.parse({**FILE, "name": name}, source="x")


def test_records_cannot_be_changed():
    volume = VolumeSpec(intensity={"CT": Window(low=0, high=1)})
    with pytest.raises(pydantic.ValidationError):
        volume.orientation = "LPS"


def test_weights_need_an_encoder():
    with pytest.raises(SpecError, match="encoder"):
        WeightsSpec.parse(RECORD, source="x")


def test_reading_records_needs_no_torch():
    code = "import sys, medmim.spec; assert 'torch' not in sys.modules and 'monai' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
