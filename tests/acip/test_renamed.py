"""Old names keep working for one release, with a warning that names the new one."""

import importlib
import sys

import pytest
from acip_platform.settings import Settings

from acip import renamed
from acip.errors import RecipeError
from acip.modeling_acip import AcipConfig
from acip.recipe import Recipe


@pytest.mark.parametrize("old", sorted(renamed.MODULES))
def test_an_old_module_provides_the_names_of_the_new_one(old: str) -> None:
    sys.modules.pop(old, None)
    entry = renamed.MODULES[old]
    targets = (entry,) if isinstance(entry, str) else entry
    with pytest.warns(FutureWarning, match=" and ".join(targets)):
        module = importlib.import_module(old)
    for target in targets:
        moved = importlib.import_module(target)
        public = [name for name in vars(moved) if not name.startswith("_")]
        assert all(getattr(module, name) is getattr(moved, name) for name in public)
        for before, after in renamed.NAMES.get(target, {}).items():
            assert getattr(module, before) is getattr(moved, after)
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_a_split_module_provides_all_its_old_names() -> None:
    names = ("LoRA", "StraightThrough", "SVDLinear", "Group", "ElasticLinear", "Compressible", "coordinates", "sort_directions",
             "LowRankLinear", "PivotLinear", "plain_linear")  # fmt: skip
    sys.modules.pop("acip.linear", None)
    with pytest.warns(FutureWarning):
        linear = importlib.import_module("acip.linear")
    assert all(getattr(linear, name).__name__ == name for name in names)


def test_every_renamed_name_exists() -> None:
    for module, names in renamed.NAMES.items():
        assert all(hasattr(importlib.import_module(module), name) for name in names.values()), module


@pytest.mark.parametrize("package", sorted(renamed.PACKAGES))
def test_a_package_provides_the_names_of_its_old_module(package: str) -> None:
    module = importlib.import_module(package)
    for name, (new_module, new) in renamed.PACKAGES[package].items():
        with pytest.warns(FutureWarning, match=f"{new_module}.{new}"):
            assert getattr(module, name) is getattr(importlib.import_module(new_module), new)
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize(("old", "new"), sorted(renamed.RECIPE_FIELDS.items()))
def test_an_old_recipe_field_sets_the_new_one(old: str, new: str) -> None:
    value = "nf4" if new == "quantize" else getattr(Recipe(), new)
    with pytest.warns(FutureWarning, match=f"{old} is now called {new}"):
        assert getattr(Recipe.from_dict({old: value}), new) == value


def test_an_old_and_a_new_name_together_are_an_error() -> None:
    with pytest.warns(FutureWarning), pytest.raises(RecipeError, match="distill_weight is given twice"):
        Recipe.from_dict({"distill": 0.5, "distill_weight": 1.0})


@pytest.mark.parametrize(("old", "new"), sorted(renamed.ENVIRONMENT.items()))
def test_an_old_environment_variable_is_read(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=new):
        old_only = Settings.from_env({"ACIP_HOME": "/home/of/a/test", old: "s3://bucket/only"})
    assert "s3://bucket/only" in (old_only.store, old_only.runs)
    both = Settings.from_env({"ACIP_HOME": "/home/of/a/test", old: "s3://bucket/old", new: "s3://bucket/new"})
    assert "s3://bucket/new" in (both.store, both.runs)


def test_the_config_of_an_older_export_is_read() -> None:
    fields = {
        "model_type": "acip", "base_model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
        "acip": {"base_class": "LlamaForCausalLM", "quantise": "int8", "layers": {}},
    }  # fmt: skip
    assert AcipConfig.from_dict(fields).acip == {"base_class": "LlamaForCausalLM", "quantize": "int8", "layers": {}}
