"""A trained CoMP model for the public evaluation harness lmms-eval, under the model name "comp".

    pip install lmms-eval
    python -m lmms_eval --model comp --model_args pretrained=runs/mine/models/III --tasks docvqa_val,mmmu_val --batch_size 16

The harness finds it by the entry point "lmms_eval.models" of this package. Images are read at native size between
`min_visual_tokens` and `max_visual_tokens`, and every image of a question is shown; the authors' released adapter scales small
images up to 800 tokens and shows the first image alone.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from ..build import longest_answer, question_encoder
from ..config import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS
from ..data.batch import BadSampleError, LazyImage, Message, Sample
from ..data.encode import SampleEncoder
from ..data.packing import EncodedSample
from ..data.records import IMAGE_MARKER
from .exported import load
from .vqa import generate_answers

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

DEFAULT_ANSWER_TOKENS = 1024  # as the authors' released adapter, where a task sets no limit
# Settings of tasks that do not change greedy decoding, or (image_aspect_ratio) are meant for other models.
_WITHOUT_EFFECT = {"temperature", "top_p", "top_k", "do_sample", "num_beams", "image_aspect_ratio"}


def manifest() -> ModelManifest:
    """What the entry point gives to the harness."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="comp", simple_class_path=f"{__name__}.CoMPForLmmsEval")


class CoMPForLmmsEval(lmms):
    """Greedy answers of the model that a stage exported.

    Args:
        pretrained:  folder with vision/ and language/, runs/NAME/models/STAGE.
        device:  default: the GPU of this process (LOCAL_RANK), else the CPU.
        batch_size:  questions answered at a time; answers do not depend on it.
        min_visual_tokens:  smaller images are scaled up.
        max_visual_tokens:  of a question, shared by its images.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int = 1,
        min_visual_tokens: int = MIN_VISUAL_TOKENS,
        max_visual_tokens: int = MAX_VISUAL_TOKENS,
    ) -> None:
        super().__init__()
        if device in (None, "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.batch_size = int(batch_size)
        self.visual_tokens = dict(min_visual_tokens=int(min_visual_tokens), max_visual_tokens=int(max_visual_tokens))
        self.model, self.template = load(pretrained)
        self.model.to(self.device)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One answer per request, in order. A question that cannot be asked gets an empty answer, and a warning."""
        answers = [""] * len(requests)
        for members in self._batches(requests):
            max_new_tokens, stops = _decoding(requests[members[0]].args[1])
            max_new_tokens = min(max_new_tokens, longest_answer(self.model))
            encoder = question_encoder(self.model, self.template, answer_tokens=max_new_tokens, **self.visual_tokens)
            prompts = {index: prompt for index in members if (prompt := self._encode(requests[index], encoder)) is not None}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                texts = generate_answers(
                    self.model, list(prompts.values()), encoder, max_new_tokens=max_new_tokens, device=self.device
                )
            for index, text in zip(prompts, texts):
                answers[index] = _until(text, stops)
            for index in members:
                context, settings, *_ = requests[index].args
                self.cache_hook.add_partial("generate_until", (context, settings), answers[index])
        return answers

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Indices of requests with equal decoding settings, long questions first."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(request.args[1])].append(index)
        for group in groups.values():
            group.sort(key=lambda index: -len(requests[index].args[0]))
            for begin in range(0, len(group), self.batch_size):
                yield group[begin : begin + self.batch_size]

    def _encode(self, request: Instance, encoder: SampleEncoder) -> EncodedSample | None:
        context, _, doc_to_visual, doc_id, task, split = request.args
        images = _images(doc_to_visual, self.task_dict[task][split][doc_id], f"{task}[{doc_id}]")
        message = Message(role="user", text=context.replace(IMAGE_MARKER, ""), images=images)
        try:
            return encoder.encode_prompt(Sample(name=f"{task}[{doc_id}]", messages=[message]))
        except BadSampleError as error:
            warnings.warn(f"answered with an empty text: {error}", stacklevel=2)
            return None

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("the model comp generates answers; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("the model comp answers single questions; tasks of several rounds are not supported")


def _images(doc_to_visual: Callable[[Any], Any], doc: Any, name: str) -> list[LazyImage]:
    """Pictures or file names of images; a task may give none, one, a list, or a list within a list."""
    visuals = doc_to_visual(doc) if doc_to_visual is not None else None
    visuals = [] if visuals is None else visuals if isinstance(visuals, list) else [visuals]
    if len(visuals) == 1 and isinstance(visuals[0], list):
        visuals = visuals[0]
    for visual in visuals:
        if not isinstance(visual, str | Image.Image):
            raise TypeError(f"{name}: the model comp takes images only, the task gives a {type(visual).__name__}")
    return visuals


def _decoding(settings: dict[str, Any]) -> tuple[int, list[str]]:
    """(longest answer in tokens, texts that end an answer) of a task's generation settings; they must be greedy."""
    if settings.get("do_sample") or (settings.get("num_beams") or 1) > 1:
        raise ValueError(f"the model comp decodes greedily; the task asks for sampling or beams: {settings}")
    unknown = set(settings) - _WITHOUT_EFFECT - {"max_new_tokens", "until"}
    if unknown:
        warnings.warn(f"generation settings without effect: {', '.join(sorted(unknown))}", stacklevel=2)
    stops = settings.get("until") or []
    return int(settings.get("max_new_tokens") or DEFAULT_ANSWER_TOKENS), [stops] if isinstance(stops, str) else list(stops)


def _until(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text.strip()
