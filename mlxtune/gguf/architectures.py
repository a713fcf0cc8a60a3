"""What llama.cpp calls things, one table entry for each architecture.

An entry holds for both directions: it names the metadata that config.json becomes, the
tensors, and what is done to their rows. Facts are those of llama.cpp's converter and
model loader (MIT). Parameters are called as mlx-lm calls them: as Hugging Face does,
with experts stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf import gemma4
from mlxtune.gguf.reader import GGUFFile

Config = dict[str, Any]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Field:
    """A value that config.json and the metadata share.

    Attributes:
        key: of the metadata, behind the architecture's name.
        config: of config.json.
        kind: int or float.
        default: where config.json may leave it out; None where it may not.
    """

    key: str
    config: str
    kind: type[int] | type[float] = int
    default: int | float | None = None


@dataclass(frozen=True)
class Change:
    """What is done to a parameter's values on the way to GGUF, and on the way back.

    Attributes:
        to_gguf, to_hf: of values in float32.
        axes: how many axes of length 1 GGUF leaves out at the end.
    """

    to_gguf: Callable[[Values], Values]
    to_hf: Callable[[Values], Values]
    axes: int = 0


@dataclass(frozen=True)
class Own:
    """What an architecture says in a way of its own, rotation included.

    Attributes:
        metadata: config.json to metadata keys behind the architecture's name.
        rope_factors: config.json to what the angles of full attention are divided by.
        config: a file to what config.json says.
    """

    metadata: Callable[[Config], dict[str, Any]]
    rope_factors: Callable[[Config], Values]
    config: Callable[[GGUFFile], Config]


@dataclass(frozen=True)
class Architecture:
    """How one family of models is written in GGUF.

    Attributes:
        name: llama.cpp's name, the prefix of its metadata keys.
        model_types: the `model_type`s of config.json that it serves; the first is the
            one that a GGUF without further hints is read as.
        hf_class: the entry in `architectures` of config.json when reading.
        blocks: module inside a block to GGUF tensor.
        parameters: the same for a block's parameters that belong to no module of weights.
        fields: metadata beyond what all have.
        rotary_interleaved: llama.cpp rotates adjacent pairs for this architecture, so
            rows of q and k are reordered from the half-split order of HF.
        theta: base of the rotation where config.json says none, as in mlx-lm; None where
            it has to say one, or where mlx-lm and transformers do not agree.
        rope_dimension: whether the metadata carries the number of rotated dimensions.
        rope_sections: rotated pairs that go by time, height and width, where config.json
            does not say; where there are any, it keeps the rotation in `rope_parameters`.
        tiled_values: llama.cpp has the value heads of linear attention that share a key
            head apart, so that key heads repeat as a whole; in HF they are neighbours.
        own_head_dim: mlx-lm's class reads `head_dim`; others divide the width by the heads.
        prefix: what mlx-lm has before the names of all parameters.
        changes: end of a parameter's name to what is done to its values.
        fixed: keys of config.json whose value llama.cpp takes for granted.
        layers: a key of config.json with a value for each layer, and what llama.cpp takes
            these to be, over and over.
        own: what does not fit into all this.
    """

    name: str
    model_types: tuple[str, ...]
    hf_class: str
    blocks: Mapping[str, str]
    parameters: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[Field, ...] = ()
    rotary_interleaved: bool = False
    theta: float | None = None
    rope_dimension: bool = False
    rope_sections: tuple[int, ...] = ()
    tiled_values: bool = False
    own_head_dim: bool = True
    prefix: str = ""
    changes: Mapping[str, Change] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, tuple[Any, ...]] | None = None
    own: Own | None = None

    def to_gguf_name(self, hf_name: str) -> str | None:
        """`model.layers.3.mlp.up_proj.weight` to `blk.3.ffn_up.weight`; None if unknown."""
        hf_name = hf_name.removeprefix(self.prefix)
        module, _, kind = hf_name.rpartition(".")
        if module in GLOBAL_NAMES:
            return f"{GLOBAL_NAMES[module]}.{kind}"
        if hf_name.startswith("model.layers."):
            number, _, rest = hf_name.removeprefix("model.layers.").partition(".")
            if rest in self.parameters:
                return f"blk.{number}.{self.parameters[rest]}"
            rest = rest.rpartition(".")[0]
            if rest in self.blocks:
                return f"blk.{number}.{self.blocks[rest]}.{kind}"
        return None

    def to_hf_name(self, gguf_name: str) -> str | None:
        """The inverse of `to_gguf_name`."""
        module, _, kind = gguf_name.rpartition(".")
        for hf, name in GLOBAL_NAMES.items():
            if name == module:
                return f"{self.prefix}{hf}.{kind}"
        if gguf_name.startswith("blk."):
            number, _, rest = gguf_name.removeprefix("blk.").partition(".")
            for hf, name in self.parameters.items():
                if name == rest:
                    return f"{self.prefix}model.layers.{number}.{hf}"
            for hf, name in self.blocks.items():
                if f"{name}.{kind}" == rest:
                    return f"{self.prefix}model.layers.{number}.{hf}.{kind}"
        return None

    def per_layer(self, layers: int) -> Config:
        """What config.json says of each of so many layers, by its key."""
        if self.layers is None:
            return {}
        key, values = self.layers
        return {key: [values[i % len(values)] for i in range(layers)]}

    def change(self, hf_name: str) -> Change | None:
        """What is done to this parameter's values; None if nothing is."""
        return next((c for end, c in self.changes.items() if hf_name.endswith(end)), None)


