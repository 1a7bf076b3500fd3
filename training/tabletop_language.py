"""What is said about Tabletop's scenes beyond one sentence: phrases, long captions, questions, edits and dialogue.

Everything said is true of the scene, and a phrase that refers to an object singles it out.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .tabletop_scenes import (
    COLORS,
    NUMBER_WORDS,
    RELATION_MARGIN,
    SHAPES,
    SIZES,
    SPACING,
    SPLITS,
    SURFACES,
    TABLES,
    Scene,
    SceneObject,
    describe,
    fits,
    join_phrases,
    left_to_right,
    noun_phrase,
    split_of,
    split_of_sentence,
)

STEP = {"x": 2 * SPACING["x"], "z": SPACING["z"]}  # table units that an object is moved by
RELATIONS = {"left of": ("x", -1), "right of": ("x", 1), "in front of": ("z", -1), "behind": ("z", 1)}


def stands(a: SceneObject, relation: str, b: SceneObject, clearly: bool = True) -> bool:
    """Whether `a` stands so to `b`; `clearly`, so far that a sentence may say it."""
    axis, sign = RELATIONS[relation]
    return sign * (getattr(a, axis) - getattr(b, axis)) > (RELATION_MARGIN[axis] if clearly else 0.0)


# --- phrases ---------------------------------------------------------------------------------------------------------


ENDS = {
    "left of": ("on the left", "leftmost"),
    "right of": ("on the right", "rightmost"),
    "in front of": ("in front", "nearest"),
    "behind": ("in the back", "farthest"),
}


def referring_phrases(scene: Scene, index: int, max_words: int = 9) -> list[str]:
    """All phrases ("the red cube", "the small one on the left", "the cone behind the cube") for one object alone."""
    target, others = scene.objects[index], [o for i, o in enumerate(scene.objects) if i != index]
    plain = [_name(*words) for words in _descriptions(target) if not any(_suits(o, *words) for o in others)]
    placed = []
    for shape, color, size in _descriptions(target):
        alike = [o for o in others if _suits(o, shape, color, size)]
        if not alike or size:
            continue
        name = _name(shape, color, size)
        for relation, (end, superlative) in ENDS.items():
            if all(stands(target, relation, o) for o in alike):
                placed += [f"{name} {end}", name.replace("the ", f"the {superlative} ")]
        for other in others:
            anchor = (other.shape, other.color, None)
            if sum(_suits(o, *anchor) for o in scene.objects) > 1:
                continue
            for relation in RELATIONS:
                rivals = (o for o in alike if o is not other)
                if stands(target, relation, other) and not any(stands(o, relation, other, False) for o in rivals):
                    placed.append(f"{name} {relation} {_name(*anchor)}")
    return [phrase for phrase in plain + placed if len(phrase.split()) <= max_words]


def refer(scene: Scene, index: int, rng: random.Random) -> str | None:
    """One of these phrases, short ones more often; None if there is none."""
    phrases = sorted(referring_phrases(scene, index), key=len)
    return rng.choice(phrases[: rng.choice((3, len(phrases)))]) if phrases else None


def _descriptions(o: SceneObject) -> Iterator[tuple[str | None, str | None, str | None]]:
    for shape in (o.shape, None):
        for color in (o.color, None):
            for size in (None, o.size):
                yield shape, color, size


def _suits(o: SceneObject, shape: str | None, color: str | None, size: str | None) -> bool:
    return shape in (None, o.shape) and color in (None, o.color) and size in (None, o.size)


def _name(shape: str | None, color: str | None, size: str | None) -> str:
    return "the " + " ".join(word for word in (size, color, shape or "object") if word)


# --- captions --------------------------------------------------------------------------------------------------------


def describe_with_mannequin(scene: Scene, rng: random.Random, split: str) -> str:
    """A sentence as of `describe`, which a mannequin's pose opens if there is one. ValueError as there."""
    if scene.mannequin is None:
        return describe(scene, rng, split).text
    objects = join_phrases([noun_phrase((1, o.shape, o.color, None)) for o in scene.objects])
    sentences = [f"a mannequin {scene.mannequin.pose}{word} {objects}" for word in (" beside", " next to", " and")]
    sentences = [s + end for s in sentences for end in ("", ".", f" on a {scene.table} table")]
    fitting = [s for s in sentences if split_of_sentence(s) == split]
    if not fitting:
        raise ValueError(f"the scene has no sentence in the {split} split")
    return rng.choice(fitting)


