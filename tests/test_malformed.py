"""Malformed inputs at every public entry: a plain error that says what was given and what is accepted, and no file.

One table a room, of a call and what its error must say. `k` is a `Kit`: the tiny model's parts and a folder of faulty
files.
"""

import re
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import GenerationConfig
from typer.testing import CliRunner

import modeling_lumina_mgpt
from helpers import Vocabulary, random_picture
from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTImageProcessor, LuminaMGPTProcessor, UniRep
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline, VerifierError, cli

ROOT = Path(modeling_lumina_mgpt.__file__).parent.parent
PRODUCT = tuple(str(ROOT / name) for name in ("modeling_lumina_mgpt", "pipelines", "training"))
STOCK_CHECKS = ("_validate_model_kwargs", "validate")  # what transformers' `generate` itself says of its arguments
PICTURE = random_picture(64, 48)
NAN, INF = float("nan"), float("inf")
IDS = torch.tensor([[0, 9, 10, 11]])
CODES = torch.zeros(4, 4, dtype=torch.long)
USER = {"role": "user", "content": "a"}


@dataclass
class Kit:
    pipe: LuminaMGPTPipeline
    files: Path

    @property
    def processor(self):
        return self.pipe.processor

    @property
    def pictures(self):
        return self.pipe.processor.image_processor

    @property
    def rep(self):
        return self.pipe.processor.uni_rep

    def generate(self, ids=IDS, **kwargs):
        return self.pipe.transformer.generate(ids, **{"max_new_tokens": 4, **kwargs})

    def chat(self, content, **message):
        return self.processor.apply_chat_template([{"role": "user", "content": content, **message}], tokenize=True)

    def stream(self, *args, **kwargs):
        return list(self.pipe.stream(*args, **kwargs))


UNI_REP = {
    "a height between two sizes": (
        lambda k: k.rep.grid(33, 32),
        "height 33 px: accepted are multiples of 16 up to 160",
    ),
    "a negative width": (lambda k: k.rep.grid(32, -16), "width -16 px: accepted are multiples of 16"),
    "a width of zero": (lambda k: k.rep.grid(32, 0), "width 0 px: accepted are multiples of 16"),
    "a width above the largest": (lambda k: k.rep.grid(32, 176), "width 176 px: accepted are multiples of 16 up to"),
    "a height as text": (lambda k: k.rep.grid("32", 32), "height '32' px: accepted are multiples"),
    "a float width": (lambda k: k.rep.grid(32, 32.0), r"width 32\.0 px: accepted are multiples"),
    "a width that is nan": (lambda k: k.rep.grid(32, NAN), "width nan px: accepted are multiples"),
    "True as a height": (lambda k: k.rep.grid(True, 32), "height True px: accepted are multiples"),
    "no height": (lambda k: k.rep.grid(None, 32), "height None px: accepted are multiples"),
    "a huge height": (lambda k: k.rep.grid(16 * 10**9, 32), "height 16000000000 px.*up to 160"),
    "a target as text": (lambda k: k.rep.buckets("64"), "target '64' px: accepted are multiples of 16"),
    "a target of 0": (lambda k: k.rep.buckets(0), "target 0 px: accepted are multiples of 16"),
    "a target between two sizes": (lambda k: k.rep.buckets(50), "target 50 px: accepted are multiples of 16"),
    "a target above the largest": (
        lambda k: k.rep.buckets(512),
        "target 512 px: no size of that area has sides of at most 160 px",
    ),
    "float codes": (lambda k: k.rep.encode(torch.rand(4, 4)), "codes of torch.float32: accepted are whole numbers"),
    "boolean codes": (lambda k: k.rep.encode(CODES.bool()), "codes of torch.bool: accepted are whole numbers"),
    "codes as text": (lambda k: k.rep.encode("codes"), "codes 'codes': accepted are whole numbers"),
    "ragged codes": (lambda k: k.rep.encode([[1, 2], [3]]), r"codes \[\[1, 2\], \[3\]\]: accepted are whole"),
    "a single code": (lambda k: k.rep.encode(3), r"codes of shape \(\): accepted is \(rows, cols\)"),
    "a batch of codes": (lambda k: k.rep.encode(CODES[None]), r"codes of shape \(1, 4, 4\)"),
    "no codes": (lambda k: k.rep.encode([[]]), r"codes of shape \(1, 0\): accepted is \(rows, cols\)"),
    "a row of codes": (lambda k: k.rep.encode([1, 2]), r"codes of shape \(2,\): accepted is \(rows, cols\)"),
    "an odd width of codes": (
        lambda k: k.rep.encode([[1, 2, 3], [4, 5, 6]]),
        "2x3 codes: accepted sides are multiples of 2 up to 20",
    ),
    "a code too large": (lambda k: k.rep.encode([[1, 64], [0, 0]]), "codes 0 to 64: accepted are 0 to 63"),
    "a negative code": (lambda k: k.rep.encode(CODES - 1), "codes -1 to -1: accepted are 0 to 63"),
    "a huge code": (lambda k: k.rep.encode([[10**30, 0]] * 2), "codes .*: accepted are whole numbers"),
    "rows as text": (lambda k: k.rep.encode(CODES, rows="8"), "4 rows of codes for an image of '8' rows"),
    "zero rows": (lambda k: k.rep.encode(CODES, rows=0), "4 rows of codes for an image of 0 rows"),
    "fewer rows than there are": (lambda k: k.rep.encode(CODES, rows=2), "4 rows of codes for an image of 2 rows"),
    "ids of text": (lambda k: k.rep.decode("ids"), "ids 'ids': accepted are whole numbers"),
    "float ids": (lambda k: k.rep.decode(k.rep.encode(CODES).float()), "ids of torch.float32: accepted are whole"),
    "ids without a start": (lambda k: k.rep.decode(k.rep.encode(CODES)[1:]), r"position 0, expected the start token"),
    "ids that lie about the width": (
        lambda k: k.rep.decode(torch.cat([k.rep.encode(CODES)[:3], k.rep.encode(CODES[:, :2])[3:]])),
        "malformed image: token .* at position 5, expected an image code",
    ),
    "ids with a negative one": (lambda k: k.rep.decode([-7]), "token -7 at position 0, expected the start token"),
    "a folder for a tokenizer": (lambda k: UniRep.from_tokenizer("folder"), "tokenizer 'folder': accepted is"),
    "no tokenizer": (lambda k: UniRep.from_tokenizer(None), "tokenizer None: accepted is"),
    "a tokenizer without codes": (lambda k: UniRep.from_tokenizer(Vocabulary()), "no token for image code 0"),
    "a size unit of 0": (
        lambda k: UniRep.from_tokenizer(k.processor.tokenizer, 0),
        "size_unit_px 0: accepted are 1, 2",
    ),
    "a float of codes per unit": (
        lambda k: UniRep.from_tokenizer(k.processor.tokenizer, 16, 0.5),
        r"codes_per_size_unit 0\.5: accepted are 1, 2",
    ),
}

