"""What a user writes: one frozen model per stage, read from YAML.

A key that no model knows is refused at every level, with the nearest known key suggested. Units are part of names.
"""

from qlora_core.recipe.data import DataRecipe, Split, ToolCalls
from qlora_core.recipe.judge import EvaluationRecipe, Gate, Generation, Harness, PromotionRecipe
from qlora_core.recipe.merge import MergeRecipe
from qlora_core.recipe.part import Fraction, Part, Sha256
from qlora_core.recipe.recipe import Recipe, load_recipe
from qlora_core.recipe.sources import COMMIT, HubSource, LocalSource, PackageSource, S3Source, Share, Source
from qlora_core.recipe.train import EarlyStopping, Lora, LossSpike, Quantization, TrainRecipe

__all__ = [
    "COMMIT",
    "DataRecipe",
    "EarlyStopping",
    "EvaluationRecipe",
    "Fraction",
    "Gate",
    "Generation",
    "Harness",
    "HubSource",
    "LocalSource",
    "Lora",
    "LossSpike",
    "MergeRecipe",
    "PackageSource",
    "Part",
    "PromotionRecipe",
    "Quantization",
    "Recipe",
    "S3Source",
    "Sha256",
    "Share",
    "Source",
    "Split",
    "ToolCalls",
    "TrainRecipe",
    "load_recipe",
]
