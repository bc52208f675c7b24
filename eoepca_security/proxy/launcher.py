"""The command line: `run-mitmproxy.py [serve|token|demo] [-- mitmdump arguments]`.

Exit codes: 0; 1 for a fault while running; 2 for settings or arguments that are wrong.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click

from eoepca_security.errors import SettingsError, TokenError
from eoepca_security.proxy.settings import OPTIONS, Settings, read_dotenv, read_settings
from eoepca_security.proxy.wiring import make_source
from eoepca_security.session import AccessToken
from eoepca_security.source import TokenSource

EPILOG = """\b
Settings come from the environment, or from .env in the working directory;
.env.example explains all of them. Whatever follows -- goes to mitmdump.

\b
Examples:
  run-mitmproxy.py                       run the proxy
  run-mitmproxy.py token                 print an access token
  run-mitmproxy.py demo                  see it work, without any setup
  run-mitmproxy.py serve -- --set flow_detail=1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, extra = arguments, []
    if "--" in arguments:
        split = arguments.index("--")
        own, extra = arguments[:split], arguments[split + 1 :]
    try:
        result = cli.main(args=own, prog_name="run-mitmproxy.py", standalone_mode=False, obj=extra)
    except click.ClickException as error:
        error.show()
        return 2
    except click.Abort:
        return 1
    except SettingsError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        return 2
    except TokenError as error:
        click.echo(f"{error.code}: {error}", err=True)
        return 1
    return result if isinstance(result, int) else 0


@click.group(invoke_without_command=True, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="eoepca-security")
@click.pass_context
def cli(context: click.Context) -> int:
    """Put OIDC access tokens into the requests of tools that cannot log in."""
    return 0 if context.invoked_subcommand else context.invoke(serve)


@cli.command()
@click.pass_obj
def serve(extra: Sequence[str]) -> int:
    """Run the proxy (the default)."""
    # mitmproxy takes a second to import, which the other commands need not spend.
    from eoepca_security.proxy.serve import run  # noqa: PLC0415

    return run(_settings(extra), extra)


@cli.command()
@click.pass_obj
def token(extra: Sequence[str]) -> int:
    """Print a fresh access token, and nothing else, on standard output."""
    _refuse(extra, "token")
    # The error that main() prints is enough.
    logging.getLogger("eoepca_security.source").setLevel(logging.ERROR)
    settings = _settings((), need_upstream=False)
    if settings.refresh_token is not None or settings.grant != "refresh_token":
        settings = replace(settings, access_token=None)  # a fresh one is asked for
    source = make_source(settings)
    click.echo(asyncio.run(_fresh(source)).value)
    if source.rotated and settings.token_store is None:
        click.echo(
            "warning: the issuer replaced the refresh token, so the one in the settings may be used up now: "
            "a running proxy keeps the new one, this command does not",
            err=True,
        )
    return 0


@cli.command()
@click.option("--once", is_flag=True, help="Exit after the demonstration instead of staying up.")
@click.pass_obj
def demo(extra: Sequence[str], *, once: bool) -> int:
    """See it work, without any setup."""
    from eoepca_security.proxy.demo import run  # noqa: PLC0415  as in serve

    _refuse(extra, "demo")
    return run(once=once)


async def _fresh(source: TokenSource) -> AccessToken:
    try:
        return await source.token()
    finally:
        # Its answer may still be on its way, with the only valid refresh token.
        await source.finish()


def _refuse(extra: Sequence[str], command: str) -> None:
    if extra:
        raise click.UsageError(f"{command} takes no mitmdump arguments")


def _settings(extra: Sequence[str], *, need_upstream: bool = True) -> Settings:
    settings = read_settings(
        os.environ, dotenv=read_dotenv(Path.cwd()), options=_overrides(extra), need_upstream=need_upstream
    )
    if not need_upstream:
        for warning in settings.warnings:
            click.echo(f"warning: {warning}", err=True)
    return settings


def _overrides(extra: Sequence[str]) -> dict[str, str]:
    """Return our add-on's options among mitmdump's `--set name=value` arguments: they come first of all sources."""
    values = [value for flag, value in pairwise(extra) if flag == "--set"]
    values += [argument.removeprefix("--set=") for argument in extra if argument.startswith("--set=")]
    names = {variable.option for variable in OPTIONS}
    pairs = (value.partition("=") for value in values)
    return {name: value for name, _, value in pairs if name in names}
