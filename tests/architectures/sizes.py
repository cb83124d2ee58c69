"""Rules that make a configuration tiny, by the names of its fields.

Widths differ wherever a configuration allows it, so that a transposed weight does not fit: hidden
states of 64, 4 heads of 24, 2 of them for keys and values, 112 inside the MLP, 48 inside an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HIDDEN = 64
HEADS = 4
GROUPS = 2
HEAD = 24
INNER = 112
EXPERT = 48
VOCABULARY = 2112
"""Above the 2048 tokens of the demo's tokenizer, so that no text contains an image's token."""
POSITIONS = 512
WINDOW = 8
IMAGE = 32
PATCH = 8

_SIZES: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        "hidden_size d_model n_embd dim emb_dim embed_dim embedding_dim embedding_size "
        "word_embed_proj_dim encoder_hidden_size decoder_hidden_size out_hidden_size "
        "text_hidden_size adapter_out_dim adapter_in_dim projection_dim projector_hidden_size "
        "backbone_hidden_size hidden_size_global input_embedding_size output_embedding_size "
        "attention_hidden_size lru_width vision_hidden_size projection_hidden_size "
        "projection_hidden_dim image_text_hidden_size patch_embed_hidden_size "
        "input_size vision_output_dim projector_input_dim projector_output_dim output_dim "
        "projection_intermediate_size conv_dim channels moe_hidden_size output_channels "
        "codebook_dim",
    ),
    (
        HEADS,
        "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads swa_num_attention_heads num_sliding_attention_heads "
        "resampler_heads resampler_n_heads conf_num_attention_heads index_n_heads "
        "linear_num_value_heads linear_num_heads num_decoder_attention_heads",
    ),
    (
        GROUPS,
        "num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
        "num_query_groups depth encoder_layers decoder_layers num_global_layers num_lstm_layers "
        "resampler_depth conf_num_hidden_layers num_blocks decoder_num_layers",
    ),
    (
        HEAD,
        "head_dim swa_head_dim global_head_dim kv_channels dim_head d_head v_head_dim "
        "attention_head_dim attention_head_size d_kv",
    ),
    (
        INNER,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff dim_ff n_inner "
        "ffn_hidden_size intermediate_size_mlp dense_intermediate_size mlp_dim "
        "shared_intermediate_size mlp_hidden_size decoder_intermediate_size d_inner "
        "alignment_intermediate_size",
    ),
    (
        EXPERT,
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size share_expert_dim "
        "moe_shared_intermediate_size",
    ),
    (4, "n_routed_experts num_experts num_local_experts moe_num_experts n_experts zero_expert_num"),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts topk "
        "pos_emb_height pos_emb_width posemb_grid_size",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups "
        "num_res_blocks n_layers_per_attn_res_block num_nextn_predict_layers "
        "first_k_dense_replace num_dense_layers n_shared_experts "
        "num_shared_experts moe_num_shared_experts mtp_num_layers mtp_num_hidden_layers",
    ),
    (32, "kv_lora_rank o_lora_rank"),
    (40, "q_lora_rank"),
    (
        16,
        "qk_nope_head_dim linear_key_head_dim linear_head_dim index_head_dim d_rel laurel_rank "
        "mamba_d_state state_size ssm_state_size hidden_size_per_layer_input adapter_rank "
        "mamba_chunk_size chunk_size hc_lowrank loop_gate_rank mamba_head_dim mamba_d_head "
        "mamba_headdim ple_embed_dim router_hidden_size lwe_dim num_position_embeddings "
        "time_step_rank mamba_dt_rank",
    ),
    (8, "qk_rope_head_dim rotary_dim index_topk"),
    (24, "linear_value_head_dim"),
    (8, "mamba_n_heads mamba_num_heads"),
    (128, "mamba_d_ssm"),
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
        "max_sequence_length original_max_position_embeddings max_target_positions seq_length",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size window_size attention_window_size "
        "attention_chunk_size local_attention local_attention_window_len keep_window_size",
    ),
    (IMAGE, "image_size resolution max_image_size base_channels latent_channels num_embeddings"),
    (32, "codebook_size image_token_embed_dim downsample_hidden_size"),
    (PATCH, "patch_size"),
)
RULES = {name: value for value, names in _SIZES for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers")
TOWER = re.compile(r"(?:vision|audio|image|vq|sam|qformer|perceiver|protein|vae|speech)")


def representatives(lists: Sequence[Sequence[Any]], least: int) -> list[int]:
    """Return the layers that show each combination of the values of per-layer lists.

    Args:
        lists: per field, one value for every layer; all of one length.
        least: how many layers to return at least, if there are so many.
    """
    count = len(lists[0]) if lists else least
    first: dict[str, int] = {}
    for index in range(count):
        first.setdefault(repr([values[index] for values in lists]), index)
    chosen = set(first.values())
    for index in range(count):
        if len(chosen) >= least:
            break
        chosen.add(index)
    return sorted(chosen)


def tiny_rope(
    rope: Mapping[str, Any], sizes: Mapping[str, Any], ignored: Iterable[str] = ()
) -> dict[str, Any]:
    """Return rotary parameters for the width of the heads in ``sizes``.

    Args:
        rope: the default's, possibly one mapping per type of layer.
        sizes: the sizes of the tiny configuration.
        ignored: keys that the class lets pass; it reads ``mrope_section`` if that is among them.
    """
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {
            key: tiny_rope(value, sizes) if isinstance(value, Mapping) else value
            for key, value in rope.items()
        }
    head = sizes.get("qk_rope_head_dim") or sizes.get("head_dim") or HIDDEN // HEADS
    half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    made = dict(rope)
    for key in made.keys() & {"long_factor", "short_factor"}:
        made[key] = [1.0] * half
    if "original_max_position_embeddings" in made:
        made["original_max_position_embeddings"] = POSITIONS
    if "mrope_section" in made or "mrope_section" in ignored:
        parts = len(made.get("mrope_section", (1, 1, 1)))
        made["mrope_section"] = [half // parts + (i < half % parts) for i in range(parts)]
    return made


def special_tokens(fields: Iterable[str]) -> dict[str, int]:
    """Return ids of the tokens of images and other media, beyond those of the tokenizer."""
    names = [f for f in fields if re.search(r"(?:_token_id|_token_index|_start_id|_end_id)$", f)]
    words = ("bos_", "eos_", "pad_", "decoder_start_", "unk_", "sep_", "cls_", "mask_")
    media = sorted(name for name in names if not name.startswith(words))
    return {name: VOCABULARY - 1 - index for index, name in enumerate(media)}
