"""Planning: what it says a step needs is what live tensors take, and what it says to change makes a run fit."""

import weakref
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.pipelines.cli import app
from modeling_lumina_mgpt.training.code_rows import share_code_rows
from modeling_lumina_mgpt.training.plan import GIB, Run, Shape, changes, memory, plan, run_of, total_bytes
from modeling_lumina_mgpt.training.recipe import SFTRecipe, load_recipe

NUM_PARAMETERS_7B = 7_013_666_816
SMALL = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
RANK, LENGTH = 8, 128
RECIPES = Path(str(files("modeling_lumina_mgpt.training"))) / "recipes"


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that live at a time, each storage once; what a kernel allocates inside is not seen."""

    def __init__(self, tensors):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out


def counted(
    config, batch_size: int, checkpointing: bool, lora: bool, accumulation: int = 1, num_code_rows: int = 0
) -> int:
    """Most bytes at a time in the second step of a training: then the optimizer has its state."""
    torch.manual_seed(0)
    model = LuminaMGPTForConditionalGeneration(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", exclude_modules=["lm_head"]))
        model.enable_input_require_grads()
    if num_code_rows:
        share_code_rows(model, torch.rand(num_code_rows, 8), torch.arange(num_code_rows))
    weights = [*model.parameters(), *model.buffers()]
    optimizer = torch.optim.AdamW([weight for weight in weights if weight.requires_grad], fused=True)
    ids = torch.randint(0, config.vocab_size, (batch_size, LENGTH))
    with LiveBytes([*weights, ids]) as live:
        for i in range(1, 2 * accumulation + 1):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if i % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
    return live.peak


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_estimate_is_what_live_tensors_take(batch_size, checkpointing, lora):
    config = LuminaMGPTConfig(**SMALL, num_hidden_layers=3)
    values = {"compute_bytes": 4, "base_bytes": 4, "checkpointing": checkpointing, "rank": RANK if lora else None}
    for accumulation in (1, 2):
        run = Run(Shape.of(config), 1, batch_size, LENGTH, accumulation, **values)
        needed = memory(run)
        estimate = needed.peak(accumulation) - needed.gathered  # on the CPU the weights are whole where they lie
        found = counted(config, batch_size, checkpointing, lora, accumulation)
        assert estimate == pytest.approx(found, rel=0.2)


def test_code_rows_take_what_live_tensors_take():
    config, few = LuminaMGPTConfig(**{**SMALL, "vocab_size": 8192}, num_hidden_layers=1), 4096
    run = Run(Shape.of(config), 1, 1, LENGTH, compute_bytes=4)
    plain, with_rows = (counted(config, 1, True, False, num_code_rows=num) for num in (0, few))
    needed, needed_with_rows = (memory(replace(run, num_code_rows=num)).peak(1) for num in (0, few))
    assert needed_with_rows - needed == pytest.approx(with_rows - plain, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_forward_leaves_is_what_it_saves(dtype):
    config = LuminaMGPTConfig(**SMALL, num_hidden_layers=3)
    model = LuminaMGPTForConditionalGeneration(config).to(dtype).train()
    ids = torch.randint(0, config.vocab_size, (4, LENGTH))
    with LiveBytes([*model.parameters(), ids]) as live:
        before = live.now
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        found = live.now - before
    run = Run(Shape.of(config), 1, 4, LENGTH, checkpointing=False, compute_bytes=dtype.itemsize)
    head_gradient = dtype.itemsize * run.shape.head if dtype == torch.float32 else 4 * run.shape.head
    assert loss.requires_grad and memory(run).activations + head_gradient == pytest.approx(found, rel=0.05)


@pytest.fixture
def recipe_7b(tmp_path, tiny_processor):
    """FP-SFT of the published 7B: its shape is the configuration's default."""
    layout = tiny_processor.uni_rep.layout_dict() | {"size_unit_px": 32, "size_ids": [*range(64)]}
    LuminaMGPTConfig(image_layout=layout, residual_dropout=0.05).save_pretrained(tmp_path)

    def make(**values):
        mixture = {"target_px": 512, "sources": [{"task": task, "path": "x"} for task in ("text-to-image", "caption")]}
        return SFTRecipe(**{"output_dir": "", "model": str(tmp_path), "mixture": mixture, "sft": {}, **values})

    return make


