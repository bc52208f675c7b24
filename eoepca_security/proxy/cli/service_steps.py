"""The steps of `check` that show whether one service accepts its token."""

import re
from dataclasses import replace

from eoepca_security.errors import TokenInvalid
from eoepca_security.issuer.provider import Provider
from eoepca_security.issuer.transport import explain
from eoepca_security.oauth.text import without_secrets
from eoepca_security.oauth.verify import looks_like_jwt
from eoepca_security.proxy.cli.probes import NETWORK_ERRORS, UPSTREAM_TIMEOUT, ask, bounded
from eoepca_security.proxy.cli.steps import NotOk, audience_of
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.policy.remedies import (
    BINDING_REMEDY,
    CHECK_CLIENT,
    CLOCK,
    Place,
    Reply,
    key_name,
    network_remedy,
    refusal_remedy,
    service_audience_remedy,
    unproven_remedy,
)
from eoepca_security.session.session import AccessToken


def check_audience(settings: Settings, service: Service, provider: Provider, token: AccessToken) -> str:
    """Return whom the token is for; raises NotOk when that is not the service, and IssuerUnavailable."""
    is_opaque = not looks_like_jwt(token.value)
    wanted = service.audience or service.resource
    name = key_name(service, "audience", settings)
    if wanted is None:
        seen = "is opaque" if is_opaque else f"is for {audience_of(token)}"
        return f"none required, because {name} is not set; the token {seen}"
    if is_opaque:
        raise NotOk("not compared, because the token is opaque: only the service can read it", status="skipped")
    try:
        provider.verify(token.value, wanted)
    except TokenInvalid as error:
        if error.claim == "cnf":
            raise NotOk(str(error), BINDING_REMEDY) from None
        if error.claim != "aud":
            raise NotOk(str(error), CLOCK if error.cause == "clock" else CHECK_CLIENT) from None
        raise NotOk(
            f"{error} (it is for {audience_of(token)})", service_audience_remedy(settings, service, wanted)
        ) from None
    return f"the token is for {wanted}"


def check_upstream(settings: Settings, service: Service, token: AccessToken, *, in_container: bool) -> str:
    """Ask the service with and without the token; return what it answered, or raise NotOk."""
    url = f"{service.upstream}{service.path}"
    place = Place(key_name(service, "url", settings), service.upstream, in_container)
    place = replace(place, ca_file=key_name(service, "ca_file", settings))
    service = replace(service, ca_file=service.ca_file or settings.ca_file)
    target = f"{service.path}{settings.endpoint}"
    try:
        reply = bounded(lambda: ask(service, target, token.value), UPSTREAM_TIMEOUT)
    except NETWORK_ERRORS as error:
        cause, reason = explain(error)
        raise NotOk(f"{url} cannot be reached: {reason}", network_remedy(place, cause, by_proxy=False)) from None
    answered = f"{url}{settings.endpoint} answered {_outcome(reply, token)} with the token"
    without: Reply | None = None
    try:
        without = bounded(lambda: ask(service, target, None), UPSTREAM_TIMEOUT)
        other = " and without it" if without.status == reply.status else f" and {without.status} without it"
    except NETWORK_ERRORS as error:
        other = f", but a request without it failed: {explain(error)[1]}"
    remedy = refusal_remedy(place, reply, without, service, settings, audience=audience_of(token))
    if remedy is not None:
        raise NotOk(answered, remedy)
    if (remedy := unproven_remedy(reply, without)) is not None:
        raise NotOk(f"{answered}{other}, which shows nothing about the token", remedy, status="unproven")
    return f"{answered}{other}"


def _outcome(reply: Reply, token: AccessToken) -> str:
    """Return the status, and where the answer leads or what it asks for."""
    said = reply.headers.get("www-authenticate", "")
    if (location := reply.headers.get("location")) and 300 <= reply.status < 400:
        # The host, or the path on this one: the rest may be long, and hold anything.
        elsewhere = re.match(r"((?:https?:)?//)(?:[^/?#]*@)?([^/?#]*)", location)
        said = f"to {elsewhere[1]}{elsewhere[2]}" if elsewhere else f"to {re.split('[?#]', location)[0]}"
    said = without_secrets(said, (token.value,))
    return f"{reply.status} ({said})" if said else str(reply.status)
