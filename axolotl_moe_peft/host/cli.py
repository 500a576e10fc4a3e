"""Sub-commands that this package adds to `axolotl`, through the entry points `axolotl.cli_commands`."""

import click

from ..tt_lora.export import export_to_lora


@click.command("export-tt-lora", short_help="write a TT-LoRA adapter as a plain PEFT LoRA")
@click.argument("adapter")
@click.argument("out_folder")
def export_tt_lora(adapter: str, out_folder: str) -> None:
    """Write the TT-LoRA adapter in the folder ADAPTER to OUT_FOLDER as a plain PEFT LoRA of the same rank.

    The LoRA computes the same and needs nothing of axolotl-moe-peft, so that any server that takes a LoRA serves it.
    """
    try:
        tensors = export_to_lora(adapter, out_folder)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {len(tensors)} tensors to {out_folder}")
