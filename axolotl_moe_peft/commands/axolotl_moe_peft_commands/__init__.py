"""Sub-commands that this package adds to `axolotl`, through the entry points `axolotl.cli_commands`.

A package of its own, since `axolotl --help` imports every command for its short help, and importing axolotl_moe_peft
imports torch. What a command needs it imports when it runs.
"""

import click


@click.command("export-tt-lora", short_help="write a TT-LoRA adapter as a plain PEFT LoRA")
@click.argument("adapter")
@click.argument("out_folder")
def export_tt_lora(adapter: str, out_folder: str) -> None:
    """Write the TT-LoRA adapter in the folder ADAPTER to OUT_FOLDER as a plain PEFT LoRA of the same rank.

    The LoRA computes the same and needs nothing of axolotl-moe-peft, so that any server that takes a LoRA serves it.
    """
    from axolotl_moe_peft.tt_lora.export import export_to_lora

    try:
        tensors = export_to_lora(adapter, out_folder)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {len(tensors)} tensors to {out_folder}")


@click.command("moe-memory", short_help="what memory a config's training will take")
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
def moe_memory(config: str) -> None:
    """Print the memory that training with the YAML CONFIG will take on each process, and what would make it less.

    No weights are loaded. CUDA itself and the fragmentation of its memory take about 1 GiB beside it.
    """
    from axolotl.cli.config import load_cfg

    from axolotl_moe_peft.host.memory import report

    try:
        text = report(load_cfg(config))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(text)


@click.command("moe-report", short_help="show where an adapter's routers send what")
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--lora-model-dir", help="Folder or hub id of the adapter.  [default: that of the YAML, or output_dir]")
@click.option("--output-dir", help="Where the report goes.  [default: output_dir of the YAML]")
def moe_report(config: str, lora_model_dir: str | None, output_dir: str | None) -> None:
    """Run the evaluation data of the YAML CONFIG through its trained adapter; write routing.json and routing.html.

    They say which experts the routers of the adapter, and those of the base model, send what to. On several GPUs:
    accelerate launch -m axolotl_moe_peft.report CONFIG.
    """
    from axolotl_moe_peft.host.report_command import load_config, report_saved

    try:
        report_saved(load_config(config, lora_model_dir, output_dir))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@click.command(
    "moe-serve",
    short_help="serve an adapter behind an OpenAI-compatible API",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("adapter")
@click.option("--base", help="Folder or hub id of the base model.  [default: what the adapter names]")
@click.option("--engine", type=click.Choice(["vllm", "transformers"]), help="[default: vllm where it is installed]")
@click.option("--port", default=8000, show_default=True)
@click.argument("engine_options", nargs=-1, type=click.UNPROCESSED)
def moe_serve(adapter: str, base: str | None, engine: str | None, port: int, engine_options: tuple[str, ...]) -> None:
    """Serve the adapter in the folder, or of the hub id, ADAPTER by the engine's own HTTP server.

    ENGINE_OPTIONS are handed on to `vllm serve` or `transformers serve`, such as --max-model-len 4096.
    """
    from axolotl_moe_peft.serving.start import serve

    try:
        serve(adapter, base, engine, port, list(engine_options))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
