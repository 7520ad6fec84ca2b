"""patch_transformers on a small random tower of every family: same outputs, same gradients, clear refusals."""

import ast
import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from parity import check_parity, randomize
from transformers_towers import BLOCKS, HAS_LATER_TOWERS, SIZE, TOWERS, installed

from comp_kernels.integrations import UnsupportedCall, patch_transformers, register_attention, unpatch
from comp_kernels.integrations._padded import blocks_of, padded_attention
from comp_kernels.integrations.transformers import FAMILIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TOWERS)
def test_outputs_and_gradients(name, dtype, monkeypatch):
    check_parity(TOWERS[name](), patch_transformers, dtype, monkeypatch)


def attention_class(name: str) -> type | None:
    """None: the installed transformers does not have the model."""
    module, cls = name.split(".")
    return (
        getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), cls) if installed(module) else None
    )


def what_it_computes(cls: type) -> str:
    """Its forward and the functions of its file that turn q and k, as written but for their docstrings."""
    module = sys.modules[cls.__module__]
    found = {"forward": cls.forward}
    waiting = [cls.forward]
    while waiting:
        names = re.findall(r"\b(?:apply_|rotate_)\w+", inspect.getsource(waiting.pop()))
        fresh = {name: inspect.unwrap(getattr(module, name)) for name in names if name not in found and hasattr(module, name)}
        fresh = {name: function for name, function in fresh.items() if inspect.isfunction(function)}  # not a kernel of the hub
        found |= fresh
        waiting += fresh.values()
    return "\n".join(ast.unparse(without_docstring(function)) for _, function in sorted(found.items()))


def without_docstring(function) -> ast.AST:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return tree


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.classes[0])
def test_classes_of_a_family_compute_the_same(family):
    """A class of the table without a tower of its own has, word for word, the forward and the rotation of one that is tested
    above, and every class what is read from it."""
    tested = {type(m) for build in TOWERS.values() for m in build().model.modules()}
    classes = [cls for cls in map(attention_class, family.classes) if cls is not None]
    known = {what_it_computes(cls) for cls in classes if cls in tested}
    if not known and not HAS_LATER_TOWERS:
        pytest.skip(f"no tower of {family.classes} for transformers {transformers.__version__}, which is older than the table")
    assert known, f"no class of {family.classes} is tested"
    for cls in classes:
        assert what_it_computes(cls) in known, f"{cls} differs from the tested classes of its family"
        source = inspect.getsource(cls)
        assert not [name for name in family.attributes if f"self.{name} = " not in source], cls


def run(tower) -> torch.Tensor:
    return tower.pick(tower.model(**tower.inputs))


def tower_in_eval(name: str):
    tower = TOWERS[name]()
    randomize(tower.model).eval()
    return tower


def test_unpatch_restores_the_original_forward():
    tower = tower_in_eval("qwen2_vl")
    before, attention = run(tower), tower.model.blocks[0].attn
    original = type(attention)
    names = patch_transformers(tower.model)
    assert names == ["blocks.0.attn", "blocks.1.attn"]
    assert isinstance(attention, original) and type(attention).forward is not original.forward
    assert unpatch(tower.model) == names
    assert torch.equal(run(tower), before)
    assert type(attention) is original and "forward" not in vars(attention) and unpatch(tower.model) == []


def test_a_forward_that_another_library_had_set_is_refused():
    """Passed over, what it does (moving weights, say) would not happen."""
    tower = tower_in_eval("siglip")
    name = patch_transformers(tower.model)[0]
    unpatch(tower.model)
    attention = tower.model.get_submodule(name)
    attention.forward = theirs = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    with pytest.raises(ValueError, match=f"{name}: its forward was replaced on the instance"):
        patch_transformers(tower.model)
    assert attention.forward is theirs and "forward" not in vars(tower.model)


def test_patching_twice_is_patching_once():
    tower = tower_in_eval("dinov2")
    assert patch_transformers(tower.model) == patch_transformers(tower.model, backend="reference")
    unpatch(tower.model)
    assert not any("forward" in vars(module) for module in tower.model.modules())


