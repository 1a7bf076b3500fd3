"""Verifiers score every picture as their judges do; an enhancer returns a description or says why there is none."""

import json
import random
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from helpers import random_picture
from modeling_lumina_mgpt.pipelines.verifiers import ChatPromptEnhancer, CLIPVerifier, TabletopVerifier
from modeling_lumina_mgpt.training.tabletop import describe, render, sample_scene, to_image

NUM_POSITIONS, SIZE = 24, {"height": 32, "width": 32}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
KEY = "sk-secret"


@pytest.fixture
def images() -> list[Image.Image]:
    return [random_picture(56, 40), random_picture(56, 40, 1).convert("RGBA"), Image.new("L", (64, 30))]


# --- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["clip", "siglip"])
def clip_folder(request, tiny_tokenizer, tmp_path):
    text = {**TOWER, "vocab_size": len(tiny_tokenizer), "max_position_embeddings": NUM_POSITIONS}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE), tiny_tokenizer)
    else:
        model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision))
        processor = SiglipProcessor(SiglipImageProcessorPil(size=SIZE), tiny_tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_scores_are_the_models_own_cosines(clip_folder, images):
    verifier = CLIPVerifier(str(clip_folder), device="cpu")
    scores = verifier("a red sphere", images)
    ids = verifier.processor.tokenizer("a red sphere", padding="max_length", max_length=NUM_POSITIONS)
    pixels = [verifier.processor.image_processor(i.convert("RGB"), return_tensors="pt").pixel_values for i in images]
    with torch.no_grad():
        text = verifier.model.get_text_features(**{k: torch.tensor([v]) for k, v in ids.items()}).pooler_output
        pictures = [verifier.model.get_image_features(p).pooler_output for p in pixels]
    expected = [torch.cosine_similarity(text, picture).item() for picture in pictures]
    assert scores == pytest.approx(expected, abs=1e-5) and len(set(scores)) == 3
    assert verifier("two blue cubes", images) != scores


def test_a_long_prompt_is_read_as_far_as_there_are_positions(clip_folder, images):
    verifier = CLIPVerifier(str(clip_folder), device="cpu", dtype=torch.bfloat16)
    scores = verifier("sphere " * 500, images)
    assert len(scores) == 3 and all(-1 <= score <= 1 for score in scores)
    assert scores == verifier("sphere " * 500 + "cube", images)


def test_a_model_that_sees_nothing_is_no_verifier(tmp_path):
    BertModel(BertConfig(vocab_size=8, **TOWER)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertModel"):
        CLIPVerifier(str(tmp_path))


# --- Tabletop --------------------------------------------------------------------------------------------------------


def test_a_true_render_scores_one_for_its_own_sentence_and_less_for_another():
    rngs = [random.Random(i) for i in range(4)]
    scenes = [sample_scene(rng, 64, 64, num_objects=3) for rng in rngs]
    captions = [describe(scene, rng, "any") for scene, rng in zip(scenes, rngs, strict=True)]
    rendered = [to_image(rgb) for rgb in render(scenes, 64, 64).rgb]
    verifier = TabletopVerifier()
    scores = np.array([verifier(caption.text, rendered) for caption in captions])  # (sentences, pictures)
    assert ((scores == 1) == np.eye(4, dtype=bool)).all() and scores.min() >= 0 and scores.max() == 1


def test_a_sentence_of_another_world_is_refused(images):
    with pytest.raises(ValueError, match="a dog on a sofa"):
        TabletopVerifier()("a dog on a sofa", images)


# --- the enhancer ----------------------------------------------------------------------------------------------------


@contextmanager
def chat_server(status: int, body: bytes, delay_s: float = 0.0, location: str = ""):
    """A server that gives one answer, byte by byte if with a delay; yields its url and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, self.headers.get("Authorization"), content))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if location:
                self.send_header("Location", location)
            self.end_headers()
            for i in range(0, len(body), 1 if delay_s else len(body)):
                time.sleep(delay_s)
                self.wfile.write(body[i : i + (1 if delay_s else len(body))])

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that has gone is no error here
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()


def completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_server_is_asked_as_openai_has_it(slash, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with chat_server(200, completion("<think>\nA dog.\n</think>\n A wet dog. \n")) as (url, asked):
        assert ChatPromptEnhancer("tiny", url + slash)("a dog") == "A wet dog."
    ((path, authorization, content),) = asked
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert json.loads(content)["model"] == "tiny"
    assert [m["role"] for m in json.loads(content)["messages"]] == ["system", "user"]
    assert json.loads(content)["messages"][1]["content"] == "a dog"


@pytest.mark.parametrize(
    "status, body, complaint",
    [
        (500, b'{"error": "out of memory"}', "status 500.*out of memory"),
        (401, f"no such key: {KEY}".encode(), "status 401.*no such key: \\*\\*\\*"),
        (200, b"<html>", "no chat completion: '<html>'"),
        (200, b"[]", "no chat completion"),
        (200, b'{"choices": []}', "no chat completion"),
        (200, completion(None), "no chat completion"),
        (200, b"\xff", "no chat completion"),
        (200, b"", "no chat completion"),
        (200, completion(" \n"), "without a description"),
        (200, completion(f"<think> so {KEY}"), "without a description.*<think> so \\*\\*\\*"),
    ],
)
def test_a_bad_answer_is_named_and_the_key_is_not(status, body, complaint):
    with chat_server(status, body) as (url, _), pytest.raises(RuntimeError, match=complaint) as caught:
        ChatPromptEnhancer("tiny", url, api_key=KEY)("a dog")
    assert f"tiny at {url}" in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.parametrize("delay_s", [0.1, 2.0])  # dribbling, and silent
def test_a_slow_server_is_a_timeout(delay_s):
    complaint = "tiny at .*/v1 gave no answer within 0.3 s"
    with chat_server(200, completion("A wet dog."), delay_s) as (url, _), pytest.raises(TimeoutError, match=complaint):
        ChatPromptEnhancer("tiny", url, timeout_s=0.3)("a dog")


def test_no_server_is_named_too():
    with pytest.raises(RuntimeError, match=r"tiny at http://127\.0\.0\.1:9/v1 gave no answer.*refused"):
        ChatPromptEnhancer("tiny", "http://127.0.0.1:9/v1")("a dog")


def test_a_redirect_does_not_get_the_key():
    with chat_server(200, completion("A wet dog.")) as (url, asked), chat_server(302, b"", location=url) as (moved, _):
        assert ChatPromptEnhancer("tiny", moved, api_key=KEY)("a dog") == "A wet dog."
    assert asked[0][1] is None


@pytest.mark.parametrize("arguments", [{"url": "file:///etc"}, {"url": "http://a", "api_key": "sk\n-secret"}])
def test_bad_arguments_are_refused_when_the_enhancer_is_made(arguments):
    with pytest.raises(ValueError) as caught:
        ChatPromptEnhancer("tiny", **arguments)
    assert "secret" not in str(caught.value)


@pytest.fixture
def chat_folder(tiny_tokenizer, tmp_path):
    """A tiny random chat model, whose template is the turns' text alone."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), num_key_value_heads=2, eos_token_id=None, **TOWER)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    return tmp_path


def test_a_local_model_answers_with_what_it_writes_alone(chat_folder, monkeypatch):
    monkeypatch.setattr("modeling_lumina_mgpt.pipelines.verifiers.MAX_NEW_TOKENS", 8)
    enhance = ChatPromptEnhancer(str(chat_folder))
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        answers.append(enhance("a dog"))
    assert answers[0] and answers[0] == answers[1] and "a dog" not in answers[0]


def test_a_slow_local_model_is_a_timeout(chat_folder):
    with pytest.raises(TimeoutError, match=re.escape(str(chat_folder))):
        ChatPromptEnhancer(str(chat_folder), timeout_s=0.05)("a dog")


def test_a_model_without_a_chat_template_is_refused(chat_folder):
    (chat_folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        ChatPromptEnhancer(str(chat_folder))
