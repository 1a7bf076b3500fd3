"""One process of tests/test_distributed.py: trains tiny models, alone or with others, and keeps what came out.

torchrun --standalone --nproc_per_node 2 tests/distributed_worker.py START OUT ENVIRONMENT ddp-full fsdp-lora-resumed

START is a model's folder, ENVIRONMENT what FSDP needs of it, as JSON; each name says what a run has: "ddp" or "fsdp",
"lora", "bf16", "-resumed" from the second step of the run of the same name without that.
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

from modeling_lumina_mgpt.training.collator import Collator
from modeling_lumina_mgpt.training.merge import gather_model
from modeling_lumina_mgpt.training.trainer import LuminaMGPTTrainer

GLOBAL_BATCH_SIZE = 4
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": "gaussian"}
NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def force_fsdp_on_cpu() -> None:
    """Without a GPU accelerate passes over FSDP, and makes it DDP."""
    stock = accelerate.state.AcceleratorState.__init__
    if stock.__module__ == __name__:
        return

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = init


def records(vocab_size: int) -> Dataset:
    """Sequences of several lengths, the first third of each not predicted."""
    order = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, vocab_size, (12 + i,), generator=order).tolist() for i in range(16)]
    rows = [{"input_ids": x, "labels": [-100] * (len(x) // 3) + x[len(x) // 3 :]} for x in ids]
    return Dataset.from_list([{**row, "task": ("chat", "caption")[i % 2]} for i, row in enumerate(rows)])


def run(
    start: Path, out: Path, fsdp: bool = False, lora: bool = False, resume: Path | None = None, bf16: bool = False
) -> None:
    """Four steps, with checkpoints at the second and last; `out` gets the log and the gathered model."""
    accelerate.state.AcceleratorState._reset_state()
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
        data_collator=Collator(0, -1, -1, torch.tensor([]), ["caption", "chat"]),
        processing_class=AutoTokenizer.from_pretrained(start),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert all(isinstance(weight, DTensor) for weight in trained) == fsdp
    assert all(weight.dtype == torch.float32 for weight in trained)
    if fsdp:
        policy = trainer.model._get_fsdp_state()._mp_policy
        assert bf16 == (policy.param_dtype == torch.bfloat16) and policy.output_dtype is None
        assert not bf16 or policy.reduce_dtype == torch.float32
        assert all(weight.to_local().numel() < weight.numel() for weight in trained if weight.dim() > 1)
    gathered = gather_model(trainer)
    assert (gathered is None) == (not trainer.is_world_process_zero())
    if gathered is not None:
        gathered.save_pretrained(out / "model")
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        (out / "log.json").write_text(json.dumps(log))


def main() -> None:
    start, out, environment = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    for name in sys.argv[4:]:
        if fsdp := name.startswith("fsdp"):
            os.environ.update({**environment, "ACCELERATE_MIXED_PRECISION": ("no", "bf16")["bf16" in name]})
            force_fsdp_on_cpu()
        resume = out / name.removesuffix("-resumed") / "trainer" / "checkpoint-2" if "resumed" in name else None
        run(start, out / name, fsdp, "lora" in name, resume, "bf16" in name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
