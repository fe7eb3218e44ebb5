"""``dpal-edge install`` on a device with a fake GPU and real engines of the CPU."""

import dataclasses
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundle import SIZE, reference, write_bundle, write_detector_bundle, write_model

from dpal_edge.cli import main
from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.install.installer import install
from dpal_edge.manifest import FileSpec, Manifest
from dpal_edge.runtime.device import CpuFeatures, cpu_features
from dpal_edge.runtime.installed import Choice, read_choice, write_record
from dpal_edge.runtime.model import Model, choose_artifact

TRTEXEC = Path(__file__).parent / "fake_gpu" / "trtexec.py"
REMEDY = "a newer TensorRT is the remedy: 10.7 as a tarball for L4T, or JetPack 7 (7.2 on Orin)"


@pytest.fixture
def bundle(tmp_path):
    """Write a bundle for ONNX Runtime and for TensorRT in two precisions, with goldens of real images."""
    folder = write_bundle(tmp_path / "bundle")
    images = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3), np.uint8)
    np.savez(folder / "golden.npz", images=images, embedding=reference(images))
    manifest = Manifest.read(folder)
    [onnx] = manifest.artifacts
    built = [
        dataclasses.replace(
            onnx,
            target=f"trt-{precision}",
            file=FileSpec.of(write_model(folder / f"model.{precision}.onnx", f"in {precision}")),
        )
        for precision in ("fp16", "int8")
    ]
    golden = FileSpec.of(folder / "golden.npz")
    dataclasses.replace(manifest, artifacts=(onnx, *built), golden=golden).write(folder)
    return folder


def tried(result):
    return {(attempt.target, attempt.runner): attempt.passed for attempt in result.attempts}


def test_the_fastest_that_passes_is_used(bundle, gpu, cache):
    gpu(slow="in fp16")
    lines = []
    result = install(bundle, backend="tensorrt", say=lines.append)
    assert tried(result) == {("trt-fp16", "tensorrt"): True, ("trt-int8", "tensorrt"): True}
    assert result.chosen.target == "trt-int8"
    assert [latency.batch for latency in result.chosen.latency] == [1, 4, 8]
    fp16 = result.attempts[0]
    assert fp16.median_ms(4) > 50 > result.chosen.median_ms(4)
    [wrong] = [line for line in lines if "silently wrong" in line]
    assert (
        wrong == f"tensorrt 10.3.0 is known to build ViT engines that are silently wrong; only goldens tell; {REMEDY}"
    )
    model = Model.open(bundle)
    assert model.name == "tensorrt 10.3.0 Fake Orin"
    images = np.full((2, *SIZE, 3), 9, np.uint8)
    np.testing.assert_allclose(model.run(images)["embedding"], reference(images), rtol=1e-5)
    assert Model.open(bundle, engine="onnxruntime").name.startswith("onnxruntime")


def test_a_compiler_that_is_silently_wrong_is_found_out(bundle, gpu):
    gpu(wrong="in int8")
    result = install(bundle, backend="tensorrt", say=print)
    assert tried(result) == {("trt-fp16", "tensorrt"): True, ("trt-int8", "tensorrt"): False}
    assert result.chosen.target == "trt-fp16"
    assert "allowed 2.0e-02" in result.attempts[1].found
    assert result.attempts[1].found.endswith(f"; {REMEDY}")
    assert "remedy" not in result.attempts[0].found
    assert result.attempts[1].latency == ()


def test_what_is_wrong_within_the_allowed_error_is_found_out(bundle, gpu):
    gpu(wrong="in int8", tensorrt="10.16.1")
    manifest = Manifest.read(bundle)
    lenient = [
        dataclasses.replace(artifact, parity=dataclasses.replace(artifact.parity, tolerance=9.0))
        for artifact in manifest.artifacts
    ]
    dataclasses.replace(manifest, artifacts=tuple(lenient)).write(bundle)
    fp16, int8 = install(bundle, backend="tensorrt", say=print).attempts
    assert (fp16.passed, int8.passed) == (True, False)
    assert fp16.cosine > 0.999999 > 0.99 > int8.cosine
    assert "allowed 9.0e+00; cosine 0." in int8.found
    assert int8.found.endswith(" (embedding), least 0.9990")


