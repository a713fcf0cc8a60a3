"""Our adapters against PEFT's own, in torch: layers, and files both ways."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

from mlxtune.adapters.peft import write_peft
from mlxtune.adapters.saved import SavedAdapter
from mlxtune.adapters.store import load_adapter, read_adapter, save_adapter
from mlxtune.errors import ExportError, RunError
from mlxtune.layers.dora import DoRALinear
from mlxtune.layers.inject import fuse_lora, lora_layers, projections
from mlxtune.layers.lora import LoRALinear
from mlxtune.models.targets import find_targets
from support.models import with_adapters

RANK = 6


def difference(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


class Masked(torch.nn.Module):
    """Dropout that drops the elements it is told to."""

    def __init__(self, kept: np.ndarray, p: float) -> None:
        super().__init__()
        self.factors = torch.tensor(kept / (1 - p), dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors


def pair(kind: str, *, bias: bool, dropout: float):
    """A projection of PEFT's and one of ours with the same numbers, B and m trained."""
    mx.random.seed(4)
    torch.manual_seed(4)
    base = nn.Linear(256, 96, bias=bias)
    holder = torch.nn.Sequential(torch.nn.Linear(256, 96, bias=bias))
    state = {f"0.{n}": torch.tensor(np.array(a)) for n, a in tree_flatten(base.parameters())}
    holder.load_state_dict(state)
    import peft  # here and below: it takes seconds, and every worker reads this file

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=9,
        lora_dropout=dropout,
        target_modules=["0"],
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
    )
    theirs = peft.get_peft_model(holder, config).base_model.model[0]
    scale = 9 / (RANK**0.5 if kind == "rslora" else RANK)
    ours_kind = DoRALinear if kind == "dora" else LoRALinear
    ours = ours_kind.from_base(base, rank=RANK, scale=scale, dropout=dropout)
    ours.lora_b = mx.random.normal(ours.lora_b.shape) * 0.1
    theirs.lora_A["default"].weight.data = torch.tensor(np.array(ours.lora_a).T)
    theirs.lora_B["default"].weight.data = torch.tensor(np.array(ours.lora_b).T)
    if kind == "dora":
        # PEFT's own start, ||W||, times a factor.
        factors = mx.random.uniform(0.5, 1.5, ours.m.shape)
        magnitude = theirs.lora_magnitude_vector["default"].weight
        assert difference(np.array(ours.m), magnitude.detach().numpy()) < 1e-6
        magnitude.data *= torch.tensor(np.array(factors))
        ours.m = ours.m * factors
    return ours, theirs


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_forward_and_gradients_are_those_of_peft(kind, bias, dropout):
    ours, theirs = pair(kind, bias=bias, dropout=dropout)
    x, factors = mx.random.normal((24, 256)), mx.random.normal((24, 96))
    if dropout:
        key = mx.random.key(7)
        ours.dropout.draw_with(key)
        kept = mx.random.bernoulli(1 - dropout, x.shape, key=key)
        theirs.lora_dropout["default"] = Masked(np.array(kept), dropout)
    torch_x = torch.tensor(np.array(x), requires_grad=True)
    want = theirs(torch_x)
    (want * torch.tensor(np.array(factors))).sum().backward()
    assert difference(np.array(ours(x)), want.detach().numpy()) < 1e-5
    of_x = mx.grad(lambda v: (ours(v) * factors).sum())(x)
    assert difference(np.array(of_x), torch_x.grad.numpy()) < 1e-5
    _, tree = nn.value_and_grad(ours, lambda v: (ours(v) * factors).sum())(x)
    gradients = {name: np.array(array) for name, array in tree_flatten(tree)}
    expected = {
        "lora_a": theirs.lora_A["default"].weight.grad.numpy().T,
        "lora_b": theirs.lora_B["default"].weight.grad.numpy().T,
    }
    if kind == "dora":
        expected["m"] = theirs.lora_magnitude_vector["default"].weight.grad.numpy()
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert difference(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_fused_weight_is_the_one_that_peft_merges(kind):
    ours, theirs = pair(kind, bias=True, dropout=0.0)
    theirs.merge()
    merged = theirs.base_layer.weight.detach().numpy()
    assert difference(np.array(ours.fused_weight()), merged) < 1e-5


# ------------------------------------------------------------------------ files, both ways


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A random two-block llama that transformers wrote."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("hf") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


IDS = [[5, 17, 99, 3, 42, 64, 7, 1]]


def hf_model(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def hf_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def our_model(folder):
    model, _ = mlx_lm.utils.load_model(folder)
    model.eval()
    return model


def our_logits(model) -> np.ndarray:
    return np.array(model(mx.array(IDS)))


def with_random_values(model):
    """PEFT's adapters with values that have an effect."""
    generator = torch.Generator().manual_seed(2)
    for name, array in model.named_parameters():
        if "lora_B" in name:
            array.data = torch.randn(array.shape, generator=generator) * 0.05
        elif "magnitude" in name:
            array.data *= 0.5 + torch.rand(array.shape, generator=generator)
    return model.eval()


TARGETS = {
    "a list": {"target_modules": ["q_proj", "down_proj"]},
    "a regex": {"target_modules": r".*\.1\.(self_attn\.[kv]_proj|mlp\.up_proj)"},
    "all": {"target_modules": "all-linear"},
    "a block": {"target_modules": ["o_proj"], "layers_to_transform": [0]},
    "the head too": {"target_modules": ["q_proj", "lm_head"]},
}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def saved_by_peft(hf_folder, folder, *, save_embedding_layers=False, **options):
    """An adapter's folder that PEFT wrote, and the logits of its model."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", **options)
    model = with_random_values(peft.get_peft_model(hf_model(hf_folder), config))
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return hf_logits(model)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_gives_its_logits_here(kind, targets, hf_folder, tmp_path):
    want = saved_by_peft(hf_folder, tmp_path, **TARGETS[targets], **KINDS[kind])
    model = our_model(hf_folder)
    assert difference(our_logits(model), want) > 1e-3
    load_adapter(tmp_path, model)
    assert difference(our_logits(model), want) < 1e-4
    fuse_lora(model)
    assert difference(our_logits(model), want) < 1e-4


NAMES = {
    "all": (("all-linear",), None),
    "two": (("q_proj", "mlp.down_proj"), None),
    "the last block": (("all-linear",), 1),
    "one of one block": (("0.self_attn.v_proj",), None),
    "the head too": (("all-linear", "lm_head"), None),
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_ours_gives_its_logits_in_peft(kind, names, hf_folder, tmp_path):
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = our_model(hf_folder)
    wanted, layers = NAMES[names]
    paths = find_targets(dict(projections(model)), wanted, layers=layers, layer_count=2)
    with_adapters(model, paths, dora=kind == "dora")
    for _, layer in lora_layers(model):
        if kind == "dora":
            layer.m = layer.m * mx.random.uniform(0.5, 1.5, layer.m.shape)
    save_adapter(tmp_path, model, base=str(hf_folder))
    (tmp_path / "peft").mkdir()
    write_peft(tmp_path / "peft", read_adapter(tmp_path), rslora=kind == "rslora")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # PEFT only warns of arrays that it does not find
        theirs = PeftModel.from_pretrained(hf_model(hf_folder), tmp_path / "peft")
    assert difference(hf_logits(theirs.eval()), our_logits(model)) < 1e-4
    adapted = {
        name.removeprefix("base_model.model.")
        for name, layer in theirs.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert adapted == set(paths)
    config = theirs.peft_config["default"]
    assert (config.r, config.use_dora, config.use_rslora) == (4, kind == "dora", kind == "rslora")
    assert config.lora_alpha == (4 if kind == "rslora" else 8)
    if names == "all":
        assert "self_attn.q_proj" in config.target_modules
    # And back again, to the last bit.
    again = our_model(hf_folder)
    load_adapter(tmp_path / "peft", again)
    assert np.array_equal(our_logits(again), our_logits(model))


def test_experts_are_not_written_for_peft(tmp_path):
    arrays = {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": mx.zeros((8, 4, 64))}
    adapter = SavedAdapter("lora", 4, 2.0, arrays, "some/moe", 1, "here")
    with pytest.raises(ExportError, match=r"up_proj\.lora_a is of many experts"):
        write_peft(tmp_path, adapter)
    assert not list(tmp_path.iterdir())


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"bias": "lora_only"}, "bias = lora_only"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"rank_pattern": {"down_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"down_proj": 8}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
    ],
)
def test_an_option_of_peft_that_is_not_done_here_is_refused_by_name(
    options, what, hf_folder, tmp_path
):
    saved_by_peft(hf_folder, tmp_path, target_modules=["q_proj", "down_proj"], **options)
    with pytest.raises(RunError, match=what) as caught:
        load_adapter(tmp_path, our_model(hf_folder))
    assert caught.value.where == str(tmp_path)
    assert "merge_and_unload" in caught.value.remedy


def test_fan_in_fan_out_is_refused_by_name(hf_folder, tmp_path):
    saved_by_peft(hf_folder, tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, fan_in_fan_out=True)
    with pytest.raises(RunError, match="fan_in_fan_out"):
        load_adapter(tmp_path, our_model(hf_folder))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LoKrConfig", {"r": 4, "target_modules": ["q_proj"]}),
        ("LoHaConfig", {"r": 4, "target_modules": ["q_proj"]}),
        ("IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": []}),
    ],
)
def test_other_kinds_of_peft_are_refused_by_name(name, settings, hf_folder, tmp_path):
    import peft

    config = getattr(peft, name)(**settings)
    peft.get_peft_model(hf_model(hf_folder), config).save_pretrained(tmp_path)
    with pytest.raises(RunError, match=rf"type {config.peft_type.value} cannot") as caught:
        load_adapter(tmp_path, our_model(hf_folder))
    assert "merge_and_unload" in caught.value.remedy


def test_an_adapter_of_the_embedding_is_refused_by_name(hf_folder, tmp_path):
    saved_by_peft(hf_folder, tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(RunError, match="embed_tokens"):
        load_adapter(tmp_path, our_model(hf_folder))


def test_whole_layers_beside_the_adapter_are_refused_by_name(hf_folder, tmp_path):
    # PEFT's own choice when the head is adapted.
    saved_by_peft(hf_folder, tmp_path, target_modules=["lm_head"], save_embedding_layers=True)
    with pytest.raises(RunError, match=r"lm_head\.base_layer\.weight|embed_tokens") as caught:
        load_adapter(tmp_path, our_model(hf_folder))
    assert "save_embedding_layers=False" in caught.value.remedy


def test_a_pickled_adapter_is_refused(hf_folder, tmp_path):
    saved_by_peft(hf_folder, tmp_path, target_modules=["q_proj"])
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(RunError, match="pickled") as caught:
        load_adapter(tmp_path, our_model(hf_folder))
    assert "safe_serialization" in caught.value.remedy


def test_a_config_that_does_not_fit_the_arrays_is_refused(hf_folder, tmp_path):
    saved_by_peft(hf_folder, tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, r=8)
    with pytest.raises(RunError, match=r"q_proj\.lora_a, which is \(64, 4\) there and \(64, 8\)"):
        load_adapter(tmp_path, our_model(hf_folder))
    rewrite(tmp_path, r=4, use_dora=True)
    with pytest.raises(RunError, match=r"0\.self_attn\.q_proj lacks m"):
        load_adapter(tmp_path, our_model(hf_folder))
    rewrite(tmp_path, r="many")
    with pytest.raises(RunError, match="no readable adapter"):
        load_adapter(tmp_path, our_model(hf_folder))