def describe_at_length(scene: Scene, rng: random.Random, split: str) -> str:
    """Several sentences: how many objects, each with where it is, then the table and the wall."""
    for _ in range(100):
        text = " ".join([*_opening(scene, rng), *_placed_objects(scene, rng), *_surroundings(scene, rng)])
        if split_of_sentence(text) == split:
            return text
    raise ValueError(f"the scene has no description in the {split} split")


def _opening(scene: Scene, rng: random.Random) -> list[str]:
    count = len(scene.objects)
    if count == 1:
        return []
    counted = f"{NUMBER_WORDS[count]} objects"
    sentences = f"There are {counted} on a table.", f"The image shows {counted}.", f"One can see {counted}."
    return [rng.choice(sentences)]


def _placed_objects(scene: Scene, rng: random.Random) -> Iterator[str]:
    """From left to right, each by its place beside the one before."""
    first, *others = scene.objects
    is_leftmost = others and all(stands(first, "left of", o) for o in others)
    opening = "On the left is" if is_leftmost else rng.choice(("There is", "The image shows", "One can see"))
    yield f"{opening} {_full_phrase(first)}."
    for previous, o in pairwise(scene.objects):
        place = rng.choice([relation for relation in RELATIONS if stands(o, relation, previous)])
        phrase = _full_phrase(o)
        place = f"to the {place}" if place in ("left of", "right of") else place
        before = _name(previous.shape, previous.color, None)
        is_alone = sum(_suits(other, previous.shape, previous.color, None) for other in scene.objects) == 1
        if rng.random() < 0.5 or not is_alone:
            yield f"{place.capitalize()} it is {phrase}."
        else:
            yield f"{phrase.capitalize()} {rng.choice(('is', 'stands'))} {place} {before}."


def _full_phrase(o: SceneObject) -> str:
    """With the surface, unless it is the common one."""
    return noun_phrase((1, o.shape, o.color, o.size), None if o.surface == "matte" else o.surface)


def _surroundings(scene: Scene, rng: random.Random) -> Iterator[str]:
    yield rng.choice((f"The table is {scene.table}.", f"It is a {scene.table} table."))
    yield f"The wall is {('white', 'gray')[scene.wall]}."


# --- questions -------------------------------------------------------------------------------------------------------


def questions(scene: Scene, kind: str) -> dict[str, list[str]]:
    """All questions of one of the `QUESTIONS`, by their answer."""
    asked: dict[str, list[str]] = {}
    for question, answer in QUESTIONS[kind](scene):
        asked.setdefault(answer, []).append(question)
    return asked


def sample_question(scene: Scene, kind: str, rng: random.Random, answer: str | None = None) -> tuple[str, str] | None:
    """A question of a kind and its answer, the given one or each as likely; None if the scene allows none."""
    asked = questions(scene, kind)
    if not asked or answer not in (None, *asked):
        return None
    answer = answer or rng.choice(sorted(asked))
    return rng.choice(asked[answer]), answer


def _how_many(scene: Scene) -> Iterator[tuple[str, str]]:
    objects = scene.objects
    yield "How many objects are there?", NUMBER_WORDS[len(objects)]
    for shape in SHAPES:
        yield f"How many {shape}s are there?", NUMBER_WORDS[sum(o.shape == shape for o in objects)]
    for color in COLORS:
        yield f"How many {color} objects are there?", NUMBER_WORDS[sum(o.color == color for o in objects)]
    for surface in SURFACES:
        yield f"How many {surface} objects are there?", NUMBER_WORDS[sum(o.surface == surface for o in objects)]


def _singled_out(scene: Scene, *kept: str) -> Iterator[tuple[str, SceneObject]]:
    """Names of objects that speak of nothing but what is in `kept`."""
    for o in scene.objects:
        words = tuple(getattr(o, name) if name in kept else None for name in ("shape", "color", "size"))
        if any(words) and sum(_suits(other, *words) for other in scene.objects) == 1:
            yield _name(*words), o


def _what_color(scene: Scene) -> Iterator[tuple[str, str]]:
    for kept in (("shape",), ("shape", "size"), ("size",)):
        for name, o in _singled_out(scene, *kept):
            yield f"What color is {name}?", o.color


def _what_shape(scene: Scene) -> Iterator[tuple[str, str]]:
    for kept in (("color",), ("color", "size"), ("size",)):
        for name, o in _singled_out(scene, *kept):
            yield f"What shape is {name}?", o.shape


def _what_surface(scene: Scene) -> Iterator[tuple[str, str]]:
    for kept in (("shape",), ("color",), ("color", "shape"), ("size",)):
        for name, o in _singled_out(scene, *kept):
            yield f"What surface does {name} have?", o.surface


