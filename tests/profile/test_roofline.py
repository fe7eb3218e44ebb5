"""Ceilings, floors and advice, against numbers worked by hand."""

import pytest

from dpal_edge.profile.roofline import (
    JETSONS,
    Ceilings,
    build_roofline,
    executed_operations,
    find_ceilings,
    jetson_ceilings,
    jetson_floors,
    measure_bandwidth,
    measure_ceilings,
)

DEVICE = Ceilings(name="by hand", source="a test", bandwidth_gb_s=10, peak_gops={"f32": 100, "bf16": 200, "int8": 400})


def group(name="block 0 MLP", **changes):
    """1e8 operations and 1e6 bytes in 2 ms."""
    return {
        "group": name, "ms": 2.0, "share": 1.0, "kernels": 4, "precisions": {"f32": 1.5}, "movement_ms": 0.0,
        "quantize_ms": 0.0, "operations": 100_000_000, "int8_operations": 0, "weight_bytes": 600_000,
        "activation_bytes": 400_000, "half_weight_bytes": 300_000, **changes,
    }  # fmt: skip


def entry(*groups, **changes):
    return {
        "file": "model.onnx", "engine": "onnxruntime 1.32.0 cpu", "batch": 1, "host_ms": 2.1, "plain_ms": 2.0,
        "sum_ms": sum(g["ms"] for g in groups), "unaccounted_share": 0.05, "groups": list(groups),
        "attention": {"blocks": 1, "fused": 1}, **changes,
    }  # fmt: skip


def rules_of(one, ceilings=DEVICE, **changes):
    return list(build_roofline(entry(one, **changes), ceilings)["groups"][0]["rules"])


def test_a_block_bound_by_computing():
    placed = build_roofline(entry(group()), DEVICE)["groups"][0]
    assert placed["floor_ms"] == pytest.approx(1.0)  # 1e8 operations at 1e11 a second; its bytes take 0.1 ms
    assert placed["bound"] == "compute"
    assert placed["achieved_share"] == pytest.approx(0.5)
    assert placed["achieved_gops"] == pytest.approx(50)
    assert placed["ceiling_gops"] == pytest.approx(100)
    assert placed["intensity"] == pytest.approx(100)
    assert placed["precision"] == "f32"


def test_a_block_bound_by_memory():
    placed = build_roofline(entry(group(operations=1_000_000)), DEVICE)["groups"][0]
    assert (placed["floor_ms"], placed["bound"]) == (pytest.approx(0.1), "memory")
    assert placed["ceiling_gops"] == pytest.approx(10)  # intensity 1 times 10 GB/s


def test_int8_counts_where_it_was_computed():
    mixed = group(int8_operations=80_000_000, precisions={"int8": 0.5, "f32": 0.2, "bf16": 0.1})
    assert executed_operations(mixed) == {"int8": 80_000_000, "f32": 20_000_000}
    placed = build_roofline(entry(mixed), DEVICE)["groups"][0]
    assert placed["floor_ms"] == pytest.approx(0.2 + 0.2)
    assert placed["precision"] == "int8"
    assert executed_operations({**mixed, "precisions": {"f32": 1.0}}) == {"f32": 100_000_000}


def test_total():
    total = build_roofline(entry(group(), group("norms", operations=0, ms=1.0), plain_ms=4.0), DEVICE)["total"]
    assert total["operations"] == 100_000_000
    assert total["bytes"] == 2_000_000
    assert total["floor_ms"] == pytest.approx(1.1)
    assert total["achieved_share"] == pytest.approx(1.1 / 4)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"group": "block 0 attention"}, None),
        ({"int8_operations": 9, "precisions": {"f32": 1.0}}, "int8 not used"),
        ({"int8_operations": 9, "precisions": {"f32": 1.0, "int8": 0.1}}, None),
        ({"quantize_ms": 0.21}, "quantizing"),
        ({"quantize_ms": 0.19}, None),
        ({"movement_ms": 0.11}, "moving data"),
        ({"movement_ms": 0.09}, None),
        ({"operations": 0}, "weights"),
        ({"operations": 0, "weight_bytes": 3, "activation_bytes": 999_997}, None),
    ],
)
def test_rules(changes, rule):
    expected = [rule] if rule else []
    always = ("bf16 is faster", "small kernels", "at the ceiling")
    assert [found for found in rules_of(group(**changes)) if found not in always] == expected


