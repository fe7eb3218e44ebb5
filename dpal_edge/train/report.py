"""The report of a run: one HTML page made of the files in the run folder, at any time, also after a crash."""

import json
import math
import shlex
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpal_edge import __version__, html
from dpal_edge.files import write_text
from dpal_edge.models.checkpoint import list_checkpoints

_POINTS = 300  # of a curve; more are averaged
_SHOWN = 20  # skipped files on the page; the rest is counted
_LARGEST_SHEET = 8 << 20  # bytes of a contact sheet that still goes into the page
_TELLS = {
    "loss": "Loss, the weighted sum",
    "global": "Global: the class token",
    "local": "Local: the patches",
    "relation": "Relation: the crowd",
    "router": "Router: which expert",
    "penalty": "Penalty: the experts' size",
    "token": "Token: the class token",
    "feature": "Feature: the patches",
    "patch": "Patch: the hidden patches",
    "qk": "Query-key relations",
    "vv": "Value-value relations",
    "lr": "Learning rate",
    "images_per_s": "Images/s",
    "data_wait": "Share of time waiting for data",
    "grad_norm": "Gradient norm before clipping",
}
_MACHINE = ("lr", "images_per_s", "data_wait", "grad_norm")

_Row = dict[str, Any]
_Series = tuple[list[float], list[float]]


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run folder from what lies there, and return its path.

    What is missing or was cut short is left out: a run that still goes on, or was killed, has a report as well.
    """
    config, passports = _read_json(run / "config.json", {}), _read_json(run / "teachers.json", [])
    metrics, validation = _read_lines(run / "metrics.jsonl"), _read_lines(run / "validation.jsonl")
    sections = (
        _summary(run, config, passports, metrics),
        _teachers(passports),
        _losses(metrics),
        _quality(validation, _read_lines(run / "probes.jsonl")),
        _router(metrics),
        _machine(metrics),
        _sheet(run / "views.png"),
        _changes(_read_lines(run / "changes.jsonl")),
        _skipped(_read_lines(run / "skipped.jsonl")),
        _next(run, config, metrics),
        _settings(config),
    )
    path = run / "report.html"
    write_text(path, html.page(f"Training run {run.resolve().name}", [section for section in sections if section]))
    return path


def _summary(run: Path, config: _Row, passports: list[_Row], metrics: list[_Row]) -> str:
    """Say what was trained on what, how far it came, and which weights are best."""
    newest = _newest(run)
    done, steps = (metrics[-1]["step"] if metrics else 0), config.get("steps", 0)
    state = "finished" if newest.get("step") == steps else "not finished: it still goes on, or it was stopped"
    teachers = " and ".join(_name(passport) for passport in passports)
    rows = [
        ("updates", f"{done:,} of {steps:,}, {state}"),
        ("images in an update", f"{config.get('batch', 0):,}"),
    ]
    if newest:
        written, validation = newest["written"], newest["validation"]
        rows += [
            ("images", f"{newest['images']['count']:,}"),
            ("device", f"{written['device']} in {written['precision']}"),
            ("processes", str(written["processes"])),
            ("newest checkpoint", f"update {newest['step']:,}, {written['time']}"),
        ]
        if validation:
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in validation.items())
            rows.append(("loss on held-out images", f"{losses}; the better one, {newest['best']}, is what is exported"))
    return (
        f"<p><strong>{escape(str(config.get('student', '?')))}</strong> learns from "
        f"<strong>{escape(teachers or '?')}</strong> by the method {escape(str(config.get('method', '?')))}.</p>"
        f"{html.table(('', ''), rows)}<p class=soft>Written by dpal-edge {__version__}.</p>"
    )


def _teachers(passports: list[_Row]) -> str:
    """Show each teacher's passport, its licence and what that bars in front."""
    if not passports:
        return ""
    rows = [
        ("plays", [", ".join(p["roles"]) for p in passports]),
        ("family", [p["family"] for p in passports]),
        ("licence", [p["licence"] for p in passports]),
        ("parameters", [f"{p['parameters'] / 1e6:.1f} M" for p in passports]),
        ("aligned block", [f"{p['layer']} of {p['depth']}" for p in passports]),
        ("global target", [p["global_target"] for p in passports]),
        ("sees the person at", ["{} x {} pixels".format(*p["input_size"]) for p in passports]),
        ("keys matched", [f"{100 * p['keys_matched']:.1f} %" for p in passports]),
        ("features on real crops", [_checked(p["feature_check"]) for p in passports]),
        ("SHA-256", [f"{p['sha256'][:16]}..." for p in passports]),
    ]
    remarks = "".join(
        f"<p><strong>{escape(_name(p))}</strong>, <code>{escape(p['spec'])}</code> {escape(p['limits'])} "
        f"{escape(p['note'])}</p>"
        for p in passports
    )
    head = ("", *(_name(p) for p in passports))
    table = html.table(head, [(name, *cells) for name, cells in rows])
    return f"<h2>Teacher{'s' if passports[1:] else ''}</h2>{remarks}{table}"


def _name(passport: _Row) -> str:
    return Path(passport["spec"].partition("?")[0]).name


def _checked(check: dict[str, float]) -> str:
    return f"deviation {check['std']:.3g}, cosine between people {check['cosine']:.3f}"


