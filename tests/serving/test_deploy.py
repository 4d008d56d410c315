"""The files of docs/deploy, as far as they can be read without Docker, Kubernetes and Ray."""

import asyncio
import json
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import yaml

from stca_jax.serving import __main__ as server
from stca_jax.serving.server.front import worker_of

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "docs" / "deploy"


def instructions(name):
    text = (DEPLOY / "Dockerfile").read_text()
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def entry_point():
    (command,) = map(json.loads, instructions("ENTRYPOINT"))
    assert command[:3] == ["python", "-m", "stca_jax.serving"]
    return command[3:]


def test_the_image_holds_what_the_installation_needs():
    copied = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert all((REPOSITORY / source).exists() for source in copied)
    links = [p for p in (REPOSITORY / "stca_jax").iterdir() if p.is_symlink()]
    assert {link.resolve().name for link in links} <= set(copied)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "stca_jax"):
        assert name in copied
    assert any('pip install --no-cache-dir ".[serving,redis]"' in x for x in instructions("RUN"))


@pytest.mark.parametrize("name", ["kubernetes", "kserve"])
def test_manifests_run_the_image_with_options_that_there_are(name):
    documents = list(yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text()))
    found = []
    for document in documents:
        spec = document.get("spec", {})
        for part in (spec.get("template", {}).get("spec", {}), spec.get("predictor", {})):
            found += part.get("containers", [])
    (container,) = found
    options = server._parse([*entry_point(), *container["args"]])
    assert options.workers == 4
    assert options.port == 8080
    assert options.histories.startswith("redis://")
    ports = {port["containerPort"] for port in container["ports"]}
    assert ports == {options.port}
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    mounted = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
    assert name == "kserve" or mounted == {"/models", "/data"}


def test_the_balancer_knows_all_replicas():
    documents = {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    replicas = documents["StatefulSet"]["spec"]["replicas"]
    config = documents["ConfigMap"]["data"]["default.conf"]
    assert re.findall(r"server (stca-\d+)\.stca:8080", config) == [
        f"stca-{k}" for k in range(replicas)
    ]
    pattern = re.search(r"~(\S+) \$user", config)[1].replace("?<", "?P<")
    for path in ("/v1/users/a%2Fb/events", "/v1/users/a%2Fb/score?x=1", "/v1/users/a%2Fb"):
        assert re.search(pattern, path)["user"] == "a%2Fb"


class Bound:
    """What Ray's decorator makes of a class: `bind` keeps the arguments."""

    def __init__(self, made):
        self.made = made

    def bind(self, *arguments):
        return self.made, arguments

    def options(self, **_):
        return self


def test_ray_sends_a_user_to_one_replica(monkeypatch):
    ray, serve = types.ModuleType("ray"), types.ModuleType("ray.serve")
    serve.deployment = lambda made=None, **_: Bound(made) if made else Bound
    ray.serve = serve
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    ingress, replicas = runpy.run_path(str(DEPLOY / "ray_serve.py"))["app"]
    assert len(replicas) == 2

    class Handle:
        def __init__(self, number):
            self.append = self.score = types.SimpleNamespace(remote=self.remote)
            self.number = number

        async def remote(self, user, body):
            return self.number

    class Asked:
        query_params = {"user": "käthe"}  # noqa: RUF012
        url = types.SimpleNamespace(path="/score")

        async def json(self):
            return {}

    answer = asyncio.run(ingress(*map(Handle, range(2)))(Asked()))
    assert answer == {"result": worker_of("käthe", 2)}
