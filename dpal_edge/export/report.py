"""What a bundle holds and how that was found, for people (report.html) and for programs (report.json)."""

import json
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import onnx

from dpal_edge.export.artifacts import Workshop
from dpal_edge.export.linears import Graph
from dpal_edge.files import write_text
from dpal_edge.html import page, table
from dpal_edge.manifest import Artifact, FileSpec, Manifest

_WIDER = {"int8": ("float16", "float32"), "float16": ("float32",)}  # what an artifact should be faster than
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
            {**asdict(artifact), "bytes": sum(spec.bytes for spec in (artifact.file, *artifact.data)),
             "verdict": judge_in_words(artifact, manifest)}
            for artifact in manifest.artifacts
        ],
        "refused": [asdict(refusal) for refusal in manifest.refused],
        "compiled": {name: asdict(layers) for name, layers in workshop.layers.items()},
        "calibration": workshop.coverage and {**workshop.coverage.to_dict(), "advice": workshop.coverage.advice},
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


def judge_in_words(artifact: Artifact, manifest: Manifest) -> str:
    """Say what an artifact costs and gains, in a sentence."""
    if artifact.precision == "float32":
        return "exact"
    worst = min(artifact.verdicts, key=lambda verdict: verdict.found - verdict.least, default=None)
    text = f"passes; nearest to its limit: {worst.head}, {worst.measure} {worst.found:.4f}" if worst else "not judged"
    if not artifact.latency:
        return f"{text}; not run here"
    suffix, wider = Path(artifact.file.file).suffix, _WIDER[artifact.precision]
    same = {a.precision: a for a in manifest.artifacts if a.latency and Path(a.file.file).suffix == suffix}
    other = next((same[precision] for precision in wider if precision in same), None)
    if other is None:
        return text
    gain = other.latency[-1].median_ms / artifact.latency[-1].median_ms
    speed = (
        f"{gain:.2f} times as fast as {other.target}" if gain > 1 else f"not faster than {other.target} ({gain:.2f})"
    )
    return f"{text}; {speed} here"


def render(facts: dict[str, Any]) -> str:
    """Lay the facts out as a page."""
    height, width = facts["input"]
    sections = [
        f"<p>{escape(facts['model'])}, uint8 RGB {height}x{width}, heads: {escape(', '.join(facts['heads']))}.</p>",
        "<h2>Artifacts</h2>",
        table(
            ["target", "precision", "MB", "largest error", "batch 1, ms", "batch 8, ms", "verdict"],
            [_row(artifact) for artifact in facts["artifacts"]],
        ),
    ]
    if facts["refused"]:
        sections += [
            "<h2>Refused</h2>",
            table(["target", "why"], [[r["target"], r["reason"]] for r in facts["refused"]]),
        ]
    judged = [(artifact["target"], verdict) for artifact in facts["artifacts"] for verdict in artifact["verdicts"]]
    if judged:
        sections += ["<h2>The gate</h2>", table(
            ["target", "head", "measure", "float32", "found", "least"],
            [[target, v["head"], v["measure"], *(f"{v[key]:.4f}" for key in ("reference", "found", "least"))]
             for target, v in judged],
        )]  # fmt: skip
    if facts["compiled"]:
        sections += ["<h2>What the compiler made of it</h2>", table(
            ["target", "kernels", "products", "of them INT8", "fused attention"],
            [[name, *map(str, layers.values())] for name, layers in facts["compiled"].items()],
        )]  # fmt: skip
    if facts["calibration"]:
        sections += _calibration(facts)
    return page("Export report", sections)


def _row(artifact: dict[str, Any]) -> list[str]:
    times = {one["batch"]: f"{one['median_ms']:.1f}" for one in artifact["latency"]}
    return [
        artifact["target"], artifact["precision"], f"{artifact['bytes'] / 1e6:.1f}",
        f"{artifact['parity']['max_rel_error']:.1e} ({artifact['parity']['head']})", times.get(1, ""), times.get(8, ""),
        artifact["verdict"],
    ]  # fmt: skip


def _calibration(facts: dict[str, Any]) -> list[str]:
    found = facts["calibration"]
    low, high = found["brightness"]
    text = f"{found['images']} images, {found['distinct']} different, grey levels {low:.0f} to {high:.0f}"
    grown = f"the second half widened no range by more than {100 * found['growth']:.0f} %"
    text += f"; {found['advice'] or grown}."
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
