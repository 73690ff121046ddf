"""The package acip does not import the platform, and the folder platform/ does not shadow the standard library."""

import ast
import platform
from pathlib import Path

import pytest

from acip.errors import AcipError, RecipeError
from acip.recipe import RECIPES, Recipe, named

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "acip").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_acip_does_not_import_the_platform(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] not in {"ray", "mlflow", "boto3", "fastapi", "acip_platform"}, f"{path.name} imports {name}"


def test_the_platform_folder_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert platform.system()


def test_recipes_are_validated() -> None:
    for name in RECIPES:
        assert Recipe.from_dict(named(name).to_dict()) == named(name)
    with pytest.raises(RecipeError, match="did you mean 'basis'"):
        Recipe.from_dict({"bassis": "svd"})
    with pytest.raises(RecipeError, match="allowed: 'fisher', 'covariance', 'svd'"):
        Recipe.from_dict({"basis": "pca"})
    for wrong in ({"basis": "pca"}, {"dtype": "fp16"}, {"exclude": "q_proj"}, {"lr": float("inf")}, {"seq_len": 64.5}, {"quantize": None}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            Recipe(**wrong)
    with pytest.raises(RecipeError, match="stop_ratio"):
        Recipe.from_dict({"scores_until": 2.0})
    with pytest.raises(RecipeError, match="nothing to post-tune"):
        Recipe.from_dict({"adapter_rank": 0})
    assert issubclass(RecipeError, AcipError)
    assert issubclass(AcipError, ValueError)