IMAGE_PROCESSOR = {
    "an absent file": (lambda k: k.pictures.load("absent.png"), "absent.png"),
    "a prompt for a path": (lambda k: k.pictures.load("a red sphere"), "a red sphere"),
    "a long prompt for a path": (lambda k: k.pictures.load("a red sphere " * 500), "a red sphere"),
    "a path with a null byte": (lambda k: k.pictures.load("a\0b"), "a\0b: not a picture"),
    "a folder": (lambda k: k.pictures.load(k.files), "files"),
    "an empty file": (lambda k: k.pictures.load(k.files / "empty.png"), "empty.png: not a picture"),
    "a text file called .png": (lambda k: k.pictures.load(k.files / "text.png"), "text.png: not a picture"),
    "a PNG cut short": (lambda k: k.pictures.load(k.files / "cut.png"), "cut.png: not a picture.*damaged"),
    "a JPEG cut short": (lambda k: k.pictures.load(k.files / "cut.jpg"), "cut.jpg: not a picture.*damaged"),
    "a PNG that lies about its size": (lambda k: k.pictures.load(k.files / "lying.png"), "lying.png: not a picture"),
    "a decompression bomb": (lambda k: k.pictures.load(k.files / "bomb.png"), "bomb.png.*decompression bomb"),
    "an opened file cut short": (
        lambda k: k.pictures.load(Image.open(k.files / "cut.png")),
        "PngImageFile.*not a picture.*damaged",
    ),
    "a closed picture": (lambda k: k.pictures.load(closed(k)), "not a picture.*damaged"),
    "no bytes": (lambda k: k.pictures.load(b""), "0 bytes: not a picture"),
    "bytes of a text": (lambda k: k.pictures.load(b"no picture"), "10 bytes: not a picture"),
    "bytes cut short": (lambda k: k.pictures.load((k.files / "cut.png").read_bytes()), "bytes: not a picture"),
    "a data URL of nothing": (lambda k: k.pictures.load("data:image/png;base64,!!"), "data:image/png.*not a picture"),
    "a URL that nobody serves": (lambda k: k.pictures.load("http://127.0.0.1:9/a.png"), "127.0.0.1:9/a.png"),
    "a number for a picture": (lambda k: k.pictures.load(12), "of type int: accepted is a PIL image"),
    "a file-like object": (lambda k: k.pictures.load(open), "of type builtin_function.*accepted is a PIL image"),
    "no picture": (lambda k: k.pictures.load(None), "of type NoneType: accepted is a PIL image"),
    "a list for a picture": (lambda k: k.pictures.load([PICTURE]), "of type list: accepted is a PIL image"),
    "a strip": (
        lambda k: k.pictures.load(Image.new("RGB", (1, 20000))),
        "1x20000 px: accepted are sides of at most 100",
    ),
    "a picture without pixels": (lambda k: k.pictures.load(Image.new("RGB", (0, 9))), "0x9 px has no pixels"),
    "an empty array": (lambda k: k.pictures.load(np.zeros((0, 0, 3), np.uint8)), r"shape \(0, 0, 3\): accepted"),
    "an array without channels": (lambda k: k.pictures.load(np.zeros((9, 9, 0))), r"shape \(9, 9, 0\): accepted"),
    "an array of five channels": (lambda k: k.pictures.load(np.zeros((4, 4, 5))), r"shape \(4, 4, 5\): accepted"),
    "a 0-d array": (lambda k: k.pictures.load(np.array(3.0)), r"shape \(\): accepted is"),
    "a batch of arrays": (lambda k: k.pictures.load(np.zeros((1, 9, 9, 3))), r"shape \(1, 9, 9, 3\): accepted is"),
    "an array of nan": (lambda k: k.pictures.load(np.full((9, 9, 3), NAN)), r"from nan to nan: accepted is \[0, 1\]"),
    "a float array up to 255": (
        lambda k: k.pictures.load(np.full((9, 9, 3), 255.0)),
        r"to 255.0: accepted is \[0, 1\]",
    ),
    "a float array below 0": (
        lambda k: k.pictures.load(np.zeros((4, 4, 3)) - 1),
        r"float array from -1.0 to -1.0: accepted is \[0, 1\]",
    ),
    "a picture of floats up to 7.5": (
        lambda k: k.pictures.load(Image.new("F", (4, 4), 7.5)),
        r"float array from 7.5 to 7.5: accepted is \[0, 1\]",
    ),
    "a picture of numbers above 255": (
        lambda k: k.pictures.load(Image.new("I", (4, 4), 40000)),
        "numbers from 40000 to 40000: accepted are 0 to 255",
    ),
    "an array of 64 bits": (lambda k: k.pictures.load(np.zeros((9, 9, 3), np.int64)), "array of int64: accepted"),
    "a boolean array": (lambda k: k.pictures.load(np.zeros((9, 9), bool)), "array of bool: accepted is"),
    "an array of 16 bits": (lambda k: k.pictures.load(np.zeros((9, 9, 3), np.uint16)), "array of uint16: accepted"),
    "an array of objects": (lambda k: k.pictures.load(np.array([[None]])), "array of object: accepted is"),
    "a complex array": (lambda k: k.pictures.load(np.zeros((9, 9), complex)), "array of complex128: accepted is"),
    "a tensor with channels last": (
        lambda k: k.pictures.load(torch.zeros(9, 8, 3)),
        r"shape \(9, 8, 3\): accepted is",
    ),
    "buckets of text": (lambda k: k.pictures(PICTURE, "64x64"), r"buckets '64x64': accepted is"),
    "no buckets": (lambda k: k.pictures(PICTURE, []), r"buckets \[\]: accepted is"),
    "a bucket of zero": (lambda k: k.pictures(PICTURE, [(0, 64)]), r"buckets \[\(0, 64\)\]: accepted is"),
    "a picture to array of nothing": (lambda k: k.pictures.to_array(None), "of type NoneType: accepted is"),
    "no palette": (
        lambda k: k.pictures.to_array(PICTURE, "segmentation"),
        "no palette.*set `image_processor.palette`",
    ),
    "a palette without colors": (
        lambda k: LuminaMGPTImageProcessor(palette=[["ground"]]).to_array(PICTURE, "segmentation"),
        r"palette \[\['ground'\]\]: accepted is a list of \[name, red, green, blue\]",
    ),
    "a box between sizes": (
        lambda k: k.pictures.find_box(PICTURE, PICTURE.resize((9, 9))),
        r"\(64, 48\) and \(9, 9\): accepted are two of one size",
    ),
    "a box in nothing": (
        lambda k: k.pictures.find_box(None, PICTURE),
        "pictures .None, .*accepted are two PIL images",
    ),
    "edges of nothing": (lambda k: k.pictures.canny(None), "of type NoneType: accepted is"),
    "colors by sepia": (
        lambda k: k.pictures.fix_colors(PICTURE, PICTURE, "sepia"),
        "'sepia': accepted are wavelet, adain",
    ),
    "colors by a list": (lambda k: k.pictures.fix_colors(PICTURE, PICTURE, []), r"fix \[\]: accepted are wavelet"),
    "squares of a strip": (lambda k: k.pictures.tile(Image.new("L", (20000, 1)), 64), "20000x1 px: accepted"),
    "squares of zero": (lambda k: k.pictures.tile(PICTURE, 0), "side_px 0: accepted are 8 and more"),
}

