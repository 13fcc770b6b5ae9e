"""deploy/ says the same as the code: roles, settings, ports, metrics; and no password."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from sinks import metrics
from streams.settings import Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
K8S = DEPLOY / "k8s"
COMPOSE = DEPLOY / "compose"
PROMETHEUS = DEPLOY / "prometheus"
ROLES = {"intake", "usage", "contracts", "reference", "charges", "funding", "period-close", "reconcile"}
#: The oldest Kubernetes that README.md promises, and the newest whose schemas are here.
KUBERNETES = ["1.29", kubernetes_validate.latest_version()]
#: Files for kustomize itself, and what is merged into others: no manifests.
NO_MANIFESTS = {"kustomization.yaml", "pod.patch.yaml", "worker.patch.yaml"}

FILES = sorted(each for each in DEPLOY.rglob("*") if each.is_file() and each.name != ".env")


def documents(path: Path) -> list[Any]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar with the key that it stands under; items of a list have the list's."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each, key)
    else:
        yield key, value


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge as far as the patches here need one: containers by name, other lists replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {
            key: merged(base[key], patch[key]) if key in base and key in patch else {**base, **patch}[key]
            for key in [*base, *(each for each in patch if each not in base)]
        }
    if isinstance(base, list) and all(isinstance(each, dict) and "name" in each for each in base + patch):
        patches = {each["name"]: each for each in patch}
        assert patches.keys() == {each["name"] for each in base}
        return [merged(each, patches[each["name"]]) for each in base]
    return copy.deepcopy(patch)


def manifests() -> list[dict[str, Any]]:
    """What `kubectl kustomize deploy/k8s` makes, but for namespace and image version; and the template."""
    pod, worker = (documents(K8S / name)[0] for name in ("pod.patch.yaml", "worker.patch.yaml"))
    found = []
    for path in sorted(K8S.glob("*.yaml")):
        for each in documents(path) if path.name not in NO_MANIFESTS else []:
            manifest = each
            if each["kind"] == "Deployment":
                component = each["metadata"]["labels"]["app.kubernetes.io/component"]
                for patch in [pod, worker] if component == "worker" else [pod]:
                    manifest = merged(manifest, patch | {"metadata": {}})
            found.append(manifest)
    return found


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in manifests() if each["kind"] == kind}


def pod_specs() -> dict[str, dict[str, Any]]:
    """The pods of every Deployment, Job and CronJob, by name."""
    pods = {name: each["spec"]["template"] for name, each in (of_kind("Deployment") | of_kind("Job")).items()}
    for name, each in of_kind("CronJob").items():
        pods[name] = each["spec"]["jobTemplate"]["spec"]["template"]
    return {name: each["spec"] for name, each in pods.items()}


def compose() -> dict[str, Any]:
    found: dict[str, Any] = documents(COMPOSE / "compose.yaml")[0]
    return found


# --- everything ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda each: str(each.relative_to(DEPLOY)))
def test_file_parses(path: Path) -> None:
    if path.suffix in (".yaml", ".yml"):
        assert documents(path)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    else:
        assert path.read_text()


def test_settings_are_settings() -> None:
    known = {f"TRIBILL_{each.name.upper()}" for each in fields(Settings)} | {"TRIBILL_CONFIG"}
    named = {name for path in FILES for name in re.findall(r"TRIBILL_[A-Z_]*[A-Z]", path.read_text())}
    assert named
    assert named <= known


def test_no_password_stands_anywhere() -> None:
    # A variable that must be set, <a placeholder>, or nothing.
    variable = re.compile(r"\$\{[A-Z_]+:\?[^}]*\}|<\w+>|")
    for path in FILES:
        for line in path.read_text().splitlines():
            for secret in re.findall(r"://[^/@\s:]*:(\$\{[^}]*\}|[^@/\s]*)@|requirepass +(.*)", line):
                assert variable.fullmatch("".join(secret)), (path, line)
        if path.suffix in (".yaml", ".yml", ".json"):
            for document in documents(path):
                for key, value in leaves(document):
                    if re.search(r"passw|secret|token|_key|REDISCLI_AUTH", key, re.IGNORECASE) and isinstance(
                        value, str
                    ):
                        assert variable.fullmatch(value), (path, key)


def test_no_registry_host() -> None:
    for path in FILES:
        for image in re.findall(r"(?:image: |^FROM )(\S+)", path.read_text(), re.MULTILINE):
            first, slash, _ = image.partition("/")
            assert not (slash and re.search(r"[.:]", first)), image


# --- the image ----------------------------------------------------------------------------------------------


def test_image_has_every_package() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    (included,) = re.findall(r'^include = \[(.*"agents.*)\]', project, re.MULTILINE)
    packages = {each.rstrip("*") for each in re.findall(r'"(.*?)"', included)}
    assert {each for each, _ in re.findall(r"^COPY (\w+) (\w+)$", text, re.MULTILINE)} == packages
    copied = {
        name for names in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for name in names.split()
    }
    allowed = re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(allowed) == copied


def test_image_user_is_the_pods_user() -> None:
    (user,) = re.findall(r"^USER (\d+):\d+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for name, spec in pod_specs().items():
        assert spec["securityContext"]["runAsUser"] == int(user), name


# --- Kubernetes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_valid(version: str) -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_kustomize_makes_the_same() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", K8S], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    image = documents(K8S / "kustomization.yaml")[0]["images"][0]
    rendered = {}
    for manifest in yaml.safe_load_all(done.stdout):
        kubernetes_validate.validate(manifest, KUBERNETES[-1], strict=True)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"].pop("namespace") == "tribill"
        rendered[manifest["kind"], manifest["metadata"]["name"]] = manifest
    expected = {
        (each["kind"], each["metadata"]["name"]): json.loads(
            json.dumps(each).replace('"image": "tribill"', f'"image": "{image["newName"]}:{image["newTag"]}"')
        )
        for each in manifests()
        if each["kind"] != "Secret"  # the template is not applied
    }
    assert rendered == expected


def test_kustomization_has_every_manifest() -> None:
    kustomization = documents(K8S / "kustomization.yaml")[0]
    named = {*kustomization["resources"], *(each["path"] for each in kustomization["patches"])}
    assert named | {"secret.example.yaml", "kustomization.yaml"} == {each.name for each in K8S.glob("*.yaml")}


def test_every_role_has_a_deployment() -> None:
    deployments = of_kind("Deployment")
    assert deployments.keys() == {f"tribill-{role}" for role in ROLES | {"web"}}
    for role in ROLES | {"web"}:
        deployment = deployments[f"tribill-{role}"]
        pod = deployment["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        assert container["args"] == (["web"] if role == "web" else ["worker", role])
        labels = deployment["spec"]["selector"]["matchLabels"]
        assert labels["role"] == role
        assert pod["metadata"]["labels"] == labels
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert container["resources"]["limits"].keys() == {"memory"}


def test_no_role_has_more_processes_than_partitions() -> None:
    partitions = int(of_kind("ConfigMap")["tribill-settings"]["data"]["TRIBILL_PARTITIONS"])
    for name, deployment in of_kind("Deployment").items():
        assert 1 <= deployment["spec"]["replicas"] <= (1 if name == "tribill-period-close" else partitions)


def test_ports_and_probes_agree() -> None:
    settings = of_kind("ConfigMap")["tribill-settings"]["data"]
    policies = of_kind("NetworkPolicy")
    for name, deployment in of_kind("Deployment").items():
        role = "web" if name == "tribill-web" else "worker"
        port = int(settings[f"TRIBILL_{role.upper()}_PORT"])
        pod = deployment["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        assert container["ports"] == [{"name": "http", "containerPort": port}]
        assert pod["metadata"]["annotations"] == {
            "prometheus.io/scrape": "true",
            "prometheus.io/path": "/metrics",
            "prometheus.io/port": str(port),
        }
        probes = {each: container[each]["httpGet"] for each in container if each.endswith("Probe")}
        assert {each["port"] for each in probes.values()} == {"http"}
        assert probes["livenessProbe"]["path"] == "/health"
        # The page is to be reached while the ledger is away, too: it says so.
        assert probes["readinessProbe"]["path"] == ("/health" if role == "web" else "/ready")
        (rule,) = policies[f"tribill-{role}"]["spec"]["ingress"]
        assert rule["ports"] == [{"port": port, "protocol": "TCP"}]
    (service,) = of_kind("Service").values()
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    assert (
        service["spec"]["selector"].items()
        <= of_kind("Deployment")["tribill-web"]["metadata"]["labels"].items()
    )


def test_defaults_are_the_ports_everywhere() -> None:
    settings = of_kind("ConfigMap")["tribill-settings"]["data"]
    assert int(settings["TRIBILL_WORKER_PORT"]) == Settings().worker_port
    assert int(settings["TRIBILL_WEB_PORT"]) == Settings().web_port


def test_pods_may_do_nothing_they_need_not() -> None:
    for name, spec in pod_specs().items():
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert [next(iter(each.values()))["name"] for each in container["envFrom"]] == [
            "tribill-settings",
            "tribill-secrets",
        ]


def test_secret_and_settings_share_no_key() -> None:
    secret = of_kind("Secret")["tribill-secrets"]
    assert set(secret["stringData"].values()) == {""}
    assert not secret["stringData"].keys() & of_kind("ConfigMap")["tribill-settings"]["data"].keys()


def test_disruption_budgets_choose_one_role_each() -> None:
    replicas = {
        each["metadata"]["labels"]["role"]: each["spec"]["replicas"]
        for each in of_kind("Deployment").values()
    }
    budgets = of_kind("PodDisruptionBudget")
    assert budgets.keys() == {"tribill-usage", "tribill-charges", "tribill-funding"}
    for name, budget in budgets.items():
        role = budget["spec"]["selector"]["matchLabels"]["role"]
        assert name == f"tribill-{role}"
        # With one process a budget would either do nothing or hold up every drain.
        assert replicas[role] > budget["spec"]["maxUnavailable"]


def test_close_waits_for_none_and_runs_in_london() -> None:
    (close,) = of_kind("CronJob").values()
    assert close["spec"]["timeZone"] == "Europe/London"
    assert close["spec"]["concurrencyPolicy"] == "Forbid"
    assert pod_specs()["tribill-close"]["containers"][0]["args"] == ["close", "--previous"]
    assert pod_specs()["tribill-migrate"]["containers"][0]["args"] == ["migrate"]


def test_first_step_has_what_the_migration_needs() -> None:
    first = {
        each["kind"] for each in manifests() if each["metadata"].get("labels", {}).get("install") == "first"
    }
    assert first == {"Namespace", "ConfigMap", "Secret", "Job"}


# --- Compose ------------------------------------------------------------------------------------------------


def test_every_role_has_a_service() -> None:
    services = compose()["services"]
    for role in ROLES:
        assert services[role]["command"] == ["worker", role]
        assert "127.0.0.1:6066/ready" in services[role]["healthcheck"]["test"][-1]
    assert services["web"]["command"] == ["web"]
    assert "127.0.0.1:8066/health" in services["web"]["healthcheck"]["test"][-1]
    workers = {name for name, each in services.items() if each.get("command", [""])[0] == "worker"}
    assert workers == ROLES


def test_compose_listens_on_this_machine_alone() -> None:
    ports = [each for service in compose()["services"].values() for each in service.get("ports", [])]
    assert ports
    assert all(each.startswith("127.0.0.1:") for each in ports)


def test_compose_waits_for_what_can_be_waited_for() -> None:
    services = compose()["services"]
    for name, service in services.items():
        once = service.get("restart") == "no"
        assert once != ("healthcheck" in service), name
        for other, how in service.get("depends_on", {}).items():
            finished = how["condition"] == "service_completed_successfully"
            assert finished or (how["condition"] == "service_healthy" and "healthcheck" in services[other])
            assert finished == (services[other].get("restart") == "no")


def test_compose_mounts_exist() -> None:
    composed = compose()
    for service in composed["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (COMPOSE / source).exists() if source.startswith(".") else source in composed["volumes"]


def test_compose_variables_come_from_the_env_file() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)(:[?-])", (COMPOSE / "compose.yaml").read_text()))
    example = dict(re.findall(r"^([A-Z_]+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.MULTILINE))
    assert {name for name, _ in used} == example.keys()
    assert set(example.values()) == {""}
    assert {name for name, how in used if how == ":?"} == {name for name in example if "PASSWORD" in name}
    assert ".env" in (COMPOSE / ".gitignore").read_text().split()


# --- Prometheus and Grafana ---------------------------------------------------------------------------------


def exposed() -> set[str]:
    """The names of all series in sinks.metrics, as Prometheus has them."""
    endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    found = set()
    for value in vars(metrics).values():
        if isinstance(value, MetricWrapperBase):
            (family,) = value.describe()
            found |= {family.name + each for each in endings[family.type]}
    return found


def expressions() -> list[str]:
    """Every query of the rules and the dashboard."""
    rules = [
        each["expr"] for group in documents(PROMETHEUS / "rules.yml")[0]["groups"] for each in group["rules"]
    ]
    dashboard = json.loads((DEPLOY / "grafana/dashboards/tribill.json").read_text())
    return rules + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_metrics_exist() -> None:
    named = {name for each in expressions() for name in re.findall(r"\btribill_\w+", each)}
    assert named <= exposed()
    # What nobody looks at need not be measured.
    assert {re.sub(r"_(bucket|sum|count)$", "", each) for each in exposed()} <= {
        re.sub(r"_(bucket|sum|count)$", "", each) for each in named
    }


def test_prometheus_scrapes_every_role() -> None:
    (job,) = documents(PROMETHEUS / "prometheus.yml")[0]["scrape_configs"]
    targets = {name: found["port"] for found in job["dns_sd_configs"] for name in found["names"]}
    assert targets == {role: Settings().worker_port for role in ROLES} | {"web": Settings().web_port}
    (down,) = (each for each in expressions() if "absent(" in each)
    assert set(re.findall(r'absent\(up\{job="tribill", role="([\w-]+)"\}\)', down)) == targets.keys()
    assert (
        job["job_name"] == documents(PROMETHEUS / "scrape-kubernetes.yml")[0]["scrape_configs"][0]["job_name"]
    )


def test_alerts_say_what_to_do() -> None:
    for group in documents(PROMETHEUS / "rules.yml")[0]["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"critical", "warning"}
            assert rule["annotations"].keys() == {"summary", "description"}


def test_dashboard_is_whole() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/tribill.json").read_text())
    provisioned = documents(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"][0]
    panels = dashboard["panels"]
    assert (
        len({each["id"] for each in panels}) == len({each["title"] for each in panels}) == len(panels) >= 12
    )
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert {each["datasource"]["uid"] for each in [panel, *panel["targets"]]} == {provisioned["uid"]}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells


needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_takes_the_configuration() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", PROMETHEUS / "rules.yml")


@needs_promtool
def test_promtool_takes_the_cluster_job(tmp_path: Path) -> None:
    # Debian's promtool is built without Kubernetes, so its targets are replaced; the relabelling is checked.
    (configuration,) = documents(PROMETHEUS / "scrape-kubernetes.yml")
    del configuration["scrape_configs"][0]["kubernetes_sd_configs"]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    promtool("check", "config", path)


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", PROMETHEUS / "rules.test.yml")


@needs_promtool
def test_promtool_takes_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions())]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", path)