def _is_there(scene: Scene) -> Iterator[tuple[str, str]]:
    held = {(o.shape, o.color) for o in scene.objects}
    near = {(s, c) for s, c in ((s, c) for s in SHAPES for c in COLORS) if any(s == a or c == b for a, b in held)}
    for shape, color in sorted(near):  # for no, too, something that is half right
        yield f"Is there {noun_phrase((1, shape, color, None))}?", "yes" if (shape, color) in held else "no"
    for shape in SHAPES:
        yield f"Is there {noun_phrase((1, shape, None, None))}?", "yes" if shape in {s for s, _ in held} else "no"


def _what_is_where(scene: Scene) -> Iterator[tuple[str, str]]:
    for name, o in _singled_out(scene, "shape", "color") if len(scene.objects) > 1 else ():
        others = [other for other in scene.objects if other is not o]
        for relation in RELATIONS:
            found = [other for other in others if stands(other, relation, o, clearly=False)]
            if len(found) <= 1 and all(stands(other, relation, o) for other in found):
                answer = noun_phrase((1, found[0].shape, found[0].color, None)) if found else "nothing"
                yield f"What is {relation} {name}?", answer


def _compare(scene: Scene) -> Iterator[tuple[str, str]]:
    counts = {shape: sum(o.shape == shape for o in scene.objects) for shape in SHAPES}
    for a in SHAPES:
        for b in SHAPES:
            if a != b and counts[a] + counts[b]:
                yield f"Are there more {a}s than {b}s?", "yes" if counts[a] > counts[b] else "no"
                yield f"Are there as many {a}s as {b}s?", "yes" if counts[a] == counts[b] else "no"


def _which_is_larger(scene: Scene) -> Iterator[tuple[str, str]]:
    named = [*_singled_out(scene, "shape"), *_singled_out(scene, "shape", "color")]
    for name_a, a in named:
        for name_b, b in named:
            if a.size != b.size and (len(name_a.split()) == len(name_b.split())):
                large, small = (name_a, name_b) if a.radius > b.radius else (name_b, name_a)
                yield f"Which is larger, {name_a} or {name_b}?", large
                yield f"Which is smaller, {name_a} or {name_b}?", small


QUESTIONS: dict[str, Callable[[Scene], Iterator[tuple[str, str]]]] = {
    "how many": _how_many,
    "what color": _what_color,
    "what shape": _what_shape,
    "what surface": _what_surface,
    "is there": _is_there,
    "what is where": _what_is_where,
    "compare": _compare,
    "which is larger": _which_is_larger,
}
ANSWERS: dict[str, Sequence[str]] = {  # of the kinds that have always the same
    "how many": NUMBER_WORDS,
    "what color": [*COLORS],
    "what shape": SHAPES,
    "what surface": [*SURFACES],
    "is there": ("yes", "no"),
    "compare": ("yes", "no"),
}


# --- edits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One step of a program: what is said, the scene after it, and its kind."""

    kind: str
    instruction: str
    scene: Scene


def sample_edits(
    scene: Scene, rng: random.Random, width_px: int, height_px: int, kinds: Sequence[str], split: str = "test"
) -> list[Edit] | None:
    """A program of one or several edits in a row, each of a scene that the one before leaves; None if one fails.

    Args:
        kinds: one of `EDITS` for each turn.
        split: an edit of "train" leads to none of the other splits' scenes, and one of "validation" to none of "test".
    """
    edits: list[Edit] = []
    for kind in kinds:
        edit = _sample_edit(kind, edits[-1].scene if edits else scene, rng, width_px, height_px, split)
        if edit is None:
            return None
        words = edit.instruction
        if edits and rng.random() < 0.3:
            words = rng.choice(("Now ", "Then ")) + words[0].lower() + words[1:]
        edits.append(replace(edit, instruction=words))
    return edits


def _sample_edit(
    kind: str, scene: Scene, rng: random.Random, width_px: int, height_px: int, split: str
) -> Edit | None:
    allowed = {"train": ("train",), "validation": ("train", "validation")}.get(split, SPLITS)
    for _ in range(24):
        found = EDITS[kind](scene, rng, width_px, height_px)
        if found is None:
            continue
        words, objects = found
        after = replace(scene, objects=left_to_right(objects))
        if split_of(after) in allowed and _all_fit(after, width_px, height_px):
            return Edit(kind, words, after)
    return None