PROCESSOR = {
    "a number for text": (lambda k: k.processor(5), "text 5: accepted is a string or a list of strings"),
    "no text": (lambda k: k.processor(None), "text None: accepted is a string"),
    "an empty list of texts": (lambda k: k.processor([]), r"text \[\]: accepted is a string"),
    "a number among texts": (lambda k: k.processor(["a", 5]), r"text \['a', 5\]: accepted is a string"),
    "nested texts": (lambda k: k.processor([["a"]]), r"text \[\['a'\]\]: accepted is a string"),
    "a placeholder without image": (lambda k: k.processor("<|image|>"), "0 images for 1 placeholders <|image|>"),
    "a placeholder too many": (
        lambda k: k.processor("<|image|> <|image|>", PICTURE),
        "1 images for 2 placeholders",
    ),
    "an image too many": (lambda k: k.processor("<|image|>", [PICTURE] * 2), "2 images for 1 placeholders"),
    "images for other texts": (lambda k: k.processor(["a", "b"], [PICTURE] * 3), "3 images for 2 places in 2 texts"),
    "images for fewer texts": (lambda k: k.processor(["a"] * 3, [PICTURE] * 2), "2 images for 3 places in 3 texts"),
    "lists for other texts": (lambda k: k.processor(["a"], [[PICTURE], []]), "2 lists of images for 1 texts"),
    "lists for fewer texts": (lambda k: k.processor(["a", "b"], [[PICTURE]]), "1 lists of images for 2 texts"),
    "an image of numbers": (lambda k: k.processor("a", images=12), "of type int: accepted is a PIL image"),
    "a target of 0 px": (
        lambda k: k.processor("a", PICTURE, target_px=0),
        "target 0 px: accepted are multiples of 16",
    ),
    "a target in text": (
        lambda k: k.processor("a", PICTURE, target_px="64"),
        "target '64' px: accepted are multiples",
    ),
    "a height alone": (lambda k: k.processor("a", height=32), "height 32, width None: give both or none"),
    "a height between two sizes": (
        lambda k: k.processor("a", height=40, width=32),
        "height 40 px: accepted are multiples of 16",
    ),
    "codes of another grid": (lambda k: k.processor("a", CODES[:3]), "3x4 codes: accepted sides are multiples of 2"),
    "heights for other texts": (lambda k: k.processor("a", height=[32, 32], width=32), "2 values for 1 texts"),
    "heights for fewer texts": (lambda k: k.processor(["a"] * 2, height=[32], width=32), "1 values for 2 texts"),
    "sound": (lambda k: k.processor("a", audio=[1]), "videos and audio are not accepted"),
    "an unknown keyword": (lambda k: k.processor("a", image=PICTURE), "unexpected keyword argument 'image'"),
    "tensors of TensorFlow": (lambda k: k.processor("a", return_tensors="tf"), "return_tensors 'tf': accepted are"),
    "rows of two lengths": (
        lambda k: k.processor(["a", "b c"], padding=False),
        "padding False: .*return_tensors=None",
    ),
    "text for messages": (lambda k: k.processor.apply_chat_template("hi"), "messages 'hi': accepted is a list of"),
    "no messages": (lambda k: k.processor.apply_chat_template(None), "messages None: accepted is a list of"),
    "a conversation of nothing": (
        lambda k: k.processor.apply_chat_template([]),
        "an empty conversation: at least one",
    ),
    "an empty conversation among others": (
        lambda k: k.processor.apply_chat_template([[USER], []], tokenize=True),
        "an empty conversation: at least one",
    ),
    "a text among messages": (
        lambda k: k.processor.apply_chat_template([USER, "a"]),
        r"messages \[.*accepted is a list",
    ),
    "a message without role": (
        lambda k: k.processor.apply_chat_template([{"content": "a"}]),
        "role None: accepted are",
    ),
    "a system message": (lambda k: k.chat("a", role="system"), "role 'system': accepted are 'user' and 'assistant'"),
    "a message without content": (
        lambda k: k.processor.apply_chat_template([{"role": "user"}]),
        "content None: accepted",
    ),
    "a number for content": (lambda k: k.chat(5), "content 5: accepted is text, or a list of"),
    "one item for content": (lambda k: k.chat({"type": "text", "text": "a"}), "content {'type'.*accepted is text, or"),
    "content without type": (
        lambda k: k.chat([{"text": "a"}]),
        "content of type None: accepted are 'text' and 'image'",
    ),
    "content of type video": (lambda k: k.chat([{"type": "video"}]), "type 'video': accepted are 'text' and 'image'"),
    "content without text": (lambda k: k.chat([{"type": "text"}]), "text None in a message: accepted is a string"),
    "an image item without image": (lambda k: k.chat([{"type": "image"}]), "0 images for 1 placeholders"),
    "ids of text in a message": (lambda k: k.chat("a", input_ids="b"), "input_ids 'b': accepted are whole numbers"),
    "a misspelled option": (
        lambda k: k.processor.apply_chat_template([USER], tokenize=True, heigth=32),
        "heigth: accepted are height, target_px, upper_rows, width",
    ),
    "upper rows for no size": (
        lambda k: k.processor.apply_chat_template([USER], tokenize=True, upper_rows=CODES),
        "height None, width None: give both",
    ),
    "upper rows of another width": (
        lambda k: k.processor.apply_chat_template([USER], tokenize=True, upper_rows=CODES, height=64, width=64),
        r"upper rows of \(4, 4\) codes for a picture of 8x8",
    ),
    "upper rows of text": (
        lambda k: k.processor.apply_chat_template([USER], tokenize=True, upper_rows="b", height=64, width=64),
        "codes 'b': accepted are whole numbers",
    ),
    "text for turns": (lambda k: k.processor.encode_conversation("ab"), "turns 'ab': accepted is a list of strings"),
    "no turns": (lambda k: k.processor.encode_conversation([]), r"turns \[\]: accepted is a list of strings"),
    "turns without their image": (
        lambda k: k.processor.encode_conversation(["<|image|>", "a"]),
        "0 images for 1 place",
    ),
    "a picture for pictures": (lambda k: k.processor.encode_images(PICTURE), "of type Image: accepted is a list"),
    "an array for pictures": (
        lambda k: k.processor.encode_images(np.asarray(PICTURE)),
        "of type ndarray: accepted is a",
    ),
    "a path for pictures": (
        lambda k: k.processor.encode_images("a.png"),
        "of type str: accepted is a list of pictures",
    ),
    "a crop between codes": (
        lambda k: k.processor.encode_images([PICTURE], size=(33, 32)),
        r"size \(33, 32\): accepted is \(width_px, height_px\), multiples of 8",
    ),
    "a crop of one side": (lambda k: k.processor.encode_images([PICTURE], size=(32,)), r"size \(32,\): accepted is"),
    "a crop of a number": (lambda k: k.processor.encode_images([PICTURE], size=32), "size 32: accepted is"),
    "a seed for a generator": (
        lambda k: k.processor.encode_images([PICTURE], random_crop=True, generator=3),
        "generator 3: accepted is a torch.Generator",
    ),
    "float codes to decode": (
        lambda k: k.processor.decode_image(CODES.float()),
        "codes of torch.float32: accepted are",
    ),
    "codes that do not exist": (
        lambda k: k.processor.decode_image(CODES + 64),
        "codes 64 to 64: accepted are 0 to 63",
    ),
    "a picture to decode": (lambda k: k.processor.decode_image(PICTURE), "codes .*accepted"),
    "a grid for grids": (lambda k: k.processor.decode_images(CODES), r"codes of shape \(4,\): accepted is"),
    "a number for grids": (lambda k: k.processor.decode_images(5), "codes 5: accepted is a list"),
    "a batch of ids": (lambda k: k.processor.split_ids(IDS.repeat(2, 1)), r"shape \(2, 4\).*accepted is a row of ids"),
    "labels for ids": (lambda k: k.processor.decode_ids([-100, 5]), "from -100: accepted is a row of ids from 0 on"),
    "a text for ids": (lambda k: k.processor.decode_ids("hi"), "ids 'hi': accepted are whole numbers"),
    "floats for ids": (lambda k: k.processor.split_ids([1.5]), "ids of torch.float32: accepted are whole numbers"),
    "a picture that lies": (
        lambda k: k.processor.decode_ids([*k.rep.encode(CODES)[:9].tolist(), 5, k.rep.end_id]),
        "malformed image: token .* at position",
    ),
    "an unknown task": (lambda k: k.processor.check_task("etch"), "task 'etch': accepted are text-to-image, complete"),
    "a list of tasks": (lambda k: k.processor.check_task(["depth"]), r"task \['depth'\]: accepted are text-to-image"),
    "a prompt of an unknown task": (
        lambda k: k.processor.task_prompt("paint", "a"),
        "task 'paint': accepted are text-to-image",
    ),
    "a task without its prompt": (lambda k: k.processor.task_prompt("edit"), "task 'edit' takes a prompt"),
    "a task with a prompt too many": (
        lambda k: k.processor.task_prompt("depth", "a"),
        "task 'depth' takes no prompt",
    ),
    "a prompt that is a number": (lambda k: k.processor.task_prompt("edit", 5), "prompt 5: accepted is text"),
    "a blank prompt": (lambda k: k.processor.task_prompt("edit", " \n"), "task 'edit' takes a prompt"),
    "a condition that is a number": (
        lambda k: k.processor.task_prompt("pair", "a", condition=5),
        "condition 5: accepted is text",
    ),
    "a condition too many": (lambda k: k.processor.task_prompt("edit", "a", condition="hed"), "takes no condition"),
    "a height in text": (
        lambda k: k.processor.task_prompt("text-to-image", "a", "32", 32),
        "height '32' px: accepted are multiples",
    ),
    "a height without width": (lambda k: k.processor.task_prompt("text-to-image", "a", 32), "give both or none"),
    "a task without its image": (lambda k: k.processor.task_message("depth"), "'depth' takes an image"),
    "a task with an image too many": (
        lambda k: k.processor.task_message("text-to-image", "a", PICTURE),
        "'text-to-image' takes no image",
    ),
    "a VQ model of text": (lambda k: setattr(k.processor, "vqvae", "vqvae"), "of type str: accepted is a diffusers"),
    "a VQ model of another grid": (
        lambda k: setattr(LuminaMGPTProcessor(k.pictures, k.processor.tokenizer), "vqvae", k.pipe.vqvae),
        "8 px per code: this processor's layout wants 16",
    ),
    "no VQ model": (
        lambda k: LuminaMGPTProcessor(k.pictures, k.processor.tokenizer).vqvae,
        "no VQ model: set `processor.vqvae`",
    ),
    "a tokenizer's folder": (lambda k: LuminaMGPTProcessor(k.pictures, "folder"), "tokenizer 'folder': accepted is"),
}