def test_weights_stay_and_a_deep_copy_runs_on_its_own():
    tower = tower_in_eval("dinov3")
    keys = list(tower.model.state_dict())
    patch_transformers(tower.model)
    assert list(tower.model.state_dict()) == keys
    before = run(tower)
    teacher = copy.deepcopy(tower.model)
    with torch.no_grad():
        for p in teacher.parameters():
            p.zero_()
    assert torch.equal(run(tower), before)
    assert not torch.equal(teacher(**tower.inputs).last_hidden_state, before)


@pytest.mark.parametrize("name", ["dinov3", "gemma4"])
def test_a_pickled_model_stays_patched(name):
    tower = tower_in_eval(name)
    patched = patch_transformers(tower.model)
    before = run(tower)
    tower.model = pickle.loads(pickle.dumps(tower.model))
    assert torch.equal(run(tower), before)
    with torch.no_grad():
        for p in tower.model.parameters():
            p.zero_()
    assert not torch.equal(run(tower), before)  # its own weights
    assert unpatch(tower.model) == patched


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["siglip2", "gemma4", "pixtral"])
def test_masks_of_both_kinds_are_understood(name, attention):
    """Eager attention gets additive masks, SDPA bool ones; both must give what the unpatched model gives."""
    tower = tower_in_eval(name)
    tower.model.set_attn_implementation(attention)
    before = run(tower)
    patch_transformers(tower.model)
    torch.testing.assert_close(run(tower), before, rtol=1e-4, atol=1e-4)


def test_padding_is_really_masked():
    tower = tower_in_eval("siglip2")
    patch_transformers(tower.model)
    before = run(tower)
    padding = tower.inputs["pixel_attention_mask"] == 0
    tower.inputs["pixel_values"] = tower.inputs["pixel_values"].masked_fill(padding[..., None], 100.0)
    assert torch.equal(run(tower), before)


def test_gradient_checkpointing_and_autocast():
    tower = tower_in_eval("qwen2_5_vl")
    patch_transformers(tower.model)
    run(tower).sum().backward()
    expected = {name: p.grad.clone() for name, p in tower.model.named_parameters() if p.grad is not None}
    tower.model.zero_grad()
    tower.model.train()
    older = tower.model.gradient_checkpointing_enable  # until transformers 5.20, all that Python 3.10 gets
    getattr(tower.model, "activation_checkpointing_enable", older)()
    run(tower).sum().backward()
    for name, p in tower.model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, expected[name]), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(tower).float().sum().backward()
    gemma = tower_in_eval("gemma4")  # its norms leave q and k in float32 under autocast
    patch_transformers(gemma.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(gemma).isfinite().all()


def siglip_with_dropout(**kwargs):
    tower = TOWERS["siglip"]()
    for module in tower.model.modules():
        if hasattr(module, "dropout") and hasattr(module, "q_proj"):
            module.dropout = 0.1
    patch_transformers(tower.model, **kwargs)
    return tower


def test_dropout_in_training_is_refused_or_left_to_the_original():
    tower = siglip_with_dropout()
    tower.model.train()
    with pytest.raises(UnsupportedCall, match=r"dropout 0\.1"):
        run(tower)
    tower.model.eval()
    run(tower)
    tower = siglip_with_dropout(on_unsupported="original")
    tower.model.train()
    torch.manual_seed(1)
    dropped = run(tower)
    unpatch(tower.model)
    torch.manual_seed(1)
    assert torch.equal(run(tower), dropped)


def test_attention_weights_are_refused_or_left_to_the_original():
    tower = tower_in_eval("siglip")
    patch_transformers(tower.model)
    with pytest.raises(UnsupportedCall, match="output_attentions"):
        tower.model(**tower.inputs, output_attentions=True)
    assert len(tower.model(**tower.inputs, output_hidden_states=True).hidden_states) == 3
    tower.model.set_attn_implementation("eager")
    patch_transformers(tower.model, on_unsupported="original")
    assert len(tower.model(**tower.inputs, output_attentions=True).attentions) == 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, 16, 16).tril().bool(), "block structure"),  # causal
        (torch.linspace(-1, 0, 256).view(1, 1, 16, 16), "bias"),
        (torch.ones(2, 2, 16, 16).bool(), r"must be \[B, S\]"),  # one mask per head
        (torch.ones(1, 1, 16, 15).bool(), "S = 16"),
        (torch.ones(3, 16).bool(), r"B = 2 .* got \(3, 16\)"),
        (torch.zeros(2, 16).masked_fill(torch.arange(16) > 9, -1e9), "got negative values"),  # additive
        ("a BlockMask", "must be a tensor, got str"),
    ],
)
def test_masks_that_are_not_blocks_are_refused(mask, message):
    tower = tower_in_eval("siglip")
    attention = tower.model.get_submodule(patch_transformers(tower.model)[0])
    with pytest.raises(UnsupportedCall, match=message):
        attention(torch.randn(2, 16, 64), attention_mask=mask)


