"""A pod without a cluster: containers that share a network, with the volumes and probes that a manifest asks for.

What it takes from a manifest is what ours have; anything else in a container is an error, so that nothing is left out
unnoticed.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from tests.container.docker_host import answers, docker, inspect, options, unique, until

BASE = "python:3.13-slim-bookworm"

_CONTAINER = {
    "name", "image", "command", "args", "env", "envFrom", "resources", "securityContext", "volumeMounts", "ports",
    "startupProbe", "readinessProbe", "livenessProbe", "restartPolicy",
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """What the manifests refer to: images by their names, ConfigMaps and a Secret of any name, and claims' volumes.

    `settings` are for `envFrom`, and `files` for volumes. `extra` are docker's arguments for the proxy's containers
    besides those of the manifest.
    """

    images: Mapping[str, str]
    settings: Mapping[str, str]
    secrets: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, str] = field(default_factory=dict)
    extra: Sequence[str] = ()


class Pod:
    """Runs a pod's template while its `with` block lasts; starts as the kubelet does, sidecars first."""

    def __init__(self, spec: Mapping[str, Any], cluster: Cluster) -> None:
        self._spec = spec
        self._cluster = cluster
        self._name = unique("pod")
        self._volumes: dict[str, str] = {}
        self._made: list[str] = []
        self._address = ""

    def __enter__(self) -> Self:
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        names = [self.container(each["name"]) for each in self._containers()]
        docker("rm", "-f", "-v", *names, self._name, check=False)
        docker("volume", "rm", "-f", *self._made, check=False)

    def container(self, name: str) -> str:
        return f"{self._name}-{name}"

    def exit_code(self, name: str) -> int:
        """Wait until a container has ended."""
        return int(docker("wait", self.container(name)).stdout)

    def logs(self, name: str) -> str:
        done = docker("logs", self.container(name))
        return done.stdout + done.stderr

    def stop(self, name: str) -> int:
        """Stop a container as the kubelet does, within the pod's time for that."""
        docker("stop", "-t", str(self._spec.get("terminationGracePeriodSeconds", 30)), self.container(name))
        return self.exit_code(name)

    def passes(self, name: str, probe: str) -> bool:
        """Run a container's probe once."""
        (container,) = (each for each in self._containers() if each["name"] == name)
        check = container[probe]
        if "exec" in check:
            return docker("exec", self.container(name), *check["exec"]["command"], check=False).returncode == 0
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        port = ports[check["httpGet"]["port"]]
        return answers(f"http://{self._address}:{port}{check['httpGet']['path']}")

    @property
    def address(self) -> str:
        """The pod's IP address."""
        return self._address

    def _containers(self) -> list[Mapping[str, Any]]:
        return [*self._spec.get("initContainers", ()), *self._spec["containers"]]

    def _begin(self) -> None:
        aliases = [
            f"--add-host={name}:{alias['ip']}"
            for alias in self._spec.get("hostAliases", ())
            for name in alias["hostnames"]
        ]
        docker("run", "-d", "--name", self._name, *aliases, BASE, "python3", "-c", "import signal; signal.pause()")
        self._address = inspect(self._name)["NetworkSettings"]["IPAddress"]
        for volume in self._spec["volumes"]:
            self._volumes[volume["name"]] = self._make_volume(volume)
        for container in self._spec.get("initContainers", ()):
            assert container["restartPolicy"] == "Always"
            self._run(container)
            attempts, period = (container["startupProbe"][key] for key in ("failureThreshold", "periodSeconds"))
            until(lambda name=container["name"]: self.passes(name, "startupProbe"), min(attempts * period, 60))  # type: ignore[misc]
        for container in self._spec["containers"]:
            self._run(container)

    def _make_volume(self, volume: Mapping[str, Any]) -> str:
        if "persistentVolumeClaim" in volume:
            name = self._cluster.claims[volume["persistentVolumeClaim"]["claimName"]]
        else:
            name = unique("v")
            self._made.append(name)
        group = self._spec["securityContext"]["fsGroup"]
        # As the kubelet does for fsGroup: the group's, and so are new files in it.
        script = f"chown 0:{group} /v && chmod 2777 /v"
        given: dict[str, str] = {}
        if "secret" in volume or "configMap" in volume:
            contents = self._cluster.secrets if "secret" in volume else self._cluster.files
            given = {f"S{index}": value for index, value in enumerate(contents.values())}
            mode = volume["secret"]["defaultMode"] | 0o440 if "secret" in volume else 0o644
            for index, key in enumerate(contents):
                script += f' && printf %s "$S{index}" >/v/{key} && chown 0:{group} /v/{key} && chmod {mode:o} /v/{key}'
        mount = f"type=volume,src={name},dst=/v,volume-nocopy"
        docker("run", "--rm", "--user", "0", "--mount", mount, *options(given), BASE, "sh", "-c", script)
        return name

    def _run(self, container: Mapping[str, Any]) -> None:
        assert container.keys() <= _CONTAINER
        pod, own = self._spec["securityContext"], container["securityContext"]
        user = {name: own[name] for name in ("runAsUser", "runAsGroup")}
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            **user,
        }
        command, arguments = container.get("command", []), container.get("args", [])
        environment = dict(self._cluster.settings) if "envFrom" in container else {}
        environment |= {variable["name"]: variable["value"] for variable in container.get("env", ())}
        mounts = [
            f"type=volume,src={self._volumes[mount['name']]},dst={mount['mountPath']},volume-nocopy"
            + (",readonly" if mount.get("readOnly") else "")
            for mount in container.get("volumeMounts", ())
        ]
        docker(
            *("run", "-d", "--name", self.container(container["name"]), "--network", f"container:{self._name}"),
            *("--user", f"{user['runAsUser']}:{user['runAsGroup']}", "--group-add", str(pod["fsGroup"])),
            *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--memory", container["resources"]["limits"]["memory"].removesuffix("i")),
            *(part for mount in mounts for part in ("--mount", mount)),
            *options(environment),
            *(self._cluster.extra if "envFrom" in container else ()),
            *(["--entrypoint", command[0]] if command else []),
            self._cluster.images[container["image"]],
            *command[1:],
            *arguments,
        )


@contextlib.contextmanager
def claim() -> Iterator[str]:
    """A volume that outlives pods."""
    name = unique("claim")
    try:
        yield name
    finally:
        docker("volume", "rm", "-f", name)