GENERATE = {
    "no ids": (lambda k: k.generate(None), "no input_ids; accepted is one of them"),
    "ids twice": (lambda k: k.generate(IDS, input_ids=IDS), "both inputs and input_ids; accepted is one of them"),
    "a row of ids": (lambda k: k.generate(IDS[0]), r"input_ids of shape \(4,\); accepted is \(batch, length\)"),
    "an empty prompt": (lambda k: k.generate(IDS[:, :0]), r"shape \(1, 0\); accepted is \(batch, length\)"),
    "text for input_ids": (
        lambda k: k.generate("a red sphere"),
        "input_ids 'a red sphere': accepted are whole numbers",
    ),
    "float input_ids": (lambda k: k.generate(IDS.float()), "input_ids of torch.float32: accepted are whole numbers"),
    "ids outside the embedding": (lambda k: k.generate(IDS + 9999), "9999 to 10010; accepted are 0 to"),
    "a placeholder's id": (
        lambda k: k.generate(torch.tensor([[k.processor.image_token_id]])),
        "input_ids are .*; accepted are 0 to",
    ),
    "negative ids": (lambda k: k.generate(IDS - 100), "-100 to -89; accepted are 0 to"),
    "a mask of another shape": (
        lambda k: k.generate(attention_mask=IDS[:, 1:]),
        r"\(1, 3\); accepted are 0 and 1, \(1, 4\)",
    ),
    "a mask of other numbers": (
        lambda k: k.generate(attention_mask=IDS),
        "the mask of input_ids.*accepted are 0 and 1",
    ),
    "a mask of text": (lambda k: k.generate(attention_mask="1111"), "the mask of input_ids '1111': accepted are"),
    "padding on the right": (
        lambda k: k.generate(attention_mask=torch.tensor([[1, 1, 1, 0]])),
        "ends with 0; accepted are prompts that are padded on the left",
    ),
    "a mask of zeros": (lambda k: k.generate(attention_mask=0 * IDS), "ends with 0; accepted are prompts"),
    "a height in text": (lambda k: k.generate(height="32", width=32), "height '32' px: accepted are multiples of 16"),
    "a height between two sizes": (
        lambda k: k.generate(height=30, width=32),
        "height 30 px: accepted are multiples of 16",
    ),
    "a height alone": (lambda k: k.generate(height=32), "height=32 and width=None: give both or neither"),
    "a float height": (lambda k: k.generate(height=32.0, width=32), r"height 32\.0 px: accepted are multiples"),
    "a width alone": (lambda k: k.generate(width=32), "height=None and width=32: give both or neither"),
    "heights of other prompts": (lambda k: k.generate(height=[32] * 2, width=32), "height has 2 values for 1 prompts"),
    "no room": (lambda k: k.generate(height=160, width=160), "takes 424 more tokens, and 4 are left"),
    "a prompt as long as the context": (lambda k: k.generate(IDS.repeat(1, 128)), "leave no room in a context of 512"),
    "a guidance that is nan": (lambda k: k.generate(guidance_scale=NAN), "guidance_scale is nan; it must be a number"),
    "a negative guidance": (lambda k: k.generate(guidance_scale=-2), "guidance_scale is -2; it must be .* at least 0"),
    "an infinite guidance": (lambda k: k.generate(guidance_scale=INF), "guidance_scale is inf; it must be a number"),
    "a guidance in text": (lambda k: k.generate(guidance_scale="4"), "guidance_scale is '4'; it must be a number"),
    "guidances of other prompts": (lambda k: k.generate(guidance_scale=[4.0] * 2), "2 values for 1 prompts"),
    "a schedule that is unknown": (
        lambda k: k.generate(guidance_schedule="linear"),
        "'linear'; accepted are None, 'decay'",
    ),
    "a temperature of 0": (lambda k: k.generate(temperature=0), "image_temperature is 0; it must be .* greedy"),
    "a negative temperature": (lambda k: k.generate(text_temperature=-1.0), "text_temperature is -1.0; it must be"),
    "a temperature that is nan": (lambda k: k.generate(image_temperature=NAN), "image_temperature is nan; it must be"),
    "an infinite temperature": (lambda k: k.generate(image_temperature=INF), "image_temperature is inf; it must be"),
    "no temperature for a prompt": (
        lambda k: k.generate(image_temperature=[None]),
        "image_temperature is None; it must",
    ),
    "a top_k of 0": (lambda k: k.generate(top_k=0), "image_top_k is 0; it must be a whole number of at least 1"),
    "a float top_k": (lambda k: k.generate(image_top_k=2.5), "image_top_k is 2.5; it must be a whole number"),
    "a huge top_k": (lambda k: k.generate(top_k=10**30), "image_top_k is 1000.*; it must be a whole number"),
    "a float for an end": (
        lambda k: k.generate(eos_token_id=1.5),
        "eos_token_id of torch.float32: accepted are whole",
    ),
    "a text for an end": (lambda k: k.generate(eos_token_id="end"), "eos_token_id 'end': accepted are whole numbers"),
    "True as a top_k": (lambda k: k.generate(image_top_k=True), "image_top_k is True; it must be a whole number"),
    "a top_k in text": (lambda k: k.generate(text_top_k="5"), "text_top_k is '5'; it must be a whole number"),
    "top_ks of other prompts": (lambda k: k.generate(image_top_k=[5, 5]), "image_top_k has 2 values for 1 prompts"),
    "do_sample in text": (lambda k: k.generate(do_sample="no"), "do_sample is 'no'; accepted are True, False"),
    "top_p": (lambda k: k.generate(top_p=0.9), "top_p=0.9 is not supported; sampling is by top_k and temperature"),
    "an unknown decoding": (lambda k: k.generate(decoding="beam"), "decoding is 'beam'; accepted are 'ar'"),
    "no new tokens": (lambda k: k.generate(max_new_tokens=0), "max_new_tokens is 0; accepted are 1, 2, 3"),
    "a float of new tokens": (lambda k: k.generate(max_new_tokens=2.5), "max_new_tokens is 2.5; accepted are 1, 2"),
    "a length below the prompt's": (
        lambda k: k.generate(max_new_tokens=None, max_length=3),
        "max_length is 3, and the prompt has 4 tokens",
    ),
    "no sequences": (lambda k: k.generate(num_return_sequences=0), "num_return_sequences is 0; accepted are 1, 2"),
    "a float of sequences": (lambda k: k.generate(num_return_sequences=1.5), "num_return_sequences is 1.5; accepted"),
    "a seed for generators": (lambda k: k.generate(generator=3), "generator 3; accepted is a torch.Generator"),
    "generators of other rows": (lambda k: k.generate(generator=[None] * 2), "2 generators for 1 rows"),
    "negative ids of other prompts": (
        lambda k: k.generate(negative_prompt_ids=IDS.repeat(2, 1)),
        "2 negative prompts for 1",
    ),
    "a row for negative ids": (
        lambda k: k.generate(negative_prompt_ids=IDS[0]),
        r"negative_prompt_ids of shape \(4,\)",
    ),
    "text for negative ids": (
        lambda k: k.generate(negative_prompt_ids="ugly"),
        "negative_prompt_ids 'ugly': accepted",
    ),
    "a dict of settings": (
        lambda k: k.generate(generation_config={"top_k": 5}),
        "generation_config is {'top_k': 5}; accepted",
    ),
    "beams in a config": (lambda k: k.generate(generation_config=GenerationConfig(num_beams=2)), "num_beams=2 is not"),
    "a height in a config": (
        lambda k: k.generate(generation_config=GenerationConfig(height=32, width=32)),
        "height is in the generation_config; accepted is the call itself",
    ),
    "a temperature of 0 in a config": (
        lambda k: k.generate(generation_config=GenerationConfig(temperature=0.0)),
        "image_temperature is 0.0; it must be",
    ),
    "an unknown argument": (lambda k: k.generate(eta=0.5), "'eta'"),
}

