import json
import subprocess
import sys
import typing

import click
import pytest
from click.testing import CliRunner

from dpal_edge import __version__, cli
from dpal_edge.cli import _Group, _load, main
from dpal_edge.errors import BackendUnavailable, DataError, ParityError
from dpal_edge.runtime.detector import THRESHOLD
from dpal_edge.runtime.doctor import Library


def test_help_tells_the_least_score_of_people():
    assert f"by default {THRESHOLD}." in " ".join(CliRunner().invoke(main, ["run", "--help"]).output.split())


def test_help_names_the_commands():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "doctor" in result.output


def test_version():
    assert CliRunner().invoke(main, ["--version"]).output == f"dpal-edge, version {__version__}\n"


@pytest.mark.parametrize(("error", "code"), [(DataError, 1), (ParityError, 2)])
def test_error_is_one_line_with_the_exit_code_of_its_class(error, code):
    @click.group(cls=_Group)
    def group():
        pass

    @group.command()
    def fail():
        raise error("crops: empty, expected images; name another folder")

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == "Error: crops: empty, expected images; name another folder\n"


def test_missing_dependency_names_the_extra():
    with pytest.raises(BackendUnavailable, match=r"needs no_such_package, .*pip install 'dpal-edge\[camera\]'"):
        _load("no_such_package", "camera")


def test_doctor_prints_text_or_json(monkeypatch):
    monkeypatch.setattr("dpal_edge.runtime.doctor._try", lambda name: Library(state="absent"))
    assert CliRunner().invoke(main, ["doctor"]).stdout.startswith(f"dpal-edge {__version__}, Python 3.")
    assert json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["schema"] == 1


def test_module_is_the_command_and_needs_no_torch():
    code = """
import runpy, sys
sys.argv = ["dpal-edge", "train", "--help"]
try:
    runpy.run_module("dpal_edge", run_name="__main__")
except SystemExit as end:
    sys.exit(end.code or "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: dpal-edge train ")


def test_choices_are_those_of_the_modules_that_know():
    from dpal_edge.models.students import STUDENTS
    from dpal_edge.train.config import PRESETS, TrainConfig
    from dpal_edge.train.methods import METHODS, find_method

    assert set(cli.STUDENTS) == set(STUDENTS)
    assert set(cli.METHODS) == set(METHODS)
    assert tuple(PRESETS) == cli.PRESETS
    options = find_method("dpal").options
    assert typing.get_args(typing.get_type_hints(options)["recipe"]) == cli.RECIPES
    # The help calls the first of each the default.
    assert (cli.STUDENTS[0], cli.METHODS[0], cli.RECIPES[0]) == (
        TrainConfig.student,
        TrainConfig.method,
        options.recipe,
    )


def test_probe_hands_its_options_over_and_prints(monkeypatch):
    calls = []

    class Result:
        def to_dict(self):
            return {"model": "m"}

        def as_text(self):
            return "reid  mAP 0.5"

    def probe(model, **options):
        calls.append((model, options))
        with options.pop("progress")(3) as advance:
            advance(1)
        return Result()

    monkeypatch.setattr("dpal_edge.probe.command.probe", probe)
    arguments = ["probe", "run", "--task", "reid=a", "--task", "pose=b", "--teacher", "t.pth", "--data", "c"]
    result = CliRunner().invoke(main, [*arguments, "--limit", "9", "--size", "64", "32", "--json"])
    assert (result.exit_code, json.loads(result.stdout), result.stderr) == (0, {"model": "m"}, "")
    assert CliRunner().invoke(main, ["probe", "run"]).stdout == "reid  mAP 0.5\n"
    assert calls[0] == (
        "run",
        {
            "tasks": ("reid=a", "pose=b"), "teacher": "t.pth", "data": ("c",), "size": (64, 32), "layer": None,
            "limit": 9, "batch": 32, "device": "auto", "seed": 0,
        },
    )  # fmt: skip
    assert calls[1][1].items() >= {"tasks": (), "teacher": None, "data": (), "size": None, "limit": None}.items()


def test_probe_takes_what_the_command_gives():
    import inspect

    from dpal_edge.probe.command import probe

    given = {option.name for option in main.commands["probe"].params} - {"as_json"} | {"progress"}
    assert given == inspect.signature(probe).parameters.keys()
