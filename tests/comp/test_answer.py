"""Asking an exported model about images."""

import sys

import pytest
import torch
from PIL import Image
from toy import save_toy_models, toy_config

from comp import answer
from comp.build import build_model
from comp.data.batch import BadSampleError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and the folder it was saved to."""
    root = tmp_path_factory.mktemp("answer")
    save_toy_models(root)
    model, template = build_model(toy_config(root))
    model.encoder.pos_mode = "abs+rope"
    torch.manual_seed(1)
    with torch.no_grad():  # far enough from its start that the answer depends on what it sees
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(root / "export")
    template.tokenizer.save_pretrained(root / "export" / "language")
    return model.eval(), template, root / "export"


def test_an_exported_model_answers_as_before(exported):
    model, template, folder = exported
    images = [Image.new("RGB", (40, 24), "red"), Image.new("RGB", (16, 48), "blue")]
    loaded, loaded_template = answer.load(folder)
    answers = set()
    for chosen in (images, images[:1], []):
        before = answer.answer(model, template, chosen, "What colour?", max_new_tokens=8)
        assert answer.answer(loaded, loaded_template, chosen, "What colour?", max_new_tokens=8) == before
        answers.add(before)
    assert len(answers) == 3 and all(answers)


def test_a_large_image_leaves_room_for_question_and_answer(exported):
    """1200 x 900 would be 16,875 visual tokens; the toy knows 512 positions."""
    model, template, _ = exported
    assert answer.answer(model, template, [Image.new("RGB", (1200, 900), "red")], "What colour?", max_new_tokens=4)


@pytest.mark.parametrize(("images", "question", "tokens"), [(1, "What?", 600), (0, "What? " * 300, 4), (2, "What?", 468)])
def test_what_the_positions_do_not_hold_is_named(exported, images, question, tokens):
    model, template, _ = exported
    with pytest.raises(
        BadSampleError, match=rf"question: .*(exceed max_visual_tokens 1|{tokens} of an answer exceed|max_text)"
    ):
        answer.answer(model, template, [Image.new("RGB", (40, 24))] * images, question, max_new_tokens=tokens)


def test_command_line(exported, tmp_path, monkeypatch, capsys):
    model, template, folder = exported
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    monkeypatch.setattr(
        sys, "argv", ["answer", str(folder), str(tmp_path / "red.png"), "What colour?", "--max-new-tokens", "5"]
    )
    answer.main()
    expected = answer.answer(model, template, [str(tmp_path / "red.png")], "What colour?", max_new_tokens=5)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EXPORT", "absent.png", "What?"], "image absent.png: FileNotFoundError"),
        (["nowhere", "What?"], "a model must be a folder with vision/ and language/ as a stage exports it, got nowhere"),
    ],
)
def test_mistakes_on_the_command_line(exported, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["answer", *(text.replace("EXPORT", str(exported[2])) for text in arguments)])
    with pytest.raises(SystemExit):
        answer.main()
    assert message in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named(exported, tmp_path):
    model, template, _ = exported
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(BadSampleError, match=r"broken\.png: UnidentifiedImageError"):
        answer.answer(model, template, [str(tmp_path / "broken.png")], "What colour?")
