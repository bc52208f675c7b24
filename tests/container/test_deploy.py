"""The manifests in deploy/: valid, of one piece with the code, and run as they say.

Run with `uv run --group container pytest -m container -n 0 tests/container`; needs a Docker engine.
"""

import copy
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

# The first with native sidecars, and a newer one. The other Job is for those before.
VERSIONS = ("1.29", "1.37")
OLD_VERSIONS = ("1.25", *VERSIONS)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pod_of(file: str) -> dict[str, Any]:
    (found,) = (each for each in documents(FOLDER / file) if each["kind"] in ("Job", "Deployment"))
    template = found["spec"]["template"]["spec"]
    assert isinstance(template, dict)
    return template


def containers(image: str = "mitmproxy-oidc") -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the containers with an image in all manifests, each with its pod."""
    for path in MANIFESTS:
        for document in documents(path):
            if document["kind"] in ("Job", "Deployment"):
                pod = document["spec"]["template"]["spec"]
                for container in [*pod.get("initContainers", ()), *pod["containers"]]:
                    if container["image"] == image:
                        yield container, pod


# --- as they stand there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_manifests_are_valid(path: Path) -> None:
    for version in OLD_VERSIONS if path.name == "job-quitquitquit.yaml" else VERSIONS:
        for document in documents(path):
            assert validator.validate(document, version, strict=True) == version


def test_a_field_that_is_misspelt_is_found() -> None:
    (job,) = documents(FOLDER / "job.yaml")
    spoilt = copy.deepcopy(job)
    spoilt["spec"]["template"]["spec"]["initContainers"][0]["restartpolicy"] = "Always"
    with pytest.raises(validator.ValidationError):
        validator.validate(spoilt, VERSIONS[0], strict=True)
    # And a native sidecar is none before.
    with pytest.raises(validator.ValidationError):
        validator.validate(job, OLD_VERSIONS[0], strict=True)


def test_the_kustomization_has_what_it_names() -> None:
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    named = [document for name in kustomization["resources"] for document in documents(FOLDER / name)]
    assert {each["kind"] for each in named} == {
        "ConfigMap", "PersistentVolumeClaim", "Deployment", "Service", "NetworkPolicy",
    }  # fmt: skip
    if shutil.which("kubectl"):
        built = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, timeout=60, check=True)
        assert len(list(yaml.safe_load_all(built.stdout))) == len(named)


def test_what_they_set_is_a_setting_and_where_they_look_is_where_it_is(image: str) -> None:
    known = {variable.env for variable in VARIABLES} | {f"{each.env}_FILE" for each in VARIABLES if each.secret}
    config = inspect(image)["Config"]
    (settings,) = documents(FOLDER / "settings.yaml")
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["proxy"]
    assert {*settings["data"], *compose["environment"]} <= known
    assert compose["volumes"] == [f"session:{config['WorkingDir']}"]
    text = (ROOT / "docs" / "containers.md").read_text()
    assert set(re.findall(r"\b(?:OPEN_ID|PROXY|TLS|REMOTE)_[A-Z_]+\b", text)) <= known
    assert "\n".join(readme_lines()) in text
    assert set(re.findall(r"^\| `(.*?)`", text, re.MULTILINE)) == {each.name for each in FOLDER.iterdir()}
    found = list(containers())
    assert len(found) == 4
    for container, pod in found:
        assert {variable["name"] for variable in container["env"]} <= known
        assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == config["User"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert config["WorkingDir"] in mounts
        for variable in container["env"]:
            if variable["name"].endswith("_FILE"):
                folder, _, key = variable["value"].rpartition("/")
                assert mounts[folder]["readOnly"]
                assert f"--from-file={key}" in (FOLDER / "settings.yaml").read_text()
        if container.get("args") != ["login"]:
            # The drain, a second for the connections and one for the disk.
            assert pod["terminationGracePeriodSeconds"] > DRAIN_TIMEOUT + 2
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False


def test_a_tool_beside_the_proxy_is_another_user_without_capabilities() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["tool"]
    assert (compose["cap_drop"], compose["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    tools = list(containers(BASE))
    assert len(tools) == 2
    for container, pod in tools:
        own = container["securityContext"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert compose["user"] == f"{own['runAsUser']}:{own['runAsGroup']}"
        assert own["runAsUser"] != pod["securityContext"]["runAsUser"]
        assert own["runAsGroup"] != pod["securityContext"]["runAsGroup"]


def test_the_network_policy_lets_in_clients_of_the_proxy_only() -> None:
    deployment, service, policy = documents(FOLDER / "deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    (rule,) = policy["spec"]["ingress"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [port["port"] for port in rule["ports"]] == [ports["http"]]
    assert [port["port"] for port in service["spec"]["ports"]] == [ports["http"]]
    assert len(rule["from"]) == 1
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["PROXY_ALLOWED_HOSTS"] == service["metadata"]["name"]


# --- run ---------------------------------------------------------------------------------------------------------


def cluster(image: str, there: Outside, **claims: str) -> Cluster:
    (settings,) = documents(FOLDER / "settings.yaml")
    environment = there.environment()
    assert settings["data"].keys() <= environment.keys()
    return Cluster(
        images={"mitmproxy-oidc": image, BASE: BASE},
        settings={name: environment[name] for name in (*settings["data"], "TLS_CA_FILE")},
        secrets={"client-secret": SECRET},
        claims=claims,
        extra=there.trust,
    )


def test_the_job_with_a_sidecar(image: str, tmp_path: Path) -> None:
    with outside(tmp_path, client_secret=SECRET) as there, Pod(pod_of("job.yaml"), cluster(image, there)) as pod:
        assert pod.exit_code("tool") == 0, pod.logs("tool")
        assert '"path": "/"' in pod.logs("tool")
        assert [seen.authorized for seen in there.seen] == [True]
        for port in (8080, 8081):
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://{pod.address}:{port}/", trust_env=False, timeout=10)
        assert pod.stop("proxy") == 0
        assert there.issuer.requests[0].form["grant_type"] == "client_credentials"


def test_the_job_that_ends_its_proxy(image: str, tmp_path: Path) -> None:
    with outside(tmp_path, client_secret=SECRET) as there:
        there.issuer.behaviour.delay = 1
        with Pod(pod_of("job-quitquitquit.yaml"), cluster(image, there)) as pod:
            assert pod.exit_code("tool") == 0, pod.logs("tool")
            assert pod.exit_code("proxy") == 0
            assert [seen.authorized for seen in there.seen] == [True]


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