def test_a_form_that_fails_when_it_is_timed_leaves_the_others(bundle, gpu):
    gpu(fails="in int8")
    result = install(bundle, backend="tensorrt", say=print)
    assert tried(result) == {("trt-fp16", "tensorrt"): True, ("trt-int8", "tensorrt"): False}
    assert result.chosen.target == "trt-fp16"
    assert [latency.batch for latency in result.chosen.latency] == [1, 4, 8]
    assert (
        "failed when it was timed with 8 at a time: tensorrt 10.3.0 Fake Orin: the engine" in result.attempts[1].found
    )
    assert result.attempts[1].latency == ()


def test_nothing_that_passes_is_not_installed(bundle, gpu):
    gpu(wrong="in ")
    result = install(bundle, backend="tensorrt", say=print)
    assert result.chosen is None
    assert "nothing was installed" in result.as_text()
    assert Model.open(bundle).name.startswith("onnxruntime")
    done = CliRunner().invoke(main, ["install", str(bundle), "--backend", "tensorrt"])
    assert (done.exit_code, "FAILED" in done.output) == (2, True)


def test_without_a_gpu_what_runs_here_is_compared(bundle):
    result = install(bundle, say=print)
    found = tried(result)
    assert found["onnx", "onnxruntime"] is True
    assert found["onnx", "openvino"] is True
    assert found["trt-int8", "tensorrt"] is None
    assert result.chosen.target == "onnx"
    refused = next(attempt for attempt in result.attempts if attempt.target == "trt-int8")
    assert "TensorRT cannot be imported" in refused.found
    assert "there is no trtexec either" in refused.found
    assert Model.open(bundle).name.startswith(result.chosen.engine)


def test_bfloat16_is_tried_where_a_cpu_has_it(bundle, monkeypatch):
    real = cpu_features()
    features = CpuFeatures(model="with bf16", cores=2, flags=("avx512_bf16",))
    monkeypatch.setattr("dpal_edge.runtime.backend.cpu_features", lambda: features)
    result = install(bundle, backend="openvino", say=print)
    assert tried(result) == {("onnx", "openvino"): True, ("onnx", "openvino bf16"): True}
    exact, fast = result.attempts
    assert exact.error <= fast.error
    assert (exact.error < fast.error) == real.fast_bf16  # elsewhere OpenVINO computes in float32 without a word
    assert (exact.allowed, fast.allowed) == (1e-3, 0.02)
    choice = Choice(target="onnx", engine="openvino", name=fast.name, precision="bf16", file=None, sha256="")
    write_record(bundle, choice, {})
    assert Model.open(bundle).name == fast.name
    assert fast.name.endswith(" cpu bf16")


def test_another_version_of_the_engine_asks_for_a_new_installation(bundle):
    assert install(bundle, backend="onnxruntime", say=print).chosen.name.startswith("onnxruntime ")
    choice = Choice(
        target="onnx", engine="onnxruntime", name="onnxruntime 0.1 cpu", precision=None, file=None, sha256=""
    )
    write_record(bundle, choice, {})
    with pytest.raises(ModelFileError, match=r"installed with onnxruntime 0\.1 cpu, here is onnxruntime .* run again"):
        Model.open(bundle)


def test_without_an_installation_an_artifact_with_an_engine_here_is_taken(bundle, monkeypatch):
    manifest = Manifest.read(bundle)
    [onnx] = [artifact for artifact in manifest.artifacts if artifact.target == "onnx"]
    other = dataclasses.replace(onnx, target="openvino-int8", file=dataclasses.replace(onnx.file, file="model.xml"))
    manifest = dataclasses.replace(manifest, artifacts=(other, onnx))
    assert choose_artifact(bundle, manifest).target == "openvino-int8"
    here = {"onnxruntime"}
    monkeypatch.setattr("dpal_edge.runtime.model.find_spec", lambda name: name if name in here else None)
    assert choose_artifact(bundle, manifest).target == "onnx"
    here.clear()
    assert choose_artifact(bundle, manifest).target == "openvino-int8"  # whose engine is then told to be missing


