"""The ``dpal-edge`` command: parse, call one function, print.

Heavy imports happen inside the commands that need them, so ``--help`` never waits for torch.
"""

import dataclasses
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from click.core import ParameterSource

from dpal_edge import __version__
from dpal_edge.errors import BackendUnavailable, ConfigError, DpalEdgeError
from dpal_edge.export.targets import TARGETS


class _Group(click.Group):
    """Show what a user can cause as one line; anything else is a bug and keeps its traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the command line as it was given, for a command that starts itself in several processes."""
        ctx.obj = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except DpalEdgeError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # a full disk or a folder without permission, wherever it strikes
            if error.filename is None and error.strerror is None:
                raise
            click.echo(f"Error: {error.filename or 'the system'}: {error.strerror}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dpal-edge")
def main() -> None:
    """Distil a large human-centric vision model into a ViT-Ti, export it verified, and run it on edge cameras."""


# Written out here, because asking the modules that know would load torch for --help.
STUDENTS = ("vit_tiny", "vit_small", "swin_tiny")
METHODS = ("dpal", "proteus", "tinymim")
RECIPES = ("paper", "attn")
PRESETS = ("default", "published")

FINETUNE_PRESETS = (
    "market1501", "msmt17", "cuhk03", "coco", "aic", "mpii", "crowdpose", "humanart", "pa100k", "rapv2", "peta", "lip",
    "cihp", "atr", "crowdhuman", "citypersons", "short", "short-detector",
)  # fmt: skip

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _load(module: str, extra: str) -> ModuleType:
    """Import a module of this package whose dependencies come with ``extra``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"this command needs {error.name}, which is not installed; pip install 'dpal-edge[{extra}]'"
        ) from error


@main.command()
@click.option(
    "--teacher",
    multiple=True,
    metavar="SPEC",
    help="SOURCE[?key=value&...] with SOURCE timm:NAME, timm:NAME@FILE or FILE (.pth or .safetensors); may be given "
    "several times, each with ?for=global, local or relation.",
)
@click.option("--teacher-layer", type=click.IntRange(min=1), metavar="N", help="Block to align; by default the last.")
@click.option(
    "--data", multiple=True, metavar="DIR", help="Folder of person crops, or .tar shards; paths or URLs; several times."
)
@click.option("--out", "run", required=True, type=click.Path(path_type=Path), help="Run folder to write.")
@click.option("--student", type=click.Choice(STUDENTS), help=f"Architecture; by default {STUDENTS[0]}.")
@click.option("--method", type=click.Choice(METHODS), help=f"How to distil; by default {METHODS[0]}.")
@click.option("--recipe", type=click.Choice(RECIPES), help=f"Losses of method dpal; by default {RECIPES[0]}.")
@click.option("--preset", type=click.Choice(PRESETS), help="Settings to start from.")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="Settings as .yaml, .toml or .json, as a run's config.json.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, for example batch=64.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer updates.")
@click.option("--epochs", type=float, help="Passes over the data, in place of --steps.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out.")
@click.option(
    "--processes", type=click.IntRange(min=1), metavar="N", help="Training processes here; by default one for each GPU."
)
@click.option("--dry-run", "dry", is_flag=True, help="Try two updates: time, memory, disk, a picture of the views.")
@click.pass_obj
def train(arguments: list[str], /, run: Path, resume: bool, dry: bool, processes: int | None, **options: Any) -> None:
    """Distil one or several teachers into a small student on unlabelled person images."""
    command = _load("dpal_edge.train.command", "train")
    config = command.resolve(run, resume=resume, **options)
    sys.exit(command.train(config, run, resume=resume, dry=dry, processes=processes, arguments=arguments, say=_say))


@main.command()
@click.option(
    "--init", metavar="CHECKPOINT", help="What to start from: a checkpoint, run folder, weights, or random:vit_tiny."
)
@click.option(
    "--task",
    multiple=True,
    metavar="NAME=DIR",
    help="Task and its data; several share one backbone. Tasks: pose, parsing, attributes, reid, detection.",
)
@click.option("--out", "run", required=True, type=click.Path(path_type=Path), help="Run folder to write.")
@click.option("--preset", type=click.Choice(FINETUNE_PRESETS), help="Settings to start from: a data set's, or short.")
@click.option("--freeze-backbone", is_flag=True, help="Train the heads alone.")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="Settings as .yaml, .toml or .json, as a run's config.json.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, for example batch=64.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer updates.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out.")
def finetune(run: Path, resume: bool, **options: Any) -> None:
    """Train heads for one or several human tasks on one backbone, which learns with them unless it is frozen."""
    command = _load("dpal_edge.finetune.command", "train")
    config = command.resolve(run, resume=resume, **options)
    sys.exit(command.finetune(config, run, resume=resume, say=_say))


@main.command()
@click.argument("model")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=DIR",
    help="Task and its data, of which the evaluation part is enough; may be given several times.",
)
@click.option("--flip", is_flag=True, help="Average outputs with those for mirrored images.")
@click.option("--detected-boxes", is_flag=True, help="Pose also in the boxes of COCO's person_detection_results/.")
@click.option("--engine", metavar="NAME", help="Engine for a bundle; by default the first installed that reads it.")
@click.option(
    "--target", metavar="NAME", help="Artifact of a bundle, for example onnx; by default the first that can run here."
)
@click.option("--weights", type=click.Choice(["best", "backbone", "ema"]), help="Of a checkpoint; by default best.")
@click.option(
    "--precision", type=click.Choice(["float32", "bf16", "fp16"]), help="Of a checkpoint: float32 by default."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Images of each split; by default all.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(min=1), help="Images at a time.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the images that --limit draws."
)
@_json_option
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Score the heads of MODEL: a checkpoint, run folder or bundle (which needs no torch)."""
    command = _load("dpal_edge.evaluate.command", "evaluate")
    result = command.evaluate(model, progress=_progress, **options)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.as_text())


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    type=click.Choice(list(TARGETS)),
    metavar="NAME",
    help=f"What to write, of {', '.join(TARGETS)}; may be given several times.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Bundle folder to write.")