def _losses(metrics: list[_Row]) -> str:
    names = [name for name in _names(metrics) if name not in _MACHINE and not name.startswith("usage/")]
    note = "Unweighted means over the images of each logging interval; lower is closer to the teacher."
    return _curves("Losses", note, metrics, sorted(names, key=lambda name: name != "loss"))


def _machine(metrics: list[_Row]) -> str:
    note = "Where much of the time is spent waiting for data, more workers or smaller files help."
    return _curves("Pace", note, metrics, [name for name in _MACHINE if name in _names(metrics)])


def _quality(validation: list[_Row], probes: list[_Row]) -> str:
    """Show the loss on held-out images, and what probes of the frozen student scored."""
    names = _names(probes)
    held_out = {name: _series(validation, name) for name in ("backbone", "ema")}
    held_out = {name: series for name, series in held_out.items() if series[0]}
    charts = [html.lines_chart("Loss on held-out images", held_out, x_label="updates")] if held_out else []
    charts += [html.line_chart(name, *_series(probes, name), x_label="updates") for name in names if probes[1:]]
    if not charts and not probes:
        return ""
    shown = [*probes[:1], *probes[1:][-1:]]
    rows = [(name, *(f"{row[name]:.4g}" if name in row else "" for row in shown)) for name in names]
    head = ("probe of the frozen student", *(f"update {row['step']:,}" for row in shown))
    return f"<h2>What it is worth</h2>{_grid(charts)}{html.table(head, rows) if probes else ''}"


def _router(metrics: list[_Row]) -> str:
    """Show how much each pattern uses each expert."""
    patterns = list(dict.fromkeys(name.split("/")[1] for name in _names(metrics) if name.startswith("usage/")))
    if not patterns:
        return ""
    charts = [
        html.lines_chart(
            f"{pattern} uses",
            {other: _series(metrics, f"usage/{pattern}/{i}") for i, other in enumerate(patterns)},
            x_label="updates",
        )
        for pattern in patterns
    ]
    return (
        "<h2>Router</h2><p>The share that the expert of each pattern has when global tokens, patches and crowds are "
        f"decoded. It should come to favour its own.</p>{_grid(charts)}"
    )


def _sheet(path: Path) -> str:
    if not path.exists() or path.stat().st_size > _LARGEST_SHEET:
        return ""
    return f"<h2>Views</h2><p>As the dry run drew them.</p>{html.image(path.read_bytes(), '.png', 'views of people')}"


def _changes(changes: list[_Row]) -> str:
    if not changes:
        return ""
    rows = [(f"{change['step']:,}", *(str(change[key]) for key in ("name", "before", "after"))) for change in changes]
    return f"<h2>Changed when it was resumed</h2>{html.table(('update', 'setting', 'before', 'after'), rows)}"


def _skipped(skipped: list[_Row]) -> str:
    if not skipped:
        return ""
    rows = [(str(line["file"]), str(line["reason"])) for line in skipped[:_SHOWN]]
    more = f"<p class=soft>And {len(skipped) - _SHOWN} more in skipped.jsonl.</p>" if len(skipped) > _SHOWN else ""
    return f"<h2>Skipped, {len(skipped)} unreadable</h2>{html.table(('file', 'reason'), rows)}{more}"


def _settings(config: _Row) -> str:
    if not config:
        return ""
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in config.items()]
    return f"<h2>Settings</h2>{html.table(('', ''), rows)}"


def _next(run: Path, config: _Row, metrics: list[_Row]) -> str:
    folder = shlex.quote(str(run))
    commands = [f"dpal-edge export {folder} --target onnx --out BUNDLE", f"tensorboard --logdir {folder}"]
    if not metrics or metrics[-1]["step"] < config.get("steps", 0):
        commands.insert(0, f"dpal-edge train --out {folder} --resume")
    lines = "".join(f"<p><code>{escape(command)}</code></p>" for command in commands)
    return f"<h2>How to go on</h2>{lines}"


def _curves(title: str, note: str, rows: list[_Row], names: list[str]) -> str:
    series = [(name, _series(rows, name)) for name in names]
    charts = [html.line_chart(_TELLS.get(name, name), xs, ys, x_label="updates") for name, (xs, ys) in series if xs]
    return f"<h2>{title}</h2><p>{note}</p>{_grid(charts)}" if charts else ""


def _grid(charts: list[str]) -> str:
    return f"<div class=grid>{''.join(f'<div class=card>{chart}</div>' for chart in charts)}</div>"


def _names(rows: list[_Row]) -> list[str]:
    """Return the names of all numbers in ``rows``, in order of appearance."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name != "step"]


def _series(rows: list[_Row], name: str) -> _Series:
    """Return steps and values of ``name`` where it is a finite number, thinned to ``_POINTS`` means."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    points = [(float(x), float(y)) for x, y in found if math.isfinite(y)]
    count = min(len(points), _POINTS)
    bounds = [i * len(points) // count for i in range(count + 1)] if count else [0]
    bins = [points[a:b] for a, b in pairwise(bounds)]
    return [part[-1][0] for part in bins], [sum(y for _, y in part) / len(part) for part in bins]


def _newest(run: Path) -> _Row:
    """Return what the newest checkpoint says of itself; nothing where there is none, or it is damaged."""
    try:
        with safe_open(list_checkpoints(run)[-1], "np") as file:
            return dict(json.loads(file.metadata()["dpal_edge"]))
    except (IndexError, OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def _read_lines(path: Path) -> list[_Row]:
    """Return the documents of a JSON-lines file, without one that a crash cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