def test_attention_in_parts_is_told_first():
    attention = group("block 3 attention", movement_ms=1.0)
    found = build_roofline(entry(attention, attention={"blocks": 1, "fused": 0}), DEVICE)
    assert list(found["groups"][0]["rules"])[:2] == ["attention in parts", "moving data"]
    assert "softmax" in found["groups"][0]["next"]
    assert "attention in parts" not in rules_of(group("head pose"), attention={"blocks": 1, "fused": 0})


def test_a_faster_precision_is_named_where_it_is_faster():
    assert "bf16 is faster" in rules_of(group())
    slow = Ceilings(name="", source="", bandwidth_gb_s=10, peak_gops={"f32": 100, "bf16": 140})
    assert "bf16 is faster" not in rules_of(group(), slow)
    assert "bf16 is faster" not in rules_of(group(precisions={"bf16": 1.0}))


def test_near_and_far():
    assert "at the ceiling" in rules_of(group(ms=1.2))
    assert "small kernels" not in rules_of(group(ms=1.2))
    assert "small kernels" in rules_of(group(ms=2.0))
    found = build_roofline(entry(group(ms=1.2), group(ms=5.0, movement_ms=0.5)), DEVICE)
    assert not any("ceiling:" in sentence for sentence in found["advice"])  # nothing to try
    assert found["advice"][0].startswith("bf16 is faster")
    assert any(sentence.startswith("moving data") and "(0.50 of 6.20 ms)" in sentence for sentence in found["advice"])


def test_int8_that_is_slower_than_float():
    int8 = entry(group(int8_operations=100_000_000), file="model.int8.onnx", plain_ms=4.0)
    other = entry(group(), file="model.onnx", plain_ms=3.0)
    [first, *_] = build_roofline(int8, DEVICE, others=[int8, other])["advice"]
    assert first.startswith("INT8 is slower here: 4.00 ms, and model.onnx")
    assert not any("INT8 is slower" in s for s in build_roofline(other, DEVICE, others=[int8, other])["advice"])
    eight = {**other, "batch": 8}  # no comparison
    assert not any("INT8 is slower" in s for s in build_roofline(int8, DEVICE, others=[eight])["advice"])


def test_time_outside_of_kernels():
    advice = build_roofline(entry(group(), unaccounted_share=0.3), DEVICE)["advice"]
    assert any(sentence.startswith("30% of a call is outside of kernels") for sentence in advice)


def test_time_outside_of_kernels_is_of_the_call():
    """3 of 5 ms are outside of kernels, more than the 2 ms that kernels take to move data."""
    moving = entry(group(movement_ms=2.0), host_ms=5.0, unaccounted_share=0.6)
    first, second, *_ = build_roofline(moving, DEVICE)["advice"]
    assert first.startswith("60% of a call is outside of kernels")
    assert second.startswith("moving data")


def test_unknown_work_and_unknown_ceilings():
    unknown = dict.fromkeys(("operations", "int8_operations", "weight_bytes", "activation_bytes", "half_weight_bytes"))
    found = build_roofline(entry(group(**unknown), attention=None), DEVICE)
    assert found["groups"][0]["floor_ms"] is None
    assert found["floors"] == []
    assert found["total"]["achieved_share"] is None
    found = build_roofline(entry(group()), None)
    assert found["groups"][0]["intensity"] == 100
    assert found["groups"][0]["floor_ms"] is None
    assert found["device"] is None
    assert len(found["floors"]) == len(JETSONS)