@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
def test_a_cast_that_dropped_the_rotation_is_named():
    tower = tower_in_eval("llama4")
    patch_transformers(tower.model.to(torch.bfloat16))
    with pytest.raises(UnsupportedCall, match=r"freqs_ci must be complex, got torch.bfloat16: model.to\(dtype\) has dropped"):
        tower.model(**{name: x.bfloat16() for name, x in tower.inputs.items()})


def test_masks_without_values_are_refused_or_left_to_the_original():
    """torch.export and the meta device; without a mask both serve."""
    tower = tower_in_eval("siglip")
    attention = tower.model.get_submodule(patch_transformers(tower.model)[0])
    x, mask = torch.randn(2, 16, 64), torch.arange(16).expand(2, 16) < 10
    meta = copy.deepcopy(attention).to("meta")
    assert meta(x.to("meta"))[0].shape == x.shape
    exported = torch.export.export(attention, (x,), strict=False).module()
    torch.testing.assert_close(exported(x)[0], attention(x)[0])
    with pytest.raises(UnsupportedCall, match="attention mask must have values to read"):
        meta(x.to("meta"), attention_mask=mask.to("meta"))
    with pytest.raises(UnsupportedCall, match="attention mask must have values to read"):
        torch.export.export(attention, (x,), dict(attention_mask=mask), strict=False)
    patch_transformers(tower.model, on_unsupported="original")
    wide = mask[:, None, None, :]
    exported = torch.export.export(attention, (x,), dict(attention_mask=wide), strict=False).module()
    torch.testing.assert_close(exported(x, attention_mask=wide)[0], attention(x, attention_mask=wide)[0], rtol=1e-4, atol=1e-4)


def test_a_mask_changed_in_place_is_read_again():
    tower = tower_in_eval("siglip")
    attention = tower.model.get_submodule(patch_transformers(tower.model)[0])
    x, mask = torch.randn(1, 16, 64), torch.ones(1, 16, dtype=torch.bool)
    before = attention(x, attention_mask=mask)[0]
    mask[:, 8:] = False
    assert not torch.allclose(attention(x, attention_mask=mask)[0], before)


def test_a_mask_that_was_read_is_refused_with_other_tokens():
    tower = tower_in_eval("siglip")
    attention = tower.model.get_submodule(patch_transformers(tower.model)[0])
    mask = torch.ones(1, 16, dtype=torch.bool)
    attention(torch.randn(1, 16, 64), attention_mask=mask)
    for tokens in (15, 20):
        with pytest.raises(UnsupportedCall, match=f"S = {tokens}, got"):
            attention(torch.randn(1, tokens, 64), attention_mask=mask)


def test_tables_of_more_tokens_are_refused():
    """Tokens dropped between the layers, tables as they were: nobody knows which rows are theirs."""
    tower = tower_in_eval("dinov3")
    attention = tower.model.get_submodule(patch_transformers(tower.model)[0])
    tables = torch.ones(12, attention.head_dim), torch.zeros(12, attention.head_dim)
    with pytest.raises(ValueError, match="at most one row for each of the 10 tokens, got 12"):
        attention(torch.randn(2, 10, 64), position_embeddings=tables)


@pytest.mark.parametrize("images, tokens", ((0, 5), (2, 0), (0, 0)))
@pytest.mark.parametrize("masked", (False, True))
def test_batches_without_tokens(images, tokens, masked):
    """A process whose share of a batch has no image, say."""
    blocks = blocks_of(torch.ones(images, tokens) if masked else None, images, tokens, torch.device("cpu"))
    q = torch.randn(images, tokens, 2, 16)
    out = padded_attention(q, q, q, blocks, None, scale=None, pair_stride=None, backend=None)
    assert out.shape == q.shape


