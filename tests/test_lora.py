"""Adapters: what peft trained counts in the pipeline as it did there, alone, weighed, fused; and leaves no trace.

A quantized decoder draws, takes adapters and comes back from its folder.
"""

import json
import shutil
import sys

import peft
import pytest
import torch
from accelerate import cpu_offload
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, BitsAndBytesConfig, TorchAoConfig
from typer.testing import CliRunner

from helpers import run_without_package
from hub_server import run_python
from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.pipelines.cli import app

IDS = torch.arange(4, 40)[None]
KINDS = {
    "attention": {},
    "all layers": {"target_modules": "all-linear"},
    "rank by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
    "stabilized": {"use_rslora": True},
    "magnitudes apart": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def train(tiny_folder, tmp_path):
    """`train(name, seed, **values of LoraConfig)`: the folder that peft saves, and the logits of its model."""

    def make(name="lora", seed=1, **values):
        model = LuminaMGPTForConditionalGeneration.from_pretrained(tiny_folder)
        values = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]} | values
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**values))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, logits(model.eval())

    return make


def assert_untouched(pipe, state, modules):
    """The transformer has these weights, bit by bit, in these modules, all to be trained."""
    assert list(pipe.transformer.modules()) == modules and not pipe.get_list_adapters()
    after = pipe.transformer.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_counts_as_it_was_trained_and_leaves_no_trace(tiny_pipe, train, tmp_path, kind):
    folder, trained = train(**KINDS[kind])
    modules = list(tiny_pipe.transformer.modules())
    state = {key: weight.clone() for key, weight in tiny_pipe.transformer.state_dict().items()}
    assert (logits(tiny_pipe.transformer) - trained).abs().max() > 1e-3
    tiny_pipe.load_lora_weights(folder)
    assert torch.equal(logits(tiny_pipe.transformer), trained)
    tiny_pipe.save_lora_weights(tmp_path / "again")
    tiny_pipe.unload_lora_weights()
    assert_untouched(tiny_pipe, state, modules)
    tiny_pipe.load_lora_weights(tmp_path / "again", "b")
    assert torch.equal(logits(tiny_pipe.transformer), trained) and tiny_pipe.get_active_adapters() == ["b"]
    tiny_pipe.delete_adapters("b")
    assert_untouched(tiny_pipe, state, modules)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_adapter_is_part_of_the_saved_model(tiny_pipe, train, tmp_path, kind):
    folder, trained = train(**KINDS[kind])
    names = list(tiny_pipe.transformer.state_dict())
    tiny_pipe.load_lora_weights(folder)
    for _ in range(2):
        tiny_pipe.fuse_lora()
        torch.testing.assert_close(logits(tiny_pipe.transformer), trained, rtol=0, atol=1e-5)
        tiny_pipe.unfuse_lora()
        torch.testing.assert_close(logits(tiny_pipe.transformer), trained, rtol=0, atol=1e-5)
    tiny_pipe.fuse_lora()
    tiny_pipe.unload_lora_weights()
    tiny_pipe.save_pretrained(tmp_path / "merged")
    for model in (
        LuminaMGPTPipeline.from_pretrained(tmp_path / "merged").transformer,
        AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True),
    ):
        assert list(model.state_dict()) == names
        torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-5)