CONFIG = {
    "a vocabulary in text": (lambda k: LuminaMGPTConfig(vocab_size="big"), "'vocab_size' expected int, got str"),
    "True layers": (lambda k: LuminaMGPTConfig(num_hidden_layers=True), "'num_hidden_layers' expected int, got bool"),
    "a layout of numbers": (lambda k: LuminaMGPTConfig(image_layout=[1]), r"'image_layout' with value \[1\]"),
    "an empty vocabulary": (lambda k: LuminaMGPTConfig(vocab_size=0), "vocab_size is 0; accepted are 1, 2, 3"),
    "a negative width": (lambda k: LuminaMGPTConfig(hidden_size=-8), "hidden_size is -8; accepted are 1, 2, 3"),
    "no shards": (lambda k: LuminaMGPTConfig(model_parallel_size=0), "model_parallel_size is 0; accepted are 1"),
    "a default height of 0": (lambda k: LuminaMGPTConfig(default_height_px=0), "default_height_px is 0; accepted"),
    "heads that do not fit": (
        lambda k: LuminaMGPTConfig(hidden_size=30, num_attention_heads=4),
        "hidden_size 30 and num_attention_heads 4; accepted is a multiple",
    ),
    "shared heads that do not fit": (
        lambda k: LuminaMGPTConfig(num_key_value_heads=3),
        "num_attention_heads 32 and num_key_value_heads 3; accepted is a multiple",
    ),
    "a layout with other keys": (
        lambda k: LuminaMGPTConfig(image_layout={"start": 1}),
        r"image_layout has keys \['start'\], not \['code_id_ranges'",
    ),
}

