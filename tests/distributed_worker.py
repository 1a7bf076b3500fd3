"""One process of tests/test_distributed.py: trains tiny models, alone or with others, and keeps what came out.

torchrun --nproc_per_node 2 tests/distributed_worker.py START OUT full lora resumed
"""

import json
import os
import sys
from pathlib import Path

import accelerate.state
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForMultimodalLM, AutoTokenizer
from trl import SFTConfig

from modeling_lumina_mgpt.training.merge import gather_model
from modeling_lumina_mgpt.training.trainer import Collator, LuminaMGPTTrainer

GLOBAL_BATCH_SIZE = 4
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": "gaussian"}
NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"


def force_fsdp_on_cpu() -> None:
    """Without a GPU accelerate passes over FSDP, and makes it DDP."""
    stock = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    accelerate.state.AcceleratorState.__init__ = init


def records(vocab_size: int) -> Dataset:
    """Sequences of several lengths, the first third of each not predicted."""
    order = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, vocab_size, (12 + i,), generator=order).tolist() for i in range(16)]
    rows = [{"input_ids": x, "labels": [-100] * (len(x) // 3) + x[len(x) // 3 :]} for x in ids]
    return Dataset.from_list([{**row, "task": ("chat", "caption")[i % 2]} for i, row in enumerate(rows)])


def run(start: str, out: Path, lora: bool, resume: Path | None, bf16: bool) -> None:
    """Four steps, with checkpoints at the second and last; `out` gets the log and the gathered model."""
    arguments = SFTConfig(
        output_dir=str(out / "trainer"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=GLOBAL_BATCH_SIZE // NUM_PROCESSES,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        loss_type="nll",
        bf16=bf16,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    assert arguments.world_size == NUM_PROCESSES
    model = AutoModelForMultimodalLM.from_pretrained(start, dtype=torch.float32)
    trainer = LuminaMGPTTrainer(
        model=model,
        args=arguments,
        train_dataset=records(model.config.vocab_size),
        data_collator=Collator(0, -1, -1, ["caption", "chat"]),
        processing_class=AutoTokenizer.from_pretrained(start),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert all(isinstance(weight, DTensor) for weight in trained) == FSDP
    assert all(weight.dtype == torch.float32 for weight in trained)
    if FSDP and NUM_PROCESSES > 1:
        assert all(weight.to_local().numel() < weight.numel() for weight in trained if weight.dim() > 1)
    gathered = gather_model(trainer)
    assert (gathered is None) == (not trainer.is_world_process_zero())
    if gathered is not None:
        gathered.save_pretrained(out / "model")
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        (out / "log.json").write_text(json.dumps(log))


def main() -> None:
    start, out = sys.argv[1], Path(sys.argv[2])
    if FSDP:
        force_fsdp_on_cpu()
    for name in sys.argv[3:]:
        accelerate.state.AcceleratorState._reset_state()
        resume = out / name.removeprefix("resumed-") / "trainer" / "checkpoint-2" if "resumed" in name else None
        run(start, out / name, "lora" in name, resume, "bf16" in name)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
