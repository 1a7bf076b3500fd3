"""Makes a VQ model from nothing on all kinds of Tabletop's pictures: scenes, maps, skeletons, boxes, degraded ones.

    lumina-mgpt train training/recipes/tabletop/vq.yaml

The result is a plain `diffusers.VQModel`. Its encoder is not learned by gradients: it projects each patch of the
picture, by itself, on the principal components of all patches, and the codebook are k-means centers of these. So a
patch has the same code wherever it is and whatever is around it. A learned encoder, which sees beyond the patch, puts
some of that into its codes, and to whoever must predict them that is noise: with one it was most of a decoder's loss.
What neighbours say about a patch is left to the decoder of the VQ model, which is trained. The run resumes.
"""

import json
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import VQModel
from PIL import Image

from modeling_lumina_mgpt.pipelines.places import best_device

from .degradation import degrade
from .drawing import draw_box
from .metrics import psnr, ssim
from .tabletop import MAPS, TabletopSource, to_image


@dataclass
class VQRecipe:
    """One run.

    Attributes:
        output_dir: where the model goes, as `vqvae/`, with its scores and training state.
        model: the configuration of a `diffusers.VQModel` without attention, whose last two levels are equally wide.
        pictures: `size` (width_px, height_px) and number of `scenes` of each pool that is rendered.
        num_patches: how many the components and the codebook are of.
        num_steps: of the decoder.

    Raises:
        ValueError: for pools or levels of another form.
    """

    output_dir: str
    model: dict
    pictures: list[dict] = field(default_factory=lambda: [{"size": [64, 64], "scenes": 6000}])
    num_patches: int = 400_000
    batch_size: int = 16
    num_steps: int = 1500
    learning_rate: float = 1e-3
    save_steps: int = 250
    seed: int = 0

    def __post_init__(self):
        for pool in self.pictures:
            if not isinstance(pool, dict) or pool.keys() != {"size", "scenes"}:
                raise ValueError(f"pictures {pool!r}: accepted are `size: [width_px, height_px]` and `scenes`")
        widths = self.model.get("block_out_channels", ())
        if len(widths) < 2 or widths[-1] != widths[-2]:
            raise ValueError(f"model.block_out_channels {widths}: accepted are lists whose last two are equal")


KINDS = {"image": 0.55, **dict.fromkeys(MAPS, 0.1), "other": 0.15}  # shares of a batch
CHUNK = 32  # scenes rendered together
CROP_PX = 64  # larger pictures are cropped to this, in steps of a patch
GRADIENT_LOSS_WEIGHT = 0.5


def render_pictures(recipe: VQRecipe) -> list[np.ndarray]:
    """uint8 `(scenes, kinds, height, width, 3)` for each size. Rendered once, then kept on disk."""
    pools = []
    for entry in recipe.pictures:
        (width_px, height_px), num_scenes = entry["size"], entry["scenes"]
        path = Path(recipe.output_dir) / f"pictures-{width_px}x{height_px}px-{num_scenes}-{recipe.seed}.npy"
        if not path.exists():
            chunks = [range(i, min(i + CHUNK, num_scenes)) for i in range(0, num_scenes, CHUNK)]
            with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as workers:
                drawn = workers.map(_render, chunks, repeat((width_px, height_px)), repeat(recipe.seed))
                pool = np.concatenate([*drawn])
            np.save(path.with_suffix(".part.npy"), pool)
            path.with_suffix(".part.npy").rename(path)
        pools.append(np.load(path, mmap_mode="r"))
    return pools


def _render(indices: range, size: tuple[int, int], seed: int) -> np.ndarray:
    """Every fourth chunk has combinations that the language model is tested with: codes must be able to show them.

    They are other scenes than the tests': no other seed is negative.
    """
    split = "train" if indices.start // CHUNK % 4 else "test"
    records = TabletopSource("control", [size], -1 - seed, split, indices.stop).fetch(indices)
    boxes = TabletopSource("detection", [size], -1 - seed, split, indices.stop).fetch(indices)
    for index, record, marked in zip(indices, records, boxes, strict=True):
        record["other"] = record.get("pose") or _other(index, record["image"], marked)
    return np.stack([[np.asarray(record[kind]) for kind in KINDS] for record in records])


