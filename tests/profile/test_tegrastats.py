import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpal_edge.profile.samples import Core, Rail, Sample, total_power_mw
from dpal_edge.profile.tegrastats import parse_tegrastats

# Printed by devices; "…" stands for what their owners left out.
NANO = (
    "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB) "
    "CPU [5%@1224,4%@1224,3%@1224,6%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25 PLL@37C CPU@40C PMIC@50C GPU@40C "
    "AO@45C thermal@40C POM_5V_IN 1750/1628 POM_5V_GPU 0/0 POM_5V_CPU 366/406"
)
TX2 = (
    "RAM 3276/7859MB (lfb 5x4MB) SWAP 1626/12122MB (cached 181MB) CPU "
    "[44%@1421,49%@2031,67%@2034,17%@1420,25%@1419,8%@1420] EMC_FREQ 1%@1866 GR3D_FREQ 0%@114 APE 150 MTS fg 1% bg 1% "
    "PLL@42.5C MCPU@42.5C PMIC@50C Tboard@38C GPU@39.5C BCPU@42.5C thermal@41.3C Tdiode@39.25C VDD_SYS_GPU 182/182 "
    "VDD_SYS_SOC 730/730 VDD_4V0_WIFI 0/0 VDD_IN 5297/5297 VDD_SYS_CPU 1917/1917 VDD_SYS_DDR 1241/1241"
)
AGX_ORIN = (
    "04-24-2023 00:01:24 RAM 1282/62795MB (lfb 15152x4MB) SWAP 0/31398MB (cached 0MB) CPU [0%@729,…] EMC_FREQ 0%@2133 "
    "GR3D_FREQ 0%@0 GR3D2_FREQ 0%@0 VIC_FREQ 729 APE 174 CV0@-256C CPU@42.593C Tboard@32C SOC2@39.343C … GPU@-256C "
    "tj@42.593C … VDD_GPU_SOC 2399mW/2399mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 4032mW/4032mW NC 0mW/0mW "
    "VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
)
ORIN_NX = (
    "05-15-2025 18:30:28 RAM 6982/7620MB (lfb 5x1MB) SWAP 2640/16384MB (cached 202MB) CPU "
    "[97%@1984,95%@1984,95%@1984,91%@1984,88%@1984,93%@247] EMC_FREQ 18%@3199 GR3D_FREQ 84%@[713] NVENC 1%@115 "
    "NVDEC 40%@115 NVJPG off NVJPG1 off VIC 31%@115 OFA off NVDLA0 off PVA0_FREQ off APE 174 cv0@63.031C cpu@65.562C "
    "soc2@64.156C soc0@63.031C cv1@62.937C gpu@63.5C tj@65.562C soc1@64.718C cv2@60.875C VDD_IN 17946mW/15710mW "
    "VDD_CPU_GPU_CV 8896mW/7585mW VDD_SOC 3923mW/3515mW"
)
AGX_ORIN_7 = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,…] EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] "
    "NVENC0 off NVDEC0 off NVJPG0 off NVJPG1 off VIC off OFA off NVDLA0 off NVDLA1 off PVA0_FREQ off APE 174 "
    "cpu@52.968C/52.968C soc2@48.406C/48.406C soc0@49.531C/49.531C gpu@47.625C/47.625C VDD_GPU_SOC 5139mW/5139mW "
    "VDD_CPU_CV 3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW"
)
THOR = (
    "05-17-2026 10:00:32 RAM 4208/125773MB (lfb 31x4MB) SWAP 0/2048MB (cached 0MB) CPU [1%@972,0%@972,…] "
    "EMC_FREQ 0%@665 GR3D_FREQ @[0,0,0] NVENC0_FREQ @0 NVENC1_FREQ @0 NVDEC0_FREQ @0 NVDEC1_FREQ @0 NVJPG0_FREQ @0 "
    "VIC off OFA_FREQ @0 PVA0_FREQ off APE 300 cpu@34.468C tj@34.5C soc012@33.781C soc345@34.5C VDD_GPU 0mW/0mW "
    "VDD_CPU_SOC_MSS 4165mW/4165mW VIN_SYS_5V0 4126mW/4126mW"
)
THOR_WITHOUT_GPU = (
    "01-20-2026 22:46:22 RAM 17842/125772MB (lfb 79x4MB) CPU [0%@972,…] cpu@30.468C tj@31.218C soc012@30.218C "
    "soc345@31.218C VDD_GPU 0mW/0mW VDD_CPU_SOC_MSS 5535mW/5535mW VIN_SYS_5V0 5040mW/5040mW VIN 16802mW/16802mW"
)
LINES = (NANO, TX2, AGX_ORIN, ORIN_NX, AGX_ORIN_7, THOR, THOR_WITHOUT_GPU)

