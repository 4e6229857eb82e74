import pytest

from qlora_core.errors import RecipeError
from qlora_core.recipe import Recipe, load_recipe

MINIMAL = """
name: small
model: {source: local, path: model}
data:
  rows: [{source: local, path: rows.json}]
"""
REQUIRED = {
    "package": ("package", "sha256", "file"),
    "local": ("path",),
    "huggingface": ("repo",),
    "modelscope": ("repo",),
    "s3": ("url",),
}
"""Keys without a default, by kind of source."""


def load(folder, text=MINIMAL, *overrides) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def refused(folder, text, *overrides) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


def test_local_paths_start_at_the_recipes_folder(tmp_path):
    recipe = load(tmp_path)
    assert recipe.model.path == tmp_path / "model"
    assert recipe.data.rows[0].path == tmp_path / "rows.json"


def test_overrides_reach_nested_keys_and_list_items(tmp_path):
    recipe = load(tmp_path, MINIMAL, "train.lora.rank=8", "data.rows.0.path=other.json", "train.learning_rate=5e-4")
    assert recipe.train.lora.rank == 8
    assert recipe.data.rows[0].path.name == "other.json"
    assert recipe.train.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lora.rnk=8", ["train.lora", "unknown key `rnk`", "`rank`"]),
        ("trian.seed=1", ["unknown key `trian`", "`train`"]),
        ("data.rows.0.pth=x", ["data.rows.0", "unknown key `pth`", "`path`"]),
        ("train.lora.rank=0", ["train.lora.rank", "greater than or equal to 1", "it is 0"]),
        ("train.schedule=cosinus", ["train.schedule", "'cosine'", "'cosinus'"]),
        ("model.source=gopher", ["model", "'local'", "'huggingface'"]),
        ("name=../../etc", ["name", "pattern"]),
        ("data.rows.7.path=x", ["`7` is no index of a list of 1"]),
        ("train", ["write a dotted key and a value"]),
        ("name.first=x", ["`name` holds the value"]),
        ("train.keep_best=true", ["train", "`keep_best` needs", "`evaluate_every_steps`"]),
        ("train.deepspeed={zero_optimization: {}}", ["train", "`strategy: zero2` or `zero3`", "it is `ddp`"]),
        ("train={strategy: zero2, deepspeed: gone.json}", ["train.deepspeed", "gone.json", "not readable as JSON"]),
        ("train={strategy: zero2, optimizer: adamw_8bit}", ["train", "`optimizer: adamw_8bit`", "use `adamw`"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(tmp_path, override, words):
    message = refused(tmp_path, MINIMAL, override)
    assert all(word in message for word in words), message


HUB = "{source: huggingface, repo: acme/rows, alternatives: [{source: modelscope, repo: nowhere}]}"


@pytest.mark.parametrize(
    ("override", "at"),
    [
        ("model={source: package, package: oops, sha256: '', file: x}", ["model.package", "model.sha256"]),
        ("model={source: local}", ["model.path"]),
        ("merge_base={source: s3, url: http://x}", ["merge_base.url"]),
        ("data.rows.0={source: local, path: 3}", ["data.rows.0.path"]),
        (f"data.rows.0={HUB}", ["data.rows.0.alternatives.0.repo"]),
        (
            "data.evaluation_rows=[{source: package, package: a==1, sha256: '', file: x}]",
            ["data.evaluation_rows.0.sha256"],
        ),
        ("train.lora.target_modules=[q_proj, 7]", ["train.lora.target_modules", "train.lora.target_modules.1"]),
        ("train.micro_batch_size=0", ["train.micro_batch_size", "train.micro_batch_size"]),
        ("evaluation.harness={folder: 3, tasks: []}", ["evaluation.harness.folder", "evaluation.harness.tasks"]),
    ],
)
def test_a_key_is_named_as_it_is_written_whatever_it_is_called(tmp_path, override, at):
    lines = refused(tmp_path, MINIMAL, override).splitlines()[1:]
    assert [line.strip().partition(": ")[0] for line in lines] == at, lines


def test_every_key_of_a_recipe_that_must_be_there_is_named_when_it_is_missing(tmp_path):
    for source in ("package", "local", "huggingface", "modelscope", "s3"):
        for key in ("model", "data.rows.0"):
            lines = refused(tmp_path, MINIMAL, f"{key}={{source: {source}}}").splitlines()[1:]
            named = {line.strip().partition(": ")[0] for line in lines}
            assert named == {f"{key}.{field}" for field in REQUIRED[source]}


def test_a_deepspeed_file_becomes_part_of_the_recipe(tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"overlap_comm": false}}')
    recipe = load(tmp_path, MINIMAL, "train={strategy: zero2, deepspeed: zero.json}")
    assert recipe.train.deepspeed == {"zero_optimization": {"overlap_comm": False}}


def test_a_gate_needs_exactly_one_reference(tmp_path):
    message = refused(tmp_path, MINIMAL, "promotion.gates=[{metric: loss}]")
    assert "promotion.gates.0" in message
    assert "`threshold`" in message


@pytest.mark.parametrize(
    "text", ["name: [", "- a list", "name: a\nname: b\n", "!!python/object/apply:os.system ['true']"]
)
def test_what_is_no_recipe_is_refused_in_one_sentence(tmp_path, text):
    assert str(tmp_path / "recipe.yaml") in refused(tmp_path, text)


def test_a_missing_recipe_names_its_neighbours(tmp_path):
    load(tmp_path)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recip.yaml")


def test_a_recipe_cannot_be_changed_after_it_was_read(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).train.lora.rank = 4