def _all_fit(scene: Scene, width_px: int, height_px: int) -> bool:
    objects = scene.objects
    return all(fits(o, objects[:i] + objects[i + 1 :], width_px, height_px) for i, o in enumerate(objects))


def _chosen(scene: Scene, rng: random.Random) -> tuple[str, SceneObject, tuple[SceneObject, ...]] | None:
    """A phrase, the object that it means, and the others."""
    index = rng.randrange(len(scene.objects))
    phrase = refer(scene, index, rng)
    return (phrase, scene.objects[index], scene.objects[:index] + scene.objects[index + 1 :]) if phrase else None


def _remove(scene: Scene, rng: random.Random, width_px: int, height_px: int):
    if len(scene.objects) < 2 or not (chosen := _chosen(scene, rng)):
        return None
    name, _, others = chosen
    words = rng.choice(("Remove {}.", "Remove {}.", "Take away {}.", "Delete {}.", "Take {} off the table."))
    return words.format(name), others


def _add(scene: Scene, rng: random.Random, width_px: int, height_px: int):
    """Beside, before or behind an object, as near as there is a place for it, so that there is one right place."""
    if len(scene.objects) > 3 or not (chosen := _chosen(scene, rng)):
        return None
    name, anchor, _ = chosen
    shape, color, size = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(list(SIZES))
    surface = rng.choice((None, None, "metal", "wooden"))
    word = rng.choice(list(RELATIONS))
    axis, sign = RELATIONS[word]
    for steps in range(1, 5):
        place = {axis: getattr(anchor, axis) + sign * steps * SPACING[axis]}
        added = replace(anchor, shape=shape, color=color, size=size, surface=surface or "matte", **place)
        if fits(added, [anchor], width_px, height_px):
            break
    phrase = noun_phrase((1, shape, color, size), surface)
    words = rng.choice(("Add {} {} {}.", "Put {} {} {}.", "Place {} {} {}."))
    side = word if word in ("in front of", "behind") else rng.choice((word, f"to the {word}"))
    return words.format(phrase, side, name), (*scene.objects, added)


def _recolor(scene: Scene, rng: random.Random, width_px: int, height_px: int):
    if not (chosen := _chosen(scene, rng)):
        return None
    name, target, others = chosen
    color = rng.choice([c for c in COLORS if c != target.color])
    words = rng.choice(("Make {} {}.", "Make {} {}.", "Paint {} {}.", "Change the color of {} to {}.", "Turn {} {}."))
    return words.format(name, color), (*others, replace(target, color=color))


def _resize(scene: Scene, rng: random.Random, width_px: int, height_px: int):
    if not (chosen := _chosen(scene, rng)):
        return None
    name, target, others = chosen
    size = next(s for s in SIZES if s != target.size)
    word = "larger" if size == "large" else "smaller"
    verb = "Enlarge" if size == "large" else "Shrink"
    return rng.choice((f"Make {name} {word}.", f"Make {name} {size}.", f"{verb} {name}.")), (
        *others,
        replace(target, size=size),
    )


def _move(scene: Scene, rng: random.Random, width_px: int, height_px: int):
    if not (chosen := _chosen(scene, rng)):
        return None
    name, target, others = chosen
    where, x, z = rng.choice(
        (
            ("to the left", -STEP["x"], 0.0),
            ("to the right", STEP["x"], 0.0),
            (rng.choice(("closer", "to the front")), 0.0, -STEP["z"]),
            (rng.choice(("farther away", "to the back")), 0.0, STEP["z"]),
        )
    )
    words = rng.choice(("Move {} {}.", "Move {} {}.", "Push {} {}.", "Shift {} {}."))
    return words.format(name, where), (*others, replace(target, x=target.x + x, z=target.z + z))


def _swap(scene: Scene, rng: random.Random, width_px: int, height_px: int):
    if len(scene.objects) < 2:
        return None
    i, j = sorted(rng.sample(range(len(scene.objects)), 2))
    a, b = scene.objects[i], scene.objects[j]
    names = refer(scene, i, rng), refer(scene, j, rng)
    if a.combination == b.combination or None in names:
        return None
    words = rng.choice(("Swap {} and {}.", "Exchange {} and {}.", "Let {} and {} change places."))
    others = tuple(o for k, o in enumerate(scene.objects) if k not in (i, j))
    return words.format(*names), (*others, replace(a, x=b.x, z=b.z), replace(b, x=a.x, z=a.z))


EDITS = {"remove": _remove, "add": _add, "recolor": _recolor, "resize": _resize, "move": _move, "swap": _swap}


