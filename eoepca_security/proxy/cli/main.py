"""The command line: `run-mitmproxy.py [serve|check|login|logout|token|demo] [-- mitmdump arguments]`.

Exit codes: 0; 1 for a fault while running; 2 for settings or arguments that are wrong.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click

from eoepca_security.errors import SettingsError, StoreError, TokenError
from eoepca_security.issuer.ca_trust import begin_to_trust
from eoepca_security.proxy.config.factory import make_source
from eoepca_security.proxy.config.loading import settings_in
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import OPTIONS, TOKEN_STORE
from eoepca_security.proxy.patches.lazy_imports import lazy_imports
from eoepca_security.proxy.policy.remedies import command_remedy, login_remedy, runs_in_container, told
from eoepca_security.session.session import AccessToken
from eoepca_security.session.source import TokenSource

EPILOG = """\b
Settings come from the environment, or from .env in the working directory;
.env.example explains all of them. Whatever follows -- goes to mitmdump.

\b
Examples:
  run-mitmproxy.py demo                  see it work, without any setup
  run-mitmproxy.py login                 get a session
  run-mitmproxy.py                       run the proxy
  run-mitmproxy.py check                 find out what does not work
  run-mitmproxy.py token                 print an access token
  run-mitmproxy.py COMMAND --help        more about one of them

\b
Completion of commands and options in bash (zsh and fish likewise):
  eval "$(_RUN_MITMPROXY_PY_COMPLETE=bash_source run-mitmproxy.py)"
"""

SERVE_EPILOG = """\b
Examples:
  run-mitmproxy.py serve
  run-mitmproxy.py serve --log-format json
  run-mitmproxy.py serve -- --set flow_detail=1
  curl http://127.0.0.1:8080/             ask the service through it
"""

PRINT_EPILOG = """\b
Example:
  TOKEN=$(run-mitmproxy.py token)
"""

DEMO_EPILOG = """\b
Examples:
  run-mitmproxy.py demo
  run-mitmproxy.py demo --once
"""

LOGIN_EPILOG = """\b
Examples:
  run-mitmproxy.py login                show a code, and wait for it
  run-mitmproxy.py login --browser      open a browser on this machine
  run-mitmproxy.py login --scope "openid read"
"""

CHECK_EPILOG = """\b
Exits with 0 when everything works, with 1 when something does not, and with
2 when the settings are wrong. REMOTE_PROTECTED_ENDPOINT is what the service
is asked for, / unless set.

\b
Examples:
  run-mitmproxy.py check
  run-mitmproxy.py check --json | jq '.steps[] | select(.status == "fault")'
"""

LOGOUT_EPILOG = """\b
Example:
  run-mitmproxy.py logout
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
    except StoreError as error:
        click.echo(f"{TOKEN_STORE.env}: {error}", err=True)
        return 1
    return result if isinstance(result, int) else 0


_log_format = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="serve: json is an object on each line, for machines.",
)


@click.group(invoke_without_command=True, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="eoepca-security")
@_log_format
@click.pass_context
def cli(context: click.Context, *, log_format: str | None) -> int:
    """Put OIDC access tokens into the requests of tools that cannot log in."""
    if context.invoked_subcommand is None:
        return int(context.invoke(serve, log_format=log_format))
    if log_format is not None:
        raise click.UsageError("--log-format is an option of serve: put it behind that")
    return 0


@cli.command(epilog=SERVE_EPILOG)
@_log_format
@click.pass_obj
def serve(extra: Sequence[str], *, log_format: str | None) -> int:
    """Run the proxy (the default)."""
    log_format = log_format or "text"
    # mitmproxy takes half a second to import, which the other commands need not spend.
    try:
        settings = _settings(extra)
        with lazy_imports():
            if settings.workers == 1:  # several are forked, which takes no threads along
                begin_to_trust(settings.ca_file)
            from eoepca_security.proxy.runtime.serve import run  # noqa: PLC0415

        return run(settings, extra, log_format=log_format)
    except SettingsError as error:
        from eoepca_security.proxy.runtime.logs import complain  # noqa: PLC0415

        for problem in error.problems:
            complain(problem, log_format)
        return 2