def test_engines_are_kept(bundle, gpu, cache):
    gpu()
    lines = []
    install(bundle, backend="tensorrt", say=lines.append)
    built = {path: path.stat().st_mtime_ns for path in (cache / "engines").glob("*.engine")}
    assert len(built) == 2
    assert (next((cache / "timing").iterdir())).read_bytes() == b"measured\n" * 2
    lines.clear()
    install(bundle, backend="tensorrt", say=lines.append)
    assert {path: path.stat().st_mtime_ns for path in built} == built
    assert [line for line in lines if "engine" in line][-1] == "trt-int8: engine from the cache"
    facts = json.loads(next(iter(built)).with_suffix(".json").read_text())
    assert facts["options"] == {"batches": [1, 8, 32], "workspace": 1 << 30, "optimization_level": 3}
    assert (facts["tensorrt"], facts["gpu"], facts["capability"]) == ("tensorrt 10.3.0", "Fake Orin", "8.7")


def test_a_damaged_engine_is_built_again_with_a_line(bundle, gpu, cache):
    gpu()
    install(bundle, backend="tensorrt", say=print)
    for path in (cache / "engines").glob("*.engine"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ModelFileError, match="the installed engine is damaged or replaced; run again: dpal-edge install"
    ):
        Model.open(bundle)
    lines = []
    assert install(bundle, backend="tensorrt", say=lines.append).chosen
    assert sum("in the cache is damaged; building it again" in line for line in lines) == 2
    assert Model.open(bundle).name.startswith("tensorrt")


def test_other_weights_of_the_same_graph_are_another_engine(bundle, gpu, cache):
    """Of a linked model, whose graph stays the same bytes."""
    manifest = Manifest.read(bundle)
    weights = bundle / "weights.safetensors"

    def pack(content):
        weights.write_bytes(content.ljust(16 << 20))
        [*_, last] = manifest.artifacts
        last = dataclasses.replace(last, data=(FileSpec.of(weights),))
        dataclasses.replace(manifest, artifacts=(last,)).write(bundle)
        lines = []
        return install(bundle, backend="tensorrt", say=lines.append), lines

    gpu(free_mib=300)
    result, _ = pack(b"first")
    assert "300 MiB of the GPU's memory are free, building model.int8.onnx takes about 352 MiB" in result.as_text()
    gpu(free_mib=4096)
    for content in (b"first", b"second"):
        _, lines = pack(content)
        assert "built in" in lines[-1]
    assert len(list((cache / "engines").glob("*.engine"))) == 2
    assert pack(b"first")[1] == [*lines[:-1], "trt-int8: engine from the cache"]


@pytest.mark.parametrize("content", [b"damaged by a crash", b"of another GPU"])
def test_timings_that_cannot_be_used_are_replaced_with_a_line(bundle, gpu, cache, content):
    gpu()
    install(bundle, backend="tensorrt", say=print)
    [timing] = (cache / "timing").iterdir()
    timing.write_bytes(content)
    for path in (cache / "engines").iterdir():
        path.unlink()
    lines = []
    assert install(bundle, backend="tensorrt", say=lines.append).chosen
    told = f"{timing.name} in the cache is damaged or of another TensorRT; kernels were timed anew"
    assert lines.count(told) == 1
    assert timing.read_bytes() == b"measured\n" * 2


def test_a_newer_tensorrt_builds_anew_with_a_line(bundle, gpu):
    gpu(tensorrt="10.3.0")
    install(bundle, backend="tensorrt", say=print)
    gpu(tensorrt="10.16.1")
    with pytest.raises(ModelFileError, match=r"expecting library version 10\.16\.1 got 10\.3\.0.*dpal-edge install"):
        Model.open(bundle)
    lines = []
    install(bundle, backend="tensorrt", say=lines.append)
    assert any("{'tensorrt': 'tensorrt 10.3.0'}, which is not this device as it is now" in line for line in lines)
    assert Model.open(bundle).name == "tensorrt 10.16.1 Fake Orin"
    gpu(tensorrt="11.4.0")
    lines.clear()
    install(bundle, backend="tensorrt", say=lines.append)
    told = (
        "model.{}.onnx was last built for {{'tensorrt': 'tensorrt 10.16.1'}}, which is not this device as it is now; "
    )
    expected = [told.format(form) + "building it" for form in ("fp16", "int8")]
    assert [line for line in lines if "was last built" in line] == expected


