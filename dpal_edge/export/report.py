"""What a bundle holds and how that was found, for people (report.html) and for programs (report.json)."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import onnx

from dpal_edge.export import openvino
from dpal_edge.export.artifacts import Workshop
from dpal_edge.export.linears import Graph
from dpal_edge.export.targets import TARGETS
from dpal_edge.files import write_text
from dpal_edge.html import page, table
from dpal_edge.manifest import Artifact, FileSpec, Latency, Manifest, Verdict

_WIDER = {"int8": ("float16", "float32"), "float16": ("float32",)}  # what an artifact should be faster than
_CLIPS = "Clips are those of the ONNX and TensorRT files; for openvino-int8 NNCF takes its own, from the same images."
_SHOWN = 20  # layers in the table of the most sensitive


def write_report(folder: Path, manifest: Manifest, workshop: Workshop) -> tuple[FileSpec, ...]:
    """Write both reports into the folder of a bundle, and describe them."""
    facts = collect(manifest, workshop)
    texts = {"report.json": json.dumps(facts, indent=2) + "\n", "report.html": render(facts)}
    for name, text in texts.items():
        write_text(folder / name, text)
    return tuple(FileSpec.of(folder / name) for name in texts)


def collect(manifest: Manifest, workshop: Workshop) -> dict[str, Any]:
    """Return all that is known, JSON-ready."""
    return {
        "model": manifest.model,
        "input": list(manifest.input.size),
        "heads": [head.name for head in manifest.heads],
        "artifacts": [
            {**asdict(artifact), "bytes": sum(spec.bytes for spec in artifact.files),
             "verdicts": _drops(artifact.verdicts), "layers": _precisions(artifact, workshop),
             "errors": workshop.settle(TARGETS[artifact.target]).errors,
             "verdict": judge_in_words(artifact, manifest, workshop.speeds)}
            for artifact in manifest.artifacts
        ],
        "refused": [{**asdict(refusal), "verdicts": _drops(refusal.verdicts)} for refusal in manifest.refused],
        "speeds": {
            file: {way: [asdict(one) for one in latency] for way, latency in ways.items()}
            for file, ways in workshop.speeds.items()
        },
        "compiled": {name: asdict(layers) for name, layers in workshop.layers.items()},
        "calibration": workshop.coverage and {
            **workshop.coverage.to_dict(), "advice": workshop.coverage.advice, "clips": _CLIPS
        },
        "ranges": _ranges_by_layer(workshop),
        "sensitivity": [{**asdict(one), "cost": one.cost} for one in workshop.ranking],
        "provenance": manifest.provenance,
    }  # fmt: skip


def _ranges_by_layer(workshop: Workshop) -> dict[str, Any]:
    """Return what was found of the input of each layer."""
    if not workshop.ranges:
        return {}
    layers = Graph(onnx.load(workshop.float32)).linears()
    return {layer.name: asdict(workshop.ranges[layer.activation.source]) for layer in layers}


def _drops(verdicts: tuple[Verdict, ...]) -> list[dict[str, Any]]:
    """Return verdicts with what is lost, in points of a hundred."""
    return [{**asdict(verdict), "drop": 100 * (verdict.reference - verdict.found)} for verdict in verdicts]


def _precisions(artifact: Artifact, workshop: Workshop) -> dict[str, str]:
    """Return the precision of each linear layer, as the file has it that is run or compiled."""
    file = workshop.settle(TARGETS[artifact.target]).file
    names = [layer.name for layer in Graph(onnx.load(workshop.float32)).linears()]
    if artifact.precision != "int8":
        return dict.fromkeys(names, artifact.precision)
    if file.suffix == ".xml":
        quantized = openvino.int8_layers(file, workshop.float32)
    else:
        quantized = {layer.name for layer in Graph(onnx.load(file)).linears() if layer.quantized}
    return {name: "int8" if name in quantized else "float16" for name in names}


def judge_in_words(artifact: Artifact, manifest: Manifest, speeds: Mapping[str, Mapping[str, list[Latency]]]) -> str:
    """Say what an artifact costs and gains, in a sentence; ``speeds`` are by file, and by what ran it here."""
    if artifact.precision == "float32":
        return "exact"
    worst = min(artifact.verdicts, key=lambda verdict: verdict.found - verdict.least)
    text = f"passes; nearest to its limit: {worst.head}, {worst.measure} {worst.found:.4f}"
    precisions = {target.file: target.precision for target in TARGETS.values()}
    names = {TARGETS["onnx"].file: "onnx", **{one.file.file: one.target for one in reversed(manifest.artifacts)}}
    place = 0 if manifest.detects else -1  # of one frame, or of the most people at a time
    times = [(latency[place].median_ms, file, way) for file, ways in speeds.items() for way, latency in ways.items()]
    own = min((time for time in times if time[1] == artifact.file.file), default=None)
    if own is None:
        return f"{text}; not run here"
    other_ms, file, other = min(time for time in times if precisions[time[1]] in _WIDER[artifact.precision])
    gain = other_ms / own[0]
    speed = f"{gain:.2f} times as fast as {names[file]} here"
    if gain <= 1:
        speed = f"not faster than {names[file]} here ({gain:.2f})"
    return f"{text}; {speed}, {own[2]} against {other}"


def render(facts: dict[str, Any]) -> str:
    """Lay the facts out as a page."""
    height, width = facts["input"]
    sections = [
        f"<p>{escape(facts['model'])}, uint8 RGB {height}x{width}, heads: {escape(', '.join(facts['heads']))}.</p>",
        *_artifacts(facts),
        *_speeds(facts),
    ]
    if facts["refused"]:
        sections += [
            "<h2>Refused</h2>",
            table(["target", "why"], [[r["target"], r["reason"]] for r in facts["refused"]]),
        ]
    sections += _gate(facts)
    if facts["compiled"]:
        sections += ["<h2>What the compiler made of it</h2>", table(
            ["target", "kernels", "products", "of them INT8", "fused attention"],
            [[name, *map(str, layers.values())] for name, layers in facts["compiled"].items()],
        )]  # fmt: skip
    if facts["calibration"]:
        sections += _calibration(facts)
    return page("Export report", sections)


def _artifacts(facts: dict[str, Any]) -> list[str]:
    made = facts["artifacts"]
    errors = [[one["target"], *(f"{one['errors'][head]:.1e}" for head in facts["heads"])] for one in made]
    wider = [
        [one["target"], ", ".join(name for name, kind in one["layers"].items() if kind != "int8") or "none"]
        for one in made
        if one["precision"] == "int8"
    ]
    return [
        "<h2>Artifacts</h2>",
        table(["target", "precision", "layers in INT8", "MB", "verdict"], [_row(artifact) for artifact in made]),
        "<h2>Largest error of each head</h2>",
        "<p class='soft'>Over the largest output of float32.</p>",
        table(["target", *facts["heads"]], errors),
        *(["<h2>Layers in FP16 where others are INT8</h2>", table(["target", "layers"], wider)] if wider else []),
    ]


def _speeds(facts: dict[str, Any]) -> list[str]:
    rows = [
        [file, way, *(f"{one['median_ms']:.1f}" for one in latency)]
        for file, ways in facts["speeds"].items()
        for way, latency in ways.items()
    ]
    return ["<h2>Speed here</h2>", table(["file", "run by", "batch 1, ms", "batch 8, ms"], rows)]


def _gate(facts: dict[str, Any]) -> list[str]:
    rows = [
        [one["target"], v["head"], v["measure"], *(f"{v[key]:.4f}" for key in ("reference", "found", "least")),
         f"{v['drop']:.2f}"]
        for one in (*facts["artifacts"], *facts["refused"])
        for v in one["verdicts"]
    ]  # fmt: skip
    names = ["target", "head", "measure", "float32", "found", "least", "drop, points"]
    return ["<h2>The gate</h2>", table(names, rows)] if rows else []


def _row(artifact: dict[str, Any]) -> list[str]:
    int8 = sum(precision == "int8" for precision in artifact["layers"].values())
    return [
        artifact["target"], artifact["precision"], f"{int8} of {len(artifact['layers'])}",
        f"{artifact['bytes'] / 1e6:.1f}", artifact["verdict"],
    ]  # fmt: skip


def _calibration(facts: dict[str, Any]) -> list[str]:
    found = facts["calibration"]
    low, high = found["brightness"]
    text = f"{found['images']} images, {found['distinct']} different, grey levels {low:.0f} to {high:.0f}"
    grown = f"the second half widened no range by more than {100 * found['growth']:.0f} %"
    text += f"; {found['advice'] or grown}. {found['clips']}"
    clipped = sorted(facts["ranges"].items(), key=lambda item: -item[1]["clipped"])[:_SHOWN]
    shown = facts["sensitivity"][:_SHOWN]
    return [
        "<h2>Calibration</h2>",
        f"<p>{escape(text)}</p>",
        table(
            ["input of a layer", "largest", "clip", "clipped"],
            [[name, f"{r['largest']:.3g}", f"{r['clip']:.3g}", f"{100 * r['clipped']:.3f} %"] for name, r in clipped],
        ),
        "<h2>What INT8 costs, layer by layer</h2>",
        "<p class='soft'>Squared error of the head that suffers most, over its deviation, with this layer alone in "
        "INT8.</p>",
        table(
            ["layer", *facts["heads"]],
            [[one["layer"], *(f"{one['errors'][head]:.1e}" for head in facts["heads"])] for one in shown],
        ),
    ]
