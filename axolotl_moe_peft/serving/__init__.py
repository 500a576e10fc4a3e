"""Serving an adapter by the HTTP servers of vLLM and of transformers; `axolotl moe-serve --help`.

perft runs inside vLLM, as a model class (vllm_perft.py). A tt_lora adapter is served as the LoRA that it can be
exported to, a pool as one LoRA for each expert; what a router chooses for a whole prompt is chosen before the request
reaches the engine (vllm_front.py). In transformers' server adapters are what they are in PEFT.
"""
