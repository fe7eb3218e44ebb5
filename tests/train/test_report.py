import json
import math
import shutil

import pytest
from PIL import Image

from dpal_edge.train import report
from dpal_edge.train.config import build_config
from dpal_edge.train.report import write_report
from dpal_edge.train.run import run_training
from tests.test_html import Checker


def text_of(run):
    page = write_report(run).read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(source.startswith("data:") for source in checker.sources)
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory, people, teacher_file):
    from tests.train.conftest import SHORT_RUN

    run = tmp_path_factory.mktemp("report") / "first <run>"
    fields = {**SHORT_RUN, "teacher": str(teacher_file), "data": [str(people)], "validation_images": 2}
    run_training(build_config({**fields, "trackers": []}), run)
    return run


def test_run_writes_a_report_that_tells_what_happened(finished):
    page = text_of(finished)
    assert "<h1>Training run first &lt;run&gt;</h1>" in page
    assert "4 of 4, finished" in page
    assert "<strong>vit_tiny</strong> learns from <strong>teacher.safetensors</strong> by the method dpal" in page
    assert "cpu in float32" in page
    for title in ("Teacher", "Losses", "What it is worth", "Router", "Pace", "How to go on", "Settings"):
        assert f"<h2>{title}</h2>" in page
    for absent in ("Changed when it was resumed", "Skipped", "Views"):
        assert f"<h2>{absent}" not in page
    sha256 = json.loads((finished / "teachers.json").read_text())[0]["sha256"]
    assert sha256[:16] in page
    for name in ("Global: the class token", "Relation: the crowd", "Loss on held-out images", "relation uses"):
        assert name in page
    assert "--resume" not in page
    assert "dpal-edge export &#x27;" in page  # a folder that a shell must see quoted


def test_curves_are_those_of_the_metrics(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert report._series(rows, "loss") == ([1, 2, 3, 4], [row["loss"] for row in rows])
    assert f"{report.html.short(rows[0]['local'])} to {report.html.short(rows[-1]['local'])}" in text_of(finished)


def test_run_that_was_killed_has_a_report_of_what_is_there(finished, tmp_path):
    run = tmp_path / "killed"
    shutil.copytree(finished, run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    for name in ("validation.jsonl", "report.html"):
        (run / name).unlink()
    page = text_of(run)
    assert "3 of 4, not finished" in page
    assert f"dpal-edge train --out {run} --resume" in page
    assert "newest checkpoint" not in page
    assert "Loss on held-out images" not in page


def test_empty_folder_has_a_report(tmp_path):
    assert "0 of 0, not finished" in text_of(tmp_path)


def test_what_happened_on_the_way_is_told(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    change = {"step": 2, "name": "base_lr", "before": 1e-3, "after": 5e-4}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
    skipped = [{"file": f"crops/{i:02d}.jpg", "reason": "cut <short>"} for i in range(25)]
    (run / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in skipped))
    probes = [{"step": 2, "reid/mAP": 0.25}, {"step": 4, "reid/mAP": 0.5, "pose/PCK": 0.125}]
    (run / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probes))
    passport = json.loads((run / "teachers.json").read_text())[0]
    second = {**passport, "spec": "reid.pth?for=global", "limits": "Bars <surveillance>."}
    (run / "teachers.json").write_text(json.dumps([passport, second]))
    Image.new("RGB", (8, 8)).save(run / "views.png")
    page = text_of(run)
    assert "<tr><td>2</td><td>base_lr</td><td>0.001</td><td>0.0005</td></tr>" in page
    assert "<h2>Skipped, 25 unreadable</h2>" in page
    assert "cut &lt;short&gt;" in page
    assert "And 5 more in skipped.jsonl" in page
    assert "<tr><td>reid/mAP</td><td>0.25</td><td>0.5</td></tr>" in page
    assert "<tr><td>pose/PCK</td><td></td><td>0.125</td></tr>" in page
    assert "<h2>Teachers</h2>" in page
    assert "<code>reid.pth?for=global</code> Bars &lt;surveillance&gt;." in page
    assert 'alt="views of people"' in page


def test_long_curves_are_thinned_and_gaps_left_out():
    rows = [{"step": step, "loss": 1.0 if step % 2 else 3.0} for step in range(1, 1201)]
    xs, ys = report._series(rows, "loss")
    assert (len(xs), xs[0], xs[-1]) == (300, 4, 1200)
    assert set(ys) == {2.0}  # means of four
    rows = [{"step": 1, "norm": None}, {"step": 2, "norm": 2.0}, {"step": 3}, {"step": 4, "norm": math.inf}]
    assert report._series(rows, "norm") == ([2.0], [2.0])
    assert report._series([], "norm") == ([], [])
