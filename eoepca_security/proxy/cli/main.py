"""The command line: `oidc-proxy [serve|check|exec|login|logout|token|demo] [-- arguments]`.

Exit codes: 0 on success, 1 for an error while running, 2 for wrong settings or arguments, 130 after Ctrl-C.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from eoepca_security.errors import SettingsError, StoreError, TokenError
from eoepca_security.issuer.ca_trust import begin_to_trust
from eoepca_security.oauth.text import printable
from eoepca_security.proxy.cli.help import Command, Group, write_lines
from eoepca_security.proxy.cli.token import LOGGER, Tokens, file_at
from eoepca_security.proxy.config.command import Command as Called
from eoepca_security.proxy.config.command import this_command
from eoepca_security.proxy.config.loading import ENV_FILE, read_dotenv, settings_in
from eoepca_security.proxy.config.services import services_of
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.config.variables import (
    COMMON_FLAGS,
    SERVE_FLAGS,
    TOKEN_FILE_MODE,
    TOKEN_STORE,
    UPSTREAM,
    VARIABLES,
    Variable,
)
from eoepca_security.proxy.patches import seams
from eoepca_security.proxy.patches.lazy_imports import lazy_imports
from eoepca_security.proxy.policy.remedies import (
    command_remedy,
    login_remedy,
    runs_in_container,
    told,
)
from eoepca_security.proxy.runtime.output import print_error, say, waiting
from eoepca_security.session.token_file import TokenFileError

LOG_FORMAT: Final = "--log-format"

_METAVARS: Final = {
    "--issuer": "URL",
    "--client-id": "ID",
    "--upstream": "URL",
    "--host": "ADDRESS",
    "--port": "PORT",
    "--admin": "HOST:PORT",
    "--services": "FILE",
    "--workers": "NUMBER",
}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Call:
    """One call of the command line: how, mitmdump's own arguments, and our options by name."""

    command: Called = Called()  # noqa: RUF009  it is frozen
    extra: Sequence[str] = ()
    flags: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None, command: Called | None = None) -> int:
    """Run the command line and return its exit code. `command` is how it was called."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = command or this_command(in_container=runs_in_container())
    own, extra = arguments, []
    if "--" in arguments:
        split = arguments.index("--")
        own, extra = arguments[:split], arguments[split + 1 :]
    if own and not own[0]:  # manifests for eoepca-security 2.0 have `args: [""]`
        own = own[1:]
    # A shell completes the arguments of a program by its name.
    variable = command.completion_variable
    name = command.program if variable in os.environ else command.usage
    call = Call(command, extra)
    try:
        result = cli.main(args=own, prog_name=name, complete_var=variable, standalone_mode=False, obj=call)
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SettingsError as error:
        for problem in error.problems:
            say(problem, err=True)
        return 2
    except StoreError as error:
        say(f"{TOKEN_STORE.env}: {error}", err=True)
        return 1
    except TokenFileError as error:
        say(f"--file: {error}", err=True)
        return 1
    return result if isinstance(result, int) else 0


def _flag(name: str, *, is_hidden: bool = False, **attributes: Any) -> Callable[[F], F]:
    """Add an option whose value goes into `Call.flags`. It may stand before the command, too."""

    def keep(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.ensure_object(Call).flags[name] = value

    return click.option(name, expose_value=False, callback=keep, hidden=is_hidden, **attributes)


def _flags(*flags: Callable[[F], F]) -> Callable[[F], F]:
    return lambda function: reduce(lambda decorated, flag: flag(decorated), reversed(flags), function)


def _setting(variable: Variable, *, is_hidden: bool = False) -> Callable[[F], F]:
    name = str(variable.flag)
    help_text = f"{variable.help.removesuffix('.')} ({variable.env})."
    metavar = _METAVARS[name]
    # A shell completes the names of files.
    kind = {"type": click.Path()} if metavar == "FILE" else {}
    return _flag(name, is_hidden=is_hidden, metavar=metavar, help=help_text, **kind)


def _common(*, is_hidden: bool = False) -> Callable[[F], F]:
    """Add the options that all commands have."""
    return _flags(
        _flag(
            ENV_FILE,
            is_hidden=is_hidden,
            metavar="FILE",
            type=click.Path(),
            help="Read settings from this file instead of .env.",
        ),
        *(_setting(variable, is_hidden=is_hidden) for variable in COMMON_FLAGS),
    )


_serving = _flags(*(_setting(variable) for variable in SERVE_FLAGS))
_log_format = _flag(
    LOG_FORMAT,
    type=click.Choice(["text", "json"]),
    help="The log format; json writes one object per line.",
)


class _Cli(Group):
    """The commands, with how a shell completes them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        completion = ctx.ensure_object(Call).command.completion
        title = "Completion of commands and options in bash (zsh and fish likewise)"
        write_lines(formatter, title, [completion] if completion is not None else [])