@click.option(
    "--calibration",
    multiple=True,
    metavar="DIR",
    help="Real crops to calibrate and verify on; default: the training data.",
)
@click.option("--size", nargs=2, type=int, metavar="H W", help="Input size in pixels; default: the checkpoint's.")
@click.option("--weights", type=click.Choice(["best", "backbone", "ema"]), default="best", show_default=True)
@click.option(
    "--tolerance", type=float, default=1e-4, show_default=True, help="Of float32: error of the largest output."
)
@click.option(
    "--gate",
    multiple=True,
    metavar="NAME=DIR",
    help="Labelled data that less precise artifacts must hold on; heads without must agree with float32 on crops.",
)
@click.option("--gate-images", type=click.IntRange(min=1), metavar="N", help="Of each split; by default all.")
@click.option(
    "--max-drop", type=float, default=0.5, show_default=True, metavar="POINTS", help="What a metric may lose."
)
@_json_option
def export(checkpoint: Path, targets: tuple[str, ...], out: Path, as_json: bool, **settings: Any) -> None:
    """Export the student in CHECKPOINT (a file or a run folder) as a verified bundle; exit 2 if a target fails."""
    bundle = _load("dpal_edge.export.bundle", "export")
    manifest = bundle.export(checkpoint, out, bundle.ExportSettings(targets=targets, **settings))
    click.echo(bundle.describe(manifest, out), err=True)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(manifest), indent=2))
    if manifest.refused:
        sys.exit(2)


