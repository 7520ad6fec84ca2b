"""One record of a LLaVA-format file as a `Sample`: what is read, what is refused by name, and what is passed over and said.

    {"id": "...", "image": "a.png" or ["a.png", "b.png"] or absent, "system": "..." or absent,
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

Optional fields for evaluation: "answers" (list of accepted answers), "question_type", "metric", "options" (texts of A, B, ...).
An answer with "weight": 0, "loss": false or "train": false, or without text, is not learned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .batch import BadSampleError, FileInFolder, LazyImage, Message, Sample, printable

IMAGE_MARKER = "<image>"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_READ = {"id", "image", "system", "conversations", "answers", "options", "question_type", "metric"}
_READ_OF_TURNS = {"from", "value", "weight", "loss", "train"}
_LEARNED = ("weight", "loss", "train")  # of an answer: OpenAI, mistral-finetune and axolotl; ms-swift; axolotl
# Other fields that say what is learned: "loss_mask", "train_detail" (axolotl), "loss_scale" (ms-swift), "masked", ...
_LEARNING_WORDS = {"weight", "weights", "loss", "train", "training", "trainable", "masked"}
_LEARNING_DETAILS = set("mask masks detail details scale on input inputs prompt response answer turn token tokens is".split())
# Where a record comes from, and what a picture is like: nothing that training could miss.
_HARMLESS = set(
    "source dataset data_source dataset_name task task_type type category split model idx index question_id image_id "
    "width height width_list height_list image_width image_height image_size language lang license".split()
)
_PICTURE_WORDS = set("image images img imgs picture pictures photo photos pixel pixels screenshot screenshots".split())
_OTHER_MEDIA = {"video", "videos", "audio", "audios", "sound", "sounds", "speech", "vision"}
_PATH_WORDS = set(
    "path paths file files filename filenames name names url urls uri src link "
    "data bytes base b raw content encoded values array tensor buffer blob".split()  # "base64" and "b64" without their digits
)
_MARK_WORDS = set("start end begin bos eos of pad token tokens soft fake around placeholder here patch context".split())
_MEDIA_OF_MARKS = _PICTURE_WORDS | _OTHER_MEDIA | {"frame", "frames", "region", "regions"}
_SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .jp2 .jxl .webp .gif .bmp .tif .tiff .heic .heif .avif .ico .tga .ppm .pgm .svg .pdf .djvu "
    ".dcm .npy .npz .mp4 .m4v .avi .mov .mkv .webm .mpg .mpeg .flv .wmv .3gp .wav .mp3 .m4a .aac .opus .flac .ogg".split()
)
_MARK = re.compile(r"<(\|?) */? *([A-Za-z][\w -]*?) */?(\|?)>|\[(?:IMG|IMAGE)S?[ _-]*\d*\]")
# Pictures as HTML and Markdown refer to them. As text they may be what is asked about, so they are only said.
_PICTURE_IN_TEXT = re.compile(r"<img\s[^>]*>|!\[[^\]]*\]\([^)]*\)", re.IGNORECASE)


def sample_from_record(
    record: Any,
    place: str,
    images: Path,
    *,
    images_anywhere: bool = False,
    pictures: Sequence[LazyImage] | None = None,
) -> Sample:
    """A `Sample` from one LLaVA record. Images stand in front of the turn that marks them; without marks, of the first turn.

    place:            of the record, file[index]; its name in messages.
    images:           folder that image names start from.
    images_anywhere:  they may be absolute or lead out of it.
    pictures:         the images themselves, for a record that names none.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadSampleError(f'{place}: needs an object with a list "conversations", got {str(record)[:80]}')
    name = f"{place} {printable(record['id'])}" if "id" in record else place
    image_names = _texts(record, "image", name)
    answers, options = _texts(record, "answers", name), _texts(record, "options", name)
    passed_over = _check_fields(record, bool(image_names), name)
    for field in ("question_type", "metric"):
        if not isinstance(record.get(field), str | None):
            raise BadSampleError(f'{name}: "{field}" must be a text or absent, got {str(record[field])[:80]}')
        _check_characters(record.get(field) or "", field, name)
    waiting: list[LazyImage] = [_image_file(image, images, name, images_anywhere) for image in image_names]
    waiting += pictures or []
    num_images = len(waiting)
    messages = []
    for turn in record["conversations"]:
        role, text = _role_and_text(turn, name)
        passed_over += _check_turn_fields(turn, name)
        num_markers = text.count(IMAGE_MARKER)
        if num_markers > len(waiting):
            raise BadSampleError(f"{name}: more {IMAGE_MARKER} markers than its {num_images} images")
        text = text.replace(IMAGE_MARKER, "").strip()
        _check_marks(text, role, name)
        if role != "assistant" and _PICTURE_IN_TEXT.search(text):
            passed_over.append("a picture that a text refers to (<img ...> or ![...](...))")
        messages.append(Message(role=role, text=text, images=waiting[:num_markers], learned=_is_learned(turn, role, name)))
        waiting = waiting[num_markers:]
    messages = _with_system_field(record.get("system"), messages, name)
    _check_turns(messages, name)
    if waiting and len(waiting) < num_images:  # which picture a marker means can only be guessed
        raise BadSampleError(
            f"{name}: fewer {IMAGE_MARKER} markers than its {num_images} images; mark all of them, or none to show them first"
        )
    first_user = next(m for m in messages if m.role == "user")
    first_user.images = waiting + first_user.images
    file = place.rpartition("[")[0] or place
    return Sample(
        name=name,
        messages=messages,
        answers=answers,
        question_type=record.get("question_type") or "all",
        metric=record.get("metric"),
        options=options,
        notes=[f"{file}: {what} is not read" for what in dict.fromkeys(passed_over)],
    )