PIPELINE = {
    "a number for a prompt": (lambda k: k.pipe(5), "prompt 5: accepted is text"),
    "bytes for a prompt": (lambda k: k.pipe(b"a"), "prompt b'a': accepted is text"),
    "nothing at all": (lambda k: k.pipe(), "task 'text-to-image' takes a prompt"),
    "no prompts": (lambda k: k.pipe([]), "an empty list: at least one prompt or image is needed"),
    "an empty prompt": (lambda k: k.pipe([""]), "task 'text-to-image' takes a prompt"),
    "a blank prompt among others": (lambda k: k.pipe(["a", " \n"]), "task 'text-to-image' takes a prompt"),
    "a prompt of None among others": (lambda k: k.pipe(["a", None]), "task 'text-to-image' takes a prompt"),
    "a prompt that is a placeholder": (lambda k: k.pipe("<|image|>"), "0 images for 1 placeholders"),
    "a placeholder too many": (lambda k: k.pipe("a <|image|>", image=PICTURE), "1 images for 2 placeholders"),
    "a number for a negative prompt": (
        lambda k: k.pipe("a", negative_prompt=5),
        "negative_prompt 5: accepted is text",
    ),
    "0 for a negative prompt": (lambda k: k.pipe("a", negative_prompt=0), "negative_prompt 0: accepted is text"),
    "negative prompts of others": (lambda k: k.pipe("a", negative_prompt=["b"] * 2), "2 values for 1 prompts"),
    "an unknown task": (lambda k: k.pipe("a", task="etch"), "task 'etch': accepted are text-to-image"),
    "an empty task": (lambda k: k.pipe("a", task=""), "task '': accepted are text-to-image"),
    "an untrained task": (lambda k: untrained(k)("a", task="control"), "trained for caption.*allow_untrained"),
    "no image": (lambda k: k.pipe(task="depth"), "task 'depth' takes an image"),
    "no images": (lambda k: k.pipe(task="restore", image=[]), "an empty list: at least one prompt or image"),
    "None among images": (lambda k: k.pipe(task="depth", image=[PICTURE, None]), "task 'depth' takes an image"),
    "an image for words alone": (lambda k: k.pipe("a", PICTURE, "text-to-image"), "takes no image"),
    "a prompt for an image alone": (lambda k: k.pipe("a", PICTURE, "depth"), "task 'depth' takes no prompt"),
    "images of other prompts": (lambda k: k.pipe(["a", "b"], [PICTURE]), "image has 1 values for 2 prompts"),
    "images in a list too many": (
        lambda k: k.pipe("a", [[PICTURE]]),
        "an image of type list: accepted is a PIL image",
    ),
    "images to restore in a list too many": (
        lambda k: k.pipe(task="restore", image=[[PICTURE]]),
        "of type list: accept",
    ),
    "a number for an image": (lambda k: k.pipe("a", 5), "an image of type int: accepted is a PIL image"),
    "an absent image": (lambda k: k.pipe("a", "absent.png"), "absent.png"),
    "a bomb": (lambda k: k.pipe("a", k.files / "bomb.png"), "bomb.png.*decompression bomb"),
    "a strip": (lambda k: k.pipe("a", k.files / "strip.png"), "1x20000 px: accepted are sides of at most 100 to 1"),
    "a strip to restore": (lambda k: k.pipe(task="restore", image=k.files / "strip.png"), "1x20000 px: accepted are"),
    "a strip to complete": (
        lambda k: k.pipe("a", k.files / "strip.png", "complete", 64, 64),
        "1x20000 px: accepted are sides",
    ),
    "codes out of range": (lambda k: k.pipe("a", CODES + 64), "codes 64 to 64: accepted are 0 to 63"),
    "codes of another grid": (lambda k: k.pipe("a", CODES[:3]), "3x4 codes: accepted sides are multiples of 2"),
    "too many codes": (lambda k: k.pipe("a", CODES.repeat(9, 9)), "36x36 codes: accepted sides are .* up to 20"),
    "codes to restore out of range": (lambda k: k.pipe(task="restore", image=CODES - 1), "codes -1 to -1: accepted"),
    "codes that fill the picture": (
        lambda k: k.pipe("a", CODES, "complete", 32, 32),
        r"upper rows of \(4, 4\) codes for a picture of 4x4",
    ),
    "a height alone": (lambda k: k.pipe("a", height=32), "height 32, width None: give both or none"),
    "a height in text": (lambda k: k.pipe("a", height="32", width=32), "height '32'.*: accepted are"),
    "a height between two sizes": (
        lambda k: k.pipe("a", height=33, width=32),
        "height 33 px: accepted are multiples of 16 up to 160",
    ),
    "a size for words": (
        lambda k: k.pipe(image=PICTURE, task="caption", height=32, width=32),
        "takes no height and width: its answer is",
    ),
    "a width in text": (lambda k: k.pipe("a", height=32, width="32"), "width '32'.*: accepted are"),
    "a float height": (lambda k: k.pipe("a", height=32.0, width=32), r"height 32\.0.*: accepted are"),
    "a negative height": (lambda k: k.pipe("a", height=-32, width=32), "height -32.*: accepted are"),
    "True by True": (lambda k: k.pipe("a", height=True, width=True), "height True.*: accepted are"),
    "a huge height": (lambda k: k.pipe("a", height=10**9, width=32), "height 1000000000 px: accepted are"),
    "heights of other prompts": (
        lambda k: k.pipe("a", height=[32] * 2, width=32),
        "height has 2 values for 1 prompts",
    ),
    "heights of fewer prompts": (
        lambda k: k.pipe(["a"] * 2, height=[32], width=[32]),
        "height has 1 values for 2 prompts",
    ),
    "a panel in text": (
        lambda k: k.pipe("a", task="pair", condition="hed", height="32", width=32),
        "height '32'.*: accepted are",
    ),
    "an impossible height to complete": (
        lambda k: k.pipe("a", PICTURE, "complete", 32, 0),
        "width 0 px: accepted are",
    ),
    "a number for a condition": (lambda k: k.pipe("a", task="pair", condition=5), "condition 5: accepted is text"),
    "a size in a generation config": (
        lambda k: k.pipe("a", generation_config=GenerationConfig(height=64, width=64)),
        "height is in the generation_config",
    ),
    "a float of images": (
        lambda k: k.pipe("a", num_images_per_prompt=2.0),
        r"num_images_per_prompt 2\.0: accepted are",
    ),
    "True images": (lambda k: k.pipe("a", num_images_per_prompt=True), "num_images_per_prompt True: accepted are 1"),
    "images in text": (lambda k: k.pipe("a", num_images_per_prompt="2"), "num_images_per_prompt '2': accepted are 1"),
    "no images of a prompt": (
        lambda k: k.pipe("a", num_images_per_prompt=0),
        "num_images_per_prompt 0: accepted are 1",
    ),
    "sequences and images": (
        lambda k: k.pipe("a", num_return_sequences=2),
        "num_return_sequences.*num_images_per_prompt",
    ),
    "a guidance that is nan": (lambda k: k.pipe("a", guidance_scale=NAN), "guidance_scale is nan; it must be"),
    "a negative guidance": (lambda k: k.pipe("a", guidance_scale=-1), "guidance_scale is -1; it must be"),
    "a guidance in text": (lambda k: k.pipe("a", guidance_scale="strong"), "guidance_scale is 'strong'; it must be"),
    "guidances of other prompts": (
        lambda k: k.pipe("a", guidance_scale=[4.0] * 2),
        "guidance_scale has 2 values for 1",
    ),
    "a seed for a generator": (lambda k: k.pipe("a", generator=3), "generator 3; accepted is a torch.Generator"),
    "generators of other rows": (lambda k: k.pipe("a", generator=[None] * 2), "2 generators for 1 rows"),
    "generators of fewer rows": (lambda k: k.pipe(["a"] * 2, generator=[None]), "1 generators for 2 rows"),
    "an output type of files": (
        lambda k: k.pipe("a", output_type="jpg"),
        "output_type 'jpg': accepted are pil, np, pt",
    ),
    "no output type": (lambda k: k.pipe("a", output_type=None), "output_type None: accepted are pil, np, pt, latent"),
    "classes without a palette": (
        lambda k: k.pipe(task="segmentation", image=PICTURE, output_type="np"),
        "no palette.*set `image_processor.palette`",
    ),
    "restored codes": (lambda k: k.pipe(task="restore", image=PICTURE, output_type="latent"), "'latent': restored"),
    "a restored height": (lambda k: k.pipe(task="restore", image=PICTURE, height=64, width=64), "takes no height"),
    "colors by sepia": (lambda k: k.pipe(task="restore", image=PICTURE, color_fix="sepia"), "'sepia': accepted are"),
    "colors of a drawing": (
        lambda k: k.pipe("a", color_fix="sepia"),
        "color fix 'sepia': accepted are wavelet, adain",
    ),
    "text for a callback": (
        lambda k: k.pipe("a", callback_on_step_end="print"),
        "'print': accepted is something to call",
    ),
    "tensors that are not there": (
        lambda k: k.pipe("a", callback_on_step_end_tensor_inputs=["logits"]),
        r"\['logits'\]: accepted are \['generated_ids'\]",
    ),
    "text for tensors": (
        lambda k: k.pipe("a", callback_on_step_end_tensor_inputs="generated_ids"),
        r"'generated_ids': accepted are \['generated_ids'\]",
    ),
    "text for criteria": (lambda k: k.pipe("a", stopping_criteria=5), "stopping_criteria 5: accepted is a list"),
    "the best of nothing": (lambda k: k.pipe("a", best_of=0, verifier=len), "best_of 0: accepted are 1 and more"),
    "the best of a float": (
        lambda k: k.pipe("a", best_of=2.0, verifier=len),
        r"best_of 2\.0: accepted are 1 and more",
    ),
    "the best by nobody": (lambda k: k.pipe("a", best_of=2), "best_of 2 needs a verifier"),
    "the best of too few": (
        lambda k: k.pipe("a", best_of=1, num_images_per_prompt=2),
        "2 images per prompt need at least",
    ),
    "text for a verifier": (
        lambda k: k.pipe("a", best_of=2, verifier="clip"),
        "verifier 'clip': accepted is something",
    ),
    "a verifier without scores": (
        lambda k: k.pipe("a", verifier=lambda *a: []),
        "verifier failed on 'a'.*for 1 images",
    ),
    "a verifier of nan": (lambda k: k.pipe("a", verifier=lambda *a: [NAN]), "verifier failed on 'a'.*finite number"),
    "a verifier of one argument": (lambda k: k.pipe("a", verifier=lambda a: [1]), "verifier failed on 'a': TypeError"),
    "text for an enhancer": (
        lambda k: k.pipe("a", prompt_enhancer="gpt"),
        "prompt_enhancer 'gpt': accepted is something",
    ),
    "an enhancer of nothing": (lambda k: k.pipe("a", prompt_enhancer=lambda p: None), "made None of 'a': accepted is"),
    "an enhancer of empty texts": (
        lambda k: k.pipe("a", prompt_enhancer=lambda p: ""),
        "made '' of 'a': accepted is some",
    ),
    "an enhancer of blanks": (
        lambda k: k.pipe("a", prompt_enhancer=lambda p: " "),
        "made ' ' of 'a': accepted is some",
    ),
    "an unknown argument": (lambda k: k.pipe("a", strength=0.5), "'strength'"),
    "no room": (
        lambda k: k.pipe("a", height=160, width=160, max_new_tokens=99),
        "takes 424 more tokens, and 99 are left",
    ),
    "text for a chat": (lambda k: k.pipe.chat("hi"), "messages 'hi': accepted is a list of"),
    "one message for a chat": (lambda k: k.pipe.chat(USER), "messages {.*}: accepted is a list of"),
    "no messages": (lambda k: k.pipe.chat([]), "an empty conversation: at least one message"),
    "a message without role": (lambda k: k.pipe.chat([{"content": "a"}]), "role None: accepted are 'user' and"),
    "a message without content": (lambda k: k.pipe.chat([{"role": "user"}]), "content None: accepted is text"),
    "a message of type audio": (
        lambda k: k.pipe.chat([{"role": "user", "content": [{"type": "audio"}]}]),
        "type 'audio'",
    ),
    "a chat about an absent picture": (
        lambda k: k.pipe.chat([{"role": "user", "content": [{"type": "image", "path": "absent.png"}]}]),
        "absent.png",
    ),
    "a chat with a width alone": (lambda k: k.pipe.chat([USER], width=32), "height=None and width=32: give both"),
    "a chat with two heights": (lambda k: k.pipe.chat([USER], height=[32, 32], width=32), "height has 2 values for 1"),
    "a chat of two rows": (
        lambda k: k.pipe.chat([USER], num_return_sequences=2),
        "num_return_sequences 2: .* a chat has one answer",
    ),
    "a chat of new tokens in text": (
        lambda k: k.pipe.chat([USER], max_new_tokens="9"),
        "max_new_tokens is '9'; accepted",
    ),
    "a chat in an unknown form": (lambda k: k.pipe.chat([USER], output_type="gif"), "output_type 'gif': accepted are"),
    "upper rows for a width alone": (
        lambda k: k.pipe.chat([USER], upper_rows=CODES, width=32),
        "height None, width 32: give both or none",
    ),
    "a stream of a number": (lambda k: k.stream(5), "prompts 5: accepted is a string or a list"),
    "a stream of nothing": (lambda k: k.stream([]), r"prompts \[\]: accepted is a string or a list"),
    "a stream of numbers": (lambda k: k.stream([5]), "prompt 5: accepted is text"),
    "a stream of none at a time": (lambda k: k.stream(["a"], batch_size=0), "batch_size 0: accepted are 1 and more"),
    "a stream of a half at a time": (lambda k: k.stream(["a"], batch_size=0.5), r"batch_size 0\.5: accepted are 1"),
    "a stream with heights of others": (
        lambda k: k.stream(["a", "b"], height=[32] * 3, width=32),
        "height has 3 values for 2 prompts",
    ),
    "a stream with generators of others": (
        lambda k: k.stream(["a", "b"], batch_size=1, generator=[torch.Generator()] * 3),
        "3 generators for 2 rows",
    ),
    "a stream of a float of images": (
        lambda k: k.stream(["a"], num_images_per_prompt=1.5),
        r"num_images_per_prompt 1\.5: accepted are 1",
    ),
    "parts in text": (lambda k: LuminaMGPTPipeline("a", "b", "c"), "processor 'c': accepted is a LuminaMGPTProcessor"),
    "pickled weights": (lambda k: k.pipe.save_pretrained("new", safe_serialization=False), "safe_serialization=False"),
    "a variant": (
        lambda k: k.pipe.save_pretrained("new", variant="fp16"),
        "variant='fp16': accepted are True and None",
    ),
    "a file for a folder": (lambda k: k.pipe.save_pretrained(k.files / "text.png"), "text.png"),
    "a size of shards": (lambda k: k.pipe.save_pretrained("new", max_shard_size="5 pies"), "max_shard_size '5 pies'"),
}


