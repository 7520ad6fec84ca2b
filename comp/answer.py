"""Ask a trained model about images.

    python -m comp.answer runs/tiny/models/III chart.png "What is the value of May?"

The folder is the export of a stage, with vision/ and language/; any number of images may come before the question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from PIL import Image

from .build import make_sample_encoder
from .cli import positive_int, print_anything
from .config import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS, ConfigError
from .data.batch import BadSampleError, Message, Sample
from .data.template import ChatTemplate
from .eval.exported import load
from .eval.vqa import generate_answers
from .limits import position_limit
from .model import CoMP


def answer(
    model: CoMP,
    template: ChatTemplate,
    images: Sequence[Image.Image | str],
    question: str,
    *,
    max_new_tokens: int = 64,
    min_visual_tokens: int = MIN_VISUAL_TOKENS,
    max_visual_tokens: int = MAX_VISUAL_TOKENS,
) -> str:
    """Greedy answer to a question about images (pictures or file names; none is fine too), at native resolution.

    min_visual_tokens, max_visual_tokens:  smaller images are scaled up, larger ones down; the images share the maximum,
        or what question and answer leave of the language model's positions where that is less.
    Raises comp.data.batch.BadSampleError for an image that cannot be read.
    """
    sample = Sample(name="question", messages=[Message(role="user", text=question, images=list(images))])
    limit = position_limit(model.language_model)
    # what text and answer leave of the positions that the language model knows
    room = limit - len(template.encode_prompt(sample.messages, [0] * len(images))) - max_new_tokens
    encoder = make_sample_encoder(
        model,
        template,
        max_text_tokens=limit,
        min_visual_tokens=min_visual_tokens,
        max_visual_tokens=max(1, min(max_visual_tokens, room)),  # the encoder says where that is too much
        answer_tokens=max_new_tokens,
    )
    device = model.adapter.fc2.weight.device
    return generate_answers(model, [encoder.encode_prompt(sample)], encoder, max_new_tokens=max_new_tokens, device=device)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a stage's export: runs/NAME/models/STAGE")
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument("question")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64)
    arguments = parser.parse_args()
    print_anything()
    try:
        model, template = load(arguments.folder)
        print(answer(model, template, arguments.images, arguments.question, max_new_tokens=arguments.max_new_tokens))
    except (ConfigError, BadSampleError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