@click.group(
    cls=_Cli,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=(
        ("demo", "see it work, without any setup"),
        ("login", "log in"),
        ("", "run the proxy"),
        ("check", "find out what does not work"),
        ("exec -- COMMAND ...", "run a command with tokens"),
        ("token", "print an access token"),
        ("COMMAND --help", "show the help for a command"),
    ),
    epilog="Settings come from these options, then from --set (see below), the environment, and .env in the working "
    "directory; .env.example describes them all. Options before the command are the same as after it, and without a "
    "command they are those of serve. Arguments after -- go to mitmdump; after exec --, they are the command to run.",
)
@click.version_option(package_name="eoepca-security")
@_common()
@_serving
@_log_format
@click.pass_context
def cli(context: click.Context) -> int:
    """Put OIDC access tokens into the requests of tools that cannot log in."""
    if context.invoked_subcommand is None:
        return int(context.invoke(serve))
    takes = {name for parameter in cli.commands[context.invoked_subcommand].params for name in parameter.opts}
    if context.invoked_subcommand == "login":
        takes -= {"--port"}  # another one, of the redirect URI
    if wrong := [name for name in context.obj.flags if name not in takes]:
        raise click.UsageError(
            f"{wrong[0]} before the command is an option of serve, and {context.invoked_subcommand} does not take it"
        )
    return 0


@cli.command(
    cls=Command,
    examples=(
        ("serve", "run the proxy"),
        ("serve --upstream https://service.example --port 9000", ""),
        ("serve --log-format json", ""),
        ("serve -- --set flow_detail=1", "log a line for each request"),
    ),
)
@_common()
@_serving
@_log_format
@click.pass_obj
def serve(call: Call) -> int:
    """Run the proxy (the default)."""
    log_format = call.flags.get(LOG_FORMAT, "text")
    # Importing mitmproxy takes half a second, which the other commands can save.
    try:
        settings = _settings(call, call.extra)
        settings = replace(settings, command=replace(settings.command, has_ended=False))
        with lazy_imports():
            if settings.workers == 1:  # several are forked, and a fork does not copy threads
                begin_to_trust(settings.ca_file)
            seams.check()
            from eoepca_security.proxy.runtime.serve import run  # noqa: PLC0415

        return run(settings, call.extra, log_format=log_format)
    except SettingsError as error:
        for problem in error.problems:
            print_error(problem, log_format)
        return 2
    except seams.Moved as moved:
        print_error(str(moved), log_format)
        return 1


@cli.command(
    "exec",
    cls=Command,
    options_metavar="[OPTIONS] -- COMMAND ...",
    examples=(
        ("exec -- curl https://service.example/collections", ""),
        ("exec --services services.toml -- python harvest.py", ""),
        ("exec -- bash", "a shell, in which all commands can"),
    ),
    epilog="Exits with the code of the command, or 128 + n if signal n ended it; with 1 without a token, 126 or 127 if "
    "the command cannot be started, and 2 if the settings are wrong.",
)
@_common()
@_setting(UPSTREAM)
@click.pass_obj
def execute(call: Call) -> int:
    """Run a command whose HTTP(S) requests to the services get their tokens.

    The command finds a proxy and its CA in its environment, and the addresses of the services in OIDC_PROXY_URL_NAME.
    The proxy ends with it.
    """
    settings = _settings(call, for_command=True)
    if not call.extra:
        raise click.UsageError("name the command to run after --")
    try:
        with lazy_imports():
            begin_to_trust(settings.ca_file)
            seams.check()
            from eoepca_security.proxy.cli.exec import run  # noqa: PLC0415  as in serve
    except seams.Moved as moved:
        print_error(str(moved), "text")
        return 1
    return run(settings, call.extra)


