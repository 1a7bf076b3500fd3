"""The decoder gives the reference's numbers, in every way of running it, and trains on the right loss."""

import logging
import warnings
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from golden_weights import build_golden_decoder, load_golden, published_decoder
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    DynamicCache,
    StaticCache,
)

from helpers import run_without_package
from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor
from modeling_lumina_mgpt.configuration_lumina_mgpt import AUTO_MAP
from modeling_lumina_mgpt.modeling_lumina_mgpt import LuminaMGPTHead, language_losses

VOCAB_SIZE, LENGTH = 97, 12
VARIANTS = {"plain": {}, "swin": {"swin_norm": True, "num_key_value_heads": 2, "model_parallel_size": 2}}
LAYOUT = {
    "start_id": 1,
    "end_id": 2,
    "end_of_line_id": 3,
    "end_of_turn_id": 4,
    "size_ids": [5, 6],
    "code_id_ranges": [[10, 20]],
    "size_unit_px": 16,
    "codes_per_size_unit": 2,
}


def tiny_config(variant: str = "swin", **kwargs) -> LuminaMGPTConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LuminaMGPTConfig(vocab_size=VOCAB_SIZE, **sizes, **VARIANTS[variant], **kwargs)


def tiny_model(variant: str = "swin", **kwargs) -> LuminaMGPTForConditionalGeneration:
    """Random norms too, so that a norm in the wrong place shows."""
    config = tiny_config(variant, **kwargs)
    state_dict = published_decoder(config, seed=0, std=0.2)
    return LuminaMGPTForConditionalGeneration.from_pretrained(None, config=config, state_dict=state_dict).eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def no_warnings():
    """Fails the test on any Python warning or any transformers log record of level WARNING."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(handler)
    assert not records


# The reference's numbers


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_golden_logits(index):
    record = load_golden("generation")["generation"][index]
    logits = build_golden_decoder(record)(torch.tensor(record["logits_input"]), logits_to_keep=1).logits
    expected = torch.tensor(record["logits"])
    torch.testing.assert_close(logits[:, 0, record["logits_cols"]], expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_golden_losses():
    golden = load_golden("generation")
    record = golden["loss"]
    model = build_golden_decoder(golden["generation"][record["model"]], z_loss_weight=0.5)
    outputs = model(torch.tensor(record["input_ids"]), labels=torch.tensor(record["labels"]))
    assert outputs.z_loss.item() == pytest.approx(record["z"], abs=1e-4)
    assert outputs.loss.item() == pytest.approx(record["ce"] + 0.5 * record["z"], abs=1e-4)


# One function, however it is run


@torch.no_grad()
def test_cached_equals_uncached_and_static_equals_dynamic(model):
    ids = random_ids(2, LENGTH)
    whole = model(ids).logits
    caches = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    for cache in caches:
        parts = [model(part, past_key_values=cache).logits for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_left_padded_row_equals_the_row_alone(model):
    short, long = random_ids(1, 7), random_ids(1, LENGTH, seed=1)
    pad = LENGTH - short.shape[1]
    ids = torch.cat([F.pad(short, (pad, 0)), long])
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:1, pad:], model(short).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], model(long).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sdpa_equals_eager(model):
    ids = random_ids(2, LENGTH)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, sdpa, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(model):
    ids = random_ids(2, LENGTH)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 4])).logits, whole[:, [2, 4]])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")  # its successor is younger than our oldest
def test_gradient_checkpointing_is_exact():
    def gradients(model):
        torch.manual_seed(0)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    ids = random_ids(2, LENGTH)
    model = tiny_model(residual_dropout=0.3).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model), strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_full_graph_equals_eager(model):
    ids = random_ids(2, LENGTH)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")  # the graph is what is tested
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    parts = [compiled(ids[:, index : index + 1], past_key_values=cache).logits for index in range(LENGTH)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_hidden_states_and_attentions_are_returned():
    outputs = tiny_model(attn_implementation="eager")(
        random_ids(1, 5), output_hidden_states=True, output_attentions=True
    )
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2


# Residual dropout


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_residual_dropout_is_active_in_training_only(variant):
    ids = random_ids(2, LENGTH)
    expected = tiny_model(variant)(ids).logits
    model = tiny_model(variant, residual_dropout=1.0)
    assert torch.equal(model(ids).logits, expected)
    # every branch dropped: what is left is the embedding
    bare = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
    torch.testing.assert_close(model.train()(ids).logits, bare)


@torch.no_grad()
def test_dropout_follows_the_swin_norm():
    model = tiny_model("swin")
    layer: Any = model.model.layers[0]
    dropped, normed = [], []
    layer.residual_dropout.register_forward_pre_hook(lambda _, args: dropped.append(args[0]))
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_hook(lambda _, __, output: normed.append(output))
    model(random_ids(1, 5))
    assert len(dropped) == 2 and all(a is b for a, b in zip(dropped, normed, strict=True))


# Losses

CHUNK = "modeling_lumina_mgpt.modeling_lumina_mgpt.LOGITS_PER_CHUNK"
Z_LOSS_WEIGHT = 0.1


def some_labels(ids: torch.Tensor) -> torch.Tensor:
    """All but a prompt, a place inside and a whole row."""
    labels = ids.clone()
    labels[0, :8] = labels[1, 5] = labels[2] = -100
    return labels


def by_position(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and z-loss `(batch, length)` from all logits."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    z_losses = logits.logsumexp(-1).square().masked_fill(targets < 0, 0)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), z_losses


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    cross_entropy, z_losses = by_position(logits.float() if logits.dtype == torch.bfloat16 else logits, labels)
    return (cross_entropy + Z_LOSS_WEIGHT * z_losses).sum() / (labels[:, 1:] != -100).sum()


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def test_loss_gradient_equals_the_one_by_hand():
    logits = torch.randn(2, 5, 7, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[-100, 3, -100, 6, 2], [-100, -100, -100, -100, 0]])
    head = LuminaMGPTHead(7, 7, bias=False)
    torch.nn.init.eye_(head.weight)
    language_losses(head, logits, labels, 0.1)["loss"].backward()

    expected = torch.zeros_like(logits)
    places = [(0, 0, 3), (0, 2, 6), (0, 3, 2), (1, 3, 0)]  # (row, position, next token)
    for row, position, token in places:
        softmax, log_partition = logits[row, position].softmax(-1), logits[row, position].logsumexp(-1)
        expected[row, position] = softmax - F.one_hot(torch.tensor(token), 7) + 0.2 * log_partition * softmax
    torch.testing.assert_close(logits.grad, expected / len(places))


@pytest.mark.parametrize("positions_per_chunk", [1, 4, 1000])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_chunked_losses_and_gradients_equal_those_of_all_logits(monkeypatch, dtype, atol, positions_per_chunk):
    monkeypatch.setattr(CHUNK, positions_per_chunk * VOCAB_SIZE)
    model, ids = tiny_model(z_loss_weight=Z_LOSS_WEIGHT).to(dtype).train(), random_ids(3, LENGTH)
    labels, logits = some_labels(ids), model(ids).logits
    expected = mean_loss(logits, labels)
    whole = gradients(expected, model)
    cross_entropy, z_losses = (losses.detach() for losses in by_position(logits, labels))
    for skip_logits in (None, False):
        outputs = model(ids, labels=labels, skip_logits=skip_logits)
        assert (outputs.logits is None) == (skip_logits is None)
        close = {"atol": atol, "rtol": 0}
        torch.testing.assert_close(outputs.loss, expected, **close)
        torch.testing.assert_close(outputs.cross_entropy, cross_entropy, **close)
        torch.testing.assert_close(outputs.z_losses, z_losses, **close)
        torch.testing.assert_close(outputs.z_loss, z_losses.sum() / (labels[:, 1:] != -100).sum(), **close)
        assert not any(part.requires_grad for part in (outputs.cross_entropy, outputs.z_losses, outputs.z_loss))
        torch.testing.assert_close(gradients(outputs.loss, model), whole, **close)


def test_training_makes_no_tensor_as_large_as_its_logits(monkeypatch):
    class LargestTensor(TorchDispatchMode):
        num_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                self.num_elements = max(self.num_elements, output.numel())
            return output

    monkeypatch.setattr(CHUNK, 4 * VOCAB_SIZE)
    model, ids = tiny_model("plain").train(), random_ids(8, 8)
    labels = ids.clone()
    labels[:, :4] = -100  # 32 positions are predicted
    largest = {}
    for skip_logits in (True, False):
        with LargestTensor() as mode:
            model(ids, labels=labels, skip_logits=skip_logits).loss.backward()
        largest[skip_logits] = mode.num_elements
    assert largest[False] == 64 * VOCAB_SIZE and largest[True] < 32 * VOCAB_SIZE + 1


def test_a_loss_is_differentiated_once():
    ids = random_ids(1, 5)
    loss = tiny_model()(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()


def test_accumulated_gradients_equal_one_batch():
    ids = random_ids(3, LENGTH)
    labels = some_labels(ids)
    model = tiny_model(z_loss_weight=Z_LOSS_WEIGHT)
    whole = gradients(mean_loss(model(ids).logits, labels), model)
    count = (labels[:, 1:] != -100).sum()
    for rows in (slice(0, 1), slice(1, 2), slice(2, 3)):  # of the last row nothing is predicted
        model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_items_in_batch", [None, 0, torch.tensor(0)])
def test_nothing_to_predict_is_no_loss(num_items_in_batch):
    ids, model = random_ids(2, LENGTH), tiny_model()
    outputs = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=num_items_in_batch)
    assert outputs.loss.item() == outputs.z_loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(outputs.loss, model))


def test_autocast_multiplies_in_its_dtype_and_keeps_the_rest():
    ids, model = random_ids(3, LENGTH), tiny_model(z_loss_weight=Z_LOSS_WEIGHT)
    labels = some_labels(ids)
    exact = gradients(mean_loss(model(ids).logits, labels), model)
    with torch.autocast("cpu", torch.bfloat16):
        full = mean_loss(model(ids).logits, labels)
        loss = model(ids, labels=labels).loss
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(full.item(), abs=1e-5)
    for ours, true in zip(gradients(loss, model), exact, strict=True):
        assert ours.dtype == torch.float32 and (ours - true).norm() < 0.1 * true.norm()


def test_weights_in_bfloat16_train_on_a_loss_in_float32():
    ids, model = random_ids(3, LENGTH), tiny_model(z_loss_weight=Z_LOSS_WEIGHT).bfloat16()
    outputs = model(ids, labels=ids, skip_logits=False)
    assert outputs.loss.dtype == outputs.cross_entropy.dtype == torch.float32
    expected = mean_loss(outputs.logits, ids)
    assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours, theirs = (torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in (outputs.loss, expected))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)


ADAPTERS = {
    "frozen head": {"target_modules": "all-linear"},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_train_on_the_same_loss(adapter):
    config = LoraConfig(r=4, init_lora_weights=False, **adapter)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(z_loss_weight=Z_LOSS_WEIGHT), config).train()
    ids = random_ids(3, LENGTH)
    labels = some_labels(ids)
    expected, loss = mean_loss(model(input_ids=ids).logits, labels), model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model), atol=1e-5, rtol=0)
    trained = {name.split(".modules_to_save")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("lm_head") for name in trained) == ("modules_to_save" in adapter)


def test_an_adapter_on_the_head_is_refused():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    ids = random_ids(1, 5)
    assert model(input_ids=ids).logits.shape == (1, 5, VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]"):
        model(input_ids=ids, labels=ids)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_has_the_losses_of_its_parts(attention, checkpointing):
    model = tiny_model(attn_implementation=attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for lengths in ([5, 4, 3], [4, 4, 4], [12]):
        row = random_ids(1, sum(lengths))
        parts = [model(part, labels=part) for part in row.split(lengths, 1)]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        packed = model(row, labels=row, position_ids=positions)
        expected = torch.cat([part.cross_entropy for part in parts], 1)
        torch.testing.assert_close(packed.cross_entropy, expected, atol=1e-5, rtol=0)
        num_predicted = sum(lengths) - len(lengths)
        whole = sum(part.loss * (length - 1) for part, length in zip(parts, lengths, strict=True)) / num_predicted
        torch.testing.assert_close(gradients(packed.loss, model), gradients(whole, model), atol=1e-5, rtol=0)


def test_a_vocabulary_that_has_grown_is_trained():
    model = tiny_model("plain")
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    ids = random_ids(2, LENGTH)
    outputs = model(ids, labels=ids, skip_logits=False)
    assert outputs.logits.shape[-1] == VOCAB_SIZE + 3
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss - outputs.z_loss * model.config.z_loss_weight, expected)


def test_positions_are_as_exact_in_another_dtype():
    model = tiny_model("plain")
    exact = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(model.model.rotary_emb.inv_freq, exact)


@pytest.mark.slow
def test_a_compiled_model_trains_on_the_same_loss_and_is_compiled_for_all_shapes():
    model, counter = tiny_model("plain", z_loss_weight=Z_LOSS_WEIGHT).train(), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for index, shape in enumerate([(2, 12), (2, 15), (3, 15), (4, 9), (5, 20), (2, 21)]):
        ids = random_ids(*shape, seed=index)
        labels = F.pad(ids[:, index + 1 :], (index + 1, 0), value=-100)
        pairs = [gradients(m(ids, labels=labels, use_cache=False).loss, model) for m in (compiled, model)]
        torch.testing.assert_close(*pairs, atol=1e-5, rtol=0)
    assert counter.frame_count <= 3  # once as it is, once for any length, once for any batch


def test_image_codes_can_be_learned():
    ids = torch.full((1, 6), 10)  # an image code
    assert torch.isfinite(tiny_model(image_layout=LAYOUT)(ids, labels=ids).loss)


# Folders


def test_published_layout_loads_and_round_trips_without_a_warning(tmp_path, no_warnings):
    config = tiny_config("swin")
    state_dict = published_decoder(config, seed=0, std=0.2)
    state_dict["model.vqmodel.quantize.embedding.weight"] = torch.zeros(3, 3)
    model = LuminaMGPTForConditionalGeneration.from_pretrained(None, config=config, state_dict=dict(state_dict)).eval()
    norm = model.model.layers[1].self_attn.q_norm.weight  # (heads, head_dim)
    assert torch.equal(norm, state_dict["model.layers.1.self_attn.q_norm.weight"].repeat_interleave(2, 0))

    model.save_pretrained(tmp_path)
    reloaded = LuminaMGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    AutoModel.from_pretrained(tmp_path)


def test_config_round_trips_with_every_auto_class(tmp_path, no_warnings):
    config = tiny_config(image_layout=LAYOUT, image_token_id=VOCAB_SIZE, residual_dropout=0.05)
    config.auto_map = {"AutoConfig": "someone/else--configuration_lumina_mgpt.LuminaMGPTConfig"}
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.to_diff_dict() == config.to_diff_dict()
    assert reloaded.auto_map == AUTO_MAP
    assert list(reloaded.custom_pipelines) == ["text-to-image"]


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_registered_auto_classes_build_the_model(auto_class):
    assert type(auto_class.from_config(tiny_config())) is LuminaMGPTForConditionalGeneration


def test_registered_processor_loads_without_trusting_remote_code(tiny_processor, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LuminaMGPTProcessor


@pytest.mark.slow
def test_every_auto_class_loads_the_folder_without_the_package(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    names = sorted(AUTO_MAP)
    code = f"""