def test_a_query_without_keys_gets_zeros():
    tower = tower_in_eval("siglip")
    attention = tower.model.get_submodule(patch_transformers(tower.model)[0])
    mask = torch.block_diag(torch.ones(10, 10), torch.zeros(6, 6)).bool()[None, None]
    out = attention(torch.randn(1, 16, 64), attention_mask=mask)[0]
    torch.testing.assert_close(out[0, 10:], attention.out_proj.bias.expand(6, -1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip", "qwen2_vl"])
def test_under_torch_compile(name):
    tower = tower_in_eval(name)
    patch_transformers(tower.model)
    before = run(tower)
    torch.testing.assert_close(
        tower.pick(torch.compile(tower.model, backend="eager")(**tower.inputs)), before, rtol=1e-4, atol=1e-4
    )


def test_text_towers_are_left_alone():
    text = dict(hidden_size=64, intermediate_size=96, **BLOCKS, vocab_size=50)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(**SIZE, **BLOCKS, image_size=16))
    model = transformers.CLIPModel(config).eval()
    inputs = dict(input_ids=torch.arange(6)[None], pixel_values=torch.randn(1, 3, 16, 16))
    before = model(**inputs)
    names = patch_transformers(model)
    assert len(names) == 2 and all(name.startswith("vision_model.") for name in names)
    torch.testing.assert_close(model(**inputs).logits_per_image, before.logits_per_image)


def test_an_unknown_model_is_refused_with_what_is_known():
    class MyAttention(torch.nn.Linear):
        pass

    with pytest.raises(ValueError, match=re.escape("MyAttention")) as error:
        patch_transformers(torch.nn.Sequential(MyAttention(2, 2)))
    assert "qwen2_5_vl.Qwen2_5_VLVisionAttention" in str(error.value) and "docs/usage.md" in str(error.value)
    with pytest.raises(ValueError, match="on_unsupported"):
        patch_transformers(torch.nn.Linear(1, 1), on_unsupported="ignore")
    with pytest.raises(ValueError, match="model must be"):
        patch_transformers("siglip")


def test_a_class_that_is_arranged_differently_is_refused_when_patching():
    tower = tower_in_eval("siglip")
    attention = next(m for m in tower.model.modules() if hasattr(m, "out_proj") and hasattr(m, "q_proj"))
    attention.to_out = attention._modules.pop("out_proj")
    with pytest.raises(ValueError, match="out_proj"):
        patch_transformers(tower.model)
    assert not any("forward" in vars(module) for module in tower.model.modules())


def test_an_unknown_backend_is_refused_when_patching():
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'gpu'"):
        patch_transformers(tower_in_eval("siglip").model, backend="gpu")


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_names_of_transformers_are_not_taken(name):
    with pytest.raises(ValueError, match=f"name must be new to transformers, got '{name}'"):
        register_attention(name)
    register_attention()
    register_attention()  # our own may be registered again


def test_a_named_backend_reaches_the_operator():
    tower = tower_in_eval("clip")
    patch_transformers(tower.model, backend="cuda")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run rope_attention on cpu"):
        run(tower)


@pytest.mark.parametrize("name", ["siglip2", "clip", "dinov3", "qwen2_5_vl"])
def test_attention_function_by_name(name):
    register_attention("comp_kernels")
    tower = tower_in_eval(name)
    before = run(tower)
    tower.model.set_attn_implementation("comp_kernels")
    torch.testing.assert_close(run(tower), before, rtol=1e-4, atol=1e-4)


def test_attention_function_refuses_causal_models():
    register_attention("comp_kernels")
    config = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=20
    )
    model = transformers.Qwen2ForCausalLM(config)
    model.set_attn_implementation("comp_kernels")
    with pytest.raises(UnsupportedCall, match="bidirectional"):
        model(input_ids=torch.arange(5)[None])


def test_importing_the_integrations_imports_neither_library():
    code = "import sys, comp_kernels.integrations; sys.exit(any(m in sys.modules for m in ('transformers', 'timm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
