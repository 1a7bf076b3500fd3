"""Pictures of what the default checkpoint has never seen, as a folder to fine-tune it on: snowmen.

    python training/recipes/tabletop/snowmen.py runs/snowmen

A snowman is a large sphere with a small one on top of it, of one color, alone or beside a solid. Combinations that are
held out for the test are not among the pictures.
"""

import csv
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_lumina_mgpt.training.tabletop import HELD_OUT, noun_phrase, render, sample_scene, to_image
from modeling_lumina_mgpt.training.tabletop_scenes import SPACING, fits, left_to_right

SIZE_PX, NUM_PICTURES = 64, 400
RISE = 2 * SPACING["z"]  # what lies so far behind is seen where what lies on a large sphere is


def snowman(rng: random.Random) -> tuple[Image.Image, str]:
    """A picture and what it shows."""
    while True:
        scene = sample_scene(rng, SIZE_PX, SIZE_PX, rng.choice((1, 2)))
        index = rng.randrange(len(scene.objects))
        body = replace(scene.objects[index], shape="sphere", size="large", surface="matte")
        head = replace(body, size="small", z=body.z + RISE)
        others = [o for i, o in enumerate(scene.objects) if i != index]
        is_seen = not any(o.combination in HELD_OUT for o in (body, head, *others))
        is_alone = not any((o.shape, o.color) == (body.shape, body.color) for o in others)
        if is_seen and is_alone and all(fits(o, others, SIZE_PX, SIZE_PX) for o in (body, head)):
            break
    below, above = (replace(scene, objects=left_to_right([part, *others])) for part in (body, head))
    drawn = render([below, above], SIZE_PX, SIZE_PX, maps=True)
    is_head = (drawn.segmentation[1] == above.objects.index(head) + 1).numpy()
    pixels = np.where(is_head[..., None], np.asarray(to_image(drawn.rgb[1])), np.asarray(to_image(drawn.rgb[0])))
    names = [noun_phrase((1, "snowman" if o is body else o.shape, o.color, None)) for o in below.objects]
    return Image.fromarray(pixels), " and ".join(names) + rng.choice(("", f" on a {scene.table} table"))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(NUM_PICTURES):
        picture, sentence = snowman(random.Random(f"snowman/{i}"))
        picture.save(folder / f"{i:03d}.png")
        rows.append((f"{i:03d}.png", sentence))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("snowmen.py takes one folder, in which the pictures go")
    main(Path(sys.argv[1]))