def test_published_7b(recipe_7b):
    run = run_of(recipe_7b(sft={"per_device_train_batch_size": 4}), 8)
    assert run.shape.total == NUM_PARAMETERS_7B
    assert run.length == 512 + 1092  # 32 rows of 33, 4 more; other buckets are shorter, or longer by a few
    needed = memory(run)
    assert needed.weights == needed.gradients == 4 * NUM_PARAMETERS_7B / 8 == needed.optimizer / 2
    assert "fits" in plan(recipe_7b(sft={"per_device_train_batch_size": 4}), 8, 80)
    assert "does not fit" in plan(recipe_7b(sft={"per_device_train_batch_size": 1}), 1, 80)  # 16 bytes a weight


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("[!t]*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_published_models_recipe_can_be_planned_before_the_model_is_there(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "at the peak" in plan(load_recipe(path), 8, 80)


@pytest.mark.parametrize("name", ["muon", "share_code_rows"])
def test_what_needs_whole_matrices_is_planned_for_one_gpu_alone(recipe_7b, name):
    assert "at the peak" in plan(recipe_7b(**{name: True}), 1, 80)
    with pytest.raises(ValueError, match=rf"8 GPUs share the matrices, which {name}.*accepted is 1"):
        plan(recipe_7b(**{name: True}), 8, 80)


def test_longest_record_follows_the_tasks(recipe_7b):
    def length(task, **values):
        mixture = {"target_px": 512, "sources": [{"task": name, "path": "x"} for name in ("caption", task)], **values}
        return run_of(recipe_7b(mixture=mixture), 1).length

    assert length("caption") < length("depth") < length("chat") == 4096
    assert length("pair") == length("text-to-image") == length("caption")  # two panels are one picture
    larger = [{"task": "caption", "path": "x"}, {"task": "text-to-image", "path": "x", "target_px": 768}]
    assert length("", sources=larger) > 1.5 * length("caption")
    assert length("chat", max_length=2048) == length("depth", max_length=2048) == 2048


def test_advice_is_the_first_change_that_fits(recipe_7b):
    recipe = recipe_7b(sft={"gradient_checkpointing": False, "per_device_train_batch_size": 8})
    names = [name for name, _ in changes(run_of(recipe, 8))]
    assert names[:2] == [
        "gradient_checkpointing: true",
        "per_device_train_batch_size: 4, gradient_accumulation_steps: 2",
    ]
    assert names[4:7] == ["lora: {r: 32, lora_alpha: 32}", "and quantization: {load_in_4bit: true}", "16 GPUs"]
    for limit_gib in (12, 20, 30, 60):
        text = plan(recipe, 8, limit_gib)
        fitting = [name for name, run in changes(run_of(recipe, 8)) if total_bytes(run) <= limit_gib * GIB]
        assert text.count("which fits") == 1 and f"{fitting[0]}: " in text.splitlines()[-1]
    assert "nothing of that fits" in plan(recipe, 8, 4)


def test_command_prints_and_trains_nothing(recipe_7b, tmp_path):
    folder = recipe_7b().model
    (tmp_path / "run.yaml").write_text(
        f"trainer: sft\noutput_dir: {tmp_path}/out\nmodel: {folder}\nsft: {{per_device_train_batch_size: 2}}\n"
        "mixture: {target_px: 512, sources: [{task: text-to-image, path: nowhere}]}\n"
    )
    command = ["train", str(tmp_path / "run.yaml"), "--plan", "--gpus", "8", "--gpu-memory", "80"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0 and "of 80: fits" in found.stdout
    assert not (tmp_path / "out").exists()
