"""Configurations: validation, dictionary form, overrides and their messages, recipes."""

import json

import pytest
from toy import toy_config

from comp.config import AlignmentConfig, ConfigError, OptimConfig, SourceConfig, StageConfig, TowerChoices, field_types
from comp.config_io import apply_overrides, differences, from_dict, read_config, to_dict
from comp.recipes import RECIPES


@pytest.fixture
def config(tmp_path):
    return toy_config(tmp_path)


def test_dictionary_form_is_json_and_comes_back(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_overrides_reach_every_kind_of_field(config):
    changed = apply_overrides(
        config,
        [
            "seed=3",
            "stages.2.optim.lr_vision=1e-4",
            "stages.*.batch_size=5",
            "stages.0.trainable=[vision, adapter]",
            "stages.0.optim.lr_vision=2e-3",
            "stages.3.alignment={mode: literal}",
            "stages.1.alignment=null",
            "stages.0.resolution=48",
            "stages.1.resolution=pretrain",
            "stages.2.max_steps=7",
            "tensorboard=true",
            "eval.data.0.arguments.size=3",
        ],
    )
    assert changed.seed == 3 and changed.tensorboard is True
    assert changed.stages[2].optim.lr_vision == 1e-4 and changed.stages[1].optim.lr_vision == 1e-3
    assert [s.batch_size for s in changed.stages] == [5, 5, 5, 5]
    assert changed.stages[0].trainable == ("vision", "adapter")
    assert changed.stages[3].alignment == AlignmentConfig(mode="literal") and changed.stages[1].alignment is None
    assert changed.stages[0].resolution == 48 and changed.stages[1].resolution == "pretrain"
    assert changed.stages[2].max_steps == 7
    assert changed.eval.data[0].arguments["size"] == 3
    assert config.seed == 0, "the original is left alone"


def test_every_choice_of_the_tower_is_a_field_of_the_run(config):
    """In TowerChoices' own order; what they change in the tower: tests/comp/train/test_parity_options.py."""
    values = ["rope", "raster_legacy", "bilinear", True, False, "bf16_legacy", True, False, 1]
    wanted = dict(zip(field_types(TowerChoices), values, strict=True))
    vision = apply_overrides(config, [f"vision.{name}={str(value).lower()}" for name, value in wanted.items()]).vision
    assert dict(pos_mode=vision.pos_mode, **vision.choices()) == wanted


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.2.optim.lr=1", "unknown field 'stages.2.optim.lr'; stages.2.optim has: lr_vision, lr_adapter, lr_language"),
        ("learning_rate=1", "unknown field 'learning_rate'; the configuration has: name, output_dir"),
        ("stages.7.batch_size=1", "stages has elements 0, 1, 2, 3"),
        ("stages.3.alignment.mode=literal", "stages.3.alignment is null; give it as a whole first"),
        ("seed=-1", "seed must be at least 0 and below 2**63, got -1"),
        ("seed=9223372036854775808", "seed must be at least 0 and below 2**63, got 9223372036854775808"),
        ("seed=1.5", "seed must be int, got 1.5"),
        ("tensorboard=3", "tensorboard must be bool, got 3"),
        ("name.first=x", "name is a single value"),
        ("seed", "looks like field=value"),
        ("stages.0.trainable=[head]", "must be one of 'vision', 'adapter', 'language', got 'head'"),
        ("stages.0.trainable=[vision]", "trains vision, so optim.lr_vision must be positive"),
        ("stages.0.alignment.mode=exact", "alignment.mode must be one of 'sinkhorn'"),
        ("stages.0.resolution=big", '"pretrain" or null'),
        ("stages.0.forward_visual_tokens=8", "cannot hold one sample of max_visual_tokens=64"),
        ("stages.0.data=[]", "data lists no source"),
        ("stages.0.data.0.path=x.json", "exactly one of path, hub and factory"),
        ("stages.0.data.0.sampling=some:3", "data.sampling must be"),
        ("stages.0.optim.betas=[0.9]", "stages.0.optim.betas must be a list of 2 values, got [0.9]"),
        ("stages.0.trainable=vision", "stages.0.trainable must be a list, as [...], got 'vision'"),
        ("stages.0.epochs=inf", "stages.0: stage I: epochs must be a finite number, got inf"),
        ("stages.0.optim.eps=inf", "stages.0.optim.eps must be a finite number, got inf"),
        ("stages.0.optim.max_grad_norm=nan", "optim.max_grad_norm must be a finite number, got nan"),
        ("stages.0.alignment.temperature=inf", "alignment.temperature must be a finite number, got inf"),
        (
            "stages.0.alignment.epsilon=1e-8",
            "alignment.epsilon must be at least 1.2e-7, what cosines in float32 are rounded to, got 1e-08",
        ),
        ("language.lora={alpha: .nan}", "language.lora.alpha must be a finite number, got nan"),
        ("eval.data.0.arguments=3", "eval.data.0.arguments must be a mapping, as {...}, got 3"),
        ("vision.path=", "vision.path must name a folder or a hub id, got ''"),
        ("language.path=", "language.path must name a folder or a hub id, got ''"),
        ("output_dir=", "output_dir must name a folder, got ''"),
        ("stages.1.name=I", "different names"),
        ("stages.1.name=before", "the name of a stage must be"),
        ("stages.1.name=a/b", "the name of a stage must be"),
        ("eval.batch_size=0", "eval.batch_size must be positive, got 0"),
        ("eval.metric=bleu", "eval.metric must be one of 'relaxed_accuracy'"),
        ("max_image_pixels=0", "max_image_pixels must be positive"),
        ("max_image_pixels=200000000", "at most Pillow's own 178956970, got 200000000"),
    ],
)
def test_wrong_overrides_name_the_field_and_what_is_valid(config, override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(config, [override])
    assert message in str(caught.value)


def test_missing_fields_are_named():
    with pytest.raises(ConfigError, match="lacks: vision, language, stages"):
        from_dict({"name": "x"})


def test_differences_are_dotted_names(config):
    other = apply_overrides(config, ["stages.1.optim.lr_vision=5e-3", "seed=9"])
    assert differences(to_dict(config), to_dict(other)) == ["seed", "stages.1.optim.lr_vision"]


def test_a_budget_holds_any_single_sample():
    with pytest.raises(ConfigError, match="forward_text_tokens=10 cannot hold"):
        StageConfig(
            name="x",
            max_text_tokens=20,
            forward_text_tokens=10,
            optim=OptimConfig(lr_vision=1, lr_adapter=1, lr_language=1),
            data=[SourceConfig(path="a.json")],
        )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_builds_validates_and_survives_json(name):
    config = RECIPES[name]()
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert RECIPES[name]() is not RECIPES[name](), "each call gives a fresh configuration"


@pytest.mark.parametrize("name", [n for n in sorted(RECIPES) if "qwen" in n and not n.startswith("comp-")])
def test_paper_recipes_carry_table_11(name):
    one, fixed, native, three = RECIPES[name]().stages
    assert one.trainable == ("adapter",) and not one.rope and one.resolution == "pretrain" and one.optim.lr_adapter == 1e-3
    for stage in (fixed, native):
        assert (stage.optim.lr_vision, stage.optim.lr_adapter, stage.optim.lr_language) == (1e-4, 5e-3, 2e-5)
        assert stage.batch_size == 256 and stage.max_visual_tokens == 3000 and stage.rope
    assert fixed.resolution == 1024 and native.resolution is None and three.resolution is None
    assert (three.optim.lr_vision, three.optim.lr_adapter, three.optim.lr_language) == (2e-5, 1e-5, 1e-5)
    assert three.batch_size == 128 and three.alignment is None
    assert all(s.alignment.weight == 0.05 and s.alignment.epsilon == 0.005 for s in (one, fixed, native))


def test_recipe_from_the_released_tower_trains_native_and_unaligned():
    one, two, three = RECIPES["comp-siglip-so400m_qwen2.5-0.5b"]().stages
    assert one.trainable == ("adapter",)
    assert all(stage.rope and stage.resolution is None and stage.alignment is None for stage in (one, two, three))
    assert (two.optim.lr_vision, three.optim.lr_vision) == (1e-4, 5e-6)


def test_a_run_written_under_older_names_and_with_fewer_fields_reads_as_todays(tmp_path):
    today = RECIPES["tiny"]()
    values = to_dict(today)
    for part in ("vision", "language"):
        values[part]["path"] = values[part]["path"].replace("/comp/tiny/assets/", "/comp/assets/tiny/")
    for stage in values["stages"]:
        for source in stage["data"]:
            source["factory"] = source["factory"].replace("comp.tiny.pages:", "comp.data.tiny:")
    values["eval"]["data"][0]["factory"] = "comp.data.tiny:TinyPages"
    del values["bad_samples"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path / "config.json") == today
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_config(tmp_path / "config.json")
