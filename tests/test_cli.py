"""The command line draws and talks, and says in one line what was wrong."""

import re
import subprocess
import sys
from importlib.metadata import version
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from PIL import Image
from typer.testing import CliRunner

from modeling_lumina_mgpt.pipelines.cli import app
from modeling_lumina_mgpt.pipelines.places import folder_or_repo


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch):
    """Runs a command on the tiny model, in a folder that holds a picture `input.png`."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((64, 48)).save("input.png")

    def invoke(*arguments, **kwargs):
        return CliRunner().invoke(app, [*arguments, "--model", "tiny"], **kwargs)

    return invoke


def test_generate_draws_what_the_pipeline_draws_and_shows_progress(run, tiny_pipe):
    result = run("generate", "a red sphere", "--size", "32x48", "--seed", "3", "-o", "new/picture.png")
    expected = tiny_pipe("a red sphere", width=32, height=48, generator=torch.Generator().manual_seed(3)).images[0]
    assert result.exit_code == 0 and "34/34" in result.stderr
    assert Image.open("new/picture.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("edit", "input.png", "Remove the sphere."),
        ("control", "input.png", "two cubes"),
        ("predict", "depth", "input.png"),
        ("predict", "detection", "input.png", "a cube"),
    ],
)
def test_pictures_become_pictures_of_their_size(run, arguments):
    assert run(*arguments, "-o", "output.png").exit_code == 0
    assert Image.open("output.png").size == (64, 48)


def test_numbers_become_an_array_and_a_box_is_said(run):
    result = run("predict", "depth", "input.png", "-o", "depth.npy")
    depth = np.load("depth.npy")
    assert result.exit_code == 0 and "depth.npy (48x64)" in result.stderr
    assert depth.shape == (48, 64) and 0 <= depth.min() < depth.max() <= 1
    result = run("predict", "detection", "input.png", "a cube", "-o", "output.png")
    said = r"^box \(left, top, right, bottom\): (none found|\(\d+(, \d+){3}\))$"
    assert result.exit_code == 0 and re.search(said, result.stdout, re.MULTILINE)


def test_chat_goes_on_until_an_empty_line(run):
    talk = "2 < 3 and 5 > 4?\nAnd <absent.png>?\nAnd <input.png> this?\n\nAnd <gone.png>?\n"
    result = run("chat", "--seed", "0", input=talk)
    assert result.exit_code == 0 and result.stdout.count("> ") >= 4
    assert "absent.png" in result.stderr and result.stderr.count("Error") == 1


def test_chat_ends_with_its_input(run):
    result = run("chat", "--max-new-tokens", "9", input="2 < 3?")
    assert result.exit_code == 0 and "Abort" not in result.stderr


def test_help_is_no_error():
    for arguments in (["--help"], ["generate", "--help"], ["convert", "--help"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and "Usage" in result.stdout and not result.stderr


def test_a_task_is_asked_for_in_a_talk(run):
    talk = "/depth <input.png>\n/detection a cube <input.png>\n/pair a cat\n/etch <input.png>\n/depth\n\n"
    result = run("chat", "--seed", "0", "--max-new-tokens", "60", input=talk)
    assert result.exit_code == 0 and result.stderr.count("Error") == 3
    for said in ("'pair' is for `lumina-mgpt generate`", "'etch': accepted are", "'depth' takes an image"):
        assert said in result.stderr


def test_a_place_is_a_folder_or_may_be_a_repo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models--runs--known").mkdir(parents=True)
    (tmp_path / "runs" / "there").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(HfApi, "repo_info", lambda self, name, **_: asked.append(name) or ("hub" in name or 1 / 0))
    for name in ("runs/there", "../" + tmp_path.name, "Alpha-VLLM/Lumina-mGPT-7B-768", "runs/known"):
        assert folder_or_repo(name, "model") == name
    assert not asked
    assert folder_or_repo("runs/on-the-hub", "model") == "runs/on-the-hub"
    for error in (OfflineModeIsEnabled("offline"), RepositoryNotFoundError("404", response=Mock())):
        monkeypatch.setattr(HfApi, "repo_info", Mock(side_effect=error))
        with pytest.raises(ValueError, match="model 'runs/absent': runs has no absent"):
            folder_or_repo("runs/absent", "model")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model 'runs/no--repo': runs has no no--repo"):  # which no repo can be called
        folder_or_repo("runs/no--repo", "model")
    with pytest.raises(ValueError, match=r"lora '\./absent': neither a folder nor a repo"):
        folder_or_repo("./absent", "lora")


def test_a_push_without_connection_is_one_line(tiny_folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    result = CliRunner().invoke(app, ["push", str(tiny_folder), "name/repo"])
    assert result.exit_code == 2 and not result.stdout and result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: http://127.0.0.1:9 cannot be reached: ")


def test_the_version_is_shown():
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == version("lumina-mgpt")


def test_recipes_go_to_the_trainer_that_they_name(tmp_path, monkeypatch):
    from modeling_lumina_mgpt.training import chain, sft, train_vq

    called = []
    for module in (sft, train_vq, chain):
        monkeypatch.setattr(module, "train", lambda recipe, *folder: called.append(type(recipe).__name__))
    right = [
        "{output_dir: x, mixture: {target_px: 64, sources: [{task: chat, path: z}]}, sft: {}, model: y}",
        "{trainer: vq, output_dir: x, model: {block_out_channels: [8, 8]}, num_patches: 1}",
        "{trainer: chain, output_dir: x, minutes: 1, stages: [{recipe: a.yaml, share: 1}]}",
    ]
    wrong = {"trainer: rl": "accepted are vq, sft, chain", "lr: 3": "'lr'; accepted are output_dir", "a: [": "YAML"}
    results = []
    for text in (*right, *wrong):
        (tmp_path / "recipe.yaml").write_text(text)
        results.append(CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")]))
    assert called == ["SFTRecipe", "VQRecipe", "ChainRecipe"]
    assert [result.exit_code for result in results] == [0, 0, 0, 2, 2, 2]
    assert all(said in result.stderr for said, result in zip(wrong.values(), results[3:], strict=True))


def test_minutes_are_of_recipes_that_have_them(tmp_path, monkeypatch):
    from modeling_lumina_mgpt.training import chain, sft

    given, path = [], tmp_path / "recipe.yaml"
    monkeypatch.setattr(sft, "train", lambda recipe: given.append(recipe.max_minutes))
    monkeypatch.setattr(chain, "train", lambda recipe, folder: given.append(recipe.minutes))
    sft_text = "{output_dir: x, mixture: {target_px: 64, sources: [{task: chat, path: z}]}, sft: {}, model: y}"
    chain_text = "{trainer: chain, output_dir: x, minutes: 1, stages: [{recipe: a.yaml, share: 1}]}"
    vq_text = "{trainer: vq, output_dir: x, model: {block_out_channels: [8, 8]}}"
    for text, minutes, said in (
        (sft_text, "7", ""),
        (chain_text, "7", ""),
        (sft_text, "0", "max_minutes 0.0: accepted are numbers above 0"),
        (chain_text, "0", "minutes 0.0: accepted are numbers above 0"),
        (vq_text, "7", "trainer 'vq' has num_steps in place of minutes"),
    ):
        path.write_text(text)
        result = CliRunner().invoke(app, ["train", str(path), "--minutes", minutes])
        assert result.exit_code == (2 if said else 0) and said in result.stderr
    assert given == [7, 7]


def test_what_only_some_commands_need_is_not_imported_before_they_run():
    """The package itself needs torch and transformers, whose models bring accelerate and scipy."""
    own = "modeling_lumina_mgpt."
    names = {"datasets", "diffusers", "peft", "trl", f"{own}training", f"{own}pipelines.pipeline_lumina_mgpt"}
    code = f"import sys, {own}pipelines.cli; print({names} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.stdout == "set()\n", found.stderr