@main.command()
@click.argument("model")
@click.option(
    "--task", "tasks", multiple=True, metavar="NAME=DIR", help="Task and its data; may be given several times."
)
@click.option("--teacher", metavar="SPEC", help="Teacher to compare features with, on --data.")
@click.option("--data", multiple=True, metavar="DIR", help="Folder of images to compare features on.")
@click.option("--size", nargs=2, type=int, metavar="H W", help="Input size in pixels; by default the model's.")
@click.option(
    "--layer", type=click.IntRange(min=1), metavar="N", help="Block to take features of; by default the last."
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Look at N images of each split; by default all."
)
@click.option("--batch", default=32, show_default=True, type=click.IntRange(min=1), help="Images at a time.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the images that --limit draws."
)
@_json_option
def probe(model: str, as_json: bool, **options: Any) -> None:
    """Score the frozen features of MODEL: a checkpoint, run folder, bundle, or teacher:SPEC; nothing is fine-tuned."""
    command = _load("dpal_edge.probe.command", "train")
    result = command.probe(model, progress=_progress, **options)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.as_text())


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH holds: a bundle, run folder, checkpoint, published weights or ONNX file."""
    from dpal_edge import inspection  # only this command pays for it

    description = inspection.describe(path)
    click.echo(json.dumps(description, indent=2) if as_json else inspection.as_text(description))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_json_option
def verify(path: Path, as_json: bool) -> None:
    """Check PATH: a bundle's hashes, goldens and quantization, or an ONNX file's quantization; exit 2 if it fails."""
    from dpal_edge import verification  # only this command pays for it

    result = verification.verify(path)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.as_text())
    if result.failed:
        sys.exit(2)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", metavar="NAME", help="Engine to install for; by default all that are here are tried.")
@_json_option
def install(bundle: Path, backend: str | None, as_json: bool) -> None:
    """Build what BUNDLE needs on this device, check and time every form of it, and keep the fastest that passes.

    Without --backend the same is done for the detector that comes with dpal-edge, which run uses by default.
    """
    from dpal_edge.install import installer  # only this command pays for it
    from dpal_edge.runtime.detector import DEFAULT_DETECTORS

    bundles = [bundle]
    if not backend and bundle.resolve() not in DEFAULT_DETECTORS:
        bundles += DEFAULT_DETECTORS
    results = []
    for one in bundles:
        results.append(installer.install(one, backend=backend, say=_say))
        if not as_json:
            click.echo(results[-1].as_text())
    if as_json:
        click.echo(json.dumps([result.to_dict() for result in results], indent=2))
    if any(result.chosen is None for result in results):
        sys.exit(2)


@main.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write: report.json and report.html.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="S",
    envvar="DPAL_EDGE_SOURCE",
    help="As for run: your camera or video, once or several times; by default a clip that comes with dpal-edge.",
)
@click.option("--people", default="1,2,4,8,16", show_default=True, metavar="N,N...", help="Numbers of people to try.")
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="Engine to try; by default all that run here."
)
@click.option("--minutes", type=float, metavar="M", help="Run so long, to see the heat.")
@click.option(
    "--budget",
    metavar="TIME",
    help="That p95 of a frame may take, such as 33ms, or 33, which are milliseconds; exit 2 if it takes more.",
)
@click.option("--lock-clocks", is_flag=True, help="Hold clocks at their highest meanwhile; needs root.")
@click.option(
    "--max-celsius",
    default=95.0,
    show_default=True,
    metavar="C",
    help="Stop if a sensor becomes as hot as that; exit 2.",
)
@click.option(
    "--compare", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="Compare two reports instead; no BUNDLE."
)
@click.option(
    "--threshold", default=15.0, show_default=True, metavar="PERCENT", help="Of --compare: slower by more is exit 2."
)
@_json_option
@click.pass_context
def profile(
    context: click.Context,
    /,
    bundle: Path | None,
    out: Path | None,
    people: str,
    budget: str | None,
    compare: tuple[Path, Path] | None,
    threshold: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what BUNDLE costs on this device: latency by three clocks, power, heat; or compare two reports."""
    if compare is not None:
        for parameter in context.command.params:
            given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
            if given and parameter.name not in ("compare", "threshold", "as_json"):
                name = parameter.opts[0]
                raise ConfigError(f"{name} came with --compare, expected the two reports alone; leave it out")
        from dpal_edge.profile import comparison  # only this command pays for it

        changes = comparison.compare(*compare, threshold=threshold)
        click.echo(json.dumps(changes.to_dict(), indent=2) if as_json else changes.as_text())
        sys.exit(2 if changes.regressions else 0)
    if bundle is None or out is None:
        raise ConfigError("profile needs a BUNDLE and --out FOLDER, or --compare with two reports")
    from dpal_edge.profile import command, table  # only this command pays for them

    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    _end_in_order()
    asked = command.Options(
        people=command.parse_people(people), budget_ms=command.parse_budget(budget) if budget else None, **options
    )
    report = command.profile(bundle, out, asked, say=_say, progress=_progress)
    click.echo(json.dumps(report, indent=2) if as_json else table.as_text(report, out))
    sys.exit(command.exit_code(report))


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Report what can run on this machine, what cannot, and how to mend it."""
    from dpal_edge.runtime import doctor as doctors  # only this command pays for it

    report = doctors.examine()
    click.echo(doctors.as_json(report) if as_json else doctors.render(report))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--source",
    "sources",
    required=True,
    multiple=True,
    metavar="S",
    envvar="DPAL_EDGE_SOURCE",
    help="A video file, an image or a folder of them, a camera's number, csi://0, rtsp://... or another URL; once or "
    "several times, or in $DPAL_EDGE_SOURCE, which other users cannot read.",
)
@click.option(
    "--detector",
    metavar="BUNDLE",
    help="Bundle of a person detector, or hog for OpenCV's; by default the one that comes with dpal-edge.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Annotated video: .mp4, .webm (for browsers) or .avi; of several sources each gets its name at the end.",
)
@click.option(
    "--jsonl",
    type=click.Path(path_type=Path),
    help="JSON lines, one per frame; of cameras and streams they are appended to the file.",
)
@click.option("--embeddings", is_flag=True, help="Put embeddings into the JSON lines.")
@click.option(
    "--serve", metavar="[HOST:]PORT", help="Show it live on a page; on this machine alone unless HOST is given."
)
@click.option(
    "--token",
    metavar="TEXT",
    envvar="DPAL_EDGE_TOKEN",
    help="That the page asks for where HOST is not this machine, by default a new one; or in $DPAL_EDGE_TOKEN.",
)
@click.option(
    "--as-camera", is_flag=True, help="Play video files at their own speed, over and over, as a camera would."
)
@click.option("--keep-trying", is_flag=True, help="Wait for cameras and streams that do not answer yet.")
@click.option("--frames", type=click.IntRange(min=1), metavar="N", help="Stop after N frames of each source.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=10,
    show_default=True,
    metavar="MS",
    help="How long a camera's frame may wait for those of other cameras, to be looked at in one pass.",
)
@click.option(
    "--engine", metavar="NAME", help="Engine for the model; by default what install chose, or the one its file implies."
)
@click.option(
    "--min-height",
    type=int,
    metavar="PIXELS",
    help="Smallest person that --detector hog looks for; by default 128.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="SCORE",
    help="Least score of a person that a detector's bundle finds; by default 0.6.",
)
@_json_option
def run(
    bundle: Path,
    sources: tuple[str, ...],
    detector: str | None,
    frames: int | None,
    engine: str | None,
    min_height: int | None,
    threshold: float | None,
    serve: str | None,
    token: str | None,
    as_camera: bool,
    keep_trying: bool,
    wait: float,
    as_json: bool,
    **outputs: Any,
) -> None:
    """Find the people of cameras or videos, and say with BUNDLE all that its heads know of them."""
    from dpal_edge.runtime import Pipeline, loop, open_sources  # only this command pays for it
    from dpal_edge.runtime.installed import read_choice
    from dpal_edge.runtime.monitor import Monitor

    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # its warnings come before errors of ours that say the same
    server = _load("dpal_edge.runtime.serve", "serve") if serve is not None else None
    if server is not None:
        server.parse_address(serve)
    finder = _open_finder(detector, min_height, threshold)
    _end_in_order()
    with ExitStack() as stack:
        opened = stack.enter_context(open_sources(sources, patient=keep_trying, as_camera=as_camera))
        loop.check_outputs(opened, outputs["out"], outputs["jsonl"])
        for source in opened:
            if source.counters.problem:
                click.echo(f"{source.name}: {source.counters.problem}; trying again", err=True)
        pipeline = stack.enter_context(Pipeline.open(bundle, detector=finder, engine=engine))
        if engine is None and read_choice(bundle) is None:
            click.echo(
                f"running with {pipeline.name}; `dpal-edge install {bundle}` finds what is fastest here", err=True
            )
        monitor = Monitor(opened, pipeline.name)
        if server is not None:
            page = stack.enter_context(server.Server(monitor, serve, token=token))
            # A token that was given is known to who gave it, and no matter for a journal.
            click.echo(f"live on {page.url if token is None else page.url.partition('?')[0]}", err=True)
        advance = stack.enter_context(_progress(frames * len(opened) if frames else loop.count_frames(opened)))
        summary = loop.run(
            pipeline, opened, limit=frames, wait_s=wait / 1000, monitor=monitor, progress=advance, **outputs
        )
    click.echo(loop.describe(summary), err=True)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary), indent=2))
    if summary.interrupted:
        sys.exit(130)


def _end_in_order() -> None:
    """Let what ends a service, a container or a session of ssh do as Ctrl-C does: what was done so far is kept."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # which nohup asks for
            signal.signal(number, signal.default_int_handler)