def weight_change(folder):
    """What the adapter adds to the first layer's `q_proj`, by its file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    return b @ a * 8 / 4


def test_adapters_add_up_by_weight_and_are_switched(tiny_pipe, train):
    (first, alone), (second, other), (whole, replaced) = (
        train("first"),
        train("second", seed=2),
        train("whole", seed=3, modules_to_save=["lm_head"]),
    )
    model, before = tiny_pipe.transformer, logits(tiny_pipe.transformer)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    for folder in (first, second, whole):
        tiny_pipe.load_lora_weights(folder, folder.name)
    assert torch.equal(logits(model), replaced) and tiny_pipe.get_active_adapters() == ["whole"]
    tiny_pipe.set_adapters("first")
    assert torch.equal(logits(model), alone)
    tiny_pipe.set_adapters(["second", "whole"], [None, 0])
    assert tiny_pipe.get_active_adapters() == ["second", "whole"]
    tiny_pipe.disable_lora()
    assert torch.equal(logits(model), before)
    tiny_pipe.enable_lora()
    tiny_pipe.delete_adapters("whole")
    assert torch.equal(logits(model), other) and tiny_pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    tiny_pipe.set_adapters(["first", "second"], [0.5, -2])
    mixed = logits(model)
    tiny_pipe.fuse_lora(lora_scale=0.5)
    changed = weight + 0.25 * weight_change(first) - weight_change(second)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight, changed)
    tiny_pipe.unfuse_lora()
    torch.testing.assert_close(logits(model), mixed, rtol=0, atol=1e-5)


def test_a_saved_adapter_holds_its_own_weights_and_nothing_else(tiny_pipe, tiny_config, train, tmp_path):
    config, rank = tiny_config(), 4
    folder, _ = train(target_modules=["q_proj", "down_proj"])
    tiny_pipe.load_lora_weights(folder)
    tiny_pipe.transformer.peft_config["default_0"].base_model_name_or_path = "someone/tiny"
    tiny_pipe.save_lora_weights(tmp_path / "shared")
    file = tmp_path / "shared" / "adapter_model.safetensors"
    count = sum(tensor.numel() for tensor in load_file(file).values())
    wide = config.hidden_size + config.intermediate_size
    assert count == config.num_hidden_layers * rank * (2 * config.hidden_size + wide)
    assert file.stat().st_size < 4 * count + 4096  # and a header
    assert {path.name for path in file.parent.iterdir()} == {file.name, "adapter_config.json", "README.md"}
    card = (file.parent / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: someone/tiny\n") and "down_proj, q_proj" in card
    (file.parent / "README.md").write_text("My own.")
    tiny_pipe.save_lora_weights(file.parent)
    assert (file.parent / "README.md").read_text() == "My own."


def rewritten(folder, tensors=None, **values):
    """The folder, with other values in its configuration or other tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))
    if tensors is not None:
        save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def pickled(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def cut(folder):
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NO_ADAPTERS = {
    "pickled": (pickled, "no adapter_model.safetensors; accepted is a folder or repo with a LoRA that peft saved"),
    "a model's": (lambda folder: folder.parent / "tiny", "no adapter_config.json"),
    "nothing": (lambda folder: folder / "absent", "the adapter .*absent cannot be loaded"),
    "cut short": (cut, "cannot be loaded"),
    "of layers that are not there": (
        lambda folder: rewritten(folder, tensors=lambda x: x | {Q.replace("layers.0", "layers.7"): x[Q].clone()}),
        r"layers.7.self_attn.q_proj.lora_A.weight is \(4, 32\), accepted is no such weight",
    ),
    "incomplete": (
        lambda folder: rewritten(folder, tensors=lambda x: {key: x[key] for key in x if key != Q}),
        r"layers.0.self_attn.q_proj.lora_A.weight is none, accepted is \(4, 32\)",
    ),
    "of another width": (
        lambda folder: rewritten(folder, tensors=lambda x: x | {Q: torch.zeros(4, 64)}),
        r"q_proj.lora_A.weight is \(4, 64\), accepted is \(4, 32\)",
    ),
    "of another rank": (lambda folder: rewritten(folder, r=8), r"is \(4, 32\), accepted is \(8, 32\)"),
    "of other modules": (
        lambda folder: rewritten(folder, target_modules=["to_q"]),
        "as adapter .* does not fit the model: ",
    ),
    "of another method": (lambda folder: rewritten(folder, peft_type="IA3"), "peft_type .*IA3.*; accepted are 'LORA'"),
    "with biases": (lambda folder: rewritten(folder, bias="all"), "bias 'all'; accepted are 'none'"),
    "that changes the model": (
        lambda folder: rewritten(folder, init_lora_weights="pissa"),
        "init_lora_weights 'pissa'; accepted are True, False, 'gaussian'",
    ),
}


@pytest.mark.parametrize("kind", NO_ADAPTERS)
def test_what_does_not_fit_is_refused_whole(tiny_pipe, train, kind, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spoil, message = NO_ADAPTERS[kind]
    first, trained = train("first")
    tiny_pipe.load_lora_weights(first, "first")
    modules = list(tiny_pipe.transformer.modules())
    with pytest.raises(ValueError, match=message):
        tiny_pipe.load_lora_weights(spoil(train("second", seed=2)[0]))
    assert tiny_pipe.get_active_adapters() == ["first"] and list(tiny_pipe.transformer.modules()) == modules
    assert torch.equal(logits(tiny_pipe.transformer), trained)


WRONG = {
    "an unknown name": (
        lambda p: p.set_adapters("b"),
        r"adapters \['b'\]: accepted are those loaded, .*\['a', 'w', 'x'\]",
    ),
    "no name": (lambda p: p.set_adapters([]), r"adapters \[\]"),
    "a name twice": (lambda p: p.set_adapters(["a", "a"]), "each once"),
    "to delete an unknown one": (lambda p: p.delete_adapters(["a", "b"]), r"\['a', 'b'\]"),
    "to save an unknown one": (lambda p: p.save_lora_weights("out", "b"), r"\['b'\]"),
    "a name that is taken": (lambda p: p.load_lora_weights("lora", "a"), "adapter_name 'a' is taken"),
    "a name with a dot": (lambda p: p.load_lora_weights("lora", "a.b"), "as adapter 'a.b' does not fit"),
    "an unknown option": (lambda p: p.load_lora_weights("lora", weight_name="x"), "weight_name: accepted are adapter"),
    "a weight in words": (lambda p: p.set_adapters("a", "half"), "adapter_weights 'half': accepted are numbers"),
    "no number": (lambda p: p.set_adapters("a", float("nan")), "adapter_weights nan: accepted are numbers"),
    "too many weights": (lambda p: p.set_adapters("a", [1, 2]), r"adapter_weights \[1, 2\]: accepted is one number"),
    "two heads": (lambda p: p.set_adapters(["w", "x"]), r"\['w', 'x'\] each replace lm_head"),
    "to fuse nothing": (lambda p: p.fuse_lora(0), "lora_scale 0"),
    "to fuse by half a word": (lambda p: p.fuse_lora("half"), "lora_scale 'half': accepted are numbers"),
    "to save it all": (lambda p: p.save_pretrained("out"), "are loaded: fuse_lora and unload_lora_weights come first"),
    "to switch when fused": (lambda p: (p.fuse_lora(), p.set_adapters("w")), r"\['a'\] are fused"),
    "to fuse when disabled": (lambda p: (p.disable_lora(), p.fuse_lora()), "not disabled"),
    "an adapter for a model": (lambda p: type(p).from_pretrained("lora"), r"load_lora_weights\('lora'\)"),
}


@pytest.fixture
def three(tiny_pipe, train, tmp_path, monkeypatch):
    """The pipeline with adapters a (it counts), w and x, beside the folder `lora`."""
    monkeypatch.chdir(tmp_path)
    train("lora")
    shutil.copytree(train("w", modules_to_save=["lm_head"])[0], "x")
    for name, folder in (("w", "w"), ("x", "x"), ("a", "lora")):
        tiny_pipe.load_lora_weights(folder, name)
    tiny_pipe.transformer.peft_config = dict(sorted(tiny_pipe.transformer.peft_config.items()))
    return tiny_pipe


def test_errors_name_what_is_accepted_and_change_nothing(three, tmp_path):
    for call, message in WRONG.values():
        with pytest.raises(ValueError, match=message):
            call(three)
        three.unfuse_lora()
        three.enable_lora()
        assert three.get_active_adapters() == ["a"] and not (tmp_path / "out").exists()


def test_without_peft_only_adapters_are_missing(tiny_pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert tiny_pipe("a", output_type="latent").images[0] is not None and not tiny_pipe.get_active_adapters()
    with pytest.raises(ImportError, match="pip install peft"):
        tiny_pipe.load_lora_weights("somewhere")


def test_commands_draw_with_adapters(tiny_pipe, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        tiny_pipe.load_lora_weights(train(name, seed, target_modules="all-linear")[0], name)
    tiny_pipe.set_adapters(["one", "two"], [0.5, 1])
    tiny_pipe("a cube", generator=torch.Generator().manual_seed(0)).images[0].save("expected.png")
    call = ["generate", "a cube", "--seed", "0", "--model", "tiny", "--lora", "one:0.5", "--lora", "two"]
    assert CliRunner().invoke(app, call).exit_code == 0
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    result = CliRunner().invoke(app, ["generate", "a", "--lora", "absent"])
    assert result.exit_code == 2 and "lora 'absent': neither a folder nor a repo" in result.stderr


REMOTE = """
pipe = DiffusionPipeline.from_pretrained("tiny", **CODE)
pipe.load_lora_weights("lora")
with torch.no_grad():
    torch.save(pipe.transformer(input_ids=torch.arange(4, 40)[None]).logits, "logits.pt")
pipe.save_lora_weights("again")
pipe.fuse_lora()
pipe.unload_lora_weights()
pipe.save_pretrained("merged")
"""


@pytest.mark.slow
def test_a_folder_with_its_own_code_takes_adapters(train, tmp_path):
    _, trained = train()
    run_without_package(REMOTE, tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), trained)
    merged = LuminaMGPTPipeline.from_pretrained(tmp_path / "merged").transformer
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)


SHARE = """
import torch
from huggingface_hub import HfApi
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.pipelines.cli import app

pipe = LuminaMGPTPipeline.from_pretrained("tiny")
pipe.load_lora_weights("trained")
pipe.save_lora_weights("lora")
open("lora/training_args.bin", "w").close()
app(["push", "lora", {repo!r}], standalone_mode=False)
assert "training_args.bin" not in HfApi().list_repo_files({repo!r})
pipe.unload_lora_weights()
pipe.load_lora_weights({repo!r}, revision="main")
with torch.no_grad():
    torch.save(pipe.transformer(input_ids=torch.arange(4, 40)[None]).logits, "logits.pt")
"""


@pytest.mark.hub
@pytest.mark.slow
def test_an_adapter_is_pushed_and_comes_back_by_name(hub, train, tmp_path):
    _, trained = train("trained")
    run_python(SHARE.format(repo=hub.repo_id("lora")), hub.env, tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), trained)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    pytest.importorskip("bitsandbytes")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.mark.parametrize("num_bits", [4, 8])
def test_a_quantized_decoder_leaves_head_and_vq_model_alone_and_comes_back(
    tiny_folder, train, tmp_path, device, num_bits
):
    quantization = BitsAndBytesConfig(**{f"load_in_{num_bits}bit": True})
    call = {"dtype": torch.bfloat16, "device_map": device}
    pipe = LuminaMGPTPipeline.from_pretrained(tiny_folder, quantization_config=quantization, **call)
    plain = LuminaMGPTPipeline.from_pretrained(tiny_folder, **call)
    layers = pipe.transformer.model.layers
    kinds = {type(module).__name__ for module in layers.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {"Linear4bit" if num_bits == 4 else "Linear8bitLt"}
    assert torch.equal(pipe.transformer.lm_head.weight, plain.transformer.lm_head.weight)
    vqvae = plain.vqvae.state_dict()
    assert all(torch.equal(weight, vqvae[key]) for key, weight in pipe.vqvae.state_dict().items())
    assert pipe("a red sphere", height=48, width=32).images[0].size == (32, 48)

    ids = IDS.to(device)
    with torch.no_grad():
        quantized = pipe.transformer(input_ids=ids).logits
        others = [
            AutoModelForMultimodalLM.from_pretrained(
                tiny_folder, trust_remote_code=True, quantization_config=quantization, **call
            )
        ]
        settings = PipelineQuantizationConfig(quant_mapping={"transformer": quantization})
        others.append(
            LuminaMGPTPipeline.from_pretrained(tiny_folder, quantization_config=settings, **call).transformer
        )
        pipe.save_pretrained(tmp_path / "quantized")
        others.append(LuminaMGPTPipeline.from_pretrained(tmp_path / "quantized", device_map=device).transformer)
        assert all(torch.equal(other(input_ids=ids).logits, quantized) for other in others)
        pipe.load_lora_weights(train()[0])
        assert not torch.equal(pipe.transformer(input_ids=ids).logits, quantized)
        with pytest.raises(ValueError, match="quantized: load it without quantization_config"):
            pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert torch.equal(pipe.transformer(input_ids=ids).logits, quantized)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_weights_rounded_by_torchao_are_smaller_draw_and_come_back(tiny_folder, train, tmp_path, num_bits):
    torchao = pytest.importorskip("torchao.quantization")
    by_group = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16))
    quantization = TorchAoConfig(by_group if num_bits == 4 else torchao.Int8WeightOnlyConfig())
    plain = LuminaMGPTPipeline.from_pretrained(tiny_folder)
    pipe = LuminaMGPTPipeline.from_pretrained(tiny_folder, quantization_config=quantization)
    assert pipe.estimate_memory(32, 32).weights < plain.estimate_memory(32, 32).weights
    for part, others in ((pipe.transformer.lm_head, plain.transformer.lm_head), (pipe.vqvae, plain.vqvae)):
        rounded = part.state_dict()
        assert all(torch.equal(rounded[key], weight) for key, weight in others.state_dict().items())
    assert pipe("a red sphere", height=48, width=32).images[0].size == (32, 48)

    with torch.no_grad():
        quantized = pipe.transformer(input_ids=IDS).logits
        assert not torch.equal(quantized, plain.transformer(input_ids=IDS).logits)
        pipe.save_pretrained(tmp_path / "quantized")
        other = LuminaMGPTPipeline.from_pretrained(tmp_path / "quantized").transformer
        assert torch.equal(other(input_ids=IDS).logits, quantized)
        pipe.load_lora_weights(train()[0])
        assert not torch.equal(pipe.transformer(input_ids=IDS).logits, quantized)
        pipe.unload_lora_weights()
        assert torch.equal(pipe.transformer(input_ids=IDS).logits, quantized)


def test_offloaded_and_compiled_models_take_no_adapter(tiny_pipe, train):
    folder, _ = train()
    model = tiny_pipe.transformer
    tiny_pipe.transformer = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="compiled or offloaded"):
        tiny_pipe.load_lora_weights(folder)
    tiny_pipe.transformer = cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="compiled or offloaded"):  # its weights would be lost, and pictures noise
        tiny_pipe.load_lora_weights(folder)
