import dataclasses
import json

import pytest

from dpal_edge.errors import ModelFileError
from dpal_edge.manifest import Artifact, FileSpec, HeadSpec, InputSpec, Manifest, Parity, Stripped


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "golden.npz").write_bytes(b"arrays")
    _manifest(folder).write(folder)
    return folder


def _manifest(folder):
    parity = Parity(
        backend="onnxruntime 1.31.1", images=8, max_abs_error=1e-5, max_rel_error=1e-6, min_cosine=1.0, tolerance=1e-3
    )
    return Manifest(
        model="vit_tiny",
        input=InputSpec(name="images", size=(256, 128), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        heads=(HeadSpec(name="embedding", task="embedding", shape=(192,)),),
        artifacts=(
            Artifact(target="onnx", precision="float32", file=FileSpec.of(folder / "model.onnx"), parity=parity),
        ),
        golden=FileSpec.of(folder / "golden.npz"),
        stripped=Stripped(parameters_before=35_000_000, parameters_after=5_500_000, removed={"decoder": 29_500_000}),
        provenance={"dpal_edge": "0.1.0", "seeds": [1, 2]},
    )


def _edit(bundle, change):
    """Rewrite the manifest of ``bundle`` after ``change`` mutated its parsed JSON."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_round_trip(bundle):
    assert Manifest.read(bundle) == _manifest(bundle)


def test_whole_numbers_are_valid_floats(bundle):
    _edit(bundle, lambda data: data["artifacts"][0]["parity"].update(max_abs_error=0))
    found = Manifest.read(bundle).artifacts[0].parity.max_abs_error
    assert found == 0.0
    assert isinstance(found, float)


def test_file_checks_the_hash(bundle):
    manifest = Manifest.read(bundle)
    assert manifest.file(bundle, manifest.golden) == bundle / "golden.npz"


def test_folder_without_manifest(tmp_path):
    with pytest.raises(ModelFileError, match=r"no manifest\.json, so not a bundle; write one with 'dpal-edge export'"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", pytest.param(b"[" * 200_000, id="deep")])
def test_not_json(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"manifest\.json: not valid JSON .*export the bundle again"):
        Manifest.read(bundle)


@pytest.mark.parametrize("content", ["[]", "{}", '{"schema": 0}', '{"schema": "2"}', "3"])
def test_wrong_schema(bundle, content):
    (bundle / "manifest.json").write_text(content)
    with pytest.raises(ModelFileError, match=r"schema (None|0|2), expected 1; export the bundle again"):
        Manifest.read(bundle)


def test_a_newer_schema_asks_for_a_newer_package(bundle):
    _edit(bundle, lambda data: data.update(schema=2, unknown=[]))
    with pytest.raises(
        ModelFileError, match=r"schema 2, expected 1: a newer dpal-edge wrote it; upgrade the one here$"
    ):
        Manifest.read(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["input"].update(size=[10**9, 10**9]), r"input: size: \(1000000000, 1000000000\) found"),
        (
            lambda data: data["input"].update(size=[256, 0]),
            r"input: size: \(256, 0\) found, expected sides of 1 or more",
        ),
        (lambda data: data["heads"][0].update(shape=[-1, 5]), r"heads: embedding: shape: \(-1, 5\) found"),
        (
            lambda data: data["heads"][0].update(shape=[1 << 24, 2]),
            r"shape: \(16777216, 2\) found, .*most 16777216; exp",
        ),
    ],
)
def test_absurd_sizes_are_refused(bundle, change, message):
    _edit(bundle, change)
    with pytest.raises(ModelFileError, match=message):
        Manifest.read(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("golden"), r"manifest\.json: lacks golden; export"),
        (lambda data: data["input"].pop("std"), r"manifest\.json: input: lacks std; export"),
        (lambda data: data.update(extra=1), r"manifest\.json: has unknown extra; export"),
        (lambda data: data.update(model=3), r"model: 3 found, expected str"),
        (lambda data: data.update(golden=[]), r"golden: \[\] found, expected an object"),
        (lambda data: data["input"].update(size=[256]), r"input: size: \[256\] found, expected tuple\[int, int\]"),
        (lambda data: data["input"].update(size=[256, 1.5]), r"input: size\[1\]: 1\.5 found, expected int"),
        (lambda data: data["heads"][0].update(labels="ab"), r"heads\[0\]: labels: 'ab' found, expected tuple"),
        (lambda data: data["golden"].update(bytes=True), r"golden: bytes: True found, expected int"),
        (lambda data: data["stripped"]["removed"].update(decoder="x"), r"removed\.decoder: 'x' found, expected int"),
        (lambda data: data["heads"].append(None), r"heads\[1\]: None found, expected an object"),
    ],
)
def test_field_that_does_not_fit_is_named(bundle, change, message):
    _edit(bundle, change)
    with pytest.raises(ModelFileError, match=message):
        Manifest.read(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_file_outside_the_bundle_is_refused(bundle, name):
    (bundle.parent / "secret").write_text("secret")
    manifest = Manifest.read(bundle)
    with pytest.raises(ModelFileError, match=f"names '{name}', a file outside the bundle; refused"):
        manifest.file(bundle, dataclasses.replace(manifest.golden, file=name))


def test_link_out_of_the_bundle_is_refused(bundle):
    (bundle.parent / "secret").write_text("secret")
    (bundle / "linked").symlink_to(bundle.parent / "secret")
    manifest = Manifest.read(bundle)
    with pytest.raises(ModelFileError, match="outside the bundle; refused"):
        manifest.file(bundle, dataclasses.replace(manifest.golden, file="linked"))


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "circle"])
def test_names_that_no_file_can_have(bundle, name):
    (bundle / "circle").symlink_to("circle")
    manifest = Manifest.read(bundle)
    with pytest.raises(ModelFileError, match="the manifest names"):
        manifest.file(bundle, dataclasses.replace(manifest.golden, file=name))


def test_a_file_of_another_size_is_not_hashed(bundle, monkeypatch):
    manifest = Manifest.read(bundle)
    monkeypatch.setattr("dpal_edge.manifest.sha256_of", lambda path: pytest.fail("it could be endless"))
    (bundle / "golden.npz").write_bytes(b"arrays and more")
    message = r"golden\.npz: damaged or replaced \(15 bytes, the manifest says 6\); copy or export the bundle again"
    with pytest.raises(ModelFileError, match=message):
        manifest.file(bundle, manifest.golden)


def test_missing_file_is_named(bundle):
    manifest = Manifest.read(bundle)
    (bundle / "golden.npz").unlink()
    with pytest.raises(ModelFileError, match=r"golden\.npz: missing, though the manifest names it; copy the whole"):
        manifest.file(bundle, manifest.golden)


def test_an_artifact_comes_with_its_data(bundle):
    manifest = Manifest.read(bundle)
    (bundle / "weights.bin").write_bytes(b"weights")
    artifact = dataclasses.replace(manifest.artifacts[0], data=(FileSpec.of(bundle / "weights.bin"),))
    dataclasses.replace(manifest, artifacts=(artifact,)).write(bundle)
    read = Manifest.read(bundle)
    assert read.artifacts == (artifact,)
    assert read.open_artifact(bundle, artifact) == bundle / "model.onnx"
    (bundle / "weights.bin").write_bytes(b"weightz")
    with pytest.raises(ModelFileError, match=r"weights\.bin: damaged or replaced"):
        read.open_artifact(bundle, artifact)


def test_a_manifest_of_another_name_in_a_folder_of_several(bundle):
    manifest = _manifest(bundle)
    other = dataclasses.replace(manifest, model="detector")
    assert other.write(bundle / "detector.json") == bundle / "detector.json"
    assert Manifest.read(bundle / "detector.json") == other
    assert Manifest.read(bundle) == manifest
    assert other.file(bundle / "detector.json", other.golden) == bundle / "golden.npz"
    with pytest.raises(ModelFileError, match="a file outside the bundle; refused"):
        other.file(bundle / "detector.json", dataclasses.replace(other.golden, file="../golden.npz"))
    with pytest.raises(ModelFileError, match=r"none\.json: no none\.json, so not a bundle"):
        Manifest.read(bundle / "none.json")


def test_manifests_without_the_newer_fields_are_read(bundle):
    def older(data):
        del data["heads"][0]["kind"], data["artifacts"][0]["data"], data["artifacts"][0]["parity"]["head"]

    _edit(bundle, older)
    assert Manifest.read(bundle) == _manifest(bundle)


def test_damaged_file_is_named(bundle):
    manifest = Manifest.read(bundle)
    (bundle / "model.onnx").write_bytes(b"grapH")
    with pytest.raises(ModelFileError, match=r"model\.onnx: damaged or replaced \(sha256 [0-9a-f]{12}, the manifest"):
        manifest.file(bundle, manifest.artifacts[0].file)
