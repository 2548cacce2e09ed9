"""LLaMA-Factory's files run unchanged: every key of its arguments is known, and means what it meant or is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.recipe.llamafactory import NO_EFFECT, REFUSED, RENAMED
from tuneloop.finetune.recipe.read import parse_recipe, read_recipe
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.storage.errors import InvalidInput

# In the style of its examples/train_lora, with what its users add to them.
SFT = """\
### model
model_name_or_path: smollm2-135m
trust_remote_code: true
flash_attn: auto

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
dataset_dir: data
template: default
cutoff_len: 1024
max_samples: 500
overwrite_cache: true
preprocessing_num_workers: 4
dataloader_num_workers: 2

### output
output_dir: saves/smollm2/lora/sft
logging_steps: 5
save_steps: 200
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: false
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 50
"""
# Names of the arguments of its classes and of transformers' TrainingArguments, which its files mix.
ITS_KEYS = """
model_name_or_path adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab split_special_tokens
add_tokens add_special_tokens new_special_tokens_config init_special_tokens model_revision low_cpu_mem_usage
rope_scaling flash_attn shift_attn mixture_of_depths use_unsloth use_unsloth_gc enable_liger_kernel moe_aux_loss_coef
disable_gradient_checkpointing use_reentrant_gc upcast_layernorm upcast_lmhead_output train_from_scratch infer_backend
offload_folder use_kv_cache use_v1_kernels infer_dtype hf_hub_token ms_hub_token om_hub_token print_param_status
trust_remote_code quantization_method quantization_bit quantization_type double_quantization quantization_device_map
fp8 fp8_backend fp8_enable_fsdp_float8_all_gather image_max_pixels image_min_pixels image_do_pan_and_scan
crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate
export_dir export_size export_device export_quantization_bit export_quantization_dataset
export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id vllm_maxlen
vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size
sglang_config sglang_lora_backend use_kt kt_optimize_rule cpu_infer chunk_size mode kt_maxlen kt_use_cuda_graph
kt_mode kt_force_think template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt mask_history
streaming buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size
preprocessing_num_workers max_samples eval_num_beams ignore_pad_token_for_loss val_size eval_on_each_dataset packing
neat_packing tool_format default_system enable_thinking tokenized_path freeze_trainable_layers
freeze_trainable_modules freeze_extra_modules additional_target lora_alpha lora_dropout lora_rank lora_target
loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init pissa_iter pissa_convert create_new_adapter
module_dropout oft_rank oft_block_size oft_target pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing
kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
reward_model_quantization_bit reward_model_type ld_alpha use_galore galore_target galore_rank
galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank
apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise
apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval
badam_update_ratio badam_mask_mode badam_verbose use_swanlab swanlab_project swanlab_workspace swanlab_run_name
swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret pure_bf16 stage
finetuning_type use_llama_pro use_adam_mini use_mca use_muon use_dft_loss freeze_vision_tower
freeze_multi_modal_projector freeze_language_model compute_accuracy disable_shuffling early_stopping_steps plot_loss
include_effective_tokens_per_second do_sample temperature top_p top_k num_beams max_length max_new_tokens
repetition_penalty length_penalty skip_special_tokens ray_run_name ray_storage_path ray_storage_filesystem
ray_num_workers resources_per_worker placement_strategy ray_init_kwargs overwrite_output_dir
predict_with_generate generation_max_length generation_num_beams generation_config warmup_ratio group_by_length
save_safetensors evaluation_strategy no_cuda
"""


def given(**values: Any) -> tuple[Recipe, tuple[str, ...], list[str]]:
    return parse_recipe({"model_name_or_path": "m", **values}, where="in a.yaml")


def test_an_example_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(SFT)
    recipe, auto, notices = read_recipe(tmp_path / "sft.yaml", [])
    assert auto == ()
    assert recipe == Recipe(
        model_name_or_path="smollm2-135m",
        trust_remote_code=True,
        lora_alpha=16,
        dataset=("identity", "alpaca_en_demo"),
        cutoff_len=1024,
        max_samples=500,
        output_dir="saves/smollm2/lora/sft",
        logging_steps=5,
        save_strategy="steps",
        save_steps=200,
        plot_loss=True,
        overwrite_output_dir=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=2,
        warmup_ratio=0.1,
        val_size=0.1,
        per_device_eval_batch_size=1,
        eval_strategy="steps",
        eval_steps=50,
    )
    told = [notice.split()[0] for notice in notices]
    assert told == [
        "flash_attn", "do_train", "template", "overwrite_cache", "preprocessing_num_workers",
        "dataloader_num_workers", "save_only_model", "ddp_timeout",
    ]  # fmt: skip
    assert "has no effect: the checkpoint's own chat template is used" in notices[2]


def test_every_key_of_its_arguments_is_known() -> None:
    known = {*Recipe.model_fields, *RENAMED, *NO_EFFECT, *REFUSED}
    assert [key for key in ITS_KEYS.split() if key not in known] == []


def test_every_key_of_transformers_is_known() -> None:
    from transformers import Seq2SeqTrainingArguments

    known = {*Recipe.model_fields, *RENAMED, *NO_EFFECT, *REFUSED}
    names = [field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)]
    assert [name for name in names if name not in known and not name.startswith("_")] == []


def test_each_key_means_one_thing() -> None:
    kinds = [set(Recipe.model_fields), set(RENAMED), set(NO_EFFECT), set(REFUSED)]
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize(
    ("values", "key", "result"),
    [
        ({"neat_packing": True}, "packing", True),
        ({"neat_packing": True, "packing": True}, "packing", True),
        ({"neat_packing": False, "packing": True}, "packing", True),
        ({"disable_gradient_checkpointing": True}, "gradient_checkpointing", False),
        ({"disable_gradient_checkpointing": False}, "gradient_checkpointing", True),
        ({"evaluation_strategy": "epoch"}, "eval_strategy", "epoch"),
        ({"use_swanlab": True, "report_to": "none"}, "report_to", ("swanlab",)),
        ({"use_swanlab": True, "report_to": "wandb"}, "report_to", ("swanlab", "wandb")),
        ({"report_to": ["none"]}, "report_to", ()),
        ({"max_steps": -1}, "max_steps", None),
        ({"warmup_steps": 0.1}, "warmup_ratio", 0.1),
        ({"warmup_steps": 10}, "warmup_steps", 10),
    ],
)
def test_other_names_and_values_become_ours(values: dict[str, Any], key: str, result: object) -> None:
    recipe, _, notices = given(**values)
    assert getattr(recipe, key) == result
    assert notices == []


def test_two_names_of_one_key_must_agree() -> None:
    with pytest.raises(InvalidInput, match=r"neat_packing in a\.yaml both set packing, and differently"):
        given(packing=False, neat_packing=True)


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("quantization_bit", 4, "bf16: true"),
        ("use_galore", True, "choose an `optim`"),
        ("use_badam", True, "choose an `optim`"),
        ("pissa_init", True, "use_rslora or use_dora"),
        ("deepspeed", "ds_z3.json", "num_processes"),
        ("ray_num_workers", 4, "num_processes"),
        ("image_max_pixels", 262144, "without images"),
        ("hf_hub_token", "hf_x", "TUNELOOP_HUB_TOKEN"),
        ("push_to_hub", True, "upload the output folder"),
        ("model_revision", "v2", "org/name@revision"),
        ("predict_with_generate", True, "through the server"),
        ("rope_scaling", "linear", "leave it out"),
        ("metric_for_best_model", "eval_accuracy", "lowest validation loss"),
        ("use_cpu", True, "--device cpu"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_way_out(key: str, value: object, way_out: str) -> None:
    with pytest.raises(InvalidInput) as error:
        given(**{key: value})
    assert error.value.message.startswith(f"{key} in a.yaml cannot be used. ")
    assert way_out in error.value.message
    assert error.value.param == key
    assert str(value) not in error.value.message or key != "hf_hub_token"


@pytest.mark.parametrize(
    ("key", "value"),
    [("quantization_bit", None), ("use_galore", False), ("model_revision", "main"), ("label_smoothing_factor", 0.0),
     ("metric_for_best_model", "eval_loss"), ("ray_num_workers", 1), ("deepspeed", None), ("push_to_hub", False)],
)  # fmt: skip
def test_what_switches_it_off_is_taken(key: str, value: object) -> None:
    assert given(**{key: value})[0] == given()[0]


@pytest.mark.parametrize("stage", ["pt", "rm", "ppo", "dpo", "kto"])
def test_other_stages_are_refused_by_name(stage: str) -> None:
    with pytest.raises(InvalidInput, match=rf"The stage '{stage}' in a\.yaml is not supported yet"):
        given(stage=stage)


def test_oft_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"The finetuning_type 'oft' in a\.yaml is not supported yet"):
        given(finetuning_type="oft")


def test_optimisers_that_need_more_than_a_name_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"optim in a\.yaml is 'galore_adamw'; it can be adamw_torch, "):
        given(optim="galore_adamw")
