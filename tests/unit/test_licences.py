import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_licence_of_every_direct_dependency_is_listed_and_nothing_else():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {Requirement(text).name for group in groups for text in group}
    listed = re.findall(r"^\| (\S+) \| \S.* \| .*\|$", (CHECKOUT / "docs" / "licences.md").read_text(), re.M)
    assert sorted(set(listed) - {"package"}) == sorted(wanted)
