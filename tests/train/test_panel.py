import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from dpal_edge.train.panel import Panel, named, sparkline
from dpal_edge.train.watcher import Record

TEACHER = {
    "spec": "models/path_vit_base.pth?layer=11", "roles": ["global", "local", "relation"], "parameters": 86.6e6,
    "layer": 11, "keys_matched": 0.997, "licence": "MIT", "limits": "", "note": "Its last block is untrained.",
}  # fmt: skip
FACTS = {
    "student": "vit_tiny", "explained": None, "method": "dpal",
    "parameters": {"backbone": 5.46e6, "train_only": 29.35e6},
    "teachers": [TEACHER], "images": 900, "validation_images": 100, "ignored": ["a.txt", "b.txt", "c.txt", "d.txt"],
    "device": "cuda:0", "precision": "bf16", "processes": 8, "from_step": 2000, "steps": 10_000, "batch": 256,
    "accumulate": 2, "changes": [{"step": 2000, "name": "accumulate", "before": 1, "after": 2}],
}  # fmt: skip
PATTERNS = ("global", "local", "relation")


def record(step, loss):
    usage = {f"usage/{name}/{i}": 0.9 if name == PATTERNS[i] else 0.05 for name in PATTERNS for i in range(3)}
    return Record(step, 812.34, 0.012, 2.3e-4, {"loss": loss, "global": loss / 2, **usage, "grad_norm": math.inf})


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """A clock that stands still between updates, each of which takes half a second."""
    clock = iter(0.5 * i for i in range(100))
    now = [0.0]

    def updated(self, step, real=Panel.updated):
        now[0] = next(clock)
        real(self, step)

    monkeypatch.setattr(Panel, "updated", updated)
    monkeypatch.setattr("dpal_edge.train.panel.time.monotonic", lambda: now[0])


def follow(console, **facts):
    """Show a run of four updates; return what came to be written, without colours."""
    with Panel(console) as panel:
        panel.started({**FACTS, **facts})
        for step, loss in enumerate((4.0, 3.0, 2.0, 1.0), 2001):
            panel.updated(step)
            panel.recorded(record(step, loss))
        panel.saved(Path("run/checkpoints/step-00002004.safetensors"), {"backbone": 0.8123, "ema": 0.7999})
        panel.probed(2004, {"reid/mAP": 0.3124})
        panel.stopping()
    return console.export_text()


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=60, record=True, highlight=False)


def test_panel_at_80_columns():
    text = follow(terminal(80))
    frame = text[text.rindex("─" * 80) :]
    assert [line.rstrip() for line in frame.splitlines()] == [
        "─" * 80,
        "dpal: path_vit_base.pth → vit_tiny                      cuda:0 bf16, 8 processes",
        "━━━━━━━━╺━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 2,004 of 10,000 updates, 1:06:38 left",  # 7996 halves of a second
        "812.3 images/s, 1 % waiting for data, lr 2.30e-04",
        "",
        "loss         1  █▆▃▁",
        "global     0.5  █▆▃▁",
        "grad norm  inf",
        "",
        "uses expert of  global            local             relation",
        "global          █████████░  90 %  ░░░░░░░░░░   5 %  ░░░░░░░░░░   5 %",
        "local           ░░░░░░░░░░   5 %  █████████░  90 %  ░░░░░░░░░░   5 %",
        "relation        ░░░░░░░░░░   5 %  ░░░░░░░░░░   5 %  █████████░  90 %",
        "",
        "saved  step-00002004; loss on held-out images: backbone 0.8123, ema 0.7999",
        "probe  reid/mAP 0.3124 (update 2004)",
    ]
    assert "stopping: saving what was learned; once more gives up at once\n" in text


@pytest.mark.parametrize("width", [40, 30])
def test_no_line_is_wider_than_a_narrow_terminal(width):
    text = follow(terminal(width))
    frame = text[text.rindex("─" * width) :].splitlines()
    assert max(map(len, frame)) == width
    assert any(line.startswith("loss") and line.rstrip().endswith("█▆▃▁") for line in frame)


def test_the_terminal_gets_its_cursor_back_also_after_an_error():
    console = terminal(80)
    with pytest.raises(KeyboardInterrupt), Panel(console) as panel:  # noqa: PT012
        panel.started(FACTS)
        raise KeyboardInterrupt
    written = console.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # shown after it was hidden


def test_what_is_trained_on_what_and_a_line_per_checkpoint_without_a_terminal(capsys):
    follow(Console(file=io.StringIO(), record=True, width=80))
    out, err = capsys.readouterr()
    assert out == ""
    progress = "2,004 of 10,000 updates, 1:06:38 left: 812.3 images/s, 1 % waiting for data, lr 2.30e-04"
    assert err.splitlines() == [
        "student   vit_tiny, 5.46 M parameters, and 29.35 M that only training needs (method dpal)",
        "teacher   models/path_vit_base.pth?layer=11, 86.6 M parameters, layer 11, 99.7 % of keys matched, licence MIT",
        "          Its last block is untrained.",
        "images    900 to train on, 100 held out; 4 files ignored, no images by name: a.txt, b.txt, c.txt and 1 more",
        "device    cuda:0 in bf16",
        "updates   2000 to 10000 of 256 images in 2 passes by 8 processes",
        "changed   accumulate: 1 → 2",
        f"{progress}; saved step-00002004; loss on held-out images: backbone 0.8123, ema 0.7999",
        f"{progress}; probe reid/mAP 0.3124 (update 2004)",
        "stopping: saving what was learned; once more gives up at once",
    ]


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}])
def test_terminals_that_cannot_draw_get_lines(monkeypatch, capsys, variables):
    file = io.TextIOWrapper(io.BytesIO(), encoding=variables.pop("PYTHONIOENCODING", "utf-8"))
    follow(Console(file=file, force_terminal=True, record=True, width=80, _environ=variables), changes=[])
    file.flush()
    assert file.buffer.getvalue() == b""
    assert "saved step-00002004" in capsys.readouterr().err


def test_teachers_with_roles_and_limits_are_told_apart(capsys):
    second = {**TEACHER, "spec": "reid.pth?for=global", "roles": ["global"], "limits": "Bars surveillance."}
    text = follow(terminal(80), teachers=[{**TEACHER, "roles": ["local", "relation"]}, second])
    assert "dpal: path_vit_base.pth + reid.pth → vit_tiny" in text
    err = capsys.readouterr().err
    assert "teacher   models/path_vit_base.pth?layer=11 for local, relation, 86.6 M" in err
    assert "teacher   reid.pth?for=global for global, 86.6 M" in err
    assert "\n          Bars surveillance.\n          Its last block is untrained.\n" in err


def test_sparkline_by_hand():
    assert sparkline([0.0, 7.0], 8) == "▁█"
    assert sparkline([0.0, 2.0, 6.0, 8.0], 2) == "▁█"  # means of 1 and 7
    assert sparkline([5.0] * 9, 3) == "▁▁▁"
    assert sparkline([math.inf, 0.0, math.nan, 1.0], 4) == " ▁ █"
    assert sparkline([math.inf], 4) == " "


def test_files_are_named_up_to_a_few():
    assert named(["a", "b", "c"]) == "a, b, c"
    assert named(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
