"""What vLLM loads in each of its processes, through the entry point `vllm.general_plugins`."""


def register() -> None:
    """Tell vLLM of the architectures; their module is imported where a model has one of them."""
    from vllm import ModelRegistry

    for architecture in ("PerftForCausalLM", "PerftDenseForCausalLM"):
        ModelRegistry.register_model(architecture, f"axolotl_moe_peft.serving.vllm_perft:{architecture}")
