"""What the rules of ``sizes`` do not know: settings of single types, and types left out.

``KINDS`` of layers are chosen so that each kind occurs, and so that layers which share weights or
states with others do.
"""

from __future__ import annotations

from typing import Any

_NEEDS_IMAGE = "Its forward pass takes no text without an image."
_NEEDS_STATES = "A draft model, which needs the key and value states of another model."
_AUDIO_CODES = "A decoder of audio codes, not of text."
NO_TEXT_DECODER: dict[str, str] = {
    "bert-generation": "An encoder: a decoder only with is_decoder in its configuration.",
    "blip": _NEEDS_IMAGE,
    "blip-2": _NEEDS_IMAGE,
    "diffusion_gemma": "A block diffusion model: it does not predict the next token.",
    "gemma4_assistant": _NEEDS_STATES,
    "gemma4_unified_assistant": _NEEDS_STATES,
    "idefics": _NEEDS_IMAGE,
    "instructblip": _NEEDS_IMAGE,
    "instructblipvideo": _NEEDS_IMAGE,
    "kosmos-2": _NEEDS_IMAGE,
    "moshi": _AUDIO_CODES,
    "musicgen": _AUDIO_CODES,
    "musicgen_melody": _AUDIO_CODES,
    "pi0": "A model of robot actions, not of text.",
    "trocr": "The decoder of an encoder-decoder model.",
}

Settings = dict[str, Any]
_LINEAR, _FULL, _SLIDING = "linear_attention", "full_attention", "sliding_attention"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DENSE_FIRST = ["dense", "sparse", "sparse"]
_IMAGE_TOKEN = {"vocabulary_map": {"<image>": 2111, "IMGIMGAZ": 2110, "IMGIMGBZ": 2109}}
_SHARED = {"layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"], "num_hidden_layers": 4}
_QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 24,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_GEMMA3N: Settings = {
    "num_hidden_layers": 5,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL],
    "num_kv_shared_layers": 2,
    "intermediate_size": [112] * 5,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
}
_DOTS3: Settings = {
    "layer_types": ["indexed_attention", _SLIDING, "indexed_attention"],
    "mlp_layer_types": _DENSE_FIRST,
    "num_hidden_layers": 3,
    "per_layer_config": {1: {"kv_lora_rank": 24, "qk_nope_head_dim": 16}},
}
_CONVOLUTION: Settings = {"layer_types": ["conv", _FULL, "conv"]}
_LLAMA4: Settings = {"moe_layers": [1]}
_LOOP: Settings = {"loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2}
OVERRIDES: dict[str, Settings] = {
    "apertus1p5": {
        "image_token_offset": 1900,
        "audio_token_offset": 1932,
        "image_token_id": 2111,
        "audio_token_id": 2110,
    },
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": _IMAGE_TOKEN,
    "cohere_compass": {"text_config": {"rope_parameters": {_FULL: _ROPE, _SLIDING: _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {_FULL: _ROPE, _SLIDING: _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": _DENSE_FIRST, "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [32, 64]}},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "audio_config": {"adapter_input_size": 64},
        "vision_config": {"mlp_layer_types": ["dense", "sparse"]},
    },
    "dots3_note_text": _DOTS3,
    "emu3": _IMAGE_TOKEN,
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [48, 40],
            "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
        }
    },
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
    },
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL, _LINEAR]},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 24},
    "hunyuan_v1_moe": {"head_dim": 24},
    "hunyuan_vl": {"text_config": {"head_dim": 24}},
    "inkling2_loop": {"text_config": _LOOP},
    "inkling2_loop_text": _LOOP,
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "lfm2_vl": {"text_config": _CONVOLUTION},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 24},
    "mistral4": {"qk_nope_head_dim": 8, "qk_head_dim": 16},
    "mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "num_global_layers": 1,
            "vision_output_dim": 192,
            "intermediate_layers_indices": [0, 1],
        },
    },
    "molmo2": {
        "vision_config": {"image_size": [32, 32]},
        "adapter_config": {"vision_feature_layer": [1, 0]},
    },
    "muse_spark": {"audio_config": {"hidden_sizes": [16, 16, 16, 32], "depths": [1, 1, 1, 1]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [4, 4, 4]}}},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "step3p7": {"text_config": {"sliding_window": 8}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [32, 64]}}},
    "xlnet": {"d_head": 16},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {**_SHARED, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": _SHARED,
    "zaya": {"num_experts_per_tok": 1},
}

RUN: dict[str, str] = {"llama4": "language_model"}
"""Type → part to run instead: ``Llama4ForConditionalGeneration.forward`` of transformers 5.24 reads
an output that its language model does not return."""

NOT_BUILT: dict[str, str] = {
    "blt": "A model of bytes, whose own tokenizer is needed to make patches of them.",
    "fast_vlm": "Its vision tower needs the library timm.",
    "gemma3n": "Its vision tower needs the library timm.",
    "perception_lm": "Its vision tower needs the library timm.",
}
