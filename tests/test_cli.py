import json

import click
import pytest
from click.testing import CliRunner

from dpal_edge import __version__
from dpal_edge.cli import _Group, _load, main
from dpal_edge.errors import BackendUnavailable, DataError, ParityError
from dpal_edge.runtime.doctor import Library


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