import transformers, warnings
warnings.simplefilter("error")
for name in {names}:
    loaded = getattr(transformers, name).from_pretrained("model", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    if name != "AutoConfig":
        loaded.save_pretrained("again_" + name)
"""
    messages = run_without_package(code, tmp_path)
    assert "initialized" not in messages and "UNEXPECTED" not in messages
    for name in names[1:]:
        assert AutoConfig.from_pretrained(tmp_path / f"again_{name}").auto_map == AUTO_MAP
        assert (tmp_path / f"again_{name}" / "modeling_lumina_mgpt.py").exists()


@pytest.mark.parametrize("num_layers", [0.5, 1.0, 1.5, 2.0])
def test_no_layer_is_split_over_devices(num_layers):
    model = tiny_model()
    layer_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
    room = {"cpu": model.model.embed_tokens.weight.nbytes + int(num_layers * layer_bytes), "disk": 10**9}
    placed = infer_auto_device_map(model, max_memory=room, no_split_module_classes=model._no_split_modules)
    assert not any("self_attn" in name or "mlp" in name for name in placed)
    assert "disk" in placed.values()


# Errors


def test_pixels_are_refused():
    with pytest.raises(ValueError, match="LuminaMGPTProcessor"):
        tiny_model()(random_ids(1, 3), pixel_values=torch.zeros(1, 3, 8, 8))