@cli.command(epilog=PRINT_EPILOG)
@click.pass_obj
def token(extra: Sequence[str]) -> int:
    """Print a fresh access token, and nothing else, on standard output."""
    _refuse(extra, "token")
    # The error that main() prints is enough.
    logging.getLogger("eoepca_security.session.source").setLevel(logging.ERROR)
    settings = _settings((), need_upstream=False)
    if settings.refresh_token is not None or settings.grant != "refresh_token":
        settings = replace(settings, access_token=None)  # a fresh one is asked for
    source = make_source(settings)
    with _told(settings, command_remedy):
        token = asyncio.run(_fresh(source))
    click.echo(token.value)
    if source.rotated and settings.token_store is None:
        click.echo(
            "warning: the issuer replaced the refresh token, so the one in the settings may be used up now: "
            "a running proxy keeps the new one, this command does not",
            err=True,
        )
    return 0


@cli.command(epilog=LOGIN_EPILOG)
@click.option("--browser", is_flag=True, help="Log in with a browser on this machine instead of a code.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="With --browser: the port to come back to, for issuers that want the whole redirect URI, "
    "http://127.0.0.1:PORT/callback, registered; a free one otherwise.",
)
@click.option("--scope", help="Scopes to ask for, separated by spaces, instead of `openid offline_access`.")
@click.pass_obj
def login(extra: Sequence[str], *, browser: bool, port: int | None, scope: str | None) -> int:
    """Log in, and keep the session for the proxies that have these settings.

    Without --browser a code is shown that can be confirmed in a browser anywhere.
    """
    from eoepca_security.proxy.cli.login import login as run  # noqa: PLC0415  as in serve

    _refuse(extra, "login")
    if port is not None and not browser:
        raise click.UsageError("--port is for --browser")
    settings = _settings((), need_upstream=False, need_session=False)
    with _told(settings, login_remedy):
        return run(settings, scope=scope, browser=browser, port=port or 0)


@cli.command(epilog=LOGOUT_EPILOG)
@click.pass_obj
def logout(extra: Sequence[str]) -> int:
    """End the session that login or a proxy kept: at the issuer, where it offers that, and here."""
    from eoepca_security.proxy.cli.login import logout as run  # noqa: PLC0415  as in serve

    _refuse(extra, "logout")
    settings = _settings((), need_upstream=False, need_session=False)
    with _told(settings, command_remedy):
        return run(settings)


@cli.command(epilog=CHECK_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_obj
def check(extra: Sequence[str], *, as_json: bool) -> int:
    """Find out what does not work, from the settings to the protected service, and what to do about it."""
    from eoepca_security.proxy.cli.check import Step  # noqa: PLC0415  as in serve
    from eoepca_security.proxy.cli.check import check as run  # noqa: PLC0415
    from eoepca_security.proxy.cli.check_report import report  # noqa: PLC0415

    _refuse(extra, "check")
    try:
        settings = _settings((), need_session=False)
    except SettingsError as error:
        if as_json:
            report((Step("settings", "fault", problem) for problem in error.problems), as_json=True)
        raise
    return report(run(settings, in_container=runs_in_container()), as_json=as_json)


@cli.command(epilog=DEMO_EPILOG)
@click.option("--once", is_flag=True, help="Exit after the demonstration instead of staying up.")
@click.pass_obj
def demo(extra: Sequence[str], *, once: bool) -> int:
    """See it work, without any setup."""
    from eoepca_security.proxy.cli.demo import run  # noqa: PLC0415  as in serve

    _refuse(extra, "demo")
    return run(once=once)


async def _fresh(source: TokenSource) -> AccessToken:
    try:
        return await source.token()
    finally:
        # Its answer may still be on its way, with the only valid refresh token.
        await source.finish()


@contextlib.contextmanager
def _told(settings: Settings, remedy: Callable[..., str]) -> Iterator[None]:
    """End the command with a line and exit code 1 when there is no token; `remedy` is one of the module `remedies`."""
    try:
        yield
    except TokenError as error:
        detail = told(error, remedy(error, settings, in_container=runs_in_container()))
        click.echo(f"{error.code}: {detail}", err=True)
        raise click.exceptions.Exit(1) from None


def _refuse(extra: Sequence[str], command: str) -> None:
    if extra:
        raise click.UsageError(f"{command} takes no mitmdump arguments")


def _settings(extra: Sequence[str], *, need_upstream: bool = True, need_session: bool = True) -> Settings:
    settings = settings_in(
        Path.cwd(),
        os.environ,
        options=_overrides(extra),
        need_upstream=need_upstream,
        need_session=need_session,
    )
    if not (need_upstream and need_session):
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