@cli.command(
    cls=Command,
    examples=(
        ("token", ""),
        ("token --services services.toml --service stac", ""),
        ("TOKEN=$({command} token)", "in a script"),
        ("token --file ./token --watch", "keep a file current"),
    ),
)
@_common()
@click.option("--service", metavar="NAME", help="Print the token that this service gets, instead of the login's.")
@click.option(
    "--file",
    "place",
    metavar="PATH",
    type=click.Path(),
    help=f"Write the token into this file instead, with the mode {TOKEN_FILE_MODE.env}.",
)
@click.option("--watch", is_flag=True, help="With --file: keep a current token there until Ctrl-C, then remove it.")
@click.pass_obj
def token(call: Call, *, service: str | None, place: str | None, watch: bool) -> int:
    """Print a new access token, and nothing else, to standard output."""
    _refuse(call, "token")
    if watch and place is None:
        raise click.UsageError("--watch needs --file")
    if not watch:
        # The error that main() prints is enough.
        LOGGER.setLevel(logging.ERROR)
    # A script may show what it reads from standard error, and `serve` warns about the same files.
    settings = _settings(call, need_upstream=False, show_exposed=False)
    if settings.refresh_token is not None or settings.grant != "refresh_token":
        settings = replace(settings, access_token=None)  # request a new one instead
    file = file_at(place, settings) if place is not None else None
    tokens = Tokens(settings, _chosen(settings, service) if service is not None else None)
    if watch and file is not None:
        with _told(settings, tokens.remedy):
            asyncio.run(tokens.watch(file))
        return 0
    with _told(settings, tokens.remedy), waiting(f"waiting for a token from {settings.known_as}"):
        token = asyncio.run(tokens.fresh())
    if file is not None:
        file.write(token.value)
    else:
        click.echo(token.value)
    if tokens.sources.login.rotated and settings.token_store is None:
        say(
            "warning: the issuer replaced the refresh token, so the one in the settings may be used up. This command "
            "does not store the new one; a running proxy does",
            err=True,
        )
    return 0


@cli.command(
    cls=Command,
    examples=(
        ("login", "show a code to confirm anywhere"),
        ("login --browser", "open a browser on this machine"),
        ('login --scope "openid read"', ""),
    ),
)
@_common()
@click.option("--browser", is_flag=True, help="Log in with a browser on this machine instead of a code.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="With --browser: the port of the redirect URI http://127.0.0.1:PORT/callback, for issuers where the exact URI "
    "must be registered. The default is any free port.",
)
@click.option("--scope", help="Scopes to request, separated by spaces, instead of `openid offline_access`.")
@click.pass_obj
def login(call: Call, *, browser: bool, port: int | None, scope: str | None) -> int:
    """Log in, and store the session for proxies with these settings.

    Without --browser, it shows a code that you can confirm in a browser on any device.
    """
    from eoepca_security.proxy.cli.login import login as run  # noqa: PLC0415  as in serve

    _refuse(call, "login")
    if port is not None and not browser:
        raise click.UsageError("--port needs --browser")
    settings = _settings(call, need_upstream=False, need_session=False)
    with _told(settings, login_remedy):
        return run(settings, scope=scope, browser=browser, port=port or 0)


@cli.command(cls=Command, examples=(("logout", ""),))
@_common()
@click.pass_obj
def logout(call: Call) -> int:
    """End the stored session: at the issuer, if it supports that, and here."""
    from eoepca_security.proxy.cli.login import logout as run  # noqa: PLC0415  as in serve

    _refuse(call, "logout")
    settings = _settings(call, need_upstream=False, need_session=False)
    with _told(settings, command_remedy):
        return run(settings)


