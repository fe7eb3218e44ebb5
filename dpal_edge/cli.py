"""The ``dpal-edge`` command: parse, call one function, print.

Heavy imports happen inside the commands that need them, so ``--help`` never waits for torch.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from dpal_edge import __version__
from dpal_edge.errors import BackendUnavailable, DpalEdgeError


class _Group(click.Group):
    """Show what a user can cause as one line; anything else is a bug and keeps its traceback."""

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


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")


def _load(module: str, extra: str) -> ModuleType:
    """Import a module of this package whose dependencies come with ``extra``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"this command needs {error.name}, which is not installed; pip install 'dpal-edge[{extra}]'"
        ) from error


@main.command()
@click.option("--teacher", help="timm:NAME, timm:NAME@FILE, or FILE (a ViT as .pth or .safetensors).")
@click.option("--data", multiple=True, metavar="DIR", help="Folder of person crops; may be given several times.")
@click.option("--out", "run", required=True, type=click.Path(path_type=Path), help="Run folder to write.")
@click.option("--student", help="Architecture: vit_tiny (default) or vit_small.")
@click.option("--preset", type=click.Choice(["default", "published"]), help="Settings to start from.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="Settings as .toml, or a run's config.json.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, for example batch=64.")
@click.option("--steps", type=int, help="Optimizer updates.")
@click.option("--epochs", type=float, help="Passes over the data, in place of --steps.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out.")
def train(run: Path, resume: bool, **options: Any) -> None:
    """Distil a teacher into a small student on folders of unlabelled person images (DPAL)."""
    command = _load("dpal_edge.train.command", "train")
    summary = command.train(run, resume=resume, **options)
    click.echo(command.describe(summary, run), err=True)
    if summary.interrupted:
        sys.exit(130)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, required=True, type=click.Choice(["onnx"]), help="What to write.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Bundle folder to write.")
@click.option(
    "--calibration", multiple=True, metavar="DIR", help="Real crops to verify on; default: the training data."
)
@click.option("--size", nargs=2, type=int, metavar="H W", help="Input size in pixels; default: the checkpoint's.")
@click.option("--weights", type=click.Choice(["best", "backbone", "ema"]), default="best", show_default=True)
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Greatest error, of the largest output.")
@_json_option
def export(checkpoint: Path, targets: tuple[str, ...], out: Path, as_json: bool, **settings: Any) -> None:
    """Export the student in CHECKPOINT (a file or a run folder) as a verified bundle; exit 2 if it is not exact."""
    bundle = _load("dpal_edge.export.bundle", "export")
    manifest = bundle.export(checkpoint, out, bundle.ExportSettings(**settings))
    click.echo(bundle.describe(manifest, out), err=True)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(manifest), indent=2))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH holds: a bundle, run folder, checkpoint, published weights or ONNX file."""
    from dpal_edge import inspection  # only this command pays for it

    description = inspection.describe(path)
    click.echo(json.dumps(description, indent=2) if as_json else inspection.as_text(description))


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Report what can run on this machine, what cannot, and how to mend it."""
    from dpal_edge.runtime import doctor as doctors  # only this command pays for it

    report = doctors.examine()
    click.echo(doctors.as_json(report) if as_json else doctors.render(report))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", required=True, metavar="FILE", type=click.Path(path_type=Path), help="Video file.")
@click.option("--out", type=click.Path(path_type=Path), help="Annotated video: .mp4, .webm (for browsers) or .avi.")
@click.option("--jsonl", type=click.Path(path_type=Path), help="JSON lines, one per frame.")
@click.option("--embeddings", is_flag=True, help="Put embeddings into the JSON lines.")
@click.option("--frames", type=click.IntRange(min=1), metavar="N", help="Stop after N frames.")
@click.option("--engine", metavar="NAME", help="Engine for the model; by default the one its file implies.")
@click.option(
    "--min-height",
    default=128,
    show_default=True,
    metavar="PIXELS",
    help="Smallest person to detect.",
)
@_json_option
def run(
    bundle: Path, source: Path, frames: int | None, engine: str | None, min_height: int, as_json: bool, **outputs: Any
) -> None:
    """Detect, embed and track the people in a video with BUNDLE."""
    from dpal_edge.runtime import HogDetector, Pipeline, Video, video  # only this command pays for it

    detector = HogDetector(min_height=min_height)
    with (
        Video(source) as clip,
        Pipeline.open(bundle, detector=detector, engine=engine) as pipeline,
        _progress(frames or clip.declared_frames) as advance,
    ):
        summary = video.run_video(pipeline, clip, limit=frames, progress=advance, **outputs)
    click.echo(video.describe(summary), err=True)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary), indent=2))
    if summary.interrupted:
        sys.exit(130)


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
    page = steps.run_demo(out, updates=updates, say=lambda text: click.echo(text, err=True))
    click.echo(f"open this page in a browser: {page.resolve()}")
