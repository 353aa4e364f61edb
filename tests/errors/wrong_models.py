"""Wrong inputs concerning a model, an adapter and how they are trained."""

from __future__ import annotations

from typing import Any

from wrong_input import Case, adapter, copied, removed, replaced, truncated, written

MODULES = (
    "act_fn, down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, layers, lm_head, mlp, model, norm, o_proj, "
    "post_attention_layernorm, q_proj, rotary_emb, self_attn, up_proj, v_proj"
)


def optimizer(class_path: str, **init_args: Any) -> dict[str, Any]:
    """Return the edit for another optimizer with options."""
    return {"model.optimizer": {"class_path": class_path, "init_args": init_args}}


CASES = {
    # The model
    "no model there": Case(
        "none is not a directory; model_dir must name a local Hugging Face model.", ["--model.model_dir", "none"]
    ),
    "file as a model": Case(
        "config.yaml is not a directory; model_dir must name a local Hugging Face model.",
        ["--model.model_dir", "config.yaml"],
    ),
    "model without config.json": Case(
        "{job}/texts/config.json does not exist; give the directory of a Hugging Face model.",
        ["--model.model_dir", "{job}/texts"],
    ),
    "truncated weights": Case(
        "copy/model.safetensors has {size} bytes but its header requires {whole}; fetch it again.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", truncated("model.safetensors")),
    ),
    "model without weights": Case(
        "copy has neither model.safetensors nor model.safetensors.index.json; fetch the model's weights.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", removed("model.safetensors")),
    ),
    "model without a tokenizer": Case(
        "No tokenizer can be loaded from copy (",
        ["--model.model_dir", "copy"],
        prepare=copied("model", removed("tokenizer*")),
    ),
    "whole weights in 4 bits": Case(
        "load_in_4bit cannot be used with Full: 4-bit weights cannot be trained; use LoRA.",
        edit={"model.load_in_4bit": True, "model.adapter": "lightning_pipelite.adapters.Full"},
    ),
    "whole weights in FP8": Case(
        "load_in_fp8 cannot be used with Full, which changes weights: weights in FP8 cannot be changed; set load_in_fp8 "
        "to false.",
        edit={"model.load_in_fp8": True, "model.adapter": "lightning_pipelite.adapters.Full"},
    ),
    "weights in FP8 and in 4 bits": Case(
        "load_in_4bit and load_in_fp8 are mutually exclusive; set one of them to false.",
        edit={"model.load_in_fp8": True, "model.load_in_4bit": True},
    ),
    "beta2 of 1": Case("model.beta2 must be at least 0 and less than 1, not 1.0.", edit={"model.beta2": 1.0}),
    "rank 0": Case("rank is 0; set it to 1 or more.", edit={"model.adapter.init_args.rank": 0}),
    "layer that the model lacks": Case(
        "layers_to_transform: the model has no decoder layer 4; its layers are 0 to 3.",
        edit={"model.adapter.init_args.layers_to_transform": "2:4"},
    ),
    "target in no list": Case(
        f"target_modules: 'query' matches no module; the model has {MODULES}.",
        edit={"model.adapter.init_args.target_modules": ["q_proj", "query"]},
    ),
    "target that no pattern matches": Case(
        f"target_modules: '.*query' matches no module; the model has {MODULES}.",
        edit={"model.adapter.init_args.target_modules": ".*query"},
    ),
    "damaged config.json": Case(
        "copy/config.json cannot be read as JSON (Expecting property name enclosed in double quotes: line 17 column 3 (char 347)); fetch the file again.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", replaced("config.json", '"model_type"', "model_type")),
    ),
    "model of no known type": Case(
        "copy/config.json is not supported by this version of transformers: its model_type is llamma; correct it, or install a version of transformers that supports it.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", replaced("config.json", '"llama"', '"llamma"')),
    ),
    "encoder": Case(
        "copy: a model of type bert cannot be trained because its tokens attend to later tokens (is_decoder in config.json may be false); choose another model.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", replaced("config.json", '"llama"', '"bert"')),
    ),
    "heads that do not divide the width": Case(
        "copy/config.json is rejected by this version of transformers: Class validation error for validator 'validate_architecture': ValueError: The hidden size (64) is not a multiple of the number of attention heads (3).",
        ["--model.model_dir", "copy"],
        prepare=copied("model", replaced("config.json", '"num_attention_heads": 2', '"num_attention_heads": 3')),
    ),
    "more layers than there are weights": Case(
        "copy lacks weights that config.json requires: model.layers.4.input_layernorm.weight, model.layers.4.mlp.down_proj.weight, model.layers.4.mlp.gate_proj.weight and 15 more; fetch the model again.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", replaced("config.json", '"num_hidden_layers": 4', '"num_hidden_layers": 6')),
    ),
    "no layers": Case(
        "copy: a model of type llama cannot be trained because it has no list of decoder layers; choose another model.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", replaced("config.json", '"num_hidden_layers": 4', '"num_hidden_layers": 0')),
    ),
    "vocabulary of another size": Case(
        "copy: the weight lm_head.weight has shape [320, 64] but config.json requires [100, 64]; fetch the model again.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", replaced("config.json", '"vocab_size": 320', '"vocab_size": 100')),
    ),
    "weights of another shape": Case(
        "copy: the weight model.layers.0.mlp.down_proj.weight has shape [64, 64] but config.json requires [64, 128]; fetch the model again.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", replaced("config.json", '"intermediate_size": 64', '"intermediate_size": 128')),
    ),
    "index of a weight file that is not there": Case(
        "copy/model-1.safetensors does not exist; fetch the missing weight file.",
        ["--model.model_dir", "copy"],
        prepare=copied(
            "model",
            lambda model: (
                (model / "model.safetensors").rename(model / "other.safetensors")
                and written("model.safetensors.index.json", '{"weight_map": {"w": "model-1.safetensors"}}')(model)
            ),
        ),
    ),
    "weights that are no safetensors": Case(
        "copy/model.safetensors is not a readable safetensors file (the file ends inside its header); fetch it again.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", written("model.safetensors", "x" * 50)),
    ),
    "pickled weights": Case(
        "copy has pickled weights (.bin) only; convert them to safetensors, or set allow_pickled_weights to true if you trust who made them.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin")),
    ),
    "model with an adapter beside it": Case(
        "copy also holds an adapter_config.json; merge that adapter or move it away.",
        ["--model.model_dir", "copy"],
        prepare=copied("model", written("adapter_config.json", "{}")),
    ),
    "adapter as a model": Case(
        "{job}/adapter/config.json does not exist; give the directory of a Hugging Face model.",
        ["--model.model_dir", "{job}/adapter"],
    ),
    "name on the hub": Case(
        "meta-llama/Llama-3.1-8B is not a directory; model_dir must name a local Hugging Face model. If it is on the "
        "Hugging Face Hub, download it: hf download meta-llama/Llama-3.1-8B --local-dir models/Llama-3.1-8B, and give "
        "models/Llama-3.1-8B.",
        ["--model.model_dir", "meta-llama/Llama-3.1-8B"],
    ),
    # The adapter
    "rank above the width": Case(
        "rank is 65, but the model's layers are only 64 wide; lower rank.", edit=adapter("ControlAdapter", rank=65)
    ),
    "dropout above 1": Case(
        "dropout is 1.5; set it to at least 0 and less than 1.", edit={"model.adapter.init_args.dropout": 1.5}
    ),
    "unknown dtype of the adapter": Case(
        "dtype is 'float8'; set it to one of float32, bfloat16, float16.",
        edit={"model.adapter.init_args.dtype": "float8"},
    ),
    "gamma below 0": Case(
        "gamma is -1.0; set it to more than 0 and at most 0.5.",
        edit=adapter("ControlAdapter", rank=2, gamma=-1.0),
        starts=True,
    ),
    "layers that are no range": Case(
        "layers_to_transform: '2-4' is neither a number nor a range; write it as in \"0:3, 7, 12:15\".",
        edit={"model.adapter.init_args.layers_to_transform": "2-4"},
    ),
    "layers in reverse": Case(
        "layers_to_transform: 3:2 is a reversed range; write 2:3.",
        edit={"model.adapter.init_args.layers_to_transform": "3:2"},
    ),
    "layer below 0": Case(
        "layers_to_transform: the model has no decoder layer -1; its layers are 0 to 3.",
        edit={"model.adapter.init_args.layers_to_transform": [-1]},
    ),
    "targets that are no regular expression": Case(
        "target_modules: 'q_proj(' is not a regular expression (missing ), unterminated subpattern at position 6).",
        edit={"model.adapter.init_args.target_modules": "q_proj("},
    ),
    "no targets": Case(
        "target_modules is an empty list; name modules or leave it out.",
        edit={"model.adapter.init_args.target_modules": []},
    ),
    "target without a matrix": Case(
        "target_modules matches model.layers.0.input_layernorm, which has no matrix; name only linear modules of decoder layers, or fused experts.",
        edit={"model.adapter.init_args.target_modules": ["input_layernorm"]},
    ),
    "targets of a Control Adapter": Case(
        "model.adapter.target_modules is not an option; correct its name or remove it.",
        edit=adapter("ControlAdapter", rank=2, target_modules=["q_proj"]),
    ),
    "layers that are not all there to train": Case(
        "layers_to_transform: the model has no decoder layer 9; its layers are 0 to 3.",
        edit=adapter("Full", layers_to_transform="9"),
    ),
    # How they are trained
    "learning rate below 0": Case(
        "model.lr must be at least 0 and less than 1000, not -1e-05.", edit={"model.lr": -1e-5}
    ),
    "epsilon of 0": Case("model.eps must be positive, not 0.0.", edit={"model.eps": 0.0}),
    "warm-up below 0": Case(
        "model.warmup_steps is -1 with schedule cosine; it must be 0 or more, and 0 with rms_ratio, which warms up on its own.",
        edit={"model.warmup_steps": -1, "model.schedule": "cosine"},
    ),
    "warm-up of the default schedule": Case(
        "model.warmup_steps is 10 with schedule rms_ratio; it must be 0 or more, and 0 with rms_ratio, which warms up on its own.",
        edit={"model.warmup_steps": 10},
    ),
    "unknown schedule": Case(
        "model.schedule must be one of 'rms_ratio', 'constant', 'cosine', not linear.",
        edit={"model.schedule": "linear"},
    ),
    "group that is no regular expression": Case(
        "model.parameter_groups: 'lora_(' is not a regular expression (missing ), unterminated subpattern at position 5).",
        edit={"model.parameter_groups": {"lora_(": {"lr": 1.0}}},
    ),
    "group with an unknown option": Case(
        "model.parameter_groups: lora_B sets learning_rate, which is not an option of Adam; it has beta1, beta2, decouple_lr, decouple_wd, eps, foreach, gradient_release, kahan_sum, lr, max_lr, setup, triton, weight_decay.",
        edit={"model.parameter_groups": {"lora_B": {"learning_rate": 1.0}}},
    ),
    "group of nothing": Case(
        "model.parameter_groups: 'lora_C' matches no trainable parameter.",
        edit={"model.parameter_groups": {"lora_C": {"lr": 1.0}}},
        starts=True,
    ),
    "unknown optimizer": Case(
        "model.optimizer: class_path torch.optim.Adan does not create an Optimizer (module 'torch.optim' has no attribute 'Adan'); correct it.",
        edit=optimizer("torch.optim.Adan"),
    ),
    "class that is no optimizer": Case(
        "model.optimizer: class_path torch.nn.Linear does not create an Optimizer (Expected 'torch.nn.Linear' to be a subclass of <class 'Optimizer'>); correct it.",
        edit=optimizer("torch.nn.Linear"),
    ),
    "unknown option of the optimizer": Case(
        "model.optimizer.beta is not an option; correct its name or remove it.",
        edit=optimizer("torch.optim.AdamW", beta=1.0),
    ),
    "learning rate of the optimizer's own": Case(
        "model.optimizer.lr is not an option; correct its name or remove it.",
        edit=optimizer("torch.optim.AdamW", lr=1.0),
    ),
    "decay below 0": Case(
        "model.optimizer: Invalid weight_decay value: -1.0", edit=optimizer("torch.optim.AdamW", weight_decay=-1.0)
    ),
    "betas for another optimizer": Case(
        "model.beta1, beta2 and eps apply to the default optimizer; set them as options of model.optimizer.",
        edit={"model.beta1": 0.5, **optimizer("torch.optim.AdamW")},
    ),
    "default schedule without betas": Case(
        "model.schedule is rms_ratio, but SGD has no second beta between 0 and 1; set model.schedule to constant or cosine.",
        edit=optimizer("torch.optim.SGD"),
    ),
    "routers' loss below 0": Case(
        "model.router_aux_loss_coef must be at least 0, not -1.0.", edit={"model.router_aux_loss_coef": -1.0}
    ),
    "routers' loss without routers": Case(
        "{job}/model: the routers of a model of type llama cannot be balanced because its class has no auxiliary loss for its routers; set router_aux_loss_coef to 0.",
        edit={"model.router_aux_loss_coef": 0.1},
    ),
    "unknown attention": Case(
        "model.attn_implementation must be one of 'auto', 'varlen', 'sdpa', 'eager', not flash_attention_2; did you mean varlen?",
        edit={"model.attn_implementation": "flash_attention_2"},
    ),
}
