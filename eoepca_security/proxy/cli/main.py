"""The command line: `run-mitmproxy.py [serve|check|login|logout|token|demo] [-- mitmdump arguments]`.

Exit codes: 0 on success, 1 for an error while running, 2 for wrong settings or arguments.
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
from eoepca_security.proxy.patches import seams
from eoepca_security.proxy.patches.lazy_imports import lazy_imports
from eoepca_security.proxy.policy.remedies import command_remedy, login_remedy, runs_in_container, told
from eoepca_security.proxy.runtime.output import print_error
from eoepca_security.session.session import AccessToken
from eoepca_security.session.source import TokenSource

EPILOG = """\b
Settings come from the environment, or from .env in the working directory;
.env.example describes them all. Arguments after -- go to mitmdump.

\b
Examples:
  run-mitmproxy.py demo                  see it work, without any setup
  run-mitmproxy.py login                 log in
  run-mitmproxy.py                       run the proxy
  run-mitmproxy.py check                 find out what does not work
  run-mitmproxy.py token                 print an access token
  run-mitmproxy.py COMMAND --help        show the help for a command

\b
Completion of commands and options in bash (zsh and fish likewise):
  eval "$(_RUN_MITMPROXY_PY_COMPLETE=bash_source run-mitmproxy.py)"
"""

SERVE_EPILOG = """\b
Examples:
  run-mitmproxy.py serve
  run-mitmproxy.py serve --log-format json
  run-mitmproxy.py serve -- --set flow_detail=1
  curl http://127.0.0.1:8080/             send a request through it
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
  run-mitmproxy.py login                show a code to confirm anywhere
  run-mitmproxy.py login --browser      open a browser on this machine
  run-mitmproxy.py login --scope "openid read"
"""

CHECK_EPILOG = """\b
Exits with 0 if everything works, 1 if something does not, and 2 if the
settings are wrong. What is unproven is a warning, and with --strict an error.
It requests REMOTE_PROTECTED_ENDPOINT from the service, by default /, once
with the token and once without.

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
    if own and not own[0]:  # manifests for eoepca-security 2.0 have `args: [""]`
        own = own[1:]
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
    help="The log format of serve; json writes one object per line.",
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
        raise click.UsageError("--log-format is an option of serve: put it after the command")
    return 0


@cli.command(epilog=SERVE_EPILOG)
@_log_format
@click.pass_obj
def serve(extra: Sequence[str], *, log_format: str | None) -> int:
    """Run the proxy (the default)."""
    log_format = log_format or "text"
    # Importing mitmproxy takes half a second, which the other commands can save.
    try:
        settings = _settings(extra)
        with lazy_imports():
            if settings.workers == 1:  # several are forked, and a fork does not copy threads
                begin_to_trust(settings.ca_file)
            seams.check()
            from eoepca_security.proxy.runtime.serve import run  # noqa: PLC0415

        return run(settings, extra, log_format=log_format)
    except SettingsError as error:
        for problem in error.problems:
            print_error(problem, log_format)
        return 2
    except seams.Moved as moved:
        print_error(str(moved), log_format)
        return 1


@cli.command(epilog=PRINT_EPILOG)
@click.pass_obj
def token(extra: Sequence[str]) -> int:
    """Print a new access token, and nothing else, to standard output."""
    _refuse(extra, "token")
    # The error that main() prints is enough.
    logging.getLogger("eoepca_security.session.source").setLevel(logging.ERROR)
    settings = _settings((), need_upstream=False)
    if settings.refresh_token is not None or settings.grant != "refresh_token":
        settings = replace(settings, access_token=None)  # request a new one instead
    source = make_source(settings)
    with _told(settings, command_remedy):
        token = asyncio.run(_fresh(source))
    click.echo(token.value)
    if source.rotated and settings.token_store is None:
        click.echo(
            "warning: the issuer replaced the refresh token, so the one in the settings may be used up. This command "
            "does not store the new one; a running proxy does",
            err=True,
        )
    return 0


@cli.command(epilog=LOGIN_EPILOG)
@click.option("--browser", is_flag=True, help="Log in with a browser on this machine instead of a code.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="With --browser: the port of the redirect URI http://127.0.0.1:PORT/callback, for issuers where the exact URI "
    "must be registered. The default is any free port.",
)
@click.option("--scope", help="Scopes to request, separated by spaces, instead of `openid offline_access`.")
@click.pass_obj
def login(extra: Sequence[str], *, browser: bool, port: int | None, scope: str | None) -> int:
    """Log in, and store the session for proxies with these settings.

    Without --browser, it shows a code that you can confirm in a browser on any device.
    """
    from eoepca_security.proxy.cli.login import login as run  # noqa: PLC0415  as in serve

    _refuse(extra, "login")
    if port is not None and not browser:
        raise click.UsageError("--port needs --browser")
    settings = _settings((), need_upstream=False, need_session=False)
    with _told(settings, login_remedy):
        return run(settings, scope=scope, browser=browser, port=port or 0)


@cli.command(epilog=LOGOUT_EPILOG)
@click.pass_obj
def logout(extra: Sequence[str]) -> int:
    """End the stored session: at the issuer, if it supports that, and here."""
    from eoepca_security.proxy.cli.login import logout as run  # noqa: PLC0415  as in serve

    _refuse(extra, "logout")
    settings = _settings((), need_upstream=False, need_session=False)
    with _told(settings, command_remedy):
        return run(settings)


@cli.command(epilog=CHECK_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.option("--strict", is_flag=True, help="Exit with 1 also if a step is unproven.")
@click.pass_obj
def check(extra: Sequence[str], *, as_json: bool, strict: bool) -> int:
    """Check everything from the settings to the protected service, and show remedies."""
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
    with _without_warnings("eoepca_security.session.session"):  # which the steps repeat
        return report(run(settings, in_container=runs_in_container()), as_json=as_json, strict=strict)


@cli.command(epilog=DEMO_EPILOG)
@click.option("--once", is_flag=True, help="Exit after the demo instead of staying up.")
@click.pass_obj
def demo(extra: Sequence[str], *, once: bool) -> int:
    """See it work, without any setup."""
    _refuse(extra, "demo")
    seams.check()
    from eoepca_security.proxy.cli.demo import run  # noqa: PLC0415  as in serve

    return run(once=once)


async def _fresh(source: TokenSource) -> AccessToken:
    try:
        return await source.token()
    finally:
        # A running refresh may get the only valid refresh token.
        await source.finish()


@contextlib.contextmanager
def _told(settings: Settings, remedy: Callable[..., str]) -> Iterator[None]:
    """Exit with an error message and code 1 on TokenError. `remedy` is a function of the module `remedies`."""
    try:
        yield
    except TokenError as error:
        detail = told(error, remedy(error, settings, in_container=runs_in_container()))
        click.echo(f"{error.code}: {detail}", err=True)
        raise click.exceptions.Exit(1) from None


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _refuse(extra: Sequence[str], command: str) -> None:
    if extra:
        raise click.UsageError(f"{command} does not accept mitmdump arguments")


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
    """Return the add-on's options from mitmdump's `--set name=value` arguments, which override all other sources."""
    values = [value for flag, value in pairwise(extra) if flag == "--set"]
    values += [argument.removeprefix("--set=") for argument in extra if argument.startswith("--set=")]
    names = {variable.option for variable in OPTIONS}
    pairs = (value.partition("=") for value in values)
    return {name: value for name, _, value in pairs if name in names}
