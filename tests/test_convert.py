"""Published checkpoints become folders that every loader reads, whole or not at all."""

import json
import logging

import pytest
import torch
from golden_weights import published_vq
from published import publish
from safetensors.torch import load_file, save_file

from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor
from modeling_lumina_mgpt import convert_lumina_mgpt_checkpoint as converter
from modeling_lumina_mgpt.convert_lumina_mgpt_checkpoint import convert
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

KINDS = {
    "Lumina-mGPT-7B-768-Omni": ({"family": "lumina"}, 2 * 2356 + 512),
    "Lumina-mGPT-34B-512": (
        {"swin_norm": True, "num_key_value_heads": 2, "model_parallel_size": 2, "num_files": 3},
        4096,
    ),
    "chameleon-7b": ({"num_files": 1}, 4096),
    "Lumina-mGPT-7B-1024": ({}, 4164 + 512),
    "Lumina-mGPT-2.0": ({"family": "lumina-2"}, 10240),
    "PURE": ({"family": "pure", "suffix": "bin"}, 11776),
    "my-finetune": ({"max_position_embeddings": 6000}, 6000),
}
IDS = torch.tensor([[0, 70, 71, 5, 30, 300, 20]])


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_converted_folder_is_the_published_checkpoint(name, tmp_path, caplog):
    values, context = KINDS[name]
    source = publish(tmp_path / name, **values)
    assert "trained for" in convert(source, tmp_path / "out")[-1]
    with caplog.at_level(logging.WARNING):
        published = LuminaMGPTForConditionalGeneration.from_pretrained(source).eval()
        pipe = LuminaMGPTPipeline.from_pretrained(tmp_path / "out")
    # transformers 5.17 takes every vocabulary beyond 100,000 for Mistral's
    assert not [record for record in caplog.records if "fix_mistral_regex" not in record.getMessage()]
    assert torch.equal(pipe.transformer(IDS).logits, published(IDS).logits)
    assert pipe.transformer.config.max_position_embeddings == context

    side_px, unit = pipe.processor.size_unit_px, pipe.processor.codes_per_size_unit
    pipe.set_progress_bar_config(disable=True)
    call = {"height": side_px, "width": side_px, "output_type": "latent", "allow_untrained": True}
    assert pipe("a cat", task="text-to-image", **call).images[0].shape == (unit, unit)


def test_defaults_and_tasks_are_the_checkpoints(tmp_path):
    source = publish(tmp_path / "Lumina-mGPT-7B-768")
    convert(source, tmp_path / "out")
    pipe = LuminaMGPTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer.generation_config.guidance_scale == 4.0
    assert pipe.transformer.config.default_height_px == pipe.processor.target_px == 768
    assert "license_name: chameleon-research-license" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"trained for text-to-image, complete, caption, vqa\. .*Omni does it"):
        pipe("a cat", image=torch.zeros(2, 2, dtype=torch.long), task="control")

    convert(source, tmp_path / "omni", name="Lumina-mGPT-7B-768-Omni", dtype="bf16")
    assert LuminaMGPTProcessor.from_pretrained(tmp_path / "omni").task_prompt("segmentation").startswith("Segmentic")
    assert LuminaMGPTForConditionalGeneration.from_pretrained(tmp_path / "omni").dtype == torch.bfloat16
    assert load_file(tmp_path / "omni" / "model-00001-of-00002.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_an_interrupted_conversion_goes_on_and_leaves_nothing_that_loads(tmp_path, monkeypatch):
    source = publish(tmp_path / "source", num_files=3)
    written = []

    def interrupted(tensors, path, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        save_file(tensors, path, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(converter, "save_file", interrupted)
        convert(source, tmp_path / "out")
    part = tmp_path / "out.part"
    assert not (tmp_path / "out").exists() and not (part / "config.json").exists()
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(source, tmp_path / "out", dtype="fp16")
    kept = {path.name: path.stat().st_mtime_ns for path in part.glob("*.safetensors")}
    assert len(kept) == 2
    convert(source, tmp_path / "out")
    out = tmp_path / "out"
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}.items()
    assert not part.exists() and not [*out.glob("*.unfinished"), *out.glob("source.json")]


def test_starting_from_chameleon_clears_the_heads_image_rows(tmp_path):
    source, out = publish(tmp_path / "source", num_files=1), tmp_path / "out"
    convert(source, out, from_chameleon=True)
    head, before = (load_file(place / "model.safetensors")["lm_head.weight"] for place in (out, source))
    codes = LuminaMGPTProcessor.from_pretrained(out).uni_rep.code_ids
    assert not head[codes].any()
    before[codes] = 0
    assert torch.equal(head, before)


def spoil_weights(source):
    file = source / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.extra.weight"] = tensors.pop("lm_head.weight")
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, file)


def cut_short(name):
    def spoil(source):
        content = (source / name).read_bytes()
        (source / name).write_bytes(content[: len(content) // 2])

    return spoil


def edit_json(name, **values):
    def spoil(source):
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**content, **values}))

    return spoil


def remove(name):
    return lambda source: (source / name).unlink()


SPOILED = {
    "names and shapes": (spoil_weights, "unexpected model.layers.0.mlp.extra.weight.*missing"),
    "cut short": (cut_short("model-00002-of-00002.safetensors"), "00002.safetensors: damaged"),
    "a shard is missing": (remove("model-00002-of-00002.safetensors"), "files that are missing: model-00002"),
    "no index": (remove("model.safetensors.index.json"), "no weights, accepted are"),
    "an empty VQ file": (lambda source: (source / "vqgan.ckpt").write_bytes(b""), "not a file of tensors, or damaged"),
    "a tensor twice": (
        lambda source: save_file(
            load_file(source / "model-00001-of-00002.safetensors")
            | load_file(source / "model-00002-of-00002.safetensors"),
            source / "model-00002-of-00002.safetensors",
        ),
        "00002.safetensors and in another file",
    ),
    "an empty index": (edit_json("model.safetensors.index.json", weight_map={}), "none at all"),
    "no configuration": (remove("config.json"), "config.json: no such file"),
    "another width": (edit_json("config.json", hidden_size=32), r"hidden_size 32 \(the tensors say 16\)"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer.json"),
    "no VQ model": (remove("vqgan.ckpt"), "vqgan.ckpt: no such file; Lumina-mGPT .* needs vqgan.ckpt"),
    "a damaged VQ model": (cut_short("vqgan.ckpt"), "not a file of tensors, or damaged"),
    "another VQ model": (
        lambda source: torch.save(published_vq("chameleon", 16), source / "vqgan.ckpt"),
        "a VQ model of 16 codes; the tokenizer has names for 64",
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published") / "source")


@pytest.mark.parametrize("fault", SPOILED)
def test_a_faulty_source_is_refused_before_anything_is_written(fault, source, tmp_path):
    spoil, complaint = SPOILED[fault]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    spoil(copy)
    with pytest.raises(ValueError, match=complaint):
        convert(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dtype": "int8"}, "dtype 'int8': accepted are fp32, bf16, fp16"),
        ({"name": "Lumina-mGPT-9B"}, "name 'Lumina-mGPT-9B': accepted are Lumina-mGPT-7B-512"),
        ({"source": "no such folder"}, "neither a folder nor a repo"),
        ({"out": "."}, "exists: remove it"),
    ],
)
def test_impossible_requests_are_refused(arguments, complaint, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        convert(**{"source": source, "out": "out", **arguments})
