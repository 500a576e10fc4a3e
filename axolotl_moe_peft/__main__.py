"""`python -m axolotl_moe_peft run ...`, see launcher.py."""

import sys

from .launcher import main

if __name__ == "__main__":
    main(sys.argv[1:])
