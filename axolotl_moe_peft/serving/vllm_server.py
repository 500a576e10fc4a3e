"""vLLM's own HTTP server, as `vllm serve` runs it, and where there is one with a router before its engine.

Not by vLLM's main: that of the package for CPUs looks for the version of the other one.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable

import uvloop
from transformers import AutoConfig
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

from .vllm_front import Route, put_before

_GRACE = 5  # s, for answers that are under way when the server is stopped


def serve(argv: list[str], route_of: Callable[[EngineClient], Route] | None = None) -> None:
    """Run vLLM's server until it is stopped.

    Args:
        argv: as behind `vllm serve`.
        route_of: makes a router once the engine is there.

    Raises:
        ValueError: the base model is quantised, or the options do not go with a router before the engine.
    """
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(prog="moe-serve")).parse_args(argv)
    args.model = args.model_tag
    validate_parsed_serve_args(args)
    _check_base(args)
    _check_options(args, routed=route_of is not None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server has its own
    uvloop.run(_run(args, route_of))


def _check_base(args: argparse.Namespace) -> None:
    base = AutoConfig.from_pretrained(args.model_tag, revision=args.revision, trust_remote_code=args.trust_remote_code)
    if args.quantization or getattr(base, "quantization_config", None):
        raise ValueError(
            f"{args.model_tag!r} is or becomes a quantised base model, beside which no adapter is served by vLLM. "
            "Give the base in 16 bits (--base), without --quantization."
        )


def _check_options(args: argparse.Namespace, routed: bool) -> None:
    asked = {
        "--headless": args.headless,
        "--grpc": args.grpc,
        "--api-server-count": (args.api_server_count or 1) > 1,
        "--data-parallel-size": args.data_parallel_size > 1,
        "--speculative-config": routed and args.speculative_config is not None,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"{option} does not go with this adapter and one server before one engine. Leave it out.")


async def _run(args: argparse.Namespace, route_of: Callable[[EngineClient], Route] | None) -> None:
    address, sock = setup_server(args, reuse_port=False)
    try:
        async with build_async_engine_client(args) as engine:
            if route_of is not None:
                put_before(engine, route_of(engine))
            # or a stopped server would wait for answers that its engine does not give any more
            stopped = await build_and_serve(engine, address, sock, args, timeout_graceful_shutdown=_GRACE)
        await stopped
    finally:
        sock.close()
