"""The model for lmms-eval, against the harness's own base class, requests and registry."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image
from toy import export_toy_model

from comp.answer import answer, load
from comp.data.template import ChatTemplate

try:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelRegistryV2
except ImportError as error:
    reason = f"lmms-eval is not installed: pip install --no-deps lmms-eval loguru pytz ({error})"
    pytest.skip(reason, allow_module_level=True)

from comp.eval.lmms_adapter import CoMPForLmmsEval, manifest

SIZES = [(16, 16), (48, 24), (24, 40), (32, 32)]
DOCS = [dict(question=f"What is {i}?", images=[Image.new("RGB", size, "red")]) for i, size in enumerate(SIZES)]
DOCS.append(dict(question="Which of the two pictures in front of this is wider?", images=[DOCS[1]["images"][0]] * 2))
DOCS.append(dict(question="No picture?", images=[]))


@pytest.fixture(scope="module")
def exported(toy_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms")
    for name in ("vision", "language"):
        (folder / name).symlink_to(toy_models / name)
    return export_toy_model(folder)


@pytest.fixture(autouse=True)
def answers_as_numbers(monkeypatch):
    """An untrained model says special tokens and half characters, which text would hide: show the ids."""
    monkeypatch.setattr(ChatTemplate, "decode", lambda self, ids: " ".join(map(str, ids)))


def requests(docs=DOCS, **settings):
    settings = dict(max_new_tokens=5, temperature=0, do_sample=False) | settings
    return [
        Instance(
            request_type="generate_until",
            arguments=(doc["question"], dict(settings), lambda doc: doc["images"], i, "toy", "test"),
            idx=0,
            metadata=dict(task="toy", doc_id=i, repeats=1),
        )
        for i, doc in enumerate(docs)
    ]


def adapter(exported, docs=DOCS, **arguments):
    text = ",".join(f"{k}={v}" for k, v in dict(pretrained=exported, max_visual_tokens=64, device="cpu", **arguments).items())
    model = CoMPForLmmsEval.create_from_arg_string(text)
    model.task_dict["toy"] = {"test": docs}
    return model


def test_the_registry_of_the_harness_takes_it():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    value = re.search(r'\[project.entry-points."lmms_eval.models"\]\ncomp = "([^"]+)"', text)[1]
    payload = EntryPoint(name="comp", value=value, group="lmms_eval.models").load()
    registry = ModelRegistryV2()
    registry.register_manifest(payload())
    assert registry.get_model_class("comp") is CoMPForLmmsEval and issubclass(CoMPForLmmsEval, lmms)
    assert manifest().chat_class_path is None


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_single_questions(exported, batch_size):
    """Every image of a question is shown, and batches do not change an answer."""
    model, template = load(exported)
    settings = dict(max_new_tokens=5, min_visual_tokens=4, max_visual_tokens=64)
    expected = [answer(model, template, doc["images"], doc["question"], **settings) for doc in DOCS]
    assert adapter(exported, batch_size=batch_size).generate_until(requests()) == expected
    assert len(set(expected)) == len(expected)


def visual_tokens(model, docs, monkeypatch):
    """Visual tokens of each question as the model gets them."""
    seen = []
    inner = model.model.generate

    def generate(batch, **settings):
        seen.extend((batch.input_ids == model.model.image_token_id).sum(1).tolist())
        return inner(batch, **settings)

    monkeypatch.setattr(model.model, "generate", generate)
    model.generate_until(requests(docs))
    return seen


def test_small_images_stay_small(exported, monkeypatch):
    """A 16 x 16 image of 4 x 4 patches is four visual tokens: no minimum of 800."""
    assert visual_tokens(adapter(exported), [DOCS[0]], monkeypatch) == [4]


def test_bounds_on_visual_tokens(exported, monkeypatch):
    docs = [dict(question="q", images=[Image.new("RGB", (160, 160))] * 2)]
    assert visual_tokens(adapter(exported, min_visual_tokens=16), [DOCS[0]], monkeypatch) == [16]
    (tokens,) = visual_tokens(adapter(exported, docs), docs, monkeypatch)
    assert 32 <= tokens <= 64  # two images share the 64


def test_decoding_settings(exported):
    model = adapter(exported)
    plain = model.generate_until(requests([DOCS[0]]))[0]
    assert len(plain) > 1
    assert model.generate_until(requests([DOCS[0]], until=[plain[2:5]]))[0] == plain.split(plain[2:5])[0].strip()
    mixed = requests([DOCS[0]]) + requests([DOCS[0]], max_new_tokens=1)
    long, short = model.generate_until(mixed)
    assert long == plain and short != plain
    with pytest.raises(ValueError, match="decodes greedily"):
        model.generate_until(requests(do_sample=True))
    with pytest.raises(ValueError, match="decodes greedily"):
        model.generate_until(requests(num_beams=4))
    with pytest.warns(UserWarning, match="without effect: penalty"):
        model.generate_until(requests([DOCS[0]], penalty=2, image_aspect_ratio="original"))


def test_questions_that_cannot_be_asked(exported):
    damaged = dict(question="q", images=["/nowhere/image.png"])
    model = adapter(exported, [DOCS[0], damaged])
    with pytest.warns(UserWarning, match=r"empty text: toy\[1\]: image /nowhere/image.png"):
        answers = model.generate_until(requests([DOCS[0], damaged]))
    assert answers[0] and answers[1] == ""
    model = adapter(exported, [dict(question="q", images=[b"a clip"])])
    with pytest.raises(TypeError, match=r"toy\[0\]: the model comp takes images only, the task gives a bytes"):
        model.generate_until(requests([dict(question="q", images=[b"a clip"])]))
    with pytest.raises(NotImplementedError, match="likelihoods"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


def test_the_marker_of_an_image_is_no_text(exported):
    doc = dict(question="<image>What is 0?", images=DOCS[0]["images"])
    assert adapter(exported, [doc]).generate_until(requests([doc])) == adapter(exported).generate_until(requests([DOCS[0]]))