def spoiled(name, content=None):
    """The tiny folder with one of its files cut short, or holding `content`."""

    def spoil(k):
        folder = k.files / "folder"
        if not folder.exists():
            shutil.copytree(k.files.parent / "tiny", folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:60] if content is None else content)
        return folder

    return spoil


FOLDERS = {
    "an empty folder": (lambda k: LuminaMGPTPipeline.from_pretrained(k.files / "nothing"), "transformer of .*nothing"),
    "a file": (lambda k: LuminaMGPTPipeline.from_pretrained(k.files / "text.png"), "text.png"),
    "no path": (lambda k: LuminaMGPTPipeline.from_pretrained(None), "None: accepted is a folder, or a repo"),
    "a configuration cut short": (spoiled("config.json"), "transformer of .*folder cannot be loaded.*config.json"),
    "a list for a configuration": (spoiled("config.json", b"[]"), "transformer of .*folder cannot be loaded"),
    "weights cut short": (spoiled("model.safetensors"), "transformer of .*folder cannot be loaded"),
    "empty weights": (spoiled("model.safetensors", b""), "transformer of .*folder cannot be loaded"),
    "VQ weights cut short": (
        spoiled("vqvae/diffusion_pytorch_model.safetensors"),
        "vqvae of .*folder cannot be loaded",
    ),
    "a VQ configuration cut short": (spoiled("vqvae/config.json"), "vqvae of .*folder cannot be loaded"),
    "a tokenizer cut short": (spoiled("tokenizer.json"), "processor of .*folder cannot be loaded"),
    "a processor of nonsense": (
        spoiled("processor_config.json", b'{"size_unit_px": "x", "processor_class": "LuminaMGPTProcessor"}'),
        "processor of .*folder cannot be loaded",
    ),
    "a processor alone cut short": (
        lambda k: LuminaMGPTProcessor.from_pretrained(spoiled("tokenizer.json")(k)),
        "folder holds no whole processor",
    ),
    "an empty folder for a processor": (
        lambda k: LuminaMGPTProcessor.from_pretrained(k.files / "nothing"),
        "nothing holds no whole processor",
    ),
    "a processor without its VQ model": (lambda k: without_vq(k).vqvae, r"folder has no VQ model in vqvae/: set"),
    "a processor with a damaged VQ model": (
        lambda k: LuminaMGPTProcessor.from_pretrained(spoiled("vqvae/diffusion_pytorch_model.safetensors")(k)).vqvae,
        "folder has no VQ model in vqvae/: set `processor.vqvae`",
    ),
}