def _other(index: int, picture: Image.Image, marked: dict) -> Image.Image:
    """A frame around an object, or, once in four times, a degraded picture."""
    if index % 4:
        return draw_box(marked["image"], marked["box"])
    degraded, _ = degrade(picture, 4, random.Random(index))
    return degraded.resize(picture.size, Image.Resampling.BICUBIC)


def sample_batch(pools: list[np.ndarray], recipe: VQRecipe, rng: np.random.Generator) -> torch.Tensor:
    """Crops of one pool in [-1, 1], `(batch, 3, height, width)`; a pool is as likely as it has scenes."""
    num_scenes = np.array([len(pool) for pool in pools])
    pool = pools[rng.choice(len(pools), p=num_scenes / num_scenes.sum())]
    height, width = (min(side, CROP_PX) for side in pool.shape[2:4])
    patch, crops = _patch_px(recipe), []
    for kind in rng.choice(len(KINDS), recipe.batch_size, p=[*KINDS.values()]):
        top = patch * rng.integers(0, (pool.shape[2] - height) // patch + 1)
        left = patch * rng.integers(0, (pool.shape[3] - width) // patch + 1)
        crops.append(pool[rng.integers(len(pool)), kind, top : top + height, left : left + width])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _patch_px(recipe: VQRecipe) -> int:
    return 2 ** (len(recipe.model["block_out_channels"]) - 1)


# --- the encoder and the codebook ------------------------------------------------------------------------------------


def sample_patches(pools: list[np.ndarray], recipe: VQRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches in [-1, 1] that differ, `(patches, side, side, 3)`, and the square root of how often each comes.

    The root, since the empty table would else outweigh everything on it.
    """
    rng, side, found, num_found = np.random.default_rng(recipe.seed), _patch_px(recipe), [], 0
    while num_found < recipe.num_patches:
        pixels = ((sample_batch(pools, recipe, rng) + 1) * 127.5).round().byte()
        found.append(F.pixel_unshuffle(pixels, side).movedim(1, -1).reshape(-1, 3 * side * side).numpy())
        num_found += len(found[-1])
    rows = np.concatenate(found)
    kept, counts = np.unique(rows.view(np.dtype((np.void, rows.shape[1]))).ravel(), return_counts=True)
    patches = torch.from_numpy(kept.view(np.uint8).reshape(-1, 3, side, side).copy()).permute(0, 2, 3, 1)
    return patches.float() / 127.5 - 1, torch.from_numpy(counts).float().sqrt()


@torch.no_grad()
def project_patches(model: VQModel, patches: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Makes the encoder a projection of each patch; returns that of `patches`, `(patches, components)`.

    Residual branches are zero. What is left of the encoder folds 2 x 2 neighbours at each level, and keeps their
    principal components.
    """
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            for parameter in module.parameters():
                parameter.zero_()
    _pass_on(model.encoder.conv_in, 3)
    *blocks, last_block, _ = model.encoder.down_blocks
    for block in (*blocks, last_block):
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _pass_on(resnet.conv_shortcut, resnet.conv_shortcut.in_channels)
        patches, conv = _folded(patches), block.downsamplers[0].conv
        width = conv.out_channels if block in blocks else model.config["latent_channels"]
        basis = _components(patches, weights, min(patches.shape[-1], width))
        patches = patches @ basis
        kernel = basis.T.view(basis.shape[1], 2, 2, -1).movedim(-1, 1)  # (components, channels, 2, 2)
        if block in blocks:
            conv.weight[: len(kernel), : kernel.shape[1], :2, :2] = kernel
    points = patches[:, 0, 0]  # (patches, components)
    mean = weights @ points / weights.sum()
    points = points - mean
    _lead_past_norm(model.encoder, conv, kernel, mean, weights @ points.square() / weights.sum())
    _pass_on(model.quant_conv, len(kernel))
    model.quant_conv.bias.zero_()
    return points


def _lead_past_norm(encoder: Any, conv: Any, kernel: torch.Tensor, mean: torch.Tensor, energy: torch.Tensor) -> None:
    """Makes `conv`, the final norm, SiLU and the last convolution of the encoder give `kernel`'s components.

    Each goes through with both signs, and these are taken from each other: silu(y) - silu(-y) = y. In each of the
    norm's groups two constants far above all components make its mean zero and its deviation the same in all pictures.
    """
    norm = encoder.conv_norm_out
    norm.bias.zero_()
    width = norm.num_channels // norm.num_groups
    for group, members in enumerate(torch.arange(len(kernel)).split(width // 2 - 1)):
        start, total = group * width, energy[members].sum()
        constant = 32 * total.sqrt()
        conv.bias[start], conv.bias[start + 1] = constant, -constant
        norm.weight[start : start + width] = (2 * (constant**2 + total) / width).sqrt()
        for place, member in enumerate(members.tolist(), 1):
            for sign, channel in ((1, start + 2 * place), (-1, start + 2 * place + 1)):
                conv.weight[channel, : kernel.shape[1], :2, :2] = sign * kernel[member]
                conv.bias[channel] = -sign * mean[member]
                encoder.conv_out.weight[member, channel, 1, 1] = sign


def _pass_on(conv: torch.nn.Conv2d, num_channels: int) -> None:
    """Makes the first channels of a convolution its output."""
    conv.weight.zero_()
    middle = conv.kernel_size[0] // 2
    for channel in range(num_channels):
        conv.weight[channel, channel, middle, middle] = 1


def _folded(x: torch.Tensor) -> torch.Tensor:
    """`(patches, side, side, channels)` to `(patches, side / 2, side / 2, 4 * channels)`."""
    count, side, _, channels = x.shape
    x = x.view(count, side // 2, 2, side // 2, 2, channels).transpose(2, 3)
    return x.reshape(count, side // 2, side // 2, 4 * channels)


def _components(x: torch.Tensor, weights: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The directions `(channels, kept)` in which the last axis of `x` spreads most, as bfloat16 has them."""
    rows = (weights.sqrt()[:, None, None, None] * x).flatten(0, 2)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors[:, -num_kept:].flip(1).bfloat16().float()


def find_centers(points: torch.Tensor, weights: torch.Tensor, num_centers: int, iterations: int = 25) -> torch.Tensor:
    """k-means from k-means++ (Arthur and Vassilvitskii 2007) of weighted `points` (count, dim)."""
    centers = points[weights.argmax()].repeat(num_centers, 1)
    error = torch.full((len(points),), torch.inf)
    for i in range(1, num_centers):
        error = torch.minimum(error, (points - centers[i - 1]).square().sum(1))
        centers[i] = points[torch.multinomial(error * weights + 1e-12, 1)[0]]
    for _ in range(iterations):
        nearest = torch.cat([torch.cdist(chunk, centers).argmin(1) for chunk in points.split(2**14)])
        counts = torch.zeros(num_centers).index_add_(0, nearest, weights)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, nearest, points * weights[:, None])
        centers = torch.where(counts > 0, sums / counts.clamp(min=1e-9), centers)
    return centers.bfloat16().float()


# --- the decoder -----------------------------------------------------------------------------------------------------


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + 4 x mean square + L1 of the picture's gradients (edges, which L1 alone blurs)."""
    loss = F.l1_loss(output, target) + 4 * F.mse_loss(output, target)
    for dim in (2, 3):
        loss = loss + GRADIENT_LOSS_WEIGHT * F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


def learning_rate_at(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then linear decay to 2% over the last two thirds."""
    left = min(1.0, 1.5 * (1 - step / num_steps))
    return peak * min((step + 1) / 100, max(left, 0.02))


def train(recipe: VQRecipe, device: torch.device | str | None = None) -> VQModel:
    """Runs (or resumes) the recipe, saves the model in `output_dir`, and returns it.

    Raises:
        ValueError: in one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("trainer 'vq' runs in one process: launch it without torchrun and accelerate")
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)  # Adam's fading moments become denormal, which slows a CPU several times over
    device = device or best_device()
    output_dir = Path(recipe.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pools = render_pictures(recipe)

    model, path = VQModel(**recipe.model), output_dir / "state.pt"
    if not path.exists():
        patches, weights = sample_patches(pools, recipe)
        points = project_patches(model, patches, weights)
        centers = find_centers(points, weights, recipe.model["num_vq_embeddings"])
        model.quantize.embedding.weight.data.copy_(centers)
        print(f"{len(centers)} codes of {len(points)} different patches", flush=True)
    model.to(device, memory_format=torch.channels_last)
    for part in (model.encoder, model.quant_conv, model.quantize):
        part.requires_grad_(False)
    _fit(model, pools, recipe, path)

    model.bfloat16().save_pretrained(output_dir / "vqvae")
    scores = evaluate(model.float().eval(), recipe)  # of the weights as saved
    print(json.dumps(scores))
    (output_dir / "scores.json").write_text(json.dumps({"scores": scores, "recipe": asdict(recipe)}, indent=2) + "\n")
    return model


def _fit(model: VQModel, pools: list[np.ndarray], recipe: VQRecipe, path: Path) -> None:
    weights = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    first_step = _resume(path, model, optimizer)
    started = time.time()
    for step in range(first_step, recipe.num_steps):
        pixels = sample_batch(pools, recipe, np.random.default_rng((recipe.seed, step)))
        pixels = pixels.to(model.device, memory_format=torch.channels_last)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, recipe.num_steps, recipe.learning_rate)
        with torch.no_grad():
            quantized, _, _ = model.quantize(model.encode(pixels).latents)
        output = model.decoder(model.post_quant_conv(quantized))
        loss = reconstruction_loss(output, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{recipe.num_steps} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True
            )
        if (step + 1) % recipe.save_steps == 0 or step + 1 == recipe.num_steps:
            _save(path, step + 1, model, optimizer)


def _save(path: Path, step: int, model: VQModel, optimizer: torch.optim.Optimizer) -> None:
    """One file, replaced atomically, so that a killed run resumes from a whole state."""
    part = path.with_suffix(".part")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, part)
    part.rename(path)


def _resume(path: Path, model: VQModel, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location=model.device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"resumed at step {state['step']}", flush=True)
    return state["step"]


@torch.no_grad()
def evaluate(model: VQModel, recipe: VQRecipe, num_scenes: int = 200, size_px: int = 64) -> dict[str, float]:
    """PSNR (dB) and SSIM of each kind of picture of test scenes, and how many codes are in use."""
    device = model.device
    source = TabletopSource("control", [(size_px, size_px)], recipe.seed, "test", num_scenes)
    records = source.fetch(range(num_scenes))
    scores: dict[str, float] = {}
    counts = torch.zeros(model.config["num_vq_embeddings"])
    for kind in ("image", *MAPS):
        pixels = torch.stack([torch.from_numpy(np.array(r[kind])) for r in records]).permute(0, 3, 1, 2) / 127.5 - 1
        latents = torch.cat([model.encode(chunk).latents for chunk in pixels.to(device).split(32)])
        _, _, (_, _, codes) = model.quantize(latents)
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        output = torch.cat([model.decode(chunk).sample for chunk in latents.split(32)]).clamp(-1, 1).cpu()
        drawn = [to_image(picture) for picture in (output.movedim(1, -1) + 1) / 2]
        for measure in (psnr, ssim):
            pairs = zip(records, drawn, strict=True)
            scores[f"{measure.__name__}_{kind}"] = float(np.mean([measure(r[kind], picture) for r, picture in pairs]))
    share = counts / counts.sum()
    scores["codes_used"] = (counts > 0).float().mean().item()
    scores["code_perplexity"] = torch.exp(-(share * share.clamp(min=1e-12).log()).sum()).item()
    return {key: round(value, 4) for key, value in scores.items()}
