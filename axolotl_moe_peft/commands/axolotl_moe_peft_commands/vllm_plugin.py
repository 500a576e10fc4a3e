"""What vLLM loads in each of its processes, through the entry point `vllm.general_plugins`."""


def register() -> None:
    """Tell vLLM of the architecture; its module is imported where a model has it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("PerftForCausalLM", "axolotl_moe_peft.serving.vllm_perft:PerftForCausalLM")