@cli.command(
    cls=Command,
    examples=(
        ("check", ""),
        ("check --json | jq '.steps[] | select(.status == \"fault\")'", ""),
    ),
    epilog="Exits with 0 if everything works, 1 if something does not, and 2 if the settings are wrong. What is "
    "unproven is a warning, and with --strict an error. It requests REMOTE_PROTECTED_ENDPOINT from the service, by "
    "default /, once with the token and once without.",
)
@_common()
@_serving
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.option("--strict", is_flag=True, help="Exit with 1 also if a step is unproven.")
@click.pass_obj
def check(call: Call, *, as_json: bool, strict: bool) -> int:
    """Check everything from the settings to the protected service, and show remedies."""
    from eoepca_security.proxy.cli.check import check as run  # noqa: PLC0415  as in serve
    from eoepca_security.proxy.cli.check_report import column_for, report  # noqa: PLC0415
    from eoepca_security.proxy.cli.steps import Step  # noqa: PLC0415

    _refuse(call, "check")
    try:
        settings = _settings(call, need_session=False)
    except SettingsError as error:
        if as_json:
            report((Step("settings", "fault", problem) for problem in error.problems), as_json=True)
        raise
    with _without_warnings("eoepca_security.session"):  # which the steps repeat
        steps = run(settings, in_container=runs_in_container())
        return report(steps, as_json=as_json, strict=strict, column=column_for(settings.services))


@cli.command(cls=Command, examples=(("demo", ""), ("demo --once", "")))
@_common(is_hidden=True)  # it has settings of its own
@click.option("--once", is_flag=True, help="Exit after the demo instead of staying up.")
@click.pass_obj
def demo(call: Call, *, once: bool) -> int:
    """See it work, without any setup."""
    _refuse(call, "demo")
    if ENV_FILE in call.flags:  # without use, but a wrong name is a mistake
        read_dotenv(Path.cwd(), call.flags[ENV_FILE])
    seams.check()
    from eoepca_security.proxy.cli.demo import run  # noqa: PLC0415  as in serve

    return run(once=once)


def _chosen(settings: Settings, name: str) -> Service:
    services = {service.name: service for service in services_of(settings)}
    if name not in services:
        raise click.UsageError(f"--service: {printable(name, 80)!r} is unknown: use one of {', '.join(services)}")
    return services[name]


@contextlib.contextmanager
def _told(settings: Settings, remedy: Callable[..., str]) -> Iterator[None]:
    """Exit with an error message and code 1 on TokenError. `remedy` is a function of the module `remedies`."""
    try:
        yield
    except TokenError as error:
        detail = told(error, remedy(error, settings, in_container=runs_in_container()))
        say(f"{error.code}: {detail}", err=True)
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


def _refuse(call: Call, command: str) -> None:
    if call.extra:
        raise click.UsageError(f"{command} does not accept mitmdump arguments")


def _settings(
    call: Call,
    extra: Sequence[str] = (),
    *,
    need_upstream: bool = True,
    need_session: bool = True,
    show_exposed: bool = True,
    for_command: bool = False,
) -> Settings:
    settings = settings_in(
        Path.cwd(),
        os.environ,
        command=call.command.ended,
        flags=call.flags,
        options=_overrides(extra),
        for_command=for_command,
        need_upstream=need_upstream,
        need_session=need_session,
    )
    if not (need_upstream and need_session):
        for warning in (*settings.warnings, *(settings.exposed if show_exposed else ())):
            say(f"warning: {warning}", err=True)
    return settings


def _overrides(extra: Sequence[str]) -> dict[str, str]:
    """Return our settings from mitmdump's `--set name=value` arguments, which come before the environment."""
    values = [value for flag, value in pairwise(extra) if flag == "--set"]
    values += [argument.removeprefix("--set=") for argument in extra if argument.startswith("--set=")]
    names = {name for variable in VARIABLES for name in (variable.option, variable.mitmproxy_option)}
    pairs = (value.partition("=") for value in values)
    return {name: value for name, _, value in pairs if name in names}