# --- fields ------------------------------------------------------------------------------------------------------------------


def _texts(record: dict[str, Any], field: str, name: str) -> list[str]:
    """A list of texts; for "image" a single one too. Absent, null and empty are the same."""
    texts = [] if _is_nothing(record.get(field)) else record[field]
    if field == "image" and isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSampleError(f'{name}: "{field}" must be a list of texts, got {str(record[field])[:80]}')
    for text in texts:
        _check_characters(text, field, name)
    return texts


def _check_fields(record: dict[str, Any], has_image: bool, name: str) -> list[str]:
    """Names of the fields that are passed over; BadSampleError for those whose content would be missed."""
    passed_over = []
    for field, value in record.items():
        if field in _READ or _is_nothing(value):
            continue
        words = set(_words(field))
        is_media = check_media(field, value, has_image, name)
        if _says_what_is_learned(words) and not (field in _LEARNED and value in (1, True)):
            raise BadSampleError(f'{name}: "{field}" belongs to a turn, got {str(value)[:80]} for the whole record')
        if "system" in words:
            raise BadSampleError(f'{name}: a system text belongs in "system", got "{field}": {str(value)[:80]}')
        if is_media or field not in (*_HARMLESS, *_LEARNED):
            passed_over.append(f'field "{printable(field)}"')
    return passed_over


def check_media(field: str, value: Any, has_image: bool, name: str) -> bool:
    """Whether a field that nobody reads holds pictures or other media, or names files; BadSampleError where they would be
    missed."""
    words = set(_words(field))
    is_media_name = bool(words & (_PICTURE_WORDS | _OTHER_MEDIA)) and words <= _PICTURE_WORDS | _OTHER_MEDIA | _PATH_WORDS
    is_file = _looks_like_a_file(value) or (isinstance(value, bytes) and f".{field}".lower().endswith(_SUFFIXES))
    is_media = is_file or (is_media_name and not isinstance(value, bool | int | float))
    instead_of_image = bool(words & _OTHER_MEDIA) or (bool(words) and words <= _PICTURE_WORDS)
    if is_media and field not in _HARMLESS and (instead_of_image or not has_image):
        raise BadSampleError(f'{name}: pictures belong in "image" (a text or a list), got "{field}": {str(value)[:80]}')
    return is_media


def _check_turn_fields(turn: dict[str, Any], name: str) -> list[str]:
    """The same for a turn."""
    fields = [field for field, value in turn.items() if field not in _READ_OF_TURNS and not _is_nothing(value)]
    for field in fields:
        if set(_words(field)) & (_PICTURE_WORDS | _OTHER_MEDIA) or _looks_like_a_file(turn[field]):
            raise BadSampleError(
                f'{name}: pictures belong in "image" of the record (a text or a list), got "{field}" in a turn: '
                f"{str(turn[field])[:80]}"
            )
        if _says_what_is_learned(set(_words(field))) or field == "mask":
            raise BadSampleError(
                f'{name}: what is learned of a turn is said by {", ".join(_LEARNED)} (0 or 1), got "{field}": '
                f"{str(turn[field])[:80]}"
            )
    return [f'field "{printable(field)}" of a turn' for field in fields if field != "id"]


