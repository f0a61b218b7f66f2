"""What keys of LLaMA-Factory's and axolotl's configurations are to `fit` (foreign.py)."""

from __future__ import annotations

FACTORY, AXOLOTL = "LLaMA-Factory", "axolotl"
#: keys that only one of them has
OF = {FACTORY: {"model_name_or_path", "stage", "finetuning_type", "template", "cutoff_len",
                "lora_rank", "dataset", "dataset_dir"},
       AXOLOTL: {"base_model", "datasets", "adapter", "micro_batch_size", "sequence_len", "lora_r",
                "num_epochs", "sample_packing"}}
#: settings of `fit`, and the keys that say them together
TOPICS = {
    "data": {"dataset", "dataset_dir", "datasets", "max_samples"},
    "model": {"model_name_or_path", "base_model"},
    "task": {"stage"}, "loss_type": {"rl", "pref_loss", "cpo_alpha"},
    "processor": {"chat_template", "chat_template_jinja", "special_tokens", "tokens",
                  "new_special_tokens"},
    "init_from": {"lora_model_dir", "adapter_name_or_path"},
    "recipe": {"finetuning_type", "adapter", "lora_rank", "lora_r", "lora_alpha", "lora_dropout",
               "lora_target", "lora_target_modules", "lora_target_linear", "use_dora",
               "use_rslora", "peft_use_dora", "peft_use_rslora", "pissa_init", "loraplus_lr_ratio",
               "quantization_bit", "load_in_4bit", "load_in_8bit", "double_quantization",
               "quantization_method", "gradient_checkpointing", "disable_gradient_checkpointing",
               "optim", "optimizer", "additional_target", "lora_modules_to_save",
               "quantization_type", "use_galore", "use_apollo", "use_badam", "use_llama_pro",
               "freeze_trainable_layers", "unfrozen_parameters", "peft_layers_to_transform",
               "relora_steps", "relora", "loraplus_lr_embedding", "lora_fan_in_fan_out"},
}
#: key -> setting of fit, the value as it is
NAMES = {
    "model_name_or_path": "model", "base_model": "model", "output_dir": "output",
    "val_size": "validation",
    "val_set_size": "validation", "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size", "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type", "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume", "rl_beta": "beta", "dpo_beta": "beta", "orpo_alpha": "beta",
    **{k: k for k in (
        "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate",
        "gradient_accumulation_steps", "num_train_epochs", "max_steps", "warmup_ratio",
        "warmup_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed", "fp16",
        "logging_steps", "save_steps", "eval_steps", "eval_strategy", "save_strategy",
        "save_total_limit", "adam_beta1", "adam_beta2", "adam_epsilon",
        "label_smoothing_factor", "dataloader_num_workers", "ddp_timeout",
        "trust_remote_code", "report_to", "load_best_model_at_end", "metric_for_best_model",
        "early_stopping_patience")},
}
_SPEED, _THEIRS = "how fast, not what", "a matter of theirs"
LEFT = {
    **dict.fromkeys((
        "flash_attn", "flash_attention", "sdp_attention", "xformers_attention", "eager_attention",
        "attn_implementation", "tf32", "use_unsloth", "enable_liger_kernel",
        "use_reentrant_gc", "gradient_checkpointing_kwargs", "torch_compile",
        "lora_on_cpu", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "low_cpu_mem_usage",
        "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
        "liger_fused_linear_cross_entropy", "dataloader_pin_memory"), _SPEED),
    **dict.fromkeys((
        "overwrite_cache", "preprocessing_num_workers", "dataset_prepared_path",
        "dataset_processes",
        "plot_loss", "save_only_model", "save_safetensors", "debug", "tokenizer_type", "model_type",
        "strict", "is_llama_derived_model", "is_mistral_derived_model", "eval_table_size",
        "eval_table_max_new_tokens", "eval_max_new_tokens", "include_tokens_per_second",
        "local_rank",
        "wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "run_name",
        "hub_model_id", "push_to_hub", "hub_strategy", "do_eval", "lora_fan_in_fan_out",
        "loss_watchdog_threshold", "loss_watchdog_patience", "mlflow_experiment_name",
        "use_tensorboard", "shuffle_merged_datasets"), _THEIRS),
    "eval_sample_packing": "rows that are looked at stand each by itself",
    "pad_to_sequence_len": "a sequence is filled up to the longest of its batch",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "ddp", "fsdp_version"),
                    "--shard fsdp2 spreads a model over processes"),
    **dict.fromkeys(("template", "enable_thinking"),
                    "the tokenizer's own chat template is used"),
    "eval_dataset": "a validation split beside the training rows is used, or val_size",
    "test_datasets": "a validation split beside the training rows is used, or val_set_size",
    "evals_per_epoch": "it evaluates once an epoch", "saves_per_epoch": "it saves once an epoch",
}
#: keys that are refused unless they say no
REFUSED = {
    "train_on_prompt": "answers alone are learnt", "train_on_inputs": "answers alone are learnt",
    "mask_history": "every answer of a conversation is learnt",
    "default_system": "no words are put before a conversation: write them into the rows",
    "use_galore": "write --recipe 'full + galore(rank=...)'",
    "use_apollo": "write --recipe 'full + apollo(rank=...)'",
    "use_badam": "write --recipe 'full + badam'",
    "use_llama_pro": "there is no recipe for it", "freeze_trainable_layers": "write --recipe",
    "neftune_noise_alpha": "no part of a recipe adds noise to embeddings",
    "tokens": "the tokenizer's words stay as they are",
    "new_special_tokens": "the tokenizer's words stay as they are",
    "resize_vocab": "the tokenizer's words stay as they are",
    "chat_template_jinja": "save the template with the tokenizer and give --processor FOLDER",
    "lora_model_dir": "give --init_from, the folder of an earlier run of burnish",
    "adapter_name_or_path": "give --init_from, the folder of an earlier run of burnish",
    "unfrozen_parameters": "write --recipe 'full(targets=...)'",
    "peft_layers_to_transform": "write the layers into --recipe, targets='q_proj@0:8'",
    "relora_steps": "write --recipe 'relora(...)'", "relora": "write --recipe 'relora(...)'",
    "loraplus_lr_embedding": "write --recipe 'lora(embedding_rate=...)'",
    "rope_scaling": "save it in the model's config.json",
}
#: plugins of axolotl that compute the same
FASTER = ("integrations.liger", "cut_cross_entropy")
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused",
                     "paged_adamw_32bit", "paged_adamw"), ""),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), "adam8bit"),
    "adafactor": "adafactor", "lion_32bit": "lion", "lion": "lion",
}
METHODS = {"lora": "lora", "qlora": "lora", "full": "full", "dora": "dora"}
LORA = {"lora_rank": "rank", "lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
         "loraplus_lr_ratio": "b_rate"}
#: keys of a LoRA, and of how the weights under it are held
WITH_LORA = {*LORA, "lora_target", "lora_target_modules", "lora_target_linear", "pissa_init",
             "additional_target", "lora_modules_to_save", "use_dora", "use_rslora", "peft_use_dora",
             "peft_use_rslora"}
#: tables that no "every linear layer" holds
ENDS = ("lm_head", "embed_out", "embed_tokens", "wte")
#: keys whose value is one word
WORDS = {"finetuning_type", "adapter", "stage", "rl", "pref_loss", "optim", "optimizer"}
HELD = {"quantization_bit", "load_in_4bit", "load_in_8bit"}