# --- dialogue --------------------------------------------------------------------------------------------------------


def sample_dialogue(rng: random.Random, split: str) -> list[tuple[str, str]]:
    """One to three questions in words alone, with their answers; no question is in two splits."""
    turns: list[tuple[str, str]] = []
    num_turns = rng.choice((1, 1, 2, 3))
    while len(turns) < num_turns:
        question, answer = rng.choice(DIALOGUES)(rng)
        if split_of_sentence(question) == split and question not in {q for q, _ in turns}:
            turns.append((question, answer))
    return turns


def _number(rng: random.Random) -> str:
    """A whole number, or one with one or two decimal places."""
    places = rng.choice((0, 0, 1, 2))
    whole = rng.randint(0, 20 if places else 100)
    return f"{whole}.{rng.randint(1, 10**places - 1):0{places}d}" if places else str(whole)


def _compare_numbers(rng: random.Random) -> tuple[str, str]:
    a = _number(rng)
    b = _number(rng) if rng.random() < 0.5 else f"{a.partition('.')[0]}.{rng.randint(1, 99)}"
    if float(a) == float(b):
        return _compare_numbers(rng)
    large, small = (a, b) if float(a) > float(b) else (b, a)
    form = rng.randrange(4)
    if form == 3:
        return f"Is {a} less than {b}?", "Yes." if float(a) < float(b) else "No."
    word = ("bigger", "larger", "smaller")[form]
    return f"Which is {word}? {a} or {b}", small if word == "smaller" else large


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if rng.random() < 0.5:
        return f"What is {a} + {b}?", str(a + b)
    return f"What is {max(a, b)} - {min(a, b)}?", str(abs(a - b))


def _counting_story(rng: random.Random) -> tuple[str, str]:
    shape, other = rng.sample(SHAPES, 2)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if rng.random() < 0.5:
        return f"There are {a} {shape}s and {b} {other}s on a table. How many objects are there?", str(a + b)
    left, taken = sorted((a, b))[::-1] if a != b else (a + 1, b)
    return f"There are {left} {shape}s on a table. {taken} of them are removed. How many are left?", str(left - taken)


def _told_scene(rng: random.Random) -> tuple[str, str]:
    """A question about a scene in words."""
    a, b, c = (noun_phrase((1, s, rng.choice(list(COLORS)), None)) for s in rng.sample(SHAPES, 3))
    word, back = rng.choice((("left of", "right of"), ("in front of", "behind")))
    short = {phrase: "the " + phrase.split()[-1] for phrase in (a, b, c)}
    told = f"{a.capitalize()} is {word} {b}."
    form = rng.randrange(4)
    if form == 0:
        return f"{told} What is {back} {short[a]}?", f"{b.capitalize()}."
    if form == 1:
        return f"{told} What color is {short[b]}?", f"{b.split()[1].capitalize()}."
    first, second = rng.sample((a, b, c) if form == 2 else (a, b), 2)
    if form == 2:
        told = f"{told} {short[b].capitalize()} is {word} {c}."
    holds = (a, b, c).index(first) < (a, b, c).index(second)
    return f"{told} Is {short[first]} {word} {short[second]}?", "Yes." if holds else "No."


def _about_the_world(rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(SHAPES)
    return rng.choice(
        (
            (f"What is a {shape}?", f"A {shape} is {FACTS[shape]}."),
            (f"Does a {shape} roll?", "No." if shape == "cube" else "Yes."),
            (f"Does a {shape} have corners?", "Yes." if shape == "cube" else "No."),
            ("Which shapes do you know?", f"{join_phrases([s + 's' for s in SHAPES]).capitalize()}."),
            ("Which colors do you know?", f"{join_phrases(list(COLORS)).capitalize()}."),
            ("Which tables do you know?", f"{join_phrases(list(TABLES)).capitalize()} ones."),
            ("Hello!", "Hello! What shall I draw?"),
            ("Who are you?", "I am a small model that draws solids on a table."),
            ("What can you do?", "I draw, describe and edit pictures of solids on a table."),
            ("Thank you!", "You are welcome."),
        )
    )


FACTS = {
    "sphere": "round on all sides, like a ball",
    "cube": "a box with six square sides",
    "cylinder": "round, with a flat top and a flat base",
    "cone": "round at its base and pointed at its top",
}
DIALOGUES: Sequence[Callable[[random.Random], tuple[str, str]]] = (
    *(_compare_numbers, _compare_numbers, _arithmetic, _arithmetic, _counting_story, _told_scene, _about_the_world),
)
