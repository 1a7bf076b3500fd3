"""Published checkpoints become folders that every loader reads, whole or not at all."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from contextlib import contextmanager

import diffusers.utils.logging
import numpy as np
import pytest
import torch
import transformers.utils.logging
from golden_weights import GOLDEN, published_decoder, published_vq
from PIL import Image
from published import FAMILIES, NARROW, NUM_CODES, publish
from safetensors.torch import load_file, save_file

from helpers import contents
from hub_server import run_python
from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor
from modeling_lumina_mgpt import convert_lumina_mgpt_checkpoint as converter
from modeling_lumina_mgpt.convert_lumina_mgpt_checkpoint import check, convert
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

LUMINA = {"guidance_scale": 4.0, "image_top_k": 2000, "text_top_k": 5}
LUMINA_2 = {"guidance_scale": 4.0, "guidance_schedule": "decay", "image_top_k": 4096, "text_top_k": 10}
PURE = {"guidance_scale": 0.8, "image_temperature": 0.9, "text_temperature": 0.9, "text_top_k": 1}
FP_SFT, CHAMELEON = "text-to-image complete caption vqa", "caption vqa"
OMNI = f"{FP_SFT} edit depth normal pose segmentation detection control refine"
SWIN = {"swin_norm": True, "num_key_value_heads": 2}
SHARDED = {**SWIN, "model_parallel_size": 2, "num_files": 3}
KINDS = {  # its files; sampling defaults, tasks, side of its pictures, context
    "Lumina-mGPT-7B-512": ({}, LUMINA, FP_SFT, 512, 4096),
    "Lumina-mGPT-7B-768": ({}, LUMINA, FP_SFT, 768, 4096),
    "Lumina-mGPT-7B-768-Omni": (
        {"family": "lumina"},
        {"guidance_scale": 1.0, "image_top_k": 200, "text_top_k": 5},
        OMNI,
        768,
        2 * 2356 + 512,
    ),
    "Lumina-mGPT-7B-1024": ({}, LUMINA, FP_SFT, 1024, 4164 + 512),
    "Lumina-mGPT-34B-512": (SHARDED, LUMINA, FP_SFT, 512, 4096),
    "Chameleon_7B_mGPT": ({}, LUMINA, CHAMELEON, 512, 4096),
    "Chameleon_34B_mGPT": (SHARDED, LUMINA, CHAMELEON, 512, 4096),
    "chameleon-7b": ({"num_files": 1, "row_per_head": True}, LUMINA, CHAMELEON, 512, 4096),
    "chameleon-30b": ({**SHARDED, "row_per_head": True}, LUMINA, CHAMELEON, 512, 4096),
    "Lumina-mGPT-2.0": ({"family": "small-2"}, LUMINA_2, "text-to-image complete pair", 768, 10240),
    "Lumina-mGPT-2.0-Omni": ({"family": "lumina-2"}, LUMINA_2, "text-to-image complete pair panel", 768, 10240),
    "PURE": ({"family": "pure", "suffix": "bin"}, {**PURE, "top_k_schedule": "entropy"}, "restore", 512, 11776),
    "my-finetune": ({"max_position_embeddings": 6000}, LUMINA, None, 512, 6000),
    "my-stretched": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
        LUMINA,
        None,
        512,
        64,
    ),
}
IDS = torch.tensor([[0, 70, 71, 5, 30, 300, 20]])


@contextmanager
def propagating():
    """Lets the warnings of both libraries reach pytest, which they do not by themselves."""
    for library in (transformers, diffusers):
        library.utils.logging.enable_propagation()
    yield
    for library in (transformers, diffusers):
        library.utils.logging.disable_propagation()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_converted_folder_is_the_published_checkpoint(name, tmp_path, caplog):
    files, defaults, tasks, side_px, context = KINDS[name]
    source, out = publish(tmp_path / name, **files), tmp_path / "out"
    assert "trained for" in convert(source, out)[-1]

    # Names and logits
    with propagating():
        published = LuminaMGPTForConditionalGeneration.from_pretrained(source).eval()
        pipe = LuminaMGPTPipeline.from_pretrained(out)
        _, loading = LuminaMGPTForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    # transformers 5.17 takes every vocabulary beyond 100,000 for Mistral's
    assert not [record for record in caplog.records if "fix_mistral_regex" not in record.getMessage()]
    assert not any(loading.values())
    shape = {**NARROW, **{name: value for name, value in files.items() if hasattr(LuminaMGPTConfig, name)}}
    wanted = published_decoder(LuminaMGPTConfig(**shape, vocab_size=8), seed=0, std=0.1)
    assert set().union(*map(load_file, out.glob("*.safetensors"))) == wanted.keys()
    assert torch.equal(pipe.transformer(IDS).logits, published(IDS).logits)

    # The VQ model, by what the reference's made of a picture
    golden = np.load(GOLDEN / f"vq_{FAMILIES[files.get('family', 'small')][2]}.npz")
    codes = pipe.processor.encode_images([Image.fromarray(golden["image"])], size=(96, 64))[0]
    assert torch.equal(codes % NUM_CODES, torch.from_numpy(golden["codes"]).long())
    picture = pipe.processor.decode_image(pipe.processor.uni_rep.decode(pipe.processor.uni_rep.encode(codes)))
    pixels = ((golden["pixels"].transpose(1, 2, 0) + 1) * 127.5).clip(0, 255)
    assert np.abs(np.array(picture) - pixels).max() < 1.01

    # What it does, and how
    assert vars(pipe.transformer.generation_config).items() >= defaults.items()
    assert pipe.processor.trained_tasks == (tasks and [t for t in pipe.processor.tasks if t in tasks.split()])
    config = pipe.transformer.config
    assert config.default_height_px == config.default_width_px == pipe.processor.target_px == side_px
    assert config.max_position_embeddings == context
    unit = pipe.processor.codes_per_size_unit
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "output_type": "latent", "allow_untrained": True}
    if context > 64:
        assert pipe("a cat", task="text-to-image", **call).images[0].shape == (unit, unit)


def test_tasks_beyond_a_checkpoints_are_refused_and_it_may_be_named(tmp_path):
    source = publish(tmp_path / "Lumina-mGPT-7B-768")
    convert(source, tmp_path / "out")
    pipe = LuminaMGPTPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"trained for text-to-image, complete, caption, vqa\. .*Omni does it"):
        pipe("a cat", image=torch.zeros(2, 2, dtype=torch.long), task="control")

    convert(source, tmp_path / "omni", name="alpha-vllm/lumina-mgpt-7b-768-omni", dtype="bf16")
    assert LuminaMGPTProcessor.from_pretrained(tmp_path / "omni").task_prompt("segmentation").startswith("Segmentic")
    assert LuminaMGPTForConditionalGeneration.from_pretrained(tmp_path / "omni").dtype == torch.bfloat16
    assert load_file(tmp_path / "omni" / "model-00001-of-00002.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_cards_name_the_source_and_its_licence(tmp_path):
    for family in ("small", "small-2"):
        publish(tmp_path / family, family)
    licences = {p.repo: converter._card(p.repo, p.family, p) for p in converter.PUBLISHED}
    for repo, card in licences.items():
        apache = repo.startswith("Alpha-VLLM/Lumina-mGPT-2.0")
        assert f"Converted from `{repo}`, a checkpoint" in card and f"base_model: {repo}" in card
        assert ("license: apache-2.0" in card) == apache
        assert ("license_name: chameleon-research-license" in card and "research only" in card) != apache

    def card(family, **kwargs):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert(tmp_path / family, tmp_path / "out", **kwargs)
        return (tmp_path / "out" / "README.md").read_text()

    assert "Converted from `small-2` (taken for `Alpha-VLLM/Lumina-mGPT-2.0`), a" in card(
        "small-2", name="Lumina-mGPT-2.0"
    )
    plain = card("small")
    assert "license: unknown" in plain and "base_model" not in plain and "taken for" not in plain
    with pytest.raises(
        ValueError, match=r"called Lumina-mGPT-2.0, which is Lumina-mGPT 2.0 .* of Lumina-mGPT \(arXiv"
    ):
        card("small", name="Lumina-mGPT-2.0")
    with pytest.raises(ValueError, match=r"from-chameleon .* undo the training .*Lumina-mGPT 2\.0"):
        card("small-2", from_chameleon=True)


@pytest.mark.hub
def test_the_command_converts_from_a_hub_and_knows_a_fork_from_its_original(hub, tmp_path):
    repo = hub.repo_id("Lumina-mGPT-7B-768")
    publish(tmp_path / "published", num_files=3)
    code = f"""
        import os
        from huggingface_hub import HfApi, snapshot_download
        from typer.testing import CliRunner
        from modeling_lumina_mgpt.pipelines.cli import app

        HfApi().create_repo({repo!r})
        HfApi().upload_folder(repo_id={repo!r}, folder_path="published")
        run = lambda *arguments: CliRunner().invoke(app, ["convert", *arguments])
        absent = run({repo!r}, "out", "--vq", "absent.ckpt")
        assert absent.exit_code == 2 and "absent.ckpt: no such file" in absent.stderr, absent.stderr
        cached = os.path.join(os.environ["HF_HOME"], "hub")
        assert not os.path.exists(cached), "something was downloaded first"
        absent = run({repo!r} + "-no", "out")
        assert absent.exit_code == 2 and "no repo that you may read" in absent.stderr, absent.stderr
        result = run({repo!r}, "out", "--from-chameleon", "--dtype", "bf16")
        assert result.exit_code == 0 and "trained for (not stated)" in result.stdout, result.stderr
        assert run("out", "--check").stdout == result.stdout
    """
    run_python(code, hub.env, tmp_path)
    convert(tmp_path / "published", tmp_path / "local", from_chameleon=True, dtype="bf16")
    for path in (tmp_path / "local").rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "local")).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Converted from `{repo}`, a" in card and "license: unknown" in card


# Interrupted conversions


def assert_nothing_loads(folder):
    for loader in (LuminaMGPTForConditionalGeneration, LuminaMGPTPipeline):
        with pytest.raises((OSError, ValueError)):
            loader.from_pretrained(folder)


def convert_until(moment, source, out):
    """Converts up to a call of what is named, in which it is killed."""
    write_shard = converter.save_file

    def die(*arguments, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in_the_second_shard(tensors, path, **kwargs):
        if path.name.startswith("model-00002"):
            path.with_name("temporary").write_bytes(b"half")
            die()
        write_shard(tensors, path, **kwargs)

    place = converter.json if moment == "dumps" else converter
    setattr(place, moment, die_in_the_second_shard if moment == "save_file" else die)
    convert(source, out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["dumps", "_save_code", "save_file", "_check"])
def test_a_killed_conversion_leaves_nothing_that_loads_and_goes_on(moment, source, tmp_path):
    convert(source, tmp_path / "whole")
    processes = multiprocessing.get_context("forkserver")  # whose children have no threads of ours
    processes.set_forkserver_preload([converter.__name__])
    child = processes.Process(target=convert_until, args=(moment, source, tmp_path / "out"))
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        raise AssertionError(f"{moment} was not reached")
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert_nothing_loads(tmp_path / "out.part")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.part").glob("model-*.safetensors")}
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all((tmp_path / "out" / path.name).stat().st_mtime_ns == time for path, time in kept.items())
    assert not (tmp_path / "out.part").exists()


def test_an_interrupted_conversion_is_not_mixed_with_another(source, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(converter, "_write_index", interrupted)
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(source, tmp_path / "out", dtype="fp16")
    (tmp_path / "out.part" / converter.SOURCE_RECORD).unlink()
    with pytest.raises(ValueError, match="in the way, and was not made by a conversion"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("limit_bytes", [2_000, 60_000, 100_000])
def test_a_full_disk_is_said_to_be_one(limit_bytes, source, tmp_path):
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, whole[1]))
    try:
        with pytest.raises(OSError, match=r"out\.part: writing failed, a rerun goes on from there: .*File too large"):
            convert(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert not (tmp_path / "out").exists()
    assert_nothing_loads(tmp_path / "out.part")
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("num_files", [1, 3])
def test_starting_from_chameleon_clears_the_heads_image_rows(num_files, tmp_path):
    source, out = publish(tmp_path / "source", num_files=num_files), tmp_path / "out"
    convert(source, out, from_chameleon=True)
    file = next(file.name for file in out.glob("*.safetensors") if "lm_head.weight" in load_file(file))
    head, before = (load_file(place / file)["lm_head.weight"] for place in (out, source))
    codes = LuminaMGPTProcessor.from_pretrained(out).uni_rep.code_ids
    assert not head[codes].any()
    before[codes] = 0
    assert torch.equal(head, before)


# Faults


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


def edit_weights(**changes):
    """Changes tensors, or removes those that become None; double underscores stand for dots."""

    def spoil(source):
        for file in source.glob("*.safetensors"):
            tensors = load_file(file)
            for name, change in changes.items():
                if (name := name.replace("__", ".")) in tensors:
                    tensors[name] = change(tensors[name])
            save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, file)

    return spoil


def edit_vq(**changes):
    def spoil(source):
        weights = torch.load(source / "vqgan.ckpt")["state_dict"]
        for name, change in changes.items():
            weights[name.replace("__", ".")] = change(weights[name.replace("__", ".")])
        torch.save(weights, source / "vqgan.ckpt")

    return spoil


def write(name, content):
    return lambda source: (source / name).write_text(content)


def lose_layer(source):
    for file in source.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if "layers.1." not in k}, file)


def rename_token(old, new):
    def spoil(source):
        file = source / "tokenizer.json"
        file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))

    return spoil


CONFIG, INDEX, VOCABULARY = "config.json", "model.safetensors.index.json", "tokenizer.json"
EMBEDDING, Q_PROJ = "model__embed_tokens__weight", "model__layers__0__self_attn__q_proj__weight"
SPOILED = {
    # Weights
    "names and shapes": (spoil_weights, "unexpected model.layers.0.mlp.extra.weight.*model.norm.weight .* not"),
    "a lost layer": (lose_layer, "missing model.layers.1.input_layernorm.weight; missing model.layers.1.mlp"),
    "integers": (edit_weights(lm_head__weight=torch.Tensor.char), r"lm_head.weight in .* dtype I8, accepted are fp32"),
    "doubles": (edit_weights(lm_head__weight=torch.Tensor.double), "lm_head.weight in .* has dtype F64"),
    "one side": (edit_weights(**{Q_PROJ: torch.Tensor.flatten}), r"not a decoder .*q_proj.weight has shape \[256\]"),
    "no side": (edit_weights(lm_head__weight=lambda head: head[0, 0]), r"lm_head.weight in .* shape \[\], not"),
    "no rows": (edit_weights(**{EMBEDDING: lambda rows: rows[:0]}), r"embed_tokens.weight has shape \[0, 16\]"),
    "odd heads": (edit_weights(**{Q_PROJ: lambda rows: rows[:6]}), r"by its shapes: .*q_proj.weight \[6, 16\]"),
    "more q/k norm rows than heads": (
        edit_weights(model__layers__0__self_attn__q_norm__bias=lambda rows: rows.repeat(3, 1)),
        r"q_norm.bias in .* has shape \[3, 4\], not \[4, 4\]",
    ),
    "another architecture": (
        edit_weights(**{EMBEDDING: lambda rows: None}),
        "not a decoder of a known layout: missing model.embed_tokens.weight",
    ),
    "cut short": (cut_short("model-00002-of-00002.safetensors"), "00002.safetensors: damaged"),
    "a pointer of git LFS": (write("model-00002-of-00002.safetensors", "version https://git-lfs"), "00002.*: damaged"),
    "a shard is missing": (remove("model-00002-of-00002.safetensors"), "files that are missing: model-00002"),
    "no index": (remove(INDEX), "no weights, accepted are"),
    "a tensor twice": (
        lambda source: save_file(
            load_file(source / "model-00001-of-00002.safetensors")
            | load_file(source / "model-00002-of-00002.safetensors"),
            source / "model-00002-of-00002.safetensors",
        ),
        "00002.safetensors and in another file",
    ),
    "an empty index": (edit_json(INDEX, weight_map={}), "none at all"),
    "an index of lists": (edit_json(INDEX, weight_map={"lm_head.weight": ["a"]}), "weight_map is no table"),
    "an index that is a list": (write(INDEX, "[]"), "index.json: holds a list"),
    "an index without a map": (write(INDEX, "{}"), "weight_map is no table"),
    "an index that leads away": (edit_json(INDEX, weight_map={"a": "../copy/config.json"}), "the files beside it"),
    # Configuration
    "no configuration": (remove(CONFIG), "config.json: no such file"),
    "a list for a configuration": (write(CONFIG, "[1]"), "config.json: holds a list"),
    "half a configuration": (cut_short(CONFIG), "config.json: not JSON"),
    "not even text": (lambda source: (source / CONFIG).write_bytes(b"\xff\xfe"), "config.json: not JSON"),
    "another width": (edit_json(CONFIG, hidden_size=32), r"hidden_size 32 \(the tensors say 16\)"),
    "fewer layers": (edit_json(CONFIG, num_hidden_layers=1), "unexpected model.layers.1.input_layernorm.weight"),
    "countless layers": (edit_json(CONFIG, num_hidden_layers=10**9), "describes no decoder: num_hidden_layers"),
    "layers in words": (edit_json(CONFIG, num_hidden_layers="two"), "describes no decoder: .*num_hidden_layers"),
    "a length in words": (edit_json(CONFIG, max_position_embeddings="long"), "no decoder: .*max_position_embeddings"),
    "a list of thetas": (edit_json(CONFIG, rope_scaling=[1]), "describes no decoder: .*rope"),
    "a theta in words": (edit_json(CONFIG, rope_theta="x"), "config.json: describes no decoder"),
    "an unknown activation": (edit_json(CONFIG, hidden_act="nope"), "config.json: describes no decoder: .*nope"),
    "converted already": (edit_json(CONFIG, model_type="lumina_mgpt"), "copy is converted already: .*--check"),
    # Tokenizer
    "no tokenizer": (remove(VOCABULARY), "no tokenizer.json and no text_tokenizer.json; --tokenizer"),
    "half a tokenizer": (cut_short(VOCABULARY), "tokenizer.json: not a tokenizer"),
    "a list for a tokenizer": (write(VOCABULARY, "[]"), "tokenizer.json: not a tokenizer"),
    "a list beside the tokenizer": (write("tokenizer_config.json", "[]"), "tokenizer_config.json: holds a list"),
    "numbers beside the tokenizer": (edit_json("tokenizer_config.json", bos_token=5), "tokenizer.json: not a token"),
    "an unknown bos": (edit_json("tokenizer_config.json", bos_token="<b>"), "not in the vocabulary: bos_token '<b>'"),
    "an unknown pad": (edit_json("tokenizer_config.json", pad_token="<p>"), "not in the vocabulary: pad_token '<p>'"),
    "no bos, no eos": (
        write("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
        "not in the vocabulary: bos_token and eos_token",
    ),
    "no start token": (rename_token("<racm3:break>", "<x>"), "the tokenizer has no token <racm3:break>"),
    "a gap in the codes": (rename_token("IMGIMGHZ", "<x>"), "the tokenizer has no token for image code 7"),
    "ids beyond the embedding": (
        lambda source: publish_again(source, vocab_size=290),
        "an embedding of 290 rows for a tokenizer with ids to",
    ),
    # VQ model
    "no VQ model": (
        remove("vqgan.ckpt"),
        r"vqgan.ckpt: no such file; Lumina-mGPT .* needs vqgan.ckpt .*: --vq",
    ),
    "an empty VQ file": (lambda source: (source / "vqgan.ckpt").write_bytes(b""), "not a file of tensors, or damaged"),
    "a damaged VQ model": (cut_short("vqgan.ckpt"), "vqgan.ckpt: not a file of tensors, or damaged"),
    "a VQ model that is code": (
        lambda source: torch.save({"state_dict": {"a": Image.new("L", (1, 1))}}, source / "vqgan.ckpt"),
        "vqgan.ckpt: .*not a file of tensors, or damaged",
    ),
    "numbers for a VQ model": (
        lambda source: torch.save({"state_dict": {"a": 1}}, source / "vqgan.ckpt"),
        "vqgan.ckpt: .*holds other things than tensors",
    ),
    "another VQ model": (
        lambda source: torch.save(published_vq("chameleon", 16), source / "vqgan.ckpt"),
        "a VQ model of 16 codes; the tokenizer has names for 256",
    ),
    "a VQ model of another scale": (
        lambda source: torch.save(published_vq("llamagen"), source / "vqgan.ckpt"),
        "a VQ model with 8 px per code: this processor's layout wants 16",
    ),
    "the decoder for a VQ model": (
        lambda source: torch.save({"lm_head.weight": torch.zeros(2, 2)}, source / "vqgan.ckpt"),
        "vqgan.ckpt: no VQ model of a known layout: missing",
    ),
    "integers in the VQ model": (
        edit_vq(encoder__conv_in__bias=torch.Tensor.char),
        "vqgan.ckpt: .*encoder.conv_in.bias has dtype int8, accepted are fp32",
    ),
    "an empty codebook": (
        edit_vq(quantize__embedding__weight=lambda rows: rows[:0]),
        r"no VQ model of a known layout: quantize.embedding.weight has shape \[0, 32\]",
    ),
}


def publish_again(source, **values):
    shutil.rmtree(source)
    publish(source, **values)


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
        ({"source": "no-such-folder"}, "neither a folder nor a repo"),
        ({"source": "folder/file"}, "neither a folder nor a repo"),
        ({"out": "."}, "exists: remove it"),
        ({"out": "folder/file/out"}, "file is not a folder that can be written to"),
        ({"out": "taken"}, "taken.part is in the way"),
        # Before anything is fetched of a repo
        ({"source": "some/repo", "vq": "absent.ckpt"}, "absent.ckpt: no such file"),
        ({"source": "some/repo", "vq": "folder/file"}, "folder/file: not a file of tensors, or damaged"),
        ({"source": "some/repo", "tokenizer": "absent"}, "absent: no tokenizer.json"),
        ({"source": "some/repo", "tokenizer": "folder/file"}, "folder/file: not a tokenizer"),
    ],
)
def test_impossible_requests_are_refused(arguments, complaint, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "taken.part").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=complaint):
        convert(**{"source": source, "out": "out", **arguments})
    assert sorted(tmp_path.rglob("*")) == before


FOREIGN = {
    "no folder": (shutil.rmtree, "config.json: no such file"),
    "another model": (edit_json(CONFIG, model_type="llama"), "config.json: model_type 'llama', not 'lumina_mgpt'"),
    "a field of another type": (edit_json(CONFIG, hidden_size="wide"), "describes no decoder: .*hidden_size"),
    "another layout": (edit_json(CONFIG, image_layout=None), "another image_layout than the tokenizer's names"),
    "half a layout": (edit_json(CONFIG, image_layout={"start_id": 3}), "describes no decoder: image_layout has keys"),
    "no code": (remove("uni_rep.py"), "files are missing: uni_rep.py"),
    "no pipeline": (remove("pipeline_lumina_mgpt.py"), "files are missing: pipeline_lumina_mgpt.py"),
    "no model_index": (remove("model_index.json"), "files are missing: model_index.json"),
    "no shims": (lambda out: shutil.rmtree(out / "transformer"), "missing: transformer/root_transformer.py"),
    "no VQ model": (lambda out: shutil.rmtree(out / "vqvae"), "files are missing: vqvae/config.json"),
    "no VQ weights": (remove("vqvae/diffusion_pytorch_model.safetensors"), "out: its VQ model does not load"),
    "half a VQ model": (cut_short("vqvae/diffusion_pytorch_model.safetensors"), "out: its VQ model does not load"),
    "a list for an index": (write("model_index.json", "[]"), "model_index.json: holds a list"),
    "half a processor": (cut_short("processor_config.json"), "processor_config.json: not JSON"),
    "half a tokenizer": (cut_short(VOCABULARY), "tokenizer.json: not JSON"),
    "half a generation_config": (cut_short("generation_config.json"), "generation_config.json: not JSON"),
    "half the weights": (cut_short("model-00002-of-00002.safetensors"), "00002.safetensors: damaged"),
    "no weights": (remove("model-00001-of-00002.safetensors"), "files that are missing: model-00001"),
}


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(source, out)
    return out


@pytest.mark.parametrize("fault", FOREIGN)
def test_a_check_names_what_a_folder_lacks(fault, converted, tmp_path):
    spoil, complaint = FOREIGN[fault]
    shutil.copytree(converted, tmp_path / "out")
    spoil(tmp_path / "out")
    with pytest.raises(ValueError, match=complaint):
        check(tmp_path / "out")
