import pytest

from dpal_edge.runtime.device import cpu_features, gpus, jetson

SAPPHIRE_RAPIDS = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu vme sse2 avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
bugs\t\t: spectre_v1

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu vme sse2 avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
bugs\t\t: spectre_v1
"""
CASCADE_LAKE = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: avx2 avx512f avx512_vnni\n"
HASWELL = "processor\t: 0\nmodel name\t: i5-4590\nflags\t\t: avx2 fma\n"
ORIN = """\
processor\t: 0
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes sha1 crc32 atomics fphp asimdhp asimddp uscat ilrcpc flagm
CPU implementer\t: 0x41
CPU part\t: 0xd42
"""
THOR = "processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm bf16 dgh\nCPU part\t: 0xd83\n"


def _board(root, *, model=None, release=None):
    """Lay out the files by which a board tells what it is, under ``root``."""
    for name, text in (("proc/device-tree/model", model), ("etc/nv_tegra_release", release)):
        if text is not None:
            (root / name).parent.mkdir(parents=True)
            (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cpuinfo", "model", "bf16", "int8"),
    [
        (SAPPHIRE_RAPIDS, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", True, True),
        (CASCADE_LAKE, "Xeon", False, True),
        (HASWELL, "i5-4590", False, False),
        (ORIN, "ARM part 0xd42", False, True),
        (THOR, "ARM part 0xd83", True, True),
    ],
)
def test_cpu_features_and_what_they_mean(tmp_path, cpuinfo, model, bf16, int8):
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    cpu = cpu_features(path)
    assert (cpu.model, cpu.fast_bf16, cpu.fast_int8) == (model, bf16, int8)


def test_cpu_flags_and_cores(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(SAPPHIRE_RAPIDS)
    cpu = cpu_features(path)
    assert cpu.cores == 2
    assert cpu.flags == ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def test_cpu_without_cpuinfo(tmp_path):
    cpu = cpu_features(tmp_path / "absent")
    assert (cpu.model, cpu.flags) == ("unknown", ())
    assert cpu.cores >= 1


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "36.4.3", "6.2"),
        ("# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64", "36.4.0", "6.1"),
        ("# R36 (release), REVISION: 3.0, GCID: 36191598, BOARD: generic, EABI: aarch64", "36.3.0", "6.0"),
        ("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64", "35.4.1", "5"),
        ("# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64", "38.2.0", "7.0"),
        ("# R39 (release), REVISION: 2.1, GCID: 1, BOARD: generic, EABI: aarch64", "39.2.1", "7.2.1"),
        ("# R40 (release), REVISION: 1.0, GCID: 1, BOARD: generic, EABI: aarch64", "40.1.0", None),
    ],
)
def test_jetpack_follows_from_l4t(tmp_path, release, l4t, jetpack):
    board = jetson(_board(tmp_path, model="NVIDIA Jetson\0", release=release + "\n"))
    assert (board.l4t, board.jetpack) == (l4t, jetpack)


def test_jetson_in_a_container_knows_only_its_module(tmp_path):
    board = jetson(_board(tmp_path, model="NVIDIA Jetson AGX Thor Developer Kit\0"))
    assert (board.module, board.l4t, board.jetpack) == ("NVIDIA Jetson AGX Thor Developer Kit", None, None)


def test_other_boards_are_no_jetson(tmp_path):
    assert jetson(tmp_path) is None
    assert jetson(_board(tmp_path, model="Raspberry Pi 5 Model B Rev 1.0\0")) is None


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Return a function that puts a shell script named nvidia-smi first on PATH."""

    def put(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return put


def test_gpus_are_what_nvidia_smi_lists(nvidia_smi):
    nvidia_smi("echo 'NVIDIA H100 80GB HBM3, 81559, 580.95.05, 9.0'; echo 'Orin (nvgpu), [N/A], 540.4.0, 8.7'")
    first, second = gpus()
    assert (first.name, first.memory_mib, first.driver, first.compute_capability) == (
        "NVIDIA H100 80GB HBM3",
        81559,
        "580.95.05",
        "9.0",
    )
    assert (second.name, second.memory_mib) == ("Orin (nvgpu)", None)


def test_gpus_asks_for_its_columns(nvidia_smi, tmp_path):
    nvidia_smi(f'echo "$@" > {tmp_path}/arguments')
    assert gpus() == []
    assert (tmp_path / "arguments").read_text().split() == [
        "--query-gpu=name,memory.total,driver_version,compute_cap",
        "--format=csv,noheader,nounits",
    ]


@pytest.mark.parametrize(
    "script",
    [
        'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver"; exit 9',
        "echo 'No devices were found'",
    ],
)
def test_a_driver_that_does_not_answer_is_no_gpu(nvidia_smi, script):
    nvidia_smi(script)
    assert gpus() == []


def test_a_wedged_driver_is_no_gpu(nvidia_smi, monkeypatch):
    monkeypatch.setattr("dpal_edge.runtime.device._QUERY_SECONDS", 0.2)
    nvidia_smi("exec sleep 30")
    assert gpus() == []


def test_no_nvidia_smi_is_no_gpu():
    assert gpus("no-such-nvidia-smi") == []
