"""QLoRA retraining as a library: recipes, an artifact store, and the stages between a base model and a merged one.

Importing this package loads neither torch nor transformers; the stage rooms below it do when they are used.
"""

from importlib.metadata import PackageNotFoundError, version

from qlora_core.errors import QloraError
from qlora_core.recipe import Recipe, load_recipe
from qlora_core.store import Store

try:
    __version__ = version("qlora-flows")
except PackageNotFoundError:  # imported from a folder that was never installed
    __version__ = "0.0.0"

__all__ = ["QloraError", "Recipe", "Store", "__version__", "load_recipe"]
