"""vLLM's own HTTP server, as `vllm serve` runs it, and the same with a router before its engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import uvloop
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

from .vllm_front import Route, put_before


def serve(argv: list[str], route_of: Callable[[EngineClient], Route] | None = None) -> None:
    """Run vLLM's server until it is stopped.

    Args:
        argv: as behind `vllm serve`.
        route_of: makes a router once the engine is there.

    Raises:
        ValueError: the options do not go with each other, or not with a router before the engine.
    """
    cli_env_setup()
    # not vLLM's main: that of the package for CPUs looks for the version of the other one
    args = make_arg_parser(FlexibleArgumentParser(prog="moe-serve")).parse_args(argv)
    validate_parsed_serve_args(args)
    if route_of is None:
        ServeSubcommand.cmd(args)
        return
    args.model = args.model_tag
    _check_options(args)
    uvloop.run(_run(args, route_of))


def _check_options(args: argparse.Namespace) -> None:
    asked = {
        "--headless": args.headless,
        "--grpc": args.grpc,
        "--api-server-count": (args.api_server_count or 1) > 1,
        "--data-parallel-size": args.data_parallel_size > 1,
        "--speculative-config": args.speculative_config is not None,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"{option} does not go with a router before the engine. Leave it out.")


async def _run(args: argparse.Namespace, route_of: Callable[[EngineClient], Route]) -> None:
    address, sock = setup_server(args, reuse_port=False)
    try:
        async with build_async_engine_client(args) as engine:
            put_before(engine, route_of(engine))
            stopped = await build_and_serve(engine, address, sock, args)
        await stopped
    finally:
        sock.close()