def test_too_little_memory_is_said_before_the_build(bundle, gpu):
    gpu(free_mib=100)
    result = install(bundle, backend="tensorrt", say=print)
    assert set(tried(result).values()) == {None}
    assert "100 MiB of the GPU's memory are free, building model.fp16.onnx takes about 256 MiB" in result.as_text()


def test_little_memory_makes_a_small_workspace(bundle, gpu, cache):
    gpu(free_mib=600)
    install(bundle, backend="tensorrt", say=print)
    engine = next((cache / "engines").glob("*.engine"))
    workspace = json.loads(engine.with_suffix(".json").read_text())["workspace_used"]
    assert 256 << 20 < workspace < 600 << 20
    assert json.loads(engine.read_bytes().split(b"\n")[1])["workspace"] == workspace


def test_records_that_cannot_be_used(bundle, gpu, cache, monkeypatch):
    gpu()
    record = Path(install(bundle, backend="tensorrt", say=print).record)
    document = json.loads(record.read_text())
    for change, text in [
        ({"schema": 99}, "schema 99, expected 2; run again: dpal-edge install"),
        ({"device": {"module": "another"}}, "installed on {'module': 'another'}, this is"),
        ({"choice": {"target": "trt-fp16"}}, "not a record of an installation"),
    ]:
        record.write_text(json.dumps({**document, **change}))
        with pytest.raises(ModelFileError, match=text.replace("{", "[{]").replace("}", "[}]")):
            Model.open(bundle)
    record.write_text(json.dumps(document))
    Path(document["choice"]["file"]).unlink()
    with pytest.raises(ModelFileError, match="the installed engine is missing; run again"):
        Model.open(bundle)


def test_a_changed_bundle_is_another_bundle(bundle, gpu):
    gpu()
    install(bundle, backend="tensorrt", say=print)
    manifest = Manifest.read(bundle)
    dataclasses.replace(manifest, provenance={"step": 2}).write(bundle)
    assert Model.open(bundle).name.startswith("onnxruntime")


def test_unknown_engines_and_damaged_bundles(bundle, gpu):
    gpu()
    with pytest.raises(BackendUnavailable, match="no engine 'caffe', expected one of: onnxruntime, openvino, tensorrt"):
        install(bundle, backend="caffe", say=print)
    (bundle / "model.int8.onnx").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"model\.int8\.onnx: damaged or replaced"):
        install(bundle, backend="tensorrt", say=print)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more"])
def test_goldens_that_cannot_be_read(bundle, content):
    (bundle / "golden.npz").write_bytes(content)
    manifest = Manifest.read(bundle)
    dataclasses.replace(manifest, golden=FileSpec.of(bundle / "golden.npz")).write(bundle)
    with pytest.raises(ModelFileError, match=r"golden\.npz: not the goldens of this bundle .*; export it again"):
        install(bundle, say=print)


@pytest.fixture
def trtexec(gpu, cudart, tmp_path, monkeypatch):
    """Put a trtexec on the path that knows TensorRT, which Python here cannot import."""
    gpu()
    monkeypatch.setattr("dpal_edge.runtime.tensorrt.import_module", _fail)
    program = tmp_path / "bin" / "trtexec"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{TRTEXEC.read_text()}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(TRTEXEC.parent))
    return monkeypatch


