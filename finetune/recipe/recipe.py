"""A recipe: everything that decides a training run, under LLaMA-Factory's names where it has them.

It knows no file and no model: `read.py` makes it from YAML and command lines, `resolve.py` fills in what is `auto`.
A recipe is frozen, refuses unknown keys, and travels as JSON inside a run's spec.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .checks import contradiction


def _names(value: Any) -> Any:
    """LLaMA-Factory writes lists as `a,b`; YAML may give real ones."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Auto = Literal["auto"]
Interval = Literal["no", "steps", "epoch"]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
# Those that take nothing but a name; the ones after sgd need bitsandbytes.
Optimiser = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd", "adamw_8bit", "adamw_bnb_8bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit", "ademamix",
]  # fmt: skip


class Recipe(BaseModel):
    """Defaults are what a person who gives only a model and a data set would want."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # Model
    model_name_or_path: str = Field(description="Base model: a served name, a source, or a folder.")
    adapter_name_or_path: str | None = Field(
        default=None, description="Adapter to go on from: `name`, `name@3`, or a folder."
    )
    create_new_adapter: bool = Field(
        default=False, description="Leave that adapter as it is and train a new one on top; the result holds both."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the checkpoint.")

    # Method
    stage: Literal["sft"] = Field(default="sft", description="What is trained: `sft`, supervised.")
    finetuning_type: Literal["lora", "freeze", "full"] = Field(default="lora", description="Which weights are trained.")
    lora_rank: int = Field(default=8, ge=1, description="Rank of the update.")
    lora_alpha: float | None = Field(default=None, gt=0, description="Scale of the update; empty: twice the rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before A.")
    lora_target: Names = Field(
        default=("all",), description="Modules: names, one regular expression, or `all` linear ones but the LM head."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = Field(default=False, description="Train magnitudes too (DoRA).")
    rank_pattern: dict[str, int] = Field(default={}, description="Other ranks for modules that match.")
    alpha_pattern: dict[str, float] = Field(default={}, description="Other alphas for modules that match.")
    additional_target: Names = Field(
        default=(), description="Modules trained in full beside LoRA; the result is then a merged model."
    )
    freeze_trainable_layers: int = Field(
        default=2, description="`freeze`: how many of the last layers are trained; negative: of the first."
    )
    freeze_trainable_modules: Names = Field(default=("all",), description="`freeze`: which modules of those layers.")
    freeze_extra_modules: Names = Field(default=(), description="`freeze`: modules outside the layers, as `norm`.")

    # Data
    dataset: Names = Field(default=(), description="Names of `dataset_info.json`, files, or sources as `hf:org/name`.")
    eval_dataset: Names = Field(default=(), description="The same, for validation.")
    dataset_dir: str = Field(default="data", description="Folder of `dataset_info.json` and its files.")
    cutoff_len: int = Field(default=2048, ge=8, description="Tokens of the longest example.")
    cutoff: Literal["refuse", "truncate", "drop"] = Field(
        default="refuse", description="What to do with longer ones; `refuse` names them and ends."
    )
    train_on_prompt: bool = Field(default=False, description="Loss on prompts too.")
    mask_history: bool = Field(default=False, description="Loss on the last answer only.")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = Field(
        default="concat", description="How several data sets are joined."
    )
    interleave_probs: Annotated[tuple[float, ...], BeforeValidator(_names)] = Field(
        default=(), description="A share for each data set."
    )
    max_samples: int | None = Field(default=None, ge=1, description="At most so many rows of each data set.")
    val_size: float = Field(default=0.0, ge=0, description="Rows for validation: a share below 1, or a number.")
    packing: bool = Field(
        default=False, description="Fill rows of cutoff_len with several examples, each seeing only itself."
    )
    streaming: bool = Field(default=False, description="Read rows as they are needed; max_steps is then needed.")
    buffer_size: int = Field(default=16384, ge=1, description="Rows that `streaming` shuffles among.")
    default_system: str | None = Field(default=None, description="System message for rows without one.")
    enable_thinking: bool | None = Field(default=None, description="Given to chat templates that know it.")

    # Optimisation
    per_device_train_batch_size: int = Field(default=8, ge=1, description="Examples (packed rows) a device and step.")
    per_device_eval_batch_size: int = Field(default=8, ge=1, description="The same for validation.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Batches that make one step.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    num_train_epochs: float = Field(default=3.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(default=None, ge=1, description="Ends sooner or later than the epochs.")
    lr_scheduler_type: Scheduler = Field(default="cosine", description="Course of the learning rate.")
    lr_scheduler_kwargs: dict[str, Any] = Field(default={}, description="The scheduler's own parameters.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps until the peak.")
    warmup_ratio: float = Field(default=0.0, ge=0, le=1, description="The same as a share of all steps.")
    optim: Optimiser = Field(default="adamw_torch", description="Optimiser, by transformers' names.")
    optim_args: str | None = Field(default=None, description="The optimiser's own parameters, `a=1,b=2`.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's first decay.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Adam's second decay.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Adam's epsilon.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to it; 0: never.")
    neftune_noise_alpha: float | None = Field(default=None, ge=0, description="Noise on embeddings (NEFTune).")
    seed: int = Field(default=42, ge=0, description="Of weights, dropout and the order of the data.")
    data_seed: int | None = Field(default=None, ge=0, description="Of the order alone.")

    # Precision and memory
    bf16: bool = Field(default=False, description="Mixed precision with bfloat16.")
    fp16: bool = Field(default=False, description="Mixed precision with float16.")
    pure_bf16: bool = Field(default=False, description="Weights and gradients in bfloat16 too.")
    fp32: bool = Field(default=False, description="float32, on devices that would take bfloat16 by themselves.")
    gradient_checkpointing: bool | Auto = Field(
        default="auto", description="Compute activations twice to save memory; `auto`: if they would not fit."
    )

    # Validation and the end
    eval_strategy: Interval | None = Field(
        default=None, description="When to validate; empty: every epoch, if there is validation data."
    )
    eval_steps: int | None = Field(default=None, ge=1, description="Steps between validations.")
    early_stopping_steps: int | None = Field(
        default=None, ge=1, description="End after so many validations without a better loss."
    )
    early_stopping_threshold: float = Field(default=0.0, ge=0, description="What counts as better.")
    load_best_model_at_end: bool = Field(default=False, description="The result is the best checkpoint, not the last.")

    # Output
    output_dir: str | None = Field(default=None, description="Where `tuneloop train` puts the result.")
    overwrite_output_dir: bool = Field(default=False, description="Begin anew in a folder that holds a run.")
    resume_from_checkpoint: bool | str | None = Field(
        default=None, description="Go on from the run's last checkpoint, or from the one named."
    )
    logging_steps: int = Field(default=1, ge=1, description="Steps between two points of the curves.")
    save_strategy: Interval = Field(default="epoch", description="When to save a checkpoint; `no`: only the result.")
    save_steps: int | None = Field(default=None, ge=1, description="Steps between checkpoints.")
    save_total_limit: int | None = Field(default=None, ge=1, description="Checkpoints to keep; empty: all.")
    plot_loss: bool = Field(default=False, description="Draw the loss into the output folder.")
    report_to: Names = Field(default=(), description="Trackers: tensorboard, wandb, mlflow, swanlab.")
    run_name: str | None = Field(default=None, description="The run's name in trackers.")
    logging_dir: str | None = Field(default=None, description="TensorBoard's folder.")
    max_retries: int = Field(default=3, ge=0, description="How often a trainer that died is started again.")

    # Devices
    num_processes: int = Field(default=1, ge=1, description="Processes, one a device, joined by torchrun.")
    threads: int | None = Field(
        default=None, ge=1, description="Compute threads on a CPU; empty: the launcher's choice."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = contradiction(self)
        if found is not None:
            raise PydanticCustomError("contradiction", "{sentence}", {"key": found[0], "sentence": found[1]})
        return self