# HF module to GGUF tensor.
GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_MLP = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMED_HEADS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_LLAMA = _ATTENTION | {"post_attention_layernorm": "ffn_norm"} | _MLP
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
}
_GPT_OSS_EXPERTS = {
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_GEMMA = (
    _ATTENTION
    | _MLP
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
)
_PHI3 = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_GATED_DELTA_NET = {
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
_GEMMA4 = Architecture(
    name="gemma4",
    model_types=("gemma4_text",),
    hf_class="Gemma4ForCausalLM",
    blocks=_GEMMA
    | _NORMED_HEADS
    | {
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
    },
    parameters={"layer_scalar": "layer_output_scale.weight"},
    fields=(Field("attention.sliding_window", "sliding_window", int, 512),),
    fixed={"enable_moe_block": False},
    own=Own(gemma4.metadata, gemma4.rope_factors, gemma4.config),
)
_ONE_MORE = Change(lambda x: x + np.float32(1), lambda x: x - np.float32(1))
_DECAY = Change(lambda x: -np.exp(x), lambda x: np.log(-x))
_DEPTHWISE = Change(lambda x: x[..., 0], lambda x: x[..., None], axes=1)

_GEMMA3 = Architecture(
    name="gemma3",
    model_types=("gemma3_text",),
    hf_class="Gemma3ForCausalLM",
    theta=1_000_000.0,
    blocks=_GEMMA | _NORMED_HEADS,
    fields=(
        Field("attention.sliding_window", "sliding_window", int, 512),
        Field("rope.freq_base_swa", "rope_local_base_freq", float, 10_000.0),
    ),
    changes={"norm.weight": _ONE_MORE},
    fixed={"sliding_window_pattern": 6},
)

_VOCABULARY = Field("vocab_size", "vocab_size")
COMMON = (
    Field("block_count", "num_hidden_layers"),
    Field("context_length", "max_position_embeddings", default=2048),
    Field("embedding_length", "hidden_size"),
    Field("feed_forward_length", "intermediate_size"),
    Field("attention.head_count", "num_attention_heads"),
    Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
)

ARCHITECTURES = (
    Architecture(
        name="llama",
        model_types=("llama", "mistral"),
        hf_class="LlamaForCausalLM",
        theta=10_000.0,
        blocks=_LLAMA,
        fields=(_VOCABULARY,),
        rotary_interleaved=True,
        rope_dimension=True,
    ),
    Architecture(
        name="qwen2",
        model_types=("qwen2",),
        hf_class="Qwen2ForCausalLM",
        theta=1_000_000.0,
        blocks=_LLAMA,
        own_head_dim=False,
    ),
    Architecture(
        name="qwen3",
        model_types=("qwen3",),
        hf_class="Qwen3ForCausalLM",
        blocks=_LLAMA | _NORMED_HEADS,
    ),
    Architecture(
        name="qwen3moe",
        model_types=("qwen3_moe",),
        hf_class="Qwen3MoeForCausalLM",
        blocks=_ATTENTION | {"post_attention_layernorm": "ffn_norm"} | _NORMED_HEADS | _EXPERTS,
        fields=(
            Field("expert_count", "num_experts"),
            Field("expert_used_count", "num_experts_per_tok"),
            Field("expert_feed_forward_length", "moe_intermediate_size"),
        ),
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    Architecture(
        name="gemma2",
        model_types=("gemma2",),
        hf_class="Gemma2ForCausalLM",
        theta=10_000.0,
        blocks=_GEMMA,
        fields=(
            Field("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0),
            Field("final_logit_softcapping", "final_logit_softcapping", float, 30.0),
            Field("attention.sliding_window", "sliding_window", int, 4096),
        ),
        changes={"norm.weight": _ONE_MORE},
    ),
    _GEMMA3,
    # Beside what looks at images.
    replace(
        _GEMMA3,
        model_types=("gemma3",),
        hf_class="Gemma3ForConditionalGeneration",
        prefix="language_model.",
    ),
    _GEMMA4,
    # Beside what looks at images and listens.
    replace(
        _GEMMA4,
        model_types=("gemma4",),
        hf_class="Gemma4ForConditionalGeneration",
        prefix="language_model.",
    ),
    Architecture(
        name="phi3",
        model_types=("phi3",),
        hf_class="Phi3ForCausalLM",
        theta=10_000.0,
        blocks=_PHI3,
        fields=(
            Field(
                "rope.scaling.original_context_length",
                "original_max_position_embeddings",
                int,
                4096,
            ),
            Field("attention.sliding_window", "sliding_window", int, 0),
        ),
        rope_dimension=True,
        own_head_dim=False,
    ),
    Architecture(
        name="smollm3",
        model_types=("smollm3",),
        hf_class="SmolLM3ForCausalLM",
        blocks=_LLAMA,
        fields=(_VOCABULARY,),
        rotary_interleaved=True,
        rope_dimension=True,
        fixed={"no_rope_layer_interval": 4},
        layers=("no_rope_layers", (1, 1, 1, 0)),
    ),
    Architecture(
        name="granite",
        model_types=("granite",),
        hf_class="GraniteForCausalLM",
        blocks=_LLAMA,
        fields=(
            _VOCABULARY,
            Field("attention.scale", "attention_multiplier", float),
            Field("embedding_scale", "embedding_multiplier", float),
            Field("residual_scale", "residual_multiplier", float),
            Field("logit_scale", "logits_scaling", float),
        ),
        rotary_interleaved=True,
        rope_dimension=True,
        own_head_dim=False,
    ),
    Architecture(
        name="gpt-oss",
        model_types=("gpt_oss",),
        hf_class="GptOssForCausalLM",
        theta=150_000.0,
        blocks=_ATTENTION | {"post_attention_layernorm": "post_attention_norm"} | _GPT_OSS_EXPERTS,
        parameters={"self_attn.sinks": "attn_sinks.weight"},
        fields=(
            Field("expert_count", "num_local_experts"),
            Field("expert_used_count", "num_experts_per_tok"),
            Field("expert_feed_forward_length", "intermediate_size"),
            Field("attention.sliding_window", "sliding_window", int, 128),
        ),
        fixed={"tie_word_embeddings": False, "swiglu_limit": 7.0},
        layers=("layer_types", ("sliding_attention", "full_attention")),
    ),
    Architecture(
        name="qwen35",
        model_types=("qwen3_5",),
        hf_class="Qwen3_5ForCausalLM",
        blocks=_ATTENTION
        | {"post_attention_layernorm": "post_attention_norm"}
        | _NORMED_HEADS
        | _MLP
        | _GATED_DELTA_NET,
        parameters={"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"},
        fields=(
            Field("full_attention_interval", "full_attention_interval", int, 4),
            Field("ssm.conv_kernel", "linear_conv_kernel_dim"),
            Field("ssm.group_count", "linear_num_key_heads"),
            Field("ssm.time_step_rank", "linear_num_value_heads"),
            Field("ssm.state_size", "linear_key_head_dim"),
            Field("ssm.state_size", "linear_value_head_dim"),
        ),
        rope_dimension=True,
        rope_sections=(11, 11, 10),
        tiled_values=True,
        prefix="language_model.",
        changes={"A_log": _DECAY, "conv1d.weight": _DEPTHWISE},
        fixed={"full_attention_interval": 4, "attention_bias": False, "attn_output_gate": True},
        layers=("layer_types", (*["linear_attention"] * 3, "full_attention")),
    ),
)


def for_config(config: Config) -> Architecture:
    """The entry that serves a config.json.

    Raises:
        ExportError: no entry serves its model type.
    """
    model_type = config.get("model_type")
    for entry in ARCHITECTURES:
        if model_type in entry.model_types:
            return entry
    known = sorted(t for entry in ARCHITECTURES for t in entry.model_types)
    raise ExportError(
        f"models of type {model_type!r} cannot be written as GGUF yet",
        remedy=f"supported: {', '.join(known)}; `mlxtune fuse` writes any model as safetensors",
    )


def text_alone(entry: Architecture) -> Architecture:
    """The entry of a model's language model by itself, where it has other parts too."""
    alone = (e for e in ARCHITECTURES if e.name == entry.name and not e.prefix)
    return next(alone, entry) if entry.prefix else entry


def for_gguf(name: str) -> Architecture:
    """The entry called `name` in GGUF.

    Raises:
        ModelError: there is none.
    """
    for entry in ARCHITECTURES:
        if entry.name == name:
            return entry
    raise ModelError(
        f"GGUF files of architecture {name!r} cannot be read yet",
        remedy=f"supported: {', '.join(dict.fromkeys(e.name for e in ARCHITECTURES))}; "
        "use the model's safetensors folder or hub id",
    )
