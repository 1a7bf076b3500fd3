"""Peak memory of a conversion that is much larger than its shards, and what `kill -9` leaves of one.

    python benchmarks/conversion.py

Makes a synthetic 4 GB checkpoint in Lumina-mGPT 2.0's published layout, with its vocabulary and a full-size MoVQ 270M
(random weights), in six files of different sizes; converts it in a process of its own; then kills that process at five
random moments and lets each conversion finish. Needs 15 GB of disk for a while, in `--folder`.

Two peaks of memory: of all resident pages (VmHWM; ru_maxrss would begin with what the parent process had), into which
pages of mapped files count, though the system may drop them at any time; and of anonymous pages, which it may not.
"""

import argparse
import filecmp
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from golden_weights import load_golden
from published import FOREIGN, tokenizer_of

SHAPE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 26, "num_attention_heads": 16}
FILE_SHARES = (0.30, 0.22, 0.17, 0.13, 0.10, 0.08)
NUM_KILLS = 5
GB = 1e9


def publish(folder: Path) -> list[int]:
    """Writes the checkpoint; returns the sizes of its weight files."""
    folder.mkdir()
    tokenizer = tokenizer_of("tokenizer_2")
    tokenizer.save_pretrained(folder)
    shape = {**SHAPE, "vocab_size": max(tokenizer.get_vocab().values())}
    (folder / "config.json").write_text(json.dumps({**FOREIGN, **shape, "torch_dtype": "bfloat16"}))
    with torch.device("meta"):
        wanted = LuminaMGPTForConditionalGeneration(LuminaMGPTConfig(**shape)).state_dict()
    shapes = {
        name: (1 if "_norm." in name and "self_attn" in name else len(t), *t.shape[1:]) for name, t in wanted.items()
    }
    files = split(shapes)
    for number, names in enumerate(files, 1):
        weights = {name: noise(shapes[name], torch.bfloat16) for name in names}
        save_file(weights, folder / file_name(number))
    weight_map = {name: file_name(number) for number, names in enumerate(files, 1) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    vq = {name: noise(shape, torch.float32) for name, shape in load_golden("vq_manifest")["movq"].items()}
    torch.save(vq, folder / "movqgan_270M.ckpt")
    return [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]


def split(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names for each file, in order, by its share of all weights."""
    total, done, files = sum(torch.Size(shape).numel() for shape in shapes.values()), 0, [[] for _ in FILE_SHARES]
    ends = [sum(FILE_SHARES[: i + 1]) for i in range(len(FILE_SHARES))]
    for name, shape in sorted(shapes.items()):
        files[next((i for i, end in enumerate(ends) if done < end * total), -1)].append(name)
        done += torch.Size(shape).numel()
    return files


def file_name(number: int) -> str:
    return f"model-{number:05d}-of-{len(FILE_SHARES):05d}.safetensors"


def noise(shape, dtype: torch.dtype) -> torch.Tensor:
    """Random enough: some noise over and over, from where the shape says."""
    tile, size = 0.05 * torch.randn(2**20 + 1, dtype=dtype), torch.Size(shape).numel()
    return tile.repeat(size // len(tile) + 1)[:size].view(shape).clone()


def start(source: Path, out: Path) -> subprocess.Popen:
    code = "from modeling_lumina_mgpt.pipelines.cli import app; app()"
    return subprocess.Popen([sys.executable, "-c", code, "convert", source, out], stdout=subprocess.DEVNULL)


def measure(process: subprocess.Popen) -> tuple[float, int, int]:
    """Seconds until a process ends; its peaks of resident and of anonymous bytes, sampled."""
    begin, resident, anonymous = time.perf_counter(), 0, 0
    while process.poll() is None:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        if "VmHWM" in status:  # it has not ended in this moment
            resident = max(resident, 1024 * int(status["VmHWM"].split()[0]))
            anonymous = max(anonymous, 1024 * int(status["RssAnon"].split()[0]))
        time.sleep(0.02)
    assert process.returncode == 0
    return time.perf_counter() - begin, resident, anonymous


def kill(source: Path, whole: Path, moment_s: float) -> str:
    """Kills a conversion, looks at what is there, lets it finish and compares; says what there was."""
    out = whole.with_name("killed")
    part = out.with_name("killed.part")
    process = start(source, out)
    time.sleep(moment_s)
    if process.poll() is not None:  # the machine is less busy than it was
        shutil.rmtree(out)
        return kill(source, whole, moment_s / 2)
    process.kill()
    process.wait()
    assert not out.exists()
    num_shards = len([*part.glob("model-*.safetensors")])
    for loader in (LuminaMGPTForConditionalGeneration, LuminaMGPTPipeline):
        try:
            loader.from_pretrained(part)
        except (OSError, ValueError):
            continue
        raise AssertionError(f"{loader.__name__} loaded {part}")
    begin = time.perf_counter()
    assert start(source, out).wait() == 0
    seconds = time.perf_counter() - begin
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert {*files} == {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    different = [str(file) for file in files if not filecmp.cmp(whole / file, out / file, shallow=False)]
    assert not different and not part.exists(), different
    shutil.rmtree(out)
    return f"killed after {moment_s:.1f} s with {num_shards} shards whole; rerun: {seconds:.1f} s, identical"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the temporary folder goes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source, out = Path(scratch, "published"), Path(scratch, "out")
        sizes = sorted(publish(source), reverse=True)
        print(f"{sum(sizes) / GB:.2f} GB in files of {', '.join(f'{size / GB:.2f}' for size in sizes)} GB", flush=True)
        seconds, resident, anonymous = measure(start(source, out))
        print(f"converted in {seconds:.1f} s; peak {resident / GB:.2f} GB resident, {anonymous / GB:.2f} GB anonymous")
        print(f"two largest files + 1 GB: {(sum(sizes[:2]) + GB) / GB:.2f} GB", flush=True)
        for _ in range(NUM_KILLS):
            print(kill(source, out, moments.uniform(0, 0.9 * seconds)), flush=True)


if __name__ == "__main__":
    main()
