"""Bounds on what files from strangers may cost, name, run or print; one test for each harm that was possible."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch

import medmim
from fakes import TINY
from medmim import hub, registry
from medmim.checkpoints import read_tensors
from medmim.cli.terminal import Terminal
from medmim.construction import limited_construction
from medmim.convert.dynamic_network_architectures import from_unet_decoder
from medmim.errors import LONGEST, MedmimError, ScanError, SpecError, WeightsError
from medmim.limits import read_text
from medmim.spec import FileSpec, VolumeSpec, WeightsSpec, Window
from medmim.transforms import to_grid
from medmim.volumes import Volume, load_volume
from medmim_training.checkpoint import load_latest, save_checkpoint
from medmim_training.recipe import load_recipe
from medmim_training.record import MetricsLog
from medmim_training.store.index import Store, open_array, write_array
from medmim_training.store.sources import find_sources
from parsers import PARSERS, SHAPE, nifti

# --- what is printed --------------------------------------------------------------------------------------------------


def test_an_error_is_one_printable_line():
    error = MedmimError("a\x1b]0;title\x07\nb \u202e\ud800c")
    assert str(error) == "a\\x1b]0;title\\x07 b \\u202e\\ud800c"
    assert len(str(MedmimError("x" * 10 * LONGEST))) < LONGEST + 10


def test_the_terminal_shows_names_as_they_are():
    out = io.StringIO()
    Terminal(file=out, width=200).print("[bold]a[/] [link=x]b[/link] \x1b[31mred\x07\nline")
    assert out.getvalue() == "[bold]a[/] [link=x]b[/link] \\x1b[31mred\\x07\nline\n"


# --- models -----------------------------------------------------------------------------------------------------------


def config_of(folder, **args):
    data = {"architecture": "vit_t_mae3d", "family": "vit", "args": {**TINY["vit"], **args}}
    (folder / "config.json").write_text(json.dumps(data))
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    "args",
    [
        {"depth": 10**9},
        {"depth": 10**6},
        {"depth": 10_000},
        {"embed_dim": 10**9},
        {"embed_dim": 600_000, "num_heads": 1},
        {"img_size": [10**9] * 3},
        {"img_size": [800_000, 16_000, 8]},
        {"num_registers": 10**6, "embed_dim": 60_000},
        {"mlp_ratio": 1e300},
        {"drop_path_rate": float("nan")},
        {"patch_size": [0, 0, 0]},
        {"patch_size": [-8, 16, 8]},
        {"depth": "2"},
        {"depth": True},
        {"depth": None},
        {"img_size": [[32], 48, 16]},
        {"img_size": "abc"},
        {"pos_embed": ["sincos"]},
        {"init_values": [[[[[[1.0]]]]]]},
        {"num_heads": list(range(5_000))},
    ],
    ids=str,
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_absurd_arguments_are_refused_before_they_cost_anything(args, pretrained, tmp_path):
    with pytest.raises(SpecError):
        medmim.create_model(config_of(tmp_path, **args), pretrained)


def test_an_argument_of_another_type_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"config.json of .*: num_heads: Input should be a valid integer"):
        medmim.create_model(config_of(tmp_path, num_heads="2"))


def test_the_decoder_is_bounded_too(tiny_folder):
    folder, _ = tiny_folder
    config = json.loads((folder / "config.json").read_text())
    config["weights"]["decoder_spec"]["args"]["depth"] = 10**6
    (folder / "config.json").write_text(json.dumps(config))
    model = medmim.create_model(f"local-dir:{folder}", pretrained=True)
    with pytest.raises(SpecError, match="modules"):
        medmim.create_decoder(model)


def test_what_is_built_elsewhere_is_not_counted():
    with limited_construction("x"):
        pass
    with torch.device("meta"):
        assert torch.nn.Linear(100_000, 100_000).weight.numel() > 5_000_000_000


def test_a_model_is_built_while_another_thread_builds_one(tiny_folder):
    from torch.nn.modules.module import register_module_module_registration_hook

    def load(owner, key, child):
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                pool.submit(medmim.from_pretrained, tiny_folder[0]).result()

    # Torch goes on to the second one after a model was loaded meanwhile.
    hooks = [register_module_module_registration_hook(hook) for hook in (load, lambda owner, key, child: None)]
    try:
        torch.nn.Sequential(torch.nn.Identity())
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("size", [16_000, (16_000, 16_000, 16_000), (1008, 1008, 960)])
def test_an_input_that_no_scan_fills_is_refused(size):
    with pytest.raises(SpecError, match=r"more than 1000000000 voxels|more numbers in buffers"):
        medmim.create_model("vit_t_mae3d", img_size=size, patch_size=4)


@pytest.mark.parametrize("name", ["CON", "nul.safetensors", "a/com1.txt", "C:model", "a b", "model.", "a\x1bb", "é"])
def test_a_file_name_means_the_same_everywhere(name):
    with pytest.raises(SpecError, match="inside the model folder"):
        FileSpec.parse({"name": name, "sha256": "0" * 64, "size": 1}, source="x")


def test_two_files_differ_by_more_than_case():
    files = [{"name": name, "sha256": "0" * 64, "size": 1} for name in ("model.safetensors", "Model.safetensors")]
    record = {"tag": "t", "license": "x", "citation": "x", "volume": {"intensity": {"MR": {"kind": "zscore"}}}}
    with pytest.raises(SpecError, match="same name"):
        WeightsSpec.parse({**record, "encoder": files}, source="x")


def test_links_out_of_a_model_folder_are_not_followed(tiny_folder, tmp_path):
    folder, _ = tiny_folder
    outside = tmp_path / "outside"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(WeightsError, match="leads out of the model folder"):
        medmim.create_model(f"local-dir:{folder}", pretrained=True)


def test_links_of_the_cache_and_of_an_installer_are_followed(tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blob, shared = repository / "snapshots" / "abc", repository / "blobs" / "1", tmp_path / "hub" / "blobs"
    for folder in (snapshot, blob.parent, shared):
        folder.mkdir(parents=True)
    (shared / "2").write_text("x")
    blob.symlink_to(shared / "2")
    (snapshot / "config.json").symlink_to(blob)
    assert hub.Folder(snapshot).find("config.json") is not None
    (snapshot / "other.json").symlink_to("/etc/hostname")
    with pytest.raises(WeightsError, match="leads out"):
        hub.Folder(snapshot).find("other.json")
    assert hub.Installed(snapshot).find("other.json") is not None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(WeightsError, match=r"no config\.json"):
        hub.read_model(hub.Folder(tmp_path))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 90_000_000])
def test_a_header_of_absurd_length_is_not_read(length, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        read_tensors([tmp_path / "x.safetensors"])


@pytest.mark.parametrize(
    "header",
    [
        {key: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for key, at in (("a", 0), ("b", 4))},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**12]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"__metadata__": {"format": 3}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        read_tensors([tmp_path / "x.safetensors"])


def test_a_catalog_names_no_code_but_our_own(tmp_path):
    (tmp_path / "x.toml").write_text('[family]\nclass = "os:system"\n[models]\n')
    with pytest.raises(SpecError, match="must be code of medmim"):
        registry.read_catalog(tmp_path / "x.toml")


def test_a_layer_number_of_any_length_is_refused():
    with pytest.raises(WeightsError, match=r"decoder\.seg_layers\.999"):
        from_unet_decoder({f"decoder.seg_layers.{'9' * 5_000}.weight": torch.zeros(1)})


# --- scans ------------------------------------------------------------------------------------------------------------


def changed_header(**fields) -> bytes:
    content = bytearray(nifti())
    header = nib.Nifti1Header(bytes(content[:348]))
    for key, value in fields.items():
        header[key] = value
    content[:348] = header.binaryblock
    return bytes(content)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": [3, 32_000, 32_000, 32_000, 1, 1, 1, 1]}, "claims 32768000000000 voxels"),
        ({"dim": [3, 900, 1000, 1000, 1, 1, 1, 1]}, "claims 900000000 voxels, a file of this size holds"),
        ({"vox_offset": 1e30}, "claims"),
        ({"dim": [3, -4, -5, 6, 1, 1, 1, 1]}, None),
        ({"srow_x": [1e38, 0, 0, 0]}, "not usable"),
        ({"srow_x": [1e-30, 0, 0, 0]}, "not usable"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "not usable"),
    ],
    ids=str,
)
def test_a_header_that_claims_too_much_is_refused(suffix, fields, message, tmp_path):
    content = changed_header(**fields)
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    with pytest.raises(ScanError, match=message):
        load_volume(path)


def test_extensions_of_a_scan_are_not_unpacked(tmp_path):
    # An extension of length 0 made nibabel read all there is.
    content = bytearray(changed_header(vox_offset=80_000_000))
    content[348:352] = b"\1\0\0\0"
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bytes(content) + bytes(60_000_000), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(ScanError):
        load_volume(tmp_path / "bomb.nii.gz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize(
    ("name", "line", "other", "message"),
    [
        ("NRRD, header", b"data file: file.raw", b"data file: ../file.raw", "another folder"),
        ("NRRD, header", b"data file: file.raw", b"data file: /etc/passwd", "another folder"),
        ("NRRD, header", b"data file: file.raw", b"data file: LIST\nfile.raw", "several files"),
        ("NRRD, header", b"data file: file.raw", b"data file: %n%s.raw 1 3 1", "several files"),
        ("NRRD, header", b"data file: file.raw", b"data file: none.raw", "missing"),
        ("NRRD", b"type: unsigned short", b"type: " + b"x" * 4_000, "a field has"),
        ("NRRD", b"sizes: 4 5 6", b"sizes: 40000 50000 60000", "claims"),
        ("MetaImage, header", b"file.raw", b"/etc/passwd", "another folder"),
        ("MetaImage, header", b"file.raw", b"x" * 4_000, "cannot be read"),
        ("MetaImage", b"ElementDataFile = LOCAL", b"ElementDataFile = ../scan.raw", "another folder"),
        ("MetaImage", b"DimSize = 4 5 6", b"DimSize = 900 1000 1000", "claims 900000000 voxels, a file"),
        ("MetaImage", b"ElementSpacing = 1 2 3", b"ElementSpacing = 0 2 3", None),
    ],
)
def test_a_header_reads_no_other_folder_and_claims_no_more_than_it_has(name, line, other, message):
    parser = PARSERS[name]
    content = parser.example()
    assert line in content
    with pytest.raises(ScanError, match=message):
        parser(content.replace(line, other))


def test_a_scan_much_smaller_than_a_voxel_of_the_grid_is_refused():
    volume = Volume(np.zeros((1, 40, 50, 60), np.float32), np.diag([1e-4, 1.0, 1.0, 1.0]))
    spec = VolumeSpec(spacing=(2.0, 2.0, 2.0), intensity={"MR": Window(low=0, high=1)})
    with pytest.raises(ScanError, match="too small a volume"):
        to_grid(volume, spec)


def test_a_name_that_no_file_can_have_is_refused():
    for name in ("x" * 5_000 + ".nii", "a\0b.nii", "\ud800.nii"):
        with pytest.raises(ScanError):
            load_volume(name)


# --- training ---------------------------------------------------------------------------------------------------------


def test_aliases_of_a_recipe_are_not_unfolded(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(SpecError, match="aliases are not read"):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("text", ["seed: 2026-99-99", "seed: " + "9" * 5_000, "[" * 600, "!!python/name:os.system"])
def test_yaml_that_trips_its_reader_is_refused(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    for name, overrides in ((str(tmp_path / "r.yaml"), []), ("small/vit_t_mae3d", [f"seed={text[6:]}"])):
        with pytest.raises(SpecError):
            load_recipe(name, overrides)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "", ".", "a" * 200])
def test_the_id_of_a_stored_volume_is_no_path(name, tmp_path):
    (tmp_path / "store.json").write_bytes(PARSERS["store"].example())
    entry = json.loads(PARSERS["store index"].example().splitlines()[0])
    (tmp_path / "index.jsonl").write_text(json.dumps({**entry, "id": name}) + "\n")
    with pytest.raises(SpecError, match=r"index.jsonl:1: id"):
        Store(tmp_path)


def test_an_array_that_is_not_what_the_index_says_is_refused(tmp_path):
    write_array(tmp_path, "a", np.zeros((1, *SHAPE), np.float32))
    path = tmp_path / "volumes" / "a.b2nd"
    assert open_array(path, (1, *SHAPE)).shape == (1, *SHAPE)
    with pytest.raises(SpecError, match="is not the volume of shape"):
        open_array(path, (1, 4, 5, 7))
    with pytest.raises(SpecError, match="cannot be opened"):
        open_array(tmp_path / "volumes" / "b.b2nd", (1, *SHAPE))


def test_an_array_that_holds_code_is_not_opened(tmp_path, monkeypatch):
    a = blosc2.asarray(np.zeros((1, *SHAPE)), urlpath=str(tmp_path / "a.b2nd"))
    (a + 1).save(urlpath=str(tmp_path / "code.b2nd"))
    monkeypatch.setattr(blosc2, "open", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(SpecError, match="something else than numbers"):
        open_array(tmp_path / "code.b2nd", (1, *SHAPE))


def test_numbers_that_read_like_code_are_numbers(tmp_path):
    noise = bytearray(np.random.default_rng(0).bytes(2 * 16**3))  # nothing to compress, so it is stored as it is
    noise[100:104] = b"\xa3b2o"
    array = np.frombuffer(noise, np.int16).reshape(1, 16, 16, 16)
    write_array(tmp_path, "a", array)
    path = tmp_path / "volumes" / "a.b2nd"
    assert b"\xa3b2o" in path.read_bytes()
    assert np.array_equal(open_array(path, array.shape)[:], array)


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    state = {"step": 1, "best": 0.0, "spent": {}, "method": {}, "optimizer": {}}
    save_checkpoint(tmp_path, 1, state, keep=1, best=False)
    assert load_latest(tmp_path) == state
    path = tmp_path / "step-00000001.pt"
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)
    with pytest.raises(WeightsError, match="compressed"):
        load_latest(tmp_path)
    torch.save([1], path)
    with pytest.raises(WeightsError, match="lacks"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"modality,file\nCT\n", "row 1 has no file"),
        ("a.csv", b"file\n" + b"x" * 200_000, "not readable as CSV"),
        ("a.csv", b"file\n\xff", "UTF-8"),
        ("a.json", b'{"training": 3}', "must list"),
        ("a.json", b"[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_data_list_that_is_none_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=message):
        find_sources(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'file,group\r\n"scän.nii.gz",g\r\n'),
        ("a.json", '{"training": ["scän.nii.gz"]}'),
        ("dataset.json", '{"training": ["scän.nii.gz"]}'),
    ],
)
def test_a_data_list_saved_by_a_spreadsheet_is_read(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8-sig", newline="")
    assert [source.name for source in find_sources(tmp_path / name)] == ["scän.nii.gz"]


def test_a_text_has_no_mark_of_a_spreadsheet(tmp_path):
    (tmp_path / "a.yaml").write_text("name: x", encoding="utf-8-sig")
    assert read_text(tmp_path / "a.yaml", 100) == "name: x"


@pytest.mark.parametrize("line", ['{"step": "a"}', "{}", "{x}", '{"step": 1, "loss": []}'])
def test_metrics_that_are_none_are_refused(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n')
    with pytest.raises(SpecError, match=r"metrics.jsonl:2"):
        MetricsLog(tmp_path / "metrics.jsonl", 5)
