"""All hostile inputs, by what reads them. Files are written when an input is asked for, below one folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tests.unit.hostile import data_files, hub_answers, model_files, recipes

Input = tuple[str, str, Callable[[], object]]
"""Surface, name, and what reads it."""


def all_inputs(folder: Path) -> Iterator[Input]:
    for module in (recipes, model_files, data_files, hub_answers):
        for number, (surface, name, read) in enumerate(module.inputs(folder)):
            place = folder / f"{module.__name__.rpartition('.')[2]}-{number}"
            place.mkdir()
            yield surface, name, lambda read=read, place=place: read(place)
