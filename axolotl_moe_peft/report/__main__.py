from axolotl_moe_peft_commands import moe_report

if __name__ == "__main__":
    moe_report(prog_name="python -m axolotl_moe_peft.report")
