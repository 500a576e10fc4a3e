from axolotl_moe_peft_commands import moe_serve

if __name__ == "__main__":
    moe_serve(prog_name="python -m axolotl_moe_peft.serving")