def _open_finder(detector: str | None, min_height: int | None, threshold: float | None) -> Any:
    """Return what finds people, as ``Pipeline.open`` takes it."""
    from dpal_edge.runtime.detector import (  # only this command pays for it
        DefaultDetector,
        HogDetector,
        ModelDetector,
    )

    if detector == "hog":
        if threshold is not None:
            raise ConfigError("--threshold is a choice of detectors' bundles; for --detector hog there is --min-height")
        return HogDetector(min_height=128 if min_height is None else min_height)
    if min_height is not None:
        raise ConfigError("--min-height is a choice of --detector hog; other detectors have learned what to find")
    if threshold is None:
        return detector
    open_detector = partial(ModelDetector.open, threshold=threshold)
    return open_detector(detector) if detector else DefaultDetector(open_detector)


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar on standard error; nothing shows where that is not a terminal."""
    if total is None or not sys.stderr.isatty():
        yield lambda steps: None
        return
    with click.progressbar(length=total, file=sys.stderr) as bar:
        yield bar.update


@main.command()
@click.option(
    "--out", default="demo_output", show_default=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--updates", default=150, show_default=True, type=click.IntRange(min=2), help="Length of the training.")
def demo(out: Path, updates: int) -> None:
    """Distil, export, verify and run a student on two clips of real people; ends with a page that shows it."""
    steps = _load("dpal_edge.demo.steps", "demo")
    page = steps.run_demo(out, updates=updates, say=_say)
    click.echo(f"open this page in a browser: {page.resolve()}")
