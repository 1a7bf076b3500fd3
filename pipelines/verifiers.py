"""Inference-time scaling: what judges candidate pictures, and what enriches a prompt before they are drawn (2.0).

A verifier is any callable `(prompt, images) -> scores`: PIL images in, one number each out, higher is better. A prompt
enhancer is any callable `(prompt) -> prompt`. These are ready ones. Each loads its model when it is made, so that a
mistyped name or a missing package fails before the first picture is drawn rather than after the last.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPException
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from .places import best_device

INSTRUCTION = (
    "You write prompts for a model that draws pictures. Turn the user's prompt into one concise but more detailed "
    "description of the same picture: which objects there are and how many, their colors and materials, where each "
    "is, what is behind them, the light and the style. Keep all that the user asks for and contradict none of it. "
    "Answer with the description and nothing else."
)
MAX_NEW_TOKENS = 1024  # with what a model thinks first


class CLIPVerifier:
    """Cosine similarity, in [-1, 1], of a prompt and pictures, by CLIP, SigLIP or another model with two such towers.

    Args:
        model: folder or repo.
        device: the accelerator if there is one, else the CPU.
        dtype: the checkpoint's own if None.

    Raises:
        ValueError: if the model embeds no text or no pictures.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        device = device or best_device()
        self.model = AutoModel.from_pretrained(model, dtype=dtype or "auto").to(device).eval()
        if not all(hasattr(self.model, name) for name in ("get_text_features", "get_image_features")):
            raise ValueError(f"{model} is a {type(self.model).__name__}; accepted are models such as CLIP and SigLIP")
        self.processor = AutoProcessor.from_pretrained(model)

    @torch.no_grad()
    def __call__(self, prompt: str, images: Sequence[Image.Image]) -> list[float]:
        """One score per image. Of a long prompt the model reads as much as it has positions for."""
        reading = {  # SigLIP learned from padded text; to CLIP it is all one
            "padding": "max_length",
            "truncation": True,
            "max_length": self.model.config.text_config.max_position_embeddings,
        }
        pictures = [image.convert("RGB") for image in images]
        inputs = self.processor(text=[prompt], images=pictures, text_kwargs=reading, return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device, self.model.dtype))
        image, text = (torch.nn.functional.normalize(x.float()) for x in (outputs.image_embeds, outputs.text_embeds))
        return (image @ text.T)[:, 0].tolist()  # (images, width) @ (width, 1)


class TabletopVerifier:
    """The judge of the Tabletop world: 1 for a picture of what the sentence says, else by how much of that is there.

    It needs the packages of the `train` extra. Sizes in words are not judged.
    """

    def __init__(self):
        try:
            from modeling_lumina_mgpt.training import evaluate, tabletop
        except ModuleNotFoundError as error:
            hint = "`pip install -e '.[train]'` in this package's folder brings what the judge needs"
            raise ImportError(f"{error}; {hint}") from error

        self._parse, self._judge, self._grade = tabletop.parse, evaluate.judge, evaluate.grade

    def __call__(self, prompt: str, images: Sequence[Image.Image]) -> list[float]:
        """One score in [0, 1] per image. ValueError for a prompt that is no sentence of that world."""
        caption = self._parse(prompt)
        return [self._grade(caption, self._judge(image)) for image in images]


class ChatPromptEnhancer:
    """Has a chat model describe the same picture in more detail (2.0, thinking before generation).

    Args:
        model: folder or repo of a chat model; with `url`, the name by which the server knows it.
        url: of an OpenAI-compatible server, up to and without `/chat/completions`: `http://localhost:8000/v1`.
        timeout_s: for the whole answer.
        api_key: for the server; the environment's OPENAI_API_KEY if None. Shown in no message.

    Raises:
        ValueError: for a model without a chat template, a url that is not HTTP, a key that no header can carry.
    """

    def __init__(self, model: str, url: str | None = None, timeout_s: float = 60, api_key: str | None = None):
        self.model, self.url, self.timeout_s = model, url, timeout_s
        self._name = f"{model} at {url}" if url else model
        self._api_key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        if url is None:
            self._generate = pipeline("text-generation", model=model)
            if self._generate.tokenizer.chat_template is None:
                raise ValueError(f"{model} has no chat template; accepted is a model that was trained to chat")
        elif not re.match("https?://", url):
            raise ValueError(f"url {url!r}: accepted is one that starts with http:// or https://")
        elif not (self._api_key.isascii() and self._api_key.isprintable()):
            raise ValueError("the API key holds characters that an HTTP header cannot carry")

    def __call__(self, prompt: str) -> str:
        """The richer prompt. TimeoutError if it takes too long, RuntimeError for any other answer than a text."""
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
        answer = self._ask_server(messages) if self.url else self._ask_local(messages)
        described = answer.rpartition("</think>")[2].partition("<think>")[0].strip()  # some models think aloud first
        if not described:
            raise RuntimeError(f"{self._name} answered without a description: {self._excerpt(answer)}")
        return described

    def _ask_local(self, messages: list[dict[str, str]]) -> str:
        start = time.monotonic()
        limits = {"max_new_tokens": MAX_NEW_TOKENS, "max_time": self.timeout_s}
        answer = self._generate(messages, return_full_text=False, **limits)[0]["generated_text"]
        if time.monotonic() - start >= self.timeout_s:
            raise TimeoutError(f"{self._name} was not done after {self.timeout_s} s; so far: {self._excerpt(answer)}")
        return answer

    def _ask_server(self, messages: list[dict[str, str]]) -> str:
        data = json.dumps({"model": self.model, "messages": messages}).encode()
        request = Request(f"{str(self.url).rstrip('/')}/chat/completions", data, {"Content-Type": "application/json"})
        if self._api_key:  # not for the place that a redirect leads to
            request.add_unredirected_header("Authorization", f"Bearer {self._api_key}")
        try:
            status, body = self._send(request)
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            kind = TimeoutError if isinstance(reason, TimeoutError) else RuntimeError
            why = self._excerpt(str(reason) or "the deadline has passed")
            raise kind(f"{self._name} gave no answer within {self.timeout_s} s: {why}") from error
        with suppress(ValueError, LookupError, TypeError, AttributeError):
            if status == 200:
                return json.loads(body)["choices"][0]["message"]["content"].strip()
        received = self._excerpt(body.decode(errors="replace"))
        raise RuntimeError(f"{self._name} answered with status {status} and no chat completion: {received}")

    def _send(self, request: Request) -> tuple[int, bytes]:
        """Status and body. urllib's timeout is one of silence; here a server that dribbles is left at the deadline."""
        answer: Future[tuple[int, bytes]] = Future()

        def ask():
            try:
                try:
                    response = urlopen(request, timeout=self.timeout_s)
                except HTTPError as error:
                    response = error  # its body says why
                with response:
                    answer.set_result((response.status, response.read()))
            except Exception as error:
                answer.set_exception(error)

        Thread(target=ask, daemon=True).start()
        return answer.result(self.timeout_s)

    def _excerpt(self, received: str) -> str:
        """For messages; some servers repeat the key that they refuse."""
        return repr((received.replace(self._api_key, "***") if self._api_key else received)[:200])