def _fail(name):
    raise ImportError(f"no {name}")


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0"])
def test_trtexec_builds_checks_and_times(bundle, trtexec, version):
    trtexec.setenv("FAKE_TENSORRT", version)
    lines = []
    result = install(bundle, backend="tensorrt", say=lines.append)
    assert tried(result) == {("trt-fp16", "trtexec"): True, ("trt-int8", "trtexec"): True}
    assert [latency.batch for latency in result.chosen.latency] == [1, 4, 8]
    assert result.chosen.median_ms(4) == pytest.approx(1.5)
    assert (result.record, Path(result.chosen.file).exists()) == (None, True)
    assert result.chosen.file in result.as_text()
    assert any(f"with trtexec {version}, though Python cannot run it then" in line for line in lines)
    wrong = any("silently wrong" in line for line in lines)
    assert wrong == (version == "10.3.0")
    assert Model.open(bundle).name.startswith("onnxruntime")


def test_trtexec_finds_out_what_is_wrong(bundle, trtexec):
    trtexec.setenv("FAKE_WRONG", "in int8")
    result = install(bundle, backend="tensorrt", say=print)
    assert tried(result) == {("trt-fp16", "trtexec"): True, ("trt-int8", "trtexec"): False}
    trtexec.setenv("FAKE_REFUSE", "1")
    (Path(os.environ["DPAL_EDGE_CACHE"]) / "engines").rename(bundle.parent / "gone")
    result = install(bundle, backend="tensorrt", say=print)
    assert result.chosen is None
    assert "trtexec --onnx=" in result.attempts[0].found
    assert "Error Code 10: no implementation" in result.attempts[0].found


def test_trtexec_says_what_overflows(bundle, trtexec):
    trtexec.setenv("FAKE_OVERFLOWS", "in int8")
    result = install(bundle, backend="tensorrt", say=print)
    assert tried(result) == {("trt-fp16", "trtexec"): True, ("trt-int8", "trtexec"): False}
    assert "trtexec 10.3.0: the engine gives values that are no numbers (" in result.attempts[1].found
    assert result.attempts[1].found.endswith(f"; {REMEDY}")


def test_trtexec_that_fails_when_it_times_leaves_the_other_form(bundle, trtexec):
    trtexec.setenv("FAKE_FAILS", "in int8")
    result = install(bundle, backend="tensorrt", say=print)
    assert tried(result) == {("trt-fp16", "trtexec"): True, ("trt-int8", "trtexec"): False}
    assert "failed when it was timed with 8 at a time: trtexec --loadEngine" in result.attempts[1].found
    assert result.chosen.target == "trt-fp16"


def test_a_trtexec_that_is_too_old(bundle, trtexec):
    trtexec.setenv("FAKE_TENSORRT", "8.6.2")
    result = install(bundle, backend="tensorrt", say=print)
    assert set(tried(result).values()) == {None}
    assert "; trtexec 8.6.2 is older than the strongly typed graphs" in result.attempts[0].found


def test_a_detector_is_built_for_single_frames(tmp_path, gpu, cache):
    gpu()
    finder = write_detector_bundle(tmp_path / "finder")
    manifest = Manifest.read(finder)
    [onnx] = manifest.artifacts
    dataclasses.replace(manifest, artifacts=(dataclasses.replace(onnx, target="trt-fp16"),)).write(finder)
    assert install(finder, backend="tensorrt", say=print).chosen
    [facts] = (cache / "engines").glob("*.json")
    assert json.loads(facts.read_text())["options"]["batches"] == [1, 1, 32]


def test_the_command(bundle, gpu):
    gpu()
    done = CliRunner().invoke(main, ["install", str(bundle), "--backend", "tensorrt", "--json"])
    assert done.exit_code == 0, done.output
    [found] = json.loads(done.stdout)
    assert found["chosen"]["engine"] == "tensorrt"
    assert "built in" in done.stderr


def test_the_detector_is_installed_too(bundle, monkeypatch):
    finder = write_detector_bundle(bundle.parent / "finder")
    monkeypatch.setattr("dpal_edge.runtime.detector.DEFAULT_DETECTORS", (finder,))
    done = CliRunner().invoke(main, ["install", str(bundle), "--json"])
    assert done.exit_code == 0, done.output
    people, found = json.loads(done.stdout)
    assert (people["bundle"], found["bundle"]) == (str(bundle), str(finder))
    assert read_choice(finder).engine in ("onnxruntime", "openvino")