def test_the_table_gives_what_nvidia_states():
    """Dense rates of the reference, in 1e12 a second."""
    table = {device.name: device for device in JETSONS}
    stated = {
        "Orin Nano 4 GB": (10.2, 5.1),
        "Orin Nano 8 GB Super": (33.4, 16.7),
        "Orin NX 8 GB": (25.1, 12.5),
        "Orin NX 16 GB Super": (38.4, 19.2),
        "AGX Orin 32 GB": (53.3, 26.7),
        "AGX Orin 64 GB": (85.2, 42.6),
    }
    for name, (int8, f16) in stated.items():
        assert table[name].peak_gops["int8"] / 1e3 == pytest.approx(int8, abs=0.05)
        assert table[name].peak_gops["f16"] / 1e3 == pytest.approx(f16, abs=0.05)


def test_the_floor_of_a_vit_tiny_on_an_orin_nano():
    """0.780e9 multiply-accumulates and 5.7e6 weights: 0.056 ms of memory and 0.047 of computing in INT8."""
    vit = group(operations=2 * 780_000_000, int8_operations=2 * 780_000_000, half_weight_bytes=5_700_000)
    floors = {floor["device"]: floor for floor in jetson_floors(entry(vit))}
    nano = floors["Orin Nano 8 GB Super"]
    assert (nano["floor_ms"], nano["bound"]) == (pytest.approx(0.056, abs=5e-4), "memory")
    half = jetson_floors(entry({**vit, "int8_operations": 0, "half_weight_bytes": 11_200_000}))
    assert next(f for f in half if f["device"] == nano["device"])["floor_ms"] == pytest.approx(0.11, abs=5e-3)
    thor = floors["Thor T5000"]  # whose rate in INT8 nobody states: as f16
    assert thor["floor_ms"] == pytest.approx(max(5.7e6 / 273e6, 1.56e9 / 258e9), rel=1e-3)


@pytest.mark.parametrize(
    ("module", "memory_mb", "row"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7620, "Orin Nano 8 GB Super"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 3500, "Orin Nano 4 GB Super"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15523, "Orin NX 16 GB Super"),
        ("NVIDIA Jetson Orin NX", 7400, "Orin NX 8 GB"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 62841, "AGX Orin 64 GB"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 30697, "AGX Orin 32 GB"),
        ("NVIDIA Jetson AGX Orin Developer Kit", None, "AGX Orin 64 GB"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 125773, "Thor T5000"),
        ("NVIDIA Jetson Xavier NX Developer Kit", 7766, "Xavier NX"),
        ("Jetson-AGX", None, None),
        ("Raspberry Pi 5", 8000, None),
    ],
)
def test_modules_by_their_names(module, memory_mb, row):
    found = jetson_ceilings(module, memory_mb)
    assert (found and found.name) == row


def test_a_cpu_is_measured():
    """No number is expected: machines differ, and this one is busy."""
    pytest.importorskip("openvino")
    found = find_ceilings(entry(group()))
    assert {"f32", "int8"} <= found.peak_gops.keys()
    assert all(rate > 0 for rate in (*found.peak_gops.values(), found.bandwidth_gb_s))
    assert "OpenVINO" in found.source
    assert find_ceilings(entry(group(), engine="tensorrt 10.3.0 Orin")) is None  # this is no Jetson


def test_a_cpu_is_measured_without_openvino(monkeypatch):
    monkeypatch.setattr("dpal_edge.profile.roofline.find_spec", lambda name: None)
    found = measure_ceilings(1)
    assert list(found.peak_gops) == ["f32"]
    assert "numpy" in found.source
    assert "3 MB" in found.source


def test_bandwidth_counts_three_arrays(monkeypatch):
    monkeypatch.setattr("dpal_edge.profile.roofline.physical_cores", lambda: 2)
    monkeypatch.setattr("dpal_edge.profile.roofline._least_seconds", lambda call: call() and 1e-3)
    assert measure_bandwidth(48_000_000) == pytest.approx(48)