COMMANDS = {
    "a size between two": ("generate a --size 33x48", "width 33 px: accepted are multiples of 16"),
    "a size of zero": ("generate a --size 0x0", "height 0: accepted are 1 and more"),
    "a huge size": ("generate a --size 99999999999x16", "99999999999 px: accepted are multiples of 16"),
    "a size of one number": ("generate a --size 64", "size '64': accepted is WIDTHxHEIGHT"),
    "a negative size": ("generate a --size=-16x16", "size '-16x16': accepted is WIDTHxHEIGHT"),
    "a blank prompt": (["generate", " "], "task 'text-to-image' takes a prompt"),
    "no prompt": ("generate", "Missing argument 'prompt'"),
    "an unknown command": ("paint a", "No such command 'paint'"),
    "an unknown option": ("generate a --steps 5", "No such option: --steps"),
    "a seed in words": ("generate a --seed one", "'--seed'.* valid int"),
    "a seed of 30 digits": (f"generate a --seed {10**29}", "'--seed': .*18446744073709551615"),
    "a guidance of nan": ("generate a --guidance-scale nan", "guidance_scale is nan; it must be"),
    "a negative guidance": ("generate a --guidance-scale=-3", "guidance_scale is -3.0; it must be"),
    "an output without ending": (
        "generate a -o picture",
        "output picture: accepted is a name with a picture's ending",
    ),
    "an output that is a text": ("generate a -o picture.txt", "output picture.txt: accepted is a name with"),
    "an output that cannot be written": ("generate a -o picture.psd", "such as picture.png, or .npy"),
    "an output below a file": ("generate a --size 32x32 -o files/text.png/a.png", "files/text.png"),
    "an output that is a folder": ("generate a -o files/folder.png", "folder.png"),
    "the best of none": ("generate a --best-of 0 --verifier tabletop", "(or equal to 1|x>=1)"),
    "the best by nobody": ("generate a --best-of 2", "best_of 2 needs a verifier"),
    "the best by a mistyped one": (
        "generate a --best-of 2 --verifier tabletp",
        "verifier 'tabletp': neither \"tabletop\", a folder",
    ),
    "a mistyped condition": (
        "generate a --condition dept",
        "condition 'dept': accepted are depth, canny, hed, pose",
    ),
    "an enhancer's address alone": ("generate a --prompt-enhancer-url http://a", "http://a: name the model"),
    "an output that is the input": (
        "edit files/good.png a -o files/../files/good.png",
        "good.png is the picture that is read: name another one",
    ),
    "an absent picture": ("edit absent.png a", "absent.png"),
    "a text for a picture": ("edit files/text.png a", "text.png: not a picture"),
    "an empty picture": ("edit files/empty.png a", "empty.png: not a picture"),
    "a picture cut short": ("predict depth files/cut.jpg", "cut.jpg: not a picture"),
    "a bomb": ("restore files/bomb.png", "bomb.png.*decompression bomb"),
    "a strip": ("restore files/strip.png", "1x20000 px: accepted are sides"),
    "a folder for a picture": ("predict depth files", "files"),
    "an unknown prediction": ("predict etch files/good.png", "task 'etch': accepted are text-to-image"),
    "a prediction without its words": ("predict detection files/good.png", "task 'detection' takes a prompt"),
    "a prediction with words": ("predict depth files/good.png a", "task 'depth' takes no prompt"),
    "numbers without a palette": ("predict segmentation files/good.png -o a.npy", "no palette"),
    "colors by sepia": ("restore files/good.png --color-fix sepia", "color fix 'sepia': accepted are wavelet, adain"),
    "a model that is not there": ("generate a --model nowhere", "model 'nowhere': neither a folder nor a repo"),
    "a folder that is not in its folder": (
        "generate a --model files/no-such-run",
        "model .*: files has no no-such-run",
    ),
    "an adapter that is not in its folder": ("generate a --lora files/nope", "lora .*: files has no nope"),
    "the best in all tasks": (
        "evaluate --all --best-of 2",
        "--all takes neither guidance-scale nor best-of",
    ),
    "the other count of cases": ("evaluate --all --num-per-category 3", "accepted there is --num-cases"),
    "the count of all cases": ("evaluate --num-cases 3", "accepted there is --num-per-category"),
    "a model of nothing": ("generate a --model files/nothing", "nothing cannot be loaded"),
    "a picture for a model": ("generate a --model files/good.png", "good.png"),
    "an absent recipe": ("train absent.yaml", "absent.yaml"),
    "a picture for a recipe": ("train files/good.png", "good.png is not YAML"),
    "an empty recipe": ("train files/empty.png", "empty.png holds NoneType: accepted are `name: value` lines"),
    "no model to push": ("push files name/repo", "files has no model_index.json: not a model's folder"),
    "two folders to check": ("convert files out --check", "convert takes SOURCE and OUT, or --check"),
    "no sentences": ("evaluate --num-per-category 0", "(or equal to 1|x>=1)"),
    "an evaluation into a file": ("evaluate --output-dir files/good.png", "good.png is a file: accepted is a folder"),
    "an evaluation between sizes": ("evaluate --num-per-category 1 --size 33x33", "33 px: accepted are multiples"),
}


def closed(k):
    picture = Image.open(k.files / "good.png")
    picture.close()
    return picture


def untrained(k):
    k.processor.trained_tasks = ["caption"]
    return k.pipe


def without_vq(k):
    folder = spoiled("README.md", b"")(k)
    shutil.rmtree(folder / "vqvae")
    return LuminaMGPTProcessor.from_pretrained(folder)


def all_of(room):
    return [
        pytest.param(call, said, id=f"{name}: {case}")
        for name, cases in room.items()
        for case, (call, said) in cases.items()
    ]


@pytest.fixture(scope="session")
def faulty_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "nothing").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("a red sphere")
    PICTURE.save(folder / "good.png")
    for name in ("cut.png", "cut.jpg"):
        PICTURE.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:1500])
    whole = (folder / "good.png").read_bytes()
    (folder / "lying.png").write_bytes(whole[:16] + (2**31 - 1).to_bytes(4) * 2 + whole[24:])
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.new("L", (1, 20000)).save(folder / "strip.png")
    return folder


@pytest.fixture
def kit(tiny_pipe, faulty_files, tmp_path, monkeypatch):
    shutil.copytree(faulty_files, tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    return Kit(tiny_pipe, tmp_path / "files")


def listing(folder):
    return sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))


def assert_plain(error, said):
    """Says what was wrong, in words, from this package: not from deep in a stack, nor as a bug would look."""
    assert re.search(said, str(error), re.DOTALL), f"{type(error).__name__}: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, TypeError):
        assert "unexpected keyword argument" in str(error)
    else:
        assert isinstance(error, ValueError | OSError | VerifierError | StrictDataclassError), repr(error)
        is_stocks_check = frame.name in STOCK_CHECKS or isinstance(error, StrictDataclassError)
        assert frame.filename.startswith(PRODUCT) or is_stocks_check, f"raised in {frame.filename}:{frame.lineno}"


@pytest.mark.parametrize(
    ("call", "said"),
    all_of(
        {
            "uni_rep": UNI_REP,
            "image processor": IMAGE_PROCESSOR,
            "processor": PROCESSOR,
            "generate": GENERATE,
            "configuration": CONFIG,
            "pipeline": PIPELINE,
        }
    ),
)
def test_a_malformed_input_is_a_plain_error_and_writes_nothing(call, said, kit, tmp_path):
    before = listing(tmp_path)
    with pytest.raises(Exception) as caught:
        call(kit)
    assert_plain(caught.value, said)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("call", "said"), all_of({"folders": FOLDERS}))
def test_a_broken_folder_is_a_plain_error_that_names_it(call, said, kit, tiny_folder):
    with pytest.raises(Exception) as caught:
        loaded = call(kit)
        if isinstance(loaded, Path):
            LuminaMGPTPipeline.from_pretrained(loaded)
    assert_plain(caught.value, said)


@pytest.mark.parametrize(("command", "said"), all_of({"commands": COMMANDS}))
def test_a_malformed_command_is_one_line_and_writes_nothing(command, said, kit, tmp_path, monkeypatch):
    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda model, lora=None: load(model, lora) if model or lora else kit.pipe)
    before = listing(tmp_path)
    result = CliRunner().invoke(cli.app, command.split() if isinstance(command, str) else command)
    assert result.exit_code == 2 and not result.stdout, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    assert re.search(said, result.stderr), result.stderr
    assert listing(tmp_path) == before
