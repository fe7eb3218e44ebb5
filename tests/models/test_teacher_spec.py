from pathlib import Path

import pytest

from dpal_edge.errors import ConfigError
from dpal_edge.models.teacher_spec import NORMS, ROLES, anchor, parse_spec


def test_a_bare_file_takes_every_default():
    spec = parse_spec("weights/a.pth")
    assert (spec.model, spec.file, spec.given) == ("", "weights/a.pth", frozenset())
    assert spec.roles == ROLES == ("global", "local", "relation")
    assert spec.class_token
    options = (spec.layer, spec.target, spec.size, spec.norm, spec.heads, spec.stored, spec.resize, spec.padding)
    assert options == (None,) * 8


def test_all_options():
    spec = parse_spec(
        "a.pth?for=relation,local&layer=11&global=mean&size=384x192&norm=sapiens&entry=student&heads=6+12"
        "&stored=256x192&resize=1d&cls=no&padding=2&semantic=0.8"
    )
    assert spec.roles == ("local", "relation")  # in the order of roles
    assert (spec.layer, spec.target, spec.size, spec.stored) == (11, "mean", (384, 192), (256, 192))
    assert spec.norm == NORMS["sapiens"]
    assert (spec.entry, spec.heads, spec.resize) == ("student", (6, 12), "1d")
    assert (spec.class_token, spec.padding, spec.semantic) == (False, 2, 0.8)
    assert parse_spec("a.pth?heads=12").heads == (12, 12)
    assert parse_spec("a.pth?semantic=none").semantic is None
    assert parse_spec("a.pth?semantic=none").given == {"semantic"}
    assert parse_spec("a.pth?mean=0.1,0.2,0.3&std=1,1,0.5").norm == ((0.1, 0.2, 0.3), (1.0, 1.0, 0.5))


@pytest.mark.parametrize(
    ("text", "model", "file"),
    [
        ("timm:vit_base_patch16_224.mae", "vit_base_patch16_224.mae", ""),
        ("timm:vit_base_patch16_224@a/b.pth?layer=3", "vit_base_patch16_224", "a/b.pth"),
        ("a@b.pth", "", "a@b.pth"),
    ],
)
def test_sources(text, model, file):
    assert (parse_spec(text).model, parse_spec(text).file) == (model, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no source; expected timm:NAME, timm:NAME@FILE or FILE"),
        ("timm:", "no source"),
        ("a.pth?depth=3", r"unknown option 'depth'; known are for, layer, global, size, norm, mean, std, entry"),
        ("a.pth?", None),
        ("a.pth?layer", "layer is '', expected a whole number"),
        ("a.pth?layer=3&layer=4", "layer is given twice"),
        ("a.pth?for=global,all", "for is 'global,all', expected global, local, relation, or several"),
        ("a.pth?for=local,local", "for is 'local,local'"),
        ("a.pth?global=max", "global is 'max', expected cls or mean or pooled"),
        ("a.pth?size=256", "size is '256', expected height x width"),
        ("a.pth?size=0x128", "size is '0x128'"),
        ("a.pth?norm=clip", "norm is 'clip', expected imagenet or sapiens or half or none"),
        ("a.pth?mean=0.5,0.5,0.5", "give mean and std together, without norm"),
        ("a.pth?norm=half&mean=0,0,0&std=1,1,1", "give mean and std together, without norm"),
        ("a.pth?mean=123,116,103&std=58,57,57", "mean is '123,116,103', expected three numbers of 0 to 1"),
        ("a.pth?mean=0,0,0&std=1,0,1", "std is '1,0,1', expected three numbers above 0"),
        ("a.pth?heads=0", "heads is '0', expected a number of heads"),
        ("a.pth?resize=3d", "resize is '3d', expected 2d or 2d-dino or 1d"),
        ("a.pth?cls=maybe", "cls is 'maybe', expected yes or no"),
        ("a.pth?padding=-1", "padding is '-1', expected a number of pixels"),
        ("a.pth?semantic=2", "semantic is '2', expected 0 to 1, or none"),
        ("a.pth?semantic=nan", "semantic is 'nan'"),
        ("a.pth?entry=", "entry is '', expected the name of a dictionary"),
    ],
)
def test_wrong_specs_are_refused_in_one_line(text, message):
    if message is None:
        assert parse_spec(text).file == "a.pth"
        return
    with pytest.raises(ConfigError, match=message) as refused:
        parse_spec(text)
    assert str(refused.value).startswith(f"teacher {text!r}: ")
    assert "\n" not in str(refused.value)


def test_options_that_mean_nothing_for_a_source_are_refused():
    spec = parse_spec("a.pth?layer=3&semantic=0.2&padding=2")
    spec.refuse_others({"semantic", "padding"}, "this")
    with pytest.raises(ConfigError, match=r"padding, semantic means nothing for a plain ViT; it takes .*heads.*layer"):
        spec.refuse_others({"heads"}, "a plain ViT")


def test_anchored_specs_name_the_same_file_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = Path(tmp_path, "a.pth").resolve()
    assert anchor("a.pth") == str(absolute)
    assert anchor("./a.pth?layer=3&for=global") == f"{absolute}?layer=3&for=global"
    assert anchor("timm:vit@a.pth?layer=3") == f"timm:vit@{absolute}?layer=3"
    assert anchor("timm:vit?layer=3") == "timm:vit?layer=3"
    assert anchor(anchor("a.pth?layer=3")) == anchor("a.pth?layer=3")
