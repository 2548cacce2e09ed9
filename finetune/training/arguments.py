"""A recipe as transformers' TrainingArguments. What the trainer does itself (batches, saving, validation) stays off."""

from typing import TYPE_CHECKING

from ..failures import RunFailed
from ..recipe.recipe import Recipe
from ..run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


def choose_device(name: str | None) -> "torch.device":
    """The device that a run names, or the accelerator that torch finds, or the CPU."""
    import torch

    if name is not None:
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def mixed_precision(recipe: Recipe, device: "torch.device") -> str:
    """`no`, `bf16` or `fp16`. Nobody's wish on an accelerator that can is bf16; on a CPU it is float32.

    A CPU emulates bfloat16 unless it has units for it, about eight times slower than float32.
    """
    import torch

    if recipe.fp16 and device.type == "cpu":
        raise RunFailed(
            "fp16 needs an accelerator; this run is on a CPU. Leave it out (float32), or set bf16: true.", param="fp16"
        )
    if recipe.fp16:
        return "fp16"
    if recipe.bf16:
        return "bf16"
    if recipe.pure_bf16 or recipe.fp32 or device.type == "cpu":
        return "no"
    return "bf16" if torch.amp.is_autocast_available(device.type) and _has_bf16(device) else "no"


def training_arguments(
    recipe: Recipe, run: RunFolder, *, device: "torch.device", total_steps: int, checkpointing: bool
) -> "TrainingArguments":
    """All that transformers' Trainer is to know. Its one "epoch" is the whole run, and one batch is one whole step."""
    from transformers import TrainingArguments

    precision = mixed_precision(recipe, device)
    warmup = recipe.warmup_steps or int(total_steps * recipe.warmup_ratio + 0.5)
    return TrainingArguments(
        output_dir=str(run.path / "trainer"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=total_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        lr_scheduler_kwargs=dict(recipe.lr_scheduler_kwargs),
        warmup_steps=warmup,
        optim=recipe.optim,
        optim_args=recipe.optim_args,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.max_grad_norm,
        neftune_noise_alpha=recipe.neftune_noise_alpha,
        seed=recipe.seed,
        data_seed=recipe.data_seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        logging_strategy="steps",
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        include_num_input_tokens_seen="no",
        accelerator_config={"dispatch_batches": False, "even_batches": False},
    )


def _has_bf16(device: "torch.device") -> bool:
    import torch

    module = torch.get_device_module(device)
    supported = getattr(module, "is_bf16_supported", None)
    return bool(supported()) if supported is not None else False
