"""Serve: answer clients of OpenAI's chat-completions protocol with a trained model.

    python -m src.serve model.path=runs/stage2/model
    python -m src.serve conf=serve model.path=... sampler=plain tokens_per_step=4 port=9000
    KEY=... python -m src.serve conf=serve model.path=... host=0.0.0.0 key_env=KEY hosts=[gpu17]

    client -> HTTP (src/serving/app.py) -> batches (src/serving/engine.py) -> sampler -> text, at once or streamed

Without `conf=` it reads conf/serve.yaml. Needs the extra `serve` (Starlette, uvicorn).
SIGTERM and Ctrl-C end it: requests under way are answered, new ones are not accepted.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path

from src.cli.config import load_config
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, plain
from src.cli.signals import Stopped
from src.generation.captioner import Captioner
from src.generation.run import SAMPLER
from src.io.errors import UserError
from src.io.words import counted


@main_guard
def main(argv: list[str]) -> None:
    """Answer requests until a signal comes."""
    conf = [] if any(argument.startswith("conf=") for argument in argv) else ["conf=serve"]
    cfg = load_config([*conf, *argv], verb="src.serve", needs=NEEDS["src.serve"], texts=("system",))
    try:
        import uvicorn

        from src.serving.app import Service, build_app
        from src.serving.engine import Engine
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}: pip install -e '.[serve]'") from error
    check(cfg)
    # 1. What can be wrong without the model: key, address.
    key = os.environ.get(cfg.key_env, "") if cfg.key_env else None
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"the environment variable {cfg.key_env} holds no key, or one with blanks or line breaks")
    if key is None and not is_loopback(cfg.host):
        raise UserError(
            f"host={cfg.host} can be reached from other machines, so clients need a key: put one into an environment "
            "variable, and its name into key_env"
        )
    listener = listen(cfg.host, cfg.port)
    # 2. The model.
    node = {name: value for name, value in plain(cfg.model).items() if name != "target"}
    captioner = Captioner.load(**node, prompt_format=cfg.prompt_format, system=cfg.system, join=cfg.join)
    name = cfg.name or "/".join(Path(cfg.model.path).parts[-2:])
    settings = {name: cfg[name] for name in (*SAMPLER, "tokens_per_step", "steps", "compile")}
    # 3. The server. uvicorn catches the first signal, finishes, and raises it again.
    with Engine(captioner, batch_size=cfg.batch_size, max_waiting=cfg.max_waiting) as engine:
        options = {"limits": build(cfg.limits), "sampler": cfg.sampler, "settings": settings}
        service = Service(captioner, engine, name=name, **options)
        app = build_app(service, key=key, hosts=[*cfg.hosts, cfg.host])
        options = {"lifespan": "off", "http": "h11", "ws": "none", "log_config": None, "log_level": "warning"}
        options |= {"access_log": False, "server_header": False, "proxy_headers": False}
        server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=cfg.grace_seconds, **options))
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        sys.stdout.write(f"{name} is served at {address}; Ctrl-C ends it\n")
        sys.stdout.flush()
        with suppress(Stopped):
            server.run(sockets=[listener])
    answered, batches = engine.counts["answered"], engine.counts["batches"]
    sys.stderr.write(f"ended: {counted(answered, 'request')} answered in {counted(batches, 'batch', 'batches')}\n")


def is_loopback(host: str) -> bool:
    """Whether an address to listen at can be reached from this machine only."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where there can be none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host} port {port} ({error}): choose another host or port") from error


if __name__ == "__main__":
    main()
