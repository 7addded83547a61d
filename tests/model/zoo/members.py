"""The zoo's members: architectures of transformers and of libraries around it, each a builder and the batch that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.zoo.tiny_models import DEPTH, VOCAB, WIDTH, model_class, tiny_config, tiny_model

LENGTHS = (7, 5, 4)


@dataclass(frozen=True)
class Member:
    """One architecture; ``hidden``: it gives hidden states, ``blocks``: (stack, path of the list of its blocks) where not."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    masks: bool = True
    hidden: bool = True
    cached: bool = True
    generates: bool = False
    blocks: Sequence[tuple[str | None, str]] = ()
    adds: Sequence[
        str
    ] = ()  # modules of a block, beside attention and MLP, whose outputs the stream receives
    factors: Mapping[str, float] = field(default_factory=dict)  # what these outputs are multiplied by
    time_first: bool = False  # its blocks work on (T, B, D)
    ends_times: float = 1.0  # what a block multiplies the whole stream by at its end
    notes: frozenset[str] = frozenset()
    packed: bool = False  # it is called with one dict
    edited: Mapping[str | None, int] = field(
        default_factory=dict
    )  # stack -> a layer whose output reaches the model's (default: 1)
    whole: bool = False  # it has no cache: every step of generate is called with the sequence so far
    moves: bool = True

    def padded(self, batch: dict[str, Any], side: str) -> tuple[dict[str, Any], Tensor]:
        """The batch with rows of unequal lengths, padded on one side, and the mask."""
        ids = batch["input_ids"]
        out, mask = torch.zeros_like(ids), torch.zeros(ids.shape[:2], dtype=torch.long)
        for row, length in enumerate(LENGTHS):
            where = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
            out[row, where], mask[row, where] = ids[row, :length], 1
        return {**batch, "input_ids": out, "attention_mask": mask}, mask

    def alone(self, batch: dict[str, Any], row: int) -> dict[str, Any]:
        """One sequence of the padded batch, without padding."""
        one = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in batch.items()}
        ids = one["input_ids"][:, : LENGTHS[row]]
        return {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text() -> dict[str, Any]:
    """Three sequences of seven tokens, none of them special."""
    ids = torch.randint(6, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_pair() -> dict[str, Any]:
    """Three sequences, and five tokens for a decoder each."""
    ids = torch.randint(6, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    return {**text(), "decoder_input_ids": ids}


def images(size: int = 16, channels: int = 3, count: int = 2) -> dict[str, Any]:
    """Two images."""
    return {
        "pixel_values": torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(3))
    }


def waves(length: int = 400) -> dict[str, Any]:
    """Two pieces of sound."""
    return {"input_values": torch.randn(2, length, generator=torch.Generator().manual_seed(4))}


def of(model: str, config: str, gain: float = 6.0, **changes: Any) -> Callable[[], nn.Module]:
    """A builder from names of classes."""
    return lambda: tiny_model(model_class(model), tiny_config(model_class(config), **changes), gain)


def _decoder(
    name: str, model: str, config: str = "", *, like: Mapping[str, Any] | None = None, **changes: Any
) -> Member:
    base = model.removesuffix("ForCausalLM").removesuffix("LMHeadModel").removesuffix("WithLMHeadModel")
    settings: dict[str, Any] = {"family": "decoder", "generates": True, **(like or {})}
    return Member(name, build=of(model, config or base + "Config", **changes), batch=text, **settings)


GATED = frozenset({"gated"})
MOE = {"family": "mixture of experts"}
STATE = {"family": "state space and hybrid"}
MLA = {"num_key_value_heads": 4}

DECODERS = [
    _decoder("gpt2", "GPT2LMHeadModel"),
    _decoder("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1], [["global"], 1]]),
    _decoder("gpt_neox", "GPTNeoXForCausalLM"),
    _decoder("gpt_neox, sequential", "GPTNeoXForCausalLM", use_parallel_residual=False),
    _decoder("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM"),
    _decoder("gptj", "GPTJForCausalLM", rotary_dim=4),
    _decoder("codegen", "CodeGenForCausalLM", rotary_dim=4),
    _decoder("gpt_bigcode", "GPTBigCodeForCausalLM"),
    _decoder("openai-gpt", "OpenAIGPTLMHeadModel", like={"cached": False, "whole": True}),
    _decoder("ctrl", "CTRLLMHeadModel"),
    _decoder("opt", "OPTForCausalLM"),
    _decoder("opt, post-norm", "OPTForCausalLM", do_layer_norm_before=False),
    _decoder("bloom", "BloomForCausalLM"),
    _decoder("falcon", "FalconForCausalLM"),
    _decoder("falcon, alibi", "FalconForCausalLM", alibi=True, parallel_attn=False, bias=True),
    _decoder("falcon, new decoder", "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2),
    _decoder("mpt", "MptForCausalLM", like={"whole": True}),
    _decoder("xglm", "XGLMForCausalLM"),
    _decoder("biogpt", "BioGptForCausalLM"),
    _decoder("llama", "LlamaForCausalLM"),
    _decoder("mistral", "MistralForCausalLM", sliding_window=4),
    _decoder("ministral", "MinistralForCausalLM", sliding_window=4),
    _decoder("qwen2", "Qwen2ForCausalLM"),
    _decoder("qwen3", "Qwen3ForCausalLM"),
    _decoder("gemma", "GemmaForCausalLM"),
    _decoder("gemma2", "Gemma2ForCausalLM"),
    _decoder("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", sliding_window=4),
    _decoder(
        "gemma3n_text",
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        num_hidden_layers=4,
        num_kv_shared_layers=1,
        like={},
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    _decoder(
        "gemma4_text",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        like={"adds": ("post_per_layer_input_norm",), "ends_times": 0.7},
    ),
    _decoder("phi", "PhiForCausalLM"),
    _decoder("phi3", "Phi3ForCausalLM"),
    _decoder("stablelm", "StableLmForCausalLM"),
    _decoder("stablelm, parallel", "StableLmForCausalLM", use_parallel_residual=True),
    _decoder("starcoder2", "Starcoder2ForCausalLM"),
    _decoder("persimmon", "PersimmonForCausalLM"),
    _decoder("olmo", "OlmoForCausalLM"),
    _decoder("olmo2", "Olmo2ForCausalLM"),
    _decoder("olmo3", "Olmo3ForCausalLM"),
    _decoder("cohere", "CohereForCausalLM"),
    _decoder("cohere2", "Cohere2ForCausalLM"),
    _decoder("granite", "GraniteForCausalLM", residual_multiplier=0.3),
    _decoder("glm", "GlmForCausalLM"),
    _decoder("glm4", "Glm4ForCausalLM"),
    _decoder("helium", "HeliumForCausalLM"),
    _decoder("nemotron", "NemotronForCausalLM"),
    _decoder("smollm3", "SmolLM3ForCausalLM"),
    _decoder("diffllama", "DiffLlamaForCausalLM", like={"notes": frozenset({"gated", "sinks"})}),
    _decoder("exaone4", "Exaone4ForCausalLM"),
    _decoder("ernie4_5", "Ernie4_5ForCausalLM"),
    _decoder("arcee", "ArceeForCausalLM"),
    _decoder("apertus", "ApertusForCausalLM"),
    _decoder("seed_oss", "SeedOssForCausalLM"),
    _decoder(
        "bitnet", "BitNetForCausalLM", like={"notes": GATED}
    ),  # a norm between the heads and their projection
    _decoder("nanochat", "NanoChatForCausalLM"),
    _decoder("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"),
    _decoder("vaultgemma", "VaultGemmaForCausalLM"),
    _decoder("doge", "DogeForCausalLM"),
    _decoder("modernbert-decoder", "ModernBertDecoderForCausalLM"),
    _decoder("jais2", "Jais2ForCausalLM"),
    _decoder("cwm", "CwmForCausalLM"),
    _decoder("youtu", "YoutuForCausalLM", **MLA),
    _decoder("minicpm3", "MiniCPM3ForCausalLM", **MLA),
    _decoder(
        "granite_swa", "GraniteSWAForCausalLM", like={"notes": GATED}
    ),  # what a sink takes is taken from the heads' outputs
    _decoder("trocr", "TrOCRForCausalLM"),
    _decoder("bart, decoder alone", "BartForCausalLM", "BartConfig"),
    _decoder("bert, decoder", "BertLMHeadModel", "BertConfig", is_decoder=True),
]
EXPERTS = [
    _decoder("mixtral", "MixtralForCausalLM", like=MOE),
    _decoder("qwen2_moe", "Qwen2MoeForCausalLM", like=MOE),
    _decoder("qwen3_moe", "Qwen3MoeForCausalLM", like=MOE),
    _decoder("olmoe", "OlmoeForCausalLM", like=MOE),
    _decoder("deepseek_v2", "DeepseekV2ForCausalLM", like=MOE, **MLA),
    _decoder("deepseek_v3", "DeepseekV3ForCausalLM", like=MOE, **MLA),
    _decoder("gpt_oss", "GptOssForCausalLM", like={**MOE, "notes": frozenset({"sink column"})}),
    _decoder("phimoe", "PhimoeForCausalLM", like=MOE),
    _decoder("jetmoe", "JetMoeForCausalLM", like=MOE),
    _decoder("granitemoe", "GraniteMoeForCausalLM", like=MOE, residual_multiplier=0.3),
    _decoder("granitemoeshared", "GraniteMoeSharedForCausalLM", like=MOE, residual_multiplier=0.3),
    _decoder("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", like=MOE),
    _decoder("glm4_moe", "Glm4MoeForCausalLM", like=MOE),
    _decoder("glm4_moe_lite", "Glm4MoeLiteForCausalLM", like=MOE, **MLA),
    _decoder("dots1", "Dots1ForCausalLM", like=MOE),
    _decoder("flex_olmo", "FlexOlmoForCausalLM", like=MOE),
    _decoder("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", like=MOE),
    _decoder("minimax_m2", "MiniMaxM2ForCausalLM", like=MOE),
    _decoder("llama4_text", "Llama4ForCausalLM", "Llama4TextConfig", like=MOE),
    _decoder("aria_text", "AriaTextForCausalLM", like=MOE, moe_num_experts=4, moe_topk=2),
    _decoder("afmoe", "AfmoeForCausalLM", like={**MOE, "notes": GATED}),
    _decoder("solar_open", "SolarOpenForCausalLM", like=MOE),
    _decoder("exaone_moe", "ExaoneMoeForCausalLM", like=MOE),
    _decoder(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        like=MOE,
        expert_ffn_hidden_size=24,
        ffn_hidden_size=48,
        zero_expert_num=2,
        n_routed_experts=4,
        moe_topk=2,
        num_layers=2,
        head_dim=4,
        **MLA,
    ),
    _decoder("cohere2_moe", "Cohere2MoeForCausalLM", like=MOE),
    _decoder(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        like=MOE,
        layer_types=["full_attention", "conv", "full_attention"],
        num_dense_layers=1,
    ),
]
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
STATES = [
    _decoder("mamba", "MambaForCausalLM", like=STATE),
    _decoder(
        "mamba2",
        "Mamba2ForCausalLM",
        like=STATE,
        head_dim=16,
        num_heads=4,
        n_groups=1,
        state_size=8,
        chunk_size=8,
    ),
    _decoder("falcon_mamba", "FalconMambaForCausalLM", like=STATE),
    _decoder(
        "rwkv", "RwkvForCausalLM", like={**STATE, "masks": False, "generates": False}
    ),  # its cached steps mix up sequences
    _decoder(
        "jamba",
        "JambaForCausalLM",
        like=STATE,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    _decoder("bamba", "BambaForCausalLM", like=STATE, attn_layer_indices=[1], mamba_chunk_size=8, **MAMBA),
    _decoder(
        "zamba",
        "ZambaForCausalLM",
        like=STATE,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=2,
        attention_hidden_size=64,
        attention_head_dim=16,
        use_mamba_kernels=False,
        num_key_value_heads=4,
    ),
    _decoder(
        "zamba2",
        "Zamba2ForCausalLM",
        like=STATE,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=16,
        mamba_d_state=8,
        num_mem_blocks=1,
        use_mamba_kernels=False,
        adapter_rank=4,
        num_key_value_heads=4,
        attention_head_dim=16,
        chunk_size=8,
    ),
    _decoder(
        "falcon_h1",
        "FalconH1ForCausalLM",
        like={**STATE, "adds": ("mamba",), "factors": {"mamba": 0.7}},
        mamba_d_ssm=64,
        mamba_chunk_size=8,
        attention_out_multiplier=0.5,
        ssm_out_multiplier=0.7,
        mlp_multipliers=[0.8, 0.6],
        **MAMBA,
    ),
    _decoder(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        like=STATE,
        layer_types=["mamba", "attention", "mamba"],
        residual_multiplier=0.3,
        mamba_chunk_size=8,
        **MAMBA,
    ),
    _decoder("minimax", "MiniMaxForCausalLM", like=STATE),
    _decoder("recurrent_gemma", "RecurrentGemmaForCausalLM", like=STATE, num_hidden_layers=3, lru_width=32),
    _decoder("lfm2", "Lfm2ForCausalLM", like=STATE, layer_types=["conv", "full_attention", "conv"]),
    _decoder("qwen3_next", "Qwen3NextForCausalLM", like={**STATE, "notes": GATED}, **LINEAR),
    _decoder(
        "qwen3_5_text", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", like={**STATE, "notes": GATED}, **LINEAR
    ),
    _decoder("olmo_hybrid", "OlmoHybridForCausalLM", like=STATE),
    _decoder(
        "nemotron_h",
        "NemotronHForCausalLM",
        like=STATE,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
    ),
    _decoder(
        "xlstm",
        "xLSTMForCausalLM",
        "xLSTMConfig",
        like={**STATE, "masks": False, "generates": False},
        num_blocks=3,
        qk_dim_factor=0.5,
        v_dim_factor=1.0,
    ),
]


def _encoder(
    name: str, model: str, config: str = "", *, like: Mapping[str, Any] | None = None, **changes: Any
) -> Member:
    base = model.removesuffix("ForMaskedLM").removesuffix("WithLMHeadModel").removesuffix("Model")
    settings: dict[str, Any] = {"family": "encoder", "cached": False, **(like or {})}
    return Member(name, build=of(model, config or base + "Config", **changes), batch=text, **settings)


ENCODERS = [
    _encoder("bert", "BertForMaskedLM"),
    _encoder("roberta", "RobertaForMaskedLM"),
    _encoder("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM"),
    _encoder("albert", "AlbertForMaskedLM"),
    _encoder("albert, two groups", "AlbertForMaskedLM", num_hidden_layers=4, num_hidden_groups=2),
    _encoder("electra", "ElectraForMaskedLM"),
    _encoder("distilbert", "DistilBertForMaskedLM"),
    _encoder(
        "deberta",
        "DebertaForMaskedLM",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=16,
    ),
    _encoder(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=16,
    ),
    _encoder("mpnet", "MPNetForMaskedLM"),
    _encoder("camembert", "CamembertForMaskedLM"),
    _encoder("xlm-roberta", "XLMRobertaForMaskedLM"),
    _encoder("xlm-roberta-xl", "XLMRobertaXLForMaskedLM"),
    _encoder(
        "xlnet",
        "XLNetLMHeadModel",
        "XLNetConfig",
        like={"blocks": [(None, "transformer.layer")], "time_first": True},
    ),
    _encoder("xlm", "XLMWithLMHeadModel"),
    _encoder("flaubert", "FlaubertWithLMHeadModel"),
    _encoder("funnel", "FunnelForMaskedLM", block_sizes=[1, 1, 1], d_head=8, num_decoder_layers=2),
    _encoder(
        "longformer",
        "LongformerForMaskedLM",
        like={"blocks": [(None, "longformer.encoder.layer")]},
        attention_window=4,
    ),
    _encoder("big_bird", "BigBirdForMaskedLM", attention_type="original_full"),
    _encoder("nystromformer", "NystromformerForMaskedLM", num_landmarks=7, segment_means_seq_len=7),
    _encoder("ibert", "IBertForMaskedLM"),
    _encoder("yoso", "YosoForMaskedLM", use_expectation=True),
    _encoder("mra", "MraForMaskedLM"),
    _encoder("fnet", "FNetForMaskedLM", like={"masks": False}),
    _encoder(
        "convbert", "ConvBertForMaskedLM", like={"notes": GATED}
    ),  # half of what the projection is given is a convolution's
    _encoder("squeezebert", "SqueezeBertForMaskedLM"),
    _encoder(
        "mobilebert",
        "MobileBertForMaskedLM",
        true_hidden_size=16,
        intra_bottleneck_size=16,
        embedding_size=16,
    ),
    _encoder("megatron-bert", "MegatronBertForMaskedLM"),
    _encoder("rembert", "RemBertForMaskedLM"),
    _encoder("roformer", "RoFormerForMaskedLM"),
    _encoder(
        "roc_bert",
        "RoCBertForMaskedLM",
        pronunciation_vocab_size=VOCAB,
        shape_vocab_size=VOCAB,
        shape_embed_dim=16,
        pronunciation_embed_dim=16,
    ),
    _encoder("ernie", "ErnieForMaskedLM"),
    _encoder("esm", "EsmForMaskedLM", mask_token_id=3),
    _encoder("luke", "LukeForMaskedLM", entity_vocab_size=16, entity_emb_size=16),
    _encoder("modernbert", "ModernBertForMaskedLM"),
    _encoder("eurobert", "EuroBertForMaskedLM"),
    _encoder("nomic_bert", "NomicBertForMaskedLM"),
    _encoder("layoutlm", "LayoutLMForMaskedLM", max_2d_position_embeddings=32),
    _encoder("tapas", "TapasForMaskedLM"),
    _encoder("data2vec-text", "Data2VecTextForMaskedLM"),
    _encoder("gte", "GteForMaskedLM"),
    _encoder("jina_embeddings_v3", "JinaEmbeddingsV3ForMaskedLM"),
    _encoder("dpr", "DPRQuestionEncoder", "DPRConfig"),
]


CROSSED = ("encoder_attn", "layer.1.EncDecAttention", "cross_attn", "cross_attention")


def _pair(
    name: str, model: str, config: str = "", *, like: Mapping[str, Any] | None = None, **changes: Any
) -> Member:
    base = (
        model.removesuffix("ForConditionalGeneration").removesuffix("MTModel").removesuffix("ForTextToText")
    )
    settings: dict[str, Any] = {
        "family": "encoder-decoder",
        "generates": True,
        "adds": CROSSED,
        **(like or {}),
    }
    return Member(name, build=of(model, config or base + "Config", **changes), batch=text_pair, **settings)


PAIRS = [
    _pair("t5", "T5ForConditionalGeneration"),
    _pair("t5, gated", "T5ForConditionalGeneration", feed_forward_proj="gated-gelu"),
    _pair("mt5", "MT5ForConditionalGeneration"),
    _pair("umt5", "UMT5ForConditionalGeneration"),
    _pair("longt5", "LongT5ForConditionalGeneration", local_radius=3),
    _pair(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    _pair("bart", "BartForConditionalGeneration"),
    _pair("mbart", "MBartForConditionalGeneration"),
    _pair("pegasus", "PegasusForConditionalGeneration"),
    _pair("pegasus_x", "PegasusXForConditionalGeneration", block_size=4, num_global_tokens=2),
    _pair("blenderbot", "BlenderbotForConditionalGeneration"),
    _pair("blenderbot-small", "BlenderbotSmallForConditionalGeneration"),
    _pair("marian", "MarianMTModel"),
    _pair("m2m_100", "M2M100ForConditionalGeneration"),
    _pair(
        "nllb-moe",
        "NllbMoeForConditionalGeneration",
        expert_capacity=64,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    ),
    _pair(
        "led",
        "LEDForConditionalGeneration",
        like={"blocks": [("encoder", "led.encoder.layers")]},
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    _pair(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        like={
            "blocks": [("decoder", "prophetnet.decoder.layers")],
            "notes": frozenset({"attentions are scores"}),
        },
    ),
    _pair(
        "fsmt",
        "FSMTForConditionalGeneration",
        like={
            "blocks": [("encoder", "model.encoder.layers"), ("decoder", "model.decoder.layers")],
            "time_first": True,
        },
        langs=["a", "b"],
        src_vocab_size=VOCAB,
        tgt_vocab_size=VOCAB,
    ),
    _pair("plbart", "PLBartForConditionalGeneration"),
    _pair("mvp", "MvpForConditionalGeneration"),
]


def _vision(
    name: str,
    model: str,
    config: str = "",
    *,
    like: Mapping[str, Any] | None = None,
    size: int = 16,
    **changes: Any,
) -> Member:
    settings: dict[str, Any] = {"family": "vision", "cached": False, "masks": False, **(like or {})}
    batch = settings.pop("batch", lambda: images(size))
    return Member(
        name,
        build=of(model, config or model.removesuffix("Model") + "Config", **changes),
        batch=batch,
        **settings,
    )


def _frames() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


STAGES = {
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 2,
}
VISION = [
    _vision("vit", "ViTForImageClassification", "ViTConfig"),
    _vision("deit", "DeiTModel"),
    _vision("beit", "BeitModel"),
    _vision("dinov2", "Dinov2Model"),
    _vision("dinov2_with_registers", "Dinov2WithRegistersModel"),
    _vision("dinov3_vit", "DINOv3ViTModel"),
    _vision(
        "vit_mae",
        "ViTMAEModel",
        mask_ratio=0.0,
        like={"batch": lambda: {**images(), "noise": torch.linspace(0, 1, 16).repeat(2, 1)}},
    ),
    _vision("vit_msn", "ViTMSNModel"),
    _vision("ijepa", "IJepaModel"),
    _vision("data2vec-vision", "Data2VecVisionModel"),
    _vision("dpt", "DPTModel"),
    _vision(
        "yolos", "YolosModel", image_size=[16, 16], num_detection_tokens=3, use_mid_position_embeddings=False
    ),
    _vision("clip, vision", "CLIPVisionModel", "CLIPVisionConfig"),
    _vision("siglip, vision", "SiglipVisionModel", "SiglipVisionConfig"),
    _vision("aimv2, vision", "Aimv2VisionModel", "Aimv2VisionConfig"),
    _vision("mlcd", "MLCDVisionModel", "MLCDVisionConfig"),
    _vision(
        "imagegpt",
        "ImageGPTModel",
        like={"batch": lambda: {"input_ids": text()["input_ids"]}, "cached": True},
    ),
    _vision("swin", "SwinModel", **STAGES),
    _vision("swinv2", "Swinv2Model", **STAGES),
    _vision(
        "convnext",
        "ConvNextModel",
        like={"blocks": [(None, "encoder.stages")]},
        hidden_sizes=[8, 16],
        depths=[2, 2],
        num_stages=2,
    ),
    _vision(
        "convnextv2",
        "ConvNextV2Model",
        like={"blocks": [(None, "encoder.stages")]},
        hidden_sizes=[8, 16],
        depths=[2, 2],
        num_stages=2,
    ),
    _vision(
        "resnet",
        "ResNetModel",
        like={"blocks": [(None, "encoder.stages")]},
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        size=32,
    ),
    _vision(
        "segformer",
        "SegformerModel",
        like={"blocks": [(None, "stages")]},
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
    ),
    _vision(
        "poolformer",
        "PoolFormerModel",
        num_encoder_blocks=2,
        depths=[2, 2],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
    ),
    _vision("timesformer", "TimesformerModel", num_frames=2, like={"batch": _frames}),
    _vision("videomae", "VideoMAEModel", num_frames=2, tubelet_size=1, like={"batch": _frames}),
    _vision("vivit", "VivitModel", num_frames=2, tubelet_size=[1, 4, 4], like={"batch": _frames}),
]


def _audio(
    name: str, model: str, config: str = "", *, like: Mapping[str, Any] | None = None, **changes: Any
) -> Member:
    settings: dict[str, Any] = {
        "family": "audio",
        "cached": False,
        "masks": False,
        "batch": waves,
        "adds": ("encoder_attn",),
        **(like or {}),
    }
    return Member(
        name, build=of(model, config or model.removesuffix("Model") + "Config", **changes), **settings
    )


def _mel(bins: int = 16, length: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "input_features": torch.randn(2, bins, length, generator=torch.Generator().manual_seed(6)),
        "decoder_input_ids": text_pair()["decoder_input_ids"][:2],
    }


def _frames_of_sound(width: int = 16, length: int = 12) -> dict[str, Any]:
    return {"input_features": torch.randn(2, length, width, generator=torch.Generator().manual_seed(7))}


CONVOLVED = {
    "conv_dim": [8, 8],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
AUDIO = [
    _audio("wav2vec2", "Wav2Vec2Model", **CONVOLVED),
    _audio(
        "wav2vec2, stable norm",
        "Wav2Vec2Model",
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        **CONVOLVED,
    ),
    _audio("hubert", "HubertModel", **CONVOLVED),
    _audio("wavlm", "WavLMModel", num_buckets=16, max_bucket_distance=32, **CONVOLVED),
    _audio("unispeech", "UniSpeechModel", **CONVOLVED),
    _audio(
        "data2vec-audio",
        "Data2VecAudioModel",
        **{**CONVOLVED, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
    ),
    _audio("wav2vec2-conformer", "Wav2Vec2ConformerModel", conv_depthwise_kernel_size=3, **CONVOLVED),
    _audio(
        "wav2vec2-bert",
        "Wav2Vec2BertModel",
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=3,
        like={"batch": _frames_of_sound},
    ),
    _audio("sew", "SEWModel", **CONVOLVED),
    _audio(
        "audio-spectrogram-transformer",
        "ASTModel",
        num_mel_bins=16,
        max_length=24,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        like={
            "batch": lambda: {
                "input_values": torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(8))
            }
        },
    ),
    _audio(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        num_mel_bins=16,
        max_source_positions=16,
        like={"batch": _mel(), "cached": True, "generates": True},
    ),
    _audio(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        input_feat_per_channel=16,
        conv_channels=16,
        like={
            "batch": lambda: {
                **_frames_of_sound(16, 32),
                "decoder_input_ids": text_pair()["decoder_input_ids"][:2],
            },
            "cached": True,
        },
    ),
    _audio(
        "moonshine",
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        encoder_num_hidden_layers=3,
        decoder_num_hidden_layers=3,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4,
        like={
            "batch": lambda: {**waves(4000), "decoder_input_ids": text_pair()["decoder_input_ids"][:2]},
            "cached": True,
        },
    ),
]


LANGUAGE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGHT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE_TOKEN = 5


def _seeing(places: int) -> Callable[[], dict[str, Any]]:
    """Text around an image: its placeholders in every row, at two."""

    def batch() -> dict[str, Any]:
        ids = torch.randint(6, VOCAB, (2, 5 + places), generator=torch.Generator().manual_seed(9))
        ids[:, 2 : 2 + places] = IMAGE_TOKEN
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images(16)}

    return batch


def _both(
    name: str,
    model: str,
    config: str,
    batch: Callable[[], dict[str, Any]],
    *,
    like: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Member:
    settings: dict[str, Any] = {"family": "vision-language", "masks": False, **(like or {})}
    return Member(
        name,
        build=lambda: tiny_model(model_class(model), model_class(config)(**changes)),
        batch=batch,
        **settings,
    )


def _qwen_vl(places: int = 4) -> dict[str, Any]:
    given = _seeing(places)()
    del given["pixel_values"]
    kinds = (given["input_ids"] == IMAGE_TOKEN).int()
    patches = torch.randn(2 * places * 4, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(10))
    return {
        **given,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": kinds,
    }


def _contrasted() -> dict[str, Any]:
    return {**{k: v[:2] for k, v in text().items()}, **images(16)}


CLIP_TEXT = {k: v for k, v in LANGUAGE.items() if k not in ("num_key_value_heads", "head_dim")}
TOWERS = [("vision_tower", "model.vision_tower.encoder.layers")]
BOTH = [
    _both(
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        _seeing(4),
        text_config={"model_type": "llama", **LANGUAGE},
        vision_config={"model_type": "clip_vision_model", **SIGHT},
        image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN,
        like={"generates": True, "blocks": TOWERS, "edited": {"vision_tower": 0}},
    ),
    _both(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        _seeing(4),
        text_config={"model_type": "gemma", **LANGUAGE},
        vision_config={"model_type": "siglip_vision_model", **SIGHT, "projection_dim": WIDTH},
        image_token_id=IMAGE_TOKEN,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        like={"generates": True, "blocks": TOWERS},
    ),
    _both(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        _seeing(4),
        text_config=LANGUAGE,
        vision_config=SIGHT,
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        boi_token_index=4,
        eoi_token_index=3,
        like={"generates": True, "blocks": TOWERS},
    ),
    _both(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        _qwen_vl,
        text_config={
            **LANGUAGE,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=4,
        vision_end_token_id=3,
        video_token_id=2,
        like={"generates": True, "blocks": [("visual", "model.visual.blocks")]},
    ),
    _both(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        _qwen_vl,
        text_config={
            **LANGUAGE,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": WIDTH,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=4,
        vision_end_token_id=3,
        video_token_id=2,
        like={"generates": True, "blocks": [("visual", "model.visual.blocks")]},
    ),
    _both(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        _contrasted,
        text_config=CLIP_TEXT,
        vision_config=SIGHT,
        projection_dim=16,
        like={
            "cached": False,
            "hidden": False,
            "blocks": [
                ("text_model", "text_model.encoder.layers"),
                ("vision_model", "vision_model.encoder.layers"),
            ],
        },
    ),
    _both(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        _contrasted,
        text_config={**CLIP_TEXT, "max_position_embeddings": 16, "projection_size": WIDTH},
        vision_config=SIGHT,
        like={
            "cached": False,
            "hidden": False,
            "blocks": [
                ("text_model", "text_model.encoder.layers"),
                ("vision_model", "vision_model.encoder.layers"),
            ],
        },
    ),
    _both(
        "git",
        "GitForCausalLM",
        "GitConfig",
        _contrasted,
        **CLIP_TEXT,
        vision_config=SIGHT,
        like={
            "blocks": [
                ("image_encoder", "git.image_encoder.vision_model.encoder.layers"),
                ("encoder", "git.encoder.layer"),
            ]
        },
    ),
    _both(
        "visual_bert",
        "VisualBertModel",
        "VisualBertConfig",
        lambda: {
            **text(),
            "visual_embeds": torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(11)),
            "visual_attention_mask": torch.ones(3, 4),
        },
        **CLIP_TEXT,
        visual_embedding_dim=16,
        like={"cached": False},
    ),
]


def _sentences(**pooling: Any) -> Callable[[], nn.Module]:
    """A sentence encoder of sentence-transformers around a BERT, with a tokenizer of its own."""

    def made() -> nn.Module:
        from tempfile import TemporaryDirectory

        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Normalize, Pooling, Transformer

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = special + [f"w{i}" for i in range(VOCAB - len(special))]
        with TemporaryDirectory() as folder:
            of("BertModel", "BertConfig")().save_pretrained(folder)
            model_class("BertTokenizerFast")(vocab={word: i for i, word in enumerate(words)}).save_pretrained(
                folder
            )
            encoder = Transformer(folder)
        return SentenceTransformer(
            modules=[encoder, Pooling(WIDTH, **pooling), Normalize()], device="cpu"
        ).eval()

    return made


def _adapted(
    build: Callable[[], nn.Module], targets: Sequence[str], **settings: Any
) -> Callable[[], nn.Module]:
    """A model under an adapter whose matrices are not zero."""

    def made() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(build(), LoraConfig(r=4, target_modules=list(targets), **settings)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(12))
        return model

    return made


def _offloaded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        from accelerate import cpu_offload

        return cpu_offload(build(), execution_device=torch.device("cpu"))

    return made


def _offloaded_to_disk(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        from tempfile import mkdtemp

        from accelerate import disk_offload

        return disk_offload(build(), mkdtemp(), execution_device=torch.device("cpu"))

    return made


WRAPPED = {"family": "wrapper", "batch": text, "generates": True}
LINEARS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
LLAMA, GPT2 = of("LlamaForCausalLM", "LlamaConfig"), of("GPT2LMHeadModel", "GPT2Config")
SENTENCES = {
    "family": "wrapper",
    "batch": text,
    "hidden": False,
    "cached": False,
    "blocks": [(None, "0.model.encoder.layer")],
    "packed": True,
}
WRAPPERS = [
    Member("sentence-transformers, mean", build=_sentences(), **SENTENCES),
    Member("sentence-transformers, cls", build=_sentences(pooling_mode="cls"), **SENTENCES),
    Member("peft LoRA on llama", build=_adapted(LLAMA, LINEARS), **WRAPPED),
    Member("peft DoRA on llama", build=_adapted(LLAMA, LINEARS, use_dora=True), **WRAPPED),
    Member(
        "peft LoRA on gpt2",
        build=_adapted(GPT2, ("c_attn", "c_proj", "c_fc"), fan_in_fan_out=True),
        **WRAPPED,
    ),
    Member("accelerate, offloaded llama", build=_offloaded(LLAMA), **WRAPPED),
    Member("accelerate, gpt2 on disk", build=_offloaded_to_disk(GPT2), **WRAPPED),
]
MEMBERS = [*DECODERS, *EXPERTS, *STATES, *ENCODERS, *PAIRS, *VISION, *AUDIO, *BOTH, *WRAPPERS]
