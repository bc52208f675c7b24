"""The manifests in deploy/: valid, of one piece with the code, and run as they say.

Run with `uv run --group container pytest -m container -n 0 tests/container`; needs a Docker engine.
"""

import copy
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from eoepca_security.proxy.addons.drain import DRAIN_TIMEOUT
from eoepca_security.proxy.config.variables import VARIABLES
from eoepca_security.testing import Behaviour
from tests.container.docker_host import CA_FILE, ENVIRONMENT, Outside, inspect, outside, readme_lines, unique, until
from tests.container.docker_pod import BASE, Cluster, Pod, claim
from tests.support.processes import ROOT

yaml = pytest.importorskip("yaml")
validator = pytest.importorskip("kubernetes_validate")


pytest_plugins = ["tests.container.docker_fixtures"]
pytestmark = [pytest.mark.container, pytest.mark.timeout(300)]

FOLDER = ROOT / "deploy" / "kubernetes"
MANIFESTS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
SECRET = "client-secret-of-the-cluster"

# What to change in the kustomization to have a sidecar for several services, and nothing else.
SEVERAL = (
    ("  # - cronjob.yaml", "  - cronjob.yaml"),
    ("# components:", "components:"),
    ("  - deployment.yaml\n  - session.yaml\n  - login.yaml\n", ""),
    ("      - REMOTE_PROTECTED_DOMAIN=https://service.example:9200\n", ""),
)

