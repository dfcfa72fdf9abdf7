"""The Kubernetes manifest: it parses, its parts refer to each other, and its options, routes and metric exist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from starlette.routing import Route
from support.fake_engine import FakeEngine

from deepgen_jax.cli.serve import ServeCommand
from deepgen_jax.serving.app import create_app

TEXT = (Path(__file__).parents[2] / "launch" / "kubernetes" / "deepgen.yaml").read_text(encoding="utf-8")
OBJECTS = {entry["kind"]: entry for entry in yaml.safe_load_all(TEXT)}


@pytest.fixture
def container():
    (one,) = OBJECTS["Deployment"]["spec"]["template"]["spec"]["containers"]
    return one


def test_parts_refer_to_each_other(container):
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Service", "PodDisruptionBudget"):
        selector = OBJECTS[kind]["spec"]["selector"]
        assert selector.get("matchLabels", selector).items() <= labels.items()
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    target = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", OBJECTS["Deployment"]["metadata"]["name"])
    volumes = {volume["name"] for volume in OBJECTS["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert OBJECTS["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_options_of_the_command_exist(container):
    words = container["args"]
    assert words[:2] == ["deepgen", "serve"]
    known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ServeCommand)}
    assert {word for word in words if word.startswith("--")} <= known


def test_probes_and_the_metric_exist(container):
    app = create_app(FakeEngine)
    routes = {route.path for route in app.routes if isinstance(route, Route)}
    probes = [container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    annotations = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert {*probes, annotations["prometheus.io/path"]} <= routes
    (metric,) = OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert f"# TYPE {metric['pods']['metric']['name']} gauge" in app.state.service.metrics.render().decode()


def test_the_stop_has_time_for_what_was_accepted(container):
    deadline = int(container["args"][container["args"].index("--deadline") + 1])
    assert OBJECTS["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > deadline
