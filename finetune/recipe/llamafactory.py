"""What LLaMA-Factory 0.9.5's keys mean here, transformers' TrainingArguments among them. It knows names and no files.

A key of theirs is one of four things: it is a key of ours too (then it is not in here, unless its value has to be
changed), it has another name here (RENAMED), it is understood but changes nothing here (NO_EFFECT, with the reason), or
it asks for what Tuneloop cannot do (REFUSED, with the way out), unless its value switches just that off.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Values = Mapping[str, Any]


def _spread(groups: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType({key: text for text, keys in groups.items() for key in keys.split()})


NO_EFFECT: Mapping[str, str] = _spread(
    {
        "the checkpoint's own chat template is used, the same that serves": "template tool_format",
        "trackers take it from their own settings (SWANLAB_PROJ_NAME, SWANLAB_WORKSPACE, SWANLAB_MODE ...)": (
            "swanlab_project swanlab_workspace swanlab_mode swanlab_logdir project"
        ),
        "rows are tokenised once and kept by their content": (
            "overwrite_cache tokenized_path preprocessing_batch_size preprocessing_num_workers"
        ),
        "rows are tokenised before training and read from memory": (
            "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names"
        ),
        "batches hold no padding": (
            "group_by_length sortish_sampler length_column_name train_sampling_strategy ignore_pad_token_for_loss "
            "pad_to_multiple_of eval_do_concat_batches"
        ),
        "a last batch that is not full is trained on too": "dataloader_drop_last",
        "`tuneloop train` trains; validation follows eval_strategy": "do_train do_eval",
        "attention is chosen by the device, and exact": "flash_attn block_diag_attn",
        "how the model is loaded is chosen by the device": (
            "use_fast_tokenizer low_cpu_mem_usage offload_folder device_map compute_dtype model_max_length"
        ),
        "models are kept in the home (--home, TUNELOOP_HOME)": "cache_dir adapter_folder",
        "kernels are chosen by the device": (
            "enable_liger_kernel use_liger_kernel liger_kernel_config use_unsloth use_unsloth_gc use_reentrant_gc "
            "gradient_checkpointing_kwargs use_v1_kernels torch_compile torch_compile_backend torch_compile_mode tf32 "
            "torch_empty_cache_steps use_cache"
        ),
        "losses are computed in float32 in any case": "upcast_lmhead_output",
        "processes are joined by the launcher": (
            "ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend "
            "ddp_static_graph local_rank accelerator_config log_on_each_node save_on_each_node"
        ),
        "every point of the curves has tokens, speed and accuracy": (
            "include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second "
            "compute_accuracy average_tokens_across_devices prediction_loss_only"
        ),
        "points of the curves follow logging_steps alone": (
            "logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica disable_tqdm "
            "skip_memory_metrics print_param_status debug"
        ),
        "every checkpoint can be resumed, and all are safetensors": (
            "save_only_model save_safetensors restore_callback_states_from_checkpoint enable_jit_checkpoint"
        ),
        "a resumed run goes on with the same data order": "ignore_data_skip",
        "seeds reproduce runs on the same machine in any case": "full_determinism",
        "the best checkpoint is the one with the lowest validation loss": "greater_is_better",
        "it belongs to generating, and training generates nothing": (
            "do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty "
            "skip_special_tokens eval_num_beams generation_max_length generation_num_beams generation_config "
            "infer_backend infer_dtype use_kv_cache vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
            "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend"
        ),
        "it belongs to exporting": (
            "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
            "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id"
        ),
        "it belongs to a stage other than sft": (
            "pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight "
            "simpo_gamma ld_alpha ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model "
            "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
            "reward_model_quantization_bit reward_model_type"
        ),
        "it is a parameter of something that this recipe leaves off": (
            "loraplus_lr_embedding pissa_iter pissa_convert oft_rank oft_block_size oft_target module_dropout "
            "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise "
            "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
            "apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode "
            "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose quantization_method "
            "quantization_type double_quantization quantization_device_map fp8_backend "
            "fp8_enable_fsdp_float8_all_gather init_special_tokens fsdp_config kt_optimize_rule cpu_infer chunk_size "
            "mode kt_maxlen kt_use_cuda_graph kt_mode kt_force_think hub_model_id hub_strategy hub_private_repo "
            "hub_always_push hub_revision freeze_vision_tower freeze_multi_modal_projector freeze_language_model "
            "optim_target_modules eval_accumulation_steps eval_use_gather_object batch_eval_metrics "
            "include_for_metrics trackio_space_id trackio_bucket_id trackio_static_space_id"
        ),
    }
)

# Each text says why and names the way out. A value that switches the thing off is taken without a word.
_OFF: frozenset[Any] = frozenset({None, False, "", "none", "no", "off"})
_OFF_TOO: Mapping[str, frozenset[Any]] = MappingProxyType(
    {
        "model_revision": frozenset({"main"}),
        "label_smoothing_factor": frozenset({0}),
        "label_smoothing": frozenset({0}),
        "metric_for_best_model": frozenset({"loss", "eval_loss"}),
        "eval_delay": frozenset({0}),
        "ray_num_workers": frozenset({1}),
    }
)
REFUSED: Mapping[str, str] = _spread(
    {
        "Quantised training is not supported yet; leave it out, and use bf16: true on an accelerator to save memory": (
            "quantization_bit fp8"
        ),
        "GaLore, APOLLO, BAdam, Muon and Adam-mini are not supported yet; leave it out and choose an `optim`": (
            "use_galore use_apollo use_badam use_muon use_adam_mini"
        ),
        "LoRA+ and PiSSA are not supported yet; leave it out, or choose use_rslora or use_dora": (
            "loraplus_lr_ratio pissa_init"
        ),
        "The losses here are plain cross-entropy; leave it out": (
            "use_dft_loss use_asft_loss use_eaft_loss asft_alpha eaft_alpha label_smoothing_factor label_smoothing "
            "moe_aux_loss_coef"
        ),
        "The model's shape is trained as it is; leave it out": (
            "use_llama_pro mixture_of_depths train_from_scratch shift_attn rope_scaling upcast_layernorm"
        ),
        "The tokenizer is used as it is, so that the result can be served by it; leave it out": (
            "resize_vocab add_tokens add_special_tokens new_special_tokens_config split_special_tokens"
        ),
        "Text models alone are trained; leave it out and use data without images, video and audio": (
            "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
            "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate"
        ),
        "Sharded training is not supported yet; leave it out, and set num_processes for several devices": (
            "deepspeed fsdp parallelism_config use_mca use_megatron use_kt"
        ),
        "Ray is not supported yet; leave it out, and set num_processes for several devices": (
            "use_ray ray_run_name ray_storage_path ray_storage_filesystem ray_num_workers resources_per_worker "
            "placement_strategy ray_init_kwargs"
        ),
        "Secrets do not belong into a recipe, which is kept with the result; set TUNELOOP_HUB_TOKEN instead": (
            "hf_hub_token hub_token"
        ),
        "Secrets do not belong into a recipe, which is kept with the result; log in with the service's own tool": (
            "ms_hub_token om_hub_token swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url"
        ),
        "Write the revision behind the model's name instead, as in `model_name_or_path: org/name@revision`": (
            "model_revision"
        ),
        "Rows are always shuffled, reproducibly by `data_seed`; leave it out": "disable_shuffling",
        "Validation takes all of its data at once; leave it out": "eval_on_each_dataset eval_on_start eval_delay",
        "The best checkpoint is the one with the lowest validation loss; leave it out": "metric_for_best_model",
        "Choose per_device_train_batch_size yourself, or write `auto` for it": "auto_find_batch_size",
        "Results stay on this machine; leave it out, and upload the output folder yourself": "push_to_hub",
        "A recipe trains and nothing else; ask the result through the server": "do_predict predict_with_generate",
        "LLaMA-Factory's `eval` is another command; a recipe trains and nothing else": (
            "task task_dir lang n_shot save_dir"
        ),
        "Name the device on the command line instead: `tuneloop train ... --device cpu`": "use_cpu no_cuda",
        "Validation runs in the recipe's own precision; leave it out": "bf16_full_eval fp16_full_eval",
    }
)


# Values of keys of ours that are theirs alone.
_LATER: Mapping[tuple[str, str], str] = MappingProxyType(
    {("stage", stage): "it can be sft" for stage in ("pt", "rm", "ppo", "dpo", "kto")}
    | {("finetuning_type", "oft"): "it can be lora, freeze or full"}
)


def refused_value(key: str, value: Any) -> str | None:
    """What a key of ours can be instead, for a value that only LLaMA-Factory has."""
    return _LATER.get((key, value)) if isinstance(value, str) else None


def refusal(key: str, value: Any) -> str | None:
    """Why a known key cannot be had with this value, or None if the value switches it off."""
    if _hashable(value) and (value in _OFF or value in _OFF_TOO.get(key, ())):
        return None
    return REFUSED[key]


def _same(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {name: value}


def _neat_packing(value: Any) -> dict[str, Any]:
    return {"packing": value} if value is not False else {}


def _disable_gradient_checkpointing(value: Any) -> dict[str, Any]:
    return {"gradient_checkpointing": not value if isinstance(value, bool) else value}


def _use_swanlab(value: Any) -> dict[str, Any]:
    return {"report_to": ("swanlab",)} if value is True else {}


RENAMED: Mapping[str, Callable[[Any], dict[str, Any]]] = MappingProxyType(
    {
        "neat_packing": _neat_packing,
        "disable_gradient_checkpointing": _disable_gradient_checkpointing,
        "evaluation_strategy": _same("eval_strategy"),
        "use_swanlab": _use_swanlab,
        "swanlab_run_name": _same("run_name"),
        "per_gpu_train_batch_size": _same("per_device_train_batch_size"),
        "per_gpu_eval_batch_size": _same("per_device_eval_batch_size"),
    }
)

# Their ways to write "none of it" for keys of ours.
_NOTHING: Mapping[str, frozenset[Any]] = MappingProxyType(
    {"max_steps": frozenset({-1, "-1"}), "report_to": frozenset({"none"}), "save_total_limit": frozenset({0})}
)


def adapt(key: str, value: Any) -> dict[str, Any]:
    """Key and value of ours for a key that both have; `{}` leaves it at its default."""
    if _hashable(value) and value in _NOTHING.get(key, ()):
        return {}
    if key == "report_to" and value == ["none"]:
        return {}
    if key == "warmup_steps" and isinstance(value, float) and 0 < value < 1:
        return {"warmup_ratio": value}  # transformers 5 reads a share out of it
    return {key: value}


def _hashable(value: Any) -> bool:
    return isinstance(value, (str, int, float, type(None)))
