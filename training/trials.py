"""Tabletop's cases of every task, a model's answers to them, and what these can be held against.

Three answers to each case are measured alike: a trivial one (a mean map, the most frequent answer, the unchanged
picture, another case's), the model's own, and the ceiling: the true answer passed through the VQ model.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_lumina_mgpt.uni_rep import best_bucket

from . import metrics
from .drawing import draw_box, draw_skeletons
from .evaluate import CATEGORIES, Example, held_out_examples, judge, passes, true_pictures
from .tabletop import HELD_OUT, Plan, TabletopSource
from .tabletop_mannequin import JOINTS, LIMBS
from .tabletop_scenes import joints_px, projected_box
from .tasks import CONTROLS, conversation, panel_sizes

if TYPE_CHECKING:
    from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

COLUMN_NAMES = ("trivial", "ours", "ceiling")
BATCH_SIZE = 32
NUM_TRAINING, NUM_MAPS = 500, 100  # plans and maps that trivial answers are made of
NUM_SENTENCES = 60  # for each size and each point of a curve
NUM_EDITS = 3
PANEL_SCALE = 2  # what the recipes multiply `target_px` by for pictures of two panels
TEXT_TOKENS = 128  # at most, in an answer
SEEN = ("input", "truth", "ours")
# Of a model of 64 x 64, others' in proportion
IMAGE_SIZES = "48x48 64x64 80x48 48x80 96x96 112x80 128x128 160x64 64x160 160x160"
CURVES = {"guidance_scale": (1, 2, 3, 4, 5, 6, 7, 8), "image_temperature": (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)}
CONDITIONS = ("depth", "pose", "subject")


@dataclass
class Trials:
    """A task's cases, all answers to them, and what is to be seen of some.

    Attributes:
        measure: called with a case and an answer.
        answers: one for each case, by name of the column; a task without pictures has no ceiling.
        headings, shown: of the contact sheet: a line of text and pictures for each case.
    """

    cases: Sequence[Any]
    measure: Callable[[Any, Any], metrics.Values]
    answers: Mapping[str, Sequence[Any]]
    headings: tuple[str, ...] = ()
    shown: list[tuple[str, list[Image.Image]]] = field(default_factory=list)


@dataclass
class Answer:
    """What the model gave for a case; black where it drew nothing."""

    picture: Image.Image
    text: str
    panel: Image.Image
    box: tuple[int, int, int, int] | None


class Board:
    """A pipeline that is being scored: where cases and answers come from.

    Args:
        size: (width_px, height_px) of pictures, but for tasks with sizes of their own.
        split: "test" or "validation".
    """

    def __init__(
        self, pipe: "LuminaMGPTPipeline", num_cases: int, size: tuple[int, int], seed: int, split: str = "test"
    ):
        self.pipe, self.processor = pipe, pipe.processor
        self.num_cases, self.size, self.seed, self.split = num_cases, size, seed, split

    def plans(self, task: str, size: tuple[int, int] | None = None) -> Iterator[tuple[Plan, Callable[[], list[dict]]]]:
        """The split's plans without end, each with what fetches its record, in a list."""
        source = TabletopSource(task, [size or self.size], self.seed, self.split, 2**31)
        for i in count():
            yield source.plan(i), partial(source.fetch, [i])

    def cases(self, task: str) -> tuple[list[Plan], list[dict]]:
        """The first plans of a task in the split and their records."""
        source = TabletopSource(task, [self.size], self.seed, self.split, self.num_cases)
        return [source.plan(i) for i in range(len(source))], source.fetch(range(len(source)))

    def sentences(self, num_per_category: int, size: tuple[int, int]) -> list[Example]:
        return held_out_examples(num_per_category, *size, self.seed, self.split)

    def by_condition(self, task: str, size: tuple[int, int], conditions: Sequence[str]) -> Iterator[tuple[str, dict]]:
        """A condition and a record for it in turn, as many of each."""
        each = math.ceil(self.num_cases / len(conditions))
        left = dict.fromkeys(conditions, each)
        for plan, fetch in self.plans(task, size):
            suitable = [c for c in conditions if left[c] and (c != "pose" or plan.scenes[0].mannequin)]
            if suitable:
                chosen = max(suitable, key=lambda c: (c == "pose", left[c]))  # not every scene has one
                left[chosen] -= 1
                yield chosen, fetch()[0]
            if not any(left.values()):
                return

    def training(self, task: str) -> list[Plan]:
        """Training plans, of which trivial answers are made."""
        source = TabletopSource(task, [self.size], self.seed, "train", NUM_TRAINING)
        return [source.plan(i) for i in range(len(source))]

    def mean_map(self, task: str) -> Image.Image:
        """The mean of training maps, pixel by pixel."""
        records = TabletopSource(task, [self.size], self.seed, "train", NUM_MAPS).fetch(range(NUM_MAPS))
        return Image.fromarray(np.mean([np.asarray(r[task]) for r in records], 0).round().astype(np.uint8))

    def through_vq(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """Pictures of one size as the VQ model gives them back."""
        return self.processor.decode_images(self.processor.encode_images(pictures, size=pictures[0].size))

    def ask(self, task: str, prompts: list[str] | None = None, images: list | None = None, **options) -> list[Answer]:
        """The pipeline's answers, in batches; options are for all cases, or lists with one for each."""
        given: Any = {"prompt": prompts, "image": images, **options}
        given["generator"] = generators = self._generators(task, len(prompts or images or []))
        blank = Image.new("RGB", (options.get("width", self.size[0]), options.get("height", self.size[1])))
        answers = []
        for start in tqdm(range(0, len(generators), BATCH_SIZE), desc=task):
            part = slice(start, start + BATCH_SIZE)
            own = {name: value[part] if isinstance(value, list) else value for name, value in given.items()}
            output: Any = self.pipe(task=task, **own)
            boxes, panels = output.boxes or [None] * BATCH_SIZE, output.panels or [None] * BATCH_SIZE
            for i, (picture, text) in enumerate(zip(output.images, output.text, strict=True)):
                answers.append(Answer(picture or blank, text, panels[i] or blank, boxes[i]))
        return answers

    def continue_chats(self, chats: list[list[dict]], task: str, size: tuple[int, int] | None = None) -> list[dict]:
        """The next message of each conversation, in batches: a picture of a size, or what the model likes."""
        inputs = self.processor.apply_chat_template(chats, tokenize=True, return_dict=True)
        options: dict[str, Any] = {"max_new_tokens": TEXT_TOKENS}
        if size:
            uni_rep = self.processor.uni_rep
            options = {"width": size[0], "height": size[1], "eos_token_id": [uni_rep.end_id, uni_rep.end_of_turn_id]}
            options |= self.pipe.sampling_after_images()  # as `chat` has it
        rows = self.pipe.transformer.stream(
            **inputs.to(self.pipe.device),
            batch_size=BATCH_SIZE,
            generator=self._generators(f"{task}/{len(chats[0])}", len(chats)),
            **options,
        )
        said = dict(tqdm(rows, total=len(chats), desc=task))
        return [self.processor.answer_message(said[i].sequences[0].cpu()) for i in range(len(chats))]

    def _generators(self, task: str, num: int) -> list[torch.Generator]:
        seeds = (random.Random(f"{self.seed}/{task}/{i}").getrandbits(63) for i in range(num))
        return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- sentences -> pictures -------------------------------------------------------------------------------------------


def text_to_image(board: Board) -> Trials:
    examples = board.sentences(math.ceil(board.num_cases / len(CATEGORIES)), board.size)
    return _sentences(board, examples, board.size)


def _sentences(board: Board, examples: list[Example], size: tuple[int, int]) -> Trials:
    true = [picture for picture, _, _ in true_pictures([e.scene for e in examples], *size)]
    sentences = [e.caption.text for e in examples]
    ours = [a.picture for a in board.ask("text-to-image", sentences, width=size[0], height=size[1])]
    shown = [(e.caption.text, [t, a]) for e, t, a in zip(examples, true, ours, strict=True)]
    answers = {"trivial": _shuffled(true), "ours": ours, "ceiling": board.through_vq(true)}
    return Trials(examples, _draws_sentence, answers, ("a true picture", "ours"), shown)


def _draws_sentence(example: Example, picture: Image.Image) -> metrics.Values:
    detections = judge(picture)
    passed = float(passes(example.caption, detections))
    alone = passed * (len(detections) == len(example.scene.objects))  # a sentence names all objects
    is_new = any(o.combination in HELD_OUT for o in example.scene.objects)
    group = f"{'new' if is_new else 'seen'} combinations"
    return {"overall": passed, "overall, nothing else": alone, group: passed, example.category: passed}


def sizes(board: Board) -> Trials:
    """The same at the sizes that fit the context; those "between buckets" are in no stage of the recipes."""
    uni_rep, target_px = board.processor.uni_rep, board.processor.target_px
    room = board.pipe.transformer.config.max_position_embeddings - TEXT_TOKENS
    proportional = [[int(side) * target_px // 64 for side in size.split("x")] for size in IMAGE_SIZES.split()]
    whole = [(w, h) for w, h in proportional if w % uni_rep.size_unit_px == h % uni_rep.size_unit_px == 0]
    image_sizes = [(w, h) for w, h in whole if uni_rep.num_tokens(*uni_rep.grid(h, w)) <= room]
    targets = [int(target_px * scale) for scale in (1, 1.5, 2)]
    buckets = {size for px in targets if px % uni_rep.size_unit_px == 0 for size in uni_rep.buckets(px)}
    cases: list[tuple[str, Example]] = []
    answers: dict[str, list] = {column: [] for column in COLUMN_NAMES}
    shown = []
    for i, size in enumerate(image_sizes):
        trials = _sentences(board, board.sentences(_per_category(board), size), size)
        name = f"overall, {size[0]}x{size[1]}" + ("" if size in buckets else " (between buckets)")
        cases += [(name, example) for example in trials.cases]
        for column, own in answers.items():
            own += trials.answers[column]
        text, pictures = trials.shown[i * len(trials.shown) // len(image_sizes)]  # of another category each time
        shown.append((f"{name}: {text}", pictures))
    return Trials(cases, _draws_case, answers, ("a true picture", "ours"), shown)


def curves(board: Board) -> Trials:
    """The same sentences over guidance and temperature, the checkpoint's own settings apart from one."""
    examples = board.sentences(_per_category(board), board.size)
    sentences, (width, height) = [e.caption.text for e in examples], board.size
    cases, ours, shown = [], [], []
    for setting, values in CURVES.items():
        for value in values:
            options: dict[str, Any] = {"width": width, "height": height, setting: value}
            drawn = board.ask("text-to-image", sentences, **options)
            cases += [(f"{setting} {value:g}", example) for example in examples]
            ours += [answer.picture for answer in drawn]
        first = ours[-len(values) * len(examples) :: len(examples)]
        shown.append((f"{setting} {', '.join(f'{value:g}' for value in values)}", first))
    return Trials(cases, _draws_case, {"ours": ours}, (), shown)


def _draws_case(case: tuple[str, Example], picture: Image.Image) -> metrics.Values:
    name, example = case
    return {name: _draws_sentence(example, picture)["overall"]}


def _per_category(board: Board) -> int:
    return math.ceil(min(NUM_SENTENCES, board.num_cases) / len(CATEGORIES))


def _shuffled(answers: Sequence[Any]) -> list[Any]:
    """Each in the place of another one."""
    order = random.Random(0).sample(range(len(answers)), len(answers))
    others = dict(zip(order, order[1:] + order[:1], strict=True))
    return [answers[others[i]] for i in range(len(answers))]


# --- pictures -> words, and words alone ------------------------------------------------------------------------------


def caption(board: Board) -> Trials:
    plans, records = board.cases("caption")
    ours = [a.text for a in board.ask("caption", images=[r["image"] for r in records], max_new_tokens=TEXT_TOKENS)]
    objects = (o for plan in board.training("caption") for o in metrics.read_objects(plan.words["caption"]))
    usual = Counter((o["color"], o["shape"]) for o in objects if "color" in o).most_common(1)[0][0]
    answers = {"trivial": [f"a {' '.join(usual)}"] * len(plans), "ours": ours}
    shown = [(f"true: {r['caption']}\nours: {a}", [r["image"]]) for r, a in zip(records, ours, strict=True)]
    return Trials([plan.scenes[0] for plan in plans], metrics.caption, answers, ("input",), shown)


def vqa(board: Board) -> Trials:
    plans, records = board.cases("vqa")
    asked = [r["question"] for r in records], [r["image"] for r in records]
    ours = [a.text for a in board.ask("vqa", *asked, max_new_tokens=TEXT_TOKENS)]
    usual = _most_frequent((plan.kinds[0], plan.words["answer"]) for plan in board.training("vqa"))
    cases = [(plan.kinds[0], plan.words["answer"]) for plan in plans]
    answers = {"trivial": [usual[kind] for kind, _ in cases], "ours": ours}
    shown = [_asked(r["question"], r["answer"], a, r["image"]) for r, a in zip(records, ours, strict=True)]
    return Trials(cases, _is_right, answers, ("input",), shown)


def chat(board: Board) -> Trials:
    """Questions one at a time, all different: of arithmetic the test split has fewer than there are cases."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in ("number comparison", "arithmetic", "dialogue")}
    for plan, _ in islice(board.plans("chat"), 20 * board.num_cases):
        for question, answer in _dialogue(plan):
            own = found[_chat_kind(question)]
            if len(own) < board.num_cases:
                own[question] = answer
    cases = [(kind, answer) for kind, own in found.items() for answer in own.values()]
    questions = [question for own in found.values() for question in own]
    said = board.continue_chats([[{"role": "user", "content": question}] for question in questions], "chat")
    ours = ["".join(x["text"] for x in message["content"] if x["type"] == "text").strip() for message in said]
    usual = _most_frequent((_chat_kind(q), a) for plan in board.training("chat") for q, a in _dialogue(plan))
    first = [re.search(r"([\d.]+) or ", question) for question in questions]  # of two numbers, or as often the other
    trivial = [number[1] if number else usual[kind] for number, (kind, _) in zip(first, cases, strict=True)]
    shown = [_asked(q, a, o) for q, (_, a), o in zip(questions, cases, ours, strict=True)]
    return Trials(cases, _is_right, {"trivial": trivial, "ours": ours}, (), shown)


def _dialogue(plan: Plan) -> Iterator[tuple[str, str]]:
    said = [message["value"] for message in plan.words["conversations"]]
    return zip(said[::2], said[1::2], strict=True)


def _chat_kind(question: str) -> str:
    if re.match(r"Which is (bigger|larger|smaller)\?|Is [\d.]+ less", question):
        return "number comparison"
    return "arithmetic" if re.fullmatch(r"What is \d+ [+-] \d+\?", question) else "dialogue"


def _most_frequent(answers: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Of each kind."""
    counts = Counter(answers).most_common()
    return {kind: answer for (kind, answer), _ in reversed(counts)}


def _is_right(case: tuple[str, str], text: str) -> metrics.Values:
    kind, answer = case
    right = metrics.same(answer, text)
    return {"accuracy": right, f"accuracy, {kind}": right}


def _asked(question: str, answer: str, ours: str, *pictures: Image.Image) -> tuple[str, list[Image.Image]]:
    return f"{question}\ntrue: {answer}\nours: {ours}", [*pictures]


# --- pictures -> maps ------------------------------------------------------------------------------------------------


def depth(board: Board) -> Trials:
    return _map(board, "depth", metrics.depth)


def normal(board: Board) -> Trials:
    return _map(board, "normal", metrics.normal)


def segmentation(board: Board) -> Trials:
    return _map(board, "segmentation", metrics.segmentation, Image.new("RGB", board.size))


def _map(board: Board, task: str, measure: Callable, trivial: Image.Image | None = None) -> Trials:
    _, records = board.cases(task)
    images, true = [r["image"] for r in records], [r[task] for r in records]
    ours = [a.picture for a in board.ask(task, images=images)]
    trivial = trivial or board.mean_map(task)
    answers = {"trivial": [trivial] * len(true), "ours": ours, "ceiling": board.through_vq(true)}
    return Trials(true, measure, answers, SEEN, [("", [*row]) for row in zip(images, true, ours, strict=True)])


def pose(board: Board) -> Trials:
    """Trivial is the mean pose in the middle of the picture."""
    plans, records = board.cases("pose")
    images, true = [r["image"] for r in records], [r["pose"] for r in records]
    ours = [a.picture for a in board.ask("pose", images=images)]
    joints = [joints_px(plan.scenes[0], *board.size) for plan in board.training("pose")]
    mean = np.mean([own - (own.min(0) + own.max(0)) / 2 for own in joints], 0) + np.array(board.size) / 2  # (14, 2)
    people = np.concatenate([mean, np.ones((len(JOINTS), 1))], 1)[None]
    trivial = [draw_skeletons(people, *board.size, limbs=LIMBS)] * len(plans)
    answers = {"trivial": trivial, "ours": ours, "ceiling": board.through_vq(true)}
    shown = [("", [*row]) for row in zip(images, true, ours, strict=True)]
    return Trials([joints_px(plan.scenes[0], *board.size) for plan in plans], metrics.pose, answers, SEEN, shown)


def detection(board: Board) -> Trials:
    """Trivial is the mean box of training."""
    plans, records = board.cases("detection")
    images, boxes = [r["image"] for r in records], [r["box"] for r in records]
    given = board.ask("detection", [r["phrase"] for r in records], images)
    true = [draw_box(image, box) for image, box in zip(images, boxes, strict=True)]
    framed, plain = board.through_vq(true), board.through_vq(images)
    find_box = board.processor.image_processor.find_box
    targets = [plan.scenes[0].objects[plan.target] for plan in board.training("detection")]
    mean = np.mean([projected_box(o, *board.size) for o in targets], 0)
    ceiling = [find_box(*pair) for pair in zip(framed, plain, strict=True)]
    answers = {"trivial": [mean] * len(plans), "ours": [a.box for a in given], "ceiling": ceiling}
    shown = [(r["phrase"], [i, t, a.picture]) for r, i, t, a in zip(records, images, true, given, strict=True)]
    return Trials(boxes, metrics.detection, answers, SEEN, shown)


# --- pictures -> pictures --------------------------------------------------------------------------------------------


def edit(board: Board) -> Trials:
    """Conversations of three edits; the model goes on with what it drew. Trivial is to change nothing."""
    plans = [*islice((plan for plan, _ in board.plans("edit") if len(plan.kinds) == NUM_EDITS), board.num_cases)]
    states = iter(true_pictures([scene for plan in plans for scene in plan.scenes], *board.size))
    cases = [(plan, [metrics.State(*next(states)) for _ in plan.scenes]) for plan in plans]
    chats: list[list[dict]] = [[] for _ in plans]
    for turn in range(NUM_EDITS):
        for (plan, (first, *_)), messages in zip(cases, chats, strict=True):
            words = plan.words["instructions"][turn]
            asked = board.processor.task_message("edit", words, first.picture)
            messages.append({"role": "user", "content": words} if turn else asked)
        for messages, answer in zip(chats, board.continue_chats(chats, "edit", board.size), strict=True):
            messages.append(answer)
    codes = [message["content"][-1]["image"] for messages in chats for message in messages[1::2]]
    ours = _by_case(board.processor.decode_images(codes))
    ceiling = _by_case(board.through_vq([state.picture for _, states in cases for state in states[1:]]))
    trivial = [[state.picture for state in states[:-1]] for _, states in cases]
    shown = [
        ("\n".join(plan.words["instructions"]), [states[0].picture, *_interleaved(states[1:], own)])
        for (plan, states), own in zip(cases, ours, strict=True)
    ]
    headings = ("input", *(f"{what} {turn + 1}" for turn in range(NUM_EDITS) for what in ("truth", "ours")))
    return Trials(cases, _edits, {"trivial": trivial, "ours": ours, "ceiling": ceiling}, headings, shown)


def _by_case(pictures: list[Image.Image]) -> list[list[Image.Image]]:
    return [pictures[i : i + NUM_EDITS] for i in range(0, len(pictures), NUM_EDITS)]


def _interleaved(states: list[metrics.State], pictures: list[Image.Image]) -> list[Image.Image]:
    return [picture for state, own in zip(states, pictures, strict=True) for picture in (state.picture, own)]


def _edits(case: tuple[Plan, list[metrics.State]], pictures: list[Image.Image]) -> metrics.Values:
    """Each turn apart, and all turns by kind of edit."""
    plan, states = case
    values: metrics.Values = {}
    of_kind: dict[str, list[Any]] = {kind: [] for kind in plan.kinds}
    for turn, kind in enumerate(plan.kinds):
        own = metrics.edit(states[turn], states[turn + 1], pictures[turn])
        values |= {f"{name}, turn {turn + 1}": value for name, value in own.items()}
        of_kind[kind].append(own["done and rest untouched"])
    return values | {f"done and rest untouched, {kind}": (sum(x), len(x)) for kind, x in of_kind.items()}


def control(board: Board) -> Trials:
    """The model itself finds a picture's condition again: how well it can, its scores for maps of pictures say."""
    found = [*board.by_condition("control", board.size, CONTROLS)]
    given, captions = [record[condition] for condition, record in found], [record["caption"] for _, record in found]
    ours, true = [a.picture for a in board.ask("control", captions, given)], [record["image"] for _, record in found]
    drawn = {"trivial": _shuffled(true), "ours": ours, "ceiling": board.through_vq(true)}
    conditions = [condition for condition, _ in found]
    answers = {c: [*zip(own, _found_again(board, conditions, own), strict=True)] for c, own in drawn.items()}
    shown = [(text, [*row]) for text, *row in zip(captions, given, true, ours, strict=True)]
    return Trials(found, _controlled, answers, SEEN, shown)


def _found_again(board: Board, conditions: list[str], pictures: list[Image.Image]) -> list[Image.Image | None]:
    """Of each picture the map of its condition, None if the model was not trained for such maps."""
    maps: list[Image.Image | None] = [None] * len(pictures)
    trained = board.processor.trained_tasks
    for condition in sorted({*conditions} if trained is None else {*conditions} & {*trained}):
        places = [i for i, own in enumerate(conditions) if own == condition]
        for i, answer in zip(places, board.ask(condition, images=[pictures[i] for i in places]), strict=True):
            maps[i] = answer.picture
    return maps


def _controlled(case: tuple[str, dict], answer: tuple[Image.Image, Image.Image | None]) -> metrics.Values:
    (condition, record), (picture, again) = case, answer
    values: metrics.Values = {
        "caption satisfied": _satisfied(record["caption"], picture),
        f"mask IoU, {condition}": metrics.condition_iou(condition, record["segmentation"], picture),
    }
    if again is None:
        return values
    truth: Any = metrics.read_joints(record["pose"]) if condition == "pose" else record[condition]
    found_again = getattr(metrics, condition)(truth, again)
    return values | {f"{name}, {condition} found again": value for name, value in found_again.items()}


def _satisfied(text: str, picture: Image.Image) -> float:
    return float(passes(metrics.read_caption(text), judge(picture)))


def refine(board: Board) -> Trials:
    """Trivial is the picture of the disturbed codes."""
    _, records = board.cases("refine")
    given = [_conversation(board, "refine", record, i)[1] for i, record in enumerate(records)]
    decoded = board.processor.decode_images([codes for pair in given for codes in pair])
    disturbed, ceiling, true = decoded[::2], decoded[1::2], [record["image"] for record in records]
    ours = [a.picture for a in board.ask("refine", images=[codes for codes, _ in given])]
    answers = {"trivial": disturbed, "ours": ours, "ceiling": ceiling}
    shown = [("", [*row]) for row in zip(disturbed, true, ours, strict=True)]
    return Trials(true, metrics.likeness, answers, SEEN, shown)


def restore(board: Board) -> Trials:
    """Trivial is the bicubic picture, and to call every degree "clearly"."""
    _, records = board.cases("restore")
    made = [_conversation(board, "restore", record, i) for i, record in enumerate(records)]
    given, true = ([pictures[i] for _, pictures in made] for i in (0, 1))
    words = [turns[1] for turns, _ in made]
    cases = [(picture, _degrees(text)) for picture, text in zip(true, words, strict=True)]
    uni_rep, (width, height) = board.processor.uni_rep, true[0].size
    room = TEXT_TOKENS + uni_rep.num_tokens(*uni_rep.grid(height, width))
    ours = board.ask("restore", images=given, tile_batch_size=BATCH_SIZE, max_new_tokens=room)
    answers: dict[str, list] = {
        "trivial": [(picture, ["clearly"] * 3) for picture in given],
        "ours": [(a.picture.resize(t.size), _degrees(a.text)) for a, t in zip(ours, true, strict=True)],
        "ceiling": [(picture, None) for picture in board.through_vq(true)],
    }
    shown = [
        (f"true: {text}\nours: {a.text}", [i, t, a.picture])
        for text, i, t, a in zip(words, given, true, ours, strict=True)
    ]
    return Trials(cases, _restored, answers, SEEN, shown)


def _conversation(board: Board, task: str, record: dict, index: int) -> tuple[list[str], list[Any]]:
    return conversation(task, record, board.processor, random.Random(f"{board.seed}/{task}/{index}"))


def _degrees(text: str) -> list[str]:
    match = re.search(r"is (\w+) blurred, (\w+) noisy and (\w+) compressed", text)
    return [*match.groups()] if match else []


def _restored(case: tuple[Image.Image, list[str]], answer: tuple[Image.Image, list[str] | None]) -> metrics.Values:
    (true, degrees), (picture, said) = case, answer
    if said is None:
        return metrics.likeness(true, picture)
    right = sum(a == b for a, b in zip(degrees, said, strict=False))
    return {**metrics.likeness(true, picture), "level in words": (right, len(degrees))}


# --- two panels ------------------------------------------------------------------------------------------------------


def pair(board: Board) -> Trials:
    return _panels(board, "pair")


def panel(board: Board) -> Trials:
    return _panels(board, "panel")


def _panels(board: Board, task: str) -> Trials:
    """Answers are a picture and what the other half shows. Trivial is another case's picture."""
    target_px = PANEL_SCALE * board.processor.target_px
    width, height = size = best_bucket(*board.size, panel_sizes(board.processor, target_px))
    found = [*board.by_condition(task, size, CONDITIONS)]
    captions, true = ([record[name] for _, record in found] for name in ("caption", "image"))
    shown = [record["reference" if condition == "subject" else condition] for condition, record in found]
    words = [record["subject"] if condition == "subject" else condition for condition, record in found]
    given = shown if board.processor.tasks[task].needs_image else None
    ours = [
        (a.picture, a.panel) for a in board.ask(task, captions, given, condition=words, width=width, height=height)
    ]
    answers = {
        "trivial": [*zip(_shuffled(true), shown, strict=True)],
        "ours": ours,
        "ceiling": [*zip(board.through_vq(true), board.through_vq(shown), strict=True)],
    }
    rows = [(f"{w}: {c}", [t, s, *own]) for w, c, t, s, own in zip(words, captions, true, shown, ours, strict=True)]
    return Trials(found, _agree, answers, ("truth", "its other half", "ours", "its other half"), rows)


def _agree(case: tuple[str, dict], halves: tuple[Image.Image, Image.Image]) -> metrics.Values:
    (condition, record), (picture, other) = case, halves
    values: metrics.Values = {"caption satisfied": _satisfied(record["caption"], picture)}
    if condition == "depth":
        return values | {"mask IoU, depth": metrics.mask_iou(metrics.foreground(picture), metrics.raised(other))}
    if condition == "pose":
        return values | {"joints on the figure": metrics.joints_on_figure(other, picture)}
    return values | metrics.subject(record["subject"], halves)


SCORED: dict[str, Callable[[Board], Trials]] = {
    "text-to-image": text_to_image,
    "caption": caption,
    "vqa": vqa,
    "chat": chat,
    "depth": depth,
    "normal": normal,
    "segmentation": segmentation,
    "pose": pose,
    "detection": detection,
    "edit": edit,
    "control": control,
    "refine": refine,
    "restore": restore,
    "pair": pair,
    "panel": panel,
    "sizes": sizes,
    "curves": curves,
}