settings.register_profile("project", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("project")


def _cores(*pairs):
    return tuple(Core(load=load, mhz=mhz) for load, mhz in pairs)


def _rails(**pairs):
    return {name: Rail(mw=now, average_mw=average) for name, (now, average) in pairs.items()}


def test_nano_of_2019():
    assert parse_tegrastats(NANO) == Sample(
        ram_used_mb=1923,
        ram_total_mb=3964,
        cores=_cores((5, 1224), (4, 1224), (3, 1224), (6, 1224)),
        gpu_load=0,
        gpu_mhz=(76,),
        emc_load=0,
        emc_mhz=1600,
        temperatures_c={"PLL": 37, "CPU": 40, "PMIC": 50, "GPU": 40, "AO": 45, "thermal": 40},
        rails=_rails(POM_5V_IN=(1750, 1628), POM_5V_GPU=(0, 0), POM_5V_CPU=(366, 406)),
    )


def test_tx2():
    assert parse_tegrastats(TX2) == Sample(
        ram_used_mb=3276,
        ram_total_mb=7859,
        cores=_cores((44, 1421), (49, 2031), (67, 2034), (17, 1420), (25, 1419), (8, 1420)),
        gpu_load=0,
        gpu_mhz=(114,),
        emc_load=1,
        emc_mhz=1866,
        temperatures_c={
            **{"PLL": 42.5, "MCPU": 42.5, "PMIC": 50, "Tboard": 38},
            **{"GPU": 39.5, "BCPU": 42.5, "thermal": 41.3, "Tdiode": 39.25},
        },
        rails=_rails(
            VDD_SYS_GPU=(182, 182),
            VDD_SYS_SOC=(730, 730),
            VDD_4V0_WIFI=(0, 0),
            VDD_IN=(5297, 5297),
            VDD_SYS_CPU=(1917, 1917),
            VDD_SYS_DDR=(1241, 1241),
        ),
    )


def test_agx_orin_with_sensors_offline():
    assert parse_tegrastats(AGX_ORIN) == Sample(
        time_s=1682294484,  # 2023-04-24 00:01:24 UTC
        ram_used_mb=1282,
        ram_total_mb=62795,
        cores=_cores((0, 729)),
        gpu_load=0,
        gpu_mhz=(0, 0),
        emc_load=0,
        emc_mhz=2133,
        temperatures_c={"CPU": 42.593, "Tboard": 32, "SOC2": 39.343, "tj": 42.593},
        rails=_rails(
            VDD_GPU_SOC=(2399, 2399), VDD_CPU_CV=(400, 400), VIN_SYS_5V0=(4032, 4032), VDDQ_VDD2_1V8AO=(301, 301)
        ),
    )


def test_orin_nx_under_load():
    assert parse_tegrastats(ORIN_NX) == Sample(
        time_s=1747333828,  # 2025-05-15 18:30:28 UTC
        ram_used_mb=6982,
        ram_total_mb=7620,
        cores=_cores((97, 1984), (95, 1984), (95, 1984), (91, 1984), (88, 1984), (93, 247)),
        gpu_load=84,
        gpu_mhz=(713,),
        emc_load=18,
        emc_mhz=3199,
        temperatures_c={
            **{"cv0": 63.031, "cpu": 65.562, "soc2": 64.156, "soc0": 63.031, "cv1": 62.937},
            **{"gpu": 63.5, "tj": 65.562, "soc1": 64.718, "cv2": 60.875},
        },
        rails=_rails(VDD_IN=(17946, 15710), VDD_CPU_GPU_CV=(8896, 7585), VDD_SOC=(3923, 3515)),
    )


def test_agx_orin_on_jetpack_7():
    assert parse_tegrastats(AGX_ORIN_7) == Sample(
        time_s=1784970508,  # 2026-07-25 09:08:28 UTC
        ram_used_mb=20642,
        ram_total_mb=62817,
        cores=_cores((23, 2201)),
        gpu_load=12,
        gpu_mhz=(1300, 1300),
        emc_load=3,
        emc_mhz=3199,
        temperatures_c={"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625},
        rails=_rails(VDD_GPU_SOC=(5139, 5139), VDD_CPU_CV=(3268, 3268), VIN_SYS_5V0=(5500, 5500)),
    )


def test_thor_with_an_idle_gpu():
    assert parse_tegrastats(THOR) == Sample(
        time_s=1779012032,  # 2026-05-17 10:00:32 UTC
        ram_used_mb=4208,
        ram_total_mb=125773,
        cores=_cores((1, 972), (0, 972)),
        gpu_mhz=(0, 0, 0),
        emc_load=0,
        emc_mhz=665,
        temperatures_c={"cpu": 34.468, "tj": 34.5, "soc012": 33.781, "soc345": 34.5},
        rails=_rails(VDD_GPU=(0, 0), VDD_CPU_SOC_MSS=(4165, 4165), VIN_SYS_5V0=(4126, 4126)),
    )


def test_thor_without_gpu_and_memory():
    assert parse_tegrastats(THOR_WITHOUT_GPU) == Sample(
        time_s=1768949182,  # 2026-01-20 22:46:22 UTC
        ram_used_mb=17842,
        ram_total_mb=125772,
        cores=_cores((0, 972)),
        temperatures_c={"cpu": 30.468, "tj": 31.218, "soc012": 30.218, "soc345": 31.218},
        rails=_rails(VDD_GPU=(0, 0), VDD_CPU_SOC_MSS=(5535, 5535), VIN_SYS_5V0=(5040, 5040), VIN=(16802, 16802)),
    )


@pytest.mark.parametrize(
    ("line", "mw"),
    [
        (NANO, 1750),
        (TX2, 5297),
        (AGX_ORIN, 2399 + 400 + 4032),
        (ORIN_NX, 17946),
        (AGX_ORIN_7, 5139 + 3268 + 5500),
        (THOR, None),  # lists no VIN, and its rails do not add up to it where it does
        (THOR_WITHOUT_GPU, 16802),
        (AGX_ORIN.replace("VDD_CPU_CV 400mW/400mW ", ""), None),
        ("RAM 1/2MB", None),
    ],
)
def test_total_power_is_that_of_the_module(line, mw):
    assert total_power_mw(parse_tegrastats(line)) == mw


@pytest.mark.parametrize(
    ("line", "sample"),
    [
        ("CPU [off,5%@1224]", Sample(cores=(Core(), Core(load=5, mhz=1224)))),
        ("RAM 1/2MB GR3D_FREQ 0%@[0,0]", Sample(ram_used_mb=1, ram_total_mb=2, gpu_load=0, gpu_mhz=(0, 0))),
        ("EMC_FREQ 7%", Sample(emc_load=7)),
        ("GR3D_FREQ 62%", Sample(gpu_load=62)),
        ("13-45-2025 18:30:28 EMC_FREQ 1%@2", Sample(emc_load=1, emc_mhz=2)),
        ("gpu@-5.5C", Sample(temperatures_c={"gpu": -5.5})),
    ],
)
def test_variants(line, sample):
    assert parse_tegrastats(line) == sample


@pytest.mark.parametrize(
    "line",
    ["", "garbage", "05-15-2025 18:30:28", "RAM 1/2", "VDD_IN 17946mW/157", "gpu@63.", "GR3D_FREQ 84%@[71", "CPU [9"],
)
def test_what_says_nothing_or_was_cut_off_is_no_sample(line):
    assert parse_tegrastats(line) is None


@given(st.sampled_from(LINES), st.data())
def test_a_line_cut_off_anywhere_gives_nothing_else_than_the_whole(line, data):
    whole = parse_tegrastats(line)
    part = parse_tegrastats(line[: data.draw(st.integers(0, len(line)))])
    if part is None:
        return
    assert part.rails.keys() <= whole.rails.keys()
    assert part.temperatures_c.items() <= whole.temperatures_c.items()
    assert part.ram_total_mb in (None, whole.ram_total_mb)
    assert part.cores in ((), whole.cores)


@given(
    st.sampled_from(LINES),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 12), st.text(string.printable + "٣²€\0", max_size=12))),
)
def test_no_mutation_of_a_line_raises(line, edits):
    for start, length, replacement in edits:
        line = line[:start] + replacement + line[start + length :]
    assert isinstance(parse_tegrastats(line), Sample | None)


@given(st.text() | st.from_regex(r"(RAM|VDD_IN|GR3D_FREQ|CPU|EMC_FREQ) [\d%@/\[\],C]*", fullmatch=True))
def test_no_text_raises(line):
    assert isinstance(parse_tegrastats(line), Sample | None)