def _says_what_is_learned(words: set[str]) -> bool:
    return bool(words & _LEARNING_WORDS) and words <= _LEARNING_WORDS | _LEARNING_DETAILS


def _is_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _words(field: str) -> list[str]:
    """ "imagePath", "image-path" and "IMAGE_PATH" are image, path."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", field)]


def _looks_like_a_file(value: Any) -> bool:
    """A name with the suffix of a picture, video, sound or document; or one within a list, or an object that holds bytes."""
    if isinstance(value, str):
        path = value.partition("?")[0].lower()
        is_name = "\n" not in value and path.endswith(_SUFFIXES)
        return is_name or value.startswith(("data:image", "data:video", "data:audio"))
    if isinstance(value, dict):
        return bool(value.get("bytes")) or any(_looks_like_a_file(v) for v in value.values() if isinstance(v, str))
    return isinstance(value, list) and any(_looks_like_a_file(v) for v in value if isinstance(v, str | dict))


def _image_file(image: str, folder: Path, name: str, anywhere: bool) -> str:
    if anywhere:
        return str(folder / image)
    try:
        return FileInFolder(image, folder, "; data.images_anywhere=true allows that")
    except ValueError as error:
        raise BadSampleError(f"{name}: image {error}") from error


# --- turns -------------------------------------------------------------------------------------------------------------------


def _role_and_text(turn: Any, name: str) -> tuple[str, str]:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(turn.get("value"), str):
        raise BadSampleError(f'{name}: a turn needs "from" ({", ".join(_ROLES)}) and a text "value", got {str(turn)[:80]}')
    _check_characters(turn["value"], "value", name)
    return _ROLES[speaker], turn["value"]


def _check_characters(text: str, field: str, name: str) -> None:
    """JSON may hold halves of characters (surrogates), which no tokenizer and no file name takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f'{name}: "{field}" holds half a character at position {error.start}: {text!r:.80}') from error


def _check_marks(text: str, role: str, name: str) -> None:
    """Marks of other formats and models stand for something that would be missed. In answers only <|...|> is one: HTML has
    the others too."""
    for match in _MARK.finditer(text):
        if (role != "assistant" or (match[1] and match[3])) and _is_mark(match[2]):
            raise BadSampleError(
                f"{name}: the mark {match[0]} is not read; pictures are marked {IMAGE_MARKER}, other media are not served"
            )


def _is_mark(inside: str | None) -> bool:
    if inside is None:  # [IMG]
        return True
    words = set(_words(inside))
    return bool(words & _MEDIA_OF_MARKS) and words <= _MEDIA_OF_MARKS | _MARK_WORDS


def _is_learned(turn: dict[str, Any], role: str, name: str) -> bool:
    """False for an answer that its fields leave out."""
    given = {field: turn[field] for field in _LEARNED if turn.get(field) is not None}
    for field, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadSampleError(f'{name}: "{field}" of a turn must be 0 or 1 (false or true), got {str(value)[:80]}')
        if value and role != "assistant":
            raise BadSampleError(f'{name}: "{field}" asks to learn a turn of the {role}; only answers are learned')
    return all(given.values())


def _with_system_field(system: Any, messages: list[Message], name: str) -> list[Message]:
    """The record's own system text as the first turn."""
    if _is_nothing(system):
        return messages
    if not isinstance(system, str):
        raise BadSampleError(f'{name}: "system" must be a text or absent, got {str(system)[:80]}')
    _check_characters(system, "system", name)
    _check_marks(system, "system", name)
    if IMAGE_MARKER in system or any(m.role == "system" for m in messages):
        raise BadSampleError(f'{name}: "system" must be a text without {IMAGE_MARKER}, and the only system text')
    return [Message(role="system", text=system.strip()), *messages]


def _check_turns(messages: Sequence[Message], name: str) -> None:
    roles = [m.role for m in messages]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        raise BadSampleError(f"{name}: turns must alternate user, assistant and end with the assistant, got {roles}")
    if any(m.images for m in messages if m.role != "user"):
        raise BadSampleError(f"{name}: {IMAGE_MARKER} is only allowed in user turns")
    answers = [m for m in messages if m.role == "assistant"]
    if not any(m.text for m in answers):
        raise BadSampleError(f"{name}: every answer is empty")
    if not any(m.text and m.learned for m in answers):
        raise BadSampleError(f"{name}: no answer is learned, by their {', '.join(_LEARNED)} or for lack of text")
