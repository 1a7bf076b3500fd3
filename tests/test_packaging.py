"""What is installed: one top-level name, real files in place of links, and the versions that the documents promise."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from modeling_lumina_mgpt.processing_lumina_mgpt import TASKS

ROOT = Path(__file__).parent.parent
FOLDERS = ("modeling_lumina_mgpt", "pipelines", "training", "checkpoints", "model_cards")
CHECKPOINT = "checkpoints/lumina-mgpt-tabletop"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources whose default checkpoint surely has a weight file, a link to code and a sub-folder,
    and that has a recipe in a sub-folder."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    folder = root / CHECKPOINT / "some_component"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    (root / CHECKPOINT / "linked.py").symlink_to("../../pipelines/__init__.py")
    (root / "training/recipes/family").mkdir(parents=True, exist_ok=True)
    (root / "training/recipes/family/some_run.yaml").touch()
    return root


def build(checkout: Path, kind: str) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    return next((checkout / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def assert_wheel_is_whole(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert {name.partition("/")[0] for name in names} == {"modeling_lumina_mgpt"}
        linked = archive.read(f"modeling_lumina_mgpt/{CHECKPOINT}/linked.py")
        assert linked == (checkout / "pipelines/__init__.py").read_bytes()
    for folder in FOLDERS[1:]:
        present = {path for path in (checkout / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert {f"modeling_lumina_mgpt/{path.relative_to(checkout)}" for path in present} <= names


def test_a_wheel_holds_everything_under_one_name(checkout):
    assert_wheel_is_whole(build(checkout, "wheel"), checkout)


def test_a_wheel_built_from_the_source_distribution_holds_the_same(checkout, tmp_path):
    with tarfile.open(build(checkout, "sdist")) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    assert_wheel_is_whole(build(unpacked, "wheel"), checkout)


def versions(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / name).read_text(), re.MULTILINE))


def test_lower_bounds_are_the_oldest_tested_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(line for name in ("train", "canny", "test") for line in extras[name])]
    bounds = dict(re.findall(r"([\w-]+)>=(\S+)", "\n".join(required)))
    oldest, tested = versions("constraints-min.txt"), versions("constraints.txt")
    assert oldest.items() <= bounds.items()
    assert bounds.keys() - oldest.keys() == {"mypy", "ruff", "setuptools"}  # run with the tested versions only
    assert bounds.keys() - tested.keys() == {"setuptools"}


def test_the_default_checkpoint_is_small():
    weights = [path.stat().st_size for path in (ROOT / CHECKPOINT).rglob("*.safetensors") if not path.is_symlink()]
    assert len(weights) == 2 and sum(weights) <= 24 * 10**6


def test_the_code_of_the_card_runs(tiny_pipe, tmp_path):
    tiny_pipe.processor.image_processor.palette = [["black", 0, 0, 0]]
    tiny_pipe.save_pretrained(tmp_path)
    card = (ROOT / "model_cards/tabletop.md").read_text().replace("{{", "{").replace("}}", "}")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = "".join(blocks).replace(CHECKPOINT, str(tmp_path))
    exec(compile(code, "card", "exec"), {})
    named = {task for task in TASKS if f'task="{task}"' in code}
    assert named | {"text-to-image", "edit"} == TASKS.keys()


def test_ci_runs_the_commands_of_the_readme():
    marker = "<!-- tests -->\n```bash\n"
    assert (ROOT / "README.md").read_text().count(marker) == 1
    commands = (ROOT / "README.md").read_text().partition(marker)[2].partition("\n```")[0].splitlines()
    assert commands[1:] == ['pip install -c constraints.txt -e ".[test]"', "pytest"]
    assert "sed -n '/^<!-- tests -->$/,/^```$/p' README.md" in (ROOT / ".ci/run").read_text()
