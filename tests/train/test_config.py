import json
import typing

import pytest

from dpal_edge.errors import ConfigError
from dpal_edge.train.config import PRESETS, PUBLISHED, TrainConfig, build_config, parse_setting, read_config
from dpal_edge.train.methods import METHODS, find_method


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": 1}, "unknown setting colour for the method dpal; known are accumulate, augment, "),
        ({"steps": 0}, "steps is 0, expected more than 0"),
        ({"batch": -1}, "batch is -1, expected more than 0"),
        ({"base_lr": 0}, "base_lr is 0.0, expected more than 0"),
        ({"keep": 0}, "keep is 0, expected more than 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"relation_temperature": 0}, "relation_temperature is 0.0"),
        ({"size": [0, 128]}, r"size is \(0, 128\), expected more than 0"),
        ({"warmup": 1.5}, "warmup is 1.5, expected 0 to 1"),
        ({"router_warmup": -0.1}, "router_warmup is -0.1, expected 0 to 1"),
        ({"ema_decay": 2}, "ema_decay is 2.0, expected 0 to 1"),
        ({"clip": -1}, "clip is -1.0, expected 0 or more"),
        ({"weight_decay": -1}, "weight_decay is -1.0, expected 0 or more"),
        ({"validation_images": -1}, "validation_images is -1, expected 0 or more"),
        ({"workers": -1}, "workers is -1, expected 0 or more"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"student": "vit_huge"}, "student is 'vit_huge', expected one of vit_tiny, vit_small, swin_tiny"),
        ({"size": [250, 128]}, r"size is \(250, 128\), expected multiples of the patch size 16"),
        ({"local_size": [128, 90]}, "local_size is .*, expected multiples of the patch size 16"),
        ({"crowd_size": [128, 256]}, r"crowd_size is .* more than \(129, 193\) to hold two people of \(128, 96\)"),
        ({"crowd_size": [256, 192]}, ".* to hold two people"),
        ({"crowd_source": "real"}, "crowd_source is 'real' but crowd_data is empty; name a folder of crowds"),
        ({"crowd_source": "mixed"}, ".* but crowd_data is empty"),
        ({"inner_width": 100}, "inner_width is 100, expected a multiple of 48"),
        ({"inner_width": 0}, "inner_width is 0, expected a multiple of 48"),
        ({"router": "hard"}, "router is 'hard', expected one of soft, oracle"),
        ({"mask": None}, "mask is None, expected one of foreground, published, none"),
        ({"heads": 5}, r"heads is '5', expected divisors of the width 192 as N, or as N\+LAST"),
        ({"heads": "6+"}, r"heads is '6\+', expected divisors"),
        ({"heads": "0"}, "heads is '0', expected divisors"),
        ({"steps": 1.5}, "steps is 1.5, expected a whole number"),
        ({"steps": True}, "steps is True, expected a whole number"),
        ({"steps": "many"}, "steps is 'many', expected a whole number"),
        ({"base_lr": True}, "base_lr is True, expected a finite number"),
        ({"base_lr": float("nan")}, "base_lr is nan, expected a finite number"),
        ({"clip": float("inf")}, "clip is inf, expected a finite number"),
        ({"size": 128}, r"size is 128, expected two whole numbers, for example 256x128"),
        ({"size": "256x"}, "size is '256x', expected two whole numbers, for example 256x128"),
        ({"size": "0x128"}, r"size is \(0, 128\), expected more than 0"),
        ({"size": [256]}, r"size is \[256\], expected two whole numbers, for example 256x128"),
        ({"size": [256.0, 128]}, "size is 256.0, expected a whole number"),
        ({"base_lr": "fast"}, "base_lr is 'fast', expected a finite number"),
        ({"data": [["a"]]}, r"data is \['a'\], expected text"),
        ({"pos_init": "ones"}, "pos_init is 'ones', expected one of trunc_normal, uniform"),
        ({"teacher": None}, "teacher is None, expected text"),
        ({"method": "magic"}, "method is 'magic', expected one of dpal, proteus, tinymim"),
        (
            {"method": "proteus", "router": "soft"},
            "unknown setting router for the method proteus; known are accumulate",
        ),
        ({"accumulate": 3}, "batch is 256, expected a multiple of accumulate=3"),
        ({"teacher_cache": "cache"}, "teacher_cache needs views that come again"),
        ({"view_variants": 0}, "view_variants is 0, expected more than 0"),
        ({"data_seed": -1}, "data_seed is -1, expected 0 or more"),
        ({"trackers": ["tensorbored"]}, "trackers is 'tensorbored', expected one of tensorboard, wandb, mlflow"),
        ({"teacher_layer": "last"}, "teacher_layer is 'last', expected a whole number"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_config(fields)


def test_types_that_json_and_toml_cannot_tell_are_accepted():
    sizes = {"size": [384, 128], "local_size": "96x64"}
    config = build_config({**sizes, "clip": 1, "data": "crops", "workers": None, "heads": 3})
    assert (config.size, config.local_size) == ((384, 128), (96, 64))
    assert (config.clip, config.data, config.workers, config.heads) == (1.0, ("crops",), None, "3")
    assert isinstance(config.clip, float)


@pytest.mark.parametrize("method", METHODS)
def test_every_choice_is_accepted(method):
    options = find_method(method).options
    for owner in (TrainConfig, options):
        for name, hint in typing.get_type_hints(owner).items():
            if typing.get_origin(hint) is typing.Literal:
                for value in typing.get_args(hint):
                    extra = {"crowd_data": ["crowds"]} if value in ("real", "mixed") else {}
                    config = build_config({"method": method, name: value, **extra})
                    assert getattr(config if owner is TrainConfig else config.options, name) == value


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_methods_have_names_of_their_own(method):
    assert not typing.get_type_hints(TrainConfig).keys() & typing.get_type_hints(find_method(method).options).keys()


def test_round_trip_through_json():
    config = build_config(
        {"data": ["a", "b"], "teacher": "t.pth", "teacher_layer": 11, "inner_width": 192, "clip": 0.5}
    )
    assert (config.teacher, config.options.inner_width) == (("t.pth",), 192)
    assert build_config(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_and_presets_are_valid():
    assert build_config(PRESETS["default"]) == build_config({})
    published = build_config(PUBLISHED).to_dict()
    assert {name: published[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch=64", ("batch", 64)),
        ("clip=1e-3", ("clip", 0.001)),
        ("size=[64, 32]", ("size", [64, 32])),
        ("mask=none", ("mask", "none")),
        ("workers=null", ("workers", None)),
        (" teacher =timm:a=b", ("teacher", "timm:a=b")),
        ("teacher=", ("teacher", "")),
    ],
)
def test_parse_setting(text, expected):
    assert parse_setting(text) == expected


def test_yaml_takes_1e_3_for_text(tmp_path):
    (tmp_path / "a.yaml").write_text("base_lr: 1e-3\nclip: .inf\n")
    fields = read_config(tmp_path / "a.yaml")
    assert build_config({"base_lr": fields["base_lr"]}).base_lr == 1e-3
    with pytest.raises(ConfigError, match="clip is inf, expected a finite number"):
        build_config(fields)


def test_yaml_builds_no_objects(tmp_path):
    (tmp_path / "a.yaml").write_text(f"batch: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(ConfigError, match="cannot be read as settings"):
        read_config(tmp_path / "a.yaml")
    assert not (tmp_path / "made").exists()


def test_setting_without_a_value():
    with pytest.raises(ConfigError, match="--set batch: expected KEY=VALUE, for example --set batch=64"):
        parse_setting("batch")


def test_toml_yaml_and_json(tmp_path):
    (tmp_path / "a.toml").write_text('batch = 8\nsize = [64, 32]\nteacher = "größer.pth"\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('{"batch": 8, "size": [64, 32], "teacher": "größer.pth"}', encoding="utf-8")
    text = "batch: 8\nsize: [64, 32]\nteacher: größer.pth  # a note\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    expected = {"batch": 8, "size": [64, 32], "teacher": "größer.pth"}
    assert read_config(tmp_path / "a.yaml") == expected
    assert read_config(tmp_path / "a.toml") == read_config(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "batch = = 8", "cannot be read as settings"),
        ("a.json", "{", "cannot be read as settings"),
        ("a.yaml", "batch: [8", "cannot be read as settings"),
        ("a.json", "[1, 2]", "expected a .yaml, .toml or .json file of settings by name"),
        ("a.yaml", "16: 3", "expected a .yaml, .toml or .json file of settings by name"),
        ("a.ini", "batch=8", "expected a .yaml, .toml or .json file of settings by name"),
        ("a.json", b"\xff\xfe", "cannot be read as settings"),
    ],
)
def test_unreadable_settings(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_missing_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read as settings .*No such file"):
        read_config(tmp_path / "none.toml")