# The first with native sidecars, and a newer one.
VERSIONS = ("1.29", "1.37")


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pod_in(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the pod template of a Deployment or a CronJob."""
    spec = document["spec"]["jobTemplate"]["spec"] if document["kind"] == "CronJob" else document["spec"]
    template = spec["template"]
    assert isinstance(template, dict)
    return template


def templates() -> Iterator[Mapping[str, Any]]:
    for path in MANIFESTS:
        for document in documents(path):
            if document["kind"] in ("CronJob", "Deployment"):
                yield pod_in(document)


def pod_of(file: str) -> Mapping[str, Any]:
    (found,) = (each for each in documents(FOLDER / file) if each["kind"] in ("CronJob", "Deployment"))
    spec = pod_in(found)["spec"]
    assert isinstance(spec, dict)
    return spec


def containers(image: str = "mitmproxy-oidc") -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the containers with an image in all manifests, each with its pod."""
    for template in templates():
        pod = template["spec"]
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            if container["image"] == image:
                yield container, pod


def settings() -> dict[str, str]:
    """Return the settings in the kustomization."""
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    (given,) = kustomization["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in given["literals"])


def rendered(folder: Path, *changes: tuple[str, str]) -> list[dict[str, Any]]:
    """Return what `kubectl apply -k` would apply, after changes to the kustomization."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    there = folder / "kubernetes"
    shutil.copytree(FOLDER, there, dirs_exist_ok=True)
    (there / "client-secret").write_text(SECRET)
    for old, new in changes:
        text = (there / "kustomization.yaml").read_text()
        assert old in text
        (there / "kustomization.yaml").write_text(text.replace(old, new))
    built = subprocess.run(["kubectl", "kustomize", there], capture_output=True, text=True, timeout=60, check=True)
    return list(yaml.safe_load_all(built.stdout))


# --- as they stand there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_manifests_are_valid(path: Path) -> None:
    for version in VERSIONS:
        for document in documents(path):
            assert validator.validate(document, version, strict=True) == version


def test_a_field_that_is_misspelt_is_found() -> None:
    (job,) = documents(FOLDER / "cronjob.yaml")
    spoilt = copy.deepcopy(job)
    pod_in(spoilt)["spec"]["initContainers"][0]["restartpolicy"] = "Always"
    with pytest.raises(validator.ValidationError):
        validator.validate(spoilt, VERSIONS[0], strict=True)


def test_what_is_rendered_is_valid_and_the_image_and_the_secret_stand_in_one_place(tmp_path: Path) -> None:
    own = ("registry.example/mitmproxy-oidc", "my.registry/proxy"), ("3.0.0", "1.2.3")
    found = rendered(tmp_path, *own, ("  # - ", "  - "))
    names = {document["metadata"]["name"] for path in MANIFESTS for document in documents(path)}
    assert names <= {document["metadata"]["name"] for document in found}
    text = yaml.safe_dump_all(found)
    for version in VERSIONS:
        for document in found:
            assert validator.validate(document, version, strict=True) == version
    assert text.count("image: my.registry/proxy:1.2.3") == 3
    (secret,) = (each["metadata"]["name"] for each in found if each["kind"] == "Secret")
    assert text.count(f"secretName: {secret}") == 3


def test_changed_settings_and_secrets_replace_the_pods(tmp_path: Path) -> None:
    def deployment(*changes: tuple[str, str]) -> str:
        (one,) = (each for each in rendered(tmp_path, *changes) if each["kind"] == "Deployment")
        return str(yaml.safe_dump(pod_in(one)))

    before = deployment()
    assert deployment() == before
    assert deployment(("my-client", "other-client")) != before
    assert deployment(("[client-secret]", "[client-secret=kustomization.yaml]")) != before


def test_what_is_applied_can_be_applied_again() -> None:
    """A Job's template cannot be changed, so there is none, only CronJobs that make some."""
    kinds = {document["kind"] for path in MANIFESTS for document in documents(path)}
    assert kinds == {"CronJob", "Deployment", "NetworkPolicy", "PersistentVolumeClaim", "Service"}
    (login,) = documents(FOLDER / "login.yaml")
    assert login["spec"]["suspend"] is True


def test_what_they_set_is_a_setting_and_where_they_look_is_where_it_is(image: str) -> None:
    known = {variable.env for variable in VARIABLES} | {f"{each.env}_FILE" for each in VARIABLES if each.secret}
    config = inspect(image)["Config"]
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["proxy"]
    assert {*settings(), *compose["environment"]} <= known
    assert compose["volumes"] == [f"session:{config['WorkingDir']}"]
    text = (ROOT / "docs" / "containers.md").read_text()
    assert set(re.findall(r"\b(?:OPEN_ID|PROXY|TLS|REMOTE)_[A-Z_]+\b", text)) <= known
    assert "\n".join(readme_lines()) in text
    assert set(re.findall(r"^\| `(.*?)`", text, re.MULTILINE)) == {each.name for each in FOLDER.glob("*.yaml")}
    folder, _, key = settings()["OPEN_ID_CONNECT_CLIENT_SECRET_FILE"].rpartition("/")
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    assert kustomization["secretGenerator"] == [{"name": "oidc-proxy", "files": [key]}]
    assert f"/{FOLDER.relative_to(ROOT)}/{key}" in (ROOT / ".gitignore").read_text().splitlines()
    found = list(containers())
    assert len(found) == 3
    for container, pod in found:
        own = container["securityContext"]
        assert {variable["name"] for variable in container.get("env", ())} <= known
        assert f"{own['runAsUser']}:{own['runAsGroup']}" == config["User"]
        assert not pod["securityContext"].keys() & {"runAsUser", "runAsGroup", "runAsNonRoot"}  # those of the tool
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert config["WorkingDir"] in mounts
        assert mounts[folder]["readOnly"]
        if container.get("args") != ["login"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            # The drain, a second for the connections and one for the disk.
            assert pod["terminationGracePeriodSeconds"] > DRAIN_TIMEOUT + 2
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False


def test_a_tool_beside_the_proxy_is_another_user_without_capabilities() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["tool"]
    assert (compose["cap_drop"], compose["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    tools = list(containers(BASE))
    assert len(tools) == 1
    for container, pod in tools:
        own, (proxy,) = container["securityContext"], pod["initContainers"]
        assert own["runAsNonRoot"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert compose["user"] == f"{own['runAsUser']}:{own['runAsGroup']}"
        assert own["runAsUser"] != proxy["securityContext"]["runAsUser"]
        assert own["runAsGroup"] != proxy["securityContext"]["runAsGroup"]


def test_the_network_policy_lets_in_clients_of_the_proxy_only() -> None:
    deployment, service, policy = documents(FOLDER / "deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == selector == service["spec"]["selector"]
    assert selector.items() <= labels.items()
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    (rule,) = policy["spec"]["ingress"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [port["port"] for port in rule["ports"]] == [ports["http"]]
    assert [port["port"] for port in service["spec"]["ports"]] == [ports["http"]]
    assert len(rule["from"]) == 1
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["PROXY_ALLOWED_HOSTS"] == service["metadata"]["name"]


def test_the_egress_policy_is_for_all_pods_with_a_proxy_and_allows_names_and_two_ports() -> None:
    (policy,) = documents(FOLDER / "egress.yaml")
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert all(chosen.items() <= template["metadata"]["labels"].items() for template in templates())
    assert policy["spec"]["policyTypes"] == ["Egress"]
    names, outside_ = policy["spec"]["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    given = settings()
    urls = [urlsplit(given[name]) for name in ("OPEN_ID_CONNECT_URL", "REMOTE_PROTECTED_DOMAIN")]
    ports = {url.port or 443 for url in urls}
    assert {port["port"] for port in outside_["ports"]} == ports


def test_the_sidecar_for_several_services_is_valid_and_finds_them_all(tmp_path: Path) -> None:
    found = rendered(tmp_path, *SEVERAL)
    for version in VERSIONS:
        for document in found:
            assert validator.validate(document, version, strict=True) == version
    (pod,) = (pod_in(each)["spec"] for each in found if each["metadata"]["name"] == "tool")
    (aliases,) = pod["hostAliases"]
    names = tomllib.loads((FOLDER / "services" / "services.toml").read_text())["service"]
    assert aliases == {"ip": "127.0.0.1", "hostnames": [f"{name}.localhost" for name in names]}
    (proxy,), (tool,) = pod["initContainers"], pod["containers"]
    (folder,) = (mount["mountPath"] for mount in proxy["volumeMounts"] if mount["name"] == "services")
    assert {"name": "PROXY_SERVICES", "value": f"{folder}/services.toml"} in proxy["env"]
    assert all(name in tool["command"][-1] for name in names)
    # What cronjob.yaml has, is there as well.
    assert {"PROXY_HOST", "OPEN_ID_CONNECT_GRANT"} <= {variable["name"] for variable in proxy["env"]}
    assert {volume["name"] for volume in pod["volumes"]} == {"state", "secrets", "services"}


def test_another_file_of_services_is_what_the_next_run_gets(tmp_path: Path) -> None:
    def mounted(text: str) -> str:
        changes = tmp_path / "kubernetes" / "services" / "services.toml"
        rendered(tmp_path, *SEVERAL)
        changes.write_text(text)
        built = subprocess.run(
            ["kubectl", "kustomize", tmp_path / "kubernetes"], capture_output=True, text=True, timeout=60, check=True
        )
        (pod,) = (pod_in(each)["spec"] for each in yaml.safe_load_all(built.stdout) if each["kind"] == "CronJob")
        (name,) = (volume["configMap"]["name"] for volume in pod["volumes"] if volume["name"] == "services")
        return str(name)

    assert mounted("") != mounted("# changed") != mounted("# again")


# --- run ---------------------------------------------------------------------------------------------------------


def cluster(image: str, there: Outside, **claims: str) -> Cluster:
    given = settings()
    environment = there.environment() | {name: value for name, value in given.items() if name.endswith("_FILE")}
    assert given.keys() <= environment.keys()
    return Cluster(
        images={"mitmproxy-oidc": image, BASE: BASE},
        settings={name: environment[name] for name in (*given, "TLS_CA_FILE")},
        secrets={"client-secret": SECRET},
        claims=claims,
        extra=there.trust,
    )


def test_the_cron_job_with_a_sidecar(image: str, tmp_path: Path) -> None:
    with outside(tmp_path, client_secret=SECRET) as there, Pod(pod_of("cronjob.yaml"), cluster(image, there)) as pod:
        assert pod.exit_code("tool") == 0, pod.logs("tool")
        assert pod.passes("proxy", "readinessProbe")
        assert pod.passes("proxy", "livenessProbe")
        assert '"path": "/"' in pod.logs("tool")
        assert [seen.authorized for seen in there.seen] == [True]
        for port in (8080, 8081):
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://{pod.address}:{port}/", trust_env=False, timeout=10)
        assert pod.stop("proxy") == 0
        assert there.issuer.requests[0].form["grant_type"] == "client_credentials"


def test_the_sidecar_for_several_services(image: str, tmp_path: Path) -> None:
    (job,) = (each for each in rendered(tmp_path, *SEVERAL) if each["kind"] == "CronJob")
    spec = pod_in(job)["spec"]
    (there_is,) = {each["image"] for each in spec["initContainers"]}
    with outside(tmp_path, client_secret=SECRET) as there:
        text = (FOLDER / "services" / "services.toml").read_text()
        # The tokens of this issuer have the same audience for all scopes.
        text = re.sub(r"^audience = .*$", "", re.sub(r"https://\w+\.example", there.service_url, text), flags=re.M)
        given = cluster(image, there)
        given = replace(
            given,
            images={**given.images, there_is: image},
            settings={key: value for key, value in given.settings.items() if key != "REMOTE_PROTECTED_DOMAIN"},
            files={"services.toml": text},
        )
        with Pod(spec, given) as pod:
            assert pod.exit_code("tool") == 0, pod.logs("tool")
            assert pod.stop("proxy") == 0
        assert [(seen.target, seen.authorized) for seen in there.seen] == [("/", True), ("/ogc-api/", True)]
        scopes = [request.form.get("scope") for request in there.issuer.requests]
        assert {"stac-api", "processes-api"} <= set(scopes)


def test_the_login_and_the_deployment_after_it(image: str, tmp_path: Path) -> None:
    behaviour = Behaviour(lifetime=3, refresh_tokens="rotate")
    behaviour.login.interval = 0.1
    with outside(tmp_path, behaviour, client_secret=SECRET) as there, claim() as volume:
        given = cluster(image, there, **{"oidc-proxy": volume})
        with Pod(pod_of("login.yaml"), given) as pod:
            assert pod.exit_code("login") == 0, pod.logs("login")
        for _ in range(2):
            with Pod(pod_of("deployment.yaml"), given) as pod:
                until(lambda: pod.passes("proxy", "startupProbe"))
                until(lambda: pod.passes("proxy", "readinessProbe"))
                url = f"http://{pod.address}:8080/"
                # By the name of the Service, and by no other.
                for host, status in (("oidc-proxy:8080", 200), (pod.address, 403)):
                    assert httpx.get(url, headers={"Host": host}, trust_env=False).status_code == status
                there.issuer.behaviour.down = True
                until(lambda: not pod.passes("proxy", "readinessProbe"))
                assert pod.passes("proxy", "livenessProbe")
                there.issuer.behaviour.down = False
                assert "other users could read" not in pod.logs("proxy")
                assert pod.stop("proxy") == 0
        assert there.issuer.reuses == 0


def test_compose(image: str, there: Outside, tmp_path: Path) -> None:
    command = next((each for each in (["docker", "compose"], ["docker-compose"]) if _runs(each)), None)
    if command is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    assert "image: mitmproxy-oidc\n" in text
    (tmp_path / "deploy").mkdir()
    file = tmp_path / "deploy" / "compose.yaml"
    file.write_text(re.sub("image: mitmproxy-oidc\n", f"image: {image}\n", text))
    # The CA of this issuer, which a file for everybody cannot know.
    override = tmp_path / "deploy" / "override.yaml"
    override.write_text(yaml.safe_dump({"services": {"proxy": {"volumes": [f"{there.ca}:{CA_FILE}:ro"]}}}))
    (tmp_path / ".env").write_text("".join(f"{key}={value}\n" for key, value in there.environment().items()))
    command = [*command, "-p", unique("compose"), "-f", str(file), "-f", str(override)]

    def compose(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
        )

    try:
        done = compose("up", "--no-build", "--exit-code-from", "tool")
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"path": "/"' in done.stdout
        assert [seen.authorized for seen in there.seen] == [True]
    finally:
        compose("down", "--volumes")


def _runs(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "version"], capture_output=True, timeout=60, check=False).returncode == 0
